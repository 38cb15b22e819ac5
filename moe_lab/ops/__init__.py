"""Operations with several implementations of one contract, chosen by name."""

from moe_lab.ops.grouped_mm import GROUPED_MM, choose_impl, grouped_mm

__all__ = ["GROUPED_MM", "choose_impl", "grouped_mm"]
