"""The audit: what a run must have been trained on, compared with what its committed steps say they were.

lines = audit(mixture, consumed, trail.sums, trail.replaced)
for line in lines: print(line)        # epoch 3: 10,000/10,000 rows exactly once, 0 substituted

Each step reports two 128-bit sums of hashes of its rows' ids. Here the same sums are made from the order alone. A
row too many or too few shows in the count; another row in the place of one escapes with probability 2^-128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dltrain.data.identity import BatchSum, hash_ids
from dltrain.data.mixture import Mixture
from dltrain.data.order import Order

__all__ = ["Line", "audit", "epoch_sum", "expected_sums"]

# Ids hashed at once: what they take fits into a processor's cache.
_BLOCK = 1 << 15


@dataclass(frozen=True)
class Line:
    """One epoch of one source.

    Attributes:
        rows: trained; expected: that should have been; total: in the dataset.
        substituted: positions at which another row stood in.
    """

    source: int
    epoch: int
    rows: int
    expected: int
    total: int
    substituted: int
    same: bool
    name: str = ""

    @property
    def ok(self) -> bool:
        """Whether every row that should have been trained was, once."""
        return self.same and self.rows == self.expected

    def __str__(self) -> str:
        where = f"{self.name} epoch {self.epoch}" if self.name else f"epoch {self.epoch}"
        if self.rows != self.expected:
            word = "too many" if self.rows > self.expected else "missing"
            return f"{where}: {abs(self.rows - self.expected):,} of {self.expected:,} rows {word}"
        if not self.same:
            return f"{where}: {self.rows:,} rows as expected in number, but not the rows expected"
        how = "exactly once" if self.expected == self.total else "so far, each exactly once"
        return f"{where}: {self.rows:,}/{self.total:,} rows {how}, {self.substituted:,} substituted"


def audit(
    mixture: Mixture,
    consumed: int,
    found: Mapping[tuple[int, int], BatchSum],
    substituted: Mapping[tuple[int, int], int],
    names: tuple[str, ...] = ("",),
) -> list[Line]:
    """A line for each epoch of each source that was begun, or that rows were reported of."""
    lines = []
    expected = expected_sums(mixture, consumed)
    for where in sorted({*expected, *found}):
        source, epoch = where
        mine, theirs = found.get(where, BatchSum()), expected.get(where, BatchSum())
        total = mixture.orders[source].num_rows
        extra = substituted.get(where, 0)
        name = names[source] if len(names) > 1 else ""
        lines.append(Line(source, epoch, mine.count, theirs.count, total, extra, mine == theirs, name))
    return lines


def expected_sums(mixture: Mixture, consumed: int) -> dict[tuple[int, int], BatchSum]:
    """Of positions [0, consumed), by (source, epoch)."""
    num_lanes = mixture.num_lanes
    # Lane v has had the positions p < consumed with p mod V = v.
    times = [max(0, -((lane - consumed) // num_lanes)) for lane in range(num_lanes)]
    counts = [mixture.counts(lane, time) for lane, time in enumerate(times)]
    found: dict[tuple[int, int], BatchSum] = {}
    for source, order in enumerate(mixture.orders):
        reached = [count[source] for count in counts]
        for epoch, total in _order_sums(order, reached).items():
            found[source, epoch] = total
    return found


def _order_sums(order: Order, reached: list[int]) -> dict[int, BatchSum]:
    """Of a lane time reached in each lane, by epoch."""
    found: dict[int, BatchSum] = {}
    epoch = 0
    # Where an epoch is shorter than the lanes are many, one lane may be epochs ahead of another.
    while any(time > order.lane_begin(lane, epoch) for lane, time in enumerate(reached)):
        rows = [_rows_in(order, lane, epoch, time) for lane, time in enumerate(reached)]
        if sum(rows) == order.num_rows:
            found[epoch] = epoch_sum(order, epoch)
        elif any(rows):
            parts = (_lane_sum(order, epoch, lane, n) for lane, n in enumerate(rows) if n)
            found[epoch] = sum(parts, BatchSum())
        epoch += 1
    return found


def _rows_in(order: Order, lane: int, epoch: int, time: int) -> int:
    return min(max(0, time - order.lane_begin(lane, epoch)), order.lane_length(lane, epoch))


def epoch_sum(order: Order, epoch: int) -> BatchSum:
    """Of all rows, whatever their order."""
    return _range_sum(order.seed, epoch, 0, order.num_rows)


def _range_sum(seed: int, epoch: int, begin: int, end: int) -> BatchSum:
    blocks = (np.arange(at, min(at + _BLOCK, end), dtype=np.int64) for at in range(begin, end, _BLOCK))
    return sum((BatchSum.of(hash_ids(seed, epoch, ids)) for ids in blocks), BatchSum())


def _lane_sum(order: Order, epoch: int, lane: int, rows: int) -> BatchSum:
    """Of the first rows of a lane's epoch: whole windows need not be shuffled for it."""
    found = BatchSum()
    edges = order.lane(epoch, lane).window_rows
    for window in range(int(np.searchsorted(edges, rows, side="left"))):
        if edges[window + 1] <= rows:
            for span in order.window_spans(epoch, lane, window):
                first = int(order.starts[span.unit])
                found += _range_sum(order.seed, epoch, first + span.lo, first + span.hi)
        else:
            ids = order.window_ids(epoch, lane, window)[: rows - int(edges[window])]
            found += BatchSum.of(hash_ids(order.seed, epoch, ids))
    return found
