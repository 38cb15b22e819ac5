"""`moe-lab gpu`: the GPU tests and the GPU benchmark in one command of under eight minutes, for a machine with a GPU.

It needs torch, triton, numpy and pytest, no network, and no installed package: `python -m moe_lab gpu` from a clone.
Peers (transformers, liger-kernel, grouped-mm-bf16) are measured where they are installed. Results are one JSON,
`gpu.json`.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe_lab.gpu.deadline import UNTIL
from moe_lab.machine import machine
from moe_lab.paths import CourseError, course_root, results_dir

MINUTES = 7.5
TESTS = "tests/test_on_gpu.py"
TEST_SHARE = 0.5  # of the time, at most
TEST_PROCESSES = 4  # where pytest-xdist is installed: most of the time goes into compiling kernels
NO_TESTS = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "skips": {}}
GRACE = 45  # seconds for the test that runs when the time is up
LEAST_SECONDS = 8  # that a part of the benchmark needs, compilation included


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe-lab gpu`."""
    from moe_lab.gpu.tune import KERNELS

    parser.add_argument("--out", type=Path, metavar="DIR", help="where the JSON goes (default benchmarks/results)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU, to see that it works; no figures")
    parser.add_argument("--only", choices=("tests", "bench"), help="one half alone")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help=f"that all may take (default {MINUTES}); the rest is dropped",
    )
    parser.add_argument(
        "--tune", nargs="*", choices=KERNELS, metavar="KERNEL",
        help=f"instead: time tiles for these kernels ({', '.join(KERNELS)}; default all)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Tests, benchmark, one JSON, one table; returns 1 if a test failed or the GPU was lost, else 0."""
    if args.minutes <= 0:
        raise CourseError(f"--minutes {args.minutes}: expected more than 0.")
    is_dry = args.dry or not torch.cuda.is_available()
    if not is_dry and os.environ.get("TRITON_INTERPRET") == "1":
        raise CourseError("TRITON_INTERPRET=1 is set, so kernels would be interpreted on the CPU: unset it first.")
    if not is_dry and (torch.version.hip or torch.cuda.get_device_capability() < (8, 0)):
        raise CourseError(f"{torch.cuda.get_device_name()} is no NVIDIA GPU from Ampere on: the kernels need one.")
    if is_dry and not args.dry:
        print("NO GPU: torch sees no CUDA device here. This is a dry run on the CPU, in tiny sizes.\n")
    clock = Clock(60 * args.minutes)
    results = {"measured": not is_dry, **stamp(is_dry)}
    folder = args.out or (None if is_dry else results_dir())
    name = ("gpu-tune" if args.tune is not None else "gpu") + ("-dry" if is_dry else "") + ".json"
    keep = Keeper(folder / name if folder else None, results)
    if args.tune is not None:
        status = _tune(args.tune, is_dry, results, keep, clock)
    else:
        status = _measure(args.only, is_dry, results, keep, clock)
    keep()
    if keep.path:
        print(f"\nWritten: {keep.path}")
    if is_dry:
        print("\nNothing was measured: this was a dry run.")
    return status


class Clock:
    """How much time is left."""

    def __init__(self, seconds: float) -> None:
        self.start, self.seconds = time.monotonic(), seconds

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return self.seconds - self.elapsed


class Keeper:
    """Writes the results whenever it is called, whole or not at all, so that a kill loses what came after."""

    def __init__(self, path: Path | None, results: dict[str, Any]) -> None:
        self.path, self.results = path, results

    def __call__(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)


def _tune(kernels: list[str], is_dry: bool, results: dict[str, Any], keep: Keeper, clock: Clock) -> int:
    from moe_lab.gpu import tune
    from moe_lab.gpu.measure import LostGPU

    try:
        tune.main("cpu" if is_dry else "cuda", kernels or list(tune.KERNELS), results, keep, clock)
    except LostGPU as error:
        results["failed_parts"] = {"tuning": f"the GPU was lost: {error}"}
        print(results["failed_parts"]["tuning"])
        return 1
    return 0


def _measure(only: str | None, is_dry: bool, results: dict[str, Any], keep: Keeper, clock: Clock) -> int:
    from moe_lab.gpu import liger, report
    from moe_lab.gpu.candidates import peers
    from moe_lab.gpu.jobs import Bench, capability
    from moe_lab.gpu.measure import ceilings, why

    compiling = [] if is_dry or only == "tests" else liger.start(capability())
    is_good = True
    if only != "bench":
        results["tests"] = run_tests(TEST_SHARE * clock.seconds)
        results["tests"]["seconds"] = clock.elapsed
        tests = results["tests"]
        is_good = not tests["failed"] and (is_dry or tests["passed"] > 0)
        keep()
    if only != "tests":
        device = "cpu" if is_dry else "cuda"
        compiled = liger.finish(compiling, min(60, clock.left / 4))
        results["peers"] = peers()
        try:
            results["ceilings"] = ceilings(device)
        except Exception as error:
            results["failed_parts"] = {"ceilings": why(error)}
        print(f"\n{report.ceilings(results)}\nTFLOP/s of every candidate:\n", flush=True)
        is_good = _benchmark(Bench(device, results, compiled), keep, clock) and is_good
    results["targets"] = report.targets(results)
    results["seconds"] = clock.elapsed
    print(f"\n{report.table(results)}")
    return 0 if is_good else 1


def _benchmark(bench: Any, keep: Keeper, clock: Clock) -> bool:
    """Every part of the agenda that there is time for; False if the GPU was lost on the way."""
    from moe_lab.gpu import report
    from moe_lab.gpu.jobs import agenda
    from moe_lab.gpu.measure import LostGPU, why

    results, told = bench.results, {}
    failed, dropped, seconds = results.setdefault("failed_parts", {}), [], results.setdefault("part_seconds", {})
    for what, part in agenda(is_dry=bench.device == "cpu"):
        start = clock.elapsed
        if dropped or clock.left < LEAST_SECONDS:
            dropped.append(what)
            continue
        try:
            _run(part, bench)
        except LostGPU as error:
            failed[what] = f"the GPU was lost: {error}"
            print(f"{what}: {failed[what]}")
            results["dropped"] = ["everything after the GPU was lost"]
            return False
        except Exception as error:  # the other parts may still be measured
            failed[what] = why(error)
            print(f"{what}: {failed[what]}")
        seconds[what] = clock.elapsed - start
        for name in ("raw", "block", "stages", "sweep", "steps"):
            for record in results.get(name, ())[told.get(name, 0) :]:
                print("\n".join(report.lines(name, record)), flush=True)
            told[name] = len(results.get(name, ()))
        keep()
    results["dropped"] = dropped
    return True


def _run(part: Callable[[Any], None], bench: Any) -> None:
    """Do a part; an error after which the GPU does nothing any more is a `LostGPU`, wherever it came up."""
    from moe_lab.gpu.measure import LostGPU, require_living_gpu

    try:
        part(bench)
    except LostGPU:
        raise
    except Exception as error:
        require_living_gpu(bench.device, error)
        raise


def run_tests(seconds: float) -> dict[str, Any]:
    """pytest on the GPU tests, in a process of its own: a kernel that fails takes its process with it."""
    root = course_root()
    if importlib.util.find_spec("pytest") is None or not (root / TESTS).is_file():
        return NO_TESTS | {"failed": 1, "failures": [f"pytest or {TESTS} is missing here"]}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        plugins = ["-p", "no:cacheprovider", "-p", "moe_lab.gpu.deadline"]
        command = [sys.executable, "-m", "pytest", TESTS, "-q", *plugins, f"--junitxml={report}"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(TEST_PROCESSES)]
        # what torch wants before it calls a cuBLAS product deterministic
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", UNTIL: str(time.time() + seconds)}
        status = _run_to_the_end(command, root, environment, seconds + GRACE)
        found = _read(report) if report.exists() else dict(NO_TESTS)
    if status is None or (status and not found["failed"]):
        found["failed"] += 1
        found["failures"] = [*found["failures"], "no time left" if status is None else f"pytest ended with {status}"]
    return found


def _run_to_the_end(command: list[str], root: Path, environment: dict[str, str], seconds: float) -> int | None:
    """The status of a command, or None if it had to be ended: with all that it started, which keeps the GPU busy."""
    process = subprocess.Popen(command, cwd=root, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(OSError, AttributeError):  # gone already; or a system without process groups
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(report: Path) -> dict[str, Any]:
    from moe_lab.gpu.measure import first_line

    failures, skips, n_tests = [], {}, 0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        n_tests += 1
        if case.find("skipped") is not None:
            skips[case.get("name")] = case.find("skipped").get("message", "")
        for problem in [*case.iter("failure"), *case.iter("error")][:1]:
            failures.append(f"{case.get('name')}: {first_line(problem.get('message', ''))}")
    passed = n_tests - len(failures) - len(skips)
    return {"passed": passed, "failed": len(failures), "skipped": len(skips), "failures": failures, "skips": skips}


def stamp(is_dry: bool) -> dict[str, Any]:
    """Date, commit, machine and versions."""
    found: dict[str, Any] = {"date": datetime.date.today().isoformat(), "commit": _output("git", "rev-parse", "HEAD")}
    if found["commit"] and _output("git", "status", "--porcelain", "--untracked-files=no"):
        found["commit"] += ", changed"
    found["machine"] = machine()
    for package in ("triton", "numpy"):
        try:
            found["machine"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found["machine"][package] = "none"
    if is_dry:
        return found
    about = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["machine"] |= {
        "gpu": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "processors": about.multi_processor_count,
        "memory_bytes": about.total_memory,
        "l2_bytes": getattr(about, "L2_cache_size", None),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
    }
    return found


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=course_root(), capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
