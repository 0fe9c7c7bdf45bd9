"""Writes a dataset anew with row groups of a good size, a stream of batches at a time.

    done = rewrite("s3://bucket/raw", "s3://bucket/raw-32", row_group_mb=32)
    done["row_groups"]                     # {"before": 4, "after": 512}

Rows, their order and the schema stay as they are. A row group is never decoded as a whole, so memory holds about
two of the new ones whatever the size of the old. Directories named key=value keep their names.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dltrain.data.catalog import read_catalog
from dltrain.data.lists import RaggedError, even_lists, reshape
from dltrain.data.prefetch import Prefetcher
from dltrain.data.source import Piece, RowStream, top
from dltrain.data.target import PART, OpenPart, free_bytes, new_directory
from dltrain.errors import DataError, RunFailedError, StoreError, UserError
from dltrain.store import open_store

__all__ = ["COMPRESSIONS", "Progress", "regroup", "rewrite"]

# done, total: bytes of the source.
Progress = Callable[[int, int], None]
COMPRESSIONS = ("zstd", "snappy", "lz4", "gzip", "brotli", "none")
_MIB = 1024 * 1024
# Batches of a row group: more make its size more even, fewer cost less.
_BATCHES = 8
# What writing anew can save at the very most, of what is compressed already and of what is not.
_LEAST, _LEAST_PLAIN = 0.5, 0.1


def rewrite(
    source: str,
    target: str,
    *,
    row_group_mb: float = 32,
    file_mb: float = 512,
    columns: Sequence[str] | None = None,
    compression: str = "zstd",
    lists: Literal["keep", "fixed", "packed"] = "keep",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes `source` to `target`, which appears wholly or not at all.

    Args:
        row_group_mb: MiB of a row group in memory, to within an eighth.
        file_mb: MiB at which a file is full.
        columns: those to keep; None means all.
        lists: lists of numbers that are of one length in every row become fixed-size lists (`fixed`), or bytes of
            a fixed size (`packed`), which are decoded several times as fast.
        progress: called with the bytes read so far and their total.

    Returns:
        rows, and files, row groups and bytes before and after, columns whose lists were changed, seconds.

    Raises:
        DataError: nothing to read, a target that is not empty, one within the other.
        StoreError: the storage can't be reached, or has too little space.
    """
    begin = time.monotonic()
    _check_settings(row_group_mb, file_mb, compression)
    _check_apart(source, target)
    catalog = read_catalog(source, columns, "SRC")
    with RowStream(catalog, columns) as rows:
        changed = even_lists(rows.footers(), rows.schema) if lists != "keep" else {}
        _check_space(rows.footers(), target, set(rows.columns))
        job = _Job(rows, target, row_group_mb * _MIB, file_mb * _MIB, compression, lists == "packed", progress)
        while True:
            try:
                written = job.run(changed)
                break
            except RaggedError as error:
                # The footers' counts allowed it, the rows do not: this column stays as it is.
                del changed[error.column]
    if written.rows != catalog.num_rows:
        raise RunFailedError(f"{written.rows:,} rows were written of {catalog.num_rows:,}; do not use {target}")
    return {
        "source": source,
        "target": target,
        "rows": written.rows,
        "files": {"before": len(catalog.files), "after": written.files},
        "row_groups": {"before": catalog.num_units, "after": written.row_groups},
        "bytes": {"before": sum(file.size for file in catalog.files), "after": written.bytes},
        "lists": dict(changed),
        "seconds": round(time.monotonic() - begin, 3),
    }


def regroup(batches: Iterator[pa.RecordBatch], target_bytes: float) -> Iterator[pa.Table]:
    """The same rows as tables of about `target_bytes` in memory: to within half a batch, but for the last."""
    held: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        if held and size + batch.nbytes / 2 > target_bytes:
            yield pa.Table.from_batches(held)
            held, size = [], 0
        held.append(batch)
        size += batch.nbytes
    if held:
        yield pa.Table.from_batches(held)


@dataclass
class _Written:
    rows: int = 0
    files: int = 0
    row_groups: int = 0
    bytes: int = 0


@dataclass
class _Job:
    """One rewrite: what is read, and how it is written."""

    source: RowStream
    target: str
    group_bytes: float
    file_bytes: float
    compression: str
    packed: bool
    progress: Progress | None
    _done: int = field(default=0, init=False)

    def run(self, changed: dict[str, int]) -> _Written:
        self._done = 0
        written = _Written()
        try:
            with new_directory(self.target) as open_part:
                for directory, units in self.source.directories():
                    with self._read(units) as pieces:
                        groups = regroup(self._counted(pieces, changed), self.group_bytes)
                        self._write(directory, groups, open_part, written)
                # A batch's share of the bytes was rounded.
                self._report(self.source.num_bytes)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"{self.target}: the disk is full after {written.bytes:,} bytes; free space or give another place"
                ) from error
            raise
        return written

    def _read(self, units: Sequence[int]) -> Prefetcher[Piece]:
        """Read and decoded in a thread, while what came before is compressed and written."""
        return Prefetcher(lambda: self.source.pieces(units, self.group_bytes / _BATCHES), _BATCHES // 2)

    def _counted(self, pieces: Iterator[Piece], changed: dict[str, int]) -> Iterator[pa.RecordBatch]:
        for piece in pieces:
            yield reshape(piece.batch, changed, self.packed)
            self._report(self._done + piece.bytes)

    def _report(self, done: int) -> None:
        self._done = done
        if self.progress:
            self.progress(done, self.source.num_bytes)

    def _write(self, directory: str, groups: Iterator[pa.Table], open_part: OpenPart, written: _Written) -> None:
        """Files of one directory, each closed when it is full."""
        following = next(groups, None)
        while following is not None:
            name = f"{directory}/{PART.format(written.files)}".lstrip("/")
            with ExitStack() as stack:
                out = stack.enter_context(open_part(name))
                writer = stack.enter_context(self._writer(out, following.schema))
                while following is not None and out.tell() < self.file_bytes:
                    writer.write_table(following, row_group_size=following.num_rows)
                    written.rows += following.num_rows
                    written.row_groups += 1
                    following = next(groups, None)
                writer.close()
                written.bytes += out.tell()
            written.files += 1

    def _writer(self, out: Any, schema: pa.Schema) -> pq.ParquetWriter:
        return pq.ParquetWriter(out, schema, compression=self.compression)


# ---- checks ----


def _check_settings(row_group_mb: float, file_mb: float, compression: str) -> None:
    faults = []
    if row_group_mb <= 0:
        faults.append(f"--row-group-mb is {row_group_mb:g}; it must be more than 0")
    if file_mb <= 0:
        faults.append(f"--file-mb is {file_mb:g}; it must be more than 0")
    if compression not in COMPRESSIONS:
        faults.append(f"--compression is {compression!r}; it can be {', '.join(COMPRESSIONS)}")
    if faults:
        raise UserError("; ".join(faults))


def _check_apart(source: str, target: str) -> None:
    """Neither may be within the other: one would be read as part of the other later."""
    src, dst = (open_store(url) for url in (source, target))
    a, b = (f"{store.url.rstrip('/')}/" for store in (src, dst))
    if a.startswith(b) or b.startswith(a):
        raise DataError(f"DST {target} and SRC {source} are one within the other; give a directory beside it")
    if target.endswith((".parquet", ".parq")):
        raise DataError(f"DST {target} is the name of a file; give that of a directory, which will hold the files")


def _check_space(footers: Iterator[pq.FileMetaData], target: str, columns: set[str]) -> None:
    free = free_bytes(target)
    if free is None:
        return
    least = sum(_least_bytes(footer, columns) for footer in footers)
    if least > free:
        raise StoreError(
            f"{target}: {free / _MIB:,.0f} MiB are free, and even well compressed the data needs more than "
            f"{least / _MIB:,.0f} MiB; free space or give another place"
        )


def _least_bytes(footer: pq.FileMetaData, columns: set[str]) -> float:
    groups = map(footer.row_group, range(footer.num_row_groups))
    chunks = [c for group in groups for c in map(group.column, range(group.num_columns)) if top(c) in columns]
    total = sum(int(c.total_compressed_size) for c in chunks)
    plain = sum(int(c.total_compressed_size) for c in chunks if c.compression == "UNCOMPRESSED")
    return _LEAST_PLAIN * plain + _LEAST * (total - plain)
