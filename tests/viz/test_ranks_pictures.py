"""The drawings of ranks show what ranks do: held against the simulator, the layer and a placement."""

import pytest
import torch
from matplotlib.patches import FancyArrowPatch

from moe_lab import viz
from moe_lab.parallel import Event, even_placement, simulate
from moe_lab.parallel.layer import by_expert
from moe_lab.viz import ranks as drawing

CHOICES = [torch.tensor([[0, 3], [3, 2]]), torch.empty(0, 2, dtype=torch.int64), torch.tensor([[5, 1]])]


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def arrows(axes) -> list[FancyArrowPatch]:
    return [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]


def test_collectives_give_what_ranks_get():
    def call(ranks):
        numbers = 10 * ranks.rank + torch.arange(4)
        if ranks.rank < 3:
            ranks.send(numbers[:1], ranks.rank + 1)
        passed = ranks.receive(numbers[:1], ranks.rank - 1).tolist() if ranks.rank else []
        reduced, gathered = ranks.all_reduce(numbers).tolist(), ranks.all_gather(numbers[0]).tolist()
        return reduced, gathered, ranks.all_to_all(numbers).tolist(), passed

    for rank, got in enumerate(simulate(call, 4)):
        drawn = [[number for number, _ in after[rank]] for _, after in drawing.collectives().values()]
        assert drawn == list(got)


def test_numbers_have_the_colour_of_the_rank_that_they_come_from():
    for before, after in drawing.collectives().values():
        for cells in (before, after):
            assert all(source in (None, number // 10) for numbers in cells for number, source in numbers)


def test_all_collectives_are_drawn(drawn):
    picture = viz.draw_collectives()
    assert len(drawn[0].axes) == 4
    assert {"0", "13", "33"} <= set(texts(drawn[0].axes[2]))
    assert {"60", "64", "68", "72"} <= set(texts(drawn[0].axes[0]))
    assert "all-reduce" in picture.alt
    assert "each 60, 64, 68, 72" in picture.alt


def test_the_exchange_has_an_arrow_for_every_row_in_the_colour_of_where_it_goes(drawn):
    placement = even_placement(6, 3)
    picture = viz.draw_exchange(CHOICES, placement)
    lines = arrows(drawn[0].axes[0])
    assert len(lines) == sum(chosen.numel() for chosen in CHOICES)
    assert sum(line.get_linestyle() in ("-", "solid") for line in lines) == 4  # rows that leave
    assert "4 rows leave their rank, 2 stay" in picture.alt
    assert texts(drawn[0].axes[0]).count("expert 4") == 1


def test_the_exchange_calls_tokens_by_their_numbers(drawn):
    numbers = [torch.tensor([[7.0], [8.0]]), torch.empty(0, 1), torch.tensor([[31.0]])]
    picture = viz.draw_exchange(CHOICES, even_placement(6, 3), numbers)
    assert {"token 7", "token 8", "token 31"} <= set(texts(drawn[0].axes[0]))
    assert "token 31 to experts 5 and 1" in picture.alt


@pytest.mark.parametrize("table", [[[1, 2], [0, 0], [2, 1]], [[0, 3]], [[1, 0, 2], [3, 1, 0]]])
def test_regrouping_leads_every_row_to_its_place(drawn, table):
    received = torch.tensor(table)
    viz.draw_regroup(received, range(received.shape[1]))
    axes = drawn[0].axes[0]
    ways = [arrow._path_original.vertices for arrow in arrows(axes)]
    came_to = {int(way[0][0] - 0.5): int(way[-1][0] - 0.5) for way in ways}
    order, _ = by_expert(received)
    assert [came_to[row] for row in order.tolist()] == list(range(len(order)))
    brackets = [text for text in texts(axes) if text.startswith("from rank")]
    assert brackets == [f"from rank {rank}" for rank, row in enumerate(table) if sum(row)]


EVENTS = [
    Event("compute", "route", begin=10.0, end=11.0),
    Event("all_to_all", "dispatch", "counts", (1, 1), 8, (0, 1), begin=11.0, end=13.0),
    Event("compute", "dispatch", begin=10.5, end=14.0),
    Event("all_to_all", "dispatch", "rows", (1, 1), 8, (0, 1), begin=13.5, end=16.0),
    Event("all_to_all", "dispatch", "ids", (1, 1), 8, (0, 1), begin=13.6, end=16.0),
    Event("compute", "experts", begin=16.0, end=18.0),
    Event("all_to_all", "combine", "rows", (1, 1), 8, (0, 1), begin=18.0, end=20.0),
]


def test_lanes_cut_a_stage_where_it_waits():
    computed, travelled = drawing.lanes(EVENTS)
    assert computed == [("route", 0, 1), ("dispatch", 0.5, 1), ("dispatch", 3, 4), ("experts", 6, 8)]
    assert travelled == [("counts", 1, 3), ("dispatch", 3.5, 6), ("combine", 8, 10)]


def test_a_timeline_is_in_shares_of_the_longest_run(drawn):
    short = [Event("compute", "experts", begin=5.0, end=10.0)]
    viz.draw_timeline({"long": [EVENTS, EVENTS], "short": [short, short]}, title="When", alt="Two panels.")
    assert drawing.seconds([EVENTS, short]) == 10
    long, brief = drawn[0].axes
    assert long.get_title(loc="left").endswith("100 % of the time")
    assert brief.get_title(loc="left").endswith("50 % of the time")
    ends = [bar.get_x() + bar.get_width() for bar in brief.patches]
    assert ends == [50, 50]
    assert [label.get_text() for label in long.get_yticklabels()] == [
        *("rank 0 computes", "rank 0 wire", "rank 1 computes", "rank 1 wire")
    ]


def test_bars_that_overlap_do_not_hide_each_other(drawn):
    late = Event("all_to_all", "dispatch", "rows", (1, 1), 8, (0, 1), begin=15.0, end=19.0)
    viz.draw_timeline({"both": [[*EVENTS, late]]}, title="When", alt="One panel.")
    wire = [bar for bar in drawn[0].axes[0].patches if bar.get_hatch()]
    for one in wire:
        for other in wire:
            apart = one.get_x() + one.get_width() <= other.get_x() + 1e-9 or one.get_y() != other.get_y()
            assert one is other or apart or other.get_x() + other.get_width() <= one.get_x() + 1e-9
