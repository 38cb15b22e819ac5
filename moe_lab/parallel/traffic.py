"""What travels, in closed form: predicted from the routing alone, to be held against what was counted at the calls."""

import torch
from torch import Tensor

from moe_lab.parallel.placement import Placement


def rows_per_place(slots: Tensor, places: Tensor, n_places: int, once: bool = True) -> Tensor:
    """(n_places,) how many rows a rank's tokens send to each place, its own included; combine sends as many back.

    Args:
        slots: (T, K) where the tokens' choices go.
        places: (n_slots,) the rank, or the node, that each slot is on.
        once: a token goes once to a place, however many of its choices lie there; else a row for every choice.
    """
    visited = places[slots]  # (T, K)
    if not once:
        return visited.flatten().bincount(minlength=n_places)
    visits = torch.zeros(len(slots), n_places, dtype=torch.bool)
    return visits.scatter(1, visited, True).sum(0)


def rows_per_rank(topk_experts: Tensor, placement: Placement, once: bool = True) -> Tensor:
    """(ranks,) the rows to each rank: "per_rank" travels `once`, "per_assignment" does not."""
    return rows_per_place(placement.choose_slots(topk_experts), placement.slot_ranks, placement.n_ranks, once)


def rows_per_node(topk_experts: Tensor, placement: Placement, node_size: int, once: bool = True) -> Tensor:
    """(nodes,) the rows to each node, of `node_size` ranks: "across_then_within" travels `once`."""
    n_nodes = placement.n_ranks // node_size
    return rows_per_place(placement.choose_slots(topk_experts), placement.slot_ranks // node_size, n_nodes, once)


def rows_to_others(rows: Tensor, own: int) -> int:
    """Of rows per rank or per node, those that leave one's own."""
    return int(rows.sum() - rows[own])
