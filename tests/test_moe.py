import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from variants import each, here, skip_bf16_in_the_interpreter

from moe_lab.accounting import moe_parameters
from moe_lab.config import EXPERT_KINDS, MoEConfig
from moe_lab.dispatch import expert_capacity, make_plan
from moe_lab.ffn import ACTIVATIONS, mlp, swiglu
from moe_lab.moe import ExpertChoiceMoE, MoE, moe_loop, moe_reference
from moe_lab.ops import GROUPED_MM
from moe_lab.records import ExpertChoice

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True)
IMPLS = each(GROUPED_MM)
CONFIG = MoEConfig(d_model=8, d_ff=12, n_experts=4, top_k=2)
SHARED = {"n_shared_experts": 1, "d_ff_shared": 12}

# Every field that changes what is computed, and combinations that meet in one line of code.
VARIANTS = {
    "plain": {},
    "top-1": {"top_k": 1, "normalise": False},
    "all experts": {"top_k": 4},
    "one expert": {"n_experts": 1, "top_k": 1},
    "not normalised": {"normalise": False},
    "scaled": {"scaling_factor": 2.5},
    "sigmoid": {"score": "sigmoid"},
    "groups by max": {"n_groups": 2, "groups_kept": 1},
    "deepseek-v3": {
        "score": "sigmoid",
        "selection_bias": True,
        "n_groups": 2,
        "groups_kept": 1,
        "group_score": "top2_sum",
        "scaling_factor": 2.5,
    },
    "logit bias": {"logit_bias": True},
    "relu": {"expert": "relu"},
    "gelu, biased": {"expert": "gelu", "expert_bias": True},
    "gpt-oss": {"expert": "clamped_swiglu", "expert_bias": True, "logit_bias": True},
    "shared": {"n_shared_experts": 2, "d_ff_shared": 24},
    "shared, gated, wide": {"n_shared_experts": 1, "d_ff_shared": 20, "shared_gate": True},
    "shared relu": {**SHARED, "expert": "relu"},
    "input weighed": {"weigh": "input", "score": "sigmoid", "normalise": False},
    "input weighed, biased": {"weigh": "input", "expert_bias": True},
    "capacity": {"capacity_factor": 0.75},
    "capacity by score": {"capacity_factor": 0.75, "drop": "score"},
    "capacity, biased, shared": {"capacity_factor": 0.5, "expert_bias": True, **SHARED},
    "capacity, input weighed": {"capacity_factor": 0.75, "weigh": "input", "expert_bias": True},
    "almost no capacity": {"capacity_factor": 1e-9},
    "more capacity than needed": {"capacity_factor": 9.0},
    "noise": {"noisy_top_k": True, "input_jitter": 0.1},
}


def made(config: MoEConfig, impl: str = "auto") -> MoE:
    """A layer whose biases are not 0, where a mistake in them would not show."""
    torch.manual_seed(0)
    layer = MoE(config, impl)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if ".b_" in name or name in ("router.bias", "router.noise_weight"):
                parameter.normal_()
        if config.selection_bias:
            layer.router.selection_bias.copy_(0.3 * torch.randn(config.n_experts))
    return layer


def by_definition(layer: MoE, x: Tensor) -> Tensor:
    """The slow version: router, every expert on every token, shared experts."""
    config, tokens = layer.config, x.reshape(-1, x.shape[-1])
    routing, dropped = layer.router(tokens), None
    if config.capacity_factor is not None:
        capacity = expert_capacity(len(tokens), config.top_k, config.n_experts, config.capacity_factor)
        dropped = make_plan(routing, capacity, config.drop).dropped  # held to a queue in Python in test_dispatch.py
    y = moe_reference(tokens, routing, layer.experts.one, dropped, config.weigh)
    if config.n_shared_experts:
        y = y + shared_by_definition(layer, tokens)
    return y.view_as(x)


def shared_by_definition(layer: MoE, tokens: Tensor) -> Tensor:
    ffn, kind = layer.shared.ffn, layer.config.expert
    if kind == "swiglu":
        y = swiglu(tokens, ffn.w_gate.weight, ffn.w_up.weight, ffn.w_down.weight)
    else:
        y = ACTIVATIONS[kind](tokens @ ffn.w_up.weight.T) @ ffn.w_down.weight.T
    if layer.config.shared_gate:
        y = y / (1 + torch.exp(-tokens @ layer.shared.gate.weight.T))
    return y


def gradients(layer: MoE, y: Tensor, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    x.grad = None
    y.backward(upstream)
    return {"x": x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}


def assert_same_gradients(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        assert (got is None) == (expected is None), name
        if got is not None:
            assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_is_its_definition(config: MoEConfig, impl: str, x: Tensor) -> None:
    ours = made(config, impl)
    slow, slow_x, upstream = copy.deepcopy(ours), x.clone().requires_grad_(), torch.randn(x.shape)
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # the same noise for both
    y, routing = ours(x)
    torch.manual_seed(1)
    expected = by_definition(slow, slow_x)
    assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert routing.tokens_per_expert.sum() == x.numel() // x.shape[-1] * config.top_k
    wanted = gradients(slow, expected, slow_x, upstream)
    assert_same_gradients(gradients(ours, y, x, upstream), wanted, 1e-4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_its_definition_in_outputs_and_every_gradient(impl, changes):
    torch.manual_seed(2)
    for shape in ((1, 8), (2, 9, 8)):
        assert_is_its_definition(CONFIG.but(**changes), impl, torch.randn(shape))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_is_its_definition_at_sizes_that_no_block_divides(changes):
    torch.manual_seed(2)
    shared = {"d_ff_shared": 11} if changes.get("n_shared_experts") else {}
    assert_is_its_definition(CONFIG.but(d_model=5, d_ff=7, **changes | shared), "auto", torch.randn(13, 5))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_loop_over_experts_is_the_definition_too(changes):
    config = CONFIG.but(**changes).but(capacity_factor=None, weigh="output")
    layer = made(config)
    slow, tokens = copy.deepcopy(layer), torch.randn(9, 8)
    x, slow_x = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    torch.manual_seed(1)  # the same noise for both
    y = moe_loop(x, layer.router(x), layer.experts.one)
    torch.manual_seed(1)
    expected = moe_reference(slow_x, slow.router(slow_x), slow.experts.one)
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(9, 8)
    assert_same_gradients(gradients(layer, y, x, upstream), gradients(slow, expected, slow_x, upstream), 1e-4)


def test_the_definition_by_hand():
    layer = made(MoEConfig(d_model=2, d_ff=3, n_experts=3, top_k=2))
    layer.router.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    x = torch.tensor([[2.0, 1.0]])  # logits 2, 1, -3: experts 0 and 1
    weights = torch.tensor([2.0, 1.0]).softmax(0)
    expected = weights[0] * layer.experts.one(0, x) + weights[1] * layer.experts.one(1, x)
    y, routing = layer(x)
    assert routing.topk_experts.tolist() == [[0, 1]]
    assert_close(y, expected)
    assert_close(moe_reference(x, routing, layer.experts.one), expected)
    dropped = torch.tensor([[True, False]])
    assert_close(moe_reference(x, routing, layer.experts.one, dropped), weights[1] * layer.experts.one(1, x))
    weighed = sum(layer.experts.one(e, weights[e] * x) for e in (0, 1))
    assert_close(moe_reference(x, routing, layer.experts.one, weigh="input"), weighed)


@st.composite
def configs(draw):
    """Any configuration that can be, small."""
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    n_groups, size = pick(1, 1, 2, 3), pick(1, 2, 3)
    kept = draw(st.integers(1, n_groups))
    kind = pick(*EXPERT_KINDS)
    n_shared = 0 if kind == "clamped_swiglu" else pick(0, 0, 1, 2)  # the next test is about these two together
    return MoEConfig(
        d_model=pick(1, 3, 4, 8),
        d_ff=pick(1, 4, 5, 8),
        n_experts=n_groups * size,
        top_k=draw(st.integers(1, min(kept * size, 4))),
        score=pick("softmax", "sigmoid"),
        normalise=pick(True, False),
        scaling_factor=pick(1.0, 2.5),
        n_groups=n_groups,
        groups_kept=kept,
        group_score="max" if size == 1 and n_groups > 1 else pick("max", "top2_sum"),
        selection_bias=pick(True, False),
        logit_bias=pick(True, False),
        input_jitter=pick(0.0, 0.1),
        noisy_top_k=pick(True, False),
        n_shared_experts=n_shared,
        d_ff_shared=pick(None, 6) if n_shared else None,
        shared_gate=n_shared > 0 and pick(True, False),
        expert=kind,
        expert_bias=pick(True, False),
        weigh=pick("output", "input"),
        capacity_factor=pick(None, 0.3, 1.0, 1.25, 4.0),
        drop=pick("position", "score"),
    )


@PROPERTY
@given(configs(), st.sampled_from([0, 1, 2, 7]))
def test_every_configuration_that_can_be_works_and_is_its_definition(config, n_tokens):
    torch.manual_seed(n_tokens)
    assert_is_its_definition(config, "auto", torch.randn(n_tokens, config.d_model))
    biases = config.n_experts if config.selection_bias else 0  # learned, and no parameter
    assert sum(p.numel() for p in MoE(config).parameters()) + biases == moe_parameters(config)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_shared_experts_of_a_kind_either_work_or_are_refused_where_the_layer_is_described(kind):
    try:
        config = CONFIG.but(expert=kind, **SHARED)
    except ValueError as refusal:
        message = str(refusal)
    else:
        assert_is_its_definition(config, "auto", torch.randn(5, 8))
        return
    assert kind == "clamped_swiglu"  # no model has shared experts of this kind
    assert "expert='clamped_swiglu'" in message


# --- properties ---


@pytest.mark.parametrize("changes", [{}, {"score": "sigmoid"}, {"top_k": 4}, {"top_k": 1}], ids=str)
@pytest.mark.parametrize("kind", ["swiglu", "relu"])
def test_equal_experts_whose_weights_sum_to_one_are_the_dense_ffn(kind, changes):
    layer = made(CONFIG.but(expert=kind, **changes))
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    experts, x = layer.experts, torch.randn(3, 5, 8)
    gate, up, down = (None if w is None else w[0] for w in (experts.w_gate, experts.w_up, experts.w_down))
    dense = swiglu(x, gate, up, down) if kind == "swiglu" else mlp(x, up, down)
    assert_close(layer(x)[0], dense, rtol=1e-5, atol=1e-5)


@PROPERTY
@given(configs(), st.permutations(range(9)))
def test_tokens_in_another_order_give_the_same_in_that_order(config, order):
    layer = made(config.but(capacity_factor=None)).eval()
    x = torch.randn(9, config.d_model)
    (y, routing), (y_permuted, routing_permuted) = layer(x), layer(x[order])
    assert torch.equal(routing_permuted.topk_experts, routing.topk_experts[order])
    assert_close(y_permuted, y[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_without_a_capacity_a_token_does_not_depend_on_its_batch(changes):
    layer = made(CONFIG.but(**changes).but(capacity_factor=None)).eval()
    x = torch.randn(33, 8)
    y, routing = layer(x)
    for batch in ([5], [5, 5, 5], [0, 5], list(range(20))):
        part, part_routing = layer(x[batch])
        assert torch.equal(part_routing.topk_experts, routing.topk_experts[batch])  # sets and their order: exactly
        assert_close(part, y[batch], rtol=1e-5, atol=1e-6)  # sums of another length may differ in their last bits


def test_with_a_capacity_it_does():
    layer = made(CONFIG.but(top_k=1, normalise=False, capacity_factor=1.0))
    token = torch.randn(1, 8)
    x = token.repeat(8, 1)  # eight equal tokens, all for one expert that takes two
    y, routing = layer(x)
    alone = layer(token)[0]
    assert routing.tokens_per_expert.max() == 8
    assert_close(y[:2], alone.expand(2, 8))
    assert torch.equal(y[2:], torch.zeros(6, 8))  # dropped: the residual connection alone carries them


def test_with_a_capacity_a_later_token_can_take_an_earlier_ones_place():
    layer = made(MoEConfig(d_model=3, d_ff=4, n_experts=3, top_k=2, capacity_factor=1.0))
    layer.router.weight.data = torch.eye(3)
    first = torch.tensor([[2.0, 1.0, 0.0]])  # expert 0, then 1
    later = torch.tensor([[1.0, 2.0, 0.0]])  # expert 1, then 0
    alone, together = layer(first)[0], layer(torch.cat([first, later, later]))[0]  # each takes two
    assert not torch.allclose(alone[0], together[0])


@pytest.mark.parametrize("drop", ["position", "score"])
def test_a_token_with_no_place_gets_the_shared_experts_alone(drop):
    layer = made(CONFIG.but(capacity_factor=1e-9, drop=drop, **SHARED))
    x = torch.randn(20, 8)
    y, routing = layer(x)
    plan = layer.plan(routing)
    lost = plan.dropped.all(-1)
    assert plan.capacity == 1
    assert lost.any()
    assert torch.equal(y[lost], layer.shared(x)[lost])


def bits_that_differ(layer: MoE, x: Tensor, times: int) -> set[str]:
    upstream, seen = torch.randn(x.shape), []
    for _ in range(times):
        torch.manual_seed(3)
        y, _ = layer(x)
        seen.append({"y": y.detach(), **gradients(layer, y, x, upstream)})
    return {name for again in seen for name, value in again.items() if not torch.equal(value, seen[0][name])}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_same_input_gives_the_same_bits(changes):
    assert not bits_that_differ(made(CONFIG.but(**changes)), torch.randn(40, 8, requires_grad=True), times=2)


@pytest.mark.parametrize("changes", [{"expert_bias": True}, {"weigh": "input", "capacity_factor": 1.0}], ids=str)
def test_the_same_bits_with_two_threads_and_work_enough_for_both(changes):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer = made(MoEConfig(d_model=32, d_ff=32, n_experts=4, top_k=2, **changes))
        assert not bits_that_differ(layer, torch.randn(600, 32, requires_grad=True), times=3)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_an_expert_that_nobody_chooses_gets_zero_gradients(impl, kind):
    layer = made(CONFIG.but(expert=kind, expert_bias=True, logit_bias=True), impl)
    layer.router.bias.data = torch.tensor([0.0, -50.0, 0.0, 0.0])
    y, routing = layer(torch.randn(7, 8))
    y.sum().backward()
    assert routing.tokens_per_expert[1] == 0
    for name, parameter in layer.experts.named_parameters():
        assert torch.equal(parameter.grad[1], torch.zeros_like(parameter.grad[1])), name
        assert parameter.grad[[0, 2, 3]].any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_one_expert_can_take_everything(impl):
    layer = made(CONFIG.but(top_k=1, logit_bias=True), impl)
    layer.router.bias.data = torch.tensor([0.0, 0.0, 50.0, 0.0])
    x = torch.randn(11, 8)
    y, routing = layer(x)
    assert routing.tokens_per_expert.tolist() == [0, 0, 11, 0]
    assert_close(y, layer.experts.one(2, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(changes):
    for impl in here(GROUPED_MM):
        layer = made(CONFIG.but(**changes), impl)
        for shape in ((0, 8), (2, 0, 8), (0, 3, 8)):
            x = torch.zeros(shape, requires_grad=True)
            y, routing = layer(x)
            y.sum().backward()
            assert y.shape == x.grad.shape == shape
            assert routing.topk_experts.shape == (0, layer.config.top_k)
            assert routing.tokens_per_expert.tolist() == [0] * layer.config.n_experts
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_the_router_learns_from_one_expert_only_if_its_weight_can_change():
    for normalise, learns in ((True, False), (False, True)):
        layer = made(CONFIG.but(top_k=1, normalise=normalise))
        layer(torch.randn(9, 8))[0].square().sum().backward()
        size = layer.router.weight.grad.abs().max().item()
        assert (size > 1e-2) == learns
        assert learns or size < 1e-4  # 0 but for rounding


def test_the_selection_bias_is_no_business_of_gradients():
    layer = made(CONFIG.but(**VARIANTS["deepseek-v3"]))
    before = layer.router.selection_bias.clone()
    layer(torch.randn(9, 8))[0].sum().backward()
    assert layer.router.selection_bias.grad is None
    assert "router.selection_bias" not in dict(layer.named_parameters())
    assert torch.equal(layer.router.selection_bias, before)


def test_the_routing_is_in_the_order_of_the_tokens():
    layer, x = made(CONFIG), torch.randn(2, 3, 8)
    y, routing = layer(x)
    assert y.shape == x.shape
    for b in range(2):
        for s in range(3):
            alone = layer.router(x[b, s][None])
            assert torch.equal(routing.topk_experts[3 * b + s], alone.topk_experts[0])


@pytest.mark.parametrize("lay", [lambda x: x.mT.contiguous().mT, lambda x: x[:1].expand(3, 4, 8)], ids=["mT", "expand"])
@pytest.mark.parametrize("impl", IMPLS)
def test_how_the_input_lies_in_memory_does_not_matter(impl, lay):
    layer, x = made(CONFIG, impl), lay(torch.randn(3, 4, 8))
    assert_close(layer(x)[0], layer(x.contiguous())[0])


@pytest.mark.parametrize("frozen", ["router", "experts", "shared"])
def test_a_part_can_be_frozen(frozen):
    layer = made(CONFIG.but(**SHARED))
    getattr(layer, frozen).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    layer(x)[0].sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen)
    with torch.inference_mode():
        assert not layer(torch.randn(5, 8))[0].requires_grad


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"capacity_factor": 0.75},
        {"weigh": "input", "expert_bias": True},
        {"n_shared_experts": 1, "d_ff_shared": 2, "shared_gate": True},
    ],
    ids=str,
)
def test_the_gradients_of_the_whole_layer_in_fp64(changes, monkeypatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # routing is fp32 by design, too coarse for finite differences
    layer = made(CONFIG.but(d_model=3, d_ff=2, n_experts=3, **changes), "reference").double()
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def outputs(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(outputs, (x, *parameters))


# --- dtypes, devices, copies ---


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_in_bf16_it_is_the_fp32_layer_rounded_with_the_same_choices(changes):
    x = torch.randn(21, 16).bfloat16()
    for impl in here(GROUPED_MM):
        layer = made(CONFIG.but(**{"d_model": 16, "d_ff": 24} | changes), impl).bfloat16().eval()
        exact = copy.deepcopy(layer).float()
        (y, routing), (expected, exact_routing) = layer(x), exact(x.float())
        y.square().sum().backward()
        assert (y.dtype, routing.topk_weights.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(routing.topk_experts, exact_routing.topk_experts)  # routing is fp32 whatever the dtype
        assert torch.equal(routing.topk_weights, exact_routing.topk_weights)
        assert_close(y.float(), expected, rtol=0.05, atol=0.05)
        used = [p for name, p in layer.named_parameters() if name != "router.noise_weight"]  # no noise in eval mode
        assert {p.grad.dtype for p in used} == {torch.bfloat16}
        assert all(p.grad.isfinite().all() for p in used)


def test_in_fp64_the_experts_compute_in_fp64_and_the_router_in_fp32():
    layer, x = made(CONFIG).double(), torch.randn(7, 8, dtype=torch.float64)
    y, routing = layer(x)
    assert (y.dtype, routing.router_logits.dtype) == (torch.float64, torch.float32)
    assert_close(y, by_definition(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_copy_and_a_reloaded_layer_compute_the_same_bits(changes, tmp_path):
    layer, x = made(CONFIG.but(**changes)).eval(), torch.randn(9, 8)
    y, routing = layer(x)
    fresh = MoE(layer.config)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    fresh.load_state_dict(torch.load(tmp_path / "layer.pt"))
    torch.save(layer, tmp_path / "whole.pt")
    for other in (copy.deepcopy(layer), fresh.eval(), torch.load(tmp_path / "whole.pt", weights_only=False)):
        got, other_routing = other(x)
        assert torch.equal(got, y)
        assert torch.equal(other_routing.topk_weights, routing.topk_weights)


@pytest.mark.parametrize("impl", IMPLS)
def test_it_works_under_autocast_on_either_kind_of_input(impl):
    skip_bf16_in_the_interpreter(impl)
    layer, tokens = made(CONFIG.but(d_model=16, d_ff=24, **SHARED), impl), torch.randn(9, 16).bfloat16()
    expected, exact_routing = layer(tokens.float())
    for dtype in (torch.float32, torch.bfloat16):
        x = tokens.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, routing = layer(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16  # as nn.Linear and with it the dense FFN
        assert x.grad.dtype == dtype
        assert torch.equal(routing.router_logits, exact_routing.router_logits)
        assert_close(y.float(), expected, rtol=0.05, atol=0.05)


# Nothing on the meta device can be read, so what works there never waits for a GPU.
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_sorted_path_makes_no_host_sync_forward_or_backward(changes):
    with torch.device("meta"):
        layer = MoE(CONFIG.but(**{"d_model": 16, "d_ff": 24} | changes), "torch").bfloat16()
        x = torch.empty(2, 7, 16, dtype=torch.bfloat16, requires_grad=True)
    y, routing = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (2, 7, 16)
    assert routing.tokens_per_expert.shape == (layer.config.n_experts,)
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("how", [{"impl": "padded"}, {"impl": "reference"}, {"impl": "torch", "check_finite": True}])
def test_what_reads_sizes_or_checks_numbers_does_sync_as_it_says(how):
    with torch.device("meta"):
        layer = MoE(MoEConfig(d_model=16, d_ff=24, n_experts=4, top_k=2), **how).bfloat16()
        x = torch.empty(7, 16, dtype=torch.bfloat16)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        layer(x)


def test_a_layer_can_be_made_without_memory_and_filled_later():
    with torch.device("meta"):
        empty = MoE(CONFIG.but(**VARIANTS["deepseek-v3"], **SHARED))
    full = made(empty.config)
    empty.to_empty(device="cpu").load_state_dict(full.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(empty(x)[0], full(x)[0])


# --- bad input ---


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(8), r"x has shape \(8,\): expected \(\.\.\., T, D\) with D = d_model=8"),
        (torch.zeros(()), r"x has shape \(\): expected"),
        (torch.zeros(3, 7), r"x has shape \(3, 7\): expected .* d_model=8"),
        (torch.zeros(8, 3), r"x has shape \(8, 3\): expected .* d_model=8"),
        (torch.zeros(2, 3, 9), r"x has shape \(2, 3, 9\): expected .* d_model=8"),
        (torch.zeros(3, 8).bfloat16(), r"x is torch\.bfloat16, the layer torch\.float32: convert one of them"),
        (torch.zeros(3, 8).double(), r"x is torch\.float64, the layer torch\.float32"),
        (torch.zeros(3, 8, dtype=torch.int64), r"x is torch\.int64, the layer torch\.float32"),
        (torch.zeros(3, 8, device="meta"), r"x is on meta, the layer on cpu: move one of them"),
    ],
)
@pytest.mark.parametrize("changes", [{}, SHARED, {"capacity_factor": 1.0, "weigh": "input"}], ids=str)
def test_an_input_that_does_not_fit_is_refused(changes, x, message):
    with pytest.raises(ValueError, match=message):
        MoE(CONFIG.but(**changes))(x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_on_a_cpu_with_its_place(value):
    x = torch.zeros(2, 3, 8)
    x[1, 0, 4] = value
    with pytest.raises(
        ValueError, match=r"router_logits: 4 of 24 are NaN or infinite, in 1 of 6 tokens; .* at token 3"
    ):
        made(CONFIG)(x)


def test_a_nan_weight_of_the_router_is_refused_not_routed():
    layer = made(CONFIG)
    layer.router.weight.data[2] = float("nan")
    with pytest.raises(ValueError, match=r"5 of 20 are NaN or infinite, in 5 of 5 tokens; .* at token 0, expert 2"):
        layer(torch.randn(5, 8))


# On another device nothing refuses it unless `check_finite` asks for it. No such device is needed to see what follows.
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_an_unchecked_nan_reaches_the_output_of_its_token_alone(changes, monkeypatch):
    monkeypatch.setattr("moe_lab.routing.require_finite", lambda logits: None)
    layer, x = made(CONFIG.but(**changes).but(capacity_factor=None)).eval(), torch.randn(6, 8)
    clean = layer(x)[0]
    x[4, 1] = float("nan")
    y = layer(x)[0]
    assert y.isnan().any(-1).tolist() == [False, False, False, False, True, False]
    assert_close(y[[0, 1, 2, 3, 5]], clean[[0, 1, 2, 3, 5]], rtol=1e-5, atol=1e-6)


def test_an_unchecked_nan_logit_reaches_the_output_even_where_its_token_is_fine(monkeypatch):
    monkeypatch.setattr("moe_lab.routing.require_finite", lambda logits: None)
    for changes in ({}, {"score": "sigmoid", "normalise": False}):
        layer, x = made(CONFIG.but(**changes)), torch.randn(6, 8)
        layer.router.weight.data[3] = float("nan")
        assert layer(x)[0].isnan().any(-1).all()


def test_functions_of_the_slow_versions_take_any_expert():
    routing = made(CONFIG).router(torch.randn(5, 8))
    x = torch.randn(5, 8)
    twice = moe_reference(x, routing, lambda e, tokens: 2 * tokens)
    assert_close(twice, 2 * x)
    assert_close(moe_loop(x, routing, lambda e, tokens: 2 * tokens), 2 * x)
    counted = moe_loop(x, routing, lambda e, tokens: torch.full_like(tokens, e))
    expected = (routing.topk_weights * routing.topk_experts).sum(-1)
    assert_close(counted, expected[:, None].expand(5, 8))


# --- experts that choose ---

CHOOSING = CONFIG.but(expert_choice=True)
CHOOSERS = {
    "plain": {},
    "top-1": {"top_k": 1},
    "every expert every token": {"top_k": 4},
    "one expert": {"n_experts": 1, "top_k": 1},
    "half the capacity": {"capacity_factor": 0.5},
    "twice the capacity": {"capacity_factor": 2.0},
    "more capacity than tokens": {"capacity_factor": 99.0},
    "almost no capacity": {"capacity_factor": 1e-9},
    "logit bias": {"logit_bias": True},
    "gpt-oss": {"expert": "clamped_swiglu", "expert_bias": True, "logit_bias": True},
    "gelu, biased": {"expert": "gelu", "expert_bias": True},
    "shared": {"n_shared_experts": 2, "d_ff_shared": 24},
    "shared, gated": {"n_shared_experts": 1, "d_ff_shared": 20, "shared_gate": True},
    "noise": {"noisy_top_k": True, "input_jitter": 0.1},
}


def made_to_choose(config: MoEConfig, impl: str = "auto") -> ExpertChoiceMoE:
    layer = ExpertChoiceMoE(config, impl)
    layer.load_state_dict(made(config).state_dict())
    return layer


def chosen_by_definition(layer: ExpertChoiceMoE, x: Tensor) -> Tensor:
    """Zhou et al. 2022, section 3.2, slowly: each expert goes through its tokens, the best first, until it is full."""
    config, tokens = layer.config, x.reshape(-1, x.shape[-1])
    scores = layer.router.logits(tokens).softmax(-1)
    capacity = expert_capacity(len(tokens), config.top_k, config.n_experts, config.capacity_factor or 1.0)
    rows = [torch.zeros_like(token) for token in tokens]
    for e in range(config.n_experts):
        ranked = sorted(range(len(tokens)), key=lambda t, e=e: (-scores[t, e].item(), t))
        for t in ranked[:capacity]:
            rows[t] = rows[t] + scores[t, e] * layer.experts.one(e, tokens[t])
    y = torch.stack(rows) if rows else torch.zeros_like(tokens)
    if config.n_shared_experts:
        y = y + shared_by_definition(layer, tokens)
    return y.view_as(x)


@pytest.mark.parametrize("changes", CHOOSERS.values(), ids=CHOOSERS)
@pytest.mark.parametrize("impl", IMPLS)
def test_experts_choose_by_definition_in_outputs_and_every_gradient(impl, changes):
    for shape in ((1, 8), (2, 5, 8)):
        layer = made_to_choose(CHOOSING.but(**changes), impl)
        slow, upstream, x = copy.deepcopy(layer), torch.randn(shape), torch.randn(shape, requires_grad=True)
        slow_x = x.detach().clone().requires_grad_()
        torch.manual_seed(1)  # the same noise for both
        y, choice = layer(x)
        torch.manual_seed(1)
        expected = chosen_by_definition(slow, slow_x)
        assert isinstance(choice, ExpertChoice)
        assert_close(y, expected, rtol=1e-4, atol=1e-5)
        wanted = gradients(slow, expected, slow_x, upstream)
        assert_same_gradients(gradients(layer, y, x, upstream), wanted, 1e-4)


@PROPERTY
@given(st.integers(0, 9), st.integers(1, 5), st.sampled_from([None, 0.3, 1.0, 1.25, 4.0]), st.data())
def test_every_choosing_layer_that_can_be_works_and_is_balanced(n_tokens, n_experts, factor, data):
    k = data.draw(st.integers(1, n_experts))
    layer = made_to_choose(CHOOSING.but(n_experts=n_experts, top_k=k, capacity_factor=factor, d_model=5, d_ff=7))
    x = torch.randn(n_tokens, 5)
    y, choice = layer(x)
    assert_close(y, chosen_by_definition(layer, x), rtol=1e-4, atol=1e-5)
    share = min(n_tokens, expert_capacity(n_tokens, k, n_experts, factor or 1.0))
    assert choice.tokens_per_expert.tolist() == [share] * n_experts
    assert choice.mask.sum(0).tolist() == [share] * n_experts


@pytest.mark.parametrize(
    ("n_tokens", "k", "factor", "capacity"), [(10, 2, None, 5), (10, 2, 0.3, 2), (10, 1, None, 3), (10, 2, 9.0, 10)]
)
def test_an_expert_takes_its_even_share_of_the_choices(n_tokens, k, factor, capacity):
    choice = made_to_choose(CHOOSING.but(top_k=k, capacity_factor=factor))(torch.randn(n_tokens, 8))[1]
    assert choice.tokens.shape == choice.weights.shape == (4, capacity)  # ceil(T k / 4 · factor), at most T


def test_with_room_for_all_it_is_the_mixture_of_all_experts():
    layer, x = made_to_choose(CHOOSING.but(top_k=4)), torch.randn(6, 8)
    weights = layer.router.logits(x).softmax(-1)
    dense = sum(weights[:, e, None] * layer.experts.one(e, x) for e in range(4))
    assert_close(layer(x)[0], dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [{}, SHARED], ids=["alone", "shared"])
def test_a_token_may_get_many_experts_or_none(shared):
    layer, x = made_to_choose(CHOOSING.but(top_k=1, **shared)), torch.randn(40, 8)
    y, choice = layer(x)
    visits = choice.mask.sum(1)
    assert visits.min() == 0
    assert visits.max() > 1
    left = layer.shared(x) if shared else torch.zeros_like(x)
    assert torch.equal(y[visits == 0], left[visits == 0])


def earlier_outputs_that_change(layer: MoE) -> int:
    """How many of the first ten tokens' outputs change when the ten after them become others."""
    x = torch.randn(20, 8)
    edited = torch.cat([x[:10], torch.randn(10, 8)])
    return int((layer(x)[0][:10] - layer(edited)[0][:10]).abs().gt(1e-5).any(-1).sum())


def test_whether_a_token_is_taken_depends_on_those_after_it():
    assert earlier_outputs_that_change(made_to_choose(CHOOSING)) >= 3
    assert earlier_outputs_that_change(made(CONFIG)) == 0


def test_the_order_of_tokens_does_not_matter_to_experts_that_choose():
    layer, x, order = made_to_choose(CHOOSING), torch.randn(9, 8), torch.randperm(9)
    assert_close(layer(x[order])[0], layer(x)[0][order], rtol=1e-4, atol=1e-5)


def test_of_equal_tokens_the_earliest_are_taken():
    layer = made_to_choose(CHOOSING)
    y, choice = layer(torch.randn(1, 8).repeat(10, 1))
    assert choice.tokens.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert not y[5:].any()


def test_experts_that_choose_give_the_same_bits_twice_and_work_in_bf16():
    layer, x = made_to_choose(CHOOSING.but(d_model=16, d_ff=24, **SHARED)), torch.randn(21, 16)
    assert not bits_that_differ(layer, x.requires_grad_(), times=2)
    expected, exact = layer(x.bfloat16().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, choice = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(choice.tokens, exact.tokens)  # the router is fp32 whatever the dtype
    assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    half, x = made_to_choose(layer.config).bfloat16(), x.detach().bfloat16()
    half_y, half_choice = half(x)
    assert (half_y.dtype, half_choice.weights.dtype) == (torch.bfloat16, torch.float32)


def test_experts_that_choose_make_no_host_sync():
    with torch.device("meta"):
        layer = ExpertChoiceMoE(CHOOSING.but(d_model=16, d_ff=24), "torch").bfloat16()
        x = torch.empty(2, 7, 16, dtype=torch.bfloat16, requires_grad=True)
    y, choice = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (2, 7, 16)
    assert choice.tokens.shape == (4, 7)


def test_experts_that_choose_refuse_what_the_others_refuse():
    layer = made_to_choose(CHOOSING)
    with pytest.raises(ValueError, match=r"x has shape \(3, 7\): expected .* d_model=8"):
        layer(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"x is torch\.float64, the layer torch\.float32"):
        layer(torch.zeros(3, 8).double())
    with pytest.raises(ValueError, match=r"router_logits: 4 of 12 are NaN or infinite, in 1 of 3 tokens"):
        layer(torch.zeros(3, 8).index_fill(0, torch.tensor(1), float("nan")))
