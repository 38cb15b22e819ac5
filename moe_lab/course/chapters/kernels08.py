"""The kernels that notebook 08 asks for. They are run from their source (`moe_lab.course.kernel_cells`)."""

import triton
import triton.language as tl


@triton.jit
def scale(x, y, n, factor, BLOCK: tl.constexpr):
    """y[i] = factor · x[i] for i below n; a program does BLOCK of them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    numbers = tl.load(x + i, mask=inside)
    tl.store(y + i, factor * numbers, mask=inside)


@triton.jit
def tile_product(
    x, w, y, M, N, K, stride_x, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x @ w.T, (M, K) and (N, K) to (M, N); a program computes one tile of y."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, K, BLOCK_K):
        k = done + tl.arange(0, BLOCK_K)
        in_k = k < K
        x_at = x + m[:, None] * stride_x + k[None, :]
        w_at = w + n[None, :] * stride_wn + k[:, None] * stride_wk
        a = tl.load(x_at, mask=in_m & in_k[None, :], other=0.0)
        b = tl.load(w_at, mask=in_n & in_k[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(y + m[:, None] * stride_y + n[None, :], total, mask=in_m & in_n)


@triton.jit
def grouped_product(
    x, w, y, tiles, n_tiles, N, K, stride_x, stride_we, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[r] = x[r] @ w[group of r].T, (R, K) and (E, N, K) to (R, N); a program computes one tile of the plan."""
    tile = tl.program_id(0)
    group = tl.load(tiles + tile)
    if group < 0:
        return
    first = tl.load(tiles + n_tiles + tile)
    count = tl.load(tiles + 2 * n_tiles + tile)
    place = tl.arange(0, BLOCK_M)
    row = (first + place).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    in_m, in_n = (place < count)[:, None], (n < N)[None, :]
    w += group.to(tl.int64) * stride_we
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, K, BLOCK_K):
        k = done + tl.arange(0, BLOCK_K)
        in_k = k < K
        x_at = x + row[:, None] * stride_x + k[None, :]
        w_at = w + n[None, :] * stride_wn + k[:, None] * stride_wk
        a = tl.load(x_at, mask=in_m & in_k[None, :], other=0.0)
        b = tl.load(w_at, mask=in_n & in_k[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(y + row[:, None] * stride_y + n[None, :], total, mask=in_m & in_n)


@triton.jit
def weight_gradient(
    dy, x, dw, offsets, N, K, stride_dy, stride_x,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dw[e] = dy[rows of e].T @ x[rows of e], (R, N) and (R, K) to (E, N, K); a program computes one tile."""
    e = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n, in_k = n < N, k < K
    start = tl.load(offsets + e - 1, mask=e > 0, other=0)
    end = tl.load(offsets + e)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)
        is_mine = (row < end)[:, None]
        a = tl.load(dy + row[:, None] * stride_dy + n[None, :], mask=is_mine & in_n[None, :], other=0.0)
        b = tl.load(x + row[:, None] * stride_x + k[None, :], mask=is_mine & in_k[None, :], other=0.0)
        total = tl.dot(a.T, b, total, input_precision="ieee")
    dw += e.to(tl.int64) * N * K
    tl.store(dw + n[:, None] * K + k[None, :], total, mask=in_n[:, None] & in_k[None, :])
