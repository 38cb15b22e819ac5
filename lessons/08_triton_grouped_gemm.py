# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# moe_lab:
#   title: Triton grouped GEMM
#   minutes: 70
#   seconds: 120
#   hardware: CPU · GPU optional
#   needs: triton
# ---

# %% [markdown]
# # 08 · Triton grouped GEMM
#
# **How does a GPU run ragged matrix products at full speed?**
#
# `CPU · GPU optional` · 70 minutes · prerequisites: notebooks 03 and 04
#
# At the end **you will have built** the grouped product of all experts (GEMM: general matrix multiplication) as one kernel,
# proven on this machine, and compiled for a data-centre GPU that you need not have: you will find the tensor cores'
# instruction in its machine code.
#
# What is marked *optional* comes on top: run its cells, and read it another time.

# %%
import re
from itertools import product

import torch

from moe_lab import viz
from moe_lab.course import exercise, show_progress
from moe_lab.course.kernel_cells import Kernel, KernelError, tl, triton
from moe_lab.gpu.measure import compare
from moe_lab.ops import grouped_mm
from moe_lab.ops.tiles import most_tiles

torch.set_num_threads(1)

# %% [markdown]
# ## Predict first
#
# An expert's weights lie in a GPU's memory. With few tokens it waits for them, with many it computes all the time. **From
# how many tokens per expert on does an H200 compute rather than wait?** And of eight experts' rows (13, 2, 0, 30, 7, 4, 20, 1),
# padded to the fullest: **which share of the work is waste?**

# %%
my_guess = {"tokens per expert": None, "waste, %": None}

# %% [markdown]
# ## 1 What a GPU is like
#
# A GPU is many processors (132 in an H100 or H200) around one memory. Nearest are a processor's **registers**, which hold
# what it computes with; then its **shared memory**; then one cache for all, **L2**. What is near is small, and what is far
# keeps you waiting:

# %%
viz.draw_memory()

# %% [markdown]
# A product should read each number from far away **once** and use it often. How often can it? The **intensity** of some work
# is its operations per byte of memory. For one expert with t tokens, a matrix of N by K (K is not
# top-k here), and 2 bytes a number:


# %%
def intensity(tokens, n=1536, k=2048):
    """Operations per byte of tokens (t, K) times (N, K), if all is read and written once."""
    return 2 * tokens * n * k / (2 * (tokens * k + n * k + tokens * n))


for tokens in (1, 16, 256, 4096):
    print(f"{tokens:>5} tokens: {intensity(tokens):>6.1f} operations per byte")

# %% [markdown]
# With few tokens it is about t: each weight, two bytes, is used for one multiplication and one addition per token. An H200
# computes at most 989·10¹² operations per second in bf16 and reads 4.8·10¹² bytes
# ([NVIDIA](https://www.nvidia.com/en-us/data-center/h200/)). That makes a **roofline**:

# %%
viz.draw_roofline({f"{t} tokens": intensity(t) for t in (16, 64, 256, 1024)})

# %%
rate, bandwidth = 989e12, 4.8e12  # bf16 operations, and bytes, in a second
enough = next(t for t in range(1, 5000) if intensity(t) > rate / bandwidth)
print(f"an H200 does {rate / bandwidth:.0f} operations per byte that it reads")
print("tokens per expert to be busy:", enough, "· you said", my_guess["tokens per expert"])

# %% [markdown]
# ## 2 A program and its grid
#
# In **Triton** ([Tillet et al. 2019](https://doi.org/10.1145/3315508.3329973)) you write what *one* **program** does to
# *blocks* of numbers. The same code runs many times, as a **grid**, in any order; only `tl.program_id` differs. 10 numbers
# in blocks of 4 make three programs:

# %%
for program in range(3):
    print(f"program {program}:", [4 * program + place for place in range(4)])

# %% [markdown]
# The last one has two places too many. Whatever lies there is somebody else's; a **mask** leaves it alone.
#
# | in a kernel | |
# |---|---|
# | `tl.program_id(0)` | which program am I, along axis 0 of the grid? |
# | `tl.arange(0, B)` | the numbers 0 to B - 1; B is a power of two and known beforehand: `tl.constexpr` |
# | `x + i` | `x` is a tensor's **pointer**, the place of its first number; this is that of number i, here of a block of them |
# | `tl.load(x + i, mask=i < n, other=0.0)` | the numbers there; where the mask is False nothing is read, and `other` is taken (without `other` it may be anything) |
# | `tl.store(y + i, numbers, mask=i < n)` | write them; where the mask is False nothing is written |
#
# ### Exercise 8.1 · the first kernel
#
# ●○○ · 5 minutes · three or four lines
#
# For all i below n: y[i] = factor · x[i]. There are as many programs as blocks. A kernel returns nothing. Neither read nor
# write anything beyond x and y.
#
# <details><summary>Hint 1</summary>
#
# Program p does the numbers from p · BLOCK on: `i = tl.program_id(0) * BLOCK + …`
#
# </details>
# <details><summary>Hint 2</summary>
#
# Load and store both need the mask `i < n`.
#
# </details>


# %%
@exercise("8.1")
@triton.jit
def scale(x, y, n, factor, BLOCK: tl.constexpr):
    """y[i] = factor · x[i] for all i below n; a program does BLOCK of them."""
    ### BEGIN SOLUTION
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    numbers = tl.load(x + i, mask=inside)
    tl.store(y + i, factor * numbers, mask=inside)
    ### END SOLUTION


# %% [markdown]
# Here kernels run in Triton's **interpreter**: on the CPU, one program after the other, each time in a process of its own. It
# is slow and needs no GPU. `interpret` takes the grid, then the kernel's arguments.

# %%
x, y = torch.arange(10.0), torch.zeros(10)
scale.interpret((triton.cdiv(10, 4),), x, y, 10, 3.0, BLOCK=4)  # cdiv: divided, rounded up
print(y.tolist())

# %% [markdown]
# ## 3 One tile of a product
#
# Notebook 04's loop starts a product for each expert; a small one leaves most processors idle. In one go, there are two ways:
# **pad** all to the fullest, or cut rows into **tiles** and give each its expert. The loads of the prediction:

# %%
counts = [13, 2, 0, 30, 7, 4, 20, 1]
viz.draw_padding(counts, block=4)

# %%
padded_rows = len(counts) * max(counts)
tiled_rows = sum(4 * triton.cdiv(n, 4) for n in counts)
for name, rows in {"padded": padded_rows, "tiles of 4": tiled_rows}.items():
    print(f"{name}: {rows} rows for {sum(counts)}, {1 - sum(counts) / rows:.0%} waste")
print("you said", my_guess["waste, %"])

# %% [markdown]
# So: **one program for each tile of the result**; first without experts. From one row of a tile to the next it is a
# **stride**. Rows 2 and 3, columns 0 to 2 of a matrix with 10 numbers in a row lie at:

# %%
m, k = torch.arange(2, 4), torch.arange(3)
print((m[:, None] * 10 + k[None, :]).tolist())

# %% [markdown]
# Pointers likewise: `x + m[:, None] * stride_x + k[None, :]` is a tile of them, m down, k across. The depth K is too long
# for one tile, so it is summed block by block:

# %%
a, b = torch.arange(10.0).reshape(2, 5), torch.arange(15.0).reshape(3, 5)
total = torch.zeros(2, 3)
for done in range(0, 5, 2):  # blocks of 2; the last one has a single column
    total += a[:, done : done + 2] @ b[:, done : done + 2].T
print(torch.equal(total, a @ b.T))

# %% [markdown]
# ### Exercise 8.2 · one tile of a product
#
# ●●○ · 15 minutes · eight to ten lines
#
# y = x @ w.T, of x (M, K) and w (N, K), any sizes, multiplied by `tl.dot`, fp32 exactly. w[n, k] lies at
# `n * stride_wn + k * stride_wk`. The grid is (tiles of rows, tiles of columns). Along a row of x and y the stride is 1.
# Read and write nothing outside the tensors.
#
# | in a kernel | |
# |---|---|
# | `total = tl.dot(a, b, total, input_precision="ieee")` | total + a @ b, for a (BLOCK_M, BLOCK_K) and b (BLOCK_K, BLOCK_N); without `"ieee"` a GPU rounds fp32 first |
# | `for done in range(0, K, BLOCK_K):` | a loop like this one, whose loads the compiler sends ahead (it does not for `while`) |
# | `p & q` | both masks, `(BLOCK_M, 1)` and `(1, BLOCK_N)` say, make one of (BLOCK_M, BLOCK_N) |
#
# <details><summary>Hint 1</summary>
#
# `in_m, in_n = (m < M)[:, None], (n < N)[None, :]`. In the loop `k = done + tl.arange(0, BLOCK_K)`, and its mask is
# `k < K`. With `other=0.0` what is masked adds nothing.
#
# </details>
# <details><summary>Hint 2</summary>
#
# b needs k down and n across: `w + n[None, :] * stride_wn + k[:, None] * stride_wk`, with the mask
# `in_n & (k < K)[:, None]`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The loop: k, load a, load b, `tl.dot`. After it one store: `y + m[:, None] * stride_y + n[None, :]`, mask `in_m & in_n`.
#
# </details>


# %%
@exercise("8.2")
@triton.jit
def tile_product(
    x, w, y, M, N, K, stride_x, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x @ w.T, (M, K) and (N, K) to (M, N); a program computes one tile of y."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    ### BEGIN SOLUTION
    in_m, in_n = (m < M)[:, None], (n < N)[None, :]
    for done in range(0, K, BLOCK_K):
        k = done + tl.arange(0, BLOCK_K)
        in_k = k < K
        x_at = x + m[:, None] * stride_x + k[None, :]
        w_at = w + n[None, :] * stride_wn + k[:, None] * stride_wk
        a = tl.load(x_at, mask=in_m & in_k[None, :], other=0.0)
        b = tl.load(w_at, mask=in_n & in_k[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(y + m[:, None] * stride_y + n[None, :], total, mask=in_m & in_n)
    ### END SOLUTION


# %% [markdown]
# A number of x is used BLOCK_N times, once it is read: the wider the tile, the higher the intensity. Registers, which hold
# `total`, set the limit.
#
# ## 4 Ragged rows
#
# Now the experts. Rows are sorted and `offsets` say where groups end, as in notebook 04. Each group begins a tile of its own,
# so that every tile has **one** expert:

# %%
viz.draw_tiles(counts, block=4)

# %% [markdown]
# How many programs? Asking the offsets would make Python wait for the GPU. A **bound** needs the sizes alone: R
# rows in E groups make at most E + (R − E) // block tiles (or R, if R < E): one for each group's first row, one more for
# every further `block` rows. *Optional:* **check** it for 8 rows in 3 groups:

# %%
splits = [split for split in product(range(9), repeat=3) if sum(split) == 8]
most = max(sum(triton.cdiv(n, 4) for n in split) for split in splits)
print(len(splits), "ways; at most", most, "tiles of 4; the bound:", most_tiles(8, 3, 4))

# %% [markdown]
# A **plan** tells each program its tile. What is not used is marked, and its program leaves at once.
#
# ### Exercise 8.3 · the plan of tiles
#
# ●●○ · 8 minutes · five to seven lines
#
# In plain PyTorch; a loop is welcome. Without rows `n_tiles` is 0.
#
# | | |
# |---|---|
# | `offsets` (E,), int32 | where each group's rows end; the last is the number of rows |
# | `n_tiles`, `block` | the bound; the most rows of a tile |
# | returns (3, n_tiles), int32 | each tile's group, its first row (of all rows), its number of rows; in the order of the rows, then (-1, 0, 0) for each tile that is not used |
#
# <details><summary>Hint 1</summary>
#
# Begin with a plan of unused tiles: zeros, and `plan[0] = -1`. Then go through the groups, as in 4.4, with a `start`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A group's tiles begin at `range(start, end, block)`. Each has `block` rows, or as many as are left.
#
# </details>


# %%
@exercise("8.3")
def plan_tiles(offsets, n_tiles, block):
    """Ends (E,) to (3, n_tiles) int32: of each tile its group, first row, number of rows."""
    ### BEGIN SOLUTION
    plan = torch.zeros(3, n_tiles, dtype=torch.int32)
    plan[0] = -1
    tile = start = 0
    for group, end in enumerate(offsets.tolist()):
        for first in range(start, end, block):
            plan[:, tile] = torch.tensor([group, first, min(block, end - first)])
            tile += 1
        start = end
    return plan
    ### END SOLUTION


# %%
offsets = torch.tensor(counts).cumsum(0).int()
n_tiles = most_tiles(int(offsets[-1]), len(counts), block=16)
plan = plan_tiles(offsets, n_tiles, 16)
for name, line in zip(("group", "first", "rows"), plan, strict=True):
    print(f"{name:<6}", *(f"{number:>3}" for number in line.tolist()))

# %% [markdown]
# ## 5 The grouped product
#
# 8.2's tile, and a plan that says where it lies. What changes?
#
# | | 8.2 | now |
# |---|---|---|
# | axis 0 of the grid | tiles of rows | tiles of the plan, `tiles` (3, n_tiles): group at `tiles + tile`, first row `n_tiles` further on, count another `n_tiles` |
# | rows | `program_id(0) * BLOCK_M` on | `first` on, `count` of them |
# | weights | `w` (N, K) | `w` (E, N, K), a group's matrix at `w + group * stride_we` |
# | tiles not used | – | `return` where the group is negative |
#
# ### Exercise 8.4 · the grouped product
#
# ●●● · 12 minutes · your 8.2, and five lines
#
# y[r] = x[r] @ w[group of r].T, for x (R, K). Tensors may hold more than 2³¹ numbers: make group and rows 64 bit, as
# n is, by `.to(tl.int64)`, before a stride multiplies them. (See 8: no check is that large.)
#
# <details><summary>Hint 1</summary>
#
# `first = tl.load(tiles + n_tiles + tile)`. The rows are `first + place`; and the mask is not `m < M` now but
# `place < count`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `w += group.to(tl.int64) * stride_we` moves to the expert's matrix. `row = (first + place).to(tl.int64)` takes m's place
# in the pointers to x and y. The rest stays.
#
# </details>


# %%
@exercise("8.4")
@triton.jit
def grouped_product(
    x, w, y, tiles, n_tiles, N, K, stride_x, stride_we, stride_wn, stride_wk, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[r] = x[r] @ w[group of r].T; a program computes one tile of the plan, some columns."""
    tile, place = tl.program_id(0), tl.arange(0, BLOCK_M)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    ### BEGIN SOLUTION
    group = tl.load(tiles + tile)
    if group < 0:
        return
    first, count = tl.load(tiles + n_tiles + tile), tl.load(tiles + 2 * n_tiles + tile)
    row = (first + place).to(tl.int64)
    in_m, in_n = (place < count)[:, None], (n < N)[None, :]
    w += group.to(tl.int64) * stride_we
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, K, BLOCK_K):
        k = done + tl.arange(0, BLOCK_K)
        x_at = x + row[:, None] * stride_x + k[None, :]
        w_at = w + n[None, :] * stride_wn + k[:, None] * stride_wk
        a = tl.load(x_at, mask=in_m & (k < K)[None, :], other=0.0)
        b = tl.load(w_at, mask=in_n & (k < K)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(y + row[:, None] * stride_y + n[None, :], total, mask=in_m & in_n)
    ### END SOLUTION


# %% [markdown]
# **Prove it** against notebook 04's loop, on sizes that no block divides, and an expert without rows.


# %%
def launch(x, w, offsets, block):
    """Your kernel's grid and arguments for rows (R, K) and weights (E, N, K)."""
    n_tiles = most_tiles(len(x), len(w), block)
    tiles = plan_tiles(offsets, n_tiles, block)
    y = x.new_empty(len(x), w.shape[1])
    strides = x.stride(0), *w.stride(), y.stride(0)
    grid = (n_tiles, triton.cdiv(w.shape[1], block))
    return grid, (x, w, y, tiles, n_tiles, *w.shape[1:], *strides)


def grouped(x, w, offsets, block=16):
    """What your kernel computes, (R, N), in the interpreter."""
    grid, arguments = launch(x, w, offsets, block)
    grouped_product.interpret(grid, *arguments, BLOCK_M=block, BLOCK_N=block, BLOCK_K=block)
    return arguments[2]


# %%
torch.manual_seed(0)
offsets = torch.tensor([3, 3, 20, 61], dtype=torch.int32)  # 3, 0, 17 and 41 rows
x, w = torch.rand(61, 45) - 0.5, torch.rand(4, 37, 45) - 0.5
x, w = x.requires_grad_(), w.requires_grad_()
y = grouped_mm(x, w, offsets, impl="reference")
print("equal:", torch.allclose(grouped(x.detach(), w.detach(), offsets), y, atol=1e-5))

# %% [markdown]
# ### In which order? (*optional*)
#
# Programs start by number, axis 0 first: yours go down the rows, column by column. 132 processors with room for two of yours
# each (section 8) run 264 at once; here 16. What one has read lies in L2 for the others. In bands they touch a square, not a
# long strip; so do the package's (`tile_order` in `moe_lab/ops/kernels.py`).

# %%
viz.draw_tile_order(n_rows=12, n_columns=12, band=4)

# %% [markdown]
# ## 6 The way back
#
# A product has two gradients. That of the rows is a grouped product itself, dx[r] = dy[r] @ w[group of r]: **your kernel, with
# the weights transposed**. No copy is made: the strides alone are exchanged.

# %%
dy = torch.rand(61, 37) - 0.5
y.backward(dy)
dx = grouped(dy, w.detach().mT, offsets)
print("equal:", torch.allclose(dx, x.grad, atol=1e-5))

# %% [markdown]
# For the weights the *sum* runs along an expert's rows:
#
# $$dw_e = dy[\text{rows of } e]^\top \; x[\text{rows of } e]$$
#
# One program for each tile of each dw_e sums them **in order**: the same bits every time. (Programs that share rows and add
# by *atomics* come in any order.)
#
# ### Exercise 8.5 · the gradient of the weights (*optional*)
#
# ●●● · 10 minutes · ten lines, one of them `tl.dot`
#
# | | |
# |---|---|
# | grid | (experts, tiles of N, tiles of K) |
# | `dy` (R, N), `x` (R, K) | rows in steps of `stride_dy`, `stride_x` |
# | `dw` (E, N, K) | contiguous; zeros for an expert without rows |
# | `offsets` (E,) | where each expert's rows end |
#
# <details><summary>Hint 1</summary>
#
# Expert e's rows begin where those of e - 1 end; `tl.load(offsets + e - 1, mask=e > 0, other=0)` also holds for the first.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The loop goes over rows: `for first in range(start, end, BLOCK_R)`. Load tiles of dy (rows, n) and of x (rows, k), 0 where
# `row >= end`, and add `tl.dot(a.T, b, total, …)`. Without rows the loop does nothing and total is 0: store it.
#
# </details>


# %%
@exercise("8.5")
@triton.jit
def weight_gradient(
    dy, x, dw, offsets, N, K, stride_dy, stride_x,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dw[e] = dy[rows of e].T @ x[rows of e]; a program computes one tile of one expert's."""
    e = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    ### BEGIN SOLUTION
    in_n, in_k = n < N, k < K
    start = tl.load(offsets + e - 1, mask=e > 0, other=0)
    end = tl.load(offsets + e)
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        row = (first + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        a_mask, b_mask = (row < end) & in_n[None, :], (row < end) & in_k[None, :]
        a = tl.load(dy + row * stride_dy + n[None, :], mask=a_mask, other=0.0)
        b = tl.load(x + row * stride_x + k[None, :], mask=b_mask, other=0.0)
        total = tl.dot(a.T, b, total, input_precision="ieee")
    dw += e.to(tl.int64) * N * K
    tl.store(dw + n[:, None] * K + k[None, :], total, mask=in_n[:, None] & in_k[None, :])
    ### END SOLUTION


# %%
dw = torch.full((4, 37, 45), float("nan"))  # as memory may be before
grid = (4, triton.cdiv(37, 16), triton.cdiv(45, 16))
arguments = (dy, x.detach(), dw, offsets, 37, 45, 37, 45)
weight_gradient.interpret(grid, *arguments, BLOCK_N=16, BLOCK_K=16, BLOCK_R=16)
print("equal:", torch.allclose(dw, w.grad, atol=1e-5), "· zeros:", bool((dw[1] == 0).all()))

# %% [markdown]
# ## 7 Fewer trips to memory (*optional*)
#
# Around an expert's products rows are copied and SwiGLU is taken. Each alone reads all from memory and writes it back; **fused**
# into a product, it takes numbers from registers. T = 32,768 tokens of Qwen3-30B-A3B (k = 8, D = 2048, F = 768), forward:

# %%
viz.draw_fusion(n_tokens=32768, top_k=8, d_model=2048, d_ff=768)

# %%
R, D, F = 32768 * 8, 2048, 768  # rows; bf16 has 2 bytes a number
saved = {
    "the first product's loads gather the rows": 2 * R * D,  # not written, not read again
    "SwiGLU before it stores": 4 * R * F,  # likewise gate and up
}
for name, numbers in saved.items():
    gigabytes, milliseconds = 2 * numbers / 1e9, 2 * numbers / bandwidth * 1e3
    print(f"{name}: {gigabytes:.1f} GB less, {milliseconds:.2f} ms")
print(f"all products' operations: {6 * R * D * F / rate * 1e3:.2f} ms at least")

# %% [markdown]
# `MoE(..., impl="triton")` does this; router weights go along with the second product.
#
# ## 8 What your kernel becomes
#
# A compiler needs no GPU, nor numbers: tensors on "meta" have none. Your kernel, for Qwen3-30B-A3B's first product in bf16,
# on an H100 or H200 ("Hopper", compute capability 9.0), a program on 8 **warps** of 32 **threads**:


# %%
HOW = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def compiled(kernel, capability=90, dtype=torch.bfloat16, **how):
    """The machine code for tensors like these, or None, and a sentence that says why."""
    shapes = (32768, 2048), (128, 1536, 2048), (32768, 1536)
    x, w, y = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    n_tiles = most_tiles(32768, 128, block=128)
    tiles = torch.empty(3, n_tiles, dtype=torch.int32, device="meta")
    sizes = (n_tiles, 1536, 2048, x.stride(0), *w.stride(), y.stride(0))
    try:
        return kernel.compile(x, w, y, tiles, *sizes, capability=capability, **HOW | how)
    except KernelError as error:
        print(error)


# %%
hopper = compiled(grouped_product)
viz.show_machine_code(hopper) if hopper else None

# %% [markdown]
# **There it is**: one HGMMA multiplies 64 × 16 by 16 × 128 bf16 numbers on the tensor cores, summed in fp32. Four
# of them take a block of K, 64, and each four warps half of the 128 rows. *Spills* would mean too few registers. Three *stages* are
# room for three blocks: one is multiplied, two are on their way.

# %%
block = 2 * (HOW["BLOCK_M"] + HOW["BLOCK_N"]) * HOW["BLOCK_K"]  # bytes of x and of w
if hopper:
    print("blocks of K in shared memory:", hopper.shared_bytes // block)
    print("places in 64 bit:", "no" if hopper.narrow_addresses else "yes")

# %% [markdown]
# “No” means that group, row or n meets a stride in 32 bits (9 shows where). The same for an A100, an H200 and a B200:

# %%
for name, capability in {"A100": 80, "H200": 90, "B200": 100}.items():
    code = hopper if capability == 90 else compiled(grouped_product, capability)
    if code:
        found = sorted(name for name in code.instructions if name.endswith("MMA"))
        print(f"{name}: tensor cores by {', '.join(found)}; spills: {code.spills}")

# %% [markdown]
# Each generation has an instruction of its own, from the same source. *Optional:* **predict** which one multiplies in fp32.

# %%
small = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
exact = compiled(grouped_product, dtype=torch.float32, **small)
if exact:
    print("tensor core instructions:", exact.tensor_core_instructions)
    print("ordinary multiply-adds (FFMA) in it:", exact.instructions["FFMA"] > 0)

# %% [markdown]
# None. Tensor cores would read fp32 as TF32, with 10 bits after the point, which `"ieee"` forbids. Exact fp32 runs on
# ordinary cores, at 67 in place of 989 TFLOP/s.
#
# ## 9 Mistakes that no laptop shows (*optional*)
#
# We make two in the course's kernel: it **sums in the type of the results**, and computes **places in 32 bits**. (The cell
# exchanges pieces of its text; skip it.)

# %%
ours = Kernel.written("moe_lab.course.chapters.kernels08", "grouped_product")
in_fp32 = 'total = tl.dot(a, b, total, input_precision="ieee")'
in_bf16 = 'total += tl.dot(a, b, input_precision="ieee").to(y.dtype.element_ty)'
sum_in_bf16 = ("dtype=tl.float32", "dtype=y.dtype.element_ty"), (in_fp32, in_bf16)
places_in_32_bits = (
    ("group.to(tl.int64)", "group"),
    ("(first + place).to(tl.int64)", "first + place"),
)
wrong = ours.changed(*sum_in_bf16, *places_in_32_bits)
versions = {"yours": hopper, "wrong": compiled(wrong)}

# %% [markdown]
# The wrong kernel passes every check of this notebook, for they are small and in fp32; and it compiles for bf16, too. In Triton's own intermediate language (TTIR): of which type is the sum that the loop carries along?


# %%
def lines_with(word, code, more=0):
    """The lines of a kernel's TTIR with this word, and as many after each; names without numbers."""
    text = re.sub(r"_\d+\b| loc\(.*", "", code.ttir)
    lines = [line.strip(" {") for line in text.splitlines() if line.startswith(" ")]
    found = [i for i, line in enumerate(lines) if word in line and "tt.func" not in line]
    return [line for i in found for line in lines[i : i + 1 + more]]


def show_ttir(word, more=0):
    """These lines of both kernels."""
    for name, code in versions.items():
        for line in lines_with(word, code, more) if code else ():
            print(f"{name}: {line}")


show_ttir("scf.for")

# %% [markdown]
# bf16 keeps 7 bits after the point, and now the sum is rounded to them after each block. The same in PyTorch, for K = 4096:

# %%
torch.manual_seed(0)
a, b = torch.rand(32, 4096).bfloat16(), torch.rand(4096, 32).bfloat16()
right, furthest = a.double() @ b.double(), {}
for dtype in (torch.float32, torch.bfloat16):
    total = torch.zeros(32, 32, dtype=dtype)
    for rows, columns in zip(a.split(64, dim=1), b.split(64), strict=True):
        total += (rows.float() @ columns.float()).to(dtype)
    furthest[dtype] = (total.bfloat16() / right - 1).abs().max()
more = furthest[torch.bfloat16] / furthest[torch.float32]
print("the bf16 sum is more than three times as far off:", bool(more > 3))

# %% [markdown]
# And the place of an expert's matrix, group times stride:

# %%
show_ttir("stride_we", more=1)

# %% [markdown]
# `extsi` widens to 64 bits; `muli … : i32` multiplies in 32, and past 2³¹ − 1 the product turns negative. (Does yours widen?)
# When? In Qwen3.5-397B, whose first product has 512 experts of 2048 by 4096:

# %%
one = 2048 * 4096
first_wrong = next(e for e in range(512) if e * one >= 2**31)
place = torch.tensor(first_wrong, dtype=torch.int32) * one
print(f"expert {first_wrong} begins at {first_wrong * one:,}, in 32 bits {place.item():,}")
print(f"and rows of 4096: from row {2**31 // 4096:,} on")

# %% [markdown]
# Tests use small sizes, so this one ships: in Liger for
# [that very model](https://github.com/linkedin/Liger-Kernel/issues/1296) and for
# [rows](https://github.com/linkedin/Liger-Kernel/pull/1248), in
# [MegaBlocks](https://github.com/databricks/megablocks/pull/185).
#
# ### A minimum in place of a mask (*optional*)
#
# To stay within x one can also hold k below K by a minimum; what is read twice meets w's zeros. Right in every test. **Predict**
# what it costs. (The cell exchanges text again.)

# %% tags=["nbval-ignore-output"]
held_below_k = "stride_x + k[None, :]", "stride_x + tl.minimum(k, K - 1)[None, :]"
no_mask_on_k = "mask=in_m & in_k[None, :]", "mask=in_m"
held = compiled(ours.changed(held_below_k, no_mask_on_k))
for name, code in {"yours": hopper, "minimum": held}.items():
    if code:
        copies, shared = code.instructions["LDGSTS"], f"{code.shared_bytes:,} bytes"
        print(f"{name}: {code.registers} registers; {shared} of shared memory,")
        print(f"   {copies} instructions that copy straight into it")

# %% [markdown]
# With the mask the compiler knows that numbers lie side by side: 16 bytes a load, straight into shared memory, stages ahead.
# With the minimum x comes number by number through registers, no longer ahead; so less shared memory. It happened to this
# package.
#
# ## 10 What a GPU says
#
# With a GPU: your kernel, the package's, and torch's.


# %%
def measure(tokens, n_experts=16, n=1536, k=2048):
    """TFLOP/s with this many tokens for each expert: yours, the package's, torch's."""
    x = torch.randn(tokens * n_experts, k, dtype=torch.bfloat16)
    w = torch.randn(n_experts, n, k, dtype=torch.bfloat16)
    offsets = tokens * torch.arange(1, n_experts + 1, dtype=torch.int32)
    flops = 2 * len(x) * n * k
    grid, arguments = launch(x, w, offsets, HOW["BLOCK_M"])
    yours = {"tflops": flops / 1e9 / grouped_product.time(grid, *arguments, **HOW)}
    on_gpu = x.cuda(), w.cuda(), offsets.cuda()

    def product_by(impl):
        return lambda _: (grouped_mm(*on_gpu, impl),)

    runs = {"package": product_by("triton"), "torch": product_by("torch")}
    found = {"yours": yours, **compare(runs, 1, flops, "cuda")}
    return [one.get("failed") or f"{one['tflops']:.0f}" for one in found.values()]


# %% [markdown]
# The GPU's own clock is read, so Python's time is not in it. Your plan is made beforehand; the package makes its own each
# time, in one more launch.

# %% tags=["nbval-ignore-output"]
if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
    print("tokens, TFLOP/s: yours, the package's, torch's")
    for tokens in (16, 64, 256, 1024):
        print(tokens, *measure(tokens), sep=", ")
else:
    print("There is no NVIDIA GPU from Ampere on here, so nothing is timed.")

# %%
recorded = viz.kernels.recorded()
if recorded is None:
    print("No run on a GPU has been recorded yet: what follows is known without one.")
viz.draw_throughput(recorded)

# %% [markdown]
# No kernel beats the rate of the tensor cores, nor the bandwidth.
#
# ### Step by step up the roofline (*optional*)
#
# From Hopper on a copy engine, **TMA**, fetches a whole tile: it knows a tensor by a **descriptor** (place, sizes, strides,
# tile), and is told two or three numbers. And programs may **stay**: one for each processor, which takes tile after tile.
# Both in the package's kernel:

# %%
(source,) = Kernel.written("moe_lab.ops.kernels", "grouped_product_tma").sources.values()
for line in source.splitlines():
    if any(word in line for word in ("tl.range(", "tile_order(", ".load([", "tl.dot(")):
        print(line)

# %% [markdown]
# What is past an edge comes as 0, so x and w need no masks; `flatten` has the next tile fetched while this one is stored.
# Now the steps, by what programs **ask** for. Caches serve much of it, so a step may stand above the slope:

# %%
viz.draw_stages(recorded)

# %% [markdown]
# ## What real models do
#
# | who | what | source |
# |---|---|---|
# | MegaBlocks (2022) | groups padded to 128 rows, block-sparse products; later grouped GEMM | [Gale et al.](https://arxiv.org/abs/2211.15841), section 5 |
# | OpenAI's triton_kernels | ragged tiles from a static bound, descriptors (TMA), a grid that stays | [code](https://github.com/triton-lang/triton/tree/main/python/triton_kernels) |
# | DeepGEMM | DeepSeek's grouped products in fp8 and bf16, CUDA | [code](https://github.com/deepseek-ai/DeepGEMM) |
# | Liger | fused block in Triton, backward from the pre-activations | [code](https://github.com/linkedin/Liger-Kernel) |
# | SonicMoE (2025) | gather fused, tiles filled by rounding the routing, little kept for the backward | [Guo et al.](https://arxiv.org/abs/2512.14080) |
# | PyTorch | `F.grouped_mm`, by CUTLASS on Hopper | [docs](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.grouped_mm.html) |
#
# ## Recap
#
# - One program for each tile; a plan with a static bound tells its expert and rows; masks do the ragged edge.
# - dX is the same kernel; dW sums along the rows, in order, and writes zeros where there are none.
# - The interpreter proves the numbers; the compiled code shows instruction, spills, sums and places.

# %%
show_progress("08")

# %% [markdown]
# **Next:** [09](09_arithmetic.ipynb), the arithmetic of MoE: which of the claims people repeat are true?
