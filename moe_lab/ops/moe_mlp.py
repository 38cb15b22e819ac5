"""The routed experts' part of an MoE layer in one piece: rows out of tokens, SwiGLU, and back into tokens.

The contract, for every variant in `MOE_MLP`:

    x (T, D), w_in (E, 2F, D), w_down (E, D, F), plan, weights (T, K) -> (T, D)

`y[t] = Σ_k weights[t, k] · w_down[e] @ (silu(w_gate[e] @ x[t]) * (w_up[e] @ x[t]))` over the K experts e that token t
chose, where `w_in` holds w_gate above w_up. Experts without biases, weighed at their output, and none of them full:
what is otherwise is computed step by step, by `permute`, `Experts` and `combine`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.ops.grouped_mm import GROUPED_MM, launches, require_offsets
from moe_lab.records import DispatchPlan


def moe_mlp(
    x: Tensor, w_in: Tensor, w_down: Tensor, plan: DispatchPlan, weights: Tensor, impl: str = "reference"
) -> Tensor:
    """The experts' part by one of the variants in `MOE_MLP`; gradients reach x, both matrices and the weights.

    Args:
        weights: fp32, or the dtype of x.

    Raises:
        ValueError: a variant that does not exist, or does not take these tensors; shapes, dtypes or devices that do not
            fit each other; a plan with a capacity.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, w_in, w_down = x.to(dtype), w_in.to(dtype), w_down.to(dtype)
    if impl not in MOE_MLP:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(MOE_MLP)}.")
    _require_fit(x, w_in, w_down, plan, weights)
    return MOE_MLP[impl](x, w_in, w_down, plan, weights)


def _require_fit(x: Tensor, w_in: Tensor, w_down: Tensor, plan: DispatchPlan, weights: Tensor) -> None:
    if plan.capacity is not None:
        raise ValueError(f"the plan has a capacity of {plan.capacity}: expected none, so that every choice has a row.")
    n_experts, d_model, width = w_down.shape if w_down.ndim == 3 else (0, 0, 0)
    n_choices = plan.choice_rows.numel()
    if plan.row_choices.shape != (n_choices,):
        raise ValueError(f"the plan has {plan.n_rows} rows for {n_choices} choices: expected one for each.")
    given = [tuple(t.shape) for t in (x, w_in, w_down, weights)]
    expected = [(weights.shape[0], d_model), (n_experts, 2 * width, d_model), (n_experts, d_model, width)]
    if given[:3] != expected or given[3] != tuple(plan.choice_rows.shape):
        raise ValueError(
            "x, w_in, w_down and weights have shapes {}, {}, {}, {}: expected (T, D), (E, 2F, D), (E, D, F), (T, K), "
            "with the plan's T={} and K={}.".format(*given, *plan.choice_rows.shape)
        )
    for name, tensor in (("w_in", w_in), ("w_down", w_down), ("weights", weights), ("plan", plan.row_choices)):
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, {name} on {tensor.device}: move one of them with .to(...).")
    if not x.dtype == w_in.dtype == w_down.dtype:
        raise ValueError(f"x is {x.dtype}, w_in {w_in.dtype}, w_down {w_down.dtype}: convert them to one dtype.")
    if weights.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"weights are {weights.dtype}: expected fp32, or {x.dtype} as x is.")
    require_offsets(plan.offsets, n_experts, plan.row_choices)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if n_choices and int(plan.offsets[-1]) < n_choices:
        raise ValueError(f"the plan's last rows end at {int(plan.offsets[-1])}: expected at its {n_choices} choices.")


def reference(x: Tensor, w_in: Tensor, w_down: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    """The steps one after the other, in any dtype."""
    product = GROUPED_MM["reference"]
    gate, up = product(x[plan.row_tokens], w_in, plan.offsets).chunk(2, -1)  # (R, F) each
    rows = product(F.silu(gate) * up, w_down, plan.offsets)  # (R, D)
    rows = rows * weights.flatten()[plan.row_choices, None].to(rows.dtype)
    of_choices = torch.zeros_like(rows).index_copy(0, plan.row_choices, rows)  # (T·K, D)
    return of_choices.view(*weights.shape, x.shape[1]).sum(1)


def triton_kernels(x: Tensor, w_in: Tensor, w_down: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    """Two products, each one kernel with what stands around it, and no tensor of T·K rows of D but the last.

    For NVIDIA GPUs from Ampere on; without a host sync, and the same bits every time. For the backward pass it keeps x
    and what SwiGLU was given, (R, 2F). With few tokens Python takes longer to launch the kernels than a GPU to run
    them: capture such calls in a CUDA graph.
    """
    return launches().mlp(x, w_in, w_down, plan, weights)


MOE_MLP: dict[str, Callable[[Tensor, Tensor, Tensor, DispatchPlan, Tensor], Tensor]] = {
    "reference": reference,
    "triton": triton_kernels,
}
