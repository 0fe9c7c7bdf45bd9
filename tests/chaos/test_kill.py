"""Processes that die, disks that fill: the run goes on, and comes out the same."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
import torch
from faults import agent_of
from harness import alive, dltrain, events, make_spec, start, steps, wait_for, wait_for_step, write_data, write_spec
from safetensors.torch import load_file


def weights(run: Path, name: Path) -> dict[str, torch.Tensor]:
    target = name.with_suffix(".safetensors")
    done = dltrain("checkpoint", "export", str(run), "--to", str(target), "--step", "newest", "--json")
    assert done.code == 0, done.err
    return load_file(target)


def parent_of(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[1])


def times_redone(run: Path) -> int:
    lines = [json.loads(line)["step"] for line in (run / "steps.jsonl").read_text().splitlines()]
    return len(lines) - len(set(lines))


@pytest.mark.parametrize(
    "victim", ["worker", *(pytest.param(one, marks=pytest.mark.long) for one in ("nursery", "agent"))]
)
def test_killed_and_resumed_is_the_same_run(tmp_path: Path, ray_address: str, victim: str) -> None:
    write_data(tmp_path / "train")
    quick = make_spec(tmp_path, name="whole", train={"steps": 30})
    assert dltrain("run", str(write_spec(tmp_path, quick)), "--json", "--address", ray_address).code == 0
    # No checkpoint is near: what it goes on from is in memory.
    spec = make_spec(tmp_path, args={"seconds": 0.2}, train={"steps": 30}, checkpoint={"every": 1000})
    run = tmp_path / "runs" / "tiny"
    process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    live = wait_for_step(run, 17, process)
    pids = [worker["pid"] for worker in live["workers"]]
    os.kill({"worker": pids[1], "nursery": parent_of(pids[1]), "agent": agent_of(pids[1])}[victim], signal.SIGKILL)
    done = harness.finish(process)
    assert done.code == 0, done.err
    assert (done.json["status"], done.json["restarts"], done.json["steps"]) == ("finished", 1, 30)
    expected = "the agent of rank 1 is gone" if victim == "agent" else "was ended by SIGKILL"
    assert expected in done.err
    whole, mine = steps(tmp_path / "runs" / "whole"), steps(run)
    assert [mine[s]["batch_id"] for s in range(1, 31)] == [whole[s]["batch_id"] for s in range(1, 31)]
    a = weights(run, tmp_path / "a.safetensors")
    b = weights(tmp_path / "runs" / "whole", tmp_path / "b.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert not wait_for_end(pids)
    ledger = json.loads((run / "ledger.json").read_text())
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["wall_seconds"], abs=1e-3)
    starts = [e for e in events(run) if e["event"] == "start"]
    assert [e["from_memory"] for e in starts] == [False, True]
    every = max(e["every"] for e in events(run) if e["event"] == "snapshots")
    assert times_redone(run) <= every


def wait_for_end(pids: list[int]) -> list[int]:
    wait_for(lambda: not alive(pids))
    return alive(pids)


def test_a_killed_driver_leaves_nothing_and_the_next_start_goes_on(tmp_path: Path, ray_address: str) -> None:
    write_data(tmp_path / "train")
    path = write_spec(tmp_path, make_spec(tmp_path, args={"seconds": 0.1}, train={"steps": 30}))
    run = tmp_path / "runs" / "tiny"
    process = start("run", str(path), "--json", "--address", ray_address)
    live = wait_for_step(run, 7, process)
    process.kill()
    process.communicate()
    wait_for_end([worker["pid"] for worker in live["workers"]])
    done = dltrain("run", str(path), "--json", "--address", ray_address)
    assert done.code == 0, done.err
    assert done.json["steps"] == 30
    # It went on from step 5, not from the beginning.
    assert done.json["samples"] <= 25 * 16
    assert sorted(steps(run)) == list(range(1, 31))


def test_a_worker_that_exits_without_a_word(tmp_path: Path, ray_address: str) -> None:
    write_data(tmp_path / "train")
    spec = make_spec(tmp_path, task="tasks:Dies", args={"bad_row": 7}, faults={"restarts_per_hour": 1})
    done = dltrain("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    assert done.code == 1
    assert "exited with code 7" in done.err
    assert "going down" in done.err
    assert "1 restarts within an hour" in done.err


@contextlib.contextmanager
def small_disk(where: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(where)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_costs_checkpoints_and_not_the_run(tmp_path: Path, ray_address: str) -> None:
    write_data(tmp_path / "train")
    with small_disk(tmp_path / "disk", 2) as disk:
        spec = make_spec(tmp_path, args={"seconds": 0.1}, train={"steps": 45}, runs=str(disk), checkpoint={"every": 5})
        process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
        run = disk / "tiny"
        wait_for(lambda: harness.state(run).get("checkpoint_step", -1) >= 5, process)
        filler = disk / "filler"
        fill(filler)
        # state.json can't be written while the disk is full: the message tells when it was noticed.
        assert process.stderr is not None
        said = ""
        while "could not be saved" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        filler.unlink()
        done = harness.finish(process)
        done.err = said + done.err
        assert done.code == 0, done.err
        assert done.json["status"] == "finished"
        assert "could not be saved" in done.err
        assert "No space left on device" in done.err
        counters = json.loads((run / "ledger.json").read_text())["counters"]
        assert counters["checkpoint_failures"] >= 1
        assert any(e["event"] == "checkpoint_failed" for e in events(run))
        assert sorted(steps(run)) == list(range(1, 46))
        assert dltrain("checkpoint", "verify", str(run)).code == 0


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(b"x" * 4096)
