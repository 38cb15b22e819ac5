import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from moe_lab.dispatch import (
    combine,
    expert_capacity,
    expert_offsets,
    make_plan,
    permute,
    weights_of_rows,
)
from moe_lab.records import DispatchPlan, Routing

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
CAPACITIES = [None, 0, 1, 2, 5]


def routing_of(experts: list[list[int]], n_experts: int, weights: torch.Tensor | None = None) -> Routing:
    chosen = torch.tensor(experts, dtype=torch.int64).view(len(experts), -1 if experts else 2)
    scores = torch.zeros(len(experts), n_experts)
    weights = torch.full(chosen.shape, 1 / chosen.shape[1]) if weights is None else weights
    return Routing(router_logits=scores, router_scores=scores, topk_weights=weights, topk_experts=chosen)


@st.composite
def routings(draw):
    """Up to 8 tokens with up to 3 of up to 5 experts; weights that often tie, some of them 0 or negative."""
    n_experts = draw(st.integers(1, 5))
    k, n_tokens = draw(st.integers(1, min(3, n_experts))), draw(st.integers(1, 8))
    experts = [draw(st.permutations(range(n_experts)))[:k] for _ in range(n_tokens)]
    quarters = draw(st.lists(st.integers(-1, 4), min_size=n_tokens * k, max_size=n_tokens * k))
    return routing_of(experts, n_experts, torch.tensor(quarters).view(n_tokens, k) / 4)


def random_routing(n_tokens: int, n_experts: int, k: int) -> Routing:
    torch.manual_seed(0)
    scores = torch.rand(n_tokens, n_experts)
    top = scores.topk(k)
    return Routing(
        router_logits=scores, router_scores=scores, topk_weights=top.values.softmax(-1), topk_experts=top.indices
    )


# --- the plan ---


def test_a_plan_by_hand():
    plan = make_plan(routing_of([[1, 0], [1, 2], [2, 1]], 4))
    assert plan.row_choices.tolist() == [1, 0, 2, 5, 3, 4]  # expert 0: token 0; 1: tokens 0, 1, 2; 2: tokens 1, 2
    assert plan.row_tokens.tolist() == [0, 0, 1, 2, 1, 2]
    assert plan.choice_rows.tolist() == [[1, 0], [2, 4], [5, 3]]
    assert plan.offsets.tolist() == [1, 4, 6, 6]
    assert plan.offsets.dtype == torch.int32
    assert (plan.n_rows, plan.capacity, plan.dropped.any().item()) == (6, None, False)
    assert repr(plan) == "DispatchPlan(row_choices (6,), choice_rows (3, 2), offsets (4,), capacity None)"


def test_a_plan_with_a_capacity_by_hand():
    routing = routing_of([[1, 0], [1, 2], [2, 1]], 4, torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.3, 0.7]]))
    plan = make_plan(routing, 1)  # expert 1 has token 0's first choice, 1's first and 2's second; expert 2 two firsts
    assert plan.row_choices.tolist() == [1, 0, 4, 6]  # expert 2: token 2's first goes before token 1's second
    assert plan.row_tokens.tolist() == [0, 0, 2, 3]
    assert plan.dropped.tolist() == [[False, False], [True, True], [False, True]]
    assert plan.choice_rows.tolist() == [[1, 0], [4, 4], [2, 4]]
    assert plan.offsets.tolist() == [1, 2, 3, 4]
    plan = make_plan(routing, 1, "score")
    assert plan.row_choices.tolist() == [1, 5, 3, 6]  # expert 1: 0.5, 0.6, 0.7; expert 2: 0.4 and 0.3


@PROPERTY
@given(routings())
@example(routing_of([[255, 0], [127, 128], [128, 255]], 256))  # as many as keys of 8 bit can tell apart
@example(routing_of([[256, 0], [255, 256], [1, 300]], 301))
def test_every_choice_has_a_row_sorted_by_expert_then_token(routing):
    plan = make_plan(routing)
    n_choices = routing.topk_experts.numel()
    experts = routing.topk_experts.flatten()
    by_python = sorted(range(n_choices), key=lambda choice: (experts[choice].item(), choice))
    assert plan.row_choices.tolist() == by_python
    assert plan.choice_rows.flatten()[plan.row_choices].tolist() == list(range(n_choices))
    assert plan.offsets.tolist() == routing.tokens_per_expert.cumsum(0).tolist()
    assert plan.offsets[-1] == n_choices == plan.n_rows == routing.tokens_per_expert.sum()
    assert not plan.dropped.any()


def queues_in_python(routing: Routing, capacity: int, drop: str) -> list[list[int]]:
    """The choices that each expert keeps, in order."""
    n_tokens, k = routing.topk_experts.shape
    if drop == "position":
        waiting = [token * k + slot for slot in range(k) for token in range(n_tokens)]
    else:
        weights = routing.topk_weights.flatten().tolist()
        waiting = sorted(range(n_tokens * k), key=lambda choice: (-weights[choice], choice))
    queues: list[list[int]] = [[] for _ in range(routing.n_experts)]
    for choice in waiting:
        queue = queues[routing.topk_experts[choice // k, choice % k]]
        if len(queue) < capacity:
            queue.append(choice)
    return queues


@pytest.mark.parametrize("drop", ["position", "score"])
@PROPERTY
@given(routings(), st.integers(0, 9))
def test_capacity_keeps_whom_a_queue_in_python_keeps(drop, routing, capacity):
    plan = make_plan(routing, capacity, drop)
    queues = queues_in_python(routing, capacity, drop)
    n_choices, n_rows = routing.topk_experts.numel(), routing.n_experts * capacity
    rows = [choice for queue in queues for choice in queue + [n_choices] * (capacity - len(queue))]
    assert plan.row_choices.tolist() == rows
    where = [rows.index(choice) if choice in rows else n_rows for choice in range(n_choices)]
    assert plan.choice_rows.flatten().tolist() == where
    assert plan.dropped.flatten().tolist() == [row == n_rows for row in where]
    assert plan.offsets.tolist() == [capacity * (e + 1) for e in range(routing.n_experts)]
    assert (plan.n_rows, plan.capacity, plan.offsets.dtype) == (n_rows, capacity, torch.int32)


@pytest.mark.parametrize("drop", ["position", "score"])
def test_a_capacity_that_all_fit_in_drops_nothing(drop):
    routing = random_routing(9, 4, 2)
    plan = make_plan(routing, 9, drop)
    assert not plan.dropped.any()
    assert sorted(plan.row_choices.tolist())[:18] == list(range(18))


def test_offsets_by_hand():
    assert expert_offsets(torch.tensor([1, 1, 3]), 5).tolist() == [0, 2, 2, 3, 3]
    assert expert_offsets(torch.tensor([0, 0]), 1).tolist() == [2]
    assert expert_offsets(torch.tensor([], dtype=torch.int64), 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("capacity", [-1, -7])
def test_a_negative_capacity_is_refused(capacity):
    with pytest.raises(ValueError, match=f"capacity={capacity}: expected 0 or more"):
        make_plan(routing_of([[0]], 1), capacity)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"drop='age': expected one of position, score"):
        make_plan(routing_of([[0]], 1), 1, "age")


# --- capacity ---


@pytest.mark.parametrize(
    ("n_tokens", "k", "n_experts", "factor", "capacity"),
    [
        (8, 1, 4, 1.0, 2),
        (8, 1, 4, 1.25, 3),  # 2.5, rounded up
        (8, 2, 4, 1.0, 4),
        (7, 2, 3, 1.0, 5),  # 4.67
        (1, 1, 8, 1.0, 1),
        (0, 2, 8, 1.25, 0),
        (100, 1, 10, 0.5, 5),
        (1024, 1, 64, 1.25, 20),  # Fedus et al. 2021, equation 3
        (100, 1, 10, 1.1, 11),  # the float 1.1 lies above 11/10: ceil must not make 12 of it
        (100, 1, 2, 1.1, 55),
    ],
)
def test_capacities_by_hand(n_tokens, k, n_experts, factor, capacity):
    assert expert_capacity(n_tokens, k, n_experts, factor) == capacity


@PROPERTY
@given(st.integers(0, 5000), st.integers(1, 8), st.integers(1, 256), st.integers(1, 400))
@example(180, 1, 2, 110)
def test_capacity_is_the_even_share_times_the_factor_rounded_up(n_tokens, k, n_experts, hundredths):
    exact = Fraction(n_tokens * k, n_experts) * Fraction(hundredths, 100)
    assert expert_capacity(n_tokens, k, n_experts, hundredths / 100) == math.ceil(exact)


# --- permute and combine ---


def slow_combine(rows: torch.Tensor, plan: DispatchPlan, weights: torch.Tensor) -> torch.Tensor:
    """The definition, in operations that autograd differentiates."""
    kept = ~plan.dropped
    gathered = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[plan.choice_rows]  # (T, K, D)
    return (gathered * (weights * kept)[..., None]).sum(1)


def slow_permute(tokens: torch.Tensor, plan: DispatchPlan) -> torch.Tensor:
    return torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])[plan.row_tokens]


@PROPERTY
@given(routings(), st.integers(1, 4))
def test_permute_then_combine_is_the_identity(routing, width):
    k = routing.topk_experts.shape[1]
    tokens = torch.arange(len(routing.topk_experts) * width).view(-1, width) / 8
    weights = torch.full(routing.topk_experts.shape, 1 / k).cumsum(-1)
    weights = weights / weights.sum(-1, keepdim=True)
    for plan in (make_plan(routing), make_plan(routing, len(tokens)), make_plan(routing, len(tokens), "score")):
        assert_close(combine(permute(tokens, plan), plan, weights), tokens, rtol=1e-5, atol=1e-6)


@PROPERTY
@given(routings(), st.sampled_from(CAPACITIES), st.sampled_from(["position", "score"]))
def test_rows_are_copies_of_their_tokens_and_empty_rows_are_zero(routing, capacity, drop):
    plan = make_plan(routing, capacity, drop)
    tokens = 1 + torch.arange(len(routing.topk_experts) * 3.0).view(-1, 3)
    rows = permute(tokens, plan)
    assert torch.equal(rows, slow_permute(tokens, plan))
    assert torch.equal((rows == 0).all(-1), plan.row_choices == routing.topk_experts.numel())


@PROPERTY
@given(routings(), st.sampled_from(CAPACITIES), st.sampled_from(["position", "score"]))
def test_both_agree_with_the_definition_in_values_and_gradients(routing, capacity, drop):
    plan = make_plan(routing, capacity, drop)
    n_tokens, k = routing.topk_experts.shape
    tokens, rows, weights = torch.randn(n_tokens, 3), torch.randn(plan.n_rows, 3), torch.randn(n_tokens, k)
    results = []
    for to_rows, to_tokens in ((permute, combine), (slow_permute, slow_combine)):
        t, r, w = (x.clone().requires_grad_() for x in (tokens, rows, weights))
        copied, summed = to_rows(t, plan), to_tokens(r, plan, w)
        (copied * rows).sum().backward()
        (summed * tokens).sum().backward()
        results.append((copied, summed, t.grad, r.grad, w.grad))
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    assert not results[0][4][plan.dropped].any()


@pytest.mark.parametrize("drop", ["position", "score"])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_gradients_in_fp64(capacity, drop):
    plan = make_plan(random_routing(5, 4, 2), capacity, drop)
    tokens = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(plan.n_rows, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, plan), tokens)
    assert torch.autograd.gradcheck(lambda x: weights_of_rows(x, plan), weights)
    assert torch.autograd.gradcheck(lambda x, w: combine(x, plan, w), (rows, weights))


@pytest.mark.parametrize("capacity", [None, 2])
def test_the_backward_of_each_is_the_other(capacity):
    plan = make_plan(random_routing(7, 4, 2), capacity)
    tokens, rows, ones = torch.randn(7, 3), torch.randn(plan.n_rows, 3), torch.ones(7, 2)
    _, back = torch.autograd.functional.vjp(lambda x: permute(x, plan), tokens, rows)
    assert torch.equal(back, combine(rows, plan, ones))
    _, back = torch.autograd.functional.vjp(lambda x: combine(x, plan, ones), rows, tokens)
    assert torch.equal(back, permute(tokens, plan))


def test_a_second_derivative_is_refused_not_wrong():
    plan = make_plan(random_routing(5, 4, 2))
    rows = torch.randn(plan.n_rows, 3, requires_grad=True)
    gradient = torch.autograd.grad(combine(rows, plan, torch.ones(5, 2)).square().sum(), rows, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_gradients_that_are_one_number_expanded_are_taken():
    plan = make_plan(random_routing(5, 4, 2), 2)
    tokens, weights = torch.randn(5, 3, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    combine(permute(tokens, plan), plan, weights).sum().backward()
    kept = ~plan.dropped
    assert_close(tokens.grad, (weights * kept).sum(-1, keepdim=True).detach().expand(5, 3))
    assert_close(weights.grad, tokens.sum(-1, keepdim=True).detach() * kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("capacity", [None, 2])
def test_other_dtypes_stay_what_they_are(dtype, capacity):
    plan = make_plan(random_routing(6, 4, 3), capacity)
    tokens = torch.randn(6, 5).to(dtype).requires_grad_()
    weights = torch.rand(6, 3).requires_grad_()  # fp32, as the router's are
    y = combine(permute(tokens, plan), plan, weights)
    expected = slow_combine(slow_permute(tokens.double(), plan), plan, weights.to(dtype).double())
    y.square().sum().backward()
    assert (y.dtype, tokens.grad.dtype, weights.grad.dtype) == (dtype, dtype, torch.float32)
    tolerance = torch.finfo(dtype).eps * 4
    assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("capacity", [None, 2])
def test_the_weight_of_each_row(capacity):
    routing = random_routing(5, 3, 2)
    plan = make_plan(routing, capacity)
    by_hand = [[*routing.topk_weights.flatten().tolist(), 0.0][choice] for choice in plan.row_choices.tolist()]
    assert_close(weights_of_rows(routing.topk_weights, plan), torch.tensor(by_hand)[:, None])


def test_what_a_token_gets_depends_on_no_other_to_the_last_bit():
    routing = random_routing(40, 5, 3)
    plan, rows = make_plan(routing), torch.randn(120, 33)
    y = combine(rows, plan, routing.topk_weights)
    for token in (0, 17, 39):
        weights = routing.topk_weights[token, :, None]
        alone = make_plan(routing_of([routing.topk_experts[token].tolist()], 5))
        own_rows = torch.empty(3, 33).index_copy(0, alone.choice_rows[0], rows[plan.choice_rows[token]])
        assert torch.equal(y[token], combine(own_rows, alone, weights.T)[0])


def test_what_is_not_finite_stays_with_its_token():
    routing = random_routing(6, 4, 2)
    plan = make_plan(routing)
    tokens = torch.randn(6, 3)
    tokens[2] = float("nan")
    tokens[4] = float("inf")
    y = combine(permute(tokens, plan), plan, routing.topk_weights)
    assert y.isfinite().all(-1).tolist() == [True, True, False, True, False, True]


@pytest.mark.parametrize("drop", ["position", "score"])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_no_tokens(capacity, drop):
    plan = make_plan(routing_of([], 3), capacity, drop)
    tokens, weights = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 2, requires_grad=True)
    rows = permute(tokens, plan)
    y = combine(rows, plan, weights)
    y.sum().backward()
    assert rows.shape == (3 * (capacity or 0), 4)
    assert plan.offsets.tolist() == [(capacity or 0) * e for e in (1, 2, 3)]
    assert not rows.any()
    assert y.shape == tokens.grad.shape == (0, 4)
    assert weights.grad.shape == (0, 2)


# Nothing on the meta device can be read, so what works there never waits for a GPU.
@pytest.mark.parametrize("drop", ["position", "score"])
@pytest.mark.parametrize("capacity", CAPACITIES)
def test_nothing_here_needs_a_host_sync(capacity, drop):
    with torch.device("meta"):
        weights = torch.empty(7, 2, requires_grad=True)
        scores = torch.empty(7, 4)
        chosen = torch.empty(7, 2, dtype=torch.int64)
        tokens = torch.empty(7, 3, requires_grad=True)
    routing = Routing(router_logits=scores, router_scores=scores, topk_weights=weights, topk_experts=chosen)
    plan = make_plan(routing, capacity, drop)
    rows = permute(tokens, plan) * weights_of_rows(weights, plan)
    combine(rows, plan, weights).sum().backward()
    assert rows.shape == (14 if capacity is None else 4 * capacity, 3)
    assert (routing.tokens_per_expert.shape, routing.dense_weights.shape) == ((4,), (7, 4))
    assert (tokens.grad.shape, weights.grad.shape) == ((7, 3), (7, 2))
