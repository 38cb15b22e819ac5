"""Pictures of balance: f beside P, the load of a run that was just done, its MaxVio over recorded bands, and sweeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from moe_lab.balance import max_violation
from moe_lab.experiments import Results
from moe_lab.viz.charts import DASHES, _level
from moe_lab.viz.experiments import name_places, plot_seeds, values_of
from moe_lab.viz.picture import BLUE, GREY, INK, ORANGE, SERIES, STYLE, VERMILLION, Picture, new_axes

# --- two kinds of share -------------------------------------------------------------------------------------------


def draw_shares(f: Tensor, mean_probabilities: Tensor, *, title: str, alt: str) -> Picture:
    """Of every expert its share of the choices beside its mean probability, and where both would be if even."""
    n_experts = len(f)
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(7.0, 3.0)
        parts = (("f, share of the choices", f, ORANGE, -0.2), ("P, mean probability", mean_probabilities, BLUE, 0.2))
        for name, values, colour, aside in parts:
            places = np.arange(n_experts) + aside
            drawn = axes.bar(places, values.tolist(), 0.38, color=colour, label=name)
            axes.bar_label(drawn, labels=[f"{value:.2f}" for value in values.tolist()], padding=2, fontsize=9.5)
        _level(axes, "even", 1 / n_experts)
        axes.set_xticks(range(n_experts))
        axes.margins(y=0.15)
        axes.set(title=title, xlabel="expert", ylabel="share")
        axes.legend()
        return Picture(figure, alt)


# --- a run that was just done, and recorded ones ------------------------------------------------------------------


def violations(run: Mapping, layer: int) -> tuple[list[int], list[float]]:
    """The steps at which stretches of a run end, and MaxVio of the load summed over each stretch."""
    loads = torch.tensor([point["load"][layer] for point in run["curve"]])
    return [point["step"] for point in run["curve"]], max_violation(loads).tolist()


def violation_band(
    results: Results,
    labels: Mapping[str, str],
    layer: int,
    *,
    title: str,
    alt: str,
    live: Mapping | None = None,
) -> Picture:
    """MaxVio over the steps: for every variant the recorded seeds as a band with their mean, and a run of now over it.

    Args:
        labels: the names in the legend, and the variants that they are.
        layer: which layer of experts, from 0.
        live: a record of `run_once`.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(8.4, 3.6)
        for i, (name, variant) in enumerate(labels.items()):
            curves = [violations(run, layer) for run in results.of(variant)]
            steps, values = curves[0][0], np.array([values for _, values in curves])
            axes.fill_between(steps, values.min(0), values.max(0), color=SERIES[i], alpha=0.22, linewidth=0)
            label = f"{name}, {len(values)} seeds"
            axes.plot(steps, values.mean(0), color=SERIES[i], linestyle=DASHES[i], label=label)
        if live is not None:
            axes.plot(*violations(live, layer), color=INK, linewidth=1.6, marker="o", markersize=4, label="your run")
        axes.set_ylim(bottom=0)
        axes.legend()
        axes.grid(alpha=0.25)
        axes.set(title=title, xlabel="step", ylabel="MaxVio (0 is even)")
        return Picture(figure, alt)


# --- sweeps -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One measure in a sweep's figure.

    Args:
        measure: "mean" for bits per byte, or with a `layer` (from 0) one of that layer's measures.
        y: the label of its axis.
        log: a logarithmic axis.
        shuffled: also draw `{measure}_shuffled`, in grey: what chance alone would give.
        level: a dotted line with a name.
    """

    measure: str
    y: str
    layer: int | None = None
    log: bool = False
    shuffled: bool = False
    level: tuple[str, float] | None = None


def sweep(
    results: Results,
    labels: Mapping[str, str],
    panels: Sequence[Panel],
    *,
    x: str,
    title: str,
    alt: str,
    live: Mapping | None = None,
) -> Picture:
    """Several measures of the same variants, one under the other: a dot for every seed, a line at their mean.

    Args:
        labels: what stands below the axis, and the name of the variant that it is.
        live: a record of `run_once`: the reader's own run, a star at the place of its variant.

    Raises:
        ValueError: a variant or a measure that was not recorded.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 0.9 + 1.75 * len(panels)), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            _plot_panel(axes, results, labels, panel, live)
        figure.align_ylabels()
        named = {name: mark for axes in all_axes for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        if named:
            figure.legend(named.values(), named, loc="outside lower center", ncols=len(named), fontsize=9.5)
        name_places(all_axes[-1], list(labels))
        all_axes[0].set_title(title)
        all_axes[-1].set_xlabel(x)
        return Picture(figure, alt)


def _plot_panel(axes: Axes, results: Results, labels: Mapping[str, str], panel: Panel, live: Mapping | None) -> None:
    drawn: list[float] = []
    for place, variant in enumerate(labels.values()):
        if panel.shuffled:
            chance = values_of(results, variant, f"{panel.measure}_shuffled", panel.layer)
            plot_seeds(axes, place, chance, GREY, "D", "with domains shuffled" if place == 0 else None)
        values = values_of(results, variant, panel.measure, panel.layer)
        plot_seeds(axes, place, values, BLUE, "o", "a recorded seed" if place == 0 else None)
        drawn += values
        if live is not None and live["variant"] == variant:
            value = live[panel.measure] if panel.layer is None else live["layers"][panel.layer][panel.measure]
            star = {"marker": "*", "markersize": 15, "markeredgecolor": "white", "linestyle": "none"}
            axes.plot([place + 0.33], [value], color=VERMILLION, label="your run", **star)  # beside the dots
    if panel.level:
        _level(axes, *panel.level)
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    elif panel.layer is not None and min(drawn) >= 0:  # measures of routing are read from zero, losses are not
        axes.set_ylim(bottom=0)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y", alpha=0.25)
    axes.set_ylabel(panel.y)
