import math

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from moe_lab.config import LMConfig
from moe_lab.lm import LM, generate, watch_hidden

CONFIG = LMConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=50)


def as_llama(model: LM) -> LlamaForCausalLM:
    """Hugging Face's Llama with the same weights."""
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.d_head,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied_embeddings,
        )
    )
    renamed = {}
    for name, weight in model.state_dict().items():
        for ours, theirs in {
            "embedding.": "model.embed_tokens.",
            "blocks.": "model.layers.",
            "attention_norm.": "input_layernorm.",
            "ffn_norm.": "post_attention_layernorm.",
            "attention.w_": "self_attn.w_",
            "ffn.w_": "mlp.w_",
        }.items():
            name = name.replace(ours, theirs)
        for letter in "qkvo":
            name = name.replace(f"w_{letter}.", f"{letter}_proj.")
        for part in ("gate", "up", "down"):
            name = name.replace(f"w_{part}.", f"{part}_proj.")
        renamed[
            "lm_head.weight" if name == "head.weight" else "model.norm.weight" if name == "norm.weight" else name
        ] = weight
    llama.load_state_dict(renamed)
    return llama


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        CONFIG.but(n_kv_heads=4),
        CONFIG.but(n_kv_heads=1, rope_theta=500_000.0),
        CONFIG.but(d_head=6),
        CONFIG.but(tied_embeddings=True),
    ],
    ids=["gqa", "mha", "mqa", "own head size", "tied"],
)
def test_it_is_llama_forward_and_gradients(config):
    torch.manual_seed(0)
    ours = LM(config)
    theirs = as_llama(ours)
    tokens = torch.randint(config.vocab_size, (2, 9))
    logits, routings = ours(tokens)
    expected = theirs(tokens).logits
    assert routings == ()
    assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.square().mean().backward()
    expected.square().mean().backward()
    for name, ours_grad, theirs_grad in [
        ("query", ours.blocks[0].attention.w_q.weight.grad, theirs.model.layers[0].self_attn.q_proj.weight.grad),
        ("key", ours.blocks[1].attention.w_k.weight.grad, theirs.model.layers[1].self_attn.k_proj.weight.grad),
        ("gate", ours.blocks[0].ffn.w_gate.weight.grad, theirs.model.layers[0].mlp.gate_proj.weight.grad),
        ("embedding", ours.embedding.weight.grad, theirs.model.embed_tokens.weight.grad),
        ("norm", ours.norm.weight.grad, theirs.model.norm.weight.grad),
    ]:
        assert_close(ours_grad, theirs_grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("conv_width", [0, 1, 3])
def test_no_position_sees_the_future(conv_width):
    torch.manual_seed(0)
    model = LM(CONFIG.but(conv_width=conv_width))
    tokens = torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[0, :7], after[0, :7])
    assert not torch.allclose(before[0, 7:], after[0, 7:])


def test_one_token_works():
    assert LM(CONFIG.but(conv_width=3))(torch.zeros(1, 1, dtype=torch.long))[0].shape == (1, 1, 50)


def test_generate_continues_the_prompt_and_repeats_with_its_seed():
    torch.manual_seed(0)
    model, prompt = LM(CONFIG), torch.tensor([1, 2, 3])
    first, again = (generate(model, prompt, 20, context=8, seed=5) for _ in range(2))
    assert first.shape == (23,)
    assert torch.equal(first[:3], prompt)
    assert torch.equal(first, again)
    assert not torch.equal(first, generate(model, prompt, 20, context=8, seed=6))


def test_generate_at_temperature_zero_takes_the_likeliest_byte():
    torch.manual_seed(0)
    model, prompt = LM(CONFIG), torch.tensor([1, 2, 3])
    assert generate(model, prompt, 1, temperature=0)[-1] == model(prompt[None])[0][0, -1].argmax()


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        (torch.tensor([], dtype=torch.long), {}, r"prompt has shape \(0,\): expected \(S,\) with at least one byte"),
        (torch.tensor([[1]]), {}, r"prompt has shape \(1, 1\)"),
        (torch.tensor([1]), {"temperature": -1}, r"temperature=-1: expected 0 or more"),
    ],
)
def test_generate_refuses_what_it_cannot_do(prompt, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(LM(CONFIG), prompt, 3, **arguments)


def test_it_starts_by_knowing_nothing():
    torch.manual_seed(0)
    model = LM(LMConfig(d_model=64, n_layers=2, n_heads=4, d_ff=128))
    tokens = torch.randint(256, (8, 33))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=0.05)


def test_watch_hidden_sees_every_layer_and_changes_nothing():
    torch.manual_seed(0)
    model, tokens, seen = LM(CONFIG), torch.randint(50, (2, 5)), []
    plain = model(tokens)[0]
    with watch_hidden(model, lambda layer, hidden: seen.append((layer, hidden.shape))):
        assert torch.equal(model(tokens)[0], plain)
    assert seen == [(0, (2, 5, 24)), (1, (2, 5, 24))]


def test_watch_hidden_puts_back_what_it_is_given_and_ends():
    torch.manual_seed(0)
    model, tokens = LM(CONFIG), torch.randint(50, (2, 5))
    plain = model(tokens)[0]
    with pytest.raises(RuntimeError, match="stop"), watch_hidden(model, lambda layer, hidden: hidden * 0):  # noqa: PT012
        assert not torch.allclose(model(tokens)[0], plain)
        raise RuntimeError("stop")
    assert torch.equal(model(tokens)[0], plain)
