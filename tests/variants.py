"""The variants of an operation, for tests that are repeated for each.

Without a GPU Triton's kernels run in its interpreter, which has to be chosen before Triton is first imported. So their
tests are marked `interpreted`, and run in a process of their own: `moe-lab test --only kernels`, or
`TRITON_INTERPRET=1 pytest -m interpreted`.
"""

import os

import pytest
import torch

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.interpreted


def each(table: dict, *more: str) -> list:
    """Parameters for `parametrize("impl", ...)`."""
    return [pytest.param(impl, marks=interpreted) if impl == "triton" else impl for impl in (*table, *more)]


def here(table: dict) -> list[str]:
    """The variants that run in this process, for a loop within a test."""
    return [impl for impl in table if INTERPRETS or impl != "triton"]


def skip_bf16_in_the_interpreter(impl: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The interpreter computes bf16 wrongly (and `moe_lab.ops` refuses it there); on a GPU it is tested."""
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bf16 wrongly; `moe-lab gpu` tests it")
