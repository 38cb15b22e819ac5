"""`moe-lab test`: lint, unit tests, kernels, every notebook in both forms, and the browser; one table at the end."""

import argparse
import importlib.util
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbformat import NotebookNode

from moe_lab.course import offline
from moe_lab.course.builder import choose, stored_solution
from moe_lab.course.kernels import kernel_environment
from moe_lab.course.lesson import Lesson, canonical, parse, solved, unsolved
from moe_lab.paths import CourseError, course_root

STEPS = ("lint", "unit", "kernels", "notebooks", "browser")
NEEDED = {
    "hypothesis": "hypothesis",
    "nbval": "nbval",
    "psutil": "psutil",
    "pytest": "pytest",
    "ruff": "ruff",
    "transformers": "transformers",
    "xdist": "pytest-xdist",
    "yaml": "pyyaml",
}
# Made from lessons/, which is linted; and a learner may write there as untidily as they like.
NOT_LINTED = ("notebooks", "solutions")
STOP_SECONDS = 15
NO_TESTS = 5  # pytest's status where every file skipped itself


@dataclass
class Result:
    """How one step went."""

    step: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    notebooks: list[dict[str, str]] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """`passed`, `failed`, or `skipped` where nothing but skips came back."""
        return "failed" if self.failed else "passed" if self.passed else "skipped"


def lint(root: Path) -> Result:
    """Ruff's rules and its formatting, over all but the built notebooks."""
    result = Result("lint")
    for command in (("check",), ("format", "--check")):
        left_out = [option for folder in NOT_LINTED for option in ("--extend-exclude", folder)]
        status = _run([sys.executable, "-m", "ruff", *command, *left_out, "."], root)
        result.passed += status == 0
        result.failed += status != 0
    return result


def unit(root: Path, scratch: Path) -> Result:
    """All tests but the browser's and those of Triton's kernels, two at a time."""
    chosen = ["tests", "--ignore=tests/browser", "-m", "not interpreted"]
    return _pytest("unit tests", [*chosen, "-n", "2"], root, scratch)


def kernels(root: Path, scratch: Path) -> Result:
    """The tests of Triton's kernels, in its interpreter: a process can either interpret kernels or compile them."""
    chosen = ["tests", "--ignore=tests/browser", "-m", "interpreted"]
    return _pytest("kernels", [*chosen, "-n", "2"], root, scratch, TRITON_INTERPRET="1")


def browser(root: Path, scratch: Path) -> Result:
    """The tests that drive JupyterLab; they skip themselves, with the reason, where there is no Chromium."""
    return _pytest("browser", ["tests/browser", "-rs"], root, scratch)


def notebooks(folder: str, scratch: Path, prefix: list[str], factor: float) -> Result:
    """Run the notebooks laid out in one folder: the solved ones compared strictly, the others only to their end."""
    mode, name = ("--nbval", "solved") if folder == "solutions" else ("--nbval-lax", "unsolved")
    options = [mode, "--nbval-current-env", "--nbval-cell-timeout=300", "--nbval-kernel-startup-timeout=180"]
    parallel = ["-n", "2", "--dist", "loadfile"]  # a notebook stays in one process, with one kernel
    # No other plugins: they cost seconds in every process, and a user's own could change what is judged.
    plugins = ["-p", "xdist.plugin", "-p", "nbval.plugin", "-p", "moe_lab.course.nbval_gate", "-p", "no:cacheprovider"]
    arguments = [*plugins, folder, *options, *parallel, f"--badge-factor={factor}", "--tb=short"]
    return _pytest(f"notebooks, {name}", arguments, scratch, scratch, prefix, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


def lay_out(lessons: list[Lesson], root: Path, scratch: Path) -> list[str]:
    """Make a course in `scratch`, with notebooks rebuilt from their lessons and solutions holding their stored outputs.

    So neither a learner's edits nor their progress file are ever touched. Returns what it could not lay out, and why.
    """
    for folder in ("data", "benchmarks/results"):  # what notebooks read
        if (root / folder).is_dir():
            shutil.copytree(root / folder, scratch / folder, ignore=shutil.ignore_patterns("sources"))
    (scratch / "pytest.ini").write_text("[pytest]\n")  # keeps pytest from looking for a configuration further up
    for folder in ("notebooks", "solutions"):
        (scratch / folder).mkdir()
    left_out = []
    for lesson in lessons:
        _save(unsolved(lesson), scratch / "notebooks" / f"{lesson.name}.ipynb")
        if lesson.needs and importlib.util.find_spec(lesson.needs) is None:
            left_out.append(f"solutions/{lesson.name}.ipynb needs {lesson.needs}, which is not here: not compared")
            continue
        stored = stored_solution(lesson, root)
        if stored is None and (root / "solutions" / f"{lesson.name}.ipynb").exists():
            left_out.append(
                f"solutions/{lesson.name}.ipynb holds work of yours and git has no copy of the built one: "
                "its outputs are not compared"
            )
            continue
        _save(with_outputs(solved(lesson), stored), scratch / "solutions" / f"{lesson.name}.ipynb")
    return left_out


def with_outputs(notebook: NotebookNode, stored: NotebookNode | None) -> NotebookNode:
    """Give the cells the outputs that the stored notebook holds under the same ids."""
    known = {cell.id: cell for cell in stored.cells if cell.cell_type == "code"} if stored else {}
    for cell in notebook.cells:
        if cell.id in known and cell.source == known[cell.id].source:
            cell.outputs = known[cell.id].outputs
            cell.execution_count = known[cell.id].execution_count
    return notebook


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe-lab test`."""
    parser.add_argument("--only", action="append", choices=STEPS, help="run only this step (can be repeated)")
    parser.add_argument(
        "-k", dest="lessons", action="append", metavar="NN", help="of the notebooks only this one (can be repeated)"
    )
    parser.add_argument(
        "--strict-time", action="store_true", help="hold notebooks to their time badge, not to twice that"
    )


def main(args: argparse.Namespace) -> int:
    """Run the chosen steps, all of them even when one fails; returns the exit status."""
    for module, package in NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise CourseError(f'{package} is not installed; run `pip install -e ".[test]"` in the course folder.')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else our children would outlive us
    root = course_root()
    chosen = args.only or STEPS
    lessons = choose(root / "lessons", args.lessons or [])
    results = []
    with tempfile.TemporaryDirectory(prefix="moe-lab-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        if "lint" in chosen:
            results.append(_timed("lint", lint, root))
        if "unit" in chosen:
            results.append(_timed("unit tests", unit, root, scratch))
        if "kernels" in chosen:
            results.append(_timed("kernels", kernels, root, scratch))
        if "notebooks" in chosen:
            results += _both_forms(root, scratch, lessons, 1.0 if args.strict_time else 2.0)
        if "browser" in chosen:
            results.append(_timed("browser", browser, root, scratch))
    _summarise(results)
    return 1 if any(result.failed for result in results) else 0


def _both_forms(root: Path, scratch: Path, lessons: list[Path], factor: float) -> list[Result]:
    try:
        left_out = lay_out([parse(path) for path in lessons], root, scratch)
    except (CourseError, OSError) as problem:
        print(f"\nThe notebooks could not be laid out: {problem}")
        return [Result("notebooks", failed=1)]
    prefix = offline.prefix()
    if prefix:
        print("\nThe notebooks run with the network cut off but for loopback.")
    else:
        print("\nThe notebooks run WITH the network: this system does not let a process cut it off (Linux only).")
    for reason in left_out:
        print(f"skipped: {reason}")
    results = [Result("notebooks, solved")]
    if len(left_out) < len(lessons):
        results = [_timed("notebooks, solved", notebooks, "solutions", scratch, prefix, factor)]
    results[0].skipped += len(left_out)
    return [*results, _timed("notebooks, unsolved", notebooks, "notebooks", scratch, prefix, factor)]


def _timed(title: str, step: Callable[..., Result], *arguments: object) -> Result:
    print(f"\n=== {title} ===", flush=True)
    started = time.monotonic()
    result = step(*arguments)
    result.seconds = time.monotonic() - started
    return result


def _pytest(
    step: str, arguments: list[str], cwd: Path, scratch: Path, prefix: Sequence[str] = (), **variables: str
) -> Result:
    """Run pytest in its own process and read what it counted."""
    report = scratch / f"{step}.xml"
    command = [*prefix, sys.executable, "-m", "pytest", "-q", *arguments, f"--junitxml={report}"]
    status = _run(command, cwd, kernel_environment(scratch) | variables)
    result = Result(step)
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        result.failed = int(suite.get("failures")) + int(suite.get("errors"))
        result.skipped = int(suite.get("skipped"))
        result.passed = max(int(suite.get("tests")) - result.failed - result.skipped, 0)
        properties = (case.find("properties") for case in suite.iter("testcase"))
        rows = [{item.get("name"): item.get("value") for item in found} for found in properties if found is not None]
        result.notebooks = [row for row in rows if "notebook" in row]  # a test may note other things of its own
    if not result.passed + result.failed + result.skipped:
        print(f"{step}: no test was found, which counts as a failure")
        result.failed = 1
    elif status not in (0, NO_TESTS) and not result.failed:
        print(f"{step}: pytest ended with status {status}")
        result.failed = 1
    return result


def _run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> int:
    """Run a command to its end; whoever stops us stops it too, in the orderly way that also ends its kernels."""
    process = subprocess.Popen(command, cwd=cwd, env=environment)
    try:
        return process.wait()
    except BaseException as stopped:
        if not isinstance(stopped, KeyboardInterrupt):  # Ctrl-C reaches the command by itself
            process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise


def _summarise(results: list[Result]) -> None:
    if any(result.notebooks for result in results):
        print(f"\n{'notebook':<24}{'form':<10}{'seconds':>8}{'badge':>7}  cells compared")
    for result in results:
        for row in result.notebooks:
            form = result.step.split()[-1]
            print(f"{row['notebook']:<24}{form:<10}{row['seconds']:>8}{row['badge']:>7}  {row['compared']}")
    print(f"\n{'step':<22}{'result':<9}{'passed':>7}{'failed':>7}{'skipped':>8}{'seconds':>9}")
    for result in results:
        counts = f"{result.passed:>7}{result.failed:>7}{result.skipped:>8}"
        print(f"{result.step:<22}{result.verdict:<9}{counts}{result.seconds:>9.1f}")
    totals = [sum(getattr(result, kind) for result in results) for kind in ("passed", "failed", "skipped")]
    print("\n{} passed, {} failed, {} skipped".format(*totals), flush=True)


def _save(notebook: NotebookNode, path: Path) -> None:
    path.write_text(canonical(notebook), encoding="utf-8")
