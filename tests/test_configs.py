"""The configurations in configs/: what they say of themselves, how large they are, and that each of them trains."""

import math
from pathlib import Path

import pytest
import torch

from moe_lab.accounting import count_parameters
from moe_lab.config import RunConfig
from moe_lab.data import load_corpus
from moe_lab.lm import LM
from moe_lab.plain import read_config
from moe_lab.presets import BASELINE_TRAINING, DENSE_BASELINE, MOE_BASELINE
from moe_lab.train import Trainer, train

CONFIGS = {path.stem: path for path in sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))}
EVERY_CONFIG = pytest.mark.parametrize("name", CONFIGS)

# In all, and active for one token. By hand for the first: 2 · 256 · 64 (embedding and head) + 3 · 64 (convolution)
# + 2 · (4 · 64² (attention) + 3 · 64 · 128 (SwiGLU) + 2 · 64 (norms)) + 64 (the last norm).
PARAMETERS = {
    "dense_notebook": (115_200, 115_200),
    "moe_notebook": (263_680, 116_224),
    "moe_parallel": (280_064, 132_608),
    "moe_2m": (1_844_736, 468_480),
    "moe_10m": (10_776_576, 2_519_040),
    "moe_30m": (31_710_720, 6_938_112),
    "moe_100m": (108_811_104, 25_547_616),
}


def test_every_configuration_is_counted_here():
    assert CONFIGS.keys() == PARAMETERS.keys()
    by_hand = 2 * 256 * 64 + 3 * 64 + 2 * (4 * 64**2 + 3 * 64 * 128 + 2 * 64) + 64
    assert PARAMETERS["dense_notebook"] == (by_hand, by_hand)


@EVERY_CONFIG
def test_parameters_are_as_many_as_counted_and_as_many_as_built(name):
    config = read_config(CONFIGS[name]).model
    total, active = PARAMETERS[name]
    assert count_parameters(config).total == total
    assert count_parameters(config, active=True).total == active
    with torch.device("meta"):
        model = LM(config)
    biases = [b for name, b in model.named_buffers() if name.endswith("selection_bias")]  # learned, no parameters
    assert sum(weight.numel() for weight in (*model.parameters(), *biases)) == total
    idle = sum(
        weight.numel() // config.moe.n_experts * (config.moe.n_experts - config.moe.top_k)
        for layer in model.moe_layers
        for weight in layer.experts.parameters()
    )
    assert total - idle == active


def test_a_name_says_about_how_many_parameters_there_are():
    for name, (total, _) in PARAMETERS.items():
        if name.endswith("m"):
            millions = int(name.removeprefix("moe_").removesuffix("m"))
            assert total / 1e6 == pytest.approx(millions, rel=0.1)


def test_the_notebooks_configurations_are_the_presets():
    for name, model in (("dense_notebook", DENSE_BASELINE), ("moe_notebook", MOE_BASELINE)):
        config = read_config(CONFIGS[name])
        assert (config.model, config.training) == (model, BASELINE_TRAINING)


def reduced(config: RunConfig) -> RunConfig:
    """As wide as it is, but two layers deep, with two short texts in each micro-batch."""
    training = config.training.but(steps=2, batch_size=2 * config.training.micro_batches, context=16, warmup_steps=1)
    return config.but(model=config.model.but(n_layers=2), training=training)


@EVERY_CONFIG
def test_it_trains_at_reduced_depth(name):
    config = reduced(read_config(CONFIGS[name]))
    torch.manual_seed(0)
    model = LM(config.model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    steps = train(model, load_corpus().train, config.training)
    assert [step.index for step in steps] == [0, 1]
    assert steps[0].bits_per_byte == pytest.approx(8, abs=0.3)
    assert all(math.isfinite(step.loss) and step.gradient_norm > 0 for step in steps)
    has_penalty = config.training.balance.alpha > 0 or config.training.balance.z_loss > 0
    assert (steps[0].penalty > 0) == has_penalty
    batch = config.training.batch_size * config.training.context
    moe = config.model.moe
    assert [counts.sum().item() for counts in steps[0].tokens_per_expert] == (
        [batch * moe.top_k] * config.model.n_moe_layers if moe else []
    )
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == before.keys()


@EVERY_CONFIG
def test_its_cure_is_one_that_its_model_can_take_and_its_text_is_long_enough(name):
    config = read_config(CONFIGS[name])
    split = load_corpus().val  # the shorter one
    assert min(map(len, split.values())) > config.training.context
    with torch.device("meta"):
        Trainer(LM(config.model), split, config.training)
