"""Training over ranks: data parallel everywhere, expert parallel within groups. See `Trainer` for what a step does."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe_lab.config import TrainConfig
from moe_lab.lm import LM
from moe_lab.moe import MoE
from moe_lab.parallel.layer import ExpertParallelMoE
from moe_lab.parallel.placement import Placement
from moe_lab.parallel.ranks import Ranks
from moe_lab.train import Trainer


def parallelize(model: LM, ranks: Ranks, placement: Placement | None = None, **options: object) -> LM:
    """Spread the experts of a model, which is alike on every rank, over the ranks; in place, and returned.

    Args:
        options: as `ExpertParallelMoE` takes them.
    """
    for block in model.blocks:
        if isinstance(block.ffn, MoE):
            block.ffn = ExpertParallelMoE(block.ffn, ranks, placement, **options)
    return model


class ParallelTrainer(Trainer):
    """One of several trainers that are ranks: together they take the steps that a `Trainer` takes alone.

    The ranks stand in groups of `ep_size`. In a group the experts are spread; groups hold the same experts, rank by
    rank. All else is on every rank. Each rank works on its own sequences of every batch, and its loss is its part of
    the mean over all of them; so gradients need no scaling, they only add up:

    - within a group an expert's gradient is complete already, for the tokens of all its ranks came to it;
    - across groups the gradients of the same experts are summed;
    - those of everything else are summed over all ranks.

    `state()` is that of a `Trainer`, whole, on every rank: a run can go on with any other number of ranks, and alone.
    The balance loss "global_batch" takes the loads of all ranks, and so does the selection bias; "switch" is over each
    rank's own tokens. With jitter or noise the ranks draw the same numbers for different tokens.

    Args:
        model: alike on every rank.
        ep_size: ranks that share one set of experts; by default all.
        options: as `ExpertParallelMoE` takes them.

    Raises:
        ValueError: as `Trainer` and `ExpertParallelMoE`; a micro-batch with fewer sequences than ranks; redundant
            experts, whose copies would grow apart.
    """

    def __init__(
        self,
        model: LM,
        split: Mapping[str, Tensor],
        config: TrainConfig,
        ranks: Ranks,
        ep_size: int | None = None,
        placement: Placement | None = None,
        **options: object,
    ) -> None:
        placed = "even" if placement is None else placement.experts
        facts = {"model": model.config, "ep_size": ep_size, "n_ranks": ranks.size, "placement": placed}
        ranks.agree("the training", **vars(config), **facts, **options)
        sequences = config.batch_size // config.micro_batches
        if sequences < ranks.size:
            what = f"batch_size={config.batch_size} in micro_batches={config.micro_batches}"
            raise ValueError(f"{what}: expected at least a sequence for each of the {ranks.size} ranks.")
        if placement is not None and placement.n_redundant:
            raise ValueError(f"n_redundant={placement.n_redundant}: expected 0 in training.")
        self.ranks = ranks
        self.experts_group, self.replicas = ranks.split(ranks.size if ep_size is None else ep_size)
        self.sequences = sequences
        parallelize(model, self.experts_group, placement, **options)
        self.experts = {
            f"{name}.{key}": (weight, module.placement)
            for name, module in model.named_modules()
            if isinstance(module, ExpertParallelMoE)
            for key, weight in module.named_parameters()
            if key.startswith("experts.")
        }
        super().__init__(model, split, config)

    def _mine(self, sequences: Tensor) -> Tensor:
        return sequences.tensor_split(self.ranks.size)[self.ranks.rank]

    def _share(self, inputs: Tensor) -> float:
        return len(inputs) / self.sequences

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.ranks.all_reduce(tensor)

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Those of what every rank has, and those of this rank's experts; in the same order on every rank."""
        ours = {weight for weight, _ in self.experts.values()}
        found = [(weight.grad, weight in ours) for weight in self.model.parameters() if weight.grad is not None]
        return [grad for grad, is_ours in found if not is_ours], [grad for grad, is_ours in found if is_ours]

    def _sum_gradients(self) -> None:
        replicated, experts = self._gradients()
        with self.ranks.stage("gradients"):
            sum_gradients(replicated, self.ranks)
            sum_gradients(experts, self.replicas)

    def _gradient_norm(self) -> Tensor:
        replicated, experts = self._gradients()
        squares = nn.utils.get_total_norm(experts).square() if experts else replicated[0].new_zeros(())
        return (nn.utils.get_total_norm(replicated).square() + self.experts_group.all_reduce(squares)).sqrt()

    def _first(self, found: str | None) -> str | None:
        return next(filter(None, self.ranks.gather_text(found or "")), None)

    def state(self) -> dict[str, Tensor]:
        """As `Trainer.state`, with the experts of all ranks. Collective: every rank calls it."""
        state = super().state()
        for name, (_, placement) in self.experts.items():
            for key in self._keys(state, name):
                state[key] = gather_experts(state[key], placement, self.experts_group)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state()` of a trainer of the same model and training, whatever its number of ranks."""
        mine = dict(state)
        for name, (_, placement) in self.experts.items():
            for key in self._keys(state, name):
                mine[key] = state[key][list(placement.experts[self.experts_group.rank])]
        super().load_state(mine)

    @staticmethod
    def _keys(state: Mapping[str, Tensor], name: str) -> list[str]:
        """An expert weight and its moments; AdamW's step counter is a number, and alike everywhere."""
        names = (f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq")
        return [key for key in names if key in state]


def sum_gradients(gradients: list[Tensor], ranks: Ranks) -> None:
    """Replace gradients by their sums over the ranks, in one all-reduce; every rank gives them in the same order."""
    if not gradients:
        return
    total = ranks.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gather_experts(own: Tensor, placement: Placement, ranks: Ranks) -> Tensor:
    """The experts of all ranks in the order of their ids, (E, …), of each rank's own (slots, …)."""
    most = max(placement.slots_per_rank)
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: len(own)] = own
    gathered = ranks.all_gather(padded)  # (ranks, most, …)
    whole = own.new_empty(placement.n_experts, *own.shape[1:])
    for rank, experts in enumerate(placement.experts):
        whole[list(experts)] = gathered[rank, : len(experts)]
    return whole
