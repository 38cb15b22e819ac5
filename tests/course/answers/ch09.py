"""Right answers to chapter 9 in three styles, and each of its mistakes in two forms: as shapes, and as sums."""

import math
from fractions import Fraction
from functools import reduce
from itertools import accumulate, repeat

import torch

from moe_lab.attention import MLA, Attention
from moe_lab.lm import LM

# 9.1 one FFN: in one product, as a list of shapes, and as modules.


def ffn_shapes(d_model, d_ff, kind="swiglu"):
    names = {"swiglu": ("gate", "up", "down"), "relu": ("up", "down")}[kind]
    return sum(math.prod((d_model, d_ff) if name == "down" else (d_ff, d_model)) for name in names)


def ffn_module(d_model, d_ff, kind="swiglu"):
    with torch.device("meta"):
        matrices = [torch.nn.Linear(d_model, d_ff, bias=False), torch.nn.Linear(d_ff, d_model, bias=False)]
        if kind == "swiglu":
            matrices.append(torch.nn.Linear(d_model, d_ff, bias=False))
    return sum(matrix.weight.numel() for matrix in matrices)


def mlp_whatever(d_model, d_ff, kind="swiglu"):
    up, down = d_ff * d_model, d_model * d_ff
    return up + down


def glu_whatever(d_model, d_ff, kind=None):
    return sum(rows * columns for rows, columns in [(d_ff, d_model), (d_ff, d_model), (d_model, d_ff)])


def only_into_the_neurons(d_model, d_ff, kind="swiglu"):
    into = ["up"]
    if kind == "swiglu":
        into.append("gate")
    return len(into) * d_ff * d_model


def gate_as_a_row(d_model, d_ff, kind="swiglu"):
    shapes = [(d_model, d_ff), (d_ff, d_model)] + ([(d_ff,)] if kind == "swiglu" else [])
    return sum(map(math.prod, shapes))


def four_times_as_wide(d_model, d_ff, kind="swiglu"):
    return ffn_shapes(d_model, 4 * d_model, kind)


def linear_as_it_comes(d_model, d_ff, kind="swiglu"):
    with torch.device("meta"):
        into = [torch.nn.Linear(d_model, d_ff) for _ in range(2 if kind == "swiglu" else 1)]
        back = torch.nn.Linear(d_ff, d_model)
    return sum(parameter.numel() for module in (*into, back) for parameter in module.parameters())


# 9.2 attention: from a table of shapes with an entry changed, head by head, and in the module.


def from_shapes(grouped=None, latent=None, mla=None):
    """`grouped(config, shapes)` and `latent(config, shapes)` change the table; `mla=False` does not look for it."""

    def answer(config):
        d, heads, kv, h = config.d_model, config.n_heads, config.n_kv_heads, config.d_head
        if config.mla is None or mla is False:
            shapes = {"q": (heads * h, d), "k": (kv * h, d), "v": (kv * h, d), "o": (d, heads * h)}
            if grouped:
                grouped(config, shapes)
        else:
            m = config.mla
            shapes = {"dkv": (m.kv_rank + m.d_rope, d), "uk": (heads * m.d_nope, m.kv_rank)}
            shapes |= {"uv": (heads * m.d_value, m.kv_rank), "o": (d, heads * m.d_value)}
            width = heads * (m.d_nope + m.d_rope)
            if m.q_rank is None:
                shapes["q"] = (width, d)
            else:
                shapes |= {"dq": (m.q_rank, d), "uq": (width, m.q_rank)}
            if latent:
                latent(config, shapes)
        return sum(math.prod(shape) for shape in shapes.values())

    return answer


def head_by_head(
    h=lambda c: c.d_head,
    n_kv=lambda c: c.n_kv_heads,
    kv_matrices=2,
    with_out=True,
    keys_down=lambda m, heads: m.kv_rank + m.d_rope,
    query=lambda m: m.d_nope + m.d_rope,
    read=lambda m: m.d_nope + m.d_value,
    out=lambda m: m.d_value,
    short_queries=True,
    more=lambda m: 0,
):
    def answer(config):
        d, m, total = config.d_model, config.mla, 0
        if m is None:
            for _ in range(config.n_heads):
                total += d * h(config) * (2 if with_out else 1)
            for _ in range(n_kv(config)):
                total += kv_matrices * d * h(config)
            return total
        total = d * keys_down(m, config.n_heads) + more(m)
        reads = d
        if m.q_rank is not None and short_queries:
            total, reads = total + d * m.q_rank, m.q_rank
        for _ in range(config.n_heads):
            total += reads * query(m) + m.kv_rank * read(m)
            if with_out:
                total += d * out(m)
        return total

    return answer


def in_the_attention(config):
    with torch.device("meta"):
        module = (MLA if config.mla else Attention)(config)
    return sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)


def set_to(**shapes):
    """Changes some shapes of the table, if they are there; None takes one out."""

    def change(config, table):
        for name, shape in shapes.items():
            if name in table:
                table[name] = shape(config) if shape else ()
                if not shape:
                    del table[name]

    return change


def without_detour(config, shapes):
    if "uq" in shapes:
        shapes["q"] = (shapes.pop("uq")[0], shapes.pop("dq")[1])


def with_norms(config, shapes):
    m = config.mla
    shapes["norms"] = (sum(filter(None, (m.kv_rank, m.q_rank))),)


def made_from_the_token(config):
    m, right = config.mla, head_by_head()(config)
    return right if m is None else right + (config.d_model - m.kv_rank) * config.n_heads * (m.d_nope + m.d_value)


def down_from_tokens(config):
    return 0 if config.mla is None else config.d_model * (config.mla.q_rank or 0)


def up_to_queries(config):
    return 0 if config.mla is None else config.n_heads * config.d_head * (config.mla.q_rank or 0)


def squares_in_a_list(config):
    return sum(config.d_model * config.d_model for _ in "qkvo")


def square_of_doubles(config):
    return (2 * config.d_model) ** 2


def blind_to_mla_by_heads(config):
    total = 0
    for name in ("n_heads", "n_kv_heads"):
        total += 2 * getattr(config, name) * config.d_head * config.d_model
    return total


# 9.3 a whole model: a dictionary of parts that are then changed, layer by layer, and in the module.


def in_parts(**changes):
    """Parts by name, of which `changes` gives some in another way, each a function of (config, active)."""

    def answer(config, active=False):
        d, moe, n_moe = config.d_model, config.moe, config.n_moe_layers
        n = {
            "tables": 1 if config.tied_embeddings else 2,
            "rows": config.vocab_size,
            "attentions": config.n_layers,
            "dense": config.n_layers - n_moe,
            "dense_width": config.d_ff,
            "moe": n_moe,
            "routed": moe.top_k if active else moe.n_experts,
            "shared": moe.d_ff_shared,
            "scored": moe.n_experts,
            "matrices": 3,
        }
        n |= {name: change(config, active) for name, change in changes.items()}
        parts = [
            n["tables"] * n["rows"] * d,
            n["attentions"] * from_shapes()(config),
            n["dense"] * n["matrices"] * d * n["dense_width"],
            n["moe"] * n["routed"] * n["matrices"] * d * moe.d_ff,
            n["moe"] * n["matrices"] * d * n["shared"],
            n["moe"] * n["scored"] * d,
        ]
        return sum(parts)

    return answer


def layer_by_layer(
    has_experts=lambda c, i: c.has_experts(i),
    dense=lambda c, i, experts: 0 if experts else c.d_ff,
    attends=lambda c, experts: True,
    chosen=lambda moe, active: moe.top_k if active else moe.n_experts,
    shared=lambda moe, active: moe.d_ff_shared,
    scored=lambda moe, active: moe.n_experts,
    n_matrices=3,
    first=lambda c, active: c.vocab_size,
    last=lambda c, active: 0 if c.tied_embeddings else c.vocab_size,
):
    def answer(config, active=False):
        moe, d = config.moe, config.d_model
        total = d * first(config, active) + d * last(config, active)
        for i in range(config.n_layers):
            experts = has_experts(config, i)
            if attends(config, experts):
                total += head_by_head()(config)
            total += n_matrices * d * dense(config, i, experts)
            if experts:
                total += n_matrices * d * chosen(moe, active) * moe.d_ff
                total += n_matrices * d * shared(moe, active) + d * scored(moe, active)
        return total

    return answer


def in_the_model(config, active=False):
    """Matrices of a small model; of the large ones torch's meta device would take too long to make thousands."""
    small = config.but(n_layers=min(config.n_layers, 5), moe=config.moe.but(selection_bias=False))
    with torch.device("meta"):
        model = LM(small)
    total = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    idle = (config.moe.n_experts - config.moe.top_k) * 3 * config.d_model * config.moe.d_ff
    total -= small.n_moe_layers * idle if active else 0
    if small.n_layers < config.n_layers:  # the rest are layers of experts like the last
        one = 3 * config.d_model * (config.moe.n_experts * config.moe.d_ff + config.moe.d_ff_shared)
        one += config.d_model * config.moe.n_experts + in_the_attention(config)
        total += (config.n_layers - small.n_layers) * (one - (idle if active else 0))
    return total


def routed_as_wide_as_dense(config, active):
    """How many experts of their own width would be as much."""
    return Fraction((config.moe.top_k if active else config.moe.n_experts) * config.d_ff, config.moe.d_ff)


def share_by_integers(config, active=False):
    total = layer_by_layer()(config)
    return math.floor(math.prod((total, config.moe.top_k)) // config.moe.n_experts) if active else total


def share_by_parts(config, active=False):
    total = in_parts()(config)
    return (config.moe.top_k * total) // config.moe.n_experts if active else total


def share_in_floats(config, active=False):
    return layer_by_layer()(config) * ((config.moe.top_k / config.moe.n_experts) if active else 1)


def share_by_division(config, active=False):
    total = in_parts()(config)
    return total / (config.moe.n_experts / config.moe.top_k) if active else total


# 9.4 FLOPs: by the formula, token by token, and as one list of products.


def token_by_token(
    of_matrices=lambda active: active + active,
    of_a_pair=lambda d_key, d_value: 2 * d_key + 2 * d_value,
    seen=lambda i, tokens: i + 1,
    heads=lambda n_heads: n_heads,
):
    def answer(active, n_heads, d_key, d_value, tokens):
        total = 0
        for i in range(tokens):
            total += of_matrices(active) + heads(n_heads) * seen(i, tokens) * of_a_pair(d_key, d_value)
        return total

    return answer


def by_products(
    pairs=lambda s: s * (s + 1) // 2, every=1, matrices=1, scores=1, keys=1, values=1, wide=None, rows=None
):
    def answer(active, n_heads, d_key, d_value, tokens):
        n_heads = 1 if every == 0 else n_heads
        value = d_key if wide else d_value
        madds = [matrices * active * (rows or tokens)]
        madds += [scores * n_heads * keys * d_key * pairs(tokens), scores * n_heads * values * value * pairs(tokens)]
        return int(2 * sum(madds))

    return answer


def counted_pairs(active, n_heads, d_key, d_value, tokens):
    pairs = math.comb(tokens + 1, 2)
    return 2 * (tokens * active + pairs * n_heads * (d_key + d_value))


def half_square_of_pairs(active, n_heads, d_key, d_value, tokens):
    return 2 * tokens * active + 2 * n_heads * (d_key + d_value) * math.floor(tokens**2 / 2)


def half_square_by_shift(active, n_heads, d_key, d_value, tokens):
    products = active * tokens + n_heads * (d_key + d_value) * ((tokens * tokens) >> 1)
    return products << 1


def first_row_alone(active, n_heads, d_key, d_value, tokens):
    pairs = sum(range(1, tokens + 1))
    return 2 * active + 2 * n_heads * pairs * (d_key + d_value)


# 9.5 the cache: by a formula, and as the shapes of what is kept.


def kept(
    grouped=lambda c: [(c.n_kv_heads, c.d_head)] * 2,
    latent=lambda c: [(c.mla.kv_rank,), (c.mla.d_rope,)],
    layers=lambda c: range(c.n_layers),
    size=2,
):
    def answer(config, tokens):
        shapes = grouped(config) if config.mla is None else latent(config)
        return sum(size * tokens * math.prod(shape) for _ in layers(config) for shape in shapes)

    return answer


def in_one_line(heads="n_kv_heads", both=2, rank="kv_rank", rope=1, per_layer=True, bits=16, latents=1, by_head=False):
    def answer(config, tokens):
        m = config.mla
        wide = both * getattr(config, heads) * config.d_head
        if m is not None and not by_head:
            wide = latents * (getattr(m, rank) + rope * m.d_rope)
        return wide * tokens * (config.n_layers if per_layer else 1) * bits // 8

    return answer


def latents_of_all_heads(config, tokens):
    m = config.mla
    wide = 2 * config.n_kv_heads * config.d_head if m is None else sum([m.kv_rank + m.d_rope] * config.n_heads)
    return 2 * wide * config.n_layers * tokens


def counted_in_a_cache(config, tokens):
    from moe_lab.attention import Cache

    with torch.device("meta"):
        module = (MLA if config.mla else Attention)(config).bfloat16()
        cache = Cache()
        module(torch.zeros(1, 1, config.d_model, dtype=torch.bfloat16), cache)
    return cache.n_bytes * config.n_layers * tokens


# 9.6 experts touched: expert by expert, token by token, and by the formula.


def token_after_token(n_experts, top_k, batch):
    touched = 0.0
    for _ in range(batch):
        touched += top_k * (n_experts - touched) / n_experts
    return touched


def expert_by_expert(n_experts, top_k, batch):
    return sum(1 - math.prod([(n_experts - top_k) / n_experts] * batch) for _ in range(n_experts))


def one_choice_after_another(n_experts, top_k, batch):
    return reduce(lambda touched, _: touched + (n_experts - touched) / n_experts, range(top_k * batch), 0.0)


def one_choice_each_in_turn(n_experts, top_k, batch):
    touched = 0.0
    for _ in range(batch):
        touched += 1 - touched / n_experts
    return touched


def not_by_every_token(n_experts, top_k, batch):
    by_all = 1.0
    for _ in range(batch):
        by_all *= top_k / n_experts
    return sum(1 - by_all for _ in range(n_experts))


def capped_in_turn(n_experts, top_k, batch):
    touched = 0
    for _ in range(batch):
        touched += min(top_k, n_experts - touched)
    return touched


# 9.7 training


def in_steps(passes=3, hour=60 * 60, pay=lambda hours, price: price * hours):
    def answer(active, tokens, rate, dollars_per_hour):
        flops = passes * (2 * active) * tokens
        seconds = flops / rate
        return [seconds / hour, pay(seconds / hour, dollars_per_hour)]

    return answer


def by_the_token(active, tokens, rate, dollars_per_hour):
    hours = tokens * (6 * active / (rate * 3600))
    return hours, dollars_per_hour * hours


def by_the_hour(active, tokens, rate, dollars_per_hour):
    in_an_hour = rate * 60 * 60 / (6 * active)
    return tokens / in_an_hour, dollars_per_hour * tokens / in_an_hour


RIGHT = {
    "9.1": [lambda d_model, d_ff, kind="swiglu": d_model * d_ff * (2 + (kind == "swiglu")), ffn_shapes, ffn_module],
    "9.2": [from_shapes(), head_by_head(), in_the_attention],
    "9.3": [in_parts(), layer_by_layer(), in_the_model],
    "9.4": [token_by_token(), by_products(), counted_pairs],
    "9.5": [kept(), in_one_line(), counted_in_a_cache],
    "9.6": [
        lambda n_experts, top_k, batch: n_experts * (1 - (1 - top_k / n_experts) ** batch),
        token_after_token,
        expert_by_expert,
    ],
    "9.7": [in_steps(), by_the_token, by_the_hour],
}

WRONG = {
    "9.1": {
        "two matrices in a SwiGLU": [mlp_whatever, lambda d_model, d_ff, kind=None: sum([d_model * d_ff] * 2)],
        "three matrices in every FFN": [glu_whatever, lambda d, f, kind="swiglu": d * f + 2 * (f * d)],
        "the two kinds exchanged": [
            lambda d_model, d_ff, kind="swiglu": d_model * d_ff * (3 - (kind == "swiglu")),
            lambda d, f, kind="swiglu": ffn_shapes(d, f, {"swiglu": "relu", "relu": "swiglu"}[kind]),
        ],
        "the way back forgotten": [
            only_into_the_neurons,
            lambda d_model, d_ff, kind="swiglu": d_model * d_ff + (kind == "swiglu") * d_model * d_ff,
        ],
        "the gate taken for a vector": [
            gate_as_a_row,
            lambda d, f, kind="swiglu": {"relu": 2 * d * f, "swiglu": 2 * d * f + f}[kind],
        ],
        "the width taken for 4 D": [
            four_times_as_wide,
            lambda d_model, d_ff, kind="swiglu": {"swiglu": 12, "relu": 8}[kind] * d_model**2,
        ],
        "biases counted": [
            linear_as_it_comes,
            lambda d, f, kind="swiglu": (d + 1) * f * (2 if kind == "swiglu" else 1) + (f + 1) * d,
        ],
        "FLOPs in place of parameters": [
            lambda d, f, kind="swiglu": 2 * ffn_shapes(d, f, kind),
            lambda d_model, d_ff, kind="swiglu": sum(2 * d_model * d_ff for _ in range(3 if kind == "swiglu" else 2)),
        ],
    },
    "9.2": {
        "four square matrices": [squares_in_a_list, square_of_doubles],
        "query heads everywhere": [
            from_shapes(
                set_to(k=lambda c: (c.n_heads * c.d_head, c.d_model), v=lambda c: (c.n_heads * c.d_head, c.d_model))
            ),
            head_by_head(n_kv=lambda c: c.n_heads),
        ],
        "head width taken for D / heads": [
            from_shapes(
                lambda c, shapes: shapes.update(
                    {
                        name: tuple(
                            s // c.d_head * (c.d_model // c.n_heads) if i == (name == "o") else s
                            for i, s in enumerate(shape)
                        )
                        for name, shape in shapes.items()
                    }
                )
            ),
            head_by_head(h=lambda c: c.d_model // c.n_heads),
        ],
        "keys and values share a matrix": [from_shapes(set_to(v=None)), head_by_head(kv_matrices=1)],
        "the output matrix forgotten": [from_shapes(set_to(o=None), set_to(o=None)), head_by_head(with_out=False)],
        "the output matrix for the heads of keys alone": [
            from_shapes(set_to(o=lambda c: (c.d_model, c.n_kv_heads * c.d_head))),
            lambda config: (
                head_by_head()(config) - config.d_model * (config.n_heads - config.n_kv_heads) * config.d_head
            ),
        ],
        "the output matrix taken for D by D": [
            from_shapes(set_to(o=lambda c: (c.d_model, c.d_model)), set_to(o=lambda c: (c.d_model, c.d_model))),
            lambda config: head_by_head(with_out=False)(config) + config.d_model * config.d_model,
        ],
        "all layers in place of one": [
            lambda config: sum(from_shapes()(config) for _ in range(config.n_layers)),
            lambda config: head_by_head()(config) * config.n_layers,
        ],
        "keys and values made from the token": [
            from_shapes(
                latent=set_to(
                    uk=lambda c: (c.n_heads * c.mla.d_nope, c.d_model),
                    uv=lambda c: (c.n_heads * c.mla.d_value, c.d_model),
                )
            ),
            made_from_the_token,
        ],
        "the way down of the queries alone": [
            from_shapes(latent=set_to(uq=None)),
            lambda config: head_by_head()(config) - up_to_queries(config),
        ],
        "the way up of the queries alone": [
            from_shapes(latent=set_to(dq=None)),
            lambda config: head_by_head()(config) - down_from_tokens(config),
        ],
        "latent attention counted as if every head had matrices": [from_shapes(mla=False), blind_to_mla_by_heads],
        "the turned key forgotten": [
            from_shapes(latent=set_to(dkv=lambda c: (c.mla.kv_rank, c.d_model))),
            head_by_head(keys_down=lambda m, heads: m.kv_rank),
        ],
        "a turned key for every head": [
            from_shapes(latent=set_to(dkv=lambda c: (c.mla.kv_rank + c.n_heads * c.mla.d_rope, c.d_model))),
            head_by_head(keys_down=lambda m, heads: m.kv_rank + sum([m.d_rope] * heads)),
        ],
        "queries without their turned part": [
            from_shapes(
                latent=set_to(
                    q=lambda c: (c.n_heads * c.mla.d_nope, c.d_model),
                    uq=lambda c: (c.n_heads * c.mla.d_nope, c.mla.q_rank),
                )
            ),
            head_by_head(query=lambda m: m.d_nope),
        ],
        "keys from the latent vector, but no values": [
            from_shapes(latent=set_to(uv=None)),
            head_by_head(read=lambda m: m.d_nope),
        ],
        "turned keys from the latent vector, too": [
            from_shapes(latent=set_to(uk=lambda c: (c.n_heads * c.d_head, c.mla.kv_rank))),
            head_by_head(read=lambda m: m.d_nope + m.d_rope + m.d_value),
        ],
        "turned keys from the latent vector in place of the token": [
            from_shapes(
                latent=set_to(
                    dkv=lambda c: (c.mla.kv_rank, c.d_model), uk=lambda c: (c.n_heads * c.d_head, c.mla.kv_rank)
                )
            ),
            head_by_head(keys_down=lambda m, heads: m.kv_rank, read=lambda m: m.d_nope + m.d_rope + m.d_value),
        ],
        "values as wide as queries": [
            from_shapes(latent=set_to(o=lambda c: (c.d_model, c.n_heads * c.d_head))),
            head_by_head(out=lambda m: m.d_nope + m.d_rope),
        ],
        "queries straight from the token": [from_shapes(latent=without_detour), head_by_head(short_queries=False)],
        "norms counted": [
            from_shapes(latent=with_norms),
            head_by_head(more=lambda m: m.kv_rank + (0 if m.q_rank is None else m.q_rank)),
        ],
    },
    "9.3": {
        "the share k/E of everything": [share_by_integers, share_by_parts],
        "the share k/E of everything, not a whole number": [share_in_floats, share_by_division],
        "active means total": [
            in_parts(routed=lambda c, active: c.moe.n_experts),
            layer_by_layer(chosen=lambda moe, active: moe.n_experts),
        ],
        "k experts in the total": [
            in_parts(routed=lambda c, active: c.moe.top_k),
            layer_by_layer(chosen=lambda moe, active: moe.top_k),
        ],
        "two matrices in every expert and FFN": [in_parts(matrices=lambda c, active: 2), layer_by_layer(n_matrices=2)],
        "experts in every layer": [
            in_parts(moe=lambda c, active: c.n_layers, dense=lambda c, active: 0),
            layer_by_layer(has_experts=lambda c, i: True),
        ],
        "a dense FFN beside the experts": [
            in_parts(dense=lambda c, active: c.n_layers),
            layer_by_layer(dense=lambda c, i, experts: c.d_ff),
        ],
        "the dense layers left out": [
            in_parts(dense=lambda c, active: 0),
            layer_by_layer(dense=lambda c, i, experts: 0),
        ],
        "dense layers as narrow as an expert": [
            in_parts(dense_width=lambda c, active: c.moe.d_ff),
            layer_by_layer(dense=lambda c, i, experts: 0 if experts else c.moe.d_ff),
        ],
        "only the first layers counted as dense": [
            in_parts(
                dense=lambda c, active: c.n_dense_layers,
                moe=lambda c, active: c.n_layers - c.n_dense_layers,
            ),
            layer_by_layer(has_experts=lambda c, i: i >= c.n_dense_layers),
        ],
        "attention only where there are experts": [
            in_parts(attentions=lambda c, active: c.n_moe_layers),
            layer_by_layer(attends=lambda c, experts: experts),
        ],
        "router forgotten": [in_parts(scored=lambda c, active: 0), layer_by_layer(scored=lambda moe, active: 0)],
        "only k rows of the router": [
            in_parts(scored=lambda c, active: c.moe.top_k if active else c.moe.n_experts),
            layer_by_layer(scored=lambda moe, active: [moe.n_experts, moe.top_k][active]),
        ],
        "routed experts forgotten": [
            in_parts(routed=lambda c, active: 0),
            layer_by_layer(chosen=lambda moe, active: 0),
        ],
        "shared experts forgotten": [
            in_parts(shared=lambda c, active: 0),
            layer_by_layer(shared=lambda moe, active: 0),
        ],
        "shared experts counted as inactive": [
            in_parts(shared=lambda c, active: c.moe.d_ff_shared * (not active)),
            layer_by_layer(shared=lambda moe, active: 0 if active else moe.d_ff_shared),
        ],
        "a share k/E of the shared experts": [
            in_parts(
                shared=lambda c, active: (
                    c.moe.d_ff_shared * c.moe.top_k // c.moe.n_experts if active else c.moe.d_ff_shared
                )
            ),
            layer_by_layer(
                shared=lambda moe, active: int(moe.d_ff_shared * (moe.top_k / moe.n_experts if active else 1))
            ),
        ],
        "every shared expert as wide as all": [
            in_parts(shared=lambda c, active: c.moe.d_ff_shared * c.moe.n_shared_experts),
            layer_by_layer(shared=lambda moe, active: sum([moe.d_ff_shared] * moe.n_shared_experts)),
        ],
        "all shared experts as narrow as one": [
            in_parts(shared=lambda c, active: min(c.moe.d_ff, c.moe.d_ff_shared)),
            layer_by_layer(shared=lambda moe, active: moe.d_ff * bool(moe.n_shared_experts)),
        ],
        "a shared expert in every model": [
            in_parts(shared=lambda c, active: c.moe.d_ff),
            layer_by_layer(
                chosen=lambda moe, active: 1 + (moe.top_k if active else moe.n_experts), shared=lambda moe, active: 0
            ),
        ],
        "shared experts as wide as routed ones": [
            in_parts(shared=lambda c, active: c.moe.d_ff * c.moe.n_shared_experts),
            layer_by_layer(
                chosen=lambda moe, active: (moe.top_k if active else moe.n_experts) + moe.n_shared_experts,
                shared=lambda moe, active: 0,
            ),
        ],
        "a tied table counted twice": [
            in_parts(tables=lambda c, active: 2),
            layer_by_layer(last=lambda c, active: c.vocab_size),
        ],
        "one table where there are two, and two where there is one": [
            in_parts(tables=lambda c, active: 1 + c.tied_embeddings),
            layer_by_layer(last=lambda c, active: c.vocab_size if c.tied_embeddings else 0),
        ],
        "a row of the table missing": [
            in_parts(rows=lambda c, active: c.vocab_size - 1),
            layer_by_layer(
                first=lambda c, active: len(range(1, c.vocab_size)),
                last=lambda c, active: 0 if c.tied_embeddings else c.vocab_size - 1,
            ),
        ],
        "a row too many in the table": [
            in_parts(rows=lambda c, active: c.vocab_size + 1),
            layer_by_layer(
                first=lambda c, active: len(range(c.vocab_size + 1)),
                last=lambda c, active: 0 if c.tied_embeddings else c.vocab_size + 1,
            ),
        ],
        "no tables": [
            in_parts(tables=lambda c, active: 0),
            layer_by_layer(first=lambda c, active: 0, last=lambda c, active: 0),
        ],
        "the head forgotten": [in_parts(tables=lambda c, active: 1), layer_by_layer(last=lambda c, active: 0)],
        "a table left out of the active, even the only one": [
            in_parts(tables=lambda c, active: 2 - c.tied_embeddings - active),
            layer_by_layer(first=lambda c, active: 0 if active else c.vocab_size),
        ],
        "total and active exchanged": [
            lambda config, active=False: in_parts()(config, not active),
            lambda config, active=False: layer_by_layer()(config, active is False),
        ],
        "attention forgotten": [
            in_parts(attentions=lambda c, active: 0),
            layer_by_layer(attends=lambda c, experts: False),
        ],
        "attention in one layer": [
            in_parts(attentions=lambda c, active: 1),
            lambda config, active=False: (
                layer_by_layer()(config, active) - (config.n_layers - 1) * head_by_head()(config)
            ),
        ],
        "a router in every layer": [
            lambda config, active=False: (
                in_parts(scored=lambda c, active: 0)(config, active)
                + config.n_layers * config.moe.n_experts * config.d_model
            ),
            lambda config, active=False: (
                layer_by_layer()(config, active)
                + sum(
                    config.d_model * config.moe.n_experts for i in range(config.n_layers) if not config.has_experts(i)
                )
            ),
        ],
        "experts as wide as a dense FFN": [
            lambda config, active=False: int(in_parts(routed=routed_as_wide_as_dense)(config, active)),
            lambda config, active=False: (
                layer_by_layer(chosen=lambda moe, active: 0)(config, active)
                + 3
                * config.n_moe_layers
                * int(routed_as_wide_as_dense(config, active) * config.moe.d_ff)
                * config.d_model
            ),
        ],
        "one row of the embedding among the active": [
            lambda config, active=False: (
                in_parts(tables=lambda c, active: 1)(config, active)
                + (0 if config.tied_embeddings else 1 if active else config.vocab_size) * config.d_model
            ),
            layer_by_layer(first=lambda c, active: 1 if active and not c.tied_embeddings else c.vocab_size),
        ],
        "one row of the only table among the active": [
            lambda config, active=False: (
                in_parts(tables=lambda c, active: 1 - c.tied_embeddings)(config, active)
                + (1 if active else config.vocab_size) * config.d_model
            ),
            layer_by_layer(first=lambda c, active: 1 if active else c.vocab_size),
        ],
        "the embedding left out of the active": [
            in_parts(tables=lambda c, active: 2 - max(active, c.tied_embeddings)),
            layer_by_layer(first=lambda c, active: 0 if active and not c.tied_embeddings else c.vocab_size),
        ],
    },
    "9.4": {
        "multiply-adds in place of FLOPs": [
            token_by_token(of_matrices=lambda active: active, of_a_pair=lambda d_key, d_value: d_key + d_value),
            by_products(matrices=0.5, scores=0.5),
        ],
        "multiply-adds in the matrices": [
            token_by_token(of_matrices=lambda active: active),
            lambda active, n_heads, d_key, d_value, tokens: (
                counted_pairs(active, n_heads, d_key, d_value, tokens) - active * tokens
            ),
        ],
        "multiply-adds in the scores": [
            token_by_token(of_a_pair=lambda d_key, d_value: d_key + d_value),
            by_products(scores=0.5),
        ],
        "every pair counted": [token_by_token(seen=lambda i, tokens: tokens), by_products(pairs=lambda s: s**2)],
        "a token does not see itself": [
            token_by_token(seen=lambda i, tokens: i),
            by_products(pairs=lambda s: math.comb(s, 2)),
        ],
        "half the square": [half_square_of_pairs, half_square_by_shift],
        "no scores": [token_by_token(of_a_pair=lambda d_key, d_value: 0), by_products(scores=0)],
        "values not mixed": [token_by_token(of_a_pair=lambda d_key, d_value: 2 * d_key), by_products(values=0)],
        "values as wide as keys": [token_by_token(of_a_pair=lambda d_key, d_value: 4 * d_key), by_products(wide=True)],
        "one head": [token_by_token(heads=lambda n_heads: 1), by_products(every=0)],
        "one token through the matrices": [first_row_alone, by_products(rows=1)],
    },
    "9.5": {
        "a cache for every query head": [
            kept(grouped=lambda c: [(c.n_heads, c.d_head)] * 2),
            in_one_line(heads="n_heads"),
        ],
        "keys without values": [kept(grouped=lambda c: [(c.n_kv_heads, c.d_head)]), in_one_line(both=1)],
        "latent attention's cache by heads": [
            kept(latent=lambda c: [(c.n_heads, c.d_head)] * 2),
            in_one_line(by_head=True),
        ],
        "the latent vector for every head": [
            kept(latent=lambda c: [(c.n_heads, c.mla.kv_rank), (c.n_heads, c.mla.d_rope)]),
            latents_of_all_heads,
        ],
        "a turned key for every head": [
            kept(latent=lambda c: [(c.mla.kv_rank,), (c.n_heads, c.mla.d_rope)]),
            lambda config, tokens: (
                in_one_line()(config, tokens)
                + (config.mla is not None and (config.n_heads - 1) * config.mla.d_rope) * config.n_layers * tokens * 2
            ),
        ],
        "the latent vector twice, the turned key once": [
            kept(latent=lambda c: [(2, c.mla.kv_rank), (c.mla.d_rope,)]),
            lambda config, tokens: (
                in_one_line()(config, tokens) + (config.mla.kv_rank if config.mla else 0) * config.n_layers * tokens * 2
            ),
        ],
        "four bytes a number": [kept(size=4), in_one_line(bits=32)],
        "the turned key not kept": [kept(latent=lambda c: [(c.mla.kv_rank,)]), in_one_line(rope=0)],
        "the latent vector kept twice": [
            kept(latent=lambda c: [(c.mla.kv_rank,), (c.mla.d_rope,)] * 2),
            in_one_line(latents=2),
        ],
        "one layer": [kept(layers=lambda c: range(1)), in_one_line(per_layer=False)],
        "numbers in place of bytes": [kept(size=1), in_one_line(bits=8)],
    },
    "9.6": {
        "every choice a new expert": [
            lambda n_experts, top_k, batch: n_experts * (top_k / n_experts) * batch,
            lambda e, k, b: sum(k for _ in range(b)),
        ],
        "every choice a new expert, up to all": [
            capped_in_turn,
            lambda e, k, b: e if k * b > e else k * b,
        ],
        "the share of the experts": [
            lambda n_experts, top_k, batch: 1 - math.prod([1 - top_k / n_experts] * batch),
            lambda e, k, b: token_after_token(e, k, b) / e,
        ],
        "the experts nobody chose": [
            lambda n_experts, top_k, batch: math.prod([n_experts, *[1 - top_k / n_experts] * batch]),
            lambda e, k, b: e - token_after_token(e, k, b),
        ],
        "independent draws, k for each token": [
            one_choice_after_another,
            lambda e, k, b: e - e * ((e - 1) / e) ** (b * k),
        ],
        "one choice for each token": [
            one_choice_each_in_turn,
            lambda e, k, b: e * (1 - ((e - 1) / e) ** b),
        ],
        "not touched by every token": [
            lambda n_experts, top_k, batch: n_experts - n_experts * math.pow(top_k / n_experts, batch),
            not_by_every_token,
        ],
        "a whole number": [
            lambda n_experts, top_k, batch: float(round(token_after_token(n_experts, top_k, batch))),
            lambda n_experts, top_k, batch: math.floor(expert_by_expert(n_experts, top_k, batch) + 0.5) * 1.0,
        ],
        "all tokens choose alike": [
            lambda n_experts, top_k, batch: top_k,
            lambda e, k, b: e * (1 - (1 - k / e)),
        ],
        "touched by every token": [
            lambda n_experts, top_k, batch: n_experts * math.prod([top_k / n_experts] * batch),
            lambda e, k, b: list(accumulate(repeat(k / e, b), lambda touched, share: touched * share, initial=e))[-1],
        ],
    },
    "9.7": {
        "forward pass only": [
            in_steps(passes=1),
            lambda n, d, rate, per: (2 * n * d / rate / 3600, 2 * n * d / rate / 3600 * per),
        ],
        "multiply-adds": [
            in_steps(passes=1.5),
            lambda n, d, rate, per: tuple(x * 3 * n * d / rate / 3600 for x in (1, per)),
        ],
        "backward without forward": [
            in_steps(passes=2),
            lambda n, d, rate, per: (4 * n * d / (rate * 3600), per * 4 * n * d / (rate * 3600)),
        ],
        "seconds in place of hours": [
            in_steps(hour=1),
            lambda n, d, rate, per: (6 * n * d / rate, 6 * n * d / rate * per),
        ],
        "minutes in place of hours": [
            in_steps(hour=60),
            lambda n, d, rate, per: tuple(6 * n * d / rate / 60 * price for price in (1, per)),
        ],
        "hours divided by the price": [
            in_steps(pay=lambda hours, price: hours / price),
            lambda n, d, rate, per: (6 * n * d / rate / 3600, 6 * n * d / rate / 3600 / per),
        ],
    },
}
