"""Drawings of the cost model: where a step's time goes as ranks are added, what ranks send, and what saves bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moe_lab.parallel.cost import (
    DEEPSEEK_V3,
    H800_INFINIBAND,
    Cluster,
    Layout,
    Model,
    StepTime,
    Traffic,
    Travel,
    layer_time,
    row_bytes,
    strong_scaling,
    traffic,
    weak_scaling,
)
from moe_lab.viz.picture import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILLION,
    Picture,
    new_axes,
    three_digits,
)

# What a step's time is drawn as; `StepTime` tells the parts apart further.
PARTS = {
    "computing": (("compute",), BLUE),
    "dispatch": (("dispatch",), ORANGE),
    "combine": (("combine",), VERMILLION),
    "filling and draining the pipeline, gradients' all-reduce": (("tensor", "pipeline", "bubble", "gradients"), GREY),
}
TRAVELS = {
    "a row per rank, bf16": Travel(),
    "a row per node, at most 4 nodes": Travel(form="across_then_within", node_limit=4),
    "the same, dispatch in fp8": Travel(form="across_then_within", node_limit=4, dispatch="fp8"),
}
SAVINGS = {
    "a row per choice": Travel(form="per_assignment"),
    "a row per rank": Travel(),
    "a row per node": Travel(form="across_then_within"),
    "… at most 4 nodes": Travel(form="across_then_within", node_limit=4),
    "… dispatch in fp8": Travel(form="across_then_within", node_limit=4, dispatch="fp8"),
}
WAYS = {
    "dp": "DP: gradients, once a step",
    "tp": "TP: activations, in each layer",
    "ep": "EP: rows, in each MoE layer",
    "pp": "PP: activations, between stages",
}
WAY_COLOURS = {"dp": GREEN, "tp": PURPLE, "ep": ORANGE, "pp": SKY}


def shares(steps: Mapping[int, StepTime]) -> dict[str, list[float]]:
    """Per cent of each step's time, by the parts that are drawn."""
    return {
        name: [100 * sum(step.share(part) for part in parts) for step in steps.values()]
        for name, (parts, _) in PARTS.items()
    }


def draw_scaling(
    cluster: Cluster = H800_INFINIBAND,
    model: Model = DEEPSEEK_V3,
    *,
    ranks: Sequence[int] = tuple(2**i for i in range(7, 15)),
    pp: int = 16,
    tokens: int = 15_360 * 4096,
    tokens_per_rank: int = 30_720,
    overlap: bool = False,
    fullest: float = 1.0,
) -> Picture:
    """Where a training step's time goes, against ranks, for three ways of travelling: weak scaling, and strong scaling.

    The experts lie over as many ranks of a stage as there are, up to one expert each; then their copies multiply.
    The router's own groups are left out: what limits a token is the way of travelling.

    Args:
        pp: stages of the pipeline; DeepSeek-V3 (2024), section 3.2, has 16, and 2,048 ranks.
        tokens, tokens_per_rank: of a step in strong scaling, and per rank in weak scaling.
    """
    free = replace(model, moe=model.moe.but(n_groups=1, groups_kept=1, group_score="max"))
    layouts = [Layout(n_ranks=n, pp=pp, ep=min(n // pp, model.moe.n_experts)) for n in ranks]
    kinds = {"weak": (weak_scaling, tokens_per_rank), "strong": (strong_scaling, tokens)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.2), layout="constrained")
        rows = figure.subplots(2, len(TRAVELS), sharex=True, sharey=True)
        told = {kind: [] for kind in kinds}
        for panels, (kind, (scale, amount)) in zip(rows, kinds.items(), strict=True):
            for axes, travel in zip(panels, TRAVELS.values(), strict=True):
                steps = scale(cluster, free, layouts, amount, travel, overlap=overlap, fullest=fullest)
                told[kind].append(shares(steps))
                _draw_shares(axes, list(steps), told[kind][-1])
            what = f"{amount:,} tokens each" if kind == "weak" else f"{amount / 1e6:.0f} million tokens shared"
            panels[0].set_ylabel(f"{kind} scaling\n{what}\n\nshare of the step's time (%)")
        for axes, name in zip(rows[0], TRAVELS, strict=True):
            axes.set_title(name, fontsize=11)
        for axes in rows[1]:
            axes.set_xlabel("ranks (GPUs)")
        handles, labels = rows[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
        spread = f"experts over {layouts[0].ep} to {layouts[-1].ep} ranks"
        hidden = "exchanges hidden where they fit" if overlap else "nothing hidden behind computing"
        figure.suptitle(f"{model.name} on {cluster.name}, modelled: {spread}, {hidden}", x=0.01, ha="left", fontsize=12)
        return Picture(figure, _scaling_alt(f"{model.name} on {cluster.name}", ranks, told))


def _scaling_alt(where: str, ranks: Sequence[int], told: Mapping[str, list[dict[str, list[float]]]]) -> str:
    """What the six panels show, with the shares at their ends."""
    said = []
    for kind, columns in told.items():
        for name, drawn in zip(TRAVELS, columns, strict=True):
            ends = [(drawn["computing"][i], drawn["dispatch"][i] + drawn["combine"][i]) for i in (0, -1)]
            (first, sent_first), (last, sent_last) = ends
            said.append(
                f"{kind} scaling, {name}: computing {first:.0f} to {last:.0f} %, "
                f"dispatch and combine {sent_first:.0f} to {sent_last:.0f} %"
            )
    return (
        f"Six panels of stacked areas: where the time of a modelled training step goes, {where}, from {ranks[0]:,} to "
        f"{ranks[-1]:,} GPUs; the rest is pipeline and gradients. At the two ends, {'; '.join(said)}."
    )


def _draw_shares(axes: Axes, ranks: Sequence[int], drawn: Mapping[str, list[float]]) -> None:
    colours = [colour for _, colour in PARTS.values()]
    axes.stackplot(ranks, drawn.values(), labels=drawn, colors=colours, edgecolor="white", linewidth=0.6)
    ticks = ranks[::2]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set(ylim=(0, 100), xlim=(ranks[0], ranks[-1]))


def sent_by_way(cluster: Cluster, model: Model, n_ranks: int, tokens_per_rank: int) -> dict[str, Traffic]:
    """Bytes a rank sends in a step if the ranks share the model in one way alone; the same tokens in all."""
    layouts = {"dp": Layout(n_ranks=n_ranks)} | {
        way: Layout(n_ranks=n_ranks, **{way: n_ranks}) for way in ("tp", "ep", "pp")
    }
    return {way: traffic(cluster, model, layout, n_ranks * tokens_per_rank) for way, layout in layouts.items()}


def draw_ways(
    model: Model, cluster: Cluster = H800_INFINIBAND, *, n_ranks: int = 8, tokens_per_rank: int = 8192
) -> Picture:
    """Bytes that a rank sends in a training step, the model shared in four ways, each on its own."""
    names = {
        "dp": "data parallel (DP)\ncopies of all",
        "tp": "tensor parallel (TP)\ncut matrices",
        "ep": "expert parallel (EP)\nexperts spread, the rest copied",
        "pp": "pipeline parallel (PP)\nlayers in turn",
    }
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(width=8.2, height=3.6)
        seen, ways = {}, sent_by_way(cluster, model, n_ranks, tokens_per_rank)
        for way, sent in ways.items():
            left = 0.0
            for part in WAYS:
                gigabytes = getattr(sent, part) / 1e9
                if gigabytes:
                    drawn = axes.barh(
                        names[way], gigabytes, left=left, color=WAY_COLOURS[part], edgecolor="white", height=0.62
                    )
                    seen.setdefault(WAYS[part], drawn)
                left += gigabytes
            axes.annotate(
                three_digits(left), (left, names[way]), xytext=(4, 0), textcoords="offset points", va="center"
            )
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set(
            title=f"{model.name}, {n_ranks} ranks, {tokens_per_rank:,} tokens each",
            xlabel="sent by a rank in one training step (GB, bf16)",
        )
        figure.legend(seen.values(), seen, loc="outside lower center", ncols=2, fontsize=9)
        return Picture(
            figure,
            f"Four bars: gigabytes that each of {n_ranks} ranks sends in a training step of {model.name}. "
            + "; ".join(
                f"{' '.join(names[way].split())}: {three_digits(sent.total / 1e9)}" for way, sent in ways.items()
            )
            + ". What expert parallelism sends is cut into its rows and the gradients of all that is copied.",
        )


def exchanged(
    cluster: Cluster, model: Model, n_ranks: int, travels: Mapping[str, Travel] = SAVINGS
) -> dict[str, tuple[float, float]]:
    """For each way of travelling the bytes of a token and layer that cross nodes: of a dispatch, and of a combine."""
    moe = model.moe.but(n_groups=1, groups_kept=1, group_score="max")
    across = {name: travel.copies(cluster, moe, n_ranks).across for name, travel in travels.items()}
    return {
        name: (
            across[name] * row_bytes(moe.d_model, travel.dispatch),
            across[name] * row_bytes(moe.d_model, travel.combine),
        )
        for name, travel in travels.items()
    }


def draw_savings(
    cluster: Cluster = H800_INFINIBAND, model: Model = DEEPSEEK_V3, *, n_ranks: int = 64, tokens: int = 4096
) -> Picture:
    """What a token of one layer sends across nodes, forward, one saving after another; and how long that takes.

    The axis above is the time of `tokens` tokens a rank over the link across nodes, its latency left out; the dotted
    line is the time that the rank computes on them in one layer.
    """
    computing = layer_time(cluster, model.moe, n_ranks, tokens, other_flops=model.other_flops / model.n_moe_layers)
    milliseconds = tokens * 1e3 / cluster.across.bytes_per_second * 1e3  # of a kilobyte per token
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(width=8.2, height=3.9)
        sent = exchanged(cluster, model, n_ranks)
        for name, (dispatch, combine) in sent.items():
            there, back = dispatch / 1e3, combine / 1e3
            axes.barh(name, there, color=ORANGE, edgecolor="white", height=0.62)
            axes.barh(name, back, left=there, color=VERMILLION, edgecolor="white", height=0.62)
            axes.annotate(
                f"{there + back:.0f}", (there + back, name), xytext=(4, 0), textcoords="offset points", va="center"
            )
        line = computing.compute * 1e3 / milliseconds
        axes.axvline(line, color=INK, linewidth=1.2, linestyle=":")
        axes.annotate(
            f"computing:\n{computing.compute * 1e3:.1f} ms",
            (line, len(SAVINGS) - 0.6),
            xytext=(5, 0),
            textcoords="offset points",
            va="bottom",
            fontsize=9,
        )
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(xlabel="across nodes, per token and layer, forward (KB)")
        above = axes.secondary_xaxis("top", functions=(lambda x: x * milliseconds, lambda x: x / milliseconds))
        above.set_xlabel(f"time of {tokens:,} tokens (ms)")
        figure.suptitle(f"{model.name}, {n_ranks} GPUs: {cluster.name}", x=0.01, ha="left", fontsize=12)
        handles = [Patch(color=colour) for colour in (ORANGE, VERMILLION)]
        figure.legend(handles, ["dispatch", "combine"], loc="outside lower center", ncols=2, fontsize=9)
        return Picture(
            figure,
            f"Five bars: kilobytes that a token of {model.name} sends across nodes in one layer of {n_ranks} GPUs, cut "
            "into dispatch and combine. "
            + "; ".join(f"{name}: {(there + back) / 1e3:.0f}" for name, (there, back) in sent.items())
            + ". A dotted line marks the bytes that would take as long as the layer computes.",
        )
