"""Trials of Ray Tune as runs: more of them than there is room for, ended early, killed, and wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import make_spec, steps, write_data

PROGRAM = Path(__file__).with_name("tune_program.py")
Search = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def search(tmp_path: Path, ray_address: str) -> Search:
    """Runs a search on the session's Ray, which has 4 CPUs."""
    write_data(tmp_path / "train")
    write_data(tmp_path / "test", rows=90, seed=1)
    path = f"{harness.ROOT}{os.pathsep}{harness.ROOT / 'tests'}"

    def go(grid: dict[str, list[Any]], spec: dict[str, Any], **asked: Any) -> list[dict[str, Any]]:
        data = {"train": "train", "eval": "test"}
        question = {
            "address": ray_address,
            "spec": make_spec(tmp_path, **{"data": data, "runs": "runs", **spec}),
            "grid": grid,
            # What is relative in the spec is so to this.
            "cwd": str(tmp_path),
            "results": str(tmp_path / "results"),
            "env": {"PYTHONPATH": path},
            **asked,
        }
        done = subprocess.run(
            [sys.executable, str(PROGRAM)],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            timeout=harness.SECONDS,
            check=False,
        )
        answers = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert answers, done.stdout + done.stderr
        found: list[dict[str, Any]] = json.loads(answers[-1].removeprefix("RESULT "))
        return found

    return go


def run_of(trial: dict[str, Any]) -> Path:
    return Path(trial["metrics"]["run"])


@pytest.mark.long
def test_more_trials_than_there_is_room_for(search: Search) -> None:
    """Each wants 2 of 4 CPUs; those that wait must not hold what others need."""
    grid = {"optim.lr": [1e-1, 1e-2, 1e-3, 1e-4, 1e-5]}
    found = search(grid, {"train": {"steps": 10, "eval_every": 5}, "workers": 2, "args": {"seconds": 0.02}})
    assert [trial["error"] for trial in found] == [""] * 5
    assert sorted(trial["config"]["optim.lr"] for trial in found) == sorted(grid["optim.lr"])
    for trial in found:
        metrics = trial["metrics"]
        assert (metrics["step"], metrics["status"], metrics["done"]) == (10, "finished", True)
        assert metrics["loss"] > 0
        assert metrics["mae"] > 0
        assert trial["reports"] == 2
        state = harness.state(run_of(trial))
        assert (state["state"], state["summary"]["steps"]) == ("finished", 10)
        assert len({line["batch_id"] for line in steps(run_of(trial)).values()}) == 10
    assert len({run_of(trial) for trial in found}) == 5
    # What the search proposed is what was trained with.
    for trial in found:
        saved = json.loads(json.dumps(trial["config"]))["optim.lr"]
        assert f"lr: {saved}" in (run_of(trial) / "spec.yaml").read_text().replace("1.0e", "1e")


@pytest.mark.long
def test_a_trial_that_is_ended_early_stops_cleanly(search: Search) -> None:
    spec = {"train": {"steps": 400, "eval_every": 40}, "workers": 1, "args": {"seconds": 0.02}}
    # One after the other: which trial is stopped depends on which were there before it.
    found = search({"optim.lr": [1e-2, 1e-9, 1e-8]}, spec, grace=40, at_once=1)
    assert [trial["error"] for trial in found] == [""] * 3
    by_rate = {trial["config"]["optim.lr"]: trial for trial in found}
    assert by_rate.pop(1e-2)["metrics"]["step"] == 400
    stopped = list(by_rate.values())
    assert [trial["metrics"]["step"] for trial in stopped] == [40, 40]
    for trial in stopped:
        state = harness.state(run_of(trial))
        assert state["state"] == "stopped"
        # Nothing of what it had trained is lost.
        table = harness.dltrain("checkpoint", "list", str(run_of(trial)), "--json").json["checkpoints"]
        assert table[-1]["step"] == state["summary"]["steps"] == max(steps(run_of(trial)))
        assert harness.dltrain("audit", str(run_of(trial))).code == 0


@pytest.mark.long
def test_a_trial_that_dies_goes_on_where_it_was(search: Search) -> None:
    spec = {
        "train": {"steps": 40, "eval_every": 10},
        "workers": 1,
        "args": {"seconds": 0.1},
        "checkpoint": {"every": 5},
    }
    (trial,) = search({"optim.lr": [1e-2]}, spec, kill=True, max_failures=1)
    assert trial["error"] == ""
    assert (trial["metrics"]["step"], trial["metrics"]["status"]) == (40, "finished")
    starts = [event for event in harness.events(run_of(trial)) if event["event"] == "start"]
    assert starts[0]["step"] == 0
    assert 5 <= starts[-1]["step"] < 40
    assert sorted(steps(run_of(trial))) == list(range(1, 41))
    assert harness.dltrain("audit", str(run_of(trial))).code == 0


def test_a_field_that_there_is_not(search: Search) -> None:
    with pytest.raises(AssertionError, match=r"did you mean 'lr'|optim\.lrr"):
        search({"optim.lrr": [1e-2]}, {"train": {"steps": 4}})
