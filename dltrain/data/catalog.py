"""The catalog: what a Parquet dataset holds, from its footers alone.

    catalog = read_catalog("s3://bucket/digits/train", columns=("image", "label"))
    catalog.unit_rows                      # rows of each unit, ready for an `Order`
    Catalog.from_bytes(catalog.to_bytes())

A unit is one row group with at least one row. Units are listed in the order of file names, then of row
groups, so that the same files give the same catalog everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dltrain.errors import DataError
from dltrain.store import explain, filesystem

__all__ = ["UNFINISHED", "Catalog", "DataFile", "check_columns", "list_files", "read_catalog", "read_footer"]

# A directory that has this file is still being written.
UNFINISHED = "_dltrain-unfinished"

_TAIL_BYTES = 64 * 1024
_FOOTER_THREADS = 16
_SUFFIXES = (".parquet", ".parq")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of the dataset: its path within the filesystem, size in bytes, and version tag."""

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class Catalog:
    """A dataset's files and units.

    `units` has the columns file (index into `files`), row_group, rows and bytes (on the wire, of the
    columns that are read), one line per unit.
    """

    url: str
    files: tuple[DataFile, ...]
    schema: pa.Schema
    units: pa.Table

    @cached_property
    def unit_rows(self) -> npt.NDArray[np.int64]:
        """Rows of each unit, (M,)."""
        return np.asarray(self.units["rows"].to_numpy(), np.int64)

    @property
    def num_units(self) -> int:
        """M."""
        return int(self.units.num_rows)

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.unit_rows.sum())

    @property
    def num_bytes(self) -> int:
        """Bytes on the wire of one pass over the data."""
        return int(self.units["bytes"].to_numpy().sum())

    def locate(self, unit: int) -> tuple[DataFile, int]:
        """The file and row group of a unit."""
        return self.files[self.units["file"][unit].as_py()], self.units["row_group"][unit].as_py()

    @property
    def digest(self) -> str:
        """Of everything that decides which rows there are: 16 hex digits."""
        parts = [[f.path, f.size, f.etag] for f in self.files]
        columns = [self.units[c].to_pylist() for c in ("file", "row_group", "rows")]
        text = json.dumps([parts, columns, self.schema.names])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_bytes(self) -> bytes:
        """As an Arrow IPC file; the files and the schema are in its metadata."""
        meta = {
            "url": self.url,
            "files": json.dumps([[f.path, f.size, f.etag] for f in self.files]),
            "schema": self.schema.serialize().to_pybytes().hex(),
        }
        table = self.units.replace_schema_metadata(meta)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    @classmethod
    def from_bytes(cls, raw: bytes) -> Catalog:
        """The inverse of `to_bytes`."""
        table = pa.ipc.open_file(pa.BufferReader(raw)).read_all()
        meta = table.schema.metadata
        files = tuple(DataFile(*entry) for entry in json.loads(meta[b"files"]))
        schema = pa.ipc.read_schema(pa.BufferReader(bytes.fromhex(meta[b"schema"].decode())))
        return cls(meta[b"url"].decode(), files, schema, table.replace_schema_metadata(None))


def read_catalog(url: str, columns: Sequence[str] | None = None, field: str = "data") -> Catalog:
    """Reads the footers of a directory, glob or file of Parquet, 16 at a time.

    Args:
        columns: those that will be read (sizes count only them); None means all.
        field: the spec's field that named the url, for messages.

    Raises:
        DataError: nothing there, no rows, not Parquet, schemas that differ, or a column missing.
        StoreError: the storage can't be reached.
    """
    with explain(url):
        fs, path = filesystem(url)
        files = list_files(fs, path, url, field)
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            footers = list(pool.map(lambda f: read_footer(fs, f), files))
    schema = _one_schema(files, [footer.schema.to_arrow_schema() for footer in footers], columns, url, field)
    units = _units(footers, set(columns or schema.names))
    if units.num_rows == 0:
        raise DataError(f"{field}: {url} holds {len(files)} Parquet file(s) but no rows; there is nothing to train on")
    return Catalog(url, tuple(files), schema, units)


def read_footer(fs: Any, file: DataFile) -> pq.FileMetaData:
    """A file's Parquet footer, with one ranged read (two if it is over 64 KiB)."""
    tail = fs.cat_file(file.path, start=max(0, file.size - _TAIL_BYTES), end=file.size)
    try:
        if tail[-4:] != b"PAR1":
            raise pa.ArrowInvalid(f"it ends in {tail[-4:]!r} instead of b'PAR1'")
        need = int.from_bytes(tail[-8:-4], "little") + 8
        if need > len(tail):
            tail = fs.cat_file(file.path, start=max(0, file.size - need), end=file.size)
        return pq.read_metadata(pa.BufferReader(tail))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.path} ({file.size:,} bytes) is not a Parquet file: {error}") from None


def check_columns(catalog: Catalog, columns: Iterable[str], who: str) -> None:
    """Raises DataError naming the columns that `who` needs and the dataset lacks."""
    missing = [c for c in columns if c not in catalog.schema.names]
    if missing:
        raise DataError(
            f"{catalog.url} has no column {', '.join(map(repr, missing))}, which {who} needs; "
            f"it has {', '.join(map(repr, catalog.schema.names))}"
        )


def list_files(fs: Any, path: str, url: str, field: str) -> list[DataFile]:
    """The Parquet files of a directory, glob or file, sorted.

    Raises:
        DataError: there are none, or they are still being written.
    """
    found, others = _find(fs, path)
    if not found:
        seen = f"{others} other file(s) there" if others else "nothing there"
        raise DataError(f"{field}: found no Parquet at {url} ({seen}); give a directory, glob or file of .parquet")
    return [DataFile(name, int(info["size"]), _etag(info)) for name, info in sorted(found.items())]


def _find(fs: Any, path: str) -> tuple[dict[str, Any], int]:
    """The files to read, and how many others were passed over."""
    if any(c in path for c in "*?["):
        return {k: v for k, v in fs.glob(path, detail=True).items() if v["type"] == "file"}, 0
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return {}, 0
    if info["type"] == "file":
        return {path: info}, 0
    everything = fs.find(path, detail=True)
    if any(name.endswith(f"/{UNFINISHED}") for name in everything):
        raise DataError(
            f"{path} is not complete: `dltrain data rewrite` is writing it, or was interrupted; let it finish, or "
            "run it again"
        )
    found = {k: v for k, v in everything.items() if k.endswith(_SUFFIXES) and not _hidden(k[len(path) :])}
    return found, len(everything) - len(found)


def _hidden(relative: str) -> bool:
    """Writers leave _SUCCESS, _temporary/ and .crc files beside the data."""
    return any(part.startswith(("_", ".")) for part in relative.strip("/").split("/"))


def _etag(info: Mapping[str, Any]) -> str:
    tag = info.get("ETag") or info.get("etag") or info.get("mtime") or ""
    return str(tag).strip('"')


def _one_schema(
    files: Sequence[DataFile], schemas: Sequence[pa.Schema], columns: Sequence[str] | None, url: str, field: str
) -> pa.Schema:
    first = schemas[0].remove_metadata()
    names = list(columns) if columns is not None else first.names
    missing = [c for c in names if c not in first.names]
    if missing:
        raise DataError(
            f"{field}: {url} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, first.names))}"
        )
    for file, schema in zip(files[1:], schemas[1:], strict=True):
        known = names if columns is not None else sorted({*names, *schema.names})
        for name in known:
            a, b = _type(first, name), _type(schema, name)
            if a != b:
                raise DataError(
                    f"{field}: the files of {url} differ in their schema: column {name!r} is {a} in "
                    f"{files[0].path} and {b} in {file.path}; rewrite them alike, or name the columns to read"
                )
    return first


def _type(schema: pa.Schema, name: str) -> str:
    return str(schema.field(name).type) if name in schema.names else "missing"


def _units(footers: Sequence[pq.FileMetaData], columns: set[str]) -> pa.Table:
    rows: list[tuple[int, int, int, int]] = []
    for index, footer in enumerate(footers):
        for group in range(footer.num_row_groups):
            meta = footer.row_group(group)
            if meta.num_rows:
                rows.append((index, group, meta.num_rows, _group_bytes(meta, columns)))
    # lines: (M, 4)
    lines = np.array(rows, np.int64).reshape(-1, 4)
    return pa.table(dict(zip(("file", "row_group", "rows", "bytes"), lines.T, strict=True)))


def _group_bytes(meta: pq.RowGroupMetaData, columns: set[str]) -> int:
    chunks = (meta.column(i) for i in range(meta.num_columns))
    return sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
