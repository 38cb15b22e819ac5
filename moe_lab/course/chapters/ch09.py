"""The exercises of notebook 09: parameters, FLOPs and bytes of real models, from a page of sizes."""

from collections.abc import Callable

from moe_lab import accounting
from moe_lab.config import LMConfig, MLAConfig, MoEConfig
from moe_lab.course.bank import Case, Exercise, Mistake
from moe_lab.course.checking import Refused
from moe_lab.presets import PRESETS

# What several exercises are about: small models whose sizes all differ, so that no two mistakes look alike.

GROUPED = LMConfig(vocab_size=11, d_model=10, n_layers=3, n_heads=6, n_kv_heads=2, d_head=4, d_ff=17)
MULTI_HEAD = LMConfig(vocab_size=11, d_model=12, n_layers=2, n_heads=3, d_ff=17)
LATENT = LMConfig(
    vocab_size=11,
    d_model=10,
    n_layers=5,
    n_heads=3,
    d_ff=17,
    mla=MLAConfig(kv_rank=7, d_nope=6, d_rope=2, d_value=5),
)
LATENT_QUERIES = LATENT.but(n_heads=4, mla=MLAConfig(kv_rank=7, q_rank=9, d_nope=6, d_rope=4, d_value=3))

ROUTED = LMConfig(
    vocab_size=11,
    d_model=10,
    n_layers=2,
    n_heads=6,
    n_kv_heads=2,
    d_head=4,
    d_ff=17,
    moe=MoEConfig(d_model=10, d_ff=3, n_experts=5, top_k=2),
)
MOE_MODELS = {
    "two layers with experts": ROUTED,
    "a tied table": ROUTED.but(tied_embeddings=True, moe=ROUTED.moe.but(n_experts=7, top_k=3)),
    "shared experts": ROUTED.but(n_layers=3, moe=ROUTED.moe.but(n_experts=8, top_k=3, n_shared_experts=2)),
    "a shared expert with a width of its own": ROUTED.but(
        moe=ROUTED.moe.but(n_experts=6, n_shared_experts=1, d_ff_shared=8)
    ),
    "two dense layers first": ROUTED.but(
        n_layers=5, n_dense_layers=2, moe=ROUTED.moe.but(n_experts=7, top_k=2, n_shared_experts=1)
    ),
    "experts in every other layer": ROUTED.but(n_layers=4, moe_every=2, moe=ROUTED.moe.but(n_experts=9, top_k=2)),
    "latent attention": LATENT.but(n_dense_layers=1, moe=ROUTED.moe.but(n_experts=6, top_k=4)),
    "DeepSeek-V3": PRESETS["DeepSeek-V3"].config,
    "Qwen3-30B-A3B": PRESETS["Qwen3-30B-A3B"].config,
}


def _says_attention(config: LMConfig) -> str:
    mla, sizes = config.mla, f"d_model {config.d_model}, n_heads {config.n_heads}, "
    if mla is None:
        return f"{sizes}n_kv_heads {config.n_kv_heads}, d_head {config.d_head}, mla None"
    return (
        f"{sizes}mla: q_rank {mla.q_rank}, kv_rank {mla.kv_rank}, d_nope {mla.d_nope}, d_rope {mla.d_rope}, "
        f"d_value {mla.d_value}"
    )


def _says_model(config: LMConfig, active: bool) -> str:
    moe = config.moe
    return (
        f"{_says_attention(config)}\n"
        f"vocab_size {config.vocab_size}, tied_embeddings {config.tied_embeddings}, n_layers {config.n_layers}, "
        f"n_dense_layers {config.n_dense_layers}, n_moe_layers {config.n_moe_layers}, d_ff {config.d_ff}\n"
        f"moe: n_experts {moe.n_experts}, top_k {moe.top_k}, d_ff {moe.d_ff}, n_shared_experts "
        f"{moe.n_shared_experts}, d_ff_shared {moe.d_ff_shared}; active={active}"
    )


# 9.1 one FFN


def ffn_parameters(d_model: int, d_ff: int, kind: str = "swiglu") -> int:
    """Parameters of one FFN, or of one expert: three matrices in a SwiGLU, two in a ReLU MLP."""
    return (3 if kind == "swiglu" else 2) * d_model * d_ff


FFN_PARAMETERS = Exercise(
    id="9.1",
    title="one FFN, or one expert",
    reference=ffn_parameters,
    cases=lambda: [
        Case(name="a SwiGLU by hand", args=(2, 5)),
        Case(name="a ReLU MLP", args=(4, 7), kwargs={"kind": "relu"}),
        Case(name="an expert narrower than the model", args=(6, 3, "swiglu")),
        Case(name="an FFN of Llama-7B", args=(4096, 11_008)),
        Case(name="an expert of Switch-Base", args=(768, 3072, "relu")),
    ],
    mistakes=(
        Mistake(
            name="two matrices in a SwiGLU",
            wrong=lambda d_model, d_ff, kind="swiglu": 2 * d_model * d_ff,
            says="Every FFN has two matrices here. A SwiGLU has three: gate, up and down. Forgetting the gate loses a "
            "third of nearly every current model, and a well-known wrong number may have come about so.",
        ),
        Mistake(
            name="three matrices in every FFN",
            wrong=lambda d_model, d_ff, kind="swiglu": 3 * d_model * d_ff,
            says='Every FFN has three matrices here. With `kind="relu"`, as in Switch-Base, there is no gate: two.',
        ),
        Mistake(
            name="the two kinds exchanged",
            wrong=lambda d_model, d_ff, kind="swiglu": (2 if kind == "swiglu" else 3) * d_model * d_ff,
            says="The ReLU MLP has three matrices here, and the SwiGLU two. It is the SwiGLU that has a gate beside up "
            "and down.",
        ),
        Mistake(
            name="the way back forgotten",
            wrong=lambda d_model, d_ff, kind="swiglu": (2 if kind == "swiglu" else 1) * d_model * d_ff,
            says="A matrix is missing: the one that leads from F back to D. Look at what an FFN returns: a row as wide "
            "as the one that it was given.",
        ),
        Mistake(
            name="the gate taken for a vector",
            wrong=lambda d_model, d_ff, kind="swiglu": 2 * d_model * d_ff + (d_ff if kind == "swiglu" else 0),
            says="You gave the gate F numbers. It makes F numbers, from the D of a token: that takes a matrix as large "
            "as `w_up`.",
        ),
        Mistake(
            name="the width taken for 4 D",
            wrong=lambda d_model, d_ff, kind="swiglu": (3 if kind == "swiglu" else 2) * d_model * 4 * d_model,
            says="You took F for 4 D, which held in 2017. Here F is given: Llama's is 2.7 D, an expert's may be far "
            "below D.",
        ),
        Mistake(
            name="biases counted",
            wrong=lambda d_model, d_ff, kind="swiglu": (
                (3 if kind == "swiglu" else 2) * d_model * d_ff + (2 if kind == "swiglu" else 1) * d_ff + d_model
            ),
            says="You counted biases: F for each matrix that leads to the neurons, D for the way back. `nn.Linear` has "
            "them by default; these FFNs have none.",
        ),
        Mistake(
            name="FLOPs in place of parameters",
            wrong=lambda d_model, d_ff, kind="swiglu": (6 if kind == "swiglu" else 4) * d_model * d_ff,
            says="That is twice the answer: the FLOPs per token. A parameter takes part in a multiplication and an "
            "addition, but it is one number.",
        ),
    ),
)


# 9.2 attention


def attention_parameters(config: LMConfig) -> int:
    """Parameters of one layer's attention matrices; norms, biases and sinks apart."""
    return sum(rows * columns for rows, columns in accounting.attention_matrices(config).values())


def _attention(
    grouped: Callable[[LMConfig], int] | None = None,
    down: Callable[[LMConfig], int] = lambda c: c.d_model * (c.mla.kv_rank + c.mla.d_rope),
    up: Callable[[LMConfig], int] = lambda c: c.mla.kv_rank * c.n_heads * (c.mla.d_nope + c.mla.d_value),
    query_width: Callable[[LMConfig], int] = lambda c: c.n_heads * (c.mla.d_nope + c.mla.d_rope),
    queries: Callable[[LMConfig, int], int] | None = None,
    out: Callable[[LMConfig], int] = lambda c: c.n_heads * c.mla.d_value * c.d_model,
    beside: Callable[[LMConfig], int] = lambda c: 0,
) -> Callable[[LMConfig], int]:
    """The count with one of its parts counted in another way."""

    def of_queries(config: LMConfig) -> int:
        width, rank = query_width(config), config.mla.q_rank
        if queries:
            return queries(config, width)
        return config.d_model * width if rank is None else rank * (config.d_model + width)

    def wrong(config: LMConfig) -> int:
        if config.mla is None:
            right = 2 * config.d_model * config.d_head * (config.n_heads + config.n_kv_heads)
            return grouped(config) if grouped else right
        return down(config) + up(config) + of_queries(config) + out(config) + beside(config)

    return wrong


def _without_detour(solution: Callable[[LMConfig], int], case: Case) -> int:
    """The plain call; arithmetic with a `q_rank` that is None gets a sentence of its own."""
    config = case.args[0]
    try:
        return solution(config)
    except TypeError as error:
        if "NoneType" in str(error) and config.mla and config.mla.q_rank is None:
            says = "`q_rank` is None here: there is no detour, and `w_q` reads the token itself, d_model numbers."
            raise Refused(f"{says} Calculate with `q_rank` only where it is not None.") from None
        raise


ATTENTION_PARAMETERS = Exercise(
    id="9.2",
    title="attention, grouped or latent",
    reference=attention_parameters,
    run=_without_detour,
    cases=lambda: [
        Case(name=name, args=(config,), show=_says_attention(config))
        for name, config in {
            "grouped queries": GROUPED,
            "every head has its keys and values": MULTI_HEAD,
            "latent, queries straight from the token": LATENT,
            "latent, queries from a short vector": LATENT_QUERIES,
            "a layer of Qwen3-30B-A3B": PRESETS["Qwen3-30B-A3B"].config,
            "a layer of DeepSeek-V3": PRESETS["DeepSeek-V3"].config,
        }.items()
    ],
    mistakes=(
        Mistake(
            name="four square matrices",
            wrong=lambda config: 4 * config.d_model**2,
            says="That is 4 D², attention as it was in 2017, when every head had its own keys and values and the heads "
            "together were as wide as the token. Count each matrix by its own two sides.",
        ),
        Mistake(
            name="query heads everywhere",
            wrong=_attention(lambda c: 4 * c.d_model * c.n_heads * c.d_head),
            says="Keys and values have `n_heads` heads here. With grouped queries they have fewer, `n_kv_heads`, and "
            "their matrices are that much smaller.",
        ),
        Mistake(
            name="head width taken for D / heads",
            wrong=_attention(lambda c: 2 * c.d_model * (c.d_model // c.n_heads) * (c.n_heads + c.n_kv_heads)),
            says="You divided D by the heads. `d_head` is a size of its own: in Qwen3 and gpt-oss the heads together "
            "are wider than the token. Counted like this, Qwen3-30B-A3B loses 453 million parameters.",
        ),
        Mistake(
            name="keys and values share a matrix",
            wrong=_attention(lambda c: c.d_model * c.d_head * (2 * c.n_heads + c.n_kv_heads)),
            says="`n_kv_heads` heads of keys and as many of values: two matrices, `w_k` and `w_v`. The name speaks "
            "of one, and there are both.",
        ),
        Mistake(
            name="the output matrix forgotten",
            wrong=_attention(
                lambda c: c.d_model * c.d_head * (c.n_heads + 2 * c.n_kv_heads),
                out=lambda c: 0,
            ),
            says="`w_o` is missing, which brings what all heads found back to D numbers. In DeepSeek-V3 it is most of "
            "attention.",
        ),
        Mistake(
            name="the output matrix for the heads of keys alone",
            wrong=_attention(lambda c: c.d_model * c.d_head * (c.n_heads + 3 * c.n_kv_heads)),
            says="Your `w_o` reads `n_kv_heads` heads. Keys and values are shared, but every query head comes back "
            "with something of its own: `w_o` reads `n_heads` of them, as many as `w_q` makes.",
        ),
        Mistake(
            name="the output matrix taken for D by D",
            wrong=_attention(
                grouped=lambda c: c.d_model * (c.d_head * (c.n_heads + 2 * c.n_kv_heads) + c.d_model),
                out=lambda c: c.d_model**2,
            ),
            says="You took `w_o` for D by D. It reads what all heads found, side by side: that is `n_heads · d_head` "
            "numbers, or with latent attention `n_heads · d_value`, and need not be as wide as the token.",
        ),
        Mistake(
            name="all layers in place of one",
            wrong=lambda config: config.n_layers * attention_parameters(config),
            says="That is the attention of all `n_layers` layers. Asked for is one layer's; 9.3 multiplies.",
        ),
        Mistake(
            name="keys and values made from the token",
            wrong=_attention(up=lambda c: c.d_model * c.n_heads * (c.mla.d_nope + c.mla.d_value)),
            says="`w_ukv` reads the latent vector, `kv_rank` numbers, and not the token: what it gives has to come "
            "from what is kept.",
        ),
        Mistake(
            name="the way down of the queries alone",
            wrong=_attention(
                queries=lambda c, width: c.d_model * (c.mla.q_rank if c.mla.q_rank is not None else width)
            ),
            says="With a `q_rank` queries take two steps: `w_dq` from the token down to `q_rank` numbers, `w_uq` from "
            "these up to the queries. The second is missing.",
        ),
        Mistake(
            name="the way up of the queries alone",
            wrong=_attention(
                queries=lambda c, width: width * (c.mla.q_rank if c.mla.q_rank is not None else c.d_model)
            ),
            says="With a `q_rank` queries take two steps: `w_dq` from the token down to `q_rank` numbers, `w_uq` from "
            "these up to the queries. The first is missing.",
        ),
        Mistake(
            name="latent attention counted as if every head had matrices",
            wrong=lambda config: 2 * config.d_model * config.d_head * (config.n_heads + config.n_kv_heads),
            says="With `config.mla` there is neither `w_k` nor `w_v`: keys and values of all heads are read from one "
            "short vector. Its matrices are those of the table's lower half.",
        ),
        Mistake(
            name="the turned key forgotten",
            wrong=_attention(down=lambda c: c.d_model * c.mla.kv_rank),
            says="`w_dkv` makes more than the latent vector: below it come the d_rope numbers of the key that RoPE "
            "turns. Its rows are kv_rank + d_rope.",
        ),
        Mistake(
            name="a turned key for every head",
            wrong=_attention(down=lambda c: c.d_model * (c.mla.kv_rank + c.n_heads * c.mla.d_rope)),
            says="You made a turned key for every head. There is one for all of them, d_rope numbers: were there one "
            "per head, the cache would have to hold them all.",
        ),
        Mistake(
            name="queries without their turned part",
            wrong=_attention(query_width=lambda c: c.n_heads * c.mla.d_nope),
            says="A query has two parts, one that RoPE leaves alone and one that it turns: d_nope + d_rope numbers for "
            "each head. A score compares both.",
        ),
        Mistake(
            name="keys from the latent vector, but no values",
            wrong=_attention(up=lambda c: c.mla.kv_rank * c.n_heads * c.mla.d_nope),
            says="`w_ukv` reads keys and values of all heads from the latent vector: d_nope + d_value numbers for "
            "each head.",
        ),
        Mistake(
            name="turned keys from the latent vector, too",
            wrong=_attention(up=lambda c: c.mla.kv_rank * c.n_heads * (c.mla.d_nope + c.mla.d_rope + c.mla.d_value)),
            says="`w_ukv` makes a turned part of every key here, d_rope numbers for each head. There is one turned "
            "key for all heads, and `w_dkv` has made it: the latent vector gives d_nope + d_value numbers a head.",
        ),
        Mistake(
            name="turned keys from the latent vector in place of the token",
            wrong=_attention(
                down=lambda c: c.d_model * c.mla.kv_rank,
                up=lambda c: c.mla.kv_rank * c.n_heads * (c.mla.d_nope + c.mla.d_rope + c.mla.d_value),
            ),
            says="You moved `d_rope` from `w_dkv` to `w_ukv`. The turned key is read from the token, once for all "
            "heads. Between the latent vector and the heads no turn may stand, or nothing could be absorbed.",
        ),
        Mistake(
            name="values as wide as queries",
            wrong=_attention(out=lambda c: c.n_heads * (c.mla.d_nope + c.mla.d_rope) * c.d_model),
            says="`w_o` is given rows as wide as queries. It mixes what the heads have gathered, and these are values: "
            "n_heads · d_value. In DeepSeek-V3 a query has 192 numbers, a value 128.",
        ),
        Mistake(
            name="queries straight from the token",
            wrong=_attention(queries=lambda c, width: c.d_model * width),
            says="`q_rank` is not None here: queries take a detour over a short vector, two small matrices in place of "
            "one large one.",
        ),
        Mistake(
            name="norms counted",
            wrong=_attention(beside=lambda c: c.mla.kv_rank + (c.mla.q_rank or 0)),
            says="You counted the norms on the short vectors. They are there, a number for each place; only matrices "
            "are asked for.",
        ),
    ),
)


# 9.3 a whole model


def model_parameters(config: LMConfig, active: bool = False) -> int:
    """All matrices of a model with experts, or with `active` those that one token uses; norms and biases apart."""
    moe, n_moe = config.moe, config.n_moe_layers
    n_experts = moe.top_k if active else moe.n_experts
    experts = 3 * config.d_model * (n_experts * moe.d_ff + moe.d_ff_shared) + config.d_model * moe.n_experts
    dense = (config.n_layers - n_moe) * accounting.ffn_parameters(config)
    tables = (1 if config.tied_embeddings else 2) * config.vocab_size * config.d_model
    return tables + config.n_layers * attention_parameters(config) + dense + n_moe * experts


def _model(
    tables: Callable[[LMConfig, bool], int] = lambda c, active: 1 if c.tied_embeddings else 2,
    attentions: Callable[[LMConfig], int] = lambda c: c.n_layers,
    dense_layers: Callable[[LMConfig], int] = lambda c: c.n_layers - c.n_moe_layers,
    dense_width: Callable[[LMConfig], int] = lambda c: c.d_ff,
    moe_layers: Callable[[LMConfig], int] = lambda c: c.n_moe_layers,
    routed: Callable[[LMConfig, bool], int] = lambda c, active: c.moe.top_k if active else c.moe.n_experts,
    shared_width: Callable[[LMConfig, bool], int] = lambda c, active: c.moe.d_ff_shared,
    router_rows: Callable[[LMConfig, bool], int] = lambda c, active: c.moe.n_experts,
    matrices: int = 3,
) -> Callable[..., int]:
    """The count with one of its parts counted in another way."""

    def wrong(config: LMConfig, active: bool = False) -> int:
        widths = dense_layers(config) * dense_width(config)
        layer = routed(config, active) * config.moe.d_ff + shared_width(config, active)
        widths += moe_layers(config) * layer
        rows = tables(config, active) * config.vocab_size + moe_layers(config) * router_rows(config, active)
        attention = attentions(config) * attention_parameters(config)
        return attention + config.d_model * (rows + matrices * widths)

    return wrong


def _model_of_vocabulary(rows: Callable[[int], int]) -> Callable[..., int]:
    """The count with tables of another length."""
    return lambda config, active=False: model_parameters(config.but(vocab_size=rows(config.vocab_size)), active)


def _share_of_all(config: LMConfig, active: bool = False) -> int:
    total = model_parameters(config)
    return total * config.moe.top_k // config.moe.n_experts if active else total


def _share_of_all_as_a_float(config: LMConfig, active: bool = False) -> float:
    total = model_parameters(config)
    return total * config.moe.top_k / config.moe.n_experts if active else total


SHARE_OF_ALL = (
    "You took k/E of the whole model as active. k/E is about routed experts alone: attention, tables, router, dense "
    "layers and shared experts work for every token. So V3's share is 5.6 %, not the 3.1 % of 8/256."
)

MODEL_PARAMETERS = Exercise(
    id="9.3",
    title="a whole model, total and active",
    reference=model_parameters,
    cases=lambda: [
        Case(
            name=f"{name}, {'active' if active else 'total'}",
            args=(config,),
            kwargs={"active": True} if active else {},
            show=_says_model(config, active),
        )
        for name, config in MOE_MODELS.items()
        for active in (False, True)
    ],
    mistakes=(
        Mistake(name="the share k/E of everything", wrong=_share_of_all, says=SHARE_OF_ALL),
        Mistake(
            name="the share k/E of everything, not a whole number", wrong=_share_of_all_as_a_float, says=SHARE_OF_ALL
        ),
        Mistake(
            name="active means total",
            wrong=_model(routed=lambda c, active: c.moe.n_experts),
            says="`active` changes nothing. In a layer of experts, a token uses top_k of the n_experts routed ones.",
        ),
        Mistake(
            name="k experts in the total",
            wrong=_model(routed=lambda c, active: c.moe.top_k),
            says="The total holds only top_k experts a layer. All of them have to be in memory; the k are what one "
            "token uses.",
        ),
        Mistake(
            name="two matrices in every expert and FFN",
            wrong=_model(matrices=2),
            says="Experts and dense FFNs have two matrices here. They are SwiGLUs: three each. Your function of 9.1 "
            "counts them.",
        ),
        Mistake(
            name="experts in every layer",
            wrong=_model(moe_layers=lambda c: c.n_layers, dense_layers=lambda c: 0),
            says="Every layer has experts here. In many models some are dense: DeepSeek-V3's first three of 61, every "
            "other one of Llama 4 Maverick's. `n_moe_layers` says how many have experts.",
        ),
        Mistake(
            name="a dense FFN beside the experts",
            wrong=_model(dense_layers=lambda c: c.n_layers),
            says="Layers with experts have a dense FFN, too, here. Experts take its place: only the n_layers − "
            "n_moe_layers others have one.",
        ),
        Mistake(
            name="the dense layers left out",
            wrong=_model(dense_layers=lambda c: 0),
            says="The FFNs of the layers without experts are missing: there are n_layers − n_moe_layers of them.",
        ),
        Mistake(
            name="dense layers as narrow as an expert",
            wrong=_model(dense_width=lambda c: c.moe.d_ff),
            says="You gave the dense layers an expert's width. They have one of their own: `config.d_ff`, not "
            "`config.moe.d_ff`. In DeepSeek-V3 these are 18,432 and 2,048.",
        ),
        Mistake(
            name="only the first layers counted as dense",
            wrong=_model(
                dense_layers=lambda c: c.n_dense_layers,
                moe_layers=lambda c: c.n_layers - c.n_dense_layers,
            ),
            says="You took all layers after the first `n_dense_layers` for layers of experts. In some models (Llama 4 "
            "Maverick) only every other one is. `n_moe_layers` counts them.",
        ),
        Mistake(
            name="attention only where there are experts",
            wrong=_model(attentions=lambda c: c.n_moe_layers),
            says="Attention is counted in the layers of experts alone. Every layer has it, the dense ones, too.",
        ),
        Mistake(
            name="router forgotten",
            wrong=_model(router_rows=lambda c, active: 0),
            says="The routers are missing: in each layer of experts, D numbers for every expert.",
        ),
        Mistake(
            name="only k rows of the router",
            wrong=_model(router_rows=lambda c, active: c.moe.top_k if active else c.moe.n_experts),
            says="You counted k rows of the router as active. To find the best k, it has to score all experts.",
        ),
        Mistake(
            name="routed experts forgotten",
            wrong=_model(routed=lambda c, active: 0),
            says="The routed experts are missing: in each layer of experts `moe.n_experts` in the total, `moe.top_k` "
            "among the active.",
        ),
        Mistake(
            name="shared experts forgotten",
            wrong=_model(shared_width=lambda c, active: 0),
            says="The shared experts are missing. Every token visits them, so they count in the total and among the "
            "active. `d_ff_shared` is the width of all of them together.",
        ),
        Mistake(
            name="shared experts counted as inactive",
            wrong=_model(shared_width=lambda c, active: 0 if active else c.moe.d_ff_shared),
            says="The shared experts are in the total, but not among the active. Every token visits them: that is what "
            "shared means.",
        ),
        Mistake(
            name="a share k/E of the shared experts",
            wrong=_model(
                shared_width=lambda c, active: (
                    c.moe.d_ff_shared * c.moe.top_k // c.moe.n_experts if active else c.moe.d_ff_shared
                )
            ),
            says="You scaled the shared experts by k/E. Only routed experts are chosen; every token visits the shared "
            "ones, all of them.",
        ),
        Mistake(
            name="every shared expert as wide as all",
            wrong=_model(shared_width=lambda c, active: c.moe.n_shared_experts * c.moe.d_ff_shared),
            says="`d_ff_shared` is the width of all shared experts together; you took it n_shared_experts times.",
        ),
        Mistake(
            name="all shared experts as narrow as one",
            wrong=_model(shared_width=lambda c, active: c.moe.d_ff if c.moe.n_shared_experts else 0),
            says="You took `moe.d_ff` for the width of all shared experts. That is a routed expert's; theirs is "
            "`moe.d_ff_shared`, all of them together.",
        ),
        Mistake(
            name="a shared expert in every model",
            wrong=_model(shared_width=lambda c, active: c.moe.d_ff),
            says="Every layer of experts has one shared expert of width `moe.d_ff` here. Some models have several, and "
            "some have none: `moe.d_ff_shared` is the width of all of them together, 0 where there is none.",
        ),
        Mistake(
            name="shared experts as wide as routed ones",
            wrong=_model(shared_width=lambda c, active: c.moe.n_shared_experts * c.moe.d_ff),
            says="You made every shared expert as wide as a routed one. In DeepSeek-V3 it is, but it need not be: "
            "`moe.d_ff_shared` says how wide all of them are together.",
        ),
        Mistake(
            name="a tied table counted twice",
            wrong=_model(tables=lambda c, active: 2),
            says="With `tied_embeddings` one table serves at both ends: count it once. Summing a checkpoint's entries "
            "makes the same mistake, for some files hold it under several names.",
        ),
        Mistake(
            name="one table where there are two, and two where there is one",
            wrong=_model(tables=lambda c, active: 2 if c.tied_embeddings else 1),
            says="You have `tied_embeddings` the wrong way round. Tied means that one table serves at both ends; "
            "without it there are two.",
        ),
        Mistake(
            name="a row of the table missing",
            wrong=_model_of_vocabulary(lambda vocab_size: vocab_size - 1),
            says="Your tables lack a row. Tokens are numbered from 0 to vocab_size − 1: that makes vocab_size rows.",
        ),
        Mistake(
            name="a row too many in the table",
            wrong=_model_of_vocabulary(lambda vocab_size: vocab_size + 1),
            says="Your tables have a row too many. Padding and the marks of beginning and end are tokens, too, and "
            "`vocab_size` counts them.",
        ),
        Mistake(
            name="no tables",
            wrong=_model(tables=lambda c, active: 0),
            says="Embedding and head are missing: a table of vocab_size · D each, or one for both if they are tied.",
        ),
        Mistake(
            name="the head forgotten",
            wrong=_model(tables=lambda c, active: 1),
            says="A table is missing. If they are not tied, there are two of vocab_size · D: the embedding and the "
            "head.",
        ),
        Mistake(
            name="the embedding left out of the active",
            wrong=_model(tables=lambda c, active: 1 if c.tied_embeddings or active else 2),
            says="Your active count leaves the embedding table out. Some model cards do that, too, and it is the one "
            "to use for FLOPs. Here the other convention is asked for: all tables count.",
        ),
        Mistake(
            name="one row of the embedding among the active",
            wrong=lambda config, active=False: (
                model_parameters(config, active)
                - (active and not config.tied_embeddings) * (config.vocab_size - 1) * config.d_model
            ),
            says="Of the embedding you count the one row that a token reads. It does read one; but by the convention "
            "asked for here both tables count in full, as on many model cards.",
        ),
        Mistake(
            name="one row of the only table among the active",
            wrong=lambda config, active=False: (
                model_parameters(config, active) - active * (config.vocab_size - 1) * config.d_model
            ),
            says="Of the embedding you count the one row that a token reads, even if its table is tied: then it is the "
            "head, too, and a token is compared with every row. Both tables count in full here.",
        ),
        Mistake(
            name="a table left out of the active, even the only one",
            wrong=_model(tables=lambda c, active: (1 if c.tied_embeddings else 2) - active),
            says="Your active count leaves one table out. Here the convention that counts all is asked for; and in the "
            "other one a tied table stays, for it is also the head.",
        ),
        Mistake(
            name="total and active exchanged",
            wrong=lambda config, active=False: model_parameters(config, not active),
            says="With `active=True` you count all experts, and without it `top_k` of them. It is the other way round.",
        ),
        Mistake(
            name="attention forgotten",
            wrong=_model(attentions=lambda c: 0),
            says="Attention is missing. Every one of the `n_layers` layers has it: your function of 9.2 counts one.",
        ),
        Mistake(
            name="attention in one layer",
            wrong=_model(attentions=lambda c: 1),
            says="Attention is counted once. Every one of the `n_layers` layers has its own.",
        ),
        Mistake(
            name="a router in every layer",
            wrong=lambda config, active=False: (
                model_parameters(config, active)
                + (config.n_layers - config.n_moe_layers) * config.d_model * config.moe.n_experts
            ),
            says="Dense layers have a router here. Where nothing can be chosen, nobody has to choose: `n_moe_layers` "
            "routers.",
        ),
        Mistake(
            name="experts as wide as a dense FFN",
            wrong=lambda config, active=False: (
                model_parameters(config, active)
                + config.n_moe_layers
                * (config.moe.top_k if active else config.moe.n_experts)
                * ffn_parameters(config.d_model, config.d_ff - config.moe.d_ff)
            ),
            says="Your experts are `config.d_ff` wide, as a dense layer's FFN. An expert's own width is "
            "`config.moe.d_ff`, and mostly much less.",
        ),
    ),
)


# 9.4 FLOPs of a layer


def layer_flops(active: int, n_heads: int, d_key: int, d_value: int, tokens: int) -> int:
    """FLOPs of one layer: two for every active parameter and token, and attention's scores over the pairs it sees."""
    pairs = tokens * (tokens + 1) // 2
    return 2 * tokens * active + 2 * n_heads * (d_key + d_value) * pairs


def _flops(
    linear: int = 2,
    scores: int = 2,
    pairs: Callable[[int], int] = lambda tokens: tokens * (tokens + 1) // 2,
    width: Callable[[int, int], int] = lambda d_key, d_value: d_key + d_value,
    heads: Callable[[int], int] = lambda n_heads: n_heads,
    rows: Callable[[int], int] = lambda tokens: tokens,
) -> Callable[..., int]:
    """The count with one of its parts counted in another way."""

    def wrong(active: int, n_heads: int, d_key: int, d_value: int, tokens: int) -> int:
        of_scores = scores * heads(n_heads) * width(d_key, d_value) * pairs(tokens)
        return linear * rows(tokens) * active + of_scores

    return wrong


LAYER_FLOPS = Exercise(
    id="9.4",
    title="FLOPs of one layer",
    reference=layer_flops,
    cases=lambda: [
        Case(name="one token", args=(10, 2, 3, 5, 1)),
        Case(name="three tokens by hand", args=(10, 2, 4, 3, 3)),
        Case(name="more tokens than parameters", args=(7, 3, 5, 2, 50)),
        Case(name="a layer of Llama-7B at 4,096 tokens", args=(202_375_168, 32, 128, 128, 4096)),
        Case(name="a layer of DeepSeek-V3 at 4,096 tokens", args=(585_302_016, 128, 192, 128, 4096)),
    ],
    mistakes=(
        Mistake(
            name="multiply-adds in place of FLOPs",
            wrong=_flops(linear=1, scores=1),
            says="That is half of it: multiply-adds (MACs). One multiplication with its addition is two FLOPs, by the "
            "convention of this course and of GPUs' data sheets. Mixing the two makes a factor of two out of nothing.",
        ),
        Mistake(
            name="multiply-adds in the matrices",
            wrong=lambda active, n_heads, d_key, d_value, tokens: (
                layer_flops(active, n_heads, d_key, d_value, tokens) - tokens * active
            ),
            says="The scores count two FLOPs for a multiplication with its addition, and the matrices one. It is two "
            "everywhere.",
        ),
        Mistake(
            name="multiply-adds in the scores",
            wrong=_flops(scores=1),
            says="The matrices are right; in the scores each multiplication comes with its addition, too: two FLOPs.",
        ),
        Mistake(
            name="every pair counted",
            wrong=_flops(pairs=lambda tokens: tokens * tokens),
            says="You paid for all S² pairs. With causal attention a token sees itself and those before it, S (S + 1) "
            "/ 2 pairs. The full square is a convention, too, and a page has to say which one it uses.",
        ),
        Mistake(
            name="a token does not see itself",
            wrong=_flops(pairs=lambda tokens: tokens * (tokens - 1) // 2),
            says="You left out the pairs of a token with itself. The first token sees one position, the last S of "
            "them: S (S + 1) / 2 pairs.",
        ),
        Mistake(
            name="half the square",
            wrong=_flops(pairs=lambda tokens: tokens * tokens // 2),
            says="You halved S². The diagonal belongs to it whole: S (S + 1) / 2 pairs. With one token there is one "
            "pair.",
        ),
        Mistake(
            name="no scores",
            wrong=_flops(scores=0),
            says="The scores are missing. Attention compares tokens, and mixes values, with no parameters at all: 2 N "
            "D does not see it. In DeepSeek-V3 at 4,096 tokens it is an eighth of a layer.",
        ),
        Mistake(
            name="values not mixed",
            wrong=_flops(width=lambda d_key, d_value: d_key),
            says="You compared queries with keys, and stopped. What a token found it also gathers: for each pair a "
            "value of d_value numbers, times its weight, is added up.",
        ),
        Mistake(
            name="values as wide as keys",
            wrong=_flops(width=lambda d_key, d_value: 2 * d_key),
            says="You gave the values the width of keys. They are equal in grouped attention, but in DeepSeek-V3 a key "
            "has 192 numbers and a value 128.",
        ),
        Mistake(
            name="one head",
            wrong=_flops(heads=lambda n_heads: 1),
            says="The scores are those of one head. Every head compares and gathers for itself, `n_heads` times.",
        ),
        Mistake(
            name="one token through the matrices",
            wrong=_flops(rows=lambda tokens: 1),
            says="Only one token goes through the matrices here. Every one of the S tokens does.",
        ),
    ),
)


# 9.5 what attention keeps


def _cache(
    grouped: Callable[[LMConfig], int] = lambda c: 2 * c.n_kv_heads * c.d_head,
    latent: Callable[[LMConfig], int] = lambda c: c.mla.kv_rank + c.mla.d_rope,
    layers: Callable[[LMConfig], int] = lambda c: c.n_layers,
    size: int = 2,
) -> Callable[[LMConfig, int], int]:
    """The count with one of its parts counted in another way."""

    def wrong(config: LMConfig, tokens: int) -> int:
        numbers = grouped(config) if config.mla is None else latent(config)
        return numbers * layers(config) * tokens * size

    return wrong


def cache_bytes(config: LMConfig, tokens: int) -> int:
    """Bytes that attention keeps of one sequence in bf16, in all layers."""
    return accounting.cache_bytes(config, tokens)


CACHE_BYTES = Exercise(
    id="9.5",
    title="what attention keeps",
    reference=cache_bytes,
    cases=lambda: [
        Case(
            name=name,
            args=(config, tokens),
            show=f"{_says_attention(config)}, n_layers {config.n_layers}; {tokens:,} tokens",
        )
        for name, config, tokens in (
            ("one token, grouped queries", GROUPED, 1),
            ("nine tokens, every head has its own", MULTI_HEAD, 9),
            ("nine tokens, latent", LATENT, 9),
            ("Llama 3 70B at 4,096 tokens", PRESETS["Llama 3 70B"].config, 4096),
            ("DeepSeek-V3 at 131,072 tokens", PRESETS["DeepSeek-V3"].config, 131_072),
        )
    ],
    mistakes=(
        Mistake(
            name="a cache for every query head",
            wrong=_cache(grouped=lambda c: 2 * c.n_heads * c.d_head),
            says="You kept keys and values for every query head. With grouped queries there are `n_kv_heads` of them: "
            "that is what the groups are for.",
        ),
        Mistake(
            name="keys without values",
            wrong=_cache(grouped=lambda c: c.n_kv_heads * c.d_head),
            says="Keys and values are two tensors of `n_kv_heads` heads each. You kept one of them.",
        ),
        Mistake(
            name="latent attention's cache by heads",
            wrong=_cache(latent=lambda c: 2 * c.n_kv_heads * c.d_head),
            says="With `config.mla` nothing is kept for each head: keys and values can be read from the latent vector "
            "again. Counted by heads, DeepSeek-V3's cache would be 85 times as large.",
        ),
        Mistake(
            name="the latent vector for every head",
            wrong=_cache(latent=lambda c: c.n_heads * (c.mla.kv_rank + c.mla.d_rope)),
            says="All heads share one latent vector and one turned key. You kept them n_heads times.",
        ),
        Mistake(
            name="a turned key for every head",
            wrong=_cache(latent=lambda c: c.mla.kv_rank + c.n_heads * c.mla.d_rope),
            says="The latent vector is there once, the turned key n_heads times. All heads share it, too.",
        ),
        Mistake(
            name="the latent vector twice, the turned key once",
            wrong=_cache(latent=lambda c: 2 * c.mla.kv_rank + c.mla.d_rope),
            says="You kept the latent vector for keys and again for values. Both are read from the same one.",
        ),
        Mistake(
            name="four bytes a number",
            wrong=_cache(size=4),
            says="That is the cache in fp32. In bf16 a number takes two bytes.",
        ),
        Mistake(
            name="the turned key not kept",
            wrong=_cache(latent=lambda c: c.mla.kv_rank),
            says="The latent vector alone is not enough: the d_rope numbers of the turned key come on top. They cannot "
            "be read from it.",
        ),
        Mistake(
            name="the latent vector kept twice",
            wrong=_cache(latent=lambda c: 2 * (c.mla.kv_rank + c.mla.d_rope)),
            says="You doubled latent attention's numbers, as for keys and values. Both are read from the same vector: "
            "it is kept once.",
        ),
        Mistake(
            name="one layer",
            wrong=_cache(layers=lambda c: 1),
            says="That is one layer's cache. Every layer keeps its own: times `n_layers`.",
        ),
        Mistake(
            name="numbers in place of bytes",
            wrong=_cache(size=1),
            says="That is how many numbers are kept. In bf16 each takes two bytes.",
        ),
    ),
)


# 9.6 what a batch touches

EXPERTS_TOUCHED = Exercise(
    id="9.6",
    title="how many experts a batch touches",
    reference=accounting.distinct_experts,
    cases=lambda: [
        Case(name=name, args=sizes)
        for name, sizes in {
            "one token": (5, 2, 1),
            "two tokens, one of four experts each": (4, 1, 2),
            "three tokens, two of eight experts each": (8, 2, 3),
            "a layer of DeepSeek-V3, 32 tokens": (256, 8, 32),
            "everybody takes all": (6, 6, 3),
        }.items()
    ],
    mistakes=(
        Mistake(
            name="every choice a new expert",
            wrong=lambda n_experts, top_k, batch: float(top_k * batch),
            says="That is k · B, the number of choices. Two tokens may choose the same expert, and then its weights "
            "are read once; soon there would be more experts than the layer has.",
        ),
        Mistake(
            name="every choice a new expert, up to all",
            wrong=lambda n_experts, top_k, batch: float(min(n_experts, top_k * batch)),
            says="k · B, but no more than E: that takes for granted that tokens choose different experts as long as "
            "there are any. They do not talk to each other. Ask for one expert: how likely is it that nobody chose it?",
        ),
        Mistake(
            name="the share of the experts",
            wrong=lambda n_experts, top_k, batch: 1 - (1 - top_k / n_experts) ** batch,
            says="That is the probability that one expert is touched, a share between 0 and 1. How many of the E are "
            "touched on average?",
        ),
        Mistake(
            name="the experts nobody chose",
            wrong=lambda n_experts, top_k, batch: n_experts * (1 - top_k / n_experts) ** batch,
            says="These are the experts that no token chose. The others were asked for: with one token it has to be k.",
        ),
        Mistake(
            name="independent draws, k for each token",
            wrong=lambda n_experts, top_k, batch: n_experts * (1 - (1 - 1 / n_experts) ** (top_k * batch)),
            says="You drew one expert k · B times. A token's k experts are all different: with one token exactly k are "
            "touched. It misses a given expert with probability 1 − k/E.",
        ),
        Mistake(
            name="one choice for each token",
            wrong=lambda n_experts, top_k, batch: n_experts * (1 - (1 - 1 / n_experts) ** batch),
            says="Each token chooses one expert here. It chooses k, and misses a given one with probability 1 − k/E.",
        ),
        Mistake(
            name="not touched by every token",
            wrong=lambda n_experts, top_k, batch: n_experts * (1 - (top_k / n_experts) ** batch),
            says="k/E is the probability that a token chooses this expert, so (k/E)^B is that all do. It stays "
            "untouched where all of them miss it: what is the probability that one does?",
        ),
        Mistake(
            name="a whole number",
            wrong=lambda n_experts, top_k, batch: float(round(n_experts * (1 - (1 - top_k / n_experts) ** batch))),
            says="You rounded. It is an average over many batches, and need not be a number that any of them has.",
        ),
        Mistake(
            name="all tokens choose alike",
            wrong=lambda n_experts, top_k, batch: float(top_k),
            says="The batch touches k experts, whatever its size: all tokens would have to choose alike.",
        ),
        Mistake(
            name="touched by every token",
            wrong=lambda n_experts, top_k, batch: n_experts * (top_k / n_experts) ** batch,
            says="(k/E)^B is the probability that every token chose this expert. For an expert to be read, one "
            "token is enough.",
        ),
    ),
)


# 9.7 what training costs


def training_cost(active: float, tokens: float, rate: float, dollars_per_hour: float) -> tuple[float, float]:
    """GPU hours and dollars of a training run of 6 N D FLOPs, at the rate that one GPU reaches."""
    hours = 6 * active * tokens / rate / 3600
    return hours, hours * dollars_per_hour


def _cost(
    flops: float = 6,
    seconds: float = 3600,
    price: Callable[[float, float], float] = lambda hours, per_hour: hours * per_hour,
) -> Callable[..., tuple[float, float]]:
    """The cost with one of its parts counted in another way."""

    def wrong(active: float, tokens: float, rate: float, dollars_per_hour: float) -> tuple[float, float]:
        hours = flops * active * tokens / rate / seconds
        return hours, price(hours, dollars_per_hour)

    return wrong


TRAINING_COST = Exercise(
    id="9.7",
    title="what training costs",
    reference=training_cost,
    cases=lambda: [
        Case(name=name, args=sizes)
        for name, sizes in {
            "one hour by hand": (100.0, 6.0, 1.0, 2.0),
            "a small model": (1e9, 2e10, 3e14, 1.5),
            "DeepSeek-V3's size": (36.6e9, 14.8e12, 3.4e14, 2.0),
        }.items()
    ],
    mistakes=(
        Mistake(
            name="forward pass only",
            wrong=_cost(flops=2),
            says="2 N D is the forward pass. Backward costs two forwards more, one for the gradients of the rows and "
            "one for those of the weights: 6 N D.",
        ),
        Mistake(
            name="multiply-adds",
            wrong=_cost(flops=3),
            says="3 N D counts multiply-adds. GPUs' rates are in FLOPs, two for each of them: 6 N D.",
        ),
        Mistake(
            name="backward without forward",
            wrong=_cost(flops=4),
            says="4 N D is the backward pass alone. The forward pass, 2 N D, belongs to every step.",
        ),
        Mistake(
            name="seconds in place of hours",
            wrong=_cost(seconds=1),
            says="The rate is in FLOPs per second, so that these are GPU seconds. An hour has 3,600.",
        ),
        Mistake(
            name="minutes in place of hours",
            wrong=_cost(seconds=60),
            says="These are GPU minutes: the rate is per second, and an hour has 3,600 of them.",
        ),
        Mistake(
            name="hours divided by the price",
            wrong=_cost(price=lambda hours, per_hour: hours / per_hour),
            says="The hours are right; each of them costs `dollars_per_hour`. Multiply.",
        ),
    ),
)

EXERCISES = (
    FFN_PARAMETERS,
    ATTENTION_PARAMETERS,
    MODEL_PARAMETERS,
    LAYER_FLOPS,
    CACHE_BYTES,
    EXPERTS_TOUCHED,
    TRAINING_COST,
)
