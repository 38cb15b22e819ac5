"""Weights of a layer of experts, from and to the tensors that Hugging Face's classes keep (transformers 5).

Every family's layout is a list of moves, each between some of our tensors and some of theirs. A move is linear and
knows both directions, so that gradients are carried over like weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

FAMILIES = (  # as the folders of transformers/models are called
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "deepseek_v2",
    "deepseek_v3",
    "switch",
    "gpt_oss",
    "llama4",
)


def from_hugging_face(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of an `MoE`, from the state of the family's block in transformers.

    Raises:
        ValueError: an unknown family, or tensors that are not exactly those of its block; the message names them.
    """
    n_experts = sum(name.endswith("wi.weight") for name in tensors) if family == "switch" else 0
    moves = _moves(family, n_experts)
    _require_names(family, set(tensors), {name for move in moves for name in move.theirs})
    return {
        name: tensor.contiguous()
        for move in moves
        for name, tensor in zip(move.ours, move.to_ours(*(tensors[t] for t in move.theirs)), strict=True)
    }


def to_hugging_face(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the family's block in transformers, from the state (or the gradients) of an `MoE`.

    What is not there is left out together with its counterpart: gradients have no selection bias.

    Raises:
        ValueError: an unknown family, or tensors that the family's layer does not have; the message names them.
    """
    moves = _moves(family, len(tensors["experts.w_in"]) if "experts.w_in" in tensors else 0)
    moves = [move for move in moves if any(name in tensors for name in move.ours)]
    _require_names(family, set(tensors), {name for move in moves for name in move.ours})
    return {
        name: tensor.contiguous()
        for move in moves
        for name, tensor in zip(move.theirs, move.to_theirs(*(tensors[o] for o in move.ours)), strict=True)
    }


def _require_names(family: str, came: set[str], expected: set[str]) -> None:
    if came != expected:
        missing, foreign = (", ".join(sorted(names)) or "none" for names in (expected - came, came - expected))
        raise ValueError(f"These are not the tensors of one {family} layer: missing {missing}; not expected {foreign}.")


@dataclass(frozen=True)
class _Move:
    """Some of our tensors against some of theirs."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Callable[..., tuple[Tensor, ...]] = lambda *w: w
    to_ours: Callable[..., tuple[Tensor, ...]] = lambda *w: w

    def transposed(self) -> Self:
        """The same, where they keep matrices as (in, out)."""
        return _Move(
            self.ours,
            self.theirs,
            lambda *w: tuple(t.mT for t in self.to_theirs(*w)),
            lambda *w: self.to_ours(*(t.mT for t in w)),
        )


def _same(ours: str, theirs: str) -> _Move:
    return _Move((ours,), (theirs,))


def _turns(ours: str, theirs: str) -> _Move:
    """(E, 2F, D) or (E, 2F): ours holds all gates, then all ups; theirs gate and up by turns."""
    return _Move(
        (ours,),
        (theirs,),
        lambda w: (torch.stack(w.chunk(2, 1), 2).flatten(1, 2),),
        lambda w: (torch.cat([w[:, ::2], w[:, 1::2]], 1),),
    )


def _one_by_one(ours: str, theirs: str, n_experts: int) -> _Move:
    """A tensor for every expert, its number in the name."""
    names = tuple(theirs.format(expert) for expert in range(n_experts))
    return _Move((ours,), names, lambda w: w.unbind(), lambda *w: (torch.stack(w),))


def _shared(theirs: str) -> list[_Move]:
    return [_same(f"shared.ffn.w_{name}.weight", f"{theirs}.{name}_proj.weight") for name in ("gate", "up", "down")]


def _moves(family: str, n_experts: int) -> list[_Move]:
    match family:
        case "mixtral" | "qwen2_moe" | "qwen3_moe" | "olmoe" | "deepseek_v2" | "deepseek_v3":
            moves = [
                _same("router.weight", "gate.weight"),
                _same("experts.w_in", "experts.gate_up_proj"),
                _same("experts.w_down", "experts.down_proj"),
            ]
            if family == "qwen2_moe":
                moves += [*_shared("shared_expert"), _same("shared.gate.weight", "shared_expert_gate.weight")]
            if family.startswith("deepseek"):
                moves += _shared("shared_experts")
            if family == "deepseek_v3":
                moves.append(_same("router.selection_bias", "gate.e_score_correction_bias"))
            return moves
        case "switch":
            return [
                _same("router.weight", "router.classifier.weight"),
                _one_by_one("experts.w_in", "experts.expert_{}.wi.weight", n_experts),
                _one_by_one("experts.w_down", "experts.expert_{}.wo.weight", n_experts),
            ]
        case "gpt_oss":
            return [
                _same("router.weight", "router.weight"),
                _same("router.bias", "router.bias"),
                _turns("experts.w_in", "experts.gate_up_proj").transposed(),
                _turns("experts.b_in", "experts.gate_up_proj_bias"),
                _same("experts.w_down", "experts.down_proj").transposed(),
                _same("experts.b_down", "experts.down_proj_bias"),
            ]
        case "llama4":
            return [
                _same("router.weight", "router.weight"),
                _same("experts.w_in", "experts.gate_up_proj").transposed(),
                _same("experts.w_down", "experts.down_proj").transposed(),
                *_shared("shared_expert"),
            ]
    raise ValueError(f"family={family!r}: expected one of {', '.join(FAMILIES)}.")
