"""Runs a learner's code so that it cannot hang the kernel, flood the notebook, or end the process.

Out of reach: native code that does not return (it is stopped when it does), crashes in native code, `os._exit`,
and threads or processes that outlive the call. There is a time limit only in the main thread, which runs the cells.
"""

import _thread
import builtins
import io
import linecache
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from types import FrameType, TracebackType
from typing import Any, Literal

SHOWN = 2_000
"""How many printed characters a learner gets to see."""
FLOOD = 100_000
"""More printed characters than that stop the run."""
TICK = 0.05
"""Seconds between two attempts to stop code that swallows them."""
PATIENCE = 3
"""After so many swallowed attempts every further line of the code raises."""


class Stop(BaseException):
    """Ends the learner's code; no `except Exception` catches it, and whatever else does is noticed.

    An exception that was caught is freed at the end of the `except` or `finally` block: `freed` is called there.
    """

    def __init__(self, freed: Callable[[], None]):
        self._freed = freed

    def __del__(self) -> None:
        self._freed()


class Sandbox:
    """A `with` block whose body runs a learner's code: limited, captured, and everything put back afterwards.

    Afterwards `stopped` tells what ended the body early, if anything did, `line` where it was then, and `printed`
    the beginning of what it printed. An interrupt by the user ends the body too, and leaves as KeyboardInterrupt.

    Args:
        seconds: how long the body may take.
        namespace: the globals of the learner's code.
        timer: whether to use the system's timer signal; without one (Windows) a thread interrupts the body, which
            cannot end a sleep or a long native call.
    """

    def __init__(self, seconds: float, namespace: dict[str, Any], timer: bool = hasattr(signal, "setitimer")):
        self.seconds, self.namespace, self.timer = seconds, namespace, timer
        self.stopped: Literal["time", "output", "interrupt"] | None = None
        self.line = ""
        self._running = False
        self._strikes = 0
        self._imitated = False
        self._output = _Output(self._flooded)

    @property
    def printed(self) -> str:
        return self._output.kept + "…" * (self._output.length > len(self._output.kept))

    def __enter__(self) -> "Sandbox":
        self._outside: FrameType | None = sys._getframe(1)
        self._depth = sys.getrecursionlimit()
        with ExitStack() as stack:
            stack.callback(sys.setrecursionlimit, self._depth)
            stack.callback(sys.settrace, sys.gettrace())
            stack.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
            sys.unraisablehook = lambda _: None  # a destructor that is stopped would print a traceback
            stack.enter_context(redirect_stdout(self._output))
            stack.enter_context(redirect_stderr(self._output))
            stack.enter_context(_short_warnings())
            stack.enter_context(_harmless_builtins(self.namespace))
            if threading.current_thread() is threading.main_thread():
                stack.enter_context(_handler(signal.SIGINT, self._strike))
                stack.enter_context(self._alarm() if self.timer else self._metronome())
            self._cleanup = stack.pop_all()
        self._running = True
        if self.stopped:  # the user was quicker
            self._hurry(TICK)
        return self

    def __exit__(self, kind: type | None, error: object, traceback: object) -> bool:
        self._running = False  # from here on nothing is struck, so that the clean-up is never cut short
        self._cleanup.close()
        self._outside = None  # it holds this object
        if self.stopped == "interrupt":
            raise KeyboardInterrupt from None
        return kind is not None and issubclass(kind, Stop)

    def _strike(self, signum: int, frame: FrameType | None) -> None:
        """Handles both signals: the timer's and the user's (which on Windows the metronome imitates)."""
        if signum == signal.SIGINT and not self._imitated:
            self.stopped = "interrupt"
        if not self._running:
            return
        # room for what follows: code that swallows RecursionError may stand at the limit
        sys.setrecursionlimit(max(sys.getrecursionlimit(), self._depth + 100 * min(10, 1 + self._strikes)))
        if self.stopped == "interrupt":
            self._hurry(TICK)
        self.stopped = self.stopped or "time"
        if frame and not _is_in(globals(), frame):  # else the next tick is soon
            self._stop(frame)

    def _flooded(self) -> None:
        if self._running:
            self.stopped = self.stopped or "output"
            self._stop(sys._getframe(2))

    def _stop(self, frame: FrameType) -> None:
        self.line = self.line or line_in(self.namespace, frame=frame)
        self._strikes += 1
        if self._strikes > PATIENCE:
            self._trace_from(frame)
        raise Stop(self._freed)

    def _freed(self) -> None:
        if self._running and self._strikes > PATIENCE:
            self._trace_from(sys._getframe(2))

    def _trace_from(self, frame: FrameType | None) -> None:
        """Makes the next line raise: sooner or later that is one which stands in no `try`.

        Python stops tracing when a trace function raises, so this is done again as soon as the exception is swallowed.
        """
        while frame and frame is not self._outside and frame.f_trace != self._raise_here:
            frame.f_trace = self._raise_here
            frame = frame.f_back
        sys.settrace(self._raise_here)

    def _raise_here(self, frame: FrameType, event: str, arg: object) -> Callable:
        if self._running and event != "exception" and not _is_in(globals(), frame):
            raise Stop(self._freed)
        return self._raise_here

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        """Strikes after `seconds` and then at every tick, by SIGALRM: ends a sleep, a regex, a huge sum too."""
        self._hurry = lambda delay: signal.setitimer(signal.ITIMER_REAL, delay, TICK)
        with _handler(signal.SIGALRM, self._strike):
            start = time.monotonic()
            delay, interval = signal.setitimer(signal.ITIMER_REAL, self.seconds, TICK)
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        if delay:  # somebody else's timer goes on
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, delay - (time.monotonic() - start)), interval)

    @contextmanager
    def _metronome(self) -> Iterator[None]:
        """The same by a thread that interrupts the main one."""
        delay, done = [self.seconds], threading.Event()

        def hurry(seconds: float) -> None:
            delay[0] = seconds

        def tick() -> None:
            start = time.monotonic()
            while not done.wait(min(TICK, delay[0])):
                if time.monotonic() - start >= delay[0]:
                    self._imitated = self.stopped != "interrupt"
                    _thread.interrupt_main()

        self._hurry = hurry
        thread = threading.Thread(target=tick, name="exercise-time-limit", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


class _Output(io.TextIOBase):
    """Takes what is printed, keeps its beginning, and reports a flood."""

    encoding = "utf-8"

    def __init__(self, flooded: Callable[[], None]):
        self.kept, self.length, self._flooded = "", 0, flooded

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.kept += text[: max(0, SHOWN - len(self.kept))]
        self.length += len(text)
        if self.length > FLOOD:
            self._flooded()
        return len(text)


def line_in(namespace: dict[str, Any], frame: FrameType | None = None, traceback: TracebackType | None = None) -> str:
    """The innermost line of the learner's own code, whose globals are `namespace`: "line 3: `code`", or ""."""
    place = None
    while frame and not place:
        caller_tells_more = frame.f_lineno == frame.f_code.co_firstlineno and _is_in(namespace, frame.f_back)
        if _is_in(namespace, frame) and not caller_tells_more:
            place = frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    while traceback:
        if _is_in(namespace, traceback.tb_frame):
            place = traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
    if not place:
        return ""
    code = linecache.getline(*place).strip()
    return f"line {place[1]}: `{code}`" if code else f"line {place[1]}"


def _is_in(namespace: dict[str, Any], frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals is namespace


@contextmanager
def _handler(signum: int, handler) -> Iterator[None]:
    before = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, before if before is not None else signal.SIG_DFL)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Prints a warning without the path of the file that it comes from."""

    def showwarning(message, category, *_, **__):
        print(f"{category.__name__}: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = showwarning
        yield


@contextmanager
def _harmless_builtins(namespace: dict[str, Any]) -> Iterator[None]:
    """Keeps `exit()` and `quit()` from ending the kernel, and `input()` from waiting for an answer."""

    def leave(*_):
        raise SystemExit

    def ask(*_):
        raise EOFError("nobody answers input() while an exercise is checked")

    ours = {"exit": leave, "quit": leave, "input": ask}
    before = [(vars(builtins), name) for name in ours if name in vars(builtins)]
    # IPython takes exit and quit out of the builtins and puts its own into the notebook
    before += [(namespace, name) for name in ours if type(namespace.get(name)).__name__.endswith("Autocall")]
    before = [(place, name, place[name]) for place, name in before]
    for place, name, _ in before:
        place[name] = ours[name]
    try:
        yield
    finally:
        for place, name, value in before:
            place[name] = value
