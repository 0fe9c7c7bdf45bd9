"""Windows of the sample order, loaded in the background and shuffled: what batches are cut from.

windows = Windows(order, reader, end, replace=True)
window = windows.get(epoch, lane, number).result()
gather(window.schema, [window.pick(range(lo, hi))]), window.ids[lo:hi]

A row that can't be read keeps its position: another row of the same window stands in its place, the same one
for any number of ranks, and `window.bad` says so.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dltrain.data.gather import Column, Pick, window_columns
from dltrain.data.identity import U64, hash_ids, running_sums
from dltrain.data.order import Order, Span, key, mix64
from dltrain.errors import DataChangedError, DataError

__all__ = ["Units", "Window", "Windows", "one_batch", "stand_ins"]

I64 = npt.NDArray[np.int64]
_THREADS = 4
# Where batches are waited for: windows decoded before they are needed, and bytes fetched, of the decoded rows.
_DECODED = 2
_FETCHED_BYTES = 128 * 1024 * 1024
# The purpose of a derived key; the others are in `order` and `identity`.
_STAND_IN = 11
HINT = "repair the data, or set data.bad_rows to train other rows in the place of up to so many"


class Units(Protocol):
    """Where units come from."""

    def start(self, unit: int, needed: float) -> None:
        """Begins to fetch a unit, without waiting; of several, what is needed at the lowest position first."""

    def forget(self, unit: int) -> None:
        """Takes one `start` back: the unit will not be read for it."""

    def read(self, unit: int) -> pa.Table:
        """The unit's rows, waited for."""


@dataclass(frozen=True)
class Window:
    """A window's items: its rows in shuffled order, with running sums of their hashes.

    Attributes:
        columns: their values; schema: of these; ids: (rows,); sums: (2, rows + 1).
        bad: item -> why another row stands in its place.
    """

    schema: pa.Schema
    columns: list[Column]
    ids: I64
    sums: U64
    bad: Mapping[int, str] = field(default_factory=dict)

    def pick(self, items: range) -> Pick:
        """Some of the items, for `gather`."""
        return self.columns, items


@dataclass(order=True)
class _Slot:
    """A window that is held, from when it is the next one of its lane.

    Attributes:
        taken: a batch has asked for it, or will not any more.
    """

    needed: float
    lane: int
    name: tuple[int, int]
    spans: list[Span] = field(compare=False)
    fetched: bool = field(default=False, compare=False)
    future: Future[Window] | None = field(default=None, compare=False)
    taken: bool = field(default=False, compare=False)


class Windows:
    """Loads windows in a pool; touching one makes the lane's next one known and forgets the ones before.

    What a batch waits for comes first. Next windows are fetched and decoded in the order they are needed. While
    batches are waited for it is a few, since the ones before them still hold the memory that they can have.

    Args:
        end: position of this order at which the run ends.
        stretch: positions of the run for one of this order, where it is one of several.
        replace: rows of units that can't be decoded are replaced; else they raise.
    """

    def __init__(self, order: Order, units: Units, end: float, replace: bool = False, stretch: float = 1.0) -> None:
        self._order, self._units, self._end = order, units, end
        self._replace, self._stretch = replace, stretch
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="dltrain-read")
        self._held: dict[int, dict[tuple[int, int], _Slot]] = {}
        self._current: dict[int, tuple[int, int]] = {}
        # Next windows: a heap of those not fetched yet, and the others.
        self._later: list[_Slot] = []
        self._early: list[_Slot] = []
        # Decoded; not known before a window is.
        self._row_bytes = 0.0

    def get(self, epoch: int, lane: int, window: int) -> Future[Window]:
        """The window, on its way."""
        held = self._held.setdefault(lane, {})
        if (epoch, window) != self._current.get(lane):
            self._current[lane] = (epoch, window)
            for old in [k for k in held if k < (epoch, window)]:
                self._forget(held.pop(old))
            following = self._next(epoch, lane, window)
            if following and following not in held:
                heapq.heappush(self._later, self._slot(following[0], lane, following[1]))
        slot = self._slot(epoch, lane, window)
        slot.taken = True
        return self._load_soon(slot)

    def begin(self, epoch: int, lane: int, window: int) -> None:
        """Starts loading what the first step needs."""
        self._load_soon(self._slot(epoch, lane, window))

    def advance(self, more: int = 0) -> None:
        """Starts loading next windows: a few, and every time `more`."""
        self._early = [slot for slot in self._early if not slot.taken]
        num_decoded = sum(slot.future is not None for slot in self._early)
        room = _FETCHED_BYTES - self._row_bytes * sum(_rows(slot) for slot in self._early)
        allowed = more
        while self._later and self._row_bytes and (room > 0 or allowed > 0):
            slot = heapq.heappop(self._later)
            if not slot.taken:
                self._fetch(slot)
                self._early.append(slot)
                room -= self._row_bytes * _rows(slot)
                allowed -= 1
        self._early.sort()
        for slot in self._early[: max(_DECODED, num_decoded + more)]:
            self._load_soon(slot)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _slot(self, epoch: int, lane: int, window: int) -> _Slot:
        held = self._held.setdefault(lane, {})
        if (epoch, window) not in held:
            spans = self._order.window_spans(epoch, lane, window)
            held[epoch, window] = _Slot(self._needed_at(epoch, lane, window), lane, (epoch, window), spans)
        return held[epoch, window]

    def _fetch(self, slot: _Slot) -> None:
        if not slot.fetched:
            slot.fetched = True
            for span in slot.spans:
                self._units.start(span.unit, slot.needed)

    def _load_soon(self, slot: _Slot) -> Future[Window]:
        if slot.future is None:
            self._fetch(slot)
            epoch, window = slot.name
            slot.future = self._pool.submit(self._load, epoch, slot.lane, window, slot.spans)
        return slot.future

    def _forget(self, slot: _Slot) -> None:
        # It may still lie in the heap; its rows need not.
        begun, slot.future = slot.future, None
        if slot.taken:
            return
        slot.taken = True
        if slot.fetched and (begun is None or begun.cancel()):
            for span in slot.spans:
                self._units.forget(span.unit)

    def _needed_at(self, epoch: int, lane: int, window: int) -> float:
        """The position of the window's first item: all lanes' windows in the order they are needed."""
        order = self._order
        time = order.lane_begin(lane, epoch) + int(order.lane(epoch, lane).window_rows[window])
        return (time * order.num_lanes + lane) * self._stretch

    def _next(self, epoch: int, lane: int, window: int) -> tuple[int, int] | None:
        order = self._order
        if window + 2 < len(order.lane(epoch, lane).window_spans):
            return epoch, window + 1
        following = epoch + 1
        begins = order.lane_begin(lane, following) * order.num_lanes + lane
        return (following, 0) if begins < self._end and order.lane_length(lane, following) else None

    # ---- one window ----

    def _load(self, epoch: int, lane: int, window: int, spans: Sequence[Span]) -> Window:
        perm, ids = self._order.window_perm(epoch, lane, window), self._order.window_ids(epoch, lane, window)
        tables, reasons = self._read(spans)
        bad: dict[int, str] = {}
        if reasons:
            tables, perm, bad = self._around(spans, tables, reasons, perm, ids)
        table = pa.concat_tables([t for t in tables if t is not None])
        self._row_bytes = table.nbytes / table.num_rows
        sums = running_sums(hash_ids(self._order.seed, epoch, ids))
        return Window(table.schema, window_columns(table, perm), ids, sums, bad)

    def _read(self, spans: Sequence[Span]) -> tuple[list[pa.Table | None], dict[int, str]]:
        """The spans' rows, None where they can't be decoded, and why not."""
        tables: list[pa.Table | None] = []
        reasons: dict[int, str] = {}
        for i, span in enumerate(spans):
            try:
                tables.append(self._units.read(span.unit).slice(span.lo, span.hi - span.lo))
            except DataChangedError:
                raise
            except DataError as error:
                if not self._replace:
                    raise DataError(f"{error}; {HINT}") from None
                tables.append(None)
                reasons[i] = str(error)
        return tables, reasons

    def _around(
        self, spans: Sequence[Span], tables: list[pa.Table | None], reasons: Mapping[int, str], perm: I64, ids: I64
    ) -> tuple[list[pa.Table | None], I64, dict[int, str]]:
        """Tables without the bad spans, where each item is found in them, and the items that got another row."""
        lengths = np.array([s.hi - s.lo for s in spans])
        span_of = np.repeat(np.arange(len(spans)), lengths)[perm]
        is_bad = np.isin(span_of, list(reasons))
        good = np.repeat([i not in reasons for i in range(len(spans))], lengths)
        if not good.any():
            other = self._other_unit(spans[0].unit, reasons)
            tables, num_good = [other], other.num_rows
        else:
            num_good = int(good.sum())
        # where: row of the whole window -> row of what is left of it
        where = np.cumsum(good) - 1
        found = np.where(is_bad, stand_ins(ids, num_good), where[perm])
        items = np.flatnonzero(is_bad)
        return tables, found, {int(i): reasons[int(span_of[i])] for i in items}

    def _other_unit(self, unit: int, reasons: Mapping[int, str]) -> pa.Table:
        """The next unit that can be read, for a window of which nothing can."""
        num_units = len(self._order.unit_rows)
        for step in range(1, num_units):
            try:
                return self._units.read((unit + step) % num_units)
            except DataError:
                continue
        raise DataError(next(iter(reasons.values())))


def _rows(slot: _Slot) -> int:
    return sum(span.hi - span.lo for span in slot.spans)


def stand_ins(ids: I64, num_rows: int, turn: int = 0) -> I64:
    """Which of `num_rows` rows stands in for each id; another `turn` gives another choice."""
    hashes = mix64(ids.astype(np.uint64) ^ np.uint64(key(_STAND_IN, turn)))
    return np.asarray(hashes % np.uint64(num_rows), np.int64)


def one_batch(table: pa.Table) -> pa.RecordBatch:
    """A table of at least one row as one batch."""
    return table.combine_chunks().to_batches()[0]
