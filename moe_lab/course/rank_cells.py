"""What happens on a rank of a notebook's cluster, an engine or a simulated one: cells run, values come and go.

Both kinds of rank run the same code here, so a cell says the same on either.
"""

import ast
import dis
import gc
import importlib
import io
import linecache
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from IPython import get_ipython
from IPython.lib.pretty import pretty

from moe_lab.parallel.process import ProcessRanks, Store, join, leave
from moe_lab.parallel.ranks import RankError, Ranks

CHARACTERS = 2_000  # that are kept of what a rank prints in a cell

# --- A cell --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """What a rank raised, as text.

    Args:
        trace: the lines of the learner's code, and of what it called.
        is_cause: whether it failed for itself, not because of another rank.
        blames: which other rank.
    """

    kind: str
    message: str = ""
    trace: str = ""
    is_cause: bool = True
    blames: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" if self.message else self.kind


@dataclass(frozen=True)
class Said:
    """What came of a cell on one rank: what was printed, the text of its last line's value, what it raised."""

    printed: str = ""
    warned: str = ""
    value: str = ""
    failure: Failure | None = None


class Printed(io.TextIOBase):
    """Keeps the beginning of what is printed: an endless loop may print, too."""

    def __init__(self) -> None:
        self._kept, self._length = "", 0

    def write(self, text: str) -> int:
        """Keep it, or count it."""
        self._kept += text[: max(0, CHARACTERS - self._length)]
        self._length += len(text)
        return len(text)

    def __str__(self) -> str:
        more = self._length - len(self._kept)
        return f"{self._kept}\n… and {more} characters more" if more else self._kept


def names_of_a_rank(ranks: Ranks) -> dict[str, Any]:
    """What a rank's cells find, besides what they make."""
    ours = {"display": _display, "exit": _exit, "quit": _exit, "input": _input}
    return {"__name__": "__main__", "ranks": ranks, **ours}


def _display(*values: object) -> None:
    """Shows text, for a picture could not come in its turn."""
    for value in values:
        print(value if isinstance(value, str) else pretty(value))


def _exit(*_: object) -> None:
    """Ends the cell. IPython's own would end an engine, some time later."""
    raise SystemExit


def _input(*_: object) -> str:
    """Asks nobody."""
    raise EOFError("nobody answers input() on a rank")


def cell_name(number: int) -> str:
    """What a cell's code is called in tracebacks."""
    return f"<px {number}>"


def execute(source: str, name: str, names: dict[str, Any]) -> str:
    """Run a cell's code; returns the text of its last expression's value, "" where there is nothing to show."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for tracebacks
    tree = ast.parse(source, name)
    shows = tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last = tree.body.pop() if shows else None
    exec(compile(tree, name, "exec", dont_inherit=True), names)
    if last is None:
        return ""
    value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), names)
    return "" if value is None else pretty(value)


def failure_of(error: BaseException, name: str = "") -> Failure:
    """An error as text, with the places from the cell of that name on."""
    message, places = str(error).strip()[:CHARACTERS], []
    if isinstance(error, SyntaxError) and error.filename == name:
        message, places = error.msg, [f"  line {error.lineno} of the cell: {(error.text or '').strip()}"]
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, frame in enumerate(frames) if _is_cell(frame.filename)), len(frames))
    is_cause = not isinstance(error, RankError)
    for frame in frames[first:]:  # the learner's lines, and where it ended: what lies between helps nobody
        if _is_learners(frame.filename) or (is_cause and frame is frames[-1]):
            places.append(f"  {_place(frame, name)}: {frame.line}")
    if len(places) > 10:
        places[5:-4] = ["  …"]
    blames = None if is_cause else error.rank
    return Failure(type(error).__name__, message, "\n".join(places), is_cause, blames)


def _is_cell(filename: str) -> bool:
    return filename.startswith("<px ")


def _is_learners(filename: str) -> bool:
    return _is_cell(filename) or "ipykernel" in filename  # which names the notebook's cells so


def _place(frame: traceback.FrameSummary, name: str) -> str:
    """Where a line stands, without the machine's own folders."""
    inside = "" if frame.name == "<module>" else f" in {frame.name}"
    if frame.filename == name:
        return f"line {frame.lineno} of the cell{inside}"
    if _is_cell(frame.filename):
        return f"line {frame.lineno} of an earlier cell{inside}"
    if "ipykernel" in frame.filename:
        return f"line {frame.lineno} of the notebook's cell{inside}"
    return f"{'/'.join(Path(frame.filename).parts[-3:])}, line {frame.lineno}{inside}"


# --- Values --------------------------------------------------------------------------------------------------------

CARRIED = (FunctionType, BuiltinFunctionType, type, bool, int, float, str, torch.dtype)


@dataclass(frozen=True)
class Parcel:
    """Values for a rank, with what the notebook's functions among them need.

    Args:
        values: packed, by name; a function finds what it mentions among the rank's names.
        modules: names of modules to import, by the name that they get.
        sources: lines of the notebook's cells by their file's name, for tracebacks.
    """

    values: dict[str, list[bytes]]
    modules: dict[str, str]
    sources: dict[str, list[str]]

    def unpack(self, names: dict[str, Any]) -> Failure | None:
        """Into a rank's names."""
        for filename, lines in self.sources.items():
            linecache.cache[filename] = (sum(map(len, lines)), None, lines, filename)
        try:
            names.update({name: importlib.import_module(module) for name, module in self.modules.items()})
            names.update({name: unpack_value(buffers, names) for name, buffers in self.values.items()})
        except Exception as error:
            return failure_of(error)
        return None


def pack(values: dict[str, Any]) -> Parcel:
    """Values with the functions, modules and constants of the notebook that they mention, and so on.

    A learner's function may call another one of theirs. What else a function mentions, tensors above all, every rank
    makes for itself.

    Raises:
        ValueError: a value that cannot be sent.
    """
    values, modules, sources = dict(values), {}, {}
    waiting, seen = list(values.values()), set()
    while waiting:
        function = waiting.pop()
        if not _is_of_the_notebook(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))  # a function may hold itself
        for cell in function.__closure__ or ():  # what a decorator has wrapped
            with suppress(ValueError):  # a cell may be empty as yet
                waiting.append(cell.cell_contents)
        filename = function.__code__.co_filename
        sources[filename] = linecache.getlines(filename)
        for name in _mentioned(function.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, ModuleType):
                modules[name] = value.__name__
            elif isinstance(value, CARRIED) and name not in values and not _is_of_the_notebook(value, type):
                values[name] = value
                waiting.append(value)
    return Parcel({name: _packed(name, value) for name, value in values.items()}, modules, sources)


def _is_of_the_notebook(value: object, kind: type) -> bool:
    return isinstance(value, kind) and value.__module__ == "__main__"


def _mentioned(code: CodeType) -> set[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_mentioned(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _packed(name: str, value: object) -> list[bytes]:
    if _is_of_the_notebook(value, type):
        raise ValueError(f"{name} is a class of the notebook: define it in a cell that begins with `%%px --local`.")
    try:
        return pack_value(value)
    except Exception as error:
        raise ValueError(f"{name} cannot be sent to the ranks: {type(error).__name__}: {error}") from None


def pack_value(value: object) -> list[bytes]:
    """A value, as ipyparallel sends values."""
    from ipyparallel.serialize import serialize_object

    return [bytes(buffer) for buffer in serialize_object(value)]


def unpack_value(buffers: list[bytes], names: dict[str, Any]) -> Any:
    """The value again; a function finds what it mentions among the names."""
    from ipyparallel.serialize import deserialize_object

    return deserialize_object(buffers, names)[0]


def take(expression: str, names: dict[str, Any]) -> list[bytes] | Failure:
    """A rank's value of an expression, packed."""
    try:
        return pack_value(eval(expression, names))
    except Exception as error:
        return failure_of(error)


# --- On an engine --------------------------------------------------------------------------------------------------

_joined: ProcessRanks | None = None
"""The group that this engine is in. It stays the same object, for what the learner made with it."""


_store: Store | None = None
"""Where the ranks find each other, on one of them."""


def open_store_here() -> str:
    """A new store, with nothing of an old group in it; returns its address."""
    global _store
    _store = Store()
    return _store.address


def join_here(size: int, address: str, timeout: float) -> None:
    """Become a rank, or become one anew."""
    global _joined
    shell = get_ipython()
    _leave()
    ranks = join(shell.kernel.engine_id, size, address, backend="gloo", timeout=timeout)
    if _joined is None:
        _joined = ranks
    vars(_joined).update(vars(ranks))
    shell.user_ns.update(names_of_a_rank(_joined))


def run_here(source: str, name: str) -> Said:
    """Run a cell. A rank that fails leaves the group, so that nobody waits for it: `join_here` brings it back."""
    printed, warned = Printed(), Printed()
    value, failure = "", None
    with redirect_stdout(printed), redirect_stderr(warned):
        try:
            value = execute(source, name, get_ipython().user_ns)
        except BaseException as error:
            failure = failure_of(error, name)
            _leave(error)
    return Said(str(printed), str(warned), value, failure)


def _leave(error: BaseException | None = None) -> None:
    if _joined is not None and _joined.is_joined:
        leave(_joined, error)
        gc.collect()  # its connections close when nobody holds it any more


def unpack_here(parcel: Parcel) -> Failure | None:
    """Take what was pushed."""
    return parcel.unpack(get_ipython().user_ns)


def take_here(expression: str) -> list[bytes] | Failure:
    """Give what is pulled."""
    return take(expression, get_ipython().user_ns)
