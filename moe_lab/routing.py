"""The router: scores for every expert, a choice of k, and weights for the chosen. Always in fp32.

Score, select and weigh are three functions, because papers differ in each of them and agree on the order.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.config import GROUP_SCORES, RouterConfig
from moe_lab.records import ExpertChoice, Routing


def score(router_logits: Tensor, kind: str = "softmax") -> Tensor:
    """Scores of all experts, (T, E) to (T, E): a "softmax" over the experts, or each one's own "sigmoid".

    Source: softmax in Shazeer et al. 2017, equation 2, and Fedus et al. 2021 (Switch), equation 1; sigmoid in
    DeepSeek-V3 (2024), equation 15.

    Raises:
        ValueError: another kind.
    """
    if kind == "softmax":
        return router_logits.softmax(-1)
    if kind == "sigmoid":
        return router_logits.sigmoid()
    raise ValueError(f"score={kind!r}: expected 'softmax' or 'sigmoid'.")


def best_k_reference(scores: Tensor, k: int) -> Tensor:
    """The k largest of every row, (T, E) to (T, k) ids: the largest first, of equals the lowest id."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def best_k(scores: Tensor, k: int) -> Tensor:
    """What `best_k_reference` gives, on a CPU without sorting whole rows. NaN counts as larger than every number.

    `torch.topk` may take any of two equal scores: rows in which that could matter are sorted after all.
    """
    if scores.device.type != "cpu" or k == 0:  # to look for ties first would wait for the device
        return best_k_reference(scores, k)
    values, ids = scores.topk(k, dim=-1)
    in_reach = (scores >= values[..., -1:]).sum(-1)
    unclear = (in_reach != k) | (values[..., 1:] == values[..., :-1]).any(-1) | values[..., 0].isnan()
    if unclear.any():
        ids[unclear] = best_k_reference(scores[unclear], k)
    return ids


def limit_groups(scores: Tensor, n_groups: int, groups_kept: int, group_score: str = "max") -> Tensor:
    """Scores with -inf for all experts outside each token's best `groups_kept` groups, (T, E) to (T, E).

    Groups are equal and stand in order of the experts' ids. A group is worth its "max" (DeepSeek-V2, section 2.2.2) or
    its "top2_sum" (DeepSeek-V3, section 2.1.2, which limits a token to 4 nodes in this way).

    Raises:
        ValueError: another group score.
    """
    if group_score not in GROUP_SCORES:
        raise ValueError(f"group_score={group_score!r}: expected one of {', '.join(GROUP_SCORES)}.")
    grouped = scores.unflatten(-1, (n_groups, -1))  # (T, groups, E / groups)
    best = grouped.topk(1 if group_score == "max" else 2, dim=-1).values.sum(-1)  # (T, groups)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best_k(best, groups_kept), True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)


def weigh(scores: Tensor, experts: Tensor, normalise: bool = True, scaling_factor: float = 1.0) -> Tensor:
    """Weights of the chosen experts, (T, K): their scores, divided by their sum if `normalise`, times a factor."""
    weights = scores.gather(-1, experts)
    if normalise:
        # sigmoids can all be 0; DeepSeek's 1e-20 changes no other sum
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling_factor


def route(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
    """Logits (T, E) to a `Routing`: score, select, weigh. Only the weights carry a gradient, the choice does not.

    Args:
        selection_bias: (E,) added to the scores for choosing, never for weighing (DeepSeek-V3, equation 16).
    """
    scores = score(router_logits.float(), config.score)
    if selection_bias is not None:
        choosing = scores.detach() + selection_bias
    elif config.n_groups > 1:
        choosing = scores.detach()
    else:
        choosing = router_logits.float().detach()  # logits rank as their scores do, and small ones do not round to 0
    if config.n_groups > 1:
        choosing = limit_groups(choosing, config.n_groups, config.groups_kept, config.group_score)
    experts = best_k(choosing, config.top_k)
    weights = weigh(scores, experts, config.normalise, config.scaling_factor)
    return Routing(router_logits=router_logits, router_scores=scores, topk_weights=weights, topk_experts=experts)


class NotFiniteError(ValueError):
    """A router met logits that are NaN or infinite."""


def require_finite(router_logits: Tensor) -> None:
    """Refuse logits that are NaN or infinite. On a GPU this waits for the device.

    Raises:
        NotFiniteError: how many, and where the first is.
    """
    if router_logits.sum().isfinite():  # one pass; what it misses is nothing, what it suspects is looked at
        return
    bad = ~router_logits.isfinite()
    if bad.any():
        token, expert = bad.nonzero()[0].tolist()
        raise NotFiniteError(
            f"router_logits: {int(bad.sum())} of {bad.numel()} are NaN or infinite, in {int(bad.any(-1).sum())} of "
            f"{len(bad)} tokens; the first is {router_logits[token, expert].item()} at token {token}, expert {expert}. "
            "Look for what made them: the router's input and its weights."
        )


class Router(nn.Module):
    """One linear layer whose outputs choose experts; computed in fp32 whatever the model's dtype.

    Args:
        check_finite: refuse NaN and infinite logits on a GPU, too, at the price of a host sync. On a CPU they are
            always refused. Unchecked, a NaN reaches the output: it is never routed as if it were a number.
    """

    def __init__(self, config: RouterConfig, check_finite: bool = False) -> None:
        super().__init__()
        self.config, self.check_finite = config, check_finite
        self.weight = nn.Parameter(torch.empty(config.n_experts, config.d_model))
        self.bias = nn.Parameter(torch.empty(config.n_experts)) if config.logit_bias else None
        self.noise_weight = nn.Parameter(torch.empty(config.n_experts, config.d_model)) if config.noisy_top_k else None
        # A buffer: no gradient reaches it, the trainer moves it. `_apply` keeps it fp32.
        bias = torch.zeros(config.n_experts, dtype=torch.float32) if config.selection_bias else None
        self.register_buffer("selection_bias", bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: the matrix from N(0, 1 / D), so that logits start at N(0, 1); biases and noise at 0."""
        nn.init.normal_(self.weight, std=self.config.d_model**-0.5)
        for zero in (self.bias, self.noise_weight, self.selection_bias):
            if zero is not None:
                zero.zero_()

    def _apply(self, fn: object, recurse: bool = True) -> "Router":
        """Moves everything, but leaves `selection_bias` in fp32: its steps of 0.001 would vanish in bf16."""
        kept = self.selection_bias
        super()._apply(fn, recurse)
        if kept is not None and self.selection_bias.dtype != torch.float32:
            self.selection_bias = kept.to(self.selection_bias.device)
        return self

    def logits(self, tokens: Tensor) -> Tensor:
        """(T, D) to fp32 logits (T, E), with jitter and noise while training."""
        x = tokens.float()
        if self.training and self.config.input_jitter:
            # Fedus et al. 2021, appendix C
            x = x * torch.empty_like(x).uniform_(1 - self.config.input_jitter, 1 + self.config.input_jitter)
        bias = self.bias.float() if self.bias is not None else None
        logits = F.linear(x, self.weight.float(), bias)
        if self.training and self.noise_weight is not None:
            # Shazeer et al. 2017, equation 4
            logits = logits + torch.randn_like(logits) * F.softplus(F.linear(x, self.noise_weight.float()))
        return logits

    def forward(self, tokens: Tensor) -> Routing:
        """(T, D) to a `Routing` of T tokens.

        Raises:
            ValueError: tokens of another shape.
            NotFiniteError: NaN or infinite logits (on a CPU, or with `check_finite`).
        """
        return route(self.checked_logits(tokens), self.config, self.selection_bias)

    def checked_logits(self, tokens: Tensor) -> Tensor:
        """What `forward` makes its choice of: `logits`, in fp32 under autocast too, with what it raises."""
        if tokens.ndim != 2 or tokens.shape[1] != self.config.d_model:
            expected = f"(T, D) with D = d_model={self.config.d_model}"
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}: expected {expected}.")
        device = tokens.device.type
        has_autocast = torch.amp.is_autocast_available(device)  # the meta device has none
        with torch.autocast(device, enabled=False) if has_autocast else nullcontext():
            logits = self.logits(tokens)
            if self.check_finite or device == "cpu":
                require_finite(logits)
            return logits


def expert_choice(router_logits: Tensor, capacity: int) -> ExpertChoice:
    """Each expert takes the `capacity` tokens that score it highest; logits (T, E).

    Every expert is equally busy by construction. A token may get many experts or none, and whether it is taken depends
    on all other tokens, later ones included.

    Source: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", equation 2.

    Raises:
        ValueError: a capacity that is negative or above the number of tokens.
    """
    if not 0 <= capacity <= len(router_logits):
        raise ValueError(f"capacity={capacity}: expected 0 to the number of tokens, {len(router_logits)}.")
    scores = score(router_logits.float())
    tokens = best_k(scores.detach().T, capacity)  # (E, C)
    return ExpertChoice(router_scores=scores, weights=scores.T.gather(-1, tokens), tokens=tokens)
