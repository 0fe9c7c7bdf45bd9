"""Writes a job's data as Parquet at any URL, and the command that does it.

def make_data(url):
    return write_splits(url, {"train": table, "test": held_out}, rows_per_group=32)

if __name__ == "__main__":
    main(make_data)          # python -m jobs.image_cnn make-data s3://bucket/digits
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["main", "read_column", "write_splits"]


def write_splits(
    url: str, splits: Mapping[str, pa.Table], *, files: int = 4, rows_per_group: int = 64
) -> dict[str, int]:
    """Writes each table under url/NAME, in several files; returns rows by name.

    Args:
        files: of each split, fewer where it has not enough row groups.
        rows_per_group: small groups let a small dataset be shuffled well, and shared by many workers.
    """
    from dltrain.store import open_store

    store = open_store(url)
    for name, table in splits.items():
        groups = -(-len(table) // rows_per_group)
        size = -(-groups // min(files, max(groups, 1))) * rows_per_group
        for index, start in enumerate(range(0, len(table), size)):
            sink = io.BytesIO()
            pq.write_table(table.slice(start, size), sink, row_group_size=rows_per_group, compression="zstd")
            store.write(f"{name}/part-{index:05d}.parquet", sink.getvalue())
    return {name: len(table) for name, table in splits.items()}


def read_column(url: str, split: str, column: str) -> list[Any]:
    """What `write_splits` wrote of a column, in its order."""
    from dltrain.store import open_store

    store = open_store(url)
    files = [name for name in store.list(split) if name.endswith(".parquet")]
    tables = [pq.read_table(io.BytesIO(store.read(name)), columns=[column]) for name in sorted(files)]
    return [value for table in tables for value in table[column].to_pylist()]


def main(make_data: Callable[[str], Mapping[str, int]], *more: Callable[..., str]) -> None:
    """The command of a job: `make-data URL` writes its data, and says how many rows.

    Args:
        more: verbs of its own, called by their names with text for each parameter; what they return is printed.
    """
    from dltrain.errors import DltrainError

    module = sys.modules["__main__"].__spec__
    parser = argparse.ArgumentParser(prog=f"python -m {module.name}" if module else None)
    verbs = parser.add_subparsers(required=True, metavar="|".join(["make-data", *(one.__name__ for one in more)]))
    verb = verbs.add_parser("make-data", help="write its data")
    verb.set_defaults(call=make_data)
    verb.add_argument("url", help="where: a directory, or s3://bucket/path")
    verb.add_argument("--json", action="store_true", help="rows by split as one JSON object")
    for one in more:
        verb = verbs.add_parser(one.__name__, help=one.__doc__)
        verb.set_defaults(call=one, json=False)
        for name, parameter in inspect.signature(one).parameters.items():
            given = parameter.default is not parameter.empty
            verb.add_argument(name, **({"nargs": "?", "default": parameter.default} if given else {}))
    options = vars(parser.parse_args())
    call, as_json = options.pop("call"), options.pop("json")
    try:
        found = call(**options)
    except DltrainError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if as_json:
        print(json.dumps(dict(found)))
    elif isinstance(found, str):
        print(found)
    else:
        print(f"wrote {', '.join(f'{count:,} rows of {name}' for name, count in found.items())} to {options['url']}")
