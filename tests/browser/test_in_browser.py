"""The course in a real browser, as a learner meets it. The tests share one JupyterLab; the last one stops it."""

import base64
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import pytest
from driving import CLICK, browser_missing, wait_until

from moe_lab.course.chapters import ch01
from moe_lab.experiments import load_results
from moe_lab.viz import CureExplorer, CutExplorer, RouterExplorer, TextExplorer, TraceExplorer
from moe_lab.viz.arithmetic import ArithmeticExplorer
from moe_lab.viz.explorer import Explorer, SizeExplorer

MISSING = browser_missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
expect = pytest.importorskip("playwright.sync_api", reason=MISSING).expect
expect.set_options(timeout=CLICK * 1000)
READ = """async img => {
    const reader = new FileReader(), blob = await (await fetch(img.src)).blob();
    return await new Promise(done => { reader.onload = () => done(reader.result); reader.readAsDataURL(blob); });
}"""
WRONG, RIGHT = "return F.relu(x @ w_up.T @ w_down.T)", "return F.relu(x @ w_up.T) @ w_down.T"
SAYS = next(mistake.says for mistake in ch01.MLP.mistakes if mistake.name == "activation on the output")


def test_00_runs_to_its_end_and_leads_to_01(lab):
    notebook = lab.current("00_start_here")
    notebook.run_all()
    expect(lab.page.get_by_text("official Jupyter news")).to_have_count(0)  # it would cover the notebook's corner
    cells = [cell for cell in notebook.save().cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    expect(notebook.cell('@exercise("0.1")').output).to_contain_text("not started")
    lab.page.get_by_role("link", name="01 dense FFN").click()
    lab.current("01_dense_ffn")


def test_an_exercise_names_the_mistake_and_the_progress_survives_a_restart(lab):
    notebook = lab.open("01_dense_ffn")
    imports, exercise = notebook.cell("import torch.nn.functional as F"), notebook.cell('@exercise("1.1")')
    progress = notebook.cell("show_progress(")
    imports.run()
    exercise.run()
    expect(exercise.output).to_contain_text("not started · Exercise 1.1")
    exercise.answer(WRONG)
    expect(exercise.output).to_contain_text(SAYS)
    exercise.answer(RIGHT)
    expect(exercise.output).to_contain_text("passed · Exercise 1.1")
    notebook.save()

    lab.restart_kernel()
    imports.run()
    assert imports.count() == 1, "the kernel was not restarted"
    expect(exercise.locator).to_contain_text(RIGHT)
    progress.run()
    expect(progress.output.get_by_role("row", name="1.1")).to_contain_text("not started here, passed before")
    command = [sys.executable, "-m", "moe_lab", "progress"]
    told = subprocess.run(command, cwd=lab.course, env=lab.environment, capture_output=True, text=True, timeout=60)
    assert "notebook 01  [#.....]  1 of 6 passed" in told.stdout, told


class Live:
    """An explorer in a notebook, and its twin in this process, which says what picture is to be seen."""

    def __init__(self, lab, notebook_name: str, twin: Explorer, needs: Sequence[str] = (), made_by: str = "") -> None:
        self.twin = twin
        notebook = lab.open(notebook_name)
        self.cell = notebook.cell(f"{made_by or type(twin).__name__}(")
        if needs:  # the cells that hold these lines are enough
            for line in needs:
                notebook.cell(line).run()
            self.cell.run()
        else:
            notebook.run_to(self.cell)
        kinds = (widgets.IntSlider, widgets.FloatSlider, widgets.SelectionSlider)
        self.sliders = {name: w for name, w in self.twin.sliders.items() if isinstance(w, kinds)}
        assert self.picture() == self.twin.picture.png
        assert self.cell.output.locator(".noUi-handle").count() == len(self.sliders)

    def picture(self) -> bytes:
        """The picture that is seen; it comes over as text, for a list of its bytes takes ten times as long."""
        address = self.cell.output.locator("img").evaluate(READ)
        return base64.b64decode(address.partition(",")[2])

    def change(self, name: str, value: object, act: Callable[[], None]) -> None:
        """What `act` does in the browser sets the twin's `name` to `value`: both must show another, equal picture."""
        before = self.picture()
        self.twin.sliders[name].value = value
        act()
        wait_until(lambda: self.picture() != before, f"a new picture after {name} became {value!r}")
        assert self.picture() == self.twin.picture.png, f"another picture than that of {name} {value!r}"
        expect(self.cell.output.get_by_role("status")).to_have_text(self.twin.picture.alt)

    def type(self, text: str) -> None:
        """A sentence into the text field, and Enter."""
        field = self.cell.output.get_by_role("textbox").first

        def act() -> None:
            field.fill(text)
            field.press("Enter")

        self.change("text", text, act)

    def move_slider(self, name: str) -> None:
        """One step to the right by the keyboard."""
        slider, place = self.sliders[name], list(self.sliders).index(name)
        handle, readout = (self.cell.output.locator(part).nth(place) for part in (".noUi-handle", ".widget-readout"))
        if isinstance(slider, widgets.SelectionSlider):
            label, value = slider._options_full[slider.index + 1]
        else:
            value = slider.value + slider.step
            label = format(value, slider.readout_format)
        self.change(name, value, lambda: handle.press("ArrowRight"))
        expect(readout).to_have_text(label)

    def readouts(self) -> list[str]:
        """The numbers beside the sliders."""
        return self.cell.output.locator(".widget-readout").all_inner_texts()


def test_the_sliders_of_01_redraw_the_picture(lab):
    live = Live(lab, "01_dense_ffn", SizeExplorer())
    for name in live.sliders:
        live.move_slider(name)


def test_the_router_of_02_chooses_live(lab):
    live = Live(lab, "02_router", RouterExplorer())
    for name in ("expert_1", "k", "temperature"):
        live.move_slider(name)
    output = live.cell.output
    live.change("score", "sigmoid", lambda: output.get_by_role("button", name="sigmoid").click())
    live.change("normalise", False, lambda: output.get_by_role("checkbox").click())


def test_a_cure_and_its_strength_are_chosen_in_05(lab):
    needs = ("from moe_lab import balance", 'cures = load_results("balance")')
    live = Live(lab, "05_load_balancing", CureExplorer(load_results("balance")), needs)
    choose = live.cell.output.get_by_role("combobox")
    live.change("cure", "Switch loss", lambda: choose.select_option("Switch loss"))
    live.move_slider("strength")
    live.change("layer", 1, lambda: live.cell.output.locator(".noUi-handle").nth(1).press("ArrowLeft"))
    live.change("cure", "expert choice", lambda: choose.select_option("expert choice"))  # it has no strength


def test_experts_are_cut_in_06(lab):
    live = Live(lab, "06_shared_experts", CutExplorer())
    for name in live.sliders:
        live.move_slider(name)


def test_a_typed_sentence_is_coloured_in_00(lab):
    live = Live(lab, "00_start_here", TextExplorer())
    live.type("2 + 2 = 4, naïve")
    collapsed = live.cell.output.get_by_role("button", name="collapsed")
    live.change("model", "collapsed", lambda: collapsed.click())


def test_a_typed_sentence_is_traced_in_03(lab):
    live = Live(lab, "03_topk_moe", TraceExplorer())
    live.type("2 + 2 = 4")
    live.type("")  # no sentence: a word on what to do
    live.type("é")
    for name in ("layer", "top_k"):
        live.move_slider(name)


def test_the_calculator_of_09_counts_live(lab):
    needs, made_by = ["from moe_lab import accounting, viz"], "explore_arithmetic"
    live = Live(lab, "09_arithmetic", ArithmeticExplorer(), needs, made_by)
    assert "671 B parameters" in live.twin.picture.alt
    for name in ("n_experts", "batch"):
        live.move_slider(name)
    assert "674 B parameters" in live.twin.picture.alt  # an expert more in 58 layers, of 44 million each
    live.change("number", "bf16", lambda: live.cell.output.get_by_role("button", name="bf16").click())
    choose = live.cell.output.get_by_role("combobox")
    live.change("preset", "Mixtral 8x7B", lambda: choose.select_option("Mixtral 8x7B"))
    sizes = ["8", "2", "0", "14336", "4096", "32"]  # a preset moves the sliders of the model, and no other
    assert live.readouts() == [*sizes, "64", "4096"]


def test_nothing_came_from_outside_this_machine(lab):
    assert lab.strangers == []


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process of a test")
def test_ctrl_c_leaves_nothing_behind(lab):
    status, left = lab.stop()
    assert (status, left) == (0, [])
    assert "Traceback" not in lab.said()
