"""Measures side by side: forward and backward, one thread, interleaved, told as medians.

`moe-lab bench` writes tables, figures and the numbers, stamped with machine and versions: of the dispatch variants
(`layers`), of whole training steps (`training`), and of the layer over ranks (`parallel`). Notebook 04 measures with
the same functions. transformers' block is measured beside ours where transformers is installed.
"""

import argparse
import datetime
import importlib.util
import json
import os
from collections.abc import Mapping

import torch

from moe_lab.bench import layers, parallel, training
from moe_lab.bench.layers import LOADS, SHAPES, SWEEP, Shape, layer_and_input, parts, variants
from moe_lab.bench.timing import Timing, compare, copy_rate
from moe_lab.machine import machine
from moe_lab.paths import CourseError, course_root, results_dir

__all__ = [
    "SHAPES",
    "SWEEP",
    "Shape",
    "Timing",
    "compare",
    "layer_and_input",
    "parts",
    "variants",
]

PARTS = ("layers", "training", "parallel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe-lab bench`."""
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of every measurement (default 20)")
    parser.add_argument("--only", choices=PARTS, help="measure one part alone")
    parser.add_argument(
        "--quick", action="store_true", help="the first shape and size only, to see that it works; nothing is kept"
    )


def main(args: argparse.Namespace) -> int:
    """Measures and writes `cpu`, `training` and `parallel`, each .json and .md, in `benchmarks/results/`."""
    if args.rounds < 2:
        raise CourseError(f"--rounds {args.rounds}: expected 2 or more, for a spread.")
    if os.environ.get("OMP_WAIT_POLICY"):
        raise CourseError("OMP_WAIT_POLICY is set, which ruins the timing of small operations: unset it and run again.")
    torch.set_num_threads(1)
    peers = importlib.util.find_spec("transformers") is not None
    if not peers:
        print("transformers is not installed: its block is not measured. `pip install -e '.[test]'` brings it.")
    if args.only in (None, "layers"):
        _bench_layers(args, peers)
    if args.only in (None, "training"):
        _bench_training(args)
    if args.only in (None, "parallel"):
        _bench_parallel(args)
    return 0


def _stamp(args: argparse.Namespace) -> dict:
    return {"date": datetime.date.today().isoformat(), "machine": machine(), "threads": 1, "rounds": args.rounds}


def _bench_layers(args: argparse.Namespace, peers: bool) -> None:
    shapes = SHAPES[:1] if args.quick else (*SHAPES, *(s for s in SWEEP if s not in SHAPES))
    records = []
    for shape in shapes:
        for skewed in (False, True):
            print(f"{shape}, {LOADS[skewed]} …", flush=True)
            records.append(layers.measure(shape, skewed, args.rounds, peers))
    results = {**_stamp(args), "copy_bytes_per_second": copy_rate(), "records": records}
    base = "the faster of transformers' two" if peers else "the loop"
    print(f"\nTimes faster than {base}, forward and backward, one thread:\n\n{layers.table(results)}\n")
    print("\n".join(layers.verdicts(results)))
    print(f"Widest interquartile range: {layers.spread(results):.0%} of the median.\n")
    if not args.quick:
        from moe_lab.viz import draw_bench

        picture = {"png": draw_bench(results).png}
        _keep("cpu", "Dispatch variants on a CPU", results, layers.table(results), layers.verdicts(results), **picture)


def _bench_training(args: argparse.Namespace) -> None:
    records = []
    for size in training.SIZES[:1] if args.quick else training.SIZES:
        print(f"training steps, {size} …", flush=True)
        records.append(training.measure(size, args.rounds))
    print("\nTokens a second and peak memory, as multiples of the dense model's of equal active size, one thread:\n")
    print(training.table(records), "", *training.verdicts(records), sep="\n")
    if not args.quick:
        heading = "Training steps on a CPU, as multiples of the dense model's of equal active size"
        results = {**_stamp(args), "records": records}
        _keep("training", heading, results, training.table(records), training.verdicts(records))


def _bench_parallel(args: argparse.Namespace) -> None:
    print("the layer over ranks …", flush=True)
    results = {**_stamp(args), "cores": os.cpu_count(), **parallel.measure(args.rounds, args.quick)}
    heading = f"The layer of experts over ranks, {parallel.SHAPE}, on {results['cores']} cores"
    print("\nTime of a step as a multiple of one rank's, and the shares of its forward pass:\n")
    print(parallel.table(results), "", *parallel.verdicts(results), sep="\n")
    if not args.quick:
        _keep("parallel", heading, results, parallel.table(results), parallel.verdicts(results))


def _keep(name: str, title: str, results: Mapping, table: str, verdicts: list[str], **more: bytes) -> None:
    folder = results_dir()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    heading = f"# {title}\n\n{results['date']}, " + ", ".join(f"{k} {v}" for k, v in results["machine"].items())
    text = f"{heading}, one thread.\n\n{table}\n\n" + "\n".join(f"- {line}" for line in verdicts)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    for suffix, content in more.items():
        (folder / f"{name}.{suffix}").write_bytes(content)
    kept = ", ".join(f"{name}.{suffix}" for suffix in ("json", "md", *more))
    print(f"Kept in {folder.relative_to(course_root())}: {kept}.")
