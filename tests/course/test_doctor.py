"""The doctor: everything that can be wrong is a finding with its remedy, and nothing private gets into a notebook."""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import types
from importlib import metadata

import pytest
import torch

from moe_lab import data
from moe_lab.course import doctor
from moe_lab.course.doctor import Finding
from moe_lab.paths import CourseNotFound, course_root


def find(name: str) -> Finding:
    return next(finding for finding in doctor.diagnose() if finding.name == name)


def only(monkeypatch, name: str) -> None:
    """The rest is not looked at, which saves seconds."""
    monkeypatch.setattr(doctor, "LOOKS", {name: doctor.LOOKS[name]})


def assert_told(finding: Finding, status: str, says: str) -> None:
    assert finding.status == status
    assert says in finding.says
    assert finding.remedy.endswith(".")


# --- This machine ---------------------------------------------------------------------------------------------------


def test_this_machine_can_run_the_course():
    findings = {finding.name: finding for finding in doctor.diagnose()}
    assert set(findings) == set(doctor.LOOKS)
    assert [name for name, finding in findings.items() if finding.status == "problem"] == []
    assert platform.python_version() in findings["Python"].says
    assert torch.__version__ in findings["PyTorch"].says
    assert "checksums right" in findings["Corpus"].says


def test_a_notebook_gets_no_path_host_or_disk_figure(monkeypatch, capsys):
    details = [finding.detail for finding in doctor.diagnose() if finding.detail]
    assert any("GB" in detail for detail in details)
    doctor.doctor()
    said = capsys.readouterr().out
    assert not any(detail in said for detail in details)
    assert str(course_root()) not in said
    assert platform.node() not in said
    assert not re.search(r"\d GB|(?<![\w.])/\w|[A-Z]:\\", said)


def test_nothing_decides_how_triton_runs():
    code = "from moe_lab.course.doctor import diagnose; diagnose(); import sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- What can be wrong ----------------------------------------------------------------------------------------------


def test_a_torch_that_does_not_start_is_a_finding(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    broken = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "moe_lab", "doctor"], capture_output=True, text=True, env=broken)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert re.search(r"problem +PyTorch +does not work: OSError \(libcudart.so.13: cannot open", done.stdout)
    assert re.search(r"ok +Python", done.stdout)
    assert "-> Delete the folder .venv" in done.stdout


def test_a_wrong_gradient(monkeypatch):
    only(monkeypatch, "PyTorch")
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    assert_told(find("PyTorch"), "problem", "wrong gradient")


def test_a_torch_outside_the_tested_range(monkeypatch):
    only(monkeypatch, "PyTorch")
    monkeypatch.setattr(torch, "__version__", "9.1.0+cpu")
    assert_told(find("PyTorch"), "note", "9.1.0+cpu works; the course was tested with")


def test_a_python_outside_the_tested_range(monkeypatch):
    only(monkeypatch, "Python")
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.4")
    assert_told(find("Python"), "problem", "3.10.4")


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_triton_has_no_package_for_some(monkeypatch, system):
    only(monkeypatch, "Triton")
    monkeypatch.setattr(sys, "platform", system)
    assert_told(find("Triton"), "note", "no package for")


def test_triton_is_missing_on_linux(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    only(monkeypatch, "Triton")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(metadata, "version", missing)
    assert_told(find("Triton"), "problem", "not installed")


@pytest.mark.parametrize(("cuda", "says"), [(False, "interpreter"), (True, "compiles for the GPU")])
def test_triton_with_and_without_a_gpu(monkeypatch, cuda, says):
    only(monkeypatch, "Triton")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(metadata, "version", lambda name: "3.7.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert find("Triton").status == "ok"
    assert says in find("Triton").says


def test_a_gpu_is_named_with_its_memory(monkeypatch):
    only(monkeypatch, "GPU")
    card = types.SimpleNamespace(name="NVIDIA H200", total_memory=139.8 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert find("GPU") == Finding("GPU", "ok", "NVIDIA H200 with 140 GiB, NVIDIA H200 with 140 GiB")


def test_a_gpu_that_torch_does_not_use(monkeypatch):
    only(monkeypatch, "GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda program: "/usr/bin/nvidia-smi")
    assert_told(find("GPU"), "note", "does not use the NVIDIA GPU")


def test_no_gpu_is_fine(monkeypatch):
    only(monkeypatch, "GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert find("GPU").status == "ok"


def test_a_missing_piece_of_jupyter(monkeypatch):
    only(monkeypatch, "Jupyter")
    monkeypatch.setattr(doctor, "JUPYTER_PIECES", ("jupyterlab", "no_such_piece"))
    assert_told(find("Jupyter"), "problem", "no_such_piece not installed")


def test_ranks_need_ipyparallel_and_gloo(monkeypatch):
    only(monkeypatch, "Ranks")
    assert find("Ranks").status == "ok"
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    assert_told(find("Ranks"), "note", "simulates")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert_told(find("Ranks"), "problem", "ipyparallel not installed")


@pytest.mark.parametrize(("python", "status"), [(sys.executable, "ok"), (sys.executable + "s/python", "problem")])
def test_a_kernel_spec_that_names_its_python(monkeypatch, tmp_path, python, status):
    only(monkeypatch, "Kernel")
    spec = {"argv": [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "Python 3"}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    assert find("Kernel").status == status


@pytest.mark.parametrize(
    ("source", "status", "says"), [("", "note", "from another folder"), ("import nothing", "problem", "cannot import")]
)
def test_another_moe_lab(monkeypatch, tmp_path, source, status, says):
    only(monkeypatch, "Package")
    (tmp_path / "moe_lab").mkdir()
    (tmp_path / "moe_lab" / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert_told(find("Package"), status, says)


def test_a_missing_corpus(monkeypatch, tmp_path):
    only(monkeypatch, "Corpus")
    monkeypatch.setattr(data, "data_dir", lambda: tmp_path)
    assert_told(find("Corpus"), "problem", "cannot be read")
    assert "corpus.json" in find("Corpus").detail


@pytest.mark.parametrize(("free", "status"), [(0.1e9, "problem"), (1e9, "note"), (50e9, "ok")])
def test_the_disk(monkeypatch, free, status):
    only(monkeypatch, "Disk")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    assert find("Disk").status == status
    assert bool(find("Disk").remedy) == (status != "ok")


def test_progress_that_cannot_be_saved(monkeypatch):
    def refuse(**_):
        raise PermissionError("read-only")

    only(monkeypatch, "Progress")
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert_told(find("Progress"), "problem", "cannot be saved")


def test_outside_of_the_course(monkeypatch):
    def lost():
        raise CourseNotFound("No MoE Lab course here.")

    only(monkeypatch, "Disk")
    monkeypatch.setattr(doctor, "course_root", lost)
    assert_told(find("Disk"), "problem", "cannot be looked at")


# --- How it is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "expected"), [("ok", 0), ("note", 0), ("problem", 1)])
def test_the_exit_status(monkeypatch, capsys, status, expected):
    monkeypatch.setattr(doctor, "LOOKS", {"Disk": lambda: (status, "nearly full", "Free some space.", "1.0 GB free")})
    assert doctor.main(argparse.Namespace()) == expected
    assert "(1.0 GB free)" in capsys.readouterr().out


def test_the_table_is_aligned():
    findings = [Finding("A", "ok", "word " * 30), Finding("Longer", "problem", "broken", "Mend it.", "detail")]
    lines = doctor.table(findings).splitlines()
    assert lines[0].startswith("ok       A       word")
    assert lines[1].startswith(" " * 17 + "word")
    assert lines[-2:] == ["problem  Longer  broken (detail)", " " * 15 + "  -> Mend it."]
    assert max(map(len, lines)) <= 112
