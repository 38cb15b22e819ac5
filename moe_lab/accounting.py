"""Counts parameters and FLOPs from a configuration alone, exactly and without torch.

One multiplication with its addition is two FLOPs. Norms, softmax, RoPE, activations and the embedding look-up
are left out, as is usual: together they are well under one per cent of a model of any size.
"""

import math
from dataclasses import dataclass, fields

from moe_lab.config import LMConfig, MoEConfig, RouterConfig


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Named numbers with their sum."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, float]:
        """Each part's name and number, in the order in which they come."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def share(self, part: str) -> float:
        """One part's share of the total, 0 to 1."""
        return getattr(self, part) / self.total


@dataclass(frozen=True, kw_only=True)
class Parameters(Parts):
    """Learned numbers of a model, over all its layers."""

    embedding: int
    conv: int = 0
    attention: int
    ffn: int
    router: int = 0
    experts: int = 0
    shared_experts: int = 0
    norms: int
    head: int


@dataclass(frozen=True, kw_only=True)
class Flops(Parts):
    """FLOPs of one forward pass over one sequence, over all layers."""

    conv: int = 0
    attention_projections: int
    attention_scores: int
    ffn: int
    router: int = 0
    experts: int = 0
    shared_experts: int = 0
    head: int


def ffn_matrices(config: LMConfig) -> int:
    """How many D × F matrices the FFN has: SwiGLU's gate, up and down, or the MLP's up and down."""
    return _matrices(config.ffn)


def _matrices(kind: str) -> int:
    return 3 if "swiglu" in kind else 2


def ffn_parameters(config: LMConfig) -> int:
    """Parameters of one layer's FFN."""
    return ffn_matrices(config) * config.d_model * config.d_ff


def attention_parameters(config: LMConfig) -> int:
    """Parameters of one layer's attention: query and output for every head, key and value for the shared ones."""
    return 2 * config.d_model * config.d_head * (config.n_heads + config.n_kv_heads)


def expert_parameters(moe: MoEConfig) -> int:
    """Parameters of one routed expert."""
    matrices = _matrices(moe.expert)
    biases = (matrices - 1) * moe.d_ff + moe.d_model if moe.expert_bias else 0
    return matrices * moe.d_model * moe.d_ff + biases


def router_parameters(moe: MoEConfig) -> int:
    """Parameters of one layer's router; a selection bias is not learned by gradients and not counted."""
    matrices = 2 if moe.noisy_top_k else 1
    return matrices * moe.n_experts * moe.d_model + (moe.n_experts if moe.logit_bias else 0)


def shared_expert_parameters(moe: MoEConfig) -> int:
    """Parameters of one layer's shared experts together, their gate included."""
    return _matrices(moe.expert) * moe.d_model * moe.d_ff_shared + (moe.d_model if moe.shared_gate else 0)


def moe_parameters(moe: MoEConfig, *, active: bool = False) -> int:
    """Parameters of one layer of experts, or with `active` those that one token uses: `top_k` of the routed experts."""
    n_experts = moe.top_k if active else moe.n_experts
    return router_parameters(moe) + n_experts * expert_parameters(moe) + shared_expert_parameters(moe)


def combinations(router: RouterConfig) -> int:
    """In how many ways a token can choose its experts: E choose K, fewer where it is limited to groups.

    Source: Dai et al. 2024 (DeepSeekMoE), section 3.1. Shared experts are no choice and do not count. In G groups of
    E / G experts, of which M are kept, a choice may touch j = 1 … M groups: `G choose j` of them, times the choices
    from these j that leave none of them out, by inclusion and exclusion.
    """
    n_groups, size, k = router.n_groups, router.n_experts // router.n_groups, router.top_k
    return sum(
        math.comb(n_groups, touched)
        * sum((-1) ** out * math.comb(touched, out) * math.comb((touched - out) * size, k) for out in range(touched))
        for touched in range(1, router.groups_kept + 1)
    )


def cut_finer(moe: MoEConfig, m: int, n_shared: int = 0) -> dict[str, int]:
    """What changes if every expert is cut into `m`, and `n_shared` of the small ones are shared, for `moe.but(…)`.

    Total and active parameters stay as they are, but for the router, which has a row for every expert it can choose.

    Source: Dai et al. 2024 (DeepSeekMoE), sections 3.1 and 3.2.

    Raises:
        ValueError: experts that cannot be cut into `m` equal ones, more shared experts than a token has left to
            choose, or a layer that has shared experts already.
    """
    if moe.n_shared_experts:
        raise ValueError(f"n_shared_experts={moe.n_shared_experts}: expected 0, a layer of routed experts alone.")
    if m < 1 or moe.d_ff % m:
        raise ValueError(f"m={m}: expected a divisor of d_ff={moe.d_ff}.")
    if not 0 <= n_shared < m * moe.top_k:
        expected = f"0 to {m * moe.top_k - 1}, so that one of the m * top_k={m * moe.top_k} is left to be chosen"
        raise ValueError(f"n_shared={n_shared}: expected {expected}.")
    return {
        "d_ff": moe.d_ff // m,
        "n_experts": m * moe.n_experts - n_shared,
        "top_k": m * moe.top_k - n_shared,
        "n_shared_experts": n_shared,
    }


def _qk_norm_parameters(config: LMConfig) -> int:
    return {"none": 0, "head": 2, "all": config.n_heads + config.n_kv_heads}[config.qk_norm] * config.d_head


def count_parameters(config: LMConfig, *, active: bool = False) -> Parameters:
    """Every learned number of the model, or with `active` those that one token uses: `top_k` of the routed experts.

    A tied head costs nothing, its table is the embedding's. The active count holds the whole embedding table, as most
    published figures do, though a token reads one row of it.
    """
    table = config.vocab_size * config.d_model
    moe, n_moe = config.moe, config.n_moe_layers
    parts = {}
    if moe:
        n_experts = moe.top_k if active else moe.n_experts
        parts["router"] = n_moe * router_parameters(moe)
        parts["experts"] = n_moe * n_experts * expert_parameters(moe)
        parts["shared_experts"] = n_moe * shared_expert_parameters(moe)
    return Parameters(
        embedding=table,
        conv=config.d_model * config.conv_width,
        attention=config.n_layers * attention_parameters(config),
        ffn=(config.n_layers - n_moe) * ffn_parameters(config),
        norms=config.d_model * (2 * config.n_layers + 1) + config.n_layers * _qk_norm_parameters(config),
        head=0 if config.tied_embeddings else table,
        **parts,
    )


def count_flops(config: LMConfig, tokens: int, *, causal: bool = True) -> Flops:
    """FLOPs of a forward pass over one sequence of `tokens`; a training step costs three times as much.

    With `causal`, position s pays for the s + 1 positions that it sees; without, every pair is paid for, which is
    what an implementation that masks a full score matrix computes, and what `torch.utils.flop_counter` counts. In a
    layer of experts a token pays for the router, its `top_k` experts and the shared ones; no capacity is assumed.

    Raises:
        ValueError: fewer than one token.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: expected 1 or more.")
    pairs = tokens * (tokens + 1) // 2 if causal else tokens**2
    per_token = 2 * tokens
    moe, n_moe = config.moe, config.n_moe_layers
    parts = {}
    if moe:
        one_expert = _matrices(moe.expert) * moe.d_model * moe.d_ff
        parts["router"] = per_token * n_moe * moe.n_experts * moe.d_model
        parts["experts"] = per_token * n_moe * moe.top_k * one_expert
        parts["shared_experts"] = per_token * n_moe * shared_expert_parameters(moe)
    return Flops(
        conv=per_token * config.d_model * config.conv_width,
        attention_projections=per_token * config.n_layers * attention_parameters(config),
        attention_scores=4 * pairs * config.n_layers * config.n_heads * config.d_head,
        ffn=per_token * (config.n_layers - n_moe) * ffn_parameters(config),
        head=per_token * config.vocab_size * config.d_model,
        **parts,
    )


def ffn_width(d_model: int, multiple_of: int, multiplier: float = 1.0) -> int:
    """LLaMA's rule for d_ff: two thirds of 4 D, times a multiplier, rounded up to a multiple.

    Source: `FeedForward.__init__` in Meta's reference code for Llama 2 and 3
    (https://github.com/meta-llama/llama3/blob/main/llama/model.py).

    Raises:
        ValueError: a size or the multiplier is not positive.
    """
    if min(d_model, multiple_of, multiplier) <= 0:
        raise ValueError(f"d_model={d_model}, multiple_of={multiple_of}, multiplier={multiplier}: expected > 0.")
    width = int(multiplier * int(2 * 4 * d_model / 3))
    return -(-width // multiple_of) * multiple_of
