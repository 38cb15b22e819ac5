import base64
import html

import pytest
import torch
from matplotlib.colors import to_hex

from moe_lab import viz
from moe_lab.lm import LM
from moe_lab.presets import DENSE_BASELINE, MOE_BASELINE
from moe_lab.train import choices_of
from moe_lab.viz.text import (
    COLOURS,
    MAX_BYTES,
    ROW_BYTES,
    SENTENCE,
    Shown,
    as_shown,
    rows_of,
    shipped_models,
    whole_characters,
)

ODD_TEXTS = [
    "a",
    " ",
    "\t\n",
    "naïve 東京",
    "e\u0301",
    "\U0001f642",
    "שלום",
    "\ud800",
    "\\$x_1$ <b>&",
    "\x00\x7f\u200d",
]


@pytest.fixture
def model():
    torch.manual_seed(2)
    return LM(MOE_BASELINE)


@pytest.fixture(scope="module")
def shipped():
    return shipped_models()


def experts(model, text, layer):
    return choices_of(model, torch.tensor([list(text.encode(errors="replace"))]))[layer - 1].topk_experts.tolist()


def boxes(axes):
    """Left edge, top edge, width and colour of every rectangle, from top to bottom and left to right."""
    found = [(p.get_x(), p.get_y(), p.get_width(), to_hex(p.get_facecolor()).upper()) for p in axes.patches]
    return sorted(found, key=lambda box: (box[1], box[0]))


def written(axes):
    return [text.get_text() for text in axes.texts]


# -- text over bytes ----------------------------------------------------------------------------------------


def test_characters_stand_over_their_bytes():
    shown = as_shown("a é\n東")
    assert shown == [
        Shown("a", 0, 1),
        Shown("␣", 1, 1),
        Shown("é", 2, 2),
        Shown("⏎", 4, 1),
        Shown("U+6771", 5, 3),  # the font has no such letter
    ]


@pytest.mark.parametrize(
    ("character", "label"),
    [("\x1b", "1b"), ("\u00a0", "U+00A0"), ("\u200d", "U+200D"), ("\u0301", "◌\u0301"), ("$", "$"), ("Ω", "Ω")],
)
def test_what_cannot_be_seen_is_named(character, label):
    assert as_shown(character)[0].label == label


@pytest.mark.parametrize(("length", "sizes"), [(1, [1]), (40, [40]), (41, [21, 20]), (64, [32, 32])])
def test_rows_are_few_and_about_equally_long(length, sizes):
    assert [len(row) for row in rows_of(as_shown("x" * length))] == sizes


def test_no_character_is_torn_between_rows():
    rows = rows_of(as_shown("東" * 21))
    assert [sum(character.length for character in row) for row in rows] == [33, 30]
    assert max(33, 30) <= ROW_BYTES


def test_a_text_is_cut_between_characters():
    assert whole_characters("東京", 5) == "東"
    assert whole_characters("a\ud800b") == "a?b"


# -- the drawing --------------------------------------------------------------------------------------------


def test_every_byte_has_the_colour_and_number_of_its_expert_and_a_strip_for_the_second(drawn, model):
    text = "two é"
    viz.draw_text(text, model)
    axes = drawn[0].axes[0]
    found = boxes(axes)
    assert len(found) == 6 * 4  # bytes; first and second choice in two layers
    for layer in (1, 2):
        chosen = experts(model, text, layer)
        first, second = (found[(2 * layer - 2 + i) * 6 : (2 * layer - 1 + i) * 6] for i in (0, 1))
        assert [box[3] for box in first] == [COLOURS[e].upper() for e, _ in chosen]
        assert [box[3] for box in second] == [COLOURS[e].upper() for _, e in chosen]
    numbers = [name for name in written(axes) if name.isdigit()]
    assert sorted(numbers) == sorted(str(e) for layer in (1, 2) for e, _ in experts(model, text, layer))
    for name in ("t", "w", "o", "␣", "é"):
        assert written(axes).count(name) == 2
    # the two bytes of é touch, other bytes do not
    edges = [(x, x + width) for x, _, width, _ in found[:6]]
    assert edges[4][1] == pytest.approx(edges[5][0])
    assert edges[3][1] < edges[4][0]


def test_bars_show_each_experts_share_of_all_choices(drawn, model):
    text = "bars"
    shown = viz.draw_text(text, model)
    for layer, axes in enumerate(drawn[0].axes[1:], start=1):
        counts = torch.bincount(torch.tensor(experts(model, text, layer)).flatten(), minlength=8)
        assert [bar.get_height() for bar in axes.patches] == pytest.approx((100 * counts / 8).tolist())
        assert [label.get_text() for label in axes.get_xticklabels()] == list("01234567")
        fullest = counts.max().item()
        assert axes.get_title(loc="left").endswith(f"has {fullest:.1f} × an even share")  # even is one of eight
        assert f"Layer {layer} uses {(counts > 0).sum()} of 8 experts" in shown.alt


def test_several_texts_have_their_names_and_are_read_each_by_itself(drawn, model):
    viz.draw_text({"one": "same", "two": "same"}, model, layers=[2], alt="twice the same")
    axes = drawn[0].axes[0]
    assert [name for name in written(axes) if name in ("one", "two", "layer 2")] == ["one", "layer 2", "two", "layer 2"]
    colours = [box[3] for box in boxes(axes)]
    assert colours[:8] == colours[8:]
    assert len(drawn[0].axes) == 2


def test_with_one_expert_a_token_there_is_no_second_choice(drawn):
    torch.manual_seed(0)
    model = LM(MOE_BASELINE.but(moe=MOE_BASELINE.moe.but(top_k=1, n_experts=16)))
    viz.draw_text("one", model)
    assert len(boxes(drawn[0].axes[0])) == 3 * 2
    assert not any("second" in text.get_text() for text in drawn[0].texts)


def test_all_eight_experts_have_their_own_colour():
    assert len(set(COLOURS)) == 8


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_any_text_is_drawn(model, text):
    assert viz.draw_text(text, model).png


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("", {}, "the text has 0 bytes: expected 1 to 64"),
        ("é" * 33, {}, "the text has 66 bytes"),
        ({"a": "b", "long": "x" * 65}, {}, "text 'long' has 65 bytes"),
        ({}, {}, "no text"),
        ("a", {"layers": [0]}, "layers=\\[0\\]: expected some of 1 to 2"),
        ("a", {"layers": []}, "expected some of 1 to 2"),
    ],
)
def test_what_cannot_be_drawn_is_refused(model, text, options, says):
    with pytest.raises(ValueError, match=says):
        viz.draw_text(text, model, **options)


def test_models_without_choices_of_tokens_are_refused():
    with pytest.raises(ValueError, match="has no experts"):
        viz.draw_text("a", LM(DENSE_BASELINE))
    with pytest.raises(ValueError, match="lets experts choose"):
        viz.draw_text("a", LM(MOE_BASELINE.but(moe=MOE_BASELINE.moe.but(expert_choice=True))))


# -- live ---------------------------------------------------------------------------------------------------


def test_typing_and_choosing_redraw_the_picture(shipped):
    explorer = viz.TextExplorer(shipped)
    seen = {explorer.picture.png}
    for name, value in {"text": "two words", "model": "collapsed"}.items():
        explorer.sliders[name].value = value
        seen.add(explorer.picture.png)
    assert len(seen) == 3
    assert "A text of 9 bytes" in explorer.picture.alt
    assert explorer.image.value == explorer.picture.png
    assert html.escape(explorer.picture.alt) in explorer.caption.value


def test_no_text_asks_for_one_and_a_long_one_is_cut(shipped, drawn):
    explorer = viz.TextExplorer(shipped, text="")
    assert explorer.picture.alt.startswith("Type a sentence")
    explorer.sliders["text"].value = "x" + "é" * 500
    assert f"A text of {MAX_BYTES - 1} bytes" in explorer.picture.alt
    assert "(the first 63 of 1001 bytes)" in drawn[-1].texts[0].get_text()


def test_the_collapsed_model_uses_fewer_experts(shipped):
    explorer = viz.TextExplorer(shipped)
    assert "Layer 1 uses 8 of 8 experts" in explorer.picture.alt
    explorer.sliders["model"].value = "collapsed"
    assert "takes most, 50 % of the choices" in explorer.picture.alt


def test_no_choice_at_the_start_is_so_close_that_another_machine_would_choose_otherwise(shipped):
    # what is printed about the first picture is compared strictly
    for model in shipped.values():
        for routing in choices_of(model, torch.tensor([list(SENTENCE.encode())])):
            logits = routing.router_logits.sort(-1, descending=True).values
            assert (logits[:, :2] - logits[:, 1:3]).min() > 1e-3


def test_the_explorer_leaves_the_random_numbers_of_its_user_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    viz.TextExplorer()
    assert torch.equal(torch.rand(3), expected)


def test_it_needs_a_model_and_takes_any():
    with pytest.raises(ValueError, match="models is empty"):
        viz.TextExplorer({})
    torch.manual_seed(0)
    assert "'mine'" not in viz.TextExplorer({"mine": LM(MOE_BASELINE)}, text="own").picture.alt


def test_it_leaves_a_picture_for_readers_without_a_kernel(shipped):
    bundle, metadata = viz.TextExplorer(shipped)._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"].startswith("Figure: A text of 45 bytes")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert metadata["image/png"]["alt"]
