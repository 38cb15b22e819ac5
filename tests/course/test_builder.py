"""The builder: what it makes of a lesson, and what it leaves alone."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest

from moe_lab.course import builder, kernels
from moe_lab.course.lesson import STUB, LessonError, canonical, digest, parse, solved, unsolved
from moe_lab.paths import CourseError


def lesson_with(course, old, new):
    """The tiny lesson with one passage changed."""
    path = course / "lessons" / "90_tiny.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def run(course, monkeypatch, *arguments):
    """`moe-lab build …` in that course; the exit status."""
    monkeypatch.chdir(course)
    parser = argparse.ArgumentParser()
    builder.add_arguments(parser)
    return builder.main(parser.parse_args(arguments))


@pytest.fixture
def quick(monkeypatch):
    """Pretends to execute: the tests of writing need no kernel. Holds the seams the real one has."""

    def pretend(notebook, folder, name):
        for count, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
            cell.execution_count = count
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"line {count}\nand more\n")]

    monkeypatch.setattr(builder, "execute", pretend)


# What a lesson becomes


def test_solved_and_unsolved_differ_only_in_the_solution(tiny_course):
    lesson = parse(tiny_course / "lessons" / "90_tiny.py")
    full, stubbed = solved(lesson), unsolved(lesson)
    nbformat.validate(full)
    nbformat.validate(stubbed)
    assert (lesson.title, lesson.minutes, lesson.seconds, lesson.hardware) == ("Tiny", 5, 60, "CPU")
    assert [cell.id for cell in full.cells] == [cell.id for cell in stubbed.cells]
    changed = [(a.source, b.source) for a, b in zip(full.cells, stubbed.cells, strict=True) if a.source != b.source]
    head = '@exercise("90.1")\ndef double(x):\n    """Twice x."""\n'
    assert changed == [(head + "    return x + x", head + f"    {STUB}")]


def test_several_solutions_in_one_cell_keep_their_own_indentation(tiny_course):
    path = lesson_with(
        tiny_course,
        "    return x + x\n    ### END SOLUTION\n",
        "    y = x\n\n    return y + y\n    ### END SOLUTION\n\n\n"
        "class Twice:\n    def __call__(self, x):\n        ### BEGIN SOLUTION\n        return 2 * x\n"
        "        ### END SOLUTION\n",
    )
    lesson = parse(path)
    assert unsolved(lesson).cells[3].source.splitlines()[3:] == [
        f"    {STUB}",
        "",
        "",
        "class Twice:",
        "    def __call__(self, x):",
        f"        {STUB}",
    ]
    assert "SOLUTION" not in solved(lesson).cells[3].source


def test_cell_ids_are_unique_and_survive_an_edit_elsewhere(tiny_course):
    path = lesson_with(tiny_course, "print(double(21))\n", "print(double(21))\n\n# %%\nprint(double(21))\n")
    before = [cell.id for cell in parse(path).cells]
    assert len(set(before)) == len(before)
    lesson_with(tiny_course, "# # 90 · Tiny", "# # 90 · Tiny indeed")
    after = [cell.id for cell in parse(path).cells]
    assert after[1:] == before[1:]
    assert after[0] != before[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    ### END SOLUTION\n", "", "cell 4: `### BEGIN SOLUTION` without its partner"),
        ("    ### BEGIN SOLUTION\n", "", "cell 4: `### END SOLUTION` without its partner"),
        ("    return x + x\n", "", "cell 4: the solution before `### END SOLUTION` is empty"),
        ("    return x + x\n", "    ### BEGIN SOLUTION\n", "without its partner"),
        ("#     minutes: 5\n", "", "must give moe_lab.minutes (int), it gives nothing"),
        ("minutes: 5", "minutes: five", "must give moe_lab.minutes (int), it gives 'five'"),
        ("minutes: 5", "minutes: 5\n#     level: 3", "gives moe_lab.level, known are title"),
        ("minutes: 5", "minutes: [5", "cannot be read as a percent-format script: while parsing a flow"),
        ("#   moe_lab:\n", "#   moe_lab: 3\n#   other:\n", "must give title, minutes, seconds, hardware, it gives 3"),
    ],
)
def test_a_lesson_that_cannot_be_read_is_named_with_what_was_expected(tiny_course, old, new, message):
    path = lesson_with(tiny_course, old, new)
    with pytest.raises(LessonError, match=re.escape(message)) as error:
        parse(path)
    assert str(error.value).startswith("90_tiny.py")


def test_a_lesson_is_called_by_number_and_topic(tiny_course):
    path = tiny_course / "lessons" / "90_tiny.py"
    with pytest.raises(LessonError, match=r"NN_topic\.py"):
        parse(path.rename(path.with_name("tiny.py")))


# Building


def test_building_twice_gives_the_same_bytes(tiny_course, monkeypatch, capsys):
    assert run(tiny_course, monkeypatch) == 0
    paths = [tiny_course / folder / "90_tiny.ipynb" for folder in ("notebooks", "solutions")]
    first = [path.read_bytes() for path in paths]
    assert run(tiny_course, monkeypatch) == 0
    assert [path.read_bytes() for path in paths] == first
    assert capsys.readouterr().out.count("unchanged") == 2

    stubbed, full = (nbformat.read(path, as_version=4) for path in paths)
    assert [cell.execution_count for cell in full.cells if cell.cell_type == "code"] == [1, 2, 3, 4]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in stubbed.cells)
    assert full.cells[4].outputs == [{"output_type": "stream", "name": "stdout", "text": "42\n"}]
    for path, notebook in zip(paths, (stubbed, full), strict=True):
        text = path.read_text(encoding="utf-8")
        assert text == canonical(notebook)
        assert text == json.dumps(json.loads(text), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        assert "version" not in notebook.metadata.language_info
        assert notebook.metadata.moe_lab.digest == digest(notebook)
        assert not builder.is_learners_work(path)


def test_no_widget_state_is_stored_but_the_picture_is(tiny_course, monkeypatch):
    cell = (
        "import ipywidgets\nfrom IPython.display import display\n\n"
        'view = ipywidgets.HTML("live")._repr_mimebundle_()\n'
        'display({**view, "image/png": "aGk=", "text/plain": "Figure: a picture"}, raw=True)'
    )
    lesson_with(tiny_course, "print(double(21))", cell)
    assert run(tiny_course, monkeypatch) == 0
    full = nbformat.read(tiny_course / "solutions" / "90_tiny.ipynb", as_version=4)
    assert "widgets" not in full.metadata
    assert full.cells[4].outputs[0].data == {"image/png": "aGk=", "text/plain": "Figure: a picture"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "90_tiny, cell 5 (`1 / 0`) raised ZeroDivisionError: division by zero"),
        ("import os\nos._exit(1)", "90_tiny, cell 5 (`import os`) ended the kernel"),
        ('print("/home/ada/secret")', "90_tiny, solved, cell 5: an output (text/plain) holds the path '/home/ada"),
    ],
)
def test_a_solution_that_does_not_run_cleanly_changes_no_file(tiny_course, monkeypatch, capsys, code, message):
    lesson_with(tiny_course, "print(double(21))", code)
    assert run(tiny_course, monkeypatch) == 1
    assert message in capsys.readouterr().out
    assert not list(tiny_course.rglob("*.ipynb*"))


def test_a_lesson_out_of_form_is_not_built(tiny_course, monkeypatch, capsys, quick):
    lesson_with(tiny_course, "●○○ ", "")
    assert run(tiny_course, monkeypatch) == 1
    assert "exercise 90.1 has no difficulty" in capsys.readouterr().out
    assert not list(tiny_course.rglob("*.ipynb"))


def test_lessons_are_chosen_by_number_or_name(tiny_course, monkeypatch):
    lessons = tiny_course / "lessons"
    (lessons / "02_router.py").write_text("")
    assert [path.stem for path in builder.choose(lessons, ["2"])] == ["02_router"]
    assert [path.stem for path in builder.choose(lessons, ["90_tiny", "02"])] == ["02_router", "90_tiny"]
    assert len(builder.choose(lessons, [])) == 2
    with pytest.raises(CourseError, match="No lesson 77; there are 02_router, 90_tiny"):
        builder.choose(lessons, ["77"])


def test_a_full_disk_leaves_the_old_notebook_whole(tiny_course, monkeypatch, capsys, quick):
    assert run(tiny_course, monkeypatch) == 0
    notebook = tiny_course / "notebooks" / "90_tiny.ipynb"
    before = notebook.read_bytes()
    lesson_with(tiny_course, "print(double(21))", "print(double(22))")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builder.os, "replace", full_disk)
    assert run(tiny_course, monkeypatch) == 1
    assert "could not be written: No space left on device" in capsys.readouterr().out
    assert notebook.read_bytes() == before
    assert [path.name for path in notebook.parent.iterdir()] == ["90_tiny.ipynb"]


def test_kernels_know_nothing_of_the_users_set_up(tmp_path, monkeypatch):
    for name in ("JPY_SESSION_NAME", "PYTHONWARNINGS", "IPYTHONDIR"):
        monkeypatch.setenv(name, "the user's")
    monkeypatch.setenv("HOME_OF", "kept")
    environment = kernels.kernel_environment(tmp_path)
    assert not {"JPY_SESSION_NAME", "PYTHONWARNINGS"} & set(environment)
    assert (environment["HOME_OF"], environment["OMP_NUM_THREADS"]) == ("kept", "1")
    assert environment["IPYTHONDIR"].startswith(str(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such sockets: kernels talk over TCP there")
def test_kernels_talk_over_files_of_their_own_which_vanish(tiny_course, monkeypatch):
    with tempfile.TemporaryDirectory() as short:  # pytest's own folders are too long for a socket's path
        monkeypatch.setattr(kernels.tempfile, "gettempdir", lambda: short)
        first, second = kernels.kernel_sockets(), kernels.kernel_sockets()
        assert first["transport"] == "ipc"
        assert first["connection_file"] != second["connection_file"]
        assert run(tiny_course, monkeypatch) == 0
        assert not list(Path(short).iterdir())
    monkeypatch.setattr(kernels.tempfile, "gettempdir", lambda: "/" + "deep/" * 20)
    assert kernels.kernel_sockets() == {}  # TCP


# A learner's work


def work_in(path):
    """What a learner does: solves a cell and runs it."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[3].source = "def double(x): return x * 2"
    notebook.cells[3].execution_count = 7
    nbformat.write(notebook, path)
    return path.read_bytes()


@pytest.mark.parametrize("folder", ["notebooks", "solutions"])
def test_a_learners_work_is_left_alone_unless_forced(tiny_course, monkeypatch, capsys, quick, folder):
    assert run(tiny_course, monkeypatch) == 0
    path = tiny_course / folder / "90_tiny.ipynb"
    built = path.read_bytes()
    mine = work_in(path)
    assert run(tiny_course, monkeypatch) == 0
    assert path.read_bytes() == mine
    assert f"{folder}/90_tiny.ipynb: left alone, it holds work of yours" in capsys.readouterr().out

    for number in (1, 2):
        assert run(tiny_course, monkeypatch, "--force") == 0
        assert path.read_bytes() == built
        assert path.with_name(f"90_tiny.mine-{number}.ipynb").read_bytes() == mine
        path.write_bytes(mine)


def test_running_a_notebook_without_changing_its_code_is_work_too(tiny_course, monkeypatch, quick):
    run(tiny_course, monkeypatch)
    path = tiny_course / "notebooks" / "90_tiny.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["language_info"]["version"] = "3.12.1"  # as JupyterLab does on saving: no work
    nbformat.write(notebook, path)
    assert not builder.is_learners_work(path)
    notebook.cells[4].outputs = [nbformat.v4.new_output("stream", name="stdout", text="42\n")]
    nbformat.write(notebook, path)
    assert builder.is_learners_work(path)


def test_a_damaged_notebook_is_left_alone(tiny_course, monkeypatch, capsys, quick):
    path = tiny_course / "notebooks" / "90_tiny.ipynb"
    path.write_text("{ half of")
    assert run(tiny_course, monkeypatch) == 0
    assert path.read_text() == "{ half of"
    assert "left alone" in capsys.readouterr().out


def test_an_outdated_notebook_without_work_is_rebuilt(tiny_course, monkeypatch, quick):
    run(tiny_course, monkeypatch)
    lesson_with(tiny_course, "print(double(21))", "print(double(22))")
    run(tiny_course, monkeypatch)
    assert "double(22)" in (tiny_course / "notebooks" / "90_tiny.ipynb").read_text(encoding="utf-8")


# --check and git


def test_check_writes_nothing_and_names_what_is_out_of_date(tiny_course, monkeypatch, capsys, quick):
    assert run(tiny_course, monkeypatch, "--check") == 1
    assert "90_tiny.ipynb: it does not exist" in capsys.readouterr().out
    assert not list(tiny_course.rglob("*.ipynb"))

    run(tiny_course, monkeypatch)
    capsys.readouterr()
    assert run(tiny_course, monkeypatch, "--check") == 0
    assert capsys.readouterr().out == "90_tiny: up to date\n"

    lesson_with(tiny_course, "print(double(21))", "print(double(22))")
    assert run(tiny_course, monkeypatch, "--check") == 1
    assert "cell 5 has another source: - print(double(22)); + print(double(21))" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda notebook: notebook.cells.pop(0), "and 3 more cells"),
        (lambda notebook: notebook.cells.pop(), "it has 6 cells, expected 7"),
        (lambda notebook: notebook.cells[1].metadata.update(tags=["x"]), "cell 2 has another metadata"),
        (lambda notebook: notebook.cells[1].update(id="abc"), "cell 2 has another id"),
        (lambda notebook: notebook.metadata.moe_lab.update(minutes=6), "its metadata differs"),
        (lambda notebook: notebook.metadata.update(widgets={}), "its metadata differs"),
        (lambda notebook: notebook.update(nbformat_minor=4), "its format is 4.4, expected 4.5"),
    ],
)
def test_differences_in_structure_are_named(tiny_course, change, message):
    lesson = parse(tiny_course / "lessons" / "90_tiny.py")
    path = tiny_course / "notebooks" / "90_tiny.ipynb"
    notebook = unsolved(lesson)
    path.write_text(canonical(notebook), encoding="utf-8")
    assert builder.differences(unsolved(lesson), path) == []
    change(notebook)
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert any(found.startswith(message) for found in builder.differences(unsolved(lesson), path))


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed: its copy cannot be asked for")
def test_where_somebody_worked_in_a_solution_gits_copy_counts(tiny_course, monkeypatch, quick):
    run(tiny_course, monkeypatch)
    lesson = parse(tiny_course / "lessons" / "90_tiny.py")
    path = tiny_course / "solutions" / "90_tiny.ipynb"
    built = nbformat.read(path, as_version=4)
    assert builder.stored_solution(lesson, tiny_course) == built
    assert builder.committed(path) is None
    work_in(path)
    assert builder.stored_solution(lesson, tiny_course) is None

    path.write_text(canonical(built), encoding="utf-8")
    git = ["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "built"]):
        subprocess.run([*git, *command], cwd=tiny_course, check=True)
    work_in(path)
    assert builder.stored_solution(lesson, tiny_course) == built
