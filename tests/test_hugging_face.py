"""One `MoE` and its configuration against the blocks of nine families in transformers: outputs and every gradient.

Tiny random weights are copied in through `moe_lab.hugging_face`. `record_property` keeps the largest difference that
was seen of each comparison in the report (`pytest --junitxml FILE -o junit_family=xunit1`).
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersConfig,
    SwitchTransformersSparseMLP,
)
from variants import each

from moe_lab.config import MoEConfig
from moe_lab.hugging_face import FAMILIES, from_hugging_face, to_hugging_face
from moe_lab.moe import MoE
from moe_lab.ops import GROUPED_MM
from moe_lab.presets import MOE_FAMILIES

D, F, E, K = 16, 24, 8, 3
BATCH, LENGTH = 3, 7
SWITCH_CAPACITY = 2  # choices an expert takes of one sequence

# Layers of ours (beside the family's fields) and the block of theirs that they must equal. Variants of one family
# differ in a switch that its released models use.
GROUPS = {"n_groups": 4, "groups_kept": 2}
BLOCKS: dict[str, tuple[str, dict, Callable[[], nn.Module]]] = {
    "mixtral": (
        "mixtral",
        {},
        lambda: MixtralSparseMoeBlock(
            MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
        ),
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"d_ff_shared": 40},
        lambda: Qwen2MoeSparseMoeBlock(
            Qwen2MoeConfig(
                hidden_size=D,
                moe_intermediate_size=F,
                shared_expert_intermediate_size=40,
                num_experts=E,
                num_experts_per_tok=K,
            )
        ),
    ),
    "qwen3_moe": ("qwen3_moe", {}, lambda: qwen3(norm_topk_prob=True)),
    "qwen3_moe, not normalised": ("qwen3_moe", {"normalise": False}, lambda: qwen3(norm_topk_prob=False)),
    "olmoe": (
        "olmoe",
        {},
        lambda: OlmoeSparseMoeBlock(
            OlmoeConfig(hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=K)
        ),
    ),
    "deepseek_v2, as DeepSeek-MoE 16B": (
        "deepseek_v2",
        {"n_shared_experts": 2},
        lambda: deepseek_v2(topk_method="greedy", routed_scaling_factor=1.0),
    ),
    "deepseek_v2, limited to groups": (
        "deepseek_v2",
        {"n_shared_experts": 2, "scaling_factor": 16.0, **GROUPS},
        lambda: deepseek_v2(topk_method="group_limited_greedy", routed_scaling_factor=16.0, n_group=4, topk_group=2),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {"n_shared_experts": 1, "scaling_factor": 2.5, **GROUPS},
        lambda: DeepseekV3MoE(
            DeepseekV3Config(
                hidden_size=D,
                moe_intermediate_size=F,
                n_routed_experts=E,
                num_local_experts=E,
                num_experts_per_tok=K,
                n_shared_experts=1,
                n_group=4,
                topk_group=2,
                routed_scaling_factor=2.5,
                norm_topk_prob=True,
            )
        ),
    ),
    "switch": ("switch", {}, lambda: switch(expert_capacity=LENGTH)),
    "switch, with drops": (
        "switch",
        {"capacity_factor": SWITCH_CAPACITY * E / LENGTH},
        lambda: switch(expert_capacity=SWITCH_CAPACITY),
    ),
    "gpt_oss": (
        "gpt_oss",
        {},
        lambda: GptOssMLP(GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)),
    ),
    "llama4": ("llama4", {"top_k": 1}, lambda: llama4(num_experts_per_tok=1)),
    "llama4, three experts": ("llama4", {}, lambda: llama4(num_experts_per_tok=K)),
}


def qwen3(**fields: object) -> nn.Module:
    sizes = {"hidden_size": D, "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
    return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**sizes, **fields))


def deepseek_v2(**fields: object) -> nn.Module:
    sizes = {"hidden_size": D, "moe_intermediate_size": F, "n_routed_experts": E, "num_experts_per_tok": K}
    sizes |= {"num_local_experts": E, "n_shared_experts": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return DeepseekV2Moe(DeepseekV2Config(**sizes, **fields))


def llama4(**fields: object) -> nn.Module:
    return Llama4TextMoe(Llama4TextConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, **fields))


def switch(**fields: object) -> nn.Module:
    config = SwitchTransformersConfig(d_model=D, d_ff=F, num_experts=E, dropout_rate=0.0, router_jitter_noise=0.0)
    for name, value in fields.items():
        setattr(config, name, value)
    return SwitchTransformersSparseMLP(config)


def pair(name: str, impl: str = "auto", theirs_impl: str | None = None) -> tuple[nn.Module, MoE]:
    """A block of theirs with random weights, and a layer of ours with the same."""
    family, fields, make = BLOCKS[name]
    theirs = make().train()
    if has_two_implementations(theirs):
        theirs.experts.config._experts_implementation = theirs_impl or "eager"
    with torch.no_grad():
        for key, tensor in theirs.state_dict().items():
            tensor.normal_(std=0.1 if "bias" in key else tensor.shape[-1] ** -0.5)
            if key.endswith(("gate.weight", "router.weight", "classifier.weight")) and "shared" not in key:
                tensor.mul_(2)  # clear choices
    sizes = {"d_model": D, "d_ff": F, "n_experts": E, "top_k": K}
    ours = MoE(MoEConfig(**(sizes | MOE_FAMILIES[family] | fields)), impl)
    ours.load_state_dict(from_hugging_face(family, theirs.state_dict()))
    return theirs, ours


def has_two_implementations(block: nn.Module) -> bool:
    return hasattr(type(block.experts), "_apply_gate")  # what transformers' decorator for it leaves


def run_theirs(block: nn.Module, x: Tensor) -> Tensor:
    y = block(x)
    return (y[0] if isinstance(y, tuple) else y).view_as(x)


def run_ours(layer: MoE, x: Tensor) -> Tensor:
    # Switch counts its capacity within each sequence
    return torch.stack([layer(sequence)[0] for sequence in x])


def largest_difference(got: Tensor, expected: Tensor) -> float:
    return (got.float() - expected.float()).abs().max().item()


EVERY_BLOCK = pytest.mark.parametrize("name", BLOCKS)


def test_every_family_is_held_against_its_block():
    assert {family for family, _, _ in BLOCKS.values()} == set(FAMILIES) == set(MOE_FAMILIES)


@EVERY_BLOCK
@pytest.mark.parametrize("impl", each(GROUPED_MM))
@pytest.mark.parametrize("theirs_impl", ["eager", "grouped_mm"])
def test_outputs_and_every_gradient(name, impl, theirs_impl, record_property):
    torch.manual_seed(0)
    theirs, ours = pair(name, impl, theirs_impl)
    if theirs_impl == "grouped_mm" and not has_two_implementations(theirs):
        theirs_impl = "eager, its only one"
    x = torch.randn(BATCH, LENGTH, D, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    y, expected = run_ours(ours, x), run_theirs(theirs, x_theirs)
    record_property("outputs", largest_difference(y, expected))
    assert_close(y, expected, rtol=1e-4, atol=1e-5)

    direction = torch.randn_like(y)
    y.backward(direction)
    expected.backward(direction)
    family = BLOCKS[name][0]
    gradients = to_hugging_face(family, {key: weight.grad for key, weight in ours.named_parameters()})
    their_gradients = {  # of a weight that no token used, None stands for zero
        key: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for key, weight in theirs.named_parameters()
    }
    assert gradients.keys() == their_gradients.keys()
    seen = [(x.grad, x_theirs.grad), *((gradients[key], their_gradients[key]) for key in gradients)]
    record_property("gradients", max(largest_difference(*both) for both in seen))
    record_property("theirs", theirs_impl)
    for got, wanted in seen:
        assert_close(got, wanted, rtol=1e-4, atol=5e-5)
    for key, weight in ours.named_parameters():
        assert weight.grad.any(), f"the gradient of {key} is zero everywhere: nothing was compared"


def their_choice(name: str, theirs: nn.Module, x: Tensor) -> Tensor:
    """(T, E) which experts their router chose."""
    seen = []
    router = theirs.router if hasattr(theirs, "router") else theirs.gate
    hook = router.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    run_theirs(theirs, x)
    hook.remove()
    (out,) = seen
    if name.startswith("switch"):
        return out[0].flatten(0, 1).bool()
    if name.startswith("llama4"):
        return out[0] > 0
    return torch.zeros(x.shape[0] * x.shape[1], E, dtype=torch.bool).scatter(1, out[2], True)


def our_choice(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, E) which experts our router chose, and (T, E) what it chose them by."""
    routing = layer.router(x.flatten(0, 1))
    chosen = torch.zeros_like(routing.router_scores, dtype=torch.bool).scatter(1, routing.topk_experts, True)
    bias = layer.router.selection_bias
    return chosen, routing.router_scores + (0 if bias is None else bias)


NOT_DROPPING = [name for name in BLOCKS if "drops" not in name]


@pytest.mark.parametrize("name", NOT_DROPPING)
def test_in_bf16_rows_of_equal_sets_agree_and_others_were_near_ties(name, record_property):
    """Most families compute logits in the model's dtype, ours are fp32: a few rows choose another set."""
    torch.manual_seed(0)
    theirs, ours = pair(name)
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    if name.startswith("switch"):
        theirs.router.expert_capacity = 512
    x = torch.randn(1, 512, D).bfloat16()
    with torch.no_grad():
        y, expected = run_ours(ours, x).float()[0], run_theirs(theirs, x).float()[0]
        mine, (other, selection) = their_choice(name, theirs, x), our_choice(ours, x)
    same = (mine == other).all(-1)
    record_property("rows of equal sets", same.float().mean().item())
    assert same.float().mean() > 0.9
    assert_close(y[same], expected[same], rtol=0.05, atol=0.03 * expected.std().item())
    # Where the sets differ, what stands in one of them only is worth the same within what bf16 logits can tell.
    for row in (~same).nonzero().flatten():
        only = selection[row][mine[row] ^ other[row]]
        if "groups" not in name and name != "deepseek_v3":  # there a near-tie between groups exchanges any experts
            assert only.max() - only.min() < 0.02


@EVERY_BLOCK
def test_equal_scores_are_told_apart_by_ids(name):
    """Two experts with one router row tie for every token: ours takes the lower id, theirs may take either."""
    torch.manual_seed(0)
    theirs, ours = pair(name)
    router = theirs.router if hasattr(theirs, "router") else theirs.gate
    router = getattr(router, "classifier", router)
    low, high = 2, 3  # in one group, where there are groups
    with torch.no_grad():
        for tensor in (router.weight, getattr(router, "bias", None), getattr(router, "e_score_correction_bias", None)):
            if tensor is not None:
                tensor[high] = tensor[low]
    ours.load_state_dict(from_hugging_face(BLOCKS[name][0], theirs.state_dict()))
    x = torch.randn(8, LENGTH, D)
    mine, (other, _) = our_choice(ours, x)[0], (their_choice(name, theirs, x), None)
    assert (mine[:, low] | ~mine[:, high]).all()  # never the higher one alone
    assert (mine[:, low] ^ mine[:, high]).any()  # and in some rows the tie decides
    if "drops" not in name:
        rest = [e for e in range(E) if e not in (low, high)]
        assert (mine[:, rest] == other[:, rest]).all()
        assert (mine[:, [low, high]].sum(-1) == other[:, [low, high]].sum(-1)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same(family):
    name = next(name for name, (its, _, _) in BLOCKS.items() if its == family)
    theirs, ours = pair(name)
    assert_close(to_hugging_face(family, ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)


def test_tensors_that_do_not_fit_are_named():
    theirs, ours = pair("mixtral")
    with pytest.raises(ValueError, match=r"family='gpt-5': expected one of mixtral, qwen2_moe"):
        from_hugging_face("gpt-5", theirs.state_dict())
    tensors = dict(theirs.state_dict()) | {"gate.bias": torch.zeros(E)}
    del tensors["experts.down_proj"]
    with pytest.raises(ValueError, match=r"one mixtral layer: missing experts.down_proj; not expected gate.bias"):
        from_hugging_face("mixtral", tensors)
    with pytest.raises(ValueError, match=r"one mixtral layer: missing none; not expected router.bias"):
        to_hugging_face("mixtral", ours.state_dict() | {"router.bias": torch.zeros(E)})
