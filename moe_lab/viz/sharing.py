"""Pictures of experts cut finer, and of experts that every token visits.

Widths are drawn to scale: a layer is as wide as all of its hidden neurons. What a token uses is filled and has a dark
edge; shared experts stand first.
"""

from collections.abc import Mapping

import ipywidgets as widgets
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from moe_lab.accounting import combinations, cut_finer, expert_parameters, router_parameters, shared_expert_parameters
from moe_lab.config import MoEConfig
from moe_lab.viz.diagrams import _arrow, _box, _canvas, _plus
from moe_lab.viz.explorer import Explorer
from moe_lab.viz.picture import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, STYLE, Picture, new_axes

CHOSEN = {"facecolor": ORANGE, "edgecolor": INK, "linewidth": 1.2}
PASSED_OVER = {"facecolor": (GREY, 0.12), "edgecolor": GREY, "linewidth": 0.8}
SHARED = {"facecolor": BLUE, "edgecolor": INK, "linewidth": 1.2}
GOLDEN = 0.618034  # its multiples, modulo 1, spread a few choices over many experts
WIDTH, HEIGHT = 100.0, 0.52


def spread(n_experts: int, top_k: int) -> list[int]:
    """`top_k` of `n_experts` that could be one token's choice, the same every time."""
    return sorted(sorted(range(n_experts), key=lambda expert: (expert + 1) * GOLDEN % 1)[:top_k])


def pieces(moe: MoEConfig) -> list[tuple[float, float, str]]:
    """Every expert of a layer as (left, width, "shared" | "chosen" | "passed over"), in shares of the layer's width."""
    chosen = spread(moe.n_experts, moe.top_k)
    n_shared = moe.n_shared_experts
    widths = [moe.d_ff_shared / max(1, n_shared)] * n_shared + [moe.d_ff] * moe.n_experts
    kinds = ["shared"] * n_shared
    kinds += ["chosen" if expert in chosen else "passed over" for expert in range(moe.n_experts)]
    total, left, found = sum(widths), 0.0, []
    for width, kind in zip(widths, kinds, strict=True):
        found.append((left / total, width / total, kind))
        left += width
    return found


def _named(moe: MoEConfig) -> str:
    shared = f", and {moe.n_shared_experts} shared" if moe.n_shared_experts else ""
    return f"{moe.top_k} of {moe.n_experts}{shared}"


def _ways(moe: MoEConfig) -> str:
    return f"{combinations(moe):,} combinations"


def draw_cut(moe: MoEConfig, cuts: Mapping[str, tuple[int, int]], *, title: str = "What one token uses") -> Picture:
    """A layer cut in several ways, one under the other; what one token uses is filled.

    Args:
        cuts: by name, into how many pieces every expert is cut, and how many of all pieces are shared.
    """
    layers = {name: moe.but(**cut_finer(moe, m, n_shared)) for name, (m, n_shared) in cuts.items()}
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(9.4, 0.75 + 0.82 * len(layers))
        for row, (name, cut) in enumerate(layers.items()):
            _strip(axes, -row, cut)
            axes.text(0, HEIGHT / 2 + 0.06 - row, f"{name}: {_named(cut)}", va="bottom", fontsize=10)
        _legend(axes, any(cut.n_shared_experts for cut in layers.values()), -len(layers) + 0.45)
        axes.set(xlim=(-0.5, WIDTH + 0.5), ylim=(-len(layers) + 0.25, 0.62), title=title)
        axes.axis("off")
        told = "; ".join(f"{name}: {_named(cut)}" for name, cut in layers.items())
        return Picture(figure, f"Strips of equal length, each cut into the experts of a layer. {told}.")


def _strip(axes: Axes, y: float, moe: MoEConfig) -> None:
    looks = {"shared": SHARED, "chosen": CHOSEN, "passed over": PASSED_OVER}
    for left, width, kind in sorted(pieces(moe), key=lambda piece: piece[2] != "passed over"):  # dark edges on top
        axes.add_patch(Rectangle((WIDTH * left, y - HEIGHT / 2), WIDTH * width, HEIGHT, **looks[kind]))


def _legend(axes: Axes, with_shared: bool, y: float) -> None:
    entries = {"chosen by this token": CHOSEN, "passed over": PASSED_OVER}
    if with_shared:
        entries = {"shared: every token uses it": SHARED} | entries
    x = 0.0
    for name, look in entries.items():
        axes.add_patch(Rectangle((x, y - 0.09), 2, 0.18, **look))
        axes.text(x + 2.8, y, name, va="center", fontsize=9.5)
        x += 8 + 1.25 * len(name)


# --- the shared path ----------------------------------------------------------------------------------------------


def draw_shared_path(gated: bool = False) -> Picture:
    """The way of a token through routed experts, with weights, and through the shared one, without; or with a gate."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(9.2, 3.5 if gated else 2.9, 12.6, 4.8)
        if not gated:
            axes.set_ylim(bottom=4.8 * (1 - 2.9 / 3.5))  # nothing below the shared expert
        axes.text(0.1, 2.2, "token\nx", va="center")
        axes.plot(0.8, 2.18, "o", color=INK, markersize=5)
        _arrow(axes, (0.8, 2.18), (1.35, 3.05))
        _box(axes, 2.1, 3.2, "router", PURPLE, 1.4)
        for expert in range(3):
            y, chosen = 4.3 - 0.8 * expert, expert != 1
            _box(axes, 5.0, y, f"expert {expert}", ORANGE if chosen else GREY, 1.6, 0.5, size=9.5)
            if chosen:
                _arrow(axes, (2.85, 3.2), (4.15, y))
                axes.plot([5.85, 9.3], [y, y], color=INK, linewidth=1.4)
                _plus(axes, 7.6, y, "×")
                axes.text(7.6, y + 0.36, f"weight {'0.7' if expert == 0 else '0.3'}", ha="center", fontsize=9.5)
                _arrow(axes, (9.3, y), (10.4, 2.42 if expert == 0 else 2.3))
            else:
                axes.plot([2.85, 4.15], [3.2, y], color=GREY, linewidth=1, linestyle=":")
        _arrow(axes, (0.8, 2.18), (4.15, 1.2))
        _box(axes, 5.0, 1.2, "shared", BLUE, 1.6, 0.6)
        if gated:
            axes.plot([5.85, 9.3], [1.2, 1.2], color=INK, linewidth=1.4)
            _plus(axes, 7.6, 1.2, "×")
            _arrow(axes, (0.8, 2.18), (4.15, 0.35), bend=0.12)
            _box(axes, 5.0, 0.32, "gate", GREEN, 1.6, 0.46)
            _arrow(axes, (5.85, 0.32), (7.45, 1.03))
            axes.text(6.9, 0.3, "sigmoid: one number, 0 to 1", va="center", fontsize=9.5)
        else:
            axes.plot([5.85, 9.3], [1.2, 1.2], color=INK, linewidth=1.4)
            axes.text(7.6, 1.4, "no weight: it always counts in full", ha="center", fontsize=9.5)
        _arrow(axes, (9.3, 1.2), (10.4, 2.08))
        _plus(axes, 10.6, 2.25)
        _arrow(axes, (10.82, 2.25), (11.3, 2.25))
        axes.text(11.4, 2.25, "y", va="center")
        way = "times a gate: the sigmoid of one number made of the token" if gated else "without any weight"
        return Picture(
            figure,
            "A token goes two ways. Above, a router sends it to experts 0 and 2 of three, whose outputs are multiplied "
            f"by 0.7 and 0.3. Below, it goes to the shared expert, whose output is added {way}.",
        )


# --- the explorer -------------------------------------------------------------------------------------------------


class CutExplorer(Explorer):
    """Cut eight experts finer, and share some of the small ones: what stays, and what grows."""

    WHOLE = MoEConfig(d_model=64, d_ff=64, n_experts=8, top_k=2)
    CUTS = (1, 2, 4, 8, 16)

    def __init__(self) -> None:
        wide = {"style": {"description_width": "9em"}, "layout": {"width": "34em"}, "continuous_update": False}
        most = self.CUTS[-1] * self.WHOLE.top_k - 1
        super().__init__(
            {
                "m": widgets.SelectionSlider(options=self.CUTS, value=4, description="pieces an expert", **wide),
                "n_shared": widgets.IntSlider(2, 0, most, description="of them shared", **wide),
            }
        )

    @classmethod
    def layer(cls, m: int, n_shared: int) -> MoEConfig:
        """The layer at these values; of the pieces that a token uses, one at least stays routed."""
        return cls.WHOLE.but(**cut_finer(cls.WHOLE, m, min(n_shared, m * cls.WHOLE.top_k - 1)))

    def draw(self, m: int, n_shared: int) -> Picture:
        """The whole layer and the cut one, and below them what they hold and what a token uses."""
        cut = self.layer(m, n_shared)
        with mpl.rc_context(STYLE):
            figure, axes = new_axes(9.4, 3.4)
            for row, (name, moe) in enumerate({"whole": self.WHOLE, "cut": cut}.items()):
                _strip(axes, -row, moe)
                axes.text(0, HEIGHT / 2 + 0.06 - row, f"{name}: {_named(moe)}, each {moe.d_ff} wide", va="bottom")
                axes.text(WIDTH, HEIGHT / 2 + 0.06 - row, _ways(moe), va="bottom", ha="right")
            for i, (name, numbers) in enumerate(_bill(self.WHOLE, cut).items()):
                axes.text(0, -1.75 - 0.36 * i, name, va="center")
                axes.text(62, -1.75 - 0.36 * i, f"{numbers[0]:,}", va="center", ha="right")
                axes.text(80, -1.75 - 0.36 * i, f"{numbers[1]:,}", va="center", ha="right")
            for x, name in ((62, "whole"), (80, "cut")):
                axes.text(x, -1.42, name, va="center", ha="right", color=GREY)
            axes.set(xlim=(-0.5, WIDTH + 0.5), ylim=(-2.7, 0.62))
            axes.axis("off")
            told = "; ".join(f"{name} {a:,} and {b:,}" for name, (a, b) in _bill(self.WHOLE, cut).items())
            return Picture(
                figure,
                f"A layer with {_named(self.WHOLE)} experts, {_ways(self.WHOLE)}, and the same cut: {_named(cut)}, "
                f"each {cut.d_ff} wide, {_ways(cut)}. Whole and cut: {told}.",
            )


def _bill(*layers: MoEConfig) -> dict[str, list[int]]:
    """What a layer holds, and what a token uses of it."""

    def experts(moe: MoEConfig, n: int) -> int:
        return n * expert_parameters(moe) + shared_expert_parameters(moe)

    return {
        "parameters in experts": [experts(moe, moe.n_experts) for moe in layers],
        "of these a token uses": [experts(moe, moe.top_k) for moe in layers],
        "parameters in the router": [router_parameters(moe) for moe in layers],
    }
