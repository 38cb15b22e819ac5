"""A learner's Triton kernel, run apart from the notebook: each time in a fresh process, from its source.

A process either interprets kernels or compiles them, so a notebook that wants both can do neither itself. It keeps the
kernel as text, a `Kernel`, and `kernel_process` reads it again where it runs: interpreted, compiled for any GPU, or
timed on the one that is there. What goes there and comes back lies in a temporary folder.

    from moe_lab.course.kernel_cells import tl, triton  # stand-ins where there is no Triton
"""

import ast
import base64
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_lab.machine import interpreter_problem
from moe_lab.paths import CourseError

if TYPE_CHECKING:
    from moe_lab.ops.machine_code import MachineCode

SECONDS = 60.0  # for one run of a kernel
START = 120.0  # more, for the process to import what it needs on a slow machine
NO_TRITON = "Triton is made for Linux, and is not on this system (on Windows it is there inside WSL)."
CONSTANTS = (bool, int, float, str)


class KernelError(CourseError):
    """A kernel did not run, or did not compile; the message names the learner's line."""


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # something else pretends to be it
        return False


def interprets() -> bool:
    """Whether this process runs kernels in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# --- A kernel as text -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel with the kernels and constants that it uses.

    Args:
        sources: by the name of each function, its source, with as many empty lines before it as there are before it in
            its cell; so every line keeps its number.
        constants: numbers and such that it reads, by name.
        plain: `plain(grid, *args, **constants)` does the same to its arguments in torch, where there is no Triton.
    """

    name: str
    sources: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    plain: Callable | None = None

    @classmethod
    def written(cls, module: str, name: str, uses: Sequence[str] = (), plain: Callable | None = None) -> "Kernel":
        """A kernel of a module, read from its file: nothing is imported."""
        lines = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8").splitlines()
        return cls(name, {each: _function_in(lines, each) for each in (*uses, name)}, plain=plain)

    @classmethod
    def of(cls, function: Any) -> "Kernel":
        """What a decorated function of the notebook says, and the functions and constants of the notebook it uses.

        Raises:
            KernelError: the source is not known.
        """
        sources, constants, waiting = {}, {}, [function]
        while waiting:
            bare = waiting.pop()
            bare = getattr(bare, "fn", bare)
            if bare.__name__ in sources:
                continue
            sources[bare.__name__] = _source(bare)
            for name in _names_in(sources[bare.__name__]):
                value = bare.__globals__.get(name)
                if isinstance(value, Kernel):  # it passed an earlier exercise
                    sources |= {each: value.sources[each] for each in reversed(value.sources)}
                    constants |= value.constants
                elif inspect.isfunction(getattr(value, "fn", None)) and value.fn.__globals__ is bare.__globals__:
                    waiting.append(value)
                elif isinstance(getattr(value, "value", value), CONSTANTS):  # a `tl.constexpr` holds a value
                    constants[name] = getattr(value, "value", value)
        in_order = dict(reversed(sources.items()))  # what a function uses comes before it
        return cls(getattr(function, "fn", function).__name__, in_order, constants)

    def changed(self, *changes: tuple[str, str]) -> "Kernel":
        """The same with other text in the places named: how a chapter writes down a mistake.

        Raises:
            ValueError: a text that does not stand there exactly once.
        """
        sources = dict(self.sources)
        for old, new in changes:
            found = [name for name, text in sources.items() if text.count(old) == 1]
            if len(found) != 1:
                raise ValueError(f"{self.name} does not hold {old!r} exactly once.")
            sources[found[0]] = sources[found[0]].replace(old, new)
        return replace(self, sources=sources)

    def __repr__(self) -> str:
        return f"Kernel({self.name})"

    @cached_property
    def loaded(self) -> Any:
        """The kernel itself, for this process to run; needs Triton."""
        self.__dict__["_folder"] = folder = tempfile.TemporaryDirectory(prefix="moe-lab-kernel-")  # as long as it lives
        return self.load(Path(folder.name))[0]

    def load(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        """The kernel, and the names that its code finds; its source is kept in the folder, where Triton reads it.

        Raises:
            KernelError: it returns something.
        """
        import triton
        import triton.language as tl

        names = {"__name__": "kernel", "triton": triton, "tl": tl, "torch": torch}
        # the compiler takes no other global values, and the interpreter cannot multiply these
        names |= self.constants if interprets() else {n: tl.constexpr(value) for n, value in self.constants.items()}
        for name, source in self.sources.items():
            path = folder / f"{name}.py"
            path.write_text(source, encoding="utf-8")
            exec(compile(source, str(path), "exec"), names)
        _require_no_result(self.sources[self.name])
        return names[self.name], names

    # --- Runs, each in a process of its own ---

    def interpret(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Run it in Triton's interpreter; what it stores is in the tensors afterwards, as after a launch.

        Raises:
            KernelError: it failed, or did not come to an end in a minute.
        """
        if not has_triton():
            if self.plain is None:
                raise KernelError(NO_TRITON)
            print(f"{NO_TRITON} The same is computed by PyTorch.")
            self.plain(grid, *args, **constants)
            return
        with _Run("interpret", self, args, constants, {"grid": grid, "seconds": SECONDS}, interprets=True) as run:
            if run.answer["said"]:
                print(run.answer["said"])
            run.bring_back(args)

    def compile(self, *args: Any, capability: int = 90, **constants: Any) -> "MachineCode":
        """What it becomes on a GPU that need not be there, for arguments like these (tensors on "meta" will do).

        Raises:
            KernelError: it does not compile, or there is no Triton.
        """
        if not has_triton():
            raise KernelError(NO_TRITON)
        from moe_lab.ops.machine_code import MachineCode

        with _Run("compile", self, args, constants, {"capability": capability}, meta=True) as run:
            answer = run.answer
        cubin = base64.b64decode(answer.pop("cubin"))
        return MachineCode(**answer, cubin=cubin, constants=constants)

    def time(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> float:
        """Milliseconds of a launch on this machine's GPU, the median of many.

        Raises:
            KernelError: there is no GPU, or it failed there.
        """
        if not torch.cuda.is_available():
            raise KernelError("There is no NVIDIA GPU here to time it on.")
        with _Run("time", self, args, constants, {"grid": grid}) as run:
            return run.answer["milliseconds"]


def _function_in(lines: list[str], name: str) -> str:
    """A function's source with its decorator, after as many empty lines as make its line numbers right."""
    start = next(i for i, line in enumerate(lines) if line.startswith(f"def {name}("))
    end = next((i for i in range(start + 1, len(lines)) if lines[i][:1] not in ("", " ", ")")), len(lines))
    return "\n" * (start - 1) + "\n".join(lines[start - 1 : end]).rstrip() + "\n"


def _source(function: Callable) -> str:
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise KernelError(f"The source of {function.__name__} cannot be read: write it in a cell.") from error
    begin = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))
    text = textwrap.dedent("".join(lines[begin:]))
    return "\n" * (first + begin - 2) + "@triton.jit\n" + text


def _names_in(source: str) -> list[str]:
    """All names that stand there, those of default values too."""
    return list(dict.fromkeys(node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)))


def _require_no_result(source: str) -> None:
    """The interpreter drops what a kernel returns without a word, and the compiler fails without a reason."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Return) and node.value is not None:
            line = source.splitlines()[node.lineno - 1].strip()
            reason = "A kernel returns nothing: it stores what it computed, by `tl.store`, where a pointer shows."
            raise KernelError(f"line {node.lineno}: `{line}`\n{reason}")


# --- The process ----------------------------------------------------------------------------------------------------


class _Run:
    """A process that does one thing with a kernel; inside the `with` its answer, and the arguments as it left them."""

    def __init__(
        self,
        task: str,
        kernel: Kernel,
        args: Sequence[Any],
        constants: dict[str, Any],
        more: dict[str, Any],
        interprets: bool = False,
        meta: bool = False,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="moe-lab-kernel-")
        self.path = Path(self._folder.name)
        self.answer: dict[str, Any] = {}
        tensors = {str(i): arg for i, arg in enumerate(args) if isinstance(arg, Tensor)}
        described = [_described(arg) if isinstance(arg, Tensor) else {"value": arg} for arg in args]
        about = {"name": kernel.name, "sources": kernel.sources, "constants": kernel.constants}
        request = {"task": task, "kernel": about, "args": described, "constants": constants, **more}
        try:
            (self.path / "request.json").write_text(json.dumps(request, default=_plain), encoding="utf-8")
            if not meta:
                torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()}, self.path / "args.pt")
            self.answer = _run(self.path, interprets, more.get("seconds", SECONDS))
        except BaseException:
            self._folder.cleanup()
            raise

    def bring_back(self, args: Sequence[Any]) -> None:
        """Copy what the kernel stored into the caller's tensors; what it only read autograd may still need as it is."""
        for name, tensor in torch.load(self.path / "results.pt", weights_only=True).items():
            given = args[int(name)].detach()
            if not torch.equal(given.cpu(), tensor):
                given.copy_(tensor)

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _described(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "stride": list(tensor.stride()), "dtype": str(tensor.dtype).split(".")[1]}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).split(".")[1]}
    raise KernelError(f"A kernel's arguments are tensors and numbers; {type(value).__name__} cannot be sent to it.")


def _run(folder: Path, interprets: bool, seconds: float) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    if interprets:
        environment["TRITON_INTERPRET"] = "1"
        if problem := interpreter_problem():
            raise KernelError(f"It cannot be run: {problem}.")
    command = [sys.executable, "-m", "moe_lab.course.kernel_process", str(folder)]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "env": environment, "start_new_session": True}
    try:
        done = subprocess.run(command, **options, timeout=seconds + START)
    except subprocess.TimeoutExpired:
        raise KernelError(f"It was stopped after {seconds + START:g} seconds.") from None
    answer = folder / "answer.json"
    if not answer.exists():  # it crashed
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()[-3:]
        raise KernelError("\n".join([f"The process ended with status {done.returncode}.", *said]))
    found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise KernelError(found["error"])
    return found


def check_apart(exercise: str, solution: Any, seconds: float) -> dict[str, Any]:
    """The outcome of an exercise's check in a process that interprets, as a dict.

    Raises:
        KernelError: that process did not come to an end, or crashed.
    """
    with _Run("check", Kernel.of(solution), (), {}, {"exercise": exercise, "seconds": seconds}, interprets=True) as run:
        return run.answer


# --- Where there is no Triton ---------------------------------------------------------------------------------------


def _stand_ins() -> dict[str, Any]:
    """What a notebook's cells need so that kernels can be written down, though not run."""
    triton = SimpleNamespace(
        jit=lambda function: SimpleNamespace(fn=function, __name__=function.__name__),
        cdiv=lambda a, b: -(-a // b),
        next_power_of_2=lambda n: 1 << (n - 1).bit_length(),
    )
    return {"triton": triton, "tl": SimpleNamespace(constexpr=lambda value=None: value)}


def __getattr__(name: str) -> Any:
    if name not in ("triton", "tl"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not has_triton():
        return _stand_ins()[name]
    return importlib.import_module("triton" if name == "triton" else "triton.language")
