"""What the GPU benchmark measures, and the least time it can take: operations over a rate, bytes over another.

`python -m moe_lab.gpu.floors` prints the tables that benchmarks/kernel-notes.md quotes.
"""

from dataclasses import dataclass

from moe_lab.bench.layers import Shape
from moe_lab.roofline import GPUS

BYTES = 2  # of a bf16 number

QWEN3 = tuple(Shape(n_tokens, 2048, 768, 128, 8) for n_tokens in (512, 4096, 32768))
MIXTRAL = tuple(Shape(n_tokens, 4096, 14336, 8, 2) for n_tokens in (4096, 16384))
DEEPSEEK = (Shape(4096, 7168, 2048, 32, 8),)  # 32768 rows for 32 of the model's 256 experts: what one rank gets
OLMOE = tuple(Shape(n_tokens, 2048, 1024, 64, 8) for n_tokens in (4096, 32768))
MODELS = {"Qwen3-30B-A3B": QWEN3, "Mixtral-8x7B": MIXTRAL, "DeepSeek-V3, 32 experts": DEEPSEEK, "OLMoE": OLMOE}


def model_of(shape: Shape) -> str:
    """The model whose layer has this shape."""
    return next((name for name, shapes in MODELS.items() if shape in shapes), "no model")


@dataclass(frozen=True)
class Rates:
    """What a GPU can do at most: operations per second in dense bf16 products, and bytes per second of its memory."""

    name: str
    operations: float
    bytes: float


H200 = Rates("H200, datasheet", GPUS["H200"].rate("bf16"), GPUS["H200"].bytes_per_second)


@dataclass(frozen=True)
class Work:
    """Operations (a multiply-add is two) and the bytes of memory that they cannot do without."""

    name: str
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.flops / self.bytes

    def floors(self, rates: Rates) -> tuple[float, float]:
        """Seconds: of the operations, and of the bytes. The larger of them cannot be beaten."""
        return self.flops / rates.operations, self.bytes / rates.bytes


def product(n_rows: int, n_in: int, n_out: int, n_groups: int) -> Work:
    """A grouped product; with one group a dense one. Rows and matrices are read once, results written once."""
    moved = n_rows * (n_in + n_out) + n_groups * n_in * n_out
    return Work("product", 2 * n_rows * n_in * n_out, BYTES * moved)


def block(shape: Shape, backward: bool = False) -> Work:
    """The experts' part of a layer, whoever computes it: 6·T·k·D·F operations forward, 18 with the backward pass.

    Forward reads x and all three matrices of every expert and writes y. Backward reads dy, x and the matrices and
    writes dx and the matrices' gradients. Whatever else is kept or passed from kernel to kernel costs more than this.
    """
    tokens, weights = shape.n_tokens * shape.d_model, 3 * shape.n_experts * shape.d_model * shape.d_ff
    flops = 6 * shape.n_tokens * shape.top_k * shape.d_model * shape.d_ff
    moved = 2 * tokens + weights
    if not backward:
        return Work("forward", flops, BYTES * moved)
    return Work("forward and backward", 3 * flops, BYTES * (moved + 3 * tokens + 2 * weights))


def stages(shape: Shape, n_parts: int = 1) -> dict[str, list[Work]]:
    """The launches of `moe_lab.ops.moe_mlp`, in order, for "forward" and "backward".

    Each reads its inputs once and writes its results once; a token that k experts read is counted once.
    `n_parts` are the tiles of columns over which `down_backward` leaves the weights' gradient in parts.
    """
    n_rows, n_experts, d_model, width = shape.n_tokens * shape.top_k, shape.n_experts, shape.d_model, shape.d_ff
    tokens, rows, hidden = shape.n_tokens * d_model, n_rows * d_model, n_rows * width
    one = n_experts * d_model * width  # numbers in one matrix of each expert
    flops = 2 * hidden * d_model  # of one product

    def work(name: str, products: int, numbers: float, more: float = 0) -> Work:
        return Work(name, products * flops, BYTES * numbers + more)

    plan = Work("plan_tiles", 0, 4 * (2 * n_experts + 3 * (n_experts + n_rows // 128)))
    return {
        "forward": [
            plan,
            work("gate_up", 2, tokens + 2 * one + 3 * hidden),
            work("down", 1, hidden + one + rows),
            work("sum of choices", 0, rows + tokens),
        ],
        "backward": [
            work("down_backward", 1, tokens + one + 5 * hidden, 4 * n_rows * n_parts),
            work("dx of the rows", 2, 2 * hidden + 2 * one + rows),
            work("sum of dx", 0, rows + tokens),
            work("dw_in", 2, 2 * hidden + tokens + 2 * one),
            work("dw_down", 1, hidden + tokens + one),
        ],
    }


def table(rates: Rates = H200) -> str:
    """Both floors of every shape, forward and with the backward pass, as Markdown."""
    lines = [
        f"| model | shape | pass | operations, TFLOP | bytes, GB | operations / byte | floors on {rates.name}: "
        "operations, ms | bytes, ms | so at most, TFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, shapes in MODELS.items():
        for shape in shapes:
            for work in (block(shape), block(shape, backward=True)):
                lines.append(f"| {model} | {shape} | {work.name} | {_row(work, rates)} |")
    return "\n".join(lines)


def stage_table(shape: Shape = QWEN3[-1], rates: Rates = H200) -> str:
    """Both floors of every launch of the fused block, as Markdown; the last line adds up the larger of each."""
    lines = [
        f"| launch, at {shape} | operations, TFLOP | bytes, GB | operations / byte | operations, ms | bytes, ms | "
        "so at most, TFLOP/s |",
        "|---|---|---|---|---|---|---|",
    ]
    works = [work for part in stages(shape).values() for work in part]
    lines += [f"| {work.name} | {_row(work, rates)} |" for work in works]
    seconds = sum(max(work.floors(rates)) for work in works)
    flops = sum(work.flops for work in works)
    lines.append(f"| all, one after the other: {1e3 * seconds:.2f} ms | {flops / 1e12:.2f} | | | | | ")
    lines[-1] += f"{flops / seconds / 1e12:.0f} |"
    return "\n".join(lines)


def _row(work: Work, rates: Rates) -> str:
    operations, moved = work.floors(rates)
    best = work.flops / max(operations, moved) / 1e12
    return (
        f"{work.flops / 1e12:.3f} | {work.bytes / 1e9:.3f} | {work.intensity:.0f} | {1e3 * operations:.3f} | "
        f"{1e3 * moved:.3f} | {best:.0f}"
    )


def asked(n_rows: int, n_in: int, n_out: int, rows: int, columns: int) -> float:
    """Bytes that the programs of a product ask for, whatever the caches keep: a tile reads both its sides in full."""
    n_tiles = -(-n_rows // rows) * -(-n_out // columns)
    return BYTES * (n_tiles * (rows + columns) * n_in + n_rows * n_out)


if __name__ == "__main__":
    print(table(), stage_table(), sep="\n\n")
