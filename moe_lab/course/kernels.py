"""How the builder and the suite start their kernels: alike, and apart from the user's own set-up."""

import os
import tempfile
import uuid
from pathlib import Path

NOT_PASSED_ON = (
    "JPY_SESSION_NAME",  # says that a learner sits at the kernel, whose progress counts
    "MPLBACKEND",
    "PYTEST_ADDOPTS",
    "PYTHONWARNINGS",
)

LONGEST_PATH = 96  # macOS allows 104 bytes for a socket's path, of which `-ipc-1` and the like need a few


def kernel_environment(scratch: Path) -> dict[str, str]:
    """The environment variables of such a kernel: one thread, and nothing of the user's IPython."""
    passed_on = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    return passed_on | {
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(scratch / "ipython"),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # gloo warns about host names that do not resolve
    }


def kernel_sockets() -> dict[str, str]:
    """The options of a KernelManager that let its kernel talk over files, where the system can.

    Free TCP ports are picked before the kernel binds them, so two kernels started at once can pick the same one: the
    client then waits for ever, or hears the wrong kernel. It happened in one start of 150, with three at a time.
    """
    connection_file = os.path.join(tempfile.gettempdir(), f"moe-lab-{uuid.uuid4().hex[:12]}.json")
    if os.name != "posix" or len(connection_file) > LONGEST_PATH:
        return {}
    return {"transport": "ipc", "connection_file": connection_file}
