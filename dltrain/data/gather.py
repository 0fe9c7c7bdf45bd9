"""From decoded units to batches: columns of a window, and the one copy of the rows that a batch takes from them.

columns = window_columns(table, perm)                       # item i is row perm[i] of the table
rows = gather(table.schema, [(columns, range(0, 16)), ...]) # pa.RecordBatch of these items, in this order

Values of a fixed size are copied into memory of the batch's own, which `columns.tensors` takes over as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dltrain.data.memory import offer, take_over

__all__ = ["Column", "Pick", "gather", "leaf", "window_columns"]

I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
# Smaller values are shuffled when their window is loaded: picking them one by one takes longer than a second copy.
_LARGE_BYTES = 2048


@dataclass(frozen=True)
class Column:
    """A column of a window's items.

    Attributes:
        chunks: its values; raw: the same as (rows, bytes), for values of a fixed size of which none is missing.
        chunk, row: item -> which chunk, and which row of it; None where items lie in order in the only chunk.
    """

    kind: pa.DataType
    chunks: list[pa.Array]
    raw: list[U8] | None
    chunk: I64 | None = None
    row: I64 | None = None

    def arrays(self, items: range) -> list[pa.Array]:
        """The items' values, end to end."""
        if self.chunk is None and items.step == 1:
            return [self.chunks[0].slice(items.start, len(items))]
        return [self.chunks[chunk].slice(row, 1) for chunk, row in self._places(items)]

    def _places(self, items: range) -> list[tuple[int, int]]:
        if self.chunk is None or self.row is None:
            return [(0, item) for item in items]
        some = slice(items.start, items.stop, items.step)
        return list(zip(self.chunk[some].tolist(), self.row[some].tolist(), strict=True))


Pick = tuple[Sequence[Column], range]


def window_columns(table: pa.Table, perm: I64) -> list[Column]:
    """A window's columns; large values are left where they were decoded."""
    batches = table.to_batches()
    edges = np.cumsum([0, *(batch.num_rows for batch in batches)])
    chunk = np.searchsorted(edges, perm, side="right") - 1
    row = perm - edges[chunk]
    order = pa.array(perm)
    columns = []
    for i, field in enumerate(table.schema):
        chunks = [batch.column(i) for batch in batches]
        small = sum(c.nbytes for c in chunks) <= _LARGE_BYTES * table.num_rows
        whole = pa.chunked_array(chunks).combine_chunks() if small else None
        if isinstance(whole, pa.Array):
            taken = whole.take(order)
            columns.append(Column(field.type, [taken], _raw([taken])))
        else:
            columns.append(Column(field.type, chunks, _raw(chunks), chunk, row))
    return columns


def gather(schema: pa.Schema, picks: Sequence[Pick]) -> pa.RecordBatch:
    """The picked items, one after the other: the one copy between decoding and a batch."""
    num_rows = sum(len(items) for _, items in picks)
    arrays = [
        _join(field.type, num_rows, [(columns[i], items) for columns, items in picks]) for i, field in enumerate(schema)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _join(kind: pa.DataType, num_rows: int, parts: Sequence[tuple[Column, range]]) -> pa.Array:
    # One call for all rows: whoever lets go of the interpreter for each waits for it as often while others use it.
    joined = pa.concat_arrays([array for column, items in parts for array in column.arrays(items)])
    if any(column.raw is None or column.kind != kind for column, _ in parts):
        return joined
    values = leaf(joined)
    assert values is not None
    return _over(kind, num_rows, offer(take_over(values.buffers()[1])))


def _over(kind: pa.DataType, length: int, values: pa.Buffer) -> pa.Array:
    """An array of these bytes."""
    if pa.types.is_fixed_size_list(kind):
        inner = _over(kind.value_type, length * kind.list_size, values)
        return pa.FixedSizeListArray.from_arrays(inner, type=kind)
    return pa.Array.from_buffers(kind, length, [None, values])


def leaf(array: pa.Array) -> pa.Array | None:
    """The innermost values of fixed-size lists, or the values themselves; None if any is missing on the way."""
    while pa.types.is_fixed_size_list(array.type):
        if array.null_count:
            return None
        array = array.flatten()
    return None if array.null_count else array


def _raw(chunks: Sequence[pa.Array]) -> list[U8] | None:
    """Values of a fixed size as (rows, bytes), without a copy."""
    found = []
    for array in chunks:
        values = leaf(array)
        if values is None or not _is_fixed(values.type) or not len(array):
            return None
        width = values.type.bit_width // 8
        size = len(values) * width
        if not size:
            return None
        found.append(np.frombuffer(values.buffers()[1], np.uint8, size, values.offset * width).reshape(len(array), -1))
    return found


def _is_fixed(kind: pa.DataType) -> bool:
    if pa.types.is_fixed_size_binary(kind):
        return True
    return bool(pa.types.is_primitive(kind)) and kind.bit_width % 8 == 0
