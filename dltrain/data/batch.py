"""What a task's `collate` gets and gives: `Keys` in, `Batch` out.

def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
    return Batch(count=rows.num_rows, image=..., label=...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dltrain.data.order import key

__all__ = ["Batch", "Keys", "Sum"]


@dataclass(frozen=True)
class Keys:
    """Who the rows of a batch are, for everything random about them.

    Attributes:
        seed: of the run's sample order.
        epochs, ids: (rows,), the epoch and the row id of each row.
    """

    seed: int
    epochs: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]

    def rng(self, row: int) -> np.random.Generator:
        """A generator for one row: the same for the same seed, epoch and row on any rank, at any world size."""
        pair = (key(self.seed, 4, int(self.epochs[row])), int(self.ids[row]))
        return np.random.Generator(np.random.Philox(key=np.array(pair, np.uint64)))


class Batch:
    """Tensors by name, and how many units (rows, or tokens) their mean loss is a mean over.

    Args:
        count: of units; the gradient weighs a micro-batch by it.
        tensors: anything; tensors are moved to the worker's device, the rest is left alone.
    """

    def __init__(self, count: float, **tensors: Any) -> None:
        self.count = count
        self.tensors = tensors

    def __getattr__(self, name: str) -> Any:
        tensors = self.__dict__.get("tensors", {})
        if name in tensors:
            return tensors[name]
        raise AttributeError(f"this batch has no {name!r}; it has {', '.join(tensors) or 'nothing'}")

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`; pinned ones are copied without blocking."""
        moved = {
            k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in self.tensors.items()
        }
        return Batch(self.count, **moved)


@dataclass(frozen=True, slots=True)
class Sum:
    """A metric's share from one batch: a total over `count` units; the metric is the quotient over all ranks.

    The total may be a numpy array, such as a histogram, of one shape in all batches; see `Task.metrics`.
    """

    total: Any
    count: float
