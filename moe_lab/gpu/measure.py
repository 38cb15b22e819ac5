"""Timing on a GPU: device events, candidates in turns, and what a first call and its compilation cost.

With `device="cpu"` everything runs once and no time is told: that is how the benchmark is tried without a GPU.
"""

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lab.ops.grouped_mm import launches
from moe_lab.paths import course_root

WARM_UP, FEWEST, MOST = 2, 7, 20  # rounds
SECONDS = 0.8  # that one comparison should take, with its rounds between these
# Clock cycles, about a millisecond: the GPU waits before a timed call, so that the CPU has sent all of it by then,
# unless it takes longer, or waits for the GPU itself.
HEAD_START = 2_000_000
# Candidates' results may differ by this much, as ‖a − b‖ / ‖b‖: bf16 rounds to 0.4 %, here several times in a row.
TOLERANCE = 0.05

# What a candidate does with its i-th set of inputs; its results, for comparison
Run = Callable[[int], tuple[Tensor, ...]]


def wait(device: str) -> None:
    """Until the GPU has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def compilation() -> Iterator[dict[str, float]]:
    """What Triton compiles inside: `compile_s`, and `n_compiled` kernels that were not in its cache on disk."""
    told = {"compile_s": 0.0, "n_compiled": 0}

    def listen(**event: Any) -> None:
        told["compile_s"] += getattr(event.get("times"), "total", 0) / 1e6
        told["n_compiled"] += not event.get("cache_hit", False)

    try:
        from triton import knobs
    except ImportError:  # no Triton here, so nothing that it could compile
        yield told
        return
    before = knobs.compilation.listener
    knobs.compilation.listener = listen
    try:
        yield told
    finally:
        knobs.compilation.listener = before


def first_call(run: Run, device: str) -> tuple[tuple[Tensor, ...], dict[str, float]]:
    """The results of the first set of inputs; seconds of the call, and of them those that Triton compiled."""
    wait(device)
    with compilation() as told:
        start = time.perf_counter()
        results = run(0)
        wait(device)
        told["first_call_s"] = time.perf_counter() - start
    return results, told


def difference(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest ‖a − b‖ / ‖b‖ of any two that belong together; infinite where something is not finite."""
    worst = 0.0
    for ours, theirs in zip(results, expected, strict=True):
        size = torch.linalg.vector_norm(theirs, dtype=torch.float32)
        error = torch.linalg.vector_norm(ours.to(theirs.dtype) - theirs, dtype=torch.float32) / size.clamp(min=1e-30)
        worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


def compare(
    candidates: Mapping[str, Run | str], n_sets: int, flops: float, device: str, alike: tuple[str, ...] = ()
) -> dict[str, dict[str, Any]]:
    """Of each candidate its median time and quartiles, TFLOP/s, and its first call; or why it has none, "failed".

    Args:
        candidates: what to run; a text in its place says why there is nothing to run.
        n_sets: sets of inputs, which are taken in turns.
        flops: of one call, counted by formula.
        alike: those whose results are compared, in the order of trust: with the first of them that runs.
    """
    found: dict[str, dict[str, Any]] = {}
    expected = None
    for name in sorted(candidates, key=lambda name: alike.index(name) if name in alike else -1):
        run = candidates[name]
        if isinstance(run, str):
            found[name] = {"failed": run}
            continue
        try:
            results, told = first_call(run, device)
            found[name] = told if device == "cuda" else {}  # a CPU's times say nothing here
            if name in alike:
                expected = results if expected is None else expected
                found[name]["difference"] = difference(results, expected)
                if not found[name]["difference"] <= TOLERANCE:
                    found[name] = {"failed": f"its results are off by {found[name]['difference']:.3g}"}
            del results
        except Exception as error:
            require_living_gpu(device, error)
            found[name] = {"failed": why(error)}
    del expected
    release(device)
    runs = {name: candidates[name] for name in candidates if "failed" not in found[name]}
    if device == "cuda" and runs:
        for name, measured in _in_turns(runs, n_sets).items():
            found[name] |= measured | {"tflops": flops / measured["ms"] / 1e9}
    return {name: found[name] for name in candidates}


class LostGPU(Exception):
    """A kernel failed such that this process can use its GPU no longer."""


def require_living_gpu(device: str, error: Exception) -> None:
    """Raise `LostGPU` if after this error the GPU does nothing any more: an illegal address, say, ends everything."""
    try:
        wait(device)
        torch.ones(1, device=device).sum().item()
    except Exception as also:
        raise LostGPU(f"{why(error)}; from then on: {why(also)}") from error


def why(error: Exception) -> str:
    """An error in one line, as it is kept."""
    return f"{type(error).__name__}: {first_line(str(error))}"


def first_line(said: str) -> str:
    """Without the folders of this machine: it is kept in a file that others read."""
    line = (said.strip().splitlines() or [""])[0]
    for folder, name in ((sys.prefix, "<python>"), (str(course_root()), "."), (str(Path.home()), "~")):
        line = line.replace(folder, name)
    return line[:300]


def release(device: str) -> None:
    """Give memory back, so that the next candidate finds it in one piece."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _in_turns(runs: Mapping[str, Run], n_sets: int) -> dict[str, dict[str, float]]:
    """Milliseconds by device events: candidates take turns, so that whatever the GPU does meets them all alike."""
    start = time.perf_counter()
    _round(runs, 0)
    took = time.perf_counter() - start
    rounds = int(min(max(SECONDS / took, FEWEST), MOST))
    for turn in range(max(WARM_UP - 1, n_sets)):
        _round(runs, turn % n_sets)
    rows = [_round(runs, turn % n_sets) for turn in range(rounds)]
    found = {}
    for name in runs:
        low, median, high = statistics.quantiles((row[name][0] for row in rows), n=4, method="inclusive")
        n_late = sum(row[name][1] for row in rows)
        found[name] = {"ms": median, "ms_low": low, "ms_high": high, "rounds": rounds, "waited_for_the_cpu": n_late}
    return found


def _round(runs: Mapping[str, Run], which: int) -> dict[str, tuple[float, bool]]:
    """Of each candidate milliseconds, and whether the CPU's time is in them: the GPU began before all was sent."""
    events = {}
    for name, run in runs.items():
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        before.record()
        run(which)
        after.record()
        events[name] = before, after, before.query()
    torch.cuda.synchronize()
    return {name: (before.elapsed_time(after), is_late) for name, (before, after, is_late) in events.items()}


def launches_of(run: Callable[[], Any], rounds: int = 9) -> list[tuple[str, float]]:
    """Every launch of a kernel of `moe_lab.ops` in one call: its kernel, and its median milliseconds on the device."""
    marks: list[tuple[str, Any, Any]] = []

    @contextlib.contextmanager
    def timed(name: str, *_: Any) -> Iterator[None]:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        marks.append((name, before, after))

    rows = []
    with launches().observed(timed):
        for _ in range(WARM_UP + rounds):
            marks.clear()
            torch.cuda._sleep(HEAD_START)
            run()
            torch.cuda.synchronize()
            rows.append([(name, before.elapsed_time(after)) for name, before, after in marks])
    names = [name for name, _ in rows[-1]]
    return [(name, statistics.median(row[i][1] for row in rows[WARM_UP:])) for i, name in enumerate(names)]


def ceilings(device: str) -> dict[str, float | None]:
    """What this GPU reaches: a dense bf16 product of 8192 × 8192 × 8192 random numbers, and a copy of 4 GB."""
    size, n_bytes = (8192, 2**32) if device == "cuda" else (64, 2**16)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    product = compare({"product": lambda _: (a @ b,)}, 1, 2 * size**3, device)["product"]
    copy = compare({"copy": lambda _: (target.copy_(source),)}, 1, 0, device)["copy"]
    rate = 2 * n_bytes / copy["ms"] * 1e3 if "ms" in copy else None
    return {
        "operations_per_second": 1e12 * product["tflops"] if "tflops" in product else None,
        "bytes_per_second": rate,
        "product": product,
        "copy": copy,
    }
