import pytest
import torch

from moe_lab import viz
from moe_lab.parallel.placement import Placement, even_placement
from moe_lab.viz.placing import parts_of_ranks

TEXTS = {"title": "a title", "alt": "what is seen"}
COUNTS = torch.tensor([60, 1, 30, 9])
REPLICATED = Placement(((0, 3), (2, 0, 1)), n_experts=4, n_redundant=1)


def test_parts_are_the_shares_of_replicas():
    assert parts_of_ranks(REPLICATED, COUNTS) == [[(0, 30), (3, 9)], [(2, 30), (0, 30), (1, 1)]]


def test_ranks_are_stacks_of_experts_with_the_mean_as_a_line(drawn):
    viz.draw_rank_loads({"even": even_placement(4, 2), "with a copy": REPLICATED}, COUNTS, **TEXTS)
    even, copied = drawn[0].axes
    filled = [(round(bar.get_x() + 0.4), bar.get_y(), bar.get_height()) for bar in even.patches]
    assert filled == [(0, 0, 60), (0, 60, 1), (1, 0, 30), (1, 30, 9)]
    assert even.lines[0].get_ydata()[0] == copied.lines[0].get_ydata()[0] == 50
    assert even.get_title(loc="left") == "even\nmost: 1.22 × mean"
    assert copied.get_title(loc="left") == "with a copy\nmost: 1.22 × mean"
    assert [text.get_text() for text in even.texts] == ["0", "+ 1", "2", "3"]
    hatched = [bar.get_height() for bar in copied.patches if bar.get_hatch()]
    assert hatched == [30, 30]  # both replicas of expert 0
    assert drawn[0].legends[0].get_texts()[0].get_text() == "one of several replicas of its expert"


def test_without_replicas_there_is_nothing_to_explain(drawn):
    viz.draw_rank_loads({"even": even_placement(4, 4)}, COUNTS, **TEXTS)
    assert not drawn[0].legends


def test_an_expert_without_rows_is_named_too(drawn):
    viz.draw_rank_loads({"even": even_placement(4, 2)}, torch.tensor([5, 5, 0, 0]), **TEXTS)
    assert "+ 2, 3" in [text.get_text() for text in drawn[0].axes[0].texts]


@pytest.mark.parametrize(
    ("placements", "counts", "message"),
    [
        ({}, COUNTS, "0 placements of 100 rows"),
        ({"even": even_placement(4, 2)}, torch.zeros(4), "1 placements of 0 rows"),
        ({"even": even_placement(6, 2)}, COUNTS, r"tokens_per_expert has shape \(4,\): expected \(…, 6\)"),
    ],
)
def test_loads_that_cannot_be_drawn_are_refused(placements, counts, message):
    with pytest.raises(ValueError, match=message):
        viz.draw_rank_loads(placements, counts, **TEXTS)


def test_traffic_has_senders_in_rows_and_leaves_out_what_stays(drawn):
    viz.draw_traffic([[1500, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]], **TEXTS)
    axes = drawn[0].axes[0]
    shades = axes.images[0].get_array()
    assert shades.mask.tolist() == torch.eye(4).bool().tolist()
    assert shades[0, 3] == 4  # from rank 0 to rank 3
    assert axes.images[0].get_clim() == (0, 15)  # the 1,500 that stay do not wash out the rest
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers[0, 0] == "1,500"
    assert numbers[3, 0] == "4"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("to rank", "from rank")
    assert drawn[0].axes[1].get_ylabel() == "rows sent"


def test_boundaries_of_nodes_are_drawn(drawn):
    viz.draw_traffic(torch.ones(6, 6), ranks_per_node=3, unit="kB", **TEXTS)
    axes = drawn[0].axes[0]
    thick = {line.get_ydata()[0] for line in axes.lines if line.get_linewidth() > 1 and line.get_xdata()[0] == 0}
    assert thick == {-0.5, 2.5, 5.5}
    assert [text.get_text() for text in axes.texts].count("node 1") == 2
    assert drawn[0].axes[1].get_ylabel() == "kB sent"


def test_many_ranks_have_shades_only(drawn):
    viz.draw_traffic(torch.ones(17, 17), **TEXTS)
    assert not drawn[0].axes[0].texts


def test_one_rank_and_no_traffic_can_be_drawn(drawn):
    viz.draw_traffic([[7]], **TEXTS)
    viz.draw_traffic(torch.zeros(2, 2), **TEXTS)
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["7"]


@pytest.mark.parametrize(
    ("matrix", "ranks_per_node", "message"),
    [
        ([[1, 2]], None, r"matrix has shape \(1, 2\): expected \(ranks, ranks\)"),
        ([], None, r"matrix has shape \(0,\)"),
        ([[1, 2], [3, 4]], 3, "2 ranks cannot be cut into nodes of ranks_per_node=3"),
        ([[1, 2], [3, 4]], 0, "ranks_per_node=0"),
    ],
)
def test_traffic_that_cannot_be_drawn_is_refused(matrix, ranks_per_node, message):
    with pytest.raises(ValueError, match=message):
        viz.draw_traffic(matrix, ranks_per_node=ranks_per_node, **TEXTS)
