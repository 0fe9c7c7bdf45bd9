"""A dataset as a run reads it: its catalog, with the filter's rows found and the packed rows counted.

    catalog = read_dataset("s3://bucket/text", filter=[["lang", "==", "de"]], pack=Pack("tokens", 2048), tell=print)
    catalog.num_rows                       # packed rows of what the filter lets through

Row groups that statistics decide about are not read. Of the others the filter's columns are, once, when a run is
planned: the plan holds which rows stay, so that an epoch has the same number of rows ever after.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dltrain.data.catalog import Catalog, pack_bits, read_catalog
from dltrain.data.filters import Condition, keep_rows, parse_filter
from dltrain.data.packing import Pack, num_chunks, packed_schema
from dltrain.data.reader import UnitReader
from dltrain.errors import DataError

__all__ = ["Filter", "read_dataset"]

_THREADS = 8
_AHEAD = 32
Filter = Sequence[Sequence[Any]]


def read_dataset(
    url: str,
    columns: Sequence[str] | None = None,
    field: str = "data",
    *,
    filter: Filter = (),
    pack: Pack | None = None,
    tell: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Catalog:
    """What there is to read, ready for an order.

    Args:
        columns: that will be read; None means all. Of a packed dataset it is the packed column.
        field: the spec's field that named the url, for messages.
        filter: conditions [column, op, value] that rows must meet.
        pack: sequences that are laid end to end.
        tell: gets a sentence about what a filter keeps.
        progress: gets the row groups that a filter has read, and how many it must.

    Raises:
        DataError: nothing there, no rows, not Parquet, schemas that differ, a column missing or of another type, or a
            filter that lets nothing through.
        StoreError: the storage can't be reached.
    """
    counted = pack.column if pack else None
    read = [counted] if counted else columns
    catalog = read_catalog(url, read, field, filter=filter, counted=counted)
    schema = packed_schema(catalog.schema, *pack) if pack else catalog.schema
    if filter:
        catalog = _filtered(catalog, filter, counted, field, tell, progress)
    units = catalog.units
    if pack:
        rows = num_chunks(units["values"].to_numpy(), pack.length)
        units = units.set_column(units.column_names.index("rows"), "rows", pa.array(rows))
        units = units.filter(pc.greater(units["rows"], 0)).drop_columns("values")
    return replace(catalog, units=units, schema=schema, pack=pack)


class _Kept(NamedTuple):
    """Of a row group: rows that stay, which of them (None: all), and values of the counted column in them."""

    rows: int
    bits: bytes | None
    values: int


def _filtered(
    catalog: Catalog,
    filter: Filter,
    counted: str | None,
    field: str,
    tell: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Catalog:
    """The catalog of the rows that stay."""
    units, conditions = catalog.units, parse_filter(filter, catalog.schema, catalog.url)
    asked = units["asked"].to_numpy()
    open_units = np.flatnonzero(asked > 0)
    # rows, values: (M,); bits: M
    rows = units["rows"].to_numpy().copy()
    bits: list[bytes | None] = [None] * len(asked)
    values = units["values"].to_numpy().copy() if counted else None
    total = int(rows.sum())
    rows[asked < 0] = 0
    for unit, kept in zip(open_units.tolist(), _scan(catalog, open_units, conditions, counted, progress), strict=True):
        rows[unit], bits[unit] = kept.rows, kept.bits
        if values is not None:
            values[unit] = kept.values
    tell(
        f"{field}: the filter keeps {int(rows.sum()):,} of {total:,} rows in {catalog.num_units:,} row groups, "
        f"of which {len(open_units):,} had to be read"
    )
    if not rows.any():
        shown = json.dumps([list(item) for item in filter], default=str)
        raise DataError(f"{field}: no row of {catalog.url} meets data.filter {shown}; nothing is left to read")
    found = {"file": units["file"], "row_group": units["row_group"], "rows": rows, "bytes": units["bytes"]}
    found |= {"values": values} if counted else {}
    found["kept"] = pa.array(bits, pa.binary())
    return replace(catalog, units=pa.table(found).filter(pa.array(rows > 0)))


def _scan(
    catalog: Catalog,
    units: Any,
    conditions: Sequence[Condition],
    counted: str | None,
    progress: Callable[[int, int], None],
) -> Iterator[_Kept]:
    """What stays of each unit, in their order, read by a few threads."""
    columns = list(dict.fromkeys([*(c.column for c in conditions), *([counted] if counted else [])]))
    reader = UnitReader(catalog, columns, keep_bytes=0)
    asked = catalog.units["asked"].to_numpy()

    def scan(at: int) -> _Kept:
        if at + _AHEAD < len(units):
            reader.start(int(units[at + _AHEAD]), float(at + _AHEAD))
        unit = int(units[at])
        some = [c for i, c in enumerate(conditions) if asked[unit] >> i & 1]
        return _keep(reader.read(unit), some, counted)

    try:
        for at in range(min(_AHEAD, len(units))):
            reader.start(int(units[at]), float(at))
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="dltrain-scan") as pool:
            for done, kept in enumerate(pool.map(scan, range(len(units))), 1):
                progress(done, len(units))
                yield kept
    finally:
        reader.close()


def _keep(table: pa.Table, conditions: Sequence[Condition], counted: str | None) -> _Kept:
    keep = keep_rows(conditions, table)
    values = 0
    if counted:
        lengths = pc.list_value_length(table[counted].filter(pa.array(keep)))
        values = pc.sum(lengths).as_py() or 0
    return _Kept(int(keep.sum()), None if keep.all() else pack_bits(keep), values)
