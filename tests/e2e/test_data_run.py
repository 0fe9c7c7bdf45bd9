"""The data of real runs: the audit, rows that can't be used, and batches made in processes of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from harness import dltrain, events, make_spec, make_table, steps, write_data, write_documents, write_spec

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


@pytest.mark.long
def test_batches_made_in_other_processes_are_the_same(run_in: Any, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "train")}
    for name, processes in (("alone", 0), ("helped", 2)):
        done = run_in(name=name, data={**data, "collate_workers": processes}, train={"steps": 15}, workers=1)
        assert done.code == 0, done.err
    alone, helped = (steps(tmp_path / "runs" / name) for name in ("alone", "helped"))
    assert [line["loss"] for line in alone.values()] == [line["loss"] for line in helped.values()]


# ---- several datasets ----


def mixed(tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Three rows of `web` for one of `books`."""
    write_data(tmp_path / "web", rows=150, seed=2)
    write_data(tmp_path / "books", rows=70, files=1, seed=3)
    sources = {"web": 3, "books": 1}
    return {"mix": [{"name": n, "url": str(tmp_path / n), "weight": w} for n, w in sources.items()], **more}


@pytest.mark.long
def test_a_mix_resumed_with_other_workers_and_its_audit(run_in: Any, tmp_path: Path) -> None:
    data = mixed(tmp_path)
    assert run_in(data=data, train={"steps": 5}, workers=2).code == 0
    assert run_in(data=data, train={"steps": 12}, workers=3).code == 0
    done = run_in(data=data, train={"epochs": 2}, workers=1)
    assert done.code == 0, done.err
    # Two epochs of 220 rows: 330 of web, 110 of books.
    code, lines = audit(tmp_path)
    assert code == 0
    assert lines == [
        "web epoch 0: 150/150 rows exactly once, 0 substituted",
        "web epoch 1: 150/150 rows exactly once, 0 substituted",
        "web epoch 2: 30/150 rows so far, each exactly once, 0 substituted",
        "books epoch 0: 70/70 rows exactly once, 0 substituted",
        "books epoch 1: 40/70 rows so far, each exactly once, 0 substituted",
    ]
    whole = run_in(name="whole", data=data, train={"epochs": 2}, workers=2)
    assert whole.code == 0, whole.err
    ids = [[line["batch_id"] for line in steps(tmp_path / "runs" / name).values()] for name in ("tiny", "whole")]
    assert len(ids[0]) == 28
    assert ids[0] == ids[1]


def test_faults_of_a_mix_are_found_and_named(run_in: Any, tmp_path: Path) -> None:
    data = mixed(tmp_path, bad_rows=100, end="drop")
    damage(tmp_path / "books" / "part-0.parquet", 1)
    # The file is as it is when the run is planned.
    assert run_in(data=data, train={"epochs": 1}, batch={"global": 64}).code == 0
    listed = [json.loads(line) for line in (tiny(tmp_path) / "quarantine.jsonl").read_text().splitlines()]
    assert {line["source"] for line in listed} == {"books"}
    assert {line["row"] for line in listed} <= set(range(16, 32))
    dropped = [line for line in events(tiny(tmp_path)) if line["event"] == "dropped"]
    assert {line["source"] for line in dropped} == {"web", "books"}
    assert sum(len(line["rows"]) for line in dropped) == 220 % 64
    path = manifests(tmp_path)[-1]
    manifest = json.loads(path.read_text())
    manifest["audit"]["1:0"][1] = f"{int(manifest['audit']['1:0'][1], 16) ^ 1:016x}"
    path.write_text(json.dumps(manifest))
    code, lines = audit(tmp_path)
    assert code == 1
    assert [line.startswith("books epoch 0") and "not the rows expected" in line for line in lines] == [False, True]


# ---- packing ----


@pytest.mark.long
def test_a_language_model_on_packed_tokens(run_in: Any, tmp_path: Path) -> None:
    tokens = write_documents(tmp_path / "text", 120)
    more = write_documents(tmp_path / "more", 40, seed=1)
    write_documents(tmp_path / "held-out", 30, seed=2)
    data = {
        "mix": [{"name": n, "url": str(tmp_path / n)} for n in ("text", "more")],
        "eval": str(tmp_path / "held-out"),
        "pack": {"column": "tokens", "length": 32},
    }
    lm = {"task": "tasks:TinyLm", "data": data, "batch": {"global": 4, "micro": 2}, "optim": {"lr": 0.03}}
    plan = dltrain("plan", str(write_spec(tmp_path, make_spec(tmp_path, **lm))), "--json").json["data"]
    rows = [source["rows"] for source in plan["sources"]]
    # A row group packs by itself, so at most a row of it is short.
    assert all(r >= t / 32 for r, t in zip(rows, (tokens, more), strict=True))
    assert sum(rows) < (tokens + more) / 32 + plan["row_groups"]
    assert run_in(**lm, train={"steps": 6}, workers=1).code == 0
    done = run_in(**lm, train={"epochs": 4}, workers=2)
    assert done.code == 0, done.err
    assert run_in(**lm, name="whole", train={"epochs": 4}, workers=2).code == 0
    two, one = (steps(tmp_path / "runs" / name) for name in ("tiny", "whole"))
    assert [line["batch_id"] for line in two.values()] == [line["batch_id"] for line in one.values()]
    losses = [line["loss"] for line in one.values()]
    np.testing.assert_allclose([line["loss"] for line in two.values()], losses, rtol=1e-5, atol=1e-8)
    assert losses[-1] < 0.5 * losses[0]
    # The next token is the last one plus one, which a bigram model learns from any documents.
    assert done.json["eval"]["loss"] < 0.5 * losses[0]
    code, lines = audit(tmp_path)
    assert code == 0
    assert lines[0] == f"text epoch 0: {rows[0]}/{rows[0]} rows exactly once, 0 substituted"


# ---- filters and columns of paths ----


@pytest.mark.long
def test_a_filtered_run_over_partitions(run_in: Any, tmp_path: Path) -> None:
    for i, part in enumerate(("lang=de", "lang=fr")):
        write_data(tmp_path / "parts" / part, rows=90, files=1, seed=i)
    data = {"train": str(tmp_path / "parts"), "filter": [["lang", "==", "fr"], ["y", ">", 0]]}
    kept = int((make_table(90, 1)["y"].to_numpy() > 0).sum())
    assert run_in(data=data, train={"epochs": 1}, workers=2).code == 0
    # The rows are found once: what a resumed run needs is in its plan.
    done = run_in(data=data, train={"epochs": 2}, workers=1)
    assert done.code == 0, done.err
    assert audit(tmp_path) == (0, [f"epoch {e}: {kept}/{kept} rows exactly once, 0 substituted" for e in (0, 1)])
    refused = run_in(data={**data, "filter": [["lang", "==", "de"]]}, train={"epochs": 2})
    assert refused.code == 2
    assert "data.filter" in refused.json["error"]
