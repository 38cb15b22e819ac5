"""The small trained models that come with the course."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from moe_lab import checkpoints
from moe_lab.accounting import count_parameters
from moe_lab.checkpoints import CheckpointError, load, load_shipped_model
from moe_lab.config import LMConfig, TrainConfig
from moe_lab.data import load_corpus, validation_batch
from moe_lab.paths import CourseError
from moe_lab.plain import from_plain
from moe_lab.presets import MOE_BASELINE
from moe_lab.train import choices_of

DATA = Path(__file__).resolve().parent.parent / "data"
NAMES = ("tiny_moe", "tiny_moe_collapsed")
described = json.loads((DATA / "models.json").read_text("utf-8"))["models"]


def load_script():
    spec = importlib.util.spec_from_file_location("train_models", DATA / "train_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def file_of(name, root=DATA):
    return root / "models" / f"{name}.safetensors"


@pytest.fixture(scope="module", params=NAMES)
def shipped(request):
    """A model's name, the model, and what the script measures of it here."""
    model = load_shipped_model(request.param)
    return request.param, model, script.measure(model)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The models in a folder that may be damaged, in place of the course's."""
    shutil.copy(DATA / "models.json", tmp_path)
    shutil.copytree(DATA / "models", tmp_path / "models")
    monkeypatch.setattr(checkpoints, "data_dir", lambda: tmp_path)
    return tmp_path


# -- what is there ------------------------------------------------------------------------------------------


def test_every_file_is_described_and_none_is_there_that_is_not():
    assert tuple(described) == NAMES
    assert sorted(path.name for path in (DATA / "models").iterdir()) == [f"{name}.safetensors" for name in NAMES]
    for name, entry in described.items():
        content = file_of(name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert {"date", "python", "torch"} <= set(entry["stamp"])
        assert entry["command"].startswith("python data/train_models.py")


def test_together_they_are_under_two_megabytes():
    assert sum(file_of(name).stat().st_size for name in NAMES) < 2_000_000


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_in_the_script_is_the_one_recorded(name):
    recipe, entry = script.RECIPES[name], described[name]
    assert from_plain(TrainConfig, entry["training"]) == recipe.training
    assert from_plain(LMConfig, entry["model"]) == recipe.model == MOE_BASELINE == load(file_of(name))[1]
    assert entry["about"] == recipe.about


def test_both_saw_the_same_bytes_for_as_long():
    one, other = (script.RECIPES[name].training for name in NAMES)
    assert one == other.but(router_rate=one.router_rate, balance=one.balance)
    assert other.balance.alpha == other.balance.bias_rate == 0  # no cure


def test_the_sources_page_tells_what_they_are():
    page = (DATA / "SOURCES.md").read_text("utf-8")
    assert f"{count_parameters(MOE_BASELINE).total:,} parameters" in page
    for name, entry in described.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
        assert f" {entry['bytes']:,} " in row, name
        assert f" {entry['bits_per_byte']['mean']:.2f} " in row, name


# -- what they do -------------------------------------------------------------------------------------------


def test_they_predict_as_well_as_was_written_down(shipped):
    name, _, measured = shipped
    recorded = described[name]["bits_per_byte"]
    assert set(recorded) == {"prose", "python", "arithmetic", "languages", "mean"}
    assert measured["bits_per_byte"] == pytest.approx(recorded, abs=0.01)


def test_one_is_balanced_and_the_other_collapsed(shipped):
    name, model, measured = shipped
    assert measured["max_violation"] == pytest.approx(described[name]["max_violation"], abs=0.02)
    for violation in measured["max_violation"]:
        assert violation < 0.3 if name == "tiny_moe" else violation > 2
    assert not model.training


def test_in_layer_2_digits_and_other_scripts_mostly_have_an_expert_each():
    # notebooks 00 and 03 say so
    probe = validation_batch(load_corpus().val, context=64, limit=64)
    tokens = probe.inputs.flatten()
    first = choices_of(load_shipped_model("tiny_moe"), probe.inputs)[1].topk_experts[:, 0]
    favourites = set()
    for kind in ((tokens >= ord("0")) & (tokens <= ord("9")), tokens >= 128):
        counts = first[kind].bincount(minlength=8)
        assert counts.max() / counts.sum() > 0.7
        favourites.add(counts.argmax().item())
    assert len(favourites) == 2


# -- what can go wrong --------------------------------------------------------------------------------------


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [(Path.unlink, "is missing"), (change_a_byte, "was altered"), (lambda path: path.write_bytes(b""), "is missing")],
)
def test_a_missing_or_altered_file_is_named_with_its_remedy(copy, damage, says):
    path = file_of("tiny_moe", copy)
    damage(path)
    with pytest.raises(CheckpointError, match="git checkout -- data/models") as caught:
        load_shipped_model("tiny_moe")
    assert isinstance(caught.value, CourseError)
    assert f"{path} {says}" in str(caught.value)
    load_shipped_model("tiny_moe_collapsed")  # the other is as good as before


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(CheckpointError, match=r"No model 'big_moe' .* one of tiny_moe, tiny_moe_collapsed"):
        load_shipped_model("big_moe")


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_damaged_description_is_named_with_its_remedy(copy, content):
    manifest = copy / "models.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    with pytest.raises(CheckpointError, match=r"git checkout -- data/models\.json"):
        load_shipped_model("tiny_moe")


# -- training them ------------------------------------------------------------------------------------------


def test_the_script_trains_and_keeps_the_other_entry(copy, monkeypatch, capsys):
    short = {name: script.RECIPES[name].training.but(steps=2, batch_size=2, context=16) for name in NAMES}
    recipes = {name: script.Recipe("short", training) for name, training in short.items()}
    monkeypatch.setattr(script, "RECIPES", recipes)
    assert script.main(["--only", "tiny_moe_collapsed", "--data", str(copy)]) == 0
    written = json.loads((copy / "models.json").read_text("utf-8"))["models"]
    assert written["tiny_moe"] == described["tiny_moe"]
    assert written["tiny_moe_collapsed"]["about"] == "short"
    assert load_shipped_model("tiny_moe_collapsed").config == MOE_BASELINE
    assert "bits per byte" in capsys.readouterr().out
