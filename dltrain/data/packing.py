"""Packing: token sequences of any length, laid end to end and cut into rows of the same length.

unit_rows = num_chunks(values, length=2048)              # rows of a packed unit, known from the footer alone
table = pack(reader.read(unit), "tokens", 2048, rows=unit_rows[unit])

A row of the packed unit holds `length` tokens, `segment_ids` (1, 2, ... by document; 0 is padding) and
`num_tokens`. A unit is packed by itself: its last row is padded, no token is lost, and what a row holds
depends on neither the number of workers nor the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dltrain.errors import DataError

__all__ = ["NUM_TOKENS", "SEGMENT_IDS", "Pack", "num_chunks", "pack", "packed_schema"]

SEGMENT_IDS, NUM_TOKENS = "segment_ids", "num_tokens"
I64 = npt.NDArray[np.int64]


class Pack(NamedTuple):
    """Which column is packed, into rows of how many tokens."""

    column: str
    length: int


def num_chunks(values: I64, length: int) -> I64:
    """Rows that units of so many values make."""
    return -(-values // length)


def packed_schema(schema: pa.Schema, column: str, length: int) -> pa.Schema:
    """What a packed unit has.

    Raises:
        DataError: the column does not hold sequences of numbers.
    """
    if column not in schema.names:
        raise DataError(f"data.pack.column: there is no column {column!r}; there are {', '.join(schema.names)}")
    kind = schema.field(column).type
    if not _is_sequence(kind):
        raise DataError(f"data.pack.column: {column!r} is {kind}; packing needs lists of numbers, such as token ids")
    return pa.schema(
        [
            (column, pa.list_(kind.value_type, length)),
            (SEGMENT_IDS, pa.list_(pa.int32(), length)),
            (NUM_TOKENS, pa.int32()),
        ]
    )


def _is_sequence(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)))


def pack(table: pa.Table, column: str, length: int, rows: int) -> pa.Table:
    """A unit's sequences as `rows` rows of `length` tokens, those past the last token padding.

    Raises:
        DataError: it holds more tokens than its footer said.
    """
    schema = packed_schema(table.schema, column, length)
    values, lengths = _flat(table[column])
    if len(values) > rows * length:
        raise DataError(f"{column!r} holds {len(values):,} tokens where the footer said at most {rows * length:,}")
    tokens = np.zeros(rows * length, values.dtype)
    tokens[: len(values)] = values
    segments = _segments(lengths, length, rows)
    counts = np.clip(len(values) - np.arange(rows) * length, 0, length).astype(np.int32)
    arrays: list[Any] = [
        pa.FixedSizeListArray.from_arrays(pa.array(tokens), length),
        pa.FixedSizeListArray.from_arrays(pa.array(segments), length),
        pa.array(counts),
    ]
    return pa.table(arrays, schema=schema)


def _flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], I64]:
    """All values end to end, and how many each row has; a missing list is an empty one."""
    lengths = column.combine_chunks().value_lengths().fill_null(0)
    values = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
    if values.null_count:
        raise DataError("token sequences must not hold nulls; fill them before packing")
    return values.to_numpy(), np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64)


def _segments(lengths: I64, length: int, rows: int) -> npt.NDArray[np.int32]:
    """Which of a packed row's documents each token is of, from 1; 0 past the last token."""
    num_tokens = int(lengths.sum())
    # The first token of each document that has any; a row of the packed table begins a segment as well.
    starts = np.cumsum(lengths) - lengths
    begins = np.zeros(rows * length, np.int64)
    begins[starts[lengths > 0]] = 1
    begins[::length] = 1
    running = np.cumsum(begins)
    found = running - np.repeat(running[::length], length) + 1
    found[num_tokens:] = 0
    return found.astype(np.int32)
