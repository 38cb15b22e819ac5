"""Expert parallelism measured: what the layer costs beyond the one in a single process, and where its time goes.

The ranks are processes of this machine with one thread each. With more ranks than cores they take turns, so a step over
four ranks says how the work divides, not how fast a cluster would be.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict

import torch

from moe_lab.bench.layers import Shape, layer_and_input
from moe_lab.bench.timing import compare
from moe_lab.parallel import FORMS, Event, ExpertParallelMoE, Ranks, launch

SHAPE = Shape(4096, 256, 512, 8, 2)
ALLOWED_OVERHEAD = 0.05
ALONE, AGAIN = "one process", "one process again"
ROUNDS = 20
RANKS = (1, 2, 4)
STAGES = ("route", "dispatch", "regroup", "experts", "combine")
ONE_HOP = ("per_assignment", "per_rank")


def overhead(rounds: int = ROUNDS) -> dict[str, dict]:
    """Seconds of a forward and backward of `SHAPE` in one process, and beside it as one rank, for every form.

    In pairs, each in a process of its own: with five layers in turns, which one follows which makes more of a
    difference than the forms do. One pair is the layer in one process against itself: what is no difference.
    """
    return {name: launch(_overhead, 1, name, rounds)[0] for name in (AGAIN, *FORMS)}


def _overhead(ranks: Ranks, name: str, rounds: int) -> dict[str, dict]:
    layer, x = layer_and_input(SHAPE)
    dy = torch.randn(x.shape)
    other = copy.deepcopy(layer) if name == AGAIN else ExpertParallelMoE(layer, ranks, form=name, node_size=1)

    def step(one: torch.nn.Module) -> None:
        one(x)[0].backward(dy)
        one.zero_grad()
        x.grad = None

    timings = compare({ALONE: lambda: step(layer), name: lambda: step(other)}, rounds)
    return {what: asdict(timing) for what, timing in timings.items()}


def divided(n_ranks: int, form: str, rounds: int = ROUNDS) -> dict:
    """`SHAPE`'s tokens divided over ranks: seconds of a step, the share of each stage of the forward pass, and bytes.

    Of each round the slowest rank counts; of the shares, rank 0's.
    """
    return launch(_divided, n_ranks, form, rounds)[0]


def _divided(ranks: Ranks, form: str, rounds: int) -> dict:
    layer, x = layer_and_input(SHAPE)
    mine = x.detach().tensor_split(ranks.size)[ranks.rank].contiguous().requires_grad_()
    over_ranks, dy = ExpertParallelMoE(layer, ranks, form=form), torch.randn(mine.shape)
    seconds: dict[str, float] = defaultdict(float)

    def step() -> None:
        ranks.all_reduce(torch.zeros(1))  # all begin together
        with ranks.watch() as events, ranks.stage("forward"):
            y, _ = over_ranks(mine)
        with ranks.stage("backward"):
            y.backward(dy)
            ranks.all_reduce(torch.zeros(1))  # the slowest ends the round
        for stage, spent in shares(events).items():
            seconds[stage] += spent
        step.events = events

    timing = compare({"step": step}, rounds)["step"]
    total = sum(seconds.values())
    sent = bytes_by_content(step.events)
    everywhere = ranks.all_reduce(torch.tensor([sent["rows"], sent["ids and weights"]])).tolist()
    return {
        "ranks": ranks.size,
        "form": form,
        "seconds": asdict(timing),
        "shares": {stage: spent / total for stage, spent in seconds.items()},
        "bytes_per_token": {"rows": everywhere[0] / len(x), "ids and weights": everywhere[1] / len(x)},
    }


def shares(events: list[Event]) -> dict[str, float]:
    """Seconds of every stage of a forward pass, and of what is left: waiting for rows that are under way.

    Route ends when all ranks agree, and dispatch begins with the counts: the wait for a slower rank is in both.
    """
    spent = dict.fromkeys((*STAGES, "rows under way"), 0.0)
    for event in events:
        if event.kind == "compute" and event.stage in STAGES:
            spent[event.stage] += event.end - event.begin
    begin, end = min(event.begin for event in events), max(event.end for event in events)
    spent["rows under way"] = end - begin - sum(spent.values())
    return spent


def bytes_by_content(events: list[Event]) -> dict[str, int]:
    """Bytes that left this rank: in rows, forth and back, and in what goes with them."""
    exchanges = [event for event in events if event.kind == "all_to_all"]
    rows = sum(event.bytes_to_others for event in exchanges if event.what == "rows")
    return {"rows": rows, "ids and weights": sum(event.bytes_to_others for event in exchanges) - rows}


def measure(rounds: int, quick: bool = False) -> dict:
    """All of it: one record for the overhead, and one for every number of ranks and form."""
    ranks = RANKS[:2] if quick else RANKS
    return {"overhead": overhead(rounds), "divided": [divided(n, form, rounds) for n in ranks for form in ONE_HOP]}


def table(results: Mapping) -> str:
    """The divided step as a Markdown table; times as multiples of one rank's in the same form."""
    names = (*STAGES, "rows under way")
    lines = [
        f"| form | ranks | time | {' | '.join(names)} | bytes a token: rows | ids and weights |",
        "|---" * (len(names) + 5) + "|",
    ]
    alone = {record["form"]: record["seconds"]["median"] for record in results["divided"] if record["ranks"] == 1}
    for record in sorted(results["divided"], key=lambda record: record["form"]):
        time = record["seconds"]["median"] / alone[record["form"]]
        parts = " | ".join(f"{record['shares'][name]:.0%}" for name in names)
        sent = record["bytes_per_token"]
        lines.append(
            f"| {record['form']} | {record['ranks']} | {time:.2f} | {parts} | {sent['rows']:.0f} | "
            f"{sent['ids and weights']:.0f} |"
        )
    return "\n".join(lines)


def verdicts(results: Mapping) -> list[str]:
    """What the layer costs as a single rank, in sentences."""
    extra = {name: pair[name]["median"] / pair[ALONE]["median"] - 1 for name, pair in results["overhead"].items()}
    said = [f"{SHAPE}, one rank, beyond the layer in one process: {name} {more:+.1%}." for name, more in extra.items()]
    met = extra["per_rank"] <= ALLOWED_OVERHEAD
    said.append(f"per_rank, the default, is to stay within {ALLOWED_OVERHEAD:.0%}: {'met' if met else 'MISSED'}.")
    return said
