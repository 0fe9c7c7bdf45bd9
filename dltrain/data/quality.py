"""What is wrong with a dataset's contents: `dltrain data check`.

    found = check_data("s3://bucket/digits/train", against=["s3://bucket/digits/test"])
    found["columns"], found["duplicates"], found["conflicts"], found["label"], found["leakage"], found["findings"]

Every row is read once. Held in memory are 16 bytes a row, and the labels where there are predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dltrain.data.catalog import Catalog, read_catalog
from dltrain.data.columns_check import ColumnFacts
from dltrain.data.fingerprint import row_hashes
from dltrain.data.reader import UnitReader
from dltrain.data.suspects import Predictions, find_predictions
from dltrain.data.verdict import verdict
from dltrain.errors import UserError

__all__ = ["IDS", "LABELS", "check_data"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
# done, total: rows of all datasets.
Progress = Callable[[int, int], None]
LABELS = ("label", "labels", "target", "class", "y")
# Columns that say which row it is, not what is in it.
IDS = ("id", "key", "path", "file", "filename", "index", "uuid", "url")
_AHEAD = 4
_EXAMPLES = 5
# Makes one fingerprint of two (Knuth: 2^64 by the golden ratio).
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class _Dataset:
    """Fingerprints of the rows of a dataset, (rows,); `catalog` says where they are."""

    catalog: Catalog
    inputs: U64
    labels: U64

    @cached_property
    def wholes(self) -> U64:
        """Of contents and label together."""
        return self.inputs + self.labels * _ODD

    @cached_property
    def _ends(self) -> tuple[I64, I64]:
        """The row after each unit, and each unit's file."""
        return np.cumsum(self.catalog.unit_rows), self.catalog.units["file"].to_numpy()

    def place(self, row: int) -> dict[str, Any]:
        """The file and the row in it."""
        ends, files = self._ends
        unit = int(np.searchsorted(ends, row, side="right"))
        # The units of a file follow each other.
        begin = int(np.argmax(files == files[unit]))
        return {"file": self.catalog.locate(unit)[0].path, "row": int(row - (ends[begin - 1] if begin else 0))}

    def places(self, rows: I64) -> list[dict[str, Any]]:
        """Of the first few."""
        return [self.place(int(row)) for row in rows[:_EXAMPLES]]


def check_data(
    url: str,
    *,
    against: Sequence[str] = (),
    label: str | None = None,
    ignore: Sequence[str] = (),
    prediction: str | None = None,
    source: str | None = None,
    progress: Progress = lambda _done, _total: None,
) -> dict[str, Any]:
    """Everything `dltrain data check` says, ready for JSON.

    Args:
        against: datasets that must share no inputs with it: those it will be tested with.
        label: the column with the classes; default: the first of LABELS that is there; "" for none.
        ignore: columns that say nothing about a row's contents, beside those named as IDS.
        prediction: the column that `dltrain predict --to` wrote; default: one that looks like it.
        source: what `url` holds the predictions for, where that is another place: examples are told as its rows.
        progress: called with rows done and rows in all.

    Raises:
        DataError: nothing there, or rows that can't be read.
        StoreError: the storage can't be reached.
        UserError: columns that are not there.
    """
    catalog = read_catalog(url, None, "URL")
    label = _label(catalog, label)
    prediction = find_predictions(catalog.schema, label, prediction)
    inputs = _inputs(catalog, label, [*ignore, *([prediction] if prediction else [])])
    others = [read_catalog(other, inputs, "--against") for other in against]
    counter = _Counter(sum(each.num_rows for each in (catalog, *others)), progress)
    facts = [ColumnFacts(column) for column in catalog.schema]
    said = Predictions(label, prediction) if prediction and label else None
    hashes, labels = [], []
    for table in counter.over(_tables(catalog, None)):
        for fact in facts:
            fact.add(table[fact.name])
        hashes.append(row_hashes(table, inputs))
        labels.append(row_hashes(table, [label] if label else []))
        if said:
            said.add(table)
    mine = _Dataset(read_catalog(source, None, "URL") if source else catalog, _joined(hashes), _joined(labels))
    kind = pa.schema([catalog.schema.field(name) for name in inputs])
    leaks = [_leak(mine, other, counter.over(_alike(other, kind))) for other in others]
    found: dict[str, Any] = {
        "url": source or url,
        "rows": catalog.num_rows,
        "inputs": inputs,
        "columns": [fact.to_dict() for fact in facts],
        "label": _classes(facts, label, catalog.num_rows),
        "duplicates": _duplicates(mine),
        "conflicts": _conflicts(mine) if label else None,
        "leakage": leaks,
        "suspects": [{**mine.place(row), **what} for row, what in said.suspects()] if said else None,
    }
    return {**found, "findings": verdict(found)}


@dataclass
class _Counter:
    """How far all passes are."""

    total: int
    progress: Progress
    done: int = 0

    def over(self, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            yield table
            self.done += table.num_rows
            self.progress(self.done, self.total)


def _joined(parts: list[U64]) -> U64:
    return np.concatenate([*parts, np.empty(0, np.uint64)])


def _label(catalog: Catalog, label: str | None) -> str:
    if label:
        if label not in catalog.schema.names:
            raise UserError(f"--label is {label!r}; {catalog.url} has {', '.join(catalog.schema.names)}")
        return label
    return "" if label == "" else next((name for name in LABELS if name in catalog.schema.names), "")


def _inputs(catalog: Catalog, label: str, ignore: Sequence[str]) -> list[str]:
    """Columns that make a row what it is."""
    missing = sorted(set(ignore) - set(catalog.schema.names))
    if missing:
        raise UserError(f"--ignore names {', '.join(missing)}; {catalog.url} has {', '.join(catalog.schema.names)}")
    found = [n for n in catalog.schema.names if n != label and n not in ignore and n.lower() not in IDS]
    if not found:
        raise UserError(
            f"{catalog.url}: no column is left that makes a row what it is: {', '.join(catalog.schema.names)} are "
            "the label, ids or ignored; see --label and --ignore"
        )
    return found


def _tables(catalog: Catalog, columns: Sequence[str] | None) -> Iterator[pa.Table]:
    """Row group by row group, the next ones on their way."""
    with closing(UnitReader(catalog, columns, keep_bytes=0)) as reader:
        for unit in range(min(_AHEAD, catalog.num_units)):
            reader.start(unit, float(unit))
        for unit in range(catalog.num_units):
            if unit + _AHEAD < catalog.num_units:
                reader.start(unit + _AHEAD, float(unit + _AHEAD))
            yield reader.read(unit)


def _alike(other: Catalog, kind: pa.Schema) -> Iterator[pa.Table]:
    """The same columns of another dataset, of the same types: a 1 is a 1, in 8 bits or in 64.

    Raises:
        UserError: they hold something else.
    """
    for table in _tables(other, kind.names):
        try:
            yield table.select(kind.names).cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
            raise UserError(
                f"--against: the columns of {other.url} are not those of URL, so that rows can't be compared: {error}. "
                "Write both with the same types, or leave columns out with --ignore"
            ) from None


def _duplicates(mine: _Dataset) -> dict[str, Any]:
    """Rows that are there before, contents and label."""
    found, counts = np.unique(mine.wholes, return_counts=True)
    twice = np.flatnonzero(counts > 1)
    worst = twice[np.argsort(-counts[twice], kind="stable")][:_EXAMPLES]
    return {
        "rows": int((counts[twice] - 1).sum()),
        "of": len(twice),
        "examples": [mine.places(np.flatnonzero(mine.wholes == found[at])) for at in worst],
    }


def _conflicts(mine: _Dataset) -> dict[str, Any]:
    """Rows of the same contents with different labels."""
    order = np.lexsort((mine.labels, mine.inputs))
    inputs, labels = mine.inputs[order], mine.labels[order]
    groups = np.unique(inputs[1:][(inputs[1:] == inputs[:-1]) & (labels[1:] != labels[:-1])])
    return {
        "rows": int(np.isin(inputs, groups).sum()),
        "of": len(groups),
        "examples": [mine.places(np.flatnonzero(mine.inputs == group)) for group in groups[:_EXAMPLES]],
    }


def _leak(mine: _Dataset, other: Catalog, tables: Iterator[pa.Table]) -> dict[str, Any]:
    """Rows of another dataset whose contents are here too."""
    hashes = _joined([row_hashes(table, table.column_names) for table in tables])
    theirs = _Dataset(other, hashes, np.zeros_like(hashes))
    rows = np.flatnonzero(np.isin(hashes, mine.inputs))
    here = [mine.place(int(np.flatnonzero(mine.inputs == hashes[row])[0])) for row in rows[:_EXAMPLES]]
    return {
        "url": other.url,
        "rows": len(rows),
        "of": other.num_rows,
        "examples": [{"there": a, "here": b} for a, b in zip(theirs.places(rows), here, strict=True)],
    }


def _classes(facts: Sequence[ColumnFacts], label: str, rows: int) -> dict[str, Any] | None:
    """Rows of each class, the most first; None where there are none, or too many to be classes."""
    fact = next((fact for fact in facts if fact.name == label), None)
    if fact is None or fact.counts is None or len(fact.counts) > max(2, rows // 2):
        return None
    ranked = sorted(fact.counts.items(), key=lambda pair: (-pair[1], str(pair[0])))
    return {"column": label, "classes": {str(value): count for value, count in ranked}}
