"""Ray jobs without Ray: what a submission is made of, what is refused before anything is sent, and following a log."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import pytest

from dltrain import cli
from dltrain.cli_jobs import _first_of
from dltrain.deploying.jobs import Follower, Job, _next_id, _normal
from dltrain.deploying.packing import Package
from dltrain.deploying.submission import Submission, is_local, prepare
from dltrain.errors import DltrainError, SpecError, UserError
from dltrain.running.worker import at_home
from dltrain.spec import parse_spec


def spec_of(**changes: Any) -> Any:
    made = {**harness.make_spec(Path("/nowhere")), "data": {"train": "s3://b/train"}, "runs": "s3://b/runs", **changes}
    return parse_spec(made)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "tasks.py").write_text("class Tiny: ...")
    return tmp_path


def prepared(root: Path, spec: Any, *overrides: str, **options: Any) -> Submission:
    return prepare(spec, "job.yaml", overrides, Package.of(root), **options)


# ---- what it is made of ----


def test_a_submission(root: Path) -> None:
    found = prepared(root, spec_of(), "optim.lr=3e-4", "args={a: b c}", python_path="src:/elsewhere")
    assert found.entrypoint.startswith("exec dltrain run ")
    assert shlex.split(found.entrypoint)[1:] == ["dltrain", "run", "job.yaml", "optim.lr=3e-4", "args={a: b c}"]
    assert found.directory == "s3://b/runs/tiny"
    assert found.metadata == {"dltrain_run": "tiny", "dltrain_dir": "s3://b/runs/tiny"}
    assert found.env_vars == {"RAY_JOB_STOP_WAIT_TIME_S": "300", "PYTHONPATH": "src"}
    assert found.notes == ()


def test_no_variable_of_this_environment_is_sent(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "MY_TOKEN"):
        monkeypatch.setenv(name, "canary-7c1e")
    assert "canary-7c1e" not in repr(prepared(root, spec_of()))


@pytest.mark.parametrize("runs", ["./runs", "/data/runs", "file:///data/runs"])
def test_local_runs_are_refused_with_the_reason(root: Path, runs: str) -> None:
    with pytest.raises(SpecError) as caught:
        prepared(root, spec_of(runs=runs))
    assert f"runs: found '{runs}', a directory of one machine" in str(caught.value)
    assert "--allow-local-runs" in str(caught.value)


def test_local_runs_that_all_nodes_share(root: Path) -> None:
    found = prepared(root, spec_of(runs="./runs"), "runs=./runs", allow_local_runs=True)
    # Not in the job's own directory, which goes with the job.
    assert shlex.split(found.entrypoint)[-1] == f"runs={root}/runs"
    assert found.directory == f"{root}/runs/tiny"
    assert "must be the same directory on all nodes" in found.notes[0]
    assert prepared(root, spec_of(runs="file:///nfs/runs/"), allow_local_runs=True).directory == "/nfs/runs/tiny"


def test_data_that_would_not_be_there(root: Path) -> None:
    (root / "data").mkdir()
    (root / "data/a.parquet").touch()
    for url in ("data", "./data/*.parquet", "data/a.parquet"):
        assert prepared(root, spec_of(data={"train": url})).notes == ()
    (root / ".gitignore").write_text("data\n")
    mix = [{"name": "web", "url": "data"}, {"name": "books", "url": "s3://b/books"}]
    with pytest.raises(SpecError) as caught:
        prepared(root, spec_of(data={"mix": mix, "eval": "../test"}, runs="runs"))
    assert len(caught.value.faults) == 3
    assert caught.value.faults[0].startswith("data.mix.0.url: data is not in the package")
    assert caught.value.faults[1].startswith(f"data.eval: there is no ../test under {root}")


def test_data_on_the_nodes_own_disks_is_told(root: Path) -> None:
    (note,) = prepared(root, spec_of(data={"train": "/data/train"})).notes
    assert "data.train: /data/train is read from each node's own disk" in note


@pytest.mark.parametrize("task", ["tasks:Tiny", "tasks.py:Tiny"])
def test_a_task_that_would_not_be_there(root: Path, task: str) -> None:
    prepared(root, spec_of(task=task))
    (root / ".gitignore").write_text("tasks.py\n")
    with pytest.raises(SpecError, match=r"task: tasks\.py is not in the package"):
        prepared(root, spec_of(task=task))
    # Installed on the nodes, perhaps.
    prepared(root, spec_of(task="some.package:Task"))


@pytest.mark.parametrize(
    ("url", "local"), [("runs", True), ("/a", True), ("file:///a", True), ("s3://a", False), ("memory://a", False)]
)
def test_what_is_local(url: str, local: bool) -> None:
    assert is_local(url) == local


def test_a_worker_on_a_node_that_has_the_package_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Job:
        cwd: str

    monkeypatch.chdir(tmp_path)
    assert at_home(Job("/somewhere/else")).cwd == str(tmp_path)  # type: ignore[arg-type]
    assert at_home(Job("/tmp")).cwd == "/tmp"  # type: ignore[arg-type]


# ---- jobs ----


def job_of(**changes: Any) -> Job:
    details = {
        "submission_id": "tiny-1",
        "metadata": {"dltrain_run": "tiny", "dltrain_dir": "s3://b/runs/tiny"},
        "status": "RUNNING",
        "start_time": 1_000_000,
        "end_time": None,
        "driver_exit_code": None,
        "entrypoint": "exec dltrain run job.yaml",
        "message": "",
    }
    return Job.of(SimpleNamespace(**{**details, **changes}))


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
    ],
)
def test_exit_codes(status: str, code: int | None, exit_code: int) -> None:
    job = job_of(status=status, driver_exit_code=code)
    assert (job.is_over, job.exit_code) == (True, exit_code)


def test_a_job_as_json() -> None:
    found = job_of().to_dict(now=1060.0)
    assert (found["job"], found["job_status"], found["seconds"], found["exit_code"]) == (
        "tiny-1",
        "running",
        60.0,
        None,
    )
    assert json.loads(json.dumps(found)) == found
    ended = job_of(status="FAILED", end_time=1_010_000, driver_exit_code=127)
    assert ended.to_dict(now=1060.0)["seconds"] == 10.0
    assert "no `dltrain` command" in ended.problem
    assert job_of(status="FAILED", message="no such package").problem == "no such package"
    assert job_of(status="FAILED", driver_exit_code=1, message="a log").problem == ""


def test_ids_are_never_used_twice() -> None:
    assert _next_id("tiny", []) == "tiny-1"
    assert _next_id("tiny", ["tiny-1", "tiny-10", "tiny-old"]) == "tiny-11"
    assert _next_id("tiny-2", []) == "tiny-2-1"


def test_addresses() -> None:
    assert _normal("head:8265/") == "http://head:8265"
    assert _normal("https://ray.example.org") == "https://ray.example.org"
    for wrong in ("ray://head:10001", "http://"):
        with pytest.raises(UserError, match="http://HEAD:8265"):
            _normal(wrong)


@pytest.mark.parametrize(
    ("typed", "letter"), [("s", "s"), (" Stop\n", "s"), ("d", "d"), ("", "f"), ("yes", "f"), ("F", "f")]
)
def test_nothing_is_stopped_by_mistake(typed: str, letter: str) -> None:
    assert _first_of("dsf", typed) == letter


# ---- following ----


class Head:
    """A head whose connections break: each tail starts at the beginning and breaks off somewhere."""

    def __init__(self, log: str, breaks: list[int], done: Job) -> None:
        self._log, self._breaks, self._done = log, breaks, done
        self.address = "http://head:8265"

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        end = self._breaks.pop(0) if self._breaks else len(self._log)
        for begin in range(0, end, 5):
            yield self._log[begin : min(begin + 5, end)]
            await asyncio.sleep(0)
        if end < len(self._log):
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get(self, job_id: str) -> Job:
        return self._done

    def log(self, job_id: str) -> str:
        return self._log


def test_every_line_once_over_broken_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dltrain.deploying.jobs._POLL_SECONDS", 0.0)
    log = "".join(f"line {n}\n" for n in range(20)) + "no end"
    head, heard = Head(log, [0, 7, 7, 33, 12, 100], job_of(status="SUCCEEDED", driver_exit_code=0)), list[str]()
    done = Follower(head, head, "tiny-1", heard.append).run()  # type: ignore[arg-type]
    assert done.exit_code == 0
    assert heard == log.split("\n")


def test_what_a_tail_missed_is_fetched_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that stays silent: the job is asked for by other means."""
    monkeypatch.setattr("dltrain.deploying.jobs._CHECK_SECONDS", 0.01)

    class Silent(Head):
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            yield "one\ntw"
            await asyncio.sleep(harness.SECONDS)

    head, heard = Silent("one\ntwo\n", [], job_of(status="STOPPED")), list[str]()
    assert Follower(head, head, "tiny-1", heard.append).run().exit_code == 143  # type: ignore[arg-type]
    assert heard == ["one", "two"]


def test_a_head_that_is_gone_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dltrain.deploying.jobs._POLL_SECONDS", 0.0)
    monkeypatch.setattr("dltrain.deploying.jobs._PATIENCE_SECONDS", 0.05)
    head = Head("log\n", [1] * 10**6, job_of())
    with pytest.raises(DltrainError, match="job tiny-1 goes on if the cluster does"):
        Follower(head, head, "tiny-1", print).run()  # type: ignore[arg-type]


def test_a_reader_that_went_away_is_no_broken_connection() -> None:
    def out(_: str) -> None:
        raise BrokenPipeError

    head = Head("one\ntwo\n", [], job_of())
    with pytest.raises(BrokenPipeError):
        Follower(head, head, "tiny-1", out).run()  # type: ignore[arg-type]


# ---- mistakes, before a cluster is asked ----


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert "Traceback" not in err
    return err


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(harness.ROOT / "tests")
    made = {**harness.make_spec(tmp_path), "data": {"train": "s3://b/train"}}
    return str(harness.write_spec(tmp_path, made))


def test_submit_refuses_local_runs(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refusal(capsys, "submit", spec, "--address", "http://127.0.0.1:9")
    assert "a directory of one machine" in err


def test_submit_refuses_what_is_too_large(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = refusal(capsys, "submit", spec, "runs=s3://b/runs", "--max-mb", "0.001", "--address", "http://127.0.0.1:9")
    assert "over the limit of 1,000 bytes" in err
    assert "test_" in err


@pytest.mark.parametrize("arguments", [["status", "tiny"], ["logs", "tiny"], ["stop", "tiny"], ["jobs"]])
def test_nobody_answers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    err = refusal(capsys, *arguments, "--address", f"http://127.0.0.1:{port}")
    assert f"no Ray dashboard answers at http://127.0.0.1:{port}" in err


def test_a_rank_of_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--rank is for logs" in refusal(capsys, "logs", "tiny", "--rank", "0", "--address", "http://127.0.0.1:9")
