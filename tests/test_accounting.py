import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_lab.accounting import count_flops, count_parameters, ffn_parameters, ffn_width
from moe_lab.config import LMConfig
from moe_lab.lm import LM
from moe_lab.presets import DENSE_BASELINE, LLAMA_3_70B, LLAMA_7B

UGLY = LMConfig(d_model=12, n_layers=3, n_heads=4, n_kv_heads=2, d_head=6, d_ff=7, vocab_size=11)
CONFIGS = {
    "Llama-7B": LLAMA_7B,
    "Llama 3 70B": LLAMA_3_70B,
    "baseline": DENSE_BASELINE,
    "ugly": UGLY,
    "tied": UGLY.but(tied_embeddings=True),
    "relu": UGLY.but(ffn="relu", conv_width=3),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = LM(config)
    counted = count_parameters(config)
    assert counted.total == sum(weight.numel() for weight in model.parameters())
    assert counted.ffn == sum(w.numel() for block in model.blocks for w in block.ffn.parameters())
    assert counted.attention == sum(w.numel() for block in model.blocks for w in block.attention.parameters())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_flops_are_those_that_torch_counts(config, tokens):
    with torch.device("meta"):
        model, ids = LM(config), torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    assert counter.get_total_flops() == count_flops(config, tokens, causal=False).total


def test_causal_attention_pays_for_the_pairs_it_sees():
    by_hand = sum(4 * (position + 1) for position in range(5)) * UGLY.n_layers * UGLY.n_heads * UGLY.d_head
    assert count_flops(UGLY, 5).attention_scores == by_hand


# Totals: the tensors of the released checkpoints, summed; the same from transformers' classes on the meta device.
@pytest.mark.parametrize(
    ("config", "total", "ffn", "attention"),
    [
        (LLAMA_7B, 6_738_415_616, 4_328_521_728, 2_147_483_648),
        (LLAMA_3_70B, 70_553_706_496, 56_371_445_760, 12_079_595_520),
    ],
    ids=["Llama-7B", "Llama 3 70B"],
)
def test_published_counts(config, total, ffn, attention):
    counted = count_parameters(config)
    assert (counted.total, counted.ffn, counted.attention) == (total, ffn, attention)
    assert ffn_parameters(config) * config.n_layers == ffn


# multiple_of and ffn_dim_multiplier: params.json of the released models.
@pytest.mark.parametrize(
    ("d_model", "multiple_of", "multiplier", "width"),
    [(4096, 256, 1.0, 11_008), (8192, 4096, 1.3, 28_672), (16_384, 4096, 1.2, 53_248), (4096, 1024, 1.3, 14_336)],
    ids=["Llama-7B", "Llama 3 70B", "Llama 3.1 405B", "Llama 3 8B"],
)
def test_published_widths(d_model, multiple_of, multiplier, width):
    assert ffn_width(d_model, multiple_of, multiplier) == width


def test_shares_sum_to_one_and_follow_the_parts():
    counted = count_parameters(UGLY)
    assert sum(counted.share(part) for part in counted.by_part()) == pytest.approx(1)


@pytest.mark.parametrize("tokens", [0, -3])
def test_no_tokens_is_refused(tokens):
    with pytest.raises(ValueError, match=f"tokens={tokens}: expected 1 or more"):
        count_flops(UGLY, tokens)


def test_a_width_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="multiple_of=0"):
        ffn_width(8, 0)
