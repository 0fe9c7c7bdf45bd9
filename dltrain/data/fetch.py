"""The fetcher: ranges of files in large parts, what is needed first first, several at once, and again when they fail.

fetcher = Fetcher(open_backend(url, 8))
request = fetcher.fetch(file, lambda: [(4, 8_000_000)], needed=position)
fetched = fetcher.wait(request)          # now somebody waits for it
fetcher.release(request)                 # its bytes were used, or nobody wants them any more

Threads wait for the network and nothing else; pyarrow gets bytes that are there already. Bytes are in flight from
when a request is begun until it is released. A request is begun only when all of it finds room, but one that is
waited for is begun in any case: whoever waits releases it, so the bound can't stop everything.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from dltrain.data.asking import Asker, Piece
from dltrain.data.backends import Backend
from dltrain.data.cache import NodeCache, Slot
from dltrain.data.catalog import DataFile
from dltrain.data.ranges import Fetched, Parts, Range, coalesce, cut

__all__ = ["CONNECTIONS", "LIMIT_BYTES", "Fetcher", "Request"]

_IN_FLIGHT = 8
_PART_BYTES = 8 * 1024 * 1024
LIMIT_BYTES = 512_000_000
# A part that takes far longer than others do is asked for again, over another connection. The first time is free:
# a share of nothing would leave a dataset of a few parts waiting for one that hangs.
_HEDGE_SHARE, _HEDGE_SECONDS, _HEDGE_RATE, _HEDGE_THREADS = 0.05, 0.5, 20e6, 2
_WATCH_SECONDS = 0.05
# How long another process of the node may take for what it has begun to fetch.
_OTHERS_SECONDS = 30.0
_JOIN_SECONDS = 5.0
CONNECTIONS = _IN_FLIGHT + _HEDGE_THREADS


@dataclass(eq=False)
class Request:
    """What one `fetch` asked for.

    Attributes:
        ranges: None until they were found; size: their bytes; parts: those that came, missing: how many did not.
        waited: somebody waits; over: answered, or no longer wanted; released: its bytes are not wanted any more.
        held: its bytes count as in flight; busy: threads at work for it.
    """

    file: DataFile
    find: Callable[[], Sequence[Range]]
    key: tuple[float, int]
    future: Future[Fetched] = field(default_factory=Future)
    ranges: list[Range] | None = None
    parts: Parts = field(default_factory=dict)
    size: int = 0
    missing: int = 0
    slot: Slot | None = None
    parked: float = math.inf
    busy: int = 0
    waited: bool = False
    held: bool = False
    over: bool = False
    released: bool = False

    def __lt__(self, other: Request) -> bool:
        return self.key < other.key


@dataclass(eq=False)
class _Part(Piece):
    request: Request
    hedged: bool = False
    done: bool = False

    @property
    def wanted(self) -> bool:
        return not (self.done or self.request.over)

    def __lt__(self, other: _Part) -> bool:
        return (self.request.key, self.start) < (other.request.key, other.start)


class Fetcher:
    """Fetches with `in_flight` threads.

    Args:
        limit_bytes: in flight at once.
        cache: looked into before the store is asked.
        clock, sleep: for tests.
    """

    def __init__(
        self,
        backend: Backend,
        in_flight: int = _IN_FLIGHT,
        part_bytes: int = _PART_BYTES,
        limit_bytes: int = LIMIT_BYTES,
        cache: NodeCache | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self._backend, self._part_bytes, self._limit, self._cache = backend, part_bytes, limit_bytes, cache
        self._clock = clock
        self._closed = threading.Event()
        self._asker = Asker(backend, clock, sleep or self._closed.wait)
        self._lock = threading.Condition()
        self._order = itertools.count()
        # requests: those not over; queue: of them, those to begin or to look at; parked: until another process is done
        self._requests: set[Request] = set()
        self._queue: list[Request] = []
        self._parked: list[Request] = []
        self._parts: list[_Part] = []
        self._running: set[_Part] = set()
        self._again: deque[_Part] = deque()
        self._took: deque[float] = deque(maxlen=64)
        self.bytes_in_flight = 0
        jobs = [self._work] * in_flight + [self._hedge] * _HEDGE_THREADS + [self._watch]
        self._threads = [threading.Thread(target=job, name="dltrain-fetch", daemon=True) for job in jobs]
        for thread in self._threads:
            thread.start()

    @property
    def stats(self) -> dict[str, float]:
        """Requests by outcome, bytes and seconds of those that succeeded, retries by reason, hedges."""
        return self._asker.stats

    def fetch(self, file: DataFile, find: Callable[[], Sequence[Range]], needed: float) -> Request:
        """Begins to fetch; of all that is asked for, what is needed at the lowest position comes first.

        Args:
            find: gives the ranges; called in one of the threads, since it may read itself.
        """
        with self._lock:
            request = Request(file, find, (needed, next(self._order)))
            self._requests.add(request)
            heapq.heappush(self._queue, request)
            self._lock.notify_all()
        if self._closed.is_set():
            self._fail(request, _closed_error())
        return request

    def wait(self, request: Request) -> Fetched:
        """What was fetched, waited for; raises what kept it from being fetched."""
        with self._lock:
            request.waited = True
            self._lock.notify_all()
        return request.future.result()

    def release(self, request: Request) -> None:
        """Its bytes make room for others; a request that is not over is given up."""
        with self._lock:
            if not request.over:
                self._end(request)
                request.future.cancel()
            request.released = True
            self._free(request)

    def close(self) -> None:
        """Ends the threads; who still waits gets an error.

        A thread that hangs in the network is waited for a few seconds only; it ends when its request does.
        """
        with self._lock:
            self._closed.set()
            left = list(self._requests)
            self._lock.notify_all()
        for request in left:
            self._fail(request, _closed_error())
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._backend.close()

    # ---- threads ----

    def _work(self) -> None:
        while True:
            with self._lock:
                while (job := self._next()) is None and not self._closed.is_set():
                    self._lock.wait()
                if job is None or self._closed.is_set():
                    return
                request, do = job
                request.busy += 1
            try:
                do()
            except BaseException as error:
                self._fail(request, error)
            self._leave(request)

    def _next(self) -> tuple[Request, Callable[[], None]] | None:
        """The most urgent of what can be done now."""
        while self._parts and self._parts[0].request.over:
            heapq.heappop(self._parts)
        while self._queue and self._queue[0].over:
            heapq.heappop(self._queue)
        request = self._admissible()
        if self._parts and (request is None or self._parts[0].request.key <= request.key):
            part = heapq.heappop(self._parts)
            self._running.add(part)
            return part.request, partial(self._serve, part)
        if request is None:
            return None
        self._queue.remove(request)
        heapq.heapify(self._queue)
        if request.ranges is None:
            return request, partial(self._locate, request)
        if not request.held:
            request.held = True
            self.bytes_in_flight += request.size
        return request, partial(self._begin, request)

    def _admissible(self) -> Request | None:
        """The first of the queue where there is room for it; else the first that somebody waits for."""
        if not self._queue:
            return None
        first = self._queue[0]
        room = self.bytes_in_flight + first.size <= self._limit or not self.bytes_in_flight
        if room or first.held or first.ranges is None:
            return first
        return min((r for r in self._queue if r.waited and not r.over), default=None)

    def _hedge(self) -> None:
        while True:
            with self._lock:
                while not self._again and not self._closed.is_set():
                    self._lock.wait()
                if self._closed.is_set():
                    return
                part = self._again.popleft()
                part.request.busy += 1
            self._serve(part, hedge=True)
            self._leave(part.request)

    def _watch(self) -> None:
        """Looks for parts that take too long, and again at what another process was fetching."""
        while not self._closed.wait(_WATCH_SECONDS):
            with self._lock:
                slow = [p for p in self._running if not p.hedged and self._clock() - p.begun > self._patience(p)]
                for part in slow:
                    counted = self._asker.stats
                    if counted.get("hedges", 0) >= 1 + _HEDGE_SHARE * counted.get("requests_ok", 0):
                        break
                    part.hedged = True
                    self._asker.count("hedges")
                    self._again.append(part)
                for request in self._parked:
                    heapq.heappush(self._queue, request)
                if slow or self._parked:
                    self._parked.clear()
                    self._lock.notify_all()

    def _patience(self, part: _Part) -> float:
        usual = statistics.quantiles(self._took, n=20)[-1] if len(self._took) >= 8 else 0.0
        return max(2 * usual, _HEDGE_SECONDS + (part.end - part.start) / _HEDGE_RATE)

    # ---- one request ----

    def _locate(self, request: Request) -> None:
        ranges = coalesce(request.find())
        with self._lock:
            request.ranges, request.size = ranges, sum(end - start for start, end in ranges)
            heapq.heappush(self._queue, request)
            self._lock.notify_all()

    def _begin(self, request: Request) -> None:
        """Takes it from the cache, or has its parts fetched."""
        ranges = request.ranges or []
        if self._cache and self._clock() - request.parked < _OTHERS_SECONDS:
            found = self._cache.look(request.file, ranges)
            if found is None:
                with self._lock:
                    request.parked = min(request.parked, self._clock())
                    self._parked.append(request)
                return
            if isinstance(found, dict):
                self._finish(request, found)
                return
            request.slot = found
        parts = [_Part(request.file, start, end, request) for start, end in cut(ranges, self._part_bytes)]
        if not parts:
            self._finish(request, {})
        with self._lock:
            request.missing = len(parts)
            for part in parts:
                heapq.heappush(self._parts, part)
            self._lock.notify_all()

    def _finish(self, request: Request, parts: Parts) -> None:
        with self._lock:
            if request.over:
                return
            self._end(request)
        request.future.set_result(Fetched(request.file, parts))
        slot, request.slot = request.slot, None
        if slot:
            slot.store(parts)

    def _fail(self, request: Request, error: BaseException) -> None:
        with self._lock:
            if request.over:
                return
            self._end(request)
            request.released = True
            self._free(request)
        request.future.set_exception(error)

    def _end(self, request: Request) -> None:
        request.over = True
        self._requests.discard(request)

    def _leave(self, request: Request) -> None:
        with self._lock:
            request.busy -= 1
            self._free(request)

    def _free(self, request: Request) -> None:
        """Gives up its room once its bytes are not wanted and no thread has any of them."""
        if not request.released or request.busy:
            return
        request.parts.clear()
        if request.slot:
            request.slot.drop()
            request.slot = None
        if request.held:
            request.held = False
            self.bytes_in_flight -= request.size
            self._lock.notify_all()

    # ---- one part ----

    def _serve(self, part: _Part, hedge: bool = False) -> None:
        request, begin = part.request, self._clock()
        error: Exception | None = None
        try:
            data = self._asker.once(part, fresh=True) if hedge else self._asker.patiently(part)
        except Exception as raised:
            error = raised
        with self._lock:
            if not hedge:
                self._running.discard(part)
            if not part.wanted or (hedge and error):
                return
            part.done = True
            if error is None:
                request.parts[part.start] = data
                request.missing -= 1
                self._took.append(self._clock() - begin)
                self._asker.count("hedges_won", hedge)
        if error:
            self._fail(request, error)
        elif not request.missing:
            self._finish(request, request.parts)


def _closed_error() -> RuntimeError:
    return RuntimeError("the reader was closed")
