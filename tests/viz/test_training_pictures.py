import math
import time

import pytest
import torch

from moe_lab import viz
from moe_lab.train import Step
from moe_lab.viz import training
from moe_lab.viz.training import Curves, LiveTraining, smooth


def line(index, bits, violations=(), rate=0.01):
    return {
        "step": index,
        "learning_rate": rate,
        "bits_per_byte": bits,
        "penalty": 0.0,
        "gradient_norm": 1.0,
        "max_violation": list(violations),
    }


def evaluation(after, mean):
    return {"evaluated_after": after, "bits_per_byte": {"prose": mean, "python": mean}, "mean": mean}


def run(n, n_layers, first=0, every=0):
    for i in range(first, n):
        yield line(i, 2.5 + 5.5 * math.exp(-i / 30), [layer + 1 / (1 + i) for layer in range(n_layers)])
        if every and (i + 1) % every == 0:
            yield evaluation(i + 1, 3.0)


def step(index, *loads, bits=4.0):
    return Step(index, 0.01, bits * math.log(2), tokens_per_expert=tuple(torch.tensor(load) for load in loads))


def panels(figure):
    return [axes.get_ylabel() for axes in figure.axes]


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def curve(axes, label):
    (found,) = [drawn for drawn in axes.lines if drawn.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


# --- a run folder -------------------------------------------------------------------------------------------------


def test_a_run_has_loss_evaluations_violations_and_learning_rate(drawn):
    shown = viz.draw_curves(list(run(200, 2, every=100)))
    loss, violations, rate = drawn[0].axes
    assert panels(drawn[0]) == ["bits per byte", "MaxVio (0 is even)", "learning\nrate"]
    assert labels(loss) == ["training, mean of 9 steps", "held-out, mean of domains"]
    assert curve(loss, "held-out, mean of domains") == ([100, 200], [3.0, 3.0])
    raw = loss.lines[0]
    assert (raw.get_xdata()[0], raw.get_ydata()[0]) == (1, 8.0)
    assert curve(violations, "MoE layer 2")[1][-1] == pytest.approx(1 + 1 / 198, abs=1e-4)
    assert rate.get_xlabel() == "step"
    assert "over 200 steps, with 2 held-out evaluations. Below it MaxVio of 2 layers of experts." in shown.alt


def test_a_dense_run_has_no_panel_for_experts(drawn):
    shown = viz.draw_curves(list(run(60, 0)))
    assert panels(drawn[0]) == ["bits per byte", "learning\nrate"]
    assert "MaxVio" not in shown.alt


def test_a_run_without_evaluation_and_of_one_step_is_a_point(drawn):
    shown = viz.draw_curves([line(0, 8.0, [2.0])])
    loss, violations, _ = drawn[0].axes
    assert curve(loss, "training") == ([1], [8.0])
    assert curve(violations, "MoE layer 1") == ([1], [2.0])
    assert {axes.lines[0].get_marker() for axes in drawn[0].axes} == {"o"}
    assert "over 1 step. Below it MaxVio of the layer of experts." in shown.alt


def test_a_resumed_run_is_one_curve_in_order(drawn):
    records = [line(0, 8.0), line(1, 7.0), line(2, 9.9), evaluation(3, 9.9), line(2, 6.0), evaluation(3, 5.0)]
    viz.draw_curves(records)
    loss = drawn[0].axes[0]
    assert curve(loss, "training") == ([1, 2, 3], [8.0, 7.0, 6.0])
    assert curve(loss, "held-out, mean of domains") == ([3], [5.0])


def test_the_rest_of_a_run_starts_where_it_starts(drawn):
    viz.draw_curves(list(run(300, 1, first=200)))
    assert drawn[0].axes[0].get_xlim() == (200, pytest.approx(303))


def test_many_layers_are_a_scale_of_colours_with_its_ends_named(drawn):
    viz.draw_curves(list(run(60, 12)))
    violations = drawn[0].axes[1]
    assert labels(violations) == ["MoE layer 1", "MoE layer 12"]
    assert len({drawn_line.get_color() for drawn_line in violations.lines[:12]}) == 12


def test_a_long_fall_is_logarithmic_and_a_short_one_is_not(drawn):
    viz.draw_curves([line(0, 8.0), line(1, 3.0)])
    viz.draw_curves([line(0, 3.1), line(1, 3.0)])
    assert [figure.axes[0].get_yscale() for figure in drawn] == ["log", "linear"]


def test_perfect_balance_can_be_drawn():
    assert viz.draw_curves([line(i, 3.0, [0.0, 0.0], rate=0.0) for i in range(3)]).png


def test_records_without_a_step_are_refused():
    with pytest.raises(ValueError, match="records hold no step"):
        viz.draw_curves([evaluation(3, 3.0)])


def test_smoothing_is_a_mean_around_each_place():
    assert smooth([1.0, 2.0, 6.0], 1).tolist() == [1.0, 2.0, 6.0]
    assert smooth([8.0, 4.0, 3.0, 2.0, 5.0], 3).tolist() == pytest.approx([8.0, 5.0, 3.0, 10 / 3, 3.5])
    assert smooth([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], 5).tolist() == pytest.approx([5.0, 4.0, 3.0, 2.0, 1.5, 1.0])


# --- live ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def redrawn(monkeypatch):
    """How many steps were known at each drawing of a live figure."""
    counts = []
    original = LiveTraining._redraw
    monkeypatch.setattr(
        LiveTraining, "_redraw", lambda self: (counts.append(len(self.curves.steps)), original(self))[1]
    )
    return counts


def test_a_live_training_ends_as_a_picture_of_all_steps(drawn):
    live = LiveTraining("a title", n_layers=2, steps=4)
    for i in range(3):
        live(step(i, [4, 0], [2, 2], bits=5.0 - i))
    shown = live.picture()
    loss, violations = drawn[0].axes
    assert curve(loss, "training") == ([1, 2, 3], pytest.approx([5.0, 4.0, 3.0]))
    assert curve(violations, "MoE layer 1")[1] == [1.0, 1.0, 1.0]
    assert curve(violations, "MoE layer 2")[1] == [0.0, 0.0, 0.0]
    assert loss.get_title(loc="left") == "a title"
    assert loss.get_title(loc="right") == ""
    assert shown.alt == "a title. Training loss in bits per byte over 3 steps. Below it MaxVio of 2 layers of experts."


def test_the_alt_text_can_be_given():
    live = LiveTraining("a title")
    live(step(0))
    assert live.picture(alt="what is seen").alt == "what is seen"


@pytest.mark.parametrize(("n_layers", "n_panels"), [(None, 2), (1, 2), (0, 1)])
def test_so_many_layers_are_shown_as_asked_for(drawn, n_layers, n_panels):
    live = LiveTraining("a title", n_layers)
    live(step(0, [4, 0], [2, 2]))
    live.picture()
    assert len(drawn[0].axes) == n_panels
    if n_panels == 2:
        assert len(labels(drawn[0].axes[1])) == (n_layers or 2)


def test_a_dense_model_shows_its_loss(drawn):
    live = LiveTraining("a title", n_layers=0)
    live(step(0))
    live.picture()
    assert panels(drawn[0]) == ["bits per byte"]


def test_the_live_figure_is_drawn_at_once_and_then_now_and_then(redrawn, monkeypatch):
    monkeypatch.setattr(LiveTraining, "AT_MOST", 1e9)
    live = LiveTraining("a title", n_layers=1, every=10)
    images = set()
    for i in range(35):
        live(step(i, [3, 1]))
        images.add(bytes(live.image.value))
    assert redrawn == [1, 11, 21, 31]
    assert len(images) == 4
    assert all(image.startswith(b"\x89PNG") for image in images)


def test_slow_steps_are_drawn_every_second(redrawn, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(LiveTraining, "AT_MOST", 1e9)
    live = LiveTraining("a title", every=1000)
    for i in range(6):
        live(step(i))
        now[0] += 0.5
    assert redrawn == [1, 3, 5]


def test_drawing_takes_a_small_part_of_the_time(redrawn, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    live = LiveTraining("a title", every=1)
    for i in range(40):
        live(step(i))
        live._drawn_in = 0.2
        now[0] += 1.0
    assert redrawn == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37]  # 0.2 s in every 4


def test_the_live_figure_tells_how_far_it_is(monkeypatch):
    live = LiveTraining("a title", steps=200)
    live(step(0))
    assert live._figure.axes[0].get_title(loc="right") == "step 1 of 200"
    assert live._figure.axes[0].get_xlim() == (0, 202)


def test_the_picture_takes_the_live_figure_away_and_a_later_step_brings_another():
    live = LiveTraining("a title")
    live(step(0))
    first = live.image
    live.picture()
    assert live.image is None
    assert first.comm is None  # closed: a browser removes its view
    live(step(1))
    assert live.image is not first
    assert live.curves.steps == [1, 2]


def test_a_second_training_begins_afresh():
    live = LiveTraining("a title")
    for i in (0, 1, 2, 0, 1):
        live(step(i, bits=3.0 + i))
    assert live.curves.steps == [1, 2]
    assert live.curves.bits == pytest.approx([3.0, 4.0])


def test_a_picture_before_any_step_is_refused():
    with pytest.raises(ValueError, match="No step was seen: give this object to train"):
        LiveTraining("a title").picture()


class Kernel:
    """A notebook's shell, as far as it is asked, with what was displayed and what became of it."""

    kernel = object()

    def __init__(self):
        self.displayed, self.updates = [], []

    def display(self, data, **options):
        assert options == {"raw": True, "display_id": True}
        self.displayed.append(data)
        return self

    def update(self, data, raw):
        assert raw
        self.updates.append(data)


def test_in_a_notebook_one_output_is_shown_and_then_emptied(monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(training, "get_ipython", lambda: kernel)
    monkeypatch.setattr(training, "display", kernel.display)
    live = LiveTraining("a title", every=1)
    for i in range(5):
        live(step(i))
    # The view alone: text would be compared by tests, and be left over where the notebook is only read.
    assert [list(data) for data in kernel.displayed] == [["application/vnd.jupyter.widget-view+json"]]
    assert kernel.updates == []
    live.picture()
    assert kernel.updates == [{}]


def test_the_cost_of_drawing_is_known_after_the_second(monkeypatch):
    live = LiveTraining("a title")
    live(step(0))
    assert live._drawn_in == 0.0
    live.curves.add(step(1))
    started = time.thread_time()
    live._redraw()
    assert 0 < live._drawn_in <= time.thread_time() - started


def test_curves_of_records_and_of_steps_are_the_same():
    steps = [step(i, [3, 1], bits=4.0 - i) for i in range(3)]
    seen = Curves()
    for one in steps:
        seen.add(one)
    records = [line(one.index, one.bits_per_byte, one.max_violations, one.learning_rate) for one in steps]
    assert Curves.of_records(records) == seen
