"""Right answers to chapter 4 in three styles, and each of its mistakes in two forms: plain loops, and vectorised."""

import bisect
import math
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from moe_lab.records import DispatchPlan

# 4.1: ends by counting in a loop, and by comparing every row with every expert.


def int32(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def count_in_loop(sorted_experts, n_experts):
    counts = [0] * n_experts
    for expert in sorted_experts.tolist():
        counts[expert] += 1
    return counts


def ends_in_loop(sorted_experts, n_experts):
    ends, total = [], 0
    for count in count_in_loop(sorted_experts, n_experts):
        total += count
        ends.append(total)
    return ends


def ends_compared(sorted_experts, n_experts):
    """Row r lies before the end of expert e if its id is at most e."""
    return (sorted_experts[:, None] <= torch.arange(n_experts)).sum(0, dtype=torch.int32)


def ends_bisected(sorted_experts, n_experts):
    listed = sorted_experts.tolist()
    return int32([bisect.bisect_right(listed, expert) for expert in range(n_experts)])


def busy_ends_loop(sorted_experts, n_experts):
    listed = sorted_experts.tolist()
    return int32([r + 1 for r, e in enumerate(listed) if r + 1 == len(listed) or listed[r + 1] != e])


def ends_up_to_largest_loop(sorted_experts, n_experts):
    largest = max(sorted_experts.tolist(), default=-1)
    return int32(ends_in_loop(sorted_experts, largest + 1))


# 4.2: plans by a loop over experts and choices, and by sorting keys without equals.


def plan_loop(
    read=lambda experts: [int(expert) for token in experts for expert in token],
    visit=lambda n_experts: range(n_experts),
    scan=lambda n: range(n),
    carries=lambda choice, top_k: choice,
    travels=lambda row, place: row,
    end=lambda total, count: total,
    exchange=False,
    invert=True,
):
    """A plan made row by row, with any of its steps done in another way."""

    def answer(routing):
        experts, top_k = read(routing.topk_experts), routing.topk_experts.shape[1]
        row_choices, choice_rows, counts = [], [0] * len(experts), [0] * routing.n_experts
        for expert in visit(routing.n_experts):
            for choice in scan(len(experts)):
                if experts[choice] == expert:
                    choice_rows[choice] = travels(len(row_choices), counts[expert])
                    row_choices.append(choice)
                    counts[expert] += 1
        ends = [end(sum(counts[: e + 1]), counts[e]) for e in range(routing.n_experts)]
        if not invert:
            choice_rows = list(row_choices)
        if exchange:
            row_choices, choice_rows = choice_rows, row_choices
        return DispatchPlan(
            torch.tensor([carries(choice, top_k) for choice in row_choices]),
            torch.tensor(choice_rows).view(routing.topk_experts.shape),
            int32(ends),
        )

    return answer


def plan_by_keys(
    key=lambda flat, ids: flat * len(flat) + ids,
    flat_of=lambda experts: experts.reshape(-1),
    rows_of=lambda order, flat: order.argsort(),
    choices_of=lambda order, top_k: order,
    offsets_of=lambda flat, n: ends_compared(flat, n),
    finish=lambda row_choices, choice_rows: (row_choices, choice_rows),
):
    """A plan from one sort of keys of which no two are equal."""

    def answer(routing):
        experts = routing.topk_experts
        flat = flat_of(experts)
        order = key(flat, torch.arange(len(flat))).argsort()
        row_choices, choice_rows = finish(choices_of(order, experts.shape[1]), rows_of(order, flat))
        return DispatchPlan(row_choices, choice_rows.view(experts.shape), offsets_of(flat, routing.n_experts))

    return answer


def plan_by_nonzero(routing):
    """Expert by expert in one look-up: `nonzero` lists the places row by row, so it is stable by itself."""
    experts = routing.topk_experts
    is_chosen = experts.flatten() == torch.arange(routing.n_experts)[:, None]  # (E, T·K)
    row_choices = is_chosen.nonzero()[:, 1]
    choice_rows = torch.zeros_like(row_choices)
    choice_rows[row_choices] = torch.arange(len(row_choices))
    ends = is_chosen.sum(1).cumsum(0, dtype=torch.int32)
    return DispatchPlan(row_choices=row_choices, choice_rows=choice_rows.reshape(experts.shape), offsets=ends)


def place_within(order, flat):
    """For every choice its place among the choices of the same expert."""
    earlier = torch.tril(flat[:, None] == flat, diagonal=-1)
    return earlier.sum(1)


def bisected_unsorted_loop(routing):
    right = plan_by_nonzero(routing)
    listed = [int(expert) for token in routing.topk_experts for expert in token]
    ends = [bisect.bisect_right(listed, expert) for expert in range(routing.n_experts)]
    return DispatchPlan(right.row_choices, right.choice_rows, int32(ends))


def ids_listed_loop(routing):
    right = plan_by_nonzero(routing)
    listed = sorted(int(expert) for token in routing.topk_experts for expert in token)
    return DispatchPlan(torch.tensor(listed), right.choice_rows, right.offsets)


def cut_by_slots_loop(routing):
    right = plan_by_nonzero(routing)
    n_tokens, top_k = right.choice_rows.shape
    listed = right.choice_rows.flatten().tolist()
    cut = [[listed[slot * n_tokens + t] for slot in range(top_k)] for t in range(n_tokens)]
    return DispatchPlan(right.row_choices, torch.tensor(cut), right.offsets)


def slot_major(plan):
    n_tokens, top_k = plan.choice_rows.shape
    return replace(plan, choice_rows=plan.choice_rows.reshape(top_k, n_tokens).transpose(0, 1))


# 4.3: copies row by row, by a look-up, and by a product with a table of ones.


def copy_in_loop(token_of):
    def answer(tokens, plan):
        n_tokens, top_k = plan.choice_rows.shape
        rows = []
        for choice in plan.row_choices.tolist():
            rows.append(tokens[token_of(choice, top_k, n_tokens, len(plan.offsets))])
        return torch.stack(rows)

    return answer


def copy_by_product(owner_of):
    """Rows as a product of ones and zeros with the tokens."""

    def answer(tokens, plan):
        owners = owner_of(plan)
        if owners.max() >= len(tokens):
            raise IndexError("no such token")
        return F.one_hot(owners, len(tokens)).to(tokens.dtype) @ tokens

    return answer


def copy_repeated(tokens, plan):
    """K copies of every token in place, then all of them sorted at once."""
    copies = tokens[:, None, :].expand(-1, plan.choice_rows.shape[1], -1).flatten(0, 1)
    return copies.index_select(0, plan.row_choices)


def scattered_loop(tokens, plan):
    """Each row's content is put where its choice is, in place of the other way round."""
    top_k = plan.choice_rows.shape[1]
    rows = [None] * plan.n_rows
    for row, choice in enumerate(plan.row_choices.tolist()):
        rows[choice] = tokens[row // top_k]
    return torch.stack(rows)


SIX_BY_HAND = torch.arange(10.0, 70.0, 10.0).unsqueeze(1)  # the notebook's x


def toy_in_loop(tokens, plan):
    top_k = plan.choice_rows.shape[1]
    return torch.stack([SIX_BY_HAND[choice // top_k] for choice in plan.row_choices.tolist()])


def divided_in_loop(tokens, plan):
    top_k = plan.choice_rows.shape[1]
    return torch.stack([tokens[choice / top_k] for choice in plan.row_choices.tolist()])


def row_numbers_loop(tokens, plan):
    return torch.stack([torch.stack([tokens[row] for row in slots]) for slots in plan.choice_rows.tolist()])


# 4.4: products slice by slice, row by row, and of all rows with all matrices.


def product_by_slices(rows, weights, offsets):
    start, parts = 0, []
    for expert, end in enumerate(offsets.tolist()):
        parts.append(F.linear(rows[start:end], weights[expert]))
        start = end
    return torch.cat(parts)


def product_of_owners(owner_of, of_row=lambda row, w: w @ row):
    """Each row alone with the matrix of its owner."""

    def answer(rows, weights, offsets):
        ends = offsets.tolist()
        return torch.stack([of_row(row, weights[owner_of(r, ends)]) for r, row in enumerate(rows)])

    return answer


def product_of_all(chosen):
    """Every row with every matrix, of which `chosen(R, offsets)` keeps one a row: (R, E)."""

    def answer(rows, weights, offsets):
        products = torch.einsum("ri,eoi->reo", rows, weights)
        kept = chosen(torch.arange(len(rows)), offsets)
        return torch.einsum("reo,re->ro", products, kept.to(rows.dtype))

    return answer


def product_into_empty(rows, weights, offsets):
    y = rows.new_zeros(len(rows), weights.shape[1])
    ends = offsets.long()
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    for w, begin, end in zip(weights, begins, ends, strict=True):
        y[begin:end] = rows[begin:end].matmul(w.T)
    return y


def starts_loop(rows, weights, offsets):
    ends = [*offsets.tolist(), len(rows)]
    parts = []
    for expert in range(len(weights)):
        parts.append(F.linear(rows[ends[expert] : ends[expert + 1]], weights[expert]))
    return torch.cat(parts)


def starts_by_owner(rows, weights, offsets):
    ids = torch.arange(int(offsets[0]), len(rows))
    owners = torch.searchsorted(offsets, ids, right=True) - 1
    return torch.einsum("ri,roi->ro", rows[ids], weights[owners])


def first_lost_loop(rows, weights, offsets):
    parts = []
    for expert in range(len(weights)):
        parts.append(rows[offsets[expert - 1] : offsets[expert]] @ weights[expert].mT)
    return torch.cat(parts)


def first_lost_by_owner(rows, weights, offsets):
    ids = torch.arange(int(offsets[0]), len(rows))
    return torch.einsum("ri,roi->ro", rows[ids], weights[torch.searchsorted(offsets, ids, right=True)])


def first_zero_loop(rows, weights, offsets):
    y = torch.zeros(len(rows), weights.shape[1])
    for expert in range(len(weights)):
        place = slice(offsets[expert - 1], offsets[expert])
        y[place] = F.linear(rows[place], weights[expert])
    return y


def first_zero_by_owner(rows, weights, offsets):
    return F.pad(first_lost_by_owner(rows, weights, offsets), (0, 0, int(offsets[0]), 0))


def sizes_loop(rows, weights, offsets):
    start, parts = 0, []
    for expert, size in enumerate(offsets.tolist()):
        parts.append(F.linear(rows[start : start + size], weights[expert]))
        start += size
    return torch.cat(parts)


def sizes_by_owner(rows, weights, offsets):
    owners = torch.searchsorted(offsets.cumsum(0), torch.arange(len(rows)), right=True)
    return torch.einsum("ri,roi->ro", rows, weights[owners])


def split_loop(rows, weights, offsets):
    parts = []
    for expert, part in enumerate(torch.split(rows, [int(end) for end in offsets])):
        parts.append(F.linear(part, weights[expert]))
    return torch.cat(parts)


def split_comprehended(rows, weights, offsets):
    groups = torch.split_with_sizes(rows, tuple(offsets.tolist()))
    return torch.vstack([torch.einsum("ri,oi->ro", group, w) for group, w in zip(groups, weights, strict=False)])


def busy_loop(rows, weights, offsets):
    borders = sorted({0, *offsets.tolist()})
    parts = [F.linear(rows[a:b], weights[i]) for i, (a, b) in enumerate(pairwise(borders))]
    return torch.cat(parts)


def busy_by_owner(rows, weights, offsets):
    borders = offsets.unique()
    owners = torch.searchsorted(borders[borders > 0], torch.arange(len(rows)), right=True)
    return torch.einsum("ri,roi->ro", rows, weights[owners])


def rows_of_floats_loop(rows, weights, offsets):
    start, parts = 0, []
    for expert, end in enumerate(offsets.tolist()):
        parts += [weights[expert] @ torch.tensor(row) for row in rows[start:end].tolist()]
        start = end
    return torch.stack(parts)


def floats_of_weights_loop(rows, weights, offsets):
    return product_by_slices(rows, torch.tensor(weights.tolist()), offsets)


def from_zero_loop(rows, weights, offsets):
    parts = []
    for expert, end in enumerate(offsets.tolist()):
        parts.append(F.linear(rows[:end], weights[expert]))
    return torch.cat(parts)


def from_zero_gathered(rows, weights, offsets):
    """Every (expert, row) in front of the expert's end."""
    owners, ids = (torch.arange(len(rows)) < offsets[:, None]).nonzero(as_tuple=True)
    return torch.einsum("ri,roi->ro", rows[ids], weights[owners])


def between(begins, ends):
    """Pairs of expert and row for every row from an expert's begin up to its end."""

    def answer(rows, weights, offsets):
        ids = torch.arange(len(rows))
        owners, chosen = ((ids >= begins(offsets)[:, None]) & (ids < ends(offsets)[:, None])).nonzero(as_tuple=True)
        return torch.einsum("ri,roi->ro", rows[chosen], weights[owners])

    return answer


def begins_of(offsets):
    return F.pad(offsets[:-1], (1, 0))


def running_start_loop(rows, weights, offsets):
    start, parts = 0, []
    for expert, end in enumerate(offsets.tolist()):
        parts.append(F.linear(rows[start:end], weights[expert]))
        start += end
    return torch.cat(parts)


def end_from_start_loop(rows, weights, offsets):
    start, parts = 0, []
    for expert, end in enumerate(offsets.tolist()):
        parts.append(F.linear(rows[start : start + end], weights[expert]))
        start = end
    return torch.cat(parts)


def end_included_loop(rows, weights, offsets):
    start, parts = 0, []
    for expert, end in enumerate(offsets.tolist()):
        parts.append(F.linear(rows[start : end + 1], weights[expert]))
        start = end
    return torch.cat(parts)


def inside(row_ids, offsets):
    """(R, E) whether a row is an expert's."""
    begins = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    return (row_ids[:, None] >= begins) & (row_ids[:, None] < offsets)


def first_at_or_after(row_ids, offsets):
    """(R, E) one-hot: the first expert whose end is at the row or after it."""
    reached = row_ids[:, None] <= offsets
    return reached & (reached.cumsum(1) == 1)


# 4.5: sums token by token, and in einsum.


def combine_loop(
    row_of=lambda plan, t, slot: int(plan.choice_rows[t, slot]),
    weight_of=lambda weights, plan, t, slot, row: weights[t, slot],
    add=lambda total, part: total + part,
    slots=lambda top_k: range(top_k),
    finish=lambda total, weights: total,
):
    """Token by token and slot by slot."""

    def answer(rows, plan, weights):
        n_tokens, top_k = plan.choice_rows.shape
        y = []
        for t in range(n_tokens):
            total = torch.zeros_like(rows[0])
            for slot in slots(top_k):
                row = row_of(plan, t, slot)
                total = add(total, weight_of(weights, plan, t, slot, row) * rows[row])
            y.append(finish(total, weights[t]))
        return torch.stack(y)

    return answer


def combine_einsum(rows_of=lambda rows, plan: rows[plan.choice_rows], weights_of=lambda weights: weights, equation=""):
    def answer(rows, plan, weights):
        return torch.einsum(equation or "tkd,tk->td", rows_of(rows, plan), weights_of(weights))

    return answer


def combine_added(rows, plan, weights):
    """Every row weighed where it stands, and added to its token."""
    weighted = rows * weights.flatten()[plan.row_choices][:, None]
    y = rows.new_zeros(len(plan.choice_rows), rows.shape[1])
    return y.index_add(0, plan.row_choices // plan.choice_rows.shape[1], weighted)


def combine_as_product(rows, plan, weights):
    """The whole of it as one (T, R) matrix of weights."""
    table = torch.zeros(len(weights), len(rows)).scatter(1, plan.choice_rows, weights)
    return table @ rows


def overwritten_loop(rows, plan, weights):
    top_k = plan.choice_rows.shape[1]
    y = [None] * len(plan.choice_rows)
    for row, choice in enumerate(plan.row_choices.tolist()):
        token, slot = divmod(choice, top_k)
        y[token] = weights[token, slot] * rows[row]
    return torch.stack(y)


def overwritten_by_index(rows, plan, weights):
    tokens = plan.row_choices // plan.choice_rows.shape[1]
    y = torch.zeros(len(weights), rows.shape[1])
    y[tokens] += rows * weights.flatten()[plan.row_choices, None]
    return y


def token_order_loop(rows, plan, weights):
    listed = weights.flatten()
    weighted = [listed[r] * row for r, row in enumerate(rows)]
    return torch.stack([sum(weighted[r] for r in slots) for slots in plan.choice_rows.tolist()])


def token_order_added(rows, plan, weights):
    y = torch.zeros(len(weights), rows.shape[1])
    return y.index_add(0, plan.row_choices // weights.shape[1], weights.flatten()[:, None] * rows)


def not_summed_loop(rows, plan, weights):
    slots = range(weights.shape[1])
    return torch.stack(
        [torch.stack([weights[t, k] * rows[plan.choice_rows[t, k]] for k in slots]) for t in range(len(weights))]
    )


def combine_loop_of_floats(rows, plan, weights):
    return combine_loop()(torch.tensor(rows.tolist()), plan, weights)


def sum_thrown_away_loop(rows, plan, weights):
    y = torch.zeros(len(weights), rows.shape[1])
    for t, slots in enumerate(plan.choice_rows.tolist()):
        for slot, row in enumerate(slots):
            y[t].add(weights[t, slot] * rows[row])
    return y


def sum_thrown_away_added(rows, plan, weights):
    y = torch.zeros(len(weights), rows.shape[1])
    y.index_add(0, plan.row_choices // weights.shape[1], rows * weights.flatten()[plan.row_choices, None])
    return y


def missing_dimension_loop(rows, plan, weights):
    """Each slot's table of weights, all tokens', times each token's own rows."""
    return torch.stack([(rows[slots] * weights).sum(0) for slots in plan.choice_rows.unbind()])


def middle_dimension_loop(rows, plan, weights):
    return torch.stack([(rows[slots] * weights[t]).sum(0) for t, slots in enumerate(plan.choice_rows.tolist())])


def summed_tokens_loop(rows, plan, weights):
    y = []
    for slot in range(weights.shape[1]):
        y.append(sum(weights[t, slot] * rows[row] for t, row in enumerate(plan.choice_rows[:, slot].tolist())))
    return torch.stack(y)


def summed_width_loop(rows, plan, weights):
    sums = []
    for t, slots in enumerate(plan.choice_rows.tolist()):
        sums.append(torch.stack([weights[t, slot] * rows[row].sum() for slot, row in enumerate(slots)]))
    return torch.stack(sums)


# 4.6: the queue walked through choice by choice, and counted with earlier equals.


def rounded_up(routing, factor):
    n_tokens, top_k = routing.topk_experts.shape
    return math.ceil(factor * n_tokens * top_k / routing.n_experts)


def slot_by_slot(n_tokens, top_k):
    return [(t, slot) for slot in range(top_k) for t in range(n_tokens)]


def token_by_token(n_tokens, top_k):
    return [(t, slot) for t in range(n_tokens) for slot in range(top_k)]


def dropped_loop(capacity=rounded_up, queue=slot_by_slot, extra=0, counter=lambda expert, slot: expert):
    """The queue served choice by choice; `counter` says who counts together."""

    def answer(routing, capacity_factor):
        n_tokens, top_k = routing.topk_experts.shape
        dropped = torch.zeros(n_tokens, top_k, dtype=torch.bool)
        served = {}
        for t, slot in queue(n_tokens, top_k):
            whose = counter(int(routing.topk_experts[t, slot]), slot)
            if served.get(whose, 0) >= capacity(routing, capacity_factor) + extra:
                dropped[t, slot] = True
            served[whose] = served.get(whose, 0) + 1
        return dropped

    return answer


def dropped_compared(
    rank_of=lambda t, slot, n_tokens, top_k: slot * n_tokens + t,
    limit=lambda n, factor, n_experts, top_k: math.ceil(n * factor / n_experts),
    judge=lambda earlier, limit: earlier >= limit,
    together=lambda slot: torch.ones(len(slot), len(slot), dtype=torch.bool),
    shape=lambda dropped, n_tokens, top_k: dropped.view(n_tokens, top_k),
):
    """Every choice counts the choices of the same expert that rank before it."""

    def answer(routing, capacity_factor):
        n_tokens, top_k = routing.topk_experts.shape
        flat, ids = routing.topk_experts.flatten(), torch.arange(n_tokens * top_k)
        rank = rank_of(ids // top_k, ids % top_k, n_tokens, top_k)
        rivals = (flat[:, None] == flat) & (rank < rank[:, None]) & together(ids % top_k)
        most = limit(len(flat), capacity_factor, routing.n_experts, top_k)
        return shape(judge(rivals.sum(1), most), n_tokens, top_k)

    return answer


def dropped_by_one_hot(routing, capacity_factor):
    experts = routing.topk_experts
    n_tokens, top_k = experts.shape
    capacity = math.ceil(experts.numel() / routing.n_experts * capacity_factor)
    queue = experts.T.flatten()
    places = F.one_hot(queue, routing.n_experts).cumsum(0)[torch.arange(len(queue)), queue] - 1
    return (places >= capacity).view(top_k, n_tokens).T


def dropped_by_sort(routing, capacity_factor):
    experts = routing.topk_experts
    queue = experts.T.reshape(-1)
    order = queue.argsort(stable=True)
    counts = torch.bincount(queue, minlength=routing.n_experts)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(queue)) - (counts.cumsum(0) - counts)[queue[order]]
    capacity = rounded_up(routing, capacity_factor)
    return capacity <= places.view(experts.T.shape).T


def rounded_down(routing, factor):
    return int(factor * routing.topk_experts.numel() / routing.n_experts)


def of_tokens(routing, factor):
    return math.ceil(len(routing.topk_experts) * factor / routing.n_experts)


def up_too_early(routing, factor):
    return math.ceil(routing.topk_experts.numel() / routing.n_experts) * factor


def without_factor(routing, factor):
    return -(-routing.topk_experts.numel() // routing.n_experts)


def two_orders_loop(routing, capacity_factor):
    n_tokens, top_k = routing.topk_experts.shape
    verdicts = dropped_loop(queue=token_by_token)(routing, capacity_factor).flatten().tolist()
    return torch.tensor([[verdicts[slot * n_tokens + t] for slot in range(top_k)] for t in range(n_tokens)])


def none_dropped_loop(routing, capacity_factor):
    capacity = rounded_up(routing, capacity_factor)
    dropped = []
    for slots in routing.topk_experts.tolist():
        served = {}  # begun anew for every token
        dropped.append([served.get(expert, 0) >= capacity for expert in slots])
    return torch.tensor(dropped)


def none_dropped_across(routing, capacity_factor):
    queue = routing.topk_experts.T.flatten()
    places = F.one_hot(queue, routing.n_experts).cumsum(1).gather(1, queue[:, None]) - 1
    return (places >= rounded_up(routing, capacity_factor)).view(routing.topk_experts.T.shape).T


def whole_token_loop(routing, capacity_factor):
    return torch.tensor([[any(slots)] * len(slots) for slots in dropped_by_sort(routing, capacity_factor).tolist()])


def kept_loop(routing, capacity_factor):
    return torch.tensor([[not lost for lost in slots] for slots in dropped_by_sort(routing, capacity_factor).tolist()])


def queue_order_loop(routing, capacity_factor):
    n_tokens, top_k = routing.topk_experts.shape
    verdicts = dropped_by_sort(routing, capacity_factor).tolist()
    listed = [verdicts[t][slot] for t, slot in slot_by_slot(n_tokens, top_k)]
    return torch.tensor([listed[t * top_k : (t + 1) * top_k] for t in range(n_tokens)])


RIGHT = {
    "4.1": [
        lambda sorted_experts, n_experts: int32(ends_in_loop(sorted_experts, n_experts)),
        ends_compared,
        ends_bisected,
        lambda sorted_experts, n_experts: torch.bincount(sorted_experts, minlength=n_experts).cumsum(0).to(torch.int32),
    ],
    "4.2": [plan_loop(), plan_by_keys(), plan_by_nonzero],
    "4.3": [
        copy_in_loop(lambda choice, top_k, n_tokens, n_experts: choice // top_k),
        copy_by_product(lambda plan: plan.row_choices // plan.choice_rows.shape[1]),
        copy_repeated,
        lambda tokens, plan: tokens[plan.row_tokens],
    ],
    "4.4": [
        product_by_slices,
        product_of_owners(lambda r, ends: next(e for e, end in enumerate(ends) if r < end)),
        product_of_all(inside),
        product_into_empty,
    ],
    "4.5": [combine_loop(), combine_einsum(), combine_added, combine_as_product],
    "4.6": [dropped_loop(), dropped_compared(), dropped_by_one_hot, dropped_by_sort],
}

WRONG = {
    "4.1": {
        "starts in place of ends": [
            lambda sorted_experts, n_experts: int32([0, *ends_in_loop(sorted_experts, n_experts)][:-1]),
            lambda sorted_experts, n_experts: (sorted_experts[:, None] < torch.arange(n_experts)).sum(0).int(),
        ],
        "counts in place of ends": [
            lambda sorted_experts, n_experts: int32(count_in_loop(sorted_experts, n_experts)),
            lambda sorted_experts, n_experts: F.one_hot(sorted_experts, n_experts).sum(0).int(),
        ],
        "experts at the end forgotten": [
            ends_up_to_largest_loop,
            lambda sorted_experts, n_experts: ends_compared(
                sorted_experts, int(sorted_experts.max()) + 1 if len(sorted_experts) else 0
            ),
        ],
        "experts without rows left out": [
            busy_ends_loop,
            lambda sorted_experts, n_experts: (
                torch.unique(sorted_experts, return_counts=True)[1].cumsum(0).to(torch.int32)
            ),
        ],
        "a zero in front": [
            lambda sorted_experts, n_experts: int32([0, *ends_in_loop(sorted_experts, n_experts)]),
            lambda sorted_experts, n_experts: (sorted_experts[:, None] < torch.arange(n_experts + 1)).sum(0).int(),
        ],
        "the last end left out": [
            lambda sorted_experts, n_experts: int32(ends_in_loop(sorted_experts, n_experts)[:-1]),
            lambda sorted_experts, n_experts: ends_compared(sorted_experts, n_experts - 1),
        ],
        "the last row in place of the end": [
            lambda sorted_experts, n_experts: int32([end - 1 for end in ends_in_loop(sorted_experts, n_experts)]),
            lambda sorted_experts, n_experts: ends_compared(sorted_experts, n_experts).sub(1),
        ],
        "64 bits in place of 32": [
            lambda sorted_experts, n_experts: torch.tensor(ends_in_loop(sorted_experts, n_experts)),
            lambda sorted_experts, n_experts: torch.searchsorted(sorted_experts, torch.arange(n_experts), right=True),
        ],
    },
    "4.2": {
        "the two tables are exchanged": [
            plan_loop(exchange=True),
            plan_by_keys(finish=lambda row_choices, choice_rows: (choice_rows, row_choices)),
        ],
        "the inverse is missing": [plan_loop(invert=False), plan_by_keys(rows_of=lambda order, flat: order)],
        "tokens in place of choices": [
            plan_loop(carries=lambda choice, top_k: choice // top_k),
            plan_by_keys(choices_of=lambda order, top_k: order.div(top_k, rounding_mode="floor")),
        ],
        "experts in place of choices": [
            ids_listed_loop,
            lambda routing: replace(plan_by_nonzero(routing), row_choices=routing.topk_experts.flatten().sort().values),
        ],
        "choice_rows is cut slot by slot": [
            cut_by_slots_loop,
            lambda routing: slot_major(plan_by_nonzero(routing)),
        ],
        "places counted within each expert": [
            plan_loop(travels=lambda row, place: place),
            plan_by_keys(rows_of=place_within),
        ],
        "sorted from the last expert to the first": [
            plan_loop(visit=lambda n_experts: range(n_experts)[::-1]),
            plan_by_keys(key=lambda flat, ids: ids - flat * len(flat)),
        ],
        "the sort is not stable": [
            plan_loop(scan=lambda n: range(n)[::-1]),
            plan_by_keys(key=lambda flat, ids: flat * len(flat) + ids * 77 % len(flat)),  # any other order
        ],
        "choices numbered slot by slot": [
            plan_loop(read=lambda experts: [int(expert) for slot in experts.T for expert in slot]),
            plan_by_keys(flat_of=lambda experts: experts.t().reshape(-1)),
        ],
        "counts in place of offsets": [
            plan_loop(end=lambda total, count: count),
            plan_by_keys(offsets_of=lambda flat, n: F.one_hot(flat, n).sum(0, dtype=torch.int32)),
        ],
        "offsets of the list before it was sorted": [
            bisected_unsorted_loop,
            plan_by_keys(
                offsets_of=lambda flat, n: torch.searchsorted(flat, torch.arange(n), right=True, out_int32=True)
            ),
        ],
    },
    "4.3": {
        "the notebook's x in place of `tokens`": [
            toy_in_loop,
            lambda tokens, plan: copy_by_product(lambda plan: plan.row_tokens)(SIX_BY_HAND, plan),
        ],
        "a division that leaves fractions": [
            divided_in_loop,
            lambda tokens, plan: tokens.index_select(0, plan.row_choices / plan.choice_rows.shape[1]),
        ],
        "K taken as 2": [
            copy_in_loop(lambda choice, top_k, n_tokens, n_experts: choice // 2),
            copy_by_product(lambda plan: plan.row_choices.div(2, rounding_mode="floor")),
        ],
        "rows taken for tokens": [row_numbers_loop, lambda tokens, plan: F.embedding(plan.choice_rows, tokens)],
        "choices taken for tokens": [
            lambda tokens, plan: torch.stack([tokens[choice] for choice in plan.row_choices.tolist()]),
            lambda tokens, plan: tokens[plan.row_choices, :],
        ],
        "the remainder in place of the quotient": [
            copy_in_loop(lambda choice, top_k, n_tokens, n_experts: choice % top_k),
            copy_by_product(lambda plan: plan.row_choices.remainder(plan.choice_rows.shape[1])),
        ],
        "divided by the number of experts": [
            copy_in_loop(lambda choice, top_k, n_tokens, n_experts: choice // n_experts),
            copy_by_product(lambda plan: plan.row_choices.div(len(plan.offsets), rounding_mode="floor")),
        ],
        "choices taken as numbered slot by slot": [
            copy_in_loop(lambda choice, top_k, n_tokens, n_experts: choice % n_tokens),
            copy_by_product(lambda plan: plan.row_choices.remainder(plan.choice_rows.shape[0])),
        ],
        "the inverse permutation": [
            scattered_loop,
            copy_by_product(lambda plan: plan.row_choices.argsort() // plan.choice_rows.shape[1]),
        ],
        "copies in the order of the tokens": [
            lambda tokens, plan: torch.stack([token for token in tokens for _ in range(plan.choice_rows.shape[1])]),
            copy_by_product(lambda plan: torch.arange(plan.n_rows) // plan.choice_rows.shape[1]),
        ],
        "the list of tokens repeated": [
            lambda tokens, plan: torch.cat([tokens for _ in range(plan.choice_rows.shape[1])]),
            copy_by_product(lambda plan: torch.arange(plan.n_rows) % len(plan.choice_rows)),
        ],
    },
    "4.4": {
        "torch's own product": [
            lambda rows, weights, offsets: F.grouped_mm(rows, weights.transpose(1, 2), offs=offsets),
            lambda rows, weights, offsets: F.grouped_mm(rows + 0, weights.clone().mT, offs=offsets.clone()),
        ],
        "the rows cut off from their gradient": [
            rows_of_floats_loop,
            lambda rows, weights, offsets: product_of_all(inside)(rows.data, weights, offsets),
        ],
        "the matrices cut off from their gradient": [
            floats_of_weights_loop,
            lambda rows, weights, offsets: product_of_all(inside)(rows, weights.data, offsets),
        ],
        "the start is never moved": [from_zero_loop, from_zero_gathered],
        "the end added to the start": [
            running_start_loop,
            between(lambda offsets: begins_of(offsets.cumsum(0)), lambda offsets: offsets),
        ],
        "the end counted from the start": [
            end_from_start_loop,
            between(begins_of, lambda offsets: begins_of(offsets) + offsets),
        ],
        "the end included": [end_included_loop, between(begins_of, lambda offsets: offsets + 1)],
        "split by the ends": [split_loop, split_comprehended],
        "ends taken for sizes": [sizes_loop, sizes_by_owner],
        "ends taken for starts": [starts_loop, starts_by_owner],
        "the first group lost": [first_lost_loop, first_lost_by_owner],
        "the first group left at zero": [first_zero_loop, first_zero_by_owner],
        "weights not transposed": [
            product_of_owners(
                lambda r, ends: sum(end <= r for end in ends), of_row=lambda row, w: (row[:, None] * w).sum(0)
            ),
            lambda rows, weights, offsets: product_of_all(inside)(rows, weights.transpose(1, 2), offsets),
        ],
        "an expert without rows shifts the matrices": [busy_loop, busy_by_owner],
        "off by one at the borders": [
            product_of_owners(lambda r, ends: next(e for e, end in enumerate(ends) if r <= end)),
            product_of_all(first_at_or_after),
        ],
    },
    "4.5": {
        "rows without a gradient": [
            combine_loop_of_floats,
            combine_einsum(rows_of=lambda rows, plan: rows.data[plan.choice_rows]),
        ],
        "the sum is thrown away": [sum_thrown_away_loop, sum_thrown_away_added],
        "a dimension of the weights is missing": [
            missing_dimension_loop,
            lambda rows, plan, weights: (rows[plan.choice_rows] * weights).sum(dim=-2),
        ],
        "the new dimension stands in the middle": [
            middle_dimension_loop,
            lambda rows, plan, weights: (rows[plan.choice_rows] * weights.unsqueeze(1)).sum(dim=-2),
        ],
        "summed over the tokens": [summed_tokens_loop, combine_einsum(equation="tkd,tk->kd")],
        "summed over the numbers of a row": [summed_width_loop, combine_einsum(equation="tkd,tk->tk")],
        "weights without a gradient": [
            combine_loop(weight_of=lambda weights, plan, t, slot, row: float(weights[t, slot])),
            combine_einsum(weights_of=lambda weights: weights.detach()),
        ],
        "weights in the order of the tokens": [token_order_loop, token_order_added],
        "rows taken as they stand": [
            combine_loop(row_of=lambda plan, t, slot: t * plan.choice_rows.shape[1] + slot),
            combine_einsum(rows_of=lambda rows, plan: rows.unflatten(0, plan.choice_rows.shape)),
        ],
        "the permutation in place of its inverse": [
            combine_loop(row_of=lambda plan, t, slot: int(plan.row_choices[t * plan.choice_rows.shape[1] + slot])),
            combine_einsum(rows_of=lambda rows, plan: rows[plan.row_choices].unflatten(0, plan.choice_rows.shape)),
        ],
        "a token's rows overwrite each other": [overwritten_loop, overwritten_by_index],
        "only the first choice comes back": [
            combine_loop(slots=lambda top_k: range(1)),
            lambda rows, plan, weights: weights[:, :1] * rows.index_select(0, plan.choice_rows[:, 0]),
        ],
        "mean in place of sum": [
            combine_loop(finish=lambda total, weights: total / len(weights)),
            combine_einsum(weights_of=lambda weights: weights / weights.shape[1]),
        ],
        "weights left out": [
            combine_loop(weight_of=lambda weights, plan, t, slot, row: 1.0),
            lambda rows, plan, weights: (
                rows.index_select(0, plan.choice_rows.flatten()).unflatten(0, weights.shape).sum(1)
            ),
        ],
        "weights normalised again": [
            combine_loop(finish=lambda total, weights: total / sum(weights)),
            combine_einsum(weights_of=lambda weights: F.normalize(weights, p=1, dim=1)),
        ],
        "not summed": [not_summed_loop, combine_einsum(equation="tkd,tk->tkd")],
    },
    "4.6": {
        "the queue runs by tokens, the way back by slots": [
            two_orders_loop,
            dropped_compared(
                rank_of=lambda t, slot, n_tokens, top_k: t * top_k + slot,
                shape=lambda dropped, n_tokens, top_k: dropped.view(top_k, n_tokens).T,
            ),
        ],
        "places counted from 1": [
            dropped_loop(extra=-1),
            dropped_compared(judge=lambda earlier, limit: earlier + 1 >= limit),
        ],
        "rounded up too early": [
            dropped_loop(capacity=up_too_early),
            dropped_compared(limit=lambda n, factor, n_experts, top_k: -(-n // n_experts) * factor),
        ],
        "the factor is left out": [
            dropped_loop(capacity=without_factor),
            dropped_compared(limit=lambda n, factor, n_experts, top_k: math.ceil(n / n_experts)),
        ],
        "nobody is ever dropped": [none_dropped_loop, none_dropped_across],
        "second choices do not wait": [
            dropped_loop(queue=token_by_token),
            dropped_compared(rank_of=lambda t, slot, n_tokens, top_k: t * top_k + slot),
        ],
        "a counter for every slot": [
            dropped_loop(counter=lambda expert, slot: (expert, slot)),
            dropped_compared(together=lambda slot: slot[:, None] == slot),
        ],
        "the last are kept": [
            dropped_loop(queue=lambda n_tokens, top_k: slot_by_slot(n_tokens, top_k)[::-1]),
            dropped_compared(rank_of=lambda t, slot, n_tokens, top_k: -slot * n_tokens - t),
        ],
        "one too many is kept": [
            dropped_loop(extra=1),
            dropped_compared(judge=lambda earlier, limit: earlier > limit),
        ],
        "the capacity rounded down": [
            dropped_loop(capacity=rounded_down),
            dropped_compared(limit=lambda n, factor, n_experts, top_k: n * factor // n_experts),
        ],
        "the capacity counts tokens": [
            dropped_loop(capacity=of_tokens),
            dropped_compared(limit=lambda n, factor, n_experts, top_k: math.ceil(n // top_k * factor / n_experts)),
        ],
        "kept in place of dropped": [kept_loop, dropped_compared(judge=lambda earlier, limit: earlier < limit)],
        "the whole token is dropped": [
            whole_token_loop,
            dropped_compared(
                shape=lambda dropped, n_tokens, top_k: dropped.view(n_tokens, top_k).amax(1)[:, None].repeat(1, top_k)
            ),
        ],
        "the answer stands in the order of the queue": [
            queue_order_loop,
            dropped_compared(shape=lambda dropped, n_tokens, top_k: dropped.view(n_tokens, top_k).T.reshape(-1, top_k)),
        ],
    },
}
