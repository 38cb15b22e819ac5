"""Drawings of dispatch: the sort behind a plan, the way of tokens to their experts and back, and the room it takes.

An expert has one colour in all of them, and always its number too.
"""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path

from moe_lab.records import DispatchPlan, Routing
from moe_lab.viz.charts import DASHES, MARKERS
from moe_lab.viz.picture import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SERIES,
    SKY,
    STYLE,
    VERMILLION,
    Picture,
    new_axes,
)

EXPERT_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
PALE, SMALL = 0.30, 8.5
PITCH, BOX = 1.0, 0.78  # from one row to the next, and the height of a row's box
TOKEN_GAP, EXPERT_GAP = 0.45, 0.75


def expert_colour(expert: int) -> str:
    """The colour of an expert in the drawings of this module."""
    return EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]


# --- what is drawn, as plain numbers ------------------------------------------------------------------------------


def rows_of_experts(plan: DispatchPlan) -> list[list[int | None]]:
    """The token in each row of each expert; None in an empty row."""
    n_tokens, ends = len(plan.choice_rows), plan.offsets.tolist()
    tokens = [token if token < n_tokens else None for token in plan.row_tokens.tolist()]
    return [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items)) or "none"


def _trip_in_words(plan: DispatchPlan) -> str:
    """Who goes where, for the alt text."""
    parts = []
    for expert, rows in enumerate(rows_of_experts(plan)):
        tokens = [token for token in rows if token is not None]
        empty = len(rows) - len(tokens)
        spare = f" and {empty} empty {'row' if empty == 1 else 'rows'}" if empty else ""
        parts.append(f"expert {expert} has {'tokens ' + _listed(tokens) if tokens else 'no tokens'}{spare}")
    dropped = [f"slot {slot} of token {token}" for token, slot in plan.dropped.nonzero().tolist()]
    return "; ".join(parts) + (f". Dropped: {_listed(dropped)}." if dropped else ".")


# --- the sort -----------------------------------------------------------------------------------------------------


def draw_sort(routing: Routing, plan: DispatchPlan) -> Picture:
    """All choices in a line, and the same choices sorted by expert: who lands where, and where each expert's end."""
    experts = routing.topk_experts
    n_tokens, top_k = experts.shape
    chosen, rows, ends = experts.flatten().tolist(), plan.choice_rows.flatten().tolist(), plan.offsets.tolist()
    heights = {"choice_rows": 5.15, "choice": 4.55, "its expert": 3.85, "sorted by expert": 0.4}
    heights |= {"row": -0.35, "row_choices": -0.95, "offsets": -1.95}
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(9.6, 3.9)
        axes.set(xlim=(-2.6, len(chosen) + 0.1), ylim=(-2.3, 6.35))
        axes.axis("off")
        for name, y in heights.items():
            axes.text(-0.25, y, name, ha="right", va="center", fontsize=9.5)
        for token in range(n_tokens):
            left, right = token * top_k + 0.08, (token + 1) * top_k - 0.08
            axes.plot([left, left, right, right], [5.6, 5.7, 5.7, 5.6], color=INK, linewidth=1)
            axes.text((left + right) / 2, 6.05, f"token {token}", ha="center", va="center", fontsize=9.5)
        for choice, (expert, row) in enumerate(zip(chosen, rows, strict=True)):
            for place, name in ((choice, "its expert"), (row, "sorted by expert")):
                _cell(axes, place, heights[name], f"{expert}", expert)
            for place, name, number in (
                (choice, "choice_rows", row),
                (choice, "choice", choice),
                (row, "row", row),
                (row, "row_choices", choice),
            ):
                weight = "bold" if "_" in name else "normal"
                axes.text(
                    place + 0.5, heights[name], f"{number}", ha="center", va="center", fontsize=9.5, weight=weight
                )
            _curve(axes, (choice + 0.5, 3.38), (row + 0.5, 0.86), expert_colour(expert), upright=True)
        for end in sorted(set(ends)):
            axes.plot([end, end], [-1.6, 0.95], color=INK, linewidth=1.3, linestyle=(0, (3, 2)))
            owners = " and ".join(f"{end} (expert {expert})" for expert, its_end in enumerate(ends) if its_end == end)
            axes.text(min(end, len(chosen) - 0.75), heights["offsets"], owners, ha="center", va="center", fontsize=9.5)
        return Picture(
            figure,
            f"Above, {len(chosen)} choices in the order of their tokens, each with its expert: {_listed(chosen)}. "
            f"Below, the same sorted by expert; the rows carry the choices {_listed(plan.row_choices.tolist())}. The "
            f"experts' rows end at {_listed(ends)}.",
        )


def _cell(axes: Axes, x: float, y: float, text: str, expert: int) -> None:
    colour = expert_colour(expert)
    axes.add_patch(Rectangle((x + 0.05, y - 0.4), 0.9, 0.8, facecolor=(colour, PALE), edgecolor=colour, linewidth=1.6))
    axes.text(x + 0.5, y, text, ha="center", va="center", fontsize=10.5)


# --- the trip -----------------------------------------------------------------------------------------------------


def draw_dispatch(routing: Routing, plan: DispatchPlan, *, back: bool = True, gradients: bool = False) -> Picture:
    """Tokens on their way to the rows of their experts, and back.

    Args:
        back: draw the way back too; without it the drawing ends at the rows.
        gradients: draw the backward pass, every arrow turned round.
    """
    experts, weights = routing.topk_experts.tolist(), routing.topk_weights.tolist()
    rows, dropped = plan.choice_rows.tolist(), plan.dropped.tolist()
    groups = rows_of_experts(plan)
    choice_y, token_y, left_height = _stacked([len(slots) for slots in experts], TOKEN_GAP)
    row_y, expert_y, right_height = _stacked([max(len(group), 0.8) for group in groups], EXPERT_GAP)
    height = max(left_height, right_height)
    choice_y, token_y = (_lowered(places, height - left_height) for places in (choice_y, token_y))
    row_y, expert_y = (_lowered(places, height - right_height) for places in (row_y, expert_y))
    heads = _heads(back, gradients, plan)

    with mpl.rc_context(STYLE):
        right = 15.2 if back else 7.6
        figure, axes = new_axes(0.63 * right, 0.36 * height + 0.75)
        axes.set(xlim=(-0.1, right), ylim=(-height - 0.1, 1.6))
        axes.axis("off")
        for x, text in heads:
            axes.text(x, 1.0, text, ha="center", va="center", fontsize=9.5, linespacing=1.15)
        sides = [(0.0, 1.25, 2.35, 4.6)] + ([(15.0, 13.75, 12.6, 10.4)] if back else [])
        for side, (edge, token_end, choice_end, row_end) in enumerate(sides):
            for token, slots in enumerate(experts):
                _between(axes, edge, token_end, token_y[token], BOX + PITCH * (len(slots) - 1), f"token {token}", GREY)
                for slot, expert in enumerate(slots):
                    y, colour = choice_y[token][slot], expert_colour(expert)
                    lost = dropped[token][slot]
                    label = f"expert {expert}" if side == 0 else f"× {weights[token][slot]:g}"
                    if lost:
                        label = f"{expert} is full" if side == 0 else "dropped"
                    _between(axes, token_end, choice_end, y, BOX, label, colour, faint=lost)
                    if lost:
                        continue
                    start, end = (choice_end, y), (row_end, row_y_of(row_y, groups, rows[token][slot]))
                    inwards = (side == 0) != gradients
                    _curve(axes, *((start, end) if inwards else (end, start)), colour)
            for expert, group in enumerate(groups):
                for place, token in enumerate(group):
                    name = "empty" if token is None else f"token {token}"
                    inner = row_end + (1.25 if side == 0 else -1.25)
                    y = row_y[expert][place]
                    _between(axes, row_end, inner, y, BOX, name, expert_colour(expert), faint=token is None)
        for expert, group in enumerate(groups):
            size = BOX + PITCH * (max(len(group), 1) - 1)
            _expert(axes, expert, group, expert_y[expert], size, back, gradients)
        return Picture(figure, _trip_alt(plan, back, gradients))


def row_y_of(row_y: list[list[float]], groups: list[list], row: int) -> float:
    """The height at which a row is drawn."""
    for places, group in zip(row_y, groups, strict=True):
        if row < len(group):
            return places[row]
        row -= len(group)
    raise AssertionError("no such row")


def _stacked(sizes: Sequence[float], gap: float) -> tuple[list[list[float]], list[float], float]:
    """Groups of items below each other: the height of every item, of every group's middle, and of all."""
    items, middles, top = [], [], 0.0
    for size in sizes:
        items.append([-(top + PITCH * (place + 0.5)) for place in range(int(size))])
        middles.append(-(top + PITCH * size / 2))
        top += PITCH * size + gap
    return items, middles, top - gap


def _lowered(places: list, room: float) -> list:
    """The same places, centred in a taller column."""
    return [_lowered(place, room) if isinstance(place, list) else place - room / 2 for place in places]


def _heads(back: bool, gradients: bool, plan: DispatchPlan) -> list[tuple[float, str]]:
    rows = "rows, sorted\nby expert" if plan.capacity is None else f"rows, {plan.capacity}\nper expert"
    if not back:
        return [(0.62, "tokens"), (1.8, "choices"), (3.5, "permute:\ncopy"), (5.25, rows)]
    if gradients:
        return [
            (0.62, "gradient\nof x"),
            (3.5, "permute's backward:\nsum, as in combine"),
            (7.5, "experts'\nbackward"),
            (11.5, "combine's backward:\ncopy, as in permute"),
            (14.4, "gradient\nof y"),
        ]
    return [
        (0.62, "tokens x"),
        (1.8, "choices"),
        (3.5, "permute:\ncopy"),
        (5.25, rows),
        (7.5, "grouped\nproduct"),
        (9.75, "their\noutputs"),
        (11.5, "combine:\nweigh and sum"),
        (14.4, "tokens y"),
    ]


def _trip_alt(plan: DispatchPlan, back: bool, gradients: bool) -> str:
    words = _trip_in_words(plan)
    if gradients:
        return (
            "The same drawing with every arrow turned round: gradients of y are copied into rows and pass the experts, "
            f"and those of a token's rows are summed into the gradient of x. As before, {words}"
        )
    start = "Tokens on the left; each choice has an arrow to its row, and rows stand sorted by expert"
    way_back = " On the right each row's output goes back to its token, where it is weighed and summed."
    return f"{start}: {words}{way_back if back else ''}"


def _between(
    axes: Axes, one: float, other: float, y: float, height: float, text: str, colour: str, faint: bool = False
) -> None:
    """A box from one x to another, round `y`; a faint one is dashed and white."""
    left, width = min(one, other) + 0.06, abs(other - one) - 0.12
    axes.add_patch(
        FancyBboxPatch(
            (left, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor="white" if faint else (colour, PALE),
            edgecolor=colour,
            linewidth=1.1 if faint else 1.4,
            linestyle=(0, (2, 2)) if faint else "-",
        )
    )
    axes.text(left + width / 2, y, text, ha="center", va="center", fontsize=SMALL, color="#6A6A6A" if faint else INK)


def _expert(axes: Axes, expert: int, group: list, y: float, size: float, back: bool, gradients: bool) -> None:
    left, right = 6.35, 8.65
    if not back:  # a bracket beside the rows names their expert
        axes.plot([6.0, 6.15, 6.15, 6.0], [y + size / 2, y + size / 2, y - size / 2, y - size / 2], color=INK, lw=1)
        axes.text(6.35, y, f"expert {expert}", va="center", fontsize=9.5)
        return
    name = f"expert {expert}" if group else f"expert {expert}: no rows"
    _between(axes, left, right, y, size, name, expert_colour(expert), faint=not group)
    for place in range(len(group)):
        row = y + size / 2 - BOX / 2 - PITCH * place
        for start, end in ((5.85, left), (right, 9.15)):
            _curve(
                axes, *(((end, row), (start, row)) if gradients else ((start, row), (end, row))), expert_colour(expert)
            )


def _curve(axes: Axes, start: tuple, end: tuple, colour: str, upright: bool = False) -> None:
    """An arrow that leaves and arrives level, or upright."""
    (x0, y0), (x1, y1) = start, end
    bends = [(x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2)] if upright else [((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1)]
    path = Path([start, *bends, end], [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    axes.add_patch(
        FancyArrowPatch(
            path=path, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=1.5, shrinkA=0, shrinkB=0
        )
    )


# --- the room it takes --------------------------------------------------------------------------------------------


def draw_layouts(plan: DispatchPlan) -> Picture:
    """The rows of a plan as they are, and padded to the fullest expert: an expert a line, empty places hatched."""
    sorted_rows = rows_of_experts(plan)
    widest = max(map(len, sorted_rows))
    padded = [[*rows, *[None] * (widest - len(rows))] for rows in sorted_rows]
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(7.6, 0.36 * len(padded) + 0.9)
        axes.set(xlim=(-1.7, 2 * widest + 1.5), ylim=(len(padded) + 0.1, -1.6))
        axes.axis("off")
        for expert in range(len(padded)):
            axes.text(-0.25, expert + 0.5, f"expert {expert}", ha="right", va="center", fontsize=9.5)
        words = []
        layouts = {"sorted": sorted_rows, "padded to the fullest": padded}
        for panel, (name, groups) in enumerate(layouts.items()):
            left = panel * (widest + 1.2)
            empty = sum(row is None for rows in groups for row in rows)
            counts = f"{sum(map(len, groups))} rows" + (f", {empty} empty" if empty else "")
            axes.text(left, -1.15, name, va="center", fontsize=10.5)
            axes.text(left, -0.5, counts, va="center", fontsize=9.5)
            words.append(f"{name}: {counts}")
            for expert, rows in enumerate(groups):
                for place, token in enumerate(rows):
                    _place(axes, left + place, expert, token, expert_colour(expert))
        return Picture(figure, f"The same choices laid out in two ways, a line for each expert. {'; '.join(words)}.")


def _place(axes: Axes, x: float, y: float, token: int | None, colour: str) -> None:
    look = {"facecolor": "white", "edgecolor": GREY, "hatch": "////", "linewidth": 0.8}
    if token is not None:
        look = {"facecolor": (colour, PALE), "edgecolor": colour, "linewidth": 1.4}
        axes.text(x + 0.5, y + 0.5, f"{token}", ha="center", va="center", fontsize=9)
    axes.add_patch(Rectangle((x + 0.05, y + 0.08), 0.9, 0.84, **look))


# --- what is measured ---------------------------------------------------------------------------------------------


def growth(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    alt: str,
    levels: Mapping[str, float] | None = None,
    order: Sequence[str] = (),
) -> Picture:
    """Curves over doublings: both axes are logarithmic, so that a straight line is a power.

    `levels` are dotted horizontal lines with a name. `order` lists names whose curves shall look the same in several
    figures; by default looks go by place.
    """
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(height=3.8 if len(series) <= 3 else 4.3)
        places = {name: place for place, name in enumerate(order or series)}
        for name, (xs, ys) in series.items():
            i = places[name]
            style = {"linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(xs, ys, color=SERIES[i % len(SERIES)], label=name, **style)
        for name, level in (levels or {}).items():
            axes.axhline(level, color=INK, linewidth=1, linestyle=":")
            axes.annotate(name, (1.01, level), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sorted({value for xs, _ in series.values() for value in xs}))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        if len(series) > 3:  # no corner is large enough
            figure.legend(loc="outside lower center", ncols=3, fontsize=9)
        else:
            axes.legend(fontsize=9)
        axes.set(title=title, xlabel=x, ylabel=y)
        return Picture(figure, alt)
