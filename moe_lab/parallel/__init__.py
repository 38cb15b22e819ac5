"""Expert parallelism: the layer of experts over several ranks, what travels between them, and what that costs.

A name loads when it is first used, so that `moe_lab.parallel.cost` needs no torch. No submodule bears the name of a
function here: importing it would put it in the function's place.
"""

import importlib

_HOME = {
    "FORMS": "layer",
    "Event": "ranks",
    "ExpertParallelMoE": "layer",
    "ParallelTrainer": "training",
    "Placement": "placement",
    "RankError": "ranks",
    "Ranks": "ranks",
    "Store": "process",
    "balance_placement": "placement",
    "by_expert": "layer",
    "even_placement": "placement",
    "exchange": "layer",
    "greedy_placement": "placement",
    "join": "process",
    "joined": "process",
    "launch": "launching",
    "leave": "process",
    "overlap": "layer",
    "parallelize": "training",
    "rank_loads": "placement",
    "rows_per_node": "traffic",
    "rows_per_rank": "traffic",
    "rows_to_others": "traffic",
    "run": "layer",
    "simulate": "simulation",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
