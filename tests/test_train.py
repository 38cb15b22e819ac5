import hashlib
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from moe_lab.balance import sequence_loss, switch_loss, update_bias, z_loss
from moe_lab.checkpoints import load, save
from moe_lab.config import BalanceConfig, LMConfig, MoEConfig, TrainConfig
from moe_lab.data import encode, sample_batch, validation_windows
from moe_lab.lm import LM
from moe_lab.records import ExpertChoice
from moe_lab.train import (
    Diverged,
    Step,
    Trainer,
    balance_penalty,
    choices_of,
    evaluate,
    learning_rate_at,
    mean_bits,
    train,
)

CONFIG = LMConfig(d_model=16, n_layers=1, n_heads=2, d_ff=32, conv_width=3)
TRAINING = TrainConfig(steps=60, batch_size=8, context=16, warmup_steps=5)
SPLIT = {"letters": encode("abcdefgh" * 50), "digits": encode("0123456789" * 40)}


def trained(**changes):
    torch.manual_seed(0)
    model = LM(CONFIG)
    return model, train(model, SPLIT, TRAINING.but(**changes))


def test_it_learns_what_can_be_learnt():
    model, history = trained()
    assert history[0].bits_per_byte == pytest.approx(8, abs=0.1)
    assert history[-1].bits_per_byte < 1
    assert all(bits < 1 for bits in evaluate(model, SPLIT, context=16).values())


def test_the_same_seed_gives_the_same_losses_bit_for_bit():
    _, first = trained()
    _, again = trained()
    _, other = trained(seed=1)
    assert [step.loss for step in first] == [step.loss for step in again]
    assert [step.loss for step in first] != [step.loss for step in other]


def test_every_step_is_told():
    torch.manual_seed(0)
    told = []
    history = train(LM(CONFIG), SPLIT, TRAINING.but(steps=3), told.append)
    assert told == history
    assert [step.index for step in told] == [0, 1, 2]


def test_learning_rate_warms_up_then_falls_to_zero():
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=0.5)
    rates = [learning_rate_at(step, config) for step in range(111)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == rates[10] == 0.5
    assert rates[60] == pytest.approx(0.25)
    assert rates[110] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_without_warm_up_it_starts_at_the_top():
    assert learning_rate_at(0, TrainConfig(warmup_steps=0, learning_rate=0.5)) == 0.5


@pytest.mark.filterwarnings("error")
def test_a_loss_that_is_no_number_stops_the_run_with_its_step():
    torch.manual_seed(0)
    model = LM(CONFIG)

    def break_it(step):
        if step.index == 4:
            with torch.no_grad():
                model.head.weight.fill_(float("nan"))

    with pytest.raises(Diverged, match=r"The loss is nan .* at step 5; .* the weight head.weight"):
        train(model, SPLIT, TRAINING, break_it)


def test_evaluate_is_the_mean_surprise_in_bits():
    model = LM(CONFIG)
    with torch.no_grad():
        model.head.weight.zero_()
    bits = evaluate(model, SPLIT, context=16)
    assert bits == {"letters": pytest.approx(8), "digits": pytest.approx(8)}
    assert mean_bits(bits) == pytest.approx(math.log2(256))


# --- with experts -------------------------------------------------------------------------------------------------

EXPERTS = MoEConfig(d_model=16, d_ff=8, n_experts=4, top_k=2)
WITH_EXPERTS = LMConfig(d_model=16, n_layers=2, n_heads=2, d_ff=16, moe=EXPERTS)
WITH_BIAS = WITH_EXPERTS.but(moe=EXPERTS.but(score="sigmoid", selection_bias=True))
SHORT = TrainConfig(steps=6, batch_size=8, context=12, warmup_steps=2, weight_decay=0.1)
CURED = BalanceConfig(loss="global_batch", alpha=0.1, z_loss=0.01, bias_rate=0.05)


def trainer_of(model: LMConfig, training: TrainConfig, seed: int = 0) -> Trainer:
    torch.manual_seed(seed)
    return Trainer(LM(model), SPLIT, training)


def first_batch(training: TrainConfig) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(training.seed)
    batch = sample_batch(SPLIT, batch_size=training.batch_size, context=training.context, generator=generator)
    return batch.inputs, batch.targets


def told(step: Step) -> tuple:
    """All that a step did, to be compared bit for bit."""
    counts = [layer.tolist() for layer in step.tokens_per_expert]
    return step.index, step.learning_rate, step.loss, step.penalty, step.gradient_norm, counts


def assert_same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def test_a_model_of_experts_learns_with_every_cure_at_once():
    torch.manual_seed(0)
    history = train(LM(WITH_BIAS), SPLIT, TRAINING.but(steps=50, balance=CURED))
    assert history[0].bits_per_byte == pytest.approx(8, abs=0.2)
    assert history[-1].bits_per_byte < 2
    assert sum(history[-1].max_violations) < sum(history[0].max_violations)


def test_train_is_a_trainer_stepped_to_the_end():
    trainer = trainer_of(WITH_BIAS, SHORT.but(balance=CURED))
    steps = [trainer.step() for _ in range(6)]
    torch.manual_seed(0)
    model, seen = LM(WITH_BIAS), []
    history = train(model, SPLIT, SHORT.but(balance=CURED), seen.append)
    assert [told(step) for step in history] == [told(step) for step in steps]
    assert seen == history
    assert_same_bits(model.state_dict(), trainer.model.state_dict())


def test_batches_depend_on_the_seed_alone():
    def bytes_seen(model: LMConfig, **changes: object) -> Tensor:
        trainer, seen = trainer_of(model, SHORT.but(**changes), seed=len(changes)), []
        trainer.model.embedding.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
        trainer.step()
        trainer.step()
        return torch.cat(seen)

    expected = bytes_seen(CONFIG)
    assert torch.equal(expected[:8], first_batch(SHORT)[0])
    jittery = WITH_EXPERTS.but(moe=EXPERTS.but(input_jitter=0.1, noisy_top_k=True))
    for model in (WITH_EXPERTS, jittery):
        assert torch.equal(bytes_seen(model), expected)
    assert torch.equal(bytes_seen(WITH_EXPERTS, micro_batches=4, learning_rate=0.1), expected)
    assert not torch.equal(bytes_seen(CONFIG, seed=1), expected)


def test_what_a_step_tells():
    trainer = trainer_of(WITH_EXPERTS, SHORT.but(micro_batches=2))
    inputs, targets = first_batch(SHORT)
    logits, routings = trainer.model(inputs)
    step = trainer.step()
    assert step.loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-5)
    assert step.bits_per_byte == pytest.approx(step.loss / math.log(2))
    assert [counts.tolist() for counts in step.tokens_per_expert] == [r.tokens_per_expert.tolist() for r in routings]
    assert {counts.dtype for counts in step.tokens_per_expert} == {torch.int64}
    loads = [counts / counts.float().mean() for counts in step.tokens_per_expert]
    assert step.max_violations == [pytest.approx(load.max().item() - 1) for load in loads]
    assert trained(steps=1)[1][0].max_violations == []


# --- schedules, rates, weight decay -------------------------------------------------------------------------------


def test_a_constant_rate_warms_up_and_stays():
    config = TrainConfig(steps=50, warmup_steps=4, learning_rate=0.5, schedule="constant")
    assert [learning_rate_at(step, config) for step in range(50)] == [0.125, 0.25, 0.375] + [0.5] * 47


def test_the_cosine_is_a_cosine():
    config = TrainConfig(steps=50, warmup_steps=10, learning_rate=0.5)
    for step in range(10, 51):
        expected = 0.25 * (1 + math.cos(math.pi * (step - 10) / 40))
        assert learning_rate_at(step, config) == pytest.approx(expected)


def test_a_warm_up_longer_than_the_run_never_reaches_the_top():
    rates = [learning_rate_at(step, TrainConfig(steps=5, warmup_steps=10, learning_rate=1.0)) for step in range(5)]
    assert rates == [pytest.approx(0.1 * n) for n in range(1, 6)]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_every_step_takes_its_rate_and_routers_their_multiple(schedule):
    training = SHORT.but(schedule=schedule, router_rate=10.0)
    trainer = trainer_of(WITH_EXPERTS, training)
    routers = {id(weight) for layer in trainer.model.moe_layers for weight in layer.router.parameters()}
    for index in range(6):
        step = trainer.step()
        assert step.learning_rate == learning_rate_at(index, training)
        for group in trainer.optimizer.param_groups:
            (multiple,) = {10.0 if id(weight) in routers else 1.0 for weight in group["params"]}
            assert group["lr"] == pytest.approx(multiple * step.learning_rate)


@pytest.mark.parametrize("rate", [0.1, 1.0, 10.0])
def test_adams_first_step_shows_the_routers_rate(rate):
    trainer = trainer_of(WITH_EXPERTS, SHORT.but(warmup_steps=0, weight_decay=0.0, router_rate=rate, clip_norm=1e9))
    before = copied(trainer.model.state_dict())
    trainer.step()
    for name, weight in trainer.model.state_dict().items():
        moved = (weight - before[name]).abs().max().item()  # Adam's first step is the rate, whatever the gradient
        assert moved == pytest.approx(0.01 * (rate if "router" in name else 1), rel=1e-3), name


@pytest.mark.parametrize("changes", [{}, {"logit_bias": True, "noisy_top_k": True, "input_jitter": 0.1}], ids=str)
def test_a_router_rate_of_zero_leaves_the_routers_bit_for_bit_and_only_them(changes):
    trainer = trainer_of(WITH_EXPERTS.but(moe=EXPERTS.but(**changes)), SHORT.but(router_rate=0.0))
    before = copied(trainer.model.state_dict())
    for _ in range(6):
        trainer.step()
    after = trainer.model.state_dict()
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == {name for name in before if "router" in name}


def test_a_frozen_router_still_takes_the_bias():
    trainer = trainer_of(WITH_BIAS, SHORT.but(router_rate=0.0, balance=BalanceConfig(bias_rate=0.1)))
    before = trainer.model.moe_layers[0].router.weight.clone()
    trainer.step()
    router = trainer.model.moe_layers[0].router
    assert torch.equal(router.weight, before)
    assert router.selection_bias.any()


def decayed_by(trainer: Trainer) -> set[str]:
    groups = [group for group in trainer.optimizer.param_groups if group["weight_decay"]]
    assert {group["weight_decay"] for group in groups} == {0.1}
    inside = {id(weight) for group in groups for weight in group["params"]}
    return {name for name, weight in trainer.model.named_parameters() if id(weight) in inside}


def test_matrices_and_experts_decay_and_nothing_else():
    experts = EXPERTS.but(
        expert_bias=True, logit_bias=True, noisy_top_k=True, n_shared_experts=1, shared_gate=True, expert="swiglu"
    )
    model = WITH_EXPERTS.but(n_dense_layers=1, moe=experts, conv_width=3, qk_norm="head")
    trainer = trainer_of(model, SHORT)
    attention = {f"blocks.{n}.attention.w_{part}.weight" for n in (0, 1) for part in "qkvo"}
    dense = {f"blocks.0.ffn.w_{part}.weight" for part in ("gate", "up", "down")}
    shared = {f"blocks.1.ffn.shared.ffn.w_{part}.weight" for part in ("gate", "up", "down")}
    routed = {"blocks.1.ffn.experts.w_in", "blocks.1.ffn.experts.w_down", "blocks.1.ffn.shared.gate.weight"}
    router = {"blocks.1.ffn.router.weight", "blocks.1.ffn.router.noise_weight"}
    decayed = attention | dense | shared | routed | router | {"head.weight", "conv.weight"}
    assert decayed_by(trainer) == decayed
    everything = [id(weight) for group in trainer.optimizer.param_groups for weight in group["params"]]
    assert sorted(everything) == sorted(id(weight) for weight in trainer.model.parameters())  # each in one group
    left = {name for name, _ in trainer.model.named_parameters()} - decayed
    assert all("norm" in name or "b_" in name or name.endswith("bias") or "embedding" in name for name in left)


def test_a_tied_table_is_an_embedding_and_does_not_decay():
    trainer = trainer_of(WITH_EXPERTS.but(tied_embeddings=True), SHORT)
    assert not {name for name in decayed_by(trainer) if "embedding" in name or "head" in name}


def test_without_gradients_weights_shrink_by_rate_times_decay():
    trainer = trainer_of(WITH_EXPERTS, SHORT.but(warmup_steps=0, schedule="constant", learning_rate=0.5))
    for weight in trainer.model.parameters():
        weight.register_hook(torch.zeros_like)
    before = copied(trainer.model.state_dict())
    trainer.step()
    decayed = decayed_by(trainer)
    for name, weight in trainer.model.state_dict().items():
        assert_close(weight, before[name] * (0.95 if name in decayed else 1.0))


def test_the_gradient_is_clipped_and_its_norm_told_from_before():
    free, clipped = (trainer_of(WITH_EXPERTS, SHORT.but(clip_norm=norm)) for norm in (1e9, 0.01))
    assert free.step().gradient_norm == clipped.step().gradient_norm > 0.01

    def norm(trainer: Trainer) -> float:
        return torch.stack([weight.grad.norm() for weight in trainer.model.parameters()]).norm().item()

    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)
    assert norm(free) > 0.02


# --- micro-batches and recomputation ------------------------------------------------------------------------------

SUMMED = {
    "no cure": BalanceConfig(),
    "global batch": BalanceConfig(loss="global_batch", alpha=0.5),
    "sequence": BalanceConfig(loss="sequence", alpha=0.5),
    "z-loss": BalanceConfig(z_loss=0.1),
    "all": BalanceConfig(loss="global_batch", alpha=0.5, z_loss=0.1, bias_rate=0.05, recentre=True),
}


@pytest.mark.parametrize("balance", SUMMED.values(), ids=SUMMED)
@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_add_up_to_the_large_batch(micro_batches, balance):
    whole, parts = (
        trainer_of(WITH_BIAS, SHORT.but(balance=balance, micro_batches=n, clip_norm=1e9)) for n in (1, micro_batches)
    )
    one, other = whole.step(), parts.step()
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    assert other.penalty == pytest.approx(one.penalty, rel=1e-5, abs=1e-9)
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)
    assert told(other)[-1] == told(one)[-1]  # the counts
    weights = dict(parts.model.named_parameters())
    for name, weight in whole.model.named_parameters():
        assert_close(
            weights[name].grad, weight.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        clear = (
            weight.grad.abs() > 1e-5
        )  # Adam's first step is a sign, and rounding turns the sign of what is near zero
        assert_close(weights[name][clear], weight[clear], rtol=1e-4, atol=1e-6)
    for one_layer, other_layer in zip(whole.model.moe_layers, parts.model.moe_layers, strict=True):
        assert torch.equal(one_layer.router.selection_bias, other_layer.router.selection_bias)


def test_the_switch_loss_of_micro_batches_is_another_loss():
    penalties = [
        trainer_of(WITH_EXPERTS, SHORT.but(balance=BalanceConfig(alpha=0.5), micro_batches=n)).step().penalty
        for n in (1, 8)
    ]
    assert penalties[1] > penalties[0] + 0.005  # the smaller the batch, the less even it is


@pytest.mark.parametrize("kind", ["switch", "sequence", "global_batch"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_penalty_is_what_was_added_and_the_loss_is_without_it(kind, micro_batches):
    balance = BalanceConfig(loss=kind, alpha=0.5, z_loss=0.01)
    trainer = trainer_of(WITH_EXPERTS, SHORT.but(balance=balance, micro_batches=micro_batches))
    parts = [trainer.model(inputs)[1] for inputs in first_batch(SHORT)[0].chunk(micro_batches)]
    counts = [sum(layer.tokens_per_expert for layer in layers) for layers in zip(*parts, strict=True)]
    expected = 0.0
    for part in parts:
        for layer, routing in enumerate(part):
            loss = {
                "switch": lambda r=routing: switch_loss(r),
                "sequence": lambda r=routing: sequence_loss(r, 8 // micro_batches),
                "global_batch": lambda r=routing, n=counts[layer]: switch_loss(r, tokens_per_expert=n),
            }[kind]()
            expected += (0.5 * loss + 0.01 * z_loss(routing)).item() / micro_batches
    plain = trainer_of(WITH_EXPERTS, SHORT.but(micro_batches=micro_batches)).step()
    step = trainer.step()
    assert step.penalty == pytest.approx(expected, rel=1e-5)
    assert (step.loss, plain.penalty) == (plain.loss, 0.0)
    assert step.gradient_norm != plain.gradient_norm


def test_the_penalty_of_no_strength_is_zero_and_of_two_layers_a_sum():
    routings = trainer_of(WITH_EXPERTS, SHORT).model(first_batch(SHORT)[0])[1]
    assert balance_penalty(routings, BalanceConfig(), 8) == 0
    both = balance_penalty(routings, BalanceConfig(alpha=0.3), 8)
    each = [balance_penalty([routing], BalanceConfig(alpha=0.3), 8) for routing in routings]
    assert_close(both, sum(each))
    assert_close(each[0], 0.3 * switch_loss(routings[0]))
    # without loads of others, the global batch is this one
    assert_close(balance_penalty(routings, BalanceConfig(loss="global_batch", alpha=0.3), 8), both)


JITTERY = WITH_BIAS.but(moe=WITH_BIAS.moe.but(input_jitter=0.3, noisy_top_k=True))


@pytest.mark.parametrize("model", [WITH_BIAS, JITTERY], ids=["calm", "jittery"])
@pytest.mark.parametrize("balance", [SUMMED["all"], SUMMED["all"].but(loss="switch")], ids=lambda b: b.loss)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_recomputation_is_not_counted_twice(model, balance, micro_batches):
    training = SHORT.but(balance=balance, micro_batches=micro_batches)
    steps, states = [], []
    for recompute in (False, True):  # one after the other: they draw their noise from one generator
        trainer = trainer_of(model, training.but(recompute=recompute))
        steps.append([told(trainer.step()) for _ in range(4)])
        states.append(copied(trainer.state()))
    assert steps[0] == steps[1]
    assert_same_bits(*states)


@pytest.mark.parametrize("changes", [{}, {"recompute": True}, {"micro_batches": 4}], ids=str)
def test_every_choice_of_a_step_is_counted_once(changes):
    step = trainer_of(JITTERY, SHORT.but(balance=CURED, **changes)).step()
    assert [counts.sum().item() for counts in step.tokens_per_expert] == [8 * 12 * 2] * 2


def test_the_loads_of_the_global_batch_are_of_the_choices_that_are_trained_on_despite_jitter():
    training = SHORT.but(balance=BalanceConfig(loss="global_batch", alpha=1.0), micro_batches=4)
    trainer = trainer_of(JITTERY, training)
    parts = list(zip(*(side.chunk(4) for side in first_batch(training)), strict=True))
    loads = trainer._loads(parts)
    assert [load.tolist() for load in loads] == told(trainer.step())[-1]


# --- the bias -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recentre", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_bias_moves_by_the_loads_of_the_whole_step(micro_batches, recentre):
    balance = BalanceConfig(bias_rate=0.05, recentre=recentre)
    trainer = trainer_of(WITH_BIAS, SHORT.but(balance=balance, micro_batches=micro_batches))
    biases = [torch.zeros(4) for _ in range(2)]
    for _ in range(4):
        step = trainer.step()
        pairs = zip(biases, step.tokens_per_expert, strict=True)
        biases = [update_bias(bias, counts, 0.05, recentre) for bias, counts in pairs]
        for layer, bias in zip(trainer.model.moe_layers, biases, strict=True):
            assert torch.equal(layer.router.selection_bias, bias)
            assert not recentre or bias.mean().abs() < 1e-6
    assert any(bias.any() for bias in biases)


def test_the_bias_moves_only_with_a_rate():
    trainer = trainer_of(WITH_BIAS, SHORT.but(balance=BalanceConfig(alpha=0.1, z_loss=0.1)))
    with torch.no_grad():
        trainer.model.moe_layers[0].router.selection_bias.copy_(torch.tensor([0.5, 0.0, -0.5, 0.25]))
    for _ in range(3):
        trainer.step()
    assert trainer.model.moe_layers[0].router.selection_bias.tolist() == [0.5, 0.0, -0.5, 0.25]
    assert not trainer.model.moe_layers[1].router.selection_bias.any()


# --- bf16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [CONFIG, WITH_BIAS.but(tied_embeddings=True)], ids=["dense", "experts"])
def test_under_autocast_it_learns_and_weights_stay_fp32(model):
    balance = CURED if model.moe else BalanceConfig()
    exact, mixed = (
        trainer_of(model, SHORT.but(steps=10, precision=precision, balance=balance, micro_batches=2, recompute=True))
        for precision in ("fp32", "bf16")
    )
    used = set()
    mixed.model.head.register_forward_hook(lambda _module, _inputs, logits: used.add(logits.dtype))
    pairs = [(exact.step().loss, mixed.step().loss) for _ in range(10)]
    assert used == {torch.bfloat16}
    assert pairs[0][0] == pytest.approx(pairs[0][1], rel=0.01)
    assert pairs[-1][1] < 0.95 * pairs[0][1]
    dtypes = {tensor.dtype for name, tensor in mixed.state().items() if name.startswith(("model.", "optimizer."))}
    assert dtypes == {torch.float32}


# --- going on -----------------------------------------------------------------------------------------------------

RESUMED = {
    "dense": (CONFIG, SHORT),
    "experts": (WITH_EXPERTS, SHORT),
    "jitter, bias, micro-batches, tied": (JITTERY.but(tied_embeddings=True), SHORT.but(balance=CURED, micro_batches=4)),
    "recomputed": (JITTERY, SHORT.but(balance=CURED, recompute=True)),
    "bf16": (WITH_BIAS, SHORT.but(balance=CURED, precision="bf16")),
    "frozen, constant": (WITH_EXPERTS, SHORT.but(router_rate=0.0, schedule="constant")),
    "expert choice": (WITH_EXPERTS.but(moe=EXPERTS.but(expert_choice=True, input_jitter=0.1)), SHORT),
}


@pytest.mark.parametrize(("model", "training"), RESUMED.values(), ids=RESUMED)
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_resumed_training_is_the_same_bit_for_bit(model, training, through_a_file, tmp_path):
    whole = trainer_of(model, training)
    steps = [told(whole.step()) for _ in range(6)]
    for stop in (0, 3):
        first = trainer_of(model, training)
        assert [told(first.step()) for _ in range(stop)] == steps[:stop]
        state = copied(first.state())
        if through_a_file:
            save(tmp_path / "state.safetensors", state, model)
            state, _ = load(tmp_path / "state.safetensors")
        second = trainer_of(model, training, seed=99)  # other weights, and the generators elsewhere
        torch.rand(7)
        second.load_state(state)
        assert second.index == stop
        assert [told(second.step()) for _ in range(stop, 6)] == steps[stop:]
        assert_same_bits(second.state(), whole.state())


GO_ON = """
import hashlib, sys, torch
from moe_lab.checkpoints import load
from tests.test_train import JITTERY, RESUMED, Trainer, LM, SPLIT
state, _ = load(sys.argv[1])
model, training = RESUMED["jitter, bias, micro-batches, tied"]
trainer = Trainer(LM(model), SPLIT, training)
trainer.load_state(state)
print([trainer.step().loss.hex() for _ in range(3)])
print(hashlib.sha256(b"".join(t.numpy().tobytes() for t in trainer.model.state_dict().values())).hexdigest())
"""


def test_in_a_fresh_process_too(tmp_path):
    model, training = RESUMED["jitter, bias, micro-batches, tied"]
    trainer = trainer_of(model, training)
    for _ in range(3):
        trainer.step()
    save(tmp_path / "state.safetensors", trainer.state(), model)
    losses = [trainer.step().loss.hex() for _ in range(3)]
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in trainer.model.state_dict().values())).hexdigest()
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()})"
    command = [sys.executable, "-c", threads + GO_ON, str(tmp_path / "state.safetensors")]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines() == [str(losses), digest]


def test_a_trainer_can_be_put_back_to_an_earlier_state_even_to_the_beginning():
    trainer = trainer_of(JITTERY, SHORT.but(balance=CURED))
    beginning = copied(trainer.state())
    steps = [told(trainer.step()) for _ in range(2)]
    middle = copied(trainer.state())
    steps += [told(trainer.step()) for _ in range(2)]
    trainer.load_state(middle)
    assert [told(trainer.step()) for _ in range(2)] == steps[2:]
    trainer.load_state(beginning)
    assert [told(trainer.step()) for _ in range(4)] == steps


def test_a_loaded_state_is_not_changed_by_going_on():
    first, second = (trainer_of(WITH_BIAS, SHORT.but(balance=CURED)) for _ in range(2))
    first.step()
    state = copied(first.state())
    before = copied(state)
    second.load_state(state)
    second.step()
    assert_same_bits(state, before)


def test_a_state_holds_weights_moments_and_generators_by_name():
    trainer = trainer_of(WITH_BIAS.but(tied_embeddings=True), SHORT)
    trainer.step()
    state = trainer.state()
    weights = {name for name, _ in trainer.model.named_parameters()}
    moments = {f"optimizer.{name}.{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")}
    assert {name for name in state if name.startswith("optimizer.")} == moments
    assert {name for name in state if not name.startswith(("optimizer.", "model."))} == {
        "random.batches",
        "random.torch",
        "index",
    }
    assert "model.blocks.1.ffn.router.selection_bias" in state
    assert state["index"].item() == 1


def test_looking_changes_nothing():
    plain = trainer_of(JITTERY, SHORT.but(balance=CURED))
    steps = [told(plain.step()) for _ in range(3)]
    expected = copied(plain.state())
    watched, inputs = trainer_of(JITTERY, SHORT.but(balance=CURED)), first_batch(SHORT)[0]
    for index in range(3):
        assert told(watched.step()) == steps[index]
        twice = [evaluate(watched.model, SPLIT, context=16) for _ in range(2)]
        assert twice[0] == twice[1]  # no jitter, no noise
        choices = [choices_of(watched.model, inputs) for _ in range(2)]
        for one, other in zip(*choices, strict=True):
            assert torch.equal(one.topk_experts, other.topk_experts)
            assert not one.topk_weights.requires_grad
        assert watched.model.training
    assert_same_bits(watched.state(), expected)
    assert not choices_of(watched.model.eval(), inputs)[0].router_logits.requires_grad
    assert not watched.model.training


def test_choices_of_experts_that_choose_and_of_dense_models():
    inputs = first_batch(SHORT)[0]
    model = trainer_of(*RESUMED["expert choice"]).model
    assert [type(choice) for choice in choices_of(model, inputs)] == [ExpertChoice] * 2
    assert choices_of(LM(CONFIG), inputs) == ()


@pytest.mark.parametrize("limit", [None, 3, 128])
def test_evaluation_counts_every_byte_once(limit):
    model = LM(WITH_EXPERTS).eval()
    bits = evaluate(model, SPLIT, context=5, limit=limit)
    for domain, text in SPLIT.items():
        inputs, targets = validation_windows(text, context=5, limit=limit)
        with torch.no_grad():
            expected = F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten()) / math.log(2)
        assert bits[domain] == pytest.approx(expected.item(), rel=1e-5)


def test_the_mean_over_domains_counts_each_once():
    assert mean_bits({"a": 1.0, "b": 2.0, "c": 6.0}) == 3.0


# --- divergence ---------------------------------------------------------------------------------------------------


def diverges(trainer: Trainer) -> Diverged:
    """The next step fails, and leaves everything as it was."""
    before, index = copied(trainer.state()), trainer.index
    with pytest.raises(Diverged) as caught:
        trainer.step()
    after = trainer.state()
    generators = {"random.batches", "random.torch"}  # the batch was drawn
    assert before.keys() == after.keys()
    for name in before.keys() - generators:
        assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True)
    assert trainer.index == index == caught.value.step
    assert trainer.model.training
    assert f"at step {index}" in str(caught.value)
    assert "Lower learning_rate=0.01 or lengthen warmup_steps=2." in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "name",
    [
        "embedding.weight",
        "blocks.0.attention.w_o.weight",
        "blocks.1.ffn_norm.weight",
        "blocks.0.ffn.router.weight",
        "blocks.1.ffn.experts.w_down",
        "head.weight",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "training", [SHORT, SHORT.but(balance=CURED, micro_batches=2, recompute=True)], ids=["", "all"]
)
def test_a_weight_that_is_no_number_is_named(name, value, training):
    trainer = trainer_of(WITH_BIAS, training)
    trainer.step()
    trainer.step()
    with torch.no_grad():
        trainer.model.get_parameter(name).fill_(value)
    failure = diverges(trainer)
    assert (failure.step, failure.where) == (2, f"the weight {name}")
    assert f"; the first to give no number is the weight {name}." in str(failure)


@pytest.mark.parametrize("name", ["blocks.0.attention.w_q.weight", "blocks.1.ffn.router.weight", "embedding.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_named(name, value):
    trainer = trainer_of(WITH_EXPERTS, SHORT.but(micro_batches=2))
    trainer.step()
    trainer.model.get_parameter(name).register_hook(lambda grad: torch.full_like(grad, value))
    failure = diverges(trainer)
    assert str(failure).startswith(f"The gradient's norm is {'nan' if value != value else 'inf'} at step 1;")
    assert failure.where == f"the gradient of {name}"


def test_of_many_bad_gradients_the_one_nearest_the_loss_is_named():
    trainer = trainer_of(WITH_EXPERTS, SHORT)
    # what comes back from block 1 is NaN: block 0 and all before it get it too, block 1's own FFN does not
    trainer.model.blocks[1].attention_norm.register_full_backward_hook(
        lambda _module, grads, _out: (grads[0] * math.nan,)
    )
    assert diverges(trainer).where.startswith("the gradient of blocks.0.ffn.")


def test_an_activation_that_is_no_number_is_named_by_its_module():
    trainer = trainer_of(WITH_EXPERTS, SHORT)
    trainer.step()
    trainer.model.blocks[1].attention.register_forward_hook(lambda _module, _inputs, y: y * math.inf)
    failure = diverges(trainer)
    assert failure.where == "blocks.1.attention"
    assert "The router met numbers that are none at step 1" in str(failure)


def test_an_infinite_loss_stops_at_the_head():
    trainer = trainer_of(CONFIG, SHORT)
    with torch.no_grad():
        trainer.model.head.weight.fill_(3e38)
    failure = diverges(trainer)
    assert failure.where == "head"
    assert str(failure).startswith("The loss is ")


@pytest.mark.parametrize("model", [CONFIG, WITH_EXPERTS], ids=["dense", "experts"])
def test_a_loss_twice_that_of_a_model_that_knows_nothing_stops_the_run(model):
    trainer = trainer_of(model, SHORT)
    trainer.step()
    with torch.no_grad():
        trainer.model.head.weight.mul_(2000)
    failure = diverges(trainer)
    assert failure.where is None
    assert "first to give no number" not in str(failure)
    nats = float(str(failure).removeprefix("The loss is ").split()[0])
    assert nats > 2 * math.log(256)
    assert math.isfinite(nats)


def test_just_below_twice_it_goes_on():
    trainer = trainer_of(CONFIG, SHORT)
    loss = trainer_of(CONFIG, SHORT).step().loss
    trainer.too_much = loss  # not above
    assert trainer.step().loss == loss
    trainer.too_much = 0.9 * loss
    diverges(trainer)
    assert trainer_of(CONFIG.but(vocab_size=300), SHORT).too_much == pytest.approx(2 * math.log(300))


def test_a_penalty_that_is_no_number_stops_the_run():
    trainer = trainer_of(WITH_EXPERTS, SHORT.but(balance=BalanceConfig(z_loss=1e38)))
    assert "(and inf for balance)" in str(diverges(trainer))


def test_a_divergence_is_an_arithmetic_error_and_train_passes_it_on():
    def break_it(step: Step) -> None:
        with torch.no_grad():
            model.moe_layers[1].experts.w_in[2, 3, 4] = math.nan

    torch.manual_seed(0)
    model = LM(WITH_EXPERTS)
    with pytest.raises(FloatingPointError, match=r"at step 1; .* the weight blocks\.1\.ffn\.experts\.w_in"):
        train(model, SPLIT, SHORT, break_it)


# --- cures that a model cannot take -------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [{"alpha": 0.1}, {"z_loss": 0.1}, {"bias_rate": 0.1}], ids=str)
def test_a_cure_without_a_patient_is_refused(balance):
    training = SHORT.but(balance=BalanceConfig(**balance))
    with pytest.raises(ValueError, match="balance asks for a cure, but the model has no experts: expected moe in its"):
        Trainer(LM(CONFIG), SPLIT, training)
    with pytest.raises(ValueError, match="with expert_choice=True every expert is equally busy anyway"):
        train(LM(RESUMED["expert choice"][0]), SPLIT, training)


def test_a_bias_rate_needs_routers_with_a_bias():
    training = SHORT.but(balance=BalanceConfig(bias_rate=0.1))
    with pytest.raises(
        ValueError, match=r"bias_rate=0\.1 moves a bias that the routers do not have: .*selection_bias=True"
    ):
        Trainer(LM(WITH_EXPERTS), SPLIT, training)


def test_a_kind_of_loss_without_strength_is_no_cure():
    Trainer(LM(CONFIG), SPLIT, SHORT.but(balance=BalanceConfig(loss="sequence", recentre=True))).step()


def test_a_cure_for_a_model_whose_layers_are_all_dense_is_refused():
    with pytest.raises(ValueError, match="the model has no experts"):
        Trainer(LM(WITH_EXPERTS.but(n_dense_layers=2)), SPLIT, SHORT.but(balance=BalanceConfig(alpha=0.1)))
