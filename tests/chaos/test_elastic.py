"""Workers that hang, clusters that grow and shrink, machines to be left: what is trained stays the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import dltrain, events, make_spec, start, state, steps, wait_for, wait_for_step, write_data, write_spec

HOLD = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
from ray.util.placement_group import placement_group
group = placement_group([{"CPU": 1}] * int(sys.argv[2]))
ray.get(group.ready())
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def hold(ray_address: str) -> Iterator[Any]:
    """Takes slots of the session's Ray away until they are given back."""
    holders: list[subprocess.Popen[str]] = []

    def take(slots: int) -> Any:
        command = [sys.executable, "-c", HOLD, ray_address, str(slots)]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        holders.append(holder)
        return holder

    yield take
    for holder in holders:
        give_back(holder)


def give_back(holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    if not holder.stdin.closed:
        holder.communicate(timeout=60)


def undisturbed(tmp_path: Path, ray_address: str, spec: dict[str, Any]) -> dict[int, dict[str, Any]]:
    quick = {**spec, "name": "whole", "args": {}, "workers": 1}
    assert dltrain("run", str(write_spec(tmp_path, quick)), "--json", "--address", ray_address).code == 0
    return steps(tmp_path / "runs" / "whole")


def same_run(run: Path, whole: dict[int, dict[str, Any]]) -> None:
    mine = steps(run)
    assert sorted(mine) == sorted(whole)
    assert [mine[s]["batch_id"] for s in sorted(mine)] == [whole[s]["batch_id"] for s in sorted(whole)]
    for s in mine:
        assert mine[s]["loss"] == pytest.approx(whole[s]["loss"], rel=1e-5)
    ledger = json.loads((run / "ledger.json").read_text())
    assert sum(ledger["seconds"].values()) == pytest.approx(ledger["wall_seconds"], rel=1e-3)
    audit = dltrain("audit", str(run), "--json")
    assert audit.code == 0, audit.out


def starts(run: Path) -> list[tuple[int, bool]]:
    return [(e["num_ranks"], e["from_memory"]) for e in events(run) if e["event"] == "start"]


def test_a_worker_that_hangs_is_replaced_and_its_stack_is_told(tmp_path: Path, ray_address: str) -> None:
    write_data(tmp_path / "train")
    faults = {"hang_seconds": 4}
    spec = make_spec(tmp_path, args={"seconds": 0.1}, train={"steps": 40}, faults=faults)
    whole = undisturbed(tmp_path, ray_address, spec)
    run = tmp_path / "runs" / "tiny"
    process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    live = wait_for_step(run, 12, process)
    os.kill(live["workers"][1]["pid"], signal.SIGSTOP)
    done = harness.finish(process)
    assert done.code == 0, done.err
    (hang,) = [e for e in events(run) if e["event"] == "Hung"]
    assert hang["rank"] == 1
    assert "stopped (SIGSTOP)" in hang["stacks"][1]
    # The Python stack, down to the loop.
    assert "loop.py" in hang["stacks"][1]
    assert starts(run) == [(2, False), (2, True)]
    same_run(run, whole)


def test_a_run_grows_when_there_is_room_and_no_step_is_made_twice(tmp_path: Path, ray_address: str, hold: Any) -> None:
    write_data(tmp_path / "train")
    # Until it has grown it trains; then it is stopped.
    spec = make_spec(tmp_path, args={"seconds": 0.1}, train={"steps": 3000}, workers={"min": 1, "max": 3})
    run = tmp_path / "runs" / "tiny"
    holder = hold(2)
    process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    wait_for_step(run, 5, process)
    # A loaded machine may bring its second agent up late: the run grows to 2 first then.
    wait_for(lambda: state(run)["world_size"] == 2 and state(run)["state"] == "running", process)
    give_back(holder)
    wait_for(lambda: state(run)["world_size"] == 3 and state(run)["state"] == "running", process)
    wait_for_step(run, state(run)["step"] + 10, process)
    process.send_signal(signal.SIGTERM)
    done = harness.finish(process)
    assert done.code == 143, done.err
    assert done.json["restarts"] == 0
    assert starts(run)[-2:] in ([(2, False), (3, True)], [(2, True), (3, True)])
    lines = [json.loads(line)["step"] for line in (run / "steps.jsonl").read_text().splitlines()]
    assert lines == list(range(1, done.json["steps"] + 1))
    same_run(run, undisturbed(tmp_path, ray_address, {**spec, "train": {"steps": done.json["steps"]}}))


@pytest.mark.long
def test_below_the_minimum_it_waits_and_the_wait_is_no_loss_of_goodput(
    tmp_path: Path, ray_address: str, hold: Any
) -> None:
    write_data(tmp_path / "train")
    spec = make_spec(tmp_path, train={"steps": 10})
    holder = hold(3)
    process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    run = tmp_path / "runs" / "tiny"
    wait_for(lambda: state(run).get("state") == "waiting", process)
    give_back(holder)
    done = harness.finish(process)
    assert done.code == 0, done.err
    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["seconds"]["waiting_for_capacity"] > 0
    assert ledger["goodput"] > ledger["goodput_of_wall"]


def test_a_machine_that_is_to_be_left_is_left_after_a_checkpoint(tmp_path: Path, ray_address: str) -> None:
    """All slots are on one machine here: the run saves, and waits for another."""
    write_data(tmp_path / "train")
    spec = make_spec(tmp_path, args={"seconds": 0.1}, train={"steps": 3000}, checkpoint={"every": 10_000})
    run = tmp_path / "runs" / "tiny"
    process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    live = wait_for_step(run, 8, process)
    done = dltrain("drain", "--json")
    assert (done.code, done.json["still_here"]) == (0, 0), done.err
    assert done.json["agents"] >= 2
    assert not harness.alive([worker["pid"] for worker in live["workers"]])
    wait_for(lambda: state(run).get("state") == "waiting", process)
    saved = state(run)["checkpoint_step"]
    assert saved >= 8
    assert dltrain("checkpoint", "verify", str(run)).code == 0
    process.send_signal(signal.SIGTERM)
    assert harness.finish(process).code == 143
    total = saved + 10
    again = dltrain("run", str(tmp_path / "job.yaml"), f"train.steps={total}", "--json", "--address", ray_address)
    assert again.code == 0, again.err
    lines = [json.loads(line)["step"] for line in (run / "steps.jsonl").read_text().splitlines()]
    assert lines == list(range(1, total + 1))


def test_two_wishes_to_stop_end_at_once_and_leave_the_last_checkpoint(tmp_path: Path, ray_address: str) -> None:
    write_data(tmp_path / "train")
    spec = make_spec(tmp_path, args={"seconds": 0.3}, train={"steps": 400}, checkpoint={"every": 5})
    run = tmp_path / "runs" / "tiny"
    process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    live = wait_for_step(run, 7, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert harness.finish(process).code == 130
    wait_for(lambda: not harness.alive([worker["pid"] for worker in live["workers"]]))
    assert dltrain("checkpoint", "verify", str(run)).code == 0
    table = dltrain("checkpoint", "list", str(run), "--json").json["checkpoints"]
    assert table[-1]["step"] >= 5


def test_a_driver_that_was_replaced_commits_nothing_more(tmp_path: Path, ray_address: str) -> None:
    write_data(tmp_path / "train")
    spec = make_spec(tmp_path, args={"seconds": 0.1}, train={"steps": 400}, workers=1, checkpoint={"every": 5})
    run = tmp_path / "runs" / "tiny"
    first = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    wait_for_step(run, 6, first)
    # As another start of the same run does.
    (run / "starts" / "start-0002").write_text("claimed\n")
    done = harness.finish(first)
    assert done.code == 1
    assert "another start of this run has taken it over" in done.json["error"]


@pytest.mark.long
def test_rollback_puts_back_the_weights_and_goes_on_with_the_data(tmp_path: Path, ray_address: str) -> None:
    write_data(tmp_path / "train")
    faults = {"nonfinite": "rollback"}
    train, args = {"steps": 24}, {"nan_row": 150}
    spec = make_spec(tmp_path, train=train, args=args, faults=faults, checkpoint={"every": 4})
    run = tmp_path / "runs" / "tiny"
    done = dltrain("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    assert done.code == 0, done.err
    lines = steps(run)
    bad = [s for s, line in lines.items() if not line["finite"]]
    assert bad
    skipped = make_spec(tmp_path, name="skipped", train=train, args=args, checkpoint={"every": 4})
    assert dltrain("run", str(write_spec(tmp_path, skipped)), "--json", "--address", ray_address).code == 0
    other = steps(tmp_path / "runs" / "skipped")
    # The same data, and the same losses until weights are put back that are older.
    assert [line["batch_id"] for line in lines.values()] == [line["batch_id"] for line in other.values()]
    assert all(lines[s]["loss"] == other[s]["loss"] for s in range(1, bad[0]))
    if bad[0] % 4 != 1:
        assert lines[bad[0] + 1]["loss"] != other[bad[0] + 1]["loss"]
    assert dltrain("audit", str(run)).code == 0
