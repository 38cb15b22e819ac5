"""The gate on form: the lessons keep it, and every rule is seen to fail once."""

from pathlib import Path

import nbformat
import pytest

from moe_lab.course import form
from moe_lab.course.lesson import STUB, parse

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
WORDS = " ".join(["word"] * 60)


def test_there_are_lessons():
    assert LESSONS


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_lesson_keeps_the_form(path):
    assert form.lesson_faults(parse(path), ROOT) == []


def faults(course, old="", new=""):
    """The faults of the tiny lesson with one passage changed, without the file's name."""
    path = course / "lessons" / "90_tiny.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    found = form.lesson_faults(parse(path), course)
    assert all(fault.startswith("lessons/90_tiny.py: ") for fault in found)
    return [fault.removeprefix("lessons/90_tiny.py: ") for fault in found]


def test_the_tiny_lesson_is_without_fault(tiny_course):
    assert faults(tiny_course) == []


HINT = "<details><summary>Hint 1</summary>Add.</details>\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# # 90 · Tiny", "# # 90 · Small", "cell 1: the header lacks a first line `# …` with the title 'Tiny'"),
        ("a number?", "a number.", "cell 1: the header lacks the one question it answers"),
        ("You will have built", "You get", "cell 1: the header lacks the words `you will have built`"),
        ("5 minutes,", "6 minutes,", "cell 1: the header lacks the learner's time, `5 minutes`"),
        ("CPU. Pre", "GPU. Pre", "cell 1: the header lacks the hardware badge, `CPU`"),
        ("Prerequisites: none", "", "cell 1: the header lacks the prerequisites"),
        ("# %% [markdown]\n# # 90", "# %%\n1\n\n# %% [markdown]\n# # 90", "cell 1: expected the header, a Markdown"),
        ("seconds: 60", "seconds: 121", "its time badge is 121 s, allowed are 1 to 120"),
        ("hardware: CPU", "hardware: TPU", "its hardware is 'TPU', allowed are 'CPU' and 'CPU · GPU optional'"),
        ("print(double(21))\n", "x = 1\n" * 26, "cell 5: 26 lines of code, allowed are 1 to 25"),
        ("print(double(21))\n", "\n", "cell 5: 0 lines of code, allowed are 1 to 25"),
        ("print(double(21))\n", "x = 1\n\n# %%\n" * 4 + "x\n", None),
        ("print(double(21))\n", ("x = 1\n" * 9 + "\n# %%\n") * 6 + "x\n", "its code cells have 9 lines in the median"),
        ("## Write it\n", f"## Write it\n# {WORDS}\n", "cell 3: 62 words of prose before the next code cell, allowed"),
        ("## Write it\n", "## Write it\n# ![](a.png)\n", "cell 3: the picture a.png has no alt text"),
        ("## Write it\n", "## Write it\n# <img src='a.png' alt=''>\n", "cell 3: the picture <img src='a.png'"),
        ("## Write it\n", "## Write it\n# <img src='a.png' alt='A'>\n# ![A](a.png)\n", None),
        ("●○○ ", "", "cell 4: exercise 90.1 has no difficulty before it"),
        ("2 minutes\n", "\n", "cell 4: exercise 90.1 has no minutes before it"),
        (f"# {HINT}", "", "cell 4: exercise 90.1 has 1 folded hints (<details>), expected at least 2"),
        ("## Recap", "## Summary", "its last cells hold no heading with `Recap`"),
        ("Next: 91", "That is all", "its last cells do not say what comes next"),
        ('show_progress("one done")', "", "its last code cell does not call show_progress"),
        ('@exercise("90.1")\n', "", "cell 4: a solution outside of an @exercise would stop the unsolved notebook"),
        ("    ### END SOLUTION\n", "    ### END SOLUTION\n    print(x)\n", "cell 4: line 5 follows a stub and would"),
        (
            "def double(x):\n",
            "class Doubler:\n",
            "cell 4: line 4 (the stub) stands outside of a function and would raise at once",
        ),
        (
            "    ### BEGIN SOLUTION\n    return x + x\n    ### END SOLUTION\n",
            "    return x + x\n",
            "cell 4: the exercise has no solution between markers",
        ),
        (
            "    ### BEGIN SOLUTION\n    return x + x\n",
            "    for _ in range(2):\n        ### BEGIN SOLUTION\n        x += 1\n        ### END SOLUTION\n"
            "    ### BEGIN SOLUTION\n    return x\n",
            "cell 4: line 6 follows a stub and would never run",
        ),
        (
            "    ### BEGIN SOLUTION\n    return x + x\n    ### END SOLUTION\n",
            "    ### BEGIN SOLUTION\n    if x:\n    ### END SOLUTION\n        return x + x\n",
            "cell 4: with the stub it is no Python (unexpected indent, line 5)",
        ),
    ],
)
def test_every_rule_is_seen_to_fail(tiny_course, old, new, message):
    found = faults(tiny_course, old, new)
    if message is None:
        assert found == []
    else:
        assert any(fault.startswith(message) for fault in found), found


def test_a_lesson_needs_its_teaching_note(tiny_course):
    (tiny_course / "docs" / "teaching" / "90_tiny.md").unlink()
    assert faults(tiny_course) == ["its teaching note docs/teaching/90_tiny.md is missing"]


def test_hints_after_an_exercise_count_but_not_those_of_the_next(tiny_course):
    hints = "<details>Three.</details>\n# <details>Four.</details>\n"
    assert faults(tiny_course, f"# {HINT}", "") != []
    assert faults(tiny_course, "# %%\nprint", f"# %% [markdown]\n# {hints}\n# %%\nprint") == []
    found = faults(tiny_course, f"# {hints}", f"# ●●○ 9 minutes\n# {hints}")
    assert found == ["cell 4: exercise 90.1 has 1 folded hints (<details>), expected at least 2"]


@pytest.mark.parametrize(
    "not_prose",
    [
        f"## {WORDS}",
        f"| {WORDS} | {WORDS} |\n|---|---|",
        f"<details>\n<summary>Hint</summary>\n{WORDS}\n</details>",
        f"$$\n{WORDS}\n$$",
        f"```text\n{WORDS}\n```",
        f"![{WORDS}](a.png)",
        f"[link](<{WORDS}>)",
        "— · →",
    ],
)
def test_only_running_text_counts_as_prose(not_prose):
    assert form._words(f"one two\n\n{not_prose}\n\nthree")[:2] == ["one", "two"]
    assert len(form._words(f"one two\n\n{not_prose}\n\nthree")) <= 4
    assert len(form._words("one **two** [three](x.md) `four` $d_{ff}$")) == 5


@pytest.mark.parametrize(
    ("stubbed", "solution", "additive"),
    [
        (f"def f():\n    {STUB}", "def f():\n    return 1", True),
        (f"def f():\n    {STUB}\n\n\ndef g():\n    {STUB}", "def f():\n    a\n    b\n\n\ndef g():\n    c", True),
        (f"def f():\n    {STUB}", "def f(x):\n    return 1", False),
        (f"def f():\n    {STUB}\n\nf()", "def f():\n    return 1", False),
        (f"def f():\n    {STUB}", "def f():", False),
        ("x = 1", "x = 2", False),
    ],
)
def test_a_stub_is_additive_when_solving_replaces_only_its_lines(stubbed, solution, additive):
    assert form.stub_is_additive(stubbed, solution) is additive


# Outputs


def text(content, mime="text/plain"):
    return nbformat.v4.new_output("display_data", data={mime: content})


def stream(content, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=content)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (stream("saved to /home/ada/model.pt"), "the path '/home/ada/model.pt'"),
        (stream("PosixPath('/usr/lib')"), "the path '/usr/lib'"),
        (stream("file:///Users/ada/x"), "the path '/Users/ada/x'"),
        (stream("in ~/course/data"), "the path '~/course/data'"),
        (stream(r"C:\Users\ada"), "the path 'C:"),
        (stream(f"{Path(__file__).resolve()}"), "the path "),
        (text('<a href="/tmp/x">x</a>', "text/html"), "the path '/tmp/x"),
        (stream("ran on adas-laptop."), "the host name 'adas-laptop'"),
        (stream("UserWarning: careful"), "a warning or traceback ('UserWarning')"),
        (text("Traceback (most recent call last):\n"), "a warning or traceback ('Traceback"),
        (stream("anything", "stderr"), "it wrote to stderr: 'anything'"),
        (
            nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[]),
            "an output is the error ValueError: no",
        ),
    ],
)
def test_what_no_output_may_hold(monkeypatch, output, message):
    monkeypatch.setattr(form.socket, "gethostname", lambda: "adas-laptop")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    (fault,) = form.output_faults(notebook)
    assert fault.startswith("cell 1: ")
    assert message in fault


@pytest.mark.parametrize(
    "output",
    [
        stream("12 tokens/s, and/or 3/4, a / b, data/corpus.json, ./x/y, shape (2, 3)/dtype"),
        stream("https://arxiv.org/abs/2002.05202 and s3://usr/lib"),
        text("<p>one</p><br/><b>two</b>", "text/html"),
        text("<p>It raised ValueError: expected (2, 3). Traceback (most recent call last)</p>", "text/html"),
        text("iVBOR/usr/lib+/usr/lib/etc/x", "image/png"),
        text({"model_id": "1"}, "application/vnd.jupyter.widget-view+json"),
        stream("warning: none, error 0.1"),
        stream("the adas-laptop-2 and myadas-laptop"),
    ],
)
def test_what_an_output_may_hold(monkeypatch, output):
    monkeypatch.setattr(form.socket, "gethostname", lambda: "adas-laptop")
    assert form.cell_output_faults([output]) == []
