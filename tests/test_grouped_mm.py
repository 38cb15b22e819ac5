"""Every variant in `GROUPED_MM` is held to the contract: a new one adds its tests by being in the table."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from variants import each, skip_bf16_in_the_interpreter

from moe_lab.ops import GROUPED_MM, choose_impl, grouped_mm

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
IMPLS = each(GROUPED_MM, "auto")
TAKES_ALL = ("reference", "padded", "auto", "triton")
ON_THREADS = [impl for impl in (*GROUPED_MM, "auto") if impl != "triton"]  # the interpreter is one thread
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
EVEN_SIZES = [(16, 16), (64, 32), (32, 128)]  # row length, output length
UGLY_SIZES = [(1, 1), (5, 7), (33, 3), (8, 9), (9, 8), (24, 40)]
GROUPS = [
    [1],
    [7],  # one group
    [0, 0, 5],  # empty first,
    [5, 0],  # last,
    [0, 9, 0],  # all but the middle
    [3, 1, 4, 0, 17, 2],
    [0, 0],  # no rows
]


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32)


def by_definition(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Every row times its own copy of its matrix, in fp64."""
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return (weights.double()[owners] * rows.double()[:, None]).sum(-1)


def made(counts: list[int], width: int, out_width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    rows, weights = torch.randn(sum(counts), width), torch.randn(len(counts), out_width, width) * width**-0.5
    return rows.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()


def refusal(impl: str, rows: Tensor, weights: Tensor, counts: list[int]) -> str | None:
    """What a variant says if it does not take these."""
    try:
        grouped_mm(rows, weights, offsets_of(counts), impl)
    except ValueError as error:
        return str(error)
    return None


def assert_agrees(impl: str, rows: Tensor, weights: Tensor, counts: list[int]) -> None:
    """Values and both gradients are those of the definition."""
    ours = [x.detach().clone().requires_grad_() for x in (rows, weights)]
    product = grouped_mm(*ours, offsets_of(counts), impl)
    expected = by_definition(rows, weights, counts)
    upstream = torch.randn(expected.shape).to(rows.dtype)
    product.backward(upstream)
    d_rows, d_weights = torch.autograd.grad(expected, (rows, weights), upstream.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(rows.dtype, 4 * torch.finfo(rows.dtype).eps)
    for name, got, wanted in (
        ("product", product, expected),
        ("gradient of the rows", ours[0].grad, d_rows),
        ("gradient of the weights", ours[1].grad, d_weights),
    ):
        assert got.dtype == rows.dtype
        scale = max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
        assert_close(
            got.double(),
            wanted.double(),
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}, {counts} rows of {rows.shape[1]} to {weights.shape[1]}: {text}",
        )
    empty = torch.tensor(counts) == 0
    assert torch.equal(ours[1].grad[empty], torch.zeros_like(ours[1].grad[empty]))  # zero: neither None nor NaN


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_even_sizes_in_values_and_gradients(impl, dtype):
    skip_bf16_in_the_interpreter(impl, dtype)
    for counts in GROUPS:
        for width, out_width in EVEN_SIZES:
            assert_agrees(impl, *made(counts, width, out_width, dtype), counts)  # no variant may refuse these


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_ugly_sizes_in_values_and_gradients_or_a_refusal(impl, dtype):
    skip_bf16_in_the_interpreter(impl, dtype)
    for counts in GROUPS:
        for width, out_width in UGLY_SIZES:
            rows, weights = made(counts, width, out_width, dtype)
            said = refusal(impl, rows, weights, counts)
            if said is None:
                assert_agrees(impl, rows, weights, counts)
            else:
                assert impl not in TAKES_ALL or (impl == "triton" and dtype == torch.float64)
                assert f"impl={impl!r}" in said


@pytest.mark.parametrize("impl", IMPLS)
@PROPERTY
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 3), st.integers(1, 3))
def test_any_groups(impl, counts, width, out_width):
    assert_agrees(impl, *made(counts, 4 * width, 4 * out_width), counts)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_group_at_all_has_a_result_and_gradients_of_no_elements(impl):
    rows, weights = torch.zeros(0, 8, requires_grad=True), torch.zeros(0, 4, 8, requires_grad=True)
    y = grouped_mm(rows, weights, torch.zeros(0, dtype=torch.int32), impl)
    y.sum().backward()
    assert (y.shape, rows.grad.shape, weights.grad.shape) == ((0, 4), (0, 8), (0, 4, 8))


@pytest.mark.parametrize("impl", ["reference", "padded"])
def test_gradients_in_fp64(impl):
    counts = [2, 0, 3]
    rows, weights = made(counts, 3, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda r, w: grouped_mm(r, w, offsets_of(counts), impl), (rows, weights))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sum_can_be_differentiated_and_so_can_either_side_alone(impl):
    counts = [3, 0, 2]
    rows, weights = made(counts, 16, 8)
    expected = torch.autograd.grad(by_definition(rows, weights, counts).sum(), (rows, weights))
    grouped_mm(rows, weights, offsets_of(counts), impl).sum().backward()  # its gradient is one number, expanded
    assert_close(rows.grad, expected[0].float(), rtol=1e-5, atol=1e-5)
    assert_close(weights.grad, expected[1].float(), rtol=1e-5, atol=1e-5)
    rows.grad = weights.grad = None
    grouped_mm(rows, weights.detach(), offsets_of(counts), impl).sum().backward()
    grouped_mm(rows.detach(), weights, offsets_of(counts), impl).sum().backward()
    assert_close(rows.grad, expected[0].float(), rtol=1e-5, atol=1e-5)
    assert_close(weights.grad, expected[1].float(), rtol=1e-5, atol=1e-5)
    assert not grouped_mm(rows.detach(), weights.detach(), offsets_of(counts), impl).requires_grad


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "one row, expanded": lambda x: x[..., :1, :].expand(x.shape),
    "from the second number on": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_how_a_tensor_lies_in_memory_does_not_matter(impl, layout):
    counts = [3, 0, 2]
    rows, weights = (layout(x.detach()) for x in made(counts, 16, 8))
    for r, w in ((rows, weights.contiguous()), (rows.contiguous(), weights)):
        assert_close(
            grouped_mm(r, w, offsets_of(counts), impl), by_definition(r, w, counts).float(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_stays_in_its_row_and_an_unread_matrix_does_no_harm(impl):
    counts = [2, 0, 3]
    rows, weights = (x.detach() for x in made(counts, 16, 8))
    rows[1] = float("nan")
    weights[1] = float("nan")  # the empty group's
    rows.requires_grad_()
    product = grouped_mm(rows, weights, offsets_of(counts), impl)
    product.sum().backward()
    assert product.isfinite().all(-1).tolist() == [True, False, True, True, True]
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("impl", ON_THREADS)
def test_the_same_bits_every_time_also_with_two_threads(impl):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        counts = [300, 0, 700]
        rows, weights = made(counts, 64, 48)
        upstream, seen = torch.randn(1000, 48), []
        for _ in range(3):
            product = grouped_mm(rows, weights, offsets_of(counts), impl)
            seen.append((product, *torch.autograd.grad(product, (rows, weights), upstream)))
    finally:
        torch.set_num_threads(threads)
    for again in seen[1:]:
        assert all(torch.equal(one, other) for one, other in zip(seen[0], again, strict=True))


@pytest.mark.parametrize("impl", each(GROUPED_MM))
def test_autocast_computes_in_bf16_whatever_the_variant(impl):
    skip_bf16_in_the_interpreter(impl)
    counts = [2, 0, 3]
    rows, weights = made(counts, 16, 8)
    for r in (rows, rows.detach().bfloat16()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = grouped_mm(r, weights, offsets_of(counts), impl)
        assert product.dtype == torch.bfloat16
        assert_close(product.double(), by_definition(rows, weights, counts), rtol=0.05, atol=0.05)
    product.sum().backward()
    assert weights.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("width", "out_width", "dtype"),
    [(5, 16, torch.float32), (16, 6, torch.float32), (4, 8, torch.bfloat16), (16, 16, torch.float64)],
)
def test_torchs_own_product_says_what_it_does_not_take_and_auto_takes_it(width, out_width, dtype):
    counts = [2, 0, 3]
    rows, weights = made(counts, width, out_width, dtype)
    message = rf"impl='torch' cannot multiply rows of {width} and weights to {out_width} in {dtype}: expected .*'auto'"
    with pytest.raises(ValueError, match=message):
        grouped_mm(rows, weights, offsets_of(counts), "torch")
    assert choose_impl(rows, weights) != "torch"
    assert_agrees("auto", rows, weights, counts)


def test_auto_is_a_variant_of_the_table_and_does_not_look_at_the_load():
    for width, out_width in EVEN_SIZES + UGLY_SIZES:
        for dtype in DTYPES:
            chosen = {choose_impl(*made(counts, width, out_width, dtype)) for counts in ([2, 3], [0, 5], [5, 0])}
            assert len(chosen) == 1
            assert chosen < set(GROUPED_MM)


@pytest.mark.parametrize("impl", ["triton2", "", None])
def test_an_unknown_variant_is_named_with_those_there_are(impl):
    with pytest.raises(ValueError, match=rf"impl={impl!r}: expected one of auto, {', '.join(GROUPED_MM)}"):
        grouped_mm(*made([1], 4, 4), offsets_of([1]), impl)


# --- What is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "another length": ((5, 15), (3, 8, 16), [2, 2, 5], r"shape \(5, 15\) and weights of shape \(3, 8, 16\): expected"),
    "the weights transposed": ((5, 16), (3, 16, 8), [2, 2, 5], r"expected \(R, I\) and \(E, O, I\), with the same I"),
    "one matrix": ((5, 16), (8, 16), [5], r"weights of shape \(8, 16\): expected"),
    "a batch of rows": ((1, 5, 16), (3, 8, 16), [2, 2, 5], r"rows of shape \(1, 5, 16\)"),
    "one offset too many": ((5, 16), (3, 8, 16), [0, 2, 2, 5], r"of shape \(4,\): expected one int32 for each of"),
    "offsets that fall": ((5, 16), (3, 8, 16), [3, 2, 5], r"offsets are \[3, 2, 5\]: expected them to rise"),
    "an offset below zero": ((5, 16), (3, 8, 16), [-1, 2, 5], r"offsets are \[-1, 2, 5\]: expected them to rise"),
    "offsets past the rows": ((5, 16), (3, 8, 16), [2, 2, 6], r"offsets are \[2, 2, 6\]: .* to the 5 rows or fewer"),
    "nine of them": ((5, 16), (9, 8, 16), [1] * 8 + [6], r"\[1, 1, 1, 1, 1, 1, 1, 1\] and so on: expected"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "weights", "ends", "says"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("impl", [*GROUPED_MM, "auto"])
def test_shapes_and_offsets_that_do_not_fit_are_named(impl, rows, weights, ends, says):
    with pytest.raises(ValueError, match=says):
        grouped_mm(torch.zeros(rows), torch.zeros(weights), torch.tensor(ends, dtype=torch.int32), impl)


@pytest.mark.parametrize("impl", [*GROUPED_MM, "auto"])
def test_dtypes_and_devices_that_differ_are_named(impl):
    rows, weights, offsets = torch.zeros(5, 16), torch.zeros(1, 8, 16), offsets_of([5])
    for tensors, says in (
        ((rows.half(), weights, offsets), r"rows are torch.float16 and weights torch.float32: convert .*\.to"),
        ((rows, weights, offsets.long()), r"offsets are torch.int64 of shape \(1,\): expected one int32"),
        ((rows, weights.to("meta"), offsets), r"rows are on cpu, weights on meta: move one of them with \.to"),
        ((rows.to("meta"), weights, offsets), r"rows are on meta, weights on cpu: move one of them with \.to"),
        ((rows, weights, offsets.to("meta")), r"rows are on cpu, offsets on meta: move one of them with \.to"),
    ):
        with pytest.raises(ValueError, match=says):
            grouped_mm(*tensors, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_past_the_last_offset_are_not_read_and_become_zero(impl):
    counts = [2, 0, 3]
    rows, weights = made(counts, 16, 8)
    longer = torch.cat([rows.detach(), torch.full((4, 16), float("nan"))]).requires_grad_()
    product = grouped_mm(longer, weights, offsets_of(counts), impl)
    assert_close(product[:5], by_definition(rows, weights, counts).float(), rtol=1e-5, atol=1e-5)
    product.sum().backward()
    assert not product[5:].any()
    assert not longer.grad[5:].any()
    assert weights.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_offsets_may_lie_anywhere_in_memory(impl):
    counts = [3, 0, 2]
    rows, weights = (x.detach() for x in made(counts, 16, 8))
    strided = torch.stack([offsets_of(counts), torch.full((3,), 99, dtype=torch.int32)], -1)[:, 0]
    product = grouped_mm(rows, weights, strided, impl)
    assert_close(product, by_definition(rows, weights, counts).float(), rtol=1e-5, atol=1e-5)
