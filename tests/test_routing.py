import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from moe_lab.config import RouterConfig
from moe_lab.routing import (
    Router,
    best_k,
    best_k_reference,
    expert_choice,
    limit_groups,
    require_finite,
    route,
    score,
    weigh,
)

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
INF, NAN = float("inf"), float("nan")
CONFIG = RouterConfig(d_model=5, n_experts=6, top_k=2)
DEEPSEEK_V3 = CONFIG.but(
    score="sigmoid", selection_bias=True, n_groups=3, groups_kept=2, group_score="top2_sum", scaling_factor=2.5
)


def grid(low: float, high: float, step: float) -> st.SearchStrategy[float]:
    """Numbers that fp32 holds exactly, and so few that they often tie."""
    return st.integers(round(low / step), round(high / step)).map(lambda n: n * step)


@st.composite
def tables(draw, numbers, n_experts=None, least_tokens=1):
    rows, width = draw(st.integers(least_tokens, 4)), n_experts or draw(st.integers(1, 8))
    return torch.tensor(draw(st.lists(numbers, min_size=rows * width, max_size=rows * width))).view(rows, width)


def ranked(row: list[float]) -> list[int]:
    """Places in a row, the best first: NaN before all numbers, of equals the first."""
    return sorted(range(len(row)), key=lambda i: (row[i] == row[i], 0 if row[i] != row[i] else -row[i], i))


# fp32 as bits: 0, 1, inf, two NaN, the smallest and the largest denormal, the largest number; then all of them negative
POSITIVE_BITS = (0, 0x3F80_0000, 0x7F80_0000, 0x7FC0_0000, 0x7F80_0001, 1, 0x007F_FFFF, 0x7F7F_FFFF)
HARD_BITS = POSITIVE_BITS + tuple(bits | 0x8000_0000 for bits in POSITIVE_BITS)
NAN_AND_A_TIE = torch.tensor([[0, 0x3F80_0000, 0, 0x7FC0_0000]])
bit_tables = tables(st.sampled_from(HARD_BITS) | st.integers(0, 2**32 - 1))


def as_fp32(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


@PROPERTY
@given(bit_tables)
@example(NAN_AND_A_TIE)
def test_the_best_k_are_those_of_a_sort_in_python(bits):
    scores = as_fp32(bits)
    expected = torch.tensor([ranked(row) for row in scores.tolist()])
    for k in range(1, scores.shape[1] + 1):
        assert torch.equal(best_k_reference(scores, k), expected[:, :k])
        assert torch.equal(best_k(scores, k), expected[:, :k])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@PROPERTY
@given(bit_tables)
@example(bits=NAN_AND_A_TIE)
def test_the_best_k_in_another_dtype_are_those_of_the_same_numbers(dtype, bits):
    scores = as_fp32(bits).to(dtype)
    expected = torch.tensor([ranked(row) for row in scores.tolist()])
    for k in range(1, scores.shape[1] + 1):
        assert torch.equal(best_k(scores, k), expected[:, :k])


@pytest.mark.parametrize("n_experts", [1, 2, 64, 257])
def test_of_equal_scores_the_lowest_ids_are_chosen(n_experts):
    scores = torch.full((3, n_experts), 0.25)
    for k in {1, (n_experts + 1) // 2, n_experts}:
        assert torch.equal(best_k(scores, k), torch.arange(k).expand(3, k))


def test_the_best_k_of_many_rows_in_which_bf16_made_ties():
    torch.manual_seed(0)
    scores = torch.rand(500, 128).bfloat16().float()
    boundary = scores.sort(descending=True).values[:, 7:9]
    assert (boundary[:, 0] == boundary[:, 1]).any()
    assert torch.equal(best_k(scores, 8), best_k_reference(scores, 8))
    assert torch.equal(best_k(scores.T, 8), best_k_reference(scores.T, 8))  # not contiguous


def test_scores_by_hand():
    logits = torch.tensor([[0.0, 2.0, 2.0]]).log1p()  # log 1, log 3, log 3
    assert_close(score(logits), torch.tensor([[1 / 7, 3 / 7, 3 / 7]]))
    assert_close(score(logits, "sigmoid"), torch.tensor([[1 / 2, 3 / 4, 3 / 4]]))


def test_an_unknown_score_is_named():
    with pytest.raises(ValueError, match=r"score='tanh': expected 'softmax' or 'sigmoid'"):
        score(torch.zeros(1, 2), "tanh")


def slow_limit(row: list[float], n_groups: int, groups_kept: int, group_score: str) -> list[float]:
    size = len(row) // n_groups
    groups = [sorted(row[g * size : (g + 1) * size], reverse=True) for g in range(n_groups)]
    worth = [group[0] if group_score == "max" else group[0] + group[1] for group in groups]
    kept = ranked(worth)[:groups_kept]
    return [s if e // size in kept else -INF for e, s in enumerate(row)]


@PROPERTY
@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_groups_are_limited_as_in_slow_python(data, n_groups, size):
    scores = data.draw(tables(grid(-1, 1, 0.25), n_experts=n_groups * size))
    kept = data.draw(st.integers(1, n_groups))
    for group_score in ["max", "top2_sum"][: 1 if size == 1 else 2]:
        limited = limit_groups(scores, n_groups, kept, group_score)
        assert limited.tolist() == [slow_limit(row, n_groups, kept, group_score) for row in scores.tolist()]


def test_the_two_group_scores_by_hand():
    scores = torch.tensor([[0.75, 0.0, 0.5, 0.5]])
    assert limit_groups(scores, 2, 1, "max").tolist() == [[0.75, 0.0, -INF, -INF]]
    assert limit_groups(scores, 2, 1, "top2_sum").tolist() == [[-INF, -INF, 0.5, 0.5]]


def test_an_unknown_group_score_is_named():
    with pytest.raises(ValueError, match="group_score='sum'"):
        limit_groups(torch.zeros(1, 4), 2, 1, "sum")


@PROPERTY
@given(tables(grid(-3, 3, 0.125), n_experts=6), st.lists(grid(-2, 2, 0.25), min_size=6, max_size=6))
def test_a_token_stays_in_its_groups_even_where_all_scores_are_negative(logits, bias):
    config = DEEPSEEK_V3.but(groups_kept=1)
    routing = route(logits, config, torch.tensor(bias))
    biased = logits.sigmoid() + torch.tensor(bias)
    for chosen, row in zip(routing.topk_experts.tolist(), biased.tolist(), strict=True):
        assert chosen == ranked(slow_limit(row, 3, 1, "top2_sum"))[:2]
        assert chosen[0] // 2 == chosen[1] // 2


def test_weights_by_hand():
    scores = torch.tensor([[0.5, 0.125, 0.375]])
    experts = torch.tensor([[2, 1]])
    assert_close(weigh(scores, experts), torch.tensor([[0.75, 0.25]]))
    assert_close(weigh(scores, experts, normalise=False), torch.tensor([[0.375, 0.125]]))
    assert_close(weigh(scores, experts, scaling_factor=2.5), torch.tensor([[1.875, 0.625]]))
    assert_close(weigh(scores, experts, normalise=False, scaling_factor=2.0), torch.tensor([[0.75, 0.25]]))


@PROPERTY
@given(tables(st.floats(-20, 20, width=32), n_experts=6))
def test_normalised_softmax_is_a_softmax_over_the_chosen_logits(logits):
    routing = route(logits, CONFIG)  # Jiang et al. 2024 (Mixtral), section 2.1
    assert_close(routing.topk_weights, logits.gather(1, routing.topk_experts).softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_normalised_weights_sum_to_the_factor_and_others_are_scores(kind, factor):
    torch.manual_seed(0)
    logits, config = torch.randn(7, 6), CONFIG.but(score=kind, scaling_factor=factor)
    assert_close(route(logits, config).topk_weights.sum(-1), torch.full((7,), factor))
    routing = route(logits, config.but(normalise=False))
    assert_close(routing.topk_weights, factor * routing.router_scores.gather(1, routing.topk_experts))
    assert_close(routing.dense_weights.sum(-1), routing.topk_weights.sum(-1))
    assert torch.equal(routing.dense_weights.gather(1, routing.topk_experts), routing.topk_weights)
    assert torch.equal((routing.dense_weights != 0).sum(-1), torch.full((7,), 2))


def test_deepseek_v3_by_hand():
    # sigmoids (in quarters) 3 1 | 2 2 | 1 1 and a bias of -1 on expert 0: groups are worth 0, 1, 2/4, so 1 and 2 stay
    logits = torch.tensor([[3.0, 1 / 3, 1.0, 1.0, 1 / 3, 1 / 3]]).log()
    bias = torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0, 0.75])
    routing = route(logits, DEEPSEEK_V3, bias)
    assert routing.topk_experts.tolist() == [[5, 2]]  # 1/4 + 3/4, then 2/4; expert 3 ties with 2
    assert_close(routing.topk_weights, torch.tensor([[2.5 / 3, 5 / 3]]))  # 1/4 and 2/4, without the bias, times 2.5
    assert_close(routing.router_scores, torch.tensor([[0.75, 0.25, 0.5, 0.5, 0.25, 0.25]]))


def test_sigmoids_that_are_all_zero_give_numbers():
    logits = torch.full((1, 6), -200.0, requires_grad=True)
    weights = route(logits, CONFIG.but(score="sigmoid")).topk_weights
    weights.sum().backward()
    assert torch.equal(weights, torch.zeros(1, 2))
    assert logits.grad.isfinite().all()


@PROPERTY
@given(tables(st.floats(-20, 20, width=32), least_tokens=0, n_experts=6), st.integers(1, 6))
def test_counts_sum_to_the_choices_and_no_expert_is_chosen_twice(logits, k):
    routing = route(logits, CONFIG.but(top_k=k))
    assert routing.tokens_per_expert.sum() == k * len(logits)
    assert routing.tokens_per_expert.dtype == torch.int64
    assert routing.tokens_per_expert.tolist() == [(routing.topk_experts == e).sum() for e in range(6)]
    assert all(len(set(chosen)) == k for chosen in routing.topk_experts.tolist())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@PROPERTY
@given(tables(grid(-4, 4, 0.5), n_experts=6), st.floats(0.25, 16), st.integers(1, 6))
def test_a_temperature_never_changes_the_chosen(kind, logits, temperature, k):
    config = CONFIG.but(score=kind, top_k=k)
    assert torch.equal(route(logits / temperature, config).topk_experts, route(logits, config).topk_experts)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_neither_does_a_very_low_one(kind):
    # scores round to 0, 0, 0 and 1, or 1/2, 1, 1 and 1; the larger logit is still the better choice
    logits, config = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), RouterConfig(d_model=1, n_experts=4, top_k=2, score=kind)
    assert route(logits / 0.005, config).topk_experts.tolist() == [[3, 2]]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_which_gradient_reaches_the_logits(kind):
    torch.manual_seed(0)
    config = CONFIG.but(score=kind)

    def gradient(**changes: object) -> torch.Tensor:
        logits = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
        routing = route(logits, config.but(**changes))
        (routing.topk_weights * torch.arange(1, 1 + routing.topk_weights.shape[1])).sum().backward()
        return logits.grad

    assert_close(gradient(top_k=1), torch.zeros(3, 6), rtol=0, atol=1e-6)  # one weight that is always 1
    assert (gradient(top_k=1, normalise=False)[:, 5].abs() > 0.01).all()
    assert (gradient()[:, 4:].abs() > 0.01).all()
    assert_close(gradient()[:, :4], torch.zeros(3, 4), rtol=0, atol=1e-6)  # normalised: only the chosen


def test_the_selection_bias_chooses_and_never_weighs():
    torch.manual_seed(0)
    logits = torch.randn(9, 6)
    config = CONFIG.but(score="sigmoid", normalise=False)
    for size in (0.0, 10.0, -10.0):
        bias = torch.zeros(6).index_fill(0, torch.tensor(3), size).requires_grad_()
        weighed = logits.clone().requires_grad_()
        routing = route(weighed, config, bias)
        chosen = routing.tokens_per_expert[3].item()
        assert size == 0 or chosen == (9 if size > 0 else 0)
        assert torch.equal(routing.router_scores, logits.sigmoid())
        assert torch.equal(routing.topk_weights, logits.sigmoid().gather(1, routing.topk_experts))
        routing.topk_weights.sum().backward()
        assert bias.grad is None


NOT_FINITE = {
    "softmax": {},
    "not normalised": {"normalise": False},
    "sigmoid": {"score": "sigmoid", "normalise": False},
    "max": {"score": "sigmoid", "normalise": False, "n_groups": 3, "groups_kept": 1},
    "top2_sum": {"score": "sigmoid", "n_groups": 3, "groups_kept": 1, "group_score": "top2_sum"},
}


# On a device that is not a CPU nothing refuses a NaN unless asked; this is what then happens.
@pytest.mark.parametrize("changes", NOT_FINITE.values(), ids=NOT_FINITE)
@pytest.mark.parametrize("expert", range(6))
def test_an_unchecked_nan_reaches_the_weights_of_its_token_and_of_no_other(changes, expert):
    torch.manual_seed(0)
    logits = torch.randn(4, 6)
    clean = route(logits, CONFIG.but(**changes))
    logits[2, expert] = NAN
    routing = route(logits, CONFIG.but(**changes))
    assert routing.topk_weights[2].isnan().any()
    others = [0, 1, 3]
    assert torch.equal(routing.topk_weights[others], clean.topk_weights[others])
    assert torch.equal(routing.topk_experts[others], clean.topk_experts[others])


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(1, 2, NAN)], r"1 of 18 are NaN or infinite, in 1 of 3 tokens; the first is nan at token 1, expert 2"),
        ([(2, 0, INF), (2, 5, NAN)], r"2 of 18 are .* in 1 of 3 tokens; the first is inf at token 2, expert 0"),
        ([(0, 5, -INF), (2, 0, NAN)], r"2 of 18 are .* in 2 of 3 tokens; the first is -inf at token 0, expert 5"),
    ],
)
def test_logits_that_are_not_finite_are_refused_with_their_number_and_place(places, message):
    logits = torch.zeros(3, 6)
    for token, expert, value in places:
        logits[token, expert] = value
    with pytest.raises(ValueError, match=rf"router_logits: {message}"):
        require_finite(logits)
    # a router that computes these logits refuses them, too
    router = Router(RouterConfig(d_model=6, n_experts=6, top_k=2))
    router.weight.data = torch.full((6, 6), 0.0).fill_diagonal_(1e38)
    tokens = torch.zeros(3, 6)
    for token, expert, _ in places:
        tokens[token, expert] = 1e38
    for mode in (router.train(), router.eval()):
        with pytest.raises(ValueError, match=rf"router_logits: .* at token {places[0][0]}, expert {places[0][1]}\."):
            mode(tokens)


def test_finite_logits_pass():
    require_finite(torch.tensor([[3.4e38, -3.4e38, 0.0]]))
    require_finite(torch.zeros(0, 3))


def test_the_router_is_one_linear_layer_in_fp32_whatever_the_dtype():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        router = Router(CONFIG.but(logit_bias=True)).to(dtype)
        torch.nn.init.normal_(router.bias)
        tokens = torch.randn(7, 5).to(dtype)
        expected = F.linear(tokens.float(), router.weight.float(), router.bias.float())
        routing = router(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = router(tokens)
        for got in (routing, under_autocast):
            assert torch.equal(got.router_logits, expected)
            assert {got.router_logits.dtype, got.router_scores.dtype, got.topk_weights.dtype} == {torch.float32}
            assert got.topk_experts.dtype == torch.int64


def test_bf16_tokens_choose_what_fp32_logits_say_not_what_bf16_logits_would():
    torch.manual_seed(0)
    router = Router(RouterConfig(d_model=64, n_experts=64, top_k=8)).bfloat16()
    tokens = torch.randn(200, 64).bfloat16()
    rounded = best_k(F.linear(tokens, router.weight).float().softmax(-1), 8).sort().values
    exact = best_k(F.linear(tokens.float(), router.weight.float()).softmax(-1), 8).sort().values
    assert not torch.equal(rounded, exact)
    assert torch.equal(router(tokens).topk_experts.sort().values, exact)


def saved_and_loaded(router: Router) -> Router:
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    fresh = Router(router.config).bfloat16()
    fresh.load_state_dict(torch.load(file))
    return fresh


TRIPS = {
    "to bf16": lambda router: router.to(torch.bfloat16),
    "bfloat16": lambda router: router.bfloat16(),
    "half": lambda router: router.half(),
    "half and back": lambda router: router.half().float(),
    "double": lambda router: router.double(),
    "device and dtype": lambda router: router.to("cpu", torch.bfloat16),
    "inside another module": lambda router: torch.nn.Sequential(router).bfloat16()[0],
    "deepcopy": copy.deepcopy,
    "deepcopy of bf16": lambda router: copy.deepcopy(router.bfloat16()),
    "state_dict": saved_and_loaded,
}


@pytest.mark.parametrize("trip", TRIPS.values(), ids=TRIPS)
def test_the_selection_bias_stays_fp32_to_the_last_bit(trip):
    router = Router(DEEPSEEK_V3)
    router.selection_bias += torch.tensor([0.1, 0.001, -0.001, 1.001, 0.0, 3e-5])
    before = router.selection_bias.clone()
    after = trip(router)
    assert after.selection_bias.dtype == torch.float32
    assert torch.equal(after.selection_bias, before)
    assert "selection_bias" in after.state_dict()
    after.selection_bias += 0.001  # what the trainer does reaches the choice
    assert torch.equal(after.selection_bias, before + 0.001)


def test_the_selection_bias_follows_the_device_and_is_no_parameter():
    router = Router(DEEPSEEK_V3)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert not router.selection_bias.requires_grad
    moved = router.to("meta", torch.bfloat16)
    assert (moved.selection_bias.device.type, moved.selection_bias.dtype) == ("meta", torch.float32)
    assert (moved.weight.device.type, moved.weight.dtype) == ("meta", torch.bfloat16)
    with torch.device("meta"):
        empty = Router(DEEPSEEK_V3).bfloat16()
    assert empty.to_empty(device="cpu").selection_bias.dtype == torch.float32


def test_moving_one_router_leaves_its_copy_alone():
    router = Router(DEEPSEEK_V3)
    other = copy.deepcopy(router)
    router.selection_bias += 1
    assert torch.equal(other.selection_bias, torch.zeros(6))


def test_the_biased_router_chooses_by_its_bias():
    torch.manual_seed(0)
    router, tokens = Router(CONFIG.but(score="sigmoid", selection_bias=True)), torch.randn(9, 5)
    before = router(tokens)
    router.selection_bias[4] = 10
    assert router(tokens).tokens_per_expert[4] == 9 > before.tokens_per_expert[4]


def test_a_new_router_gives_logits_of_size_one_and_is_near_random():
    torch.manual_seed(0)
    router = Router(RouterConfig(d_model=64, n_experts=16, top_k=2, logit_bias=True, selection_bias=True))
    logits = router(torch.randn(4000, 64)).router_logits
    assert logits.std().item() == pytest.approx(1, abs=0.1)
    router.selection_bias += 1
    router.bias.data += 1
    router.reset_parameters()
    assert not router.selection_bias.any()
    assert not router.bias.any()


@pytest.mark.parametrize("changes", [{"input_jitter": 0.3}, {"noisy_top_k": True}], ids=["jitter", "noise"])
def test_there_is_chance_only_in_training(changes):
    torch.manual_seed(0)
    router, tokens = Router(CONFIG.but(**changes)), torch.randn(7, 5)
    plain = F.linear(tokens, router.weight)
    first, second = router(tokens).router_logits, router(tokens).router_logits
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, plain)
    router.eval()
    assert torch.equal(router(tokens).router_logits, plain)


def test_jitter_multiplies_the_input_by_numbers_near_one():
    torch.manual_seed(0)
    router = Router(RouterConfig(d_model=1, n_experts=1, top_k=1, input_jitter=0.25))
    router.weight.data.fill_(1.0)
    factors = router(torch.full((4000, 1), 2.0)).router_logits / 2
    assert 0.75 <= factors.min() < 0.76  # U(1 - 0.25, 1 + 0.25): Fedus et al. 2021, section 2.4
    assert 1.24 < factors.max() <= 1.25
    assert factors.mean().item() == pytest.approx(1, abs=0.02)


def test_noise_is_gaussian_with_a_learned_size_per_expert():
    torch.manual_seed(0)
    router = Router(RouterConfig(d_model=2, n_experts=2, top_k=1, noisy_top_k=True))
    router.noise_weight.data = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    tokens = torch.tensor([1.0, 0.0]).expand(8000, 2)
    noise = router(tokens).router_logits - F.linear(tokens, router.weight)
    assert_close(noise.mean(0), torch.zeros(2), rtol=0, atol=0.15)
    assert_close(noise.std(0), F.softplus(torch.tensor([0.0, 3.0])), rtol=0.05, atol=0)  # Shazeer et al. 2017, eq. 4
    router(tokens).topk_weights.sum().backward()
    assert router.noise_weight.grad is not None


def test_noise_teaches_its_size():
    torch.manual_seed(0)
    router = Router(CONFIG.but(noisy_top_k=True))
    (router(torch.randn(7, 5)).topk_weights * torch.tensor([1.0, 2.0])).sum().backward()
    assert router.noise_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("changes", [{}, *NOT_FINITE.values()])
def test_no_tokens_and_one_token_are_routed(changes):
    router = Router(CONFIG.but(**changes))
    for n_tokens in (0, 1):
        routing = router(torch.ones(n_tokens, 5))
        assert routing.topk_experts.shape == routing.topk_weights.shape == (n_tokens, 2)
        assert routing.tokens_per_expert.sum() == 2 * n_tokens
        routing.topk_weights.sum().backward()


def test_a_routing_tells_its_sizes_not_its_numbers():
    assert repr(route(torch.zeros(3, 6), CONFIG)) == "Routing(router_logits (3, 6), topk_experts (3, 2))"


def slow_expert_choice(scores: list[list[float]], capacity: int) -> list[list[int]]:
    return [ranked([row[e] for row in scores])[:capacity] for e in range(len(scores[0]))]


@PROPERTY
@given(tables(grid(-2, 2, 0.5), n_experts=3), st.data())
@example(torch.zeros(3, 2), None)
def test_experts_choose_tokens_as_in_slow_python(logits, data):
    n_tokens, n_experts = logits.shape
    capacity = data.draw(st.integers(0, n_tokens)) if data else 2
    choice = expert_choice(logits, capacity)
    scores = logits.softmax(-1)
    assert torch.equal(choice.router_scores, scores)
    assert choice.tokens.tolist() == slow_expert_choice(scores.tolist(), capacity)
    assert choice.weights.shape == choice.tokens.shape == (n_experts, capacity)
    for e in range(n_experts):
        assert torch.equal(choice.weights[e], scores[choice.tokens[e], e])


def test_expert_choice_carries_a_gradient_and_is_fp32():
    logits = torch.randn(5, 3).bfloat16().requires_grad_()
    choice = expert_choice(logits, 2)
    assert choice.weights.dtype == torch.float32
    choice.weights.sum().backward()
    assert logits.grad.abs().sum() > 0
    assert repr(choice) == "ExpertChoice(router_scores (5, 3), tokens (3, 2))"


def test_with_expert_choice_a_later_token_changes_what_becomes_of_an_earlier_one():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    later = torch.tensor([[5.0, -5.0]])
    assert expert_choice(logits, 1).tokens[0].tolist() == [0]
    assert expert_choice(torch.cat([logits, later]), 1).tokens[0].tolist() == [2]


@pytest.mark.parametrize("capacity", [-1, 6])
def test_experts_cannot_choose_more_tokens_than_there_are(capacity):
    with pytest.raises(ValueError, match=f"capacity={capacity}: expected 0 to the number of tokens, 5"):
        expert_choice(torch.zeros(5, 3), capacity)
