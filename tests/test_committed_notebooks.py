"""The notebooks that lie in notebooks/ and solutions/ are what their lessons give.

A learner works in these very files, so what git does not hold is judged mildly: a notebook whose cells no longer match
its own digest holds work, which is reported and not failed, and one that JupyterLab only opened and saved may have
other metadata. A stale notebook fails in any case, and what git holds has to be right to the last byte.
"""

from pathlib import Path

import nbformat
import pytest

from moe_lab.course import builder, form
from moe_lab.course.lesson import canonical, digest, parse, solved, unsolved

ROOT = Path(__file__).resolve().parents[1]
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
FORMS = {"notebooks": unsolved, "solutions": solved}


def faults(path, built):
    """What is wrong with a notebook, given what its lesson gives."""
    held = is_as_committed(path)
    found = builder.differences(built, path, metadata=held)
    if found:
        return [*found, f"run `moe-lab build {path.stem[:2]}`"]
    there = nbformat.read(path, as_version=4)
    code = [cell for cell in there.cells if cell.cell_type == "code"]
    if digest(there) != there.metadata.moe_lab.get("digest"):
        found.append("its cells do not match its digest: it was edited by hand")
    if held and path.read_text(encoding="utf-8") != canonical(there):
        found.append("its JSON is not canonical")
    counts = [cell.execution_count for cell in code]
    if path.parent.name == "solutions":
        if counts != list(range(1, len(code) + 1)):
            found.append(f"its code cells were not executed once, in order: {counts}")
        found += form.output_faults(there)
    elif any(counts) or any(cell.outputs for cell in code):
        found.append("it holds outputs")
    return found


def is_as_committed(path):
    """Whether this is what git holds."""
    held = builder.committed(path)
    return held is not None and path.exists() and held.splitlines() == path.read_text(encoding="utf-8").splitlines()


def is_learners_work(path):
    """Whether somebody worked in the notebook, and did not commit it."""
    return builder.is_learners_work(path) and not is_as_committed(path)


def test_there_are_lessons():
    assert LESSONS


@pytest.mark.parametrize("folder", FORMS)
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_the_notebook_is_what_its_lesson_gives(lesson, folder):
    path = ROOT / folder / f"{lesson.stem}.ipynb"
    if is_learners_work(path):
        pytest.skip(f"{folder}/{path.name} holds work of yours: left alone, not checked")
    assert faults(path, FORMS[folder](parse(lesson))) == []


@pytest.mark.parametrize("folder", FORMS)
def test_every_notebook_has_its_lesson(folder):
    orphans = {path.stem for path in (ROOT / folder).glob("[0-9][0-9]_*.ipynb")} - {path.stem for path in LESSONS}
    assert not {name for name in orphans if ".mine-" not in name}


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_solving_the_notebook_only_replaces_stubs(lesson):
    """Read from the two files themselves, without the builder."""
    paths = [ROOT / folder / f"{lesson.stem}.ipynb" for folder in FORMS]
    if any(map(is_learners_work, paths)):
        pytest.skip(f"{lesson.stem}.ipynb holds work of yours: left alone, not checked")
    assert all(path.exists() for path in paths), f"run `moe-lab build {lesson.stem[:2]}`"
    stubbed, full = (nbformat.read(path, as_version=4) for path in paths)
    for before, after in zip(stubbed.cells, full.cells, strict=True):
        assert before.id == after.id
        assert form.stub_is_additive(before.source, after.source)


# Every check above is seen to fail, on a course of one tiny lesson.


@pytest.fixture
def built(tmp_path, monkeypatch):
    """The two notebooks of a lesson of one cell, as the builder leaves them; git holds whatever is there."""
    (tmp_path / "lessons").mkdir()
    path = tmp_path / "lessons" / "90_tiny.py"
    header = "title: Tiny", "minutes: 5", "seconds: 60", "hardware: CPU"
    path.write_text("# ---\n# moe_lab:\n" + "".join(f"#   {line}\n" for line in header) + "# ---\n\n# %%\nprint(1)\n")
    lesson = parse(path)
    for folder, make in FORMS.items():
        (tmp_path / folder).mkdir()
        notebook = make(lesson)
        if folder == "solutions":
            notebook.cells[0].execution_count = 1
            notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="1\n")]
        notebook.metadata.moe_lab.digest = digest(notebook)
        (tmp_path / folder / "90_tiny.ipynb").write_text(canonical(notebook), encoding="utf-8")
    monkeypatch.setattr(builder, "committed", lambda path: path.read_text(encoding="utf-8") if path.exists() else None)
    return lesson, tmp_path


def change_file(path, change):
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    path.write_text(canonical(notebook), encoding="utf-8")


def by_hand(notebook):
    """A change in the file that the digest does not know of."""
    notebook.cells[0].source = "print(2)"


def output_by_hand(notebook):
    """Somebody pretties an output."""
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="2\n")]


def never_run(notebook):
    """A solution that was not executed."""
    notebook.cells[0].execution_count = None
    notebook.cells[0].outputs = []
    notebook.metadata.moe_lab.digest = digest(notebook)


def leaking(notebook):
    """A solution executed by a builder without its own check."""
    notebook.cells[0].outputs[0].text = "/home/ada/x\n"
    notebook.metadata.moe_lab.digest = digest(notebook)


def test_a_fresh_build_is_without_fault(built):
    lesson, root = built
    for folder, make in FORMS.items():
        assert faults(root / folder / "90_tiny.ipynb", make(lesson)) == []


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("notebooks", by_hand, "cell 1 has another source: - print(1); + print(2)"),
        ("notebooks", output_by_hand, "its cells do not match its digest: it was edited by hand"),
        ("notebooks", output_by_hand, "it holds outputs"),
        ("solutions", output_by_hand, "its cells do not match its digest: it was edited by hand"),
        ("solutions", never_run, "its code cells were not executed once, in order: [None]"),
        ("solutions", leaking, "cell 1: an output (text/plain) holds the path '/home/ada/x'"),
    ],
)
def test_every_check_is_seen_to_fail(built, folder, change, message):
    lesson, root = built
    path = root / folder / "90_tiny.ipynb"
    change_file(path, change)
    assert not is_learners_work(path)
    assert message in faults(path, FORMS[folder](lesson))


def test_a_missing_notebook_and_another_spelling_are_faults(built):
    lesson, root = built
    path = root / "notebooks" / "90_tiny.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace('"cells": ', '"cells":'), encoding="utf-8")
    assert faults(path, unsolved(lesson)) == ["its JSON is not canonical"]
    path.unlink()
    assert faults(path, unsolved(lesson)) == ["it does not exist", "run `moe-lab build 90`"]
    assert not is_learners_work(path)


@pytest.mark.parametrize("git", ["holds the built one", "holds none"])
def test_what_git_does_not_hold_may_be_a_learners_work(built, monkeypatch, git):
    _, root = built
    path = root / "notebooks" / "90_tiny.ipynb"
    before = path.read_text(encoding="utf-8") if git == "holds the built one" else None
    monkeypatch.setattr(builder, "committed", lambda _: before)
    assert not is_learners_work(path)
    change_file(path, by_hand)
    assert is_learners_work(path)


def saved_by_lab(notebook):
    """What opening and saving alone changes."""
    notebook.metadata.language_info["version"] = "3.12.1"
    notebook.cells[0].metadata["collapsed"] = False


def test_a_notebook_that_was_only_opened_and_saved_is_no_fault_unless_committed(built, monkeypatch):
    lesson, root = built
    path = root / "notebooks" / "90_tiny.ipynb"
    change_file(path, saved_by_lab)
    assert "its metadata differs" in faults(path, unsolved(lesson))
    monkeypatch.setattr(builder, "committed", lambda _: "the built one")
    assert not is_learners_work(path)
    assert faults(path, unsolved(lesson)) == []


def test_a_stale_notebook_is_a_fault_even_before_it_is_committed(built, monkeypatch):
    _, root = built
    monkeypatch.setattr(builder, "committed", lambda _: None)
    path = root / "lessons" / "90_tiny.py"
    path.write_text(path.read_text().replace("print(1)", "print(2)"))
    assert "run `moe-lab build 90`" in faults(root / "notebooks" / "90_tiny.ipynb", unsolved(parse(path)))
