"""Which samples a batch was made of, as a sum that ranks can add up: the 128-bit `batch_id`.

sum((sum_ids(seed, epochs, ids) for each rank), BatchSum()).batch_id
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dltrain.data.order import key, mix64

__all__ = ["U64", "BatchSum", "hash_ids", "plan_id", "running_sums", "sum_ids"]

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]
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

    def __sub__(self, other: BatchSum) -> BatchSum:
        first, second = (self.first - other.first) & _MASK, (self.second - other.second) & _MASK
        return BatchSum(self.count - other.count, first, second)

    @classmethod
    def of(cls, hashes: U64) -> BatchSum:
        """Of `hash_ids`, or of any columns of it."""
        first, second = (int(np.sum(row, dtype=np.uint64)) for row in hashes)
        return cls(hashes.shape[1], first, second)

    @classmethod
    def between(cls, pieces: Iterable[tuple[U64, int, int]]) -> BatchSum:
        """Of columns [lo, hi) of each (`running_sums` of a window, lo, hi)."""
        count = first = second = 0
        # On the path of every step, with a piece for each lane: plain numbers, taken one by one.
        for running, lo, hi in pieces:
            item, width = running.item, running.shape[1]
            count += hi - lo
            first += item(hi) - item(lo)
            second += item(width + hi) - item(width + lo)
        return cls(count, first & _MASK, second & _MASK)

    @property
    def batch_id(self) -> str:
        """128 bits as 32 hex digits."""
        return f"{self.first:016x}{self.second:016x}"


def plan_id(sources: Sequence[tuple[str, int, int]], num_lanes: int, seed: int) -> str:
    """Names an order of samples by all that it is made from.

    Args:
        sources: of each dataset its digest (hex), its weight, and its window in units.
    """
    parts = [number for digest, weight, window in sources for number in (int(digest, 16), weight, window)]
    return f"{key(2, len(sources), *parts, num_lanes, seed):016x}"


def hash_ids(seed: int, epoch: int, ids: I64) -> U64:
    """Two independent 64-bit hashes of each (epoch, id): (2, len(ids))."""
    wide = ids.astype(np.uint64)
    return np.stack([mix64(wide ^ np.uint64(key(seed, 9 + i, epoch))) for i in (0, 1)])


def running_sums(hashes: U64) -> U64:
    """Sums mod 2^64 of the first 0, 1, ... columns: (2, len + 1)."""
    start = np.zeros((2, 1), np.uint64)
    return np.concatenate([start, np.cumsum(hashes, axis=1, dtype=np.uint64)], axis=1)


def sum_ids(seed: int, epochs: I64, ids: I64) -> BatchSum:
    """The sum of rows of any epochs."""
    parts = (BatchSum.of(hash_ids(seed, epoch, ids[epochs == epoch])) for epoch in np.unique(epochs).tolist())
    return sum(parts, BatchSum())
