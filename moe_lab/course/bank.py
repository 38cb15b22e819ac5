"""What an exercise is, and the bank that holds them: one chapter per notebook, loaded when it is asked for.

A chapter (`chapters/chNN.py`) is a tuple `EXERCISES`. An exercise has a reference, a few inputs on which an answer
must agree with it, and the mistakes that people really make. A mistake is recognised by what it computes, never by its
source text.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from moe_lab.paths import CourseError


class UnknownExercise(CourseError, LookupError):
    """There is no exercise of that id."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input of an exercise.

    Args:
        show: what a learner sees of it; by default its arguments, by name.
        raises: whether the input is not valid, so that a right answer raises what the reference raises.
    """

    name: str
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    show: str | None = None
    raises: bool = False


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A mistake that people make: `wrong` makes it, `says` names it and tells how to think about it."""

    name: str
    wrong: Callable
    says: str


def call(solution: Callable, case: Case) -> Any:
    """The plain call: how a function is run on a case."""
    return solution(*case.args, **case.kwargs)


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """What a learner is asked to write.

    Args:
        id: chapter and number, as in "1.2".
        reference: what a right answer agrees with, and what the notebook goes on with after a wrong one.
        cases: makes the inputs: the same every time, the smallest first.
        mistakes: the bank, the most specific first; the first that fits is named.
        run: `run(solution, case)` gives a tree of tensors, numbers, strings, None, sequences, dicts and dataclasses.
            A class needs one that builds it, loads fixed weights and returns outputs and gradients.
        seconds: how long an answer may take for all cases together.
    """

    id: str
    title: str
    reference: Callable
    cases: Callable[[], list[Case]]
    mistakes: tuple[Mistake, ...] = ()
    run: Callable[[Any, Case], Any] = call
    seconds: float = 10.0
    rtol: float = 1e-4
    atol: float = 1e-5


def chapters() -> list[int]:
    """The numbers of all chapters that have exercises, ascending."""
    package = importlib.import_module("moe_lab.course.chapters")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted(int(name[2:]) for name in names if name.startswith("ch") and name[2:].isdigit())


def load_chapter(number: int) -> ModuleType:
    """Imports one chapter, and no other.

    Raises:
        UnknownExercise: there is no such chapter.
    """
    name = f"moe_lab.course.chapters.ch{number:02d}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # the chapter is there and lacks something itself
            raise
    known = ", ".join(map(str, chapters())) or "none yet"
    raise UnknownExercise(f"There is no chapter {number} of exercises; there are: {known}.")


def find(id: str) -> Exercise:
    """The exercise of that id.

    Raises:
        UnknownExercise: no chapter has it; the message lists the ids of its chapter.
    """
    number = id.partition(".")[0] if isinstance(id, str) else ""
    if not number.isdigit():
        raise UnknownExercise(f'An exercise is named by chapter and number, as in @exercise("1.2"), not by {id!r}.')
    exercises = {exercise.id: exercise for exercise in load_chapter(int(number)).EXERCISES}
    if id not in exercises:
        raise UnknownExercise(f"There is no exercise {id}; chapter {number} has {', '.join(exercises)}.")
    return exercises[id]
