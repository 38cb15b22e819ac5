"""Copies and sums of rows against a loop, and against autograd in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from moe_lab.parallel import by_expert
from moe_lab.parallel.rows import RowMap, copy_rows, inverse, reorder, sum_rows

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def maps(draw: st.DrawFn) -> tuple[Tensor, int]:
    """The tokens of some rows; some tokens have none, and there may be no rows, or no tokens."""
    n_tokens = draw(st.integers(0, 6))
    rows = st.lists(st.integers(0, max(n_tokens - 1, 0)), max_size=9 if n_tokens else 0)
    return torch.tensor(draw(rows), dtype=torch.int64), n_tokens


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def sums_by_loop(values: Tensor, row_tokens: Tensor, n_tokens: int, weights: Tensor | None = None) -> Tensor:
    """Row after row; the weights lie in the order of the rows of each token, token by token."""
    sums = [values.new_zeros(values.shape[1])] * n_tokens
    order = sorted(range(len(row_tokens)), key=lambda row: int(row_tokens[row]))
    for place, row in enumerate(order):
        token = int(row_tokens[row])
        sums[token] = sums[token] + values[row] * (1 if weights is None else weights[place])
    return torch.stack(sums) if sums else values.new_zeros(0, values.shape[1])


def test_a_map_by_hand():
    rows = RowMap.of(torch.tensor([2, 0, 2, 3]), n_tokens=5)
    assert rows.token_rows.tolist() == [1, 0, 2, 3]
    assert rows.begins.tolist() == [0, 1, 1, 3, 4]
    tokens = torch.arange(5.0)[:, None]
    assert copy_rows(tokens, rows).flatten().tolist() == [2, 0, 2, 3]
    values = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    assert sum_rows(values, rows).flatten().tolist() == [10, 0, 101, 1000, 0]
    weights = torch.tensor([2.0, 3.0, 5.0, 7.0])  # of rows 1, 0, 2, 3
    assert sum_rows(values, rows, weights).flatten().tolist() == [20, 0, 3 + 500, 7000, 0]


@PROPERTY
@given(maps())
def test_copies_and_sums_and_their_gradients_are_those_of_a_loop(drawn_map):
    row_tokens, n_tokens = drawn_map
    rows = RowMap.of(row_tokens, n_tokens)
    tokens, values, weights = drawn(n_tokens, 3), drawn(len(row_tokens), 3), drawn(len(row_tokens))
    pairs = [
        (copy_rows(tokens, rows), tokens[row_tokens]),
        (sum_rows(values, rows), sums_by_loop(values, row_tokens, n_tokens)),
        (sum_rows(values, rows, weights), sums_by_loop(values, row_tokens, n_tokens, weights)),
    ]
    for got, expected in pairs:
        assert_close(got, expected)
        upstream = drawn(*got.shape).detach()
        inputs = [tokens, values, weights]
        ours, theirs = (
            torch.autograd.grad((y * upstream).sum(), inputs, allow_unused=True, materialize_grads=True)
            if y.requires_grad
            else [torch.zeros_like(one) for one in inputs]
            for y in (got, expected)
        )
        assert_close(list(ours), list(theirs))


def test_rows_of_a_token_can_be_taken_in_another_order():
    row_tokens, token_rows = torch.tensor([1, 0, 1]), torch.tensor([1, 2, 0])  # token 1: row 2 before row 0
    rows = RowMap.of(row_tokens, 2, token_rows)
    values, weights = torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([2.0, 3.0, 5.0], requires_grad=True)
    y = sum_rows(values, rows, weights)
    assert y.flatten().tolist() == [20, 305]
    y.sum().backward()
    assert weights.grad.tolist() == [10, 100, 1]


@pytest.mark.parametrize("n_rows", [0, 1, 7])
def test_an_order_and_its_inverse(n_rows):
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(1))
    values, upstream = drawn(n_rows, 2), drawn(n_rows, 2).detach()
    assert torch.equal(inverse(order)[order], torch.arange(n_rows))
    there = reorder(values, order)
    assert torch.equal(there, values[order])
    assert torch.equal(reorder(there, inverse(order)), values)
    (gradient,) = torch.autograd.grad(there, values, upstream)
    assert torch.equal(gradient[order], upstream)


def test_a_sum_keeps_the_dtype_of_its_values():
    rows = RowMap.of(torch.tensor([0, 0]), 1)
    values, weights = torch.ones(2, 4, dtype=torch.bfloat16), torch.full((2,), 0.5, requires_grad=True)
    y = sum_rows(values, rows, weights)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert weights.grad.dtype == torch.float32


@PROPERTY
@given(st.integers(1, 4), st.integers(0, 4), st.data())
def test_arrived_rows_are_sorted_by_expert_and_then_by_rank(size, n_experts, data):
    counts = [[data.draw(st.integers(0, 3)) for _ in range(n_experts)] for _ in range(size)]
    received = torch.tensor(counts, dtype=torch.int64).view(size, n_experts)
    came = [
        (expert, rank, i) for rank in range(size) for expert in range(n_experts) for i in range(counts[rank][expert])
    ]
    order, offsets = by_expert(received)
    assert [came[row] for row in order.tolist()] == sorted(came)
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [sum(expert <= e for expert, _, _ in came) for e in range(n_experts)]
