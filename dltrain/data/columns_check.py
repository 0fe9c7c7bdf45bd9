"""What a column's values are like: missing, not finite, empty, all the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dltrain.data.fingerprint import cells

__all__ = ["ColumnFacts"]

# Of different values, as many as classes can be.
_MOST_VALUES = 10_000


class ColumnFacts:
    """Counts over batches of a column.

    Attributes:
        counts: rows of each value, where it holds plain values and not too many different ones; None otherwise.
    """

    def __init__(self, field: pa.Field) -> None:
        self.name, self._type = field.name, field.type
        self.rows = self.nulls = self.not_finite = self.empty = 0
        self.smallest: float | None = None
        self.largest: float | None = None
        self.counts: Counter[Any] | None = Counter() if _is_plain(field.type) else None
        self._first: bytes | None = None
        self._same = True

    def add(self, column: pa.ChunkedArray) -> None:
        """Takes some rows in."""
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        self.rows += len(array)
        self.nulls += array.null_count
        self._add_numbers(array)
        self._add_values(array)

    @property
    def is_constant(self) -> bool:
        """Whether all values are one and the same."""
        return self._same and self.rows > self.nulls and self.rows > 1 and not self.nulls

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "name": self.name,
            "type": str(self._type),
            "nulls": self.nulls,
            "not_finite": self.not_finite,
            "empty": self.empty,
            "constant": self.is_constant,
            "distinct": len(self.counts) if self.counts is not None else None,
            "min": self.smallest,
            "max": self.largest,
        }

    def _add_numbers(self, array: pa.Array) -> None:
        """Of numbers, and of lists of them."""
        kind = self._type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            array, kind = array.flatten(), kind.value_type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            return
        # A copy, since numpy has no nulls.
        values = np.asarray(array.drop_null().to_numpy(zero_copy_only=False), np.float64)
        finite = values[np.isfinite(values)]
        self.not_finite += len(values) - len(finite)
        if len(finite):
            low, high = float(finite.min()), float(finite.max())
            self.smallest = low if self.smallest is None else min(self.smallest, low)
            self.largest = high if self.largest is None else max(self.largest, high)

    def _add_values(self, array: pa.Array) -> None:
        found = cells(array)
        lengths = found.ends - found.starts
        if not _has_width(self._type):
            self.empty += int(((lengths == 0) & found.valid).sum())
        if self._same:
            self._compare(found, np.flatnonzero(found.valid).tolist())
        if self.counts is not None:
            for pair in pc.value_counts(array).to_pylist():
                if pair["values"] is not None:
                    self.counts[pair["values"]] += pair["counts"]
            if len(self.counts) > _MOST_VALUES:
                self.counts = None

    def _compare(self, found: Any, rows: list[int]) -> None:
        for row in rows:
            if self._first is None:
                self._first = found[row]
            elif found[row] != self._first:
                self._same = False
                return


def _is_plain(kind: pa.DataType) -> bool:
    checks = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string)
    plain = pa.types.is_dictionary(kind) and _is_plain(kind.value_type)
    return plain or any(check(kind) for check in checks)


def _has_width(kind: pa.DataType) -> bool:
    checks = (pa.types.is_binary, pa.types.is_string, pa.types.is_large_binary, pa.types.is_large_string)
    lists = (pa.types.is_list, pa.types.is_large_list)
    return not any(check(kind) for check in (*checks, *lists))
