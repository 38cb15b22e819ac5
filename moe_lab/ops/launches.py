"""Starts the kernels: which tile, which grid, and autograd around them. Nothing here waits for a GPU.

On the meta device nothing is computed: kernels are compiled for the GPU that `moe_lab.ops.machine_code` names, and what
is read there is what a launch would run.

Measurements and tests have two ways in: `using` puts other tiles in the place of the table's, `observed` is told of
every launch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_lab.machine import interpreter_problem
from moe_lab.ops import kernels
from moe_lab.ops.tiles import Tile, Tiles, choose_tiles, most_tiles
from moe_lab.records import DispatchPlan

# Takes a kernel's name, its arguments and its constants, and returns what to enter around the launch
Observer = Callable[[str, tuple[Any, ...], dict[str, Any]], AbstractContextManager]

_choose = choose_tiles
_observer: Observer | None = None


@contextmanager
def using(tiles: Tiles | None = None, **changes: Any) -> Iterator[None]:
    """Inside, kernels take these tiles in place of the table's, or the table's with changes: `using(tma=False)`.

    It holds for all threads. A backward pass takes the tiles of its forward pass.
    """
    global _choose

    def choose(*shapes: int) -> Tiles:
        return replace(tiles or before(*shapes), **changes)

    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, every launch, of any thread, happens within what the observer returns for it."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter: TRITON_INTERPRET=1 was set before it was first imported."""
    return triton.knobs.runtime.interpret


def require_kernels(x: Tensor) -> None:
    """Raise unless kernels can run on tensors like this one."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"impl='triton' takes fp32, bf16 and fp16, and these are {x.dtype}: use impl='auto'.")
    if is_interpreted() and x.dtype == torch.bfloat16:
        raise ValueError("impl='triton' in Triton's interpreter: bf16 comes out wrong there. Use fp32 or fp16.")
    if is_interpreted() and (problem := interpreter_problem()):
        raise ValueError(f"impl='triton' cannot be interpreted: {problem}.")
    if x.is_meta and not is_interpreted():
        try:
            _capability(x)
        except RuntimeError:  # no GPU, and so no driver
            message = (
                "impl='triton' on the meta device: kernels are compiled inside `machine_code.compile_for(...)` only."
            )
            raise ValueError(message) from None
    if x.is_cuda and (torch.version.hip or _capability(x) < 80):
        name = torch.cuda.get_device_name(x.device)
        raise ValueError(f"impl='triton' needs an NVIDIA GPU from Ampere on, and this is {name}: use impl='auto'.")
    if x.is_cuda or x.is_meta or (is_interpreted() and x.device.type == "cpu"):
        return
    raise ValueError(
        f"impl='triton' needs tensors on an NVIDIA GPU, and these are on {x.device}: use impl='auto', or set "
        "TRITON_INTERPRET=1 before Python starts, which runs kernels in Triton's interpreter, slowly."
    )


def _capability(x: Tensor) -> int:
    """The compute capability of the tensor's GPU as one number, 90 for 9.0; 0 in the interpreter."""
    if is_interpreted():
        return 0
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        return 10 * major + minor
    return triton.runtime.driver.active.get_current_target().arch  # on the meta device


def _tiles_for(x: Tensor, w: Tensor, n_rows: int) -> Tiles:
    is_even = all(size % 16 == 0 for size in w.shape[1:]) and all(map(_is_aligned, (x, w)))
    return _choose(_capability(x), x.element_size(), n_rows, len(w), is_even)


def _is_aligned(x: Tensor) -> bool:
    """Whether all rows begin at multiples of 16 bytes, so that they can be read 16 bytes at a time."""
    strides = [stride * x.element_size() for stride in x.stride() if stride != 1]
    return x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)


def _precision(x: Tensor) -> str:
    """How fp32 is multiplied: exactly, unless torch is told that TF32 will do (`set_float32_matmul_precision`)."""
    asked_for = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if x.dtype == torch.float32 and asked_for == "tf32" else "ieee"


def _launch(kernel, grid: tuple[int, ...], *args, tile: Tile | None = None, **constants) -> None:
    """Run a kernel; on the meta device compile it only."""
    if 0 in grid:
        return
    if tile is not None:
        constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    tensor = next(arg for arg in args if isinstance(arg, Tensor))
    with _observer(kernel.fn.__name__, args, constants) if _observer else nullcontext():
        if tensor.is_meta:
            kernel.warmup(*args, grid=grid, **constants)
        elif tensor.is_cuda:
            with torch.cuda.device(tensor.device):  # Triton launches on the current one
                kernel[grid](*args, **constants)
        else:
            kernel[grid](*args, **constants)


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.depth}


# --- One launch each ------------------------------------------------------------------------------------------------


class RowTiles:
    """The plan of the tiles of rows (`moe_lab.ops.tiles.plan_tiles`), made on the device; how many tiles are used; and
    the groups by size."""

    def __init__(self, offsets: Tensor, n_rows: int, block: int) -> None:
        self.offsets, self.n_rows, self.n_groups = offsets.contiguous(), n_rows, len(offsets)
        self.n_tiles = most_tiles(n_rows, self.n_groups + 1, block)
        self.table = offsets.new_empty(3, self.n_tiles)
        self.n_used = offsets.new_empty(1)
        self.by_size = torch.empty_like(offsets)
        _launch(
            kernels.plan_tiles, (self.n_groups + 1,),
            self.offsets, self.table, self.n_used, self.by_size, self.n_groups, n_rows, self.n_tiles,
            BLOCK=block, GROUPS=triton.next_power_of_2(self.n_groups + 1),
        )  # fmt: skip


def product(
    x: Tensor,
    w: Tensor,
    tiles: RowTiles,
    sizes: Tiles,
    plan: DispatchPlan | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Rows times the transposed matrix of their group, `w` (E, N, K); (R, K) to (R, N).

    With a plan the results go to the places of their choices, (T·K, N), times the choices' weights.
    """
    _, n, k = w.shape
    y = x.new_empty(tiles.n_rows, n)
    precision = _precision(x)
    row_choices = None if plan is None else plan.row_choices
    if sizes.tma and _can_describe(x, w if w.stride(2) == 1 else w.mT):
        _product_tma(x, w, y, tiles, sizes, precision, row_choices, weights)
        return y
    tile = sizes.product
    _launch(
        kernels.grouped_product, (tiles.n_tiles * triton.cdiv(n, tile.columns),),
        x, w, y, tiles.table, row_choices, weights,
        tiles.n_tiles, tiles.n_groups, n, k, x.stride(0), *w.stride(), y.stride(0),
        SCATTER=plan is not None, PRECISION=precision, BAND=sizes.band, EVEN_K=k % tile.depth == 0,
        tile=tile, **_blocks(tile),
    )  # fmt: skip
    return y


def _can_describe(*tensors: Tensor) -> bool:
    """Whether the copy engine takes them: rows that begin at multiples of 16 bytes, and do not overlap."""
    return all(
        t.numel() > 0
        and _is_aligned(t)
        and t.stride(-1) == 1
        and t.stride(-2) >= t.shape[-1]
        and all(stride > 1 for stride in t.stride()[:-1])
        for t in tensors
    )


def _product_tma(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    tiles: RowTiles,
    sizes: Tiles,
    precision: str,
    row_choices: Tensor | None,
    weights: Tensor | None,
) -> None:
    tile, transposed = sizes.product, w.stride(2) != 1
    matrix = [tile.depth, tile.columns] if transposed else [tile.columns, tile.depth]
    w_blocks = TensorDescriptor.from_tensor(w.mT if transposed else w, [1, *matrix])
    x_rows = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth])
    _, n, k = w.shape
    programs = min(_n_processors(x), tiles.n_tiles * triton.cdiv(n, tile.columns))
    _launch(
        kernels.grouped_product_tma, (programs,),
        x_rows, w_blocks, y, tiles.table, tiles.n_used, row_choices, weights, tiles.n_tiles, tiles.n_groups, n, k,
        y.stride(0),
        SCATTER=row_choices is not None, TRANSPOSED=transposed, PRECISION=precision, FLATTEN=sizes.flatten,
        BAND=sizes.band, tile=tile, **_blocks(tile),
    )  # fmt: skip


def gate_up(
    x: Tensor,
    w_in: Tensor,
    inner: Tensor | None,
    hidden: Tensor,
    tiles: RowTiles,
    sizes: Tiles,
    plan: DispatchPlan,
    top_k: int,
) -> None:
    """Fills `hidden` (R, F) from tokens (T, D) and matrices (E, 2F, D), and `inner` (R, 2F) if the results are kept."""
    d_model, width, tile = x.shape[1], hidden.shape[1], sizes.gate_up
    constants = {
        "TOP_K": top_k, "PRECISION": _precision(x), "BAND": sizes.band, "EVEN_K": d_model % tile.depth == 0,
        "tile": tile, **_blocks(tile),
    }  # fmt: skip
    extents = tiles.n_tiles, tiles.n_groups, width, d_model, x.stride(0)
    n_programs = tiles.n_tiles * triton.cdiv(width, tile.columns)
    if not (sizes.tma and _can_describe(w_in)):
        _launch(
            kernels.gate_up, (n_programs,),
            x, w_in, inner, hidden, tiles.table, plan.row_choices, *extents, *w_in.stride()[:2], **constants,
        )  # fmt: skip
        return
    w_blocks = TensorDescriptor.from_tensor(w_in.view(-1, 2, width, d_model), [1, 2, tile.columns, tile.depth])
    _launch(
        kernels.gate_up_tma, (min(_n_processors(x), n_programs),),
        x, w_blocks, inner, hidden, tiles.table, tiles.n_used, plan.row_choices, *extents,
        FLATTEN=sizes.flatten, **constants,
    )  # fmt: skip


def _n_processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132  # as an H100 has


def weight_gradient(
    left: Tensor,
    right: Tensor,
    like: Tensor,
    tiles: RowTiles,
    tile: Tile,
    plan: DispatchPlan | None = None,
    gather: str = "",
) -> Tensor:
    """The gradient of `like` (E, M, N): of every group `left.T @ right`; `gather` says which of them holds tokens."""
    n_groups, m, n = like.shape
    dw = torch.empty_like(like, memory_format=torch.contiguous_format)
    if gather:  # tokens are fetched before the rows: with three stages more as many rows are on their way
        tile = replace(tile, stages=tile.stages + 3)
    _launch(
        kernels.weight_gradient, (n_groups * triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),),
        left, right, dw, tiles.offsets, tiles.by_size, None if plan is None else plan.row_choices,
        tiles.n_rows, m, n, left.stride(0), right.stride(0),
        TOP_K=1 if plan is None else plan.choice_rows.shape[1],
        GATHER_LEFT=gather == "left", GATHER_RIGHT=gather == "right",
        PRECISION=_precision(left), tile=tile, **_blocks(tile),
    )  # fmt: skip
    return dw


def sum_of_choices(rows: Tensor, top_k: int) -> Tensor:
    """(T·K, N) to (T, N)."""
    n = rows.shape[1]
    y = rows.new_empty(len(rows) // top_k, n)
    block = min(1024, triton.next_power_of_2(n))
    _launch(kernels.sum_of_choices, (len(y), triton.cdiv(n, block)), rows, y, n, TOP_K=top_k, BLOCK=block)
    return y


# --- Autograd -------------------------------------------------------------------------------------------------------
#
# `torch.compile` would trace into Triton's own code and fail there, so it leaves both functions out (a graph break).
# As decorators at import these would load the compiler, a second and more, for everybody.


def grouped(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """The variant "triton" of `moe_lab.ops.grouped_mm`."""
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler.disable(grouped)(rows, weights, offsets)
    require_kernels(rows)
    return _GroupedProduct.apply(_rows_side_by_side(rows), weights, offsets)


def _rows_side_by_side(x: Tensor) -> Tensor:
    """Kernels take any stride between rows, and none within."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        ctx.sizes = sizes = _tiles_for(rows, weights, len(rows))
        ctx.tiles = tiles = RowTiles(offsets, len(rows), sizes.rows)
        ctx.save_for_backward(rows, weights, tiles.offsets)  # these too: autograd then sees it if they are changed
        return product(rows, weights, tiles, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights, _ = ctx.saved_tensors
        tiles, sizes = ctx.tiles, ctx.sizes
        dy = _rows_side_by_side(dy)
        d_rows = d_weights = None
        if ctx.needs_input_grad[0]:
            d_rows = product(dy, weights.mT, tiles, sizes)
        if ctx.needs_input_grad[1]:
            d_weights = weight_gradient(dy, rows, weights, tiles, sizes.weight_gradient)
        return d_rows, d_weights, None


def mlp(x: Tensor, w_in: Tensor, w_down: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    """The variant "triton" of `moe_lab.ops.moe_mlp`."""
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler.disable(mlp)(x, w_in, w_down, plan, weights)
    require_kernels(x)
    tensors = (_rows_side_by_side(x), w_in.contiguous(), w_down.contiguous(), weights.contiguous())
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _MLP.apply(*tensors, replace(plan, row_choices=plan.row_choices.contiguous()), keep)


class _MLP(torch.autograd.Function):
    """Four launches there: plan, gate_up, product, sum. Kept are x and `inner`, what SwiGLU was given."""

    @staticmethod
    def forward(
        ctx, x: Tensor, w_in: Tensor, w_down: Tensor, weights: Tensor, plan: DispatchPlan, keep: bool
    ) -> Tensor:
        width, n_rows, top_k = w_down.shape[2], plan.n_rows, weights.shape[1]
        sizes = _tiles_for(x, w_down, n_rows)
        tiles = RowTiles(plan.offsets, n_rows, sizes.rows)
        hidden = x.new_empty(n_rows, width)
        inner = x.new_empty(n_rows, 2 * width) if keep else None
        gate_up(x, w_in, inner, hidden, tiles, sizes, plan, top_k)
        ctx.plan, ctx.tiles, ctx.sizes = plan, tiles, sizes
        ctx.save_for_backward(x, w_in, w_down, weights, inner, tiles.offsets, plan.row_choices)
        return sum_of_choices(product(hidden, w_down, tiles, sizes, plan, weights), top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_down, weights, inner, *_ = ctx.saved_tensors
        plan, tiles, sizes = ctx.plan, ctx.tiles, ctx.sizes
        needs_x, needs_in, needs_down, needs_weights, *_ = ctx.needs_input_grad
        dy = _rows_side_by_side(dy)
        n_choices, top_k, width = plan.n_rows, weights.shape[1], w_down.shape[2]
        tile = sizes.down_backward
        d_inner, weighted = torch.empty_like(inner), x.new_empty(n_choices, width)
        parts = weights.new_empty(triton.cdiv(width, tile.columns), n_choices, dtype=torch.float32)
        _launch(
            kernels.down_backward, (tiles.n_tiles * triton.cdiv(width, tile.columns),),
            dy, w_down, inner, weights, d_inner, weighted, parts, tiles.table, plan.row_choices,
            tiles.n_tiles, tiles.n_groups, n_choices, width, dy.shape[1], dy.stride(0), w_down.stride(0),
            w_down.stride(1),
            TOP_K=top_k, PRECISION=_precision(x), BAND=sizes.band, EVEN_K=dy.shape[1] % tile.depth == 0,
            tile=tile, **_blocks(tile),
        )  # fmt: skip
        dx = d_in = d_down = d_weights = None
        if needs_x:
            dx = sum_of_choices(product(d_inner, w_in.mT, tiles, sizes, plan), top_k)
        if needs_in:
            d_in = weight_gradient(d_inner, x, w_in, tiles, sizes.weight_gradient, plan, gather="right")
        if needs_down:
            d_down = weight_gradient(dy, weighted, w_down, tiles, sizes.weight_gradient, plan, gather="left")
        if needs_weights:
            d_weights = parts.sum(0).view_as(weights).to(weights.dtype)
        return dx, d_in, d_down, d_weights, None, None
