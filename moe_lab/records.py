"""What happened in a layer of experts: who chose whom, and which row went where. Losses and metrics read these."""

from dataclasses import dataclass

import torch
from torch import Tensor


def _shapes(record: object, *fields: str) -> str:
    parts = ", ".join(f"{name} {tuple(getattr(record, name).shape)}" for name in fields)
    return f"{type(record).__name__}({parts})"


@dataclass(frozen=True, eq=False, repr=False)
class Routing:
    """The router's decision for T tokens. Scores and weights are fp32, whatever the model's dtype.

    Args:
        router_logits: (T, E), as they came to `route` (fp32 from a `Router`), noise included where there is any.
        router_scores: (T, E), softmax or sigmoid of the logits, without the selection bias.
        topk_weights: (T, K), what each chosen expert's output is multiplied by.
        topk_experts: (T, K), ids of the chosen experts; the best choice comes first, of equals the lowest id.
    """

    router_logits: Tensor
    router_scores: Tensor
    topk_weights: Tensor
    topk_experts: Tensor

    @property
    def n_experts(self) -> int:
        """E, the number of routed experts."""
        return self.router_logits.shape[-1]

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) how many tokens chose each expert; they sum to T·K. Needs no host sync."""
        chosen = self.topk_experts.flatten()
        counts = torch.zeros(self.n_experts, dtype=torch.int64, device=chosen.device)
        return counts.scatter_add_(0, chosen, torch.ones_like(chosen))

    @property
    def dense_weights(self) -> Tensor:
        """(T, E) the weights with a zero for every expert that was not chosen."""
        return torch.zeros_like(self.router_scores).scatter(1, self.topk_experts, self.topk_weights)

    def __repr__(self) -> str:
        return _shapes(self, "router_logits", "topk_experts")


@dataclass(frozen=True, eq=False, repr=False)
class ExpertChoice:
    """The decision when each expert chooses C tokens.

    Args:
        router_scores: (T, E), softmax over the experts.
        weights: (E, C), the scores of the chosen tokens.
        tokens: (E, C), the tokens each expert chose, the best first, of equals the earliest.
    """

    router_scores: Tensor
    weights: Tensor
    tokens: Tensor

    @property
    def n_experts(self) -> int:
        """E, the number of routed experts."""
        return self.router_scores.shape[-1]

    @property
    def tokens_per_expert(self) -> Tensor:
        """(E,) how many tokens each expert chose: C, for all of them."""
        n_experts, capacity = self.tokens.shape
        return torch.full((n_experts,), capacity, device=self.tokens.device)

    @property
    def mask(self) -> Tensor:
        """(T, E) whether the expert chose the token."""
        return torch.zeros_like(self.router_scores, dtype=torch.bool).T.scatter(1, self.tokens, True).T

    def __repr__(self) -> str:
        return _shapes(self, "router_scores", "tokens")


@dataclass(frozen=True, eq=False, repr=False)
class DispatchPlan:
    """Which row each choice travels in. A choice is one token's slot: T tokens make T·K choices, numbered t·K + slot.

    Without a capacity there are R = T·K rows, sorted by expert. With a capacity of C there are R = E·C rows, C for
    every expert: choices beyond C are dropped, and rows may stay empty.

    Args:
        row_choices: (R,) the choice that a row carries; T·K in an empty row.
        choice_rows: (T, K) the row that carries a choice; R for a dropped one.
        offsets: (E,) int32, where each expert's rows end; they begin where those of the expert before it end.
        capacity: C, or None where nothing is dropped.
    """

    row_choices: Tensor
    choice_rows: Tensor
    offsets: Tensor
    capacity: int | None = None

    @property
    def n_rows(self) -> int:
        """R, empty rows included."""
        return self.row_choices.shape[0]

    @property
    def row_tokens(self) -> Tensor:
        """(R,) the token that a row copies; T in an empty row."""
        return self.row_choices // self.choice_rows.shape[1]

    @property
    def dropped(self) -> Tensor:
        """(T, K) whether a choice found its expert full."""
        return self.choice_rows == self.n_rows

    def __repr__(self) -> str:
        return f"{_shapes(self, 'row_choices', 'choice_rows', 'offsets')[:-1]}, capacity {self.capacity})"
