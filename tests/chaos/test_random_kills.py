"""The claim of recovery: killed at random moments, a run comes out the same bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from faults import agent_of
from harness import dltrain, events, make_spec, start, state, steps, wait_for, write_data, write_spec
from safetensors.torch import load_file
from test_kill import times_redone, weights

STEPS = 30_000


def spec_of(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    faults = {"restarts_per_hour": 1000}
    # Dropout, so that what is random in a step is part of the claim.
    args = {"seconds": 0.05, "dropout": 0.2}
    return make_spec(tmp_path, args=args, checkpoint={"every": 40}, faults=faults, **changes)


@pytest.mark.parametrize(
    "kills", [pytest.param(5, id="5 kills"), pytest.param(20, id="20 kills", marks=pytest.mark.soak)]
)
@pytest.mark.long
def test_killed_at_random_moments(tmp_path: Path, ray_address: str, kills: int) -> None:
    write_data(tmp_path / "train")
    rng = random.Random(kills)
    run = tmp_path / "runs" / "tiny"
    path = write_spec(tmp_path, spec_of(tmp_path, train={"steps": STEPS}))
    process = start("run", str(path), "--json", "--address", ray_address)
    victims = [rng.choice(["worker", "worker", "agent", "driver"]) for _ in range(kills)]
    reached = 0
    for victim in victims:
        live = wait_for(partial(running_past, run, reached + rng.randrange(3, 25)), process)
        time.sleep(rng.random() / 10)
        reached = live["step"]
        process = kill(victim, live, process, path, ray_address, rng)
    wait_for(lambda: running_past(run, reached + 10), process)
    process.send_signal(signal.SIGTERM)
    done = harness.finish(process)
    assert done.code == 143, done.err
    total = done.json["steps"]
    quiet = spec_of(tmp_path, name="whole", train={"steps": total})
    quiet["args"]["seconds"] = 0.0
    assert dltrain("run", str(write_spec(tmp_path, quiet)), "--json", "--address", ray_address).code == 0
    whole, mine = steps(tmp_path / "runs" / "whole"), steps(run)
    assert sorted(mine) == list(range(1, total + 1))
    assert [mine[s]["batch_id"] for s in sorted(mine)] == [whole[s]["batch_id"] for s in sorted(whole)]
    a = weights(run, tmp_path / "a.safetensors")
    b = weights(tmp_path / "runs" / "whole", tmp_path / "b.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert load_file(tmp_path / "a.safetensors").keys() == b.keys()
    audit = dltrain("audit", str(run))
    assert audit.code == 0, audit.out
    # What is lost with a driver is what came after its last checkpoint; with a worker or an agent next to nothing.
    every = max(e["every"] for e in events(run) if e["event"] == "snapshots")
    drivers = victims.count("driver")
    assert times_redone(run) <= (kills - drivers) * (every + 1) + drivers * 80


def running_past(run: Path, step: int) -> dict[str, Any] | None:
    now = state(run)
    fresh = now.get("state") == "running" and time.time() - now["heartbeat"] < 3
    return now if fresh and now["step"] >= step and len(now["workers"]) == 2 else None


def kill(
    victim: str,
    live: dict[str, Any],
    process: subprocess.Popen[str],
    path: Path,
    ray_address: str,
    rng: random.Random,
) -> subprocess.Popen[str]:
    """Ends one process; a driver is started again. Returns the driver."""
    pid = rng.choice(live["workers"])["pid"]
    if victim == "driver":
        process.kill()
        process.communicate()
        return start("run", str(path), "--json", "--address", ray_address)
    # The last fault may have taken it.
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(agent_of(pid) if victim == "agent" else pid, signal.SIGKILL)
    return process
