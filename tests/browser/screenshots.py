"""Takes the README's screenshots anew, from a fresh copy of the course. Run it in the course folder:

python tests/browser/screenshots.py

It writes docs/images/jupyterlab.png and docs/images/exercise.png. Look at both before you commit them.
"""

import io
import sys
import tempfile
from pathlib import Path

from driving import ROOT, Lab, browser_missing, wait_until
from PIL import Image

IMAGES = ROOT / "docs" / "images"


def save(png: bytes, name: str) -> None:
    """Stores a screenshot in 256 colours, which a page of text and charts does not miss."""
    path = IMAGES / name
    IMAGES.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB")


def main() -> None:
    """Drives notebook 01 to its widget and to a wrong answer."""
    if missing := browser_missing():
        sys.exit(f"No screenshots: {missing}.")
    with tempfile.TemporaryDirectory(prefix="moe-lab-") as scratch, Lab(Path(scratch)) as lab:
        notebook = lab.open("01_dense_ffn")
        widget = notebook.cell("SizeExplorer()")
        notebook.run_to(widget)
        widget.output.locator("img").wait_for()
        lab.choose("File", "Save All")
        for trace in (lab.page.locator(".lm-TabBar-tab.jp-mod-dirty"), lab.page.get_by_text("Saving ")):
            wait_until(lambda trace=trace: trace.count() == 0, "everything to be saved")
        widget.locator.evaluate("cell => cell.previousElementSibling.scrollIntoView()")
        lab.page.mouse.move(0, 0)
        save(lab.page.screenshot(), "jupyterlab.png")

        exercise = notebook.cell('@exercise("1.1")')
        exercise.answer("return F.relu(x @ w_up.T @ w_down.T)")
        exercise.output.get_by_text("not right yet").wait_for()
        notebook.cell("torch.nn.Sequential(").select()  # or the exercise has a frame and a toolbar
        exercise.locator.evaluate("cell => cell.scrollIntoView({block: 'center'})")
        lab.page.mouse.move(0, 0)
        save(exercise.locator.screenshot(), "exercise.png")


if __name__ == "__main__":
    main()
