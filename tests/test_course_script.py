"""course.py: sets up once, says in one sentence what stops it, and recovers on the next run.

The set-ups are real (venv, pip, stamp), of a tiny course that builds itself without a network. `-S` hides the moe_lab
that is installed where these tests run.
"""

import ast
import http.server
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from functools import partial
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "course.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "moe-lab"
version = "0.1.0"
requires-python = ">=3.11,<3.15"
dependencies = [
    "torch>=2.11,<2.14",
]
"""
BACKEND = '''\
"""Makes wheels of the tiny course and of a tiny torch with nothing but the standard library."""
import os, zipfile

def wheel(folder, name, files, requires=""):
    info = f"{name}-2.12.0.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\\nName: {name}\\nVersion: 2.12.0\\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    record = "".join(f"{file},,\\n" for file in [*files, f"{info}/RECORD"])
    path = os.path.join(folder, f"{name}-2.12.0-py3-none-any.whl")
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in (files | {f"{info}/RECORD": record}).items():
            archive.writestr(file, text)
    return os.path.basename(path)

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    requires = "Requires-Dist: torch<2.14,>=2.11\\nProvides-Extra: test\\nRequires-Dist: tool; extra == 'test'\\n"
    return wheel(wheel_directory, "moe_lab", {"here.pth": os.getcwd()}, requires)

build_wheel = build_editable
'''
COMMAND = """\
import json, os, sys
print(json.dumps({"python": sys.executable, "arguments": sys.argv[1:], "folder": os.getcwd()}))
sys.exit(7 if "seven" in sys.argv else 0)
"""


class Site(http.server.SimpleHTTPRequestHandler):
    """A package index on this machine."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """The address of an index that holds a tiny torch 2.12.0 and a tiny tool for tests."""
    folder = tmp_path_factory.mktemp("index")
    backend = types.ModuleType("backend")
    exec(BACKEND, backend.__dict__)
    for package in ("torch", "tool"):
        (folder / package).mkdir()
        name = backend.wheel(folder / package, package, {f"{package}.py": ""})
        (folder / package / "index.html").write_text(f'<a href="{name}">{name}</a>')
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Site, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def nowhere():
    """An address on this machine at which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def tiny_course(folder: Path, cpu_index: str) -> Path:
    """A course with nothing in it; an egg-info lies there too, as after an editable installation."""
    (folder / "moe_lab").mkdir(parents=True)
    (folder / "moe_lab.egg-info").mkdir()
    (folder / "moe_lab.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: moe-lab\nVersion: 0.1.0\n")
    (folder / "moe_lab" / "__main__.py").write_text(COMMAND)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    assert CPU_INDEX in SOURCE
    (folder / "course.py").write_text(SOURCE.replace(CPU_INDEX, cpu_index), encoding="utf-8")
    return folder


def environment(index: str) -> dict[str, str]:
    hidden = {name for name in os.environ if name.startswith("PIP_")} | {"PYTHONPATH"}
    mine = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index, "PIP_RETRIES": "0"}
    return {name: value for name, value in os.environ.items() if name not in hidden} | mine


def run(course: Path, *arguments: str, index: str = "", python: list[str] | None = None):
    command = [*(python or [sys.executable, "-S"]), str(course / "course.py"), *arguments]
    return subprocess.run(command, env=environment(index), capture_output=True, text=True, timeout=300)


def told(done: subprocess.CompletedProcess) -> str:
    """What a failed run said last: one sentence and no traceback."""
    assert done.returncode == 1, done
    assert "Traceback" not in done.stdout + done.stderr
    return sentence(done.stderr.splitlines()[-1])


def sentence(text: str) -> str:
    assert "\n" not in text.strip()
    assert text.endswith(".")
    assert len(text) < 400
    return text


@pytest.fixture
def script():
    """course.py as a module of its own, whose names a test may replace."""
    spec = importlib.util.spec_from_file_location("course_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- What it is made of ---------------------------------------------------------------------------------------------


def test_python_3_6_can_read_it():
    tree = ast.parse(SOURCE, feature_version=(3, 6))
    with pytest.raises(SyntaxError):
        ast.parse("if found := 1: pass", feature_version=(3, 6))
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names - {"__future__", "tomllib"}


def test_it_is_short():
    assert len(SOURCE.splitlines()) < 150


# --- What can be wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "maxsize", "expected"),
    [
        ((3, 10), 2**63 - 1, "from 3.11 to 3.14"),
        ((2, 7), 2**63 - 1, "from 3.11 to 3.14"),
        ((3, 15), 2**63 - 1, "from 3.11 to 3.14"),
        ((3, 12), 2**31 - 1, "32-bit"),
    ],
)
def test_a_python_that_does_not_fit(script, version, maxsize, expected):
    script.sys = types.SimpleNamespace(version_info=version, maxsize=maxsize, exit=sys.exit)
    with pytest.raises(SystemExit) as stopped:
        script.check_python(PYPROJECT)
    assert expected in sentence(stopped.value.code)


@pytest.mark.parametrize("version", [(3, 11), (3, 14)])
def test_a_python_that_fits(script, version):
    script.sys = types.SimpleNamespace(version_info=version, maxsize=2**63 - 1, exit=sys.exit)
    script.check_python(PYPROJECT)


def test_the_range_is_that_of_the_real_project(script):
    project = (SCRIPT.parent / "pyproject.toml").read_text(encoding="utf-8")
    script.sys = types.SimpleNamespace(version_info=(3, 10), maxsize=2**63 - 1, exit=sys.exit)
    with pytest.raises(SystemExit, match=r"3\.11 to 3\.14"):
        script.check_python(project)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Error: [Errno 28] No space left on device: '/course/.venv'", "disk is full"),
        ("OSError: [WinError 112] There is not enough space on the disk", "disk is full"),
        ("Error: [Errno 13] Permission denied: '/course/.venv'", "cannot be written"),
        ("OSError: [Errno 30] Read-only file system: '/course/.venv/bin'", "cannot be written"),
        ("PermissionError: [WinError 5] Access is denied: 'python.exe'", "cannot be written"),
        ("... because ensurepip is not available.", "python3-venv"),
        ("Error: Command '['python', '-m', 'ensurepip']' returned non-zero exit status 1.", "python3-venv"),
        ("something\nImportError: the last line is told", "the last line is told"),
    ],
)
def test_a_step_that_fails_says_why(script, capfd, output, expected):
    with pytest.raises(SystemExit) as stopped:
        script.step("Making .venv", sys.executable, "-c", f"import sys; sys.exit({output!r})")
    assert expected in sentence(stopped.value.code)
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_fills_up_meanwhile(script, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1e6))
    with pytest.raises(SystemExit, match="disk is full"):
        script.step("Installing", sys.executable, "-c", "import sys; sys.exit('something else')")


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<HTTPSConnection object>",
            "network",
        ),
        ("after connection broken by 'SSLError(1, ...)'\nERROR: No matching distribution found for torch", "network"),
        ("ReadTimeoutError(HTTPSConnectionPool(host='x', port=443): Read timed out.", "network"),
        ("ERROR: Could not find a version\nERROR: No matching distribution found for torch", "no version fits"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("error: a compiler failed", "the reason stands above"),
    ],
)
def test_pips_log_says_why(script, tmp_path, log, expected):
    script.LOG = tmp_path / "pip.log"
    script.LOG.write_text("[Errno 28] No space left on device")  # of an earlier run; pip appends to its log
    write = f"import os, sys; open(os.environ['PIP_LOG'], 'a').write({log!r}); sys.exit(1)"
    with pytest.raises(SystemExit) as stopped:
        script.step("Installing", sys.executable, "-c", write, quiet=False)
    assert expected in sentence(stopped.value.code)


def test_a_full_disk(script, tmp_path, monkeypatch):
    script.ROOT = tmp_path
    for name in ("VENV", "PYTHON", "STAMP", "LOG"):
        setattr(script, name, tmp_path / ".venv" / name)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1.24e9))
    with pytest.raises(SystemExit) as stopped:
        script.set_up(PYPROJECT, "", "default")
    assert "1.2 GB" in sentence(stopped.value.code)
    assert not (tmp_path / ".venv").exists()


def test_a_folder_that_cannot_be_written(tmp_path, nowhere):
    course = tiny_course(tmp_path / "course", nowhere)
    course.chmod(0o555)
    try:
        (course / "probe").touch()
    except OSError:
        assert "cannot be written" in told(run(course, "doctor", "--torch", "default"))
    else:
        pytest.skip("this user may write everywhere; test_a_step_that_fails_says_why has the system's messages")
    finally:
        course.chmod(0o755)


def test_a_clone_that_is_not_complete(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    assert "complete clone" in told(run(tmp_path, "lab"))


def test_without_a_command_it_explains_itself(tmp_path, nowhere):
    course = tiny_course(tmp_path / "course", nowhere)
    assert "python course.py lab" in run(course).stdout
    assert run(course, "--help").stdout == run(course).stdout
    assert not (course / ".venv").exists()


def test_the_cpu_build_asked_for_and_not_to_be_had(tmp_path, nowhere):
    course = tiny_course(tmp_path / "course", nowhere)
    assert "does not answer" in told(run(course, "doctor", "--torch", "cpu"))
    assert not (course / ".venv").exists()


# --- Where PyTorch comes from ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "system", "nvidia", "answers", "expected", "said"),
    [
        ("auto", "linux", False, True, "cpu", "CPU build"),
        ("auto", "linux", False, False, "default", "does not answer"),
        ("auto", "linux", True, True, "default", ""),
        ("auto", "darwin", False, True, "default", ""),
        ("default", "linux", False, True, "default", ""),
        ("cpu", "win32", True, True, "cpu", "CPU build"),
    ],
)
def test_where_torch_comes_from(script, index, nowhere, capsys, asked, system, nvidia, answers, expected, said):
    script.CPU_INDEX = index if answers else nowhere
    script.sys = types.SimpleNamespace(platform=system, executable=sys.executable)
    script.os = types.SimpleNamespace(path=types.SimpleNamespace(exists=lambda path: nvidia))
    script.shutil = types.SimpleNamespace(which=lambda program: None)
    assert script.choose_torch(asked) == expected
    output = capsys.readouterr().out
    assert said in output
    assert bool(said) == bool(output)


def test_an_index_that_never_answers_costs_five_seconds(script, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        script.CPU_INDEX = f"http://127.0.0.1:{silent.getsockname()[1]}"
        script.sys = types.SimpleNamespace(platform="linux", executable=sys.executable)
        script.os = types.SimpleNamespace(path=types.SimpleNamespace(exists=lambda path: False))
        script.shutil = types.SimpleNamespace(which=lambda program: None)
        started = time.monotonic()
        assert script.choose_torch("auto") == "default"
        assert 4.5 < time.monotonic() - started < 20


# --- The life of one .venv ------------------------------------------------------------------------------------------


def test_the_life_of_an_environment(tmp_path, index, nowhere):
    course = tiny_course(tmp_path / "a course", index)
    venv, other = course / ".venv", tiny_course(tmp_path / "other", nowhere)

    # A run was killed before pip was there. The next one starts afresh, and takes torch from the index of CPU builds:
    # there is no other. Arguments and exit status pass through.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    done = run(course, "doctor", "seven", "--torch", "cpu", index=nowhere)
    assert done.returncode == 7, done
    assert "unfinished" in done.stdout
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["arguments"] == ["doctor", "seven"]
    assert Path(said["folder"]) == course
    assert Path(said["python"]).is_relative_to(venv)

    # From now on nothing is installed again.
    started = time.monotonic()
    assert_immediate(run(course, "doctor", index=nowhere))
    assert time.monotonic() - started < 3

    # Where the running Python has the course, it is used as it is, and no .venv is made.
    done = run(other, "lab", index=nowhere, python=[said["python"]])
    assert json.loads(done.stdout) == {"python": said["python"], "arguments": ["lab"], "folder": str(other)}
    assert not (other / ".venv").exists()

    # The tools for tests cannot come offline, but what worked still works; online they come, and serve the rest too.
    made = (venv / "pyvenv.cfg").stat().st_mtime_ns
    assert "network" in told(run(course, "test", index=nowhere))
    assert_immediate(run(course, "lab", index=nowhere))
    assert run(course, "test", index=index).returncode == 0
    assert_immediate(run(course, "test", index=nowhere))
    assert_immediate(run(course, "lab", index=nowhere))

    # A .venv made by hand holds the course and no stamp: it is kept.
    (venv / "moe-lab-setup.json").unlink()
    assert run(course, "doctor", index=index).returncode == 0
    assert (venv / "pyvenv.cfg").stat().st_mtime_ns == made

    # A torch that does not start is told with its reason, and the next run, here stopped by Ctrl-C, starts afresh.
    (torch,) = venv.rglob("site-packages/torch.py")
    torch.write_text("raise ImportError('libgomp is missing')")
    (course / "pyproject.toml").write_text(PYPROJECT + "# changed")
    assert "Starting PyTorch failed: ImportError: libgomp is missing" in told(run(course, "doctor", index=index))
    if os.name != "nt":  # where Ctrl-C goes to everything in the console, pytest included
        stopped = interrupt(course, index)
        assert "unfinished" in stopped.stdout
        assert told(stopped) == "Stopped. The same command goes on from here."


def assert_immediate(done: subprocess.CompletedProcess) -> None:
    """Nothing was said but by the command itself, which says one line."""
    assert done.returncode == 0, done
    assert len(done.stdout.splitlines()) == 1


def interrupt(course: Path, index: str) -> subprocess.CompletedProcess:
    """A run that gets Ctrl-C, with all its children as at a terminal, while it makes the environment."""
    command = [sys.executable, "-S", str(course / "course.py"), "doctor"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    # A shell lets what it starts in the background ignore Ctrl-C, and children inherit that: not so at a terminal.
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, env=environment(index), **how) as process:
        started = next(line for line in process.stdout if "making" in line.lower())
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, started + output, errors)
