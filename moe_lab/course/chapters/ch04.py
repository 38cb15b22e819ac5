"""The exercises of notebook 04: where every choice travels, the way there and back, and who is dropped."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab import dispatch, ops
from moe_lab.course.bank import Case, Exercise, Mistake
from moe_lab.course.checking import Refused
from moe_lab.records import DispatchPlan, Routing


def _rand(*shape: int, seed: int) -> Tensor:
    """Numbers around 0, the same bits on every machine."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def _routing(experts: list[list[int]] | Tensor, n_experts: int, weights: list[list[float]] | None = None) -> Routing:
    """A routing with these choices; dispatch does not look at logits and scores."""
    experts = torch.as_tensor(experts)
    none = torch.zeros(len(experts), n_experts)
    weights = torch.ones(experts.shape) if weights is None else torch.tensor(weights)
    return Routing(router_logits=none, router_scores=none, topk_weights=weights, topk_experts=experts)


def _random_routing(n_tokens: int, top_k: int, n_experts: int, empty: int, seed: int) -> Routing:
    """Random choices, of which none is the expert `empty`."""
    liked = _rand(n_tokens, n_experts, seed=seed) - torch.arange(n_experts) / n_experts  # low ids more often
    liked[:, empty] = -9
    return _routing(liked.argsort(dim=1, descending=True)[:, :top_k], n_experts)


def _routing_shown(routing: Routing) -> str:
    """The choices, or where there are too many to read, how many."""
    experts, n_experts = routing.topk_experts, routing.n_experts
    if experts.numel() > 50:
        return f"{len(experts)} tokens, {experts.shape[1]} of {n_experts} experts each"
    return f"topk_experts = {experts.tolist()}, n_experts = {n_experts}"


# 3 tokens, 2 choices each, 4 experts, of which expert 1 has no rows; its permutation is not its own inverse.
BY_HAND = _routing([[2, 0], [0, 3], [2, 0]], 4)


def _with_gradients(y: Tensor, **leaves: Tensor) -> dict:
    """The result, and whether gradients reach what it was made from: what gets none never learns."""
    reached = [None] * len(leaves)
    if isinstance(y, Tensor) and y.requires_grad:
        reached = torch.autograd.grad(y.sum(), list(leaves.values()), allow_unused=True)
    return {"y": y} | {
        f"a gradient reaches the {name}": gradient is not None for name, gradient in zip(leaves, reached, strict=True)
    }


# 4.1 counts and offsets


def _ends(sorted_experts: Tensor, n_experts: int) -> Tensor:
    return torch.bincount(sorted_experts, minlength=n_experts).cumsum(0).int()


def _offset_cases() -> list[Case]:
    longer = torch.tensor([0, 2, 2, 3, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 6, 6, 6])
    return [
        Case(name="six rows, expert 2 has none", args=(torch.tensor([0, 0, 0, 1, 3, 3]), 4)),
        Case(name="the first and the last experts have none", args=(torch.tensor([1, 1, 2]), 5)),
        Case(name="one expert has them all", args=(torch.full((7,), 2), 4)),
        Case(name="no rows at all", args=(torch.empty(0, dtype=torch.int64), 3)),
        Case(name="17 rows, 8 experts", args=(longer, 8)),
    ]


EXPERT_OFFSETS = Exercise(
    id="4.1",
    title="where each expert's rows end",
    reference=dispatch.expert_offsets,
    cases=_offset_cases,
    mistakes=(
        Mistake(
            name="starts in place of ends",
            wrong=lambda sorted_experts, n_experts: F.pad(_ends(sorted_experts, n_experts)[:-1], (1, 0)),
            says="These are the starts of the experts' rows. Asked for are the ends: an expert's rows begin where "
            "those of the expert before it end, so the ends alone say it all, and the last of them is R.",
        ),
        Mistake(
            name="counts in place of ends",
            wrong=lambda sorted_experts, n_experts: torch.bincount(sorted_experts, minlength=n_experts).int(),
            says="These are the counts, how many rows each expert has. An offset is a place in the list: add up the "
            "counts of all experts up to this one.",
        ),
        Mistake(
            name="experts at the end forgotten",
            wrong=lambda sorted_experts, n_experts: torch.bincount(sorted_experts).cumsum(0).int(),
            says="Experts after the last busy one are missing. `bincount` stops at the largest id that it sees; tell "
            "it how many there are (`minlength`). In training this shows only once an expert at the end goes idle.",
        ),
        Mistake(
            name="experts without rows left out",
            wrong=lambda sorted_experts, n_experts: (
                torch.unique_consecutive(sorted_experts, return_counts=True)[1].cumsum(0).int()
            ),
            says="Experts without rows have no entry. They need one, equal to the end before it, or all experts after "
            "them get the rows of another. `unique` and `groupby` only know the ids that occur.",
        ),
        Mistake(
            name="a zero in front",
            wrong=lambda sorted_experts, n_experts: F.pad(_ends(sorted_experts, n_experts), (1, 0)),
            says="There are E + 1 numbers, with a zero in front. Other libraries keep offsets like this; here they "
            "are E ends, as torch's grouped product wants them, and the zero is understood.",
        ),
        Mistake(
            name="the last end left out",
            wrong=lambda sorted_experts, n_experts: _ends(sorted_experts, n_experts)[:-1],
            says="The end of the last expert is missing. It is always R, so that it can be guessed, as `tensor_split` "
            "does; here it belongs to the list.",
        ),
        Mistake(
            name="the last row in place of the end",
            wrong=lambda sorted_experts, n_experts: _ends(sorted_experts, n_experts) - 1,
            says="Each number is one too small: it is the last row of the expert. As in Python's slices, an end is "
            "the first row that no longer belongs.",
        ),
        Mistake(
            name="64 bits in place of 32",
            wrong=lambda sorted_experts, n_experts: _ends(sorted_experts, n_experts).long(),
            says="The numbers are right, and int64. Offsets are int32, because torch's grouped product takes nothing "
            "else: end with `.int()`, or ask the function for int32.",
        ),
    ),
)


# 4.2 the plan


def _plan_cases() -> list[Case]:
    routings = {
        "three tokens by hand": BY_HAND,
        "one token": _routing([[4, 0, 2]], 5),
        "all to one expert": _routing([[1]] * 5, 3),
        "40 tokens, 3 of 7 experts": _random_routing(40, 3, 7, empty=4, seed=1),
    }
    return [Case(name=name, args=(routing,), show=_routing_shown(routing)) for name, routing in routings.items()]


LONG = 100  # choices from which on torch's unstable sort shows itself, on the processors where it does


def _run_plan(solution: Callable, case: Case) -> dict:
    """The plan with every expert's rows in order, and, for a long list, whether they were: so that one mistake, an
    unstable sort, looks the same whatever order it leaves behind.
    """
    plan, right = solution(*case.args), dispatch.make_plan(*case.args)
    if _is_sorted_within_tokens(plan, case.args[0]):
        raise Refused(
            "Every token's choices are sorted by themselves: `.sort()` works along the last dimension, which here is a "
            "token's slots. The rows of all tokens stand in one list; flatten the ids first."
        )
    if _is_sorted_by_expert(plan, case.args[0]):
        places = right.choice_rows.flatten()[plan.row_choices]  # where each row of the plan should stand
        in_order = bool((places.diff() > 0).all())
        if plan.choice_rows.min() >= 0 and plan.choice_rows.max() < len(places):
            plan = DispatchPlan(right.row_choices, places[plan.choice_rows], plan.offsets)
    else:
        in_order = True
    found = {"plan": plan}
    if right.n_rows > LONG:
        found["an expert's rows are in the order of their choices"] = in_order
    return found


def _is_sorted_by_expert(plan: object, routing: Routing) -> bool:
    """Whether rows hold each choice once, expert by expert, in a plan of the right shapes and types."""
    flat = routing.topk_experts.flatten()
    parts = (getattr(plan, "row_choices", None), getattr(plan, "choice_rows", None))
    if [getattr(part, "dtype", None) for part in parts] != [torch.int64] * 2:
        return False
    rows, slots = parts
    if rows.shape != flat.shape or slots.shape != routing.topk_experts.shape:
        return False
    return torch.equal(rows.sort().values, torch.arange(len(flat))) and bool((flat[rows].diff() >= 0).all())


def _is_sorted_within_tokens(plan: object, routing: Routing) -> bool:
    """Whether rows hold 0 to K - 1 over and over: a sort of each token's slots, of which there are several."""
    experts, rows = routing.topk_experts, getattr(plan, "row_choices", None)
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.numel() != experts.numel():
        return False
    if min(experts.shape) < 2:
        return False
    slots = torch.arange(experts.shape[1]).expand(experts.shape)
    return torch.equal(rows.view(experts.shape).sort(1).values, slots)


def _planned(
    order: Callable[[Tensor], Tensor] = lambda flat: flat.sort(stable=True).indices,
    choice_rows: Callable[[Tensor], Tensor] = torch.argsort,
    row_choices: Callable[[Tensor, int], Tensor] = lambda rows, top_k: rows,
    offsets: Callable[[Tensor, int], Tensor] = lambda flat, n: dispatch.expert_offsets(flat.sort().values, n),
    flatten: Callable[[Tensor], Tensor] = torch.flatten,
    cut: Callable[[Tensor, Tensor], Tensor] = lambda rows, experts: rows.view(experts.shape),
) -> Callable[[Routing], DispatchPlan]:
    """A plan with one of its steps done in another way."""

    def wrong(routing: Routing) -> DispatchPlan:
        experts = routing.topk_experts
        flat = flatten(experts)
        rows = order(flat)
        return DispatchPlan(
            row_choices(rows, experts.shape[1]),
            cut(choice_rows(rows), experts),
            offsets(flat, routing.n_experts),
        )

    return wrong


def _reversed_within(flat: Tensor) -> Tensor:
    """Sorted by expert, the last choice of each first."""
    return len(flat) - 1 - flat.flip(0).sort(stable=True).indices


def _places_within(routing: Routing) -> DispatchPlan:
    right, flat = dispatch.make_plan(routing), routing.topk_experts.flatten()
    places = F.one_hot(flat, routing.n_experts).cumsum(0).gather(1, flat[:, None]) - 1
    return DispatchPlan(right.row_choices, places.view_as(right.choice_rows), right.offsets)


def _exchanged(routing: Routing) -> DispatchPlan:
    right = dispatch.make_plan(routing)
    return DispatchPlan(
        right.choice_rows.flatten(), right.row_choices.view_as(right.choice_rows), offsets=right.offsets
    )


def _expert_ids_as_choices(routing: Routing) -> DispatchPlan:
    right = dispatch.make_plan(routing)
    return DispatchPlan(routing.topk_experts.flatten()[right.row_choices], right.choice_rows, right.offsets)


MAKE_PLAN = Exercise(
    id="4.2",
    title="the plan",
    reference=dispatch.make_plan,
    cases=_plan_cases,
    run=_run_plan,
    mistakes=(
        Mistake(
            name="the two tables are exchanged",
            wrong=_exchanged,
            says="The two tables are exchanged. `row_choices[r]` asks from the row: which choice travels here? "
            "`choice_rows[t, k]` asks from the token: in which row does this choice travel?",
        ),
        Mistake(
            name="the inverse is missing",
            wrong=_planned(choice_rows=lambda rows: rows),
            says="`choice_rows` holds the same permutation as `row_choices`. It is the inverse: if row 3 carries "
            "choice 7, then choice 7 travels in row 3. Tokens would come back with rows of other tokens.",
        ),
        Mistake(
            name="tokens in place of choices",
            wrong=_planned(row_choices=lambda rows, top_k: rows // top_k),
            says="`row_choices` holds tokens. Keep the choices, t·K + slot: they say which token, and also which of "
            "its weights. The token is got by a division when it is needed.",
        ),
        Mistake(
            name="experts in place of choices",
            wrong=_expert_ids_as_choices,
            says="`row_choices` holds ids of experts: those are the `values` of the sort. Asked for is which choice "
            "stands at each place now, which the sort tells as its `indices`.",
        ),
        Mistake(
            name="choice_rows is cut slot by slot",
            wrong=_planned(cut=lambda rows, experts: rows.view(*experts.T.shape).T),
            says="The numbers in `choice_rows` are right and stand at the places of other choices. They come token by "
            "token, t·K + slot, so cut them into (T, K) straight away: `.view(K, T).T` is for a list that runs slot "
            "by slot.",
        ),
        Mistake(
            name="places counted within each expert",
            wrong=_places_within,
            says="`choice_rows` counts each expert's rows from 0. A row's number counts all rows: add where the "
            "expert's rows begin.",
        ),
        Mistake(
            name="sorted from the last expert to the first",
            wrong=_planned(order=lambda flat: flat.sort(descending=True, stable=True).indices),
            says="The rows run from the last expert to the first. The offsets, and every grouped product, expect "
            "expert 0 first: sort upwards.",
        ),
        Mistake(
            name="the sort is not stable",
            wrong=_planned(order=_reversed_within),
            says="The experts are in order, but within an expert the choices are not. Equal ids must keep the order "
            "that they had, which is what `stable=True` promises. Without it the order may change from machine to "
            "machine, and with it the last bits of the weights' gradients.",
        ),
        Mistake(
            name="choices numbered slot by slot",
            wrong=_planned(flatten=lambda experts: experts.T.flatten()),
            says="The choices are numbered slot by slot: first choices of all tokens, then second ones. Here choice "
            "t·K + slot is meant, token by token, which is the order in which `topk_experts` lies in memory.",
        ),
        Mistake(
            name="counts in place of offsets",
            wrong=_planned(offsets=lambda flat, n: torch.bincount(flat, minlength=n).int()),
            says="`offsets` holds counts. They are ends, added up over the experts: `expert_offsets` makes them.",
        ),
        Mistake(
            name="offsets of the list before it was sorted",
            wrong=_planned(offsets=lambda flat, n: dispatch.expert_offsets(flat, n)),
            says="The offsets were looked up in the experts as the tokens chose them. A binary search in a list that "
            "is not sorted finds nonsense, and says nothing: give `expert_offsets` the sorted ids.",
        ),
    ),
)


# 4.3 permute


def _permute_cases() -> list[Case]:
    def case(name: str, routing: Routing, tokens: Tensor) -> Case:
        return Case(name=name, args=(tokens.requires_grad_(), dispatch.make_plan(routing)))

    return [
        case("three tokens by hand", BY_HAND, torch.tensor([[7.0], [8.0], [9.0]])),
        case("one token, three experts", _routing([[4, 0, 2]], 5), torch.tensor([[1.0, -1.0]])),
        case("one expert a token", _routing([[1], [0], [2], [0]], 3), _rand(4, 3, seed=1)),
        case("11 tokens, 3 of 5 experts", _random_routing(11, 3, 5, empty=3, seed=2), _rand(11, 4, seed=3)),
    ]


TOY = torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0]])  # the notebook's `x`


def _run_permute(solution: Callable, case: Case) -> Tensor:
    """The rows; torch's words about an index that is none are said in ours, whichever function raised them."""
    try:
        return solution(*case.args)
    except (IndexError, RuntimeError) as error:
        says = str(error)
        if "tensors used as indices" in says or "for index" in says or "are valid indices" in says:
            raise Refused("An index has to be a whole number: `/` makes floats, `//` whole numbers.") from error
        if "out of bounds" in says or "out of range" in says:
            raise Refused(
                "An index runs out of the tokens. There are T of them, and T·K choices and as many rows: look at what "
                "your index counts."
            ) from error
        raise


PERMUTE = Exercise(
    id="4.3",
    title="permute",
    reference=dispatch.permute,
    cases=_permute_cases,
    run=_run_permute,
    mistakes=(
        Mistake(
            name="the notebook's x in place of `tokens`",
            wrong=lambda tokens, plan: TOY[plan.row_choices // plan.choice_rows.shape[1]],
            says="The rows hold the toy's numbers 10, 20, 30, …, whatever tokens are given: your function reads the "
            "notebook's `x`. Use its own argument, `tokens`.",
        ),
        Mistake(
            name="a division that leaves fractions",
            wrong=lambda tokens, plan: tokens[plan.row_choices / plan.choice_rows.shape[1]],
            says="`/` makes floats, and a float is no index. Choices t·K, t·K + 1, … all belong to token t: divide "
            "with `//`.",
        ),
        Mistake(
            name="K taken as 2",
            wrong=lambda tokens, plan: tokens[plan.row_choices // 2],
            says="You divided by 2, the K of the notebook's six tokens. Other layers have another K: it is the width "
            "of `plan.choice_rows`.",
        ),
        Mistake(
            name="rows taken for tokens",
            wrong=lambda tokens, plan: tokens[plan.choice_rows],
            says="The tokens are indexed by `choice_rows`, which holds numbers of rows: where each choice travels. "
            "Here every row asks which choice it carries, `row_choices`, and whose choice that is.",
        ),
        Mistake(
            name="choices taken for tokens",
            wrong=lambda tokens, plan: tokens[plan.row_choices],
            says="Choices are used as if they were tokens. There are T·K choices and only T tokens, so that the index "
            "runs out of the tokens. Choice t·K + slot belongs to token t.",
        ),
        Mistake(
            name="the remainder in place of the quotient",
            wrong=lambda tokens, plan: tokens[plan.row_choices % plan.choice_rows.shape[1]],
            says="You took the remainder, row_choices % K. That is the slot, whether it was the first or the second "
            "choice. The token is the quotient: choices are numbered t·K + slot.",
        ),
        Mistake(
            name="divided by the number of experts",
            wrong=lambda tokens, plan: tokens[plan.row_choices // len(plan.offsets)],
            says="You divided by the number of experts. A token has K choices in a row, whatever the number of "
            "experts: divide by K, the width of `choice_rows`.",
        ),
        Mistake(
            name="choices taken as numbered slot by slot",
            wrong=lambda tokens, plan: tokens[plan.row_choices % len(plan.choice_rows)],
            says="You took the remainder by T. That fits choices that are numbered slot by slot; here they are "
            "numbered token by token, t·K + slot.",
        ),
        Mistake(
            name="the inverse permutation",
            wrong=lambda tokens, plan: tokens[plan.choice_rows.flatten() // plan.choice_rows.shape[1]],
            says="Rows are filled by `choice_rows`, which is the inverse of what is needed: it is asked by a choice "
            "for its row. Here every row asks which choice it carries.",
        ),
        Mistake(
            name="copies in the order of the tokens",
            wrong=lambda tokens, plan: tokens.repeat_interleave(plan.choice_rows.shape[1], dim=0),
            says="There are K copies of every token, but they stand in the order of the tokens. Rows stand sorted by "
            "expert: the plan says which choice comes where.",
        ),
        Mistake(
            name="the list of tokens repeated",
            wrong=lambda tokens, plan: tokens.repeat(plan.choice_rows.shape[1], 1),
            says="The tokens are repeated one list after the other. Rows stand sorted by expert: the plan says which "
            "choice comes where.",
        ),
    ),
)


# 4.4 the grouped product


def _product_cases() -> list[Case]:
    def case(name: str, ends: list[int], width: int, out_width: int, seed: int) -> Case:
        rows, weights = _rand(ends[-1], width, seed=seed), _rand(len(ends), out_width, width, seed=seed + 1)
        args = (rows.requires_grad_(), weights.requires_grad_(), torch.tensor(ends, dtype=torch.int32))
        return Case(name=name, args=args)

    rows = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]).requires_grad_()
    weights = torch.tensor([[[10.0]], [[100.0]], [[1000.0]], [[0.5]]]).requires_grad_()
    ends = torch.tensor([2, 2, 4, 5], dtype=torch.int32)
    return [
        Case(name="five rows of one number, expert 1 has none", args=(rows, weights, ends)),
        case("square matrices", [1, 4, 4, 6], 3, 3, seed=1),
        case("the first expert has no rows", [0, 3, 7], 4, 5, seed=3),
        case("the last expert has no rows", [3, 5, 5, 9, 9], 5, 2, seed=5),
    ]


def _run_product(solution: Callable, case: Case) -> dict:
    """The products, and whether gradients reach rows and matrices."""
    rows, weights, _ = case.args
    try:
        y = solution(*case.args)
    except RuntimeError as error:
        if "strides should be" in str(error):
            raise Refused("torch's grouped product takes rows and matrices in steps of 16 bytes only.") from error
        raise
    return _with_gradients(y, rows=rows, weights=weights)


def _sliced(
    start: Callable[[int, int], int], stop: Callable[[int, int], int] = lambda start, end: end
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The product slice by slice, where `start` says what the start becomes after a group, and `stop` where it ends."""

    def wrong(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        begin, products = 0, []
        for end, w in zip(offsets.tolist(), weights, strict=True):
            products.append(rows[begin : stop(begin, end)] @ w.T)
            begin = start(begin, end)
        return torch.cat(products)

    return wrong


def _owned(rows: Tensor, weights: Tensor, owners: Tensor) -> Tensor:
    """Every row times the matrix of its owner."""
    return (weights[owners] @ rows[:, :, None])[:, :, 0]


def _sizes(offsets: Tensor) -> Tensor:
    return offsets.diff(prepend=offsets.new_zeros(1)).long()


def _busy_only(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    sizes = _sizes(offsets)
    return _owned(rows, weights, torch.arange(int((sizes > 0).sum())).repeat_interleave(sizes[sizes > 0]))


def _as_counts(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    return _owned(rows, weights, torch.arange(len(offsets)).repeat_interleave(offsets.long())[: len(rows)])


GROUPED_MM = Exercise(
    id="4.4",
    title="the grouped product",
    reference=ops.grouped_mm,
    cases=_product_cases,
    run=_run_product,
    mistakes=(
        Mistake(
            name="torch's own product",
            wrong=lambda rows, weights, offsets: F.grouped_mm(rows, weights.mT, offs=offsets),
            says="`F.grouped_mm` is where this leads, and the notebook calls it further on. It takes sizes of 16 "
            "bytes and their multiples only, four floats; these cases are smaller. Write the product out: it is what "
            "torch's is tested against.",
        ),
        Mistake(
            name="the rows cut off from their gradient",
            wrong=lambda rows, weights, offsets: ops.grouped_mm(rows.detach(), weights, offsets),
            says="The products are right, but no gradient reaches the rows: `.detach()`, `.data`, `.tolist()` or "
            "`torch.no_grad()` cuts them off. Everything in front of this layer would stop learning.",
        ),
        Mistake(
            name="the matrices cut off from their gradient",
            wrong=lambda rows, weights, offsets: ops.grouped_mm(rows, weights.detach(), offsets),
            says="The products are right, but no gradient reaches the matrices: `.detach()`, `.data`, `.tolist()` or "
            "`torch.no_grad()` cuts them off. The experts would never learn.",
        ),
        Mistake(
            name="the start is never moved",
            wrong=_sliced(start=lambda begin, end: begin),
            says="Every group begins at row 0, so that early rows are multiplied again and again. After a group its "
            "end is the start of the next one.",
        ),
        Mistake(
            name="the end added to the start",
            wrong=_sliced(start=lambda begin, end: begin + end),
            says="The start runs away: `start += end` adds up ends, which are sums of sizes already. After a group "
            "its end *is* the next start.",
        ),
        Mistake(
            name="the end counted from the start",
            wrong=_sliced(start=lambda begin, end: end, stop=lambda begin, end: begin + end),
            says="`rows[start : start + end]` takes the end for a size. An end counts from row 0 on, wherever the "
            "group begins.",
        ),
        Mistake(
            name="the end included",
            wrong=_sliced(start=lambda begin, end: end, stop=lambda begin, end: end + 1),
            says="Each group takes one row too many, the first of the next one. An end is the first row that no "
            "longer belongs, as in Python's slices.",
        ),
        Mistake(
            name="split by the ends",
            wrong=lambda rows, weights, offsets: torch.cat(
                [part @ w.T for part, w in zip(rows.split(offsets.tolist()), weights, strict=True)]
            ),
            says="`split` wants the sizes of the parts, and got their ends. Slice with the ends, or take differences "
            "to get the sizes.",
        ),
        Mistake(
            name="ends taken for sizes",
            wrong=_as_counts,
            says="The offsets are used as sizes of the groups. They are ends: expert e has the rows from the end of "
            "the expert before it up to its own.",
        ),
        Mistake(
            name="ends taken for starts",
            wrong=lambda rows, weights, offsets: torch.cat(
                [rows[a:b] @ w.T for a, b, w in zip(offsets, [*offsets[1:], len(rows)], weights, strict=True)]
            ),
            says="Each group begins at its own end, so that the first group is lost and every other row meets the "
            "matrix of the expert before. The first group begins at 0, each other where the one before it ends.",
        ),
        Mistake(
            name="the first group lost",
            wrong=lambda rows, weights, offsets: torch.cat(
                [rows[a:b] @ w.T for a, b, w in zip(offsets[:-1], offsets[1:], weights[1:], strict=True)]
            ),
            says="The rows of expert 0 are missing. Its rows begin at 0, which is not in the list of ends. In a loop, "
            "`offsets[e - 1]` is `offsets[-1]` for e = 0: Python counts from the back, and the slice is empty.",
        ),
        Mistake(
            name="the first group left at zero",
            wrong=lambda rows, weights, offsets: (
                ops.grouped_mm(rows, weights, offsets) * (torch.arange(len(rows)) >= offsets[0])[:, None]
            ),
            says="The rows of expert 0 are still zero. Its rows begin at 0, which is not in the list of ends. In a "
            "loop, `offsets[e - 1]` is `offsets[-1]` for e = 0: Python counts from the back, and the slice is empty.",
        ),
        Mistake(
            name="weights not transposed",
            wrong=lambda rows, weights, offsets: ops.grouped_mm(rows, weights.mT, offsets),
            says="The matrices are used without transposing them. Each is (O, I), as nn.Linear keeps it: rows @ w.T. "
            "Where O equals I there is not even an error.",
        ),
        Mistake(
            name="an expert without rows shifts the matrices",
            wrong=_busy_only,
            says="After an expert without rows every row meets the matrix of the wrong expert. An empty group still "
            "has its own matrix: count it, or take each matrix by its expert's id.",
        ),
        Mistake(
            name="off by one at the borders",
            wrong=lambda rows, weights, offsets: _owned(
                rows, weights, torch.searchsorted(offsets, torch.arange(len(rows)), right=False)
            ),
            says="The first row of each group meets the matrix of the group before. An end is the first row that no "
            "longer belongs: row r is expert e's if offsets[e - 1] <= r < offsets[e] (`right=True` in searchsorted).",
        ),
    ),
)


# 4.5 combine


def _combine_cases() -> list[Case]:
    def case(name: str, routing: Routing, rows: Tensor, weights: Tensor) -> Case:
        plan = dispatch.make_plan(routing)
        return Case(name=name, args=(rows.requires_grad_(), plan, weights.requires_grad_()))

    weights = torch.tensor([[0.5, 0.25], [0.75, 0.125], [0.25, 0.5]])
    return [
        case("three tokens by hand", BY_HAND, torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0]]), weights),
        case(
            "one token, three experts",
            _routing([[4, 0, 2]], 5),
            torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 2.0]]),
            torch.tensor([[0.5, 0.25, 0.125]]),
        ),
        case("one expert a token", _routing([[1], [0], [2], [0]], 3), _rand(4, 3, seed=1), _rand(4, 1, seed=2).abs()),
        case(
            "11 tokens, 3 of 5 experts",
            _random_routing(11, 3, 5, empty=3, seed=2),
            _rand(33, 4, seed=3),
            _rand(11, 3, seed=4).abs(),
        ),
    ]


def _run_combine(solution: Callable, case: Case) -> dict:
    """The result, and whether gradients reach the rows and the weights: a router that gets none never learns."""
    rows, _, weights = case.args
    return _with_gradients(solution(*case.args), rows=rows, weights=weights)


def _in_slots(rows: Tensor, order: Tensor, like: Tensor) -> Tensor:
    """Rows in some order, cut into K a token: (T, K, D)."""
    return rows[order].view(*like.shape, -1)


def _weighted(rows: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    """(T, K, D): what every choice brings."""
    return weights[..., None] * rows[plan.choice_rows]


def _overwritten(rows: Tensor, plan: DispatchPlan, weights: Tensor) -> Tensor:
    last = plan.choice_rows.max(dim=1, keepdim=True).indices  # the slot whose row comes last
    return _weighted(rows, plan, weights).gather(1, last[..., None].expand(-1, -1, rows.shape[1]))[:, 0]


COMBINE = Exercise(
    id="4.5",
    title="combine",
    reference=dispatch.combine,
    cases=_combine_cases,
    run=_run_combine,
    mistakes=(
        Mistake(
            name="weights without a gradient",
            wrong=lambda rows, plan, weights: _weighted(rows, plan, weights.detach()).sum(1),
            says="The result is right, but no gradient reaches the weights: `.detach()`, `.data`, `.item()`, "
            "`.tolist()` or `torch.no_grad()` cuts them off. They are the router's only tie to the loss: it would "
            "never learn, while the loss still falls. That has been shipped.",
        ),
        Mistake(
            name="rows without a gradient",
            wrong=lambda rows, plan, weights: _weighted(rows.detach(), plan, weights).sum(1),
            says="The result is right, but no gradient reaches the rows: `.detach()`, `.data`, `.tolist()` or "
            "`torch.no_grad()` cuts them off. The experts would never learn.",
        ),
        Mistake(
            name="the sum is thrown away",
            wrong=lambda rows, plan, weights: rows.new_zeros(len(weights), rows.shape[1]),
            says="Everything is still zero. `y.index_add(…)` and `y + …` leave y as it is and return the sum: keep "
            "what they return.",
        ),
        Mistake(
            name="a dimension of the weights is missing",
            wrong=lambda rows, plan, weights: (weights * rows[plan.choice_rows]).sum(1),
            says="Weights of (T, K) meet rows of (T, K, D). Broadcasting lines shapes up from the right: T meets K, "
            "and K meets D. That mostly fails, and where the sizes happen to fit, as with K = 1, it is silently wrong. "
            "Give the weights a last dimension of size 1.",
        ),
        Mistake(
            name="the new dimension stands in the middle",
            wrong=lambda rows, plan, weights: (weights[:, None] * rows[plan.choice_rows]).sum(1),
            says="The weights have become (T, 1, K), so that K meets D. Each weight belongs to a whole row: they have "
            "to be (T, K, 1), with the new dimension at the end.",
        ),
        Mistake(
            name="weights in the order of the tokens",
            wrong=lambda rows, plan, weights: (rows * weights.view(-1, 1))[plan.choice_rows].sum(1),
            says="The weights meet the rows in the order of the tokens, but rows stand sorted by expert. Bring the "
            "rows back into the tokens' order first, or put the weights into the rows' order.",
        ),
        Mistake(
            name="rows taken as they stand",
            wrong=lambda rows, plan, weights: (
                _in_slots(rows, torch.arange(len(rows)), weights) * weights[..., None]
            ).sum(1),
            says="The rows are cut into K a token as they stand, sorted by expert. A token's rows stand wherever its "
            "experts are: `choice_rows` knows where.",
        ),
        Mistake(
            name="the permutation in place of its inverse",
            wrong=lambda rows, plan, weights: (_in_slots(rows, plan.row_choices, weights) * weights[..., None]).sum(1),
            says="The rows are fetched by `row_choices`, which sorted them in the first place: applied twice, a sort "
            "does not undo itself. A token asks for the rows of its choices: `choice_rows`.",
        ),
        Mistake(
            name="a token's rows overwrite each other",
            wrong=_overwritten,
            says="Of every token's rows only the last is left. `y[tokens] = …` and `y[tokens] += …` write each place "
            "once, also if a token comes K times: what is read back are the old values. Gather and sum, or use "
            "`index_add`.",
        ),
        Mistake(
            name="only the first choice comes back",
            wrong=lambda rows, plan, weights: _weighted(rows, plan, weights)[:, 0],
            says="Only the first choice's row comes back. A token is the sum over all of its K rows.",
        ),
        Mistake(
            name="mean in place of sum",
            wrong=lambda rows, plan, weights: _weighted(rows, plan, weights).mean(1),
            says="That is the mean over a token's K rows, and K times too small. The weights say already how much "
            "each row counts: sum.",
        ),
        Mistake(
            name="weights left out",
            wrong=lambda rows, plan, weights: rows[plan.choice_rows].sum(1),
            says="The weights are not used: each row counts fully. Multiply every row by the weight of the choice "
            "that it carries.",
        ),
        Mistake(
            name="weights normalised again",
            wrong=lambda rows, plan, weights: _weighted(rows, plan, weights).sum(1) / weights.sum(dim=1, keepdim=True),
            says="The weights are divided by their sum. Whether they sum to one is the router's business (OLMoE's do "
            "not, nor do Switch's): use them as they come.",
        ),
        Mistake(
            name="summed over the tokens",
            wrong=lambda rows, plan, weights: _weighted(rows, plan, weights).sum(0),
            says="The sum runs over the tokens, and mixes them. Of (T, K, D) the K is to go: it is dimension 1.",
        ),
        Mistake(
            name="summed over the numbers of a row",
            wrong=lambda rows, plan, weights: _weighted(rows, plan, weights).sum(-1),
            says="The sum runs along each row's own numbers, and leaves (T, K). Of (T, K, D) the K is to go: it is "
            "dimension 1.",
        ),
        Mistake(
            name="not summed",
            wrong=lambda rows, plan, weights: _weighted(rows, plan, weights),
            says="The result is (T, K, D): the K rows of a token still stand side by side. Sum over them.",
        ),
    ),
)


# 4.6 capacity


def dropped_choices(routing: Routing, capacity_factor: float) -> Tensor:
    """(T, K) whether a choice finds its expert full: first choices come before second ones, then early tokens.

    Source: Lepikhin et al. 2020 (GShard), algorithm 1; the capacity is Fedus et al. 2021 (Switch), equation 3.
    """
    n_tokens, top_k = routing.topk_experts.shape
    capacity = dispatch.expert_capacity(n_tokens, top_k, routing.n_experts, capacity_factor)
    return dispatch.make_plan(routing, capacity).dropped


def _capacity_cases() -> list[Case]:
    def case(name: str, routing: Routing, factor: float) -> Case:
        show = f"{_routing_shown(routing)}, capacity_factor = {factor:g}"
        return Case(name=name, args=(routing, factor), show=show)

    by_hand = _routing([[0, 1], [0, 2], [1, 0], [0, 1], [0, 2]], 3)
    return [
        case("four tokens, two experts", _routing([[0], [0], [0], [1]], 2), 1.0),  # T·K/E is whole: C = 2
        case("three tokens, one expert of two", _routing([[0], [0], [0]], 2), 1.0),
        case("five tokens, 2 of 3 experts", by_hand, 1.0),
        case("the same, tighter", by_hand, 0.5),
        case("room for all", by_hand, 2.0),
        case("seven tokens, all to one expert of three", _routing([[0]] * 7, 3), 1.5),
        case("7 tokens, 3 of 5 experts", _random_routing(7, 3, 5, empty=3, seed=4), 1.25),
        case("23 tokens, 2 of 5 experts", _random_routing(23, 2, 5, empty=1, seed=6), 1.0),
    ]


def _dropped(
    capacity: Callable[[float, float, int], float] = lambda even, factor, top_k: math.ceil(even * factor),
    queue: Callable[[Tensor], Tensor] = lambda ids: ids.T.flatten(),
    full: Callable[[Tensor, float], Tensor] = lambda place, capacity: place >= capacity,
    finish: Callable[[Tensor], Tensor] = lambda dropped: dropped,
) -> Callable[[Routing, float], Tensor]:
    """Who is dropped, with one of the steps done in another way; `even` is T·K/E."""

    def wrong(routing: Routing, capacity_factor: float) -> Tensor:
        experts, n_experts = routing.topk_experts, routing.n_experts
        order = queue(torch.arange(experts.numel()).view_as(experts))
        chosen = experts.flatten()[order]
        place = F.one_hot(chosen, n_experts).cumsum(0).gather(1, chosen[:, None])[:, 0] - 1
        limit = capacity(experts.numel() / n_experts, capacity_factor, experts.shape[1])
        dropped = torch.empty(experts.numel(), dtype=torch.bool)
        dropped[order] = full(place, limit)
        return finish(dropped.view_as(experts))

    return wrong


def _counters_per_slot(routing: Routing, capacity_factor: float) -> Tensor:
    experts = routing.topk_experts
    capacity = math.ceil(experts.numel() * capacity_factor / routing.n_experts)
    places = F.one_hot(experts, routing.n_experts).cumsum(0).gather(2, experts[..., None])[..., 0] - 1
    return places >= capacity


def _queue_order_kept(routing: Routing, capacity_factor: float) -> Tensor:
    right = dropped_choices(routing, capacity_factor)
    return right.T.flatten().view_as(right)


DROPPED_CHOICES = Exercise(
    id="4.6",
    title="who is dropped",
    reference=dropped_choices,
    cases=_capacity_cases,
    mistakes=(
        Mistake(
            name="the queue runs by tokens, the way back by slots",
            wrong=_dropped(
                queue=lambda ids: ids.flatten(),
                finish=lambda dropped: dropped.view(*dropped.T.shape).T,
            ),
            says="The queue is token by token, and its verdicts are read back as if it were slot by slot. Queue slot "
            "by slot (`.T.flatten()`), then `.view(K, T).T` is the way back.",
        ),
        Mistake(
            name="second choices do not wait",
            wrong=_dropped(queue=lambda ids: ids.flatten()),
            says="The queue runs token by token, so that an early token's second choice takes the place of a later "
            "token's first. First choices of all tokens come first; only then second ones.",
        ),
        Mistake(
            name="a counter for every slot",
            wrong=_counters_per_slot,
            says="Second choices are counted from 0 again, as if the expert were empty. They queue behind all first "
            "choices of that expert: it would get up to K times its capacity, and rows would be written twice.",
        ),
        Mistake(
            name="the last are kept",
            wrong=_dropped(queue=lambda ids: ids.T.flatten().flip(0)),
            says="Those at the end of the queue are kept, and those at its front dropped. First come, first served.",
        ),
        Mistake(
            name="one too many is kept",
            wrong=_dropped(full=lambda place, capacity: place > capacity),
            says="Each expert keeps C + 1 choices. Places count from 0: place C is the first one too many, so that a "
            "choice is dropped if place >= C. In a buffer of C rows it would land on the next expert's first.",
        ),
        Mistake(
            name="places counted from 1",
            wrong=_dropped(full=lambda place, capacity: place + 1 >= capacity),
            says="Each expert keeps only C - 1 choices. A running count that includes the choice itself begins at 1; "
            "its place is the number of equals *before* it, one less.",
        ),
        Mistake(
            name="rounded up too early",
            wrong=_dropped(capacity=lambda even, factor, top_k: math.ceil(even) * factor),
            says="The even share is rounded up before it is multiplied by the factor. Multiply first: else the factor "
            "enlarges the rounding too, and an expert gets more room than was planned.",
        ),
        Mistake(
            name="the capacity rounded down",
            wrong=_dropped(capacity=lambda even, factor, top_k: math.floor(even * factor)),
            says="The capacity is rounded down. It is rounded up: else even a perfectly even load would lose choices "
            "where E does not divide T·K.",
        ),
        Mistake(
            name="the capacity counts tokens",
            wrong=_dropped(capacity=lambda even, factor, top_k: math.ceil(even / top_k * factor)),
            says="The capacity is too small by a factor of K: it counts tokens, T/E. Each token makes K choices, so "
            "an expert's even share is T·K/E.",
        ),
        Mistake(
            name="the factor is left out",
            wrong=_dropped(capacity=lambda even, factor, top_k: math.ceil(even)),
            says="The capacity is the even share, whatever the factor. Multiply T·K/E by it, then round up.",
        ),
        Mistake(
            name="nobody is ever dropped",
            wrong=_dropped(full=lambda place, capacity: place < 0),
            says="Everything is False. Count along the queue: `cumsum(1)` counts along the experts, where each choice "
            "stands alone and has place 0.",
        ),
        Mistake(
            name="kept in place of dropped",
            wrong=_dropped(full=lambda place, capacity: place < capacity),
            says="This is True for the choices that are kept. Asked for are those that are dropped.",
        ),
        Mistake(
            name="the whole token is dropped",
            wrong=_dropped(finish=lambda dropped: dropped.any(1, keepdim=True).expand_as(dropped).clone()),
            says="A token loses all of its choices as soon as one is dropped. Each choice stands for itself: the "
            "others go on.",
        ),
        Mistake(
            name="the answer stands in the order of the queue",
            wrong=_queue_order_kept,
            says="The verdicts are right, but they stand in the order of the queue, slot by slot. Bring them back: "
            "cut them into (K, T), then transpose.",
        ),
    ),
)

EXERCISES = (EXPERT_OFFSETS, MAKE_PLAN, PERMUTE, GROUPED_MM, COMBINE, DROPPED_CHOICES)
