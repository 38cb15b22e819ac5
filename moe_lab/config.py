"""The sizes of a model, validated where they are made. No torch: `accounting` counts from these alone."""

import math
from dataclasses import dataclass, field, replace
from typing import Self

FFN_KINDS = ("swiglu", "relu", "gelu")
EXPERT_KINDS = (*FFN_KINDS, "clamped_swiglu")
SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2_sum")
DROP_RULES = ("position", "score")
WEIGHED = ("output", "input")
QK_NORMS = ("none", "head", "all")
BALANCE_LOSSES = ("switch", "sequence", "global_batch")
SCHEDULES = ("cosine", "constant")
PRECISIONS = ("fp32", "bf16")


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r}: expected {expected}.")


def _require_positive_int(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        _require(is_int and value > 0, name, value, "a positive integer")


def _require_count(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        _require(is_int and value >= 0, name, value, "an integer of 0 or more")


def _require_amount(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(_is_number(value) and value >= 0, name, value, "a number of 0 or more")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(_is_number(value) and value > 0, name, value, "a positive number")


def _require_bool(config: object, *names: str) -> None:
    for name in names:
        _require(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")


def _require_one_of(config: object, field: str, choices: tuple[str, ...]) -> None:
    _require(getattr(config, field) in choices, field, getattr(config, field), f"one of {', '.join(choices)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose `top_k` of `n_experts`, and what weights the chosen get.

    Args:
        score: what makes scores of logits: "softmax" over all experts, or "sigmoid" of each alone.
        normalise: divide the chosen experts' scores by their sum. With softmax this equals a softmax over the chosen
            logits alone.
        scaling_factor: multiplies the weights, last of all.
        n_groups, groups_kept, group_score: experts stand in `n_groups` equal groups in order of their ids; only those
            in a token's best `groups_kept` groups can be chosen. A group is worth its best score ("max"), or the sum
            of its two best ("top2_sum").
        selection_bias: keep a bias per expert that is added to its score for choosing, never for weighing.
        logit_bias: the router's linear layer has a bias.
        input_jitter: in training, multiply what the router reads by numbers from U(1 - jitter, 1 + jitter).
        noisy_top_k: in training, add Gaussian noise of a learned size to the logits.

    Raises:
        ValueError: a field that cannot be, with its name, its value and what was expected.
    """

    d_model: int
    n_experts: int
    top_k: int
    score: str = "softmax"
    normalise: bool = True
    scaling_factor: float = 1.0
    n_groups: int = 1
    groups_kept: int = 1
    group_score: str = "max"
    selection_bias: bool = False
    logit_bias: bool = False
    input_jitter: float = 0.0
    noisy_top_k: bool = False

    def __post_init__(self) -> None:
        _require_positive_int(self, "d_model", "n_experts", "top_k", "n_groups", "groups_kept")
        at_most = f"at most n_experts={self.n_experts}"
        _require(self.top_k <= self.n_experts, "top_k", self.top_k, at_most)
        _require_one_of(self, "score", SCORES)
        _require_one_of(self, "group_score", GROUP_SCORES)
        _require_bool(self, "normalise", "selection_bias", "logit_bias", "noisy_top_k")
        _require_positive(self, "scaling_factor")
        is_jitter = _is_number(self.input_jitter) and 0 <= self.input_jitter < 1
        _require(is_jitter, "input_jitter", self.input_jitter, "a number in [0, 1)")
        divides = self.n_experts % self.n_groups == 0
        _require(divides, "n_groups", self.n_groups, f"a divisor of n_experts={self.n_experts}")
        _require(
            self.groups_kept <= self.n_groups, "groups_kept", self.groups_kept, f"at most n_groups={self.n_groups}"
        )
        group_size = self.n_experts // self.n_groups
        in_reach = self.groups_kept * group_size
        _require(in_reach >= self.top_k, "top_k", self.top_k, f"at most the {in_reach} experts of the kept groups")
        has_two = self.n_groups == 1 or self.group_score == "max" or group_size >= 2
        _require(has_two, "group_score", self.group_score, f"'max', for groups of {group_size} have no two best")

    def but(self, **changes: object) -> Self:
        """The same configuration with some fields changed, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class MoEConfig(RouterConfig):
    """A layer of routed experts, with or without shared ones; the routing fields are `RouterConfig`'s.

    Args:
        d_ff: the width of one routed expert.
        n_shared_experts: experts that every token visits. They are held as one FFN, `d_ff_shared` wide.
        d_ff_shared: by default `n_shared_experts * d_ff`.
        shared_gate: multiply what the shared experts give by the sigmoid of a learned number per token.
        expert: the kind of every expert.
        expert_bias: the routed experts' matrices have biases.
        weigh: multiply each expert's "output" by its weight, or its "input".
        capacity_factor: an expert takes at most its even share of the choices times this, rounded up, and the rest
            are dropped. None drops nothing.
        drop: who is kept when an expert is full: the first by "position", or the best by "score".
        expert_choice: the experts choose their tokens, not the tokens their experts. Each takes its even share of the
            choices (times `capacity_factor`), and a weight is its token's softmax score: `normalise` has no meaning.

    Raises:
        ValueError: a field that cannot be, with its name, its value and what was expected.
    """

    d_ff: int
    n_shared_experts: int = 0
    d_ff_shared: int | None = None
    shared_gate: bool = False
    expert: str = "swiglu"
    expert_bias: bool = False
    weigh: str = "output"
    capacity_factor: float | None = None
    drop: str = "position"
    expert_choice: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive_int(self, "d_ff")
        _require_count(self, "n_shared_experts")
        if self.d_ff_shared is None:
            object.__setattr__(self, "d_ff_shared", self.n_shared_experts * self.d_ff)
        _require_count(self, "d_ff_shared")
        agrees = (self.d_ff_shared > 0) == (self.n_shared_experts > 0)
        _require(agrees, "d_ff_shared", self.d_ff_shared, f"a width for n_shared_experts={self.n_shared_experts}")
        _require_one_of(self, "expert", EXPERT_KINDS)
        has_kind = self.n_shared_experts == 0 or self.expert in FFN_KINDS
        expected = f"0 for expert={self.expert!r}, a kind that no model shares"
        _require(has_kind, "n_shared_experts", self.n_shared_experts, expected)
        _require_one_of(self, "weigh", WEIGHED)
        _require_one_of(self, "drop", DROP_RULES)
        _require_bool(self, "shared_gate", "expert_bias", "expert_choice")
        has_shared = self.n_shared_experts > 0 or not self.shared_gate
        _require(
            has_shared, "shared_gate", self.shared_gate, "shared experts to gate, so n_shared_experts of 1 or more"
        )
        factor = self.capacity_factor
        is_factor = factor is None or (_is_number(factor) and factor > 0)
        _require(is_factor, "capacity_factor", factor, "a positive number, or None to drop nothing")
        plain = self.score == "softmax" and self.n_groups == 1 and not self.selection_bias
        plain = plain and self.weigh == "output" and self.scaling_factor == 1
        expected = "False with sigmoid scores, groups, a selection bias, a scaling factor or weighed inputs"
        _require(plain or not self.expert_choice, "expert_choice", self.expert_choice, expected)

    def but(self, **changes: object) -> Self:
        """The same configuration with some fields changed, validated again.

        A `d_ff_shared` that was as by default is worked out anew.
        """
        if self.d_ff_shared == self.n_shared_experts * self.d_ff:
            changes = {"d_ff_shared": None} | changes
        return super().but(**changes)


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention: all heads' keys and values come from one short vector per token.

    Args:
        kv_rank: the width of that vector.
        q_rank: queries come from a short vector, too, of this width; None takes them from the token itself.
        d_nope, d_rope: a head's query and key have a part that RoPE leaves alone and a part that it turns; the turned
            part of the key is the same for all heads.
        d_value: the width of a head's value.

    Raises:
        ValueError: a field that cannot be, with its name, its value and what was expected.
    """

    kv_rank: int
    d_nope: int
    d_rope: int
    d_value: int
    q_rank: int | None = None

    def __post_init__(self) -> None:
        _require_positive_int(self, "kv_rank", "d_nope", "d_rope", "d_value")
        _require(self.d_rope % 2 == 0, "d_rope", self.d_rope, "an even number (RoPE turns pairs)")
        if self.q_rank is not None:
            _require_positive_int(self, "q_rank")

    def but(self, **changes: object) -> Self:
        """The same configuration with some fields changed, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A decoder-only language model, LLaMA's layout: RMSNorm, RoPE, grouped-query attention, an FFN per layer.

    `n_kv_heads` and `d_head` default to what they are in plain multi-head attention. The two switches that
    LLaMA does not have are for models of a few hundred kilobytes: `conv_width` puts a short causal convolution
    on the embeddings (0 leaves it out), `tied_embeddings` uses one table for input and output.

    Args:
        moe: every layer's FFN is a layer of experts, except the first `n_dense_layers`, which keep an FFN of width
            `d_ff`. With `moe_every`, only every so-manieth layer has experts, counted from 1 over all layers (Llama 4).
        mla: latent attention (DeepSeek) in place of grouped queries; `d_head` is then that of queries and keys.
        qk_norm: an RMSNorm on queries and keys: on each "head" (Qwen3), or on "all" heads at once (OLMoE).
        qkv_bias, output_bias: attention's matrices have biases (Qwen2, gpt-oss).
        attention_sinks: a learned score per head that takes part in attention's softmax and has no value (gpt-oss).
        window: how many positions attention sees, its own among them; None for all. Every `full_every`-th layer,
            counted from 1, sees all nevertheless (0: none does).
        chunked: the window does not slide: positions are cut into chunks as long as it, and each sees those before it
            in its own chunk (Llama 4).

    Raises:
        ValueError: a field that cannot be, with its name, its value and what was expected.
    """

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    vocab_size: int = 256
    n_kv_heads: int | None = None
    d_head: int | None = None
    ffn: str = "swiglu"
    conv_width: int = 0
    tied_embeddings: bool = False
    moe: MoEConfig | None = None
    n_dense_layers: int = 0
    moe_every: int = 1
    mla: MLAConfig | None = None
    qk_norm: str = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    attention_sinks: bool = False
    window: int | None = None
    full_every: int = 0
    chunked: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require_positive_int(self, "d_model", "n_layers", "n_heads", "d_ff", "vocab_size", "moe_every")
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        _require_bool(self, "qkv_bias", "output_bias", "attention_sinks", "tied_embeddings", "chunked")
        _require_one_of(self, "qk_norm", QK_NORMS)
        _require_mla_fits(self)
        if self.d_head is None:
            fits = self.d_model % self.n_heads == 0
            expected = f"a divisor of d_model={self.d_model}, or an explicit d_head"
            _require(fits, "n_heads", self.n_heads, expected)
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        _require_positive_int(self, "n_kv_heads", "d_head")
        divides = self.n_heads % self.n_kv_heads == 0
        _require(divides, "n_kv_heads", self.n_kv_heads, f"a divisor of n_heads={self.n_heads}")
        can_turn = self.d_head % 2 == 0 or self.mla is not None  # where only a part is turned
        _require(can_turn, "d_head", self.d_head, "an even number (RoPE turns pairs)")
        _require_one_of(self, "ffn", FFN_KINDS)
        _require_count(self, "conv_width", "n_dense_layers", "full_every")
        if self.window is not None:
            _require_positive_int(self, "window")
        has_window = self.window is not None or not self.full_every
        _require(has_window, "full_every", self.full_every, "0 where there is no window")
        _require(self.window is not None or not self.chunked, "chunked", True, "False where there is no window")
        _require_moe_fits(self)
        _require_positive(self, "rope_theta", "norm_eps")

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts."""
        return self.moe is not None and layer >= self.n_dense_layers and (layer + 1) % self.moe_every == 0

    @property
    def n_moe_layers(self) -> int:
        """How many layers have experts."""
        return sum(map(self.has_experts, range(self.n_layers)))

    def window_of(self, layer: int) -> int | None:
        """How many positions this layer, counted from 0, sees at most; None for all."""
        return None if self.full_every and (layer + 1) % self.full_every == 0 else self.window

    def but(self, **changes: object) -> Self:
        """The same configuration with some fields changed, validated again.

        Heads that were as by default are worked out anew, and all where latent attention comes or goes.
        """
        is_latent = self.mla or changes.get("mla")  # whose heads follow from it
        if self.n_kv_heads == self.n_heads or is_latent:
            changes = {"n_kv_heads": None} | changes
        if self.n_heads * self.d_head == self.d_model or is_latent:
            changes = {"d_head": None} | changes
        return replace(self, **changes)


def n_visible(positions: int, window: int | None = None, chunked: bool = False) -> int:
    """How many of so many positions the last one sees, itself among them: all, a window, or its chunk so far."""
    if window is None:
        return positions
    if chunked and positions:
        return (positions - 1) % window + 1
    return min(positions, window)


def _require_mla_fits(config: LMConfig) -> None:
    """Latent attention has heads of its own making: what says otherwise is refused."""
    mla = config.mla
    _require(mla is None or isinstance(mla, MLAConfig), "mla", mla, "an MLAConfig, or None for grouped queries")
    if mla is None:
        return
    if config.d_head is None:
        object.__setattr__(config, "d_head", mla.d_nope + mla.d_rope)
    expected = f"d_nope + d_rope = {mla.d_nope + mla.d_rope}, as mla says"
    _require(config.d_head == mla.d_nope + mla.d_rope, "d_head", config.d_head, expected)
    all_heads = f"n_heads={config.n_heads}, for latent attention shares no heads"
    _require(config.n_kv_heads == config.n_heads, "n_kv_heads", config.n_kv_heads, all_heads)
    _require(config.qk_norm == "none", "qk_norm", config.qk_norm, "'none', for mla normalises in its own way")
    for name in ("qkv_bias", "output_bias", "attention_sinks"):
        _require(not getattr(config, name), name, True, "False with mla")
    _require(config.window is None, "window", config.window, "None with mla")


def _require_moe_fits(config: LMConfig) -> None:
    moe = config.moe
    _require(moe is None or isinstance(moe, MoEConfig), "moe", moe, "a MoEConfig, or None for a dense model")
    if moe is None:
        _require(config.n_dense_layers == 0, "n_dense_layers", config.n_dense_layers, "0 where there is no moe")
        _require(config.moe_every == 1, "moe_every", config.moe_every, "1 where there is no moe")
        return
    _require(moe.d_model == config.d_model, "moe.d_model", moe.d_model, f"the model's d_model={config.d_model}")
    expected = f"at most n_layers={config.n_layers}"
    _require(config.n_dense_layers <= config.n_layers, "n_dense_layers", config.n_dense_layers, expected)


@dataclass(frozen=True, kw_only=True)
class SwitchConfig:
    """An encoder-decoder with T5's layout, as Switch Transformers are; to be counted, not to be built.

    Args:
        n_encoder_layers, n_decoder_layers: a decoder layer has two attentions, the second over the encoder's output.
        n_experts: in every `moe_every`-th layer of both; 0 for T5 itself. A token visits one of them.
        gated: FFNs have three matrices (GEGLU), not two.

    Raises:
        ValueError: a field that cannot be, with its name, its value and what was expected.
    """

    d_model: int
    d_ff: int
    n_heads: int
    d_head: int
    n_encoder_layers: int
    n_decoder_layers: int
    n_experts: int = 0
    moe_every: int = 2
    gated: bool = False
    tied_embeddings: bool = True
    vocab_size: int = 32_128

    def __post_init__(self) -> None:
        _require_positive_int(self, "d_model", "d_ff", "n_heads", "d_head", "n_encoder_layers", "n_decoder_layers")
        _require_positive_int(self, "moe_every", "vocab_size")
        _require_count(self, "n_experts")
        _require_bool(self, "gated", "tied_embeddings")

    @property
    def n_moe_layers(self) -> int:
        """How many layers of encoder and decoder together have experts."""
        layers = self.n_encoder_layers // self.moe_every + self.n_decoder_layers // self.moe_every
        return layers if self.n_experts else 0

    def but(self, **changes: object) -> Self:
        """The same configuration with some fields changed, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the experts evenly busy. All strengths are 0 by default: no cure.

    Args:
        loss: which balance loss is added, times `alpha`: "switch" over each micro-batch, "sequence" over each
            sequence by itself, "global_batch" with the loads of all micro-batches.
        alpha: its coefficient; the losses of the layers are summed.
        z_loss: the coefficient of the router's z-loss.
        bias_rate: gamma, the step of the loss-free selection bias; the router's config needs `selection_bias`.
        recentre: move the bias by its step minus the mean step, so that its mean stays where it is.

    Raises:
        ValueError: a field that cannot be, with its name, its value and what was expected.
    """

    loss: str = "switch"
    alpha: float = 0.0
    z_loss: float = 0.0
    bias_rate: float = 0.0
    recentre: bool = False

    def __post_init__(self) -> None:
        _require_one_of(self, "loss", BALANCE_LOSSES)
        _require_amount(self, "alpha", "z_loss", "bias_rate")
        _require_bool(self, "recentre")

    def but(self, **changes: object) -> Self:
        """The same configuration with some fields changed, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train.

    One step sees `batch_size * context` tokens.

    Args:
        micro_batches: into how many parts a step's batch is cut; their gradients are added up.
        schedule: after a linear warm-up the learning rate falls along a "cosine" to zero, or stays "constant".
        router_rate: the routers' learning rate, as a multiple of everybody else's; 0 leaves them as they were drawn.
        weight_decay: for matrices and expert weights; norms, biases and the embedding are left alone.
        clip_norm: the gradient is scaled down to this norm where it is longer.
        precision: "fp32", or "bf16" for products under autocast with weights kept in fp32.
        recompute: keep no activations inside the blocks, compute them again in the backward pass.
        balance: what keeps the experts busy.

    Raises:
        ValueError: a field that cannot be, with its name, its value and what was expected.
    """

    steps: int = 500
    batch_size: int = 16
    micro_batches: int = 1
    context: int = 64
    learning_rate: float = 1e-2
    warmup_steps: int = 20
    schedule: str = "cosine"
    router_rate: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    precision: str = "fp32"
    recompute: bool = False
    seed: int = 0
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    def __post_init__(self) -> None:
        _require_positive_int(self, "steps", "batch_size", "micro_batches", "context")
        divides = self.batch_size % self.micro_batches == 0
        _require(divides, "micro_batches", self.micro_batches, f"a divisor of batch_size={self.batch_size}")
        _require_count(self, "warmup_steps", "seed")
        _require_positive(self, "learning_rate", "clip_norm")
        _require_amount(self, "weight_decay", "router_rate")
        _require_one_of(self, "schedule", SCHEDULES)
        _require_one_of(self, "precision", PRECISIONS)
        _require_bool(self, "recompute")
        if isinstance(self.betas, list):  # as YAML and JSON write a pair
            object.__setattr__(self, "betas", tuple(self.betas))
        is_pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        in_range = is_pair and all(_is_number(b) and 0 <= b < 1 for b in self.betas)
        _require(in_range, "betas", self.betas, "two numbers in [0, 1)")
        _require(isinstance(self.balance, BalanceConfig), "balance", self.balance, "a BalanceConfig")

    def but(self, **changes: object) -> Self:
        """The same configuration with some fields changed, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run: the model, its training, and how often it is evaluated and saved, in steps.

    Raises:
        ValueError: a field that cannot be, with its name, its value and what was expected.
    """

    model: LMConfig
    training: TrainConfig = field(default_factory=TrainConfig)
    evaluate_every: int = 100
    save_every: int = 100

    def __post_init__(self) -> None:
        _require(isinstance(self.model, LMConfig), "model", self.model, "an LMConfig")
        _require(isinstance(self.training, TrainConfig), "training", self.training, "a TrainConfig")
        _require_positive_int(self, "evaluate_every", "save_every")

    def but(self, **changes: object) -> Self:
        """The same configuration with some fields changed, validated again."""
        return replace(self, **changes)
