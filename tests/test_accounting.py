import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_lab.accounting import (
    combinations,
    count_flops,
    count_parameters,
    cut_finer,
    expert_parameters,
    ffn_parameters,
    ffn_width,
    moe_parameters,
    router_parameters,
    shared_expert_parameters,
)
from moe_lab.config import LMConfig, MoEConfig, RouterConfig
from moe_lab.lm import LM
from moe_lab.moe import MoE
from moe_lab.presets import DENSE_BASELINE, LLAMA_3_70B, LLAMA_7B, MOE_BASELINE, REAL_MOE_MODELS

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
    "tied, all experts": UGLY.but(moe=EXPERTS.but(top_k=6), tied_embeddings=True, conv_width=3),
    "baseline": MOE_BASELINE,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = LM(config)
    counted = count_parameters(config)
    assert counted.total == sum(weight.numel() for weight in model.parameters())
    assert counted.ffn == sum(w.numel() for block in model.blocks for w in block.ffn.parameters())
    in_attention = [module for block in model.blocks for module in block.attention.modules()]
    assert counted.attention == sum(m.weight.numel() for m in in_attention if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize(
    "config", [*MOE_CONFIGS.values(), *REAL_MOE_MODELS.values()], ids=[*MOE_CONFIGS, *REAL_MOE_MODELS]
)
def test_parameters_of_experts_are_those_of_the_model(config):
    with torch.device("meta"):
        model = LM(config)
    counted, active = count_parameters(config), count_parameters(config, active=True)
    layers = [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]

    def size(*modules: torch.nn.Module | None) -> int:
        return sum(w.numel() for module in modules if module is not None for w in module.parameters())

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
    assert moe_parameters(moe) == sum(w.numel() for w in layer.parameters())
    assert expert_parameters(moe) == sum(w[0].numel() for w in layer.experts.parameters())
    assert router_parameters(moe) == sum(w.numel() for w in layer.router.parameters())
    assert moe_parameters(moe) - moe_parameters(moe, active=True) == (moe.n_experts - moe.top_k) * expert_parameters(
        moe
    )
    shared = 0 if layer.shared is None else sum(w.numel() for w in layer.shared.parameters())
    assert shared_expert_parameters(moe) == shared


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_flops_are_those_that_torch_counts(config, tokens):
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
    assert counted.total - counted.attention_scores == seen["Global"] == counter.get_total_flops()


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


# Totals: the tensors of the released checkpoints, summed; the same from transformers' classes on the meta device.
@pytest.mark.parametrize(
    ("config", "total", "ffn", "attention"),
    [
        (LLAMA_7B, 6_738_415_616, 4_328_521_728, 2_147_483_648),
        (LLAMA_3_70B, 70_553_706_496, 56_371_445_760, 12_079_595_520),
    ],
    ids=["Llama-7B", "Llama 3 70B"],
)
def test_published_counts(config, total, ffn, attention):
    counted = count_parameters(config)
    assert (counted.total, counted.ffn, counted.attention) == (total, ffn, attention)
    assert ffn_parameters(config) * config.n_layers == ffn


# Totals: the tensors of the released checkpoints, summed; the same from transformers' classes on meta. Active:
# the total without the experts that a token does not visit; embedding and head are in it. Both round to what is stated:
# - Mixtral 8x7B: 47B in all, 13B active: Jiang et al. 2024 (arXiv 2401.04088), abstract.
# - Mixtral 8x22B: 141B in all, 39B active: Mistral AI, "Cheaper, Better, Faster, Stronger", 17 April 2024.
# - OLMoE-1B-7B: 6.9B in all, 1.3B active: Muennighoff et al. 2024 (arXiv 2409.02060).
# - Qwen3-30B-A3B: 30.5B in all, 3.3B active: the model card of Qwen/Qwen3-30B-A3B, where 3.35B was cut, not rounded.
@pytest.mark.parametrize(
    ("model", "total", "active", "experts", "one_expert"),
    [
        ("Mixtral 8x7B", 46_702_792_704, 12_879_925_248, 45_097_156_608, 176_160_768),
        ("Mixtral 8x22B", 140_620_634_112, 39_152_031_744, 135_291_469_824, 301_989_888),
        ("OLMoE-1B-7B", 6_919_161_856, 1_282_017_280, 6_442_450_944, 6_291_456),
        ("Qwen3-30B-A3B", 30_532_122_624, 3_353_032_704, 28_991_029_248, 4_718_592),
    ],
)
def test_published_counts_of_models_with_experts(model, total, active, experts, one_expert):
    config = REAL_MOE_MODELS[model]
    counted = count_parameters(config)
    assert counted.total == total
    assert count_parameters(config, active=True).total == active
    assert counted.experts == experts
    assert expert_parameters(config.moe) == one_expert


def test_every_real_model_with_experts_is_held_to_its_published_counts():
    assert set(REAL_MOE_MODELS) == {"Mixtral 8x7B", "Mixtral 8x22B", "OLMoE-1B-7B", "Qwen3-30B-A3B"}


# 3.5050 TFLOP for 4096 tokens with full attention: torch's counter over transformers' class on the meta device.
def test_a_layer_of_mixtral_costs_what_torch_counts():
    config = REAL_MOE_MODELS["Mixtral 8x7B"]
    counted = count_flops(config, 4096, causal=False)
    per_layer = (counted.total - counted.head) / config.n_layers
    assert per_layer == pytest.approx(3.5050e12, rel=2e-5)


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
