"""What this machine is: every recorded number says where it was measured."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    found = {"cpu": cpu, "system": platform.system(), "python": platform.python_version(), "torch": torch.__version__}
    if importlib.util.find_spec("transformers"):
        found["transformers"] = importlib.metadata.version("transformers")
    return found
