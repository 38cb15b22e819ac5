"""What the bench measures is the same computation every time, under the load that it claims."""

import json
import math

import pytest
import torch
from torch.testing import assert_close

from moe_lab import bench
from moe_lab.accounting import count_parameters
from moe_lab.bench import (
    SHAPES,
    SWEEP,
    Shape,
    Timing,
    compare,
    layer_and_input,
    layers,
    parallel,
    parts,
    timing,
    training,
    variants,
)
from moe_lab.bench.layers import base_of, spread, table, transformers_block, verdicts
from moe_lab.cli import main
from moe_lab.parallel import simulate
from moe_lab.paths import course_root
from moe_lab.plain import read_config
from moe_lab.viz import draw_bench

TINY = Shape(n_tokens=12, d_model=8, d_ff=4, n_experts=4, top_k=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loads_are_what_they_are_called(shape):
    even, skewed = ([*layer_and_input(shape, is_skewed)] for is_skewed in (False, True))
    counts = [layer.router(x).tokens_per_expert.float() for layer, x in (even, skewed)]
    mean = shape.n_tokens * shape.top_k / shape.n_experts
    assert counts[0].max() < 1.5 * mean
    assert counts[1].max() > 2 * mean
    half = shape.n_experts // 2
    wanted = sum(1 / i for i in range(half + 1, shape.n_experts + 1)) / sum(
        1 / i for i in range(1, shape.n_experts + 1)
    )
    late = (counts[1][half:].sum() / counts[1].sum()).item()
    # about: the noise is Gaussian, and k are drawn without putting back
    assert wanted * 0.6 < late < wanted * 2


@pytest.mark.parametrize("skewed", [False, True])
def test_every_variant_computes_the_same(skewed, monkeypatch):
    made = {}
    original = layers.layer_and_input
    monkeypatch.setattr(layers, "layer_and_input", lambda *a: made.setdefault("both", original(*a)))
    candidates = variants(TINY, skewed, peers=False)
    layer, x = made["both"]
    results = {}
    for name, run in candidates.items():
        run()
        results[name] = [x.grad, *(weight.grad for weight in layer.parameters())]
    expected = results.pop("every expert")
    assert all(gradient.any() for gradient in expected)
    for got in results.values():
        assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_transformers_block_computes_the_same():
    layer, x = layer_and_input(TINY)
    for implementation in ("eager", "grouped_mm"):
        assert_close(transformers_block(TINY, layer, implementation)(x[None])[0], layer(x)[0])


def test_the_parts_run_and_leave_gradients():
    for run in parts(TINY).values():
        run()


def test_bytes_moved_by_hand():
    shape = Shape(n_tokens=2, d_model=4, d_ff=3, n_experts=5, top_k=1)
    assert shape.bytes_moved == 4 * (9 * 5 * 4 * 3 + 2 * (8 * 4 + 8 * 3))


def test_candidates_take_turns():
    calls = []
    timings = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * (timing.WARM_UP_ROUNDS + 3)
    assert all(timing.low <= timing.median <= timing.high for timing in timings.values())
    with pytest.raises(ValueError, match=r"rounds=1: expected 2 or more"):
        compare({}, rounds=1)


def record(shape: Shape, load: str, **seconds: float) -> dict:
    timings = {name.replace("_", " ", 1): vars(Timing(s, 0.9 * s, 1.2 * s)) for name, s in seconds.items()}
    third = vars(Timing(1.0, 1.0, 1.0))
    parts = {"router": third, "dispatch": third, "experts": vars(Timing(2.0, 2.0, 2.0))}
    return {"shape": vars(shape), "load": load, "fullest_over_mean": 1.5, "seconds": timings, "parts": parts}


RESULTS = {
    "copy_bytes_per_second": 1e9,
    "records": [
        record(SWEEP[0], "balanced", loop=4.0, auto=1.0, transformers_eager=3.0, transformers_grouped_mm=1.5),
        record(SWEEP[-1], "balanced", loop=8.0, auto=2.0, transformers_eager=9.0, transformers_grouped_mm=1.0),
        record(SWEEP[0], "skewed", loop=4.0, auto=1.0),
        record(SWEEP[-1], "skewed", loop=4.0, auto=3.0),
    ],
}


def test_table_and_verdicts_by_hand():
    rows = table(RESULTS).splitlines()
    assert rows[2] == "| T 2048 D 64 F 64 E 8 k 2 | balanced | 1.5 | 0.38 | 1.50 | 0.50 | 1.00 | 25 : 25 : 50 |"
    assert rows[4] == "| T 2048 D 64 F 64 E 8 k 2 | skewed | 1.5 | 1.00 | 4.00 | – | – | 25 : 25 : 50 |"
    said = verdicts(RESULTS)
    assert said[0] == "T 2048 D 64 F 64 E 8 k 2, balanced: auto is 1.50 × the fastest of transformers."
    assert said[1] == "T 2048 D 64 F 64 E 256 k 2, balanced: auto is 0.50 × the fastest of transformers."
    ratio = SWEEP[-1].bytes_moved / SWEEP[0].bytes_moved
    assert said[2].startswith(f"E 8 → 256, balanced: 2.00 × the time for {ratio:.2f} × the bytes")
    assert math.isclose(spread(RESULTS), 0.3)
    assert base_of({"loop": 3.0, "auto": 1.0}) == 3.0


def test_the_figure_has_a_panel_for_each_load():
    assert "an even and a skewed load" in draw_bench(RESULTS).alt


def test_the_command_runs_and_the_quick_one_keeps_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(bench, "SHAPES", (TINY,))
    monkeypatch.setattr(bench, "SWEEP", (TINY,))
    monkeypatch.setattr(bench, "copy_rate", lambda: 1e9)
    monkeypatch.setattr(bench, "results_dir", lambda: tmp_path)
    monkeypatch.setattr(bench, "course_root", lambda: tmp_path)
    monkeypatch.setattr(training, "SIZES", ("moe_notebook",))
    monkeypatch.setattr(training, "peak_bytes", lambda size, name: 1)
    monkeypatch.setattr(parallel, "SHAPE", TINY)
    monkeypatch.setattr(parallel, "launch", simulate)
    threads = torch.get_num_threads()
    try:
        assert main(["bench", "--quick", "--rounds", "2"]) == 0
        told = capsys.readouterr().out
        assert "auto is" in told
        assert "as fast as with transformers' block" in told
        assert "per_rank, the default" in told
        assert not list(tmp_path.iterdir())
        assert main(["bench", "--rounds", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    for name, record in (("cpu", "records"), ("training", "records"), ("parallel", "divided")):
        kept = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"date", "machine", "threads", record} <= kept.keys()
        assert (tmp_path / f"{name}.md").read_text().startswith("# ")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_models_that_are_trained_side_by_side_are_the_same_model():
    ours, theirs = (training.trainer("moe_notebook", name) for name in (training.OURS, training.THEIRS))
    first = [(ours.step().loss, theirs.step().loss) for _ in range(3)]
    assert_close(*map(torch.tensor, zip(*first, strict=True)), rtol=1e-4, atol=1e-4)
    dense = training.trainer("moe_notebook", "dense, equal active").model.config
    assert dense.d_ff == ours.model.config.moe.top_k * ours.model.config.moe.d_ff


def test_more_weights_take_more_memory():
    small, large = (training.peak_bytes("moe_2m", f"dense, equal {size}") for size in ("active", "total"))
    if small is None:
        pytest.skip("this system does not tell a process how much memory it took")
    config = read_config(course_root() / "configs" / "moe_2m.yaml").model
    counts = [
        count_parameters(training.models(config)[f"dense, equal {size}"]().config).total for size in ("active", "total")
    ]
    assert large - small > 3 * 4 * (counts[1] - counts[0])  # weights and AdamW's two moments, at the least


def test_training_table_and_verdicts_by_hand():
    seconds = {"dense, equal active": 1.0, training.OURS: 2.0, training.THEIRS: 3.0}
    records = [
        {
            "size": "small",
            "seconds": {name: vars(Timing(s, s, s)) for name, s in seconds.items()},
            "peak_bytes": {"dense, equal active": 100, training.OURS: 150, training.THEIRS: 300},
        }
    ]
    assert training.table(records).splitlines()[3] == "| small | MoE | 0.50 | 1.50 |"
    assert training.verdicts(records) == [
        "small: a step is 1.50 × as fast as with transformers' block, in 0.50 × the memory."
    ]


def test_what_ruins_a_measurement_is_refused(monkeypatch, capsys):
    assert main(["bench", "--rounds", "1"]) == 2
    assert "--rounds 1: expected 2 or more" in capsys.readouterr().err
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert main(["bench", "--quick"]) == 2
    assert "OMP_WAIT_POLICY is set" in capsys.readouterr().err
