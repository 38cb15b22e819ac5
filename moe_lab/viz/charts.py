"""The four kinds of chart that the course uses. Labels carry units; every chart asks for its alt text."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from moe_lab.viz.picture import BLUE, INK, PART_COLOURS, SERIES, STYLE, Picture, new_axes, part_name

MARKERS = "os^Dv*"
SMALLEST_NAMED_SHARE, SMALLEST_NUMBERED_SHARE = (
    0.05,
    6,
)  # per cent: a thinner slice is not in the legend, or has no number
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    alt: str,
    log_x: bool = False,
    markers: bool = False,
    joined: bool = True,
    ticks: Sequence[str] | None = None,
    levels: Mapping[str, float] | None = None,
) -> Picture:
    """Curves told apart by dash, marker and colour; not `joined`, they are points.

    `ticks` names the places 0, 1, … on the x axis; `levels` are dotted horizontal lines with a name.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_axes()
        for i, (name, (xs, ys)) in enumerate(series.items()):
            marker = MARKERS[i % len(MARKERS)] if markers or not joined else None
            dash = DASHES[i % len(DASHES)] if joined else "none"
            axes.plot(
                xs,
                ys,
                color=SERIES[i % len(SERIES)],
                linestyle=dash,
                marker=marker,
                label=name,
            )
        for name, level in (levels or {}).items():
            _level(axes, name, level)
        if ticks is not None:
            axes.set_xticks(range(len(ticks)), ticks, fontfamily="monospace")
        if log_x:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({value for xs, _ in series.values() for value in xs}))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
        if len(series) > 1:
            axes.legend()
        axes.grid(alpha=0.25)
        axes.set(title=title, xlabel=x, ylabel=y)
        return Picture(figure, alt)


def _level(axes: Axes, name: str, level: float) -> None:
    axes.axhline(level, color=INK, linewidth=1, linestyle=":")
    axes.annotate(name, (1.01, level), xycoords=("axes fraction", "data"), ha="left", va="center", fontsize=9)


def letters(text: str) -> list[str]:
    """The characters of a text as axis labels, with spaces and line ends made visible."""
    return [{" ": "␣", "\n": "⏎"}.get(character, character) for character in text]


def bars(
    values: Mapping[str, float],
    *,
    title: str,
    y: str,
    alt: str,
    x: str | None = None,
    show: Callable[[float], str] = "{:.2f}".format,
    level: tuple[str, float] | None = None,
) -> Picture:
    """One bar a name, with its number on top; `level` is a dotted line with a name.

    With `x` the names are steps along an axis: then all bars have one colour.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_axes()
        colours = SERIES[0] if x else [SERIES[i % len(SERIES)] for i in range(len(values))]
        drawn = axes.bar(list(values), list(values.values()), color=colours)
        if level:
            _level(axes, *level)
        labels = axes.bar_label(drawn, labels=[show(value) for value in values.values()], padding=2)
        for label in labels:  # readable where the level's line runs through
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
        axes.margins(y=0.15)
        axes.set(title=title, xlabel=x or "", ylabel=y)
        return Picture(figure, alt)


def stacked(rows: Mapping[str, Mapping[str, float]], *, title: str, alt: str) -> Picture:
    """One horizontal bar a row, cut into the model's parts, each as its share of the row's sum in per cent."""
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(height=1.5 + 0.55 * len(rows))
        seen = {}
        for row, parts in rows.items():
            left, total = 0.0, sum(parts.values())
            for part, value in parts.items():
                share, colour = 100 * value / total, PART_COLOURS[part]
                drawn = axes.barh(row, share, left=left, color=colour, edgecolor="white")
                if share >= SMALLEST_NAMED_SHARE:
                    seen.setdefault(part_name(part), drawn)
                if share >= SMALLEST_NUMBERED_SHARE:
                    ink = "white" if colour == BLUE else INK
                    axes.text(left + share / 2, row, f"{share:.0f}", ha="center", va="center", color=ink)
                left += share
        axes.invert_yaxis()
        axes.set(title=title, xlabel="share (%)", xlim=(0, 100))
        names = [name for name in dict.fromkeys(map(part_name, PART_COLOURS)) if name in seen]
        figure.legend([seen[name] for name in names], names, loc="outside lower center", ncols=len(names), fontsize=9)
        return Picture(figure, alt)


def heatmap(
    matrix: Sequence[Sequence[float]],
    *,
    title: str,
    x: str,
    y: str,
    alt: str,
    colour: str,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    signed: bool = False,
    numbers: bool = False,
) -> Picture:
    """A matrix as shades, `colour` naming what a shade means; `signed` centres white on zero."""
    values = np.asarray(matrix, dtype=float)
    with mpl.rc_context(STYLE):
        n_rows, n_columns = values.shape
        figure, axes = new_axes(height=min(6.0, 1.6 + 0.26 * n_rows))
        limit = float(np.abs(values).max()) or 1.0
        image = axes.imshow(
            values,
            cmap="PuOr" if signed else "Blues",
            vmin=-limit if signed else 0,
            vmax=limit,
            aspect="auto",
            interpolation="nearest",
        )
        if rows is not None:
            axes.set_yticks(range(n_rows), rows, fontfamily="monospace")
        if columns is not None:
            axes.set_xticks(range(n_columns), columns, fontfamily="monospace")
        if numbers:
            for (i, j), value in np.ndenumerate(values):
                ink = "white" if abs(value) > 0.6 * limit else INK
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color=ink)
        figure.colorbar(image, ax=axes, label=colour)
        axes.set(title=title, xlabel=x, ylabel=y)
        return Picture(figure, alt)
