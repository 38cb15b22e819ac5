"""Drawings of what models hold, read and compute, and a calculator; every number is counted from a configuration."""

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from moe_lab.accounting import (
    BYTES,
    Parameters,
    bytes_of,
    cache_bytes,
    count_parameters,
    decode_reads,
    distinct_experts,
    ffn_matrices,
    weight_bytes,
)
from moe_lab.config import LMConfig, MoEConfig, SwitchConfig
from moe_lab.presets import PRESETS, find_preset
from moe_lab.roofline import GPUS, Gpu, Work, decode, prefill
from moe_lab.viz.explorer import Explorer, readable
from moe_lab.viz.picture import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PART_COLOURS,
    PURPLE,
    SERIES,
    SKY,
    VERMILLION,
    Picture,
    new_axes,
    styled,
    three_digits,
)

DARK_GREY = "#555555"
BATCHES = tuple(2**power for power in range(13))  # 1 to 4,096
CURVE = sorted({round(2 ** (quarter / 4)) for quarter in range(49)})  # the same, closer
NEARLY_ALL = 0.99
SMALLEST_NUMBERED = 4  # per cent

# What the bars are cut into. A model can have both kinds of FFN, so the dense one is not the experts' orange here.
GROUPS = {
    "embedding and head": (("embedding", "conv", "head"), PURPLE),
    "attention": (("attention",), PART_COLOURS["attention"]),
    "dense FFN": (("ffn",), VERMILLION),
    "routed experts": (("experts",), PART_COLOURS["experts"]),
    "shared experts": (("shared_experts",), PART_COLOURS["shared_experts"]),
    "router and norms": (("router", "norms"), PART_COLOURS["norms"]),
}
Model = str | LMConfig


def _named(model: Model) -> tuple[str, LMConfig]:
    """A decoder-only model's name and sizes."""
    if isinstance(model, LMConfig):
        return "this model", model
    preset = find_preset(model)
    if isinstance(preset.config, SwitchConfig):
        raise ValueError(f"model={model!r}: expected a decoder-only model, not an encoder-decoder.")
    return preset.name, preset.config


def _experts_of(model: Model) -> tuple[str, LMConfig, MoEConfig]:
    name, config = _named(model)
    if config.moe is None:
        raise ValueError(f"model={model!r}: expected a model with experts.")
    return name, config, config.moe


def _gigabytes(size: float) -> str:
    return f"{three_digits(size / 1e9)} GB"


def _per_cent(share: float) -> str:
    return f"{100 * share:.3g} %"


# --- What models hold ---------------------------------------------------------------------------------------------


def sizes(names: Iterable[str] | None = None) -> dict[str, tuple[int, int]]:
    """Total and active parameters, embedding included, by name; models of one configuration share an entry."""
    by_config: dict[LMConfig | SwitchConfig, list[str]] = {}
    for name in PRESETS if names is None else names:
        preset = find_preset(name)
        by_config.setdefault(preset.config, []).append(preset.name)
    return {
        ", ".join(names): (count_parameters(config).total, count_parameters(config, active=True).total)
        for config, names in by_config.items()
    }


@styled
def draw_active_against_total(
    names: Iterable[str] | None = None, *, shares: Sequence[float] = (1, 0.1, 0.03)
) -> Picture:
    """Active against total parameters of all presets, or of some, with lines of equal share; both logarithmic."""
    found = sizes(names)
    figure, axes = new_axes(9.0, 5.9)
    totals, actives = zip(*found.values(), strict=True)
    x_limits, y_limits = (min(totals) / 1.6, max(totals) * 2.4), (min(actives) / 1.9, max(actives) * 1.8)
    axes.set(xscale="log", yscale="log", xlim=x_limits, ylim=y_limits)
    for share in shares:
        ends = (max(x_limits[0], y_limits[0] / share), min(x_limits[1], y_limits[1] / share))
        axes.plot(ends, [share * x for x in ends], color=DARK_GREY, linewidth=1.3, linestyle="--", zorder=1)
        is_right = ends[1] == x_limits[1]
        axes.annotate(
            "all active" if share == 1 else f"{100 * share:g} % active",
            (ends[1], share * ends[1]),
            xytext=(5, 0) if is_right else (0, 4),
            textcoords="offset points",
            ha="left" if is_right else "center",
            va="center" if is_right else "bottom",
            color=DARK_GREY,
            fontsize=10,
            annotation_clip=False,
        )
    kinds = {name: _kind(name) for name in found}
    looks = {"dense": ("o", "white", INK), "decoder": ("o", BLUE, BLUE), "encoder-decoder": ("s", ORANGE, INK)}
    told = {
        "dense": "dense",
        "decoder": "with experts, decoder",
        "encoder-decoder": "with experts, encoder-decoder",
    }
    for kind, (marker, fill, edge) in looks.items():
        points = [pair for name, pair in found.items() if kinds[name] == kind]
        if points:
            look = {"markerfacecolor": fill, "markeredgecolor": edge, "markersize": 7.5, "markeredgewidth": 1.6}
            axes.plot(*zip(*points, strict=True), marker, **look, label=told[kind], zorder=3)
    axes.legend(loc="upper left", fontsize=10)
    for axis, limits in ((axes.xaxis, x_limits), (axes.yaxis, y_limits)):
        powers = range(math.ceil(math.log10(limits[0])), math.floor(math.log10(limits[1])) + 1)
        axis.set_ticks([10.0**power for power in powers], [readable(10.0**power) for power in powers])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.set_xlabel("total parameters")
    axes.set_ylabel("active parameters of a token, embedding included")
    shares_of = {name: active / total for name, (total, active) in found.items()}
    least, most = min(shares_of, key=shares_of.get), max(found, key=found.get)
    n_models = sum(len(name.split(", ")) for name in found)
    axes.set_title(f"{n_models} models: what a token uses of what there is")
    place_labels(figure, axes, {_short(name, found): point for name, point in found.items()})
    listed = "; ".join(
        f"{name} {readable(active)} of {readable(total)}, {_per_cent(shares_of[name])}"
        for name, (total, active) in found.items()
        if active < total
    )
    return Picture(
        figure,
        f"{len(found)} points of {n_models} models on logarithmic axes, active against total parameters. Dense models "
        f"lie on the diagonal. The largest in total is {most}; the smallest share, {_per_cent(shares_of[least])}, is "
        f"that of {least}. With experts: {listed or 'none'}.",
    )


def _kind(name: str) -> str:
    config = PRESETS[name.split(", ")[0]].config
    is_switch = isinstance(config, SwitchConfig)
    if is_switch and config.n_experts:
        return "encoder-decoder"
    return "dense" if is_switch or config.moe is None else "decoder"


def _short(name: str, found: Mapping[str, object]) -> str:
    """A name without what the first of a family of sizes has said: Switch-Base-8, …-16, …-32; DeepSeek-V3, R1."""
    first, *others = name.split(", ")
    family = first.rpartition("-")[0]
    same = [other for other in found if family.startswith("Switch") and other.rpartition("-")[0] == family]
    shown = f"…-{first.rpartition('-')[2]}" if same and same[0] != first else first
    return ", ".join([shown, *(other.removeprefix(f"{family}-") for other in others)])


# Where a label may stand: points from its marker, and the side of the label that faces the marker. The nearest first.
SIDES = (
    ((1, 0), "left", "center"),
    ((0, 1), "center", "bottom"),
    ((0, -1), "center", "top"),
    ((-1, 0), "right", "center"),
    ((0.7, 0.7), "left", "bottom"),
    ((0.7, -0.7), "left", "top"),
    ((-0.7, 0.7), "right", "bottom"),
    ((-0.7, -0.7), "right", "top"),
)
DISTANCES = (7, 14, 22, 32, 44)


def place_labels(figure: Figure, axes: Axes, points: Mapping[str, tuple[float, float]]) -> list[Annotation]:
    """Writes each point's name beside it, where neither a name nor a point stands yet; a far one gets a thin line."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is settled, so places on the page are known
    marker = 9 * figure.dpi / 72
    taken = [Bbox.from_bounds(*(axes.transData.transform(at) - marker / 2), marker, marker) for at in points.values()]
    if axes.get_legend():
        taken.append(axes.get_legend().get_window_extent())
    room, placed = axes.get_window_extent(), []
    for name, at in points.items():
        for distance, ((right, up), ha, va) in itertools.product(DISTANCES, SIDES):
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
            label = axes.annotate(
                name,
                at,
                xytext=(right * distance, up * distance),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=9,
                zorder=2,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
                arrowprops=line if distance > DISTANCES[1] else None,
            )
            box = label_box(label)
            if room.x0 <= box.x0 and box.x1 <= room.x1 and not any(box.overlaps(other) for other in taken):
                break
            if (distance, ((right, up), ha, va)) != (DISTANCES[-1], SIDES[-1]):  # a crowded label is better than none
                label.remove()
        taken.append(box)
        placed.append(label)
    return placed


def label_box(label: Annotation) -> Bbox:
    """Where on the page the words stand, without the line to their point."""
    label.get_window_extent()  # puts it in its place
    return Text.get_window_extent(label)


def part_shares(parameters: Parameters) -> dict[str, float]:
    """Per cent of the parameters in each group of parts."""
    return {
        group: 100 * sum(getattr(parameters, part) for part in parts) / parameters.total
        for group, (parts, _) in GROUPS.items()
    }


def _part_bars(figure: Figure, axes: Axes, rows: Mapping[float, Parameters], legend: str) -> None:
    """A bar at each height, cut into groups of parts."""
    drawn = {}
    for y, parameters in rows.items():
        left = 0.0
        for group, share in part_shares(parameters).items():
            colour = GROUPS[group][1]
            if share:
                bar = axes.barh(y, share, left=left, color=colour, edgecolor="white", height=0.84)
                drawn.setdefault(group, bar)
            if share >= SMALLEST_NUMBERED:
                ink = "white" if colour in (BLUE, VERMILLION, GREEN) else INK
                axes.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", color=ink)
            left += share
    axes.set(xlabel="share (%)", xlim=(0, 100))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    names = [group for group in GROUPS if group in drawn]
    figure.legend([drawn[name] for name in names], names, loc=legend, ncols=len(names), fontsize=9)


SHOWN_PARTS = ("Llama 3 70B", "Mixtral 8x7B", "Qwen3-30B-A3B", "gpt-oss-120b", "DeepSeek-V3", "Kimi-K2")


@styled
def draw_where_parameters_sit(names: Sequence[str] = SHOWN_PARTS) -> Picture:
    """Of each model two bars, all parameters and the active ones, cut into parts; a dense model has one.

    The active count holds the whole embedding table.
    """
    rows, ticks, heads, y = {}, {}, {}, 0.0
    for preset in map(find_preset, names):
        total, active = (count_parameters(preset.config, active) for active in (False, True))
        heads[preset.name] = y
        both = {"total": total, "active": active} if total != active else {"all active": total}
        for kind, parameters in both.items():
            y += 1
            rows[y] = parameters
            ticks[y] = f"{kind} {readable(parameters.total)}"
        y += 1.15
    figure, axes = new_axes(9.0, 1.0 + 0.27 * y)
    _part_bars(figure, axes, rows, "outside lower center")
    for name, top in heads.items():
        axes.text(0, top + 0.16, name, va="center", fontweight="bold")
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(y - 0.5, -0.4)
    axes.set_title("Where the parameters sit, of all and of the active ones")
    told = []
    for y, parameters in rows.items():
        name = max((name for name, top in heads.items() if top < y), key=heads.get)
        parts = ", ".join(f"{group} {share:.1f} %" for group, share in part_shares(parameters).items() if share)
        told.append(f"{name}, {ticks[y]}: {parts}")
    return Picture(figure, f"{len(rows)} stacked bars of {len(heads)} models. {'; '.join(told)}.")


# --- What decoding reads ------------------------------------------------------------------------------------------


def dense_twin(config: LMConfig) -> LMConfig:
    """A dense model of the same width, depth and vocabulary, with as many parameters as are active in `config`.

    Embedding left out, and to the nearest FFN width that 128 divides. In place of latent attention it has heads of 128
    in groups with 8 key-value heads, as other large models have.
    """
    n_heads, n_kv_heads, d_head = config.n_heads, config.n_kv_heads, config.d_head
    if config.mla:
        d_head = 128
        n_heads = max(1, config.d_model // d_head)
        n_kv_heads = math.gcd(8, n_heads)
    twin = LMConfig(
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_ff=128,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tied_embeddings,
    )
    missing = count_parameters(config, active=True).without_embedding - count_parameters(twin).without_embedding
    steps = round(missing / (ffn_matrices(twin) * twin.d_model * twin.n_layers * 128))
    return twin.but(d_ff=128 * max(1, 1 + steps), d_head=d_head, n_kv_heads=n_kv_heads)


def _twin_name(config: LMConfig) -> str:
    return f"dense, {readable(float(f'{count_parameters(config).without_embedding:.2g}')).replace(' ', '')}"


def batch_that_touches(moe: MoEConfig, share: float = NEARLY_ALL) -> int:
    """The smallest batch that touches this share of a layer's experts, on average."""
    wanted = share * moe.n_experts
    return next(b for b in itertools.count(1) if distinct_experts(moe.n_experts, moe.top_k, b) >= wanted)


@styled
def draw_decode_reads(model: Model = "DeepSeek-V3", *, number: str = "fp8", mark: int = 32) -> Picture:
    """Bytes of weights that a decode step reads against its batch, beside a dense model of equal active size.

    To the left of a step, to the right of each of its tokens. `mark` is a batch whose numbers are told.

    Raises:
        ValueError: a model without experts, or an unknown format.
    """
    name, config, moe = _experts_of(model)
    twin = dense_twin(config)
    nearly = batch_that_touches(moe)
    batches = sorted({*CURVE, mark, nearly})
    reads = {
        label: [decode_reads(each, batch) * bytes_of(number) / 1e9 for batch in batches]
        for label, each in {name: config, _twin_name(twin): twin}.items()
    }
    dense = reads[_twin_name(twin)]
    ratios = {batch: read / dense[0] for batch, read in zip(batches, reads[name], strict=True)}
    figure = Figure(figsize=(9.0, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, is_per_token in zip(panels, (False, True), strict=True):
        axes.set(xscale="log", yscale="log")
        for (label, line), colour, dash in zip(reads.items(), (BLUE, VERMILLION), ("-", "--"), strict=True):
            drawn = [size / (batch if is_per_token else 1) for size, batch in zip(line, batches, strict=True)]
            axes.plot(batches, drawn, color=colour, linestyle=dash, label=label)
            for batch in (mark, nearly):
                size, is_marked = drawn[batches.index(batch)], batch == mark and not is_per_token
                axes.plot(batch, size, "o", color=colour, markersize=6)
                if is_per_token or label == name or batch == mark:  # a flat line says its number once
                    _number_beside(axes, batch, size, is_above=label == name, is_left=label != name or is_marked)
        for batch in (mark, nearly):
            axes.axvline(batch, color=DARK_GREY, linewidth=1, linestyle=":", zorder=1)
        if not is_per_token:
            axes.set_ylim(10 ** math.floor(math.log10(dense[0])), 2 * max(reads[name]))
        _plain_ticks(axes)
        ticks = [4**power for power in range(7)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.set_xlabel("batch: sequences, a token each")
        axes.set_ylabel(f"weights read{', per token' if is_per_token else ' by a step'} (GB, {number})")
        axes.set_title("per token" if is_per_token else "per step", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    title = f"Dotted: a batch of {mark}, with {ratios[mark]:.3g} times the bytes of the dense model, "
    title += f"and of {nearly}, with {_per_cent(NEARLY_ALL)} of the experts"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    ends = (1, mark, nearly, batches[-1])
    told = "; ".join(
        f"at {batch:,} {three_digits(reads[name][batches.index(batch)])}, {ratios[batch]:.3g} times as much"
        for batch in ends
    )
    return Picture(
        figure,
        f"Gigabytes of {number} weights that a decode step reads, against the batch, both logarithmic. The dense model "
        f"reads {three_digits(dense[0])} at every batch, {name} more and more until all experts are touched: {told}. "
        f"To the right the same per token. A batch of {nearly} touches {_per_cent(NEARLY_ALL)} of the experts.",
    )


def _number_beside(axes: Axes, x: float, y: float, *, is_above: bool, is_left: bool) -> None:
    axes.annotate(
        three_digits(y),
        (x, y),
        xytext=(-5 if is_left else 5, 6 if is_above else -6),
        textcoords="offset points",
        ha="right" if is_left else "left",
        va="bottom" if is_above else "top",
        fontsize=9.5,
    )


def _plain_ticks(axes: Axes) -> None:
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    ticks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    axes.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])


def simulated_touched(n_experts: int, top_k: int, batch: int, times: int = 32) -> float:
    """How many experts a batch touched on average, each of its tokens choosing blindly; seeded."""
    rng = np.random.default_rng((n_experts, top_k, batch))
    found = 0
    for _ in range(times):
        chosen = rng.random((batch, n_experts)).argsort(axis=1)[:, :top_k]
        found += len(np.unique(chosen))
    return found / times


SHOWN_EXPERTS = ("Mixtral 8x7B", "OLMoE-1B-7B", "Qwen3-30B-A3B", "DeepSeek-V3", "Kimi-K2", "Llama 4 Maverick")
SIMULATED = (1, 4, 16, 64, 256)


@styled
def draw_experts_touched(names: Sequence[str] = SHOWN_EXPERTS) -> Picture:
    """The share of a layer's experts that a batch touches: the formula's curve, and points of a simulated choice."""
    figure, axes = new_axes(9.0, 4.6)
    told = []
    for i, name in enumerate(names):
        shown, _, moe = _experts_of(name)
        n_experts, top_k = moe.n_experts, moe.top_k
        curve = [100 * distinct_experts(n_experts, top_k, batch) / n_experts for batch in CURVE]
        points = [100 * simulated_touched(n_experts, top_k, batch) / n_experts for batch in SIMULATED]
        colour = SERIES[i % len(SERIES)]
        axes.plot(CURVE, curve, color=colour, linewidth=1.8)
        axes.plot(SIMULATED, points, "os^DvP"[i % 6], color=colour, markersize=7, markeredgecolor="white")
        axes.plot([], [], "os^DvP"[i % 6] + "-", color=colour, label=f"{top_k} of {n_experts}: {shown}")
        at_32 = 100 * distinct_experts(n_experts, top_k, 32) / n_experts
        told.append(f"{shown}, {top_k} of {n_experts}, {at_32:.0f} % at 32, 99 % at {batch_that_touches(moe):,}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCHES, [f"{batch:,}" for batch in BATCHES])
    axes.minorticks_off()
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=10)
    axes.set_xlabel("batch: tokens that choose")
    axes.set_ylabel("experts of a layer that are touched (%)")
    axes.set_title("Curves: 1 − (1 − k / E)ᴮ; points: tokens that choose blindly, simulated")
    return Picture(
        figure,
        f"Curves of the share of a layer's experts that a batch touches, which rise to 100 %, and points of a "
        f"simulated choice on them. {'; '.join(told)}.",
    )


# --- Rooflines ----------------------------------------------------------------------------------------------------


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise ValueError(f"gpu={name!r}: expected one of {', '.join(GPUS)}.")
    return GPUS[name]


def works(
    model: Model, number: str, context: int, prompts: Sequence[int], batches: Sequence[int]
) -> dict[str, dict[int, Work]]:
    """Reading one prompt of each length, a decode step at each batch, and the same of the dense twin."""
    name, config, _ = _experts_of(model)
    twin = dense_twin(config)
    return {
        f"{name}, prefill:\ntokens of a prompt": {n: prefill(config, n, number=number) for n in prompts},
        f"{name}, decode:\nsequences": {n: decode(config, n, context, number) for n in batches},
        f"{_twin_name(twin)}, decode:\nsequences": {n: decode(twin, n, context, number) for n in batches},
    }


def _number_lane(axes: Axes, y: float, places: Mapping[int, float], factor: float) -> None:
    """A number above each place; those nearer to each other than a factor share a label, in their order."""
    groups: list[dict[int, float]] = []
    for number, x in sorted(places.items(), key=lambda place: place[1]):
        if groups and x < factor * max(groups[-1].values()):
            groups[-1][number] = x
        else:
            groups.append({number: x})
    for group in groups:
        middle = math.sqrt(min(group.values()) * max(group.values()))
        shown = ", ".join(f"{number:,}" for number in group)
        axes.annotate(shown, (middle, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9.5)


@styled
def draw_rooflines(
    model: Model = "DeepSeek-V3",
    *,
    gpu: str = "H200",
    number: str = "bf16",
    context: int = 4096,
    prompts: Sequence[int] = (128, 512, 2048, 8192),
    batches: Sequence[int] = (1, 8, 32, 128, 512),
) -> Picture:
    """Prefill and decode of a model on one roofline, and decode of a dense model of equal active size.

    A point stands on the roof, where its operations per byte put it; nothing here was measured. Below, a line for each
    kind of work says which point is which. Shared over several GPUs, all do their part at these intensities at best.

    Raises:
        ValueError: a model without experts, a GPU that is not known, or a format that it does not multiply.
    """
    machine = _gpu(gpu)
    lanes = works(model, number, context, prompts, batches)
    rate, corner = machine.rate(number) / 1e12, machine.balance(number)
    at = [work.intensity for lane in lanes.values() for work in lane.values()]
    low, high = min(0.5, *(0.6 * x for x in at)), max(7 * corner, *(1.8 * x for x in at))

    def roof(x: float) -> float:
        return min(rate, x * machine.bytes_per_second / 1e12)

    figure = Figure(figsize=(9.0, 5.6), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.1, 1))
    axes.plot([low, corner, high], [roof(low), rate, rate], color=INK, zorder=2)
    for panel in (axes, below):
        panel.axvline(corner, color=DARK_GREY, linewidth=1, linestyle=":", zorder=1)
    told = []
    for row, (lane, points) in enumerate(lanes.items()):
        colour, marker = ((GREEN, "s"), (BLUE, "o"), (VERMILLION, "^"))[row]
        below.axhline(row, color=colour, linewidth=0.8, alpha=0.5)
        _number_lane(below, row, {n: work.intensity for n, work in points.items()}, (high / low) ** 0.045)
        for n, work in points.items():
            look = {"markerfacecolor": "white", "markeredgecolor": colour, "markersize": 9, "markeredgewidth": 2}
            axes.plot(work.intensity, work.reached(machine, number) / 1e12, marker, **look, zorder=3)
            below.plot(work.intensity, row, marker, color=colour, markersize=8)
            told.append(
                f"{lane.replace(chr(10), ' ')} {n:,}: {three_digits(work.intensity)} operations per byte, "
                f"{three_digits(work.reached(machine, number) / 1e12)} TFLOP/s"
            )
    axes.text(corner * 0.93, roof(low) * 1.3, f"{corner:.0f} operations\nper byte", ha="right", color=DARK_GREY)
    axes.text(corner * 1.12, rate / 1.35, f"computes: {rate:.4g} TFLOP/s", va="top")
    speed = machine.bytes_per_second / 1e12
    middle = math.sqrt(low * corner)
    axes.annotate(
        f"waits for memory: {speed:.3g} TB/s",
        (middle, roof(middle)),
        xytext=(-14, 4),
        textcoords="offset points",
        ha="right",
    )
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(roof(low), 1.9 * rate))
    _plain_ticks(axes)
    ticks = [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    below.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    below.minorticks_off()
    axes.set_ylabel("TFLOP/s at most")
    axes.set_title(f"Rates of an {gpu}, {number}; decode with {context:,} tokens of context, cache in bf16")
    below.set_yticks(range(len(lanes)), list(lanes), fontsize=9.5)
    for label, colour in zip(below.get_yticklabels(), (GREEN, BLUE, VERMILLION), strict=True):
        label.set_color(colour)
    below.tick_params(axis="y", length=0)
    below.spines["left"].set_visible(False)
    below.set_ylim(len(lanes) - 0.6, -0.75)
    below.set_xlabel("operations per byte")
    alt = (
        f"Roofline of one {gpu} with {number} numbers, both axes logarithmic: TFLOP/s rise with the operations per "
        f"byte until {corner:.0f}, from there on they stay at {rate:.4g}. Points on it, at most: {'; '.join(told)}. "
        "Nothing here was measured."
    )
    return Picture(figure, alt)


# --- Caches -------------------------------------------------------------------------------------------------------


def cache_variants(config: LMConfig) -> dict[str, LMConfig]:
    """A model with latent attention, and the same with keys and values of 8, 4, one and all of its heads.

    Heads are then as wide as the latent ones' part without RoPE: 128 in DeepSeek's models.

    Raises:
        ValueError: a model without latent attention.
    """
    if config.mla is None:
        raise ValueError("mla=None: expected a model with latent attention.")
    grouped = {"GQA-8": 8, "GQA-4": 4, "MQA": 1, "MHA": config.n_heads}
    return {"MLA": config} | {
        name: config.but(mla=None, n_kv_heads=heads, d_head=config.mla.d_nope) for name, heads in grouped.items()
    }


@styled
def draw_caches(
    context: int = 131_072,
    *,
    model: Model = "DeepSeek-V3",
    others: Sequence[str] = ("Llama 3.1 405B", "Qwen2.5-72B", "Llama 3 70B"),
) -> Picture:
    """Bytes of the KV cache per token: a model's latent attention, the same shape with other kinds, other models.

    Beside each bar a whole sequence of `context` tokens. A bar more than twice as long as the next is cut.
    """
    name, config = _named(model)
    kept = {
        f"{name}: {kind}" if kind == "MLA" else f"the same with {kind}": each
        for kind, each in cache_variants(config).items()
    }
    kept |= {_named(other)[0]: _named(other)[1] for other in others}
    whole = {label: cache_bytes(each, context) for label, each in kept.items()}
    kilobytes = {label: size / context / 1e3 for label, size in whole.items()}
    longest, second = sorted(kilobytes.values(), reverse=True)[:2]
    edge = 1.25 * second if longest > 2 * second else longest
    figure, axes = new_axes(9.0, 0.42 * len(kept) + 1.2)
    for y, (label, size) in enumerate(kilobytes.items()):
        colour = BLUE if y == 0 else SKY if label.startswith("the same") else GREY
        axes.barh(y, min(size, edge), color=colour, height=0.66)
        if size > edge:
            for shift in (0.05, 0.065):  # the sign of a cut bar
                axes.plot(
                    [edge * (0.94 - shift), edge * (0.95 - shift)], [y + 0.42, y - 0.42], color="white", linewidth=3
                )
        told = f"{three_digits(size)} KB, {_gigabytes(whole[label])}"
        axes.annotate(told, (min(size, edge), y), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(kept)), list(kept))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(kept) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * edge)
    axes.set_xticks(
        [tick for tick in axes.get_xticks() if tick <= min(edge, 1.05 * second if longest > edge else edge)]
    )
    axes.set_xlabel("KV cache per token, all layers (KB, bf16)")
    axes.set_title(f"Beside each bar: one sequence of {context:,} tokens")
    listed = "; ".join(
        f"{label} {three_digits(size)} KB, {_gigabytes(whole[label])}" for label, size in kilobytes.items()
    )
    smallest = min(kilobytes, key=kilobytes.get)
    return Picture(
        figure,
        f"Bars of the kilobytes of KV cache per token, and the gigabytes of a sequence of {context:,} tokens: "
        f"{listed}. The shortest bar is: {smallest}."
        + (f" The bar of {max(kilobytes, key=kilobytes.get)} is cut." if longest > edge else ""),
    )


# --- The calculator -----------------------------------------------------------------------------------------------


class ArithmeticExplorer(Explorer):
    """A model's sizes, and what they cost: parameters, GPUs that hold it, bytes of a decode step.

    A preset sets all sizes; what has no slider (attention, vocabulary, dense layers) stays that of the preset.
    """

    MODELS = tuple(name for name, preset in PRESETS.items() if isinstance(preset.config, LMConfig))
    CONTEXTS = tuple(2**power for power in range(9, 21))

    def __init__(self, preset: str = "DeepSeek-V3") -> None:
        preset, _ = _named(preset)
        start = self.sizes_of(preset)
        wide = {"style": {"description_width": "9em"}, "layout": {"width": "29em"}, "continuous_update": False}

        def whole(name: str, description: str, low: int, high: int, step: int = 1) -> widgets.IntSlider:
            return widgets.IntSlider(start[name], low, high, step, description=description, **wide)

        choice = {key: wide[key] for key in ("style", "layout")}
        model = {
            "preset": widgets.Dropdown(options=self.MODELS, value=preset, description="start from", **choice),
            "n_experts": whole("n_experts", "experts (0: dense)", 0, 512),
            "top_k": whole("top_k", "top-k", 1, 32),
            "n_shared_experts": whole("n_shared_experts", "shared experts", 0, 8),
            "d_ff": whole("d_ff", "expert width", 64, 65_536, 64),
            "d_model": whole("d_model", "d_model", 512, 16_384, 64),
            "n_layers": whole("n_layers", "layers", 1, 128),
        }
        use = {
            "number": widgets.ToggleButtons(
                options=list(BYTES), value="fp8", description="weights", style={"button_width": "5em"}
            ),
            "batch": widgets.SelectionSlider(options=BATCHES, value=32, description="batch", **wide),
            "context": widgets.SelectionSlider(options=self.CONTEXTS, value=4096, description="context", **wide),
        }
        self._is_setting = False
        super().__init__(model | use)
        columns = [widgets.VBox([self.sliders[name] for name in part]) for part in (model, use)]
        self.view = widgets.VBox([widgets.HBox(columns), self.image, self.caption])

    @staticmethod
    def sizes_of(preset: str) -> dict[str, int]:
        """What the sliders of the model say for a preset; a dense one has no experts, and its FFN's width."""
        config = PRESETS[preset].config
        moe = config.moe
        experts = {"n_experts": 0, "top_k": 1, "n_shared_experts": 0, "d_ff": config.d_ff}
        if moe:
            experts = {name: getattr(moe, name) for name in experts}
        return experts | {"d_model": config.d_model, "n_layers": config.n_layers}

    @staticmethod
    def config(
        preset: str, n_experts: int, top_k: int, n_shared_experts: int, d_ff: int, d_model: int, n_layers: int
    ) -> LMConfig:
        """The preset with these sizes. Groups of experts are left out: they change what is chosen, and no count.

        Raises:
            ValueError: sizes that make no model.
        """
        base = PRESETS[preset].config
        same = {"d_model": d_model, "n_layers": n_layers, "d_head": base.d_head}
        if n_experts == 0:
            return base.but(**same, moe=None, n_dense_layers=0, moe_every=1, d_ff=d_ff)
        experts = {
            "d_model": d_model,
            "d_ff": d_ff,
            "n_experts": n_experts,
            "top_k": top_k,
            "n_shared_experts": n_shared_experts,
        }
        moe = base.moe.but(**experts, n_groups=1, groups_kept=1) if base.moe else MoEConfig(**experts)
        return base.but(**same, moe=moe, n_dense_layers=min(base.n_dense_layers, n_layers - 1))

    def _redraw(self, change: Mapping | None = None) -> None:
        if self._is_setting:
            return
        if change and change["owner"] is self.sliders["preset"]:
            self._is_setting = True  # six sliders move: drawn once, when all are there
            try:
                for name, value in self.sizes_of(change["new"]).items():
                    self.sliders[name].value = value
            finally:
                self._is_setting = False
        super()._redraw()

    @styled
    def draw(self, preset: str, number: str, batch: int, context: int, **sizes: int) -> Picture:
        """Parameters by part, the GPUs that hold the weights and the cache, and what a decode step reads."""
        try:
            config = self.config(preset, **sizes)
        except ValueError as error:
            return _sentence(f"These sizes make no model: {error}")
        name = preset if sizes == self.sizes_of(preset) else f"{preset} with other sizes"
        total, active = (count_parameters(config, is_active) for is_active in (False, True))
        weights, cache = weight_bytes(config, number), batch * cache_bytes(config, context)
        read = decode_reads(config, batch) * bytes_of(number)
        figure = Figure(figsize=(9.0, 5.0), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.7))
        parts, left, right = (figure.add_subplot(place) for place in (grid[0, :], grid[1, 0], grid[1, 1]))
        _part_bars(figure, parts, {0: total, 1: active}, "outside lower center")
        counts = (f"total {readable(total.total)}", f"active {readable(active.total)}")
        parts.set_yticks([0, 1], counts)
        parts.set_ylim(1.5, -0.5)
        parts.set_title(f"{name}: {_per_cent(active.total / total.total)} of the parameters are active")
        _gpu_bars(left, weights, cache)
        _byte_bars(right, {"held": (weights, cache), "read by\na step": (read, cache)})
        right.set_xlabel(f"GB, with a batch of {batch:,} and a context of {context:,}")
        touched = ""
        if config.n_moe_layers:
            share = distinct_experts(config.moe.n_experts, config.moe.top_k, batch) / config.moe.n_experts
            touched = f", {_per_cent(share)} of the experts,"
        holding = ", ".join(f"{n} {gpu}" for gpu, (_, n) in gpus_that_hold(weights, cache).items())
        return Picture(
            figure,
            f"{name}: {readable(total.total)} parameters, {readable(active.total)} active. In {number} the weights "
            f"take {_gigabytes(weights)}; the cache of {batch:,} sequences of {context:,} tokens takes "
            f"{_gigabytes(cache)} in bf16, {_gigabytes(cache / batch)} each. Both fit into {holding}. A decode step "
            f"reads {_gigabytes(read)} of weights{touched} and the cache: "
            f"{_gigabytes((read + cache) / batch)} a token.",
        )


def gpus_that_hold(weights: float, cache: float) -> dict[str, tuple[int, int]]:
    """How many GPUs of each kind have the memory for the weights alone, and with the cache."""
    return {
        name: tuple(math.ceil(size / gpu.memory) for size in (weights, weights + cache)) for name, gpu in GPUS.items()
    }


def _gpu_bars(axes: Axes, weights: float, cache: float) -> None:
    found = gpus_that_hold(weights, cache)
    for y, (alone, both) in enumerate(found.values()):
        axes.barh(y, alone, color=DARK_GREY, height=0.66)
        axes.barh(y, both - alone, left=alone, color=SKY, height=0.66)
        shown = f"{alone:,}" if alone == both else f"{alone:,}, with cache {both:,}"
        axes.annotate(shown, (both, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9.5)
    axes.set_yticks(range(len(found)), [f"{name}, {GPUS[name].memory / 1e9:.0f} GB" for name in found])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(0, 1.45 * max(both for _, both in found.values()))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("GPUs that hold it, at least")


def _byte_bars(axes: Axes, rows: Mapping[str, tuple[float, float]]) -> None:
    for y, (weights, cache) in enumerate(rows.values()):
        axes.barh(y, weights / 1e9, color=DARK_GREY, height=0.56, label="weights" if y == 0 else None)
        axes.barh(y, cache / 1e9, left=weights / 1e9, color=SKY, height=0.56, label="cache" if y == 0 else None)
        told = f"{_gigabytes(weights)} + {_gigabytes(cache)}"
        axes.text(0, y - 0.33, told, va="bottom", fontsize=9.5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9, borderaxespad=0)


def _sentence(text: str) -> Picture:
    """A sentence in place of a drawing."""
    figure, axes = new_axes(9.0, 1.1)
    axes.axis("off")
    axes.text(0, 0.5, textwrap.fill(text, 95), va="center", fontsize=11.5, color=INK)
    return Picture(figure, text)


def explore_arithmetic(preset: str = "DeepSeek-V3") -> ArithmeticExplorer:
    """The calculator: sliders for a model's sizes and its use, and what they cost. It starts at a preset."""
    return ArithmeticExplorer(preset)
