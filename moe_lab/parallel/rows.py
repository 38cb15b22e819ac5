"""Copies of tokens as rows, and sums of rows as tokens, where tokens have different numbers of rows.

`moe_lab.dispatch` does the same for tokens that all have k rows. Nobody adds into shared places here either, and the
backward of each direction is the other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class RowMap:
    """Which token each of R rows copies.

    Args:
        row_tokens: (R,) the token that a row copies.
        token_rows: (R,) the rows token by token: first those of token 0, then those of token 1 …
        begins: (T,) where each token's stretch of `token_rows` begins.
    """

    row_tokens: Tensor
    token_rows: Tensor
    begins: Tensor

    @classmethod
    def of(cls, row_tokens: Tensor, n_tokens: int, token_rows: Tensor | None = None) -> "RowMap":
        """The map of rows that copy these tokens; of one token's rows the earlier comes first."""
        if token_rows is None:
            token_rows = row_tokens.argsort(stable=True)
        counts = row_tokens.new_zeros(n_tokens).scatter_add_(0, row_tokens, torch.ones_like(row_tokens))
        return cls(row_tokens, token_rows, counts.cumsum(0) - counts)


def copy_rows(tokens: Tensor, rows: RowMap) -> Tensor:
    """Copy each token into its rows, (T, D) to (R, D)."""
    return _Copy.apply(tokens, rows)


def sum_rows(values: Tensor, rows: RowMap, weights: Tensor | None = None) -> Tensor:
    """Sum each token's rows, (R, D) to (T, D), times `weights` (R,) in the order of `token_rows`."""
    if weights is None:
        return _Sum.apply(values, rows, None)
    return _Sum.apply(values, rows, weights.to(values.dtype))


def reorder(values: Tensor, order: Tensor) -> Tensor:
    """`values[order]`, for an order that names every row once."""
    return _Reorder.apply(values, order)


def inverse(order: Tensor) -> Tensor:
    """The order that undoes an order."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _sum_of_rows(values: Tensor, rows: RowMap, weights: Tensor | None = None) -> Tensor:
    if len(rows.row_tokens) == 0 or len(rows.begins) == 0:
        return values.new_zeros(len(rows.begins), values.shape[1])
    return F.embedding_bag(rows.token_rows, values, rows.begins, mode="sum", per_sample_weights=weights)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, rows: RowMap) -> Tensor:
        ctx.rows = rows
        return tokens.index_select(0, rows.row_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows: Tensor) -> tuple[Tensor, None]:
        return _sum_of_rows(d_rows, ctx.rows), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, rows: RowMap, weights: Tensor | None) -> Tensor:
        ctx.rows = rows
        if weights is not None:
            ctx.save_for_backward(values, weights)
        return _sum_of_rows(values, rows, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, Tensor | None]:
        rows: RowMap = ctx.rows
        saved = ctx.saved_tensors  # read once: a recomputed block gives them once
        d_values = dy.index_select(0, rows.row_tokens)  # without the weight as yet
        if not saved:
            return d_values, None, None
        values, weights = saved
        d_weights = torch.linalg.vecdot(d_values, values).index_select(0, rows.token_rows)
        by_row = torch.empty_like(weights).scatter_(0, rows.token_rows, weights)
        return d_values.mul_(by_row[:, None]), None, d_weights


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return values.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_values: Tensor) -> tuple[Tensor, None]:
        return d_values.index_select(0, inverse(ctx.order)), None
