"""Everybody who computes the same thing: our kernels, torch's, transformers', Liger's …; on the same tensors."""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.bench.layers import Shape
from moe_lab.config import MoEConfig
from moe_lab.dispatch import combine, permute, sort_choices
from moe_lab.experts import Experts
from moe_lab.gpu.measure import Run, why
from moe_lab.ops import grouped_mm, moe_mlp
from moe_lab.ops.grouped_mm import launches
from moe_lab.ops.tiles import choose_tiles
from moe_lab.records import DispatchPlan

LOADS = ("balanced", "zipf", "half")
TORCH, UNFUSED, FUSED = "torch path", "ours, step by step", "ours, fused"
TRANSFORMERS, LIGER = "transformers grouped_mm", "liger"
GROUPED_MM, LOOP, DENSE = "F.grouped_mm", "loop of torch.mm", "dense cuBLAS"
GROUPED_MM_BF16 = "grouped_mm_bf16"  # a package in Triton alone, with the same call as torch's
PORTABLE, TMA = "ours, portable", "ours, TMA"


def choices(shape: Shape, load: str, device: str, seed: int = 0) -> Tensor:
    """(T, K) int64, the experts that each token chose.

    "balanced": all experts get the same number of rows, or within one of it; a token's experts differ. "zipf": a token
    draws its experts with weights 1, 1/2, 1/3, …, none twice. "half": half of all rows go to one expert, the rest
    evenly to all. With k 8 that takes tokens that name it four times, which no router does; a kernel sees rows alone.
    """
    n_tokens, n_experts, top_k = shape.n_tokens, shape.n_experts, shape.top_k
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, device=device, generator=generator)

    if load == "zipf":
        wanted = -torch.arange(1, n_experts + 1, device=device).log()
        gumbel = -(-uniform(n_tokens, n_experts).clamp(min=1e-7).log()).log()
        return (wanted + gumbel).topk(top_k).indices
    n_rounds = -(-n_tokens * top_k // n_experts)  # in each of which every expert is named once
    even = uniform(n_rounds, n_experts).argsort(dim=1).flatten()[: n_tokens * top_k].view(n_tokens, top_k)
    if load == "half":
        even[:, : top_k // 2] = 0
    return even


@dataclass
class Inputs:
    """A layer's experts, and several batches for them, each with a routing of its own."""

    shape: Shape
    w_in: Tensor
    w_down: Tensor
    x: list[Tensor]
    dy: list[Tensor]
    chosen: list[Tensor]
    weights: list[Tensor]

    @property
    def device(self) -> str:
        return self.w_in.device.type

    def plan(self, which: int) -> DispatchPlan:
        """Rows of the choices, sorted by expert: every block's first step, so that it is part of its time."""
        return sort_choices(self.chosen[which], self.shape.n_experts)


def make_inputs(shape: Shape, load: str, device: str, dtype: torch.dtype, n_sets: int = 3) -> Inputs:
    """Random tensors; one set of experts, whose matrices (0.8 GB and more) push everything out of a cache of 60 MB."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        drawn = torch.empty(size, device=device, dtype=dtype).normal_(0, std, generator=generator)
        return drawn.requires_grad_()

    sizes = shape.n_tokens, shape.d_model
    weights = [
        torch.rand(shape.n_tokens, shape.top_k, device=device, generator=generator).softmax(-1) for _ in range(n_sets)
    ]
    return Inputs(
        shape,
        normal(shape.n_experts, 2 * shape.d_ff, shape.d_model, std=shape.d_model**-0.5),
        normal(shape.n_experts, shape.d_model, shape.d_ff, std=shape.d_ff**-0.5),
        [normal(*sizes) for _ in range(n_sets)],
        [normal(*sizes).detach() for _ in range(n_sets)],
        [choices(shape, load, device, seed) for seed in range(n_sets)],
        [w.requires_grad_() for w in weights],
    )


# --- The grouped product --------------------------------------------------------------------------------------------


def can_tma(device: str) -> bool:
    """Whether descriptors work here: on GPUs from Hopper on, and in the interpreter."""
    return device == "cpu" or torch.cuda.get_device_capability() >= (9, 0)


def products(inputs: Inputs, which_product: str) -> tuple[dict[str, Run | str], tuple[int, int, int]]:
    """Candidates for one product of the block, on rows that are sorted already; and its rows, K and N.

    "in" is x to gate and up, (R, D) to (R, 2F); "down" hidden to expert outputs, (R, F) to (R, D). The loop knows its
    offsets on the host, for free. The dense product takes all rows to one expert's matrix.
    """
    w = (inputs.w_in if which_product == "in" else inputs.w_down).detach()
    n_groups, n_out, n_in = w.shape
    n_rows = inputs.shape.n_tokens * inputs.shape.top_k
    rows = [torch.randn(n_rows, n_in, device=w.device, dtype=w.dtype) for _ in inputs.x]
    offsets = [inputs.plan(i).offsets for i in range(len(rows))]
    ends = [offset.tolist() for offset in offsets]

    def ours(tma: bool) -> Run:
        def run(i: int) -> tuple[Tensor]:
            with launches().using(tma=tma):
                return (grouped_mm(rows[i], w, offsets[i], "triton"),)

        return run

    def loop(i: int) -> tuple[Tensor]:
        y = rows[i].new_empty(n_rows, n_out)
        for group, (start, end) in enumerate(zip([0, *ends[i]], ends[i], strict=False)):
            if end > start:
                torch.mm(rows[i][start:end], w[group].T, out=y[start:end])
        return (y,)

    candidates: dict[str, Run | str] = {
        PORTABLE: ours(False),
        TMA: ours(True) if can_tma(inputs.device) else "needs a GPU of compute capability 9.0",
        GROUPED_MM: lambda i: (F.grouped_mm(rows[i], w.mT, offs=offsets[i]),),
        GROUPED_MM_BF16: _grouped_mm_bf16(inputs.device, rows, w, offsets),
        LOOP: loop,
        DENSE: lambda i: (torch.mm(rows[i], w[i % n_groups].T),),
    }
    return candidates, (n_rows, n_in, n_out)


def _grouped_mm_bf16(device: str, rows: list[Tensor], w: Tensor, offsets: list[Tensor]) -> Run | str:
    try:
        from grouped_mm_bf16 import grouped_mm as theirs
    except Exception as error:  # not installed, or not as it was
        return why(error)
    if device != "cuda":
        return "its kernels need a GPU"
    return lambda i: (theirs(rows[i], w.mT, offs=offsets[i]),)


def by_default(shape: Shape, capability: int, element_size: int = 2) -> str:
    """Which of our two paths `grouped_mm` takes for this shape."""
    tiles = choose_tiles(capability, element_size, shape.n_tokens * shape.top_k, shape.n_experts)
    return TMA if tiles.tma else PORTABLE


# --- The block ------------------------------------------------------------------------------------------------------

Forward = Callable[[int], Tensor]


def blocks(inputs: Inputs) -> dict[str, Forward | str]:
    """Candidates for the block: from x, the choices and their weights to y."""
    made: dict[str, Forward | str] = {FUSED: fused(inputs)}
    makers = {UNFUSED: _by_steps("triton"), TORCH: _by_steps("torch"), TRANSFORMERS: _transformers, LIGER: _liger}
    for name, make in makers.items():
        try:
            made[name] = make(inputs)
        except Exception as error:  # a peer that is not installed, or not as it was
            made[name] = why(error)
    return made


def passes(inputs: Inputs, made: dict[str, Forward | str], backward: bool) -> dict[str, Run | str]:
    """The same as candidates for `compare`: forward as in training, which keeps what backward needs; or both passes."""

    def both(forward: Forward) -> Run:
        def run(i: int) -> tuple[Tensor, ...]:
            y = forward(i)
            if not backward:
                return (y.detach(),)
            return (y.detach(), *torch.autograd.grad(y, _differentiated(inputs, i), inputs.dy[i]))

        return run

    return {name: forward if isinstance(forward, str) else both(forward) for name, forward in made.items()}


def _differentiated(inputs: Inputs, i: int) -> tuple[Tensor, ...]:
    return inputs.x[i], inputs.w_in, inputs.w_down, inputs.weights[i]


def fused(inputs: Inputs) -> Forward:
    """Our block in one piece, `moe_lab.ops.moe_mlp`."""

    def forward(i: int) -> Tensor:
        x, w_in, w_down, weights = _differentiated(inputs, i)
        return moe_mlp(x, w_in, w_down, inputs.plan(i), weights, "triton")

    return forward


def _by_steps(impl: str) -> Callable[[Inputs], Forward]:
    def make(inputs: Inputs) -> Forward:
        shape = inputs.shape
        config = MoEConfig(d_model=shape.d_model, d_ff=shape.d_ff, n_experts=shape.n_experts, top_k=shape.top_k)
        with torch.device("meta"):
            experts = Experts(config, impl)
        _give(experts, w_in=inputs.w_in, w_down=inputs.w_down)

        def forward(i: int) -> Tensor:
            plan = inputs.plan(i)
            return combine(experts(permute(inputs.x[i], plan), plan.offsets), plan, inputs.weights[i])

        return forward

    return make


def _give(module: nn.Module, **tensors: Tensor) -> None:
    """Put tensors in the place of a module's parameters, so that all candidates work on the same ones."""
    for name, tensor in tensors.items():
        if getattr(module, name).shape != tensor.shape:
            raise ValueError(f"{name} is {tuple(getattr(module, name).shape)}: expected {tuple(tensor.shape)}.")
        del module._parameters[name]
        setattr(module, name, tensor)


def _transformers(inputs: Inputs) -> Forward:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    shape = inputs.shape
    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_local_experts=shape.n_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = MixtralExperts(config)
    _give(experts, gate_up_proj=inputs.w_in, down_proj=inputs.w_down)
    # it multiplies by the weights in their dtype: in fp32 it would spend its time on rows of fp32
    return lambda i: experts(inputs.x[i], inputs.chosen[i], inputs.weights[i].to(inputs.x[i].dtype))


def _liger(inputs: Inputs) -> Forward:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    if inputs.device != "cuda":
        raise RuntimeError("its kernels need a GPU")
    chosen = [experts.int() for experts in inputs.chosen]

    def forward(i: int) -> Tensor:
        x, w_in, w_down, weights = _differentiated(inputs, i)
        return LigerFusedMoEFunction.apply(x, w_in, w_down, chosen[i], weights)

    return forward


def peers() -> dict[str, str]:
    """The versions of those who are measured beside us, or why there is none."""
    found = {}
    modules = {
        "transformers": "transformers",
        "liger-kernel": "liger_kernel.ops.fused_moe",
        "grouped-mm-bf16": "grouped_mm_bf16",  # no extra of ours: its wheel brings a top-level package `bench` along
    }
    for package, module in modules.items():
        try:
            importlib.import_module(module)
            found[package] = importlib.metadata.version(package)
        except Exception as error:
            found[package] = why(error)
    return found
