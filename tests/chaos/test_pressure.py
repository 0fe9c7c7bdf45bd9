"""Machines under pressure: too little memory, no core to spare, a driver that stands still for a while."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pytest
from harness import dltrain, events, make_spec, start, state, steps, wait_for, wait_for_step, write_data, write_spec

BUSY = "while True: pass"
BUSY_SECONDS = 60.0
# More than a lease and than the silence after which an agent counts as lost.
STILL_SECONDS = 8.0


class MemoryGroup:
    """A control group with little memory, in which the kernel kills whoever wants more."""

    def __init__(self, megabytes: int) -> None:
        name = f"dltrain-test-{uuid.uuid4().hex[:8]}"
        old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
        self.path, self._is_old = (old if old.exists() else new) / name, old.exists()
        self.path.mkdir()
        limit = self.path / ("memory.limit_in_bytes" if self._is_old else "memory.max")
        limit.write_text(str(megabytes * 10**6))

    def add(self, pid: int) -> None:
        """Moves a process in; what it has already stays where it is booked."""
        (self.path / "cgroup.procs").write_text(str(pid))

    @property
    def kills(self) -> int:
        """How often the kernel had to kill."""
        text = (self.path / ("memory.oom_control" if self._is_old else "memory.events")).read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])


@pytest.fixture
def memory_group() -> Iterator[Callable[[int], MemoryGroup]]:
    """Makes one."""
    made: list[MemoryGroup] = []

    def make(megabytes: int) -> MemoryGroup:
        try:
            made.append(MemoryGroup(megabytes))
        except OSError as error:
            pytest.skip(f"no control group of our own can be made here: {error}")
        return made[-1]

    yield make
    for group in made:
        wait_for(lambda group=group: not (group.path / "cgroup.procs").read_text())
        group.path.rmdir()


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that do nothing but work."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def came_out_whole(run: Path, num_steps: int) -> None:
    assert sorted(steps(run)) == list(range(1, num_steps + 1))
    ledger = json.loads((run / "ledger.json").read_text())
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["wall_seconds"], rel=1e-3)
    assert dltrain("audit", str(run)).code == 0


def test_a_worker_that_is_killed_for_its_memory_is_replaced(
    tmp_path: Path, ray_address: str, memory_group: Callable[[int], MemoryGroup]
) -> None:
    write_data(tmp_path / "train")
    args = {"bait": str(tmp_path / "bait"), "megabytes": 2000, "seconds": 0.1}
    spec = make_spec(tmp_path, task="tasks:Greedy", args=args, train={"steps": 60})
    run = tmp_path / "runs" / "tiny"
    process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    live = wait_for_step(run, 10, process)
    group = memory_group(100)
    for worker in live["workers"]:
        group.add(worker["pid"])
    (tmp_path / "bait").touch()
    done = harness.finish(process)
    assert done.code == 0, done.err
    assert group.kills >= 1
    assert done.json["restarts"] == 1
    assert "was ended by SIGKILL (killed from outside, or out of memory)" in done.err
    came_out_whole(run, 60)


def test_a_driver_that_stood_still_does_not_take_its_agents_for_lost(tmp_path: Path, ray_address: str) -> None:
    """Their leases have run out, so the workers are gone; the agents are not."""
    write_data(tmp_path / "train")
    spec = make_spec(tmp_path, args={"seconds": 0.1}, train={"steps": 60})
    run = tmp_path / "runs" / "tiny"
    process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    wait_for_step(run, 10, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(STILL_SECONDS)
    process.send_signal(signal.SIGCONT)
    done = harness.finish(process)
    assert done.code == 0, done.err
    assert "was ended: its agent had not heard of the driver for" in done.err
    assert [e for e in events(run) if e["event"] == "AgentLost"] == []
    assert [(e["num_ranks"], e["from_memory"]) for e in events(run) if e["event"] == "start"] == [(2, False), (2, True)]
    came_out_whole(run, 60)


@pytest.mark.soak
def test_a_minute_without_a_core_to_spare_restarts_nothing(tmp_path: Path, ray_address: str) -> None:
    write_data(tmp_path / "train")
    spec = make_spec(tmp_path, args={"seconds": 0.02}, train={"steps": 100_000}, checkpoint={"every": 100})
    run = tmp_path / "runs" / "tiny"
    process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    wait_for_step(run, 10, process)
    with busy(2 * (os.cpu_count() or 1)):
        time.sleep(BUSY_SECONDS)
        wait_for_step(run, state(run)["step"] + 1, process)
    process.send_signal(signal.SIGTERM)
    done = harness.finish(process)
    assert done.code == 143, done.err
    assert done.json["restarts"] == 0
    assert [e for e in events(run) if e["event"] in ("Hung", "AgentLost", "Raised")] == []
    assert {e["code"] for e in events(run) if e["event"] == "Exited"} <= {0}
    came_out_whole(run, done.json["steps"])
