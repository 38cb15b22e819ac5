"""The exercises of notebook 07: what to send, the way there and back over several ranks, gradients, and a placement."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_lab.course.bank import Case, Exercise, Mistake
from moe_lab.course.checking import Refused
from moe_lab.course.rehearsal import rehearse
from moe_lab.parallel.placement import greedy_placement
from moe_lab.parallel.ranks import Ranks

Experts = Sequence[Sequence[int]]  # for each rank the experts that it holds


def _rand(*shape: int, seed: int) -> Tensor:
    """Numbers around 0, the same bits on every machine."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def _choices(n_tokens: int, top_k: int, n_experts: int, seed: int, empty: int | None = None) -> Tensor:
    """(T, K) different experts for each token, low ids more often; never the expert `empty`."""
    liked = _rand(n_tokens, n_experts, seed=seed) - torch.arange(n_experts) / n_experts
    if empty is not None:
        liked[:, empty] = -9
    return liked.argsort(dim=1, descending=True)[:, :top_k]


def _on_ranks(solution: Callable, case: Case) -> dict:
    """What a function of a rank returns on each. Its last argument is `ranks`, the others are lists by rank.

    What it leaves in its arguments is put back into the case, so that a change is noticed.
    """
    *by_rank, size = case.args
    left: dict[int, list] = {}

    def on_one(ranks: Ranks, *by_rank: list) -> object:
        mine = left[ranks.rank] = [argument[ranks.rank] for argument in by_rank]
        return solution(*mine, ranks)

    results = rehearse(on_one, size, *by_rank)
    for rank, arguments in left.items():
        for argument, value in zip(by_rank, arguments, strict=True):
            argument[rank] = value
    return {f"rank {rank}": result for rank, result in enumerate(results)}


# 7.1 what to send


def send_counts(topk_experts: Tensor, experts: Experts) -> Tensor:
    """(ranks, own) int64: how many rows this rank's tokens send to each expert of each rank, in the order held."""
    of_expert = topk_experts.flatten().bincount(minlength=sum(map(len, experts)))
    return of_expert[torch.tensor(experts)]


def _count_cases() -> list[Case]:
    even, mixed = ((0, 1), (2, 3)), ((2, 0), (3, 1))
    return [
        Case(name="three tokens, experts in order", args=(torch.tensor([[0, 3], [3, 2], [3, 0]]), even)),
        Case(name="the same, experts in another order", args=(torch.tensor([[0, 3], [3, 2], [3, 0]]), mixed)),
        Case(name="no tokens", args=(torch.empty(0, 2, dtype=torch.int64), even)),
        Case(name="three ranks", args=(_choices(11, 3, 6, seed=1, empty=4), ((5, 0), (1, 4), (3, 2)))),
        Case(name="two ranks of three", args=(_choices(9, 2, 6, seed=2, empty=5), ((0, 2, 4), (1, 3, 5)))),
        Case(
            name="two ranks of five, the last expert empty",
            args=(_choices(7, 2, 10, seed=3, empty=9), ((0, 9, 2, 3, 4), (5, 6, 7, 8, 1))),
        ),
    ]


def _counted(topk_experts: Tensor, experts: Experts) -> tuple[Tensor, int, int]:
    """How often each expert was chosen, the number of ranks, and of experts on one."""
    n_ranks, own = len(experts), len(experts[0])
    return topk_experts.flatten().bincount(minlength=n_ranks * own), n_ranks, own


def _counts_by_order(topk_experts: Tensor, experts: Experts) -> Tensor:
    of_expert, n_ranks, own = _counted(topk_experts, experts)
    return of_expert.view(n_ranks, own)


def _counts_dealt(topk_experts: Tensor, experts: Experts) -> Tensor:
    of_expert, n_ranks, own = _counted(topk_experts, experts)
    return of_expert.view(own, n_ranks).T


def _counts_of_eight(topk_experts: Tensor, experts: Experts) -> Tensor:
    return topk_experts.flatten().bincount(minlength=8)[torch.tensor(experts)]


def _counts_without_the_last(topk_experts: Tensor, experts: Experts) -> Tensor:
    return topk_experts.flatten().bincount()[torch.tensor(experts)]


def _counts_mixed(topk_experts: Tensor, experts: Experts) -> Tensor:
    counts = torch.zeros(len(experts), len(experts[0]), dtype=torch.int64)
    for rank, held in enumerate(experts):
        for expert in held:
            counts[rank, expert % len(held)] += (topk_experts == expert).sum()
    return counts


SEND_COUNTS = Exercise(
    id="7.1",
    title="what to send",
    reference=send_counts,
    cases=_count_cases,
    mistakes=(
        Mistake(
            name="local and global ids mixed",
            wrong=_counts_mixed,
            says="Each count is at the right rank, but not at the right expert of that rank. `experts[r]` holds "
            "global ids, and an expert's local number is its place in there: with (2, 0), expert 2 is local number "
            "0. A global id modulo the number of experts on a rank is that place only while all lie in order; shapes "
            "fit either way.",
        ),
        Mistake(
            name="the placement is not read",
            wrong=_counts_by_order,
            says="The counts stand in the order of the ids, as if rank 0 always had the first experts. That holds "
            "for equal parts in order; a balancer moves experts about (section 8). Who holds which says `experts`.",
        ),
        Mistake(
            name="experts dealt out like cards",
            wrong=_counts_dealt,
            says="Expert e is looked for on rank e modulo the number of ranks, as if experts were dealt out like "
            "cards. Who holds which says `experts`.",
        ),
        Mistake(
            name="only first choices counted",
            wrong=lambda topk_experts, experts: send_counts(topk_experts[:, :1], experts),
            says="Only the first choices are counted. Every choice is a row: T tokens send T·K of them.",
        ),
        Mistake(
            name="whether, not how many",
            wrong=lambda topk_experts, experts: send_counts(topk_experts, experts).clamp(max=1),
            says="Each count is 0 or 1. `counts[ranks, places] += 1` adds once to each place, however often it is "
            "named; count with `bincount`, or one at a time.",
        ),
        Mistake(
            name="sums in place of the table",
            wrong=lambda topk_experts, experts: send_counts(topk_experts, experts).sum(1),
            says="That is one number a rank. The exchange needs no more, but the rank that gets the rows has to know "
            "where one expert's rows end: return the table, one row a rank, one column for each expert on it.",
        ),
        Mistake(
            name="the table is transposed",
            wrong=lambda topk_experts, experts: send_counts(topk_experts, experts).T.clone(),
            says="The table is transposed: a row a rank, a column for each expert on it. Its rows are what is sent "
            "to each rank, so that all-to-all can take them as they lie.",
        ),
        Mistake(
            name="eight experts taken for granted",
            wrong=_counts_of_eight,
            says="The list of counts is too short: it has eight places, as the toy has experts. Another model has "
            "more; how many there are is written in `experts`.",
        ),
        Mistake(
            name="counted only up to the last expert that is used",
            wrong=_counts_without_the_last,
            says="The list of counts ends at the highest id that was chosen. An expert that nobody chose has a "
            "count, too: 0. Say how long the list has to be; the number of experts is written in `experts`.",
        ),
    ),
)


# 7.2 dispatch


def dispatch(rows: Tensor, counts: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Swap the counts, then send the rows: what came, (R', D), and how many from each rank for each own expert."""
    received = ranks.all_to_all(counts)  # (ranks, own)
    return ranks.all_to_all(rows, counts.sum(1).tolist(), received.sum(1).tolist()), received


def _numbered(counts: list[list[list[int]]], width: int = 1) -> tuple[list[Tensor], list[Tensor], int]:
    """Rows that say where they come from: row i of rank r is 10·r + i; and the counts, and how many ranks."""
    tables = [torch.tensor(table) for table in counts]
    rows = [
        10.0 * rank + torch.arange(float(table.sum()))[:, None].expand(-1, width) for rank, table in enumerate(tables)
    ]
    return [row.contiguous() for row in rows], tables, len(tables)


def _counts(size: int, own: int, seed: int) -> list[list[list[int]]]:
    numbers = torch.randint(0, 4, (size, size, own), generator=torch.Generator().manual_seed(seed))
    return numbers.tolist()


CYCLE = [[[1, 1], [1, 0], [2, 1]], [[2, 1], [1, 1], [1, 0]], [[1, 0], [3, 0], [1, 1]]]  # all send 6 and get 6
IDLE = [[[0, 0, 0], [0, 0, 0]], [[1, 0, 2], [0, 3, 1]]]  # rank 0 has no tokens


def _dispatch_cases() -> list[Case]:
    tables = {
        "two ranks": [[[1, 0], [1, 2]], [[2, 0], [0, 1]]],
        "two ranks that send each other as much": [[[2, 0], [0, 1]], [[1, 0], [3, 0]]],
        "three ranks, each gets as much as it sends": CYCLE,
        "rank 0 has no tokens": IDLE,
        "rank 1 is sent nothing": [[[2, 1], [0, 0]], [[1, 0], [0, 0]]],
        "four ranks": _counts(4, 3, seed=5),
    }
    return [Case(name=name, args=_numbered(table, width=1 + 2 * (len(table) > 3))) for name, table in tables.items()]


def _dispatched(
    receive: Callable[[Tensor, Ranks], Tensor] = lambda counts, ranks: ranks.all_to_all(counts),
    splits: Callable[[Tensor, Tensor], tuple] = lambda counts, received: (counts.sum(1), received.sum(1)),
    returned: Callable[[Tensor], Tensor] = lambda received: received,
) -> Callable:
    """A dispatch with one of its steps done in another way."""

    def wrong(rows: Tensor, counts: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        received = receive(counts, ranks)
        send, expected = (numbers.tolist() for numbers in splits(counts, received))
        return ranks.all_to_all(rows, send, expected), returned(received)

    return wrong


def _leaves_if_idle(rows: Tensor, counts: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    if len(rows) == 0:
        return rows, torch.zeros_like(counts)
    return dispatch(rows, counts, ranks)


def _equal_parts(rows: Tensor, counts: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    received = ranks.all_to_all(counts)
    return ranks.all_to_all(rows), received


def _sent_twice(rows: Tensor, counts: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    received, send = ranks.all_to_all(counts), counts.sum(1).tolist()
    return ranks.all_to_all(rows, send, send), received


def _not_sent(rows: Tensor, counts: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    _, received = dispatch(rows, counts, ranks)
    return rows, received


DISPATCH = Exercise(
    id="7.2",
    title="dispatch",
    reference=dispatch,
    cases=_dispatch_cases,
    run=_on_ranks,
    mistakes=(
        Mistake(
            name="the table that was sent comes back",
            wrong=lambda rows, counts, ranks: (dispatch(rows, counts, ranks)[0], counts),
            says="The rows are right; the table returned with them is the one that this rank sent. Return the one "
            "that it got: what came from whom, and for which of its experts.",
        ),
        Mistake(
            name="own counts taken for those of the others",
            wrong=_dispatched(receive=lambda counts, ranks: counts),
            says="The counts are not swapped: this rank expects from each other one as many rows as it sends there. "
            "Nobody knows how many rows will come until the others tell. Where two ranks happen to send each other "
            "as much, the rows arrive and are taken for other experts' rows; else the exchange breaks or hangs.",
        ),
        Mistake(
            name="send and receive exchanged",
            wrong=_dispatched(splits=lambda counts, received: (received.sum(1), counts.sum(1))),
            says="The two lists of counts are exchanged: first what this rank sends, then what it gets. Where every "
            "rank gets as many rows as it sends, nothing complains: shapes fit, and rows go to the wrong ranks.",
        ),
        Mistake(
            name="as many expected as are sent",
            wrong=_sent_twice,
            says="The same list is given twice: this rank expects from each other one as many rows as it sends "
            "there. How many will come is in the table that was swapped.",
        ),
        Mistake(
            name="summed over the ranks, not over their experts",
            wrong=_dispatched(splits=lambda counts, received: (counts.sum(0), received.sum(0))),
            says="The sums run over the wrong dimension. Row r of the table is what goes to rank r, so a rank's "
            "number is the sum of its row. Here the sums are one for each expert; with as many experts on a rank as "
            "there are ranks, that even fits.",
        ),
        Mistake(
            name="the counts are not passed on",
            wrong=_equal_parts,
            says="The rows are sent without counts, which cuts them into equal parts. Tokens choose their experts: "
            "the parts are as large as `counts` says.",
        ),
        Mistake(
            name="a rank without rows leaves",
            wrong=_leaves_if_idle,
            says="A rank that has no rows returns before the exchange. The others wait for it: on a cluster this "
            "hangs, and not on the rank with the mistake. Every rank makes every call, also with nothing to send.",
        ),
        Mistake(
            name="the rows come back as they were",
            wrong=_not_sent,
            says="The rows returned are this rank's own. `all_to_all` leaves its input as it is, and returns what "
            "came.",
        ),
        Mistake(
            name="sums in place of the table",
            wrong=_dispatched(returned=lambda received: received.sum(1)),
            says="The rows are right; returned with them are only sums, one a rank. Regrouping needs the table: how "
            "many rows came from each rank for each of this rank's experts. Swap the table itself, and sum "
            "afterwards.",
        ),
        Mistake(
            name="the table is transposed",
            wrong=_dispatched(returned=lambda received: received.T.clone()),
            says="The rows are right, and the table is transposed. Its rows are the ranks that sent, in the order in "
            "which their rows arrived; its columns this rank's experts.",
        ),
    ),
)


# 7.3 regroup


def regroup(received: Tensor) -> Tensor:
    """(R',) int64: the order that sorts arrived rows by expert, and within an expert by the rank that sent them."""
    size, own = received.shape
    experts = torch.arange(own).repeat(size).repeat_interleave(received.flatten())  # of each row, as they arrived
    return experts.sort(stable=True).indices


def _regroup_cases() -> list[Case]:
    tables = {
        "from two ranks, for two experts": [[1, 1], [2, 1]],
        "from three ranks, for two experts": [[2, 1], [0, 2], [1, 3]],
        "an expert with no rows": [[2, 0, 1], [1, 0, 3]],
        "one expert": [[2], [0], [3]],
        "from one rank": [[2, 1, 3]],
        "no rows at all": [[0, 0], [0, 0], [0, 0]],
        "from five ranks, for three experts": _counts(1, 15, seed=9)[0],
    }
    return [Case(name=name, args=(torch.tensor(table).view(-1, 3 if len(table[0]) > 9 else len(table[0])),))
            for name, table in tables.items()]  # fmt: skip


def _sorted_ids(ids: Tensor, received: Tensor) -> Tensor:
    return ids.repeat_interleave(received.flatten()).sort(stable=True).indices


def _run_regroup(solution: Callable, case: Case) -> object:
    """The order; one that sorts by expert, and mixes the rows of an expert, gets a sentence of its own."""
    received = case.args[0]
    order, right = solution(received), regroup(received)
    if isinstance(order, Tensor) and order.dtype == right.dtype and order.shape == right.shape:
        local = torch.arange(received.shape[1]).repeat(len(received)).repeat_interleave(received.flatten())
        is_order = torch.equal(order.sort().values, torch.arange(len(order)))
        if is_order and not torch.equal(order, right) and torch.equal(local[order], local.sort().values):
            raise Refused(
                "Sorted by expert, but not stable: within an expert the rows do not stand in the order in which they "
                "came. PyTorch's sorts keep the order of equals only if they are told to; if they are, sums in the "
                "weights' gradients are the same on every run."
            )
    return order


def _last_source_first(received: Tensor) -> Tensor:
    order, ends = regroup(received), received.sum(0).cumsum(0).tolist()
    return torch.cat([order[start:end].flip(0) for start, end in zip([0, *ends], ends, strict=False)])


REGROUP = Exercise(
    id="7.3",
    title="regroup",
    reference=regroup,
    cases=_regroup_cases,
    run=_run_regroup,
    mistakes=(
        Mistake(
            name="the inverse order",
            wrong=lambda received: regroup(received).argsort(),
            says="This tells each arrived row where it goes. Asked for is the other direction: for each place, which "
            "arrived row stands there, so that `rows[order]` is sorted. The inverse is for the way back.",
        ),
        Mistake(
            name="the rows stay as they came",
            wrong=lambda received: torch.arange(int(received.sum())),
            says="Nothing moves. The rows arrived rank by rank, and within a rank expert by expert: that is the "
            "table read row by row. Name the expert of each row in that order, 0, 1, …, 0, 1, …, once for every "
            "rank, and then sort. A list that runs 0, 0, …, 1, 1, … is sorted before you begin (`repeat` repeats a "
            "list, `repeat_interleave` its elements).",
        ),
        Mistake(
            name="sorted by source, as it is already",
            wrong=lambda received: _sorted_ids(torch.arange(len(received)).repeat(received.shape[1]), received),
            says="The rows are sorted by a rank's number in place of an expert's. Of the table's row-by-row list, "
            "the expert is the column: 0, 1, …, 0, 1, … once for every rank.",
        ),
        Mistake(
            name="the table read column by column",
            wrong=lambda received: _sorted_ids(torch.arange(received.shape[1]).repeat(len(received)), received.T),
            says="The counts are read column by column, while the experts' numbers run 0, 1, …, 0, 1, …, once for "
            "every rank. The rows arrived rank by rank: read the table row by row.",
        ),
        Mistake(
            name="sorted, and not stable",
            wrong=_last_source_first,
            says="Expert by expert, but within an expert the rows are not in the order in which they came. Keep it (a "
            "stable sort): the sums in the weights' gradients are then the same on every run.",
        ),
        Mistake(
            name="experts in place of an order",
            wrong=lambda received: (
                torch.arange(received.shape[1]).repeat(len(received)).repeat_interleave(received.flatten())
            ),
            says="This is each row's expert. Asked for is the order that sorts them: what `sort` calls its "
            "`indices`, or `argsort` gives.",
        ),
    ),
)


# 7.4 combine


def combine(outputs: Tensor, order: Tensor, counts: Tensor, received: Tensor, ranks: Ranks) -> Tensor:
    """Undo the regrouping, then send every row back to where it came from: (R', D) to (R, D)."""
    rows = torch.empty_like(outputs)
    rows[order] = outputs
    return ranks.all_to_all(rows, received.sum(1).tolist(), counts.sum(1).tolist())


def _combine_cases() -> list[Case]:
    def case(name: str, table: list[list[list[int]]], width: int = 1) -> Case:
        rows, counts, size = _numbered(table, width)
        received = [torch.stack([table[rank] for table in counts]) for rank in range(size)]
        orders = [regroup(one) for one in received]
        offsets = [torch.cat([torch.zeros(1, dtype=torch.int64), table.sum(1).cumsum(0)]).tolist() for table in counts]
        arrived = [
            torch.cat([rows[s][offsets[s][rank] : offsets[s][rank + 1]] for s in range(size)]) for rank in range(size)
        ]
        outputs = [one[order] for one, order in zip(arrived, orders, strict=True)]  # experts that change nothing
        return Case(name=name, args=(outputs, orders, counts, received, size))

    return [
        case("two ranks", [[[1, 1], [1, 2]], [[2, 1], [0, 1]]]),
        case("three ranks, each gets as much as it sends", CYCLE),
        case("rank 0 has no tokens", IDLE),
        case("rank 1 is sent nothing", [[[2, 1], [0, 0]], [[1, 1], [0, 0]]]),
        case("four ranks", _counts(4, 3, seed=6), width=3),
    ]


def _undone(outputs: Tensor, order: Tensor) -> Tensor:
    return outputs[order.argsort()]


def _combined(
    prepare: Callable[[Tensor, Tensor], Tensor] = _undone,
    splits: Callable[[Tensor, Tensor], tuple] = lambda counts, received: (received.sum(1), counts.sum(1)),
) -> Callable:
    """A combine with one of its steps done in another way."""

    def wrong(outputs: Tensor, order: Tensor, counts: Tensor, received: Tensor, ranks: Ranks) -> Tensor:
        send, receive = (numbers.tolist() for numbers in splits(counts, received))
        return ranks.all_to_all(prepare(outputs, order), send, receive)

    return wrong


def _combine_leaves(outputs: Tensor, order: Tensor, counts: Tensor, received: Tensor, ranks: Ranks) -> Tensor:
    if len(outputs) == 0:
        return outputs.new_zeros(int(counts.sum()), outputs.shape[1])
    return combine(outputs, order, counts, received, ranks)


def _combine_equal(outputs: Tensor, order: Tensor, counts: Tensor, received: Tensor, ranks: Ranks) -> Tensor:
    return ranks.all_to_all(_undone(outputs, order))


def _undone_too_late(outputs: Tensor, order: Tensor, counts: Tensor, received: Tensor, ranks: Ranks) -> Tensor:
    back = ranks.all_to_all(outputs, received.sum(1).tolist(), counts.sum(1).tolist())
    rows = torch.empty_like(back)
    rows[order] = back  # raises where as many rows do not come back as came
    return rows


COMBINE = Exercise(
    id="7.4",
    title="combine over ranks",
    reference=combine,
    cases=_combine_cases,
    run=_on_ranks,
    mistakes=(
        Mistake(
            name="without the inverse permutation",
            wrong=_combined(prepare=lambda outputs, order: outputs),
            says="The rows are sent as the experts left them, sorted by expert. all-to-all cuts them by rank: it "
            "needs them in the order in which they arrived. Every rank gets as many rows as it should, and they are "
            "other tokens' rows: shapes fit, and nothing complains.",
        ),
        Mistake(
            name="the sort applied once more",
            wrong=_combined(prepare=lambda outputs, order: outputs[order]),
            says="`outputs[order]` sorts what is sorted already, and a sort does not undo itself. What stands at place "
            "i now arrived as row order[i]: that is where it has to go again.",
        ),
        Mistake(
            name="undone too late",
            wrong=_undone_too_late,
            says="The regrouping is undone after the exchange, by the rank that gets the rows back. `order` is of the "
            "rows that came here; those that come back are others, sorted as this rank sent them. Undo it before the "
            "exchange cuts the rows by rank.",
        ),
        Mistake(
            name="the counts of the dispatch, not exchanged",
            wrong=_combined(splits=lambda counts, received: (counts.sum(1), received.sum(1))),
            says="The counts are those of the way there. On the way back what was received is sent, and what was "
            "sent is received. Where every rank gets as many rows as it sends, nothing complains.",
        ),
        Mistake(
            name="both, the counts and the order, of the dispatch",
            wrong=_combined(
                prepare=lambda outputs, order: outputs,
                splits=lambda counts, received: (counts.sum(1), received.sum(1)),
            ),
            says="This is the dispatch once more: the rows in the experts' order, the counts of the way there. Going "
            "back, undo the regrouping, and send what was received.",
        ),
        Mistake(
            name="summed over the ranks, not over their experts",
            wrong=_combined(splits=lambda counts, received: (received.sum(0), counts.sum(0))),
            says="The sums run over the wrong dimension: they are one for each expert. A rank's number is the sum of "
            "its row in the table.",
        ),
        Mistake(
            name="the counts are not passed on",
            wrong=_combine_equal,
            says="The rows are sent back without counts, which cuts them into equal parts. As many go back to a rank "
            "as came from it.",
        ),
        Mistake(
            name="a rank without rows leaves",
            wrong=_combine_leaves,
            says="A rank whose experts got no rows returns before the exchange. The others wait for it: on a cluster "
            "this hangs. It may also have rows of its own to get back.",
        ),
    ),
)


# 7.5 gradients


def finish_gradients(router: Tensor, experts: Tensor, n_tokens: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Gradients of a rank's summed loss to those of the mean over all ranks' tokens: the router's, its experts'."""
    total = ranks.all_reduce(torch.tensor(float(n_tokens)))
    return ranks.all_reduce(router) / total, experts / total


def _gradient_cases() -> list[Case]:
    def case(name: str, n_tokens: list[int], shape: tuple[int, int], seed: int) -> Case:
        size = len(n_tokens)
        routers = [_rand(*shape, seed=seed + rank) * (n > 0) for rank, n in enumerate(n_tokens)]
        experts = [_rand(2, *shape, seed=seed + 50 + rank) for rank in range(size)]
        return Case(name=name, args=(routers, experts, n_tokens, size))

    by_hand = (
        [torch.tensor([[6.0]]), torch.tensor([[3.0]])],
        [torch.tensor([[4.0]]), torch.tensor([[8.0]])],
        [1, 3],
        2,
    )
    return [
        Case(name="two ranks, one token and three", args=by_hand),
        case("three ranks with as many tokens", [5, 5, 5], (2, 3), seed=1),
        case("rank 1 has no tokens", [2, 0, 7], (2, 3), seed=11),
        case("four ranks", [3, 1, 4, 6], (3, 2), seed=21),
    ]


def _finished(
    router: Callable[[Tensor, float, int, Ranks], Tensor] = lambda router, total, n, ranks: (
        ranks.all_reduce(router) / total
    ),
    experts: Callable[[Tensor, float, int, Ranks], Tensor] = lambda experts, total, n, ranks: experts / total,
    total: Callable[[float, Ranks], float] = lambda n, ranks: ranks.all_reduce(torch.tensor(n)),
) -> Callable:
    """Gradients with one of the steps done in another way."""

    def wrong(router_: Tensor, experts_: Tensor, n_tokens: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        n = float(n_tokens)
        whole = total(n, ranks)
        return router(router_, whole, n, ranks), experts(experts_, whole, n, ranks)

    return wrong


def _mean_of_means(router: Tensor, experts: Tensor, n_tokens: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    n = max(1, n_tokens)
    return ranks.all_reduce(router / n) / ranks.size, experts / n / ranks.size


def _divided_by_own_tokens(router: Tensor, experts: Tensor, n_tokens: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    n = torch.tensor(float(n_tokens))
    return ranks.all_reduce(router) / n, experts / n


def _leaves_without_tokens(router: Tensor, experts: Tensor, n_tokens: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    if n_tokens == 0:
        return router, experts
    return finish_gradients(router, experts, n_tokens, ranks)


AVERAGED = (
    "That is the habit of data parallelism. The loss is a mean over tokens, and ranks have different numbers of them: "
    "sum what there is in copies, and divide everything by all ranks' tokens."
)

FINISH_GRADIENTS = Exercise(
    id="7.5",
    title="gradients",
    reference=finish_gradients,
    cases=_gradient_cases,
    run=_on_ranks,
    mistakes=(
        Mistake(
            name="the experts' gradients divided by the number of ranks",
            wrong=_finished(experts=lambda experts, total, n, ranks: experts / total / ranks.size),
            says="The experts' gradients are divided by the number of ranks as well. An expert stands on one rank "
            "alone, and every rank's tokens came to it: its gradient is a sum over all of them, to be divided by all "
            "tokens and nothing else. That factor belongs where each rank's loss is the mean over its own tokens, "
            "and copies are averaged. Here the losses are sums.",
        ),
        Mistake(
            name="the experts' gradients multiplied by the number of ranks",
            wrong=_finished(experts=lambda experts, total, n, ranks: experts / total * ranks.size),
            says="The experts' gradients are multiplied by the number of ranks. All ranks' tokens are in them "
            "already, through the backward pass of the exchange; nothing is missing. Gradients too large by this "
            "factor were found in several frameworks: Adam all but hides it.",
        ),
        Mistake(
            name="the experts' gradients summed over the ranks",
            wrong=_finished(experts=lambda experts, total, n, ranks: ranks.all_reduce(experts) / total),
            says="The experts' gradients are all-reduced. Shapes fit, but rank 0's experts are others than rank 1's: "
            "this adds the gradients of different experts. Only what every rank holds a copy of is reduced.",
        ),
        Mistake(
            name="the router's gradient averaged as well",
            wrong=_finished(router=lambda router, total, n, ranks: ranks.all_reduce(router) / total / ranks.size),
            says="The router's gradient is divided twice: by all tokens, which makes it a mean, and by the number of "
            "ranks. Each rank's gradient is of the sum over its tokens, so that only the tokens are to be divided "
            "by.",
        ),
        Mistake(
            name="the router is not reduced",
            wrong=_finished(router=lambda router, total, n, ranks: router / total),
            says="The router's gradient is left as this rank's tokens made it. Every rank has a copy of the router, "
            "and would take another step: the copies drift apart, and soon send tokens by different rules.",
        ),
        Mistake(
            name="every rank divides by its own tokens",
            wrong=_mean_of_means,
            says="Each rank divides by its own tokens, and the ranks are averaged. That is a mean of means: a token "
            "on a rank with few of them counts more. Divide by the number of all tokens.",
        ),
        Mistake(
            name="own tokens times ranks taken for all tokens",
            wrong=_finished(total=lambda n, ranks: max(1.0, n) * ranks.size),
            says="The total is taken to be this rank's tokens times the number of ranks. The ranks need not have as "
            "many: ask them, with an all-reduce of the number.",
        ),
        Mistake(
            name="the router averaged over the ranks, the experts left as they are",
            wrong=_finished(
                router=lambda router, total, n, ranks: ranks.all_reduce(router) / ranks.size,
                experts=lambda experts, total, n, ranks: experts.clone(),
            ),
            says=f"The router's gradient is averaged over the ranks, and nothing is divided by tokens. {AVERAGED}",
        ),
        Mistake(
            name="averaged over the ranks, not over the tokens",
            wrong=_finished(
                router=lambda router, total, n, ranks: ranks.all_reduce(router) / ranks.size,
                experts=lambda experts, total, n, ranks: experts / ranks.size,
            ),
            says=f"Both gradients are divided by the number of ranks. {AVERAGED}",
        ),
        Mistake(
            name="divided by this rank's tokens alone",
            wrong=_divided_by_own_tokens,
            says="Both gradients are divided by this rank's tokens. The sums are over all ranks' tokens, so the mean "
            "divides by all of them; a rank that has none divides by zero. Ask the others how many they have.",
        ),
        Mistake(
            name="a rank without tokens leaves",
            wrong=_leaves_without_tokens,
            says="A rank that has no tokens returns before the all-reduce. The others wait for it, on a cluster for "
            "ever. And its experts may have a gradient: other ranks' tokens came to them.",
        ),
        Mistake(
            name="not divided at all",
            wrong=_finished(total=lambda n, ranks: 1.0),
            says="The gradients are summed over the ranks as they should be, and are still those of a sum over "
            "tokens. The loss is the mean: divide by the number of all ranks' tokens.",
        ),
    ),
)


# 7.6 a placement


def place(loads: Sequence[int], n_ranks: int) -> list[list[int]]:
    """For each rank its experts: the heaviest first, each to the least loaded rank that has room."""
    return [list(held) for held in greedy_placement(loads, n_ranks).experts]


def _run_place(solution: Callable, case: Case) -> object:
    """The placement as a set for each rank: in which order its experts were placed does not matter, and shows so."""
    placement = solution(*case.args)
    if isinstance(placement, Tensor):
        placement = placement.tolist()
    if not isinstance(placement, list | tuple) or not all(isinstance(held, list | tuple) for held in placement):
        return placement
    held = [[one.item() if isinstance(one, Tensor) else one for one in rank] for rank in placement]
    if not all(type(expert) is int for rank in held for expert in rank):
        return held
    if any(len(set(rank)) < len(rank) for rank in held):
        raise Refused("Some rank holds an expert twice. Each expert is placed once.")
    return [frozenset(rank) for rank in held]


def _place_cases() -> list[Case]:
    return [
        Case(name="four experts on two ranks", args=([5, 8, 1, 6], 2)),
        Case(name="six experts on two ranks, one heavy", args=([1, 20, 2, 3, 4, 2], 2)),
        Case(name="equal loads", args=([3, 3, 3, 3, 3, 3], 3)),
        Case(name="nobody is used", args=([0, 0, 0, 0], 2)),
        Case(name="twelve experts on four ranks", args=([31, 4, 15, 9, 26, 5, 35, 8, 97, 93, 23, 84], 4)),
        Case(name="one rank", args=([4, 2, 7], 1)),
    ]


def _placed(
    order: Callable[[Sequence[int]], list[int]] = lambda loads: sorted(range(len(loads)), key=lambda e: -loads[e]),
    key: Callable[[list[int], Sequence[int]], float] = lambda held, loads: sum(loads[e] for e in held),
    has_room: Callable[[list[int], int], bool] = lambda held, room: len(held) < room,
) -> Callable[[Sequence[int], int], list[list[int]]]:
    """A placement with one of its steps done in another way."""

    def wrong(loads: Sequence[int], n_ranks: int) -> list[list[int]]:
        room = len(loads) // n_ranks
        ranks: list[list[int]] = [[] for _ in range(n_ranks)]
        for expert in order(loads):
            open_ranks = [held for held in ranks if has_room(held, room)]
            min(open_ranks, key=lambda held: key(held, loads)).append(expert)
        return ranks

    return wrong


def _dealt(loads: Sequence[int], n_ranks: int) -> list[list[int]]:
    heavy_first = sorted(range(len(loads)), key=lambda e: -loads[e])
    return [heavy_first[rank::n_ranks] for rank in range(n_ranks)]


PLACE = Exercise(
    id="7.6",
    title="a placement",
    reference=place,
    cases=_place_cases,
    run=_run_place,
    mistakes=(
        Mistake(
            name="not sorted",
            wrong=_placed(order=lambda loads: list(range(len(loads)))),
            says="The experts are placed in the order of their ids. A heavy one that comes late finds the ranks "
            "filled: place the heaviest first, and the light ones even out what is left.",
        ),
        Mistake(
            name="the lightest first",
            wrong=_placed(order=lambda loads: sorted(range(len(loads)), key=lambda e: loads[e])),
            says="The lightest are placed first, so that the heaviest come last, with nothing left to even them out. "
            "Turn the order round.",
        ),
        Mistake(
            name="dealt out by count, not by load",
            wrong=_dealt,
            says="The experts are sorted, and dealt out in turns: rank 0 always gets the heavier one. Look at the "
            "loads so far, and give each expert to the rank with the least.",
        ),
        Mistake(
            name="the rank with the fewest experts, not with the least load",
            wrong=_placed(key=lambda held, loads: (len(held), sum(loads[e] for e in held))),
            says="Each expert goes to the rank with the fewest experts. A rank with one heavy expert may have more "
            "to do than one with three light ones: compare loads. The number matters only when a rank is full.",
        ),
        Mistake(
            name="room is ignored",
            wrong=_placed(has_room=lambda held, room: True),
            says="Some rank gets more experts than it has room for. Its memory holds E / n_ranks of them and no "
            "more: a full rank takes none, however little it has to do.",
        ),
        Mistake(
            name="the most loaded rank",
            wrong=_placed(key=lambda held, loads: -sum(loads[e] for e in held)),
            says="Each expert goes to the rank with the greatest load: the ranks are filled one after the other. "
            "Take the least loaded.",
        ),
        Mistake(
            name="of equal loads the last goes first",
            wrong=_placed(order=lambda loads: sorted(range(len(loads)), key=lambda e: (-loads[e], -e))),
            says="Of equal loads the higher id is placed first; the lower one should be, so that every rank that "
            "computes the placement finds the same one. `sorted(…, reverse=True)` keeps equals in their order; "
            "sorting upwards and reading backwards does not.",
        ),
    ),
)


# 7.7 what travels


def rows_once(topk_experts: Tensor, owners: Tensor, rank: int) -> int:
    """How many rows leave this rank when a token travels once to each rank: Σ over tokens |distinct remote ranks|."""
    return sum(len(set(chosen) - {rank}) for chosen in owners[topk_experts].tolist())


def _row_cases() -> list[Case]:
    owners, mixed = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 0, 1, 3, 1, 0, 3, 2])
    return [
        Case(name="three tokens", args=(torch.tensor([[0, 2], [2, 3], [1, 0]]), owners, 0)),
        Case(name="the same, seen from rank 1", args=(torch.tensor([[0, 2], [2, 3], [1, 0]]), owners, 1)),
        Case(name="no tokens", args=(torch.empty(0, 2, dtype=torch.int64), owners, 0)),
        Case(name="experts in another order", args=(_choices(12, 3, 8, seed=3), mixed, 2)),
        Case(name="20 tokens, 4 of 9 experts", args=(_choices(20, 4, 9, seed=4), torch.arange(9) // 3, 1)),
    ]


def _visited(topk_experts: Tensor, owners: Tensor) -> list[list[int]]:
    return owners[topk_experts].tolist()


ROWS_ONCE = Exercise(
    id="7.7",
    title="once to each rank",
    reference=rows_once,
    cases=_row_cases,
    mistakes=(
        Mistake(
            name="the own rank is counted too",
            wrong=lambda topk_experts, owners, rank: sum(len(set(v)) for v in _visited(topk_experts, owners)),
            says="The rank itself is counted among those that a token visits. What stays at home does not travel: "
            "leave out the rank's own number.",
        ),
        Mistake(
            name="a row for every choice",
            wrong=lambda topk_experts, owners, rank: sum(r != rank for v in _visited(topk_experts, owners) for r in v),
            says="Every choice is counted. Here a token goes once to a rank, however many of its experts live there: "
            "count distinct ranks.",
        ),
        Mistake(
            name="each rank once for all tokens",
            wrong=lambda topk_experts, owners, rank: len(
                {r for v in _visited(topk_experts, owners) for r in v} - {rank}
            ),
            says="Each rank is counted once for all tokens together. Every token travels for itself: count its "
            "ranks, then add up over the tokens.",
        ),
        Mistake(
            name="experts in place of ranks",
            wrong=lambda topk_experts, owners, rank: sum(len(set(v) - {rank}) for v in topk_experts.tolist()),
            says="Distinct experts are counted. Two experts of a token may live on one rank, and the token goes "
            "there once: look up their owners first.",
        ),
        Mistake(
            name="one less for every token",
            wrong=lambda topk_experts, owners, rank: sum(len(set(v)) - 1 for v in _visited(topk_experts, owners)),
            says="One is taken off for every token, as if each had an expert at home. Only those that do visit their "
            "own rank save a trip.",
        ),
        Mistake(
            name="tensors in a set",
            wrong=lambda topk_experts, owners, rank: sum(
                len(set(visited) - {rank}) for visited in owners[topk_experts]
            ),
            says="Every choice is counted as if it went to a rank of its own: the elements of a tensor are tensors, "
            "and in a set no two of them are equal. Make numbers of them first: `.tolist()`.",
        ),
        Mistake(
            name="tokens that leave, not rows",
            wrong=lambda topk_experts, owners, rank: sum(bool(set(v) - {rank}) for v in _visited(topk_experts, owners)),
            says="Tokens that leave are counted, each once. A token with experts on two other ranks is sent to both "
            "of them: two rows.",
        ),
    ),
)

EXERCISES = (SEND_COUNTS, DISPATCH, REGROUP, COMBINE, FINISH_GRADIENTS, PLACE, ROWS_ONCE)
