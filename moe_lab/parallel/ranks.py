"""What a rank is: one of several workers that run the same program on their own part, and talk in collectives.

`Ranks` is the contract, kept by processes (`process`), by a simulator in one process (`simulate`), and for exercises by
a rehearsal in the course. What goes through an all-to-all is counted here, at the call, for those who `watch`.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

NO_STAGE = "no stage"


class RankError(RuntimeError):
    """A rank cannot go on because of another one, or because all of them wait.

    Args:
        rank: the one that is the cause, where that is known.
        stage: what this rank was doing.
    """

    def __init__(self, message: str, rank: int | None = None, stage: str = "") -> None:
        super().__init__(message)
        self.rank, self.stage = rank, stage


@dataclass(frozen=True)
class Event:
    """Something that a rank did: computed for a while, or took part in a collective.

    Args:
        kind: "compute", or the collective's name.
        stage: the stage in which it was begun, such as "dispatch".
        what: what the tensor held, such as "rows" or "counts".
        rows: to every rank of the group, how many rows were sent, the rank itself included.
        bytes_per_row: bytes of one of them.
        targets: the ranks of the group, as the whole world numbers them.
        begin, end: seconds on this rank's clock; a collective ends when this rank takes what has come.
    """

    kind: str
    stage: str
    what: str = ""
    rows: tuple[int, ...] = ()
    bytes_per_row: int = 0
    targets: tuple[int, ...] = ()
    rank: int = 0
    begin: float = 0.0
    end: float = 0.0

    @property
    def rows_to_others(self) -> int:
        """Rows that left this rank."""
        return sum(n for target, n in zip(self.targets, self.rows, strict=True) if target != self.rank)

    @property
    def bytes_to_others(self) -> int:
        """Bytes that left this rank."""
        return self.rows_to_others * self.bytes_per_row


@dataclass(eq=False)
class Pending:
    """An all-to-all under way. `wait` returns what arrived, sorted by the rank that sent it."""

    ranks: "Ranks"
    send: list[int]
    receive: list[int]
    stage: str
    what: str
    _finish: Callable[[], Tensor] | None
    _note: Callable[[], None]
    _arrived: Tensor | None = None

    def wait(self) -> Tensor:
        """(sum of `receive`, …), when it is here.

        Raises:
            RankError: another rank is gone, or does not come.
        """
        if self._arrived is None:
            with self.ranks.calling("all_to_all", self.stage):
                self._arrived = self._finish()
            self._finish = None  # and with it what was sent
            self._note()
        return self._arrived


@dataclass(eq=False)
class _Shared:
    """What a rank's groups have in common: who is watching, what is being done, how slow the wire is."""

    watchers: list[list[Event]] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    calls: int = 0
    seconds_per_exchange: float = 0.0


class Ranks(ABC):
    """A group of ranks, seen from one of them. Every rank has to make the same calls in the same order.

    Args:
        rank: this one's number in the group, from 0.
        members: the group's ranks as the whole world numbers them.
    """

    def __init__(self, rank: int, members: Sequence[int], shared: _Shared | None = None) -> None:
        self.rank, self.members = rank, tuple(members)
        self._shared = _Shared() if shared is None else shared
        self._splits: dict[int, tuple[Ranks, Ranks]] = {}

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.members)

    @property
    def world_rank(self) -> int:
        """This rank's number in the whole world."""
        return self.members[self.rank]

    # --- collectives: each rank gives something, and each gets something ------------------------------------------

    def all_to_all(
        self, rows: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None, what: str = "rows"
    ) -> Tensor:
        """To every rank its own rows: `send[r]` of them go to rank r, and `receive[r]` come from it.

        Args:
            rows: (sum of `send`, …), contiguous, sorted by the rank that they are for.
            send, receive: by default as many rows for each.

        Returns:
            (sum of `receive`, …), sorted by the rank that they come from.

        Raises:
            ValueError: counts that do not fit the rows or the number of ranks.
            RankError: another rank is gone, or does not come.
        """
        return self.start_all_to_all(rows, send, receive, what).wait()

    def start_all_to_all(
        self, rows: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None, what: str = "rows"
    ) -> Pending:
        """`all_to_all` without waiting: compute something else, then `wait()` for what was sent here."""
        _require_tensor("all_to_all", rows)
        send, receive = self._counts(rows, send), self._counts(rows, receive, comes=True)
        if not rows.is_contiguous():
            raise ValueError(f"rows {tuple(rows.shape)} with strides {rows.stride()}: expected them contiguous.")
        begin = time.perf_counter()
        with self.calling("all_to_all") as stage:
            finish = self._all_to_all(rows.detach(), send, receive)
        bytes_per_row = rows[:1].numel() * rows.element_size() if len(rows) else 0

        def arrived() -> Tensor:
            got = finish()
            late = begin + self._shared.seconds_per_exchange - time.perf_counter()
            if late > 0:
                self._pause(late)
            return got

        def note() -> None:
            self._note("all_to_all", stage, what, tuple(send), bytes_per_row, begin)

        return Pending(self, send, receive, stage, what, arrived, note)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, on every rank. All give the same shape."""
        _require_tensor("all_reduce", tensor)
        begin = time.perf_counter()
        with self.calling("all_reduce") as stage:
            total = self._all_reduce(tensor.detach().contiguous())
        self._note("all_reduce", stage, "", (), 0, begin)
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, stacked, on every rank: (size, …). All give the same shape."""
        _require_tensor("all_gather", tensor)
        begin = time.perf_counter()
        with self.calling("all_gather") as stage:
            gathered = self._all_gather(tensor.detach().contiguous())
        self._note("all_gather", stage, "", (), 0, begin)
        return gathered

    def send(self, tensor: Tensor, to: int) -> None:
        """Point to point: give a tensor to one rank, which has to `receive` it."""
        _require_tensor("send", tensor)
        self._require_other(to)
        with self.calling("send"):
            self._send(tensor.detach().contiguous(), to)

    def receive(self, like: Tensor, source: int) -> Tensor:
        """Point to point: the tensor that one rank sends, of the shape and dtype of `like`."""
        self._require_other(source)
        with self.calling("receive"):
            return self._receive(torch.empty_like(like), source)

    def split(self, group_size: int) -> tuple["Ranks", "Ranks"]:
        """Two smaller groups of this rank: its `group_size` neighbours, and those in its place among theirs.

        Of 4 ranks, groups of 2 give rank 3 the neighbours (2, 3), and (1, 3) across. Asked again, it gives the same.

        Raises:
            ValueError: a size that does not divide the number of ranks.
        """
        self.agree("the groups", group_size=group_size)
        if group_size < 1 or self.size % group_size:
            raise ValueError(f"group_size={group_size}: expected a divisor of the {self.size} ranks.")
        if group_size in self._splits:
            return self._splits[group_size]
        group, place = divmod(self.rank, group_size)
        within = [[g * group_size + p for p in range(group_size)] for g in range(self.size // group_size)]
        across = [[ranks[p] for ranks in within] for p in range(group_size)]
        self._splits[group_size] = self._subgroup(within, group), self._subgroup(across, place)
        return self._splits[group_size]

    # --- what the collectives are built with ----------------------------------------------------------------------

    def agree(self, what: str, **facts: object) -> None:
        """Make sure that every rank holds the same facts.

        Raises:
            ValueError: on every rank, the facts that differ, with each rank's.
        """
        texts = self.gather_text(json.dumps({name: str(fact) for name, fact in facts.items()}))
        told = [json.loads(text) for text in texts]
        wrong = [name for name in told[0] if len({facts.get(name) for facts in told}) > 1]
        if wrong or len({tuple(facts) for facts in told}) > 1:
            lines = [
                f"\n  {name}: " + ", ".join(f"rank {self.members[r]} has {f.get(name)}" for r, f in enumerate(told))
                for name in wrong
            ]
            raise ValueError(f"The ranks do not agree about {what}: expected the same on all of them.{''.join(lines)}")

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, on every rank."""
        encoded = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        lengths = self.all_gather(torch.tensor(len(encoded), device=self.device)).tolist()
        padded = torch.nn.functional.pad(encoded, (0, max(lengths) - len(encoded)))
        rows = self.all_gather(padded).tolist()
        return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]

    @property
    def device(self) -> torch.device:
        """Where tensors have to lie to be sent."""
        return torch.device("cpu")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Names what is being done meanwhile: errors tell it, and watchers see it as an event of kind "compute"."""
        begin = time.perf_counter()
        self._shared.stages.append(name)
        try:
            yield
        finally:
            self._shared.stages.pop()
        self._note("compute", name, "", (), 0, begin)

    @property
    def stage_now(self) -> str:
        """The innermost stage."""
        return self._shared.stages[-1] if self._shared.stages else NO_STAGE

    @contextmanager
    def watch(self) -> Iterator[list[Event]]:
        """A list that fills with what this rank does meanwhile, in this group and in those split from it."""
        events: list[Event] = []
        self._shared.watchers.append(events)
        try:
            yield events
        finally:
            self._shared.watchers.remove(events)

    @contextmanager
    def slow_wire(self, seconds: float) -> Iterator[None]:
        """Meanwhile every all-to-all takes at least so long: a slow network, for a timeline on a fast machine."""
        before, self._shared.seconds_per_exchange = self._shared.seconds_per_exchange, seconds
        try:
            yield
        finally:
            self._shared.seconds_per_exchange = before

    @contextmanager
    def calling(self, kind: str, stage: str | None = None) -> Iterator[str]:
        """Around whatever waits for other ranks: an implementation turns its failures into a `RankError`."""
        self._shared.calls += 1
        yield self.stage_now if stage is None else stage

    def _note(self, kind: str, stage: str, what: str, rows: tuple[int, ...], bytes_per_row: int, begin: float) -> None:
        if self._shared.watchers:
            targets = self.members if rows else ()
            end = time.perf_counter()
            event = Event(kind, stage, what, rows, bytes_per_row, targets, self.world_rank, begin, end)
            for events in self._shared.watchers:
                events.append(event)

    def _counts(self, rows: Tensor, counts: Sequence[int] | None, comes: bool = False) -> list[int]:
        name = "receive" if comes else "send"
        if counts is None:
            if len(rows) % self.size:
                raise ValueError(f"{len(rows)} rows for {self.size} ranks: expected a multiple, or {name}=[…].")
            return [len(rows) // self.size] * self.size
        try:
            counts = [int(n) for n in counts]
        except (TypeError, ValueError):
            raise ValueError(f"{name}={counts}: expected a list of {self.size} numbers, one for every rank.") from None
        if len(counts) != self.size or min(counts) < 0:
            raise ValueError(f"{name}={counts}: expected {self.size} counts of 0 or more, one for every rank.")
        if not comes and sum(counts) != len(rows):
            raise ValueError(f"send={counts} adds up to {sum(counts)}: expected {len(rows)}, the number of rows.")
        return counts

    def _require_other(self, rank: int) -> None:
        if not 0 <= rank < self.size or rank == self.rank:
            raise ValueError(f"rank {rank}: expected another one of the {self.size} ranks than {self.rank}, this one.")

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    # --- what an implementation gives -----------------------------------------------------------------------------

    @abstractmethod
    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Callable[[], Tensor]: ...

    @abstractmethod
    def _all_reduce(self, tensor: Tensor) -> Tensor: ...

    @abstractmethod
    def _all_gather(self, tensor: Tensor) -> Tensor: ...

    @abstractmethod
    def _send(self, tensor: Tensor, to: int) -> None: ...

    @abstractmethod
    def _receive(self, empty: Tensor, source: int) -> Tensor: ...

    @abstractmethod
    def _subgroup(self, groups: list[list[int]], mine: int) -> "Ranks": ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank} of {self.size})"


def _require_tensor(call: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise ValueError(f"{call} was given {type(given).__name__}: expected a tensor, such as torch.tensor(3).")
