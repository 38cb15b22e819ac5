"""Keeps tests of Triton's kernels and all other tests in processes of their own."""

import importlib.util

import pytest
from variants import INTERPRETS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what would need the interpreter in a process without it."""
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "there is no Triton for this system"
    elif not INTERPRETS:
        reason = "needs Triton's interpreter: TRITON_INTERPRET=1 (`moe-lab test --only kernels`)"
    for item in items:
        if reason and item.get_closest_marker("interpreted"):
            item.add_marker(pytest.mark.skip(reason=reason))
