"""Streams: the batches of one rank, in order, made in background threads.

    stream = TrainStream(order, reader.read, task.collate, position=0, end=N * epochs, global_batch=256,
                         rank=0, num_ranks=2, micro_batch=64)
    for step in stream: step.micros, step.sums, ...
    for chunk in eval_chunks(...): ...

The only state is the position: samples consumed by committed steps.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dltrain.data.batch import Batch, Keys
from dltrain.data.identity import BatchSum
from dltrain.data.order import Order
from dltrain.data.prefetch import Prefetcher
from dltrain.data.windows import HINT, ReadUnit, StartUnit, Window, Windows, one_batch, stand_ins
from dltrain.errors import BadRowsError, DataError, DltrainError

__all__ = ["EvalStream", "Replaced", "StepBatch", "TrainStream", "micro_batches"]

I64 = npt.NDArray[np.int64]
Collate = Callable[[pa.RecordBatch, Keys], Batch]
_DEPTH = 3
_TURNS = 16


def micro_batches(size: int, num_ranks: int, micro_batch: int) -> int:
    """Micro-batches of a step of `size` rows: the same on every rank, enough for the largest slice."""
    largest_slice = -(-size // num_ranks)
    return max(1, -(-largest_slice // micro_batch))


@dataclass(frozen=True)
class Replaced:
    """A row that could not be used: another one of its window was trained in its place."""

    epoch: int
    id: int
    reason: str


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of one global batch.

    Attributes:
        position: samples consumed once this step is committed.
        size: rows of the global batch.
        micros: this rank's micro-batches; one that has no row of its own is a stand-in of count 0.
        epochs, ids: of this rank's rows, in canonical order; sums: of them, by epoch.
        replaced: those of them that another row stands in for.
    """

    position: int
    size: int
    micros: list[Batch]
    epochs: I64
    ids: I64
    sums: Mapping[int, BatchSum]
    replaced: tuple[Replaced, ...] = ()


@dataclass(frozen=True)
class _Rows:
    """A rank's rows of a batch, and where they came from: (rows,) window and item of each."""

    rows: Any
    epochs: I64
    ids: I64
    windows: list[tuple[Window, int, int]]

    def origin(self, row: int) -> tuple[Window, int]:
        """The window of a row, and its item there."""
        for window, lo, hi in self.windows:
            if row < hi - lo:
                return window, lo + row
            row -= hi - lo
        raise IndexError(row)

    def replaced(self) -> Iterator[Replaced]:
        """Those that are not the row they should be."""
        at = 0
        for window, lo, hi in self.windows:
            for item in range(lo, hi) if window.bad else ():
                if item in window.bad:
                    row = at + item - lo
                    yield Replaced(int(self.epochs[row]), int(self.ids[row]), window.bad[item])
            at += hi - lo


class TrainStream:
    """The training batches of one rank from `position` to `end`, made when asked for unless `prefetch` was called.

    Args:
        position: samples consumed so far.
        end: position at which the run ends.
        micro_batch: most rows of one forward pass.
        start_unit: begins to fetch a unit.
        replace: rows that can't be used are replaced and listed; else they raise.
        parallel: threads that call `collate`, for one that hands the work on to other processes.
    """

    def __init__(
        self,
        order: Order,
        read_unit: ReadUnit,
        collate: Collate,
        *,
        position: int,
        end: int,
        global_batch: int,
        rank: int,
        num_ranks: int,
        micro_batch: int,
        start_unit: StartUnit | None = None,
        replace: bool = False,
        parallel: int = 0,
    ) -> None:
        self._order, self._collate = order, collate
        self._position, self._end, self._global_batch = position, end, global_batch
        self._rank, self._num_ranks, self._micro_batch = rank, num_ranks, micro_batch
        self._replace, self._parallel = replace, parallel
        self._windows = Windows(order, read_unit, end, start_unit, replace)
        self._windows.begin(order.segments(position, min(global_batch, end - position), rank, num_ranks))
        self._made = self._steps()
        self._failure: BaseException | None = None
        self._prefetcher: Prefetcher[StepBatch] | None = None

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        if self._prefetcher:
            return next(self._prefetcher)
        if self._failure:
            raise self._failure
        try:
            return next(self._made)
        except Exception as error:
            self._failure = error
            raise

    def prefetch(self) -> None:
        """From now on batches are made in a thread, a few ahead."""
        if self._prefetcher is None and not self._failure:
            self._prefetcher = Prefetcher(lambda: self._made, _DEPTH)

    @property
    def ready(self) -> int:
        """Steps prepared and waiting."""
        return self._prefetcher.ready if self._prefetcher else 0

    def close(self) -> None:
        """Stops the threads."""
        if self._prefetcher:
            self._prefetcher.close()
        # Still at work where a read hangs; its thread is a daemon.
        with contextlib.suppress(ValueError):
            self._made.close()
        self._windows.close()

    def _steps(self) -> Generator[StepBatch, None, None]:
        positions = iter(range(self._position, self._end, self._global_batch))
        if not self._parallel:
            yield from (self._step(*self._take(at)) for at in positions)
            return
        with ThreadPoolExecutor(self._parallel, thread_name_prefix="dltrain-collate") as pool:
            ahead = deque(self._submit(pool, at) for at in islice(positions, self._parallel + 1))
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(self._submit(pool, at) for at in islice(positions, 1))

    def _submit(self, pool: ThreadPoolExecutor, at: int) -> Future[StepBatch]:
        try:
            # Windows are walked through in order, by one thread.
            return pool.submit(self._step, *self._take(at))
        except DltrainError as error:
            # It comes out in its turn.
            failed: Future[StepBatch] = Future()
            failed.set_exception(error)
            return failed

    def _take(self, at: int) -> tuple[int, int, _Rows, _Rows | None]:
        """A step's rows, and where the rank has fewer rows than micro-batches the step's first row."""
        size = min(self._global_batch, self._end - at)
        mine = self._rows(at, size, self._rank, self._num_ranks)
        short = len(mine.ids) < micro_batches(size, self._num_ranks, self._micro_batch)
        return at, size, mine, self._rows(at, size, 0, size) if short else None

    def _step(self, at: int, size: int, mine: _Rows, first: _Rows | None) -> StepBatch:
        num_micros = micro_batches(size, self._num_ranks, self._micro_batch)
        replaced = list(mine.replaced())
        micros = []
        for i in range(num_micros):
            # Strided, so that every micro-batch has rows of many lanes.
            some = range(i, len(mine.ids), num_micros)
            micros.append(self._micro(mine, some, replaced) if some else self._stand_in(first))
        return StepBatch(at + size, size, micros, mine.epochs, mine.ids, self._sums(mine), tuple(replaced))

    def _micro(self, mine: _Rows, some: range, replaced: list[Replaced]) -> Batch:
        rows = mine.rows
        if some.step > 1:
            rows = rows.take(pa.array(np.arange(some.start, some.stop, some.step)))
        keys = Keys(self._order.seed, mine.epochs[some.start :: some.step], mine.ids[some.start :: some.step])
        # Counted by row: which others are bad must not change what stands in for this one.
        turns: Counter[int] = Counter()
        while True:
            try:
                return self._collate(rows, keys)
            except BadRowsError as error:
                turns.update(error.rows)
                if not self._replace or max(turns.values()) > _TURNS:
                    which = ", ".join(str(int(keys.ids[r])) for r in error.rows)
                    raise DataError(f"row {which} can't be used: {error.reason}; {HINT}") from None
                rows = self._without(rows, mine, some, error.rows, turns)
                new = [r for r in error.rows if turns[r] == 1]
                replaced.extend(Replaced(int(keys.epochs[r]), int(keys.ids[r]), error.reason) for r in new)

    def _without(
        self, rows: pa.RecordBatch, mine: _Rows, some: range, bad: Sequence[int], turns: Mapping[int, int]
    ) -> pa.RecordBatch:
        """The rows, with another of the same window in the place of each bad one."""
        parts, at = [], 0
        for row in sorted(set(bad)):
            window, _ = mine.origin(some[row])
            other = int(stand_ins(mine.ids[some[row] : some[row] + 1], window.rows.num_rows, turns[row])[0])
            parts += [rows.slice(at, row - at), window.rows.slice(other, 1)]
            at = row + 1
        return pa.concat_batches([*parts, rows.slice(at)])

    def _stand_in(self, first: _Rows | None) -> Batch:
        """The batch's first row, weighing nothing: a rank without a row still enters every collective."""
        assert first is not None
        return Batch(0, **self._micro(first, range(1), []).tensors)

    def _rows(self, at: int, size: int, rank: int, num_ranks: int) -> _Rows:
        rows, epochs, ids, windows = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
        for s in self._order.segments(at, size, rank, num_ranks):
            window = self._windows.get(s.epoch, s.lane, s.window)
            rows.append(window.rows.slice(s.lo, s.hi - s.lo))
            epochs.append(np.full(s.hi - s.lo, s.epoch, np.int64))
            ids.append(window.ids[s.lo : s.hi])
            windows.append((window, s.lo, s.hi))
        joined = pa.concat_batches(rows) if rows else None
        return _Rows(joined, np.concatenate(epochs), np.concatenate(ids), windows)

    def _sums(self, mine: _Rows) -> dict[int, BatchSum]:
        sums: dict[int, BatchSum] = {}
        at = 0
        for window, lo, hi in mine.windows:
            epoch = int(mine.epochs[at])
            sums[epoch] = sums.get(epoch, BatchSum()) + BatchSum.between(window.sums, lo, hi)
            at += hi - lo
        return sums


class EvalStream:
    """The evaluation rows in file order, cut into chunks that don't depend on the number of ranks.

    Chunk c belongs to rank c mod W. Yields (chunk, batch); every rank yields the same number of items, a
    rank that has no chunk left a stand-in with chunk -1.
    """

    def __init__(
        self, unit_rows: I64, read_unit: ReadUnit, collate: Collate, *, chunk_rows: int, rank: int, num_ranks: int
    ) -> None:
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(unit_rows)])
        self._read_unit, self._collate, self._chunk_rows = read_unit, collate, chunk_rows
        self._rank, self._num_ranks = rank, num_ranks
        self._prefetcher = Prefetcher(self._chunks, _DEPTH)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        return next(self._prefetcher)

    def close(self) -> None:
        """Stops the thread."""
        self._prefetcher.close()

    def _chunks(self) -> Iterator[tuple[int, Batch]]:
        num_chunks = -(-int(self._starts[-1]) // self._chunk_rows)
        for first in range(0, num_chunks, self._num_ranks):
            chunk = first + self._rank
            yield (chunk, self._chunk(chunk)) if chunk < num_chunks else (-1, self._chunk(0))

    def _chunk(self, chunk: int) -> Batch:
        lo = chunk * self._chunk_rows
        hi = min(lo + self._chunk_rows, int(self._starts[-1]))
        first = int(np.searchsorted(self._starts, lo, side="right")) - 1
        last = int(np.searchsorted(self._starts, hi, side="left"))
        tables = []
        for unit in range(first, last):
            begin = int(self._starts[unit])
            start = max(lo - begin, 0)
            tables.append(self._read_unit(unit).slice(start, hi - begin - start))
        ids = np.arange(lo, hi)
        return self._collate(one_batch(pa.concat_tables(tables)), Keys(0, np.zeros_like(ids), ids))
