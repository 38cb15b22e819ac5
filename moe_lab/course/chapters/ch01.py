"""The exercises of notebook 01: the dense FFN, its size, its cost, and which of its neurons matter."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab import accounting, ffn
from moe_lab.accounting import Flops, Parameters
from moe_lab.config import LMConfig
from moe_lab.course.bank import Case, Exercise, Mistake
from moe_lab.presets import LLAMA_3_70B, LLAMA_7B


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# 1.1 the MLP


def _mlp_cases() -> list[Case]:
    x = torch.tensor([[1.0, -1.0]])
    w_up = torch.tensor([[2.0, 1.0], [1.0, 2.0], [-1.0, -3.0]])
    w_down = torch.tensor([[1.0, 1.0, -1.0], [0.0, 1.0, 2.0]])
    return [
        Case(name="one token by hand", args=(x, w_up, w_down)),
        Case(name="as many neurons as dimensions", args=tuple(_random(3, 3, seed=seed) for seed in (1, 2, 3))),
        Case(
            name="two sequences of five", args=(_random(2, 5, 4, seed=1), _random(7, 4, seed=2), _random(4, 7, seed=3))
        ),
    ]


MLP = Exercise(
    id="1.1",
    title="the two-matrix MLP",
    reference=ffn.mlp,
    cases=_mlp_cases,
    mistakes=(
        Mistake(
            name="no activation",
            wrong=lambda x, w_up, w_down: x @ w_up.T @ w_down.T,
            says="There is no activation between the two matrices. Without it they collapse into one: w_down @ w_up "
            "would do the same, and nothing is gained by the width in between.",
        ),
        Mistake(
            name="activation on the output",
            wrong=lambda x, w_up, w_down: F.relu(x @ w_up.T @ w_down.T),
            says="The ReLU stands after w_down. It belongs between the matrices, on the F hidden neurons: the output "
            "must be free to be negative, because it is added to the residual stream.",
        ),
        Mistake(
            name="activation on the input",
            wrong=lambda x, w_up, w_down: F.relu(x) @ w_up.T @ w_down.T,
            says="The ReLU stands before w_up, on the input. It belongs after w_up, on the F hidden neurons.",
        ),
        Mistake(
            name="activation twice",
            wrong=lambda x, w_up, w_down: F.relu(F.relu(x @ w_up.T) @ w_down.T),
            says="There is a second ReLU, on the output. One is enough, on the hidden neurons: the output must be free "
            "to be negative.",
        ),
        Mistake(
            name="residual added",
            wrong=lambda x, w_up, w_down: x + ffn.mlp(x, w_up, w_down),
            says="You added x to the result. The residual belongs to the block, which adds what the FFN returns; added "
            "here too, it would count twice.",
        ),
        Mistake(
            name="another activation",
            wrong=lambda x, w_up, w_down: F.gelu(x @ w_up.T) @ w_down.T,
            says="The activation looks like GELU. This exercise asks for ReLU, max(0, h).",
        ),
        Mistake(
            name="SiLU in place of ReLU",
            wrong=lambda x, w_up, w_down: F.silu(x @ w_up.T) @ w_down.T,
            says="The activation looks like SiLU. This exercise asks for ReLU, max(0, h); SiLU comes in the next one.",
        ),
        Mistake(
            name="weights not transposed",
            wrong=lambda x, w_up, w_down: F.relu(x @ w_up) @ w_down,
            says="The weights are used without transposing them. nn.Linear keeps a matrix as (out, in), so w_up is "
            "(F, D): multiply by w_up.T. Where F equals D there is not even an error.",
        ),
        Mistake(
            name="w_down not transposed",
            wrong=lambda x, w_up, w_down: F.relu(x @ w_up.T) @ w_down,
            says="The second matrix is not transposed. w_down is (D, F), as nn.Linear keeps it: multiply by w_down.T.",
        ),
        Mistake(
            name="w_up not transposed",
            wrong=lambda x, w_up, w_down: F.relu(x @ w_up) @ w_down.T,
            says="The first matrix is not transposed. w_up is (F, D), as nn.Linear keeps it: multiply by w_up.T.",
        ),
    ),
)


# 1.2 SwiGLU


def _swiglu_cases() -> list[Case]:
    x = torch.tensor([[1.0, 2.0]])
    w_gate = torch.tensor([[1.0, 0.5], [0.0, -1.0]])
    w_up = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    w_down = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    larger = (_random(2, 5, 4, seed=1), _random(7, 4, seed=2), _random(7, 4, seed=3), _random(4, 7, seed=4))
    return [
        Case(name="one token by hand", args=(x, w_gate, w_up, w_down)),
        Case(name="two sequences of five", args=larger),
    ]


def _gated(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A SwiGLU whose hidden layer is `combine(gate, up)`."""
    return lambda x, w_gate, w_up, w_down: combine(x @ w_gate.T, x @ w_up.T) @ w_down.T


SWIGLU = Exercise(
    id="1.2",
    title="SwiGLU",
    reference=ffn.swiglu,
    cases=_swiglu_cases,
    mistakes=(
        Mistake(
            name="gate and up exchanged",
            wrong=_gated(lambda gate, up: gate * F.silu(up)),
            says="The SiLU is on the up branch. It belongs on the gate: silu(x W_gate) opens or closes what x W_up "
            "carries. With weights from a checkpoint the two must not change places.",
        ),
        Mistake(
            name="sigmoid in place of SiLU",
            wrong=_gated(lambda gate, up: gate.sigmoid() * up),
            says="The gate passes through a sigmoid. That is the older GLU; SwiGLU uses SiLU, z times sigmoid(z).",
        ),
        Mistake(
            name="added in place of multiplied",
            wrong=_gated(lambda gate, up: F.silu(gate) + up),
            says="The two branches are added. They are multiplied, neuron by neuron: that is what makes one of them a "
            "gate.",
        ),
        Mistake(
            name="no activation on the gate",
            wrong=_gated(lambda gate, up: gate * up),
            says="The gate has no activation, so this is the bilinear variant. Put SiLU on x W_gate before the "
            "multiplication.",
        ),
        Mistake(
            name="SiLU on both branches",
            wrong=_gated(lambda gate, up: F.silu(gate) * F.silu(up)),
            says="SiLU stands on both branches. Only the gate has one; the up branch stays linear.",
        ),
        Mistake(
            name="SiLU after the product",
            wrong=_gated(lambda gate, up: F.silu(gate * up)),
            says="SiLU stands after the multiplication. It belongs on the gate alone, before the branches meet.",
        ),
        Mistake(
            name="GELU on the gate",
            wrong=_gated(lambda gate, up: F.gelu(gate) * up),
            says="The gate passes through GELU: that is GEGLU, a sister of SwiGLU. Here it is SiLU.",
        ),
        Mistake(
            name="weights not transposed",
            wrong=lambda x, w_gate, w_up, w_down: (F.silu(x @ w_gate) * (x @ w_up)) @ w_down,
            says="The weights are used without transposing them. nn.Linear keeps a matrix as (out, in), so w_gate and "
            "w_up are (F, D): multiply by their .T. Where F equals D there is not even an error.",
        ),
        Mistake(
            name="brackets missing",
            wrong=lambda x, w_gate, w_up, w_down: F.silu(x @ w_gate.T) * x @ w_up.T @ w_down.T,
            says="Python multiplies from left to right: gate * x @ w_up.T is (gate * x) @ w_up.T. Put brackets around "
            "x @ w_up.T.",
        ),
        Mistake(
            name="a matrix product in place of *",
            wrong=_gated(lambda gate, up: F.silu(gate) @ up),
            says="The two branches meet in a matrix product. They are multiplied neuron by neuron, with *.",
        ),
    ),
)


# 1.3 LLaMA's widths


def _two_thirds(d_model: int, multiplier: float) -> int:
    return int(multiplier * int(8 * d_model / 3))


FFN_WIDTH = Exercise(
    id="1.3",
    title="where 11,008 comes from",
    reference=accounting.ffn_width,
    cases=lambda: [
        Case(name="Llama-7B", args=(4096, 256)),
        Case(name="a width that needs no rounding", args=(384, 256)),
        Case(name="Llama-13B", args=(5120, 256)),
        Case(name="Llama 3 70B", args=(8192, 4096, 1.3)),
        Case(name="Llama 3 8B", args=(4096, 1024, 1.3)),
        Case(name="no rounding up to hide behind", args=(100, 1, 1.3)),
    ],
    mistakes=(
        Mistake(
            name="rounded down",
            wrong=lambda d_model, multiple_of, multiplier=1.0: (
                _two_thirds(d_model, multiplier) // multiple_of * multiple_of
            ),
            says="You rounded down to the multiple. The rule rounds up, so that the width is never below what was "
            "asked for.",
        ),
        Mistake(
            name="rounded to the nearest",
            wrong=lambda d_model, multiple_of, multiplier=1.0: (
                round(_two_thirds(d_model, multiplier) / multiple_of) * multiple_of
            ),
            says="You rounded to the nearest multiple. The rule rounds up.",
        ),
        Mistake(
            name="one multiple too many",
            wrong=lambda d_model, multiple_of, multiplier=1.0: (
                (_two_thirds(d_model, multiplier) // multiple_of + 1) * multiple_of
            ),
            says="A width that is a multiple already gets one more. Round up, but leave what divides as it is.",
        ),
        Mistake(
            name="number of multiples",
            wrong=lambda d_model, multiple_of, multiplier=1.0: -(-_two_thirds(d_model, multiplier) // multiple_of),
            says="That is how many multiples fit. Multiply it by multiple_of to get the width.",
        ),
        Mistake(
            name="two thirds of D",
            wrong=lambda d_model, multiple_of, multiplier=1.0: (
                -(-int(multiplier * int(2 * d_model / 3)) // multiple_of) * multiple_of
            ),
            says="You took two thirds of D. It is two thirds of 4 D, the width of an MLP.",
        ),
        Mistake(
            name="cut once",
            wrong=lambda d_model, multiple_of, multiplier=1.0: (
                -(-int(multiplier * 8 * d_model / 3) // multiple_of) * multiple_of
            ),
            says="You cut to an integer once, at the end. The rule cuts twice: two thirds of 4 D, and again after the "
            "multiplier. It seldom shows, but then the checkpoint does not fit.",
        ),
        Mistake(
            name="never cut",
            wrong=lambda d_model, multiple_of, multiplier=1.0: (
                math.ceil(multiplier * 8 * d_model / 3 / multiple_of) * multiple_of
            ),
            says="You never cut to an integer before rounding up. The rule cuts twice: two thirds of 4 D, and again "
            "after the multiplier. It seldom shows, but then the checkpoint does not fit.",
        ),
        Mistake(
            name="no two thirds",
            wrong=lambda d_model, multiple_of, multiplier=1.0: (
                -(-int(multiplier * 4 * d_model) // multiple_of) * multiple_of
            ),
            says="You started from 4 D. That is the width for two matrices; with three, two thirds of it cost the "
            "same.",
        ),
        Mistake(
            name="multiplier after rounding",
            wrong=lambda d_model, multiple_of, multiplier=1.0: int(
                multiplier * (-(-_two_thirds(d_model, 1.0) // multiple_of) * multiple_of)
            ),
            says="The multiplier comes after the rounding, and the result is no longer a multiple. Multiply first, "
            "round up last.",
        ),
        Mistake(
            name="multiplier ignored",
            wrong=lambda d_model, multiple_of, multiplier=1.0: (
                -(-_two_thirds(d_model, 1.0) // multiple_of) * multiple_of
            ),
            says="The multiplier is not used. Llama 3 widens its FFN by 1.3; without it the width is too small.",
        ),
    ),
)


# 1.4 parameters

# Sizes that differ from each other, and heads that are together wider than D: no two mistakes look alike.
TINY = LMConfig(d_model=8, n_layers=3, n_heads=4, n_kv_heads=2, d_head=6, d_ff=10, vocab_size=7)
MODELS = {"a tiny model": TINY, "Llama-7B": LLAMA_7B, "Llama 3 70B": LLAMA_3_70B}


def _show(config: LMConfig) -> str:
    return (
        f"d_model {config.d_model}, n_layers {config.n_layers}, n_heads {config.n_heads}, "
        f"n_kv_heads {config.n_kv_heads}, d_head {config.d_head}, d_ff {config.d_ff}, vocab_size {config.vocab_size}"
    )


def _altered(**change: Callable[[LMConfig, Parameters], int]) -> Callable[[LMConfig], Parameters]:
    """The right count with one part counted in another way."""

    def wrong(config: LMConfig) -> Parameters:
        right = accounting.count_parameters(config)
        return replace(right, **{part: count(config, right) for part, count in change.items()})

    return wrong


COUNT_PARAMETERS = Exercise(
    id="1.4",
    title="every parameter of a Llama",
    reference=accounting.count_parameters,
    cases=lambda: [Case(name=name, args=(config,), show=_show(config)) for name, config in MODELS.items()],
    mistakes=(
        Mistake(
            name="two matrices in the FFN",
            wrong=_altered(ffn=lambda config, right: right.ffn * 2 // 3),
            says="The FFN is a third too small: you counted two matrices. SwiGLU has three, gate, up and down.",
        ),
        Mistake(
            name="keys and values for every head",
            wrong=_altered(
                attention=lambda config, right: 4 * config.n_layers * config.d_model * config.n_heads * config.d_head
            ),
            says="Attention is too large where n_kv_heads < n_heads: keys and values are made for n_kv_heads heads "
            "only, queries and output for all n_heads.",
        ),
        Mistake(
            name="output projection forgotten",
            wrong=_altered(
                attention=lambda config, right: (
                    config.n_layers * config.d_model * config.d_head * (config.n_heads + 2 * config.n_kv_heads)
                )
            ),
            says="Attention has four matrices: query, key, value, and the output projection, which you left out.",
        ),
        Mistake(
            name="keys or values forgotten",
            wrong=_altered(
                attention=lambda config, right: (
                    config.n_layers * config.d_model * config.d_head * (2 * config.n_heads + config.n_kv_heads)
                )
            ),
            says="Keys and values each have a matrix of their own; you counted one for both.",
        ),
        Mistake(
            name="D taken for the width of the heads",
            wrong=_altered(
                attention=lambda config, right: (
                    2
                    * config.n_layers
                    * config.d_model
                    * (config.d_model + config.d_model * config.n_kv_heads // config.n_heads)
                )
            ),
            says="You took the heads together to be D wide. Often they are, but it is n_heads * d_head that counts, as "
            "in the tiny model here.",
        ),
        Mistake(
            name="one layer only",
            wrong=_altered(
                attention=lambda config, right: right.attention // config.n_layers,
                ffn=lambda config, right: right.ffn // config.n_layers,
                norms=lambda config, right: 3 * config.d_model,
            ),
            says="That is one layer. Attention, FFN and the two norms of a block are there n_layers times.",
        ),
        Mistake(
            name="head forgotten",
            wrong=_altered(head=lambda config, right: 0),
            says="The head is missing. These models do not share one table between input and output: the head is a "
            "second V × D matrix.",
        ),
        Mistake(
            name="final norm forgotten",
            wrong=_altered(norms=lambda config, right: 2 * config.n_layers * config.d_model),
            says="One norm is missing: beside the two of every block there is one before the head.",
        ),
        Mistake(
            name="one norm a block",
            wrong=_altered(norms=lambda config, right: (config.n_layers + 1) * config.d_model),
            says="Each block has two norms, one before attention and one before the FFN; you counted one.",
        ),
    ),
)


# 1.5 FLOPs


def _flop_cases() -> list[Case]:
    return [
        Case(name=f"{name}, {tokens} tokens", args=(config, tokens), show=f"{_show(config)}; tokens {tokens}")
        for name, config, tokens in (
            ("a tiny model", TINY, 1),
            ("a tiny model", TINY, 6),
            ("Llama-7B", LLAMA_7B, 4096),
            ("Llama 3 70B", LLAMA_3_70B, 4096),
        )
    ]


def _altered_flops(**change: Callable[[LMConfig, int, Flops], int]) -> Callable[[LMConfig, int], Flops]:
    """The right count with one part counted in another way."""

    def wrong(config: LMConfig, tokens: int) -> Flops:
        right = accounting.count_flops(config, tokens)
        return replace(right, **{part: count(config, tokens, right) for part, count in change.items()})

    return wrong


def _halved(part: str) -> Callable[[LMConfig, int, Flops], int]:
    return lambda config, tokens, right: getattr(right, part) // 2


COUNT_FLOPS = Exercise(
    id="1.5",
    title="every FLOP of a forward pass",
    reference=accounting.count_flops,
    cases=_flop_cases,
    mistakes=(
        Mistake(
            name="a multiply-add as one",
            wrong=_altered_flops(
                **{part: _halved(part) for part in ("attention_projections", "attention_scores", "ffn", "head")}
            ),
            says="Everything is half of what it should be. One multiplication with its addition counts as two FLOPs, "
            "so a matrix costs 2 FLOPs per parameter and token.",
        ),
        Mistake(
            name="scores of the full square",
            wrong=lambda config, tokens: accounting.count_flops(config, tokens, causal=False),
            says="You paid for every pair of tokens. Attention is causal: token s looks at s tokens and itself, so "
            "there are tokens * (tokens + 1) / 2 pairs.",
        ),
        Mistake(
            name="no token looks at itself",
            wrong=_altered_flops(
                attention_scores=lambda config, tokens, right: (
                    2 * tokens * (tokens - 1) * config.n_layers * config.n_heads * config.d_head
                )
            ),
            says="The pairs of a token with itself are missing. A token sees those before it and itself: "
            "tokens * (tokens + 1) / 2 pairs, not tokens * (tokens - 1) / 2.",
        ),
        Mistake(
            name="half of the square",
            wrong=_altered_flops(
                attention_scores=lambda config, tokens, right: (
                    4 * (tokens * tokens // 2) * config.n_layers * config.n_heads * config.d_head
                )
            ),
            says="Half of the square is close, but a token sees itself, too: tokens * (tokens + 1) / 2 pairs.",
        ),
        Mistake(
            name="D taken for the width of the heads",
            wrong=_altered_flops(
                attention_scores=lambda config, tokens, right: (
                    2 * tokens * (tokens + 1) * config.n_layers * config.d_model
                )
            ),
            says="You took the heads together to be D wide. Often they are, but it is n_heads * d_head that counts, as "
            "in the tiny model here.",
        ),
        Mistake(
            name="half of the attention scores",
            wrong=_altered_flops(attention_scores=_halved("attention_scores")),
            says="Each pair of tokens costs two dot products over a head: query with key, then the weight with the "
            "value. You counted one of them.",
        ),
        Mistake(
            name="scores for the key heads only",
            wrong=_altered_flops(
                attention_scores=lambda config, tokens, right: (
                    right.attention_scores * config.n_kv_heads // config.n_heads
                )
            ),
            says="The attention scores are too small where n_kv_heads < n_heads. Sharing keys and values saves memory; "
            "every one of the n_heads queries is still compared.",
        ),
        Mistake(
            name="one token only",
            wrong=lambda config, tokens: Flops(
                **{part: number // tokens for part, number in accounting.count_flops(config, tokens).by_part().items()}
            ),
            says="That is the mean cost of one token. The whole sequence was asked for: multiply by the tokens.",
        ),
        Mistake(
            name="attention scores forgotten",
            wrong=_altered_flops(attention_scores=lambda config, tokens, right: 0),
            says="The attention scores have no parameters, but they cost FLOPs: every query is compared with the keys "
            "before it, and the values are summed with these weights.",
        ),
    ),
)


# 1.6 which neurons matter


def _strongest_cases() -> list[Case]:
    hidden = torch.tensor([[1.0, -2.0, 3.0, 0.5], [4.0, 1.0, 0.5, -9.0]])
    w_down = torch.tensor([[1.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.1]])
    larger = (_random(2, 5, 12, seed=1), _random(6, 12, seed=2))
    return [
        Case(name="two tokens by hand", args=(hidden, w_down, 0.5)),
        Case(name="a quarter of twelve neurons", args=(*larger, 0.25)),
        Case(name="a share just above three neurons", args=(*larger, 0.27)),
        Case(name="a share just below four neurons", args=(*larger, 0.31)),
        Case(name="as many neurons as dimensions", args=(_random(3, 6, seed=5), _random(6, 6, seed=6), 0.5)),
        Case(name="a share of less than one neuron", args=(_random(3, 12, seed=3), _random(6, 12, seed=4), 0.01)),
    ]


def _kept(hidden: Tensor, strength: Tensor, count: int, largest: bool = True) -> Tensor:
    chosen = strength.topk(count, dim=-1, largest=largest).indices
    return torch.zeros_like(hidden).scatter(-1, chosen, hidden.gather(-1, chosen))


def _count(hidden: Tensor, share: float) -> int:
    return max(1, round(share * hidden.shape[-1]))


def _same_for_all(hidden: Tensor, w_down: Tensor, share: float) -> Tensor:
    strength = (hidden.abs() * w_down.norm(dim=0)).flatten(0, -2).mean(0)
    return _kept(hidden, strength.expand_as(hidden), _count(hidden, share))


def _across_all_tokens(hidden: Tensor, w_down: Tensor, share: float) -> Tensor:
    strength = (hidden.abs() * w_down.norm(dim=0)).flatten()
    return _kept(hidden.flatten(), strength, max(1, round(share * strength.numel()))).view_as(hidden)


def _mask(hidden: Tensor, w_down: Tensor, share: float) -> Tensor:
    strength = hidden.abs() * w_down.norm(dim=0)
    return _kept(torch.ones_like(hidden), strength, _count(hidden, share))


def _counted_by(rounding: Callable[[float], int]) -> Callable[..., Tensor]:
    def wrong(hidden: Tensor, w_down: Tensor, share: float) -> Tensor:
        count = max(1, rounding(share * hidden.shape[-1]))
        return _kept(hidden, hidden.abs() * w_down.norm(dim=0), count)

    return wrong


def _may_keep_none(hidden: Tensor, w_down: Tensor, share: float) -> Tensor:
    return _kept(hidden, hidden.abs() * w_down.norm(dim=0), round(share * hidden.shape[-1]))


KEEP_STRONGEST = Exercise(
    id="1.6",
    title="keep each token's strongest neurons",
    reference=ffn.keep_strongest,
    cases=_strongest_cases,
    mistakes=(
        Mistake(
            name="the same neurons for every token",
            wrong=_same_for_all,
            says="You chose one set of neurons for all tokens. Every token has its own: choose along the last axis, "
            "for each token by itself.",
        ),
        Mistake(
            name="the sign counts",
            wrong=lambda hidden, w_down, share: _kept(hidden, hidden * w_down.norm(dim=0), _count(hidden, share)),
            says="You chose the largest values, so that strong negative ones lose. A neuron at -9 writes as much as "
            "one at 9: compare absolute values.",
        ),
        Mistake(
            name="what a neuron writes is ignored",
            wrong=lambda hidden, w_down, share: _kept(hidden, hidden.abs(), _count(hidden, share)),
            says="You compared the activations alone, or all scaled by one number. A large activation on a short "
            "column of w_down writes little: multiply each neuron by the length of its own column.",
        ),
        Mistake(
            name="lengths of the rows",
            wrong=lambda hidden, w_down, share: _kept(hidden, hidden.abs() * w_down.norm(dim=1), _count(hidden, share)),
            says="You took the lengths of the rows of w_down. A neuron owns a column: w_down is (D, F), so sum over "
            "its first axis.",
        ),
        Mistake(
            name="one choice across all tokens",
            wrong=_across_all_tokens,
            says="You ranked the neurons of all tokens together, so that some tokens keep many and others few. Choose "
            "along the last axis, for each token by itself.",
        ),
        Mistake(
            name="the weakest are kept",
            wrong=lambda hidden, w_down, share: _kept(
                hidden, hidden.abs() * w_down.norm(dim=0), _count(hidden, share), largest=False
            ),
            says="You kept the weakest neurons and dropped the strongest.",
        ),
        Mistake(
            name="the choice in place of the values",
            wrong=_mask,
            says="You returned which neurons are kept, as ones and zeros. Return their values: hidden times that mask.",
        ),
        Mistake(
            name="the strengths in place of the values",
            wrong=lambda hidden, w_down, share: _kept(
                hidden.abs() * w_down.norm(dim=0), hidden.abs() * w_down.norm(dim=0), _count(hidden, share)
            ),
            says="You returned the strengths. They only decide who stays; what stays is the value in hidden.",
        ),
        Mistake(
            name="no neuron is left",
            wrong=_may_keep_none,
            says="With a very small share you keep no neuron at all. Keep at least one, and round to the nearest "
            "count.",
        ),
        Mistake(
            name="the count rounded up",
            wrong=_counted_by(math.ceil),
            says="You round the number of neurons up; round it to the nearest, and keep at least one.",
        ),
        Mistake(
            name="the count rounded down",
            wrong=_counted_by(math.floor),
            says="You cut the number of neurons to an integer; round it to the nearest, and keep at least one.",
        ),
    ),
)

EXERCISES = (MLP, SWIGLU, FFN_WIDTH, COUNT_PARAMETERS, COUNT_FLOPS, KEEP_STRONGEST)
