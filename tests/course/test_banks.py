"""Every exercise of every chapter: its solution passes, its stub is not started, its mistakes are told by name.

The answers stand in `answers/chNN.py`: `RIGHT`, by exercise id a list of right answers in three styles, and `WRONG`,
by exercise id and name of the mistake a list of its two forms, written independently.
"""

import ast
import dataclasses
import importlib.util
import linecache
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from variants import interpreted

from moe_lab.course.bank import Exercise, chapters, load_chapter
from moe_lab.course.checking import compare
from moe_lab.course.exercises import Outcome, attempt, check
from moe_lab.course.kernel_cells import Kernel
from moe_lab.course.lesson import parse, solved, unsolved
from moe_lab.paths import lessons_dir

MINIMUM = 4
"""Fewest mistakes of an exercise; a chapter may set its own `MINIMUM`."""
LESSONS = {int(path.name[:2]): path for path in sorted(lessons_dir().glob("[0-9][0-9]_*.py"))}
EXERCISES = [exercise for number in chapters() for exercise in load_chapter(number).EXERCISES]


def where_it_runs(exercise: Exercise) -> tuple:
    """The mark of an exercise that asks for a Triton kernel: here it is checked in this very process, to be quick."""
    return (interpreted,) if isinstance(exercise.reference, Kernel) else ()


MISTAKES = [
    pytest.param(exercise, mistake.name, id=f"{exercise.id}-{mistake.name}", marks=where_it_runs(exercise))
    for exercise in EXERCISES
    for mistake in exercise.mistakes
]


def each_exercise(test: Callable, exercises: Sequence[Exercise] = EXERCISES) -> Callable:
    each = [pytest.param(exercise, id=exercise.id, marks=where_it_runs(exercise)) for exercise in exercises]
    return pytest.mark.parametrize("exercise", each)(test)


def each_function(test: Callable) -> Callable:
    """All but the kernels, whose mishaps `test_kernel_cells.py` looks at."""
    return each_exercise(test, [exercise for exercise in EXERCISES if not isinstance(exercise.reference, Kernel)])


def number(exercise: Exercise) -> int:
    return int(exercise.id.split(".")[0])


def answers(exercise: Exercise) -> ModuleType:
    """The answers to an exercise's chapter."""
    path = Path(__file__).parent / "answers" / f"ch{number(exercise):02d}.py"
    assert path.exists(), f"{path.name} is missing in tests/course/answers/"
    if path.stem not in _answers:
        spec = importlib.util.spec_from_file_location(f"answers_{path.stem}", path)
        _answers[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_answers[path.stem])
    return _answers[path.stem]


_answers: dict[str, ModuleType] = {}


def in_lesson(chapter: int, make: Callable) -> dict[str, tuple[str, dict]]:
    """By exercise id: the name of what a lesson's notebook defines, and a namespace that holds it.

    The namespace has what the lesson imports and defined before; nothing else of the lesson is run.
    """
    found, namespace = {}, {}
    for cell in make(parse(LESSONS[chapter])).cells:
        if cell.cell_type != "code" or cell.source.startswith("%%"):  # what runs on ranks is no Python of this process
            continue
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
                ids = [d.args[0].value for d in getattr(node, "decorator_list", []) if is_exercise(d)]
                if ids:
                    node.decorator_list = [d for d in node.decorator_list if not is_exercise(d)]
                _define(ast.unparse(node), namespace)
                found |= {id: (node.name, dict(namespace)) for id in ids}
    return found


def _define(source: str, namespace: dict) -> None:
    """Run a definition, with its source where Triton looks for it."""
    name = f"<lesson {len(linecache.cache)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), namespace)


def is_exercise(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "exercise"


def outcome_of(exercise: Exercise, solution: Any) -> Outcome:
    return check(exercise, solution, vars(answers(exercise)))


# --- lessons and chapters -----------------------------------------------------------------------------------------


def test_there_are_exercises():
    assert EXERCISES, "moe_lab/course/chapters/ has no exercise: everything below tested nothing"
    assert LESSONS


@pytest.mark.parametrize("chapter", sorted({*LESSONS, *chapters()}))
def test_a_lesson_and_its_chapter_have_the_same_exercises(chapter):
    asked = list(in_lesson(chapter, solved)) if chapter in LESSONS else []
    kept = [exercise.id for exercise in load_chapter(chapter).EXERCISES] if chapter in chapters() else []
    assert asked == kept


@each_exercise
def test_the_solution_passes(exercise):
    name, namespace = in_lesson(number(exercise), solved)[exercise.id]
    outcome = check(exercise, namespace[name], namespace)
    assert outcome.status == "passed", outcome


@each_exercise
def test_the_stub_is_not_started(exercise):
    name, namespace = in_lesson(number(exercise), unsolved)[exercise.id]
    outcome = check(exercise, namespace[name], namespace)
    assert outcome.status == "not started", outcome


@each_exercise
def test_the_exercise_is_well_made(exercise):
    names = [mistake.name for mistake in exercise.mistakes]
    assert len(set(names)) == len(names)
    assert len(names) >= getattr(load_chapter(number(exercise)), "MINIMUM", MINIMUM)
    assert all(mistake.says.strip().endswith((".", "?", "!")) for mistake in exercise.mistakes)
    once, again = exercise.cases(), exercise.cases()
    assert len({case.name for case in once}) == len(once)
    for case, same in zip(once, again, strict=True):
        assert "Foreign(" not in repr(attempt(exercise, exercise.reference, case).value), (
            "run gives what cannot be compared"
        )
        runs = [attempt(exercise, exercise.reference, c) for c in (case, same, same)]
        assert compare(runs[0], runs[1], rtol=0, atol=0) is None, f"{case.name} is not the same every time"
        assert compare(runs[1], runs[2], rtol=0, atol=0) is None, f"{case.name} is spoilt by a run"


# --- the bank -----------------------------------------------------------------------------------------------------


@each_exercise
def test_right_answers_in_three_styles_pass(exercise):
    styles = answers(exercise).RIGHT[exercise.id]
    assert len(styles) >= 3
    assert_independent(styles)
    for style in styles:
        outcome = outcome_of(exercise, style)
        assert outcome.status == "passed", outcome


@pytest.mark.parametrize(("exercise", "name"), MISTAKES)
def test_a_mistake_is_told_by_its_own_name_in_two_forms(exercise, name):
    forms = answers(exercise).WRONG[exercise.id][name]
    assert len(forms) >= 2
    assert_independent([*forms, *(mistake.wrong for mistake in exercise.mistakes if mistake.name == name)])
    for form in forms:
        outcome = outcome_of(exercise, form)
        assert (outcome.status, outcome.mistake) == ("wrong", name), outcome


@each_exercise
def test_no_answer_belongs_to_a_mistake_that_is_gone(exercise):
    assert set(answers(exercise).WRONG[exercise.id]) == {mistake.name for mistake in exercise.mistakes}


def assert_independent(forms: list) -> None:
    """No two share their code, as two calls of one factory or one function under two names would."""
    bare = [getattr(form, "fn", form) for form in forms]
    codes = [getattr(form, "__code__", form) for form in bare]
    assert len({id(code) for code in codes}) == len(codes), "two of the forms are the same code"


# --- what can go wrong anywhere -----------------------------------------------------------------------------------


def altered(exercise: Exercise, aside: Callable | None = None, after: Callable | None = None) -> Any:
    """The reference, with something done to its arguments once they were used, or to its result."""

    def run(right: Callable, *args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        if aside:
            aside((*args, *kwargs.values()))
        return after(result) if after else result

    reference = exercise.reference
    if not isinstance(reference, type):
        return lambda *args, **kwargs: run(reference, *args, **kwargs)
    forward = lambda self, *args, **kwargs: run(super(wrong, self).forward, *args, **kwargs)  # noqa: E731
    wrong = type(reference.__name__, (reference,), {"forward": forward})
    return wrong


def each_leaf(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`change`, applied to every tensor and number of a tree."""

    def walk(tree: Any) -> Any:
        if dataclasses.is_dataclass(tree):
            return dataclasses.replace(tree, **{f.name: walk(getattr(tree, f.name)) for f in dataclasses.fields(tree)})
        if isinstance(tree, dict):
            return {key: walk(part) for key, part in tree.items()}
        return type(tree)(map(walk, tree)) if isinstance(tree, list | tuple) else change(tree)

    return walk


def reshaped(result: Any) -> Any:
    return result[None] if isinstance(result, torch.Tensor) else [result, result]


def retyped(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.double() if leaf.is_floating_point() else leaf.float()
    return str(leaf)


def broken(leaf: Any) -> Any:
    return leaf * float("nan") if isinstance(leaf, torch.Tensor) else float("nan")


def changeable(exercise: Exercise) -> bool:
    arguments = [value for case in exercise.cases() for value in (*case.args, *case.kwargs.values())]
    return any(isinstance(argument, torch.Tensor | list) for argument in arguments)


def spoil(arguments: tuple) -> None:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            argument.data.fill_(7)
        elif isinstance(argument, list):
            argument.append(7)


def loop(_: Any) -> None:
    while True:
        pass


def fail(_: Any) -> None:
    raise RuntimeError("sizes do not match")


TYPE, SHAPE = "The type is wrong", ("The shape is wrong", "The length is wrong", "The keys are wrong")
GENERIC = {
    "returns None": ({"after": lambda result: None}, ["None came back"]),
    "wrong shape": ({"after": reshaped}, [TYPE, *SHAPE]),
    "wrong dtype": ({"after": each_leaf(retyped)}, [TYPE, "The dtype is wrong"]),
    "NaN": ({"after": each_leaf(broken)}, [TYPE, "The dtype is wrong", "NaN or infinity"]),
    "raises": ({"after": fail}, ["It raises RuntimeError"]),
    "loops for ever": ({"aside": loop}, ["It does not come to an end"]),
    "changes its input": ({"aside": spoil}, ["It changes its input"]),
    "prints a megabyte": ({"aside": lambda arguments: print("x" * 1_000_000)}, ["It prints too much"]),
    "calls exit": ({"aside": lambda arguments: exit()}, ["It calls exit"]),
}


@pytest.mark.parametrize("kind", GENERIC)
@each_function
def test_a_generic_mistake_is_told_and_quickly(exercise, kind):
    if kind == "changes its input" and not changeable(exercise):
        pytest.skip(f"exercise {exercise.id} has no input that could be changed")
    change, headlines = GENERIC[kind]
    began, computed = time.monotonic(), time.process_time()
    limit = 0.5 if kind == "loops for ever" else 5.0  # which a slow machine needs for answers that do end
    outcome = outcome_of(dataclasses.replace(exercise, seconds=limit), altered(exercise, **change))
    assert outcome.status in ("wrong", "failed")
    assert outcome.headline in headlines, outcome
    assert outcome.says
    assert time.process_time() - computed < 5
    assert time.monotonic() - began < 30  # other tests run beside this one, some of them with four processes
