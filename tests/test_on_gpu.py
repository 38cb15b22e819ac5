"""What only a GPU can show: no host sync, the same bits every time, NaN that is not routed away, bf16, NCCL.

And of the Triton kernels: their numbers against fp64 and against cuBLAS, every element written, CUDA graphs, 64 bit
offsets. Their tests are written for any device, so that without a GPU they can be tried in Triton's interpreter.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from moe_lab.config import BalanceConfig, LMConfig, MoEConfig, TrainConfig
from moe_lab.dispatch import sort_choices
from moe_lab.gpu import GRACE
from moe_lab.gpu.deadline import UNTIL
from moe_lab.gpu.jobs import capability
from moe_lab.lm import LM
from moe_lab.moe import MoE
from moe_lab.ops import GROUPED_MM, MOE_MLP, grouped_mm, moe_mlp
from moe_lab.ops.grouped_mm import launches
from moe_lab.ops.tiles import choose_tiles
from moe_lab.parallel import FORMS, ExpertParallelMoE, Store, joined
from moe_lab.train import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch sees none")

CONFIG = MoEConfig(d_model=64, d_ff=32, n_experts=16, top_k=4, n_shared_experts=1)
CAPACITY = CONFIG.but(capacity_factor=1.0)


def layer_and_input(
    config: MoEConfig, dtype: torch.dtype = torch.bfloat16, impl: str = "torch"
) -> tuple[MoE, torch.Tensor]:
    torch.manual_seed(0)
    layer = MoE(config, impl=impl).to("cuda", dtype)
    return layer, torch.randn(256, config.d_model, device="cuda", dtype=dtype, requires_grad=True)


def forward_and_gradients(layer: MoE, x: torch.Tensor) -> list[torch.Tensor]:
    y = layer(x)[0]
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("config", [CONFIG, CAPACITY], ids=["dropless", "capacity"])
def test_no_host_sync(config, impl):
    if impl == "torch" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("torch's grouped product falls back to a loop with syncs below Hopper (SM 9.0)")
    layer, x = layer_and_input(config, impl=impl)
    forward_and_gradients(layer, x)  # what is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_gradients(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("config", [CONFIG, CAPACITY], ids=["dropless", "capacity"])
def test_the_same_bits_every_time(config, impl):
    layer, x = layer_and_input(config, impl=impl)
    first = forward_and_gradients(layer, x)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(forward_and_gradients(layer, x), first, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_as_on_a_cpu(impl):
    layer, x = layer_and_input(CONFIG, torch.float32, impl)
    layer_on_cpu = MoE(CONFIG, impl="torch")
    layer_on_cpu.load_state_dict(layer.state_dict())
    got = [tensor.cpu() for tensor in forward_and_gradients(layer, x)]
    expected = forward_and_gradients(layer_on_cpu, x.detach().cpu().requires_grad_())
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


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_training_in_bf16_learns_moves_the_bias_and_resumes(impl):
    def trainer() -> Trainer:
        torch.manual_seed(0)
        model = LM(TINY_LM).to("cuda")
        for moe in model.moe_layers:
            moe.experts.impl = impl
        return Trainer(model, TEXT, SHORT)

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


# --- The Triton kernels ---------------------------------------------------------------------------------------------
#
# What they compute is compared with fp64 on the same inputs, and so is what cuBLAS makes of them in their dtype. Both
# round, so our error may be that much larger than the library's, no more: in the mean (as norms), and in the worst
# element, which varies more. Of few numbers the library's may all be lucky: one rounding step is always allowed there.

IN_THE_MEAN, IN_THE_WORST, FEW = 1.25, 2.0, 1000
DEVICE = "cuda"
SANITIZER_SECONDS = 150


@contextlib.contextmanager
def poisoned(device: str = DEVICE) -> Iterator[None]:
    """Inside, new memory holds NaN (and -1 as integers): what nobody writes shows.

    torch fills what `empty` gives while it has to be deterministic; and to be sure of memory that is taken in other
    ways, a gigabyte and many small blocks are filled and freed, which the allocator hands out next. Operations that are
    not deterministic raise.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        blocks = [torch.empty(size, dtype=torch.uint8, device=device) for size in (2**30, *64 * [2**20])]
        for block in blocks:
            block.fill_(255)  # NaN in every floating-point dtype
        del blocks
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def force() -> Iterator[Callable[..., None]]:
    """`force("few", tma=False)`: kernels take the tiles of that class, of the products that one, and what changes."""
    with contextlib.ExitStack() as until_the_end:

        def force(table: str, tma: bool, **changes: object) -> None:
            chip = capability() if DEVICE == "cuda" else 0
            if tma and 0 < chip < 90:
                pytest.skip("descriptors (TMA) need a GPU from Hopper (SM 9.0) on")
            tiles = choose_tiles(chip, 2, {"few": 1, "many": 2**20}[table], 1)  # rows of one group
            until_the_end.enter_context(launches().using(tiles, tma=tma, **changes))

        yield force


def offsets_of(counts: list[int], device: str = DEVICE) -> Tensor:
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


def normal(*size: int, dtype: torch.dtype, device: str, std: float = 1.0) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device).normal_(0, std).requires_grad_()


def product_case(
    counts: list[int], sizes: tuple[int, int], dtype: torch.dtype, device: str = DEVICE
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    n_in, n_out = sizes
    rows, weights = normal(sum(counts), n_in, dtype=dtype, device=device), (len(counts), n_out, n_in)
    weights = normal(*weights, dtype=dtype, device=device, std=n_in**-0.5)
    return rows, weights, normal(sum(counts), n_out, dtype=dtype, device=device).detach()


def results(function: Callable[..., Tensor], dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The output and the gradient of every input."""
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def in_fp64(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """‖a − b‖ / ‖b‖, and the largest |a − b|."""
    apart = got.double() - exact
    return (apart.norm() / exact.norm().clamp(min=1e-300)).item(), apart.abs().max().item()


def assert_as_good(ours: list[Tensor], library: list[Tensor], exact: list[Tensor], least: float = 0.0) -> None:
    """Our errors against fp64 are those of the library, but for the factors above; or at most `least`."""
    step = torch.finfo(ours[0].dtype).eps
    for i, (one, other, truth) in enumerate(zip(ours, library, exact, strict=True)):
        assert one.isfinite().all(), f"result {i}: {int((~one.isfinite()).sum())} elements are not finite"
        (mean, worst), (mean_of_library, worst_of_library) = errors(one, truth), errors(other, truth)
        floor = max(least, step if truth.numel() < FEW else 0.0)
        assert mean <= max(IN_THE_MEAN * mean_of_library, floor), f"result {i}: {mean} against {mean_of_library}"
        worst_allowed = max(IN_THE_WORST * worst_of_library, floor * truth.abs().max().item())
        assert worst <= worst_allowed, f"result {i}: one is off by {worst}, against {worst_of_library}"


def product_check(
    counts: list[int], sizes: tuple[int, int], dtype: torch.dtype, device: str = DEVICE, least: float = 0.0
) -> None:
    rows, weights, dy = product_case(counts, sizes, dtype, device)
    offsets = offsets_of(counts, device)
    with poisoned(device):
        ours = results(lambda r, w: grouped_mm(r, w, offsets, "triton"), dy, rows, weights)
    reference = GROUPED_MM["reference"]
    library = results(lambda r, w: reference(r, w, offsets), dy, rows, weights)
    exact = results(lambda r, w: reference(r, w, offsets), dy.double(), *in_fp64(rows, weights))
    assert_as_good(ours, library, exact, least)
    empty = torch.tensor(counts, device=device) == 0
    assert not ours[2][empty].any()


# Empty groups first, last and between; one row; a tile's worth and one more; more than any tile
COUNTS = [0, 1, 129, 0, 64, 300, 7, 0]
EVEN, UGLY = (256, 512), (208, 336)  # that blocks divide, and that they do not
UNEVEN, UNALIGNED = (200, 328), (75, 51)  # multiples of 16 bytes, not of 16 numbers; and nothing at all
PATHS = [(table, tma) for table in ("few", "many") for tma in (False, True)]
SMALL_DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("table", "tma"), PATHS)
@pytest.mark.parametrize("sizes", [EVEN, UGLY], ids=["even", "ugly"])
def test_the_product_is_as_exact_as_cublas_and_writes_everything(force, table, tma, sizes):
    force(table, tma)
    product_check(COUNTS, sizes, torch.bfloat16)


@pytest.mark.parametrize("sizes", [UNEVEN, UNALIGNED], ids=["uneven", "unaligned"])
@pytest.mark.parametrize("counts", [[1], [0, 300, 0], COUNTS], ids=["one token", "one takes all", "mixed"])
def test_the_product_in_sizes_that_nothing_divides(counts, sizes):
    product_check(counts, sizes, torch.bfloat16)


@pytest.mark.parametrize("flatten", [True, False], ids=["one loop", "two loops"])
@pytest.mark.parametrize("table", ["few", "many"])
def test_a_program_of_the_grid_that_stays_takes_tile_after_tile(force, table, flatten):
    force(table, tma=True, flatten=flatten)
    product_check([700, 0, 1, *20 * [513, 130]], (512, 1024), torch.bfloat16)  # some four tiles a program, and more
    block_check(6000, (256, 1024), torch.bfloat16)


@pytest.mark.parametrize("tma", [False, True])
def test_the_product_in_fp16(force, tma):
    force("many", tma)
    product_check(COUNTS, UGLY, torch.float16)


def test_the_product_in_fp32_is_exact_and_tf32_is_allowed_when_torch_allows_it():
    product_check(COUNTS, UGLY, torch.float32, least=2e-6)
    rows, weights, _ = product_case(COUNTS, UGLY, torch.float32)
    exact = GROUPED_MM["reference"](*in_fp64(rows, weights), offsets_of(COUNTS))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        error, _ = errors(grouped_mm(rows, weights, offsets_of(COUNTS), "triton"), exact)
    finally:
        torch.set_float32_matmul_precision(before)
    assert 1e-5 < error < 2e-3  # TF32 keeps ten bits, and was used


def rows_past_the_end_check(dtype: torch.dtype, device: str = DEVICE) -> None:
    rows, weights, dy = product_case([40, 0, 60, 0, 33], (64, 48), dtype, device)
    offsets = offsets_of([40, 0, 60], device)  # the last 33 rows belong to nobody
    weights = weights.detach()[:3].requires_grad_()
    clean = results(lambda r, w: grouped_mm(r, w, offsets, "triton"), dy, rows, weights)
    with torch.no_grad():
        rows[100:], dy[100:] = torch.nan, torch.nan
    with poisoned(device):
        y, d_rows, d_weights = results(lambda r, w: grouped_mm(r, w, offsets, "triton"), dy, rows, weights)
    assert torch.equal(y, clean[0])
    assert not y[100:].any()
    assert torch.equal(d_rows, clean[1])
    assert not d_rows[100:].any()
    assert torch.equal(d_weights, clean[2])


@pytest.mark.parametrize("tma", [False, True])
def test_rows_past_the_last_offset_are_not_read_and_become_zero(force, tma):
    force("many", tma)
    rows_past_the_end_check(torch.bfloat16)


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x[..., :1]], -1)[..., :-1],
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other row": lambda x: x.repeat_interleave(2, -2)[..., ::2, :],
    "one row, expanded": lambda x: x[..., :1, :].expand(x.shape),
    "from the second number on": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def layout_check(layout: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str = DEVICE) -> None:
    rows, weights, dy = product_case([70, 0, 30], (64, 48), dtype, device)
    offsets = offsets_of([70, 0, 30], device)
    odd = [layout(tensor.detach()).requires_grad_() for tensor in (rows, weights)]
    plain = [tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in odd]
    odd_dy = layout(dy)
    ours = results(lambda r, w: grouped_mm(r, w, offsets, "triton"), odd_dy, *odd)
    reference = GROUPED_MM["reference"]
    library = results(lambda r, w: reference(r, w, offsets), odd_dy.contiguous(), *plain)
    exact = results(lambda r, w: reference(r, w, offsets), odd_dy.double().contiguous(), *in_fp64(*plain))
    assert_as_good(ours, library, exact)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_misaligned_and_scattered_tensors(layout):
    layout_check(layout, torch.bfloat16)


# --- The fused block


def block_case(
    n_tokens: int, sizes: tuple[int, int], dtype: torch.dtype, device: str = DEVICE, n_experts: int = 8, top_k: int = 2
) -> tuple[list[Tensor], Tensor, Tensor]:
    """x, both matrices and the weights; the choices, which leave some experts empty; and an upstream gradient."""
    torch.manual_seed(0)
    d_model, width = sizes
    x = normal(n_tokens, d_model, dtype=dtype, device=device)
    w_in = normal(n_experts, 2 * width, d_model, dtype=dtype, device=device, std=d_model**-0.5)
    w_down = normal(n_experts, d_model, width, dtype=dtype, device=device, std=width**-0.5)
    weights = torch.rand(n_tokens, top_k, device=device).requires_grad_()
    likes = torch.rand(n_tokens, n_experts, device=device)
    likes[:, [0, n_experts - 1]] = -1  # nobody chooses these
    likes[:, 2] += 0.5  # and many this one
    dy = normal(n_tokens, d_model, dtype=dtype, device=device).detach()
    return [x, w_in, w_down, weights], likes.topk(top_k).indices, dy


def block_check(
    n_tokens: int, sizes: tuple[int, int], dtype: torch.dtype, device: str = DEVICE, least: float = 0.0, top_k: int = 2
) -> None:
    inputs, chosen, dy = block_case(n_tokens, sizes, dtype, device, top_k=top_k)
    n_experts = len(inputs[1])
    with poisoned(device):
        plan = sort_choices(chosen, n_experts)
        ours = results(lambda x, w_in, w_down, s: moe_mlp(x, w_in, w_down, plan, s, "triton"), dy, *inputs)
    reference = MOE_MLP["reference"]

    def by_steps(x: Tensor, w_in: Tensor, w_down: Tensor, weights: Tensor) -> Tensor:
        return reference(x, w_in, w_down, plan, weights)

    library = results(by_steps, dy, *inputs)
    exact = results(by_steps, dy.double(), *in_fp64(*inputs))
    assert_as_good(ours, library, exact, least)
    unused = torch.ones(n_experts, dtype=torch.bool, device=device)
    unused[chosen.flatten()] = False
    assert unused.any()
    assert not ours[2][unused].any()
    assert not ours[3][unused].any()


@pytest.mark.parametrize("tma", [False, True], ids=["portable", "tma"])
@pytest.mark.parametrize("table", ["few", "many"])
@pytest.mark.parametrize("sizes", [(256, 128), (208, 80)], ids=["even", "ugly"])
def test_the_block_is_as_exact_as_its_steps_on_cublas_and_writes_everything(force, table, sizes, tma):
    force(table, tma)
    block_check(400, sizes, torch.bfloat16)


@pytest.mark.parametrize("sizes", [(200, 88), (75, 51)], ids=["uneven", "unaligned"])
def test_the_block_in_sizes_that_nothing_divides(sizes):
    block_check(400, sizes, torch.bfloat16)


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_block_of_one_token(top_k):
    block_check(1, (256, 128), torch.bfloat16, top_k=top_k, least=torch.finfo(torch.bfloat16).eps)  # luck weighs more


def test_the_block_in_fp16():
    block_check(400, (208, 80), torch.float16)


def test_the_block_in_fp32_is_exact():
    block_check(400, (200, 88), torch.float32, least=4e-6)


def test_the_block_with_everything_to_one_expert():
    inputs, chosen, dy = block_case(300, (256, 128), torch.bfloat16, top_k=1)
    plan = sort_choices(torch.full_like(chosen, 3), len(inputs[1]))
    with poisoned():
        ours = results(lambda x, w_in, w_down, s: moe_mlp(x, w_in, w_down, plan, s, "triton"), dy, *inputs)
    reference = MOE_MLP["reference"]
    library = results(lambda x, w_in, w_down, s: reference(x, w_in, w_down, plan, s), dy, *inputs)
    exact = results(lambda x, w_in, w_down, s: reference(x, w_in, w_down, plan, s), dy.double(), *in_fp64(*inputs))
    assert_as_good(ours, library, exact)


def test_the_kernels_give_the_same_bits_every_time():
    inputs, chosen, dy = block_case(3000, (256, 128), torch.bfloat16)

    def run() -> list[Tensor]:
        plan = sort_choices(chosen, len(inputs[1]))
        return results(lambda x, w_in, w_down, s: moe_mlp(x, w_in, w_down, plan, s, "triton"), dy, *inputs)

    first = run()
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(run(), first, strict=True))


# --- The layer


def relative(got: Tensor, expected: Tensor) -> float:
    return errors(got, expected.double())[0]


@pytest.mark.parametrize("config", [CONFIG, CAPACITY], ids=["fused", "step by step"])
def test_the_layer_computes_what_torchs_product_does(config):
    found = []
    for impl in ("triton", "torch"):
        layer, x = layer_and_input(config, impl=impl)
        found.append(forward_and_gradients(layer, x))
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < 0.02  # bf16 rounds to 0.004, in several places


def test_a_compiled_layer_computes_what_it_does_uncompiled():
    layer, x = layer_and_input(CONFIG, torch.float32, impl="triton")
    expected = forward_and_gradients(layer, x)
    y = torch.compile(layer)(x)[0]
    got = [y, *torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))]
    for ours, wanted in zip(got, expected, strict=True):
        assert relative(ours, wanted) < 1e-4


def test_a_layer_in_a_cuda_graph_computes_new_data_with_other_routing():
    layer, x = layer_and_input(CONFIG, impl="triton")
    other = torch.randn_like(x)
    assert not torch.equal(layer(x)[1].topk_experts, layer(other)[1].topk_experts)
    expected = forward_and_gradients(layer, other.requires_grad_())

    stream = torch.cuda.Stream()  # what is set up at first use may not happen in a capture
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_and_gradients(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_gradients(layer, x)
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for ours, wanted in zip(captured, expected, strict=True):
        assert relative(ours, wanted) < 1e-3  # cuBLAS, in the router, may choose another algorithm in a graph


def test_the_layer_under_autocast_computes_in_bf16_and_keeps_fp32_gradients():
    layer, x = layer_and_input(CONFIG, torch.float32, impl="triton")
    exact = forward_and_gradients(layer, x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)[0]
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    for ours, wanted in zip([y, *gradients], exact, strict=True):
        assert 1e-4 < relative(ours, wanted) < 0.05


# --- Sizes past 2^31


def require_memory(n_bytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < n_bytes:
        pytest.skip(f"needs {n_bytes / 1e9:.0f} GB of GPU memory, and {free / 1e9:.0f} are free")


@pytest.mark.parametrize("tma", [False, True])
def test_matrices_that_end_past_2_to_the_31(force, tma):
    force("many", tma)
    require_memory(40e9)
    counts, size = [3, *7 * [0], 20], 16384  # the last of nine matrices begins at 2^31 numbers
    rows, weights, dy = product_case(counts, (size, size), torch.bfloat16)
    offsets = offsets_of(counts)
    assert weights.numel() > 2**31
    y, d_rows, d_weights = results(lambda r, w: grouped_mm(r, w, offsets, "triton"), dy, rows, weights)
    for group, mine in ((0, slice(0, 3)), (8, slice(3, 23))):
        last = weights[group].detach().double()
        assert relative(y[mine], rows[mine].detach().double() @ last.T) < 0.01
        assert relative(d_rows[mine], dy[mine].double() @ last) < 0.01
        sample = slice(size - 64, size)  # outputs of the matrix
        expected = dy[mine, sample].double().T @ rows[mine].detach().double()
        assert relative(d_weights[group, sample], expected) < 0.01
    assert not d_weights[1:8].any()


@pytest.mark.parametrize("tma", [False, True])
def test_rows_that_end_past_2_to_the_31(force, tma):
    force("many", tma)
    require_memory(40e9)
    n_rows, size = 2**20 + 300, 2048
    counts = [n_rows - 200, 200]
    rows, weights, dy = product_case(counts, (size, size), torch.bfloat16)
    offsets = offsets_of(counts)
    y, d_rows, d_weights = results(lambda r, w: grouped_mm(r, w, offsets, "triton"), dy, rows, weights)
    assert rows.numel() > 2**31
    exact = in_fp64(weights)[0]
    for group, mine in ((0, slice(0, 64)), (0, slice(n_rows - 264, n_rows - 200)), (1, slice(n_rows - 200, n_rows))):
        assert relative(y[mine], rows[mine].detach().double() @ exact[group].detach().T) < 0.01
        assert relative(d_rows[mine], dy[mine].double() @ exact[group].detach()) < 0.01
    mine = slice(n_rows - 200, n_rows)
    assert relative(d_weights[1], dy[mine].double().T @ rows[mine].detach().double()) < 0.01


def test_a_block_whose_rows_end_past_2_to_the_31():
    require_memory(60e9)
    n_tokens, top_k, sizes, n_experts = 2**17 + 100, 8, (2048, 1024), 16
    inputs, chosen, dy = block_case(n_tokens, sizes, torch.bfloat16, n_experts=n_experts, top_k=top_k)
    plan = sort_choices(chosen, n_experts)
    assert plan.n_rows * sizes[0] > 2**31
    y, dx, d_in, d_down, d_weights = results(
        lambda x, w_in, w_down, s: moe_mlp(x, w_in, w_down, plan, s, "triton"), dy, *inputs
    )
    # what a token gets depends on no other; and tokens from the start and the end have rows from all over
    sample = torch.cat([torch.arange(8), torch.arange(n_tokens - 8, n_tokens)]).to(DEVICE)
    x, w_in, w_down, weights = in_fp64(*inputs)
    few = sort_choices(chosen[sample], n_experts)
    reference = MOE_MLP["reference"]
    exact = results(
        lambda x, s: reference(x, w_in.detach(), w_down.detach(), few, s),
        dy[sample].double(),
        x.detach()[sample].requires_grad_(),
        weights.detach()[sample].requires_grad_(),
    )
    for got, wanted in zip((y[sample], dx[sample], d_weights[sample]), exact, strict=True):
        assert relative(got, wanted) < 0.02
    del x, exact
    # of the last expert that is used, whose rows lie at the end: one column of hidden numbers
    last = n_experts - 2
    mine = plan.row_choices[plan.offsets[last - 1] : plan.offsets[last]]
    tokens = inputs[0].detach()[mine // top_k].double()
    gate, up = (tokens @ half.T for half in w_in.detach()[last].chunk(2))
    hidden = torch.nn.functional.silu(gate) * up * weights.detach().flatten()[mine, None]
    expected = dy[mine // top_k, :32].double().T @ hidden
    assert relative(d_down[last, :32], expected) < 0.02
    assert d_in.isfinite().all()


# --- Bad accesses

SANITIZED = """
import torch
from moe_lab.dispatch import sort_choices
from moe_lab.ops import grouped_mm, moe_mlp

torch.manual_seed(0)
def normal(*size):
    return torch.randn(size, device="cuda").bfloat16().requires_grad_()
offsets = torch.tensor([0, 5, 70, 70], dtype=torch.int32, device="cuda")
for n_in, n_out in ((64, 48), (37, 51)):
    rows, weights = normal(75, n_in), normal(4, n_out, n_in)
    grouped_mm(rows, weights, offsets, "triton").sum().backward()
chosen = torch.rand(33, 4, device="cuda").topk(2).indices
for d_model, width in ((64, 48), (37, 21)):
    x, w_in, w_down = normal(33, d_model), normal(4, 2 * width, d_model), normal(4, d_model, width)
    weights = torch.rand(33, 2, device="cuda").requires_grad_()
    moe_mlp(x, w_in, w_down, sort_choices(chosen, 4), weights, "triton").sum().backward()
torch.cuda.synchronize()
print("all ran")
"""


def test_no_access_outside_its_memory():
    """Under compute-sanitizer's memcheck, where it is installed and takes this GPU, which some sandboxes hide."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "86", sys.executable, "-c", SANITIZED]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a neighbour's memory is one's own
    root = Path(__file__).parent.parent
    # past the grace period everybody's results are lost, so it may use up half of that at most
    seconds = min(SANITIZER_SECONDS, float(os.environ.get(UNTIL, "inf")) + GRACE / 2 - time.time())
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer was not done after {seconds:.0f} s")
    said = done.stdout + done.stderr
    found = [line for line in said.splitlines() if "Invalid __" in line or "Misaligned" in line]
    assert not found, said[-4000:]
    if "all ran" not in said or "ERROR SUMMARY: 0 errors" not in said:
        last = " ".join(said.split())[-300:]
        pytest.skip(f"compute-sanitizer told nothing of this GPU (status {done.returncode}): {last}")
