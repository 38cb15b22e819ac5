"""Kernels compiled for a GPU that need not be there, and what they became: read it on any Linux machine.

with compile_for(90) as compiled:
    kernel.warmup(*meta_tensors, grid=(1,))  # or anything of `moe_lab.ops` on the meta device
print(compiled[0].tensor_core_instructions)
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

# What multiplies matrices in the machine code of each generation: mma.sync, wgmma and tcgen05.mma in PTX.
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# A program's most shared memory, bytes: CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability".
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_VALUE = re.compile(r"%[\w.$-]+")  # a name in TTIR


@dataclass(frozen=True)
class MachineCode:
    """One kernel as it was compiled, from Triton's own language (ttir) to the machine's (sass)."""

    name: str
    capability: int
    ttir: str
    ptx: str
    cubin: bytes
    shared_bytes: int
    constants: dict[str, Any]

    @cached_property
    def sass(self) -> str:
        """The machine code, as `cuobjdump` lists it."""
        return _cuobjdump(self.cubin, "--dump-sass")

    @cached_property
    def _usage(self) -> dict[str, int]:
        text = _cuobjdump(self.cubin, "--dump-resource-usage")
        return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}

    @property
    def registers(self) -> int:
        """That a thread holds; 255 is the most."""
        return self._usage["REG"]

    @property
    def local_bytes(self) -> int:
        """Of memory that a thread needs because its registers do not suffice: spills, and arrays on a stack."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each instruction stands in the machine code, by its name up to the first dot."""
        return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", self.sass, re.M))

    @property
    def spills(self) -> int:
        """Instructions that load from or store to local memory."""
        return self.instructions["LDL"] + self.instructions["STL"]

    @property
    def tensor_core_instructions(self) -> int:
        """Instructions that multiply matrices on the tensor cores, of whichever generation."""
        return sum(n for name, n in self.instructions.items() if name.endswith(("HMMA", "HGMMA")))

    @cached_property
    def narrow_addresses(self) -> list[str]:
        """Of its TTIR, the lines whose places were computed in 32 bits though they grow with the data."""
        return narrow_addresses(self.ttir)

    def __repr__(self) -> str:
        return f"MachineCode({self.name}, compute capability {self.capability / 10:.1f})"


def narrow_addresses(ttir: str) -> list[str]:
    """Lines that move a pointer by an index times a size, where the product was taken in 32 bits.

    An index is what grows with the data: a program's number, what was loaded (a group, a row, a choice), a loop's
    counter. A size is an argument of the kernel: a stride, or a dimension. Within a tile both sides are small, and 32
    bits will do.
    """
    text = re.sub(r"loc\((?:[^()]|\([^()]*\))*\)", "", ttir)
    header = next(line for line in text.splitlines() if "tt.func" in line)
    kinds: dict[str, set[str]] = {name: {"size"} for name in re.findall(r"(%[\w.$-]+): i(?:32|64)\b", header)}
    found = []
    for line in text.splitlines():
        if not line.lstrip().startswith("%") or " = " not in line:
            continue
        left, right = line.split(" = ", 1)
        results, operation = _VALUE.findall(left.split(":")[0]), re.match(r'"?([\w.]+)', right)[1]
        operands = [kinds.get(name, {"index"}) for name in _VALUE.findall(right.split(" : ")[0])]
        kind = set().union(*operands)
        if operation in ("arith.constant", "tt.make_range"):
            kind = set()
        elif operation in ("tt.load", "tt.get_program_id", "tt.get_num_programs", "scf.for", "tt.reduce"):
            kind = {"index"}
        elif operation in ("arith.divsi", "arith.remsi"):
            kind = {"index"} if kind else set()  # the number of a block, or of blocks: no longer a size
        elif operation == "arith.muli" and right.rstrip().endswith(("i32", "i32>")):
            one, other = operands if len(operands) == 2 else operands * 2
            if ("index" in one and "size" in other) or ("size" in one and "index" in other):
                kind.add("narrow")
        elif operation == "tt.addptr" and "narrow" in operands[-1]:
            found.append(line.strip())
        if operation == "tt.addptr":
            kind = set()
        kinds.update((name, kind) for name in results)
    return found


def _cuobjdump(cubin: bytes, option: str) -> str:
    """The tool that comes with Triton itself."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


class _StandIn(DriverBase):
    """Stands where the GPU's driver would, and says which GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"stand-in {self.target.arch}"  # kernels are kept by device

    def get_current_stream(self, device: object) -> int:
        return 0

    @property
    def launcher_cls(self) -> None:
        raise RuntimeError("Nothing can be launched inside `compile_for`: give the kernels tensors on the meta device.")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_active_torch_device(self) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> None:
        raise NotImplementedError


@contextmanager
def compile_for(capability: int) -> Iterator[list[MachineCode]]:
    """Inside, kernels that are warmed up are compiled for this GPU, 90 for compute capability 9.0.

    The list gets each kernel that is asked for, in order. Nothing can be launched inside.

    Raises:
        RuntimeError: in a process that interprets kernels.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "This process runs kernels in Triton's interpreter (TRITON_INTERPRET=1): compile in another."
        )
    config, compiled = triton.runtime.driver, []
    before, run = config._active, JITFunction.run

    def run_and_keep(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **kwargs)
        compiled.append(_machine_code(kernel))
        return kernel

    config.set_active(_StandIn(capability))
    JITFunction.run = run_and_keep
    try:
        yield compiled
    finally:
        JITFunction.run = run
        config._active = before


def _machine_code(kernel: Any) -> MachineCode:
    names = kernel.src.fn.arg_names
    constants = {names[place[0]]: value for place, value in kernel.src.constants.items()}
    texts = {stage: kernel.asm[stage] for stage in ("ttir", "ptx", "cubin")}
    return MachineCode(
        kernel.name, kernel.metadata.target.arch, **texts, shared_bytes=kernel.metadata.shared, constants=constants
    )
