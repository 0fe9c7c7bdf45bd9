"""The fetcher: every byte right, the urgent first, a bounded amount, again after faults that pass, a second try for
what is slow."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.asking import REASONS, fault
from dltrain.data.catalog import DataFile
from dltrain.data.fetch import Fetcher, Request
from dltrain.data.ranges import Range, SparseFile, coalesce, cut
from dltrain.errors import DataError, StoreError

CONTENT = bytes(range(256)) * 64
FILE = DataFile("f", len(CONTENT), "tag")


class Backend:
    """Serves CONTENT; `before` may interfere with the request of a number."""

    def __init__(self, before: Callable[[int], bytes | None] | None = None) -> None:
        self.before, self.asked, self.renewed, self.fresh = before, 0, 0, 0
        self.starts: list[int] = []
        self._lock = threading.Lock()

    def read(self, file: DataFile, start: int, end: int, fresh: bool = False) -> bytes:
        with self._lock:
            self.asked += 1
            self.fresh += fresh
            number = self.asked
            self.starts.append(start)
        found = self.before(number) if self.before else None
        return CONTENT[start:end] if found is None else found

    def renew(self) -> None:
        self.renewed += 1

    def close(self) -> None:
        pass


class ClientError(Exception):
    def __init__(self, code: str, status: int = 0) -> None:
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        super().__init__(code)


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def opened() -> Iterator[Callable[..., Fetcher]]:
    made: list[Fetcher] = []

    def go(backend: Backend, in_flight: int = 2, part_bytes: int = 1000, **options: object) -> Fetcher:
        made.append(Fetcher(backend, in_flight, part_bytes, **{"sleep": lambda _: None, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield go
    for fetcher in made:
        fetcher.close()


def fetch(fetcher: Fetcher, ranges: Sequence[Range], needed: float = 0) -> Request:
    return fetcher.fetch(FILE, lambda: ranges, needed)


def read(fetcher: Fetcher, ranges: Sequence[Range]) -> SparseFile:
    return SparseFile(fetcher.wait(fetch(fetcher, ranges)))


RANGES = st.lists(
    st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(1, 3000)).map(
        lambda r: (r[0], min(r[0] + r[1], len(CONTENT)))
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=50)
@given(RANGES, st.integers(1, 2000))
def test_what_was_asked_for_reads_as_the_file_does(ranges: list[tuple[int, int]], part_bytes: int) -> None:
    fetcher = Fetcher(Backend(), 2, part_bytes)
    try:
        file = read(fetcher, ranges)
        for start, end in ranges:
            file.seek(start)
            assert bytes(file.read(end - start)) == CONTENT[start:end]
    finally:
        fetcher.close()


def test_ranges_with_small_holes_are_joined() -> None:
    assert coalesce([(50, 60), (0, 10), (12, 20), (5, 11), (30, 30)], hole=3) == [(0, 20), (50, 60)]


def test_outside_of_what_was_fetched() -> None:
    fetcher = Fetcher(Backend(), 1)
    file = read(fetcher, [(10, 20)])
    fetcher.close()
    with pytest.raises(ValueError, match="were not fetched"):
        file.read(5)


def test_what_is_needed_first_comes_first(opened: Callable[..., Fetcher]) -> None:
    gate = threading.Event()

    def hold(number: int) -> None:
        if number == 1:
            gate.wait(60)

    backend = Backend(hold)
    fetcher = opened(backend, in_flight=1)
    requests = [fetch(fetcher, [(0, 10)])]
    while backend.asked < 1:
        time.sleep(0.01)
    requests += [fetch(fetcher, [(at, at + 10)], needed) for at, needed in ((500, 9), (100, 3), (300, 5))]
    gate.set()
    for request in reversed(requests):
        fetcher.wait(request)
    assert backend.starts == [0, 100, 300, 500]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ClientError("SlowDown"), "server"),
        (ConnectionResetError("reset"), "connection"),
        (TimeoutError("late"), "timeout"),
        (ClientError("ExpiredToken"), "expired"),
        (b"short", "truncated"),
    ],
)
def test_faults_that_pass_are_tried_again(
    opened: Callable[..., Fetcher], error: Exception | bytes, reason: str
) -> None:
    def fail_twice(number: int) -> bytes | None:
        if number > 2:
            return None
        if isinstance(error, bytes):
            return error
        raise error

    backend = Backend(fail_twice)
    fetcher = opened(backend, in_flight=1, part_bytes=10_000)
    assert bytes(read(fetcher, [(0, 100)]).read(100)) == CONTENT[:100]
    assert fetcher.stats[f"retries_{reason}"] == fetcher.stats[f"requests_{reason}"] == 2
    assert (fetcher.stats["requests_ok"], fetcher.stats["bytes"]) == (1, 100)
    assert backend.renewed == fetcher.stats.get("renewed", 0) == (1 if reason == "expired" else 0)


def test_faults_that_stay_are_told(opened: Callable[..., Fetcher]) -> None:
    def always(number: int) -> None:
        raise ClientError("SlowDown")

    clock = Clock()
    backend = Backend(always)
    fetcher = opened(backend, clock=clock, sleep=clock.sleep)
    with pytest.raises(StoreError, match=r"f could not be read: \d+ attempts failed in \d\d s.*SlowDown.*overloaded"):
        fetcher.wait(fetch(fetcher, [(0, 10)]))
    assert 60 < clock.now <= 70
    assert backend.asked < 40


@pytest.mark.parametrize("error", [DataError("changed"), ClientError("AccessDenied")])
def test_what_will_not_pass_is_told_at_once(opened: Callable[..., Fetcher], error: Exception) -> None:
    def refuse(number: int) -> None:
        raise error

    backend = Backend(refuse)
    fetcher = opened(backend)
    with pytest.raises(type(error)):
        fetcher.wait(fetch(fetcher, [(0, 10)]))
    assert backend.asked == fetcher.stats["requests_refused"] == 1


def test_a_part_that_hangs_is_asked_for_again(opened: Callable[..., Fetcher]) -> None:
    gate = threading.Event()

    def hang_once(number: int) -> None:
        if number == 1:
            gate.wait(60)

    backend = Backend(hang_once)
    fetcher = opened(backend)
    try:
        assert bytes(read(fetcher, [(0, 10)]).read(10)) == CONTENT[:10]
        assert fetcher.stats["hedges"] == fetcher.stats["hedges_won"] == backend.fresh == 1
    finally:
        gate.set()


def test_few_second_tries_even_where_everything_is_slow(opened: Callable[..., Fetcher]) -> None:
    clock = Clock()

    def slow(number: int) -> None:
        clock.now += 5
        time.sleep(0.005)

    backend = Backend(slow)
    fetcher = opened(backend, in_flight=4, part_bytes=100, clock=clock, sleep=clock.sleep)
    read(fetcher, [(0, len(CONTENT))])
    assert backend.fresh <= 1 + 0.05 * fetcher.stats["requests_ok"]


def test_parts_are_of_the_size_asked_for_to_twice_as_much() -> None:
    for length in range(1, 100):
        parts = cut([(7, 7 + length)], 10)
        assert [start for start, _ in parts[1:]] == [end for _, end in parts[:-1]]
        assert (parts[0][0], parts[-1][1]) == (7, 7 + length)
        assert all(10 <= end - start < 20 for start, end in parts) or len(parts) == 1


def test_a_fault_is_seen_through_what_wraps_it() -> None:
    wrapped = OSError("wrapped")
    wrapped.__cause__ = ClientError("", 503)
    assert fault(wrapped) == "server"
    assert fault(ClientError("AccessDenied", 403)) == fault(ValueError("no")) == ""


# ---- the bound ----


def held(fetcher: Fetcher, until: Callable[[], bool]) -> None:
    """Waits for something the fetcher does by itself; a hang guard, not a limit."""
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_waited_for_needs_no_room(opened: Callable[..., Fetcher]) -> None:
    fetcher = opened(Backend(), limit_bytes=250)
    first = [fetch(fetcher, [(at, at + 100)], at) for at in (0, 100, 200, 300)]
    held(fetcher, lambda: first[1].over)
    assert (first[2].over, fetcher.bytes_in_flight) == (False, 200)
    fetcher.wait(first[3])
    assert (first[2].over, fetcher.bytes_in_flight) == (False, 300)
    fetcher.release(first[0])
    assert not first[2].over
    fetcher.release(first[3])
    held(fetcher, lambda: first[2].over)
    for request in first[1:3]:
        fetcher.release(request)
    held(fetcher, lambda: fetcher.bytes_in_flight == 0)


def test_what_nobody_wants_any_more_makes_room(opened: Callable[..., Fetcher]) -> None:
    gate = threading.Event()
    fetcher = opened(Backend(lambda _: gate.wait(60) and None), in_flight=1, limit_bytes=100)
    begun, queued = fetch(fetcher, [(0, 100)]), fetch(fetcher, [(100, 200)], 1)
    held(fetcher, lambda: fetcher.bytes_in_flight == 100)
    last = fetch(fetcher, [(200, 300)], 2)
    fetcher.release(begun)
    fetcher.release(queued)
    # Its bytes are still on their way.
    assert fetcher.bytes_in_flight == 100
    gate.set()
    fetcher.wait(last)
    assert (begun.future.cancelled(), queued.future.cancelled()) == (True, True)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 600), min_size=1, max_size=25),
    limit=st.integers(1, 1500),
    readers=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_the_bound_holds_and_never_stops_a_reader(sizes: list[int], limit: int, readers: int, seed: int) -> None:
    """Readers ask in an order of their own; over the limit comes only what they wait for."""
    over = []
    waiting = [0] * readers
    rng = random.Random(seed)

    def check(number: int) -> None:
        time.sleep(rng.random() * 0.001)
        # One that is larger than all the room there is comes alone.
        if fetcher.bytes_in_flight > max(limit, max(sizes)) + sum(waiting):
            over.append(fetcher.bytes_in_flight)

    fetcher = Fetcher(Backend(check), 3, 100, limit)
    starts = list(itertools.accumulate(sizes, initial=0))[:-1]
    requests = [fetch(fetcher, [(s, s + n)], rng.random()) for s, n in zip(starts, sizes, strict=True)]
    turns = rng.sample(range(len(sizes)), len(sizes))

    def consume(reader: int) -> None:
        for i in turns[reader::readers]:
            waiting[reader] = max(waiting[reader], sizes[i])
            file = SparseFile(fetcher.wait(requests[i]))
            file.seek(starts[i])
            assert bytes(file.read(sizes[i])) == CONTENT[starts[i] : starts[i] + sizes[i]]
            fetcher.release(requests[i])

    try:
        with ThreadPoolExecutor(readers) as pool:
            for done in [pool.submit(consume, reader) for reader in range(readers)]:
                done.result(timeout=60)
        held(fetcher, lambda: fetcher.bytes_in_flight == 0)
        assert not over
    finally:
        fetcher.close()


# ---- ends ----


def threads() -> int:
    return sum(thread.name == "dltrain-fetch" for thread in threading.enumerate())


def test_closing_ends_threads_and_gives_up_what_waits() -> None:
    before = threads()
    gate = threading.Event()
    fetcher = Fetcher(Backend(lambda _: gate.wait(60) and None), 1)
    requests = [fetch(fetcher, [(0, 10)], n) for n in range(3)]
    waiting = ThreadPoolExecutor(1).submit(fetcher.wait, requests[2])
    held(fetcher, lambda: fetcher.bytes_in_flight > 0)
    threading.Timer(0.1, gate.set).start()
    fetcher.close()
    for request in requests:
        assert "closed" in str(request.future.exception(timeout=60))
    assert "closed" in str(waiting.exception(timeout=60))
    assert threads() == before
    with pytest.raises(RuntimeError, match="closed"):
        fetcher.wait(fetch(fetcher, [(0, 10)]))


def test_one_bad_part_is_told_while_others_hang(opened: Callable[..., Fetcher]) -> None:
    gate = threading.Event()

    def before(number: int) -> None:
        if number == 1:
            gate.wait(60)
        raise ClientError("AccessDenied")

    fetcher = opened(Backend(before), in_flight=2, limit_bytes=10)
    request = fetch(fetcher, [(0, 5000)])
    with pytest.raises(ClientError, match="AccessDenied"):
        fetcher.wait(request)
    gate.set()
    held(fetcher, lambda: fetcher.bytes_in_flight == 0)


def test_threads_outlive_faults_of_many_parts_at_once(opened: Callable[..., Fetcher]) -> None:
    together = threading.Barrier(4)

    def before(number: int) -> None:
        if number <= 4:
            together.wait(60)
            raise ClientError("AccessDenied")

    fetcher = opened(Backend(before), in_flight=4)
    with pytest.raises(ClientError):
        fetcher.wait(fetch(fetcher, [(0, 4000)]))
    for _ in range(8):
        assert bytes(read(fetcher, [(0, 8000)]).read(10)) == CONTENT[:10]


def test_ranges_that_can_not_be_found_are_told(opened: Callable[..., Fetcher]) -> None:
    def find() -> list[Range]:
        raise DataError("no footer")

    fetcher = opened(Backend())
    with pytest.raises(DataError, match="no footer"):
        fetcher.wait(fetcher.fetch(FILE, find, 0))


def test_every_reason_has_a_word_of_advice() -> None:
    from dltrain.data.asking import _ADVICE

    assert set(_ADVICE) == set(REASONS)
