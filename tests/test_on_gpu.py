"""What only a GPU can show of the layer: no host sync, the same bits every time, NaN that is not routed away."""

import pytest
import torch
from torch.testing import assert_close

from moe_lab.config import MoEConfig
from moe_lab.moe import MoE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch sees none")

CONFIG = MoEConfig(d_model=64, d_ff=32, n_experts=16, top_k=4, n_shared_experts=1)
CAPACITY = CONFIG.but(capacity_factor=1.0)


def layer_and_input(config: MoEConfig, dtype: torch.dtype = torch.bfloat16) -> tuple[MoE, torch.Tensor]:
    torch.manual_seed(0)
    layer = MoE(config, impl="torch").to("cuda", dtype)
    return layer, torch.randn(256, config.d_model, device="cuda", dtype=dtype, requires_grad=True)


def forward_and_gradients(layer: MoE, x: torch.Tensor) -> list[torch.Tensor]:
    y = layer(x)[0]
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))]


@pytest.mark.parametrize("config", [CONFIG, CAPACITY], ids=["dropless", "capacity"])
def test_no_host_sync(config):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped product falls back to a loop with syncs below Hopper (SM 9.0)")
    layer, x = layer_and_input(config)
    forward_and_gradients(layer, x)  # what is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_gradients(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("config", [CONFIG, CAPACITY], ids=["dropless", "capacity"])
def test_the_same_bits_every_time(config):
    layer, x = layer_and_input(config)
    first = forward_and_gradients(layer, x)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(forward_and_gradients(layer, x), first, strict=True))


def test_as_on_a_cpu():
    layer, x = layer_and_input(CONFIG, torch.float32)
    got = [tensor.cpu() for tensor in forward_and_gradients(layer, x)]
    expected = forward_and_gradients(layer.cpu(), x.detach().cpu().requires_grad_())
    assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_nan_reaches_the_output_or_is_refused():
    layer, x = layer_and_input(CONFIG)
    bad = x.detach().clone()
    bad[3] = torch.nan
    y = layer(bad)[0]
    assert y[3].isnan().all()
    assert y[torch.arange(len(y)) != 3].isfinite().all()
    layer.router.check_finite = True
    with pytest.raises(ValueError, match=r"are NaN or infinite, in 1 of 256 tokens"):
        layer(bad)
