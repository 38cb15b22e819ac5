"""The progress file: nothing recorded is lost, whatever happens; nothing is recorded that no learner did."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import example_chapter
import pytest
from filelock import FileLock
from kernels import Kernel

from moe_lab import paths
from moe_lab.course import exercise, progress, show_progress
from moe_lab.course.progress import Record, append, load


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "progress" / "progress.jsonl"


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# --- what is remembered -------------------------------------------------------------------------------------------


def test_the_best_status_the_attempts_and_the_last_mistake_are_remembered(file):
    for status, mistake in [
        ("wrong", "no gate"),
        ("failed", None),
        ("passed", None),
        ("wrong", "bias"),
        ("wrong", None),
    ]:
        append(file, "1.2", status, mistake)
    append(file, "1.3", "failed", None)
    assert load(file).exercises == {
        "1.2": Record(status="passed", attempts=5, last_mistake="bias"),
        "1.3": Record(status="failed", attempts=1),
    }


def test_a_line_holds_version_time_exercise_status_and_mistake(file):
    append(file, "1.2", "wrong", "no gate")
    (event,) = lines(file)
    assert event.pop("time").endswith("+00:00")
    assert event == {"v": 1, "exercise": "1.2", "status": "wrong", "mistake": "no gate"}


def test_no_file_is_no_progress(file):
    assert load(file).exercises == {}
    assert not file.parent.exists()


def test_lines_of_a_newer_course_are_kept_and_not_counted(file):
    file.parent.mkdir()
    file.write_text('{"v": 2, "exercise": "1.2", "status": "skipped", "mistake": null, "new": []}\n')
    assert (load(file).exercises, load(file).damage) == ({}, "")
    append(file, "1.2", "passed", None)
    assert len(lines(file)) == 2


# --- crashes ------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_ignored_and_the_next_line_begins_afresh(file):
    append(file, "1.1", "passed", None)
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole + whole[:cut])
        known = load(file)
        assert known.damage == ""
        assert known.exercises["1.1"].attempts == (2 if cut == len(whole) - 1 else 1)
        append(file, "1.2", "passed", None)
        known = load(file)
        assert {"1.1", "1.2"} <= set(known.exercises)
        assert bool(known.damage) == (cut < len(whole) - 1)  # now it is not the last line any more
        file.unlink()
        file.write_bytes(whole)


APPEND_FOR_EVER = """
import sys
from pathlib import Path
from moe_lab.course.progress import append
for i in range(int(sys.argv[3])):
    append(Path(sys.argv[1]), sys.argv[2] + str(i), "passed", None)
    print(i, flush=True)
"""


def appender(file: Path, name: str, times: int) -> subprocess.Popen:
    command = [sys.executable, "-c", APPEND_FOR_EVER, str(file), name, str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_loses_nothing_that_it_had_recorded(file):
    for i in range(4):
        child = appender(file, f"run {i}, ", 10**6)
        confirmed = [child.stdout.readline() for _ in range(20 + 7 * i)]
        child.kill()
        child.wait()
        known = load(file)
        assert known.damage == ""
        assert {f"run {i}, {int(number)}" for number in confirmed} <= set(known.exercises)
        child.stdout.close()


def test_two_processes_and_a_mender_lose_nothing(file):
    children = [appender(file, f"process {i}, ", 300) for i in range(2)]
    said = []
    while any(child.poll() is None for child in children):
        if file.exists() and len(said) < 5:
            with FileLock(file.with_suffix(".lock")), open(file, "ab") as stream:
                stream.write(b"damage\n")
            said.append(load(file).damage)
        time.sleep(0.05)
    for child in children:
        child.communicate()
    assert said
    assert all(said)
    assert len(list(file.parent.glob("progress.damaged-*.jsonl"))) == len(said)
    known = load(file)
    assert known.damage == ""
    assert set(known.exercises) == {f"process {i}, {j}" for i in range(2) for j in range(300)}
    assert len(lines(file)) == 600


# --- damage -------------------------------------------------------------------------------------------------------


DAMAGE = {
    "flipped": lambda whole, at: whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :],
    "removed": lambda whole, at: whole[:at] + whole[at + 1 :],
    "newline": lambda whole, at: whole[:at] + b"\n" + whole[at + 1 :],
    "zeros": lambda whole, at: whole[:at] + b"\0" * 9 + whole[at + 9 :],
    "cut": lambda whole, at: whole[:at],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_at_every_byte_costs_only_the_line_that_it_hits(file, kind):
    for i in range(3):
        append(file, f"1.{i}", "wrong", "no gate")
    whole = file.read_bytes()
    length = len(whole) // 3
    for at in range(len(whole)):
        # a line's last byte joins it with the next one; what was cut off is gone
        hit = set(range(at // length, min(2, (at + (9 if kind == "zeros" else 1)) // length) + 1))
        hit |= set(range(min(hit), 3)) if kind == "cut" else set()
        damaged = DAMAGE[kind](whole, at)
        file.write_bytes(damaged)
        known = load(file)
        assert {f"1.{i}" for i in set(range(3)) - hit} <= set(known.exercises)
        copies = list(file.parent.glob("progress.damaged-*"))
        if known.damage:
            assert [copy.read_bytes() for copy in copies] == [damaged]
            assert copies[0].name in known.damage
            assert load(file).damage == ""  # said once
            copies[0].unlink()
        else:
            assert not copies
            silent = 3 - sum(record.attempts for record in known.exercises.values())
            assert silent == 0 or kind == "cut" or (silent == 1 and 2 in hit)  # the last line may be a torn one


@pytest.mark.parametrize("content", [b"\xff" * 500, b'[]\n1\nnull\n"x"\n{}\n', b"[" * 100_000 + b"\n", b"\n\n\n", b""])
def test_any_content_can_be_read(file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    load(file)
    append(file, "1.1", "passed", None)
    assert load(file).exercises["1.1"].status == "passed"


def test_copies_of_damaged_files_never_overwrite_each_other(file):
    for i in range(3):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"damage %d\n" % i)
        load(file)
    kept = {copy.read_bytes() for copy in file.parent.glob("progress.damaged-*.jsonl")}
    assert kept == {b"damage 0\n", b"damage 1\n", b"damage 2\n"}


# --- no place to write --------------------------------------------------------------------------------------------


@pytest.fixture
def live(monkeypatch, file):
    """A learner at work, whose file is `file`; with the example chapter."""
    monkeypatch.setattr(progress, "is_live", lambda namespace: True)
    monkeypatch.setattr(paths, "progress_file", lambda: file)
    monkeypatch.setitem(sys.modules, "moe_lab.course.chapters.ch98", example_chapter)
    monkeypatch.setattr(progress, "_this_run", {})
    monkeypatch.setattr(progress, "_said", set())


def solve(id: str = "98.3") -> None:
    exercise(id)(example_chapter.depth)


def test_a_folder_that_cannot_be_written_costs_one_sentence(live, file, capsys):
    file.parent.write_text("a file stands where the folder should be")
    solve()
    solve()
    said = capsys.readouterr().out
    assert said.count("passed") == 2
    assert said.count("Your progress could not be recorded (File exists); the exercises work all the same.") == 1


def test_a_lock_that_is_never_free_costs_one_sentence(live, file, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.1)
    file.parent.mkdir()
    with FileLock(file.with_suffix(".lock")):
        solve()
    assert "Your progress could not be recorded" in capsys.readouterr().out


def test_damage_that_cannot_be_mended_is_told_and_the_rest_is_read(file, monkeypatch):
    append(file, "1.1", "passed", None)
    with open(file, "ab") as stream:
        stream.write(b"damage\n")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(progress, "FileLock", refuse)
    known = load(file)
    assert known.exercises["1.1"].status == "passed"
    assert "could not be mended (Permission denied)" in known.damage


def test_a_folder_in_place_of_the_file_is_told(file):
    file.mkdir(parents=True)
    assert "cannot be read" in load(file).damage


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of a file")
def test_a_full_disk_leaves_the_file_as_it_was(file):
    append(file, "1.1", "passed", None)
    before = file.read_bytes()
    code = (
        "import resource, sys; from pathlib import Path; from moe_lab.course.progress import append\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 20},) * 2)\n"
        "try: append(Path(sys.argv[1]), '1.2', 'passed', None)\nexcept OSError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.stdout == "the disk is full\n", done.stderr
    assert file.read_bytes() == before


# --- who is recorded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("session", "vscode", "kernel", "pytest_version", "is_live"),
    [
        ("/course/notebooks/01_dense_ffn.ipynb", None, True, None, True),
        ("/solutions/course/notebooks/01_dense_ffn.ipynb", None, True, None, True),
        ("/course/solutions/01_dense_ffn.ipynb", None, True, None, False),
        ("/course/lessons/01_dense_ffn.py", None, True, None, False),
        (None, "/course/notebooks/01_dense_ffn.ipynb", True, None, True),
        (None, "/course/solutions/01_dense_ffn.ipynb", True, None, False),
        (None, None, True, None, False),
        ("/course/notebooks/01_dense_ffn.ipynb", None, False, None, False),
        ("/course/notebooks/01_dense_ffn.ipynb", None, True, "9.2", False),
    ],
)
def test_only_a_learner_in_a_notebook_is_recorded(monkeypatch, session, vscode, kernel, pytest_version, is_live):
    for name, value in (("JPY_SESSION_NAME", session), ("PYTEST_VERSION", pytest_version)):
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    shell = SimpleNamespace(kernel=None) if kernel else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert progress.is_live({"__vsc_ipynb_file__": vscode} if vscode else {}) == is_live


def test_this_suite_records_nothing(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "moe_lab.course.chapters.ch98", example_chapter)
    monkeypatch.setattr(paths, "progress_file", lambda: file)
    monkeypatch.setenv("JPY_SESSION_NAME", "/course/notebooks/01_dense_ffn.ipynb")
    solve()
    assert not file.parent.exists()


SOLVED = """
@exercise('98.3')
def depth(tree):
    return 1 + max(map(depth, tree), default=0) if isinstance(tree, list) else 0"""


def test_a_kernel_restart_remembers_and_a_solution_is_not_recorded(tmp_path):
    for name in ("notebooks", "solutions", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "corpus.json").write_text("{}")
    recorded = tmp_path / "progress" / "progress.jsonl"

    def kernel(folder: str) -> Kernel:
        return Kernel(5, session=str(tmp_path / folder / "98.ipynb"), cwd=tmp_path / folder)

    first = kernel("solutions")
    assert "passed" in first.run(SOLVED)
    first.close()
    assert not recorded.exists()

    second = kernel("notebooks")
    assert "passed" in second.run(SOLVED)
    second.run("@exercise('98.1')\ndef combine(rows, weights):\n    return rows.mean(1)")
    second.close()
    assert [(e["exercise"], e["status"], e["mistake"]) for e in lines(recorded)] == [
        ("98.3", "passed", None),
        ("98.1", "wrong", "weights not used"),
    ]

    third = kernel("notebooks")
    assert "98.3  Depth             not started here, passed before" in third.run("show_progress('98')")
    third.close()


# --- what is shown ------------------------------------------------------------------------------------------------


def test_the_end_of_a_notebook_shows_this_run(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "moe_lab.course.chapters.ch98", example_chapter)
    monkeypatch.setattr(progress, "_this_run", {})
    solve()
    exercise("98.1")(example_chapter.unweighted)
    capsys.readouterr()
    show_progress("98")
    assert capsys.readouterr().out == (
        "Exercises of notebook 98\n"
        "  98.1  Weighted combine  not right yet\n"
        "  98.2  A gate            not started\n"
        "  98.3  Depth             passed\n"
    )


def test_the_table_has_icons_and_words_and_escapes():
    html = progress.Table("T", (("1.1", "a < b", "passed", ""),), "note")._repr_mimebundle_()["text/html"]
    assert "✔" in html
    assert "<strong>passed</strong>" in html
    assert "a &lt; b" in html


@pytest.fixture
def one_chapter(live, monkeypatch):
    monkeypatch.setattr("moe_lab.course.progress.chapters", lambda: [98])


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    progress.add_arguments(parser)
    return progress.main(parser.parse_args(arguments))


def test_the_command_prints_every_chapter(one_chapter, capsys):
    solve()
    exercise("98.1")(example_chapter.unweighted)
    capsys.readouterr()
    assert run_command() == 0
    assert capsys.readouterr().out == (
        "notebook 98  [#~.]  1 of 3 passed\n  98.1 Weighted combine: tried 1 ×, last: weights not used\n"
    )


def test_the_command_tells_damage(one_chapter, file, capsys):
    solve()
    file.write_bytes(b"damage\n" + file.read_bytes())
    run_command()
    assert "1 of 2 lines of your progress file could not be read. The others were kept" in capsys.readouterr().out
    run_command()
    assert "could not be read" not in capsys.readouterr().out


def test_a_reset_keeps_what_was(one_chapter, file, capsys):
    solve()
    before = file.read_bytes()
    run_command("--reset")
    assert [copy.read_bytes() for copy in file.parent.glob("progress.before-*.jsonl")] == [before]
    assert load(file).exercises == {}
    run_command("--reset")
    assert "Nothing is recorded yet." in capsys.readouterr().out


def test_a_reset_that_cannot_be_done_is_told(one_chapter, file):
    file.parent.write_text("a file stands where the folder should be")
    with pytest.raises(paths.CourseError, match="could not be set aside"):
        run_command("--reset")
