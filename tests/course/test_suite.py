"""The suite: what it counts, how it spares a learner's files, and that its gate fails what it should."""

import argparse
import re
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from copy import deepcopy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from moe_lab.course import builder, offline, suite
from moe_lab.course.lesson import canonical, parse, solved
from moe_lab.paths import CourseError


def options(*arguments):
    """The options of `moe-lab test …`."""
    parser = argparse.ArgumentParser()
    suite.add_arguments(parser)
    return parser.parse_args(arguments)


# The gate, on tiny notebooks that each break one rule


def cell(source, *outputs, tags=(), count=1):
    """An executed cell with these stored outputs."""
    metadata = {"tags": list(tags)} if tags else {}
    return new_code_cell(source, outputs=list(outputs), execution_count=count, metadata=metadata)


def printed(text, stream="stdout"):
    return new_output("stream", name=stream, text=text)


def shown(data, stored=None):
    """A cell that displays these mime types, and its stored output (the same, unless another is given)."""
    return cell(
        f"from IPython.display import display\ndisplay({data!r}, raw=True)",
        new_output("display_data", data=stored or data),
    )


FIGURE = {"image/png": "aGk=", "text/plain": "Figure: a curve"}
PLAIN = cell("print(1)", printed("1\n"))
ANY = "nbval-ignore-output"
HOST = socket.gethostname()

# name: (cells, time badge, what the gate says); None: it passes
STRICT = {
    "good": (
        [
            PLAIN,
            shown(FIGURE, stored={**FIGURE, "image/png": "aGg="}),
            shown({"text/html": "<b>ValueError</b>: expected (2, 3)"}),
        ],
        60,
        None,
    ),
    "widget": (
        [
            PLAIN,
            cell(
                "import ipywidgets\nfrom IPython.display import display\n\nbox = ipywidgets.HTML()\n"
                "display({**box._repr_mimebundle_(), 'text/plain': 'box', 'text/html': '<p>'}, raw=True)",
                new_output("display_data", data={"text/plain": "box", "text/html": "<p>"}),
            ),
        ],
        60,
        None,
    ),
    "wrong_output": ([PLAIN, cell("print(1)", printed("2\n"))], 60, None),  # nbval itself fails the cell
    "wrong_html": ([PLAIN, shown({"text/html": "<b>1</b>"}, stored={"text/html": "<b>2</b>"})], 60, None),  # so here
    "no_cells": ([new_markdown_cell("Only words.")], 60, "no cell was run"),
    "skipped": ([cell("print(1)", printed("1\n"), tags=["nbval-skip"])], 60, "no cell was run"),
    "never_executed": ([PLAIN, new_code_cell("x = 1")], 60, "code cells 1 hold no execution count"),
    "figures": ([PLAIN, shown(FIGURE), shown(FIGURE)], 60, "compared 1 of 3 cells with output, at least 50%"),
    "reprs": ([cell("'Figure: x'", new_output("display_data", data={"text/plain": "'Figure: x'"}))], 60, None),
    "ignored": (
        [PLAIN, *[cell("print(2)", printed("2\n"), tags=[ANY]) for _ in range(2)]],
        60,
        "compared 1 of 3 cells with output, at least 50%",
    ),
    "silent": ([cell("x = 1")], 60, "compared 0 of 0 cells with output"),
    "path": ([cell("print('/home/ada/x')", printed("/home/ada/x\n"))], 60, "holds the path '/home/ada/x'"),
    "live_path": (
        [PLAIN, cell("print('/home/ada/x')", printed("a\n"), tags=[ANY])],
        60,
        "holds the path '/home/ada/x'",
    ),
    "stored_path": (
        [PLAIN, cell("print('a')", printed("/home/ada/x\n"), tags=[ANY])],
        60,
        "holds the path '/home/ada/x'",
    ),
    "host": (
        [PLAIN, cell("import socket\nprint(socket.gethostname())", tags=[ANY])],
        60,
        None if HOST in ("", "localhost") else f"holds the host name {HOST!r}",
    ),
    "warning": (
        [PLAIN, cell("print('DeprecationWarning: old')", tags=[ANY])],
        60,
        "holds a warning or traceback ('DeprecationWarning')",
    ),
    "stderr": (
        [PLAIN, cell("import sys\nprint('careful', file=sys.stderr)", tags=[ANY])],
        60,
        "it wrote to stderr: 'careful'",
    ),
    "error": ([PLAIN, cell("1 / 0", tags=["raises-exception", ANY])], 60, "an output is the error ZeroDivisionError"),
    "slow": ([PLAIN], 0, "its time badge allows 0 s × 2"),
    "no_badge": ([PLAIN], None, "no time badge"),
}
LAX = {
    "good": ([new_code_cell("print(1)"), new_code_cell("x = 1")], 60, None),
    "no_cells": ([new_markdown_cell("Only words.")], 60, "no cell was run"),
    "path": ([new_code_cell("print('/home/ada/x')")], 60, "holds the path '/home/ada/x'"),
    "slow": ([new_code_cell("x = 1")], 0, "its time badge allows 0 s × 2"),
}


def run_notebooks(scratch, folder, notebooks):
    """Run notebooks as the suite does; what each gate said, None where it passed."""
    (scratch / "pytest.ini").write_text("[pytest]\n")
    (scratch / folder).mkdir()
    for name, (cells, badge, _) in notebooks.items():
        about = {} if badge is None else {"seconds": badge}
        notebook = new_notebook(cells=cells, metadata={"moe_lab": about})
        nbformat.write(notebook, scratch / folder / f"{name}.ipynb")
    result = suite.notebooks(folder, scratch, [], 2.0)
    report = ElementTree.parse(scratch / f"{result.step}.xml")
    gates = {
        case.get("classname").split(".")[1]: case for case in report.iter("testcase") if case.get("name") == "gate"
    }
    said = {name: case.find("failure") for name, case in gates.items()}
    return result, {name: None if failure is None else failure.text for name, failure in said.items()}


def unexpected(said, cases):
    """The notebooks of which the gate did not say what it should, with what it said."""
    return {
        name: said[name]
        for name, (_, _, expected) in cases.items()
        if (said[name] is not None if expected is None else expected not in (said[name] or ""))
    }


def test_the_gate_on_solved_notebooks(tmp_path):
    """One test, since all these notebooks take one run of pytest."""
    result, said = run_notebooks(tmp_path, "solutions", STRICT)
    assert unexpected(said, STRICT) == {}
    findings = {name: len(text.splitlines()) for name, text in said.items() if text}
    nothing_ran = {"no_cells": 2, "skipped": 2}  # what did not run was not compared either
    assert findings == {name: 1 for name in STRICT if STRICT[name][2]} | nothing_ran
    wrong_outputs = 2  # cells, not gates
    assert (result.failed, result.skipped) == (len(findings) + wrong_outputs, 1)
    good = next(row for row in result.notebooks if row["notebook"] == "good")
    assert (good["badge"], good["compared"]) == ("60", "2 of 3")
    assert 0 < float(good["seconds"]) < 60


def test_the_gate_on_unsolved_notebooks(tmp_path):
    result, said = run_notebooks(tmp_path, "notebooks", LAX)
    assert unexpected(said, LAX) == {}
    assert (result.passed, result.failed, result.skipped) == (4 + 1, 3, 0)


# Laying out


def test_a_changed_output_fails_and_a_changed_cell_gets_no_stored_output(tiny_course):
    lesson = parse(tiny_course / "lessons" / "90_tiny.py")
    stored = solved(lesson)
    for each in stored.cells:
        if each.cell_type == "code":
            each.execution_count, each.outputs = 3, [printed("kept\n")]
    stored.cells[4].source = "print('edited')"
    notebook = suite.with_outputs(solved(lesson), stored)
    assert [each.get("execution_count") for each in notebook.cells] == [None, 3, None, 3, None, None, 3]
    assert notebook.cells[1].outputs == [printed("kept\n")]
    assert [each.source for each in notebook.cells] == [each.source for each in solved(lesson).cells]


def test_a_learners_edits_neither_fail_the_suite_nor_vanish(tiny_course, monkeypatch, capsys):
    monkeypatch.chdir(tiny_course)
    builder.build(parse(tiny_course / "lessons" / "90_tiny.py"), tiny_course)
    before = {}
    for folder in ("notebooks", "solutions"):
        path = tiny_course / folder / "90_tiny.ipynb"
        built = nbformat.read(path, as_version=4)
        notebook = deepcopy(built)
        notebook.cells[4].source = "1 / 0"
        path.write_text(canonical(notebook), encoding="utf-8")
        before[path] = path.read_bytes()
    files = sorted(tiny_course.rglob("*"))

    monkeypatch.setattr(builder, "committed", lambda path: canonical(built))
    assert suite.main(options("--only", "notebooks", "-k", "90")) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(tiny_course.rglob("*")) == files
    out = capsys.readouterr().out
    assert re.search(r"^90_tiny +solved +[\d.]+ +60  2 of 2$", out, re.MULTILINE)
    assert out.endswith("\n10 passed, 0 failed, 0 skipped\n")


def test_where_no_built_solution_is_left_to_compare_with_it_is_said(tiny_course, tmp_path_factory):
    lesson = parse(tiny_course / "lessons" / "90_tiny.py")
    scratch = tmp_path_factory.mktemp("scratch")
    (tiny_course / "solutions" / "90_tiny.ipynb").write_text("mine")
    (reason,) = suite.lay_out([lesson], tiny_course, scratch)
    assert reason.startswith("solutions/90_tiny.ipynb holds work of yours and git has no copy of the built one")
    assert [path.parent.name for path in scratch.rglob("*.ipynb")] == ["notebooks"]


def test_edits_in_every_solution_leave_the_solved_step_skipped_aloud(tiny_course, monkeypatch, capsys):
    monkeypatch.chdir(tiny_course)
    (tiny_course / "solutions" / "90_tiny.ipynb").write_text("mine")
    monkeypatch.setattr(suite, "notebooks", lambda folder, *_: suite.Result(folder, passed=3))
    assert suite.main(options("--only", "notebooks")) == 0
    out = capsys.readouterr().out
    assert "skipped: solutions/90_tiny.ipynb holds work of yours" in out
    assert re.search(r"^notebooks, solved +skipped +0 +0 +1 ", out, re.MULTILINE)


def test_a_lesson_that_cannot_be_read_fails_its_step_only(tiny_course, monkeypatch, capsys):
    monkeypatch.chdir(tiny_course)
    (tiny_course / "lessons" / "90_tiny.py").write_text("1")
    monkeypatch.setattr(suite, "browser", lambda *_: suite.Result("browser", passed=1))
    assert suite.main(options("--only", "notebooks", "--only", "browser")) == 1
    out = capsys.readouterr().out
    assert "The notebooks could not be laid out: 90_tiny.py: its header must give moe_lab.title" in out
    assert out.endswith("1 passed, 1 failed, 0 skipped\n")


def test_a_lesson_that_does_not_exist_is_said_before_anything_runs(tiny_course, monkeypatch):
    monkeypatch.chdir(tiny_course)
    with pytest.raises(CourseError, match="No lesson 77; there are 90_tiny"):
        suite.main(options("-k", "77"))


# The steps and their table


@pytest.fixture
def few_plugins(monkeypatch):
    """The pytest that a step starts loads no plugins but xdist: they cost seconds each time."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_all_steps_run_even_when_one_fails_and_the_last_line_adds_up(tiny_course, monkeypatch, capfd, few_plugins):
    monkeypatch.chdir(tiny_course)
    write(tiny_course, "untidy.py", "import os\n")
    write(tiny_course, "notebooks/mine.py", "import os\n")  # a learner's folder is not linted
    passes = 'def test_passes(record_property):\n    record_property("seen", 1)  # its own, no notebook\'s\n'
    skip = '@pytest.mark.skip(reason="no")\ndef test_skips():\n    pass\n'
    write(tiny_course, "tests/test_a.py", f"import pytest\n\n\n{passes}\n\n{skip}")
    write(
        tiny_course, "tests/browser/test_b.py", 'import pytest\n\npytest.skip("no Chromium", allow_module_level=True)\n'
    )
    assert suite.main(options("--only", "lint", "--only", "unit", "--only", "browser")) == 1
    out = capfd.readouterr().out
    assert "untidy.py" in out
    assert "mine.py" not in out
    assert "no Chromium" in out
    assert re.search(r"^lint +failed +1 +1 +0 ", out, re.MULTILINE)
    assert re.search(r"^unit tests +passed +1 +0 +1 ", out, re.MULTILINE)
    assert re.search(r"^browser +skipped +0 +0 +1 ", out, re.MULTILINE)
    assert out.splitlines()[-1] == "2 passed, 1 failed, 2 skipped"


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("", 1),  # no test at all
        ("def test_fails():\n    assert False\n\n\ndef test_too():\n    assert 0\n", 2),
        ("import nowhere_to_be_found\n", 1),
        ("import os\n\n\ndef test_ends():\n    os._exit(0)\n", 1),
    ],
)
def test_a_step_fails_without_tests_and_with_any_failure(tmp_path, few_plugins, text, failed):
    write(tmp_path, "tests/browser/test_x.py", text)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    result = suite.browser(tmp_path, tmp_path)
    assert (result.failed, result.verdict) == (failed, "failed")


def test_a_missing_tool_is_named_with_the_remedy(tiny_course, monkeypatch):
    monkeypatch.setattr(suite, "NEEDED", {"nowhere_to_be_found": "pytest-xdist"})
    with pytest.raises(CourseError, match=re.escape('pytest-xdist is not installed; run `pip install -e ".[test]"`')):
        suite.main(options())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process could answer")
def test_stopping_the_suite_stops_what_it_started(tiny_course):
    write(
        tiny_course,
        "tests/browser/test_x.py",
        """
        import os, pathlib, time

        def test_sleeps():
            try:
                pathlib.Path("started").touch()
                time.sleep(60)
            finally:
                pathlib.Path("ended").touch()
    """.replace("\n        ", "\n"),
    )
    code = "from moe_lab.cli import main; main(['test', '--only', 'browser'])"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tiny_course, stdout=subprocess.DEVNULL)
    try:
        wait_for(tiny_course / "started")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert (tiny_course / "ended").exists()
    finally:
        process.kill()


def wait_for(path, seconds=60):
    """Until the file is there."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} did not come"
        time.sleep(0.1)


@pytest.mark.parametrize(("arguments", "factor"), [((), 2.0), (("--strict-time",), 1.0)])
def test_time_badges_count_twice_unless_strict(tiny_course, monkeypatch, arguments, factor):
    seen = []
    monkeypatch.chdir(tiny_course)
    monkeypatch.setattr(suite, "notebooks", lambda *given: seen.append(given[-1]) or suite.Result("n", passed=1))
    assert suite.main(options("--only", "notebooks", *arguments)) == 0
    assert seen == [factor, factor]


def test_outputs_are_not_compared_where_a_package_is_missing_and_that_is_said(tiny_course, tmp_path, monkeypatch):
    path = next((tiny_course / "lessons").glob("90_*.py"))
    path.write_text(
        path.read_text(encoding="utf-8").replace("#     hardware: CPU", "#     hardware: CPU\n#     needs: nowhere")
    )
    lesson = parse(path)
    assert lesson.needs == "nowhere"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert suite.lay_out([lesson], tiny_course, scratch) == [
        f"solutions/{lesson.name}.ipynb needs nowhere, which is not here: not compared"
    ]
    assert [path.parent.name for path in scratch.rglob("*.ipynb")] == ["notebooks"]


# The network


REACH = """
import socket, sys
outside = int(sys.argv[1])
names = [name for _, name in socket.if_nameindex()]
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname(), timeout=5).close()
    print("loopback answers")
try:
    socket.create_connection(("127.0.0.1", outside), timeout=5)
    print("outside answers")
except OSError:
    print("outside is cut off")
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    print(error.strerror)
"""


def test_offline_reaches_loopback_and_nothing_outside():
    """The outside is a server of this very machine, which every process can reach that is not cut off."""
    prefix = offline.prefix()
    if not prefix:
        pytest.skip("this system does not let a process cut its network off (Linux with namespaces only)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", REACH, str(server.getsockname()[1])]
        inside = subprocess.run([*prefix, *command], capture_output=True, text=True, timeout=60)
        control = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert inside.stdout.splitlines() == ["loopback answers", "outside is cut off", "Network is unreachable"]
    assert control.stdout.splitlines()[:2] == ["loopback answers", "outside answers"]


def test_the_offline_command_keeps_exit_status_and_says_nothing(capfd):
    prefix = offline.prefix()
    if not prefix:
        pytest.skip("this system does not let a process cut its network off (Linux with namespaces only)")
    assert subprocess.run([*prefix, sys.executable, "-c", "raise SystemExit(7)"]).returncode == 7
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_the_network_stays_and_it_is_said(tiny_course, monkeypatch, capsys, platform):
    monkeypatch.setattr(offline.sys, "platform", platform)
    assert offline.prefix() == []
    monkeypatch.chdir(tiny_course)
    monkeypatch.setattr(suite, "notebooks", lambda *_: suite.Result("notebooks", passed=1))
    assert suite.main(options("--only", "notebooks")) == 0
    assert "run WITH the network" in capsys.readouterr().out
