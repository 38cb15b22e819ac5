"""The Triton kernels of the grouped product and of the fused block. A program computes one tile of one result.

Rows are sorted by group and no group need be a multiple of a tile, so tiles of rows come from a plan: `tiles` (3, n)
int32 holds for each the group, the first row and the number of rows; the group is -1 where a tile is not used, and the
number of groups where its rows belong to none. See `moe_lab.ops.tiles`, and `moe_lab.ops.launches` for the grids.

Row numbers, and a group's place in the weights, are 64 bit before they are multiplied by a stride: R·I and E·O·I pass
2^31. Places within a tile are small and stay 32 bit. How many rows and tiles there are changes from call to call, so
nothing is compiled anew for numbers of them (`do_not_specialize`).
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def plan_tiles(offsets, tiles, n_used, by_size, n_groups, n_rows, n_tiles, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """Program g writes the tiles of group g; the last one those of the rows past the last offset, and the unused ones.

    `n_used` (1,) gets how many tiles are used, `by_size` the groups, those with the most rows first. Offsets that no
    plan can be made of do no harm: they are held between 0 and n_rows.
    """
    g = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    starts = tl.load(offsets + groups - 1, mask=(groups > 0) & (groups <= n_groups), other=0)
    ends = tl.load(offsets + groups, mask=groups < n_groups, other=n_rows)
    starts = tl.minimum(tl.maximum(starts, 0), n_rows)
    counts = tl.maximum(tl.minimum(ends, n_rows) - starts, 0)
    counts = tl.where(groups <= n_groups, counts, 0)
    used = tl.cdiv(counts, BLOCK)

    mine = groups == g
    start, count = tl.sum(tl.where(mine, starts, 0)), tl.sum(tl.where(mine, counts, 0))
    begin = tl.sum(tl.where(groups < g, used, 0))
    end = tl.minimum(begin + tl.sum(tl.where(mine, used, 0)), n_tiles)
    if g == n_groups:
        tl.store(n_used, end)
        end = n_tiles
    for first in range(begin, end, GROUPS):
        tile = first + groups
        row = (tile - begin) * BLOCK
        tl.store(tiles + tile, tl.where(row < count, g, -1), mask=tile < end)
        tl.store(tiles + n_tiles + tile, start + row, mask=tile < end)
        tl.store(tiles + 2 * n_tiles + tile, tl.minimum(tl.maximum(count - row, 0), BLOCK), mask=tile < end)

    is_ahead = (counts > count) | ((counts == count) & (groups < g))
    tl.store(by_size + tl.sum((is_ahead & (groups < n_groups)).to(tl.int32)), g, mask=g < n_groups)


@triton.jit
def tile_order(program, n_tiles, n_columns, BAND: tl.constexpr):
    """The tile of rows and of columns of a program: BAND tiles of rows go through the columns together.

    Programs that run at the same time then read the same few tiles of either side, which stay in the L2 cache.
    """
    band = program // (BAND * n_columns)
    height = tl.minimum(n_tiles - band * BAND, BAND)
    inside = program % (BAND * n_columns)
    return band * BAND + inside % height, inside // height


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit(do_not_specialize=["n_tiles"])
def grouped_product(
    x, w, y, tiles, row_choices, weights,
    n_tiles, n_groups, N, K, stride_x, stride_we, stride_wn, stride_wk, stride_y,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """y[r] = x[r] @ w[group of r].T, (rows, K) to (rows, N).

    With SCATTER row r is written to the place of the choice that it carries, times the choice's weight if there are
    any. So y is (T·K, N), and a token's rows lie side by side.
    """
    tile, column = tile_order(tl.program_id(0), n_tiles, tl.cdiv(N, BLOCK_N), BAND)
    group = tl.load(tiles + tile)
    if group < 0:
        return
    first, count = tl.load(tiles + n_tiles + tile), tl.load(tiles + 2 * n_tiles + tile)
    place = tl.arange(0, BLOCK_M)
    row = (first + tl.minimum(place, count - 1)).to(tl.int64)  # past the group's end: its last row again, not stored
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = (n < N)[None, :]
    k = tl.arange(0, BLOCK_K)
    x_at = x + row[:, None] * stride_x + k[None, :]
    w_at = w + group.to(tl.int64) * stride_we + n.to(tl.int64)[None, :] * stride_wn + k[:, None] * stride_wk

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    depth = tl.where(group < n_groups, K, 0)  # rows of no group are zero
    for done in range(0, depth, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(x_at), tl.load(w_at, mask=in_n, other=0.0)
        else:
            a = tl.load(x_at, mask=k[None, :] < K - done, other=0.0)
            b = tl.load(w_at, mask=in_n & (k[:, None] < K - done), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K * stride_wk

    target = tl.load(row_choices + row).to(tl.int64) if SCATTER else row
    if weights is not None:
        total *= tl.load(weights + target)[:, None]
    y_at = y + target[:, None] * stride_y + n[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=(place < count)[:, None] & in_n)


@triton.jit(do_not_specialize=["n_tiles"])
def grouped_product_tma(
    x_rows, w_blocks, y, tiles, n_used, row_choices, weights, n_tiles, n_groups, N, K, stride_y,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """The same product for Hopper and later: descriptors, so that the copy engine (TMA) fetches tiles, and a grid that
    stays: as many programs as there are processors, each of which takes tile after tile.

    FLATTEN makes one loop of the two, so that the next tile is on its way while this one is stored; the inner loop must
    then be as long for every tile. A tile of rows may reach into the next group; what is computed of those is not
    stored. TRANSPOSED says that the weights lie as (E, K, N).
    """
    used, n_columns = tl.load(n_used), tl.cdiv(N, BLOCK_N)
    for program in tl.range(tl.program_id(0), used * n_columns, tl.num_programs(0), flatten=FLATTEN):
        tile, column = tile_order(program, used, n_columns, BAND)
        group = tl.load(tiles + tile)
        first, count = tl.load(tiles + n_tiles + tile), tl.load(tiles + 2 * n_tiles + tile)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for done in range(0, K, BLOCK_K):
            a = x_rows.load([first, done])
            if TRANSPOSED:
                b = w_blocks.load([group, done, column * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            else:
                b = w_blocks.load([group, column * BLOCK_N, done]).reshape(BLOCK_N, BLOCK_K).T
            total = tl.dot(a, b, total, input_precision=PRECISION)
        total = tl.where(group < n_groups, total, 0.0)  # rows of no group are zero, whatever they hold
        place = tl.arange(0, BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        target = (first + place).to(tl.int64)
        if SCATTER:
            target = tl.load(row_choices + target, mask=place < count, other=0).to(tl.int64)
        if weights is not None:
            total *= tl.load(weights + target, mask=place < count, other=0.0)[:, None]
        y_at = y + target[:, None] * stride_y + n[None, :]
        tl.store(y_at, total.to(y.dtype.element_ty), mask=(place < count)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["n_tiles"])
def gate_up(
    x, w, inner, hidden, tiles, row_choices,
    n_tiles, n_groups, F, D, stride_x, stride_we, stride_wn,
    TOP_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The first half of the fused block: gather, both products, SwiGLU; (T, D) to hidden (R, F).

    A program computes the same columns of gate and up, so that it can multiply them. `inner` (R, 2F) keeps both for the
    backward pass, or is None.
    """
    tile, column = tile_order(tl.program_id(0), n_tiles, tl.cdiv(F, BLOCK_N), BAND)
    group = tl.load(tiles + tile)
    if (group < 0) | (group >= n_groups):
        return
    first, count = tl.load(tiles + n_tiles + tile), tl.load(tiles + 2 * n_tiles + tile)
    place = tl.arange(0, BLOCK_M)
    row = (first + tl.minimum(place, count - 1)).to(tl.int64)
    token = tl.load(row_choices + row).to(tl.int64) // TOP_K
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = (n < F)[None, :]
    k = tl.arange(0, BLOCK_K)
    x_at = x + token[:, None] * stride_x + k[None, :]
    gate_at = w + group.to(tl.int64) * stride_we + n.to(tl.int64)[None, :] * stride_wn + k[:, None]
    up_at = gate_at + F * stride_wn

    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, D, BLOCK_K):
        if EVEN_K:
            a = tl.load(x_at)
            b_gate, b_up = tl.load(gate_at, mask=in_n, other=0.0), tl.load(up_at, mask=in_n, other=0.0)
        else:
            in_k = k < D - done
            a = tl.load(x_at, mask=in_k[None, :], other=0.0)
            b_gate = tl.load(gate_at, mask=in_n & in_k[:, None], other=0.0)
            b_up = tl.load(up_at, mask=in_n & in_k[:, None], other=0.0)
        gate = tl.dot(a, b_gate, gate, input_precision=PRECISION)
        up = tl.dot(a, b_up, up, input_precision=PRECISION)
        x_at += BLOCK_K
        gate_at += BLOCK_K
        up_at += BLOCK_K

    stored = (place < count)[:, None] & in_n
    swiglu(gate, up, inner, hidden, first.to(tl.int64), place[:, None], n[None, :], stored, F)


@triton.jit
def swiglu(gate, up, inner, hidden, first, place, n, stored, F):
    """Of some rows and columns; keeps both sides in `inner`, if there is one."""
    dtype = hidden.dtype.element_ty
    gate, up = gate.to(dtype), up.to(dtype)  # as they are kept: the backward pass then sees what forward saw
    if inner is not None:
        inner_at = inner + first * 2 * F + (place * 2 * F + n)
        tl.store(inner_at, gate, mask=stored)
        tl.store(inner_at + F, up, mask=stored)
    product = silu(gate.to(tl.float32)) * up.to(tl.float32)
    tl.store(hidden + first * F + (place * F + n), product.to(dtype), mask=stored)


@triton.jit(do_not_specialize=["n_tiles"])
def gate_up_tma(
    x, w_blocks, inner, hidden, tiles, n_used, row_choices, n_tiles, n_groups, F, D, stride_x,
    TOP_K: tl.constexpr, PRECISION: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The same for Hopper and later, in a grid that stays. The matrices lie as (E, 2, F, D), so that one descriptor
    fetches the columns of gate and of up together, and one product computes both: a step reads a third less of shared
    memory than two products do. Rows of x are gathered, which descriptors cannot.
    """
    used, n_columns = tl.load(n_used), tl.cdiv(F, BLOCK_N)
    place, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    for program in tl.range(tl.program_id(0), used * n_columns, tl.num_programs(0), flatten=FLATTEN):
        tile, column = tile_order(program, used, n_columns, BAND)
        group = tl.load(tiles + tile)
        first, count = tl.load(tiles + n_tiles + tile), tl.load(tiles + 2 * n_tiles + tile)
        row = (first + tl.minimum(place, count - 1)).to(tl.int64)
        token = tl.load(row_choices + row).to(tl.int64) // TOP_K
        x_at = x + token[:, None] * stride_x
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
        for done in range(0, D, BLOCK_K):
            if EVEN_K:
                a = tl.load(x_at + (done + k)[None, :])
            else:
                a = tl.load(x_at + (done + k)[None, :], mask=k[None, :] < D - done, other=0.0)
            b = w_blocks.load([group, 0, column * BLOCK_N, done]).reshape(2 * BLOCK_N, BLOCK_K).T
            both = tl.dot(a, b, both, input_precision=PRECISION)
        gate, up = both.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        stored = (place < tl.where(group < n_groups, count, 0))[:, None] & (n < F)[None, :]
        swiglu(gate, up, inner, hidden, first.to(tl.int64), place[:, None], n[None, :], stored, F)


@triton.jit
def swiglu_backward(back, inner, d_inner, weighted, weight, place, n, count, F):
    """Of some columns; returns their part of the gradient of the router's weights, (rows,)."""
    stored = (place < count)[:, None] & (n < F)[None, :]
    at = place[:, None] * 2 * F + n[None, :]
    gate = tl.load(inner + at, mask=stored, other=0.0).to(tl.float32)
    up = tl.load(inner + F + at, mask=stored, other=0.0).to(tl.float32)
    slope = tl.sigmoid(gate)
    active = gate * slope
    hidden = active * up
    dtype = d_inner.dtype.element_ty
    tl.store(weighted + place[:, None] * F + n[None, :], (hidden * weight[:, None]).to(dtype), mask=stored)
    d_hidden = back * weight[:, None]
    tl.store(d_inner + at, (d_hidden * up * (slope + active * (1 - slope))).to(dtype), mask=stored)
    tl.store(d_inner + F + at, (d_hidden * active).to(dtype), mask=stored)
    return tl.sum(back * hidden, axis=1)


@triton.jit(do_not_specialize=["n_tiles", "n_choices"])
def down_backward(
    dy, w, inner, weights, d_inner, weighted, d_weights, tiles, row_choices,
    n_tiles, n_groups, n_choices, F, D, stride_dy, stride_we, stride_wk,
    TOP_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Backward through the second product and SwiGLU: dy (T, D) to d_inner (R, 2F), with hidden computed again.

    `back = dy @ w_down` is the gradient of hidden but for the router's weight. Its product with hidden, summed over F,
    is that weight's gradient; no expert's output is needed. Every tile of columns leaves a part of the sum in
    `d_weights` (columns, T·K). `weighted` (R, F) gets hidden times the weight, which the gradient of w_down is made of.
    """
    tile, column = tile_order(tl.program_id(0), n_tiles, tl.cdiv(F, BLOCK_N), BAND)
    group = tl.load(tiles + tile)
    if group < 0:
        return
    first, count = tl.load(tiles + n_tiles + tile), tl.load(tiles + 2 * n_tiles + tile)
    place = tl.arange(0, BLOCK_M)
    row = (first + tl.minimum(place, count - 1)).to(tl.int64)
    choice = tl.load(row_choices + row).to(tl.int64)
    weights_at = d_weights + column.to(tl.int64) * n_choices + choice
    if group == n_groups:  # rows of no expert
        tl.store(weights_at, tl.zeros((BLOCK_M,), dtype=tl.float32), mask=place < count)
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = (n < F)[None, :]
    k = tl.arange(0, BLOCK_K)
    dy_at = dy + (choice // TOP_K)[:, None] * stride_dy + k[None, :]
    w_at = w + group.to(tl.int64) * stride_we + n[None, :] + k[:, None] * stride_wk

    back = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, D, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(dy_at), tl.load(w_at, mask=in_n, other=0.0)
        else:
            a = tl.load(dy_at, mask=k[None, :] < D - done, other=0.0)
            b = tl.load(w_at, mask=in_n & (k[:, None] < D - done), other=0.0)
        back = tl.dot(a, b, back, input_precision=PRECISION)
        dy_at += BLOCK_K
        w_at += BLOCK_K * stride_wk

    inner += first.to(tl.int64) * 2 * F
    d_inner += first.to(tl.int64) * 2 * F
    weighted += first.to(tl.int64) * F
    weight = tl.load(weights + choice)
    # half the columns at a time: all that SwiGLU's gradient needs at once does not fit into registers
    left, right = back.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    n = column * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    part = swiglu_backward(left, inner, d_inner, weighted, weight, place, n, count, F)
    part += swiglu_backward(right, inner, d_inner, weighted, weight, place, n + BLOCK_N // 2, count, F)
    tl.store(weights_at, part, mask=place < count)


@triton.jit(do_not_specialize=["n_rows"])
def weight_gradient(
    left, right, dw, offsets, by_size, row_choices,
    n_rows, M, N, stride_left, stride_right,
    TOP_K: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[g] = left[rows of g].T @ right[rows of g], (rows, M) and (rows, N) to (E, M, N).

    A tile is summed by one program from its group's first row to its last, in order: the same bits every time. A group
    without rows gets zeros. The fullest groups come first, for theirs are the longest programs.
    """
    n_columns = tl.cdiv(N, BLOCK_N)
    per_group = tl.cdiv(M, BLOCK_M) * n_columns
    program = tl.program_id(0)
    group = tl.load(by_size + program // per_group)
    m = (program % per_group) // n_columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (program % per_group) % n_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets + group - 1, mask=group > 0, other=0)
    start = tl.minimum(tl.maximum(start, 0), n_rows)
    end = tl.minimum(tl.load(offsets + group), n_rows)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    in_m, in_n = (m < M)[None, :], (n < N)[None, :]
    for first in range(start, end, BLOCK_K):
        row = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        is_mine = row < end
        token = row
        if GATHER_LEFT or GATHER_RIGHT:
            token = tl.load(row_choices + row, mask=is_mine, other=0).to(tl.int64) // TOP_K
        left_row = token if GATHER_LEFT else row
        right_row = token if GATHER_RIGHT else row
        a = tl.load(left + left_row[:, None] * stride_left + m[None, :], mask=is_mine[:, None] & in_m, other=0.0)
        b = tl.load(right + right_row[:, None] * stride_right + n[None, :], mask=is_mine[:, None] & in_n, other=0.0)
        total = tl.dot(a.T, b, total, input_precision=PRECISION)
    dw_at = dw + group.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(dw_at, total.to(dw.dtype.element_ty), mask=(m < M)[:, None] & in_n)


@triton.jit
def sum_of_choices(rows, y, N, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """y[t] = the sum of rows t·K to t·K + K - 1, (T·K, N) to (T, N), from the first to the last."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        total += tl.load(rows + (token * TOP_K + slot) * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + token * N + n, total.to(y.dtype.element_ty), mask=n < N)
