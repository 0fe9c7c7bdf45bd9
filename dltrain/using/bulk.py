"""Predictions for a whole dataset: Parquet in, Parquet out, a file of the result for every few row groups.

    job = BulkJob(run="image-cnn", step=300, source="s3://bucket/scans", target="s3://bucket/labels")
    bulk = Bulk(job, load("image-cnn", 300))
    worker = BulkWorker(bulk.job, bulk.schema(), bulk.catalog, model)
    for part in bulk.missing: worker.write(part)
    bulk.finish()

What a part is depends on the data alone, and each is written whole or not at all, so that any number of workers, in any
number of starts, leave the same files. Until the last is there the directory has a mark for which dltrain refuses to
read it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dltrain.data.catalog import Catalog, read_catalog
from dltrain.data.files import UNFINISHED
from dltrain.data.reader import UnitReader
from dltrain.data.target import PART
from dltrain.data.windows import one_batch
from dltrain.errors import DataError, UserError
from dltrain.store import Store, explain, open_store
from dltrain.using.finding import read_schema, schema_text
from dltrain.using.model import Model, load
from dltrain.using.results import column

__all__ = ["Bulk", "BulkJob", "BulkWorker", "Done", "Part", "parts_of", "too_many"]

# Written first: of what the directory holds the predictions. Hidden from readers of Parquet, as all that begins so.
_ABOUT = "_dltrain-predict.json"
# What there is to read, for workers elsewhere; until the end.
_CATALOG = "_dltrain-catalog.arrow"
_BAD = b"dltrain.bad_rows"
# On the wire, of the columns that are read.
_PART_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class BulkJob:
    """What is predicted for what, and how.

    Attributes:
        run: name or URL; step: of the checkpoint, a number, so that all workers take the same.
        source, target: URLs.
        keep: columns of the source beside the prediction; None: all.
        column: the prediction's name.
        batch: rows of a forward pass; part_rows: most rows of a file; seed: of torch's random numbers.
        bad_rows: how many rows may be without a prediction.
        threads: of torch, in workers of their own; None leaves it to torch.
    """

    run: str
    step: int
    source: str
    target: str
    keep: tuple[str, ...] | None = None
    column: str = "prediction"
    batch: int = 256
    part_rows: int = 32_768
    seed: int = 0
    bad_rows: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)
    code: str | None = None
    device: str | None = None
    threads: int | None = None


class Part(NamedTuple):
    """A file of the result: units [first, last) of the source, whose first row is number `row`."""

    number: int
    first: int
    last: int
    row: int
    rows: int

    @property
    def name(self) -> str:
        """Its file."""
        return PART.format(self.number)


class Done(NamedTuple):
    """A part that is there; bad: (row, reason) of those without a prediction."""

    part: Part
    bad: list[tuple[int, str]]


def parts_of(catalog: Catalog, part_rows: int, part_bytes: int = _PART_BYTES) -> list[Part]:
    """The source cut at its files, and within them at row groups, into pieces of about a size."""
    files, rows, sizes = (catalog.units[name].to_numpy() for name in ("file", "rows", "bytes"))
    cuts, held_bytes, held_rows = [0], 0, 0
    for unit in range(catalog.num_units):
        full = held_bytes + sizes[unit] > part_bytes or held_rows + rows[unit] > part_rows
        if unit > cuts[-1] and (full or files[unit] != files[unit - 1]):
            cuts.append(unit)
            held_bytes = held_rows = 0
        held_bytes, held_rows = held_bytes + sizes[unit], held_rows + rows[unit]
    cuts.append(catalog.num_units)
    starts = np.concatenate([[0], np.cumsum(rows)])
    return [
        Part(number, first, last, int(starts[first]), int(starts[last] - starts[first]))
        for number, (first, last) in enumerate(pairwise(cuts))
    ]


# ---- the whole of it ----


class Bulk:
    """One job: what there is to do, and what has been done.

    Attributes:
        parts: all of them; done: those that were there already; missing: the others.

    Raises:
        UserError: nothing to read, a column missing, or a target that holds something else.
    """

    def __init__(self, job: BulkJob, model: Model) -> None:
        self._model = model
        self.catalog = replace(read_catalog(job.source, self._asked(job), "INPUT"), footers=b"")
        names = self.catalog.schema.names
        self.job = job if job.keep is not None else replace(job, keep=tuple(names))
        if job.column in (self.job.keep or ()):
            raise UserError(
                f"{job.source} has a column {job.column!r} already; name the predictions otherwise with --column, or "
                "leave that one out of --keep"
            )
        # An empty table shows whether it can be fed to the task.
        some = self.catalog.schema.empty_table()
        model.columns.filled(some.select([name for name in model.columns.needed if name in names]))
        self.parts = parts_of(self.catalog, self.job.part_rows)
        self._store = open_store(job.target)
        self._about = self._begin()
        there = set(self._store.list())
        self.done = [Done(part, _bad_rows(self._store, part)) for part in self.parts if part.name in there]
        self.missing = [part for part in self.parts if part.name not in there]

    def share(self) -> None:
        """Puts the catalog where workers elsewhere find it."""
        sink = pa.BufferOutputStream()
        table = self.catalog.to_table()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        self._store.write(_CATALOG, sink.getvalue().to_pybytes())

    @property
    def is_complete(self) -> bool:
        """Whether an earlier start has finished it."""
        return not self._store.exists(UNFINISHED)

    def schema(self) -> pa.Schema:
        """Of the result: told by the predictions for the first rows, once."""
        if self._about.get("schema"):
            return read_schema(self._about["schema"])
        worker = BulkWorker(self.job, None, self.catalog, self._model)
        schema = worker.guess(self.parts[0])
        self._about["schema"] = schema_text(schema)
        self._store.write(_ABOUT, json.dumps(self._about).encode())
        return schema

    def finish(self) -> None:
        """All parts are there."""
        self._store.delete(_CATALOG)
        self._store.delete(UNFINISHED)

    def _asked(self, job: BulkJob) -> list[str] | None:
        """Columns that must be there, and alike in all files; None: all."""
        columns = self._model.columns
        required = [name for name in columns.needed if name not in columns.targets]
        return None if job.keep is None else list(dict.fromkeys([*required, *job.keep]))

    def _begin(self) -> dict[str, Any]:
        store, identity = self._store, self._identity()
        if store.exists(_ABOUT):
            about: dict[str, Any] = json.loads(store.read(_ABOUT))
            if about["identity"] != identity:
                raise UserError(
                    f"{store.url} holds other predictions: {_difference(about['of'], self._of())}. Give another --to, "
                    "or delete that directory"
                )
            return about
        found = store.list()
        if found:
            raise UserError(
                f"{store.url} holds {len(found)} file(s), {found[0]} among them; give a directory that is not there yet"
            )
        about = {"identity": identity, "of": self._of(), "rows": self.catalog.num_rows, "parts": len(self.parts)}
        store.write(UNFINISHED, b"dltrain predict\n")
        store.write(_ABOUT, json.dumps(about).encode())
        return about

    def _of(self) -> dict[str, Any]:
        """What must be the same for parts of one result, in words that a message can use."""
        job = self.job
        return {
            "model": self._model.trained.identity,
            "args": dict(job.args),
            "data": f"{job.source} ({self.catalog.num_rows:,} rows, {self.catalog.digest})",
            "--keep": list(job.keep or ()),
            "--column": job.column,
            "--batch": job.batch,
            "--part-rows": job.part_rows,
            "--seed": job.seed,
        }

    def _identity(self) -> str:
        return hashlib.sha256(json.dumps(self._of(), sort_keys=True).encode()).hexdigest()[:16]


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now if before.get(name) != now[name]
    )


def _bad_rows(store: Store, part: Part) -> list[tuple[int, str]]:
    """As its footer tells them."""
    with explain(store.url), store.fs.open(store.path(part.name), "rb") as file:
        footer = pq.read_metadata(file)
    return [tuple(pair) for pair in json.loads((footer.metadata or {}).get(_BAD, b"[]"))]


# ---- a worker ----


class BulkWorker:
    """Makes parts, one at a time.

    Args:
        schema: of the result; None before it is known.
        catalog, model: where there are any already; else what was shared, and the job's.
    """

    def __init__(
        self, job: BulkJob, schema: pa.Schema | None, catalog: Catalog | None = None, model: Model | None = None
    ) -> None:
        self._job, self._schema = job, schema
        self._shared, self._loaded = catalog, model
        self._reader: UnitReader | None = None

    def hello(self, cwd: str) -> None:
        """Answers when the network is loaded; `cwd` is the user's directory, where it is on this machine."""
        if os.path.isdir(cwd):
            os.chdir(cwd)
        self._model.check_predicts()

    @property
    def _model(self) -> Model:
        if self._loaded is None:
            job = self._job
            if job.threads:
                torch.set_num_threads(job.threads)
            self._loaded = load(job.run, job.step, device=job.device, args=job.args, code=job.code)
        return self._loaded

    @property
    def _catalog(self) -> Catalog:
        if self._shared is None:
            raw = open_store(self._job.target).read(_CATALOG)
            self._shared = Catalog.from_table(pa.ipc.open_file(pa.BufferReader(raw)).read_all())
        return self._shared

    def write(self, part: Part) -> Done:
        """Predicts for a part's rows and writes its file.

        Raises:
            UserError: a row can't be used and may not be left out; TaskError: the task raised.
        """
        assert self._schema is not None
        table = self._rows(part)
        values, bad = self._predict(table, part)
        if len(bad) > self._job.bad_rows:
            raise DataError(too_many(bad, self._job))
        found = column(values, self._schema.field(self._job.column).type)
        result = table.select(list(self._job.keep or ())).append_column(self._job.column, found)
        result = result.cast(self._schema).replace_schema_metadata({_BAD: json.dumps(bad)})
        sink = io.BytesIO()
        pq.write_table(result, sink, compression="zstd")
        open_store(self._job.target).write(part.name, sink.getvalue())
        return Done(part, bad)

    def guess(self, part: Part) -> pa.Schema:
        """Of the result, by the predictions for a part's first rows.

        Raises:
            UserError: none of them has a value for something.
        """
        first = self._rows(part).slice(0, self._job.batch)
        values, _ = self._predict(first, part)
        kind = column([value for value in values if value is not None]).type
        if _holds_nothing(kind):
            raise UserError(
                f"the first {first.num_rows} predictions are {kind}: what kind the missing values are of can't be told "
                "from them; have `predict` return the same kind for every row"
            )
        kept = first.select(list(self._job.keep or ())).schema
        return pa.schema([*kept, pa.field(self._job.column, kind)])

    def _rows(self, part: Part) -> pa.Table:
        if self._reader is None:
            needed = [name for name in self._model.columns.needed if name in self._catalog.schema.names]
            columns = list(dict.fromkeys([*needed, *(self._job.keep or ())]))
            self._reader = UnitReader(self._catalog, columns, keep_bytes=0)
        for unit in range(part.first, part.last):
            self._reader.start(unit, float(unit))
        return pa.concat_tables([self._reader.read(unit) for unit in range(part.first, part.last)])

    def _predict(self, table: pa.Table, part: Part) -> tuple[list[Any], list[tuple[int, str]]]:
        """A result for each row, None for a bad one, and the bad ones."""
        filled = self._model.columns.filled(table)
        values: list[Any] = []
        bad: list[tuple[int, str]] = []
        size = 1 if self._model.streams else self._job.batch
        for first in range(0, table.num_rows, size):
            rows = one_batch(filled.slice(first, size))
            ids = np.arange(rows.num_rows, dtype=np.int64) + part.row + first
            found = self._model.of_rows(rows, ids, self._job.seed)
            values += [None if one.error else one.value for one in found]
            bad += [(int(row), one.error) for row, one in zip(ids, found, strict=True) if one.error]
        return values, bad


def too_many(bad: Sequence[tuple[int, str]], job: BulkJob) -> str:
    """What is told of rows that may not be left out."""
    row, reason = bad[0]
    return (
        f"{len(bad):,} row(s) of {job.source} can't be used and --bad-rows allows {job.bad_rows:,}; the first is row "
        f"{row:,}: {reason}. With a larger --bad-rows they get no prediction, and the rest is kept"
    )


def _holds_nothing(kind: pa.DataType) -> bool:
    return bool(pa.types.is_null(kind)) or any(map(_holds_nothing, _children(kind)))


def _children(kind: pa.DataType) -> Iterator[pa.DataType]:
    return (kind.field(i).type for i in range(kind.num_fields))
