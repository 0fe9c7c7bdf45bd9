"""The doctor on this machine and on a real Ray: all is well, and each planted fault is found, told and no hang."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import Done, dltrain, make_spec, write_data, write_spec
from leftovers import Leftovers

from dltrain.running.rundir import RunDir
from dltrain.spec import parse_spec

Doctor = Callable[..., Done]


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """Looks at a spec over good data, changed as asked."""

    def go(*arguments: str, env: dict[str, str] | None = None, **changes: Any) -> Done:
        data = {"train": str(tmp_path / "train"), "eval": str(tmp_path / "test")}
        spec = write_spec(tmp_path, make_spec(tmp_path, **{"data": data, **changes}))
        return dltrain("doctor", str(spec), "--json", *arguments, env=env)

    write_data(tmp_path / "train")
    write_data(tmp_path / "test", rows=90, seed=1)
    return go


def failed(done: Done) -> dict[str, str]:
    """What failed: name -> what was found; each says why and what to do."""
    bad = [f for f in done.json["findings"] if f["status"] == "fail"]
    assert all(f["why"] and f["todo"] for f in bad)
    return {f["name"]: f["found"] for f in bad}


def names(done: Done) -> set[str]:
    return {f["name"] for f in done.json["findings"]}


def test_a_machine_that_is_well_and_nothing_is_left(doctor: Doctor, tmp_path: Path) -> None:
    leftovers = Leftovers()
    done = doctor(env={**leftovers.env, "RAY_ADDRESS": ""})
    assert done.code == 0, done.out + done.err
    found = done.json
    assert (found["ok"], found["counts"]["fail"]) == (True, 0)
    expected = {"Python", "packages", "torch and DeepSpeed", "Ray", "all-reduce (gloo)", "metrics port"}
    assert names(done) >= expected | {"task", "data.train", "data.eval", "run directory", "batch", "workers"}
    ray = next(f for f in found["findings"] if f["name"] == "Ray")
    assert ray["found"].startswith("a private one is up in")
    assert "memory of the workers" in names(done)
    assert not (tmp_path / "runs").exists()
    harness.wait_for(lambda: not leftovers.found())


def test_a_cluster_that_is_well_but_small(doctor: Doctor, ray_address: str) -> None:
    done = doctor("--address", ray_address, workers=64, batch={"global": 64})
    # It may grow: no failure.
    assert done.code == 0, done.out + done.err
    found = {f["name"]: f for f in done.json["findings"]}
    assert set(found) >= {"same versions", "same source", "node to node", "shared run directory", "open files"}
    assert found["all-reduce (gloo)"]["found"].startswith("2 ranks on 1 node")
    assert (found["workers"]["status"], found["workers"]["found"][:32]) == ("warn", "room for 4 workers of 1 CPU; wor")
    # Once for this machine, and once for the node.
    assert sorted(bool(f["where"]) for f in done.json["findings"] if f["name"] == "/dev/shm") == [False, True]


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that nobody answers at: no Ray is started for what is not about Ray."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{probe.getsockname()[1]}"


def test_faults_of_a_spec(doctor: Doctor, tmp_path: Path, nowhere: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        changes = {
            "task": "tasks:NeedsMore",
            "runs": str(tmp_path / "file" / "runs"),
            "data": {"train": str(tmp_path / "train"), "eval": str(tmp_path / "nothing")},
            "metrics": {"port": busy.getsockname()[1]},
        }
        done = doctor("--address", nowhere, **changes)
    assert done.code == 1
    bad = failed(done)
    assert set(bad) == {"Ray", "run directory", "data.eval", "columns of data.train", "metrics port"}
    assert "Connection refused" in bad["Ray"]
    assert "Not a directory" in bad["run directory"]
    assert "no 'z'; there are x, y" in bad["columns of data.train"]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("nowhere:Task", "no module 'nowhere'"),
        ("tasks:NotATask", "is not a dltrain.Task"),
        ("broken.py:Broken", "No module named 'no_such_package'"),
    ],
)
def test_a_task_that_can_not_be_imported(doctor: Doctor, nowhere: str, tmp_path: Path, task: str, said: str) -> None:
    if task.startswith("broken"):
        (tmp_path / "broken.py").write_text("import no_such_package\nclass Broken: pass\n")
        task = str(tmp_path / task)
    done = doctor("--address", nowhere, task=task)
    assert done.code == 1
    assert said in failed(done)["task"]


def test_a_store_that_swallows_everything_holds_nobody_up(doctor: Doctor, nowhere: str) -> None:
    # It takes connections and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as hole:
        env = {
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{hole.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_REGION": "us-east-1",
        }
        begin = time.monotonic()
        done = doctor("--address", nowhere, "--timeout", "4", env=env, runs="s3://bucket/runs")
        assert time.monotonic() - begin < 60
    assert done.code == 1
    assert failed(done)["run directory"] == "no answer within 4 s"


@pytest.mark.long
def test_a_store_that_nobody_serves(doctor: Doctor, nowhere: str) -> None:
    env = {"AWS_ENDPOINT_URL_S3": f"http://{nowhere}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    done = doctor("--address", nowhere, env={**env, "AWS_REGION": "us-east-1"}, runs="s3://bucket/runs")
    assert done.code == 1
    assert "can't be reached" in failed(done)["run directory"]


@pytest.mark.long
def test_a_run_of_something_else(doctor: Doctor, nowhere: str, tmp_path: Path) -> None:
    other = parse_spec(make_spec(tmp_path, data={"train": "elsewhere"}))
    RunDir.of(other).save_spec(other)
    done = doctor("--address", nowhere)
    assert "holds a run of another task or other data" in failed(done)["same run"]


def test_for_people(doctor: Doctor, nowhere: str, tmp_path: Path) -> None:
    doctor("--address", nowhere)
    done = dltrain("doctor", str(tmp_path / "job.yaml"), "--address", nowhere, env={"COLUMNS": "160"})
    assert done.code == 1
    assert "must be changed" in done.out
    assert f"Ray: {nowhere}: Connection refused" in done.out
    assert "to do: start Ray there, or correct the address" in done.out
    assert "a run would fail: 1 failed" in done.out


def test_an_s3_store_that_is_well(doctor: Doctor, nowhere: str, s3: Any) -> None:
    s3.make_bucket("doctor")
    env = {**os.environ, **s3.env}
    done = doctor("--address", nowhere, env=env, runs="s3://doctor/runs")
    assert set(failed(done)) == {"Ray"}, done.out
    store = next(f for f in done.json["findings"] if f["name"] == "run directory")
    assert store["found"].startswith("s3://doctor/runs/tiny: write")
    listed = dltrain("list", "--json", env={**env, "DLTRAIN_RUNS": "s3://doctor/runs"})
    assert json.loads(listed.out) == {"runs": []}
    # Credentials that are refused are told as such.
    done = doctor("--address", nowhere, env={**env, "AWS_SECRET_ACCESS_KEY": "wrong"}, runs="s3://doctor/runs")
    assert "refuses the secret key" in failed(done)["run directory"]
