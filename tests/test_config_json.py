"""`config.json` files: transformers' own, with released and with ugly sizes, and files that are wrong in many ways."""

import contextlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_lab.accounting import cache_bytes, count_mtp, count_parameters
from moe_lab.config_json import FAMILIES, MOST_BYTES, ConfigJsonError, read_config_json
from moe_lab.paths import CourseError
from moe_lab.presets import PRESETS

# DeepSeek-V3's file, as it was released.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 40, "type": "yarn"},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000.0,
    "num_nextn_predict_layers": 0,
}
DEEPSEEK_MOE = {  # its class came with the weights
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "vocab_size": 102400,
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 5,
    "vocab_size": 101,
}
QWEN2_MOE = MIXTRAL | {
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_hidden_layers": 6,
}
QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}
LLAMA_4 = MIXTRAL | {"model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 64, "num_experts_per_tok": 1}


def released(name: str) -> dict:
    """What transformers' own configuration of a preset writes; its values are the released ones."""
    transformers = pytest.importorskip("transformers")
    config = PRESETS[name].config
    moe, mla = config.moe, config.mla
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.d_ff,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }
    kind = next(kind for start, kind in CLASSES.items() if name.startswith(start))
    if kind in ("Mistral", "Mixtral", "GptOss"):
        values["sliding_window"] = config.window
    if kind in ("Qwen3Moe", "GptOss", "Llama4Text"):
        values["head_dim"] = config.d_head
    if moe:
        values["num_experts_per_tok"] = moe.top_k
        values["n_routed_experts" if mla else "num_experts" if "Qwen" in kind else "num_local_experts"] = moe.n_experts
    if kind in ("Qwen3Moe", "DeepseekV2", "DeepseekV3"):
        values |= {"moe_intermediate_size": moe.d_ff, "norm_topk_prob": moe.normalise}
    if kind == "Llama4Text":
        values |= {
            "intermediate_size": moe.d_ff,
            "intermediate_size_mlp": config.d_ff,
            "interleave_moe_layer_step": config.moe_every,
            "attention_chunk_size": config.window,
        }
    if mla:
        values |= {
            "q_lora_rank": mla.q_rank,
            "kv_lora_rank": mla.kv_rank,
            "qk_nope_head_dim": mla.d_nope,
            "qk_rope_head_dim": mla.d_rope,
            "v_head_dim": mla.d_value,
            "n_shared_experts": moe.n_shared_experts,
            "first_k_dense_replace": config.n_dense_layers,
            "routed_scaling_factor": moe.scaling_factor,
            "n_group": moe.n_groups,
            "topk_group": moe.groups_kept,
        }
    if kind == "DeepseekV2":
        values["topk_method"] = "greedy" if moe.n_groups == 1 else "group_limited_greedy"
    return getattr(transformers, f"{kind}Config")(**values).to_dict()


# The class of a preset, by how its name starts; the first that fits.
CLASSES = {
    "Llama 4": "Llama4Text",
    "Llama": "Llama",
    "DeepSeek-67B": "Llama",
    "Mistral": "Mistral",
    "Mixtral": "Mixtral",
    "Qwen2.5": "Qwen2",
    "Qwen3": "Qwen3Moe",
    "OLMoE": "Olmoe",
    "DeepSeek-V2": "DeepseekV2",
    "DeepSeek": "DeepseekV3",
    "Kimi": "DeepseekV3",
    "gpt-oss": "GptOss",
}
DECODERS = [name for name in PRESETS if not name.startswith(("Switch", "T5", "DeepSeekMoE"))]


@pytest.mark.parametrize("name", DECODERS)
def test_transformers_file_of_a_released_model_is_its_preset(name, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(released(name)))
    found, expected = read_config_json(path), PRESETS[name].config
    if name == "OLMoE-1B-7B":
        assert found.config.qk_norm == "all"
    assert found.config == expected
    for active in (False, True):
        ours, theirs = (count_parameters(config, active) for config in (found.config, expected))
        assert (ours.total, ours.without_embedding) == (theirs.total, theirs.without_embedding)
    assert found.left_out == {}
    assert found.name == tmp_path.name


@pytest.mark.parametrize(
    ("values", "name"), [(V3, "DeepSeek-V3"), (KIMI_K2, "Kimi-K2"), (DEEPSEEK_MOE, "DeepSeekMoE-16B")]
)
def test_released_files_are_their_presets(values, name):
    found = read_config_json(values)
    assert found.config == PRESETS[name].config
    assert found.n_mtp == PRESETS[name].n_mtp
    assert found.left_out == {}
    assert found.model_type == found.name == values["model_type"]


def test_the_module_beside_v3_is_counted_apart():
    found = read_config_json(V3)
    assert found.n_mtp == 1
    assert count_mtp(found.config).total == 11_610_068_224
    assert count_parameters(found.config).total == 671_026_419_200


def test_llama_4_is_its_text_model():
    transformers = pytest.importorskip("transformers")
    text = released("Llama 4 Maverick")
    values = transformers.Llama4Config(text_config=text).to_dict()
    found = read_config_json(values | {"architectures": ["Llama4ForConditionalGeneration"]})
    assert found.config == PRESETS["Llama 4 Maverick"].config
    assert found.left_out == {"vision_config": values["vision_config"]}


# --- against the classes, in ugly sizes -------------------------------------------------------------------------------

UGLY = {
    "vocab_size": 107,
    "hidden_size": 36,
    "intermediate_size": 58,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "pad_token_id": None,
}
UGLY_EXPERTS = {"num_local_experts": 7, "num_experts_per_tok": 3}
UGLY_LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 17,
    "n_routed_experts": 8,
    "n_shared_experts": 3,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 19,
    "first_k_dense_replace": 2,
    "n_group": 4,
    "topk_group": 2,
}
UGLY_GLM = {name: value for name, value in UGLY_LATENT.items() if name[0] not in "kqv"} | {"head_dim": 14}
UGLY_GLM |= {"num_key_value_heads": 3}
VARIANTS = {
    "llama": ("Llama", {}),
    "llama, biases, wide heads": ("Llama", {"attention_bias": True, "head_dim": 14}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 10}),
    "mixtral": ("Mixtral", UGLY_EXPERTS),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 22}),
    "qwen3, biases": ("Qwen3", {"head_dim": 22, "attention_bias": True}),
    "qwen2_moe": (
        "Qwen2Moe",
        UGLY_EXPERTS | {"num_experts": 7, "moe_intermediate_size": 21, "shared_expert_intermediate_size": 33},
    ),
    "qwen2_moe, no biases, dense layers": (
        "Qwen2Moe",
        {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 21, "shared_expert_intermediate_size": 33}
        | {"qkv_bias": False, "mlp_only_layers": [0, 1]},
    ),
    "qwen3_moe, every third": (
        "Qwen3Moe",
        UGLY_EXPERTS | {"head_dim": 22, "moe_intermediate_size": 21, "decoder_sparse_step": 3},
    ),
    "qwen3_moe, every second from the fourth on": (
        "Qwen3Moe",
        UGLY_EXPERTS | {"moe_intermediate_size": 21, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "olmoe": ("Olmoe", {"num_experts": 7, "num_experts_per_tok": 3}),
    "olmoe, biases": ("Olmoe", {"num_experts": 7, "num_experts_per_tok": 3, "attention_bias": True}),
    "deepseek_v2": ("DeepseekV2", UGLY_LATENT | {"q_lora_rank": 15}),
    "deepseek_v2, queries from x": ("DeepseekV2", UGLY_LATENT | {"q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3", UGLY_LATENT | {"q_lora_rank": 15}),
    "deepseek_v3, queries from x": ("DeepseekV3", UGLY_LATENT | {"q_lora_rank": None, "tie_word_embeddings": True}),
    "glm4_moe": ("Glm4Moe", UGLY_GLM),
    "glm4_moe, biases and norms": ("Glm4Moe", UGLY_GLM | {"attention_bias": True, "use_qk_norm": True}),
    "gpt_oss": ("GptOss", UGLY_EXPERTS | {"head_dim": 10}),
    "gpt_oss, no biases": ("GptOss", UGLY_EXPERTS | {"head_dim": 10, "attention_bias": False}),
    "llama4, every second": (
        "Llama4Text",
        UGLY_EXPERTS | {"head_dim": 14, "intermediate_size_mlp": 77, "interleave_moe_layer_step": 2},
    ),
    "llama4, layers listed, biases": (
        "Llama4Text",
        UGLY_EXPERTS
        | {"head_dim": 14, "intermediate_size_mlp": 77, "moe_layers": [3, 4, 5, 6], "attention_bias": True},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_class_holds_what_is_counted(variant, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind, values = VARIANTS[variant]
    config = getattr(transformers, f"{kind}Config")(**UGLY | values)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    held = sum(weight.numel() for weight in model.parameters())  # a tied table comes once
    held += sum(bias.numel() for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias"))
    path = tmp_path / "ugly.json"
    path.write_text(json.dumps(config.to_dict()))
    found = read_config_json(path)
    assert count_parameters(found.config).total == held
    assert found.left_out == {}
    assert found.name == "ugly"


def test_every_family_is_held_against_its_class():
    tried = {variant.split(",")[0] for variant in VARIANTS} | {"llama4_text"}
    assert tried | {"deepseek", "kimi_k2"} == set(FAMILIES)


# --- traps ------------------------------------------------------------------------------------------------------------


def test_heads_of_qwen3_are_wider_than_their_share():
    """Without the field, transformers derives 64, and 30.5 billion parameters become 30.1."""
    values = released("Qwen3-30B-A3B")
    assert read_config_json(values).config.d_head == 128
    del values["head_dim"]
    assert count_parameters(read_config_json(values).config).total == 30_079_131_648


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_a_field_may_have_two_names(name):
    values = {key: value for key, value in MIXTRAL.items() if key != "num_local_experts"} | {name: 7}
    assert read_config_json(values).config.moe.n_experts == 7


def test_two_names_of_a_field_have_to_agree():
    assert read_config_json(MIXTRAL | {"num_experts": 5}).config.moe.n_experts == 5
    with pytest.raises(ValueError, match="num_experts=6: expected 5, as num_local_experts says"):
        read_config_json(MIXTRAL | {"num_experts": 6})


@pytest.mark.parametrize("rank", [None, 0])
def test_queries_without_a_rank_come_from_the_token(rank):
    assert read_config_json(V3 | {"q_lora_rank": rank}).config.mla.q_rank is None


def test_no_shared_experts_may_be_written_as_null():
    assert read_config_json(V3 | {"n_shared_experts": None}).config.moe.d_ff_shared == 0


def test_greedy_choice_knows_no_groups():
    values = V3 | {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax"}
    assert read_config_json(values | {"topk_method": "greedy"}).config.moe.n_groups == 1
    assert read_config_json(values | {"topk_method": "group_limited_greedy"}).config.moe.groups_kept == 4


def test_theta_is_found_in_either_place():
    assert read_config_json(MIXTRAL | {"rope_theta": 7e5}).config.rope_theta == 7e5
    inside = {"rope_parameters": {"rope_theta": 3e5}}
    assert read_config_json(MIXTRAL | inside | {"rope_theta": 7e5}).config.rope_theta == 3e5
    assert read_config_json(MIXTRAL).config.rope_theta == 1e4


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, (0, 1)),
        ({"decoder_sparse_step": 3}, (0, 3)),
        ({"mlp_only_layers": [1, 0]}, (2, 1)),
        ({"mlp_only_layers": [0, 1, 2, 3, 4, 5]}, (6, 1)),
        ({"mlp_only_layers": [0, 1, 2, 3, 4]}, (5, 1)),
        ({"mlp_only_layers": [0, 2, 4]}, (0, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3, 2)),
        ({"decoder_sparse_step": 4}, (3, 1)),  # which is the last but two
    ],
)
def test_layers_with_experts(said, expected):
    config = read_config_json(QWEN2_MOE | said).config
    dense, step = set(said.get("mlp_only_layers", [])), said.get("decoder_sparse_step", 1)
    assert [config.has_experts(layer) for layer in range(6)] == [
        layer not in dense and (layer + 1) % step == 0 for layer in range(6)
    ]
    if step != 4:
        assert (config.n_dense_layers, config.moe_every) == expected


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (QWEN2_MOE | {"mlp_only_layers": [2]}, "mlp_only_layers"),
        (QWEN2_MOE | {"mlp_only_layers": [5]}, "mlp_only_layers"),
        (V3 | {"moe_layer_freq": 2}, "moe_layer_freq"),  # counted from 0
        (LLAMA_4 | {"num_hidden_layers": 6, "moe_layers": [1, 2, 4]}, "moe_layers"),
    ],
)
def test_an_order_of_layers_that_cannot_be_said(values, name):
    with pytest.raises(ValueError, match=rf"^{name}=.*: expected dense layers first and then experts in every"):
        read_config_json(values)


@pytest.mark.parametrize(
    ("said", "windows"),
    [
        ({}, [None] * 6),
        ({"sliding_window": 9}, [None] * 6),  # which is not used
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, [9] * 6),
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 6}, [None] * 6),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, [None] * 6),
        (
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
            },
            [9, None] * 3,
        ),
        ({"use_sliding_window": False, "max_window_layers": 2, "layer_types": None}, [None] * 6),
    ],
)
def test_windows(said, windows):
    found = read_config_json(QWEN2 | said)
    assert [found.config.window_of(layer) for layer in range(6)] == windows
    assert found.left_out == {}


def test_windows_that_cannot_be_said_are_left_out_aloud():
    said = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 4}
    found = read_config_json(QWEN2 | said)
    assert found.config.window is None
    assert found.left_out == said


def test_windows_of_gpt_oss_and_llama_4_without_a_list_of_layers():
    gpt_oss = MIXTRAL | {"model_type": "gpt_oss", "head_dim": 8, "sliding_window": 5, "num_hidden_layers": 6}
    config = read_config_json(gpt_oss).config
    assert [config.window_of(layer) for layer in range(6)] == [5, None] * 3
    assert not config.chunked
    config = read_config_json(LLAMA_4 | {"attention_chunk_size": 5, "num_hidden_layers": 8}).config
    assert config.chunked
    assert [config.window_of(layer) for layer in range(8)] == [5, 5, 5, None] * 2
    config = read_config_json(LLAMA_4 | {"attention_chunk_size": 5, "no_rope_layers": [1, 0, 1]}).config
    assert [config.window_of(layer) for layer in range(3)] == [5, None, 5]
    assert cache_bytes(config, 100) == (5 + 100 + 5) * 2 * 2 * 8 * 2
    assert cache_bytes(config, 101) == (1 + 101 + 1) * 2 * 2 * 8 * 2  # a chunk has begun
    assert not read_config_json(LLAMA_4 | {"attention_chunk_size": None}).config.chunked
    kinds = ["chunked_attention", "full_attention", "chunked_attention"]
    assert read_config_json(LLAMA_4 | {"attention_chunk_size": 5, "layer_types": kinds}).config == config


def test_what_is_not_known_is_left_out_by_name():
    strange = {"memory_slots": 4, "mup": {"scale": 2}, "head_dim": 8}
    found = read_config_json(MIXTRAL | strange | {"pad_token_id": 3, "_name_or_path": "x", "hidden_dropout": 0.1})
    assert found.left_out == {"memory_slots": 4, "mup": {"scale": 2}}


def test_the_class_tells_the_family_if_nothing_else_does():
    values = {key: value for key, value in V3.items() if key != "model_type"}
    assert read_config_json(values).model_type == "deepseek_v3"


# --- wrong values -----------------------------------------------------------------------------------------------------

KNOWN = "expected one of llama, mistral, mixtral, "
WRONG = {
    "zero layers": (MIXTRAL | {"num_hidden_layers": 0}, "num_hidden_layers=0: expected a whole number, 1 to 10,000"),
    "endless layers": (MIXTRAL | {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: expected"),
    "too many chosen": (
        MIXTRAL | {"num_experts_per_tok": 6},
        "num_experts_per_tok=6: expected at most num_local_experts=5",
    ),
    "kv heads": (
        MIXTRAL | {"num_key_value_heads": 3},
        "num_key_value_heads=3: expected a divisor of num_attention_heads=4",
    ),
    "heads": (
        MIXTRAL | {"num_attention_heads": 6},
        "num_attention_heads=6: expected a divisor of hidden_size=32, or an explicit head_dim",
    ),
    "odd heads": (MIXTRAL | {"head_dim": 7}, "head_dim=7: expected an even number"),
    "negative": (MIXTRAL | {"hidden_size": -32}, "hidden_size=-32: expected a positive integer"),
    "negative experts": (MIXTRAL | {"num_local_experts": -1}, "num_local_experts=-1: expected a positive integer"),
    "text for a number": (MIXTRAL | {"vocab_size": "101"}, "vocab_size='101': expected a positive integer"),
    "a fraction": (MIXTRAL | {"intermediate_size": 48.0}, "intermediate_size=48.0: expected a positive integer"),
    "a truth value": (MIXTRAL | {"num_hidden_layers": True}, "num_hidden_layers=True: expected a whole number"),
    "null": (MIXTRAL | {"num_experts_per_tok": None}, "num_experts_per_tok=None: expected a positive integer"),
    "not a number": (MIXTRAL | {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: expected a number"),
    "past all measure": (MIXTRAL | {"rope_theta": 10**400}, "rope_theta=10+: expected a number of at most"),
    "rope_parameters": (MIXTRAL | {"rope_parameters": [1]}, r"rope_parameters=\[1\]: expected names and values"),
    "a window": (MIXTRAL | {"sliding_window": -1}, "sliding_window=-1: expected a whole number, 1 or more"),
    "tied": (MIXTRAL | {"tie_word_embeddings": "no"}, "tie_word_embeddings='no': expected True or False"),
    "heads of latent attention": (
        V3 | {"num_key_value_heads": 8},
        "num_key_value_heads=8: expected num_attention_heads=128",
    ),
    "rank": (V3 | {"kv_lora_rank": 0}, "kv_lora_rank=0: expected a positive integer"),
    "groups": (V3 | {"n_group": 7}, "n_group=7: expected a divisor of n_routed_experts=256"),
    "dense layers": (
        V3 | {"first_k_dense_replace": 62},
        "first_k_dense_replace=62: expected a whole number, 0 to 61",
    ),
    "another score": (V3 | {"scoring_func": "softmax"}, "scoring_func='softmax': expected 'sigmoid'"),
    "biases in latent attention": (V3 | {"attention_bias": True}, "attention_bias=True: expected False"),
    "biases in the ffn": (
        {**QWEN2, "model_type": "llama", "mlp_bias": True},
        "mlp_bias=True: expected False; other models of type llama cannot be counted here",
    ),
    "an encoder": (MIXTRAL | {"is_encoder_decoder": True}, "is_encoder_decoder=True: expected False"),
    "a layer too many": (
        LLAMA_4 | {"moe_layers": [1, 3]},
        r"moe_layers=\[1, 3\]: expected a list of layers, 0 to 2",
    ),
    "no list": (QWEN2_MOE | {"mlp_only_layers": 3}, "mlp_only_layers=3: expected a list of layers, 0 to 5"),
    "no step": (QWEN2_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step=0: expected a whole number, 1 or more"),
    "shared width": (
        QWEN2_MOE | {"shared_expert_intermediate_size": -4},
        "shared_expert_intermediate_size=-4: expected",
    ),
    "kinds of layers": (
        QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["linear"] * 6},
        "layer_types=.*: expected a list of full_attention or sliding_attention",
    ),
    "windows that slide in place of chunks": (
        LLAMA_4 | {"attention_chunk_size": 4, "layer_types": ["sliding_attention"] * 3},
        "layer_types=.*: expected a list of full_attention or chunked_attention",
    ),
    "too few kinds of layers": (
        QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
        "layer_types has 1 entries: expected one for each of 6 layers",
    ),
    "no truth value": (QWEN2 | {"use_sliding_window": "yes"}, "use_sliding_window='yes': expected true or false"),
    "text model": ({"model_type": "llama4", "text_config": 3}, "text_config=3: expected the fields of the text model"),
    "unknown family": (
        MIXTRAL | {"model_type": "mamba"},
        f"model_type='mamba': {KNOWN}.*To count another, write its sizes as an LMConfig",
    ),
    "a text model within another": (
        {"model_type": "llava", "text_config": MIXTRAL},
        f"model_type='llava': {KNOWN}.*Its text_config is of type mixtral: put that part alone into a file",
    ),
    "a text model of an unknown family within another": (
        {"model_type": "llava", "text_config": {"model_type": "mamba"}},
        "model_type='llava': .*as an LMConfig",
    ),
    "no truth about norms": (
        DEEPSEEK_MOE | {"model_type": "glm4_moe", "architectures": None, "use_qk_norm": "yes"},
        "use_qk_norm='yes': expected true or false",
    ),
    "no family": ({"hidden_size": 4}, f"this is no model: model_type is missing. {KNOWN.capitalize()}"),
    "a list for a family": (MIXTRAL | {"model_type": ["mixtral"]}, rf"model_type=\['mixtral'\]: {KNOWN}"),
    "unknown class": (
        {"architectures": ["MambaForCausalLM"]},
        rf"model_type is missing and architectures=\['MambaForCausalLM'\]. {KNOWN.capitalize()}",
    ),
    "another class": (
        MIXTRAL | {"architectures": ["MixtralForSequenceClassification"]},
        r"architectures=\['MixtralForSequenceClassification'\]: expected MixtralForCausalLM for mixtral",
    ),
    "classes": (MIXTRAL | {"architectures": "Mixtral"}, "architectures='Mixtral': expected a list"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_value_is_named(what):
    values, says = WRONG[what]
    with pytest.raises(ValueError, match=says) as failed:
        read_config_json(values)
    assert not isinstance(failed.value, CourseError)  # which is for files


@pytest.mark.parametrize("values", [V3, KIMI_K2, DEEPSEEK_MOE, MIXTRAL, QWEN2_MOE, QWEN2, LLAMA_4])
def test_a_missing_field_is_named_with_its_family(values):
    needed = []
    for name in values:
        rest = {key: value for key, value in values.items() if key != name}
        try:
            read_config_json(rest)
        except ValueError as error:
            needed.append((name, str(error)))
    said = dict(needed)
    if "architectures" not in values:
        assert "model_type is missing" in said.pop("model_type")
    assert {"hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads"} <= set(said)
    for name, error in said.items():
        if values is QWEN2_MOE and name == "num_local_experts":  # as transformers 5 writes it; the family's own is told
            name = "num_experts"
        assert error == f"missing {name}: the config.json of a {values['model_type']} model needs it."


def test_all_missing_fields_are_named_at_once():
    with pytest.raises(ValueError, match=r"missing vocab_size, hidden_size, num_hidden_layers, .*of a mixtral model"):
        read_config_json({"model_type": "mixtral"})


# --- wrong files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no JSON .line 1, column 1.*Get it again"),
        (json.dumps(V3).encode()[:300], "is no JSON .*and whole"),
        (b"<!DOCTYPE html>", "is no JSON"),
        (b"\x80\x02\xff\x00weights", "is no text: expected a config.json"),
        (b"[1, 2]", "it holds a list: expected an object with a model_type, one of llama"),
        (b"null", "it holds a NoneType"),
        (b'{"tokenizer_class": "LlamaTokenizer"}', "this is no model: model_type is missing"),
        (b"[" * 100_000, "too deep"),
        (
            b'{"model_type": "llama", "hidden_size": ' + b"9" * 6000 + b"}",
            r"it has a number of 6,000 digits: expected at most 100\.$",
        ),
        (
            json.dumps(MIXTRAL).encode()[:-1] + b', "hidden_size": 64}',
            r"hidden_size is there more than once: expected one value for it\.$",
        ),
        (b" " * (MOST_BYTES + 1), f"has {MOST_BYTES + 1:,} bytes: expected a config.json"),
        (json.dumps(MIXTRAL | {"hidden_size": 0}).encode(), "hidden_size=0: expected a positive integer"),
    ],
)
def test_a_wrong_file_says_what_to_do(content, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigJsonError, match=says) as failed:
        read_config_json(path)
    assert str(failed.value).startswith(f"{path}: ")
    assert isinstance(failed.value, ValueError)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigJsonError, match=r"this is a folder; give the path of the config\.json in it"):
        read_config_json(tmp_path)
    with pytest.raises(ConfigJsonError, match="there is no such file; give"):
        read_config_json(tmp_path / "config.json")
    with pytest.raises(ConfigJsonError, match="it cannot be read: "):
        read_config_json("x" * 5000 + ".json")


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTRAL), encoding="utf-8-sig")
    assert read_config_json(path).config == read_config_json(MIXTRAL).config


# --- anything ---------------------------------------------------------------------------------------------------------

numbers = st.integers() | st.integers(-3, 300) | st.floats()
junk = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(sorted(FAMILIES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FULL = {
    "qwen2_moe": QWEN2_MOE | {"mlp_only_layers": [0], "decoder_sparse_step": 1, "qkv_bias": True}
    | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 6},
    "llama4": {"model_type": "llama4", "text_config": LLAMA_4 | {"moe_layers": [1], "no_rope_layers": [1, 0, 1]}},
    "llama4_text": LLAMA_4 | {"attention_chunk_size": 4, "interleave_moe_layer_step": 1, "no_rope_layer_interval": 2},
    "gpt_oss": MIXTRAL | {"model_type": "gpt_oss", "head_dim": 8, "sliding_window": 5}
    | {"layer_types": ["full_attention"] * 3},
    "deepseek_v3": V3 | {"rope_parameters": {"rope_theta": 4}},
    "deepseek_v2": V3 | {"model_type": "deepseek_v2", "architectures": None, "scoring_func": "softmax"}
    | {"topk_method": "greedy"},
    "deepseek": DEEPSEEK_MOE,
    "qwen2": QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"] * 6},
}  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_nothing_but_a_value_error(data):
    """A file with some fields dropped and others of any value at all is counted, or refused with words."""
    values = dict(FULL[data.draw(st.sampled_from(sorted(FULL)))])
    inner = values.get("text_config")
    if isinstance(inner, dict) and data.draw(st.booleans()):
        values["text_config"] = target = dict(inner)
    else:
        target = values
    for name in data.draw(st.lists(st.sampled_from(sorted(target)), max_size=2, unique=True)):
        del target[name]
    for name in data.draw(st.lists(st.sampled_from([*sorted(target), "strange"]), max_size=3, unique=True)):
        target[name] = data.draw(junk)
    with contextlib.suppress(ValueError):
        found = read_config_json(values)
        assert 0 < count_parameters(found.config, active=True).total <= count_parameters(found.config).total


@settings(max_examples=100, deadline=None)
@given(values=junk)
def test_no_model_at_all(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigJsonError):
        read_config_json(path)
