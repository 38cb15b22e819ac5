"""Operations with several implementations of one contract, chosen by name."""

from moe_lab.ops.grouped_mm import GROUPED_MM, choose_impl, grouped_mm
from moe_lab.ops.moe_mlp import MOE_MLP, moe_mlp

__all__ = ["GROUPED_MM", "MOE_MLP", "choose_impl", "grouped_mm", "moe_mlp"]
