"""Floating-point operations of what runs within it: of matrix products, convolutions and attention.

with counting_flops() as counter: model(x)
counter.get_total_flops()
"""

from __future__ import annotations

from typing import Self

from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

__all__ = ["counting_flops"]


class _OneModule(ModuleTracker):
    """Does not look which module runs: torch's hooks for that break a loss that holds a gradient by the input."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def counting_flops() -> FlopCounterMode:
    """A counter of all together, not by module."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _OneModule()
    return counter
