"""The feed-forward network of a transformer block: the plain two-matrix MLP, and SwiGLU with three."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.config import LMConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


def mlp(x: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """`y = relu(x W_up^T) W_down^T`; `w_up` is (F, D) and `w_down` (D, F), as `nn.Linear` keeps them.

    Source: Vaswani et al. 2017, "Attention Is All You Need", equation 2 (here without biases, as in current models).
    """
    return F.relu(x @ w_up.T) @ w_down.T


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """`y = (silu(x W_gate^T) * x W_up^T) W_down^T`; `w_gate` and `w_up` are (F, D), `w_down` is (D, F).

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 6 (FFN_SwiGLU).
    """
    return (F.silu(x @ w_gate.T) * (x @ w_up.T)) @ w_down.T


def keep_strongest(hidden: Tensor, w_down: Tensor, share: float) -> Tensor:
    """Zero all but each token's strongest neurons; (..., F) to (..., F), at least one neuron is kept.

    A neuron's strength for a token is what it writes into the output, `|hidden_i|` times the length of its
    column of `w_down` (D, F).

    Raises:
        ValueError: `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a number in (0, 1].")
    strength = hidden.abs() * w_down.norm(dim=0)
    kept = strength.topk(max(1, round(share * hidden.shape[-1])), dim=-1).indices
    return torch.zeros_like(hidden).scatter(-1, kept, hidden.gather(-1, kept))


class MLP(nn.Module):
    """`mlp` as a module, with a choice of activation."""

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}.")
        self.activation = activation
        self.w_up = nn.Linear(d_model, d_ff, bias=False)
        self.w_down = nn.Linear(d_ff, d_model, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """The neurons' activations, (..., D) to (..., F)."""
        return ACTIVATIONS[self.activation](self.w_up(x))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w_down(self.hidden(x))


class SwiGLU(nn.Module):
    """`swiglu` as a module."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(d_model, d_ff, bias=False)
        self.w_up = nn.Linear(d_model, d_ff, bias=False)
        self.w_down = nn.Linear(d_ff, d_model, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """The neurons' gated activations, (..., D) to (..., F)."""
        return F.silu(self.w_gate(x)) * self.w_up(x)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w_down(self.hidden(x))


def make_ffn(config: LMConfig) -> MLP | SwiGLU:
    """The dense FFN that a configuration asks for."""
    if config.ffn == "swiglu":
        return SwiGLU(config.d_model, config.d_ff)
    return MLP(config.d_model, config.d_ff, config.ffn)
