"""The figure of `moe-lab bench`."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_lab.viz.charts import DASHES, MARKERS
from moe_lab.viz.picture import INK, SERIES, STYLE, Picture


def draw_bench(results: Mapping) -> Picture:
    """Time against the number of experts, for an even and a skewed load: every variant over the "auto" at E 8."""
    records = results["records"]
    first = records[0]["shape"]
    fixed = {name: value for name, value in first.items() if name != "n_experts"}
    sweep = [r for r in records if {k: v for k, v in r["shape"].items() if k != "n_experts"} == fixed]
    loads = list(dict.fromkeys(record["load"] for record in sweep))
    names = list(dict.fromkeys(name for record in sweep for name in record["seconds"] if name != "auto"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        panels = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
        for axes, load in zip(panels, loads, strict=True):
            _draw_load(axes, names, [record for record in sweep if record["load"] == load])
            axes.set(title=f"{load} load", xlabel="experts E")
        panels[0].set_ylabel("time, forward and backward\n(1 = auto at the fewest experts)")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
        sizes = f"T {first['n_tokens']}, D {first['d_model']}, F {first['d_ff']}, k {first['top_k']}"
        return Picture(
            figure,
            f"Two panels, an even and a skewed load, with the time of every dispatch variant against the number of "
            f"experts at {sizes}. Loops grow fastest; the grouped product grows least under both loads; padding keeps "
            "up with it only while the load is even.",
        )


def _draw_load(axes: Axes, names: Sequence[str], records: Sequence[Mapping]) -> None:
    records = sorted(records, key=lambda record: record["shape"]["n_experts"])
    unit = records[0]["seconds"]["auto"]["median"]
    for i, name in enumerate(names):
        timed = [record for record in records if name in record["seconds"]]
        xs = [record["shape"]["n_experts"] for record in timed]
        medians, lows, highs = (
            [record["seconds"][name][key] / unit for record in timed] for key in ("median", "low", "high")
        )
        colour = SERIES[i % len(SERIES)] if i < len(SERIES) else INK
        axes.plot(
            xs, medians, color=colour, linestyle=DASHES[i % len(DASHES)], marker=MARKERS[i % len(MARKERS)], label=name
        )
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.15, linewidth=0)
    ticks = [record["shape"]["n_experts"] for record in records]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.25)
