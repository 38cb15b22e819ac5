"""Looks at the machine the way the notebooks will use it, and says what works and what to do about the rest."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moe_lab.machine import interpreter_problem
from moe_lab.paths import CourseError, course_root

INSTALL_AGAIN = (
    "Delete the folder .venv and run `python course.py lab` again; in an environment of your own, "
    "run `python -m pip install -e .` in the course folder."
)
JUPYTER_PIECES = ("jupyterlab", "ipykernel", "ipywidgets", "nbval")
Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one look found and what to do. A `detail` (path, disk figure) stays out of notebooks, which get shared."""

    name: str
    status: Status
    says: str
    remedy: str = ""
    detail: str = ""


def diagnose() -> list[Finding]:
    """Every finding about this machine, the most basic first. What breaks while looked at is a finding as well."""
    findings = []
    for name, look in LOOKS.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                found = look()
        except CourseError as error:
            found = "problem", "cannot be looked at", "Start again from inside the course folder.", str(error)
        except Exception as error:
            found = "problem", f"does not work: {type(error).__name__}", INSTALL_AGAIN, str(error)
        findings.append(Finding(name, *found))
    return findings


def doctor() -> None:
    """Prints the findings for a notebook: without any path, host name or disk figure."""
    print(table(diagnose(), private=False))


def table(findings: list[Finding], private: bool = True) -> str:
    """The findings, aligned, each remedy beneath its finding; `private` adds the details."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        says = f"{finding.says} ({finding.detail})" if private and finding.detail else finding.says
        for text, label in ((says, f"{finding.status:<9}{finding.name:<{width}}  "), (finding.remedy, "")):
            label = label or " " * (9 + width) + "  -> "
            lines += textwrap.wrap(text, 112, initial_indent=label, subsequent_indent=" " * len(label))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`moe-lab doctor` has no options."""


def main(args: argparse.Namespace) -> int:
    """Prints every finding; returns 1 if one is a problem."""
    findings = diagnose()
    print(table(findings))
    return int(any(finding.status == "problem" for finding in findings))


# Each look returns a status, what it says, and where there is one the remedy and the private detail.
Found = tuple[Status, str] | tuple[Status, str, str] | tuple[Status, str, str, str]


def _python() -> Found:
    wanted = metadata.metadata("moe-lab")["Requires-Python"]
    says = f"{platform.python_version()}, {64 if sys.maxsize > 2**32 else 32}-bit"
    if SpecifierSet(wanted).contains(platform.python_version(), prereleases=True) and sys.maxsize > 2**32:
        return "ok", says
    return "problem", f"{says}; the course needs {wanted}, 64-bit", "Install such a Python and start it by name."


def _torch() -> Found:
    import torch

    matrix = torch.eye(2, requires_grad=True)
    (matrix @ matrix).sum().backward()
    if not torch.equal(matrix.grad, torch.full((2, 2), 2.0)):
        return "problem", f"{torch.__version__} computes a wrong gradient", INSTALL_AGAIN
    wanted = _wanted("torch")
    if not wanted.contains(torch.__version__, prereleases=True):
        return "note", f"{torch.__version__} works; the course was tested with {wanted}", INSTALL_AGAIN
    return "ok", f"{torch.__version__}; a product and its gradient are right"


def _triton() -> Found:
    if sys.platform != "linux":
        says = f"no package for {platform.system()}; notebook 08 alone uses it"
        return "note", says, "Nothing to do until then; for notebook 08, use Linux (on Windows, WSL)."
    try:
        # Not imported: Triton's interpreter has to be chosen before its first import in a process.
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "problem", "not installed", INSTALL_AGAIN
    if problem := interpreter_problem():
        return "note", problem, "Notebook 08 alone needs it; do as it says, or go on without."
    if _has_cuda():
        return "ok", f"{version}, compiles for the GPU"
    return "ok", f"{version}; without a GPU its interpreter runs the kernels, slower with the same results"


def _gpu() -> Found:
    if "torch" not in sys.modules:
        return "note", "unknown until PyTorch works"
    import torch

    if _has_cuda():
        cards = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return "ok", ", ".join(f"{card.name} with {card.total_memory / 2**30:.0f} GiB" for card in cards)
    if shutil.which("nvidia-smi"):
        remedy = "Run `python course.py lab --torch default`; if that does not help, update NVIDIA's driver."
        return "note", "this PyTorch does not use the NVIDIA GPU; every notebook has a CPU path", remedy
    return "ok", "none with CUDA, and none is needed: every notebook has a CPU path"


def _jupyter() -> Found:
    missing = [piece for piece in JUPYTER_PIECES if find_spec(piece) is None]  # importing them takes seconds
    if missing:
        return "problem", f"{' and '.join(missing)} not installed", INSTALL_AGAIN
    return "ok", ", ".join(f"{piece} {metadata.version(piece)}" for piece in JUPYTER_PIECES)


def _ranks() -> Found:
    """What notebook 07 needs to start its ranks as processes; where one of these is missing, it simulates them."""
    if "torch" not in sys.modules:
        return "note", "unknown until PyTorch works"
    import torch.distributed

    if find_spec("ipyparallel") is None:
        return "problem", "ipyparallel not installed", INSTALL_AGAIN
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return "note", "this PyTorch has no gloo; notebook 07 simulates its ranks", "There is nothing to do."
    return "ok", f"ipyparallel {metadata.version('ipyparallel')} and gloo, for ranks that are processes"


def _kernel() -> Found:
    from jupyter_client.kernelspec import KernelSpecManager

    python = KernelSpecManager().get_kernel_spec("python3").argv[0]
    generic = {"python", "python3", f"python3.{sys.version_info[1]}"}  # Jupyter puts its own interpreter for these
    if python in generic or Path(python).parent.resolve() == Path(sys.executable).parent.resolve():
        return "ok", "python3 runs this Python"
    remedy = "Start JupyterLab with `python course.py lab`, which prefers the environment's own kernel."
    return "problem", "python3 runs another Python than this one", remedy, python


def _package() -> Found:
    """Where a kernel gets moe_lab from: its working directory is the notebook's, and not on the course's folder."""
    root = course_root()
    code = "import moe_lab; print(moe_lab.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root / "notebooks", capture_output=True, text=True)
    if done.returncode != 0:
        return "problem", "a notebook cannot import moe_lab", INSTALL_AGAIN
    found = Path(done.stdout.strip()).resolve().parent
    if found == root / "moe_lab":
        return "ok", "notebooks import the moe_lab of this folder", "", str(root)
    remedy = "If you did not intend that, run `python -m pip install -e .` in the course folder."
    return "note", "notebooks import a moe_lab from another folder than this course's", remedy, str(found)


def _corpus() -> Found:
    from moe_lab.data import load_corpus

    try:
        corpus = load_corpus()
    except CourseError as error:
        return "problem", "cannot be read", "Bring the folder data/ back: `git restore data`.", str(error)
    size = sum(len(text) for split in (corpus.train, corpus.val) for text in split.values())
    return "ok", f"{size / 1e6:.1f} MB in {len(corpus.train)} domains, checksums right"


def _disk() -> Found:
    free = shutil.disk_usage(course_root()).free / 1e9
    status = "problem" if free < 0.2 else "note" if free < 2 else "ok"
    says = "enough room" if status == "ok" else "nearly full"
    return status, says, "" if status == "ok" else "Free some space, 2 GB or more.", f"{free:.1f} GB free"


def _progress() -> Found:
    root = course_root()
    folder = root / "progress" if (root / "progress").exists() else root
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        remedy = "Make the course folder yours to write to, or copy it to one that is."
        return "problem", "cannot be saved", remedy, str(error)
    return "ok", "can be saved", "", str(folder)


def _cores() -> Found:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch = sys.modules.get("torch")
    return "ok", f"{cores}" + (f"; PyTorch uses {torch.get_num_threads()} threads" if torch else "")


LOOKS = {
    "Python": _python,
    "PyTorch": _torch,
    "Triton": _triton,
    "GPU": _gpu,
    "Jupyter": _jupyter,
    "Ranks": _ranks,
    "Kernel": _kernel,
    "Package": _package,
    "Corpus": _corpus,
    "Progress": _progress,
    "Disk": _disk,
    "Cores": _cores,
}


def _wanted(package: str) -> SpecifierSet:
    """The versions of a package that the course asks for in pyproject.toml."""
    requirements = map(Requirement, metadata.requires("moe-lab") or ())
    return next(requirement.specifier for requirement in requirements if requirement.name == package)


def _has_cuda() -> bool:
    torch = sys.modules.get("torch")  # absent where it does not start, which is a finding already
    return bool(torch) and torch.cuda.is_available()
