"""Expert parallelism: the layer of experts over several ranks, what travels between them, and what that costs."""

from moe_lab.parallel.launch import launch
from moe_lab.parallel.layer import FORMS, ExpertParallelMoE, by_expert, exchange, overlap, run
from moe_lab.parallel.placement import (
    Placement,
    balance_placement,
    even_placement,
    greedy_placement,
    rank_loads,
)
from moe_lab.parallel.process import Store, join, joined, leave
from moe_lab.parallel.ranks import Event, RankError, Ranks
from moe_lab.parallel.simulate import simulate
from moe_lab.parallel.traffic import rows_per_node, rows_per_rank, rows_to_others
from moe_lab.parallel.training import ParallelTrainer, parallelize

__all__ = [
    "FORMS",
    "Event",
    "ExpertParallelMoE",
    "ParallelTrainer",
    "Placement",
    "RankError",
    "Ranks",
    "Store",
    "balance_placement",
    "by_expert",
    "even_placement",
    "exchange",
    "greedy_placement",
    "join",
    "joined",
    "launch",
    "leave",
    "overlap",
    "parallelize",
    "rank_loads",
    "rows_per_node",
    "rows_per_rank",
    "rows_to_others",
    "run",
    "simulate",
]
