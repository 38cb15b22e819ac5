"""Drawings of a GPU at work on ragged products: its memories, the roofline, tiles, their order, and machine code."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from moe_lab.gpu import floors
from moe_lab.ops.tiles import most_tiles, plan_tiles
from moe_lab.paths import results_dir
from moe_lab.viz.dispatching import PALE, expert_colour
from moe_lab.viz.picture import BLUE, GREEN, GREY, INK, ORANGE, SERIES, STYLE, VERMILLION, Picture, new_axes, styled

if TYPE_CHECKING:
    from moe_lab.ops.machine_code import MachineCode

H200 = floors.H200
NOT_RECORDED = "No run on a GPU has been recorded yet"
WASTE = "////"  # waste is hatched, as well as pale

# An H100 and an H200 share the processor: 132 of them, each with 256 KB of registers, 256 KB of shared memory and L1,
# and four tensor cores that do 512 fp16 multiply-adds in a clock; 50 MB of L2 (NVIDIA H100 Tensor Core GPU
# Architecture, https://resources.nvidia.com/en-us-tensor-core, "H100 SM architecture"). Shared memory: 32 banks of 4
# bytes in a clock (CUDA C++ Programming Guide, "Shared Memory"). 141 GB of memory at 4.8 TB/s: the H200's datasheet.
PROCESSORS = 132
OPERATIONS_PER_CLOCK = 4 * 512 * 2
SHARED_BYTES_PER_CLOCK = 32 * 4
# Of a processor, by compute capability: registers, bytes of shared memory, warps, programs (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability"). A program takes 1 KB of shared memory more than it asks for, and
# registers by the eight a thread (the occupancy calculator of Nsight Compute).
ROOM = {80: (65536, 164 * 2**10, 64, 32), 90: (65536, 228 * 2**10, 64, 32)}


def recorded() -> dict[str, Any] | None:
    """What `moe-lab gpu` has measured on a GPU, or None where no such run has been recorded."""
    path = results_dir() / "gpu.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if found.get("measured") else None


def rates_of(recording: Mapping[str, Any] | None) -> floors.Rates | None:
    """What the GPU of a recording reaches in a dense product and in a copy, None if that was not measured.

    Without a recording it is what the datasheet of an H200 states.
    """
    if recording is None:
        return H200
    found = recording.get("ceilings") or {}
    operations, moved = found.get("operations_per_second"), found.get("bytes_per_second")
    return floors.Rates("a dense product and a copy", operations, moved) if operations and moved else None


def _stamp(recording: Mapping[str, Any]) -> str:
    about = recording["machine"]
    versions = f"torch {about['torch']}, triton {about['triton']}"
    return f"{about['gpu']}, {versions}, {recording['date']}"


# --- the machine ----------------------------------------------------------------------------------------------------


def memories() -> list[tuple[str, float, str, float | None]]:
    """Of each memory of an H200: its name, bytes, who shares it, and the operations in which one byte of it arrives."""
    operations = OPERATIONS_PER_CLOCK / SHARED_BYTES_PER_CLOCK
    return [
        ("registers", PROCESSORS * 256 * 2**10, "a thread's own", None),
        ("shared memory and L1", PROCESSORS * 256 * 2**10, "one program's", operations),
        ("L2 cache", 50 * 2**20, "all programs'", None),
        ("memory (HBM)", 141e9, "all programs'", H200.operations / H200.bytes),
    ]


@styled
def draw_memory() -> Picture:
    """The memories of an H200 by size, and what a byte of each costs in operations that could be done meanwhile."""
    figure, axes = new_axes(8.2, 2.6)
    found = memories()
    for place, (_, size, whose, operations) in enumerate(found):
        axes.barh(place, size, color=(BLUE, GREEN, ORANGE, GREY)[place], height=0.62, alpha=0.75)
        told = f"{size / 1e9:.0f} GB" if size > 1e9 else f"{size / 2**20:.0f} MB"
        told += f", {whose}"
        if operations:
            told += f"; a byte takes as long\nas {operations:.0f} operations"
        axes.text(size * 1.25, place, told, va="center", color=INK, fontsize=9.5)
    axes.set_xscale("log")
    axes.set_xlim(1e6, 4e13)
    axes.set_xticks([1e6, 1e7, 1e8, 1e9, 1e10, 1e11], ["1 MB", "10 MB", "100 MB", "1 GB", "10 GB", "100 GB"])
    axes.set_yticks(range(len(found)), [name for name, *_ in found])
    axes.minorticks_off()
    axes.set_ylim(3.6, -0.6)
    axes.set_xlabel("size, of all processors together")
    parts = [f"{name} {size / 2**20:.0f} MB" for name, size, *_ in memories()[:3]]
    alt = (
        f"Bars of the memories of an H200 on a logarithmic scale: {', '.join(parts)}, memory 141 GB. In the time in "
        f"which a byte comes from shared memory the tensor cores do {memories()[1][3]:.0f} operations, from memory "
        f"{memories()[3][3]:.0f}."
    )
    return Picture(figure, alt)


# Operations per byte, or these (None: unknown) and TFLOP/s (None: not measured)
Point = float | tuple[float | None, float | None]


def roof(intensity: float, rates: floors.Rates = H200) -> float:
    """The most TFLOP/s with so many operations for each byte of memory."""
    return min(rates.operations, intensity * rates.bytes) / 1e12


@styled
def draw_roofline(
    points: Mapping[str, Point] | None = None,
    *,
    rates: floors.Rates | None = H200,
    low: float = 1,
    title: str = "",
    of: str = "of memory",
) -> Picture:
    """What a GPU can reach with so many operations per byte, and where some work stands.

    Args:
        points: by name operations per byte, or these and TFLOP/s. What was not measured is a ring on the roof; of what
            is measured and has no place the number stands at the left edge.
        rates: the GPU's; without them there is no roof.
        low: operations per byte where the figure begins.
        of: which bytes they are.
    """
    figure, axes = new_axes(7.6, 3.9)
    placed = {name: point if isinstance(point, tuple) else (point, None) for name, point in (points or {}).items()}
    reached = [rate for _, rate in placed.values() if rate is not None]
    high = max(4000.0, *(3 * (at or 0) for at, _ in placed.values())) if placed else 4000.0
    top = max(roof(high, rates) if rates else 0, *reached, 1)
    bottom = min(roof(low, rates) if rates else top / 100, *(0.7 * rate for rate in reached), top)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, 2.2 * top))
    axes.set_xlabel(f"operations per byte {of}")
    axes.set_ylabel("TFLOP/s, bf16")
    axes.set_title(title, fontsize=10.5)
    figure.draw_without_rendering()  # the axes get their place, which the slope's angle and the numbers need
    if rates:
        _draw_roof(axes, rates, low, high)
    drawn = {name: (low if at is None else at, roof(at, rates) if y is None else y) for name, (at, y) in placed.items()}
    _draw_numbered(axes, list(drawn.values()), [rate is not None for _, rate in placed.values()])
    lines = [
        f"{number}  {name}{' (bytes unknown)' if at is None else ''}" + ("" if rate is None else f": {rate:.0f}")
        for number, (name, (at, rate)) in enumerate(placed.items(), 1)
    ]
    axes.text(
        0.98, 0.04, "\n".join(lines), transform=axes.transAxes, ha="right", va="bottom", fontsize=9.5, linespacing=1.35
    )  # fmt: skip
    told = [
        f"{name} at {'an unknown place' if at is None else format(at, '.0f')}, "
        + (f"not measured, the roof there is {int(drawn[name][1])} TFLOP/s" if rate is None else f"{rate:.0f} TFLOP/s")
        for name, (at, rate) in placed.items()
    ]
    return Picture(figure, " ".join(filter(None, (title, _told_roof(rates), f"{'; '.join(told)}." if told else ""))))


def _draw_roof(axes: Axes, rates: floors.Rates, low: float, high: float) -> None:
    corner = rates.operations / rates.bytes
    axes.plot([low, corner, high], [roof(at, rates) for at in (low, corner, high)], color=INK)
    axes.axvline(corner, color=GREY, linewidth=1, linestyle=":")
    bottom = axes.get_ylim()[0]
    about = f"{corner:.0f} operations\nper byte"
    axes.text(corner * 0.92, 1.25 * bottom, about, ha="right", color="#555555", fontsize=9.5)
    begin = 2.2 * low
    (left, below), (right, above) = axes.transData.transform(
        [(begin, roof(begin, rates)), (corner, roof(corner, rates))]
    )
    slope = math.degrees(math.atan2(above - below, right - left))
    waits = f"waits for memory: {rates.bytes / 1e12:.3g} TB/s"
    look = {"rotation": slope, "rotation_mode": "anchor", "va": "top", "fontsize": 9.5}
    axes.text(begin, 0.6 * roof(begin, rates), waits, **look)
    computes = f"computes: {int(rates.operations / 1e12)} TFLOP/s"
    axes.text(high * 0.93, 1.12 * roof(high, rates), computes, ha="right", fontsize=9.5)


def _draw_numbered(axes: Axes, places: Sequence[tuple[float, float]], filled: Sequence[bool]) -> None:
    """Points, or rings, with their numbers below to the right; numbers one above the other keep apart."""
    down, apart, near = 9, 11, 20  # pixels
    last: list[tuple[float, float]] = []
    for number in sorted(range(len(places)), key=lambda i: places[i][1]):
        place = places[number]
        look = {"markersize": 7, "markerfacecolor": BLUE if filled[number] else "white", "markeredgecolor": BLUE}
        axes.plot(*place, "o", **look, markeredgewidth=1.8, zorder=3, clip_on=False)
        x, y = axes.transData.transform(place)
        y = max([y - down, *(other_y + apart for other_x, other_y in last if abs(other_x - x) < near)])
        last.append((x, y))
        told = {"color": BLUE, "fontsize": 9.5, "fontweight": "bold", "zorder": 4}
        axes.text(*axes.transData.inverted().transform((x + 6, y)), str(number + 1), va="center", **told)


def _told_roof(rates: floors.Rates | None) -> str:
    if rates is None:
        return "TFLOP/s against operations per byte, both logarithmic."
    return (
        f"Roofline ({rates.name}), both axes logarithmic: TFLOP/s rise with the operations per byte until "
        f"{rates.operations / rates.bytes:.0f}, from there on they stay at {int(rates.operations / 1e12)}."
    )


# --- tiles ------------------------------------------------------------------------------------------------------------


def waste(counts: Sequence[int], block: int) -> tuple[float, float]:
    """The share of rows that are computed for nothing: padded to the fullest group, and in tiles of `block` rows."""
    n_rows = sum(counts)
    padded, tiled = len(counts) * max(counts), sum(-(-count // block) * block for count in counts)
    return 1 - n_rows / padded, 1 - n_rows / tiled


@styled
def draw_padding(counts: Sequence[int], block: int) -> Picture:
    """Groups padded to the fullest one, beside the same in tiles of `block` rows; what is computed for nothing hatched.

    Raises:
        ValueError: no row at all.
    """
    if not sum(counts):
        raise ValueError(f"counts are {list(counts)}: expected at least one row.")
    shares = waste(counts, block)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.3), layout="constrained")
        for axes, share, name in zip(figure.subplots(1, 2, sharey=True), shares, ("padded", "tiles"), strict=True):
            for group, count in enumerate(counts):
                height = max(counts) if name == "padded" else -(-count // block) * block
                colour = expert_colour(group)
                axes.bar(group, height, color="white", edgecolor=GREY, hatch=WASTE, width=0.8)
                axes.bar(group, count, color="white", width=0.8)
                axes.bar(group, count, color=(colour, PALE), edgecolor=colour, width=0.8, linewidth=1.5)
                if name == "tiles":
                    axes.hlines(range(block, height, block), group - 0.4, group + 0.4, color=INK, linewidth=0.8)
            what = "padded to the fullest" if name == "padded" else f"tiles of {block} rows"
            axes.set_title(f"{what}: {share:.0%} for nothing")
            axes.set_xticks(range(len(counts)))
            axes.set_xlabel("expert")
            axes.set_ylabel("rows that are computed" if name == "padded" else "")
    alt = (
        f"Bars of the rows that {len(counts)} experts compute, {', '.join(map(str, counts))} of them theirs. Padded to "
        f"the fullest, {shares[0]:.0%} of the rows are computed for nothing; in tiles of {block} rows, {shares[1]:.0%}."
    )
    return Picture(figure, alt)


@styled
def draw_tiles(counts: Sequence[int], block: int) -> Picture:
    """The sorted rows and the tiles over them: by expert, masked rows hatched, tiles that are not used at the end.

    Raises:
        ValueError: no row at all.
    """
    n_rows = sum(counts)
    if not n_rows:
        raise ValueError(f"counts are {list(counts)}: expected at least one row.")
    plan = plan_tiles(torch.tensor(counts).cumsum(0).int(), n_rows, block)
    groups, firsts, sizes = plan[:, : most_tiles(n_rows, len(counts), block)].tolist()  # all rows have a group here
    figure, axes = new_axes(9.2, 2.9)
    starts = [sum(counts[:expert]) for expert in range(len(counts))]
    for expert, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            colour = expert_colour(expert)
            look = {"facecolor": (colour, PALE), "edgecolor": colour, "linewidth": 1.6}
            axes.add_patch(Rectangle((start, 2.1), count, 0.7, **look))
            axes.text(start + count / 2, 2.45, str(expert), ha="center", va="center")
    scale = n_rows / (len(groups) * (block + 1))
    for tile, (group, first, size) in enumerate(zip(groups, firsts, sizes, strict=True)):
        left, width = tile * (block + 1) * scale, block * scale
        is_used = 0 <= group < len(counts)
        colour = expert_colour(group) if is_used else GREY
        look = {"edgecolor": GREY, "linewidth": 0.8}
        look |= {"facecolor": "white", "hatch": WASTE} if is_used else {"facecolor": "#E4E4E4"}
        axes.add_patch(Rectangle((left, 0.5), width, 0.7, **look))
        if is_used:
            for shade in ("white", (colour, PALE)):
                axes.add_patch(Rectangle((left, 0.5), size * scale, 0.7, facecolor=shade))
            for end, row in ((left, first), (left + size * scale, first + size)):
                axes.plot([end, row], [1.2, 2.1], color=colour, linewidth=0.9)
        axes.add_patch(Rectangle((left, 0.5), width, 0.7, fill=False, edgecolor=colour, linewidth=1.6))
        axes.text(left + width / 2, 0.25, str(group) if is_used else "–", ha="center", va="center", fontsize=9.5)
    axes.text(0, 2.95, f"{n_rows} sorted rows, by expert", fontsize=9.5)
    n_used = sum(0 <= group < len(counts) for group in groups)
    below = f"{len(groups)} tiles of {block} rows, below each its expert: {n_used} used"
    axes.text(0, -0.15, f"{below}; hatched is masked, grey is not used", fontsize=9.5)
    axes.set(xlim=(-0.5, n_rows + 0.5), ylim=(-0.35, 3.2))
    axes.axis("off")
    alt = (
        f"{n_rows} rows sorted by expert, {', '.join(map(str, counts))} rows each, and below them {len(groups)} tiles "
        f"of up to {block} rows: {n_used} are used, of experts {', '.join(str(g) for g in groups[:n_used])} with "
        f"{', '.join(str(s) for s in sizes[:n_used])} rows, the rest of a tile is masked; at the end "
        f"{len(groups) - n_used} not used."
    )
    return Picture(figure, alt)


def program_of_tiles(n_rows: int, n_columns: int, band: int) -> list[list[int]]:
    """For each tile of rows and of columns the program that computes it, as `moe_lab.ops.kernels.tile_order` says."""
    order = [[0] * n_columns for _ in range(n_rows)]
    for program in range(n_rows * n_columns):
        first = program // (band * n_columns) * band
        height = min(n_rows - first, band)
        inside = program % (band * n_columns)
        order[first + inside % height][inside // height] = program
    return order


@styled
def draw_tile_order(n_rows: int, n_columns: int, band: int, at_once: int | None = None) -> Picture:
    """Which program computes which tile, column by column and in bands, and what those that run at once read.

    Args:
        n_rows: tiles of rows; likewise `n_columns`.
        at_once: programs that run at the same time; by default as many as make a square in a band.
    """
    at_once = at_once or band * band
    told = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.3), layout="constrained")
        orders = {"column by column": n_rows, f"in bands of {band}": band}  # one band of all rows
        for axes, (name, height) in zip(figure.subplots(1, 2), orders.items(), strict=True):
            order = program_of_tiles(n_rows, n_columns, height)
            running = [(r, c) for r in range(n_rows) for c in range(n_columns) if order[r][c] < at_once]
            rows, columns = {r for r, _ in running}, {c for _, c in running}
            for r in range(n_rows):
                for c in range(n_columns):
                    colour = BLUE if order[r][c] < at_once else GREY
                    shade = (colour, 0.3 if colour == BLUE else 0.08)
                    axes.add_patch(Rectangle((c, r), 0.92, 0.92, facecolor=shade, edgecolor=colour))
                    axes.text(c + 0.46, r + 0.5, str(order[r][c]), ha="center", va="center", fontsize=7.5)
            axes.set(xlim=(-0.1, n_columns), ylim=(n_rows, -0.1), aspect="equal")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_xlabel("tiles of columns: an expert's matrix")
            axes.set_ylabel("tiles of rows")
            told.append(f"{name}: {len(rows)} tiles of rows and {len(columns)} of columns")
            axes.set_title(f"{name}: {len(rows)} + {len(columns)} tiles are read", fontsize=11)
            for side in ("left", "bottom"):
                axes.spines[side].set_visible(False)
    alt = (
        f"A grid of {n_rows} by {n_columns} tiles, twice, with the number of the program that computes each; the first "
    )
    return Picture(figure, f"{alt}{at_once}, which run at once, are shaded. They read, {'; '.join(told)}.")


# --- what was measured ------------------------------------------------------------------------------------------------

SWEEP_SHAPE = (128, 2048, 768)  # experts, d_model, d_ff


def sweep_limit(tokens_per_expert: float, rates: floors.Rates = H200) -> float:
    """The most TFLOP/s of the first product of the block, by both floors."""
    n_experts, d_model, d_ff = SWEEP_SHAPE
    work = floors.product(int(tokens_per_expert * n_experts), d_model, 2 * d_ff, n_experts)
    return roof(work.intensity, rates)


@styled
def draw_throughput(recording: Mapping[str, Any] | None) -> Picture:
    """TFLOP/s of the grouped product against tokens per expert; without a recording the limit alone.

    The limit is that of the GPU which was measured (`rates_of`).
    """
    figure, axes = new_axes(7.6, 3.7)
    rates = rates_of(recording)
    if rates:
        limits = {tokens: sweep_limit(tokens, rates) for tokens in range(4, 4097, 4)}
        axes.plot(list(limits), list(limits.values()), color=INK, linewidth=1.4, linestyle="--")
        limit = "no kernel can be above" if rates is H200 else f"as {rates.name}"
        axes.text(12, 0.45 * limits[12], limit, rotation=33, fontsize=9.5)
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in (recording or {}).get("sweep", ()):
        for name, one in record["product"].items():
            if "tflops" in one:
                shown = f"{name} (by default)" if name == record["ours"] else name
                lines.setdefault(shown, []).append((record["tokens_per_expert"], one["tflops"]))
    for number, (name, line) in enumerate(lines.items()):
        axes.plot(*zip(*line, strict=True), "os^Dv*"[number % 6] + "-", color=SERIES[number % 6], label=name)
    if lines:
        axes.legend(fontsize=9.5)
    axes.set(xscale="log", yscale="log")
    ticks = [4**power for power in range(1, 7)]
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    axes.set_yticks([10, 100, 1000], [10, 100, 1000])
    axes.set_xlabel(f"tokens per expert ({SWEEP_SHAPE[0]} experts, rows of {SWEEP_SHAPE[1]} to {2 * SWEEP_SHAPE[2]})")
    axes.set_ylabel("TFLOP/s, bf16")
    axes.set_title(_stamp(recording) if lines else f"{NOT_RECORDED}.", fontsize=10.5)
    told = [f"{name} reaches {max(rate for _, rate in line):.0f} TFLOP/s" for name, line in lines.items()]
    alt = "TFLOP/s of a grouped product against tokens per expert, both logarithmic. "
    if rates:
        alt += f"The limit ({rates.name}) rises to {int(sweep_limit(4096, rates))}; half of that is reached at "
        alt += f"{_half_of_the_limit(rates)} tokens. "
    return Picture(figure, f"{alt}{'; '.join(told) or NOT_RECORDED}.")


def _half_of_the_limit(rates: floors.Rates) -> int:
    most = sweep_limit(4096, rates)
    return next(tokens for tokens in range(1, 4097) if sweep_limit(tokens, rates) >= most / 2)


ONCE = "every number read once"


def stages_of(recording: Mapping[str, Any] | None) -> dict[str, Point]:
    """Of each step of the optimisation the operations per byte that its programs ask for, and TFLOP/s.

    Of a library's products nobody knows what they ask for. Without a recording there are tiles of four sizes, and no
    TFLOP/s. In the end comes what no program can do without: every number read and written once.
    """
    if recording and recording.get("steps"):
        record = recording["steps"][0]
        found = record["candidates"]
        ran = {name: (one.get("flops_per_byte"), one["tflops"]) for name, one in found.items() if "tflops" in one}
        return ran | {ONCE: (record["flops"] / record["bytes"], None)} if ran else {}
    n_experts, d_model, d_ff = SWEEP_SHAPE
    n_rows = 8 * 32768
    work = floors.product(n_rows, d_model, 2 * d_ff, n_experts)
    sizes = {f"tiles of {m} × {n}": (m, n) for m, n in ((32, 32), (64, 64), (128, 128), (128, 256))}
    asked = {name: floors.asked(n_rows, d_model, 2 * d_ff, *size) for name, size in sizes.items()}
    return {name: (work.flops / moved, None) for name, moved in asked.items()} | {ONCE: (work.intensity, None)}


def draw_stages(recording: Mapping[str, Any] | None) -> Picture:
    """The steps of the optimisation on the roofline, by what their programs ask for; on the roof if not measured.

    What is asked for need not come from memory: where caches serve it, a step is above the slope.

    Raises:
        ValueError: a recording in which no step ran.
    """
    points = stages_of(recording)
    if not points:
        raise ValueError("no step of the optimisation ran in this recording: expected at least one.")
    rates = rates_of(recording)
    if rates is None:  # then there is no roof for what was not measured
        points = {name: point for name, point in points.items() if point[1] is not None}
    is_measured = any(rate is not None for _, rate in points.values())
    title = f"{_stamp(recording)}." if is_measured else f"{NOT_RECORDED}: rings are where the roof is."
    return draw_roofline(points, rates=rates, low=6, title=title, of="that programs ask for")


# --- bytes that fusing saves ------------------------------------------------------------------------------------------


def bytes_of_steps(
    n_tokens: int, top_k: int, d_model: int, d_ff: int, element_size: int = 2
) -> dict[str, dict[str, int]]:
    """Bytes of rows that the steps of a block read and write, unfused and fused; matrices are the same in both."""
    tokens, rows, hidden = n_tokens * d_model, n_tokens * top_k * d_model, n_tokens * top_k * d_ff
    unfused = {
        "permute": tokens + rows,
        "gate and up": rows + 2 * hidden,
        "SwiGLU": 3 * hidden,
        "down": hidden + rows,
        "combine": rows + tokens,
    }
    fused = {"gate, up, SwiGLU": tokens + hidden, "down, weighted": hidden + rows, "sum": rows + tokens}
    return {
        name: {step: element_size * numbers for step, numbers in steps.items()}
        for name, steps in (("step by step", unfused), ("fused", fused))
    }


@styled
def draw_fusion(n_tokens: int, top_k: int, d_model: int, d_ff: int, element_size: int = 2) -> Picture:
    """Bytes of rows that a block moves in a forward pass without gradients, step by step and fused."""
    found = bytes_of_steps(n_tokens, top_k, d_model, d_ff, element_size)
    figure, axes = new_axes(8.2, 2.5)
    totals = {}
    for place, (name, steps) in enumerate(found.items()):
        left = 0.0
        for number, (step, size) in enumerate(steps.items()):
            colour = (BLUE, ORANGE, GREEN, VERMILLION, GREY)[number]
            axes.barh(place, size / 1e9, left=left, color=(colour, 0.45), edgecolor=colour, height=0.6)
            axes.text(left + size / 2e9, place, step.replace(", ", ",\n"), ha="center", va="center", fontsize=8.5)
            left += size / 1e9
        totals[name] = left
        axes.text(left, place, f"  {left:.1f} GB", va="center")
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(1.5, -0.5)
    axes.set_xlim(0, 1.14 * max(totals.values()))
    axes.set_xlabel(f"GB of rows read and written, {n_tokens} tokens to {top_k} experts each")
    told = "; ".join(f"{name} {total:.1f} GB" for name, total in totals.items())
    return Picture(figure, f"Bars of the bytes that the steps of an experts' block read and write: {told}.")


# --- machine code -----------------------------------------------------------------------------------------------------


class CodeView:
    """A kernel's machine code in brief: a table, and the lines around its first tensor-core instruction."""

    def __init__(self, code: "MachineCode", instruction: str | None, lines: int) -> None:
        self.name, self.chip = code.name, f"{code.capability / 10:.1f}"
        found = [name for name in code.instructions if name.endswith("MMA")]
        self.instruction = instruction or next(iter(found), None)
        times = code.instructions.get(self.instruction, 0) if self.instruction else 0
        room = programs_at_once(code)
        self.table = {
            "tensor-core instruction": f"{self.instruction}, in {times} places" if times else "none",
            "registers of a thread": f"{code.registers} of 255",
            "spills": f"{code.spills} instructions, {code.local_bytes} bytes",
            "shared memory": f"{code.shared_bytes / 1024:.0f} KB",
        }
        if room:
            self.table["programs on a processor at once"] = str(room)
        self.has_it, self.lines = times > 0, excerpt(code.sass, self.instruction, lines) if times else []

    def __repr__(self) -> str:
        has = "has" if self.has_it else "does not have"
        return f"{self.name}, compiled for compute capability {self.chip}: {has} {self.instruction or 'a tensor core'}"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in self.table.items())
        shown = "\n".join(
            f"<strong>{escape(line)}</strong>" if _has(line, self.instruction) else escape(line) for line in self.lines
        )
        pre = "font-family: var(--jp-code-font-family, monospace); font-size: 85%; overflow-x: auto"
        head = f"<div><code>{escape(self.name)}</code>, compiled for compute capability {self.chip}</div>"
        return f"{head}<table>{rows}</table>" + (f"<pre style='{pre}'>{shown}</pre>" if shown else "")


def show_machine_code(code: "MachineCode", instruction: str | None = None, lines: int = 8) -> CodeView:
    """A table of what a kernel became, and the machine code around its first tensor-core instruction.

    As text it says only what no compiler's version changes.

    Args:
        instruction: the one to look for; by default the first that multiplies matrices.
        lines: of machine code, as many as there are around it.
    """
    return CodeView(code, instruction, lines)


def programs_at_once(code: "MachineCode") -> int | None:
    """How many programs find room on one processor; None where that is not known."""
    warps = code.constants.get("num_warps")
    if code.capability not in ROOM or not warps:
        return None
    registers, shared, most_warps, most = ROOM[code.capability]
    of_a_thread = -(-code.registers // 8) * 8
    by_registers = registers // (32 * warps * of_a_thread)
    return min(by_registers, shared // (code.shared_bytes + 1024), most_warps // warps, most)


def excerpt(sass: str, instruction: str, lines: int) -> list[str]:
    """Instructions around the first of that name, without addresses and encodings."""
    code = [line.split("/*", 2)[1].split("*/", 1)[1].strip() for line in sass.splitlines() if _is_code(line)]
    first = next((number for number, line in enumerate(code) if _has(line, instruction)), 0)
    begin = max(0, first - lines // 2)
    return code[begin : begin + lines]


def _is_code(line: str) -> bool:
    return line.lstrip().startswith("/*") and ";" in line


def _has(line: str, instruction: str | None) -> bool:
    return any(word.split(".")[0] == instruction for word in line.split())
