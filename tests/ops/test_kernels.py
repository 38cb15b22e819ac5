"""The grouped product's launches by either path, single kernels where that says more, and no Triton at all."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from variants import INTERPRETS, interpreted

from moe_lab.ops import grouped_mm
from moe_lab.ops.tiles import Tile, Tiles

if INTERPRETS and importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    from moe_lab.ops import kernels, launches

    @triton.jit
    def write_order(tiles, columns, n_tiles, n_columns, BAND: tl.constexpr):
        program = tl.program_id(0)
        tile, column = kernels.tile_order(program, n_tiles, n_columns, BAND)
        tl.store(tiles + program, tile)
        tl.store(columns + program, column)


# Hypothesis shares the fixtures between its examples, which is what is wanted here.
PROPERTY = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TILES = {
    "small": Tiles(*4 * [Tile(16, 16, 16, 1, 1)]),
    "wide": Tiles(*3 * [Tile(16, 32, 16, 1, 1)], Tile(32, 16, 64, 1, 1)),
    "deep": Tiles(*3 * [Tile(32, 16, 64, 1, 1)], Tile(16, 64, 16, 1, 1)),
    "small, descriptors": Tiles(*4 * [Tile(16, 16, 16, 1, 1)], tma=True),
    "wide, descriptors": Tiles(*3 * [Tile(16, 32, 16, 1, 1)], Tile(32, 16, 64, 1, 1), tma=True),
    "deep, descriptors": Tiles(*3 * [Tile(32, 16, 64, 1, 1)], Tile(16, 64, 16, 1, 1), tma=True),
}
GROUPS = [
    [1],
    [0, 0, 5],
    [0, 37, 0],
    [3, 1, 4, 0, 17, 2],
    [16, 32, 0, 16],  # whole tiles
    [0, 0],  # no rows
]


@pytest.fixture(params=TILES.values(), ids=TILES)
def tiles(request, monkeypatch) -> Iterator[Tiles]:
    """Every shape of a tile, by either path."""
    monkeypatch.setattr(launches, "_n_processors", lambda _: 5)  # so that a program has several tiles to do
    with launches.using(request.param, band=3):
        yield request.param


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32)


def made(counts: list[int], past: int, width: int, out_width: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """Rows, of which the last `past` belong to no group and are NaN, and weights."""
    torch.manual_seed(0)
    rows, weights = torch.randn(sum(counts) + past, width), torch.randn(len(counts), out_width, width)
    weights *= max(1, width) ** -0.5
    rows[sum(counts) :] = float("nan")
    return rows.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()


def assert_agrees(rows: Tensor, weights: Tensor, counts: list[int], upstream: Tensor | None = None) -> None:
    """Product and gradients are the definition's, and zero for rows of no group, whatever these hold."""
    n_rows = sum(counts)
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expected = (weights.double()[owners] * rows.double()[:n_rows, None]).sum(-1)
    if upstream is None:
        upstream = torch.randn(len(rows), weights.shape[1]).to(rows.dtype)
        upstream[n_rows:] = float("nan")
    wanted = [expected, *torch.autograd.grad(expected, (rows, weights), upstream[:n_rows].double())]
    product = grouped_mm(rows, weights, offsets_of(counts), "triton")
    got = [product, *torch.autograd.grad(product, (rows, weights), upstream)]
    tolerance = 1e-5 if rows.dtype == torch.float32 else 4 * torch.finfo(rows.dtype).eps
    for name, one, other in zip(("product", "rows", "weights"), got, wanted, strict=True):
        if name != "weights":
            assert not one[n_rows:].any()  # zero, and not NaN
            one, other = one[:n_rows], other[:n_rows]
        scale = max(1.0, other.abs().max().item() if other.numel() else 0.0)
        assert_close(
            one.double(), other.double(), rtol=tolerance, atol=tolerance * scale, msg=lambda t, n=name: f"{n}: {t}"
        )


@interpreted
def test_any_tile_by_either_path_on_memory_that_is_not_clean(tiles, poison, launched):
    pasts, widths, out_widths = (0, 3, 20, 0, 17, 4), (16, 8, 40, 24, 32, 8), (8, 24, 16, 72, 32, 8)
    for counts, past, width, out_width in zip(GROUPS, pasts, widths, out_widths, strict=True):
        dtype = torch.float16 if past == 20 else torch.float32
        assert_agrees(*made(counts, past, width, out_width, dtype), counts)
    products = [name for name in launched if name.startswith("grouped_product")]
    assert set(products) == {"grouped_product_tma" if tiles.tma else "grouped_product"}


@interpreted
@PROPERTY
@given(data=st.data())
@pytest.mark.parametrize("tma", [False, True], ids=["portable", "descriptors"])
def test_any_groups(tma, poison, data):
    counts = data.draw(st.lists(st.integers(0, 24), min_size=1, max_size=6))
    past, width, out_width = data.draw(st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(1, 9)))
    with pytest.MonkeyPatch.context() as patch, launches.using(Tiles(*4 * [Tile(16, 16, 32, 1, 1)], tma=tma)):
        patch.setattr(launches, "_n_processors", lambda _: 3)
        assert_agrees(*made(counts, past, 4 * width, 4 * out_width), counts)


def expanded(x: Tensor) -> Tensor:
    return x[..., :1, :].expand(x.shape)


NOT_DESCRIBED = {
    "rows of no multiple of 16 bytes": (lambda x: x[:, :15].contiguous(), lambda w: w[..., :15].contiguous()),
    "rows that begin anywhere": (lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape), lambda w: w),
    "matrices that begin anywhere": (lambda x: x, lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape)),
    "one row for all": (expanded, lambda w: w),
    "one row for all of a matrix": (lambda x: x, expanded),
    "one matrix for all groups": (lambda x: x, lambda w: w[:1].expand(w.shape)),
    "rows that overlap": (lambda x: x.flatten()[: 16 + 4 * (len(x) - 1)].unfold(0, 16, 4), lambda w: w),
    "every other number of a matrix": (lambda x: x, lambda w: w.repeat_interleave(2, -1)[..., ::2]),
}


@interpreted
@pytest.mark.parametrize(("rows_lie", "weights_lie"), NOT_DESCRIBED.values(), ids=NOT_DESCRIBED)
def test_what_the_copy_engine_does_not_take_goes_the_portable_way(rows_lie, weights_lie, poison, launched):
    counts = [3, 0, 18, 2]
    rows, weights = (x.detach() for x in made(counts, 0, 16, 8))
    rows, weights = rows_lie(rows).requires_grad_(), weights_lie(weights).requires_grad_()
    with launches.using(TILES["small, descriptors"]):
        assert_agrees(rows, weights, counts)
    assert launched[:2] == ["plan_tiles", "grouped_product"]


@interpreted
@pytest.mark.parametrize(
    "lies", [lambda g: g[:1].expand(g.shape), lambda g: g.mT.contiguous().mT], ids=["one", "turned"]
)
@pytest.mark.parametrize("tiles", ["small", "small, descriptors"])
def test_a_gradient_lies_as_it_comes(lies, tiles, poison):
    counts = [3, 0, 18, 2]
    rows, weights = made(counts, 0, 16, 8)
    with launches.using(TILES[tiles]):
        assert_agrees(rows, weights, counts, lies(torch.randn(23, 8)))


@interpreted
def test_transposed_weights_and_columns_of_wider_tensors_are_described_as_they_lie(poison, launched):
    counts = [3, 0, 18, 2]
    rows, weights = made(counts, 2, 20, 36)
    turned = weights.detach().mT.contiguous().mT.requires_grad_()
    narrow = [x.detach()[..., :17].requires_grad_() for x in (rows, weights)]
    with launches.using(TILES["wide, descriptors"]):
        for given in ((rows, turned), narrow):
            launched.clear()
            assert_agrees(*given, counts)
            assert "grouped_product_tma" in launched
            assert "grouped_product" not in launched


@interpreted
def test_a_frozen_side_costs_nothing(launched):
    counts = [3, 0, 2]
    rows, weights = made(counts, 0, 16, 8)
    grouped_mm(rows.detach(), weights, offsets_of(counts), "triton").sum().backward()
    assert launched == ["plan_tiles", "grouped_product", "weight_gradient"]
    launched.clear()
    grouped_mm(rows, weights.detach(), offsets_of(counts), "triton").sum().backward()
    assert launched == ["plan_tiles", "grouped_product", "grouped_product"]


@interpreted
@pytest.mark.parametrize("tiles", ["small", "small, descriptors"])
def test_the_same_bits_every_time(tiles, poison):
    counts = [30, 0, 17]
    rows, weights = made(counts, 0, 40, 24)
    upstream, seen = torch.randn(47, 24), []
    for _ in range(2):
        with launches.using(TILES[tiles]):
            product = grouped_mm(rows, weights, offsets_of(counts), "triton")
        seen.append((product, *torch.autograd.grad(product, (rows, weights), upstream)))
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


@interpreted
def test_other_tiles_hold_inside_nest_and_go_also_after_an_error():
    rows, weights = (x.detach() for x in made([3], 0, 16, 8))

    def band_and_rows() -> tuple[int, int]:
        seen = []
        with launches.observed(lambda name, args, constants: nullcontext(seen.append(constants))):
            grouped_mm(rows, weights, offsets_of([3]), "triton")
        return seen[-1]["BAND"], seen[-1]["BLOCK_M"]

    before = band_and_rows()
    with launches.using(TILES["deep"]):
        assert band_and_rows() == (8, 32)
        with suppress(RuntimeError), launches.using(band=3):
            assert band_and_rows() == (3, 32)
            raise RuntimeError
        assert band_and_rows() == (8, 32)
    assert band_and_rows() == before == (8, 16)


# --- One kernel at a time -------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("n_tiles", "n_columns", "band"), [(1, 1, 8), (8, 3, 8), (19, 3, 8), (7, 1, 2), (5, 4, 1)])
def test_tiles_are_taken_a_band_of_rows_at_a_time_and_each_once(n_tiles, n_columns, band):
    n = n_tiles * n_columns
    tiles, columns = torch.full((2, n), -1, dtype=torch.int32)
    write_order[(n,)](tiles, columns, n_tiles, n_columns, BAND=band)
    order = list(zip(tiles.tolist(), columns.tolist(), strict=True))
    by_band = sorted(
        ((tile, column) for tile in range(n_tiles) for column in range(n_columns)),
        key=lambda at: (at[0] // band, at[1], at[0]),
    )
    assert order == by_band


@interpreted
@pytest.mark.parametrize("n", [1, 7, 1024, 1030, 2100])  # a block is at most 1024 wide
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_choices_of_a_token_are_summed_in_fp32(n, top_k, poison):
    torch.manual_seed(0)
    rows = torch.randn(4 * top_k, n).half()
    wanted = rows.float().view(4, top_k, n).sum(1)
    assert_close(launches.sum_of_choices(rows, top_k), wanted.half(), rtol=0, atol=0)


@interpreted
def test_a_group_without_rows_gets_zeros_also_when_there_are_no_rows_at_all(poison):
    weights = torch.randn(3, 8, 16, requires_grad=True)
    rows = torch.randn(0, 16, requires_grad=True)
    product = grouped_mm(rows, weights, torch.zeros(3, dtype=torch.int32), "triton")
    d_rows, d_weights = torch.autograd.grad(product, (rows, weights), product.detach())
    assert (product.shape, d_rows.shape) == ((0, 8), (0, 16))
    assert torch.equal(d_weights, torch.zeros(3, 8, 16))


@interpreted
def test_rows_and_columns_of_no_width(poison):
    counts = [2, 0, 3]
    for width, out_width in ((0, 8), (16, 0)):
        rows, weights = made(counts, 1, width, out_width)
        assert_agrees(rows, weights, counts)


@interpreted
def test_fp32_follows_either_of_torchs_switches():
    rows, weights = (x.detach() for x in made([3], 0, 16, 8))

    def precision(rows: Tensor, weights: Tensor) -> str:
        seen = []
        with launches.observed(lambda name, args, constants: nullcontext(seen.append(constants.get("PRECISION")))):
            grouped_mm(rows, weights, offsets_of([3]), "triton")
        return seen[-1]

    assert precision(rows, weights) == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert precision(rows, weights) == "tf32"
        assert precision(rows.half(), weights.half()) == "ieee"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert precision(rows, weights) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
    assert precision(rows, weights) == "ieee"


# --- Where kernels cannot run ---------------------------------------------------------------------------------------

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from moe_lab.config import MoEConfig
from moe_lab.moe import MoE
from moe_lab.ops import grouped_mm
x = torch.randn(3, 8)
for impl in ("auto", "reference", "torch", "padded"):
    MoE(MoEConfig(d_model=8, d_ff=8, n_experts=4, top_k=2), impl)(x)[0].sum().backward()
for step in (
    lambda: grouped_mm(x, torch.randn(1, 8, 8), torch.tensor([3], dtype=torch.int32), "triton"),
    lambda: MoE(MoEConfig(d_model=8, d_ff=8, n_experts=4, top_k=2), "triton")(x),
):
    try:
        step()
    except ValueError as error:
        print(error)
"""


def test_without_triton_all_but_its_variant_works_and_that_says_so():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == 2 * [
        "impl='triton' needs Triton, which is made for Linux: use impl='auto' here."
    ]


@pytest.mark.skipif(INTERPRETS, reason="here kernels are interpreted")
def test_kernels_need_a_gpu_and_say_so():
    pytest.importorskip("triton", reason="there is no Triton for this system")
    message = r"impl='triton' needs tensors on an NVIDIA GPU, and these are on cpu: use impl='auto', or set TRITON_INT"
    with pytest.raises(ValueError, match=message):
        grouped_mm(*made([3], 0, 8, 8), offsets_of([3]), "triton")


@interpreted
@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (torch.bfloat16, "interpreter: bf16 comes out wrong there. Use fp32 or fp16"),
        (torch.float64, "takes fp32, bf16 and fp16, and these are torch.float64: use impl='auto'"),
    ],
    ids=str,
)
def test_a_dtype_that_kernels_do_not_take_is_refused(dtype, says):
    with pytest.raises(ValueError, match=says):
        grouped_mm(*made([3], 0, 8, 8, dtype), offsets_of([3]), "triton")
