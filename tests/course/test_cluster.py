"""Ranks for a notebook, in real kernels: the same cells on processes and simulated; what is left when things fail."""

import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from jupyter_client.manager import KernelManager

from moe_lab.course.kernels import kernel_environment, kernel_sockets
from moe_lab.course.offline import prefix
from moe_lab.course.rank_cells import CHARACTERS

TIMEOUT = 4  # seconds that a rank of these tests waits for another


@dataclass
class Shown:
    """What a cell showed."""

    stdout: str = ""
    stderr: str = ""
    value: str = ""
    error: str = ""
    kinds: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Notebook:
    """A real kernel, apart from the user's own set-up."""

    def __init__(self, scratch: Path, **environment: str) -> None:
        environment = kernel_environment(scratch) | {"HOME": str(scratch)} | environment
        self.manager = KernelManager(**kernel_sockets())
        self.manager.start_kernel(env=environment, cwd=str(scratch))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        self.process = psutil.Process(self.manager.provisioner.pid)
        self.must("from moe_lab.course.cluster import start_cluster")

    def run(self, code: str, interrupt_after: float | None = None) -> Shown:
        """Run a cell, whatever comes of it."""
        shown = Shown()

        def hear(message: dict) -> None:
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                setattr(shown, content["name"], getattr(shown, content["name"]) + content["text"])
            elif kind == "execute_result":
                shown.value = content["data"]["text/plain"]
            elif kind == "error":
                shown.error = re.sub("\x1b[^m]*m", "", "\n".join(content["traceback"]))
            if kind not in ("status", "execute_input"):
                shown.kinds.append(kind)

        begin = time.monotonic()
        if interrupt_after is not None:
            threading.Timer(interrupt_after, self.manager.interrupt_kernel).start()
        self.client.execute_interactive(code, timeout=90, output_hook=hear, allow_stdin=False)
        shown.seconds = time.monotonic() - begin
        return shown

    def must(self, code: str) -> str:
        """What a cell printed, that has nothing to complain about."""
        shown = self.run(code)
        assert not shown.error + shown.stderr, shown.error + shown.stderr
        return shown.stdout

    @property
    def offspring(self) -> list[psutil.Process]:
        """All processes that descend from the kernel's."""
        return self.process.children(recursive=True)

    def folder(self) -> Path:
        """Of the running cluster."""
        return Path(self.run("str(cluster._warden.folder)").value.strip("'"))

    def close(self) -> None:
        """End it, as Jupyter's server does at last."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def all_end(processes: list[psutil.Process], seconds: float = 15) -> bool:
    """Whether they are all gone in time."""
    return not psutil.wait_procs(processes, seconds)[1]


@pytest.fixture
def open_notebook(tmp_path: Path) -> Iterator[Callable[..., Notebook]]:
    """Opens notebooks, and closes them."""
    opened: list[Notebook] = []

    def open_one(**environment: str) -> Notebook:
        opened.append(Notebook(tmp_path, **environment))
        return opened[-1]

    yield open_one
    for notebook in opened:
        notebook.close()


@pytest.fixture(scope="module", params=["processes", "simulated"])
def notebook(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """A notebook with four ranks that the tests share."""
    opened = Notebook(tmp_path_factory.mktemp("notebook"), MOE_LAB_RANKS=request.param)
    try:
        said = opened.must(f"cluster = start_cluster(4, timeout={TIMEOUT})")
        ours = {
            "processes": "4 ranks, each a process of its own\n",
            "simulated": "4 ranks, simulated in this process, because MOE_LAB_RANKS=simulated is set\n",
        }
        assert said == ours[request.param]
        opened.must("import torch")
        opened.must("%%px\nimport os, torch")
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """A notebook whose clusters come to harm."""
    opened = Notebook(tmp_path_factory.mktemp("spare"))
    yield opened
    opened.close()


# --- The same cells on processes and simulated ---------------------------------------------------------------------


def test_what_ranks_say_comes_in_their_order(notebook: Notebook):
    shown = notebook.run("%%px\nprint('rank', ranks.rank, 'of', ranks.size)\n10 * ranks.rank")
    lines = [line for r in range(4) for line in (f"[stdout:{r}] rank {r} of 4", f"[out:{r}] {10 * r}")]
    assert shown.stdout == "\n".join(lines) + "\n"
    assert set(shown.kinds) == {"stream"}


def test_several_lines_stand_below_the_rank(notebook: Notebook):
    assert notebook.must("%%px -t 2\nprint('a')\ndisplay('b')") == "[stdout:2]\na\nb\n"


@pytest.mark.parametrize("code", ["x = 3", "3;", "None", "# nothing"])
def test_nothing_to_show(notebook: Notebook, code: str):
    assert notebook.must(f"%%px\n{code}") == ""


def test_warnings_are_told_apart(notebook: Notebook):
    shown = notebook.run("%%px -t 1\nimport sys\nprint('careful', file=sys.stderr)")
    assert (shown.stdout, shown.stderr) == ("", "[stderr:1] careful\n")


def test_a_flood_is_cut(notebook: Notebook):
    said = notebook.must("%%px -t 0\nfor _ in range(10_000): print('x' * 99)")
    assert len(said) < CHARACTERS + 100
    assert said.endswith(f"… and {1_000_000 - CHARACTERS} characters more\n")


def test_names_stay_and_are_each_ranks_own(notebook: Notebook):
    notebook.must("%%px\nmine = torch.arange(4) + 10 * ranks.rank")
    assert notebook.must("print([t.tolist() for t in cluster.pull('mine')])") == (
        "[[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]]\n"
    )
    said = notebook.must("%%px\nranks.all_to_all(mine)")
    assert said.splitlines()[1] == "[out:1] tensor([ 1, 11, 21, 31])"
    assert notebook.must("%px ranks.all_reduce(mine).sum().item()") == "".join(f"[out:{r}] 264\n" for r in range(4))


@pytest.mark.parametrize(("text", "ranks"), [("1,3", [1, 3]), ("2:", [2, 3]), ("-1", [3]), ("all", [0, 1, 2, 3])])
def test_targets(notebook: Notebook, text: str, ranks: list[int]):
    said = notebook.must(f"%%px --targets {text}\nranks.rank")
    assert said == "".join(f"[out:{r}] {r}\n" for r in ranks)


@pytest.mark.parametrize(("options", "complaint"), [("-t 4", "expected ranks of 0 to 3"), ("--block", "unrecognized")])
def test_bad_options(notebook: Notebook, options: str, complaint: str):
    shown = notebook.run(f"%%px {options}\nranks.rank")
    assert complaint in shown.stderr
    assert "Traceback" not in shown.stderr


def test_local_runs_here_as_well(notebook: Notebook):
    said = notebook.must("%%px --local\nimport math\nprint(math.floor(2.5))")
    assert said == "2\n" + "".join(f"[stdout:{r}] 2\n" for r in range(4))


def test_functions_arrive_with_what_they_mention(notebook: Notebook):
    notebook.must("""
import torch
import torch.nn.functional as F
from math import floor
from moe_lab.routing import best_k
SCALE = 3

def scaled(x):
    return F.relu(x) * SCALE

@torch.no_grad()
def total(x, ranks):
    return [floor(ranks.all_reduce(scaled(x)).sum().item()) for _ in range(1)][0]

cluster.push(total=total, best_k=best_k)
""")
    assert notebook.must("%px total(torch.ones(2), ranks)") == "".join(f"[out:{r}] 24\n" for r in range(4))
    said = notebook.must("%px best_k(torch.tensor([[1.0, 3.0, 3.0]]), 2).tolist()")
    assert said == "".join(f"[out:{r}] [[1, 2]]\n" for r in range(4))


@pytest.mark.parametrize("body", ['raise NotImplementedError("your turn")', "return scores.sort(-1)[1][:, :k]"])
def test_what_exercise_returns_arrives(notebook: Notebook, body: str):
    notebook.run(f"""
from moe_lab.course import exercise

@exercise("2.1")
def best(scores, k):
    {body}

cluster.push(best=best)
""")
    assert notebook.must("%%px -t 3\nbest(torch.tensor([[1.0, 3.0, 3.0]]), 2).tolist()") == "[out:3] [[1, 2]]\n"


def test_a_new_definition_replaces_the_old(notebook: Notebook):
    for number in (1, 2):
        notebook.must(f"def inner(): return {number}\ndef outer(): return inner()\ncluster.push(outer=outer)")
        assert notebook.must("%px outer()") == "".join(f"[out:{r}] {number}\n" for r in range(4))


def test_every_rank_gets_a_copy(notebook: Notebook):
    notebook.must("import torch\nshared = torch.zeros(1)\ncluster.push(shared=shared, cell=[1])")
    said = notebook.must("%%px\nshared += ranks.rank\ncell.append(ranks.rank)\nshared.item(), cell")
    assert said == "".join(f"[out:{r}] ({float(r)}, [1, {r}])\n" for r in range(4))
    assert notebook.run("shared").value == "tensor([0.])"


def test_layers_travel(notebook: Notebook):
    notebook.must("""
from moe_lab.config import MoEConfig
from moe_lab.moe import MoE
layer = MoE(MoEConfig(d_model=4, d_ff=8, n_experts=2, top_k=1))
cluster.push(layer=layer)
""")
    shown = notebook.run("""
import torch
[torch.equal(one.router.weight, layer.router.weight) for one in cluster.pull("layer")]
""")
    assert shown.value == "[True, True, True, True]"


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import threading; cluster.push(lock=threading.Lock())", "lock cannot be sent to the ranks: TypeError"),
        ("class Net: pass\ncluster.push(Net=Net)", "Net is a class of the notebook: define it in a cell that begins"),
        ("cluster.pull('nothing')", "Ranks 0, 1, 2 and 3: NameError: name 'nothing' is not defined"),
        ("cluster.pull('(i for i in ())')", "cannot pickle 'generator' object"),
    ],
)
def test_what_cannot_be_sent(notebook: Notebook, code: str, complaint: str):
    shown = notebook.run(code)
    assert complaint in shown.error
    assert len(shown.error.splitlines()) == 1


def test_an_error_tells_which_rank_and_where_and_the_notebook_goes_on(notebook: Notebook):
    notebook.must("def risky(x):\n    y = x + 1\n    raise ValueError(f'{y} is too much')\ncluster.push(risky=risky)")
    notebook.must("%%px\nheld = ranks")
    shown = notebook.run("%%px\nprint('begin')\nif ranks.rank == 2:\n    risky(6)\nranks.all_reduce(torch.ones(1))")
    assert shown.stdout == "".join(f"[stdout:{r}] begin\n" for r in range(4))
    assert shown.error.splitlines() == [
        "Rank 2: ValueError: 7 is too much",
        "  line 3 of the cell: risky(6)",
        "  line 3 of the notebook's cell in risky: raise ValueError(f'{y} is too much')",
        "",
        "Ranks 0, 1 and 3 could not go on because of that.",
    ]
    assert shown.seconds < TIMEOUT  # nobody waits for a rank that has failed
    said = notebook.must("%px ranks is held and held.all_reduce(torch.ones(1)).item()")
    assert said == "".join(f"[out:{r}] 4.0\n" for r in range(4))


def test_errors_that_all_have_are_told_once(notebook: Notebook):
    shown = notebook.run("%%px\nx = 1\nx.nothing")
    assert shown.error.splitlines() == [
        "Ranks 0, 1, 2 and 3: AttributeError: 'int' object has no attribute 'nothing'",
        "  line 2 of the cell: x.nothing",
    ]


def test_code_that_is_none(notebook: Notebook):
    shown = notebook.run("%%px\nx = = 1")
    assert shown.error.splitlines()[0] == "Ranks 0, 1, 2 and 3: SyntaxError: invalid syntax"


def test_errors_that_are_meant(notebook: Notebook):
    said = notebook.must("%%px --may-fail\nif ranks.rank == 1:\n    raise ValueError('as planned')\nranks.rank")
    assert said.splitlines() == ["[out:0] 0", "[error:1] ValueError: as planned", "[out:2] 2", "[out:3] 3"]


@pytest.mark.parametrize("code", ["exit()", "import sys; sys.exit(1)", "input('what? ')"])
def test_a_rank_neither_leaves_nor_asks(notebook: Notebook, code: str):
    assert re.match("Rank 1: (SystemExit|EOFError)", notebook.run(f"%%px -t 1\n{code}").error)
    assert notebook.must("%%px -t 1\nranks.rank") == "[out:1] 1\n"


def test_a_rank_that_others_wait_for_in_vain(notebook: Notebook):
    shown = notebook.run("%%px\nif ranks.rank:\n    ranks.all_reduce(torch.ones(1))")
    assert re.match(r"Ranks? 1.*: RankError: ", shown.error)
    assert "ank 0" in shown.error
    assert "line 2 of the cell" in shown.error
    assert shown.seconds < TIMEOUT + 5
    assert notebook.must("%px ranks.all_reduce(torch.ones(1)).item()").startswith("[out:0] 4.0\n")


@pytest.mark.parametrize("others", ["while True: pass", "ranks.all_reduce(torch.ones(1))"])
def test_an_endless_cell_is_stopped(notebook: Notebook, others: str):
    code = f"%%px\nprint('begin')\nif ranks.rank:\n    {others}\nelse:\n    while True: pass"
    shown = notebook.run(code, interrupt_after=0.5)
    assert shown.error == "Interrupted: The cell was stopped."
    assert "[stdout:0] begin" in shown.stdout
    assert notebook.must("%px ranks.all_reduce(torch.ones(1)).item()").startswith("[out:0] 4.0\n")


def test_random_numbers_are_each_ranks_own(notebook: Notebook):
    notebook.must("%%px\nimport random\nimport numpy as np")
    seed = "torch.manual_seed(2 + ranks.rank); random.seed(2 + ranks.rank); np.random.seed(2 + ranks.rank)\n"
    draw = "print(*(f'{x:.6f}' for x in (torch.rand(1).item(), random.random(), np.random.rand())))"
    assert len({line.split("] ")[1] for line in notebook.must(f"%%px\n{draw}").splitlines()}) == 4
    alone = notebook.must(f"%%px -t 1\n{seed}{draw}")
    notebook.must("torch.manual_seed(0)")
    together = notebook.must(f"%%px\n{seed}ranks.all_reduce(torch.ones(1))\n{draw}")
    assert together.splitlines()[1] == alone.strip()
    ours = "torch.initial_seed(), torch.equal(torch.rand(1), torch.manual_seed(0) and torch.rand(1))"
    assert notebook.run(ours).value == "(0, True)"


def test_a_second_cluster_takes_the_place_of_the_first(notebook: Notebook):
    before = notebook.offspring
    notebook.must("first = cluster")
    said = notebook.must(f"cluster = start_cluster(4, timeout={TIMEOUT})")
    assert said.startswith("4 ranks, ")
    assert notebook.run("first").value == "4 ranks, stopped"
    assert all_end(before)
    assert notebook.must("%%px\nimport os, torch\nranks.rank").startswith("[out:0] 0\n")


# --- Processes -----------------------------------------------------------------------------------------------------


only_processes = pytest.mark.parametrize("notebook", ["processes"], indirect=True)


@only_processes
def test_each_rank_is_a_process_with_one_thread(notebook: Notebook):
    code = "{os.getpid(), *cluster.pull('os.getpid()')}, {*cluster.pull('torch.get_num_threads()')}"
    said = notebook.must(f"import os\npids, threads = {code}\nprint(len(pids), threads)")
    assert said == "5 {1}\n"


@only_processes
def test_nobody_else_can_get_at_the_ranks(notebook: Notebook):
    folder = notebook.folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list((folder / "profile" / "security").iterdir())
    assert {file.name for file in files} == {"ipcontroller-client.json", "ipcontroller-engine.json"}
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert re.search(r'"key": "[0-9a-f-]{30,}"', file.read_text())
    addresses = {c.laddr.ip for p in notebook.offspring for c in p.net_connections("inet") if c.status == "LISTEN"}
    assert addresses <= {"127.0.0.1"}


@pytest.mark.skipif(os.name != "posix", reason="sockets are files only there")
def test_stop_leaves_nothing_wherever_temporary_files_are(spare: Notebook, tmp_path: Path):
    long = tmp_path / ("long" * 25)  # too long a path for sockets
    long.mkdir()
    spare.must(f"import tempfile\nbefore = tempfile.gettempdir()\ntempfile.tempdir = {str(long)!r}")
    assert spare.must("cluster = start_cluster(1)") == "1 rank, a process of its own\n"
    offspring, folder = spare.offspring, spare.folder()
    assert len(offspring) >= 3  # the warden, the controller and the engine
    assert long not in folder.parents
    spare.must("tempfile.tempdir = before\ncluster.stop()\ncluster.stop()")
    assert all_end(offspring, 5)
    assert not folder.exists()
    assert list(long.iterdir()) == []
    assert spare.run("cluster").value == "1 rank, stopped"
    assert "No cluster is running" in spare.run("%%px\n1").stderr
    assert spare.run("cluster.pull('x')").error == "These ranks were stopped: start_cluster(1) starts others."


def test_a_rank_that_dies(spare: Notebook):
    spare.must("cluster = start_cluster(3)")
    offspring, folder = spare.offspring, spare.folder()
    dies = "import os, signal, torch\nif ranks.rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)"
    shown = spare.run(f"%%px\n{dies}\nranks.all_reduce(torch.ones(1))")
    assert shown.error.splitlines() == [
        "Rank 1: process was ended by SIGKILL",
        "",
        "Ranks 0 and 2 could not go on because of that.",
        "",
        "The process of rank 1 was ended by SIGKILL. So all ranks were stopped: start_cluster(3) starts others.",
    ]
    assert all_end(offspring, 5)
    assert not folder.exists()


def test_the_warden_dies(spare: Notebook):
    spare.must("cluster = start_cluster(2)")
    offspring, folder = spare.offspring, spare.folder()
    spare.must("import os, signal, time\nos.kill(cluster._warden._process.pid, signal.SIGKILL)\ntime.sleep(1)")
    shown = spare.run("%%px\nranks.rank")
    assert "was ended by SIGKILL. So all ranks were stopped: start_cluster(2) starts others." in shown.error
    assert all_end(offspring, 5)
    assert not folder.exists()


def test_who_does_not_want_to_wait_ends_the_processes(spare: Notebook):
    spare.must("cluster = start_cluster(2, timeout=60)")
    offspring = spare.offspring
    threading.Timer(1.5, spare.manager.interrupt_kernel).start()
    code = "import torch\nif ranks.rank:\n    ranks.all_reduce(torch.ones(1))"
    shown = spare.run(f"%%px\n{code}", interrupt_after=0.5)
    assert shown.error.startswith("Interrupted: The cell was stopped. Rank 1 did not stop. So all ranks were stopped")
    assert all_end(offspring, 5)


# --- However the notebook's process ends ---------------------------------------------------------------------------


def test_the_kernel_is_killed_while_a_rank_is_busy(open_notebook):
    notebook = open_notebook()
    notebook.must("cluster = start_cluster(2)")
    notebook.must("%%px\nimport subprocess\nchild = subprocess.Popen(['sleep', '1000'])")
    offspring, folder = notebook.offspring, notebook.folder()
    assert sum(process.name() == "sleep" for process in offspring) == 2
    notebook.client.execute("%%px\nwhile True: pass")
    time.sleep(0.5)
    notebook.process.kill()
    assert all_end(offspring, 5)
    assert not folder.exists()


def test_the_kernel_is_shut_down(open_notebook, tmp_path: Path):
    notebook = open_notebook()

    def files() -> set[Path]:
        return {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if "history" not in path.name}

    before = files()
    notebook.must("cluster = start_cluster(2)")
    offspring, folder = notebook.offspring, notebook.folder()
    assert files() == before  # the user's own IPython folder is left alone
    notebook.manager.shutdown_kernel()
    assert all_end(offspring, 5)
    assert not folder.exists()


def test_the_kernel_is_killed_at_the_start(open_notebook):
    short = "/tmp" if os.name == "posix" else None  # so short that sockets have room
    with tempfile.TemporaryDirectory(prefix="moe-lab-test-", dir=short) as scratch:
        notebook = open_notebook(TMPDIR=scratch)
        notebook.client.execute("cluster = start_cluster(2)")
        time.sleep(1.5)
        offspring = notebook.offspring
        assert offspring
        assert list(Path(scratch).glob("moe-lab-*"))
        notebook.process.kill()
        assert all_end(offspring)
        assert not list(Path(scratch).glob("moe-lab-*"))


# --- A start that fails --------------------------------------------------------------------------------------------


@pytest.fixture
def broken(spare: Notebook, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Puts code where the processes, but not the notebook, import ipyparallel."""

    def breaks(code: str) -> None:
        (tmp_path / "ipyparallel.py").write_text(code)
        spare.must(f"import os\nos.environ['PYTHONPATH'] = {str(tmp_path)!r}")

    yield breaks
    spare.must("del os.environ['PYTHONPATH']")


def must_be_simulated(notebook: Notebook, code: str, why: str) -> None:
    """Starting says why ranks are simulated, they work, and no process is left."""
    assert notebook.must(code) == f"2 ranks, simulated in this process, because processes could not be started: {why}\n"
    assert notebook.must("%%px\nimport torch\nranks.all_reduce(torch.ones(1)).item()") == "[out:0] 2.0\n[out:1] 2.0\n"
    assert notebook.offspring == []


def test_processes_are_refused(spare: Notebook):
    refuse = "import subprocess\nreal = subprocess.Popen\ndef refuse(*_, **__): raise OSError(1, 'not allowed', 'x')\n"
    try:
        must_be_simulated(spare, f"{refuse}subprocess.Popen = refuse\ncluster = start_cluster(2)", "not allowed")
    finally:
        spare.must("subprocess.Popen = real")


def test_processes_fail(spare: Notebook, broken):
    broken("raise ImportError('something is missing')")
    must_be_simulated(spare, "cluster = start_cluster(2)", "ImportError: something is missing")


def test_processes_hang(spare: Notebook, broken):
    broken("import time\ntime.sleep(1000)")
    begin = time.monotonic()
    must_be_simulated(spare, "cluster = start_cluster(2, seconds=2)", "they were not ready within 2 seconds")
    assert time.monotonic() - begin < 15


def test_the_learner_stops_the_start(spare: Notebook):
    shown = spare.run("cluster = start_cluster(2)", interrupt_after=1)
    assert "KeyboardInterrupt" in shown.error
    assert all_end(spare.offspring, 5)


def test_bad_arguments(spare: Notebook):
    assert "ValueError: n=0" in spare.run("start_cluster(0)").error
    spare.must("import os\nos.environ['MOE_LAB_RANKS'] = 'gpu'")
    assert "MOE_LAB_RANKS='gpu'" in spare.run("start_cluster(2)").error
    spare.must("del os.environ['MOE_LAB_RANKS']")


def test_without_a_network_and_without_a_notebook():
    offline = prefix()
    if not offline:
        pytest.skip("the network cannot be cut off here")
    code = """
from moe_lab.course.cluster import start_cluster
cluster = start_cluster(2)
cluster.run("import torch\\nranks.all_reduce(torch.ones(1)).item()")
"""
    done = subprocess.run([*offline, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 ranks, each a process of its own\n[out:0] 2.0\n[out:1] 2.0\n"
    assert done.stderr == ""
