"""The course's form, held by machine: what a lesson must look like, and what an output must not hold."""

import ast
import os
import platform
import re
import socket
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median

from nbformat import NotebookNode

from moe_lab.course.lesson import STUB, Lesson, solved, unsolved

MAX_SECONDS = 120
MEDIAN_LINES, MAX_LINES = 8, 25
MAX_WORDS = 60
MIN_HINTS = 2
HARDWARE = ("CPU", "CPU · GPU optional")

# First folders of absolute paths on the systems that people use; those of the running one are added.
# fmt: off
ROOT_FOLDERS = {
    "Applications", "Library", "Users", "Volumes", "etc", "home", "mnt", "nix", "opt", "private", "root", "srv", "tmp",
    "usr", "var",
}
# fmt: on
REST = r"""[^\s"'<>()]+"""
UNIX_PATH = re.compile(r"(?:(?<![\w/:.<~+])|(?<=file://))/([\w.@+-]+)/(?=[\w.@+-])" + REST)
HOME_PATH = re.compile(r"(?<![\w.])~/(?=\w)" + REST)
WINDOWS_PATH = re.compile(r"(?<!\w)[A-Za-z]:[\\/](?=[\w.])" + REST)
WARNING = re.compile(r"\b[A-Z]\w*Warning\b|Traceback \(most recent call last\)")


def lesson_faults(lesson: Lesson, root: Path) -> list[str]:
    """Every departure of a lesson from the form, each as one sentence: where, what was found, what is allowed."""
    notebook = solved(lesson)
    rules = (_header, _sizes, _prose, _pictures, _stubs, _exercises, _ending)
    faults = [fault for rule in rules for fault in rule(lesson, notebook)]
    note = Path("docs") / "teaching" / f"{lesson.name}.md"
    if not (root / note).is_file():
        faults.append(f"its teaching note {note.as_posix()} is missing")
    return [f"lessons/{lesson.path.name}: {fault}" for fault in faults]


def output_faults(notebook: NotebookNode) -> list[str]:
    """What the notebook's outputs hold that no output may: paths, the host's name, warnings, errors."""
    return [
        f"cell {position}: {fault}"
        for position, cell in enumerate(notebook.cells, start=1)
        for fault in cell_output_faults(cell.get("outputs", []))
    ]


def cell_output_faults(outputs: list[NotebookNode]) -> list[str]:
    """As `output_faults`, for the outputs of one cell."""
    faults = []
    for output in outputs:
        if output.output_type == "error":
            faults.append(f"an output is the error {output.ename}: {output.evalue}")
            continue
        if output.output_type == "stream" and output.name == "stderr":
            faults.append(f"it wrote to stderr: {output.text.strip()[:200]!r}")
        texts = {"text/plain": output.text} if output.output_type == "stream" else output.get("data", {})
        for mime, text in texts.items():
            if not mime.startswith("image/"):
                faults += [f"an output ({mime}) holds {found}" for found in _unfit(mime, str(text))]
    return faults


def stub_is_additive(stubbed: str, solution: str) -> bool:
    """Whether solving means no more than replacing the stub lines by lines of one's own."""
    pieces: list[list[str]] = [[]]
    for line in stubbed.split("\n"):
        if line.strip() == STUB:
            pieces.append([])
        else:
            pieces[-1].append(line)
    gap = r"(?:[^\n]*\n)+"  # at least one line in place of each stub
    pattern = gap.join(re.escape("".join(f"{line}\n" for line in piece)) for piece in pieces)
    return re.fullmatch(pattern, solution + "\n") is not None


# Each rule yields its faults, cells counted from 1.


def _header(lesson: Lesson, notebook: NotebookNode) -> Iterator[str]:
    if lesson.seconds > MAX_SECONDS or lesson.seconds < 1:
        yield f"its time badge is {lesson.seconds} s, allowed are 1 to {MAX_SECONDS}"
    if lesson.hardware not in HARDWARE:
        yield f"its hardware is {lesson.hardware!r}, allowed are {' and '.join(map(repr, HARDWARE))}"
    if not notebook.cells or notebook.cells[0].cell_type != "markdown":
        yield "cell 1: expected the header, a Markdown cell"
        return
    text = notebook.cells[0].source
    lower = text.lower()
    expected = {
        f"a first line `# …` with the title {lesson.title!r}": lesson.title.lower() in lower.split("\n")[0]
        and text.startswith("# "),
        "the one question it answers (a sentence that ends in `?`)": "?" in text,
        "the words `you will have built`": "you will have built" in lower,
        f"the learner's time, `{lesson.minutes} minutes`": f"{lesson.minutes} min" in lower,
        f"the hardware badge, `{lesson.hardware}`": lesson.hardware in text,
        "the prerequisites, under that word": "prerequisite" in lower,
    }
    for what, there in expected.items():
        if not there:
            yield f"cell 1: the header lacks {what}"


def _sizes(lesson: Lesson, notebook: NotebookNode) -> Iterator[str]:
    sizes = {
        position: sum(1 for line in cell.source.splitlines() if line.strip())
        for position, cell in enumerate(notebook.cells, start=1)
        if cell.cell_type == "code"
    }
    for position, lines in sizes.items():
        if not 1 <= lines <= MAX_LINES:
            yield f"cell {position}: {lines} lines of code, allowed are 1 to {MAX_LINES}"
    if not sizes:
        yield "it has no code cell"
    elif (middle := median(sizes.values())) > MEDIAN_LINES:
        yield f"its code cells have {middle:g} lines in the median, allowed are {MEDIAN_LINES}"


def _prose(lesson: Lesson, notebook: NotebookNode) -> Iterator[str]:
    code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    for before, after in pairwise(code):
        words = len(_words("\n\n".join(cell.source for cell in notebook.cells[before + 1 : after])))
        if words > MAX_WORDS:
            yield f"cell {before + 2}: {words} words of prose before the next code cell, allowed are {MAX_WORDS}"


def _words(markdown: str) -> list[str]:
    """The words of running text: no headings, tables, folded hints, displayed formulas, code blocks, link targets."""
    for left_out in (
        r"(?s)<details.*?</details>",
        r"(?s)\$\$.*?\$\$",
        r"(?ms)^ *```.*?^ *```",
        r"!\[[^\]]*\]\([^)]*\)",
    ):
        markdown = re.sub(left_out, " ", markdown)
    markdown = re.sub(r"\]\([^)]*\)", "] ", markdown)
    markdown = re.sub(r"<[^>\n]+>", " ", markdown)
    lines = (line for line in markdown.splitlines() if not re.match(r"\s*(#{1,6} |\|)", line))
    return [word for line in lines for word in line.split() if re.search(r"\w", word)]


def _pictures(lesson: Lesson, notebook: NotebookNode) -> Iterator[str]:
    for position, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "markdown":
            continue
        for target in re.findall(r"!\[\s*\]\(([^)]*)\)", cell.source):
            yield f"cell {position}: the picture {target} has no alt text"
        for tag in re.findall(r"<img\b[^>]*>", cell.source):
            if not re.search(r"\balt\s*=\s*(\"[^\"]*\S[^\"]*\"|'[^']*\S[^']*')", tag):
                yield f"cell {position}: the picture {tag} has no alt text"


def _stubs(lesson: Lesson, notebook: NotebookNode) -> Iterator[str]:
    for position, (stubbed, full) in enumerate(zip(unsolved(lesson).cells, notebook.cells, strict=True), start=1):
        is_exercise = re.search(r"^@exercise\(", full.source, re.MULTILINE)
        has_stub = any(line.strip() == STUB for line in stubbed.source.splitlines())
        if is_exercise and not has_stub:
            yield f"cell {position}: the exercise has no solution between markers"
        if has_stub and not is_exercise:
            yield f"cell {position}: a solution outside of an @exercise would stop the unsolved notebook"
        if has_stub and not stub_is_additive(stubbed.source, full.source):
            yield f"cell {position}: solving it takes more than replacing the stub"
        if has_stub:
            try:
                dead = list(_dead_code(ast.parse(stubbed.source)))
            except SyntaxError as error:
                yield f"cell {position}: with the stub it is no Python ({error.msg}, line {error.lineno})"
            else:
                yield from (f"cell {position}: {fault}" for fault in dead)


def _dead_code(tree: ast.AST, in_function: bool = False) -> Iterator[str]:
    """Stubs that would raise when their cell runs, and code that a stub leaves unreachable."""
    in_function = in_function or isinstance(tree, ast.FunctionDef | ast.AsyncFunctionDef)
    for block in (getattr(tree, name, []) for name in ("body", "orelse", "finalbody", "handlers", "cases")):
        for statement, following in zip(block, [*block[1:], None], strict=False):
            if _is_stub(statement) and not in_function:
                yield f"line {statement.lineno} (the stub) stands outside of a function and would raise at once"
            if _ends_in_stub(statement) and following:
                yield f"line {following.lineno} follows a stub and would never run"
            yield from _dead_code(statement, in_function)


def _is_stub(statement: ast.AST) -> bool:
    return isinstance(statement, ast.Raise) and ast.unparse(statement) == ast.unparse(ast.parse(STUB))


def _ends_in_stub(statement: ast.AST) -> bool:
    if isinstance(statement, ast.For | ast.While | ast.With):
        return any(_ends_in_stub(inner) for inner in statement.body)
    return _is_stub(statement)


def _exercises(lesson: Lesson, notebook: NotebookNode) -> Iterator[str]:
    cells = notebook.cells
    for index, cell in enumerate(cells):
        if not (found := re.search(r"^@exercise\([\"']([^\"']+)", cell.source, re.MULTILINE)):
            continue
        if cell.cell_type != "code":
            continue
        where = f"cell {index + 1}: exercise {found.group(1)}"
        before = _run(cells[:index][::-1])
        if not re.search(r"●{1,3}○{0,2}", before):
            yield f"{where} has no difficulty before it, expected ●○○, ●●○ or ●●●"
        if not re.search(r"\d+\s*min", before):
            yield f"{where} has no minutes before it, expected such as `5 minutes`"
        # What follows belongs to it up to the announcement of another exercise.
        hints = (before + _run(cells[index + 1 :], stop="●")).count("<details")
        if hints < MIN_HINTS:
            yield f"{where} has {hints} folded hints (<details>), expected at least {MIN_HINTS}"


def _run(cells: list[NotebookNode], stop: str | None = None) -> str:
    """The text of the Markdown cells up to the first code cell, or the first that holds `stop`."""
    texts = []
    for cell in cells:
        if cell.cell_type == "code" or (stop and stop in cell.source):
            break
        texts.append(cell.source)
    return "\n\n".join(texts)


def _ending(lesson: Lesson, notebook: NotebookNode) -> Iterator[str]:
    headings = " ".join(
        line.lower()
        for cell in notebook.cells[-4:]
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("#")
    )
    text = " ".join(cell.source.lower() for cell in notebook.cells[-4:] if cell.cell_type == "markdown")
    if "recap" not in headings:
        yield "its last cells hold no heading with `Recap`"
    if not re.search(r"\bnext\b", text):
        yield "its last cells do not say what comes next"
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    if not code or "show_progress(" not in code[-1]:
        yield "its last code cell does not call show_progress"


def _unfit(mime: str, text: str) -> Iterator[str]:
    here = ROOT_FOLDERS | (set(os.listdir("/")) if os.name == "posix" else set())
    paths = [*WINDOWS_PATH.finditer(text), *HOME_PATH.finditer(text)]
    paths += [match for match in UNIX_PATH.finditer(text) if match.group(1) in here]
    for match in paths[:1]:
        yield f"the path {match.group()!r}"
    for host in {socket.gethostname(), platform.node()} - {"", "localhost"}:
        if re.search(rf"(?<![\w-]){re.escape(host)}(?![\w-])", text):
            yield f"the host name {host!r}"
    # An exercise's outcome (HTML) may name the learner's error; nothing else may show one.
    if mime != "text/html" and (match := WARNING.search(text)):
        yield f"a warning or traceback ({match.group()!r})"
