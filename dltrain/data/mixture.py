"""Several datasets in one order, in a fixed proportion: which of them each position of a lane belongs to.

    mixture = Mixture([order_a, order_b], weights=[3, 1])
    for part in mixture.segments(consumed, size, rank, num_ranks): part.source, part.segment

Lane by lane: of the first t items of a lane, source d has a number of items that differs from t times its share
by less than the number of sources. Lanes begin at different phases of the pattern, so that every batch has about
the same mix. Each source goes through its own epochs, every row once in each, for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dltrain.data.order import Order, Segment, lane_times

__all__ = ["Mixture", "Part"]


@dataclass(frozen=True, slots=True)
class Part:
    """A segment of one of the sources."""

    source: int
    segment: Segment


class Mixture:
    """The order of several datasets.

    Args:
        orders: one per source, all with the same number of lanes.
        weights: whole numbers; a source's share of the rows is its weight over their sum.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[int]) -> None:
        if len({order.num_lanes for order in orders}) != 1:
            raise ValueError("the orders of a mixture must have the same number of lanes")
        if len(orders) != len(weights) or min(weights) < 1:
            raise ValueError(f"{len(orders)} orders and the weights {list(weights)}: one weight >= 1 each")
        self.orders, self.weights = list(orders), list(weights)
        self.num_lanes = orders[0].num_lanes
        self._total = sum(weights)

    def counts(self, lane: int, time: int) -> list[int]:
        """Of the first `time` items of a lane, how many are of each source."""
        if len(self.orders) == 1:
            return [time]
        phase = lane * self._total // self.num_lanes
        return [b - a for a, b in zip(self._shares(phase), self._shares(phase + time), strict=True)]

    def _shares(self, items: int) -> list[int]:
        """Nested floors: each source takes its share of what those before it left, so they add up."""
        shares, weight = [], self._total
        for own in self.weights:
            shares.append(items * own // weight)
            items, weight = items - shares[-1], weight - own
        return shares

    def stretch(self, source: int) -> float:
        """Positions of the mixture for one of a source."""
        return self._total / self.weights[source]

    def segments(self, consumed: int, size: int, rank: int = 0, num_ranks: int = 1) -> list[Part]:
        """What `rank` takes of the global batch of positions [consumed, consumed + size), lane by lane."""
        parts = []
        for lane, start, stop in lane_times(self.num_lanes, consumed, size, rank, num_ranks):
            begins, ends = self.counts(lane, start), self.counts(lane, stop)
            for source, order in enumerate(self.orders):
                parts += [Part(source, s) for s in order.lane_segments(lane, begins[source], ends[source])]
        return parts
