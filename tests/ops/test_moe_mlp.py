"""The fused block against its steps, the layer's definition, and Liger's block: outputs and every gradient."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import product as every

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from variants import INTERPRETS, each, interpreted

from moe_lab.config import MoEConfig
from moe_lab.dispatch import sort_choices
from moe_lab.ffn import swiglu
from moe_lab.moe import MoE, moe_reference
from moe_lab.ops import MOE_MLP, moe_mlp
from moe_lab.ops.tiles import Tile, Tiles
from moe_lab.records import DispatchPlan, Routing

# Hypothesis shares the fixtures between its examples, which is what is wanted here.
PROPERTY = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = ("x", "w_in", "w_down", "weights")


def ids_of(n_tokens: int, n_experts: int, top_k: int, among: list[int] | None = None) -> Tensor:
    """(T, K) distinct experts for each token, chosen at random from some of them."""
    among = among or list(range(n_experts))
    order = torch.rand(n_tokens, len(among)).argsort(-1)[:, :top_k]
    return torch.tensor(among)[order]


# T, D, F, E, K, and the experts that are chosen at all. Interpreted tiles are 16 rows, 16 columns and 16 deep.
CASES = {
    "one token": (1, 16, 16, 4, 2, None),
    "one number of everything": (1, 1, 1, 1, 1, None),
    "no token": (0, 8, 8, 3, 2, None),
    "nothing that a block divides": (13, 19, 21, 5, 3, None),
    "empty experts": (9, 20, 24, 9, 2, [1, 4, 7]),
    "one expert takes all": (35, 8, 9, 4, 1, [2]),
    "all experts for everybody": (6, 33, 17, 3, 3, None),
    "what blocks divide": (16, 32, 32, 4, 2, None),
    "an odd D and an even F": (10, 7, 32, 4, 2, None),
    "an even D and an odd F": (10, 32, 7, 4, 2, None),
    "rows of 16 bytes": (13, 20, 12, 5, 3, None),
    "many tiles": (64, 18, 40, 8, 2, None),
}


def made(
    n_tokens: int, d_model: int, width: int, n_experts: int, top_k: int, among: list[int] | None, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """x, w_in, w_down, weights; and who chose whom. A token's weights sum to anything, and some are below zero."""
    torch.manual_seed(0)
    ids = ids_of(n_tokens, n_experts, top_k, among)
    x = torch.randn(n_tokens, d_model)
    w_in = torch.randn(n_experts, 2 * width, d_model) * d_model**-0.5
    w_down = torch.randn(n_experts, d_model, width) * width**-0.5
    return [*(t.to(dtype) for t in (x, w_in, w_down)), torch.randn(n_tokens, top_k) + 0.5], ids


def run(tensors: list[Tensor], plan: DispatchPlan, upstream: Tensor, impl: str, needs=NAMES) -> dict[str, Tensor]:
    """The output and the gradients of what needs one."""
    leaves = [t.detach().requires_grad_(name in needs) for name, t in zip(NAMES, tensors, strict=True)]
    y = moe_mlp(*leaves[:3], plan, leaves[3], impl)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(y, wanted, upstream.to(y.dtype)) if wanted else ()
    names = [name for name, leaf in zip(NAMES, leaves, strict=True) if leaf.requires_grad]
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def by_definition(tensors: list[Tensor], ids: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """`moe_reference`, in fp64: every expert on every token."""
    x, w_in, w_down, weights = leaves = [t.detach().double().requires_grad_() for t in tensors]
    n_experts = len(w_in)
    scores = torch.zeros(len(x), n_experts)
    w_gate, w_up = w_in.chunk(2, 1)
    y = moe_reference(x, Routing(scores, scores, weights, ids), lambda e, x: swiglu(x, w_gate[e], w_up[e], w_down[e]))
    return {"y": y.detach(), **dict(zip(NAMES, torch.autograd.grad(y, leaves, upstream.double()), strict=True))}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name in got:
        largest = wanted[name].abs().max().item() if wanted[name].numel() else 0.0
        assert_close(
            got[name].double(), wanted[name].double(), rtol=tolerance, atol=tolerance * max(1.0, largest),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def tolerance_of(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 6 * torch.finfo(dtype).eps


# --- Values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("impl", each(MOE_MLP))
def test_output_and_gradients_are_those_of_the_definition_on_memory_that_is_not_clean(impl, case, dtype, poison):
    tensors, ids = made(*case, dtype)
    upstream = torch.randn(case[0], case[1]).to(dtype)
    plan = sort_choices(ids, case[3])
    got = run(tensors, plan, upstream, impl)
    assert_same(got, by_definition(tensors, ids, upstream), tolerance_of(dtype))
    assert_same(got, run([t.double() for t in tensors], plan, upstream, "reference"), tolerance_of(dtype))
    assert [got[name].dtype for name in NAMES] == [t.dtype for t in tensors]
    unseen = torch.bincount(ids.flatten(), minlength=case[3]) == 0
    assert not got["w_in"][unseen].any()  # zero: neither None nor NaN
    assert not got["w_down"][unseen].any()


@pytest.mark.parametrize("impl", each(MOE_MLP))
@PROPERTY
@given(st.data())
def test_any_choice_of_experts(impl, poison, data):
    n_experts = data.draw(st.integers(1, 6))
    n_tokens, top_k = data.draw(st.integers(1, 20)), data.draw(st.integers(1, n_experts))
    sizes = [data.draw(st.integers(1, 36)) for _ in range(2)]
    tensors, ids = made(n_tokens, *sizes, n_experts, top_k, None, torch.float32)
    ids = ids % data.draw(st.integers(1, n_experts))  # also a token that chooses an expert twice
    upstream = torch.randn(n_tokens, sizes[0])
    got = run(tensors, sort_choices(ids, n_experts), upstream, impl)
    assert_same(got, by_definition(tensors, ids, upstream), 1e-5)


TILES = {
    "wide": Tiles(Tile(16, 32, 16, 1, 1), Tile(16, 64, 32, 1, 1), Tile(16, 32, 64, 1, 1), Tile(32, 16, 64, 1, 1)),
    "high": Tiles(Tile(32, 16, 64, 1, 1), Tile(32, 16, 16, 1, 1), Tile(32, 16, 32, 1, 1), Tile(16, 64, 16, 1, 1)),
    "wide, descriptors": Tiles(*3 * [Tile(16, 32, 16, 1, 1)], Tile(32, 16, 64, 1, 1), tma=True),
    "high, descriptors": Tiles(*3 * [Tile(32, 16, 64, 1, 1)], Tile(16, 64, 16, 1, 1), tma=True),
}


@interpreted
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("case", ["nothing that a block divides", "rows of 16 bytes", "one expert takes all"])
def test_tiles_of_any_shape_give_the_same(case, tiles, poison, launched, monkeypatch):
    from moe_lab.ops import launches

    monkeypatch.setattr(launches, "_n_processors", lambda _: 3)  # so that a program has several tiles to do
    tensors, ids = made(*CASES[case], torch.float32)
    upstream = torch.randn_like(tensors[0])
    with launches.using(tiles, band=2):
        got = run(tensors, sort_choices(ids, CASES[case][3]), upstream, "triton")
    assert_same(got, by_definition(tensors, ids, upstream), 1e-5)
    _, d_model, width, *_ = CASES[case]  # in fp32 four numbers have 16 bytes
    assert ("gate_up_tma" in launched) == (tiles.tma and d_model % 4 == 0)
    assert ("grouped_product_tma" in launched) == (tiles.tma and d_model % 4 == width % 4 == 0)


@interpreted
@pytest.mark.parametrize("tiles", ["wide", "wide, descriptors"])
def test_what_lies_beside_a_row_does_not_come_in(tiles, poison):
    """Descriptors give 0 past the end of a matrix's row; but NaN times 0 is NaN."""
    from moe_lab.ops import launches

    case = CASES["rows of 16 bytes"]
    assert case[1] % TILES[tiles].gate_up.depth
    tensors, ids = made(*case, torch.float32)
    upstream = torch.randn_like(tensors[0])
    wanted = by_definition(tensors, ids, upstream)
    tensors[0] = torch.cat([tensors[0], torch.full((len(tensors[0]), 4), float("nan"))], 1)[:, :-4]
    with launches.using(TILES[tiles]):
        got = run(tensors, sort_choices(ids, case[3]), upstream, "triton")
    assert_same(got, wanted, 1e-5)


@pytest.mark.parametrize("impl", each(MOE_MLP))
def test_weights_in_the_dtype_of_x_and_autocast(impl, poison):
    tensors, ids = made(*CASES["what blocks divide"], torch.float16)
    tensors[3] = tensors[3].half()
    upstream = torch.randn_like(tensors[0])
    plan = sort_choices(ids, 4)
    got = run(tensors, plan, upstream, impl)
    assert_same(got, by_definition(tensors, ids, upstream), tolerance_of(torch.float16))
    assert got["weights"].dtype == torch.float16
    whole = [t.float().requires_grad_() for t in tensors]
    with torch.autocast("cpu", dtype=torch.float16):
        y = moe_mlp(*whole[:3], plan, whole[3], impl)
    assert y.dtype == torch.float16
    y.backward(upstream)
    assert {t.grad.dtype for t in whole} == {torch.float32}
    assert_same({"y": y, "w_in": whole[1].grad}, by_definition(tensors, ids, upstream), tolerance_of(torch.float16))


def every_other(numbers: Tensor) -> Tensor:
    return torch.stack([numbers, torch.zeros_like(numbers)], -1).flatten()[::2]


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "the same row for all, expanded": lambda x: x[..., :1, :].expand(x.shape),
    "from the second number on": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("impl", each(MOE_MLP))
def test_how_tensors_lie_in_memory_does_not_matter(impl, layout, poison):
    tensors, ids = made(7, 12, 10, 3, 2, None, torch.float32)
    tensors = [layout(t) for t in tensors]
    upstream = layout(torch.randn(7, 12))
    plan = sort_choices(ids, 3)
    strided = DispatchPlan(every_other(plan.row_choices), plan.choice_rows, every_other(plan.offsets))
    got = run(tensors, strided, upstream, impl)
    assert_same(got, by_definition(tensors, ids, upstream), 1e-5)


@pytest.mark.parametrize("impl", each(MOE_MLP))
def test_a_sum_can_be_differentiated(impl, poison):
    tensors, ids = made(7, 12, 10, 3, 2, None, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    moe_mlp(*leaves[:3], sort_choices(ids, 3), leaves[3], impl).sum().backward()
    wanted = by_definition(tensors, ids, torch.ones(7, 12))
    assert_same(dict(zip(NAMES, (t.grad for t in leaves), strict=True)), wanted, 1e-5)


@pytest.mark.parametrize("impl", each(MOE_MLP))
def test_what_is_not_finite_stays_with_its_token_and_an_unread_matrix_does_no_harm(impl, poison):
    tensors, ids = made(20, 17, 18, 4, 2, [0, 1, 3], torch.float32)
    tensors[0][5] = float("inf")
    tensors[1][2] = tensors[2][2] = float("nan")  # the empty expert's
    got = run(tensors, sort_choices(ids, 4), torch.ones(20, 17), impl)
    for name in ("y", "x"):
        assert torch.where(~got[name].isfinite().all(-1))[0].tolist() == [5]
    assert not got["w_in"][2].any()


@interpreted
def test_the_same_bits_every_time(poison):
    tensors, ids = made(*CASES["many tiles"], torch.float32)
    upstream = torch.randn_like(tensors[0])
    one, other = (run(tensors, sort_choices(ids, 8), upstream, "triton") for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@interpreted
@pytest.mark.parametrize("case", ["nothing that a block divides", "what blocks divide", "empty experts"])
def test_ligers_fused_block_says_the_same(case, monkeypatch):
    """An oracle that shares no line with ours (Hsu et al. 2024, Liger Kernel, `liger_kernel.ops.fused_moe`)."""
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")
    liger = pytest.importorskip(
        "liger_kernel.ops.fused_moe", reason='NOT COMPARED WITH LIGER: it is not installed (pip install -e ".[test]")'
    )
    tensors, ids = made(*CASES[case], torch.float32)
    upstream = torch.randn_like(tensors[0])
    ours = run(tensors, sort_choices(ids, CASES[case][3]), upstream, "triton")
    x, w_in, w_down, weights = leaves = [t.detach().requires_grad_() for t in tensors]
    y = liger.LigerFusedMoEFunction.apply(x, w_in, w_down, ids.int(), weights)
    grads = torch.autograd.grad(y, leaves, upstream)
    assert_same(ours, {"y": y.detach(), **dict(zip(NAMES, grads, strict=True))}, 3e-6)


# --- What is kept and what is not computed --------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(
    "needs",
    [[name for name, on in zip(NAMES, chosen, strict=True) if on] for chosen in every([True, False], repeat=4)],
    ids="+".join,
)
def test_what_is_frozen_costs_nothing_and_changes_nothing(needs, poison, launched):
    tensors, ids = made(5, 18, 12, 3, 2, None, torch.float32)
    upstream = torch.randn(5, 18)
    got = run(tensors, sort_choices(ids, 3), upstream, "triton", needs)
    assert list(got) == ["y", *needs]
    assert_same(got, by_definition(tensors, ids, upstream), 1e-5)
    assert ((10, 24) in poison.shapes) == bool(needs)  # gate and up are kept for a backward pass alone
    assert launched.count("weight_gradient") == len({"w_in", "w_down"} & set(needs))
    assert launched.count("sum_of_choices") == 1 + ("x" in needs)


@interpreted
def test_without_a_backward_pass_nothing_is_kept(poison):
    tensors, ids = made(5, 18, 12, 3, 2, None, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = moe_mlp(*leaves[:3], sort_choices(ids, 3), leaves[3], "triton")
        assert not y.requires_grad
    assert (10, 24) not in poison.shapes


@interpreted
def test_the_backward_pass_keeps_x_and_what_swiglu_was_given():
    tensors, ids = made(5, 18, 12, 3, 2, None, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        moe_mlp(*leaves[:3], sort_choices(ids, 3), leaves[3], "triton")
    given = {t.data_ptr() for t in leaves}
    numbers = [t for t in kept if t.is_floating_point() and t.data_ptr() not in given]
    assert [tuple(t.shape) for t in numbers] == [(10, 24)]


@interpreted
def test_a_plan_that_is_changed_between_forward_and_backward_is_noticed():
    tensors, ids = made(5, 18, 12, 3, 2, None, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    for part in ("offsets", "row_choices"):
        plan = sort_choices(ids, 3)
        y = moe_mlp(*leaves[:3], plan, leaves[3], "triton")
        getattr(plan, part).add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@interpreted
def test_forward_goes_on_with_what_is_kept_for_backward():
    """In fp16 what SwiGLU was given is rounded when it is kept: forward must not have seen more than that."""
    from moe_lab.ops import launches

    seen = []
    tensors, ids = made(*CASES["what blocks divide"], torch.float16)
    with launches.observed(lambda name, args, constants: nullcontext(seen.append(args))):
        moe_mlp(tensors[0].requires_grad_(), *tensors[1:3], sort_choices(ids, 4), tensors[3], "triton")
    _, _, inner, hidden, *_ = seen[1]  # the plan's launch comes first
    gate, up = inner.float().chunk(2, -1)
    differ = (torch.nn.functional.silu(gate) * up).half() != hidden
    assert differ.float().mean() < 0.01  # the last bit of an exponential; with more bits it would be a third


@interpreted
def test_a_second_derivative_is_refused():
    tensors, ids = made(3, 4, 4, 2, 1, None, torch.float32)
    leaves = [t.requires_grad_() for t in tensors]
    y = moe_mlp(*leaves[:3], sort_choices(ids, 2), leaves[3], "triton")
    (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


# --- The layer ------------------------------------------------------------------------------------------------------

LAYERS = {
    "plain": ({}, True),
    "top-1": ({"top_k": 1, "normalise": False}, True),
    "all experts, scaled": ({"top_k": 5, "scaling_factor": 2.5}, True),
    "sigmoid and a shared expert": ({"score": "sigmoid", "n_shared_experts": 1, "d_ff_shared": 9}, True),
    "no gate": ({"expert": "relu"}, False),
    "biased": ({"expert_bias": True}, False),
    "gpt-oss": ({"expert": "clamped_swiglu", "expert_bias": True}, False),
    "input weighed": ({"weigh": "input"}, False),
    "capacity": ({"capacity_factor": 0.75}, False),
}


@interpreted
@pytest.mark.parametrize(("options", "is_fused"), LAYERS.values(), ids=LAYERS)
def test_a_layer_with_triton_is_the_layer_fused_or_step_by_step(options, is_fused, poison, launched):
    config = MoEConfig(**{"d_model": 12, "d_ff": 10, "n_experts": 5, "top_k": 2} | options)
    torch.manual_seed(0)
    plain = MoE(config, "reference")
    layer = MoE(config, "triton")
    layer.load_state_dict(plain.state_dict())
    assert (layer.is_fused, plain.is_fused) == (is_fused, False)
    x = torch.randn(3, 9, 12)
    seen = {}
    for name, moe in (("triton", layer), ("reference", plain)):
        given = x.clone().requires_grad_()
        y, routing = moe(given)
        (y.square().sum() + routing.router_scores.square().sum()).backward()
        grads = {key: p.grad for key, p in moe.named_parameters() if p.grad is not None}
        seen[name] = {"y": y.detach(), "x": given.grad, **grads}
    assert seen["triton"].keys() == seen["reference"].keys()
    assert_same(seen["triton"], seen["reference"], 1e-5)
    assert ("gate_up" in launched) == is_fused
    assert launched


def both_passes(layer: Callable, x: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    y, _ = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


@interpreted
@pytest.mark.parametrize("hook", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_a_layer_whose_experts_have_hooks_goes_step_by_step_so_that_they_run(hook, launched):
    layer, x = MoE(MoEConfig(d_model=12, d_ff=10, n_experts=5, top_k=2), "triton"), torch.randn(9, 12).requires_grad_()
    seen = []
    fused = both_passes(layer, x, layer.parameters())
    handle = getattr(layer.experts, f"register_{hook}")(lambda part, *_: seen.append(part))
    assert not layer.is_fused
    launched.clear()
    assert_close(both_passes(layer, x, layer.parameters()), fused)
    assert seen == [layer.experts]
    assert "gate_up" not in launched
    handle.remove()
    assert layer.is_fused


@interpreted
def test_hooks_on_the_layer_and_its_router_run_in_a_fused_layer_too():
    layer = MoE(MoEConfig(d_model=12, d_ff=10, n_experts=5, top_k=2), "triton")
    seen = []
    for part in (layer, layer.router):
        part.register_forward_hook(lambda part, *_: seen.append(part))
    layer(torch.randn(9, 12))
    assert layer.is_fused
    assert seen == [layer.router, layer]


@interpreted
@pytest.mark.parametrize("options", [{}, {"expert_bias": True}], ids=["fused", "step by step"])
def test_a_compiled_layer_leaves_the_kernels_as_they_are(options, launched):
    layer = MoE(MoEConfig(d_model=12, d_ff=10, n_experts=5, top_k=2, **options), "triton")
    x = torch.randn(9, 12).requires_grad_()
    expected = both_passes(layer, x, layer.parameters())
    wanted = launched.copy()
    launched.clear()
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager")
    assert_close(both_passes(compiled, x, layer.parameters()), expected, rtol=0, atol=0)
    assert launched == wanted
    launched.clear()
    longer = torch.randn(17, 12).requires_grad_()
    assert_close(both_passes(compiled, longer, layer.parameters()), both_passes(layer, longer, layer.parameters()))


# --- What is refused ------------------------------------------------------------------------------------------------


def given() -> dict:
    tensors, ids = made(4, 8, 6, 3, 2, None, torch.float32)
    return {**dict(zip(NAMES, tensors, strict=True)), "plan": sort_choices(ids, 3)}


def with_plan(**changes: Tensor | int):
    def change(arguments: dict) -> dict:
        plan = arguments["plan"]
        parts = {name: getattr(plan, name) for name in ("row_choices", "choice_rows", "offsets", "capacity")}
        return {"plan": DispatchPlan(**parts | changes)}

    return change


def offsets_of(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


REFUSED = {
    "another D": (lambda a: {"x": a["x"][:, :7]}, r"shapes \(4, 7\), .*expected \(T, D\), \(E, 2F, D\)"),
    "another F": (lambda a: {"w_down": a["w_down"][..., :5]}, r"\(3, 8, 5\).*expected"),
    "one expert fewer": (lambda a: {"w_in": a["w_in"][:2]}, r"\(2, 12, 8\).*expected"),
    "a matrix": (lambda a: {"w_down": a["w_down"][0]}, r"\(8, 6\).*expected \(T, D\), \(E, 2F, D\), \(E, D, F\)"),
    "one token fewer": (lambda a: {"x": a["x"][:3]}, r"\(3, 8\).*the plan's T=4 and K=2"),
    "other weights": (lambda a: {"weights": a["weights"][:, :1]}, r"\(4, 1\): expected .*T=4 and K=2"),
    "a list of weights": (lambda a: {"weights": a["weights"].flatten()}, r"\(8,\): expected"),
    "another dtype": (lambda a: {"w_in": a["w_in"].half()}, r"x is torch.float32, w_in torch.float16, .* one dtype"),
    "another dtype of x": (lambda a: {"x": a["x"].half()}, r"x is torch.float16, w_in torch.float32, .* one dtype"),
    "w_in elsewhere": (lambda a: {"w_in": a["w_in"].to("meta")}, r"x is on cpu, w_in on meta: move .*\.to"),
    "w_down elsewhere": (lambda a: {"w_down": a["w_down"].to("meta")}, r"x is on cpu, w_down on meta: move"),
    "weights elsewhere": (lambda a: {"weights": a["weights"].to("meta")}, r"x is on cpu, weights on meta: move"),
    "x elsewhere": (lambda a: {"x": a["x"].to("meta")}, r"x is on meta, w_in on cpu: move"),
    "a capacity": (with_plan(capacity=3), r"the plan has a capacity of 3: expected none"),
    "a row too few": (with_plan(row_choices=torch.arange(7)), r"the plan has 7 rows for 8 choices: expected one"),
    "a choice without a row": (with_plan(offsets=offsets_of(5, 7, 7)), r"rows end at 7: expected at its 8 choices"),
    "offsets that fall": (with_plan(offsets=offsets_of(5, 2, 8)), r"offsets are \[5, 2, 8\]: expected them to rise"),
    "offsets past the rows": (with_plan(offsets=offsets_of(5, 7, 9)), r"\[5, 7, 9\]: expected .* 8 rows or fewer"),
    "offsets of 64 bit": (with_plan(offsets=offsets_of(5, 7, 8).long()), r"torch.int64 .*expected one int32"),
    "too few offsets": (with_plan(offsets=offsets_of(5, 8)), r"of shape \(2,\): expected .* 3 groups"),
    "offsets elsewhere": (with_plan(offsets=offsets_of(5, 7, 8).to("meta")), r"offsets on meta: move"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("impl", [*MOE_MLP])
def test_what_does_not_fit_is_named_before_a_kernel_sees_it(impl, change, says):
    arguments = given()
    arguments |= change(arguments)
    with pytest.raises(ValueError, match=says):
        moe_mlp(**arguments, impl=impl)


def test_an_unknown_variant_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="impl='fused': expected one of reference, triton"):
        moe_mlp(**given(), impl="fused")


@pytest.mark.skipif(INTERPRETS, reason="here kernels are interpreted")
def test_kernels_need_a_gpu_and_say_so():
    pytest.importorskip("triton", reason="there is no Triton for this system")
    with pytest.raises(ValueError, match=r"impl='triton' needs tensors on an NVIDIA GPU, and these are on cpu: .*'"):
        moe_mlp(**given(), impl="triton")


@interpreted
@pytest.mark.parametrize(
    ("dtype", "says"),
    [
        (torch.bfloat16, "interpreter: bf16 comes out wrong there. Use fp32 or fp16"),
        (torch.float64, "takes fp32, bf16 and fp16, and these are torch.float64: use"),
    ],
    ids=str,
)
def test_a_dtype_that_kernels_do_not_take_is_refused(dtype, says):
    arguments = given()
    arguments |= {name: arguments[name].to(dtype) for name in NAMES[:3]}
    with pytest.raises(ValueError, match=says):
        moe_mlp(**arguments, impl="triton")
