"""The demo as a reader starts it: on one rank, and through torchrun on 2 and 4."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moe_lab.checkpoints import load
from moe_lab.parallel import demo

DEMO = "moe_lab.parallel.demo"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
CONFIG = """
model:
  d_model: 16
  n_layers: 1
  n_heads: 2
  d_ff: 24
  moe: {n_experts: 4, top_k: 2, d_ff: 16, n_shared_experts: 1}
training:
  steps: 4
  batch_size: 4
  context: 16
  balance: {loss: global_batch, alpha: 0.01}
save_every: 2
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that trains for four steps."""
    path = tmp_path_factory.mktemp("demo") / "small.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def run(*command: object, n_ranks: int = 0) -> subprocess.CompletedProcess:
    """Start the demo as a module: by itself, or on so many ranks by torchrun."""
    module = ("-m", *TORCHRUN, n_ranks, "-m", DEMO) if n_ranks else ("-m", DEMO)
    rankless = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, *map(str, (*module, *command))],
        env=rankless | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def losses(done: subprocess.CompletedProcess) -> list[float]:
    """Bits per byte of the steps, and of the held-out text."""
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^step +\d+ +([\d.]+) bits|^held out: ([\d.]+) bits", done.stdout, re.MULTILINE)
    return [float(step or held_out) for step, held_out in found]


@pytest.fixture(scope="module")
def alone(config: Path) -> list[float]:
    """Four steps on a single rank, uninterrupted, and the held-out text."""
    got = losses(run(config))
    assert len(got) == 5
    return got


def agree(got: list[float], expected: list[float]) -> bool:
    """Printed to four places."""
    return got == pytest.approx(expected, abs=2e-4)


def test_ranks_agree_and_a_run_goes_on_with_another_number_of_them(config, alone, tmp_path):
    """2 ranks (2 steps) → 4 ranks, in groups of 2 (1 step) → 1 rank, to the end."""
    begun = run(config, "--out", tmp_path, "--stop-after", 2, n_ranks=2)
    assert "ranks: 2; groups: 1, each with the experts over 2. From step 0:" in begun.stdout
    assert agree(losses(begun)[:2], alone[:2])
    assert re.search(r"rank 0 sent 0\.0[1-9] MB to other ranks in all-to-alls", begun.stdout)
    assert begun.stderr.strip() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000002.safetensors"]

    options = ("--out", tmp_path, "--resume")
    further = run(config, *options, "--ep-size", 2, "--stop-after", 3, "--form", "per_assignment", n_ranks=4)
    assert "ranks: 4; groups: 2, each with the experts over 2. From step 2:" in further.stdout
    assert agree(losses(further)[:1], alone[2:3])

    ended = run(config, *options)
    assert "ranks: 1; groups: 1, each with the experts over 1. From step 3:" in ended.stdout
    assert agree(losses(ended), alone[3:])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-000000{n}.safetensors" for n in (2, 3, 4)]
    state, _ = load(tmp_path / "step-0000004.safetensors")
    assert state["model.blocks.0.ffn.experts.w_in"].shape == (4, 32, 16)
    assert sorted(tmp_path.glob(".*")) == []


def test_wrong_options_on_ranks_end_with_a_line_of_each(config):
    done = run(config, "--ep-size", 3, n_ranks=2)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("Rank ")]
    told = "group_size=3: expected a divisor of the 2 ranks."
    assert set(lines) <= {f"Rank 0: {told}", f"Rank 1: {told}"}  # torchrun may end the second before it speaks
    assert lines
    assert 'demo.py", line' not in done.stderr  # no traceback but torchrun's own
    assert "step " not in done.stdout


# One process tries them all: each would spend its time on importing torch.
WRONG = {
    "no steps": (["--steps", "0"], "steps=0"),
    "fewer steps": (["--steps", "-1"], "steps=-1"),
    "to stop before it begins": (["--stop-after", "0"], "stop-after"),
    "a group of another size": (["--ep-size", "3"], "group_size=3"),
    "no group": (["--ep-size", "0"], "group_size=0"),
    "to resume from nowhere": (["--resume"], "--resume needs --out"),
    "to resume from nothing": (["--resume", "--out", "{empty}"], "holds no checkpoint"),
    "to begin where a run has begun": (["--out", "{used}"], "holds checkpoints: go on with --resume"),
    "to resume from what is damaged": (["--out", "{used}", "--resume"], "cannot be read"),
    "a form of nodes without their size": (["--form", "across_then_within"], "node_size=None"),
    "an out that is a file": (["--out", "{file}"], "cannot be written"),
    "no configuration": (["{empty}/none.yaml"], "none.yaml cannot be read"),
    "another configuration": (["{file}"], "unknown key 'd_model'"),
}
TRY_ALL = """
    import json, sys
    from moe_lab.parallel.demo import main

    for arguments in json.loads(sys.argv[1]):
        print("status", main(arguments), file=sys.stderr, flush=True)
"""


def test_wrong_options_end_with_one_line_and_status_1(config, tmp_path):
    names = {name: tmp_path / name for name in ("empty", "used", "file")}
    names["empty"].mkdir()
    names["used"].mkdir()
    (names["used"] / "step-0000002.safetensors").write_bytes(b"half a file")
    names["file"].write_text("d_model: 16\n", encoding="utf-8")
    tried = []
    for arguments, _ in WRONG.values():
        arguments = [one.format(**names) for one in arguments]
        tried.append(arguments if not arguments[0].startswith("--") else [str(config), *arguments])
    command = [sys.executable, "-c", textwrap.dedent(TRY_ALL), json.dumps(tried)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    told = re.split(r"^status (\S+)\n", done.stderr, flags=re.MULTILINE)
    assert len(told) == 2 * len(WRONG) + 1, done.stderr
    for (name, (_, words)), text, status in zip(WRONG.items(), told[::2], told[1::2], strict=False):
        assert status == "1", name
        assert words in text, name
        assert text.count("\n") == 1, f"{name}: {text}"


@pytest.mark.parametrize("arguments", [["--form", "by_hand"], ["--steps", "many"], ["--unknown"]])
def test_options_that_do_not_exist(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo.parse(arguments)
    assert "usage: python -m moe_lab.parallel.demo" in capsys.readouterr().err
