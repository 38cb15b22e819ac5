import json
import math
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lab.config import BalanceConfig, LMConfig, MoEConfig, RouterConfig, RunConfig, TrainConfig
from moe_lab.plain import differences, from_plain, to_plain
from moe_lab.presets import DENSE_BASELINE, MOE_BASELINE, PRESETS

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
DENSE = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
EXPERTS = {"n_experts": 4, "top_k": 2, "d_ff": 6}
RUN = {"model": DENSE | {"moe": EXPERTS}, "training": {"steps": 3, "balance": {"alpha": 0.1}}}


def changed(path: str, **values: object) -> dict:
    """`RUN` with values put, or keys added, at a place such as "model.moe"."""
    run = json.loads(json.dumps(RUN))
    place = run
    for key in filter(None, path.split(".")):
        place = place[key]
    place.update(values)
    return run


@st.composite
def runs(draw):
    """Any run, with fields of every kind."""
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    shared = pick(0, 0, 2)
    moe = MoEConfig(
        d_model=8,
        d_ff=pick(6, 10),
        n_experts=pick(4, 8),
        top_k=pick(1, 2),
        score=pick("softmax", "sigmoid"),
        scaling_factor=draw(st.floats(1e-6, 1e6)),
        n_groups=pick(1, 2),
        selection_bias=pick(True, False),
        n_shared_experts=shared,
        d_ff_shared=pick(None, 7) if shared else None,
        capacity_factor=pick(None, 1.25, 1),
        input_jitter=pick(0, 0.1),
    )
    model = LMConfig(**DENSE, moe=pick(None, moe), conv_width=pick(0, 3), tied_embeddings=pick(True, False))
    balance = BalanceConfig(
        loss=pick("switch", "sequence", "global_batch"), alpha=draw(st.floats(0, 1e9)), recentre=pick(True, False)
    )
    training = TrainConfig(
        learning_rate=draw(st.floats(1e-300, 1e300)),
        betas=(draw(st.floats(0, 0.999)), 0.95),
        seed=draw(st.integers(0, 2**40)),
        balance=balance,
    )
    return RunConfig(model=model, training=training, save_every=pick(1, 250))


@PROPERTY
@given(runs())
def test_what_is_made_plain_reads_back_the_same_through_yaml_and_json(config):
    plain = to_plain(config)
    assert from_plain(RunConfig, plain) == config
    assert from_plain(RunConfig, json.loads(json.dumps(plain))) == config
    assert from_plain(RunConfig, yaml.safe_load(yaml.safe_dump(plain, sort_keys=False))) == config
    assert differences(config, from_plain(RunConfig, plain)) == []
    assert to_plain(config) == plain


@pytest.mark.parametrize(
    "config", [*(preset.config for preset in PRESETS.values()), DENSE_BASELINE, MOE_BASELINE, TrainConfig()]
)
def test_every_preset_survives(config):
    assert from_plain(type(config), json.loads(json.dumps(to_plain(config)))) == config


def test_plain_data_hold_nothing_but_what_yaml_and_json_know():
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        return (
            all(map(plain, value))
            if isinstance(value, list)
            else value is None or type(value) in (str, int, float, bool)
        )

    data = to_plain(from_plain(RunConfig, RUN))
    assert plain(data)
    assert data["training"]["betas"] == [0.9, 0.95]
    assert data["training"]["balance"]["loss"] == "switch"  # every default is spelt out
    assert data["model"]["n_kv_heads"] == 2


def test_a_dense_run_says_that_it_has_no_experts():
    assert to_plain(from_plain(RunConfig, {"model": DENSE}))["model"]["moe"] is None


def test_the_width_of_the_experts_input_is_the_models_unless_told():
    assert from_plain(RunConfig, RUN).model.moe.d_model == 8
    assert from_plain(RunConfig, changed("model.moe", d_model=8)).model.moe.d_model == 8
    with pytest.raises(ValueError, match=r"^model: moe\.d_model=4: expected the model's d_model=8"):
        from_plain(RunConfig, changed("model.moe", d_model=4))
    with pytest.raises(ValueError, match=r"^missing d_model, which MoEConfig needs"):
        from_plain(MoEConfig, EXPERTS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("", trainning={}), "unknown key 'trainning' (did you mean 'training'?)."),
        (changed("model", n_layer=2), "model: unknown key 'n_layer' (did you mean 'n_layers'?)."),
        (changed("model.moe", topk=1), "model.moe: unknown key 'topk' (did you mean 'top_k'?)."),
        (changed("training", learning_rat=1), "training: unknown key 'learning_rat' (did you mean 'learning_rate'?)."),
        (changed("training.balance", alhpa=1), "training.balance: unknown key 'alhpa' (did you mean 'alpha'?)."),
        (
            changed("training", step=1, warmup=2),
            "training: unknown keys 'step' (did you mean 'steps'?), 'warmup' (did you mean 'warmup_steps'?).",
        ),
        (
            changed("training.balance", gamma=1),  # near to nothing: all that there are
            "training.balance: unknown key 'gamma' (known: loss, alpha, z_loss, bias_rate, recentre).",
        ),
        (changed("", **{"1": 2}), "unknown key '1' (known: model, training, evaluate_every, save_every)."),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest_right_one(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_plain(RunConfig, values)


@pytest.mark.parametrize("key", [1, None, True, 2.5, ("a",)])
def test_a_key_that_is_no_text_is_named_too(key):
    with pytest.raises(ValueError, match=f"unknown key {re.escape(repr(str(key)))}"):
        from_plain(RunConfig, changed("") | {key: 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "missing model, which RunConfig needs."),
        ({"training": {}}, "missing model, which RunConfig needs."),
        ({"model": {"d_model": 8}}, "model: missing n_layers, n_heads, d_ff, which LMConfig needs."),
        (
            {"model": DENSE | {"moe": {"n_experts": 4}}},
            "model.moe: missing top_k, d_ff, which MoEConfig needs.",
        ),
    ],
)
def test_missing_keys_are_named(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_plain(RunConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "the configuration is None: expected keys and values (RunConfig)."),
        ([1], "the configuration is [1]: expected keys and values (RunConfig)."),
        ("model", "the configuration is 'model': expected keys and values (RunConfig)."),
        (changed("", model=3), "model is 3: expected keys and values (LMConfig)."),
        (changed("model", moe="mixtral"), "model.moe is 'mixtral': expected keys and values (MoEConfig)."),
        (changed("training", balance=["switch"]), "training.balance is ['switch']: expected keys and values"),
    ],
)
def test_what_holds_no_keys_is_refused(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        from_plain(RunConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed("training.balance", loss="swich"), "training.balance: loss='swich': expected one of switch, sequence"),
        (changed("training.balance", loss=None), "training.balance: loss=None: expected one of switch"),
        (changed("training.balance", alpha=-0.1), "training.balance: alpha=-0.1: expected a number of 0 or more."),
        (changed("training.balance", bias_rate=-1e-3), "training.balance: bias_rate=-0.001: expected a number of 0"),
        (changed("training.balance", bias_rate="-1e-3"), "training.balance: bias_rate=-0.001: expected a number of 0"),
        (changed("training.balance", alpha="much"), "training.balance: alpha='much': expected a number of 0 or more."),
        (changed("training.balance", alpha="nan"), "training.balance: alpha=nan: expected a number of 0 or more."),
        (changed("training.balance", alpha=True), "training.balance: alpha=True: expected a number of 0 or more."),
        (changed("training.balance", alpha=[1]), "training.balance: alpha=[1]: expected a number of 0 or more."),
        (changed("training", steps="1e3"), "training: steps='1e3': expected a positive integer."),
        (changed("training", steps=None), "training: steps=None: expected a positive integer."),
        (changed("model.moe", top_k=9), "model.moe: top_k=9: expected at most n_experts=4."),
        (changed("", training=None), "training=None: expected a TrainConfig."),
        (changed("", save_every=0), "save_every=0: expected a positive integer."),
    ],
)
def test_a_value_that_cannot_be_is_told_with_its_place(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        from_plain(RunConfig, values)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3"])
def test_yaml_numbers_without_a_point_are_numbers(text):
    values = yaml.safe_load(f"""
model: {{d_model: 8, n_layers: 1, n_heads: 2, d_ff: 16, rope_theta: 1e4}}
training: {{learning_rate: {text}, balance: {{alpha: {text}, z_loss: 0}}}}
""")
    config = from_plain(RunConfig, values)
    assert config.training.learning_rate == config.training.balance.alpha == 0.001
    assert config.model.rope_theta == 10_000
    assert all(type(x) is float for x in (config.training.learning_rate, config.model.rope_theta))


def test_text_stays_text_where_text_is_meant():
    with pytest.raises(ValueError, match="score='1e-3': expected one of softmax, sigmoid"):
        from_plain(RouterConfig, {"d_model": 1, "n_experts": 2, "top_k": 1, "score": "1e-3"})
    assert from_plain(MoEConfig, EXPERTS | {"d_model": 8, "capacity_factor": "125e-2"}).capacity_factor == 1.25


def test_the_arguments_are_left_as_they_are():
    before = json.dumps(RUN)
    from_plain(RunConfig, RUN)
    assert json.dumps(RUN) == before


def test_differences_are_told_field_by_field_with_their_place():
    one = from_plain(RunConfig, RUN)
    training = one.training.but(steps=200, balance=BalanceConfig(alpha=1.0, loss="sequence"))
    other = one.but(model=one.model.but(moe=one.model.moe.but(top_k=1)), training=training)
    assert differences(one, other) == [
        "model.moe.top_k: 2 against 1",
        "training.steps: 3 against 200",
        "training.balance.loss: 'switch' against 'sequence'",
        "training.balance.alpha: 0.1 against 1.0",
    ]
    assert differences(one, one) == []


def test_experts_against_none_are_a_difference():
    one = from_plain(RunConfig, RUN)
    (line,) = differences(one, one.but(model=one.model.but(moe=None)))
    assert line.startswith("model.moe: MoEConfig(")
    assert line.endswith(" against None")


def test_infinities_do_not_come_in_through_text():
    for text in ("inf", "-inf", "1e999"):
        with pytest.raises(ValueError, match="expected a positive number"):
            from_plain(TrainConfig, {"learning_rate": text})
    assert math.isfinite(from_plain(TrainConfig, {"learning_rate": "1e30"}).learning_rate)
