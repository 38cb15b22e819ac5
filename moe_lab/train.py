"""Trains and evaluates a language model. Draws and prints nothing: a callback sees every step."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.balance import max_violation, sequence_loss, switch_loss, update_bias, z_loss
from moe_lab.config import BalanceConfig, TrainConfig
from moe_lab.data import sample_batch, validation_windows
from moe_lab.lm import LM
from moe_lab.records import ExpertChoice, Routing
from moe_lab.routing import NotFiniteError

BITS_PER_NAT = 1 / math.log(2)
DIVERGED_AT = 2.0  # times the loss of a model that knows nothing
WINDOWS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Step:
    """What one step did.

    Args:
        index: its number, from 0.
        loss: the cross-entropy in nats per byte, without what is added for balance.
        penalty: what was added for balance: the balance losses times α and the z-losses times their coefficient.
        gradient_norm: before clipping.
        tokens_per_expert: for every layer of experts, (E,) int64, counted over all micro-batches.
    """

    index: int
    learning_rate: float
    loss: float
    penalty: float = 0.0
    gradient_norm: float = 0.0
    tokens_per_expert: tuple[Tensor, ...] = ()

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte: 8 for a model that knows nothing, less for one that predicts."""
        return self.loss * BITS_PER_NAT

    @property
    def max_violations(self) -> list[float]:
        """MaxVio of every layer of experts."""
        return [max_violation(counts).item() for counts in self.tokens_per_expert]


class Diverged(FloatingPointError):
    """Training stopped being sensible. The model is as it was before the step that failed.

    Args:
        step: the step that failed.
        where: the first part of the model that gave something that is no number, or None if none did.
    """

    def __init__(self, step: int, where: str | None, what: str, config: TrainConfig) -> None:
        self.step, self.where = step, where
        first = f"; the first to give no number is {where}" if where else ""
        super().__init__(
            f"{what} at step {step}{first}. Lower learning_rate={config.learning_rate:g} or lengthen "
            f"warmup_steps={config.warmup_steps}."
        )


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from `learning_rate` to zero after the last step, or no change."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def balance_penalty(
    routings: Sequence[Routing],
    balance: BalanceConfig,
    n_sequences: int,
    tokens_per_expert: Sequence[Tensor] | None = None,
) -> Tensor:
    """What is added to the loss, summed over layers: α times the balance loss, and the coefficient times the z-loss.

    Args:
        tokens_per_expert: for every layer, the loads of the whole batch, which "global_batch" takes f from.
    """
    total = routings[0].router_logits.new_zeros(())
    for layer, routing in enumerate(routings):
        if balance.alpha and balance.loss == "sequence":
            total = total + balance.alpha * sequence_loss(routing, n_sequences)
        elif balance.alpha:
            counts = tokens_per_expert[layer] if balance.loss == "global_batch" and tokens_per_expert else None
            total = total + balance.alpha * switch_loss(routing, tokens_per_expert=counts)
        if balance.z_loss:
            total = total + balance.z_loss * z_loss(routing)
    return total


class Trainer:
    """Trains a model in place, a step at a time; everything that the next step depends on is in `state()`.

    Batches depend on `config.seed` alone, so that two models trained with one seed see the same bytes.

    Raises:
        ValueError: a cure that the model's layers of experts cannot take.
    """

    def __init__(self, model: LM, split: Mapping[str, Tensor], config: TrainConfig) -> None:
        _require_curable(model, config.balance)
        self.model, self.split, self.config, self.index = model, split, config, 0
        self.device = next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(model, config),
            lr=config.learning_rate,
            betas=config.betas,
            fused=self.device.type == "cuda",
        )
        self.too_much = DIVERGED_AT * math.log(model.config.vocab_size)
        model.train()

    def step(self) -> Step:
        """One step: forward and backward of every micro-batch, one update of the weights, one of the biases.

        Raises:
            Diverged: the loss or the gradient is no number, or the loss is twice that of a model that knows nothing.
        """
        config, model = self.config, self.model
        rate = learning_rate_at(self.index, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        batch = sample_batch(self.split, batch_size=config.batch_size, context=config.context, generator=self.generator)
        parts = [
            (self._mine(inputs).to(self.device), self._mine(targets).to(self.device))
            for inputs, targets in zip(
                batch.inputs.chunk(config.micro_batches), batch.targets.chunk(config.micro_batches), strict=True
            )
        ]
        self.optimizer.zero_grad()
        try:
            loss, penalty, counts = self._backward(parts)
        except NotFiniteError:
            raise self._diverged("The router met numbers that are none", parts) from None
        if not math.isfinite(loss + penalty) or loss > self.too_much:
            raise self._diverged(f"The loss is {loss:.3g} nats per byte (and {penalty:.3g} for balance)", parts)
        self._sum_gradients()
        total = self._gradient_norm()
        norm = total.item()
        if not math.isfinite(norm):  # not yet clipped: that would make all of them NaN
            raise self._diverged(f"The gradient's norm is {norm}", parts)
        nn.utils.clip_grads_with_norm_(model.parameters(), config.clip_norm, total)
        self.optimizer.step()
        if config.balance.bias_rate:
            for moe, load in zip(model.moe_layers, counts, strict=True):
                router = moe.router
                bias = update_bias(router.selection_bias, load, config.balance.bias_rate, config.balance.recentre)
                router.selection_bias.copy_(bias)
        done = Step(self.index, rate, loss, penalty, norm, counts)
        self.index += 1
        return done

    def _backward(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float, tuple[Tensor, ...]]:
        """Gradients of the mean over micro-batches; the mean loss, the mean penalty, and the loads of all of them."""
        config, balance = self.config, self.config.balance
        is_global = balance.loss == "global_batch" and balance.alpha > 0
        whole = self._loads(parts) if is_global and len(parts) > 1 else None
        losses, penalties, counts = [], [], []
        for inputs, targets in parts:
            with self._autocast():
                logits, routings = self.model(inputs, recompute=config.recompute)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            total = loss
            if routings and (balance.alpha or balance.z_loss):
                loads = whole or [self._sum(routing.tokens_per_expert) for routing in routings] if is_global else None
                penalty = balance_penalty(routings, balance, len(inputs), loads)
                penalties.append(penalty.detach())
                total = loss + penalty
            (total * self._share(inputs) / len(parts)).backward()
            losses.append(loss.detach() * self._share(inputs))
            counts.append([routing.tokens_per_expert for routing in routings])
        mean_loss = torch.stack(losses).mean()
        mean_penalty = torch.stack(penalties).mean() * self._share(parts[0][0]) if penalties else mean_loss * 0
        loads = tuple(self._sum(torch.stack(layer).sum(0)) for layer in zip(*counts, strict=True))
        loss, penalty = self._sum(torch.stack([mean_loss, mean_penalty.float()])).tolist()
        return loss, penalty, loads

    @torch.no_grad()
    def _loads(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The loads of the whole batch, known before the first gradient, for the price of one more forward pass."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), self._autocast():
            counts = [[routing.tokens_per_expert for routing in self.model(inputs)[1]] for inputs, _ in parts]
        return [self._sum(torch.stack(layer).sum(0)) for layer in zip(*counts, strict=True)]

    # What a trainer that is one of several ranks does otherwise: see `moe_lab.parallel.training`.

    def _mine(self, sequences: Tensor) -> Tensor:
        """The part of a micro-batch that this process works on: all of it."""
        return sequences

    def _share(self, inputs: Tensor) -> float:
        """Which share of its micro-batch that part is."""
        return 1.0

    def _sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return tensor

    def _sum_gradients(self) -> None:
        """Make every gradient that of the whole batch."""

    def _gradient_norm(self) -> Tensor:
        """The norm of the whole model's gradient."""
        return nn.utils.get_total_norm([weight.grad for weight in self.model.parameters() if weight.grad is not None])

    def _first(self, found: str | None) -> str | None:
        """What was found, by the first process that found something."""
        return found

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.precision == "bf16" else nullcontext()

    def _diverged(self, what: str, parts: Sequence[tuple[Tensor, Tensor]]) -> Diverged:
        where = self._first(_bad_weight(self.model))
        with self._autocast():
            for inputs, _ in parts:
                where = where or self._first(_bad_output(self.model, inputs))
        where = where or self._first(_bad_gradient(self.model))
        return Diverged(self.index, where, what, self.config)

    def state(self) -> dict[str, Tensor]:
        """Weights, AdamW's moments and the random generators: what a trainer needs to go on as if never stopped."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for parameter, moments in self.optimizer.state.items():
            state |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in moments.items()}
        state["random.batches"], state["random.torch"] = self.generator.get_state(), torch.get_rng_state()
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        state["index"] = torch.tensor(self.index)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()` of another trainer of the same model and training."""
        self.model.load_state_dict(_below("model.", state))
        moments = _below("optimizer.", state)
        self.optimizer.state.clear()  # of a state from before the first step, none come back
        for name, parameter in self.model.named_parameters():
            if own := _below(f"{name}.", moments):
                self.optimizer.state[parameter] = {k: value.to(self.device, copy=True) for k, value in own.items()}
        self.generator.set_state(state["random.batches"])
        torch.set_rng_state(state["random.torch"])
        if self.device.type == "cuda" and "random.cuda" in state:
            torch.cuda.set_rng_state(state["random.cuda"], self.device)
        self.index = int(state["index"])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parameter_groups(model: LM, config: TrainConfig) -> list[dict]:
    """Routers at their own rate; weight decay for matrices only, the embedding's rows being no matrix but a table."""
    routers = {parameter for moe in model.moe_layers for parameter in moe.router.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = config.router_rate if parameter in routers else 1.0
        is_bias = name.rpartition(".")[2].startswith("b_")  # the experts' are stacked, and have two dimensions
        decayed = parameter.ndim >= 2 and not is_bias and parameter is not model.embedding.weight
        groups.setdefault((rate, config.weight_decay if decayed else 0.0), []).append(parameter)
    return [{"params": parameters, "rate": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def _require_curable(model: LM, balance: BalanceConfig) -> None:
    asks = balance.alpha > 0 or balance.z_loss > 0 or balance.bias_rate > 0
    moe = model.config.moe
    if asks and not model.moe_layers:
        raise ValueError("balance asks for a cure, but the model has no experts: expected moe in its configuration.")
    if asks and moe.expert_choice:
        raise ValueError("balance asks for a cure, but with expert_choice=True every expert is equally busy anyway.")
    if balance.bias_rate and not moe.selection_bias:
        expected = "selection_bias=True in the configuration of the experts"
        raise ValueError(
            f"bias_rate={balance.bias_rate:g} moves a bias that the routers do not have: expected {expected}."
        )


def first_not_finite(model: LM, inputs: Tensor) -> str | None:
    """The first part of the model, in the order of computation, that holds or gives NaN or infinity; None if none does.

    A weight is named before what is computed with it.
    """
    return _bad_weight(model) or _bad_output(model, inputs)


def _bad_weight(model: LM) -> str | None:
    bad = (name for name, weight in model.named_parameters() if not weight.isfinite().all())
    return next((f"the weight {name}" for name in bad), None)


def _bad_gradient(model: LM) -> str | None:
    """The first on the way back, which starts at the top."""
    weights = reversed(list(model.named_parameters()))
    bad = (name for name, weight in weights if weight.grad is not None and not weight.grad.isfinite().all())
    return next((f"the gradient of {name}" for name in bad), None)


@torch.no_grad()
def _bad_output(model: LM, inputs: Tensor) -> str | None:
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and not tensor.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    was_training = model.training
    model.eval()  # draws no random numbers
    try:
        model(inputs)
    except NotFiniteError:
        found.append("a router's input")
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def train(
    model: LM,
    split: Mapping[str, Tensor],
    config: TrainConfig,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Train in place with AdamW and return what every step did; see `Trainer`.

    Raises:
        ValueError: a cure that the model cannot take.
        Diverged: training failed; the message names the step, and where the first bad number came from.
    """
    trainer, history = Trainer(model, split, config), []
    while trainer.index < config.steps:
        history.append(trainer.step())
        on_step(history[-1])
    return history


@torch.no_grad()
def evaluate(model: LM, split: Mapping[str, Tensor], *, context: int = 64, limit: int | None = 128) -> dict[str, float]:
    """Bits per byte on held-out text, by domain, over at most `limit` windows spread evenly over each domain."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    bits = {}
    for domain, text in split.items():
        inputs, targets = validation_windows(text, context=context, limit=limit)
        nats = 0.0
        for some, following in zip(inputs.split(WINDOWS_AT_ONCE), targets.split(WINDOWS_AT_ONCE), strict=True):
            logits, _ = model(some.to(device))
            nats += F.cross_entropy(logits.flatten(0, 1), following.to(device).flatten(), reduction="sum").item()
        bits[domain] = nats / targets.numel() * BITS_PER_NAT
    model.train(was_training)
    return bits


@torch.no_grad()
def choices_of(model: LM, inputs: Tensor) -> tuple[Routing, ...] | tuple[ExpertChoice, ...]:
    """What every layer of experts decides for inputs (B, S), outside training."""
    was_training = model.training
    model.eval()
    routings = model(inputs.to(next(model.parameters()).device))[1]
    model.train(was_training)
    return routings


def mean_bits(bits: Mapping[str, float]) -> float:
    """The mean over domains, each counted once however long it is."""
    return sum(bits.values()) / len(bits)
