"""What a task's `collate` gets when there is nothing to train: rows of the columns that it knows, of the same types.

columns = Columns(needed=("image", "label"), targets=("label",), schema=plan.schema, task="jobs.image_cnn:ImageCnn")
columns.rows([{"image": b"..."}], ["seven.png"])       # pa.RecordBatch; label: blanks of its type
columns.filled(table)                                  # the same for a table of Parquet

Pure: no storage, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dltrain.data.lists import DTYPE
from dltrain.errors import UserError

__all__ = ["Columns", "blank"]


@dataclass(frozen=True)
class Columns:
    """The columns of one task.

    Attributes:
        needed: by `collate`, in its order.
        targets: those of them that may be missing.
        schema: of the data that it was trained on; types of columns that it lacks are guessed.
        task: its name, for messages.
    """

    needed: tuple[str, ...]
    targets: tuple[str, ...]
    schema: pa.Schema
    task: str

    def rows(self, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> pa.RecordBatch:
        """Rows by column as one batch; what they have beside the columns needed comes after these.

        Args:
            names: of the rows, for messages.

        Raises:
            UserError: one lacks a column, or has a value that is not of the column's type.
        """
        others = dict.fromkeys(name for row in rows for name in row if name not in self.needed)
        fields, arrays = [], []
        for name in (*self.needed, *others):
            self._check_there(name, rows, names)
            array = self._array(name, rows, names)
            if array is not None:
                arrays.append(array)
                fields.append(self._field(name, array.type))
        return pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))

    def filled(self, table: pa.Table) -> pa.Table:
        """A table that has the columns needed and no others, blanks for targets that it lacks.

        Raises:
            UserError: it lacks another column, or has one of another type.
        """
        columns = [self._filled(name, table) for name in self.needed]
        fields = [self._field(name, column.type) for name, column in zip(self.needed, columns, strict=True)]
        return pa.table(columns, pa.schema(fields))

    def _filled(self, name: str, table: pa.Table) -> pa.ChunkedArray:
        kind = self._kind(name)
        there = name in table.column_names
        if not there:
            self._check_target(name, f"the data has {', '.join(map(repr, table.column_names)) or 'nothing'}")
        if there and kind in (None, table.schema.field(name).type):
            return table[name]
        try:
            return table[name].cast(kind) if there else _blanks(kind, table.num_rows)
        except pa.ArrowException as error:
            if name in self.targets:
                return _blanks(kind, table.num_rows)
            raise UserError(
                f"column {name!r} is {table.schema.field(name).type} here and {kind} in the data that {self.task} was "
                f"trained on, and can't be made that: {error}"
            ) from None

    # ---- a column ----

    def _kind(self, name: str) -> pa.DataType | None:
        return self.schema.field(name).type if name in self.schema.names else None

    def _field(self, name: str, kind: pa.DataType) -> pa.Field:
        return self.schema.field(name) if name in self.schema.names else pa.field(name, kind)

    def _check_there(self, name: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
        lacking = [i for i, row in enumerate(rows) if name not in row]
        if lacking and name in self.needed:
            has = ", ".join(map(repr, rows[lacking[0]])) or "nothing"
            self._check_target(name, f"{names[lacking[0]]} has {has}")
        elif lacking:
            raise UserError(f"{names[lacking[0]]} has no {name!r}, which other rows have; give all of them the same")

    def _check_target(self, name: str, found: str) -> None:
        if name not in self.targets:
            raise UserError(
                f"{self.task} needs the column {name!r}, and {found}. Give it (`read` of the task makes it of a file "
                "or a line), or name it in the task's `target_columns` if `predict` does without it"
            )

    def _array(self, name: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> pa.Array | None:
        kind = self._kind(name)
        missing = [name not in row for row in rows]
        if all(missing) and kind is None:
            # A target of unknown type: nobody can say what a blank of it is.
            return None
        empty = blank(kind).as_py() if kind is not None and any(missing) else None
        packed = (self._field(name, kind).metadata or {}).get(DTYPE) if kind is not None else None
        values = [_value(row.get(name, empty), packed) for row in rows]
        try:
            return pa.array(values, kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            raise UserError(self._misfit(name, kind, values, names)) from None

    def _misfit(self, name: str, kind: pa.DataType | None, values: Sequence[Any], names: Sequence[str]) -> str:
        for value, row in zip(values, names, strict=True):
            try:
                pa.array([value], kind)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                return (
                    f"{row}: column {name!r} is {kind} in the data that {self.task} was trained on, and this is "
                    f"{_shown(value)} ({error}). `read` of the task makes what the column holds"
                )
        return f"column {name!r}: the rows' values are of different types; give all of them the same"


def blank(kind: pa.DataType) -> pa.Scalar:
    """What stands for a value that is not there: 0, "", or a list of such where lists have one length."""
    if pa.types.is_fixed_size_list(kind):
        return pa.scalar([blank(kind.value_type).as_py()] * kind.list_size, kind)
    if pa.types.is_fixed_size_binary(kind):
        return pa.scalar(bytes(kind.byte_width), kind)
    if pa.types.is_struct(kind):
        return pa.scalar({field.name: blank(field.type).as_py() for field in kind}, kind)
    if pa.types.is_dictionary(kind):
        return pa.array([blank(kind.value_type).as_py()], kind)[0]
    tests = {"": _is_text, b"": _is_bytes, False: pa.types.is_boolean}
    value: Any = next((value for value, test in tests.items() if test(kind)), 0)
    return pa.scalar([] if _is_list(kind) else value, kind)


def _blanks(kind: pa.DataType, count: int) -> pa.ChunkedArray:
    return pa.chunked_array([pa.repeat(blank(kind), count)], kind)


def _is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_bytes(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_map))


def _value(value: Any, packed: bytes | None) -> Any:
    """What Arrow takes: tensors as lists, and lists of numbers as the bytes that the column packs them into."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if packed and isinstance(value, Sequence) and not isinstance(value, bytes | str):
        return np.asarray(value, packed.decode()).tobytes()
    return value


def _shown(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        return f"{len(value):,} bytes"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
