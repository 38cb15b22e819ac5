"""The processes of a cluster, and the warden that lets none of them outlive the notebook.

The warden is their parent, and holds the reading end of a pipe whose writing end only the notebook's process has. It
does nothing but wait for that pipe to close, which it does however that process ends, SIGKILL included. Then the
warden kills its children and theirs, removes their folder, and goes. They watch it, too, in case it is killed.

It also makes the start quick: on Linux it imports torch once, and the engines are forked from it.
"""

import gc
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTROLLER = -1
"""What stands for the controller among the numbers of the engines."""
SECONDS_TO_END = 3.0
LONGEST_SOCKET_PATH = 103  # bytes, on macOS; Linux allows a few more
FORKS = sys.platform == "linux"  # macOS' own libraries do not survive a fork, and Windows has none
LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class Warden:
    """The notebook's end: starts a warden with a controller and engines, and hears how they do.

    Args:
        n_engines: how many engines.

    Raises:
        OSError: no process can be started, or no folder made.
    """

    def __init__(self, n_engines: int) -> None:
        self.pids: dict[int, int] = {}  # empty until all were started
        self.ended: dict[int, str] = {}  # how the process of an engine, or the controller's, ended
        self.failure = ""
        self.folder = _private_folder()
        try:
            with open(self.folder / "log", "w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", f"from {__name__} import keep; keep()", str(self.folder), str(n_engines)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self._environment(),
                    start_new_session=True,  # an interrupt of the kernel goes to its whole process group
                )
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        threading.Thread(target=self._listen, daemon=True, name="warden").start()

    @property
    def connection_file(self) -> Path:
        """What a client of the cluster needs."""
        return self.folder / "profile" / "security" / "ipcontroller-client.json"

    def trouble(self) -> str:
        """What is wrong with the processes; "" if nothing is."""
        if self.failure:
            return self.failure
        if self._process.poll() is not None:
            return f"the warden of the cluster {_how_it_ended(self._process.returncode)}{self._last_words()}"
        for number, how in self.ended.items():
            name = "the controller of the cluster" if number == CONTROLLER else f"the process of rank {number}"
            return f"{name} {how}{self._last_words()}"
        return ""

    def has_lost(self, number: int) -> bool:
        """Whether nothing can come from an engine any more."""
        return bool({number, CONTROLLER} & self.ended.keys()) or self._process.poll() is not None

    def interrupt(self, numbers: Iterable[int]) -> bool:
        """Interrupt engines, as Ctrl-C does; False where that cannot be done."""
        if os.name != "posix":
            return False
        for number in numbers:
            with suppress(ProcessLookupError):
                os.kill(self.pids[number], signal.SIGINT)
        return True

    def end(self) -> None:
        """End all processes and remove their folder. Does no harm a second time."""
        self._process.stdin.close()
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:  # it hangs in an import, perhaps
            _kill_group(self._process.pid)
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        ours = {
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # gloo warns about host names that do not resolve
            "IPYTHONDIR": str(self.folder / "ipython"),
        }
        if sys.platform in LOOPBACK:
            ours["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
        return {name: value for name, value in os.environ.items() if not name.startswith("IPP_")} | ours

    def _listen(self) -> None:
        with suppress(ValueError):  # the notebook's process ends while we read
            for line in self._process.stdout:
                told = json.loads(line)
                self.failure = self.failure or told.get("failure", "")
                self.ended |= {int(number): how for number, how in told.get("ended", {}).items()}
                self.pids |= {int(number): pid for number, pid in told.get("pids", {}).items()}

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = (self.folder / "log").read_text(errors="replace").strip().splitlines()
            errors = [line for line in lines if "Error" in line]
            return f" ({errors[-1].strip()[:300]})" if errors else ""
        return ""


def _private_folder() -> Path:
    """A new folder that nobody else can read; its path is short enough for sockets, where that can be had."""
    places = [tempfile.gettempdir(), "/tmp"] if os.name == "posix" else [None]
    for place in places:
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="moe-lab-", dir=place))
            if _has_room_for_sockets(folder) or place == places[-1]:
                return folder
            folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="moe-lab-"))


def _has_room_for_sockets(folder: Path) -> bool:
    return os.name == "posix" and len(os.fsencode(folder / "s:65535")) <= LONGEST_SOCKET_PATH


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _kill_group(group: int) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


# --- In the warden's process ---------------------------------------------------------------------------------------


def keep() -> None:
    """What the warden does. Called with the cluster's folder and the number of engines as its arguments."""
    folder, n_engines = Path(sys.argv[1]), int(sys.argv[2])
    notebook = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed by mistake goes to the log
    processes: dict[int, BaseProcess] = {}

    def tell(**what: object) -> None:
        with suppress(OSError):
            print(json.dumps(what), file=notebook, flush=True)

    def watch() -> None:
        waits = {process.sentinel: number for number, process in processes.items()}
        while waits:
            for sentinel in multiprocessing.connection.wait(list(waits)):
                number = waits.pop(sentinel)
                processes[number].join()
                tell(ended={number: _how_it_ended(processes[number].exitcode)})

    try:
        _start(folder, n_engines, processes)
        threading.Thread(target=watch, daemon=True).start()
        tell(pids={number: process.pid for number, process in processes.items()})
    except Exception as error:
        traceback.print_exc()
        tell(failure=f"{type(error).__name__}: {error}")
    sys.stdin.read()  # until the notebook's process closes the pipe, or ends
    for process in processes.values():
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    _kill_group(0)  # what the engines may have started, and this process


def _start(folder: Path, n_engines: int, processes: dict[int, BaseProcess]) -> None:
    context = multiprocessing.get_context("fork" if FORKS else "spawn")
    processes[CONTROLLER] = context.Process(target=_controller, args=(folder,))
    processes[CONTROLLER].start()
    sys.modules["debugpy"] = None  # engines need no debugger, and to import it takes them a second
    if FORKS:
        for module in ("moe_lab.course.rank_cells", "ipyparallel.engine.app"):  # once, for all engines
            importlib.import_module(module)
        gc.freeze()  # what the engines share stays shared, and is not looked through again and again
    while not _is_written(folder / "profile" / "security" / "ipcontroller-engine.json"):
        if not processes[CONTROLLER].is_alive():
            raise RuntimeError(f"the controller {_how_it_ended(processes[CONTROLLER].exitcode)}")
        time.sleep(0.02)
    for number in range(n_engines):
        processes[number] = context.Process(target=_engine, args=(folder, number))
        processes[number].start()


def _is_written(file: Path) -> bool:
    with suppress(OSError, ValueError):
        return bool(json.loads(file.read_text()))
    return False


def _end_with_parent() -> None:
    """A child does not outlive the warden, should that be killed."""
    warden = multiprocessing.parent_process()

    def watch() -> None:
        warden.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _controller(folder: Path) -> None:
    """ipyparallel's controller, in one process, over files where that can be."""
    from ipyparallel.controller.app import IPController

    _end_with_parent()

    class Controller(IPController):
        def construct_url(self, kind: str, channel: str, index: object = None) -> str:
            """Clients and engines join a path and a number by a colon: the controller itself by a dash."""
            url = super().construct_url(kind, channel, index)
            return ":".join(url.rsplit("-", 1)) if url.startswith("ipc://") else url

        def init_hub(self) -> None:
            """The monitor of heartbeats as a thread: a process would be one more to end."""
            super().init_hub()
            process = self.heartmonitor_process
            self.heartmonitor_process = threading.Thread(
                target=process._target, kwargs=process._kwargs, daemon=True, name="heartmonitor"
            )

    ipc = _has_room_for_sockets(folder)
    Controller.launch_instance(
        argv=[
            f"--profile-dir={folder / 'profile'}",
            f"--transport={'ipc' if ipc else 'tcp'}",
            f"--ip={folder / 's' if ipc else '127.0.0.1'}",
            "--usethreads",
            "--nodb",
            "--log-level=ERROR",
            "--HeartMonitor.period=200",  # an engine counts as there when its heart was heard
            "--HeartMonitor.max_heartmonitor_misses=1000000000",  # the warden knows better who is alive
        ]
    )


def _engine(folder: Path, number: int) -> None:
    """An engine of ipyparallel, of that number."""
    sys.modules["debugpy"] = None
    import numpy as np
    import torch
    from ipyparallel.engine.app import IPEngine

    _end_with_parent()
    torch.set_num_threads(1)
    torch.seed()  # forked processes have the same random numbers otherwise
    np.random.seed()
    IPEngine.launch_instance(
        argv=[
            f"--profile-dir={folder / 'profile'}",
            f"--IPEngine.id={number}",
            "--IPEngine.timeout=60",
            "--IPEngine.enable_nanny=False",  # a process more for each, to send signals: we know the pids
            "--IPEngine.max_heartbeat_misses=0",
            "--log-level=ERROR",
        ]
    )
