"""In words: what a model found wrong with a spec, amounts as a person would say them, and text without passwords.

except ValidationError as error:
    raise SpecError(source, list(faults_of(error, JobSpec)))
human_bytes(1536), human_seconds(95)                # "1.5 KiB", "1 min 35 s"
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

__all__ = ["faults_of", "human_bytes", "human_seconds", "without_passwords"]

# Asked for often enough to deserve the word rather than "unknown key".
_OUT_OF_SCOPE = ("tp", "pp", "sp", "ep")
_CREDENTIALS = re.compile(r"://[^/\s@'\"]+@")
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def faults_of(error: ValidationError, spec: type[BaseModel]) -> Iterator[str]:
    """A sentence for each fault: the field, what was found, and what is allowed."""
    for item in error.errors(include_url=False):
        # A union's branches come as one error each; the branch's name is not a field of the spec.
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("literal[", "int")))
        yield _sentence(where, item, spec)


def _sentence(where: str, item: Any, spec: Any) -> str:
    kind, found, context = item["type"], item.get("input"), item.get("ctx", {})
    if kind == "missing":
        return f"{where}: is missing; it must be given"
    if kind == "extra_forbidden":
        return f"{where}: {_unknown(where, spec)}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        if not where:
            return message
        return f"{where}: {message}" if isinstance(found, dict) else f"{where}: found {found!r}; {message}"
    if kind == "literal_error":
        return f"{where}: found {found!r}; allowed: {context['expected']}"
    shown = type(found).__name__ if isinstance(found, dict | list) else repr(found)
    return f"{where}: found {shown}; {message[0].lower()}{message[1:]}"


def _unknown(where: str, spec: Any) -> str:
    *parents, name = where.split(".")
    if name in _OUT_OF_SCOPE or name.endswith("_parallel"):
        return "is out of scope for now: workers are data-parallel (ZeRO shards memory, see engine.zero)"
    known = _fields(parents, spec)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key; {hint}allowed: {', '.join(known)}"


def _fields(parents: Sequence[str], spec: Any) -> list[str]:
    model: Any = spec
    for parent in parents:
        # A number is a place in a list; a field that may be left out is a union with None.
        kind = model if parent.isdigit() else model.model_fields[parent].annotation
        model = next((k for k in get_args(kind) if hasattr(k, "model_fields")), kind)
    return [field.alias or name for name, field in model.model_fields.items()]


def human_bytes(value: float) -> str:
    """As a person would say it: 1536 -> "1.5 KiB"."""
    step = 0
    while value >= 1024 and step < len(_UNITS) - 1:
        value /= 1024
        step += 1
    return f"{value:,.1f} {_UNITS[step]}" if step else f"{value:,.0f} bytes"


def human_seconds(seconds: float) -> str:
    """As a person would say it: 95 -> "1 min 35 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def without_passwords(text: str) -> str:
    """The same with what stands between :// and @ in URLs made unreadable."""
    return _CREDENTIALS.sub("://***@", text)
