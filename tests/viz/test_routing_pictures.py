"""What the pictures of routing show: their data, their alt text, and the explorer at rest and moved."""

import base64

import numpy as np
import pytest
import torch

from moe_lab import viz
from moe_lab.config import RouterConfig
from moe_lab.routing import route
from moe_lab.viz.routing import RouterExplorer, worth_of_groups

LABELS = {"title": "a title", "x": "logit", "y": "choice", "alt": "what is seen", "colour": "slope"}
SCORES = torch.tensor([0.9, 0.1, 0.0, 0.5, 0.7, 0.6, 0.4, 0.5, 0.1, 0.2, 0.3, 0.8])


def heights(axes) -> dict[int, float]:
    """By expert, the height of its bar."""
    return {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}


def solid(axes) -> list[int]:
    """The experts whose bars look chosen."""
    return [
        round(bar.get_x() + bar.get_width() / 2)
        for bar in axes.patches
        if bar.get_linestyle() == "solid" and bar.get_hatch() is None
    ]


# --- the drawing --------------------------------------------------------------------------------------------------


def test_the_router_is_drawn_with_the_numbers_of_its_token(drawn):
    shown = viz.draw_router()
    logits = torch.tensor([[4.0, 0.0, 2.0, -2.0]])  # the first question of the notebook
    routing = route(logits, RouterConfig(d_model=2, n_experts=4, top_k=2))
    texts = {text.get_text() for text in drawn[0].axes[0].texts}
    assert {f"{score:.2f}" for score in routing.router_scores[0].tolist()} <= texts
    assert ", ".join(f"{weight:.2f}" for weight in routing.topk_weights[0].tolist()) in texts
    assert "experts 0 and 2" in shown.alt
    assert routing.topk_experts.tolist() == [[0, 2]]


def test_the_way_back_is_drawn_only_while_learning(drawn):
    forward, both = viz.draw_router(learning=False), viz.draw_router()
    told = [{text.get_text() for text in figure.axes[0].texts} for figure in drawn]
    assert told[1] - told[0] == {"0.88, 0.12", "the gradient comes back this way", "no slope: nothing comes back"}
    assert "gradient" in both.alt
    assert "gradient" not in forward.alt


def test_bars_along_an_axis_name_it_and_have_one_colour(drawn):
    viz.bars({"0 to 1": 5.0, "1 to 2": 3.0}, title="t", x="margin", y="share (%)", alt="two bars")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "margin"
    assert len({bar.get_facecolor() for bar in axes.patches}) == 1


def test_the_drawing_is_the_same_bytes_every_time():
    assert viz.draw_router().png == viz.draw_router().png


# --- one token ----------------------------------------------------------------------------------------------------


def test_a_token_shows_logits_scores_and_weights_of_its_own_row(drawn):
    logits = torch.tensor([[9.0, 9.0, 9.0], [1.0, -2.0, 3.0]])
    routing = route(logits, RouterConfig(d_model=1, n_experts=3, top_k=2, score="sigmoid", normalise=False))
    shown = viz.draw_token(routing, token=1)
    axes = drawn[0].axes
    assert heights(axes[0]) == pytest.approx({0: 1.0, 1: -2.0, 2: 3.0})
    assert heights(axes[1]) == pytest.approx(dict(enumerate(logits[1].sigmoid().tolist())))
    assert heights(axes[2]) == pytest.approx({0: logits[1, 0].sigmoid().item(), 2: logits[1, 2].sigmoid().item()})
    assert [panel.get_title(loc="left") for panel in axes] == ["logits", "scores, sum 1.80", "weights, sum 1.68"]
    assert solid(axes[0]) == solid(axes[1]) == solid(axes[2]) == [0, 2]
    assert "the best first: expert 2 with weight 0.95, expert 0 with weight 0.73" in shown.alt


def test_weights_above_one_are_not_cut_off(drawn):
    routing = route(torch.zeros(1, 4), RouterConfig(d_model=1, n_experts=4, top_k=1, scaling_factor=2.5))
    viz.draw_token(routing)
    assert drawn[0].axes[2].get_ylim()[1] > 2.5


# --- the explorer -------------------------------------------------------------------------------------------------


def test_the_explorer_shows_what_a_router_makes_of_the_sliders():
    explorer = RouterExplorer()
    assert "expert 0 with weight 0.73, expert 1 with weight 0.27" in explorer.picture.alt
    for name, value in {"expert_3": 4.0, "k": 1, "score": "sigmoid", "normalise": False}.items():
        explorer.sliders[name].value = value
    assert f"Chosen, the best first: expert 3 with weight {torch.tensor(4.0).sigmoid():.2f}." in explorer.picture.alt
    assert explorer.image.value == explorer.picture.png
    assert explorer.picture.alt in explorer.caption.value


def test_no_temperature_changes_the_choice_in_the_explorer():
    logits = {"expert_0": 2.0, "expert_1": 1.0, "expert_2": 0.5, "expert_3": -1.0, "expert_4": 0.0}
    slider = RouterExplorer().sliders["temperature"]
    for temperature in np.arange(slider.min, slider.max + slider.step, slider.step):
        routing = RouterExplorer.routing(k=3, temperature=float(temperature), score="softmax", normalise=True, **logits)
        assert routing.topk_experts.tolist() == [[0, 1, 2]]


def test_equal_logits_go_to_the_lowest_ids():
    equal = {f"expert_{expert}": 0.0 for expert in range(RouterExplorer.N_EXPERTS)}
    routing = RouterExplorer.routing(k=2, temperature=1.0, score="softmax", normalise=True, **equal)
    assert routing.topk_experts.tolist() == [[0, 1]]


def test_the_explorer_leaves_a_picture_for_readers_without_a_kernel():
    bundle, metadata = RouterExplorer()._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"].startswith("Figure: Three rows of bars")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert metadata["image/png"]["alt"]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("logit", [-4.0, 4.0])
def test_the_explorer_draws_at_its_corners(score, k, logit):
    logits = {f"expert_{expert}": logit for expert in range(RouterExplorer.N_EXPERTS)}
    assert RouterExplorer().draw(k=k, temperature=0.25, score=score, normalise=False, **logits).png


# --- matrices -----------------------------------------------------------------------------------------------------


def test_heatmaps_share_one_scale_and_may_differ_in_shape(drawn):
    one, two = torch.tensor([[0.5, -2.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.25]])
    viz.heatmaps({"one": one, "two": two}, rows=("1", "3"), signed=True, numbers=True, **LABELS)
    first, second = drawn[0].axes[:2]
    assert np.array_equal(first.images[0].get_array(), one.numpy())
    assert np.array_equal(second.images[0].get_array(), two.numpy())
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-2, 2)
    assert [text.get_text() for text in first.texts] == ["0.50", "−2.00"]
    assert second.texts[0].get_text() == "0"
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in (first, second)] == [["1"], ["1", "3"]]
    assert (first.get_title(loc="left"), first.get_xlabel(), first.get_ylabel()) == ("one", "logit", "choice")


def test_unsigned_heatmaps_begin_at_zero_and_survive_zeros(drawn):
    viz.heatmaps({"zeros": torch.zeros(2, 3)}, **LABELS)
    assert drawn[0].axes[0].images[0].get_clim() == (0, 1)


# --- groups -------------------------------------------------------------------------------------------------------


def test_groups_are_worth_their_best_or_two_best():
    assert worth_of_groups(SCORES, 4, "max").tolist() == pytest.approx([0.9, 0.7, 0.5, 0.8])
    assert worth_of_groups(SCORES, 4, "top2_sum").tolist() == pytest.approx([1.0, 1.3, 0.9, 1.1])


def test_groups_show_both_rules_with_their_choice(drawn):
    shown = viz.draw_groups(SCORES, n_groups=4, groups_kept=2, top_k=3)
    by_best, by_two = drawn[0].axes
    assert "groups 0 and 3 are kept and experts 0, 10 and 11 chosen" in shown.alt
    assert "groups 1 and 3 are kept and experts 4, 5 and 11 chosen" in shown.alt
    for axes, kept in ((by_best, (0, 3)), (by_two, (1, 3))):
        names = [text.get_text() for text in axes.texts if text.get_text().startswith("group")]
        assert [name.endswith("kept") for name in names] == [group in kept for group in range(4)]
    assert "group 1: worth 1.30, kept" in {text.get_text() for text in by_two.texts}
