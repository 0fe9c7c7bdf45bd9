"""The fetcher: ranges of files in large parts, what is needed first first, several at once, and again when they fail.

fetcher = Fetcher(open_backend(url, 8))
future = fetcher.fetch(file, [(4, 8_000_000)], needed=position)
pq.ParquetFile(pa.PythonFile(SparseFile(future.result())), metadata=footer)

Threads wait for the network and nothing else; pyarrow gets bytes that are there already.
"""

from __future__ import annotations

import heapq
import io
import itertools
import random
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from dltrain.data.backends import Backend
from dltrain.data.catalog import DataFile
from dltrain.errors import DataError, StoreError

__all__ = ["Fetched", "Fetcher", "SparseFile", "coalesce", "fault"]

Range = tuple[int, int]
IN_FLIGHT = 8
_PART_BYTES = 8 * 1024 * 1024
_HOLE_BYTES = 1024 * 1024
_TRIES = 8
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0
# A part that takes far longer than others do is asked for again, over another connection.
_HEDGE_SHARE, _HEDGE_SECONDS, _HEDGE_RATE, _HEDGE_THREADS = 0.05, 0.5, 20e6, 2
_WATCH_SECONDS = 0.05
_TRANSIENT = ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "500", "502", "503")
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")


def coalesce(ranges: Sequence[Range], hole: int = _HOLE_BYTES) -> list[Range]:
    """Joins ranges that overlap, or that lie less than `hole` bytes apart."""
    joined: list[Range] = []
    for start, end in sorted(r for r in ranges if r[1] > r[0]):
        if joined and start - joined[-1][1] <= hole:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _cut(ranges: Sequence[Range], size: int) -> list[Range]:
    """Parts of about the same size, at most `size` and a half."""
    parts = []
    for start, end in ranges:
        count = max(1, round((end - start) / size))
        edges = [start + (end - start) * i // count for i in range(count + 1)]
        parts += list(itertools.pairwise(edges))
    return parts


def fault(error: Exception) -> str:
    """Why a request failed, in one word, if asking again may help; else an empty text."""
    code = str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
    status = getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _EXPIRED:
        return "expired"
    if code in _TRANSIENT or status >= 500:
        return "server"
    if isinstance(error, _ShortError):
        return "truncated"
    name = type(error).__name__
    if isinstance(error, TimeoutError) or "Timeout" in name:
        return "timeout"
    network = ("Connection", "EndpointConnection", "ProtocolError", "IncompleteRead", "ResponseStreaming", "HTTPClient")
    return "connection" if isinstance(error, ConnectionError) or any(word in name for word in network) else ""


class _ShortError(Exception):
    """Fewer bytes came than were asked for."""


@dataclass
class Fetched:
    """Ranges of one file: `parts` maps where a part begins to its bytes."""

    file: DataFile
    parts: dict[int, bytes] = field(default_factory=dict)


class SparseFile(io.RawIOBase):
    """A file of which only some ranges are there; reading elsewhere is an error of ours."""

    def __init__(self, fetched: Fetched) -> None:
        self._size = fetched.file.size
        self._starts = sorted(fetched.parts)
        self._parts = [memoryview(fetched.parts[start]) for start in self._starts]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        """Bytes of the whole file."""
        return self._size

    def read(self, size: int = -1) -> Any:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        pieces, at = [], self._at
        for start, part in zip(self._starts, self._parts, strict=True):
            if start <= at < start + len(part) and at < end:
                pieces.append(part[at - start : end - start])
                at += len(pieces[-1])
        if at < end:
            raise ValueError(f"bytes {at}-{end} were not fetched")
        self._at = at
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@dataclass
class _Request:
    """What one `fetch` waits for."""

    fetched: Fetched
    missing: int
    future: Future[Fetched]


@dataclass(eq=False)
class _Part:
    request: _Request
    start: int
    end: int
    begun: float = 0.0
    hedged: bool = False
    done: bool = False


class Fetcher:
    """Fetches with `in_flight` threads; counts what happened in `stats`.

    Args:
        clock, sleep: for tests.
    """

    def __init__(
        self,
        backend: Backend,
        in_flight: int = IN_FLIGHT,
        part_bytes: int = _PART_BYTES,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._backend, self._part_bytes = backend, part_bytes
        self._clock = clock
        self._closed = threading.Event()
        self._sleep = sleep or self._closed.wait
        self._lock = threading.Condition()
        self._queue: list[tuple[float, int, _Part]] = []
        self._again: deque[_Part] = deque()
        self._order = itertools.count()
        self._running: set[_Part] = set()
        self._took: deque[float] = deque(maxlen=64)
        self._renewed = 0.0
        self.stats: Counter[str] = Counter()
        jobs = [self._work] * in_flight + [self._hedge] * _HEDGE_THREADS + [self._watch]
        for job in jobs:
            threading.Thread(target=job, name="dltrain-fetch", daemon=True).start()

    def fetch(self, file: DataFile, ranges: Sequence[Range], needed: float) -> Future[Fetched]:
        """Begins to fetch; of all that is asked for, what is needed at the lowest position comes first."""
        parts = _cut(coalesce(ranges), self._part_bytes)
        request = _Request(Fetched(file), len(parts), Future())
        if not parts:
            request.future.set_result(request.fetched)
        with self._lock:
            for start, end in parts:
                heapq.heappush(self._queue, (needed, next(self._order), _Part(request, start, end)))
            self._lock.notify_all()
        return request.future

    def close(self) -> None:
        """Ends the threads; what was not fetched yet is given up."""
        self._closed.set()
        with self._lock:
            for _, _, part in self._queue:
                part.request.future.cancel()
            self._queue.clear()
            self._lock.notify_all()

    # ---- threads ----

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed.is_set():
                    self._lock.wait()
                if self._closed.is_set():
                    return
                part = heapq.heappop(self._queue)[2]
                part.begun = self._clock()
                self._running.add(part)
            self._serve(part)

    def _hedge(self) -> None:
        while True:
            with self._lock:
                while not self._again and not self._closed.is_set():
                    self._lock.wait()
                if self._closed.is_set():
                    return
                part = self._again.popleft()
            self._serve(part, hedge=True)

    def _watch(self) -> None:
        """Looks for parts that take too long."""
        while not self._closed.wait(_WATCH_SECONDS):
            with self._lock:
                now = self._clock()
                for part in [p for p in self._running if not p.hedged and now - p.begun > self._patience(p)]:
                    if self.stats["hedges"] >= 1 + _HEDGE_SHARE * self.stats["parts"]:
                        break
                    part.hedged = True
                    self.stats["hedges"] += 1
                    self._again.append(part)
                    self._lock.notify_all()

    def _patience(self, part: _Part) -> float:
        usual = statistics.quantiles(self._took, n=20)[-1] if len(self._took) >= 8 else 0.0
        return max(2 * usual, _HEDGE_SECONDS + (part.end - part.start) / _HEDGE_RATE)

    # ---- one part ----

    def _serve(self, part: _Part, hedge: bool = False) -> None:
        begin = self._clock()
        try:
            data: bytes | None = self._read(part)
            error: Exception | None = None
        except Exception as raised:
            data, error = None, raised
        with self._lock:
            if not hedge:
                self._running.discard(part)
            if part.done or (hedge and error):
                return
            part.done = True
            self._took.append(self._clock() - begin)
            self.stats["parts"] += 1
            self.stats["bytes"] += part.end - part.start
            self.stats["hedges_won"] += int(hedge)
        self._deliver(part, data, error)

    def _deliver(self, part: _Part, data: bytes | None, error: Exception | None) -> None:
        request = part.request
        with self._lock:
            if data is not None:
                request.fetched.parts[part.start] = data
                request.missing -= 1
            finished = error is not None or not request.missing
        if request.future.done() or not finished:
            return
        if error is not None:
            request.future.set_exception(error)
        else:
            request.future.set_result(request.fetched)

    def _read(self, part: _Part) -> bytes:
        """The bytes, asked for again with growing random pauses while that may help."""
        file, wait = part.request.fetched.file, _FIRST_WAIT
        for attempt in range(1, _TRIES + 1):
            try:
                data = self._backend.read(file, part.start, part.end)
                if len(data) == part.end - part.start:
                    return data
                raise _ShortError(f"{len(data):,} of {part.end - part.start:,} bytes came")
            except DataError:
                raise
            except Exception as error:
                reason = fault(error)
                if not reason or attempt == _TRIES or self._closed.is_set():
                    raise self._final(file, error, attempt) from error
                self._count_retry(reason)
            if part.done:
                break
            self._sleep(random.uniform(0, wait))
            wait = min(2 * wait, _LONGEST_WAIT)
        raise StoreError(f"{file.path}: given up")

    def _count_retry(self, reason: str) -> None:
        with self._lock:
            self.stats[f"retries_{reason}"] += 1
            if reason != "expired" or self._clock() - self._renewed < 1.0:
                return
            self._renewed = self._clock()
            self.stats["renewed"] += 1
        self._backend.renew()

    def _final(self, file: DataFile, error: Exception, attempts: int) -> Exception:
        if not fault(error):
            return error
        return StoreError(
            f"{file.path} could not be read after {attempts} attempts: {type(error).__name__}: {error}; "
            "the storage is down or overloaded: `dltrain run` again goes on from the last checkpoint"
        )
