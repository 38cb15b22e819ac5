"""Trains a small MoE language model over ranks: `torchrun --nproc-per-node 4 -m moe_lab.parallel.demo --ep-size 2`.

Without torchrun it is a single rank. Checkpoints are those of `moe-lab train`: a run goes on with any number of ranks.
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_lab.checkpoints import load, require_same, save
from moe_lab.config import RunConfig
from moe_lab.data import load_corpus
from moe_lab.lm import LM
from moe_lab.parallel.layer import FORMS
from moe_lab.parallel.process import TIMEOUT, ProcessRanks, Store, join, leave
from moe_lab.parallel.ranks import RankError
from moe_lab.parallel.training import ParallelTrainer
from moe_lab.paths import CourseError, course_root
from moe_lab.plain import read_config
from moe_lab.train import Diverged, evaluate, mean_bits

LINES = 10  # printed over a run


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.parallel.demo", description=__doc__.splitlines()[0])
    default = course_root() / "configs" / "moe_parallel.yaml"
    parser.add_argument("config", type=Path, nargs="?", default=default, metavar="CONFIG.yaml", help="what to train")
    parser.add_argument("--ep-size", type=int, help="ranks that share one set of experts (default: all)")
    parser.add_argument("--form", choices=FORMS, default="per_rank", help="what travels (default: per_rank)")
    parser.add_argument("--node-size", type=int, help="ranks of a node, for the forms with two hops")
    parser.add_argument("--steps", type=int, help="in place of the configuration's number of steps")
    parser.add_argument("--stop-after", type=int, help="save and end after this step; go on with --resume")
    parser.add_argument("--out", type=Path, help="the folder of the checkpoints (default: none are written)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help=f"seconds to wait for a rank ({TIMEOUT:g})")
    return parser.parse_args(arguments)


def demo(ranks: ProcessRanks, args: argparse.Namespace) -> float:
    """Train, and return the mean bits per byte of held-out text; rank 0 prints and writes.

    Raises:
        CourseError: options that do not fit each other; a checkpoint that does not fit the run.
        RankError: another rank is gone, or does not come.
    """
    config: RunConfig = read_config(args.config)
    if args.stop_after is not None and args.stop_after < 1:
        raise CourseError(f"--stop-after {args.stop_after}: expected 1 or more.")
    if args.steps is not None:
        config = config.but(training=config.training.but(steps=args.steps))
    if args.resume and args.out is None:
        raise CourseError("--resume needs --out, the folder of the checkpoints.")
    corpus = load_corpus()
    torch.manual_seed(config.training.seed)
    model = LM(config.model).to(ranks.device)
    options = {"form": args.form, "node_size": args.node_size}
    trainer = ParallelTrainer(model, corpus.train, config.training, ranks, args.ep_size, **options)
    folder = args.out
    if args.resume:
        _resume(trainer, config, folder)
    elif folder is not None and _checkpoints(folder):
        raise CourseError(f"{folder} holds checkpoints: go on with --resume, or choose another folder with --out.")
    say = print if ranks.rank == 0 else lambda *_, **__: None
    ep_size, n_groups = trainer.experts_group.size, trainer.replicas.size
    say(f"ranks: {ranks.size}; groups: {n_groups}, each with the experts over {ep_size}. From step {trainer.index}:")

    last = min(config.training.steps, args.stop_after or config.training.steps)
    while trainer.index < last:
        with ranks.watch() as events:
            step = trainer.step()
        sent = sum(event.bytes_to_others for event in events)
        if trainer.index % max(1, config.training.steps // LINES) == 0 or trainer.index == last:
            violation = max(step.max_violations, default=0.0)
            say(f"step {trainer.index:5}  {step.bits_per_byte:.4f} bits per byte  MaxVio {violation:.2f}", end="")
            say(f"  rank 0 sent {sent / 1e6:.2f} MB to other ranks in all-to-alls", flush=True)
        if folder is not None and (trainer.index % config.save_every == 0 or trainer.index == last):
            _save(trainer, config, folder)
    bits = mean_bits(evaluate(trainer.model, corpus.val, context=config.training.context))
    say(f"held out: {bits:.4f} bits per byte", flush=True)
    return bits


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


def _save(trainer: ParallelTrainer, config: RunConfig, folder: Path) -> None:
    state = trainer.state()  # collective
    if trainer.ranks.rank == 0:
        save(folder / f"step-{trainer.index:07d}.safetensors", state, config)


def _resume(trainer: ParallelTrainer, config: RunConfig, folder: Path) -> None:
    found = _checkpoints(folder)
    trainer.ranks.agree("the checkpoint", latest=found[-1].name if found else "none")
    if not found:
        raise CourseError(f"{folder} holds no checkpoint to resume from.")
    state, saved = load(found[-1])
    require_same(saved, config, found[-1])
    trainer.load_state(state)


def main(arguments: Sequence[str] | None = None) -> int:
    """Joins, trains, and says in one line what went wrong if something did."""
    args = parse(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    store = None
    try:
        if "RANK" in os.environ:
            ranks = join(timeout=args.timeout)
        else:
            store = Store()
            ranks = join(0, 1, store.address, timeout=args.timeout)
    except (RankError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1

    def told_to_end(*_: object) -> None:
        """torchrun ends all ranks when one has failed: say which before ending."""
        raise ranks.lost("told to end")

    before = signal.signal(signal.SIGTERM, told_to_end)
    error: BaseException | None = None
    try:
        demo(ranks, args)
    except BaseException as failure:  # whatever it is, the others are to be told
        error = failure
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this rank is ending
    if isinstance(error, RankError | CourseError | Diverged | ValueError | KeyboardInterrupt):
        sys.stderr.write(f"Rank {ranks.rank}: {str(error) or type(error).__name__}\n")  # at once, for others speak too
    elif error is not None:
        traceback.print_exception(error)
    leave(ranks, error)
    signal.signal(signal.SIGTERM, before)
    return 1 if error else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # gloo's threads may still hold on to ranks that are gone
