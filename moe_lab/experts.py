"""The routed experts: their weights stacked into one tensor, multiplied group by group."""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_lab.config import MoEConfig
from moe_lab.ffn import ACTIVATIONS
from moe_lab.ops import GROUPED_MM, grouped_mm

# gpt-oss's constants (openai/gpt-oss, gpt_oss/torch/model.py, `swiglu`)
CLAMP, SLOPE = 7.0, 1.702


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's gate, `(up + 1) * gate * sigmoid(1.702 gate)`, with both branches clamped at 7."""
    gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    return (up + 1) * gate * torch.sigmoid(SLOPE * gate)


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "clamped_swiglu": clamped_swiglu,
}


class _AddBias(torch.autograd.Function):
    """Adds each expert's bias (E, O) to its rows (R, O); backward sums every expert's stretch in order."""

    @staticmethod
    def forward(ctx, rows: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.dtype = bias.dtype
        owners = torch.searchsorted(offsets, torch.arange(len(rows), device=rows.device), right=True)
        return rows + bias.to(rows.dtype).index_select(0, owners)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (offsets,) = ctx.saved_tensors
        ends = F.pad(offsets, (1, 0)).long()
        exact = dy.to(torch.promote_types(dy.dtype, torch.float32))  # long sums, at least in fp32
        sums = torch.segment_reduce(exact, "sum", offsets=ends, axis=0, initial=0, unsafe=True)
        return dy, sums.to(ctx.dtype), None


class Experts(nn.Module):
    """E small FFNs side by side.

    The weights are `w_gate` and `w_up`, (E, F, D), and `w_down`, (E, D, F), the biases `b_gate`, `b_up` and `b_down`.
    Gate and up are read by the same rows, so they are kept as one tensor, `w_in` (E, 2F, D), gates first: one product
    in place of two. Ungated kinds have no gate, and `w_in` is `w_up`.

    Args:
        impl: how rows meet their expert's matrices: a key of `moe_lab.ops.GROUPED_MM`, or "auto".

    Raises:
        ValueError: an `impl` that does not exist.
    """

    def __init__(self, config: MoEConfig, impl: str = "auto") -> None:
        super().__init__()
        if impl not in ("auto", *GROUPED_MM):
            raise ValueError(f"impl={impl!r}: expected one of auto, {', '.join(GROUPED_MM)}.")
        self.kind, self.impl = config.expert, impl
        n, width, d_model = config.n_experts, config.d_ff, config.d_model
        self.is_gated, biased = config.expert in GATED, config.expert_bias

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        n_in = 2 * width if self.is_gated else width
        self.w_in = parameter(n, n_in, d_model)
        self.w_down = parameter(n, d_model, width)
        self.b_in = parameter(n, n_in) if biased else None
        self.b_down = parameter(n, d_model) if biased else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: every matrix from N(0, 1 / fan_in), biases at 0."""
        for name, parameter in self.named_parameters():
            if name.startswith("b_"):
                parameter.zero_()
            else:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Rows sorted by expert, (R, D) to (R, D); expert e has those from `offsets[e - 1]` to `offsets[e]`."""

        def product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            y = grouped_mm(x, w, offsets, self.impl)
            return y if b is None else _AddBias.apply(y, b, offsets)

        return self._ffn(rows, product)

    def one(self, expert: int, x: Tensor) -> Tensor:
        """What one expert computes, (..., D) to (..., D), in plain matrix products."""

        def product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return F.linear(x, w[expert], None if b is None else b[expert])

        return self._ffn(x, product)

    def take(self, ids: Sequence[int]) -> "Experts":
        """Some of the experts, in the order of `ids`, with copies of their weights."""
        taken = copy.copy(self)
        taken.__dict__ |= {name: value.copy() for name, value in vars(self).items() if isinstance(value, dict)}
        taken._parameters = {
            name: None if whole is None else nn.Parameter(whole.detach()[list(ids)], whole.requires_grad)
            for name, whole in self._parameters.items()
        }
        return taken

    def _ffn(self, x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        inner = product(x, self.w_in, self.b_in)  # (..., 2F), or (..., F) without a gate
        hidden = GATED[self.kind](*inner.chunk(2, -1)) if self.is_gated else ACTIVATIONS[self.kind](inner)
        return product(hidden, self.w_down, self.b_down)

    @property
    def w_gate(self) -> Tensor | None:
        """(E, F, D), a view of the first half of `w_in`; None where there is no gate."""
        return self.w_in.chunk(2, 1)[0] if self.is_gated else None

    @property
    def w_up(self) -> Tensor:
        """(E, F, D), a view of the second half of `w_in`; without a gate, all of it."""
        return self.w_in.chunk(2, 1)[1] if self.is_gated else self.w_in
