"""A learner's kernel in processes of its own: interpreted, compiled, checked; what it says when something is wrong."""

import importlib.util
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from moe_lab.course import kernel_cells
from moe_lab.course.kernel_cells import Kernel, KernelError

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")

MODULE = '''\
"""Kernels of a chapter."""

import triton
import triton.language as tl


@triton.jit
def twice(x):
    return 2 * x


@triton.jit
def add_twice(
    x, y, n,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n)
    tl.store(y + i, twice(a), mask=i < n)


LAST = 1
'''


def plain(grid, x, y, n, BLOCK):
    y[:n] = 2 * x[:n]


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> Kernel:
    (tmp_path / "chapter_of_kernels.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return Kernel.written("chapter_of_kernels", "add_twice", uses=["twice"], plain=plain)


def tensors(n: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(float(n)), torch.full((n,), -1.0)


# --- a kernel as text ---------------------------------------------------------------------------------------------


def test_a_kernel_is_read_from_a_file_that_is_not_imported_and_its_lines_keep_their_numbers(kernel):
    assert "chapter_of_kernels" not in sys.modules
    assert list(kernel.sources) == ["twice", "add_twice"]
    lines = MODULE.splitlines()
    for source in kernel.sources.values():
        for number, line in enumerate(source.splitlines()):
            assert line in ("", lines[number])
    assert kernel.sources["add_twice"].rstrip().endswith("tl.store(y + i, twice(a), mask=i < n)")


def test_a_change_has_to_be_in_one_place(kernel):
    assert "3 * x" in kernel.changed(("2 * x", "3 * x")).sources["twice"]
    assert "2 * x" in kernel.sources["twice"]
    for text in ("mask=i < n", "no such text"):
        with pytest.raises(ValueError, match=rf"add_twice does not hold '{text}' exactly once"):
            kernel.changed((text, ""))


def in_cells(*cells: str) -> dict:
    """What a notebook's cells define; a cell's lines begin at 1, as in IPython."""
    import linecache

    names: dict = {}
    for number, source in enumerate(cells):
        name = f"<cell {number} of {len(linecache.cache)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), names)
    return names


IMPORTS = "from moe_lab.course.kernel_cells import tl, triton\nFACTOR = tl.constexpr(3)\nSIZE = 8\nUNUSED = object()"
HELPER = "# a helper\n\n@triton.jit\ndef times(x):\n    return FACTOR * x"
CALLER = """\
def decorated(kernel):
    return kernel

@decorated
@triton.jit
def scaled(x, y, n,
           BLOCK: tl.constexpr = SIZE):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, times(tl.load(x + i, mask=i < n)), mask=i < n)
"""


@needs_triton
def test_a_kernel_of_the_notebook_brings_along_what_it_uses():
    kernel = Kernel.of(in_cells(IMPORTS, HELPER, CALLER)["scaled"])
    assert list(kernel.sources) == ["times", "scaled"]
    assert kernel.constants == {"FACTOR": 3, "SIZE": 8}
    x, y = tensors(5)
    kernel.interpret((1,), x, y, 5)
    assert y.tolist() == [0, 3, 6, 9, 12]


@needs_triton
def test_a_kernel_that_passed_before_is_found_by_the_next():
    names = in_cells(IMPORTS, HELPER)
    names["times"] = Kernel.of(names["times"])
    source = CALLER.replace("@decorated\n", "")
    import linecache

    linecache.cache["<later>"] = (len(source), None, source.splitlines(keepends=True), "<later>")
    exec(compile(source, "<later>", "exec"), names)
    kernel = Kernel.of(names["scaled"])
    assert list(kernel.sources) == ["times", "scaled"]
    assert kernel.constants == {"FACTOR": 3, "SIZE": 8}


# --- runs ---------------------------------------------------------------------------------------------------------


@needs_triton
def test_it_is_interpreted_and_leaves_what_it_stored(kernel):
    x, y = tensors()
    wide = torch.full((2, 10), -1.0)
    kernel.interpret((3,), x, y, 9, BLOCK=4)
    kernel.interpret((3,), x, wide[1], 9, BLOCK=4)
    assert y.tolist() == [*range(0, 18, 2), -1]
    assert wide[1].tolist() == y.tolist()
    assert wide[0].tolist() == [-1] * 10


@needs_triton
def test_it_is_compiled_for_a_gpu_that_is_not_there(kernel):
    x, y = tensors()
    old, new = kernel.compile(x, y, 9, BLOCK=4, capability=80), kernel.compile(x.to("meta"), y.to("meta"), 9, BLOCK=4)
    assert (old.name, old.capability, new.capability) == ("add_twice", 80, 90)
    assert "tt.load" in old.ttir
    assert ".target sm_80" in old.ptx
    assert "STG" in old.instructions
    assert 0 < old.registers < 255
    assert old.local_bytes == old.spills == old.tensor_core_instructions == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_time(kernel):
    with pytest.raises(KernelError, match="no NVIDIA GPU"):
        kernel.time((3,), *tensors(), 9, BLOCK=4)


@needs_triton
@pytest.mark.parametrize("way", ["interpret", "compile"])
@pytest.mark.parametrize(
    ("change", "line", "reason"),
    [
        (("tl.load(x + i", "tl.load(x + j"), "line 18: `a = tl.load(x + j, mask=i < n)`", "j"),
        (("2 * x", "tl.dott(x)"), "line 9: `return tl.dott(x)`", "dott"),
        (("twice(a), mask=i < n)", "twice(a), mask=i < n"), "line 19: `tl.store", "never closed"),
        (("tl.store(y + i, twice(a), mask=i < n)", "return twice(a)"), "line 19: `return twice(a)`", "returns nothing"),
    ],
    ids=["unknown name", "in a helper", "syntax", "a result"],
)
def test_an_error_names_the_learners_line(kernel, way, change, line, reason):
    run = kernel.changed(change)
    x, y = tensors()
    with pytest.raises(KernelError) as caught:
        run.interpret((3,), x, y, 9, BLOCK=4) if way == "interpret" else run.compile(x, y, 9, BLOCK=4)
    assert str(caught.value).startswith(line)
    assert reason in str(caught.value)
    assert "moe-lab-kernel-" not in str(caught.value)  # no path of this machine
    assert y.tolist() == [-1] * 10


@needs_triton
def test_what_does_not_end_is_stopped_and_no_process_and_no_file_stays(kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(kernel_cells.tempfile, "tempdir", str(tmp_path))
    endless = kernel.changed(("    a = tl.load", "    while n > 0:\n        n = n\n    a = tl.load"))
    monkeypatch.setattr(kernel_cells, "SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(KernelError, match=r"stopped after 1 seconds, at line 1[89]: `"):
        endless.interpret((3,), *tensors(), 9, BLOCK=4)
    assert time.monotonic() - began < 60
    monkeypatch.setattr(kernel_cells, "START", 0.0)  # as if it did not stop by itself
    with pytest.raises(KernelError, match="stopped after 1 seconds"):
        endless.interpret((3,), *tensors(), 9, BLOCK=4)
    assert not [p for p in psutil.Process().children(recursive=True) if "kernel_process" in " ".join(p.cmdline())]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("moe-lab-kernel-")]


@needs_triton
def test_a_crash_is_told(kernel):
    crash = kernel.changed(("    a = tl.load", "    import os; os._exit(3)\n    a = tl.load"))
    with pytest.raises(KernelError, match="ended with status 3"):
        crash.interpret((3,), *tensors(), 9, BLOCK=4)


@needs_triton
def test_what_it_prints_is_shown(kernel, capsys):
    loud = kernel.changed(("    a = tl.load", "    print('program', n)\n    a = tl.load"))
    loud.interpret((2,), *tensors(), 9, BLOCK=8)
    assert capsys.readouterr().out.count("program") == 2


def test_a_value_that_cannot_be_sent_is_named(kernel):
    if not kernel_cells.has_triton():
        pytest.skip("there is no Triton here")
    with pytest.raises(KernelError, match="tensors and numbers; object cannot") as caught:
        kernel.interpret((3,), *tensors(), object(), BLOCK=4)
    assert caught


# --- without Triton -----------------------------------------------------------------------------------------------

BLOCKED = """
import sys, importlib.util
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else found(name, package)
sys.meta_path.insert(0, Blocker())
"""

WITHOUT = (
    BLOCKED
    + """
import torch
from moe_lab.course.kernel_cells import Kernel, KernelError, tl, triton
from moe_lab.course.exercises import check
from moe_lab.course.bank import Case, Exercise

def plain(grid, x, y, n, BLOCK):
    y[:n] = 2 * x[:n]

kernel = Kernel.written("chapter_of_kernels", "add_twice", uses=["twice"], plain=plain)
x, y = torch.arange(3.0), torch.zeros(3)
kernel.interpret((triton.cdiv(3, 2),), x, y, 3, BLOCK=triton.next_power_of_2(2))
print(y.tolist())
try:
    kernel.compile(x, y, 3, BLOCK=2)
except KernelError as error:
    print(error)

@triton.jit
def written(x, y, n, BLOCK: tl.constexpr):
    tl.store(y, 1)

@triton.jit
def stub(x, y, n, BLOCK: tl.constexpr):
    raise NotImplementedError("your turn")

spec = Exercise(id="98.1", title="t", reference=kernel, cases=lambda: [Case(name="one")])
for answer in (written, stub, print):
    outcome = check(spec, answer, globals())
    print(outcome.status, "|", outcome.headline)
"""
)


def test_without_triton_torch_computes_it_and_an_answer_is_said_not_to_be_checked(kernel, tmp_path):
    script = tmp_path / "without.py"
    script.write_text(WITHOUT, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.splitlines() == [
        f"{kernel_cells.NO_TRITON} The same is computed by PyTorch.",
        "[0.0, 2.0, 4.0]",
        kernel_cells.NO_TRITON,
        "not checked | There is no Triton here",
        "not started | ",
        "wrong | A Triton kernel is asked for",
    ], done.stderr
