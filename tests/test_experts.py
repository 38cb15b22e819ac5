import copy
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from variants import each, skip_bf16_in_the_interpreter

from moe_lab.accounting import expert_parameters
from moe_lab.config import EXPERT_KINDS, MoEConfig
from moe_lab.experts import Experts, clamped_swiglu
from moe_lab.ffn import ACTIVATIONS, swiglu
from moe_lab.ops import GROUPED_MM

CONFIG = MoEConfig(d_model=8, d_ff=12, n_experts=4, top_k=2)
UGLY = CONFIG.but(d_model=5, d_ff=7)
IMPLS = each(GROUPED_MM)
TAKES_ALL = ("reference", "padded", "auto")
COUNTS = [
    [3, 1, 0, 5],
    [0, 0, 6, 0],  # one takes all
    [0, 1, 0, 0],
    [0, 0, 0, 0],  # no rows
    [2, 2, 2, 2],
]


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32)


def made(config: MoEConfig, impl: str = "reference") -> Experts:
    torch.manual_seed(0)
    experts = Experts(config, impl)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if name.startswith("b_"):  # they start at 0, where a mistake in them would not show
                parameter.normal_()
    return experts


def by_group(experts: Experts, rows: Tensor, counts: list[int]) -> Tensor:
    groups = rows.split(counts)
    return torch.cat([experts.one(e, group) for e, group in enumerate(groups)])


def assert_agrees(experts: Experts, counts: list[int], tolerance: float = 1e-4) -> None:
    slow = copy.deepcopy(experts)
    width = experts.w_down.shape[1]
    rows = torch.randn(sum(counts), width, dtype=experts.w_down.dtype, requires_grad=True)
    slow_rows = rows.detach().clone().requires_grad_()
    y, expected = experts(rows, offsets_of(counts)), by_group(slow, slow_rows, counts)
    assert_close(y, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    assert_close(rows.grad, slow_rows.grad, rtol=tolerance, atol=tolerance)
    for (name, ours), theirs in zip(experts.named_parameters(), slow.parameters(), strict=True):
        say = lambda text, name=name: f"{name}, {counts}: {text}"  # noqa: E731
        assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance, msg=say)
        empty = torch.tensor(counts) == 0
        assert not ours.grad[empty].any(), f"{name} of an expert without rows"


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_all_together_are_each_alone_in_values_and_gradients(impl, kind, bias):
    for counts in COUNTS:
        assert_agrees(made(CONFIG.but(expert=kind, expert_bias=bias), impl), counts)
        ugly = impl if impl in TAKES_ALL else "auto"
        assert_agrees(made(UGLY.but(expert=kind, expert_bias=bias), ugly), counts)


@pytest.mark.parametrize("impl", ["reference", "padded"])
def test_in_fp64_they_agree_to_its_precision(impl):
    assert_agrees(made(UGLY.but(expert_bias=True), impl).double(), COUNTS[0], 1e-12)


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("impl", ["reference", "padded"])
def test_gradients_in_fp64(impl, kind):
    experts = made(MoEConfig(d_model=3, d_ff=2, n_experts=3, top_k=1, expert=kind, expert_bias=True), impl).double()
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*experts.named_parameters(), strict=True)

    def outputs(rows: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(experts, dict(zip(names, values, strict=True)), (rows, offsets_of([2, 0, 3])))

    assert torch.autograd.gradcheck(outputs, (rows, *values))


def test_one_swiglu_expert_is_swiglu():
    experts, x = made(CONFIG), torch.randn(2, 3, 8)
    for e in range(4):
        expected = swiglu(x, experts.w_gate[e], experts.w_up[e], experts.w_down[e])
        assert_close(experts.one(e, x), expected)


@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_one_plain_expert_is_two_linear_layers(kind):
    experts, x = made(CONFIG.but(expert=kind, expert_bias=True)), torch.randn(2, 3, 8)
    for e in range(4):
        hidden = ACTIVATIONS[kind](F.linear(x, experts.w_up[e], experts.b_in[e]))
        assert_close(experts.one(e, x), F.linear(hidden, experts.w_down[e], experts.b_down[e]))
    assert experts.w_gate is None


def test_a_biased_gated_expert_adds_its_own_biases_everywhere():
    experts, x = made(CONFIG.but(expert_bias=True)), torch.randn(3, 8)
    for e in range(4):
        b_gate, b_up = experts.b_in[e].chunk(2)
        hidden = F.silu(F.linear(x, experts.w_gate[e], b_gate)) * F.linear(x, experts.w_up[e], b_up)
        assert_close(experts.one(e, x), F.linear(hidden, experts.w_down[e], experts.b_down[e]))


# (up + 1) · gate · sigmoid(1.702 gate), gate at most 7, up in [-7, 7]: openai/gpt-oss, gpt_oss/torch/model.py, `swiglu`
@pytest.mark.parametrize(
    ("gate", "up", "gate_after", "up_after"),
    [
        (1.0, 2.0, 1.0, 2.0),
        (9.0, 8.0, 7.0, 7.0),
        (-9.0, -8.0, -9.0, -7.0),
        (0.0, 5.0, 0.0, 5.0),
        (7.0, -1.0, 7.0, -1.0),
    ],
)
def test_the_clamped_gate_by_hand(gate, up, gate_after, up_after):
    sigmoid = 1 / (1 + torch.exp(torch.tensor(-1.702 * gate_after)))
    assert_close(clamped_swiglu(torch.tensor(gate), torch.tensor(up)), (up_after + 1) * gate_after * sigmoid)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_parameters_are_counted_and_stacked_by_expert(kind, bias):
    config = UGLY.but(expert=kind, expert_bias=bias)
    experts = Experts(config)
    assert sum(p.numel() for p in experts.parameters()) == config.n_experts * expert_parameters(config)
    assert {len(p) for p in experts.parameters()} == {config.n_experts}
    assert experts.w_up.shape == (4, 7, 5)
    assert experts.w_down.shape == (4, 5, 7)
    assert (experts.w_gate is not None) == ("swiglu" in kind)


def test_new_experts_keep_the_size_of_what_they_read_and_have_no_bias():
    torch.manual_seed(0)
    experts = Experts(MoEConfig(d_model=64, d_ff=256, n_experts=4, top_k=2, expert_bias=True))
    for weight, fan_in in ((experts.w_gate, 64), (experts.w_up, 64), (experts.w_down, 256)):
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
    experts.b_down.data += 1
    experts.reset_parameters()
    assert not experts.b_in.any()
    assert not experts.b_down.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_experts_are_those_of_fp32_rounded(dtype, impl):
    skip_bf16_in_the_interpreter(impl, dtype)
    experts = made(MoEConfig(d_model=16, d_ff=24, n_experts=4, top_k=2, expert_bias=True), impl).to(dtype)
    exact = copy.deepcopy(experts).double()
    exact.impl = "reference"
    rows = torch.randn(9, 16).to(dtype)
    y = experts(rows, offsets_of([4, 0, 5, 0]))
    y.square().sum().backward()
    expected = exact(rows.double(), offsets_of([4, 0, 5, 0]))
    expected.square().sum().backward()
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert_close(y.double(), expected, rtol=8 * eps, atol=8 * eps)
    for ours, theirs in zip(experts.parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == dtype
        assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=4 * eps * theirs.grad.abs().max().item())


@pytest.mark.parametrize("impl", [impl for impl in GROUPED_MM if impl != "triton"])  # the interpreter is one thread
def test_the_same_bits_every_time_also_with_two_threads_and_biases(impl):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        experts = made(MoEConfig(d_model=32, d_ff=32, n_experts=3, top_k=1, expert_bias=True), impl)
        rows, upstream, seen = torch.randn(2000, 32), torch.randn(2000, 32), []
        for _ in range(5):
            y = experts(rows, offsets_of([200, 0, 1800]))
            seen.append((y, *torch.autograd.grad(y, list(experts.parameters()), upstream)))
    finally:
        torch.set_num_threads(threads)
    names = ["y", *(name for name, _ in experts.named_parameters())]
    differ = {n for again in seen for n, a, b in zip(names, seen[0], again, strict=True) if not torch.equal(a, b)}
    assert not differ


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="impl='loop': expected one of auto, reference"):
        made(CONFIG, "loop")(torch.zeros(1, 8), offsets_of([1, 0, 0, 0]))


def test_taken_experts_are_copies_in_the_order_asked_for_and_frozen_if_these_were():
    experts = Experts(MoEConfig(d_model=4, d_ff=2, n_experts=4, top_k=1, expert="relu", expert_bias=True))
    experts.w_in.requires_grad_(False)
    taken, x = experts.take([3, 0]), torch.randn(5, 4)
    for place, expert in enumerate((3, 0)):
        assert torch.equal(taken.one(place, x), experts.one(expert, x))
    assert [weight.requires_grad for weight in taken.parameters()] == [
        weight.requires_grad for weight in experts.parameters()
    ]
    with torch.no_grad():
        taken.w_down.zero_()
    assert experts.w_down.count_nonzero() > 0
    taken.register_forward_hook(lambda *_: pytest.fail("a hook of the copy was called for the original"))
    experts(torch.randn(4, 4), torch.arange(1, 5, dtype=torch.int32))
