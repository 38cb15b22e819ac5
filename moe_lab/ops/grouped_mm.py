"""The grouped matrix product: rows sorted by group, one matrix for every group.

The contract, for every variant in `GROUPED_MM`:

    rows (R, I), weights (E, O, I), offsets (E,) int32 -> (R, O)

Row r belongs to the group e with `offsets[e - 1] <= r < offsets[e]` (the first begins at 0) and becomes
`rows[r] @ weights[e].T`. Groups may be empty, and `grouped_mm` takes none at all. Rows past the last offset are of no
group: what they hold enters no result, and theirs is zero. Gradients reach rows and weights; an empty group's is zero.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor, impl: str = "auto") -> Tensor:
    """The grouped matrix product by one of the variants in `GROUPED_MM`; "auto" asks `choose_impl`.

    Under autocast it computes in autocast's dtype, as torch's own products do. What the offsets hold is checked on
    a CPU alone, for on a GPU somebody would have to wait for it: "triton" then takes the nearest that make sense, and
    with "torch" rows past the last one are not zero but whatever the memory held.

    Raises:
        ValueError: a variant that does not exist, or does not take these tensors; shapes, dtypes or devices that do not
            fit each other; offsets that fall, or that end past the rows.
    """
    device = rows.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, weights = rows.to(dtype), weights.to(dtype)
    _require_fit(rows, weights, offsets)
    if impl == "auto":
        impl = choose_impl(rows, weights)
    if impl not in GROUPED_MM:
        raise ValueError(f"impl={impl!r}: expected one of auto, {', '.join(GROUPED_MM)}.")
    if len(weights) == 0:
        return rows @ weights.sum(0).T  # no groups: nothing to multiply, but a way back for gradients
    if device != "cpu" or impl == "triton" or torch.compiler.is_compiling():
        return GROUPED_MM[impl](rows, weights, offsets)
    n_rows = int(offsets[-1])
    products = GROUPED_MM[impl](rows[:n_rows], weights, offsets)
    return products if n_rows == len(rows) else F.pad(products, (0, 0, 0, len(rows) - n_rows))


def _require_fit(rows: Tensor, weights: Tensor, offsets: Tensor) -> None:
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[2]:
        raise ValueError(
            f"rows of shape {tuple(rows.shape)} and weights of shape {tuple(weights.shape)}: expected (R, I) and "
            "(E, O, I), with the same I."
        )
    if rows.device != weights.device:
        raise ValueError(f"rows are on {rows.device}, weights on {weights.device}: move one of them with .to(...).")
    if rows.dtype != weights.dtype:
        raise ValueError(f"rows are {rows.dtype} and weights {weights.dtype}: convert one of them with .to(...).")
    require_offsets(offsets, len(weights), rows)


def require_offsets(offsets: Tensor, n_groups: int, rows: Tensor) -> None:
    """Raise unless these say where `n_groups` groups of the rows end; their values are looked at on a CPU alone."""
    if offsets.shape != (n_groups,) or offsets.dtype != torch.int32:
        expected = f"one int32 for each of the {n_groups} groups"
        raise ValueError(f"offsets are {offsets.dtype} of shape {tuple(offsets.shape)}: expected {expected}.")
    devices = {rows.device, offsets.device}
    if len(devices) > 1:
        raise ValueError(f"rows are on {rows.device}, offsets on {offsets.device}: move one of them with .to(...).")
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = offsets.tolist()
    if ends != sorted(ends) or not all(0 <= end <= len(rows) for end in ends):
        shown = f"{ends[:8]}{' and so on' if len(ends) > 8 else ''}"
        raise ValueError(f"offsets are {shown}: expected them to rise from 0 or more to the {len(rows)} rows or fewer.")


def reference(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """One product after the other, in any dtype. It reads the offsets on the host: one sync on a GPU."""
    ends = offsets.tolist()
    groups = zip([0, *ends], ends, weights, strict=False)
    return torch.cat([rows[start:end] @ w.T for start, end, w in groups])


def torch_grouped(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """PyTorch's own grouped product, without a host sync on GPUs from Hopper on.

    Under `torch.compile` it takes bf16 alone (torch 2.13).

    Raises:
        ValueError: what it does not take: fp64, or rows whose length is no multiple of 16 bytes.
    """
    if not _torch_takes(rows, weights):
        raise ValueError(
            f"impl='torch' cannot multiply rows of {rows.shape[1]} and weights to {weights.shape[1]} in {rows.dtype}: "
            "expected fp32, bf16 or fp16, and sizes that are a multiple of 16 bytes. Use impl='auto'."
        )
    # it takes no odd strides either; what is contiguous already is not copied
    product = F.grouped_mm(rows.contiguous(), weights.contiguous().mT, offs=offsets)
    if product.requires_grad:
        product.register_hook(Tensor.contiguous)  # its backward refuses expanded gradients, as `.sum()` makes them
    return product


def padded(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Every group padded to the fullest one, then one batched product. Reading its size is a sync on a GPU.

    The fuller the fullest group against the mean, the more of the work is on zeros.
    """
    n_groups, out_width, width = weights.shape
    starts = F.pad(offsets[:-1], (1, 0))
    size = int((offsets - starts).max())
    row_ids = torch.arange(len(rows), device=rows.device)
    groups = torch.searchsorted(offsets.contiguous(), row_ids, right=True)
    places = groups * size + row_ids - starts[groups]
    table = rows.new_zeros(n_groups * size, width).index_copy(0, places, rows)
    products = table.view(n_groups, size, width) @ weights.mT  # (E, size, O)
    return products.view(-1, out_width).index_select(0, places)


def triton_kernels(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """The kernels of `moe_lab.ops.kernels`: for NVIDIA GPUs from Ampere on, without a host sync, in any size.

    fp32 is exact unless `torch.set_float32_matmul_precision` allows TF32.

    Raises:
        ValueError: tensors that are not on such a GPU, or fp64.
    """
    return launches().grouped(rows, weights, offsets)


def launches() -> ModuleType:
    """Imported when it is needed: Triton takes a second, and there is none for macOS and Windows."""
    try:
        return importlib.import_module("moe_lab.ops.launches")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError("impl='triton' needs Triton, which is made for Linux: use impl='auto' here.") from None


GROUPED_MM: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "reference": reference,
    "torch": torch_grouped,
    "padded": padded,
    "triton": triton_kernels,
}


def _torch_takes(rows: Tensor, weights: Tensor) -> bool:
    aligned = all(size * rows.element_size() % 16 == 0 for size in weights.shape[1:])
    return aligned and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)


def choose_impl(rows: Tensor, weights: Tensor) -> str:
    """The variant that "auto" stands for, from shapes, dtype and device alone: "torch", or where it cannot, "padded".

    Measured with `moe-lab bench` (benchmarks/results/cpu.md): on a CPU "torch" was the fastest at every shape and load.
    "padded" is somewhat slower while the load is even, and many times slower when it is not.
    """
    return "torch" if _torch_takes(rows, weights) else "padded"
