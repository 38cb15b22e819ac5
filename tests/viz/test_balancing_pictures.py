"""The pictures of balance show the numbers they are given: shares, loads of a run of now, bands and sweeps."""

import pytest
import torch

from moe_lab import viz
from moe_lab.experiments import Results
from moe_lab.viz import balancing

TEXTS = {"title": "a title", "alt": "what is seen"}


def run(variant: str, seed: int, loads: list[list[int]], bits: float = 2.5, **layer: float) -> dict:
    """A record with one layer of experts, whose load at every second step is given."""
    curve = [{"step": 2 * (i + 1), "bits_per_byte": bits, "load": [load]} for i, load in enumerate(loads)]
    model = {"moe": {"top_k": 1}}
    return {"variant": variant, "seed": seed, "model": model, "mean": bits, "curve": curve, "layers": [layer]}


RESULTS = Results(
    question="?",
    stamp={},
    runs=[
        run("none", 0, [[4, 4], [6, 2], [8, 0]], 2.5, max_violation=1.0, tells=0.1, tells_shuffled=0.02),
        run("none", 1, [[5, 3], [8, 0], [8, 0]], 2.6, max_violation=0.9, tells=0.2, tells_shuffled=0.01),
        run("cured", 0, [[4, 4], [4, 4], [5, 3]], 2.7, max_violation=0.2, tells=0.4, tells_shuffled=0.03),
    ],
)


def points(axes, marker: str) -> list[tuple[float, float]]:
    """Where the markers of one kind stand."""
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return [point for line in lines for point in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_shares_are_drawn_side_by_side(drawn):
    viz.draw_shares(torch.tensor([0.75, 0.25]), torch.tensor([0.6, 0.4]), **TEXTS)
    (axes,) = drawn[0].axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.75, 0.25, 0.6, 0.4])
    assert axes.lines[0].get_ydata()[0] == 0.5  # what is even


def test_violations_are_of_summed_loads():
    assert balancing.violations(RESULTS.runs[0], 0) == ([2, 4, 6], [0.0, 0.5, 1.0])


def test_the_band_goes_from_the_least_to_the_largest_seed(drawn):
    live = run("none", 7, [[4, 4], [5, 3], [7, 1]])
    viz.violation_band(RESULTS, {"no cure": "none", "a cure": "cured"}, 0, live=live, **TEXTS)
    (axes,) = drawn[0].axes
    mean, cured, mine = (line.get_ydata() for line in axes.lines)
    assert list(mean) == [0.125, 0.75, 1.0]
    assert list(cured) == [0.0, 0.0, 0.25]
    assert list(mine) == [0.0, 0.25, 0.75]
    low_and_high = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert {0.0, 0.25, 0.5, 1.0} <= set(low_and_high.tolist())
    assert "no cure, 2 seeds" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_sweep_has_a_panel_for_every_measure_and_a_star_for_the_reader(drawn):
    live = run("cured", 7, [[4, 4]], 2.65, max_violation=0.3, tells=0.5)
    panels = [
        viz.Panel(measure="max_violation", layer=0, y="MaxVio", log=True),
        viz.Panel(measure="mean", y="bits per byte"),
        viz.Panel(measure="tells", layer=0, y="I (bits)", shuffled=True),
    ]
    labels = {"0": "none", "1": "cured"}
    viz.sweep(RESULTS, labels, panels, x="strength", live=live, **TEXTS)
    load, bits, tells = drawn[0].axes
    assert [value for _, value in points(load, "o")] == [1.0, 0.9, 0.2]
    assert load.get_yscale() == "log"
    assert [value for _, value in points(bits, "o")] == [2.5, 2.6, 2.7]
    assert points(bits, "*") == [(1.33, 2.65)]
    assert points(load, "*") == [(1.33, 0.3)]
    assert [value for _, value in points(tells, "D")] == [0.02, 0.01, 0.03]
    assert tells.get_ylim()[0] == 0
    assert [label.get_text() for label in tells.get_xticklabels()] == ["0", "1"]
    assert tells.get_xlabel() == "strength"


def test_a_run_of_another_variant_has_no_star(drawn):
    live = run("elsewhere", 7, [[4, 4]], max_violation=0.3)
    panel = viz.Panel(measure="max_violation", layer=0, y="MaxVio", level=("all on one", 1))
    viz.sweep(RESULTS, {"0": "none"}, [panel], x="strength", live=live, **TEXTS)
    assert not points(drawn[0].axes[0], "*")


def test_a_measure_that_was_not_recorded_is_named():
    panel = viz.Panel(measure="heat", layer=0, y="heat")
    with pytest.raises(ValueError, match="measure='heat' was not recorded for the variant 'none'"):
        viz.sweep(RESULTS, {"0": "none"}, [panel], x="strength", **TEXTS)
