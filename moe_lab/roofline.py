"""How long a GPU needs at least: operations over one rate, bytes over another. Plain Python, without torch.

Rates are what makers state for dense products, which no program reaches; so times are floors, and ratios of them mean
more than they do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

from moe_lab.accounting import bytes_of, cache_bytes, count_flops, decode_flops, decode_reads
from moe_lab.config import LMConfig


def _require_whole(least: int, **counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r}: expected {least} or more, a whole number.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a GPU's maker states.

    Args:
        memory: bytes, as on its label; a part of them is not a program's.
        bytes_per_second: of that memory.
        operations: per second in dense products, by the format of the numbers.
        source: where it is stated.
    """

    name: str
    memory: float
    bytes_per_second: float
    operations: Mapping[str, float]
    source: str

    def rate(self, number: str) -> float:
        """Operations per second in a format.

        Raises:
            ValueError: its matrix units do not take this format.
        """
        if number not in self.operations:
            raise ValueError(f"number={number!r}: the {self.name} multiplies {', '.join(self.operations)}.")
        return self.operations[number]

    def balance(self, number: str = "bf16") -> float:
        """Operations that it can do while it reads one byte."""
        return self.rate(number) / self.bytes_per_second

    def busy_rows(self, number: str = "bf16") -> float:
        """With how many rows a matrix, read once, keeps it computing: two operations per weight and row."""
        return self.balance(number) * bytes_of(number) / 2


# Makers print the rate with "sparsity", twice the dense one that is meant here, unless a line says otherwise.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="RTX 4090",
            memory=24e9,
            bytes_per_second=1.008e12,
            operations={"bf16": 165.2e12, "fp8": 330.3e12},
            source="NVIDIA Ada GPU Architecture, white paper, appendix A (dense, fp32 sums)",
        ),
        Gpu(
            name="A100",
            memory=80e9,
            bytes_per_second=2.039e12,
            operations={"bf16": 624e12 / 2},
            source="NVIDIA A100 Tensor Core GPU, data sheet (80 GB SXM)",
        ),
        Gpu(
            name="H100",
            memory=80e9,
            bytes_per_second=3.35e12,
            operations={"bf16": 1979e12 / 2, "fp8": 3958e12 / 2},
            source="NVIDIA H100 Tensor Core GPU, data sheet (SXM); the H800 differs in its links alone",
        ),
        Gpu(
            name="H200",
            memory=141e9,
            bytes_per_second=4.8e12,
            operations={"bf16": 1979e12 / 2, "fp8": 3958e12 / 2},
            source="NVIDIA H200 Tensor Core GPU, data sheet (SXM)",
        ),
        Gpu(
            name="B200",
            memory=180e9,
            bytes_per_second=8e12,
            operations={"bf16": 36e15 / 16, "fp8": 72e15 / 16},
            source="NVIDIA HGX B200, data sheet (eight GPUs: 1.44 TB, 64 TB/s)",
        ),
        Gpu(
            name="MI300X",
            memory=192e9,
            bytes_per_second=5.3e12,
            operations={"bf16": 1307.4e12, "fp8": 2614.9e12},
            source="AMD Instinct MI300X, data sheet (dense)",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations (a multiply-add is two), and the bytes of memory that they cannot do without.

    Times are of one GPU, as if it held all of it, or of several that share the work evenly and lose no time over what
    they exchange.

    Raises:
        ValueError: negative operations, no bytes, or what is no finite number.
    """

    flops: float
    bytes: float

    def __post_init__(self) -> None:
        if not (_is_number(self.flops) and _is_number(self.bytes)) or self.flops < 0 or self.bytes <= 0:
            raise ValueError(f"flops={self.flops}, bytes={self.bytes}: expected 0 or more, and more than 0.")

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes

    def seconds(self, gpu: Gpu, number: str = "bf16", n_gpus: int = 1) -> float:
        """The longer of computing and reading; they go on at the same time.

        Raises:
            ValueError: a format that the GPU does not take, or fewer than one GPU.
        """
        _require_whole(1, n_gpus=n_gpus)
        return max(self.flops / gpu.rate(number), self.bytes / gpu.bytes_per_second) / n_gpus

    def tokens_per_second(self, gpu: Gpu, batch: int, number: str = "bf16", n_gpus: int = 1) -> float:
        """Of a step that writes a token for each of `batch` sequences: at most so many a second, all together.

        Raises:
            ValueError: a format that the GPU does not take, fewer than one sequence, or fewer than one GPU.
        """
        _require_whole(1, batch=batch)
        return batch / self.seconds(gpu, number, n_gpus)

    def reached(self, gpu: Gpu, number: str = "bf16") -> float:
        """Operations per second at most: the roofline at this intensity."""
        return min(gpu.rate(number), self.intensity * gpu.bytes_per_second)

    def __str__(self) -> str:
        sizes = f"{self.flops / 1e12:.4g} TFLOP, {self.bytes / 1e9:.4g} GB"
        return f"{sizes}: {self.intensity:.4g} operations per byte"


def prefill(config: LMConfig, tokens: int, batch: int = 1, number: str = "bf16") -> Work:
    """Reading `batch` prompts of `tokens`: weights that are touched are read once, a bf16 cache is written.

    Serving asks the head once per sequence, at the prompt's last position, where training asks it at every one.

    Raises:
        ValueError: fewer than one token or prompt, or an unknown format.
    """
    _require_whole(1, tokens=tokens, batch=batch)
    counted = count_flops(config, tokens)
    return Work(
        flops=batch * (counted.total - counted.head + counted.head // tokens),
        bytes=decode_reads(config, batch * tokens) * bytes_of(number) + batch * cache_bytes(config, tokens),
    )


def decode(config: LMConfig, batch: int, context: int, number: str = "bf16") -> Work:
    """One new token for each of `batch` sequences with `context` positions behind it, in a bf16 cache.

    Experts as in `distinct_experts`; the cache is read, and what is added to it left out.

    Raises:
        ValueError: fewer than one sequence, a negative context, or an unknown format.
    """
    _require_whole(1, batch=batch)
    return Work(
        flops=batch * decode_flops(config, context),
        bytes=decode_reads(config, batch) * bytes_of(number) + batch * cache_bytes(config, context),
    )


def gpu_hours(flops: float, gpu: Gpu, share: float, number: str = "bf16") -> float:
    """Hours of one GPU for so many operations, at a share of its stated rate; times a price per hour it is the bill.

    Raises:
        ValueError: negative operations, a share that is not above 0 and at most 1, or what is no finite number.
    """
    if not (_is_number(flops) and _is_number(share)) or flops < 0 or not 0 < share <= 1:
        raise ValueError(f"flops={flops}, share={share}: expected 0 or more, and more than 0 and at most 1.")
    return flops / (gpu.rate(number) * share) / 3600


def utilisation(flops: float, hours: float, gpu: Gpu, number: str = "bf16") -> float:
    """Which share of the stated rate a training run of so many GPU hours reached: model FLOPs utilisation (MFU).

    Source: Chowdhery et al. 2022 (PaLM), section 4.1.

    Raises:
        ValueError: negative operations, no hours, or what is no finite number.
    """
    if not (_is_number(flops) and _is_number(hours)) or flops < 0 or hours <= 0:
        raise ValueError(f"flops={flops}, hours={hours}: expected 0 or more, and more than 0.")
    return flops / (hours * 3600 * gpu.rate(number))
