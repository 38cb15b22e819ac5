"""Where tokens go in a layer of experts: drawn for a few tokens, and live for a sentence."""

from collections.abc import Sequence

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from moe_lab.checkpoints import load_shipped_model
from moe_lab.lm import LM
from moe_lab.records import Routing
from moe_lab.viz.diagrams import PALE, _box, _canvas
from moe_lab.viz.dispatching import expert_colour
from moe_lab.viz.explorer import Explorer
from moe_lab.viz.picture import GREY, INK, STYLE, VERMILLION, Picture, new_axes

MAX_VISITS = 32  # more lines than these cannot be followed
FEWEST_COLUMNS = 12  # a single token shall not fill the width


def draw_visits(routing: Routing, *, highlight: int | None = None) -> Picture:
    """Tokens on the left, each with a copy to its experts; on the right, what comes back, as thick as its weight.

    With `highlight`, one expert's turn: its lines in colour with their weights, the others pale.

    Raises:
        ValueError: more visits than can be followed by eye, or an expert that does not exist.
    """
    n_tokens, top_k = routing.topk_experts.shape
    n_experts = routing.n_experts
    if n_tokens * top_k > MAX_VISITS:
        raise ValueError(f"{n_tokens} tokens with {top_k} experts each: expected at most {MAX_VISITS} visits to draw.")
    if highlight is not None and not 0 <= highlight < n_experts:
        raise ValueError(f"highlight={highlight}: expected an expert from 0 to {n_experts - 1}.")
    visits = [  # (token, expert, weight)
        (t, e, w)
        for t, (experts, weights) in enumerate(
            zip(routing.topk_experts.tolist(), routing.topk_weights.tolist(), strict=True)
        )
        for e, w in zip(experts, weights, strict=True)
    ]
    counts = routing.tokens_per_expert.tolist()
    token_ys = np.linspace(4.35, 0.3, n_tokens)
    expert_ys = np.linspace(3.9, 0.75, n_experts)
    with mpl.rc_context(STYLE):
        figure, axes = _canvas(9.2, 4.0, 12.0, 5.2)
        for x, text in (
            (1.0, "a copy to each\nchosen expert"),
            (6.0, "the expert works"),
            (11.0, "times the weight,\nsummed"),
        ):
            axes.text(x, 5.0, text, ha="center", va="center", fontsize=9.5)
        for t, e, w in visits:
            shown = highlight in (None, e)
            colour = expert_colour(e) if shown else GREY
            look = {"color": colour, "alpha": 0.85 if shown else 0.3, "solid_capstyle": "butt"}
            axes.plot([1.25, 5.1], [token_ys[t], expert_ys[e]], linewidth=1.2, **look)
            axes.plot([6.9, 10.75], [expert_ys[e], token_ys[t]], linewidth=0.5 + 5 * w, **look)
            if e == highlight:
                _weight_label(axes, w, start=(6.9, expert_ys[e]), end=(10.75, token_ys[t]))
        for t, y in enumerate(token_ys):
            for x, name in ((1.0, f"token {t}"), (11.0, f"y[{t}]")):
                end = "right" if x < 6 else "left"
                axes.plot(x + (0.12 if end == "right" else -0.12), y, "o", color=INK, markersize=4)
                axes.text(x - (0.1 if end == "right" else -0.1), y, name, ha=end, va="center", fontsize=9.5)
        for e, y in enumerate(expert_ys):
            plain = counts[e] == 0 or highlight not in (None, e)
            colour = GREY if plain else expert_colour(e)
            many = _tokens(counts[e]) if counts[e] else "nobody"
            _box(axes, 6.0, y, f"expert {e}\n{many}", colour, 1.75, 0.66, size=9.5, pale=PALE)
        return Picture(figure, _visits_alt(routing, highlight))


def _weight_label(axes: Axes, weight: float, start: tuple[float, float], end: tuple[float, float]) -> None:
    """The weight on its line, near the token, where the lines are apart."""
    along = 0.82
    x, y = (a + along * (b - a) for a, b in zip(start, end, strict=True))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    axes.text(x, y, f"× {weight:.3g}", ha="center", va="center", fontsize=8.5, bbox=box, color=INK)


def _visits_alt(routing: Routing, highlight: int | None) -> str:
    if highlight is not None:
        tokens = (routing.topk_experts == highlight).any(1).nonzero().flatten().tolist()
        went = (
            f"receives a copy of tokens {', '.join(map(str, tokens))}, and sends each a result back, multiplied by its "
            "weight"
            if tokens
            else "receives no token, and sends nothing back"
        )
        return f"One turn of the loop. Expert {highlight} {went}; the lines of all other experts are pale."
    ways = "; ".join(
        f"token {t} to {' and '.join(map(str, experts))}" for t, experts in enumerate(routing.topk_experts.tolist())
    )
    empty = [str(e) for e, count in enumerate(routing.tokens_per_expert.tolist()) if count == 0]
    nobody = f" Nobody goes to expert {', '.join(empty)}." if empty else ""
    return f"Lines from tokens to experts, and back: {ways}.{nobody} The thicker a line back, the larger its weight."


def draw_routing(routing: Routing, names: Sequence[str], *, title: str, alt: str, note: str = "") -> Picture:
    """Every token's way: shades for its scores of all experts, a frame and a weight where it goes; beside it the load.

    Weights are in hundredths. `names` are the tokens', in order; `note` stands below.
    """
    scores = routing.router_scores.detach().T.numpy()  # (E, T)
    n_experts, n_tokens = scores.shape
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(9.6, 1.9 + 0.3 * n_experts)
        image = axes.imshow(scores, cmap="Blues", vmin=0, vmax=max(0.5, scores.max()), aspect="auto")
        for t, (experts, weights) in enumerate(
            zip(routing.topk_experts.tolist(), routing.topk_weights.tolist(), strict=True)
        ):
            for e, w in zip(experts, weights, strict=True):
                axes.add_patch(
                    Rectangle((t - 0.47, e - 0.46), 0.94, 0.92, fill=False, edgecolor=VERMILLION, linewidth=1.6)
                )
                ink = "white" if scores[e, t] > 0.55 * image.get_clim()[1] else INK
                axes.text(t, e, f"{100 * w:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set_xticks(range(n_tokens), names, fontfamily="monospace")
        axes.set_xlim(-0.5, max(n_tokens, FEWEST_COLUMNS) - 0.5)
        axes.set_yticks(range(n_experts), range(n_experts))
        axes.tick_params(length=0)
        axes.set(title=title, xlabel="token (a byte), in reading order", ylabel="expert")
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        figure.colorbar(image, ax=axes, label="router's score", pad=0.09)
        _write_loads(axes, routing.tokens_per_expert.tolist())
        if note:
            figure.supxlabel(note, fontsize=9.5, ha="left", x=0.01)
        return Picture(figure, alt)


def _write_loads(axes: Axes, counts: Sequence[int]) -> None:
    """How many tokens chose each expert: a number and a bar, right of the grid."""
    # in units of the axes' width, so that the bars do not stretch the grid
    place = axes.get_yaxis_transform()
    longest = max([*counts, 1])
    for e, count in enumerate(counts):
        axes.text(1.035, e, str(count), transform=place, ha="right", va="center", fontsize=9, clip_on=False)
        bar = Rectangle(
            (1.042, e - 0.3), 0.075 * count / longest, 0.6, transform=place, color=VERMILLION, clip_on=False
        )
        axes.add_patch(bar)
    axes.text(1.01, -0.75, "tokens", transform=place, ha="left", va="bottom", fontsize=9, clip_on=False)


def byte_names(ids: Sequence[int]) -> list[str]:
    """Bytes as axis labels: what can be printed as itself, spaces and line ends made visible, the rest in hex."""
    shown = {ord(" "): "␣", ord("\n"): "⏎"}
    return [shown.get(i) or (chr(i) if 33 <= i <= 126 else f"{i:02x}") for i in ids]


class TraceExplorer(Explorer):
    """Type a sentence: where does each of its tokens go, and with which weights?

    Args:
        model: an `LM` with layers of experts; by default the small trained one that comes with the course.
        about: what to tell about the model in the picture's title; by default "trained" for the course's own.
        text: what is traced at the start.

    Raises:
        ValueError: a model without experts.
    """

    MAX_TOKENS = 24  # more would be too small to read

    def __init__(
        self, model: LM | None = None, *, about: str | None = None, text: str = "The router sends a token"
    ) -> None:
        self.model = load_shipped_model("tiny_moe") if model is None else model
        self.about = about if about is not None else "trained" if model is None else "your model"
        moe = self.model.config.moe
        if moe is None:
            raise ValueError("The model has no experts: expected an LM whose config has a moe, as MOE_BASELINE has.")
        in_reach = moe.n_experts * moe.groups_kept // moe.n_groups
        wide = {"style": {"description_width": "6em"}, "layout": {"width": "36em"}, "continuous_update": False}
        n_layers = self.model.config.n_moe_layers
        super().__init__(
            {
                "text": widgets.Text(text, description="sentence", placeholder="type, then press Enter", **wide),
                "layer": widgets.IntSlider(1, 1, n_layers, description="layer", **wide),
                "top_k": widgets.IntSlider(moe.top_k, 1, in_reach, description="top_k", **wide),
            }
        )

    def route(self, ids: Sequence[int], layer: int, top_k: int) -> Routing:
        """How the layer routes these bytes, each token choosing `top_k` experts in every layer."""
        config = self.model.config
        with torch.device("meta"):  # nothing is drawn at random: the weights are the model's own
            same = LM(config.but(moe=config.moe.but(top_k=top_k, capacity_factor=None)))
        same.load_state_dict(self.model.state_dict(), assign=True)
        with torch.no_grad():
            tokens = torch.tensor([list(ids)], device=same.embedding.weight.device)
            routing = same.eval()(tokens)[1][layer - 1]
        parts = (routing.router_logits, routing.router_scores, routing.topk_weights, routing.topk_experts)
        return Routing(*(part.cpu() for part in parts))

    def draw(self, text: str, layer: int, top_k: int) -> Picture:
        """The grid of tokens and experts; without any text, a word on what to do."""
        everything = text.encode(errors="replace")
        ids = everything[: self.MAX_TOKENS]  # causal: what comes after them changes nothing
        if not ids:
            return _message("Type a sentence: each of its bytes is a token that goes to its experts.")
        routing = self.route(ids, layer, top_k)
        names = byte_names(ids)
        n_experts, n_layers = routing.n_experts, self.model.config.n_moe_layers
        hidden = f" Shown: the first {len(ids)} of {len(everything)} tokens." if len(ids) < len(everything) else ""
        return draw_routing(
            routing,
            names,
            title=f"Layer {layer} of {n_layers} ({self.about}): each token goes to {top_k} of {n_experts} experts",
            note=f"In a frame: the weight of a chosen expert, in hundredths.{hidden}",
            alt=_trace_alt(routing, names, layer) + hidden,
        )


def _message(text: str) -> Picture:
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(9.6, 1.2)
        axes.axis("off")
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=12)
        return Picture(figure, text)


def _trace_alt(routing: Routing, names: Sequence[str], layer: int) -> str:
    counts, first = routing.tokens_per_expert.tolist(), routing.topk_experts[0].tolist()
    ways = f"experts {', '.join(map(str, first))}" if len(first) > 1 else f"expert {first[0]}"
    most, least = max(counts), min(counts)
    loads = (
        f"Expert {counts.index(most)} is chosen most often, by {_tokens(most)}; expert {counts.index(least)} least, by "
        f"{_tokens(least)}."
        if most > least
        else f"Every expert is chosen by {_tokens(most)}."
    )
    return (
        f"A grid of {routing.n_experts} experts and {_tokens(len(names))} in layer {layer}: shades are the router's "
        f"scores, frames with weights the chosen experts. The first token, {names[0]}, goes to {ways}. {loads}"
    )


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"
