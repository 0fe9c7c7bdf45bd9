"""The command line where no Ray is needed: plan, and each mistake's message and exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import pytest

from dltrain import __version__, cli
from dltrain.running.requests import Requests
from dltrain.running.rundir import RunDir
from dltrain.spec import parse_spec
from dltrain.training.task import check_task, load_task


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(harness.ROOT / "tests")


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    harness.write_data(tmp_path / "train")
    return harness.make_spec(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: dict[str, Any], verb: str = "run") -> str:
    """The message of a run that is refused before Ray is started."""
    code, out, err = call(capsys, verb, str(harness.write_spec(tmp_path, spec)))
    assert code == 2, (out, err)
    assert "Traceback" not in out + err
    return err


def test_plan_shows_the_arithmetic(capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: dict[str, Any]) -> None:
    path = harness.write_spec(tmp_path, {**spec, "batch": {"global": 17, "micro": 4}})
    code, out, _ = call(capsys, "plan", str(path), "--json")
    assert code == 0
    plan = json.loads(out)
    assert plan["batch"]["sum"] == "17 rows = 2 workers x 3 micro-batches x 3 rows, 1 short in the last ones"
    assert plan["steps"]["total"] == 20
    workers = plan["data"]["workers"]
    assert sum(worker["rows"] for worker in workers) == plan["data"]["rows"] == 200
    assert all(0 < worker["bytes"] <= plan["data"]["bytes"] for worker in workers)
    assert plan["deepspeed"]["zero_optimization"] == {"stage": 1}
    # 321 parameters: weights and gradients in fp32; master and two moments over two workers.
    assert plan["memory"] == {
        "parameters": 321,
        "trained": 321,
        "weights": 1284,
        "gradients": 1284,
        "optimizer": 321 * 12 // 2,
        "total": 1284 + 1284 + 321 * 12 // 2,
        "offloaded": "none",
        "activations": "not estimated",
    }


def test_plan_for_people(capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: dict[str, Any]) -> None:
    code, out, _ = call(capsys, "plan", str(harness.write_spec(tmp_path, spec)))
    assert code == 0
    for part in ("global batch: 16 rows = 2 workers", "row groups", "321 parameters", '"stage": 1', "workers:"):
        assert part in out


def test_five_faults_one_message(capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: dict[str, Any]) -> None:
    bad = {**spec, "name": "a/b", "optim": {"lr": 0}, "batch": {"global": 0}, "engine": {"zero": 4}, "wrokers": 2}
    err = refusal(capsys, tmp_path, bad)
    lines = err.strip().splitlines()
    assert lines[0].endswith("5 faults")
    assert len(lines) == 6
    assert "did you mean 'workers'?" in err


@pytest.mark.parametrize("verb", ["run", "plan"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"train": "nowhere"}}, "data.train: found no Parquet at nowhere"),
        ({"task": "nowhere:Task"}, "no module 'nowhere'"),
        ({"task": "nowhere.py:Task"}, "no file"),
        ({"task": "tasks:Tyni"}, "has no class 'Tyni'; it has"),
        ({"batch": {"global": 1}}, "batch.global: 1 rows can't feed workers.min 2"),
        ({"runs": "nosuch://x"}, "nosuch"),
    ],
)
def test_refused_before_ray(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    spec: dict[str, Any],
    verb: str,
    change: dict[str, Any],
    said: str,
) -> None:
    assert said in refusal(capsys, tmp_path, {**spec, **change}, verb)


def test_wrong_arguments_of_the_task(capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: dict[str, Any]) -> None:
    err = refusal(capsys, tmp_path, {**spec, "args": {"depth": 3}}, "plan")
    assert "unexpected keyword argument 'depth'; Tiny(seconds" in err
    assert "derive your class" in refusal(capsys, tmp_path, {**spec, "task": "tasks:NotATask"}, "plan")


def test_a_task_that_is_not_python(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("class Task(\n")
    from dltrain.errors import UserError

    with pytest.raises(UserError, match=r"broken.py, line 1"):
        check_task("broken.py:Task", str(tmp_path))


def test_a_task_in_a_file() -> None:
    task = load_task("tasks.py:Tiny", {"seconds": 1.5}, str(harness.ROOT / "tests"))
    assert task.columns == ("x", "y")


# ---- the run directory ----


def begun(spec: dict[str, Any]) -> RunDir:
    """A run directory as a first start leaves it."""
    from dltrain.running.rundir import make_plan

    parsed = parse_spec(spec)
    run = RunDir.of(parsed)
    plan, _, _ = make_plan(parsed, run, print)
    run.save_spec(parsed)
    run.save_plan(plan)
    return run


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"args": {"seconds": 1.0}}, "args: {} in the run, {'seconds': 1.0} in the spec"),
        ({"task": "tasks:Dies"}, "task: 'tasks:Tiny' in the run, 'tasks:Dies' in the spec"),
    ],
)
def test_another_task_under_the_same_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    begun(spec)
    err = refusal(capsys, tmp_path, {**spec, **change})
    assert said in err
    assert "Set another `name`" in err


def test_another_seed_of_the_data(capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: dict[str, Any]) -> None:
    begun(spec)
    err = refusal(capsys, tmp_path, {**spec, "data": {**spec["data"], "seed": 5}})
    assert "data.seed: 0 in the run, 5 in the spec" in err


def test_data_that_changed(capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: dict[str, Any]) -> None:
    begun(spec)
    harness.write_data(tmp_path / "train", rows=230)
    assert re.search(
        r"2 files of [\d,]+ bytes when the run began, 2 of [\d,]+ bytes now", refusal(capsys, tmp_path, spec)
    )


def test_what_may_change(tmp_path: Path, spec: dict[str, Any]) -> None:
    run = begun(spec)
    other = parse_spec({**spec, "workers": 3, "engine": {"zero": 2}, "optim": {"lr": 0.5}})
    changes = run.check_same(other)
    assert changes == [
        "engine.zero: 1 -> 2",
        "optim.lr: 0.01 -> 0.5",
        "workers.max: 2 -> 3",
        "workers.min: 2 -> 3",
    ]


def test_attempts_are_claimed_once(tmp_path: Path, spec: dict[str, Any]) -> None:
    run = begun(spec)
    assert [run.claim_attempt(), run.claim_attempt(), RunDir.of(parse_spec(spec)).claim_attempt()] == [1, 2, 3]


def test_a_run_is_taken_over_by_a_later_start_and_never_taken_back(spec: dict[str, Any]) -> None:
    first, second = begun(spec), RunDir.of(parse_spec(spec))
    assert not first.is_replaced()
    first.claim_attempt()
    second.claim_attempt()
    assert (first.is_replaced(), second.is_replaced()) == (True, False)
    # The first does not know yet, and starts another attempt.
    first.claim_attempt()
    assert (first.is_replaced(), second.is_replaced()) == (True, False)


def test_requests_are_looked_for_in_the_background(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dltrain.running.requests._EVERY_SECONDS", 0.01)
    run = begun(spec)
    run.claim_attempt()
    with contextlib.closing(Requests(run)) as requests:
        time.sleep(0.1)
        assert (requests.stop, requests.replaced) == (False, False)
        run.request_stop()
        harness.wait_for(lambda: requests.stop)
        assert not run.store.exists("stop")
        other = RunDir.of(parse_spec(spec))
        other.claim_attempt()
        harness.wait_for(lambda: requests.replaced)
        # Meant for whoever has the run now.
        run.request_stop()
        time.sleep(0.1)
        assert run.store.exists("stop")


# ---- the short commands ----


@pytest.mark.parametrize(
    "arguments", [["status"], ["stop"], ["checkpoint", "list"], ["checkpoint", "verify"], ["checkpoint", "export"]]
)
def test_a_run_that_is_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("DLTRAIN_RUNS", str(tmp_path / "runs"))
    code, _, err = call(capsys, *arguments, "nothing")
    assert code == 2
    assert "no run 'nothing'" in err


def test_a_run_whose_driver_died(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any]
) -> None:
    run = begun(spec)
    run.store.write("state.json", json.dumps({"run": "tiny", "state": "running", "step": 7, "heartbeat": 1.0}).encode())
    monkeypatch.setenv("DLTRAIN_RUNS", str(tmp_path / "runs"))
    _, out, _ = call(capsys, "status", "tiny", "--json")
    assert json.loads(out)["state"] == "lost"
    code, _, err = call(capsys, "stop", "tiny")
    assert code == 2
    assert "is not running (lost)" in err
    _, out, _ = call(capsys, "list")
    assert re.search(r"tiny\s+│\s+lost", out)


def test_json_errors_are_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = call(capsys, "run", str(tmp_path / "none.yaml"), "--json")
    assert (code, json.loads(out)["exit_code"]) == (2, 2)


@pytest.mark.parametrize(
    "verb", ["run", "plan", "status", "list", "stop", "logs", "top", "submit", "jobs", "checkpoint", "data"]
)
def test_help_teaches(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    code, out, _ = call(capsys, verb, "--help")
    assert code == 0
    assert "Usage: dltrain" in out


def test_the_changelog_knows_this_version() -> None:
    assert f"## {__version__}" in (harness.ROOT / "CHANGELOG.md").read_text()


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dltrain.cli", "list"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert done.returncode in (1, 141)


def test_a_closed_connection_does_not_end_the_process() -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
