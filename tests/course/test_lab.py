"""`moe-lab lab`: a real JupyterLab on this machine alone, behind its token, that leaves nothing behind."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from moe_lab.course import lab
from moe_lab.course.doctor import Finding
from moe_lab.paths import CourseError, course_root

# --- The port -------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.create_server((lab.HOST, 0)) as other:
        yield other.getsockname()[1]


def test_a_port_in_use_is_told_in_one_sentence(taken):
    with pytest.raises(
        CourseError, match=rf"^Port {taken} cannot be used \(.+\): name another, or leave out --port\.$"
    ):
        lab.choose_port(taken)


def test_without_a_wish_the_next_free_port_is_taken(taken, monkeypatch, capsys):
    monkeypatch.setattr(lab, "FIRST_PORT", taken)
    port = lab.choose_port(None)
    assert taken < port < taken + 100
    assert capsys.readouterr().out == f"Port {taken} is in use, so this is port {port}.\n"


@pytest.mark.parametrize("port", [-1, 0, 65536, 10**12])
def test_a_port_that_cannot_be(port):
    with pytest.raises(CourseError, match="from 1 to 65535"):
        lab.choose_port(port)


def test_no_port_at_all(monkeypatch):
    monkeypatch.setattr(lab, "why_not", lambda port: "in use")
    with pytest.raises(CourseError, match="8888 to 8987"):
        lab.choose_port(None)


# --- What is said before --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "environment", "expected"),
    [
        ("linux", {}, False),
        ("linux", {"DISPLAY": ":0"}, True),
        ("linux", {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ("linux", {"DISPLAY": ":10", "SSH_CONNECTION": "a b c d"}, False),
        ("darwin", {}, True),
        ("darwin", {"SSH_CONNECTION": "a b c d"}, False),
        ("win32", {}, True),
    ],
)
def test_whether_a_browser_would_be_seen(monkeypatch, system, environment, expected):
    monkeypatch.setattr(sys, "platform", system)
    assert lab.has_browser(environment) is expected


def test_one_line_where_all_is_well(capsys):
    lab.tell([Finding("Python", "ok", "3.12")])
    assert capsys.readouterr().out == "All is well.\n"


def test_a_note_is_mentioned(capsys):
    lab.tell([Finding("Triton", "note", "no package", "Use Linux.")])
    assert capsys.readouterr().out == "All is well, with a note on Triton: `moe-lab doctor`.\n"


def test_a_problem_is_told_and_may_be_lived_with(capsys):
    lab.tell([Finding("Disk", "problem", "nearly full", "Free some space.")])
    assert "-> Free some space." in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(lab.NEEDED))
def test_without_these_there_is_no_lab(name, capsys):
    with pytest.raises(CourseError, match=f"first do what stands above for {name}"):
        lab.tell([Finding(name, "problem", "broken", "Mend it.")])
    assert "-> Mend it." in capsys.readouterr().out


@pytest.mark.parametrize("no_browser", [False, True])
def test_what_is_started(monkeypatch, capsys, no_browser):
    commands = []
    monkeypatch.setattr(lab, "diagnose", lambda: [Finding("Python", "ok", "3.12")])
    monkeypatch.setattr(lab, "has_browser", lambda environment: True)
    monkeypatch.setattr(os, "execv", lambda python, command: commands.append(command))
    monkeypatch.setattr(lab.subprocess, "call", lambda command: commands.append(command))
    monkeypatch.setattr(lab.signal, "signal", lambda *_: None)  # on Windows: else later tests could not be stopped
    monkeypatch.setenv("JUPYTER_TOKEN", "kept by monkeypatch")
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "kept by monkeypatch")
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "a learner's own")
    lab.main(argparse.Namespace(port=None, no_browser=no_browser))
    said, command = capsys.readouterr().out, commands[0]
    token = os.environ["JUPYTER_TOKEN"]
    assert os.environ["JUPYTER_CONFIG_PATH"] == os.pathsep.join([str(lab.SETTINGS), "a learner's own"])
    assert len(token) == 48
    assert f"?token={token}\n" in said
    assert token not in " ".join(command)  # every user of the machine can read it there
    assert ("ssh -L" in said) is no_browser
    assert f"--ServerApp.open_browser={not no_browser}" in command
    assert "--ServerApp.ip=127.0.0.1" in command
    assert f"--ServerApp.allow_root={hasattr(os, 'geteuid') and os.geteuid() == 0}" in command


# --- The server -----------------------------------------------------------------------------------------------------


# What a learner may have in their own settings; none of it may count here.
OPEN_TO_ALL = """
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.token = ""
c.IdentityProvider.token = ""
c.ServerApp.open_browser = False
c.ServerApp.base_url = "/elsewhere/"
"""


@contextmanager
def running(folder: Path, stdin: int = subprocess.DEVNULL, **variables) -> Iterator[tuple[subprocess.Popen, str]]:
    """`moe-lab lab` with settings of its own in `folder`, and the address that it printed."""
    mine = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    mine |= {f"JUPYTERLAB_{name}_DIR": str(folder / name) for name in ("SETTINGS", "WORKSPACES")}
    environment = {name: value for name, value in os.environ.items() if name != "SSH_CONNECTION"} | mine | variables
    (folder / "CONFIG").mkdir()
    (folder / "CONFIG" / "jupyter_server_config.py").write_text(OPEN_TO_ALL)
    command = [sys.executable, "-m", "moe_lab", "lab"]
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, cwd=course_root(), **pipes) as process:
        try:
            yield process, next(line.strip() for line in process.stdout if "token=" in line)
        finally:
            left = children(process)
            process.kill()
            for child in left:
                with suppress(psutil.NoSuchProcess):
                    child.kill()


def children(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


def command_line(process: psutil.Process) -> list[str]:
    """How a process was started; empty if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def get(address: str, **options) -> tuple[int, str]:
    """Status and final address of a page, as soon as the server is up."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(address, **options), timeout=30) as answer:
                return answer.status, answer.url
        except urllib.error.HTTPError as error:
            return error.code, error.url
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_a_real_server(tmp_path):
    seen = tmp_path / "seen by the browser"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > "{seen}"\n')
    browser.chmod(0o755)
    with running(tmp_path, DISPLAY=":99", BROWSER=str(browser)) as (process, address):
        page, _, token = address.partition("?token=")
        site = page[: page.index("/lab/")]
        assert site.startswith("http://127.0.0.1:")
        assert page.endswith(("/lab/tree/notebooks/00_start_here.ipynb", "/lab/tree/notebooks"))

        # With the token all is open; without it, or with another, only the page that asks for it.
        assert get(address) == (200, address)
        for wrong in (page, f"{page}?token=", f"{page}?token={token[:-1]}"):
            assert "/login?" in get(wrong)[1]
        assert get(f"{site}/api/contents")[0] == 403
        assert get(f"{site}/api/contents?token={token}")[0] == 200

        # On this machine alone, in the course's folder, in the environment's own kernel.
        (info,) = (tmp_path / "RUNTIME").glob("jpserver-*.json")
        told = json.loads(info.read_text())
        assert (told["hostname"], told["base_url"], told["token"]) == ("127.0.0.1", "/", token)
        assert Path(told["root_dir"]) == course_root()
        if sys.platform == "linux":
            with socket.socket() as other:  # refused if the server listened on every address
                other.bind(("127.0.0.2", told["port"]))
        assert get(f"{site}/api/kernels?token={token}", method="POST", data=b'{"name": "python3"}')[0] == 201
        (python,) = [line[0] for line in map(command_line, children(process)) if "ipykernel_launcher" in line]
        assert Path(python).parent == Path(sys.executable).parent

        if os.name != "nt":
            # A browser was opened, at a page that leads to the course without showing the token to other users.
            assert seen.read_text().startswith("file://")
            assert token not in seen.read_text()

            # Ctrl-C is enough: no question, no process left.
            left = children(process)
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            assert "Shut down this Jupyter server" not in said, said
            assert not any(map(command_line, left))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals for this")
def test_ctrl_c_at_a_terminal_asks_nothing(tmp_path):
    terminal, stdin = os.openpty()
    with running(tmp_path, stdin) as (process, address):
        get(address)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Shutting down" in said
    assert "Shut down this Jupyter server" not in said, said
    for end in (terminal, stdin):
        os.close(end)
