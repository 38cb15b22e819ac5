"""Exercises that never block: `@exercise("1.2")` checks what stands below it, says how it did, and goes on."""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from types import CodeType
from typing import Any, Literal

from moe_lab.course import progress
from moe_lab.course.bank import Case, Exercise, find
from moe_lab.course.checking import (
    STUB,
    Difference,
    Raised,
    Run,
    compare,
    fresh_state,
    matches,
    rules_out,
    show,
    show_pair,
    snapshot,
)
from moe_lab.course.display import MUTED, badge, colour, present, prose, word
from moe_lab.course.kernel_cells import NO_TRITON, Kernel, KernelError, check_apart, has_triton, interprets
from moe_lab.course.sandbox import Sandbox, Stop, line_in

# --- The decorator ------------------------------------------------------------------------------------------------


def exercise(id: str) -> Callable[[Any], Any]:
    """Checks the function, class or kernel below it and shows how it did.

    The name then stands for the learner's own object if it passed, and for the reference if not. A kernel becomes a
    `Kernel`, which runs it in processes of its own.

    Raises:
        UnknownExercise: there is no exercise of that id.
    """
    spec = find(id)

    def decorate(solution: Any) -> Any:
        namespace = sys._getframe(1).f_globals
        with _bound(solution, namespace):
            outcome = check(spec, solution, namespace)
        present(outcome)
        if outcome.status != "not checked":
            progress.record(id, outcome.status, outcome.mistake, namespace)
        if outcome.status != "passed":
            return spec.reference
        return Kernel.of(solution) if isinstance(spec.reference, Kernel) else solution

    return decorate


@contextmanager
def _bound(solution: Any, namespace: dict[str, Any]) -> Iterator[None]:
    """Binds the solution's name already: a recursion or `super(Name, self)` must not find an older version."""
    name = getattr(_bare(solution), "__name__", None)
    before = {name: namespace[name]} if name in namespace else {}
    if name:
        namespace[name] = solution
    try:
        yield
    finally:
        namespace.pop(name, None)
        namespace.update(before)


# --- The check ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The smallest case that exposes a wrong answer, as text; `got` is "" where nothing came back."""

    name: str
    given: str
    expected: str = ""
    got: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an answer did; shows itself in a notebook. `mistake` is the bank's name of it, where it has one."""

    exercise: str
    title: str
    status: Literal["passed", "not started", "wrong", "failed", "not checked"]
    headline: str = ""
    says: str = ""
    mistake: str | None = None
    case: Shown | None = None
    printed: str = ""

    @property
    def _parts(self) -> list[tuple[str, str]]:
        parts = []
        if self.case:
            parts.append((f"The smallest case that shows it ({self.case.name})", self.case.given))
            parts += [(name, text) for name, text in (("expected", self.case.expected), ("got", self.case.got)) if text]
        if self.printed:
            parts.append(("your code printed", self.printed.rstrip("\n")))
        return parts

    @property
    def _note(self) -> str:
        return "" if self.status == "passed" else "The notebook goes on with the reference; come back when you like."

    def __str__(self) -> str:
        lines = [f"Exercise {self.exercise} · {self.title}: {word(self.status)}"]
        lines += list(filter(None, [self.headline, self.says]))
        for name, text in self._parts:
            lines += [f"{name}:", *(f"    {line}" for line in text.splitlines())]
        return "\n".join([*lines, *filter(None, [self._note])])

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        pre = "margin: 0 0 0.4em 1em; white-space: pre-wrap; font-family: var(--jp-code-font-family, monospace)"
        html = [f"<div>{badge(self.status)} · Exercise {escape(self.exercise)} · {escape(self.title)}</div>"]
        if self.headline:
            html.append(f"<div style='margin-top: 0.4em'><strong>{prose(self.headline)}</strong></div>")
        if self.says:
            html.append(f"<div style='white-space: pre-line'>{prose(self.says)}</div>")
        for name, text in self._parts:
            html.append(f"<div style='margin-top: 0.4em; {MUTED}'>{escape(name)}</div>")
            html.append(f"<pre style='{pre}'>{escape(text)}</pre>")
        if self._note:
            html.append(f"<div style='margin-top: 0.4em; {MUTED}'>{escape(self._note)}</div>")
        frame = f"border-left: 4px solid {colour(self.status)}; padding: 0.3em 0.8em; max-width: 60em"
        return {"text/html": f"<div style='{frame}'>{''.join(html)}</div>", "text/plain": str(self)}

    def __repr__(self) -> str:
        return str(self)


def check(exercise: Exercise, solution: Any, namespace: dict[str, Any]) -> Outcome:
    """Runs an answer on every case and says how it did; `namespace` holds the globals of the learner's code."""

    def outcome(status: str, headline: str = "", says: str = "", **more: Any) -> Outcome:
        return Outcome(exercise=exercise.id, title=exercise.title, status=status, headline=headline, says=says, **more)

    wanted, given = _kind(exercise.reference), _kind(solution)
    if wanted != given:
        return outcome("wrong", f"A {wanted} is asked for", f"`@exercise` stands above a {given}; write a {wanted}.")
    if isinstance(exercise.reference, Kernel) and not interprets():
        return _check_kernel(exercise, solution)

    with fresh_state():
        cases = exercise.cases()
        expected = [attempt(exercise, exercise.reference, case) for case in cases]
        for case, run in zip(cases, expected, strict=True):
            if run.raised and not case.raises:  # else whatever raises the same would pass
                says = f"On “{case.name}” the reference raises {run.raised.kind}: {run.raised.message}"
                return outcome("failed", "This exercise is broken, not your code", f"{says}\nPlease report it.")
        got: list[Run] = []
        with Sandbox(exercise.seconds, namespace) as box:
            for case in cases:
                got.append(attempt(exercise, solution, case, namespace))

        printed = {"printed": box.printed}
        if box.stopped:
            case = cases[min(len(got), len(cases) - 1)]
            shown = Shown(name=case.name, given=_given(exercise, case))
            return outcome("failed", *_stopped(box, exercise), case=shown, **printed)

        tolerance = {"rtol": exercise.rtol, "atol": exercise.atol}
        found = [compare(e, g, **tolerance) for e, g in zip(expected, got, strict=True)]
        if not any(found):
            return outcome("passed", **printed)
        if any(run.raised and run.raised.is_stub for run in got) and (unwritten := _unwritten(solution)):
            return outcome("not started", says=_your_turn(solution, unwritten), **printed)

        first, difference = next((i, difference) for i, difference in enumerate(found) if difference)
        shown = _shown(exercise, cases, first, difference)
        for mistake in exercise.mistakes:
            if rules_out(attempt(exercise, mistake.wrong, cases[first]), got[first], **tolerance):
                continue  # as one case does for most, and running them all takes a while
            wrong = [attempt(exercise, mistake.wrong, case) for case in cases]
            if matches(expected, wrong, got, **tolerance):
                headline = mistake.name[:1].upper() + mistake.name[1:]
                return outcome("wrong", headline, mistake.says, mistake=mistake.name, case=shown, **printed)

    status = "failed" if difference.kind == "raises" else "wrong"
    return outcome(status, difference.headline, difference.says, case=shown, **printed)


def _check_kernel(exercise: Exercise, solution: Any) -> Outcome:
    """The check in a process that interprets kernels; without one for a stub, which would only take time."""

    def outcome(status: str, headline: str = "", says: str = "") -> Outcome:
        return Outcome(exercise=exercise.id, title=exercise.title, status=status, headline=headline, says=says)

    if unwritten := _unwritten(solution):
        return outcome("not started", says=_your_turn(solution, unwritten))
    if not has_triton():
        return outcome("not checked", "There is no Triton here", f"{NO_TRITON} What you wrote was not checked.")
    try:
        found = check_apart(exercise.id, solution, exercise.seconds)
    except KernelError as error:
        return outcome("failed", "It could not be run", str(error))
    return Outcome(**found | {"case": Shown(**found["case"]) if found["case"] else None})


def attempt(exercise: Exercise, solution: Any, case: Case, namespace: dict[str, Any] | None = None) -> Run:
    """Runs a solution on a copy of a case and keeps what it did."""
    case = copy.deepcopy(case)
    value, raised = None, None
    if isinstance(solution, Kernel):
        solution = solution.loaded
    with fresh_state():
        try:
            value = snapshot(exercise.run(solution, case))
        except (Stop, KeyboardInterrupt):
            raise
        except BaseException as error:
            raised = _raised(error, namespace)
        return Run(value=value, raised=raised, inputs=snapshot(_arguments(exercise, case)))


def _raised(error: BaseException, namespace: dict[str, Any] | None) -> Raised:
    while type(error).__name__ == "InterpreterError" and error.__cause__:  # Triton wraps what a kernel raises
        error = error.__cause__
    line = line_in(namespace, traceback=error.__traceback__) if namespace is not None else ""
    message = "\n".join(str(error).strip().splitlines()[:4])[:400]
    cause: BaseException | None = error
    while cause and not (isinstance(cause, NotImplementedError) and cause.args == (STUB,)):
        cause = cause.__cause__ or cause.__context__
    return Raised(kind=type(error).__name__, message=message, line=line, is_stub=cause is not None)


def _stopped(box: Sandbox, exercise: Exercise) -> tuple[str, str]:
    if box.stopped == "output":
        return "It prints too much", "It was stopped. Print a few values, of the smallest case, and look at these."
    where = f"\nIt was stopped at {box.line}" if box.line else ""
    says = f"It was stopped after {exercise.seconds:g} seconds: is there a loop that does not end?"
    return "It does not come to an end", says + where


# --- What a solution is -------------------------------------------------------------------------------------------


def _kind(solution: Any) -> str:
    if isinstance(solution, type):
        return "class"
    if inspect.isfunction(solution):
        return "function"
    if isinstance(solution, Kernel) or hasattr(solution, "fn"):
        return "Triton kernel"
    return f"value of type {type(solution).__name__}"


def _bare(solution: Any) -> Any:
    """The function inside a Triton kernel, a property, a static method or another decorator."""
    if isinstance(solution, type):
        return solution
    for attribute in ("fn", "fget", "__func__", "__wrapped__"):
        if hasattr(solution, attribute):
            return _bare(getattr(solution, attribute))
    return solution


def _unwritten(solution: Any) -> list[str]:
    """The names of the functions, or of a class's methods, that still hold the stub's line."""
    if isinstance(solution, type):
        return [name for name, member in vars(solution).items() if _unwritten(member)]
    code = getattr(_bare(solution), "__code__", None)
    return [code.co_name] if code and _holds_stub(code) else []


def _holds_stub(code: CodeType) -> bool:
    if STUB in code.co_consts and "NotImplementedError" in code.co_names:
        return True
    return any(isinstance(inner, CodeType) and _holds_stub(inner) for inner in code.co_consts)


def _your_turn(solution: Any, unwritten: list[str]) -> str:
    line = f'`raise NotImplementedError("{STUB}")`'
    if isinstance(solution, type):
        names = ", ".join(f"`{name}`" for name in unwritten)
        return f"Still to be written: {names}. Put your code in place of {line} and run the cell again."
    return f"Put your code in place of {line} and run the cell again."


# --- What a learner sees of a case --------------------------------------------------------------------------------


def _arguments(exercise: Exercise, case: Case) -> dict[str, Any]:
    """A case's arguments by name: a function's own, where they fit."""
    if inspect.isfunction(exercise.reference):
        with suppress(TypeError):  # `run` does something else with them
            return dict(inspect.signature(exercise.reference).bind(*case.args, **case.kwargs).arguments)
    return {f"input {i}": value for i, value in enumerate(case.args, 1)} | dict(case.kwargs)


def _given(exercise: Exercise, case: Case) -> str:
    if case.show is not None:
        return case.show
    arguments = snapshot(_arguments(exercise, case))
    return "\n".join(f"{name} = {show(value)}" for name, value in arguments.items())


def _shown(exercise: Exercise, cases: list[Case], first: int, difference: Difference) -> Shown:
    case = cases[first]
    name = f"{case.name}; the smaller ones are right" if first else case.name
    if difference.kind in ("raises", "refused", "no gradient"):  # nothing to compare
        return Shown(name=name, given=_given(exercise, case))
    expected, got = show_pair(difference.expected, difference.got)
    at = f"{difference.where}: " if difference.where else ""
    return Shown(name=name, given=_given(exercise, case), expected=at + expected, got=at + got)
