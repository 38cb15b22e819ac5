"""All that `moe_lab.ops` launches, compiled for chips that need not be there, and read."""

import ast
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_lab.ops import grouped_mm, moe_mlp
from moe_lab.ops.tiles import choose_tiles
from moe_lab.records import DispatchPlan

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton", reason="NOT COMPILED: there is no Triton for this system")
pytestmark = pytest.mark.skipif(INTERPRETS, reason="a process that interprets kernels cannot compile them")

if not INTERPRETS:
    import triton

    from moe_lab.ops import kernels
    from moe_lab.ops.machine_code import MOST_SHARED, TENSOR_CORE, MachineCode, compile_for, narrow_addresses

BY_DESCRIPTORS = {"grouped_product": "grouped_product_tma", "gate_up": "gate_up_tma"}
MATMULS = (*BY_DESCRIPTORS, *BY_DESCRIPTORS.values(), "down_backward", "weight_gradient")
FIELDS = {"grouped_product": "product", "grouped_product_tma": "product", "gate_up_tma": "gate_up"}  # of `Tiles`
IN_PTX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Tokens of Qwen3-30B-A3B (E128 D2048 F768 K8): 32 rows an expert in the mean, and 256.
N_TOKENS = {"few": 512, "many": 4096}


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forward_and_backward(
    n_tokens: int, dtype: torch.dtype, d_model: int = 2048, width: int = 768, n_experts: int = 128, top_k: int = 8
) -> None:
    """The product, whose sides are `width` and `d_model`, and the block."""
    n_rows = n_tokens * top_k
    offsets = meta(n_experts, dtype=torch.int32)
    rows = meta(n_rows, d_model, dtype=dtype).requires_grad_()
    matrices = meta(n_experts, width, d_model, dtype=dtype).requires_grad_()
    product = grouped_mm(rows, matrices, offsets, "triton")
    product.backward(torch.empty_like(product))
    plan = DispatchPlan(meta(n_rows, dtype=torch.int64), meta(n_tokens, top_k, dtype=torch.int64), offsets)
    x = meta(n_tokens, d_model, dtype=dtype).requires_grad_()
    w_in = meta(n_experts, 2 * width, d_model, dtype=dtype).requires_grad_()
    w_down = meta(n_experts, d_model, width, dtype=dtype).requires_grad_()
    weights = meta(n_tokens, top_k, dtype=torch.float32).requires_grad_()
    y = moe_mlp(x, w_in, w_down, plan, weights, "triton")
    y.backward(torch.empty_like(y))


def different(compiled: "list[MachineCode]") -> "list[MachineCode]":
    return list({code.cubin: code for code in compiled}.values())


# --- What each kernel has to be -------------------------------------------------------------------------------------


def assert_registers_suffice(code: "MachineCode") -> None:
    assert code.local_bytes == 0, (
        f"{code} keeps {code.local_bytes} bytes in local memory, with {code.registers} registers"
    )


def assert_nothing_is_double_or_atomic(code: "MachineCode") -> None:
    assert "f64" not in code.ttir, f"{code} computes in fp64"
    assert ".f64" not in code.ptx, f"{code} computes in fp64"
    atomic = re.findall(r"^\s*(?:@\S+\s+)?((?:atom|red)\.\S+)", code.ptx, re.M)
    assert not atomic, f"{code} adds in no fixed order: {atomic}"


def assert_pipelined(code: "MachineCode", element_size: int, stages: int = 2) -> None:
    """Shared memory holds the tiles of two steps at least, so that one comes while the other is worked on.

    On Hopper it has room for as many as the table asks for, and a product is not waited for before the next begins.
    """
    constants = code.constants
    n_matrices = 2 if code.name.startswith("gate_up") else 1
    step = (constants["BLOCK_M"] + n_matrices * constants["BLOCK_N"]) * constants["BLOCK_K"] * element_size
    assert 2 * step <= code.shared_bytes <= MOST_SHARED[code.capability], (
        f"{code}: {code.shared_bytes} of {step} a step"
    )
    if code.capability == 90:
        assert stages * step <= code.shared_bytes, f"{code}: {code.shared_bytes} of {step} a step, {stages} asked for"
        waits = {int(number) for number in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", code.ptx)}
        assert max(waits) >= 1, f"{code}: every product is waited for"


SETS = [
    *((capability, torch.bfloat16, load) for capability in (80, 90, 100) for load in N_TOKENS),
    *((capability, torch.float16, "few") for capability in (90, 100)),
    (80, torch.float16, "many"),
]


@pytest.mark.parametrize(("capability", "dtype", "load"), SETS, ids=str)
def test_what_is_launched_runs_on_tensor_cores_within_the_chips_limits(capability, dtype, load):
    with compile_for(capability) as compiled:
        forward_and_backward(N_TOKENS[load], dtype)
    launched = kernels_of_the_module()
    tiles = choose_tiles(capability, 2, 8 * N_TOKENS[load], 128)
    others = BY_DESCRIPTORS if tiles.tma else BY_DESCRIPTORS.values()
    assert {code.name for code in compiled} == launched - set(others)
    for code in different(compiled):
        assert code.capability == capability
        assert_registers_suffice(code)
        assert_nothing_is_double_or_atomic(code)
        assert narrow_addresses(code.ttir) == [], f"{code}: a place is computed in 32 bits"
        assert "tf32" not in code.ttir + code.ptx
        if code.name in MATMULS:
            assert IN_PTX[capability] in code.ptx, f"{code} has no {IN_PTX[capability]}"
            assert_pipelined(code, 2, getattr(tiles, FIELDS.get(code.name, code.name)).stages)
            wide = narrow_addresses(code.ttir.replace("i64", "i32"))
            assert wide, f"{code}: had it been computed in 32 bits, nobody would have noticed"


def kernels_of_the_module() -> set[str]:
    """All that is not a part of another kernel. A new one is launched above, or fails there."""
    called = {
        node.func.id
        for node in ast.walk(ast.parse(inspect.getsource(kernels)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    jitted = {name for name, value in vars(kernels).items() if isinstance(value, triton.runtime.JITFunction)}
    return jitted - called


@cache
def bf16(capability: int) -> "dict[str, MachineCode]":
    with compile_for(capability) as compiled:
        forward_and_backward(N_TOKENS["many"], torch.bfloat16)
    return {code.name: code for code in compiled}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_machine_code_itself_holds_the_chips_matrix_instruction(capability):
    for name, code in bf16(capability).items():
        if name in MATMULS:
            assert code.instructions[TENSOR_CORE[capability]] > 0, f"{code}: {code.instructions}"
            assert code.tensor_core_instructions == code.instructions[TENSOR_CORE[capability]]
            assert code.spills == 0
    assert bf16(capability)["sum_of_choices"].tensor_core_instructions == 0


def test_sizes_that_no_block_divides_fit_into_registers_too():
    with compile_for(90) as compiled:
        forward_and_backward(N_TOKENS["many"], torch.bfloat16, 2047, 765)
    assert not {code.name for code in compiled} & set(BY_DESCRIPTORS.values())  # rows begin anywhere
    for code in different(compiled):
        assert_registers_suffice(code)
        assert code.shared_bytes <= MOST_SHARED[90]


def test_rows_that_begin_anywhere_fit_into_registers_too():
    rows = meta(2048, 2049, dtype=torch.bfloat16)[:, :2048]
    matrices = meta(4, 768, 2048, dtype=torch.bfloat16)
    with compile_for(90) as compiled:
        grouped_mm(rows, matrices, meta(4, dtype=torch.int32), "triton")
    assert [code.name for code in compiled] == ["plan_tiles", "grouped_product"]
    assert_registers_suffice(compiled[-1])


def test_fp32_is_exact_unless_torch_is_told_otherwise():
    def compiled(capability: int = 80) -> "MachineCode":
        with compile_for(capability) as found:
            grouped_mm(
                meta(64, 64, dtype=torch.float32), meta(2, 64, 64, dtype=torch.float32), meta(2, dtype=torch.int32),
                "triton",
            )  # fmt: skip
        return found[-1]

    exact = compiled()
    assert "tf32" not in exact.ttir + exact.ptx
    assert exact.tensor_core_instructions == 0  # which have no fp32
    assert exact.instructions["FFMA"] > 0
    torch.set_float32_matmul_precision("high")
    try:
        coarse = compiled()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert "inputPrecision = tf32" in coarse.ttir
    assert ".tf32" in coarse.ptx
    assert coarse.tensor_core_instructions > 0


def test_sizes_of_one_compile_too():
    """Triton turns a size of one into a constant, which is another type, and the interpreter does not."""
    with compile_for(90) as compiled:
        forward_and_backward(1, torch.bfloat16, 1, 1, 1, 1)
    assert {code.name for code in compiled} == kernels_of_the_module() - set(BY_DESCRIPTORS.values())


def test_everything_compiles_in_fp32():
    with compile_for(80) as compiled:
        forward_and_backward(N_TOKENS["many"], torch.float32, 256, 128)
    for code in different(compiled):
        assert_registers_suffice(code)
        assert_nothing_is_double_or_atomic(code)
        assert "tf32" not in code.ttir + code.ptx
        if code.name in MATMULS:
            assert_pipelined(code, 4)


def test_another_number_of_rows_does_not_compile_anew():
    """A decoder would stop for a second at every number of tokens it has not seen."""
    with compile_for(90) as compiled:
        for n_rows in (64, 80, 112, 208):  # multiples of 16, as sizes are; Triton makes a kernel of its own for others
            rows, matrices = meta(n_rows, 64, dtype=torch.bfloat16), meta(2, 64, 64, dtype=torch.bfloat16)
            grouped_mm(rows, matrices, meta(2, dtype=torch.int32), "triton")
    products = {code.cubin for code in compiled if code.name == "grouped_product_tma"}
    assert len(products) <= 2


# --- 64-bit places --------------------------------------------------------------------------------------------------


@cache
def places(change: tuple[str, str] | None) -> list[str]:
    """A small kernel's narrow addresses; its text may be changed."""
    return narrow_addresses(PLACES.replace(*change) if change else PLACES)


PLACES = """
tt.func public @f(%w: !tt.ptr<f16> loc("w"(#loc)), %stride: i32 loc(unknown), %N: i32 loc(unknown)) {
    %c64 = arith.constant 64 : i32
    %p = tt.get_program_id x : i32
    %wide = arith.extsi %p : i32 to i64
    %s = arith.extsi %stride : i32 to i64
    %at = arith.muli %wide, %s : i64
    %0 = tt.addptr %w, %at : !tt.ptr<f16>, i64
    %block = arith.muli %p, %c64 : i32
    %1 = tt.addptr %0, %block : !tt.ptr<f16>, i32
    %r = tt.make_range {end = 64 : i32, start = 0 : i32} : tensor<64xi32>
    %n = tt.splat %N : i32 -> tensor<64xi32>
    %inside = arith.muli %r, %n : tensor<64xi32>
    %2 = tt.addptr %1, %inside : !tt.ptr<f16>, tensor<64xi32>
}
"""


@pytest.mark.parametrize(
    ("change", "is_found"),
    [
        (None, False),
        (("arith.muli %wide, %s : i64", "arith.muli %p, %stride : i32"), True),
        (("arith.extsi %p : i32 to i64", "arith.muli %stride, %p : i32"), True),  # extended when it is too late
        (("arith.muli %p, %c64 : i32", "arith.muli %p, %N : i32"), True),
        (("arith.muli %r, %n : tensor", "arith.muli %wide, %n : tensor"), True),
    ],
)  # fmt: skip
def test_the_reading_of_addresses_finds_what_it_is_to_find(change, is_found):
    assert bool(places(change)) == is_found


# --- compile_for ----------------------------------------------------------------------------------------------------


@pytest.fixture
def driver() -> Iterator[object]:
    """What Triton has for a driver, which must be there again afterwards."""
    before, run = triton.runtime.driver._active, triton.runtime.JITFunction.run
    yield before
    assert triton.runtime.driver._active is before
    assert triton.runtime.JITFunction.run is run


def warm_up(top_k: int = 1) -> None:
    rows, y = meta(8, 16, dtype=torch.float32), meta(8, 16, dtype=torch.float32)
    kernels.sum_of_choices.warmup(rows, y, 16, TOP_K=top_k, BLOCK=16, grid=(8, 1))


def test_a_kernel_is_listed_every_time_it_is_asked_for(driver):
    with compile_for(80) as compiled:
        warm_up()
        warm_up()
        warm_up(2)
    assert [code.name for code in compiled] == 3 * ["sum_of_choices"]
    assert [code.constants["TOP_K"] for code in compiled] == [1, 1, 2]
    assert repr(compiled[0]) == "MachineCode(sum_of_choices, compute capability 8.0)"
    assert 0 < compiled[0].registers <= 255


def test_within_one_another_and_after_an_error_the_driver_is_the_one_before(driver):
    with compile_for(80) as outer:
        with compile_for(90) as inner:
            warm_up()
        with pytest.raises(ZeroDivisionError), compile_for(100):
            raise ZeroDivisionError
        assert triton.runtime.driver.active.get_current_target().arch == 80
        warm_up()
    assert inner[0].capability == 90
    assert outer[-1].capability == 80
    with pytest.raises(ZeroDivisionError), compile_for(100):
        raise ZeroDivisionError


def test_a_kernel_that_does_not_compile_says_so_and_the_next_one_does(driver):
    with compile_for(80) as compiled:
        with pytest.raises(Exception, match="BLOCK"):
            kernels.sum_of_choices.warmup(
                meta(8, 16, dtype=torch.float32), meta(8, 16, dtype=torch.float32), 16, TOP_K=1, grid=(8, 1)
            )
        warm_up()
    assert len(compiled) == 1


def test_nothing_is_launched_inside(driver):
    with compile_for(80), pytest.raises(RuntimeError, match=r"launched inside `compile_for`: give .* meta device"):
        kernels.sum_of_choices[(8, 1)](torch.zeros(8, 16), torch.zeros(8, 16), 16, TOP_K=1, BLOCK=16)


def test_reading_machine_code_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with compile_for(80) as compiled:
        warm_up()
    assert "EXIT" in compiled[0].instructions
    assert compiled[0].local_bytes == 0
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU to compile for")
def test_meta_tensors_without_a_chip_to_compile_for_are_refused(driver):
    with pytest.raises(ValueError, match=r"on the meta device: .*compile_for"):
        grouped_mm(
            meta(8, 16, dtype=torch.float32), meta(1, 16, 16, dtype=torch.float32), meta(1, dtype=torch.int32), "triton"
        )


def test_a_process_that_interprets_does_not_compile():
    code = "from moe_lab.ops.machine_code import compile_for\nwith compile_for(80): pass"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 1
    assert (
        "RuntimeError: This process runs kernels in Triton's interpreter (TRITON_INTERPRET=1): compile in another."
        in (done.stderr)
    )
