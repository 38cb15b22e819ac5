"""Measures the dispatch variants side by side: forward and backward, one thread, interleaved, told as medians.

`moe-lab bench` writes a table, a figure and the numbers, stamped with machine and versions. Notebook 04 measures with
the same functions. transformers' block is measured beside ours where transformers is installed.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_lab.config import MoEConfig
from moe_lab.dispatch import combine, make_plan, permute
from moe_lab.hugging_face import to_hugging_face
from moe_lab.moe import MoE, moe_loop, moe_reference
from moe_lab.ops import GROUPED_MM
from moe_lab.paths import CourseError, course_root

PEERS = ("transformers eager", "transformers grouped_mm")
GUMBEL_STD = math.pi / math.sqrt(6)
WARM_UP_ROUNDS = 2


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
        **{impl: step(with_impl(impl), layer) for impl in GROUPED_MM},
        "auto": step(with_impl("auto"), layer),
    }
    if peers:
        for name in PEERS:
            block = _transformers_block(shape, layer, name.removeprefix("transformers "))
            found[name] = step(lambda x, block=block: block(x[None])[0], block)
    return found


def _transformers_block(shape: Shape, layer: MoE, implementation: str) -> torch.nn.Module:
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


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over the rounds, and the quartiles on both sides of it."""

    median: float
    low: float
    high: float


def compare(candidates: Mapping[str, Callable[[], None]], rounds: int = 15) -> dict[str, Timing]:
    """Times the candidates in turns, so that whatever else the machine does meets them all alike.

    Raises:
        ValueError: fewer than two rounds.
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds}: expected 2 or more, for a spread.")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn >= WARM_UP_ROUNDS:
                seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, measured in seconds.items():
        low, median, high = statistics.quantiles(measured, n=4, method="inclusive")
        timings[name] = Timing(median, low, high)
    return timings


# --- moe-lab bench ------------------------------------------------------------------------------------------------

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


def copy_rate(n_bytes: int = 2**28, rounds: int = 5) -> float:
    """Bytes per second that this machine reads and writes when it copies a large tensor."""
    source = torch.zeros(n_bytes // 4)
    target = torch.empty_like(source)
    return 2 * n_bytes / compare({"copy": lambda: target.copy_(source)}, rounds)["copy"].median


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    found = {"cpu": cpu, "system": platform.system(), "python": platform.python_version(), "torch": torch.__version__}
    if importlib.util.find_spec("transformers"):
        found["transformers"] = importlib.metadata.version("transformers")
    return found


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe-lab bench`."""
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of every measurement (default 15)")
    parser.add_argument(
        "--quick", action="store_true", help="the first shape only, to see that it works; nothing is kept"
    )


def main(args: argparse.Namespace) -> int:
    """Measures everything and writes `benchmarks/results/cpu.json`, `.md` and `.png`."""
    if args.rounds < 2:
        raise CourseError(f"--rounds {args.rounds}: expected 2 or more, for a spread.")
    if os.environ.get("OMP_WAIT_POLICY"):
        raise CourseError("OMP_WAIT_POLICY is set, which ruins the timing of small operations: unset it and run again.")
    torch.set_num_threads(1)
    peers = importlib.util.find_spec("transformers") is not None
    if not peers:
        print("transformers is not installed: its block is not measured. `pip install -e '.[test]'` brings it.")
    shapes: Sequence[Shape] = SHAPES[:1] if args.quick else (*SHAPES, *(s for s in SWEEP if s not in SHAPES))
    records = []
    for shape in shapes:
        for skewed in (False, True):
            print(f"{shape}, {LOADS[skewed]} …", flush=True)
            records.append(measure(shape, skewed, args.rounds, peers))
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": 1,
        "rounds": args.rounds,
        "copy_bytes_per_second": copy_rate(),
        "records": records,
    }
    base = "the faster of transformers' two" if peers else "the loop"
    print(f"\nTimes faster than {base}, forward and backward, one thread:\n\n{table(results)}\n")
    print("\n".join(verdicts(results)))
    print(f"Widest interquartile range: {spread(results):.0%} of the median.")
    if not args.quick:
        _keep(results)
    return 0


def _keep(results: Mapping) -> None:
    from moe_lab.viz import draw_bench

    folder = course_root() / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    heading = f"# Dispatch variants on a CPU\n\n{results['date']}, " + ", ".join(
        f"{name} {value}" for name, value in results["machine"].items()
    )
    text = f"{heading}, one thread.\n\n{table(results)}\n\n" + "\n".join(f"- {line}" for line in verdicts(results))
    (folder / "cpu.md").write_text(text + "\n", encoding="utf-8")
    (folder / "cpu.png").write_bytes(draw_bench(results).png)
    print(f"Kept in {folder.relative_to(course_root())}: cpu.json, cpu.md, cpu.png.")
