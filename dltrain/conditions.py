"""Conditions of `data.filter`, as they are written: [column, op, value], or [column, "is null"].

check_condition(["lang", "in", ["de", "fr"]])        # None: nothing is wrong with it
"""

from __future__ import annotations

from typing import Any

__all__ = ["check_condition"]

_COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")
_MEMBERSHIPS = ("in", "not in")
_NULLNESS = ("is null", "not null")


def check_condition(item: Any) -> str | None:
    """What is wrong with a condition of `data.filter`: [column, op, value], or [column, "is null"]."""
    if not isinstance(item, list | tuple) or len(item) not in (2, 3) or not isinstance(item[0], str):
        return f'found {item!r}; a condition is [column, op, value], or [column, "is null"]'
    op, rest = item[1], item[2:]
    if op not in (*_COMPARISONS, *_MEMBERSHIPS, *_NULLNESS):
        return f"found the operator {op!r}; allowed: {', '.join((*_COMPARISONS, *_MEMBERSHIPS, *_NULLNESS))}"
    if (op in _NULLNESS) == bool(rest):
        return f"found {list(item)!r}; {op!r} takes {'no value' if rest else 'a value'}"
    if op in _MEMBERSHIPS and not (isinstance(rest[0], list | tuple) and rest[0]):
        return f"found {rest[0]!r} after {op!r}; it takes a list of values"
    if op in _COMPARISONS and (rest[0] is None or isinstance(rest[0], list | tuple | dict)):
        return f'found {rest[0]!r} after {op!r}; it takes one value (a missing one: "is null")'
    return None
