"""Configurations of real models, each with its source, and the course's own baseline."""

from moe_lab.config import LMConfig, MoEConfig, TrainConfig

# Touvron et al. 2023, "LLaMA", table 2, and the released config.json (vocab_size, intermediate_size).
LLAMA_7B = LMConfig(vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, d_ff=11_008, norm_eps=1e-6)

# Grattafiori et al. 2024, "The Llama 3 Herd of Models", table 3, and the released config.json.
LLAMA_3_70B = LMConfig(
    vocab_size=128_256,
    d_model=8192,
    n_layers=80,
    n_heads=64,
    n_kv_heads=8,
    d_ff=28_672,
    rope_theta=500_000.0,
)

REAL_MODELS = {"Llama-7B": LLAMA_7B, "Llama 3 70B": LLAMA_3_70B}

# What makes a layer of experts that of a family, beside its sizes. Each line was held against the family's class in
# transformers 5 (tests/test_hugging_face.py); the papers say the same, and where they differ the comment says so.
MOE_FAMILIES: dict[str, dict] = {
    "mixtral": {},  # Jiang et al. 2024, section 2.1: softmax over the two chosen logits
    "qwen2_moe": {"normalise": False, "n_shared_experts": 1, "shared_gate": True},
    "qwen3_moe": {},  # normalises, as its config's norm_topk_prob says
    "olmoe": {"normalise": False},  # Muennighoff et al. 2024, section 2
    "deepseek_v2": {"normalise": False, "group_score": "max"},  # section 2.1.2, 2.2.2
    "deepseek_v3": {"score": "sigmoid", "selection_bias": True, "group_score": "top2_sum"},  # section 2.1.2
    "switch": {"normalise": False, "top_k": 1, "expert": "relu"},  # Fedus et al. 2021, section 2.1
    "gpt_oss": {"logit_bias": True, "expert": "clamped_swiglu", "expert_bias": True},
    "llama4": {"score": "sigmoid", "normalise": False, "weigh": "input", "n_shared_experts": 1},
}

# Jiang et al. 2024, "Mixtral of Experts", table 1.
MIXTRAL_8X7B = LMConfig(
    vocab_size=32_000,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    d_ff=14_336,
    rope_theta=1e6,
    moe=MoEConfig(d_model=4096, d_ff=14_336, n_experts=8, top_k=2),
)

# The released config.json of mistralai/Mixtral-8x22B-v0.1.
MIXTRAL_8X22B = LMConfig(
    vocab_size=32_000,
    d_model=6144,
    n_layers=56,
    n_heads=48,
    n_kv_heads=8,
    d_ff=16_384,
    rope_theta=1e6,
    moe=MoEConfig(d_model=6144, d_ff=16_384, n_experts=8, top_k=2),
)

# Muennighoff et al. 2024, "OLMoE", table 10; allenai/OLMoE, configs/OLMoE-1B-7B-0924.yml (embedding_size, mlp_ratio).
OLMOE_1B_7B = LMConfig(
    vocab_size=50_304,
    d_model=2048,
    n_layers=16,
    n_heads=16,
    d_ff=1024,
    qk_norm="all",
    moe=MoEConfig(d_model=2048, d_ff=1024, n_experts=64, top_k=8, **MOE_FAMILIES["olmoe"]),
)

# Qwen team 2025, "Qwen3 Technical Report", table 2, and the released config.json of Qwen/Qwen3-30B-A3B.
QWEN3_30B_A3B = LMConfig(
    vocab_size=151_936,
    d_model=2048,
    n_layers=48,
    n_heads=32,
    n_kv_heads=4,
    d_head=128,
    d_ff=6144,
    qk_norm="head",
    rope_theta=1e6,
    norm_eps=1e-6,
    moe=MoEConfig(d_model=2048, d_ff=768, n_experts=128, top_k=8),
)

REAL_MOE_MODELS = {
    "Mixtral 8x7B": MIXTRAL_8X7B,
    "Mixtral 8x22B": MIXTRAL_8X22B,
    "OLMoE-1B-7B": OLMOE_1B_7B,
    "Qwen3-30B-A3B": QWEN3_30B_A3B,
}

# The dense model of notebook 01, which the mixture-of-experts models of later notebooks have to beat.
DENSE_BASELINE = LMConfig(d_model=64, n_layers=2, n_heads=4, d_ff=128, conv_width=3)
BASELINE_TRAINING = TrainConfig()

# The same model with experts in place of its FFNs: two of eight experts, each half as wide, cost what the FFN cost.
MOE_BASELINE = DENSE_BASELINE.but(moe=MoEConfig(d_model=64, d_ff=64, n_experts=8, top_k=2))
