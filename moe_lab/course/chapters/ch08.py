"""The exercises of notebook 08: a first kernel, a tile, the plan of ragged tiles, the grouped product, its gradient.

Kernels are checked in Triton's interpreter, with their tensors watched: what lies outside of one is NaN to a kernel,
and so is what a mask leaves open; every store is counted, and how tiles are multiplied is noted. A laptop's interpreter
would forgive what a GPU does not.

Block pointers and descriptors (`tl.make_block_ptr`, `tl.make_tensor_descriptor`) become pointers and masks in the
interpreter, so they are watched alike: one that is told too large a shape reads outside, and that is seen. The
interpreter refuses descriptors of rows that do not begin at multiples of 16 bytes, as a GPU does; so these do. Atomics
are not watched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_lab.course.bank import Case, Exercise, Mistake
from moe_lab.course.kernel_cells import Kernel
from moe_lab.ops import tiles as course_tiles

KERNELS = "moe_lab.course.chapters.kernels08"
BLOCK = 16  # the smallest side of a tile that `tl.dot` takes
UNTOUCHED = -99.0  # what results hold before a kernel runs
MULTIPLIES = {False: "exactly", True: "fp32 rounded to TF32"}


def _rand(*shape: int, seed: int) -> Tensor:
    """Numbers around 0, the same bits on every machine."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


# --- Tensors that are watched ---------------------------------------------------------------------------------------


def _with_margins(tensor: Tensor, margin: int = 2 * BLOCK) -> Tensor:
    """The same numbers in the middle of a larger tensor: a row is followed by other things, at least four numbers.

    Rows begin at multiples of 16 bytes, as descriptors want it. The margins hold NaN, in whole numbers 0.
    """
    shape = [size + 2 * margin if dim == 0 else size + 3 for dim, size in enumerate(tensor.shape)]
    shape[-1] = 4 * _ceil(shape[-1] + 1, 4)
    wide = torch.full(shape, float("nan") if tensor.is_floating_point() else 0, dtype=tensor.dtype)
    inner = wide[(slice(margin, margin + len(tensor)), *(slice(0, size) for size in tensor.shape[1:]))]
    return inner.copy_(tensor)


class _Watch:
    """Which places of some tensors a kernel reads and stores, while the interpreter runs it.

    Args:
        by_dot: whether tiles are to be multiplied by `tl.dot`.
    """

    def __init__(self, tensors: dict[str, Tensor], target: str, by_dot: bool = False) -> None:
        self.tensors, self.target = tensors, target
        self.own, self.base = {}, {}
        for name, tensor in tensors.items():
            own = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=torch.bool)
            own.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
            self.own[name], self.base[name] = own.numpy(), tensor.untyped_storage().data_ptr()
        self.stores = np.zeros(len(self.own[target]), dtype=np.int64)
        self.read_outside: set[str] = set()
        self.lacks_dot = by_dot  # until there is one
        self.rounds = False  # whether fp32 is multiplied as TF32
        self.stored_outside: set[int] = set()

    def _places(self, name: str, pointers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each pointer: its place in the tensor's memory, whether it is there, and whether in the tensor itself."""
        places = (pointers.astype(np.int64) - self.base[name]) // self.tensors[name].element_size()
        near = (places >= 0) & (places < len(self.own[name]))
        places = np.where(near, places, 0)
        return places, near, near & self.own[name][places]

    def read(self, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Note a load, and give the mask of what lies in a tensor."""
        found, unknown = np.zeros_like(mask), mask.copy()
        for name in self.tensors:
            _, near, inside = self._places(name, pointers)
            if (mask & near & ~inside).any():
                self.read_outside.add(name)
            found |= inside
            unknown &= ~near
        if unknown.any():
            self.read_outside.add("all tensors")
        return mask & found

    def store(self, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Note a store, and give the mask of what goes into the result."""
        places, _, inside = self._places(self.target, pointers)
        np.add.at(self.stores, places[mask & inside], 1)
        self.stored_outside.update(pointers[mask & ~inside].tolist())
        return mask & inside

    def report(self) -> dict[str, Any]:
        """What an answer is judged by; the result last, for the others explain it."""
        times = self.stores[self.own[self.target]]
        faults = {
            f"{len(self.stored_outside)} outside of {self.target}": bool(self.stored_outside),
            "some places never": (times == 0).any(),
            "some places more than once": (times > 1).any(),
        }
        result = self.tensors[self.target]
        once = torch.from_numpy(self.stores <= 1)  # where two programs store, the later one wins: that is chance
        once = once.as_strided(result.shape, result.stride(), result.storage_offset())
        outside = [name for name in (*self.tensors, "all tensors") if name in self.read_outside]
        return {
            "what it stores": ", ".join(fault for fault, is_so in faults.items() if is_so) or "every place once",
            "what it reads": f"places outside of {', '.join(outside)}" if outside else "only its tensors",
            "how it multiplies": "without `tl.dot`" if self.lacks_dot else MULTIPLIES[self.rounds],
            self.target: torch.where(once, result, UNTOUCHED),
        }


def _bare(mask: Any) -> np.ndarray:
    """A mask's places; that of a block pointer or a descriptor comes as it is, any other one in a handle."""
    return (mask if isinstance(mask, np.ndarray) else mask.data).astype(bool)


def _like(mask: Any, places: np.ndarray) -> Any:
    """The same kind of mask with other places."""
    return places if isinstance(mask, np.ndarray) else type(mask)(places, mask.dtype)


@contextmanager
def _watched(tensors: dict[str, Tensor], target: str, by_dot: bool = False) -> Iterator[_Watch]:
    """Inside, what the interpreter loads, stores and multiplies goes past a watch.

    Loads from elsewhere give NaN, and so do places that are masked without `other`; in whole numbers they give 0 (the
    interpreter does not tell `other=0` of a single number from none).
    """
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import interpreter_builder as builder

    watch = _Watch(tensors, target, by_dot)
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def watched_load(pointers: Any, mask: Any, other: Any, *more: Any, **named: Any) -> Any:
        wanted = _bare(mask)
        inside = watch.read(pointers.data, wanted)
        loaded = load(pointers, _like(mask, inside), other, *more, **named)
        unknown = wanted & ~inside if other is not None else ~inside  # without `other` what is masked may be anything
        if unknown.any() and np.issubdtype(loaded.data.dtype, np.floating):
            loaded.data = np.where(unknown, np.nan, loaded.data).astype(loaded.data.dtype)
        return loaded

    def watched_store(pointers: Any, value: Any, mask: Any, *more: Any, **named: Any) -> Any:
        inside = watch.store(pointers.data, _bare(mask))
        return store(pointers, value, _like(mask, inside), *more, **named)

    def watched_dot(a: Any, b: Any, total: Any, precision: Any, *more: Any, **named: Any) -> Any:
        watch.lacks_dot = False
        watch.rounds |= precision != ir.INPUT_PRECISION.IEEE and a.data.dtype == np.float32
        return dot(a, b, total, precision, *more, **named)

    watched = {
        "create_masked_load": watched_load,
        "create_masked_store": watched_store,
        "create_dot": watched_dot,
    }
    vars(builder).update(watched)
    try:
        yield watch
    finally:
        for name in watched:
            delattr(builder, name)


def _result(*shape: int) -> Tensor:
    return _with_margins(torch.full(shape, UNTOUCHED))


# --- 8.1 the first kernel -------------------------------------------------------------------------------------------


def scale_plain(grid: tuple[int, ...], x: Tensor, y: Tensor, n: int, factor: float, BLOCK: int) -> None:
    """8.1 in torch."""
    y[:n] = factor * x[:n]


def _scale_cases() -> list[Case]:
    shown = "x = {}\nn = {}, factor = 3, BLOCK = {}, {} program{}; y is full of -99 before"
    cases = []
    for name, x, block in (
        ("3 numbers, one program", torch.tensor([1.0, 2.0, 4.0]), 4),
        ("10 numbers in blocks of 4", torch.arange(1.0, 11.0), 4),
        ("32 numbers in blocks of 8", _rand(32, seed=1), 8),
    ):
        programs = _ceil(len(x), block)
        numbers = x.tolist() if len(x) <= 10 else f"{len(x)} numbers"
        show = shown.format(numbers, len(x), block, programs, "s" * (programs > 1))
        cases.append(Case(name=name, args=(x, block), show=show))
    return cases


def _run_scale(kernel: Any, case: Case) -> dict:
    x, block = case.args
    n = len(x)
    x, y = _with_margins(x), _result(n)
    with _watched({"x": x, "y": y}, target="y") as watch:
        kernel[(_ceil(n, block),)](x, y, n, 3.0, BLOCK=block)
    return watch.report()


_SCALE = Kernel.written(KERNELS, "scale", plain=scale_plain)

SCALE = Exercise(
    id="8.1",
    title="the first kernel",
    reference=_SCALE,
    cases=_scale_cases,
    run=_run_scale,
    seconds=30,
    mistakes=(
        Mistake(
            name="no mask",
            wrong=_SCALE.changed(("(x + i, mask=inside)", "(x + i)"), ("numbers, mask=inside)", "numbers)")),
            says="The last program reads and stores past the end. A block is always BLOCK numbers wide, whatever is "
            "left; `mask=` says which of them are meant. On a GPU what lies behind y is some other tensor, which is "
            "now spoilt, and nothing tells you.",
        ),
        Mistake(
            name="the store has no mask",
            wrong=_SCALE.changed(("numbers, mask=inside)", "numbers)")),
            says="It stores past the end of y. The load's mask does not carry over: what was not loaded is some "
            "number all the same, and without a mask of its own the store writes it.",
        ),
        Mistake(
            name="the load has no mask",
            wrong=_SCALE.changed(("(x + i, mask=inside)", "(x + i)")),
            says="y is right, but x is read past its end. A laptop forgives that; a GPU may end the program with "
            "“illegal memory access”, on the day when nothing lies behind x.",
        ),
        Mistake(
            name="the mask looks at the place in the block",
            wrong=_SCALE.changed(("inside = i < n", "inside = tl.arange(0, BLOCK) < n")),
            says="With one program it is right. The mask compares places within the block, which begin at 0 in "
            "every program; the end of x is at number n of all.",
        ),
        Mistake(
            name="one number too many",
            wrong=_SCALE.changed(("i < n", "i <= n")),
            says="Number n is stored, too. Counted from 0 the last one is n - 1: as in Python's slices the end does "
            "not belong.",
        ),
        Mistake(
            name="every program does the first block",
            wrong=_SCALE.changed(("tl.program_id(0) * BLOCK + ", "")),
            says="All programs do the same block, the first. They run the same code; `tl.program_id(0)` is all that "
            "tells one from another.",
        ),
        Mistake(
            name="blocks overlap",
            wrong=_SCALE.changed(("tl.program_id(0) * BLOCK", "tl.program_id(0)")),
            says="Program 1 begins at number 1, where program 0 is at work. It begins where the block of program 0 "
            "ends: how many numbers come before it?",
        ),
        Mistake(
            name="x[i] in place of a load",
            wrong=_SCALE.changed(("tl.load(x + i, mask=inside)", "x[i]")),
            says="In a kernel x is not a tensor but a pointer, the place of its first number, and cannot be indexed. "
            "`x + i` are the places of a block of numbers, and `tl.load` fetches what lies there.",
        ),
        Mistake(
            name="y[i] in place of a store",
            wrong=_SCALE.changed(("tl.store(y + i, factor * numbers, mask=inside)", "y[i] = factor * numbers")),
            says="In a kernel y is not a tensor but a pointer, and nothing can be assigned to `y[i]`. `tl.store` "
            "writes numbers to the places `y + i`.",
        ),
        Mistake(
            name="the factor is forgotten",
            wrong=_SCALE.changed(("factor * numbers", "numbers")),
            says="The numbers are copied, not multiplied.",
        ),
        Mistake(
            name="stored back into x",
            wrong=_SCALE.changed(("tl.store(y + i", "tl.store(x + i")),
            says="The results go to x. A kernel returns nothing; it leaves its results where a pointer shows, here y.",
        ),
    ),
)


# --- 8.2 one tile ---------------------------------------------------------------------------------------------------


def tile_product_plain(grid: tuple[int, ...], x: Tensor, w: Tensor, y: Tensor, *sizes: int, **blocks: int) -> None:
    """8.2 in torch."""
    y.copy_(x @ w.T)


def _tile_cases() -> list[Case]:
    shown = "x ({}, {}), w ({}, {}), random; blocks of 16, {} x {} programs"
    cases = []
    for seed, (name, m, n, k, turned) in enumerate(
        (
            ("one tile, K fills no block", 5, 7, 9, False),
            ("K fills two blocks and a half, w lies transposed", 6, 4, 40, True),
            ("3 tiles of rows, 2 of columns", 35, 23, 16, False),
        )
    ):
        show = shown.format(m, k, n, k, _ceil(m, BLOCK), _ceil(n, BLOCK)) + TURNED * turned
        x, w = _rand(m, k, seed=10 + seed), _rand(n, k, seed=20 + seed)
        cases.append(Case(name=name, args=(x, w, turned), show=show))
    return cases


TURNED = "\nw lies transposed in memory: stride_wn is 1, and stride_wk is not"


def _turned(w: Tensor, margin: int = 2 * BLOCK) -> Tensor:
    """Both strides of w are told, so both ways have to work."""
    return _with_margins(w.mT.contiguous(), margin).mT


def _run_tile_product(kernel: Any, case: Case) -> dict:
    x, w, turned = case.args
    x, w = _with_margins(x), _turned(w) if turned else _with_margins(w)
    (m, k), n = x.shape, len(w)
    y = _result(m, n)
    grid = (_ceil(m, BLOCK), _ceil(n, BLOCK))
    with _watched({"x": x, "w": w, "y": y}, target="y", by_dot=True) as watch:
        kernel[grid](x, w, y, m, n, k, x.stride(0), *w.stride(), y.stride(0), BLOCK, BLOCK, BLOCK)
    return watch.report()


_TILE = Kernel.written(KERNELS, "tile_product", plain=tile_product_plain)
_ADD = 'tl.dot(a, b, total, input_precision="ieee")'
_LOAD_A, _LOAD_B = "mask=in_m & in_k[None, :], other=0.0", "mask=in_n & in_k[:, None], other=0.0"


def _without_dot(right: Kernel, product: str, written_out: str) -> Mistake:
    """Tiles multiplied number by number; `product` is the line with `tl.dot`, and `written_out` the same without."""
    return Mistake(
        name="multiplied without `tl.dot`",
        wrong=right.changed((product, written_out)),
        says="All numbers are right, but products are written out, and summed by ordinary multiplications and "
        "additions. Tensor cores, which have nearly all of a GPU's rate, are reached by `tl.dot` alone.",
    )


def _of_the_sum(right: Kernel) -> tuple[Mistake, ...]:
    """Mistakes of the sum over K, which 8.2 and 8.4 share."""
    return (
        _without_dot(right, f"total = {_ADD}", "total += tl.sum(a[:, :, None] * b[None, :, :], axis=1)"),
        Mistake(
            name="only the last block of K counts",
            wrong=right.changed((_ADD, 'tl.dot(a, b, input_precision="ieee")')),
            says="Each block's product replaces the one before. With K in one block that is no harm, and with more "
            "only the last is left: add it to `total`.",
        ),
        Mistake(
            name="the sum stops before the end of K",
            wrong=right.changed(("range(0, K, BLOCK_K)", "range(0, K - K % BLOCK_K, BLOCK_K)")),
            says="What does not fill a block is left out: the number of blocks was rounded down. Where K is a multiple "
            "of the block, as most real sizes are, nobody would notice.",
        ),
        Mistake(
            name="the sum is added to itself",
            wrong=right.changed(("total = tl.dot", "total += tl.dot")),
            says="`tl.dot(a, b, total)` adds to `total` already. With `+=` the sum so far comes in once more at every "
            "step: nothing with one block of K, too much with two. Take `=`, or leave `total` out of the brackets.",
        ),
        Mistake(
            name="k stands still",
            wrong=right.changed(("k = done + tl.arange", "k = tl.arange")),
            says="Every step of the loop takes the first block of K, pointers and mask alike. With one block nobody "
            "notices; with more, k begins at `done`.",
        ),
        Mistake(
            name="the first block of K again and again",
            wrong=right.changed(("k[None, :]\n        w_at", "(k - done)[None, :]\n        w_at")).changed(
                ("k[:, None] * stride_wk", "(k - done)[:, None] * stride_wk")
            ),
            says="Every step of the loop multiplies the first block of K. The mask moves on, the pointers stand still.",
        ),
        Mistake(
            name="the mask on k stands still",
            wrong=right.changed(("in_k = k < K", "in_k = (k - done) < K")),
            says="In the last step it reads past the end of the rows. The mask compares places within the block; as "
            "the pointers move on along K, so must the mask.",
        ),
        Mistake(
            name="no mask on k",
            wrong=right.changed((_LOAD_A, "mask=in_m, other=0.0"), (_LOAD_B, "mask=in_n, other=0.0")),
            says="Where K ends within a block, whatever lies behind the rows is multiplied and added in: the next row, "
            "mostly, and no error. Load 0 there, which adds "
            "nothing: a mask on k, and `other=0.0`. Or does a `<=` let one in?",
        ),
        Mistake(
            name="k is masked for x alone",
            wrong=right.changed((_LOAD_B, "mask=in_n, other=0.0")),
            says="Past K, x gives 0 and w whatever lies behind its rows. 0 times that is 0, unless it happens to be "
            "infinite or NaN: then one product spoils the whole sum. Mask both.",
        ),
        Mistake(
            name="masked numbers that may be anything",
            wrong=right.changed(
                (_LOAD_A, _LOAD_A.removesuffix(", other=0.0")), (_LOAD_B, _LOAD_B.removesuffix(", other=0.0"))
            ),
            says="The masks are right, but without `other` what is masked may be any number, and past K it is "
            "multiplied and added in. On most machines it happens to be 0, so tests pass. Say `other=0.0`, for x and "
            "for w.",
        ),
        Mistake(
            name="fp32 rounded before it is multiplied",
            wrong=right.changed((', input_precision="ieee"', "")),
            says="All numbers are right here, and coarser on a GPU: unless told otherwise, `tl.dot` rounds fp32 "
            'to TF32, with 10 bits after the point, so that tensor cores can take it. `input_precision="ieee"` forbids '
            "it; to bf16 it makes no difference.",
        ),
        Mistake(
            name="“and” between masks",
            wrong=right.changed(
                ("in_m & in_k", "in_m and in_k"), ("in_n & in_k", "in_n and in_k"), ("in_m & in_n", "in_m and in_n")
            ),
            says="`and` does not go through a tile place by place: it gives the second mask, and the first is "
            "forgotten. `&` makes one mask of two.",
        ),
        Mistake(
            name="masks of one dimension",
            wrong=right.changed(("[:, None], (n < N)[None, :]", ", n < N")).changed(
                ("in_m & in_k[None, :]", "in_m & in_k"), ("in_n & in_k[:, None]", "in_n & in_k")
            ),
            says="The masks have one dimension each, so `&` pairs place 0 with place 0, 1 with 1, and the result "
            "counts along the columns of every tile. A tile's mask has two dimensions: one mask down, `[:, None]`, "
            "and one across, `[None, :]`.",
        ),
        Mistake(
            name="w is not transposed",
            wrong=right.changed(
                ("n[None, :] * stride_wn + k[:, None] * stride_wk", "n[:, None] * stride_wn + k[None, :] * stride_wk"),
                ("mask=in_n & in_k[:, None]", "mask=(n < N)[:, None] & in_k[None, :]"),
            ),
            says="b is loaded with n down and k across, as w lies there; so the product is with w, not with w.T. As "
            "blocks are square here, the shapes fit all the same. For `tl.dot(a, b)` b has k down.",
        ),
        Mistake(
            name="a step of 1 along k in w",
            wrong=right.changed(("k[:, None] * stride_wk", "k[:, None]")),
            says="From one k to the next you go on by 1 in w. That holds where w lies row by row, not where it is "
            "transposed, as for a gradient: there `stride_wk` tells the step.",
        ),
        Mistake(
            name="the two strides of w exchanged",
            wrong=right.changed(("n[None, :] * stride_wn", "n[None, :] * stride_wk")).changed(
                ("k[:, None] * stride_wk", "k[:, None] * stride_wn")
            ),
            says="w is read the other way round. `stride_wn` is the step from one n to the next, `stride_wk` from one "
            "k to the next, whichever way w lies in memory.",
        ),
        Mistake(
            name="y is stored with the stride of x",
            wrong=right.changed(("[:, None] * stride_y", "[:, None] * stride_x")),
            says="Rows of y are as far apart as rows of x, as you store them. Every tensor has its own stride; they "
            "are equal only where K = N and nothing lies between rows.",
        ),
        Mistake(
            name="the programs' numbers exchanged",
            wrong=right.changed(("program_id(0)", "program_id(A)"), ("program_id(1)", "program_id(0)")).changed(
                ("program_id(A)", "program_id(1)")
            ),
            says="The grid is (tiles of rows, tiles of columns): number 0 counts along the rows, number 1 along the "
            "columns. Exchanged, some tiles are computed twice or not at all, unless there are as many of both.",
        ),
        Mistake(
            name="columns past N are stored",
            wrong=right.changed(("total, mask=in_m & in_n)", "total, mask=in_m)")),
            says="The last tile of columns sticks out over N, and stores there: into the rows that follow in memory. "
            "The store needs both masks.",
        ),
        Mistake(
            name="w is read past its last row",
            wrong=right.changed((_LOAD_B, "mask=in_k[:, None], other=0.0")),
            says="The result is right, but w is read past column tile N: nothing of that is stored, and still a GPU "
            "may end the program with “illegal memory access”. Mask n at the load, or stay within with a minimum.",
        ),
    )


TILE_PRODUCT = Exercise(
    id="8.2",
    title="one tile of a product",
    reference=_TILE,
    cases=_tile_cases,
    run=_run_tile_product,
    seconds=60,
    mistakes=(
        Mistake(
            name="the store has no mask",
            wrong=_TILE.changed((", total, mask=in_m & in_n)", ", total)")),
            says="A tile that sticks out over M or N is stored as a whole, into what lies behind. `tl.store` needs the "
            "mask of its rows and of its columns.",
        ),
        Mistake(
            name="rows past M are stored",
            wrong=_TILE.changed(("total, mask=in_m & in_n)", "total, mask=in_n)")),
            says="The last tile of rows sticks out over M, and stores there. The store needs both masks, "
            "joined by `&` (`and` keeps the second alone).",
        ),
        Mistake(
            name="x is read past its last row",
            wrong=_TILE.changed((_LOAD_A, "mask=in_k[None, :], other=0.0")),
            says="The result is right, but x is read past row M: nothing of that is stored, and still a GPU may end "
            "the program with “illegal memory access”. Mask m at the load, or stay within with a minimum.",
        ),
        *_of_the_sum(_TILE),
    ),
)


# --- 8.3 the plan of tiles ------------------------------------------------------------------------------------------


def _plan_reference(offsets: Tensor, n_tiles: int, block: int) -> Tensor:
    """The package's plan, for rows that all belong to a group."""
    return course_tiles.plan_tiles(offsets, int(offsets[-1]), block)[:, :n_tiles].contiguous()


def _plan_cases() -> list[Case]:
    cases = []
    for name, ends, block in (
        ("three groups, the second empty", [5, 5, 7], 4),
        ("a group of exactly two tiles", [8, 9, 20], 4),
        ("more groups than rows", [0, 1, 1, 1, 3], 8),
        ("seven groups, blocks of 16", [40, 40, 41, 73, 89, 89, 104], 16),
        ("no rows", [0, 0], 4),
    ):
        n_tiles = course_tiles.most_tiles(ends[-1], len(ends), block)
        cases.append(Case(name=name, args=(torch.tensor(ends, dtype=torch.int32), n_tiles, block)))
    return cases


def _planned(
    rows: Callable[[int, int, int], list[tuple[int, int]]] | None = None,
    entry: Callable[..., tuple] = lambda group, first, count, start, block: (group, first, count),
    unused: Callable[[int], tuple[int, int, int]] = lambda n_groups: (-1, 0, 0),
) -> Callable[[Tensor, int, int], Tensor]:
    """A plan with one of its steps done in another way; `rows` gives first row and number of a group's tiles."""

    def usual(start: int, end: int, block: int) -> list[tuple[int, int]]:
        return [(first, min(block, end - first)) for first in range(start, end, block)]

    def wrong(offsets: Tensor, n_tiles: int, block: int) -> Tensor:
        table, start = [], 0
        for group, end in enumerate(offsets.tolist()):
            tiles = (rows or usual)(start, end, block)
            table += [entry(group, first, count, start, block) for first, count in tiles]
            start = end
        if len(table) > n_tiles:
            raise IndexError("more tiles than there is room for")
        table += [unused(len(offsets))] * (n_tiles - len(table))
        return torch.tensor(table, dtype=torch.int32).reshape(n_tiles, 3).T.contiguous()

    return wrong


def _across_groups(offsets: Tensor, n_tiles: int, block: int) -> Tensor:
    n_rows = int(offsets[-1])
    firsts = range(0, n_rows, block)
    groups = torch.searchsorted(offsets, torch.tensor(firsts, dtype=torch.int32), right=True).tolist()
    table = [(group, first, min(block, n_rows - first)) for group, first in zip(groups, firsts, strict=True)]
    table += [(-1, 0, 0)] * (n_tiles - len(table))
    return torch.tensor(table[:n_tiles], dtype=torch.int32).reshape(-1, 3).T.contiguous()


def _only_used(offsets: Tensor, n_tiles: int, block: int) -> Tensor:
    plan = _plan_reference(offsets, n_tiles, block)
    return plan[:, plan[0] >= 0]


PLAN_TILES = Exercise(
    id="8.3",
    title="the plan of tiles",
    reference=_plan_reference,
    cases=_plan_cases,
    mistakes=(
        Mistake(
            name="tiles run across groups",
            wrong=_across_groups,
            says="The rows are cut every `block` rows, wherever groups end. A tile at a boundary then holds rows of "
            "two experts, and all of them get the weights of the first. Each group begins a tile of its own.",
        ),
        Mistake(
            name="the number of tiles rounded down",
            wrong=_planned(
                rows=lambda start, end, block: [(start + i * block, block) for i in range((end - start) // block)]
            ),
            says="Only full tiles are there: the last rows of most groups are computed by nobody. A remainder needs a "
            "tile, too, even for one row.",
        ),
        Mistake(
            name="rows counted past the group's end",
            wrong=_planned(entry=lambda group, first, count, start, block: (group, first, block)),
            says="Every tile says `block` rows, the last of a group too. The kernel would store rows of the next group "
            "with this one's weights: which of them wins is decided by chance.",
        ),
        Mistake(
            name="a full last tile has no rows",
            wrong=_planned(
                rows=lambda start, end, block: [
                    (first, (end - start) % block if end - first <= block else block)
                    for first in range(start, end, block)
                ]
            ),
            says="Where a group fills its last tile, that tile says 0 rows: the remainder of a division is 0 there. "
            "Use the smaller one of what is left and `block`.",
        ),
        Mistake(
            name="a tile for a group without rows",
            wrong=_planned(
                rows=lambda start, end, block: [
                    (first, min(block, end - first)) for first in range(start, max(end, start + 1), block)
                ]
            ),
            says="A group without rows gets a tile with 0 rows. It needs none, and with many empty experts the plan "
            "may overflow its bound.",
        ),
        Mistake(
            name="first rows counted within the group",
            wrong=_planned(entry=lambda group, first, count, start, block: (group, first - start, count)),
            says="The first row is counted from the group's own start. The kernel knows no starts; it wants a row of "
            "all rows.",
        ),
        Mistake(
            name="every tile of a group begins at its start",
            wrong=_planned(entry=lambda group, first, count, start, block: (group, start, count)),
            says="All tiles of a group have the same first row. The first begins at the group's start, the next one "
            "`block` rows later.",
        ),
        Mistake(
            name="unused tiles are not marked",
            wrong=_planned(unused=lambda n_groups: (0, 0, 0)),
            says="Unused tiles say group 0, which is a real one. With 0 rows the kernel stores nothing, but computes "
            "all of it; mark them with -1, so that it can leave at once.",
        ),
        Mistake(
            name="unused tiles have the number of groups",
            wrong=_planned(unused=lambda n_groups: (n_groups, 0, 0)),
            says="Unused tiles say group E: that is what a search behind the last end gives. Mark them with -1.",
        ),
        Mistake(
            name="only the tiles that are used",
            wrong=_only_used,
            says="There are only as many columns as tiles are used. How many that is depends on the offsets, so a "
            "GPU's host would have to wait for them; `n_tiles` is known without. Fill up with (-1, 0, 0).",
        ),
        Mistake(
            name="one line for each tile",
            wrong=lambda offsets, n_tiles, block: _plan_reference(offsets, n_tiles, block).T.contiguous(),
            says="It is (n_tiles, 3). Asked for is (3, n_tiles): all groups, then all first rows, then all numbers.",
        ),
        Mistake(
            name="64 bits in place of 32",
            wrong=lambda offsets, n_tiles, block: _plan_reference(offsets, n_tiles, block).long(),
            says="The numbers are right, and int64. The plan is int32, half as much for every program to read.",
        ),
    ),
)


# --- 8.4 the grouped product ----------------------------------------------------------------------------------------


def grouped_product_plain(
    grid: tuple[int, ...], x: Tensor, w: Tensor, y: Tensor, tiles: Tensor, *sizes: int, **blocks: int
) -> None:
    """8.4 in torch, tile by tile."""
    for group, first, count in tiles.T.tolist():
        if group >= 0:
            y[first : first + count] = x[first : first + count] @ w[group].T


def _grouped_cases() -> list[Case]:
    shown = "offsets = {}, x ({}, {}), w ({}, {}, {}), random; blocks of 16{}\ntiles = {}"
    cases = []
    for seed, (name, ends, n, k) in enumerate(
        (
            ("one group, K fills a block", [4], 3, BLOCK),
            ("two groups, K fills no block", [3, 8], 5, 7),
            ("four groups, the second empty, the last of 18 rows", [2, 2, 7, 25], 19, 25),
        )
    ):
        offsets = torch.tensor(ends, dtype=torch.int32)
        x, w = _rand(ends[-1], k, seed=30 + seed), _rand(len(ends), n, k, seed=40 + seed)
        n_tiles = course_tiles.most_tiles(ends[-1], len(ends), BLOCK)  # in the first case all of them are used
        tiles = _plan_reference(offsets, n_tiles, BLOCK)
        turned = k > BLOCK
        show = shown.format(ends, *x.shape, *w.shape, TURNED * turned, tiles.tolist())
        cases.append(Case(name=name, args=(x, w, tiles, turned), show=show))
    return cases


def _run_grouped(kernel: Any, case: Case) -> dict:
    x, w, tiles, turned = case.args
    x, w = _with_margins(x), (_turned if turned else _with_margins)(w, margin=2)
    _, n, k = w.shape
    y = _result(len(x), n)
    n_tiles = tiles.shape[1]
    grid = (n_tiles, _ceil(n, BLOCK))
    with _watched({"x": x, "w": w, "y": y, "tiles": tiles}, target="y", by_dot=True) as watch:
        strides = (x.stride(0), *w.stride(), y.stride(0))
        kernel[grid](x, w, y, tiles, n_tiles, n, k, *strides, BLOCK, BLOCK, BLOCK)
    return watch.report()


_GROUPED = Kernel.written(KERNELS, "grouped_product", plain=grouped_product_plain)

GROUPED_PRODUCT = Exercise(
    id="8.4",
    title="the grouped product",
    reference=_GROUPED,
    cases=_grouped_cases,
    run=_run_grouped,
    seconds=60,
    mistakes=(
        Mistake(
            name="the ragged edge is not masked",
            wrong=_GROUPED.changed(("total, mask=in_m & in_n)", "total, mask=in_n)")),
            says="A tile that its group does not fill is stored as a whole: over the first rows of the next group, "
            "with the wrong expert's weights. Which of the two programs stores last is chance. Mask the rows: only the "
            "first `count` of a tile are its own.",
        ),
        Mistake(
            name="the tile's number in place of its group",
            wrong=_GROUPED.changed(("w += group.to(tl.int64)", "w += tile.to(tl.int64)")),
            says="Each tile takes the weights of the expert with the tile's own number. That is right as long as every "
            "expert has one tile; the plan tells the group.",
        ),
        Mistake(
            name="all tiles with the first expert's weights",
            wrong=_GROUPED.changed(("group.to(tl.int64) * stride_we", "0 * stride_we")),
            says="All rows are multiplied by expert 0's matrix: the pointer to w is not moved to the tile's expert.",
        ),
        Mistake(
            name="the next expert's weights",
            wrong=_GROUPED.changed(("group.to(tl.int64)", "(group + 1).to(tl.int64)")),
            says="Every tile is multiplied by the matrix of the expert after its own. Groups count from 0.",
        ),
        Mistake(
            name="rows as if all tiles were full",
            wrong=_GROUPED.changed(("row = (first + place)", "row = (tile * BLOCK_M + place)")),
            says="A tile's rows are taken at tile · BLOCK_M, as in 8.2. Here tiles before it may be ragged, so the "
            "plan tells the first row.",
        ),
        Mistake(
            name="a row of all compared with the tile's count",
            wrong=_GROUPED.changed(("(place < count)", "(row < count)")),
            says="`count` is how many rows the tile has; `row` counts all rows. From the second group on the mask is "
            "False where it should not be. Compare places within the tile, or rows with `first + count`.",
        ),
        Mistake(
            name="every tile begins at row 0",
            wrong=_GROUPED.changed(("row = (first + place)", "row = (0 * first + place)")),
            says="All tiles work on the first rows: `first` is not added.",
        ),
        Mistake(
            name="unused tiles are not skipped",
            wrong=_GROUPED.changed(("if group < 0:", "if group < -1:")),
            says="Unused tiles, of group -1, compute too, with weights from before the first matrix. Their count is 0, "
            "so nothing is stored; but what is read there is nobody's memory.",
        ),
        Mistake(
            name="the plan read tile by tile",
            wrong=_GROUPED.changed(("tl.load(tiles + tile)", "tl.load(tiles + 3 * tile)")).changed(
                ("tiles + n_tiles + tile", "tiles + 3 * tile + 1"),
                ("tiles + 2 * n_tiles + tile", "tiles + 3 * tile + 2"),
            ),
            says="The plan is read as if a tile's three numbers lay side by side. It is (3, n_tiles): all groups come "
            "first, then all first rows, then all counts.",
        ),
        Mistake(
            name="the first row taken for the count",
            wrong=_GROUPED.changed(("tiles + 2 * n_tiles + tile", "tiles + n_tiles + tile")),
            says="The count is read from the plan's second line, which holds first rows. Counts are in the third, two "
            "times n_tiles on.",
        ),
        Mistake(
            name="x is read past the group's rows",
            wrong=_GROUPED.changed((_LOAD_A, "mask=in_k[None, :], other=0.0")),
            says="The result is right: rows that are not the group's are computed, and not stored. But the last tile "
            "reads past the end of x, and a GPU may end the program there. Mask the rows at the load, or stay within "
            "with a minimum.",
        ),
        *_of_the_sum(_GROUPED),
    ),
)


# --- 8.5 the gradient of the weights --------------------------------------------------------------------------------


def weight_gradient_plain(
    grid: tuple[int, ...], dy: Tensor, x: Tensor, dw: Tensor, offsets: Tensor, *sizes: int, **blocks: int
) -> None:
    """8.5 in torch, expert by expert."""
    start = 0
    for e, end in enumerate(offsets.tolist()):
        dw[e] = dy[start:end].T @ x[start:end]
        start = end


def _gradient_cases() -> list[Case]:
    shown = "offsets = {}, dy ({}, {}), x ({}, {}), random; blocks of 16"
    cases = []
    for seed, (name, ends, n, k) in enumerate(
        (
            ("two experts, 3 and 5 rows", [3, 8], 5, 7),
            ("three experts, the second empty, the last of 37 rows", [6, 6, 43], 9, 18),
        )
    ):
        dy, x = _rand(ends[-1], n, seed=50 + seed), _rand(ends[-1], k, seed=60 + seed)
        offsets = torch.tensor(ends, dtype=torch.int32)
        cases.append(Case(name=name, args=(dy, x, offsets), show=shown.format(ends, *dy.shape, *x.shape)))
    return cases


def _run_gradient(kernel: Any, case: Case) -> dict:
    dy, x, offsets = (_with_margins(t) for t in case.args)
    n, k, n_experts = dy.shape[1], x.shape[1], len(offsets)
    dw = torch.full((n_experts + 2, n, k), UNTOUCHED)[1:-1]  # contiguous, as the kernel is told
    grid = (n_experts, _ceil(n, BLOCK), _ceil(k, BLOCK))
    with _watched({"dy": dy, "x": x, "dw": dw, "offsets": offsets}, target="dw", by_dot=True) as watch:
        kernel[grid](dy, x, dw, offsets, n, k, dy.stride(0), x.stride(0), BLOCK, BLOCK, BLOCK)
    return watch.report()


_GRADIENT = Kernel.written(KERNELS, "weight_gradient", plain=weight_gradient_plain)
_SUM = 'total = tl.dot(a.T, b, total, input_precision="ieee")'

WEIGHT_GRADIENT = Exercise(
    id="8.5",
    title="the gradient of the weights",
    reference=_GRADIENT,
    cases=_gradient_cases,
    run=_run_gradient,
    seconds=60,
    mistakes=(
        _without_dot(_GRADIENT, _SUM, "total += tl.sum(a[:, :, None] * b[:, None, :], axis=0)"),
        Mistake(
            name="an empty expert gets no zeros",
            wrong=_GRADIENT.changed(
                ("    total = tl.zeros", "    if start == end:\n        return\n    total = tl.zeros")
            ),
            says="An expert without rows is left out, so its gradient is whatever the memory held before: NaN, on a "
            "bad day. Its gradient is 0, and somebody has to write that down. Leave the loop to do nothing, and store.",
        ),
        Mistake(
            name="rows of the next expert are added",
            wrong=_GRADIENT.changed(
                ("mask=is_mine & in_n[None, :]", "mask=in_n[None, :]"),
                ("mask=is_mine & in_k[None, :]", "mask=in_k[None, :]"),
            ),
            says="The last block of rows reaches into the next expert's, and adds them. In 8.4 that was no harm, for "
            "rows did not meet; here they are summed. Load 0 for rows from `end` on.",
        ),
        Mistake(
            name="summed from the first row of all",
            wrong=_GRADIENT.changed(("range(start, end, BLOCK_R)", "range(0, end, BLOCK_R)")),
            says="Each expert sums the rows of all experts before it, too. Its own begin where those of the one before "
            "end.",
        ),
        Mistake(
            name="ends taken for starts",
            wrong=_GRADIENT.changed(
                ("tl.load(offsets + e - 1, mask=e > 0, other=0)", "tl.load(offsets + e)"),
                ("end = tl.load(offsets + e)", "end = tl.load(offsets + e + 1)"),
            ),
            says="`offsets[e]` is where expert e's rows end. They begin at the end of the one before, those of expert "
            "0 at 0.",
        ),
        Mistake(
            name="read before the first offset",
            wrong=_GRADIENT.changed(("tl.load(offsets + e - 1, mask=e > 0, other=0)", "tl.load(offsets + e - 1)")),
            says="Expert 0 asks for `offsets[-1]`, which in a kernel is not the last one but what lies before the "
            "first. Mask it: `mask=e > 0, other=0`.",
        ),
        Mistake(
            name="masked numbers that may be anything",
            wrong=_GRADIENT.changed(
                ("mask=is_mine & in_n[None, :], other=0.0", "mask=is_mine & in_n[None, :]"),
                ("mask=is_mine & in_k[None, :], other=0.0", "mask=is_mine & in_k[None, :]"),
            ),
            says="The masks are right, but without `other` what is masked may be any number, and rows past the group's "
            "end are multiplied and added in. Say `other=0.0`, for dy and for x.",
        ),
        Mistake(
            name="fp32 rounded before it is multiplied",
            wrong=_GRADIENT.changed((', input_precision="ieee"', "")),
            says="All numbers are right here, and coarser on a GPU: unless told otherwise, `tl.dot` rounds fp32 "
            'to TF32, with 10 bits after the point. `input_precision="ieee"` forbids it.',
        ),
        Mistake(
            name="the sum is added to itself",
            wrong=_GRADIENT.changed(("total = tl.dot", "total += tl.dot")),
            says="`tl.dot(a.T, b, total)` adds to `total` already; with `+=` the sum so far comes in once more at "
            "every step. Take `=`, or leave `total` out of the brackets.",
        ),
        Mistake(
            name="the last rows are left out",
            wrong=_GRADIENT.changed(
                ("range(start, end, BLOCK_R)", "range(start, end - (end - start) % BLOCK_R, BLOCK_R)")
            ),
            says="Rows that fill no block are left out. Few groups are a multiple of a block.",
        ),
        Mistake(
            name="only the last block of rows counts",
            wrong=_GRADIENT.changed((_SUM, 'total = tl.dot(a.T, b, input_precision="ieee")')),
            says="Each block's product replaces the one before: add it to `total`.",
        ),
        Mistake(
            name="all experts write to the first one's place",
            wrong=_GRADIENT.changed(("dw += e.to(tl.int64) * N * K", "dw += 0 * e")),
            says="Every program stores into dw[0]. Expert e's matrix begins e · N · K numbers on.",
        ),
        Mistake(
            name="stored transposed",
            wrong=_GRADIENT.changed(("dw + n[:, None] * K + k[None, :]", "dw + n[:, None] + k[None, :] * N")),
            says="dw is written as (E, K, N). It is (E, N, K), like w: a row for every n, K numbers long.",
        ),
        Mistake(
            name="dy and x exchanged",
            wrong=_GRADIENT.changed(
                ("dy + row[:, None] * stride_dy", "A"),
                ("x + row[:, None] * stride_x", "dy + row[:, None] * stride_dy"),
                ("load(A", "load(x + row[:, None] * stride_x"),
            ),
            says="This is x.T @ dy, of shape (K, N): the transposed of what is asked for. A row of dw belongs to an "
            "output n, so the left side is dy.",
        ),
    ),
)

EXERCISES = (SCALE, TILE_PRODUCT, PLAN_TILES, GROUPED_PRODUCT, WEIGHT_GRADIENT)
