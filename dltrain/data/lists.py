"""Lists of numbers that have one length in every row, as types of a fixed size.

    even_lists(footers, schema)                  # {"tokens": 2048}: what the footers' counts allow
    reshape(batch, {"tokens": 2048}, packed=True)

Packed lists are bytes of a fixed size, which Parquet keeps without a level for every number; the field's metadata
names the numbers' type, so that a batch has them as a tensor (rows, length) again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["DTYPE", "RaggedError", "even_lists", "is_number_list", "reshape"]

DTYPE = b"dltrain.dtype"
# They describe the columns as they were.
_STALE = (b"huggingface", b"pandas")


class RaggedError(Exception):
    """A column's lists are not of one length after all, or some are missing."""

    def __init__(self, column: str) -> None:
        self.column = column
        super().__init__(f"the lists of {column!r} are not of one length")


def is_number_list(kind: pa.DataType) -> bool:
    """Whether it is a list of any length of integers or floats."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return bool(pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))


def even_lists(footers: Iterable[pq.FileMetaData], schema: pa.Schema) -> dict[str, int]:
    """Columns whose lists could all be of one length, by the numbers of values in each row group."""
    found: dict[str, set[float]] = {field.name: set() for field in schema if is_number_list(field.type)}
    for footer in footers:
        for group in (footer.row_group(g) for g in range(footer.num_row_groups)):
            for chunk in (group.column(i) for i in range(group.num_columns)):
                name = chunk.path_in_schema.split(".")[0]
                if name in found and group.num_rows:
                    found[name].add(chunk.num_values / group.num_rows)
    lengths = {name: next(iter(ratios)) for name, ratios in found.items() if len(ratios) == 1}
    return {name: int(length) for name, length in lengths.items() if length == int(length)}


def reshape(batch: pa.RecordBatch, lengths: Mapping[str, int], packed: bool) -> pa.RecordBatch:
    """The batch with these columns as fixed-size lists, or packed.

    Raises:
        RaggedError: a list is missing or of another length, or a number is missing where they are to be packed.
    """
    if not lengths:
        return batch
    columns, fields = [], []
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if field.name in lengths:
            field, column = _fixed(field, column, lengths[field.name], packed)
        columns.append(column)
        fields.append(field)
    metadata = {k: v for k, v in (batch.schema.metadata or {}).items() if k not in _STALE}
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields, metadata))


def _fixed(field: pa.Field, column: Any, length: int, packed: bool) -> tuple[pa.Field, Any]:
    offsets = column.offsets.to_numpy()
    values = column.flatten()
    if column.null_count or not np.all(np.diff(offsets) == length) or (packed and values.null_count):
        raise RaggedError(field.name)
    if not packed:
        kind = pa.list_(field.type.value_field, length)
        return field.with_type(kind), pa.FixedSizeListArray.from_arrays(values, type=kind)
    dtype = np.dtype(values.type.to_pandas_dtype())
    raw = values.buffers()[1].slice(values.offset * dtype.itemsize, len(values) * dtype.itemsize)
    kind = pa.binary(length * dtype.itemsize)
    metadata = {**(field.metadata or {}), DTYPE: dtype.name.encode()}
    packed_field = field.with_type(kind).with_metadata(metadata)
    return packed_field, pa.FixedSizeBinaryArray.from_buffers(kind, len(column), [None, raw])
