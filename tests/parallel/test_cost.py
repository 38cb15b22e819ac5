"""The cost model against closed forms, what can be listed, and published figures with their sources."""

import itertools
from dataclasses import replace

import pytest
import torch

from moe_lab.accounting import count_flops, count_parameters, moe_parameters
from moe_lab.config import MoEConfig, RouterConfig
from moe_lab.parallel.cost import (
    CLUSTERS,
    DEEPSEEK_V3,
    FORMS,
    GB200_NVL72,
    H800_INFINIBAND,
    Cluster,
    Copies,
    Layout,
    Link,
    Travel,
    all_gather_bytes,
    all_gather_seconds,
    all_reduce_bytes,
    all_reduce_seconds,
    all_to_all_bytes,
    all_to_all_seconds,
    cluster_all_reduce_seconds,
    cluster_all_to_all_seconds,
    exchange_seconds,
    expected_copies,
    expected_distinct,
    expected_nodes,
    layer_time,
    limit_nodes,
    model_of,
    row_bytes,
    step_time,
    strong_scaling,
    traffic,
    weak_scaling,
)
from moe_lab.presets import LLAMA_7B, MOE_BASELINE, REAL_MOE_MODELS
from moe_lab.routing import route

SLOW = Link(latency=2.0, bytes_per_second=5.0)
TOY = Cluster(
    name="toy",
    ranks_per_node=3,
    within=Link(latency=0.5, bytes_per_second=20.0),
    across=SLOW,
    flops_per_second=1000.0,
)
V3 = DEEPSEEK_V3.moe
V3_FLAT = V3.but(n_groups=1, groups_kept=1, group_score="max")
V3_FP8 = Travel(form="across_then_within", dispatch="fp8")


def router(n_experts: int, top_k: int, n_groups: int = 1, groups_kept: int = 1) -> RouterConfig:
    return RouterConfig(d_model=1, n_experts=n_experts, top_k=top_k, n_groups=n_groups, groups_kept=groups_kept)


# --- Collectives -------------------------------------------------------------------------------------------------


def test_a_message_takes_a_latency_and_its_bytes():
    assert SLOW.seconds(30) == 2 + 6
    assert SLOW.seconds(0) == 0


@pytest.mark.parametrize("n_ranks", [1, 2, 5, 64])
def test_collectives_send_what_their_rings_send(n_ranks):
    """Counted step by step: in each of n - 1 steps a rank passes on one part of n."""
    steps = sum(10.0 / n_ranks for _ in range(n_ranks - 1))
    assert all_gather_bytes(10, n_ranks) == all_to_all_bytes(10, n_ranks) == pytest.approx(steps)
    assert all_reduce_bytes(10, n_ranks) == pytest.approx(2 * steps)
    assert all_gather_seconds(SLOW, 10, n_ranks) == pytest.approx(2 * (n_ranks - 1) + steps / 5)
    assert all_reduce_seconds(SLOW, 10, n_ranks) == pytest.approx(4 * (n_ranks - 1) + 2 * steps / 5)
    assert all_to_all_seconds(SLOW, 10, n_ranks, in_flight=1) == pytest.approx(2 * (n_ranks - 1) + steps / 5)
    assert all_to_all_seconds(SLOW, 10, n_ranks) == pytest.approx((2 if n_ranks > 1 else 0) + steps / 5)


def test_messages_in_flight_share_their_latency():
    assert all_to_all_seconds(SLOW, 0, 8, in_flight=3) == 3 * 2


def test_64_ranks_send_what_is_said_of_them():
    # 2 (n - 1)/n and (n - 1)/n: Thakur, Rabenseifner and Gropp 2005, sections 4.3 and 4.5
    assert all_reduce_bytes(1, 64) == pytest.approx(1.969, abs=5e-4)
    assert all_to_all_bytes(1, 64) == pytest.approx(0.984, abs=5e-4)


def test_collectives_that_know_the_nodes():
    # 6 ranks, 2 nodes of 3: a reduce-scatter and an all-gather within, and a ring of 2 across for a third
    within, across = 2 * 2 * (0.5 + 4 / 20), 2 * (2 + 2 / 5)
    assert cluster_all_reduce_seconds(TOY, 12, 6) == pytest.approx(within + across)
    assert cluster_all_reduce_seconds(TOY, 12, 2) == pytest.approx(all_reduce_seconds(TOY.within, 12, 2))
    assert cluster_all_reduce_seconds(TOY, 12, 1) == 0
    # parts of 2: two go within (0.5 + 4/20), three go across
    assert cluster_all_to_all_seconds(TOY, 12, 6) == pytest.approx(2 + 6 / 5)
    assert cluster_all_to_all_seconds(TOY, 12, 3) == pytest.approx(0.5 + 8 / 20)


def test_an_all_to_all_carries_half_of_an_all_reduce_and_takes_longer_over_nodes():
    """What is summed within a node crosses once a node. What is for somebody crosses for everybody."""
    buffer = 1e9
    assert 2 * all_to_all_bytes(buffer, 64) == all_reduce_bytes(buffer, 64)
    one, two = cluster_all_to_all_seconds, cluster_all_reduce_seconds
    assert one(H800_INFINIBAND, buffer, 64) > two(H800_INFINIBAND, buffer, 64)
    assert one(H800_INFINIBAND, buffer, 8) < two(H800_INFINIBAND, buffer, 8)


# --- What a token sends ------------------------------------------------------------------------------------------

SIZES = {  # d_model, top_k, layers with experts; the released configurations of models that are no preset
    "DeepSeek-MoE-16B": (2048, 6, 27),
    "DeepSeek-V2-Lite": (2048, 6, 26),
    "DeepSeek-V2": (5120, 6, 59),
    "Kimi-K2": (7168, 8, 60),
    "Qwen3-235B-A22B": (4096, 8, 94),
    "gpt-oss-20b": (2880, 4, 24),
    "gpt-oss-120b": (2880, 4, 36),
    "Llama-4-Scout": (5120, 1, 48),
    "Llama-4-Maverick": (5120, 1, 24),
}


def sizes(model: str) -> tuple[int, int, int]:
    if model in REAL_MOE_MODELS:
        config = REAL_MOE_MODELS[model]
        return config.d_model, config.moe.top_k, config.n_moe_layers
    if model == DEEPSEEK_V3.name:
        return V3.d_model, V3.top_k, DEEPSEEK_V3.n_moe_layers
    return SIZES[model]


# A row for every choice, as the first all-to-alls sent it (Lepikhin et al. 2020, GShard, section 3.2): k copies of
# d_model values. Bytes of one layer's dispatch in bf16 and in fp8 (without scales), of its combine in bf16; megabytes
# of all layers, forward, in bf16 and with an fp8 dispatch. Worked out from the released configurations; exact.
@pytest.mark.parametrize(
    ("model", "bf16", "fp8", "all_bf16", "all_fp8"),
    [
        ("Mixtral 8x7B", 16_384, 8_192, 1.05, 0.79),
        ("Mixtral 8x22B", 24_576, 12_288, 2.75, 2.06),
        ("DeepSeek-MoE-16B", 24_576, 12_288, 1.33, 1.00),
        ("DeepSeek-V2-Lite", 24_576, 12_288, 1.28, 0.96),
        ("DeepSeek-V2", 61_440, 30_720, 7.25, 5.44),
        ("DeepSeek-V3", 114_688, 57_344, 13.30, 9.98),
        ("Kimi-K2", 114_688, 57_344, 13.76, 10.32),
        ("Qwen3-30B-A3B", 32_768, 16_384, 3.15, 2.36),
        ("Qwen3-235B-A22B", 65_536, 32_768, 12.32, 9.24),
        ("OLMoE-1B-7B", 32_768, 16_384, 1.05, 0.79),
        ("gpt-oss-20b", 23_040, 11_520, 1.11, 0.83),
        ("gpt-oss-120b", 23_040, 11_520, 1.66, 1.24),
        ("Llama-4-Scout", 10_240, 5_120, 0.98, 0.74),
        ("Llama-4-Maverick", 10_240, 5_120, 0.49, 0.37),
    ],
)
def test_bytes_of_a_token_in_a_layer_of_real_models(model, bf16, fp8, all_bf16, all_fp8):
    d_model, top_k, layers = sizes(model)
    plain, small = (top_k * row_bytes(d_model, number, scales=False) for number in ("bf16", "fp8"))
    assert (plain, small) == (bf16, fp8)
    assert round(layers * (plain + plain) / 1e6, 2) == all_bf16
    assert round(layers * (small + plain) / 1e6, 2) == all_fp8


# DeepSeek-V3 (2024, arXiv 2412.19437): 8 experts, at most 4 nodes (section 3.2.2), fp8 with a scale for 128 values
# (section 3.3.2), combine in bf16 (section 3.3.2).
@pytest.mark.parametrize(
    ("copies", "bf16", "fp8", "scales", "both", "all_layers"),
    [(8, 114_688, 57_344, 1_792, 172_032, 9.98), (4, 57_344, 28_672, 896, 86_016, 4.99)],
)
def test_bytes_of_a_token_in_deepseek_v3(copies, bf16, fp8, scales, both, all_layers):
    assert row_bytes(7168) == 14_336
    assert (row_bytes(7168, "fp8", scales=False), row_bytes(7168, "fp8")) == (7_168, 7_168 + 224)
    assert copies * row_bytes(7168) == bf16
    assert copies * row_bytes(7168, "fp8", scales=False) == fp8
    assert copies * row_bytes(7168, "fp8") == fp8 + scales
    assert fp8 + bf16 == both
    assert round(58 * both / 1e6, 2) == all_layers


def test_a_last_block_that_is_not_full_has_a_scale_too():
    assert row_bytes(129, "fp8") == 129 + 2 * 4
    assert row_bytes(129, "fp32") == 4 * 129


def test_published_numbers_of_distinct_nodes_and_ranks():
    # hypergeometric, 256 experts, top-8, to the last digit shown: 8 nodes 5.295, 64 ranks 7.676
    assert expected_distinct(V3_FLAT, 8) == pytest.approx(5.295, abs=5e-4)
    assert expected_distinct(V3_FLAT, 64) == pytest.approx(7.676, abs=5e-4)
    # against that, a limit of 4 nodes saves 24.5 %, against 8 copies 50 %; 1 of 8 times a node is the token's own
    assert 1 - expected_nodes(V3, 8) / expected_distinct(V3_FLAT, 8) == pytest.approx(0.245, abs=5e-4)
    assert expected_copies(V3, 8, 8, "across_then_within").across == 3.5


@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_groups", "kept"),
    [(6, 2, 1, 1), (8, 3, 4, 2), (8, 1, 4, 3), (12, 4, 6, 2), (8, 8, 1, 1), (9, 3, 3, 1)],
)
def test_distinct_parts_are_those_one_can_list(n_experts, top_k, n_groups, kept):
    """Every group choice, and in it every choice of experts, counted."""
    one, size = router(n_experts, top_k, n_groups, kept), n_experts // n_groups
    choices = [
        choice
        for groups in itertools.combinations(range(n_groups), kept)
        for choice in itertools.combinations([e for e in range(n_experts) if e // size in groups], top_k)
    ]
    for n_parts in (n for n in range(1, n_experts + 1) if n_experts % n == 0):
        share = n_experts // n_parts
        if share % size and size % share:
            continue
        listed = sum(len({e // share for e in choice}) for choice in choices) / len(choices)
        assert expected_distinct(one, n_parts) == pytest.approx(listed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n_nodes", "in_node"), [(2, 3), (3, 2), (1, 4), (6, 1)])
def test_copies_are_those_one_can_list(form, n_nodes, in_node):
    """Every choice of 3 of 12 experts, and every rank that the token may be on: who is sent a row, and from where."""
    share, within, across = 12 // (n_nodes * in_node), 0, 0
    cases = [*itertools.product(itertools.combinations(range(12), 3), range(n_nodes * in_node))]
    for choice, home in cases:
        owners = [e // share for e in choice]
        if form == "across_then_within":
            for node in {owner // in_node for owner in owners}:
                lands = node * in_node + home % in_node
                across += node != home // in_node
                within += len({owner for owner in owners if owner // in_node == node} - {lands})
            continue
        for owner in owners if form == "per_assignment" else set(owners):
            across += owner // in_node != home // in_node
            within += owner // in_node == home // in_node and owner != home
    copies = expected_copies(router(12, 3), n_nodes, in_node, form)
    assert copies.within == pytest.approx(within / len(cases))
    assert copies.across == pytest.approx(across / len(cases))
    assert copies.total == copies.within + copies.across


def distinct(experts: torch.Tensor, n_parts: int, n_experts: int = 256) -> float:
    """The mean number of parts that the rows' experts lie in."""
    return torch.zeros(len(experts), n_parts).scatter(1, experts // (n_experts // n_parts), 1.0).sum(1).mean().item()


def test_random_choices_are_as_the_closed_forms_say():
    scores = torch.rand(4000, 256, generator=torch.Generator().manual_seed(0))
    experts = scores.topk(8).indices
    for n_parts in (2, 8, 64, 256):  # four standard errors, which for 8 nodes is 0.06
        assert distinct(experts, n_parts) == pytest.approx(expected_distinct(V3_FLAT, n_parts), abs=0.06)
    groups = torch.rand(4000, 8, generator=torch.Generator().manual_seed(1)).topk(4).indices  # drawn blindly
    kept = torch.zeros(4000, 8).scatter(1, groups, 1.0).repeat_interleave(32, 1)
    experts = (scores * kept).topk(8).indices
    for n_parts in (2, 4, 8, 64):
        assert distinct(experts, n_parts) == pytest.approx(expected_distinct(V3, n_parts), abs=0.06)


def test_a_router_that_keeps_the_best_groups_leaves_hardly_one_empty():
    """Why `expected_nodes` takes all kept nodes: DeepSeek-V3's rule on random scores."""
    logits = torch.rand(4000, 256, generator=torch.Generator().manual_seed(2))
    visited = distinct(route(logits, V3, torch.zeros(256)).topk_experts, 8)
    assert visited == pytest.approx(3.95, abs=0.03)
    assert expected_distinct(V3, 8) < 3.65 < visited <= expected_nodes(V3, 8) == 4


def test_a_limit_makes_nodes_of_groups():
    limited = limit_nodes(V3_FLAT, 16, 4)
    assert (limited.n_groups, limited.groups_kept) == (16, 4)
    assert expected_nodes(limited, 16) == 4
    assert limit_nodes(V3_FLAT, 2, 4).groups_kept == 2
    assert expected_nodes(limit_nodes(V3_FLAT, 4, 4), 4) == expected_distinct(V3_FLAT, 4)  # no limit at all
    copies = Travel(form="across_then_within", node_limit=4).copies(H800_INFINIBAND, V3_FLAT, 64)
    assert copies.across == 3.5


# --- DeepSeek-V3's figures ---------------------------------------------------------------------------------------


def test_a_micro_batch_of_deepseek_v3_exchanges_as_long_as_it_computes():
    """4,096 tokens: 352 MB over InfiniBand if all 4 copies leave the node, 7.05 ms at 50 GB/s; 5.48 TFLOP.

    DeepSeek-V3 (2024), section 3.2.1: about 1:1. No report says what a layer's products reach; 800 TFLOP/s is an
    assumption that gives 6.85 ms. The rate that whole steps show (see H800_INFINIBAND) gives 12.6 ms and 1.8:1.
    """
    sent = 4 * (row_bytes(7168, "fp8", scales=False) + row_bytes(7168)) * 4096
    assert sent == pytest.approx(352e6, rel=2e-3)
    dispatch, combine = (
        exchange_seconds(H800_INFINIBAND, Copies(within=0, across=4), row_bytes(7168, number, scales=False), 4096)
        for number in ("fp8", "bf16")
    )
    assert dispatch + combine == pytest.approx(7.05e-3, rel=2e-3)

    # one layer with experts: attention (187,105,280 parameters, and its scores), router, shared and routed experts
    attention = 2 * 187_105_280 + 2 * 128 * (192 + 128) * 4097 / 2
    other = attention + 2 * (256 + 3 * 2048) * 7168
    fast = replace(H800_INFINIBAND, flops_per_second=800e12)
    layer = layer_time(fast, V3, 64, 4096, V3_FP8, other_flops=other)
    assert layer.compute * 800e12 == pytest.approx(5.482156654592e12, rel=1e-9)
    assert layer.compute == pytest.approx(6.85e-3, rel=2e-3)
    assert layer.compute / (dispatch + combine) == pytest.approx(1, rel=0.05)
    # with scales, and a token's own node left out, the exchange is 12 % shorter: still about 1:1
    assert layer.exchange == pytest.approx(6.23e-3, rel=2e-3)
    slow = layer_time(H800_INFINIBAND, V3, 64, 4096, V3_FP8, other_flops=other)
    assert slow.compute == pytest.approx(12.6e-3, rel=5e-3)
    assert slow.compute / (dispatch + combine) == pytest.approx(1.8, rel=0.02)


def test_nvlink_forwards_what_infiniband_brings():
    # DeepSeek-V3 (2024), section 3.2.2: 160 GB/s is 3.2 times 50 GB/s; 4 nodes times 3.2 experts are 13 experts
    ratio = H800_INFINIBAND.within.bytes_per_second / H800_INFINIBAND.across.bytes_per_second
    assert ratio == pytest.approx(3.2)
    assert 4 * ratio == pytest.approx(12.8)
    assert round(4 * ratio) == 13

    def seconds(within: float) -> float:
        return exchange_seconds(H800_INFINIBAND, Copies(within=within, across=4), row_bytes(7168), 4096)

    assert seconds(8) == seconds(12.7) == seconds(0) < seconds(13)


def test_the_bound_of_decoding():
    """Zhao et al. 2025 (arXiv 2505.09343), section 2.3.2: 3 bytes · 32 tokens · 9 experts · 7K values, two exchanges in
    turn (two micro-batches) in each of 61 layers; latencies left out."""

    def seconds(link: Link) -> float:
        return replace(link, latency=0.0).seconds(3 * 32 * 9 * 7000)

    assert seconds(H800_INFINIBAND.across) == pytest.approx(120.96e-6, rel=1e-6)
    assert 61 * 2 * seconds(H800_INFINIBAND.across) == pytest.approx(14.76e-3, abs=5e-6)
    assert seconds(GB200_NVL72.within) == pytest.approx(6.72e-6, rel=1e-6)
    assert 61 * 2 * seconds(GB200_NVL72.within) == pytest.approx(0.82e-3, abs=5e-6)


def test_a_training_step_of_deepseek_v3():
    """15,360 sequences of 4,096 tokens on 2,048 GPUs, 16 stages, experts over 64 ranks (DeepSeek-V3, 3.2 and 4.2).

    Measured (Zhao et al. 2025, tables 2 and 4): 250 GFLOP a token, 19.926 s a step, of which 2.06 s bubbles, 385
    TFLOP/s. The rate while computing was worked out from these, so what is tested is that everything else fits: the
    exchanges hide, and the bubble is that of 16 stages. DualPipe's bubble is smaller than the plain one of the model,
    and the optimizer's 0.29 s are not in it.
    """
    assert DEEPSEEK_V3.other_parameters + DEEPSEEK_V3.expert_parameters == 671_026_419_200
    assert 3 * DEEPSEEK_V3.flops == pytest.approx(250e9, rel=3e-3)
    tokens, layout = 15_360 * 4096, Layout(n_ranks=2048, ep=64, pp=16)
    step = step_time(H800_INFINIBAND, DEEPSEEK_V3, layout, tokens, V3_FP8, overlap=True)
    assert step.total == pytest.approx(19.926, rel=0.02)
    assert step.bubble == pytest.approx(2.06, rel=0.10)
    assert step.dispatch == step.combine == 0
    assert 3 * DEEPSEEK_V3.flops * tokens / 2048 / step.total == pytest.approx(385e12, rel=0.02)
    waiting = step_time(H800_INFINIBAND, DEEPSEEK_V3, layout, tokens, V3_FP8)
    assert waiting.total / step.total == pytest.approx(1.30, abs=0.01)


# --- DeepEP's measurements ---------------------------------------------------------------------------------------
# deepseek-ai/DeepEP, docs/legacy.md, "Performance": H800, NVLink ~160 GB/s, InfiniBand 400 Gb/s (~50 GB/s).


# "Normal kernels": 4,096 tokens, 7,168 values, top-8, at most 4 groups (nodes), fp8 dispatch, bf16 combine.
# Their bandwidth is logical (tests/legacy/test_internode.py): rows for every node that a token visits, its own with
# them, over the time; in one node, rows for every rank. The model lets own rows travel free and links reach their
# rate. It expects 12 to 19 % more than was measured, and 30 % more over 2 nodes: there InfiniBand carries half of
# what it does elsewhere, so that NVLink is the narrow part, and forwarding does not reach its rate.
@pytest.mark.parametrize(
    ("n_nodes", "dispatch", "combine", "too_fast"),
    [(1, 153, 158, 1.17), (2, 43, 43, 1.30), (4, 58, 57, 1.16), (8, 51, 50, 1.13)],
)
def test_deepep_with_many_tokens(n_nodes, dispatch, combine, too_fast):
    one = limit_nodes(V3_FLAT, n_nodes, 4)
    visited = expected_nodes(one, n_nodes) if n_nodes > 1 else expected_distinct(one, 8)
    copies = expected_copies(one, n_nodes, 8, "across_then_within")
    for number, measured in (("fp8", dispatch), ("bf16", combine)):
        n_bytes = row_bytes(7168, number)
        seconds = exchange_seconds(H800_INFINIBAND, copies, n_bytes, 4096)
        assert visited * n_bytes * 4096 / seconds / 1e9 / measured == pytest.approx(too_fast, abs=0.025)


# "Low-latency kernels": 128 tokens, a row for every choice, which in fp8 has 16 bytes more (test_low_latency.py). The
# bandwidth is logical again. What the model misses is not a share but 30 to 50 microseconds of a dispatch and 30 to
# 90 of a combine: starting kernels, writing and polling flags, waiting for the last rank. A wire's 3.7 are few of them.
@pytest.mark.parametrize(
    ("n_ranks", "dispatch", "combine", "dispatch_bandwidth", "combine_bandwidth"),
    [
        (8, 77, 114, 98, 127),
        (16, 118, 195, 63, 74),
        (32, 155, 273, 48, 53),
        (64, 173, 314, 43, 46),
        (128, 192, 369, 39, 39),
        (256, 194, 360, 39, 40),
    ],
)
def test_deepep_with_few_tokens(n_ranks, dispatch, combine, dispatch_bandwidth, combine_bandwidth):
    copies = Travel(form="per_assignment").copies(H800_INFINIBAND, V3_FLAT, n_ranks)
    fp8, bf16 = row_bytes(7168, "fp8") + 16, row_bytes(7168)
    assert 128 * 8 * fp8 / dispatch / 1e3 == pytest.approx(dispatch_bandwidth, rel=0.03)
    assert 128 * 8 * bf16 / combine / 1e3 == pytest.approx(combine_bandwidth, rel=0.03)
    missing = dispatch - 1e6 * exchange_seconds(H800_INFINIBAND, copies, fp8, 128)
    assert 30 <= missing <= 50
    missing = combine - 1e6 * exchange_seconds(H800_INFINIBAND, copies, bf16, 128)
    assert 30 <= missing <= 91


# --- Times -------------------------------------------------------------------------------------------------------

LAYER = MoEConfig(d_model=10, d_ff=7, n_experts=12, top_k=3, n_shared_experts=1)


def test_a_layer_by_hand():
    layer = layer_time(TOY, LAYER, 6, 5, Travel(combine="fp32"))
    copies = expected_copies(LAYER, 2, 3)
    assert layer.experts == pytest.approx(5 * 3 * 2 * 210 / 1000)
    assert layer.other == pytest.approx(5 * 2 * (120 + 210) / 1000)
    assert layer.dispatch == pytest.approx(2 + copies.across * 20 * 5 / 5)
    assert layer.combine == pytest.approx(2 + copies.across * 40 * 5 / 5)
    assert layer.total == layer.compute + layer.exchange == pytest.approx(sum(layer.by_part().values()))
    assert sum(layer.share(part) for part in layer.by_part()) == pytest.approx(1)
    assert layer.compute == pytest.approx(5 * 2 * moe_parameters(LAYER, active=True) / 1000)


def test_overlap_hides_the_shorter_one():
    layer = layer_time(TOY, LAYER, 6, 5)
    assert layer.exchange > layer.compute
    assert layer.overlapped().total == pytest.approx(layer.exchange)
    assert layer.overlapped().compute == layer.compute
    busy = layer_time(TOY, LAYER, 6, 5, other_flops=1e6)
    assert busy.overlapped().total == pytest.approx(busy.compute)
    assert busy.overlapped().exchange == 0
    alone = layer_time(TOY, LAYER, 1, 5)
    assert alone.exchange == 0
    assert alone.overlapped() == alone


def test_all_wait_for_the_fullest_rank():
    even, uneven = layer_time(TOY, LAYER, 6, 5), layer_time(TOY, LAYER, 6, 5, fullest=1.5)
    assert uneven.other == even.other
    for part in ("dispatch", "experts", "combine"):
        assert getattr(uneven, part) == pytest.approx(1.5 * getattr(even, part))


def test_every_step_towards_deepseek_v3s_exchange_saves():
    travels = [
        Travel(form="per_assignment"),
        Travel(),
        Travel(form="across_then_within"),
        Travel(form="across_then_within", node_limit=4),
        Travel(form="across_then_within", node_limit=4, dispatch="fp8"),
    ]
    seconds = [layer_time(H800_INFINIBAND, V3_FLAT, 64, 4096, travel).exchange for travel in travels]
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) == 5


def test_beyond_a_node_the_limit_keeps_an_exchange_from_growing():
    limited = Travel(form="across_then_within", node_limit=4)
    free = Travel(form="across_then_within")
    ranks = [32, 64, 128, 256]
    with_limit = [limited.copies(H800_INFINIBAND, V3_FLAT, n).across for n in ranks]
    without = [free.copies(H800_INFINIBAND, V3_FLAT, n).across for n in ranks]
    assert with_limit[1:] == [3.5, 3.75, 3.875]
    assert without == sorted(without)
    assert without[-1] > 7


# --- A training step ---------------------------------------------------------------------------------------------

QWEN = model_of("Qwen3-30B-A3B", REAL_MOE_MODELS["Qwen3-30B-A3B"])


@pytest.mark.parametrize("name", REAL_MOE_MODELS)
def test_a_model_is_as_it_is_counted(name):
    config = REAL_MOE_MODELS[name]
    model = model_of(name, config, 100)
    assert model.other_parameters + model.expert_parameters == count_parameters(config).total
    assert 100 * model.flops == pytest.approx(count_flops(config, 100).total)


def test_traffic_by_hand():
    model = model_of("baseline", MOE_BASELINE, 64)  # 2 layers, 64 wide, 2 of 8 experts
    activations = 100 * 64 * 2

    alone = traffic(TOY, model, Layout(n_ranks=1), 100)
    assert alone.total == 0

    copies = traffic(TOY, model, Layout(n_ranks=2), 100, gradients="fp32")
    assert copies.total == copies.dp == all_reduce_bytes(4 * count_parameters(MOE_BASELINE).total, 2)

    cut = traffic(TOY, model, Layout(n_ranks=2, tp=2), 100)
    assert cut.total == cut.tp == 2 * 4 * all_reduce_bytes(activations, 2)

    stages = traffic(TOY, model, Layout(n_ranks=2, pp=2), 100)
    assert stages.total == stages.pp == (activations + activations) / 2  # one stage sends on, the other back

    spread = traffic(TOY, model, Layout(n_ranks=2, ep=2), 200)
    rows = expected_copies(MOE_BASELINE.moe, 1, 2).within
    assert spread.ep == pytest.approx(2 * 2 * 2 * rows * activations)
    assert spread.dp == all_reduce_bytes(2 * model.other_parameters, 2)

    both = traffic(TOY, model, Layout(n_ranks=6, ep=2, pp=1), 600)
    assert both.ep == pytest.approx(spread.ep)
    assert both.dp == pytest.approx(
        all_reduce_bytes(2 * model.other_parameters, 6) + all_reduce_bytes(model.expert_parameters, 3)
    )


def test_expert_parallelism_is_not_what_carries_most():
    """8 GPUs, 8,192 tokens each: of the ways to share a model, TP and DP send more."""
    ways = {"dp": Layout(n_ranks=8), **{way: Layout(n_ranks=8, **{way: 8}) for way in ("tp", "ep", "pp")}}
    sent = {way: traffic(H800_INFINIBAND, QWEN, layout, 8 * 8192).total for way, layout in ways.items()}
    assert sorted(sent, key=sent.get) == ["pp", "ep", "tp", "dp"]


def test_a_step_is_its_layers_and_its_gradients():
    layout = Layout(n_ranks=64, ep=64)
    step = step_time(H800_INFINIBAND, QWEN, layout, 64 * 8192, V3_FP8)
    layer = layer_time(H800_INFINIBAND, QWEN.moe, 64, 4096, V3_FP8)
    assert step.compute == pytest.approx(3 * QWEN.flops * 8192 / H800_INFINIBAND.flops_per_second)
    assert step.dispatch == pytest.approx(48 * 2 * 2 * layer.dispatch)
    assert step.combine == pytest.approx(48 * 2 * 2 * layer.combine)
    assert step.gradients == pytest.approx(cluster_all_reduce_seconds(H800_INFINIBAND, 2 * QWEN.other_parameters, 64))
    assert step.tensor == step.pipeline == step.bubble == 0


def test_stages_and_cuts_share_the_work():
    tokens = 64 * 8192
    plain = step_time(H800_INFINIBAND, QWEN, Layout(n_ranks=64), tokens)
    cut = step_time(H800_INFINIBAND, QWEN, Layout(n_ranks=64, tp=8), tokens)
    stages = step_time(H800_INFINIBAND, QWEN, Layout(n_ranks=64, pp=8), tokens)
    assert plain.compute == pytest.approx(cut.compute) == pytest.approx(stages.compute)
    assert plain.tensor == 0 < cut.tensor
    # 64 * 8192 tokens, 8 copies, micro-batches of 4096: 16 of them, so the bubble is 7/16 of the work
    assert stages.bubble == pytest.approx(7 / 16 * (stages.compute + stages.pipeline))


def test_weak_scaling_is_flat_and_strong_scaling_is_not():
    layouts = [Layout(n_ranks=n, ep=64) for n in (64, 512, 4096)]
    weak = weak_scaling(H800_INFINIBAND, QWEN, layouts, 8192, V3_FP8)
    assert list(weak) == [64, 512, 4096]
    for part in ("compute", "dispatch", "combine"):
        assert len({round(getattr(step, part), 9) for step in weak.values()}) == 1
    strong = strong_scaling(H800_INFINIBAND, QWEN, layouts, 4096 * 8192, V3_FP8)
    assert strong[4096] == weak[4096]
    assert strong[64].compute == pytest.approx(64 * strong[4096].compute)
    shares = [step.share("gradients") for step in strong.values()]
    assert shares == sorted(shares)
    assert 64 * strong[4096].total > 1.05 * strong[64].total


# --- Errors ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"bytes_per_second=0: expected"):
        Link(latency=0, bytes_per_second=0)
    with pytest.raises(ValueError, match="ranks_per_node=0"):
        replace(TOY, ranks_per_node=0)
    with pytest.raises(ValueError, match="n_ranks=4: expected at most ranks_per_node=3"):
        TOY.nodes(4)
    with pytest.raises(ValueError, match=r"number='int4': expected one of fp32, bf16, fp8"):
        row_bytes(8, "int4")
    with pytest.raises(ValueError, match="n_parts=5: expected a divisor of n_experts=8"):
        expected_distinct(router(8, 2), 5)
    with pytest.raises(ValueError, match="n_parts=4: expected parts that do not cut n_groups=6"):
        expected_distinct(router(12, 2, 6, 2), 4)
    with pytest.raises(ValueError, match=r"form='flat': expected one of per_assignment"):
        expected_copies(router(8, 2), 2, 2, "flat")
    with pytest.raises(ValueError, match="Llama: expected a configuration with experts"):
        model_of("Llama", LLAMA_7B)
    with pytest.raises(ValueError, match=r"n_ranks=8, ep=3.*expected tp \* pp to divide"):
        Layout(n_ranks=8, ep=3)
    with pytest.raises(ValueError, match=r"tp=2, ep=2: expected one of them to be 1"):
        Layout(n_ranks=8, ep=2, tp=2)
    with pytest.raises(ValueError, match="tokens=100: expected at least micro_batch=4096"):
        step_time(H800_INFINIBAND, QWEN, Layout(n_ranks=8), 100)


def test_clusters_go_by_their_names():
    assert all(CLUSTERS[cluster.name] is cluster for cluster in CLUSTERS.values())
    assert H800_INFINIBAND.nodes(64) == (8, 8)
    assert H800_INFINIBAND.nodes(6) == (1, 6)
