"""The four-domain byte-level corpus: loading it checked, and cutting it into batches."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_lab.paths import CourseError, data_dir

DOMAINS = ("prose", "python", "arithmetic", "languages")


class CorpusError(CourseError, ValueError):
    """A file of the corpus is missing or damaged."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Training and validation bytes of each domain, as 1-D uint8 tensors."""

    train: dict[str, Tensor]
    val: dict[str, Tensor]

    def __repr__(self) -> str:
        sizes = (f"{name} {len(self.train[name]):,} + {len(self.val[name]):,}" for name in self.train)
        return f"Corpus({', '.join(sizes)} bytes)"


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of text: `targets` are `inputs` one byte later; `domains` index the split's keys in order."""

    inputs: Tensor  # (B, S) int64
    targets: Tensor  # (B, S) int64
    domains: Tensor  # (B,) int64


def load_corpus(domains: Iterable[str] = DOMAINS, root: Path | None = None) -> Corpus:
    """Read the named domains; `root` is the folder of corpus.json, by default the course's `data/`.

    Raises:
        ValueError: a domain is unknown.
        CorpusError: a file is missing, or is not byte for byte the one that corpus.json describes.
    """
    domains = (domains,) if isinstance(domains, str) else tuple(domains)
    unknown = [name for name in domains if name not in DOMAINS]
    if unknown or not domains:
        raise ValueError(
            f"domains must be some of {', '.join(DOMAINS)}; got {', '.join(map(repr, unknown)) or 'none'}."
        )
    root = data_dir() if root is None else Path(root)
    manifest = _read_manifest(root / "corpus.json")
    splits = {
        split: {name: _read_text(root, f"{name}.{split}.txt", manifest) for name in domains}
        for split in ("train", "val")
    }
    return Corpus(**splits)


def _damaged(path: Path, what: str) -> CorpusError:
    remedy = "restore it with `git checkout -- data/corpus data/corpus.json` or download the course again."
    return CorpusError(f"{path} {what}: {remedy}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _damaged(path, "is missing") from None
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error.strerror})") from None


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file by name."""
    content = _read(path)
    try:
        files = json.loads(content)["files"]
        return {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path, "does not list the corpus files with their sizes and checksums") from None


def _read_text(root: Path, name: str, manifest: Mapping[str, tuple[int, str]]) -> Tensor:
    if name not in manifest:
        raise _damaged(root / "corpus.json", f"does not list {name}")
    path, (size, sha256) = root / "corpus" / name, manifest[name]
    content = _read(path)
    if len(content) != size:
        raise _damaged(path, f"has {len(content):,} bytes where corpus.json says {size:,}")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise _damaged(path, "was altered (its SHA-256 is not the one in corpus.json)")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)  # bytearray: torch wants memory it may write


def encode(text: str) -> Tensor:
    """The text's UTF-8 bytes, int64."""
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def decode(ids: Tensor | Iterable[int]) -> str:
    """The text of 1-D UTF-8 bytes; what is no valid character, such as one cut in half, becomes U+FFFD."""
    values = ids.tolist() if isinstance(ids, Tensor) else ids
    return bytes([*values]).decode(errors="replace")


def sample_batch(split: Mapping[str, Tensor], *, batch_size: int, context: int, generator: torch.Generator) -> Batch:
    """Random windows of `context` bytes: every row draws its domain uniformly, then where it starts.

    A seeded CPU generator gives the same batch on every platform.

    Raises:
        ValueError: a size is not positive, or a domain is shorter than context + 1 bytes.
    """
    _check_positive(batch_size=batch_size, context=context)
    if not split:
        raise ValueError("the split holds no domain; expected at least one, as in load_corpus().train.")
    for name, text in split.items():
        _check_length(text, context, f"domain {name!r}")
    texts = list(split.values())
    domains = torch.randint(len(texts), (batch_size,), generator=generator)
    rows = []
    for domain in domains.tolist():
        text = texts[domain]
        start = int(torch.randint(len(text) - context, (), generator=generator))
        rows.append(text[start : start + context + 1])
    windows = torch.stack(rows).long()  # (B, S + 1)
    return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), domains)


def validation_windows(text: Tensor, *, context: int, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs and targets (N, context), int64: the text in consecutive windows that do not overlap.

    With `limit`, at most that many of them, spread evenly over the text; a rest that fills no window is left out.

    Raises:
        ValueError: a size is not positive, or the text is shorter than context + 1 bytes.
    """
    _check_positive(context=context, **({} if limit is None else {"limit": limit}))
    _check_length(text, context, "the text")
    count = (len(text) - 1) // context
    inputs = text[: count * context].view(count, context)
    targets = text[1 : count * context + 1].view(count, context)
    if limit is not None and limit < count:
        chosen = torch.arange(limit) * count // limit
        inputs, targets = inputs[chosen], targets[chosen]
    return inputs.long(), targets.long()


def validation_batch(split: Mapping[str, Tensor], *, context: int, limit: int) -> Batch:
    """At most `limit` validation windows of every domain, in one batch, domain after domain.

    Raises:
        ValueError: see `validation_windows`.
    """
    windows = [validation_windows(text, context=context, limit=limit) for text in split.values()]
    inputs, targets = (torch.cat(part) for part in zip(*windows, strict=True))
    domains = torch.arange(len(windows)).repeat_interleave(torch.tensor([len(part[0]) for part in windows]))
    return Batch(inputs, targets, domains)


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer; got {value!r}.")


def _check_length(text: Tensor, context: int, what: str) -> None:
    if len(text) < context + 1:
        raise ValueError(
            f"{what} has {len(text):,} bytes, but context={context} needs {context + 1:,}: choose a shorter context."
        )
