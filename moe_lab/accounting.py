"""Counts parameters, FLOPs and bytes from a configuration alone, exactly and without torch.

One multiplication with its addition is two FLOPs. Norms, softmax, RoPE, activations and the embedding look-up
are left out, as is usual: together they are well under one per cent of a large model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral

from moe_lab.config import LMConfig, MoEConfig, RouterConfig, SwitchConfig, n_visible

FP8_BLOCK = 128  # values that share an fp32 scale: DeepSeek-V3 (2024), section 3.3.2
T5_POSITION_BUCKETS = 32  # Raffel et al. 2020, section 2.1
MXFP4_BITS = 4 + 8 / 32  # 32 values of 4 bits share a scale of 8: OCP Microscaling Formats 1.0, section 5
# Of one number. Scales are in MXFP4's 4.25 bits; fp8's are left out, 4 bytes beside 16,384 in DeepSeek-V3's blocks.
BYTES = {"fp32": 4, "bf16": 2, "fp8": 1, "mxfp4": MXFP4_BITS / 8}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Named numbers with their sum; prints as a table, and is one in a notebook."""

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

    def _rows(self) -> list[tuple[str, str, str]]:
        parts = {name: number for name, number in self.by_part().items() if number}
        shares = {name: f"{number / self.total:.2%}" for name, number in parts.items()}
        rows = [(name.replace("_", " "), as_text(number), shares[name]) for name, number in parts.items()]
        return [*rows, ("total", as_text(self.total), "")]

    def __str__(self) -> str:
        names, numbers, shares = (max(map(len, column)) for column in zip(*self._rows(), strict=True))
        rows = (f"{name:<{names}}  {number:>{numbers}}  {share:>{shares}}" for name, number, share in self._rows())
        return "\n".join(row.rstrip() for row in rows)

    def _repr_html_(self) -> str:
        cells = "<td style='text-align: left'>{}</td><td>{}</td><td>{}</td>"
        return f"<table>{''.join(f'<tr>{cells.format(*row)}</tr>' for row in self._rows())}</table>"


def as_text(number: float) -> str:
    """A whole number with commas; any other with four digits, or from ten thousand on as a whole number."""
    if isinstance(number, int):
        return f"{number:,}"
    return f"{number:,.0f}" if abs(number) >= 9999.5 else f"{number:,.4g}"


@dataclass(frozen=True, kw_only=True)
class Parameters(Parts):
    """Learned numbers of a model, over all its layers; `router` holds its selection bias."""

    embedding: int
    conv: int = 0
    attention: int
    ffn: int
    router: int = 0
    experts: int = 0
    shared_experts: int = 0
    norms: int
    head: int

    @property
    def without_embedding(self) -> int:
        """What takes part in products: all but the table that tokens are looked up in. A tied table is the head's."""
        return self.total - self.embedding if self.head else self.total


@dataclass(frozen=True, kw_only=True)
class Flops(Parts):
    """FLOPs of one forward pass over one sequence."""

    conv: int = 0
    attention_projections: int
    attention_scores: int
    ffn: int
    router: int = 0
    experts: int = 0
    shared_experts: int = 0
    head: int = 0


def ffn_matrices(config: LMConfig) -> int:
    """How many D × F matrices the FFN has: SwiGLU's gate, up and down, or the MLP's up and down."""
    return _matrices(config.ffn)


def _matrices(kind: str) -> int:
    return 3 if "swiglu" in kind else 2


def ffn_parameters(config: LMConfig) -> int:
    """Parameters of one layer's FFN."""
    return ffn_matrices(config) * config.d_model * config.d_ff


def attention_matrices(config: LMConfig) -> dict[str, tuple[int, int]]:
    """The matrices of one layer's attention, (outputs, inputs) each, by the names that `moe_lab.attention` has."""
    d_model, n_heads, mla = config.d_model, config.n_heads, config.mla
    if mla is None:
        queries, keys = n_heads * config.d_head, config.n_kv_heads * config.d_head
        return {"w_q": (queries, d_model), "w_k": (keys, d_model), "w_v": (keys, d_model), "w_o": (d_model, queries)}
    queries = n_heads * (mla.d_nope + mla.d_rope)
    of_queries = {"w_q": (queries, d_model)}
    if mla.q_rank is not None:
        of_queries = {"w_dq": (mla.q_rank, d_model), "w_uq": (queries, mla.q_rank)}
    return of_queries | {
        "w_dkv": (mla.kv_rank + mla.d_rope, d_model),
        "w_ukv": (n_heads * (mla.d_nope + mla.d_value), mla.kv_rank),
        "w_o": (d_model, n_heads * mla.d_value),
    }


def _attention_products(config: LMConfig) -> int:
    return sum(rows * columns for rows, columns in attention_matrices(config).values())


def attention_parameters(config: LMConfig) -> int:
    """Parameters of one layer's attention: its matrices, with biases and sinks where it has them; norms apart."""
    qkv_bias = (config.n_heads + 2 * config.n_kv_heads) * config.d_head if config.qkv_bias else 0
    output_bias = config.d_model if config.output_bias else 0
    return _attention_products(config) + qkv_bias + output_bias + (config.n_heads if config.attention_sinks else 0)


def expert_parameters(moe: MoEConfig) -> int:
    """Parameters of one routed expert."""
    matrices = _matrices(moe.expert)
    biases = (matrices - 1) * moe.d_ff + moe.d_model if moe.expert_bias else 0
    return matrices * moe.d_model * moe.d_ff + biases


def router_parameters(moe: MoEConfig) -> int:
    """Parameters of one layer's router.

    A selection bias counts: gradients do not learn it, but training does, and released weights hold it.
    """
    matrices = 2 if moe.noisy_top_k else 1
    return moe.n_experts * (matrices * moe.d_model + moe.logit_bias + moe.selection_bias)


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


def _attention_norms(config: LMConfig) -> int:
    if config.mla:
        return config.mla.kv_rank + (config.mla.q_rank or 0)
    return {"none": 0, "head": 2, "all": config.n_heads + config.n_kv_heads}[config.qk_norm] * config.d_head


def count_parameters(config: LMConfig | SwitchConfig, active: bool = False) -> Parameters:
    """Every learned number of the model, or with `active` those that one token uses: `top_k` of the routed experts.

    A tied head costs nothing, its table is the embedding's. The active count holds the whole embedding table, as many
    published figures do, though a token reads one row of it; `without_embedding` is the other convention.
    """
    if isinstance(config, SwitchConfig):
        return _count_switch(config, active)
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
        norms=config.d_model * (2 * config.n_layers + 1) + config.n_layers * _attention_norms(config),
        head=0 if config.tied_embeddings else table,
        **parts,
    )


def _count_switch(config: SwitchConfig, active: bool) -> Parameters:
    """T5's layout: a decoder layer has two attentions and three norms; position biases once in either stack."""
    n_layers = config.n_encoder_layers + config.n_decoder_layers
    one_ffn = (3 if config.gated else 2) * config.d_model * config.d_ff
    n_attentions = config.n_encoder_layers + 2 * config.n_decoder_layers
    table = config.vocab_size * config.d_model
    return Parameters(
        embedding=table,
        attention=4 * config.d_model * config.n_heads * config.d_head * n_attentions
        + 2 * T5_POSITION_BUCKETS * config.n_heads,
        ffn=(n_layers - config.n_moe_layers) * one_ffn,
        router=config.n_moe_layers * config.d_model * config.n_experts,
        experts=config.n_moe_layers * (1 if active else config.n_experts) * one_ffn,
        norms=config.d_model * (2 * config.n_encoder_layers + 3 * config.n_decoder_layers + 2),
        head=0 if config.tied_embeddings else table,
    )


@dataclass(frozen=True, kw_only=True)
class PredictionParameters(Parts):
    """A module that predicts one token further; embedding and head are the model's."""

    projection: int
    attention: int
    router: int
    experts: int
    shared_experts: int
    norms: int


def count_mtp(config: LMConfig, active: bool = False) -> PredictionParameters:
    """One multi-token prediction module: a projection of two vectors into one, and a layer of experts.

    Source: DeepSeek-V3 (2024), section 2.2, equations 21 to 23; three norms of it are not those of the layer.

    Raises:
        ValueError: a model without experts.
    """
    moe = _require_experts(config)
    return PredictionParameters(
        projection=2 * config.d_model**2,
        attention=attention_parameters(config),
        router=router_parameters(moe),
        experts=(moe.top_k if active else moe.n_experts) * expert_parameters(moe),
        shared_experts=shared_expert_parameters(moe),
        norms=5 * config.d_model + _attention_norms(config),
    )


def _require_decoder(config: LMConfig) -> None:
    if not isinstance(config, LMConfig):
        raise ValueError(f"config is a {type(config).__name__}: expected an LMConfig, a model with a decoder alone.")


def _require_experts(config: LMConfig) -> MoEConfig:
    _require_decoder(config)
    if not config.n_moe_layers:
        raise ValueError("no layer has experts: expected a model with `moe`.")
    return config.moe


def _require_count(least: int = 0, **counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: expected {least} or more, a whole number.")


# --- FLOPs ----------------------------------------------------------------------------------------------------------


def count_flops(config: LMConfig, tokens: int, causal: bool = True) -> Flops:
    """FLOPs of a forward pass over one sequence of `tokens`; a training step costs three times as much.

    With `causal`, position s pays for the s + 1 positions that it sees, or for those in its window or chunk; without,
    every pair is paid for, which is what an implementation that masks a full score matrix computes, and what
    `torch.utils.flop_counter` counts. In a layer of experts a token pays for the router, its `top_k` experts and the
    shared ones; no capacity is assumed. Latent attention is counted as in training, with keys and values of all heads.

    Raises:
        ValueError: fewer than one token.
    """
    _require_decoder(config)
    layers = [layer_flops(config, tokens, layer, causal) for layer in range(config.n_layers)]
    parts = {name: sum(getattr(layer, name) for layer in layers) for name in layers[0].by_part()}
    conv = 2 * tokens * config.d_model * config.conv_width
    return Flops(**parts | {"conv": conv, "head": 2 * tokens * config.vocab_size * config.d_model})


def layer_flops(config: LMConfig, tokens: int, layer: int = -1, causal: bool = True) -> Flops:
    """FLOPs of one layer, counted from 0 or, with a minus, from the last; see `count_flops`.

    Raises:
        ValueError: fewer than one token, or a layer that the model does not have.
    """
    _require_decoder(config)
    _require_count(1, tokens=tokens)
    layer, per_token = _layer(config, layer), 2 * tokens
    scores = {
        "attention_projections": per_token * _attention_products(config),
        "attention_scores": 2 * config.n_heads * _pair_width(config) * _pairs(config, tokens, layer, causal),
    }
    if not config.has_experts(layer):
        return Flops(**scores, ffn=per_token * ffn_parameters(config))
    moe = config.moe
    one_expert = _matrices(moe.expert) * moe.d_model * moe.d_ff
    return Flops(
        **scores,
        ffn=0,
        router=per_token * moe.n_experts * moe.d_model,
        experts=per_token * moe.top_k * one_expert,
        shared_experts=per_token * shared_expert_parameters(moe),
    )


def _layer(config: LMConfig, layer: int) -> int:
    """A layer's number from 0, also where it is counted from the last."""
    if layer not in range(-config.n_layers, config.n_layers):
        raise ValueError(f"layer={layer}: expected {-config.n_layers} to {config.n_layers - 1}.")
    return layer % config.n_layers


def _pair_width(config: LMConfig) -> int:
    """Multiply-adds of one head for one pair of positions: the score, and the value's share."""
    return config.d_head + (config.mla.d_value if config.mla else config.d_head)


def _pairs(config: LMConfig, tokens: int, layer: int, causal: bool) -> int:
    """How often a position sees another or itself in a layer."""
    if not causal:
        return tokens**2
    window = min(config.window_of(layer) or tokens, tokens)
    of_a_window = window * (window + 1) // 2  # while it fills
    if config.chunked:
        chunks, rest = divmod(tokens, window)
        return chunks * of_a_window + rest * (rest + 1) // 2
    return of_a_window + (tokens - window) * window


def _visible(config: LMConfig, positions: int) -> int:
    """How many of so many positions the last one sees, summed over the layers."""
    windows = (config.window_of(layer) for layer in range(config.n_layers))
    return sum(n_visible(positions, window, config.chunked) for window in windows)


def decode_flops(config: LMConfig, context: int) -> float:
    """FLOPs of one new token with `context` positions behind it in a cache.

    Latent attention works in the latent space, where a position costs more than in training's form; keys and values of
    all heads need not be made again for it.

    Raises:
        ValueError: a negative context.
    """
    _require_decoder(config)
    _require_count(context=context)
    per_position = config.n_heads * _pair_width(config)
    if config.mla:
        per_position = config.n_heads * (2 * config.mla.kv_rank + config.mla.d_rope)
    one_token = count_flops(config, 1)
    return one_token.total - one_token.attention_scores + 2 * per_position * _visible(config, context + 1)


def training_flops_per_token(config: LMConfig, tokens: int, causal: bool = True) -> float:
    """FLOPs of forward and backward for each token of a sequence of `tokens`; the backward pass costs two forwards."""
    return 3 * count_flops(config, tokens, causal).total / tokens


def six_nd(config: LMConfig, n_tokens: float) -> float:
    """6 N D, training's FLOPs without attention's scores: N are the active parameters that take part in products.

    Source: Kaplan et al. 2020, "Scaling Laws for Neural Language Models", section 2.1.
    """
    return 6 * count_parameters(config, active=True).without_embedding * n_tokens


# --- Bytes ----------------------------------------------------------------------------------------------------------


def bytes_of(number: str) -> float:
    """Bytes of one number in a format; in "mxfp4" half of one and its share of a scale.

    Raises:
        ValueError: a format that is not known.
    """
    if number not in BYTES:
        raise ValueError(f"number={number!r}: expected one of {', '.join(BYTES)}.")
    return BYTES[number]


def weight_bytes(config: LMConfig | SwitchConfig, number: str = "bf16", active: bool = False) -> float:
    """Bytes of all parameters, or of those that are active, if all were in one format.

    Released checkpoints mix formats: see `fp8_checkpoint_bytes` and `mxfp4_checkpoint_bytes`.
    """
    return count_parameters(config, active).total * bytes_of(number)


@dataclass(frozen=True, kw_only=True)
class TrainingBytes(Parts):
    """What training holds beside activations."""

    weights: int
    gradients: int
    master_weights: int
    moments: int


def training_bytes(
    config: LMConfig | SwitchConfig, *, gradients: int = 2, moments: int = 8, shards: int = 1
) -> TrainingBytes:
    """What a GPU holds of all parameters in mixed precision: by default 16 bytes each, as with Adam.

    bf16 weights, fp32 master weights; DeepSeek-V3 (2024, section 3.3.3) has `gradients=4, moments=4`, in fp32 and bf16.

    Source: Rajbhandari et al. 2020 (ZeRO), section 3.1.

    Args:
        gradients: bytes of a parameter's gradient.
        moments: bytes of what the optimiser remembers of it: 8 for Adam's two in fp32, 4 for one momentum, 0 for none.
        shards: over how many GPUs master weights and moments are divided (ZeRO's stage 1).

    Raises:
        ValueError: negative bytes, or fewer than one shard.
    """
    _require_count(gradients=gradients, moments=moments)
    _require_count(1, shards=shards)
    n = count_parameters(config).total
    own = math.ceil(n / shards)
    return TrainingBytes(weights=2 * n, gradients=gradients * n, master_weights=4 * own, moments=moments * own)


@dataclass(frozen=True, kw_only=True)
class ActivationBytes(Parts):
    """What one layer computes for some tokens."""

    hidden: int
    attention: int
    ffn_hidden: int = 0
    dispatched: int = 0
    expert_hidden: int = 0
    expert_outputs: int = 0


def activation_bytes(config: LMConfig, tokens: int, number: str = "bf16", layer: int = -1) -> ActivationBytes:
    """The larger tensors of one layer, if nothing is computed again: what goes in and comes out, queries, keys and
    values, and what SwiGLU is given and gives; in a layer of experts a copy of every token for each of its experts, and
    their outputs, too. Scores of attention are left out, as if no matrix of them were ever written.

    Args:
        layer: counted from 0 or, with a minus, from the last.

    Raises:
        ValueError: negative tokens, an unknown format, or a layer that the model does not have.
    """
    _require_decoder(config)
    _require_count(tokens=tokens)
    layer, per_token = _layer(config, layer), tokens * bytes_of(number)
    mla, moe = config.mla, config.moe
    keys_and_values = 2 * config.n_kv_heads * config.d_head if mla is None else config.n_heads * _pair_width(config)
    common = {
        "hidden": per_token * 2 * config.d_model,
        "attention": per_token * (config.n_heads * config.d_head + keys_and_values),
    }
    if not config.has_experts(layer):
        return ActivationBytes(**common, ffn_hidden=per_token * ffn_matrices(config) * config.d_ff)
    width = moe.top_k * moe.d_ff + moe.d_ff_shared
    return ActivationBytes(
        **common,
        dispatched=per_token * moe.top_k * moe.d_model,
        expert_hidden=per_token * _matrices(moe.expert) * width,
        expert_outputs=per_token * moe.top_k * moe.d_model,
    )


@dataclass(frozen=True, kw_only=True)
class ModelActivationBytes(Parts):
    """What a whole model keeps of some tokens until the backward pass has used it."""

    layers: int
    layer_inputs: int = 0
    logits: int


def model_activation_bytes(
    config: LMConfig, tokens: int, number: str = "bf16", recompute: bool = False
) -> ModelActivationBytes:
    """`activation_bytes` of all layers, and the logits.

    With `recompute` each layer keeps its input alone, and computes the rest again when the backward pass comes to it;
    then one layer, the largest, is there in full. What one layer gives and the next is given is one tensor.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174), section 4.

    Raises:
        ValueError: negative tokens, or an unknown format.
    """
    _require_decoder(config)
    _require_count(tokens=tokens)
    one = tokens * bytes_of(number)
    stream, logits = one * config.d_model, one * config.vocab_size
    layers = [activation_bytes(config, tokens, number, layer).total for layer in range(config.n_layers)]
    if recompute:
        return ModelActivationBytes(layers=max(layers), layer_inputs=(config.n_layers - 1) * stream, logits=logits)
    return ModelActivationBytes(layers=sum(layers) - (config.n_layers - 1) * stream, logits=logits)


def fp8_checkpoint_bytes(config: LMConfig) -> int:
    """Bytes of the weights as DeepSeek-V3 was released, without its prediction module (`count_mtp`).

    Matrices of attention and FFNs are fp8, with an fp32 scale for every block of 128 × 128; embedding, head, routers
    and norms bf16; selection biases fp32.

    Source: DeepSeek-V3's README_WEIGHTS.md, and the dtypes in its released files.
    """
    _require_decoder(config)
    moe, n_moe = config.moe, config.n_moe_layers
    ffn = [(config.n_layers - n_moe, ffn_matrices(config), config.d_model, config.d_ff)]
    if moe:
        matrices = _matrices(moe.expert)
        ffn.append((n_moe * moe.n_experts, matrices, config.d_model, moe.d_ff))
        if moe.n_shared_experts:
            ffn.append((n_moe, matrices, config.d_model, moe.d_ff_shared))
    fp8 = [(config.n_layers, *matrix) for matrix in attention_matrices(config).values()]
    fp8 += [(copies * matrices, rows, columns) for copies, matrices, rows, columns in ffn]
    numbers = sum(copies * rows * columns for copies, rows, columns in fp8)
    scales = sum(copies * -(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK) for copies, rows, columns in fp8)
    biases = n_moe * moe.n_experts if moe and moe.selection_bias else 0
    others = count_parameters(config).total - numbers - biases
    return numbers + 2 * others + 4 * (scales + biases)


def mxfp4_checkpoint_bytes(config: LMConfig) -> int:
    """Bytes of the weights as gpt-oss was released: experts' matrices in MXFP4, the rest in bf16.

    Source: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", section 2.1.

    Raises:
        ValueError: a model without experts.
    """
    moe = _require_experts(config)
    numbers = config.n_moe_layers * moe.n_experts * _matrices(moe.expert) * moe.d_model * moe.d_ff
    return int(numbers * MXFP4_BITS / 8) + 2 * (count_parameters(config).total - numbers)


def cache_numbers(config: LMConfig) -> int:
    """Numbers that attention keeps of one token in one layer: keys and values, or the latent vector and a key."""
    _require_decoder(config)
    if config.mla:
        return config.mla.kv_rank + config.mla.d_rope
    return 2 * config.n_kv_heads * config.d_head


def cache_bytes(config: LMConfig, tokens: int = 1, number: str = "bf16") -> int:
    """Bytes that all layers keep of one sequence: of the positions that its last token sees.

    A layer with a window keeps that many positions at most; one with chunks lets go of them where a chunk ends, so that
    the most is kept just before.

    Raises:
        ValueError: negative tokens, or an unknown format.
    """
    _require_decoder(config)
    _require_count(tokens=tokens)
    return _visible(config, tokens) * cache_numbers(config) * bytes_of(number)


# --- What a batch touches -------------------------------------------------------------------------------------------


def distinct_experts(n_experts: int, top_k: int, batch: int) -> float:
    """How many of a layer's experts a batch of tokens touches, on average: `E (1 - (1 - K / E)^B)`.

    Tokens choose independently, every expert as often as any other. Real ones are alike, and touch fewer.

    Raises:
        ValueError: more chosen than there are, a negative batch, or parts of experts or tokens.
    """
    _require_count(batch=batch)
    _require_count(1, n_experts=n_experts)
    _require_count(top_k=top_k)
    if not 0 < top_k <= n_experts:
        raise ValueError(f"top_k={top_k}: expected 1 to n_experts={n_experts}.")
    return n_experts * (1 - (1 - top_k / n_experts) ** batch)


def decode_reads(config: LMConfig, batch: int) -> float:
    """Parameters that one decode step reads for `batch` sequences, a token each; experts as in `distinct_experts`.

    Raises:
        ValueError: a negative batch.
    """
    _require_decoder(config)
    _require_count(batch=batch)
    active, moe = count_parameters(config, active=True), config.moe
    if moe is None:
        return active.without_embedding
    touched = config.n_moe_layers * distinct_experts(moe.n_experts, moe.top_k, batch) * expert_parameters(moe)
    return active.without_embedding - active.experts + touched


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Several results side by side, as aligned text: by the name of each column, its rows."""
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    cells = [["", *columns]] + [
        [name.replace("_", " "), *(as_text(rows[name]) if name in rows else "–" for rows in columns.values())]
        for name in names
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = (
        [f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))] for row in cells
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


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
