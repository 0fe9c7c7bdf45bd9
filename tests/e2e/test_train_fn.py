"""dltrain in a train function of Ray Train: the weights of `dltrain run`, resumed by others and after a failure."""

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
import torch
from harness import dltrain, make_spec, write_data, write_spec
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("train_program.py")
Fit = Callable[..., dict[str, Any]]
SPEC = {"train": {"steps": 20, "eval_every": 5}, "checkpoint": {"every": 5}}


@pytest.fixture
def ask(tmp_path: Path, ray_address: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Has a TorchTrainer run a spec on the session's Ray."""
    write_data(tmp_path / "train")
    write_data(tmp_path / "test", rows=90, seed=1)
    path = f"{harness.ROOT}{os.pathsep}{harness.ROOT / 'tests'}"

    def go(workers: int, spec: dict[str, Any], **asked: Any) -> subprocess.CompletedProcess[str]:
        question = {
            "address": ray_address,
            "spec": make_spec(tmp_path, **{"data": {"train": "train", "eval": "test"}, "runs": "runs", **spec}),
            "cwd": str(tmp_path),
            "workers": workers,
            "results": str(tmp_path / "results"),
            "env": {"PYTHONPATH": path},
            **asked,
        }
        return subprocess.run(
            [sys.executable, str(PROGRAM)],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            timeout=harness.SECONDS,
            check=False,
        )

    return go


@pytest.fixture
def fit(ask: Any) -> Fit:
    def go(workers: int, spec: dict[str, Any], **asked: Any) -> dict[str, Any]:
        done = ask(workers, spec, **asked)
        answers = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(answers[-1].removeprefix("RESULT "))
        return found

    return go


def weights(run: Path) -> dict[str, torch.Tensor]:
    target = run / "weights.safetensors"
    done = dltrain("checkpoint", "export", str(run), "--to", str(target), "--step", "newest", "--json")
    assert done.code == 0, done.err
    return load_file(target)


def checkpoints(run: Path) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = dltrain("checkpoint", "list", str(run), "--json").json["checkpoints"]
    return table


def whole(tmp_path: Path, ray_address: str, **changes: Any) -> Path:
    """What `dltrain run` makes of the same spec."""
    data = {"train": str(tmp_path / "train"), "eval": str(tmp_path / "test")}
    spec = make_spec(tmp_path, **{"data": data, **SPEC, "name": "whole", "workers": 2, **changes})
    done = dltrain("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    assert done.code == 0, done.err
    return tmp_path / "runs" / "whole"


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rel: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rel, atol=rel)


@pytest.mark.long
def test_the_weights_of_a_run(fit: Fit, tmp_path: Path, ray_address: str) -> None:
    metrics = fit(2, SPEC)
    run = tmp_path / "runs" / "tiny"
    done = [json.loads((tmp_path / f"done-{rank}.json").read_text()) for rank in range(2)]
    assert done[0] == done[1]
    assert (done[0]["status"], done[0]["step"]) == ("finished", 20)
    assert done[0]["metrics"]["loss"] == pytest.approx(metrics["loss"])
    assert metrics["step"] == 20
    assert metrics["train_loss"] > 0
    assert metrics["run"] == str(run)
    # Two of them, and the best.
    table = checkpoints(run)
    assert table[-1]["step"] == 20
    assert 2 <= len(table) <= 3
    assert any(row["best"] for row in table)
    assert dltrain("checkpoint", "verify", str(run)).code == 0
    assert dltrain("audit", str(run)).code == 0
    assert not list(run.rglob("note-*.json"))
    close(weights(run), weights(whole(tmp_path, ray_address)), 1e-6)


@pytest.mark.long
def test_other_workers_go_on(fit: Fit, tmp_path: Path, ray_address: str) -> None:
    fit(2, {**SPEC, "train": {"steps": 10, "eval_every": 5}})
    metrics = fit(1, {**SPEC, "engine": {"zero": 2}})
    assert metrics["step"] == 20
    run = tmp_path / "runs" / "tiny"
    assert checkpoints(run)[-1]["num_ranks"] == 1
    assert dltrain("audit", str(run)).code == 0
    close(weights(run), weights(whole(tmp_path, ray_address)), 1e-4)
    # And `dltrain run` goes on from there.
    data = {"train": str(tmp_path / "train"), "eval": str(tmp_path / "test")}
    longer = make_spec(tmp_path, **{"data": data, **SPEC, "train": {"steps": 25, "eval_every": 5}})
    done = dltrain("run", str(write_spec(tmp_path, longer)), "--json", "--address", ray_address)
    assert done.code == 0, done.err
    assert (done.json["steps"], done.json["samples"]) == (25, 5 * 16)


@pytest.mark.long
def test_after_a_failure_it_goes_on(fit: Fit, tmp_path: Path) -> None:
    bait = tmp_path / "bait"
    bait.write_text("once")
    # A row that is trained in the third quarter or so; the process that finds the file then ends.
    metrics = fit(2, {**SPEC, "task": "tasks:DiesOnce", "args": {"bait": str(bait), "step": 12}}, max_failures=1)
    assert not bait.exists()
    assert metrics["step"] == 20
    run = tmp_path / "runs" / "tiny"
    assert dltrain("audit", str(run)).code == 0
    assert checkpoints(run)[-1]["step"] == 20
    assert len(list((run / "attempts").iterdir())) == 2


@pytest.mark.long
def test_without_evaluation_the_training_loss_is_reported(fit: Fit, tmp_path: Path) -> None:
    metrics = fit(2, {**SPEC, "data": {"train": str(tmp_path / "train")}})
    assert metrics["step"] == 20
    assert metrics["train_loss"] > 0
    assert "loss" not in metrics


def test_a_mistake_is_told_as_it_is(ask: Any) -> None:
    done = ask(1, {**SPEC, "data": {"train": "nowhere"}})
    assert done.returncode != 0
    assert "data.train: found no Parquet at" in done.stdout + done.stderr
