"""Reads units: only the row groups and columns asked for, decoded by pyarrow, a bounded amount kept.

reader = UnitReader(catalog, columns=("image", "label"))
reader.start(17, needed=position)       # begins to fetch
reader.read(17)                         # pa.Table of unit 17; single-flight between threads

Bytes of object storage come through the fetcher; pyarrow decodes what is there. Local files it reads itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dltrain.data.backends import changed, check_local, open_backend
from dltrain.data.cache import NodeCache
from dltrain.data.catalog import Catalog
from dltrain.data.fetch import CONNECTIONS, LIMIT_BYTES, Fetcher, Request
from dltrain.data.files import DataFile
from dltrain.data.footers import Footers, read_footer
from dltrain.data.ranges import SparseFile
from dltrain.errors import DataError
from dltrain.store import explain, filesystem

__all__ = ["UnitReader", "added", "column_ranges", "decode_errors"]

# Small, since memory that is used again costs less than fresh one; a dataset of this size is decoded once.
_KEEP_BYTES = 64 * 1024 * 1024
# Of fetched bytes at once: a page or so, which stays in the processor's cache until it is decoded.
_READ_BYTES = 1024 * 1024


@dataclass
class _Started:
    """A unit on its way, and how many want it."""

    request: Request
    wanted: int = 1


class UnitReader:
    """Units of a catalog as they are trained on: decoded, filtered, packed; those read last are kept.

    Args:
        columns: of the catalog's schema; None means all.
        keep_bytes: how much to keep.
        footers: those kept with the plan; without them each file's own is read.
        cache: of the node, for object storage; local files are read where they are.
        limit_bytes: fetched from there ahead of being decoded.
    """

    def __init__(
        self,
        catalog: Catalog,
        columns: Sequence[str] | None = None,
        keep_bytes: int = _KEEP_BYTES,
        footers: Footers | None = None,
        cache: NodeCache | None = None,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self._catalog, self._kept_footers = catalog, footers
        self._columns = list(columns) if columns is not None else None
        self._stored = catalog.stored_columns(columns)
        self._keep_bytes = keep_bytes
        self._fs, _ = filesystem(catalog.url)
        with explain(catalog.url):
            backend = open_backend(catalog.url, CONNECTIONS)
        self._fetcher = Fetcher(backend, limit_bytes=limit_bytes, cache=cache) if backend else None
        # Of a file that is mapped, all of a unit is asked of the disk at once; other bytes are here already.
        self._how: dict[str, Any] = {"buffer_size": _READ_BYTES} if backend else {"pre_buffer": True}
        self._lock = threading.Lock()
        self._units: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._started: dict[int, _Started] = {}
        self._footers: dict[str, Future[pq.FileMetaData]] = {}
        self.bytes_read = 0

    @property
    def stats(self) -> dict[str, float]:
        """What was counted of the store: see `Fetcher.stats`."""
        return self._fetcher.stats if self._fetcher else {}

    def start(self, unit: int, needed: float) -> None:
        """Begins to fetch a unit that is not here; of several, what is needed at the lowest position first."""
        if self._fetcher is None:
            return
        with self._lock:
            if unit in self._started:
                self._started[unit].wanted += 1
            elif unit not in self._units:
                self._started[unit] = _Started(self._fetch(unit, needed))

    def forget(self, unit: int) -> None:
        """Takes one `start` back."""
        with self._lock:
            started = self._started.get(unit)
            if started is None:
                return
            started.wanted -= 1
            if not started.wanted:
                del self._started[unit]
                assert self._fetcher is not None
                self._fetcher.release(started.request)

    def _fetch(self, unit: int, needed: float) -> Request:
        assert self._fetcher is not None
        file, group = self._catalog.locate(unit)
        # The footer may have to be read for it.
        return self._fetcher.fetch(file, lambda: column_ranges(self._footer(file, group), group, self._stored), needed)

    def read(self, unit: int) -> pa.Table:
        """The unit's rows.

        Raises:
            DataError: the row group can't be decoded, or the file is not the one that was planned.
            StoreError: the storage can't be reached.
        """
        with self._lock:
            future = self._units.get(unit)
            mine = future is None
            if future is None:
                future = self._units[unit] = Future()
            self._units.move_to_end(unit)
        if mine:
            self._fill(unit, future)
        return future.result()

    def close(self) -> None:
        """Ends the threads."""
        if self._fetcher:
            self._fetcher.close()

    def _fill(self, unit: int, future: Future[pa.Table]) -> None:
        try:
            future.set_result(self._load(unit))
        except BaseException as error:
            with self._lock:
                self._units.pop(unit, None)
            future.set_exception(error)
            return
        self._evict()

    def _load(self, unit: int) -> pa.Table:
        file, group = self._catalog.locate(unit)
        with explain(self._catalog.url), self._source(unit, file) as source:
            footer = self._footer(file, group)
            with decode_errors(file, group):
                table = pq.ParquetFile(source, metadata=footer, **self._how).read_row_group(
                    group, columns=self._stored, use_threads=False
                )
        self.bytes_read += int(self._catalog.units["bytes"][unit].as_py())
        return self._catalog.rows_of(unit, table, self._columns)

    @contextlib.contextmanager
    def _source(self, unit: int, file: DataFile) -> Iterator[Any]:
        """What pyarrow reads a unit from; its bytes are let go of afterwards."""
        if self._fetcher is None:
            check_local(file)
            # Decoded from where the kernel keeps it: a file read into memory first costs as much again.
            yield pa.memory_map(file.path)
            return
        with self._lock:
            started = self._started.pop(unit, None)
        request = started.request if started else self._fetch(unit, float("-inf"))
        try:
            yield pa.PythonFile(SparseFile(self._fetcher.wait(request)))
        finally:
            self._fetcher.release(request)

    def _footer(self, file: DataFile, group: int) -> pq.FileMetaData:
        with self._lock:
            future = self._footers.get(file.path)
            mine = future is None
            if future is None:
                future = self._footers[file.path] = Future()
        if mine:
            try:
                with explain(self._catalog.url):
                    kept = self._kept_footers if file.footer_bytes else None
                    future.set_result(kept(file) if kept else read_footer(self._fs, file))
            except BaseException as error:
                with self._lock:
                    del self._footers[file.path]
                gone = isinstance(error, FileNotFoundError)
                future.set_exception(changed(file, "it is gone") if gone else error)
        footer = future.result()
        if group >= footer.num_row_groups:
            raise DataError(f"{file.path} has changed since the run was planned: it lost row group {group}")
        return footer

    def _evict(self) -> None:
        with self._lock:
            done = [(u, f.result().nbytes) for u, f in self._units.items() if f.done() and not f.exception()]
            held = sum(size for _, size in done)
            for unit, size in done[:-1]:
                if held <= self._keep_bytes:
                    return
                del self._units[unit]
                held -= size


def added(*counted: Mapping[str, float]) -> Mapping[str, float]:
    """What several readers counted, together."""
    total: defaultdict[str, float] = defaultdict(float)
    for each in counted:
        for name, number in each.items():
            total[name] += number
    return total


@contextlib.contextmanager
def decode_errors(file: DataFile, group: int) -> Iterator[None]:
    """Turns what pyarrow says about the bytes of a row group into a DataError."""
    try:
        yield
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        # An OSError without a number is pyarrow's own, about the bytes; the others are the store's.
        if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
            raise
        raise DataError(f"{file.path}: row group {group} can't be decoded: {error}") from None


def column_ranges(footer: pq.FileMetaData, group: int, columns: list[str] | None) -> list[tuple[int, int]]:
    """Where the bytes of a row group's columns lie."""
    meta = footer.row_group(group)
    chunks = (meta.column(i) for i in range(meta.num_columns))
    found = []
    for chunk in chunks:
        if columns is None or chunk.path_in_schema.split(".")[0] in columns:
            first = chunk.dictionary_page_offset or chunk.data_page_offset
            start = min(first, chunk.data_page_offset)
            found.append((start, start + chunk.total_compressed_size))
    return found
