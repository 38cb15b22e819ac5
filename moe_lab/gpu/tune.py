"""`moe-lab gpu --tune`: times of a few tiles for each kernel, to fill the table in `moe_lab.ops.tiles` from.

Each is timed where it works: in a forward and backward of the fused block, or of the plain product. The other kernels
then take tiles of as many rows, for they share a plan. `python -m moe_lab.gpu.tune` compiles the table's tiles and
all of these for compute capability 9.0, on any Linux machine, and prints what the compiler says.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lab.bench.layers import Shape
from moe_lab.gpu.candidates import FUSED, Inputs, can_tma, fused, make_inputs, passes
from moe_lab.gpu.floors import QWEN3
from moe_lab.gpu.jobs import toy
from moe_lab.gpu.measure import compilation, launches_of, release, require_living_gpu, why
from moe_lab.ops import grouped_mm
from moe_lab.ops.grouped_mm import launches
from moe_lab.ops.tiles import Tile, Tiles, choose_tiles

CLASSES = {"few": QWEN3[0], "many": QWEN3[-1]}
# A kernel's field in `Tiles`, and its name as a launch. The product by descriptors comes alone, and as in the block:
# its results scattered, those of the forward pass times the router's weights. "nested" leaves its two loops two.
KERNELS = {
    "product": ("product", "grouped_product"),
    "product_tma": ("product", "grouped_product_tma"),
    "product_tma_nested": ("product", "grouped_product_tma"),
    "block_tma": ("product", "grouped_product_tma"),
    "gate_up": ("gate_up", "gate_up"),
    "gate_up_tma": ("gate_up", "gate_up_tma"),
    "gate_up_tma_nested": ("gate_up", "gate_up_tma"),
    "down_backward": ("down_backward", "down_backward"),
    "weight_gradient": ("weight_gradient", "weight_gradient"),
}


def _tiles(*sizes: tuple[int, int, int, int, int]) -> list[Tile]:
    return [Tile(*size) for size in sizes]


# rows, columns, depth, warps, stages
TILES = {
    "product": _tiles(
        (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 256, 64, 4, 3), (64, 256, 64, 4, 4), (64, 256, 64, 8, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 32, 8, 4), (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4), (128, 128, 128, 8, 3),
    ),
    "product_tma": _tiles(
        (64, 128, 64, 4, 4), (64, 256, 64, 4, 3), (64, 256, 64, 4, 4), (64, 256, 64, 8, 4), (64, 128, 128, 4, 3),
        (128, 128, 64, 4, 4), (128, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
    ),
    "gate_up": _tiles(
        (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 64, 8, 3),
        (128, 64, 64, 4, 3), (128, 64, 64, 8, 4), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
    ),
    "gate_up_tma": _tiles(
        (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 128, 64, 4, 3), (64, 128, 64, 8, 3), (64, 128, 64, 8, 4),
        (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (128, 128, 32, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
    ),
    "down_backward": _tiles(
        (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 64, 8, 4),
        (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
    ),
    "weight_gradient": _tiles(
        (64, 128, 64, 4, 4), (128, 128, 32, 4, 2), (128, 128, 32, 8, 2), (128, 128, 32, 8, 4), (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 256, 32, 8, 4), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
    ),
}  # fmt: skip
TILES["block_tma"] = TILES["product_tma_nested"] = TILES["product_tma"]
TILES["gate_up_tma_nested"] = TILES["gate_up_tma"]


def with_tile(kernel: str, tile: Tile) -> Tiles:
    """This tile for a kernel, and for the others tiles that go with it."""
    field, launched = KERNELS[kernel]
    others = choose_tiles(80, 2, 1 if tile.rows <= 64 else 65, 1)  # of 64 or of 128 rows, on any chip
    how = {"tma": launched.endswith("_tma"), "flatten": not kernel.endswith("_nested")}
    return dataclasses.replace(others, **{field: tile}, **how)


def timed(kernel: str, inputs: Inputs) -> Callable[[], object]:
    """A call in which the kernel works: the plain product forward and to its rows' gradient, or the block's passes."""
    if not kernel.startswith("product_tma"):
        run = passes(inputs, {FUSED: fused(inputs)}, backward=True)[FUSED]
        return lambda: run(0)
    w, offsets = inputs.w_in.detach(), inputs.plan(0).offsets
    n_rows = inputs.shape.n_tokens * inputs.shape.top_k
    rows = torch.randn(n_rows, w.shape[2], device=w.device, dtype=w.dtype).requires_grad_()
    dy = torch.randn(n_rows, w.shape[1], device=w.device, dtype=w.dtype)
    return lambda: torch.autograd.grad(grouped_mm(rows, w, offsets, "triton"), rows, dy)


def main(device: str, kernels: list[str], results: dict[str, Any], keep: Callable[[], None], clock: Any) -> None:
    """Times every tile of these kernels in both classes of shapes, the rest of the time permitting; prints a table."""
    results["tuned"], results["dropped"] = [], []
    for name, shape in CLASSES.items():
        release(device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        inputs = make_inputs(shape if device == "cuda" else toy(shape), "balanced", device, dtype, n_sets=1)
        for kernel in kernels:
            run = timed(kernel, inputs)
            print(f"\n{kernel}, {name} ({inputs.shape}), ms of each launch:")
            for tile in TILES[kernel] if device == "cuda" else [Tile(16, 16, 16, warps=1, stages=1)]:
                if clock.left < 5:
                    results["dropped"].append(f"{kernel}, {name}, {tile}")
                    continue
                found = _time(kernel, tile, run, device)
                results["tuned"].append({"kernel": kernel, "class": name, "tile": dataclasses.asdict(tile)} | found)
                print(f"  {tile}: {_says(found)}", flush=True)
            keep()
    if results["dropped"]:
        print(f"\nDropped, for want of time: {len(results['dropped'])} tiles.")


def _time(kernel: str, tile: Tile, run: Callable[[], object], device: str) -> dict[str, Any]:
    _, launched = KERNELS[kernel]
    tiles = with_tile(kernel, tile)
    if tiles.tma and not can_tma(device):
        return {"failed": "needs a GPU of compute capability 9.0"}
    try:
        with launches().using(tiles), compilation() as told:
            run()
            if device != "cuda":
                return {}
            return {"ms": [ms for name, ms in launches_of(run) if name == launched], **told}
    except Exception as error:  # a tile may need more shared memory than there is
        require_living_gpu(device, error)
        return {"failed": why(error)}


def _says(found: Mapping[str, Any]) -> str:
    return found.get("failed") or ", ".join(f"{ms:.3f}" for ms in found.get("ms", ())) or "ran"


def compiled(kernel: str, tile: Tile, shape: Shape = QWEN3[1], capability: int = 90) -> list[Any]:
    """The machine code of every launch of a kernel with this tile, in order; in a process that has no interpreter."""
    from moe_lab.ops.machine_code import compile_for

    inputs = _on_meta(shape)
    with compile_for(capability) as codes, launches().using(with_tile(kernel, tile)):
        timed(kernel, inputs)()
    return [code for code in codes if code.name == KERNELS[kernel][1]]


def _on_meta(shape: Shape) -> Inputs:
    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        made = torch.empty(size, device="meta", dtype=dtype)
        return made.requires_grad_() if dtype.is_floating_point else made

    tokens, chosen = (shape.n_tokens, shape.d_model), (shape.n_tokens, shape.top_k)
    return Inputs(
        shape,
        empty(shape.n_experts, 2 * shape.d_ff, shape.d_model),
        empty(shape.n_experts, shape.d_model, shape.d_ff),
        [empty(*tokens)],
        [empty(*tokens).detach()],
        [empty(*chosen, dtype=torch.int64)],
        [empty(*chosen, dtype=torch.float32)],
    )


def chosen_table(capability: int = 90) -> str:
    """What the compiler says of every launch with the tiles that `choose_tiles` chooses, as Markdown."""
    from moe_lab.ops.machine_code import compile_for

    lines = [
        "| class | kernel | rows × columns × depth | registers | spills | shared memory, kB | matrix instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shape in CLASSES.items():
        inputs = _on_meta(shape)
        with compile_for(capability) as codes:
            timed("product_tma", inputs)()
            timed("product", inputs)()
        for code in codes:
            sizes = [code.constants[block] for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if block in code.constants]
            said = (code.registers, code.spills, round(code.shared_bytes / 1024), code.tensor_core_instructions)
            line = f"| {name} | {code.name} | {' × '.join(map(str, sizes))} | {' | '.join(map(str, said))} |"
            if line not in lines:
                lines.append(line)
    return "\n".join(lines)


def compiler_table(kernels: Mapping[str, list[Tile]]) -> str:
    """Registers, spills and shared memory of every tile, the worst over a kernel's launches, as Markdown."""
    lines = ["| kernel | tile | registers | spills | shared memory, kB |", "|---|---|---|---|---|"]
    for kernel, tiles in kernels.items():
        for tile in tiles:
            shape = f"{tile.rows} × {tile.columns} × {tile.depth}, {tile.warps} warps, {tile.stages} stages"
            try:
                codes = compiled(kernel, tile)
            except Exception as error:
                lines.append(f"| {kernel} | {shape} | {why(error)} | | |")
                continue
            registers, spills = (max(getattr(code, name) for code in codes) for name in ("registers", "spills"))
            shared = max(code.shared_bytes for code in codes) / 1024
            lines.append(f"| {kernel} | {shape} | {registers} | {spills} | {shared:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(chosen_table(), compiler_table(TILES), sep="\n\n")
