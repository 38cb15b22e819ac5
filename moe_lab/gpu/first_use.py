"""A process of its own that asks: with every kernel compiled, how long does the first forward and backward take?

Prints the seconds and how many kernels had to be compiled after all.
"""

import time

import torch

from moe_lab.gpu.candidates import FUSED, fused, make_inputs, passes
from moe_lab.gpu.floors import QWEN3
from moe_lab.gpu.measure import compilation, wait


def main() -> None:
    """Before the clock starts, the GPU and torch's own kernels are up; Triton and our kernels are not."""
    inputs = make_inputs(QWEN3[-1], "balanced", "cuda", torch.bfloat16, n_sets=1)
    inputs.plan(0)
    torch.zeros(2, 8, device="cuda").sum(0)
    run = passes(inputs, {FUSED: fused(inputs)}, backward=True)[FUSED]
    wait("cuda")
    start = time.perf_counter()
    with compilation() as told:
        run(0)
        wait("cuda")
    print(time.perf_counter() - start, told["n_compiled"])


if __name__ == "__main__":
    main()
