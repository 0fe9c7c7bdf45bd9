"""What a network may be used on: files, lines of text, rows of tables; by the command line, or in a notebook.

given("scans/*.png"), given("-"), given("s3://bucket/rows.parquet")     # the command line: items, one at a time
held([Path("seven.png"), {"text": "hello"}])                            # a program: what it has in hand
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from dltrain.data.raw import Input
from dltrain.errors import UserError
from dltrain.store import explain, filesystem

__all__ = ["Item", "Row", "given", "held", "is_many", "lines"]

_PARQUET = (".parquet", ".parq")
_WILD = "*?["
_ROWS = 1024


class Row(NamedTuple):
    """A row by column, ready for `collate`, and what it is called."""

    name: str
    values: Mapping[str, Any]


Item = Input | Row


def given(name: str) -> Iterator[Item]:
    """What an argument of the command line names: a file, those of a directory or glob, `-` for lines of stdin.

    Parquet, CSV and JSON lines give their rows, any other file is one input. Any fsspec URL.

    Raises:
        UserError: there is nothing.
    """
    if name == "-":
        yield from lines(_typed() if sys.stdin.isatty() else sys.stdin)
        return
    with explain(name):
        fs, path = filesystem(name)
        for found in _files(fs, path, name):
            yield from _of_file(fs, found, name if found == path else _shown(found))


def lines(stream: Iterable[str]) -> Iterator[Input]:
    """Lines of text as they come; empty ones are passed over."""
    for number, line in enumerate(stream, 1):
        text = line.rstrip("\r\n")
        if text.strip():
            yield Input(f"line {number}", text=text)


def _typed() -> Iterator[str]:
    """Lines that somebody types, until Ctrl-D."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def is_many(inputs: Any) -> bool:
    """Whether what a program has in hand is several things."""
    return not isinstance(inputs, Path | str | bytes | Mapping | Input)


def held(inputs: Any) -> list[Item]:
    """What a program has in hand: paths of files, text, bytes, rows by column, or a table of anything like Arrow.

    Raises:
        UserError: one is none of these, or a file that is not there.
    """
    if hasattr(inputs, "__arrow_c_stream__"):
        return [Row(f"row {i}", values) for i, values in enumerate(pa.table(inputs).to_pylist())]
    return [_item(i, one) for i, one in enumerate(inputs if is_many(inputs) else [inputs])]


def _item(number: int, one: Any) -> Item:
    match one:
        case Input():
            return one
        case Path():
            return Input(str(one), data=_read_local(one))
        case bytes():
            return Input(f"input {number}", data=one)
        case str():
            return Input(f"input {number}", text=one)
        case Mapping():
            return Row(f"row {number}", one)
    raise UserError(
        f"input {number} is {type(one).__name__}; give pathlib.Path of a file, bytes of one, str for a text, a dict "
        "for a row, or a table"
    )


def _read_local(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None


# ---- files ----


def _files(fs: Any, path: str, name: str) -> list[str]:
    if any(c in path for c in _WILD):
        found = sorted(fs.glob(path))
        if not found:
            raise UserError(f"no file matches {name}")
        return found
    if fs.isdir(path):
        below = [found for found in sorted(fs.find(path)) if not _hidden(found[len(path) :])]
        if not below:
            raise UserError(f"{name} is a directory without a file")
        return below
    if not fs.exists(path):
        raise UserError(f"no file {name}; text is given with --text, or as lines of stdin with -")
    return [path]


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.strip("/").split("/"))


def _shown(path: str) -> str:
    here = os.getcwd() + "/"
    return path.removeprefix(here)


def _of_file(fs: Any, path: str, name: str) -> Iterator[Item]:
    suffix = os.path.splitext(path)[1].lower()
    batches = _READERS.get(suffix)
    if batches is None:
        yield Input(name, data=bytes(fs.cat_file(path)))
        return
    number = 0
    try:
        with fs.open(path, "rb") as file:
            for batch in batches(file):
                for values in batch.to_pylist():
                    yield Row(f"{name} row {number}", values)
                    number += 1
    except pa.ArrowException as error:
        raise UserError(f"{name} can't be read as {suffix[1:]}: {error}") from None


def _parquet(file: Any) -> Iterator[pa.RecordBatch]:
    yield from pq.ParquetFile(file).iter_batches(_ROWS)


def _csv(file: Any) -> Iterator[pa.RecordBatch]:
    yield from pyarrow.csv.open_csv(file)


def _json(file: Any) -> Iterator[pa.RecordBatch]:
    yield from pyarrow.json.read_json(file).to_batches(_ROWS)


_READERS = {
    **dict.fromkeys(_PARQUET, _parquet),
    ".csv": _csv,
    ".jsonl": _json,
    ".ndjson": _json,
}
