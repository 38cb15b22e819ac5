"""`moe-lab build`: makes notebooks/ and solutions/ from lessons/, the same bytes every time."""

import argparse
import difflib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbval.kernel import CURRENT_ENV_KERNEL_NAME, NbvalKernelspecManager

from moe_lab.course import form
from moe_lab.course.kernels import kernel_environment, kernel_sockets
from moe_lab.course.lesson import LANGUAGE_INFO, Lesson, canonical, digest, parse, solved, unsolved
from moe_lab.paths import CourseError, course_root

CELL_TIMEOUT = 300  # seconds
NAMED = 3  # differing cells named one by one
WIDGET = "application/vnd.jupyter.widget-view+json"


class BuildError(CourseError):
    """A lesson that could not be built: which cell, and why."""


def choose(lessons: Path, wanted: list[str]) -> list[Path]:
    """The lessons named by number (`1`, `01`) or name (`01_dense_ffn`), in order; all of them if none is named.

    Raises:
        BuildError: there is no lesson of that name.
    """
    found = sorted(lessons.glob("[0-9][0-9]_*.py"))
    if not found:
        raise BuildError(f"No lesson in {lessons}: expected files called NN_topic.py.")
    chosen = set()
    for name in wanted:
        matches = {path for path in found if path.stem == name or path.stem[:2] == name.zfill(2)}
        if not matches:
            raise BuildError(f"No lesson {name}; there are {', '.join(path.stem for path in found)}.")
        chosen |= matches
    return sorted(chosen) if wanted else found


def execute(notebook: NotebookNode, folder: Path, name: str) -> None:
    """Run all cells in `folder` and store their outputs, without anything that differs from run to run.

    Raises:
        BuildError: a cell raised, took too long or killed the kernel.
    """
    current = 0

    def remember(cell: NotebookNode, cell_index: int) -> None:
        nonlocal current
        current = cell_index

    client = NotebookClient(
        notebook,
        # The kernel of this very Python, as in the suite, whatever kernels the user has registered.
        km=AsyncKernelManager(
            kernel_name=CURRENT_ENV_KERNEL_NAME, kernel_spec_manager=NbvalKernelspecManager(), **kernel_sockets()
        ),
        timeout=CELL_TIMEOUT,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=40"],
        on_cell_execute=remember,
    )
    with tempfile.TemporaryDirectory(prefix="moe-lab-") as scratch:
        try:
            client.execute(cleanup_kc=True, cwd=str(folder), env=kernel_environment(Path(scratch)))
        except CellExecutionError as error:
            reason = f"raised {error.ename}: {error.evalue}"
        except CellTimeoutError:
            reason = f"ran longer than {CELL_TIMEOUT} s"
        except DeadKernelError:
            reason = "ended the kernel"
        else:
            reason = None
    if reason:
        first_line = notebook.cells[current].source.strip().split("\n")[0]
        raise BuildError(f"{name}, cell {current + 1} (`{first_line}`) {reason}")
    _make_repeatable(notebook)


def differences(built: NotebookNode, path: Path, metadata: bool = True) -> list[str]:
    """How the notebook at `path` departs from the built one in sources, structure and metadata (not in outputs)."""
    if not path.exists():
        return ["it does not exist"]
    try:
        there = nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises whatever its parser does
        return [f"it cannot be read ({type(error).__name__})"]
    if there.get("nbformat_minor") != built.nbformat_minor:
        return [f"its format is 4.{there.get('nbformat_minor')}, expected 4.{built.nbformat_minor}"]
    found = []
    for position, (expected, actual) in enumerate(zip(built.cells, there.cells, strict=False), start=1):
        for part in ("cell_type", "source", "id", *(["metadata"] if metadata else [])):
            if expected[part] != actual.get(part):
                found.append(f"cell {position} has another {part}{_first_change(expected, actual, part)}")
                break
    if len(found) > NAMED:  # a cell put in shifts all that follow
        found[NAMED:] = [f"and {len(found) - NAMED} more cells"]
    if len(built.cells) != len(there.cells):
        found.append(f"it has {len(there.cells)} cells, expected {len(built.cells)}")
    if metadata and _without_digest(built) != _without_digest(there):
        found.append("its metadata differs")
    return found


def is_learners_work(path: Path) -> bool:
    """Whether the cells at `path` are no longer the ones that were built, or cannot be told to be."""
    try:
        there = nbformat.read(path, as_version=4)
        return digest(there) != there.metadata.get("moe_lab", {}).get("digest")
    except Exception:  # damaged or foreign: not ours to overwrite
        return path.exists()


def committed(path: Path) -> str | None:
    """The text of the file as git has it at HEAD; None without git, or where it holds none."""
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=path.parent, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return shown.stdout.decode(errors="replace")


def stored_solution(lesson: Lesson, root: Path) -> NotebookNode | None:
    """The solution with its outputs as built; where somebody worked in it, git's copy; None where there is neither."""
    path = root / "solutions" / f"{lesson.name}.ipynb"
    if is_learners_work(path):
        text = committed(path)
        return nbformat.reads(text, as_version=4) if text else None
    return nbformat.read(path, as_version=4) if path.exists() else None


def build(lesson: Lesson, root: Path, force: bool = False) -> None:
    """Make the two notebooks of a lesson, sparing a learner's work unless forced; says what it did.

    Raises:
        BuildError: the lesson breaks the course's form, or its solution does not run cleanly.
    """
    if faults := form.lesson_faults(lesson, root):
        raise BuildError("\n".join(faults))
    targets = {root / "notebooks" / f"{lesson.name}.ipynb": unsolved(lesson)}
    solution = root / "solutions" / f"{lesson.name}.ipynb"
    note = ""
    if force or not is_learners_work(solution):
        targets[solution] = solved(lesson)
        solution.parent.mkdir(exist_ok=True)
        print(f"{lesson.name}: running the solved notebook", flush=True)
        started = time.monotonic()
        execute(targets[solution], solution.parent, lesson.name)
        seconds = time.monotonic() - started
        note = f" ({seconds:.0f} s, its badge says {lesson.seconds} s)"
        if faults := form.output_faults(targets[solution]):
            raise BuildError("\n".join(f"{lesson.name}, solved, {fault}" for fault in faults))
    else:
        print(_left_alone(solution, root))
    for path, notebook in targets.items():
        notebook.metadata.moe_lab.digest = digest(notebook)
        mine = is_learners_work(path)
        if mine and not force:
            print(_left_alone(path, root))
            continue
        try:
            if mine:
                print(f"{_set_aside(path).relative_to(root)}: a copy of what was in {path.name}")
            state = _write(path, canonical(notebook))
        except OSError as error:
            raise BuildError(f"{path} could not be written: {error.strerror}; free the disk or the folder.") from None
        print(f"{path.relative_to(root)}: {state}{note if path == solution else ''}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe-lab build`."""
    parser.add_argument("lessons", nargs="*", metavar="NN", help="numbers of the lessons to build (default: all)")
    parser.add_argument(
        "--force", action="store_true", help="also overwrite notebooks that hold work; a copy is kept beside"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a notebook is out of date")


def main(args: argparse.Namespace) -> int:
    """Build, or check, the chosen lessons; returns the exit status."""
    root = course_root()
    failed = 0
    for path in choose(root / "lessons", args.lessons):
        try:
            lesson = parse(path)
            if args.check:
                failed += _report_stale(lesson, root)
            else:
                build(lesson, root, force=args.force)
        except CourseError as problem:
            failed += 1
            print(problem)
    return 1 if failed else 0


def _make_repeatable(notebook: NotebookNode) -> None:
    notebook.metadata["language_info"] = dict(LANGUAGE_INFO)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)  # names a model of this run; a reader sees its picture
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("data") != {}]


def _report_stale(lesson: Lesson, root: Path) -> bool:
    faults = form.lesson_faults(lesson, root)
    for folder, notebook in (("notebooks", unsolved(lesson)), ("solutions", solved(lesson))):
        path = root / folder / f"{lesson.name}.ipynb"
        faults += [f"{path.relative_to(root)}: {found}" for found in differences(notebook, path)]
    print("\n".join(faults) or f"{lesson.name}: up to date")
    return bool(faults)


def _first_change(expected: NotebookNode, actual: NotebookNode, part: str) -> str:
    if part != "source":
        return f": expected {expected[part]!r}, found {actual.get(part)!r}"
    lines = difflib.ndiff(expected.source.splitlines(), actual.source.splitlines())
    return ": " + "; ".join([line for line in lines if line[:1] in "+-"][:2])


def _without_digest(notebook: NotebookNode) -> dict:
    about = {key: value for key, value in notebook.metadata.get("moe_lab", {}).items() if key != "digest"}
    return {**notebook.metadata, "moe_lab": about}


def _left_alone(path: Path, root: Path) -> str:
    return (
        f"{path.relative_to(root)}: left alone, it holds work of yours "
        "(`moe-lab build --force` overwrites it and keeps a copy beside)"
    )


def _set_aside(path: Path) -> Path:
    number = 1
    while (copy := path.with_name(f"{path.stem}.mine-{number}.ipynb")).exists():
        number += 1
    shutil.copy2(path, copy)
    return copy


def _write(path: Path, text: str) -> str:
    """Replace the file in one step, so that no moment shows half of it."""
    if path.exists() and path.read_bytes() == text.encode():
        return "unchanged"
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(text.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return "written"
