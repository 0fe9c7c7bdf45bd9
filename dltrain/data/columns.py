"""Arrow rows as torch tensors, a column at a time.

tensors(rows)                        # {"image": (rows, 12288) uint8, "label": (rows,) int64, "name": [...]}

Numbers and booleans become (rows,), fixed-size lists (rows, length, ...), fixed-size bytes (rows, width) uint8.
Lists become `name`, their values end to end, and `name_offsets` (rows + 1,): row i holds the values from the i-th
offset to the next. Lists of lists have offsets per level, `name_offsets` counting the lists of `name_offsets_1` and so
on. Text and bytes become Python lists. A batch of any lengths is so the same numbers for any number of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from dltrain.data.lists import DTYPE
from dltrain.data.memory import claim
from dltrain.errors import DataError

__all__ = ["OFFSETS", "tensors"]

OFFSETS = "_offsets"


def tensors(rows: pa.RecordBatch) -> dict[str, Any]:
    """Every column of a batch, as tensors where it holds numbers.

    The rows that a `collate` is given have memory of their own, which the tensors take over: what is done to a
    tensor in place shows in the rows. All other memory of Arrow's is copied.

    Raises:
        DataError: a column has missing values, or a type that no tensor can hold.
    """
    found: dict[str, Any] = {}
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        found.update(_column(name, column))
        # Lists of numbers that were packed.
        packed = (rows.schema.field(name).metadata or {}).get(DTYPE)
        if packed:
            found[name] = found[name].view(getattr(torch, packed.decode()))
    return found


def _column(name: str, column: Any) -> dict[str, Any]:
    if _is_text(column.type):
        _refuse_missing(name, column)
        return {name: column.to_pylist()}
    found: dict[str, Any] = {}
    shape: tuple[int, ...] = (len(column),)
    levels = 0
    while _is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        _refuse_missing(name, column)
        if pa.types.is_fixed_size_list(column.type):
            shape = (*shape, column.type.list_size)
        else:
            offsets = np.asarray(column.offsets.to_numpy(), np.int64)
            found[f"{name}{OFFSETS}_{levels}" if levels else name + OFFSETS] = torch.from_numpy(offsets - offsets[0])
            levels += 1
            shape = (int(offsets[-1] - offsets[0]),)
        column = column.flatten()
    _refuse_missing(name, column)
    return {name: _values(name, column, shape), **found}


def _refuse_missing(name: str, column: Any) -> None:
    if column.null_count:
        raise DataError(f"column {name!r} has missing values, which a tensor can't hold; fill or filter them")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    """Text or bytes of any length, or lists of it."""
    if _is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    is_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in (*is_text, *is_bytes))


def _values(name: str, column: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Values that nothing is missing of, as a tensor that shares no memory with anything but the batch."""
    values = _view(name, column)
    buffer = column.buffers()[1]
    memory = claim(buffer.address) if buffer else None
    shape = (*shape, *values.shape[1:])
    start = values.ctypes.data - buffer.address if memory is not None else -1
    if memory is None or not 0 <= start <= memory.numel() - values.nbytes:
        # Arrow's memory is read-only and shared.
        return torch.from_numpy(np.array(values)).reshape(shape)
    kind = torch.from_numpy(np.empty(0, values.dtype)).dtype
    return memory[start : start + values.nbytes].view(kind).reshape(shape)


def _view(name: str, column: Any) -> npt.NDArray[Any]:
    kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        raw = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
        return raw.reshape(len(column), width)
    if pa.types.is_dictionary(kind):
        return _view(name, column.dictionary_decode())
    if pa.types.is_temporal(kind):
        return _view(name, column.cast(pa.int32() if kind.bit_width == 32 else pa.int64()))
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"column {name!r} is {kind}, which no tensor can hold; leave it out of the columns")
    return np.asarray(column.to_numpy(zero_copy_only=False))
