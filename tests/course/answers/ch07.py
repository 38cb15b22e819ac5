"""Right answers to chapter 7 in three styles, and each of its mistakes in two forms: plain loops, and vectorised."""

from collections import Counter

import torch
import torch.nn.functional as F

# 7.1: counts in a loop over choices, and by comparing every choice with every expert.


def count_in_loop(
    choices=lambda ids: [expert for token in ids.tolist() for expert in token],
    place=lambda expert, rank, local, own, n_ranks: (rank, local),
    most=None,
    finish=lambda table: table,
):
    """One choice after the other; `place` says where in the table it is counted."""

    def answer(topk_experts, experts):
        n_ranks, own = len(experts), len(experts[0])
        table = [[0] * own for _ in range(n_ranks)]
        where = {expert: (r, j) for r, held in enumerate(experts) for j, expert in enumerate(held)}
        for expert in choices(topk_experts):
            rank, local = place(expert, *where[expert], own, n_ranks)
            table[rank][local] = most or table[rank][local] + 1
        return finish(torch.tensor(table))

    return answer


def count_compared(of=lambda experts: torch.tensor(experts), ids=lambda ids: ids, finish=lambda table: table):
    """(ranks, own, choices) comparisons, summed."""

    def answer(topk_experts, experts):
        wanted = of(experts)
        return finish((wanted[..., None] == ids(topk_experts).reshape(-1)).sum(-1))

    return answer


def count_by_counter(topk_experts, experts):
    counter = Counter(topk_experts.flatten().tolist())
    return torch.tensor([[counter[expert] for expert in held] for held in experts])


def in_order(experts):
    return torch.arange(len(experts) * len(experts[0])).view(len(experts), -1)


def dealt(experts):
    return torch.arange(len(experts) * len(experts[0])).view(-1, len(experts)).T


def count_in_eight_ones(topk_experts, experts):
    """A table of eight zeros, to which ones are added."""
    ids = topk_experts.reshape(-1)
    return torch.zeros(8, dtype=torch.int64).index_add(0, ids, torch.ones_like(ids))[torch.tensor(experts)]


def count_in_eight_by_hand(topk_experts, experts):
    counts = torch.tensor([sum(e == chosen for chosen in topk_experts.flatten().tolist()) for e in range(8)])
    return counts[torch.tensor(experts)]


def count_unique(topk_experts, experts):
    """As many places as the highest id that was chosen asks for."""
    counts = torch.zeros(int(topk_experts.max()) + 1 if topk_experts.numel() else 0, dtype=torch.int64)
    for expert in topk_experts.flatten().tolist():
        counts[expert] += 1
    return counts[torch.tensor(experts)]


def sorted_by_modulo(experts):
    """For each rank and each remainder the expert of that rank; -1 where there is none, and several are added."""
    own = len(experts[0])
    return [[[e for e in held if e % own == j] for j in range(own)] for held in experts]


def counts_mixed_vectorised(topk_experts, experts):
    counts = F.one_hot(topk_experts, len(experts) * len(experts[0])).sum((0, 1)).tolist()
    groups = sorted_by_modulo(experts)
    return torch.tensor([[sum(counts[e] for e in group) for group in rank] for rank in groups])


# 7.2: dispatch with Python lists, and with tensors; the exchange itself is the ranks'.


def dispatch_listed(
    theirs=lambda mine, got, rank: got,
    number=lambda table, r: sum(table[r]),
    order=lambda send, receive: (send, receive),
    leave=False,
    given=lambda send: send,
    back=lambda arrived, rows: arrived,
    told=lambda mine, got: got,
):
    """Counts as nested lists; every step can be done otherwise."""

    def answer(rows, counts, ranks):
        if leave and rows.shape[0] == 0:
            return rows.clone(), counts.clone()
        got = ranks.all_to_all(counts.clone()).tolist()
        mine = counts.tolist()
        expected = theirs(mine, got, ranks.rank)
        sizes = max(len(mine), len(mine[0])) if number is by_column else len(mine)
        send = [number(mine, r) for r in range(sizes) if number is not by_column or r < len(mine[0])]
        receive = [number(expected, r) for r in range(sizes) if number is not by_column or r < len(mine[0])]
        send, receive = order(send, receive)
        arrived = ranks.all_to_all(rows, given(send), given(receive))
        return back(arrived, rows), torch.tensor(told(mine, expected))

    return answer


def by_column(table, j):
    return sum(row[j] for row in table)


def dispatch_started(
    splits=lambda sent, got: (sent.sum(-1), got.sum(-1)),
    swap=lambda counts, ranks: ranks.start_all_to_all(counts).wait(),
    result=lambda arrived, rows, sent, got: (arrived, got),
    uncounted=False,
    quits=False,
):
    """The exchange begun, and waited for."""

    def answer(rows, counts, ranks):
        if quits and not counts.any():
            return torch.empty(0, rows.shape[1]), counts * 0
        got = swap(counts, ranks)
        if uncounted:
            pending = ranks.start_all_to_all(rows)
        else:
            first, second = splits(counts, got)
            pending = ranks.start_all_to_all(rows, list(map(int, first)), list(map(int, second)))
        return result(pending.wait(), rows, counts, got)

    return answer


def dispatch_sent_twice_listed(rows, counts, ranks):
    theirs = ranks.all_to_all(counts)
    numbers = [sum(row) for row in counts.tolist()]
    return ranks.all_to_all(rows, send=numbers, receive=numbers), theirs


def dispatch_gathered(rows, counts, ranks):
    """All tables on every rank: each reads its own row of them."""
    tables = ranks.all_gather(counts)  # (from, to, own)
    received = tables[:, ranks.rank].contiguous()
    sizes = tables.sum(2)
    arrived = ranks.all_to_all(rows, sizes[ranks.rank].tolist(), sizes[:, ranks.rank].tolist())
    return arrived, received


# 7.3: orders from a list of lists, and by sorting keys without equals.


def order_listed(
    read=lambda table: [(s, e) for s in range(len(table)) for e in range(len(table[0]))],
    number=lambda s, e, table: e,
    sources=lambda places: places,
    invert=False,
    ids_only=False,
):
    """Rows named one by one, then picked expert by expert."""

    def answer(received):
        table = received.tolist()
        named = [number(s, e, table) for s, e in read(table) for _ in range(table[s][e])]
        if ids_only:
            return torch.tensor(named, dtype=torch.int64)
        order = []
        for wanted in sorted(set(named)):
            order += sources([place for place, name in enumerate(named) if name == wanted])
        if invert:
            order = [order.index(place) for place in range(len(order))]
        return torch.tensor(order, dtype=torch.int64)

    return answer


def order_by_keys(
    grid=lambda received: torch.arange(received.shape[1]).expand(received.shape[0], -1),
    counts=lambda received: received,
    sign=1,
    finish=lambda order: order,
):
    """One sort of keys of which no two are equal."""

    def answer(received):
        names = torch.repeat_interleave(grid(received).flatten(), counts(received).flatten())
        places = torch.arange(len(names))
        return finish((names * (len(names) + 1) + sign * places).argsort())

    return answer


def order_from_begins(received):
    """Where each stretch begins among the arrived rows; stretches listed expert by expert."""
    size, own = received.shape
    ends = received.flatten().cumsum(0).view(size, own)
    stretches = [
        torch.arange(int(ends[s, e] - received[s, e]), int(ends[s, e])) for e in range(own) for s in range(size)
    ]
    return torch.cat(stretches)


def stays(received):
    total = 0
    for row in received.tolist():
        total += sum(row)
    return torch.tensor(list(range(total)), dtype=torch.int64)


def read_by_column_listed(received):
    table, size, own = received.tolist(), *received.shape
    flat = [table[s][e] for e in range(own) for s in range(size)]
    names = [i % own for i, n in enumerate(flat) for _ in range(n)]
    return torch.tensor([p for wanted in range(own) for p, name in enumerate(names) if name == wanted]).long()


def flipped_names(received):
    size, own = received.shape
    return torch.arange(size * own).remainder(size).view(size, own)


# 7.4: the way back with lists, and with tensors.


def combine_listed(
    undo=True,
    again=False,
    number=lambda table, r: sum(table[r]),
    order_of=lambda back, home: (back, home),
    counted=True,
    leave=False,
):
    """Row by row into the places where they arrived."""

    def answer(outputs, order, counts, received, ranks):
        if leave and outputs.shape[0] == 0:
            return torch.zeros(sum(map(sum, counts.tolist())), outputs.shape[1])
        listed = order.tolist()
        rows = [None] * len(listed)
        for place, arrived in enumerate(listed):
            if again:
                rows[place] = outputs[arrived]
            elif undo:
                rows[arrived] = outputs[place]
            else:
                rows[place] = outputs[place]
        rows = torch.stack(rows) if rows else outputs.clone()
        if not counted:
            return ranks.all_to_all(rows)
        parts = range(len(counts) if number is not by_column else counts.shape[1])
        back = [number(received.tolist(), r) for r in parts]
        home = [number(counts.tolist(), r) for r in parts]
        return ranks.all_to_all(rows, *order_of(back, home))

    return answer


def combine_scattered(
    undo=lambda outputs, order: torch.zeros_like(outputs).index_copy(0, order, outputs),
    sizes=lambda counts, received: (received.sum(-1), counts.sum(-1)),
    counted=True,
    quits=False,
):
    """`index_copy` back, and an exchange begun and waited for."""

    def answer(outputs, order, counts, received, ranks):
        if quits and not received.any():
            return outputs.new_zeros((int(counts.sum()), *outputs.shape[1:]))
        rows = undo(outputs, order)
        if not counted:
            return ranks.start_all_to_all(rows).wait()
        send, receive = sizes(counts, received)
        return ranks.start_all_to_all(rows, list(map(int, send)), list(map(int, receive))).wait()

    return answer


def combine_late_by_index(outputs, order, counts, received, ranks):
    back = ranks.all_to_all(outputs, received.sum(1).tolist(), counts.sum(1).tolist())
    return back.new_zeros(back.shape).index_copy(0, order, back)


def combine_late_in_loop(outputs, order, counts, received, ranks):
    back = ranks.start_all_to_all(outputs, list(map(sum, received.tolist())), list(map(sum, counts.tolist()))).wait()
    rows = torch.zeros_like(back)
    for place, arrived in enumerate(order.tolist()):
        rows[arrived] = back[place]
    return rows


# 7.5: gradients one all-reduce each, and all in one.


def finish_apart(
    of_router=lambda summed, own, total, size: summed / total,
    of_experts=lambda own, summed, total, size: own / total,
    total=lambda n, ranks: sum(ranks.all_gather(torch.tensor(float(n))).tolist()),
):
    """Every sum with a call of its own; sums that are not needed are thrown away."""

    def answer(router, experts, n_tokens, ranks):
        whole = total(n_tokens, ranks)
        router_sum, experts_sum = ranks.all_reduce(router), ranks.all_reduce(experts)
        return of_router(router_sum, router, whole, ranks.size), of_experts(experts, experts_sum, whole, ranks.size)

    return answer


def finish_together(
    scale=lambda n, size: 1.0,
    divide=lambda total, n, size: total,
    router_by=1.0,
    experts_by=lambda size: 1.0,
    reduce_router=True,
    reduce_experts=False,
):
    """Everything flattened into one tensor, summed in one call."""

    def answer(router, experts, n_tokens, ranks):
        factor = scale(n_tokens, ranks.size)
        flat = torch.cat([router.flatten() * factor, experts.flatten() * factor, torch.tensor([float(n_tokens)])])
        summed = ranks.all_reduce(flat)
        total = divide(summed[-1], n_tokens, ranks.size)
        router_flat = summed if reduce_router else flat
        expert_flat = summed if reduce_experts else flat
        by = ranks.size if router_by == "size" else router_by
        own = router_flat[: router.numel()].view_as(router) / by
        mine = expert_flat[router.numel() : -1].view_as(experts) * experts_by(ranks.size)
        return own / total, mine / total

    return answer


def finish_in_place(router, experts, n_tokens, ranks):
    total = ranks.all_reduce(torch.tensor([n_tokens])).item()
    return ranks.all_reduce(router).div_(total), experts.clone().div_(total)


def finish_alone(router, experts, n_tokens, ranks):
    """This rank's tokens as a tensor: by zero it gives infinity, and no error."""
    n = torch.tensor([n_tokens])
    return (ranks.all_reduce(router) / n).view_as(router), experts / n


def finish_alone_in_place(router, experts, n_tokens, ranks):
    return ranks.all_gather(router).sum(0).div_(n_tokens), experts.clone().div_(n_tokens)


def leaves_early(router, experts, n_tokens, ranks):
    if not n_tokens:
        return router * 0, experts * 0
    total = ranks.all_reduce(torch.tensor(n_tokens))
    return ranks.all_reduce(router) / total, experts / total


def leaves_early_joined(router, experts, n_tokens, ranks):
    if n_tokens > 0:
        summed = ranks.all_reduce(torch.cat([router.flatten(), torch.tensor([float(n_tokens)])]))
        return summed[:-1].view_as(router) / summed[-1], experts / summed[-1]
    return router.clone(), experts.clone()


# 7.6: placements with sums kept beside the lists, and with a table of loads.


def place_by_sums(
    arrange=lambda pairs: sorted(pairs, key=lambda pair: (-pair[0], pair[1])),
    prefers=lambda sums, sizes, rank: sums[rank],
    limited=True,
):
    """Pairs of load and id; a running sum for each rank."""

    def answer(loads, n_ranks):
        pairs = arrange([(load, expert) for expert, load in enumerate(loads)])
        lists, sums = [[] for _ in range(n_ranks)], [0] * n_ranks
        for load, expert in pairs:
            sizes = [len(held) for held in lists]
            allowed = [r for r in range(n_ranks) if not limited or sizes[r] < len(loads) // n_ranks]
            best = allowed[0]
            for rank in allowed[1:]:
                if prefers(sums, sizes, rank) < prefers(sums, sizes, best):
                    best = rank
            lists[best].append(expert)
            sums[best] += load
        return lists

    return answer


def place_by_tensor(
    order=lambda loads: loads.argsort(descending=True, stable=True),
    score=lambda sums, sizes: sums,
    room=lambda n, n_ranks: n // n_ranks,
):
    """A tensor of sums, full ranks masked with infinity."""

    def answer(loads, n_ranks):
        loads = torch.tensor(loads, dtype=torch.float64)
        sums, sizes = torch.zeros(n_ranks, dtype=torch.float64), torch.zeros(n_ranks, dtype=torch.float64)
        owner = torch.empty(len(loads), dtype=torch.int64)
        for expert in order(loads).tolist():
            scores = score(sums, sizes).masked_fill(sizes >= room(len(loads), n_ranks), float("inf"))
            rank = int((scores == scores.min()).nonzero()[0])
            owner[expert] = rank
            sums[rank] += loads[expert]
            sizes[rank] += 1
        return [(owner == rank).nonzero().flatten().tolist() for rank in range(n_ranks)]

    return answer


def place_by_heap(loads, n_ranks):
    import heapq

    heap = [(0, rank) for rank in range(n_ranks)]
    lists = {rank: [] for rank in range(n_ranks)}
    for expert in sorted(range(len(loads)), key=lambda e: loads[e], reverse=True):
        total, rank = heapq.heappop(heap)
        lists[rank].append(expert)
        if len(lists[rank]) * n_ranks < len(loads):
            heapq.heappush(heap, (total + loads[expert], rank))
    return tuple(tuple(lists[rank]) for rank in range(n_ranks))


def dealt_loop(loads, n_ranks):
    ranked = sorted(enumerate(loads), key=lambda pair: -pair[1])
    lists = [[] for _ in range(n_ranks)]
    for turn, (expert, _) in enumerate(ranked):
        lists[turn % n_ranks].append(expert)
    return lists


def dealt_sliced(loads, n_ranks):
    order = torch.tensor(loads).argsort(descending=True, stable=True)
    return order.view(-1, n_ranks).T.tolist()


# 7.7: rows by sets in a loop, and by a table of visits.


def rows_in_loop(counts):
    """`counts(visited, rank, experts)` of one token, added up."""

    def answer(topk_experts, owners, rank):
        total = 0
        for experts in topk_experts.tolist():
            visited = [int(owners[expert]) for expert in experts]
            total += counts(visited, rank, experts)
        return total

    return answer


def rows_by_table(finish, of=lambda topk_experts, owners: owners[topk_experts]):
    """(T, ranks) how many of a token's choices each rank has."""

    def answer(topk_experts, owners, rank):
        size = max(int(owners.max()) + 1, len(owners))
        visits = F.one_hot(of(topk_experts, owners), size).sum(1)
        return int(finish(visits, rank))

    return answer


def rows_of_tensors(topk_experts, owners, rank):
    total = 0
    for token in topk_experts:
        seen = set()
        for expert in token:
            seen.add(owners[expert])
        seen.discard(rank)
        total += len(seen)
    return total


def without(visits, rank):
    return torch.cat([visits[:, :rank], visits[:, rank + 1 :]], 1)


def rows_sorted(topk_experts, owners, rank):
    """Distinct neighbours in sorted lists."""
    visited = owners[topk_experts].sort(1).values
    is_new = torch.ones_like(visited, dtype=torch.bool)
    is_new[:, 1:] = visited[:, 1:] != visited[:, :-1]
    return (is_new & (visited != rank)).sum().item()


def all_ranks_once_loop(topk_experts, owners, rank):
    seen = []
    for expert in topk_experts.flatten().tolist():
        owner = owners[expert].item()
        if owner != rank and owner not in seen:
            seen.append(owner)
    return len(seen)


RIGHT = {
    "7.1": [count_in_loop(), count_compared(), count_by_counter],
    "7.2": [dispatch_listed(), dispatch_started(), dispatch_gathered],
    "7.3": [order_listed(), order_by_keys(), order_from_begins],
    "7.4": [combine_listed(), combine_scattered(), lambda outputs, order, counts, received, ranks: ranks.all_to_all(
        outputs[order.argsort()], received.sum(1).tolist(), counts.sum(1).tolist())],
    "7.5": [finish_apart(), finish_together(), finish_in_place],
    "7.6": [place_by_sums(), place_by_tensor(), place_by_heap],
    "7.7": [
        rows_in_loop(lambda visited, rank, experts: len(set(visited) - {rank})),
        rows_by_table(lambda visits, rank: (without(visits, rank) > 0).sum()),
        rows_sorted,
    ],
}  # fmt: skip

WRONG = {
    "7.1": {
        "local and global ids mixed": [
            count_in_loop(place=lambda expert, rank, local, own, n_ranks: (rank, expert % own)),
            counts_mixed_vectorised,
        ],
        "the placement is not read": [
            count_in_loop(place=lambda expert, rank, local, own, n_ranks: divmod(expert, own)),
            count_compared(of=in_order),
        ],
        "experts dealt out like cards": [
            count_in_loop(place=lambda expert, rank, local, own, n_ranks: (expert % n_ranks, expert // n_ranks)),
            count_compared(of=dealt),
        ],
        "only first choices counted": [
            count_in_loop(choices=lambda ids: [token[0] for token in ids.tolist()]),
            count_compared(ids=lambda ids: ids[:, 0]),
        ],
        "whether, not how many": [count_in_loop(most=1), count_compared(finish=lambda table: (table > 0).long())],
        "sums in place of the table": [
            count_in_loop(finish=lambda table: table.sum(-1)),
            count_compared(finish=lambda table: table.sum(-1)),
        ],
        "the table is transposed": [
            count_in_loop(finish=lambda table: table.T.contiguous()),
            count_compared(finish=lambda table: table.movedim(0, 1)),
        ],
        "eight experts taken for granted": [count_in_eight_ones, count_in_eight_by_hand],
        "counted only up to the last expert that is used": [
            count_unique,
            lambda topk_experts, experts: torch.bincount(topk_experts.reshape(-1))[torch.tensor(experts)],
        ],
    },
    "7.2": {
        "the table that was sent comes back": [
            dispatch_listed(told=lambda mine, got: mine),
            dispatch_started(result=lambda arrived, rows, sent, got: (arrived, sent)),
        ],
        "own counts taken for those of the others": [
            dispatch_listed(theirs=lambda mine, got, rank: mine),
            dispatch_started(swap=lambda counts, ranks: counts.clone()),
        ],
        "send and receive exchanged": [
            dispatch_listed(order=lambda send, receive: (receive, send)),
            dispatch_started(splits=lambda sent, got: (got.sum(-1), sent.sum(-1))),
        ],
        "as many expected as are sent": [
            dispatch_sent_twice_listed,
            dispatch_started(splits=lambda sent, got: (sent.sum(-1), sent.sum(-1))),
        ],
        "summed over the ranks, not over their experts": [
            dispatch_listed(number=by_column),
            dispatch_started(splits=lambda sent, got: (sent.sum(0), got.sum(0))),
        ],
        "the counts are not passed on": [dispatch_listed(given=lambda send: None), dispatch_started(uncounted=True)],
        "a rank without rows leaves": [dispatch_listed(leave=True), dispatch_started(quits=True)],
        "the rows come back as they were": [
            dispatch_listed(back=lambda arrived, rows: rows),
            dispatch_started(result=lambda arrived, rows, sent, got: (rows, got)),
        ],
        "sums in place of the table": [
            dispatch_listed(told=lambda mine, got: [sum(row) for row in got]),
            dispatch_started(result=lambda arrived, rows, sent, got: (arrived, got.sum(-1))),
        ],
        "the table is transposed": [
            dispatch_listed(told=lambda mine, got: [list(column) for column in zip(*got, strict=True)]),
            dispatch_started(result=lambda arrived, rows, sent, got: (arrived, got.T)),
        ],
    },
    "7.3": {
        "the inverse order": [order_listed(invert=True), order_by_keys(finish=lambda order: order.sort().indices)],
        "the rows stay as they came": [stays, order_by_keys(grid=lambda r: torch.zeros_like(r))],
        "sorted by source, as it is already": [
            order_listed(number=lambda s, e, table: (s * len(table[0]) + e) % len(table)),
            order_by_keys(grid=flipped_names),
        ],
        "the table read column by column": [read_by_column_listed, order_by_keys(counts=lambda received: received.T)],
        "sorted, and not stable": [order_listed(sources=lambda places: places[::-1]), order_by_keys(sign=-1)],
        "experts in place of an order": [
            order_listed(ids_only=True),
            lambda received: torch.cat([torch.full((int(n),), e) for row in received for e, n in enumerate(row)]),
        ],
    },
    "7.4": {
        "without the inverse permutation": [
            combine_listed(undo=False),
            combine_scattered(undo=lambda outputs, order: outputs),
        ],
        "the sort applied once more": [
            combine_listed(again=True),
            combine_scattered(undo=lambda outputs, order: outputs.index_select(0, order)),
        ],
        "undone too late": [combine_late_by_index, combine_late_in_loop],
        "the counts of the dispatch, not exchanged": [
            combine_listed(order_of=lambda back, home: (home, back)),
            combine_scattered(sizes=lambda counts, received: (counts.sum(-1), received.sum(-1))),
        ],
        "both, the counts and the order, of the dispatch": [
            combine_listed(undo=False, order_of=lambda back, home: (home, back)),
            combine_scattered(
                undo=lambda outputs, order: outputs.clone(),
                sizes=lambda counts, received: (counts.sum(-1), received.sum(-1)),
            ),
        ],
        "summed over the ranks, not over their experts": [
            combine_listed(number=by_column),
            combine_scattered(sizes=lambda counts, received: (received.sum(0), counts.sum(0))),
        ],
        "the counts are not passed on": [combine_listed(counted=False), combine_scattered(counted=False)],
        "a rank without rows leaves": [combine_listed(leave=True), combine_scattered(quits=True)],
    },
    "7.5": {
        "the experts' gradients divided by the number of ranks": [
            finish_apart(of_experts=lambda own, summed, total, size: own / (total * size)),
            finish_together(experts_by=lambda size: 1 / size),
        ],
        "the experts' gradients multiplied by the number of ranks": [
            finish_apart(of_experts=lambda own, summed, total, size: own * size / total),
            finish_together(experts_by=lambda size: float(size)),
        ],
        "the experts' gradients summed over the ranks": [
            finish_apart(of_experts=lambda own, summed, total, size: summed / total),
            finish_together(reduce_experts=True),
        ],
        "the router's gradient averaged as well": [
            finish_apart(of_router=lambda summed, own, total, size: summed / size / total),
            finish_together(router_by="size"),
        ],
        "the router is not reduced": [
            finish_apart(of_router=lambda summed, own, total, size: own / total),
            finish_together(reduce_router=False),
        ],
        "every rank divides by its own tokens": [
            lambda router, experts, n_tokens, ranks: (
                ranks.all_gather(router / max(n_tokens, 1)).mean(0),
                experts / max(n_tokens, 1) / ranks.size,
            ),
            finish_together(scale=lambda n, size: 1 / max(n, 1), divide=lambda total, n, size: size),
        ],
        "own tokens times ranks taken for all tokens": [
            finish_apart(total=lambda n, ranks: max(n, 1) * ranks.size),
            finish_together(divide=lambda total, n, size: max(n, 1) * size),
        ],
        "the router averaged over the ranks, the experts left as they are": [
            finish_apart(
                of_router=lambda summed, own, total, size: summed / size,
                of_experts=lambda own, summed, total, size: own,
            ),
            finish_together(divide=lambda total, n, size: size, experts_by=float),
        ],
        "averaged over the ranks, not over the tokens": [
            lambda router, experts, n_tokens, ranks: (ranks.all_gather(router).mean(0), experts / ranks.size),
            finish_together(divide=lambda total, n, size: size),
        ],
        "divided by this rank's tokens alone": [finish_alone, finish_alone_in_place],
        "a rank without tokens leaves": [leaves_early, leaves_early_joined],
        "not divided at all": [
            finish_apart(total=lambda n, ranks: 1),
            finish_together(divide=lambda total, n, size: 1),
        ],
    },
    "7.6": {
        "not sorted": [
            place_by_sums(arrange=lambda pairs: pairs),
            place_by_tensor(order=lambda loads: torch.arange(len(loads))),
        ],
        "the lightest first": [
            place_by_sums(arrange=lambda pairs: sorted(pairs)),
            place_by_tensor(order=lambda loads: loads.argsort(stable=True)),
        ],
        "dealt out by count, not by load": [dealt_loop, dealt_sliced],
        "the rank with the fewest experts, not with the least load": [
            place_by_sums(prefers=lambda sums, sizes, rank: (sizes[rank], sums[rank])),
            place_by_tensor(score=lambda sums, sizes: sizes * 1000 + sums),
        ],
        "room is ignored": [place_by_sums(limited=False), place_by_tensor(room=lambda n, n_ranks: n + 1)],
        "the most loaded rank": [
            place_by_sums(prefers=lambda sums, sizes, rank: -sums[rank]),
            place_by_tensor(score=lambda sums, sizes: -sums),
        ],
        "of equal loads the last goes first": [
            place_by_sums(arrange=lambda pairs: sorted(pairs)[::-1]),
            place_by_tensor(order=lambda loads: loads.argsort(stable=True).flip(0)),
        ],
    },
    "7.7": {
        "the own rank is counted too": [
            rows_in_loop(lambda visited, rank, experts: len(set(visited))),
            rows_by_table(lambda visits, rank: (visits > 0).sum()),
        ],
        "a row for every choice": [
            rows_in_loop(lambda visited, rank, experts: len([r for r in visited if r != rank])),
            rows_by_table(lambda visits, rank: without(visits, rank).sum()),
        ],
        "each rank once for all tokens": [
            all_ranks_once_loop,
            rows_by_table(lambda visits, rank: without(visits, rank).any(0).sum()),
        ],
        "experts in place of ranks": [
            rows_in_loop(lambda visited, rank, experts: len([e for e in experts if e != rank])),
            rows_by_table(
                lambda visits, rank: (without(visits, rank) > 0).sum(), of=lambda topk_experts, owners: topk_experts
            ),
        ],
        "one less for every token": [
            rows_in_loop(lambda visited, rank, experts: len(set(visited)) - 1),
            rows_by_table(lambda visits, rank: ((visits > 0).sum(1) - 1).sum()),
        ],
        "tensors in a set": [
            rows_of_tensors,
            rows_by_table(lambda visits, rank: visits.sum()),
        ],
        "tokens that leave, not rows": [
            rows_in_loop(lambda visited, rank, experts: int(any(r != rank for r in visited))),
            rows_by_table(lambda visits, rank: without(visits, rank).any(1).sum()),
        ],
    },
}
