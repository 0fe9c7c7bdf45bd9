"""Which samples a batch was made of, as a sum that ranks can add up: the 128-bit `batch_id`.

sum((sum_ids(seed, epochs, ids) for each rank), BatchSum()).batch_id
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dltrain.data.order import key, mix64

__all__ = ["BatchSum", "sum_ids"]

I64 = npt.NDArray[np.int64]
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class BatchSum:
    """The set of (epoch, row id) in a batch as two independent sums of 64-bit hashes; sums of ranks add up."""

    count: int = 0
    first: int = 0
    second: int = 0

    def __add__(self, other: BatchSum) -> BatchSum:
        first, second = (self.first + other.first) & _MASK, (self.second + other.second) & _MASK
        return BatchSum(self.count + other.count, first, second)

    @property
    def batch_id(self) -> str:
        """128 bits as 32 hex digits."""
        return f"{self.first:016x}{self.second:016x}"


def sum_ids(seed: int, epochs: I64, ids: I64) -> BatchSum:
    """Hashes every (epoch, id) twice, under keys of their own, and sums mod 2^64."""
    total = BatchSum()
    for epoch in np.unique(epochs).tolist():
        chosen = ids[epochs == epoch].astype(np.uint64)
        sums = [int(np.sum(mix64(chosen ^ np.uint64(key(seed, 9 + i, epoch))), dtype=np.uint64)) for i in (0, 1)]
        total += BatchSum(len(chosen), *sums)
    return total
