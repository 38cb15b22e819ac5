import pytest

from moe_lab.config import (
    BalanceConfig,
    LMConfig,
    MLAConfig,
    MoEConfig,
    RouterConfig,
    RunConfig,
    SwitchConfig,
    TrainConfig,
    n_visible,
)

SMALL = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 16}
ROUTER = {"d_model": 8, "n_experts": 6, "top_k": 2}
EXPERTS = MoEConfig(**ROUTER, d_ff=12)
INF, NAN = float("inf"), float("nan")

ROUTER_RULES = [
    ({"d_model": 0}, r"d_model=0: expected a positive integer"),
    ({"n_experts": -4}, r"n_experts=-4: expected a positive integer"),
    ({"n_experts": 6.0}, r"n_experts=6\.0: expected a positive integer"),
    ({"top_k": 0}, r"top_k=0: expected a positive integer"),
    ({"top_k": True}, r"top_k=True: expected a positive integer"),
    ({"top_k": 7}, r"top_k=7: expected at most n_experts=6"),
    ({"score": "tanh"}, r"score='tanh': expected one of softmax, sigmoid"),
    ({"score": None}, r"score=None: expected one of softmax, sigmoid"),
    ({"normalise": 1}, r"normalise=1: expected True or False"),
    ({"selection_bias": "yes"}, r"selection_bias='yes': expected True or False"),
    ({"logit_bias": None}, r"logit_bias=None: expected True or False"),
    ({"noisy_top_k": 0.1}, r"noisy_top_k=0\.1: expected True or False"),
    ({"scaling_factor": 0}, r"scaling_factor=0: expected a positive number"),
    ({"scaling_factor": -2.5}, r"scaling_factor=-2\.5: expected a positive number"),
    ({"scaling_factor": NAN}, r"scaling_factor=nan: expected a positive number"),
    ({"scaling_factor": INF}, r"scaling_factor=inf: expected a positive number"),
    ({"scaling_factor": "2"}, r"scaling_factor='2': expected a positive number"),
    ({"input_jitter": -0.1}, r"input_jitter=-0\.1: expected a number in \[0, 1\)"),
    ({"input_jitter": 1.0}, r"input_jitter=1\.0: expected a number in \[0, 1\)"),
    ({"input_jitter": NAN}, r"input_jitter=nan: expected a number in \[0, 1\)"),
    ({"n_groups": 0}, r"n_groups=0: expected a positive integer"),
    ({"n_groups": 4}, r"n_groups=4: expected a divisor of n_experts=6"),
    ({"n_groups": 12}, r"n_groups=12: expected a divisor of n_experts=6"),
    ({"groups_kept": 0}, r"groups_kept=0: expected a positive integer"),
    ({"groups_kept": 2}, r"groups_kept=2: expected at most n_groups=1"),
    ({"n_groups": 3, "groups_kept": 4}, r"groups_kept=4: expected at most n_groups=3"),
    ({"n_groups": 3, "top_k": 3}, r"top_k=3: expected at most the 2 experts of the kept groups"),
    ({"group_score": "sum"}, r"group_score='sum': expected one of max, top2_sum"),
    (
        {"n_groups": 6, "groups_kept": 2, "group_score": "top2_sum"},
        r"group_score='top2_sum': expected 'max', for groups of 1 have no two best",
    ),
]
MOE_RULES = [
    ({"d_ff": 0}, r"d_ff=0: expected a positive integer"),
    ({"n_shared_experts": -1}, r"n_shared_experts=-1: expected an integer of 0 or more"),
    ({"n_shared_experts": 1.0}, r"n_shared_experts=1\.0: expected an integer of 0 or more"),
    ({"n_shared_experts": 1, "d_ff_shared": 0}, r"d_ff_shared=0: expected a width for n_shared_experts=1"),
    ({"n_shared_experts": 1, "d_ff_shared": -8}, r"d_ff_shared=-8: expected an integer of 0 or more"),
    ({"d_ff_shared": 8}, r"d_ff_shared=8: expected .* n_shared_experts=0"),
    ({"shared_gate": True}, r"shared_gate=True: expected shared experts to gate, so n_shared_experts of 1 or more"),
    ({"n_shared_experts": 1, "shared_gate": 1}, r"shared_gate=1: expected True or False"),
    ({"expert": "swish"}, r"expert='swish': expected one of swiglu, relu, gelu, clamped_swiglu"),
    ({"expert_bias": 0}, r"expert_bias=0: expected True or False"),
    ({"weigh": "both"}, r"weigh='both': expected one of output, input"),
    ({"drop": "age"}, r"drop='age': expected one of position, score"),
    ({"capacity_factor": 0}, r"capacity_factor=0: expected a positive number, or None to drop nothing"),
    ({"capacity_factor": -1.25}, r"capacity_factor=-1\.25: expected a positive number"),
    ({"capacity_factor": INF}, r"capacity_factor=inf: expected a positive number"),
    ({"capacity_factor": NAN}, r"capacity_factor=nan: expected a positive number"),
    ({"capacity_factor": True}, r"capacity_factor=True: expected a positive number"),
    ({"expert_choice": "yes"}, r"expert_choice='yes': expected True or False"),
    ({"expert_choice": True, "score": "sigmoid"}, r"expert_choice=True: expected False with sigmoid scores, groups"),
    ({"expert_choice": True, "selection_bias": True}, r"expert_choice=True: expected False .* a selection bias"),
    ({"expert_choice": True, "n_groups": 3, "groups_kept": 2}, r"expert_choice=True: expected False"),
    ({"expert_choice": True, "weigh": "input"}, r"expert_choice=True: expected False .* weighed inputs"),
]
BALANCE_RULES = [
    ({"loss": "swich"}, r"loss='swich': expected one of switch, sequence, global_batch"),
    ({"loss": None}, r"loss=None: expected one of switch, sequence, global_batch"),
    ({"alpha": -0.01}, r"alpha=-0\.01: expected a number of 0 or more"),
    ({"alpha": NAN}, r"alpha=nan: expected a number of 0 or more"),
    ({"alpha": INF}, r"alpha=inf: expected a number of 0 or more"),
    ({"alpha": True}, r"alpha=True: expected a number of 0 or more"),
    ({"alpha": "0.1"}, r"alpha='0\.1': expected a number of 0 or more"),
    ({"z_loss": -1}, r"z_loss=-1: expected a number of 0 or more"),
    ({"bias_rate": -1e-3}, r"bias_rate=-0\.001: expected a number of 0 or more"),
    ({"bias_rate": None}, r"bias_rate=None: expected a number of 0 or more"),
    ({"recentre": 1}, r"recentre=1: expected True or False"),
]


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
        ({"qk_norm": "heads"}, r"qk_norm='heads': expected one of none, head, all"),
        ({"moe": {"top_k": 2}}, r"moe=\{'top_k': 2\}: expected a MoEConfig, or None for a dense model"),
        ({"moe": RouterConfig(**ROUTER)}, r"moe=RouterConfig\(.*: expected a MoEConfig, or None for a dense model"),
        ({"moe": EXPERTS.but(d_model=4)}, r"moe\.d_model=4: expected the model's d_model=8"),
        ({"n_dense_layers": 1}, r"n_dense_layers=1: expected 0 where there is no moe"),
        ({"moe": EXPERTS, "n_dense_layers": 2}, r"n_dense_layers=2: expected at most n_layers=1"),
        ({"moe": EXPERTS, "n_dense_layers": -1}, r"n_dense_layers=-1: expected an integer of 0 or more"),
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
        ({"betas": (0.9,)}, r"betas=\(0\.9,\): expected two numbers in \[0, 1\)"),
        ({"betas": "ab"}, r"betas='ab': expected two numbers in \[0, 1\)"),
        ({"micro_batches": 0}, r"micro_batches=0: expected a positive integer"),
        ({"micro_batches": 3}, r"micro_batches=3: expected a divisor of batch_size=16"),
        ({"batch_size": 2, "micro_batches": 4}, r"micro_batches=4: expected a divisor of batch_size=2"),
        ({"schedule": "linear"}, r"schedule='linear': expected one of cosine, constant"),
        ({"precision": "fp16"}, r"precision='fp16': expected one of fp32, bf16"),
        ({"router_rate": -1.0}, r"router_rate=-1\.0: expected a number of 0 or more"),
        ({"router_rate": NAN}, r"router_rate=nan: expected a number of 0 or more"),
        ({"recompute": "no"}, r"recompute='no': expected True or False"),
        ({"seed": -1}, r"seed=-1: expected an integer of 0 or more"),
        ({"balance": {"alpha": 0.1}}, r"balance=\{'alpha': 0\.1\}: expected a BalanceConfig"),
        ({"balance": None}, r"balance=None: expected a BalanceConfig"),
    ],
)
def test_a_training_run_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


LATENT = MLAConfig(kv_rank=6, d_nope=4, d_rope=2, d_value=3)
ATTENTION_RULES = [
    ({"mla": 3}, r"mla=3: expected an MLAConfig, or None for grouped queries"),
    ({"mla": LATENT, "d_head": 4}, r"d_head=4: expected d_nope \+ d_rope = 6, as mla says"),
    ({"mla": LATENT, "n_kv_heads": 1}, r"n_kv_heads=1: expected n_heads=2, for latent attention shares no heads"),
    ({"mla": LATENT, "qk_norm": "head"}, r"qk_norm='head': expected 'none', for mla normalises in its own way"),
    ({"mla": LATENT, "qkv_bias": True}, r"qkv_bias=True: expected False with mla"),
    ({"mla": LATENT, "output_bias": True}, r"output_bias=True: expected False with mla"),
    ({"mla": LATENT, "attention_sinks": True}, r"attention_sinks=True: expected False with mla"),
    ({"mla": LATENT, "window": 4}, r"window=4: expected None with mla"),
    ({"qkv_bias": 1}, r"qkv_bias=1: expected True or False"),
    ({"window": 0}, r"window=0: expected a positive integer"),
    ({"window": 4, "full_every": -1}, r"full_every=-1: expected an integer of 0 or more"),
    ({"full_every": 2}, r"full_every=2: expected 0 where there is no window"),
    ({"window": 4, "chunked": 1}, r"chunked=1: expected True or False"),
    ({"chunked": True}, r"chunked=True: expected False where there is no window"),
    ({"moe_every": 2}, r"moe_every=2: expected 1 where there is no moe"),
    ({"moe_every": 0, "moe": EXPERTS}, r"moe_every=0: expected a positive integer"),
]


@pytest.mark.parametrize(("changes", "message"), ATTENTION_RULES)
def test_attention_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LMConfig(**SMALL | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_rank": 0}, r"kv_rank=0: expected a positive integer"),
        ({"q_rank": 0}, r"q_rank=0: expected a positive integer"),
        ({"d_rope": 3}, r"d_rope=3: expected an even number"),
        ({"d_value": 1.5}, r"d_value=1\.5: expected a positive integer"),
    ],
)
def test_latent_attention_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LATENT.but(**changes)


def test_heads_of_latent_attention_follow_from_it():
    config = LMConfig(**SMALL).but(mla=LATENT)
    assert (config.n_kv_heads, config.d_head) == (2, 6)
    wider = config.but(n_heads=5, mla=LATENT.but(d_rope=8))
    assert (wider.n_kv_heads, wider.d_head) == (5, 12)
    assert config.but(mla=None) == LMConfig(**SMALL)
    grouped = LMConfig(**SMALL, n_kv_heads=1, d_head=6)
    assert grouped.but(mla=LATENT) == config


def test_which_layers_have_experts_and_which_see_all():
    config = LMConfig(**SMALL | {"n_layers": 6}, moe=EXPERTS, n_dense_layers=1, moe_every=2, window=3, full_every=3)
    assert [config.has_experts(layer) for layer in range(6)] == [False, True] * 3
    assert config.n_moe_layers == 3
    assert [config.window_of(layer) for layer in range(6)] == [3, 3, None, 3, 3, None]
    assert [config.but(full_every=0).window_of(layer) for layer in range(3)] == [3, 3, 3]
    assert config.but(n_dense_layers=2).n_moe_layers == 2
    dense = LMConfig(**SMALL)
    assert (dense.n_moe_layers, dense.has_experts(0), dense.window_of(0)) == (0, False, None)


def test_how_many_positions_are_visible():
    assert [n_visible(n) for n in range(4)] == [0, 1, 2, 3]
    assert [n_visible(n, 3) for n in range(8)] == [0, 1, 2, 3, 3, 3, 3, 3]
    assert [n_visible(n, 3, chunked=True) for n in range(8)] == [0, 1, 2, 3, 1, 2, 3, 1]
    assert [n_visible(n, None, chunked=True) for n in range(8)] == list(range(8))


def test_an_encoder_decoder_that_cannot_be_is_refused():
    sizes = {"d_model": 8, "d_ff": 4, "n_heads": 2, "d_head": 4, "n_encoder_layers": 3, "n_decoder_layers": 4}
    assert SwitchConfig(**sizes, n_experts=2).n_moe_layers == 1 + 2
    for changes, message in (({"n_experts": -1}, "n_experts=-1"), ({"gated": 1}, "gated=1"), ({"d_ff": 0}, "d_ff=0")):
        with pytest.raises(ValueError, match=f"^{message}: expected"):
            SwitchConfig(**sizes | changes)


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


@pytest.mark.parametrize(("changes", "message"), ROUTER_RULES)
@pytest.mark.parametrize(("config", "sizes"), [(RouterConfig, ROUTER), (MoEConfig, ROUTER | {"d_ff": 12})])
def test_a_router_that_cannot_be_is_refused(config, sizes, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**sizes | changes)


@pytest.mark.parametrize(("changes", "message"), MOE_RULES)
def test_a_layer_of_experts_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**ROUTER | {"d_ff": 12} | changes)


def test_the_edges_of_what_can_be():
    MoEConfig(d_model=1, n_experts=1, top_k=1, d_ff=1)
    MoEConfig(**ROUTER | {"top_k": 6, "d_ff": 1, "input_jitter": 0.999, "capacity_factor": 1e-9})
    MoEConfig(**ROUTER, d_ff=1, n_groups=6, groups_kept=2)
    MoEConfig(**ROUTER, d_ff=1, n_groups=3, groups_kept=1, group_score="top2_sum")
    MoEConfig(**ROUTER, d_ff=1, group_score="top2_sum")  # without groups it says nothing
    assert LMConfig(**SMALL, moe=EXPERTS).n_moe_layers == 1
    assert LMConfig(**SMALL, moe=EXPERTS, n_dense_layers=1).n_moe_layers == 0
    assert LMConfig(**SMALL).n_moe_layers == 0


def test_shared_experts_are_as_wide_as_routed_ones_unless_told():
    assert EXPERTS.d_ff_shared == 0
    assert MoEConfig(**ROUTER, d_ff=12, n_shared_experts=3).d_ff_shared == 36
    assert MoEConfig(**ROUTER, d_ff=12, n_shared_experts=3, d_ff_shared=20).d_ff_shared == 20


def test_but_works_out_anew_what_was_not_told():
    assert EXPERTS.but(n_shared_experts=2).d_ff_shared == 24
    two = MoEConfig(**ROUTER, d_ff=12, n_shared_experts=2)
    assert two.but(n_shared_experts=3).d_ff_shared == 36
    assert two.but(d_ff=10).d_ff_shared == 20
    assert two.but(n_shared_experts=0).d_ff_shared == 0
    assert two.but(top_k=1) == MoEConfig(**ROUTER | {"top_k": 1}, d_ff=12, n_shared_experts=2)
    told = MoEConfig(**ROUTER, d_ff=12, n_shared_experts=2, d_ff_shared=20)
    assert told.but(d_ff=10, n_shared_experts=1).d_ff_shared == 20


def test_but_works_out_heads_anew_that_were_as_by_default():
    plain = LMConfig(d_model=16, n_layers=1, n_heads=2, d_ff=8)
    assert (plain.but(n_heads=4).n_kv_heads, plain.but(n_heads=4).d_head) == (4, 4)
    assert plain.but(d_model=32).d_head == 16
    told = LMConfig(d_model=16, n_layers=1, n_heads=4, n_kv_heads=2, d_head=6, d_ff=8)
    assert (told.but(d_model=32).n_kv_heads, told.but(d_model=32).d_head) == (2, 6)


def test_a_layer_of_experts_changes_is_compared_and_is_frozen():
    assert EXPERTS.but(top_k=3) == MoEConfig(**ROUTER | {"top_k": 3}, d_ff=12)
    assert EXPERTS.but() == EXPERTS
    assert len({EXPERTS, EXPERTS.but(), EXPERTS.but(top_k=3)}) == 2
    assert type(RouterConfig(**ROUTER).but(top_k=1)) is RouterConfig
    with pytest.raises(ValueError, match="top_k=7: expected at most n_experts=6"):
        EXPERTS.but(top_k=7)
    with pytest.raises(AttributeError):
        EXPERTS.top_k = 3
    with pytest.raises(TypeError):
        MoEConfig(8, 6, 2, 12)


@pytest.mark.parametrize(("changes", "message"), BALANCE_RULES)
def test_a_cure_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        BalanceConfig(**changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        BalanceConfig(alpha=0.1).but(**changes)


def test_without_being_asked_nothing_is_cured():
    assert TrainConfig().balance == BalanceConfig()
    assert (BalanceConfig().alpha, BalanceConfig().z_loss, BalanceConfig().bias_rate) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"model=None: expected an LMConfig"),
        ({"model": SMALL}, r"model=\{'d_model': 8.*\}: expected an LMConfig"),
        ({"training": None}, r"training=None: expected a TrainConfig"),
        ({"training": BalanceConfig()}, r"training=BalanceConfig\(.*\): expected a TrainConfig"),
        ({"evaluate_every": 0}, r"evaluate_every=0: expected a positive integer"),
        ({"save_every": 2.5}, r"save_every=2\.5: expected a positive integer"),
        ({"save_every": True}, r"save_every=True: expected a positive integer"),
    ],
)
def test_a_run_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**{"model": LMConfig(**SMALL)} | changes)
    with pytest.raises(ValueError, match=message):
        RunConfig(model=LMConfig(**SMALL)).but(**changes)


def test_pairs_from_yaml_are_tuples_so_that_configurations_compare_and_hash():
    assert TrainConfig(betas=[0.8, 0.9]).betas == (0.8, 0.9)
    assert TrainConfig(betas=[0.8, 0.9]) == TrainConfig(betas=(0.8, 0.9))
    run = RunConfig(model=LMConfig(**SMALL, moe=EXPERTS), training=TrainConfig(betas=[0.8, 0.9]))
    assert len({run, run.but(), run.but(save_every=1)}) == 2


def test_experts_may_choose_with_all_that_does_not_touch_the_choice():
    choosing = EXPERTS.but(
        expert_choice=True, n_shared_experts=1, expert_bias=True, logit_bias=True, capacity_factor=2.0, input_jitter=0.1
    )
    assert LMConfig(**SMALL, moe=choosing).moe.expert_choice
    assert not choosing.but(expert_choice=False).expert_choice
    with pytest.raises(ValueError, match="expert_choice=True"):
        choosing.but(score="sigmoid")


def test_a_scaling_factor_that_nobody_would_apply_is_refused():
    with pytest.raises(ValueError, match="expert_choice=True"):
        EXPERTS.but(expert_choice=True, scaling_factor=2.5)


def test_betas_that_are_no_pair_are_refused_by_name():
    with pytest.raises(ValueError, match=r"betas=0\.9: expected two numbers in \[0, 1\)"):
        TrainConfig(betas=0.9)
