"""environment.yml asks for what pyproject.toml asks for, and the workflows call the course's own commands."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
NOT_ON_CONDA_FORGE = {"triton"}  # comes through pip, for Linux alone


def conda_requirements() -> dict[str, SpecifierSet]:
    lines = [line for line in ENVIRONMENT["dependencies"] if isinstance(line, str)]
    pairs = (re.fullmatch(r"([\w-]+)(?: (\S+))?", line).groups("") for line in lines)
    return {CONDA_NAMES.get(name, name): SpecifierSet(versions) for name, versions in pairs}


def test_conda_gets_what_pip_gets():
    wanted = {item.name: item.specifier for item in map(Requirement, PROJECT["dependencies"])}
    wanted = {name: versions for name, versions in wanted.items() if name not in NOT_ON_CONDA_FORGE}
    assert conda_requirements() == wanted | {"python": SpecifierSet(PROJECT["requires-python"]), "pip": SpecifierSet()}


def test_pip_within_conda_gets_the_rest_and_the_course():
    (block,) = (entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))
    wanted = {line for line in map(Requirement, PROJECT["dependencies"]) if line.name in NOT_ON_CONDA_FORGE}
    assert block[-1] == "-e ."
    assert set(map(Requirement, block[:-1])) == wanted


def test_conda_forge_is_the_only_channel():
    assert set(ENVIRONMENT["channels"]) - {"nodefaults"} == {"conda-forge"}


# --- Continuous integration -----------------------------------------------------------------------------------------

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
JOBS = WORKFLOW["jobs"]


@pytest.mark.parametrize("name", JOBS)
def test_every_job_runs_the_suite_with_bounds(name):
    job = JOBS[name]
    assert job["steps"][-1]["run"] == "python course.py test"
    assert job["timeout-minutes"] <= 60
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_the_workflow_may_only_read():
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in JOBS.values())
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True


def test_every_system_and_every_python_is_tried():
    tried = JOBS["test"]["strategy"]["matrix"]["include"]
    assert {entry["os"].split("-")[0] for entry in tried} == {"ubuntu", "macos", "windows"}
    supported = SpecifierSet(PROJECT["requires-python"])
    assert {entry["python"] for entry in tried} == {f"3.{minor}" for minor in range(30) if f"3.{minor}" in supported}


def test_the_weekly_jobs():
    (weekly,) = WORKFLOW[True]["schedule"]  # YAML 1.1 reads the key `on` as true
    assert len(weekly["cron"].split()) == 5
    for name in ("newest-torch", "another-processor"):
        assert "github.event_name == 'schedule'" in JOBS[name]["if"]
    assert JOBS["another-processor"]["env"] == {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    }


@pytest.mark.skipif(os.name == "nt", reason=".ci/run is for bash")
@pytest.mark.parametrize("status", [0, 3])
def test_ci_run_passes_the_status_on(tmp_path, status):
    log = tmp_path / "log"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nread line && exit 9\npwd >{log}\necho "$@" >>{log}\nexit {status}\n')
    (tmp_path / "chromium").symlink_to(python)
    for program in (python, tmp_path / "chromium"):
        program.chmod(0o755)
    variables = {**os.environ, "PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / ".ci" / "run"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == status
    assert log.read_text().splitlines() == [str(ROOT), "course.py test --strict-time"]
    assert re.search(r"Everything together: \d+ s", done.stdout)
