"""Attention: against its definition, against transformers' modules (outputs and gradients), and with its cache."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from moe_lab.accounting import cache_bytes, cache_numbers, count_flops
from moe_lab.attention import MLA, Attention, Cache, attend, rotary_angles, rotate
from moe_lab.config import LMConfig, MLAConfig
from moe_lab.lm import LM

transformers = pytest.importorskip("transformers")

SIZES = {"d_model": 24, "n_layers": 1, "n_heads": 6, "d_ff": 5, "rope_theta": 50.0, "norm_eps": 0.1}
GQA = LMConfig(**SIZES, n_kv_heads=2, d_head=8)
LATENT = MLAConfig(kv_rank=10, d_nope=6, d_rope=4, d_value=7)
SINKS = {"qkv_bias": True, "output_bias": True, "attention_sinks": True}
KINDS = {
    "grouped": GQA,
    "multi-head": GQA.but(n_kv_heads=6),
    "multi-query": GQA.but(n_kv_heads=1),
    "norm on heads": GQA.but(qk_norm="head"),
    "norm on all": GQA.but(qk_norm="all"),
    "biases": GQA.but(qkv_bias=True),
    "sinks": GQA.but(**SINKS),
    "window": GQA.but(window=3),
    "window and sinks": GQA.but(**SINKS, window=2),
    "chunks": GQA.but(window=3, chunked=True),
    "chunks and sinks": GQA.but(**SINKS, window=2, chunked=True),
    "latent": GQA.but(mla=LATENT),
    "latent queries": GQA.but(mla=LATENT.but(q_rank=9)),
}


def make(config: LMConfig) -> Attention | MLA:
    torch.manual_seed(0)
    attention = (MLA(config) if config.mla else Attention(config, config.window)).double()
    for weight in attention.parameters():
        nn.init.normal_(weight, std=0.5)
    return attention


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, chunked: bool, sinks: Tensor | None, scale: float
) -> Tensor:
    """One query after the other, over the keys that it sees."""
    n_new, n_all, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    y = q.new_zeros(*q.shape[:3], v.shape[-1])
    for head in range(q.shape[1]):
        for i in range(n_new):
            last = n_all - n_new + i
            first = last - last % window if chunked else max(0, last + 1 - (window or n_all))
            seen = slice(first, last + 1)
            scores = torch.einsum("bd,bsd->bs", q[:, head, i], k[:, head // group, seen]) * scale
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].expand(len(scores), 1)], dim=1)
            weights = scores.softmax(-1)[:, : last + 1 - seen.start]
            y[:, head, i] = torch.einsum("bs,bsd->bd", weights, v[:, head // group, seen])
    return y


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("n_new", "n_all"), [(5, 5), (1, 5), (2, 5), (1, 1), (1, 6), (3, 7)])
def test_attend_is_the_definition(window, chunked, with_sinks, n_new, n_all):
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, n_new, 4).double(), torch.randn(2, 2, n_all, 4).double()
    v = torch.randn(2, 2, n_all, 3).double()
    sinks = torch.randn(6).double() if with_sinks else None
    for scale in (None, 0.3):
        expected = by_definition(q, k, v, window, chunked and window is not None, sinks, scale or 4**-0.5)
        found = attend(q, k, v, scale=scale, window=window, chunked=chunked, sinks=sinks)
        assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 1, 2, 1], [1, 6]], ids=str)
def test_with_a_cache_pieces_give_what_the_whole_gives(config, pieces):
    attention, x = make(config), torch.randn(2, 7, 24).double()
    cache = Cache()
    y = torch.cat([attention(piece, cache) for piece in x.split(pieces, dim=1)], dim=1)
    assert_close(y, attention(x), rtol=1e-10, atol=1e-12)
    assert cache.n_seen == 7
    assert cache.n_bytes == 2 * cache_bytes(config, 7, "fp32") * 2  # two sequences, in fp64


@pytest.mark.parametrize(("name", "left"), [("window", 3), ("chunks", 2)])
def test_a_cache_with_a_window_lets_go_of_what_it_does_not_keep(name, left):
    cache = Cache()
    make(KINDS[name])(torch.randn(1, 50, 24).double(), cache)
    assert sum(tensor.untyped_storage().nbytes() for tensor in cache.kept) == cache.n_bytes
    assert [tensor.shape[-2] for tensor in cache.kept] == [left, left]


@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_a_cache_of_other_sequences_is_refused(name):
    attention, cache = make(KINDS[name]), Cache()
    attention(torch.randn(2, 3, 24).double(), cache)
    with pytest.raises(ValueError, match=r"the cache holds sequences \(and heads\) \(2.*, and these are \(3"):
        attention(torch.randn(3, 1, 24).double(), cache)
    assert cache.n_seen == 3


@pytest.mark.parametrize("name", ["grouped", "window", "latent"])
def test_one_cache_for_two_layers_is_refused(name):
    first, second = make(KINDS[name]), make(KINDS[name])
    x, new, cache = torch.randn(2, 3, 24).double(), torch.randn(2, 1, 24).double(), Cache()
    first(x, cache)
    kept = cache.kept
    with pytest.raises(ValueError, match=r"^the cache holds 3 positions of another layer: expected one for each layer"):
        second(new, cache)
    assert cache.n_seen == 3
    assert cache.kept is kept
    assert_close(first(new, cache), first(torch.cat([x, new], dim=1))[:, 3:], rtol=1e-10, atol=1e-12)


def test_a_cache_keeps_no_layer_alive_and_takes_no_other_for_it():
    layer, cache = make(GQA), Cache()
    layer(torch.randn(1, 2, 24).double(), cache)
    lives = weakref.ref(layer)
    del layer
    assert lives() is None
    with pytest.raises(ValueError, match="of another layer"):
        make(GQA)(torch.randn(1, 2, 24).double(), cache)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "sizes", [(2, 0), (0, 3), (0, 1)], ids=["no positions", "no sequences", "no sequences, one position"]
)
def test_nothing_gives_nothing(config, sizes):
    assert make(config)(torch.randn(*sizes, 24).double()).shape == (*sizes, 24)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_cache_keeps_what_is_counted(config):
    cache = Cache()
    make(config)(torch.randn(1, 1, 24).double(), cache)
    assert sum(tensor.numel() for tensor in cache.kept) == cache_numbers(config)


@pytest.mark.parametrize("config", [KINDS["latent"], KINDS["latent queries"]], ids=["latent", "latent queries"])
def test_absorbed_is_the_same_outputs_and_gradients(config):
    attention, x = make(config), torch.randn(2, 5, 24).double()
    found = []
    for absorb in (False, True):
        attention.zero_grad()
        inputs = x.clone().requires_grad_()
        y = attention(inputs, absorb=absorb)
        y.square().sum().backward()
        found.append([y, inputs.grad, *(weight.grad for weight in attention.parameters())])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)
    cache, pieces = Cache(), [2, 1, 1, 1]
    y = torch.cat([attention(piece, cache, absorb=True) for piece in x.split(pieces, dim=1)], dim=1)
    assert_close(y, found[0][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_nobody_sees_what_comes_later(config):
    attention, x = make(config), torch.randn(1, 6, 24).double()
    changed = x.clone()
    changed[:, 4:] += 1
    assert_close(attention(x)[:, :4], attention(changed)[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(attention(x)[:, 4:], attention(changed)[:, 4:])


def test_a_window_hides_what_is_long_ago():
    attention, x = make(KINDS["window"]), torch.randn(1, 6, 24).double()
    changed = x.clone()
    changed[:, 0] += 1
    same = (attention(x) - attention(changed)).abs().amax(-1)[0] < 1e-12
    assert same.tolist() == [False, False, False, True, True, True]


def test_a_chunk_hides_what_stands_before_it():
    attention, x = make(KINDS["chunks"]), torch.randn(1, 8, 24).double()
    changed = x.clone()
    changed[:, 4] += 1
    same = (attention(x) - attention(changed)).abs().amax(-1)[0] < 1e-12
    assert same.tolist() == [True, True, True, True, False, False, True, True]


# --- transformers -----------------------------------------------------------------------------------------------------


def frequencies(config: LMConfig, length: int, width: int) -> tuple[Tensor, Tensor]:
    angles = rotary_angles(length, width, config.rope_theta).double()
    return torch.cat([angles, angles], -1).cos()[None], torch.cat([angles, angles], -1).sin()[None]


def causal_mask(length: int, config: LMConfig) -> Tensor:
    if config.chunked:  # by transformers' own hand
        made = transformers.Llama4TextConfig(attention_chunk_size=config.window, attn_implementation="eager")
        nothing = torch.empty(1, length, 1, dtype=torch.float64)
        return transformers.masking_utils.create_chunked_causal_mask(made, nothing, None, None)
    places = torch.arange(length)
    sees = (places <= places[:, None]) & (places > places[:, None] - (config.window or length))
    return torch.zeros(length, length).double().masked_fill(~sees, float("-inf"))[None, None]


def their_config(kind: str, config: LMConfig, **more: object) -> object:
    made = getattr(transformers, f"{kind}Config")(
        hidden_size=config.d_model,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        num_hidden_layers=2,
        rms_norm_eps=config.norm_eps,
        vocab_size=11,
        pad_token_id=None,
        **more,
    )
    made._attn_implementation = "eager"
    return made


OF_GQA = {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_o": "o_proj"}
OF_MLA = {
    "w_q": "q_proj",
    "w_dq": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "w_uq": "q_b_proj",
    "w_dkv": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "w_ukv": "kv_b_proj",
    "w_o": "o_proj",
}


def assert_equal_to(theirs: nn.Module, ours: nn.Module, names: dict[str, str], config: LMConfig, width: int) -> None:
    """Outputs, and the gradients of the input and of every weight."""
    theirs = theirs.double().eval()
    own = dict(ours.named_parameters())
    other = {their_name(name, names): name for name in own}
    assert {name for name, _ in theirs.named_parameters()} == set(other)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.copy_(own[other[name]])
    x, dy = torch.randn(2, 9, config.d_model).double(), torch.randn(2, 9, config.d_model).double()
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = ours(one)
    their_y = theirs(
        hidden_states=two,
        position_embeddings=frequencies(config, 9, width),
        attention_mask=causal_mask(9, config),
    )[0]
    assert_close(y, their_y, rtol=3e-5, atol=3e-5)  # their softmax is fp32
    y.backward(dy)
    their_y.backward(dy)
    assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)
    for name, weight in theirs.named_parameters():
        assert_close(own[other[name]].grad, weight.grad, rtol=1e-4, atol=1e-4)


def their_name(name: str, names: dict[str, str]) -> str:
    first, _, rest = name.partition(".")
    return f"{names.get(first, first)}.{rest}" if rest else names.get(first, first)


@pytest.mark.parametrize(
    ("kind", "name", "module", "more"),
    [
        ("Llama", "grouped", "llama.modeling_llama.LlamaAttention", {"head_dim": 8}),
        ("Llama", "multi-head", "llama.modeling_llama.LlamaAttention", {"head_dim": 8}),
        ("Llama", "chunks", "llama.modeling_llama.LlamaAttention", {"head_dim": 8}),
        ("Qwen2", "biases", "qwen2.modeling_qwen2.Qwen2Attention", {"head_dim": 8}),
        ("Qwen3Moe", "norm on heads", "qwen3_moe.modeling_qwen3_moe.Qwen3MoeAttention", {"head_dim": 8}),
        ("GptOss", "sinks", "gpt_oss.modeling_gpt_oss.GptOssAttention", {"head_dim": 8, "sliding_window": None}),
        (
            "GptOss",
            "window and sinks",
            "gpt_oss.modeling_gpt_oss.GptOssAttention",
            {"head_dim": 8, "sliding_window": 2},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "." not in value else "",
)
def test_grouped_queries_are_those_of_transformers(kind, name, module, more):
    config = KINDS[name]
    path, _, attention = module.rpartition(".")
    made = their_config(kind, config, **more)
    theirs = getattr(__import__(f"transformers.models.{path}", fromlist=[attention]), attention)(made, 0)
    ours = make(config)
    width = config.d_head
    if kind == "GptOss":  # takes half the angles

        class Halved(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = theirs

            def named_parameters(self, *args, **kwargs):
                return self.attention.named_parameters(*args, **kwargs)

            def forward(self, position_embeddings, **others):
                halves = tuple(t[..., : width // 2] for t in position_embeddings)
                return self.attention(position_embeddings=halves, **others)

        theirs = Halved()
    assert_equal_to(theirs, ours, OF_GQA, config, width)


def test_a_norm_over_all_heads_is_that_of_transformers():
    from transformers.models.olmoe.modeling_olmoe import OlmoeAttention

    config = LMConfig(**SIZES, n_kv_heads=2, qk_norm="all")
    theirs = OlmoeAttention(their_config("Olmoe", config, clip_qkv=None), 0)
    assert_equal_to(theirs, make(config), OF_GQA, config, config.d_head)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 11])
def test_chunks_are_those_of_transformers(length):
    """Pair by pair, and as many as are paid for."""
    config = KINDS["chunks"]
    sees = causal_mask(length, config)[0, 0] == 0
    allowed = [(i, j) for i in range(length) for j in range(i + 1) if i // config.window == j // config.window]
    assert sees.nonzero().tolist() == [list(pair) for pair in allowed]
    a_pair = 4 * config.n_heads * config.d_head
    assert count_flops(config, length).attention_scores == len(allowed) * a_pair


@pytest.mark.parametrize("name", ["latent", "latent queries"])
def test_latent_attention_is_that_of_transformers(name):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config, mla = KINDS[name], KINDS[name].mla
    made = their_config(
        "DeepseekV3",
        config,
        q_lora_rank=mla.q_rank,
        kv_lora_rank=mla.kv_rank,
        qk_nope_head_dim=mla.d_nope,
        qk_rope_head_dim=mla.d_rope,
        v_head_dim=mla.d_value,
        head_dim=mla.d_rope,
        rope_interleave=False,  # released weights have pairs side by side; both turn the same pairs
        attention_bias=False,
    )
    theirs = DeepseekV3Attention(made, 0)
    for norm in (module for module in theirs.modules() if hasattr(module, "variance_epsilon")):
        norm.variance_epsilon = config.norm_eps  # the class takes 1e-6, whatever its config says
    assert_equal_to(theirs, make(config), OF_MLA, config, mla.d_rope)


def test_pairs_side_by_side_are_the_same_up_to_the_order_of_rows():
    """DeepSeek's released weights turn neighbours; ours turn halves: rows of the turned parts change places."""
    angles = rotary_angles(5, 4, 1e4).double()
    q, k = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    cos, sin = angles.cos(), angles.sin()

    def neighbours(x: Tensor) -> Tensor:
        first, second = x[:, ::2], x[:, 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(1)

    order = [0, 2, 1, 3]
    assert_close(neighbours(q) @ neighbours(k).T, rotate(q[:, order], angles) @ rotate(k[:, order], angles).T)


# --- in a model -------------------------------------------------------------------------------------------------------


def test_a_model_has_windows_and_latent_attention_where_its_config_says_so():
    model = LM(GQA.but(n_layers=5, window=3, full_every=2))
    assert [block.attention.window for block in model.blocks] == [3, None, 3, None, 3]
    model = LM(GQA.but(n_layers=2, window=3, chunked=True))
    assert [(block.attention.window, block.attention.chunked) for block in model.blocks] == [(3, True)] * 2
    model = LM(GQA.but(n_layers=2, mla=LATENT))
    assert all(isinstance(block.attention, MLA) for block in model.blocks)
    logits, _ = model(torch.tensor([[1, 2, 3]]))
    logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
