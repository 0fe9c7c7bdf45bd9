"""Streams: the batches of one rank, in order, made in background threads.

    stream = TrainStream(order, reader.read, task.collate, position=0, end=N * epochs, global_batch=256,
                         rank=0, num_ranks=2, micro_batch=64)
    for step in stream: step.micros, step.sums, ...
    for chunk in eval_chunks(...): ...

The only state is the position: samples consumed by committed steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dltrain.data.batch import Batch, Keys
from dltrain.data.identity import U64, BatchSum, hash_ids, running_sums
from dltrain.data.order import Order, Segment
from dltrain.data.prefetch import Prefetcher

__all__ = ["EvalStream", "StepBatch", "TrainStream", "micro_batches"]

I64 = npt.NDArray[np.int64]
Collate = Callable[[pa.RecordBatch, Keys], Batch]
ReadUnit = Callable[[int], pa.Table]
_DEPTH = 3
_THREADS = 4


def micro_batches(size: int, num_ranks: int, micro_batch: int) -> int:
    """Micro-batches of a step of `size` rows: the same on every rank, enough for the largest slice."""
    largest_slice = -(-size // num_ranks)
    return max(1, -(-largest_slice // micro_batch))


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of one global batch.

    Attributes:
        position: samples consumed once this step is committed.
        size: rows of the global batch.
        micros: this rank's micro-batches; one that has no row of its own is a stand-in of count 0.
        epochs, ids: of this rank's rows, in canonical order; sums: of them, by epoch.
    """

    position: int
    size: int
    micros: list[Batch]
    epochs: I64
    ids: I64
    sums: Mapping[int, BatchSum]


@dataclass(frozen=True)
class _Window:
    """A window's rows in shuffled order, and running sums of their hashes: what a step needs is a slice.

    sums: (2, rows + 1).
    """

    rows: pa.RecordBatch
    ids: I64
    sums: U64


class _Windows:
    """Loads windows in a pool; touching one starts the lane's next one and forgets the ones before."""

    def __init__(self, order: Order, read_unit: ReadUnit, end: int) -> None:
        self._order, self._read_unit, self._end = order, read_unit, end
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="dltrain-read")
        self._held: dict[int, dict[tuple[int, int], Future[_Window]]] = {}
        self._current: dict[int, tuple[int, int]] = {}

    def get(self, epoch: int, lane: int, window: int) -> _Window:
        held = self._held.setdefault(lane, {})
        future = held.get((epoch, window))
        if future is not None and (epoch, window) == self._current.get(lane):
            return future.result()
        self._current[lane] = (epoch, window)
        for old in [k for k in held if k < (epoch, window)]:
            held.pop(old).cancel()
        future = self._start(held, epoch, lane, window)
        following = self._next(epoch, lane, window)
        if following:
            self._start(held, following[0], lane, following[1])
        return future.result()

    def begin(self, segments: Iterable[Segment]) -> None:
        """Starts loading what the first step needs."""
        for s in segments:
            self._start(self._held.setdefault(s.lane, {}), s.epoch, s.lane, s.window)

    def _start(
        self, held: dict[tuple[int, int], Future[_Window]], epoch: int, lane: int, window: int
    ) -> Future[_Window]:
        future = held.get((epoch, window))
        if future is None:
            future = held[epoch, window] = self._pool.submit(self._load, epoch, lane, window)
        return future

    def _next(self, epoch: int, lane: int, window: int) -> tuple[int, int] | None:
        order = self._order
        if window + 2 < len(order.lane(epoch, lane).window_spans):
            return epoch, window + 1
        following = epoch + 1
        begins = order.lane_begin(lane, following) * order.num_lanes + lane
        return (following, 0) if begins < self._end and order.lane_length(lane, following) else None

    def _load(self, epoch: int, lane: int, window: int) -> _Window:
        spans = self._order.window_spans(epoch, lane, window)
        tables = [self._read_unit(s.unit).slice(s.lo, s.hi - s.lo) for s in spans]
        perm, ids = self._order.window_perm(epoch, lane, window), self._order.window_ids(epoch, lane, window)
        rows = one_batch(pa.concat_tables(tables)).take(pa.array(perm))
        return _Window(rows, ids, running_sums(hash_ids(self._order.seed, epoch, ids)))

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class TrainStream:
    """The training batches of one rank from `position` to `end`, made when asked for unless `prefetch` was called.

    Args:
        position: samples consumed so far.
        end: position at which the run ends.
        micro_batch: most rows of one forward pass.
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
    ) -> None:
        self._order, self._collate = order, collate
        self._position, self._end, self._global_batch = position, end, global_batch
        self._rank, self._num_ranks, self._micro_batch = rank, num_ranks, micro_batch
        self._windows = _Windows(order, read_unit, end)
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
        self._windows.close()

    def _steps(self) -> Iterator[StepBatch]:
        for at in range(self._position, self._end, self._global_batch):
            yield self._step(at, min(self._global_batch, self._end - at))

    def _step(self, at: int, size: int) -> StepBatch:
        rows, epochs, ids, sums = self._rows(at, size, self._rank, self._num_ranks)
        num_micros = micro_batches(size, self._num_ranks, self._micro_batch)
        micros = []
        for i in range(num_micros):
            # Strided, so that every micro-batch has rows of many lanes.
            mine = slice(i, None, num_micros)
            micros.append(
                self._micro(rows, epochs[mine], ids[mine], mine) if i < len(ids) else self._stand_in(at, size)
            )
        return StepBatch(at + size, size, micros, epochs, ids, sums)

    def _micro(self, rows: pa.RecordBatch, epochs: I64, ids: I64, mine: slice) -> Batch:
        if mine.step > 1:
            rows = rows.take(pa.array(np.arange(rows.num_rows)[mine]))
        return self._collate(rows, Keys(self._order.seed, epochs, ids))

    def _stand_in(self, at: int, size: int) -> Batch:
        """The batch's first row, weighing nothing: a rank without a row still enters every collective."""
        rows, epochs, ids, _ = self._rows(at, size, 0, size)
        return Batch(0, **self._micro(rows, epochs, ids, slice(0, None, 1)).tensors)

    def _rows(
        self, at: int, size: int, rank: int, num_ranks: int
    ) -> tuple[pa.RecordBatch, I64, I64, dict[int, BatchSum]]:
        rows, epochs, ids = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        sums: dict[int, BatchSum] = {}
        for s in self._order.segments(at, size, rank, num_ranks):
            window = self._windows.get(s.epoch, s.lane, s.window)
            rows.append(window.rows.slice(s.lo, s.hi - s.lo))
            epochs.append(np.full(s.hi - s.lo, s.epoch, np.int64))
            ids.append(window.ids[s.lo : s.hi])
            sums[s.epoch] = sums.get(s.epoch, BatchSum()) + BatchSum.between(window.sums, s.lo, s.hi)
        return pa.concat_batches(rows) if rows else None, np.concatenate(epochs), np.concatenate(ids), sums


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


def one_batch(table: pa.Table) -> pa.RecordBatch:
    """A table of at least one row as one batch."""
    return table.combine_chunks().to_batches()[0]
