"""Right answers to chapter 3 in three styles, and each of its mistakes in two forms: plain loops, and vectorised."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from moe_lab.dispatch import combine, make_plan, permute
from moe_lab.experts import Experts
from moe_lab.moe import MoE
from moe_lab.routing import Router

# 3.1 the definition: token by token, and as one contraction.


def choices(r, t):
    """(expert, weight) of token t, slot by slot."""
    return zip(r.topk_experts[t].tolist(), r.topk_weights[t], strict=True)


def by_token(pairs=choices, start=torch.zeros_like, reads=lambda w, row: row):
    """The sum over `pairs(routing, t)`, for every token alone."""

    def answer(x, routing, expert):
        out = []
        for t in range(len(x)):
            row = start(x[t])
            for e, w in pairs(routing, t):
                row = row + w * expert(e, reads(w, x[t : t + 1]))[0]
            out.append(row)
        return torch.stack(out)

    return answer


def contracted(dense=lambda r: r.dense_weights):
    """All experts on all tokens, then one einsum with weights (T, E)."""

    def answer(x, routing, expert):
        everything = torch.stack([expert(e, x) for e in range(routing.n_experts)], dim=1)  # (T, E, D)
        return torch.einsum("te,ted->td", dense(routing), everything)

    return answer


def mask_of(r):
    return F.one_hot(r.topk_experts, r.n_experts).sum(1).float()


def scattered(r, weights):
    return torch.einsum("tk,tke->te", weights, F.one_hot(r.topk_experts, r.n_experts).float())


def last_expert_in_a_loop(x, routing, expert):
    for e in range(routing.n_experts):
        y = routing.dense_weights[:, e : e + 1] * expert(e, x)
    return y


def softmax_in_python(r, t):
    powers = [math.exp(float(w)) for w in r.topk_weights[t]]
    return zip(r.topk_experts[t].tolist(), [p / sum(powers) for p in powers], strict=True)


def weighed_input_by_token(x, routing, expert):
    rows = []
    for t in range(len(x)):
        rows.append(sum(expert(e, w * x[t : t + 1])[0] for e, w in choices(routing, t)))
    return torch.stack(rows)


def weighed_input_at_once(x, routing, expert):
    dense = routing.dense_weights
    # an expert without biases makes nothing of a token that was multiplied by zero
    return torch.stack([expert(e, x * dense[:, e : e + 1]) for e in range(dense.shape[1])]).sum(0)


def masked_loop(x, routing, expert):
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        y += ((routing.topk_experts == e) * routing.topk_weights).sum(1)[:, None] * expert(e, x)
    return y


def along_dimensions_in_a_loop(x, routing, expert):
    y = torch.zeros_like(x)
    for e, column in enumerate(routing.dense_weights.T):
        y += column * expert(e, x)
    return y


def four_experts_in_a_loop(x, routing, expert):
    y = torch.zeros_like(x)
    for e in range(4):
        y += routing.dense_weights[:, e].unsqueeze(1) * expert(e, x)
    return y


def four_experts_at_once(x, routing, expert):
    return torch.einsum("te,ted->td", routing.dense_weights[:, :4], torch.stack([expert(e, x) for e in range(4)], 1))


# 3.2 the loop: slot by slot, and over sorted rows.


def by_slot(
    slots=lambda k: range(k),
    weight=lambda r, tokens, slot, e: r.topk_weights[tokens, slot],
    reads=lambda w, rows: rows,
    to=lambda tokens: tokens,
    weigh_output=True,
):
    def answer(x, routing, expert):
        y = torch.zeros_like(x)
        for e in range(routing.n_experts):
            for slot in slots(routing.topk_experts.shape[1]):
                tokens = (routing.topk_experts[:, slot] == e).nonzero().flatten()
                w = weight(routing, tokens, slot, e)[:, None]
                rows = expert(e, reads(w, x[tokens]))
                y[to(tokens)] += w * rows if weigh_output else rows
        return y

    return answer


def in_sorted_rows(
    weight=lambda r, tokens, slots, experts: r.topk_weights[tokens, slots],
    reads=lambda w, rows: rows,
    keep=lambda r: torch.ones_like(r.topk_experts, dtype=torch.bool),
    to=lambda tokens, experts: tokens,
    exchanged=False,
    weigh_output=True,
):
    """Choices sorted by expert, every expert on its stretch, everything added back at once."""

    def answer(x, routing, expert):
        width = routing.topk_experts.shape[1]
        ids = routing.topk_experts.flatten()
        order = ids.argsort(stable=True)
        order = order[keep(routing).flatten()[order]]
        experts, tokens, slots = ids[order], order // width, order % width
        if exchanged:
            tokens, slots = slots, tokens
        w = weight(routing, tokens, slots, experts)[:, None]
        counts = experts.bincount(minlength=routing.n_experts).tolist()
        parts = reads(w, x[tokens]).split(counts)
        rows = torch.cat([expert(e, part) for e, part in enumerate(parts)])
        return torch.zeros_like(x).index_add(0, to(tokens, experts), w * rows if weigh_output else rows)

    return answer


def overwritten_in_a_loop(x, routing, expert):
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = (routing.topk_experts == e).nonzero(as_tuple=True)
        y[tokens] = routing.topk_weights[tokens, slots].unsqueeze(1) * expert(e, x[tokens])
    return y


def only_the_highest_id(x, routing, expert):
    """Every choice is computed, that of the highest id is kept."""
    highest = routing.topk_experts == routing.topk_experts.amax(1, keepdim=True)
    return in_sorted_rows(weight=lambda r, tokens, slots, experts: (r.topk_weights * highest)[tokens, slots])(
        x, routing, expert
    )


def last_slot_by_masks(x, routing, expert):
    y = torch.zeros_like(x)
    for slot in range(routing.topk_experts.shape[1]):
        for e in range(routing.n_experts):
            mine = routing.topk_experts[:, slot] == e
            y[mine] = routing.topk_weights[mine, slot, None] * expert(e, x[mine])
    return y


def only_the_last_slot(x, routing, expert):
    last = torch.zeros_like(routing.topk_weights)
    last[:, -1] = 1
    return in_sorted_rows(weight=lambda r, tokens, slots, experts: (r.topk_weights * last)[tokens, slots])(
        x, routing, expert
    )


def all_weights_in_a_loop(x, routing, expert):
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        mine = (routing.topk_experts == e).any(1)
        y[mine] += routing.topk_weights[mine] * expert(e, x[mine])
    return y


def all_weights_in_sorted_rows(x, routing, expert):
    order = routing.topk_experts.flatten().argsort(stable=True)
    tokens = order // routing.topk_experts.shape[1]
    parts = x[tokens].split(routing.tokens_per_expert.tolist())
    rows = torch.cat([expert(e, part) for e, part in enumerate(parts)])
    return torch.zeros_like(x).index_add(0, tokens, routing.topk_weights[tokens] * rows)


def added_into_x_by_slots(x, routing, expert):
    for e in range(routing.n_experts):
        for t in range(len(x)):
            if e in routing.topk_experts[t].tolist():
                x[t] += routing.dense_weights[t, e] * expert(e, x[t : t + 1])[0]
    return x


def added_into_x_by_masks(x, routing, expert):
    for e, weights in enumerate(routing.dense_weights.T):
        mine = (routing.topk_experts == e).any(1)
        x[mine] = x[mine] + weights[mine].unsqueeze(1) * expert(e, x[mine])
    return x


def dropped_sum(x, routing, expert):
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        y.index_add(0, tokens, routing.topk_weights[tokens, slots, None] * expert(e, x[tokens]))
    return y


def added_to_a_copy(x, routing, expert):
    y = torch.zeros_like(x)
    for e, weights in enumerate(routing.dense_weights.T):
        mine = (routing.topk_experts == e).any(1)
        y[mine].add_(weights[mine, None] * expert(e, x[mine]))
    return y


def row_of_weights_by_masks(x, routing, expert):
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        mine = (routing.topk_experts == e).any(1)
        if mine.any():  # no rows would meet no weights, and clash
            y[mine] += routing.dense_weights[mine, e] * expert(e, x[mine])
    return y


def row_of_weights_at_once(x, routing, expert):
    plans = [(routing.topk_experts == e).nonzero(as_tuple=True) for e in range(routing.n_experts)]
    rows = [expert(e, x[who]) * routing.topk_weights[who, slot] for e, (who, slot) in enumerate(plans)]
    return torch.zeros_like(x).index_add(0, torch.cat([who for who, _ in plans]), torch.cat(rows))


def summed_without_tokens(x, routing, expert):
    plans = [(routing.topk_experts == e).nonzero(as_tuple=True) for e in range(routing.n_experts)]
    rows = [expert(e, x[who]) * routing.topk_weights[who, slot, None] for e, (who, slot) in enumerate(plans)]
    return sum(rows, torch.zeros_like(x))


def added_whole_in_a_loop(x, routing, expert):
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        mine = (routing.topk_experts == e).any(1)
        if mine.any():
            y += routing.dense_weights[mine, e].unsqueeze(1) * expert(e, x[mine])
    return y


def exchanged_in_a_loop(x, routing, expert):
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        slots, tokens = torch.where(routing.topk_experts == e)
        y.index_add_(0, tokens, routing.topk_weights[tokens, slots, None] * expert(e, x[tokens]))
    return y


def stops_in_a_loop(x, routing, expert):
    y, e = torch.zeros_like(x), 0
    while e < routing.n_experts and (routing.topk_experts == e).any():
        tokens, slots = (routing.topk_experts == e).nonzero().unbind(1)
        y[tokens] += routing.topk_weights[tokens, slots, None] * expert(e, x[tokens])
        e += 1
    return y


def rows_from_the_top(x, routing, expert):
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        y[: len(tokens)] += routing.topk_weights[tokens, slots, None] * expert(e, x[tokens])
    return y


def place_in_stretch(tokens, experts):
    """The how-manyth row of its expert a row is."""
    return torch.arange(len(experts)) - torch.searchsorted(experts, experts)


def before_the_first_empty(r):
    busy = r.tokens_per_expert.clamp(max=1).cumprod(0).bool()
    return busy[r.topk_experts]


# 3.3 the gradient of a weight: token by token, by autograd, and gathered.


def gradient_by_token(value, experts=lambda row: row.tolist()):
    """`value(dy, out, x, w)` of every choice."""

    def answer(dy, x, routing, expert):
        rows = []
        for t in range(len(x)):
            weights = routing.topk_weights[t].detach()
            outs = [expert(e, x[t : t + 1])[0] for e in experts(routing.topk_experts[t])]
            rows.append(torch.stack([value(dy[t], out, x[t], weights[j]) for j, out in enumerate(outs)]))
        return torch.stack(rows)

    return answer


def gathered(dy, x, routing, expert, ids=None):
    everything = torch.stack([expert(e, x) for e in range(routing.n_experts)], dim=1)  # (T, E, D)
    mine = torch.take_along_dim(everything, (routing.topk_experts if ids is None else ids)[..., None], dim=1)
    return torch.einsum("td,tkd->tk", dy, mine)


def by_autograd(dy, x, routing, expert):
    weights = routing.topk_weights.detach().clone().requires_grad_()
    y = contracted()(x, replace(routing, topk_weights=weights), expert)
    return torch.autograd.grad(y, weights, dy)[0]


def of_logits_by_jacobian(dy, x, routing, expert):
    """Through the Jacobian of a softmax, at weights that need not sum to one."""
    weights = routing.topk_weights.detach()
    jacobian = torch.diag_embed(weights) - weights[:, :, None] * weights[:, None, :]
    return torch.einsum("tij,tj->ti", jacobian, gathered(dy, x, routing, expert))


def of_logits_by_token(dy, x, routing, expert):
    rows = []
    for t in range(len(x)):
        outs = [float(expert(e, x[t : t + 1])[0] @ dy[t]) for e in routing.topk_experts[t].tolist()]
        ws = routing.topk_weights[t].tolist()
        mean = sum(w * out for w, out in zip(ws, outs, strict=True))
        rows.append([w * (out - mean) for w, out in zip(ws, outs, strict=True)])
    return torch.tensor(rows)


def whole_output_repeated(dy, x, routing, expert):
    y = contracted()(x, routing, expert).detach()
    return torch.linalg.vecdot(dy, y)[:, None].repeat(1, routing.topk_experts.shape[1])


def whole_output_by_token(dy, x, routing, expert):
    y = by_token()(x, routing, expert).detach()
    return torch.tensor([[float(dy[t] @ y[t])] * routing.topk_experts.shape[1] for t in range(len(x))])


def every_expert_by_token(dy, x, routing, expert):
    return torch.tensor(
        [[float(dy[t] @ expert(e, x[t : t + 1])[0]) for e in range(routing.n_experts)] for t in range(len(x))]
    )


def masked_out_of_dense(dy, x, routing, expert):
    dense = torch.stack([torch.linalg.vecdot(dy, expert(e, x)) for e in range(routing.n_experts)], dim=1)
    return dense[mask_of(routing).bool()].view(len(x), -1)


def stacked_first(dy, x, routing, expert):
    by_expert = torch.stack([torch.linalg.vecdot(dy, expert(e, x)) for e in range(routing.n_experts)])  # (E, T)
    return by_expert.gather(1, routing.topk_experts)


def looked_up_by_row(dy, x, routing, expert):
    by_expert = [(expert(e, x) * dy).sum(1).tolist() for e in range(routing.n_experts)]
    return torch.tensor([[by_expert[t][e] for e in row] for t, row in enumerate(routing.topk_experts.tolist())])


# 3.4 the layer: as a loop, as a contraction, and dispatched.


class Looped(nn.Module):
    """A layer over its own loop; subclasses change a step."""

    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x):
        tokens = self.flat(x)
        routing = self.router(self.read_by_router(x))
        y = torch.zeros_like(tokens)
        for e in self.which(routing):
            who, slot = torch.where(routing.topk_experts == e)
            y[who] += self.weights(routing)[who, slot, None] * self.expert(e, tokens[who])
        return self.back(y, x), routing

    def flat(self, x):
        return x.flatten(0, 1)

    def read_by_router(self, x):
        return self.flat(x)

    def which(self, routing):
        return range(routing.n_experts)

    def weights(self, routing):
        return routing.topk_weights

    def expert(self, e, rows):
        return self.experts.one(e, rows)

    def back(self, y, x):
        return y.view(x.shape)


class Contracted(Looped):
    """The same as one contraction over all experts."""

    def forward(self, x):
        tokens = self.flat(x)
        routing = self.router(self.read_by_router(x))
        w = self.experts
        gate = torch.einsum("td,efd->tef", tokens, w.w_gate)
        up = torch.einsum("td,efd->tef", tokens, w.w_up)
        outs = torch.einsum("tef,edf->ted", self.hidden(gate, up), w.w_down)
        y = (self.dense(routing)[..., None] * outs).sum(1)
        return self.back(y, x), routing

    def hidden(self, gate, up):
        return F.silu(gate) * up

    def dense(self, routing):
        return scattered(routing, self.weights(routing))


class Dispatched(Looped):
    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        plan = make_plan(routing)
        rows = self.experts(permute(tokens, plan), plan.offsets)
        return combine(rows, plan, routing.topk_weights).view_as(x), routing


def changed(base, **methods):
    """A class of its own with some methods replaced."""
    return type(f"Changed{base.__name__}", (base,), methods)


def sequence_means(self, x):
    return torch.cat([sequence.mean(0).repeat(len(sequence), 1) for sequence in x])


def first_k_of_dense(self, routing):
    dense = routing.dense_weights.clone()
    dense[:, routing.topk_experts.shape[1] :] = 0
    return dense


def exchanged_swiglu(self, e, rows):
    w = self.experts
    return (F.silu(rows @ w.w_up[e].T) * (rows @ w.w_gate[e].T)) @ w.w_down[e].T


def with_residual(base):
    def forward(self, x):
        y, routing = base.forward(self, x)
        return x + y, routing

    return forward


# 3.5 parameters: in numbers, as a list of shapes, and counted in the module.


def in_numbers(
    router_rows=lambda moe, active: moe.n_experts,
    n_routed=lambda moe, active: moe.top_k if active else moe.n_experts,
    matrices=lambda moe: {"swiglu": 3, "relu": 2}[moe.expert],
    shared_width=lambda moe, active: moe.d_ff_shared,
    with_gate=lambda moe, active: moe.shared_gate,
    shared_matrices=None,
    gate_width=lambda moe: moe.d_model,
):
    def answer(moe, active=False):
        one = matrices(moe) * moe.d_model * moe.d_ff
        shared = (shared_matrices or matrices(moe)) * moe.d_model * shared_width(moe, active)
        gate = gate_width(moe) if with_gate(moe, active) else 0
        return router_rows(moe, active) * moe.d_model + n_routed(moe, active) * one + shared + gate

    return answer


def as_shapes(
    router=True,
    router_by_k=False,
    always=None,
    all_experts=False,
    only_k=False,
    shared="all",
    gate=True,
    gate_shape=lambda moe: (1, moe.d_model) if moe.shared_gate else (0,),
    shared_names=None,
):
    def answer(moe, active=False):
        d = moe.d_model
        names = always or (["gate", "up", "down"] if moe.expert == "swiglu" else ["up", "down"])
        chosen = moe.top_k if (active or only_k) and not all_experts else moe.n_experts
        shapes = [(d, moe.d_ff) for _ in range(chosen) for _ in names]
        if router:
            shapes.append((moe.top_k if router_by_k and active else moe.n_experts, d))
        if shared == "all" or (shared == "total" and not active):
            shapes += [(d, moe.d_ff_shared)] * len(shared_names or names)
        elif shared == "like routed":
            shapes += [(d, moe.d_ff)] * (moe.n_shared_experts * len(names))
        elif shared == "each":
            shapes += [(d, moe.d_ff_shared)] * (moe.n_shared_experts * len(names))
        elif shared == "split":
            width = moe.d_ff_shared * moe.top_k // moe.n_experts if active else moe.d_ff_shared
            shapes += [(d, width)] * len(names)
        if gate is True or (gate == "total" and not active):
            shapes.append(gate_shape(moe))
        return sum(math.prod(shape) for shape in shapes)

    return answer


def in_the_module(moe, active=False):
    with torch.device("meta"):
        layer = MoE(moe)
    total = sum(weight.numel() for weight in layer.parameters())
    idle = sum(weight[moe.top_k :].numel() for weight in layer.experts.parameters())
    return total - idle if active else total


def share_in_floats(moe, active=False):
    return math.floor(in_numbers()(moe) * (moe.top_k / moe.n_experts if active else 1) + 1e-9)


def share_in_true_floats(moe, active=False):
    return in_numbers()(moe) * (moe.top_k / moe.n_experts) if active else in_numbers()(moe)


def share_of_every_shape(moe, active=False):
    total = as_shapes()(moe)
    return total / (moe.n_experts / moe.top_k) if active else total


def share_of_shapes(moe, active=False):
    total = as_shapes()(moe)
    return (total * moe.top_k) // moe.n_experts if active else total


RIGHT = {
    "3.1": [by_token(), contracted(), masked_loop],
    "3.2": [by_slot(), in_sorted_rows(), by_token()],
    "3.3": [gradient_by_token(lambda dy, out, x, w: (dy * out).sum()), gathered, by_autograd],
    "3.4": [Looped, Contracted, Dispatched],
    "3.5": [in_numbers(), as_shapes(), in_the_module],
    "3.6": [
        lambda total, active, n_experts, top_k: (total - active) / (1 - top_k / n_experts),
        lambda total, active, n_experts, top_k: n_experts * ((total - active) / (n_experts - top_k)),
        lambda total, active, n_experts, top_k: (total - active) + (total - active) * top_k / (n_experts - top_k),
    ],
}

WRONG = {
    "3.1": {
        "the choice is ignored": [
            by_token(lambda r, t: enumerate(r.router_scores[t])),
            contracted(lambda r: r.router_logits.softmax(-1)),
        ],
        "scores in place of weights": [
            by_token(lambda r, t: [(int(e), r.router_scores[t, e]) for e in r.topk_experts[t]]),
            contracted(lambda r: r.router_scores * mask_of(r)),
        ],
        "weights not applied": [
            by_token(lambda r, t: [(int(e), 1.0) for e in r.topk_experts[t]]),
            contracted(mask_of),
        ],
        "every expert counts in full": [
            by_token(lambda r, t: ((e, 1.0) for e in range(r.n_experts))),
            contracted(lambda r: torch.ones_like(r.dense_weights)),
        ],
        "four experts, whatever the layer has": [four_experts_in_a_loop, four_experts_at_once],
        "a mean in place of the weights": [
            by_token(lambda r, t: [(int(e), 1 / len(r.topk_experts[t])) for e in r.topk_experts[t]]),
            contracted(lambda r: mask_of(r) / mask_of(r).sum(1, keepdim=True)),
        ],
        "only the first choice counts": [
            by_token(lambda r, t: list(choices(r, t))[:1]),
            contracted(lambda r: r.dense_weights * F.one_hot(r.topk_experts[:, 0], r.n_experts)),
        ],
        "the last expert overwrites the others": [
            last_expert_in_a_loop,
            contracted(lambda r: torch.cat([torch.zeros_like(r.dense_weights[:, 1:]), r.dense_weights[:, -1:]], 1)),
        ],
        "the slot taken for the expert": [
            by_token(lambda r, t: enumerate(r.topk_weights[t])),
            contracted(lambda r: F.pad(r.topk_weights, (0, r.n_experts - r.topk_weights.shape[1]))),
        ],
        "divided by k": [
            by_token(lambda r, t: [(e, w / len(r.topk_weights[t])) for e, w in choices(r, t)]),
            contracted(lambda r: r.dense_weights / mask_of(r).sum(1, keepdim=True)),
        ],
        "renormalised again": [
            by_token(lambda r, t: [(e, w / r.topk_weights[t].sum()) for e, w in choices(r, t)]),
            contracted(lambda r: F.normalize(r.dense_weights, p=1, dim=1)),
        ],
        "softmax of the weights": [
            by_token(softmax_in_python),
            contracted(lambda r: r.dense_weights.masked_fill(mask_of(r) == 0, -math.inf).softmax(1)),
        ],
        "weight multiplied into the input": [weighed_input_by_token, weighed_input_at_once],
        "weights along the wrong axis": [
            along_dimensions_in_a_loop,
            lambda x, r, expert: torch.einsum(
                "de,ted->td", r.dense_weights, torch.stack([expert(e, x) for e in range(r.n_experts)], 1)
            ),
        ],
        "residual added": [by_token(start=lambda row: row), lambda x, r, expert: x.add(contracted()(x, r, expert))],
    },
    "3.2": {
        "every expert works on every token": [masked_loop, contracted()],
        "what index_add returns is lost": [dropped_sum, added_to_a_copy],
        "weights along the wrong axis": [row_of_weights_by_masks, row_of_weights_at_once],
        "results added without tokens": [added_whole_in_a_loop, summed_without_tokens],
        "a token's second expert overwrites its first": [overwritten_in_a_loop, only_the_highest_id],
        "a token's last choice overwrites the others": [last_slot_by_masks, only_the_last_slot],
        "every choice weighed as the first": [
            by_slot(weight=lambda r, tokens, slot, e: r.topk_weights[tokens, 0]),
            in_sorted_rows(weight=lambda r, tokens, slots, experts: r.topk_weights.select(1, 0)[tokens]),
        ],
        "the expert's number taken for the slot": [
            by_slot(weight=lambda r, tokens, slot, e: r.topk_weights[tokens, e]),
            in_sorted_rows(weight=lambda r, tokens, slots, experts: r.topk_weights[tokens, experts]),
        ],
        "all weights of a token at once": [all_weights_in_a_loop, all_weights_in_sorted_rows],
        "results added into x": [added_into_x_by_slots, added_into_x_by_masks],
        "tokens and slots exchanged": [exchanged_in_a_loop, in_sorted_rows(exchanged=True)],
        "rows come back to the wrong tokens": [rows_from_the_top, in_sorted_rows(to=place_in_stretch)],
        "stops at an empty expert": [stops_in_a_loop, in_sorted_rows(keep=before_the_first_empty)],
        "only the first choice counts": [
            by_slot(slots=lambda k: range(1)),
            in_sorted_rows(keep=lambda r: torch.arange(r.topk_experts.shape[1]).expand_as(r.topk_experts) == 0),
        ],
        "weights not applied": [
            by_slot(weigh_output=False),
            in_sorted_rows(weight=lambda r, tokens, slots, experts: torch.ones(len(tokens))),
        ],
        "divided by k": [
            by_slot(weight=lambda r, tokens, slot, e: r.topk_weights[tokens, slot] / r.topk_weights.size(1)),
            in_sorted_rows(
                weight=lambda r, tokens, slots, experts: (r.topk_weights / len(r.topk_weights.T))[tokens, slots]
            ),
        ],
        "renormalised again": [
            by_slot(weight=lambda r, tokens, slot, e: r.topk_weights[tokens, slot] / r.topk_weights[tokens].sum(1)),
            in_sorted_rows(
                weight=lambda r, tokens, slots, experts: F.normalize(r.topk_weights, p=1, dim=1)[tokens, slots]
            ),
        ],
        "weight multiplied into the input": [
            by_slot(reads=lambda w, rows: w * rows, weigh_output=False),
            in_sorted_rows(reads=lambda w, rows: w * rows, weigh_output=False),
        ],
    },
    "3.3": {
        "the weight is left in": [
            gradient_by_token(lambda dy, out, x, w: w * (dy @ out)),
            lambda dy, x, r, expert: r.topk_weights.detach() * gathered(dy, x, r, expert),
        ],
        "dy left out": [
            gradient_by_token(lambda dy, out, x, w: out.sum()),
            lambda dy, x, r, expert: gathered(torch.ones_like(dy), x, r, expert),
        ],
        "stacked as experts by tokens": [stacked_first, looked_up_by_row],
        "the whole output in place of the expert's": [whole_output_by_token, whole_output_repeated],
        "the token in place of the expert's output": [
            gradient_by_token(lambda dy, out, x, w: dy @ x),
            lambda dy, x, r, expert: torch.linalg.vecdot(dy, x)[:, None].repeat(1, r.topk_experts.shape[1]),
        ],
        "a gradient for every expert": [
            every_expert_by_token,
            lambda dy, x, r, expert: torch.einsum(
                "td,ted->te", dy, torch.stack([expert(e, x) for e in range(r.n_experts)], 1)
            ),
        ],
        "in the order of the experts": [
            gradient_by_token(lambda dy, out, x, w: dy @ out, experts=lambda row: sorted(row.tolist())),
            masked_out_of_dense,
        ],
        "not summed over the dimensions": [
            gradient_by_token(lambda dy, out, x, w: dy * out),
            lambda dy, x, r, expert: (
                dy[:, None]
                * torch.stack([expert(e, x) for e in range(r.n_experts)], 1).gather(
                    1, r.topk_experts[..., None].expand(-1, -1, x.shape[1])
                )
            ),
        ],
        "the mean over the dimensions": [
            gradient_by_token(lambda dy, out, x, w: (dy * out).mean()),
            lambda dy, x, r, expert: gathered(dy / x.shape[-1], x, r, expert),
        ],
        "the gradient of the logits": [of_logits_by_token, of_logits_by_jacobian],
    },
    "3.4": {
        "sequences not restored": [
            changed(Looped, back=lambda self, y, x: y),
            changed(Contracted, back=lambda self, y, x: y.reshape(-1, x.shape[-1])),
        ],
        "tokens come back in another order": [
            changed(Looped, flat=lambda self, x: torch.cat(list(x.unbind(1)))),
            changed(Contracted, flat=lambda self, x: x.transpose(0, 1).flatten(0, 1)),
        ],
        "one choice for a whole sequence": [
            changed(Looped, read_by_router=sequence_means),
            changed(Contracted, read_by_router=lambda self, x: x.mean(1).repeat_interleave(x.shape[1], dim=0)),
        ],
        "the router gets no gradient": [
            changed(Looped, weights=lambda self, r: torch.tensor(r.topk_weights.tolist())),
            changed(Contracted, weights=lambda self, r: r.topk_weights.detach()),
        ],
        "only the first k experts work": [
            changed(Looped, which=lambda self, r: range(r.topk_experts.shape[1])),
            changed(Contracted, dense=first_k_of_dense),
        ],
        "gate and up exchanged": [
            changed(Looped, expert=exchanged_swiglu),
            changed(Contracted, hidden=lambda self, gate, up: gate * F.silu(up)),
        ],
        "softmax of the weights": [
            changed(Looped, weights=lambda self, r: torch.softmax(r.topk_weights, 1)),
            changed(Contracted, weights=lambda self, r: r.topk_weights.exp() / r.topk_weights.exp().sum(1, True)),
        ],
        "weights not applied": [
            changed(Looped, weights=lambda self, r: torch.ones_like(r.topk_weights)),
            changed(Contracted, dense=lambda self, r: mask_of(r)),
        ],
        "residual added": [
            changed(Looped, forward=with_residual(Looped)),
            changed(Contracted, back=lambda self, y, x: y.view_as(x) + x),
        ],
    },
    "3.5": {
        "k/E of everything": [share_in_floats, share_of_shapes],
        "k/E of everything, not a whole number": [share_in_true_floats, share_of_every_shape],
        "router forgotten": [in_numbers(router_rows=lambda moe, active: 0), as_shapes(router=False)],
        "only k rows of the router": [
            in_numbers(router_rows=lambda moe, active: moe.top_k if active else moe.n_experts),
            as_shapes(router_by_k=True),
        ],
        "two matrices in every expert": [in_numbers(matrices=lambda moe: 2), as_shapes(always=["up", "down"])],
        "three matrices in every expert": [
            in_numbers(matrices=lambda moe: 3),
            as_shapes(always=["gate", "up", "down"]),
        ],
        "active means total": [
            in_numbers(n_routed=lambda moe, active: moe.n_experts),
            as_shapes(all_experts=True),
        ],
        "k experts in the total": [in_numbers(n_routed=lambda moe, active: moe.top_k), as_shapes(only_k=True)],
        "shared experts forgotten": [in_numbers(shared_width=lambda moe, active: 0), as_shapes(shared="none")],
        "shared experts and their gate forgotten": [
            in_numbers(shared_width=lambda moe, active: 0, with_gate=lambda moe, active: False),
            as_shapes(shared="none", gate=False),
        ],
        "shared experts and their gate counted as inactive": [
            in_numbers(
                shared_width=lambda moe, active: moe.d_ff_shared * (not active),
                with_gate=lambda moe, active: moe.shared_gate and not active,
            ),
            as_shapes(shared="total", gate="total"),
        ],
        "shared experts always SwiGLUs": [
            in_numbers(shared_matrices=3),
            as_shapes(shared_names=["gate", "up", "down"]),
        ],
        "a gate where there is none": [
            in_numbers(with_gate=lambda moe, active: True),
            as_shapes(gate_shape=lambda moe: (1, moe.d_model)),
        ],
        "a gate wherever experts are shared": [
            in_numbers(with_gate=lambda moe, active: moe.n_shared_experts > 0),
            as_shapes(gate_shape=lambda moe: (moe.d_model, min(moe.d_ff_shared, 1))),
        ],
        "a gate as wide as the shared experts": [
            in_numbers(gate_width=lambda moe: moe.d_model * moe.d_ff_shared),
            as_shapes(gate_shape=lambda moe: (moe.d_ff_shared, moe.d_model) if moe.shared_gate else (0,)),
        ],
        "shared experts counted as inactive": [
            in_numbers(shared_width=lambda moe, active: moe.d_ff_shared * (not active)),
            as_shapes(shared="total"),
        ],
        "shared experts as wide as routed ones": [
            in_numbers(shared_width=lambda moe, active: moe.d_ff * moe.n_shared_experts),
            as_shapes(shared="like routed"),
        ],
        "every shared expert as wide as all": [
            in_numbers(shared_width=lambda moe, active: moe.d_ff_shared * moe.n_shared_experts),
            as_shapes(shared="each"),
        ],
        "shared experts split among the others": [
            in_numbers(
                shared_width=lambda moe, active: (
                    int(moe.d_ff_shared * moe.top_k / moe.n_experts) if active else moe.d_ff_shared
                )
            ),
            as_shapes(shared="split"),
        ],
        "the shared gate forgotten": [in_numbers(with_gate=lambda moe, active: False), as_shapes(gate=False)],
    },
    "3.6": {
        "what a token leaves out taken for all experts": [
            lambda total, active, n_experts, top_k: total - active,
            lambda t, a, e, k: sum((t - a) / (e - k) for _ in range(e - k)),
        ],
        "one expert": [
            lambda total, active, n_experts, top_k: (total - active) / (n_experts - top_k),
            lambda t, a, e, k: (t / (e - k)) - (a / (e - k)),
        ],
        "the experts of a token": [
            lambda total, active, n_experts, top_k: top_k * (total - active) / (n_experts - top_k),
            lambda t, a, e, k: sum((t - a) / (e - k) for _ in range(k)),
        ],
        "k/E of what is left out": [
            lambda total, active, n_experts, top_k: (total - active) * top_k / n_experts,
            lambda t, a, e, k: sum((t - a) / e for _ in range(k)),
        ],
        "all of the active parameters in experts": [
            lambda total, active, n_experts, top_k: active / top_k * n_experts,
            lambda t, a, e, k: sum(a / k for _ in range(e)),
        ],
        "(E - k)/E of the total": [
            lambda total, active, n_experts, top_k: total * (1 - top_k / n_experts),
            lambda t, a, e, k: t - t * k / e,
        ],
        "the fraction turned over": [
            lambda total, active, n_experts, top_k: (total - active) * (1 - top_k / n_experts),
            lambda t, a, e, k: (t - a) / (e / (e - k)),
        ],
    },
}
