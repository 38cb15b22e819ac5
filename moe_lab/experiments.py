"""Long experiments: several models, several seeds each, recorded once and shown by the notebooks.

A script in `benchmarks/experiments/` asks one question and says which variants answer it; this module trains and
measures them, keeps a record of every run in `benchmarks/results/experiments/`, and reads the records back.
"""

import argparse
import datetime
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_lab.balance import (
    churn,
    dead_experts,
    domain_information,
    dropped_share,
    load_entropy,
    max_violation,
    shuffle_within,
)
from moe_lab.config import BalanceConfig, LMConfig, MoEConfig, RunConfig, TrainConfig
from moe_lab.data import Batch, Corpus, load_corpus, validation_batch
from moe_lab.dispatch import expert_capacity
from moe_lab.lm import LM
from moe_lab.machine import machine
from moe_lab.paths import CourseError, course_root, results_dir
from moe_lab.plain import from_plain, read_config, to_plain
from moe_lab.presets import BASELINE_TRAINING, MOE_BASELINE
from moe_lab.train import Step, choices_of, evaluate, mean_bits, train

WINDOWS_PROBED = 64  # validation windows of each domain, on which routing is measured
CAPACITY_FACTOR = 1.25  # for the share of choices that a capacity would have dropped (Switch, section 2.2)
POINTS = 20  # of a curve over a run


@dataclass(frozen=True)
class Variant:
    """One model and its training, under the name it has in figures; the seed is set for each run.

    Args:
        follow_churn: look at the choices on validation text at every point of the curve, for their churn.
    """

    name: str
    model: LMConfig
    training: TrainConfig
    follow_churn: bool = False


Variants = Callable[[LMConfig, TrainConfig], Sequence[Variant]]


def run_once(
    variant: Variant,
    corpus: Corpus,
    seed: int,
    device: str = "cpu",
    on_step: Callable[[Step], None] = lambda step: None,
) -> dict:
    """Train one variant with one seed and measure it; a record of plain numbers. `on_step` sees every step.

    Loads on the way are of the training text, summed over the steps up to each point; at the end they are of
    validation text, and so is what routing tells about the domain.
    """
    training = variant.training.but(seed=seed)
    probe = validation_batch(corpus.val, context=training.context, limit=WINDOWS_PROBED)
    torch.manual_seed(seed)
    model = LM(variant.model).to(device)
    every = max(1, math.ceil(training.steps / POINTS))
    curve: list[dict] = []
    losses: list[float] = []
    counts: list[tuple[Tensor, ...]] = []
    before: list[Tensor] = []

    def note(step: Step) -> None:
        on_step(step)
        losses.append(step.bits_per_byte)
        counts.append(step.tokens_per_expert)
        if (step.index + 1) % every and step.index + 1 < training.steps:
            return
        point = {"step": step.index + 1, "bits_per_byte": statistics.fmean(losses)}
        point["load"] = [torch.stack(layer).sum(0).tolist() for layer in zip(*counts, strict=True)]
        if variant.follow_churn:
            now = [routing.topk_experts for routing in choices_of(model, probe.inputs)]
            if before:
                point["churn"] = [churn(*pair) for pair in zip(before, now, strict=True)]
            before[:] = now
        curve.append(point)
        losses.clear()
        counts.clear()

    train(model, corpus.train, training, note)
    bits = evaluate(model, corpus.val, context=training.context)
    return {
        "variant": variant.name,
        "seed": seed,
        "model": to_plain(variant.model),
        "training": to_plain(training),
        "bits_per_byte": bits,
        "mean": mean_bits(bits),
        "curve": curve,
        "layers": measure_routing(model, probe),
    }


def measure_routing(model: LM, probe: Batch, seed: int = 0) -> list[dict]:
    """For every layer of experts, how evenly it spreads the text, and what its choices tell about the domain."""
    generator = torch.Generator().manual_seed(seed)
    tokens = probe.inputs.flatten()
    domains = probe.domains.repeat_interleave(probe.inputs.shape[1])
    shuffled = shuffle_within(tokens, domains, generator)
    measured = []
    for routing in choices_of(model, probe.inputs):
        counts, n_tokens = routing.tokens_per_expert.cpu(), len(tokens)
        layer = {
            "max_violation": max_violation(counts).item(),
            "entropy": load_entropy(counts).item(),
            "dead": dead_experts(counts).item(),
        }
        if model.config.moe is not None and not model.config.moe.expert_choice:
            capacity = expert_capacity(n_tokens, model.config.moe.top_k, len(counts), CAPACITY_FACTOR)
            experts = routing.topk_experts.cpu()
            layer["dropped"] = dropped_share(counts, capacity).item()
            layer["information"] = domain_information(experts, domains, tokens)
            layer["information_shuffled"] = domain_information(experts, shuffled, tokens)
            layer["mean_logsumexp"] = routing.router_logits.logsumexp(-1).mean().item()
        measured.append(layer)
    return measured


# --- records ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """What an experiment recorded: the question, where and when, and every run."""

    question: str
    stamp: Mapping[str, str]
    runs: Sequence[Mapping]

    @property
    def variants(self) -> list[str]:
        """The names of the variants, in the order of the experiment."""
        return list(dict.fromkeys(run["variant"] for run in self.runs))

    def of(self, variant: str) -> list[Mapping]:
        """The runs of one variant, a run a seed.

        Raises:
            ValueError: no variant of that name; the message lists those there are.
        """
        found = [run for run in self.runs if run["variant"] == variant]
        if not found:
            raise ValueError(f"variant={variant!r}: expected one of {', '.join(self.variants)}.")
        return found

    def configs(self, variant: str, seed: int = 0) -> tuple[LMConfig, TrainConfig]:
        """The model and the training of one recorded run, to do it again."""
        by_seed = {run["seed"]: run for run in self.of(variant)}
        if seed not in by_seed:
            raise ValueError(f"seed={seed}: expected one of {', '.join(map(str, by_seed))}.")
        run = by_seed[seed]
        return from_plain(LMConfig, run["model"]), from_plain(TrainConfig, run["training"])

    def values(self, variant: str, measure: str, layer: int | None = None) -> list[float]:
        """One measure of every run of a variant: "mean", or with a `layer` one of that layer's."""
        return [run[measure] if layer is None else run["layers"][layer][measure] for run in self.of(variant)]

    def band(self, variant: str, measure: str = "mean", layer: int | None = None) -> tuple[float, float, float]:
        """The least, the mean and the largest of `values`."""
        values = self.values(variant, measure, layer)
        return min(values), statistics.fmean(values), max(values)


def results_file(name: str) -> Path:
    """Where an experiment keeps its records."""
    return results_dir() / "experiments" / f"{name}.json"


def load_results(name: str) -> Results:
    """What an experiment recorded.

    Raises:
        CourseError: nothing is recorded under this name, or the file is damaged; the message says what to run.
    """
    path = results_file(name)
    try:
        return Results(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CourseError(f"{path} does not exist: run `python benchmarks/experiments/{name}.py`.") from None
    except (ValueError, TypeError) as error:
        raise CourseError(f"{path} is damaged ({error}): restore it with git, or run its script again.") from None


def describe(name: str, base: str = "") -> str:
    """Where an experiment's numbers come from, in two sentences; or that there are none yet, and what would make them.

    Args:
        base: the larger model that it was run with, a name in `configs/`; by default the notebooks' small one.
    """
    command = f"python benchmarks/experiments/{name}.py"
    if base:
        name, command = f"{name}-{base}", f"{command} --base configs/{base}.yaml --device cuda"
    if not results_file(name).exists():
        return f"Nothing is recorded here yet. On a machine with a GPU: {command}"
    results = load_results(name)
    seeds = len({run["seed"] for run in results.runs})
    on = ", ".join(f"{key} {value}" for key, value in results.stamp.items() if key != "date")
    return f"{len(results.variants)} variants, {seeds} seeds, recorded {results.stamp['date']} ({on}). Again: {command}"


def run_experiment(name: str, question: str, variants: Sequence[Variant], n_seeds: int, device: str = "cpu") -> Results:
    """Do the runs that are not recorded yet, each kept as soon as it is done.

    A recorded run is done again if its model or its training is another one now. Runs of variants that are no longer
    asked for are dropped. The stamp is that of the last run that was done; a run done under another has its own.
    """
    path = results_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded = load_results(name) if path.exists() else Results(question, {}, ())
    known = {(run["variant"], run["seed"]): {"stamp": recorded.stamp, **run} for run in recorded.runs}
    corpus = load_corpus()
    stamp = recorded.stamp
    for seed in range(n_seeds):
        for variant in variants:
            run = known.get((variant.name, seed))
            if run is None or not _is_of(run, variant, seed):
                stamp = {"date": datetime.date.today().isoformat(), **machine(), "device": device}
                run = {**run_once(variant, corpus, seed, device), "stamp": stamp}
                print(f"{variant.name}, seed {seed}: {run['mean']:.3f} bits per byte", flush=True)
            known[variant.name, seed] = run
            runs = [known[v.name, s] for s in range(n_seeds) for v in variants if (v.name, s) in known]
            _keep(path, question, stamp, runs)
    return load_results(name)


def _is_of(run: Mapping, variant: Variant, seed: int) -> bool:
    asked = (to_plain(variant.model), to_plain(variant.training.but(seed=seed)), variant.follow_churn)
    return (run["model"], run["training"], any("churn" in point for point in run["curve"])) == asked


def _keep(path: Path, question: str, stamp: Mapping, runs: Sequence[Mapping]) -> None:
    own = [{key: value for key, value in run.items() if key != "stamp" or value != stamp} for run in runs]
    lines = ",\n".join(json.dumps(_rounded(run), separators=(",", ":")) for run in own)
    head = json.dumps({"question": question, "stamp": stamp}, indent=1)[:-2]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f'{head},\n "runs": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(partial, path)


def _rounded(value: object) -> object:
    """Measured numbers to five digits: more would be noise, and twice the file."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: item if key in ("model", "training") else _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def without_cures(base: RunConfig) -> tuple[LMConfig, TrainConfig]:
    """A larger model and its training to start from: its sizes and steps, with a plain router and nothing for balance.

    What keeps its experts busy would else be in the runs that are to show what happens without a cure.

    Raises:
        CourseError: a base without experts.
    """
    moe = base.model.moe
    if moe is None:
        raise CourseError("--base is a dense model: expected one with experts, which the variants are made of.")
    plain = MoEConfig(d_model=moe.d_model, d_ff=moe.d_ff, n_experts=moe.n_experts, top_k=moe.top_k, expert=moe.expert)
    return base.model.but(moe=plain), base.training.but(balance=BalanceConfig(), router_rate=1.0)


def main(script: str, question: str, variants: Variants, n_seeds: int) -> None:
    """What an experiment's script does when it is run: all its runs, on the small models or on others."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--seeds", type=int, default=n_seeds, help=f"runs of every variant (default {n_seeds})")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for the larger models")
    parser.add_argument(
        "--base", type=Path, help="a configuration in configs/ to start from (default: the notebooks' small model)"
    )
    args = parser.parse_args()
    model, training, name = MOE_BASELINE, BASELINE_TRAINING, Path(script).stem
    if args.base:
        model, training = without_cures(read_config(args.base))
        name = f"{name}-{args.base.stem}"
    if args.device == "cpu":
        torch.set_num_threads(1)
    run_experiment(name, question, variants(model, training), args.seeds, args.device)
    print(f"Kept in {results_file(name).relative_to(course_root())}.")
