"""Runs with a folder each, from the command line and from Python; what stops them, and how they go on."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from moe_lab import checkpoints as checkpoint_files
from moe_lab import cli, runs
from moe_lab.checkpoints import CheckpointError, load, load_model
from moe_lab.config import BalanceConfig, LMConfig, MoEConfig, RunConfig, TrainConfig
from moe_lab.data import load_corpus
from moe_lab.lm import LM
from moe_lab.plain import read_config, to_plain
from moe_lab.runs import RunError, StopRun, checkpoints, last_evaluation, read_metrics, run
from moe_lab.train import Step, Trainer, evaluate, mean_bits

# Everything at once that a checkpoint has to bring back.
EXPERTS = MoEConfig(d_model=8, d_ff=6, n_experts=4, top_k=2, score="sigmoid", selection_bias=True, input_jitter=0.1)
MODEL = LMConfig(d_model=8, n_layers=2, n_heads=2, d_ff=10, conv_width=3, tied_embeddings=True, moe=EXPERTS)
BALANCE = BalanceConfig(loss="global_batch", alpha=0.1, z_loss=0.01, bias_rate=0.05)
TRAINING = TrainConfig(steps=6, batch_size=4, micro_batches=2, context=8, warmup_steps=2, balance=BALANCE)
CONFIG = RunConfig(model=MODEL, training=TRAINING, evaluate_every=2, save_every=3)
DENSE = RunConfig(model=MODEL.but(moe=None), training=TRAINING.but(balance=BalanceConfig()), save_every=2)


def make_it_quick(patch: pytest.MonkeyPatch) -> None:
    """No curves, and evaluations of a few windows; in one test and in real processes it is all done in full."""
    patch.setattr(runs, "draw", lambda folder: None)
    patch.setattr(runs, "evaluate", partial(evaluate, limit=4))


@pytest.fixture(autouse=True)
def _tidy(monkeypatch):
    """The signals and threads that the command sets are set back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    make_it_quick(monkeypatch)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop_after(index: int, how: type[BaseException] = StopRun) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        if step.index == index:
            raise how

    return on_step


def written(config: RunConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(to_plain(config)), encoding="utf-8")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_folder(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    return load(checkpoints(folder)[-1])[0]


def assert_same_run(one: Path, other: Path) -> None:
    """The same metrics to the last letter, and the same last checkpoint to the last bit."""
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert (one / "config.yaml").read_text() == (other / "config.yaml").read_text()
    left, right = final_state(one), final_state(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with pytest.MonkeyPatch.context() as patch:
        make_it_quick(patch)
        run(CONFIG, folder)
    return folder


# --- a run from the command line ----------------------------------------------------------------------------------


def test_the_command_trains_and_leaves_a_folder_that_tells_all(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # all of it, in full
    path, out = written(CONFIG, tmp_path / "tiny.yaml"), tmp_path / "out"
    assert cli.main(["train", str(path), "--out", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert in_folder(out) == {"config.yaml", "metrics.jsonl", "curves.png", "checkpoints"}
    assert read_config(out / "config.yaml") == CONFIG
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in checkpoints(out)] == ["step-0000003.safetensors", "step-0000006.safetensors"]
    records = list(read_metrics(out))
    steps = [record for record in records if "step" in record]
    assert [record["step"] for record in steps] == [0, 1, 2, 3, 4, 5]
    assert steps[0].keys() == {"step", "learning_rate", "bits_per_byte", "penalty", "gradient_norm", "max_violation"}
    assert all(len(record["max_violation"]) == 2 for record in steps)
    assert [record["evaluated_after"] for record in records if "evaluated_after" in record] == [2, 4, 6]
    model = load_model(checkpoints(out)[-1])
    bits = evaluate(model, load_corpus().val, context=8)
    assert last_evaluation(out) == bits
    for domain, value in [*bits.items(), ("mean", mean_bits(bits))]:
        assert f"{domain}  {value:.3f} bits per byte" in said.out
    assert "Traceback" not in said.err


def test_a_run_is_what_a_trainer_does(uninterrupted):
    torch.manual_seed(TRAINING.seed)
    trainer = Trainer(LM(MODEL), load_corpus().train, TRAINING)
    steps = [trainer.step() for _ in range(6)]
    told = [record for record in read_metrics(uninterrupted) if "step" in record]
    assert [record["bits_per_byte"] for record in told] == [step.bits_per_byte for step in steps]
    assert [record["penalty"] for record in told] == [step.penalty for step in steps]
    assert [record["max_violation"] for record in told] == [step.max_violations for step in steps]
    state = final_state(uninterrupted)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainer.state().items())


def test_what_a_killed_process_left_half_written_is_gone_after_resuming(tmp_path):
    with pytest.raises(StopRun):
        run(CONFIG, tmp_path / "run", on_step=stop_after(2))
    half = tmp_path / "run" / "checkpoints" / ".step-0000003.safetensors.1.partial"
    half.write_bytes(b"half")
    run(CONFIG, tmp_path / "run", resume=True)
    assert not half.exists()
    assert len(checkpoints(tmp_path / "run")) == 2


def test_how_often_it_is_evaluated_and_saved_changes_nothing_else(uninterrupted, tmp_path):
    run(CONFIG.but(evaluate_every=100, save_every=1), tmp_path / "run")
    told = [[r for r in read_metrics(folder) if "step" in r] for folder in (uninterrupted, tmp_path / "run")]
    assert told[0] == told[1]
    assert len(checkpoints(tmp_path / "run")) == 2
    assert [r["evaluated_after"] for r in read_metrics(tmp_path / "run") if "evaluated_after" in r] == [6]


def test_without_out_the_folder_is_named_after_the_configuration(tmp_path, monkeypatch):
    path = written(DENSE.but(training=DENSE.training.but(steps=1)), tmp_path / "small.yaml")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", str(path)]) == 0
    assert in_folder(tmp_path / "runs" / "small") == {"config.yaml", "metrics.jsonl", "checkpoints"}


def refused(capsys, *arguments: object) -> str:
    """What the command says when it refuses: one message, status 2, no traceback."""
    assert cli.main(["train", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.out == ""
    return said.err.strip()


def test_a_folder_that_exists_is_refused_and_left_alone(uninterrupted, tmp_path, capsys):
    path, out = written(CONFIG, tmp_path / "tiny.yaml"), tmp_path / "out"
    shutil.copytree(uninterrupted, out)
    before = content(out)
    message = f"{out} exists: go on with its run by --resume, or choose another folder with --out."
    assert refused(capsys, path, "--out", out) == message
    assert content(out) == before


@pytest.mark.parametrize("what", ["someone's file", "a damaged run"])
def test_whatever_is_in_the_folder_it_is_not_written_over(what, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / ("notes.txt" if what == "someone's file" else "metrics.jsonl")).write_text("mine")
    assert "exists" in refused(capsys, written(CONFIG, tmp_path / "a.yaml"), "--out", out)
    assert "holds no checkpoint to resume from" in refused(capsys, tmp_path / "a.yaml", "--out", out, "--resume")
    assert set(content(out).values()) == {b"mine"}


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "out").mkdir()
    run(DENSE.but(training=DENSE.training.but(steps=1)), tmp_path / "out")
    assert len(checkpoints(tmp_path / "out")) == 1


def test_there_must_be_something_to_resume(tmp_path, capsys):
    path = written(CONFIG, tmp_path / "tiny.yaml")
    message = refused(capsys, path, "--out", tmp_path / "none", "--resume")
    assert message.endswith("holds no checkpoint to resume from. Start without --resume, in a new folder.")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "tpu:x"])
def test_a_device_that_is_not_there_is_told(device, tmp_path, capsys):
    path = written(CONFIG, tmp_path / "tiny.yaml")
    message = refused(capsys, path, "--out", tmp_path / "out", "--device", device)
    assert message.startswith(f"--device {device} cannot be used here: ")
    assert not (tmp_path / "out").exists()


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(6))
def test_stopped_anywhere_and_resumed_it_is_the_same_run(index, uninterrupted, tmp_path):
    with pytest.raises(StopRun):
        run(CONFIG, tmp_path / "run", on_step=stop_after(index))
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{index + 1:07d}.safetensors"
    bits = run(CONFIG, tmp_path / "run", resume=True)
    assert bits == last_evaluation(uninterrupted)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("index", [3, 4])
@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError])
def test_after_a_crash_it_goes_on_from_the_last_checkpoint(how, index, uninterrupted, tmp_path):
    with pytest.raises(how):
        run(CONFIG, tmp_path / "run", on_step=stop_after(index, how))
    assert checkpoints(tmp_path / "run")[-1].name == "step-0000003.safetensors"
    assert max(record.get("step", 0) for record in read_metrics(tmp_path / "run")) == index
    run(CONFIG, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_stopped_three_times_it_is_still_the_same_run(uninterrupted, tmp_path):
    for turn, index in enumerate((0, 2, 3)):
        with pytest.raises(StopRun):
            run(CONFIG, tmp_path / "run", resume=turn > 0, on_step=stop_after(index))
    run(CONFIG, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_resuming_what_is_done_says_how_it_ended(uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    seen = []
    assert run(CONFIG, tmp_path / "run", resume=True, on_step=seen.append) == last_evaluation(uninterrupted)
    assert seen == []
    assert_same_run(tmp_path / "run", uninterrupted)
    path = written(CONFIG, tmp_path / "tiny.yaml")
    assert cli.main(["train", str(path), "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert f"mean  {mean_bits(last_evaluation(uninterrupted)):.3f} bits per byte" in capsys.readouterr().out


def test_the_steps_of_a_resumed_run_count_on(uninterrupted, tmp_path):
    with pytest.raises(StopRun):
        run(CONFIG, tmp_path / "run", on_step=stop_after(3))
    seen = []
    run(CONFIG, tmp_path / "run", resume=True, on_step=lambda step: seen.append(step.index))
    assert seen == [4, 5]


def test_a_run_of_another_configuration_is_not_resumed(uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = content(tmp_path / "run")
    training = TRAINING.but(steps=60, balance=BALANCE.but(alpha=0.2))
    other = CONFIG.but(training=training, model=MODEL.but(moe=EXPERTS.but(top_k=1)))
    message = refused(capsys, written(other, tmp_path / "other.yaml"), "--out", tmp_path / "run", "--resume")
    assert message.splitlines() == [
        f"{checkpoints(tmp_path / 'run')[-1]} is of another configuration. Checkpoint against yours:",
        "  model.moe.top_k: 2 against 1",
        "  training.steps: 6 against 60",
        "  training.balance.alpha: 0.1 against 0.2",
    ]
    assert content(tmp_path / "run") == before


@pytest.mark.parametrize("damage", ["cut in two", "half a number", "not text", "no newline"])
def test_a_last_line_that_was_cut_off_is_passed_over_and_written_again(damage, uninterrupted, tmp_path):
    with pytest.raises(RuntimeError):
        run(CONFIG, tmp_path / "run", on_step=stop_after(4, RuntimeError))
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut in two": whole[:-30],
            "half a number": whole + b'{"step": 5, "learning_rate": 0.00',
            "not text": whole + b'{"step": \x00\x00\x00',
            "no newline": whole[:-1],
        }[damage]
    )
    run(CONFIG, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_metrics_of_a_folder_that_has_none(tmp_path):
    assert list(read_metrics(tmp_path)) == []
    assert last_evaluation(tmp_path) == {}
    assert checkpoints(tmp_path / "none") == []


# --- damaged checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "pickle"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(damage, uninterrupted, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    last = checkpoints(out)[-1]
    if damage == "pickle":
        torch.save({"index": torch.tensor(6)}, last)
    else:
        whole = last.read_bytes()
        last.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": os.urandom(5000), "empty": b""}[damage])
    before = content(out)
    message = refused(capsys, written(CONFIG, tmp_path / "tiny.yaml"), "--out", out, "--resume")
    assert message.startswith(f"{last} cannot be read (")
    assert message.endswith("it is damaged, or no safetensors file.")
    assert content(out) == before
    last.unlink()
    run(CONFIG, out, resume=True)
    assert_same_run(out, uninterrupted)


# --- a full disk --------------------------------------------------------------------------------------------------


def disk_full_at(save_number: int, monkeypatch) -> None:
    """The n-th checkpoint is half written when the disk is full."""
    save_file, count = checkpoint_files.save_file, []

    def limited(tensors: dict, path: Path, metadata: dict) -> None:
        count.append(path)
        if len(count) == save_number:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoint_files, "save_file", limited)


def test_on_a_full_disk_the_run_ends_with_its_last_checkpoint_intact(uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disk_full_at(2, patch)
        message = r"step-0000006\.safetensors cannot be written \(.*No space left.*\): nothing was left behind\."
        with pytest.raises(CheckpointError, match=message):
            run(CONFIG, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000003.safetensors"]
    assert load(checkpoints(tmp_path / "run")[0])[1] == CONFIG
    run(CONFIG, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_on_a_full_disk_the_command_says_so(tmp_path, monkeypatch, capsys):
    disk_full_at(1, monkeypatch)
    path = written(CONFIG, tmp_path / "tiny.yaml")
    assert cli.main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert "Is the disk full?" in said
    assert "Traceback" not in said


def test_no_checkpoint_is_removed_before_the_next_one_stands(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disk_full_at(3, patch)
        with pytest.raises(CheckpointError):
            run(CONFIG.but(save_every=1), tmp_path / "run")
    assert [path.name[:12] for path in checkpoints(tmp_path / "run")] == ["step-0000001", "step-0000002"]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits on Windows")
def test_where_the_system_lets_no_file_grow_the_last_checkpoint_is_intact(uninterrupted, tmp_path, capsys):
    import resource

    out = tmp_path / "run"
    with pytest.raises(StopRun):
        run(CONFIG, out, on_step=stop_after(2))
    before = content(out / "checkpoints")
    assert all(len(checkpoint) > 20_000 for checkpoint in before.values())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        message = refused(capsys, written(CONFIG, tmp_path / "tiny.yaml"), "--out", out, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-0000006.safetensors cannot be written (" in message
    assert message.endswith("nothing was left behind. Is the disk full?")
    assert content(out / "checkpoints") == before
    run(CONFIG, out, resume=True)
    assert_same_run(out, uninterrupted)


def test_on_a_full_disk_the_picture_fails_too_and_the_checkpoint_is_what_is_told(tmp_path, monkeypatch):
    def draw(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    disk_full_at(1, monkeypatch)
    monkeypatch.setattr(runs, "draw", draw)
    with pytest.raises(CheckpointError, match=r"step-0000003\.safetensors cannot be written"):
        run(CONFIG, tmp_path / "run")


# --- divergence ---------------------------------------------------------------------------------------------------


def poison_after(index: int, name: str, monkeypatch) -> Callable[[Step], None]:
    """Make one weight NaN after a step."""
    models = []
    monkeypatch.setattr(runs, "LM", lambda config: models.append(LM(config)) or models[-1])

    def on_step(step: Step) -> None:
        if step.index == index:
            with torch.no_grad():
                models[-1].get_parameter(name).view(-1)[3] = math.nan

    return on_step


def test_nan_stops_the_run_with_step_place_and_last_good_checkpoint(uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison = poison_after(4, "blocks.1.ffn.experts.w_down", patch)
        with pytest.raises(RunError) as caught:
            run(CONFIG, tmp_path / "run", on_step=poison)
    message = str(caught.value)
    assert "at step 5" in message
    assert "the weight blocks.1.ffn.experts.w_down" in message
    last = tmp_path / "run" / "checkpoints" / "step-0000003.safetensors"
    assert message.endswith(f"The last good checkpoint is {last}.")
    assert [path.name for path in checkpoints(tmp_path / "run")] == [last.name]
    assert all(tensor.isfinite().all() for tensor in final_state(tmp_path / "run").values())
    run(CONFIG, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_before_the_first_checkpoint_it_says_that_there_is_none(tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"at step 1; .*the weight embedding\.weight.* There is no checkpoint yet\."):
        run(CONFIG, tmp_path / "run", on_step=poison_after(0, "embedding.weight", monkeypatch))


def test_a_rate_far_too_high_ends_the_command_with_a_sentence(tmp_path, capsys):
    wild = DENSE.but(training=DENSE.training.but(steps=50, learning_rate=50.0), save_every=100)
    path = written(wild, tmp_path / "wild.yaml")
    assert cli.main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"at step \d+.* Lower learning_rate=50 or lengthen warmup_steps=2\. There is no checkpoint", said)


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["experts", "dense"])
def test_the_last_good_checkpoint_is_good(config, tmp_path):
    training = config.training.but(learning_rate=1e30, warmup_steps=0)
    with pytest.raises(RunError) as caught:
        run(config.but(training=training, save_every=1, evaluate_every=100), tmp_path / "run")
    assert "The last good checkpoint is" not in str(caught.value) or math.isfinite(
        mean_bits(evaluate(load_model(checkpoints(tmp_path / "run")[-1]), load_corpus().val, context=8, limit=2))
    )


@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["experts", "dense"])
def test_an_evaluation_that_gives_no_number_is_a_divergence_too(config, tmp_path):
    training = config.training.but(learning_rate=1e30, warmup_steps=0, steps=1)
    with pytest.raises(RunError, match="There is no checkpoint yet"):
        run(config.but(training=training), tmp_path / "run")


# --- configurations that cannot be --------------------------------------------------------------------------------

GOOD = "model: {d_model: 8, n_layers: 1, n_heads: 2, d_ff: 8}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the configuration is None: expected keys and values (RunConfig)."),
        ("- 1\n- 2\n", "the configuration is [1, 2]: expected keys and values (RunConfig)."),
        ("just text", "the configuration is 'just text': expected keys and values"),
        ("training: {}\n", "missing model, which RunConfig needs."),
        (GOOD + "trainig: {}\n", "unknown key 'trainig' (did you mean 'training'?)."),
        (
            GOOD + "training: {learning_rte: 1e-3}\n",
            "training: unknown key 'learning_rte' (did you mean 'learning_rate'?)",
        ),
        (GOOD + "training: {balance: {los: switch}}\n", "training.balance: unknown key 'los' (did you mean 'loss'?)."),
        (
            GOOD + "training: {balance: {loss: sinkhorn}}\n",
            "training.balance: loss='sinkhorn': expected one of switch,",
        ),
        (
            GOOD + "training: {balance: {alpha: -1e-3}}\n",
            "training.balance: alpha=-0.001: expected a number of 0 or more.",
        ),
        (GOOD + "training: {balance: {bias_rate: -1}}\n", "training.balance: bias_rate=-1: expected a number of 0 or"),
        ("model: {d_modl: 8}\n", "model: unknown key 'd_modl' (did you mean 'd_model'?)."),
        (
            "model: {d_model: 8, n_layers: 1, n_heads: 3, d_ff: 8}\n",
            "model: n_heads=3: expected a divisor of d_model=8",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_told_with_its_file(text, message, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert refused(capsys, path, "--out", tmp_path / "out").startswith(f"{path}: {message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"model: [", b"a: b: c", b"\xff\xfe\x00", b"!!python/object:os.system {}", None])
def test_a_file_that_is_no_yaml_is_told(content, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    assert refused(capsys, path, "--out", tmp_path / "out").startswith(f"{path} cannot be read as YAML: ")


def test_numbers_without_a_point_are_read_as_yaml_writes_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD + "training: {learning_rate: 1e-3, balance: {bias_rate: 1e-3}}\n")
    config = read_config(path)
    assert (config.training.learning_rate, config.training.balance.bias_rate) == (0.001, 0.001)
    assert config == RunConfig(
        model=LMConfig(d_model=8, n_layers=1, n_heads=2, d_ff=8),
        training=TrainConfig(learning_rate=0.001, balance=BalanceConfig(bias_rate=0.001)),
    )


@pytest.mark.parametrize(
    "config",
    [
        CONFIG.but(model=MODEL.but(moe=EXPERTS.but(selection_bias=False))),
        CONFIG.but(model=MODEL.but(moe=None)),
        CONFIG.but(training=TRAINING.but(context=10_000_000)),
        CONFIG.but(model=MODEL.but(vocab_size=100)),
    ],
    ids=["no bias to move", "no experts to cure", "context too long", "too few bytes"],
)
def test_a_run_that_cannot_start_is_told_in_a_sentence_and_can_be_tried_again(config, tmp_path):
    with pytest.raises(RunError):
        run(config, tmp_path / "run")
    run(DENSE, tmp_path / "run")


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_where_the_folder_should_be_is_told(resume, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RunError):
        run(DENSE, tmp_path / "out", resume=resume)


# --- other processes, and signals ---------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(uninterrupted, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    with FileLock(out / ".lock"):
        message = refused(capsys, written(CONFIG, tmp_path / "a.yaml"), "--out", out, "--resume")
    assert message == f"Another process is training in {out}: wait for it, or choose another folder."
    run(CONFIG, out, resume=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    ends = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on Unix")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_real_run_with_a_checkpoint_and_leaves_nothing_behind(number, tmp_path, monkeypatch):
    long = CONFIG.but(training=TRAINING.but(steps=1_000_000), save_every=5, evaluate_every=1_000_000)
    path, out = written(long, tmp_path / "long.yaml"), tmp_path / "run"

    def heed_interrupts() -> None:  # the children of a shell's background job would ignore them
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        [sys.executable, "-m", "moe_lab", "train", str(path), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for(lambda: len(checkpoints(out)) > 0, process)
        with pytest.raises(RunError, match="Another process is training in"):
            run(long, out, resume=True)
        process.send_signal(number)
        said, progress = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said == f"Stopped. Everything so far is in {out}; go on with --resume.\n"
    assert "Traceback" not in progress
    assert in_folder(out) == {"config.yaml", "metrics.jsonl", "curves.png", "checkpoints"}
    steps = [record["step"] for record in read_metrics(out)]
    assert steps == list(range(len(steps)))
    assert checkpoints(out)[-1].name == f"step-{len(steps):07d}.safetensors"
    assert {path.name for path in (out / "checkpoints").iterdir()} == {path.name for path in checkpoints(out)}
    assert final_state(out)["index"] == len(steps)
    seen = []
    with pytest.raises(StopRun):
        run(long, out, resume=True, on_step=lambda step: seen.append(step.index) or stop_after(len(steps))(step))
    assert seen == [len(steps)]


def test_metrics_are_whole_lines_of_json_that_any_reader_takes(uninterrupted):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (uninterrupted / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line, parse_constant=refuse), dict)
