"""Datasets as they are read: packed, filtered, with the columns of their paths."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import harness
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data import open_stream
from dltrain.data.batch import Batch, Keys
from dltrain.data.catalog import Catalog
from dltrain.data.columns import tensors
from dltrain.data.dataset import read_dataset
from dltrain.data.filters import Bounds, keep_rows, parse_filter
from dltrain.data.packing import NUM_TOKENS, SEGMENT_IDS, Pack
from dltrain.data.partitions import NULL, partition_schema, values_of
from dltrain.data.plan import Plan, make_plan
from dltrain.data.reader import UnitReader
from dltrain.data.stream import EvalStream
from dltrain.errors import DataError


def rows_of(catalog: Catalog, columns: list[str] | None = None) -> pa.Table:
    """All units' rows, end to end, read back from a stored plan."""
    stored = Plan.from_bytes(make_plan({"a": (catalog, 1)}, None, 8, 0).to_bytes()).catalogs[0]
    reader = UnitReader(stored, columns)
    try:
        tables = [reader.read(unit) for unit in range(stored.num_units)]
    finally:
        reader.close()
    assert [t.num_rows for t in tables] == stored.unit_rows.tolist()
    return pa.concat_tables(tables)


def flat(batches: list[dict[str, Any]]) -> list[int]:
    """The tokens of packed batches, without padding."""
    return [t for b in batches for row, n in zip(b["tokens"], b[NUM_TOKENS], strict=True) for t in row[:n].tolist()]


# ---- packing ----


def test_packed_units_hold_every_token_of_their_row_group(tmp_path: Path) -> None:
    tokens = harness.write_documents(tmp_path / "text")
    catalog = read_dataset(str(tmp_path / "text"), pack=Pack("tokens", 16))
    table = rows_of(catalog)
    assert table.column_names == catalog.schema.names == ["tokens", SEGMENT_IDS, NUM_TOKENS]
    assert pc.sum(table[NUM_TOKENS]).as_py() == tokens
    assert min(table[NUM_TOKENS].to_pylist()) > 0
    assert catalog.num_rows < tokens / 16 + catalog.num_units
    # Only the packed column is read.
    assert catalog.num_bytes < read_dataset(str(tmp_path / "text")).num_bytes


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_packed_stream_is_the_same_for_any_number_of_ranks(tmp_path: Path, num_ranks: int) -> None:
    sizes = [harness.write_documents(tmp_path / name, seed=i) for i, name in enumerate(("web", "books"))]

    def read(rank: int, ranks: int) -> list[dict[str, Any]]:
        with open_stream(
            {str(tmp_path / "web"): 1, str(tmp_path / "books"): 1},
            global_batch=8,
            rank=rank,
            num_ranks=ranks,
            pack=("tokens", 16),
            epochs=2,
        ) as stream:
            return list(stream)

    whole = read(0, 1)
    parts = [read(rank, num_ranks) for rank in range(num_ranks)]
    for step, batch in enumerate(whole):
        assert sorted(flat([p[step] for p in parts])) == sorted(flat([batch]))
        assert set(batch) == {"tokens", SEGMENT_IDS, NUM_TOKENS}
    assert abs(len(flat(whole)) - 2 * sum(sizes)) < sum(sizes)


def test_packed_rows_are_evaluated_once(tmp_path: Path) -> None:
    tokens = harness.write_documents(tmp_path / "text")
    catalog = read_dataset(str(tmp_path / "text"), pack=Pack("tokens", 16))

    def collate(rows: pa.RecordBatch, _: Keys) -> Batch:
        found = tensors(rows)
        return Batch(int(found[NUM_TOKENS].sum()), **found)

    total = 0.0
    for rank in range(3):
        chunks = EvalStream(catalog.unit_rows, UnitReader(catalog), collate, chunk_rows=5, rank=rank, num_ranks=3)
        total += sum(batch.count for chunk, batch in chunks if chunk >= 0)
        chunks.close()
    assert total == tokens


def test_what_cannot_be_packed(tmp_path: Path) -> None:
    harness.write_documents(tmp_path / "text")
    with pytest.raises(DataError, match="'lang' is string; packing needs lists"):
        read_dataset(str(tmp_path / "text"), pack=Pack("lang", 16))
    with pytest.raises(DataError, match="no column 'nope'"):
        read_dataset(str(tmp_path / "text"), pack=Pack("nope", 16))


# ---- filters ----

ROWS: list[dict[str, Any]] = [
    {
        "n": i if i % 5 else None,
        "f": float("nan") if i % 7 == 0 else i / 4,
        "s": f"{i // 8:02d}" if i % 6 else None,
        "day": datetime.date(2024, 1, 1) + datetime.timedelta(i),
        "at": datetime.datetime(2024, 1, 1, i % 24, tzinfo=datetime.UTC),
        "price": decimal.Decimal(i) / 4,
        "flag": i % 3 == 0,
        "id": i,
    }
    for i in range(64)
]
TYPES = {
    "n": pa.int32(),
    "f": pa.float64(),
    "s": pa.string(),
    "day": pa.date32(),
    "at": pa.timestamp("us", "UTC"),
    "price": pa.decimal128(9, 2),
    "flag": pa.bool_(),
    "id": pa.int64(),
}
TABLE = pa.table({name: pa.array([row[name] for row in ROWS], kind) for name, kind in TYPES.items()})
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(-1, 65),
    "f": st.integers(-4, 70).map(lambda i: i / 4),
    "s": st.integers(-1, 9).map("{:02d}".format),
    "day": st.integers(-1, 66).map(lambda i: datetime.date(2024, 1, 1) + datetime.timedelta(i)),
    "price": st.integers(-1, 70).map(lambda i: decimal.Decimal(i) / 4),
    "flag": st.booleans(),
}
PYTHON: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "in": lambda a, b: a in b,
    "not in": lambda a, b: a not in b,
}


@st.composite
def conditions(draw: Any) -> list[Any]:
    column = draw(st.sampled_from(sorted(VALUES)))
    op = draw(st.sampled_from([*PYTHON, "is null", "not null"]))
    if op.endswith("null"):
        return [column, op]
    value = draw(st.lists(VALUES[column], min_size=1, max_size=3) if op.endswith("in") else VALUES[column])
    return [column, op, value]


def holds(row: dict[str, Any], column: str, op: str, value: Any = None) -> bool:
    found = row[column]
    if op == "is null":
        return found is None
    return found is not None if op == "not null" else found is not None and PYTHON[op](found, value)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sorted as it is, so that statistics tell much."""
    path = tmp_path_factory.mktemp("filtered")
    pq.write_table(TABLE.slice(0, 40), path / "0.parquet", row_group_size=7)
    pq.write_table(TABLE.slice(40), path / "1.parquet", row_group_size=5)
    return str(path)


@given(st.lists(conditions(), min_size=1, max_size=3))
@settings(max_examples=120)
def test_a_filter_keeps_the_rows_that_meet_it(data: str, filter: list[list[Any]]) -> None:
    expected = [row["id"] for row in ROWS if all(holds(row, *item) for item in filter)]
    if not expected:
        with pytest.raises(DataError, match=r"no row of .* meets data.filter"):
            read_dataset(data, ["id"], filter=filter)
        return
    catalog = read_dataset(data, ["id"], filter=filter)
    assert rows_of(catalog, ["id"])["id"].to_pylist() == expected
    assert catalog.num_rows == len(expected)


@given(conditions(), st.data())
@settings(max_examples=200)
def test_statistics_never_contradict_the_rows(item: list[Any], draw: Any) -> None:
    lo = draw.draw(st.integers(0, 63))
    table = TABLE.slice(lo, draw.draw(st.integers(1, 64 - lo)))
    [condition] = parse_filter([item], TABLE.schema, "url")
    known = [v for v in table[item[0]].to_pylist() if v is not None and v == v]
    nulls = table[item[0]].null_count
    ends = (min(known), max(known)) if known else (None, None)
    verdict = condition.verdict(Bounds(*ends, nulls, table.num_rows))
    keep = keep_rows([condition], table)
    assert verdict is None or keep.all() == keep.any() == verdict
    assert condition.verdict(Bounds(*ends, None, table.num_rows)) in (None, verdict)
    assert condition.verdict(Bounds(None, None, None, table.num_rows)) is None


def reads(data: str, filter: list[list[Any]], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """How many row groups a filter reads, and what it says."""
    read, said = [], list[str]()
    load = UnitReader._load
    monkeypatch.setattr(UnitReader, "_load", lambda self, unit: read.append(unit) or load(self, unit))
    read_dataset(data, ["id"], filter=filter, tell=said.append)
    return len(read), said


@pytest.mark.parametrize(
    ("filter", "num_read"),
    [([["id", "<", 14]], 0), ([["id", "<", 17]], 1), ([["id", "in", [0, 63]]], 2), ([["id", "not null"]], 0)],
)
def test_row_groups_that_statistics_decide_about_are_not_read(
    data: str, filter: list[list[Any]], num_read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = reads(data, filter, monkeypatch)
    assert found == num_read
    assert f"of which {num_read} had to be read" in said[-1]


def test_a_scan_says_how_far_it_is_and_what_came_out(data: str) -> None:
    said: list[str] = []
    seen: list[tuple[int, int]] = []
    read_dataset(
        data, filter=[["flag", "==", True]], tell=said.append, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 11) for done in range(1, 12)]
    assert said == ["data: the filter keeps 22 of 64 rows in 11 row groups, of which 11 had to be read"]


def test_a_filter_and_packing_count_the_tokens_that_stay(tmp_path: Path) -> None:
    harness.write_documents(tmp_path / "text")
    catalog = read_dataset(str(tmp_path / "text"), pack=Pack("tokens", 16), filter=[["lang", "==", "de"]])
    documents = pq.read_table(tmp_path / "text").to_pylist()
    expected = [t for d in documents if d["lang"] == "de" for t in d["tokens"] or []]
    table = rows_of(catalog)
    found = [t for row in table.to_pylist() for t in row["tokens"][: row[NUM_TOKENS]]]
    assert found == expected
    assert min(table[NUM_TOKENS].to_pylist()) > 0


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (["nope", "==", 1], "no column 'nope'; it has 'n', 'f'"),
        (["n", "==", "five"], "'n' is int32, which can't be compared with 'five' (str)"),
        (["n", "<", 1.5], "can't be compared with 1.5 (float)"),
        (["n", "<", 2**40], "can't be compared with 1099511627776"),
        (["n", "==", True], "can't be compared with True (bool)"),
        (["flag", "==", 1], "can't be compared with 1 (int)"),
        (["s", "==", 5], "can't be compared with 5 (int)"),
        (["f", "==", math.nan], "can't be compared with nan"),
        (["day", ">", "yesterday"], "can't be compared with 'yesterday'"),
        (["day", ">", 5], "can't be compared with 5"),
        (["s", "in", ["a", 5]], "can't be compared with 5 (int)"),
        (["s", "~", "a"], "found the operator '~'"),
    ],
)
def test_filters_that_make_no_sense(data: str, item: list[Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(data, filter=[item])
    assert said in str(caught.value)


def test_times_may_be_written_as_text(data: str) -> None:
    for value in ("2024-01-01T20:00:00", "2024-01-01T21:00:00+01:00", datetime.datetime(2024, 1, 1, 20)):
        catalog = read_dataset(data, filter=[["at", ">=", value]])
        assert catalog.num_rows == sum(row["at"].hour >= 20 for row in ROWS)
    assert read_dataset(data, filter=[["day", "==", "2024-01-09"]]).num_rows == 1
    assert read_dataset(data, filter=[["price", "<", 0.5]]).num_rows == 2


def test_lists_are_only_missing_or_not(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"t": [[1], None, []], "d": pa.array(["a", None, "b"]).dictionary_encode()}), tmp_path / "a.parquet"
    )
    assert read_dataset(str(tmp_path), filter=[["t", "not null"]]).num_rows == 2
    assert read_dataset(str(tmp_path), filter=[["d", "==", "b"]]).num_rows == 1
    with pytest.raises(DataError, match=r"'t' is list<element: int64>, which can't be compared"):
        read_dataset(str(tmp_path), filter=[["t", "==", 1]])


def test_filters_and_packing_over_a_store_that_is_not_local(tmp_path: Path) -> None:
    harness.write_documents(tmp_path / "text")
    store = fsspec.filesystem("memory")
    for path in (tmp_path / "text").glob("*.parquet"):
        store.pipe_file(f"/filtered/lang=de/{path.name}", path.read_bytes())
    given = {"filter": [["tokens", "not null"], ["lang", "==", "de"]], "pack": Pack("tokens", 16)}
    far, near = read_dataset("memory://filtered", **given), read_dataset(str(tmp_path / "text"), **given)
    assert rows_of(far).equals(rows_of(near))
    store.rm("/filtered", recursive=True)


def test_the_filter_is_part_of_what_the_data_are(data: str) -> None:
    digests = {read_dataset(data, filter=f).digest for f in ([], [["id", "<", 9]], [["id", "<=", 8]])}
    assert len(digests) == 3


def test_a_filtered_stream(data: str) -> None:
    with open_stream(data, ["id"], global_batch=4, filter=[["n", "not null"]]) as stream:
        ids = [i for batch in stream for i in batch["id"].tolist()]
    assert sorted(ids) == [i for i in range(64) if i % 5]


# ---- columns of paths ----


def write_partitions(root: Path, years: tuple[str, ...] = ("2023", "2024")) -> None:
    for i, (lang, year) in enumerate((lang, year) for lang in ("de", "fr%2Fca", NULL) for year in years):
        path = root / f"lang={lang}" / f"year={year}" / "part-0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table({"id": range(4 * i, 4 * i + 4)}), path, row_group_size=3)


def test_columns_of_paths_are_columns(tmp_path: Path) -> None:
    write_partitions(tmp_path)
    catalog = read_dataset(str(tmp_path))
    assert catalog.schema == pa.schema([("id", pa.int64()), ("lang", pa.string()), ("year", pa.int64())])
    table = rows_of(catalog)
    assert sorted({(r["lang"] or "", r["year"]) for r in table.to_pylist()}) == [
        (lang, year) for lang in ("", "de", "fr/ca") for year in (2023, 2024)
    ]
    assert rows_of(catalog, ["year", "id"]).column_names == ["year", "id"]
    assert rows_of(catalog, ["lang"]).num_rows == 24
    with open_stream(str(tmp_path), ["id", "year"], global_batch=8) as stream:
        assert {y for batch in stream for y in batch["year"].tolist()} == {2023, 2024}


@pytest.mark.parametrize(
    ("item", "expected"),
    [(["year", ">", 2023], 12), (["lang", "==", "fr/ca"], 8), (["lang", "is null"], 8), (["lang", "!=", "de"], 8)],
)
def test_filters_on_paths_read_nothing(
    tmp_path: Path, item: list[Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_partitions(tmp_path)
    assert read_dataset(str(tmp_path), filter=[item]).num_rows == expected
    assert reads(str(tmp_path), [item], monkeypatch)[0] == 0
    assert read_dataset(str(tmp_path), filter=[item, ["id", "!=", 18]]).num_rows in (expected - 1, expected)


def test_globs_and_single_files_have_the_columns_after_the_wildcard(tmp_path: Path) -> None:
    write_partitions(tmp_path)
    assert read_dataset(f"{tmp_path}/lang=*/year=2024/*.parquet").schema.names == ["id", "lang", "year"]
    assert read_dataset(f"{tmp_path}/lang=de").schema.names == ["id", "year"]
    assert read_dataset(f"{tmp_path}/lang=de/year=2024/part-0.parquet").schema.names == ["id"]


def test_a_column_of_the_file_wins_over_the_path(tmp_path: Path) -> None:
    (tmp_path / "id=9").mkdir()
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "id=9" / "a.parquet")
    assert rows_of(read_dataset(str(tmp_path)))["id"].to_pylist() == [1, 2]


def test_files_whose_partition_columns_differ(tmp_path: Path) -> None:
    write_partitions(tmp_path)
    (tmp_path / "lang=en").mkdir()
    pq.write_table(pa.table({"id": [1]}), tmp_path / "lang=en" / "a.parquet")
    with pytest.raises(DataError, match=r"lang, year in .*lang=.*part-0.parquet and lang in lang=en/a.parquet"):
        read_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("texts", "kind"),
    [(["1", "-2", "003"], pa.int64()), (["1", NULL], pa.int64()), (["1", "b"], pa.string()), ([NULL], pa.string())],
)
def test_types_of_path_columns(texts: list[str], kind: pa.DataType) -> None:
    schema = partition_schema([f"k={text}/a.parquet" for text in texts], "url", "data")
    assert schema.field("k").type == kind
    values = [values_of(f"root/k={text}/a.parquet", schema)["k"] for text in texts]
    assert pa.array(values, kind).null_count == texts.count(NULL)


def test_the_digest_knows_the_columns_of_paths(tmp_path: Path) -> None:
    write_partitions(tmp_path)
    whole, part = read_dataset(str(tmp_path)), read_dataset(f"{tmp_path}/lang=*/year=*/*.parquet")
    assert whole.digest == part.digest
    assert np.array_equal(whole.unit_rows, part.unit_rows)
