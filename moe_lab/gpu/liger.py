"""Liger's fused MoE as a fair opponent: tuned by its own list of 240 configurations, which take minutes to compile.

So processes of their own compile them while the tests run (`start`), and tuning finds them in Triton's cache. Liger
tunes for each D and F anew; that is done for the first shape alone, and the others take what won there (`settle`).
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from moe_lab.bench.layers import Shape
from moe_lab.gpu.floors import QWEN3
from moe_lab.gpu.measure import Run, compilation
from moe_lab.paths import course_root

MOST_PROCESSES = 10
ROUTING_KERNELS = 3  # which are not tuned, and not compiled ahead


def kernels() -> dict[str, Any]:
    """Liger's tuned kernels by name."""
    from triton.runtime.autotuner import Autotuner

    module = importlib.import_module("liger_kernel.ops.fused_moe_kernels")
    return {name: value for name, value in vars(module).items() if isinstance(value, Autotuner)}


def start(capability: int) -> list[subprocess.Popen]:
    """Processes that compile everything for this GPU; none where Liger is not installed or there are few cores."""
    cores = os.cpu_count() or 1
    n_processes = min(MOST_PROCESSES, cores - 4)
    if n_processes < 2 or importlib.util.find_spec("liger_kernel") is None:
        return []
    command = [sys.executable, "-m", "moe_lab.gpu.liger"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [
        subprocess.Popen([*command, str(i), str(n_processes), str(capability)], cwd=course_root(), **quiet)
        for i in range(n_processes)
    ]


def finish(processes: list[subprocess.Popen], seconds: float) -> bool:
    """Wait for all of them, that long at most; whether all came to their end."""
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return bool(processes) and all(process.returncode == 0 for process in processes)


def prepare(is_compiled: bool, run: Run) -> str:
    """Before the first call: leave Liger its list if all of it is compiled, or else one configuration each.

    Args:
        run: forward and backward; with one configuration each it shows whether what was compiled is found.

    Returns:
        What was done, for the record.
    """
    tuned = kernels()
    lists = {name: kernel.configs for name, kernel in tuned.items()}
    for kernel in tuned.values():
        kernel.configs = _fixed(kernel)
    if not is_compiled:
        return "one configuration for each kernel, as with LIGER_FUSED_MOE_AUTOTUNE=0: its list was not compiled ahead"
    with compilation() as told:
        run(0)
    if told["n_compiled"] > ROUTING_KERNELS:
        return "one configuration for each kernel, as with LIGER_FUSED_MOE_AUTOTUNE=0: tuning would have taken minutes"
    for name, kernel in tuned.items():
        kernel.configs = lists[name]
    return f"tuned by its own list, {sum(map(len, lists.values()))} configurations, at the first shape"


def settle() -> None:
    """From now on every kernel has the configuration that won."""
    for kernel in kernels().values():
        kernel.configs = [getattr(kernel, "best_config", None) or _fixed(kernel)[0]]


def _fixed(kernel: Any) -> list[Any]:
    """The configuration that Liger 0.8.5 takes where it is told not to tune; where there is none like it, the first."""
    sizes = kernel.configs[0].kwargs
    if "BLOCK_H" in sizes:
        wanted, warps = {"BLOCK_H": 128, "BLOCK_K": 4}, 4
    elif "BLOCK_M" in sizes:
        wanted, warps = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}, 8
    else:
        wanted, warps = {"BLOCK_N": 128, "BLOCK_K": 64}, 8
    fits = [c for c in kernel.configs if c.kwargs == wanted and c.num_warps == warps]  # the first has the fewest stages
    return fits[:1] or kernel.configs[:1]


def compile_share(which: int, n_processes: int, capability: int, shape: Shape = QWEN3[-1]) -> int:
    """Compile every n-th configuration of every kernel, forward and backward, as calls at this shape will ask for them.

    Returns:
        How many.
    """
    from triton.runtime.autotuner import Autotuner

    from moe_lab.ops.machine_code import compile_for

    module = importlib.import_module("liger_kernel.ops.fused_moe")

    def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    n_rows, n_experts = shape.n_tokens * shape.top_k, shape.n_experts

    def routed(chosen: Tensor, *_: Any) -> tuple[Tensor, ...]:
        sizes = (n_experts, n_experts + 1, n_rows, n_rows, n_rows, n_rows, n_rows)
        return tuple(empty(size, dtype=torch.int32) for size in sizes)

    n_compiled = 0

    def compile_mine(self: Autotuner, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        nonlocal n_compiled
        for config in self.configs[which::n_processes]:
            self.fn.warmup(*args, grid=grid, **kwargs, **config.all_kwargs())
            n_compiled += 1

    module.compute_routing_metadata = routed
    Autotuner.run = compile_mine
    x, chosen = empty(shape.n_tokens, shape.d_model), empty(shape.n_tokens, shape.top_k, dtype=torch.int32)
    w_in, w_down = empty(n_experts, 2 * shape.d_ff, shape.d_model), empty(n_experts, shape.d_model, shape.d_ff)
    weights = empty(shape.n_tokens, shape.top_k, dtype=torch.float32)
    tensors = [tensor.requires_grad_() for tensor in (x, w_in, w_down, weights)]
    with compile_for(capability):
        y = module.LigerFusedMoEFunction.apply(x, w_in, w_down, chosen, weights)
        torch.autograd.grad(y, tensors, torch.empty_like(y))
    return n_compiled


if __name__ == "__main__":
    compile_share(*map(int, sys.argv[1:]))
