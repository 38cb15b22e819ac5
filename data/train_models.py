#!/usr/bin/env python3
"""Train the two small models that come with the course, and write down in models.json what they are.

    python data/train_models.py                   # both: a few minutes on one core
    python data/train_models.py --only tiny_moe   # one of them

One thread and a fixed seed: on one machine the weights come out the same each time. On another the last bits of a
product differ, and after 1,500 steps so do the weights; the figures below should still hold.

Predicted, from trials with these recipes (they were chosen for what they show):
tiny_moe            2.2 to 2.3 bits per byte, and no expert with more than 1.3 times its even share (MaxVio below 0.3).
tiny_moe_collapsed  one expert in nearly every token's choice of two, in both layers (MaxVio above 2; at most it is 3);
                    worse by a tenth of a bit or less: experts that all work are worth little at this size.
"""

import argparse
import datetime
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_lab.checkpoints import load_model, save_model
from moe_lab.config import BalanceConfig, LMConfig, TrainConfig
from moe_lab.data import load_corpus, validation_batch
from moe_lab.experiments import WINDOWS_PROBED, measure_routing
from moe_lab.lm import LM
from moe_lab.machine import machine
from moe_lab.plain import to_plain
from moe_lab.presets import BASELINE_TRAINING, MOE_BASELINE
from moe_lab.train import Step, evaluate, mean_bits, train

HERE = Path(__file__).resolve().parent
STEPS = 1500
ROUNDING_MAY_COST = 0.01  # bits per byte, of keeping weights in bf16


@dataclass(frozen=True)
class Recipe:
    """One model, its training, and what it is for."""

    about: str
    training: TrainConfig
    model: LMConfig = MOE_BASELINE


# The same model and the same bytes in the same order; how fast the routers learn differs, and what the loss adds.
RECIPES = {
    "tiny_moe": Recipe(
        "Trained with the Switch loss at 0.01, so that all experts are about equally busy.",
        BASELINE_TRAINING.but(steps=STEPS, balance=BalanceConfig(alpha=0.01)),
    ),
    # A fast router alone leaves the load uneven (MaxVio 1.0 and 1.4 after as many steps); pressed to small logits by a
    # z-loss, which balances nothing, it collapses.
    "tiny_moe_collapsed": Recipe(
        "Trained to show collapse: no balance loss, routers that learn ten times as fast, and a z-loss of 0.01.",
        BASELINE_TRAINING.but(steps=STEPS, router_rate=10.0, balance=BalanceConfig(z_loss=0.01)),
    ),
}


def train_model(recipe: Recipe) -> LM:
    """The model of a recipe, trained from scratch."""

    def tell(step: Step) -> None:
        if (step.index + 1) % 250 == 0:
            loads = ", ".join(f"{violation:.2f}" for violation in step.max_violations)
            print(f"  step {step.index + 1}: {step.bits_per_byte:.2f} bits per byte, MaxVio {loads}", flush=True)

    torch.manual_seed(recipe.training.seed)
    model = LM(recipe.model)
    train(model, load_corpus().train, recipe.training, tell)
    return model


def measure(model: LM) -> dict:
    """Bits per byte on held-out text, by domain and in the mean, and how uneven the experts' load is there."""
    held_out = load_corpus().val
    bits = evaluate(model, held_out)
    layers = measure_routing(model, validation_batch(held_out, context=64, limit=WINDOWS_PROBED))
    return {
        "bits_per_byte": {name: round(value, 4) for name, value in (bits | {"mean": mean_bits(bits)}).items()},
        "max_violation": [round(layer["max_violation"], 3) for layer in layers],
    }


def ship(name: str, folder: Path) -> dict:
    """Train a model, write its weights in bf16, and describe what was written."""
    recipe = RECIPES[name]
    print(f"{name}: {recipe.about}")
    model = train_model(recipe)
    path = folder / "models" / f"{name}.safetensors"
    save_model(path, model, torch.bfloat16)
    measured = measure(load_model(path))
    cost = measured["bits_per_byte"]["mean"] - measure(model)["bits_per_byte"]["mean"]
    assert cost < ROUNDING_MAY_COST, f"bf16 costs {cost:.4f} bits per byte"
    content = path.read_bytes()
    print(f"  {len(content):,} bytes; rounding to bf16 costs {cost:+.4f} bits per byte")
    print(f"  held out: {measured['bits_per_byte']['mean']:.3f} bits per byte, MaxVio {measured['max_violation']}")
    return {
        "about": recipe.about,
        "command": f"python data/train_models.py --only {name}",
        "stamp": {"date": datetime.date.today().isoformat(), **machine()},
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **measured,
        "model": to_plain(recipe.model),
        "training": to_plain(recipe.training),
    }


def main(arguments: list[str] | None = None) -> int:
    """Train what was asked for and write models.json anew; other models keep their entries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=RECIPES, help="train one model")
    parser.add_argument("--data", type=Path, default=HERE, help="the folder to write to (default: this one)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    manifest = options.data / "models.json"
    known = json.loads(manifest.read_text(encoding="utf-8"))["models"] if manifest.exists() else {}
    for name in [options.only] if options.only else RECIPES:
        known[name] = ship(name, options.data)
        ordered = {key: known[key] for key in RECIPES if key in known}
        manifest.write_text(json.dumps({"models": ordered}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
