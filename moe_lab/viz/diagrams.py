"""Drawings of the things the course builds: boxes for parts, arrows for the way a token takes."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from moe_lab.viz.picture import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, STYLE, Picture, new_axes

PALE, PALEST = 0.30, 0.07
LAST_OF_CORE = 8


def _box(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    colour: str,
    width: float = 1.7,
    height: float = 0.56,
    size: float = 10,
    pale: float = PALE,
) -> None:
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.02,rounding_size=0.08",
        facecolor=(colour, pale),
        edgecolor=colour,
        linewidth=1.8,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=size)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, **style: object
) -> None:
    look = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0} | style
    axes.annotate("", end, start, arrowprops=look | {"connectionstyle": f"arc3,rad={bend}"})


def _plus(axes: Axes, x: float, y: float, sign: str = "+") -> None:
    axes.plot(x, y, "o", markersize=15, markerfacecolor="white", markeredgecolor=INK, zorder=3)
    axes.text(x, y - 0.01, sign, ha="center", va="center", zorder=4)


def _canvas(width: float, height: float, right: float, top: float) -> tuple:
    figure, axes = new_axes(width, height)
    axes.set(xlim=(0, right), ylim=(0, top))
    axes.axis("off")
    return figure, axes


def draw_block() -> Picture:
    """A token's way through a decoder: embedding, then a block of norm, attention, norm and FFN, then the head."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(9.6, 3.1, 12.4, 3.6)
        stream = 0.9
        axes.add_patch(
            FancyBboxPatch(
                (2.25, 0.35),
                7.4,
                2.95,
                boxstyle="round,pad=0.02",
                facecolor="none",
                edgecolor=GREY,
                linestyle="--",
            )
        )
        axes.text(2.4, 3.03, "one decoder block, repeated n_layers times", fontsize=9.5, va="center")
        _box(axes, 1.0, stream, "embedding", GREY, 1.55)
        _arrow(axes, (1.8, stream), (5.38, stream))
        _plus(axes, 5.6, stream)
        _arrow(axes, (5.8, stream), (8.98, stream))
        _plus(axes, 9.2, stream)
        _arrow(axes, (9.4, stream), (10.6, stream))
        _box(axes, 11.4, stream, "norm, head", PURPLE, 1.55)
        axes.text(7.4, stream - 0.28, "residual stream, D numbers per token", fontsize=9, ha="center")
        for x, part, colour in ((2.8, "attention", BLUE), (6.5, "FFN", ORANGE)):
            _arrow(axes, (x, stream), (x, 1.62))
            _box(axes, x, 1.9, "norm", GREEN, 0.95)
            _arrow(axes, (x + 0.5, 1.9), (x + 1.0, 1.9))
            _box(axes, x + 1.78, 1.9, part, colour, 1.5)
            _arrow(axes, (x + 2.8, 1.9), (x + 2.8, stream + 0.2))
            axes.plot([x + 2.55, x + 2.8], [1.9, 1.9], color=INK, linewidth=1.4)
        axes.text(4.6, 2.42, "looks at other tokens", fontsize=9, ha="center")
        axes.text(8.25, 2.42, "works on one token alone", fontsize=9, ha="center")
        return Picture(
            figure,
            "A line, the residual stream, runs from the embedding to the final norm and head. Within a dashed block, "
            "two side branches leave it and are added back: norm then attention, and norm then FFN.",
        )


def draw_ffns() -> Picture:
    """The two-matrix MLP beside SwiGLU with its gate."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(9.2, 2.5, 12.0, 3.0)
        axes.text(0.1, 2.75, "MLP: two matrices", fontsize=11)
        axes.text(0.05, 1.5, "x", fontsize=12, va="center")
        _arrow(axes, (0.3, 1.5), (0.6, 1.5))
        _box(axes, 1.2, 1.5, "w_up", ORANGE, 1.1)
        _arrow(axes, (1.8, 1.5), (2.1, 1.5))
        _box(axes, 2.65, 1.5, "ReLU", GREEN, 1.0)
        _arrow(axes, (3.2, 1.5), (3.5, 1.5))
        _box(axes, 4.15, 1.5, "w_down", ORANGE, 1.2)
        _arrow(axes, (4.8, 1.5), (5.1, 1.5))
        axes.text(5.2, 1.5, "y", fontsize=12, va="center")
        axes.text(6.1, 2.75, "SwiGLU: three matrices, one of them a gate", fontsize=11)
        axes.text(6.0, 1.5, "x", fontsize=12, va="center")
        _arrow(axes, (6.25, 1.55), (6.6, 2.1))
        _arrow(axes, (6.25, 1.45), (6.6, 0.9))
        _box(axes, 7.25, 2.1, "w_gate", ORANGE, 1.2)
        _box(axes, 7.25, 0.9, "w_up", ORANGE, 1.2)
        _arrow(axes, (7.9, 2.1), (8.15, 2.1))
        _box(axes, 8.65, 2.1, "SiLU", GREEN, 0.9)
        _arrow(axes, (9.15, 2.0), (9.55, 1.63))
        _arrow(axes, (7.9, 0.95), (9.53, 1.4))
        _plus(axes, 9.7, 1.5, "×")
        _arrow(axes, (9.9, 1.5), (10.15, 1.5))
        _box(axes, 10.8, 1.5, "w_down", ORANGE, 1.2)
        _arrow(axes, (11.45, 1.5), (11.7, 1.5))
        axes.text(11.78, 1.5, "y", fontsize=12, va="center")
        return Picture(
            figure,
            "Left, the MLP: x goes through w_up, ReLU and w_down to y. Right, SwiGLU: x goes through w_gate and SiLU, "
            "and beside it through w_up; the two are multiplied, and w_down gives y.",
        )


def draw_dense_to_moe() -> Picture:
    """A dense FFN beside the mixture-of-experts layer that replaces it."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(9.2, 3.0, 12.0, 3.6)
        axes.text(0.1, 3.35, "today's start: one FFN, all of it, for every token", fontsize=10.5)
        axes.text(0.05, 1.6, "token", va="center")
        _arrow(axes, (0.8, 1.6), (1.35, 1.6))
        _box(axes, 2.35, 1.6, "FFN", ORANGE, 1.9, 1.9)
        _arrow(axes, (3.35, 1.6), (3.95, 1.6))
        axes.text(4.05, 1.6, "out", va="center")
        axes.text(5.3, 3.35, "where you are going: many FFNs, a router picks two", fontsize=10.5)
        axes.text(5.2, 1.6, "token", va="center")
        _arrow(axes, (5.95, 1.6), (6.3, 1.6))
        _box(axes, 7.0, 1.6, "router", PURPLE, 1.3)
        for expert in range(4):
            y, chosen = 2.8 - 0.8 * expert, expert in (0, 2)
            _box(axes, 9.2, y, f"expert {expert}", ORANGE if chosen else GREY, 1.4, 0.5)
            if chosen:
                weight = "0.7" if expert == 0 else "0.3"
                _arrow(axes, (7.7, 1.6), (8.45, y))
                _arrow(axes, (9.95, y), (10.75, 1.68 if expert == 0 else 1.48))
                axes.text(10.42, 2.42 if expert == 0 else 1.1, f"× {weight}", fontsize=9.5, va="center")
            else:
                axes.plot([7.7, 8.45], [1.6, y], color=GREY, linewidth=1, linestyle=":")
        _plus(axes, 10.95, 1.58)
        _arrow(axes, (11.15, 1.58), (11.45, 1.58))
        axes.text(11.52, 1.58, "out", va="center")
        return Picture(
            figure,
            "Left, a token goes through one large FFN. Right, a router sends the token to two of four smaller "
            "experts; their outputs, weighted 0.7 and 0.3, are added; the other two experts are not computed.",
        )


def draw_map(notebooks: Sequence[tuple[str, str, int | None]], *, columns: int = 5) -> Picture:
    """The notebooks as boxes in reading order: number, title, minutes (None: not written yet)."""
    with mpl.rc_context(STYLE):
        n_rows = -(-len(notebooks) // columns)
        figure, axes = _canvas(9.6, 0.9 * n_rows + 0.2, 2.2 * columns, n_rows)
        for i, (number, title, minutes) in enumerate(notebooks):
            row, column = divmod(i, columns)
            x, y = 2.2 * column + 1.05, n_rows - row - 0.5
            is_core = int(number) <= LAST_OF_CORE
            when = "to come" if minutes is None else f"{minutes} min"
            pale = PALEST if minutes is None else PALE
            _box(axes, x, y, f"{number}  {title}\n{when}", BLUE if is_core else GREEN, 1.95, 0.74, size=9, pale=pale)
            if column < columns - 1 and int(number) < LAST_OF_CORE:
                _arrow(axes, (x + 1.0, y), (x + 1.2, y))
        return Picture(
            figure,
            "The notebooks in reading order, five per row, the core up to 08 joined by arrows: "
            + "; ".join(f"{n} {t}, {'to come' if m is None else f'{m} minutes'}" for n, t, m in notebooks)
            + ".",
        )
