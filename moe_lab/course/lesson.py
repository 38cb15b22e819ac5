"""A lesson is the one source of two notebooks: the one with stubs, and the solved one."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import yaml
from nbformat import NotebookNode

from moe_lab.paths import CourseError

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = 'raise NotImplementedError("your turn")'

# What a lesson's header has to say, under `moe_lab:`.
HEADER = {"title": str, "minutes": int, "seconds": int, "hardware": str}
OPTIONAL = {"needs": str}
# Kept from a cell's metadata; jupytext adds others that only describe the text file.
CELL_METADATA = ("tags", "slideshow")

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# Without the version: it would differ between the machines that build.
LANGUAGE_INFO = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}


class LessonError(CourseError):
    """A lesson that cannot be read, named, with what was expected of it."""


@dataclass(frozen=True)
class Cell:
    """One cell of a lesson, solution markers included."""

    kind: str
    source: str
    metadata: dict
    id: str


@dataclass(frozen=True)
class Lesson:
    """A lesson as written, before it is split into its two notebooks.

    `minutes` is a learner's time; `seconds` is the time badge: wall seconds from top to bottom on two cores. `needs`
    names a package that is not on every system: without it the notebook runs, and says other things.
    """

    path: Path
    title: str
    minutes: int
    seconds: int
    hardware: str
    cells: tuple[Cell, ...]
    needs: str = ""

    @property
    def name(self) -> str:
        """Number and topic, such as `01_dense_ffn`."""
        return self.path.stem


def parse(path: Path) -> Lesson:
    """Read a lesson.

    Raises:
        LessonError: the header is incomplete, or solution markers do not pair.
    """
    if not re.fullmatch(r"\d\d_[a-z0-9_]+\.py", path.name):
        raise LessonError(f"{path.name}: a lesson is called NN_topic.py, in lower case; rename it.")
    script = {"extension": ".py", "format_name": "percent", "root_level_metadata_as_raw_cell": False}
    try:
        notebook = jupytext.read(path, fmt=script)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise LessonError(f"{path.name} cannot be read as a percent-format script: {reason}.") from None
    return Lesson(path=path, cells=tuple(_cells(path, notebook)), **_header(path, notebook.metadata))


def solved(lesson: Lesson) -> NotebookNode:
    """The notebook with its solutions and without their markers, not yet executed."""
    return _notebook(lesson, lambda indent, lines: lines)


def unsolved(lesson: Lesson) -> NotebookNode:
    """The notebook that a learner opens: a stub in place of every solution."""
    return _notebook(lesson, lambda indent, lines: [indent + STUB])


def digest(notebook: NotebookNode) -> str:
    """SHA-256 over what a learner changes by working: types, sources, outputs and execution counts of the cells."""
    cells = [
        [cell.cell_type, cell.source, cell.get("outputs", []), cell.get("execution_count")] for cell in notebook.cells
    ]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def canonical(notebook: NotebookNode) -> str:
    """The notebook's one spelling as text: sorted keys, one space of indent, a newline at the end."""
    return nbformat.writes(notebook, version=4) + "\n"


def _header(path: Path, metadata: NotebookNode) -> dict:
    # jupytext hands over what stands beside `jupyter:` apart from what stands in it; both places will do.
    beside = metadata.get("jupytext", {}).get("root_level_metadata", {})
    header = metadata.get("moe_lab") or beside.get("moe_lab") or {}
    if not isinstance(header, dict):
        raise LessonError(f"{path.name}: under moe_lab its header must give {', '.join(HEADER)}, it gives {header!r}.")
    for field, kind in (HEADER | {field: OPTIONAL[field] for field in OPTIONAL if field in header}).items():
        if type(header.get(field)) is not kind:
            found = repr(header[field]) if field in header else "nothing"
            raise LessonError(
                f"{path.name}: its header must give moe_lab.{field} ({kind.__name__}), it gives {found}; "
                "the header is the YAML between the two `# ---` lines at the top."
            )
    known = HEADER | OPTIONAL
    if unknown := sorted(set(header) - set(known)):
        raise LessonError(f"{path.name}: its header gives moe_lab.{unknown[0]}, known are {', '.join(known)}.")
    return {field: header[field] for field in known if field in header}


def _cells(path: Path, notebook: NotebookNode) -> Iterator[Cell]:
    seen: Counter[str] = Counter()
    for position, cell in enumerate(notebook.cells, start=1):
        # From the content, so that an edit elsewhere leaves the id alone; the count tells equal cells apart.
        content = f"{path.stem}\n{cell.cell_type}\n{cell.source}"
        seen[content] += 1
        identity = hashlib.sha256(f"{content}\n{seen[content]}".encode()).hexdigest()[:12]
        metadata = {key: cell.metadata[key] for key in CELL_METADATA if key in cell.metadata}
        try:
            list(_pieces(cell.source))
        except ValueError as problem:
            raise LessonError(f"{path.name}, cell {position}: {problem}.") from None
        yield Cell(kind=cell.cell_type, source=cell.source, metadata=metadata, id=identity)


def _pieces(source: str) -> Iterator[tuple[str | None, list[str]]]:
    """The source in turns of (None, common lines) and (indentation, lines of a solution), markers left out."""
    indent, lines = None, []
    for line in source.split("\n"):
        marker = line.strip()
        if marker not in (BEGIN, END):
            lines.append(line)
            continue
        if (marker == BEGIN) != (indent is None):
            raise ValueError(f"`{marker}` without its partner")
        if marker == END and not any(text.strip() for text in lines):
            raise ValueError(f"the solution before `{END}` is empty")
        yield indent, lines
        indent, lines = (line[: line.index("#")] if marker == BEGIN else None), []
    if indent is not None:
        raise ValueError(f"`{BEGIN}` without its partner")
    yield None, lines


def _notebook(lesson: Lesson, of_solution: Callable[[str, list[str]], list[str]]) -> NotebookNode:
    notebook = nbformat.v4.new_notebook()
    notebook.nbformat_minor = 5
    new = {
        "code": nbformat.v4.new_code_cell,
        "markdown": nbformat.v4.new_markdown_cell,
        "raw": nbformat.v4.new_raw_cell,
    }
    for cell in lesson.cells:
        lines = [
            line
            for indent, piece in _pieces(cell.source)
            for line in (piece if indent is None else of_solution(indent, piece))
        ]
        notebook.cells.append(new[cell.kind]("\n".join(lines), id=cell.id, metadata=cell.metadata))
    about = {field: getattr(lesson, field) for field in HEADER} | {"digest": digest(notebook)}
    notebook.metadata.update({"kernelspec": dict(KERNELSPEC), "language_info": dict(LANGUAGE_INFO), "moe_lab": about})
    return nbformat.from_dict(notebook)
