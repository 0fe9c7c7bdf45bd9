"""Runs as Ray jobs, against a real head with its dashboard and token authentication on."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import Done, make_spec, steps, wait_for, write_data, write_spec
from job_head import Head, running_head

# More than are ever made.
STEPS = 50_000
SLOW = {"seconds": 0.05}


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head(cpus=2) as head:
        yield head
    assert head.leftovers.found() == []


class Work:
    """A user's directory, and the cluster they submit to."""

    def __init__(self, head: Head, tmp: Path) -> None:
        self.head, self.directory, self.run = head, tmp / "work", tmp / "runs" / "tiny"
        self.directory.mkdir()
        shutil.copy(harness.ROOT / "tests" / "tasks.py", self.directory)
        write_data(tmp / "train")
        self._tmp = tmp
        self._started: list[subprocess.Popen[str]] = []

    def spec(self, **changes: Any) -> str:
        write_spec(self.directory, make_spec(self._tmp, **changes))
        return "job.yaml"

    def start(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        # What RAY_ADDRESS names is not what was asked for.
        env = {**self.head.env, "RAY_ADDRESS": "127.0.0.1:1", **(env or {})}
        process = harness.start(*arguments, "--address", self.head.url, env=env, cwd=self.directory)
        self._started.append(process)
        return process

    def submit(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return self.start("submit", self.spec(**options), "--allow-local-runs", *arguments)

    def do(self, *arguments: str, env: dict[str, str] | None = None) -> Done:
        return harness.finish(self.start(*arguments, env=env))

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: harness.state(self.run).get("step", 0) >= step)

    def close(self) -> None:
        """No job of a test that failed is left to the next one."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()
        with contextlib.suppress(AssertionError):
            self.do("stop", "tiny", "--json")


@pytest.fixture
def work(head: Head, tmp_path: Path) -> Iterator[Work]:
    made = Work(head, tmp_path)
    yield made
    made.close()


def test_submit_follows_to_the_end(work: Work) -> None:
    (work.directory / "big.bin").write_bytes(bytes(10**6))
    (work.directory / ".gitignore").write_text("*.bin\n")
    done = harness.finish(work.submit())
    assert done.code == 0, done.out + done.err
    # .gitignore, job.yaml and tasks.py.
    assert re.search(r"packed .*/work: 3 files, [\d.]+ KiB, [\d.]+ KiB compressed", done.out)
    job = re.search(r"submitted as job (tiny-\d+)", done.out)
    assert job
    assert "hello from the task" in done.out
    assert "step 20/20  loss" in done.out
    assert f"job {job[1]} has succeeded, exit code 0" in done.out
    assert "must be the same directory on all nodes" in done.err
    assert sorted(steps(work.run)) == list(range(1, 21))

    found = work.do("status", "tiny", "--json").json
    assert (found["job"], found["job_status"], found["exit_code"]) == (job[1], "succeeded", 0)
    assert (found["state"], found["step"]) == ("finished", 20)
    assert "training" in found["told"][0]
    log = work.do("logs", "tiny")
    assert (log.code, "hello from the task" in log.out) == (0, True)
    # The job is over: following it is reading it.
    assert work.do("logs", job[1], "-f").out == log.out
    (listed,) = [j for j in work.do("jobs", "--json").json["jobs"] if j["job"] == job[1]]
    assert (listed["run"], listed["dir"]) == ("tiny", str(work.run))
    assert job[1] in work.do("jobs").out
    again = work.do("stop", "tiny")
    assert (again.code, "there is nothing to stop" in again.err) == (2, True)


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"args": {"bad_row": 7}}, 1, "the column that nobody has"),
        ({"task": "tasks:NeedsMore"}, 2, "has no column 'z'"),
    ],
)
def test_the_exit_code_of_a_job_that_fails(work: Work, changes: dict[str, Any], code: int, said: str) -> None:
    done = harness.finish(work.submit("--json", **changes))
    assert done.code == code, done.err
    assert (done.json["job_status"], done.json["exit_code"]) == ("failed", code)
    assert said in done.err


@pytest.mark.long
def test_detached_watched_stopped_and_submitted_again(work: Work) -> None:
    submitted = harness.finish(work.submit("--detach", "--json", args=SLOW, train={"steps": STEPS}))
    assert submitted.code == 0, submitted.err
    first = submitted.json["job"]
    work.wait_for_step(3)
    # Nobody is attached, and it goes on.
    work.wait_for_step(harness.state(work.run)["step"] + 5)
    following = work.start("logs", "tiny", "-f")
    second = harness.finish(work.submit("--detach", args=SLOW, train={"steps": STEPS}))
    assert second.code == 2
    assert f"tiny is running already, as job {first}" in second.err
    assert work.do("status", "tiny", "--json").json["state"] == "running"
    top = Terminal(work, "top", str(work.run))
    top.wait_for("2 workers on 1 node")
    # Each rank's bar, from its metrics: forward takes nearly all of a step here.
    top.wait_for("ffffffffff", 2)
    top.type("q")
    assert top.end() == 0

    stopped = work.do("stop", "tiny", "--json")
    assert (stopped.code, stopped.json["job_status"], stopped.json["exit_code"]) == (0, "stopped", 143)
    state = harness.state(work.run)
    assert state["state"] == "stopped"
    assert state["checkpoint_step"] == state["step"] < STEPS
    followed = harness.finish(following)
    assert followed.code == 0
    assert "stopping after this step" in followed.out

    end = state["step"] + 20
    done = harness.finish(work.submit("--json", train={"steps": end}, args=SLOW))
    assert done.code == 0, done.err
    assert done.json["job"] != first
    assert f"resuming from the checkpoint of step {state['step']}" in done.err
    assert (done.json["summary"]["steps"], done.json["summary"]["samples"]) == (end, 20 * 16)
    assert sorted(steps(work.run)) == list(range(1, end + 1))


@pytest.mark.long
def test_a_job_that_is_stopped_is_given_the_time_to_end_its_step(work: Work) -> None:
    """Ray's own patience is 3 seconds, this step takes longer."""
    process = work.submit("--json", args={"seconds": 8.0}, train={"steps": 100}, checkpoint={"every": 100})
    work.wait_for_step(1)
    stopped = work.do("stop", "tiny", "--json")
    assert stopped.json["job_status"] == "stopped"
    done = harness.finish(process)
    assert (done.code, done.json["exit_code"]) == (143, 143)
    state = harness.state(work.run)
    assert (state["state"], state["checkpoint_step"]) == ("stopped", state["step"])
    assert done.json["summary"]["status"] == "stopped"


def test_ctrl_c_without_a_terminal_leaves_the_job_running(work: Work) -> None:
    process = work.submit(args=SLOW, train={"steps": STEPS})
    work.wait_for_step(3)
    process.send_signal(signal.SIGINT)
    done = harness.finish(process)
    assert done.code == 130, done.err
    assert "goes on at" in done.out
    assert "dltrain logs tiny --address" in done.out
    work.wait_for_step(harness.state(work.run)["step"] + 5)
    assert work.do("stop", "tiny", "--json").json["job_status"] == "stopped"


class Terminal:
    """A command on a terminal of 80 columns."""

    def __init__(self, work: Work, *arguments: str) -> None:
        self._fd, theirs = pty.openpty()
        env = {**os.environ, **work.head.env, "TERM": "xterm", "COLUMNS": "80"}
        self._process = subprocess.Popen(
            [harness.DLTRAIN, *arguments],
            cwd=work.directory,
            env=env,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(theirs),
        )
        os.close(theirs)
        self.text = ""

    def wait_for(self, text: str, number: int = 1) -> None:
        deadline = time.monotonic() + harness.SECONDS
        while self.text.count(text) < number:
            assert time.monotonic() < deadline, self.text
            assert self._read(), f"it ended: {self.text}"

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 1.0)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other end is closed
            return False
        self.text += data.decode(errors="replace")
        return bool(data)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def end(self) -> int:
        deadline = time.monotonic() + harness.SECONDS
        while self._read():
            assert time.monotonic() < deadline, f"it does not end: {self.text}"
        os.close(self._fd)
        return self._process.wait(timeout=harness.SECONDS)


def _take_terminal(fd: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


@pytest.mark.long
def test_ctrl_c_on_a_terminal_asks(work: Work) -> None:
    spec = work.spec(args=SLOW, train={"steps": STEPS})
    command = ("submit", spec, "--allow-local-runs", "--address", work.head.url)
    terminal = Terminal(work, *command)
    # The same bar as `dltrain run` shows.
    terminal.wait_for(f"/{STEPS}")
    terminal.type("\x03")
    terminal.wait_for("[d]etach, [s]top it, or [f]ollow on?")
    terminal.type("f\n")
    terminal.wait_for("samples/s", terminal.text.count("samples/s") + 1)
    terminal.type("\x03")
    terminal.wait_for("[d]etach", 2)
    terminal.type("d\n")
    assert terminal.end() == 0
    assert "goes on at" in terminal.text
    work.wait_for_step(harness.state(work.run)["step"] + 5)

    follower = work.start("logs", "tiny", "-f")
    assert work.do("stop", "tiny").code == 0
    harness.finish(follower)
    again = Terminal(work, *command)
    again.wait_for(f"/{STEPS}")
    again.type("\x03")
    again.wait_for("[d]etach")
    again.type("s\n")
    assert again.end() == 143
    assert harness.state(work.run)["state"] == "stopped"


@pytest.mark.long
@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refuses the token"),
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token"),
        ({"RAY_AUTH_TOKEN": "", "HOME": "/nonexistent"}, "wants a token"),
    ],
)
def test_a_token_that_is_not_the_clusters(work: Work, env: dict[str, str], said: str) -> None:
    for arguments in (("jobs",), ("submit", work.spec(), "--allow-local-runs"), ("stop", "tiny")):
        done = work.do(*arguments, env=env)
        assert done.code == 2, done.err
        assert f"{work.head.url} {said}" in done.err
        assert "RAY_AUTH_TOKEN" in done.err
        assert "Traceback" not in done.err
        assert work.head.env["RAY_AUTH_TOKEN"] not in done.err + done.out
    asked = work.do("jobs", "--json", env=env)
    assert json.loads(asked.out)["exit_code"] == 2


@pytest.mark.long
def test_a_task_in_a_file_and_a_python_path(work: Work) -> None:
    """Task and helper lie in a directory that only PYTHONPATH names, as a path of this machine."""
    (work.directory / "src").mkdir()
    (work.directory / "src" / "helper.py").write_text("WORD = 'found the helper'\n")
    (work.directory / "mine.py").write_text(
        "import helper\nfrom tasks import Tiny\nprint(helper.WORD)\nclass Mine(Tiny): ...\n"
    )
    path = os.pathsep.join([str(work.directory / "src"), os.environ.get("PYTHONPATH", "")])
    process = work.start(
        "submit", work.spec(task="mine.py:Mine"), "--allow-local-runs", "--json", env={"PYTHONPATH": path}
    )
    done = harness.finish(process)
    assert done.code == 0, done.err
    assert "found the helper" in done.err
