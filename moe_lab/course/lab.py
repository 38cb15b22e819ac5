"""`moe-lab lab`: a look at the machine, then JupyterLab at notebook 00, on this machine only and with a token."""

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from moe_lab.course.doctor import Finding, diagnose, table
from moe_lab.paths import CourseError, course_root

HOST = "127.0.0.1"
FIRST_PORT = 8888
START = "notebooks/00_start_here.ipynb"
SETTINGS = Path(__file__).parent / "jupyter"
NEEDED = {"PyTorch", "Jupyter", "Kernel"}  # a problem with one of these and no notebook runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `moe-lab lab`."""
    parser.add_argument("--no-browser", action="store_true", help="print the address, open nothing")
    parser.add_argument("--port", type=int, help=f"the port to use (otherwise the first free one from {FIRST_PORT})")


def main(args: argparse.Namespace) -> int:
    """Becomes JupyterLab, so that nothing stands between it and Ctrl-C; returns on Windows alone."""
    root = course_root()
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, not one of the same name elsewhere
    # The course's own settings: no question about news above the first notebook. The learner's files stay as they are.
    paths = [str(SETTINGS), *filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")])]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(paths)
    port = choose_port(args.port)
    print("Looking at this machine ...", flush=True)
    tell(diagnose())
    browser = not args.no_browser and has_browser(os.environ)
    os.environ["JUPYTER_TOKEN"] = token = secrets.token_hex(24)
    page = START if (root / START).exists() else "notebooks"
    print(f"\nMoE Lab opens at\n\n    http://{HOST}:{port}/lab/tree/{page}?token={token}\n")
    if not browser:
        print("Open this address in a browser on this machine, a few seconds from now. From another machine, first")
        print(f"run `ssh -L {port}:{HOST}:{port} NAME` there, NAME being this one's.")
    print("Ctrl-C here ends it.", flush=True)
    command = [sys.executable, "-m", "moe_lab.course.server", *options(root, port, page, browser)]
    if os.name == "nt":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches JupyterLab as well, which ends on it
        return subprocess.call(command)
    return os.execv(sys.executable, command)


def tell(findings: list[Finding]) -> None:
    """One line where all is well, else the problems.

    Raises:
        CourseError: with one of these problems no notebook would run.
    """
    problems = [finding for finding in findings if finding.status == "problem"]
    notes = [finding.name for finding in findings if finding.status == "note"]
    if problems:
        print(table(problems))
    else:
        print("All is well." if not notes else f"All is well, with a note on {' and '.join(notes)}: `moe-lab doctor`.")
    stopping = [problem.name for problem in problems if problem.name in NEEDED]
    if stopping:
        raise CourseError(f"JupyterLab was not started: first do what stands above for {' and '.join(stopping)}.")


def choose_port(asked: int | None) -> int:
    """The port that was asked for, or the first free one.

    Raises:
        CourseError: the port that was asked for cannot be had.
    """
    if asked is not None:
        trouble = why_not(asked)
        if trouble:
            raise CourseError(f"Port {asked} cannot be used ({trouble}): name another, or leave out --port.")
        return asked
    for port in range(FIRST_PORT, FIRST_PORT + 100):
        if not why_not(port):
            if port != FIRST_PORT:
                print(f"Port {FIRST_PORT} is in use, so this is port {port}.")
            return port
    raise CourseError(f"No port from {FIRST_PORT} to {FIRST_PORT + 99} is free: name one with --port.")


def why_not(port: int) -> str:
    """What keeps a server from listening on this port; empty where nothing does."""
    if not 0 < port < 2**16:
        return "ports go from 1 to 65535"
    with socket.socket() as probe:
        if os.name != "nt":  # as JupyterLab's own server does it; on Windows it would let two servers share a port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error.strerror
    return ""


def has_browser(environment: Mapping[str, str]) -> bool:
    """Whether a browser opened by this process would appear before the user."""
    if "SSH_CONNECTION" in environment:
        return False
    return sys.platform in ("darwin", "win32") or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def options(root: Path, port: int, page: str, browser: bool) -> list[str]:
    """JupyterLab's options: this machine only, this port or none, quiet, no news fetched, no question at Ctrl-C."""
    chosen = {
        "ServerApp.ip": HOST,
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": root,
        "ServerApp.open_browser": browser,
        "ServerApp.answer_yes": True,
        "ServerApp.allow_root": hasattr(os, "geteuid") and os.geteuid() == 0,
        "ServerApp.base_url": "/",
        "ServerApp.log_level": "ERROR",
        "LabApp.log_level": "ERROR",
        "LabApp.default_url": f"/lab/tree/{page}",
        "LabApp.news_url": None,
        "LabApp.check_for_updates_class": "jupyterlab.handlers.announcements.NeverCheckForUpdate",
    }
    return [f"--{name}={value}" for name, value in chosen.items()]
