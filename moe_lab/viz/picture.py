"""A figure as it is shown: a PNG with alt text, on white, the same wherever the notebook is read."""

import base64
import functools
import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette: told apart by colour-blind readers, and in a projector's light.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY, INK = "#56B4E9", "#CC79A7", "#9A9A9A", "#222222"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)

# One colour per part of the model, the same in every notebook.
PART_COLOURS = {
    "embedding": GREY,
    "conv": "#D0D0D0",
    "attention": BLUE,
    "attention_projections": BLUE,
    "attention_scores": SKY,
    "ffn": ORANGE,
    "router": "#E97B45",  # a lighter vermillion, on which dark numbers can be read
    "experts": ORANGE,
    "shared_experts": "#F5CF7A",
    "norms": GREEN,
    "head": PURPLE,
}
PART_NAMES = {
    "attention": "attention projections",
    "ffn": "FFN",
    "conv": "convolution",
    "shared_experts": "shared experts",
    "attention_projections": "attention projections",
    "attention_scores": "attention scores",
}

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.edgecolor": INK,
    "font.size": 10.5,
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same letters on every machine
    "legend.frameon": False,
    "lines.linewidth": 2.2,
}
DOTS_PER_INCH = 200
SHOWN_DOTS_PER_INCH = 100


class Picture:
    """A rendered figure with its alt text; the text stands in where the image cannot be seen.

    Raises:
        ValueError: without alt text.
    """

    def __init__(self, figure: Figure, alt: str) -> None:
        if not alt.strip():
            raise ValueError("A picture needs alt text: say in a sentence what a reader would see.")
        self.alt = alt
        drawn, small = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH, facecolor="white", bbox_inches="tight")
        # 256 colours look the same in a figure and take a third of the space in a stored notebook.
        Image.open(drawn).convert("RGB").quantize(256).save(small, format="png", optimize=True)
        self.png = small.getvalue()

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict, dict]:
        width = int.from_bytes(self.png[16:20], "big") * SHOWN_DOTS_PER_INCH // DOTS_PER_INCH
        bundle = {"image/png": base64.b64encode(self.png).decode(), "text/plain": repr(self)}
        return bundle, {"image/png": {"alt": self.alt, "width": width}}

    def __repr__(self) -> str:
        return f"Figure: {self.alt}"


def styled(draw: Callable[..., Picture]) -> Callable[..., Picture]:
    """Draws in the course's style from the first line to the last."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Picture:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_axes(width: float = 7.0, height: float = 3.4) -> tuple[Figure, Axes]:
    """A figure in the course's style with one pair of axes; sizes in inches."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def three_digits(value: float) -> str:
    """A number for a label: its first three digits, or from a hundred on all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def part_name(part: str) -> str:
    """What a part of the model is called in a figure."""
    return PART_NAMES.get(part, part)
