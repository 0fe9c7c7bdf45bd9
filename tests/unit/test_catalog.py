"""The catalog: what is found, and what each kind of bad data gets."""

from __future__ import annotations

import time
from pathlib import Path

import fsspec
import harness
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dltrain.data.catalog import Catalog, check_columns, read_catalog
from dltrain.data.reader import UnitReader
from dltrain.errors import DataError, StoreError


def write(path: Path, table: pa.Table, group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return harness.write_data(tmp_path / "data", rows=50, files=3, group=8)


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}", "{}/*.parquet", "{}/part-[0-2].parquet"])
def test_directory_url_and_glob_give_the_same(data: Path, form: str) -> None:
    found = read_catalog(form.format(data))
    assert (found.num_rows, len(found.files), found.num_units) == (50, 3, 8)
    assert found.digest == read_catalog(str(data)).digest


def test_a_single_file_of_any_name(tmp_path: Path) -> None:
    path = write(tmp_path / "no_suffix", harness.make_table(10))
    assert read_catalog(str(path)).num_rows == 10


def test_sub_directories_are_read_and_leftovers_are_not(data: Path) -> None:
    write(data / "deep" / "more.parquet", harness.make_table(6))
    for name in ("_SUCCESS", ".part-9.parquet.crc", "_temporary/part-0.parquet", "notes.txt"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(b"junk")
    assert read_catalog(str(data)).num_rows == 56


def test_row_groups_without_rows_are_no_units(tmp_path: Path) -> None:
    schema = pa.schema({"x": pa.int64()})
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for rows in (3, 0, 2):
            writer.write_table(pa.table({"x": pa.array(range(rows), pa.int64())}), row_group_size=8)
    assert read_catalog(str(tmp_path)).unit_rows.tolist() == [3, 2]


def test_bytes_count_only_the_columns_that_are_read(data: Path) -> None:
    everything, some = read_catalog(str(data)), read_catalog(str(data), ("y",))
    assert 0 < some.num_bytes < everything.num_bytes / 3


def test_a_large_footer_takes_two_reads(tmp_path: Path) -> None:
    table = pa.table({f"column_{i:04d}": [1, 2] for i in range(2000)})
    assert read_catalog(str(write(tmp_path / "wide.parquet", table, 1))).num_units == 2


def test_bytes_round_trip(data: Path) -> None:
    catalog = read_catalog(str(data), ("y",))
    again = Catalog.from_table(catalog.to_table())
    assert (again.digest, again.files, again.schema) == (catalog.digest, catalog.files, catalog.schema)
    assert again.units.equals(catalog.units)


def test_the_digest_sees_a_rewritten_file(data: Path) -> None:
    before = read_catalog(str(data)).digest
    write(data / "part-1.parquet", harness.make_table(17, seed=9), 8)
    assert read_catalog(str(data)).digest != before


def test_reading_units_gives_back_the_rows(data: Path) -> None:
    catalog = read_catalog(str(data), ("y",))
    reader = UnitReader(catalog, ("y",))
    table = pa.concat_tables([reader.read(unit) for unit in range(catalog.num_units)])
    assert table.column_names == ["y"]
    expected = pa.concat_tables([pq.read_table(f.path, columns=["y"]) for f in catalog.files])
    assert table.equals(expected)
    assert reader.bytes_read == catalog.num_bytes


def test_the_reader_keeps_no_more_than_it_may(data: Path) -> None:
    catalog = read_catalog(str(data))
    reader = UnitReader(catalog, keep_bytes=1)
    for _ in range(2):
        for unit in range(catalog.num_units):
            assert reader.read(unit).num_rows == catalog.unit_rows[unit]
    assert len(reader._units) == 1


def test_what_was_started_and_not_wanted_any_more_is_let_go(data: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(data), "/forgotten", recursive=True)
    reader = UnitReader(read_catalog("memory://forgotten"))
    try:
        for unit in (0, 0, 1):
            reader.start(unit, unit)
        for unit in (0, 1, 1, 2):
            reader.forget(unit)
        assert list(reader._started) == [0]
        assert reader.read(0).num_rows
        assert not reader._started
        assert reader._fetcher is not None
        while reader._fetcher.bytes_in_flight:
            time.sleep(0.01)
    finally:
        reader.close()
    with pytest.raises(RuntimeError, match="closed"):
        reader.read(3)


# ---- bad data ----


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.train: found no Parquet at .* \(nothing there\)"):
        read_catalog(str(tmp_path / "missing"), field="data.train")


def test_other_files_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n")
    with pytest.raises(DataError, match=r"1 other file\(s\) there"):
        read_catalog(str(tmp_path))


def test_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", harness.make_table(1).slice(0, 0))
    with pytest.raises(DataError, match="no rows"):
        read_catalog(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"x", b"not a parquet file at all", b"PAR1 \xff\xff\xff\x7fPAR1"])
def test_not_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path} \({len(content)} bytes\) is not a Parquet file"):
        read_catalog(str(tmp_path))


def test_schemas_that_differ(data: Path) -> None:
    write(data / "part-9.parquet", pa.table({"x": ["text"], "y": [1.0]}))
    with pytest.raises(DataError, match=r"column 'x' is .*float.* in .*part-0.parquet and string in .*part-9.parquet"):
        read_catalog(str(data))
    # Columns that nobody reads may differ.
    write(data / "part-9.parquet", pa.table({"x": ["text"], "y": pa.array([1.0], pa.float32())}))
    assert read_catalog(str(data), ("y",)).num_rows == 51


def test_a_missing_column(data: Path) -> None:
    with pytest.raises(DataError, match="has no column 'z'; it has 'x', 'y'"):
        read_catalog(str(data), ("x", "z"))
    with pytest.raises(DataError, match="has no column 'z', which m:Task needs"):
        check_columns(read_catalog(str(data)), ("z",), "m:Task")


def test_a_row_group_that_cannot_be_decoded(data: Path) -> None:
    path = sorted(data.glob("part-*.parquet"))[0]
    raw = bytearray(path.read_bytes())
    raw[4:300] = b"\xff" * 296
    path.write_bytes(raw)
    catalog = read_catalog(str(data))
    with pytest.raises(DataError, match=r"part-0.parquet: row group 0 can't be decoded"):
        UnitReader(catalog).read(0)


def test_an_unknown_kind_of_storage() -> None:
    with pytest.raises(StoreError):
        read_catalog("nosuch://bucket/data")
