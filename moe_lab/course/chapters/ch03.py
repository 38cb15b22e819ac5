"""The exercises of notebook 03: what a layer of experts computes, its gradient, and what it costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from moe_lab import accounting, moe
from moe_lab.config import MoEConfig, RouterConfig
from moe_lab.course.bank import Case, Exercise, Mistake
from moe_lab.course.checking import Refused, load_weights
from moe_lab.experts import Experts
from moe_lab.ffn import swiglu
from moe_lab.presets import MIXTRAL_8X7B, OLMOE_1B_7B, QWEN3_30B_A3B
from moe_lab.records import Routing
from moe_lab.routing import Router, route

Expert = Callable[[int, Tensor], Tensor]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# What several exercises work on: routings, and experts as functions


def _routing(scores: list[list[float]] | Tensor, top_k: int, normalise: bool = True) -> Routing:
    """The routing that a softmax router makes of these scores (rows that sum to one)."""
    scores = torch.as_tensor(scores)
    config = RouterConfig(d_model=1, n_experts=scores.shape[1], top_k=top_k, normalise=normalise)
    return route(scores.log(), config)


def _random_routing(n_tokens: int, n_experts: int, top_k: int, normalise: bool, seed: int, empty: int = -1) -> Routing:
    """A routing of random scores; nobody chooses the expert `empty`."""
    logits = _random(n_tokens, n_experts, seed=seed)
    if empty >= 0:
        logits[:, empty] = -9.0
    config = RouterConfig(d_model=1, n_experts=n_experts, top_k=top_k, normalise=normalise)
    routing = route(logits, config)
    routing.topk_weights.requires_grad_()  # an answer must let the gradient through
    return routing


TOY_EXPERTS = torch.tensor([[[2.0, 0], [0, 2]], [[0, 1], [1, 0]], [[-1, 0], [0, -1]]])


def _toy_expert(e: int, x: Tensor) -> Tensor:
    return x @ TOY_EXPERTS[e].T


def _swiglu_experts(n_experts: int, d_model: int, d_ff: int, seed: int) -> Expert:
    """Experts that are not linear, so that a weight on the input is not one on the output."""
    gate, up = _random(n_experts, d_ff, d_model, seed=seed), _random(n_experts, d_ff, d_model, seed=seed + 1)
    down = _random(n_experts, d_model, d_ff, seed=seed + 2)
    return lambda e, x: swiglu(x, gate[e], up[e], down[e])


TOY_SHOW = """x = [[1, 0], [2, 3]]
topk_experts = [[0, 1], [2, 0]]
topk_weights = [[0.75, 0.25], [0.625, 0.375]]
expert 0 doubles a token, expert 1 swaps its two numbers, expert 2 negates it"""


def _toy() -> tuple[Tensor, Routing]:
    # every expert is chosen, and expert 0 by as many tokens as D: the commonest slips give numbers, not an error
    scores = [[0.66, 0.22, 0.12], [0.33, 0.12, 0.55]]
    return torch.tensor([[1.0, 0.0], [2.0, 3.0]]), _routing(scores, top_k=2)


def _larger(name: str, n_tokens: int, d_model: int, n_experts: int, top_k: int, **routing: Any) -> Case:
    """SwiGLU experts on random tokens."""
    x = _random(n_tokens, d_model, seed=n_tokens)
    how = {"normalise": True, "seed": n_experts} | routing
    weights = "weights that sum to one" if how["normalise"] else "weights that do not sum to one"
    return Case(
        name=name,
        args=(x, _random_routing(n_tokens, n_experts, top_k, **how), _swiglu_experts(n_experts, d_model, 5, seed=40)),
        show=f"{n_tokens} random tokens, {top_k} of {n_experts} experts each, {weights}; the experts are SwiGLUs",
    )


def _layer_cases() -> list[Case]:
    return [
        Case(name="two tokens by hand", args=(*_toy(), _toy_expert), show=TOY_SHOW),
        _larger("one choice each", 3, 4, 5, 1, seed=7),
        _larger("as many choices as experts", 6, 4, 3, 3),
        _larger("weights that do not sum to one", 7, 4, 6, 3, normalise=False),
        _larger("an expert that nobody chose", 9, 4, 8, 2, normalise=False, empty=2),
    ]


def _chosen(routing: Routing) -> Tensor:
    """(T, E), one where a token chose an expert."""
    return torch.zeros_like(routing.router_scores).scatter(1, routing.topk_experts, 1.0)


def _weighed_by(weights: Callable[[Routing], Tensor]) -> Callable[[Tensor, Routing, Expert], Tensor]:
    """The definition with other dense weights (T, E)."""

    def wrong(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
        dense = weights(routing)
        return sum(dense[:, e, None] * expert(e, x) for e in range(routing.n_experts))

    return wrong


def _with_weights(routing: Routing, weights: Tensor) -> Tensor:
    """(T, E), dense weights made of other top-k weights."""
    return torch.zeros_like(routing.router_scores).scatter(1, routing.topk_experts, weights)


def _first_only(routing: Routing) -> Tensor:
    keeps = torch.zeros_like(routing.topk_weights)
    keeps[:, 0] = 1
    return _with_weights(routing, routing.topk_weights * keeps)


def _last_expert(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    last = routing.n_experts - 1
    return routing.dense_weights[:, last, None] * expert(last, x)


def _slot_as_expert(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    return sum(w[:, None] * expert(slot, x) for slot, w in enumerate(routing.topk_weights.unbind(1)))


def _weighed_input(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    return sum(expert(e, routing.dense_weights[:, e, None] * x) for e in range(routing.n_experts))


def _along_dimensions(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    return sum(routing.dense_weights[:, e] * expert(e, x) for e in range(routing.n_experts))


def _renormalised(routing: Routing) -> Tensor:
    weights = routing.topk_weights
    return _with_weights(routing, weights / weights.sum(-1, keepdim=True))


def _four_experts(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    return sum(routing.dense_weights[:, e, None] * expert(e, x) for e in range(4))


# 3.1 the definition

WEIGHTS_NOT_APPLIED = (
    "Every chosen expert counts the same: the weights are missing. They say how sure the router is, and they are the "
    "only way by which a gradient reaches it."
)
ONLY_FIRST = (
    "Each token gets its first choice only. It has K choices, and the output is their sum: slots 1, 2, … of "
    "`topk_experts` count too."
)
DIVIDED_BY_K = (
    "The result is divided by the number of choices. The weights already say how much each expert counts: this is a "
    "weighted sum, not a mean of K things."
)
RENORMALISED = (
    "The weights are divided by their sum once more. Whether they sum to one is the router's decision: Mixtral's do, "
    "OLMoE's and Switch's do not. The layer uses them as they are."
)
WEIGHED_INPUT = (
    "The weight multiplies what the expert reads. It belongs on what the expert gives: experts are not linear, so "
    "expert(w * x) is not w * expert(x). Only Llama 4 does so, on purpose."
)
SOFTMAX_AGAIN = (
    "A softmax is taken of the weights. They are finished: the router has made them of its logits, by a softmax of "
    "its own. A second one pulls them together: 0.75 and 0.25 become 0.62 and 0.38."
)

MOE_REFERENCE = Exercise(
    id="3.1",
    title="the definition",
    reference=moe.moe_reference,
    cases=_layer_cases,
    mistakes=(
        Mistake(
            name="the choice is ignored",
            wrong=_weighed_by(lambda routing: routing.router_scores),
            says="Every expert counts with its score, also those that were not chosen. That is a soft mixture, in "
            "which nothing can be left out. Use the weights, which are zero for every expert that was not chosen.",
        ),
        Mistake(
            name="scores in place of weights",
            wrong=_weighed_by(lambda routing: routing.router_scores * _chosen(routing)),
            says="The chosen experts are weighed by their scores. The router has made weights of these, perhaps "
            "divided by their sum, perhaps scaled: use the weights.",
        ),
        Mistake(name="weights not applied", wrong=_weighed_by(_chosen), says=WEIGHTS_NOT_APPLIED),
        Mistake(
            name="every expert counts in full",
            wrong=_weighed_by(lambda routing: torch.ones_like(routing.router_scores)),
            says="The outputs of all experts are summed as they are. What an expert counts for a token stands in its "
            "column of the dense weights, and is zero where the token did not choose it.",
        ),
        Mistake(
            name="four experts, whatever the layer has",
            wrong=_four_experts,
            says="The loop runs over four experts, as many as the example has. This layer has another number of them: "
            "`routing.n_experts`.",
        ),
        Mistake(
            name="a mean in place of the weights",
            wrong=_weighed_by(lambda routing: _chosen(routing) / routing.topk_experts.shape[1]),
            says="You took the mean of the chosen experts. Each one counts with its own weight, and that weight is "
            "the only way by which a gradient reaches the router.",
        ),
        Mistake(name="only the first choice counts", wrong=_weighed_by(_first_only), says=ONLY_FIRST),
        Mistake(
            name="the last expert overwrites the others",
            wrong=_last_expert,
            says="Only what the last expert gives is left: in each turn of the loop the result is set anew. Add to it.",
        ),
        Mistake(
            name="the slot taken for the expert",
            wrong=_slot_as_expert,
            says="Slot 0 goes to expert 0, slot 1 to expert 1, whatever the tokens chose. A slot says which choice "
            "it was; which expert that is stands in `topk_experts`.",
        ),
        Mistake(
            name="divided by k",
            wrong=_weighed_by(lambda routing: routing.dense_weights / routing.topk_experts.shape[1]),
            says=DIVIDED_BY_K,
        ),
        Mistake(name="renormalised again", wrong=_weighed_by(_renormalised), says=RENORMALISED),
        Mistake(
            name="softmax of the weights",
            wrong=_weighed_by(lambda routing: _with_weights(routing, routing.topk_weights.softmax(-1))),
            says=SOFTMAX_AGAIN,
        ),
        Mistake(name="weight multiplied into the input", wrong=_weighed_input, says=WEIGHED_INPUT),
        Mistake(
            name="weights along the wrong axis",
            wrong=_along_dimensions,
            says="A column of weights, (T,), meets rows of (T, D): torch lines it up with the D dimensions of a "
            "token, not with the tokens. Where T equals D there is not even an error. Make the weights (T, 1).",
        ),
        Mistake(
            name="residual added",
            wrong=lambda x, routing, expert: x + moe.moe_reference(x, routing, expert),
            says="You added x to the result. The residual belongs to the block, which adds what the layer returns; "
            "added here too, it would count twice.",
        ),
    ),
)


# 3.2 the loop


def _run_and_count(solution: Callable, case: Case) -> dict[str, Any]:
    """The output, and how many rows every expert worked on: the loop has to spare the others."""
    x, routing, expert = case.args
    rows = [0] * routing.n_experts

    def counted(e: int, tokens: Tensor) -> Tensor:
        rows[int(e)] += tokens.numel() // x.shape[1]
        return expert(e, tokens)

    y = solution(x, routing, counted)
    return {"y": y, "rows per expert": rows}


def _loop(
    pick: Callable[[Routing, int], tuple[Tensor, Tensor]] = lambda r, e: torch.where(r.topk_experts == e),
    weight: Callable[[Routing, Tensor, Tensor, int], Tensor] = lambda r, tokens, slots, e: r.topk_weights[
        tokens, slots
    ],
    add: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda y, tokens, rows: y.index_add(0, tokens, rows),
) -> Callable[[Tensor, Routing, Expert], Tensor]:
    """The loop with one of its steps done in another way."""

    def wrong(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(routing.n_experts):
            tokens, slots = pick(routing, e)
            weights = weight(routing, tokens, slots, e)[..., None]
            y = add(y, tokens, weights * expert(e, x[tokens]))
        return y

    return wrong


def _stops_when_empty(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        if len(tokens) == 0:
            break
        y = y.index_add(0, tokens, routing.topk_weights[tokens, slots, None] * expert(e, x[tokens]))
    return y


def _first_slot(routing: Routing, e: int) -> tuple[Tensor, Tensor]:
    tokens = torch.where(routing.topk_experts[:, 0] == e)[0]
    return tokens, torch.zeros_like(tokens)


def _slot_by_slot_overwritten(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    y = torch.zeros_like(x)
    for experts, weights in zip(routing.topk_experts.T, routing.topk_weights.T, strict=True):
        for e in range(routing.n_experts):
            tokens = torch.where(experts == e)[0]
            y = y.index_copy(0, tokens, weights[tokens, None] * expert(e, x[tokens]))
    return y


def _weighs_the_input(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        y = y.index_add(0, tokens, expert(e, routing.topk_weights[tokens, slots, None] * x[tokens]))
    return y


def _in_order_of_arrival(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    """Each expert's k-th row is added to token k."""
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        rows = routing.topk_weights[tokens, slots, None] * expert(e, x[tokens])
        y = y.index_add(0, torch.arange(len(tokens)), rows)
    return y


def _all_weights_at_once(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens = torch.where(routing.topk_experts == e)[0]
        y = y.index_add(0, tokens, routing.topk_weights[tokens] * expert(e, x[tokens]))
    return y


def _added_into_x(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        x[tokens] += routing.topk_weights[tokens, slots, None] * expert(e, x[tokens])
    return x


def _weights_as_a_row(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        y = y.index_add(0, tokens, routing.topk_weights[tokens, slots] * expert(e, x[tokens]))
    return y


def _added_without_tokens(x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        y = y + routing.topk_weights[tokens, slots, None] * expert(e, x[tokens])
    return y


def _own_sum(routing: Routing, tokens: Tensor, slots: Tensor, e: int) -> Tensor:
    return routing.topk_weights[tokens, slots] / routing.topk_weights[tokens].sum(-1)


MOE_LOOP = Exercise(
    id="3.2",
    title="the loop over experts",
    reference=moe.moe_loop,
    cases=_layer_cases,
    run=_run_and_count,
    mistakes=(
        Mistake(
            name="every expert works on every token",
            wrong=moe.moe_reference,
            says="The output is right, but every expert worked on every token, as in the definition. The layer is "
            "worth having only because an expert works on the tokens that chose it: call `expert(e, x[tokens])`.",
        ),
        Mistake(
            name="what index_add returns is lost",
            wrong=_loop(add=lambda y, tokens, rows: y),
            says="Every expert has worked on its tokens, and y is still zero. `y.index_add(…)` leaves y as it is and "
            "returns the sum; `y[tokens]` is a copy, so that `y[tokens].add_(…)` is lost, too. Keep what comes back.",
        ),
        Mistake(
            name="weights along the wrong axis",
            wrong=_weights_as_a_row,
            says="The weights of n rows, (n,), meet rows of (n, D): torch lines them up with the D numbers of a row, "
            "not with the rows. Where n equals D there is not even an error. Make the weights (n, 1).",
        ),
        Mistake(
            name="results added without tokens",
            wrong=_added_without_tokens,
            says="An expert's results are added to y as a whole. y has a row for every token, the results only for "
            "those that chose the expert: sizes clash, or a single result is added to all tokens. Row i belongs to "
            "token `tokens[i]`: add it there.",
        ),
        Mistake(
            name="a token's second expert overwrites its first",
            wrong=_loop(add=lambda y, tokens, rows: y.index_copy(0, tokens, rows)),
            says="Each expert writes over what is in its tokens' rows of y, so that of K experts the last one is "
            "left. Add to the rows in place of setting them. With K = 1 nobody would notice.",
        ),
        Mistake(
            name="a token's last choice overwrites the others",
            wrong=_slot_by_slot_overwritten,
            says="Each slot writes over what the slot before it brought, so that only a token's last choice is left, "
            "which is its weakest. Add to the rows in place of setting them.",
        ),
        Mistake(
            name="every choice weighed as the first",
            wrong=_loop(weight=lambda r, tokens, slots, e: r.topk_weights[tokens, 0]),
            says="Each row is multiplied by the weight of its token's first choice. This expert may be a token's "
            "second choice: the slot in which it stands, which `torch.where` gives beside the token, says which "
            "weight is its own.",
        ),
        Mistake(
            name="the expert's number taken for the slot",
            wrong=_loop(weight=lambda r, tokens, slots, e: r.topk_weights[tokens, e]),
            says="The weights are looked up by the expert's number. `topk_weights` is (T, K): its columns are slots, "
            "a token's first, second, … choice. It only works by chance, and fails when there are more experts than "
            "slots.",
        ),
        Mistake(
            name="all weights of a token at once",
            wrong=_all_weights_at_once,
            says="`topk_weights[tokens]` holds all K weights of a token. This expert stands in one slot: index with "
            "the slot, too. Where K equals D there is not even an error.",
        ),
        Mistake(
            name="results added into x",
            wrong=_added_into_x,
            says="The results are added into x itself. Then the next expert reads what the one before it wrote, the "
            "caller's x is spoilt, and the residual is in the result. Start from `torch.zeros_like(x)`.",
        ),
        Mistake(
            name="tokens and slots exchanged",
            wrong=_loop(pick=lambda r, e: torch.where(r.topk_experts == e)[::-1]),
            says="Tokens and slots have changed places. `torch.where` gives the row first: for `topk_experts`, (T, "
            "K), that is the token. Hugging Face's loop works on a transposed mask and has them the other way round.",
        ),
        Mistake(
            name="rows come back to the wrong tokens",
            wrong=_in_order_of_arrival,
            says="An expert's rows are added to the first rows of y, in the order in which they came. Row i of its "
            "output belongs to token `tokens[i]`: add it there.",
        ),
        Mistake(
            name="stops at an empty expert",
            wrong=_stops_when_empty,
            says="The loop ends at the first expert that nobody chose, and the experts after it never work. An empty "
            "expert may be skipped (`continue`), or run on no rows, which costs nothing.",
        ),
        Mistake(
            name="only the first choice counts",
            wrong=_loop(pick=_first_slot),
            says=ONLY_FIRST,
        ),
        Mistake(
            name="weights not applied",
            wrong=_loop(weight=lambda r, tokens, slots, e: torch.ones(len(tokens))),
            says=WEIGHTS_NOT_APPLIED,
        ),
        Mistake(
            name="divided by k",
            wrong=_loop(
                weight=lambda r, tokens, slots, e: r.topk_weights[tokens, slots] / r.topk_weights.shape[1],
            ),
            says=DIVIDED_BY_K,
        ),
        Mistake(name="renormalised again", wrong=_loop(weight=_own_sum), says=RENORMALISED),
        Mistake(name="weight multiplied into the input", wrong=_weighs_the_input, says=WEIGHED_INPUT),
    ),
)


# 3.3 the gradient of the weights


def weight_gradient(dy: Tensor, x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    """The loss's gradient with respect to `routing.topk_weights`, (T, K): `<dy[t], o[t, k]>`.

    `o[t, k]` is what expert `topk_experts[t, k]` makes of token t. It follows from `y[t] = sum_k w[t, k] o[t, k]`,
    Shazeer et al. 2017, equation 1.
    """
    dense = torch.stack([(dy * expert(e, x)).sum(-1) for e in range(routing.n_experts)], dim=1)  # (T, E)
    return dense.gather(1, routing.topk_experts)


def _gradient_cases() -> list[Case]:
    def case(name: str, dy: Tensor, rest: Case) -> Case:
        return Case(name=name, args=(dy, *rest.args), show=rest.show)

    layer = _layer_cases()
    toy = Case(
        name="two tokens by hand",
        args=(torch.tensor([[1.0, 1.0], [3.0, -1.0]]), *layer[0].args),
        show=f"dy = [[1, 1], [3, -1]]\n{TOY_SHOW}",
    )
    one, same, three, _ = layer[1:]
    square = _larger("as many tokens as experts", 5, 3, 5, 2)
    return [
        toy,
        case("one choice each", _random(3, 4, seed=71), one),
        case("as many choices as experts", _random(6, 4, seed=72), same),
        case("three choices each", _random(7, 4, seed=73), three),
        case("as many tokens as experts", _random(5, 3, seed=74), square),
    ]


def _of_logits(dy: Tensor, x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    weights, dw = routing.topk_weights, weight_gradient(dy, x, routing, expert)
    return weights * (dw - (weights * dw).sum(-1, keepdim=True))


def _dense_gradient(dy: Tensor, x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    return torch.stack([(dy * expert(e, x)).sum(-1) for e in range(routing.n_experts)], dim=1)


def _experts_by_tokens(dy: Tensor, x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    return _dense_gradient(dy, x, routing, expert).T.gather(1, routing.topk_experts)


def _by_ids(dy: Tensor, x: Tensor, routing: Routing, expert: Expert) -> Tensor:
    dense = _dense_gradient(dy, x, routing, expert)
    return dense.gather(1, routing.topk_experts.sort(dim=1).values)


WEIGHT_GRADIENT = Exercise(
    id="3.3",
    title="the gradient of a weight",
    reference=weight_gradient,
    cases=_gradient_cases,
    mistakes=(
        Mistake(
            name="the weight is left in",
            wrong=lambda dy, x, routing, expert: weight_gradient(dy, x, routing, expert) * routing.topk_weights,
            says="Your numbers still carry the weight. y is linear in w[t, k], so in the derivative w[t, k] itself "
            "is gone: what stays is what it was multiplied by.",
        ),
        Mistake(
            name="dy left out",
            wrong=lambda dy, x, routing, expert: weight_gradient(torch.ones_like(dy), x, routing, expert),
            says="You summed the expert's output. That is how far y moves, not the loss: each of its D numbers counts "
            "as much as the loss changes with it, which is dy. Where dy is all ones, nobody notices.",
        ),
        Mistake(
            name="stacked as experts by tokens",
            wrong=_experts_by_tokens,
            says="`torch.stack` puts the experts first: (E, T). `gather(1, topk_experts)` reads rows as tokens, and "
            "columns as experts: (T, E). Where T equals E there is not even an error. Stack along dim 1.",
        ),
        Mistake(
            name="the whole output in place of the expert's",
            wrong=lambda dy, x, routing, expert: (
                (dy * moe.moe_reference(x, routing, expert)).sum(-1, keepdim=True).expand_as(routing.topk_weights)
            ),
            says="Every slot of a token has the same gradient: you multiplied dy by the layer's output. Weight k "
            "moves only what expert k contributes, so each slot has its own expert's output there.",
        ),
        Mistake(
            name="the token in place of the expert's output",
            wrong=lambda dy, x, routing, expert: (
                (dy * x).sum(-1, keepdim=True).expand_as(routing.topk_weights).contiguous()
            ),
            says="You multiplied dy by the token. The weight multiplies what its expert makes of the token.",
        ),
        Mistake(
            name="a gradient for every expert",
            wrong=_dense_gradient,
            says="There is one number for each of the E experts, also for those that were not chosen. Their weight "
            "is no part of the result: nothing multiplies their output, which the layer does not even compute. "
            "Return (T, K), in the order of the slots.",
        ),
        Mistake(
            name="in the order of the experts",
            wrong=_by_ids,
            says="The numbers of a token stand in the order of the experts' ids. Slots have their own order, the "
            "best choice first: column k belongs to expert `topk_experts[t, k]`. A mask of the chosen ones loses "
            "this order.",
        ),
        Mistake(
            name="not summed over the dimensions",
            wrong=lambda dy, x, routing, expert: torch.stack(
                [
                    torch.stack([dy[t] * expert(int(e), x[t : t + 1])[0] for e in chosen])
                    for t, chosen in enumerate(routing.topk_experts)
                ]
            ),
            says="There are D numbers for each choice. A weight multiplies all D numbers of an output, so its "
            "gradient is the sum of D products: a dot product.",
        ),
        Mistake(
            name="the mean over the dimensions",
            wrong=lambda dy, x, routing, expert: weight_gradient(dy, x, routing, expert) / x.shape[1],
            says="You took the mean over the D dimensions. A dot product is their sum.",
        ),
        Mistake(
            name="the gradient of the logits",
            wrong=_of_logits,
            says="This looks like the gradient of the logits: it has gone back through the softmax already. Here the "
            "question is one step earlier, the gradient of the weights themselves; autograd does the rest.",
        ),
    ),
)


# 3.4 the whole layer


def _run_layer(solution: Any, case: Case) -> Any:
    """The output and every gradient of the class, with given weights."""
    config, weights, x, dy = case.args
    layer = solution(config)
    load_weights(layer, weights)
    layer.router.register_forward_pre_hook(_require_tokens)
    layer.experts.register_forward_pre_hook(_require_rows)
    # clones, so that an answer that changes its input afterwards is told so, and not that its gradients are wrong
    with saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        result = layer(x)
    if result is None:
        return None
    if not (isinstance(result, tuple | list) and len(result) == 2):
        raise Refused("`forward` should return two things, `y, routing`. Losses and drawings need the routing, too.")
    y, routing = result
    if isinstance(y, Routing):
        raise Refused("`forward` returned the routing first. The block adds the first thing to x: return `y, routing`.")
    if isinstance(y, Tensor) and y.requires_grad and y.shape == dy.shape:
        (y * dy).sum().backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in layer.named_parameters()}
    chosen = routing.topk_experts if isinstance(routing, Routing) else routing
    return {"y": y, "topk_experts of the routing": chosen} | {f"gradient of {n}": g for n, g in gradients.items()}


def _require_tokens(router: nn.Module, args: tuple) -> None:
    if args and isinstance(args[0], Tensor) and args[0].ndim != 2:
        raise Refused(
            f"The router got a tensor of shape {tuple(args[0].shape)}. Router and loop take a list of tokens, (T, D): "
            "reshape x first, and give y back the shape of x."
        )


def _require_rows(experts: nn.Module, args: tuple) -> None:
    if args and not isinstance(args[0], Tensor):
        raise Refused(
            "`self.experts(…)` is all experts at once, and wants rows in their order (notebook 04). The loop asks for "
            "one expert at a time: give it the function that computes one, `self.experts.one`."
        )


def _moe_case(name: str, shape: tuple[int, int, int], seed: int, **sizes: Any) -> Case:
    config = MoEConfig(d_model=shape[-1], **sizes)
    d, f, n = config.d_model, config.d_ff, config.n_experts
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in moe.MoE(config).named_parameters()}
    weights = {name: _random(*size, seed=seed + i) / size[-1] ** 0.5 for i, (name, size) in enumerate(shapes.items())}
    return Case(
        name=name,
        args=(config, weights, _random(*shape, seed=seed + 7), _random(*shape, seed=seed + 8)),
        show=f"x of shape {shape}, random weights\nMoEConfig(d_model={d}, d_ff={f}, n_experts={n}, "
        f"top_k={config.top_k}, normalise={config.normalise})",
    )


def _moe_cases() -> list[Case]:
    return [
        _moe_case("one sequence of two tokens", (1, 2, 4), seed=100, d_ff=5, n_experts=3, top_k=2),
        _moe_case("three sequences of five", (3, 5, 6), seed=200, d_ff=7, n_experts=8, top_k=2),
        _moe_case("one choice, not normalised", (2, 9, 6), seed=300, d_ff=4, n_experts=5, top_k=1, normalise=False),
        _moe_case("more experts than tokens", (2, 3, 6), seed=400, d_ff=4, n_experts=16, top_k=4, normalise=False),
    ]


class _Layer(nn.Module):
    """The right parts; each mistake has its own way of putting them together."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router, self.experts = Router(config), Experts(config)

    def mix(self, tokens: Tensor, routing: Routing) -> Tensor:
        return moe.moe_reference(tokens, routing, self.experts.one)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        return self.mix(tokens, routing).view_as(x), routing


class _NoSequences(_Layer):
    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        y, routing = super().forward(x)
        return y.flatten(0, 1), routing


class _OtherOrder(_Layer):
    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        tokens = x.transpose(0, 1).reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        return self.mix(tokens, routing).view(x.shape), routing


class _SequenceRouted(_Layer):
    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(x.mean(1, keepdim=True).expand_as(x).reshape(-1, x.shape[-1]))
        return self.mix(tokens, routing).view_as(x), routing


class _RouterCutOff(_Layer):
    def mix(self, tokens: Tensor, routing: Routing) -> Tensor:
        return super().mix(tokens, _replaced(routing, routing.topk_weights.detach()))


class _TopKExperts(_Layer):
    def mix(self, tokens: Tensor, routing: Routing) -> Tensor:
        dense, top_k = routing.dense_weights, routing.topk_experts.shape[1]
        return sum(dense[:, e, None] * self.experts.one(e, tokens) for e in range(top_k))


class _GateUpExchanged(_Layer):
    def mix(self, tokens: Tensor, routing: Routing) -> Tensor:
        w = self.experts
        return moe.moe_reference(tokens, routing, lambda e, rows: swiglu(rows, w.w_up[e], w.w_gate[e], w.w_down[e]))


class _SoftmaxTwice(_Layer):
    def mix(self, tokens: Tensor, routing: Routing) -> Tensor:
        return super().mix(tokens, _replaced(routing, routing.topk_weights.softmax(-1)))


class _Unweighed(_Layer):
    def mix(self, tokens: Tensor, routing: Routing) -> Tensor:
        return super().mix(tokens, _replaced(routing, torch.ones_like(routing.topk_weights)))


class _WithResidual(_Layer):
    def mix(self, tokens: Tensor, routing: Routing) -> Tensor:
        return tokens + super().mix(tokens, routing)


def _replaced(routing: Routing, weights: Tensor) -> Routing:
    return Routing(routing.router_logits, routing.router_scores, weights, routing.topk_experts)


MOE = Exercise(
    id="3.4",
    title="the whole layer",
    reference=moe.MoE,
    cases=_moe_cases,
    run=_run_layer,
    mistakes=(
        Mistake(
            name="sequences not restored",
            wrong=_NoSequences,
            says="The result is (T, D). The layer works on a list of tokens, but the block around it wants back what "
            "it gave, (B, S, D): `.view_as(x)`.",
        ),
        Mistake(
            name="tokens come back in another order",
            wrong=_OtherOrder,
            says="Batch and sequence are exchanged on the way in, but not on the way out: the outputs are right, and "
            "stand at other tokens. `x.reshape(-1, D)` and `.view_as(x)` undo each other.",
        ),
        Mistake(
            name="one choice for a whole sequence",
            wrong=_SequenceRouted,
            says="All tokens of a sequence go to the same experts: the router reads their mean. Here every token "
            "chooses for itself. The mean would also let a token know the tokens after it.",
        ),
        Mistake(
            name="the router gets no gradient",
            wrong=_RouterCutOff,
            says="The output is right, but no gradient reaches the router: its weights are cut off (`.detach()`, "
            "`no_grad`, `.item()`, `.data`). The loss would still fall, since the experts learn, and the router "
            "would stay random for ever.",
        ),
        Mistake(
            name="only the first k experts work",
            wrong=_TopKExperts,
            says="Only experts 0 to K-1 ever work. K is how many experts a token chooses; to choose from there are E.",
        ),
        Mistake(
            name="gate and up exchanged",
            wrong=_GateUpExchanged,
            says="The SiLU is on w_up. It belongs on w_gate. A layer trained like this works; one that loads "
            "another's weights does not.",
        ),
        Mistake(name="softmax of the weights", wrong=_SoftmaxTwice, says=SOFTMAX_AGAIN),
        Mistake(name="weights not applied", wrong=_Unweighed, says=WEIGHTS_NOT_APPLIED),
        Mistake(
            name="residual added",
            wrong=_WithResidual,
            says="You added x to the result. The residual belongs to the block, which adds what the layer returns; "
            "added here too, it would count twice.",
        ),
    ),
)


# 3.5 parameters

# Sizes that differ from each other: no two mistakes look alike.
PLAIN = MoEConfig(d_model=7, d_ff=5, n_experts=6, top_k=2)
SHARED = MoEConfig(d_model=7, d_ff=5, n_experts=9, top_k=4, n_shared_experts=2)
GATED = MoEConfig(d_model=7, d_ff=5, n_experts=8, top_k=3, n_shared_experts=1, d_ff_shared=11, shared_gate=True)
RELU = MoEConfig(d_model=7, d_ff=5, n_experts=6, top_k=1, expert="relu")
RELU_SHARED = MoEConfig(
    d_model=7, d_ff=5, n_experts=10, top_k=3, expert="relu", n_shared_experts=1, d_ff_shared=13, shared_gate=True
)
LAYERS = {
    "a tiny layer": PLAIN,
    "two shared experts": SHARED,
    "a shared expert of its own width, with a gate": GATED,
    "ReLU experts": RELU,
    "ReLU experts, a shared one with a gate": RELU_SHARED,
    "a layer of Mixtral 8x7B": MIXTRAL_8X7B.moe,
    "a layer of Qwen3-30B-A3B": QWEN3_30B_A3B.moe,
}


def _show_layer(config: MoEConfig, active: bool) -> str:
    return (
        f"d_model {config.d_model}, d_ff {config.d_ff}, n_experts {config.n_experts}, top_k {config.top_k}, "
        f"expert {config.expert!r}, n_shared_experts {config.n_shared_experts}, d_ff_shared {config.d_ff_shared}, "
        f"shared_gate {config.shared_gate}; active={active}"
    )


def _parameter_cases() -> list[Case]:
    return [
        Case(
            name=f"{name}, {'active' if active else 'total'}",
            args=(config,),
            kwargs={"active": True} if active else {},
            show=_show_layer(config, active),
        )
        for name, config in LAYERS.items()
        for active in (False, True)
    ]


def _count(
    router: Callable[[MoEConfig, bool], int] = lambda moe, active: moe.n_experts * moe.d_model,
    copies: Callable[[MoEConfig, bool], int] = lambda moe, active: moe.top_k if active else moe.n_experts,
    matrices: Callable[[MoEConfig], int] = lambda moe: 3 if moe.expert == "swiglu" else 2,
    shared: Callable[[MoEConfig, bool], int] = lambda moe, active: moe.d_ff_shared,
    gate: Callable[[MoEConfig, bool], int] = lambda moe, active: moe.d_model if moe.shared_gate else 0,
    shared_matrices: Callable[[MoEConfig], int] | None = None,
) -> Callable[..., int]:
    """The count with one of its parts counted in another way."""

    def wrong(moe: MoEConfig, active: bool = False) -> int:
        routed = matrices(moe) * copies(moe, active) * moe.d_ff
        beside = (shared_matrices or matrices)(moe) * shared(moe, active)
        return router(moe, active) + moe.d_model * (routed + beside) + gate(moe, active)

    return wrong


def _share_as_a_float(moe: MoEConfig, active: bool = False) -> float:
    total = accounting.moe_parameters(moe)
    return total * moe.top_k / moe.n_experts if active else total


def _share_of_everything(moe: MoEConfig, active: bool = False) -> int:
    total = accounting.moe_parameters(moe)
    return total * moe.top_k // moe.n_experts if active else total


SHARE_OF_EVERYTHING = (
    "You took k/E of the whole layer as active. Only the routed experts are spared: a token uses the whole router, "
    "which scores every expert, and every shared expert."
)
SHARED_FORGOTTEN = (
    "The shared experts are missing. Every token visits them, so that they count in the total and among the active."
)
SHARED_INACTIVE = (
    "The shared experts are in the total, but not among the active. Every token visits them: that is what shared means."
)

MOE_PARAMETERS = Exercise(
    id="3.5",
    title="total and active parameters",
    reference=accounting.moe_parameters,
    cases=_parameter_cases,
    mistakes=(
        Mistake(name="k/E of everything", wrong=_share_of_everything, says=SHARE_OF_EVERYTHING),
        Mistake(name="k/E of everything, not a whole number", wrong=_share_as_a_float, says=SHARE_OF_EVERYTHING),
        Mistake(
            name="router forgotten",
            wrong=_count(router=lambda moe, active: 0),
            says="The router is missing: one row of D numbers for every expert. It is small, but a count that should "
            "agree with a checkpoint needs it.",
        ),
        Mistake(
            name="only k rows of the router",
            wrong=_count(router=lambda moe, active: moe.d_model * (moe.top_k if active else moe.n_experts)),
            says="You counted k rows of the router as active. To find the best k, it has to score all E experts: a "
            "token uses all of its rows.",
        ),
        Mistake(
            name="two matrices in every expert",
            wrong=_count(matrices=lambda moe: 2),
            says="Every expert was given two matrices. A SwiGLU has three: gate, up and down. A third of most MoE "
            "models would be missing.",
        ),
        Mistake(
            name="three matrices in every expert",
            wrong=_count(matrices=lambda moe: 3),
            says='Every expert was given three matrices. With `expert="relu"`, as in Switch, it is a plain MLP of '
            "two, up and down.",
        ),
        Mistake(
            name="active means total",
            wrong=_count(copies=lambda moe, active: moe.n_experts),
            says="`active` changes nothing. A token uses top_k of the n_experts routed experts.",
        ),
        Mistake(
            name="k experts in the total",
            wrong=_count(copies=lambda moe, active: moe.top_k),
            says="The total holds only k experts. All of them are there, and have to be in memory; the k are what "
            "one token uses.",
        ),
        Mistake(
            name="shared experts forgotten",
            wrong=_count(shared=lambda moe, active: 0),
            says=SHARED_FORGOTTEN,
        ),
        Mistake(
            name="shared experts and their gate forgotten",
            wrong=_count(shared=lambda moe, active: 0, gate=lambda moe, active: 0),
            says=f"{SHARED_FORGOTTEN} With `shared_gate` there is a gate, too.",
        ),
        Mistake(
            name="shared experts counted as inactive",
            wrong=_count(shared=lambda moe, active: 0 if active else moe.d_ff_shared),
            says=SHARED_INACTIVE,
        ),
        Mistake(
            name="shared experts and their gate counted as inactive",
            wrong=_count(
                shared=lambda moe, active: 0 if active else moe.d_ff_shared,
                gate=lambda moe, active: moe.d_model if moe.shared_gate and not active else 0,
            ),
            says=f"{SHARED_INACTIVE} The same holds for their gate.",
        ),
        Mistake(
            name="shared experts always SwiGLUs",
            wrong=_count(shared_matrices=lambda moe: 3),
            says="The shared experts have three matrices whatever `expert` is. They are of the same kind as the routed "
            'ones: with `expert="relu"` two matrices.',
        ),
        Mistake(
            name="shared experts as wide as routed ones",
            wrong=_count(shared=lambda moe, active: moe.n_shared_experts * moe.d_ff),
            says="You gave the shared experts the width of routed ones. Often that is so, but they may have their "
            "own: `d_ff_shared` is the width of all shared experts together.",
        ),
        Mistake(
            name="every shared expert as wide as all",
            wrong=_count(shared=lambda moe, active: moe.n_shared_experts * moe.d_ff_shared),
            says="The shared experts are counted n_shared_experts times too often: `d_ff_shared` is already the "
            "width of all of them together.",
        ),
        Mistake(
            name="shared experts split among the others",
            wrong=_count(
                shared=lambda moe, active: moe.d_ff_shared * moe.top_k // moe.n_experts if active else moe.d_ff_shared
            ),
            says="You took k/E of the shared experts as active. Only routed experts are chosen; every token visits "
            "the shared ones, all of them.",
        ),
        Mistake(
            name="the shared gate forgotten",
            wrong=_count(gate=lambda moe, active: 0),
            says="With `shared_gate` there are D numbers more: one row that decides, for each token, how much the "
            "shared experts count (Qwen2-MoE has it).",
        ),
        Mistake(
            name="a gate where there is none",
            wrong=_count(gate=lambda moe, active: moe.d_model),
            says="You counted the D numbers of the shared gate in every layer. They are there only with `shared_gate`; "
            "most layers have no shared expert at all.",
        ),
        Mistake(
            name="a gate wherever experts are shared",
            wrong=_count(gate=lambda moe, active: moe.d_model if moe.d_ff_shared else 0),
            says="You counted a gate wherever there are shared experts. DeepSeek's have none: `shared_gate` says "
            "whether there is one.",
        ),
        Mistake(
            name="a gate as wide as the shared experts",
            wrong=_count(gate=lambda moe, active: moe.d_model * moe.d_ff_shared if moe.shared_gate else 0),
            says="You gave the shared gate D · F_shared numbers, as if it were a SwiGLU's gate matrix. It is one row "
            "of D: it makes a single number of a token, by which the shared experts' output is multiplied.",
        ),
    ),
)


# 3.6 reading a model card


def experts_of_card(total: float, active: float, n_experts: int, top_k: int) -> float:
    """The parameters in all routed experts, from a card's total and active parameters (in any unit).

    What a token leaves out is `total - active`: E - k of E equal experts.
    """
    return (total - active) * n_experts / (n_experts - top_k)


EXPERTS_OF_CARD = Exercise(
    id="3.6",
    title="read it off the card",
    reference=experts_of_card,
    cases=lambda: [
        Case(name="ten parameters in four experts", args=(10.0, 4.0, 4, 1)),
        Case(name="Mixtral 8x7B, in billions", args=(46.7, 12.9, 8, 2)),
        Case(name="OLMoE, in billions", args=(6.9, 1.3, OLMOE_1B_7B.moe.n_experts, OLMOE_1B_7B.moe.top_k)),
        Case(name="a layer of DeepSeek-V3's kind", args=(671.0, 37.0, 256, 8)),
    ],
    mistakes=(
        Mistake(
            name="what a token leaves out taken for all experts",
            wrong=lambda total, active, n_experts, top_k: total - active,
            says="total - active is what a token leaves out: E - k experts. A token uses k more, which belong to the "
            "experts, too.",
        ),
        Mistake(
            name="one expert",
            wrong=lambda total, active, n_experts, top_k: (total - active) / (n_experts - top_k),
            says="That is one expert (in every layer). There are E of them.",
        ),
        Mistake(
            name="the experts of a token",
            wrong=lambda total, active, n_experts, top_k: (total - active) * top_k / (n_experts - top_k),
            says="These are the k experts that one token uses. All E were asked for.",
        ),
        Mistake(
            name="k/E of what is left out",
            wrong=lambda total, active, n_experts, top_k: (total - active) * top_k / n_experts,
            says="total - active is E - k experts already, not all E of them; k/E of it is nothing in particular. How "
            "large is one expert, and how many are there?",
        ),
        Mistake(
            name="all of the active parameters in experts",
            wrong=lambda total, active, n_experts, top_k: active * n_experts / top_k,
            says="This takes every active parameter for an expert's. A token also uses attention, the embedding and "
            "the head, and these are not there E/k times.",
        ),
        Mistake(
            name="(E - k)/E of the total",
            wrong=lambda total, active, n_experts, top_k: total * (n_experts - top_k) / n_experts,
            says="This takes all parameters for experts' and returns those that a token leaves out. Start from the "
            "other end: total - active is known, and it is E - k experts.",
        ),
        Mistake(
            name="the fraction turned over",
            wrong=lambda total, active, n_experts, top_k: (total - active) * (n_experts - top_k) / n_experts,
            says="The fraction stands on its head. E - k experts are total - active, so that all E are more than "
            "that, not less.",
        ),
    ),
)

EXERCISES = (MOE_REFERENCE, MOE_LOOP, WEIGHT_GRADIENT, MOE, MOE_PARAMETERS, EXPERTS_OF_CARD)
