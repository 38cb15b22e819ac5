"""The exercises of notebook 02: scores to a choice, weights, the gradient, groups, the whole route, expert choice."""

from collections.abc import Callable
from dataclasses import fields, make_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab import routing
from moe_lab.config import RouterConfig
from moe_lab.course.bank import Case, Exercise, Mistake
from moe_lab.course.checking import Refused
from moe_lab.records import ExpertChoice, Routing


def _rand(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _tied(*shape: int, seed: int, levels: int = 4) -> Tensor:
    """Scores on a few levels, so that many are equal; a power of two, so that their sums are exact."""
    return torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed)) / levels


def _orders(n_rows: int, n: int, seed: int) -> Tensor:
    """(n_rows, n), in every row the numbers 0 to n - 1 in another order."""
    return _rand(n_rows, n, seed=seed).argsort(dim=-1)


# 2.1 the best k


OF_EQUALS = "right but for equal ones, of which others were taken than the first"
"""Stands for whatever a choice without a rule for ties takes: that differs between machines."""


def _best_k_cases() -> list[Case]:
    return [
        Case(name="one token by hand", args=(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), 2)),
        Case(name="equal scores", args=(torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.25, 0.25, 0.25, 0.25]]), 3)),
        Case(name="scores below zero", args=(torch.tensor([[-3.0, -1.0, 0.5, -2.0, -0.1]]), 2)),
        Case(name="scores that differ little", args=(torch.tensor([[1.0, 1.001, 1.003, 1.002]]), 2)),
        Case(name="nine tokens", args=(_rand(9, 5, seed=1), 2)),
        Case(name="all experts chosen", args=(_rand(3, 6, seed=2), 6)),
        # torch's unstable sorts leave short rows in order, so the ties need long ones
        Case(name="24 equal scores", args=(torch.full((1, 24), 0.5), 3)),
        Case(name="many equal scores", args=(_tied(7, 40, seed=3), 8)),
    ]


def _agrees(solution: Callable, reference: Callable, *args: Any) -> bool:
    """Whether an answer gives what the reference gives."""
    try:
        found = solution(*args)
    except Exception:  # it fails on sizes that it was not made for: so it does not
        return False
    return isinstance(found, Tensor) and torch.equal(found, reference(*args))


def _run_best_k(solution: Callable, case: Case) -> Any:
    """The ids; those that are right but for ties look alike, whichever of equals they took, and in long rows only.

    Long rows with ties say nothing new of an answer that already ranks distinct scores wrongly.
    """
    scores, k = case.args[0].clone(), case.args[1]
    ids = solution(*case.args)
    right, last = routing.best_k(scores, k), _lowest_by_turning(scores, k)
    if not isinstance(ids, Tensor) or ids.dtype != right.dtype or ids.shape != right.shape:
        return ids
    is_long = scores.shape[-1] >= 20
    if torch.equal(ids, last) and not is_long:
        return ids
    if is_long and not _agrees(solution, routing.best_k, _rand(2, 40, seed=4), k):
        return right
    is_set = bool((ids.sort(-1).values.diff() > 0).all()) and ids.min() >= 0 and ids.max() < scores.shape[-1]
    if not is_set or torch.equal(ids, right) or not torch.equal(scores.gather(-1, ids), scores.gather(-1, right)):
        return ids
    return OF_EQUALS if is_long else right


def _lowest_by_turning(scores: Tensor, k: int) -> Tensor:
    return scores.shape[-1] - 1 - routing.best_k(scores.flip(-1), k)


BEST_K = Exercise(
    id="2.1",
    title="the best k, with a rule for ties",
    reference=routing.best_k,
    cases=_best_k_cases,
    run=_run_best_k,
    mistakes=(
        Mistake(
            name="any of equal scores",
            wrong=lambda scores, k: (
                (scores + torch.arange(scores.shape[-1]) * 7 % 5 * 1e-6).sort(-1).indices.flip(-1)[:, :k]
            ),
            says="Distinct scores are ranked rightly, equal ones are not. `torch.topk` may return any of them. So may "
            "a sort, unless it is told to keep equals in their order; in short rows it often does so by chance. Two "
            "machines that should agree then differ, and the rule here is: of equal scores the lowest id. Which "
            "argument of torch's sorts is about equals?",
        ),
        Mistake(
            name="ties to the highest id",
            wrong=_lowest_by_turning,
            says="Of equal scores you take the highest id; the rule is the lowest. Turning an ascending order round "
            "turns the equals round as well.",
        ),
        Mistake(
            name="the best comes last",
            wrong=lambda scores, k: routing.best_k(scores, k).flip(-1),
            says="The chosen set is right, but its best expert stands last. The first column is the first choice: "
            "capacity rules serve it before any second choice (notebook 04).",
        ),
        Mistake(
            name="the end of an ascending order",
            wrong=lambda scores, k: scores.sort(dim=-1, stable=True).indices[..., -k:],
            says="You sort upwards and keep the end. Then the best expert stands last, and of equals the highest ids "
            "win. Sort downwards, and keep the beginning.",
        ),
        Mistake(
            name="ids in order",
            wrong=lambda scores, k: routing.best_k(scores, k).sort(dim=-1).values,
            says="The chosen set is right, but you return its ids in rising order. The order carries information: "
            "the largest score comes first.",
        ),
        Mistake(
            name="the smallest scores",
            wrong=lambda scores, k: scores.sort(dim=-1, stable=True).indices[..., :k],
            says="You chose the smallest scores. A sort goes upwards unless told otherwise.",
        ),
        Mistake(
            name="the sign is lost",
            wrong=lambda scores, k: routing.best_k(scores.abs(), k),
            says="You compared absolute values, so that -3 beats 0.5. A score far below zero says: not this expert.",
        ),
        Mistake(
            name="rounded before comparing",
            wrong=lambda scores, k: routing.best_k(scores.bfloat16().float(), k),
            says="You round the scores to bf16 before comparing. It has 8 significant bits: 1.001, 1.002 and 1.003 "
            "all become 1, and the choice falls to the ids. Compare in fp32.",
        ),
        Mistake(
            name="tokens in place of experts",
            wrong=lambda scores, k: routing.best_k(scores.T, k).T,
            says="You chose along the wrong axis: for each expert the best tokens. Here each token, a row, chooses "
            "among the columns. Experts that choose tokens are a design of their own, at the end of the notebook.",
        ),
        Mistake(
            name="one set for all tokens",
            wrong=lambda scores, k: routing.best_k(scores.mean(0, keepdim=True), k).repeat(len(scores), 1),
            says="All tokens get the same experts. Every row of scores makes a choice of its own.",
        ),
        Mistake(
            name="scores in place of ids",
            wrong=lambda scores, k: scores.gather(-1, routing.best_k(scores, k)),
            says="You returned the largest scores. Their ids were asked for: which experts, not how good.",
        ),
        Mistake(
            name="a mask in place of ids",
            wrong=lambda scores, k: torch.zeros_like(scores).scatter(-1, routing.best_k(scores, k), 1.0),
            says="You returned ones and zeros for all experts. Return the ids of the chosen, k in each row.",
        ),
    ),
)


# 2.2 weights


def _weigh_cases() -> list[Case]:
    halves = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    return [
        Case(name="one token by hand", args=(halves, torch.tensor([[0, 2]]))),
        Case(name="not normalised", args=(halves, torch.tensor([[0, 2]]), False)),
        Case(name="normalised and scaled", args=(halves, torch.tensor([[0, 2]]), True, 2.5)),
        Case(name="scaled only", args=(halves, torch.tensor([[1, 0]]), False, 16.0)),
        Case(name="scores that do not sum to one", args=(_rand(3, 5, seed=1), _orders(3, 5, seed=2)[:, :2])),
        Case(name="one expert each", args=(_rand(2, 6, seed=3), _orders(2, 6, seed=4)[:, :1])),
        Case(name="more tokens than experts", args=(_rand(5, 4, seed=7), _orders(5, 4, seed=8)[:, :3])),
        Case(name="seven tokens", args=(_rand(7, 11, seed=5), _orders(7, 11, seed=6)[:, :4], True, 2.5)),
    ]


def _run_weigh(solution: Callable, case: Case) -> Any:
    """The weights of scores that carry a gradient, as a router's do."""
    case.args[0].requires_grad_()
    return solution(*case.args)


def _weighed(
    fraction: Callable[[Tensor, Tensor], Tensor],
    scale: Callable[[Tensor, float], Tensor] = lambda w, factor: w * factor,
) -> Callable[..., Tensor]:
    """`weigh` with another way to normalise; `fraction(chosen, scores)` is what becomes of the chosen scores."""

    def wrong(scores: Tensor, experts: Tensor, normalise: bool = True, scaling_factor: float = 1.0) -> Tensor:
        chosen = scores.gather(-1, experts)
        return scale(fraction(chosen, scores) if normalise else chosen, scaling_factor)

    return wrong


def _share(chosen: Tensor, scores: Tensor) -> Tensor:
    return chosen / chosen.sum(-1, keepdim=True)


def _scaled_first(scores: Tensor, experts: Tensor, normalise: bool = True, scaling_factor: float = 1.0) -> Tensor:
    chosen = scores.gather(-1, experts) * scaling_factor
    return chosen / chosen.sum(-1, keepdim=True) if normalise else chosen


def _scaled_if_normalised(
    scores: Tensor, experts: Tensor, normalise: bool = True, scaling_factor: float = 1.0
) -> Tensor:
    return routing.weigh(scores, experts, normalise, scaling_factor if normalise else 1.0)


def _rows_of_tokens(scores: Tensor, experts: Tensor, normalise: bool = True, scaling_factor: float = 1.0) -> Tensor:
    chosen = scores[experts]  # (T, K, E), where the ids are no larger than T
    return scaling_factor * (chosen / chosen.sum(-1, keepdim=True) if normalise else chosen)


def _largest(scores: Tensor, experts: Tensor, normalise: bool = True, scaling_factor: float = 1.0) -> Tensor:
    return routing.weigh(scores, scores.topk(experts.shape[-1], dim=-1).indices, normalise, scaling_factor)


def _for_all(scores: Tensor, experts: Tensor, normalise: bool = True, scaling_factor: float = 1.0) -> Tensor:
    weights = routing.weigh(scores, experts, normalise, scaling_factor)
    return torch.zeros_like(scores).scatter(-1, experts, weights)


WEIGH = Exercise(
    id="2.2",
    title="weights for the chosen",
    reference=routing.weigh,
    cases=_weigh_cases,
    run=_run_weigh,
    mistakes=(
        Mistake(
            name="scaled before normalising",
            wrong=_scaled_first,
            says="You multiply by the factor and then divide by the sum, which contains the factor, too: it cancels. "
            "The scaling factor comes last, so that DeepSeek-V3's weights sum to 2.5.",
        ),
        Mistake(
            name="scaled only if normalised",
            wrong=_scaled_if_normalised,
            says="The factor is applied only where `normalise` is true. The two are independent: DeepSeek-V2 does "
            "not normalise, and multiplies its bare scores by 16.",
        ),
        Mistake(
            name="scaling factor forgotten",
            wrong=_weighed(_share, lambda weights, factor: weights),
            says="The scaling factor is not used. Without it everything the experts write is too small, and a "
            "checkpoint trained with it talks nonsense.",
        ),
        Mistake(
            name="weights not normalised",
            wrong=_weighed(lambda chosen, scores: chosen),
            says="The weights should sum to one where `normalise` is true; yours are the bare scores. What the "
            "passed-over experts held is lost, and the layer's output shrinks. Torchtitan's DeepSeek-V3 shipped with "
            "this, and fine-tuning showed it as a large gradient norm (pytorch/torchtitan#1448).",
        ),
        Mistake(
            name="always normalised",
            wrong=lambda scores, experts, normalise=True, scaling_factor=1.0: routing.weigh(
                scores, experts, True, scaling_factor
            ),
            says="You divide by the sum even where `normalise` is false. OLMoE and Switch keep the bare scores: "
            "there the weights also tell how much of the whole probability the chosen hold.",
        ),
        Mistake(
            name="normalised before the choice",
            wrong=_weighed(lambda chosen, scores: chosen / scores.sum(-1, keepdim=True)),
            says="You divide by the sum over all experts. The sum runs over the chosen ones only. With softmax your "
            "sum is 1 and nothing would happen at all; with sigmoid it is larger than it should be.",
        ),
        Mistake(
            name="a row in place of a column",
            wrong=_weighed(lambda chosen, scores: chosen / chosen.sum(-1)),
            says="The sums are right, but of shape (T,): torch lays them along the last axis, as a row, and divides "
            "by another token's sum where it does not fail. Keep them as a column: `keepdim=True`.",
        ),
        Mistake(
            name="normalised over the tokens",
            wrong=_weighed(lambda chosen, scores: chosen / chosen.sum(0, keepdim=True)),
            says="You sum over the tokens, so that a token's weights depend on what else is in the batch. Each row "
            "is divided by its own sum: the last axis.",
        ),
        Mistake(
            name="normalised over everything",
            wrong=_weighed(lambda chosen, scores: chosen / chosen.sum()),
            says="You divide by the sum of all tokens together. With one token that is right, with more every weight "
            "shrinks. Each row is divided by its own sum, kept as a column: `keepdim=True`.",
        ),
        Mistake(
            name="softmax taken twice",
            wrong=_weighed(lambda chosen, scores: chosen.softmax(-1)),
            says="You take a softmax of the chosen scores. They are scores already: a second softmax flattens them, "
            "and with small scores all weights become nearly equal. A softmax of the chosen LOGITS would be right; of "
            "scores, divide by the sum.",
        ),
        Mistake(
            name="divided by the largest",
            wrong=_weighed(lambda chosen, scores: chosen / chosen.amax(-1, keepdim=True)),
            says="You divide by the largest chosen score. The weights should sum to one: divide by their sum.",
        ),
        Mistake(
            name="the largest in place of the chosen",
            wrong=_largest,
            says="You took the largest scores of each row, whatever `experts` says. Often they are the same. But "
            "groups or a bias may choose others, and then outputs and weights belong to different experts.",
        ),
        Mistake(
            name="rows in place of columns",
            wrong=_rows_of_tokens,
            says="`scores[experts]` reads the first axis: the ids are taken for tokens. That gives whole rows, (T, K, "
            "E), or fails where an id is larger than the number of tokens. Experts are columns, and every token has "
            "its own: read along the last axis.",
        ),
        Mistake(
            name="a column for every expert",
            wrong=_for_all,
            says="You returned a weight, or a zero, for all E experts. The result has the shape of `experts`: (T, "
            "K), the weight of each choice at the place of the choice.",
        ),
        Mistake(
            name="no gradient",
            wrong=lambda *args: routing.weigh(*args).detach(),
            says="All values are right, but no gradient gets back to the scores. The weights are the only way by which "
            "a router learns: leave out `.detach()`, `.item()`, `.tolist()` and `no_grad`.",
        ),
    ),
)


# 2.3 the gradient that reaches the router


def logits_gradient(weights: Tensor, experts: Tensor, d_weights: Tensor, n_experts: int) -> Tensor:
    """From the gradient of the weights, (T, K), that of the logits, (T, E), where weights are a softmax of the chosen.

    `dz_j = w_j (g_j - sum_i w_i g_i)` for a chosen expert j, and 0 for the others.
    """
    better_than_mean = d_weights - (weights * d_weights).sum(-1, keepdim=True)
    gradient = weights.new_zeros(len(weights), n_experts)
    return gradient.scatter(-1, experts, weights * better_than_mean)


def _gradient_cases() -> list[Case]:
    def drawn(n_tokens: int, k: int, n_experts: int, seed: int) -> tuple:
        weights = _rand(n_tokens, k, seed=seed) + 0.1
        experts = _orders(n_tokens, n_experts, seed=seed + 1)[:, :k]
        return weights / weights.sum(-1, keepdim=True), experts, _rand(n_tokens, k, seed=seed + 2) - 0.5, n_experts

    by_hand = (torch.tensor([[0.75, 0.25]]), torch.tensor([[2, 0]]), torch.tensor([[1.0, -1.0]]), 4)
    alone = (torch.ones(2, 1), torch.tensor([[3], [1]]), torch.tensor([[0.5], [-2.0]]), 5)
    equal = (torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[1, 4, 0]]), torch.tensor([[2.0, 2.0, 2.0]]), 6)
    return [
        Case(name="one token by hand", args=by_hand),
        Case(name="one expert each: nothing to compare with", args=alone),
        Case(name="three equally good experts", args=equal),
        Case(name="two tokens", args=drawn(2, 3, 7, seed=1)),
        Case(name="all experts chosen", args=drawn(3, 4, 4, seed=4)),
        Case(name="seven tokens", args=drawn(7, 2, 9, seed=7)),
    ]


def _placed(slots: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The gradient made of another formula, `slots(weights, d_weights)`, put in the right places."""

    def wrong(weights: Tensor, experts: Tensor, d_weights: Tensor, n_experts: int) -> Tensor:
        return weights.new_zeros(len(weights), n_experts).scatter(-1, experts, slots(weights, d_weights))

    return wrong


def _mean(weights: Tensor, d_weights: Tensor) -> Tensor:
    return (weights * d_weights).sum(-1, keepdim=True)


def _all_pushed(weights: Tensor, experts: Tensor, d_weights: Tensor, n_experts: int) -> Tensor:
    everywhere = weights.new_zeros(len(weights), n_experts).scatter(-1, experts, d_weights)
    return everywhere - _mean(weights, d_weights)


def _first_columns(weights: Tensor, experts: Tensor, d_weights: Tensor, n_experts: int) -> Tensor:
    slots = weights * (d_weights - _mean(weights, d_weights))
    return F.pad(slots, (0, n_experts - slots.shape[-1]))


def _shared_columns(weights: Tensor, experts: Tensor, d_weights: Tensor, n_experts: int) -> Tensor:
    gradient = weights.new_zeros(len(weights), n_experts)
    for ids, values in zip(experts, weights * (d_weights - _mean(weights, d_weights)), strict=True):
        gradient[:, ids] = values  # in every row, not only in the token's own
    return gradient


LOGITS_GRADIENT = Exercise(
    id="2.3",
    title="the gradient that reaches the router",
    reference=logits_gradient,
    cases=_gradient_cases,
    mistakes=(
        Mistake(
            name="the scatter's result is dropped",
            wrong=lambda weights, experts, d_weights, n_experts: weights.new_zeros(len(weights), n_experts),
            says="All zeros came back. `scatter` returns a new tensor and leaves the old one as it was: return what "
            "it gives you. With a trailing `_` it would write into the old one.",
        ),
        Mistake(
            name="a row in place of a column",
            wrong=_placed(lambda w, g: w * (g - (w * g).sum(-1))),
            says="The weighted mean is right, but of shape (T,): torch lays it along the last axis, as a row, and "
            "takes another token's mean where it does not fail. Keep it as a column: `keepdim=True`.",
        ),
        Mistake(
            name="every row gets every token's numbers",
            wrong=_shared_columns,
            says="`gradient[:, experts] = …` writes into all rows: each token also gets the numbers of the others. "
            "Row t has its own columns, `experts[t]`. That is what `scatter` along the last axis does.",
        ),
        Mistake(
            name="nothing is compared",
            wrong=_placed(lambda w, g: w * g),
            says="You multiply weight and gradient, and that is all. The weights sum to one: if one rises, the "
            "others fall. So an expert is judged against the mean of the chosen, and a lone expert gets no gradient "
            "at all.",
        ),
        Mistake(
            name="a mean without the weights",
            wrong=_placed(lambda w, g: w * (g - g.mean(-1, keepdim=True))),
            says="You compare with the plain mean of the gradients. The formula has the weighted mean: an expert "
            "with a large weight counts more in it.",
        ),
        Mistake(
            name="each weight by itself",
            wrong=_placed(lambda w, g: w * (1 - w) * g),
            says="w (1 - w) g is how a weight depends on its own logit. But every chosen logit moves every chosen "
            "weight: the other gradients belong into the sum.",
        ),
        Mistake(
            name="the factor w in front is missing",
            wrong=_placed(lambda w, g: g - _mean(w, g)),
            says="The comparison is right, the factor w_j in front of it is missing. An expert that hardly counts "
            "changes the output little, and its logit gets little.",
        ),
        Mistake(
            name="the passed-over are pushed",
            wrong=_all_pushed,
            says="The experts that were not chosen get a gradient. Their weight is zero, and stays zero if their "
            "logit moves a little: the formula's factor w_j makes their gradient 0.",
        ),
        Mistake(
            name="the sign is turned",
            wrong=_placed(lambda w, g: -w * (g - _mean(w, g))),
            says="The sign is turned. This is the gradient of the loss; the optimizer will subtract it.",
        ),
        Mistake(
            name="slots in place of experts",
            wrong=_first_columns,
            says="The numbers are right and stand in the first columns. Slot 0 is a token's first choice, not expert "
            "0: put each number into the column of its expert.",
        ),
        Mistake(
            name="one number a choice",
            wrong=lambda weights, experts, d_weights, n_experts: weights * (d_weights - _mean(weights, d_weights)),
            says="The numbers are right, one for each choice, (T, K). The logits are (T, E): put each number into "
            "the column of its expert, zeros elsewhere.",
        ),
        Mistake(
            name="the mean of all tokens",
            wrong=_placed(lambda w, g: w * (g - (w * g).sum())),
            says="The weighted sum runs over all tokens. Each token compares its own experts: sum over the last "
            "axis, `keepdim=True`.",
        ),
        Mistake(
            name="summed over the tokens",
            wrong=lambda *args: logits_gradient(*args).sum(0),
            says="You summed over the tokens. Each token has logits of its own, so the result is (T, E); the sum "
            "comes later, in the gradient of the router's matrix.",
        ),
    ),
)


# 2.4 groups


def _group_cases() -> list[Case]:
    by_hand = torch.tensor([[0.9, 0.1, 0.5, 0.6, 0.2, 0.3]])
    # four groups of three, so that groups and their size cannot be exchanged unseen; 24 numbers can be shown
    scores = _orders(2, 12, seed=1) / 12
    below_zero = _orders(2, 12, seed=2) / 12 - 1.5
    return [
        Case(name="worth its best score", args=(by_hand, 3, 1)),
        Case(name="worth its two best scores", args=(by_hand, 3, 1, "top2_sum")),
        Case(name="two of four groups", args=(scores, 4, 2)),
        Case(name="two of four groups, two best scores", args=(scores, 4, 2, "top2_sum")),
        Case(name="scores below zero", args=(below_zero, 4, 3, "top2_sum")),
        Case(name="all groups kept", args=(scores, 3, 3)),
        Case(name="five tokens, twenty experts", args=(_rand(5, 20, seed=3), 4, 2, "top2_sum")),
        Case(name="24 equal groups", args=(torch.full((1, 48), 0.5), 24, 3)),
    ]


def _run_groups(solution: Callable, case: Case) -> Any:
    """The limited scores; where all groups are equal and others than the first are kept, it matters not which."""
    right = routing.limit_groups(*case.args)
    limited = solution(*case.args)
    if case.args[1] < 20 or not isinstance(limited, Tensor) or limited.shape != right.shape:
        return limited
    groups = limited.detach().unflatten(-1, (case.args[1], -1))
    kept = (groups == 0.5).all(-1)
    as_many = ((groups == -torch.inf).all(-1) | kept).all() and kept.sum() == case.args[2]
    if not as_many or torch.equal(limited, right):
        return limited
    ranks_others = _agrees(solution, routing.limit_groups, _rand(2, 48, seed=4), *case.args[1:])
    return OF_EQUALS if ranks_others else right


def _limited(
    worth: Callable[[Tensor, str], Tensor] | None = None,
    choose: Callable[[Tensor, int], Tensor] = routing.best_k,
    fill: float = -torch.inf,
    inverted: bool = False,
) -> Callable[..., Tensor]:
    """`limit_groups` with one part done in another way; `worth(grouped, group_score)` is (T, groups)."""

    def wrong(scores: Tensor, n_groups: int, groups_kept: int, group_score: str = "max") -> Tensor:
        grouped = scores.unflatten(-1, (n_groups, -1))
        best = (worth or _worth)(grouped, group_score)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, choose(best, groups_kept), True)
        return grouped.masked_fill((kept if inverted else ~kept)[..., None], fill).flatten(-2)

    return wrong


def _worth(grouped: Tensor, group_score: str) -> Tensor:
    return grouped.topk(1 if group_score == "max" else 2, dim=-1).values.sum(-1)


def _interleaved(scores: Tensor, n_groups: int, groups_kept: int, group_score: str = "max") -> Tensor:
    turned = scores.unflatten(-1, (-1, n_groups)).transpose(-1, -2).flatten(-2)
    limited = routing.limit_groups(turned, n_groups, groups_kept, group_score)
    return limited.unflatten(-1, (n_groups, -1)).transpose(-1, -2).flatten(-2)


def _size_taken(scores: Tensor, n_groups: int, groups_kept: int, group_score: str = "max") -> Tensor:
    return routing.limit_groups(scores, scores.shape[-1] // n_groups, groups_kept, group_score)


LIMIT_GROUPS = Exercise(
    id="2.4",
    title="a few groups only (optional)",
    reference=routing.limit_groups,
    cases=_group_cases,
    run=_run_groups,
    mistakes=(
        Mistake(
            name="nothing is masked",
            wrong=lambda scores, *rule: scores.clone(),
            says="The scores come back as they were. `masked_fill` returns a new tensor: is its result kept? And is "
            "the mask true where something is to be filled?",
        ),
        Mistake(
            name="everything is masked",
            wrong=_limited(choose=lambda best, kept: best.new_zeros(len(best), 0, dtype=torch.int64)),
            says="All experts get -inf: no group is left. A mask of the kept groups starts as all False; `scatter` "
            "returns a new one and leaves the old one as it was. Is its result kept?",
        ),
        Mistake(
            name="any of equal groups",
            wrong=_limited(choose=lambda best, kept: best.sort(dim=-1, stable=True).indices[..., -kept:]),
            says="Distinct groups are ranked rightly, equal ones are not. Of equal groups the first are kept, as of "
            "equal scores the lowest ids: your `best_k` does it, `torch.topk` or the end of a rising order do not.",
        ),
        Mistake(
            name="the number kept is dropped",
            wrong=_limited(choose=lambda best, kept: routing.best_k(best, best.shape[-1] - kept)),
            says="You drop `groups_kept` groups and keep the rest. It is how many are kept.",
        ),
        Mistake(
            name="interleaved groups",
            wrong=_interleaved,
            says="Your groups take every n-th expert: 0, 3, … belong together. Groups are contiguous, experts 0 and "
            "1 before 2 and 3, because a machine holds a stretch of ids. Split the last axis into (n_groups, size), "
            "in this order.",
        ),
        Mistake(
            name="the number taken for the size",
            wrong=_size_taken,
            says="You made groups OF n_groups experts. n_groups is how many groups there are; each holds E / "
            "n_groups experts. Four groups of four hide this, four groups of three do not.",
        ),
        Mistake(
            name="masked with 0",
            wrong=_limited(fill=0.0),
            says="You set the other experts to 0. That works while all scores are positive. With a selection bias "
            "they can be negative, and then 0 is the best score there is: mask with -inf.",
        ),
        Mistake(
            name="always the best score",
            wrong=_limited(lambda grouped, group_score: grouped.amax(-1)),
            says="Your groups are always worth their best score, as in DeepSeek-V2. With `top2_sum` (DeepSeek-V3) it "
            "is the sum of the two best: one strong expert with weak neighbours is no reason to go there.",
        ),
        Mistake(
            name="always the two best",
            wrong=_limited(lambda grouped, group_score: grouped.topk(2, dim=-1).values.sum(-1)),
            says="Your groups are always worth the sum of their two best scores. With `max`, the default, it is the "
            "best one alone.",
        ),
        Mistake(
            name="the whole group counts",
            wrong=_limited(lambda grouped, group_score: grouped.amax(-1) if group_score == "max" else grouped.sum(-1)),
            says="With `top2_sum` you sum all scores of a group. Only the two best count: the others will not be "
            "chosen and should not help their group.",
        ),
        Mistake(
            name="the mean of the group",
            wrong=_limited(lambda grouped, group_score: grouped.mean(-1)),
            says="Your groups are worth the mean of their scores. Only the best count, one or two of them: the "
            "others will not be chosen and should not speak for or against their group.",
        ),
        Mistake(
            name="the worst groups kept",
            wrong=_limited(choose=lambda best, kept: routing.best_k(-best, kept)),
            says="You keep the groups that are worth least.",
        ),
        Mistake(
            name="the kept are masked",
            wrong=_limited(inverted=True),
            says="Your mask is turned round: the best groups get -inf, and the others survive.",
        ),
        Mistake(
            name="one choice for all tokens",
            wrong=_limited(lambda grouped, group_score: _worth(grouped, group_score).mean(0).expand(len(grouped), -1)),
            says="All tokens keep the same groups. Each token, a row, keeps its own best ones.",
        ),
    ),
)


# 2.5 the whole route


def _show(config: RouterConfig) -> str:
    fields = (
        "top_k",
        "score",
        "normalise",
        "scaling_factor",
        "n_groups",
        "groups_kept",
        "group_score",
        "selection_bias",
    )
    return ", ".join(f"{name} {getattr(config, name)!r}" for name in fields)


def _route_cases() -> list[Case]:
    def case(name: str, logits: Tensor, bias: Tensor | None = None, **rule: Any) -> Case:
        config = RouterConfig(d_model=2, n_experts=logits.shape[-1], **rule)
        told = [f"router_logits = {_listed(logits)}", f"config: {_show(config)}"]
        told.append(f"selection_bias = {None if bias is None else _listed(bias)}")
        return Case(name=name, args=(logits, config, bias), show="\n".join(told))

    steps = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    twelve = (_orders(2, 12, seed=1) - 6) / 4
    few = torch.tensor([-0.5, 0.0, 0.1, 0.6])
    bias = torch.tensor([0.2, -0.3, 0.4, -0.1, 0.3, -0.4, 0.1, 0.0, -0.2, 0.5, -0.5, 0.6])
    deepseek = {"top_k": 3, "score": "sigmoid", "scaling_factor": 2.5, "group_score": "top2_sum"}
    close = torch.tensor([[1.0, 1.0078125, 1.015625, 0.5, 0.25]], dtype=torch.bfloat16)
    return [
        case("Mixtral's rule", steps, top_k=2),
        case("Switch's rule", steps, top_k=1, normalise=False),
        case("four equal logits", torch.zeros(1, 4), top_k=2),
        case("sigmoid, not normalised", steps, top_k=2, score="sigmoid", normalise=False),
        case("sigmoid, normalised and scaled", steps, top_k=2, score="sigmoid", scaling_factor=2.5),
        case("a bias that changes the choice", steps, few, top_k=2, score="sigmoid", selection_bias=True),
        case("a bias, whatever the config says of one", steps, few, top_k=2, normalise=False),
        case(
            "groups, as in DeepSeek-V2",
            twelve,
            top_k=3,
            normalise=False,
            scaling_factor=16.0,
            n_groups=4,
            groups_kept=2,
        ),
        case("groups and bias, as in DeepSeek-V3", twelve, bias, n_groups=4, groups_kept=2, **deepseek),
        case("biased scores below zero", twelve, bias - 1.5, n_groups=4, groups_kept=1, **deepseek),
        case("logits in bf16", close, top_k=2),
        case("seven tokens", 4 * _rand(7, 9, seed=2) - 2, top_k=4, normalise=False),
    ]


def _listed(values: Tensor) -> str:
    rounded = [[round(v, 4) for v in row] for row in values.float().view(-1, values.shape[-1]).tolist()]
    text = str(rounded if values.ndim > 1 else rounded[0])
    return text if values.dtype == torch.float32 else f"{text} in {str(values.dtype).removeprefix('torch.')}"


NONE_ADDED = (
    "`selection_bias` is None here, and your code computes with it. Not every router has a bias: add it only where it "
    "is not None."
)
IN_PLACE = (
    "The scores were changed in place. `chosen_by = scores` is a second name for the same tensor, no copy, so `+=` on "
    "one changes both: the weights would hold the bias, and autograd has lost what it had kept. `+` makes a new tensor."
)
MASKED = (
    "Your `router_scores` hold -inf: you kept the masked scores under the name of the scores. What you choose by and "
    "what you weigh with are two things. The groups, too, only help to choose."
)


_PARTS = [field.name for field in fields(Routing)]
_WITH_GRADIENT = make_dataclass("Routing", [*_PARTS, "gradient_of_the_logits"])


def _routing_and_gradient(routing: Routing, gradient: Tensor | None) -> Any:
    """A record like `Routing`, with one part more."""
    return _WITH_GRADIENT(*(getattr(routing, part) for part in _PARTS), gradient)


def _run_route(solution: Callable, case: Case) -> Any:
    """The routing, and the gradient that the logits get where the first choice counts once, the second twice …"""
    logits = case.args[0].requires_grad_()
    as_they_came = logits.detach().clone()
    try:
        result = solution(*case.args, **case.kwargs)
    except TypeError as error:
        if case.args[2] is None and "NoneType" in str(error) and "Tensor" in str(error):
            raise Refused(NONE_ADDED) from error
        raise
    weights = getattr(result, "topk_weights", None)
    if not isinstance(result, Routing) or not isinstance(weights, Tensor):
        return result
    if isinstance(result.router_scores, Tensor) and bool((result.router_scores == -torch.inf).any()):
        raise Refused(MASKED)
    if result.router_logits is logits:  # else a changed input would be told as a wrong result
        result = replace(result, router_logits=as_they_came)
    gradient = None
    if weights.requires_grad:
        marks = torch.arange(1, weights.shape[-1] + 1) if weights.ndim else 1
        try:
            (gradient,) = torch.autograd.grad((weights * marks).sum(), logits, allow_unused=True)
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                raise Refused(IN_PLACE) from error
            raise
        # what rounding leaves in place of a zero is no news; + 0.0: there is no -0
        gradient = None if gradient is None else gradient.float().round(decimals=6) + 0.0
    return _routing_and_gradient(result, gradient)


def _routed(
    scores_of: Callable[[Tensor, RouterConfig], Tensor] = lambda logits, config: routing.score(
        logits.float(), config.score
    ),
    choosing_of: Callable[[Tensor, RouterConfig, Tensor], Tensor] | None = None,
    weights_of: Callable[[Tensor, Tensor, RouterConfig, Tensor], Tensor] | None = None,
    told: Callable[[Tensor, Tensor], Tensor] = lambda scores, bias: scores,
) -> Callable[..., Routing]:
    """`route` with some of its steps done in another way."""

    def wrong(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
        bias = torch.zeros(config.n_experts) if selection_bias is None else selection_bias
        scores = scores_of(router_logits, config)
        choosing = (choosing_of or _choosing)(scores.detach(), config, bias)
        experts = routing.best_k(choosing, config.top_k)
        weigh = weights_of or (lambda s, e, c, b: routing.weigh(s, e, c.normalise, c.scaling_factor))
        weights = weigh(scores, experts, config, bias)
        return Routing(router_logits, told(scores, bias), weights, experts)

    return wrong


def _choosing(scores: Tensor, config: RouterConfig, bias: Tensor) -> Tensor:
    return _grouped(scores + bias, config)


def _grouped(scores: Tensor, config: RouterConfig, fill: float = -torch.inf, **change: Any) -> Tensor:
    if config.n_groups == 1:
        return scores
    rule = {"group_score": config.group_score} | change
    limited = routing.limit_groups(scores, config.n_groups, config.groups_kept, **rule)
    return limited.masked_fill(limited == -torch.inf, fill)


def _any_of_equals(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
    scores = routing.score(router_logits.float(), config.score)
    bias = torch.zeros(config.n_experts) if selection_bias is None else selection_bias
    experts = _choosing(scores.detach(), config, bias).topk(config.top_k, dim=-1).indices
    weights = routing.weigh(scores, experts, config.normalise, config.scaling_factor)
    return Routing(router_logits, scores, weights, experts)


def _bias_on_logits(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
    scores = routing.score(router_logits.float(), config.score)
    biased = router_logits.detach().float() + (0 if selection_bias is None else selection_bias)
    experts = routing.best_k(_grouped(routing.score(biased, config.score), config), config.top_k)
    weights = routing.weigh(scores, experts, config.normalise, config.scaling_factor)
    return Routing(router_logits, scores, weights, experts)


def _one_variable(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
    scores = routing.score(router_logits.float(), config.score)
    scores = _grouped(scores if selection_bias is None else scores + selection_bias, config)
    experts = routing.best_k(scores.detach(), config.top_k)
    weights = routing.weigh(scores, experts, config.normalise, config.scaling_factor)
    return Routing(router_logits, scores, weights, experts)


def _none_added(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
    if selection_bias is None:
        raise Refused(NONE_ADDED)
    return routing.route(router_logits, config, selection_bias)


def _in_place(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
    if selection_bias is not None:
        raise Refused(IN_PLACE)
    return routing.route(router_logits, config)


def _masked(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
    if config.n_groups > 1:
        raise Refused(MASKED)
    return routing.route(router_logits, config, selection_bias)


def _groups_exchanged(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
    right = routing.route(router_logits, config, selection_bias)
    if config.n_groups > 1:
        routing.limit_groups(right.router_scores.detach(), config.groups_kept, config.n_groups, config.group_score)
    return right


def _asks_the_config(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
    return routing.route(router_logits, config, selection_bias if config.selection_bias else None)


def _weights_and_experts_exchanged(*args: Any) -> Routing:
    right = routing.route(*args)
    return replace(right, topk_weights=right.topk_experts, topk_experts=right.topk_weights)


def _detached(router_logits: Tensor, config: RouterConfig, selection_bias: Tensor | None = None) -> Routing:
    right = routing.route(router_logits, config, selection_bias)
    return replace(right, topk_weights=right.topk_weights.detach())


ROUTE = Exercise(
    id="2.5",
    title="the whole route",
    reference=routing.route,
    cases=_route_cases,
    run=_run_route,
    mistakes=(
        Mistake(name="None is added", wrong=_none_added, says=NONE_ADDED),
        Mistake(name="the scores are changed in place", wrong=_in_place, says=IN_PLACE),
        Mistake(
            name="weights and experts exchanged",
            wrong=_weights_and_experts_exchanged,
            says="The parts of your `Routing` stand in another order: weights come before experts. Named arguments "
            "(`topk_weights=…`) cannot be mixed up.",
        ),
        Mistake(
            name="the config is asked in place of the argument",
            wrong=_asks_the_config,
            says="You ask `config.selection_bias`. It says whether a `Router` keeps a bias of its own; here the "
            "argument counts: if it is not None, it is added.",
        ),
        Mistake(
            name="one variable for choosing and weighing",
            wrong=_one_variable,
            says="You change the scores themselves, by bias or groups, and then weigh with what is left. What you "
            "choose by and what you weigh with are two things: keep the scores as they were, and give the other a "
            "name of its own. The bias decides who is chosen, never how much they count.",
        ),
        Mistake(name="masked scores returned", wrong=_masked, says=MASKED),
        Mistake(
            name="the bias stays in the scores",
            wrong=_routed(
                weights_of=lambda s, e, c, b: routing.weigh(s + b, e, c.normalise, c.scaling_factor),
                told=lambda scores, bias: scores + bias,
            ),
            says="You add the bias to the scores for good: they are returned with it, and weigh with it. It decides "
            "who is chosen and must not say how much they count: an expert that was merely short of work would speak "
            "louder.",
        ),
        Mistake(
            name="bias folded into the weights",
            wrong=_routed(
                weights_of=lambda s, e, c, b: routing.weigh(s + b, e, c.normalise, c.scaling_factor),
            ),
            says="The bias is in the weights, too. It decides who is chosen and must not say how much they count: an "
            "expert that was merely short of work would speak louder. Weigh with the scores as they were. Such a "
            "model still trains, which is why nobody notices.",
        ),
        Mistake(
            name="the bias is ignored",
            wrong=_routed(choosing_of=lambda s, c, b: _grouped(s, c)),
            says="The selection bias is not used. Add it to the scores, for choosing only.",
        ),
        Mistake(
            name="bias on the logits",
            wrong=_bias_on_logits,
            says="You add the bias to the logits, before the score function. It belongs on the scores: 0.1 then "
            "means the same for every token, wherever its logits lie.",
        ),
        Mistake(
            name="groups limited before the bias",
            wrong=_routed(choosing_of=lambda s, c, b: _grouped(s, c) + b),
            says="You limit the groups first and add the bias afterwards. The groups, too, are chosen by biased "
            "scores: bias first, then groups, then the best k.",
        ),
        Mistake(
            name="the groups are ignored",
            wrong=_routed(choosing_of=lambda s, c, b: s + b),
            says="All experts can be chosen, whatever the groups. Where `config.n_groups` is above 1, `limit_groups` "
            "comes between bias and choice. Its arguments are how many groups there are, then how many are kept: the "
            "other way round it keeps them all.",
        ),
        Mistake(
            name="groups and groups kept exchanged",
            wrong=_groups_exchanged,
            says="`limit_groups` cannot keep more groups than there are. Its arguments are how many groups there are, "
            "then how many are kept.",
        ),
        Mistake(
            name="the rule for groups is not passed on",
            wrong=_routed(choosing_of=lambda s, c, b: _grouped(s + b, c, group_score="max")),
            says="Your groups are always worth their best score: `config.group_score` is not passed on.",
        ),
        Mistake(
            name="masked with 0",
            wrong=_routed(choosing_of=lambda s, c, b: _grouped(s + b, c, fill=0.0)),
            says="The experts outside of the kept groups have score 0, and biased scores can lie below that. They "
            "must not be chosen: mask with -inf.",
        ),
        Mistake(
            name="any of equal scores",
            wrong=_any_of_equals,
            says="Of equal scores the lowest id is chosen; yours takes another. Use your `best_k` in place of "
            "`torch.topk`.",
        ),
        Mistake(
            name="score taken twice",
            wrong=_routed(
                lambda logits, config: routing.score(routing.score(logits.float(), config.score), config.score)
            ),
            says="The score function is applied twice. The second softmax gets numbers between 0 and 1 and makes "
            "nearly equal ones of them. It is an old friend: several routers in transformers returned scores under "
            "the name of logits, and a loss took their softmax again (transformers#45120).",
        ),
        Mistake(
            name="softmax over the chosen scores",
            wrong=_routed(
                weights_of=lambda s, e, c, b: (
                    c.scaling_factor * (s.gather(-1, e).softmax(-1) if c.normalise else s.gather(-1, e))
                )
            ),
            says="You normalise with a softmax of the chosen scores. They are scores already; divide by their sum.",
        ),
        Mistake(
            name="always softmax",
            wrong=_routed(lambda logits, config: logits.float().softmax(-1)),
            says="The scores are always softmax. `config.score` says which function it is: DeepSeek-V3 and Llama 4 "
            "have sigmoid.",
        ),
        Mistake(
            name="normalised before the choice",
            wrong=_routed(
                weights_of=lambda s, e, c, b: (
                    c.scaling_factor * (s / s.sum(-1, keepdim=True) if c.normalise else s).gather(-1, e)
                )
            ),
            says="You divide by the sum over all experts, before choosing. With softmax that does nothing. The sum "
            "runs over the chosen ones.",
        ),
        Mistake(
            name="normalise and factor exchanged",
            wrong=_routed(weights_of=lambda s, e, c, b: routing.weigh(s, e, True, float(c.normalise))),
            says="Weights that should be bare are zero, and no factor is applied: `config.normalise` was taken for "
            "the factor, False for 0, and the factor for true. `weigh` takes `normalise` first, then the factor.",
        ),
        Mistake(
            name="normalise is not passed on",
            wrong=_routed(weights_of=lambda s, e, c, b: routing.weigh(s, e, True, c.scaling_factor)),
            says="The weights are always normalised: `config.normalise` is not passed on. With k = 1 this is fatal: "
            "the weight is 1 whatever the logits, and the router never learns.",
        ),
        Mistake(
            name="never normalised",
            wrong=_routed(weights_of=lambda s, e, c, b: routing.weigh(s, e, False, c.scaling_factor)),
            says="The weights are never normalised: `config.normalise` is not passed on.",
        ),
        Mistake(
            name="the scaling factor is not passed on",
            wrong=_routed(weights_of=lambda s, e, c, b: routing.weigh(s, e, c.normalise)),
            says="The weights lack `config.scaling_factor`.",
        ),
        Mistake(
            name="biased scores returned",
            wrong=_routed(told=lambda scores, bias: scores + bias),
            says="`router_scores` holds the bias. It is the score as it was; losses for balance read it (notebook 05).",
        ),
        Mistake(
            name="scores in the logits' precision",
            wrong=_routed(lambda logits, config: routing.score(logits, config.score)),
            says="The scores are computed in the logits' own precision. In bf16 many scores are equal, and the "
            "choice falls to the ids. Routing is fp32 throughout: `.float()` first.",
        ),
        Mistake(
            name="no gradient",
            wrong=_detached,
            says="All values are right, but no gradient gets from the weights back to the logits: the router would "
            "never learn, and no number of the forward pass would tell. Released code has given routers a wrong "
            "gradient under a right loss (transformers#48687). Only the choice may be detached.",
        ),
    ),
)


# 2.6 experts that choose


def _chosen(scores: Tensor, tokens: Tensor, weights: Tensor | None = None) -> ExpertChoice:
    weights = scores.T.gather(-1, tokens) if weights is None else weights
    return ExpertChoice(router_scores=scores, weights=weights, tokens=tokens)


def _expert_choice_cases() -> list[Case]:
    return [
        Case(name="three tokens by hand", args=(torch.tensor([[2.0, 0.0], [1.0, 0.5], [0.0, 3.0]]), 1)),
        Case(name="equal tokens", args=(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 2)),
        Case(name="seven tokens, four experts", args=(4 * _rand(7, 4, seed=1), 3)),
        Case(name="more experts than tokens", args=(4 * _rand(3, 8, seed=2), 2)),
        Case(name="every token taken", args=(4 * _rand(5, 3, seed=3), 5)),
        Case(name="logits in bf16", args=(torch.tensor([[0, 0], [0.25, 1], [1, -0.5], [-1, 2]]).bfloat16(), 2)),
    ]


def _tokens_choose(router_logits: Tensor, capacity: int) -> ExpertChoice:
    scores = router_logits.float().softmax(-1)
    experts = routing.best_k(scores, min(capacity, scores.shape[-1]))
    return _chosen(scores, experts, scores.gather(-1, experts))


def _changed(change: Callable[[ExpertChoice], dict]) -> Callable[..., ExpertChoice]:
    """The right choice with some of its parts replaced."""

    def wrong(router_logits: Tensor, capacity: int) -> ExpertChoice:
        right = routing.expert_choice(router_logits, capacity)
        return replace(right, **change(right))

    return wrong


def _in_order(right: ExpertChoice) -> dict:
    tokens = right.tokens.sort(dim=-1).values
    return {"tokens": tokens, "weights": right.router_scores.T.gather(-1, tokens)}


def _latest(router_logits: Tensor, capacity: int) -> ExpertChoice:
    scores = router_logits.float().softmax(-1)
    return _chosen(scores, len(scores) - 1 - routing.best_k(scores.flip(0).T, capacity))


def _in_their_precision(router_logits: Tensor, capacity: int) -> ExpertChoice:
    scores = router_logits.softmax(-1)
    return _chosen(scores, routing.best_k(scores.T, capacity))


def _over_tokens(router_logits: Tensor, capacity: int) -> ExpertChoice:
    scores = router_logits.float().softmax(0)
    return _chosen(scores, routing.best_k(scores.T, capacity))


EXPERT_CHOICE = Exercise(
    id="2.6",
    title="experts that choose (optional)",
    reference=routing.expert_choice,
    cases=_expert_choice_cases,
    mistakes=(
        Mistake(
            name="softmax over the tokens",
            wrong=_over_tokens,
            says="Your softmax runs over the tokens. As before, a token's scores over all experts sum to one, and "
            "only then the experts choose among the tokens.",
        ),
        Mistake(
            name="tokens choose",
            wrong=_tokens_choose,
            says="Here tokens choose experts again. An expert, a column of the scores, takes its best tokens: choose "
            "among the rows, and return (E, C).",
        ),
        Mistake(
            name="experts and tokens exchanged in the result",
            wrong=_changed(lambda right: {"tokens": right.tokens.T, "weights": right.weights.T}),
            says="The choice is right, but turned: (C, E). The record has a row for each expert: (E, C).",
        ),
        Mistake(
            name="weights and tokens exchanged",
            wrong=_changed(lambda right: {"tokens": right.weights, "weights": right.tokens}),
            says="The parts of your `ExpertChoice` stand in another order: scores, weights, tokens. Named arguments "
            "(`weights=…`) cannot be mixed up.",
        ),
        Mistake(
            name="weights of other tokens",
            wrong=_changed(lambda right: {"weights": right.router_scores.gather(0, right.tokens)}),
            says="The tokens are right, their weights are not. A row of `tokens` belongs to one expert, a row of "
            "`scores` to one token: read where an expert has a row, too, `scores.T`.",
        ),
        Mistake(
            name="scores in the logits' precision",
            wrong=_in_their_precision,
            says="The scores are computed in the logits' own precision. Routing is fp32 throughout: `.float()` first.",
        ),
        Mistake(
            name="the logits choose",
            wrong=lambda router_logits, capacity: _chosen(
                router_logits.float().softmax(-1), routing.best_k(router_logits.T, capacity)
            ),
            says="You compare tokens by their logits. Within a token logits and scores rank alike, but from token to "
            "token they do not: a token may have large logits for all experts. Compare scores.",
        ),
        Mistake(
            name="weights normalised",
            wrong=_changed(lambda right: {"weights": right.weights / right.weights.sum(-1, keepdim=True)}),
            says="You made each expert's weights sum to one. The weight of a token is its score, and nothing more: "
            "tokens do not share an expert's attention.",
        ),
        Mistake(
            name="tokens in order",
            wrong=_changed(_in_order),
            says="The chosen tokens are right, but stand in their order. An expert's best token comes first.",
        ),
        Mistake(
            name="the latest of equal tokens",
            wrong=_latest,
            says="Of equal tokens you take the latest. The rule is the earliest: it is the lowest id.",
        ),
    ),
)

EXERCISES = (BEST_K, WEIGH, LOGITS_GRADIENT, LIMIT_GROUPS, ROUTE, EXPERT_CHOICE)
