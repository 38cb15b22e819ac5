"""Ranks that take turns in one thread: how an exercise for several ranks is checked without anything to wait for.

Rank 0 runs until it needs what another one gives; there it is stopped, and the next one runs. When all have given it,
each runs again from the start, is handed what it waited for, and comes to its next call; and so on to the end. It all
happens in the thread that asks, so that a time limit holds; and where real ranks would wait for ever, this one knows.
"""

import contextlib
import copy
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import torch
from torch import Tensor

from moe_lab.course.checking import Refused
from moe_lab.parallel.ranks import Ranks, _Shared

HANGS = "On a cluster this hangs: every rank has to make the same calls in the same order, also one that has no rows."


class _Waits(BaseException):
    """Stops a rank where it has to wait; a BaseException, so that it is not caught by mistake."""


class _Rehearsal:
    """What the ranks have given so far, and what each that is stopped waits for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.given: dict[tuple, dict[int, tuple[str, Any]]] = {}  # by call and rank: the collective, and what it got
        self.letters: dict[tuple, Tensor] = {}
        self.waits: dict[int, tuple[Callable[[], bool], str]] = {}
        self.ended: dict[int, Any] = {}

    def run(self, rank: int, function: Callable[..., Any], args: tuple) -> None:
        """One run of a rank from the start, to its end or until it has to wait."""
        self.waits.pop(rank, None)
        with contextlib.suppress(_Waits):
            result = function(RehearsedRanks(self, rank, range(self.size)), *copy.deepcopy(args))
            if rank in self.waits:
                raise Refused("An `except:` caught what stops a rank until the others come. Name the exception.")
            self.ended[rank] = result

    def need(self, rank: int, is_there: Callable[[], bool], what: str, is_new: bool = False) -> None:
        """Stop a rank unless what it needs is there; also at its part of a new call, so that rank 0 goes on first."""
        if is_new or not is_there():
            self.waits[rank] = is_there, what
            raise _Waits

    def next_ranks(self) -> list[int]:
        """Those that can go on, in order."""
        return [r for r in range(self.size) if r not in self.ended and (r not in self.waits or self.waits[r][0]())]

    def stuck(self) -> str:
        """Why nobody can go on."""
        waiting = "; ".join(f"rank {rank} waits in {what}" for rank, (_, what) in sorted(self.waits.items()))
        ended = sorted(self.ended)
        gone = f" {_named(ended)} returned without that call." if ended else ""
        return f"Nobody can go on: {waiting}.{gone} {HANGS}"


def rehearse(function: Callable[..., Any], size: int, *args: object) -> list:
    """What `function(ranks, *args)` returns on each of `size` ranks, as `simulate` does it, but in this very thread.

    Every run of a rank begins with copies of the arguments and the same random numbers; what it prints is shown once.

    Raises:
        Refused: the ranks wait for each other, or do not fit together.
        Exception: whatever a rank raised first.
    """
    rehearsal, random = _Rehearsal(size), torch.get_rng_state()
    printed = [_Onwards(sys.stdout) for _ in range(size)]
    try:
        while turns := rehearsal.next_ranks():
            for rank in turns:
                torch.set_rng_state(random)
                with contextlib.redirect_stdout(printed[rank].from_start()):
                    rehearsal.run(rank, function, args)
    finally:
        torch.set_rng_state(random)
    if len(rehearsal.ended) < size:
        raise Refused(rehearsal.stuck())
    return [rehearsal.ended[rank] for rank in range(size)]


class RehearsedRanks(Ranks):
    """A rank that is stopped where it would wait. See `rehearse`."""

    def __init__(
        self,
        rehearsal: _Rehearsal,
        rank: int,
        members: Sequence[int],
        shared: _Shared | None = None,
        name: tuple = (),
    ) -> None:
        super().__init__(rank, members, shared)
        self._rehearsal, self._name, self._n_calls, self._letters = rehearsal, name, 0, {}

    def _give(self, kind: str, payload: object) -> Callable[[], list]:
        """Lay down what this call gives; the function returned takes what all gave, or stops until they have."""
        given = self._rehearsal.given.setdefault((self._name, self.members, self._n_calls), {})
        self._n_calls += 1
        for rank, (other, _) in given.items():
            if other != kind:
                raise Refused(
                    f"Call number {self._n_calls} is {kind} on rank {self.world_rank} and {other} on rank "
                    f"{self.members[rank]}. {HANGS}"
                )
        is_new = self.rank not in given
        given[self.rank] = kind, payload

        def take() -> list:
            self._rehearsal.need(self.world_rank, lambda: len(given) == self.size, kind, is_new)
            return [given[rank][1] for rank in range(self.size)]

        return take

    def _take_alike(self, kind: str, tensor: Tensor) -> list[Tensor]:
        found = self._give(kind, tensor.clone())()
        for rank, other in enumerate(found):
            if other.shape != found[0].shape:
                shapes = f"{tuple(found[0].shape)} on rank {self.members[0]}, {tuple(other.shape)} on rank"
                raise Refused(f"{kind} gets tensors of different shapes: {shapes} {self.members[rank]}.")
        return found

    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Callable[[], Tensor]:
        take = self._give("all_to_all", [part.clone() for part in rows.split(send)])

        def finish() -> Tensor:
            parts = [sent[self.rank] for sent in take()]
            for source, (part, expected) in enumerate(zip(parts, receive, strict=True)):
                if len(part) != expected:
                    raise Refused(
                        f"Rank {self.world_rank} expects {_rows(expected)} from rank {self.members[source]}, which "
                        f"sends {len(part)}. On a cluster it would wait for ever, or take other rows for them."
                    )
            return torch.cat(parts)

        return finish

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        first, *others = self._take_alike("all_reduce", tensor)
        return sum(others, start=first.clone())

    def _all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._take_alike("all_gather", tensor))

    def _send(self, tensor: Tensor, to: int) -> None:
        self._rehearsal.letters[self._letter(self.rank, to)] = tensor.clone()

    def _receive(self, empty: Tensor, source: int) -> Tensor:
        key, letters = self._letter(source, self.rank), self._rehearsal.letters
        what = f"receive from rank {self.members[source]}"
        self._rehearsal.need(self.world_rank, lambda: key in letters, what)
        return empty.copy_(letters[key])

    def _letter(self, source: int, to: int) -> tuple:
        n = self._letters[source, to] = self._letters.get((source, to), 0) + 1
        return self._name, self.members, source, to, n

    def _subgroup(self, groups: list[list[int]], mine: int) -> "RehearsedRanks":
        members = [self.members[rank] for rank in groups[mine]]
        self._n_calls += 1
        name = (self._name, self._n_calls)
        return RehearsedRanks(self._rehearsal, groups[mine].index(self.rank), members, self._shared, name)

    def _pause(self, seconds: float) -> None:
        """A rehearsal has no wire that could be slow."""


class _Onwards(io.TextIOBase):
    """Passes on what is printed; of a run that is repeated only what goes further than the last one did."""

    encoding = "utf-8"

    def __init__(self, outside: TextIO) -> None:
        self._outside, self._shown, self._length = outside, 0, 0

    def from_start(self) -> "_Onwards":
        """The same, at the beginning of the next run."""
        self._length = 0
        return self

    def write(self, text: str) -> int:
        new = text[max(0, self._shown - self._length) :]
        self._length += len(text)
        if new:
            self._shown = self._length
            self._outside.write(new)
        return len(text)


def _rows(n: int) -> str:
    return f"{n} {'row' if n == 1 else 'rows'}"


def _named(ranks: Sequence[int]) -> str:
    texts = [str(rank) for rank in ranks]
    return f"Rank {texts[0]} has" if len(texts) == 1 else f"Ranks {', '.join(texts[:-1])} and {texts[-1]} have"
