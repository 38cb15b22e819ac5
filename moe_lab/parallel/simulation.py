"""Ranks in one process: the same program, the same calls, no second process.

Every rank is a thread, but only one runs at a time, and hands over only where it has to wait for another. So a
simulation gives the same bits every time, random numbers included, and sees at once when all wait for each other.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lab.parallel.ranks import RankError, Ranks, _Shared


class Stage:
    """Where simulated ranks take turns and leave things for each other.

    Args:
        on_turn: called with a rank whenever its turn begins, in its thread, and with None when it ends.
    """

    def __init__(self, size: int, on_turn: Callable[[int | None], None] = lambda rank: None) -> None:
        self.size, self.on_turn = size, on_turn
        self.turn = 0
        self.waits: dict[int, tuple[Callable[[], bool], str]] = {}  # rank: until when, and for what
        self.ended: set[int] = set()
        self.over: RankError | None = None
        self.changed = threading.Condition()
        self.mail: dict[tuple, Any] = {}
        self.random = [torch.get_rng_state()] * size

    def begin(self, rank: int) -> None:
        """In a rank's thread: wait for the first turn."""
        with self.changed:
            self._await_turn(rank)

    def end(self, rank: int) -> None:
        """In a rank's thread: the last turn is over."""
        with self.changed:
            self.ended.add(rank)
            self._pass_on(rank)

    def wait_until(self, rank: int, is_ready: Callable[[], bool], why: str) -> None:
        """Let others run until something is there."""
        with self.changed:
            if is_ready():
                return
            self.waits[rank] = (is_ready, why)
            self._pass_on(rank)
            self._await_turn(rank)

    def abandon(self, error: RankError) -> None:
        """Wake everybody who waits, to be told that it is over."""
        with self.changed:
            self.over = self.over or error
            self.changed.notify_all()

    def _await_turn(self, rank: int) -> None:
        self.changed.wait_for(lambda: self.over is not None or self.turn == rank)
        self.waits.pop(rank, None)
        if self.over is not None:
            raise RankError(str(self.over), self.over.rank, self.over.stage)
        torch.set_rng_state(self.random[rank])
        self.on_turn(rank)

    def _pass_on(self, rank: int) -> None:
        self.random[rank] = torch.get_rng_state()
        self.on_turn(None)
        for other in ((rank + i) % self.size for i in range(1, self.size + 1)):
            if other not in self.ended and (other not in self.waits or self.waits[other][0]()):
                self.turn = other
                self.changed.notify_all()
                return
        if self.waits:
            first = min(self.ended, default=None)
            gone = "" if first is None else f" Rank {first} has ended without it."
            waits = "; ".join(f"rank {r} waits in {why}" for r, (_, why) in sorted(self.waits.items()))
            error = RankError(f"Nobody can go on: {waits}.{gone} Every rank has to make the same calls.", first)
            self.over = self.over or error
            self.changed.notify_all()


class SimulatedRanks(Ranks):
    """A rank that is a thread. See `simulate`."""

    def __init__(
        self, place: Stage, rank: int, members: Sequence[int], shared: _Shared | None = None, name: tuple = ()
    ) -> None:
        super().__init__(rank, members, shared)
        self._place, self._name, self._n_calls, self._letters = place, (name, self.members), 0, {}

    def _post(self, kind: str, payload: object) -> tuple:
        """Lay down what this call gives; returns the call's key."""
        key = (self._name, self._n_calls, kind)
        self._n_calls += 1
        self._place.mail[(*key, self.rank)] = payload
        return key

    def _collect(self, key: tuple) -> list:
        """What everybody gave in a call, when all have made it."""
        mail, name = self._place.mail, f"{key[2]} ({self._shared.stages[-1]})" if self._shared.stages else key[2]
        keys = [(*key, rank) for rank in range(self.size)]
        self._place.wait_until(self.world_rank, lambda: all(k in mail for k in keys), name)
        found = [mail[k] for k in keys]
        mail[(*key, "read")] = mail.get((*key, "read"), 0) + 1
        if mail[(*key, "read")] == self.size:
            for k in (*keys, (*key, "read")):
                del mail[k]
        return found

    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Callable[[], Tensor]:
        key = self._post("all_to_all", [part.clone() for part in rows.split(send)])

        def finish() -> Tensor:
            parts = [given[self.rank] for given in self._collect(key)]
            if (came := [len(part) for part in parts]) != receive:
                raise ValueError(f"receive={receive}, but {came} rows came: expected what each rank sends to this one.")
            if len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
                kinds = ", ".join(f"{part.dtype} {tuple(part.shape[1:])}" for part in parts)
                raise ValueError(f"The ranks sent rows of different kinds: {kinds}. Expected one dtype and width.")
            return torch.cat(parts)

        return finish

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        given = self._collect(self._post("all_reduce", tensor.clone()))
        total = given[0].clone()
        for other in given[1:]:
            total += other
        return total

    def _all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._collect(self._post("all_gather", tensor.clone())))

    def _send(self, tensor: Tensor, to: int) -> None:
        self._place.mail[self._letter(self.rank, to)] = tensor.clone()

    def _receive(self, empty: Tensor, source: int) -> Tensor:
        key, mail = self._letter(source, self.rank), self._place.mail
        self._place.wait_until(self.world_rank, lambda: key in mail, f"receive from rank {self.members[source]}")
        return empty.copy_(mail.pop(key))

    def _letter(self, source: int, to: int) -> tuple:
        n = self._letters[source, to] = self._letters.get((source, to), 0) + 1
        return (self._name, "letter", source, to, n)

    def _subgroup(self, groups: list[list[int]], mine: int) -> "SimulatedRanks":
        group = groups[mine]
        members = [self.members[rank] for rank in group]
        self._n_calls += 1  # a group's name is when it was made: of the same members there may be several
        name = (self._name, self._n_calls)
        return SimulatedRanks(self._place, group.index(self.rank), members, self._shared, name)


def simulate(function: Callable[..., Any], size: int, *args: object) -> list:
    """What `function(ranks, *args)` returns on each of `size` ranks that are simulated in this process.

    The ranks begin with the random numbers of the caller, each for itself, as processes with one seed would.

    Raises:
        ValueError: a size below 1.
        RankError: all ranks wait for each other, or one ended that others wait for.
        Exception: whatever a rank raised first.
    """
    if size < 1:
        raise ValueError(f"size={size}: expected 1 or more.")
    place = Stage(size)
    results: list = [None] * size
    failures: list[BaseException] = []
    kept, ended = torch.get_rng_state(), threading.Semaphore(0)

    def run(rank: int) -> None:
        try:
            place.begin(rank)
            results[rank] = function(SimulatedRanks(place, rank, range(size)), *args)
        except BaseException as error:
            failures.append(error)
            place.abandon(RankError(f"Rank {rank} failed: {type(error).__name__}: {error}", rank))
        finally:
            place.end(rank)
            ended.release()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            # not join(): interrupted, that takes a thread that still runs for one that has ended
            while not ended.acquire(timeout=0.1):  # looks up now and then, or Windows would not hear Ctrl-C
                pass
    finally:
        place.abandon(RankError("The simulation was stopped."))
        torch.set_rng_state(kept)
    if failures:
        raise failures[0]
    return results
