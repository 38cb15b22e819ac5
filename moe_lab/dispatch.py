"""Sends each token's copies to the rows of its experts, and brings the results back.

plan: which row each choice travels in → permute: copy tokens into rows → (experts) → combine: sum rows into tokens.
Neither direction adds into shared places, so that the same input gives the same bits every time; and the backward of
each is the other: `permute` backward is a sum over a token's rows, `combine` backward copies tokens into rows.
"""

from dataclasses import replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_lab.config import DROP_RULES
from moe_lab.records import DispatchPlan, Routing


def expert_capacity(n_tokens: int, top_k: int, n_experts: int, capacity_factor: float) -> int:
    """How many choices an expert takes: an even share of T·K times the factor, rounded up.

    Source: Fedus et al. 2021 (Switch), equation 3, for k = 1; Lepikhin et al. 2020 (GShard) for k = 2.
    """
    exact = Fraction(str(capacity_factor))  # in floats 100 · 1.1 / 10 is a little over 11, and rounds up to 12
    return -(-n_tokens * top_k * exact.numerator // (n_experts * exact.denominator))


def expert_offsets(sorted_experts: Tensor, n_experts: int) -> Tensor:
    """(E,) int32, where each expert's stretch of a sorted list of expert ids (R,) ends. Needs no host sync."""
    ids = torch.arange(n_experts, device=sorted_experts.device).to(sorted_experts.dtype)
    return torch.searchsorted(sorted_experts, ids, right=True, out_int32=True)


def make_plan(routing: Routing, capacity: int | None = None, drop: str = "position") -> DispatchPlan:
    """Rows for all choices, sorted by expert; needs no host sync on a GPU.

    Without a capacity, an expert's rows are in the order of its tokens. With one, an expert keeps its first `capacity`
    choices: by "position", every token's first choice before any second choice and early tokens before late ones
    (GShard, algorithm 1); by "score", large weights before small ones, of equals the earlier choice.

    Raises:
        ValueError: a negative capacity, or an unknown rule.
    """
    if drop not in DROP_RULES:
        raise ValueError(f"drop={drop!r}: expected one of {', '.join(DROP_RULES)}.")
    experts = routing.topk_experts
    n_tokens, top_k = experts.shape
    n_choices, n_experts = n_tokens * top_k, routing.n_experts
    if capacity is None:
        return sort_choices(experts, n_experts)

    if capacity < 0:
        raise ValueError(f"capacity={capacity}: expected 0 or more.")
    queue = _priority(routing, drop)  # choices, those that go first first
    chosen, order = experts.flatten()[queue].sort(stable=True)
    sorted_choices = queue[order]
    begins = F.pad(expert_offsets(chosen, n_experts)[:-1], (1, 0))
    place = _count_up(chosen) - begins[chosen]  # within the expert's queue
    n_rows = n_experts * capacity
    rows = torch.where(place < capacity, chosen * capacity + place, n_rows)
    choice_rows = torch.empty_like(rows).scatter_(0, sorted_choices, rows)
    row_choices = rows.new_full((n_rows + 1,), n_choices).scatter_(0, rows, sorted_choices)[:n_rows]
    offsets = capacity * torch.arange(1, n_experts + 1, dtype=torch.int32, device=rows.device)
    return DispatchPlan(row_choices, choice_rows.view(n_tokens, top_k), offsets, capacity)


def sort_choices(topk_experts: Tensor, n_experts: int) -> DispatchPlan:
    """Rows for all choices (T, K), sorted by expert; an expert's are in the order of its tokens."""
    ids = topk_experts.flatten()
    if n_experts <= 256:
        ids = ids.to(torch.uint8)  # a radix sort takes its time by the bits of its keys
    chosen, row_choices = ids.sort(stable=True)
    choice_rows = torch.empty_like(row_choices).scatter_(0, row_choices, _count_up(row_choices))
    return DispatchPlan(row_choices, choice_rows.view(topk_experts.shape), expert_offsets(chosen, n_experts))


def _count_up(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)


def _priority(routing: Routing, drop: str) -> Tensor:
    """(T·K,) all choices, those that are kept first first."""
    n_tokens, top_k = routing.topk_experts.shape
    if drop == "position":
        ids = torch.arange(n_tokens * top_k, device=routing.topk_experts.device)
        return ids.view(n_tokens, top_k).T.flatten()
    return routing.topk_weights.detach().flatten().argsort(descending=True, stable=True)


def permute(tokens: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy each token into the rows of its choices, (T, D) to (R, D); empty rows are zero."""
    return _Permute.apply(tokens, plan)


def combine(rows: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    """Sum each token's rows times their weights, (R, D) and (T, K) to (T, D); a dropped choice adds nothing."""
    return _Combine.apply(rows, plan, weights.to(rows.dtype))


def weights_of_rows(weights: Tensor, plan: DispatchPlan) -> Tensor:
    """The weight of the choice that each row carries, (T, K) to (R, 1); 0 in an empty row."""
    one_row_each = replace(plan, choice_rows=plan.choice_rows.view(-1, 1))  # T·K tokens with a choice each
    return permute(weights.reshape(-1, 1), one_row_each)


def _copy_into_rows(tokens: Tensor, plan: DispatchPlan) -> Tensor:
    if plan.capacity is not None:
        tokens = F.pad(tokens, (0, 0, 0, 1))  # a last token of zeros, which the empty rows copy
    return tokens.index_select(0, plan.row_tokens)


def _sum_of_rows(rows: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Tensor:
    """(R, D) to (T, D): every token gathers its own rows, so nobody writes where another does."""
    if plan.capacity is not None:
        rows = F.pad(rows, (0, 0, 0, 1))  # a last row of zeros, which the dropped choices read
    if len(plan.choice_rows) == 0:
        return rows.new_zeros(0, rows.shape[1])
    # an embedding bag is a gather and a weighted sum in one, without the (T, K, D) in between
    return F.embedding_bag(plan.choice_rows, rows, mode="sum", per_sample_weights=weights)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return _copy_into_rows(tokens, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows: Tensor) -> tuple[Tensor, None]:
        return _sum_of_rows(d_rows, ctx.plan), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(rows, weights)
        return _sum_of_rows(rows, plan, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, Tensor]:
        rows, weights = ctx.saved_tensors
        plan = ctx.plan
        d_rows = _copy_into_rows(dy, plan)  # without the weight as yet
        d_weights = torch.linalg.vecdot(d_rows, rows)  # (R,)
        row_weights = weights.flatten()
        if plan.capacity is not None:
            d_weights, row_weights = F.pad(d_weights, (0, 1)), F.pad(row_weights, (0, 1))
        d_weights = d_weights.index_select(0, plan.choice_rows.flatten()).view_as(weights)
        return d_rows.mul_(row_weights.index_select(0, plan.row_choices)[:, None]), None, d_weights
