"""Right answers to chapter 6 in three styles, and each of its mistakes in two forms: plain loops, and vectorised."""

import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from moe_lab.config import RouterConfig
from moe_lab.moe import moe_loop
from moe_lab.routing import limit_groups, route, weigh

# 6.1 combinations: step by step, and from factorials.


def step_by_step(moe):
    ways = 1
    for i in range(moe.top_k):
        ways = ways * (moe.n_experts - i) // (i + 1)
    return ways


def from_factorials(moe):
    return math.factorial(moe.n_experts) // math.factorial(moe.top_k) // math.factorial(moe.n_experts - moe.top_k)


def a_row_of_pascals_triangle(moe):
    row = [1] + [0] * moe.top_k
    for _ in range(moe.n_experts):
        row = [1] + [a + b for a, b in itertools.pairwise(row)]
    return row[moe.top_k]


def in_steps(experts=lambda moe: moe.n_experts, chosen=lambda moe: moe.top_k, divide=lambda x, y: x // y):
    def answer(moe):
        ways = 1
        for i in range(chosen(moe)):
            ways = divide(ways * (experts(moe) - i), i + 1)
        return ways

    return answer


def in_factorials(experts=lambda moe: moe.n_experts, chosen=lambda moe: moe.top_k, divide=lambda x, y: x // y):
    def answer(moe):
        e, k = experts(moe), chosen(moe)
        return divide(math.factorial(e), math.factorial(k) * math.factorial(e - k))

    return answer


def rounded_steps(moe):
    ways = 1.0
    for i in range(moe.top_k):
        ways = ways * (moe.n_experts - i) / (i + 1)
    return round(ways)


def rounded_quotient(moe):
    e, k = moe.n_experts, moe.top_k
    return int(math.factorial(e) / (math.factorial(k) * math.factorial(e - k)))


def ordered_in_steps(moe):
    ways = 1
    for i in range(moe.top_k):
        ways *= moe.n_experts - i
    return ways


def ordered_in_factorials(moe):
    return math.factorial(moe.n_experts) // math.factorial(moe.n_experts - moe.top_k)


def free_in_steps(moe):
    ways = 1
    for _ in range(moe.top_k):
        ways *= moe.n_experts
    return ways


def added_up(moe):
    total = 0
    for _ in range(moe.top_k):
        total += moe.n_experts
    return total


# 6.2 cutting: as a dict, and by going through the fields one after the other.


def cut_as_a_dict(moe, m, n_shared=0):
    return {
        "d_ff": moe.d_ff // m,
        "n_experts": m * moe.n_experts - n_shared,
        "top_k": m * moe.top_k - n_shared,
        "n_shared_experts": n_shared,
    }


def cut_through_a_config(moe, m, n_shared=0):
    small = replace(
        moe, d_ff=moe.d_ff // m, n_experts=moe.n_experts * m, top_k=moe.top_k * m, n_shared_experts=0, d_ff_shared=None
    )
    return {
        "d_ff": small.d_ff,
        "n_experts": small.n_experts - n_shared,
        "top_k": small.top_k - n_shared,
        "n_shared_experts": n_shared,
    }


def cut_by_shares(moe, m, n_shared=0):
    names = ("d_ff", "n_experts", "top_k", "n_shared_experts")
    width, _ = divmod(moe.d_ff, m)
    numbers = (width, *(m * number - n_shared for number in (moe.n_experts, moe.top_k)), n_shared)
    return dict(zip(names, numbers, strict=True))


def changed(**change):
    """The right dict, some of its entries replaced by what `change` makes of (moe, m, s)."""

    def answer(moe, m, n_shared=0):
        right = {
            "n_shared_experts": n_shared,
            "top_k": moe.top_k * m - n_shared,
            "n_experts": moe.n_experts * m - n_shared,
            "d_ff": moe.d_ff // m,
        }
        for name, what in change.items():
            right[name] = what(moe, m, n_shared)
        return right

    return answer


def counted_out(width=None, experts=None, chosen=None, shared=None):
    """The pieces of the layer, listed and counted."""

    def answer(moe, m, n_shared=0):
        pieces = [(e, i) for e in range(moe.n_experts) for i in range(m)]
        used = [(e, i) for e in range(moe.top_k) for i in range(m)]
        return {
            "d_ff": width(moe, m) if width else len(range(0, moe.d_ff, m)),
            "n_experts": experts(pieces, n_shared, m) if experts else len(pieces[n_shared:]),
            "top_k": chosen(used, n_shared, m) if chosen else len(used[n_shared:]),
            "n_shared_experts": shared(n_shared, m) if shared else len(pieces[:n_shared]),
        }

    return answer


# 6.3 the shared path: token by token, and as one contraction.


def all_at_once(
    weights=lambda r: r.dense_weights, after=lambda routed, shared, r: routed + shared.sum(0), reads=lambda x, s: x
):
    """Routed experts in one einsum, shared ones stacked, (S, T, D)."""

    def answer(x, routing, expert, shared):
        start = reads(x, shared)
        everything = torch.stack([expert(e, start) for e in range(routing.n_experts)], dim=1)
        routed = torch.einsum("te,ted->td", weights(routing), everything)
        return after(routed, torch.stack([one(x) for one in shared]), routing)

    return answer


def token_by_token(
    weight=lambda w: w,
    shared_part=lambda shared, row, r, t, routed: sum(one(row) for one in shared),
    whole=lambda routed, common, row: routed + common,
    reads=lambda shared, row: row,
):
    def answer(x, routing, expert, shared):
        rows = []
        for t in range(len(x)):
            row = x[t : t + 1]
            routed = torch.zeros_like(row)
            for e, w in zip(routing.topk_experts[t].tolist(), routing.topk_weights[t], strict=True):
                routed = routed + weight(w) * expert(e, reads(shared, row))
            rows.append(whole(routed, shared_part(shared, row, routing, t, routed), row))
        return torch.cat(rows)

    return answer


def added_in_a_loop(x, routing, expert, shared):
    y = moe_loop(x, routing, expert)
    for one in shared:
        y = y + one(x)
    return y


def chain(x, shared):
    y = x
    for one in shared:
        y = one(y)
    return y


def chained_shared(x, routing, expert, shared):
    return moe_loop(x, routing, expert) + chain(x, shared)


def sequence_of_paths(x, routing, expert, shared):
    y = moe_loop(x, routing, expert)
    total = y.clone()
    for one in shared:
        total = total + one(y)
    return total


def shared_inside_of_the_loop(x, routing, expert, shared):
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        rows = routing.topk_weights[tokens, slots, None] * expert(e, x[tokens]) + sum(one(x[tokens]) for one in shared)
        y = y.index_add(0, tokens, rows)
    return y


def with_weights_of_routed(x, routing, expert, shared):
    y = moe_loop(x, routing, expert)
    for i, one in enumerate(shared):
        mine = ((routing.topk_experts == i) * routing.topk_weights).sum(1)[:, None]
        y = y + mine * one(x)
    return y


def reads_all(x, routing, expert, shared):
    """One FFN after the other, as in a block."""
    common = torch.stack([one(x) for one in shared]).sum(0)
    y = common.clone()
    for e in range(routing.n_experts):
        y = y + routing.dense_weights[:, e, None] * expert(e, x + common)
    return y


def weight_of_id(shared, row, r, t, routed):
    return sum(r.dense_weights[t, i] * one(row) for i, one in enumerate(shared))


# 6.4 the gate: row by row, and as a contraction.


def gate_row_by_row(opened=lambda number: 1 / (1 + torch.exp(-number)), whole=None):
    def answer(x, shared, w_gate):
        rows = []
        for row in x:
            number = (row * w_gate[0]).sum()
            out = shared(row[None])[0]
            rows.append(whole(number, out, row, shared) if whole else opened(number) * out)
        return torch.stack(rows)

    return answer


def gate_in_one(number=lambda x, w, y: torch.einsum("td,od->to", x, w), join=lambda n, y: n.sigmoid() * y):
    def answer(x, shared, w_gate):
        y = shared(x)
        return join(number(x, w_gate, y), y)

    return answer


def gated_by_matmul(x, shared, w_gate):
    return shared(x) * torch.special.expit(x @ w_gate.T)


def softmax_of_one(x, shared, w_gate):
    return torch.softmax(x @ w_gate.T, dim=1) * shared(x)


def over_tokens_in_a_loop(x, shared, w_gate):
    powers = [torch.exp((row * w_gate[0]).sum()) for row in x]
    return torch.stack([p / sum(powers) * shared(row[None])[0] for p, row in zip(powers, x, strict=True)])


def unused(x, shared, w_gate):
    return torch.cat([shared(row[None]) for row in x])


def open_gate(x, shared, w_gate):
    return torch.ones(len(x), 1) * shared(x)


def numbers_of_gate(x, shared, w_gate):
    gates = [torch.tanh((row * w_gate[0]).sum() / 2).item() / 2 + 0.5 for row in x]
    return torch.stack([g * shared(row[None])[0] for g, row in zip(gates, x, strict=True)])


def gate_without_grad(x, shared, w_gate):
    with torch.no_grad():
        gate = torch.sigmoid(x @ w_gate.T)
    return gate * shared(x)


def gates_as_a_row(x, shared, w_gate):
    return torch.sigmoid(x @ w_gate[0]) * shared(x)


def gates_as_a_flat_row(x, shared, w_gate):
    gates = torch.stack([torch.sigmoid(torch.dot(row, w_gate[0])) for row in x])
    return shared(x) * gates


def gate_of_the_mean(x, shared, w_gate):
    mean = sum((row * w_gate[0]).sum() for row in x) / len(x)
    return torch.sigmoid(mean) * shared(x)


def gate_of_the_mean_token(x, shared, w_gate):
    return shared(x) * torch.sigmoid(x.mean(0) @ w_gate[0])


# 6.5 DeepSeek-V3's router: token by token in lists, and in tensors.


def sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def in_lists(
    score=sigmoid,
    bias_in_scores=lambda s, b, z: s + b,
    worth=lambda group, plain: sum(sorted(group)[-2:]),
    order=lambda worths: sorted(range(len(worths)), key=lambda g: -worths[g]),
    masked=-math.inf,
    weights=lambda scores, chosen, biased: scores[chosen] / scores[chosen].sum(),
    members=lambda n, g, size, group: range(g * size, (g + 1) * size),
    scale=lambda w, factor: factor * w,
    groups_of=lambda n_experts, n_groups: n_groups,
    all_scores=None,
):
    def answer(logits, bias, n_groups, groups_kept, top_k, factor):
        all_weights, all_experts = [], []
        for row in logits:
            scores = all_scores(row) if all_scores else torch.stack([score(z) for z in row])
            biased = [float(bias_in_scores(s, b, z)) for s, b, z in zip(scores, bias, row, strict=True)]
            n, total = groups_of(len(row), n_groups), len(row)
            groups = [list(members(total, g, total // n, n)) for g in range(n)]
            worths = [worth([biased[e] for e in group], [float(scores[e]) for e in group]) for group in groups]
            allowed = {e for g in order(worths)[:groups_kept] for e in groups[g]}
            limited = [biased[e] if e in allowed else masked for e in range(total)]
            chosen = sorted(range(total), key=lambda e: (-limited[e], e))[:top_k]
            all_weights.append(scale(weights(scores, chosen, torch.tensor(biased)), factor))
            all_experts.append(chosen)
        return torch.stack(all_weights), torch.tensor(all_experts)

    return answer


def in_tensors(
    score=lambda z: F.logsigmoid(z).exp(),
    biased_of=lambda s, b, z: s + b,
    worth=lambda grouped, plain: grouped.sort(dim=-1).values[..., -2:].sum(-1),
    descending=True,
    masked=-torch.inf,
    weights=lambda s, experts, biased: s.gather(1, experts) / s.gather(1, experts).sum(1, keepdim=True),
    scale=lambda w, factor: w * factor,
    split=lambda values, n: values.view(len(values), n, -1),
    join=lambda grouped: grouped.flatten(1),
    groups_of=lambda n_experts, n_groups: n_groups,
):
    def answer(logits, bias, n_groups, groups_kept, top_k, factor):
        n = groups_of(logits.shape[1], n_groups)
        s = score(logits)
        biased = biased_of(s.detach(), bias, logits.detach())
        grouped = split(biased, n)
        worths = worth(grouped, split(s.detach(), n))
        best = worths.argsort(dim=1, descending=descending, stable=True)[:, :groups_kept]
        kept = F.one_hot(best, n).sum(1).bool()
        limited = join(torch.where(kept[..., None], grouped, torch.tensor(masked)))
        experts = limited.argsort(dim=1, descending=True, stable=True)[:, :top_k]
        return scale(weights(s, experts, biased), factor), experts

    return answer


def by_the_package(logits, bias, n_groups, groups_kept, top_k, factor):
    rule = RouterConfig(
        d_model=3,
        n_experts=logits.shape[1],
        top_k=top_k,
        score="sigmoid",
        scaling_factor=factor,
        n_groups=n_groups,
        groups_kept=groups_kept,
        group_score="top2_sum",
        selection_bias=True,
    )
    found = route(logits, rule, bias)
    return found.topk_weights, found.topk_experts


def by_steps_of_the_package(logits, bias, n_groups, groups_kept, top_k, factor):
    scores = torch.sigmoid(logits)
    limited = limit_groups(scores.detach() + bias, n_groups, groups_kept, "top2_sum")
    experts = limited.topk(top_k).indices
    return weigh(scores, experts, True, factor), experts


def exchanged_at_the_end(*args):
    return by_steps_of_the_package(*args)[::-1]


def exchanged_from_lists(*args):
    weights, experts = in_lists()(*args)
    return experts, weights


def added_in_place(logits, bias, n_groups, groups_kept, top_k, factor):
    scores = torch.sigmoid(logits)
    biased = scores
    with torch.no_grad():
        biased += bias
    experts = limit_groups(biased, n_groups, groups_kept, "top2_sum").topk(top_k).indices
    return weigh(scores, experts, True, factor), experts


def added_by_a_method(logits, bias, n_groups, groups_kept, top_k, factor):
    scores = logits.sigmoid()
    choosing = scores.add_(bias)
    choosing = limit_groups(choosing.detach(), n_groups, groups_kept, "top2_sum")
    experts = choosing.argsort(dim=1, descending=True)[:, :top_k]
    chosen = scores.gather(1, experts)
    return factor * chosen / chosen.sum(1, keepdim=True), experts


def places_in_lists(logits, bias, n_groups, groups_kept, top_k, factor):
    rows, ids = [], []
    for z in logits:
        s = torch.sigmoid(z)
        groups = [list(range(g * len(z) // n_groups, (g + 1) * len(z) // n_groups)) for g in range(n_groups)]
        worth = [sum(sorted(float(s[e] + bias[e]) for e in group)[-2:]) for group in groups]
        kept = sorted(range(n_groups), key=lambda g: -worth[g])[:groups_kept]
        left = [e for g in kept for e in groups[g]]
        best = sorted(range(len(left)), key=lambda i: -float(s[left[i]] + bias[left[i]]))[:top_k]
        chosen = s[[left[i] for i in best]]
        rows.append(factor * chosen / chosen.sum())
        ids.append(best)
    return torch.stack(rows), torch.tensor(ids)


def places_in_tensors(logits, bias, n_groups, groups_kept, top_k, factor):
    scores = torch.sigmoid(logits).view(len(logits), n_groups, -1)
    biased = scores.detach() + bias.view(n_groups, -1)
    kept = biased.topk(2, -1).values.sum(-1).topk(groups_kept, -1).indices[..., None].expand(-1, -1, scores.shape[-1])
    places = biased.gather(1, kept).flatten(1).topk(top_k).indices
    chosen = scores.gather(1, kept).flatten(1).gather(1, places)
    return factor * chosen / chosen.sum(1, keepdim=True), places


def by_topk(fill, choose_by=lambda biased, scores: biased, ids=lambda experts: experts):
    """As most people write it: `topk` throughout, and a mask repeated over each group."""

    def answer(logits, bias, n_groups, groups_kept, top_k, factor):
        scores = logits.sigmoid()
        biased = scores + bias
        worth = biased.view(len(logits), n_groups, -1).topk(2, dim=-1)[0].sum(dim=-1)
        kept = torch.zeros_like(worth).scatter_(1, worth.topk(groups_kept, dim=-1)[1], 1)
        kept = kept.repeat_interleave(logits.shape[1] // n_groups, dim=1)
        experts = ids(fill(choose_by(biased, scores), kept.bool()).topk(top_k, dim=-1)[1])
        weights = torch.gather(scores, 1, experts)
        return factor * weights / weights.sum(dim=-1, keepdim=True), experts

    return answer


def multiplied(biased, kept):
    return biased * kept


def left_out(biased, kept):
    return biased.masked_fill(~kept, -torch.inf)


def kept_columns(logits, bias, n_groups, groups_kept, top_k, factor):
    """The kept groups in the order of their ids, by a boolean index; weights by the wrong ids, too."""
    scores = torch.sigmoid(logits)
    grouped = (scores + bias).view(len(logits), n_groups, -1)
    best = grouped.topk(2).values.sum(-1).topk(groups_kept).indices
    kept = F.one_hot(best, n_groups).sum(1).bool()
    experts = grouped[kept].view(len(logits), -1).topk(top_k).indices
    weights = scores.gather(1, experts)
    return factor * weights / weights.sum(1, keepdim=True), experts


def ascending_in_lists(*args):
    weights, experts = in_lists()(*args)
    order = [sorted(range(len(row)), key=row.tolist().__getitem__) for row in experts]
    rows = range(len(experts))
    return torch.stack([weights[t, order[t]] for t in rows]), torch.stack([experts[t, order[t]] for t in rows])


def bare_in_lists(logits, bias, n_groups, groups_kept, top_k, factor):
    all_weights, all_experts = [], []
    for row in logits:
        s = torch.sigmoid(row)
        size = len(row) // n_groups
        groups = [range(g * size, g * size + size) for g in range(n_groups)]
        groups.sort(key=lambda group: -sum(sorted(float(s[e] + bias[e]) for e in group)[-2:]))
        allowed = [e for group in groups[:groups_kept] for e in group]
        chosen = sorted(allowed, key=lambda e: -float(s[e]))[:top_k]
        all_weights.append(factor * s[chosen] / s[chosen].sum())
        all_experts.append(chosen)
    return torch.stack(all_weights), torch.tensor(all_experts)


def share_of_biased(scores, chosen, biased):
    bias = biased - scores.detach()
    return (scores + bias)[chosen] / sum((scores + bias)[e] for e in chosen)


def share_of_biased_columns(s, experts, biased):
    chosen = s.gather(1, experts) + (biased - s.detach()).gather(1, experts)
    return chosen / chosen.sum(1, keepdim=True)


def softmax_in_python(row):
    powers = [torch.exp(z) for z in row]
    return torch.stack([p / sum(powers) for p in powers])


def cut_off_in_lists(*args):
    weights, experts = in_lists()(*args)
    return torch.tensor(weights.tolist()), experts


def cut_off_in_tensors(logits, *rest):
    return in_tensors()(logits.data, *rest)


# 6.6 without the best: token by token, and by masking.


def ranked_in_lists(first=lambda n: n, how_many=lambda n, k, e: k, key=lambda scores, e: (-scores[e], e), weight=None):
    def answer(routing, n):
        k, total = routing.topk_experts.shape[1], routing.n_experts
        experts = []
        for scores in routing.router_scores.tolist():
            order = sorted(range(total), key=lambda e: key(scores, e))
            experts.append(order[first(n) : first(n) + how_many(n, k, total)])
        ids = torch.tensor(experts, dtype=torch.int64).view(len(experts), -1)
        if weight is not None:
            return weight(routing, ids, n), ids
        return torch.stack([routing.router_scores[t, row] for t, row in enumerate(ids)]), ids

    return answer


def masked_one_by_one(times=lambda n: n, take=lambda n, k, left: k, weigh=None, best=lambda left: left.argmax(1)):
    def answer(routing, n):
        left = routing.router_scores.clone()
        k = routing.topk_experts.shape[1]
        for _ in range(times(n)):
            left[torch.arange(len(left)), best(left)] = -1.0
        chosen = []
        for _ in range(take(n, k, int((left[0] >= 0).sum()))):
            e = best(left)
            chosen.append(e)
            left[torch.arange(len(left)), e] = -1.0
        experts = torch.stack(chosen, 1) if chosen else torch.zeros(len(left), 0, dtype=torch.int64)
        if weigh is not None:
            return weigh(routing, experts, n), experts
        return torch.take_along_dim(routing.router_scores, experts, dim=1), experts

    return answer


def masked_and_chosen(routing, n):
    order = routing.router_scores.sort(dim=1, descending=True, stable=True).indices
    limited = routing.router_scores.scatter(1, order[:, :n], -1.0)
    experts = limited.sort(dim=1, descending=True, stable=True).indices[:, : routing.topk_experts.shape[1]]
    return torch.take_along_dim(routing.router_scores, experts, 1), experts


def odd_ids_first(routing, n):
    """Of equals any, as `topk` may take them."""
    ids = [e for e in range(routing.n_experts) if e % 2] + [e for e in range(routing.n_experts) if e % 2 == 0]
    order = routing.router_scores[:, ids].argsort(dim=1, descending=True, stable=True)
    experts = torch.tensor(ids)[order][:, n : n + routing.topk_experts.shape[1]]
    return routing.router_scores.gather(1, experts), experts


def next_k_in_lists(routing, n):
    k, experts = routing.topk_experts.shape[1], []
    for row in routing.router_scores.tolist():
        experts.append(sorted(range(len(row)), key=lambda e: -row[e])[k : k + k])
    ids = torch.tensor(experts)
    return routing.router_scores.gather(1, ids), ids


def chosen_masked_in_tensors(routing, n):
    left = routing.router_scores.scatter(1, routing.topk_experts, -1.0)
    ids = left.sort(dim=1, descending=True, stable=True).indices[:, : routing.topk_experts.shape[1]]
    return torch.take_along_dim(routing.router_scores, ids, 1), ids


def swapped_in_lists(routing, n):
    weights, experts = ranked_in_lists()(routing, n)
    return experts, weights


def swapped_in_tensors(routing, n):
    return masked_and_chosen(routing, n)[::-1]


def sliced_slots(routing, n):
    return routing.topk_weights[:, n:], routing.topk_experts[:, n:]


def popped_slots(routing, n):
    experts = [row[n:] for row in routing.topk_experts.tolist()]
    weights = [row[n:] for row in routing.topk_weights.tolist()]
    shape = (len(experts), -1) if experts[0] else (len(experts), 0)
    return torch.tensor(weights).view(shape), torch.tensor(experts, dtype=torch.int64).view(shape)


def multiplied_by_zero(routing, n):
    keeps = (torch.arange(routing.topk_experts.shape[1]) >= n).float()
    return routing.topk_weights * keeps, routing.topk_experts.clone()


def zeroed_in_a_loop(routing, n):
    weights = [[0.0 if slot < n else w for slot, w in enumerate(row)] for row in routing.topk_weights.tolist()]
    return torch.tensor(weights), routing.topk_experts.clone()


def lowest_ids_in_lists(routing, n):
    k = routing.topk_experts.shape[1]
    experts = []
    for row in routing.router_scores.tolist():
        rest = range(n, len(row))
        masked = range(n)
        experts.append([*sorted(rest, key=lambda e: -row[e]), *masked][:k])
    ids = torch.tensor(experts)
    return routing.router_scores.gather(1, ids), ids


def lowest_ids_in_tensors(routing, n):
    is_low = torch.arange(routing.n_experts) < n
    limited = torch.where(is_low, torch.tensor(-torch.inf), routing.router_scores)
    ids = limited.sort(dim=1, descending=True, stable=True).indices[:, : routing.topk_experts.shape[1]]
    return torch.take_along_dim(routing.router_scores, ids, 1), ids


def rescored_in_lists(routing, ids, n):
    weights = []
    for row, chosen in zip(routing.router_logits.tolist(), ids.tolist(), strict=True):
        rest = sorted(row, reverse=True)[n:]
        weights.append([math.exp(row[e]) / sum(map(math.exp, rest)) for e in chosen])
    return torch.tensor(weights)


def rescored_in_tensors(routing, ids, n):
    powers = routing.router_logits.exp()
    rest = powers.sort(dim=1, descending=True).values[:, n:].sum(1, keepdim=True)
    return powers.gather(1, ids) / rest


def last_argmax(left):
    return left.shape[1] - 1 - left.flip(1).argmax(1)


def smallest_left(left):
    return torch.where(left < 0, torch.tensor(9.0), left).argmin(1)


RIGHT = {
    "6.1": [step_by_step, from_factorials, a_row_of_pascals_triangle, lambda moe: math.comb(moe.n_experts, moe.top_k)],
    "6.2": [cut_as_a_dict, cut_through_a_config, cut_by_shares],
    "6.3": [all_at_once(), token_by_token(), added_in_a_loop],
    "6.4": [gate_row_by_row(), gate_in_one(), gated_by_matmul],
    "6.5": [in_lists(), in_tensors(), by_the_package, by_steps_of_the_package],
    "6.6": [ranked_in_lists(), masked_one_by_one(), masked_and_chosen],
}

WRONG = {
    "6.1": {
        "through a float": [rounded_steps, rounded_quotient],
        "not a whole number": [in_steps(divide=lambda x, y: x / y), in_factorials(divide=lambda x, y: x / y)],
        "the order counts": [ordered_in_steps, ordered_in_factorials],
        "every choice free": [free_in_steps, lambda moe: pow(moe.n_experts, moe.top_k)],
        "an expert chosen twice": [
            in_steps(experts=lambda moe: moe.n_experts + moe.top_k - 1),
            in_factorials(experts=lambda moe: moe.n_experts + moe.top_k - 1),
        ],
        "experts times choices": [added_up, lambda moe: moe.top_k * moe.n_experts],
        "the shared can be chosen": [
            in_steps(experts=lambda moe: moe.n_experts + moe.n_shared_experts),
            in_factorials(experts=lambda moe: moe.n_experts + moe.n_shared_experts),
        ],
        "the shared chosen on top": [
            in_steps(lambda moe: moe.n_experts + moe.n_shared_experts, lambda moe: moe.top_k + moe.n_shared_experts),
            in_factorials(
                lambda moe: moe.n_experts + moe.n_shared_experts, lambda moe: moe.top_k + moe.n_shared_experts
            ),
        ],
        "the shared taken off": [
            in_steps(lambda moe: moe.n_experts - moe.n_shared_experts, lambda moe: moe.top_k - moe.n_shared_experts),
            in_factorials(
                lambda moe: moe.n_experts - moe.n_shared_experts, lambda moe: moe.top_k - moe.n_shared_experts
            ),
        ],
        "the shared taken off the experts": [
            in_steps(experts=lambda moe: moe.n_experts - moe.n_shared_experts),
            in_factorials(experts=lambda moe: moe.n_experts - moe.n_shared_experts),
        ],
    },
    "6.2": {
        "a width that is no whole number": [
            changed(d_ff=lambda moe, m, s: moe.d_ff / m),
            counted_out(width=lambda moe, m: moe.d_ff * (1 / m)),
        ],
        "as many chosen as before": [
            changed(top_k=lambda moe, m, s: moe.top_k),
            counted_out(chosen=lambda used, s, m: len(used) // m),
        ],
        "as many chosen as before, less the shared": [
            changed(top_k=lambda moe, m, s: moe.top_k - s),
            counted_out(chosen=lambda used, s, m: len(used[::m]) - s),
        ],
        "as many experts as before": [
            changed(n_experts=lambda moe, m, s: moe.n_experts),
            counted_out(experts=lambda pieces, s, m: len(pieces) // m),
        ],
        "as many experts as before, less the shared": [
            changed(n_experts=lambda moe, m, s: moe.n_experts - s),
            counted_out(experts=lambda pieces, s, m: len(pieces[::m]) - s),
        ],
        "the width stays": [
            changed(d_ff=lambda moe, m, s: moe.d_ff),
            counted_out(width=lambda moe, m: len(range(moe.d_ff))),
        ],
        "the width is multiplied": [
            changed(d_ff=lambda moe, m, s: moe.d_ff * m),
            counted_out(width=lambda moe, m: sum([moe.d_ff] * m)),
        ],
        "shared experts on top": [
            changed(n_experts=lambda moe, m, s: m * moe.n_experts, top_k=lambda moe, m, s: m * moe.top_k),
            counted_out(experts=lambda pieces, s, m: len(pieces), chosen=lambda used, s, m: len(used)),
        ],
        "the shared taken off the chosen only": [
            changed(n_experts=lambda moe, m, s: m * moe.n_experts),
            counted_out(experts=lambda pieces, s, m: len(pieces)),
        ],
        "the shared taken off the experts only": [
            changed(top_k=lambda moe, m, s: m * moe.top_k),
            counted_out(chosen=lambda used, s, m: len(used)),
        ],
        "shared before the cut": [
            changed(n_experts=lambda moe, m, s: (moe.n_experts - s) * m, top_k=lambda moe, m, s: (moe.top_k - s) * m),
            counted_out(experts=lambda pieces, s, m: len(pieces) - m * s, chosen=lambda used, s, m: len(used) - m * s),
        ],
        "whole experts shared": [
            changed(
                n_experts=lambda moe, m, s: (moe.n_experts - s) * m,
                top_k=lambda moe, m, s: (moe.top_k - s) * m,
                n_shared_experts=lambda moe, m, s: s * m,
            ),
            counted_out(
                experts=lambda pieces, s, m: len(pieces) - m * s,
                chosen=lambda used, s, m: len(used) - m * s,
                shared=lambda s, m: m * s,
            ),
        ],
        "the shared are lost": [
            changed(n_shared_experts=lambda moe, m, s: 0),
            counted_out(shared=lambda s, m: 0),
        ],
    },
    "6.3": {
        "the shared path is lost": [
            all_at_once(after=lambda routed, shared, r: routed),
            token_by_token(whole=lambda routed, common, row: routed),
        ],
        "the routed path is lost": [
            all_at_once(after=lambda routed, shared, r: shared.sum(0)),
            token_by_token(whole=lambda routed, common, row: common),
        ],
        "the shared reads what the routed gave": [
            sequence_of_paths,
            token_by_token(shared_part=lambda shared, row, r, t, routed: sum(one(routed) for one in shared)),
        ],
        "the routed reads what the shared gave": [
            all_at_once(reads=lambda x, shared: sum(one(x) for one in shared)),
            token_by_token(reads=lambda shared, row: sum(one(row) for one in shared)),
        ],
        "the routed reads the token and what the shared gave": [
            token_by_token(reads=lambda shared, row: row + sum(one(row) for one in shared)),
            reads_all,
        ],
        "shared experts one after the other": [
            chained_shared,
            token_by_token(shared_part=lambda shared, row, r, t, routed: chain(row, shared)),
        ],
        "only the first shared expert": [
            all_at_once(after=lambda routed, shared, r: routed + shared[0]),
            token_by_token(shared_part=lambda shared, row, r, t, routed: shared[0](row)),
        ],
        "only the last shared expert": [
            all_at_once(after=lambda routed, shared, r: routed + shared[-1]),
            token_by_token(shared_part=lambda shared, row, r, t, routed: shared[-1](row)),
        ],
        "a mean of the shared experts": [
            all_at_once(after=lambda routed, shared, r: routed + shared.mean(0)),
            token_by_token(shared_part=lambda shared, row, r, t, routed: sum(one(row) for one in shared) / len(shared)),
        ],
        "shared experts weighed by the sum of the weights": [
            all_at_once(after=lambda routed, shared, r: routed + r.dense_weights.sum(1)[:, None] * shared.sum(0)),
            token_by_token(
                shared_part=lambda shared, row, r, t, routed: sum(r.topk_weights[t]) * sum(one(row) for one in shared)
            ),
        ],
        "shared experts weighed as the first choice": [
            all_at_once(after=lambda routed, shared, r: routed + r.topk_weights[:, 0, None] * shared.sum(0)),
            token_by_token(
                shared_part=lambda shared, row, r, t, routed: r.topk_weights[t, 0] * sum(one(row) for one in shared)
            ),
        ],
        "shared experts with the weights of routed ones": [
            with_weights_of_routed,
            token_by_token(shared_part=weight_of_id),
        ],
        "shared once for every choice": [
            shared_inside_of_the_loop,
            token_by_token(
                shared_part=lambda shared, row, r, t, routed: sum(
                    one(row) for _ in range(r.topk_experts.shape[1]) for one in shared
                )
            ),
        ],
        "routed experts in full, too": [
            all_at_once(weights=lambda r: F.one_hot(r.topk_experts, r.n_experts).sum(1).float()),
            token_by_token(weight=lambda w: 1.0),
        ],
        "the mean of both paths": [
            all_at_once(after=lambda routed, shared, r: torch.stack([routed, shared.sum(0)]).mean(0)),
            token_by_token(whole=lambda routed, common, row: 0.5 * routed + 0.5 * common),
        ],
        "residual added": [
            lambda x, routing, expert, shared: added_in_a_loop(x, routing, expert, shared) + x,
            token_by_token(whole=lambda routed, common, row: row + routed + common),
        ],
    },
    "6.4": {
        "softmax over one number": [
            softmax_of_one,
            gate_row_by_row(opened=lambda number: torch.stack([number]).softmax(0)[0]),
        ],
        "the gate is not used": [unused, open_gate],
        "the gate cannot learn": [numbers_of_gate, gate_without_grad],
        "softmax over the tokens": [over_tokens_in_a_loop, gate_in_one(join=lambda n, y: F.softmax(n, dim=0) * y)],
        "no sigmoid": [gate_row_by_row(opened=lambda number: number), gate_in_one(join=lambda n, y: n * y)],
        "silu for a sigmoid": [
            gate_row_by_row(opened=lambda number: number / (1 + torch.exp(-number))),
            gate_in_one(join=lambda n, y: F.silu(n) * y),
        ],
        "the gate turned round": [
            gate_row_by_row(opened=lambda number: 1 / (1 + torch.exp(number))),
            gate_in_one(join=lambda n, y: (-n).sigmoid() * y),
        ],
        "the gate reads the output": [
            lambda x, shared, w_gate: torch.stack([(row @ w_gate[0]).sigmoid() * row for row in shared(x)]),
            gate_in_one(number=lambda x, w, y: y @ w.T),
        ],
        "the gate on the input": [
            gate_row_by_row(whole=lambda number, out, row, shared: shared((torch.sigmoid(number) * row)[None])[0]),
            lambda x, shared, w_gate: shared(x * (x @ w_gate.T).sigmoid()),
        ],
        "a gate for every number": [
            lambda x, shared, w_gate: torch.stack([(a * w_gate[0]).sigmoid() * b for a, b in zip(x, shared(x))]),  # noqa: B905
            gate_in_one(number=lambda x, w, y: w * x),
        ],
        "the gate along the wrong axis": [gates_as_a_row, gates_as_a_flat_row],
        "one gate for all tokens": [gate_of_the_mean, gate_of_the_mean_token],
        "the gate is added": [
            gate_row_by_row(whole=lambda number, out, row, shared: sigmoid(number) + out),
            gate_in_one(join=lambda n, y: y + n.sigmoid()),
        ],
        "sigmoid of the product": [
            gate_row_by_row(whole=lambda number, out, row, shared: sigmoid(number * out)),
            gate_in_one(join=lambda n, y: (n * y).sigmoid()),
        ],
    },
    "6.5": {
        "the scores are changed in place": [added_in_place, added_by_a_method],
        "weights and experts exchanged": [exchanged_at_the_end, exchanged_from_lists],
        "ids within the kept groups": [places_in_lists, places_in_tensors, kept_columns],
        "in ascending order of ids": [
            ascending_in_lists,
            by_topk(left_out, ids=lambda experts: experts.sort(dim=1).values),
        ],
        "bias folded into the weights": [
            in_lists(weights=share_of_biased),
            in_tensors(weights=share_of_biased_columns),
        ],
        "the bias is ignored": [
            in_lists(bias_in_scores=lambda s, b, z: s),
            in_tensors(biased_of=lambda s, b, z: s.clone()),
        ],
        "bias on the logits": [
            in_lists(bias_in_scores=lambda s, b, z: sigmoid(z + b)),
            in_tensors(biased_of=lambda s, b, z: (z + b).sigmoid()),
        ],
        "the bias is subtracted": [
            in_lists(bias_in_scores=lambda s, b, z: s - b),
            in_tensors(biased_of=lambda s, b, z: s - b),
        ],
        "experts chosen without the bias": [
            bare_in_lists,
            by_topk(left_out, choose_by=lambda biased, scores: scores),
        ],
        "groups chosen without the bias": [
            in_lists(worth=lambda group, plain: sum(sorted(plain)[-2:])),
            in_tensors(worth=lambda grouped, plain: plain.sort(dim=-1).values[..., -2:].sum(-1)),
        ],
        "DeepSeek-V2's groups, masked with 0": [
            in_lists(worth=lambda group, plain: max(group), masked=0.0),
            in_tensors(worth=lambda grouped, plain: grouped.max(-1).values, masked=0.0),
        ],
        "a group is worth its best expert": [
            in_lists(worth=lambda group, plain: max(group)),
            in_tensors(worth=lambda grouped, plain: grouped.max(-1).values),
        ],
        "a group is worth all of its experts": [
            in_lists(worth=lambda group, plain: sum(group)),
            in_tensors(worth=lambda grouped, plain: grouped.sum(-1)),
        ],
        "the groups are ignored": [
            in_lists(groups_of=lambda n_experts, n_groups: 1),
            in_tensors(groups_of=lambda n_experts, n_groups: 1),
        ],
        "interleaved groups": [
            in_lists(members=lambda n, g, size, groups: range(g, n, groups)),
            in_tensors(
                split=lambda values, n: values.view(len(values), -1, n).transpose(1, 2),
                join=lambda grouped: grouped.transpose(1, 2).flatten(1),
            ),
        ],
        "the number of groups taken for their size": [
            in_lists(groups_of=lambda n_experts, n_groups: n_experts // n_groups),
            in_tensors(groups_of=lambda n_experts, n_groups: n_experts // n_groups),
        ],
        "the worst groups kept": [
            in_lists(order=lambda worths: sorted(range(len(worths)), key=lambda g: worths[g])),
            in_tensors(descending=False),
        ],
        "masked with 0": [
            in_lists(masked=0.0),
            in_tensors(masked=0.0),
            by_topk(multiplied),
        ],
        "the factor is gone": [
            in_lists(scale=lambda w, factor: factor * w / (factor * w).sum()),
            in_tensors(scale=lambda w, factor: w),
        ],
        "the factor twice": [
            in_lists(scale=lambda w, factor: factor * factor * w),
            in_tensors(scale=lambda w, factor: w * factor**2),
        ],
        "not normalised": [
            in_lists(weights=lambda scores, chosen, biased: scores[chosen]),
            in_tensors(weights=lambda s, experts, biased: s.gather(1, experts)),
        ],
        "normalised over all experts": [
            in_lists(weights=lambda scores, chosen, biased: scores[chosen] / scores.sum()),
            in_tensors(weights=lambda s, experts, biased: F.normalize(s, p=1, dim=1).gather(1, experts)),
        ],
        "a softmax of the chosen": [
            in_lists(weights=lambda scores, chosen, biased: scores[chosen].exp() / scores[chosen].exp().sum()),
            in_tensors(weights=lambda s, experts, biased: s.gather(1, experts).log_softmax(1).exp()),
        ],
        "softmax scores": [in_lists(all_scores=softmax_in_python), in_tensors(score=lambda z: z.softmax(1))],
        "no gradient": [cut_off_in_lists, cut_off_in_tensors],
    },
    "6.6": {
        "weights and experts exchanged": [swapped_in_lists, swapped_in_tensors],
        "slots dropped": [sliced_slots, popped_slots],
        "weight zero in place of another expert": [multiplied_by_zero, zeroed_in_a_loop],
        "nothing masked": [ranked_in_lists(first=lambda n: 0), masked_one_by_one(times=lambda n: 0)],
        "always one masked": [ranked_in_lists(first=lambda n: 1), masked_one_by_one(times=lambda n: 1)],
        "one too many masked": [
            ranked_in_lists(first=lambda n: n + 1),
            masked_one_by_one(times=lambda n: n + 1, take=lambda n, k, left: min(k, left)),
        ],
        "all chosen masked": [next_k_in_lists, chosen_masked_in_tensors],
        "n chosen in place of K": [
            ranked_in_lists(how_many=lambda n, k, e: n),
            masked_one_by_one(take=lambda n, k, left: min(n, left)),
        ],
        "all that are left": [
            ranked_in_lists(how_many=lambda n, k, e: e),
            masked_one_by_one(take=lambda n, k, left: left),
        ],
        "the experts of the lowest ids masked": [lowest_ids_in_lists, lowest_ids_in_tensors],
        "the worst masked": [
            ranked_in_lists(key=lambda scores, e: (scores[e], e)),
            masked_one_by_one(best=smallest_left),
        ],
        "any of equals": [
            ranked_in_lists(key=lambda scores, e: (-scores[e], -e)),
            masked_one_by_one(best=last_argmax),
            odd_ids_first,
        ],
        "the weights of the masked": [
            ranked_in_lists(weight=lambda r, ids, n: r.topk_weights.clone()),
            masked_one_by_one(weigh=lambda r, ids, n: torch.stack(list(r.topk_weights))),
        ],
        "normalised": [
            ranked_in_lists(
                weight=lambda r, ids, n: torch.stack([s[row] / s[row].sum() for s, row in zip(r.router_scores, ids)])  # noqa: B905
            ),
            masked_one_by_one(weigh=lambda r, ids, n: F.normalize(r.router_scores.gather(1, ids), p=1, dim=1)),
        ],
        "scored again": [ranked_in_lists(weight=rescored_in_lists), masked_one_by_one(weigh=rescored_in_tensors)],
    },
}
