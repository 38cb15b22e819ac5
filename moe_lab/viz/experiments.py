"""Recorded experiments: load over a run, dots of seeds, bands of curves, and the explorer of cures."""

import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moe_lab.experiments import Results
from moe_lab.train import Step
from moe_lab.viz.charts import DASHES, _level
from moe_lab.viz.explorer import Explorer
from moe_lab.viz.picture import GREY, INK, SERIES, STYLE, Picture, new_axes
from moe_lab.viz.training import show_both_ends

LABELS_IN_ALL = 84  # characters that fit side by side below an axis
LIVE = "this run, just now"


# --- load over a run ----------------------------------------------------------------------------------------------


def draw_load(run: Mapping, layer: int, *, title: str, alt: str) -> Picture:
    """Load per expert over the steps of a recorded run, in even shares: white is even, orange more, purple less.

    Args:
        layer: which layer of experts, from 0.

    Raises:
        ValueError: a model without experts, or without this layer.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(8.4, 3.8)
        mesh = _plot_load(axes, run, layer)
        _write_scale(figure, mesh, _doublings(run), ax=axes)
        axes.set_title(title)
        return Picture(figure, alt)


def load_over_steps(run: Mapping, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps (N + 1,) that bound the stretches of a run, and each expert's load in them, (E, N); 1 is even.

    Raises:
        ValueError: see `draw_load`.
    """
    n_layers = len(run["curve"][0]["load"])
    if n_layers == 0:
        raise ValueError(f"The variant {run['variant']!r} has no layers of experts, and so no load to draw.")
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer={layer}: expected 0 to {n_layers - 1}, the layers of experts that were recorded.")
    counts = np.array([point["load"][layer] for point in run["curve"]], dtype=float)
    edges = np.array([0, *(point["step"] for point in run["curve"])])
    return edges, (counts / counts.mean(1, keepdims=True)).T


def _plot_load(axes: Axes, run: Mapping, layer: int) -> QuadMesh:
    edges, load = load_over_steps(run, layer)
    most = _doublings(run)
    with np.errstate(divide="ignore"):
        doublings = np.log2(load).clip(-most, most)  # twice the even share is as far from it as half
    mesh = axes.pcolormesh(
        edges, np.arange(len(load) + 1) - 0.5, doublings, cmap="PuOr_r", norm=Normalize(-most, most), rasterized=True
    )
    axes.set(xlabel=f"step (a cell sums {edges[1]} of them)", ylabel="expert", ylim=(len(load) - 0.5, -0.5))
    axes.set_yticks(range(0, len(load), math.ceil(len(load) / 16)))
    axes.tick_params(axis="y", labelsize=9)
    axes.spines[:].set_visible(True)  # the edge of an even, and so white, load
    return mesh


def _doublings(run: Mapping) -> int:
    """How far the scale reaches: an expert that every token chooses has E / k even shares; to an eighth at least."""
    moe = run["model"]["moe"]
    most = max(3, math.ceil(math.log2(moe["n_experts"] / moe["top_k"])))
    return most + (most > 3 and most % 2)  # beyond 3 there is a tick every second doubling, one of them at 0


def _write_scale(figure: Figure, mesh: QuadMesh, most: int, **place: object) -> None:
    """The bar beside a load: what a colour means in even shares."""
    ticks = range(-most, most + 1, 1 if most <= 3 else 2)
    names = ["1 (even)" if tick == 0 else f"{2**tick}" if tick > 0 else f"1/{2**-tick}" for tick in ticks]
    bar = figure.colorbar(mesh, label="load (in even shares)", ticks=list(ticks), **place)
    bar.ax.set_yticklabels([f"≤ {names[0]}", *names[1:]])


# --- seeds --------------------------------------------------------------------------------------------------------


def bands(
    results: Results,
    labels: Mapping[str, str],
    measure: str = "mean",
    layer: int | None = None,
    *,
    x: str,
    y: str,
    title: str,
    alt: str,
    shuffled: bool = False,
    level: tuple[str, float] | None = None,
) -> Picture:
    """A place on the x axis for every label, a dot for every seed of its variant, a line at their mean.

    Args:
        labels: what stands below the axis, and the name of the variant that it is.
        measure: "mean" for bits per byte, or with a `layer` (from 0) one of that layer's measures.
        shuffled: also draw `{measure}_shuffled`, in grey: what chance alone would give.
        level: a dotted line with a name.

    Raises:
        ValueError: a variant that was not recorded, or one without this measure.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(8.4, 3.6)
        lowest = 0.0
        for place, variant in enumerate(labels.values()):
            values = values_of(results, variant, measure, layer)
            lowest = min(lowest, *values)
            if shuffled:
                chance = values_of(results, variant, f"{measure}_shuffled", layer)
                plot_seeds(axes, place, chance, GREY, "D", "the same, shuffled" if place == 0 else None)
            plot_seeds(axes, place, values, SERIES[0], "o", "measured" if shuffled and place == 0 else None)
        if level:
            _level(axes, *level)
        if layer is not None and lowest == 0:  # measures of routing are read from zero, differences of loss are not
            axes.set_ylim(bottom=0)
        name_places(axes, list(labels))
        if shuffled:
            axes.legend(loc="best")
        axes.grid(axis="y", alpha=0.25)
        axes.set(title=title, xlabel=x, ylabel=y)
        return Picture(figure, alt)


def values_of(results: Results, variant: str, measure: str, layer: int | None) -> list[float]:
    """One measure of a variant, a number for every seed.

    Raises:
        ValueError: a variant that was not recorded, or one without this measure.
    """
    try:
        return results.values(variant, measure, layer)
    except KeyError:
        raise ValueError(f"measure={measure!r} was not recorded for the variant {variant!r}.") from None


def plot_seeds(axes: Axes, place: int, values: Sequence[float], colour: str, marker: str, name: str | None) -> None:
    """The mean as a line, and the seeds side by side on it, so that equal ones are both seen."""
    mean = statistics.fmean(values)
    look = {"color": colour, "clip_on": False, "zorder": 3}  # whole even on the axis
    axes.plot([place - 0.28, place + 0.28], [mean, mean], linewidth=2.6, solid_capstyle="butt", **look)
    beside = np.linspace(-1, 1, len(values)) * min(0.2, 0.07 * (len(values) - 1))
    axes.plot(place + beside, values, marker, markeredgecolor="white", markersize=7, label=name, **look)


def name_places(axes: Axes, names: Sequence[str]) -> None:
    """Names below the axis; one that is too long is broken at its commas first."""
    width = max(6, LABELS_IN_ALL // len(names))
    axes.set_xticks(range(len(names)), [name if len(name) <= width else _broken(name, width) for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="x", length=0)


def _broken(name: str, width: int) -> str:
    parts = name.replace(", ", ",\n").split("\n")
    return "\n".join(textwrap.fill(part, width, break_long_words=False) for part in parts)


# --- curves of seeds ----------------------------------------------------------------------------------------------


def curve_band(
    results: Results,
    labels: Mapping[str, str],
    *,
    x: str,
    y: str,
    title: str,
    alt: str,
    live: Sequence[Step] | Mapping | None = None,
    key: str = "bits_per_byte",
    layer: int | None = None,
    since: int = 0,
) -> Picture:
    """The seeds of every variant as a band from the least to the largest with their mean, and a live run over it.

    Args:
        labels: the names in the legend, and the variants that they are.
        live: the reader's own run: what `train` returned, or a record of `run_once`. Steps are averaged over the same
            stretches as the recorded ones.
        key: what the points of the curves hold: "bits_per_byte", or with a `layer` (from 0) "churn".
        since: leave out what was before this step.

    Raises:
        ValueError: a variant that was not recorded, or one without this key; steps, where the key is another.
    """
    curves = {name: _curves_of(results.of(variant), key, layer) for name, variant in labels.items()}
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(8.4, 3.8)
        drawn: list[float] = []
        for i, (name, (steps, values)) in enumerate(curves.items()):
            late = np.array(steps) >= since
            steps, values = np.array(steps)[late], values[:, late]
            axes.fill_between(steps, values.min(0), values.max(0), color=SERIES[i], alpha=0.22, linewidth=0)
            axes.plot(steps, values.mean(0), color=SERIES[i], linestyle=DASHES[i], label=name)
            drawn += values.flatten().tolist()
        if live is not None:
            stretch = results.of(next(iter(labels.values())))[0]["curve"][0]["step"]
            points = [point for point in zip(*_live_curve(live, stretch, key, layer), strict=True) if point[0] >= since]
            axes.plot(*zip(*points, strict=True), color=INK, linewidth=1.4, marker="o", markersize=4, label=LIVE)
            drawn += [value for _, value in points]
        if key == "bits_per_byte":
            show_both_ends(axes, drawn)
        n_seeds = {len(values) for _, values in curves.values()}
        band = f"band: {min(n_seeds)} seeds" if n_seeds != {1} else None
        axes.legend(title=band, alignment="left")
        axes.grid(alpha=0.25)
        axes.set(title=title, xlabel=x, ylabel=y)
        return Picture(figure, alt)


def _curve_of(run: Mapping, key: str, layer: int | None) -> tuple[list[int], list[float]]:
    points = [point for point in run["curve"] if key in point]
    if not points:
        raise ValueError(f"key={key!r} was not recorded for the variant {run['variant']!r}.")
    return [point["step"] for point in points], [point[key] if layer is None else point[key][layer] for point in points]


def _curves_of(runs: Sequence[Mapping], key: str, layer: int | None) -> tuple[list[int], np.ndarray]:
    """The steps, and the values (seeds, steps)."""
    curves = [_curve_of(run, key, layer) for run in runs]
    return curves[0][0], np.array([values for _, values in curves])


def _live_curve(
    live: Sequence[Step] | Mapping, stretch: int, key: str, layer: int | None
) -> tuple[list[int], list[float]]:
    if isinstance(live, Mapping):
        return _curve_of(live, key, layer)
    if key != "bits_per_byte":
        raise ValueError(f"key={key!r} with live steps: steps know only bits_per_byte, give a record of run_once.")
    parts = [live[start : start + stretch] for start in range(0, len(live), stretch)]
    return [part[-1].index + 1 for part in parts], [statistics.fmean(s.bits_per_byte for s in part) for part in parts]


# --- cures --------------------------------------------------------------------------------------------------------

CURES = {  # a variant's name without its strength: how the cure is called, what it starts from, its strength's name
    "switch": ("Switch loss", "no cure", "α"),
    "sequence": ("sequence-wise loss", "no cure", "α"),
    "micro-batch": ("Switch loss, per micro-batch", "no cure", "α"),
    "global batch": ("Switch loss, global batch", "no cure", "α"),
    "z-loss": ("z-loss", "no cure", "coefficient"),
    "softmax bias": ("bias, softmax scores", "no cure", "γ"),
    "sigmoid bias": ("bias, sigmoid scores", "sigmoid, no cure", "γ"),
}
WITH_STRENGTH = re.compile(r"(?P<cure>.+?) (?P<strength>\d[\d.e+-]*)(?P<how>, .+)?")


def cures(variants: Sequence[str]) -> dict[str, dict[str, str]]:
    """For every cure its strengths, from none up, each with its variant's name."""
    found: dict[str, dict[str, str]] = {}
    for variant in variants:
        match = WITH_STRENGTH.fullmatch(variant)
        if match is None:
            found[variant] = {"–": variant}
            continue
        name, without, _ = CURES.get(match["cure"], (match["cure"], "", ""))
        start = {"0": without} if without in variants else {}
        found.setdefault(name, start)[match["strength"] + (match["how"] or "")] = variant
    return found


class CureExplorer(Explorer):
    """Choose a cure, its strength and a layer: the recorded load per expert evolves, and how that run ended.

    Args:
        results: of the experiment "balance".
    """

    def __init__(self, results: Results) -> None:
        self.results, self.cures = results, cures(results.variants)
        wide = {"style": {"description_width": "6em"}, "layout": {"width": "32em"}}
        first = next(iter(self.cures))
        cure = widgets.Dropdown(options=list(self.cures), value=first, description="cure", **wide)
        options = list(self.cures[first].items())
        strength = widgets.SelectionSlider(options=options, description="strength", continuous_update=False, **wide)
        n_layers = len(results.runs[0]["layers"])
        layer = widgets.IntSlider(n_layers, 1, n_layers, description="layer", continuous_update=False, **wide)
        self._choosing = False
        cure.observe(self._offer_strengths, names="value")  # before Explorer observes it: it draws what was offered
        super().__init__({"cure": cure, "strength": strength, "layer": layer})

    def _offer_strengths(self, change: Mapping) -> None:
        """The strengths of the cure that was chosen; the one that was set, if it is among them."""
        slider = self.sliders["strength"]
        label, offered = slider.label, self.cures[change["new"]]
        self._choosing = True
        slider.options = list(offered.items())
        slider.value = offered.get(label, next(iter(offered.values())))
        self._choosing = False

    def _redraw(self, change: object = None) -> None:
        if not self._choosing:
            super()._redraw(change)

    def draw(self, cure: str, strength: str, layer: int) -> Picture:
        """The load of the first seed over its steps, and how it ended; beside that, where all seeds did."""
        runs = self.results.of(strength)
        run, facts = runs[0], end_of(runs, layer - 1)
        label = next(label for label, variant in self.cures[cure].items() if variant == strength)
        symbol = next((symbol for name, _, symbol in CURES.values() if name == cure), None)
        named = f"{cure}, {symbol} {label}" if symbol else cure
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(9.4, 3.9))  # with places of its own: looking for room takes longer than drawing
            axes = figure.add_axes((0.06, 0.14, 0.48, 0.77))
            mesh = _plot_load(axes, run, layer - 1)
            _write_scale(figure, mesh, _doublings(run), cax=figure.add_axes((0.555, 0.14, 0.015, 0.77)))
            axes.set_title(f"{named}; MoE layer {layer}")
            _write_facts(figure, facts, run["seed"], len(runs))
            told = "; ".join(f"{fact.name} {fact.value}" for fact in facts)
            return Picture(figure, f"Load per expert over the steps, {named}, MoE layer {layer}. At the end: {told}.")


@dataclass(frozen=True)
class Fact:
    """A measure of the end of a run: its name, the value, and from where to where the seeds reach."""

    name: str
    value: str
    spread: str


def end_of(runs: Sequence[Mapping], layer: int) -> list[Fact]:
    """How the first of a variant's runs ended, and between what values all of them did."""
    layers = [run["layers"][layer] for run in runs]
    loads = [load_over_steps(run, layer)[1] for run in runs]
    n_summed = runs[0]["curve"][0]["step"]
    measured = [
        (f"MaxVio, last {n_summed} steps summed", [load[:, -1].max() - 1 for load in loads], "{:.2f}", ""),
        ("MaxVio, held-out text", [found["max_violation"] for found in layers], "{:.2f}", ""),
        ("dead experts, held-out text", [found["dead"] for found in layers], "{:.0f}", f" of {len(loads[0])}"),
        ("bits per byte, held-out text", [run["mean"] for run in runs], "{:.3f}", ""),
    ]
    if "information" in layers[0]:  # a token that experts choose has no set of k choices
        measured.append(("I(domain; expert | byte)", [found["information"] for found in layers], "{:.3f}", " bits"))
    return [
        Fact(name, number.format(values[0]) + unit, f"{number.format(min(values))} to {number.format(max(values))}")
        for name, values, number, unit in measured
    ]


def _write_facts(figure: Figure, facts: Sequence[Fact], seed: int, n_seeds: int) -> None:
    left, top, pitch = 0.7, 0.93, 0.155
    figure.text(left, top, f"Seed {seed} at its end" + (f" (all {n_seeds} seeds)" if n_seeds > 1 else ""))
    for row, fact in enumerate(facts):
        y = top - 0.1 - row * pitch
        figure.text(left, y, fact.name, fontsize=9.5, color="#555555")
        figure.text(left, y - 0.065, fact.value, fontsize=12, fontweight="bold")
        if n_seeds > 1:
            figure.text(left + 0.13, y - 0.065, f"({fact.spread})", fontsize=10)
