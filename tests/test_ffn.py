import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from moe_lab.config import LMConfig
from moe_lab.ffn import MLP, SwiGLU, keep_strongest, make_ffn, mlp, swiglu

UGLY_SIZES = [(1, 1, 1), (3, 5, 7), (8, 4, 33)]  # tokens, d_model, d_ff


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(("tokens", "d_model", "d_ff"), UGLY_SIZES)
def test_mlp_is_torchs_sequential_forward_and_gradients(activation, tokens, d_model, d_ff):
    torch.manual_seed(0)
    ours = MLP(d_model, d_ff, activation)
    layer = {"relu": torch.nn.ReLU, "gelu": torch.nn.GELU}[activation]()
    up, down = torch.nn.Linear(d_model, d_ff, bias=False), torch.nn.Linear(d_ff, d_model, bias=False)
    up.weight.data.copy_(ours.w_up.weight)
    down.weight.data.copy_(ours.w_down.weight)
    x = torch.randn(tokens, d_model)
    y, expected = ours(x), torch.nn.Sequential(up, layer, down)(x)
    assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_close(ours.w_up.weight.grad, up.weight.grad)
    assert_close(ours.w_down.weight.grad, down.weight.grad)


@pytest.mark.parametrize(("tokens", "d_model", "d_ff"), UGLY_SIZES)
def test_swiglu_is_llamas_mlp_forward_and_gradients(tokens, d_model, d_ff):
    torch.manual_seed(0)
    ours = SwiGLU(d_model, d_ff)
    theirs = LlamaMLP(LlamaConfig(hidden_size=d_model, intermediate_size=d_ff, num_attention_heads=1, head_dim=2))
    pairs = [("w_gate", "gate_proj"), ("w_up", "up_proj"), ("w_down", "down_proj")]
    for mine, other in pairs:
        getattr(theirs, other).weight.data.copy_(getattr(ours, mine).weight)
    x = torch.randn(tokens, d_model, requires_grad=True)
    x_theirs = x.detach().clone().requires_grad_()
    y, expected = ours(x), theirs(x_theirs)
    assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_close(x.grad, x_theirs.grad)
    for mine, other in pairs:
        assert_close(getattr(ours, mine).weight.grad, getattr(theirs, other).weight.grad)


@pytest.mark.parametrize("ffn", [MLP(6, 10), MLP(6, 10, "gelu"), SwiGLU(6, 10)])
def test_the_output_is_hidden_through_the_down_matrix(ffn):
    x = torch.randn(2, 3, 6)
    hidden = ffn.hidden(x)
    assert hidden.shape == (2, 3, 10)
    assert_close(ffn(x), F.linear(hidden, ffn.w_down.weight))


def test_a_token_is_worked_on_alone():
    ffn, x = SwiGLU(6, 10), torch.randn(5, 6)
    assert_close(ffn(x)[3], ffn(x[3]))


def test_make_ffn_follows_the_configuration():
    config = LMConfig(d_model=6, n_layers=1, n_heads=1, d_ff=10)
    assert isinstance(make_ffn(config), SwiGLU)
    assert make_ffn(config.but(ffn="gelu")).activation == "gelu"


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"activation='swish': expected one of relu, gelu"):
        MLP(4, 8, "swish")


def test_functions_are_the_modules():
    x, plain, gated = torch.randn(5, 6), MLP(6, 10), SwiGLU(6, 10)
    assert_close(mlp(x, plain.w_up.weight, plain.w_down.weight), plain(x))
    assert_close(swiglu(x, gated.w_gate.weight, gated.w_up.weight, gated.w_down.weight), gated(x))


def test_keep_strongest_by_hand():
    hidden = torch.tensor([[1.0, -2.0, 3.0, 0.5], [4.0, 1.0, 1.0, -9.0]])
    w_down = torch.tensor([[1.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.1]])  # columns of length 1, 2, 1, 0.1
    kept = torch.tensor([[0.0, -2.0, 3.0, 0.0], [4.0, 1.0, 0.0, 0.0]])
    assert_close(keep_strongest(hidden, w_down, 0.5), kept)


@pytest.mark.parametrize(("share", "count"), [(1.0, 10), (0.25, 2), (0.26, 3), (0.001, 1)])
def test_keep_strongest_keeps_a_share_and_at_least_one(share, count):
    kept = keep_strongest(torch.randn(2, 3, 10), torch.randn(4, 10), share)
    assert torch.equal((kept != 0).sum(-1), torch.full((2, 3), count))


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_keep_strongest_refuses_a_share_that_cannot_be(share):
    with pytest.raises(ValueError, match=r"expected a number in \(0, 1\]"):
        keep_strongest(torch.randn(3, 4), torch.randn(2, 4), share)
