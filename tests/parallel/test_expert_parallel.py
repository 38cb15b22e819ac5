"""The layer over ranks, held to the layer in one process: outputs, every gradient, wrong input, overlap.

Most of it is simulated, which costs nothing; then one launch of real processes for every number of ranks.
"""

import copy
import gc
import re
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.config import MoEConfig
from moe_lab.moe import ExpertChoiceMoE, MoE
from moe_lab.parallel import (
    FORMS,
    Event,
    ExpertParallelMoE,
    Placement,
    Ranks,
    even_placement,
    exchange,
    launch,
    overlap,
    simulate,
)
from moe_lab.parallel.ranks import Pending
from moe_lab.routing import NotFiniteError

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
CONFIG = MoEConfig(d_model=8, d_ff=12, n_experts=24, top_k=3)  # 24 goes into 1, 2, 3, 4 and 8 ranks
EXACT = 1e-5  # in fp32, of the largest: only the order of sums differs
# A bf16 number is known to one part in 2^9. Partial sums that are sent are rounded once more on either side, and so is
# each rank's part of a gradient: a few roundings of numbers that can be larger than their sum.
ROUNDED = 8 * 2.0**-9
HOPS = ("across_then_within", "within_then_across")


# --- the reference: one layer, one process, all tokens --------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A layer over ranks, and what they are given.

    Args:
        tokens: of every rank.
        changes: to the configuration.
        experts: of every rank, if not equal parts.
        router: "drawn"; or "indifferent", which lets all tokens choose the first experts.
        needs_gradient: whether the input does.
    """

    tokens: tuple[int, ...] = (5, 3, 0, 4)
    form: str = "per_rank"
    node_size: int | None = None
    changes: dict = field(default_factory=dict)
    experts: tuple[tuple[int, ...], ...] | None = None
    router: str = "drawn"
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    needs_gradient: bool = True

    @property
    def config(self) -> MoEConfig:
        return CONFIG.but(**self.changes)

    @property
    def placement(self) -> Placement | None:
        if self.experts is None:
            return None
        n_slots = sum(map(len, self.experts))
        return Placement(self.experts, self.config.n_experts, n_slots - self.config.n_experts)

    @property
    def tolerance(self) -> float:
        return ROUNDED if self.autocast or self.dtype != torch.float32 else EXACT

    def context(self) -> torch.autocast | nullcontext:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()


def made(case: Case) -> MoE:
    """A layer with no number in it that is 0 or 1, where a mistake would not show."""
    torch.manual_seed(0)
    layer = MoE(case.config)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if ".b_" in name or name == "router.bias":
                parameter.normal_()
        if case.router == "indifferent":
            layer.router.weight.zero_()
        if case.config.selection_bias:
            layer.router.selection_bias.copy_(0.3 * torch.randn(case.config.n_experts))
    return layer.to(case.dtype)


def given_to(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Every rank's tokens, and the gradients of their outputs."""
    generator = torch.Generator().manual_seed(1)
    x, upstream = torch.randn(2, sum(case.tokens), case.config.d_model, generator=generator).to(case.dtype)
    return list(x.split(case.tokens)), list(upstream.split(case.tokens))


def backward(case: Case, layer: MoE, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """What the layer gives for x, and every gradient. The balance loss's way back, through the scores, is in it."""
    x = x.clone().requires_grad_(case.needs_gradient)
    with case.context():
        y, routing = layer(x)
    scores = (routing.router_scores * torch.linspace(0, 1, routing.n_experts)).sum()
    ((y * upstream).sum() + scores).backward()
    got = {"y": y.detach(), "choices": routing.topk_experts}
    if case.needs_gradient:
        got["x"] = x.grad
    return got | {name: parameter.grad for name, parameter in layer.named_parameters()}


def alone(case: Case) -> dict[str, Tensor]:
    xs, upstreams = given_to(case)
    return backward(case, made(case), torch.cat(xs), torch.cat(upstreams))


def on_rank(ranks: Ranks, case: Case) -> dict[str, Tensor]:
    xs, upstreams = given_to(case)
    layer = ExpertParallelMoE(made(case), ranks, case.placement, form=case.form, node_size=case.node_size)
    return backward(case, layer, xs[ranks.rank], upstreams[ranks.rank])


def together(case: Case, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the ranks have, put together: tokens side by side, experts in their order, the rest summed."""
    placement = case.placement or even_placement(case.config.n_experts, len(parts))
    whole = {}
    for name in parts[0]:
        on_ranks = [part[name] for part in parts]
        if name in ("y", "x", "choices"):
            whole[name] = torch.cat(on_ranks)
        elif name.startswith("experts."):
            slots = torch.cat(on_ranks)
            shape = (case.config.n_experts, *slots.shape[1:])
            whole[name] = slots.new_zeros(shape).index_add(0, placement.slot_experts, slots)
        else:
            whole[name] = torch.stack(on_ranks).sum(0)
    return whole


def differences(case: Case, parts: list[dict[str, Tensor]]) -> list[str]:
    """What is not as with one process, for people to read; nothing if all is well."""
    expected, got = alone(case), together(case, parts)
    found = [] if expected.keys() == got.keys() else [f"{sorted(got)} in place of {sorted(expected)}"]
    for name in expected.keys() & got.keys():
        ours, theirs = got[name], expected[name]
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            found.append(f"{name} is {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} {tuple(theirs.shape)}")
        elif ours.numel():
            error, largest = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
            if not error <= case.tolerance * largest:
                found.append(f"{name} is off by {error:.1e}, of at most {largest:.1e}")
    return found


def spread(n_experts: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Each rank takes every size-th expert: neighbours lie on different ranks, and none has the ids that it would."""
    return tuple(tuple(range(rank, n_experts, size))[::-1] for rank in range(size))


FIRST = tuple(range(12)), (), (12, 13, 14), tuple(range(23, 14, -1))  # 12, 0, 3 and 9 experts
TWICE = (  # expert 0 everywhere, expert 5 on two ranks, one rank with a single slot
    (0, 1, 2, 3, 4, 5),
    (5, 0, *range(6, 12)),
    (0,),
    (*range(12, 24), 0),
)
SPREAD_OUT = tuple(range(0, 24, 2)), tuple(range(1, 24, 2))
ALL_FORMS = [("per_assignment", None), ("per_rank", None), *((form, 2) for form in HOPS)]

VARIANTS = {
    "plain": {},
    "top-1": {"top_k": 1, "normalise": False},
    "all experts": {"n_experts": 4, "top_k": 4},
    "one expert each": {"n_experts": 4, "top_k": 1},
    "sigmoid": {"score": "sigmoid", "normalise": False},
    "selection bias": {"score": "sigmoid", "selection_bias": True, "scaling_factor": 2.5},
    "node-limited": {"n_groups": 4, "groups_kept": 2, "group_score": "top2_sum", "selection_bias": True},
    "logit bias": {"logit_bias": True},
    "shared": {"n_shared_experts": 2},
    "shared, gated, wide": {"n_shared_experts": 1, "d_ff_shared": 20, "shared_gate": True},
    "relu": {"expert": "relu", "n_shared_experts": 1},
    "gpt-oss": {"expert": "clamped_swiglu", "expert_bias": True, "logit_bias": True},
    "gelu, biased": {"expert": "gelu", "expert_bias": True},
    "input weighed": {"weigh": "input", "score": "sigmoid", "normalise": False},
    "input weighed, biased": {"weigh": "input", "expert_bias": True, "n_shared_experts": 1},
}
TOKENS = {
    "even": (4, 4, 4, 4),
    "uneven": (1, 7, 2, 3),
    "a rank without": (5, 0, 3, 4),
    "one rank has all": (0, 0, 9, 0),
    "one token": (0, 1, 0, 0),
    "none": (0, 0, 0, 0),
}


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: form[0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_layer_of_one_process(variant, form):
    case = Case(form=form[0], node_size=form[1], changes=VARIANTS[variant])
    assert differences(case, simulate(on_rank, 4, case)) == []


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: form[0])
@pytest.mark.parametrize("router", ["drawn", "indifferent"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_however_the_tokens_lie(tokens, router, form):
    shared = {"n_shared_experts": 1, "expert_bias": True}
    for top_k in (1, 3):
        case = Case(TOKENS[tokens], *form, {**shared, "top_k": top_k}, router=router)
        assert differences(case, simulate(on_rank, 4, case)) == []


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_any_number_of_ranks_and_of_nodes(size):
    tokens = (5, 3, 0, 4, 1, 2, 0, 6)[:size]
    forms = [(form, None) for form in FORMS if form not in HOPS]
    forms += [(form, nodes) for form in HOPS for nodes in range(1, size + 1) if size % nodes == 0]
    for form, node_size in forms:
        case = Case(tokens, form, node_size, {"n_shared_experts": 1})
        assert differences(case, simulate(on_rank, size, case)) == []


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: form[0])
@pytest.mark.parametrize("experts", [spread(24, 4), FIRST, TWICE], ids=["spread", "uneven, one without", "redundant"])
def test_wherever_the_experts_lie(experts, form):
    for changes in ({"expert_bias": True}, {"weigh": "input"}):
        for router in ("drawn", "indifferent"):
            case = Case((5, 3, 0, 7), *form, changes, experts, router)
            assert differences(case, simulate(on_rank, 4, case)) == []


def test_replicas_share_the_gradient_of_their_expert():
    case = Case((4, 4, 4, 4), changes={"top_k": 1}, experts=TWICE, router="indifferent")  # all choose expert 0
    parts = simulate(on_rank, 4, case)
    slots = [parts[rank]["experts.w_down"][held.index(0)] for rank, held in enumerate(TWICE)]
    assert all(gradient.abs().max() > 0 for gradient in slots)  # each had its share of the tokens
    torch.testing.assert_close(sum(slots), alone(case)["experts.w_down"][0])


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, Case]:
    """Any placement, replicas and idle ranks included, of any small layer over up to 6 ranks."""
    size, n_experts = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    held = [set() for _ in range(size)]
    for expert in range(n_experts):
        for rank in draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=2)):
            held[rank].add(expert)
    experts = tuple(tuple(draw(st.permutations(sorted(some)))) for some in held)
    form = draw(st.sampled_from(FORMS))
    nodes = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    changes = {
        "n_experts": n_experts,
        "top_k": draw(st.integers(1, n_experts)),
        "weigh": draw(st.sampled_from(["input", "output"])),
        "expert_bias": draw(st.booleans()),
        "n_shared_experts": draw(st.integers(0, 1)),
    }
    tokens = tuple(draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
    return size, Case(tokens, form, nodes, changes, experts, needs_gradient=draw(st.booleans()))


@PROPERTY
@given(cases())
def test_any_layer_of_any_ranks(drawn):
    size, case = drawn
    assert differences(case, simulate(on_rank, size, case)) == []


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: form[0])
@pytest.mark.parametrize("experts", [None, FIRST], ids=["even", "one rank without"])
def test_low_precision(experts, form):
    shared = {"n_shared_experts": 1}
    for narrow in ({"dtype": torch.bfloat16}, {"autocast": True}):
        case = replace(Case((9, 0, 5, 12), *form, shared, experts), **narrow)
        assert differences(case, simulate(on_rank, 4, case)) == []


def test_an_input_of_any_shape_and_its_gradient():
    def program(ranks: Ranks) -> tuple[Tensor, Tensor]:
        layer = ExpertParallelMoE(made(Case()), ranks)
        x = torch.ones(2, ranks.rank, 3, 8, requires_grad=True)  # rank 0 has no token
        y, routing = layer(x)
        y.sum().backward()  # a gradient of one number, spread out
        assert routing.topk_experts.shape == (6 * ranks.rank, 3)
        return y, x.grad

    for rank, (y, gradient) in enumerate(simulate(program, 2)):
        assert y.shape == gradient.shape == (2, rank, 3, 8)


def in_evaluation(ranks: Ranks, case: Case) -> Tensor:
    layer = ExpertParallelMoE(made(case), ranks, form=case.form, node_size=case.node_size).eval()
    with torch.no_grad():
        y, _ = layer(given_to(case)[0][ranks.rank])
    assert not y.requires_grad
    return y


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: form[0])
def test_without_gradients_it_gives_the_same(form):
    case = Case(form=form[0], node_size=form[1], changes={"n_shared_experts": 1})
    expected = [part["y"] for part in simulate(on_rank, 4, case)]
    assert all(map(torch.equal, simulate(in_evaluation, 4, case), expected))


def on_a_mesh(ranks: Ranks, case: Case, ep_size: int) -> dict[str, Tensor]:
    """Experts over groups of ranks; gradients summed over whoever has the same weights."""
    experts_group, replicas = ranks.split(ep_size)
    xs, upstreams = given_to(case)
    layer = ExpertParallelMoE(made(case), experts_group, case.placement, form=case.form, node_size=case.node_size)
    got = backward(case, layer, xs[ranks.rank], upstreams[ranks.rank])
    return {k: replicas.all_reduce(g) if k.startswith("experts.") else g for k, g in got.items()}


def on_first_group(case: Case, parts: list[dict[str, Tensor]], ep_size: int) -> list[str]:
    """Differences of a mesh from one process: the experts are complete on every group, so one group's are looked at."""
    for part in parts[ep_size:]:
        for name in [name for name in part if name.startswith("experts.")]:
            part[name] = part[name][:0]
    whole = replace(case, experts=spread_over(case, len(parts), ep_size))
    return differences(whole, parts)


def spread_over(case: Case, size: int, ep_size: int) -> tuple[tuple[int, ...], ...]:
    placed = case.placement or even_placement(case.config.n_experts, ep_size)
    return placed.experts + ((),) * (size - ep_size)


@pytest.mark.parametrize("form", ["per_assignment", "per_rank", *HOPS])
def test_beside_data_parallelism(form):
    for experts in (None, SPREAD_OUT):
        node_size = 2 if form in HOPS else None
        case = Case((5, 3, 0, 4), form, node_size, {"n_shared_experts": 1}, experts)
        assert on_first_group(case, simulate(on_a_mesh, 4, case, 2), 2) == []


def test_the_same_bits_every_time():
    case = Case(changes={"n_shared_experts": 1})
    first, again = simulate(on_rank, 4, case), simulate(on_rank, 4, case)
    assert all(torch.equal(one[name], other[name]) for one, other in zip(first, again, strict=True) for name in one)


def test_one_rank_gives_the_bits_of_the_layer_itself():
    case = Case((7,), "per_assignment", changes={"n_shared_experts": 1, "weigh": "input"})
    (got,), (expected,) = simulate(on_rank, 1, case), simulate(lambda ranks: alone(case), 1)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_layer_that_it_is_made_of_keeps_its_experts():
    def program(ranks: Ranks) -> None:
        layer = made(Case())
        before = copy.deepcopy(layer.state_dict())
        parallel = ExpertParallelMoE(layer, ranks)
        assert parallel.experts.w_in.shape[0] == 12
        with torch.no_grad():
            parallel.experts.w_in.zero_()
        assert all(torch.equal(before[name], now) for name, now in layer.state_dict().items())

    simulate(program, 2)


def test_an_exchange_sends_gradients_back_by_the_same_way():
    def program(ranks: Ranks) -> list[list[float]]:
        rows = torch.arange(3.0)[:, None].repeat(1, 2).requires_grad_()  # rank 0 sends 1 and 2, rank 1 sends 2 and 1
        send = [1, 2] if ranks.rank == 0 else [2, 1]
        arrived = exchange(ranks, rows, send, send)()
        (arrived.sum() * (ranks.rank + 1)).backward()  # an expanded gradient: all rows share one number
        return rows.grad[:, 0].tolist()

    assert simulate(program, 2) == [[1, 2, 2], [1, 1, 2]]


# --- overlap --------------------------------------------------------------------------------------------------------


def micro_batches(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    xs, _ = given_to(case)
    return xs[rank].clone().requires_grad_(), (xs[rank] + 1).requires_grad_()


def overlapped(ranks: Ranks, case: Case, together: bool) -> dict[str, Tensor]:
    layer = ExpertParallelMoE(made(case), ranks, form=case.form, node_size=case.node_size)
    a, b = micro_batches(case, ranks.rank)
    results = overlap([layer.steps(a), layer.steps(b)]) if together else [layer(a), layer(b)]
    (one, _), (other, _) = results
    (one.square().sum() + 2 * other.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"one": one.detach(), "other": other.detach(), "a": a.grad, "b": b.grad} | gradients


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: form[0])
def test_overlapped_is_what_one_after_the_other_gives(form):
    case = Case(form=form[0], node_size=form[1], changes={"n_shared_experts": 1})
    apart = simulate(overlapped, 4, case, False)
    for ours, theirs in zip(simulate(overlapped, 4, case, True), apart, strict=True):
        assert torch.equal(ours["one"], theirs["one"])
        assert torch.equal(ours["other"], theirs["other"])
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5)


def timed(ranks: Ranks, case: Case, seconds: float) -> tuple[float, float, list[Event]]:
    """Seconds one after the other, seconds overlapped, and what happened then, with a wire that slow."""
    layer = ExpertParallelMoE(made(case), ranks, form=case.form)
    a, b = (x.detach() for x in micro_batches(case, ranks.rank))
    layer(a)
    with torch.no_grad(), ranks.slow_wire(seconds):
        ranks.all_reduce(torch.zeros(1))
        begin = time.perf_counter()
        layer(a)
        layer(b)
        apart = time.perf_counter() - begin
        ranks.all_reduce(torch.zeros(1))
        with ranks.watch() as events:
            begin = time.perf_counter()
            overlap([layer.steps(a), layer.steps(b)])
            both = time.perf_counter() - begin
    return apart, both, events


def inside(events: list[Event], stage: str) -> bool:
    """Whether something was computed in this stage while a dispatch was under way."""
    dispatches = [event for event in events if (event.stage, event.what) == ("dispatch", "rows")]
    computed = [event for event in events if (event.kind, event.stage) == ("compute", stage)]
    return any(d.begin < c.begin and c.end < d.end for d in dispatches for c in computed)


@pytest.mark.parametrize("form", ["per_rank", "per_assignment"])
def test_overlap_hides_a_slow_wire(form):
    case = Case((5, 3), form, changes={"n_shared_experts": 1})
    for apart, both, events in simulate(timed, 2, case, 0.1):
        # apart: counts, dispatch and combine, twice; overlapped, the second's counts go while the first is under way
        assert apart >= 6 * 0.1
        assert both < 0.9 * apart
        assert inside(events, "shared")
        assert inside(events, "route")  # the second micro-batch's


def test_overlap_of_nothing_and_of_one():
    assert overlap([]) == []
    case = Case((4, 4))

    def program(ranks: Ranks) -> bool:
        layer, x = ExpertParallelMoE(made(case), ranks), given_to(case)[0][ranks.rank]
        ((y, _),) = overlap([layer.steps(x)])
        return torch.equal(y, layer(x)[0])

    assert simulate(program, 2) == [True, True]


# --- bad input: the same error on every rank, and all go on ---------------------------------------------------------

Attempt = Callable[[Ranks], object]


def built(ranks: Ranks, config: MoEConfig = CONFIG, device: str = "cpu", **options: object) -> ExpertParallelMoE:
    torch.manual_seed(0)
    layer = (ExpertChoiceMoE if config.expert_choice else MoE)(config)
    return ExpertParallelMoE(layer.to(device), ranks, **options)


def with_input(change: Callable[[Tensor], object], form: str = "per_rank") -> Attempt:
    """Rank 1's input is changed, the other's is good."""

    def attempt(ranks: Ranks) -> object:
        x = torch.ones(4, 8)
        return built(ranks, form=form)(change(x) if ranks.rank == 1 else x)

    return attempt


def with_layer(change: Callable[[ExpertParallelMoE], None]) -> Attempt:
    """Rank 1's layer is changed after it was made."""

    def attempt(ranks: Ranks) -> object:
        layer = built(ranks)
        if ranks.rank == 1:
            change(layer)
        return layer(torch.ones(4, 8))

    return attempt


def with_config(**changes: object) -> Attempt:
    """Rank 1 has another configuration."""
    return lambda ranks: built(ranks, CONFIG.but(**(changes if ranks.rank == 1 else {})))


def with_options(first: dict, second: dict | None = None) -> Attempt:
    """Rank 0 gives the first options, rank 1 the second; or both the first."""
    return lambda ranks: built(ranks, **(first if second is None or ranks.rank == 0 else second))


def choosing(expert: int) -> Callable[[ExpertParallelMoE], None]:
    """Break the router: it names an expert that does not exist."""

    def break_it(layer: ExpertParallelMoE) -> None:
        route = layer.router.forward

        def broken(tokens: Tensor) -> object:
            routing = route(tokens)
            routing.topk_experts[2, 1] = expert
            return routing

        layer.router.forward = broken

    return break_it


def no_gradients_on_one(ranks: Ranks) -> object:
    with torch.no_grad() if ranks.rank == 1 else nullcontext():
        return built(ranks)(torch.ones(4, 8))


def dtype_by_rank(ranks: Ranks) -> object:
    layer = MoE(CONFIG)
    return ExpertParallelMoE(layer.to(torch.bfloat16) if ranks.rank == 1 else layer, ranks)


def autocast_on_one(ranks: Ranks) -> object:
    with torch.autocast("cpu", torch.bfloat16) if ranks.rank == 1 else nullcontext():
        return built(ranks)(torch.ones(4, 8))


def dtypes_under_autocast(ranks: Ranks) -> object:
    with torch.autocast("cpu", torch.bfloat16):
        return built(ranks)(torch.ones(4, 8, dtype=torch.bfloat16 if ranks.rank == 1 else torch.float32))


def device_of_one(ranks: Ranks) -> object:
    layer = MoE(CONFIG)
    return ExpertParallelMoE(layer.to("meta") if ranks.rank == 1 else layer, ranks)


def frozen(layer: ExpertParallelMoE) -> None:
    layer.experts.requires_grad_(False)


def frozen_router_on_one(ranks: Ranks) -> object:
    layer = built(ranks)
    layer.router.weight.requires_grad_(ranks.rank == 0)
    return layer(torch.ones(4, 8))


def a_group_that_does_not_divide(ranks: Ranks) -> object:
    return ranks.split(2 if ranks.rank == 1 else 3)


def group_of_another_size(ranks: Ranks) -> object:
    """Experts placed for two ranks, on a group of one."""
    alone, _ = ranks.split(1)
    return ExpertParallelMoE(MoE(CONFIG), alone, even_placement(24, 2))


def missing(ranks: Ranks) -> object:
    return built(ranks, placement=Placement((tuple(range(12)), tuple(range(12, 23))), n_experts=24))


def repeated(ranks: Ranks) -> object:
    return built(ranks, placement=Placement((tuple(range(12)), tuple(range(11, 24))), n_experts=24))


BAD = {  # two ranks try it; each is told these words
    "experts that do not divide": (with_options({"config": CONFIG.but(n_experts=5)}), "n_experts=5", "n_ranks=2"),
    "a placement that misses one": (missing, "expert 23 of n_experts=24 on no rank"),
    "a placement that repeats one": (repeated, "25 slots", "expert 11"),
    "a placement for other ranks": (
        with_options({"placement": even_placement(24, 3)}),
        "24 experts on 3 ranks",
        "n_experts=24 on 2 ranks",
    ),
    "a placement of other experts": (with_options({"placement": even_placement(22, 2)}), "22 experts", "n_experts=24"),
    "a group of another size": (group_of_another_size, "24 experts on 2 ranks", "on 1 ranks"),
    "another placement on one": (
        with_options({"placement": even_placement(24, 2)}, {"placement": Placement(SPREAD_OUT, 24)}),
        "placement",
        "rank 1 has ((0, 2,",
    ),
    "a placement on one alone": (with_options({"placement": even_placement(24, 2)}, {}), "rank 1 has even"),
    "an expert below 0": (with_layer(choosing(-1)), "from -1 to", "from 0 to 23"),
    "an expert too many": (with_layer(choosing(24)), "to 24", "from 0 to 23"),
    "a dtype": (with_input(Tensor.double), "torch.float64", "torch.float32"),
    "whole numbers": (with_input(Tensor.long), "torch.int64", "torch.float32"),
    "a layer of another dtype": (dtype_by_rank, "dtype", "rank 1 has torch.bfloat16"),
    "an input on another device": (with_input(lambda x: x.to("meta")), "x is on meta, the layer on cpu"),
    "layers on another device": (with_options({"device": "meta"}), "the layer is on meta: expected cpu"),
    "a layer on another device": (device_of_one, "device: rank 0 has cpu, rank 1 has meta"),
    "no contiguous input": (with_input(lambda x: torch.ones(8, 4).T), "strides (1, 4)", "contiguous"),
    "another width": (with_input(lambda x: x[:, :7].contiguous()), "(4, 7)", "d_model=8"),
    "a single dimension": (with_input(lambda x: x[0]), "shape (8,)", "(..., T, D)"),
    "no number": (with_input(lambda x: x.index_fill(0, torch.tensor(2), torch.nan)), "24 of 96 are NaN", "token 2"),
    "a gradient on one": (
        with_input(lambda x: x.requires_grad_()),
        "x needs a gradient: False on rank 0, True on rank 1",
    ),
    "a gradient on one, per assignment": (with_input(Tensor.requires_grad_, "per_assignment"), "x needs a gradient"),
    "no gradients on one": (no_gradients_on_one, "gradients are enabled: True on rank 0, False on rank 1"),
    "frozen experts on one": (with_layer(frozen), "the experts need a gradient: True on rank 0, False on rank 1"),
    "a frozen router on one": (frozen_router_on_one, "the router needs a gradient: True on rank 0, False on rank 1"),
    "autocast on one": (autocast_on_one, "torch.float32 on rank 0, torch.bfloat16 on rank 1"),
    "dtypes under autocast": (
        dtypes_under_autocast,
        "dtype of x: torch.float32 on rank 0, torch.bfloat16 on rank 1",
    ),
    "another n_experts on one": (with_config(n_experts=12), "n_experts: rank 0 has 24, rank 1 has 12"),
    "another top_k on one": (with_config(top_k=2), "top_k: rank 0 has 3, rank 1 has 2"),
    "other experts on one": (with_config(expert="relu"), "expert: rank 0 has swiglu, rank 1 has relu"),
    "another form on one": (
        with_options({}, {"form": "per_assignment"}),
        "rank 0 has per_rank, rank 1 has per_a",
    ),
    "another node size on one": (with_options({"node_size": 2}, {"node_size": 1}), "node_size: rank 0 has 2, rank 1"),
    "no such form": (with_options({"form": "per_expert"}), "form='per_expert'", "per_rank"),
    "no node size": (with_options({"form": HOPS[0]}), "node_size=None", "2 ranks"),
    "nodes that do not divide": (with_options({"form": HOPS[1], "node_size": 3}), "node_size=3", "2 ranks"),
    "no nodes": (with_options({"form": HOPS[1], "node_size": 0}), "node_size=0", "2 ranks"),
    "groups that do not divide": (a_group_that_does_not_divide, "group_size: rank 0 has 3, rank 1 has 2"),
    "a capacity": (with_options({"config": CONFIG.but(capacity_factor=1.5)}), "capacity_factor=1.5"),
    "experts that choose": (with_options({"config": CONFIG.but(expert_choice=True)}), "expert_choice=True"),
}


def tried(ranks: Ranks, attempt: Attempt) -> tuple[bool, bool, str]:
    """What an attempt raised: whether a ValueError, whether the router's NotFiniteError, and its message."""
    try:
        attempt(ranks)
    except Exception as error:
        return isinstance(error, ValueError), isinstance(error, NotFiniteError), str(error)
    return False, False, "nothing was raised"


def tried_and_went_on(ranks: Ranks, names: list[str]) -> dict[str, tuple[bool, bool, str]]:
    """One attempt after the other; between any two, a good layer works: nobody is a call behind."""
    told = {}
    for name in names:
        told[name] = tried(ranks, BAD[name][0])
        y, _ = built(ranks, CONFIG)(torch.ones(2 + ranks.rank, 8))
        assert y.shape == (2 + ranks.rank, 8)
        assert ranks.all_gather(torch.tensor(ranks.rank)).tolist() == list(range(ranks.size))
    return told


def wrongly_refused(name: str, told: list[tuple[bool, bool, str]]) -> list[str]:
    _, *words = BAD[name]
    return [
        f"rank {rank}, {name}: {message}"
        for rank, (is_value_error, is_nan, message) in enumerate(told)
        if not is_value_error or is_nan != (name == "no number") or not all(word in message for word in words)
    ]


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_on_every_rank(name):
    told = simulate(tried_and_went_on, 2, [name])
    assert wrongly_refused(name, [one[name] for one in told]) == []


def test_who_was_wrong_is_named_on_the_others():
    told = simulate(tried, 3, with_input(Tensor.double))
    messages = [message for _, _, message in told]
    assert messages[0] == messages[2] == f"Rank 1, in route: {messages[1]}"


def test_several_wrong_inputs_each_tell_their_own():
    def attempt(ranks: Ranks) -> object:
        x = torch.ones(4, 8)
        return built(ranks)({0: x, 1: x.double(), 2: x[:, :7].contiguous()}[ranks.rank])

    told = [message for _, _, message in simulate(tried, 3, attempt)]
    assert "Rank 1" in told[0]
    assert "float64" in told[1]
    assert "(4, 7)" in told[2]


def test_any_failure_in_routing_is_told_on_every_rank():
    def attempt(ranks: Ranks) -> object:
        layer = built(ranks)
        if ranks.rank == 1:
            layer.router.forward = lambda tokens: SimpleNamespace(topk_experts=None)
        return layer(torch.ones(4, 8))

    (_, _, first), (_, _, second) = simulate(tried, 2, attempt)
    assert re.fullmatch(r"Rank 1, in route: .*NoneType.*", first)
    assert "NoneType" in second


# --- the same with real processes: one launch for every number of ranks ---------------------------------------------


def real_cases(size: int) -> dict[str, Case]:
    tokens = {1: (7,), 2: (5, 3), 3: (4, 0, 5), 4: (5, 3, 0, 4)}[size]
    deepseek = {"score": "sigmoid", "selection_bias": True, "n_groups": 4, "groups_kept": 2, "n_shared_experts": 1}
    gpt_oss = {"expert": "clamped_swiglu", "expert_bias": True, "logit_bias": True}
    chosen = {
        "shared, gated": Case(tokens, changes={"n_shared_experts": 1, "shared_gate": True}),
        "per assignment": Case(tokens, "per_assignment", changes={"n_shared_experts": 1}),
        "as DeepSeek-V3": Case(tokens, changes=deepseek),
        "as gpt-oss": Case(tokens, changes=gpt_oss),
        "input weighed": Case(tokens, "per_assignment", changes={"weigh": "input"}),
        "experts spread": Case(tokens, experts=spread(24, size)),
        "all to the first experts": Case(tokens, changes={"top_k": 1, "expert_bias": True}, router="indifferent"),
        "no tokens": Case((0,) * size),
        "one token": Case((0,) * (size - 1) + (1,), changes={"n_shared_experts": 1}),
        "bf16": Case(tokens, changes={"n_shared_experts": 1}, dtype=torch.bfloat16),
        "autocast": Case(tokens, changes={"n_shared_experts": 1}, autocast=True),
        "no gradient for x": Case(tokens, needs_gradient=False),
    }
    nodes = [nodes for nodes in (1, 2, 3) if size % nodes == 0]
    chosen |= {f"{form}, nodes of {n}": Case(tokens, form, n) for form in HOPS for n in nodes}
    if size == 4:
        for form, node_size in ALL_FORMS:
            chosen[f"a rank without experts, {form}"] = Case(tokens, form, node_size, experts=FIRST)
            chosen[f"redundant, {form}"] = Case(tokens, form, node_size, experts=TWICE)
    return chosen


MESHES = {
    "a mesh": Case((5, 3, 0, 4), changes={"n_shared_experts": 1}, experts=SPREAD_OUT),
    "a mesh, and nodes in its groups": Case((5, 3, 0, 4), HOPS[0], node_size=1),
}


def in_process(ranks: Ranks) -> dict[str, object]:
    """All that is tried with real processes, so that they are started once."""
    told = {name: on_rank(ranks, case) for name, case in real_cases(ranks.size).items()}
    told["evaluation"] = in_evaluation(ranks, Case(real_cases(ranks.size)["bf16"].tokens))
    if ranks.size == 2:
        told["bad"] = tried_and_went_on(ranks, list(BAD))
        told["timed"] = timed(ranks, Case((5, 3), changes={"n_shared_experts": 1}), 0.1)
        told["overlapped"] = overlapped(ranks, Case((5, 3)), True)
    if ranks.size == 4:
        told |= {name: on_a_mesh(ranks, case, 2) for name, case in MESHES.items()}
    return told


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_processes_agree_with_one(size):
    told = launch(in_process, size, timeout=30)
    for name, case in real_cases(size).items():
        parts = [one[name] for one in told]
        assert differences(case, parts) == [], name
    case = Case(real_cases(size)["bf16"].tokens)
    expected = alone(case)["y"]
    torch.testing.assert_close(torch.cat([one["evaluation"] for one in told]), expected, rtol=EXACT, atol=EXACT)
    if size == 2:
        wrong = [text for name in BAD for text in wrongly_refused(name, [one["bad"][name] for one in told])]
        assert wrong == []
        for ours, simulated in zip(told, simulate(overlapped, 2, Case((5, 3)), True), strict=True):
            torch.testing.assert_close(ours["overlapped"], simulated, rtol=EXACT, atol=EXACT)
        for apart, both, events in [one["timed"] for one in told]:
            assert both < 0.9 * apart
            assert inside(events, "shared")
            assert inside(events, "route")
    if size == 4:
        for name, case in MESHES.items():
            assert on_first_group(case, [one[name] for one in told], 2) == [], name


@pytest.mark.parametrize("form", FORMS)
def test_what_arrived_is_freed_with_the_graph_and_not_by_a_collector(form, monkeypatch):
    """Rows are large: held in a circle, they would stay until Python happens to look for circles."""
    wait, arrived = Pending.wait, []

    def noted(pending: Pending) -> Tensor:
        got = wait(pending)
        arrived.append(weakref.ref(got))
        return got

    def program(ranks: Ranks) -> None:
        whole = MoE(MoEConfig(d_model=8, d_ff=4, n_experts=4, top_k=2))
        layer = ExpertParallelMoE(whole, ranks, form=form, node_size=1)
        layer(torch.rand(5, 8, requires_grad=True))[0].sum().backward()

    monkeypatch.setattr(Pending, "wait", noted)
    gc.collect()
    gc.disable()
    try:
        simulate(program, 2)
        assert len(arrived) > 6
        assert not [one for one in arrived if one() is not None]
    finally:
        gc.enable()
