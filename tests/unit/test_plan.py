"""The plan: what is stored comes back, and is the same for everyone; several datasets, filters, packing, paths."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dltrain.data.catalog import Catalog
from dltrain.data.files import DataFile
from dltrain.data.footers import Footers
from dltrain.data.plan import Plan, check_plan, make_plan, open_footers, read_plan, save_footers
from dltrain.data.reader import UnitReader
from dltrain.errors import DataError, StoreError
from dltrain.spec import DataSpec
from dltrain.store import open_store

SCHEMA = pa.schema([("x", pa.float32())])


def catalog(rows: list[int], url: str = "data", files: int = 3) -> Catalog:
    """Of made-up files."""
    columns = {"file": np.arange(len(rows)) % files, "row_group": np.arange(len(rows)) // files}
    listed = tuple(DataFile(f"{url}/{i}.parquet", 100 + i, f"tag{i}") for i in range(files))
    return Catalog(url, listed, SCHEMA, pa.table({**columns, "rows": rows, "bytes": np.array(rows) * 4}))


def plan(**changes: Any) -> Plan:
    """Of two datasets and one to evaluate on."""
    given = {"seed": 3, "lanes": None, "window": None, "weights": (3, 1), "rows": [5, 9, 2] * 8, **changes}
    sources = {"web": (catalog(given["rows"]), given["weights"][0]), "books": (catalog([7] * 5), given["weights"][1])}
    return make_plan(sources, catalog([4]), 16, given["seed"], given["lanes"], given["window"])


def test_bytes_round_trip() -> None:
    before = plan()
    after = Plan.from_bytes(before.to_bytes())
    assert (after.plan_id, after.names, after.num_lanes, after.seed) == (
        before.plan_id,
        before.names,
        before.num_lanes,
        3,
    )
    for a, b in zip(before.catalogs, after.catalogs, strict=True):
        assert (a.url, a.files, a.schema, a.digest) == (b.url, b.files, b.schema, b.digest)
        assert a.units.equals(b.units)
    assert after.eval is not None
    assert after.to_bytes() == before.to_bytes()


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"lanes": 2}, {"window": 1}, {"weights": (2, 1)}, {"rows": [5, 9, 1] * 8}, {"rows": [16] * 8}],
)
def test_the_id_names_all_that_the_order_is_made_from(change: dict[str, Any]) -> None:
    assert plan(**change).plan_id != plan().plan_id
    assert plan().plan_id == plan().plan_id


def test_golden_id() -> None:
    """If this changes, no stored plan can be read any more: raise the plan version as well."""
    assert plan().plan_id == "bca4ef0729a39cbc"


def test_a_stored_plan_that_is_not_one() -> None:
    raw = plan().to_bytes()
    with pytest.raises(StoreError, match="can't be read"):
        Plan.from_bytes(raw[:100])
    table = pa.ipc.open_file(raw).read_all()
    sink = pa.BufferOutputStream()
    other = table.replace_schema_metadata({b"dltrain.plan": b'{"version": 1}'})
    with pa.ipc.new_file(sink, table.schema.with_metadata(other.schema.metadata)) as writer:
        writer.write_table(other)
    with pytest.raises(StoreError, match="version 1, this dltrain reads 2: set another"):
        Plan.from_bytes(bytes(sink.getvalue()))
    swapped = table.slice(1, 1).to_pydict() | {"weight": [5]}
    wrong = pa.concat_tables([table.slice(0, 1), pa.table(swapped, table.schema)]).replace_schema_metadata(
        table.schema.metadata
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, wrong.schema) as writer:
        writer.write_table(wrong)
    with pytest.raises(StoreError, match="is damaged"):
        Plan.from_bytes(bytes(sink.getvalue()))


def test_a_large_plan_is_not_sent_to_the_ranks() -> None:
    assert plan().small_bytes == plan().to_bytes()
    assert plan(rows=np.random.default_rng(0).integers(1, 2**40, 100_000).tolist()).small_bytes is None


# ---- several datasets ----


@given(st.lists(st.integers(1, 5), min_size=2, max_size=3), st.integers(1, 3), st.integers(1, 40))
def test_a_mix_is_the_same_for_any_number_of_ranks(weights: list[int], num_ranks: int, size: int) -> None:
    sources = {f"s{i}": (catalog([3, 8, 1] * (i + 1)), weight) for i, weight in enumerate(weights)}
    mixed = make_plan(sources, None, size, seed=1)
    whole = list(mixed.rows(0, 5 * size))
    step = [mixed.rows(t * size, size) for t in range(5)]
    flat = sorted((s, e, int(i)) for s, e, ids in whole for i in ids)
    assert flat == sorted((s, e, int(i)) for s, e, ids in itertools.chain.from_iterable(step) for i in ids)
    assert len(set(flat)) == len(flat) == 5 * size
    for rank_parts in ([mixed.mixture.segments(0, size, r, num_ranks) for r in range(num_ranks)],):
        joined = [part for parts in rank_parts for part in parts]
        assert sum(p.segment.hi - p.segment.lo for p in joined) == size


def test_an_epoch_of_a_mix_is_as_many_rows_as_all_have() -> None:
    assert plan().num_rows == 8 * 16 + 35
    counts = np.zeros(2, int)
    for source, _, ids in plan().rows(0, 4 * 160):
        counts[source] += len(ids)
    assert counts.tolist() == [480, 160]


def test_datasets_of_the_same_shape_are_shuffled_apart() -> None:
    twins = make_plan({"a": (catalog([8] * 9), 1), "b": (catalog([8] * 9), 1)}, None, 16, seed=0)
    a, b = (order.batch(0, 72).tolist() for order in twins.mixture.orders)
    assert sorted(a) == sorted(b)
    assert a != b


def test_rows_of_a_mix_must_be_alike(tmp_path: Path) -> None:
    for name, kind in (("a", pa.int32()), ("b", pa.int64())):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"n": pa.array([1, 2], kind), "m": [1, 2]}), tmp_path / name / "0.parquet")
    data = DataSpec(mix=[{"name": n, "url": str(tmp_path / n)} for n in "ab"])  # type: ignore[list-item,misc]
    mixed = read_plan(data, 2, print)
    check_plan(mixed, ("m",), "m:Task")
    with pytest.raises(DataError, match=r"column 'n' is int32 in .*/a and int64 in .*/b"):
        check_plan(mixed, ("m", "n"), "m:Task")


# ---- footers ----


def test_a_filter_of_one_dataset_alone(tmp_path: Path) -> None:
    for name in ("web", "books"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"x": range(10)}), tmp_path / name / "a.parquet")
    mix = [
        {"name": "web", "url": str(tmp_path / "web"), "filter": [["x", "<", 8]]},
        {"name": "books", "url": str(tmp_path / "books")},
    ]
    said: list[str] = []
    found = read_plan(DataSpec.model_validate({"mix": mix, "filter": [["x", ">=", 3]]}), 2, said.append)
    assert [catalog.num_rows for catalog in found.catalogs] == [5, 7]
    assert [text.split(" keeps ")[0] for text in said] == [
        "data.mix (web): the filter",
        "data.mix (books): the filter",
    ]


def test_footers_are_kept_and_read_lazily_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.write_data(tmp_path / "train", rows=400, files=8, group=5)
    made = read_plan(DataSpec(train=str(tmp_path / "train"), eval=str(tmp_path / "train")), 16, print)
    store = open_store(tmp_path / "run")
    save_footers(store, made)
    stored = Plan.from_bytes(made.to_bytes())
    monkeypatch.setattr("dltrain.data.footers._BLOCK_BYTES", 700)
    asked: list[tuple[int, int]] = []
    read = type(store).read
    monkeypatch.setattr(type(store), "read", lambda self, name, a, b: asked.append((a, b)) or read(self, name, a, b))
    footers = open_footers(store, stored)
    assert not asked
    catalog = stored.catalogs[1]
    for file in catalog.files:
        assert footers[1](file).equals(pq.read_metadata(file.path))
    assert len(asked) == len(set(asked))
    assert all(b - a <= 700 for a, b in asked)
    monkeypatch.setattr("dltrain.data.reader.read_footer", None)
    reader = UnitReader(catalog, footers=footers[1])
    assert sum(reader.read(unit).num_rows for unit in range(catalog.num_units)) == 400
    reader.close()


def test_a_damaged_footer_is_no_crash() -> None:
    file = DataFile("a.parquet", 10, "", 0, 20)
    with pytest.raises(StoreError, match=r"footer of a.parquet kept with the plan is damaged"):
        Footers.held(b"\x10\0\0\0" + b"\xff" * 16)(file)


def test_footers_that_are_gone(tmp_path: Path) -> None:
    harness.write_data(tmp_path / "train")
    made = read_plan(DataSpec(train=str(tmp_path / "train")), 16, print)
    reader = UnitReader(made.catalogs[0], footers=open_footers(open_store(tmp_path / "run"), made)[0])
    with pytest.raises(StoreError, match=r"run/footers/0.bin is gone, which the plan needs"):
        reader.read(0)
    reader.close()


def test_on_resume_files_are_only_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.write_data(tmp_path / "train")
    made = read_plan(DataSpec(train=str(tmp_path / "train")), 16, print)
    stored = Plan.from_bytes(made.to_bytes())
    monkeypatch.setattr("dltrain.data.catalog.read_tail", None)
    assert list(stored.files_now()) == []
    (tmp_path / "train" / "part-9.parquet").write_bytes(b"more")
    [(changed, now)] = stored.files_now()
    assert (changed.url, len(changed.files), len(now)) == (str(tmp_path / "train"), 2, 3)


def test_a_catalog_that_was_replaced_in_has_its_own_digest() -> None:
    one = catalog([1, 2])
    assert dataclasses.replace(one, filter="x").digest != one.digest
