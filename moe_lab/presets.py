"""Configurations of real models, each with its source, and the course's own baseline."""

from moe_lab.config import LMConfig, TrainConfig

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

# The dense model of notebook 01, which the mixture-of-experts models of later notebooks have to beat.
DENSE_BASELINE = LMConfig(d_model=64, n_layers=2, n_heads=4, d_ff=128, conv_width=3)
BASELINE_TRAINING = TrainConfig()
