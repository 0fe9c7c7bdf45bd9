"""Predictions for a whole dataset: the same files in any number of starts, whole or not there, and each mistake."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import harness
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from use_tasks import trained

import dltrain
from dltrain import cli
from dltrain.data.catalog import read_catalog
from dltrain.errors import DataError, TaskError, UserError
from dltrain.using import bulk as bulk_module
from dltrain.using.bulk import Bulk, BulkJob, BulkWorker, parts_of
from dltrain.using.spread import predict_all


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(harness.ROOT / "tests")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three files of 67 rows, in row groups of 16."""
    return harness.write_data(tmp_path / "scans", rows=201, files=3, group=16, seed=5)


def job(tmp_path: Path, task: str = "use_tasks:Sums", to: str = "to", **changes: Any) -> BulkJob:
    args = changes.pop("spec_args", {})
    run = trained(tmp_path, task, args=args, name="tiny" if task.endswith("Sums") else task.rpartition(":")[2])
    return BulkJob(run=run, step=7, source=str(tmp_path / "scans"), target=str(tmp_path / to), **changes)


def files(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in sorted(os.listdir(directory))}


def test_rows_come_out_in_order_with_what_is_kept(tmp_path: Path, source: Path) -> None:
    one = job(tmp_path, batch=10)
    seen: list[tuple[int, int]] = []
    done = predict_all(one, progress=lambda *numbers: seen.append(numbers))
    assert (done["rows"], done["files"], done["bad_rows"], done["workers"]) == (201, 3, [], 1)
    assert seen == [(0, 201), (67, 201), (134, 201), (201, 201)]
    before, after = pq.read_table(source), pq.read_table(tmp_path / "to")
    assert after.column_names == ["x", "y", "prediction"]
    assert after.select(["x", "y"]).equals(before)
    # The same as by hand, batch for batch.
    model = dltrain.load(one.run)
    by_hand = [one for part in range(3) for one in model.predict(before.slice(part * 67, 67), batch=10)]
    assert after["prediction"].to_pylist() == by_hand
    # dltrain reads what it wrote.
    assert read_catalog(str(tmp_path / "to")).num_rows == 201


@pytest.mark.parametrize(("keep", "names"), [(("y",), ["y", "p"]), ((), ["p"])])
def test_what_is_kept(tmp_path: Path, source: Path, keep: tuple[str, ...], names: list[str]) -> None:
    predict_all(job(tmp_path, keep=keep, column="p"))
    assert pq.read_table(tmp_path / "to").column_names == names


def test_parts_depend_on_the_data_alone(source: Path) -> None:
    catalog = read_catalog(str(source))
    parts = parts_of(catalog, 1000)
    assert [(p.name, p.row, p.rows) for p in parts] == [(f"part-0000{i}.parquet", 67 * i, 67) for i in range(3)]
    # 16 + 16, 16 + 16, 3 rows of each file.
    small = parts_of(catalog, 32)
    assert [p.rows for p in small] == [32, 32, 3] * 3
    assert [p.row for p in small] == [0, 32, 64, 67, 99, 131, 134, 166, 198]
    # A row group that is larger than a part is one by itself.
    assert [p.rows for p in parts_of(catalog, 1000, part_bytes=1)] == [16, 16, 16, 16, 3] * 3


def test_partition_columns_are_kept(tmp_path: Path) -> None:
    for lang in ("de", "fr"):
        harness.write_data(tmp_path / "scans" / f"lang={lang}", rows=20, files=1)
    predict_all(job(tmp_path, keep=("lang",)))
    assert pq.read_table(tmp_path / "to")["lang"].to_pylist() == ["de"] * 20 + ["fr"] * 20


def test_interrupted_and_begun_again(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict_all(job(tmp_path, "use_tasks:Rolls", to="whole"))
    write, made = BulkWorker.write, []

    def dies(worker: BulkWorker, part: Any) -> Any:
        made.append(part.number)
        if len(made) == 2:
            raise KeyboardInterrupt
        return write(worker, part)

    monkeypatch.setattr(BulkWorker, "write", dies)
    one = job(tmp_path, "use_tasks:Rolls")
    with pytest.raises(KeyboardInterrupt):
        predict_all(one)
    # Nobody takes half of it for whole.
    assert "part-00001.parquet" not in os.listdir(tmp_path / "to")
    with pytest.raises(DataError, match="is not complete"):
        read_catalog(str(tmp_path / "to"))
    said: list[str] = []
    done = predict_all(one, say=said.append)
    assert said == ["going on: 1 of 3 files are there"]
    assert made == [0, 1, 1, 2]
    assert (done["rows"], done["files_before"]) == (201, 1)
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "to")
    assert {n: d for n, d in whole.items() if n.startswith("part")} == {n: d for n, d in parts.items() if n[0] == "p"}
    # Once more: there is nothing left to do.
    assert predict_all(one)["files_before"] == 3
    assert made == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "holds other predictions: --seed was 0 and is 1"),
        ({"keep": ("y",)}, "--keep was"),
        ({"batch": 3}, "--batch was 256 and is 3"),
        ({"args": {"dropout": 0.5}}, "args was {} and is"),
    ],
)
def test_another_job_into_the_same_place(tmp_path: Path, source: Path, change: dict[str, Any], told: str) -> None:
    predict_all(job(tmp_path))
    with pytest.raises(UserError, match=told):
        predict_all(job(tmp_path, **change))


def test_other_data_or_weights_into_the_same_place(tmp_path: Path, source: Path) -> None:
    one = job(tmp_path)
    predict_all(one)
    trained(tmp_path, step=9)
    with pytest.raises(UserError, match=r"model was .*step-00000007.* and is .*step-00000009"):
        predict_all(BulkJob(one.run, 9, one.source, one.target))
    harness.write_data(source, rows=30, files=1, seed=9)
    with pytest.raises(UserError, match=r"data was '.*201 rows.* and is .*164 rows"):
        predict_all(one)


def test_rows_that_cannot_be_used(tmp_path: Path, source: Path) -> None:
    refused = [i for i, y in enumerate(pq.read_table(source)["y"].to_pylist()) if y > 0.8]
    assert 3 < len(refused) < 150
    args = {"spec_args": {"refused_y": 0.8}}
    with pytest.raises(DataError, match=rf"--bad-rows allows 0; the first is row {refused[0]}: y is out of range"):
        predict_all(job(tmp_path, **args))
    # Too many over all parts together, though no part has so many.
    with pytest.raises(DataError, match="can't be used"):
        predict_all(job(tmp_path, bad_rows=len(refused) - 1, **args))
    done = predict_all(job(tmp_path, bad_rows=len(refused), **args))
    assert [bad["row"] for bad in done["bad_rows"]] == refused
    found = pq.read_table(tmp_path / "to")["prediction"].to_pylist()
    assert [i for i, value in enumerate(found) if value is None] == refused
    # Of files that an earlier start has written they are counted too.
    with pytest.raises(DataError, match="can't be used"):
        predict_all(job(tmp_path, bad_rows=1, **args))


def test_mistakes(tmp_path: Path, source: Path) -> None:
    with pytest.raises(TaskError, match="KeyError"):
        predict_all(job(tmp_path, "use_tasks:Raises", to="a"))
    with pytest.raises(UserError, match="returned results of another kind, and the first ones were int64"):
        predict_all(job(tmp_path, "use_tasks:Wavers", to="b", batch=50))
    with pytest.raises(UserError, match=r"has no column 'z'"):
        predict_all(job(tmp_path, keep=("z",)))
    with pytest.raises(UserError, match="has a column 'y' already; name the predictions otherwise"):
        predict_all(job(tmp_path, column="y"))
    with pytest.raises(UserError, match="found no Parquet"):
        predict_all(BulkJob(job(tmp_path).run, 7, str(tmp_path / "nothing"), str(tmp_path / "to")))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 1 file\(s\), mine.txt among them"):
        predict_all(job(tmp_path, to="taken"))
    pq.write_table(pa.table({"y": [1.0]}), tmp_path / "lacking.parquet")
    with pytest.raises(UserError, match="no column 'x'"):
        predict_all(BulkJob(job(tmp_path).run, 7, str(tmp_path / "lacking.parquet"), str(tmp_path / "to"), keep=()))
    with pytest.raises(UserError, match="needs the column 'x', and the data has"):
        predict_all(BulkJob(job(tmp_path).run, 7, str(tmp_path / "lacking.parquet"), str(tmp_path / "to")))
    # None of them has left anything that looks like a result.
    assert not (tmp_path / "to").exists()


def test_pictures_are_bytes_in_the_result(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import use_tasks

    draw = use_tasks.Sums.draw
    predict = use_tasks.Sums.predict
    monkeypatch.setattr(use_tasks.Sums, "predict", lambda s, m, batch: draw(s, batch, predict(s, m, batch)))
    predict_all(job(tmp_path, keep=()))
    kind = pq.read_schema(tmp_path / "to" / "part-00000.parquet").field("prediction").type
    assert [field.name for field in kind] == ["media_type", "data", "caption"]
    first = pq.read_table(tmp_path / "to")["prediction"][0].as_py()
    assert first["data"].startswith(b"\x89PNG")


def test_the_first_predictions_must_say_what_all_are(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import use_tasks

    monkeypatch.setattr(use_tasks.Sums, "predict", lambda _s, _m, batch: [{"value": None}] * len(batch.x))
    with pytest.raises(UserError, match=r"the first 67 predictions are struct<value: null>"):
        predict_all(job(tmp_path))


def test_the_command(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = job(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["predict", one.run, str(source), "--to", one.target, *arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    capsys.readouterr()
    code, out, err = call("--keep", "y", "--json")
    assert code == 0, err
    assert {**json.loads(out), "seconds": 0, "rows_per_second": 0} == {
        "run": "tiny",
        "step": 7,
        "source": str(source),
        "target": one.target,
        "rows": 201,
        "files": 3,
        "files_before": 0,
        "bad_rows": [],
        "workers": 1,
        "seconds": 0,
        "rows_per_second": 0,
    }
    code, out, _ = call("--keep", "y")
    assert f"wrote the predictions for 201 rows to {one.target} in 3 files" in out
    code, _, err = call("--keep", "none")
    assert code == 2
    assert "--keep was ['y'] and is []" in err
    assert sys.stdin is not None
    assert bulk_module.UNFINISHED not in os.listdir(one.target)
    assert Bulk(BulkJob(one.run, 7, one.source, one.target, keep=("y",), batch=64), dltrain.load(one.run)).is_complete
