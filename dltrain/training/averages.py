"""An exponential moving average of a network's weights, kept in the same pieces as the optimizer's masters.

average = WeightAverage(engine, decay=0.999)
average.update(num_updates)                 # after a step that changed the weights
with average.in_place():                    # evaluation sees the average
    ...

Each rank averages the pieces that it steps, so that it costs no collective, and a checkpoint holds it free of any
world size, as the moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dltrain.checkpoint import fragments

__all__ = ["WeightAverage"]


class WeightAverage:
    """Of one network under DeepSpeed; begins as the weights are.

    Attributes:
        tensors: id of the tensor that the optimizer steps -> its average.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._masters = fragments.masters(engine)
        self._averages = [master.detach().clone() for master in self._masters]
        self.tensors = {id(m): average for m, average in zip(self._masters, self._averages, strict=True)}

    def update(self, num_updates: int) -> None:
        """Moves the average towards the weights; at first faster, so that it is not of the random beginning.

        Args:
            num_updates: made so far, this one included.
        """
        decay = min(self._decay, (1 + num_updates) / (10 + num_updates))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._masters, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network has the average as its weights; all ranks go in and out together.

        After an error it keeps it: the exchange back is a collective, to which the other ranks do not come.
        """
        self._exchange()
        yield
        self._exchange()

    def _exchange(self) -> None:
        # Tensor by tensor, so that only one more of them is in memory.
        with torch.no_grad():
            for master, average in zip(self._masters, self._averages, strict=True):
                kept = master.detach().clone()
                master.copy_(average)
                average.copy_(kept)
            fragments.refresh(self._engine)
