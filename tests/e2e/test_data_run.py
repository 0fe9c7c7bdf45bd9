"""The data of real runs: the audit, rows that can't be used, and batches made in processes of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from harness import dltrain, make_table, steps

TWO_EPOCHS = {"epochs": 2}


def tiny(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny"


def audit(tmp_path: Path) -> tuple[int, list[str]]:
    done = dltrain("audit", str(tiny(tmp_path)), "--json")
    return done.code, [line["text"] for line in done.json["epochs"]]


def damage(path: Path, group: int) -> None:
    """Wipes the header of a row group's first page."""
    column = pq.read_metadata(path).row_group(group).column(0)
    at = column.dictionary_page_offset or column.data_page_offset
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 64)


def manifests(tmp_path: Path) -> list[Path]:
    return sorted((tiny(tmp_path) / "checkpoints").rglob("manifest.json"))


def test_the_audit_of_a_run_whose_workers_changed(run_in: Any, tmp_path: Path) -> None:
    assert run_in(train={"steps": 8}, workers=2).code == 0
    assert run_in(train={"steps": 17}, workers=3, batch={"global": 20}).code == 0
    assert run_in(train={"steps": 30}, workers=1).code == 0
    code, lines = audit(tmp_path)
    assert code == 0
    assert lines == [
        "epoch 0: 200/200 rows exactly once, 0 substituted",
        "epoch 1: 200/200 rows exactly once, 0 substituted",
        "epoch 2: 116/200 rows so far, each exactly once, 0 substituted",
    ]


def test_a_planted_fault_fails_the_audit(run_in: Any, tmp_path: Path) -> None:
    assert run_in(train=TWO_EPOCHS).code == 0
    path = manifests(tmp_path)[-1]
    whole = path.read_text()
    manifest = json.loads(whole)
    manifest["audit"]["0:1"][0] -= 1
    path.write_text(json.dumps(manifest))
    assert audit(tmp_path) == (
        1,
        ["epoch 0: 200/200 rows exactly once, 0 substituted", "epoch 1: 1 of 200 rows missing"],
    )
    manifest = json.loads(whole)
    manifest["audit"]["0:0"][1] = f"{int(manifest['audit']['0:0'][1], 16) ^ 1:016x}"
    path.write_text(json.dumps(manifest))
    done = dltrain("audit", str(tiny(tmp_path)))
    assert done.code == 1
    assert "not the rows expected" in done.out


def test_a_damaged_row_group_is_an_error_until_it_may_be_replaced(run_in: Any, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "train")}
    run_in(train={"steps": 1}, name="unharmed")
    damage(tmp_path / "train" / "part-1.parquet", 2)
    refused = run_in(train=TWO_EPOCHS)
    assert refused.code == 2
    assert "part-1.parquet: row group 2 can't be decoded" in refused.json["error"]
    assert "data.bad_rows" in refused.json["error"]
    done = run_in(train=TWO_EPOCHS, data={**data, "bad_rows": 100})
    assert done.code == 0, done.err
    # Rows 132-147: 16 rows in each of two epochs.
    listed = [json.loads(line) for line in (tiny(tmp_path) / "quarantine.jsonl").read_text().splitlines()]
    assert {(line["epoch"], line["row"]) for line in listed} == {(e, r) for e in (0, 1) for r in range(132, 148)}
    assert "row group 2" in listed[0]["reason"]
    code, lines = audit(tmp_path)
    assert code == 0
    assert lines == [f"epoch {e}: 200/200 rows exactly once, 16 substituted" for e in (0, 1)]


def test_more_bad_rows_than_allowed_end_the_run(run_in: Any, tmp_path: Path) -> None:
    y = make_table(200)["y"].to_numpy()
    limit = float(np.sort(y)[-9])
    args = {"refused_y": limit}
    few = run_in(train={"epochs": 1}, args=args, data={"train": str(tmp_path / "train"), "bad_rows": 8})
    assert few.code == 0, few.err
    code, lines = audit(tmp_path)
    assert (code, lines) == (0, ["epoch 0: 200/200 rows exactly once, 8 substituted"])
    shutil.rmtree(tiny(tmp_path))
    many = run_in(train={"epochs": 1}, args=args, data={"train": str(tmp_path / "train"), "bad_rows": 7})
    assert many.code == 1
    assert "data.bad_rows allows 7" in many.json["error"]
    assert "y is out of range" in many.json["error"]


def test_batches_made_in_other_processes_are_the_same(run_in: Any, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "train")}
    for name, processes in (("alone", 0), ("helped", 2)):
        done = run_in(name=name, data={**data, "collate_workers": processes}, train={"steps": 15}, workers=1)
        assert done.code == 0, done.err
    alone, helped = (steps(tmp_path / "runs" / name) for name in ("alone", "helped"))
    assert [line["loss"] for line in alone.values()] == [line["loss"] for line in helped.values()]
