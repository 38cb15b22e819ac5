"""Sets up MoE Lab in this folder and runs it; needs nothing but Python.

    python course.py lab       opens the course in JupyterLab
    python course.py test      runs lint, all tests (also of kernels, and in a browser) and every notebook
    python course.py doctor    says what works on this machine, and what to do about the rest

Any other `moe-lab` command works too. `--torch cpu` takes PyTorch's CPU build, `--torch default` whatever pip
chooses. Without it, Linux without an NVIDIA driver gets the CPU build wherever PyTorch's index answers.
"""
# Kept readable by Python 3.6, so that a Python that is too old can still say what it needs.

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "moe-lab-setup.json"  # what was installed, for which Python and folder
LOG = VENV / "pip.log"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CAUSES = {  # what a failed step leaves in its output or log, and what that means; the first that fits is told
    "No space left|Errno 28|not enough space|quota exceeded": "the disk is full; free some space",
    "(Permission|is) denied|Read-only": "this folder cannot be written; close what uses it or move it to where you may",
    "HTTPS?Connection|[Cc]onnection broken|timed out": "the network is missing or broke off; check it and the proxy",
    "No matching distribution": "no version fits this machine; PyTorch wants 64-bit Linux, Windows or Apple silicon",
    "ensurepip": "this Python cannot make environments; on Debian or Ubuntu run `sudo apt install python3-venv`",
}


def check_python(project):
    low, high = map(int, re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project).groups())
    bits = 64 if sys.maxsize > 2**32 else 32
    if not (3, low) <= sys.version_info[:2] < (3, high) or bits == 32:
        sys.exit(
            f"MoE Lab needs a 64-bit Python from 3.{low} to 3.{high - 1}, and this is {platform.python_version()} "
            f"({bits}-bit): get one from python.org and say `python3.{low} course.py lab` (Windows: `py -3.{low} ...`)."
        )


def is_installed_here():
    """Whether the running Python has moe_lab (conda, Binder, a hub); what lies beside this script is no proof of it."""
    from importlib import metadata

    path = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    return any(metadata.distributions(name="moe-lab", path=path))


def choose_torch(asked):
    """Where PyTorch comes from: "cpu" for PyTorch's own index of CPU builds, "default" for pip's ordinary source."""
    nvidia = os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi")
    if asked == "default" or (asked == "auto" and (sys.platform != "linux" or nvidia)):
        return "default"
    fetch = f"import urllib.request as request; request.urlopen('{CPU_INDEX}/torch/')"
    try:  # in a process of its own, because looking up a name heeds no time limit
        subprocess.run([sys.executable, "-c", fetch], timeout=5, check=True, capture_output=True)
    except subprocess.SubprocessError:
        if asked == "cpu":
            sys.exit(f"{CPU_INDEX} does not answer: check the network, or leave out `--torch cpu`.")
        print(f"{CPU_INDEX} does not answer: PyTorch comes from pip's ordinary source, perhaps with gigabytes of CUDA.")
        return "default"
    print(f"PyTorch comes as its CPU build from {CPU_INDEX} (`--torch default` takes pip's ordinary source).")
    return "cpu"


def step(name, *command, quiet=True):
    """Runs one step of the set-up; a failure is told in one sentence."""
    LOG.unlink(missing_ok=True)
    environment = dict(os.environ, PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_LOG=str(LOG))
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=quiet, text=True, env=environment)
    if done.returncode != 0:
        text = done.stdout + done.stderr if quiet else LOG.read_text("utf-8", "replace") if LOG.exists() else ""
        if shutil.disk_usage(ROOT).free < 50e6:  # then even the log may lack the reason
            text = "No space left"
        reason = text.strip().split("\n")[-1] if quiet else "the reason stands above"
        cause = next((CAUSES[mark] for mark in CAUSES if re.search(mark, text)), reason)
        sys.exit(f"{name} failed: {cause}, then run the same command again.")


def set_up(project, extra, asked):
    """Makes .venv what the command needs; where the stamp of an earlier run says that it is, nothing is done."""
    try:
        old = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        old = {}
    home = f"Python {sys.version_info[:2]} {platform.machine()} in {ROOT}"
    fits = old.get("home") == home and asked in ("auto", old["torch"]) and PYTHON.exists()
    digest = hashlib.sha256(project.encode()).hexdigest()
    new = {"project": digest, "home": home, "extra": extra or old.get("extra", "")}
    if fits and new.items() <= old.items():
        return
    # A killed run leaves no moe_lab, or not even pip. An environment made by hand has both and no stamp: it is kept.
    proof = [PYTHON, "-c", "import pip; from importlib.metadata import version; version('moe-lab')"]
    usable = fits or (PYTHON.exists() and not STAMP.exists())
    usable = usable and subprocess.run(proof, cwd=VENV, capture_output=True).returncode == 0
    torch = (usable and old.get("torch")) or choose_torch(asked)
    needed = 1 if usable else 8 if (sys.platform, torch) == ("linux", "default") else 3
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < needed:
        sys.exit(f"Setting up needs about {needed} GB of disk, and {ROOT} has {free:.1f} GB free: free some space.")
    if not usable:
        print("The .venv here is unfinished or of another kind: making it anew." if VENV.exists() else "Making .venv.")
        step("Making .venv", sys.executable, "-m", "venv", "--clear", VENV)
    install = [PYTHON, "-m", "pip", "install"]
    if torch == "cpu":
        requirement = re.search('"(torch[<>=~][^"]*)"', project).group(1)
        step("Installing PyTorch", *install, requirement, "--index-url", CPU_INDEX, quiet=False)
    step("Installing MoE Lab", *install, "-e", "." + new["extra"], quiet=False)
    STAMP.write_text("{}")  # whatever was here before counts no more, should PyTorch not start
    step("Starting PyTorch", PYTHON, "-c", "import torch")
    STAMP.write_text(json.dumps({**new, "torch": torch}))


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        return print(__doc__)
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    check_python(project)
    sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(prog="course.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--torch", choices=("auto", "cpu", "default"), default="auto")
    options, rest = parser.parse_known_args(arguments)
    python = sys.executable
    if not is_installed_here() or (Path(sys.prefix).resolve() == VENV and STAMP.exists()):
        set_up(project, "[test]" if rest[:1] == ["test"] else "", options.torch)
        python = PYTHON
    os.chdir(ROOT)
    command = [python, "-m", "moe_lab", *rest]
    if os.name != "nt":
        os.execv(python, command)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command too, which ends in its own way
    return subprocess.call(command)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from here.")
    except OSError as error:
        sys.exit(f"{error}: MoE Lab needs a complete clone in a folder that you may write to; then try again.")
