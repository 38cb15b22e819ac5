"""JupyterLab as a learner has it: a copy of the course, started by `python course.py lab`, in headless Chromium."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil

from moe_lab.course.lesson import canonical, parse, unsolved

ROOT = Path(__file__).resolve().parents[2]
LEARNER_HAS = ("course.py", "pyproject.toml")  # besides notebooks/ and data/
PATIENCE = 60.0  # seconds that a server or a kernel may take: many times the usual, for slow or busy machines
CLICK = 20.0  # seconds that the page may take
CHROMIUM_OPTIONS = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]
LOCAL = ("http://127.0.0.1:", "ws://127.0.0.1:", "blob:", "data:")


def browser_missing() -> str:
    """Why no browser can be driven here; empty where one can."""
    if importlib.util.find_spec("playwright") is None:
        return 'Playwright is not installed: run `pip install -e ".[test]"` in the course folder'
    if not find_chromium():
        return "no Chromium here: install the system's own, or run `python -m playwright install chromium`"
    return ""


def find_chromium() -> str | None:
    """Path of the system's Chromium or Chrome, else of Playwright's own."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def wait_until(holds: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Waits for a condition; fails with a sentence that names it."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.1)


def copy_course(folder: Path) -> None:
    """Makes the course of a fresh clone in `folder`, whatever a learner has typed into the notebooks here."""
    (folder / "notebooks").mkdir(parents=True)
    for lesson in map(parse, sorted((ROOT / "lessons").glob("*.py"))):
        path = folder / "notebooks" / f"{lesson.name}.ipynb"
        path.write_text(canonical(unsolved(lesson)), encoding="utf-8")
    for name in ("data", "benchmarks/results"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("sources"))
    for name in LEARNER_HAS:
        shutil.copy(ROOT / name, folder)


def own_environment(scratch: Path) -> dict[str, str]:
    """The variables for a server that sees nothing of the user's Jupyter, and does not know that a test runs it."""
    foreign = ("JPY_", "JUPYTER", "PYTEST", "MPLBACKEND", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment |= {name: str(scratch / name.lower()) for name in folders}
    return environment | {"IPYTHONDIR": str(scratch / "ipython"), "OMP_NUM_THREADS": "1"}


class Lab:
    """A running JupyterLab and the browser that shows it; a context manager that leaves nothing behind."""

    def __init__(self, scratch: Path) -> None:
        self.course = scratch / "course"
        self.log = scratch / "server.log"
        self.strangers: list[str] = []  # addresses that the page asked for outside this machine
        self._scratch = scratch
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Lab":
        with contextlib.ExitStack() as started:  # what was started ends, should a later step fail
            started.callback(self._end_server)
            self._start_server()
            self._start_browser(started)
            self._open = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _start_server(self) -> None:
        copy_course(self.course)
        self.environment = own_environment(self._scratch)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "course.py", "lab", "--no-browser", "--port", str(port)]
        with open(self.log, "w") as log:
            self.server = subprocess.Popen(
                command,
                cwd=self.course,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal of its own, as it were: Ctrl-C goes to all of this group
            )

        def listens() -> bool:
            assert self.server.poll() is None, f"JupyterLab ended at once and said:\n{self.said()}"
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(listens, "the server to listen")
        self.address = re.search(r"http://127\.0\.0\.1:\S+token=\w+", self.said()).group()

    def _start_browser(self, started: contextlib.ExitStack) -> None:
        from playwright.sync_api import sync_playwright

        chromium = find_chromium()
        playwright = started.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        started.callback(browser.close)
        self.page = browser.new_page(viewport={"width": 1400, "height": 900})
        self.page.set_default_timeout(CLICK * 1000)
        self.page.on("request", lambda request: self._note(request.url))
        self.page.goto(self.address, timeout=PATIENCE * 1000)
        self.wait_for_idle()

    def _note(self, address: str) -> None:
        if not address.startswith(LOCAL):
            self.strangers.append(address)

    def said(self) -> str:
        """What the server has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_for_idle(self, name: str = "") -> None:
        """Waits until the notebook in front (this one, where it is named) has a kernel with nothing to do.

        The status bar tells; the circle in a notebook's toolbar says "idle" before there is a kernel.
        """
        bar = self.page.locator("#jp-main-statusbar")
        bar.filter(has_text=name).get_by_text("| Idle").wait_for(timeout=PATIENCE * 1000)

    def choose(self, menu: str, entry: str) -> None:
        """Clicks an entry of the menu bar."""
        self.page.locator("#jp-MainMenu").get_by_text(menu, exact=True).click()
        self.page.locator(".lm-Menu").get_by_text(entry, exact=True).click()

    def open(self, name: str) -> "Notebook":
        """Opens a notebook by a double click in the list of files."""
        self.page.locator(".jp-DirListing-item", has_text=f"{name[:8]}").dblclick()
        return self.current(name)

    def current(self, name: str) -> "Notebook":
        """The notebook in front, which has to be this one."""
        self.wait_for_idle(f"{name}.ipynb")
        return Notebook(self, self.course / "notebooks" / f"{name}.ipynb")

    def restart_kernel(self) -> None:
        """Restarts the kernel by the menu and loads the whole page anew, as after a break."""
        with self.page.expect_response(re.compile("/api/kernels/.*/restart")):
            self.choose("Kernel", "Restart Kernel…")
            self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self.page.reload(timeout=PATIENCE * 1000)
        self.wait_for_idle()

    def stop(self) -> tuple[int, list[str]]:
        """Presses Ctrl-C, then closes the browser; returns the server's exit status and what still runs after it."""
        started = psutil.Process().children(recursive=True)
        os.killpg(self.server.pid, signal.SIGINT)
        status = self.server.wait(PATIENCE)
        self._open.close()
        _, alive = psutil.wait_procs(started, timeout=10)
        left = [process for process in alive if not is_dead(process)]
        names = [process.name() for process in left]
        end(left)
        return status, names

    def _end_server(self) -> None:
        """Ends the server and its kernels, orderly or not."""
        if self.server.poll() is None:
            server = psutil.Process(self.server.pid)
            family = [server, *server.children(recursive=True)]
            self.server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.server.wait(10)
            end(family)
            self.server.wait(10)


def end(processes: list[psutil.Process]) -> None:
    """Kills what still runs of these."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def is_dead(process: psutil.Process) -> bool:
    """Whether a process has ended, even where nobody has asked for its exit status yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


class Notebook:
    """An open notebook: the tab in front and the file behind it."""

    def __init__(self, lab: Lab, path: Path) -> None:
        self.lab = lab
        self.path = path
        self._panel = lab.page.locator(".jp-NotebookPanel:visible")

    def cell(self, source: str) -> "Cell":
        """The code cell that holds this text."""
        cells = nbformat.read(self.path, as_version=4).cells
        found = [i for i, cell in enumerate(cells) if cell.cell_type == "code" and source in cell.source]
        assert len(found) == 1, f"{len(found)} code cells of {self.path.name} hold {source!r}"
        return Cell(self.lab, self._panel.locator(f'.jp-Cell[data-windowed-list-index="{found[0]}"]'))

    def run_all(self, seconds: float = PATIENCE) -> None:
        """Runs all cells by the menu and waits for the last of them, or for an error, after which no more are run."""
        self.lab.choose("Run", "Run All Cells")
        last = Cell(self.lab, self._panel.locator(".jp-CodeCell").last)
        errors = self._panel.locator('[data-mime-type="application/vnd.jupyter.stderr"]')  # tracebacks too
        wait_until(lambda: last.count() is not None or errors.count(), "the last cell to run", seconds)
        self.lab.wait_for_idle()

    def run_to(self, cell: "Cell", seconds: float = PATIENCE) -> None:
        """Runs all cells above one by the menu, then that one."""
        cell.select()
        self.lab.choose("Run", "Run All Above Selected Cell")
        cell.run(seconds)

    def save(self) -> nbformat.NotebookNode:
        """Saves by the menu; returns what stands in the file."""
        with self.lab.page.expect_response(
            lambda answer: answer.request.method == "PUT" and self.path.name in answer.url
        ):
            self.lab.choose("File", "Save Notebook")
        return nbformat.read(self.path, as_version=4)


class Cell:
    """A code cell as it is seen."""

    def __init__(self, lab: Lab, locator) -> None:
        self.lab = lab
        self.locator = locator
        self.output = locator.locator(".jp-Cell-outputArea")
        self._prompt = locator.locator(".jp-InputArea-prompt")

    def count(self) -> int | None:
        """The number beside the cell: its execution count; None while it runs or has not run."""
        shown = re.fullmatch(r"\[(\d+)\]:", self._prompt.inner_text().strip())
        return int(shown.group(1)) if shown else None

    def select(self) -> None:
        """Makes it the active cell, without a cursor in it."""
        self._prompt.click()

    def run(self, seconds: float = PATIENCE) -> None:
        """Runs the cell as it stands and waits for its end."""
        self.select()
        # Whatever number stood there, even the same one before a restart, the next to stand there is of this run.
        self._prompt.evaluate("prompt => prompt.textContent = ''")
        self.lab.page.keyboard.press("Control+Enter")
        wait_until(lambda: self.count() is not None, "the cell to run", seconds)
        self.lab.wait_for_idle()

    def answer(self, line: str) -> None:
        """Types a line in place of the cell's last one, then runs the cell."""
        last = self.locator.locator(".cm-line").last
        last.click()
        for key in ("End", "Shift+Home"):  # as far as the indentation
            self.lab.page.keyboard.press(key)
        self.lab.page.keyboard.type(line)
        assert last.inner_text().strip() == line, f"the editor made {last.inner_text()!r} of {line!r}"
        self.run()
