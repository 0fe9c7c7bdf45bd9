"""Prints docs/spec.md: every field of a spec, from the models that check it.

python docs/spec_reference.py > docs/spec.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dltrain.spec import JobSpec
from dltrain.spec.base import Model

SIGNS = {Ge: ("ge", ">="), Gt: ("gt", ">"), Le: ("le", "<="), Lt: ("lt", "<")}
HEAD = """\
# The spec

Every field of a job's YAML. This page is made from `dltrain/spec/` by `python docs/spec_reference.py > docs/spec.md`;
`dltrain plan SPEC` prints a spec with all of its defaults. A field without a default must be given. Any field can be
set on the command line, nested ones with dots: `dltrain run SPEC optim.lr=3e-4 workers=2`.
"""
PLURALS = {str: "texts", int: "whole numbers", float: "numbers"}
# What a reader wants to know and no single field says.
NOTES = {
    "data": "Give `train` or `mix`.",
    "train": "Give `epochs` or `steps`.",
    "workers": "A number is both: `workers: 2` is `{min: 2, max: 2}`.",
}


def page() -> str:
    """docs/spec.md."""
    return HEAD + "".join(_section("", JobSpec))


def _section(path: str, model: type[Model]) -> Iterator[str]:
    """A table of a model's fields, and then the sections of those that are models themselves."""
    if path:
        yield "\n".join(["", f"## {path}", *(["", NOTES[path]] if path in NOTES else []), ""])
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    yield "\n| field | type | default | meaning |\n|---|---|---|---|\n"
    for name, field in fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{name}` | {_type(path, name, field)} | {_default(field)} | {meaning} |\n"
    for name, field in fields.items():
        if inner := _model_of(field.annotation):
            yield from _section(f"{path}.{name}" if path else name, inner)


def _type(path: str, name: str, field: FieldInfo) -> str:
    if inner := _model_of(field.annotation):
        link = f"[{inner.__name__}](#{_anchor(path, name)})"
        return f"list of {link}" if _is_list(field.annotation) else link
    limits = [f"{sign} {_number(getattr(m, key))}" for m in field.metadata for key, sign in _signs(m)]
    return " ".join([_words(field.annotation), *([", ".join(limits)] if limits else [])])


def _anchor(path: str, name: str) -> str:
    return (f"{path}.{name}" if path else name).replace(".", "")


def _signs(limit: Any) -> list[tuple[str, str]]:
    return [pair for kind, pair in SIGNS.items() if isinstance(limit, kind)]


def _number(value: Any) -> str:
    if isinstance(value, int) and value > 2**20 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _words(kind: Any) -> str:
    """A type as a person would write it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _words(inner[0])
    if origin in (Union, UnionType):
        return " or ".join(_words(k) for k in inner if k is not type(None))
    if origin is Literal:
        return " \\| ".join(f"`{_plain(value)}`" for value in inner)
    if origin is tuple:
        return f"{len(inner)} numbers" if Ellipsis not in inner else f"list of {PLURALS.get(inner[0], 'lists')}"
    if origin is dict:
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "`true` \\| `false`"}.get(kind, "list")


def _plain(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "`{}`"
    if field.default is PydanticUndefined:
        return "must be given"
    if field.default is None:
        return ""
    if isinstance(field.default, Model):
        return "see there"
    if isinstance(field.default, tuple):
        return f"`[{', '.join(map(str, field.default))}]`"
    return f"`{_plain(field.default) or chr(34) * 2}`"


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple


def _model_of(kind: Any) -> type[Model] | None:
    """The model within a field's type: itself, a list of it, or that or nothing."""
    if isinstance(kind, type) and issubclass(kind, Model):
        return kind
    return next((found for k in get_args(kind) if (found := _model_of(k))), None)


if __name__ == "__main__":
    print(page(), end="")
