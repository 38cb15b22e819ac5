"""The moe-lab command: one sub-command's module at a time, sentences for mistakes, exit statuses."""

import importlib
import os
import subprocess
import sys
import types

import pytest

from moe_lab import __version__, cli
from moe_lab.paths import CourseError


def fake(main) -> types.SimpleNamespace:
    return types.SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--port", type=int), main=main)


@pytest.fixture
def doctor(monkeypatch):
    """Puts a function in place of the doctor's module; returns what was imported."""
    imported = []

    def replace(main):
        def load(name):
            imported.append(name)
            return fake(main)

        monkeypatch.setattr(importlib, "import_module", load)
        return imported

    return replace


def test_only_the_module_asked_for_is_imported(doctor):
    imported = doctor(lambda args: args.port)
    assert cli.main(["doctor", "--port", "5"]) == 5
    assert imported == ["moe_lab.course.doctor"]


def test_a_mistake_is_one_sentence(doctor, capsys):
    def fail(args):
        raise CourseError("No corpus: bring it back.")

    doctor(fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr() == ("", "No corpus: bring it back.\n")


def test_ctrl_c_is_quiet(doctor, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    doctor(interrupt)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "")


def test_without_a_command_it_explains_itself(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} " in said for name in cli.COMMANDS)


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doktor"])
    assert stopped.value.code == 2
    assert "doktor" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_module(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"moe-lab {name}" in capsys.readouterr().out


def test_python_m_moe_lab_is_the_same():
    done = subprocess.run([sys.executable, "-m", "moe_lab", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"moe-lab {__version__}")


def test_a_poor_terminal_gets_a_question_mark_and_no_traceback():
    code = "from moe_lab import cli; cli.main(['--nothing ×'])"
    poor = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=poor)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
