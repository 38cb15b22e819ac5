"""Ranks that are processes, over torch.distributed: gloo between CPUs, NCCL between GPUs, whatever started them.

Every rank says four times a second, in a store that all can read, what it is doing. So when one is lost, the others can
tell which one, and what it did last.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lab.parallel.ranks import NO_STAGE, RankError, Ranks, _Shared

TIMEOUT = 600.0  # seconds that a rank waits for another: long enough for a first step, which may compile
SECONDS_A_BEAT = 0.25
SILENT_AFTER = 6 * SECONDS_A_BEAT
JOIN_TIMEOUT = 120.0
OWN_CODE = "its own code"  # what a rank is in, outside of any stage and any call


class Pulse:
    """Tells the others, through a store, that this rank lives and what it does; and reads what they tell."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.stage, self.calls, self.waits, self.failure = "joining", 0, False, None
        self.since = time.monotonic()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True, name="pulse")
        self.thread.start()

    def now(self, stage: str, calls: int, waits: bool) -> None:
        """Note what this rank is doing. Costs nothing: the thread tells it at its next beat."""
        self.stage, self.calls, self.waits, self.since = stage, calls, waits, time.monotonic()

    def fail(self, error: BaseException) -> None:
        """Tell at once why this rank ends."""
        is_cause = not isinstance(error, RankError)
        self.failure = {"is_cause": is_cause, "what": f"{type(error).__name__}: {error}", "stage": self.stage}
        with suppress(RuntimeError):
            self.tell(-1)

    def stop(self) -> None:
        """No more beats."""
        self.stopped.set()
        self.thread.join(1)

    def read(self) -> list[dict | None]:
        """What every rank told last, None for one that never did."""
        keys = [f"pulse/{rank}" for rank in range(self.size)]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]

    def _beat(self) -> None:
        beat = 0
        with suppress(RuntimeError):  # who keeps the store is gone: the others will notice when they call
            while not self.stopped.wait(SECONDS_A_BEAT if beat else 0):
                beat += 1
                self.tell(beat)

    def tell(self, beat: int) -> None:
        """Write down what this rank does, for the others."""
        told = {"beat": beat, "stage": self.stage, "calls": self.calls, "waits": self.waits, "failure": self.failure}
        told["seconds"] = time.monotonic() - self.since
        self.store.set(f"pulse/{self.rank}", json.dumps(told))

    def who(self) -> tuple[int | None, str]:
        """The rank that the others wait for in vain, and what is known of it; takes up to two seconds."""
        before, told = None, []
        begin = time.monotonic()
        while time.monotonic() - begin < SILENT_AFTER + SECONDS_A_BEAT:
            try:
                told = self.read()
            except RuntimeError:
                return None, "the store where ranks tell what they do is gone, and with it whoever kept it"
            before = before or told
            for rank, one in enumerate(told):
                if one and one["failure"] and one["failure"]["is_cause"] and rank != self.rank:
                    return rank, f"rank {rank} failed in {one['failure']['stage']}: {one['failure']['what']}"
            time.sleep(SECONDS_A_BEAT)
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            if told[rank] is None:
                return rank, f"rank {rank} never said a word"
            gave_up = told[rank]["failure"] is not None
            if not gave_up and before[rank] is not None and told[rank]["beat"] == before[rank]["beat"]:
                return rank, f"rank {rank} is gone; it was last seen in {told[rank]['stage']}"
        late = [rank for rank in others if told[rank]["failure"] is None and not told[rank]["waits"]]
        if late:
            rank = min(late, key=lambda r: told[r]["calls"])
            seconds = told[rank]["seconds"]
            return rank, f"rank {rank} did not come: for {seconds:.0f} s it has been in {told[rank]['stage']}"
        return None, "no rank is missing, so they are not all making the same calls"


class ProcessRanks(Ranks):
    """A rank that is a process. See `join`."""

    def __init__(
        self, group: dist.ProcessGroup, pulse: Pulse, timeout: float, members: Sequence[int], shared: _Shared | None
    ) -> None:
        super().__init__(dist.get_rank(group), members, shared)
        self._joined, self._pulse, self.timeout = group, pulse, timeout

    @property
    def _group(self) -> dist.ProcessGroup:
        if self._joined is None:  # torch.distributed would take None for the whole world
            raise RankError("This group was left: its ranks cannot talk any more. Join, and split again.")
        return self._joined

    @property
    def is_joined(self) -> bool:
        """Whether it can still talk."""
        return self._joined is not None

    def _part(self) -> None:
        """Let go of the group and those split from it: connections that stay open make others wait in vain."""
        self._joined = None
        for group in (group for pair in self._splits.values() for group in pair):
            group._part()

    @property
    def device(self) -> torch.device:
        """Where tensors have to lie to be sent: this rank's GPU under NCCL."""
        is_gpu = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")

    @contextmanager
    def calling(self, kind: str, stage: str | None = None) -> Iterator[str]:
        """Turns what torch.distributed raises into a `RankError` that names the rank and the stage."""
        stage = self.stage_now if stage is None else stage
        told = kind if stage == NO_STAGE else stage
        self._shared.calls += 1
        self._pulse.now(told, self._shared.calls, waits=True)
        try:
            yield stage
        except RankError:
            raise
        except RuntimeError as error:
            raise self.lost(str(error).strip().splitlines()[0][:200]) from None
        self._computes()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """See `Ranks.stage`."""
        with super().stage(name):
            self._computes()
            yield
        self._computes()

    def _computes(self) -> None:
        stage = self.stage_now
        self._pulse.now(OWN_CODE if stage == NO_STAGE else stage, self._shared.calls, waits=False)

    def lost(self, said: str) -> RankError:
        """The error of a rank that cannot go on: it finds out who is the cause, which takes up to two seconds."""
        stage = self._pulse.stage
        rank, what = self._pulse.who()
        return RankError(f"Gave up in {stage}: {what}. (What was noticed: {said})", rank, stage)

    def _all_to_all(self, rows: Tensor, send: list[int], receive: list[int]) -> Callable[[], Tensor]:
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        work = dist.all_to_all_single(out, rows, receive, send, group=self._group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return out

        finish.keeps = rows  # what is being sent must not be freed meanwhile
        return finish

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=self._group)
        return total

    def _all_gather(self, tensor: Tensor) -> Tensor:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor, group=self._group)
        return torch.stack(gathered)

    def _send(self, tensor: Tensor, to: int) -> None:
        dist.send(tensor, self.members[to], group=self._group)

    def _receive(self, empty: Tensor, source: int) -> Tensor:
        dist.recv(empty, self.members[source], group=self._group)
        return empty

    def _subgroup(self, groups: list[list[int]], mine: int) -> "ProcessRanks":
        members = [self.members[rank] for rank in groups[mine]]
        # members alone make a group: ranks outside, of which there may be others like this one, take no part
        waits = timedelta(seconds=self.timeout)
        group = dist.new_group(members, timeout=waits, use_local_synchronization=True)
        return ProcessRanks(group, self._pulse, self.timeout, members, self._shared)


def join(
    rank: int | None = None,
    size: int | None = None,
    address: str | None = None,
    *,
    backend: str | None = None,
    timeout: float = TIMEOUT,
) -> ProcessRanks:
    """Become one of `size` ranks, which are processes. Returns when all have joined.

    Without arguments, what torchrun and other launchers of torch.distributed put in the environment counts.

    Args:
        address: "host:port" of the store where ranks find each other, as `Store` keeps it.
        backend: "gloo" or "nccl"; by default NCCL where each of this machine's ranks can have a GPU of its own.
        timeout: seconds that a rank waits for the others in a call before it gives up.

    Raises:
        ValueError: only some of rank, size and address; or this process is a rank already.
        RankError: not all ranks came.
    """
    if dist.is_initialized():
        raise ValueError("This process is a rank already: call leave() before it joins again.")
    given = (rank, size, address)
    if any(one is None for one in given) and any(one is not None for one in given):
        raise ValueError(f"rank={rank}, size={size}, address={address!r}: expected all three, or none (torchrun).")
    if address is None:
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"{', '.join(missing)} not in the environment: start with torchrun, or give all three.")
    pulse = None
    try:
        store, rank, size = _meet(rank, size, address)
        backend = _backend() if backend is None else backend
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
        pulse = Pulse(dist.PrefixStore("pulse", _another(store)), rank, size)
        group_store, seconds = dist.PrefixStore("group", store), timedelta(seconds=timeout)
        dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=seconds)
        ranks = ProcessRanks(dist.group.WORLD, pulse, timeout, range(size), None)
        ranks.all_reduce(torch.zeros(1, device=ranks.device))  # connects, and waits for all
    except BaseException as error:
        if pulse is not None:
            pulse.stop()
        if dist.is_initialized():
            dist.destroy_process_group()
        if not isinstance(error, RuntimeError) or isinstance(error, RankError):
            raise
        said = str(error).strip().splitlines()[0][:200]
        who = "This process" if rank is None else f"Rank {rank} of {size}"
        raise RankError(f"{who} could not join: {said}", stage="joining") from None
    pulse.now(OWN_CODE, 0, waits=False)
    pulse.tell(0)  # at once: who dies before the next beat shall not be seen in joining
    return ranks


def _meet(rank: int | None, size: int | None, address: str | None) -> tuple[dist.Store, int, int]:
    """The store where ranks find each other, this one's number, and how many there are."""
    waits = timedelta(seconds=JOIN_TIMEOUT)
    if address is None:
        store, rank, size = next(dist.rendezvous("env://", timeout=waits))
    else:
        host, _, port = address.rpartition(":")
        store = dist.TCPStore(host, int(port), None, False, waits)
    store.set_timeout(waits)
    return store, rank, size


def _backend() -> str:
    """NCCL where each of this machine's ranks has a GPU of its own, which it insists on; else gloo."""
    n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= n_ranks else "gloo"


def _another(store: dist.Store) -> dist.Store:
    """A connection of its own to the same store: one that waits would make a heartbeat wait with it."""
    return store.clone() if hasattr(store, "clone") else store


def leave(ranks: ProcessRanks, error: BaseException | None = None) -> None:
    """Stop being a rank; with an error, tell the others why."""
    ranks._pulse.stop()  # first, or a last beat could take the place of the error
    if error is not None:
        ranks._pulse.fail(error)
    ranks._part()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(*args, **kwargs) -> Iterator[ProcessRanks]:
    """`join` for as long as it lasts; what is raised inside is told to the others."""
    ranks = join(*args, **kwargs)
    try:
        yield ranks
    except BaseException as error:
        leave(ranks, error)
        raise
    leave(ranks)


class Store:
    """Where ranks of this machine find each other. Nobody on another one can reach it.

    Whoever keeps it should outlive the ranks: best is who starts them.
    """

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))  # a TCPStore by itself listens to the whole network
        self._port = listener.getsockname()[1]
        options = {"timeout": timedelta(seconds=JOIN_TIMEOUT), "wait_for_workers": False}
        descriptor = listener.detach()
        self._store = dist.TCPStore("127.0.0.1", self._port, is_master=True, master_listen_fd=descriptor, **options)

    @property
    def address(self) -> str:
        """What `join` needs."""
        return f"127.0.0.1:{self._port}"
