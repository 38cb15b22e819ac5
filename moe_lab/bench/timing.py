"""Timing side by side: candidates take turns, and what is told are medians with their quartiles."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over the rounds, and the quartiles on both sides of it."""

    median: float
    low: float
    high: float


def compare(candidates: Mapping[str, Callable[[], None]], rounds: int = 15) -> dict[str, Timing]:
    """Times the candidates in turns, so that whatever else the machine does meets them all alike.

    Raises:
        ValueError: fewer than two rounds.
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds}: expected 2 or more, for a spread.")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if turn >= WARM_UP_ROUNDS:
                seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, measured in seconds.items():
        low, median, high = statistics.quantiles(measured, n=4, method="inclusive")
        timings[name] = Timing(median, low, high)
    return timings


def copy_rate(n_bytes: int = 2**28, rounds: int = 5) -> float:
    """Bytes per second that this machine reads and writes when it copies a large tensor."""
    source = torch.zeros(n_bytes // 4)
    target = torch.empty_like(source)
    return 2 * n_bytes / compare({"copy": lambda: target.copy_(source)}, rounds)["copy"].median
