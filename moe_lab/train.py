"""Trains and evaluates a language model. Draws and prints nothing: a callback sees every step."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lab.config import TrainConfig
from moe_lab.data import sample_batch, validation_windows
from moe_lab.lm import LM

BITS_PER_NAT = 1 / math.log(2)


@dataclass(frozen=True)
class Step:
    """What one step did: its number from 0, its learning rate, its loss in nats per byte."""

    index: int
    learning_rate: float
    loss: float

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte: 8 for a model that knows nothing, less for one that predicts."""
        return self.loss * BITS_PER_NAT


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to zero at the last step."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: LM,
    split: Mapping[str, Tensor],
    config: TrainConfig,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Train in place with AdamW and return what every step did.

    Batches depend on `config.seed` alone, so that two models trained with one seed see the same bytes.

    Raises:
        FloatingPointError: the loss stopped being a number; the message names the step.
    """
    generator = torch.Generator().manual_seed(config.seed)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    history = []
    model.train()
    for index in range(config.steps):
        rate = learning_rate_at(index, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = sample_batch(split, batch_size=config.batch_size, context=config.context, generator=generator)
        logits, _ = model(batch.inputs.to(device))
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.to(device).flatten())
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {index}: lower learning_rate={config.learning_rate} or "
                f"lengthen warmup_steps={config.warmup_steps}."
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        history.append(Step(index, rate, loss.item()))
        on_step(history[-1])
    return history


@torch.no_grad()
def evaluate(model: LM, split: Mapping[str, Tensor], *, context: int = 64, limit: int | None = 128) -> dict[str, float]:
    """Bits per byte on held-out text, by domain, over at most `limit` windows spread evenly over each domain."""
    model.eval()
    device = next(model.parameters()).device
    bits = {}
    for domain, text in split.items():
        inputs, targets = validation_windows(text, context=context, limit=limit)
        logits, _ = model(inputs.to(device))
        nats = F.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten())
        bits[domain] = nats.item() * BITS_PER_NAT
    return bits


def mean_bits(bits: Mapping[str, float]) -> float:
    """The mean over domains, each counted once however long it is."""
    return sum(bits.values()) / len(bits)
