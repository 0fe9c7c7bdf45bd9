"""Reads units: only the row groups and columns asked for, decoded by pyarrow, a bounded amount kept.

reader = UnitReader(catalog, columns=("image", "label"))
reader.start(17, needed=position)       # begins to fetch
reader.read(17)                         # pa.Table of unit 17; single-flight between threads

Bytes of object storage come through the fetcher; pyarrow decodes what is there. Local files it reads itself.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dltrain.data.backends import check_local, open_backend
from dltrain.data.catalog import Catalog, DataFile, read_footer
from dltrain.data.fetch import IN_FLIGHT, Fetched, Fetcher, SparseFile
from dltrain.errors import DataError
from dltrain.store import explain, filesystem

__all__ = ["UnitReader"]

# Small, since memory that is used again costs less than fresh one; a dataset of this size is decoded once.
_KEEP_BYTES = 64 * 1024 * 1024
_FOOTER_THREADS = 4
# Of fetched bytes at once: a page or so, which stays in the processor's cache until it is decoded.
_READ_BYTES = 1024 * 1024


class UnitReader:
    """Decoded units of a catalog, with those read last kept up to `keep_bytes`."""

    def __init__(self, catalog: Catalog, columns: Sequence[str] | None = None, keep_bytes: int = _KEEP_BYTES) -> None:
        self._catalog = catalog
        self._columns = list(columns) if columns is not None else None
        self._keep_bytes = keep_bytes
        self._fs, _ = filesystem(catalog.url)
        with explain(catalog.url):
            backend = open_backend(catalog.url, IN_FLIGHT + 2)
        self._fetcher = Fetcher(backend) if backend else None
        self._pool = ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="dltrain-footer")
        # Of a file that is mapped, all of a unit is asked of the disk at once; other bytes are here already.
        self._how: dict[str, Any] = {"buffer_size": _READ_BYTES} if backend else {"pre_buffer": True}
        self._lock = threading.Lock()
        self._units: OrderedDict[int, Future[pa.Table]] = OrderedDict()
        self._started: dict[int, Future[Fetched]] = {}
        self._footers: dict[str, Future[pq.FileMetaData]] = {}
        self.bytes_read = 0

    @property
    def stats(self) -> Counter[str]:
        """What the fetcher counted: parts, bytes, retries by reason, hedges."""
        return self._fetcher.stats if self._fetcher else Counter()

    def start(self, unit: int, needed: float) -> None:
        """Begins to fetch a unit that is not here; of several, what is needed at the lowest position first."""
        if self._fetcher is None:
            return
        with self._lock:
            if unit in self._units or unit in self._started:
                return
            future = self._started[unit] = Future()
        file, group = self._catalog.locate(unit)
        # Not here: the ranges are in the footer, which may have to be read first.
        self._pool.submit(self._begin, future, file, group, needed)

    def _begin(self, future: Future[Fetched], file: DataFile, group: int, needed: float) -> None:
        assert self._fetcher is not None
        try:
            ranges = _ranges(self._footer(file, group), group, self._columns)
            inner = self._fetcher.fetch(file, ranges, needed)
        except BaseException as error:
            future.set_exception(error)
            return
        inner.add_done_callback(lambda done: _pass_on(done, future))

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
        self._pool.shutdown(wait=False, cancel_futures=True)
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
        with explain(self._catalog.url):
            source = self._source(unit, file, group)
            footer = self._footer(file, group)
            try:
                table = pq.ParquetFile(source, metadata=footer, **self._how).read_row_group(
                    group, columns=self._columns, use_threads=False
                )
            except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                # An OSError without a number is pyarrow's own, about the bytes; the others are the store's.
                if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
                    raise
                raise DataError(f"{file.path}: row group {group} can't be decoded: {error}") from None
        self.bytes_read += int(self._catalog.units["bytes"][unit].as_py())
        return table

    def _source(self, unit: int, file: DataFile, group: int) -> Any:
        if self._fetcher is None:
            check_local(file)
            # Decoded from where the kernel keeps it: a file read into memory first costs as much again.
            return pa.memory_map(file.path)
        with self._lock:
            future = self._started.pop(unit, None)
        if future is None:
            future = Future()
            self._begin(future, file, group, float("-inf"))
        return pa.PythonFile(SparseFile(future.result()))

    def _footer(self, file: DataFile, group: int) -> pq.FileMetaData:
        with self._lock:
            future = self._footers.get(file.path)
            mine = future is None
            if future is None:
                future = self._footers[file.path] = Future()
        if mine:
            try:
                with explain(self._catalog.url):
                    future.set_result(read_footer(self._fs, file))
            except BaseException as error:
                with self._lock:
                    del self._footers[file.path]
                future.set_exception(error)
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


def _pass_on(done: Future[Fetched], to: Future[Fetched]) -> None:
    error = RuntimeError("the reader was closed") if done.cancelled() else done.exception()
    if error:
        to.set_exception(error)
    else:
        to.set_result(done.result())


def _ranges(footer: pq.FileMetaData, group: int, columns: list[str] | None) -> list[tuple[int, int]]:
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
