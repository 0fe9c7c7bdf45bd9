"""The order of samples: which rows make up global batch t, and which of them belong to rank r.

    order = Order(unit_rows, num_lanes=8, window_units=4, seed=0)
    order.batch(consumed, size)                    # row ids of a global batch, in canonical order
    order.rank_batch(consumed, size, rank, num_ranks)

Everything here is integers in, integers out: no clock, no network, no state. A dataset of N rows in M
units (row groups) is read by V canonical *lanes*; global position p belongs to lane `p mod V`, and epoch e
is exactly the positions `[e*N, (e+1)*N)`. Nothing depends on the number of ranks, so the same global
batches come out for any of them, across any resume.

Why every row appears exactly once per epoch: position -> (lane, time) is a bijection; for a fixed epoch the
lane lengths partition N; a lane is a cut of the concatenation of all units in that epoch's order; and inside
each window of a lane the rows are permuted by a bijection.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "Dropped",
    "LaneLayout",
    "Order",
    "Segment",
    "Span",
    "choose_lanes",
    "hash_perm",
    "key",
    "lane_times",
    "mix64",
    "num_steps",
    "read_amplification",
]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
_MASK = (1 << 64) - 1
# The purpose of a derived key, so that no two uses of one seed collide.
_UNITS, _STAGGER, _WINDOW = 1, 2, 3
# Most that the lane layouts kept may hold, and what one weighs: its objects, and its arrays per span.
_LAYOUT_BYTES, _LAYOUT_OBJECTS, _LAYOUT_SPAN = 64 * 2**20, 700, 40


def mix64(x: U64) -> U64:
    """The splitmix64 finaliser, elementwise. Source: Steele, Lea, Flood, OOPSLA 2014."""
    z = np.asarray(x, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def _mix_int(x: int) -> int:
    """`mix64` of one Python integer, without numpy's per-call cost or its overflow warnings."""
    z = (x + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def key(*parts: int) -> int:
    """Folds integers into one 64-bit key; `key(a, b) != key(b, a)`."""
    folded = 0
    for part in parts:
        folded = _mix_int(folded ^ (part & _MASK))
    return folded


def hash_perm(n: int, k: int) -> I64:
    """A permutation of range(n), the same under every numpy version (its own Generator is not).

    Ties of the 64-bit hash are broken by the stable sort.
    """
    hashes = mix64(np.arange(n, dtype=np.uint64) ^ np.uint64(k))
    return np.argsort(hashes, kind="stable").astype(np.int64)


def choose_lanes(num_units: int, global_batch: int) -> tuple[int, int]:
    """The number of lanes V and the window length K (units) for a dataset and a batch.

    V is the largest divisor of the batch up to min(512, M/4), so that every batch takes the same number
    s = G/V of samples from each lane. K >= 4(s-1) holds the variance of batch means, even for data sorted
    by unit, within 1.25 of a full shuffle's; K <= M/V keeps the first batch quick.
    """
    limit = max(1, min(512, num_units // 4))
    lanes = max(d for d in range(1, min(limit, global_batch) + 1) if global_batch % d == 0)
    per_lane = max(1, num_units // lanes)
    return lanes, min(max(2, 4 * (global_batch // lanes - 1)), per_lane, 64)


def num_steps(
    num_rows: int, epochs: int, global_batch: int, consumed: int = 0, end: Literal["wrap", "drop"] = "wrap"
) -> int:
    """Optimizer steps left in a run that has consumed `consumed` samples.

    `wrap`: batches straddle epochs and the run's last one holds what is left. `drop`: that last short
    batch is left out.
    """
    left = max(0, epochs * num_rows - consumed)
    return left // global_batch if end == "drop" else -(-left // global_batch)


def read_amplification(num_units: int, num_lanes: int, num_ranks: int) -> float:
    """At most how often a unit is read per epoch, over all ranks, where V divides the global batch.

    Lanes cut up to V-1 units in two; the W slices of a batch cut the V lanes at W-1 places, of which
    gcd(V, W) - 1 fall between two lanes. 1 + (V-1)/M where W divides V, about W/V where W is more than V.
    """
    shared = num_lanes + num_ranks - math.gcd(num_lanes, num_ranks)
    return (1 + (num_lanes - 1) / num_units) * shared / num_lanes


class Dropped(NamedTuple):
    """Rows that a run with `end: drop` leaves out, in canonical order: epochs (count,), ids (count,)."""

    epochs: I64
    ids: I64

    @property
    def num_rows(self) -> int:
        """How many; a run shorter than a batch of many epochs may leave out the same row twice."""
        return len(self.ids)


class Span(NamedTuple):
    """Rows [lo, hi) of one unit."""

    unit: int
    lo: int
    hi: int


# A tuple, for a worker makes thousands of them a second.
class Segment(NamedTuple):
    """Items [lo, hi) of one window's shuffled rows: what a rank takes from it in one batch."""

    epoch: int
    lane: int
    window: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class LaneLayout:
    """One lane in one epoch: its spans of units, and the windows they form.

    spans[i] = (unit, lo, hi); window w holds spans [window_spans[w], window_spans[w+1]) and the lane's
    rows [window_rows[w], window_rows[w+1]).
    """

    # spans: (num_spans, 3)
    spans: I64
    # window_spans, window_rows: (num_windows + 1,)
    window_spans: I64
    window_rows: I64


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def lane_times(
    num_lanes: int, consumed: int, size: int, rank: int = 0, num_ranks: int = 1
) -> Iterator[tuple[int, int, int]]:
    """What `rank` takes of positions [consumed, consumed + size), a global batch: lane, lane times [start, stop)."""
    lo, hi = rank * size // num_ranks, (rank + 1) * size // num_ranks
    if lo >= hi:
        return
    if size % num_lanes == 0:
        yield from _even_lane_times(num_lanes, consumed, size // num_lanes, lo, hi)
        return
    lanes = np.arange(num_lanes, dtype=np.int64)
    # first, after: (V,), lane times that the batch covers
    first = np.maximum(-((lanes - consumed) // num_lanes), 0)
    after = np.maximum(-((lanes - consumed - size) // num_lanes), 0)
    items = np.concatenate([np.zeros(1, np.int64), np.cumsum(after - first)])
    begin = int(np.searchsorted(items, lo, side="right")) - 1
    for lane in range(begin, num_lanes):
        if items[lane] >= hi:
            break
        start = int(first[lane]) + max(0, lo - int(items[lane]))
        yield lane, start, int(first[lane]) + min(int(after[lane] - first[lane]), hi - int(items[lane]))


def _even_lane_times(num_lanes: int, consumed: int, per_lane: int, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
    """The same where the batch takes `per_lane` items from every lane: no need to count through the lanes."""
    for lane in range(lo // per_lane, -(-hi // per_lane)):
        first = max(0, -((lane - consumed) // num_lanes))
        yield lane, first + max(0, lo - lane * per_lane), first + min(per_lane, hi - lane * per_lane)


@dataclass(frozen=True)
class Order:
    """The order of one dataset.

    Args:
        unit_rows: rows in each unit (list or array), all > 0, in the plan's order; row ids count through them.
        num_lanes: V.
        window_units: K, spans shuffled together once a lane is under way.
        seed: of the shuffle.
    """

    unit_rows: Sequence[int] | I64
    num_lanes: int
    window_units: int
    seed: int = 0
    # starts: (M + 1,), row id of each unit's first row
    starts: I64 = field(init=False, repr=False, compare=False)
    # N
    num_rows: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = np.asarray(self.unit_rows, dtype=np.int64)
        if rows.size == 0 or rows.min() <= 0:
            raise ValueError("units must be non-empty: drop row groups without rows before making an Order")
        if self.num_lanes < 1 or self.window_units < 1:
            raise ValueError(f"num_lanes {self.num_lanes} and window_units {self.window_units} must be >= 1")
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)])
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "num_rows", int(starts[-1]))
        # Caches live on the instance, so that they die with it. A batch needs two epochs' at most.
        object.__setattr__(self, "_epoch", lru_cache(maxsize=2)(self._epoch_units))
        layout_bytes = _LAYOUT_OBJECTS + _LAYOUT_SPAN * (1 + rows.size // self.num_lanes)
        num_layouts = min(2 * self.num_lanes, max(2, _LAYOUT_BYTES // layout_bytes))
        object.__setattr__(self, "_lane", lru_cache(maxsize=num_layouts)(self._lane_layout))

    # ---- where a lane is ----

    def lane_begin(self, lane: int, epoch: int) -> int:
        """The lane time at which this lane enters `epoch`: its positions below epoch * N."""
        return max(0, _ceil_div(epoch * self.num_rows - lane, self.num_lanes))

    def lane_length(self, lane: int, epoch: int) -> int:
        """Rows of `epoch` that this lane reads: floor(N/V) or one more."""
        return self.lane_begin(lane, epoch + 1) - self.lane_begin(lane, epoch)

    def lane(self, epoch: int, lane: int) -> LaneLayout:
        """The spans and windows of a lane in an epoch (cached)."""
        layout: LaneLayout = self._lane(epoch, lane)  # type: ignore[attr-defined]
        return layout

    def _epoch_units(self, epoch: int) -> tuple[I64, I64, I64]:
        """This epoch's order of units, the rows before each of them, and the first row of each lane."""
        units = hash_perm(len(self.unit_rows), key(self.seed, _UNITS, epoch))
        rows = np.diff(self.starts)[units]
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)])
        lanes = np.arange(self.num_lanes, dtype=np.int64)
        # lengths: (V,), what lane_length says of each lane
        lengths = self._begins(lanes, epoch + 1) - self._begins(lanes, epoch)
        return units, ends, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    def _begins(self, lanes: I64, epoch: int) -> I64:
        """`lane_begin` of many lanes."""
        return np.asarray(np.maximum(0, -((lanes - epoch * self.num_rows) // self.num_lanes)), np.int64)

    def _lane_layout(self, epoch: int, lane: int) -> LaneLayout:
        units, ends, lane_starts = self._epoch(epoch)  # type: ignore[attr-defined]
        begin, end = int(lane_starts[lane]), int(lane_starts[lane + 1])
        if begin == end:
            empty = np.zeros(1, np.int64)
            return LaneLayout(np.zeros((0, 3), np.int64), empty, empty)
        first = int(np.searchsorted(ends, begin, side="right")) - 1
        last = int(np.searchsorted(ends, end, side="left"))
        lo = np.maximum(ends[first:last], begin) - ends[first:last]
        hi = np.minimum(ends[first + 1 : last + 1], end) - ends[first:last]
        spans = np.stack([units[first:last], lo, hi], axis=1)
        cuts = self._window_cuts(epoch, lane, len(spans))
        rows = np.concatenate([np.zeros(1, np.int64), np.cumsum(hi - lo)])
        return LaneLayout(spans, cuts, rows[cuts])

    def _window_cuts(self, epoch: int, lane: int, num_spans: int) -> I64:
        """Span index at which each window begins, and the end.

        A run begins with windows of 1, 2, 4, ... spans, so that its first batch does not wait for a full
        one; then one of random length, so that lanes refill at different times; then K spans each.
        """
        cuts, ramp = [0], 1
        while epoch == 0 and ramp < self.window_units and cuts[-1] + ramp < num_spans:
            cuts.append(cuts[-1] + ramp)
            ramp *= 2
        staggered = cuts[-1] + 1 + key(self.seed, _STAGGER, epoch, lane) % self.window_units
        full = np.arange(staggered, num_spans, self.window_units, dtype=np.int64)
        return np.concatenate([np.array(cuts, np.int64), full, np.array([num_spans], np.int64)])

    # ---- what a batch is ----

    def window_spans(self, epoch: int, lane: int, window: int) -> list[Span]:
        """The pieces of units that a window needs, in lane order."""
        layout = self.lane(epoch, lane)
        lo, hi = layout.window_spans[window : window + 2]
        return [Span(int(u), int(a), int(b)) for u, a, b in layout.spans[lo:hi]]

    def window_perm(self, epoch: int, lane: int, window: int) -> I64:
        """Shuffled item -> row of the window, the window's spans laid end to end."""
        layout = self.lane(epoch, lane)
        length = int(layout.window_rows[window + 1] - layout.window_rows[window])
        return hash_perm(length, key(self.seed, _WINDOW, epoch, lane, window))

    def window_ids(self, epoch: int, lane: int, window: int) -> I64:
        """Row ids of a window in shuffled order."""
        spans = self.window_spans(epoch, lane, window)
        rows = np.concatenate([np.arange(self.starts[s.unit] + s.lo, self.starts[s.unit] + s.hi) for s in spans])
        return rows[self.window_perm(epoch, lane, window)]

    def segments(self, consumed: int, size: int, rank: int = 0, num_ranks: int = 1) -> list[Segment]:
        """What `rank` takes of the global batch of positions [consumed, consumed + size).

        The canonical order of a batch is lane-major; rank r takes its items [r*G//W, (r+1)*G//W), so
        slices differ by at most one and joined over ranks give the batch for any number of ranks.
        """
        times = lane_times(self.num_lanes, consumed, size, rank, num_ranks)
        return [s for lane, start, stop in times for s in self.lane_segments(lane, start, stop)]

    def lane_segments(self, lane: int, start: int, stop: int) -> Iterator[Segment]:
        """Lane times [start, stop) of a lane, cut at epochs and windows."""
        while start < stop:
            epoch = (lane + start * self.num_lanes) // self.num_rows
            begin = self.lane_begin(lane, epoch)
            edges = self.lane(epoch, lane).window_rows
            # The method: the function of the same name costs as much again, on the path of every step.
            window = int(edges.searchsorted(start - begin, "right")) - 1
            offset, after = begin + edges.item(window), begin + edges.item(window + 1)
            end = min(stop, after)
            yield Segment(epoch, lane, window, start - offset, end - offset)
            start = end

    def rank_batch(self, consumed: int, size: int, rank: int, num_ranks: int) -> I64:
        """Row ids that `rank` trains on in this global batch, in canonical order."""
        parts = [
            self.window_ids(s.epoch, s.lane, s.window)[s.lo : s.hi]
            for s in self.segments(consumed, size, rank, num_ranks)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def batch(self, consumed: int, size: int) -> I64:
        """Row ids of a whole global batch, in canonical order."""
        return self.rank_batch(consumed, size, 0, 1)

    def dropped(self, epochs: int, global_batch: int, consumed: int = 0) -> Dropped:
        """What a run of `epochs` that has consumed `consumed` samples leaves out at its end with `end: drop`."""
        size = max(0, epochs * self.num_rows - consumed) % global_batch
        parts = self.segments(epochs * self.num_rows - size, size)
        none = [np.zeros(0, np.int64)]
        ids = [self.window_ids(s.epoch, s.lane, s.window)[s.lo : s.hi] for s in parts]
        of = [np.full(s.hi - s.lo, s.epoch, np.int64) for s in parts]
        return Dropped(np.concatenate(none + of), np.concatenate(none + ids))
