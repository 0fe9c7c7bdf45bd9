"""Arrow rows as torch tensors, a column at a time and with one copy.

tensors(rows)                        # {"image": (rows, 12288) uint8, "label": (rows,) int64, "name": [...]}

Numbers become (rows,), fixed-size lists (rows, length), fixed-size bytes (rows, width) uint8; lists of numbers
become `name` (values end to end) and `name_offsets` (rows + 1,); text and bytes become Python lists.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from dltrain.data.lists import DTYPE
from dltrain.errors import DataError

__all__ = ["OFFSETS", "tensors"]

OFFSETS = "_offsets"


def tensors(rows: pa.RecordBatch) -> dict[str, Any]:
    """Every column of a batch, as tensors where it holds numbers.

    Raises:
        DataError: a column has missing values, or a type that no tensor can hold.
    """
    found: dict[str, Any] = {}
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        kind = column.type
        if column.null_count:
            raise DataError(f"column {name!r} has missing values, which a tensor can't hold; fill or filter them")
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            found[name] = _copied(name, column.flatten())
            offsets = np.asarray(column.offsets.to_numpy(), np.int64)
            found[name + OFFSETS] = torch.from_numpy(offsets - offsets[0])
        elif _is_text(kind):
            found[name] = column.to_pylist()
        else:
            found[name] = _copied(name, column)
            # Lists of numbers that were packed.
            packed = (rows.schema.field(name).metadata or {}).get(DTYPE)
            if packed:
                found[name] = found[name].view(getattr(torch, packed.decode()))
    return found


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests)


def _copied(name: str, column: Any) -> torch.Tensor:
    """Arrow's memory is read-only and shared, so a batch gets its own."""
    return torch.from_numpy(np.array(_view(name, column)))


def _view(name: str, column: Any) -> npt.NDArray[Any]:
    kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        raw = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
        return raw.reshape(len(column), width)
    if pa.types.is_fixed_size_list(kind):
        return _view(name, column.flatten()).reshape(len(column), kind.list_size, *_inner(kind.value_type))
    if pa.types.is_dictionary(kind):
        return _view(name, column.dictionary_decode())
    if pa.types.is_temporal(kind):
        return _view(name, column.cast(pa.int32() if kind.bit_width == 32 else pa.int64()))
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"column {name!r} is {kind}, which no tensor can hold; leave it out of the columns")
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _inner(kind: pa.DataType) -> tuple[int, ...]:
    return (kind.list_size, *_inner(kind.value_type)) if pa.types.is_fixed_size_list(kind) else ()
