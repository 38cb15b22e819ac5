"""The plan of the tiles of rows against a loop, the kernel against the plan, and the table of tiles against chips."""

from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from variants import interpreted

from moe_lab.ops.tiles import _TILES, choose_tiles, most_tiles, plan_tiles

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=9)
BLOCKS = st.sampled_from([1, 2, 4, 16])


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32)


def by_loop(counts: list[int], past: int, block: int) -> list[tuple[int, int, int]]:
    """(group, first row, rows) of every tile in use; the rows past the last offset are a group after the others."""
    found, first = [], 0
    for group, count in enumerate([*counts, past]):
        end = first + count
        while first < end:
            found.append((group, first, min(block, end - first)))
            first += found[-1][2]
    return found


def columns(plan: Tensor) -> list[tuple[int, ...]]:
    return [tuple(column) for column in plan.T.tolist()]


def test_the_example_of_the_docstring():
    plan = plan_tiles(torch.tensor([5, 5, 7], dtype=torch.int32), 8, 4)
    assert plan.tolist() == [[0, 0, 2, 3, -1], [0, 4, 5, 7, 0], [4, 1, 2, 1, 0]]
    assert plan.dtype == torch.int32


@PROPERTY
@given(COUNTS, st.integers(0, 20), BLOCKS)
@example([0], 0, 4)
@example([0, 0, 0], 5, 4)
@example([1] * 9, 0, 16)
def test_the_plan_is_that_of_a_loop_and_says_what_is_not_used(counts, past, block):
    n_rows = sum(counts) + past
    plan = columns(plan_tiles(offsets_of(counts), n_rows, block))
    used = by_loop(counts, past, block)
    assert len(plan) == most_tiles(n_rows, len(counts) + 1, block)
    assert plan[: len(used)] == used
    assert set(plan[len(used) :]) <= {(-1, 0, 0)}


@PROPERTY
@given(st.integers(0, 60), st.integers(1, 8), st.integers(1, 17))
@example(0, 4, 4)
@example(3, 8, 4)
def test_the_bound_is_reached_and_never_passed(n_rows, n_groups, block):
    alone = min(n_rows, n_groups)  # the worst: every group one row, and what is left in whole tiles with the first
    worst = [1] * alone + [0] * (n_groups - alone)
    worst[0] += n_rows - alone if n_rows else 0
    n_tiles = [len(by_loop(counts, 0, block)) for counts in (worst, [n_rows] + [0] * (n_groups - 1))]
    assert max(n_tiles) <= most_tiles(n_rows, n_groups, block)
    assert n_tiles[0] == most_tiles(n_rows, n_groups, block)


@PROPERTY
@given(COUNTS, st.integers(0, 20), BLOCKS)
def test_no_load_needs_more_tiles_than_the_bound(counts, past, block):
    assert len(by_loop(counts, past, block)) <= most_tiles(sum(counts) + past, len(counts) + 1, block)


# Offsets that no plan can be made of: on a GPU nobody looks at them before a kernel does.
NONSENSE = [
    [5, 2, 7],
    [9, 9, 3],
    [3, 99, 4],
    [-4, 2, 8],
    [0, -1, -9],
    [100, 100, 100],
    [8, 0, 8, 0, 8],  # three times all rows
    [2**31 - 1] * 3,
]


@pytest.mark.parametrize("offsets", NONSENSE, ids=str)
def test_offsets_that_fall_or_end_past_the_rows_stay_within_them(offsets):
    for block in (1, 4):
        assert_within(plan_tiles(torch.tensor(offsets, dtype=torch.int32), 8, block), 8, len(offsets), block)


def assert_within(plan: Tensor, n_rows: int, n_groups: int, block: int) -> None:
    for group, first, count in columns(plan):
        assert -1 <= group <= n_groups
        assert 0 <= count <= block
        assert count == 0 or (group >= 0 and first >= 0 and first + count <= n_rows)


# --- The kernel -----------------------------------------------------------------------------------------------------


def planned(offsets: Tensor, n_rows: int, block: int) -> tuple[Tensor, int, Tensor]:
    """The kernel's table, how many tiles are used, and `by_size`, each with a guard behind it that nobody may touch."""
    import triton

    from moe_lab.ops import kernels

    n_groups = len(offsets)
    n_tiles = most_tiles(n_rows, n_groups + 1, block)
    table, n_used, by_size = (torch.full((size + 64,), -77, dtype=torch.int32) for size in (3 * n_tiles, 1, n_groups))
    guarded = torch.cat([torch.full((1,), 10**6, dtype=torch.int32), offsets, torch.full((64,), 10**6).int()])
    kernels.plan_tiles[(n_groups + 1,)](
        guarded[1 : n_groups + 1], table, n_used, by_size, n_groups, n_rows, n_tiles,
        BLOCK=block, GROUPS=triton.next_power_of_2(n_groups + 1),
    )  # fmt: skip
    behind = (table[3 * n_tiles :], n_used[1:], by_size[n_groups:])
    assert all(set(guard.tolist()) == {-77} for guard in behind)
    return table[: 3 * n_tiles].view(3, n_tiles), int(n_used[0]), by_size[:n_groups]


def in_use(plan: Tensor) -> list[tuple[int, ...]]:
    """Groups and numbers of rows of all tiles, and first rows of those that have any."""
    return [column if column[2] else (column[0], 0, 0) for column in columns(plan)]


@interpreted
@settings(PROPERTY, max_examples=30)
@given(COUNTS, st.integers(0, 20), BLOCKS)
@example([0, 0, 0], 0, 4)
@example([40, 0, 0, 0, 0, 0, 0], 40, 1)  # one program writes many times as many tiles as there are groups
@example([0, 0, 0, 0, 0, 0, 40], 0, 2)
@example([7] * 8, 0, 4)  # equal loads keep their order
def test_the_kernel_makes_the_same_plan_and_names_the_fullest_groups_first(counts, past, block):
    n_rows = sum(counts) + past
    plan, n_used, by_size = planned(offsets_of(counts), n_rows, block)
    assert n_used == int((plan[0] >= 0).sum())
    assert in_use(plan) == in_use(plan_tiles(offsets_of(counts), n_rows, block))
    assert by_size.tolist() == sorted(range(len(counts)), key=lambda group: -counts[group])


@interpreted
@pytest.mark.parametrize("offsets", NONSENSE, ids=str)
def test_the_kernel_too_stays_within_the_rows_whatever_the_offsets_say(offsets):
    for block in (1, 4):
        plan, n_used, by_size = planned(torch.tensor(offsets, dtype=torch.int32), 8, block)
        assert 0 <= n_used <= plan.shape[1]
        written = plan[:, plan[0] != -77]  # tiles of groups that overlap may go unwritten: they are too many anyway
        assert_within(written, 8, len(offsets), block)
        assert sorted(by_size.tolist()) == list(range(len(offsets)))


@interpreted
@pytest.mark.parametrize("tma", [False, True], ids=["portable", "descriptors"])
@pytest.mark.parametrize("offsets", NONSENSE, ids=str)
def test_no_kernel_leaves_the_rows_where_offsets_make_no_sense(offsets, tma):
    """Around the rows stands NaN, which a read out of bounds would bring into a result."""
    from moe_lab.ops import launches

    torch.manual_seed(0)
    around = torch.full((8 + 40, 24), float("nan"))
    around[20:28] = torch.randn(8, 24)
    rows, weights = around[20:28].requires_grad_(), torch.randn(len(offsets), 8, 24, requires_grad=True)
    with launches.using(tma=tma):
        product = launches.grouped(rows, weights, torch.tensor(offsets, dtype=torch.int32))
    d_rows, d_weights = torch.autograd.grad(product, (rows, weights), torch.ones_like(product))
    assert product.shape == (8, 8)
    assert d_rows.shape == rows.shape
    assert d_weights.isfinite().all()


# --- The table ------------------------------------------------------------------------------------------------------

CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
# A program's most shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", KiB.
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}


def test_the_choice_of_tiles_is_a_pure_function_of_chip_dtype_and_load():
    for capability in (0, *CAPABILITIES):
        for size in (2, 4):
            assert choose_tiles(capability, size, 64, 4) is choose_tiles(capability, size, 64, 4)
            few, many = choose_tiles(capability, size, 64 * 4, 4), choose_tiles(capability, size, 64 * 4 + 1, 4)
            assert (few is many) == (size == 4 or capability == 0)
            assert few is choose_tiles(capability, size, 0, 4)
            uneven = {choose_tiles(capability, size, n_rows, 4, is_even=False) for n_rows in (1, 10**6)}
            assert len(uneven) == 1
            assert not any(tiles.tma for tiles in uneven)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_tile_fits_its_chip(capability):
    for size in (2, 4):
        for n_rows in (1, 10**6):
            tiles = choose_tiles(capability, size, n_rows, 4)
            assert choose_tiles(capability, size, n_rows, 4, is_even=False) is choose_tiles(capability, 4, n_rows, 4)
            for tile, n_matrices in (
                (tiles.product, 1), (tiles.gate_up, 2), (tiles.down_backward, 1), (tiles.weight_gradient, 1),
            ):  # fmt: skip
                of_a_stage = (tile.rows + n_matrices * tile.columns) * tile.depth * size
                assert of_a_stage * tile.stages <= SHARED[capability] * 1024
            assert not tiles.tma or 90 <= capability < 120


@pytest.mark.parametrize("name", _TILES)
def test_tiles_share_a_plan_and_are_what_kernels_can_be_made_of(name):
    tiles = _TILES[name]
    assert tiles.rows == tiles.product.rows == tiles.gate_up.rows == tiles.down_backward.rows
    for tile in (tiles.product, tiles.gate_up, tiles.down_backward, tiles.weight_gradient):
        for size in (tile.rows, tile.columns, tile.depth):
            assert size >= 16  # the least of a matrix instruction
            assert size & (size - 1) == 0
        assert tile.warps in (1, 2, 4, 8)
        assert tile.stages >= 1
