"""The parts of the benchmark, the most important first; each adds its figures to the results and may be dropped."""

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moe_lab.bench.layers import Shape
from moe_lab.gpu import candidates, floors, liger
from moe_lab.gpu.candidates import (
    DENSE,
    FUSED,
    GROUPED_MM,
    GROUPED_MM_BF16,
    LIGER,
    LOADS,
    LOOP,
    PORTABLE,
    TMA,
    TORCH,
    TRANSFORMERS,
    UNFUSED,
    Inputs,
    make_inputs,
)
from moe_lab.gpu.measure import Run, compare, launches_of, release, require_living_gpu, why
from moe_lab.ops import grouped_mm
from moe_lab.ops.grouped_mm import launches
from moe_lab.ops.tiles import Tile, choose_tiles
from moe_lab.paths import course_root

PASSES = ("forward", "both")
BLOCKS_ALIKE = (TORCH, UNFUSED, FUSED, TRANSFORMERS, LIGER)
PRODUCTS_ALIKE = (LOOP, GROUPED_MM, GROUPED_MM_BF16, PORTABLE, TMA)
SWEEP = tuple(replace(floors.QWEN3[0], n_tokens=2**i) for i in range(6, 16))


@dataclass
class Bench:
    """Where it runs and in what sizes. Without a GPU all shapes become tiny, and nothing is timed."""

    device: str
    results: dict[str, Any]
    liger_is_compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def floors(self, work: floors.Work) -> dict[str, Any]:
        """Operations, bytes, and the milliseconds that each takes at the rates that were measured, if they were."""
        rates = self.results.get("ceilings") or {}
        operations, moved = rates.get("operations_per_second"), rates.get("bytes_per_second")
        floor = {
            "operations": 1e3 * work.flops / operations if operations else None,
            "bytes": 1e3 * work.bytes / moved if moved else None,
        }
        return {"flops": work.flops, "bytes": work.bytes, "floor_ms": floor}

    def inputs(self, shape: Shape, load: str, n_sets: int = 3) -> Inputs:
        """Random tensors for a shape, or for its toy."""
        release(self.device)
        return make_inputs(shape if self.device == "cuda" else toy(shape), load, self.device, self.dtype, n_sets)

    def add(self, part: str, **record: Any) -> None:
        """Keep one record of a part of the results."""
        self.results.setdefault(part, []).append({"measured": self.device == "cuda", **record})


def toy(shape: Shape) -> Shape:
    """A shape so small that a CPU computes it at once, in Triton's interpreter too."""
    n_experts, top_k = min(shape.n_experts, 4), min(shape.top_k, 2)
    return Shape(max(8, min(shape.n_tokens // 512, 24)), 16, 16, n_experts, top_k)


def _named(shape: Shape, **more: Any) -> dict[str, Any]:
    return {"model": floors.model_of(shape), "shape": asdict(shape), **more}


def raw(bench: Bench, shape: Shape, load: str) -> None:
    """Both products of the block, alone, on rows that are sorted already."""
    inputs = bench.inputs(shape, load)
    groups = inputs.shape.n_experts
    for which in ("in", "down"):
        runs, (n_rows, n_in, n_out) = candidates.products(inputs, which)
        work = floors.product(n_rows, n_in, n_out, groups)
        measured = compare(runs, len(inputs.x), work.flops, bench.device, PRODUCTS_ALIKE)
        record = {"product": which, "rows": n_rows, "n_in": n_in, "n_out": n_out, **bench.floors(work)}
        bench.add("raw", **_named(shape, load=load), **record, ours=_ours(bench, shape), candidates=measured)


def _ours(bench: Bench, shape: Shape) -> str:
    return candidates.by_default(shape, capability() if bench.device == "cuda" else 0)


def capability() -> int:
    """Of this machine's GPU as one number, 90 for compute capability 9.0."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def block(bench: Bench, shape: Shape, load: str, passes: tuple[str, ...] = PASSES) -> None:
    """The experts' block, forward and both passes, ours and everybody's."""
    inputs = bench.inputs(shape, load)
    made = candidates.blocks(inputs)
    if shape == floors.QWEN3[-1] and "liger" not in bench.results and not isinstance(made[LIGER], str):
        _prepare_liger(bench, candidates.passes(inputs, made, backward=True)[LIGER])
    for name in passes:
        backward = name == "both"
        work = floors.block(inputs.shape, backward)
        runs = candidates.passes(inputs, made, backward)
        measured = compare(runs, len(inputs.x), work.flops, bench.device, BLOCKS_ALIKE)
        bench.add("block", **_named(shape, load=load), **{"pass": name}, **bench.floors(work), candidates=measured)


def _prepare_liger(bench: Bench, run: Run) -> None:
    try:
        bench.results["liger"] = liger.prepare(bench.liger_is_compiled, run)
    except Exception as error:
        require_living_gpu(bench.device, error)
        bench.results["liger"] = f"not tuned: {why(error)}"


def settle_liger(bench: Bench) -> None:
    """Every later shape takes what won at the first."""
    if "liger" in bench.results:
        liger.settle()


def stages(bench: Bench, shape: Shape, load: str) -> None:
    """Device time of every launch of the fused block, beside its two floors."""
    if bench.device != "cuda":
        return
    inputs = bench.inputs(shape, load, n_sets=1)
    run = candidates.passes(inputs, {FUSED: candidates.blocks(inputs)[FUSED]}, backward=True)[FUSED]
    sizes = choose_tiles(capability(), 2, shape.n_tokens * shape.top_k, shape.n_experts)
    parts = -(-shape.d_ff // sizes.down_backward.columns)
    works = [work for part in floors.stages(shape, parts).values() for work in part]
    found = [{"stage": kernel, "kernel": kernel, "ms": ms} for kernel, ms in launches_of(lambda: run(0))]
    if len(found) == len(works):  # else the launches are not those that `floors.stages` knows
        for one, work in zip(found, works, strict=True):
            one |= {"stage": work.name, "tflops": work.flops / one["ms"] / 1e9, **bench.floors(work)}
    rest = {"sort of the choices": lambda i: (inputs.plan(i).offsets,)}
    others = compare(rest, 1, 0, bench.device)
    bench.add("stages", **_named(shape, load=load), stages=found, others=others, tiles=asdict(sizes))


def first_use(bench: Bench) -> None:
    """Seconds of the first forward and backward in a fresh process, all kernels compiled before: loading, set-up."""
    if bench.device != "cuda":
        return
    command = [sys.executable, "-m", "moe_lab.gpu.first_use"]
    done = subprocess.run(command, cwd=course_root(), capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    seconds, n_compiled = done.stdout.split()[-2:]
    bench.results["first_use"] = {"seconds": float(seconds), "n_compiled": int(n_compiled)}


def sweep(bench: Bench) -> None:
    """TFLOP/s against tokens per expert: the first product, and the block forward."""
    for shape in SWEEP if bench.device == "cuda" else SWEEP[:1]:
        inputs = bench.inputs(shape, "balanced")
        n_rows, groups = inputs.shape.n_tokens * inputs.shape.top_k, inputs.shape.n_experts
        runs, (_, n_in, n_out) = candidates.products(inputs, "in")
        work = floors.product(n_rows, n_in, n_out, groups)
        kept = {name: runs[name] for name in (PORTABLE, TMA, GROUPED_MM, DENSE)}
        products = compare(kept, len(inputs.x), work.flops, bench.device, PRODUCTS_ALIKE)
        made = candidates.blocks(inputs)
        runs = candidates.passes(inputs, {name: made[name] for name in (FUSED, TORCH, LIGER)}, backward=False)
        whole = floors.block(inputs.shape)
        blocks = compare(runs, len(inputs.x), whole.flops, bench.device, BLOCKS_ALIKE)
        record = {"tokens_per_expert": shape.n_tokens * shape.top_k / shape.n_experts, "ours": _ours(bench, shape)}
        bench.add("sweep", **_named(shape), **record, product=products, block=blocks)


# The steps of an optimisation, each the same product with other tiles: the tile, and what else of `Tiles` changes
STEPS: dict[str, tuple[Tile, dict[str, Any]]] = {
    "one program per tile of 32 × 32": (Tile(32, 32, 32, warps=4, stages=2), {"band": 1, "tma": False}),
    "tiles of 64 × 64": (Tile(64, 64, 32, warps=4, stages=2), {"band": 1, "tma": False}),
    "tiles of 128 × 128": (Tile(128, 128, 64, warps=8, stages=2), {"band": 1, "tma": False}),
    "more stages": (Tile(128, 128, 64, warps=8, stages=4), {"band": 1, "tma": False}),
    "tiles of 128 × 256": (Tile(128, 256, 64, warps=8, stages=3), {"band": 1, "tma": False}),
    "tile order": (Tile(128, 256, 64, warps=8, stages=3), {"band": 8, "tma": False}),
    "TMA, a grid that stays": (Tile(128, 256, 64, warps=8, stages=4), {"band": 8, "tma": True, "flatten": False}),
    "the next tile while one is stored": (Tile(128, 256, 64, warps=8, stages=4), {"band": 8, "tma": True}),
}
TOY_TILE = Tile(16, 16, 16, warps=1, stages=1)


def steps(bench: Bench, shape: Shape, load: str) -> None:
    """The stages of an optimisation, for a roofline: TFLOP/s, and operations per byte that programs ask for.

    Operations are those of the product, not of padding.
    """
    inputs = bench.inputs(shape, load)
    runs, (n_rows, n_in, n_out) = candidates.products(inputs, "in")
    w, offsets = inputs.w_in.detach(), inputs.plan(0).offsets
    rows = torch.randn(n_rows, n_in, device=w.device, dtype=w.dtype)
    work = floors.product(n_rows, n_in, n_out, len(w))
    ends = offsets.tolist()
    fullest = max(end - start for start, end in zip([0, *ends], ends, strict=False))

    def with_tile(tile: Tile, changes: dict[str, Any]) -> Run:
        def run(_: int) -> tuple[torch.Tensor]:
            with launches().using(product=tile, **changes):
                return (grouped_mm(rows, w, offsets, "triton"),)

        return run

    found: dict[str, Run | str] = {LOOP: lambda _: runs[LOOP](0)}
    found["padded"] = lambda _: (grouped_mm(rows, w, offsets, "padded"),)
    moved = {}  # of the library's products nobody knows what they ask for
    for name, (tile, changes) in STEPS.items():
        tile = tile if bench.device == "cuda" else TOY_TILE
        moved[name] = floors.asked(n_rows, n_in, n_out, tile.rows, tile.columns)
        can = not changes["tma"] or candidates.can_tma(inputs.device)
        found[name] = with_tile(tile, changes) if can else "needs a GPU of compute capability 9.0"
    measured = compare(found, 1, work.flops, bench.device, ("padded", *STEPS))
    for name, one in measured.items():
        if name in moved:
            one |= {"bytes_asked": moved[name], "flops_per_byte": work.flops / moved[name]}
    record = {"rows": n_rows, "n_in": n_in, "n_out": n_out, "fullest_group": fullest, **bench.floors(work)}
    bench.add("steps", **_named(shape, load=load), **record, candidates=measured)


def agenda(is_dry: bool = False) -> list[tuple[str, Callable[[Bench], None]]]:
    """All parts, the most important first: what the targets need, then the issue's shapes, then everything else.

    A dry run takes one shape.
    """
    qwen, large = floors.QWEN3, floors.QWEN3[-1]
    found: list[tuple[str, Callable[[Bench], None]]] = []

    def put(what: str, part: Callable[..., None], *args: Any) -> None:
        if is_dry and args and args[0] != large:
            return
        found.append((what, functools.partial(part, **dict(zip(("shape", "load"), args, strict=False)))))

    def both(shape: Shape, load: str) -> None:
        model = floors.model_of(shape)
        put(f"products, {model}, {shape}, {load}", raw, shape, load)
        put(f"block, {model}, {shape}, {load}", block, shape, load)

    both(large, "balanced")
    put("what Liger keeps", settle_liger)
    put(f"launches of the block, {large}", stages, large, "balanced")
    both(large, "zipf")
    both(large, "half")
    put("first use", first_use)
    both(qwen[1], "balanced")
    both(qwen[0], "balanced")
    put(f"steps of the optimisation, {large}", steps, large, "zipf")
    for shape in (floors.OLMOE[1], floors.MIXTRAL[0], floors.DEEPSEEK[0]):
        both(shape, "balanced")
    put("tokens per expert", sweep)
    for shape in (floors.OLMOE[0], floors.MIXTRAL[1]):
        both(shape, "balanced")
    put(f"launches of the block, {qwen[1]}", stages, qwen[1], "balanced")
    rest = (*qwen[:2], *floors.OLMOE, floors.DEEPSEEK[0], *floors.MIXTRAL)
    for load in LOADS[1:]:
        for shape in rest:
            both(shape, load)
    return found
