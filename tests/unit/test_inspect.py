"""data inspect: what it finds, and what it says is to be fixed."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dltrain import cli
from dltrain.data.advice import advise
from dltrain.data.content import what_it_holds
from dltrain.data.inspect import inspect_data, order_facts
from dltrain.data.progress import ProgressBar, human_bytes, human_seconds
from dltrain.errors import DataError, StoreError, UserError

MIB = 1024 * 1024


def write(path: Path, table: pa.Table, group: int, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group, **options)
    return path


def picture(form: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out, form)
    return out.getvalue()


def problems(url: Path | str, **options: Any) -> list[str]:
    return [item["problem"] for item in inspect_data(str(url), **options)["advice"]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    table = pa.table(
        {
            "image": [{"bytes": picture("JPEG"), "path": ""}] * 100,
            "label": pa.array([None if i % 10 == 0 else i for i in range(100)], pa.int32()),
            "raw": pa.array([b"12345678"] * 100, pa.binary(8)),
            "tokens": pa.array([[1, 2, 3]] * 100, pa.list_(pa.int64())),
            "text": ["word"] * 100,
        }
    )
    write(tmp_path / "data" / "a.parquet", table.slice(0, 60), 20, compression="zstd")
    write(tmp_path / "data" / "b.parquet", table.slice(60), 30, compression="snappy")
    return tmp_path / "data"


def test_what_there_is(data: Path) -> None:
    found = inspect_data(str(data), global_batch=10, workers=2)
    assert json.loads(json.dumps(found)) == found
    assert (found["rows"], found["files"]["count"], found["row_groups"]["count"]) == (100, 2, 5)
    assert found["row_groups"]["rows"] == {"min": 10, "median": 20, "max": 30, "total": 100}
    assert found["files"]["bytes"]["total"] == sum(path.stat().st_size for path in data.iterdir())
    columns = {column["name"]: column for column in found["columns"]}
    assert {name: column["holds"] for name, column in columns.items()} == {
        "image": "jpeg images",
        "label": "numbers",
        "raw": "8 raw bytes",
        "tokens": "lists of int64",
        "text": "text",
    }
    assert columns["label"]["nulls"] == 10
    assert columns["tokens"]["list_length"] == 3
    assert columns["text"]["compression"] == ["SNAPPY", "ZSTD"]
    groups = (
        pq.read_metadata(path).row_group(g)
        for path, n in zip(sorted(data.iterdir()), (3, 2), strict=True)
        for g in range(n)
    )
    wire = [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
    assert sum(column["compressed_bytes"] for column in found["columns"]) == sum(wire)
    assert found["row_groups"]["compressed_bytes"] == {
        "min": min(wire), "median": sorted(wire)[2], "max": max(wire), "total": sum(wire)
    }  # fmt: skip


def test_bytes_in_memory_are_those_of_the_decoded_rows(tmp_path: Path) -> None:
    # Kept once in a dictionary, so that the file says little of what a row group takes.
    table = pa.table({"text": ["x" * 1000] * 2000, "y": np.zeros(2000)})
    write(tmp_path / "a.parquet", table, 1000)
    found = inspect_data(str(tmp_path))["row_groups"]
    assert found["compressed_bytes"]["max"] < 10_000
    assert found["decoded_bytes"]["max"] == pytest.approx(table.slice(0, 1000).nbytes, rel=0.01)


def test_only_footers_and_a_few_rows_are_read(tmp_path: Path) -> None:
    image = np.random.default_rng(0).bytes(500_000)
    pages: dict[str, Any] = {"use_dictionary": False, "write_batch_size": 1}
    path = write(tmp_path / "a.parquet", pa.table({"image": [image] * 40}), 40, **pages)
    good = path.read_bytes()
    assert problems(tmp_path) == []
    # All but the beginning and the footer is damaged, and nobody notices.
    path.write_bytes(good[: 5 * MIB] + b"\xff" * (len(good) - 5 * MIB - 4096) + good[-4096:])
    assert problems(tmp_path) == []
    path.write_bytes(good[:4] + b"\xff" * 4096 + good[4100:])
    assert "a.parquet: row group 0 can't be decoded" in problems(tmp_path)[0]


def test_faults_of_files(data: Path) -> None:
    first = pq.read_table(data / "a.parquet")
    write(data / "c.parquet", first.slice(0, 0), 9)
    (data / "d.parquet").write_bytes(b"junk" * 9)
    write(data / "e.parquet", first.select(["image"]), 60)
    write(data / "f.parquet", first.set_column(1, "label", pa.array(["x"] * 60)), 60)
    found = problems(data)
    assert any(p.startswith("1 file not Parquet: ") and "d.parquet (36 bytes)" in p for p in found)
    assert any("differ in column 'label': int32 in 3 files" in p and "string in 1 file" in p for p in found)
    assert any("differ in column 'raw', 'text'" in p and "missing in 1 file" in p for p in found)
    assert any(p.startswith("1 file without rows") and "c.parquet" in p for p in found)


def test_partitions_and_empty_row_groups(tmp_path: Path) -> None:
    schema = pa.schema({"x": pa.int64()})
    for label in (1, 2, 3):
        path = tmp_path / f"label={label}" / "a.parquet"
        path.parent.mkdir()
        with pq.ParquetWriter(path, schema) as writer:
            for rows in (3, 0):
                writer.write_table(pa.table({"x": pa.array(range(rows), pa.int64())}), row_group_size=8)
    found = inspect_data(str(tmp_path))
    assert found["partitions"] == {"label": 3}
    assert (found["row_groups"]["count"], found["row_groups"]["empty"]) == (6, 3)
    assert found["advice"][0]["problem"] == "3 row groups without rows"


def test_the_codec_of_columns(tmp_path: Path) -> None:
    noise = [picture("JPEG") + np.random.default_rng(i).bytes(20_000) for i in range(50)]
    write(
        tmp_path / "a.parquet", pa.table({"image": noise, "y": range(50)}), 50, compression="gzip", use_dictionary=False
    )
    found = inspect_data(str(tmp_path))["advice"]
    assert "'image' holds jpeg images, compressed once more with GZIP" in found[0]["problem"]
    assert found[0]["fix"].endswith("--compression none")
    assert "'y' is compressed with GZIP" in found[1]["problem"]


@pytest.mark.parametrize(("value", "said"), [(0, "--global-batch is 0"), (-3, "--global-batch is -3")])
def test_refusals(tmp_path: Path, value: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        inspect_data(str(tmp_path), global_batch=value)
    with pytest.raises(DataError, match="found no Parquet at"):
        inspect_data(str(tmp_path))
    with pytest.raises(StoreError):
        inspect_data("nosuch://x")
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no Parquet: .*is not a Parquet file"):
        inspect_data(str(tmp_path))


# ---- advice, from facts that would take large files to make ----


def facts(group_bytes: list[int], wire: list[int] | None = None, workers: int = 8, batch: int = 256) -> dict[str, Any]:
    def spread(values: list[int]) -> dict[str, int]:
        return {
            "min": min(values),
            "median": sorted(values)[len(values) // 2],
            "max": max(values),
            "total": sum(values),
        }

    groups = {
        "count": len(group_bytes),
        "empty": 0,
        "decoded_bytes": spread(group_bytes),
        "compressed_bytes": spread(wire or group_bytes),
    }
    return {
        "url": "s3://b/my data",
        "files": {"empty": [], "not_parquet": []},
        "row_groups": groups,
        "columns": [],
        "schema_differences": [],
        "unreadable": [],
        "order": order_facts(groups, batch, workers),
    }


@pytest.mark.parametrize(
    ("found", "said", "megabytes"),
    [
        (facts([600 * MIB] * 100), "a row group takes 600.0 MiB in memory", "32"),
        (facts([400 * MIB]), "1 row group for 8 workers", "0.25"),
        (facts([16 * MIB] * 20), "20 row groups for 8 workers", "0.25"),
        (facts([64 * MIB] * 60), "60 row groups shuffle poorly into batches of 256", "2"),
        (facts([100_000] * 500_000), "500,000 row groups, half of them under 97.7 KiB", "32"),
    ],
)
def test_row_groups_of_a_bad_size(found: dict[str, Any], said: str, megabytes: str) -> None:
    item = next(item for item in advise(found) if said in item["problem"])
    command = shlex.split(item["fix"])
    assert command[:5] == ["dltrain", "data", "rewrite", "s3://b/my data", "s3://b/my data-rewritten"]
    assert command[5:] == ["--row-group-mb", megabytes]


def test_good_data_gets_no_advice() -> None:
    assert advise(facts([32 * MIB] * 2000)) == []
    assert advise(facts([50_000])) == []


def test_a_batch_without_divisors() -> None:
    item = advise(facts([32 * MIB] * 2000, batch=1021))[-1]
    assert "more divisors than 1021" in item["fix"]


@given(st.lists(st.integers(1, 1 << 36), min_size=1, max_size=40), st.integers(1, 5000), st.integers(1, 600))
def test_what_was_advised_is_not_found_fault_with(sizes: list[int], batch: int, workers: int) -> None:
    for item in advise(facts(sizes, batch=batch, workers=workers)):
        if "--row-group-mb" in item["fix"]:
            size = float(shlex.split(item["fix"])[-1]) * MIB
            count = max(1, round(sum(sizes) / size))
            again = advise(facts([int(sum(sizes) / count)] * count, batch=batch, workers=workers))
            assert not any("--row-group-mb" in other["fix"] for other in again)


# ---- contents ----


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([picture("PNG"), None]), "png images"),
        (pa.array([picture("PNG"), b"x", picture("PNG")]), "png images and others"),
        (pa.array([b"RIFF\0\0\0\0WAVEfmt "]), "wav audio"),
        (pa.array([b"x", b""]), "raw bytes"),
        (pa.array([None], pa.binary()), "bytes"),
        (pa.array([picture("JPEG")]).dictionary_encode(), "jpeg images"),
        (pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2)), "2 x float"),
        (pa.array([[[1]]]), "list<item: list<item: int64>>"),
        (pa.array([True]), "bool"),
    ],
)
def test_what_columns_hold(column: Any, expected: str) -> None:
    assert what_it_holds(column.type, column) == expected


# ---- the commands ----


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_table(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    code, out, _ = call(capsys, "inspect", str(data))
    assert code == 0
    out = " ".join(out.split())
    for part in ("100 rows in 5 row groups in 2 files", "jpeg", "row group in memory", "lanes", "--pack-lists"):
        assert part in out
    code, out, err = call(capsys, "inspect", str(data), "--json", "--workers", "3")
    assert (code, err) == (0, "")
    assert json.loads(out)["order"]["workers"] == 3


def test_inspect_then_rewrite_as_advised(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    _, out, _ = call(capsys, "inspect", str(data), "--json")
    (item,) = json.loads(out)["advice"]
    assert "lists of 3 numbers" in item["problem"]
    command = shlex.split(item["fix"])
    code, out, err = call(capsys, *command[2:], "--json")
    assert (code, err) == (0, "")
    done = json.loads(out)
    assert (done["rows"], done["lists"], done["row_groups"]) == (100, {"tokens": 3}, {"before": 5, "after": 1})
    _, out, _ = call(capsys, "inspect", command[4], "--json")
    assert json.loads(out)["advice"] == []
    code, out, err = call(capsys, *command[2:])
    assert code == 2
    assert "holds 1 file(s), part-00000.parquet among them" in err


def test_rewrite_for_people(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    target = str(data) + "-new"
    code, out, err = call(capsys, "rewrite", str(data), target, "--columns", "label, raw", "--fix-lists")
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote 100 rows to {target}: files 2 -> 1, row groups 5 -> 1, ")
    assert pq.read_table(target).column_names == ["label", "raw"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nowhere"], "found no Parquet at nowhere (nothing there)"),
        (["inspect", "nosuch://x"], "nosuch"),
        (["inspect", "s3://"], "names no bucket"),
        (["rewrite", "nowhere", "there"], "found no Parquet at nowhere (nothing there)"),
        (["rewrite", "nowhere", "there", "--compression", "lzma"], "can be zstd"),
        (["rewrite", "a", "b", "--fix-lists", "--pack-lists"], "give one of them"),
        (["rewrite", "a", "a"], "one within the other"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    code, out, _ = call(capsys, *arguments, "--json")
    assert json.loads(out)["exit_code"] == 2


@pytest.mark.parametrize("verb", ["inspect", "rewrite"])
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = call(capsys, verb, "--help")
    assert code == 0
    assert f"dltrain data {verb} s3://bucket/" in out


# ---- progress ----


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_without_a_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressBar("rewriting", stream=stream, clock=clock) as bar:
        for clock.now in (1, 9, 10, 15, 20):
            bar.update(int(clock.now * MIB), 100 * MIB)
    assert stream.getvalue().splitlines() == [
        "rewriting: 10.0 MiB of 100.0 MiB, 10 %, 1.0 MiB/s, 1 min 30 s left",
        "rewriting: 20.0 MiB of 100.0 MiB, 20 %, 1.0 MiB/s, 1 min 20 s left",
    ]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream, clock = Terminal(), Clock()
    with ProgressBar("footers", "files", patience=2, stream=stream, clock=clock) as bar:
        clock.now = 1
        bar.update(1, 10)
        assert stream.getvalue() == ""
        clock.now = 4
        bar.update(4, 10)
    assert "4 files of 10 files, 40 %, 1 files/s, 6 s left" in stream.getvalue()


def test_sizes_and_times() -> None:
    assert [human_bytes(v) for v in (0, 1023, 1536, 3 << 40)] == ["0 bytes", "1,023 bytes", "1.5 KiB", "3.0 TiB"]
    assert [human_seconds(v) for v in (0.4, 95, 7322)] == ["0 s", "1 min 35 s", "2 h 2 min"]
