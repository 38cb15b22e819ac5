"""Right answers to chapter 5 in three styles, and each of its mistakes in two forms: plain loops, and vectorised."""

import math
import statistics

import torch
import torch.nn.functional as F

from moe_lab.balance import shares
from moe_lab.routing import best_k

# 5.1 MaxVio: on a Python list, and with torch.


def listed(formula):
    """`formula(counts, mean)` of plain Python numbers."""

    def answer(tokens_per_expert):
        counts = tokens_per_expert.tolist()
        return float(formula(counts, sum(counts) / len(counts)))

    return answer


def max_violation_of_loads(tokens_per_expert):
    load = tokens_per_expert * len(tokens_per_expert) / tokens_per_expert.sum()
    return load.amax() - 1


def max_violation_of_shares(tokens_per_expert):
    f = tokens_per_expert.double() / tokens_per_expert.sum()
    return float(f.max() * f.numel() - 1)


def over_the_even_share(tokens_per_expert):
    return (tokens_per_expert / tokens_per_expert.double().mean()).max().item()


def excess_in_tokens(tokens_per_expert):
    even = tokens_per_expert.sum() / len(tokens_per_expert)
    return (tokens_per_expert - even).amax().item()


def excess_of_the_fullest(tokens_per_expert):
    return 1 - (tokens_per_expert.double().mean() / tokens_per_expert.max()).item()


def distance_from_even(tokens_per_expert):
    load = tokens_per_expert / tokens_per_expert.double().mean()
    return torch.linalg.vector_norm(load - 1, ord=math.inf).item()


def mean_of_the_busy(tokens_per_expert):
    chosen = torch.arange(len(tokens_per_expert)).repeat_interleave(tokens_per_expert)
    _, counts = torch.unique(chosen, return_counts=True)
    return (counts.max() / counts.double().mean() - 1).item()


def fullest_over_emptiest(tokens_per_expert):
    low, high = tokens_per_expert.double().aminmax()
    return ((high - low) / low).item()


def over_the_emptiest(tokens_per_expert):
    counts = sorted(tokens_per_expert.tolist())
    return counts[-1] / counts[0] - 1 if counts[0] else math.inf


def largest_share(tokens_per_expert):
    return F.normalize(tokens_per_expert.double(), p=1, dim=0).max().item()


def over_the_median(tokens_per_expert):
    counts = sorted(tokens_per_expert.tolist())
    middle = len(counts) // 2
    median = counts[middle] if len(counts) % 2 else (counts[middle - 1] + counts[middle]) / 2
    return counts[-1] / median - 1 if median else 0.0


def over_torchs_median(tokens_per_expert):
    counts = tokens_per_expert.double().sort().values
    median = (counts + counts.flip(0))[len(counts) // 2 - (len(counts) + 1) % 2] / 2
    return 0.0 if median == 0 else (counts[-1] / median).item() - 1


def whole_times_the_mean(tokens_per_expert):
    fullest, total = int(tokens_per_expert.max()), int(tokens_per_expert.sum())
    return fullest * tokens_per_expert.numel() // total - 1


def scatter(tokens_per_expert):
    return (tokens_per_expert.double().var() ** 0.5 / tokens_per_expert.double().mean()).item()


def scatter_of_all(tokens_per_expert):
    load = tokens_per_expert / tokens_per_expert.double().mean()
    return (load - 1).square().mean().sqrt().item()


# 5.2 f and P: token by token, and with matrices.


def by_token(
    choices=lambda r, t: r.topk_experts[t].tolist(),
    amount=lambda r, t, slot: 1.0,
    row=lambda r, t: r.router_scores[t] / r.router_scores[t].sum(),
    in_f=lambda mask: mask,
    in_p=lambda mask: mask,
    total_f=lambda amounts: sum(amounts),
    total_p=lambda tokens, n: len(tokens),
):
    """f and P from loops over the tokens that count."""

    def answer(routing, mask=None):
        n_tokens = len(routing.topk_experts)
        full = [True] * n_tokens
        keep = full if mask is None else mask.tolist()
        amounts = [0.0] * routing.n_experts
        for t in (t for t, counts in enumerate(in_f(keep)) if counts):
            for slot, e in enumerate(choices(routing, t)):
                amounts[e] += amount(routing, t, slot)
        tokens = [t for t, counts in enumerate(in_p(keep)) if counts]
        p = sum(row(routing, t) for t in tokens) / total_p(tokens, n_tokens)
        return torch.tensor(amounts) / total_f(amounts), p

    return answer


def in_matrices(
    chosen=lambda r: F.one_hot(r.topk_experts, r.n_experts).sum(1).float(),
    rows=lambda r: F.normalize(r.router_scores, p=1, dim=-1),
    scale_f=lambda r, weight: weight.sum() * r.topk_experts.shape[1],
    weight_f=lambda weight: weight,
    weight_p=lambda weight: weight,
):
    """f and P as products of a row of ones and zeros with (T, E)."""

    def answer(routing, mask=None):
        weight = torch.ones(len(routing.topk_experts)) if mask is None else mask.float()
        one, other = weight_f(weight), weight_p(weight)
        return one @ chosen(routing) / scale_f(routing, one), other @ rows(routing) / other.sum()

    return answer


def shares_by_bincount(routing, mask=None):
    ids, scores = routing.topk_experts, routing.router_scores
    if mask is not None:
        ids, scores = ids[mask], scores[mask]
    counts = torch.bincount(ids.flatten(), minlength=routing.n_experts)
    return counts / ids.numel(), (scores / scores.sum(1, keepdim=True)).mean(0)


def f_too_large(routing, mask=None):
    f, p = shares_by_bincount(routing, mask)
    return f * routing.topk_experts.size(1), p


def f_of_tokens(routing, mask=None):
    ids = routing.topk_experts if mask is None else routing.topk_experts[mask]
    hit = (ids[:, :, None] == torch.arange(routing.n_experts)).any(1).float()
    return hit.mean(0), shares_by_bincount(routing, mask)[1]


def counted_only(routing, mask=None):
    ids = routing.topk_experts if mask is None else routing.topk_experts[mask]
    counts = torch.tensor([float((ids == e).sum()) for e in range(routing.n_experts)])
    return counts, shares_by_bincount(routing, mask)[1]


def short_by_bincount(routing, mask=None):
    ids = routing.topk_experts if mask is None else routing.topk_experts[mask]
    return torch.bincount(ids.flatten()) / ids.numel(), shares_by_bincount(routing, mask)[1]


def short_by_unique(routing, mask=None):
    ids = routing.topk_experts if mask is None else routing.topk_experts[mask]
    highest = max(ids.flatten().tolist())
    f = torch.stack([(ids == e).float().mean() for e in range(highest + 1)])
    return f, in_matrices()(routing, mask)[1]


def masked_sums_over_all(routing, mask=None):
    mask = torch.ones(len(routing.topk_experts)) if mask is None else mask
    rows = routing.router_scores / routing.router_scores.sum(1, keepdim=True)
    f = (F.one_hot(routing.topk_experts, routing.n_experts).float().mean(1) * mask[:, None]).mean(0)
    return f, (rows * mask[:, None]).mean(0)


def sums_in_a_loop_over_all(routing, mask=None):
    n_tokens, top_k = routing.topk_experts.shape
    f, p = [0.0] * routing.n_experts, torch.zeros(routing.n_experts)
    for t in range(n_tokens):
        if mask is not None and not mask[t]:
            continue
        for e in routing.topk_experts[t].tolist():
            f[e] += 1 / (n_tokens * top_k)
        p = p + routing.router_scores[t] / routing.router_scores[t].sum() / n_tokens
    return torch.tensor(f), p


def masked_counts_over_all(routing, mask=None):
    _, p = shares_by_bincount(routing, mask)
    ids = routing.topk_experts if mask is None else routing.topk_experts[mask]
    return torch.bincount(ids.flatten(), minlength=routing.n_experts) / routing.topk_experts.numel(), p


def scores_over_their_total(routing, mask=None):
    f, _ = shares_by_bincount(routing, mask)
    scores = routing.router_scores if mask is None else routing.router_scores[mask]
    return f, scores.sum(0) / scores.sum()


def scores_over_their_total_by_token(routing, mask=None):
    f, _ = by_token()(routing, mask)
    keep = range(len(routing.topk_experts)) if mask is None else mask.nonzero().flatten().tolist()
    sums = [sum(routing.router_scores[t, e] for t in keep) for e in range(routing.n_experts)]
    return f, torch.stack(sums) / sum(sums)


def probabilities_twice(routing, mask=None):
    _, p = shares_by_bincount(routing, mask)
    return p.clone(), p


def f_over_all_in_a_loop(routing, mask=None):
    f, p = by_token()(routing, mask)
    return f * (1.0 if mask is None else sum(mask.tolist()) / len(mask)), p


def probabilities_twice_in_a_loop(routing, mask=None):
    _, p = by_token()(routing, mask)
    return sum(p[e] * torch.eye(len(p))[e] for e in range(len(p))), p


def first_draft(routing, mask=None):
    return routing.tokens_per_expert / len(routing.topk_experts), routing.router_scores.mean(0)


def first_draft_in_a_loop(routing, mask=None):
    f, p, n = [0.0] * routing.n_experts, 0, len(routing.topk_experts)
    for t in range(n):
        for e in routing.topk_experts[t].tolist():
            f[e] += 1 / n
        p = p + routing.router_scores[t] / n
    return torch.tensor(f), p


def second_draft(routing, mask=None):
    return routing.tokens_per_expert / routing.topk_experts.numel(), routing.router_scores.mean(0)


def second_draft_with_one_hot(routing, mask=None):
    hits = F.one_hot(routing.topk_experts, routing.n_experts).float()
    return hits.mean((0, 1)), torch.einsum("te->e", routing.router_scores) / len(hits)


def softmax_row(values):
    powers = (values - values.max()).exp()
    return powers / powers.sum()


# 5.3 the loss: with loops, and over stacked layers.


def summed_layers(f_and_p=shares, value=lambda f, p, r: len(f) * sum(a * b for a, b in zip(f, p, strict=True))):
    """Layer by layer, expert by expert."""

    def answer(routings, mask=None):
        total = torch.zeros(())
        for routing in routings:
            total = total + value(*f_and_p(routing, mask), routing)
        return total

    return answer


def stacked_layers(f_and_p=shares, factor=lambda r: r.n_experts, reduce=lambda losses: losses.sum()):
    """All layers' f and P as (L, E)."""

    def answer(routings, mask=None):
        f, p = (torch.stack(part) for part in zip(*(f_and_p(r, mask) for r in routings), strict=True))
        return reduce(factor(routings[0]) * torch.linalg.vecdot(f, p))

    return answer


def by_dot_products(routings, mask=None):
    return sum(r.n_experts * torch.dot(*shares(r, mask)) for r in routings)


def sums_multiplied(routings, mask=None):
    parts = [shares(r, mask) for r in routings]
    return sum(torch.outer(f, p).sum() * len(f) for f, p in parts)


def all_in_one_heap(routings, mask):
    mask = torch.ones(len(routings[0].topk_experts), dtype=torch.bool) if mask is None else mask
    ids = torch.cat([r.topk_experts[mask] for r in routings])
    scores = torch.cat([r.router_scores[mask] for r in routings])
    return ids, scores


def heap_with_f_to_k(routings, mask=None):
    ids, scores = all_in_one_heap(routings, mask)
    counts = torch.bincount(ids.flatten(), minlength=scores.shape[1])
    return scores.shape[1] * (counts / len(ids) @ scores.mean(0))


def heap_with_f_to_one(routings, mask=None):
    ids, scores = all_in_one_heap(routings, mask)
    counts = torch.bincount(ids.flatten(), minlength=scores.shape[1])
    return scores.shape[1] * (counts / ids.numel() @ scores.mean(0))


def layers_meet_first(routings, mask=None):
    parts = [shares(r, mask) for r in routings]
    f, p = (sum(part[i] for part in parts) / len(parts) for i in (0, 1))
    return len(f) * (f * p).sum()


def layers_meet_first_k(routings, mask=None):
    n_layers, k = len(routings), routings[0].topk_experts.shape[1]
    f = sum(shares(r, mask)[0] for r in routings) * k
    p = sum(shares(r, mask)[1] for r in routings)
    return (f * p).mean() * len(f) ** 2 / n_layers**2


def without_graph(routings, mask=None):
    with torch.no_grad():
        return by_dot_products(routings, mask)


def of_copies(routings, mask=None):
    return summed_layers(lambda r, m: tuple(part.detach() for part in shares(r, m)))(routings, mask)


class _Soft(torch.autograd.Function):
    """f forward, P's gradient backward."""

    @staticmethod
    def forward(ctx, p, f):
        return f.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def soft_f(routing, mask):
    f, p = shares(routing, mask)
    return _Soft.apply(p, f), p


def soft_choices(routing, mask):
    mask = torch.ones(len(routing.topk_experts), dtype=torch.bool) if mask is None else mask
    hard = F.one_hot(routing.topk_experts, routing.n_experts).sum(1) / routing.topk_experts.shape[1]
    soft = routing.router_scores
    return (soft + (hard - soft).detach())[mask].mean(0), soft[mask].mean(0)


def returns_in_the_loop(routings, mask=None):
    for routing in routings:
        f, p = shares(routing, mask)
        return (f * p).sum() * routing.n_experts


def keeps_the_last(routings, mask=None):
    for routing in routings:
        f, p = shares(routing, mask)
        loss = (f * p).sum() * routing.n_experts
    return loss


def weights_of_the_chosen(routing, mask):
    f, _ = shares(routing, mask)
    tokens = slice(None) if mask is None else mask
    return f, routing.dense_weights[tokens].mean(0)


def weights_one_by_one(routing, mask):
    f, _ = shares(routing, mask)
    keep = range(len(routing.topk_experts)) if mask is None else mask.nonzero().flatten().tolist()
    hits = F.one_hot(routing.topk_experts, routing.n_experts)
    return f, sum(routing.topk_weights[t] @ hits[t].float() for t in keep) / len(keep)


def softmax_again(routing, mask):
    f, _ = shares(routing, mask)
    tokens = slice(None) if mask is None else mask
    return f, F.softmax(routing.router_scores, dim=1)[tokens].mean(0)


def softmax_again_by_token(routing, mask):
    f, _ = shares(routing, mask)
    keep = range(len(routing.topk_experts)) if mask is None else mask.nonzero().flatten().tolist()
    return f, sum(softmax_row(routing.router_scores[t]) for t in keep) / len(keep)


# 5.4 the z-loss.


def z_by_token(of_row, together=lambda values: sum(values) / len(values), row=lambda r, t: r.router_logits[t]):
    return lambda routing: together([of_row(row(routing, t)) for t in range(len(routing.router_logits))])


def log_of_sum(z):
    """logsumexp by hand, with the largest taken out."""
    return z.max() + (z - z.max()).exp().sum().log()


def z_with_largest_out(routing):
    top = routing.router_logits.amax(-1, keepdim=True)
    return ((routing.router_logits - top).exp().sum(-1).log() + top[:, 0]).pow(2).mean()


def z_of_log_softmax(routing):
    z = routing.router_logits
    return (z - z.log_softmax(-1)).mean(-1).pow(2).mean()  # what a softmax takes off each logit


def overflowing(routing):
    total = 0.0
    for z in routing.router_logits:
        total = total + torch.log(torch.exp(z).sum()) ** 2
    return total / len(routing.router_logits)


def overflowing_in_one_line(routing):
    return torch.log(torch.exp(routing.router_logits).sum(dim=1)).pow(2).mean()


def z_of_chosen(routing):
    rows = zip(routing.router_logits, routing.topk_experts, strict=True)
    return torch.stack([log_of_sum(z[ids]) ** 2 for z, ids in rows]).mean()


def z_of_chosen_masked(routing):
    chosen = torch.zeros_like(routing.router_logits, dtype=torch.bool).scatter(1, routing.topk_experts, True)
    return torch.logsumexp(routing.router_logits.masked_fill(~chosen, -math.inf), 1).pow(2).mean()


# 5.5 one step of the loss-free bias.


def stepped(
    chosen=lambda s, b: s + b,
    weight=lambda s, b, t, e: s[t, e],
    move=lambda n, mean, rate: rate * ((n < mean) - (n > mean)),
    mean=lambda counts, n_tokens, k: sum(counts) / len(counts),
    counts_of=None,
    start=lambda b: b,
):
    """Token by token, expert by expert."""

    def answer(scores, selection_bias, top_k, rate):
        n_experts = scores.shape[1]
        ids = chosen(scores.detach(), selection_bias).sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        weights = torch.stack(
            [torch.stack([weight(scores, selection_bias, t, e) for e in row]) for t, row in enumerate(ids)]
        )
        counts = [0] * n_experts
        for e in ids.flatten().tolist():
            counts[e] += 1
        if counts_of:
            counts = counts_of(scores.detach(), top_k)
        even = mean(counts, len(scores), top_k)
        steps = torch.tensor([float(move(n, even, rate)) for n in counts])
        return weights, ids, start(selection_bias) + steps

    return answer


def at_once(
    chosen=lambda s, b: s + b,
    weighed=lambda s, b: s,
    step=lambda n: (n.mean() - n).sign(),
    counts_of=lambda s, ids, k: F.one_hot(ids, s.shape[1]).sum((0, 1)).float(),
    result=lambda b, step: b + step,
):
    def answer(scores, selection_bias, top_k, rate):
        ids = torch.topk(chosen(scores, selection_bias), top_k, dim=-1).indices
        weights = torch.take_along_dim(weighed(scores, selection_bias), ids, dim=1)
        n = counts_of(scores.detach(), ids, top_k)
        return weights, ids, result(selection_bias, rate * step(n))

    return answer


def step_with_where(scores, selection_bias, top_k, rate):
    ids = best_k((scores + selection_bias).detach(), top_k)
    n = torch.bincount(ids.flatten(), minlength=scores.shape[1])
    even = ids.numel() / scores.shape[1]
    up = torch.where(n < even, rate, 0.0)
    return scores.gather(1, ids), ids, selection_bias + up - torch.where(n > even, rate, 0.0)


def counts_without_bias(scores, top_k):
    ids = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k].flatten().tolist()
    return [ids.count(e) for e in range(scores.shape[1])]


def recentred_in_a_loop(scores, selection_bias, top_k, rate):
    weights, ids, after = step_with_where(scores, selection_bias, top_k, rate)
    drift = sum((after - selection_bias).tolist()) / len(after)
    return weights, ids, torch.tensor([b - drift for b in after.tolist()])


def recentred_at_once(scores, selection_bias, top_k, rate):
    weights, ids, after = step_with_where(scores, selection_bias, top_k, rate)
    return weights, ids, after - after.mean() + selection_bias.mean()


def normalised_in_a_loop(scores, selection_bias, top_k, rate):
    weights, ids, after = step_with_where(scores, selection_bias, top_k, rate)
    return torch.stack([row / sum(row) for row in weights]), ids, after


def normalised_at_once(scores, selection_bias, top_k, rate):
    weights, ids, after = step_with_where(scores, selection_bias, top_k, rate)
    return F.normalize(weights, p=1, dim=-1), ids, after


def only_those_seen(scores, selection_bias, top_k, rate):
    weights, ids, after = step_with_where(scores, selection_bias, top_k, rate)
    new = selection_bias.clone()
    for e in ids.unique():
        new[e] = after[e]
    return weights, ids, new


def only_those_seen_at_once(scores, selection_bias, top_k, rate):
    weights, ids, after = step_with_where(scores, selection_bias, top_k, rate)
    return weights, ids, torch.where(F.one_hot(ids, scores.shape[1]).any(0).any(0), after, selection_bias)


def short_step_in_a_loop(scores, selection_bias, top_k, rate):
    ids = best_k((scores + selection_bias).detach(), top_k)
    chosen = ids.flatten().tolist()
    counts = [chosen.count(e) for e in range(max(chosen) + 1)]
    even = sum(counts) / len(counts)
    steps = [rate * ((n < even) - (n > even)) for n in counts]
    return scores.gather(1, ids), ids, selection_bias + torch.tensor(steps)


def short_step_at_once(scores, selection_bias, top_k, rate):
    ids = best_k((scores + selection_bias).detach(), top_k)
    n = F.one_hot(ids).sum((0, 1)).float()  # as many classes as occur
    return scores.gather(1, ids), ids, selection_bias + rate * (n.mean() - n).sign()


# 5.6 expert choice.


def mask_in_columns(order):
    """`order(scores of one expert)` gives its tokens, the best first."""

    def answer(router_scores, capacity):
        mask = torch.zeros(router_scores.shape, dtype=torch.bool)
        for e in range(router_scores.shape[1]):
            for t in order(router_scores[:, e].tolist())[:capacity]:
                mask[t, e] = True
        return mask

    return answer


def falling(column):
    return sorted(range(len(column)), key=lambda t: -column[t])


def mask_by_ranks(router_scores, capacity):
    order = router_scores.argsort(dim=0, descending=True, stable=True)
    return order.argsort(dim=0) < capacity


def mask_by_scatter(router_scores, capacity):
    tokens = router_scores.sort(dim=0, descending=True, stable=True).indices[:capacity]  # (C, E)
    return torch.zeros_like(router_scores, dtype=torch.bool).scatter(0, tokens, True)


def tokens_choose_by_ranks(router_scores, capacity):
    order = router_scores.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1) < capacity


def tokens_choose_in_rows(router_scores, capacity):
    mask = torch.zeros(router_scores.shape, dtype=torch.bool)
    for t, row in enumerate(router_scores.tolist()):
        for e in falling(row)[:capacity]:
            mask[t, e] = True
    return mask


def order_for_rank(router_scores, capacity):
    return router_scores.sort(dim=0, descending=True, stable=True).indices.lt(capacity)


def order_for_rank_in_a_loop(router_scores, capacity):
    columns = [[t < capacity for t in falling(column)] for column in router_scores.T.tolist()]
    return torch.tensor(columns).T


def queue_in_a_loop(router_scores, capacity):
    mask, taken = torch.zeros(router_scores.shape, dtype=torch.bool), [0] * router_scores.shape[1]
    for t, row in enumerate(router_scores.tolist()):
        e = falling(row)[0]
        if taken[e] < capacity:
            mask[t, e], taken[e] = True, taken[e] + 1
    return mask


def queue_at_once(router_scores, capacity):
    best = router_scores.argsort(dim=1, descending=True, stable=True)[:, :1]
    wants = torch.zeros_like(router_scores).scatter(1, best, 1.0)
    return (wants > 0) & (wants.cumsum(0) <= capacity)


def shared_out_in_a_loop(router_scores, capacity):
    mask, free = torch.zeros(router_scores.shape, dtype=torch.bool), set(range(len(router_scores)))
    for e in range(router_scores.shape[1]):
        column = router_scores[:, e].tolist()
        for t in [t for t in falling(column) if t in free][:capacity]:
            mask[t, e] = True
            free.remove(t)
    return mask


def shared_out_by_ranks(router_scores, capacity):
    columns, gone = [], torch.zeros(len(router_scores), dtype=torch.bool)
    for column in router_scores.T:
        order = torch.where(gone, -torch.inf, column).argsort(descending=True, stable=True)
        took = (order.argsort() < capacity) & ~gone
        columns.append(took)
        gone = gone | took
    return torch.stack(columns, 1)


def table_in_a_loop(router_scores, capacity):
    mask, width = torch.zeros(router_scores.shape, dtype=torch.bool), router_scores.shape[1]
    for place in falling(router_scores.flatten().tolist())[: capacity * width]:
        mask[place // width, place % width] = True
    return mask


def table_by_ranks(router_scores, capacity):
    order = router_scores.flatten().argsort(descending=True, stable=True)
    return (order.argsort() < capacity * router_scores.shape[1]).view_as(router_scores)


def threshold_in_columns(router_scores, capacity):
    columns = []
    for column in router_scores.T:
        columns.append(column >= sorted(column.tolist(), reverse=True)[capacity - 1])
    return torch.stack(columns, dim=1)


def threshold_at_once(router_scores, capacity):
    return router_scores >= router_scores.topk(capacity, dim=0).values.amin(0)


def last_of_equals_in_columns(column):
    return sorted(range(len(column)), key=lambda t: (-column[t], -t))


def last_of_equals_at_once(router_scores, capacity):
    order = router_scores.argsort(dim=0, stable=True)
    return order.argsort(dim=0) >= len(router_scores) - capacity


def lowest_at_once(router_scores, capacity):
    return router_scores.argsort(dim=0, stable=True).argsort(dim=0) < capacity


def one_token_each(router_scores, capacity):
    best = router_scores.argsort(dim=0, descending=True, stable=True)[:1]
    return torch.zeros_like(router_scores).scatter(0, best, 1.0).bool()


def one_token_in_columns(router_scores, capacity):
    mask = torch.zeros(router_scores.shape, dtype=torch.bool)
    for e, column in enumerate(router_scores.T.tolist()):
        mask[column.index(max(column)), e] = True
    return mask


def expert_rows_in_a_loop(router_scores, capacity):
    rows = []
    for column in router_scores.T.tolist():
        took = set(falling(column)[:capacity])
        rows.append([t in took for t in range(len(column))])
    return torch.tensor(rows)


def expert_rows_by_ranks(router_scores, capacity):
    return router_scores.T.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < capacity


def tokens_listed(router_scores, capacity):
    return torch.tensor([falling(column)[:capacity] for column in router_scores.T.tolist()])


def tokens_sorted(router_scores, capacity):
    return router_scores.sort(dim=0, descending=True, stable=True).indices[:capacity].T


RIGHT = {
    "5.1": [
        listed(lambda counts, mean: max(counts) / mean - 1),
        max_violation_of_loads,
        max_violation_of_shares,
    ],
    "5.2": [by_token(), in_matrices(), shares_by_bincount],
    "5.3": [summed_layers(), stacked_layers(), by_dot_products],
    "5.4": [z_by_token(lambda z: log_of_sum(z) ** 2), z_with_largest_out, z_of_log_softmax],
    "5.5": [stepped(), at_once(), step_with_where],
    "5.6": [mask_in_columns(falling), mask_by_ranks, mask_by_scatter],
}

WRONG = {
    "5.1": {
        "1 is not taken off": [listed(lambda counts, mean: max(counts) / mean), over_the_even_share],
        "counted in tokens": [listed(lambda counts, mean: max(counts) - mean), excess_in_tokens],
        "divided by the largest": [
            listed(lambda counts, mean: (max(counts) - mean) / max(counts)),
            excess_of_the_fullest,
        ],
        "a missing token counts as one too many": [
            listed(lambda counts, mean: max(abs(n - mean) for n in counts) / mean),
            distance_from_even,
        ],
        "empty experts are left out": [
            listed(lambda counts, mean: max(counts) / statistics.fmean(n for n in counts if n) - 1),
            mean_of_the_busy,
        ],
        "compared with the emptiest": [over_the_emptiest, fullest_over_emptiest],
        "the share of the fullest": [listed(lambda counts, mean: max(counts) / sum(counts)), largest_share],
        "compared with the median": [over_the_median, over_torchs_median],
        "rounded down": [listed(lambda counts, mean: max(counts) // mean - 1), whole_times_the_mean],
        "a standard deviation": [listed(lambda counts, mean: statistics.stdev(counts) / mean), scatter],
        "a standard deviation of all": [listed(lambda counts, mean: statistics.pstdev(counts) / mean), scatter_of_all],
    },
    "5.2": {
        "the 1/k is missing": [f_too_large, f_of_tokens],
        "the 1/k, the mask and sigmoids are missing": [first_draft_in_a_loop, first_draft],
        "the mask and sigmoids are missing": [second_draft_with_one_hot, second_draft],
        "counts in place of shares": [by_token(total_f=lambda amounts: 1.0), counted_only],
        "padding counted": [
            by_token(in_f=lambda mask: [True] * len(mask), in_p=lambda mask: [True] * len(mask)),
            in_matrices(weight_f=torch.ones_like, weight_p=torch.ones_like),
        ],
        "padding counted in f": [
            by_token(in_f=lambda mask: [True] * len(mask)),
            in_matrices(weight_f=torch.ones_like),
        ],
        "padding counted in P": [
            by_token(in_p=lambda mask: [True] * len(mask)),
            in_matrices(weight_p=torch.ones_like),
        ],
        "divided by all tokens": [sums_in_a_loop_over_all, masked_sums_over_all],
        "f divided by all choices": [
            f_over_all_in_a_loop,
            masked_counts_over_all,
        ],
        "a ratio of sums": [scores_over_their_total_by_token, scores_over_their_total],
        "only the first choice counts": [
            by_token(choices=lambda r, t: r.topk_experts[t].tolist()[:1]),
            in_matrices(
                chosen=lambda r: (r.topk_experts[:, :1] == torch.arange(r.n_experts)).float(),
                scale_f=lambda r, weight: weight.sum(),
            ),
        ],
        "the choice is made anew": [
            by_token(choices=lambda r, t: falling(r.router_scores[t].tolist())[: len(r.topk_experts[t])]),
            in_matrices(
                chosen=lambda r: torch.zeros_like(r.router_scores).scatter(
                    1, r.router_scores.topk(r.topk_experts.shape[1]).indices, 1.0
                )
            ),
        ],
        "weights in place of choices": [
            by_token(amount=lambda r, t, slot: float(r.topk_weights[t, slot])),
            in_matrices(
                chosen=lambda r: r.dense_weights.detach(),
                scale_f=lambda r, weight: weight @ r.topk_weights.detach().sum(1),
            ),
        ],
        "P in place of f": [probabilities_twice, probabilities_twice_in_a_loop],
        "double softmax": [
            by_token(row=lambda r, t: softmax_row(r.router_scores[t])),
            in_matrices(rows=lambda r: F.softmax(r.router_scores, dim=1)),
        ],
        "a softmax, whatever the scores are": [
            by_token(row=lambda r, t: softmax_row(r.router_logits[t])),
            in_matrices(rows=lambda r: F.softmax(r.router_logits, dim=1)),
        ],
        "scores that do not sum to one": [
            by_token(row=lambda r, t: r.router_scores[t]),
            in_matrices(rows=lambda r: r.router_scores),
        ],
        "P of the chosen only": [
            by_token(row=lambda r, t: r.topk_weights[t] @ F.one_hot(r.topk_experts[t], r.n_experts).float()),
            in_matrices(rows=lambda r: r.dense_weights),
        ],
        "the last experts are missing": [short_by_bincount, short_by_unique],
    },
    "5.3": {
        "nothing carries a gradient": [of_copies, without_graph],
        "gradient through f": [summed_layers(soft_f), stacked_layers(soft_choices)],
        "f made of probabilities": [
            summed_layers(value=lambda f, p, r: len(p) * sum(b * b for b in p)),
            stacked_layers(lambda r, mask: (shares(r, mask)[1],) * 2),
        ],
        "P made of counts": [
            summed_layers(value=lambda f, p, r: len(f) * sum(a * a for a in f)),
            stacked_layers(lambda r, mask: (shares(r, mask)[0],) * 2),
        ],
        "a product of sums": [
            summed_layers(value=lambda f, p, r: len(f) * sum(f) * sum(p)),
            sums_multiplied,
        ],
        "E is missing": [
            summed_layers(value=lambda f, p, r: sum(a * b for a, b in zip(f, p, strict=True))),
            stacked_layers(factor=lambda r: 1),
        ],
        "E twice": [
            summed_layers(value=lambda f, p, r: len(f) ** 2 * sum(a * b for a, b in zip(f, p, strict=True))),
            stacked_layers(factor=lambda r: r.n_experts**2),
        ],
        "the 1/k is missing": [
            summed_layers(value=lambda f, p, r: r.topk_experts.shape[1] * len(f) * (f * p).sum()),
            stacked_layers(f_of_tokens),
        ],
        "the coefficient is in it": [
            summed_layers(value=lambda f, p, r: 0.01 * len(f) * (f * p).sum()),
            stacked_layers(factor=lambda r: r.n_experts / 100),
        ],
        "layers pooled, and the 1/k is missing": [heap_with_f_to_k, layers_meet_first_k],
        "layers pooled": [heap_with_f_to_one, layers_meet_first],
        "the mean over the layers": [
            lambda routings, mask=None: summed_layers()(routings, mask) / len(routings),
            stacked_layers(reduce=lambda losses: losses.mean()),
        ],
        "only the last layer": [keeps_the_last, stacked_layers(reduce=lambda losses: losses[-1])],
        "only the first layer": [returns_in_the_loop, stacked_layers(reduce=lambda losses: losses[0])],
        "padding counted": [
            summed_layers(lambda r, mask: shares(r)),
            stacked_layers(lambda r, mask: shares_by_bincount(r)),
        ],
        "double softmax": [summed_layers(softmax_again_by_token), stacked_layers(softmax_again)],
        "P of the chosen only": [summed_layers(weights_one_by_one), stacked_layers(weights_of_the_chosen)],
    },
    "5.4": {
        "the square of the mean": [
            z_by_token(log_of_sum, lambda values: (sum(values) / len(values)) ** 2),
            lambda routing: torch.logsumexp(routing.router_logits, 1).mean() ** 2,
        ],
        "the square is missing": [
            z_by_token(log_of_sum),
            lambda routing: torch.logsumexp(routing.router_logits, 1).sum() / len(routing.router_logits),
        ],
        "logits squared one by one": [
            z_by_token(lambda z: (z**2).mean()),
            lambda routing: (routing.router_logits**2).sum() / routing.router_logits.numel(),
        ],
        "logits squared and summed": [
            z_by_token(lambda z: (z**2).sum()),
            lambda routing: (routing.router_logits**2).sum() / len(routing.router_logits),
        ],
        "double softmax": [
            z_by_token(lambda z: log_of_sum(softmax_row(z)) ** 2),
            lambda routing: torch.logsumexp(F.softmax(routing.router_logits, 1), 1).pow(2).mean(),
        ],
        "along the tokens": [
            lambda routing: sum(log_of_sum(z) ** 2 for z in routing.router_logits.T) / routing.n_experts,
            lambda routing: torch.logsumexp(routing.router_logits.T, 1).pow(2).mean(),
        ],
        "over everything at once": [
            lambda routing: log_of_sum(routing.router_logits.flatten()) ** 2,
            lambda routing: torch.logsumexp(torch.logsumexp(routing.router_logits, 1), 0).pow(2),
        ],
        "a sum over the tokens": [
            z_by_token(lambda z: log_of_sum(z) ** 2, sum),
            lambda routing: torch.logsumexp(routing.router_logits, 1).pow(2).sum(),
        ],
        "only the chosen logits": [z_of_chosen, z_of_chosen_masked],
        "the exponentials overflow": [overflowing, overflowing_in_one_line],
    },
    "5.5": {
        "bias folded into the weight": [
            stepped(weight=lambda s, b, t, e: s[t, e] + b[e]),
            at_once(weighed=lambda s, b: s + b),
        ],
        "the bias does not select": [stepped(chosen=lambda s, b: s), at_once(chosen=lambda s, b: s)],
        "the sign is turned": [
            stepped(move=lambda n, mean, rate: rate * ((n > mean) - (n < mean))),
            at_once(step=lambda n: (n - n.mean()).sign()),
        ],
        "re-centred": [recentred_in_a_loop, recentred_at_once],
        "as large as the error": [
            stepped(move=lambda n, mean, rate: rate * (mean - n)),
            at_once(step=lambda n: n.mean() - n),
        ],
        "as large as the relative error": [
            stepped(move=lambda n, mean, rate: rate * (mean - n) / mean),
            at_once(step=lambda n: 1 - n / n.mean()),
        ],
        "the mean without k": [
            stepped(mean=lambda counts, n_tokens, k: n_tokens / len(counts)),
            lambda scores, bias, k, rate: at_once(step=lambda n: (len(scores) / len(n) - n).sign())(
                scores, bias, k, rate
            ),
        ],
        "compared with a share": [
            stepped(mean=lambda counts, n_tokens, k: 1 / len(counts)),
            at_once(step=lambda n: (1 / n.numel() - n).sign()),
        ],
        "the load of probabilities": [
            stepped(counts_of=lambda s, k: [sum(column) for column in s.T.tolist()]),
            at_once(counts_of=lambda s, ids, k: s.mean(0)),
        ],
        "the load without the bias": [
            stepped(counts_of=counts_without_bias),
            at_once(counts_of=lambda s, ids, k: F.one_hot(s.topk(k).indices, s.shape[1]).sum((0, 1)).float()),
        ],
        "an empty expert is passed over": [only_those_seen, only_those_seen_at_once],
        "the last experts are not counted": [short_step_in_a_loop, short_step_at_once],
        "only the full ones move": [
            stepped(move=lambda n, mean, rate: -rate if n > mean else 0),
            at_once(step=lambda n: -(n > n.mean()).float()),
        ],
        "only the empty ones move": [
            stepped(move=lambda n, mean, rate: rate if n < mean else 0),
            at_once(step=lambda n: (n < n.mean()).float()),
        ],
        "at the mean, moved up": [
            stepped(move=lambda n, mean, rate: -rate if n > mean else rate),
            at_once(step=lambda n: 1 - 2 * (n > n.mean()).float()),
        ],
        "at the mean, moved down": [
            stepped(move=lambda n, mean, rate: rate if n < mean else -rate),
            at_once(step=lambda n: 2 * (n < n.mean()).float() - 1),
        ],
        "the bias starts again": [stepped(start=torch.zeros_like), at_once(result=lambda b, step: step)],
        "the bias stays": [stepped(move=lambda n, mean, rate: 0), at_once(result=lambda b, step: b.clone())],
        "weights divided by their sum": [normalised_in_a_loop, normalised_at_once],
    },
    "5.6": {
        "the tokens choose": [tokens_choose_in_rows, tokens_choose_by_ranks],
        "the order is taken for ranks": [order_for_rank_in_a_loop, order_for_rank],
        "first come, first served": [queue_in_a_loop, queue_at_once],
        "one expert a token": [shared_out_in_a_loop, shared_out_by_ranks],
        "the best of the whole table": [table_in_a_loop, table_by_ranks],
        "all that tie are taken": [threshold_in_columns, threshold_at_once],
        "of equals, the last": [mask_in_columns(last_of_equals_in_columns), last_of_equals_at_once],
        "the worst tokens": [
            mask_in_columns(lambda column: sorted(range(len(column)), key=lambda t: column[t])),
            lowest_at_once,
        ],
        "only the best token": [one_token_in_columns, one_token_each],
        "experts by tokens": [expert_rows_in_a_loop, expert_rows_by_ranks],
        "the tokens in place of a mask": [tokens_listed, tokens_sorted],
    },
}
