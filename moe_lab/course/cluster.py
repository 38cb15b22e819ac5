"""Ranks for a notebook: after `start_cluster(4)`, a cell that begins with `%%px` runs on every one of them.

A rank is an engine of an ipyparallel cluster, a process of its own. Where processes cannot be started, ranks are
simulated in the notebook's process, with the same `%%px`. Either way a rank keeps its own names from cell to cell, with
`ranks` among them, and what all of them say comes back at once, in their order: the same cell always shows the same.

    [stdout:0] this is what rank 0 printed
    [out:0] the value of the cell's last line on rank 0
"""

import atexit
import ctypes
import io
import os
import random
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from IPython import get_ipython
from IPython.core import magic_arguments
from IPython.core.error import UsageError
from IPython.core.magic import no_var_expand

from moe_lab.course import rank_cells
from moe_lab.course.rank_cells import Failure, Parcel, Printed, Said
from moe_lab.course.warden import Warden
from moe_lab.parallel.ranks import RankError
from moe_lab.parallel.simulation import SimulatedRanks, Stage

SECONDS_TO_START = 60.0
SECONDS_TO_JOIN = 30.0
SECONDS_TO_WAIT = 10.0  # that a rank waits for another in a call
SECONDS_TO_STOP = 5.0  # that a rank has to stop when its cell is interrupted
CHOICE = "MOE_LAB_RANKS"

_KEYBOARD_INTERRUPT = ctypes.py_object(KeyboardInterrupt)
_running: "Cluster | None" = None


def start_cluster(n: int = 4, *, seconds: float = SECONDS_TO_START, timeout: float = SECONDS_TO_WAIT) -> "Cluster":
    """Start `n` ranks, say what they are, and let `%%px` run cells on them. One cluster runs at a time.

    With MOE_LAB_RANKS=simulated in the environment, or where processes cannot be started, they are simulated.

    Args:
        seconds: after so long, processes that are not ready are given up.
        timeout: seconds that a rank waits for another in a call before it gives up.

    Raises:
        ValueError: n below 1, or MOE_LAB_RANKS is something else than "processes" or "simulated".
    """
    global _running
    choice = os.environ.get(CHOICE, "processes")
    if n < 1 or choice not in ("processes", "simulated"):
        raise ValueError(f'n={n}, {CHOICE}={choice!r}: expected 1 or more, and "processes" or "simulated".')
    if _running:
        _running.stop()
    if shell := get_ipython():
        shell.register_magic_function(px, "line_cell", "px")  # before ipyparallel registers one like it
    cluster = None
    why = f"{CHOICE}=simulated is set"
    if choice == "processes":
        try:
            cluster = ProcessCluster(n, seconds, timeout)
        except Exception as error:  # whatever it is, the notebook has to go on
            why = f"processes could not be started: {getattr(error, 'strerror', None) or error}"  # without its path
    _running = cluster or SimulatedCluster(n, why)
    atexit.register(_running.stop)
    print(_running)
    return _running


@no_var_expand
@magic_arguments.magic_arguments()
@magic_arguments.argument("-t", "--targets", help="only these ranks: 0, or 1,3, or 0:2")
@magic_arguments.argument("--local", action="store_true", help="run the cell here as well, before")
@magic_arguments.argument("--may-fail", action="store_true", help="show what a rank raises, and go on")
def px(line: str, cell: str | None = None) -> None:
    """Run a cell on every rank: `%%px` above it. A single line: `%px line`."""
    if _running is None:
        raise UsageError("No cluster is running: start_cluster(4) starts one.")
    if cell is None:
        return _running.run(line)
    options = magic_arguments.parse_argstring(px, line)
    targets = _running.targets(options.targets)
    if options.local:
        get_ipython().run_cell(cell).raise_error()
    return _running.run(cell, targets, may_fail=options.may_fail)


class RanksFailed(RuntimeError):
    """One rank or more failed. Tells each one's own error.

    Args:
        failures: by rank.
        note: what became of the cluster, where it does not go on.
    """

    def __init__(self, failures: dict[int, Failure], note: str = "") -> None:
        self.failures, self.note = failures, note
        super().__init__("; ".join([f"rank {rank}: {one}" for rank, one in failures.items()] or [note]))

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: where it happened on the ranks, not here."""
        causes = {rank: failure for rank, failure in self.failures.items() if failure.is_cause} or self.failures
        alike: dict[Failure, list[int]] = {}
        for rank, failure in causes.items():
            alike.setdefault(failure, []).append(rank)
        parts = ["\n".join(filter(None, [f"{_named(ranks)}: {one}", one.trace])) for one, ranks in alike.items()]
        if others := [rank for rank in self.failures if rank not in causes]:
            parts.append(f"{_named(others)} could not go on because of that.")
        return "\n\n".join(filter(None, [*parts, self.note])).splitlines()


class Interrupted(KeyboardInterrupt):
    """The learner stopped a cell; tells how that went on the ranks."""

    def _render_traceback_(self) -> list[str]:
        return [f"Interrupted: {self}"]


def _named(ranks: Sequence[int]) -> str:
    *others, last = map(str, ranks)
    return f"Ranks {', '.join(others)} and {last}" if others else f"Rank {last}"


class Cluster(ABC):
    """Ranks that keep their names from cell to cell, until `stop`. See `start_cluster`.

    Args:
        n: how many.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self._n_cells = 0
        self._is_stopped = False
        self._interruption = ""  # how it went, where the learner stopped the ranks

    def run(self, source: str, targets: Sequence[int] | None = None, *, may_fail: bool = False) -> None:
        """Run code on every rank, or on some, and print what they say. This is what `%%px` does.

        Args:
            may_fail: print what a rank raises, in place of raising it here.

        Raises:
            RanksFailed: what a rank raised. The cluster goes on.
        """
        self._require_running()
        self._n_cells += 1
        ranks = list(range(self.n) if targets is None else targets)
        told = self._run(source, rank_cells.cell_name(self._n_cells), ranks)
        failures = {rank: said.failure for rank, said in told.items() if said.failure}
        for rank, said in told.items():
            _show(rank, said, may_fail)
        note = self._mend() if failures else ""
        self._raise_interruption(note)
        if failures and not may_fail:
            raise RanksFailed(failures, note)
        if note:
            print(note)

    def push(self, **values: object) -> None:
        """Give every rank a copy of the values, by name; functions of the notebook with what they mention.

        Raises:
            RanksFailed: a value cannot be sent.
        """
        self._require_running()
        try:
            parcel = rank_cells.pack(values)
        except ValueError as error:
            raise RanksFailed({}, str(error)) from None
        answers = self._give(parcel)
        self._raise_interruption()
        _raise_failures(answers)

    def pull(self, name: str) -> list:
        """Every rank's value of a name, or of an expression: one per rank, in order.

        Raises:
            RanksFailed: a rank has no such name, or its value cannot be sent.
        """
        self._require_running()
        answers = self._take(name)
        self._raise_interruption()
        _raise_failures(answers)
        try:
            return [rank_cells.unpack_value(buffers, vars(sys.modules["__main__"])) for buffers in answers.values()]
        except Exception as error:
            note = f"{name} came, but means nothing here: {type(error).__name__}: {error}"
            raise RanksFailed({}, note) from None

    def stop(self) -> None:
        """End the ranks. Does no harm a second time."""
        global _running
        if not self._is_stopped:
            self._is_stopped = True
            atexit.unregister(self.stop)
            self._stop()
        if _running is self:
            _running = None

    def targets(self, text: str | None) -> list[int]:
        """The ranks that `--targets` names."""
        chosen: set[int] = set()
        try:
            for part in (text or "all").replace("all", ":").split(","):
                bounds = [int(bound) if bound.strip() else None for bound in part.split(":")]
                chosen |= set(range(self.n)[slice(*bounds)]) if len(bounds) > 1 else {range(self.n)[bounds[0]]}
        except (ValueError, IndexError, TypeError):
            chosen = set()
        if not chosen:
            raise UsageError(f"--targets {text}: expected ranks of 0 to {self.n - 1}, as in 0 or 1,3 or 0:2.")
        return sorted(chosen)

    def _require_running(self) -> None:
        if self._is_stopped:
            raise RanksFailed({}, f"These ranks were stopped: start_cluster({self.n}) starts others.")
        self._interruption = ""

    def _raise_interruption(self, note: str = "") -> None:
        if self._interruption:
            raise Interrupted(f"{self._interruption} {note}".strip())

    def __repr__(self) -> str:
        ranks = "1 rank" if self.n == 1 else f"{self.n} ranks"
        return f"{ranks}, stopped" if self._is_stopped else f"{ranks}, {self._what}"

    @property
    @abstractmethod
    def _what(self) -> str:
        """What the ranks are."""

    @abstractmethod
    def _run(self, source: str, name: str, targets: list[int]) -> dict[int, Said]:
        """Run a cell."""

    @abstractmethod
    def _mend(self) -> str:
        """Make all ranks fit to talk again after a failure; returns a note where that cannot be."""

    @abstractmethod
    def _give(self, parcel: Parcel) -> dict[int, Failure | None]:
        """Put values among the ranks' names."""

    @abstractmethod
    def _take(self, expression: str) -> dict[int, list[bytes] | Failure]:
        """The ranks' values, packed."""

    @abstractmethod
    def _stop(self) -> None:
        """End the ranks."""


def _show(rank: int, said: Said, may_fail: bool) -> None:
    error = ""
    if said.failure and may_fail:
        other = "" if said.failure.blames is None else f" without rank {said.failure.blames}"
        error = str(said.failure) if said.failure.is_cause else f"could not go on{other}"
    for label, text in (("stdout", said.printed), ("out", said.value), ("error", error), ("stderr", said.warned)):
        if text := text.rstrip("\n"):
            between = "\n" if "\n" in text else " "
            print(f"[{label}:{rank}]{between}{text}", file=sys.stderr if label == "stderr" else sys.stdout)


def _raise_failures(answers: dict[int, Any]) -> None:
    if failures := {rank: answer for rank, answer in answers.items() if isinstance(answer, Failure)}:
        raise RanksFailed(failures)


# --- Ranks that are processes --------------------------------------------------------------------------------------


class ProcessCluster(Cluster):
    """Ranks that are engines of ipyparallel. See `start_cluster`.

    Raises:
        OSError: no process can be started.
        RuntimeError: a process ended too early, or ranks cannot reach each other.
        TimeoutError: they were not ready in time.
    """

    def __init__(self, n: int, seconds: float, timeout: float) -> None:
        super().__init__(n)
        self._timeout, self._client, self._trouble = timeout, None, ""
        until = time.monotonic() + seconds
        self._warden = Warden(n)
        try:
            import ipyparallel  # takes a moment, in which the warden starts the processes

            self._await(lambda: bool(self._warden.pids), until)
            self._client = ipyparallel.Client(
                str(self._warden.connection_file),
                ipython_dir=str(self._warden.folder / "ipython"),  # not the user's
                timeout=max(1.0, until - time.monotonic()),
            )
            self._await(lambda: len(self._client.ids) == n, until)
            if note := self._mend(max(1.0, until - time.monotonic())):
                raise RuntimeError(note)
            self._raise_interruption()
        except BaseException as error:
            self.stop()
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"they were not ready within {seconds:g} seconds") from None
            raise

    def _await(self, is_ready: Callable[[], bool], until: float) -> None:
        while not is_ready():
            if trouble := self._warden.trouble():
                raise RuntimeError(trouble)
            if time.monotonic() > until:
                raise TimeoutError
            time.sleep(0.02)

    @property
    def _what(self) -> str:
        return "a process of its own" if self.n == 1 else "each a process of its own"

    def _run(self, source: str, name: str, targets: list[int]) -> dict[int, Said]:
        answers = self._ask(targets, rank_cells.run_here, source, name)
        return {rank: Said(failure=one) if isinstance(one, Failure) else one for rank, one in answers.items()}

    def _mend(self, seconds: float = SECONDS_TO_JOIN) -> str:
        if not self._is_stopped:
            try:
                opened = self._ask([0], rank_cells.open_store_here, seconds=seconds)
                _raise_failures(opened)
                join = (rank_cells.join_here, self.n, opened[0], self._timeout)
                _raise_failures(self._ask(range(self.n), *join, seconds=seconds))
            except (RanksFailed, TimeoutError) as error:
                self._give_up(f"the ranks could not join: {error}")
        if self._is_stopped:
            what = self._trouble[:1].upper() + self._trouble[1:]
            return f"{what}. So all ranks were stopped: start_cluster({self.n}) starts others."
        return ""

    def _give(self, parcel: Parcel) -> dict[int, Failure | None]:
        return self._ask(range(self.n), rank_cells.unpack_here, parcel)

    def _take(self, expression: str) -> dict[int, list[bytes] | Failure]:
        return self._ask(range(self.n), rank_cells.take_here, expression)

    def _ask(
        self, targets: Sequence[int], function: Callable, *args: object, seconds: float | None = None
    ) -> dict[int, Any]:
        """What the function returns on these ranks, or how it failed."""
        calls = {rank: self._client[rank].apply_async(function, *args) for rank in targets}
        try:
            self._wait(calls, seconds)
        except KeyboardInterrupt:
            self._interruption = self._interrupt(calls)
        answers = {rank: self._answer(rank, call) for rank, call in calls.items()}
        if trouble := self._warden.trouble():
            self._give_up(trouble)
        return answers

    def _wait(self, calls: dict[int, Any], seconds: float | None) -> None:
        until = None if seconds is None else time.monotonic() + seconds
        while waiting := self._waiting(calls):
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"no answer of {_named(waiting).lower()} within {seconds:g} seconds")
            calls[waiting[0]].wait(0.05)

    def _waiting(self, calls: dict[int, Any]) -> list[int]:
        return [rank for rank, call in calls.items() if not call.ready() and not self._warden.has_lost(rank)]

    def _answer(self, rank: int, call: Any) -> object:
        from ipyparallel.error import RemoteError

        if not call.ready():
            how = self._warden.ended.get(rank)
            return Failure(f"process {how}" if how else "no answer")
        try:
            return call.get(0)
        except RemoteError as error:
            return Failure(error.ename, error.evalue)

    def _interrupt(self, calls: dict[int, Any]) -> str:
        """Stop what runs on the ranks. One that waits for another does not hear of it before it gives up."""
        until = time.monotonic() + self._timeout + SECONDS_TO_STOP
        with suppress(KeyboardInterrupt):  # once more: the learner does not want to wait
            while (waiting := self._waiting(calls)) and time.monotonic() < until and self._warden.interrupt(waiting):
                with suppress(TimeoutError):
                    self._wait(calls, 2)
        if waiting := self._waiting(calls):
            self._give_up(f"{_named(waiting)} did not stop")
        return "The cell was stopped."

    def _give_up(self, trouble: str) -> None:
        self._trouble = self._trouble or trouble
        self.stop()

    def _stop(self) -> None:
        try:
            if self._client:
                self._client.close(linger=0)
        finally:
            self._warden.end()


# --- Ranks that are simulated --------------------------------------------------------------------------------------


class SimulatedCluster(Cluster):
    """Ranks that are threads of this process, one running at a time. See `moe_lab.parallel.simulation`.

    Args:
        why: the reason, in a few words.
    """

    def __init__(self, n: int, why: str) -> None:
        super().__init__(n)
        self._why = why
        self._stage = Stage(n, self._on_turn)
        self._stage.random = [_new_random_state() for _ in range(n)]
        self._others_random = [(random.Random().getstate(), np.random.RandomState().get_state()) for _ in range(n)]
        self._random_before = list(self._stage.random)
        self._acting = 0
        self._ranks = [SimulatedRanks(self._stage, rank, range(n)) for rank in range(n)]
        self._names = [rank_cells.names_of_a_rank(ranks) for ranks in self._ranks]

    @property
    def _what(self) -> str:
        return f"simulated in this process, because {self._why}"

    def _on_turn(self, rank: int | None) -> None:
        """Python's and NumPy's random numbers are a rank's own, as the stage sees to for PyTorch's."""
        if rank is None:
            self._others_random[self._acting] = random.getstate(), np.random.get_state()
        else:
            self._acting = rank
            random.setstate(self._others_random[rank][0])
            np.random.set_state(self._others_random[rank][1])

    def _run(self, source: str, name: str, targets: list[int]) -> dict[int, Said]:
        stage = self._stage
        stage.turn, stage.ended = targets[0], set(range(self.n)) - set(targets)
        self._random_before = list(stage.random)
        printed, warned = _OfThreads(sys.stdout), _OfThreads(sys.stderr)
        finished: SimpleQueue[tuple[int, Said]] = SimpleQueue()

        def act(rank: int) -> None:
            value, failure = "", None
            mine = printed.of_this_one(), warned.of_this_one()
            try:
                stage.begin(rank)
                value = rank_cells.execute(source, name, self._names[rank])
            except BaseException as error:
                failure = rank_cells.failure_of(error, name)
            finally:
                stage.end(rank)
                finished.put((rank, Said(str(mine[0]), str(mine[1]), value, failure)))

        threads = {rank: threading.Thread(target=act, args=(rank,), daemon=True) for rank in targets}
        told = {rank: Said(failure=Failure("does not stop")) for rank in targets}
        waiting = set(targets)

        def collect(seconds: float | None = None) -> None:
            while waiting:
                rank, told[rank] = finished.get(timeout=seconds)
                waiting.remove(rank)

        with redirect_stdout(printed), redirect_stderr(warned), _keeping_random_numbers():
            try:
                for thread in threads.values():
                    thread.start()
                collect()  # to join a thread is not safe to interrupt
            except KeyboardInterrupt:
                waiting &= {rank for rank, thread in threads.items() if thread.ident}
                self._interruption = self._interrupt(threads[stage.turn], collect)
        return told

    def _interrupt(self, running: threading.Thread, collect: Callable[[float], None]) -> str:
        """Raise a KeyboardInterrupt in the thread whose turn it is, and wake the others."""
        self._stage.abandon(RankError("The cell was interrupted."))
        for _ in range(int(SECONDS_TO_STOP)):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(running.ident or 0), _KEYBOARD_INTERRUPT)
            with suppress(Empty):  # it may be swallowed
                collect(1.0)
                return "The cell was stopped."
        self.stop()
        return "A rank does not stop: restart the kernel before you go on."

    def _mend(self) -> str:
        if not self._is_stopped:
            self._stage = Stage(self.n, self._on_turn)
            self._stage.random = self._random_before
            for rank, ranks in enumerate(self._ranks):  # the same objects, for what the learner made with them
                vars(ranks).update(vars(SimulatedRanks(self._stage, rank, range(self.n))))
        return ""

    def _give(self, parcel: Parcel) -> dict[int, Failure | None]:
        return {rank: parcel.unpack(names) for rank, names in enumerate(self._names)}

    def _take(self, expression: str) -> dict[int, list[bytes] | Failure]:
        return {rank: rank_cells.take(expression, names) for rank, names in enumerate(self._names)}

    def _stop(self) -> None:
        self._names = []


def _new_random_state() -> torch.Tensor:
    """A state of PyTorch's random numbers, as in a process that begins."""
    generator = torch.Generator()
    generator.seed()
    return generator.get_state()


@contextmanager
def _keeping_random_numbers() -> Iterator[None]:
    """The notebook's own random numbers go on afterwards where they were."""
    kept = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(kept[0])
        random.setstate(kept[1])
        np.random.set_state(kept[2])


class _OfThreads(io.TextIOBase):
    """A stream that keeps what the ranks' threads write, each for itself, and passes on what others do."""

    def __init__(self, otherwise: Any) -> None:
        self._otherwise, self._kept = otherwise, {}

    def of_this_one(self) -> Printed:
        """What the thread that calls this writes from now on."""
        kept = self._kept[threading.get_ident()] = Printed()  # a thread that has ended may have had the same number
        return kept

    def write(self, text: str) -> int:
        return self._kept.get(threading.get_ident(), self._otherwise).write(text)

    def flush(self) -> None:
        self._otherwise.flush()
