import base64

import numpy as np
import pytest
from matplotlib.figure import Figure

from moe_lab import viz
from moe_lab.accounting import count_parameters
from moe_lab.course.map import NOTEBOOKS
from moe_lab.presets import LLAMA_7B
from moe_lab.viz import charts, picture
from moe_lab.viz.explorer import SizeExplorer, readable

LABELS = {"title": "a title", "x": "step", "y": "bits per byte", "alt": "what is seen"}


def test_a_picture_without_alt_text_is_refused():
    with pytest.raises(ValueError, match="needs alt text"):
        viz.Picture(Figure(), " ")


def test_a_picture_shows_itself_with_its_alt_text_and_half_its_pixels_wide():
    shown = viz.lines({"a": ([0, 1], [1, 2])}, **LABELS)
    bundle, metadata = shown._repr_mimebundle_()
    png = base64.b64decode(bundle["image/png"])
    assert png.startswith(b"\x89PNG")
    assert bundle["text/plain"] == "Figure: what is seen"
    assert metadata["image/png"]["alt"] == "what is seen"
    assert metadata["image/png"]["width"] == int.from_bytes(png[16:20], "big") // 2


@pytest.mark.parametrize(
    "draw", [viz.draw_block, viz.draw_ffns, viz.draw_dense_to_moe, lambda: viz.draw_map(NOTEBOOKS)]
)
def test_drawings_are_the_same_bytes_every_time(draw):
    assert draw().png == draw().png


def test_lines_draw_their_data_with_labels_and_differ_without_colour(drawn):
    viz.lines({"a": ([1, 2, 4], [3, 2, 1]), "b": ([1, 2, 4], [1, 1, 1])}, log_x=True, levels={"mean": 2.5}, **LABELS)
    (axes,) = drawn[0].axes
    first, second, level = axes.lines
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([1, 2, 4], [3, 2, 1])
    assert first.get_linestyle() != second.get_linestyle()
    assert level.get_ydata()[0] == 2.5
    assert (axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()) == ("a title", "step", "bits per byte")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_points_are_not_joined_and_can_have_names(drawn):
    viz.lines({"a": ([0, 1], [3, 2])}, joined=False, ticks=viz.letters("a "), **LABELS)
    (axes,) = drawn[0].axes
    assert axes.lines[0].get_linestyle() == "None"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "␣"]


def test_bars_carry_their_numbers(drawn):
    viz.bars({"prose": 2.7, "python": 2.5}, title="t", y="bits", alt="two bars", level=("mean", 2.6))
    (axes,) = drawn[0].axes
    assert [bar.get_height() for bar in axes.patches] == [2.7, 2.5]
    assert {text.get_text() for text in axes.texts} == {"2.70", "2.50", "mean"}


def test_stacked_shares_are_those_of_the_parts(drawn):
    parts = count_parameters(LLAMA_7B)
    viz.stacked({"Llama-7B": parts.by_part()}, title="t", alt="one bar")
    (axes,) = drawn[0].axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([100 * parts.share(part) for part in parts.by_part()])
    assert {text.get_text() for text in axes.texts} == {"32", "64"}


def test_heatmap_shows_the_matrix_and_centres_signed_values_on_zero(drawn):
    matrix = np.array([[1.0, -3.0], [0.5, 2.0]])
    viz.heatmap(matrix, colour="value", signed=True, rows=["r", "s"], numbers=True, **LABELS)
    image = drawn[0].axes[0].images[0]
    assert np.array_equal(image.get_array(), matrix)
    assert image.get_clim() == (-3, 3)
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["1.00", "-3.00", "0.50", "2.00"]


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio of two hex colours."""

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_numbers_on_bars_can_be_read():
    for colour in picture.PART_COLOURS.values():
        ink = "#FFFFFF" if colour == picture.BLUE else picture.INK
        assert contrast(ink, colour) > 4.5, colour


def test_there_are_enough_ways_to_tell_series_apart():
    assert len(set(charts.DASHES)) == len(set(charts.MARKERS)) == len(set(picture.SERIES)) == 6


@pytest.mark.parametrize(
    ("number", "text"),
    [(6_738_415_616, "6.74 B"), (1.5e12, "1.5 T"), (131_072_000, "131 M"), (999, "999"), (2048, "2.05 K")],
)
def test_large_numbers_are_readable(number, text):
    assert readable(number) == text


def test_the_explorer_starts_at_llama_7b():
    explorer = SizeExplorer()
    values = {name: slider.value for name, slider in explorer.sliders.items()}
    assert count_parameters(explorer.config(**values)).total == count_parameters(LLAMA_7B).total
    assert "6.74 B parameters, 64 % of them in the FFN" in explorer.picture.alt


def test_moving_a_slider_redraws_the_picture():
    explorer = SizeExplorer()
    before = explorer.image.value
    explorer.sliders["d_ff"].value = 22_016
    assert explorer.image.value != before
    assert explorer.image.value == explorer.picture.png
    assert "d_ff 22,016" in explorer.picture.alt
    assert explorer.picture.alt in explorer.caption.value


def test_the_explorer_leaves_a_picture_for_readers_without_a_kernel():
    bundle, metadata = SizeExplorer()._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"].startswith("Figure: At d_model 4,096")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert metadata["image/png"]["alt"]


@pytest.mark.parametrize("corner", [(512, 256, 1), (16_384, 65_536, 128)])
def test_the_explorer_draws_at_its_corners(corner):
    explorer = SizeExplorer()
    sizes = dict(zip(("d_model", "d_ff", "n_layers"), corner, strict=True))
    assert explorer.draw(**sizes).png
