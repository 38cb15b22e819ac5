"""Right answers to chapter 1 in three styles, and each of its mistakes in two forms: plain loops, and vectorised."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F

from moe_lab.accounting import Flops, Parameters

# 1.1 and 1.2: networks as loops over tokens and neurons, and in einsum.


def silu(z):
    return z / (1 + math.exp(-z))


def relu(z):
    return max(0.0, z)


def gelu(z):
    return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))


def identity(z):
    return z


def dot(row, vector):
    return sum(float(a) * float(b) for a, b in zip(row, vector, strict=True))


def mlp_loop(first=identity, middle=relu, last=identity, residual=0.0):
    """An MLP over single numbers, with an activation in any of three places."""

    def answer(x, w_up, w_down):
        y = torch.empty(x.shape[:-1] + w_down.shape[:1])
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for t, token in enumerate(flat_x):
            entering = [first(float(value)) for value in token]
            neurons = [middle(dot(row, entering)) for row in w_up]
            for d, row in enumerate(w_down):
                flat_y[t, d] = last(dot(row, neurons)) + residual * float(token[d])
        return y

    return answer


def mlp_einsum(first=identity, middle=F.relu, last=identity, residual=0.0):
    def answer(x, w_up, w_down):
        neurons = middle(torch.einsum("...d,fd->...f", first(x), w_up))
        return last(torch.einsum("...f,df->...d", neurons, w_down)) + residual * x

    return answer


def swiglu_loop(combine):
    """A gated network over single numbers; `combine(gate, up)` is one neuron."""

    def answer(x, w_gate, w_up, w_down):
        y = torch.empty(x.shape[:-1] + w_down.shape[:1])
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for t, token in enumerate(flat_x):
            neurons = [combine(dot(g, token), dot(u, token)) for g, u in zip(w_gate, w_up, strict=True)]
            for d, row in enumerate(w_down):
                flat_y[t, d] = dot(row, neurons)
        return y

    return answer


def swiglu_stacked(combine):
    """The two first matrices as one product, as released code has it."""

    def answer(x, w_gate, w_up, w_down):
        gate, up = F.linear(x, torch.cat([w_gate, w_up])).chunk(2, dim=-1)
        return F.linear(combine(gate, up), w_down)

    return answer


def brackets_missing_loop(x, w_gate, w_up, w_down):
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        gate = [silu(dot(row, token)) for row in w_gate]
        gated = [g * float(value) for g, value in zip(gate, token, strict=True)]
        out.append([dot(row, [dot(u, gated) for u in w_up]) for row in w_down])
    return torch.tensor(out).view_as(x)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


# 1.3: widths in whole numbers, and by counting up.


def two_thirds(d_model):
    return 8 * d_model // 3


def width_counting(d_model, multiple_of, multiplier=1.0):
    width = 0
    while width < int(multiplier * two_thirds(d_model)):
        width += multiple_of
    return width


def width_in_integers(d_model, multiple_of, multiplier=1.0):
    width = int(multiplier * two_thirds(d_model))
    return width + (-width) % multiple_of


# 1.4: parameters, layer by layer, and from shapes.


def parameters_by_layer(
    matrices=3, kv_heads=None, with_output=True, layers=None, with_head=True, final_norm=True, norms_per_block=2
):
    def answer(config):
        n_kv = kv_heads(config) if kv_heads else config.n_kv_heads
        attention = ffn = norms = 0
        for _ in range(layers or config.n_layers):
            attention += config.d_model * config.n_heads * config.d_head
            for _key_or_value in range(2):
                attention += config.d_model * n_kv * config.d_head
            if with_output:
                attention += config.n_heads * config.d_head * config.d_model
            for _matrix in range(matrices):
                ffn += config.d_model * config.d_ff
            for _norm in range(norms_per_block):
                norms += config.d_model
        table = config.vocab_size * config.d_model
        return Parameters(
            embedding=table,
            attention=attention,
            ffn=ffn,
            norms=norms + (config.d_model if final_norm else 0),
            head=table if with_head else 0,
        )

    return answer


def parameters_by_shape(
    ffn_shapes=3,
    kv_heads=None,
    shared_key_value=False,
    with_output=True,
    one_layer=False,
    with_head=True,
    final_norm=True,
    norms_per_block=2,
):
    def answer(config):
        d, q = config.d_model, config.n_heads * config.d_head
        kv = (kv_heads(config) if kv_heads else config.n_kv_heads) * config.d_head
        shapes = [(d, q), (d, kv), *([] if shared_key_value else [(d, kv)]), *([(q, d)] if with_output else [])]
        repeat = 1 if one_layer else config.n_layers
        return Parameters(
            embedding=config.vocab_size * d,
            attention=repeat * sum(math.prod(shape) for shape in shapes),
            ffn=repeat * sum(math.prod(shape) for shape in [(d, config.d_ff)] * ffn_shapes),
            norms=d * (norms_per_block * repeat + final_norm),
            head=config.vocab_size * d * with_head,
        )

    return answer


def with_attention(config, heads):
    right = parameters_by_layer()(config)
    attention = config.n_layers * config.d_model * config.d_head * heads
    return Parameters(embedding=right.embedding, attention=attention, ffn=right.ffn, norms=right.norms, head=right.head)


def parameters_of_the_model(config):
    from moe_lab.lm import LM

    with torch.device("meta"):
        model = LM(config)

    def size(*modules):
        return sum(weight.numel() for module in modules for weight in module.parameters())

    blocks = model.blocks
    return Parameters(
        embedding=size(model.embedding),
        attention=size(*(block.attention for block in blocks)),
        ffn=size(*(block.ffn for block in blocks)),
        norms=size(model.norm, *(norm for block in blocks for norm in (block.attention_norm, block.ffn_norm))),
        head=size(model.head),
    )


# 1.5: FLOPs.


def pairs_by_position(tokens):
    return sum(position + 1 for position in range(tokens))


def flops(fma=2, pairs=pairs_by_position, products=2, score_heads=None, per_token=False, scores=1):
    """FLOPs from the sizes alone; every argument is a way to go wrong."""

    def answer(config, tokens):
        d, h = config.d_model, config.d_head
        heads = score_heads(config) if score_heads else config.n_heads
        projections = d * h * (2 * config.n_heads + 2 * config.n_kv_heads)
        share = tokens if per_token else 1
        return Flops(
            attention_projections=fma * tokens * config.n_layers * projections // share,
            attention_scores=scores * fma * products * pairs(tokens) * h * heads * config.n_layers // share,
            ffn=fma * tokens * config.n_layers * 3 * d * config.d_ff // share,
            head=fma * tokens * config.vocab_size * d // share,
        )

    return answer


def flops_layer_by_layer(
    fma=2, pairs=lambda s: s * (s + 1) // 2, products=2, score_heads=None, per_token=False, scores=1
):
    def answer(config, tokens):
        totals = {"attention_projections": 0, "attention_scores": 0, "ffn": 0}
        for _ in range(config.n_layers):
            for heads in (config.n_heads, config.n_kv_heads, config.n_kv_heads, config.n_heads):
                totals["attention_projections"] += fma * tokens * config.d_model * heads * config.d_head
            for _head in range(score_heads(config) if score_heads else config.n_heads):
                totals["attention_scores"] += scores * products * fma * pairs(tokens) * config.d_head
            for _matrix in ("gate", "up", "down"):
                totals["ffn"] += fma * tokens * config.d_model * config.d_ff
        totals["head"] = fma * tokens * config.d_model * config.vocab_size
        return Flops(**{part: total // tokens if per_token else total for part, total in totals.items()})

    return answer


def heads_as_wide_as_d(count):
    def answer(config, tokens):
        right = count(config, tokens)
        narrow = count(config.but(d_head=config.d_model // config.n_heads), tokens)
        return Flops(
            attention_projections=right.attention_projections,
            attention_scores=narrow.attention_scores,
            ffn=right.ffn,
            head=right.head,
        )

    return answer


def scores_over_d_loop(config, tokens):
    right = flops_layer_by_layer()(config, tokens)
    scores = 0
    for _layer in range(config.n_layers):
        for position in range(tokens):
            scores += 2 * 2 * config.d_model * (position + 1)
    return Flops(
        attention_projections=right.attention_projections, attention_scores=scores, ffn=right.ffn, head=right.head
    )


def flops_from_fractions(config, tokens):
    full = flops(pairs=lambda s: s * s)(config, tokens)
    scores = full.attention_scores * Fraction(tokens + 1, 2 * tokens)
    return Flops(
        attention_projections=full.attention_projections,
        attention_scores=int(scores),
        ffn=full.ffn,
        head=full.head,
    )


# 1.6: the strongest neurons, token by token, and by threshold.


def strongest_loop(
    strength=lambda value, length: abs(value) * length,
    best=max,
    write=lambda value, length: value,
    count=lambda share, width: max(1, round(share * width)),
):
    def answer(hidden, w_down, share):
        lengths = [math.sqrt(sum(float(v) ** 2 for v in column)) for column in w_down.T]
        out = torch.zeros_like(hidden)
        flat, flat_out = hidden.reshape(-1, hidden.shape[-1]), out.view(-1, hidden.shape[-1])
        for t, token in enumerate(flat.tolist()):
            left = set(range(len(token)))
            for _ in range(count(share, len(token))):
                winner = best(sorted(left), key=lambda i: strength(token[i], lengths[i]))
                left.remove(winner)
                flat_out[t, winner] = write(token[winner], lengths[winner])
        return out

    return answer


def strongest_by_rank(strength, descending=True, write=lambda hidden, strength: hidden, at_least_one=True):
    def answer(hidden, w_down, share):
        strong = strength(hidden, w_down.square().sum(0).sqrt())
        rank = strong.argsort(dim=-1, descending=descending).argsort(dim=-1)
        count = round(share * hidden.shape[-1])
        return torch.where(rank < (max(1, count) if at_least_one else count), write(hidden, strong), 0.0)

    return answer


def strongest_by_threshold(hidden, w_down, share):
    strong = hidden.abs() * torch.linalg.vector_norm(w_down, dim=0)
    count = max(1, round(share * hidden.shape[-1]))
    threshold = strong.sort(dim=-1, descending=True).values[..., count - 1 : count]
    return hidden * (strong >= threshold)


def same_for_all_loop(hidden, w_down, share):
    lengths = [math.sqrt(sum(float(v) ** 2 for v in column)) for column in w_down.T]
    rows = hidden.reshape(-1, hidden.shape[-1]).tolist()
    total = [sum(abs(row[i]) * lengths[i] for row in rows) for i in range(len(lengths))]
    winners = sorted(range(len(lengths)), key=lambda i: -total[i])[: max(1, round(share * len(lengths)))]
    out = torch.zeros_like(hidden)
    for i in winners:
        out[..., i] = hidden[..., i]
    return out


def same_for_all_summed(hidden, w_down, share):
    total = (hidden.abs() * w_down.norm(dim=0)).reshape(-1, hidden.shape[-1]).sum(0)
    mask = torch.zeros_like(total)
    mask[total.topk(max(1, round(share * len(total)))).indices] = 1
    return hidden * mask


def across_all_tokens_loop(hidden, w_down, share):
    lengths = [math.sqrt(sum(float(v) ** 2 for v in column)) for column in w_down.T]
    flat = hidden.reshape(-1, hidden.shape[-1])
    places = [(abs(float(flat[t, i])) * lengths[i], t, i) for t in range(len(flat)) for i in range(len(lengths))]
    out = torch.zeros_like(flat)
    for _, t, i in sorted(places, reverse=True)[: max(1, round(share * len(places)))]:
        out[t, i] = flat[t, i]
    return out.view_as(hidden)


def across_all_tokens_by_threshold(hidden, w_down, share):
    strong = hidden.abs() * w_down.square().sum(0).sqrt()
    count = max(1, round(share * strong.numel()))
    return torch.where(strong >= strong.flatten().sort(descending=True).values[count - 1], hidden, 0.0)


def product(hidden, lengths):
    return hidden.abs() * lengths


RIGHT = {
    "1.1": [mlp_loop(), mlp_einsum(), lambda x, w_up, w_down: F.linear(F.linear(x, w_up).clamp_min(0), w_down)],
    "1.2": [
        swiglu_loop(lambda gate, up: silu(gate) * up),
        swiglu_stacked(lambda gate, up: gate * gate.sigmoid() * up),
        lambda x, w_gate, w_up, w_down: torch.einsum("...f,df->...d", F.silu(x @ w_gate.mT) * (x @ w_up.mT), w_down),
    ],
    "1.3": [
        width_counting,
        width_in_integers,
        lambda d_model, multiple_of, multiplier=1.0: (
            math.ceil(int(multiplier * int(2 * 4 * d_model / 3)) / multiple_of) * multiple_of
        ),
    ],
    "1.4": [parameters_by_layer(), parameters_by_shape(), parameters_of_the_model],
    "1.5": [flops(), flops_layer_by_layer(), flops_from_fractions],
    "1.6": [strongest_loop(), strongest_by_rank(product), strongest_by_threshold],
}

WRONG = {
    "1.1": {
        "no activation": [mlp_loop(middle=identity), mlp_einsum(middle=identity)],
        "activation on the output": [mlp_loop(middle=identity, last=relu), mlp_einsum(middle=identity, last=F.relu)],
        "activation on the input": [mlp_loop(first=relu, middle=identity), mlp_einsum(first=F.relu, middle=identity)],
        "activation twice": [mlp_loop(last=relu), mlp_einsum(last=F.relu)],
        "residual added": [mlp_loop(residual=1.0), mlp_einsum(residual=1.0)],
        "another activation": [mlp_loop(middle=gelu), mlp_einsum(middle=F.gelu)],
        "SiLU in place of ReLU": [mlp_loop(middle=silu), mlp_einsum(middle=F.silu)],
        "weights not transposed": [
            lambda x, w_up, w_down: mlp_loop()(x, w_up.T, w_down.T),
            lambda x, w_up, w_down: torch.matmul(F.relu(torch.matmul(x, w_up)), w_down),
        ],
        "w_down not transposed": [
            lambda x, w_up, w_down: mlp_loop()(x, w_up, w_down.T),
            lambda x, w_up, w_down: torch.matmul(F.linear(x, w_up).relu(), w_down),
        ],
        "w_up not transposed": [
            lambda x, w_up, w_down: mlp_loop()(x, w_up.T, w_down),
            lambda x, w_up, w_down: F.linear(torch.matmul(x, w_up).relu(), w_down),
        ],
    },
    "1.2": {
        "gate and up exchanged": [
            swiglu_loop(lambda gate, up: gate * silu(up)),
            swiglu_stacked(lambda gate, up: gate * F.silu(up)),
        ],
        "sigmoid in place of SiLU": [
            swiglu_loop(lambda gate, up: sigmoid(gate) * up),
            swiglu_stacked(lambda gate, up: torch.sigmoid(gate) * up),
        ],
        "added in place of multiplied": [
            swiglu_loop(lambda gate, up: silu(gate) + up),
            swiglu_stacked(lambda gate, up: F.silu(gate) + up),
        ],
        "no activation on the gate": [
            swiglu_loop(lambda gate, up: gate * up),
            swiglu_stacked(lambda gate, up: gate * up),
        ],
        "SiLU on both branches": [
            swiglu_loop(lambda gate, up: silu(gate) * silu(up)),
            swiglu_stacked(lambda gate, up: F.silu(gate) * F.silu(up)),
        ],
        "SiLU after the product": [
            swiglu_loop(lambda gate, up: silu(gate * up)),
            swiglu_stacked(lambda gate, up: F.silu(gate * up)),
        ],
        "GELU on the gate": [
            swiglu_loop(lambda gate, up: gelu(gate) * up),
            swiglu_stacked(lambda gate, up: F.gelu(gate) * up),
        ],
        "weights not transposed": [
            lambda x, w_gate, w_up, w_down: swiglu_loop(lambda g, u: silu(g) * u)(x, w_gate.T, w_up.T, w_down.T),
            lambda x, w_gate, w_up, w_down: torch.matmul(F.silu(torch.matmul(x, w_gate)) * (x @ w_up), w_down),
        ],
        "brackets missing": [
            brackets_missing_loop,
            lambda x, w_gate, w_up, w_down: F.linear(F.linear(F.silu(F.linear(x, w_gate)) * x, w_up), w_down),
        ],
        "a matrix product in place of *": [
            lambda x, w_gate, w_up, w_down: F.linear(torch.matmul(F.silu(x @ w_gate.T), x @ w_up.T), w_down),
            lambda x, w_gate, w_up, w_down: F.silu(F.linear(x, w_gate)) @ F.linear(x, w_up) @ w_down.T,
        ],
    },
    "1.3": {
        "rounded down": [
            lambda d, m, f=1.0: int(f * two_thirds(d)) - int(f * two_thirds(d)) % m,
            lambda d, m, f=1.0: max(range(0, 8 * d, m), key=lambda w: (w <= int(f * two_thirds(d))) * w),
        ],
        "rounded to the nearest": [
            lambda d, m, f=1.0: (int(f * two_thirds(d)) + m // 2) // m * m,
            lambda d, m, f=1.0: min(range(0, 8 * d, m), key=lambda w: abs(w - int(f * two_thirds(d)))),
        ],
        "one multiple too many": [
            lambda d, m, f=1.0: int(f * two_thirds(d)) + m - int(f * two_thirds(d)) % m,
            lambda d, m, f=1.0: next(w for w in range(0, 16 * d, m) if w > int(f * two_thirds(d))),
        ],
        "number of multiples": [
            lambda d, m, f=1.0: width_counting(d, m, f) // m,
            lambda d, m, f=1.0: math.ceil(int(f * two_thirds(d)) / m),
        ],
        "two thirds of D": [
            lambda d, m, f=1.0: math.ceil(int(f * (2 * d // 3)) / m) * m,
            lambda d, m, f=1.0: next(w for w in range(0, 16 * d, m) if w >= int(f * int(d * 2 / 3))),
        ],
        "cut once": [
            lambda d, m, f=1.0: math.ceil(int(f * (8 / 3) * d) / m) * m,
            lambda d, m, f=1.0: next(w for w in range(0, 16 * d, m) if w >= math.floor(f * 4 * d * 2 / 3)),
        ],
        "never cut": [
            lambda d, m, f=1.0: math.ceil(f * (8 / 3) * d / m) * m,
            lambda d, m, f=1.0: next(w for w in range(0, 16 * d, m) if w >= f * 4 * d * 2 / 3),
        ],
        "no two thirds": [
            lambda d, m, f=1.0: math.ceil(int(f * 4 * d) / m) * m,
            lambda d, m, f=1.0: next(w for w in range(0, 16 * d, m) if w >= int(f * 4 * d)),
        ],
        "multiplier after rounding": [
            lambda d, m, f=1.0: int(f * width_counting(d, m)),
            lambda d, m, f=1.0: math.floor(width_in_integers(d, m) * f),
        ],
        "multiplier ignored": [
            lambda d, m, f=1.0: width_counting(d, m),
            lambda d, m, f=1.0: math.ceil(two_thirds(d) / m) * m,
        ],
    },
    "1.4": {
        "two matrices in the FFN": [parameters_by_layer(matrices=2), parameters_by_shape(ffn_shapes=2)],
        "keys and values for every head": [
            parameters_by_layer(kv_heads=lambda config: config.n_heads),
            parameters_by_shape(kv_heads=lambda config: config.n_heads),
        ],
        "output projection forgotten": [parameters_by_layer(with_output=False), parameters_by_shape(with_output=False)],
        "keys or values forgotten": [
            lambda config: with_attention(config, 2 * config.n_heads + config.n_kv_heads),
            parameters_by_shape(shared_key_value=True),
        ],
        "D taken for the width of the heads": [
            lambda config: parameters_by_layer()(config.but(d_head=config.d_model // config.n_heads)),
            lambda config: parameters_by_shape()(config.but(d_head=config.d_model // config.n_heads)),
        ],
        "one layer only": [parameters_by_layer(layers=1), parameters_by_shape(one_layer=True)],
        "head forgotten": [parameters_by_layer(with_head=False), parameters_by_shape(with_head=False)],
        "final norm forgotten": [parameters_by_layer(final_norm=False), parameters_by_shape(final_norm=False)],
        "one norm a block": [parameters_by_layer(norms_per_block=1), parameters_by_shape(norms_per_block=1)],
    },
    "1.5": {
        "a multiply-add as one": [flops(fma=1), flops_layer_by_layer(fma=1)],
        "scores of the full square": [
            flops(pairs=lambda s: s * s),
            flops_layer_by_layer(pairs=lambda s: sum(s for _ in range(s))),
        ],
        "no token looks at itself": [
            flops(pairs=lambda s: sum(range(s))),
            flops_layer_by_layer(pairs=lambda s: s * (s - 1) // 2),
        ],
        "half of the square": [
            flops(pairs=lambda s: s * s // 2),
            flops_layer_by_layer(pairs=lambda s: int(s**2 / 2)),
        ],
        "D taken for the width of the heads": [scores_over_d_loop, heads_as_wide_as_d(flops())],
        "half of the attention scores": [flops(products=1), flops_layer_by_layer(products=1)],
        "scores for the key heads only": [
            flops(score_heads=lambda config: config.n_kv_heads),
            flops_layer_by_layer(score_heads=lambda config: config.n_kv_heads),
        ],
        "one token only": [flops(per_token=True), flops_layer_by_layer(per_token=True)],
        "attention scores forgotten": [flops(scores=0), flops_layer_by_layer(scores=0)],
    },
    "1.6": {
        "the same neurons for every token": [same_for_all_loop, same_for_all_summed],
        "the sign counts": [
            strongest_loop(strength=lambda value, length: value * length),
            strongest_by_rank(lambda hidden, lengths: hidden * lengths),
        ],
        "what a neuron writes is ignored": [
            strongest_loop(strength=lambda value, length: abs(value)),
            strongest_by_rank(lambda hidden, lengths: hidden.abs()),
        ],
        "lengths of the rows": [
            lambda hidden, w_down, share: strongest_loop()(hidden, w_down.T, share),
            lambda hidden, w_down, share: strongest_by_rank(product)(hidden, w_down.T, share),
        ],
        "one choice across all tokens": [across_all_tokens_loop, across_all_tokens_by_threshold],
        "the weakest are kept": [strongest_loop(best=min), strongest_by_rank(product, descending=False)],
        "the choice in place of the values": [
            strongest_loop(write=lambda value, length: 1.0),
            strongest_by_rank(product, write=lambda hidden, strength: torch.ones_like(hidden)),
        ],
        "the strengths in place of the values": [
            strongest_loop(write=lambda value, length: abs(value) * length),
            strongest_by_rank(product, write=lambda hidden, strength: strength),
        ],
        "no neuron is left": [
            strongest_loop(count=lambda share, width: round(share * width)),
            strongest_by_rank(product, at_least_one=False),
        ],
        "the count rounded up": [
            strongest_loop(count=lambda share, width: math.ceil(share * width)),
            lambda hidden, w_down, share: strongest_by_threshold(hidden, w_down, math.ceil(share * 12) / 12),
        ],
        "the count rounded down": [
            strongest_loop(count=lambda share, width: max(1, int(share * width))),
            lambda hidden, w_down, share: strongest_by_threshold(hidden, w_down, math.floor(share * 12) / 12),
        ],
    },
}
