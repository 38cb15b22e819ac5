"""Trainers that are ranks take the steps of a trainer alone, and go on from each other's checkpoints."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from moe_lab.config import BalanceConfig, LMConfig, MoEConfig, TrainConfig
from moe_lab.data import encode
from moe_lab.lm import LM
from moe_lab.parallel import ExpertParallelMoE, ParallelTrainer, Placement, Ranks, launch, parallelize, simulate
from moe_lab.parallel.training import gather_experts, sum_gradients
from moe_lab.train import Diverged, Step, Trainer, evaluate

SPLIT = {"letters": encode("abcdefgh, or the other way round: hgfedcba. " * 20), "digits": encode("0123456789" * 60)}
MOE = MoEConfig(d_model=16, d_ff=8, n_experts=12, top_k=2)
MODEL = LMConfig(d_model=16, n_layers=2, n_heads=2, d_ff=24, conv_width=3, moe=MOE)
BALANCE = BalanceConfig(loss="global_batch", alpha=0.1, z_loss=0.01)
TRAINING = TrainConfig(
    steps=6, batch_size=8, context=8, learning_rate=3e-3, warmup_steps=2, weight_decay=0.1, balance=BALANCE
)
MESHES = {"1x1": (1, 1), "1x2": (2, 2), "2x1": (2, 1), "2x2": (4, 2), "1x4": (4, 4), "4x1": (4, 1), "1x3": (3, 3)}
FIRST = ((0, 1, 2, 3, 4, 5, 6, 7, 8), (), (11, 10, 9))  # a rank has none

State = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As every rank that is a process has. More would only get into each other's way in models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Run:
    """A model, its training, and how it is spread over ranks."""

    model: dict = field(default_factory=dict)
    moe: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    ep_size: int | None = None
    placement: Placement | None = None
    form: str = "per_rank"
    node_size: int | None = None

    @property
    def config(self) -> TrainConfig:
        return TRAINING.but(**self.training)

    def lm(self) -> LM:
        torch.manual_seed(0)
        return LM(MODEL.but(moe=MOE.but(**self.moe), **self.model))

    def alone(self) -> Trainer:
        return Trainer(self.lm(), SPLIT, self.config)

    def on(self, ranks: Ranks) -> ParallelTrainer:
        options = {"form": self.form, "node_size": self.node_size}
        return ParallelTrainer(self.lm(), SPLIT, self.config, ranks, self.ep_size, self.placement, **options)


def go_on(trainer: Trainer, n_steps: int, state: State | None = None) -> tuple[list[Step], State]:
    """What the next steps did, and the state after them."""
    if state is not None:
        trainer.load_state(copy.deepcopy(state))
    steps = [trainer.step() for _ in range(n_steps)]
    return steps, {name: tensor.detach().clone() for name, tensor in trainer.state().items()}


def on_rank(ranks: Ranks, run: Run, n_steps: int = 3, state: State | None = None) -> tuple[list[Step], State]:
    return go_on(run.on(ranks), n_steps, state)


def assert_same_steps(ours: Sequence[Step], theirs: Sequence[Step], tolerance: float) -> None:
    for step, expected in zip(ours, theirs, strict=True):
        assert (step.index, step.learning_rate) == (expected.index, expected.learning_rate)
        for name in ("loss", "penalty", "gradient_norm"):
            assert getattr(step, name) == pytest.approx(getattr(expected, name), rel=tolerance, abs=1e-9), name
        assert len(step.tokens_per_expert) == len(expected.tokens_per_expert)
        assert all(map(torch.equal, step.tokens_per_expert, expected.tokens_per_expert))


def assert_same_state(ours: State, theirs: State, tolerance: float) -> None:
    """Weights and moments, each against its own largest number; and all that is counted or drawn, exactly."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
        if name.startswith(("model.", "optimizer.")) and not name.endswith(".step"):
            error, largest = (got - expected).abs().max(), expected.abs().max()
            assert error <= tolerance * largest, f"{name} is off by {error:.1e} of {largest:.1e}"
        else:
            assert torch.equal(got, expected), name


def assert_as_alone(told: list[tuple[list[Step], State]], run: Run, n_steps: int = 3) -> None:
    """The first step is exact but for the order of sums; AdamW then divides small gradients by themselves, so that
    what is a rounding error in one becomes a visible part of a step."""
    steps, state = go_on(run.alone(), n_steps)
    for ours, own_state in told:
        assert_same_steps(ours[:1], steps[:1], 1e-5)
        assert_same_steps(ours, steps, 1e-4)
        assert_same_state(own_state, state, 1e-3)
    for _, own_state in told[1:]:  # every rank holds the same checkpoint, to the bit
        assert all(torch.equal(own_state[name], tensor) for name, tensor in told[0][1].items())


@pytest.mark.parametrize("mesh", MESHES)
def test_any_mesh_takes_the_steps_of_one(mesh):
    size, ep_size = MESHES[mesh]
    run = Run(ep_size=ep_size, moe={"n_shared_experts": 1, "expert_bias": True})
    assert_as_alone(simulate(on_rank, size, run), run)


VARIANTS = {
    "no cure": Run(training={"balance": BalanceConfig()}),
    "global-batch loss alone": Run(training={"balance": BalanceConfig(loss="global_batch", alpha=0.5)}),
    "z-loss alone": Run(training={"balance": BalanceConfig(z_loss=0.1)}),
    "loss by sequence": Run(training={"balance": BalanceConfig(loss="sequence", alpha=0.5)}),
    "micro-batches": Run(training={"micro_batches": 2}),
    "recompute": Run(training={"recompute": True, "micro_batches": 2}, moe={"n_shared_experts": 1}),
    "clipped": Run(training={"clip_norm": 0.01}),
    "router of its own rate": Run(training={"router_rate": 0.1}),
    "selection bias": Run(
        moe={"score": "sigmoid", "selection_bias": True},
        training={"balance": BalanceConfig(bias_rate=0.05, recentre=True), "micro_batches": 2},
    ),
    "a dense layer, tied": Run(model={"n_dense_layers": 1, "tied_embeddings": True}),
    "gated, biased, input weighed": Run(
        moe={"n_shared_experts": 1, "shared_gate": True, "expert_bias": True, "weigh": "input"}
    ),
    "per assignment": Run(form="per_assignment", training={"recompute": True}),
}


@pytest.mark.parametrize("mesh", ["2x2", "1x4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_cure_works_on_the_whole_batch(variant, mesh):
    size, ep_size = MESHES[mesh]
    run = replace(VARIANTS[variant], ep_size=ep_size)
    assert_as_alone(simulate(on_rank, size, run), run)


@pytest.mark.parametrize(("ep_size", "placement"), [(1, None), (3, None), (3, Placement(FIRST, 12))])
@pytest.mark.parametrize("recompute", [False, True])
def test_ranks_with_uneven_parts_of_a_batch(ep_size, placement, recompute):
    run = Run(ep_size=ep_size, placement=placement, training={"batch_size": 10, "recompute": recompute})
    assert_as_alone(simulate(on_rank, 3, run), run)  # 4, 3 and 3 sequences
    run = replace(run, training={"batch_size": 10, "micro_batches": 2, "recompute": recompute})
    assert_as_alone(simulate(on_rank, 3, run), run)  # 2, 2 and 1


@pytest.mark.parametrize("form", ["across_then_within", "within_then_across"])
def test_two_hops_in_training(form):
    run = Run(form=form, node_size=2, training={"recompute": True})
    assert_as_alone(simulate(on_rank, 4, run), run)


def test_bf16_stays_close():
    """Products in bf16 are known to one part in 2^9, and are rounded once more where ranks' sums are sent."""
    run = Run(training={"precision": "bf16"})
    expected, _ = go_on(run.alone(), 1)
    for (step,), _ in simulate(on_rank, 2, run, 1):
        assert step.loss == pytest.approx(expected[0].loss, rel=2**-7)
        assert step.gradient_norm == pytest.approx(expected[0].gradient_norm, rel=2**-5)


def test_a_dense_model_is_plain_data_parallelism():
    def program(ranks: Ranks) -> list[Step]:
        torch.manual_seed(0)
        trainer = ParallelTrainer(LM(dense), SPLIT, training, ranks)
        return [trainer.step() for _ in range(3)]

    dense, training = MODEL.but(moe=None), TRAINING.but(balance=BalanceConfig())
    torch.manual_seed(0)
    alone = Trainer(LM(dense), SPLIT, training)
    steps = [alone.step() for _ in range(3)]
    for ours in simulate(program, 4):
        assert_same_steps(ours, steps, 1e-4)


def test_the_switch_loss_is_over_each_ranks_own_tokens():
    """As it says: it is another loss than that of the whole batch. Everything else is as alone."""
    run = Run(training={"balance": BalanceConfig(loss="switch", alpha=0.1)})
    expected, _ = go_on(run.alone(), 1)
    for (step,), _ in simulate(on_rank, 4, run, 1):
        assert step.loss == pytest.approx(expected[0].loss, rel=1e-5)
        assert step.penalty != pytest.approx(expected[0].penalty, rel=1e-3)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def reloaded(ranks: Ranks, run: Run, state: State) -> State:
    trainer = run.on(ranks)
    trainer.load_state(state)
    return trainer.state()


WITH_ALL = Run(
    moe={"score": "sigmoid", "selection_bias": True, "expert_bias": True, "n_shared_experts": 1},
    training={"balance": replace(BALANCE, bias_rate=0.01)},
)


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[list[Step], State, State]:
    """Four steps alone; the states after two and after all."""
    trainer = WITH_ALL.alone()
    first, halfway = go_on(trainer, 2)
    last, end = go_on(trainer, 2)
    return first + last, halfway, end


@pytest.mark.parametrize("mesh", MESHES)
def test_a_state_goes_through_any_mesh_unchanged(mesh, uninterrupted):
    size, ep_size = MESHES[mesh]
    _, halfway, _ = uninterrupted
    for state in simulate(reloaded, size, replace(WITH_ALL, ep_size=ep_size), halfway):
        assert_same_state(state, halfway, 0)


def test_a_state_goes_through_a_rank_without_experts_unchanged(uninterrupted):
    run = replace(WITH_ALL, placement=Placement(FIRST, 12))
    for state in simulate(reloaded, 3, run, uninterrupted[1]):
        assert_same_state(state, uninterrupted[1], 0)


def test_a_state_from_before_the_first_step():
    untouched = go_on(WITH_ALL.alone(), 0)[1]
    for _, state in simulate(on_rank, 2, WITH_ALL, 0):
        assert_same_state(state, untouched, 0)


@pytest.mark.parametrize("after", ["alone", *MESHES])
@pytest.mark.parametrize("before", ["alone", "2x2", "1x3"])
def test_a_run_resumed_on_other_ranks_goes_on_as_it_would_have(before, after, uninterrupted):
    steps, halfway, end = uninterrupted
    if before != "alone":
        size, ep_size = MESHES[before]
        first, halfway = simulate(on_rank, size, replace(WITH_ALL, ep_size=ep_size), 2)[0]
        assert_same_steps(first, steps[:2], 1e-4)
    if after == "alone":
        told = [go_on(WITH_ALL.alone(), 2, halfway)]
    else:
        size, ep_size = MESHES[after]
        told = simulate(on_rank, size, replace(WITH_ALL, ep_size=ep_size), 2, halfway)
    for last, state in told:
        assert_same_steps(last, steps[2:], 1e-4)
        assert_same_state(state, end, 1e-3)


def test_on_the_same_ranks_it_goes_on_to_the_bit():
    run = replace(WITH_ALL, ep_size=2)
    whole = simulate(on_rank, 4, run, 4)
    _, halfway = simulate(on_rank, 4, run, 2)[0]
    for (steps, state), (last, resumed) in zip(whole, simulate(on_rank, 4, run, 2, halfway), strict=True):
        assert [step.loss for step in steps[2:]] == [step.loss for step in last]
        assert_same_state(resumed, state, 0)


# --- failures -------------------------------------------------------------------------------------------------------


def told_when_diverging(trainer: Trainer, spoil: str) -> tuple[str, int]:
    weights = dict(trainer.model.named_parameters())
    with torch.no_grad():
        if spoil in weights:
            weights[spoil][-1 if ".experts." in spoil else ...] = torch.nan  # the last rank's last expert
    try:
        trainer.step()
    except Diverged as error:
        return str(error), trainer.index
    return "nothing was raised", trainer.index


def diverging(ranks: Ranks, run: Run, spoil: str) -> tuple[str, int]:
    trainer = run.on(ranks)
    is_expert = ".experts." in spoil
    return told_when_diverging(trainer, "" if is_expert and ranks.rank < ranks.size - 1 else spoil)


@pytest.mark.parametrize("spoil", ["embedding.weight", "blocks.0.ffn.experts.w_in", "head.weight"])
@pytest.mark.parametrize("recompute", [False, True])
def test_divergence_is_told_on_every_rank_as_alone(spoil, recompute):
    run = Run(training={"recompute": recompute})
    expected = told_when_diverging(run.alone(), spoil)
    assert f"the weight {spoil}" in expected[0]
    told = simulate(diverging, 4, run, spoil)
    assert told == [told[0]] * 4
    assert f"the weight {spoil}" in told[0][0]
    assert told[0][1] == 0


def test_too_high_a_rate_diverges_everywhere():
    def program(ranks: Ranks) -> str:
        trainer = Run(training={"learning_rate": 1e4, "warmup_steps": 0, "clip_norm": 1e9}).on(ranks)
        try:
            while trainer.index < 5:
                trainer.step()
        except Diverged as error:
            return str(error)
        return "nothing was raised"

    told = simulate(program, 2)
    assert told[0] == told[1]
    assert "learning_rate=10000" in told[0]


def attempt(ranks: Ranks, first: Run, second: Run) -> str:
    """Rank 0 (of two groups: the first group) makes one trainer, the others another."""
    try:
        (first if ranks.rank < ranks.size // 2 else second).on(ranks)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


PLAIN = Run()
PLACED = {name: Placement(experts, 12) for name, experts in {"first": FIRST, "last": FIRST[::-1]}.items()}
ODD = Placement((tuple(range(1, 12, 2)), tuple(range(0, 12, 2))), 12)
WRONG = {
    "seed": (2, PLAIN, Run(training={"seed": 1}), "seed: rank 0 has 0, rank 1 has 1"),
    "model": (2, PLAIN, Run(model={"n_heads": 4}), "n_heads=4"),
    "experts": (2, PLAIN, Run(moe={"top_k": 3}), "top_k=3"),
    "ep_size": (2, PLAIN, Run(ep_size=1), "ep_size"),
    "form": (2, PLAIN, Run(form="per_assignment"), "rank 0 has per_rank, rank 1 has per_assignment"),
    "placement of groups": (4, Run(ep_size=2), Run(ep_size=2, placement=ODD), "placement"),
    "form of groups": (4, Run(ep_size=2), Run(ep_size=2, form="per_assignment"), "form"),
    "group that does not divide": (4, Run(ep_size=3), Run(ep_size=3), "group_size=3"),
    "no group": (2, Run(ep_size=0), Run(ep_size=0), "group_size=0"),
    "experts that do not divide": (2, Run(moe={"n_experts": 5}), Run(moe={"n_experts": 5}), "n_experts=5"),
    "fewer sequences than ranks": (
        4,
        Run(training={"micro_batches": 4}),
        Run(training={"micro_batches": 4}),
        "batch_size=8 in micro_batches=4: expected at least a sequence for each of the 4 ranks",
    ),
    "redundant experts": (
        *(2, *[Run(placement=Placement((tuple(range(7)), tuple(range(6, 12))), 12, 1))] * 2),
        "n_redundant=1",
    ),
    "a cure without its bias": (
        *(2, *[Run(training={"balance": BalanceConfig(bias_rate=0.1)})] * 2),
        "bias_rate=0.1",
    ),
    "capacity": (2, *[Run(moe={"capacity_factor": 1.0})] * 2, "capacity_factor=1.0"),
    "experts that choose": (
        *(2, *[Run(moe={"expert_choice": True}, training={"balance": BalanceConfig()})] * 2),
        "expert_choice=True",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_trained_is_refused_on_every_rank(what):
    size, first, second, words = WRONG[what]
    for text in simulate(attempt, size, first, second):
        assert words in text


# --- parts ----------------------------------------------------------------------------------------------------------


def test_gradients_are_summed_in_place():
    def program(ranks: Ranks) -> tuple[list, list, int]:
        gradients = [torch.full((2, 3), float(ranks.rank)), torch.tensor([1.0]), torch.zeros(0, 4)]
        same = gradients[0]
        with ranks.watch() as events:
            sum_gradients(gradients, ranks)
            sum_gradients([], ranks)
        assert same is gradients[0]
        return same.tolist(), gradients[1].tolist(), len(events)

    assert simulate(program, 3) == [([[3.0] * 3] * 2, [3.0], 1)] * 3


def test_experts_are_gathered_in_the_order_of_their_ids():
    placement = Placement(((4, 1), (), (0, 2, 3)), 5)

    def program(ranks: Ranks) -> list[float]:
        own = torch.tensor(placement.experts[ranks.rank], dtype=torch.float32)[:, None]
        return gather_experts(own, placement, ranks).flatten().tolist()

    assert simulate(program, 3) == [[0, 1, 2, 3, 4]] * 3


def test_a_parallel_model_evaluates_as_one():
    def program(ranks: Ranks) -> dict[str, float]:
        return evaluate(parallelize(Run(model={"n_dense_layers": 1}).lm(), ranks), SPLIT, context=8)

    model = Run(model={"n_dense_layers": 1}).lm()
    expected = evaluate(model, SPLIT, context=8)
    for bits in simulate(program, 4):
        assert bits == pytest.approx(expected, rel=1e-5)
    assert not any(isinstance(module, ExpertParallelMoE) for module in model.modules())


# --- processes ------------------------------------------------------------------------------------------------------

ON_TWO = {
    "1x2": replace(WITH_ALL, ep_size=2),
    "2x1": replace(WITH_ALL, ep_size=1, training=WITH_ALL.training | {"micro_batches": 2, "recompute": True}),
}
ON_FOUR = {
    "2x2": replace(WITH_ALL, ep_size=2),
    "nodes": replace(WITH_ALL, form="across_then_within", node_size=2, training={"recompute": True}),
}


def in_process(ranks: Ranks, runs: dict[str, Run], halfway: State) -> dict[str, object]:
    told: dict[str, object] = {name: on_rank(ranks, run) for name, run in runs.items()}
    told["resumed"] = on_rank(ranks, next(iter(runs.values())), 2, halfway)
    told["diverged"] = diverging(ranks, PLAIN, "blocks.1.ffn.experts.w_down")
    return told


@pytest.mark.parametrize(("size", "runs"), [(2, ON_TWO), (4, ON_FOUR)], ids=["2", "4"])
def test_processes_take_the_steps_of_one(size, runs, uninterrupted):
    steps, halfway, end = uninterrupted
    told = launch(in_process, size, runs, halfway, timeout=30)
    for name, run in runs.items():
        assert_as_alone([one[name] for one in told], run)
    for one in told:
        assert_same_steps(one["resumed"][0], steps[2:], 1e-4)
        assert_same_state(one["resumed"][1], end, 1e-3)
        assert "the weight blocks.1.ffn.experts.w_down" in one["diverged"][0]
