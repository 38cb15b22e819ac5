"""What this machine is: every recorded number says where it was measured."""

import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path


def interpreter_problem() -> str:
    """Why Triton's interpreter cannot work here, in a sentence, or ""."""
    versions = {}
    for package in ("triton", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""
    triton, numpy = (tuple(int(part) for part in re.findall(r"\d+", text)[:2]) for text in versions.values())
    if triton >= (3, 7) or numpy < (2, 4):
        return ""
    told = "the interpreter of Triton {triton} does not work with NumPy {numpy}".format(**versions)
    return f"{told}: install a newer PyTorch, or `pip install 'numpy<2.4'`"


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    import torch

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
