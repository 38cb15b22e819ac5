"""Placement: which experts lie on which rank, and how to choose that so that no rank does much more than another.

An expert's weights fill a slot. Slots are numbered rank by rank; with redundant experts there are more slots than
experts, and the copies of an expert (its replicas, all equal) share its tokens. The slowest rank sets the pace, so the
aim is a small maximum over ranks. The balancers read loads, such as `tokens_per_expert` of text that has been routed.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import index

import torch
from torch import Tensor


@dataclass(frozen=True, repr=False)
class Placement:
    """The experts in each rank's slots, in the order of the slots. Ranks may hold different numbers of them, or none.

    Args:
        experts: for each rank the experts in its slots.
        n_experts: E; every expert 0 … E-1 has a slot.
        n_redundant: how many slots there are beyond one for each expert.

    Raises:
        ValueError: no rank; an id that is no expert's; an expert without a slot, or with two on one rank; more or fewer
            slots than n_experts + n_redundant.
    """

    experts: tuple[tuple[int, ...], ...]
    n_experts: int
    n_redundant: int = 0

    def __post_init__(self) -> None:
        experts = tuple(tuple(index(expert) for expert in rank) for rank in self.experts)
        object.__setattr__(self, "experts", experts)  # of lists, or of NumPy's integers, too
        if self.n_experts < 1 or self.n_redundant < 0:
            got = f"n_experts={self.n_experts}, n_redundant={self.n_redundant}"
            raise ValueError(f"{got}: expected at least 1 expert, and 0 or more redundant ones.")
        if not experts:
            raise ValueError("experts is empty: expected a tuple of experts for each rank, and at least 1 rank.")
        for rank, held in enumerate(experts):
            for expert, times in Counter(held).items():
                if not 0 <= expert < self.n_experts:
                    raise ValueError(f"rank {rank} holds expert {expert}: expected ids from 0 to {self.n_experts - 1}.")
                if times > 1:
                    raise ValueError(f"rank {rank} holds expert {expert} {times} times: expected it once at most.")
        placed = Counter(expert for held in experts for expert in held)
        if missing := [expert for expert in range(self.n_experts) if expert not in placed]:
            raise ValueError(
                f"{_listed(missing)} of n_experts={self.n_experts} on no rank: expected a slot for every expert."
            )
        if placed.total() != self.n_slots:
            repeated = [expert for expert in range(self.n_experts) if placed[expert] > 1]
            expected = f"n_experts + n_redundant = {self.n_experts} + {self.n_redundant} slots"
            raise ValueError(f"{placed.total()} slots, {_listed(repeated)} on several ranks: expected {expected}.")

    def __repr__(self) -> str:
        slots = ", ".join(str(n) for n in sorted(set(self.slots_per_rank)))
        redundant = f", {self.n_redundant} redundant" if self.n_redundant else ""
        return f"Placement({self.n_experts} experts{redundant}, {self.n_ranks} ranks of {slots} slots)"

    @property
    def n_ranks(self) -> int:
        return len(self.experts)

    @property
    def n_slots(self) -> int:
        return self.n_experts + self.n_redundant

    @property
    def slots_per_rank(self) -> tuple[int, ...]:
        return tuple(len(held) for held in self.experts)

    @property
    def slot_experts(self) -> Tensor:
        """(n_slots,) int64, on the CPU: the expert in each slot."""
        return torch.tensor([expert for held in self.experts for expert in held])

    @property
    def slot_ranks(self) -> Tensor:
        """(n_slots,) int64, on the CPU: the rank that each slot is on."""
        return torch.tensor([rank for rank, held in enumerate(self.experts) for _ in held])

    @property
    def replicas(self) -> Tensor:
        """(E,) int64, on the CPU: how many slots each expert has."""
        return self.slot_experts.bincount(minlength=self.n_experts)

    def first_slot(self, rank: int) -> int:
        """The number of a rank's first slot: rank r's are `first_slot(r)` up to, and not with, `first_slot(r + 1)`."""
        return (0, *accumulate(self.slots_per_rank))[rank]

    def choose_slots(self, topk_experts: Tensor) -> Tensor:
        """The slot that each choice goes to, (T, K) expert ids to (T, K) slots.

        Of an expert's n replicas, in the order of their slots, token t takes number `t mod n`: deterministic, and even
        over many tokens. The table is kept per device, so that nothing here waits for a GPU.

        Raises:
            ValueError: ids below 0 or from n_experts on (checked on a CPU; on a GPU it would wait for the device).
        """
        if topk_experts.device.type == "cpu" and topk_experts.numel():
            low, high = (int(extreme) for extreme in topk_experts.aminmax())
            if low < 0 or high >= self.n_experts:
                got = f"topk_experts has ids from {low} to {high}"
                raise ValueError(f"{got}: expected ids from 0 to {self.n_experts - 1}.")
        slots, first, replicas = _slots_by_expert(self, topk_experts.device)
        tokens = torch.arange(len(topk_experts), device=topk_experts.device)[:, None]
        return slots[first[topk_experts] + tokens % replicas[topk_experts]]


@functools.lru_cache(maxsize=256)
def _slots_by_expert(placement: Placement, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All slots sorted by expert; where each expert's begin; how many they are."""
    replicas = placement.replicas
    tables = placement.slot_experts.argsort(stable=True), replicas.cumsum(0) - replicas, replicas
    return tuple(table.to(device) for table in tables)


def _listed(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    return f"expert{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids[:8]))}{more}" if ids else "no expert"


def even_placement(n_experts: int, n_ranks: int) -> Placement:
    """Equal parts in the order of the ids: rank r holds experts r·E/ranks up to (r + 1)·E/ranks.

    Raises:
        ValueError: experts that do not go evenly into the ranks.
    """
    if n_ranks < 1:
        raise ValueError(f"n_ranks={n_ranks}: expected 1 or more.")
    if n_experts % n_ranks:
        raise ValueError(
            f"n_experts={n_experts} is not divisible by n_ranks={n_ranks}: choose sizes that divide, "
            "or give a placement, in which ranks may hold different numbers of experts."
        )
    per_rank = n_experts // n_ranks
    return Placement(tuple(tuple(range(r * per_rank, (r + 1) * per_rank)) for r in range(n_ranks)), n_experts)


def rank_loads(placement: Placement, tokens_per_expert: Tensor | Sequence[float]) -> Tensor:
    """The rows that each rank computes, (..., E) counts to (..., n_ranks) fp32 on the CPU.

    Replicas are given equal shares, as `choose_slots` gives them over many tokens.

    Raises:
        ValueError: counts of another number of experts.
    """
    counts = torch.as_tensor(tokens_per_expert).to("cpu", torch.float64)
    if counts.shape[-1:] != (placement.n_experts,):
        raise ValueError(f"tokens_per_expert has shape {tuple(counts.shape)}: expected (…, {placement.n_experts}).")
    shares = (counts / placement.replicas)[..., placement.slot_experts]  # (..., n_slots)
    parts = shares.split(placement.slots_per_rank, -1)
    return torch.stack([part.sum(-1) for part in parts], -1).float()


# --- balancers ----------------------------------------------------------------------------------------------------


def greedy_placement(loads: Tensor | Sequence[float], n_ranks: int) -> Placement:
    """Each expert on one rank: the heaviest first, onto the least loaded rank that still has room.

    A rank has room for E/n_ranks experts, rounded up. Of equal loads the lower id is first, of equal ranks too.

    Source: Graham 1969, "Bounds on Multiprocessing Timing Anomalies", https://doi.org/10.1137/0117039 (LPT: at most
    4/3 - 1/(3·ranks) times the best). With room, as here, the same bound is proven for up to 3 experts on a rank:
    Kellerer and Woeginger 1993, "A tight bound for 3-partitioning", Discrete Applied Mathematics 45.

    Args:
        loads: (E,), such as `tokens_per_expert`.

    Raises:
        ValueError: no loads, negative or infinite ones; no ranks.
    """
    loads = _require_loads(loads)
    return Placement(balanced_packing(loads, n_ranks), len(loads))


def replicate(loads: Tensor | Sequence[float], n_slots: int, most: int | None = None) -> Tensor:
    """How many slots each expert gets, (E,) int64: one, and every further one to the greatest load per replica.

    Of equal loads per replica the lower id is first.

    Source: DeepSeek-V3 (2024), section 3.4.1, redundant experts; `replicate_experts` in
    https://github.com/deepseek-ai/EPLB

    Args:
        most: at most so many for one expert, such as the number of ranks.

    Raises:
        ValueError: see `greedy_placement`; fewer slots than experts, or more than `most` for each.
    """
    loads = _require_loads(loads)
    most = n_slots if most is None else most
    if not len(loads) <= n_slots <= len(loads) * most:
        raise ValueError(
            f"n_slots={n_slots} for {len(loads)} experts, at most {most} each: "
            f"expected {len(loads)} to {len(loads) * most}."
        )
    counts = [1] * len(loads)
    for _ in range(n_slots - len(loads)):
        growing = [expert for expert, count in enumerate(counts) if count < most]
        counts[max(growing, key=lambda expert: loads[expert] / counts[expert])] += 1
    return torch.tensor(counts)


def balanced_packing(
    loads: Tensor | Sequence[float], n_packs: int, kinds: Sequence[int] | None = None
) -> tuple[tuple[int, ...], ...]:
    """The items in each pack: the heaviest first, into the lightest pack that has room.

    A pack has room for an equal part of the items, rounded up. Of equal items, or packs, the first is taken.

    Source: `balanced_packing` in https://github.com/deepseek-ai/EPLB, which knows no kinds.

    Args:
        loads: (N,) of the items.
        kinds: (N,), such as the expert that each item is a replica of: two of a kind never share a pack.

    Returns:
        For each pack its items, in the order in which they came.

    Raises:
        ValueError: see `greedy_placement`; more items of a kind than packs.
    """
    loads = _require_loads(loads)
    kinds = range(len(loads)) if kinds is None else kinds
    if n_packs < 1:
        raise ValueError(f"{n_packs} ranks or nodes to place experts on: expected 1 or more.")
    kind, times = Counter(kinds).most_common(1)[0]
    if times > n_packs:
        raise ValueError(f"{times} items of kind {kind} for {n_packs} packs: expected at most one in each.")
    room = math.ceil(len(loads) / n_packs)
    packs: list[list[int]] = [[] for _ in range(n_packs)]

    def weight(pack: list[int]) -> float:
        return sum(loads[item] for item in pack)

    def fits(item: int, pack: list[int]) -> bool:
        return kinds[item] not in [kinds[other] for other in pack]

    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):  # stable: of equals the first comes first
        with_room = [pack for pack in packs if len(pack) < room]
        open_to_it = [pack for pack in with_room if fits(item, pack)]
        if open_to_it:
            min(open_to_it, key=weight).append(item)
            continue
        # Every pack with room has one of its kind. A full one that has none holds an item that can make way: it has
        # more kinds than a pack with room, and lacks one of those.
        lightest = min(with_room, key=weight)
        ways = [(full, i) for full in packs if fits(item, full) for i, old in enumerate(full) if fits(old, lightest)]
        full, i = min(ways, key=lambda way: loads[way[0][way[1]]])  # the lightest, since this pack gets it on top
        lightest.append(full[i])
        full[i] = item
    return tuple(map(tuple, packs))


def balance_placement(
    loads: Tensor | Sequence[float], n_ranks: int, n_redundant: int, n_nodes: int = 1, n_groups: int = 1
) -> Placement:
    """DeepSeek's method (EPLB): groups of experts to nodes, more replicas for what is heavy, replicas to ranks.

    1. The groups, E/n_groups experts in order of their ids, are packed onto the nodes: with node-limited routing a
       token's experts then lie on few nodes.
    2. Within each node an equal part of the redundant slots goes to its heaviest experts.
    3. Within each node the replicas, each with an equal share of its expert's load, are packed onto the ranks.

    With one node and one group, as it is where nothing else is said, this is the method's global form. Two replicas of
    an expert never share a rank, since a placement has each expert once on a rank; the published code, which is
    otherwise followed, allows it.

    Source: DeepSeek-V3 (2024), section 3.4; https://github.com/deepseek-ai/EPLB, README and `eplb.py`.

    Args:
        loads: (E,), such as `tokens_per_expert`, or a mean of it over time.
        n_ranks: of all nodes together.

    Raises:
        ValueError: see `greedy_placement`; experts that do not go evenly into groups, or groups, ranks or slots that do
            not go evenly into nodes; more slots than all experts have on all ranks.
    """
    loads = _require_loads(loads)
    n_slots = len(loads) + n_redundant
    for what, n, into, parts in (
        ("experts", len(loads), "n_groups", n_groups),
        ("groups", n_groups, "n_nodes", n_nodes),
        ("ranks", n_ranks, "n_nodes", n_nodes),
        ("slots (n_experts + n_redundant)", n_slots, "n_nodes", n_nodes),
    ):
        if parts < 1 or n % parts:
            raise ValueError(f"{n} {what} cannot be cut into {into}={parts} equal parts.")
    group_size = len(loads) // n_groups
    groups = [range(first, first + group_size) for first in range(0, len(loads), group_size)]
    group_loads = [sum(loads[expert] for expert in group) for group in groups]
    ranks: list[tuple[int, ...]] = []
    for node in balanced_packing(group_loads, n_nodes):
        experts = [expert for group in node for expert in groups[group]]
        replicas = replicate([loads[expert] for expert in experts], n_slots // n_nodes, most=n_ranks // n_nodes)
        slots = [expert for expert, n in zip(experts, replicas.tolist(), strict=True) for _ in range(n)]
        times = Counter(slots)
        shares = [loads[expert] / times[expert] for expert in slots]
        packs = balanced_packing(shares, n_ranks // n_nodes, kinds=slots)
        ranks += [tuple(slots[item] for item in pack) for pack in packs]
    return Placement(tuple(ranks), len(loads), n_redundant)


def _require_loads(loads: Tensor | Sequence[float]) -> list[float]:
    loads = loads.tolist() if isinstance(loads, Tensor) else list(loads)
    if not loads or not all(0 <= load < math.inf for load in loads):
        raise ValueError(f"loads={loads}: expected a number for each expert, 0 or more.")
    return loads
