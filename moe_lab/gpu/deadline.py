"""A plugin of pytest: tests that would begin too late are skipped, aloud, so that the others' results are kept."""

import os
import time

UNTIL = "MOE_LAB_GPU_TESTS_UNTIL"  # seconds since 1970


def pytest_runtest_setup() -> None:
    """Skip what comes after the deadline."""
    if time.time() > float(os.environ.get(UNTIL, "inf")):
        import pytest  # which the rest of the command does without

        pytest.skip("no time left")
