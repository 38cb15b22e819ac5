import math

import pytest
import torch

from moe_lab.config import LMConfig, TrainConfig
from moe_lab.data import encode
from moe_lab.lm import LM
from moe_lab.train import Diverged, evaluate, learning_rate_at, mean_bits, train

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
