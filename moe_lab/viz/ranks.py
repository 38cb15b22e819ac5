"""Drawings of what ranks do: the collectives, who sends rows to whom, how rows are regrouped, and when."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.path import Path
from torch import Tensor

from moe_lab.parallel.layer import by_expert
from moe_lab.parallel.placement import Placement
from moe_lab.parallel.ranks import Event
from moe_lab.viz.dispatching import PALE, expert_colour
from moe_lab.viz.picture import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, STYLE, VERMILLION, Picture, new_axes

RANK_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
YELLOW = "#F0E442"  # the last one of the palette, for areas only: as a line it is hardly seen on white
GAP = 0.7  # between two ranks' tokens, or experts
STAGE_COLOURS = {"route": GREEN, "dispatch": SKY, "shared": PURPLE, "regroup": GREY, "experts": BLUE, "combine": YELLOW}
WIRE_COLOURS = {"counts": GREY, "dispatch": ORANGE, "combine": VERMILLION}
BLOCKS = ("counts", "")  # exchanges that a stage waits for: it does not compute meanwhile
SMALLEST_NAMED_SHARE = 5.0  # per cent of the axis: a shorter bar has no room for its name


def rank_colour(rank: int) -> str:
    """The colour of a rank in the drawings of this module."""
    return RANK_COLOURS[rank % len(RANK_COLOURS)]


# --- the collectives ----------------------------------------------------------------------------------------------

Cells = list[list[tuple[int, int | None]]]  # for each rank its numbers, each with the rank that it comes from


def collectives(n_ranks: int = 4) -> dict[str, tuple[Cells, Cells]]:
    """For each collective what every rank holds before and after; rank r begins with 10r, 10r + 1, …"""
    own = [[(10 * rank + i, rank) for i in range(n_ranks)] for rank in range(n_ranks)]
    one = [numbers[:1] for numbers in own]
    totals = [(sum(own[rank][i][0] for rank in range(n_ranks)), None) for i in range(n_ranks)]
    passed: Cells = [[], *one[:-1]]
    return {
        "all-reduce": (own, [totals] * n_ranks),
        "all-gather": (one, [[numbers[0] for numbers in one]] * n_ranks),
        "all-to-all": (own, [[own[source][rank] for source in range(n_ranks)] for rank in range(n_ranks)]),
        "point to point": (one, passed),
    }


SAYS = {
    "all-reduce": "the sum of all, on every rank",
    "all-gather": "everybody's, on every rank",
    "all-to-all": "to each rank its own",
    "point to point": "from one rank to one other",
}


def draw_collectives() -> Picture:
    """Four panels: what four ranks hold before and after each collective, every number in the colour of its rank."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 4.9), layout="constrained")
        for axes, (name, (before, after)) in zip(figure.subplots(2, 2).flat, collectives().items(), strict=True):
            axes.set(xlim=(-1.5, 10.2), ylim=(-3.6, 1.2))
            axes.axis("off")
            axes.set_title(f"{name}: {SAYS[name]}", fontsize=11)
            for left, cells in ((0.0, before), (5.7, after)):
                middle = left + max(map(len, cells)) / 2
                axes.text(middle, 0.85, "after" if left else "before", ha="center", va="center", fontsize=9.5)
                for rank, numbers in enumerate(cells):
                    for i, (number, source) in enumerate(numbers):
                        _number(axes, left + i, -rank, f"{number}", GREY if source is None else rank_colour(source))
            for rank in range(len(before)):
                axes.text(-0.2, -rank, f"rank {rank}", ha="right", va="center", fontsize=9.5)
            axes.add_patch(FancyArrowPatch((4.25, -1.5), (5.35, -1.5), arrowstyle="-|>", mutation_scale=13, color=INK))
        return Picture(figure, _collectives_alt())


def _collectives_alt() -> str:
    said = []
    for name, (before, after) in collectives().items():
        held, got = ([[number for number, _ in numbers] for numbers in cells] for cells in (before, after))
        said.append(f"{name}: before, ranks 0 to 3 hold {_lists(held)}; after, {_lists(got)}")
    return f"Four panels, one for each collective. {'. '.join(said)}."


def _lists(held: list[list[int]]) -> str:
    if all(numbers == held[0] for numbers in held):
        return f"each {', '.join(map(str, held[0]))}"
    return " | ".join(", ".join(map(str, numbers)) or "nothing" for numbers in held)


def _number(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 0.92, size: float = 10) -> None:
    axes.add_patch(
        Rectangle((x, y - 0.4), width, 0.8, facecolor=(colour, PALE), edgecolor=colour, linewidth=1.5, zorder=2)
    )
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=size, zorder=3)


# --- who sends to whom --------------------------------------------------------------------------------------------


def draw_exchange(choices: Sequence[Tensor], placement: Placement, tokens: Sequence[Tensor] | None = None) -> Picture:
    """Tokens on the left, rank by rank; experts on the right, rank by rank; a line for every row that is sent.

    A row has the colour of the rank that it goes to, and is dashed if it stays at home.

    Args:
        choices: for each rank the experts of its tokens, (T, K).
        tokens: for each rank the numbers that its tokens are called by, as many as it has; by default 0, 1, …
    """
    if tokens is None:
        names = [[f"{token}" for token in range(len(chosen))] for chosen in choices]
    else:
        names = [[f"{number:g}" for number in numbers.flatten().tolist()] for numbers in tokens]
    token_y, expert_y, y = [], [], 0.0
    for chosen in choices:
        token_y.append([y - i for i in range(len(chosen))])
        y -= len(chosen) + GAP
    left_height = -y - GAP
    y = 0.0
    for held in placement.experts:
        expert_y.append([y - i for i in range(len(held))])
        y -= len(held) + GAP
    right_height = -y - GAP
    stretch = (left_height - 1) / max(right_height - 1, 1)  # both sides as high as the tokens
    places = {
        expert: (rank, expert_y[rank][i] * stretch)
        for rank, held in enumerate(placement.experts)
        for i, expert in enumerate(held)
    }
    sent, stayed = 0, 0
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(8.2, 0.36 * left_height + 0.95)
        axes.set(xlim=(-1.4, 11.4), ylim=(-left_height - 0.4, 1.6))
        axes.axis("off")
        for x, text in ((0.75, "tokens, and where they are"), (9.25, "experts, and where they are")):
            axes.text(x, 1.3, text, ha="center", va="center", fontsize=9.5)
        for rank, chosen in enumerate(choices):
            colour = rank_colour(rank)
            if token_y[rank]:
                axes.text(-0.25, sum(token_y[rank]) / len(token_y[rank]), f"rank {rank}", ha="right", va="center")
            for token, experts in enumerate(chosen.tolist()):
                _number(axes, 0.0, token_y[rank][token], f"token {names[rank][token]}", colour, 1.5, 9.5)
                for expert in experts:
                    owner, end = places[expert]
                    sent, stayed = sent + (owner != rank), stayed + (owner == rank)
                    _line(axes, (1.5, token_y[rank][token]), (8.5, end), rank_colour(owner), stays=owner == rank)
        for rank, held in enumerate(placement.experts):
            ys = [places[expert][1] for expert in held]
            axes.text(10.25, sum(ys) / len(ys), f"rank {rank}", ha="left", va="center")
            for expert in held:
                _number(axes, 8.5, places[expert][1], f"expert {expert}", rank_colour(rank), 1.5, 9.5)
        says = "colour: the rank that a row goes to; dashed: it stays at home"
        axes.text(5.0, -left_height, says, ha="center", va="center", fontsize=9)
        words = "; ".join(
            f"rank {rank}: "
            + (
                ", ".join(
                    f"token {name} to experts {_and(e)}" for name, e in zip(names[rank], chosen.tolist(), strict=True)
                )
            )
            for rank, chosen in enumerate(choices)
        )
        alt = (
            f"On the left the tokens of {len(choices)} ranks, on the right the experts, {_held(placement)}. A line for "
            f"every row: {words}. {sent} rows leave their rank, {stayed} stay and are dashed."
        )
        return Picture(figure, alt)


def _held(placement: Placement) -> str:
    return "; ".join(f"{_and(held)} on rank {rank}" for rank, held in enumerate(placement.experts))


def _and(items: Iterable[int]) -> str:
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last


def _line(axes: Axes, start: tuple, end: tuple, colour: str, stays: bool) -> None:
    middle = (start[0] + end[0]) / 2
    path = Path([start, (middle, start[1]), (middle, end[1]), end], [Path.MOVETO, *[Path.CURVE4] * 3])
    look = {"linestyle": (0, (2, 2)), "linewidth": 1.2} if stays else {"linewidth": 1.6}
    arrow = {"arrowstyle": "-|>", "mutation_scale": 8, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(path=path, color=colour, zorder=1, **arrow, **look))


# --- regrouping ---------------------------------------------------------------------------------------------------


def draw_regroup(received: Tensor, experts: Sequence[int], rows: Tensor | None = None) -> Picture:
    """Rows as they arrived, rank by rank, and the same sorted by expert.

    Args:
        received: (ranks, own) how many rows came from each rank for each of these experts.
        experts: the ids of this rank's experts.
        rows: (R', 1) or (R',) the numbers that the rows are called by, as they arrived; by default they have none.
    """
    size, own = received.shape
    order, ends = by_expert(received)
    counts = received.tolist()
    names = [(source, local) for source in range(size) for local in range(own) for _ in range(counts[source][local])]
    place_of = order.argsort().tolist()
    tokens = [] if rows is None else [f"token {number:g}\n" for number in rows.flatten().tolist()]
    silent = [str(source) for source, row in enumerate(counts) if not sum(row)]
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(max(5.0, 0.75 * len(names) + 2.6), 2.9)
        axes.set(xlim=(-2.7, len(names) + 0.1), ylim=(-1.7, 5.0))
        axes.axis("off")
        for y, text in ((3.0, "as they came"), (0.0, "expert by expert")):
            axes.text(-0.2, y, text, ha="right", va="center", fontsize=9.5)
        if silent:
            axes.text(-0.2, 4.2, f"none from rank {_and(silent)}", ha="right", va="center", fontsize=9.5)
        for place, (_, local) in enumerate(names):
            colour = expert_colour(experts[local])
            text = f"expert {experts[local]}" if len(names) < 9 else f"{experts[local]}"
            if tokens:
                text = tokens[place] + text
            for x, y in ((place, 3.0), (place_of[place], 0.0)):
                _number(axes, x + 0.04, y, text, colour, size=8 if tokens else 10)
            _drop(axes, place + 0.5, place_of[place] + 0.5, colour)
        begin = 0
        for source in range(size):
            end = begin + sum(counts[source])
            if end > begin:
                _bracket(axes, begin, end, 3.75, f"from rank {source}", up=True)
            begin = end
        for begin, end, expert in zip([0, *ends.tolist()], ends.tolist(), experts, strict=False):
            if end > begin:
                _bracket(axes, begin, end, -0.75, f"expert {expert}", up=False)
        came = ", ".join(f"{sum(row)} from rank {rank}" for rank, row in enumerate(counts))
        return Picture(
            figure,
            f"Above, {len(names)} rows in the order in which they came: {came}. {_called(tokens)}Below, the same rows "
            f"sorted by expert; the order is {', '.join(map(str, order.tolist()))}.",
        )


def _called(tokens: Sequence[str]) -> str:
    return f"They are {_and(token.strip() for token in tokens)}. " if tokens else ""


def _drop(axes: Axes, start: float, end: float, colour: str) -> None:
    path = Path([(start, 2.55), (start, 1.5), (end, 1.5), (end, 0.48)], [Path.MOVETO, *[Path.CURVE4] * 3])
    look = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.5}
    axes.add_patch(FancyArrowPatch(path=path, color=colour, **look))


def _bracket(axes: Axes, begin: float, end: float, y: float, text: str, up: bool) -> None:
    tip, sign = (y - 0.15, 1) if up else (y + 0.15, -1)
    axes.plot([begin + 0.08, begin + 0.08, end - 0.08, end - 0.08], [tip, y, y, tip], color=INK, linewidth=1)
    axes.text((begin + end) / 2, y + 0.45 * sign, text, ha="center", va="center", fontsize=9.5)


# --- when ---------------------------------------------------------------------------------------------------------

Bar = tuple[str, float, float]  # its name, where it begins and where it ends


def lanes(events: Sequence[Event]) -> tuple[list[Bar], list[Bar]]:
    """What a rank computed, and what was on its wire, in seconds from its first event on.

    A stage that waits for an exchange, such as that of the counts, is cut there: it computes nothing meanwhile. Ids and
    weights travel beside their rows, and are left out.
    """
    start = min(event.begin for event in events)
    wire = [event for event in events if event.kind != "compute"]
    waits = sorted((event.begin, event.end) for event in wire if event.what in BLOCKS)
    computed: list[Bar] = []
    for event in sorted((event for event in events if event.kind == "compute"), key=lambda event: event.begin):
        begin = event.begin
        for wait_begin, wait_end in waits:
            if begin < wait_end and wait_begin < event.end:
                computed.append((event.stage, begin - start, max(begin, wait_begin) - start))
                begin = max(begin, wait_end)
        computed.append((event.stage, begin - start, event.end - start))
    travelled = [
        (event.what if event.what == "counts" else event.stage, event.begin - start, event.end - start)
        for event in wire
        if event.what in ("rows", "counts")
    ]
    return [bar for bar in computed if bar[2] > bar[1]], sorted(travelled, key=lambda bar: bar[1])


def seconds(runs: Sequence[Sequence[Event]]) -> float:
    """From a run's first event to its last, on the rank that took longest."""
    return max(max(e.end for e in events) - min(e.begin for e in events) for events in runs)


def draw_timeline(runs: Mapping[str, Sequence[Sequence[Event]]], *, title: str, alt: str) -> Picture:
    """When each rank computed, and when rows of its were under way: two lanes a rank, a panel for each run.

    Args:
        runs: by name, each rank's events as `Ranks.watch` notes them. All panels have one scale, the longest run.
    """
    whole = max(seconds(run) for run in runs.values())
    most = max(len(run) for run in runs.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.1 + len(runs) * (0.55 + 0.62 * most)), layout="constrained")
        all_axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
        seen: dict[str, str] = {}
        for axes, (name, run) in zip(all_axes, runs.items(), strict=True):
            labels = []
            for rank, events in enumerate(run):
                for lane, bars in zip(("computes", "wire"), lanes(events), strict=True):
                    y = -len(labels) - 0.35 * rank
                    labels.append((y, f"rank {rank} {lane}"))
                    colours = STAGE_COLOURS if lane == "computes" else WIRE_COLOURS
                    _draw_lane(axes, y, bars, colours, whole, hatch="" if lane == "computes" else "////", seen=seen)
            axes.set_yticks([y for y, _ in labels], [label for _, label in labels], fontsize=9)
            axes.set(ylim=(labels[-1][0] - 0.6, 0.6), xlim=(0, 100))
            axes.set_title(f"{name}: {100 * seconds(run) / whole:.0f} % of the time", fontsize=11)
            axes.grid(axis="x", alpha=0.25)
        all_axes[-1].set_xlabel("share of the longer run's time (%)")
        marks = [
            Patch(
                facecolor=(colour, 0.55),
                edgecolor=INK,
                linewidth=0.6,
                hatch="////" if "wire" in name else "",
                label=name,
            )
            for name, colour in seen.items()
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=min(5, len(marks)), fontsize=9)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        return Picture(figure, alt)


def _draw_lane(
    axes: Axes, y: float, bars: list[Bar], colours: Mapping[str, str], whole: float, hatch: str, seen: dict[str, str]
) -> None:
    ends = [0.0, 0.0]  # of the upper and the lower half: what overlaps is drawn in halves
    crowded = any(begin < end for (_, _, end), (_, begin, _) in pairwise(bars)) if hatch else False
    for name, begin, end in bars:
        half = 0 if not crowded or begin >= ends[0] else 1
        ends[half] = end
        height, middle = (0.4, y + 0.2 - 0.4 * half) if crowded else (0.8, y)
        left, width = 100 * begin / whole, 100 * (end - begin) / whole
        colour = colours.get(name, GREY)
        axes.barh(middle, width, height, left, color=(colour, 0.55), edgecolor=INK, linewidth=0.6, hatch=hatch)
        if width >= 0.4:
            seen.setdefault(f"wire: {name}" if hatch else name, colour)
        if width >= SMALLEST_NAMED_SHARE:
            place = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
            size = 7.5 if crowded else 8.5
            axes.text(left + width / 2, middle, name, ha="center", va="center", fontsize=size, bbox=place)
