"""What real runs keep and show: callbacks, samples, traces, logs, trackers, and the report of all that."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import dltrain, make_spec, start, steps, wait_for, wait_for_step, write_data, write_spec

from dltrain.observing.journal import read_journal
from dltrain.observing.logs import read_logs
from dltrain.store import open_store


def tiny(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "tiny"


def board(run: Path) -> Any:
    """What TensorBoard's own reader makes of a run's event files."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def board_steps(run: Path, tag: str) -> list[int]:
    return [event.step for event in board(run).Scalars(tag)]


def report(run: Path) -> tuple[dict[str, Any], str]:
    done = dltrain("report", str(run), "--json")
    assert done.code == 0, done.err
    return done.json, Path(done.json["report"]).read_text()


@pytest.mark.long
def test_all_of_it_under_zero_3(run_in: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs dltrain[tensorboard]")
    data = {"train": str(tmp_path / "train"), "eval": str(tmp_path / "test")}
    done = run_in(
        task="tasks:Shows",
        engine={"zero": 3},
        data=data,
        train={"steps": 20, "eval_every": 10},
        checkpoint={"every": 10},
        trackers=["tensorboard"],
        profile={"steps": "6..8", "ranks": [0, 1]},
    )
    assert done.code == 0, done.err
    run, lines = tiny(tmp_path), steps(tiny(tmp_path))
    # Callbacks: what rank 0 logged of the mean over the global batch.
    logged = list(read_journal(open_store(run), "logged"))
    assert [line["step"] for line in logged] == [5, 10, 15, 20]
    for line in logged:
        assert line["values"]["twice"] == pytest.approx(2 * lines[line["step"]]["loss"], rel=1e-6)
        assert line["values"]["rank"] == 0
    # The other moments, on every rank, in the same order.
    said = {rank: [line.text for line in read_logs(open_store(run), rank) if " of 2: " in line.text] for rank in (0, 1)}
    moments = ["eval at step 10", "checkpoint at step 10", "eval at step 20", "checkpoint at step 20", "end at step 20"]
    for rank in (0, 1):
        assert said[rank] == [f"rank {rank} of 2: {moment}" for moment in moments]
    # Traces of the steps that were asked for, of both ranks.
    assert sorted(done.json["profiles"]) == [f"profile/step-00000006-rank-{rank}.json.gz" for rank in (0, 1)]
    for name in done.json["profiles"]:
        trace = json.loads(gzip.decompress((run / name).read_bytes()))["traceEvents"]
        assert {"step 6", "step 7", "step 8"} <= {event.get("name") for event in trace}
    # Samples.
    index = json.loads((run / "samples" / "step-00000020" / "index.json").read_text())
    assert [item["file"] for item in index["items"]] == ["00.png", "01.html", "02.txt"]
    assert (run / "samples" / "step-00000020" / "02.txt").read_text() == "16 rows"
    # The tracker has all of it, each step once.
    assert board_steps(run, "train/loss") == list(range(1, 21))
    assert board_steps(run, "eval/mae") == [10, 20]
    assert board_steps(run, "twice") == [5, 10, 15, 20]
    assert board(run).Images("samples/00")[-1].step == 20
    # And so has the report.
    facts, page = report(run)
    assert (facts["step"], facts["profiles"]) == (20, done.json["profiles"])
    assert facts["shown"][0]["items"] == 3
    for text in ("the rows", "what was found", "16 rows", "twice", "Evaluation: mae", done.json["profiles"][0]):
        assert text in page


# SQLAlchemy says of MLflow that it uses what will go.
@pytest.mark.filterwarnings("ignore")
def test_a_run_with_a_fault_and_a_stop_is_one_run_everywhere(tmp_path: Path, ray_address: str) -> None:
    pytest.importorskip("tensorboard", reason="needs dltrain[tensorboard]")
    mlflow = pytest.importorskip("mlflow", reason="needs dltrain[mlflow]")
    write_data(tmp_path / "train")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    spec = make_spec(
        tmp_path,
        task="tasks:Shows",
        args={"seconds": 0.15},
        train={"steps": 1000},
        checkpoint={"every": 1000},
        trackers={"tensorboard": {}, "mlflow": {"uri": uri}},
    )
    path, run = write_spec(tmp_path, spec), tiny(tmp_path)
    process = start("run", str(path), "--json", "--address", ray_address)
    live = wait_for_step(run, 12, process)
    os.kill(live["workers"][1]["pid"], signal.SIGKILL)
    wait_for(lambda: harness.state(run).get("restarts") == 1 and harness.state(run)["step"] >= 20, process)
    assert dltrain("stop", str(run), "--json").json["state"] == "stopped"
    first = harness.finish(process)
    assert (first.code, first.json["status"]) == (0, "stopped")
    facts, page = report(run)
    assert (facts["state"], facts["step"]) == ("stopped", first.json["steps"])
    last = first.json["steps"] + 10
    again = dltrain("run", str(path), f"train.steps={last}", "--json", "--address", ray_address)
    assert (again.code, again.json["steps"]) == (0, last), again.err
    # Steps that were made twice are told once.
    assert board_steps(run, "train/loss") == list(range(1, last + 1))
    assert board_steps(run, "twice") == list(range(5, last + 1, 5))
    client = mlflow.MlflowClient(tracking_uri=uri)
    (found,) = client.search_runs([client.get_experiment_by_name("dltrain").experiment_id])
    assert found.info.status == "FINISHED"
    told = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted(metric.step for metric in told) == list(range(1, last + 1))
    assert json.loads((run / "trackers.json").read_text())["step"] == last
    # The fault, and what it cost.
    facts, page = report(run)
    (fault,) = facts["faults"]
    assert (fault["cause"], fault["text"]) == ("signal", "rank 1 was ended by SIGKILL")
    assert 0 < fault["recovery_seconds"] < 60
    assert page.count('class="fault"') == 1
    assert len({line.attempt for line in read_logs(open_store(run), 1)}) == 3
    compared = dltrain("compare", str(run), str(run), "--to", str(tmp_path / "both.html"), "--json").json
    assert compared["figures"][0]["faults"] == [fault]


def test_samples_that_raise_end_nothing(run_in: Any, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "train"), "eval": str(tmp_path / "test")}
    done = run_in(task="tasks:Shows", args={"raises": "samples"}, data=data, train={"steps": 10, "eval_every": 5})
    assert (done.code, done.json["steps"]) == (0, 10)
    notes = [event["text"] for event in harness.events(tiny(tmp_path)) if event["event"] == "Note"]
    assert notes == ["step 5: no samples are shown (LookupError: nothing to look at); the run goes on"]
    assert not (tiny(tmp_path) / "samples").exists()


def test_a_callback_that_raises_ends_the_run(run_in: Any, tmp_path: Path) -> None:
    done = run_in(task="tasks:Shows", args={"raises": "callback"})
    assert done.code == 1
    assert "ArithmeticError: what a callback raises" in done.json["error"]
    assert done.err.count("raise ArithmeticError") == 1
    facts, page = report(tiny(tmp_path))
    assert (facts["state"], "what a callback raises" in facts["error"]) == ("failed", True)
    assert "It ended with an error" in page


def test_the_end_of_a_dead_workers_log_is_in_the_error(run_in: Any, tmp_path: Path) -> None:
    done = run_in(task="tasks:Crashes", args={"bad_row": 7}, faults={"restarts_per_hour": 1})
    assert done.code == 1
    error = done.json["error"]
    for words in ("SIGSEGV", "about to read where nothing is", "Fatal Python error: Segmentation fault", "tasks.py"):
        assert words in error
    assert len(error.splitlines()) <= 25
    facts, page = report(tiny(tmp_path))
    assert [fault["cause"] for fault in facts["faults"]] == ["signal", "signal"]
    assert "about to read where nothing is" in page


@pytest.mark.long
def test_a_tracker_that_can_write_nowhere_ends_nothing(run_in: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs dltrain[tensorboard]")
    (tmp_path / "boards").write_text("not a directory")
    done = run_in(trackers={"tensorboard": {"dir": str(tmp_path / "boards")}})
    assert (done.code, done.json["steps"]) == (0, 20)
    assert done.err.count("the run goes on without it") == 1
