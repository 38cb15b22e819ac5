"""The mixture-of-experts layer over several ranks: every rank has its own tokens and its own experts.

route → dispatch (rows go to the ranks of their experts) → regroup → experts → combine (and come back). Nobody's weights
travel. Each step is the layer in one process, cut where a row leaves its rank: outputs and gradients are the same.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_lab.dispatch import combine, expert_offsets, permute, sort_choices, weights_of_rows
from moe_lab.moe import MoE
from moe_lab.parallel.placement import Placement, even_placement
from moe_lab.parallel.ranks import Pending, Ranks
from moe_lab.parallel.rows import RowMap, copy_rows, inverse, reorder, sum_rows
from moe_lab.records import Routing
from moe_lab.routing import NotFiniteError

Steps = Generator[None, None, Any]  # stops wherever something is under way
PROBLEMS = (ValueError, NotFiniteError, RuntimeError)  # as which one rank's problem is raised on the others
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAME = (
    "the dtype of x",
    "the dtype of products, under autocast",
    "gradients are enabled",
    "x needs a gradient",
    "the router needs a gradient",
    "the experts need a gradient",
)


class ExpertParallelMoE(MoE):
    """`MoE` with its experts spread over ranks. Each rank gives its own tokens, and gets their outputs.

    Forward and backward are collective: every rank calls them, in the same order, with no tokens if it has none. A
    gradient is that of the sum of all ranks' losses: what another rank's tokens did to an expert is in it already.

    Args:
        layer: the whole layer, alike on every rank. This rank keeps its share of the experts.
        placement: which experts lie where; by default equal parts in order.
        form: what travels.
            "per_assignment": a row for every (token, expert); k rows come back, and are weighed at home.
            "per_rank": a row for every (token, rank), with ids and weights; the experts' sum comes back.
            "across_then_within": a row for every (token, node), forwarded there to each rank that needs it; with
            "within_then_across" it changes place within its node first.
        node_size: how many ranks share a node, for the last two.

    Raises:
        ValueError: on every rank: sizes or a placement that do not fit, a layer that drops tokens or whose experts
            choose, ranks that do not agree.

    Source: Lepikhin et al. 2020 (GShard), section 3.2, for the two all-to-alls; DeepSeek-V3 (2024), section 3.2.2, for
    a row per node, forwarded within it.
    """

    def __init__(
        self,
        layer: MoE,
        ranks: Ranks,
        placement: Placement | None = None,
        *,
        form: str = "per_rank",
        node_size: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        config, weight = layer.config, layer.experts.w_down
        placed = "even" if placement is None else placement.experts
        facts = {"placement": placed, "form": form, "node_size": node_size, "ep_size": ranks.size}
        ranks.agree("the layer of experts", **vars(config), **facts, dtype=weight.dtype, device=weight.device.type)
        if weight.device.type != ranks.device.type:
            raise ValueError(
                f"the layer is on {weight.device}: expected {ranks.device}, where these ranks can send from."
            )
        if placement is None:
            placement = even_placement(config.n_experts, ranks.size)
        _require_fitting(config, placement, ranks, form, node_size)
        self.config, self.ranks, self.placement, self.form = config, ranks, placement, form
        self.router, self.shared = layer.router, layer.shared
        self.experts = layer.experts.take(placement.experts[ranks.rank])
        self._hops = _hops(form, ranks, placement, node_size)

    @property
    def first_slot(self) -> int:
        """The number of this rank's first slot."""
        return self.placement.first_slot(self.ranks.rank)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """This rank's (..., D) to (..., D), and the routing of its tokens.

        Raises:
            ValueError: on every rank, if one was given a wrong input; see `MoE.forward`. Input must be contiguous.
            RankError: a rank is gone, or does not come.
        """
        return run(self.steps(x))

    def steps(self, x: Tensor) -> Steps:
        """`forward`, cut where rows are under way; `run` goes through them, `overlap` through several in turns."""
        tokens, slots, routing = self._route(x)
        deliver = _per_assignment if self.form == "per_assignment" else _per_place
        delivery = deliver(self, tokens, slots, routing.topk_weights)
        next(delivery)  # the dispatch is under way
        if self.shared is not None:
            with self.ranks.stage("shared"):
                shared = self.shared(tokens)
        yield
        y = yield from delivery
        if self.shared is not None:
            y = y + shared
        return y.view_as(x), routing

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """Tokens, the slots of their choices, and the routing; if this fails on one rank, it does on all."""
        problem, found, facts = None, None, [0] * len(SAME)
        with self.ranks.stage("route"):
            try:
                self._require_input(x)
                if not x.is_contiguous():
                    raise ValueError(f"x {tuple(x.shape)} has strides {x.stride()}: expected it contiguous.")
                tokens = x.view(-1, x.shape[-1])  # (T, D)
                routing = self.router(tokens)
                found = tokens, self.placement.choose_slots(routing.topk_experts), routing
                facts = self._facts(x, routing)
            except Exception as error:
                problem = error
            self._require_all_well(problem, facts)
        return found

    def _facts(self, x: Tensor, routing: Routing) -> list[int]:
        """What has to be the same on all ranks, or they would make other calls than each other: `SAME`, as numbers."""
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        types = [x.dtype, torch.get_autocast_dtype(device) if autocast else x.dtype]
        needs = [x, routing.topk_weights, *self.experts.parameters()]
        needs = [needs[0].requires_grad, needs[1].requires_grad, any(weight.requires_grad for weight in needs[2:])]
        return [*(FLOATS.index(kind) for kind in types), torch.is_grad_enabled(), *needs]

    def _require_all_well(self, problem: Exception | None, facts: Sequence[int]) -> None:
        """Raise on every rank what one has met: who goes on alone waits for ever."""
        ranks = self.ranks
        kind = next((n for n, kind in reversed([*enumerate(PROBLEMS, 1)]) if isinstance(problem, kind)), 3)
        mine = torch.tensor([kind if problem else 0, *facts], device=ranks.device)
        kinds, *told = ranks.all_gather(mine).T.tolist()
        if any(kinds):
            texts = ranks.gather_text(str(problem) if problem else "")
            if problem:
                raise problem
            bad = next(r for r, kind in enumerate(kinds) if kind)
            raise PROBLEMS[kinds[bad] - 1](f"Rank {ranks.members[bad]}, in route: {texts[bad]}")
        for what, values in zip(SAME, told, strict=True):
            if len(set(values)) > 1:
                shown = [str(FLOATS[v]) for v in values] if what in SAME[:2] else [bool(v) for v in values]
                listed = ", ".join(f"{v} on rank {member}" for v, member in zip(shown, ranks.members, strict=True))
                raise ValueError(f"{what}: {listed}. Expected the same on all, for they make the same calls.")


def _require_fitting(config: Any, placement: Placement, ranks: Ranks, form: str, node_size: int | None) -> None:
    if form not in FORMS:
        raise ValueError(f"form={form!r}: expected one of {', '.join(FORMS)}.")
    if placement.n_ranks != ranks.size or placement.n_experts != config.n_experts:
        what = f"{placement.n_experts} experts on {placement.n_ranks} ranks"
        raise ValueError(f"placement is of {what}: expected n_experts={config.n_experts} on {ranks.size} ranks.")
    if config.capacity_factor is not None or config.expert_choice:
        what = f"capacity_factor={config.capacity_factor}, expert_choice={config.expert_choice}"
        raise ValueError(f"{what}: expected None and False, for over ranks nothing is dropped, and tokens choose.")
    is_two = form in ("across_then_within", "within_then_across")
    if is_two and (node_size is None or node_size < 1 or ranks.size % node_size):
        raise ValueError(f"node_size={node_size}: form={form!r} needs a divisor of the {ranks.size} ranks.")


def run(steps: Steps) -> Any:
    """Go through the steps to their end, and return what they return."""
    return overlap([steps])[0]


def overlap(several: Sequence[Steps]) -> list:
    """Go through several steps in turns: while one's rows are under way, the next ones compute.

    >>> (y1, routing1), (y2, routing2) = overlap([layer.steps(x1), layer.steps(x2)])  # doctest: +SKIP
    """
    results: dict[int, Any] = {}
    while len(results) < len(several):
        for number, steps in enumerate(several):
            if number not in results:
                try:
                    next(steps)
                except StopIteration as end:
                    results[number] = end.value
    return [results[number] for number in range(len(several))]


# --- rows under way -----------------------------------------------------------------------------------------------


def exchange(
    ranks: Ranks, rows: Tensor, send: Sequence[int], receive: Sequence[int], what: str = "rows"
) -> Callable[[], Tensor]:
    """Start an all-to-all that gradients flow back through, by the same way; call what it returns to get the rows."""
    pending = ranks.start_all_to_all(rows.detach(), send, receive, what)
    return lambda: _Arrive.apply(rows, pending)


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, pending: Pending) -> Tensor:
        # not `pending` itself: it holds what arrived, which holds this, and nothing would be freed in time
        ctx.ranks, ctx.stage = pending.ranks, f"{pending.stage} backward"
        ctx.way_back = pending.receive, pending.send, pending.what
        return pending.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows: Tensor) -> tuple[Tensor, None]:
        with ctx.ranks.stage(ctx.stage):
            return ctx.ranks.all_to_all(d_rows.contiguous(), *ctx.way_back), None


def swap_counts(ranks: Ranks, counts: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
    """Tell every rank how much to expect: the other ranks' counts for this one."""
    return ranks.all_to_all(counts.to(ranks.device), send, receive, "counts")


# --- a row for every assignment -----------------------------------------------------------------------------------


def _per_assignment(layer: ExpertParallelMoE, tokens: Tensor, slots: Tensor, weights: Tensor) -> Steps:
    ranks, placement = layer.ranks, layer.placement
    n_mine, per_rank = placement.slots_per_rank[ranks.rank], list(placement.slots_per_rank)
    with ranks.stage("dispatch"):
        plan = sort_choices(slots, placement.n_slots)  # rows sorted by slot, and so by rank
        rows = permute(tokens, plan)  # (R, D)
        if layer.config.weigh == "input":
            rows = rows * weights_of_rows(weights, plan).to(rows.dtype)
            weights = torch.ones_like(weights)
        counts = plan.offsets.diff(prepend=plan.offsets.new_zeros(1)).long()  # (n_slots,)
        received = swap_counts(ranks, counts, per_rank, [n_mine] * ranks.size).view(ranks.size, n_mine)
        send, receive = [part.sum() for part in counts.split(per_rank)], received.sum(1)
        send, receive = torch.stack([*send, *receive]).view(2, -1).tolist()
        arrive = exchange(ranks, rows, send, receive)
    yield
    rows = arrive()  # (R', D), rank by rank
    with ranks.stage("regroup"):
        order, offsets = by_expert(received)
        rows = reorder(rows, order)  # expert by expert
    with ranks.stage("experts"):
        rows = layer.experts(rows, offsets)
    with ranks.stage("combine"):
        arrive = exchange(ranks, reorder(rows, inverse(order)), receive, send)
    yield
    rows = arrive()  # (R, D), in the order in which they left
    with ranks.stage("combine"):
        return combine(rows, plan, weights)  # (T, D)


def by_expert(received: Tensor) -> tuple[Tensor, Tensor]:
    """The order that sorts arrived rows by expert, (R',), and where each expert's rows end, (E,) int32.

    Args:
        received: (ranks, E) how many rows came from each rank for each of this one's experts. The rows lie rank by
            rank, and within a rank's expert by expert.
    """
    size, n_experts = received.shape
    experts = torch.arange(n_experts, device=received.device).repeat(size)
    chosen, order = experts.repeat_interleave(received.flatten()).sort(stable=True)
    return order, expert_offsets(chosen, n_experts)


# --- a row for every place that a token has to visit --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Choices:
    """What the tokens at hand still have to visit: (A,) each, sorted by token.

    Args:
        tokens: whose choice it is.
        slots: where it goes, as the whole placement numbers them.
        weights: what the expert's output is multiplied by.
    """

    tokens: Tensor
    slots: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Hop:
    """An exchange among some ranks on the way to an expert.

    Args:
        ranks: the group.
        places: (n_slots,) which of the group's ranks is next on the way to each slot.
    """

    ranks: Ranks
    places: Tensor


def _hops(form: str, ranks: Ranks, placement: Placement, node_size: int | None) -> tuple[Hop, ...]:
    owners = placement.slot_ranks.to(ranks.device)
    if form not in ("across_then_within", "within_then_across"):
        return (Hop(ranks, owners),)
    within, across = ranks.split(node_size)
    to_node, to_place = Hop(across, owners // node_size), Hop(within, owners % node_size)
    return (to_node, to_place) if form == "across_then_within" else (to_place, to_node)


def _per_place(layer: ExpertParallelMoE, tokens: Tensor, slots: Tensor, weights: Tensor) -> Steps:
    top_k = slots.shape[1]
    owners = torch.arange(len(tokens), device=slots.device).repeat_interleave(top_k)
    return (yield from _deliver(layer, tokens, Choices(owners, slots.flatten(), weights.flatten()), layer._hops))


def _deliver(layer: ExpertParallelMoE, tokens: Tensor, choices: Choices, hops: Sequence[Hop]) -> Steps:
    """The weighted sum of what each token's choices give, (T, D) to (T, D), wherever the experts are."""
    if not hops:
        with layer.ranks.stage("experts"):
            return _visit(layer, tokens, choices)
    hop, *rest = hops
    ranks, size, n_tokens = hop.ranks, hop.ranks.size, len(tokens)
    with ranks.stage("dispatch"):
        places = hop.places[choices.slots]  # (A,)
        visits = torch.zeros(size, n_tokens, dtype=torch.bool, device=tokens.device)
        visits[places, choices.tokens] = True  # however many choices lie there, a token goes once
        row_tokens = visits.nonzero()[:, 1]  # (R,), place by place
        numbers = visits.cumsum(1) - 1  # (size, T) which of a place's rows carries the token
        n_choices = choices.tokens.new_zeros(size).scatter_add_(0, places, torch.ones_like(places))
        counts = torch.stack([visits.sum(1), n_choices], 1)  # (size, 2)
        received = swap_counts(ranks, counts, [1] * size, [1] * size)
        (send, send_choices), (receive, receive_choices) = counts.T.tolist(), received.T.tolist()
        order = places.argsort(stable=True)
        ids = torch.stack([numbers[places, choices.tokens], choices.slots], 1)[order].int()
        rows = RowMap.of(row_tokens, n_tokens)
        arrive = exchange(ranks, copy_rows(tokens, rows), send, receive)
        arrive_ids = exchange(ranks, ids, send_choices, receive_choices, "ids")
        arrive_weights = exchange(ranks, reorder(choices.weights, order), send_choices, receive_choices, "weights")
    yield
    there = arrive()  # (R', D), source by source
    numbers, slots = arrive_ids().long().unbind(1)
    weights = arrive_weights()
    with ranks.stage("regroup"):
        begins = torch.tensor(receive).cumsum(0) - torch.tensor(receive)
        begins = begins.repeat_interleave(torch.tensor(receive_choices)).to(numbers.device)
    sums = yield from _deliver(layer, there, Choices(numbers + begins, slots, weights), rest)
    with ranks.stage("combine"):
        arrive = exchange(ranks, sums, receive, send)
    yield
    back = arrive()  # (R, D)
    with ranks.stage("combine"):
        return sum_rows(back, rows)


def _visit(layer: ExpertParallelMoE, tokens: Tensor, choices: Choices) -> Tensor:
    """The weighted sum over those of the tokens' experts that are on this rank, (T, D) to (T, D)."""
    chosen, order = (choices.slots - layer.first_slot).sort(stable=True)
    rows = RowMap.of(choices.tokens[order], len(tokens), token_rows=inverse(order))
    offsets = expert_offsets(chosen, layer.placement.slots_per_rank[layer.ranks.rank])
    weights = choices.weights
    values = copy_rows(tokens, rows)
    if layer.config.weigh == "input":
        values = values * reorder(weights, order)[:, None].to(values.dtype)
        return sum_rows(layer.experts(values, offsets), rows)
    return sum_rows(layer.experts(values, offsets), rows, weights)


FORMS = ("per_assignment", "per_rank", "across_then_within", "within_then_across")
