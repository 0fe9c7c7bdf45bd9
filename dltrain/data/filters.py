"""Row filters: conditions on columns, all of which must hold, told first from statistics and then from rows.

    conditions = parse_filter([["lang", "in", ["de", "fr"]], ["score", ">=", 0.5]], schema, url)
    conditions[0].verdict(Bounds(lo="a", hi="c", nulls=0, rows=100))     # False: no row of this row group can be kept
    keep_rows(conditions, table)                                         # (rows,) bool

A comparison with a missing value does not hold, whichever it is.
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dltrain.conditions import check_condition
from dltrain.errors import DataError

__all__ = ["Bounds", "Condition", "keep_rows", "parse_filter"]

_COMPARE = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


class Bounds(NamedTuple):
    """What statistics say of a column of some rows: the least and the largest value (None: not known), missing
    values (None: not known), rows."""

    lo: Any
    hi: Any
    nulls: int | None
    rows: int


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        values: what is compared with, of the column's type; none for `is null` and `not null`.
        kind: the column's type, that of its values where it is a dictionary.
    """

    column: str
    op: str
    values: pa.Array
    kind: pa.DataType

    def verdict(self, bounds: Bounds) -> bool | None:
        """True: it holds for all rows; False: for none; None: the rows must be looked at."""
        if self.op in ("is null", "not null"):
            return self._nullness(bounds)
        if bounds.nulls == bounds.rows:
            return False
        if bounds.lo is None or bounds.hi is None:
            return None
        try:
            possible, certain = self._between(bounds.lo, bounds.hi)
        except TypeError:
            # Statistics of a kind that Python does not compare with the value's: a time with a zone and one without.
            return None
        # NaN lies outside of all bounds, and differs from every value.
        is_float = pa.types.is_floating(self.kind)
        if not possible and not (is_float and self.op in ("!=", "not in")):
            return False
        return True if certain and bounds.nulls == 0 and not is_float else None

    def _nullness(self, bounds: Bounds) -> bool | None:
        if bounds.nulls is None or 0 < bounds.nulls < bounds.rows:
            return None
        return (bounds.nulls == 0) == (self.op == "not null")

    def _between(self, lo: Any, hi: Any) -> tuple[bool, bool]:
        """Whether the condition can hold for a value in [lo, hi], and whether it must."""
        values = self.values.to_pylist()
        inside = [v for v in values if lo <= v <= hi]
        match self.op:
            case "==" | "in":
                return bool(inside), lo == hi and lo in values
            case "!=" | "not in":
                return not (lo == hi and lo in values), not inside
            case "<":
                return lo < values[0], hi < values[0]
            case "<=":
                return lo <= values[0], hi <= values[0]
            case ">":
                return hi > values[0], lo > values[0]
            case _:
                return hi >= values[0], lo >= values[0]

    def mask(self, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Where it holds: (rows,) bool, null where a value is missing."""
        if self.op == "is null":
            return column.is_null()
        if self.op == "not null":
            return column.is_valid()
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if self.op in _COMPARE:
            return _COMPARE[self.op](column, self.values[0])
        found = pc.is_in(column, value_set=self.values)
        return pc.and_(column.is_valid(), found if self.op == "in" else pc.invert(found))


def keep_rows(conditions: Sequence[Condition], table: pa.Table) -> npt.NDArray[np.bool_]:
    """Where all conditions hold: (rows,)."""
    keep = np.ones(table.num_rows, np.bool_)
    for condition in conditions:
        held = pc.fill_null(condition.mask(table[condition.column]), False)
        keep &= held.to_numpy()
    return keep


def parse_filter(filter: Sequence[Sequence[Any]], schema: pa.Schema, url: str) -> tuple[Condition, ...]:
    """Conditions [column, op, value] for columns of these types.

    Raises:
        DataError: a column that is not there, or a value that its type can't be compared with.
    """
    found = []
    for item in filter:
        fault = check_condition(item)
        if fault:
            raise DataError(f"data.filter: {fault}")
        column, op, *rest = item
        if column not in schema.names:
            raise DataError(f"data.filter: {url} has no column {column!r}; it has {', '.join(map(repr, schema.names))}")
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        wanted = (rest[0] if op in ("in", "not in") else rest) if rest else []
        values = pa.array([_value(v, kind, column) for v in wanted], kind if rest else pa.null())
        found.append(Condition(column, op, values, kind))
    return tuple(found)


def _value(value: Any, kind: pa.DataType, column: str) -> Any:
    """The value as one of the column's type."""
    try:
        if _fits(value, kind):
            return _converted(value, kind)
    except (pa.ArrowException, ArithmeticError, ValueError, OverflowError):
        pass
    raise DataError(
        f"data.filter: column {column!r} is {kind}, which can't be compared with {value!r} ({type(value).__name__})"
    )


def _fits(value: Any, kind: pa.DataType) -> bool:
    """Whether a value of this Python type may be meant for a column of this type; Arrow itself takes more."""
    allowed: dict[Any, tuple[type, ...]] = {
        pa.types.is_boolean: (bool,),
        pa.types.is_integer: (int,),
        pa.types.is_floating: (int, float),
        pa.types.is_decimal: (int, float, str, decimal.Decimal),
        pa.types.is_date: (str, datetime.date),
        pa.types.is_timestamp: (str, datetime.date),
        pa.types.is_time: (str, datetime.time),
    }
    for is_kind, types in allowed.items():
        if is_kind(kind):
            return isinstance(value, types) and (types == (bool,) or not isinstance(value, bool))
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return isinstance(value, str) if is_text else is_bytes and isinstance(value, str | bytes)


def _converted(value: Any, kind: pa.DataType) -> pa.Scalar:
    if pa.types.is_decimal(kind):
        return pa.scalar(decimal.Decimal(str(value)), kind)
    if pa.types.is_timestamp(kind):
        return _moment(value, kind)
    if pa.types.is_temporal(kind):
        return pa.scalar(str(value)).cast(kind)
    if isinstance(value, float) and math.isnan(value):
        raise ValueError("nan equals nothing")
    return pa.scalar(value, kind)


def _moment(value: Any, kind: pa.DataType) -> pa.Scalar:
    """A date, or a date and a time; one without a zone is in UTC where the column has one."""
    text = value.isoformat() if isinstance(value, datetime.date) else value
    moment = datetime.datetime.fromisoformat(text)
    if kind.tz is None and moment.tzinfo is not None:
        raise ValueError("the column has no zone")
    if kind.tz is not None and moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return pa.scalar(moment, kind)
