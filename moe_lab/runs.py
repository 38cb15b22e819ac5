"""Training runs with a folder each: `moe-lab train CONFIG.yaml`, and going on with a run that was stopped.

A run folder holds `config.yaml` (what was asked for, every default spelt out), `metrics.jsonl` (a line a step, and one
an evaluation), `curves.png`, and `checkpoints/`, of which the last two are kept.
"""

import argparse
import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from moe_lab.checkpoints import load, require_same, save
from moe_lab.config import RunConfig
from moe_lab.data import Corpus, load_corpus, validation_batch
from moe_lab.lm import LM
from moe_lab.paths import CourseError
from moe_lab.plain import read_config, to_plain
from moe_lab.train import Diverged, Step, Trainer, evaluate, first_not_finite, mean_bits

CHECKPOINTS_KEPT = 2


class RunError(CourseError):
    """A run cannot be started, or stopped before its end."""


class StopRun(Exception):
    """Raised by a callback between two steps: the run is saved and ends, to be resumed another time."""


def run(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    on_step: Callable[[Step], None] = lambda step: None,
) -> dict[str, float]:
    """Train in a folder, from the start or from its last checkpoint; returns the last evaluation, bits per byte.

    Raises:
        RunError: a folder that exists where none was to be resumed; nothing to resume; another process at work in it;
            training that diverged, with the last good checkpoint.
        StopRun: `on_step` asked for it; a checkpoint was written.
        CheckpointError: a checkpoint of another configuration, or one that cannot be read or written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: a run needs a folder of its own, choose another with --out.")
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise RunError(f"{folder} exists: go on with its run by --resume, or choose another folder with --out.")
    if resume and not checkpoints(folder):
        raise RunError(f"{folder} holds no checkpoint to resume from. Start without --resume, in a new folder.")
    corpus = load_corpus()
    torch.manual_seed(config.training.seed)
    try:
        _require_possible(config, corpus)
        trainer = Trainer(LM(config.model).to(device), corpus.train, config.training)
    except ValueError as error:
        raise RunError(f"This run cannot be started: {error}") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            return _run(trainer, config, corpus.val, folder, resume, on_step)
    except Timeout:
        raise RunError(f"Another process is training in {folder}: wait for it, or choose another folder.") from None


def _require_possible(config: RunConfig, corpus: Corpus) -> None:
    shortest = min(len(text) for split in (corpus.train, corpus.val) for text in split.values())
    if config.training.context >= shortest:
        raise ValueError(
            f"context={config.training.context}: expected less than the shortest text, {shortest:,} bytes."
        )
    if config.model.vocab_size < 256:
        raise ValueError(f"vocab_size={config.model.vocab_size}: expected 256 or more, for the corpus is bytes.")


def _run(
    trainer: Trainer,
    config: RunConfig,
    held_out: Mapping[str, Tensor],
    folder: Path,
    resume: bool,
    on_step: Callable[[Step], None],
) -> dict[str, float]:
    if resume:
        for partial in (folder / "checkpoints").glob(".*.partial"):  # of a process that was killed while it wrote
            partial.unlink()
        latest = checkpoints(folder)[-1]
        state, found = load(latest)
        require_same(found, config, latest)
        trainer.load_state(state)
        _forget_after(folder / "metrics.jsonl", trainer.index)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config), sort_keys=False), encoding="utf-8")
    bits = {}
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        try:
            while trainer.index < config.training.steps:
                step = trainer.step()
                _write(metrics, _record(step))
                is_last = trainer.index == config.training.steps
                if is_last or trainer.index % config.evaluate_every == 0:
                    bits = _evaluate(trainer, held_out)
                    _write(metrics, {"evaluated_after": trainer.index, "bits_per_byte": bits, "mean": mean_bits(bits)})
                if is_last or trainer.index % config.save_every == 0:
                    _save(trainer, config, folder, held_out)
                on_step(step)  # last: who stops the run here leaves out nothing that was due
        except Diverged as error:
            raise RunError(f"{error} {_last_good(folder)}") from None
        except StopRun:
            _save(trainer, config, folder, held_out)
            raise
        finally:
            with contextlib.suppress(OSError):  # a full disk, say: what happened before is what has to be told
                draw(folder)
    return bits or last_evaluation(folder)


def _evaluate(trainer: Trainer, held_out: Mapping[str, Tensor]) -> dict[str, float]:
    _require_sound(trainer, held_out)
    return evaluate(trainer.model, held_out, context=trainer.config.context)


def _require_sound(trainer: Trainer, held_out: Mapping[str, Tensor]) -> None:
    """A last step may have ruined the weights, which the next one would find: not after they are called good."""
    inputs = validation_batch(held_out, context=trainer.config.context, limit=1).inputs
    where = first_not_finite(trainer.model, inputs.to(trainer.device))
    if where is not None:
        raise Diverged(trainer.index - 1, where, "Held-out text gives numbers that are none", trainer.config)


def _save(trainer: Trainer, config: RunConfig, folder: Path, held_out: Mapping[str, Tensor]) -> None:
    _require_sound(trainer, held_out)
    save(folder / "checkpoints" / f"step-{trainer.index:07d}.safetensors", trainer.state(), config)
    for old in checkpoints(folder)[:-CHECKPOINTS_KEPT]:
        old.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, the latest last."""
    return sorted((Path(folder) / "checkpoints").glob("step-*.safetensors"))


def _last_good(folder: Path) -> str:
    found = checkpoints(folder)
    return f"The last good checkpoint is {found[-1]}." if found else "There is no checkpoint yet."


def _record(step: Step) -> dict:
    return {
        "step": step.index,
        "learning_rate": step.learning_rate,
        "bits_per_byte": step.bits_per_byte,
        "penalty": step.penalty,
        "gradient_norm": step.gradient_norm,
        "max_violation": step.max_violations,
    }


def _write(metrics, record: dict) -> None:
    metrics.write(json.dumps(record) + "\n")
    metrics.flush()


def read_metrics(folder: Path) -> Iterator[dict]:
    """The lines of a run's `metrics.jsonl`; a last line that was cut off is passed over."""
    path = Path(folder) / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def last_evaluation(folder: Path) -> dict[str, float]:
    """Bits per byte by domain, of the last evaluation of a run; empty if there was none."""
    found = [record["bits_per_byte"] for record in read_metrics(folder) if "evaluated_after" in record]
    return found[-1] if found else {}


def _forget_after(path: Path, index: int) -> None:
    """Drop what was written after the checkpoint: those steps are done again."""
    kept = [r for r in read_metrics(path.parent) if r.get("step", -1) < index and r.get("evaluated_after", 0) <= index]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(partial, path)


def draw(folder: Path) -> None:
    """Draw a run's `curves.png` from its metrics."""
    from moe_lab.viz import draw_curves

    records = list(read_metrics(folder))
    if any("step" in record for record in records):
        (Path(folder) / "curves.png").write_bytes(draw_curves(records).png)


# --- moe-lab train ------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe-lab train`."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what to train, as those in configs/")
    parser.add_argument("--out", type=Path, help="the run folder (default: runs/, and the configuration's name)")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")


def main(args: argparse.Namespace) -> int:
    """Trains with a progress bar, and says how it ended."""
    from tqdm import tqdm

    config = read_config(args.config)
    folder = args.out or Path("runs") / args.config.stem
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    if device == "cpu" and config.model.d_model <= 128:
        torch.set_num_threads(1)  # products this small are fastest on one thread
    stopping = []
    for signum in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C, and what a cluster sends before it ends a job
        signal.signal(signum, lambda signum, _frame: stopping.append(signum))
    bars = []

    def show(step: Step) -> None:
        if not bars:  # not before it is known that there is something to do
            bars.append(tqdm(initial=step.index, total=config.training.steps, unit="step", dynamic_ncols=True))
        busiest = f", MaxVio {max(step.max_violations):.2f}" if step.max_violations else ""
        bars[0].set_postfix_str(f"{step.bits_per_byte:.3f} bits per byte{busiest}", refresh=False)
        bars[0].update()
        if stopping and step.index + 1 < config.training.steps:
            raise StopRun

    try:
        bits = run(config, folder, resume=args.resume, device=device, on_step=show)
    except StopRun:
        bars[0].close()
        print(f"Stopped. Everything so far is in {folder}; go on with --resume.")
        return 130
    finally:
        for bar in bars:
            bar.close()
    for domain, value in bits.items():
        print(f"{domain:>12}  {value:.3f} bits per byte")
    print(f"{'mean':>12}  {mean_bits(bits):.3f} bits per byte, in {folder}")
    return 0
