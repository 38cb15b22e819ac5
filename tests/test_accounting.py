import itertools
import random
import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_lab.accounting import (
    activation_bytes,
    as_text,
    cache_bytes,
    cache_numbers,
    combinations,
    count_flops,
    count_mtp,
    count_parameters,
    cut_finer,
    decode_flops,
    decode_reads,
    distinct_experts,
    expert_parameters,
    ffn_width,
    fp8_checkpoint_bytes,
    layer_flops,
    model_activation_bytes,
    moe_parameters,
    mxfp4_checkpoint_bytes,
    router_parameters,
    shared_expert_parameters,
    six_nd,
    training_bytes,
    training_flops_per_token,
    weight_bytes,
)
from moe_lab.config import LMConfig, MLAConfig, MoEConfig, RouterConfig, SwitchConfig
from moe_lab.lm import LM
from moe_lab.moe import MoE
from moe_lab.presets import DENSE_BASELINE, LLAMA_3_70B, LLAMA_7B, MOE_BASELINE, PRESETS, REAL_MOE_MODELS

LATENT = MLAConfig(kv_rank=5, d_nope=6, d_rope=4, d_value=3)
UGLY = LMConfig(d_model=12, n_layers=3, n_heads=4, n_kv_heads=2, d_head=6, d_ff=7, vocab_size=11)
CONFIGS = {
    "Llama-7B": LLAMA_7B,
    "Llama 3 70B": LLAMA_3_70B,
    "baseline": DENSE_BASELINE,
    "ugly": UGLY,
    "tied": UGLY.but(tied_embeddings=True),
    "relu": UGLY.but(ffn="relu", conv_width=3),
    "norm on heads": UGLY.but(qk_norm="head"),
    "norm on all": UGLY.but(qk_norm="all"),
    "biases of attention": UGLY.but(qkv_bias=True),
    "latent": UGLY.but(mla=LATENT),
    "latent queries": UGLY.but(mla=LATENT.but(q_rank=7)),
    "biases and sinks": UGLY.but(qkv_bias=True, output_bias=True, attention_sinks=True, window=3, full_every=2),
}
EXPERTS = MoEConfig(d_model=12, d_ff=5, n_experts=6, top_k=2)
SHARED = {"n_shared_experts": 2, "d_ff_shared": 10}
MOE_CONFIGS = {
    "experts": UGLY.but(moe=EXPERTS),
    "a dense layer first": UGLY.but(moe=EXPERTS, n_dense_layers=1),
    "dense layers only": UGLY.but(moe=EXPERTS, n_dense_layers=3),
    "shared": UGLY.but(moe=EXPERTS.but(**SHARED)),
    "shared, gated": UGLY.but(moe=EXPERTS.but(**SHARED, shared_gate=True), n_dense_layers=2),
    "own shared width": UGLY.but(moe=EXPERTS.but(n_shared_experts=1, d_ff_shared=13)),
    "relu, shared": UGLY.but(moe=EXPERTS.but(expert="relu", **SHARED)),
    "biases": UGLY.but(moe=EXPERTS.but(expert_bias=True, logit_bias=True)),
    "gelu, biases": UGLY.but(moe=EXPERTS.but(expert="gelu", expert_bias=True)),
    "gpt-oss": UGLY.but(moe=EXPERTS.but(expert="clamped_swiglu", expert_bias=True, logit_bias=True)),
    "deepseek-v3": UGLY.but(moe=EXPERTS.but(score="sigmoid", selection_bias=True, n_groups=3, groups_kept=2)),
    "noise": UGLY.but(moe=EXPERTS.but(noisy_top_k=True)),
    "capacity": UGLY.but(moe=EXPERTS.but(capacity_factor=1.0)),
    "top-1": UGLY.but(moe=EXPERTS.but(top_k=1)),
    "every second": UGLY.but(moe=EXPERTS, moe_every=2),
    "latent, every second after a dense one": UGLY.but(moe=EXPERTS, moe_every=2, n_dense_layers=1, mla=LATENT),
    "tied, all experts": UGLY.but(moe=EXPERTS.but(top_k=6), tied_embeddings=True, conv_width=3),
    "baseline": MOE_BASELINE,
}


def learned(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, and the selection biases, which are buffers."""
    return [*module.parameters(), *(b for name, b in module.named_buffers() if name.endswith("selection_bias"))]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = LM(config)
    counted = count_parameters(config)
    assert counted.total == sum(weight.numel() for weight in model.parameters())
    assert counted.ffn == sum(w.numel() for block in model.blocks for w in block.ffn.parameters())
    assert counted.norms == sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.RMSNorm))
    attentions = [block.attention for block in model.blocks]
    their_norms = sum(m.weight.numel() for a in attentions for m in a.modules() if isinstance(m, torch.nn.RMSNorm))
    assert counted.attention == sum(w.numel() for a in attentions for w in a.parameters()) - their_norms


@pytest.mark.parametrize(
    "config", [*MOE_CONFIGS.values(), *REAL_MOE_MODELS.values()], ids=[*MOE_CONFIGS, *REAL_MOE_MODELS]
)
def test_parameters_of_experts_are_those_of_the_model(config):
    with torch.device("meta"):
        model = LM(config)
    counted, active = count_parameters(config), count_parameters(config, active=True)
    layers = [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]

    def size(*modules: torch.nn.Module | None) -> int:
        return sum(w.numel() for module in modules if module is not None for w in learned(module))

    assert counted.total == size(model)
    assert counted.router == size(*(layer.router for layer in layers))
    assert counted.experts == size(*(layer.experts for layer in layers))
    assert counted.shared_experts == size(*(layer.shared for layer in layers))
    assert counted.ffn == size(*(block.ffn for block in model.blocks if not isinstance(block.ffn, MoE)))
    assert counted.norms == size(*(m for m in model.modules() if isinstance(m, torch.nn.RMSNorm)))
    assert counted.attention + counted.norms + counted.embedding + counted.head + counted.conv == counted.total - (
        counted.router + counted.experts + counted.shared_experts + counted.ffn
    )
    # active: top_k of the routed experts, everything else as it is
    moe = config.moe
    assert active.experts * moe.n_experts == counted.experts * moe.top_k
    differing = {part for part, number in counted.by_part().items() if number != active.by_part()[part]}
    assert differing <= {"experts"}


@pytest.mark.parametrize("config", MOE_CONFIGS.values(), ids=MOE_CONFIGS)
def test_one_layer_is_the_sum_of_its_parts(config):
    moe = config.moe
    layer = MoE(moe)
    assert moe_parameters(moe) == sum(w.numel() for w in learned(layer))
    assert expert_parameters(moe) == sum(w[0].numel() for w in layer.experts.parameters())
    assert router_parameters(moe) == sum(w.numel() for w in learned(layer.router))
    assert moe_parameters(moe) - moe_parameters(moe, active=True) == (moe.n_experts - moe.top_k) * expert_parameters(
        moe
    )
    shared = 0 if layer.shared is None else sum(w.numel() for w in layer.shared.parameters())
    assert shared_expert_parameters(moe) == shared


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_flops_are_those_that_torch_counts(config, tokens):
    config = config.but(attention_sinks=False)  # which cost a column of the scores, and are not counted
    with torch.device("meta"):
        model, ids = LM(config), torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert counter.get_total_flops() == count_flops(config, tokens, causal=False).total


# On a CPU torch counts no attention, and of the grouped products it counts "reference", one product after the other.
# The noise of a noisy top-k is for training; the count is one of inference.
@pytest.mark.parametrize("config", MOE_CONFIGS.values(), ids=MOE_CONFIGS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_flops_of_experts_are_those_that_torch_counts(config, tokens):
    if config.moe.capacity_factor:  # a token pays for its places, taken or not; the count assumes no capacity
        config = config.but(moe=config.moe.but(capacity_factor=None))
    model = LM(config).eval()
    for block in model.blocks:
        if isinstance(block.ffn, MoE):
            block.ffn.experts.impl = "reference"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    seen = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    counted = count_flops(config, tokens, causal=False)
    for part, module in (("router", "router"), ("experts", "experts"), ("shared_experts", "shared")):
        assert getattr(counted, part) == sum(n for name, n in seen.items() if name.endswith(f"ffn.{module}")), part
    not_seen = 0 if config.mla else counted.attention_scores  # values of another width go step by step, and are seen
    assert counted.total - not_seen == seen["Global"] == counter.get_total_flops()


def test_flops_of_experts_by_hand():
    config = UGLY.but(moe=EXPERTS.but(**SHARED, shared_gate=True), n_dense_layers=1)
    counted = count_flops(config, 4)
    per_token = {"router": 6 * 12, "experts": 2 * 3 * 12 * 5, "shared_experts": 3 * 12 * 10 + 12}
    assert {part: getattr(counted, part) for part in per_token} == {
        part: 4 * 2 * 2 * n for part, n in per_token.items()
    }
    assert counted.ffn == 4 * 2 * 3 * 12 * 7


def test_experts_cost_by_top_k_and_weigh_by_how_many_they_are():
    few, many = MOE_CONFIGS["experts"], UGLY.but(moe=EXPERTS.but(n_experts=60))
    assert count_flops(few, 9).experts == count_flops(many, 9).experts
    assert 10 * count_parameters(few).experts == count_parameters(many).experts
    assert count_parameters(few, active=True).experts == count_parameters(many, active=True).experts


def test_the_two_baselines_cost_the_same_in_their_ffn():
    dense, experts = count_flops(DENSE_BASELINE, 64), count_flops(MOE_BASELINE, 64)
    assert dense.ffn == experts.experts
    assert experts.ffn == 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_all_of_a_dense_model_is_active(config):
    assert count_parameters(config, active=True) == count_parameters(config)


def test_causal_attention_pays_for_the_pairs_it_sees():
    by_hand = sum(4 * (position + 1) for position in range(5)) * UGLY.n_layers * UGLY.n_heads * UGLY.d_head
    assert count_flops(UGLY, 5).attention_scores == by_hand


# FLOPs of one layer for 4,096 tokens, every pair counted: torch's counter over transformers' classes on meta.
@pytest.mark.parametrize(
    ("model", "layer", "tera"),
    [
        ("Llama-7B", 0, 1.9327),
        ("Llama 3 70B", 0, 7.5591),
        ("Llama 3.1 405B", 0, 27.2129),
        ("Mixtral 8x7B", 0, 3.5050),
        ("DeepSeek-V3", 0, 6.1542),
        ("DeepSeek-V3", 60, 6.1692),
    ],
)
def test_a_layer_costs_what_torch_counts(model, layer, tera):
    assert layer_flops(PRESETS[model].config, 4096, layer, causal=False).total / 1e12 == pytest.approx(tera, abs=5e-5)


def test_layers_and_head_make_the_model():
    config = UGLY.but(moe=EXPERTS, moe_every=2, conv_width=3)
    layers = [layer_flops(config, 7, layer).total for layer in range(3)]
    whole = count_flops(config, 7)
    assert whole.total == sum(layers) + whole.head + whole.conv
    assert layers[0] == layers[2] == layer_flops(config, 7).total != layers[1]
    with pytest.raises(ValueError, match="layer=3: expected -3 to 2"):
        layer_flops(config, 7, 3)


@pytest.mark.parametrize(("window", "tokens"), [(3, 2), (3, 3), (3, 7), (1, 5)])
def test_a_window_is_paid_for_as_far_as_it_is_seen(window, tokens):
    config = UGLY.but(window=window, full_every=3)
    seen = [[min(s + 1, window) for s in range(tokens)]] * 2 + [[s + 1 for s in range(tokens)]]
    by_hand = sum(map(sum, seen)) * 4 * config.n_heads * config.d_head
    assert count_flops(config, tokens).attention_scores == by_hand
    assert count_flops(config, tokens, causal=False).attention_scores == 3 * tokens**2 * 4 * 4 * 6
    assert cache_bytes(config, tokens) == (2 * min(tokens, window) + tokens) * 2 * 2 * 6 * 2


@pytest.mark.parametrize(("chunk", "tokens"), [(3, 2), (3, 3), (3, 4), (3, 9), (4, 19), (1, 5), (7, 1)])
def test_chunks_are_paid_for_as_far_as_they_are_seen(chunk, tokens):
    config = UGLY.but(window=chunk, full_every=3, chunked=True)
    both = [(here, there) for here in range(tokens) for there in range(here + 1)]
    near = [(here, there) for here, there in both if here // chunk == there // chunk]
    by_last = [sum(here == tokens - 1 for here, _ in pairs) for pairs in (near, near, both)]
    a_pair = 4 * config.n_heads * config.d_head
    assert count_flops(config, tokens).attention_scores == (2 * len(near) + len(both)) * a_pair
    assert count_flops(config, tokens, causal=False).attention_scores == 3 * tokens**2 * a_pair
    assert cache_bytes(config, tokens) == sum(by_last) * 2 * 2 * 6 * 2
    one_token = count_flops(config, 1)
    scores = decode_flops(config, tokens - 1) - one_token.total + one_token.attention_scores
    assert scores == sum(by_last) * a_pair


# Zhao et al. 2025, "Insights into DeepSeek-V3" (arXiv 2505.09343), table 2: GFLOPs of training per token at 4,096
# tokens, 250 for DeepSeek-V3 and 155 for DeepSeek-V2; table 1: the cache, 70.272, 327.680 and 516.096 kB per token.
# Its dense rows of table 2 (2,448 and 394) follow another convention, and are not met.
def test_published_costs_of_training_and_cache():
    cost = {name: training_flops_per_token(PRESETS[name].config, 4096) / 1e9 for name in ("DeepSeek-V3", "DeepSeek-V2")}
    assert (round(cost["DeepSeek-V3"], 1), round(cost["DeepSeek-V2"], 1)) == (250.5, 155.3)
    caches = {name: cache_bytes(PRESETS[name].config) for name in ("DeepSeek-V3", "Qwen2.5-72B", "Llama 3.1 405B")}
    assert list(caches.values()) == [70_272, 327_680, 516_096]


# gpt-oss (OpenAI 2025), model card, table 1: MLP 114.71B, attention 0.96B, embedding and unembedding 1.16B.
def test_published_components_of_gpt_oss():
    counted = count_parameters(PRESETS["gpt-oss-120b"].config)
    mlp = counted.experts + counted.router
    assert [round(n / 1e9, 2) for n in (mlp, counted.attention, counted.embedding + counted.head)] == [
        *(114.71, 0.96, 1.16),
    ]


# README_WEIGHTS.md of deepseek-ai/DeepSeek-V3: 11.5B unique parameters of the module, 2.4B active with embedding and
# head, both without the projection of two vectors into one.
def test_published_counts_of_the_prediction_module():
    config = PRESETS["DeepSeek-V3"].config
    whole, active = count_mtp(config), count_mtp(config, active=True)
    assert whole.total == 11_610_068_224
    assert round((whole.total - whole.projection) / 1e9, 1) == 11.5
    assert round((active.total - active.projection + 2 * 129_280 * 7168) / 1e9, 1) == 2.4
    with pytest.raises(ValueError, match="no layer has experts: expected a model with `moe`"):
        count_mtp(UGLY)


# Released files: DeepSeek-V3 with the fp32 scales of its fp8 blocks; gpt-oss 60.8 and 12.8 GiB (model card, table 1).
def test_published_sizes_of_checkpoints():
    assert fp8_checkpoint_bytes(PRESETS["DeepSeek-V3"].config) == 673_150_611_808
    sizes = [mxfp4_checkpoint_bytes(PRESETS[f"gpt-oss-{n}b"].config) / 2**30 for n in (120, 20)]
    assert [round(size, 1) for size in sizes] == [60.8, 12.8]


def test_an_fp8_checkpoint_by_hand():
    config = UGLY.but(moe=EXPERTS.but(d_ff=130, **SHARED, selection_bias=True, score="sigmoid"), n_dense_layers=1)
    per_attention = 12 * 24 * 2 + 12 * 12 * 2
    experts = 2 * 6 * 3 * 12 * 130
    numbers = 3 * per_attention + 3 * 12 * 7 + experts + 2 * 3 * 12 * 10
    scales = 3 * 4 + 3 + 2 * 6 * 3 * 2 + 2 * 3  # one block for each small matrix, two for 130 wide ones
    others = 2 * 11 * 12 + 7 * 12 + 2 * 6 * 12
    assert fp8_checkpoint_bytes(config) == numbers + 4 * (scales + 2 * 6) + 2 * others


def test_bytes_follow_the_format():
    total = count_parameters(UGLY).total
    assert [weight_bytes(UGLY, number) for number in ("fp32", "bf16", "fp8")] == [4 * total, 2 * total, total]
    assert weight_bytes(UGLY.but(vocab_size=32), "mxfp4") == 17 * count_parameters(UGLY.but(vocab_size=32)).total / 32
    assert training_bytes(UGLY).total == 16 * total
    moe = UGLY.but(moe=EXPERTS)
    assert weight_bytes(moe, active=True) == 2 * count_parameters(moe, active=True).total
    for call in (lambda: weight_bytes(UGLY, "int3"), lambda: cache_bytes(UGLY, number="int3")):
        with pytest.raises(ValueError, match="number='int3': expected one of fp32, bf16, fp8, mxfp4"):
            call()


def test_activations_by_hand():
    config = UGLY.but(moe=EXPERTS.but(**SHARED))
    found = activation_bytes(config, 10, "fp32")
    by_hand = {
        "hidden": 2 * 12,
        "attention": 4 * 6 + 2 * 2 * 6,
        "ffn_hidden": 0,
        "dispatched": 2 * 12,
        "expert_hidden": 3 * (2 * 5 + 10),
        "expert_outputs": 2 * 12,
    }
    assert found.by_part() == {name: 40 * numbers for name, numbers in by_hand.items()}
    latent = activation_bytes(config.but(mla=LATENT), 10, "fp32")
    assert latent.attention == 40 * (4 * 10 + 4 * 10 + 4 * 3)
    dense_first = config.but(n_dense_layers=1)
    assert activation_bytes(dense_first, 10, "fp32") == found
    dense = {"hidden": 2 * 12, "attention": 4 * 6 + 2 * 2 * 6, "ffn_hidden": 3 * 7}
    for layer in (activation_bytes(UGLY, 10, "fp32"), activation_bytes(dense_first, 10, "fp32", layer=0)):
        assert {name: n for name, n in layer.by_part().items() if n} == {k: 40 * n for k, n in dense.items()}
    for layer in (3, -4, 1.5):
        with pytest.raises(ValueError, match=f"layer={layer}: expected -3 to 2"):
            activation_bytes(UGLY, 10, layer=layer)


# Three layers of 48 + 24 + 21 numbers a token, of which two streams of 12 are the next layer's input; a table of 11.
def test_activations_of_a_whole_model_by_hand():
    one = 2 * 12 + (4 * 6 + 2 * 2 * 6) + 3 * 7
    kept = model_activation_bytes(UGLY, 10, "fp32")
    assert kept.by_part() == {"layers": 40 * (3 * one - 2 * 12), "layer_inputs": 0, "logits": 40 * 11}
    again = model_activation_bytes(UGLY, 10, "fp32", recompute=True)
    assert again.by_part() == {"layers": 40 * one, "layer_inputs": 40 * 2 * 12, "logits": 40 * 11}
    mixed = UGLY.but(moe=EXPERTS, n_dense_layers=1)
    expected = activation_bytes(mixed, 10, layer=1).total
    assert model_activation_bytes(mixed, 10, recompute=True).layers == expected


def test_a_recipe_of_training_by_hand():
    n = count_parameters(UGLY).total
    assert training_bytes(UGLY, gradients=4, moments=4).by_part() == {
        "weights": 2 * n,
        "gradients": 4 * n,
        "master_weights": 4 * n,
        "moments": 4 * n,
    }
    shared = training_bytes(UGLY, shards=7)
    assert (shared.weights, shared.master_weights, shared.moments) == (2 * n, 4 * -(-n // 7), 8 * -(-n // 7))
    assert training_bytes(UGLY, moments=0).total == 8 * n
    for name, wrong, least in (("shards", 0, 1), ("gradients", -1, 0), ("moments", 0.5, 0)):
        with pytest.raises(ValueError, match=f"^{name}={wrong}: expected {least} or more, a whole number"):
            training_bytes(UGLY, **{name: wrong})


def test_experts_touched_are_those_of_a_simulation():
    generator = random.Random(0)
    for n_experts, top_k, batch in ((6, 2, 1), (6, 2, 5), (64, 6, 16), (5, 5, 3)):
        draws = [len({e for _ in range(batch) for e in generator.sample(range(n_experts), top_k)}) for _ in range(4000)]
        spread = statistics.stdev(draws) / 4000**0.5
        assert abs(statistics.mean(draws) - distinct_experts(n_experts, top_k, batch)) <= 4 * spread + 1e-12
    assert distinct_experts(256, 8, 0) == 0
    with pytest.raises(ValueError, match=r"top_k=2\.5: expected 0 or more, a whole number"):
        distinct_experts(8, 2.5, 1)
    with pytest.raises(ValueError, match="n_experts=nan: expected 1 or more, a whole number"):
        distinct_experts(float("nan"), 2, 1)
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k={top_k}: expected 1 to n_experts=4"):
            distinct_experts(4, top_k, 1)


def test_a_decode_step_reads_what_is_active_and_then_more():
    config = UGLY.but(moe=EXPERTS.but(**SHARED), n_dense_layers=1)
    counted, active = count_parameters(config), count_parameters(config, active=True)
    assert decode_reads(config, 1) == pytest.approx(active.without_embedding)
    assert decode_reads(config, 10**6) == pytest.approx(counted.without_embedding)
    assert decode_reads(UGLY, 1) == decode_reads(UGLY, 77) == count_parameters(UGLY).without_embedding
    tied = UGLY.but(tied_embeddings=True)
    assert decode_reads(tied, 1) == count_parameters(tied).total


@pytest.mark.parametrize("name", ["ugly", "biases and sinks", "norm on heads"])
def test_a_decoded_token_costs_what_the_last_token_of_a_sequence_costs(name):
    config = CONFIGS[name]
    for context in (0, 1, 5):
        assert decode_flops(config, context) == count_flops(config, context + 1).total - (
            count_flops(config, context).total if context else 0
        )


# In the latent space a position costs each layer 2 · 128 · (512 + 64 + 512) FLOPs, in training's form 2 · 128 · 320.
def test_latent_attention_decodes_in_its_own_space():
    config = PRESETS["DeepSeek-V3"].config
    assert decode_flops(config, 100) - decode_flops(config, 99) == 61 * 278_528
    assert count_flops(config, 2).attention_scores - count_flops(config, 1).attention_scores == 61 * 2 * 81_920


def test_six_nd_counts_what_takes_part_in_products():
    assert six_nd(UGLY, 10) == 60 * (count_parameters(UGLY).total - 11 * 12)
    assert six_nd(UGLY.but(tied_embeddings=True), 10) == 60 * count_parameters(UGLY.but(tied_embeddings=True)).total


def test_an_encoder_decoder_by_hand():
    config = SwitchConfig(d_model=6, d_ff=5, n_heads=2, d_head=4, n_encoder_layers=2, n_decoder_layers=4, vocab_size=7)
    whole = count_parameters(config.but(n_experts=3))
    assert whole.by_part() == {
        "embedding": 42,
        "conv": 0,
        "attention": 4 * 6 * 8 * (2 + 2 * 4) + 2 * 32 * 2,
        "ffn": 3 * 2 * 6 * 5,
        "router": 3 * 18,
        "experts": 3 * 3 * 2 * 6 * 5,
        "shared_experts": 0,
        "norms": 6 * (4 + 12 + 2),
        "head": 0,
    }
    active = count_parameters(config.but(n_experts=3), active=True)
    assert whole.total - active.total == 3 * 2 * 2 * 6 * 5
    dense = count_parameters(config)
    assert (dense.experts, dense.router, dense.ffn) == (0, 0, 6 * 2 * 6 * 5)
    assert count_parameters(config.but(tied_embeddings=False)).without_embedding == dense.total
    with pytest.raises(ValueError, match="n_heads=0"):
        config.but(n_heads=0)


def test_numbers_as_text():
    shown = {
        1234567: "1,234,567",
        9999.4: "9,999",
        9999.7: "10,000",
        12345.6: "12,346",
        0.123456: "0.1235",
        1500.4: "1,500",
    }
    assert {number: as_text(number) for number in shown} == shown


@pytest.mark.parametrize("wrong", [-1, 2.5, True, "3"])
def test_counts_that_cannot_be_are_refused_by_name(wrong):
    moe = UGLY.but(moe=EXPERTS)
    calls = {
        "tokens": [count_flops, layer_flops, cache_bytes, activation_bytes],
        "context": [decode_flops],
        "batch": [decode_reads, lambda _, n: distinct_experts(6, 2, n)],
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(ValueError, match=f"^{name}={wrong!r}: expected [01] or more, a whole number"):
                function(moe, wrong)
    with pytest.raises(ValueError, match=f"^batch={wrong!r}"):
        decode_reads(UGLY, wrong)


def test_a_model_with_an_encoder_is_refused_where_a_decoder_is_counted():
    config = PRESETS["Switch-Base-8"].config
    calls = [
        lambda: count_flops(config, 1),
        lambda: layer_flops(config, 1),
        lambda: decode_flops(config, 1),
        lambda: decode_reads(config, 1),
        lambda: cache_bytes(config),
        lambda: cache_numbers(config),
        lambda: activation_bytes(config, 1),
        lambda: count_mtp(config),
        lambda: fp8_checkpoint_bytes(config),
        lambda: mxfp4_checkpoint_bytes(config),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="config is a SwitchConfig: expected an LMConfig"):
            call()


def test_a_model_whose_layers_are_too_few_for_experts_has_none():
    few = UGLY.but(moe=EXPERTS, moe_every=4)
    assert activation_bytes(few, 1) == activation_bytes(UGLY, 1)
    with pytest.raises(ValueError, match="no layer has experts"):
        mxfp4_checkpoint_bytes(few)


# gpt-oss and Llama 4: half of the layers see 128 positions, three of four chunks of 8,192.
def test_caches_and_costs_of_models_with_windows():
    in_gb = {name: cache_bytes(PRESETS[name].config, 131_072) / 1e9 for name in ("gpt-oss-120b", "Llama 4 Scout")}
    assert {name: round(size, 2) for name, size in in_gb.items()} == {"gpt-oss-120b": 4.84, "Llama 4 Scout": 7.65}
    costs = [count_flops(PRESETS[f"gpt-oss-{n}b"].config, 4096).total / 4096 / 1e9 for n in (20, 120)]
    assert [round(cost, 2) for cost in costs] == [7.64, 10.90]


def test_an_odd_part_that_is_not_turned_is_no_matter():
    config = UGLY.but(mla=LATENT.but(d_nope=5))
    logits, _ = LM(config)(torch.tensor([[1, 2, 3]]))
    assert logits.shape == (1, 3, 11)
    assert config.d_head == 9


def test_parts_are_a_table():
    counted = count_parameters(UGLY.but(vocab_size=1000))
    lines = str(counted).splitlines()
    assert lines[0].split() == ["embedding", "12,000", f"{12_000 / counted.total:.2%}"]
    assert lines[-1].split() == ["total", f"{counted.total:,}"]
    assert not any("router" in line for line in lines)  # there is none
    assert counted._repr_html_().count("<tr>") == len(lines)


# multiple_of and ffn_dim_multiplier: params.json of the released models.
@pytest.mark.parametrize(
    ("d_model", "multiple_of", "multiplier", "width"),
    [(4096, 256, 1.0, 11_008), (8192, 4096, 1.3, 28_672), (16_384, 4096, 1.2, 53_248), (4096, 1024, 1.3, 14_336)],
    ids=["Llama-7B", "Llama 3 70B", "Llama 3.1 405B", "Llama 3 8B"],
)
def test_published_widths(d_model, multiple_of, multiplier, width):
    assert ffn_width(d_model, multiple_of, multiplier) == width


def test_shares_sum_to_one_and_follow_the_parts():
    counted = count_parameters(UGLY)
    assert sum(counted.share(part) for part in counted.by_part()) == pytest.approx(1)


@pytest.mark.parametrize("tokens", [0, -3])
def test_no_tokens_is_refused(tokens):
    with pytest.raises(ValueError, match=f"tokens={tokens}: expected 1 or more"):
        count_flops(UGLY, tokens)


def test_a_width_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="multiple_of=0"):
        ffn_width(8, 0)


def test_combinations_are_those_that_papers_count():
    def of(n_experts, top_k, **more):
        return combinations(MoEConfig(d_model=1, d_ff=1, n_experts=n_experts, top_k=top_k, **more))

    assert (of(16, 2), of(64, 8)) == (120, 4_426_165_368)  # Dai et al. 2024 (DeepSeekMoE), section 3.1
    # Muennighoff et al. 2024 (OLMoE), section 4.1.3: sharing an expert takes almost 90 % of the combinations
    assert (of(32, 4), of(31, 3, n_shared_experts=1)) == (35_960, 4_495)
    assert of(512, 10) == 512 * 511 * 510 * 509 * 508 * 507 * 506 * 505 * 504 * 503 // 3_628_800  # beyond a float


@pytest.mark.parametrize(("n_experts", "n_groups", "groups_kept", "top_k"), [(6, 3, 2, 2), (8, 4, 2, 3), (9, 3, 1, 3)])
def test_combinations_in_groups_are_those_one_can_list(n_experts, n_groups, groups_kept, top_k):
    router = RouterConfig(d_model=1, n_experts=n_experts, top_k=top_k, n_groups=n_groups, groups_kept=groups_kept)
    size = n_experts // n_groups
    chosen = itertools.combinations(range(n_experts), top_k)
    assert combinations(router) == sum(len({e // size for e in choice}) <= groups_kept for choice in chosen)
    assert combinations(router.but(groups_kept=n_groups)) == combinations(router.but(n_groups=1, groups_kept=1))


@pytest.mark.parametrize(("m", "n_shared"), [(1, 0), (1, 1), (2, 0), (3, 1), (6, 5)])
@pytest.mark.parametrize("more", [{}, {"expert": "relu", "score": "sigmoid"}], ids=["swiglu", "relu"])
def test_cutting_keeps_total_and_active_parameters(m, n_shared, more):
    whole = MoEConfig(d_model=7, d_ff=12, n_experts=5, top_k=2, **more)
    cut = whole.but(**cut_finer(whole, m, n_shared))
    assert cut.d_ff * m == whole.d_ff
    for active in (False, True):
        without_router = [moe_parameters(moe, active=active) - router_parameters(moe) for moe in (whole, cut)]
        assert without_router[0] == without_router[1]
    assert router_parameters(cut) == (5 * m - n_shared) * 7


def test_what_cannot_be_cut_is_refused():
    whole = MoEConfig(d_model=7, d_ff=12, n_experts=5, top_k=2)
    for m in (0, 5):
        with pytest.raises(ValueError, match=f"m={m}: expected a divisor of d_ff=12"):
            cut_finer(whole, m)
    with pytest.raises(ValueError, match="n_shared=4: expected 0 to 3"):
        cut_finer(whole, 2, 4)
    with pytest.raises(ValueError, match="n_shared_experts=1: expected 0"):
        cut_finer(whole.but(n_shared_experts=1), 2)
