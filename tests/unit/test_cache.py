"""The node cache: the same bytes, one fetch for all processes, within its limit, and never in the way."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data import cache as module
from dltrain.data.cache import NodeCache, Slot
from dltrain.data.catalog import DataFile, read_catalog
from dltrain.data.fetch import Fetcher
from dltrain.data.ranges import Parts, Range, SparseFile
from dltrain.data.reader import UnitReader

SIZE = 40_000
CONTENT = random.Random(0).randbytes(SIZE)
FILE = DataFile("bucket/f", SIZE, "tag")
MANY = 1 << 40


def pieces(ranges: Sequence[Range], content: bytes = CONTENT) -> Parts:
    return {start: content[start:end] for start, end in ranges}


def put(cache: NodeCache, ranges: Sequence[Range], file: DataFile = FILE) -> None:
    slot = cache.look(file, ranges)
    assert isinstance(slot, Slot)
    slot.store(pieces(ranges))


def has(cache: NodeCache, ranges: Sequence[Range], file: DataFile = FILE) -> bool:
    found = cache.look(file, ranges)
    if isinstance(found, Slot):
        found.drop()
        return False
    assert found is not None
    assert {start: bytes(data) for start, data in found.items()} == pieces(ranges)
    return True


def entries(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if module._NAME.fullmatch(path.name)]


@pytest.fixture
def cache(tmp_path: Path) -> NodeCache:
    return NodeCache(tmp_path / "cache", MANY)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, SIZE), min_size=2, max_size=12, unique=True))
def test_what_was_stored_comes_back(tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    edges = sorted(cuts)
    ranges = list(zip(edges[::2], edges[1::2], strict=False))
    cache = NodeCache(tmp_path_factory.mktemp("cache"), MANY)
    assert not has(cache, ranges)
    put(cache, ranges)
    assert has(cache, ranges)
    total = sum(end - start for start, end in ranges)
    assert cache.stats == {"cache_miss": 2, "cache_hit": 1, "cache_bytes": total}


def test_other_columns_versions_and_files_are_other_entries(cache: NodeCache) -> None:
    put(cache, [(0, 100)])
    for file in (DataFile("bucket/g", SIZE, "tag"), DataFile("bucket/f", SIZE, "new"), DataFile("bucket/f", 1, "tag")):
        assert not has(cache, [(0, 100)], file)
    for ranges in ([(0, 99)], [(0, 100), (200, 300)], [(1, 100)]):
        assert not has(cache, ranges)
    assert has(cache, [(0, 100)])


def test_a_file_without_a_version_is_not_kept(cache: NodeCache) -> None:
    unversioned = DataFile("bucket/f", SIZE, "")
    put(cache, [(0, 100)], unversioned)
    assert not has(cache, [(0, 100)], unversioned)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "longer", "zeros"])
def test_a_damaged_entry_is_noticed_and_written_again(cache: NodeCache, tmp_path: Path, damage: str) -> None:
    put(cache, [(0, 1000)])
    (path,) = entries(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[500] ^= 1
    flipped = bytes(raw)
    raw[500] ^= 1
    wrong = {"cut": raw[:-1], "flipped": flipped, "empty": b"", "longer": raw + b"x", "zeros": bytes(len(raw))}
    path.write_bytes(wrong[damage])
    put(cache, [(0, 1000)])
    assert has(cache, [(0, 1000)])
    assert cache.stats["cache_damaged"] == 1


def test_least_recently_used_goes_first_and_foreign_files_stay(tmp_path: Path) -> None:
    foreign = [tmp_path / "notes.txt", tmp_path / module._OWN / "README", tmp_path / module._OWN / "deep" / ("a" * 40)]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(5000))
    (tmp_path / module._OWN / ("b" * 40)).symlink_to(foreign[0])
    cache = NodeCache(tmp_path, 10 * 1016)
    ranges = [[(at, at + 996)] for at in range(0, 20_000, 1000)]
    for each in ranges[:10]:
        put(cache, each)
        time.sleep(0.01)
    assert has(cache, ranges[0])
    put(cache, ranges[10])
    assert has(cache, ranges[0])
    assert has(cache, ranges[10])
    assert not has(cache, ranges[1])
    for each in ranges[11:]:
        put(cache, each)
    assert all(path.stat().st_size == 5000 for path in foreign)
    assert sum(path.stat().st_size for path in entries(tmp_path / module._OWN) if path.parent.name == module._OWN)
    assert (tmp_path / module._OWN / ("b" * 40)).is_symlink()


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    put(cache, [(0, 999)])
    put(cache, [(0, 900)])
    assert has(cache, [(0, 900)])
    assert not has(cache, [(0, 999)])


# ---- a directory that can't be used ----


def disk(code: int) -> Any:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["pwrite", "replace", "ftruncate", "open"])
def test_trouble_is_said_once_and_counted_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    said: list[str] = []
    cache = NodeCache(tmp_path, MANY, said.append)
    put(cache, [(0, 10)])
    with monkeypatch.context() as patch:
        patch.setattr(module.os, call, disk(code))
        for at in (100, 200, 300):
            cache._writes_from = 0
            put(cache, [(at, at + 10)])
    assert len(said) == 1
    assert os.strerror(code) in said[0]
    assert cache.stats["cache_error"] >= 3
    assert len(entries(tmp_path)) == 1
    # It goes on with what is there, and writes again after a while.
    assert has(cache, [(0, 10)])
    put(cache, [(100, 110)])
    assert not has(cache, [(100, 110)])
    cache._writes_from = 0
    put(cache, [(100, 110)])
    assert has(cache, [(100, 110)])


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    said: list[str] = []
    cache = NodeCache(tmp_path / "file", MANY, said.append)
    for at in (0, 10):
        put(cache, [(at, at + 10)])
        assert not has(cache, [(at, at + 10)])
    assert len(said) == 1
    assert "data.cache" in said[0]


def test_a_directory_that_vanishes(cache: NodeCache, tmp_path: Path) -> None:
    put(cache, [(0, 10)])
    for path in (tmp_path / "cache" / module._OWN).iterdir():
        path.unlink()
    (tmp_path / "cache" / module._OWN).rmdir()
    assert not has(cache, [(0, 10)])
    put(cache, [(0, 10)])
    assert has(cache, [(0, 10)])


# ---- through the fetcher and the reader ----


class Backend:
    """Serves CONTENT, slowly, and writes down in a file what it was asked for."""

    def __init__(self, log: Path, seconds: float = 0.0) -> None:
        self._log, self._seconds = log, seconds

    def read(self, file: DataFile, start: int, end: int, fresh: bool = False) -> bytes:
        with self._log.open("a") as log:
            log.write(f"{start} {end}\n")
        time.sleep(self._seconds)
        return CONTENT[start:end]

    def renew(self) -> None:
        pass

    def close(self) -> None:
        pass


# Each is read as one range: the hole is small.
RANGES = [[(at, at + 700), (at + 900, at + 1000)] for at in range(0, SIZE, 1000)]


def fetch_all(directory: Path, log: Path, limit: int = MANY, seed: int = 0, part: int = 400) -> dict[str, float]:
    """All of RANGES in some order, checked; returns what was counted."""
    cache = NodeCache(directory, limit)
    fetcher = Fetcher(Backend(log, 0.001), 4, part, cache=cache)
    try:
        order = random.Random(seed).sample(range(len(RANGES)), len(RANGES))
        requests = [fetcher.fetch(FILE, lambda i=i: RANGES[i], n) for n, i in enumerate(order)]
        for i, request in zip(order, requests, strict=True):
            file = SparseFile(fetcher.wait(request))
            for start, end in RANGES[i]:
                file.seek(start)
                assert bytes(file.read(end - start)) == CONTENT[start:end]
            fetcher.release(request)
        return {**fetcher.stats, **cache.stats}
    finally:
        fetcher.close()


def test_fetched_once_and_read_from_the_directory_after_that(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = fetch_all(tmp_path / "cache", log)
    asked = len(log.read_text().splitlines())
    second = fetch_all(tmp_path / "cache", log, seed=1, part=10_000)
    assert len(log.read_text().splitlines()) == asked
    assert (first["cache_miss"], second["cache_hit"]) == (len(RANGES), len(RANGES))
    assert "requests_ok" not in second


def test_objects_go_through_the_cache_and_local_files_do_not(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(300)), "b": [str(i) for i in range(300)]})
    fs = fsspec.filesystem("memory")
    with fs.open("/cached/part.parquet", "wb") as out:
        pq.write_table(table, out, row_group_size=100)
    listed = read_catalog("memory://cached")
    catalog = dataclasses.replace(listed, files=tuple(dataclasses.replace(f, etag="v1") for f in listed.files))
    for columns, outcome in ((["a"], "cache_miss"), (["a"], "cache_hit"), (["a", "b"], "cache_miss")):
        cache = NodeCache(tmp_path / "cache", MANY)
        reader = UnitReader(catalog, columns, cache=cache)
        try:
            assert reader.read(1).equals(table.select(columns).slice(100, 100))
            assert cache.stats[outcome] == 1
        finally:
            reader.close()
    pq.write_table(table, tmp_path / "local.parquet")
    reader = UnitReader(read_catalog(str(tmp_path / "local.parquet")), cache=NodeCache(tmp_path / "other", MANY))
    assert reader.read(0).num_rows == 300
    reader.close()
    assert not (tmp_path / "other").exists()


# ---- several processes ----


def start(job: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, job, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start_together(directory: Path, log: Path, limit: int) -> list[subprocess.Popen[str]]:
    processes = [start("fetch", directory, log, limit, seed) for seed in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def finished(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0


def test_processes_fetch_each_unit_once_between_them(tmp_path: Path) -> None:
    log = tmp_path / "log"
    finished(start_together(tmp_path / "cache", log, MANY))
    asked = log.read_text().splitlines()
    assert len(asked) == len(set(asked))
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_processes_stay_within_the_limit_together(tmp_path: Path) -> None:
    limit = 7 * 1020
    processes = start_together(tmp_path / "cache", tmp_path / "log", limit)
    most = 0
    while any(process.poll() is None for process in processes):
        sizes = []
        for path in entries(tmp_path / "cache"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        most = max(most, sum(sizes))
        time.sleep(0.002)
    finished(processes)
    left = sum(path.stat().st_size for path in entries(tmp_path / "cache"))
    assert 0 < left <= limit
    # One that is renamed while the directory is listed may be seen under both names.
    assert most <= limit + 4 * 1020


def test_what_a_killed_process_had_begun_is_taken_over(tmp_path: Path) -> None:
    holder = start("hold", tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holding\n"
    cache = NodeCache(tmp_path, MANY)
    assert cache.look(FILE, [(0, 100)]) is None
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=60)
    put(cache, [(0, 100)])
    assert has(cache, [(0, 100)])


def test_what_a_killed_process_had_begun_makes_room(tmp_path: Path) -> None:
    holder = start("hold", tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holding\n"
    cache = NodeCache(tmp_path, 2000)
    put(cache, [(1000, 2000)])
    # The other's is kept while it is being written, and both don't fit.
    assert not has(cache, [(1000, 2000)])
    holder.kill()
    holder.communicate(timeout=60)
    put(cache, [(1000, 2000)])
    assert has(cache, [(1000, 2000)])
    assert not list(tmp_path.rglob("*.part"))


def test_who_waits_for_a_process_that_hangs_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dltrain.data.fetch._OTHERS_SECONDS", 0.2)
    holder = start("hold", tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holding\n"
    fetcher = Fetcher(Backend(tmp_path / "log"), 2, cache=NodeCache(tmp_path, MANY))
    try:
        file = SparseFile(fetcher.wait(fetcher.fetch(FILE, lambda: [(0, 100)], 0)))
        assert bytes(file.read(100)) == CONTENT[:100]
    finally:
        fetcher.close()
        holder.kill()
        holder.communicate(timeout=60)


def hold(directory: Path) -> None:
    """Begins to write an entry, and stays there."""
    cache = NodeCache(directory, MANY)
    slot = cache.look(FILE, [(0, 100)])
    assert isinstance(slot, Slot)
    cache.reserve(slot._fd, 1500)
    print("holding", flush=True)
    time.sleep(300)


if __name__ == "__main__":
    job, where, *more = sys.argv[1:]
    if job == "hold":
        hold(Path(where))
    else:
        print("ready", flush=True)
        sys.stdin.readline()
        fetch_all(Path(where), Path(more[0]), int(more[1]), int(more[2]))
