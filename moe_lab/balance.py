"""Balance: losses, the update of the selection bias, and measures of load. All are pure functions of what happened.

The letters, here and in every notebook, for a layer of E experts, k of them chosen by each of T tokens:

- n_i, `tokens_per_expert`: how many tokens chose expert i; they sum to k·T.
- f_i = n_i / (k·T): expert i's share of the choices. It counts, so no gradient flows through it.
- P_i: the mean over tokens of p_i, a token's scores divided by their sum (a softmax's already are).
- α multiplies the loss, γ is the step of the bias; neither appears here but where a function asks for it.

A `mask` (T,) is True for the tokens that count, and False for padding. That something is left to count is checked on a
CPU; on a GPU the check would wait for the device, and the result is NaN.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from moe_lab.records import Routing

# --- losses -------------------------------------------------------------------------------------------------------


def shares(routing: Routing, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """f and P, both (E,) and each summing to 1: the shares of the choices, and the mean probabilities.

    Source: Fedus et al. 2021 (Switch), equations 5 and 6, with f divided by k as well.

    Raises:
        ValueError: a mask of another shape or dtype, or one that lets no token count.
    """
    counted = _require_mask(routing, mask).float()[:, None]  # (T, 1)
    choices = counted.expand_as(routing.topk_experts).flatten()
    n = choices.new_zeros(routing.n_experts).scatter_add_(0, routing.topk_experts.flatten(), choices)
    return n / n.sum(), (counted * _probabilities(routing)).sum(0) / counted.sum()


def switch_loss(routing: Routing, mask: Tensor | None = None, tokens_per_expert: Tensor | None = None) -> Tensor:
    """`E · Σ_i f_i P_i`, to be multiplied by α. It is 1 when all f are equal, or all P; that is not its minimum.

    Source: Fedus et al. 2021 (Switch), equation 4, for one layer.

    Args:
        tokens_per_expert: (E,) where f shall come from, if not from this routing: the sum over all micro-batches, or
            over all ranks, makes this the global-batch loss (Qiu et al. 2025, https://arxiv.org/abs/2501.11873,
            equation 4). The mean of such losses over equal parts is then the loss of the whole.

    Raises:
        ValueError: see `shares`; loads of another number of experts, or that are all zero.
    """
    f, mean_probabilities = shares(routing, mask)
    if tokens_per_expert is not None:
        f = _require_loads(tokens_per_expert, routing.n_experts) / tokens_per_expert.sum()
    return routing.n_experts * (f * mean_probabilities).sum()


def sequence_loss(routing: Routing, n_sequences: int, mask: Tensor | None = None) -> Tensor:
    """The mean over sequences of each one's own `E · Σ_i f_i P_i`: every sequence shall be balanced by itself.

    The tokens of `n_sequences` sequences of equal length lie one sequence after the other, as in a (B, S) batch. A
    sequence of padding alone does not count.

    Source: DeepSeek-V3 (2024), equations 17 to 20. There f counts the k best scores without the selection bias; here
    it counts the choices that were made, bias and groups included. Without a bias the two are the same.

    Raises:
        ValueError: tokens that cannot be cut into so many sequences; see `shares` for the mask.
    """
    n_tokens = len(routing.topk_experts)
    if n_sequences < 1 or n_tokens % n_sequences:
        raise ValueError(f"n_sequences={n_sequences}: expected a divisor of the {n_tokens} tokens.")
    counted = _require_mask(routing, mask).view(n_sequences, -1, 1).float()  # (B, S, 1)
    chosen = torch.zeros_like(routing.router_scores).scatter(1, routing.topk_experts, 1.0)
    chosen = chosen.unflatten(0, (n_sequences, -1)) * counted
    probabilities = _probabilities(routing).unflatten(0, (n_sequences, -1)) * counted
    n = counted.sum(1)  # (B, 1)
    f = chosen.sum(1) / (n * routing.topk_experts.shape[1]).clamp(min=1)
    losses = routing.n_experts * (f * probabilities.sum(1) / n.clamp(min=1)).sum(-1)
    return losses.sum() / (n > 0).sum()


def z_loss(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """The mean over tokens of `logsumexp(logits)²`. It keeps logits small, and balances nothing.

    Source: Zoph et al. 2022 (ST-MoE), equation 5.

    Raises:
        ValueError: see `shares`.
    """
    counted = _require_mask(routing, mask).float()
    return (counted * routing.router_logits.float().logsumexp(-1).square()).sum() / counted.sum()


def _probabilities(routing: Routing) -> Tensor:
    scores = routing.router_scores
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)  # sigmoids can all be 0


def _require_mask(routing: Routing, mask: Tensor | None) -> Tensor:
    n_tokens = len(routing.topk_experts)
    if n_tokens == 0:
        raise ValueError("The routing is of no tokens: there is nothing to balance.")
    if mask is None:
        return torch.ones(n_tokens, dtype=torch.bool, device=routing.topk_experts.device)
    if mask.shape != (n_tokens,) or mask.dtype != torch.bool:
        got = f"{tuple(mask.shape)} of {mask.dtype}"
        raise ValueError(f"mask has shape {got}: expected ({n_tokens},) of torch.bool, True for tokens that count.")
    if mask.device.type == "cpu" and not mask.any():
        raise ValueError(f"mask is False for all {n_tokens} tokens: expected at least one token that is not padding.")
    return mask


def _require_loads(tokens_per_expert: Tensor, n_experts: int) -> Tensor:
    if tokens_per_expert.shape != (n_experts,):
        raise ValueError(f"tokens_per_expert has shape {tuple(tokens_per_expert.shape)}: expected ({n_experts},).")
    _require_some(tokens_per_expert)
    return tokens_per_expert.float()


def _require_some(tokens_per_expert: Tensor) -> None:
    if tokens_per_expert.device.type == "cpu" and tokens_per_expert.sum() <= 0:
        raise ValueError("tokens_per_expert is all zero: expected the counts of at least one token.")


# --- the bias that needs no loss ----------------------------------------------------------------------------------


def update_bias(selection_bias: Tensor, tokens_per_expert: Tensor, rate: float, recentre: bool = False) -> Tensor:
    """The bias (E,) after a step of `rate`: up where an expert got less than the mean, down where it got more.

    It is no gradient, and it selects only: weights come from scores without it.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", algorithm 1; DeepSeek-V3 (2024), section 2.1.2.

    Args:
        rate: γ, in the units of the scores.
        recentre: take the mean off the step, as torchtitan does, so that the mean of the bias does not drift.

    Raises:
        ValueError: a negative rate; loads of another number of experts, or that are all zero.
    """
    if rate < 0:
        raise ValueError(f"rate={rate}: expected 0 or more. A bias that grows with the load makes it worse.")
    load = _require_loads(tokens_per_expert, len(selection_bias))
    step = rate * torch.sign(load.mean() - load)
    if recentre:
        step = step - step.mean()
    return selection_bias + step


# --- measures of load, of the counts (..., E) ---------------------------------------------------------------------


def load(tokens_per_expert: Tensor) -> Tensor:
    """Each expert's count over the mean count, (..., E): 1 is its even share."""
    counts = tokens_per_expert.float()
    return counts / counts.mean(-1, keepdim=True)


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """MaxVio: how far the fullest expert is above the mean, as a share of it. 0 is even, E / k - 1 is everybody on one.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", equation 4.
    """
    return load(tokens_per_expert).amax(-1) - 1


def load_entropy(tokens_per_expert: Tensor) -> Tensor:
    """The entropy of the shares over that of even ones: 1 is even, 0 is all on one expert."""
    counts = tokens_per_expert.float()
    f = counts / counts.sum(-1, keepdim=True)
    return torch.special.entr(f).sum(-1) / torch.tensor(f.shape[-1]).log()


def dead_experts(tokens_per_expert: Tensor, below: float = 0.01) -> Tensor:
    """How many experts get less than `below` of an even share."""
    return (load(tokens_per_expert) < below).sum(-1)


def dropped_share(tokens_per_expert: Tensor, capacity: int) -> Tensor:
    """The share of choices that find their expert full, if each takes `capacity` of them."""
    counts = tokens_per_expert.float()
    return (counts - capacity).clamp(min=0).sum(-1) / counts.sum(-1)


# --- measures of what the router decides --------------------------------------------------------------------------


def churn(before: Tensor, after: Tensor) -> float:
    """The share of tokens whose set of chosen experts changed, between two (T, K) choices for the same tokens.

    Raises:
        ValueError: choices of different shapes, or of no tokens.
    """
    if before.shape != after.shape or before.ndim != 2 or len(before) == 0:
        raise ValueError(
            f"choices have shapes {tuple(before.shape)} and {tuple(after.shape)}: expected one (T, K) twice, T > 0."
        )
    return (before.sort(-1).values != after.sort(-1).values).any(-1).float().mean().item()


def domain_information(topk_experts: Tensor, domains: Tensor, tokens: Tensor) -> float:
    """I(domain; expert | byte) in bits: what the choice of an expert tells about the domain, the byte being known.

    Bytes differ from domain to domain, so a router that looks at nothing but the byte already "knows" the domain.
    Conditioning takes that out: what is left is what it makes of the context. Counted, not modelled, and so a little
    too large for few tokens: compare it with the same figure for `shuffle_within` the bytes.

    Args:
        topk_experts: (T, K); each choice is an observation.
        domains, tokens: (T,) int64, where a token is from, and which byte it is.

    Raises:
        ValueError: shapes that do not fit together, or no tokens.
    """
    n_tokens, top_k = topk_experts.shape
    if domains.shape != (n_tokens,) or tokens.shape != (n_tokens,) or n_tokens == 0:
        got = f"domains {tuple(domains.shape)}, tokens {tuple(tokens.shape)}"
        raise ValueError(f"topk_experts has shape {tuple(topk_experts.shape)}, but {got}: expected (T, K), (T,), (T,).")
    expert = topk_experts.flatten().cpu()
    domain, byte = (ids.cpu().repeat_interleave(top_k) for ids in (domains, tokens))
    sizes = [int(ids.max()) + 1 for ids in (byte, domain, expert)]
    cells = (byte * sizes[1] + domain) * sizes[2] + expert
    joint = torch.bincount(cells, minlength=sizes[0] * sizes[1] * sizes[2]).double().view(sizes) / len(cells)
    # I(D; E | B) = H(B, D) + H(B, E) - H(B, D, E) - H(B)
    terms = (joint.sum(2), joint.sum(1), joint, joint.sum((1, 2)))
    bits = [torch.special.entr(term).sum() / math.log(2) for term in terms]
    return max(0.0, (bits[0] + bits[1] - bits[2] - bits[3]).item())


def shuffle_within(tokens: Tensor, domains: Tensor, generator: torch.Generator) -> Tensor:
    """The domains (T,), shuffled among the tokens of the same byte: every link to the context is cut."""
    shuffled = torch.randperm(len(tokens), generator=generator)
    order = shuffled[tokens[shuffled].argsort(stable=True)]  # byte by byte, in random order
    mixed = torch.empty_like(domains)
    mixed[tokens.argsort(stable=True)] = domains[order]
    return mixed


# --- what others call the balance loss ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Convention:
    """A balance loss as a paper or library computes it, of the routings of all layers, before its coefficient.

    Args:
        differs: what is not as in `switch_loss` summed over layers.
        source: where it is defined.
    """

    loss: Callable[[Sequence[Routing], int], Tensor]
    differs: str
    source: str


def _of_first_choices(routing: Routing) -> Tensor:
    first = torch.zeros_like(routing.router_scores).scatter(1, routing.topk_experts[:, :1], 1.0)
    return routing.n_experts * (first.mean(0) * routing.router_scores.mean(0)).sum()


def _pooled(routings: Sequence[Routing]) -> Tensor:
    """transformers' `load_balancing_loss_func`: all layers' tokens in one heap, and f sums to k."""
    scores = torch.cat([routing.router_logits.float().softmax(-1) for routing in routings])
    choices = sum(routing.tokens_per_expert for routing in routings)
    return scores.shape[-1] * (choices / len(scores) * scores.mean(0)).sum()


# Each takes the routings of a model's layers, and the number of sequences in the batch.
CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "Switch, Megatron-LM": Convention(
            lambda routings, _: sum(map(switch_loss, routings)),
            "nothing",
            "Fedus et al. 2021, equation 4; Megatron-LM, megatron/core/transformer/moe/moe_utils.py",
        ),
        "GShard, DeepSpeed": Convention(
            lambda routings, _: sum(map(_of_first_choices, routings)),
            "f counts first choices only",
            "Lepikhin et al. 2020, algorithm 1, times E²; DeepSpeed, deepspeed/moe/sharded_moe.py, top2gating",
        ),
        "MegaBlocks": Convention(
            lambda routings, _: sum(map(switch_loss, routings)) / len(routings),
            "mean over layers",
            "megablocks/layers/moe.py, batched_load_balancing_loss",
        ),
        "transformers": Convention(
            lambda routings, _: _pooled(routings),
            "layers pooled before the product; f sums to k",
            "transformers/models/mixtral/modeling_mixtral.py, load_balancing_loss_func",
        ),
        "DeepSeek-V3": Convention(
            lambda routings, n_sequences: sum(sequence_loss(routing, n_sequences) for routing in routings),
            "each sequence by itself",
            "DeepSeek-V3 2024, equations 17 to 20",
        ),
    }
)
