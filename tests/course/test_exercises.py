"""The decorator, the diagnoses and what a learner sees, on the example chapter."""

import dataclasses
import importlib.util
import linecache
import os
import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import example_chapter
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_lab.course import exercise
from moe_lab.course.bank import Case, Mistake, UnknownExercise, find
from moe_lab.course.checking import (
    Raised,
    Refused,
    Run,
    compare,
    fresh_state,
    load_weights,
    matches,
    rules_out,
    show,
    show_pair,
    snapshot,
)
from moe_lab.course.exercises import Outcome, check
from moe_lab.paths import CourseError


@pytest.fixture(autouse=True)
def _example_chapter(monkeypatch):
    monkeypatch.setitem(sys.modules, "moe_lab.course.chapters.ch98", example_chapter)


def cell(code: str, **names: Any) -> dict[str, Any]:
    """Runs code as a notebook cell would be run, and returns its globals."""
    namespace = {"exercise": exercise, "torch": torch, "F": F, "nn": nn, "np": np, "random": random, **names}
    linecache.cache["<cell>"] = (len(code), None, code.splitlines(keepends=True), "<cell>")
    exec(compile(code, "<cell>", "exec"), namespace)
    return namespace


def answer(code: str, id: str = "98.1", **changes: Any) -> Outcome:
    """The outcome of the last thing that the code defines."""
    namespace = cell(code)
    spec = dataclasses.replace(find(id), seconds=0.5, **changes)
    return check(spec, list(namespace.values())[-1], namespace)


def combine(body: str) -> str:
    return "def combine(rows, weights):\n" + "\n".join(f"    {line}" for line in body.splitlines())


def depth(body: str) -> str:
    return f"def depth(tree):\n    {body}"


GATE = """
class Gate(nn.Module):
    def __init__(self, a, b):
        super(Gate, self).__init__()
        self.w, self.v = nn.Linear(a, b, bias=False), nn.Linear(a, b, bias=False)
    def forward(self, x):
        """

RIGHT = combine("return (rows * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)")


# --- right answers ------------------------------------------------------------------------------------------------


LOOP = "return torch.stack([{} for r, w in zip(rows, weights)])"


@pytest.mark.parametrize(
    "code",
    [
        RIGHT,
        combine("return torch.einsum('tkd,tk->td', rows, F.normalize(weights, p=1, dim=-1))"),
        combine(LOOP.format("sum(a * b for a, b in zip(r, w / w.sum()))")),
    ],
)
def test_right_answers_in_three_styles_pass(code):
    assert answer(code).status == "passed"


def test_a_right_answer_is_returned_bare_and_a_wrong_one_replaced(capsys):
    namespace = cell("@exercise('98.1')\n" + RIGHT)
    assert namespace["combine"].__globals__ is namespace
    assert not hasattr(namespace["combine"], "__wrapped__")
    assert capsys.readouterr().out == "Exercise 98.1 · Weighted combine: passed\n"

    namespace = cell("@exercise('98.1')\n" + combine("return rows.sum(1)"))
    assert namespace["combine"] is example_chapter.combine
    assert "The notebook goes on with the reference" in capsys.readouterr().out


def test_the_name_is_bound_while_the_check_runs(capsys):
    """A recursion and `super(Name, self)` must find the new version, not the one of an earlier cell."""
    code = depth("return 1 + max(map(depth, tree), default=0) if isinstance(tree, list) else 0")
    assert cell("@exercise('98.3')\n" + code, depth=lambda tree: 1 / 0)["depth"].__code__.co_filename == "<cell>"
    code = "@exercise('98.2')" + GATE + "return F.silu(self.w(x)) * self.v(x)"
    assert cell(code, Gate=int)["Gate"].__module__ != example_chapter.__name__


def test_an_interrupted_check_leaves_the_old_name(monkeypatch):
    namespace = {"exercise": exercise, "combine": "the old one"}
    with pytest.raises(KeyboardInterrupt):
        exec("@exercise('98.1')\n" + combine("raise KeyboardInterrupt"), namespace)
    assert namespace["combine"] == "the old one"


# --- not started --------------------------------------------------------------------------------------------------

STUB = 'raise NotImplementedError("your turn")'


def test_a_stub_is_not_started():
    outcome = answer(combine(f'"""Weighted mean."""\n{STUB}'))
    assert outcome.status == "not started"
    assert STUB in outcome.says


def test_a_stub_whose_line_is_still_reached_is_not_started():
    assert answer(combine(f"total = weights.sum(1)\n{STUB}")).status == "not started"
    assert answer(combine(f"def inner():\n    {STUB}\nreturn inner()")).status == "not started"


def test_a_stub_line_that_is_not_reached_does_no_harm():
    assert answer(combine(f"if rows is None:\n    {STUB}\n" + RIGHT.split("\n")[1].strip())).status == "passed"


@pytest.mark.parametrize("error", ["NotImplementedError", "NotImplementedError('conv on this device')"])
def test_torchs_own_not_implemented_error_is_a_failure(error):
    assert answer(combine(f"raise {error}")).status == "failed"
    assert answer(combine(f"if rows is None:\n    {STUB}\nraise {error}")).status == "failed"


def test_somebody_elses_stub_is_a_failure():
    outcome = answer(f"def helper():\n    {STUB}\n" + combine("return helper()"))
    assert (outcome.status, outcome.headline) == ("failed", "It raises NotImplementedError")


def test_a_half_finished_class_says_which_method_is_a_stub():
    code = GATE.replace("def forward", "@torch.no_grad()\n    def forward") + STUB
    outcome = answer(f"{code}\n    @property\n    def size(self):\n        {STUB}", id="98.2")
    assert outcome.status == "not started"
    assert "Still to be written: `forward`, `size`." in outcome.says


# --- the bank -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "mistake"),
    [
        ("return torch.einsum('tkd,tk->td', rows, weights)", "weights not renormalised"),
        (LOOP.format("sum(a * b for a, b in zip(r, w))"), "weights not renormalised"),
        ("return rows.sum(1) / rows.shape[1]", "weights not used"),
        (LOOP.format("sum(r) / len(r)"), "weights not used"),
        ("return rows.select(1, 0)", "only the first expert"),
        (LOOP.format("r[0]"), "only the first expert"),
        # a wrong shape still has its own name in the bank
        ("return rows * F.normalize(weights, p=1, dim=-1).unsqueeze(-1)", "not summed over experts"),
        (LOOP.format("torch.stack([a * b / w.sum() for a, b in zip(r, w)])"), "not summed over experts"),
        # raises on one case, and one form of it does not
        ("if len(rows) < rows.shape[1]:\n    raise ValueError\n"
         "return torch.einsum('tkd,tk->td', rows, weights / weights.sum(0))", "normalised over tokens"),
        ("return torch.einsum('tkd,tk->td', rows, weights / weights.sum(0))", "normalised over tokens"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_in_two_forms(body, mistake):
    outcome = answer(combine(body))
    assert (outcome.status, outcome.mistake) == ("wrong", mistake)
    assert outcome.headline.lower() == mistake


def test_a_mistake_in_a_class_is_named():
    outcome = answer(GATE + "return self.w(x) * self.v(x) * self.v(x).sigmoid()", id="98.2")
    assert outcome.mistake == "the other branch is gated"
    assert answer(GATE + "return self.w(x) / (1 + (-self.w(x)).exp())", id="98.2").mistake == "no gate"


def test_a_mistake_equal_to_the_reference_on_small_cases_is_shown_where_it_differs():
    outcome = answer(depth("return isinstance(tree, list) and max(map(depth, tree), default=0) or 0"), id="98.3")
    assert outcome.mistake == "off by one"
    assert outcome.case.name == "[]; the smaller ones are right"
    assert (outcome.case.given, outcome.case.expected, outcome.case.got) == ("tree = []", "1", "0")


def test_a_mistake_that_only_raises_is_named_if_the_same_comes_where_it_does():
    right = "1 + max(map(depth, tree)) if isinstance(tree, list) else 0"
    assert answer(depth(f"return {right}"), id="98.3").mistake == "the empty list"
    assert answer(depth("return 1 + max([depth(t) for t in tree]) if tree != 7 else 0"), id="98.3").mistake is None
    assert answer(depth(f"if tree == []: raise ValueError('no parts')\n    return {right}"), id="98.3").mistake is None
    assert answer(depth("return undefined if tree == [] else 1 + max(map(depth, tree)) if tree != 7 else 0"),
                  id="98.3").mistake is None  # fmt: skip


def test_the_first_mistake_that_fits_is_named():
    both = [Mistake(name=name, wrong=example_chapter.unweighted, says="") for name in ("this one", "that one")]
    assert answer(combine("return rows.mean(1)"), mistakes=tuple(both)).mistake == "this one"


def test_a_bank_entry_that_is_right_names_nothing():
    harmless = (Mistake(name="harmless", wrong=example_chapter.combine, says=""),)
    assert answer(combine("return rows.mean(1)"), mistakes=harmless).mistake is None
    assert answer(RIGHT, mistakes=harmless).status == "passed"


def test_a_mistake_in_place_is_named_by_what_it_leaves_behind():
    def inplace(rows, weights):
        weights /= weights.sum(-1, keepdim=True)
        return (rows * weights[..., None]).sum(1)

    bank = (Mistake(name="in place", wrong=inplace, says=""),)
    body = "weights.div_(weights.sum(1, keepdim=True))\nreturn torch.einsum('tkd,tk->td', rows, weights)"
    assert answer(combine(body), mistakes=bank).mistake == "in place"
    assert answer(combine(body)).headline == "It changes its input"


# --- generic diagnoses --------------------------------------------------------------------------------------------

PASSING = "(rows * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)"


@pytest.mark.parametrize(
    ("body", "headline", "says"),
    [
        (f"result = {PASSING}", "None came back", "is the `return` missing?"),
        (f"return ({PASSING}).tolist()", "The type is wrong", "a tuple or list of 1 where a tensor"),
        (f"return ({PASSING}).detach().numpy()", "The type is wrong", "a NumPy array where a tensor"),
        (f"yield {PASSING}", "The type is wrong", "`yield` makes a generator"),
        (f"return ({PASSING}).double()", "The dtype is wrong", "float64 where float32"),
        (f"return ({PASSING}).T", "The shape is wrong", "dimensions 0 and 1 are swapped"),
        (f"return ({PASSING})[0]", "The shape is wrong", "dimension 0 (of size 1) is missing"),
        (f"return ({PASSING})[:, None]", "The shape is wrong", "dimension 0 (of size 1) is one too many"),
        (f"return ({PASSING}) * float('nan')", "NaN or infinity", "NaN in 2 of 2"),
        (f"return ({PASSING}) / 0", "NaN or infinity", "infinite in 2 of 2"),
        (f"return ({PASSING}) / 2", "The values are wrong", "is exactly half of the expected one"),
        (f"return ({PASSING}) * 3", "The values are wrong", "is exactly 3 times the expected one"),
        (f"return ({PASSING}) / 5 ** 0.5", "The values are wrong", "is exactly 1/√5 of the expected one"),
        (f"return -({PASSING})", "The values are wrong", "the opposite sign"),
        (f"return ({PASSING}) * 1.23456", "The values are wrong", "is 1.235 times the expected one throughout"),
        (f"return ({PASSING}) * 0", "The values are wrong", "zero everywhere"),
        (f"return ({PASSING}).flip(-1)", "The values are wrong", "the right numbers in another order"),
        (f"return ({PASSING}).bfloat16().float()", "The values are wrong", "a lower precision?"),
        ("return weights @ nothing", "It raises NameError", "'nothing' is not defined\nIt happens at line 2: `return"),
        ("return combine(rows, weights)", "It calls itself without end", "a case in which it stops"),
        ("while True: pass", "It does not come to an end", "after 0.5 seconds"),
        (f"result = {PASSING}\nweights += 1\nreturn result", "It changes its input", "After the call `weights`"),
        (f"print('x' * 1_000_000)\nreturn {PASSING}", "It prints too much", "It was stopped"),
        ("exit()", "It calls exit", "only returns its result"),
        ("import sys\nsys.exit(1)", "It calls exit", "only returns its result"),
        ("raise SystemExit", "It calls exit", "only returns its result"),
    ],
)  # fmt: skip
def test_a_generic_mistake_is_diagnosed(body, headline, says):
    outcome = answer(combine(body), mistakes=())
    assert outcome.headline == headline
    assert says in outcome.says
    assert outcome.status in ("wrong", "failed")
    assert outcome.case.given


def test_a_result_without_gradient_is_told():
    outcome = answer(combine(f"return ({PASSING}).detach()"))
    assert outcome.headline == "No gradient flows"
    assert outcome.case.name == "three tokens; the smaller ones are right"
    outcome = answer(GATE + "return (F.silu(self.w(x)) * self.v(x)).data", id="98.2")
    assert outcome.headline == "No gradient flows"  # known from the exception that backward raises


def test_the_wrong_kind_of_thing_is_told():
    assert answer("class combine: pass").headline == "A function is asked for"
    assert answer("def Gate(a, b): pass", id="98.2").headline == "A class is asked for"
    assert "a value of type int" in answer("combine = 5").says


def test_expected_exceptions():
    def strict(n):
        if n < 0:
            raise ValueError("n is negative")
        return n

    spec = {
        "reference": strict,
        "mistakes": (),
        "cases": lambda: [Case(name=str(n), args=(n,), raises=n < 0) for n in (1, -1)],
    }
    assert answer("def strict(n):\n    if n < 0: raise ValueError\n    return n", **spec).status == "passed"
    assert answer("def strict(n): return n", **spec).headline == "It should raise ValueError"
    assert answer("def strict(n):\n    assert n > 0\n    return n", **spec).headline == "It raises AssertionError"


def test_a_reference_that_fails_is_no_fault_of_the_learner():
    def reference(rows, weights):
        raise OSError("the corpus is gone")

    for code in (RIGHT, combine("raise OSError")):
        outcome = answer(code, reference=reference)
        assert outcome.headline == "This exercise is broken, not your code"
        assert "OSError: the corpus is gone" in outcome.says


# --- unknown exercises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "says"),
    [
        ("98.7", "There is no exercise 98.7; chapter 98 has 98.1, 98.2, 98.3."),
        ("77.1", "There is no chapter 77"),
        ("swiglu", "as in @exercise(\"1.2\"), not by 'swiglu'"),
        (print, "not by <built-in function print>"),
    ],
)
def test_an_unknown_exercise_is_told(id, says):
    with pytest.raises(UnknownExercise) as caught:
        exercise(id)
    assert says in str(caught.value)
    assert isinstance(caught.value, CourseError)


def test_a_chapter_that_lacks_a_module_says_which(monkeypatch, tmp_path):
    (tmp_path / "ch97.py").write_text("import no_such_module")
    spec = importlib.util.find_spec("moe_lab.course.chapters")
    monkeypatch.setattr(sys.modules[spec.name], "__path__", [str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        exercise("97.1")


# --- every run is alike, and leaves nothing behind ----------------------------------------------------------------


def test_inputs_are_fresh_for_every_run():
    """One case changed in place must not spoil the next check."""
    assert answer(combine("rows.detach().zero_()\nweights.zero_()\nreturn rows")).status == "wrong"
    assert answer(RIGHT).status == "passed"


def test_random_numbers_are_the_same_for_every_run_and_the_learners_own_go_on():
    spec = {
        "reference": lambda n: torch.rand(n).sum() + random.random() + np.random.rand(),
        "cases": lambda: [Case(name="three", args=(3,)), Case(name="four", args=(4,))],
        "mistakes": (),
    }
    code = "def noise(n): return torch.rand(n).sum() + random.random() + np.random.rand()"
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    numbers = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    assert answer(code, **spec).status == "passed"
    assert (torch.rand(1), random.random(), np.random.rand()) == numbers


def test_random_numbers_do_not_depend_on_what_ran_before():
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        with fresh_state():
            seen.append((torch.rand(1), random.random(), np.random.rand()))
    assert seen[0] == seen[1]


def test_the_learners_settings_neither_matter_nor_change():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert answer(RIGHT).status == "passed"
            answer(combine("torch.set_default_dtype(torch.float16)\ntorch.set_grad_enabled(True)\n1/0"))
            assert not torch.is_grad_enabled()
        zeros = {"reference": lambda: torch.zeros(2), "cases": lambda: [Case(name="no input")], "mistakes": ()}
        assert answer("def zeros(): return torch.tensor([0.0, 0.0], dtype=torch.float32)", **zeros).status == "passed"
        with torch.inference_mode():
            assert answer(GATE + "return F.silu(self.w(x)) * self.v(x)", id="98.2").status == "passed"
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# --- comparing ----------------------------------------------------------------------------------------------------


def kinds(expected: Any, got: Any) -> str | None:
    difference = compare(Run(value=snapshot(expected)), Run(value=snapshot(got)), rtol=1e-4, atol=1e-5)
    return difference and difference.kind


class Point(NamedTuple):
    x: float
    y: float


@dataclasses.dataclass
class Count:
    total: int
    parts: dict


@pytest.mark.parametrize(
    ("expected", "got", "kind"),
    [
        (3, 3, None),
        (3, 4, "value"),
        (3, 3.0, "type"),  # nn.Linear(4, 3.0) fails
        (3, True, "type"),
        (True, 1, "type"),
        (True, np.bool_(True), None),
        (3, np.int64(3), None),
        (3, torch.tensor(3), None),
        (3, torch.tensor(3.0), "type"),
        (3, torch.tensor([3]), "type"),
        (3, torch.tensor([3, 4]), "type"),
        (0.5, torch.tensor(0.5), None),
        (0.5, np.float32(0.5), None),
        (0.0, 0, None),
        (0.5, False, "type"),
        (0.5, 0.500001, None),
        (0.5, 0.51, "value"),
        (0.5, float("nan"), "nan"),
        (float("nan"), float("nan"), None),
        (float("inf"), float("inf"), None),
        (1e30, float("inf"), "nan"),
        (torch.tensor(0.5), 0.5, "type"),
        (torch.tensor([0.5]), torch.tensor(0.5), "shape"),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), None),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "value"),
        (torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), "dtype"),
        (torch.tensor([True]), torch.tensor([1]), "dtype"),
        (torch.tensor([float("nan"), 1]), torch.tensor([float("nan"), 1]), None),
        (torch.zeros(0, 3), torch.zeros(0, 3), None),
        (torch.zeros(0, 3), torch.zeros(3, 0), "shape"),
        (torch.ones(2), torch.ones(2).to_sparse(), "type"),
        (torch.ones(2), nn.Parameter(torch.ones(2)), None),
        ([1, 2], (1, 2), None),
        ([1, 2], [2, 1], "value"),
        ([1, 2], [1, 2, 3], "structure"),
        ([1, [2, 3]], [1, [2, 4]], "value"),
        ([1, None], [1, None], None),
        ([1, 2], [1, None], "none"),
        (None, 1, "type"),
        ("a", "a", None),
        ("a", "b", "value"),
        ("1", 1, "type"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, None),
        ({"a": 1}, {"A": 1}, "structure"),
        ({"a": 1}, [("a", 1)], "type"),
        (Point(1.0, 2.0), Point(1.0, 2.0), None),
        (Point(1.0, 2.0), (1.0, 2.5), "value"),
        (Count(1, {"x": [1]}), Count(1, {"x": [1]}), None),
        (Count(1, {"x": [1]}), Count(1, {"x": [2]}), "value"),
        (Count(1, {}), {"total": 1}, "type"),
        ({1, 2}, {2, 1}, None),
        ({1, 2}, {1, 3}, "value"),
        ({1, 2}, [1, 2], "type"),
        (torch.float32, torch.float32, None),
        (torch.float32, torch.float64, "type"),
        (1 + 2j, 1 + 2j, None),
        (1 + 2j, 1 + 3j, "value"),
    ],
)
def test_what_is_accepted_for_what(expected, got, kind):
    assert kinds(expected, got) == kind


def trees(leaves: st.SearchStrategy) -> st.SearchStrategy:
    def grow(inner):
        return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)

    return st.recursive(leaves, grow, max_leaves=8)


exact = st.none() | st.integers(-2, 2) | st.text("ab", max_size=2)


@given(trees(exact | st.booleans() | st.floats()))
def test_a_tree_equals_itself(tree):
    assert kinds(tree, tree) is None


@given(trees(exact), trees(exact))
def test_two_trees_differ_exactly_if_they_do(one, other):
    assert (kinds(one, other) is None) == (snapshot(one) == snapshot(other))


def test_a_mistake_within_tolerance_of_the_reference_names_nothing():
    expected, mistake, got = ([Run(value=value)] for value in (1.0, 1.00009, 1.00017))
    tolerance = {"rtol": 1e-4, "atol": 0}
    assert compare(expected[0], got[0], **tolerance)
    assert not compare(mistake[0], got[0], **tolerance)
    assert not matches(expected, mistake, got, **tolerance)


def test_no_single_case_rules_out_a_mistake_that_matches():
    raised = [Run(raised=Raised(kind="ValueError", message=message)) for message in "ab"]
    runs = [Run(value=0.0), Run(value=1.0), Run(value=1.0, inputs={"x": 1}), *raised]
    both, tolerance = list(product(runs, repeat=2)), {"rtol": 0, "atol": 0}
    found = [three for three in product(both, repeat=3) if matches(*map(list, three), **tolerance)]
    assert any(mistake != got for _, mistake, got in found)
    for _, mistake, got in found:
        assert not any(rules_out(*each, **tolerance) for each in zip(mistake, got, strict=True))
    assert rules_out(runs[0], runs[1], **tolerance)


def test_the_deepest_difference_is_named():
    expected = {"output": torch.ones(2), "gradient": [torch.ones(2), torch.ones(2)]}
    got = {"output": torch.ones(2), "gradient": [torch.ones(2), torch.tensor([1.0, 5.0])]}
    difference = compare(Run(value=snapshot(expected)), Run(value=snapshot(got)), rtol=0, atol=0)
    assert difference.where == "gradient[1]"
    assert difference.says.startswith("“gradient[1]” ")


def test_a_result_that_holds_itself_ends():
    loop: list = []
    loop.append(loop)
    assert kinds([1], loop) == "type"


def test_large_tensors_are_shown_by_their_worst_element():
    expected, got = torch.zeros(10, 10), torch.zeros(10, 10)
    got[3, 4], got[5, 5] = 7.0, 0.1
    assert show_pair(expected, got)[1] == "element [3, 4] of the float32 tensor of shape (10, 10): 7.0"
    expected[0] = got[0] = -torch.inf  # an equal pair of infinities does not differ
    expected[1] = got[1] = torch.nan
    assert show_pair(expected, got)[1] == "element [3, 4] of the float32 tensor of shape (10, 10): 7.0"
    assert show(expected) == "float32 tensor of shape (10, 10)"


@pytest.mark.parametrize(
    ("got", "says"),
    [
        ([1.0, 2.0, 3.0], "lacks 2 of 2 infinities"),
        ([1.0, 2.0, -torch.inf], "lacks 1 of 2 infinities"),
        ([1.0, torch.inf, -torch.inf], "lacks 1 of 2 infinities"),
        ([-torch.inf, -torch.inf, -torch.inf], "is infinite in 1 of 3 elements that should be numbers: does the mask"),
        ([torch.nan, -torch.inf, -torch.inf], "is NaN in 1 of 3 elements: look for 0/0"),
    ],
)
def test_an_infinity_is_never_close_to_a_number(got, says):
    expected, got = (Run(value=torch.tensor(values)) for values in ([1.0, -torch.inf, -torch.inf], got))
    assert says in compare(expected, got, rtol=1e-4, atol=1e-5).says


def test_close_numbers_are_shown_with_enough_digits():
    assert show_pair(1.0, 1.00004) == ("1.0", "1.00004")
    assert show_pair(1.0, 1.5) == ("1.0", "1.5")


def test_weights_are_loaded_or_refused_with_a_sentence():
    layer, weights = nn.Linear(2, 3, bias=False), {"weight": torch.ones(3, 2)}
    load_weights(layer, weights)
    assert torch.equal(layer.weight, torch.ones(3, 2))
    with pytest.raises(Refused, match="should be `weight`; your class has `weight`, `bias`"):
        load_weights(nn.Linear(2, 3), weights)
    with pytest.raises(Refused, match=r"`weight` has shape \(2, 3\) where \(3, 2\)"):
        load_weights(nn.Linear(3, 2, bias=False), weights)


def test_a_refusal_is_shown_as_it_was_written():
    def run(solution, case):
        raise Refused("Name the three matrices.")

    outcome = answer(RIGHT, run=lambda s, c: run(s, c) if s is not example_chapter.combine else 1, mistakes=())
    assert (outcome.status, outcome.says) == ("wrong", "Name the three matrices.")


def test_two_refusals_are_one_mistake_only_if_they_say_the_same():
    layers = {"no bias": nn.Linear(2, 2, bias=False), "wide": nn.Linear(2, 3)}

    def run(solution, case):
        made = solution()
        load_weights(made, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
        return made(torch.ones(2)).detach()

    bank = tuple(Mistake(name=name, wrong=lambda layer=layer: layer, says="") for name, layer in layers.items())
    spec = {"reference": lambda: nn.Linear(2, 2), "run": run, "mistakes": bank, "cases": lambda: [Case(name="x")]}
    assert answer("def make(): return nn.Linear(2, 2)", **spec).status == "passed"
    assert answer("def make(): return nn.Linear(2, 2, bias=False)", **spec).mistake == "no bias"
    assert answer("def make(): return nn.Linear(2, 3)", **spec).mistake == "wide"
    assert answer("def make(): return nn.Linear(3, 2)", **spec).mistake is None


# --- what a learner sees ------------------------------------------------------------------------------------------


def test_the_text_of_an_outcome():
    assert str(answer(combine("print('so far', 1)\nreturn rows[:, 0]"))) == (
        "Exercise 98.1 · Weighted combine: not right yet\n"
        "Only the first expert\n"
        "The other experts are dropped.\n"
        "The smallest case that shows it (one token):\n"
        "    rows = tensor([[[1.0, 2.0], [3.0, 4.0]]])\n"
        "    weights = tensor([[0.5, 0.25]])\n"
        "expected:\n"
        "    tensor([[1.667, 2.667]])\n"
        "got:\n"
        "    tensor([[1.0, 2.0]])\n"
        "your code printed:\n"
        "    so far 1\n"
        "    so far 1\n"
        "    so far 1\n"
        "The notebook goes on with the reference; come back when you like."
    )


def test_the_html_of_an_outcome_has_icon_and_word_and_escapes():
    bundle = answer(combine("print('<script>')\nreturn rows[:, 0]"))._repr_mimebundle_()
    html = bundle["text/html"]
    assert "✘" in html
    assert "<strong>not right yet</strong>" in html
    assert "&lt;script&gt;" in html
    assert "<script>" not in html
    assert bundle["text/plain"].startswith("Exercise 98.1")


def test_every_status_has_its_own_icon_and_word():
    codes = [RIGHT, combine(STUB), combine("return rows"), combine("1/0")]
    badges = {answer(code)._repr_mimebundle_()["text/html"].split(" · ")[0].split("<div>")[1] for code in codes}
    assert len(badges) == 4


def test_no_path_is_shown():
    texts = [str(answer(combine(body))) for body in ("1/0", "import warnings\nwarnings.warn('careful')\nreturn rows")]
    assert "UserWarning: careful" in texts[1]
    assert not any(str(Path(__file__).parent) in text or "<cell>" in text for text in texts)


def test_prints_are_shown_when_the_answer_is_right_too():
    assert answer(RIGHT.replace("return", "print('hello')\n    return")).printed == "hello\n" * 3


def test_long_prints_are_cut():
    printed = answer(combine("print('x' * 5000)\nreturn rows")).printed
    assert printed == "x" * 2000 + "…"


def test_an_outcome_prints_on_a_console_that_cannot_say_it(monkeypatch, capsys):
    import io

    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    cell("@exercise('98.1')\n" + RIGHT)
    stream.flush()
    assert stream.buffer.getvalue().startswith(b"Exercise 98.1 ? Weighted combine: passed")


# --- Triton kernels -----------------------------------------------------------------------------------------------

TRITON = """
import sys, torch, triton, triton.language as tl
from dataclasses import replace
from moe_lab.course.bank import Case, Exercise, Mistake
from moe_lab.course.exercises import check

@triton.jit
def double(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, 2 * tl.load(x + i))

@triton.jit
def squared(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i) * tl.load(x + i))

def run(kernel, case):
    x = case.args[0]
    y = torch.zeros_like(x)
    kernel[(1,)](x, y, len(x))
    return y

spec = Exercise(id="98.9", title="t", reference=double, run=run, seconds=2.0,
                cases=lambda: [Case(name="four", args=(torch.arange(4.0),))],
                mistakes=(Mistake(name="squared", wrong=squared, says=""),))

@triton.jit
def right(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    a = tl.load(x + i)
    tl.store(y + i, a + a)

@triton.jit
def stub(x, y, n: tl.constexpr):
    raise NotImplementedError("your turn")

@triton.jit
def wrong(x, y, n: tl.constexpr):
    for i in range(n):
        a = tl.load(x + i)
        tl.store(y + i, a * a)

@triton.jit
def endless(x, y, n: tl.constexpr):
    i = 0
    while i < 1:
        a = tl.load(x)

for kernel in (right, stub, wrong, endless, print, lambda x, y, n: None):
    outcome = check(spec, kernel, globals())
    print(outcome.status, "|", outcome.mistake, "|", outcome.headline)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no triton for this system")
def test_triton_kernels_are_checked(tmp_path):
    """In a process of its own: the interpreter must be chosen before the first kernel."""
    script = tmp_path / "kernels.py"
    script.write_text(TRITON, encoding="utf-8")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.splitlines() == [
        "passed | None | ",
        "not started | None | ",
        "wrong | squared | Squared",
        "failed | None | It does not come to an end",
        "wrong | None | A Triton kernel is asked for",
        "wrong | None | A Triton kernel is asked for",
    ], done.stderr
