"""Answers to notebook 08. Kernels are in other styles than the reference, and mistakes are made in two of them."""

import torch

from moe_lab.course.kernel_cells import Kernel, tl, triton

# --- 8.1 ------------------------------------------------------------------------------------------------------------


@triton.jit
def scale_by_pointers(x, y, n, factor, BLOCK: tl.constexpr):
    begin = tl.program_id(0) * BLOCK
    place = tl.arange(0, BLOCK)
    rest = n - begin
    a = tl.load(x + begin + place, mask=place < rest, other=0.0)
    tl.store(y + begin + place, a * factor, mask=rest > place)


@triton.jit
def scale_in_two_steps(x, y, n, factor, BLOCK: tl.constexpr):
    block = tl.program_id(axis=0)
    first = block * BLOCK
    numbers = first + tl.arange(0, BLOCK)
    valid = numbers <= n - 1
    source = x + numbers
    target = y + numbers
    values = tl.load(source, valid)
    values *= factor
    tl.store(target, values, valid)


@triton.jit
def scale_clamped(x, y, n, factor, BLOCK: tl.constexpr):
    i = BLOCK * tl.program_id(0) + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + tl.minimum(i, n - 1)) * factor, mask=i < n)


ONE, TWO = Kernel.of(scale_by_pointers), Kernel.of(scale_in_two_steps)
SCALE = {
    "no mask": [
        ONE.changed((", mask=place < rest, other=0.0", ""), (", mask=rest > place", "")),
        TWO.changed(("(source, valid)", "(source)"), ("values, valid)", "values)")),
    ],
    "the store has no mask": [
        ONE.changed((", mask=rest > place", "")),
        TWO.changed(("values, valid)", "values)")),
    ],
    "the load has no mask": [
        ONE.changed((", mask=place < rest, other=0.0", "")),
        TWO.changed(("(source, valid)", "(source)")),
    ],
    "the mask looks at the place in the block": [
        ONE.changed(("rest = n - begin", "rest = n")),
        TWO.changed(("valid = numbers <= n - 1", "valid = numbers - first < n")),
    ],
    "one number too many": [
        ONE.changed(("place < rest", "place <= rest"), ("rest > place", "rest >= place")),
        TWO.changed(("numbers <= n - 1", "numbers <= n")),
    ],
    "every program does the first block": [
        ONE.changed(("begin = tl.program_id(0) * BLOCK", "begin = 0")),
        TWO.changed(("block = tl.program_id(axis=0)", "block = tl.program_id(axis=1)")),
    ],
    "blocks overlap": [
        ONE.changed(("begin = tl.program_id(0) * BLOCK", "begin = tl.program_id(0)")),
        TWO.changed(("first = block * BLOCK", "first = block")),
    ],
    "the factor is forgotten": [
        ONE.changed(("a * factor", "a")),
        TWO.changed(("    values *= factor\n", "")),
    ],
    "stored back into x": [
        ONE.changed(("tl.store(y +", "tl.store(x +")),
        TWO.changed(("tl.store(target", "tl.store(source")),
    ],
    "x[i] in place of a load": [
        ONE.changed(("tl.load(x + begin + place, mask=place < rest, other=0.0)", "x[begin + place]")),
        TWO.changed(("tl.load(source, valid)", "x[numbers]")),
    ],
    "y[i] in place of a store": [
        ONE.changed(("tl.store(y + begin + place, a * factor, mask=rest > place)", "y[begin + place] = a * factor")),
        TWO.changed(("tl.store(target, values, valid)", "y[numbers] = values")),
    ],
}

# --- 8.2 ------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_by_pointers(
    x, w, y, M, N, K, stride_x, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    depth = tl.arange(0, BLOCK_K)
    x_at = x + rows * stride_x + depth[None, :]
    w_at = w + columns * stride_wn + depth[:, None] * stride_wk
    rest = K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(tl.cdiv(K, BLOCK_K)):
        left = tl.load(x_at, mask=(rows < M) & (depth[None, :] < rest), other=0)
        right = tl.load(w_at, mask=(columns < N) & (depth[:, None] < rest), other=0)
        acc += tl.dot(left, right, input_precision="ieee")
        rest -= BLOCK_K
        x_at += BLOCK_K
        w_at += BLOCK_K * stride_wk
    tl.store(y + rows * stride_y + columns, acc, mask=(rows < M) & (columns < N))


@triton.jit
def tile_clamped(
    x, w, y, M, N, K, stride_x, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = BLOCK_M * tl.program_id(0) + tl.arange(0, BLOCK_M)
    n = BLOCK_N * tl.program_id(1) + tl.arange(0, BLOCK_N)
    x_row = x + tl.minimum(m, M - 1)[:, None] * stride_x
    w_row = w + (n % N)[:, None] * stride_wn
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    done = 0
    while done < K:
        k = done + tl.arange(0, BLOCK_K)[None, :]
        a = tl.load(x_row + k, mask=k < K, other=0.0)
        b = tl.load(w_row + k * stride_wk, mask=k < K, other=0.0)
        total = tl.dot(a, b.T, acc=total, input_precision="ieee")
        done += BLOCK_K
    y += m[:, None] * stride_y
    is_row, is_column = m[:, None] < M, n[None, :] < N
    tl.store(y + n[None, :], total, mask=is_row & is_column)


@triton.jit
def tile_transposed(
    x, w, y, M, N, K, stride_x, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    turned = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in range(tl.cdiv(K, BLOCK_K)):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(w + n * stride_wn + k[None, :] * stride_wk, mask=(n < N) & (k < K)[None, :], other=0.0)
        b = tl.load(x + m * stride_x + k[:, None], mask=(m < M) & (k < K)[:, None], other=0.0)
        turned += tl.dot(a, b, input_precision="ieee")
    tl.store(y + m * stride_y + n, turned, mask=(m < M) & (n < N))


@triton.jit
def tile_by_block_pointers(
    x, w, y, M, N, K, stride_x, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    x_at = tl.make_block_ptr(x, (M, K), (stride_x, 1), (m, 0), (BLOCK_M, BLOCK_K), (1, 0))
    w_at = tl.make_block_ptr(w, (K, N), (stride_wk, stride_wn), (0, n), (BLOCK_K, BLOCK_N), (0, 1))
    y_at = tl.make_block_ptr(y, (M, N), (stride_y, 1), (m, n), (BLOCK_M, BLOCK_N), (1, 0))
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, K, BLOCK_K):
        a = tl.load(x_at, boundary_check=(0, 1), padding_option="zero")
        b = tl.load(w_at, boundary_check=(0, 1), padding_option="zero")
        total = tl.dot(a, b, total, input_precision="ieee")
        x_at = tl.advance(x_at, (0, BLOCK_K))
        w_at = tl.advance(w_at, (BLOCK_K, 0))
    tl.store(y_at, total.to(y.dtype.element_ty), boundary_check=(0, 1))


@triton.jit
def tile_by_descriptors(
    x, w, y, M, N, K, stride_x, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    x_tiles = tl.make_tensor_descriptor(x, [M, K], [stride_x, 1], [BLOCK_M, BLOCK_K])
    y_tiles = tl.make_tensor_descriptor(y, [M, N], [stride_y, 1], [BLOCK_M, BLOCK_N])
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if stride_wk == 1:
        w_tiles = tl.make_tensor_descriptor(w, [N, K], [stride_wn, 1], [BLOCK_N, BLOCK_K])
    else:
        w_tiles = tl.make_tensor_descriptor(w, [K, N], [stride_wk, 1], [BLOCK_K, BLOCK_N])
    for done in range(0, K, BLOCK_K):
        a = x_tiles.load([first, done])
        b = w_tiles.load([column, done]).T if stride_wk == 1 else w_tiles.load([done, column])
        total = tl.dot(a, b, total, input_precision="ieee")
    y_tiles.store([first, column], total)


@triton.jit
def tile_by_scalars(
    x, w, y, M, N, K, stride_x, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(K):
        a = tl.load(x + m * stride_x + k, mask=m < M, other=0.0)
        b = tl.load(w + n * stride_wn + k * stride_wk, mask=n < N, other=0.0)
        total += a * b
    tl.store(y + m * stride_y + n, total, mask=(m < M) & (n < N))


ONE, TWO = Kernel.of(tile_by_pointers), Kernel.of(tile_clamped)
BLOCKS, DESCRIPTORS = Kernel.of(tile_by_block_pointers), Kernel.of(tile_by_descriptors)
IS_ROW = "tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M) < M"
IS_COLUMN = "tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N) < N"
X_CHECKED = 'tl.load(x_at, boundary_check=(0, 1), padding_option="zero")'
W_CHECKED = 'tl.load(w_at, boundary_check=(0, 1), padding_option="zero")'
TILE = {
    "the store has no mask": [
        ONE.changed(("acc, mask=(rows < M) & (columns < N))", "acc)")),
        TWO.changed(("total, mask=is_row & is_column)", "total)")),
        BLOCKS.changed(("element_ty), boundary_check=(0, 1))", "element_ty))")),
    ],
    "rows past M are stored": [
        ONE.changed(("acc, mask=(rows < M) & (columns < N))", "acc, mask=columns < N)")),
        TWO.changed(("total, mask=is_row & is_column)", "total, mask=is_column)")),
        DESCRIPTORS.changed(("(y, [M, N]", "(y, [M + BLOCK_M, N]")),
    ],
    "x is read past its last row": [
        ONE.changed(("mask=(rows < M) & (depth[None, :] < rest)", "mask=depth[None, :] < rest")),
        TWO.changed(("tl.minimum(m, M - 1)[:, None]", "m[:, None]")),
        BLOCKS.changed((X_CHECKED, X_CHECKED.replace("(0, 1)", "(1,)"))),
        DESCRIPTORS.changed(("(x, [M, K]", "(x, [M + BLOCK_M, K]")),
    ],
    "multiplied without `tl.dot`": [
        ONE.changed(
            (
                'tl.dot(left, right, input_precision="ieee")',
                "tl.sum(left[:, :, None] * tl.broadcast_to(right[None, :, :], BLOCK_M, BLOCK_K, BLOCK_N), 1)",
            )
        ),
        tile_by_scalars,
    ],
    "only the last block of K counts": [
        ONE.changed(("acc += tl.dot", "acc = tl.dot")),
        TWO.changed((", acc=total", "")),
    ],
    "the sum stops before the end of K": [
        ONE.changed(("range(tl.cdiv(K, BLOCK_K))", "range(K // BLOCK_K)")),
        TWO.changed(("while done < K:", "while done + BLOCK_K <= K:")),
    ],
    "the first block of K again and again": [
        ONE.changed(("        x_at += BLOCK_K\n        w_at += BLOCK_K * stride_wk\n", "")),
        TWO.changed(("x_row + k,", "x_row + k - done,"), ("k * stride_wk", "(k - done) * stride_wk")),
    ],
    "the mask on k stands still": [
        ONE.changed(("        rest -= BLOCK_K\n", "")),
        TWO.changed(
            ("a = tl.load(x_row + k, mask=k < K", "a = tl.load(x_row + k, mask=k - done < K"),
            ("stride_wk, mask=k < K", "stride_wk, mask=k - done < K"),
        ),
    ],
    "no mask on k": [
        ONE.changed(("(rows < M) & (depth[None, :] < rest)", "rows < M"), (" & (depth[:, None] < rest)", "")),
        TWO.changed(
            ("x_row + k, mask=k < K, other=0.0", "x_row + k"), ("stride_wk, mask=k < K, other=0.0", "stride_wk")
        ),
    ],
    "k is masked for x alone": [
        ONE.changed((" & (depth[:, None] < rest)", "")),
        TWO.changed(("stride_wk, mask=k < K, other=0.0", "stride_wk")),
    ],
    "the two strides of w exchanged": [
        ONE.changed(
            ("columns * stride_wn + depth[:, None] * stride_wk", "columns * stride_wk + depth[:, None] * stride_wn"),
            ("w_at += BLOCK_K * stride_wk", "w_at += BLOCK_K * stride_wn"),
        ),
        TWO.changed(
            ("(n % N)[:, None] * stride_wn", "n[:, None] * stride_wk"),
            ("k * stride_wk, mask=k < K", "k * stride_wn, mask=(k < K) & (n < N)[:, None]"),
        ),
    ],
    "y is stored with the stride of x": [
        ONE.changed(("rows * stride_y", "rows * stride_x")),
        TWO.changed(("y += m[:, None] * stride_y", "y += m[:, None] * stride_x")),
    ],
    "the programs' numbers exchanged": [
        ONE.changed(
            ("rows = tl.program_id(0)", "rows = tl.program_id(1)"),
            ("columns = tl.program_id(1)", "columns = tl.program_id(0)"),
        ),
        TWO.changed(
            ("m = BLOCK_M * tl.program_id(0)", "m = BLOCK_M * tl.program_id(1)"),
            ("n = BLOCK_N * tl.program_id(1)", "n = BLOCK_N * tl.program_id(0)"),
        ),
    ],
    "columns past N are stored": [
        ONE.changed(("acc, mask=(rows < M) & (columns < N))", "acc, mask=rows < M)")),
        TWO.changed(("mask=is_row & is_column", "mask=is_row")),
    ],
    "w is read past its last row": [
        ONE.changed(("mask=(columns < N) & (depth[:, None] < rest)", "mask=depth[:, None] < rest")),
        TWO.changed(("(n % N)[:, None]", "n[:, None]")),
    ],
    "the sum is added to itself": [
        ONE.changed(("tl.dot(left, right", "tl.dot(left, right, acc")),
        TWO.changed(("total = tl.dot", "total += tl.dot")),
    ],
    "k stands still": [
        ONE.changed(("        rest -= BLOCK_K\n        x_at += BLOCK_K\n        w_at += BLOCK_K * stride_wk\n", "")),
        TWO.changed(("k = done + tl.arange", "k = tl.arange")),
    ],
    "masked numbers that may be anything": [
        ONE.changed(
            ("(rows < M) & (depth[None, :] < rest), other=0", "(rows < M) & (depth[None, :] < rest)"),
            (" & (depth[:, None] < rest), other=0", " & (depth[:, None] < rest)"),
        ),
        TWO.changed(
            ("x_row + k, mask=k < K, other=0.0", "x_row + k, mask=k < K"),
            ("stride_wk, mask=k < K, other=0.0", "stride_wk, mask=k < K"),
        ),
        BLOCKS.changed(
            (X_CHECKED, X_CHECKED.replace(', padding_option="zero"', "")),
            (W_CHECKED, W_CHECKED.replace(', padding_option="zero"', "")),
        ),
    ],
    "fp32 rounded before it is multiplied": [
        ONE.changed((', input_precision="ieee"', "")),
        TWO.changed((', input_precision="ieee"', ', input_precision="tf32"')),
    ],
    "“and” between masks": [
        ONE.changed(
            ("(rows < M) & (depth[None, :] < rest)", "(rows < M) and (depth[None, :] < rest)"),
            ("(columns < N) & (depth", "(columns < N) and (depth"),
            ("(rows < M) & (columns < N)", "(rows < M) and (columns < N)"),
        ),
        Kernel.of(tile_transposed).changed(
            ("(n < N) & (k < K)[None, :]", "(n < N) and (k < K)[None, :]"),
            ("(m < M) & (k < K)[:, None]", "(m < M) and (k < K)[:, None]"),
            ("(m < M) & (n < N)", "(m < M) and (n < N)"),
        ),
    ],
    "masks of one dimension": [
        ONE.changed(
            (
                "    rest = K\n",
                f"    rest = K\n    is_row = {IS_ROW}\n    is_column = {IS_COLUMN}\n",
            ),
            ("(rows < M) & (depth[None, :] < rest)", "is_row & (depth < rest)"),
            ("(columns < N) & (depth[:, None] < rest)", "is_column & (depth < rest)"),
            ("(rows < M) & (columns < N)", "is_row & is_column"),
        ),
        ONE.changed(
            (
                "(rows < M) & (depth[None, :] < rest)",
                f"(rest > depth) & ({IS_ROW})",
            ),
            (
                "(columns < N) & (depth[:, None] < rest)",
                f"(rest > depth) & ({IS_COLUMN})",
            ),
            (
                "(rows < M) & (columns < N)",
                f"({IS_COLUMN}) & ({IS_ROW})",
            ),
        ),
    ],
    "w is not transposed": [
        ONE.changed(
            (
                "columns * stride_wn + depth[:, None] * stride_wk",
                "tl.trans(columns) * stride_wn + depth[None, :] * stride_wk",
            ),
            ("mask=(columns < N) & (depth[:, None] < rest)", "mask=(tl.trans(columns) < N) & (depth[None, :] < rest)"),
        ),
        Kernel.of(tile_transposed).changed(
            ("n * stride_wn + k[None, :] * stride_wk", "n.T * stride_wn + k[:, None] * stride_wk"),
            ("(n < N) & (k < K)[None, :]", "(n.T < N) & (k < K)[:, None]"),
        ),
    ],
    "a step of 1 along k in w": [
        ONE.changed(
            ("depth[:, None] * stride_wk", "depth[:, None]"), ("w_at += BLOCK_K * stride_wk", "w_at += BLOCK_K")
        ),
        TWO.changed(("w_row + k * stride_wk", "w_row + k")),
    ],
}

# --- 8.3 ------------------------------------------------------------------------------------------------------------


def by_loop(offsets, n_tiles, block, number=lambda count, b: -(-count // b), rows=min, first=None, unused=(-1, 0, 0)):
    plan, tile, start = torch.zeros(3, n_tiles, dtype=torch.int32), 0, 0
    plan[:] = torch.tensor(unused, dtype=torch.int32)[:, None]
    for group, end in enumerate(offsets.tolist()):
        for i in range(number(end - start, block)):
            begin = start + i * block
            entry = (group, first(start, i, block) if first else begin, rows(end - begin, block))
            plan[:, tile] = torch.tensor(entry)
            tile += 1
        start = end
    return plan


def by_vectors(offsets, n_tiles, block, used=None, count=None, row=None, past=None, turn=None):
    ends = offsets.long()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    tiles = (ends - starts + block - 1).div(block, rounding_mode="floor")
    if used is not None:
        tiles = used(ends - starts, tiles)
    group = torch.repeat_interleave(torch.arange(len(ends)), tiles)
    number = torch.arange(len(group)) - (tiles.cumsum(0) - tiles)[group]
    first = starts[group] + number * block
    left = ends[group] - first
    rows = count(left) if count else left.clamp(max=block)
    plan = torch.stack([group, row(first, starts[group]) if row else first, rows]).int()
    filler = torch.tensor(past or [-1, 0, 0], dtype=torch.int32)[:, None].expand(3, n_tiles - plan.shape[1])
    return torch.cat([plan, filler], 1)


def by_search(offsets, n_tiles, block):
    starts = torch.nn.functional.pad(offsets[:-1], (1, 0))
    tile_ends = ((offsets - starts + block - 1) // block).cumsum(0)
    tile = torch.arange(n_tiles)
    group = torch.searchsorted(tile_ends, tile, right=True)
    used = group < len(offsets)
    safe = torch.where(used, group, 0)
    row = starts[safe] + (tile - torch.nn.functional.pad(tile_ends[:-1], (1, 0))[safe]) * block
    count = torch.minimum(offsets[safe] - row, torch.tensor(block))
    return torch.stack([torch.where(used, v, e) for v, e in ((group, -1), (row, 0), (count, 0))]).int()


def across_in_a_loop(offsets, n_tiles, block):
    ends, plan = offsets.tolist(), []
    for first in range(0, ends[-1], block):
        group = next(g for g, end in enumerate(ends) if end > first)
        plan.append([group, first, min(block, ends[-1] - first)])
    plan += [[-1, 0, 0]] * (n_tiles - len(plan))
    return torch.tensor(plan, dtype=torch.int32).reshape(n_tiles, 3).T


def across_at_once(offsets, n_tiles, block):
    first = torch.arange(n_tiles) * block
    group = (first[:, None] >= offsets).sum(1)
    is_used = first < offsets[-1]
    plan = torch.stack([group, first, (offsets[-1] - first).clamp(0, block)])
    return torch.where(is_used, plan, torch.tensor([[-1], [0], [0]])).int()


def used_only(offsets, n_tiles, block):
    plan, start = [], 0
    for group, end in enumerate(offsets.tolist()):
        plan += [[group, row, min(block, end - row)] for row in range(start, end, block)]
        start = end
    return torch.tensor(plan, dtype=torch.int32).reshape(-1, 3).T


PLAN = {
    "tiles run across groups": [across_in_a_loop, across_at_once],
    "the number of tiles rounded down": [
        lambda o, n, b: by_loop(o, n, b, number=lambda count, b: count // b),
        lambda o, n, b: by_vectors(o, n, b, used=lambda counts, tiles: counts // b),
    ],
    "rows counted past the group's end": [
        lambda o, n, b: by_loop(o, n, b, rows=lambda left, b: b),
        lambda o, n, b: by_vectors(o, n, b, count=lambda left: torch.full_like(left, b)),
    ],
    "a full last tile has no rows": [
        lambda o, n, b: by_loop(o, n, b, rows=lambda left, b: b if left > b else left % b),
        lambda o, n, b: by_vectors(o, n, b, count=lambda left: torch.where(left > b, b, left % b)),
    ],
    "a tile for a group without rows": [
        lambda o, n, b: by_loop(o, n, b, number=lambda count, b: max(1, -(-count // b))),
        lambda o, n, b: by_vectors(
            o, n, b, used=lambda counts, tiles: tiles.clamp(min=1), count=lambda left: left.clamp(0, b)
        ),
    ],
    "first rows counted within the group": [
        lambda o, n, b: by_loop(o, n, b, first=lambda start, i, b: i * b),
        lambda o, n, b: by_vectors(o, n, b, row=lambda first, start: first - start),
    ],
    "every tile of a group begins at its start": [
        lambda o, n, b: by_loop(o, n, b, first=lambda start, i, b: start),
        lambda o, n, b: by_vectors(o, n, b, row=lambda first, start: start),
    ],
    "unused tiles are not marked": [
        lambda o, n, b: by_loop(o, n, b, unused=(0, 0, 0)),
        lambda o, n, b: by_vectors(o, n, b, past=[0, 0, 0]),
    ],
    "unused tiles have the number of groups": [
        lambda o, n, b: by_loop(o, n, b, unused=(len(o), 0, 0)),
        lambda o, n, b: by_vectors(o, n, b, past=[len(o), 0, 0]),
    ],
    "only the tiles that are used": [
        used_only,
        lambda o, n, b: (lambda plan: plan[:, plan[0] != -1])(by_vectors(o, n, b)),
    ],
    "one line for each tile": [
        lambda o, n, b: by_loop(o, n, b).T,
        lambda o, n, b: by_vectors(o, n, b).permute(1, 0),
    ],
    "64 bits in place of 32": [
        lambda o, n, b: by_loop(o, n, b).long(),
        lambda o, n, b: by_vectors(o, n, b).to(torch.int64),
    ],
}

# --- 8.4 ------------------------------------------------------------------------------------------------------------


@triton.jit
def grouped_by_pointers(
    x, w, y, tiles, n_tiles, N, K, stride_x, stride_we, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    number, column = tl.program_id(0), tl.program_id(1)
    expert = tl.load(tiles + number)
    if expert == -1:
        return
    begin = tl.load(tiles + number + n_tiles)
    height = tl.load(tiles + number + n_tiles * 2)
    inner = tl.arange(0, BLOCK_M)[:, None]
    rows = begin + inner
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    depth = tl.arange(0, BLOCK_K)
    x_at = x + rows * stride_x + depth[None, :]
    w_at = w + expert * stride_we + columns * stride_wn + depth[:, None] * stride_wk
    rest = K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(tl.cdiv(K, BLOCK_K)):
        left = tl.load(x_at, mask=(inner < height) & (depth[None, :] < rest), other=0)
        right = tl.load(w_at, mask=(columns < N) & (depth[:, None] < rest), other=0)
        acc += tl.dot(left, right, input_precision="ieee")
        rest -= BLOCK_K
        x_at += BLOCK_K
        w_at += BLOCK_K * stride_wk
    tl.store(y + rows * stride_y + columns, acc, mask=(inner < height) & (columns < N))


@triton.jit
def grouped_clamped(
    x, w, y, tiles, n_tiles, N, K, stride_x, stride_we, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    this = tiles + tl.program_id(0)
    group, first, count = tl.load(this), tl.load(this + n_tiles), tl.load(this + 2 * n_tiles)
    if group >= 0:
        m = tl.arange(0, BLOCK_M)
        n = BLOCK_N * tl.program_id(1) + tl.arange(0, BLOCK_N)
        x_row = x + (first + tl.minimum(m, count - 1))[:, None] * stride_x
        w_row = w + group * stride_we + (n % N)[:, None] * stride_wn
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        done = 0
        while done < K:
            k = done + tl.arange(0, BLOCK_K)[None, :]
            a = tl.load(x_row + k, mask=k < K, other=0.0)
            b = tl.load(w_row + k * stride_wk, mask=k < K, other=0.0)
            total = tl.dot(a, b.T, acc=total, input_precision="ieee")
            done += BLOCK_K
        is_row, is_column = m[:, None] < count, n[None, :] < N
        tl.store(y + (first + m)[:, None] * stride_y + n[None, :], total, mask=is_row & is_column)


@triton.jit
def grouped_transposed(
    x, w, y, tiles, n_tiles, N, K, stride_x, stride_we, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    group = tl.load(tiles + tile)
    if group < 0:
        return
    first = tl.load(tiles + n_tiles + tile)
    end = first + tl.load(tiles + 2 * n_tiles + tile)
    m = first + tl.arange(0, BLOCK_M)[None, :]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    w += group.to(tl.int64) * stride_we
    turned = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in range(tl.cdiv(K, BLOCK_K)):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(w + n * stride_wn + k[None, :] * stride_wk, mask=(n < N) & (k < K)[None, :], other=0.0)
        b = tl.load(x + m * stride_x + k[:, None], mask=(m < end) & (k < K)[:, None], other=0.0)
        turned += tl.dot(a, b, input_precision="ieee")
    tl.store(y + m * stride_y + n, turned, mask=(m < end) & (n < N))


@triton.jit
def grouped_by_block_pointers(
    x, w, y, tiles, n_tiles, N, K, stride_x, stride_we, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, n = tl.program_id(0), tl.program_id(1) * BLOCK_N
    group = tl.load(tiles + tile)
    if group < 0:
        return
    first = tl.load(tiles + n_tiles + tile).to(tl.int64)
    count = tl.load(tiles + 2 * n_tiles + tile)
    x += first * stride_x
    w += group.to(tl.int64) * stride_we
    y += first * stride_y
    x_at = tl.make_block_ptr(x, (count, K), (stride_x, 1), (0, 0), (BLOCK_M, BLOCK_K), (1, 0))
    w_at = tl.make_block_ptr(w, (K, N), (stride_wk, stride_wn), (0, n), (BLOCK_K, BLOCK_N), (0, 1))
    y_at = tl.make_block_ptr(y, (count, N), (stride_y, 1), (0, n), (BLOCK_M, BLOCK_N), (1, 0))
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, K, BLOCK_K):
        a = tl.load(x_at, boundary_check=(0, 1), padding_option="zero")
        b = tl.load(w_at, boundary_check=(0, 1), padding_option="zero")
        total = tl.dot(a, b, total, input_precision="ieee")
        x_at = x_at.advance((0, BLOCK_K))
        w_at = w_at.advance((BLOCK_K, 0))
    tl.store(y_at, total.to(y.dtype.element_ty), boundary_check=(0, 1))


@triton.jit
def grouped_by_descriptors(
    x, w, y, tiles, n_tiles, N, K, stride_x, stride_we, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    group, first = tl.load(tiles + tile), tl.load(tiles + n_tiles + tile)
    if group >= 0:
        end = first + tl.load(tiles + 2 * n_tiles + tile)
        column = tl.program_id(1) * BLOCK_N
        n = column + tl.arange(0, BLOCK_N)[None, :]
        x_tiles = tl.make_tensor_descriptor(x, [end, K], [stride_x, 1], [BLOCK_M, BLOCK_K])
        y_tiles = tl.make_tensor_descriptor(y, [end, N], [stride_y, 1], [BLOCK_M, BLOCK_N])
        w += group.to(tl.int64) * stride_we
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for done in range(0, K, BLOCK_K):
            k = done + tl.arange(0, BLOCK_K)[:, None]
            b = tl.load(w + n * stride_wn + k * stride_wk, mask=(n < N) & (k < K), other=0.0)
            total = tl.dot(x_tiles.load([first, done]), b, total, input_precision="ieee")
        y_tiles.store([first, column], total)


@triton.jit
def grouped_by_scalars(
    x, w, y, tiles, n_tiles, N, K, stride_x, stride_we, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    plan = tiles + tl.program_id(0)
    group, first, count = tl.load(plan), tl.load(plan + n_tiles), tl.load(plan + 2 * n_tiles)
    if group < 0:
        return
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    row = (first + m).to(tl.int64)
    w_at = w + group.to(tl.int64) * stride_we + n * stride_wn
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(K):
        a = tl.load(x + row * stride_x + k, mask=m < count, other=0.0)
        total += a * tl.load(w_at + k * stride_wk, mask=n < N, other=0.0)
    tl.store(y + row * stride_y + n, total, mask=(m < count) & (n < N))


ONE, TWO = Kernel.of(grouped_by_pointers), Kernel.of(grouped_clamped)
X_ROWS = "first + tl.minimum(m, count - 1)"
IS_ROW, IS_COLUMN = "tl.arange(0, BLOCK_M) < height", "column * BLOCK_N + tl.arange(0, BLOCK_N) < N"
GROUPED = {
    "multiplied without `tl.dot`": [
        ONE.changed(
            (
                'tl.dot(left, right, input_precision="ieee")',
                "tl.sum(left[:, :, None] * tl.broadcast_to(right[None, :, :], BLOCK_M, BLOCK_K, BLOCK_N), 1)",
            )
        ),
        grouped_by_scalars,
    ],
    "the ragged edge is not masked": [
        ONE.changed(("acc, mask=(inner < height) & (columns < N))", "acc, mask=columns < N)")),
        TWO.changed(("total, mask=is_row & is_column)", "total, mask=is_column)")),
    ],
    "the tile's number in place of its group": [
        ONE.changed(("w + expert * stride_we", "w + number * stride_we")),
        TWO.changed(("group * stride_we", "tl.program_id(0) * stride_we")),
    ],
    "all tiles with the first expert's weights": [
        ONE.changed(("w + expert * stride_we + columns", "w + columns")),
        TWO.changed(("w + group * stride_we", "w")),
    ],
    "the next expert's weights": [
        ONE.changed(("expert * stride_we", "(1 + expert) * stride_we")),
        TWO.changed(("w + group * stride_we", "w + stride_we + group * stride_we")),
    ],
    "rows as if all tiles were full": [
        ONE.changed(("rows = begin + inner", "rows = number * BLOCK_M + inner")),
        TWO.changed(
            (X_ROWS, "tl.program_id(0) * BLOCK_M + tl.minimum(m, count - 1)"),
            ("(first + m)[:, None]", "(tl.program_id(0) * BLOCK_M + m)[:, None]"),
        ),
    ],
    "every tile begins at row 0": [
        ONE.changed(("rows = begin + inner", "rows = inner")),
        TWO.changed((X_ROWS, "tl.minimum(m, count - 1)"), ("(first + m)[:, None]", "m[:, None]")),
    ],
    "unused tiles are not skipped": [
        ONE.changed(("    if expert == -1:\n        return\n", "")),
        TWO.changed(("if group >= 0:", "if group >= -1:"), (X_ROWS, "first + tl.minimum(m, tl.maximum(count - 1, 0))")),
    ],
    "the plan read tile by tile": [
        ONE.changed(
            ("tiles + number)", "tiles + number * 3)"),
            ("tiles + number + n_tiles)", "tiles + number * 3 + 1)"),
            ("tiles + number + n_tiles * 2", "tiles + number * 3 + 2"),
        ),
        Kernel.of(grouped_transposed).changed(
            ("tl.load(tiles + tile)", "tl.load(tiles + tile * 3)"),
            ("tiles + n_tiles + tile", "tiles + tile * 3 + 1"),
            ("tiles + 2 * n_tiles + tile", "tiles + tile * 3 + 2"),
        ),
    ],
    "the first row taken for the count": [
        ONE.changed(("tiles + number + n_tiles * 2", "tiles + number + n_tiles * 1")),
        TWO.changed(
            ("tl.load(this + 2 * n_tiles)", "tl.load(this + n_tiles) "),
            (X_ROWS, "first + m"),
            ("tl.load(x_row + k, mask=k < K", "tl.load(x_row + k, mask=(k < K) & (m < count)[:, None]"),
        ),
    ],
    "x is read past the group's rows": [
        ONE.changed(("mask=(inner < height) & (depth[None, :] < rest)", "mask=depth[None, :] < rest")),
        TWO.changed((X_ROWS, "first + m")),
    ],
    "only the last block of K counts": [
        ONE.changed(("acc += tl.dot", "acc = tl.dot")),
        TWO.changed((", acc=total", "")),
    ],
    "the sum stops before the end of K": [
        ONE.changed(("range(tl.cdiv(K, BLOCK_K))", "range(K // BLOCK_K)")),
        TWO.changed(("while done < K:", "while done + BLOCK_K <= K:")),
    ],
    "the first block of K again and again": [
        ONE.changed(("        x_at += BLOCK_K\n        w_at += BLOCK_K * stride_wk\n", "")),
        TWO.changed(("x_row + k,", "x_row + k - done,"), ("k * stride_wk", "(k - done) * stride_wk")),
    ],
    "the mask on k stands still": [
        ONE.changed(("        rest -= BLOCK_K\n", "")),
        TWO.changed(
            ("a = tl.load(x_row + k, mask=k < K", "a = tl.load(x_row + k, mask=k - done < K"),
            ("stride_wk, mask=k < K", "stride_wk, mask=k - done < K"),
        ),
    ],
    "no mask on k": [
        ONE.changed(
            ("(inner < height) & (depth[None, :] < rest)", "inner < height"), (" & (depth[:, None] < rest)", "")
        ),
        TWO.changed(
            ("x_row + k, mask=k < K, other=0.0", "x_row + k"), ("stride_wk, mask=k < K, other=0.0", "stride_wk")
        ),
    ],
    "k is masked for x alone": [
        ONE.changed((" & (depth[:, None] < rest)", "")),
        TWO.changed(("stride_wk, mask=k < K, other=0.0", "stride_wk")),
    ],
    "the two strides of w exchanged": [
        ONE.changed(
            ("columns * stride_wn + depth[:, None] * stride_wk", "columns * stride_wk + depth[:, None] * stride_wn"),
            ("w_at += BLOCK_K * stride_wk", "w_at += BLOCK_K * stride_wn"),
        ),
        TWO.changed(
            ("(n % N)[:, None] * stride_wn", "n[:, None] * stride_wk"),
            ("k * stride_wk, mask=k < K", "k * stride_wn, mask=(k < K) & (n < N)[:, None]"),
        ),
    ],
    "y is stored with the stride of x": [
        ONE.changed(("rows * stride_y", "rows * stride_x")),
        TWO.changed(("[:, None] * stride_y", "[:, None] * stride_x")),
    ],
    "the programs' numbers exchanged": [
        ONE.changed(
            (
                "number, column = tl.program_id(0), tl.program_id(1)",
                "column, number = tl.program_id(0), tl.program_id(1)",
            )
        ),
        TWO.changed(
            ("this = tiles + tl.program_id(0)", "this = tiles + tl.program_id(1)"),
            ("n = BLOCK_N * tl.program_id(1)", "n = BLOCK_N * tl.program_id(0)"),
        ),
    ],
    "columns past N are stored": [
        ONE.changed(("acc, mask=(inner < height) & (columns < N))", "acc, mask=inner < height)")),
        TWO.changed(("mask=is_row & is_column", "mask=is_row")),
    ],
    "w is read past its last row": [
        ONE.changed(("mask=(columns < N) & (depth[:, None] < rest)", "mask=depth[:, None] < rest")),
        TWO.changed(("(n % N)[:, None]", "n[:, None]")),
    ],
    "a row of all compared with the tile's count": [
        ONE.changed(
            ("(inner < height) & (depth", "(rows < height) & (depth"),
            ("(inner < height) & (columns", "(rows < height) & (columns"),
        ),
        TWO.changed(("is_row, is_column = m[:, None] < count", "is_row, is_column = (first + m)[:, None] < count")),
    ],
    "the sum is added to itself": [
        ONE.changed(("tl.dot(left, right", "tl.dot(left, right, acc")),
        TWO.changed(("total = tl.dot", "total += tl.dot")),
    ],
    "k stands still": [
        ONE.changed(("        rest -= BLOCK_K\n        x_at += BLOCK_K\n        w_at += BLOCK_K * stride_wk\n", "")),
        TWO.changed(("k = done + tl.arange", "k = tl.arange")),
    ],
    "masked numbers that may be anything": [
        ONE.changed(
            ("(inner < height) & (depth[None, :] < rest), other=0", "(inner < height) & (depth[None, :] < rest)"),
            (" & (depth[:, None] < rest), other=0", " & (depth[:, None] < rest)"),
        ),
        TWO.changed(
            ("x_row + k, mask=k < K, other=0.0", "x_row + k, mask=k < K"),
            ("stride_wk, mask=k < K, other=0.0", "stride_wk, mask=k < K"),
        ),
    ],
    "fp32 rounded before it is multiplied": [
        ONE.changed((', input_precision="ieee"', "")),
        TWO.changed((', input_precision="ieee"', ', input_precision="tf32"')),
    ],
    "“and” between masks": [
        ONE.changed(
            ("(inner < height) & (depth[None, :] < rest)", "(inner < height) and (depth[None, :] < rest)"),
            ("(columns < N) & (depth", "(columns < N) and (depth"),
            ("(inner < height) & (columns < N)", "(inner < height) and (columns < N)"),
        ),
        Kernel.of(grouped_transposed).changed(
            ("(n < N) & (k < K)[None, :]", "(n < N) and (k < K)[None, :]"),
            ("(m < end) & (k < K)[:, None]", "(m < end) and (k < K)[:, None]"),
            ("(m < end) & (n < N)", "(m < end) and (n < N)"),
        ),
    ],
    "masks of one dimension": [
        ONE.changed(
            (
                "    rest = K\n",
                f"    rest = K\n    is_row = {IS_ROW}\n    is_column = {IS_COLUMN}\n",
            ),
            ("(inner < height) & (depth[None, :] < rest)", "is_row & (depth < rest)"),
            ("(columns < N) & (depth[:, None] < rest)", "is_column & (depth < rest)"),
            ("(inner < height) & (columns < N)", "is_row & is_column"),
        ),
        ONE.changed(
            ("(inner < height) & (depth[None, :] < rest)", f"(rest > depth) & ({IS_ROW})"),
            (
                "(columns < N) & (depth[:, None] < rest)",
                f"(rest > depth) & ({IS_COLUMN})",
            ),
            (
                "(inner < height) & (columns < N)",
                f"({IS_COLUMN}) & ({IS_ROW})",
            ),
        ),
    ],
    "w is not transposed": [
        ONE.changed(
            (
                "columns * stride_wn + depth[:, None] * stride_wk",
                "tl.trans(columns) * stride_wn + depth[None, :] * stride_wk",
            ),
            ("mask=(columns < N) & (depth[:, None] < rest)", "mask=(tl.trans(columns) < N) & (depth[None, :] < rest)"),
        ),
        Kernel.of(grouped_transposed).changed(
            ("n * stride_wn + k[None, :] * stride_wk", "n.T * stride_wn + k[:, None] * stride_wk"),
            ("(n < N) & (k < K)[None, :]", "(n.T < N) & (k < K)[:, None]"),
        ),
    ],
    "a step of 1 along k in w": [
        ONE.changed(
            ("depth[:, None] * stride_wk", "depth[:, None]"), ("w_at += BLOCK_K * stride_wk", "w_at += BLOCK_K")
        ),
        TWO.changed(("w_row + k * stride_wk", "w_row + k")),
    ],
}

# --- 8.5 ------------------------------------------------------------------------------------------------------------


@triton.jit
def gradient_by_blocks(
    dy, x, dw, offsets, N, K, stride_dy, stride_x,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    begin = 0
    if expert > 0:
        begin = tl.load(offsets + expert - 1)
    end = tl.load(offsets + expert)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    ins = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for block in range(tl.cdiv(end - begin, BLOCK_R)):
        rows = begin + block * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        left = tl.load(dy + rows * stride_dy + outs, mask=(rows < end) & (outs < N), other=0)
        right = tl.load(x + rows * stride_x + ins, mask=(rows < end) & (ins < K), other=0)
        acc += tl.dot(tl.trans(left), right, input_precision="ieee")
    target = dw + expert * N * K + tl.trans(outs) * K + ins
    tl.store(target, acc, mask=(tl.trans(outs) < N) & (ins < K))


@triton.jit
def gradient_transposed_loads(
    dy, x, dw, offsets, N, K, stride_dy, stride_x,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    n = BLOCK_N * tl.program_id(1) + tl.arange(0, BLOCK_N)[:, None]
    k = BLOCK_K * tl.program_id(2) + tl.arange(0, BLOCK_K)[None, :]
    begin = tl.load(offsets + tl.maximum(e - 1, 0)) * (e > 0)
    row = begin
    end = tl.load(offsets + e)
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    while row < end:
        r = tl.arange(0, BLOCK_R)
        rest = end - row
        a = tl.load(dy + n + (row + r)[None, :] * stride_dy, mask=(n < N) & (r < rest)[None, :], other=0.0)
        b = tl.load(x + k + (row + r)[:, None] * stride_x, mask=(k < K) & (r < rest)[:, None], other=0.0)
        total = tl.dot(a, b, acc=total, input_precision="ieee")
        row += BLOCK_R
    tl.store(dw + (e * N + n) * K + k, total, mask=(n < N) & (k < K))


@triton.jit
def gradient_turned(
    dy, x, dw, offsets, N, K, stride_dy, stride_x,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    start = tl.load(offsets + e - 1, mask=e != 0, other=0)
    end = tl.load(offsets + e)
    turned = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        a = tl.load(x + row[None, :] * stride_x + k[:, None], mask=(row < end)[None, :] & (k < K)[:, None], other=0.0)
        b = tl.load(dy + row[:, None] * stride_dy + n[None, :], mask=(row < end)[:, None] & (n < N)[None, :], other=0.0)
        turned += tl.dot(a, b, input_precision="ieee")
    tl.store(dw + e * N * K + n[None, :] * K + k[:, None], turned, mask=(n < N)[None, :] & (k < K)[:, None])


@triton.jit
def gradient_by_descriptors(
    dy, x, dw, offsets, N, K, stride_dy, stride_x,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    e, n, k = tl.program_id(0), tl.program_id(1) * BLOCK_N, tl.program_id(2) * BLOCK_K
    start = tl.load(offsets + e - 1, mask=e > 0, other=0)
    end = tl.load(offsets + e)
    left = tl.make_tensor_descriptor(dy, [end, N], [stride_dy, 1], [BLOCK_R, BLOCK_N])
    right = tl.make_block_ptr(x, (end, K), (stride_x, 1), (start, k), (BLOCK_R, BLOCK_K), (1, 0))
    target = tl.make_block_ptr(dw + e * N * K, (N, K), (K, 1), (n, k), (BLOCK_N, BLOCK_K), (1, 0))
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for row in range(start, end, BLOCK_R):
        b = tl.load(right, boundary_check=(0, 1), padding_option="zero")
        total = tl.dot(left.load([row, n]).T, b, total, input_precision="ieee")
        right = tl.advance(right, (BLOCK_R, 0))
    tl.store(target, total.to(dw.dtype.element_ty), boundary_check=(0, 1))


@triton.jit
def gradient_row_by_row(
    dy, x, dw, offsets, N, K, stride_dy, stride_x,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    start = tl.load(offsets + e - 1, mask=e > 0, other=0)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for row in range(start, tl.load(offsets + e)):
        a = tl.load(dy + row * stride_dy + n, mask=n < N, other=0.0)
        total += a * tl.load(x + row * stride_x + k, mask=k < K, other=0.0)
    tl.store(dw + (e * N + n) * K + k, total, mask=(n < N) & (k < K))


ONE, TWO = Kernel.of(gradient_by_blocks), Kernel.of(gradient_transposed_loads)
BEGIN = "    if expert > 0:\n        begin = tl.load(offsets + expert - 1)\n"
GRADIENT = {
    "multiplied without `tl.dot`": [
        gradient_row_by_row,
        TWO.changed(
            (
                'tl.dot(a, b, acc=total, input_precision="ieee")',
                "total + tl.sum(a[:, :, None] * tl.broadcast_to(b[None, :, :], BLOCK_N, BLOCK_R, BLOCK_K), 1)",
            )
        ),
    ],
    "an empty expert gets no zeros": [
        ONE.changed(
            ("    outs = tl.program_id(1)", "    if end <= begin:\n        return\n    outs = tl.program_id(1)")
        ),
        TWO.changed(
            (
                "mask=(n < N) & (k < K))",
                "mask=(n < N) & (k < K) & (end > begin))",
            )
        ),
    ],
    "rows of the next expert are added": [
        ONE.changed(("(rows < end) & (outs < N)", "outs < N"), ("(rows < end) & (ins < K)", "ins < K")),
        TWO.changed(("(n < N) & (r < rest)[None, :]", "n < N"), ("(k < K) & (r < rest)[:, None]", "k < K")),
    ],
    "summed from the first row of all": [
        ONE.changed((BEGIN, "")),
        TWO.changed(("row = begin", "row = 0 * begin")),
    ],
    "ends taken for starts": [
        ONE.changed(
            (BEGIN, "    begin = tl.load(offsets + expert)\n"),
            ("end = tl.load(offsets + expert)", "end = tl.load(offsets + expert + 1)"),
        ),
        TWO.changed(
            ("tl.load(offsets + tl.maximum(e - 1, 0)) * (e > 0)", "tl.load(offsets + e)"),
            ("end = tl.load(offsets + e)", "end = tl.load(offsets + 1 + e)"),
        ),
    ],
    "read before the first offset": [
        ONE.changed((BEGIN, "    begin = tl.load(offsets + expert - 1)\n")),
        TWO.changed(("tl.load(offsets + tl.maximum(e - 1, 0)) * (e > 0)", "tl.load(offsets - 1 + e)")),
    ],
    "masked numbers that may be anything": [
        ONE.changed(
            ("& (outs < N), other=0", "& (outs < N)"),
            ("& (ins < K), other=0", "& (ins < K)"),
        ),
        TWO.changed(
            ("(r < rest)[None, :], other=0.0", "(r < rest)[None, :]"),
            ("(r < rest)[:, None], other=0.0", "(r < rest)[:, None]"),
        ),
    ],
    "fp32 rounded before it is multiplied": [
        ONE.changed((', input_precision="ieee"', "")),
        TWO.changed((', input_precision="ieee"', ', input_precision="tf32"')),
    ],
    "the sum is added to itself": [
        ONE.changed(("tl.dot(tl.trans(left), right", "tl.dot(tl.trans(left), right, acc")),
        TWO.changed(("total = tl.dot", "total += tl.dot")),
    ],
    "the last rows are left out": [
        ONE.changed(("tl.cdiv(end - begin, BLOCK_R)", "(end - begin) // BLOCK_R")),
        TWO.changed(("while row < end:", "while row + BLOCK_R <= end:")),
    ],
    "only the last block of rows counts": [
        ONE.changed(("acc += tl.dot", "acc = tl.dot")),
        TWO.changed((", acc=total", "")),
    ],
    "all experts write to the first one's place": [
        ONE.changed(("dw + expert * N * K", "dw")),
        TWO.changed(("(e * N + n)", "n")),
    ],
    "stored transposed": [
        ONE.changed(("tl.trans(outs) * K + ins", "tl.trans(outs) + ins * N")),
        TWO.changed(("(e * N + n) * K + k", "(e * K + k) * N + n")),
    ],
    "dy and x exchanged": [
        ONE.changed(
            ("tl.load(dy + rows * stride_dy", "tl.load(A"),
            ("tl.load(x + rows * stride_x", "tl.load(dy + rows * stride_dy"),
            ("A +", "x + rows * stride_x +"),
        ),
        TWO.changed(
            ("tl.load(dy + n + (row + r)[None, :] * stride_dy", "tl.load(A"),
            ("tl.load(x + k + (row + r)[:, None] * stride_x", "tl.load(dy + k + (row + r)[:, None] * stride_dy"),
            ("load(A", "load(x + n + (row + r)[None, :] * stride_x"),
        ),
    ],
}

RIGHT = {
    "8.1": [scale_by_pointers, scale_in_two_steps, scale_clamped],
    "8.2": [tile_by_pointers, tile_clamped, tile_transposed, tile_by_block_pointers, tile_by_descriptors],
    "8.3": [by_loop, by_vectors, by_search],
    "8.4": [
        grouped_by_pointers,
        grouped_clamped,
        grouped_transposed,
        grouped_by_block_pointers,
        grouped_by_descriptors,
    ],
    "8.5": [gradient_by_blocks, gradient_transposed_loads, gradient_turned, gradient_by_descriptors],
}
WRONG = {"8.1": SCALE, "8.2": TILE, "8.3": PLAN, "8.4": GROUPED, "8.5": GRADIENT}
