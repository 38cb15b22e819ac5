"""Starts ranks as processes on this machine, and sees to it that none is left: for tests, measurements and play.

A cluster's own launcher does this job elsewhere; see `demo` for torchrun.
"""

import contextlib
import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from moe_lab.parallel.process import TIMEOUT, Store, joined
from moe_lab.parallel.ranks import RankError

LOOPBACK = {"linux": "lo", "darwin": "lo0"}
SECONDS_TO_FIND_OUT = 4.0  # who is the cause: `Pulse.who` takes up to two, on a busy machine longer


@dataclass(frozen=True)
class Outcome:
    """How a rank ended.

    Args:
        value: what its function returned.
        error: the name of what it raised and its message; None if nothing.
        trace: the traceback.
        exit_code: of the process: negative where a signal ended it.
        seconds: from when all had joined until its end.
    """

    value: Any = None
    error: str | None = None
    trace: str = ""
    exit_code: int | None = None
    seconds: float = 0.0


def launch(function: Callable[..., Any], size: int, *args: object, timeout: float = TIMEOUT) -> list:
    """What `function(ranks, *args)` returns on each of `size` ranks, which are processes with one thread each.

    Args:
        function: importable by its name, for the processes have nothing of this one.
        timeout: seconds that a rank waits for another in a call.

    Raises:
        RankError: a rank failed; what it raised, with its traceback.
    """
    outcomes = outcomes_of(function, size, *args, timeout=timeout)
    failed = [r for r, outcome in enumerate(outcomes) if outcome.error or outcome.exit_code]
    if failed:
        first = next((r for r in failed if not (outcomes[r].error or "").startswith("RankError")), failed[0])
        outcome = outcomes[first]
        what = outcome.error or f"its process ended with status {outcome.exit_code}"
        raise RankError(f"Rank {first} of {size} failed: {what}\n{outcome.trace}", first)
    return [outcome.value for outcome in outcomes]


def outcomes_of(
    function: Callable[..., Any],
    size: int,
    *args: object,
    timeout: float = TIMEOUT,
) -> list[Outcome]:
    """As `launch`, but tells how each rank ended instead of raising.

    When one has failed, the others have `timeout` seconds, and a few to find out why, before they are killed.
    """
    if size < 1:
        raise ValueError(f"size={size}: expected 1 or more.")
    context = _context()
    store = Store()
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            call = (function, rank, size, store.address, timeout, args, theirs)
            process = context.Process(target=_rank, args=call, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(mine)
        return _collect(processes, pipes, timeout + SECONDS_TO_FIND_OUT)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _context() -> multiprocessing.context.BaseContext:
    """On Linux processes that are forked from one which has imported torch already; elsewhere each imports it."""
    if sys.platform != "linux":  # macOS' libraries do not survive a fork, Windows has none
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_lab.parallel"])
    return context


def _collect(processes: Sequence[BaseProcess], pipes: Sequence[Connection], patience: float) -> list[Outcome]:
    told: dict[int, dict] = {}
    waiting = dict(enumerate(pipes))
    until = None  # no rank has failed yet
    while waiting:
        ready = wait(list(waiting.values()), None if until is None else max(0.0, until - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            with contextlib.suppress(EOFError, OSError):  # one that was killed closes its pipe and says nothing
                told[rank] = pickle.loads(waiting[rank].recv_bytes())
            if until is None and "value" not in told.get(rank, {}):
                until = time.monotonic() + patience
            del waiting[rank]
    outcomes = []
    for rank, process in enumerate(processes):
        if rank in waiting:
            process.kill()
        process.join()
        outcomes.append(Outcome(**told.get(rank, {}), exit_code=process.exitcode))
    return outcomes


def _rank(
    function: Callable, rank: int, size: int, address: str, timeout: float, args: tuple, pipe: Connection
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.platform in LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]  # nobody else can reach these ranks
    _end_with_parent()
    told: dict[str, Any] = {}
    begin = time.monotonic()
    try:
        with joined(rank, size, address, backend="gloo", timeout=timeout) as ranks:
            begin = time.monotonic()
            told["value"] = function(ranks, *args)
        pickle.dumps(told)  # or it cannot be sent: an error of this rank's
    except BaseException as error:
        told = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    told["seconds"] = time.monotonic() - begin
    with contextlib.suppress(OSError):
        pipe.send_bytes(pickle.dumps(told))
    pipe.close()
    sys.stdout.flush()
    os._exit(1 if "error" in told else 0)  # gloo's threads may hold on to peers that are gone


def _end_with_parent() -> None:
    """A rank does not outlive the process that started it, however that one ended."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
