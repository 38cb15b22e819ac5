"""The dispatch variants side by side: forward and backward of one layer of experts, by every way there is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from moe_lab.bench.timing import compare
from moe_lab.config import MoEConfig
from moe_lab.dispatch import combine, make_plan, permute
from moe_lab.hugging_face import to_hugging_face
from moe_lab.moe import MoE, moe_loop, moe_reference
from moe_lab.ops import GROUPED_MM

PEERS = ("transformers eager", "transformers grouped_mm")
GUMBEL_STD = math.pi / math.sqrt(6)


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer of SwiGLU experts and of its batch."""

    n_tokens: int
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int

    def __str__(self) -> str:
        return f"T {self.n_tokens} D {self.d_model} F {self.d_ff} E {self.n_experts} k {self.top_k}"

    @property
    def bytes_moved(self) -> int:
        """The least that forward and backward must read and write in fp32, whoever computes them.

        Weights are read twice and their gradients written once. Of a routed row (R in all): its input, its output and
        both of their gradients are written once and read once; of its hidden numbers the two branches.
        """
        weights = 3 * 3 * self.n_experts * self.d_model * self.d_ff
        rows = self.n_tokens * self.top_k * (8 * self.d_model + 8 * self.d_ff)
        return 4 * (weights + rows)


SHAPES = (
    Shape(2048, 64, 64, 8, 2),
    Shape(2048, 64, 16, 64, 8),
    Shape(1024, 128, 256, 8, 2),
    Shape(1024, 128, 32, 64, 8),
)
SWEEP = tuple(Shape(2048, 64, 64, n_experts, 2) for n_experts in (8, 16, 32, 64, 128, 256))
LOADS = ("balanced", "skewed")


def layer_and_input(shape: Shape, skewed: bool = False, seed: int = 0) -> tuple[MoE, Tensor]:
    """A layer and a batch (T, D) that it routes evenly, or `skewed`.

    Skewed, a token draws its experts about with weights 1, 1/2, 1/3, …, none of them twice.

    The first number of every token is 1, so that the first column of the router's matrix acts as a bias: the logarithm
    of the wanted probabilities. The other columns add noise of the size that makes a largest-of-all choice a draw.
    """
    torch.manual_seed(seed)
    config = MoEConfig(
        d_model=shape.d_model, d_ff=shape.d_ff, n_experts=shape.n_experts, top_k=shape.top_k, normalise=True
    )
    layer, x = MoE(config), torch.randn(shape.n_tokens, shape.d_model)
    x[:, 0] = 1
    with torch.no_grad():
        noise = torch.nn.functional.normalize(torch.randn(shape.n_experts, shape.d_model - 1))
        wanted = -torch.arange(1, shape.n_experts + 1).log() if skewed else torch.zeros(shape.n_experts)
        layer.router.weight.copy_(torch.cat([wanted[:, None], GUMBEL_STD * noise], 1))
    return layer, x.requires_grad_()


def variants(shape: Shape, skewed: bool = False, peers: bool = False) -> dict[str, Callable[[], None]]:
    """One forward and backward of the same layer and batch, router included, by every way there is to compute it."""
    layer, x = layer_and_input(shape, skewed)
    dy = torch.randn(x.shape)

    def step(forward: Callable[[Tensor], Tensor], module: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            module.zero_grad(set_to_none=True)
            forward(x).backward(dy)

        return run

    def with_impl(impl: str) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            layer.experts.impl = impl
            return layer(x)[0]

        return forward

    found = {
        "every expert": step(lambda x: moe_reference(x, layer.router(x), layer.experts.one), layer),
        "loop": step(lambda x: moe_loop(x, layer.router(x), layer.experts.one), layer),
        **{impl: step(with_impl(impl), layer) for impl in GROUPED_MM if impl != "triton"},  # which is for GPUs
        "auto": step(with_impl("auto"), layer),
    }
    if peers:
        for name in PEERS:
            block = transformers_block(shape, layer, name.removeprefix("transformers "))
            found[name] = step(lambda x, block=block: block(x[None])[0], block)
    return found


def transformers_block(shape: Shape, layer: MoE, implementation: str) -> torch.nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_local_experts=shape.n_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    block.load_state_dict(to_hugging_face("mixtral", layer.state_dict()))
    return block


def parts(shape: Shape, skewed: bool = False) -> dict[str, Callable[[], None]]:
    """Forward and backward of the layer's three parts, each alone: router, dispatch (there and back), experts."""
    layer, x = layer_and_input(shape, skewed)
    routing = layer.router(x.detach())
    plan = make_plan(routing)
    rows = permute(x.detach(), plan).requires_grad_()
    weights = routing.topk_weights.detach().requires_grad_()
    dy, d_rows = torch.randn(x.shape), torch.randn(rows.shape)

    def router() -> None:
        x.grad = layer.router.weight.grad = None
        layer.router(x).topk_weights.backward(weights.detach())

    def dispatch() -> None:
        x.grad = weights.grad = None
        plan = make_plan(routing)
        combine(permute(x, plan), plan, weights).backward(dy)

    def experts() -> None:
        rows.grad = None
        layer.experts.zero_grad(set_to_none=True)
        layer.experts(rows, plan.offsets).backward(d_rows)

    return {"router": router, "dispatch": dispatch, "experts": experts}


MOST_EXPERTS_FOR_ALL = 64  # above, computing every expert on every token takes seconds a round and says nothing new


def measure(shape: Shape, skewed: bool, rounds: int, peers: bool) -> dict:
    """All variants at one shape and load, as a plain record: seconds, parts, and how full the fullest expert is."""
    layer, x = layer_and_input(shape, skewed)
    counts = layer.router(x).tokens_per_expert
    candidates = variants(shape, skewed, peers)
    if shape.n_experts > MOST_EXPERTS_FOR_ALL:
        del candidates["every expert"]
    return {
        "shape": asdict(shape),
        "load": LOADS[skewed],
        "fullest_over_mean": counts.max().item() / counts.float().mean().item(),
        "seconds": {name: asdict(timing) for name, timing in compare(candidates, rounds).items()},
        "parts": {name: asdict(timing) for name, timing in compare(parts(shape, skewed), rounds).items()},
    }


def table(results: Mapping) -> str:
    """The results as a Markdown table: how many times faster than the fastest of transformers, or than the loop."""
    names = list(dict.fromkeys(name for record in results["records"] for name in record["seconds"]))
    lines = [f"| {' | '.join(['shape', 'load', 'fullest / mean', *names, 'router : dispatch : experts'])} |"]
    lines.append("|" + "---|" * (len(names) + 4))
    for record in results["records"]:
        seconds = {name: timing["median"] for name, timing in record["seconds"].items()}
        unit = base_of(seconds)
        cells = [f"{unit / seconds[name]:.2f}" if name in seconds else "–" for name in names]
        total = sum(part["median"] for part in record["parts"].values())
        shares = " : ".join(f"{100 * part['median'] / total:.0f}" for part in record["parts"].values())
        load = [record["load"], f"{record['fullest_over_mean']:.1f}"]
        lines.append(f"| {' | '.join([str(Shape(**record['shape'])), *load, *cells, shares])} |")
    return "\n".join(lines)


def base_of(seconds: Mapping[str, float]) -> float:
    """What ratios are taken of: the faster of transformers' implementations, without them the loop."""
    peers = [seconds[name] for name in PEERS if name in seconds]
    return min(peers) if peers else seconds["loop"]


def spread(results: Mapping) -> float:
    """The widest interquartile range of all timings, as a share of its median."""
    timings = [timing for record in results["records"] for timing in record["seconds"].values()]
    return max((timing["high"] - timing["low"]) / timing["median"] for timing in timings)


def verdicts(results: Mapping) -> list[str]:
    """What the numbers say about "auto", in sentences."""
    said = []
    for record in results["records"]:
        seconds = {name: timing["median"] for name, timing in record["seconds"].items()}
        if all(name in seconds for name in PEERS):
            ratio = base_of(seconds) / seconds["auto"]
            said.append(
                f"{Shape(**record['shape'])}, {record['load']}: auto is {ratio:.2f} × the fastest of transformers."
            )
    for load in LOADS:
        sweep = [
            record for record in results["records"] if record["load"] == load and Shape(**record["shape"]) in SWEEP
        ]
        if len(sweep) < 2:
            continue
        few, many = (min(sweep, key=_n_experts), max(sweep, key=_n_experts))
        cost = many["seconds"]["auto"]["median"] / few["seconds"]["auto"]["median"]
        moved = [Shape(**record["shape"]).bytes_moved for record in (few, many)]
        floor = moved[1] / results["copy_bytes_per_second"] / many["seconds"]["auto"]["median"]
        said.append(
            f"E {_n_experts(few)} → {_n_experts(many)}, {load}: {cost:.2f} × the time for {moved[1] / moved[0]:.2f} × "
            f"the bytes that must move; moving them takes {floor:.0%} of the time at E {_n_experts(many)}."
        )
    return said


def _n_experts(record: Mapping) -> int:
    return record["shape"]["n_experts"]
