"""Streams: the batches of one rank, in order, made in background threads.

    stream = TrainStream(Mixture([order], [1]), [reader], task.collate, position=0, end=N * epochs, global_batch=256,
                         rank=0, num_ranks=2, micro_batch=64)
    for step in stream: step.micros, step.sums, ...
    for chunk in eval_chunks(...): ...

The only state is the position: samples consumed by committed steps.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dltrain.data.batch import Batch, Keys
from dltrain.data.gather import Pick, gather
from dltrain.data.identity import U64, BatchSum
from dltrain.data.mixture import Mixture
from dltrain.data.prefetch import Prefetcher
from dltrain.data.windows import HINT, Units, Window, Windows, one_batch, stand_ins
from dltrain.errors import BadRowsError, DataError, DltrainError

__all__ = ["EvalStream", "Replaced", "StepBatch", "TrainStream", "micro_batches"]

I64 = npt.NDArray[np.int64]
Collate = Callable[[pa.RecordBatch, Keys], Batch]
Sums = Mapping[tuple[int, int], BatchSum]
_DEPTH = 3
_TURNS = 16
# How much the last step weighs in what steps take lately.
_RECENT = 0.2


def micro_batches(size: int, num_ranks: int, micro_batch: int) -> int:
    """Micro-batches of a step of `size` rows: the same on every rank, enough for the largest slice."""
    largest_slice = -(-size // num_ranks)
    return max(1, -(-largest_slice // micro_batch))


@dataclass(frozen=True)
class Replaced:
    """A row that could not be used: another one of its window was trained in its place."""

    source: int
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
        epochs, ids: of this rank's rows, in canonical order; sums: of them, by source and epoch.
        replaced: those of them that another row stands in for.
    """

    position: int
    size: int
    micros: list[Batch]
    epochs: I64
    ids: I64
    sums: Sums
    replaced: tuple[Replaced, ...] = ()


class _Piece(NamedTuple):
    """Items [lo, hi) of a window."""

    window: Window
    lo: int
    hi: int
    source: int
    epoch: int


@dataclass(frozen=True)
class _Rows:
    """A rank's rows of a batch, and where they are."""

    epochs: I64
    ids: I64
    pieces: list[_Piece]

    def origin(self, row: int) -> _Piece:
        """Where a row came from."""
        for piece in self.pieces:
            if row < piece.hi - piece.lo:
                return piece
            row -= piece.hi - piece.lo
        raise IndexError(row)

    def picks(self, some: range) -> Iterator[Pick]:
        """Every some.step-th row from some.start on."""
        at, step = some.start, some.step
        for p in self.pieces:
            if at < p.hi - p.lo:
                yield p.window.pick(range(p.lo + at, p.hi, step))
                at += -(-(p.hi - p.lo - at) // step) * step
            at -= p.hi - p.lo

    def replaced(self) -> Iterator[Replaced]:
        """Those that are not the row they should be."""
        at = 0
        for p in self.pieces:
            for item in range(p.lo, p.hi) if p.window.bad else ():
                if item in p.window.bad:
                    yield Replaced(p.source, p.epoch, int(self.ids[at + item - p.lo]), p.window.bad[item])
            at += p.hi - p.lo


class TrainStream:
    """The training batches of one rank from `position` to `end`, made when asked for unless `prefetch` was called.

    Args:
        position: samples consumed so far.
        end: position at which the run ends.
        micro_batch: most rows of one forward pass.
        replace: rows that can't be used are replaced and listed; else they raise.
        parallel: threads that call `collate`, for one that hands the work on to other processes.
        clock: for tests.
    """

    def __init__(
        self,
        mixture: Mixture,
        sources: Sequence[Units],
        collate: Collate,
        *,
        position: int,
        end: int,
        global_batch: int,
        rank: int,
        num_ranks: int,
        micro_batch: int,
        replace: bool = False,
        parallel: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mixture, self._collate = mixture, collate
        self._seed = mixture.orders[0].seed
        # Row ids of one source follow those of the one before.
        sizes = [order.num_rows for order in mixture.orders]
        self._first_ids = [sum(sizes[:source]) for source in range(len(sizes))]
        self._position, self._end, self._global_batch = position, end, global_batch
        self._rank, self._num_ranks, self._micro_batch = rank, num_ranks, micro_batch
        self._replace, self._parallel, self._clock = replace, parallel, clock
        self._windows = [
            Windows(order, units, end if len(sources) == 1 else math.inf, replace, mixture.stretch(source))
            for source, (order, units) in enumerate(zip(mixture.orders, sources, strict=True))
        ]
        for part in mixture.segments(position, min(global_batch, end - position), rank, num_ranks):
            s = part.segment
            self._windows[part.source].begin(s.epoch, s.lane, s.window)
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
        for windows in self._windows:
            windows.close()

    def _steps(self) -> Generator[StepBatch, None, None]:
        """The steps. While they wait longer than it takes to make them, there is time to decode more ahead."""
        making = waiting = 0.0
        begin = self._clock()
        for step in self._made_steps():
            made = self._clock()
            yield step
            taken = self._clock()
            making += _RECENT * (made - begin - making)
            waiting += _RECENT * (taken - made - waiting)
            if waiting > making:
                for windows in self._windows:
                    windows.advance(more=1)
            begin = taken

    def _made_steps(self) -> Iterator[StepBatch]:
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
        return StepBatch(at + size, size, micros, mine.epochs, mine.ids, _sums(mine), tuple(replaced))

    def _micro(self, mine: _Rows, some: range, replaced: list[Replaced]) -> Batch:
        keys = Keys(self._seed, mine.epochs[some.start :: some.step], mine.ids[some.start :: some.step])
        schema, picks = mine.pieces[0].window.schema, list(mine.picks(some))
        # Counted by row: which others are bad must not change what stands in for this one.
        turns: Counter[int] = Counter()
        while True:
            try:
                # Gathered afresh each time: `collate` may have changed what it was given.
                return self._collate(gather(schema, picks), keys)
            except BadRowsError as error:
                turns.update(error.rows)
                if not self._replace or max(turns.values()) > _TURNS:
                    told = error.told([int(keys.ids[r]) for r in error.rows])
                    raise DataError(f"{len(error.rows)} row(s) can't be used: {told}; {HINT}") from None
                picks = self._without(picks, mine, some, error.rows, turns)
                listed = zip(error.rows, error.reasons, strict=True)
                replaced.extend(self._listed(mine, some[r], reason) for r, reason in listed if turns[r] == 1)

    def _without(
        self, picks: list[Pick], mine: _Rows, some: range, bad: Sequence[int], turns: Mapping[int, int]
    ) -> list[Pick]:
        """The rows, with another of the same window in the place of each bad one."""
        each = [(columns, items[i : i + 1]) for columns, items in picks for i in range(len(items))]
        for row in set(bad):
            window = mine.origin(some[row]).window
            other = int(stand_ins(mine.ids[some[row] : some[row] + 1], len(window.ids), turns[row])[0])
            each[row] = window.pick(range(other, other + 1))
        return each

    def _stand_in(self, first: _Rows | None) -> Batch:
        """The batch's first row, weighing nothing: a rank without a row still enters every collective."""
        assert first is not None
        return Batch(0, **self._micro(first, range(1), []).tensors)

    def _rows(self, at: int, size: int, rank: int, num_ranks: int) -> _Rows:
        epochs, ids, pieces = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], []
        parts = self._mixture.segments(at, size, rank, num_ranks)
        # All are on their way before the first is waited for.
        futures = [self._windows[p.source].get(p.segment.epoch, p.segment.lane, p.segment.window) for p in parts]
        for windows in self._windows:
            windows.advance()
        for part, future in zip(parts, futures, strict=True):
            s, window = part.segment, future.result()
            epochs.append(np.full(s.hi - s.lo, s.epoch, np.int64))
            ids.append(window.ids[s.lo : s.hi] + self._first_ids[part.source])
            pieces.append(_Piece(window, s.lo, s.hi, part.source, s.epoch))
        return _Rows(np.concatenate(epochs), np.concatenate(ids), pieces)

    def _listed(self, mine: _Rows, row: int, reason: str) -> Replaced:
        piece = mine.origin(row)
        return Replaced(piece.source, piece.epoch, int(mine.ids[row]), reason)


def _sums(mine: _Rows) -> Sums:
    found: dict[tuple[int, int], list[tuple[U64, int, int]]] = {}
    for p in mine.pieces:
        found.setdefault((p.source, p.epoch), []).append((p.window.sums, p.lo, p.hi))
    return {where: BatchSum.between(pieces) for where, pieces in found.items()}


class EvalStream:
    """The evaluation rows in file order, cut into chunks that don't depend on the number of ranks.

    Chunk c belongs to rank c mod W. Yields (chunk, batch); every rank yields the same number of items, a
    rank that has no chunk left a stand-in with chunk -1.
    """

    def __init__(
        self, unit_rows: I64, units: Units, collate: Collate, *, chunk_rows: int, rank: int, num_ranks: int
    ) -> None:
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(unit_rows)])
        self._units, self._collate, self._chunk_rows = units, collate, chunk_rows
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
            tables.append(self._units.read(unit).slice(start, hi - begin - start))
        ids = np.arange(lo, hi)
        return self._collate(one_batch(pa.concat_tables(tables)), Keys(0, np.zeros_like(ids), ids))
