"""The course in a real browser, as a learner meets it. The tests share one JupyterLab; the last one stops it."""

import os
import subprocess
import sys

import pytest
from driving import CLICK, browser_missing, wait_until

from moe_lab.course.chapters import ch01
from moe_lab.viz.explorer import SizeExplorer

MISSING = browser_missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
expect = pytest.importorskip("playwright.sync_api", reason=MISSING).expect
expect.set_options(timeout=CLICK * 1000)
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


def test_the_sliders_of_01_redraw_the_picture(lab):
    notebook = lab.open("01_dense_ffn")
    cell = notebook.cell("SizeExplorer()")
    notebook.run_to(cell)
    image, sliders, readouts = (cell.output.locator(part) for part in ("img", ".noUi-handle", ".widget-readout"))

    def picture() -> bytes:
        read = "async img => Array.from(new Uint8Array(await (await fetch(img.src)).arrayBuffer()))"
        return bytes(image.evaluate(read))

    explorer, pictures = SizeExplorer(), [picture()]
    assert pictures[0] == explorer.picture.png
    assert sliders.count() == len(explorer.sliders)
    for number, slider in enumerate(explorer.sliders.values()):
        slider.value += slider.step
        sliders.nth(number).press("ArrowRight")
        expect(readouts.nth(number)).to_have_text(str(slider.value))
        wait_until(lambda: picture() != pictures[-1], f"a new picture after {slider.description} moved")
        pictures.append(picture())
        assert pictures[-1] == explorer.picture.png, f"another picture than that of {slider.description} {slider.value}"


def test_nothing_came_from_outside_this_machine(lab):
    assert lab.strangers == []


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process of a test")
def test_ctrl_c_leaves_nothing_behind(lab):
    status, left = lab.stop()
    assert (status, left) == (0, [])
    assert "Traceback" not in lab.said()
