"""What only a GPU can show: no host sync, the same bits every time, NaN that is not routed away, bf16, NCCL."""

import pytest
import torch
from torch.testing import assert_close

from moe_lab.config import BalanceConfig, LMConfig, MoEConfig, TrainConfig
from moe_lab.lm import LM
from moe_lab.moe import MoE
from moe_lab.parallel import FORMS, ExpertParallelMoE, Store, joined
from moe_lab.train import Trainer

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


TINY_LM = LMConfig(
    d_model=64, n_layers=2, n_heads=2, d_ff=64, moe=CONFIG.but(score="sigmoid", selection_bias=True, top_k=2)
)
SHORT = TrainConfig(
    steps=4,
    batch_size=4,
    micro_batches=2,
    context=32,
    warmup_steps=1,
    precision="bf16",
    balance=BalanceConfig(loss="global_batch", alpha=0.01, z_loss=0.001, bias_rate=0.001),
)
TEXT = {"digits": torch.arange(48, 58, dtype=torch.uint8).repeat(100)}


def test_training_in_bf16_learns_moves_the_bias_and_resumes():
    def trainer() -> Trainer:
        torch.manual_seed(0)
        return Trainer(LM(TINY_LM).to("cuda"), TEXT, SHORT)

    whole = trainer()
    losses = [whole.step().loss for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(moe.router.selection_bias.any() for moe in whole.model.moe_layers)
    assert {weight.dtype for weight in whole.model.parameters()} == {torch.float32}
    first, second = trainer(), trainer()
    first.step(), first.step()
    second.load_state({name: tensor.cpu() for name, tensor in first.state().items()})
    assert_close([second.step().loss, second.step().loss], losses[2:], rtol=1e-3, atol=1e-3)


def test_recomputation_gives_the_same_training():
    losses = []
    for recompute in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(LM(TINY_LM).to("cuda"), TEXT, SHORT.but(recompute=recompute))
        losses.append([trainer.step().loss for _ in range(3)])
    assert_close(*losses, rtol=1e-3, atol=1e-3)


def test_one_rank_over_nccl_is_the_layer_in_one_process():
    """With one GPU there is one rank, for NCCL refuses two on a GPU: this shows that every call is one it takes."""
    layer, x = layer_and_input(CONFIG, torch.float32)
    expected = forward_and_gradients(layer, x)
    store = Store()
    with joined(0, 1, store.address, backend="nccl", timeout=60) as ranks:
        for form in FORMS:
            over_ranks = ExpertParallelMoE(layer, ranks, form=form, node_size=1)
            by_name = dict(zip([name for name, _ in layer.named_parameters()], expected[2:], strict=True))
            y, dx, *gradients = forward_and_gradients(over_ranks, x)
            assert_close([y, dx], expected[:2], rtol=1e-4, atol=1e-4)
            for (name, _), gradient in zip(over_ranks.named_parameters(), gradients, strict=True):
                assert_close(gradient, by_name[name], rtol=1e-4, atol=1e-4)
