"""Hive-style partitions: columns that exist in the paths of a dataset's files alone, as in lang=de/year=2024/a.parquet.

schema = partition_schema(paths_below_the_directory, in_files=["text"])     # lang: string, year: int64
values_of("data/lang=de/year=2024/a.parquet", schema)                       # {"lang": "de", "year": 2024}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from dltrain.errors import DataError

__all__ = ["NULL", "partition_schema", "values_of"]

NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"-?\d{1,18}")


def partition_schema(paths: Sequence[str], url: str, field: str) -> pa.Schema:
    """The columns that the directories of `paths` name: int64 where all values are whole numbers, else string.

    Args:
        paths: of all files, below the dataset's directory.

    Raises:
        DataError: one file's directories name other columns than another's.
    """
    found = [_pairs(path) for path in paths]
    names = list(found[0])
    for path, pairs in zip(paths, found, strict=True):
        if list(pairs) != names:
            raise DataError(
                f"{field}: the files of {url} differ in their partition columns: {', '.join(names) or 'none'} in "
                f"{paths[0]} and {', '.join(pairs) or 'none'} in {path}; lay them out alike, or give a glob of some"
            )
    return pa.schema([(name, _kind(pairs[name] for pairs in found)) for name in names])


def values_of(path: str, schema: pa.Schema) -> dict[str, Any]:
    """What a file's path says for each of the columns; None where it is Hive's word for a missing value."""
    pairs = _pairs(path) if len(schema) else {}
    return {f.name: _value(pairs[f.name], f.type) for f in schema}


def _pairs(path: str) -> Mapping[str, str]:
    """Column -> text, of the directories alone."""
    parts = (part.partition("=") for part in path.split("/")[:-1])
    return {unquote(name): unquote(text) for name, equals, text in parts if name and equals}


def _kind(texts: Iterable[str]) -> pa.DataType:
    known = [text for text in texts if text != NULL]
    return pa.int64() if known and all(_INTEGER.fullmatch(text) for text in known) else pa.string()


def _value(text: str, kind: pa.DataType) -> Any:
    if text == NULL:
        return None
    return int(text) if pa.types.is_integer(kind) else text
