"""The GPU benchmark, tried without a GPU: what it computes, how it reports, and that it invents nothing."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from variants import interpreted

from moe_lab import gpu
from moe_lab.bench.layers import Shape
from moe_lab.cli import main
from moe_lab.gpu import candidates, deadline, floors, jobs, liger, measure, report, tune
from moe_lab.gpu.candidates import (
    DENSE,
    FUSED,
    GROUPED_MM,
    GROUPED_MM_BF16,
    LIGER,
    LOADS,
    LOOP,
    TMA,
    TORCH,
    make_inputs,
)
from moe_lab.gpu.measure import LostGPU, compare, difference
from moe_lab.ops.grouped_mm import launches
from moe_lab.ops.tiles import Tile, Tiles
from moe_lab.paths import course_root

TINY = Shape(n_tokens=24, d_model=16, d_ff=16, n_experts=8, top_k=4)
NOTES = "benchmarks/kernel-notes.md"


# --- What is measured


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shape", [TINY, Shape(50, 8, 8, 8, 2), Shape(4, 8, 8, 4, 4)], ids=str)
def test_the_loads_are_what_they_are_called(load, shape):
    chosen = candidates.choices(shape, load, "cpu")
    n_rows = shape.n_tokens * shape.top_k
    counts = chosen.flatten().bincount(minlength=shape.n_experts)
    assert chosen.shape == (shape.n_tokens, shape.top_k)
    assert counts.sum() == n_rows
    if load == "balanced":
        assert counts.max() - counts.min() <= 1
    if load == "half":
        assert counts.max() >= n_rows / 2
    if load == "zipf":
        assert counts[0] >= counts[-1]
        assert all(len(set(row)) == len(row) for row in chosen.tolist())


def test_a_zipf_load_is_skewed_and_sets_differ():
    shape = Shape(2000, 8, 8, 32, 2)
    one, other = (candidates.choices(shape, "zipf", "cpu", seed) for seed in (0, 1))
    counts = one.flatten().bincount(minlength=32)
    assert counts[0] > 5 * counts[16]
    assert not torch.equal(one, other)


@pytest.mark.parametrize("load", LOADS)
def test_all_who_run_here_compute_the_same(load):
    inputs = make_inputs(TINY, load, "cpu", torch.float32)
    for which in ("in", "down"):
        runs, sizes = candidates.products(inputs, which)
        assert sizes == (96, 16, 32 if which == "in" else 16)
        for i in range(3):
            assert difference(runs[GROUPED_MM](i), runs[LOOP](i)) < 1e-5
            assert runs[DENSE](i)[0].shape == runs[LOOP](i)[0].shape
    runs = candidates.passes(inputs, candidates.blocks(inputs), backward=True)
    expected = runs[TORCH](1)
    assert [result.shape for result in expected[1:]] == [x.shape for x in candidates._differentiated(inputs, 1)]
    assert difference(runs["transformers grouped_mm"](1), expected) < 1e-5


def test_a_peer_that_cannot_be_imported_is_told_as_such(monkeypatch):
    for name in ("liger_kernel", "transformers", "transformers.models.mixtral.modeling_mixtral"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_moe", None)
    inputs = make_inputs(TINY, "balanced", "cpu", torch.float32)
    made = candidates.blocks(inputs)
    assert "ModuleNotFoundError" in made[LIGER]
    assert "ModuleNotFoundError" in made["transformers grouped_mm"]
    assert callable(made[TORCH])
    assert all("ModuleNotFoundError" in said for said in candidates.peers().values())


def test_a_peer_whose_parameters_have_other_shapes_is_refused():
    layer = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"weight is \(2, 3\): expected \(4, 3\)"):
        candidates._give(layer, weight=torch.zeros(4, 3))


def test_the_agenda_begins_with_what_the_targets_need_and_leaves_nothing_out():
    whats = [what for what, _ in jobs.agenda()]
    assert whats[0].startswith("products, Qwen3-30B-A3B, T 32768")
    assert whats[1].startswith("block, Qwen3-30B-A3B, T 32768")
    for shapes in floors.MODELS.values():
        for shape in shapes:
            for load in LOADS:
                assert sum(what.endswith(f"{shape}, {load}") and what.startswith("block") for what in whats) == 1
    assert len(jobs.agenda(is_dry=True)) < len(whats) / 2


# --- Floors


def test_the_operations_of_a_block_are_counted_as_in_the_literature():
    shape = floors.QWEN3[-1]
    forward, both = floors.block(shape), floors.block(shape, backward=True)
    assert forward.flops == 6 * 32768 * 8 * 2048 * 768
    assert both.flops == 3 * forward.flops
    assert forward.bytes == 2 * (2 * 32768 * 2048 + 3 * 128 * 2048 * 768)


@pytest.mark.parametrize("shape", [shape for shapes in floors.MODELS.values() for shape in shapes], ids=str)
def test_the_launches_do_the_blocks_operations_and_move_more_bytes(shape):
    stages = floors.stages(shape)
    done = {name: sum(work.flops for work in works) for name, works in stages.items()}
    assert done == {"forward": floors.block(shape).flops, "backward": 2 * floors.block(shape).flops}
    moved = sum(work.bytes for works in stages.values() for work in works)
    assert moved > floors.block(shape, backward=True).bytes


def test_floors_of_a_product_by_hand():
    work = floors.product(n_rows=10, n_in=3, n_out=5, n_groups=2)
    assert (work.flops, work.bytes) == (300, 2 * (30 + 50 + 30))
    assert work.floors(floors.Rates("", 100, 20)) == (3, 11)
    assert floors.asked(n_rows=10, n_in=3, n_out=5, rows=4, columns=4) == 2 * (3 * 2 * 8 * 3 + 50)


def test_the_notes_quote_the_floors_as_they_are_computed():
    notes = (course_root() / NOTES).read_text(encoding="utf-8")
    assert floors.table() in notes
    assert floors.stage_table() in notes


# --- Comparing


def test_who_fails_is_told_why_and_the_others_run():
    def broken(_: int) -> tuple[torch.Tensor]:
        raise RuntimeError("no kernel image is available\nand much more")

    right, wrong = (torch.ones(4),), (torch.ones(4) * 1.2,)
    found = compare(
        {
            "wrong": lambda _: wrong,
            "right": lambda _: right,
            "broken": broken,
            "absent": "not installed",
            "nan": lambda _: (right[0] * torch.nan,),
        },
        n_sets=1,
        flops=1,
        device="cpu",
        alike=("right", "wrong", "nan"),
    )
    assert list(found) == ["wrong", "right", "broken", "absent", "nan"]
    assert found["right"] == {"difference": 0.0}
    assert found["wrong"] == {"failed": "its results are off by 0.2"}
    assert found["nan"] == {"failed": "its results are off by inf"}
    assert found["broken"] == {"failed": "RuntimeError: no kernel image is available"}
    assert found["absent"] == {"failed": "not installed"}


def test_a_gpu_that_answers_no_more_ends_the_benchmark(monkeypatch, capsys):
    def dead(device: str) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(measure, "wait", dead)
    with pytest.raises(LostGPU, match=r"first; from then on: .*illegal memory access"):
        measure.require_living_gpu("cpu", RuntimeError("first"))

    def failed_parts(error: Exception) -> dict[str, str]:
        def part(bench: jobs.Bench) -> None:
            raise error

        monkeypatch.setattr(jobs, "agenda", lambda **_: [("one", part), ("two", part)])
        results = {}
        assert not gpu._benchmark(jobs.Bench("cpu", results), gpu.Keeper(None, results), gpu.Clock(60))
        assert results["dropped"]
        return results["failed_parts"]

    assert failed_parts(LostGPU("gone")) == {"one": "the GPU was lost: gone"}
    # an error that came up where nobody asks whether the GPU is alive: while candidates take turns, say
    found = failed_parts(RuntimeError("first"))
    assert list(found) == ["one"]
    assert found["one"].startswith("the GPU was lost: RuntimeError: first; from then on: ")


class FakeEvent:
    """A device event of a GPU on which everything takes two milliseconds from mark to mark."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def query(self) -> bool:
        return False

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 2 * (other.at - self.at)


class FakeBench(jobs.Bench):
    """Believes that it has a GPU."""

    dtype = torch.float32

    def inputs(self, shape: Shape, load: str, n_sets: int = 3) -> candidates.Inputs:
        return make_inputs(jobs.toy(shape), load, "cpu", torch.float32, n_sets)


@pytest.fixture
def fake_gpu(monkeypatch) -> FakeBench:
    cuda = SimpleNamespace(
        Event=FakeEvent, _sleep=lambda cycles: None, synchronize=lambda: None, empty_cache=lambda: None
    )
    fake = SimpleNamespace(**{name: getattr(torch, name) for name in ("linalg", "float32", "Tensor", "bfloat16")})
    fake.cuda = cuda
    monkeypatch.setattr(measure, "torch", fake)
    for name, few in (("SECONDS", 0.0), ("WARM_UP", 1), ("FEWEST", 2), ("MOST", 2)):
        monkeypatch.setattr(measure, name, few)
    monkeypatch.setattr(jobs, "launches_of", lambda run: measure.launches_of(run, rounds=1))
    monkeypatch.setattr(tune, "launches_of", lambda run: measure.launches_of(run, rounds=1))
    monkeypatch.setattr(jobs, "first_use", lambda bench: None)
    monkeypatch.setattr(measure, "require_living_gpu", lambda device, error: None)
    monkeypatch.setattr(jobs, "require_living_gpu", lambda device, error: None)
    monkeypatch.setattr(jobs, "capability", lambda: 0)
    monkeypatch.setattr(jobs, "SWEEP", jobs.SWEEP[:1])
    monkeypatch.setattr(jobs, "STEPS", {name: (jobs.TOY_TILE, *rest) for name, (_, *rest) in jobs.STEPS.items()})
    ceilings = {"operations_per_second": 1e12, "bytes_per_second": 1e11}
    return FakeBench("cuda", {"ceilings": ceilings})


def run_agenda(bench: FakeBench, left_out: tuple[str, ...] = ()) -> dict:
    short = [(what, part) for what, part in jobs.agenda(is_dry=True) if not what.endswith(left_out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "agenda", lambda **_: short)
        assert gpu._benchmark(bench, gpu.Keeper(None, bench.results), gpu.Clock(600))
    return bench.results


def test_times_by_device_events_become_rates(fake_gpu, capsys):
    results = run_agenda(fake_gpu)
    record = results["raw"][0]
    dense = record["candidates"][DENSE]
    assert (dense["ms"], dense["rounds"]) == (2.0, 2)
    assert dense["tflops"] == pytest.approx(record["flops"] / 2e-3 / 1e12)
    assert record["floor_ms"] == {"operations": record["flops"] / 1e9, "bytes": pytest.approx(record["bytes"] / 1e8)}
    assert {one["load"] for one in results["block"]} == set(LOADS)
    assert re.search(r"block both, T 32768 .*, half: .*torch path 0", capsys.readouterr().out)


@interpreted
def test_every_part_of_the_benchmark_with_our_kernels(fake_gpu, capsys):
    results = run_agenda(fake_gpu, ("zipf", "half"))
    failed = {
        name: one["failed"]
        for record in results["raw"] + results["block"] + results["steps"]
        for name, one in record["candidates"].items()
        if "failed" in one
    }
    assert set(failed) <= {LIGER, GROUPED_MM_BF16}
    assert not results["failed_parts"]
    stages = results["stages"][0]["stages"]
    works = [work for part in floors.stages(floors.QWEN3[-1]).values() for work in part]
    assert [stage["stage"] for stage in stages] == [work.name for work in works]
    assert [stage["kernel"] for stage in stages[:4]] == ["plan_tiles", "gate_up", "grouped_product", "sum_of_choices"]
    assert all(stage["ms"] == 2.0 for stage in stages)
    said = capsys.readouterr().out
    assert "gate_up 2.000 (" in said
    assert "tokens per expert, block forward: ours, fused" in said
    json.dumps(results)


@interpreted
def test_tuning_takes_every_kernel_with_tiles_that_share_a_plan(fake_gpu, monkeypatch, capsys):
    toys = {kernel: [Tile(16, 32, 16, warps=1, stages=1)] for kernel in tune.TILES}
    monkeypatch.setattr(tune, "TILES", toys)
    monkeypatch.setattr(tune, "make_inputs", lambda s, load, *_, **__: fake_gpu.inputs(s, load, 1))
    monkeypatch.setattr(tune, "can_tma", lambda device: True)
    monkeypatch.setattr(tune, "release", lambda device: None)
    monkeypatch.setattr(tune, "choose_tiles", lambda *_: Tiles(*4 * [jobs.TOY_TILE]))  # a small rest
    results = {}
    tune.main("cuda", list(tune.KERNELS), results, lambda: None, gpu.Clock(600))
    assert len(results["tuned"]) == 2 * len(tune.KERNELS)
    found = {record["kernel"]: len(record["ms"]) for record in results["tuned"]}
    assert found == {
        "product": 2, "product_tma": 2, "product_tma_nested": 2, "block_tma": 2,
        "gate_up": 1, "gate_up_tma": 1, "gate_up_tma_nested": 1, "down_backward": 1, "weight_gradient": 2,
    }  # fmt: skip
    assert "Tile(rows=16, columns=32" in capsys.readouterr().out


@interpreted
def test_a_dry_run_tunes_descriptors_as_the_block_uses_them(no_tests, tmp_path, capsys):
    seen = []
    with launches().observed(lambda name, args, constants: nullcontext(seen.append((name, constants)))):
        assert main(["gpu", "--dry", "--tune", "block_tma", "--out", str(tmp_path)]) == 0
    products = [constants for name, constants in seen if name == "grouped_product_tma"]
    assert [(one["SCATTER"], one["TRANSPOSED"]) for one in products] == 2 * [(True, False), (True, True)]
    assert "grouped_product" not in {name for name, _ in seen}
    results = json.loads((tmp_path / "gpu-tune-dry.json").read_text())
    assert [record["class"] for record in results["tuned"]] == ["few", "many"]
    assert not every_key(results["tuned"]) & {"ms", "failed"}


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_tiles_to_try_are_few_differ_and_share_their_rows(kernel):
    tiles = tune.TILES[kernel]
    assert 8 <= len(tiles) <= 12
    assert len(set(tiles)) == len(tiles)
    for tile in tiles:
        chosen = tune.with_tile(kernel, tile)
        assert getattr(chosen, tune.KERNELS[kernel][0]) == tile
        assert (chosen.tma, chosen.flatten) == ("_tma" in kernel, "_nested" not in kernel)
        if kernel != "weight_gradient":
            assert {part.rows for part in (chosen.product, chosen.gate_up, chosen.down_backward)} == {tile.rows}


# --- Liger


def test_liger_is_compiled_ahead_only_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    assert liger.start(90) == []
    assert not liger.finish([], 1)


def test_processes_that_do_not_end_are_ended():
    endless = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert not liger.finish([endless], 0.2)
    assert endless.returncode is not None


def test_ligers_fixed_configuration_is_chosen_by_its_sizes():
    def config(warps: int, **sizes: int) -> SimpleNamespace:
        return SimpleNamespace(kwargs=sizes, num_warps=warps)

    right = config(8, BLOCK_N=128, BLOCK_K=64)
    kernel = SimpleNamespace(configs=[config(8, BLOCK_N=64, BLOCK_K=32), config(4, BLOCK_N=128, BLOCK_K=64), right])
    assert liger._fixed(kernel) == [right]
    other = config(4, BLOCK_X=1)
    assert liger._fixed(SimpleNamespace(configs=[other])) == [other]


# --- The report


def results_with(**tflops: float) -> dict:
    shape = asdict(report.LARGE)

    def measured(**rates: float) -> dict:
        return {name: {"tflops": rate} for name, rate in rates.items()}

    raw = {"shape": shape, "load": "balanced", "product": "in", "ours": TMA}
    blocks = [
        {"shape": shape, "load": load, "pass": "forward", "candidates": measured(**{FUSED: rate, LIGER: 300.0})}
        for load, rate in (("balanced", 600.0), ("zipf", 510.0))
    ]
    found = measured(**{TMA: 700.0, DENSE: 800.0})
    return {"raw": [{**raw, "candidates": found | {GROUPED_MM: {"failed": "no"}}}], "block": blocks}


def test_targets_stand_beside_what_was_measured_and_the_rest_is_open():
    found = {row["target"]: (row["measured"], row["met"]) for row in report.targets(results_with())}
    at = "T 32768"
    assert found[f"product D to 2F, {at}: of the dense ceiling"] == (0.875, False)
    assert found[f"product D to 2F, {at}: × F.grouped_mm"] == (None, None)
    assert found[f"block forward, {at}: × Liger"] == (2.0, True)
    assert found[f"block forward, {at}: × the torch path"] == (None, None)
    assert found[f"block forward, {at}: TFLOP/s"] == (600.0, True)
    assert found[f"block forward, {at}: Zipf × balanced"] == (0.85, False)
    assert found[f"block both passes, {at}: TFLOP/s"] == (None, None)


def test_the_table_says_what_is_missing_and_why():
    results = results_with() | {
        "tests": {"passed": 3, "failed": 1, "skipped": 2},
        "peers": {"liger-kernel": "ModuleNotFoundError: none"},
        "failed_parts": {"sweep": "RuntimeError: oh"},
        "dropped": ["block, X", "block, Y"],
    }
    text = report.table(results)
    for line in (
        "| block forward, T 32768: × Liger | 1.4 | 2 | yes |",
        "| block both passes, T 32768: TFLOP/s | 400 | not measured |  |",
        "Tests: 3 passed, 1 failed, 2 skipped.",
        "Peer liger-kernel: ModuleNotFoundError: none.",
        "Failed: sweep: RuntimeError: oh",
        "Not measured, for want of time or of a GPU: block, X; block, Y.",
    ):
        assert line in text.splitlines()


# --- The command


def every_key(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in every_key(inner)}
    return {key for inner in value for key in every_key(inner)} if isinstance(value, list) else set()


@pytest.fixture
def no_tests(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: dict(gpu.NO_TESTS))
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_so_measures_nothing_and_writes_nothing(no_tests, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "results_dir", lambda: tmp_path / "results")
    assert main(["gpu", "--minutes", "3"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("NO GPU")
    assert said.rstrip().endswith("Nothing was measured: this was a dry run.")
    assert "not measured" in said
    assert not (tmp_path / "results").exists()


def test_a_dry_run_with_a_folder_keeps_what_ran_and_not_one_figure(no_tests, tmp_path, capsys):
    assert main(["gpu", "--dry", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-dry.json"]
    assert results["measured"] is False
    assert not every_key(results) & {"ms", "tflops", "first_call_s", "compile_s"}
    assert {record["measured"] for part in ("raw", "block", "sweep", "steps") for record in results[part]} == {False}
    assert results["machine"]["torch"] == torch.__version__
    assert all(row["measured"] is None for row in results["targets"])
    assert results["dropped"] == []


def test_what_there_is_no_time_for_is_dropped_and_named(no_tests, tmp_path, capsys):
    assert main(["gpu", "--dry", "--minutes", "0.001", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert results["dropped"] == [what for what, _ in jobs.agenda(is_dry=True)]
    assert "for want of time or of a GPU: products, Qwen3" in capsys.readouterr().out


def test_a_failing_test_shows_in_the_exit_status(no_tests, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run_tests", lambda seconds: gpu.NO_TESTS | {"failed": 1, "failures": ["test_x"]})
    assert main(["gpu", "--dry", "--only", "tests"]) == 1


def test_no_time_at_all_is_refused(capsys):
    assert main(["gpu", "--minutes", "0"]) == 2
    assert "--minutes 0.0: expected more than 0" in capsys.readouterr().err


def test_the_gpu_tests_are_run_and_counted(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "xdist" else name)
    found = gpu.run_tests(300)
    if torch.cuda.is_available():
        return
    assert (found["passed"], found["failed"], found["failures"]) == (0, 0, [])
    assert found["skipped"] == len(found["skips"]) > 30
    assert all("needs a CUDA GPU" in reason for reason in found["skips"].values())


def test_of_a_test_that_failed_its_name_and_first_line_are_kept(tmp_path):
    one, two = "def test_one():\n    raise OSError('no\\nmore')\n", "def test_two():\n    pass\n"
    (tmp_path / "test_them.py").write_text(one + two)
    report = tmp_path / "report.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", tmp_path])
    found = gpu._read(report)
    assert (found["passed"], found["failed"], found["failures"]) == (1, 1, ["test_one: OSError: no"])


def test_an_error_is_told_without_the_folders_of_this_machine():
    told = measure.why(OSError(f"{sys.prefix}/lib/x.so and {course_root()}/moe_lab\nmore"))
    assert told == "OSError: <python>/lib/x.so and ./moe_lab"


def test_tests_after_the_deadline_are_skipped_aloud_and_the_others_count(tmp_path):
    slow = "import time\n\n\ndef test_slow():\n    time.sleep({})\n\n\ndef test_late():\n    assert False\n"
    (tmp_path / "test_two.py").write_text(slow.format(3))
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "moe_lab.gpu.deadline"]
    environment = os.environ | {deadline.UNTIL: str(time.time() + 2.5), "PYTHONPATH": str(course_root())}
    done = subprocess.run([*command, "test_two.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "no time left" in done.stdout
    assert "failed" not in done.stdout


def test_tests_that_do_not_end_count_as_a_failure_and_leave_no_process(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0)
    found = gpu.run_tests(0.5)
    assert not [p for p in psutil.Process().children(recursive=True) if "test_on_gpu" in " ".join(p.cmdline())]
    assert (found["failed"], found["failures"]) == (1, ["no time left"])


NOT_NEEDED = (
    *("matplotlib", "PIL", "IPython", "ipykernel", "ipywidgets", "ipyparallel", "jupyterlab", "jupytext", "nbclient"),
    *("nbformat", "nbval", "hypothesis", "psutil", "playwright", "transformers", "liger_kernel"),
)
BLOCKED = """
import sys
class Without:
    # a finder that does not find some packages
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *more):
        return None if name.split(".")[0] in {blocked} else self.finder.find_spec(name, *more)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
from moe_lab import gpu
gpu.run_tests = lambda seconds: dict(gpu.NO_TESTS)
from moe_lab.cli import main
sys.exit(main(["gpu", "--dry"]))
"""


def test_it_needs_nothing_of_jupyter_and_no_peer():
    code = BLOCKED.replace("{blocked}", repr(set(NOT_NEEDED)))
    root = Path(gpu.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Peer transformers: ModuleNotFoundError: No module named 'transformers'." in done.stdout
    assert "Nothing was measured" in done.stdout
