import base64
import html

import pytest
import torch

from moe_lab import viz
from moe_lab.config import RouterConfig
from moe_lab.lm import LM
from moe_lab.presets import DENSE_BASELINE, MOE_BASELINE
from moe_lab.routing import route
from moe_lab.viz.tracing import MAX_VISITS, TraceExplorer, byte_names

SCORES = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.3, 0.1, 0.5, 0.1], [0.2, 0.7, 0.05, 0.05]])


@pytest.fixture
def routing():
    return route(SCORES.log(), RouterConfig(d_model=1, n_experts=4, top_k=2))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_visits_have_a_line_to_the_expert_and_one_back_as_thick_as_its_weight(drawn, routing):
    shown = viz.draw_visits(routing)
    (axes,) = drawn[0].axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2]
    there, back = lines[::2], lines[1::2]
    assert len(there) == len(back) == 6
    assert len({line.get_linewidth() for line in there}) == 1
    expected = [0.5 + 5 * weight for weight in routing.topk_weights.flatten().tolist()]
    assert [line.get_linewidth() for line in back] == pytest.approx(expected)
    assert {"expert 0\n3 tokens", "expert 1\n2 tokens", "expert 2\n1 token", "expert 3\nnobody"} <= set(texts(axes))
    assert "token 1 to 2 and 0" in shown.alt
    assert "Nobody goes to expert 3." in shown.alt


def test_one_turn_shows_the_weights_of_its_expert_alone(drawn, routing):
    shown = viz.draw_visits(routing, highlight=0)
    (axes,) = drawn[0].axes
    assert [text for text in texts(axes) if text.startswith("×")] == ["× 0.75", "× 0.375", "× 0.222"]
    assert "Expert 0 receives a copy of tokens 0, 1, 2," in shown.alt


def test_the_turn_of_an_empty_expert_can_be_drawn(routing):
    assert "Expert 3 receives no token" in viz.draw_visits(routing, highlight=3).alt


def test_what_cannot_be_followed_is_refused(routing):
    with pytest.raises(ValueError, match=f"20 tokens with 2 experts each: expected at most {MAX_VISITS}"):
        viz.draw_visits(route(torch.rand(20, 4), RouterConfig(d_model=1, n_experts=4, top_k=2)))
    with pytest.raises(ValueError, match="highlight=4: expected an expert from 0 to 3"):
        viz.draw_visits(routing, highlight=4)


def test_the_grid_shows_scores_and_frames_the_chosen_with_their_weights(drawn, routing):
    viz.draw_routing(routing, ["a", "b", "c"], title="a title", alt="a grid")
    axes = drawn[0].axes[0]
    assert torch.allclose(torch.tensor(axes.images[0].get_array().data), SCORES.T)
    frames = [patch for patch in axes.patches if not patch.get_fill()]
    places = {(round(frame.get_x() + 0.47), round(frame.get_y() + 0.46)) for frame in frames}
    assert places == {(0, 0), (0, 1), (1, 2), (1, 0), (2, 1), (2, 0)}
    weights = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert {((0, 0), "75"), ((0, 1), "25"), ((1, 2), "62"), ((2, 1), "78")} <= weights
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    loads = [text.get_text() for text in axes.texts if text.get_position()[0] > 1 and text.get_ha() == "right"]
    assert loads == ["3", "2", "1", "0"]


def test_bytes_have_names_that_can_be_seen():
    assert byte_names("a é\n\t".encode()) == ["a", "␣", "c3", "a9", "⏎", "09"]


def test_the_explorer_traces_what_the_model_does():
    torch.manual_seed(3)
    model = LM(MOE_BASELINE)
    explorer = TraceExplorer(model, about="mine")
    ids = list(b"experts")
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[1][1]
    traced = explorer.route(ids, layer=2, top_k=2)
    assert torch.equal(traced.topk_experts, expected.topk_experts)
    torch.testing.assert_close(traced.topk_weights, expected.topk_weights)
    assert explorer.route(ids, layer=1, top_k=5).topk_experts.shape == (7, 5)
    assert model.config.moe.top_k == 2


def test_the_explorer_says_which_model_it_traces(drawn):
    TraceExplorer()
    assert "(trained)" in drawn[-1].axes[0].get_title(loc="left")
    torch.manual_seed(0)
    TraceExplorer(LM(MOE_BASELINE))
    assert "(your model)" in drawn[-1].axes[0].get_title(loc="left")


def test_no_choice_at_the_start_is_so_close_that_another_machine_would_choose_otherwise():
    # what is printed about the first picture is compared strictly
    explorer = TraceExplorer()
    for layer in (1, 2):
        routing = explorer.route(explorer.sliders["text"].value.encode(), layer, top_k=2)
        logits = routing.router_logits.sort(-1, descending=True).values
        assert (logits[:, :2] - logits[:, 1:3]).min() > 1e-3


def test_the_explorer_leaves_the_random_numbers_of_its_user_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    TraceExplorer()
    assert torch.equal(torch.rand(3), expected)


def test_typing_and_moving_redraw_the_picture():
    explorer = TraceExplorer()
    seen = {explorer.picture.alt}
    for name, value in {"text": "two words", "layer": 2, "top_k": 1}.items():
        explorer.sliders[name].value = value
        seen.add(explorer.picture.alt)
    assert len(seen) == 4
    assert "9 tokens in layer 2" in explorer.picture.alt
    assert explorer.image.value == explorer.picture.png
    assert html.escape(explorer.picture.alt) in explorer.caption.value


def test_a_long_text_is_cut_and_the_picture_says_so():
    explorer = TraceExplorer(text="x" * 1000)
    assert "Shown: the first 24 of 1000 tokens." in explorer.picture.alt
    # causal: what was cut off would have changed nothing
    beginning, whole = explorer.route(b"a" * 24, 2, 2), explorer.route(b"a" * 24 + b"zzz", 2, 2)
    assert torch.equal(whole.topk_experts[:24], beginning.topk_experts)


def test_an_empty_text_asks_for_one():
    explorer = TraceExplorer()
    explorer.sliders["text"].value = ""
    assert explorer.picture.alt.startswith("Type a sentence")
    explorer.sliders["text"].value = "back"
    assert "4 tokens" in explorer.picture.alt


@pytest.mark.parametrize("text", ["a", " ", "\t\n", "naïve 東京", "\ud800", "\\$x_1$ <b>&"])
def test_any_text_is_drawn(text):
    assert TraceExplorer(text=text).picture.png


@pytest.mark.parametrize(("layer", "top_k"), [(1, 1), (2, 8)])
def test_the_explorer_draws_at_its_corners(layer, top_k):
    assert TraceExplorer().draw(text="corner", layer=layer, top_k=top_k).png


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="The model has no experts"):
        TraceExplorer(LM(DENSE_BASELINE))


def test_the_explorer_leaves_a_picture_for_readers_without_a_kernel():
    bundle, metadata = TraceExplorer()._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"].startswith("Figure: A grid of 8 experts")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert metadata["image/png"]["alt"]
