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
# Smaller values are shuffled when their window is loaded: picking them one by one takes longer than a second copy.
_LARGE_BYTES = 2048


@dataclass(frozen=True)
class Column:
    """A column of a window's items.

    Attributes:
        chunks: its values.
        chunk, row: item -> which chunk, and which row of it; None where items lie in order in the only chunk.
    """

    chunks: list[pa.Array]
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
    for i in range(table.num_columns):
        chunks = [batch.column(i) for batch in batches]
        small = sum(c.nbytes for c in chunks) <= _LARGE_BYTES * table.num_rows
        whole = pa.chunked_array(chunks).combine_chunks() if small else None
        if isinstance(whole, pa.Array):
            columns.append(Column([whole.take(order)]))
        else:
            columns.append(Column(chunks, chunk, row))
    return columns


def gather(schema: pa.Schema, picks: Sequence[Pick]) -> pa.RecordBatch:
    """The picked items, one after the other: the one copy between decoding and a batch."""
    # One call for all rows: whoever lets go of the interpreter for each waits for it as often while others use it.
    joined = [
        pa.concat_arrays([array for columns, items in picks for array in columns[i].arrays(items)])
        for i in range(len(schema))
    ]
    return pa.RecordBatch.from_arrays([_offered(array) for array in joined], schema=schema)


def _offered(array: pa.Array) -> pa.Array:
    """The array, in memory that can be claimed where its values are of a fixed size and none is missing."""
    values = leaf(array)
    if values is None or not _is_fixed(values.type) or not values.nbytes:
        return array
    return _over(array.type, len(array), offer(take_over(values.buffers()[1])))


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


def _is_fixed(kind: pa.DataType) -> bool:
    if pa.types.is_fixed_size_binary(kind):
        return True
    return bool(pa.types.is_primitive(kind)) and kind.bit_width % 8 == 0
