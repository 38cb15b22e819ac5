"""The learner's own record of exercises tried and passed; survives a crash at any moment and two kernels at once."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from filelock import FileLock

from moe_lab import paths
from moe_lab.course.bank import chapters, load_chapter
from moe_lab.course.display import MUTED, badge, present, word

VERSION = 1
PATIENCE = 5.0
"""Seconds to wait for another kernel that is writing."""
_UNUSABLE = (OSError, NotImplementedError)  # the second: a file system without locks
_RANK = {"not started": 0, "failed": 1, "wrong": 1, "passed": 2}

_this_run: dict[str, str] = {}
"""Status of each exercise in this kernel, by id."""


@dataclass
class Record:
    """What is known of one exercise: the best status so far, how often it was tried, the last mistake named."""

    status: str = "not started"
    attempts: int = 0
    last_mistake: str | None = None


@dataclass
class Progress:
    """What the file knows, by exercise id; `damage` is a sentence when a part of it could not be read."""

    exercises: dict[str, Record] = field(default_factory=dict)
    damage: str = ""


# --- Writing ------------------------------------------------------------------------------------------------------


def record(exercise: str, status: str, mistake: str | None, namespace: dict[str, Any]) -> None:
    """Remembers an outcome: in this kernel always, in the learner's file if a learner is at work and has tried."""
    _this_run[exercise] = status
    if status != "not started" and is_live(namespace):
        try:
            append(paths.progress_file(), exercise, status, mistake)
        except (*_UNUSABLE, paths.CourseError) as error:
            _say_once(f"Your progress could not be recorded ({_reason(error)}); the exercises work all the same.")


def is_live(namespace: dict[str, Any]) -> bool:
    """Whether a learner works in a notebook just now: in Jupyter or VS Code, in no solution and in no test."""
    notebook = namespace.get("__vsc_ipynb_file__") or os.environ.get("JPY_SESSION_NAME")
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not notebook or not hasattr(shell, "kernel") or "PYTEST_VERSION" in os.environ:
        return False
    return Path(notebook).parent.name not in ("solutions", "lessons")


def append(file: Path, exercise: str, status: str, mistake: str | None) -> None:
    """Adds one line to the file; a line that a crash had cut short stays as it is, and this one begins afresh.

    Raises:
        OSError: the line could not be written whole; the file is then as it was.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    event = {"v": VERSION, "time": now, "exercise": exercise, "status": status, "mistake": mistake}
    line = json.dumps(event).encode() + b"\n"
    with _lock(file), open(file, "ab+", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(-1, os.SEEK_END)
            line = line if stream.read(1) == b"\n" else b"\n" + line
        try:
            if stream.write(line) != len(line):
                raise OSError("the disk is full")
            os.fsync(stream.fileno())
        except OSError:
            stream.truncate(size)
            raise


# --- Reading ------------------------------------------------------------------------------------------------------


def load(file: Path | None = None) -> Progress:
    """Reads the learner's file. A damaged one is set aside as a copy, and its good lines go on."""
    file = file or paths.progress_file()
    if not file.exists():
        return Progress()
    good: list[bytes] = []
    damage = ""
    try:
        good, bad = _parse(file.read_bytes())
        if bad:
            with _lock(file):
                good, bad = _parse(file.read_bytes())  # another kernel may have mended it by now
                damage = _mend(file, good, bad) if bad else ""
    except _UNUSABLE as error:  # cannot be written: what can be read of it still counts
        damage = f"Parts of {file.name} cannot be read, and it could not be mended ({_reason(error)})."
    progress = Progress(damage=damage)
    for line in good:
        _count(progress, json.loads(line))
    return progress


def _parse(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """Good and damaged lines. The last one, cut short by a crash or just being written, is neither."""
    *lines, tail = data.split(b"\n")
    good, bad = [], []
    for line in lines:
        if line:
            (good if _is_event(line) else bad).append(line)
    if _is_event(tail):
        good.append(tail)
    return good, bad


def _is_event(line: bytes) -> bool:
    try:
        event = json.loads(line)
        version, exercise, status, mistake = (event[key] for key in ("v", "exercise", "status", "mistake"))
        typed = isinstance(version, int) and isinstance(exercise, str) and isinstance(mistake, str | None)
        return typed and (status in _RANK or version > VERSION)  # a newer course may know more
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _count(progress: Progress, event: dict[str, Any]) -> None:
    if event["v"] > VERSION:
        return
    known = progress.exercises.setdefault(event["exercise"], Record())
    known.status = max(known.status, event["status"], key=_RANK.__getitem__)
    known.attempts += 1
    known.last_mistake = event["mistake"] or known.last_mistake


def _mend(file: Path, good: list[bytes], bad: list[bytes]) -> str:
    """Puts a copy of a damaged file beside it, keeps the good lines, and says so in a sentence."""
    copy = set_aside(file, "damaged")
    whole = file.with_suffix(".mended")
    with open(whole, "wb") as stream:
        stream.write(b"".join(line + b"\n" for line in good))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(whole, file)
    return (
        f"{len(bad)} of {len(good) + len(bad)} lines of your progress file could not be read. The others were kept; "
        f"the damaged file is {copy.name}, beside it."
    )


def set_aside(file: Path, why: str) -> Path:
    """Copies the file to `progress.<why>-<UTC time>.jsonl` and returns the copy's path; overwrites nothing."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for name in (now, *(f"{now}-{i}" for i in range(2, 1000))):
        copy = file.with_name(f"{file.stem}.{why}-{name}{file.suffix}")
        with suppress(FileExistsError), open(copy, "xb") as stream:
            stream.write(file.read_bytes())
            return copy
    raise FileExistsError(f"too many copies of {file.name}")


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock"), timeout=PATIENCE):
        yield


# --- Showing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """The state of a chapter's exercises, as rows (id, title, status, remark); shows itself in a notebook."""

    title: str
    rows: tuple[tuple[str, str, str, str], ...]
    note: str = ""

    def __str__(self) -> str:
        width = max((len(title) for _, title, _, _ in self.rows), default=0)
        lines = [f"  {id:<5} {title:<{width}}  {word(status)}{remark}" for id, title, status, remark in self.rows]
        return "\n".join([self.title, *lines, *filter(None, [self.note])])

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        cell = "<td style='text-align: left; padding: 0.1em 1.5em 0.1em 0'>"
        rows = "".join(
            f"<tr>{cell}{escape(id)}</td>{cell}{escape(title)}</td>{cell}{badge(status)}{escape(remark)}</td></tr>"
            for id, title, status, remark in self.rows
        )
        note = f"<div style='{MUTED}'>{escape(self.note)}</div>" if self.note else ""
        table = f"<table style='color: inherit; font-size: inherit'>{rows}</table>"
        html = f"<div><strong>{escape(self.title)}</strong>{table}{note}</div>"
        return {"text/html": html, "text/plain": str(self)}


def show_progress(chapter: str | int) -> None:
    """Shows how each exercise of a chapter did in this kernel and, where a learner is at work, in earlier ones."""
    live, known = is_live(sys._getframe(1).f_globals), Progress()
    if live:
        with suppress(paths.CourseError):
            known = load()
    rows = []
    for exercise in load_chapter(int(chapter)).EXERCISES:
        status, before = _this_run.get(exercise.id, "not started"), known.exercises.get(exercise.id)
        remark = " here, passed before" if before and before.status == "passed" != status else ""
        rows.append((exercise.id, exercise.title, status, remark))
    present(Table(f"Exercises of notebook {int(chapter):02d}", tuple(rows), known.damage))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `moe-lab progress`."""
    parser.add_argument("--reset", action="store_true", help="start afresh; the file so far is kept under another name")


def main(args: argparse.Namespace) -> int:
    """Prints every chapter with a bar, or starts the record afresh."""
    file = paths.progress_file()
    if args.reset:
        return _reset(file)
    progress = load(file)
    for number in chapters():
        exercises = load_chapter(number).EXERCISES
        records = [progress.exercises.get(exercise.id, Record()) for exercise in exercises]
        passed = sum(known.status == "passed" for known in records)
        tried = sum(known.attempts > 0 for known in records) - passed
        bar = "#" * passed + "~" * tried + "." * (len(records) - passed - tried)
        print(f"notebook {number:02d}  [{bar}]  {passed} of {len(records)} passed")
        for exercise, known in zip(exercises, records, strict=True):
            if known.attempts and known.status != "passed":
                last = known.last_mistake or word(known.status)
                print(f"  {exercise.id} {exercise.title}: tried {known.attempts} ×, last: {last}")
    if progress.damage:
        print(progress.damage)
    return 0


def _reset(file: Path) -> int:
    try:
        with _lock(file):
            if file.exists():
                kept = set_aside(file, "before").name
                file.unlink()
                print(f"Your progress so far is kept as {kept}; from now on it counts afresh.")
            else:
                print("Nothing is recorded yet.")
    except _UNUSABLE as error:
        raise paths.CourseError(f"The progress file could not be set aside ({_reason(error)}).") from error
    return 0


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


_said: set[str] = set()


def _say_once(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        print(sentence)
