"""Balance, held against slow Python, against transformers, and against what other code bases compute."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers import modeling_switch_transformers

from moe_lab.balance import (
    CONVENTIONS,
    churn,
    dead_experts,
    domain_information,
    dropped_share,
    load,
    load_entropy,
    max_violation,
    sequence_loss,
    shares,
    shuffle_within,
    switch_loss,
    update_bias,
    z_loss,
)
from moe_lab.config import DROP_RULES, RouterConfig
from moe_lab.dispatch import make_plan
from moe_lab.records import Routing
from moe_lab.routing import best_k, expert_choice, route

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def routing_of(logits: Tensor, k: int = 1, score: str = "softmax", bias: Tensor | None = None) -> Routing:
    return route(logits, RouterConfig(d_model=1, n_experts=logits.shape[1], top_k=k, score=score), bias)


def random_routing(n_tokens: int, n_experts: int, k: int, seed: int = 0, score: str = "softmax") -> Routing:
    """A lopsided one: expert 0 is favoured, and the last is left alone."""
    torch.manual_seed(seed)
    tilt = torch.linspace(1.5, -1.5, n_experts)
    return routing_of(torch.randn(n_tokens, n_experts) + tilt, k, score)


def with_scores(scores: list[list[float]]) -> Routing:
    """Top-1 of given probabilities."""
    scores = torch.tensor(scores)
    best, experts = scores.max(-1, keepdim=True)
    return Routing(router_logits=scores.log(), router_scores=scores, topk_weights=best, topk_experts=experts)


def rows_of(routing: Routing, rows: Tensor | slice) -> Routing:
    return Routing(
        router_logits=routing.router_logits[rows],
        router_scores=routing.router_scores[rows],
        topk_weights=routing.topk_weights[rows],
        topk_experts=routing.topk_experts[rows],
    )


@st.composite
def routings(draw, least_tokens=1, most_tokens=9, score=None):
    n_experts = draw(st.integers(1, 6))
    logits = torch.randn(draw(st.integers(least_tokens, most_tokens)), n_experts, generator=seeded(draw))
    kind = score or draw(st.sampled_from(["softmax", "sigmoid"]))
    return routing_of(draw(st.sampled_from([0.1, 1.0, 5.0])) * logits, draw(st.integers(1, n_experts)), kind)


def seeded(draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 10_000)))


# --- the formulas, slowly -----------------------------------------------------------------------------------------


def slow_shares(routing: Routing) -> tuple[list[float], list[float]]:
    """f and P by counting, in Python."""
    n_tokens, top_k = routing.topk_experts.shape
    f, p = [0.0] * routing.n_experts, [0.0] * routing.n_experts
    for chosen, scores in zip(routing.topk_experts.tolist(), routing.router_scores.tolist(), strict=True):
        for expert in chosen:
            f[expert] += 1 / (n_tokens * top_k)
        for expert, s in enumerate(scores):
            p[expert] += s / sum(scores) / n_tokens
    return f, p


def slow_loss(routing: Routing) -> float:
    f, p = slow_shares(routing)
    return routing.n_experts * sum(a * b for a, b in zip(f, p, strict=True))


@PROPERTY
@given(routings())
def test_shares_and_losses_are_those_of_slow_python(routing):
    for ours, slow in zip(shares(routing), slow_shares(routing), strict=True):
        assert_close(ours, torch.tensor(slow), **TOLERANCE)
        assert ours.sum().item() == pytest.approx(1, abs=1e-5)
    assert switch_loss(routing).item() == pytest.approx(slow_loss(routing), rel=1e-4)
    squares = [math.log(sum(map(math.exp, row))) ** 2 for row in routing.router_logits.tolist()]
    assert z_loss(routing).item() == pytest.approx(sum(squares) / len(squares), rel=1e-4)


def test_switch_loss_by_hand():
    # four tokens, two of three experts each: n = 4, 3, 1, so f = 1/2, 3/8, 1/8; P = .5, .3, .2
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.5, 0.3, 0.2], [0.4, 0.2, 0.4]])
    chosen = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 2]])
    routing = Routing(scores.log(), scores, scores.gather(1, chosen), chosen)
    f, p = shares(routing)
    assert f.tolist() == [0.5, 0.375, 0.125]
    assert_close(p, torch.tensor([0.5, 0.3, 0.2]))
    assert switch_loss(routing).item() == pytest.approx(3 * (0.25 + 0.1125 + 0.025))


def test_near_alpha_is_no_proof_of_balance():
    everything_to_one = with_scores([[0.501, 0.499]] * 3)
    assert switch_loss(everything_to_one).item() == pytest.approx(1.002, abs=1e-6)
    assert max_violation(everything_to_one.tokens_per_expert) == 1


def test_alpha_is_not_the_minimum():
    # two thirds of the tokens barely prefer expert 0, the rest is sure of expert 1: f and P disagree
    routing = with_scores([[0.501, 0.499], [0.501, 0.499], [0.0, 1.0]])
    assert switch_loss(routing).item() == pytest.approx(0.889, abs=5e-4)
    assert max_violation(routing.tokens_per_expert).item() == pytest.approx(1 / 3)


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_it_is_one_when_all_loads_are_equal_or_all_probabilities(n_experts, rounds, data):
    k = data.draw(st.integers(1, n_experts))
    logits = torch.randn(rounds * n_experts, n_experts, generator=seeded(data.draw))
    tokens = torch.arange(rounds * n_experts)[:, None]
    in_turn = (tokens + torch.arange(k)) % n_experts  # every expert chosen equally often, whatever the scores say
    scores = logits.softmax(-1)
    assert switch_loss(Routing(logits, scores, scores.gather(1, in_turn), in_turn)).item() == pytest.approx(1, abs=1e-5)
    uniform = routing_of(torch.zeros(5, n_experts), k)  # all probabilities equal, and all tokens with the first k
    assert switch_loss(uniform).item() == pytest.approx(1, abs=1e-5)


@PROPERTY
@given(routings())
def test_it_lies_between_zero_and_the_number_of_experts(routing):
    assert -1e-6 <= switch_loss(routing).item() <= routing.n_experts + 1e-4


def test_z_loss_falls_with_the_logits_and_balances_nothing():
    collapsed = routing_of(torch.tensor([[0.3, 0.0, 0.0]] * 4))
    balanced = routing_of(10 * torch.eye(3)[torch.arange(4) % 3])
    assert z_loss(collapsed) < z_loss(balanced)
    # ST-MoE (Zoph et al. 2022), equation 5: logits that are all -log E cost nothing, however the tokens are spread
    assert z_loss(routing_of(torch.full((4, 3), -math.log(3)))).item() == pytest.approx(0, abs=1e-10)


# --- transformers, and the conversion between conventions ----------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_of_one_layer_mixtrals_loss_is_k_times_ours(k):
    routing = random_routing(23, 6, k)
    theirs = load_balancing_loss_func((routing.router_logits,), 6, k)
    assert_close(theirs, k * switch_loss(routing), **TOLERANCE)
    assert_close(theirs, CONVENTIONS["transformers"].loss([routing], 1), **TOLERANCE)


def test_of_several_layers_it_is_k_times_ours_of_the_pooled_tokens_and_not_of_each():
    layers = [random_routing(12, 5, 2, seed) for seed in range(3)]
    theirs = load_balancing_loss_func(tuple(routing.router_logits for routing in layers), 5, 2)
    assert_close(theirs, CONVENTIONS["transformers"].loss(layers, 1), **TOLERANCE)
    pooled = routing_of(torch.cat([routing.router_logits for routing in layers]), 2)
    assert_close(theirs, 2 * switch_loss(pooled), **TOLERANCE)


def test_pooled_layers_hide_that_each_has_collapsed():
    # every layer sends all tokens to an expert of its own: pooled, all experts are equally busy
    layers = [routing_of(20 * torch.eye(4)[[layer] * 6]) for layer in range(4)]
    assert [switch_loss(routing).item() for routing in layers] == [pytest.approx(4)] * 4
    theirs = load_balancing_loss_func(tuple(routing.router_logits for routing in layers), 4, 1)
    assert theirs.item() == pytest.approx(1)
    assert CONVENTIONS["transformers"].loss(layers, 1).item() == pytest.approx(1)


def test_a_uniform_router_at_k_2_costs_2_there_and_1_here():
    routing = routing_of(torch.zeros(8, 4), 2)
    assert load_balancing_loss_func((routing.router_logits,), 4, 2).item() == pytest.approx(2)
    assert switch_loss(routing).item() == pytest.approx(1)


@pytest.mark.parametrize("k", [1, 3])
def test_with_padding_mixtrals_loss_is_k_times_ours_with_the_mask(k):
    routing = random_routing(24, 6, k)
    attention_mask = torch.ones(4, 6)
    attention_mask[1, 2:], attention_mask[3, 1:] = 0, 0
    theirs = load_balancing_loss_func((routing.router_logits,), 6, k, attention_mask)
    assert_close(theirs, k * switch_loss(routing, attention_mask.bool().flatten()), **TOLERANCE)
    assert not torch.allclose(theirs, k * switch_loss(routing), rtol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradients_are_mixtrals_too(masked):
    attention_mask = torch.ones(4, 6)
    attention_mask[2, 4:] = 0
    logits = [torch.randn(24, 5).requires_grad_() for _ in range(2)]
    theirs = load_balancing_loss_func((logits[0],), 5, 2, attention_mask if masked else None)
    ours = 2 * switch_loss(routing_of(logits[0], 2), attention_mask.bool().flatten() if masked else None)
    assert_close(*torch.autograd.grad(ours, logits[0]), *torch.autograd.grad(theirs, logits[0]))
    theirs = load_balancing_loss_func(tuple(logits), 5, 2)
    ours = CONVENTIONS["transformers"].loss([routing_of(layer, 2) for layer in logits], 4)
    for got, expected in zip(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True):
        assert_close(got, expected)


def test_switch_transformers_loss_is_ours_sequence_by_sequence():
    routing = random_routing(5 * 7, 6, 1)
    theirs = modeling_switch_transformers.load_balancing_loss_func(
        routing.router_scores.view(5, 7, 6), routing.topk_experts.view(5, 7)
    )
    assert_close(theirs, sequence_loss(routing, 5), **TOLERANCE)
    assert not torch.allclose(theirs, switch_loss(routing), rtol=1e-3)


def test_switch_transformers_z_loss_is_ours():
    logits = 3 * torch.randn(5 * 7, 6)
    ours, theirs = logits.clone().requires_grad_(), logits.view(5, 7, 6).clone().requires_grad_()
    z, expected = z_loss(routing_of(ours)), modeling_switch_transformers.router_z_loss_func(theirs)
    assert_close(z, expected)
    z.backward()
    expected.backward()
    assert_close(ours.grad, theirs.grad.flatten(0, 1))


# --- what each code base computes, written out once more, as its source has it -------------------------------------


def one_hot(chosen: Tensor, n_experts: int) -> Tensor:
    """(T, K) to (T, E), 1 where an expert was chosen."""
    return F.one_hot(chosen, n_experts).sum(1)


def megatron(layers: Sequence[Routing], _: int) -> float:
    """moe_utils.py, switch_load_balancing_loss_func: sums over tokens, scaled once by E / (k T²)."""
    total = 0.0
    for routing in layers:
        n_tokens, k = routing.topk_experts.shape
        tokens_per_expert = one_hot(routing.topk_experts, routing.n_experts).sum(0)
        total += (routing.router_scores.sum(0) * tokens_per_expert).sum() * routing.n_experts / (k * n_tokens**2)
    return total


def deepspeed(layers: Sequence[Routing], _: int) -> float:
    """sharded_moe.py, top2gating (and lingvo's gshard_layers.py): mean of me · ce over the experts, times E²."""
    total = 0.0
    for routing in layers:
        me = routing.router_scores.mean(0)
        ce = F.one_hot(routing.router_scores.argmax(-1), routing.n_experts).float().mean(0)
        total += (me * ce).mean() * routing.n_experts**2
    return total


def megablocks(layers: Sequence[Routing], _: int) -> float:
    """moe.py, batched_load_balancing_loss: all layers' experts in one long dot product, over L T k."""
    n_tokens, k = layers[0].topk_experts.shape
    scores = torch.cat([routing.router_scores for routing in layers], dim=1).mean(0)
    counts = torch.cat([one_hot(routing.topk_experts, routing.n_experts).sum(0) for routing in layers])
    return layers[0].n_experts / (len(layers) * n_tokens * k) * torch.dot(counts.float(), scores)


def pooled(layers: Sequence[Routing], _: int) -> float:
    """modeling_mixtral.py, load_balancing_loss_func."""
    k = layers[0].topk_experts.shape[1]
    return load_balancing_loss_func(tuple(routing.router_logits for routing in layers), layers[0].n_experts, k)


def deepseek(layers: Sequence[Routing], n_sequences: int) -> float:
    """DeepSeek-V3, equations 17 to 20, of every sequence; then the mean over the batch."""
    total = 0.0
    for routing in layers:
        n_tokens, k = routing.topk_experts.shape
        length = n_tokens // n_sequences
        for b, i in product(range(n_sequences), range(routing.n_experts)):
            tokens = range(b * length, (b + 1) * length)
            f = sum(i in routing.topk_experts[t] for t in tokens) * routing.n_experts / (k * length)
            p = sum(routing.router_scores[t, i] / routing.router_scores[t].sum() for t in tokens) / length
            total += f * p / n_sequences
    return total


SLOW: dict[str, Callable] = {
    "Switch, Megatron-LM": megatron,
    "GShard, DeepSpeed": deepspeed,
    "MegaBlocks": megablocks,
    "transformers": pooled,
    "DeepSeek-V3": deepseek,
}


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(("n_layers", "k", "n_sequences"), [(1, 1, 1), (1, 2, 3), (3, 1, 2), (2, 3, 6)])
def test_every_convention_is_what_its_source_computes(name, n_layers, k, n_sequences):
    layers = [random_routing(12, 5, k, seed) for seed in range(n_layers)]
    ours = CONVENTIONS[name].loss(layers, n_sequences)
    assert ours.shape == ()
    assert ours.item() == pytest.approx(float(SLOW[name](layers, n_sequences)), rel=1e-5)


def test_the_table_has_nothing_that_is_not_held_here():
    assert SLOW.keys() == CONVENTIONS.keys()
    assert all(convention.differs and convention.source for convention in CONVENTIONS.values())
    source = CONVENTIONS["transformers"].source.split(",")[0]
    assert (Path(transformers.__file__).parent.parent / source).is_file()


def test_all_agree_on_one_layer_one_choice_and_one_sequence():
    layer = random_routing(12, 5, 1)
    values = [convention.loss([layer], 1).item() for convention in CONVENTIONS.values()]
    assert values == [pytest.approx(values[0], rel=1e-5)] * len(values)


def test_and_on_nothing_else():
    layers = [random_routing(12, 5, 2, seed) for seed in range(2)]
    values = sorted(convention.loss(layers, 3).item() for convention in CONVENTIONS.values())
    assert all(b - a > 1e-3 for a, b in pairwise(values))


def test_what_each_says_of_a_uniform_router():
    # exact balance, two layers, two choices: by this a coefficient is carried from one code base to another
    def expected(name: str) -> float:
        return {"MegaBlocks": 1.0, "transformers": 2.0}.get(name, 2.0)  # mean over layers; k; sum over two layers

    in_turn = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], 1)
    flat = torch.full((8, 4), 0.25)
    layer = Routing(flat.log(), flat, flat[:, :2], in_turn)
    for name, convention in CONVENTIONS.items():
        assert convention.loss([layer, layer], 2).item() == pytest.approx(expected(name)), name


def test_gshards_printed_algorithm_is_smaller_by_the_square_of_the_experts():
    # Lepikhin et al. 2020, algorithm 1, lines 1 to 13: 1/E Σ c_e/S m_e. Their code and DeepSpeed's multiply by E².
    layer = random_routing(12, 5, 2)
    c, m = [0] * 5, layer.router_scores.mean(0).tolist()
    for e1, _ in layer.topk_experts.tolist():
        c[e1] += 1
    printed = sum(c_e / 12 * m_e for c_e, m_e in zip(c, m, strict=True)) / 5
    assert CONVENTIONS["GShard, DeepSpeed"].loss([layer], 1).item() == pytest.approx(25 * printed, rel=1e-5)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_with_more_than_two_choices_deepspeeds_loss_is_ours(k):
    # deepspeed/moe/sharded_moe.py, topkgating: mean of me · ce over the experts, times E² / k, ce of all choices
    layer = random_routing(12, 5, k)
    me, ce = layer.router_scores.mean(0), one_hot(layer.topk_experts, 5).float().mean(0)
    assert_close((me * ce).mean() * 5 * 5 / k, switch_loss(layer), **TOLERANCE)


def test_with_a_selection_bias_f_counts_what_was_chosen():
    # DeepSeek-V3, equation 18, counts the best of the scores without the bias, and so does Megatron-LM
    # (compute_routing_scores_for_aux_loss); here f is the load there really is.
    logits, bias = torch.randn(12, 5), torch.tensor([2.0, 0.0, 0.0, 0.0, -2.0])
    biased, plain = (routing_of(logits, 2, "sigmoid", b) for b in (bias, torch.zeros(5)))
    assert_close(shares(biased)[0], biased.tokens_per_expert / 24)
    assert_close(shares(biased)[1], shares(plain)[1])
    assert sequence_loss(biased, 3).item() == pytest.approx(float(deepseek([biased], 3)), rel=1e-5)
    assert not torch.allclose(sequence_loss(biased, 3), sequence_loss(plain, 3), rtol=1e-2)


def test_the_sigmoid_scores_of_deepseek_v3_are_divided_by_their_sum():
    layer = random_routing(12, 5, 2, score="sigmoid")
    assert CONVENTIONS["DeepSeek-V3"].loss([layer], 4).item() == pytest.approx(float(deepseek([layer], 4)), rel=1e-5)
    by_megatron = layer.router_scores / layer.router_scores.sum(-1, keepdim=True)
    assert_close(shares(layer)[1], by_megatron.mean(0))


# --- gradients ----------------------------------------------------------------------------------------------------


def test_no_gradient_flows_through_f():
    logits = torch.randn(9, 4).requires_grad_()
    f, p = shares(routing_of(logits, 2))
    assert not f.requires_grad
    assert p.requires_grad
    loss = switch_loss(routing_of(logits, 2))
    (got,) = torch.autograd.grad(loss, logits)
    written_out = 4 * (f.detach() * logits.softmax(-1).mean(0)).sum()
    assert_close(got, *torch.autograd.grad(written_out, logits))


def test_the_gradient_of_the_switch_loss_by_hand():
    # dL/dz_tj = E/T · p_tj (f_j - Σ_i f_i p_ti): down for an expert that is busier than the token's own average
    logits = torch.randn(7, 4).requires_grad_()
    routing = routing_of(logits, 2)
    (got,) = torch.autograd.grad(switch_loss(routing), logits)
    f, p = shares(routing)[0], logits.detach().softmax(-1)
    assert_close(got, 4 / 7 * p * (f - (p * f).sum(-1, keepdim=True)))


def test_the_gradient_of_the_z_loss_by_hand():
    logits = torch.randn(7, 4).requires_grad_()
    (got,) = torch.autograd.grad(z_loss(routing_of(logits)), logits)
    z, p = logits.detach().logsumexp(-1, keepdim=True), logits.detach().softmax(-1)
    assert_close(got, 2 / 7 * z * p)


LOSSES = {
    "switch": switch_loss,
    "global batch": lambda routing, mask=None: switch_loss(routing, mask, torch.tensor([7, 1, 3])),
    "sequence": lambda routing, mask=None: sequence_loss(routing, 2, mask),
    "z": z_loss,
}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name, score, monkeypatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # fp32 is too coarse for finite differences
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    mask = torch.tensor([True, True, False, True, False, False])
    for given_mask in (None, mask):
        assert torch.autograd.gradcheck(lambda z, m=given_mask: LOSSES[name](routing_of(z, 2, score), m), logits)


@pytest.mark.parametrize("name", ["switch", "sequence"])
def test_following_the_gradient_spreads_the_load(name):
    logits = torch.randn(60, 6, generator=torch.Generator().manual_seed(0)) + torch.linspace(2, -2, 6)
    before = max_violation(routing_of(logits, 2).tokens_per_expert)
    for _ in range(200):
        logits = logits.detach().requires_grad_()
        loss = LOSSES[name](routing_of(logits, 2))
        logits = logits - 5 * torch.autograd.grad(loss, logits)[0]
    assert before > 0.9
    assert max_violation(routing_of(logits, 2).tokens_per_expert) < 0.3


# --- padding ------------------------------------------------------------------------------------------------------


@PROPERTY
@given(routings(), st.data())
def test_padding_counts_for_nothing(routing, data):
    n_tokens = len(routing.topk_experts)
    kept = data.draw(st.lists(st.booleans(), min_size=n_tokens, max_size=n_tokens).filter(any))
    mask = torch.tensor(kept)
    without = rows_of(routing, mask)
    for ours, expected in zip(shares(routing, mask), shares(without), strict=True):
        assert_close(ours, expected, **TOLERANCE)
    assert_close(switch_loss(routing, mask), switch_loss(without), **TOLERANCE)
    assert_close(z_loss(routing, mask), z_loss(without), **TOLERANCE)
    assert_close(switch_loss(routing, torch.ones_like(mask)), switch_loss(routing), **TOLERANCE)


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_every_sequence_counts_once_however_much_of_it_is_padding(n_sequences, length, data):
    routing = routing_of(torch.randn(n_sequences * length, 4, generator=seeded(data.draw)), 2)
    lengths = data.draw(st.lists(st.integers(0, length), min_size=n_sequences, max_size=n_sequences).filter(any))
    mask = torch.cat([torch.arange(length) < n for n in lengths])
    begins = [b * length for b in range(n_sequences)]
    each = [switch_loss(rows_of(routing, slice(b, b + n))) for b, n in zip(begins, lengths, strict=True) if n]
    assert_close(sequence_loss(routing, n_sequences, mask), torch.stack(each).mean(), **TOLERANCE)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_gets_no_gradient(name):
    logits = torch.randn(6, 3).requires_grad_()
    mask = torch.tensor([True, False, True, False, False, False])
    LOSSES[name](routing_of(logits, 2), mask).backward()
    assert not logits.grad[~mask].any()
    assert logits.grad[mask].abs().sum() > 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(6, dtype=torch.bool), r"mask is False for all 6 tokens: expected at least one .* no.* padding"),
        (torch.ones(5, dtype=torch.bool), r"mask has shape \(5,\) of torch\.bool: expected \(6,\) of torch\.bool"),
        (torch.ones(0, dtype=torch.bool), r"mask has shape \(0,\) of torch\.bool: expected \(6,\)"),
        (torch.ones(2, 3, dtype=torch.bool), r"mask has shape \(2, 3\) of torch\.bool: expected \(6,\)"),
        (torch.ones(6), r"mask has shape \(6,\) of torch\.float32: expected \(6,\) of torch\.bool, True for tokens"),
        (torch.ones(6, dtype=torch.int64), r"mask has shape \(6,\) of torch\.int64: expected"),
        (torch.arange(6), r"of torch\.int64: expected"),  # indices in place of a mask
    ],
    ids=["all padding", "too short", "empty", "2-D", "float", "int", "indices"],
)
def test_a_mask_that_cannot_be_is_refused(name, mask, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name](random_routing(6, 3, 2), mask)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mask", [None, torch.ones(0, dtype=torch.bool)], ids=["no mask", "empty mask"])
def test_a_routing_of_no_tokens_is_refused(name, mask):
    with pytest.raises(ValueError, match="The routing is of no tokens: there is nothing to balance"):
        LOSSES[name](routing_of(torch.zeros(0, 3), 2), mask)


# Nothing on the meta device can be read, so what works there never waits for a GPU.
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_neither_the_losses_nor_the_bias_need_a_host_sync(name, masked):
    with torch.device("meta"):
        logits, chosen = torch.empty(6, 3, requires_grad=True), torch.empty(6, 2, dtype=torch.int64)
        mask = torch.empty(6, dtype=torch.bool) if masked else None
        loads = torch.empty(3, dtype=torch.int64)
    routing = Routing(logits, logits.softmax(-1), logits[:, :2], chosen)
    loss = switch_loss(routing, mask, loads) if name == "global batch" else LOSSES[name](routing, mask)
    loss.backward()
    assert loss.shape == ()
    assert update_bias(torch.empty(3, device="meta"), routing.tokens_per_expert, 0.1, recentre=True).shape == (3,)


# --- micro-batches, sequences, sigmoids ---------------------------------------------------------------------------


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from(["softmax", "sigmoid"]), st.data())
def test_accumulated_over_micro_batches_the_losses_are_those_of_the_whole(n_parts, length, score, data):
    logits = torch.randn(n_parts * length, 4, generator=seeded(data.draw)).requires_grad_()
    whole = routing_of(logits, 2, score)
    parts = [rows_of(whole, slice(b * length, (b + 1) * length)) for b in range(n_parts)]
    counts = sum(part.tokens_per_expert for part in parts)
    assert torch.equal(counts, whole.tokens_per_expert)
    pairs = {
        "global batch": (lambda part: switch_loss(part, tokens_per_expert=counts), switch_loss(whole)),
        "sequence": (lambda part: sequence_loss(part, 1), sequence_loss(whole, n_parts)),
        "z": (z_loss, z_loss(whole)),
    }
    for name, (loss, expected) in pairs.items():
        mean = torch.stack([loss(part) for part in parts]).mean()
        assert_close(mean, expected, **TOLERANCE, msg=name)
        gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (mean, expected)]
        assert_close(*gradients, **TOLERANCE, msg=name)


def test_without_the_loads_of_all_the_mean_of_the_parts_is_another_loss():
    # each part is sure of one expert; together the two are balanced
    parts = [with_scores([[0.9, 0.1]] * 4), with_scores([[0.1, 0.9]] * 4)]
    counts = sum(part.tokens_per_expert for part in parts)
    assert sum(switch_loss(part) for part in parts).item() / 2 == pytest.approx(1.8)
    assert sum(switch_loss(part, tokens_per_expert=counts) for part in parts).item() / 2 == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([1, 2]), r"tokens_per_expert has shape \(2,\): expected \(3,\)"),
        (torch.tensor([[1, 2, 3]]), r"tokens_per_expert has shape \(1, 3\): expected \(3,\)"),
        (torch.zeros(3), r"tokens_per_expert is all zero: expected the counts of at least one token"),
    ],
)
def test_loads_that_cannot_be_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        switch_loss(random_routing(6, 3, 2), tokens_per_expert=counts)
    with pytest.raises(ValueError, match=message):
        update_bias(torch.zeros(3), counts, 0.1)


@PROPERTY
@given(routings())
def test_of_one_sequence_the_sequence_loss_is_the_switch_loss(routing):
    assert_close(sequence_loss(routing, 1), switch_loss(routing), **TOLERANCE)


@PROPERTY
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_the_sequence_loss_is_the_mean_of_each_sequences_own(n_sequences, length, data):
    routing = routing_of(torch.randn(n_sequences * length, 5, generator=seeded(data.draw)), 2)
    each = [slow_loss(rows_of(routing, slice(b * length, (b + 1) * length))) for b in range(n_sequences)]
    assert sequence_loss(routing, n_sequences).item() == pytest.approx(sum(each) / n_sequences, rel=1e-4)


@pytest.mark.parametrize("n_sequences", [0, -1, 4, 7, 12])
def test_tokens_that_cannot_be_cut_into_so_many_sequences_are_refused(n_sequences):
    with pytest.raises(ValueError, match=rf"n_sequences={n_sequences}: expected a divisor of the 6 tokens"):
        sequence_loss(random_routing(6, 3, 2), n_sequences)


@pytest.mark.parametrize("name", LOSSES)
def test_sigmoids_that_are_all_zero_give_numbers(name):
    logits = torch.full((6, 3), -200.0)
    logits[4] = torch.tensor([1.0, 0.0, -1.0])
    logits.requires_grad_()
    loss = LOSSES[name](routing_of(logits, 2, "sigmoid"))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_losses_come_in_fp32_whatever_the_dtype_of_the_logits():
    logits = torch.randn(6, 3).bfloat16()
    for loss in LOSSES.values():
        assert loss(routing_of(logits, 2)).dtype == torch.float32
        assert_close(loss(routing_of(logits, 2)), loss(routing_of(logits.float(), 2)))


# --- the bias -----------------------------------------------------------------------------------------------------


def test_the_bias_moves_against_the_load_by_gamma():
    bias, counts = torch.tensor([0.5, 0.0, -0.25, 1.0]), torch.tensor([9, 4, 0, 3])  # the mean is 4
    assert_close(update_bias(bias, counts, 0.1), torch.tensor([0.4, 0.0, -0.15, 1.1]))
    # re-centred: the steps -1, 0, 1, 1 less their mean, 1/4
    assert_close(update_bias(bias, counts, 0.1, recentre=True), torch.tensor([0.375, -0.025, -0.175, 1.075]))
    assert bias.tolist() == [0.5, 0.0, -0.25, 1.0]  # the argument is left as it is


COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any)


@PROPERTY
@given(COUNTS, st.floats(0, 1), st.booleans(), st.integers(0, 100))
def test_the_bias_step_is_algorithm_1(counts, rate, recentre, seed):
    bias = torch.randn(len(counts), generator=torch.Generator().manual_seed(seed))
    moved = update_bias(bias, torch.tensor(counts), rate, recentre)
    # Wang et al. 2024, algorithm 1, in whole numbers: who has less than the mean goes up
    steps = [rate * ((sum(counts) > n * len(counts)) - (sum(counts) < n * len(counts))) for n in counts]
    if recentre:
        steps = [step - sum(steps) / len(steps) for step in steps]
    assert_close(moved, bias + torch.tensor(steps), **TOLERANCE)
    if recentre:
        assert_close(moved.mean(), bias.mean(), rtol=0, atol=1e-5)


def test_gamma_zero_and_exact_balance_leave_the_bias_bit_for_bit():
    bias = torch.randn(7)
    for recentre in (False, True):
        assert torch.equal(update_bias(bias, torch.arange(7), 0.0, recentre), bias)
        assert torch.equal(update_bias(bias, torch.full((7,), 5), 0.1, recentre), bias)


@pytest.mark.parametrize("recentre", [False, True])
def test_a_negative_gamma_is_refused(recentre):
    with pytest.raises(ValueError, match=r"rate=-0\.1: expected 0 or more\. A bias that grows with the load"):
        update_bias(torch.zeros(3), torch.tensor([1, 2, 3]), -0.1, recentre)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_balances_a_fixed_router_and_changes_no_score(score):
    logits = torch.randn(400, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(1, -1, 8)
    bias = torch.zeros(8)
    before = routing_of(logits, 2, score, bias)
    for _ in range(400):
        bias = update_bias(bias, routing_of(logits, 2, score, bias).tokens_per_expert, 0.003)
    after = routing_of(logits, 2, score, bias)
    assert max_violation(before.tokens_per_expert) > 0.9
    assert max_violation(after.tokens_per_expert) < 0.15
    assert torch.equal(after.router_scores, before.router_scores)


def test_a_step_too_large_overshoots():
    # one expert a little ahead everywhere: any step of the bias beyond its lead sends everybody to the other
    logits = torch.tensor([[0.02, 0.0]]).expand(10, 2)
    routing = routing_of(logits, bias=torch.zeros(2))
    bias = update_bias(torch.zeros(2), routing.tokens_per_expert, 0.1)
    assert routing.tokens_per_expert.tolist() == [10, 0]
    assert routing_of(logits, bias=bias).tokens_per_expert.tolist() == [0, 10]


# --- measures of load ---------------------------------------------------------------------------------------------


def test_measures_of_load_by_hand():
    counts = torch.tensor([[6, 2, 4, 0], [3, 3, 3, 3], [0, 0, 12, 0]])  # the mean is 3
    assert_close(load(counts), counts / 3)
    assert_close(max_violation(counts), torch.tensor([1.0, 0.0, 3.0]))  # Wang et al. 2024, equation 4
    halves = (1 / 2 * math.log(2) + 1 / 6 * math.log(6) + 1 / 3 * math.log(3)) / math.log(4)
    assert_close(load_entropy(counts), torch.tensor([halves, 1.0, 0.0]))
    assert dead_experts(counts).tolist() == [1, 0, 3]
    assert dead_experts(counts, below=1.0).tolist() == [2, 0, 3]
    assert_close(dropped_share(counts, 3), torch.tensor([4 / 12, 0.0, 9 / 12]))


def test_an_expert_is_dead_below_a_hundredth_of_its_share():
    counts = torch.tensor([1000, 9, 10, 2981])
    assert dead_experts(counts) == 1
    assert dead_experts(counts, below=0.5) == 2


@PROPERTY
@given(COUNTS.filter(lambda counts: len(counts) > 1))
def test_measures_of_load_are_those_of_slow_python(counts):
    mean, total, n = sum(counts) / len(counts), sum(counts), len(counts)
    tensor = torch.tensor(counts)
    assert max_violation(tensor).item() == pytest.approx(max(counts) / mean - 1, abs=1e-4)
    entropy = -sum(c / total * math.log(c / total) for c in counts if c) / math.log(n)
    assert load_entropy(tensor).item() == pytest.approx(entropy, abs=1e-4)
    assert -1e-6 <= max_violation(tensor) <= n - 1 + 1e-4
    assert -1e-6 <= load_entropy(tensor) <= 1 + 1e-5
    assert load(tensor).mean().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("drop", DROP_RULES)
@PROPERTY
@given(routing=routings(least_tokens=1), capacity=st.integers(0, 10))
def test_the_dropped_share_is_that_of_a_plan(drop, routing, capacity):
    dropped = make_plan(routing, capacity, drop).dropped.float().mean()
    assert_close(dropped_share(routing.tokens_per_expert, capacity), dropped, **TOLERANCE)


@PROPERTY
@given(st.integers(1, 12), st.integers(1, 5), st.data())
def test_expert_choice_is_balanced_by_construction(n_tokens, n_experts, data):
    capacity = data.draw(st.integers(1, n_tokens))
    choice = expert_choice(torch.randn(n_tokens, n_experts, generator=seeded(data.draw)), capacity)
    assert max_violation(choice.tokens_per_expert) == 0
    assert dead_experts(choice.tokens_per_expert) == 0
    assert torch.equal(choice.mask.sum(0), choice.tokens_per_expert)


# --- churn --------------------------------------------------------------------------------------------------------


def test_churn_by_hand():
    before = torch.tensor([[0, 1], [2, 3], [1, 2], [0, 3]])
    after = torch.tensor([[1, 0], [2, 1], [1, 2], [3, 0]])  # only the second token's set is another
    assert churn(before, after) == 0.25
    assert churn(before, before) == 0.0
    assert churn(before, (before + 1) % 4) == 1.0


@PROPERTY
@given(routings(), st.data())
def test_the_order_of_choices_is_no_churn(routing, data):
    chosen = routing.topk_experts
    order = torch.stack([torch.randperm(chosen.shape[1], generator=seeded(data.draw)) for _ in chosen])
    assert churn(chosen, chosen.gather(1, order)) == 0
    other = best_k(torch.rand(routing.router_scores.shape, generator=seeded(data.draw)), chosen.shape[1])
    slow = sum(set(a) != set(b) for a, b in zip(chosen.tolist(), other.tolist(), strict=True)) / len(chosen)
    assert churn(chosen, other) == pytest.approx(slow) == churn(other, chosen)


@pytest.mark.parametrize("shapes", [((3, 2), (2, 2)), ((3, 2), (3, 1)), ((0, 2), (0, 2)), ((3,), (3,))])
def test_choices_that_cannot_be_compared_are_refused(shapes):
    before, after = (torch.zeros(shape, dtype=torch.int64) for shape in shapes)
    with pytest.raises(ValueError, match=r"choices have shapes .* expected one \(T, K\) twice, T > 0"):
        churn(before, after)


# --- what routing tells about the domain --------------------------------------------------------------------------


def slow_information(experts: Tensor, domains: Tensor, tokens: Tensor) -> float:
    """Σ p(b, d, e) log₂ p(d, e | b) / (p(d | b) p(e | b)), the definition."""
    rows = zip(tokens.tolist(), domains.tolist(), experts.tolist(), strict=True)
    seen = [(b, d, e) for b, d, chosen in rows for e in chosen]
    n, b_alone = len(seen), Counter(b for b, _, _ in seen)
    bd, be = Counter((b, d) for b, d, _ in seen), Counter((b, e) for b, _, e in seen)
    return sum(c / n * math.log2(c * b_alone[b] / (bd[b, d] * be[b, e])) for (b, d, e), c in Counter(seen).items())


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 10_000))
def test_information_is_that_of_its_definition(n_tokens, k, seed):
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(5, (n_tokens, k), generator=generator)
    domains, tokens = (torch.randint(n, (n_tokens,), generator=generator) for n in (3, 4))
    information = domain_information(experts, domains, tokens)
    assert information == pytest.approx(slow_information(experts, domains, tokens), abs=1e-9)
    assert 0 <= information <= math.log2(3) + 1e-9


def sample_text(n_tokens: int = 4000) -> tuple[Tensor, Tensor]:
    """Domains, and bytes that depend on them."""
    generator = torch.Generator().manual_seed(0)
    domains = torch.randint(4, (n_tokens,), generator=generator)
    return domains, torch.randint(6, (n_tokens,), generator=generator) + 2 * domains


def conditional_entropy(domains: Tensor, tokens: Tensor) -> float:
    pairs, bytes_alone = Counter(zip(tokens.tolist(), domains.tolist(), strict=True)), Counter(tokens.tolist())
    return -sum(c / len(tokens) * math.log2(c / bytes_alone[b]) for (b, _), c in pairs.items())


def test_a_router_that_looks_at_the_byte_alone_tells_nothing():
    domains, tokens = sample_text()
    experts = torch.stack([tokens % 8, (3 * tokens + 1) % 8 + 8], 1)
    assert domain_information(experts, domains, tokens) == pytest.approx(0, abs=1e-9)


def test_a_router_that_knows_the_domain_tells_all_that_the_byte_does_not():
    domains, tokens = sample_text()
    h = conditional_entropy(domains, tokens)
    assert 0.3 < h < 2
    assert domain_information(domains[:, None], domains, tokens) == pytest.approx(h, abs=1e-9)
    both = torch.stack([domains, domains + 4], 1)  # two choices that say the same are no more than one
    assert domain_information(both, domains, tokens) == pytest.approx(h, abs=1e-9)


def test_a_bit_is_a_bit():
    domains = torch.tensor([0, 1] * 8)
    assert domain_information(domains[:, None], domains, torch.zeros(16, dtype=torch.int64)) == pytest.approx(1)


def test_the_order_of_tokens_and_the_names_of_experts_do_not_matter():
    domains, tokens = sample_text(300)
    experts = torch.randint(5, (300, 2), generator=torch.Generator().manual_seed(1))
    told = domain_information(experts, domains, tokens)
    order, names = torch.randperm(300), torch.randperm(5)
    assert domain_information(experts[order], domains[order], tokens[order]) == pytest.approx(told, abs=1e-9)
    assert domain_information(names[experts], domains, tokens) == pytest.approx(told, abs=1e-9)
    assert domain_information(experts.flip(1), domains, tokens) == pytest.approx(told, abs=1e-9)


@PROPERTY
@given(st.integers(1, 60), st.integers(0, 10_000))
def test_shuffling_keeps_how_often_each_byte_is_of_each_domain(n_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    domains, tokens = (torch.randint(n, (n_tokens,), generator=generator) for n in (3, 5))
    shuffled = shuffle_within(tokens, domains, generator)
    pairs = [Counter(zip(tokens.tolist(), d.tolist(), strict=True)) for d in (domains, shuffled)]
    assert pairs[0] == pairs[1]
    assert shuffled.dtype == domains.dtype


def test_shuffling_cuts_what_an_expert_tells_and_repeats_with_its_seed():
    domains, tokens = sample_text()
    told = domain_information(domains[:, None], domains, tokens)
    once, again, other = (shuffle_within(tokens, domains, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    left = domain_information(domains[:, None], once, tokens)
    # what is left is bias: about (domains - 1)(experts - 1) / 2 per byte over T, in nats (Miller 1955)
    assert 0 < left < 0.03 * told
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_shuffling_mixes_every_place():
    # of two domains under one byte every arrangement turns up
    domains, tokens, seen = torch.tensor([0, 0, 1, 1]), torch.zeros(4, dtype=torch.int64), set()
    for seed in range(60):
        seen.add(tuple(shuffle_within(tokens, domains, torch.Generator().manual_seed(seed)).tolist()))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("n_domains", "n_bytes", "shape"),
    [(3, 4, (4, 2)), (4, 3, (4, 2)), (0, 0, (0, 2))],
    ids=["domains", "bytes", "none"],
)
def test_information_of_things_that_do_not_fit_together_is_refused(n_domains, n_bytes, shape):
    zeros = [torch.zeros(size, dtype=torch.int64) for size in (shape, (n_domains,), (n_bytes,))]
    with pytest.raises(ValueError, match=rf"topk_experts has shape \({shape[0]}, 2\), but domains \({n_domains},\)"):
        domain_information(*zeros)
