import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_lab.accounting import count_parameters
from moe_lab.config import LMConfig, MoEConfig
from moe_lab.lm import LM, generate, watch_hidden
from moe_lab.moe import ExpertChoiceMoE, MoE
from moe_lab.presets import MOE_BASELINE, MOE_FAMILIES
from moe_lab.records import ExpertChoice, Routing

CONFIG = LMConfig(d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=50)
EXPERTS = MoEConfig(d_model=16, d_ff=12, n_experts=5, top_k=2)
WITH_EXPERTS = CONFIG.but(moe=EXPERTS)


def as_hugging_face(model: LM, config_class: type, model_class: type, **more: object) -> PreTrainedModel:
    """Hugging Face's model with the same sizes and weights."""
    config = model.config
    theirs = model_class(
        config_class(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            **{"intermediate_size": config.d_ff} | more,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.d_head,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied_embeddings,
            pad_token_id=None,
        )
    )
    theirs.load_state_dict(named_as_theirs(model.state_dict()))
    return theirs


def named_as_theirs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, weight in tensors.items():
        for ours, other in {
            "embedding.": "model.embed_tokens.",
            "blocks.": "model.layers.",
            "attention_norm.": "input_layernorm.",
            "ffn_norm.": "post_attention_layernorm.",
            "attention.": "self_attn.",
            "ffn.router.": "mlp.gate.",
            "ffn.experts.w_in": "mlp.experts.gate_up_proj",
            "ffn.experts.w_down": "mlp.experts.down_proj",
            "ffn.": "mlp.",
        }.items():
            name = name.replace(ours, other)
        for letter in "qkvo":
            name = name.replace(f"w_{letter}.", f"{letter}_proj.")
        for part in ("gate", "up", "down"):
            name = name.replace(f"w_{part}.", f"{part}_proj.")
        renamed[
            "lm_head.weight" if name == "head.weight" else "model.norm.weight" if name == "norm.weight" else name
        ] = weight
    return renamed


def assert_same_model(ours: LM, theirs: PreTrainedModel) -> None:
    """Logits and the gradient of every weight."""
    tokens = torch.randint(ours.config.vocab_size, (2, 9))
    logits, routings = ours(tokens)
    expected = theirs(tokens).logits
    assert len(routings) == ours.config.n_moe_layers
    assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.square().mean().backward()
    expected.square().mean().backward()
    gradients = named_as_theirs({name: weight.grad for name, weight in ours.named_parameters()})
    parameters = dict(theirs.named_parameters())
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        assert_close(
            gradient, parameters[name].grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


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
    assert_same_model(ours, as_hugging_face(ours, LlamaConfig, LlamaForCausalLM))


def with_norms_that_do_something(config: LMConfig) -> LM:
    model = LM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.3)
    return model


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 4}, {"d_head": 6}], ids=["gqa", "mha", "own head size"])
def test_with_a_norm_on_each_head_it_is_qwen3(changes):
    torch.manual_seed(0)
    ours = with_norms_that_do_something(CONFIG.but(qk_norm="head", norm_eps=1e-6, **changes))
    assert_same_model(ours, as_hugging_face(ours, Qwen3Config, Qwen3ForCausalLM))


# The dense first layer and the rest of experts in one model; the layers of experts by themselves, for all families, are
# in test_hugging_face.py.
def test_with_experts_it_is_qwen3_moe():
    torch.manual_seed(0)
    ours = with_norms_that_do_something(WITH_EXPERTS.but(qk_norm="head", n_dense_layers=1))
    sizes = {"moe_intermediate_size": 12, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}
    theirs = as_hugging_face(ours, Qwen3MoeConfig, Qwen3MoeForCausalLM, mlp_only_layers=[0], **sizes)
    assert_same_model(ours, theirs)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_with_experts_and_a_norm_on_all_heads_it_is_olmoe(n_kv_heads):
    torch.manual_seed(0)
    experts = EXPERTS.but(**MOE_FAMILIES["olmoe"])
    ours = with_norms_that_do_something(CONFIG.but(n_kv_heads=n_kv_heads, qk_norm="all", moe=experts))
    sizes = {"intermediate_size": 12, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False}
    assert_same_model(ours, as_hugging_face(ours, OlmoeConfig, OlmoeForCausalLM, **sizes))


def test_with_experts_it_is_mixtral():
    torch.manual_seed(0)
    ours = LM(WITH_EXPERTS)
    sizes = {"intermediate_size": 12, "num_local_experts": 5, "num_experts_per_tok": 2}
    assert_same_model(ours, as_hugging_face(ours, MixtralConfig, MixtralForCausalLM, **sizes))


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("conv_width", [0, 1, 3])
def test_no_position_sees_the_future(conv_width, moe):
    torch.manual_seed(0)
    model = LM(CONFIG.but(conv_width=conv_width, moe=moe))
    tokens = torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    before, after = model(tokens)[0], model(changed)[0]
    if moe is None:
        assert torch.equal(before[0, :7], after[0, :7])
    else:  # groups of another size may differ in their last bits
        assert_close(before[0, :7], after[0, :7], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before[0, 7:], after[0, 7:])


def test_with_a_capacity_it_can():
    torch.manual_seed(0)
    model = LM(CONFIG.but(n_layers=1, moe=EXPERTS.but(n_experts=2, capacity_factor=0.75)))
    tokens = torch.randint(50, (1, 24))
    before, leaked = model(tokens)[0], 0
    for byte in range(50):
        changed = tokens.clone()
        changed[0, -1] = byte
        leaked += not torch.allclose(model(changed)[0][0, :-1], before[0, :-1], atol=1e-4)
    # the last token's first choice goes before an earlier token's second, and takes its place
    assert leaked


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


def test_routings_are_those_of_the_layers_with_experts():
    torch.manual_seed(0)
    for n_dense in (0, 1, 2, 3):
        model = LM(WITH_EXPERTS.but(n_layers=3, n_dense_layers=n_dense))
        assert [isinstance(block.ffn, MoE) for block in model.blocks] == [False] * n_dense + [True] * (3 - n_dense)
        logits, routings = model(torch.randint(50, (2, 5)))
        assert logits.shape == (2, 5, 50)
        assert [routing.topk_experts.shape for routing in routings] == [(10, 2)] * (3 - n_dense)
        assert [routing.tokens_per_expert.sum().item() for routing in routings] == [20] * (3 - n_dense)


def test_the_routing_of_a_layer_is_that_of_its_router():
    torch.manual_seed(0)
    model, tokens, seen = LM(WITH_EXPERTS), torch.randint(50, (2, 5)), []
    for block in model.blocks:
        block.ffn.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    routings = model(tokens)[1]
    for (layer, x), routing in zip(seen, routings, strict=True):
        assert torch.equal(layer.router(x.flatten(0, 1)).topk_experts, routing.topk_experts)


def test_watch_hidden_passes_over_experts_and_keeps_the_layers_number():
    torch.manual_seed(0)
    model, tokens, seen = LM(WITH_EXPERTS.but(n_dense_layers=1)), torch.randint(50, (2, 5)), []
    with watch_hidden(model, lambda layer, hidden: seen.append((layer, hidden.shape))):
        model(tokens)
    assert seen == [(0, (2, 5, 24))]


def test_every_weight_gets_a_gradient_those_of_unchosen_experts_too():
    torch.manual_seed(0)
    model = LM(CONFIG.but(moe=EXPERTS.but(n_experts=40, n_shared_experts=1, d_ff_shared=8, shared_gate=True)))
    logits, routings = model(torch.randint(50, (1, 3)))
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for block, routing in zip(model.blocks, routings, strict=True):
        idle = routing.tokens_per_expert == 0
        assert idle.sum() >= 34
        assert not block.ffn.experts.w_down.grad[idle].any()
        assert block.ffn.experts.w_down.grad[~idle].any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_empty_batches_and_single_tokens_go_through_experts(shape):
    logits, routings = LM(WITH_EXPERTS)(torch.zeros(shape, dtype=torch.long))
    assert logits.shape == (*shape, 50)
    assert [len(routing.topk_experts) for routing in routings] == [shape[0] * shape[1]] * 2


def test_a_model_of_experts_also_starts_by_knowing_nothing_and_generates():
    torch.manual_seed(0)
    model = LM(MOE_BASELINE)
    tokens = torch.randint(256, (8, 33))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=0.05)
    assert generate(model, tokens[0], 5, context=8).shape == (38,)


def test_a_model_of_experts_learns_in_bf16_too():
    torch.manual_seed(0)
    model = LM(MOE_BASELINE).bfloat16()
    logits, routings = model(torch.randint(256, (2, 9)))
    logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert {routing.topk_weights.dtype for routing in routings} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_reset_draws_every_weight_anew():
    torch.manual_seed(0)
    shared = {"n_shared_experts": 1, "d_ff_shared": 8, "shared_gate": True}
    model = LM(CONFIG.but(conv_width=3, moe=EXPERTS.but(**shared), n_dense_layers=1))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model.reset_parameters()
    kept = [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])]
    assert all("norm" in name for name in kept), "norms start at one; all others are drawn"


def test_the_layers_of_experts_stand_from_the_bottom_up():
    for n_dense in (0, 1, 3):
        model = LM(WITH_EXPERTS.but(n_layers=3, n_dense_layers=n_dense))
        assert list(model.moe_layers) == [block.ffn for block in model.blocks][n_dense:]
    assert LM(CONFIG).moe_layers == ()


# --- recomputation ---

RECOMPUTED = {
    "dense": CONFIG,
    "dense, tied, convolution": CONFIG.but(tied_embeddings=True, conv_width=3),
    "experts": WITH_EXPERTS,
    "jitter and noise": CONFIG.but(moe=EXPERTS.but(input_jitter=0.3, noisy_top_k=True)),
    "capacity, shared": CONFIG.but(moe=EXPERTS.but(capacity_factor=0.75, n_shared_experts=1)),
    "a dense layer first": WITH_EXPERTS.but(n_dense_layers=1),
    "expert choice": CONFIG.but(moe=EXPERTS.but(expert_choice=True, input_jitter=0.3)),
}


@pytest.mark.parametrize("config", RECOMPUTED.values(), ids=RECOMPUTED)
def test_recomputing_changes_no_bit_and_tells_every_choice_once(config):
    torch.manual_seed(0)
    model, tokens, seen = LM(config), torch.randint(50, (2, 9)), []
    for recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        logits, routings = model(tokens, recompute=recompute)
        penalty = sum((routing.router_scores.square().mean() for routing in routings), torch.zeros(()))
        (logits.square().mean() + penalty).backward()
        after = torch.rand(3)  # the generator, too, stands where it stood
        counts = [routing.tokens_per_expert for routing in routings]
        seen.append([logits.detach(), after, *counts, *(weight.grad.clone() for weight in model.parameters())])
    assert len(seen[0]) == len(seen[1])
    assert all(torch.equal(kept, again) for kept, again in zip(*seen, strict=True))


def test_recomputing_keeps_less_for_the_backward_pass():
    torch.manual_seed(0)
    model, tokens, kept = LM(WITH_EXPERTS.but(n_layers=4)), torch.randint(50, (2, 9)), []
    for recompute in (False, True):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t
        ):
            model(tokens, recompute=recompute)
        kept.append(sum(saved))
    assert kept[1] < kept[0] / 4


@pytest.mark.parametrize("recompute", [False, True])
def test_without_gradients_recomputing_is_plain_computing(recompute):
    torch.manual_seed(0)
    model, tokens = LM(WITH_EXPERTS).eval(), torch.randint(50, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens, recompute=recompute)[0], model(tokens)[0])


# --- experts that choose ---

CHOOSING = WITH_EXPERTS.but(moe=EXPERTS.but(expert_choice=True))


def test_a_model_whose_experts_choose_is_the_same_size_and_says_who_chose():
    torch.manual_seed(0)
    model = LM(CHOOSING.but(n_dense_layers=1))
    assert [type(layer) for layer in model.moe_layers] == [ExpertChoiceMoE]
    assert sum(p.numel() for p in model.parameters()) == count_parameters(CHOOSING.but(n_dense_layers=1)).total
    logits, choices = model(torch.randint(50, (3, 5)))
    logits.square().mean().backward()
    assert logits.shape == (3, 5, 50)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    (choice,) = choices
    assert isinstance(choice, ExpertChoice)
    assert choice.tokens_per_expert.tolist() == [6] * 5  # 15 tokens, two of five experts each
    assert choice.router_scores.shape == (15, 5)
    assert {type(routing) for routing in LM(WITH_EXPERTS)(torch.randint(50, (1, 4)))[1]} == {Routing}


@pytest.mark.parametrize("n_layers", [1, 2])
def test_experts_that_choose_look_into_the_future_and_chosen_experts_do_not(n_layers):
    torch.manual_seed(0)
    tokens = torch.randint(50, (1, 64))
    edited = tokens.clone()
    edited[0, 32:] = torch.randint(50, (32,))

    def share_of_earlier_positions_that_change(config: LMConfig) -> float:
        torch.manual_seed(1)
        model = LM(config.but(n_layers=n_layers))
        before, after = model(tokens)[0][0, :32], model(edited)[0][0, :32]
        return (before - after).abs().gt(1e-4).any(-1).float().mean().item()

    assert share_of_earlier_positions_that_change(CHOOSING) > 0.1
    assert share_of_earlier_positions_that_change(WITH_EXPERTS) == 0


def test_experts_that_choose_look_into_other_texts_of_the_batch():
    torch.manual_seed(0)
    model, tokens = LM(CHOOSING), torch.randint(50, (2, 20))
    alone, together = model(tokens[:1])[0], model(tokens)[0][:1]
    assert not torch.allclose(alone, together, atol=1e-4)


def test_a_model_whose_experts_choose_generates_one_byte_after_the_other():
    torch.manual_seed(0)
    assert generate(LM(CHOOSING), torch.tensor([1, 2, 3]), 5, context=8).shape == (8,)
    assert LM(CHOOSING)(torch.zeros(1, 1, dtype=torch.long))[0].shape == (1, 1, 50)
