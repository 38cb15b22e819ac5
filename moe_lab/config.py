"""The sizes of a model, validated where they are made. No torch: `accounting` counts from these alone."""

from dataclasses import dataclass, replace
from typing import Self

FFN_KINDS = ("swiglu", "relu", "gelu")


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r}: expected {expected}.")


def _require_positive_int(config: object, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        _require(is_int and value > 0, field, value, "a positive integer")


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A decoder-only language model, LLaMA's layout: RMSNorm, RoPE, grouped-query attention, an FFN per layer.

    `n_kv_heads` and `d_head` default to what they are in plain multi-head attention. The two switches that
    LLaMA does not have are for models of a few hundred kilobytes: `conv_width` puts a short causal convolution
    on the embeddings (0 leaves it out), `tied_embeddings` uses one table for input and output.

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
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require_positive_int(self, "d_model", "n_layers", "n_heads", "d_ff", "vocab_size")
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.d_head is None:
            fits = self.d_model % self.n_heads == 0
            expected = f"a divisor of d_model={self.d_model}, or an explicit d_head"
            _require(fits, "n_heads", self.n_heads, expected)
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        _require_positive_int(self, "n_kv_heads", "d_head")
        divides = self.n_heads % self.n_kv_heads == 0
        _require(divides, "n_kv_heads", self.n_kv_heads, f"a divisor of n_heads={self.n_heads}")
        _require(self.d_head % 2 == 0, "d_head", self.d_head, "an even number (RoPE turns pairs)")
        _require(self.ffn in FFN_KINDS, "ffn", self.ffn, f"one of {', '.join(FFN_KINDS)}")
        is_width = isinstance(self.conv_width, int) and not isinstance(self.conv_width, bool)
        _require(is_width and self.conv_width >= 0, "conv_width", self.conv_width, "an integer of 0 or more")
        _require(self.rope_theta > 0, "rope_theta", self.rope_theta, "a positive number")
        _require(self.norm_eps > 0, "norm_eps", self.norm_eps, "a positive number")

    def but(self, **changes: object) -> Self:
        """The same configuration with some fields changed, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train. The learning rate warms up linearly, then falls along a cosine to zero.

    One step sees `batch_size * context` tokens.

    Raises:
        ValueError: a field that cannot be, with its name, its value and what was expected.
    """

    steps: int = 500
    batch_size: int = 16
    context: int = 64
    learning_rate: float = 1e-2
    warmup_steps: int = 20
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require_positive_int(self, "steps", "batch_size", "context")
        is_count = isinstance(self.warmup_steps, int) and self.warmup_steps >= 0
        _require(is_count, "warmup_steps", self.warmup_steps, "an integer of 0 or more")
        _require(self.learning_rate > 0, "learning_rate", self.learning_rate, "a positive number")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number of 0 or more")
        _require(self.clip_norm > 0, "clip_norm", self.clip_norm, "a positive number")
        in_range = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        _require(in_range, "betas", self.betas, "two numbers in [0, 1)")

    def but(self, **changes: object) -> Self:
        """The same configuration with some fields changed, validated again."""
        return replace(self, **changes)
