"""Secrets stay where they were put: canaries in the environment are in nothing that a run leaves, shows or serves.

AWS_SECRET_ACCESS_KEY and RAY_AUTH_TOKEN are what a cluster's environment holds; TASK_PASSWORD is a task's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import harness
import psutil
import pytest
from harness import make_spec, wait_for, write_data, write_spec
from job_head import running_head
from leftovers import Leftovers

# Asks the job API for all that it tells of jobs, their runtime environments included.
_ASK = """
import sys
from ray.job_submission import JobSubmissionClient
print("[" + ",".join(job.json() for job in JobSubmissionClient(sys.argv[1]).list_jobs()) + "]")
"""
_TASK = """
import os
from tasks import Tiny


class Secretive(Tiny):
    def loss(self, model, batch):
        assert os.environ["TASK_PASSWORD"], "the task must have its secret"
        return super().loss(model, batch)
"""


class Canaries:
    """Values that nobody else has, by the variable that holds them."""

    def __init__(self) -> None:
        names = ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "TASK_PASSWORD")
        # Ray's token has 64 hexadecimal digits.
        self.env = {name: secrets.token_hex(32) for name in names}

    def found_in(self, data: bytes, where: str) -> list[str]:
        return [f"{name} is in {where}" for name, value in self.env.items() if value.encode() in data]

    def found_under(self, *directories: Path) -> list[str]:
        """In the files there, and in their names."""
        found = []
        for path in (path for directory in directories for path in directory.rglob("*")):
            found += self.found_in(str(path).encode(), f"the name of {path}")
            if path.is_file() and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError):
                    found += self.found_in(path.read_bytes(), str(path))
        return found

    def found_in_commands(self, processes: Iterable[psutil.Process]) -> list[str]:
        found = []
        for process in processes:
            with contextlib.suppress(OSError):
                found += self.found_in(
                    Path(f"/proc/{process.pid}/cmdline").read_bytes(), f"/proc/{process.pid}/cmdline"
                )
        return found


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A user's directory, with a .env that holds a canary's neighbour."""
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(harness.ROOT / "tests" / "tasks.py", work)
    (work / "secretive.py").write_text(_TASK)
    write_data(tmp_path / "train")
    return work


def spec_of(work: Path, **changes: Any) -> str:
    settings = {"task": "secretive:Secretive", "args": {"seconds": 0.05}, "train": {"steps": 50_000}, **changes}
    write_spec(work, make_spec(work.parent, **settings))
    return "job.yaml"


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as reply:
        data: bytes = reply.read()
    return data


def test_the_canaries_would_be_found(tmp_path: Path) -> None:
    canaries = Canaries()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log").write_text(f"password={canaries.env['TASK_PASSWORD']}\n")
    assert canaries.found_under(tmp_path) == [f"TASK_PASSWORD is in {tmp_path}/a/log"]
    command = [sys.executable, "-c", "input()", canaries.env["RAY_AUTH_TOKEN"]]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        found = wait_for(lambda: canaries.found_in_commands([psutil.Process(process.pid)]))
        assert found == [f"RAY_AUTH_TOKEN is in /proc/{process.pid}/cmdline"]
        process.kill()


@pytest.fixture
def ray_files() -> Iterator[Path]:
    """Where a private Ray puts its files; a short path, as Ray wants it."""
    directory = Path(tempfile.mkdtemp(prefix="dls-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def test_a_run(work: Path, ray_files: Path) -> None:
    canaries, leftovers, run = Canaries(), Leftovers(), work.parent / "runs" / "tiny"
    auth = {"RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(ray_files), "RAY_ADDRESS": ""}
    process = harness.start("run", spec_of(work), "--json", env={**canaries.env, **auth, **leftovers.env}, cwd=work)
    live = harness.wait_for_step(run, 3, process)
    # What is written of a worker that is killed, and of what comes after.
    killed = live["workers"][1]["pid"]
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: [event["event"] for event in harness.events(run)].count("start") == 2, process)
    # What state.json said before the kill is not what is waited for.
    wait_for(lambda: killed not in running_pids(run) and len(running_pids(run)) == 2, process)
    found = canaries.found_in(read(live["metrics_url"]), "the metrics")
    found += canaries.found_in_commands(leftovers.processes())
    # Its port is this machine's own, and the ranks meet on the node's address.
    assert listening(process.pid, port_of(live["metrics_url"])) == {"127.0.0.1"}
    for worker in harness.state(run)["workers"]:
        assert listening(worker["pid"]) == {worker["node"]}
    process.send_signal(signal.SIGTERM)
    done = harness.finish(process)
    assert done.code == 143, done.err
    status = harness.dltrain("status", str(run), "--json")
    found += canaries.found_in((done.out + done.err + status.out).encode(), "what it printed")
    assert found + canaries.found_under(run, ray_files) == []


def running_pids(run: Path) -> set[int]:
    live = harness.state(run)
    return {worker["pid"] for worker in live.get("workers", ())} if live.get("state") == "running" else set()


def port_of(url: str) -> int:
    return int(url.split(":")[2].partition("/")[0])


def listening(pid: int, port: int = 0) -> set[str]:
    """The addresses on which a process listens, on a port or on any."""
    sockets = psutil.Process(pid).net_connections("tcp")
    return {c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN and port in (0, c.laddr.port)}


@pytest.mark.long
def test_a_submitted_run(work: Path) -> None:
    canaries, run = Canaries(), work.parent / "runs" / "tiny"
    (work / ".env").write_text(f"PASSWORD={canaries.env['TASK_PASSWORD']}\n")
    # The secrets are the cluster's own; the client's are there too, and stay there.
    with running_head(cpus=2, env=canaries.env) as head:
        env = {**canaries.env, **head.env}
        where = ["--address", head.url]
        submitting = harness.start(
            "submit",
            spec_of(work, metrics={"port": 0, "host": "0.0.0.0"}),
            "--allow-local-runs",
            *where,
            env=env,
            cwd=work,
        )
        live = harness.wait_for_step(run, 3, submitting)
        driver = int(live["driver"].rpartition(":")[2])
        assert listening(driver, port_of(live["metrics_url"])) == {"0.0.0.0"}
        found = canaries.found_in(read(live["metrics_url"].replace("0.0.0.0", "127.0.0.1")), "the metrics")
        found += canaries.found_in_commands([*head.processes(), psutil.Process(submitting.pid)])
        stopped = harness.finish(harness.start("stop", "tiny", *where, env=env, cwd=work))
        assert stopped.code == 0, stopped.err
        followed = harness.finish(submitting)
        # One that fails tells more.
        failing = [spec_of(work, name="failing", args={"bad_row": 7}), "--allow-local-runs", "--json"]
        failed = harness.finish(harness.start("submit", *failing, *where, env=env, cwd=work))
        assert failed.code == 1, failed.err
        for done in (stopped, followed, failed):
            found += canaries.found_in((done.out + done.err).encode(), "what it printed")
        for verb in (["jobs"], ["logs", "tiny"], ["status", "tiny"]):
            told = harness.finish(harness.start(*verb, "--json", *where, env=env, cwd=work))
            found += canaries.found_in(told.out.encode(), verb[0])
        asked = subprocess.run(
            [sys.executable, "-c", _ASK, head.url],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=True,
        )
        jobs = json.loads(asked.stdout)
        assert {job["metadata"]["dltrain_run"] for job in jobs if job["submission_id"]} == {"tiny", "failing"}
        found += canaries.found_in(asked.stdout.encode(), "Ray's jobs")
        # Ray's files: logs of jobs, nodes and workers, and the package as it was unpacked.
        assert list(head.directory.rglob("secretive.py"))
        found += canaries.found_under(run.parent, head.directory)
        assert found == []
