import pytest

from moe_lab.config import LMConfig, TrainConfig

SMALL = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, r"d_model=0: expected a positive integer"),
        ({"d_model": 8.0}, r"d_model=8\.0: expected a positive integer"),
        ({"n_layers": True}, r"n_layers=True: expected a positive integer"),
        ({"n_heads": 3}, r"n_heads=3: expected a divisor of d_model=8, or an explicit d_head"),
        ({"n_kv_heads": 4}, r"n_kv_heads=4: expected a divisor of n_heads=2"),
        ({"d_head": 3}, r"d_head=3: expected an even number"),
        ({"ffn": "swish"}, r"ffn='swish': expected one of swiglu, relu, gelu"),
        ({"conv_width": -1}, r"conv_width=-1: expected an integer of 0 or more"),
        ({"rope_theta": 0}, r"rope_theta=0: expected a positive number"),
        ({"norm_eps": -1e-5}, r"norm_eps=-1e-05: expected a positive number"),
        ({"vocab_size": -256}, r"vocab_size=-256: expected a positive integer"),
    ],
)
def test_a_model_that_cannot_be_is_refused_where_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        LMConfig(**SMALL | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps=0: expected a positive integer"),
        ({"context": 1.5}, r"context=1\.5: expected a positive integer"),
        ({"warmup_steps": -1}, r"warmup_steps=-1"),
        ({"learning_rate": 0}, r"learning_rate=0: expected a positive number"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1"),
        ({"clip_norm": 0}, r"clip_norm=0"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\): expected two numbers in \[0, 1\)"),
    ],
)
def test_a_training_run_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_heads_default_to_multi_head_attention():
    config = LMConfig(**SMALL)
    assert (config.n_kv_heads, config.d_head) == (2, 4)


def test_but_changes_and_validates_again():
    assert LMConfig(**SMALL).but(d_ff=32).d_ff == 32
    with pytest.raises(ValueError, match="d_ff=-1"):
        LMConfig(**SMALL).but(d_ff=-1)


def test_fields_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        LMConfig(8, 1, 2, 16)
    with pytest.raises(AttributeError):
        LMConfig(**SMALL).d_ff = 1
