"""Pictures of routing: its two ways to the output, one token's choice, groups, and the explorer of one token's choice.

Chosen experts are filled in orange with a dark edge; the others are pale with a dashed one.
"""

from collections.abc import Mapping, Sequence

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from moe_lab.config import SCORES, RouterConfig
from moe_lab.records import Routing
from moe_lab.routing import best_k, limit_groups, route
from moe_lab.viz.diagrams import _arrow, _box, _canvas, _plus
from moe_lab.viz.explorer import Explorer
from moe_lab.viz.picture import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, STYLE, VERMILLION, Picture, new_axes

PALE = 0.25
CHOSEN = {"facecolor": ORANGE, "edgecolor": INK, "linewidth": 1.6}
PASSED_OVER = {"facecolor": (GREY, PALE), "edgecolor": GREY, "linewidth": 1.1, "linestyle": "--"}


def _listed(items: Sequence[object]) -> str:
    """`0`, `0 and 2`, `0, 2 and 3`."""
    texts = [str(item) for item in items]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


# --- the two ways from a router to the output ---------------------------------------------------------------------


def draw_router(learning: bool = True) -> Picture:
    """Token, logits, scores; from there the choice and the weights.

    While `learning`, also the way back: the choice has no slope, the weights bring the gradient.
    """
    back = {"color": VERMILLION, "linestyle": (0, (4, 2)), "linewidth": 1.7}
    logits, scores, chosen = (4, 0, 2, -2), ("0.86", "0.02", "0.12", "0.00"), (0, 2)
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(9.2, 3.6, 13.6, 5.0)
        axes.text(0.05, 2.5, "token\nx", va="center", ha="left")
        _arrow(axes, (0.75, 2.5), (1.05, 2.5))
        _box(axes, 1.75, 2.5, "router\n(E, D)", PURPLE, 1.3, 0.9)
        _arrow(axes, (2.45, 2.5), (2.8, 2.5))
        _column(axes, 3.2, "logits", logits, chosen)
        _arrow(axes, (3.6, 2.5), (3.95, 2.5))
        _box(axes, 4.6, 2.5, "score", GREEN, 1.1)
        _arrow(axes, (5.2, 2.5), (5.5, 2.5))
        _column(axes, 5.95, "scores", scores, chosen)

        _arrow(axes, (6.4, 3.0), (6.85, 3.75))
        _box(axes, 7.7, 3.95, "choose k", GREY, 1.5)
        _arrow(axes, (6.4, 2.0), (6.85, 1.25))
        _box(axes, 7.7, 1.05, "weigh", GREEN, 1.5)
        for expert in range(4):
            y, is_chosen = 4.65 - 0.62 * expert, expert in chosen
            _box(axes, 10.35, y, f"expert {expert}", ORANGE if is_chosen else GREY, 1.5, 0.44, size=9.5)
            if is_chosen:
                _arrow(axes, (8.5, 3.95), (9.55, y))
                _arrow(axes, (11.15, y), (12.0, 2.62))
            else:
                axes.plot([8.5, 9.55], [3.95, y], color=GREY, linewidth=1, linestyle=":")
        _arrow(axes, (8.5, 1.05), (11.98, 2.32))
        _plus(axes, 12.2, 2.47, "×")
        _arrow(axes, (12.42, 2.47), (12.85, 2.47))
        axes.text(12.95, 2.47, "sum, y", va="center")

        forward = (
            "From left to right: a token, the router, four logits, four scores. From the scores two ways lead on. The "
            "upper one chooses experts 0 and 2. The lower one makes weights, which multiply the outputs of the chosen."
        )
        if not learning:
            return Picture(figure, forward)
        axes.text(9.35, 1.72, "0.88, 0.12", fontsize=9.5, ha="center", rotation=17)
        _arrow(axes, (12.2, 2.2), (8.5, 0.75), bend=-0.25, **back)
        _arrow(axes, (6.85, 0.85), (5.95, 1.44), bend=-0.25, **back)
        _arrow(axes, (5.6, 1.62), (3.55, 1.62), **back)
        _arrow(axes, (2.86, 1.62), (1.75, 2.02), bend=-0.2, **back)
        axes.text(10.0, 0.42, "the gradient comes back this way", fontsize=9.5, color=VERMILLION, ha="left")
        axes.text(7.7, 4.62, "no slope: nothing comes back", fontsize=9.5, color=VERMILLION, ha="center")
        return Picture(
            figure,
            f"{forward} Nothing comes back through the choice. The gradient comes back through the weights, 0.88 and "
            "0.12, to the scores, the logits and the router.",
        )


def _column(axes: Axes, x: float, name: str, values: Sequence[object], chosen: Sequence[int]) -> None:
    axes.text(x, 4.0, name, ha="center", va="center", fontsize=10)
    for expert, value in enumerate(values):
        y = 3.55 - 0.62 * expert
        colour = ORANGE if expert in chosen else GREY
        _box(axes, x, y, f"{value}", colour, 0.62, 0.44, size=9.5)


# --- one token's choice -------------------------------------------------------------------------------------------


def draw_token(routing: Routing, token: int = 0, title: str = "One token's choice") -> Picture:
    """The logits, scores and weights of one token, expert by expert; the chosen ones are filled."""
    logits, scores = (values[token].tolist() for values in (routing.router_logits, routing.router_scores))
    weights, chosen = routing.dense_weights[token].tolist(), routing.topk_experts[token].tolist()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.8, 3.2), layout="constrained")
        figure.get_layout_engine().set(wspace=0.07)
        panels = figure.subplots(1, 3)
        top = 1.16 * max(1.0, *scores, *weights)
        _bars(panels[0], "logits", logits, chosen, "{:.1f}")
        _bars(panels[1], f"scores, sum {sum(scores):.2f}", scores, chosen, "{:.2f}", top)
        _bars(panels[2], f"weights, sum {sum(weights):.2f}", weights, chosen, "{:.2f}", top, only_chosen=True)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        named = ", ".join(f"expert {expert} with weight {weights[expert]:.2f}" for expert in chosen)
        return Picture(
            figure,
            f"Three rows of bars for {len(logits)} experts. Logits: {', '.join(f'{v:.1f}' for v in logits)}. Scores: "
            f"{', '.join(f'{v:.2f}' for v in scores)}. Chosen, the best first: {named}.",
        )


def _bars(
    axes: Axes,
    name: str,
    values: Sequence[float],
    chosen: Sequence[int],
    number: str,
    top: float | None = None,
    only_chosen: bool = False,
) -> None:
    for expert, value in enumerate(values):
        if only_chosen and expert not in chosen:
            continue
        axes.bar(expert, value, **(CHOSEN if expert in chosen else PASSED_OVER))
        place = {"ha": "center", "va": "bottom" if value >= 0 else "top", "fontsize": 9}
        text = number.format(value).replace("-", "−")
        axes.annotate(text, (expert, value), (0, 2 if value >= 0 else -2), **_OFFSET, **place)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(title=name, xlabel="expert", xticks=range(len(values)), xlim=(-0.6, len(values) - 0.4))
    axes.title.set_fontsize(10.5)
    for expert in chosen:
        axes.get_xticklabels()[expert].set_weight("bold")
    axes.set_ylim((0, top) if top else _with_room(values))


_OFFSET = {"textcoords": "offset points"}


def _with_room(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.16 * max(high - low, 1.0)
    return low - room * (low < 0), high + room


class RouterExplorer(Explorer):
    """One token and five experts: sliders for the logits, and every choice that a router makes of them."""

    N_EXPERTS = 5

    def __init__(self) -> None:
        wide = {"style": {"description_width": "7.5em"}, "layout": {"width": "24.5em"}, "continuous_update": False}
        logits = {
            f"expert_{expert}": widgets.FloatSlider(
                start, min=-4, max=4, step=0.5, description=f"expert {expert}", **wide
            )
            for expert, start in enumerate((2.0, 1.0, 0.5, -1.0, 0.0))
        }
        rule = {
            "k": widgets.IntSlider(2, 1, self.N_EXPERTS, description="k", **wide),
            "temperature": widgets.FloatSlider(1, min=0.25, max=4, step=0.25, description="temperature", **wide),
            "score": widgets.ToggleButtons(options=SCORES, description="score", style={"button_width": "7em"}),
            "normalise": widgets.Checkbox(True, description="normalise the weights", indent=False),
        }
        super().__init__(logits | rule)
        columns = [widgets.VBox([self.sliders[name] for name in part]) for part in (logits, rule)]
        self.view = widgets.VBox([widgets.HBox(columns), self.image, self.caption])

    @classmethod
    def routing(cls, k: int, temperature: float, score: str, normalise: bool, **logits: float) -> Routing:
        """What a router makes of these logits, divided by the temperature."""
        config = RouterConfig(d_model=1, n_experts=cls.N_EXPERTS, top_k=k, score=score, normalise=normalise)
        row = torch.tensor([[logits[f"expert_{expert}"] for expert in range(cls.N_EXPERTS)]])
        return route(row / temperature, config)

    def draw(self, **values: float) -> Picture:
        """Three rows of bars: the logits, the scores of all experts, and the weights of the chosen."""
        scaling = "" if values["temperature"] == 1 else f", logits divided by {values['temperature']:g}"
        rule = f"{values['score']}, {'normalised' if values['normalise'] else 'not normalised'}"
        return draw_token(self.routing(**values), title=f"k = {values['k']}, {rule}{scaling}")


# --- matrices side by side ----------------------------------------------------------------------------------------


def heatmaps(
    matrices: Mapping[str, Sequence[Sequence[float]] | Tensor],
    *,
    title: str,
    x: str,
    y: str,
    alt: str,
    colour: str,
    rows: Sequence[str] | None = None,
    signed: bool = False,
    numbers: bool = False,
) -> Picture:
    """Matrices side by side, in one scale of shades; `rows` names the rows, `signed` centres white on zero."""
    grids = {name: np.asarray(matrix, dtype=float) for name, matrix in matrices.items()}
    limit = max(float(np.abs(grid).max()) for grid in grids.values()) or 1.0
    n_rows = max(len(grid) for grid in grids.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.75 + 0.3 * n_rows), layout="constrained")
        figure.get_layout_engine().set(wspace=0.05)
        panels = figure.subplots(1, len(grids), squeeze=False)[0]
        for panel, (name, grid) in zip(panels, grids.items(), strict=True):
            low = -limit if signed else 0
            cmap = "PuOr" if signed else "Blues"
            image = panel.imshow(grid, cmap=cmap, vmin=low, vmax=limit, aspect="auto", interpolation="nearest")
            panel.set(title=name, xlabel=x, xticks=range(grid.shape[1]), yticks=range(grid.shape[0]))
            if rows is not None:
                panel.set_yticks(range(len(grid)), rows[: len(grid)])
            panel.title.set_fontsize(10)
            panel.spines[:].set_visible(True)
            for (i, j), value in np.ndenumerate(grid) if numbers else ():
                ink = "white" if abs(value) > 0.6 * limit else INK
                text = "0" if value == 0 else f"{value:.2f}".replace("-", "−")
                panel.text(j, i, text, ha="center", va="center", fontsize=8.5, color=ink)
        panels[0].set_ylabel(y)
        figure.colorbar(image, ax=list(panels), label=colour)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        return Picture(figure, alt)


# --- groups -------------------------------------------------------------------------------------------------------


def worth_of_groups(scores: Tensor, n_groups: int, group_score: str) -> Tensor:
    """What each group of a token's experts is worth, (E,) to (n_groups,)."""
    return scores.unflatten(-1, (n_groups, -1)).topk(1 if group_score == "max" else 2, dim=-1).values.sum(-1)


def draw_groups(scores: Tensor, n_groups: int, groups_kept: int, top_k: int) -> Picture:
    """One token's scores (E,) in groups: which groups and experts are chosen by either rule of DeepSeek's."""
    rules = {"max": "a group is worth its best score", "top2_sum": "a group is worth its two best scores"}
    size, told = len(scores) // n_groups, []
    with mpl.rc_context(STYLE):
        figure, _ = new_axes(9.4, 4.6)
        figure.clear()
        panels = figure.subplots(len(rules), 1, sharex=True)
        for axes, (rule, meaning) in zip(panels, rules.items(), strict=True):
            limited = limit_groups(scores[None], n_groups, groups_kept, rule)
            kept = [group for group in range(n_groups) if limited[0, group * size].isfinite()]
            chosen, worth = best_k(limited, top_k)[0].tolist(), worth_of_groups(scores, n_groups, rule).tolist()
            for group in range(n_groups):
                left, is_kept = group * size - 0.5, group in kept
                look = {"facecolor": (BLUE, 0.13)} if is_kept else {"facecolor": "white"}
                axes.axvspan(left + 0.04, left + size - 0.04, edgecolor=GREY, linewidth=1, **look)
                name = f"group {group}: worth {worth[group]:.2f}{', kept' if is_kept else ''}"
                axes.text(left + size / 2, 1.13, name, ha="center", va="center", fontsize=9.5)
            for expert, value in enumerate(scores.tolist()):
                axes.bar(expert, value, width=0.7, **(CHOSEN if expert in chosen else PASSED_OVER))
                axes.annotate(f"{value:.1f}", (expert, value), (0, 2), ha="center", va="bottom", fontsize=9, **_OFFSET)
            axes.set(title=meaning, ylabel="score", ylim=(0, 1.25), xticks=range(len(scores)))
            axes.set_xlim(-0.6, len(scores) - 0.4)
            axes.title.set_fontsize(10.5)
            told.append(f"If {meaning}, groups {_listed(kept)} are kept and experts {_listed(sorted(chosen))} chosen.")
        panels[-1].set_xlabel("expert")
        return Picture(figure, f"Bars of {len(scores)} scores in {n_groups} groups, twice. {' '.join(told)}")
