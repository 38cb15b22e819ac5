"""Training as curves: of a run folder, and live in a notebook while it happens."""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
from IPython import get_ipython
from IPython.display import DisplayHandle, display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from moe_lab.train import Step
from moe_lab.viz.charts import DASHES
from moe_lab.viz.picture import BLUE, GREY, INK, SERIES, STYLE, VERMILLION, Picture

SMOOTHED_OVER = 25  # windows of the running mean fit into a run
TOO_SHORT = 50  # steps that need no smoothing
FALLS_FAR = 1.5  # a loss that falls by this factor is drawn on a logarithmic axis
TICKS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
FEW_LAYERS = 4  # that can be told apart by colour and dash


@dataclass
class Curves:
    """The numbers behind the curves, step by step; a step that was done again counts as it was done last."""

    steps: list[int] = field(default_factory=list)  # done so far: 1 after the first
    bits: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    violations: list[Sequence[float]] = field(default_factory=list)  # for each step, of every layer of experts
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # after how many steps, bits per byte

    @classmethod
    def of_records(cls, records: Sequence[Mapping]) -> Self:
        """From the lines of a run folder's `metrics.jsonl`."""
        by_index = {record["step"]: record for record in records if "step" in record}
        held_out = {record["evaluated_after"]: record["mean"] for record in records if "evaluated_after" in record}
        steps = [by_index[index] for index in sorted(by_index)]
        return cls(
            [record["step"] + 1 for record in steps],
            [record["bits_per_byte"] for record in steps],
            [record["learning_rate"] for record in steps],
            [record["max_violation"] for record in steps],
            sorted(held_out.items()),
        )

    def add(self, step: Step, n_layers: int | None = None) -> None:
        """One more step of a training that runs just now, with its first `n_layers` layers of experts."""
        self.steps.append(step.index + 1)
        self.bits.append(step.bits_per_byte)
        self.rates.append(step.learning_rate)
        self.violations.append(step.max_violations[:n_layers])

    @property
    def n_layers(self) -> int:
        """How many layers have experts."""
        return len(self.violations[0]) if self.violations else 0


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """At every place the mean of some `window` values around it, of fewer near the ends.

    At the start, where a loss falls steeply, it takes as many from before as from after, so as not to lag or to lead.
    """
    sums, place = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    reach = np.minimum(window // 2, place)
    first, after = place - reach, np.minimum(place + reach + 1, len(values))
    return (sums[after] - sums[first]) / (after - first)


def _window(n_steps: int) -> int:
    return 1 if n_steps < TOO_SHORT else 2 * (n_steps // SMOOTHED_OVER // 2) + 1


def draw_curves(records: Sequence[Mapping]) -> Picture:
    """A run folder's curves: loss with held-out evaluations, MaxVio of every layer of experts, the learning rate.

    Args:
        records: the lines of its `metrics.jsonl`.

    Raises:
        ValueError: no step among them.
    """
    curves = Curves.of_records(records)
    if not curves.steps:
        raise ValueError("records hold no step: expected the lines of a run's metrics.jsonl.")
    held_out = f", with {len(curves.evaluations)} held-out evaluations" if curves.evaluations else ""
    alt = f"{_told(curves, held_out)} At the bottom the learning rate."
    with mpl.rc_context(STYLE):
        figure = _figure(curves.n_layers, with_rate=True)
        plot(figure, curves, "Training loss and held-out evaluations" if held_out else "Training loss")
        return Picture(figure, alt)


def _told(curves: Curves, also: str = "") -> str:
    n_steps, n_layers = len(curves.steps), curves.n_layers
    layers = "the layer of experts" if n_layers == 1 else f"{n_layers} layers of experts"
    below = f" Below it MaxVio of {layers}." if n_layers else ""
    return f"Training loss in bits per byte over {n_steps} step{'s' * (n_steps > 1)}{also}.{below}"


def _figure(n_layers: int, with_rate: bool = False, layout: str | None = "constrained") -> Figure:
    """Panels below each other, those there is something for: loss, MaxVio, learning rate."""
    heights = [2.6] + [1.7] * (n_layers > 0) + [0.75] * with_rate
    figure = Figure(figsize=(8.0, 0.9 + sum(heights)), layout=layout)
    figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    return figure


def plot(figure: Figure, curves: Curves, title: str, steps: int | None = None) -> None:
    """Draw the curves into the panels of a figure, which are emptied first; `steps` is where the x axis ends."""
    loss, *others = figure.axes
    for axes in figure.axes:
        axes.clear()
        axes.grid(alpha=0.25)
    _plot_loss(loss, curves)
    if curves.n_layers:
        _plot_violations(others.pop(0), curves)
    if others:
        others[0].plot(curves.steps, curves.rates, color=INK, linewidth=1.5, marker=_marker(curves))
        others[0].set(ylabel="learning\nrate", ylim=(0, 1.15 * max(*curves.rates, 1e-9)))
    loss.set_title(title)
    last = max(curves.steps[-1], steps or 0)
    figure.axes[-1].set(xlabel="step", xlim=(curves.steps[0] - 1, max(1.01 * last, last + 0.5)))
    figure.axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 2.5, 5, 10)))


def _marker(curves: Curves) -> str | None:
    return "o" if len(curves.steps) == 1 else None


def _plot_loss(axes: Axes, curves: Curves) -> None:
    window = _window(len(curves.steps))
    if window > 1:
        axes.plot(curves.steps, curves.bits, color=BLUE, alpha=0.3, linewidth=1)
    name = f"training, mean of {window} steps" if window > 1 else "training"
    axes.plot(curves.steps, smooth(curves.bits, window), color=BLUE, marker=_marker(curves), label=name)
    if curves.evaluations:
        look = {"linestyle": "none", "marker": "D", "markersize": 7, "markeredgecolor": "white"}
        axes.plot(*zip(*curves.evaluations, strict=True), color=VERMILLION, label="held-out, mean of domains", **look)
    axes.set_ylabel("bits per byte")
    show_both_ends(axes, [*curves.bits, *(bits for _, bits in curves.evaluations)])
    axes.legend(loc="upper right")


def show_both_ends(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic where a loss falls so far that its end could not be read beside its beginning."""
    if min(values) > 0 and max(values) > FALLS_FAR * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=TICKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _plot_violations(axes: Axes, curves: Curves) -> None:
    window, n_layers = _window(len(curves.steps)), curves.n_layers
    few = n_layers <= FEW_LAYERS
    for layer, values in enumerate(zip(*curves.violations, strict=True)):
        colour = SERIES[layer] if few else mpl.colormaps["viridis"](0.9 * layer / (n_layers - 1))
        if few and window > 1:
            axes.plot(curves.steps, values, color=colour, alpha=0.25, linewidth=0.8)
        named = few or layer in (0, n_layers - 1)
        axes.plot(
            curves.steps,
            smooth(values, window),
            color=colour,
            linestyle=DASHES[layer] if few else "-",
            linewidth=2.2 if few else 1.4,
            marker=_marker(curves),
            label=f"MoE layer {layer + 1}" if named else None,
        )
    most = max(map(max, curves.violations))
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set(ylabel="MaxVio (0 is even)", ylim=(-0.04 * most, 1.35 * most or 1))  # with room for the legend
    axes.legend(loc="upper left", ncols=FEW_LAYERS)


# --- live ---------------------------------------------------------------------------------------------------------


class LiveTraining:
    """Shows a training while it runs: give it to `train` as `on_step`, and end the cell with `.picture()`.

    A figure appears when the first step is done, and is drawn again now and then. `picture()` takes it away and
    returns the curves as a `Picture`, which stays in the notebook.

    Args:
        n_layers: of how many layers of experts MaxVio is shown: by default of all, and 0 shows the loss alone.
        steps: how long the training will be, if that shall be seen on the x axis from the start.
        every: draw after so many steps, or after a second; less often where drawing would take much of the time.
    """

    DOTS_PER_INCH = 80  # enough for a figure that changes every second
    AT_MOST = 0.05  # of the time goes into drawing
    MARGINS: ClassVar = {"left": 0.1, "right": 0.98, "hspace": 0.08}

    def __init__(self, title: str, n_layers: int | None = None, steps: int | None = None, every: int = 25) -> None:
        self.title, self.n_layers, self.steps, self.every = title, n_layers, steps, every
        self.curves = Curves()
        self.image: widgets.Image | None = None  # there is one from a first step to the picture
        self._shown: DisplayHandle | None = None  # the output that it stands in
        self._figure: Figure | None = None
        self._drawn_at = self._drawn_in = 0.0
        self._drawn_steps = 0

    def __call__(self, step: Step) -> None:
        """Take note of a step, and draw if it is time to."""
        if self.curves.steps and step.index < self.curves.steps[-1]:  # another training begins
            self._take_away()
            self.curves = Curves()
        self.curves.add(step, self.n_layers)
        if self.image is None:
            self.image = widgets.Image(format="png")
            self._redraw()
            self._shown = _display(self.image)
        elif self._is_due():
            self._redraw()

    def _is_due(self) -> bool:
        waited = time.monotonic() - self._drawn_at
        enough = len(self.curves.steps) - self._drawn_steps >= self.every or waited >= 1
        return enough and waited >= self._drawn_in / self.AT_MOST

    def _redraw(self) -> None:
        started, is_first = time.thread_time(), self._figure is None
        with mpl.rc_context(STYLE):
            if self._figure is None:
                self._figure = _figure(self.curves.n_layers, layout=None)  # finding room would double the time
                height = self._figure.get_figheight()
                self._figure.subplots_adjust(top=1 - 0.35 / height, bottom=0.5 / height, **self.MARGINS)
                self._figure.set_dpi(self.DOTS_PER_INCH)
            plot(self._figure, self.curves, self.title, self.steps)
            n_steps = f"step {self.curves.steps[-1]}" + (f" of {self.steps}" if self.steps else "")
            self._figure.axes[0].set_title(n_steps, loc="right", fontsize=10.5)
            canvas, png = FigureCanvasAgg(self._figure), io.BytesIO()
            canvas.draw()
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(png, format="png", compress_level=1)
        self.image.value = png.getvalue()
        self._drawn_at, self._drawn_steps = time.monotonic(), len(self.curves.steps)
        self._drawn_in = 0.0 if is_first else time.thread_time() - started  # the first has fonts to load

    def _take_away(self) -> None:
        if self._shown:
            self._shown.update({}, raw=True)  # else a saved notebook would show an error in place of a lost widget
        if self.image:
            self.image.close()
        self.image = self._shown = self._figure = None

    def picture(self, alt: str = "") -> Picture:
        """The curves so far as a picture that stays, by default with an alt text that says what is drawn.

        The live figure goes; a step after this begins another.

        Raises:
            ValueError: no step was seen.
        """
        if not self.curves.steps:
            raise ValueError("No step was seen: give this object to train() as on_step, then ask for its picture.")
        with mpl.rc_context(STYLE):
            figure = _figure(self.curves.n_layers)
            plot(figure, self.curves, self.title)
            picture = Picture(figure, alt or f"{self.title}. {_told(self.curves)}")
        self._take_away()
        return picture


def _display(widget: widgets.Widget) -> DisplayHandle | None:
    """Show a widget below the cell that runs, if there is one.

    The output holds the view and no text, so that nothing is left of it where a notebook is read without a kernel, and
    a test that runs the notebook finds nothing to compare.
    """
    if not hasattr(get_ipython(), "kernel"):
        return None
    bundle = widget._repr_mimebundle_() or {}
    view = {kind: value for kind, value in bundle.items() if kind.startswith("application/")}
    return display(view, raw=True, display_id=True)
