"""The plan: what a run reads and in which order. Made once, stored in the run directory, the same on every rank.

    plan = read_plan(spec.data, global_batch=256, tell=print)
    plan.mixture.segments(consumed, size, rank, num_ranks)
    Plan.from_bytes(plan.to_bytes()).plan_id == plan.plan_id

Footers lie beside it, one file of them for each dataset (`save_footers`, `open_footers`): they are large, and
whoever needs one takes it from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from dltrain.data.catalog import Catalog, check_columns
from dltrain.data.dataset import Filter, read_dataset
from dltrain.data.files import DataFile, Files, list_files
from dltrain.data.footers import Footers
from dltrain.data.identity import plan_id
from dltrain.data.mixture import Mixture
from dltrain.data.order import I64, Order, choose_lanes, key
from dltrain.data.packing import Pack
from dltrain.data.progress import ProgressBar
from dltrain.errors import DataError, StoreError
from dltrain.spec import DataSpec
from dltrain.store import Store, explain, filesystem

__all__ = ["Plan", "Source", "check_plan", "make_plan", "open_footers", "read_plan", "save_footers"]

_VERSION = 2
_META = b"dltrain.plan"
# The purpose of a derived key; the others are in `order`, `identity` and `windows`.
_SOURCE = 12
_EVAL = "eval"
# A filter that takes no longer than this needs no progress bar.
_SLOW_SECONDS = 2.0
_SMALL_BYTES = 256 * 1024


@dataclass(frozen=True)
class Source:
    """A dataset to train on: its name, its share of the rows, and how many units a lane shuffles together."""

    name: str
    weight: int
    window_units: int
    catalog: Catalog


@dataclass(frozen=True)
class Plan:
    """What a run reads and in which order.

    Attributes:
        eval: what it is evaluated on.
    """

    sources: tuple[Source, ...]
    eval: Catalog | None
    num_lanes: int
    seed: int

    @cached_property
    def plan_id(self) -> str:
        """Names the order of samples: of the data, and of all that the order is made from."""
        parts = [(s.catalog.digest, s.weight, s.window_units) for s in self.sources]
        return plan_id(parts, self.num_lanes, self.seed)

    @cached_property
    def mixture(self) -> Mixture:
        """The order of the training samples."""
        orders = [
            Order(s.catalog.unit_rows, self.num_lanes, s.window_units, _seed(self.seed, i))
            for i, s in enumerate(self.sources)
        ]
        return Mixture(orders, [s.weight for s in self.sources])

    @property
    def num_rows(self) -> int:
        """Of all sources together: the positions of one epoch."""
        return sum(s.catalog.num_rows for s in self.sources)

    @property
    def num_units(self) -> int:
        """Of all sources together."""
        return sum(s.catalog.num_units for s in self.sources)

    @property
    def schema(self) -> pa.Schema:
        """Of the training rows."""
        return self.sources[0].catalog.schema

    @property
    def catalogs(self) -> tuple[Catalog, ...]:
        """All that there are: those to train on, and the one to evaluate on."""
        return (*(s.catalog for s in self.sources), *([self.eval] if self.eval else []))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources."""
        return tuple(s.name for s in self.sources)

    def rows(self, consumed: int, size: int) -> Iterator[tuple[int, int, I64]]:
        """Source, epoch and row ids (within their source) of positions [consumed, consumed + size)."""
        for part in self.mixture.segments(consumed, size):
            s = part.segment
            yield (
                part.source,
                s.epoch,
                self.mixture.orders[part.source].window_ids(s.epoch, s.lane, s.window)[s.lo : s.hi],
            )

    def files_now(self) -> Iterator[tuple[Catalog, list[DataFile]]]:
        """The catalogs whose files are others today, with those that there are, by listing alone."""
        for catalog in self.catalogs:
            with explain(catalog.url):
                now = list_files(*filesystem(catalog.url), catalog.url, "data")
            if not Files.of(catalog.files).same_versions(Files.of(now)):
                yield catalog, now

    # ---- what is stored ----

    def to_bytes(self) -> bytes:
        """As an Arrow IPC file with a line for each dataset."""
        lines = [_line(s.catalog, s.name, s.weight, s.window_units) for s in self.sources]
        lines += [_line(self.eval, _EVAL, 0, 0)] if self.eval else []
        numbers = {"version": _VERSION, "plan_id": self.plan_id, "num_lanes": self.num_lanes, "seed": self.seed}
        table = pa.concat_tables(lines).replace_schema_metadata({_META: json.dumps(numbers)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    @cached_property
    def small_bytes(self) -> bytes | None:
        """`to_bytes` where that is small enough to be sent to every rank; else they read it from the run directory."""
        raw = self.to_bytes()
        return raw if len(raw) <= _SMALL_BYTES else None

    @classmethod
    def from_bytes(cls, raw: bytes) -> Plan:
        """The inverse of `to_bytes`.

        Raises:
            StoreError: it is not a plan, or not one that this version reads.
        """
        try:
            table = pa.ipc.open_file(pa.BufferReader(raw)).read_all()
        except pa.ArrowException as error:
            raise StoreError(f"the stored plan can't be read: {error}") from None
        numbers = json.loads((table.schema.metadata or {}).get(_META, b"{}"))
        if numbers.get("version") != _VERSION:
            raise StoreError(
                f"the stored plan is of version {numbers.get('version')}, this dltrain reads {_VERSION}: set another "
                "`name` to start afresh, or delete the run's directory"
            )
        sources, evaluation = [], None
        for i in range(table.num_rows):
            line = table.slice(i, 1)
            name, weight, window = (line[column][0].as_py() for column in ("name", "weight", "window_units"))
            catalog = Catalog.from_table(line)
            if weight:
                sources.append(Source(name, weight, window, catalog))
            else:
                evaluation = catalog
        plan = cls(tuple(sources), evaluation, numbers["num_lanes"], numbers["seed"])
        if plan.plan_id != numbers["plan_id"]:
            raise StoreError(f"the stored plan is damaged: it holds {plan.plan_id} under the name {numbers['plan_id']}")
        return plan


def _seed(seed: int, source: int) -> int:
    # Datasets of the same shape are not to be shuffled alike.
    return key(seed, _SOURCE, source) if source else seed


def _line(catalog: Catalog, name: str, weight: int, window_units: int) -> pa.Table:
    own = pa.table({"name": [name], "weight": [weight], "window_units": [window_units]})
    stored = catalog.to_table()
    return pa.table(
        {**dict(zip(own.column_names, own, strict=True)), **dict(zip(stored.column_names, stored, strict=True))}
    )


def make_plan(
    catalogs: Mapping[str, tuple[Catalog, int]],
    evaluation: Catalog | None,
    global_batch: int,
    seed: int,
    lanes: int | None = None,
    window: int | None = None,
) -> Plan:
    """Chooses the lanes and the windows, unless they are given.

    Args:
        catalogs: name -> (catalog, weight).
    """
    chosen_lanes, chosen_window = choose_lanes(sum(c.num_units for c, _ in catalogs.values()), global_batch)
    lanes = lanes or chosen_lanes
    sources = tuple(
        Source(name, weight, window or min(chosen_window, max(1, catalog.num_units // lanes)), catalog)
        for name, (catalog, weight) in catalogs.items()
    )
    return Plan(sources, evaluation, lanes, seed)


def read_plan(data: DataSpec, global_batch: int, tell: Callable[[str], None]) -> Plan:
    """Reads what there is and plans a run over it.

    Args:
        tell: gets a sentence about what a filter keeps; while it reads a progress bar is on stderr.

    Raises:
        UserError: faults of the data, or of the storage.
    """
    packed = Pack(data.pack.column, data.pack.length) if data.pack else None

    def read(url: str, field: str, conditions: Filter = ()) -> Catalog:
        said: list[str] = []
        both = (*data.filter, *conditions)
        with ProgressBar(f"{field}: filter", "row groups", patience=_SLOW_SECONDS) as bar:
            catalog = read_dataset(
                url, data.columns, field, filter=both, pack=packed, tell=said.append, progress=bar.update
            )
        for text in said:
            tell(text)
        return catalog

    fields = ["data.train"] if data.train else [f"data.mix ({source.name})" for source in data.mix]
    catalogs = {s.name: (read(s.url, field, s.filter), s.weight) for s, field in zip(data.sources, fields, strict=True)}
    evaluation = read(data.eval, "data.eval") if data.eval else None
    return make_plan(catalogs, evaluation, global_batch, data.seed, data.lanes, data.window)


def check_plan(plan: Plan, columns: Sequence[str], who: str) -> None:
    """Raises DataError when a dataset lacks one of the columns that `who` needs, or two differ in its type."""
    for catalog in plan.catalogs:
        check_columns(catalog, columns, who)
    first = plan.sources[0].catalog
    for source in plan.sources[1:]:
        for name in columns:
            a, b = first.schema.field(name).type, source.catalog.schema.field(name).type
            if a != b:
                raise DataError(
                    f"data.mix: column {name!r} is {a} in {first.url} and {b} in {source.catalog.url}; "
                    "rows of both go into one batch: rewrite them alike, or leave the column out"
                )


def save_footers(store: Store, plan: Plan) -> None:
    """One file of them for each of the plan's datasets."""
    for i, catalog in enumerate(plan.catalogs):
        store.write(_footers_name(i), catalog.footers)


def open_footers(store: Store, plan: Plan) -> Sequence[Footers]:
    """Of each of the plan's datasets, in the order of `plan.catalogs`; nothing is read until it is needed."""
    return [_open_footers(store, i, catalog) for i, catalog in enumerate(plan.catalogs)]


def _open_footers(store: Store, index: int, catalog: Catalog) -> Footers:
    last = catalog.files[-1]
    size = last.footer_at + last.footer_bytes

    def read(start: int, end: int) -> bytes:
        try:
            return store.read(_footers_name(index), start, end)
        except FileNotFoundError:
            where = store.path(_footers_name(index))
            raise StoreError(f"{where} is gone, which the plan needs; restore it, or set another `name`") from None

    return Footers(read, size)


def _footers_name(index: int) -> str:
    return f"footers/{index}.bin"
