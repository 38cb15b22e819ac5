import dataclasses

import pytest
import torch

from moe_lab.records import DispatchPlan, ExpertChoice, Routing

SCORES = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.75, 0.25, 0.0], [0.5, 0.5, 0.0, 0.0]])
ROUTING = Routing(
    router_logits=SCORES,
    router_scores=SCORES,
    topk_weights=torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]]),
    topk_experts=torch.tensor([[0, 2], [1, 2], [0, 1]]),
)
PLAN = DispatchPlan(
    row_choices=torch.tensor([0, 4, 6, 2, 5, 6]),
    choice_rows=torch.tensor([[0, 6], [3, 6], [1, 4]]),
    offsets=torch.tensor([2, 4, 6], dtype=torch.int32),
    capacity=2,
)
CHOICE = ExpertChoice(router_scores=SCORES, weights=SCORES.T[:, :1], tokens=torch.zeros(4, 1, dtype=torch.int64))


def test_what_a_routing_counts():
    assert ROUTING.n_experts == 4
    assert ROUTING.tokens_per_expert.tolist() == [2, 2, 2, 0]
    assert ROUTING.tokens_per_expert.dtype == torch.int64


def test_dense_weights_are_zero_where_nothing_was_chosen():
    expected = [[0.75, 0.0, 0.25, 0.0], [0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]
    assert ROUTING.dense_weights.tolist() == expected


def test_dense_weights_carry_the_gradient():
    weights = ROUTING.topk_weights.clone().requires_grad_()
    routing = dataclasses.replace(ROUTING, topk_weights=weights)
    (routing.dense_weights * torch.arange(4.0)).sum().backward()
    assert weights.grad.tolist() == [[0.0, 2.0], [1.0, 2.0], [0.0, 1.0]]


def test_what_a_plan_tells():
    assert PLAN.n_rows == 6
    assert PLAN.row_tokens.tolist() == [0, 2, 3, 1, 2, 3]  # 3 is no token: these rows are empty
    assert PLAN.dropped.tolist() == [[False, True], [False, True], [False, False]]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (ROUTING, "Routing(router_logits (3, 4), topk_experts (3, 2))"),
        (PLAN, "DispatchPlan(row_choices (6,), choice_rows (3, 2), offsets (3,), capacity 2)"),
        (CHOICE, "ExpertChoice(router_scores (3, 4), tokens (4, 1))"),
    ],
    ids=["Routing", "DispatchPlan", "ExpertChoice"],
)
def test_a_record_tells_its_sizes_is_frozen_and_is_itself_alone(record, text):
    assert repr(record) == text
    field = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, field, None)
    twin = dataclasses.replace(record)
    assert record == record
    assert record != twin  # tensors have no one answer to "equal"
    assert len({record, twin}) == 2


def test_what_experts_that_chose_tell():
    # expert 0 took tokens 2 and 0, expert 1 tokens 0 and 1: token 0 has two experts, nobody has a third
    choice = ExpertChoice(
        router_scores=torch.rand(4, 2), weights=torch.rand(2, 2), tokens=torch.tensor([[2, 0], [0, 1]])
    )
    assert choice.n_experts == 2
    assert choice.tokens_per_expert.tolist() == [2, 2]
    assert choice.tokens_per_expert.dtype == ROUTING.tokens_per_expert.dtype
    assert choice.mask.tolist() == [[True, True], [False, True], [True, False], [False, False]]
    assert torch.equal(choice.mask.sum(0), choice.tokens_per_expert)


@pytest.mark.parametrize(("n_tokens", "capacity"), [(4, 0), (0, 0), (3, 3)])
def test_experts_that_chose_nobody_and_everybody(n_tokens, capacity):
    tokens = torch.arange(capacity).expand(2, capacity)
    choice = ExpertChoice(torch.rand(n_tokens, 2), torch.rand(2, capacity), tokens)
    assert choice.tokens_per_expert.tolist() == [capacity, capacity]
    assert choice.mask.shape == (n_tokens, 2)
    assert choice.mask.sum() == 2 * capacity
