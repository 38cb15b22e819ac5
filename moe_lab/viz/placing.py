"""Drawings of experts on ranks: what each rank has to compute under a placement, and what travels between ranks."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from moe_lab.parallel.placement import Placement, rank_loads
from moe_lab.viz.dispatching import PALE, expert_colour
from moe_lab.viz.picture import GREY, INK, STYLE, Picture, new_axes

SMALLEST_NAMED_PART = 0.055  # of the axis' height: a thinner part's expert is named above the bar
LIGHT_BLUES = LinearSegmentedColormap.from_list("light blues", ["white", "#BFDDF0", "#7FB8DE"])  # dark ink on all
MOST_NUMBERED_RANKS = 16
STAYS_GREY = "#EFEFEF"
REPLICA, STAYS = "////", "...."  # hatches: what is told by a colour is told by these too

# --- load of ranks ------------------------------------------------------------------------------------------------


def parts_of_ranks(placement: Placement, tokens_per_expert: Tensor) -> list[list[tuple[int, float]]]:
    """For each rank the experts on it, each with the rows that this replica computes; the largest part first."""
    counts, replicas = tokens_per_expert.tolist(), placement.replicas.tolist()
    ranks = [[(expert, counts[expert] / replicas[expert]) for expert in held] for held in placement.experts]
    return [sorted(parts, key=lambda part: -part[1]) for parts in ranks]


def draw_rank_loads(
    placements: Mapping[str, Placement], tokens_per_expert: Tensor, *, title: str, alt: str, unit: str = "rows"
) -> Picture:
    """The load of every rank, stacked by expert, under several placements side by side; the mean is a line.

    Experts whose part is too thin for a number, or nothing at all, are named above the bar: "+ 5, 7".

    Args:
        placements: by the name that stands above each.
        tokens_per_expert: (E,), of one layer.
        unit: of the loads, for the axis.

    Raises:
        ValueError: counts of another number of experts than a placement's; no placement, or counts that are all zero.
    """
    if not placements or not tokens_per_expert.sum() > 0:
        raise ValueError(f"{len(placements)} placements of {tokens_per_expert.sum():g} rows: expected 1 or more each.")
    loads = {name: rank_loads(placement, tokens_per_expert) for name, placement in placements.items()}
    top = 1.12 * max(float(load.max()) for load in loads.values())
    with mpl.rc_context(STYLE):
        widths = [placement.n_ranks + 1.2 for placement in placements.values()]
        figure = Figure(figsize=(min(10.5, max(5.0, 0.62 * sum(widths) + 1.6)), 3.8), layout="constrained")
        all_axes = figure.subplots(1, len(placements), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, (name, placement) in zip(all_axes, placements.items(), strict=True):
            load = loads[name]
            for rank, parts in enumerate(parts_of_ranks(placement, tokens_per_expert)):
                _stack(axes, rank, parts, placement.replicas.tolist(), top)
            mean = float(load.mean())
            axes.set_title(f"{name}\nmost: {float(load.max()) / mean:.2f} × mean", fontsize=11)
            axes.axhline(mean, color=INK, linewidth=1.3, linestyle=(0, (4, 2)))
            axes.set_xticks(range(placement.n_ranks))
            axes.set(xlabel="rank", xlim=(-0.6, placement.n_ranks - 0.4), ylim=(0, top))
        beside = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "center", "fontsize": 9.5}
        all_axes[-1].annotate("mean", (1.01, mean), **beside)
        all_axes[0].set_ylabel(f"{unit} to compute")
        all_axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if any(placement.n_redundant for placement in placements.values()):
            mark = Patch(facecolor="white", edgecolor=INK, hatch=REPLICA, label="one of several replicas of its expert")
            figure.legend(handles=[mark], loc="outside lower center", fontsize=9.5)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        return Picture(figure, alt)


def _stack(axes: Axes, rank: int, parts: list[tuple[int, float]], replicas: list[int], top: float) -> None:
    base, thin = 0.0, []
    for expert, rows in parts:
        colour = expert_colour(expert)
        axes.bar(rank, rows, 0.8, base, color=(colour, PALE), edgecolor=colour, linewidth=1.2)
        if replicas[expert] > 1:
            axes.bar(rank, rows, 0.8, base, fill=False, edgecolor=(colour, 0.6), hatch=REPLICA, linewidth=0)
        if rows >= SMALLEST_NAMED_PART * top:
            place = {
                "facecolor": "white",
                "edgecolor": "none",
                "pad": 1.2,
            }  # readable on a hatch, or on the mean's line
            axes.text(rank, base + rows / 2, f"{expert}", ha="center", va="center", fontsize=9.5, bbox=place, zorder=4)
        else:
            thin.append(expert)
        base += rows
    if thin:
        named, place = "+ " + ", ".join(map(str, sorted(thin))), {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axes.text(rank, base + 0.018 * top, named, ha="center", va="bottom", fontsize=8.5, bbox=place, zorder=4)


# --- traffic ------------------------------------------------------------------------------------------------------


def draw_traffic(
    matrix: Tensor | Sequence[Sequence[float]],
    *,
    title: str,
    alt: str,
    unit: str = "rows",
    ranks_per_node: int | None = None,
) -> Picture:
    """What every rank sends to every other: a row a sender, a column a receiver. What stays on its rank is grey.

    Args:
        matrix: (ranks, ranks), the amount from each rank to each.
        unit: of the amounts.
        ranks_per_node: draws the boundaries between nodes.

    Raises:
        ValueError: a matrix that is not square, or nodes that do not cut it evenly.
    """
    amounts = np.asarray(matrix, dtype=float)
    n_ranks = len(amounts)
    if amounts.shape != (n_ranks, n_ranks) or n_ranks == 0:
        raise ValueError(f"matrix has shape {amounts.shape}: expected (ranks, ranks), from and to.")
    if ranks_per_node is not None and (ranks_per_node < 1 or n_ranks % ranks_per_node):
        raise ValueError(f"{n_ranks} ranks cannot be cut into nodes of ranks_per_node={ranks_per_node}.")
    travels = np.where(np.eye(n_ranks, dtype=bool), np.nan, amounts)
    most = float(np.nanmax(travels)) if n_ranks > 1 else 0.0
    with mpl.rc_context(STYLE):
        side = min(5.4, max(2.6, 0.62 * n_ranks))
        figure, axes = new_axes(side + 2.2, side + 1.1)
        image = axes.imshow(travels, cmap=LIGHT_BLUES, vmin=0, vmax=most or 1.0)
        look = {"facecolor": STAYS_GREY, "edgecolor": "#CFCFCF", "hatch": STAYS, "linewidth": 0}
        for rank in range(n_ranks):
            axes.add_patch(Rectangle((rank - 0.5, rank - 0.5), 1, 1, **look))
        if n_ranks <= MOST_NUMBERED_RANKS:
            size = 10 if n_ranks <= 8 else 7.5
            for (sender, receiver), amount in np.ndenumerate(amounts):
                ink = "#555555" if sender == receiver else INK
                place = {"facecolor": STAYS_GREY, "edgecolor": "none", "pad": 1.0} if sender == receiver else None
                axes.text(
                    receiver, sender, f"{amount:,.0f}", ha="center", va="center", size=size, color=ink, bbox=place
                )
        _draw_grid(axes, n_ranks, ranks_per_node)
        axes.set_xticks(range(n_ranks))
        axes.set_yticks(range(n_ranks))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.colorbar(
            image,
            ax=axes,
            label=f"{unit} sent",
            ticks=MaxNLocator(integer=True),
            format=lambda value, _: f"{value:,.0f}",
            shrink=0.85,
        )
        axes.set_title(title, pad=22 if ranks_per_node else 8)
        axes.set(xlabel="to rank", ylabel="from rank")
        mark = Patch(label="stays on its rank", **look)
        figure.legend(handles=[mark], loc="outside lower center", fontsize=9.5)
        return Picture(figure, alt)


def _draw_grid(axes: Axes, n_ranks: int, ranks_per_node: int | None) -> None:
    for edge in range(n_ranks + 1):
        between_nodes = ranks_per_node is not None and edge % ranks_per_node == 0
        look = {"color": INK, "linewidth": 2.2, "zorder": 3} if between_nodes else {"color": GREY, "linewidth": 0.5}
        axes.axhline(edge - 0.5, **look, clip_on=False)
        axes.axvline(edge - 0.5, **look, clip_on=False)
    if ranks_per_node is not None:
        for node in range(n_ranks // ranks_per_node):
            middle = (node + 0.5) * ranks_per_node - 0.5
            axes.text(middle, -0.62, f"node {node}", ha="center", va="bottom", fontsize=9.5)
            axes.text(n_ranks - 0.4, middle, f"node {node}", ha="left", va="center", rotation=270, fontsize=9.5)
