"""Configurations of real models, each with its source, and the course's own baseline."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from moe_lab.accounting import fp8_checkpoint_bytes, mxfp4_checkpoint_bytes
from moe_lab.config import LMConfig, MLAConfig, MoEConfig, SwitchConfig, TrainConfig

# What makes a layer of experts that of a family, beside its sizes. Each line was held against the family's class in
# transformers 5 (tests/test_hugging_face.py); the papers say the same, and where they differ the comment says so.
MOE_FAMILIES: dict[str, dict] = {
    "mixtral": {},  # Jiang et al. 2024, section 2.1: softmax over the two chosen logits
    "qwen2_moe": {"normalise": False, "n_shared_experts": 1, "shared_gate": True},
    "qwen3_moe": {},  # normalises, as its config's norm_topk_prob says
    "olmoe": {"normalise": False},  # Muennighoff et al. 2024, section 2
    "deepseek_v2": {"normalise": False, "group_score": "max"},  # sections 2.2.1 and 2.2.2
    "deepseek_v3": {"score": "sigmoid", "selection_bias": True, "group_score": "top2_sum"},  # section 2.1.2
    "switch": {"normalise": False, "top_k": 1, "expert": "relu"},  # Fedus et al. 2021, section 2.1
    "gpt_oss": {"logit_bias": True, "expert": "clamped_swiglu", "expert_bias": True},
    "llama4": {"score": "sigmoid", "normalise": False, "weigh": "input", "n_shared_experts": 1},
}

# --- Dense models ---------------------------------------------------------------------------------------------------

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

# The same table; the vocabulary is that of all Llama 3 models.
LLAMA_3_1_405B = LMConfig(
    vocab_size=128_256,
    d_model=16_384,
    n_layers=126,
    n_heads=128,
    n_kv_heads=8,
    d_ff=53_248,
    rope_theta=500_000.0,
)

# Jiang et al. 2023, "Mistral 7B", table 1.
MISTRAL_7B = LMConfig(vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14_336, window=4096)

# Qwen team 2024, "Qwen2.5 Technical Report", table 1, and the released config.json of Qwen/Qwen2.5-72B.
QWEN2_5_72B = LMConfig(
    vocab_size=152_064,
    d_model=8192,
    n_layers=80,
    n_heads=64,
    n_kv_heads=8,
    d_ff=29_568,
    qkv_bias=True,
    rope_theta=1e6,
)

# DeepSeek-AI 2024, "DeepSeek LLM", table 2, and the released config.json (vocab_size, intermediate_size).
DEEPSEEK_67B = LMConfig(vocab_size=102_400, d_model=8192, n_layers=95, n_heads=64, n_kv_heads=8, d_ff=22_016)

# --- Models with experts --------------------------------------------------------------------------------------------

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

# Dai et al. 2024, "DeepSeekMoE", section 5.1.2; the released config.json (intermediate_size, moe_intermediate_size).
DEEPSEEK_MOE_16B = LMConfig(
    vocab_size=102_400,
    d_model=2048,
    n_layers=28,
    n_heads=16,
    d_ff=10_944,
    n_dense_layers=1,
    norm_eps=1e-6,
    moe=MoEConfig(d_model=2048, d_ff=1408, n_experts=64, top_k=6, n_shared_experts=2, normalise=False),
)

# The three below: inference/configs/config_16B.json, config_236B.json and config_671B.json of deepseek-ai/DeepSeek-V3;
# DeepSeek-AI 2024, "DeepSeek-V2", section 3.1.2 and appendix B, and "DeepSeek-V3", section 4.2.
DEEPSEEK_V2_LITE = LMConfig(
    vocab_size=102_400,
    d_model=2048,
    n_layers=27,
    n_heads=16,
    d_ff=10_944,
    n_dense_layers=1,
    norm_eps=1e-6,
    mla=MLAConfig(kv_rank=512, d_nope=128, d_rope=64, d_value=128),
    moe=MoEConfig(d_model=2048, d_ff=1408, n_experts=64, top_k=6, n_shared_experts=2, **MOE_FAMILIES["deepseek_v2"]),
)

DEEPSEEK_V2 = LMConfig(
    vocab_size=102_400,
    d_model=5120,
    n_layers=60,
    n_heads=128,
    d_ff=12_288,
    n_dense_layers=1,
    norm_eps=1e-6,
    mla=MLAConfig(q_rank=1536, kv_rank=512, d_nope=128, d_rope=64, d_value=128),
    moe=MoEConfig(
        d_model=5120,
        d_ff=1536,
        n_experts=160,
        top_k=6,
        n_shared_experts=2,
        n_groups=8,
        groups_kept=3,
        scaling_factor=16.0,
        **MOE_FAMILIES["deepseek_v2"],
    ),
)

DEEPSEEK_V3 = LMConfig(
    vocab_size=129_280,
    d_model=7168,
    n_layers=61,
    n_heads=128,
    d_ff=18_432,
    n_dense_layers=3,
    norm_eps=1e-6,
    mla=MLAConfig(q_rank=1536, kv_rank=512, d_nope=128, d_rope=64, d_value=128),
    moe=MoEConfig(
        d_model=7168,
        d_ff=2048,
        n_experts=256,
        top_k=8,
        n_shared_experts=1,
        n_groups=8,
        groups_kept=4,
        scaling_factor=2.5,
        **MOE_FAMILIES["deepseek_v3"],
    ),
)

# The table in the README of MoonshotAI/Kimi-K2, and the released config.json (q_lora_rank, intermediate_size,
# vocab_size, routed_scaling_factor). No groups.
KIMI_K2 = DEEPSEEK_V3.but(
    vocab_size=163_840,
    n_heads=64,
    n_dense_layers=1,
    rope_theta=50_000.0,
    moe=DEEPSEEK_V3.moe.but(n_experts=384, n_groups=1, groups_kept=1, scaling_factor=2.827),
)

# Qwen team 2025, "Qwen3 Technical Report", table 2, and the released config.json of Qwen/Qwen3-235B-A22B.
QWEN3_235B_A22B = LMConfig(
    vocab_size=151_936,
    d_model=4096,
    n_layers=94,
    n_heads=64,
    n_kv_heads=4,
    d_head=128,
    d_ff=12_288,
    qk_norm="head",
    rope_theta=1e6,
    norm_eps=1e-6,
    moe=MoEConfig(d_model=4096, d_ff=1536, n_experts=128, top_k=8),
)

# gpt_oss/torch/model.py of openai/gpt-oss (ModelConfig), and the released config.json of openai/gpt-oss-20b. `d_ff` is
# no layer's: all have experts. Layers 1, 3, … see 128 positions, layers 2, 4, … all.
GPT_OSS_120B = LMConfig(
    vocab_size=201_088,
    d_model=2880,
    n_layers=36,
    n_heads=64,
    n_kv_heads=8,
    d_head=64,
    d_ff=2880,
    qkv_bias=True,
    output_bias=True,
    attention_sinks=True,
    window=128,
    full_every=2,
    rope_theta=150_000.0,
    moe=MoEConfig(d_model=2880, d_ff=2880, n_experts=128, top_k=4, **MOE_FAMILIES["gpt_oss"]),
)
GPT_OSS_20B = GPT_OSS_120B.but(n_layers=24, moe=GPT_OSS_120B.moe.but(n_experts=32))

# models/llama4/args.py and MODEL_CARD.md of meta-llama/llama-models, and the released config.json; the text part. Three
# of four layers see chunks of 8,192 positions. Only sizes: the layers without RoPE, and the norm without weights on
# queries and keys, are not said here.
LLAMA_4_SCOUT = LMConfig(
    vocab_size=202_048,
    d_model=5120,
    n_layers=48,
    n_heads=40,
    n_kv_heads=8,
    d_head=128,
    d_ff=16_384,
    window=8192,
    full_every=4,
    chunked=True,
    rope_theta=500_000.0,
    moe=MoEConfig(d_model=5120, d_ff=8192, n_experts=16, top_k=1, **MOE_FAMILIES["llama4"]),
)
LLAMA_4_MAVERICK = LLAMA_4_SCOUT.but(moe_every=2, moe=LLAMA_4_SCOUT.moe.but(n_experts=128))

# Raffel et al. 2020 (T5), section 3.1.2; Fedus et al. 2021 (Switch Transformers), tables 1 and 9, and
# t5x/configs/moe/models/switch_{base,large,xxl,c}.gin of google/flaxformer, which are right where table 9 is not.
T5_BASE = SwitchConfig(d_model=768, d_ff=3072, n_heads=12, d_head=64, n_encoder_layers=12, n_decoder_layers=12)
SWITCH_BASE = {n: T5_BASE.but(n_experts=n) for n in (8, 16, 32, 64, 128, 256)}
SWITCH_LARGE_128 = SwitchConfig(
    d_model=1024, d_ff=4096, n_heads=16, d_head=64, n_encoder_layers=24, n_decoder_layers=24, n_experts=128
)
SWITCH_XXL_128 = SwitchConfig(
    d_model=4096,
    d_ff=10_240,
    n_heads=64,
    d_head=64,
    n_encoder_layers=24,
    n_decoder_layers=24,
    n_experts=128,
    gated=True,
    tied_embeddings=False,
)
SWITCH_C_2048 = SwitchConfig(
    d_model=2080,
    d_ff=6144,
    n_heads=30,
    d_head=64,
    n_encoder_layers=15,
    n_decoder_layers=15,
    n_experts=2048,
    moe_every=1,
    tied_embeddings=False,
)

# --- By name --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A released model.

    Args:
        stated: what its makers say of its size, total and active, in their words; None where they do not.
        source: where they say it.
        counts_embedding: whether their active figure holds the embedding table; None where either rounds to it, or
            neither does.
        n_mtp: modules beside the model that predict one token further.
        checkpoint_bytes: counts its released weights, where they mix formats.
    """

    name: str
    config: LMConfig | SwitchConfig
    stated: tuple[str | None, str | None]
    source: str
    counts_embedding: bool | None = None
    n_mtp: int = 0
    checkpoint_bytes: Callable[[LMConfig], int] | None = None

    @property
    def released_bytes(self) -> int | None:
        """Bytes of the model's weights as its makers released them; None where they did so in one format."""
        return self.checkpoint_bytes(self.config) if self.checkpoint_bytes else None


V3_SOURCE = "DeepSeek-V3 (2024, arXiv 2412.19437), abstract"
SWITCH_SOURCE = "Fedus et al. 2021 (arXiv 2101.03961), tables 6, 7 and 9"
PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="Llama-7B",
            config=LLAMA_7B,
            stated=("6.7B", None),
            source="Touvron et al. 2023 (arXiv 2302.13971), table 2",
        ),
        Preset(
            name="Llama 3 70B",
            config=LLAMA_3_70B,
            stated=("70B", None),
            source="meta-llama/llama-models, models/llama3/MODEL_CARD.md",
        ),
        Preset(
            name="Llama 3.1 405B",
            config=LLAMA_3_1_405B,
            stated=("405B", None),
            source="meta-llama/llama-models, models/llama3_1/MODEL_CARD.md",
        ),
        Preset(
            name="Mistral-7B",
            config=MISTRAL_7B,
            stated=("7B", None),
            source="Jiang et al. 2023 (arXiv 2310.06825), abstract",
        ),
        Preset(name="Qwen2.5-72B", config=QWEN2_5_72B, stated=("72.7B", None), source="model card of Qwen/Qwen2.5-72B"),
        Preset(
            name="DeepSeek-67B",
            config=DEEPSEEK_67B,
            stated=("67B", None),
            source="DeepSeek LLM (2024, arXiv 2401.02954), abstract",
        ),
        Preset(
            name="Mixtral 8x7B",
            config=MIXTRAL_8X7B,
            stated=("47B", "13B"),
            source="Jiang et al. 2024 (arXiv 2401.04088), abstract",
        ),
        Preset(
            name="Mixtral 8x22B",
            config=MIXTRAL_8X22B,
            stated=("141B", "39B"),
            source="Mistral AI, “Cheaper, Better, Faster, Stronger”, 17 April 2024",
        ),
        Preset(
            name="DeepSeekMoE-16B",
            config=DEEPSEEK_MOE_16B,
            stated=("16.4B", "2.8B"),
            source="Dai et al. 2024 (arXiv 2401.06066), section 5.1.2",
            counts_embedding=True,
        ),
        Preset(
            name="DeepSeek-V2-Lite",
            config=DEEPSEEK_V2_LITE,
            stated=("15.7B", "2.4B"),
            source="DeepSeek-V2 (2024, arXiv 2405.04434), appendix B",
        ),
        Preset(
            name="DeepSeek-V2",
            config=DEEPSEEK_V2,
            stated=("236B", "21B"),
            source="DeepSeek-V2 (2024, arXiv 2405.04434), abstract",
        ),
        Preset(
            name="DeepSeek-V3",
            config=DEEPSEEK_V3,
            stated=("671B", "37B"),
            source=V3_SOURCE,
            counts_embedding=False,
            n_mtp=1,
            checkpoint_bytes=fp8_checkpoint_bytes,
        ),
        Preset(
            name="DeepSeek-R1",
            config=DEEPSEEK_V3,
            stated=("671B", "37B"),
            source="README of deepseek-ai/DeepSeek-R1: trained from DeepSeek-V3-Base",
            counts_embedding=False,
            n_mtp=1,
            checkpoint_bytes=fp8_checkpoint_bytes,
        ),
        Preset(
            name="Kimi-K2",
            config=KIMI_K2,
            stated=("1T", "32B"),
            source="README of MoonshotAI/Kimi-K2",
            counts_embedding=False,
            checkpoint_bytes=fp8_checkpoint_bytes,
        ),
        Preset(
            name="Qwen3-30B-A3B",
            config=QWEN3_30B_A3B,
            stated=("30.5B", "3.3B"),
            source="model card of Qwen/Qwen3-30B-A3B",
        ),
        Preset(
            name="Qwen3-235B-A22B",
            config=QWEN3_235B_A22B,
            stated=("235B", "22B"),
            source="model card of Qwen/Qwen3-235B-A22B",
        ),
        Preset(
            name="OLMoE-1B-7B",
            config=OLMOE_1B_7B,
            stated=("6.9B", "1.3B"),
            source="Muennighoff et al. 2024 (arXiv 2409.02060)",
            counts_embedding=True,
        ),
        Preset(
            name="gpt-oss-20b",
            config=GPT_OSS_20B,
            stated=("20.91B", "3.61B"),
            source="gpt-oss-120b & gpt-oss-20b Model Card (2025), table 1",
            counts_embedding=False,
            checkpoint_bytes=mxfp4_checkpoint_bytes,
        ),
        Preset(
            name="gpt-oss-120b",
            config=GPT_OSS_120B,
            stated=("116.83B", "5.13B"),
            source="gpt-oss-120b & gpt-oss-20b Model Card (2025), table 1",
            counts_embedding=False,
            checkpoint_bytes=mxfp4_checkpoint_bytes,
        ),
        Preset(
            name="Llama 4 Scout",
            config=LLAMA_4_SCOUT,
            stated=("109B with vision", "17B"),
            source="meta-llama/llama-models, models/llama4/MODEL_CARD.md",
            counts_embedding=True,
        ),
        Preset(
            name="Llama 4 Maverick",
            config=LLAMA_4_MAVERICK,
            stated=("400B with vision", "17B"),
            source="meta-llama/llama-models, models/llama4/MODEL_CARD.md",
            counts_embedding=True,
        ),
        Preset(name="T5-Base", config=T5_BASE, stated=("0.2B", None), source=SWITCH_SOURCE),
        *(
            Preset(name=f"Switch-Base-{n}", config=config, stated=(stated, None), source=SWITCH_SOURCE)
            for (n, config), stated in zip(
                SWITCH_BASE.items(), (None, "1.1B", "2.0B", "3.8B", "7.4B", "14.7B"), strict=True
            )
        ),
        Preset(name="Switch-Large-128", config=SWITCH_LARGE_128, stated=("26B", None), source=SWITCH_SOURCE),
        Preset(name="Switch-XXL-128", config=SWITCH_XXL_128, stated=("395B", None), source=SWITCH_SOURCE),
        Preset(name="Switch-C-2048", config=SWITCH_C_2048, stated=("1571B", None), source=SWITCH_SOURCE),
    )
}

# Models whose makers keep their sizes to themselves. What is said about them elsewhere is hearsay, and is not counted.
UNDISCLOSED = {
    "GPT-4": "OpenAI withholds architecture and size: GPT-4 Technical Report (2023, arXiv 2303.08774), section 2",
    "Qwen2.5-Max": "a mixture of experts, says its maker, and no sizes: Qwen blog, 28 January 2025",
}


def find_preset(name: str) -> Preset:
    """The released model of that name; capitals, blanks and hyphens do not matter.

    Raises:
        ValueError: a name that is not known, with the nearest that is, or a model whose maker discloses no sizes.
    """

    def plain(text: str) -> str:
        text = text.rpartition("/")[2]  # as in "deepseek-ai/DeepSeek-V3"
        return "".join(letter for letter in text.lower() if letter.isalnum())

    known = {plain(each): each for each in (*PRESETS, *UNDISCLOSED)}
    found = known.get(plain(name))
    if found in PRESETS:
        return PRESETS[found]
    if found:
        raise ValueError(f"{found} is undisclosed: {UNDISCLOSED[found]}. There is nothing to count.")
    close = difflib.get_close_matches(plain(name), known, n=1)
    hint = f"did you mean {known[close[0]]!r}?" if close else f"known are {', '.join(PRESETS)}."
    raise ValueError(f"model={name!r}: not known; {hint}")


REAL_MODELS = {name: PRESETS[name].config for name in ("Llama-7B", "Llama 3 70B")}
REAL_MOE_MODELS = {
    name: PRESETS[name].config for name in ("Mixtral 8x7B", "Mixtral 8x22B", "OLMoE-1B-7B", "Qwen3-30B-A3B")
}

# --- The course's own -----------------------------------------------------------------------------------------------

# The dense model of notebook 01, which the mixture-of-experts models of later notebooks have to beat.
DENSE_BASELINE = LMConfig(d_model=64, n_layers=2, n_heads=4, d_ff=128, conv_width=3)
BASELINE_TRAINING = TrainConfig()

# The same model with experts in place of its FFNs: two of eight experts, each half as wide, cost what the FFN cost.
MOE_BASELINE = DENSE_BASELINE.but(moe=MoEConfig(d_model=64, d_ff=64, n_experts=8, top_k=2))
