"""The process that `kernel_cells` starts: reads a request from a folder, runs a kernel, and leaves an answer there.

python -m moe_lab.course.kernel_process FOLDER
"""

import base64
import dataclasses
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from moe_lab.course.bank import find
from moe_lab.course.exercises import check
from moe_lab.course.kernel_cells import Kernel, KernelError
from moe_lab.course.sandbox import Sandbox, line_in


def main(folder: Path) -> None:
    """Do what the request says; the answer has `error` where the kernel failed."""
    threading.Thread(target=_end_with_the_notebook, args=(os.getppid(),), daemon=True).start()
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    kernel = Kernel(**request["kernel"])
    names: dict[str, Any] = {}
    try:
        function, names = kernel.load(folder)
        answer = TASKS[request["task"]](folder, request, function, names)
    except Exception as error:
        answer = {"error": _told(error, names, folder)}
    partial = folder / "answer.partial"
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.replace(folder / "answer.json")


def _check(folder: Path, request: dict, function: Any, names: dict) -> dict:
    return dataclasses.asdict(check(find(request["exercise"]), function, names))


def _interpret(folder: Path, request: dict, function: Any, names: dict) -> dict:
    args, seconds = _args(folder, request), request["seconds"]
    with Sandbox(seconds, names) as box:
        function[tuple(request["grid"])](*args, **_constants(request))
    if box.stopped:
        why = "It prints too much" if box.stopped == "output" else f"It was stopped after {seconds:g} seconds"
        return {"error": f"{why}, at {box.line}." if box.line else f"{why}."}
    torch.save({str(i): arg for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)}, folder / "results.pt")
    return {"said": box.printed}


def _compile(folder: Path, request: dict, function: Any, names: dict) -> dict:
    from moe_lab.ops.machine_code import compile_for

    with compile_for(request["capability"]) as compiled:
        function.warmup(*_args(folder, request, device="meta"), grid=(1,), **_constants(request))
    code = compiled[0]
    kept = ("name", "capability", "ttir", "ptx", "shared_bytes")
    return {name: getattr(code, name) for name in kept} | {"cubin": base64.b64encode(code.cubin).decode()}


def _time(folder: Path, request: dict, function: Any, names: dict) -> dict:
    import triton
    from triton.testing import do_bench

    # for descriptors that a kernel makes itself
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    args, grid = _args(folder, request, device="cuda"), tuple(request["grid"])
    return {"milliseconds": do_bench(lambda: function[grid](*args, **_constants(request)), return_mode="median")}


TASKS = {"check": _check, "interpret": _interpret, "compile": _compile, "time": _time}


def _args(folder: Path, request: dict, device: str = "cpu") -> list:
    kept = torch.load(folder / "args.pt", weights_only=True) if device != "meta" else {}
    args = []
    for i, about in enumerate(request["args"]):
        if "value" in about:
            args.append(about["value"])
        elif device == "meta":
            dtype = getattr(torch, about["dtype"])
            args.append(torch.empty_strided(about["shape"], about["stride"], dtype=dtype, device="meta"))
        else:
            args.append(kept[str(i)].to(device))
    return args


def _constants(request: dict) -> dict:
    return {
        name: getattr(torch, value["dtype"]) if isinstance(value, dict) else value
        for name, value in request["constants"].items()
    }


def _told(error: Exception, names: dict, folder: Path) -> str:
    """An error in a few lines, with the learner's own line first."""
    while type(error).__name__ == "InterpreterError" and error.__cause__:
        error = error.__cause__
    if isinstance(error, KernelError):
        return str(error)
    if type(error).__name__ == "CompilationError":
        return _told_by_the_compiler(error, folder)
    where = line_in(names, traceback=error.__traceback__)
    if not where and isinstance(error, SyntaxError):
        where = f"line {error.lineno}: `{(error.text or '').strip()}`"
    said = "\n".join(line for line in str(error).strip().splitlines()[:8] if str(folder) not in line)
    return f"{where}\n{type(error).__name__}: {said}".strip()


def _told_by_the_compiler(error: Exception, folder: Path) -> str:
    """Triton counts lines from the function's `def` on and shows all before; here they are the cell's, and one."""
    while error.__cause__ is not None and type(error.__cause__) is type(error):  # from the kernel to what it calls
        error = error.__cause__
    said = str(error).strip().splitlines()
    place, name = re.match(r"at (\d+):", said[0]), re.search(r"def (\w+)", str(error))
    path = folder / f"{name.group(1)}.py" if name else folder
    if not place or not path.is_file():
        return "\n".join(said[:12])
    lines = path.read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("def "))
    number = begin + int(place.group(1))
    reason = said[-1].strip(" ^") or said[-2]
    return f"line {number}: `{lines[number - 1].strip()}`\n{reason}"


def _end_with_the_notebook(parent: int) -> None:
    """Nobody waits for the answer of a notebook that is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
