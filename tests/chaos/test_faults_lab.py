"""Faults on three hosts: whatever is lost, the same batches are trained, and the loss does not notice.

Each host has one slot; the run has 2 to 3 workers; driver and head are on host 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from faults import agent_of
from harness import Done, alive, dltrain, make_spec, start, steps, wait_for, wait_for_step, write_data, write_spec

from cluster.lab import Host, Lab

# The longest run here; the shorter ones are its first steps.
STEPS = 400
STEP_SECONDS = 0.1
# Of the step at which something happens.
FAULT_STEP = 20
WORKERS = {"min": 2, "max": 3}


@pytest.fixture(scope="module")
def whole(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The steps of an undisturbed run of 2 workers."""
    tmp = tmp_path_factory.mktemp("whole")
    write_data(tmp / "train")
    path = write_spec(tmp, make_spec(tmp, name="whole", train={"steps": STEPS}, checkpoint={"every": STEPS}))
    done = finish(launch(path, lab))
    assert done.code == 0, done.err
    return steps(tmp / "runs" / "whole")


def launch(path: Path, lab: Lab) -> subprocess.Popen[str]:
    """Starts a run whose driver is on host 0."""
    return start("run", str(path), "--json", "--address", lab.address, popen=lab.hosts[0].popen)


def finish(process: subprocess.Popen[str]) -> Done:
    return harness.finish(process)


class Trial:
    """A run on a lab, slow enough to be disturbed."""

    def __init__(self, lab: Lab, tmp_path: Path, num_steps: int = 120, **changes: Any) -> None:
        self.lab, self.num_steps, self.run = lab, num_steps, tmp_path / "runs" / "tiny"
        write_data(tmp_path / "train")
        settings = {"workers": WORKERS, "checkpoint": {"every": 15}, "args": {"seconds": STEP_SECONDS}, **changes}
        self.path = write_spec(tmp_path, make_spec(tmp_path, train={"steps": num_steps}, **settings))
        self.process = launch(self.path, lab)
        self.pids: set[int] = set()

    def wait_for_step(self, step: int) -> list[dict[str, Any]]:
        """Returns the workers that are there then."""
        workers: list[dict[str, Any]] = wait_for_step(self.run, step, self.process)["workers"]
        self.pids |= {worker["pid"] for worker in workers}
        return workers

    def wait_for_size(self, num_ranks: int) -> None:
        """Until so many workers train."""
        found = wait_for(lambda: self._workers(num_ranks), self.process)
        self.pids |= {worker["pid"] for worker in found}

    def _workers(self, num_ranks: int) -> list[dict[str, Any]] | None:
        state = harness.state(self.run)
        workers = state.get("workers", [])
        return workers if state.get("state") == "running" and len(workers) == num_ranks else None

    def host_of(self, worker: dict[str, Any]) -> Host:
        return next(host for host in self.lab.hosts if host.address == worker["node"])

    def remote(self, workers: list[dict[str, Any]]) -> dict[str, Any]:
        """A worker that is not on the driver's host."""
        return next(worker for worker in workers if self.host_of(worker).index != 0)

    def events(self) -> str:
        return (self.run / "events.jsonl").read_text()

    def check(self, whole: dict[int, dict[str, Any]]) -> Done:
        """Lets it finish; it must have come out as the undisturbed run did, and left nothing."""
        done = finish(self.process)
        assert done.code == 0, done.err
        assert (done.json["status"], done.json["steps"]) == ("finished", self.num_steps)
        check_path(self.run, whole, self.num_steps)
        assert dltrain("audit", str(self.run)).code == 0
        assert dltrain("checkpoint", "verify", str(self.run)).code == 0
        ledger = json.loads((self.run / "ledger.json").read_text())
        assert sum(ledger["seconds"].values()) == pytest.approx(ledger["wall_seconds"], abs=1e-3)
        assert ledger["wall_seconds"] == pytest.approx(done.json["seconds"], abs=0.5)
        wait_for(lambda: not alive(sorted(self.pids)))
        return done


def check_path(run: Path, whole: dict[int, dict[str, Any]], num_steps: int) -> None:
    """Every step once in the final account, with the undisturbed run's batch and loss."""
    mine = steps(run)
    assert sorted(mine) == list(range(1, num_steps + 1))
    assert [mine[s]["batch_id"] for s in mine] == [whole[s]["batch_id"] for s in mine]
    for step, line in mine.items():
        assert line["loss"] == pytest.approx(whole[step]["loss"], rel=1e-5), f"step {step}"


@pytest.fixture
def trial(lab: Lab, whole: Any, tmp_path: Path) -> Iterator[Trial]:
    """A run on the module's lab, for faults that leave the hosts whole."""
    with ending(Trial(lab, tmp_path)) as trial:
        yield trial


@pytest.fixture
def make_trial(fresh_lab: Lab, whole: Any, tmp_path: Path) -> Iterator[Callable[..., Trial]]:
    """Makes a run on a lab of its own, for faults of hosts and cables."""
    with contextlib.ExitStack() as stack:
        yield lambda num_steps: stack.enter_context(ending(Trial(fresh_lab, tmp_path, num_steps)))


@contextlib.contextmanager
def ending(trial: Trial) -> Iterator[Trial]:
    """Ends the run if the test did not see it to its end."""
    try:
        yield trial
    finally:
        if trial.process.poll() is None:
            trial.process.kill()
            trial.process.communicate()


def test_sigkill_of_a_worker(trial: Trial, whole: dict[int, dict[str, Any]]) -> None:
    victim = trial.wait_for_step(FAULT_STEP)[1]
    os.kill(victim["pid"], signal.SIGKILL)
    done = trial.check(whole)
    assert done.json["restarts"] == 1
    assert "was ended by SIGKILL" in done.err
    exits = [event for event in harness.events(trial.run) if event["event"] == "Exited"]
    assert (exits[0]["rank"], exits[0]["code"]) == (victim["rank"], -signal.SIGKILL)


def test_sigkill_of_an_agent(trial: Trial, whole: dict[int, dict[str, Any]]) -> None:
    victim = trial.wait_for_step(FAULT_STEP)[1]
    os.kill(agent_of(victim["pid"]), signal.SIGKILL)
    # Its worker does not outlive it.
    wait_for(lambda: not alive([victim["pid"]]))
    done = trial.check(whole)
    assert done.json["restarts"] == 1
    lost = [event for event in harness.events(trial.run) if event["event"] == "AgentLost"]
    assert lost[0]["rank"] == victim["rank"]


def test_sigkill_of_a_hosts_ray(make_trial: Callable[..., Trial], whole: dict[int, dict[str, Any]]) -> None:
    trial = make_trial(num_steps=120)
    victim = trial.remote(trial.wait_for_step(FAULT_STEP))
    trial.host_of(victim).kill()
    # It goes on with the two hosts that are left.
    trial.wait_for_size(2)
    done = trial.check(whole)
    assert done.json["restarts"] == 1
    assert "AgentLost" in trial.events()


def test_a_worker_that_hangs(trial: Trial, whole: dict[int, dict[str, Any]]) -> None:
    victim = trial.wait_for_step(FAULT_STEP)[1]
    os.kill(victim["pid"], signal.SIGSTOP)
    done = trial.check(whole)
    assert done.json["restarts"] == 1
    hung = [event for event in harness.events(trial.run) if event["event"] == "Hung"]
    assert hung[0]["rank"] == victim["rank"]
    # Where it was stuck, in Python.
    assert "loop.py" in json.dumps(hung[0])


def test_a_cable_is_cut(make_trial: Callable[..., Trial], whole: dict[int, dict[str, Any]]) -> None:
    trial = make_trial(num_steps=120)
    victim = trial.remote(trial.wait_for_step(FAULT_STEP))
    trial.host_of(victim).cut()
    # The host that nobody hears must be quiet before others go on without it.
    wait_for(lambda: not alive([victim["pid"]]), trial.process)
    trial.wait_for_size(2)
    done = trial.check(whole)
    assert done.json["restarts"] == 1
    lost = [event for event in harness.events(trial.run) if event["event"] == "AgentLost"]
    assert lost[0]["rank"] == victim["rank"]


def test_a_cable_is_cut_and_comes_back(make_trial: Callable[..., Trial], whole: dict[int, dict[str, Any]]) -> None:
    trial = make_trial(num_steps=STEPS)
    victim = trial.remote(trial.wait_for_step(FAULT_STEP))
    host = trial.host_of(victim)
    host.cut()
    wait_for(lambda: not alive([victim["pid"]]), trial.process)
    trial.wait_for_size(2)
    host.join()
    # Ray may have taken the host for dead; then it has to be started there again.
    if not raylet_answers(trial, host):
        host.kill()
        host.start()
    trial.wait_for_size(3)
    trial.check(whole)


def raylet_answers(trial: Trial, host: Host) -> bool:
    code = (
        f"import ray; ray.init('{trial.lab.address}', logging_level='ERROR')\n"
        f"print([n['Alive'] for n in ray.nodes() if n['NodeManagerAddress'] == '{host.address}'])"
    )
    done = trial.lab.hosts[0].run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return "True" in done.stdout


def test_a_host_is_drained(make_trial: Callable[..., Trial], whole: dict[int, dict[str, Any]]) -> None:
    trial = make_trial(num_steps=120)
    victim = trial.remote(trial.wait_for_step(FAULT_STEP))
    command = [harness.DLTRAIN, "drain", "--json"]
    drained = trial.host_of(victim).run(command, capture_output=True, text=True)
    assert drained.returncode == 0, drained.stderr
    assert json.loads(drained.stdout) == {"agents": 1, "left": 1, "still_here": 0}
    # Only now is the work elsewhere, and nothing of it here.
    assert not alive([victim["pid"]])
    trial.wait_for_size(2)
    done = trial.check(whole)
    assert done.json["restarts"] == 0
    lines = (trial.run / "steps.jsonl").read_text().splitlines()
    assert set(Counter(json.loads(line)["step"] for line in lines).values()) == {1}


def test_a_host_joins(several_hosts: None, whole: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    with Lab(hosts=2, cpus=1) as lab, ending(Trial(lab, tmp_path, num_steps=300)) as trial:
        trial.wait_for_step(FAULT_STEP)
        lab.add()
        trial.wait_for_size(3)
        done = trial.check(whole)
        assert done.json["restarts"] == 0
        # Nothing was trained twice.
        lines = (trial.run / "steps.jsonl").read_text().splitlines()
        assert set(Counter(json.loads(line)["step"] for line in lines).values()) == {1}
        assert json.loads((trial.run / "ledger.json").read_text())["seconds"]["redone"] == 0


def test_other_numbers_of_workers_and_other_stages(lab: Lab, whole: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    write_data(tmp_path / "train")
    for number, (workers, zero) in enumerate([(2, 1), (3, 2), (1, 3), (2, 0)], 1):
        spec = make_spec(
            tmp_path, workers=workers, engine={"zero": zero}, train={"steps": 20 * number}, checkpoint={"every": 10}
        )
        done = finish(launch(write_spec(tmp_path, spec), lab))
        assert done.code == 0, done.err
        # It went on from where the start before had ended.
        assert done.json["samples"] == 20 * 16
    check_path(tmp_path / "runs" / "tiny", whole, 80)
