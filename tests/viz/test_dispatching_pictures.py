"""The drawings of dispatch show the plan that they are given: every arrow ends at the row that the plan says."""

import pytest
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle

from moe_lab import dispatch, viz
from moe_lab.records import DispatchPlan, Routing
from moe_lab.viz import dispatching


def routing(experts: list[list[int]], n_experts: int) -> Routing:
    none = torch.zeros(len(experts), n_experts)
    weights = torch.tensor([[0.75, 0.25]] * len(experts))
    return Routing(none, none, weights, torch.tensor(experts))


SIX = routing([[0, 3], [3, 0], [0, 1], [1, 0], [0, 3], [3, 1]], 4)  # expert 2 has no rows


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def arrows(figure) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Start and end of every arrow."""
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    paths = [patch._path_original.vertices for patch in patches]
    return [(tuple(path[0]), tuple(path[-1])) for path in paths]


def label_at(figure, x: float, y: float) -> str:
    """The text nearest to a place, in the same height."""
    axes = figure.axes[0]
    level = [text for text in axes.texts if abs(text.get_position()[1] - y) < 0.05]
    return min(level, key=lambda text: abs(text.get_position()[0] - x)).get_text()


@pytest.mark.parametrize("plan", [dispatch.make_plan(SIX), dispatch.make_plan(SIX, 3), dispatch.make_plan(SIX, 0)])
def test_rows_of_experts_are_the_plans(plan):
    groups = dispatching.rows_of_experts(plan)
    assert len(groups) == 4
    kept = {(e, token) for e, rows in enumerate(groups) for token in rows if token is not None}
    wanted = {
        (int(e), t) for t, slots in enumerate(SIX.topk_experts) for k, e in enumerate(slots) if not plan.dropped[t, k]
    }
    assert kept == wanted
    assert sum(len(rows) for rows in groups) == plan.n_rows


def test_the_trip_leads_every_choice_to_its_row_and_back(drawn):
    plan = dispatch.make_plan(SIX)
    shown = viz.draw_dispatch(SIX, plan)
    (figure,) = drawn
    there = [(start, end) for start, end in arrows(figure) if start[0] < 3 < end[0]]
    back = [(start, end) for start, end in arrows(figure) if start[0] < 11 < end[0]]
    assert len(there) == len(back) == plan.n_rows
    # rows from top to bottom are 0, 1, …; choices likewise
    row_of = {y: row for row, y in enumerate(sorted({end[1] for _, end in there}, reverse=True))}
    in_order = [row_of[end[1]] for _, end in sorted(there, key=lambda arrow: -arrow[0][1])]
    assert in_order == plan.choice_rows.flatten().tolist()
    assert {(a[1], b[1]) for a, b in there} == {(b[1], a[1]) for a, b in back}
    assert texts(figure).count("token 3") == 2 * (1 + 2)  # as a token and as a row, there and back
    assert "expert 2: no rows" in texts(figure)
    assert "expert 1 has tokens 2, 3, 5; expert 2 has no tokens" in shown.alt


def test_gradients_take_the_same_arrows_the_other_way(drawn):
    plan = dispatch.make_plan(SIX)
    viz.draw_dispatch(SIX, plan)
    viz.draw_dispatch(SIX, plan, gradients=True)
    forward, backward = (set(arrows(figure)) for figure in drawn)
    assert backward == {(end, start) for start, end in forward}


def test_dropped_choices_have_no_arrow_and_empty_rows_are_shown(drawn):
    plan = dispatch.make_plan(SIX, capacity=3)
    shown = viz.draw_dispatch(SIX, plan, back=False)
    (figure,) = drawn
    assert len(arrows(figure)) == 12 - 3
    assert sum(text.endswith("is full") for text in texts(figure)) == int(plan.dropped.sum()) == 3
    assert texts(figure).count("0 is full") == 2
    assert texts(figure).count("empty") == 3
    assert "slot 1 of token 1, slot 1 of token 3, slot 1 of token 4" in shown.alt


def test_an_arrow_has_its_experts_colour(drawn):
    viz.draw_dispatch(SIX, dispatch.make_plan(SIX), back=False)
    (figure,) = drawn
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    for patch in patches:
        (x, y), _ = patch._path_original.vertices[0], patch._path_original.vertices[-1]
        expert = int(label_at(figure, x - 0.5, y).removeprefix("expert "))
        assert patch.get_edgecolor()[:3] == pytest.approx(rgb(dispatching.expert_colour(expert)))


def rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def test_experts_next_to_each_other_differ_in_colour():
    colours = [dispatching.expert_colour(expert) for expert in range(7)]
    assert len(set(colours[:6])) == 6
    assert colours[6] == colours[0]


def test_the_sort_shows_both_tables_and_the_offsets(drawn):
    plan = dispatch.make_plan(SIX)
    viz.draw_sort(SIX, plan)
    (figure,) = drawn
    heights = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts if text.get_ha() == "right"}

    def line(name: str) -> list[int]:
        level = [t for t in figure.axes[0].texts if t.get_position()[1] == heights[name] and t.get_ha() == "center"]
        return [int(text.get_text()) for text in sorted(level, key=lambda text: text.get_position()[0])]

    assert line("choice_rows") == plan.choice_rows.flatten().tolist()
    assert line("row_choices") == plan.row_choices.tolist()
    assert line("its expert") == SIX.topk_experts.flatten().tolist()
    assert line("sorted by expert") == sorted(SIX.topk_experts.flatten().tolist())
    assert {"5 (expert 0)", "8 (expert 1) and 8 (expert 2)", "12 (expert 3)"} <= set(texts(figure))
    assert len(arrows(figure)) == 12


def test_layouts_count_rows_and_empty_places_and_keep_the_order_of_rows(drawn):
    shown = viz.draw_layouts(dispatch.make_plan(SIX))
    (figure,) = drawn
    assert {"12 rows", "20 rows, 8 empty"} <= set(texts(figure))
    places = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert len(places) == 12 + 20
    assert sum(patch.get_hatch() is not None for patch in places) == 8
    in_line = [text for text in figure.axes[0].texts if text.get_position()[1] == 0.5 and text.get_ha() == "center"]
    assert [text.get_text() for text in in_line] == 2 * ["0", "1", "2", "3", "4"]  # expert 0's tokens, in both
    assert "padded to the fullest: 20 rows, 8 empty" in shown.alt


LABELS = {"title": "a title", "x": "experts E", "y": "time (1 = at 8)", "alt": "what is seen"}


def test_growth_is_logarithmic_and_keeps_a_names_look(drawn):
    viz.growth({"a": ([8, 16], [1, 2]), "b": ([8, 16], [4, 8])}, levels={"unit": 1}, **LABELS)
    viz.growth({"b": ([8, 16], [4, 8])}, order=["a", "b"], **LABELS)
    first, second = (figure.axes[0] for figure in drawn)
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert list(first.lines[0].get_ydata()) == [1, 2]
    assert first.lines[1].get_color() == second.lines[0].get_color() != first.lines[0].get_color()
    assert first.lines[1].get_linestyle() == second.lines[0].get_linestyle() != first.lines[0].get_linestyle()
    assert [label.get_text() for label in first.get_xticklabels()] == ["8", "16"]
    assert (first.get_xlabel(), first.get_ylabel()) == ("experts E", "time (1 = at 8)")


@pytest.mark.parametrize("draw", [viz.draw_sort, viz.draw_dispatch])
def test_drawings_are_the_same_bytes_every_time(draw):
    plan = dispatch.make_plan(SIX)
    assert draw(SIX, plan).png == draw(SIX, plan).png


@pytest.mark.parametrize("experts", [[[0, 1]], [[1, 2]] * 9])
def test_drawings_take_other_sizes(experts):
    one = routing(experts, 3)
    plan = dispatch.make_plan(one)
    assert isinstance(plan, DispatchPlan)
    for shown in (viz.draw_sort(one, plan), viz.draw_dispatch(one, plan), viz.draw_dispatch(one, plan, gradients=True)):
        assert shown.png
