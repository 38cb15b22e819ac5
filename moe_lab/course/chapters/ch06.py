"""The exercises of notebook 06: experts cut finer, experts that every token visits, and DeepSeek-V3's whole router."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab import accounting, routing
from moe_lab.config import MoEConfig, RouterConfig
from moe_lab.course.bank import Case, Exercise, Mistake
from moe_lab.course.checking import Refused
from moe_lab.ffn import swiglu
from moe_lab.moe import moe_loop
from moe_lab.records import Routing

Function = Callable[[Tensor], Tensor]
Expert = Callable[[int, Tensor], Tensor]


def _rand(*shape: int, seed: int) -> Tensor:
    """Numbers from -1 to 1."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def _layer(d_ff: int, n_experts: int, top_k: int, **more: Any) -> MoEConfig:
    return MoEConfig(d_model=4, d_ff=d_ff, n_experts=n_experts, top_k=top_k, **more)


# 6.1 combinations


def _count_cases() -> list[Case]:
    layers = {
        "two of four experts": _layer(8, 4, 2),
        "three of seven, and two shared": _layer(8, 7, 3, n_shared_experts=2),
        "all experts chosen": _layer(8, 3, 3),
        "DeepSeekMoE's example": _layer(8, 16, 2),
        "the same, each expert cut in four": _layer(2, 64, 8),
        "ten of 512, more than a float holds": _layer(2, 512, 10),
    }
    return [
        Case(
            name=name,
            args=(moe,),
            show=f"n_experts {moe.n_experts}, top_k {moe.top_k}, n_shared_experts {moe.n_shared_experts}",
        )
        for name, moe in layers.items()
    ]


THROUGH_A_FLOAT = (
    "Nearly right: the number went through a float, which keeps some 16 digits, and the rest was lost. Python's "
    "integers are exact at any size, as long as there is no `/`, no `exp` and no `log` on the way: `//`, or a function "
    "of `math`."
)


NO_WHOLE_NUMBER = (
    "A float came back. It is a count: use whole numbers throughout, `//` in place of `/`. The largest case has more "
    "digits than a float holds, so that turning it into an int at the end comes too late."
)


def _run_count(solution: Callable, case: Case) -> Any:
    count, right = solution(*case.args), accounting.combinations(*case.args)
    if isinstance(count, float) and math.isfinite(count):
        raise Refused(NO_WHOLE_NUMBER)
    if isinstance(count, int) and count != right and abs(count - right) < 1e-9 * right:
        raise Refused(THROUGH_A_FLOAT)
    return count


def _counted(ways: Callable[[int, int, int], Any]) -> Callable[[MoEConfig], Any]:
    """Another count, of E experts, K choices and S shared experts."""
    return lambda moe: ways(moe.n_experts, moe.top_k, moe.n_shared_experts)


def _rounded(moe: MoEConfig) -> int:
    if moe.n_experts == 512:
        raise Refused(THROUGH_A_FLOAT)
    return accounting.combinations(moe)


COMBINATIONS = Exercise(
    id="6.1",
    title="how many combinations?",
    reference=accounting.combinations,
    cases=_count_cases,
    run=_run_count,
    mistakes=(
        Mistake(name="through a float", wrong=_rounded, says=THROUGH_A_FLOAT),
        Mistake(
            name="not a whole number",
            wrong=_counted(lambda e, k, s: math.factorial(e) / (math.factorial(k) * math.factorial(e - k))),
            says=NO_WHOLE_NUMBER,
        ),
        Mistake(
            name="the order counts",
            wrong=_counted(lambda e, k, s: math.perm(e, k)),
            says="You count experts 3 and 5 and experts 5 and 3 as two choices. The layer sums what the chosen give, "
            "so that the same experts in another order are the same combination.",
        ),
        Mistake(
            name="every choice free",
            wrong=_counted(lambda e, k, s: e**k),
            says="E to the power K lets every choice be any expert: the same one twice, and in any order. A token's K "
            "experts are different, and their order does not matter.",
        ),
        Mistake(
            name="an expert chosen twice",
            wrong=_counted(lambda e, k, s: math.comb(e + k - 1, k)),
            says="Your count lets a token choose an expert more than once. The k best are k different ones.",
        ),
        Mistake(
            name="experts times choices",
            wrong=_counted(lambda e, k, s: e * k),
            says="E · K is how many pairs of expert and slot there are. A combination is a whole set of K experts.",
        ),
        Mistake(
            name="the shared can be chosen",
            wrong=_counted(lambda e, k, s: math.comb(e + s, k)),
            says="You let a token choose among the shared experts as well. They are used by every token, whatever it "
            "chooses: `n_experts` counts the routed ones alone, and only these are a choice.",
        ),
        Mistake(
            name="the shared chosen on top",
            wrong=_counted(lambda e, k, s: math.comb(e + s, k + s)),
            says="You put the shared experts among the candidates and among the chosen. They are always used: that is "
            "no choice and adds no combination.",
        ),
        Mistake(
            name="the shared taken off",
            wrong=_counted(lambda e, k, s: math.comb(e - s, k - s)),
            says="You took the shared experts off again. `n_experts` and `top_k` are those of the routed experts; the "
            "shared ones are counted apart, in `n_shared_experts`.",
        ),
        Mistake(
            name="the shared taken off the experts",
            wrong=_counted(lambda e, k, s: math.comb(e - s, k)),
            says="You took the shared experts off `n_experts`. It counts the routed experts alone already.",
        ),
    ),
)


# 6.2 cutting experts finer


def _cut_cases() -> list[Case]:
    five = _layer(12, 5, 2)
    rules = {
        "five experts, each cut in two": (five, 2),
        "cut in three, and one of the small ones shared": (five, 3, 1),
        "not cut, but one shared": (five, 1, 1),
        "cut in four, and three shared": (five, 4, 3),
        "sigmoid scores, bare weights, cut in six": (_layer(18, 4, 1, score="sigmoid", normalise=False), 6, 2),
        "as large as DeepSeekMoE's 2B model": (_layer(5120, 16, 2), 4, 1),
    }
    return [
        Case(
            name=name,
            args=args,
            show=f"moe: d_ff {args[0].d_ff}, n_experts {args[0].n_experts}, top_k {args[0].top_k}; m = {args[1]}, "
            f"n_shared = {args[2] if len(args) > 2 else 0}",
        )
        for name, args in rules.items()
    ]


def _cut(
    d_ff: Callable[[int, int], Any] = lambda width, m: width // m,
    n_experts: Callable[[int, int, int], int] = lambda e, m, s: m * e - s,
    top_k: Callable[[int, int, int], int] = lambda k, m, s: m * k - s,
    n_shared: Callable[[int, int], int] = lambda m, s: s,
) -> Callable[..., dict]:
    """The cut with one of its sizes worked out in another way."""

    def wrong(moe: MoEConfig, m: int, n_shared_experts: int = 0) -> dict[str, Any]:
        return {
            "d_ff": d_ff(moe.d_ff, m),
            "n_experts": n_experts(moe.n_experts, m, n_shared_experts),
            "top_k": top_k(moe.top_k, m, n_shared_experts),
            "n_shared_experts": n_shared(m, n_shared_experts),
        }

    return wrong


AS_MANY_CHOSEN = (
    "`top_k` was not multiplied by m. The pieces are smaller, so that a token which chooses as many of them as before "
    "uses an m-th of what it used: less work, and no fair comparison. Only then take off the shared ones."
)
AS_MANY_EXPERTS = (
    "`n_experts` was not multiplied by m: one piece of every expert is left, and the layer holds an m-th of its "
    "parameters. Every expert falls into m pieces; only then take off the shared ones."
)

CUT_FINER = Exercise(
    id="6.2",
    title="the same size, cut finer",
    reference=accounting.cut_finer,
    cases=_cut_cases,
    mistakes=(
        Mistake(
            name="a width that is no whole number",
            wrong=_cut(d_ff=lambda width, m: width / m),
            says="The width is a float: `/` gives one even where it divides evenly, and no matrix is 6.0 wide. `//` "
            "gives a whole number.",
        ),
        Mistake(name="as many chosen as before", wrong=_cut(top_k=lambda k, m, s: k), says=AS_MANY_CHOSEN),
        Mistake(
            name="as many chosen as before, less the shared",
            wrong=_cut(top_k=lambda k, m, s: k - s),
            says=AS_MANY_CHOSEN,
        ),
        Mistake(name="as many experts as before", wrong=_cut(n_experts=lambda e, m, s: e), says=AS_MANY_EXPERTS),
        Mistake(
            name="as many experts as before, less the shared",
            wrong=_cut(n_experts=lambda e, m, s: e - s),
            says=AS_MANY_EXPERTS,
        ),
        Mistake(
            name="the width stays",
            wrong=_cut(d_ff=lambda width, m: width),
            says="`d_ff` stays as it was. The layer is m times larger, and a token uses m times as much. A piece has "
            "an m-th of an expert's hidden neurons.",
        ),
        Mistake(
            name="the width is multiplied",
            wrong=_cut(d_ff=lambda width, m: width * m),
            says="You multiplied `d_ff` by m. Finer means narrower: divide.",
        ),
        Mistake(
            name="shared experts on top",
            wrong=_cut(n_experts=lambda e, m, s: m * e, top_k=lambda k, m, s: m * k),
            says="The shared experts come on top: the layer grows by them, and a token uses all that it used, and the "
            "shared ones too. They are some of the pieces that are there: take them off both numbers.",
        ),
        Mistake(
            name="the shared taken off the chosen only",
            wrong=_cut(n_experts=lambda e, m, s: m * e),
            says="A token uses as much as before, but the layer has grown: the shared pieces are missing from "
            "`n_experts`, which counts the routed ones.",
        ),
        Mistake(
            name="the shared taken off the experts only",
            wrong=_cut(top_k=lambda k, m, s: m * k),
            says="The layer is as large as before, but a token uses more: it chooses as many as without shared "
            "experts, and uses these, too. Equal active size means fewer choices (DeepSeekMoE, section 3.2).",
        ),
        Mistake(
            name="shared before the cut",
            wrong=_cut(n_experts=lambda e, m, s: m * (e - s), top_k=lambda k, m, s: m * (k - s)),
            says="You took the shared experts off before cutting, that is whole ones, and counted them as pieces. "
            "`n_shared` counts small experts: cut first, then take off.",
        ),
        Mistake(
            name="whole experts shared",
            wrong=_cut(
                n_experts=lambda e, m, s: m * (e - s),
                top_k=lambda k, m, s: m * (k - s),
                n_shared=lambda m, s: m * s,
            ),
            says="Sizes stay equal, but you share n_shared whole experts, that is m times n_shared pieces. `n_shared` "
            "counts the small ones.",
        ),
        Mistake(
            name="the shared are lost",
            wrong=_cut(n_shared=lambda m, s: 0),
            says="`n_shared_experts` is 0: the shared experts are taken off the routed ones, and then they are "
            "nowhere.",
        ),
    ),
)


# 6.3 the shared path

TOY_EXPERTS = torch.tensor([[[2.0, 0], [0, 2]], [[0, 1], [1, 0]], [[-1, 0], [0, -1]]])


def _toy_expert(e: int, x: Tensor) -> Tensor:
    return x @ TOY_EXPERTS[e].T


def _triple(x: Tensor) -> Tensor:
    return 3 * x


def _square(x: Tensor) -> Tensor:
    return x * x


def _routing(logits: Tensor, top_k: int, normalise: bool = True) -> Routing:
    config = RouterConfig(d_model=1, n_experts=logits.shape[1], top_k=top_k, normalise=normalise)
    made = routing.route(logits, config)
    made.topk_weights.requires_grad_()  # an answer must let the gradient through
    return made


def _swiglus(n: int, d_model: int, seed: int) -> list[Function]:
    def one(i: int) -> Function:
        gate, up = _rand(5, d_model, seed=seed + 3 * i), _rand(5, d_model, seed=seed + 3 * i + 1)
        down = _rand(d_model, 5, seed=seed + 3 * i + 2)
        return lambda x: swiglu(x, gate, up, down)

    return [one(i) for i in range(n)]


def _path_cases() -> list[Case]:
    x = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    toy = _routing(torch.tensor([[0.66, 0.22, 0.12], [0.33, 0.12, 0.55]]).log(), top_k=2)
    told = "x = [[1, 0], [2, 3]]\ntopk_experts = [[0, 1], [2, 0]]\ntopk_weights = [[0.75, 0.25], [0.625, 0.375]]\n"
    told += "expert 0 doubles a token, expert 1 swaps its two numbers, expert 2 negates it"

    def larger(name: str, n_tokens: int, n_experts: int, top_k: int, n_shared: int, normalise: bool) -> Case:
        experts, shared = _swiglus(n_experts, 4, seed=50), _swiglus(n_shared, 4, seed=90)
        logits = 3 * _rand(n_tokens, n_experts, seed=n_tokens)
        logits[:, 2] = -9  # nobody chooses expert 2
        return Case(
            name=name,
            args=(
                _rand(n_tokens, 4, seed=n_tokens + 1),
                _routing(logits, top_k, normalise),
                lambda e, rows: experts[int(e)](rows),
                shared,
            ),
            show=f"{n_tokens} random tokens of 4 numbers, {top_k} of {n_experts} experts each, weights that "
            f"{'sum' if normalise else 'do not sum'} to one; {n_shared} shared experts; all are SwiGLUs",
        )

    return [
        Case(
            name="one shared expert by hand",
            args=(x, toy, _toy_expert, [_triple]),
            show=f"{told}\nshared: one that triples a token",
        ),
        Case(
            name="two shared experts by hand",
            args=(x, toy, _toy_expert, [_triple, _square]),
            show=f"{told}\nshared: one that triples a token, one that squares its numbers",
        ),
        larger("one choice each", 3, 5, 1, 1, normalise=False),
        larger("seven tokens", 7, 6, 3, 2, normalise=True),
        larger("weights that do not sum to one", 9, 8, 2, 3, normalise=False),
    ]


def moe_with_shared(x: Tensor, routing: Routing, expert: Expert, shared: Sequence[Function]) -> Tensor:
    """What a layer with shared experts computes, (T, D) to (T, D): routed experts by weight, shared ones in full.

    Source: Dai et al. 2024 (DeepSeekMoE), equation 9, without the residual.
    """
    return moe_loop(x, routing, expert) + sum(one(x) for one in shared)


def _path(
    join: Callable[[Tensor, Tensor, Routing, int], Tensor] = lambda routed, shared, r, n: routed + shared,
    shared_of: Callable[[Tensor, Sequence[Function]], Tensor] = lambda x, shared: sum(one(x) for one in shared),
) -> Callable[..., Tensor]:
    """The two paths joined, or the shared one computed, in another way; `n` is the number of shared experts."""

    def wrong(x: Tensor, routing: Routing, expert: Expert, shared: Sequence[Function]) -> Tensor:
        return join(moe_loop(x, routing, expert), shared_of(x, shared), routing, len(shared))

    return wrong


def _one_after_the_other(x: Tensor, shared: Sequence[Function]) -> Tensor:
    for one in shared:
        x = one(x)
    return x


def _shared_reads_routed(x: Tensor, routing: Routing, expert: Expert, shared: Sequence[Function]) -> Tensor:
    routed = moe_loop(x, routing, expert)
    return routed + sum(one(routed) for one in shared)


def _routed_reads_shared(x: Tensor, routing: Routing, expert: Expert, shared: Sequence[Function]) -> Tensor:
    common = sum(one(x) for one in shared)
    return common + moe_loop(common, routing, expert)


def _routed_reads_both(x: Tensor, routing: Routing, expert: Expert, shared: Sequence[Function]) -> Tensor:
    common = sum(one(x) for one in shared)
    return common + moe_loop(x + common, routing, expert)


def _weights_of_routed(x: Tensor, routing: Routing, expert: Expert, shared: Sequence[Function]) -> Tensor:
    weighed = sum(routing.dense_weights[:, i, None] * one(x) for i, one in enumerate(shared))
    return moe_loop(x, routing, expert) + weighed


def _routed_in_full(x: Tensor, routing: Routing, expert: Expert, shared: Sequence[Function]) -> Tensor:
    chosen = (routing.dense_weights > 0).float()
    routed = sum(chosen[:, e, None] * expert(e, x) for e in range(routing.n_experts))
    return routed + sum(one(x) for one in shared)


def _with_residual(x: Tensor, routing: Routing, expert: Expert, shared: Sequence[Function]) -> Tensor:
    return x + moe_with_shared(x, routing, expert, shared)


MOE_WITH_SHARED = Exercise(
    id="6.3",
    title="the shared path",
    reference=moe_with_shared,
    cases=_path_cases,
    mistakes=(
        Mistake(
            name="the shared path is lost",
            wrong=_path(join=lambda routed, shared, r, n: routed),
            says="Only what the routed experts gave comes back. The shared path has to be added; JAXformer shipped a "
            "layer that computed it and returned the routed half (divyamakkar0/JAXformer#21).",
        ),
        Mistake(
            name="the routed path is lost",
            wrong=_path(join=lambda routed, shared, r, n: shared),
            says="Only what the shared experts gave comes back. That is a dense FFN: the routed experts, `moe_loop(x, "
            "routing, expert)`, are added to it.",
        ),
        Mistake(
            name="the shared reads what the routed gave",
            wrong=_shared_reads_routed,
            says="Your shared experts read the routed experts' output. Both paths start from the token, side by side, "
            "and meet in the sum. Side by side, they can also run at the same time.",
        ),
        Mistake(
            name="the routed reads what the shared gave",
            wrong=_routed_reads_shared,
            says="Your routed experts read the shared experts' output. Both paths start from the token, side by side.",
        ),
        Mistake(
            name="the routed reads the token and what the shared gave",
            wrong=_routed_reads_both,
            says="Your routed experts read the token plus what the shared experts gave: one FFN after the other. Both "
            "paths start from the token alone, side by side.",
        ),
        Mistake(
            name="shared experts one after the other",
            wrong=_path(shared_of=_one_after_the_other),
            says="Each shared expert reads what the one before it gave. All of them read the token; what they give is "
            "summed.",
        ),
        Mistake(
            name="only the first shared expert",
            wrong=_path(shared_of=lambda x, shared: shared[0](x)),
            says="Only the first shared expert is used. `shared` is a list: every token visits every one of them.",
        ),
        Mistake(
            name="only the last shared expert",
            wrong=_path(shared_of=lambda x, shared: shared[-1](x)),
            says="Only what the last shared expert gave is left: each turn of the loop sets the result anew. Add to "
            "it.",
        ),
        Mistake(
            name="a mean of the shared experts",
            wrong=_path(join=lambda routed, shared, r, n: routed + shared / n),
            says="You took the mean of the shared experts. They are summed: together they are one FFN as wide as all "
            "of them, and a mean would make that FFN quieter the more there are.",
        ),
        Mistake(
            name="shared experts weighed by the sum of the weights",
            wrong=_path(join=lambda routed, shared, r, n: routed + r.topk_weights.sum(1, keepdim=True) * shared),
            says="The shared path is multiplied by the sum of the routed weights. Where they sum to one nobody "
            "notices; with bare scores (DeepSeek-V2, Qwen2) the shared experts go quiet. No router ever weighed them: "
            "they count in full.",
        ),
        Mistake(
            name="shared experts weighed as the first choice",
            wrong=_path(join=lambda routed, shared, r, n: routed + r.topk_weights[:, :1] * shared),
            says="The shared path is multiplied by the weight of a token's first choice. That weight belongs to that "
            "expert: the shared ones count in full.",
        ),
        Mistake(
            name="shared experts with the weights of routed ones",
            wrong=_weights_of_routed,
            says="Shared expert i got the weight of routed expert i, zero where that one was not chosen. The shared "
            "experts have no place in the router's scores: every token uses them, in full.",
        ),
        Mistake(
            name="shared once for every choice",
            wrong=_path(join=lambda routed, shared, r, n: routed + r.topk_experts.shape[1] * shared),
            says="The shared experts count K times, once for each of a token's choices: their sum seems to stand "
            "inside of the loop. Every token visits them once.",
        ),
        Mistake(
            name="routed experts in full, too",
            wrong=_routed_in_full,
            says="The routed experts lost their weights. Only the shared path goes without: the weights are the only "
            "way by which the router learns. `moe_loop` applies them.",
        ),
        Mistake(
            name="the mean of both paths",
            wrong=_path(join=lambda routed, shared, r, n: (routed + shared) / 2),
            says="You took the mean of the two paths. They are added. What loudness each has is for the scaling factor "
            "and for training to find.",
        ),
        Mistake(
            name="residual added",
            wrong=_with_residual,
            says="You added x. The paper's equation 9 does so, because it is that of the whole block; in our code the "
            "block adds what the layer returns, and added here it would count twice.",
        ),
    ),
)


# 6.4 the gate of the shared path


def gated_shared(x: Tensor, shared: Function, w_gate: Tensor) -> Tensor:
    """What shared experts with a gate add, (T, D) to (T, D); `w_gate` is (1, D): one number per token.

    Source: `Qwen2MoeSparseMoeBlock` in transformers, as in Qwen1.5-MoE and Qwen2-57B-A14B.
    """
    return torch.sigmoid(F.linear(x, w_gate)) * shared(x)


def _gate_cases() -> list[Case]:
    x = torch.tensor([[1.0, 0.0], [2.0, 3.0]])

    def larger(name: str, n_tokens: int, d_model: int, factor: float) -> Case:
        return Case(
            name=name,
            args=(
                _rand(n_tokens, d_model, seed=n_tokens),
                _swiglus(1, d_model, seed=70)[0],
                factor * _rand(1, d_model, seed=d_model),
            ),
            show=f"{n_tokens} random tokens of {d_model} numbers, shared: a SwiGLU, w_gate random, (1, {d_model})",
        )

    return [
        Case(
            name="two tokens by hand",
            args=(x, _triple, torch.tensor([[1.0, -1.0]])),
            show="x = [[1, 0], [2, 3]]\nshared triples a token\nw_gate = [[1, -1]]",
        ),
        Case(
            name="a fresh gate of zeros",
            args=(x, _triple, torch.zeros(1, 2)),
            show="x = [[1, 0], [2, 3]]\nshared triples a token\nw_gate = [[0, 0]]",
        ),
        larger("one token", 1, 3, 2.0),
        larger("five tokens", 5, 3, 4.0),
        larger("as many tokens as numbers", 4, 4, 6.0),
    ]


def _run_gate(solution: Callable, case: Case) -> Any:
    """The output, and the gradient that the gate gets: a gate that cannot learn computes the right numbers, too."""
    x, shared, w_gate = case.args
    as_given = x.clone(), w_gate.clone().requires_grad_()
    y = solution(x, shared, w_gate.requires_grad_())
    if not isinstance(y, Tensor) or not y.requires_grad:
        return {"y": y, "gradient of w_gate": None}
    answer = y
    if not (torch.equal(x, as_given[0]) and torch.equal(w_gate, as_given[1])):
        # with changed inputs the way back is lost, and only the change shall be told
        answer, w_gate = gated_shared(as_given[0], shared, as_given[1]), as_given[1]
    marks = torch.arange(1, answer.numel() + 1).view(answer.shape) / answer.numel()
    (gradient,) = torch.autograd.grad((answer * marks).sum(), w_gate, allow_unused=True)
    return {"y": y.detach(), "gradient of w_gate": gradient}


def _gated(join: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The gate's number (T, 1), before its sigmoid, and the shared output (T, D), joined in another way."""
    return lambda x, shared, w_gate: join(F.linear(x, w_gate), shared(x))


GATED_SHARED = Exercise(
    id="6.4",
    title="the gate of the shared path",
    reference=gated_shared,
    cases=_gate_cases,
    run=_run_gate,
    mistakes=(
        Mistake(
            name="softmax over one number",
            wrong=_gated(lambda number, y: number.softmax(-1) * y),
            says="A softmax over a single number is 1, whatever the number: the gate is always open, and never learns. "
            "A sigmoid judges one number by itself.",
        ),
        Mistake(
            name="the gate is not used",
            wrong=lambda x, shared, w_gate: shared(x),
            says="The gate is not used. Its weights would be loaded and never read, as in a fork of torchtitan after a "
            "clean-up (NousResearch/torchtitan#36): no error, only worse text.",
        ),
        Mistake(
            name="the gate cannot learn",
            wrong=_gated(lambda number, y: torch.sigmoid(number.detach()) * y),
            says="The numbers are right, but no gradient reaches `w_gate`: `.detach()`, `.item()`, `.data` or "
            "`no_grad` cuts it off, and the gate would stay as it was drawn.",
        ),
        Mistake(
            name="softmax over the tokens",
            wrong=_gated(lambda number, y: number.softmax(0) * y),
            says="Your softmax runs over the tokens: each one's gate depends on what else is in the batch, and all "
            "gates together sum to one. Every token has a gate of its own: a sigmoid.",
        ),
        Mistake(
            name="no sigmoid",
            wrong=_gated(lambda number, y: number * y),
            says="The bare number multiplies the output: it can be negative, and large. The sigmoid makes a share of "
            "it, from 0 to 1.",
        ),
        Mistake(
            name="silu for a sigmoid",
            wrong=_gated(lambda number, y: F.silu(number) * y),
            says="`silu` is the number times its sigmoid: it grows without bound and shuts at zero. The gate is the "
            "sigmoid itself, a share from 0 to 1.",
        ),
        Mistake(
            name="the gate turned round",
            wrong=_gated(lambda number, y: (1 - torch.sigmoid(number)) * y),
            says="Your gate is one minus the sigmoid. It would train as well, but a released model's gates would be "
            "closed where they should be open.",
        ),
        Mistake(
            name="the gate reads the output",
            wrong=lambda x, shared, w_gate: torch.sigmoid(F.linear(shared(x), w_gate)) * shared(x),
            says="The gate reads what the shared experts gave. It reads the token, as the router does.",
        ),
        Mistake(
            name="the gate on the input",
            wrong=lambda x, shared, w_gate: shared(torch.sigmoid(F.linear(x, w_gate)) * x),
            says="The gate multiplies what the shared experts read. It belongs on what they give: an FFN is not "
            "linear.",
        ),
        Mistake(
            name="a gate for every number",
            wrong=lambda x, shared, w_gate: torch.sigmoid(x * w_gate) * shared(x),
            says="You made D gates of a token, one for each of its numbers. It is one: the dot product of token and "
            "`w_gate`, (T, 1).",
        ),
        Mistake(
            name="the gate along the wrong axis",
            wrong=_gated(lambda number, y: torch.sigmoid(number.squeeze(-1)) * y),
            says="The gates are of shape (T,): torch lines them up with the D numbers of a token, not with the tokens. "
            "Where T equals D there is not even an error. Keep them (T, 1).",
        ),
        Mistake(
            name="one gate for all tokens",
            wrong=_gated(lambda number, y: torch.sigmoid(number.mean()) * y),
            says="All tokens got one gate. Every token has its own: no mean, no sum over tokens.",
        ),
        Mistake(
            name="the gate is added",
            wrong=_gated(lambda number, y: torch.sigmoid(number) + y),
            says="The gate is added to the output. A gate multiplies: 0 shuts the path, 1 leaves it open.",
        ),
        Mistake(
            name="sigmoid of the product",
            wrong=_gated(lambda number, y: torch.sigmoid(number * y)),
            says="The sigmoid is taken of the whole product, so that every number of the output lies between 0 and 1. "
            "It belongs on the gate's number alone.",
        ),
    ),
)


# 6.5 DeepSeek-V3's router


def deepseek_v3_router(
    router_logits: Tensor,
    selection_bias: Tensor,
    n_groups: int,
    groups_kept: int,
    top_k: int,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's weights and experts, (T, K) each, the best choice first.

    Source: DeepSeek-V3 (2024), section 2.1.2, equations 12 to 16, and `Gate` in inference/model.py.
    """
    config = RouterConfig(
        d_model=1,
        n_experts=router_logits.shape[-1],
        top_k=top_k,
        score="sigmoid",
        scaling_factor=scaling_factor,
        n_groups=n_groups,
        groups_kept=groups_kept,
        group_score="top2_sum",
    )
    made = routing.route(router_logits, config, selection_bias)
    return made.topk_weights, made.topk_experts


def _orders(n_tokens: int, n: int, seed: int) -> Tensor:
    """Rows of 0 to n - 1, each in an order of its own: nothing ties, and everything is the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(n_tokens)]).float()


def _router_cases() -> list[Case]:
    def case(name: str, logits: Tensor, bias: Tensor, *rule: Any) -> Case:
        names = ("n_groups", "groups_kept", "top_k", "scaling_factor")
        told = ", ".join(f"{n} {value}" for n, value in zip(names, rule, strict=True))
        if logits.numel() > 24:
            given = f"{len(logits)} tokens, {logits.shape[1]} experts"
        else:
            given = f"router_logits = {_listed(logits)}\nselection_bias = {_listed(bias)}"
        return Case(name=name, args=(logits, bias, *rule), show=f"{given}\n{told}")

    steps, none = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.zeros(4)
    twelve = (_orders(2, 12, seed=1) - 6) / 4
    bias = torch.tensor([0.2, -0.3, 0.4, -0.1, 0.3, -0.4, 0.1, 0.0, -0.2, 0.5, -0.5, 0.6])
    many = (_orders(5, 24, seed=6) - 12) / 6
    return [
        case("one token, both groups kept, no bias", steps, none, 2, 2, 2, 1.0),
        case("the same, times 2.5", steps, none, 2, 2, 2, 2.5),
        case("a bias that changes the choice", steps, torch.tensor([-0.1, 0.1, 0.0, 0.7]), 2, 2, 2, 2.5),
        case("two of four groups", twelve, torch.zeros(12), 4, 2, 3, 2.5),
        case("two of four groups, with a bias", twelve, bias, 4, 2, 3, 2.5),
        case("biased scores below zero", twelve, bias - 1.5, 4, 1, 3, 2.5),
        case("five tokens, 24 experts", many, bias.repeat(2).flip(0), 6, 3, 4, 2.5),
    ]


def _listed(values: Tensor) -> str:
    return str([[round(v, 4) for v in row] for row in values.view(-1, values.shape[-1]).tolist()])


IN_PLACE = (
    "The scores were changed in place. A second name for a tensor is no copy, so that `+=` or `masked_fill_` on one "
    "changes both: the weights would hold the bias, and autograd has lost what it had kept. Use what makes a new "
    "tensor."
)


MASKED_WITH_0 = (
    "All biased scores are below zero here, and your router chooses from the groups that it should leave out: it masks "
    "them with 0 (or another number), not with -inf. A sigmoid is never below 0, but with a bias below zero it is, and "
    "then 0 is the best score there is. DeepSeek's first code and vLLM's had the 0 (deepseek-ai/DeepSeek-V3#741, "
    "vllm-project/vllm#13474)."
)
LOCAL_IDS = (
    "You chose among the kept groups alone: your ids are places in that shorter list, not the experts' own. Keep all E "
    "columns and mask: then a column is an expert."
)


def _refuse_what_ties_or_order_would_hide(experts: Any, case: Case) -> None:
    """Tells two mistakes by what the chosen ids have in common, because their numbers differ from answer to answer.

    Which of the zeros wins depends on how `topk` breaks ties, and ids within the kept groups on the order of these.
    """
    logits, bias, n_groups, groups_kept, *_ = case.args
    right = deepseek_v3_router(*case.args)[1]
    if not isinstance(experts, Tensor) or experts.dtype != torch.int64 or experts.shape != right.shape:
        return
    if groups_kept == n_groups or experts.min() < 0 or experts.max() >= len(bias) or torch.equal(experts, right):
        return
    biased = torch.sigmoid(logits.detach()) + bias
    best = routing.best_k(_group_worth(biased.unflatten(-1, (n_groups, -1))), groups_kept)
    size = len(bias) // n_groups
    if biased.max() < 0 and not (experts // size == best).any():
        raise Refused(MASKED_WITH_0)
    if experts.max() < groups_kept * size:
        for kept in (best, best.sort().values):
            if torch.equal(kept.gather(1, experts // size) * size + experts % size, right):
                raise Refused(LOCAL_IDS)


def _run_router(solution: Callable, case: Case) -> Any:
    """Weights, experts, and the gradient that the logits get where the first choice counts once, the second twice …"""
    logits = case.args[0].requires_grad_()
    result = solution(*case.args)
    if not isinstance(result, tuple | list) or len(result) != 2:
        return result
    weights, experts = result
    _refuse_what_ties_or_order_would_hide(experts, case)
    gradient = None
    if isinstance(weights, Tensor) and weights.requires_grad and weights.ndim == 2:
        marks = torch.arange(1, weights.shape[-1] + 1)
        try:
            (gradient,) = torch.autograd.grad((weights * marks).sum(), logits, allow_unused=True)
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise Refused(IN_PLACE) from error
            raise
        gradient = None if gradient is None else gradient.round(decimals=6) + 0.0  # no trace of rounding, no -0
    weights = weights.detach() if isinstance(weights, Tensor) else weights
    return {"topk_weights": weights, "topk_experts": experts, "gradient of the logits": gradient}


def _group_worth(grouped: Tensor) -> Tensor:
    return grouped.topk(2, dim=-1).values.sum(-1)


def _routed(
    scores_of: Callable[[Tensor], Tensor] = torch.sigmoid,
    biased_of: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda scores, bias, logits: scores + bias,
    worth_of: Callable[[Tensor, Tensor], Tensor] = lambda grouped, plain: _group_worth(grouped),
    keep: Callable[[Tensor, int], Tensor] = routing.best_k,
    fill: float = -torch.inf,
    weights_of: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    chosen_by: Callable[[Tensor, Tensor], Tensor] = lambda grouped, plain: grouped,
    n_groups_of: Callable[[int, int], int] = lambda n_experts, n_groups: n_groups,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """DeepSeek-V3's router with one of its steps done in another way."""

    def wrong(logits: Tensor, bias: Tensor, n_groups: int, groups_kept: int, top_k: int, factor: float) -> tuple:
        n_groups = n_groups_of(logits.shape[-1], n_groups)
        scores = scores_of(logits)
        biased = biased_of(scores.detach(), bias, logits.detach())
        grouped, plain = (values.unflatten(-1, (n_groups, -1)) for values in (biased, scores.detach()))
        worth = worth_of(grouped, plain)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, keep(worth, groups_kept), True)
        experts = routing.best_k(chosen_by(grouped, plain).masked_fill(~kept[..., None], fill).flatten(-2), top_k)
        if weights_of is not None:
            return weights_of(scores, experts, bias) * factor, experts
        return routing.weigh(scores, experts, True, factor), experts

    return wrong


def _share(chosen: Tensor) -> Tensor:
    return chosen / chosen.sum(-1, keepdim=True)


def _no_factor(*args: Any) -> tuple[Tensor, Tensor]:
    return deepseek_v3_router(*args[:-1], 1.0)


def _factor_twice(*args: Any) -> tuple[Tensor, Tensor]:
    return deepseek_v3_router(*args[:-1], args[-1] ** 2)


def _no_groups(logits: Tensor, bias: Tensor, n_groups: int, groups_kept: int, *rest: Any) -> tuple[Tensor, Tensor]:
    return deepseek_v3_router(logits, bias, 1, 1, *rest)


def _interleaved(
    logits: Tensor, bias: Tensor, n_groups: int, groups_kept: int, top_k: int, factor: float
) -> tuple[Tensor, Tensor]:
    scores = torch.sigmoid(logits)
    turned = (scores.detach() + bias).unflatten(-1, (-1, n_groups)).transpose(-1, -2).flatten(-2)
    limited = routing.limit_groups(turned, n_groups, groups_kept, "top2_sum")
    experts = routing.best_k(limited.unflatten(-1, (n_groups, -1)).transpose(-1, -2).flatten(-2), top_k)
    return routing.weigh(scores, experts, True, factor), experts


def _ids_in_kept_groups(in_order: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def wrong(
        logits: Tensor, bias: Tensor, n_groups: int, groups_kept: int, top_k: int, factor: float
    ) -> tuple[Tensor, Tensor]:
        scores = torch.sigmoid(logits)
        grouped = (scores.detach() + bias).unflatten(-1, (n_groups, -1))
        kept = in_order(routing.best_k(_group_worth(grouped), groups_kept))
        rows = torch.arange(len(logits))[:, None]
        places = routing.best_k(grouped[rows, kept].flatten(1), top_k)
        chosen = scores.unflatten(-1, (n_groups, -1))[rows, kept].flatten(1).gather(1, places)
        return _share(chosen) * factor, places

    return wrong


def _ascending(logits: Tensor, bias: Tensor, *rule: Any) -> tuple[Tensor, Tensor]:
    experts = deepseek_v3_router(logits, bias, *rule)[1].sort(-1).values
    return _share(torch.sigmoid(logits).gather(-1, experts)) * rule[-1], experts


def _exchanged(*args: Any) -> tuple[Tensor, Tensor]:
    weights, experts = deepseek_v3_router(*args)
    return experts, weights


def _changed_in_place(logits: Tensor, bias: Tensor, *rule: Any) -> tuple[Tensor, Tensor]:
    raise Refused(IN_PLACE)


def _detached(*args: Any) -> tuple[Tensor, Tensor]:
    weights, experts = deepseek_v3_router(*args)
    return weights.detach(), experts


DEEPSEEK_V3_ROUTER = Exercise(
    id="6.5",
    title="DeepSeek-V3's router",
    reference=deepseek_v3_router,
    cases=_router_cases,
    run=_run_router,
    mistakes=(
        Mistake(name="the scores are changed in place", wrong=_changed_in_place, says=IN_PLACE),
        Mistake(
            name="weights and experts exchanged",
            wrong=_exchanged,
            says="Weights and experts are exchanged: return the weights first, then the experts.",
        ),
        Mistake(name="ids within the kept groups", wrong=_ids_in_kept_groups(lambda kept: kept), says=LOCAL_IDS),
        Mistake(
            name="in ascending order of ids",
            wrong=_ascending,
            says="The right experts, in ascending order of their ids. The best choice stands first: leave them as "
            "`topk` gives them.",
        ),
        Mistake(
            name="bias folded into the weights",
            wrong=_routed(weights_of=lambda scores, experts, bias: _share((scores + bias).gather(-1, experts))),
            says="The weights hold the bias. It decides who is chosen, and must not say how much they count: an expert "
            "that was merely short of work would speak louder. vLLM shipped this (vllm-project/vllm#12002). Keep two "
            "tensors apart: scores, and what you choose by.",
        ),
        Mistake(
            name="the bias is ignored",
            wrong=_routed(biased_of=lambda scores, bias, logits: scores),
            says="The selection bias is not used. Add it to the scores, to choose groups and experts by.",
        ),
        Mistake(
            name="bias on the logits",
            wrong=_routed(biased_of=lambda scores, bias, logits: torch.sigmoid(logits + bias)),
            says="You add the bias before the sigmoid. It belongs on the scores (equation 16): there 0.1 means the "
            "same for every token, wherever its logits lie.",
        ),
        Mistake(
            name="the bias is subtracted",
            wrong=_routed(biased_of=lambda scores, bias, logits: scores - bias),
            says="You subtract the bias. It is added: a positive one helps an expert that had too little work.",
        ),
        Mistake(
            name="experts chosen without the bias",
            wrong=_routed(chosen_by=lambda grouped, plain: plain),
            says="The groups are chosen by the biased scores, but within them the experts by the bare ones. The bias "
            "takes part in both: mask the biased scores.",
        ),
        Mistake(
            name="groups chosen without the bias",
            wrong=_routed(worth_of=lambda grouped, plain: _group_worth(plain)),
            says="The groups are chosen by the bare scores, the experts by the biased ones. The bias takes part in "
            "both: add it once, before the groups.",
        ),
        Mistake(
            name="DeepSeek-V2's groups, masked with 0",
            wrong=_routed(worth_of=lambda grouped, plain: grouped.amax(-1), fill=0.0),
            says="Two things at once, as they stood in vLLM until vllm-project/vllm#13474. A group is worth its two "
            "best scores, not its best one. And the other groups are masked with -inf, not with 0: with a bias below "
            "zero 0 is the best score there is.",
        ),
        Mistake(
            name="a group is worth its best expert",
            wrong=_routed(worth_of=lambda grouped, plain: grouped.amax(-1)),
            says="Your groups are worth their best score. That is DeepSeek-V2's rule; in V3 it is the sum of the two "
            "best. vLLM and Megatron-LM both had it so (vllm-project/vllm#13474, NVIDIA/Megatron-LM#1378).",
        ),
        Mistake(
            name="a group is worth all of its experts",
            wrong=_routed(worth_of=lambda grouped, plain: grouped.sum(-1)),
            says="Your groups are worth the sum of all their scores. Only the two best count: the others will hardly "
            "be chosen, and should not speak for their group.",
        ),
        Mistake(
            name="the groups are ignored",
            wrong=_no_groups,
            says="All experts can be chosen. Only those in a token's best `groups_kept` groups may: this is what keeps "
            "a token's traffic on few machines.",
        ),
        Mistake(
            name="interleaved groups",
            wrong=_interleaved,
            says="Your groups take every n-th expert. A group is a stretch of neighbouring ids, as they lie on a "
            "machine: split the last axis into (n_groups, size), in this order.",
        ),
        Mistake(
            name="the number of groups taken for their size",
            wrong=_routed(n_groups_of=lambda n_experts, n_groups: n_experts // n_groups),
            says="You made groups OF n_groups experts. There are n_groups groups, each of E / n_groups experts.",
        ),
        Mistake(
            name="the worst groups kept",
            wrong=_routed(keep=lambda worth, kept: routing.best_k(-worth, kept)),
            says="You keep the groups that are worth least: or is your mask turned round? It has to be True where "
            "something is to be filled, outside of the kept groups.",
        ),
        Mistake(name="masked with 0", wrong=_routed(fill=0.0), says=MASKED_WITH_0),
        Mistake(
            name="the factor is gone",
            wrong=_no_factor,
            says="The weights sum to one: the scaling factor is missing, or it was applied before the division and "
            "divided out again. Normalise first, then scale.",
        ),
        Mistake(
            name="the factor twice",
            wrong=_factor_twice,
            says="The weights are scaled twice. It happens when router and layer both think it is theirs: in vLLM this "
            "took DeepSeek-R1 from 95 to 66 % on a test of school maths (vllm-project/vllm#24119).",
        ),
        Mistake(
            name="not normalised",
            wrong=_routed(weights_of=lambda scores, experts, bias: scores.gather(-1, experts)),
            says="The chosen scores are not divided by their sum. Sigmoids sum to anything up to k, so that the "
            "layer's loudness would change from token to token.",
        ),
        Mistake(
            name="normalised over all experts",
            wrong=_routed(weights_of=lambda scores, experts, bias: _share(scores).gather(-1, experts)),
            says="You divide by the sum over all experts. It runs over the chosen ones.",
        ),
        Mistake(
            name="a softmax of the chosen",
            wrong=_routed(weights_of=lambda scores, experts, bias: scores.gather(-1, experts).softmax(-1)),
            says="You take a softmax of the chosen scores. They are scores already: divide by their sum. Numbers "
            "between 0 and 1 come out of a softmax nearly equal.",
        ),
        Mistake(
            name="softmax scores",
            wrong=_routed(scores_of=lambda logits: logits.softmax(-1)),
            says="Your scores are a softmax, as in DeepSeek-V2. V3 takes the sigmoid of each logit (equation 15), so "
            "that a bias moves one expert's chance without touching the others' scores.",
        ),
        Mistake(
            name="no gradient",
            wrong=_detached,
            says="All numbers are right, but no gradient gets back to the logits. The choice needs none; the weights "
            "do: they are the only way by which a router learns.",
        ),
    ),
)


# 6.6 without the best


def without_best(routing: Routing, n: int) -> tuple[Tensor, Tensor]:
    """Weights and experts, (T, K), if every token's best `n` experts were not there; weights are bare scores.

    Source: Dai et al. 2024 (DeepSeekMoE), section 4.5.
    """
    top_k = routing.topk_experts.shape[1]
    order = routing.router_scores.argsort(dim=-1, descending=True, stable=True)
    experts = order[:, n : n + top_k]
    return routing.router_scores.gather(-1, experts), experts


def _ablation_cases() -> list[Case]:
    def case(name: str, scores: Tensor, top_k: int, n: int, score: str = "softmax") -> Case:
        config = RouterConfig(d_model=1, n_experts=scores.shape[1], top_k=top_k, score=score, normalise=False)
        logits = scores.log() if score == "softmax" else scores.logit()
        made = routing.route(logits, config)
        told = _listed(scores) if scores.numel() <= 24 else f"those of {len(scores)} tokens, {scores.shape[1]} experts"
        return Case(name=name, args=(made, n), show=f"router_scores = {told}\nK = {top_k}, n = {n}")

    row = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    tied = torch.tensor([[0.125, 0.125, 0.5, 0.125, 0.125]])
    rows = (_orders(3, 6, seed=3) + 1) / 21
    return [
        case("one choice, the best masked", row, 1, 1),
        case("two choices, the best masked", row, 2, 1),
        case("nothing masked", row, 2, 0),
        case("equal scores", tied, 2, 1),
        case("three tokens, two masked", rows, 2, 2),
        case("sigmoid scores, three of eight masked", (_orders(4, 8, seed=5) + 1) / 10, 2, 3, "sigmoid"),
        case("as many masked as can be", rows, 3, 3),
    ]


ANY_OF_EQUALS = (
    "Of equal scores yours takes another than the lowest id. `topk` promises no order there; a sort with `stable=True` "
    "keeps the lowest id first."
)


def _run_ablation(solution: Callable, case: Case) -> Any:
    result = solution(*case.args)
    if not isinstance(result, tuple | list) or len(result) != 2:
        return result
    experts, scores = result[1], case.args[0].router_scores
    right = without_best(*case.args)[1]
    if isinstance(experts, Tensor) and experts.dtype == torch.int64 and experts.shape == right.shape:
        in_range = bool(((experts >= 0) & (experts < scores.shape[1])).all())
        if in_range and not torch.equal(experts, right):
            equal = torch.equal(scores.gather(-1, experts), scores.gather(-1, right))
            if equal and all(len(set(row)) == len(row) for row in experts.tolist()):
                raise Refused(ANY_OF_EQUALS)  # which of the equals comes depends on the machine
    return {"weights": result[0], "experts": result[1]}


def _masked(
    ranks: Callable[[Tensor, int, int], Tensor] = lambda order, n, k: order[:, n : n + k],
    weights: Callable[[Routing, Tensor, int], Tensor] = lambda r, experts, n: r.router_scores.gather(-1, experts),
    order_of: Callable[[Tensor], Tensor] = lambda scores: scores.argsort(dim=-1, descending=True, stable=True),
) -> Callable[[Routing, int], tuple[Tensor, Tensor]]:
    """The new choice with one of its steps done in another way."""

    def wrong(routing: Routing, n: int) -> tuple[Tensor, Tensor]:
        experts = ranks(order_of(routing.router_scores), n, routing.topk_experts.shape[1])
        return weights(routing, experts, n), experts

    return wrong


def _zero_weights(routing: Routing, n: int) -> tuple[Tensor, Tensor]:
    weights = routing.topk_weights.clone()
    weights[:, :n] = 0
    return weights, routing.topk_experts


def _first_ids(routing: Routing, n: int) -> tuple[Tensor, Tensor]:
    scores = routing.router_scores.clone()
    scores[:, :n] = -1
    experts = scores.argsort(dim=-1, descending=True, stable=True)[:, : routing.topk_experts.shape[1]]
    return routing.router_scores.gather(-1, experts), experts


def _scored_again(r: Routing, experts: Tensor, n: int) -> Tensor:
    order = r.router_scores.argsort(dim=-1, descending=True, stable=True)
    return r.router_logits.scatter(-1, order[:, :n], -torch.inf).softmax(-1).gather(-1, experts)


def _last_of_equals(scores: Tensor) -> Tensor:
    flipped = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return scores.shape[-1] - 1 - flipped


def _swapped(routing: Routing, n: int) -> tuple[Tensor, Tensor]:
    weights, experts = without_best(routing, n)
    return experts, weights


WITHOUT_BEST = Exercise(
    id="6.6",
    title="without the best",
    reference=without_best,
    cases=_ablation_cases,
    run=_run_ablation,
    mistakes=(
        Mistake(
            name="weights and experts exchanged",
            wrong=_swapped,
            says="Weights and experts are exchanged: return the weights first, then the experts.",
        ),
        Mistake(
            name="slots dropped",
            wrong=_masked(ranks=lambda order, n, k: order[:, :k][:, n:]),
            says="You dropped the first n slots: a token is left with fewer than K experts, or none. Masking an expert "
            "makes room for the next best: K are chosen again.",
        ),
        Mistake(
            name="weight zero in place of another expert",
            wrong=_zero_weights,
            says="The best experts keep their slots with weight 0. That silences them (you will do so, too), but here "
            "others take their place: choose K among those that are left.",
        ),
        Mistake(
            name="nothing masked",
            wrong=_masked(ranks=lambda order, n, k: order[:, :k]),
            says="The best experts are still chosen: `n` has no effect. In the order of the scores they hold the first "
            "n places.",
        ),
        Mistake(
            name="always one masked",
            wrong=_masked(ranks=lambda order, n, k: order[:, 1 : 1 + k]),
            says="You mask one expert, whatever `n` is. With n = 0 nothing is masked, with n = 3 three are.",
        ),
        Mistake(
            name="one too many masked",
            wrong=_masked(ranks=lambda order, n, k: order[:, n + 1 : n + 1 + k]),
            says="One expert too many is masked. Places count from 0: the best n hold the places 0 to n - 1, so that "
            "the first one left is in place n.",
        ),
        Mistake(
            name="all chosen masked",
            wrong=_masked(ranks=lambda order, n, k: order[:, k : 2 * k]),
            says="You mask all K chosen experts. Only the best `n` are masked: of the others some were chosen, and "
            "stay.",
        ),
        Mistake(
            name="n chosen in place of K",
            wrong=_masked(ranks=lambda order, n, k: order[:, n : 2 * n]),
            says="You choose n experts. `n` says how many are masked; how many a token chooses is K, the width of "
            "`topk_experts`.",
        ),
        Mistake(
            name="all that are left",
            wrong=_masked(ranks=lambda order, n, k: order[:, n:]),
            says="You choose all experts that are left. A token chooses K, as many as before: the width of "
            "`topk_experts`.",
        ),
        Mistake(
            name="the experts of the lowest ids masked",
            wrong=_first_ids,
            says="You mask experts 0 to n - 1. Which experts are best differs from token to token: go by the order of "
            "its scores, not by ids.",
        ),
        Mistake(
            name="the worst masked",
            wrong=_masked(order_of=lambda scores: scores.argsort(dim=-1, stable=True)),
            says="Your order rises: the worst come first and are masked, and the next worst are chosen.",
        ),
        Mistake(
            name="any of equals",
            wrong=_masked(order_of=_last_of_equals),
            says=ANY_OF_EQUALS,
        ),
        Mistake(
            name="the weights of the masked",
            wrong=_masked(weights=lambda r, experts, n: r.topk_weights),
            says="The new experts got the weights of the old ones. The question is what this token's next best is "
            "worth, by its own score.",
        ),
        Mistake(
            name="normalised",
            wrong=_masked(weights=lambda r, experts, n: _share(r.router_scores.gather(-1, experts))),
            says="You divided the weights by their sum. This layer does not normalise: its weights are bare scores.",
        ),
        Mistake(
            name="scored again",
            wrong=_masked(weights=_scored_again),
            says="You took a new softmax without the masked experts, so that the others' scores rose. Here the scores "
            "stay as the router made them, and only the choice changes.",
        ),
    ),
)

EXERCISES = (COMBINATIONS, CUT_FINER, MOE_WITH_SHARED, GATED_SHARED, DEEPSEEK_V3_ROUTER, WITHOUT_BEST)
