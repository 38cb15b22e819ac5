"""What is said of a machine."""

import importlib.metadata

import pytest

from moe_lab.machine import interpreter_problem, machine


def test_a_record_says_where_it_was_measured():
    found = machine()
    assert {"cpu", "system", "python", "torch"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.7.1", "2.4.6", True), ("3.6.0+git1", "2.10.0rc1", False)],
)
def test_an_old_interpreter_and_a_new_numpy(monkeypatch, triton, numpy, works):
    monkeypatch.setattr(importlib.metadata, "version", {"triton": triton, "numpy": numpy}.__getitem__)
    said = interpreter_problem()
    assert bool(said) is not works
    assert works or (triton in said and numpy in said and "pip install 'numpy<2.4'" in said)


def test_without_triton_there_is_nothing_to_say(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert interpreter_problem() == ""
