"""The rows of a dataset in the order of its files, as a stream of small batches: for passes over all of it.

    with RowStream(read_catalog(url)) as rows:
        for directory, units in rows.directories():
            for piece in rows.pieces(units, batch_bytes=4e6): piece.batch, piece.bytes

A row group is decoded batch by batch. What lies in object storage is fetched before it is needed: row groups of
usual size as a whole, larger ones a stretch of each column at a time.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dltrain.data.backends import check_local, open_backend
from dltrain.data.catalog import Catalog, DataFile, read_footer
from dltrain.data.fetch import CONNECTIONS, Fetcher, Request
from dltrain.data.ranges import Range, SparseFile
from dltrain.data.reader import column_ranges, decode_errors
from dltrain.errors import DataError
from dltrain.store import explain, filesystem

__all__ = ["Piece", "RowStream", "partition", "top"]

S = TypeVar("S")
T = TypeVar("T")
_MIB = 1024 * 1024
# Of a row group on the wire that is fetched as a whole, and of what is fetched ahead.
_WHOLE_BYTES, _AHEAD_BYTES = 128 * _MIB, 64 * _MIB
# Read at a time of each column of a larger one: all columns together at most the first.
_BUFFER_BYTES, _LEAST_BUFFER, _LARGEST_BUFFER = 64 * _MIB, 64 * 1024, 16 * _MIB
_MOST_ROWS = 16_384
_FOOTER_THREADS = 16


class Piece(NamedTuple):
    """Some rows, and their share of the bytes on the wire."""

    batch: pa.RecordBatch
    bytes: int


class _Unit(NamedTuple):
    file: DataFile
    footer: pq.FileMetaData
    group: int
    bytes: int
    request: Request | None


class RowStream:
    """Reads a catalog from its first row to its last.

    Attributes:
        schema: of the columns that are read, with the first file's metadata; columns: their names.
        num_bytes: of all of them on the wire.
    """

    def __init__(self, catalog: Catalog, columns: Sequence[str] | None = None) -> None:
        self._catalog = catalog
        self._fs, self._root = filesystem(catalog.url)
        with explain(catalog.url):
            backend = open_backend(catalog.url, CONNECTIONS)
        self._fetcher = Fetcher(backend) if backend else None
        self._pool = ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="dltrain-footer")
        whole = self._footer(catalog.files[0]).schema.to_arrow_schema()
        self.columns = [name for name in whole.names if columns is None or name in columns]
        if not self.columns:
            raise DataError(f"{catalog.url}: none of the columns {', '.join(columns or ())} is in the files themselves")
        self.schema = pa.schema([whole.field(name) for name in self.columns], whole.metadata)
        self.num_bytes = catalog.num_bytes

    def footers(self) -> Iterator[pq.FileMetaData]:
        """Of every file, several read at once."""
        return _ahead(self._pool, self._footer, self._catalog.files, _FOOTER_THREADS)

    def directories(self) -> list[tuple[str, list[int]]]:
        """The key=value directories, "" for none, and the units in each, in the order of the files.

        Raises:
            DataError: some files are in such directories and some are not.
        """
        units = range(self._catalog.num_units)
        named = [(partition(self._root, self._catalog.locate(unit)[0].path), unit) for unit in units]
        found = [(name, [unit for _, unit in some]) for name, some in groupby(named, key=lambda pair: pair[0])]
        names = [name for name, _ in found]
        if len(names) > 1 and ("" in names or len(set(names)) < len(names)):
            raise DataError(
                f"{self._catalog.url} has files in directories named key=value and others beside them, whose order "
                "could not be kept; give one of the directories, or move the other files away"
            )
        return found

    def pieces(self, units: Sequence[int], batch_bytes: float) -> Iterator[Piece]:
        """The rows of some units, in batches of about `batch_bytes` in memory.

        Raises:
            DataError: rows that can't be decoded, or a file that is not the one that was listed.
            StoreError: the storage can't be reached.
        """
        for unit in self._fetched(units):
            with explain(self._catalog.url), decode_errors(unit.file, unit.group):
                yield from self._decoded(unit, batch_bytes)
            if self._fetcher and unit.request:
                self._fetcher.release(unit.request)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._fetcher:
            self._fetcher.close()

    def __enter__(self) -> RowStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- bytes ----

    def _footer(self, file: DataFile) -> pq.FileMetaData:
        with explain(self._catalog.url):
            return read_footer(self._fs, file)

    def _fetched(self, units: Sequence[int]) -> Iterator[_Unit]:
        """The units, those that follow being fetched meanwhile."""
        waiting: deque[_Unit] = deque()
        for unit in self._begun(units):
            waiting.append(unit)
            while len(waiting) > 1 and sum(u.bytes for u in waiting) > _AHEAD_BYTES:
                yield waiting.popleft()
        yield from waiting

    def _begun(self, units: Sequence[int]) -> Iterator[_Unit]:
        places = [self._catalog.locate(unit) for unit in units]
        files = list(dict.fromkeys(file for file, _ in places))
        footers = _ahead(self._pool, self._footer, files, _FOOTER_THREADS)
        names = None if len(self.columns) == len(self._catalog.schema.names) else self.columns
        for number, (_, some) in enumerate(groupby(places, key=lambda place: place[0])):
            footer = next(footers)
            for file, group in some:
                ranges = column_ranges(footer, group, names)
                size = sum(end - start for start, end in ranges)
                whole = self._fetcher is not None and size <= _WHOLE_BYTES
                request = self._fetcher.fetch(file, _known(ranges), number) if self._fetcher and whole else None
                yield _Unit(file, footer, group, size, request)

    def _source(self, unit: _Unit) -> Any:
        if self._fetcher is None:
            check_local(unit.file)
            return pa.OSFile(unit.file.path)
        if unit.request is not None:
            return pa.PythonFile(SparseFile(self._fetcher.wait(unit.request)))
        return pa.PythonFile(_Stretches(self._fetcher, unit.file))

    def _decoded(self, unit: _Unit, batch_bytes: float) -> Iterator[Piece]:
        group = unit.footer.row_group(unit.group)
        chunks = [c for c in map(group.column, range(group.num_columns)) if top(c) in self.columns]
        size = sum(c.total_uncompressed_size for c in chunks)
        rows = max(1, min(_MOST_ROWS, int(batch_bytes * group.num_rows / max(1, size))))
        # Whole column chunks are in memory already; of others a stretch.
        stretch = max(_LEAST_BUFFER, min(_LARGEST_BUFFER, _BUFFER_BYTES // len(chunks)))
        buffer = 0 if unit.request else stretch
        reader = pq.ParquetFile(self._source(unit), metadata=unit.footer, buffer_size=buffer, pre_buffer=False)
        for batch in reader.iter_batches(rows, row_groups=[unit.group], columns=self.columns):
            yield Piece(self._alike(batch, unit.file), unit.bytes * batch.num_rows // group.num_rows)

    def _alike(self, batch: pa.RecordBatch, file: DataFile) -> pa.RecordBatch:
        """With the columns in the first file's order, and its metadata."""
        batch = batch.select(self.columns)
        for mine, its in zip(self.schema, batch.schema, strict=True):
            if not mine.equals(its):
                raise DataError(
                    f"{file.path}: column {its.name!r} is declared {_declared(its)}, in the first file "
                    f"{_declared(mine)}; rewrite the files that differ by themselves first"
                )
        return pa.RecordBatch.from_arrays(batch.columns, schema=self.schema)


class _Stretches(io.RawIOBase):
    """A file whose ranges are fetched when they are read."""

    def __init__(self, fetcher: Fetcher, file: DataFile) -> None:
        self._fetcher, self._file, self._at = fetcher, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        """Bytes of the whole file."""
        return self._file.size

    def read(self, size: int = -1) -> Any:
        end = self._file.size if size is None or size < 0 else min(self._at + size, self._file.size)
        request = self._fetcher.fetch(self._file, _known([(self._at, end)]), 0)
        fetched = self._fetcher.wait(request)
        self._at = end
        parts = [fetched.parts[start] for start in sorted(fetched.parts)]
        self._fetcher.release(request)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _known(ranges: list[Range]) -> Callable[[], list[Range]]:
    """What finds ranges that are known already."""
    return lambda: ranges


def _declared(field: pa.Field) -> str:
    return f"{field.type}{'' if field.nullable else ' without missing values'}"


def top(chunk: pq.ColumnChunkMetaData) -> str:
    """The column that a chunk is a part of."""
    return str(chunk.path_in_schema).split(".")[0]


def partition(root: str, path: str) -> str:
    """The key=value directories of a file under `root` (a directory, glob or file), joined; "" for none."""
    for wildcard in "*?[":
        root = root.partition(wildcard)[0]
    return "/".join(part for part in path[len(root) :].split("/")[:-1] if "=" in part)


def _ahead(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Sequence[S], depth: int) -> Iterator[T]:
    """As `map`, with `depth` calls under way."""
    waiting: deque[Future[T]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
