"""What expert parallelism costs on a cluster: bytes that travel, and the seconds they take. Arithmetic, without torch.

A message takes a latency, and then its bytes over a bandwidth (Hockney 1994, "The communication challenge for MPP").
Seconds, bytes and FLOPs throughout; bandwidths are one way; tokens choose uniformly. A rank is a GPU.

What the model leaves out makes real times longer: the start of a kernel, counts that are exchanged first, other
traffic on the network, links that do not reach their rate. Where many tokens travel, the model expects 12 to 30 % more
bandwidth than DeepEP measured; where few do, DeepEP took 30 to 90 microseconds longer (tests/parallel/test_cost.py).
Memory is left out too: neither does the model say what fits, nor is an expert slower for having few tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_lab import presets
from moe_lab.accounting import (
    BYTES,
    FP8_BLOCK,
    Parts,
    count_flops,
    count_parameters,
    expert_parameters,
    shared_expert_parameters,
)
from moe_lab.config import LMConfig, MoEConfig, RouterConfig

FORMS = ("per_assignment", "per_rank", "across_then_within")


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection between two ranks.

    Args:
        latency: seconds until a message's first byte is there.
        bytes_per_second: what then follows, one way, for each rank.

    Raises:
        ValueError: a negative latency, or a bandwidth that is not positive.
    """

    latency: float
    bytes_per_second: float

    def __post_init__(self) -> None:
        if self.latency < 0 or self.bytes_per_second <= 0:
            given = f"latency={self.latency}, bytes_per_second={self.bytes_per_second}"
            raise ValueError(f"{given}: expected 0 or more, and more than 0.")

    def seconds(self, n_bytes: float) -> float:
        """From one rank to another: `latency + n_bytes / bytes_per_second`; no bytes take no time."""
        return self.latency + n_bytes / self.bytes_per_second if n_bytes else 0.0


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes of `ranks_per_node` ranks; each rank has a link within its node, and one across nodes.

    Args:
        flops_per_second: what a rank reaches while it computes, not what its maker states.

    Raises:
        ValueError: no ranks in a node, or no FLOPs.
    """

    name: str
    ranks_per_node: int
    within: Link
    across: Link
    flops_per_second: float

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or self.flops_per_second <= 0:
            given = f"ranks_per_node={self.ranks_per_node}, flops_per_second={self.flops_per_second}"
            raise ValueError(f"{given}: expected both to be positive.")

    def nodes(self, n_ranks: int) -> tuple[int, int]:
        """How many nodes `n_ranks` fill, and how many ranks each has.

        Raises:
            ValueError: more ranks than one node has, and not a multiple of it.
        """
        if n_ranks < 1 or (n_ranks > self.ranks_per_node and n_ranks % self.ranks_per_node):
            expected = f"at most ranks_per_node={self.ranks_per_node}, or a multiple of it"
            raise ValueError(f"n_ranks={n_ranks}: expected {expected}.")
        in_node = min(n_ranks, self.ranks_per_node)
        return n_ranks // in_node, in_node


# Bandwidths: DeepSeek-V3 (2024, arXiv 2412.19437), section 3.2.2: NVLink 160 GB/s, InfiniBand 50 GB/s.
# Latencies: Zhao et al. 2025 (arXiv 2505.09343), table 5: 64 bytes, end to end, NVLink 3.33 µs, InfiniBand between
# two leaf switches 3.7 µs.
# FLOP/s: worked out from table 4 there. A GPU did 385 TFLOP/s over a step of 19.926 s, of which 2.06 s were bubbles
# and 0.29 s the optimizer; the exchanges were hidden. While it computed, that is 385 · 19.926 / 17.576.
H800_INFINIBAND = Cluster(
    name="H800, InfiniBand",
    ranks_per_node=8,
    within=Link(latency=3.33e-6, bytes_per_second=160e9),
    across=Link(latency=3.7e-6, bytes_per_second=50e9),
    flops_per_second=436e12,
)

# Grattafiori et al. 2024 (Llama 3), section 3.3.1: RoCE, 400 Gb/s per GPU; table 4: 400 TFLOP/s in bf16 on 16,384
# GPUs, over whole steps of a dense model. NVLink: 900 GB/s both ways together, NVIDIA's data sheet of the H100; NCCL
# reaches less. Latencies: Zhao et al. 2025, table 5, RoCE between two leaf switches.
H100_ROCE = Cluster(
    name="H100, RoCE",
    ranks_per_node=8,
    within=Link(latency=3.33e-6, bytes_per_second=450e9),
    across=Link(latency=5.6e-6, bytes_per_second=50e9),
    flops_per_second=400e12,
)

# 72 GPUs at 900 GB/s one way: Zhao et al. 2025, section 2.3.2. 1,048 TFLOP/s, DeepSeek-V3's training, whole steps: the
# abstract of "Scalable Training of Mixture-of-Experts Models with Megatron Core" (2026, arXiv 2603.07685). Between
# racks 400 Gb/s per GPU: NVIDIA's data sheet of the DGX GB200. Latencies taken over from the H800.
GB200_NVL72 = Cluster(
    name="GB200 NVL72",
    ranks_per_node=72,
    within=Link(latency=3.33e-6, bytes_per_second=900e9),
    across=Link(latency=3.7e-6, bytes_per_second=50e9),
    flops_per_second=1048e12,
)

CLUSTERS = {cluster.name: cluster for cluster in (H800_INFINIBAND, H100_ROCE, GB200_NVL72)}


# --- Collectives -------------------------------------------------------------------------------------------------
# `n_bytes` is the whole buffer X: what is reduced on each rank, what is gathered from all, what a rank hands out.
# Source of the forms: Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in
# MPICH", sections 4.1 (ring), 4.3 (all-to-all) and 4.5 (an all-reduce as reduce-scatter and all-gather).


def all_gather_bytes(n_bytes: float, n_ranks: int) -> float:
    """Bytes that each rank sends: (n - 1)/n X. A reduce-scatter sends the same."""
    return n_bytes * (n_ranks - 1) / n_ranks


def all_to_all_bytes(n_bytes: float, n_ranks: int) -> float:
    """Bytes that each rank sends if its buffer is for all ranks alike: (n - 1)/n X, for its own part stays."""
    return n_bytes * (n_ranks - 1) / n_ranks


def all_reduce_bytes(n_bytes: float, n_ranks: int) -> float:
    """Bytes that each rank sends: 2 (n - 1)/n X, a reduce-scatter and an all-gather. Twice an all-to-all's."""
    return 2 * n_bytes * (n_ranks - 1) / n_ranks


def all_gather_seconds(link: Link, n_bytes: float, n_ranks: int) -> float:
    """A ring: n - 1 steps, each with X/n. A reduce-scatter takes as long."""
    return (n_ranks - 1) * link.seconds(n_bytes / n_ranks)


def all_reduce_seconds(link: Link, n_bytes: float, n_ranks: int) -> float:
    """A ring: a reduce-scatter and an all-gather, 2 (n - 1) steps with X/n each."""
    return 2 * all_gather_seconds(link, n_bytes, n_ranks)


def all_to_all_seconds(link: Link, n_bytes: float, n_ranks: int, in_flight: int | None = None) -> float:
    """n - 1 messages of X/n: a latency for every `in_flight` of them, by default one for all; 1 is pairwise exchange.

    This is the even case. In an MoE layer the fullest rank sets the time, and all others wait for it.
    """
    rounds = min(n_ranks - 1, 1) if in_flight is None else math.ceil((n_ranks - 1) / in_flight)
    return rounds * link.latency + all_to_all_bytes(n_bytes, n_ranks) / link.bytes_per_second


def cluster_all_reduce_seconds(cluster: Cluster, n_bytes: float, n_ranks: int) -> float:
    """An all-reduce that knows the nodes: reduce-scatter within, a ring across for each slice, all-gather within.

    So each of a node's r ranks sends only 2 X/r across. No all-to-all can do that: nothing in it is summed on its way.
    """
    n_nodes, in_node = cluster.nodes(n_ranks)
    within = all_reduce_seconds(cluster.within, n_bytes, in_node)
    return within + all_reduce_seconds(cluster.across, n_bytes / in_node, n_nodes)


def cluster_all_to_all_seconds(cluster: Cluster, n_bytes: float, n_ranks: int) -> float:
    """An all-to-all of `n_bytes` from each rank, both links at work at once."""
    n_nodes, in_node = cluster.nodes(n_ranks)
    part = n_bytes / n_ranks
    return max(cluster.within.seconds((in_node - 1) * part), cluster.across.seconds((n_nodes - 1) * in_node * part))


# --- What a token sends ------------------------------------------------------------------------------------------


def row_bytes(d_model: int, number: str = "bf16", *, scales: bool = True) -> int:
    """Bytes of a row of `d_model` values in "fp32", "bf16" or "fp8", which has an fp32 scale for every 128 values.

    Ids and weights, of which each choice has one, are some 12 bytes beside thousands, and left out.

    Source: DeepSeek-V3 (2024), section 3.3.2 (tiles of 1 × 128).

    Raises:
        ValueError: another number format.
    """
    if number not in BYTES:
        raise ValueError(f"number={number!r}: expected one of {', '.join(BYTES)}.")
    blocks = math.ceil(d_model / FP8_BLOCK) if number == "fp8" and scales else 0
    return d_model * BYTES[number] + blocks * BYTES["fp32"]


def expected_distinct(router: RouterConfig, n_parts: int) -> float:
    """In how many of `n_parts` equal parts (ranks, nodes) a token's experts lie, on average over uniform choices.

    Of E experts in P parts, one part is missed by `C(E - E/P, k)` of the `C(E, k)` choices, so the mean is
    `P (1 - C(E - E/P, k) / C(E, k))`. Where `groups_kept` M of `n_groups` G can be chosen from, E is what lies in
    these, and any M groups are as likely. Trained routers are not uniform: measure them.

    Raises:
        ValueError: parts that do not divide the experts, or that cut groups.
    """
    n_experts, top_k, n_groups, kept = router.n_experts, router.top_k, router.n_groups, router.groups_kept
    share, group = _exact(n_experts, n_parts), n_experts // n_groups
    if share % group and group % share:
        raise ValueError(f"n_parts={n_parts}: expected parts that do not cut n_groups={n_groups} groups.")
    if share <= group:  # a group is one or more parts: is the part's own group kept?
        within_reach = {0: 1 - kept / n_groups, share: kept / n_groups}
    else:  # a part is several groups: how many of these are kept?
        held, ways = share // group, math.comb(n_groups, kept)
        within_reach = {
            j * group: math.comb(held, j) * math.comb(n_groups - held, kept - j) / ways
            for j in range(min(held, kept) + 1)
        }
    choices = math.comb(kept * group, top_k)
    missed = sum(p * math.comb(kept * group - size, top_k) / choices for size, p in within_reach.items())
    return n_parts * (1 - missed)


def _exact(n_experts: int, n_parts: int) -> int:
    if n_parts < 1 or n_experts % n_parts:
        raise ValueError(f"n_parts={n_parts}: expected a divisor of n_experts={n_experts}.")
    return n_experts // n_parts


def expected_nodes(router: RouterConfig, n_nodes: int) -> float:
    """On how many nodes a token's experts lie, on average.

    Where groups are nodes and not all are kept, this is `groups_kept`: a router keeps the groups of the best experts,
    so hardly one of them stays empty. DeepSeek-V3's rule visits 3.95 of its 4 nodes if all scores are random, where
    the closed form of 4 groups drawn blindly says 3.63.
    """
    if router.groups_kept < router.n_groups == n_nodes:
        return min(router.groups_kept, router.top_k)
    return expected_distinct(router, n_nodes)


def limit_nodes(moe: MoEConfig, n_nodes: int, most: int) -> MoEConfig:
    """The same layer with its experts' groups made the nodes, of which a token can visit at most `most`."""
    return moe.but(n_groups=n_nodes, groups_kept=min(most, n_nodes))


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Rows that a token sends on average over each kind of link; a row to its own rank goes over none."""

    within: float
    across: float

    @property
    def total(self) -> float:
        """All rows that leave a rank."""
        return self.within + self.across


def expected_copies(router: RouterConfig, n_nodes: int, in_node: int, form: str = "per_rank") -> Copies:
    """Rows per token for a dispatch over `n_nodes` nodes of `in_node` ranks; the combine brings as many back.

    Of all ranks and nodes, each is as likely as another to hold the token itself.

    Args:
        form: "per_assignment" k rows; "per_rank" one for each rank with an expert of the token's;
            "across_then_within" one for each node, to the rank in its own place there, which forwards one to each rank.

    Source of the last: DeepSeek-V3 (2024), section 3.2.2.

    Raises:
        ValueError: another form; ranks or nodes that do not divide the experts.
    """
    n_ranks = n_nodes * in_node
    ranks = expected_distinct(router, n_ranks)
    rows = {"per_assignment": router.top_k, "per_rank": ranks, "across_then_within": ranks}
    if form not in rows:
        raise ValueError(f"form={form!r}: expected one of {', '.join(FORMS)}.")
    if form == "across_then_within":
        nodes = expected_nodes(router, n_nodes)
        return Copies(within=ranks * (in_node - 1) / in_node, across=nodes * (n_nodes - 1) / n_nodes)
    return Copies(within=rows[form] * (in_node - 1) / n_ranks, across=rows[form] * (n_ranks - in_node) / n_ranks)


def exchange_seconds(cluster: Cluster, copies: Copies, n_bytes: float, tokens: float) -> float:
    """A dispatch or a combine of each rank's `tokens`, in rows of `n_bytes`; both links are at work at once."""
    within, across = (rows * n_bytes * tokens for rows in (copies.within, copies.across))
    return max(cluster.within.seconds(within), cluster.across.seconds(across))


@dataclass(frozen=True, kw_only=True)
class Travel:
    """How rows travel.

    Args:
        form: see `expected_copies`.
        dispatch, combine: the numbers in which rows go and come back.
        node_limit: how many nodes a token may visit, see `limit_nodes`; by default what the router's groups make of it.
    """

    form: str = "per_rank"
    dispatch: str = "bf16"
    combine: str = "bf16"
    node_limit: int | None = None

    def copies(self, cluster: Cluster, moe: MoEConfig, n_ranks: int) -> Copies:
        """`expected_copies` over so many ranks of a cluster."""
        n_nodes, in_node = cluster.nodes(n_ranks)
        limited = moe if self.node_limit is None else limit_nodes(moe, n_nodes, self.node_limit)
        return expected_copies(limited, n_nodes, in_node, self.form)


PLAIN = Travel()


# --- Times -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerTime(Parts):
    """Seconds of one layer on the fullest rank: what is not the experts, dispatch, routed experts, combine."""

    other: float
    dispatch: float
    experts: float
    combine: float

    @property
    def compute(self) -> float:
        """What does not travel."""
        return self.other + self.experts

    @property
    def exchange(self) -> float:
        """Dispatch and combine."""
        return self.dispatch + self.combine

    def overlapped(self) -> "LayerTime":
        """The same with all that fits hidden behind computing, as with two micro-batches in turns: at best.

        `dispatch` and `combine` are then what still shows, and `total` is the longer one of `compute` and `exchange`.

        Source: DeepSeek-V3 (2024), section 3.2.1 and figure 4.
        """
        shows = max(0.0, 1 - self.compute / self.exchange) if self.exchange else 0.0
        return replace(self, dispatch=shows * self.dispatch, combine=shows * self.combine)


def layer_time(
    cluster: Cluster,
    moe: MoEConfig,
    n_ranks: int,
    tokens: float,
    travel: Travel = PLAIN,
    *,
    other_flops: float | None = None,
    fullest: float = 1.0,
) -> LayerTime:
    """One layer's forward pass with its experts over `n_ranks` ranks of `tokens` tokens each.

    Args:
        other_flops: per token, beside its routed experts; by default those of the router and the shared experts.
        fullest: the load of the fullest rank over the mean. All wait for it: before it has computed, nobody has its
            rows back.
    """
    if other_flops is None:
        other_flops = 2.0 * (moe.n_experts * moe.d_model + shared_expert_parameters(moe))
    copies = travel.copies(cluster, moe, n_ranks)
    dispatch, combine = (
        fullest * exchange_seconds(cluster, copies, row_bytes(moe.d_model, number), tokens)
        for number in (travel.dispatch, travel.combine)
    )
    experts = fullest * tokens * moe.top_k * 2 * expert_parameters(moe) / cluster.flops_per_second
    return LayerTime(
        other=tokens * other_flops / cluster.flops_per_second, dispatch=dispatch, experts=experts, combine=combine
    )


# --- A training step ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as far as its traffic goes.

    Args:
        other_parameters, other_flops: of the whole model but its routed experts; FLOPs of one token's forward pass.
    """

    name: str
    moe: MoEConfig
    n_layers: int
    n_moe_layers: int
    other_parameters: int
    other_flops: float

    @property
    def expert_parameters(self) -> int:
        """Parameters of all routed experts."""
        return self.n_moe_layers * self.moe.n_experts * expert_parameters(self.moe)

    @property
    def flops(self) -> float:
        """FLOPs of one token's forward pass; a training step costs three times as much."""
        return self.other_flops + self.n_moe_layers * self.moe.top_k * 2 * expert_parameters(self.moe)


def model_of(name: str, config: LMConfig, sequence: int = 4096) -> Model:
    """The `Model` of a configuration with experts, its FLOPs those of sequences of so many tokens.

    Raises:
        ValueError: no layer has experts.
    """
    if config.moe is None:
        raise ValueError(f"{name}: expected a configuration with experts, not moe=None.")
    parameters, flops = count_parameters(config), count_flops(config, sequence)
    return Model(
        name=name,
        moe=config.moe,
        n_layers=config.n_layers,
        n_moe_layers=config.n_moe_layers,
        other_parameters=parameters.total - parameters.experts,
        other_flops=(flops.total - flops.experts) / sequence,
    )


DEEPSEEK_V3 = model_of("DeepSeek-V3", presets.DEEPSEEK_V3)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How `n_ranks` share a model: `pp` stages of layers, `tp` cuts of each matrix, and `dp` copies of what remains.

    The routed experts are not copied `dp` times: they lie spread over `ep` ranks, so they have `dp / ep` copies.

    Raises:
        ValueError: factors that do not fit; tp and ep both over 1, which the model does not count.
    """

    n_ranks: int
    ep: int = 1
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if min(self.n_ranks, self.ep, self.tp, self.pp) < 1 or self.n_ranks % (self.tp * self.pp) or self.dp % self.ep:
            expected = "tp * pp to divide n_ranks, and ep the rest of it"
            raise ValueError(f"n_ranks={self.n_ranks}, ep={self.ep}, tp={self.tp}, pp={self.pp}: expected {expected}.")
        if self.tp > 1 and self.ep > 1:
            raise ValueError(f"tp={self.tp}, ep={self.ep}: expected one of them to be 1.")

    @property
    def dp(self) -> int:
        """Copies of the model, each with tokens of its own."""
        return self.n_ranks // (self.tp * self.pp)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a rank sends in one training step, by what makes it send them: EP, TP, PP, DP."""

    ep: float
    tp: float
    pp: float
    dp: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.ep + self.tp + self.pp + self.dp


def traffic(
    cluster: Cluster,
    model: Model,
    layout: Layout,
    tokens: float,
    travel: Travel = PLAIN,
    *,
    gradients: str = "bf16",
) -> Traffic:
    """Bytes that a rank sends in a training step over `tokens` tokens, those of all ranks together.

    - EP: in every MoE layer a dispatch and a combine; the backward pass has both again, in the same numbers.
    - TP: four all-reduces of the activations in every layer, two forward, two backward (Shoeybi et al. 2019, section
      3); activations and their gradients in bf16.
    - PP: from each stage to the next and back; the mean over the stages, of which the last sends none on.
    - DP: an all-reduce of the gradients, once. ZeRO's reduce-scatter and all-gather send as much (Rajbhandari et al.
      2020, section 7.1).
    """
    mine = tokens / layout.dp
    d_model, layers = model.moe.d_model, model.n_layers / layout.pp
    activations = mine * row_bytes(d_model, "bf16")
    copies = travel.copies(cluster, model.moe, layout.ep)
    there_and_back = row_bytes(d_model, travel.dispatch) + row_bytes(d_model, travel.combine)
    other, experts = _gradients(model, layout, gradients)
    return Traffic(
        ep=2 * mine * copies.total * there_and_back * model.n_moe_layers / layout.pp,
        tp=4 * layers * all_reduce_bytes(activations, layout.tp),
        pp=2 * activations * (layout.pp - 1) / layout.pp,
        dp=all_reduce_bytes(other, layout.dp) + all_reduce_bytes(experts, layout.dp // layout.ep),
    )


def _gradients(model: Model, layout: Layout, number: str) -> tuple[float, float]:
    """Bytes of the gradients on one rank: of what is not a routed expert, and of its routed experts."""
    cuts = layout.tp * layout.pp
    each = row_bytes(1, number, scales=False)
    return each * model.other_parameters / cuts, each * model.expert_parameters / (cuts * layout.ep)


@dataclass(frozen=True, kw_only=True)
class StepTime(Parts):
    """Seconds of a training step on the fullest rank. `bubble` is the wait for a pipeline to fill and to drain."""

    compute: float
    dispatch: float
    combine: float
    tensor: float
    pipeline: float
    bubble: float
    gradients: float


def step_time(
    cluster: Cluster,
    model: Model,
    layout: Layout,
    tokens: float,
    travel: Travel = PLAIN,
    *,
    micro_batch: int = 4096,
    overlap: bool = False,
    fullest: float = 1.0,
    gradients: str = "bf16",
) -> StepTime:
    """A training step over `tokens` tokens, those of all ranks together, in micro-batches of `micro_batch` a copy.

    With `overlap` exchanges hide behind computing, see `LayerTime.overlapped`; all-reduces and bubbles never do here.
    With m micro-batches in `pp` stages, the bubble is (pp - 1)/m of the work (Narayanan et al. 2021, section 2.2).

    Raises:
        ValueError: fewer tokens than a micro-batch for each copy of the model.
    """
    n_micro = tokens / layout.dp / micro_batch
    if n_micro < 1:
        expected = f"at least micro_batch={micro_batch} for each of dp={layout.dp} copies"
        raise ValueError(f"tokens={tokens}: expected {expected}.")
    moe_layers, layers = model.n_moe_layers / layout.pp, model.n_layers / layout.pp
    forward = layer_time(
        cluster,
        model.moe,
        layout.ep,
        micro_batch,
        travel,
        other_flops=model.other_flops / model.n_moe_layers,
        fullest=fullest,
    )
    both = LayerTime(  # the backward pass computes twice as much, and exchanges the same again
        other=3 * forward.other / layout.tp,
        dispatch=2 * forward.dispatch,
        experts=3 * forward.experts / layout.tp,
        combine=2 * forward.combine,
    )
    both = both.overlapped() if overlap else both
    activations = micro_batch * row_bytes(model.moe.d_model, "bf16")
    per_micro = {
        "compute": moe_layers * both.compute,
        "dispatch": moe_layers * both.dispatch,
        "combine": moe_layers * both.combine,
        "tensor": 4 * layers * cluster_all_reduce_seconds(cluster, activations, layout.tp),
        "pipeline": 2 * cluster.across.seconds(activations) * (layout.pp - 1) / layout.pp,
    }
    other, experts = _gradients(model, layout, gradients)
    return StepTime(
        **{part: n_micro * seconds for part, seconds in per_micro.items()},
        bubble=(layout.pp - 1) * sum(per_micro.values()),
        gradients=_copies_all_reduce(cluster, other, layout.dp, layout.tp)
        + _copies_all_reduce(cluster, experts, layout.dp // layout.ep, layout.tp * layout.ep),
    )


def _copies_all_reduce(cluster: Cluster, n_bytes: float, n_copies: int, apart: int) -> float:
    """An all-reduce over copies that lie `apart` ranks from each other: the more, the fewer share a node."""
    in_node = max(1, cluster.ranks_per_node // apart)
    return cluster_all_reduce_seconds(replace(cluster, ranks_per_node=in_node), n_bytes, n_copies)


def weak_scaling(
    cluster: Cluster, model: Model, layouts: Sequence[Layout], tokens: float, travel: Travel = PLAIN, **options: object
) -> dict[int, StepTime]:
    """`step_time` by ranks where the work grows with them: each rank brings `tokens` tokens."""
    return {
        layout.n_ranks: step_time(cluster, model, layout, layout.n_ranks * tokens, travel, **options)
        for layout in layouts
    }


def strong_scaling(
    cluster: Cluster, model: Model, layouts: Sequence[Layout], tokens: float, travel: Travel = PLAIN, **options: object
) -> dict[int, StepTime]:
    """`step_time` by ranks where the work stays: all ranks share `tokens` tokens."""
    return {layout.n_ranks: step_time(cluster, model, layout, tokens, travel, **options) for layout in layouts}
