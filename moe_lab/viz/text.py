"""A text in the colours of the experts that its bytes are sent to, layer by layer; and live, for a sentence."""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import ipywidgets as widgets
import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from moe_lab.checkpoints import load_shipped_model
from moe_lab.lm import LM
from moe_lab.records import Routing
from moe_lab.train import choices_of
from moe_lab.viz.dispatching import EXPERT_COLOURS
from moe_lab.viz.explorer import Explorer
from moe_lab.viz.picture import BLUE, INK, STYLE, Picture
from moe_lab.viz.tracing import _message

MAX_BYTES = 64  # of one text: as far back as the course's models were trained to look
ROW_BYTES, FEWEST_COLUMNS = 40, 24  # a longer text takes several rows; a shorter one shall not become a poster
# The course's colours of experts and Okabe and Ito's other two. More experts share them; the number tells.
COLOURS = (*EXPERT_COLOURS, "#F0E442", INK)
DARK = (BLUE, INK)  # what white letters are read on
SENTENCE = "She added 37+48=85 and wrote: Все люди"
VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}

WIDTH, MARGIN, POINTS = 9.6, 3.9, 72  # of the figure in inches; of the row labels in cells; points in an inch
BOX, STRIP, NAME = 1.55, 0.24, 1.0  # heights in cells: of a byte's box, of the second choice, of a text's name
GAP, BETWEEN_ROWS, BETWEEN_TEXTS = 0.04, 0.2, 0.75
HEAD, BARS, FOOT = 0.62, 1.25, 0.55  # heights in inches: of the title, of the bars, of what stands below them


@dataclass(frozen=True)
class Shown:
    """A character as it is drawn: what stands for it, and over which of the text's bytes."""

    label: str
    start: int
    length: int


def as_shown(text: str) -> list[Shown]:
    """The characters of a text over their UTF-8 bytes.

    Spaces and line ends are made visible. What the font cannot draw, or nobody could see, is named by its code point.
    """
    shown, start = [], 0
    for character in text:
        length = len(character.encode())
        shown.append(Shown(_label(character), start, length))
        start += length
    return shown


def _label(character: str) -> str:
    if character in VISIBLE:
        return VISIBLE[character]
    category = unicodedata.category(character)
    if ord(character) not in _drawable() or category[0] in "CZ":
        return f"{ord(character):02x}" if ord(character) < 128 else f"U+{ord(character):04X}"
    return f"◌{character}" if category.startswith("M") else character  # an accent needs something to stand on


@cache
def _drawable() -> frozenset[int]:
    """The code points that the course's font has: it ships with matplotlib, so they are the same everywhere."""
    return frozenset(FT2Font(findfont(FontProperties(family=STYLE["font.family"]))).get_charmap())


def whole_characters(text: str, max_bytes: int | None = None) -> str:
    """As much of a text as fits into so many bytes. What is no Unicode, such as half a surrogate pair, becomes "?"."""
    return text.encode(errors="replace")[:max_bytes].decode(errors="ignore")


def rows_of(shown: Sequence[Shown]) -> list[list[Shown]]:
    """Characters cut into as few rows of at most `ROW_BYTES` as it takes, and those about equally long."""
    fewest = len(_cut(shown, ROW_BYTES))
    return next(rows for limit in range(1, ROW_BYTES + 1) if len(rows := _cut(shown, limit)) == fewest)


def _cut(shown: Sequence[Shown], limit: int) -> list[list[Shown]]:
    """Rows filled one after the other; a character that is longer than the limit has its own."""
    rows: list[list[Shown]] = [[]]
    for character in shown:
        if rows[-1] and character.start + character.length - rows[-1][0].start > limit:
            rows.append([])
        rows[-1].append(character)
    return rows


def draw_text(
    text: str | Mapping[str, str],
    model: LM,
    *,
    layers: Sequence[int] | None = None,
    title: str = "Each byte in the colour of the expert it goes to first",
    alt: str | None = None,
) -> Picture:
    """Each byte of a text in the colour of its first expert, a row for every layer; below, how evenly all are used.

    The number under a letter is the expert's too, the strip below it is the second choice. A character of several
    bytes stands over all of them: each byte is a token, and is sent by itself.

    Args:
        text: one text, or several by name; the model reads each by itself.
        layers: which layers of experts, counted from 1; all by default.
        alt: a description; by default one that says who is chosen most.

    Raises:
        ValueError: no text, one of more than `MAX_BYTES` bytes, a layer that does not exist, a model without experts.
    """
    texts = {"": text} if isinstance(text, str) else dict(text)
    texts = {name: whole_characters(content) for name, content in texts.items()}
    _require_texts(texts)
    layers = _require_layers(model, layers)
    routed = {name: _route(model, content, layers) for name, content in texts.items()}
    picture = _Drawing({name: as_shown(content) for name, content in texts.items()}, routed, layers)
    return Picture(picture.draw(title), alt or picture.in_words())


def _require_texts(texts: Mapping[str, str]) -> None:
    if not texts:
        raise ValueError("no text: expected at least one.")
    for name, content in texts.items():
        size, which = len(content.encode()), f"text {name!r}" if name else "the text"
        if not 0 < size <= MAX_BYTES:
            raise ValueError(f"{which} has {size} bytes: expected 1 to {MAX_BYTES}, each of which is a token.")


def _require_layers(model: LM, layers: Sequence[int] | None) -> list[int]:
    n_layers, moe = model.config.n_moe_layers, model.config.moe
    if moe is None or moe.expert_choice:
        what = "has no experts" if moe is None else "lets experts choose their tokens"
        raise ValueError(f"The model {what}: expected an LM whose tokens choose experts, as MOE_BASELINE's do.")
    layers = list(range(1, n_layers + 1)) if layers is None else list(layers)
    if not layers or not all(1 <= layer <= n_layers for layer in layers):
        raise ValueError(f"layers={layers}: expected some of 1 to {n_layers}.")
    return layers


def _route(model: LM, text: str, layers: Sequence[int]) -> list[Routing]:
    routings = choices_of(model, torch.tensor([list(text.encode())]))
    return [routings[layer - 1] for layer in layers]


class _Drawing:
    """What `draw_text` shows, as plain numbers, and how it is laid out: in cells, a byte being one cell wide."""

    def __init__(
        self, texts: Mapping[str, Sequence[Shown]], routed: Mapping[str, Sequence[Routing]], layers: Sequence[int]
    ) -> None:
        self.rows = {name: rows_of(shown) for name, shown in texts.items()}
        self.choices = {name: [r.topk_experts.tolist() for r in routings] for name, routings in routed.items()}
        self.layers = layers
        per_layer = zip(*routed.values(), strict=True)
        self.counts = [sum(routing.tokens_per_expert for routing in layer).tolist() for layer in per_layer]
        self.n_bytes = sum(len(layers_of_text[0]) for layers_of_text in self.choices.values())
        longest = max(row[-1].start + row[-1].length - row[0].start for rows in self.rows.values() for row in rows)
        self.columns = max(longest, FEWEST_COLUMNS)
        self.cell = WIDTH / (self.columns + MARGIN)  # inches
        self.pitch = BOX + BETWEEN_ROWS + (STRIP if self.has_second else 0)

    @property
    def has_second(self) -> bool:
        """Whether a token has more than one expert."""
        return len(next(iter(self.choices.values()))[0][0]) > 1

    @property
    def shares(self) -> list[list[float]]:
        """For every layer, each expert's share of the choices, in per cent."""
        return [[100 * count / sum(counts) for count in counts] for counts in self.counts]

    def draw(self, title: str) -> Figure:
        """Title and key, the texts row by row, and the bars below them."""
        blocks = [(name, row) for name, rows in self.rows.items() for row in rows]
        names = sum(NAME for name in self.rows if name)
        height = len(blocks) * (len(self.layers) * self.pitch + BETWEEN_TEXTS) + names  # cells
        total = HEAD + height * self.cell + BARS + FOOT  # inches
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, total))
            axes = figure.add_axes((0, (BARS + FOOT) / total, 1, height * self.cell / total))
            axes.set(xlim=(-MARGIN, self.columns), ylim=(height, 0))
            axes.axis("off")
            y, before = 0.0, None
            for name, row in blocks:
                if name and name != before:
                    axes.text(0, y + 0.55 * NAME, name, va="center", fontsize=10, weight="bold", color=INK)
                    y += NAME
                before = name
                for place, layer in enumerate(self.layers):
                    self._write_row(axes, row, self.choices[name][place], y)
                    axes.text(-0.4, y + BOX / 2, f"layer {layer}", ha="right", va="center", fontsize=10, color=INK)
                    y += self.pitch
                y += BETWEEN_TEXTS
            second = "; the strip below: its second choice" if self.has_second else ""
            figure.text(0.005, 1 - 0.2 / total, title, va="center", fontsize=12.5)
            key = f"colour and number: the expert of a byte's first choice{second}"
            figure.text(0.005, 1 - 0.44 / total, key, va="center", fontsize=9.5)
            self._add_bars(figure, total)
        return figure

    def _write_row(self, axes: Axes, row: Sequence[Shown], choices: Sequence[Sequence[int]], y: float) -> None:
        points = self.cell * POINTS
        centred = {"ha": "center", "va": "center"}
        for character in row:
            left, right = character.start - row[0].start, character.start - row[0].start + character.length
            for place in range(left, right):
                first, *others = choices[row[0].start + place]
                # the bytes of one character touch each other
                edges = place + GAP * (place == left), place + 1 - GAP * (place == right - 1)
                _fill(axes, edges, y, BOX, first)
                number = {"fontsize": 0.44 * points, "color": _ink(first)}
                axes.text(place + 0.5, y + 0.8 * BOX, f"{first}", **centred, **number)
                if others:
                    _fill(axes, edges, y + BOX + 0.05, STRIP, others[0])
            size = points * (0.68 if len(character.label) < 3 else 0.5)
            inks = {_ink(choices[row[0].start + place][0]) for place in range(left, right)}
            look: dict = {"color": min(inks)}
            if len(inks) > 1:  # it stands on dark and on light
                look = {"color": INK, "path_effects": [withStroke(linewidth=0.16 * size, foreground="white")]}
            middle = (left + right) / 2, y + 0.36 * BOX
            axes.text(*middle, character.label, fontsize=size, parse_math=False, **centred, **look)

    def _add_bars(self, figure: Figure, total: float) -> None:
        n_experts, n_layers = len(self.counts[0]), len(self.layers)
        even = 100 / n_experts
        highest = max(max(shares) for shares in self.shares)
        width = min(0.42, 0.9 / n_layers - 0.06)
        for place, (layer, shares) in enumerate(zip(self.layers, self.shares, strict=True)):
            left = 0.07 + place * (0.93 / n_layers)
            axes = figure.add_axes((left, FOOT / total, width, (BARS - 0.35) / total))
            axes.bar(range(n_experts), shares, color=[_colour(e) for e in range(n_experts)], width=0.8)
            axes.axhline(even, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            axes.text(n_experts - 0.45, even, " even", va="center", fontsize=9, color=INK)
            axes.set(ylim=(0, max(1.15 * highest, 2 * even)), xlim=(-0.6, n_experts - 0.4))
            axes.set_title(f"layer {layer}: the fullest has {max(shares) / even:.1f} × an even share", fontsize=10)
            axes.set_xticks(range(n_experts), [f"{e}" for e in range(n_experts)], fontsize=min(9, 144 / n_experts))
            for e, label in enumerate(axes.get_xticklabels()):
                label.set_bbox({"facecolor": _colour(e), "edgecolor": "none", "pad": 2})
                label.set_color(_ink(e))
            axes.tick_params(axis="x", length=0, pad=6)
            axes.set_xlabel("expert", fontsize=10)
            if place == 0:
                axes.set_ylabel("choices (%)", fontsize=10)

    def in_words(self) -> str:
        """The gist for who cannot see it: how many experts are used, and which most."""
        parts = []
        for layer, counts, shares in zip(self.layers, self.counts, self.shares, strict=True):
            used, fullest = sum(count > 0 for count in counts), max(shares)
            parts.append(
                f"Layer {layer} uses {used} of {len(counts)} experts; expert {shares.index(fullest)} takes most, "
                f"{fullest:.0f} % of the choices."
            )
        return f"A text of {self.n_bytes} bytes, each in the colour of its first expert. {' '.join(parts)}"


def _fill(axes: Axes, edges: tuple[float, float], y: float, height: float, expert: int) -> None:
    left, right = edges
    axes.add_patch(Rectangle((left, y), right - left, height, facecolor=_colour(expert), edgecolor="none"))


def _colour(expert: int) -> str:
    return COLOURS[expert % len(COLOURS)]


def _ink(expert: int) -> str:
    """The colour of letters on an expert's colour."""
    return "white" if _colour(expert) in DARK else INK


class TextExplorer(Explorer):
    """Type a sentence and see which experts its bytes go to, layer by layer, and how evenly the experts are used.

    Args:
        models: what to choose from, by name; by default the two that come with the course.
        text: what is shown at the start.

    Raises:
        ValueError: no models to choose from.
    """

    def __init__(self, models: Mapping[str, LM] | None = None, text: str = SENTENCE) -> None:
        self.models = shipped_models() if models is None else dict(models)
        if not self.models:
            raise ValueError("models is empty: expected at least one to look at.")
        wide = {"style": {"description_width": "6em"}, "continuous_update": False}
        field = widgets.Text(
            text, description="sentence", placeholder="type, then press Enter", layout={"width": "44em"}, **wide
        )
        choice = widgets.ToggleButtons(
            options=list(self.models), description="model", style={"description_width": "6em"}
        )
        super().__init__({"text": field, "model": choice})

    def draw(self, text: str, model: str) -> Picture:
        """The coloured text; without any, a word on what to do."""
        shown = whole_characters(text, MAX_BYTES)
        if not shown:
            return _message("Type a sentence: each of its bytes is coloured by the expert it goes to.")
        size = len(text.encode(errors="replace"))
        cut = f" (the first {len(shown.encode())} of {size} bytes)" if len(shown.encode()) < size else ""
        return draw_text(
            shown, self.models[model], title=f"The {model} model: each byte in the colour of its first expert{cut}"
        )


def shipped_models() -> dict[str, LM]:
    """The course's two small trained models, by what became of their routers."""
    return {"balanced": load_shipped_model("tiny_moe"), "collapsed": load_shipped_model("tiny_moe_collapsed")}
