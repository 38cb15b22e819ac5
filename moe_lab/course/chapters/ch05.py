"""The exercises of notebook 05: how uneven a load is, and what is done about it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab import balance
from moe_lab.config import RouterConfig
from moe_lab.course.bank import Case, Exercise, Mistake
from moe_lab.records import Routing
from moe_lab.routing import best_k, route


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# 5.1 MaxVio


def max_violation(tokens_per_expert: Tensor) -> float:
    """How far the fullest expert is above the mean count, as a share of the mean.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", equation 4.
    """
    return balance.max_violation(tokens_per_expert).item()


def _load_cases() -> list[Case]:
    loads = {
        "three experts by hand": [3, 1, 2],
        "an even load": [4, 4, 4, 4],
        "a mean that is no whole number, and an empty expert": [6, 0, 3, 4, 1],
        "one expert far below all others": [9, 9, 10, 1, 9, 9],
        "all on one expert": [0, 0, 0, 21, 0, 0, 0],
    }
    return [Case(name=name, args=(torch.tensor(counts),)) for name, counts in loads.items()]


def _of_counts(formula: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
    return lambda tokens_per_expert: formula(tokens_per_expert.float()).item()


VARIATION = (
    "This is the standard deviation over the mean, the coefficient of variation: it asks how all experts scatter. "
    "MaxVio asks about the fullest one alone, because everybody waits for that one, or it drops what it cannot take."
)

MAX_VIOLATION = Exercise(
    id="5.1",
    title="MaxVio",
    reference=max_violation,
    cases=_load_cases,
    mistakes=(
        Mistake(
            name="1 is not taken off",
            wrong=_of_counts(lambda n: n.max() / n.mean()),
            says="You return how many times the mean the fullest expert has. A violation is what it has too much: an "
            "even load has to give 0, not 1.",
        ),
        Mistake(
            name="counted in tokens",
            wrong=_of_counts(lambda n: n.max() - n.mean()),
            says="This is the excess in tokens. Twice the tokens would give twice the number for the same unevenness. "
            "Say it as a share of the mean.",
        ),
        Mistake(
            name="divided by the largest",
            wrong=_of_counts(lambda n: (n.max() - n.mean()) / n.max()),
            says="The excess is divided by the fullest expert's count. Then it can never reach 1, however bad it gets. "
            "The measure is the even share: divide by the mean.",
        ),
        Mistake(
            name="a missing token counts as one too many",
            wrong=_of_counts(lambda n: (n - n.mean()).abs().max() / n.mean()),
            says="You take the largest distance from the mean, upwards or downwards. An expert with too little to do "
            "holds nobody up; only the fullest one counts.",
        ),
        Mistake(
            name="empty experts are left out",
            wrong=_of_counts(lambda n: n.max() / n[n > 0].mean() - 1),
            says="The mean runs over the busy experts only. The even share is over all E: if every token has one "
            "choice and all go to the same of seven experts, MaxVio is 6, not 0.",
        ),
        Mistake(
            name="compared with the emptiest",
            wrong=_of_counts(lambda n: n.max() / n.min() - 1),
            says="You compare the fullest with the emptiest expert. One empty expert makes that infinite, however even "
            "the others are. Compare with the mean.",
        ),
        Mistake(
            name="the share of the fullest",
            wrong=_of_counts(lambda n: n.max() / n.sum()),
            says="This is the fullest expert's share of all choices. What is even depends on E: a share of 0.25 is "
            "even for 4 experts and bad for 16. Compare the count with the mean count.",
        ),
        Mistake(
            name="compared with the median",
            wrong=_of_counts(lambda n: n.quantile(0.5) and n.max() / n.quantile(0.5) - 1),
            says="You compare with the median. It is 0 as soon as most experts are empty, which is when the measure is "
            "needed. Compare with the mean, T·k / E.",
        ),
        Mistake(
            name="rounded down",
            wrong=lambda n: float((n.max() * len(n)).item() // n.sum().item() - 1),
            says="A division with `//` rounds down, and takes what is to be measured with it. Make floats of the "
            "counts (`.float()`) and divide with `/`.",
        ),
        Mistake(name="a standard deviation", wrong=_of_counts(lambda n: n.std() / n.mean()), says=VARIATION),
        Mistake(
            name="a standard deviation of all",
            wrong=_of_counts(lambda n: n.std(correction=0) / n.mean()),
            says=VARIATION,
        ),
    ),
)


# 5.2 f and P


def _open(routing: Routing) -> Routing:
    """The routing with leaves that gradients reach, so that an answer must let them through."""
    for tensor in (routing.router_logits, routing.router_scores, routing.topk_weights):
        tensor.requires_grad_()
    return routing


def _by_hand(scores: list[list[float]], top_k: int) -> Routing:
    """The routing of softmax scores that are written down (rows that sum to one)."""
    logits = torch.tensor(scores).log()
    return route(logits, RouterConfig(d_model=1, n_experts=logits.shape[1], top_k=top_k, normalise=False))


def _drawn(n_tokens: int, n_experts: int, top_k: int, seed: int, empty: int | None = None, **rule: Any) -> Routing:
    """A routing of random logits, some experts liked better than others; nobody chooses the expert `empty`."""
    logits = _random(n_tokens, n_experts, seed=seed) + torch.linspace(1, -1, n_experts)
    if empty is not None:
        logits[:, empty] = -9.0
    bias = rule.pop("bias", None)
    return route(logits, RouterConfig(d_model=1, n_experts=n_experts, top_k=top_k, **rule), bias)


SHARES_SHOW = """router_scores = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]]
topk_experts = [[0, 1], [0, 2], [1, 0], [0, 1]]
mask = None"""


def _shares_cases() -> list[Case]:
    four = [[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]]
    padded = torch.tensor([True, True, False, True, False, True])
    biased = _drawn(9, 7, 2, seed=4, bias=torch.linspace(-1, 1, 7), score="sigmoid")
    return [
        Case(name="four tokens by hand, k = 2", args=(_open(_by_hand(four, 2)), None), show=SHARES_SHOW),
        Case(
            name="the last expert is empty",
            args=(_open(_drawn(7, 5, 1, seed=1, empty=4, normalise=False)), None),
            show="7 tokens, 1 of 5 experts each, none of them expert 4",
        ),
        Case(
            name="two tokens of padding",
            args=(_open(_drawn(6, 4, 2, seed=2)), padded),
            show="6 tokens, 2 of 4 experts each\nmask = [True, True, False, True, False, True]",
        ),
        Case(
            name="sigmoid scores",
            args=(_open(_drawn(5, 6, 3, seed=3, score="sigmoid")), None),
            show="5 tokens, 3 of 6 experts each; the scores are sigmoids, whose rows do not sum to 1",
        ),
        Case(
            name="a choice made with a selection bias",
            args=(_open(biased), None),
            show="9 tokens, 2 of 7 experts each; a bias took part in the choice, so that the chosen experts are not "
            "those of the best scores",
        ),
    ]


def _all(routing: Routing) -> Tensor:
    return torch.ones(len(routing.topk_experts), dtype=torch.bool)


def _chosen(routing: Routing) -> Tensor:
    """(T, E), one where a token chose an expert."""
    return torch.zeros_like(routing.router_scores).scatter(1, routing.topk_experts, 1.0)


def _probabilities(routing: Routing) -> Tensor:
    return routing.router_scores / routing.router_scores.sum(-1, keepdim=True)


def _shares(
    choices: Callable[[Routing], Tensor] = _chosen,
    probabilities: Callable[[Routing], Tensor] = _probabilities,
    counted: Callable[[Routing, Tensor | None], tuple[Tensor, Tensor]] | None = None,
) -> Callable[[Routing, Tensor | None], tuple[Tensor, Tensor]]:
    """f and P with one step done in another way; `counted` gives the tokens that count in f, and those in P."""

    def wrong(routing: Routing, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mask = _all(routing) if mask is None else mask
        in_f, in_p = counted(routing, mask) if counted else (mask, mask)
        taken = choices(routing)[in_f].sum(0)
        return taken / taken.sum(), probabilities(routing)[in_p].mean(0)

    return wrong


def _scaled_f(scale: Callable[[Routing, Tensor], float]) -> Callable[[Routing, Tensor | None], tuple[Tensor, Tensor]]:
    def wrong(routing: Routing, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f, p = balance.shares(routing, mask)
        return f * scale(routing, _all(routing) if mask is None else mask), p

    return wrong


def _over_all_tokens(routing: Routing, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    f, p = balance.shares(routing, mask)
    share = 1.0 if mask is None else mask.float().mean()
    return f * share, p * share


def _f_over_all_choices(routing: Routing, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    f, p = balance.shares(routing, mask)
    return (f if mask is None else f * mask.float().mean()), p


def _ratio_of_sums(routing: Routing, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    f, _ = balance.shares(routing, mask)
    sums = routing.router_scores[_all(routing) if mask is None else mask].sum(0)
    return f, sums / sums.sum()


def _short(routing: Routing, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    f, p = balance.shares(routing, mask)
    return f[: int(f.nonzero().max()) + 1], p


def _as_if_simple(f_sums_to: Callable[[Routing], float]) -> Callable[[Routing, Tensor | None], tuple[Tensor, Tensor]]:
    """Right for softmax scores without padding, but for what f sums to."""

    def wrong(routing: Routing, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return balance.shares(routing)[0] * f_sums_to(routing), routing.router_scores.mean(0)

    return wrong


def _p_for_f(routing: Routing, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _, p = balance.shares(routing, mask)
    return p, p


PADDING = (
    "Padding is there to make sequences equally long. It says nothing, and a batch can be half padding: all of it "
    "looks alike and goes to the same experts, which then look overloaded. transformers counted it until a user "
    "noticed (#28517)."
)

SHARES = Exercise(
    id="5.2",
    title="f and P",
    reference=balance.shares,
    cases=_shares_cases,
    mistakes=(
        Mistake(
            name="the 1/k is missing",
            wrong=_scaled_f(lambda routing, _: float(routing.topk_experts.shape[1])),
            says="Your f sums to k. Every token makes k choices, so there are k·T of them: divide by that. Without it "
            "the loss of a perfectly even router is k in place of 1, and every published coefficient means something "
            "else. With k = 1 nobody notices.",
        ),
        Mistake(
            name="the 1/k, the mask and sigmoids are missing",
            wrong=_as_if_simple(lambda routing: float(routing.topk_experts.shape[1])),
            says="A good first draft with three things left. There are k·T choices, not T: f has to sum to 1. Padding "
            "is not to count: the mask is not used yet. And sigmoid scores do not sum to 1: divide each token's by "
            "their sum.",
        ),
        Mistake(
            name="the mask and sigmoids are missing",
            wrong=_as_if_simple(lambda routing: 1.0),
            says="Right for softmax scores without padding. Two things are left: the mask is not used yet, so that "
            "padding counts; and sigmoid scores do not sum to 1, so divide each token's by their sum.",
        ),
        Mistake(
            name="counts in place of shares",
            wrong=_scaled_f(lambda routing, mask: float(mask.sum() * routing.topk_experts.shape[1])),
            says="Your f holds the counts. Then the loss would grow with the batch. A share is a count over the number "
            "of all choices that count.",
        ),
        Mistake(
            name="padding counted",
            wrong=_shares(counted=lambda routing, mask: (_all(routing), _all(routing))),
            says=f"The mask changes nothing: tokens of padding count in f and in P. {PADDING}",
        ),
        Mistake(
            name="padding counted in f",
            wrong=_shares(counted=lambda routing, mask: (_all(routing), mask)),
            says=f"P leaves padding out, f does not. {PADDING}",
        ),
        Mistake(
            name="padding counted in P",
            wrong=_shares(counted=lambda routing, mask: (mask, _all(routing))),
            says=f"f leaves padding out, P does not. {PADDING}",
        ),
        Mistake(
            name="divided by all tokens",
            wrong=_over_all_tokens,
            says="Padding adds nothing to your sums, but they are divided by all tokens, padding too: f and P do not "
            "sum to 1. The number of tokens that count is `mask.sum()`.",
        ),
        Mistake(
            name="f divided by all choices",
            wrong=_f_over_all_choices,
            says="f counts the tokens that are no padding, but is divided by the choices of all tokens: it does not "
            "sum to 1. Numerator and denominator have to be of the same tokens: take the masked table for both.",
        ),
        Mistake(
            name="a ratio of sums",
            wrong=_ratio_of_sums,
            says="P is a ratio of sums: all scores are added first, then divided. With sigmoids a token with large "
            "scores then weighs more than one with small scores. P is a mean of probabilities: divide each token's "
            "row by its own sum first, then average.",
        ),
        Mistake(
            name="only the first choice counts",
            wrong=_shares(choices=lambda routing: F.one_hot(routing.topk_experts[:, 0], routing.n_experts).float()),
            says="Only the first choices are counted in f. A token makes k choices, and each of them is work for an "
            "expert. GShard's loss, for k = 2, does count first choices only; it is another loss.",
        ),
        Mistake(
            name="the choice is made anew",
            wrong=_shares(
                choices=lambda routing: (
                    F.one_hot(best_k(routing.router_scores.detach(), routing.topk_experts.shape[1]), routing.n_experts)
                    .sum(1)
                    .float()
                )
            ),
            says="You choose the best scores once more. The router's choice may have had a bias or groups in it: f "
            "counts where the tokens really went, which is `topk_experts`.",
        ),
        Mistake(
            name="weights in place of choices",
            wrong=_shares(choices=lambda routing: routing.dense_weights.detach()),
            says="f is made of weights. It counts choices, each as 1, because each is a row of work, however small its "
            "weight. And a weight carries a gradient, which f must not.",
        ),
        Mistake(
            name="P in place of f",
            wrong=_p_for_f,
            says="f and P are the same. f counts the choices that were made, P averages the probabilities: a router "
            "that gives expert 0 a probability of 0.51 every time has P = 0.51 there, but f = 1.",
        ),
        Mistake(
            name="double softmax",
            wrong=_shares(probabilities=lambda routing: routing.router_scores.softmax(-1)),
            says="A softmax is taken of the scores. They are probabilities already: a second softmax flattens them, "
            "0.9 and 0.1 become 0.69 and 0.31, and the router looks more even than it is. transformers shipped this "
            "(#39056).",
        ),
        Mistake(
            name="a softmax, whatever the scores are",
            wrong=_shares(probabilities=lambda routing: routing.router_logits.softmax(-1)),
            says="P is a softmax of the logits. Here the router scores with sigmoids, and a softmax of its logits is "
            "none of its probabilities. Divide `router_scores` by their sum: for a softmax that changes nothing.",
        ),
        Mistake(
            name="scores that do not sum to one",
            wrong=_shares(probabilities=lambda routing: routing.router_scores),
            says="Your P does not sum to 1 where the scores are sigmoids. Divide each token's scores by their sum "
            "(DeepSeek-V3, equation 20). Otherwise the loss falls when all scores fall together, which balances "
            "nothing.",
        ),
        Mistake(
            name="P of the chosen only",
            wrong=_shares(probabilities=lambda routing: routing.dense_weights),
            says="P averages the weights, which are zero for everybody who was not chosen. P is the mean probability "
            "over all tokens, chosen or not: an expert that nobody chooses has a P, and by it the loss can bring it "
            "back.",
        ),
        Mistake(
            name="the last experts are missing",
            wrong=_short,
            says="f is too short: `bincount` ends at the highest id that occurs. Nobody chose the last expert, and it "
            "has an f of 0: pass `minlength`.",
        ),
    ),
)


# 5.3 the loss


def balance_loss(routings: Sequence[Routing], mask: Tensor | None = None) -> Tensor:
    """The sum over layers of `E · Σ_i f_i P_i`, before the coefficient α.

    Source: Fedus et al. 2021 (Switch), equation 4, with f divided by k as well.
    """
    return sum((balance.switch_loss(routing, mask) for routing in routings), start=torch.zeros(()))


LOSS_SHOW = """one layer of 3 experts, k = 1
router_scores = [[0.5, 0.25, 0.25], [0.75, 0.125, 0.125], [0.25, 0.5, 0.25], [0.5, 0.125, 0.375]]
so f = [0.75, 0.25, 0] and P = [0.5, 0.25, 0.25]"""


def _loss_cases() -> list[Case]:
    by_hand = torch.tensor([[0.5, 0.25, 0.25], [0.75, 0.125, 0.125], [0.25, 0.5, 0.25], [0.5, 0.125, 0.375]]).log()

    def drawn(n_layers: int, n_tokens: int, n_experts: int, top_k: int, seed: int, mask: Tensor | None = None) -> tuple:
        tilts = [torch.linspace(1 - layer, layer - 1, n_experts) for layer in range(n_layers)]  # each likes others
        logits = [_random(n_tokens, n_experts, seed=seed + layer) + tilt for layer, tilt in enumerate(tilts)]
        return logits, RouterConfig(d_model=1, n_experts=n_experts, top_k=top_k), mask

    mask = torch.tensor([True] * 5 + [False] * 3 + [True])
    return [
        Case(
            name="one layer by hand",
            args=([by_hand], RouterConfig(d_model=1, n_experts=3, top_k=1, normalise=False), None),
            show=LOSS_SHOW,
        ),
        Case(name="two choices each", args=drawn(1, 7, 5, 2, seed=10), show="one layer, 7 tokens, 2 of 5 experts each"),
        Case(name="two layers", args=drawn(2, 6, 4, 2, seed=20), show="two layers, 6 tokens, 2 of 4 experts each"),
        Case(
            name="three layers, and padding",
            args=drawn(3, 9, 5, 3, seed=30, mask=mask),
            show="three layers, 9 tokens of which three are padding (see `mask`), 3 of 5 experts each",
        ),
    ]


def _run_loss(solution: Callable, case: Case) -> dict[str, Any]:
    """The loss, and the gradient of every layer's logits: zeros where none arrives."""
    logits, config, mask = case.args
    leaves = [values.clone().requires_grad_() for values in logits]
    loss = solution([route(values, config) for values in leaves], mask)
    if not isinstance(loss, Tensor):
        return {"loss": loss, "gradient of the logits": None}
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if loss.requires_grad:
        found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    gradient = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    return {"loss": loss.detach(), "gradient of the logits": gradient}


def _summed(
    one: Callable[[Routing, Tensor | None], Tensor],
    together: Callable[[list[Tensor]], Tensor] = lambda losses: torch.stack(losses).sum(),
) -> Callable[[Sequence[Routing], Tensor | None], Tensor]:
    """The loss with another one for each layer, or put together in another way."""
    return lambda routings, mask=None: together([one(routing, mask) for routing in routings])


def _layer_loss(
    f_and_p: Callable[[Routing, Tensor | None], tuple[Tensor, Tensor]] = balance.shares,
) -> Callable[[Routing, Tensor | None], Tensor]:
    def one(routing: Routing, mask: Tensor | None) -> Tensor:
        f, p = f_and_p(routing, mask)
        return routing.n_experts * (f * p).sum()

    return one


def _straight_through(routing: Routing, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """f with the gradient of P, its value unchanged."""
    f, p = balance.shares(routing, mask)
    return f + p - p.detach(), p


def _twice(part: int) -> Callable[[Routing, Tensor | None], tuple[Tensor, Tensor]]:
    return lambda routing, mask: (balance.shares(routing, mask)[part],) * 2


def _pool(routings: Sequence[Routing], mask: Tensor | None, f_sums_to: Callable[[Routing], float]) -> Tensor:
    parts = [balance.shares(routing, mask) for routing in routings]
    f, p = (torch.stack(part).mean(0) for part in zip(*parts, strict=True))
    return routings[0].n_experts * f_sums_to(routings[0]) * (f * p).sum()


def _k(routing: Routing) -> int:
    return routing.topk_experts.shape[1]


POOLED = (
    "The layers are thrown together before the product. A layer in which everything goes to expert 0 and one in which "
    "everything goes to expert 1 are then even together, while in each of them one expert does all the work. Take the "
    "product layer by layer, then add."
)

BALANCE_LOSS = Exercise(
    id="5.3",
    title="the balance loss",
    reference=balance_loss,
    cases=_loss_cases,
    run=_run_loss,
    mistakes=(
        Mistake(
            name="nothing carries a gradient",
            wrong=lambda routings, mask=None: balance_loss(routings, mask).detach(),
            says="The number is right, but no gradient gets back to the logits: this loss would be printed, and train "
            "nothing. f carries none anyway, so P has to: leave out `.detach()` and `no_grad`.",
        ),
        Mistake(
            name="gradient through f",
            wrong=_summed(_layer_loss(_straight_through)),
            says="The number is right, the gradient is not: some of it comes through f. f is made of choices, and a "
            "choice has no slope: it is a constant that says how hard each P is pushed. Anything soft put in its place "
            "makes another loss.",
        ),
        Mistake(
            name="f made of probabilities",
            wrong=_summed(_layer_loss(_twice(1))),
            says="f is P as well, so this is E times the sum of P squared. It is smooth, and blind: at P near 1/E it "
            "is content, even if every token chooses the same expert by a hair. The counts have to come in.",
        ),
        Mistake(
            name="P made of counts",
            wrong=_summed(_layer_loss(_twice(0))),
            says="P is f as well: E times the sum of f squared. It measures the load well, but counts have no slope, "
            "so no gradient reaches the router. That is why P stands beside f.",
        ),
        Mistake(
            name="a product of sums",
            wrong=_summed(
                lambda routing, mask: (
                    routing.n_experts * balance.shares(routing, mask)[0].sum() * balance.shares(routing, mask)[1].sum()
                )
            ),
            says="You sum f, sum P, and multiply. Both sums are 1, so a layer gives E whatever the load is, and "
            "nothing pulls. Multiply expert by expert, then sum.",
        ),
        Mistake(
            name="E is missing",
            wrong=_summed(lambda routing, mask: balance.switch_loss(routing, mask) / routing.n_experts),
            says="The factor E is missing, or a mean over the experts has taken it out again. With it an even router's "
            "loss is 1, however many experts there are, and one α serves 8 and 256 of them.",
        ),
        Mistake(
            name="E twice",
            wrong=_summed(lambda routing, mask: balance.switch_loss(routing, mask) * routing.n_experts),
            says="The loss is E times too large: E² belongs to a mean over the experts, E to a sum.",
        ),
        Mistake(
            name="the 1/k is missing",
            wrong=_summed(lambda routing, mask: balance.switch_loss(routing, mask) * _k(routing)),
            says="The loss is k times too large: an even router gives k, not 1. f has to sum to 1: divide the counts "
            "by k·T. OLMoE's and transformers' losses lack this, so their coefficients do not carry over.",
        ),
        Mistake(
            name="the coefficient is in it",
            wrong=lambda routings, mask=None: 0.01 * balance_loss(routings, mask),
            says="The loss is multiplied by 0.01. α comes later, where the losses are added up: here it would hide "
            "that an even router gives 1.",
        ),
        Mistake(
            name="layers pooled, and the 1/k is missing",
            wrong=lambda routings, mask=None: _pool(routings, mask, _k),
            says=f"This is what transformers computes: f sums to k, and layers are pooled. {POOLED}",
        ),
        Mistake(
            name="layers pooled",
            wrong=lambda routings, mask=None: _pool(routings, mask, lambda routing: 1),
            says=f"{POOLED} transformers pools (#28255).",
        ),
        Mistake(
            name="the mean over the layers",
            wrong=_summed(_layer_loss(), lambda losses: torch.stack(losses).mean()),
            says="You take the mean over the layers. MegaBlocks does so, most others add: with a mean, each layer of a "
            "deep model is pushed more weakly at the same α. Here the layers are added.",
        ),
        Mistake(
            name="only the last layer",
            wrong=_summed(_layer_loss(), lambda losses: losses[-1]),
            says="Only the last layer counts: each turn of the loop sets the loss anew. Add to it, or the layers below "
            "are left to collapse.",
        ),
        Mistake(
            name="only the first layer",
            wrong=_summed(_layer_loss(), lambda losses: losses[0]),
            says="Only the first layer counts: does the `return` stand inside the loop? The other layers would be left "
            "to collapse.",
        ),
        Mistake(
            name="padding counted",
            wrong=lambda routings, mask=None: balance_loss(routings),
            says="The mask does not reach `shares`: padding counts as if it were text. Pass it on.",
        ),
        Mistake(
            name="double softmax",
            wrong=_summed(_layer_loss(_shares(probabilities=lambda routing: routing.router_scores.softmax(-1)))),
            says="P comes from a softmax of the scores, which are a softmax already. Taken twice, every router looks "
            "nearly even, and the loss hardly pushes (transformers #39056).",
        ),
        Mistake(
            name="P of the chosen only",
            wrong=_summed(_layer_loss(_shares(probabilities=lambda routing: routing.dense_weights))),
            says="P is made of the weights of the chosen. Then an expert that nobody chooses has P = 0, and the loss "
            "knows nothing of it. Use the probabilities of all experts.",
        ),
    ),
)


# 5.4 the z-loss


def _logits_routing(logits: Tensor, top_k: int) -> Routing:
    return _open(route(logits, RouterConfig(d_model=1, n_experts=logits.shape[1], top_k=top_k)))


def _z_cases() -> list[Case]:
    by_hand = torch.tensor([[1.0, 0.0, -1.0], [2.0, 2.0, 0.0]])
    return [
        Case(
            name="two tokens by hand",
            args=(_logits_routing(by_hand, 1),),
            show="router_logits = [[1, 0, -1], [2, 2, 0]]",
        ),
        Case(
            name="small logits: their logsumexp is below 0",
            args=(_logits_routing(_random(4, 6, seed=50) - 3, 2),),
            show="4 tokens, 6 experts, logits around -3",
        ),
        Case(
            name="more tokens",
            args=(_logits_routing(2 * _random(9, 5, seed=51), 2),),
            show="9 tokens, 5 experts, logits from N(0, 4)",
        ),
        Case(
            name="large logits",
            args=(_logits_routing(120 + _random(3, 4, seed=52), 2),),
            show="3 tokens, 4 experts, logits around 120",
        ),
    ]


def _z(formula: Callable[[Tensor], Tensor]) -> Callable[[Routing], Tensor]:
    return lambda routing: formula(routing.router_logits)


Z_LOSS = Exercise(
    id="5.4",
    title="the z-loss",
    reference=balance.z_loss,
    cases=_z_cases,
    mistakes=(
        Mistake(
            name="the square of the mean",
            wrong=_z(lambda z: z.logsumexp(-1).mean().square()),
            says="You square the mean. A token with +5 and one with −5 would cancel, though both have large numbers. "
            "Square every token's own, then take the mean.",
        ),
        Mistake(
            name="the square is missing",
            wrong=_z(lambda z: z.logsumexp(-1).mean()),
            says="The square is missing. Without it the loss can be lowered for ever, by logits that go to −∞. The "
            "square pulls towards 0 from either side.",
        ),
        Mistake(
            name="logits squared one by one",
            wrong=_z(lambda z: z.square().mean()),
            says="This is the mean square of the logits. It pulls all of them to 0, also those that may well be far "
            "below the others. The z-loss looks at what a softmax divides by: the logarithm of the sum of "
            "exponentials.",
        ),
        Mistake(
            name="logits squared and summed",
            wrong=_z(lambda z: z.square().sum(-1).mean()),
            says="You sum the squares of the logits. The z-loss looks at one number a token: the logarithm of what a "
            "softmax divides by.",
        ),
        Mistake(
            name="double softmax",
            wrong=lambda routing: routing.router_scores.logsumexp(-1).square().mean(),
            says="You take the scores. A softmax has already divided the size of the logits out, which is what this "
            "loss is about. Use `router_logits`.",
        ),
        Mistake(
            name="along the tokens",
            wrong=_z(lambda z: z.logsumexp(0).square().mean()),
            says="The sum runs over the tokens. A softmax is taken over a token's E experts: sum along the last axis.",
        ),
        Mistake(
            name="over everything at once",
            wrong=_z(lambda z: z.logsumexp((0, 1)).square()),
            says="One logsumexp over all tokens and experts. Every token has its own softmax, so its own logsumexp: "
            "(T,) numbers, squared, then the mean.",
        ),
        Mistake(
            name="a sum over the tokens",
            wrong=_z(lambda z: z.logsumexp(-1).square().sum()),
            says="The tokens are summed: the loss, and what it does against the others, would grow with the batch. "
            "Take the mean.",
        ),
        Mistake(
            name="only the chosen logits",
            wrong=lambda routing: routing.router_logits.gather(1, routing.topk_experts).logsumexp(-1).square().mean(),
            says="Only the chosen experts' logits are in the sum. The softmax runs over all E of them.",
        ),
        Mistake(
            name="the exponentials overflow",
            wrong=_z(lambda z: z.exp().sum(-1).log().square().mean()),
            says="Right on paper, infinite in fp32: exp(89) is too large for it, and large logits are the case that "
            "this loss is for. `logsumexp` takes the largest logit out first.",
        ),
    ),
)


# 5.5 one step of the loss-free bias


def biased_step(scores: Tensor, selection_bias: Tensor, top_k: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (T, K), experts (T, K), and the bias (E,) for the next step.

    Source: Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", algorithm 1 and equation 3.
    """
    experts = best_k(scores.detach() + selection_bias, top_k)
    counts = torch.bincount(experts.flatten(), minlength=len(selection_bias))
    return scores.gather(-1, experts), experts, balance.update_bias(selection_bias, counts, rate)


STEP_SHOW = """scores = [[0.6, 0.4, 0.3], [0.7, 0.5, 0.1], [0.8, 0.2, 0.4], [0.6, 0.3, 0.1]]
selection_bias = [0, 0.25, 0]
top_k = 1, rate = 0.1"""


def _step_cases() -> list[Case]:
    by_hand = [[0.6, 0.4, 0.3], [0.7, 0.5, 0.1], [0.8, 0.2, 0.4], [0.6, 0.3, 0.1]]

    def drawn(n_tokens: int, n_experts: int, top_k: int, rate: float, seed: int, bias: Sequence[float]) -> tuple:
        scores = (_random(n_tokens, n_experts, seed=seed) + torch.linspace(1, -1, n_experts)).sigmoid()
        return scores.requires_grad_(), torch.tensor(bias), top_k, rate

    return [
        Case(
            name="four tokens by hand",
            args=(torch.tensor(by_hand).requires_grad_(), torch.tensor([0.0, 0.25, 0.0]), 1, 0.1),
            show=STEP_SHOW,
        ),
        Case(
            name="an expert at the mean, and one without tokens",
            args=(
                torch.tensor([[0.9, 0.8, 0.5, 0.1], [0.9, 0.2, 0.7, 0.1], [0.8, 0.7, 0.4, 0.1], [0.9, 0.7, 0.6, 0.1]])
                .repeat(2, 1)
                .requires_grad_(),
                torch.tensor([0.0, -0.25, 0.0, 0.0]),
                2,
                0.01,
            ),
            show="8 tokens, 2 of 4 experts each; the counts are 8, 4, 4 and 0\n"
            "selection_bias = [0, -0.25, 0, 0], rate = 0.01",
        ),
        Case(
            name="a mean that is no whole number",
            args=drawn(7, 5, 2, 0.001, seed=61, bias=[-0.3, 0.2, -0.1, 0.3, 0.2]),
            show="7 tokens, 2 of 5 experts each, rate = 0.001",
        ),
        Case(
            name="three of six",
            args=drawn(11, 6, 3, 0.1, seed=62, bias=[0.0, -0.2, 0.1, 0.1, 0.4, 0.2]),
            show="11 tokens, 3 of 6 experts each, rate = 0.1",
        ),
    ]


def _counts(experts: Tensor, n_experts: int) -> Tensor:
    return torch.bincount(experts.flatten(), minlength=n_experts).float()


def _short_counts(scores: Tensor, selection_bias: Tensor, top_k: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    experts = best_k(scores.detach() + selection_bias, top_k)
    n = torch.bincount(experts.flatten()).float()
    return scores.gather(-1, experts), experts, selection_bias + rate * torch.sign(n.mean() - n)


def _step(
    choosing: Callable[[Tensor, Tensor], Tensor] = lambda scores, bias: scores + bias,
    weighing: Callable[[Tensor, Tensor], Tensor] = lambda scores, bias: scores,
    load: Callable[[Tensor, Tensor, int], Tensor] = lambda scores, experts, k: _counts(experts, scores.shape[1]),
    step: Callable[[Tensor, int], Tensor] = lambda n, k: torch.sign(n.mean() - n),
    move: Callable[[Tensor, Tensor], Tensor] = lambda bias, step: bias + step,
) -> Callable[[Tensor, Tensor, int, float], tuple[Tensor, Tensor, Tensor]]:
    """The step with one of its parts done in another way; `step` is in units of the rate."""

    def wrong(scores: Tensor, selection_bias: Tensor, top_k: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        experts = best_k(choosing(scores, selection_bias).detach(), top_k)
        weights = weighing(scores, selection_bias).gather(-1, experts)
        n = load(scores, experts, top_k)
        return weights, experts, move(selection_bias, rate * step(n, top_k))

    return wrong


def _without_k(n: Tensor, k: int) -> Tensor:
    return torch.sign(n.mean() / k - n)


def _normalised(scores: Tensor, bias: Tensor, top_k: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    weights, experts, after = biased_step(scores, bias, top_k, rate)
    return weights / weights.sum(-1, keepdim=True), experts, after


def _recentred(n: Tensor, k: int) -> Tensor:
    step = torch.sign(n.mean() - n)
    return step - step.mean()


ONE_SIDE = (
    "Only one side moves. The bias of a full expert goes down and that of an expert with too little goes up, by the "
    "same step. Yours would even the load, too, for only differences between biases count; but it is another rule."
)
AT_THE_MEAN = (
    "An expert that has exactly the mean is moved. It has its even share: its step is 0, which `torch.sign` gives. A "
    "`where` with `>` has no third way."
)

BIASED_STEP = Exercise(
    id="5.5",
    title="one step of the loss-free bias",
    reference=biased_step,
    cases=_step_cases,
    mistakes=(
        Mistake(
            name="bias folded into the weight",
            wrong=_step(weighing=lambda scores, bias: scores + bias),
            says="The weights are made of score plus bias. The bias only selects: folded into the weight it turns up "
            "the volume of experts because they were empty, not because they fit. Such a model still trains, so that "
            "nobody notices. Take the weights from the bare scores.",
        ),
        Mistake(
            name="the bias does not select",
            wrong=_step(choosing=lambda scores, bias: scores),
            says="The choice is made by the bare scores: the bias is updated and never used, and the load stays as it "
            "is. Choose by score plus bias.",
        ),
        Mistake(
            name="the sign is turned",
            wrong=_step(step=lambda n, k: torch.sign(n - n.mean())),
            says="The sign is turned: the fullest expert's bias goes up, and it will be fuller still. Up where an "
            "expert got less than the mean, down where it got more.",
        ),
        Mistake(
            name="re-centred",
            wrong=_step(step=_recentred),
            says="You take the mean off the step, so that the biases keep their sum. torchtitan does so, and it "
            "changes no choice, for all biases move together. The rule asked for here is the paper's: without it.",
        ),
        Mistake(
            name="as large as the error",
            wrong=_step(step=lambda n, k: n.mean() - n),
            says="The step grows with the error, counted in tokens: with ten times the batch it is ten times as large. "
            "The rule takes the sign alone: every expert moves by the rate, or not at all.",
        ),
        Mistake(
            name="as large as the relative error",
            wrong=_step(step=lambda n, k: 1 - n / n.mean()),
            says="The step grows with the error, as a share of the mean. The paper tried such a step too, and kept the "
            "sign alone: every expert moves by the rate, or not at all.",
        ),
        Mistake(
            name="the mean without k",
            wrong=_step(step=_without_k),
            says="You compare with T / E. There are T·k choices, so the mean count is T·k / E. With a mean k times too "
            "small nearly every expert seems full.",
        ),
        Mistake(
            name="compared with a share",
            wrong=_step(step=lambda n, k: torch.sign(1 / len(n) - n)),
            says="You compare counts with 1 / E, which is a share. Every expert that has a token at all is then too "
            "full. Compare counts with the mean count, or shares with 1 / E.",
        ),
        Mistake(
            name="the load of probabilities",
            wrong=_step(load=lambda scores, experts, k: scores.detach().sum(0)),
            says="The load is made of scores. The bias is there to even out the work, and that is the number of tokens "
            "that chose an expert.",
        ),
        Mistake(
            name="the load without the bias",
            wrong=_step(load=lambda scores, experts, k: _counts(best_k(scores.detach(), k), scores.shape[1])),
            says="The counts are of a choice without the bias. It would never hear what it has done, and go on in one "
            "direction for ever. Count the choices that were made.",
        ),
        Mistake(
            name="an empty expert is passed over",
            wrong=_step(step=lambda n, k: torch.sign(n.mean() - n) * (n > 0)),
            says="Only experts that have tokens are moved. The empty one is the one that needs it most: count with "
            "`minlength`, or go through all E.",
        ),
        Mistake(
            name="the last experts are not counted",
            wrong=_short_counts,
            says="`bincount` ends at the highest id that occurs. Where nobody chose the last expert there are fewer "
            "counts than biases, and the mean is over too few: pass `minlength`.",
        ),
        Mistake(
            name="only the full ones move",
            wrong=_step(step=lambda n, k: torch.sign(n.mean() - n).clamp(max=0)),
            says=ONE_SIDE,
        ),
        Mistake(
            name="only the empty ones move",
            wrong=_step(step=lambda n, k: torch.sign(n.mean() - n).clamp(min=0)),
            says=ONE_SIDE,
        ),
        Mistake(
            name="at the mean, moved up",
            wrong=_step(step=lambda n, k: torch.where(n > n.mean(), -1.0, 1.0)),
            says=AT_THE_MEAN,
        ),
        Mistake(
            name="at the mean, moved down",
            wrong=_step(step=lambda n, k: torch.where(n < n.mean(), 1.0, -1.0)),
            says=AT_THE_MEAN,
        ),
        Mistake(
            name="the bias starts again",
            wrong=_step(move=lambda bias, step: step),
            says="The step is returned in place of the moved bias. The bias gathers what many steps have found: add to "
            "it.",
        ),
        Mistake(
            name="the bias stays",
            wrong=_step(move=lambda bias, step: bias),
            says="The bias comes back as it went in. It has to move by the rate after every step.",
        ),
        Mistake(
            name="weights divided by their sum",
            wrong=_normalised,
            says="The weights are divided by their sum. Some models do so; here a weight is the bare score of its "
            "expert.",
        ),
    ),
)


# 5.6 expert choice


def expert_choice_mask(router_scores: Tensor, capacity: int) -> Tensor:
    """(T, E) bool: whether the expert is among those that take the token, each taking its `capacity` best.

    Source: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2.
    """
    return _mask_of(best_k(router_scores.T, capacity), router_scores)


def _mask_of(tokens: Tensor, scores: Tensor) -> Tensor:
    """(T, E) of the tokens (E, C) that experts took."""
    return torch.zeros_like(scores, dtype=torch.bool).T.scatter(1, tokens, True).T


def _choice_cases() -> list[Case]:
    by_hand = [[0.75, 0.25], [0.5, 0.5], [0.875, 0.125], [0.625, 0.375]]
    tied = [[0.2, 0.3, 0.5], [0.2, 0.5, 0.3], [0.6, 0.2, 0.2], [0.2, 0.5, 0.3], [0.2, 0.3, 0.5]]
    return [
        Case(name="four tokens by hand", args=(torch.tensor(by_hand), 2)),
        Case(name="equal scores", args=(torch.tensor(tied), 2)),
        Case(name="one token each", args=(_random(6, 4, seed=70).softmax(-1), 1)),
        Case(name="as many tokens as experts", args=(_random(5, 5, seed=71).softmax(-1), 3)),
        Case(name="eleven tokens", args=(_random(11, 4, seed=72).softmax(-1), 3)),
        Case(name="every token", args=(_random(3, 4, seed=73).softmax(-1), 3)),
    ]


def _best_of_table(scores: Tensor, capacity: int) -> Tensor:
    best = best_k(scores.flatten()[None], capacity * scores.shape[1])[0]
    return torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, best, True).view(scores.shape)


def _order_as_rank(scores: Tensor, capacity: int) -> Tensor:
    return scores.argsort(dim=0, descending=True, stable=True) < capacity


def _first_come(scores: Tensor, capacity: int) -> Tensor:
    """Every token goes to its best expert, until that one is full."""
    chosen = F.one_hot(best_k(scores, 1)[:, 0], scores.shape[1])
    return chosen.bool() & (chosen.cumsum(0) <= capacity)


def _one_expert_a_token(scores: Tensor, capacity: int) -> Tensor:
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for e in range(scores.shape[1]):
        free = scores[:, e].masked_fill(mask.any(1), -1.0)
        taken = best_k(free[None], capacity)[0]
        mask[taken[free[taken] >= 0], e] = True
    return mask


def _experts_of_tokens(scores: Tensor, capacity: int) -> Tensor:
    experts = best_k(scores, min(capacity, scores.shape[1]))
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, experts, True)


EXPERT_CHOICE = Exercise(
    id="5.6",
    title="experts that choose",
    reference=expert_choice_mask,
    cases=_choice_cases,
    mistakes=(
        Mistake(
            name="the tokens choose",
            wrong=_experts_of_tokens,
            says="Every row has `capacity` experts: the tokens choose. Here every column has to have `capacity` "
            "tokens: choose along the tokens.",
        ),
        Mistake(
            name="the order is taken for ranks",
            wrong=_order_as_rank,
            says="You compare what `argsort` returns with `capacity`. Its row 0 holds the **number of the token** that "
            "is best, not the rank of token 0. The first `capacity` rows are the tokens that are taken: write True at "
            "those places, or sort the order once more to have ranks.",
        ),
        Mistake(
            name="first come, first served",
            wrong=_first_come,
            says="Each token goes to its best expert, and a full one takes no more. That is token choice with a "
            "capacity: some experts stay half empty. Here an expert takes its `capacity` best, whatever else these "
            "tokens like.",
        ),
        Mistake(
            name="one expert a token",
            wrong=_one_expert_a_token,
            says="A token that one expert took is not offered to the next. Experts do not ask each other: a token may "
            "be taken by several, or by none.",
        ),
        Mistake(
            name="the best of the whole table",
            wrong=_best_of_table,
            says="You take the best entries of the whole table. Then a loved expert gets many tokens and another few: "
            "the balance is gone. Each expert chooses in its own column.",
        ),
        Mistake(
            name="all that tie are taken",
            wrong=lambda scores, capacity: scores >= scores.sort(0, descending=True).values[capacity - 1],
            says="You take every token that reaches the score of the last one taken. Of equal scores too many get in, "
            "and the expert has more than `capacity` tokens. The earliest of them win.",
        ),
        Mistake(
            name="of equals, the last",
            wrong=lambda scores, capacity: expert_choice_mask(scores.flip(0), capacity).flip(0),
            says="Of tokens with equal scores you take the last. The rule is the earliest: a sort with `stable=True`, "
            "descending, keeps equals in their order.",
        ),
        Mistake(
            name="the worst tokens",
            wrong=lambda scores, capacity: expert_choice_mask(-scores, capacity),
            says="The experts take the tokens that score them lowest: a sort ascends unless it is told to descend.",
        ),
        Mistake(
            name="only the best token",
            wrong=lambda scores, capacity: expert_choice_mask(scores, 1),
            says="Every expert takes a single token. It has room for `capacity` of them.",
        ),
        Mistake(
            name="experts by tokens",
            wrong=lambda scores, capacity: expert_choice_mask(scores, capacity).T,
            says="The mask is turned: you return (E, T). A row is a token: turn it back with `.T`.",
        ),
        Mistake(
            name="the tokens in place of a mask",
            wrong=lambda scores, capacity: best_k(scores.T, capacity),
            says="You return which tokens each expert takes, (E, C). Asked for is a mask (T, E): True where the expert "
            "takes the token. `scatter` writes it.",
        ),
    ),
)


EXERCISES = (MAX_VIOLATION, SHARES, BALANCE_LOSS, Z_LOSS, BIASED_STEP, EXPERT_CHOICE)
