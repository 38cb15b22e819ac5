"""Training side by side: the same language model dense, with our experts, and with transformers' block in their place.

Time is that of whole training steps. Memory is the most that a process of its own held while it trained, beyond what it
held before there was a model.
"""

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_lab.bench.layers import Shape, transformers_block
from moe_lab.bench.timing import compare
from moe_lab.config import LMConfig, TrainConfig
from moe_lab.data import load_corpus
from moe_lab.lm import LM
from moe_lab.moe import MoE
from moe_lab.paths import course_root
from moe_lab.plain import read_config
from moe_lab.train import Trainer

SIZES = ("moe_notebook", "moe_2m")  # names of configurations
STEPS_FOR_MEMORY = 3
OURS, THEIRS = "MoE", "MoE with transformers' block"


class _Theirs(nn.Module):
    """A Mixtral block of transformers with the weights of one of our layers, in the place of an FFN."""

    def __init__(self, ours: MoE) -> None:
        super().__init__()
        moe = ours.config
        shape = Shape(1, moe.d_model, moe.d_ff, moe.n_experts, moe.top_k)  # a block is built for any number of tokens
        self.block = transformers_block(shape, ours, "grouped_mm")

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        return self.block(x)


def models(config: LMConfig) -> dict[str, Callable[[], LM]]:
    """What is compared, each as a function that builds it; transformers' block only where it is installed."""
    moe = config.moe
    dense = config.but(moe=None, n_dense_layers=0, moe_every=1)

    def theirs() -> LM:
        model = LM(config)
        for block in model.blocks:
            if isinstance(block.ffn, MoE):
                block.ffn = _Theirs(block.ffn)
        return model

    found = {
        "dense, equal active": lambda: LM(dense.but(d_ff=moe.top_k * moe.d_ff)),
        "dense, equal total": lambda: LM(dense.but(d_ff=moe.n_experts * moe.d_ff)),
        OURS: lambda: LM(config),
    }
    return found | ({THEIRS: theirs} if importlib.util.find_spec("transformers") else {})


def trainer(size: str, name: str) -> Trainer:
    """One of the models of a size, ready to train without a balance loss: transformers' block returns no routing."""
    config = read_config(course_root() / "configs" / f"{size}.yaml")
    torch.manual_seed(0)
    plain = TrainConfig(steps=10**6, batch_size=config.training.batch_size, context=config.training.context)
    return Trainer(models(config.model)[name](), load_corpus().train, plain)


def measure(size: str, rounds: int) -> dict:
    """Seconds of a training step, and bytes of peak memory, of every model of a size."""
    names = list(models(read_config(course_root() / "configs" / f"{size}.yaml").model))
    trainers = {name: trainer(size, name) for name in names}
    timings = compare({name: one.step for name, one in trainers.items()}, rounds)
    return {
        "size": size,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "peak_bytes": {name: peak_bytes(size, name) for name in names},
    }


def peak_bytes(size: str, name: str) -> int | None:
    """The most memory that some training steps took in a process of their own; None where the system does not tell."""
    if importlib.util.find_spec("resource") is None:
        return None
    command = [sys.executable, "-m", "moe_lab.bench.training", size, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=course_root())
    return json.loads(done.stdout.splitlines()[-1])


def _peak_in_this_process(size: str, name: str) -> int:
    torch.set_num_threads(1)
    if importlib.util.find_spec("transformers"):  # for all alike: what importing it takes and leaves is not the model's
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401
    load_corpus()
    with contextlib.suppress(OSError):  # Linux: from here on the peak is that of the training
        Path("/proc/self/clear_refs").write_text("5")
    before = _most_bytes()
    one = trainer(size, name)
    for _ in range(STEPS_FOR_MEMORY):
        one.step()
    return _most_bytes() - before


def _most_bytes() -> int:
    """The most memory that this process has held so far, or since its peak was set back."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage would still count what the process that started this one held
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes


def table(records: list[Mapping]) -> str:
    """Tokens a second and peak memory as a Markdown table, as multiples of the dense model's of equal active size."""
    lines = ["| size | model | speed | peak memory |", "|---|---|---|---|"]
    for record in records:
        base = "dense, equal active"
        for name, timing in record["seconds"].items():
            speed = record["seconds"][base]["median"] / timing["median"]
            memory = record["peak_bytes"][name]
            share = f"{memory / record['peak_bytes'][base]:.2f}" if memory else "not told by this system"
            lines.append(f"| {record['size']} | {name} | {speed:.2f} | {share} |")
    return "\n".join(lines)


def verdicts(records: list[Mapping]) -> list[str]:
    """What the numbers say of our layer against transformers' block, in sentences."""
    said = []
    for record in records:
        seconds, memory = record["seconds"], record["peak_bytes"]
        if THEIRS not in seconds:
            continue
        faster = seconds[THEIRS]["median"] / seconds[OURS]["median"]
        line = f"{record['size']}: a step is {faster:.2f} × as fast as with transformers' block"
        said.append(line + (f", in {memory[OURS] / memory[THEIRS]:.2f} × the memory." if memory[OURS] else "."))
    return said


if __name__ == "__main__":
    print(json.dumps(_peak_in_this_process(*sys.argv[1:])))
