"""A chapter for the tests of the mechanism: a function, a class, whole numbers, a Triton kernel."""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from moe_lab.course.bank import Case, Exercise, Mistake

MINIMUM = 1


# 98.1: a function on tensors


def combine(rows, weights):
    """Weighted mean of rows (T, K, D) with weights (T, K), renormalised: (T, D)."""
    weights = weights / weights.sum(-1, keepdim=True)
    return (rows * weights[..., None]).sum(1)


def unnormalised(rows, weights):
    return (rows * weights[..., None]).sum(1)


def unweighted(rows, weights):
    return rows.mean(1)


def first_only(rows, weights):
    return rows[:, 0]


def kept_k(rows, weights):
    return rows * (weights / weights.sum(-1, keepdim=True))[..., None]


def column(rows, weights):
    if len(rows) < rows.shape[1]:
        raise IndexError("a mistake may raise on some inputs")
    return (rows * (weights / weights.sum(0))[..., None]).sum(1)


def combine_cases():
    torch.manual_seed(3)
    return [
        Case(name="one token", args=(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[0.5, 0.25]]))),
        Case(name="three tokens", args=(torch.randn(3, 2, 5, requires_grad=True), torch.rand(3, 2))),
        Case(name="many tokens", args=(torch.randn(40, 4, 8), torch.rand(40, 4))),
    ]


# 98.2: a class


class Gate(nn.Module):
    """silu(x W) * (x V)"""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.w = nn.Linear(d_in, d_out, bias=False)
        self.v = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x):
        return F.silu(self.w(x)) * self.v(x)


class Swapped(Gate):
    def forward(self, x):
        return self.w(x) * F.silu(self.v(x))


class Ungated(Gate):
    def forward(self, x):
        return F.silu(self.w(x))


def run_gate(solution, case):
    x, d_out = case.args
    gate = solution(x.shape[-1], d_out)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, weight in sorted(gate.named_parameters()):
            weight.copy_(torch.randn(weight.shape))
    y = gate(x)
    y.square().sum().backward()
    return {"output": y, "gradient of w": gate.w.weight.grad}


def gate_cases():
    torch.manual_seed(5)
    return [Case(name=f"{t} tokens", args=(torch.randn(t, 3), 2)) for t in (1, 7)]


# 98.3: whole numbers, recursive


def depth(tree):
    """Depth of nested lists."""
    return 1 + max(map(depth, tree), default=0) if isinstance(tree, list) else 0


def off_by_one(tree):
    return max(map(off_by_one, tree), default=0) if isinstance(tree, list) else 0


def raising(tree):
    return 1 + max(map(raising, tree)) if isinstance(tree, list) else 0  # an empty list has no maximum


EXERCISES = (
    Exercise(
        id="98.1",
        title="Weighted combine",
        reference=combine,
        cases=combine_cases,
        mistakes=(
            Mistake(name="weights not renormalised", wrong=unnormalised, says="The weights do not sum to one."),
            Mistake(name="weights not used", wrong=unweighted, says="Every expert counts the same here."),
            Mistake(name="only the first expert", wrong=first_only, says="The other experts are dropped."),
            Mistake(name="not summed over experts", wrong=kept_k, says="The K dimension is still there."),
            Mistake(name="normalised over tokens", wrong=column, says="The sum runs over tokens."),
        ),
    ),
    Exercise(
        id="98.2",
        title="A gate",
        reference=Gate,
        cases=gate_cases,
        run=run_gate,
        mistakes=(
            Mistake(name="the other branch is gated", wrong=Swapped, says="SiLU belongs on w."),
            Mistake(name="no gate", wrong=Ungated, says="The product with v is missing."),
        ),
    ),
    Exercise(
        id="98.3",
        title="Depth",
        reference=depth,
        cases=lambda: [Case(name=str(tree), args=(tree,)) for tree in (7, [], [1], [[], [2, [3]]])],
        mistakes=(
            Mistake(name="off by one", wrong=off_by_one, says="The outermost list counts too."),
            Mistake(name="the empty list", wrong=raising, says="An empty list has no deepest part."),
        ),
    ),
)


def install() -> None:
    """Makes this module chapter 98, in this process."""
    sys.modules["moe_lab.course.chapters.ch98"] = sys.modules[__name__]
