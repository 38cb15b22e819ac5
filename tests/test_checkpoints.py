import contextlib
import errno
import hashlib
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moe_lab import checkpoints
from moe_lab.checkpoints import CheckpointError, load, load_model, load_shipped_model, require_same, save, save_model
from moe_lab.config import LMConfig, MoEConfig, RunConfig, TrainConfig
from moe_lab.data import encode
from moe_lab.lm import LM
from moe_lab.train import Trainer

PROPERTY = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EXPERTS = MoEConfig(d_model=8, d_ff=6, n_experts=4, top_k=2, score="sigmoid", selection_bias=True)
DENSE = LMConfig(d_model=8, n_layers=1, n_heads=2, d_ff=10, vocab_size=40)
WITH_EXPERTS = DENSE.but(moe=EXPERTS, conv_width=3)
RUN = RunConfig(model=WITH_EXPERTS, training=TrainConfig(betas=(0.8, 0.9), seed=7), save_every=3)
TENSORS = {
    "fp32": torch.randn(3, 4),
    "bf16": torch.randn(5).bfloat16(),
    "bytes": torch.arange(256, dtype=torch.uint8),
    "whole": torch.tensor(2**40),
    "one": torch.tensor(True),
    "none": torch.zeros(0, 3),
    "strange": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    "transposed": torch.arange(6.0).view(2, 3).T,
}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (t.contiguous().flatten().view(torch.uint8) if t.numel() else t for t in (one, other))
    return torch.equal(left, right)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RUN, WITH_EXPERTS, DENSE], ids=["run", "experts", "dense"])
def test_tensors_and_configuration_come_back_bit_for_bit(config, tmp_path):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    save(path, TENSORS, config)
    tensors, found = load(path)
    assert found == config
    assert tensors.keys() == TENSORS.keys()
    assert all(same_bits(tensors[name], TENSORS[name]) for name in TENSORS)
    assert left_behind(path.parent) == ["a.safetensors"]


def test_saving_again_replaces_all_of_it(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, TENSORS, DENSE)
    save(path, {"x": torch.ones(3)}, RUN)
    tensors, config = load(path)
    assert (tensors.keys(), config) == ({"x"}, RUN)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions as on Unix")
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_a_checkpoint_is_who_may_read_any_new_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        save(tmp_path / "a.safetensors", TENSORS, RUN)
        (tmp_path / "plain").write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_says_what_it_is_without_being_read(tmp_path):
    save(tmp_path / "a.safetensors", TENSORS, RUN)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as opened:
        header = json.loads(opened.metadata()["moe_lab"])
    assert (header["format"], header["kind"]) == ("moe-lab checkpoint 1", "RunConfig")
    assert header["config"]["training"]["betas"] == [0.8, 0.9]


def test_equal_weights_give_equal_files(tmp_path):
    for name in "ab":
        save(tmp_path / name, TENSORS, RUN)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "model", [DENSE, WITH_EXPERTS, WITH_EXPERTS.but(tied_embeddings=True)], ids=["", "moe", "tied"]
)
def test_a_model_comes_back_and_computes_the_same_bits(model, tmp_path):
    torch.manual_seed(0)
    ours, tokens = LM(model), torch.randint(40, (2, 7))
    for layer in ours.moe_layers:
        layer.router.selection_bias.normal_()
    save_model(tmp_path / "a.safetensors", ours)
    theirs = load_model(tmp_path / "a.safetensors")
    assert not theirs.training
    assert theirs.config == model
    assert torch.equal(ours.eval()(tokens)[0], theirs(tokens)[0])
    assert (theirs.head.weight is theirs.embedding.weight) == model.tied_embeddings


def test_a_tied_table_is_written_once(tmp_path):
    model = LM(DENSE.but(tied_embeddings=True))
    save_model(tmp_path / "a.safetensors", model)
    save(tmp_path / "b.safetensors", Trainer(model, {"a": encode("abc" * 20)}, TrainConfig()).state(), model.config)
    for name in "ab":
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as opened:
            assert "model.head.weight" not in opened.keys()  # noqa: SIM118
        tensors, _ = load(tmp_path / f"{name}.safetensors")
        assert torch.equal(tensors["model.head.weight"], tensors["model.embedding.weight"])


def test_a_model_in_bf16_is_half_the_file_and_keeps_its_bias_exactly(tmp_path):
    torch.manual_seed(0)
    model = LM(WITH_EXPERTS.but(d_model=32, d_head=4, vocab_size=256, moe=EXPERTS.but(d_model=32)))
    model.moe_layers[0].router.selection_bias.fill_(0.001)
    save_model(tmp_path / "full.safetensors", model)
    save_model(tmp_path / "half.safetensors", model, torch.bfloat16)
    full, half = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full
    back = load_model(tmp_path / "half.safetensors")
    assert {weight.dtype for weight in back.state_dict().values()} == {torch.float32}
    assert torch.equal(back.head.weight, model.head.weight.bfloat16().float())
    assert torch.equal(back.moe_layers[0].router.selection_bias, torch.full((4,), 0.001))


def test_the_model_of_a_whole_run_can_be_opened_alone(tmp_path):
    trainer = Trainer(LM(WITH_EXPERTS.but(vocab_size=256)), {"a": encode("abcdef" * 20)}, TrainConfig(context=8))
    trainer.step()
    config = RunConfig(model=trainer.model.config, training=trainer.config)
    save(tmp_path / "step.safetensors", trainer.state(), config)
    model = load_model(tmp_path / "step.safetensors")
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in trainer.model.state_dict().items())


# --- a disk that is full, a folder that is none -------------------------------------------------------------------


@pytest.fixture
def standing(tmp_path):
    """A checkpoint that must survive."""
    path = tmp_path / "a.safetensors"
    save(path, TENSORS, RUN)
    return path


@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")],
    ids=["OSError", "SafetensorError"],
)
def test_on_a_full_disk_what_stood_there_is_intact_and_nothing_half_written_stays(
    failure, there_before, tmp_path, standing, monkeypatch
):
    def half(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise failure

    before = standing.read_bytes()
    path = standing if there_before else tmp_path / "b.safetensors"
    monkeypatch.setattr(checkpoints, "save_file", half)
    says = "the file that stood there is intact" if there_before else "nothing was left behind"
    message = rf"{path.name} cannot be written \(.*No space left on device.*\): {says}\. Is the disk full\?"
    with pytest.raises(CheckpointError, match=message):
        save(path, {"x": torch.zeros(3)}, DENSE)
    assert standing.read_bytes() == before
    assert left_behind(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("last_act", ["fsync", "replace"])
def test_until_the_last_act_succeeded_the_old_file_stands(last_act, standing, tmp_path, monkeypatch):
    def fail(*_arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = standing.read_bytes()
    monkeypatch.setattr(os, last_act, fail)
    with pytest.raises(CheckpointError, match=r"Input/output error.*the file that stood there is intact"):
        save(standing, {"x": torch.zeros(3)}, DENSE)
    assert standing.read_bytes() == before
    assert left_behind(tmp_path) == ["a.safetensors"]


def test_an_interrupt_while_it_is_written_leaves_the_old_file(standing, tmp_path, monkeypatch):
    def interrupted(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    before = standing.read_bytes()
    monkeypatch.setattr(checkpoints, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(standing, {"x": torch.zeros(3)}, DENSE)
    assert standing.read_bytes() == before
    assert left_behind(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
def test_a_file_that_the_system_will_not_let_grow_leaves_the_last_one_intact(standing, tmp_path):
    import resource

    before, limits = standing.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for path, says in ((standing, "the file that stood there is intact"), (tmp_path / "b", "nothing was left behind")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(CheckpointError, match=rf"{path.name} cannot be written \(.*\): {says}\. Is the disk"):
                save(path, {"x": torch.zeros(100_000)}, DENSE)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert standing.read_bytes() == before
        assert left_behind(tmp_path) == ["a.safetensors"]


def test_a_file_where_the_folder_should_be_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be written"):
        save(tmp_path / "file" / "a.safetensors", TENSORS, RUN)


def test_a_folder_where_the_file_should_be_is_told(tmp_path):
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be written"):
        save(tmp_path / "a.safetensors", TENSORS, RUN)
    assert left_behind(tmp_path) == ["a.safetensors"]


# --- files that are damaged, or are something else ----------------------------------------------------------------


def refused(path: Path) -> str:
    for read in (load, load_model):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(path) in str(caught.value)
    return str(caught.value)


@PROPERTY
@given(st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(standing, share):
    content = standing.read_bytes()
    path = standing.with_name("cut.safetensors")
    path.write_bytes(content[: int(share * len(content))])
    assert "cannot be read" in refused(path)


def test_a_file_cut_by_one_byte_or_grown_by_one_is_refused(standing):
    content = standing.read_bytes()
    for damaged in (content[:-1], content + b"\0"):
        standing.write_bytes(damaged)
        assert "it is damaged, or no safetensors file" in refused(standing)


@PROPERTY
@given(st.binary(max_size=200))
def test_garbage_is_refused(standing, garbage):
    standing.write_bytes(garbage)
    refused(standing)


@PROPERTY
@given(st.integers(0, 400), st.integers(1, 255))
def test_a_header_with_a_changed_byte_is_refused_or_read_and_nothing_else(standing, place, change):
    content = bytearray(standing.read_bytes())
    content[place] ^= change
    damaged = standing.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    with contextlib.suppress(CheckpointError):  # and no other error
        load(damaged)


class Explosive:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.mark.parametrize(
    "write", [torch.save, lambda x, path: Path(path).write_bytes(pickle.dumps(x))], ids=["torch", ""]
)
def test_a_pickle_is_refused_and_nothing_in_it_runs(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write({"model.head.weight": Explosive()}, tmp_path / "a.safetensors")
    assert "it is damaged, or no safetensors file" in refused(tmp_path / "a.safetensors")
    assert left_behind(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "moe-lab checkpoint 2"}])
def test_a_safetensors_file_of_somebody_else_is_refused(metadata, tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "a.safetensors", metadata=metadata)
    message = "is no checkpoint of this course: its header does not say 'moe-lab checkpoint 1'"
    assert message in refused(tmp_path / "a.safetensors")


def described(header: dict) -> dict[str, str]:
    return {checkpoints.HEADER: json.dumps({"format": checkpoints.FORMAT} | header)}


@pytest.mark.parametrize("metadata", [{"moe_lab": "{"}, {"moe_lab": "[]"}, {"moe_lab": "3"}])
def test_a_header_that_is_no_json_object_is_refused(metadata, tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "a.safetensors", metadata=metadata)
    assert "cannot be read" in refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        {"kind": "RunConfig"},
        {"config": {}},
        {"kind": "RunConfig", "config": "{"},
        {"kind": "RunConfig", "config": []},
        {"kind": "LMConfig", "config": {"d_model": 8}},
        {"kind": "LMConfig", "config": {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 10, "colour": 1}},
        {"kind": "LMConfig", "config": {"d_model": -8, "n_layers": 1, "n_heads": 2, "d_ff": 10}},
    ],
    ids=["no config", "no kind", "a string", "a list", "missing", "unknown", "cannot be"],
)
def test_a_header_that_holds_no_configuration_is_refused(header, tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "a.safetensors", metadata=described(header))
    assert "cannot be read" in refused(tmp_path / "a.safetensors")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert refused(tmp_path / "none.safetensors").endswith("none.safetensors does not exist.")
    assert "cannot be read" in refused(tmp_path)


@pytest.mark.parametrize("change", ["missing", "shape", "unknown"])
def test_weights_that_are_not_the_configurations_are_refused(change, tmp_path):
    weights = {f"model.{name}": tensor for name, tensor in LM(DENSE).state_dict().items()}
    if change == "missing":
        del weights["model.norm.weight"]
    elif change == "shape":
        weights["model.norm.weight"] = torch.zeros(9)
    else:
        weights["model.norm.colour"] = torch.zeros(9)
    save(tmp_path / "a.safetensors", weights, DENSE)
    with pytest.raises(CheckpointError, match=r"does not hold the weights of its own configuration: (?s:.*)norm"):
        load_model(tmp_path / "a.safetensors")


# --- another configuration ----------------------------------------------------------------------------------------


def test_another_configuration_is_refused_field_by_field(tmp_path):
    require_same(RUN, RUN.but(), tmp_path)
    model = RUN.model.but(d_ff=12, moe=EXPERTS.but(top_k=1))
    wanted = RUN.but(training=RUN.training.but(learning_rate=0.5), model=model)
    with pytest.raises(CheckpointError) as caught:
        require_same(RUN, wanted, tmp_path / "a.safetensors")
    first, *lines = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'a.safetensors'} is of another configuration. Checkpoint against yours:"
    assert lines == [
        "  model.d_ff: 10 against 12",
        "  model.moe.top_k: 2 against 1",
        "  training.learning_rate: 0.01 against 0.5",
    ]


# --- models that ship ---------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A course's data folder with one model in it."""
    torch.manual_seed(0)
    path = tmp_path / "models" / "tiny.safetensors"
    save_model(path, LM(DENSE))
    entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    (tmp_path / "models.json").write_text(json.dumps({"models": {"tiny": entry}}))
    monkeypatch.setattr(checkpoints, "data_dir", lambda: tmp_path)
    return path


def test_a_shipped_model_is_read_if_its_checksum_agrees(shipped):
    assert load_shipped_model("tiny").config == DENSE


def test_a_shipped_model_that_was_altered_or_lost_is_refused(shipped):
    content = shipped.read_bytes()
    shipped.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors was altered: restore it with `git checkout"):
        load_shipped_model("tiny")
    shipped.unlink()
    with pytest.raises(CheckpointError, match=r"tiny\.safetensors is missing: restore it with `git checkout"):
        load_shipped_model("tiny")


def test_a_model_that_does_not_ship_is_named_with_those_that_do(shipped):
    with pytest.raises(CheckpointError, match=r"No model 'large' comes with the course: expected one of tiny\."):
        load_shipped_model("large")


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"weights": {}}'])
def test_a_list_of_models_that_is_damaged_is_told_with_its_remedy(shipped, content):
    path = shipped.parent.parent / "models.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=r"models\.json is missing or damaged: restore it with `git checkout"):
        load_shipped_model("tiny")
