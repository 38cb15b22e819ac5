"""Right answers to chapter 2 in three styles, and each of its mistakes in two forms: plain loops, and vectorised."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from moe_lab.records import ExpertChoice, Routing

# 2.1: ids sorted by Python, by a stable argsort, by NumPy's lexsort, and one winner at a time.


def best_loop(order=lambda score, e: (-score, e), keep=lambda ids, k: ids[:k], show=lambda row, ids: ids, seen=float):
    """Sorts each row's ids by `order(score, id)`, keeps some of them, and shows them."""

    def answer(scores, k):
        rows = []
        for row in scores:
            row = [seen(score) for score in row]
            ids = keep(sorted(range(len(row)), key=lambda e: order(row[e], e)), k)
            rows.append(show(row, ids))
        return torch.tensor(rows)

    return answer


def best_argsort(look=lambda scores: scores, descending=True, keep=lambda ids, k: ids[:, :k]):
    def answer(scores, k):
        return keep(look(scores).argsort(dim=-1, descending=descending, stable=True), k).clone()

    return answer


def best_lexsort(scores, k):
    ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return torch.from_numpy(np.lexsort((ids, -scores.numpy()))[:, :k].copy())


def best_one_by_one(scores, k):
    left, winners = scores.clone(), []
    for _ in range(k):
        winner = torch.from_numpy(np.argmax(left.numpy(), axis=1))
        left[torch.arange(len(left)), winner] = -math.inf
        winners.append(winner)
    return torch.stack(winners, dim=1)


def topk_row_by_row(scores, k):
    return torch.stack([torch.topk(row, k)[1] for row in scores])


def highest_id_lexsort(scores, k):
    ids = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    return torch.from_numpy(np.lexsort((-ids, -scores.numpy()))[:, :k].copy())


def best_tokens_loop(scores, k):
    columns = []
    for e in range(scores.shape[1]):
        tokens = sorted(range(len(scores)), key=lambda t: (-float(scores[t, e]), t))
        columns.append(tokens[:k])
    return torch.tensor(columns).T.contiguous()


def one_set_loop(scores, k):
    n_tokens, n_experts = scores.shape
    totals = [sum(float(scores[t, e]) for t in range(n_tokens)) for e in range(n_experts)]
    ids = sorted(range(n_experts), key=lambda e: (-totals[e], e))[:k]
    return torch.tensor([ids] * n_tokens)


def one_set_summed(scores, k):
    return (scores.sum(0) / len(scores)).argsort(descending=True, stable=True)[:k].expand(len(scores), k).clone()


def in_bf16(score):
    return float(score.bfloat16())


def mask_of(row, ids):
    return [1.0 if e in ids else 0.0 for e in range(len(row))]


def mask_by_rank(scores, k):
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < k).float()


# 2.2: weights number by number, and by indexing.


def weigh_loop(part=lambda mine, chosen, row: mine / sum(chosen), scale=lambda w, factor: w * factor, always=None):
    """`part(mine, chosen, row)` is a normalised weight, from its score, the chosen scores and the whole row."""

    def answer(scores, experts, normalise=True, scaling_factor=1.0):
        out = []
        for row, ids in zip(scores, experts.tolist(), strict=True):
            chosen = [row[e] for e in ids]
            wanted = normalise if always is None else always
            weights = [scale(part(mine, chosen, row) if wanted else mine, scaling_factor) for mine in chosen]
            out.append(torch.stack(weights))
        return torch.stack(out)

    return answer


def weigh_indexed(divisor=lambda chosen, scores: chosen.sum(1, keepdim=True), always=None, scaled=True, first=False):
    def answer(scores, experts, normalise=True, scaling_factor=1.0):
        rows = torch.arange(len(scores))[:, None]
        chosen = scores[rows, experts] * (scaling_factor if first else 1)
        if normalise if always is None else always:
            chosen = chosen / divisor(chosen, scores)
        return chosen * (scaling_factor if scaled and not first else 1)

    return answer


def weigh_masked(scores, experts, normalise=True, scaling_factor=1.0):
    visits = F.one_hot(experts, scores.shape[-1]).to(scores.dtype)  # (T, K, E)
    weights = torch.einsum("tke,te->tk", visits, scores)
    return scaling_factor * (F.normalize(weights, p=1, dim=-1) if normalise else weights)


def scaled_first_loop(scores, experts, normalise=True, scaling_factor=1.0):
    out = []
    for row, ids in zip(scores.tolist(), experts.tolist(), strict=True):
        chosen = [scaling_factor * row[e] for e in ids]
        total = sum(chosen) if normalise else 1.0
        out.append([value / total for value in chosen])
    return torch.tensor(out)


def over_tokens_loop(scores, experts, normalise=True, scaling_factor=1.0):
    chosen = [[row[e] for e in ids] for row, ids in zip(scores.tolist(), experts.tolist(), strict=True)]
    sums = [sum(column) for column in zip(*chosen, strict=True)]
    return torch.tensor([[scaling_factor * w / (s if normalise else 1) for w, s in zip(r, sums)] for r in chosen])  # noqa: B905


def over_everything_loop(scores, experts, normalise=True, scaling_factor=1.0):
    chosen = [[row[e] for e in ids] for row, ids in zip(scores.tolist(), experts.tolist(), strict=True)]
    total = sum(sum(row) for row in chosen) if normalise else 1
    return torch.tensor([[scaling_factor * w / total for w in row] for row in chosen])


def a_row_of_sums(scores, experts, normalise=True, scaling_factor=1.0):
    chosen = np.take_along_axis(scores.detach().numpy(), experts.numpy(), axis=1)
    return torch.from_numpy(np.float32(scaling_factor) * (chosen / chosen.sum(axis=1) if normalise else chosen))


def softmax_again(scores, experts, normalise=True, scaling_factor=1.0):
    chosen = torch.take_along_dim(scores, experts, 1)
    return scaling_factor * (F.softmax(chosen, dim=1) if normalise else chosen)


def largest_loop(scores, experts, normalise=True, scaling_factor=1.0):
    best = torch.tensor([sorted(row, reverse=True)[: experts.shape[1]] for row in scores.tolist()])
    return scaling_factor * (best / best.sum(1, keepdim=True) if normalise else best)


def largest_sorted(scores, experts, normalise=True, scaling_factor=1.0):
    best = scores.sort(dim=1, descending=True).values[:, : experts.shape[1]]
    return (best / (best.sum(1)[:, None] if normalise else 1)) * scaling_factor


def for_all_loop(scores, experts, normalise=True, scaling_factor=1.0):
    out = torch.zeros(scores.shape)
    for t, ids in enumerate(experts.tolist()):
        total = sum(float(scores[t, e]) for e in ids)
        for e in ids:
            out[t, e] = scaling_factor * scores[t, e] / (total if normalise else 1)
    return out


def for_all_masked(scores, experts, normalise=True, scaling_factor=1.0):
    masked = scores * F.one_hot(experts, scores.shape[1]).sum(1)
    return scaling_factor * (masked / masked.sum(1, keepdim=True) if normalise else masked)


def scaled_if_normalised_loop(scores, experts, normalise=True, scaling_factor=1.0):
    rows = []
    for row, ids in zip(scores, experts, strict=True):
        chosen = row[ids]
        rows.append(scaling_factor * chosen / chosen.sum() if normalise else chosen)
    return torch.stack(rows)


def scaled_if_normalised(scores, experts, normalise=True, scaling_factor=1.0):
    chosen = scores.take_along_dim(experts, dim=1)
    return F.normalize(chosen, p=1, dim=1) * scaling_factor if normalise else chosen


def rows_loop(scores, experts, normalise=True, scaling_factor=1.0):
    out = torch.stack([torch.stack([scores[e] for e in ids]) for ids in experts.tolist()])
    return scaling_factor * (F.normalize(out, p=1, dim=-1) if normalise else out)


def rows_selected(scores, experts, normalise=True, scaling_factor=1.0):
    chosen = scores.index_select(0, experts.flatten()).unflatten(0, experts.shape)
    return chosen / (chosen.sum(-1)[..., None] if normalise else 1) * scaling_factor


def weigh_numbers(scores, experts, normalise=True, scaling_factor=1.0):
    out = []
    for row, ids in zip(scores.tolist(), experts.tolist(), strict=True):
        chosen = [row[e] for e in ids]
        out.append([scaling_factor * value / (sum(chosen) if normalise else 1.0) for value in chosen])
    return torch.tensor(out)


def weigh_without_grad(scores, experts, normalise=True, scaling_factor=1.0):
    with torch.no_grad():
        return weigh_masked(scores, experts, normalise, scaling_factor)


# 2.3: the gradient from the softmax's Jacobian, number by number and in einsum, and from autograd.


def gradient_loop(entry, place=lambda slot, expert: expert, mean=lambda w, g, k: sum(a * b for a, b in zip(w, g))):  # noqa: B905
    """`entry(w, g, mean, slot)` is one number of the gradient; it goes to the column `place(slot, expert)`."""

    def answer(weights, experts, d_weights, n_experts):
        out = torch.zeros(len(weights), n_experts)
        for t, (w, g, ids) in enumerate(zip(weights.tolist(), d_weights.tolist(), experts.tolist(), strict=True)):
            for slot, expert in enumerate(ids):
                out[t, place(slot, expert)] = entry(w, g, mean(w, g, len(w)), slot)
        return out

    return answer


def gradient_jacobian(jacobian):
    """The gradient through a (T, K, K) matrix of how the weights, first, depend on the chosen logits, second."""

    def answer(weights, experts, d_weights, n_experts):
        slots = torch.einsum("tij,ti->tj", jacobian(weights), d_weights)
        visits = F.one_hot(experts, n_experts).to(slots.dtype)
        return torch.einsum("tj,tje->te", slots, visits)

    return answer


def softmax_jacobian(w):
    return torch.diag_embed(w) - w[:, :, None] * w[:, None, :]


def gradient_autograd(weights, experts, d_weights, n_experts):
    # the chosen logits are the weights' logarithms, up to a constant that a softmax does not see
    logits = torch.full((len(weights), n_experts), -math.inf).scatter(1, experts, weights.log()).requires_grad_()
    logits.softmax(-1).gather(1, experts).backward(d_weights)
    return logits.grad


def gradient_dense(weights, experts, d_weights, n_experts):
    zeros = torch.zeros(len(weights), n_experts)
    w, g = zeros.scatter(1, experts, weights), zeros.scatter(1, experts, d_weights)
    return w * (g - (w * g).sum(1, keepdim=True))


def pushed_loop(weights, experts, d_weights, n_experts):
    out = []
    for w, g, ids in zip(weights.tolist(), d_weights.tolist(), experts.tolist(), strict=True):
        mean = sum(a * b for a, b in zip(w, g, strict=True))
        out.append([(g[ids.index(e)] if e in ids else 0.0) - mean for e in range(n_experts)])
    return torch.tensor(out)


def pushed_dense(weights, experts, d_weights, n_experts):
    g = torch.zeros(len(weights), n_experts)
    g[torch.arange(len(g))[:, None], experts] = d_weights
    return g - torch.linalg.vecdot(weights, d_weights)[:, None]


def slots_loop(weights, experts, d_weights, n_experts):
    out = []
    for w, g in zip(weights.tolist(), d_weights.tolist(), strict=True):
        mean = sum(a * b for a, b in zip(w, g, strict=True))
        out.append([a * (b - mean) for a, b in zip(w, g, strict=True)])
    return torch.tensor(out)


def slots_einsum(weights, experts, d_weights, n_experts):
    return torch.einsum("tij,ti->tj", softmax_jacobian(weights), d_weights)


def first_columns(weights, experts, d_weights, n_experts):
    out = torch.zeros(len(weights), n_experts)
    out[:, : weights.shape[1]] = torch.einsum("tij,ti->tj", softmax_jacobian(weights), d_weights)
    return out


def mean_of_all_loop(weights, experts, d_weights, n_experts):
    mean = sum(float(w) * float(g) for w, g in zip(weights.flatten(), d_weights.flatten(), strict=True))
    out = torch.zeros(len(weights), n_experts)
    for t, ids in enumerate(experts.tolist()):
        for slot, expert in enumerate(ids):
            out[t, expert] = weights[t, slot] * (d_weights[t, slot] - mean)
    return out


def mean_of_all_dense(weights, experts, d_weights, n_experts):
    zeros = torch.zeros(len(weights), n_experts)
    w, g = zeros.scatter(1, experts, weights), zeros.scatter(1, experts, d_weights)
    return w * (g - (w * g).sum())


def summed_loop(weights, experts, d_weights, n_experts):
    total = torch.zeros(n_experts)
    for w, g, ids in zip(weights, d_weights, experts.tolist(), strict=True):
        for slot, expert in enumerate(ids):
            total[expert] += w[slot] * (g[slot] - torch.dot(w, g))
    return total


def summed_dense(weights, experts, d_weights, n_experts):
    return gradient_dense(weights, experts, d_weights, n_experts).sum(dim=0)


def zeros_loop(weights, experts, d_weights, n_experts):
    out = torch.tensor([[0.0] * n_experts] * len(weights))
    for t, ids in enumerate(experts.tolist()):
        for slot, expert in enumerate(ids):
            out[t].index_fill(0, torch.tensor(expert), float(weights[t, slot] * d_weights[t, slot]))
    return out


def zeros_scattered(weights, experts, d_weights, n_experts):
    out = torch.zeros(len(weights), n_experts)
    out.scatter(-1, experts, slots_einsum(weights, experts, d_weights, n_experts))
    return out


def row_of_means_loop(weights, experts, d_weights, n_experts):
    means = [float(torch.dot(w, g)) for w, g in zip(weights, d_weights, strict=True)]
    n_slots = weights.shape[1]
    if len({1, n_slots, len(means)}) == 3:
        raise ValueError("the shapes do not fit")
    out = torch.zeros(len(weights), n_experts)
    for t, ids in enumerate(experts.tolist()):
        for slot, expert in enumerate(ids):
            out[t, expert] = weights[t, slot] * (d_weights[t, slot] - means[slot % len(means)])
    return out


def row_of_means(weights, experts, d_weights, n_experts):
    slots = weights * (d_weights - torch.linalg.vecdot(weights, d_weights))
    return torch.zeros(len(weights), n_experts).scatter(1, experts, slots)


def all_rows_loop(weights, experts, d_weights, n_experts):
    slots = slots_loop(weights, experts, d_weights, n_experts).tolist()
    row = [0.0] * n_experts
    for ids, values in zip(experts.tolist(), slots, strict=True):
        for expert, value in zip(ids, values, strict=True):
            row[expert] = value
    return torch.tensor([row] * len(weights))


def all_rows_indexed(weights, experts, d_weights, n_experts):
    out = torch.zeros(len(weights), n_experts)
    out[:, experts] = slots_einsum(weights, experts, d_weights, n_experts)
    return out


# 2.4: groups one by one, and by reshaping.


def groups_loop(
    members=lambda g, n_groups, n: range(g * (n // n_groups), (g + 1) * (n // n_groups)),
    worth=lambda best, kind: best[0] if kind == "max" else best[0] + best[1],
    rank=lambda value: -value,
    fill=-math.inf,
    spare=True,
    tie=lambda g: g,
    count=lambda kept, n_groups: kept,
):
    """`members` are a group's experts; `worth(best, kind)` of a group, its scores from the best on."""

    def answer(scores, n_groups, groups_kept, group_score="max"):
        out = scores.clone()
        for t, row in enumerate(scores.tolist()):
            groups = [list(members(g, n_groups, len(row))) for g in range(n_groups)]
            values = [worth(sorted((row[e] for e in group), reverse=True), group_score) for group in groups if group]
            kept = sorted(range(len(values)), key=lambda g: (rank(values[g]), tie(g)))
            kept = kept[: count(groups_kept, n_groups)]
            for g, group in enumerate(groups):
                if (g in kept) != spare:
                    out[t, group] = fill
        return out

    return answer


def groups_reshaped(
    worth=lambda grouped, kind: grouped.amax(-1) if kind == "max" else grouped.sort(-1).values[..., -2:].sum(-1),
    fill=-math.inf,
    largest=True,
    inverted=False,
    shape=lambda scores, n: scores.reshape(len(scores), n, -1),
):
    def answer(scores, n_groups, groups_kept, group_score="max"):
        grouped = shape(scores, n_groups)
        value = worth(grouped, group_score)
        kept = (value if largest else -value).argsort(dim=-1, descending=True, stable=True)[..., :groups_kept]
        mask = F.one_hot(kept, value.shape[-1]).sum(-2).bool() ^ inverted
        size = scores.shape[-1] // value.shape[-1]
        return torch.where(mask.repeat_interleave(size, dim=-1), grouped.flatten(1), fill)

    return answer


def groups_by_owner(scores, n_groups, groups_kept, group_score="max"):
    n = scores.shape[-1]
    owner = torch.arange(n) * n_groups // n
    worth = torch.stack(
        [scores[:, owner == g].sort(dim=1, descending=True).values[:, : 1 if group_score == "max" else 2].sum(1)
         for g in range(n_groups)], dim=1
    )  # fmt: skip
    best = worth.argsort(dim=1, descending=True, stable=True)[:, :groups_kept]
    allowed = (owner[None, :, None] == best[:, None, :]).any(-1)
    return scores.masked_fill(~allowed, -math.inf)


def interleaved_by_owner(scores, n_groups, groups_kept, group_score="max"):
    owner = torch.arange(scores.shape[-1]) % n_groups
    parts = [scores[:, owner == g].topk(1 if group_score == "max" else 2, dim=1).values.sum(1) for g in range(n_groups)]
    best = torch.stack(parts, dim=1).argsort(dim=1, descending=True, stable=True)[:, :groups_kept]
    return scores.masked_fill(~(owner[None, :, None] == best[:, None, :]).any(-1), -math.inf)


def size_taken_loop(scores, n_groups, groups_kept, group_score="max"):
    rows = []
    for row in scores.tolist():
        groups = [row[i : i + n_groups] for i in range(0, len(row), n_groups)]
        worth = [sum(sorted(group, reverse=True)[: 1 if group_score == "max" else 2]) for group in groups]
        kept = sorted(range(len(groups)), key=lambda g: -worth[g])[:groups_kept]
        rows.append([score if g in kept else -math.inf for g, group in enumerate(groups) for score in group])
    return torch.tensor(rows)


def one_choice_loop(scores, n_groups, groups_kept, group_score="max"):
    size, count = scores.shape[1] // n_groups, 1 if group_score == "max" else 2
    totals = [0.0] * n_groups
    for row in scores.tolist():
        for g in range(n_groups):
            totals[g] += sum(sorted(row[g * size : (g + 1) * size], reverse=True)[:count])
    out = scores.clone()
    for g in sorted(range(n_groups), key=lambda g: -totals[g])[groups_kept:]:
        out[:, g * size : (g + 1) * size] = -math.inf
    return out


def one_choice_summed(scores, n_groups, groups_kept, group_score="max"):
    size, count = scores.shape[1] // n_groups, 1 if group_score == "max" else 2
    worth = scores.view(len(scores), n_groups, size).topk(count, dim=2).values.sum((0, 2))
    mask = torch.zeros(n_groups).index_fill(0, worth.argsort(descending=True, stable=True)[:groups_kept], 1).bool()
    return torch.where(mask.repeat_interleave(size), scores, -math.inf)


def unmasked_loop(scores, n_groups, groups_kept, group_score="max"):
    return torch.stack([row.masked_fill(torch.zeros(len(row), dtype=torch.bool), -math.inf) for row in scores])


def unmasked(scores, n_groups, groups_kept, group_score="max"):
    scores.masked_fill(~groups_reshaped()(scores, n_groups, groups_kept, group_score).isfinite(), -math.inf)
    return scores


def groups_tail(scores, n_groups, groups_kept, group_score="max"):
    grouped = scores.unflatten(1, (n_groups, -1))
    worth = grouped.sort(-1, descending=True).values[..., : 1 if group_score == "max" else 2].sum(-1)
    kept = worth.argsort(dim=1, stable=True)[:, n_groups - groups_kept :]
    mask = (torch.arange(n_groups)[:, None] == kept[:, None]).any(-1)
    return torch.where(mask[..., None], grouped, -math.inf).flatten(1)


def groups_dropped(scores, n_groups, groups_kept, group_score="max"):
    grouped = scores.unflatten(1, (n_groups, -1))
    worth = grouped.amax(-1) if group_score == "max" else grouped.topk(2).values.sum(-1)
    kept = worth.argsort(dim=1, descending=True, stable=True)[:, : n_groups - groups_kept]
    return torch.where(F.one_hot(kept, n_groups).sum(1).bool()[..., None], grouped, -math.inf).flatten(1)


# 2.5: a route row by row, and at once; every argument is a way to go wrong.


def score_row(row, kind):
    if kind == "softmax":
        powers = (row - row.max()).exp()
        return powers / powers.sum()
    return 1 / (1 + (-row).exp())


def limit_row(values, config, kind=None, fill=-math.inf):
    size, kind = len(values) // config.n_groups, kind or config.group_score
    worth = []
    for g in range(config.n_groups):
        best = sorted(values[g * size : (g + 1) * size], reverse=True)
        worth.append(best[0] if kind == "max" else best[0] + best[1])
    kept = sorted(range(config.n_groups), key=lambda g: -worth[g])[: config.groups_kept]
    return [value if e // size in kept else fill for e, value in enumerate(values)]


def route_loop(
    scored=lambda row, config: score_row(row.float(), config.score),
    choosing=lambda row, scores, bias, config: limit_row(plain(scores, bias, config), config),
    chosen=lambda values, k: sorted(range(len(values)), key=lambda e: (-values[e], e))[:k],
    heard=lambda scores, bias: scores,
    normal=lambda weights, scores, config: weights / weights.sum() if config.normalise else weights,
    factor=lambda config: config.scaling_factor,
    told=lambda scores, bias: scores,
    last=lambda weights: weights,
):
    def answer(router_logits, config, selection_bias=None):
        bias = [0.0] * config.n_experts if selection_bias is None else selection_bias.tolist()
        all_scores, all_weights, all_experts = [], [], []
        for row in router_logits:
            scores = scored(row, config)
            experts = chosen(choosing(row.detach().float(), scores.detach().float(), bias, config), config.top_k)
            loud = heard(scores, torch.tensor(bias, dtype=scores.dtype))
            weights = torch.stack([loud[e] for e in experts])
            all_weights.append(normal(weights, loud, config) * factor(config))
            all_scores.append(told(scores, torch.tensor(bias)))
            all_experts.append(experts)
        weights = last(torch.stack(all_weights))
        return Routing(router_logits, torch.stack(all_scores), weights, torch.tensor(all_experts))

    return answer


def limit_rows(values, config, kind=None, fill=-math.inf):
    if config.n_groups == 1:
        return values
    grouped = values.view(len(values), config.n_groups, -1)
    worth = grouped.topk(1 if (kind or config.group_score) == "max" else 2).values.sum(-1)
    mask = torch.zeros_like(worth).scatter(1, worth.topk(config.groups_kept).indices, 1.0).bool()
    return torch.where(mask[:, :, None], grouped, fill).view_as(values)


def route_at_once(
    scored=lambda logits, kind: F.softmax(logits.float(), -1) if kind == "softmax" else torch.sigmoid(logits.float()),
    choosing=lambda logits, scores, bias, config: limit_rows(scores + bias, config),
    chosen=lambda values, k: values.argsort(dim=-1, descending=True, stable=True)[:, :k],
    heard=lambda scores, bias: scores,
    normal=lambda weights, scores, config: weights / weights.sum(1, keepdim=True) if config.normalise else weights,
    factor=lambda config: config.scaling_factor,
    told=lambda scores, bias: scores,
    last=lambda weights: weights,
):
    def answer(router_logits, config, selection_bias=None):
        bias = torch.zeros(config.n_experts) if selection_bias is None else selection_bias
        scores = scored(router_logits, config.score)
        with torch.no_grad():
            experts = chosen(choosing(router_logits, scores, bias, config), config.top_k)
        loud = heard(scores, bias)
        weights = normal(torch.take_along_dim(loud, experts, 1), loud, config)
        return Routing(
            router_logits=router_logits,
            router_scores=told(scores, bias),
            topk_weights=last(weights * factor(config)),
            topk_experts=experts,
        )

    return answer


def route_with_the_package(router_logits, config, selection_bias=None):
    from moe_lab.routing import best_k, limit_groups, score, weigh

    scores = score(router_logits.float(), config.score)
    biased = scores if selection_bias is None else scores + selection_bias
    if config.n_groups > 1:
        biased = limit_groups(biased, config.n_groups, config.groups_kept, config.group_score)
    experts = best_k(biased, config.top_k)
    return Routing(router_logits, scores, weigh(scores, experts, config.normalise, config.scaling_factor), experts)


def one_variable_loop(router_logits, config, selection_bias=None):
    scores, weights, experts = [], [], []
    for row in router_logits:
        mine = score_row(row.float(), config.score)
        mine = mine if selection_bias is None else mine + selection_bias
        spared = torch.tensor(limit_row(mine.tolist(), config))
        mine = torch.where(spared.isinf(), spared, mine)
        ids = sorted(range(len(mine)), key=lambda e: (-float(mine[e]), e))[: config.top_k]
        chosen = torch.stack([mine[e] for e in ids]) * config.scaling_factor
        weights.append(chosen / (chosen.sum() / config.scaling_factor) if config.normalise else chosen)
        scores.append(mine)
        experts.append(ids)
    return Routing(router_logits, torch.stack(scores), torch.stack(weights), torch.tensor(experts))


def one_variable_at_once(router_logits, config, selection_bias=None):
    s = F.softmax(router_logits.float(), 1) if config.score == "softmax" else router_logits.float().sigmoid()
    s = limit_rows(s + (0 if selection_bias is None else selection_bias), config)
    best = s.sort(dim=1, descending=True, stable=True)
    weights, experts = best.values[:, : config.top_k], best.indices[:, : config.top_k]
    if config.normalise:
        weights = weights / weights.sum(1, keepdim=True)
    return Routing(router_logits, s, weights * config.scaling_factor, experts)


def none_added(router_logits, config, selection_bias=None):
    scores = F.softmax(router_logits.float(), 1) if config.score == "softmax" else router_logits.float().sigmoid()
    _ = scores + selection_bias
    return route_at_once()(router_logits, config, selection_bias)


def none_added_first(router_logits, config, selection_bias=None):
    for row in router_logits.detach().float():
        _ = selection_bias + row
    return route_loop()(router_logits, config, selection_bias)


def second_name(router_logits, config, selection_bias=None):
    scores = F.softmax(router_logits.float(), -1) if config.score == "softmax" else router_logits.float().sigmoid()
    by = scores
    if selection_bias is not None:
        by += selection_bias
    experts = limit_rows(by.detach(), config).argsort(dim=-1, descending=True, stable=True)[:, : config.top_k]
    weights = scores.gather(-1, experts)
    weights = weights / weights.sum(-1, keepdim=True) if config.normalise else weights
    return Routing(router_logits, scores, weights * config.scaling_factor, experts)


def added_row_by_row(router_logits, config, selection_bias=None):
    logits = router_logits.float()
    scores = torch.softmax(logits, 1) if config.score == "softmax" else torch.sigmoid(logits)
    for e in range(config.n_experts if selection_bias is not None else 0):
        scores[:, e] += selection_bias[e]
    ids = [limit_row(row.tolist(), config) for row in scores.detach()]
    experts = torch.tensor([sorted(range(len(r)), key=lambda e: (-r[e], e))[: config.top_k] for r in ids])
    weights = torch.take_along_dim(scores, experts, 1)
    if config.normalise:
        weights = weights / weights.sum(1)[:, None]
    return Routing(router_logits, scores, config.scaling_factor * weights, experts)


def masked_loop(router_logits, config, selection_bias=None):
    right = route_loop()(router_logits, config, selection_bias)
    bias = [0.0] * config.n_experts if selection_bias is None else selection_bias.tolist()
    masked = []
    for row in right.router_scores:
        limited = limit_row(plain(row.detach(), bias, config), config)
        masked.append(torch.stack([s if v > -math.inf else s - math.inf for s, v in zip(row, limited)]))  # noqa: B905
    return Routing(router_logits, torch.stack(masked), right.topk_weights, right.topk_experts)


def masked_at_once(router_logits, config, selection_bias=None):
    right = route_at_once()(router_logits, config, selection_bias)
    return Routing(router_logits, limit_rows(right.router_scores, config), right.topk_weights, right.topk_experts)


def config_asked_loop(router_logits, config, selection_bias=None):
    bias = selection_bias if config.selection_bias is True else None
    return route_loop()(router_logits, config, bias)


def config_asked(router_logits, config, selection_bias=None):
    extra = selection_bias if selection_bias is not None else torch.zeros(config.n_experts)
    return route_at_once()(router_logits, config, extra * config.selection_bias)


def exchanged_loop(router_logits, config, selection_bias=None):
    right = route_loop()(router_logits, config, selection_bias)
    return Routing(router_logits, right.router_scores, right.topk_experts, right.topk_weights)


def exchanged(router_logits, config, selection_bias=None):
    right = vars(route_at_once()(router_logits, config, selection_bias))
    return Routing(*(right[name] for name in ("router_logits", "router_scores", "topk_experts", "topk_weights")))


def too_many_groups_loop(router_logits, config, selection_bias=None):
    for row in router_logits.detach().float() if config.n_groups > 1 else []:
        torch.topk(row.view(config.groups_kept, -1).amax(1), config.n_groups)
    return route_loop()(router_logits, config, selection_bias)


def too_many_groups(router_logits, config, selection_bias=None):
    from moe_lab.routing import limit_groups

    scores = router_logits.detach().float().sigmoid()
    if config.n_groups > 1:
        scores = limit_groups(scores, config.groups_kept, config.n_groups, config.group_score)
    return route_at_once()(router_logits, config, selection_bias)


def twice(logits, kind):
    def once(values):
        return F.softmax(values, -1) if kind == "softmax" else torch.sigmoid(values)

    return once(once(logits.float()))


def plain(values, bias, config):
    return [v + b for v, b in zip(values.tolist(), bias, strict=True)]


# 2.6: experts that choose.


def experts_choose_loop(
    order=lambda score, t: (-score, t),
    axis=1,
    keep=lambda tokens: tokens,
    weight=lambda w: w,
    seen=lambda s, x: s,
):
    def answer(router_logits, capacity):
        router_logits = router_logits.float()
        scores = torch.stack([score_row(row, "softmax") for row in (router_logits if axis else router_logits.T)])
        scores = scores if axis else scores.T
        values = seen(scores, router_logits).tolist()
        tokens, weights = [], []
        for e in range(scores.shape[1]):
            ids = sorted(range(len(values)), key=lambda t: order(values[t][e], t))[:capacity]
            tokens.append(keep(ids))
            weights.append(weight(torch.stack([scores[t, e] for t in tokens[-1]])))
        return ExpertChoice(scores, torch.stack(weights), torch.tensor(tokens))

    return answer


def experts_choose(
    axis=-1,
    order=lambda s: s.argsort(dim=0, descending=True, stable=True),
    seen=lambda s, x: s,
    weight=lambda w: w,
    look=torch.Tensor.float,
):
    def answer(router_logits, capacity):
        scores = F.softmax(look(router_logits), axis)
        tokens = order(seen(scores, router_logits))[:capacity]  # (C, E)
        return ExpertChoice(scores, weight(scores.gather(0, tokens)).T.contiguous(), tokens.T.contiguous())

    return answer


def experts_choose_with_topk(router_logits, capacity):
    scores = router_logits.float().softmax(dim=1).T  # (E, T)
    tokens = scores.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    return ExpertChoice(scores.T, scores.gather(1, tokens), tokens)


def tokens_choose_loop(router_logits, capacity):
    rows = [score_row(row.float(), "softmax") for row in router_logits]
    ids = [sorted(range(len(row)), key=lambda e: (-float(row[e]), e))[:capacity] for row in rows]
    weights = [torch.stack([row[e] for e in chosen]) for row, chosen in zip(rows, ids, strict=True)]
    return ExpertChoice(torch.stack(rows), torch.stack(weights), torch.tensor(ids))


def tokens_choose_sorted(router_logits, capacity):
    scores = F.softmax(router_logits.float(), dim=1)
    ranked = scores.sort(dim=1, descending=True, stable=True)
    return ExpertChoice(scores, ranked.values[:, :capacity].clone(), ranked.indices[:, :capacity].clone())


def turned_loop(router_logits, capacity):
    right = experts_choose_loop()(router_logits, capacity)
    return ExpertChoice(right.router_scores, right.weights.T, right.tokens.T)


def turned_sorted(router_logits, capacity):
    ranked = F.softmax(router_logits.float(), 1).sort(dim=0, descending=True, stable=True)
    return ExpertChoice(
        F.softmax(router_logits.float(), 1), ranked.values[:capacity].clone(), ranked.indices[:capacity].clone()
    )


def in_order_sorted(router_logits, capacity):
    scores = F.softmax(router_logits.float(), -1)
    rank = scores.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    tokens = (rank < capacity).T.nonzero()[:, 1].view(scores.shape[1], capacity)
    return ExpertChoice(scores, scores.T.gather(1, tokens), tokens)


def own_precision_loop(router_logits, capacity):
    scores = torch.stack([torch.softmax(row, 0) for row in router_logits])
    columns = [list(map(float, column)) for column in scores.unbind(1)]
    tokens = [sorted(range(len(c)), key=lambda t, c=c: (-c[t], t))[:capacity] for c in columns]
    weights = torch.stack([scores[ids, e] for e, ids in enumerate(tokens)])
    return ExpertChoice(scores, weights, torch.tensor(tokens))


def parts_exchanged_loop(router_logits, capacity):
    right = experts_choose_loop()(router_logits, capacity)
    return ExpertChoice(right.router_scores, right.tokens, right.weights)


def parts_exchanged(router_logits, capacity):
    right = experts_choose()(router_logits, capacity)
    return ExpertChoice(router_scores=right.router_scores, weights=right.tokens, tokens=right.weights)


def read_down_loop(router_logits, capacity):
    right = experts_choose_loop()(router_logits, capacity)
    table = right.router_scores.tolist()
    weights = [[table[t][place] for place, t in enumerate(row)] for row in right.tokens.tolist()]
    return ExpertChoice(right.router_scores, torch.tensor(weights), right.tokens)


def read_down(router_logits, capacity):
    right = experts_choose()(router_logits, capacity)
    return ExpertChoice(right.router_scores, torch.gather(right.router_scores, 0, right.tokens), right.tokens)


RIGHT = {
    "2.1": [best_loop(), best_argsort(), best_lexsort, best_one_by_one],
    "2.2": [weigh_loop(), weigh_indexed(), weigh_masked],
    "2.3": [
        gradient_loop(lambda w, g, mean, i: w[i] * (g[i] - mean)),
        gradient_jacobian(softmax_jacobian),
        gradient_autograd,
        gradient_dense,
    ],
    "2.4": [groups_loop(), groups_reshaped(), groups_by_owner],
    "2.5": [route_loop(), route_at_once(), route_with_the_package],
    "2.6": [experts_choose_loop(), experts_choose(), experts_choose_with_topk],
}

WRONG = {
    "2.1": {
        "any of equal scores": [topk_row_by_row, lambda scores, k: torch.topk(scores, k)[1]],
        "ties to the highest id": [best_loop(order=lambda score, e: (-score, -e)), highest_id_lexsort],
        "the best comes last": [
            best_loop(keep=lambda ids, k: ids[:k][::-1]),
            best_argsort(keep=lambda ids, k: ids[:, :k].flip(1)),
        ],
        "the end of an ascending order": [
            best_loop(order=lambda score, e: (score, e), keep=lambda ids, k: ids[len(ids) - k :]),
            best_argsort(descending=False, keep=lambda ids, k: ids[:, ids.shape[1] - k :]),
        ],
        "ids in order": [
            best_loop(keep=lambda ids, k: sorted(ids[:k])),
            best_argsort(keep=lambda ids, k: ids[:, :k].sort(dim=1).values),
        ],
        "the smallest scores": [
            best_loop(order=lambda score, e: (score, e)),
            best_argsort(look=lambda scores: -scores),
        ],
        "the sign is lost": [
            best_loop(order=lambda score, e: (-abs(score), e)),
            best_argsort(look=lambda scores: scores.square()),
        ],
        "rounded before comparing": [
            best_loop(seen=in_bf16),
            best_argsort(look=lambda scores: scores.to(torch.bfloat16)),
        ],
        "tokens in place of experts": [
            best_tokens_loop,
            lambda scores, k: scores.argsort(dim=0, descending=True, stable=True)[:k],
        ],
        "one set for all tokens": [one_set_loop, one_set_summed],
        "scores in place of ids": [
            best_loop(show=lambda row, ids: [row[e] for e in ids]),
            lambda scores, k: torch.topk(scores, k, dim=1)[0],
        ],
        "a mask in place of ids": [best_loop(show=mask_of), mask_by_rank],
    },
    "2.2": {
        "scaled before normalising": [scaled_first_loop, weigh_indexed(first=True)],
        "scaled only if normalised": [scaled_if_normalised_loop, scaled_if_normalised],
        "scaling factor forgotten": [weigh_loop(scale=lambda w, factor: w), weigh_indexed(scaled=False)],
        "weights not normalised": [weigh_loop(always=False), weigh_indexed(always=False)],
        "always normalised": [weigh_loop(always=True), weigh_indexed(always=True)],
        "normalised before the choice": [
            weigh_loop(part=lambda mine, chosen, row: mine / sum(row)),
            weigh_indexed(divisor=lambda chosen, scores: scores.sum(dim=1, keepdim=True)),
        ],
        "a row in place of a column": [a_row_of_sums, weigh_indexed(divisor=lambda chosen, scores: chosen.sum(1))],
        "normalised over the tokens": [over_tokens_loop, weigh_indexed(divisor=lambda chosen, scores: chosen.sum(0))],
        "normalised over everything": [
            over_everything_loop,
            weigh_indexed(divisor=lambda chosen, scores: chosen.sum()),
        ],
        "softmax taken twice": [
            weigh_loop(part=lambda mine, chosen, row: mine.exp() / sum(value.exp() for value in chosen)),
            softmax_again,
        ],
        "divided by the largest": [
            weigh_loop(part=lambda mine, chosen, row: mine / max(chosen)),
            weigh_indexed(divisor=lambda chosen, scores: chosen.max(1, keepdim=True).values),
        ],
        "the largest in place of the chosen": [largest_loop, largest_sorted],
        "rows in place of columns": [rows_loop, rows_selected],
        "a column for every expert": [for_all_loop, for_all_masked],
        "no gradient": [weigh_numbers, weigh_without_grad],
    },
    "2.3": {
        "the scatter's result is dropped": [zeros_loop, zeros_scattered],
        "a row in place of a column": [row_of_means_loop, row_of_means],
        "every row gets every token's numbers": [all_rows_loop, all_rows_indexed],
        "nothing is compared": [
            gradient_loop(lambda w, g, mean, i: w[i] * g[i]),
            gradient_jacobian(torch.diag_embed),
        ],
        "a mean without the weights": [
            gradient_loop(lambda w, g, mean, i: w[i] * (g[i] - mean), mean=lambda w, g, k: sum(g) / k),
            gradient_jacobian(lambda w: torch.diag_embed(w) - w[:, None, :] / w.shape[1]),
        ],
        "each weight by itself": [
            gradient_loop(lambda w, g, mean, i: w[i] * (1 - w[i]) * g[i]),
            gradient_jacobian(lambda w: torch.diag_embed(w - w * w)),
        ],
        "the factor w in front is missing": [
            gradient_loop(lambda w, g, mean, i: g[i] - mean),
            gradient_jacobian(lambda w: torch.eye(w.shape[1]) - w[:, :, None]),
        ],
        "the passed-over are pushed": [pushed_loop, pushed_dense],
        "the sign is turned": [
            gradient_loop(lambda w, g, mean, i: w[i] * (mean - g[i])),
            gradient_jacobian(lambda w: -softmax_jacobian(w)),
        ],
        "slots in place of experts": [
            gradient_loop(lambda w, g, mean, i: w[i] * (g[i] - mean), place=lambda slot, expert: slot),
            first_columns,
        ],
        "one number a choice": [slots_loop, slots_einsum],
        "the mean of all tokens": [mean_of_all_loop, mean_of_all_dense],
        "summed over the tokens": [summed_loop, summed_dense],
    },
    "2.4": {
        "nothing is masked": [unmasked_loop, unmasked],
        "everything is masked": [
            lambda scores, *rule: torch.full(scores.shape, -math.inf),
            groups_loop(
                members=lambda g, n_groups, n: range(g * (n // n_groups), (g + 1) * (n // n_groups)),
                count=lambda kept, n_groups: 0,
            ),
        ],
        "any of equal groups": [groups_loop(tie=lambda g: -g), groups_tail],
        "the number kept is dropped": [groups_loop(count=lambda kept, n: n - kept), groups_dropped],
        "interleaved groups": [
            groups_loop(members=lambda g, n_groups, n: range(g, n, n_groups)),
            interleaved_by_owner,
        ],
        "the number taken for the size": [
            size_taken_loop,
            groups_reshaped(shape=lambda scores, n: scores.reshape(len(scores), -1, n)),
        ],
        "masked with 0": [groups_loop(fill=0.0), groups_reshaped(fill=0.0)],
        "always the best score": [
            groups_loop(worth=lambda best, kind: best[0]),
            groups_reshaped(worth=lambda grouped, kind: grouped.max(-1).values),
        ],
        "always the two best": [
            groups_loop(worth=lambda best, kind: best[0] + best[1]),
            groups_reshaped(worth=lambda grouped, kind: grouped.sort(-1).values[..., -2:].sum(-1)),
        ],
        "the whole group counts": [
            groups_loop(worth=lambda best, kind: best[0] if kind == "max" else sum(best)),
            groups_reshaped(worth=lambda grouped, kind: grouped.amax(-1) if kind == "max" else grouped.sum(-1)),
        ],
        "the mean of the group": [
            groups_loop(worth=lambda best, kind: sum(best) / len(best)),
            groups_reshaped(worth=lambda grouped, kind: grouped.mean(-1)),
        ],
        "the worst groups kept": [groups_loop(rank=lambda value: value), groups_reshaped(largest=False)],
        "the kept are masked": [groups_loop(spare=False), groups_reshaped(inverted=True)],
        "one choice for all tokens": [one_choice_loop, one_choice_summed],
    },
    "2.5": {
        "None is added": [none_added_first, none_added],
        "the scores are changed in place": [added_row_by_row, second_name],
        "weights and experts exchanged": [exchanged_loop, exchanged],
        "the config is asked in place of the argument": [config_asked_loop, config_asked],
        "one variable for choosing and weighing": [one_variable_loop, one_variable_at_once],
        "masked scores returned": [masked_loop, masked_at_once],
        "the bias stays in the scores": [
            route_loop(heard=lambda scores, bias: scores + bias, told=lambda scores, bias: scores + bias),
            route_at_once(heard=lambda scores, bias: scores + bias, told=lambda scores, bias: scores + bias),
        ],
        "bias folded into the weights": [
            route_loop(heard=lambda scores, bias: scores + bias),
            route_at_once(heard=lambda scores, bias: scores + bias),
        ],
        "the bias is ignored": [
            route_loop(choosing=lambda row, scores, bias, config: limit_row(scores.tolist(), config)),
            route_at_once(choosing=lambda logits, scores, bias, config: limit_rows(scores, config)),
        ],
        "bias on the logits": [
            route_loop(
                choosing=lambda row, scores, bias, config: limit_row(
                    score_row(row + torch.tensor(bias), config.score).tolist(), config
                )
            ),
            route_at_once(
                choosing=lambda logits, scores, bias, config: limit_rows(
                    (logits + bias).softmax(-1) if config.score == "softmax" else (logits + bias).sigmoid(), config
                )
            ),
        ],
        "groups limited before the bias": [
            route_loop(
                choosing=lambda row, scores, bias, config: plain(
                    torch.tensor(limit_row(scores.tolist(), config)), bias, config
                )
            ),
            route_at_once(choosing=lambda logits, scores, bias, config: limit_rows(scores, config) + bias),
        ],
        "the groups are ignored": [
            route_loop(choosing=lambda row, scores, bias, config: plain(scores, bias, config)),
            route_at_once(choosing=lambda logits, scores, bias, config: scores + bias),
        ],
        "groups and groups kept exchanged": [too_many_groups_loop, too_many_groups],
        "the rule for groups is not passed on": [
            route_loop(
                choosing=lambda row, scores, bias, config: limit_row(plain(scores, bias, config), config, kind="max")
            ),
            route_at_once(choosing=lambda logits, scores, bias, config: limit_rows(scores + bias, config, kind="max")),
        ],
        "masked with 0": [
            route_loop(
                choosing=lambda row, scores, bias, config: limit_row(plain(scores, bias, config), config, fill=0.0)
            ),
            route_at_once(choosing=lambda logits, scores, bias, config: limit_rows(scores + bias, config, fill=0.0)),
        ],
        "any of equal scores": [
            route_loop(chosen=lambda values, k: torch.tensor(values).topk(k).indices.tolist()),
            route_at_once(chosen=lambda values, k: torch.topk(values, k)[1]),
        ],
        "score taken twice": [
            route_loop(scored=lambda row, config: score_row(score_row(row.float(), config.score), config.score)),
            route_at_once(scored=twice),
        ],
        "softmax over the chosen scores": [
            route_loop(
                normal=lambda weights, scores, config: score_row(weights, "softmax") if config.normalise else weights
            ),
            route_at_once(
                normal=lambda weights, scores, config: F.softmax(weights, 1) if config.normalise else weights
            ),
        ],
        "always softmax": [
            route_loop(scored=lambda row, config: score_row(row.float(), "softmax")),
            route_at_once(scored=lambda logits, kind: F.softmax(logits.float(), dim=-1)),
        ],
        "normalised before the choice": [
            route_loop(normal=lambda weights, scores, config: weights / scores.sum() if config.normalise else weights),
            route_at_once(
                normal=lambda weights, scores, config: weights / (scores.sum(1)[:, None] if config.normalise else 1)
            ),
        ],
        "normalise and factor exchanged": [
            route_loop(
                normal=lambda weights, scores, config: weights / weights.sum(), factor=lambda config: config.normalise
            ),
            route_at_once(
                normal=lambda weights, scores, config: F.normalize(weights, p=1, dim=1) * int(config.normalise),
                factor=lambda config: 1,
            ),
        ],
        "normalise is not passed on": [
            route_loop(normal=lambda weights, scores, config: weights / weights.sum()),
            route_at_once(normal=lambda weights, scores, config: weights / weights.sum(1, keepdim=True)),
        ],
        "never normalised": [
            route_loop(normal=lambda weights, scores, config: weights),
            route_at_once(normal=lambda weights, scores, config: weights),
        ],
        "the scaling factor is not passed on": [
            route_loop(factor=lambda config: 1.0),
            route_at_once(factor=lambda config: 1.0),
        ],
        "biased scores returned": [
            route_loop(told=lambda scores, bias: scores + bias),
            route_at_once(told=lambda scores, bias: scores + bias),
        ],
        "scores in the logits' precision": [
            route_loop(scored=lambda row, config: row.softmax(-1) if config.score == "softmax" else row.sigmoid()),
            route_at_once(
                scored=lambda logits, kind: F.softmax(logits, -1) if kind == "softmax" else F.sigmoid(logits)
            ),
        ],
        "no gradient": [
            route_loop(last=lambda weights: weights.detach()),
            route_at_once(last=lambda weights: torch.tensor(weights.tolist())),
        ],
    },
    "2.6": {
        "softmax over the tokens": [experts_choose_loop(axis=0), experts_choose(axis=0)],
        "tokens choose": [tokens_choose_loop, tokens_choose_sorted],
        "experts and tokens exchanged in the result": [turned_loop, turned_sorted],
        "weights and tokens exchanged": [parts_exchanged_loop, parts_exchanged],
        "weights of other tokens": [read_down_loop, read_down],
        "scores in the logits' precision": [
            own_precision_loop,
            experts_choose(look=lambda logits: logits),
        ],
        "the logits choose": [
            experts_choose_loop(seen=lambda scores, logits: logits),
            experts_choose(seen=lambda scores, logits: logits),
        ],
        "weights normalised": [
            experts_choose_loop(weight=lambda w: w / w.sum()),
            experts_choose(weight=lambda w: w / w.sum(0)),
        ],
        "tokens in order": [experts_choose_loop(keep=sorted), in_order_sorted],
        "the latest of equal tokens": [
            experts_choose_loop(order=lambda score, t: (-score, -t)),
            experts_choose(order=lambda s: len(s) - 1 - s.flip(0).argsort(dim=0, descending=True, stable=True)),
        ],
    },
}
