"""Which tile of rows a program works on, where groups begin anywhere and end anywhere; and how large tiles are."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def most_tiles(n_rows: int, n_groups: int, block: int) -> int:
    """The most tiles that the rows can need, however they fall to the groups: known without looking at the offsets.

    A tile holds rows of one group, so at worst every group but one holds a single row, and each row a tile. With more
    rows than groups there is one tile for every group, and one more for every `block` rows beyond that.
    """
    return n_rows if n_rows <= n_groups else n_groups + (n_rows - n_groups) // block


def plan_tiles(offsets: Tensor, n_rows: int, block: int) -> Tensor:
    """(3, n) int32: of each tile of up to `block` rows its group, its first row, and its number of rows.

    Tiles come in the order of their rows. Rows past the last offset are of a group of their own, numbered E. What is
    left up to `most_tiles` is not used, and says group -1. Needs no host sync. Example, with tiles of four rows:

        offsets (5, 5, 7), 8 rows  ->  groups 0 0 2 3, first rows 0 4 5 7, rows 4 1 2 1

    The kernel of the same name does the same in one launch.
    """
    n_groups = len(offsets)
    ends = F.pad(offsets, (0, 1), value=n_rows).clamp(0, n_rows)  # (E + 1,)
    starts = F.pad(ends[:-1], (1, 0))
    counts = (ends - starts).clamp(min=0)
    tile_ends = ((counts + block - 1) // block).cumsum(0)
    tile = torch.arange(most_tiles(n_rows, n_groups + 1, block), device=offsets.device)
    group = torch.searchsorted(tile_ends, tile, right=True)
    is_used = group <= n_groups
    safe = group.clamp(max=n_groups)
    row = (tile - F.pad(tile_ends[:-1], (1, 0))[safe]) * block
    count = (counts[safe] - row).clamp(0, block)
    plan = (group.where(is_used, -1), (starts[safe] + row).where(is_used, 0), count.where(is_used, 0))
    return torch.stack(plan).int()


@dataclass(frozen=True)
class Tile:
    """The shape of a tile, and how it is computed.

    Args:
        rows: of the result; likewise `columns`.
        depth: how much of the summed dimension is read at a time.
        warps: of 32 threads, in a program.
        stages: for how many depths there is room, of which one is multiplied while the others are on their way.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of all kernels, for one class of shapes on one kind of GPU.

    Those of the first three have the same number of rows, so that they share a plan. `gate_up` computes its columns
    twice. `tma` says whether the product and `gate_up` take descriptors and a grid that stays, `flatten` whether there
    the next tile is fetched while the last one is stored, `band` how many tiles of rows go through the columns
    together.
    """

    product: Tile
    gate_up: Tile
    down_backward: Tile
    weight_gradient: Tile
    tma: bool = False
    flatten: bool = True
    band: int = 8

    @property
    def rows(self) -> int:
        """Rows of a tile in the plan."""
        return self.product.rows


# Chosen by what the compiler says of registers, spills and shared memory. No time has been measured on a GPU as yet.
# "few" is up to 64 rows a group in the mean, "many" is more. What is called Ampere here fits every chip from it on.
_TILES = {
    "ampere few": Tiles(
        product=Tile(64, 128, 32, warps=4, stages=4),
        gate_up=Tile(64, 64, 64, warps=4, stages=3),
        down_backward=Tile(64, 128, 64, warps=4, stages=3),
        weight_gradient=Tile(128, 128, 32, warps=8, stages=4),
    ),
    "ampere many": Tiles(
        product=Tile(128, 128, 64, warps=8, stages=3),
        gate_up=Tile(128, 64, 64, warps=8, stages=3),
        down_backward=Tile(128, 128, 64, warps=8, stages=3),
        weight_gradient=Tile(128, 128, 32, warps=8, stages=4),
    ),
    "hopper few": Tiles(
        product=Tile(64, 256, 64, warps=4, stages=4),
        gate_up=Tile(64, 128, 64, warps=8, stages=4),
        down_backward=Tile(64, 128, 64, warps=8, stages=4),
        weight_gradient=Tile(128, 128, 32, warps=4, stages=2),
        tma=True,
    ),
    "hopper many": Tiles(
        product=Tile(128, 256, 64, warps=8, stages=4),
        gate_up=Tile(128, 128, 64, warps=8, stages=4),
        down_backward=Tile(128, 128, 64, warps=8, stages=4),
        weight_gradient=Tile(128, 256, 64, warps=8, stages=4),
        tma=True,
    ),
    "small": Tiles(*4 * [Tile(64, 64, 32, warps=8, stages=3)]),
    "interpreter": Tiles(*4 * [Tile(16, 16, 16, warps=1, stages=1)]),  # so small that a test's tensors have several
}


def choose_tiles(capability: int, element_size: int, n_rows: int, n_groups: int, is_even: bool = True) -> Tiles:
    """The tiles for a GPU (90 is compute capability 9.0; 0 the interpreter) and a class of shapes: a pure function.

    Args:
        is_even: whether the lengths of all rows are multiples of 16, and rows begin at multiples of 16 bytes. Otherwise
            every element has an address and a mask of its own, and large tiles do not fit into registers.
    """
    if capability == 0:
        return _TILES["interpreter"]
    if element_size == 4 or not is_even:
        return _TILES["small"]
    machine = "hopper" if capability >= 90 and capability < 120 else "ampere"
    return _TILES[f"{machine} {'few' if n_rows <= 64 * n_groups else 'many'}"]
