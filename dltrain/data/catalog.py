"""The catalog: what a Parquet dataset holds, from its footers alone.

    catalog = read_catalog("s3://bucket/digits/train", columns=("image", "label"))
    catalog.unit_rows                      # rows of each unit, ready for an `Order`
    Catalog.from_table(catalog.to_table())

A unit is one row group with at least one row. Units are listed in the order of file names, then of row
groups, so that the same files give the same catalog everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dltrain.data.files import DataFile, Files, below, list_files
from dltrain.data.filters import Bounds, Condition, parse_filter
from dltrain.data.footers import compress, parse_footer, read_footer, read_tail
from dltrain.data.lists import DTYPE
from dltrain.data.packing import Pack, pack
from dltrain.data.partitions import partition_schema, values_of
from dltrain.errors import DataError
from dltrain.store import explain, filesystem

__all__ = ["Catalog", "DataFile", "check_columns", "list_files", "read_catalog", "read_footer"]

_FOOTER_THREADS = 16
_NO_COLUMNS = pa.schema([])
# A list per dataset, since a plan has a line for each.
_UNIT = pa.struct([(name, pa.int64()) for name in ("file", "row_group", "rows", "bytes")] + [("kept", pa.binary())])


@dataclass(frozen=True)
class Catalog:
    """A dataset's files and units.

    `units` has the columns file (index into `files`), row_group, rows (that there are to train on) and bytes (on the
    wire, of the columns that are read), one line per unit; where there is a filter also kept: which of the row group's
    rows stay, as compressed bits, null where all do.

    Attributes:
        schema: of the rows as they are read: packed, and with the columns of the paths.
        partitions: those columns.
        filter: the conditions, as JSON.
        footers: the files' footers, compressed; not part of what is stored.
    """

    url: str
    files: Sequence[DataFile]
    schema: pa.Schema
    units: pa.Table
    partitions: pa.Schema = _NO_COLUMNS
    filter: str = ""
    pack: Pack | None = None
    footers: bytes = field(default=b"", repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", Files.of(self.files))

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

    # ---- how a row group becomes a unit's rows ----

    def stored_columns(self, columns: Sequence[str] | None) -> list[str] | None:
        """Those that lie in the files, of the columns that are wanted; None: all of them."""
        if self.pack:
            return [self.pack.column]
        if columns is None:
            return None
        in_files = [c for c in columns if c not in self.partitions.names]
        # At least one, which says how many rows there are.
        return in_files or [c for c in self.schema.names if c not in self.partitions.names][:1]

    def rows_of(self, unit: int, table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
        """The rows to train on, of what a unit's row group holds: filtered, with the path's columns, packed."""
        kept = self.units["kept"][unit].as_py() if "kept" in self.units.column_names else None
        if kept is not None:
            table = table.filter(pa.array(unpack_bits(kept, table.num_rows)))
        if self.pack:
            return pack(table, self.pack.column, self.pack.length, int(self.unit_rows[unit]))
        if len(self.partitions):
            file, _ = self.locate(unit)
            for name, value in values_of(file.path, self.partitions).items():
                column = pa.repeat(pa.scalar(value, self.partitions.field(name).type), table.num_rows)
                table = table.append_column(name, column)
        names = table.column_names if columns is None else list(columns)
        # Without what two writers may say differently of the same rows: whether values may be missing, and notes, but
        # for the type of packed lists.
        types = {name: (table.schema.field(name).metadata or {}).get(DTYPE) for name in names}
        fields = [pa.field(n, table[n].type, metadata={DTYPE: t} if t else None) for n, t in types.items()]
        return pa.table([table[name] for name in names], pa.schema(fields))

    # ---- what is stored ----

    @cached_property
    def digest(self) -> str:
        """Of everything that decides which rows there are: 16 hex digits."""
        digest = hashlib.sha256()
        for part in self._identity():
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()[:16]

    def _identity(self) -> Iterator[bytes]:
        yield from Files.of(self.files).identity()
        for name in ("file", "row_group", "rows"):
            yield self.units[name].to_numpy().astype("<i8").tobytes()
        yield json.dumps([self.schema.names, self.partitions.names, self.filter, self.pack]).encode()

    def to_table(self) -> pa.Table:
        """As one line of a table; several catalogs' may be laid one after the other."""
        columns = [
            self.units[f.name].combine_chunks().cast(f.type)
            if f.name in self.units.column_names
            else pa.nulls(self.num_units, f.type)
            for f in _UNIT
        ]
        return pa.table(
            {
                "url": [self.url],
                "schema": pa.array([self.schema.serialize().to_pybytes()], pa.binary()),
                "partitions": pa.array([self.partitions.serialize().to_pybytes()], pa.binary()),
                "filter": [self.filter],
                "pack": [json.dumps(self.pack)],
                "files": _one_list(Files.of(self.files).columns),
                "units": _one_list(pa.StructArray.from_arrays(columns, fields=list(_UNIT))),
            }
        )

    @classmethod
    def from_table(cls, table: pa.Table) -> Catalog:
        """The inverse of `to_table`, of one line."""
        line = {name: table[name][0] for name in table.column_names}
        schema, partitions = (pa.ipc.read_schema(pa.BufferReader(line[n].as_py())) for n in ("schema", "partitions"))
        units = pa.Table.from_struct_array(line["units"].values)
        if units["kept"].null_count == units.num_rows:
            units = units.drop_columns("kept")
        packed = json.loads(line["pack"].as_py())
        return cls(
            line["url"].as_py(),
            Files(line["files"].values),
            schema,
            units,
            partitions,
            line["filter"].as_py(),
            Pack(*packed) if packed else None,
        )


def _one_list(items: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array([0, len(items)], pa.int64()), items)


def pack_bits(keep: npt.NDArray[np.bool_]) -> bytes:
    """Which rows stay, as a few bytes."""
    packed: bytes = pa.compress(np.packbits(keep).tobytes(), "zstd", asbytes=True)
    return packed


def unpack_bits(kept: bytes, num_rows: int) -> npt.NDArray[np.bool_]:
    """The inverse of `pack_bits`."""
    raw = pa.decompress(kept, -(-num_rows // 8), "zstd", asbytes=True)
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=num_rows).astype(np.bool_)


# ---- reading footers ----


class _Facts(NamedTuple):
    """What one footer says: its schema, its bytes as they are kept, and a line per row group that has rows.

    lines: (groups, 5): row group, rows, bytes, values of the column that is counted, conditions that the rows must be
    asked about (as bits).
    """

    schema: pa.Schema
    footer: bytes
    lines: npt.NDArray[np.int64]


class _Asked(NamedTuple):
    """What is wanted of each footer. columns: whose bytes count, None: all; counted: whose values are counted."""

    columns: set[str] | None
    counted: str | None
    conditions: tuple[Condition, ...]
    partitions: pa.Schema


def read_catalog(
    url: str,
    columns: Sequence[str] | None = None,
    field: str = "data",
    *,
    filter: Sequence[Sequence[Any]] = (),
    counted: str | None = None,
) -> Catalog:
    """Reads the footers of a directory, glob or file of Parquet, 16 at a time.

    Args:
        columns: those that will be read (sizes count only them); None means all.
        field: the spec's field that named the url, for messages.
        filter: conditions; for each row group units["asked"] has those, as bits, that its rows must be asked about:
            0 where all rows meet all of them, -1 where none can meet one.
        counted: a column of lists whose numbers are counted, as units["values"].

    Raises:
        DataError: nothing there, no rows, not Parquet, schemas that differ, or a column missing.
        StoreError: the storage can't be reached.
    """
    with explain(url):
        fs, path = filesystem(url)
        files = list_files(fs, path, url, field)
        partitions = partition_schema([below(f.path, path) for f in files], url, field)
        # The first file's types decide what a filter's values are.
        conditions = _conditions(fs, files[0], partitions, filter, url) if filter else ()
        asked = _Asked(set(columns) if columns is not None else None, counted, conditions, partitions)
        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            facts = list(pool.map(lambda f: _read_facts(fs, f, asked), files))
    schema, partitions = _whole_schema(facts[0].schema, partitions)
    _check_there(columns, schema, url, field)
    used = None if columns is None else [*columns, *(c.column for c in conditions)]
    _check_same(files, facts, used, url, field)
    units = _units(facts, counted is not None, bool(conditions))
    if units.num_rows == 0:
        raise DataError(f"{field}: {url} holds {len(files)} Parquet file(s) but no rows; there is nothing to train on")
    located, footers = _lay_out(files, facts)
    text = json.dumps(filter, default=str) if filter else ""
    return Catalog(url, located, schema, units, partitions, text, footers=footers)


def _whole_schema(in_files: pa.Schema, partitions: pa.Schema) -> tuple[pa.Schema, pa.Schema]:
    """Of a dataset's rows, and of the columns that its paths alone have: those in the files win."""
    only = pa.schema([f for f in partitions if f.name not in in_files.names])
    return pa.schema([*in_files, *only]), only


def _conditions(
    fs: Any, file: DataFile, partitions: pa.Schema, filter: Sequence[Sequence[Any]], url: str
) -> tuple[Condition, ...]:
    return parse_filter(filter, _whole_schema(read_footer(fs, file).schema.to_arrow_schema(), partitions)[0], url)


def _read_facts(fs: Any, file: DataFile, asked: _Asked) -> _Facts:
    raw = read_tail(fs, file)
    footer = parse_footer(raw, file)
    names = [footer.schema.column(i).path.split(".") for i in range(footer.num_columns)]
    values = values_of(file.path, asked.partitions)
    lines = [_line(footer.row_group(g), g, names, values, asked) for g in range(footer.num_row_groups)]
    with_rows = [line for line in lines if line[1]]
    schema = footer.schema.to_arrow_schema()
    return _Facts(schema, compress(raw), np.array(with_rows, np.int64).reshape(-1, 5))


def _line(
    meta: pq.RowGroupMetaData, group: int, names: Sequence[Sequence[str]], values: Mapping[str, Any], asked: _Asked
) -> tuple[int, ...]:
    chunks = list(zip(names, map(meta.column, range(len(names))), strict=True))
    wanted = (c for name, c in chunks if asked.columns is None or name[0] in asked.columns)
    num_bytes = sum(c.total_compressed_size for c in wanted)
    num_values = sum(_num_values(c) for name, c in chunks if name[0] == asked.counted)
    compared = {c.column for c in asked.conditions}
    bounds = {name[0]: _bounds(c) for name, c in chunks if len(name) == 1 and name[0] in compared}
    # A column of the file wins over the path's.
    for name in values.keys() - {name[0] for name in names}:
        value = values[name]
        bounds[name] = Bounds(value, value, 0 if value is not None else meta.num_rows, meta.num_rows)
    return group, meta.num_rows, num_bytes, num_values, _open_conditions(asked.conditions, bounds)


def _num_values(chunk: pq.ColumnChunkMetaData) -> int:
    """At most so many there are; a list that is empty or missing has a place in the file as well."""
    found = chunk.statistics
    return int(chunk.num_values - (found.null_count if found and found.has_null_count else 0))


def _bounds(chunk: pq.ColumnChunkMetaData) -> Bounds:
    found = chunk.statistics
    if found is None:
        return Bounds(None, None, None, chunk.num_values)
    try:
        lo, hi = (found.min, found.max) if found.has_min_max else (None, None)
    except ValueError:
        # A time in nanoseconds, for which Python has no word.
        lo = hi = None
    return Bounds(lo, hi, found.null_count if found.has_null_count else None, chunk.num_values)


def _open_conditions(conditions: Sequence[Condition], bounds: Mapping[str, Bounds]) -> int:
    """Those that the rows must be asked about, as bits; -1 where no row can meet one of them."""
    bits = 0
    for i, condition in enumerate(conditions):
        known = bounds.get(condition.column)
        verdict = condition.verdict(known) if known else None
        if verdict is False:
            return -1
        bits |= (verdict is None) << i
    return bits


def _units(facts: Sequence[_Facts], counted: bool, asked: bool) -> pa.Table:
    file = np.repeat(np.arange(len(facts)), [len(f.lines) for f in facts])
    lines = np.concatenate([f.lines for f in facts])
    columns = dict(zip(("row_group", "rows", "bytes", "values", "asked"), lines.T, strict=True))
    if not counted:
        del columns["values"]
    if not asked:
        del columns["asked"]
    return pa.table({"file": file, **{name: np.ascontiguousarray(line) for name, line in columns.items()}})


def _lay_out(files: Sequence[DataFile], facts: Sequence[_Facts]) -> tuple[tuple[DataFile, ...], bytes]:
    """The files with the places of their footers, and the footers end to end."""
    sizes = [len(f.footer) for f in facts]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    located = (replace(f, footer_at=at, footer_bytes=size) for f, at, size in zip(files, starts, sizes, strict=True))
    return tuple(located), b"".join(f.footer for f in facts)


def check_columns(catalog: Catalog, columns: Iterable[str], who: str) -> None:
    """Raises DataError naming the columns that `who` needs and the dataset lacks."""
    missing = [c for c in columns if c not in catalog.schema.names]
    if missing:
        raise DataError(
            f"{catalog.url} has no column {', '.join(map(repr, missing))}, which {who} needs; "
            f"it has {', '.join(map(repr, catalog.schema.names))}"
        )


def _check_there(columns: Sequence[str] | None, schema: pa.Schema, url: str, field: str) -> None:
    missing = [c for c in columns or () if c not in schema.names]
    if missing:
        raise DataError(
            f"{field}: {url} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, schema.names))}"
        )


def _check_same(
    files: Sequence[DataFile],
    facts: Sequence[_Facts],
    columns: Sequence[str] | None,
    url: str,
    field: str,
) -> None:
    """Raises DataError when the files differ in a column that is read."""
    first = facts[0].schema
    for file, other in zip(files[1:], facts[1:], strict=True):
        for name in columns if columns is not None else sorted({*first.names, *other.schema.names}):
            a, b = _type(first, name), _type(other.schema, name)
            if a != b:
                raise DataError(
                    f"{field}: the files of {url} differ in their schema: column {name!r} is {a} in "
                    f"{files[0].path} and {b} in {file.path}; rewrite them alike, or name the columns to read"
                )


def _type(schema: pa.Schema, name: str) -> str:
    return str(schema.field(name).type) if name in schema.names else "missing"
