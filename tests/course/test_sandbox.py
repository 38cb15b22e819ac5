"""The sandbox: whatever a learner's code does, it ends, and everything is as it was."""

import builtins
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
from kernels import Kernel

from moe_lab.course.sandbox import FLOOD, SHOWN, Sandbox, line_in

HAS_TIMER = hasattr(signal, "setitimer")
TIMERS = [pytest.param(True, marks=pytest.mark.skipif(not HAS_TIMER, reason="there is no timer signal here")), False]


def state() -> list:
    """All that a run could leave behind."""
    timer = [signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)] if HAS_TIMER else []
    names = [vars(builtins).get(name) for name in ("exit", "quit", "input")]
    threads = [thread.name for thread in threading.enumerate() if "exercise" in thread.name]
    system = [sys.stdout, sys.stderr, sys.gettrace(), sys.getrecursionlimit(), sys.unraisablehook]
    warned = [warnings.showwarning, list(warnings.filters)]
    return [*timer, *names, *threads, *system, *warned, signal.getsignal(signal.SIGINT)]


def run(body: str, seconds: float = 0.2, timer: bool = HAS_TIMER) -> tuple[Sandbox, Exception | None]:
    """Runs a function body in a sandbox; afterwards everything must be as before."""
    namespace: dict = {}
    exec("def learner():\n" + "\n".join(f"    {line}" for line in body.splitlines()), namespace)
    before, raised, start = state(), None, time.monotonic()
    with Sandbox(seconds, namespace, timer=timer) as box:
        try:
            namespace["learner"]()
        except (Exception, SystemExit) as error:
            raised = error
    assert time.monotonic() - start < 10
    assert state() == before
    return box, raised


# Every one of these loops for ever and swallows exceptions where it can.
ENDLESS = {
    "plain": """
while True: pass""",
    "in a comprehension": """
return all(True for _ in iter(int, 1))""",
    "bare except": """
while True:
    try:
        while True: x = 1
    except: pass""",
    "bare except around everything": """
try:
    while True:
        try: x = 1
        except: pass
except: return 1""",
    "three deep": """
while True:
    try:
        try:
            try: x = 1
            except: x = 2
        except: x = 3
    except: x = 4""",
    "finally": """
while True:
    try: x = 1
    finally: continue""",
    "suppress": """
from contextlib import suppress
while True:
    with suppress(BaseException): x = 1""",
    "own context manager": """
class Swallow:
    def __enter__(self): pass
    def __exit__(self, *error): return True
while True:
    while True:
        with Swallow(): x = 1""",
    "kept exceptions": """
import time
kept = []
while True:
    try: time.sleep(0.01)
    except BaseException as error: kept.append(error)""",
    "functions that catch": """
def f():
    while True:
        try: g()
        except: pass
def g():
    while True:
        try: h()
        except: pass
def h():
    while True:
        try: x = 1
        except: pass
f()""",
    "a recursion that catches": """
def f(n):
    try: return f(n - 1) + f(n - 2)
    except: return 0
f(30)""",
    "generator": """
def numbers():
    while True:
        try: yield
        except: pass
for _ in numbers(): pass""",
    "own trace function": """
import sys
sys.settrace(lambda *event: None)
while True:
    try: x = 1
    except: pass""",
    "destructor": """
class A:
    def __del__(self):
        while True: pass
a = A()
del a
while True: pass""",
}
NATIVE = {  # only a signal ends these
    "sleep": """
import time
time.sleep(60)""",
    "sleep and catch": """
import time
while True:
    try: time.sleep(60)
    except: pass""",
    "regular expression": """
import re
re.match('(a+)+$', 'a' * 40 + 'b')""",
    "huge number": """
3 ** 10 ** 9""",
    "lock": """
import threading
lock = threading.Lock()
lock.acquire()
lock.acquire()""",
    "thread": """
import threading, time
thread = threading.Thread(target=time.sleep, args=(5,), daemon=True)
thread.start()
thread.join()""",
    "child process": """
import subprocess, sys
subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])""",
}


@pytest.mark.parametrize("timer", TIMERS)
@pytest.mark.parametrize("name", ENDLESS)
def test_endless_python_code_is_ended(name, timer):
    box, _ = run(ENDLESS[name], timer=timer)
    assert box.stopped == "time"
    assert re.match(r"line \d", box.line)


@pytest.mark.skipif(not HAS_TIMER, reason="native code is interrupted by a timer signal, which this system lacks")
@pytest.mark.parametrize("name", NATIVE)
def test_native_code_that_looks_at_signals_is_ended(name):
    assert run(NATIVE[name])[0].stopped == "time"


@pytest.mark.parametrize("timer", TIMERS)
def test_code_that_ends_in_time_is_left_alone(timer):
    for _ in range(20):
        box, raised = run("return sum(range(1000))", timer=timer)
        assert (box.stopped, box.printed, raised) == (None, "", None)


@pytest.mark.parametrize("timer", TIMERS)
def test_a_limit_that_strikes_at_any_moment_leaves_everything_in_order(timer):
    """Limits spread around the time that the code needs, so that some strike during entry, clean-up and exit."""
    for i in range(60):
        box, _ = run("for i in range(2000): x = i", seconds=1e-5 * (i + 1), timer=timer)
        assert box.stopped in (None, "time")


def test_exceptions_pass_through():
    box, raised = run("1 / 0")
    assert isinstance(raised, ZeroDivisionError)
    assert box.stopped is None


@pytest.mark.parametrize("code", ["exit()", "quit()", "exit(3)", "raise SystemExit", "import sys; sys.exit()"])
def test_exit_is_an_exception(code):
    assert isinstance(run(code)[1], SystemExit)


def test_ipythons_exit_is_replaced_and_put_back():
    class ExitAutocall:
        def __call__(self):
            raise AssertionError("the kernel would end")

    namespace = {"exit": ExitAutocall(), "quit": "a learner's own variable"}
    before = dict(namespace)
    with Sandbox(1, namespace):
        assert namespace["quit"] == "a learner's own variable"
        with pytest.raises(SystemExit):
            namespace["exit"]()
    assert namespace == before


def test_input_is_not_waited_for():
    assert isinstance(run("input('name? ')")[1], EOFError)


def test_prints_are_captured_and_cut():
    assert run("print('a')\nimport sys\nprint('b', file=sys.stderr)")[0].printed == "a\nb\n"
    box, _ = run(f"print('x' * {SHOWN + 1}, end='')")
    assert box.printed == "x" * SHOWN + "…"
    assert box.stopped is None


@pytest.mark.parametrize("body", ["print('x' * 1_000_000)", "while True:\n  try: print('x' * 99)\n  except: pass"])
def test_a_flood_of_prints_is_ended(body):
    start = time.monotonic()
    box, _ = run(body, seconds=30)
    assert box.stopped == "output"
    assert time.monotonic() - start < 5
    assert FLOOD <= box._output.length < 2_000_000


def test_streams_that_are_closed_or_replaced_come_back():
    for body in ("sys.stdout.close()", "sys.stdout = None", "sys.stderr = sys.stdout = open(os.devnull, 'w')"):
        run(f"import os, sys\n{body}")


def test_a_warning_is_printed_without_its_path():
    assert run("import warnings\nwarnings.warn('careful')")[0].printed == "UserWarning: careful\n"


@pytest.mark.skipif(not HAS_TIMER, reason="there is no timer signal here")
def test_somebody_elses_timer_goes_on():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with Sandbox(5, {}):
            time.sleep(0.1)
        time.sleep(0.4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rang == [True]


def test_in_another_thread_there_is_no_limit_but_all_else():
    boxes = []
    thread = threading.Thread(target=lambda: boxes.append(run("print('hello')\nexit()", seconds=0.001)))
    thread.start()
    thread.join(10)
    assert (boxes[0][0].printed, type(boxes[0][1])) == ("hello\n", SystemExit)


def test_the_line_is_the_learners_own():
    assert run("import json\nwhile True: json.dumps([1] * 9999)")[0].line == "line 3"


def test_of_a_function_just_entered_the_call_is_told():
    """Its own line would be that of its `def`, or of the decorator above."""
    namespace: dict = {"probe": lambda: line_in(namespace, frame=sys._getframe(1))}
    exec("def caller():\n    return entered()\n\ndef entered(): return probe()", namespace)
    assert namespace["caller"]() == "line 2"
    assert eval("(lambda: probe())()", namespace, {}) == "line 1"


@pytest.mark.parametrize("timer", TIMERS)
@pytest.mark.parametrize("body", [ENDLESS["plain"], ENDLESS["bare except"], ENDLESS["finally"]])
def test_an_interrupt_by_the_user_gets_through(body, timer):
    namespace: dict = {}
    exec("def learner():\n" + "\n".join(f"    {line}" for line in body.splitlines()), namespace)
    before, start = state(), time.monotonic()
    threading.Timer(0.2, signal.raise_signal if os.name == "nt" else os.kill,
                    [signal.SIGINT] if os.name == "nt" else [os.getpid(), signal.SIGINT]).start()  # fmt: skip
    with pytest.raises(KeyboardInterrupt), Sandbox(30, namespace, timer=timer):
        namespace["learner"]()
    assert time.monotonic() - start < 5
    time.sleep(0.1)  # the Timer's own thread ends
    assert state() == before


# --- in a real kernel ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel(seconds=0.3)
    yield kernel
    kernel.close()


IN_A_KERNEL = {
    **{name: (body, "It does not come to an end") for name, body in ENDLESS.items()},
    **({name: (body, "It does not come to an end") for name, body in NATIVE.items()} if HAS_TIMER else {}),
    "exit": ("exit()", "It calls exit"),
    "quit": ("quit()", "It calls exit"),
    "sys.exit": ("import sys\nsys.exit(1)", "It calls exit"),
    "recursion": ("return depth(tree)", "It calls itself without end"),
    "flood": ("while True: print('x' * 1000)", "It prints too much"),
    "input": ("return input()", "It raises EOFError"),
    "closed stdout": ("import sys\nsys.stdout.close()", "None came back"),
    "raw write": ("import os\nos.write(1, b'raw')", "None came back"),
}


@pytest.mark.parametrize("name", IN_A_KERNEL)
def test_the_kernel_survives(kernel, name):
    body, headline = IN_A_KERNEL[name]
    cell = "@exercise('98.3')\ndef depth(tree):\n" + "\n".join(f"    {line}" for line in body.splitlines())
    assert headline in kernel.run(cell)
    assert kernel.run("print(depth([[]]), 6 * 7)") == "2 42\n"  # the reference goes on


def test_interrupting_the_kernel_ends_the_check():
    kernel = Kernel(seconds=60)
    try:
        for name in ("plain", "bare except", "finally"):
            cell = "@exercise('98.3')\ndef depth(tree):\n" + "\n".join(f"    {x}" for x in ENDLESS[name].splitlines())
            threading.Timer(0.5, kernel.manager.interrupt_kernel).start()
            assert kernel.run(cell) == "KeyboardInterrupt"
            assert kernel.run("print(6 * 7)") == "42\n"
    finally:
        kernel.close()


def test_the_module_needs_no_torch():
    """So that it can be tried on any Python."""
    code = "import moe_lab.course.sandbox, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
