"""The fetcher: every byte right, the urgent first, again after faults that pass, and a second try for what is slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.catalog import DataFile
from dltrain.data.fetch import Fetcher, SparseFile, coalesce
from dltrain.errors import DataError, StoreError

CONTENT = bytes(range(256)) * 64
FILE = DataFile("f", len(CONTENT), "tag")


class Backend:
    """Serves CONTENT; `before` may interfere with the request of a number."""

    def __init__(self, before: Callable[[int], bytes | None] | None = None) -> None:
        self.before, self.asked, self.renewed = before, 0, 0
        self.starts: list[int] = []
        self._lock = threading.Lock()

    def read(self, file: DataFile, start: int, end: int) -> bytes:
        with self._lock:
            self.asked += 1
            number = self.asked
            self.starts.append(start)
        found = self.before(number) if self.before else None
        return CONTENT[start:end] if found is None else found

    def renew(self) -> None:
        self.renewed += 1


class ClientError(Exception):
    def __init__(self, code: str) -> None:
        self.response = {"Error": {"Code": code}}
        super().__init__(code)


@pytest.fixture
def opened() -> Iterator[Callable[..., Fetcher]]:
    made: list[Fetcher] = []

    def go(backend: Backend, in_flight: int = 2, part_bytes: int = 1000) -> Fetcher:
        made.append(Fetcher(backend, in_flight, part_bytes, sleep=lambda _: None))
        return made[-1]

    yield go
    for fetcher in made:
        fetcher.close()


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
        file = SparseFile(fetcher.fetch(FILE, ranges, 0).result(timeout=60))
        for start, end in ranges:
            file.seek(start)
            assert bytes(file.read(end - start)) == CONTENT[start:end]
    finally:
        fetcher.close()


def test_ranges_with_small_holes_are_joined() -> None:
    assert coalesce([(50, 60), (0, 10), (12, 20), (5, 11), (30, 30)], hole=3) == [(0, 20), (50, 60)]


def test_outside_of_what_was_fetched() -> None:
    fetcher = Fetcher(Backend(), 1)
    file = SparseFile(fetcher.fetch(FILE, [(10, 20)], 0).result(timeout=60))
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
    futures = [fetcher.fetch(FILE, [(0, 10)], 0)]
    while backend.asked < 1:
        time.sleep(0.01)
    futures += [fetcher.fetch(FILE, [(at, at + 10)], needed) for at, needed in ((500, 9), (100, 3), (300, 5))]
    gate.set()
    for future in futures:
        future.result(timeout=60)
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
    assert bytes(SparseFile(fetcher.fetch(FILE, [(0, 100)], 0).result(timeout=60)).read(100)) == CONTENT[:100]
    assert fetcher.stats[f"retries_{reason}"] == 2
    assert backend.renewed == (1 if reason == "expired" else 0)


def test_faults_that_stay_are_told(opened: Callable[..., Fetcher]) -> None:
    def always(number: int) -> None:
        raise ClientError("SlowDown")

    fetcher = opened(Backend(always))
    with pytest.raises(StoreError, match=r"f could not be read after 8 attempts.*SlowDown"):
        fetcher.fetch(FILE, [(0, 10)], 0).result(timeout=60)


@pytest.mark.parametrize("error", [DataError("changed"), ClientError("AccessDenied")])
def test_what_will_not_pass_is_told_at_once(opened: Callable[..., Fetcher], error: Exception) -> None:
    def refuse(number: int) -> None:
        raise error

    backend = Backend(refuse)
    with pytest.raises(type(error)):
        opened(backend).fetch(FILE, [(0, 10)], 0).result(timeout=60)
    assert backend.asked == 1


def test_a_part_that_hangs_is_asked_for_again(opened: Callable[..., Fetcher]) -> None:
    gate = threading.Event()

    def hang_once(number: int) -> None:
        if number == 1:
            gate.wait(60)

    fetcher = opened(Backend(hang_once))
    try:
        assert bytes(SparseFile(fetcher.fetch(FILE, [(0, 10)], 0).result(timeout=30)).read(10)) == CONTENT[:10]
        assert fetcher.stats["hedges"] == fetcher.stats["hedges_won"] == 1
    finally:
        gate.set()


def test_closing_gives_up_what_waits() -> None:
    gate = threading.Event()
    fetcher = Fetcher(Backend(lambda _: gate.wait(60) and None), 1)
    futures = [fetcher.fetch(FILE, [(0, 10)], n) for n in range(3)]
    fetcher.close()
    gate.set()
    assert sum(future.cancelled() for future in futures) >= 2
