"""What a fault costs: dltrain beside Ray Train, the same training, the same faults, in one run.

    python tests/bench/recovery.py [--parts start,kill,lab,stall] [--peers dltrain,ray,ray-tuned] [--rounds 3]
                                   [--peer-rounds 1] [--bound 100] [--results DIR] [--json]

An MLP of 1.3 million parameters under ZeRO-1 on CPU, batch 128, steps padded to 20 ms, a checkpoint every 20 steps.
`start` and `kill` are 2 workers on this machine; `lab`, or one of `lab_kill,cut,hang,join`, is 3 hosts of one slot
each, elastic between 2 and 3 workers (needs root and iproute2); `stall` is how long a checkpoint holds the training
up, against `engine.save_checkpoint`.
"Ray Train" is TorchTrainer with DeepSpeed in its function as documented; "tuned" has shorter polls and timeouts.
Seconds count from the fault to the end of the first step that nobody had made before; medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[2])]

import faults  # noqa: E402
import recovery_task as task  # noqa: E402
from machine import versions  # noqa: E402
from recovery_report import draw, show, summarize  # noqa: E402
from recovery_runs import PEERS, Place, Run, one_machine, ray_settings, several_hosts, start_run  # noqa: E402

# Long enough for whatever a framework prepares in the background after its first step.
STEADY_SECONDS = 10.0
NAMES = {
    "dltrain": "dltrain",
    "ray": "Ray Train",
    "ray-tuned": "Ray Train, tuned",
    "deepspeed": "engine.save_checkpoint",
}
# measure -> (what it says in the table, unit, goal)
MEASURES = {
    "start": ("launch, Ray up, to the first step", "s", "<= 6"),
    "kill": ("SIGKILL of a worker to the next new step", "s", "<= 1"),
    "kill_redone": ("  steps redone", "", "<= 1"),
    "lab_kill": ("3 hosts, 2..3 workers: SIGKILL to the next new step", "s", "<= 2"),
    "lab_kill_redone": ("  steps redone", "", "<= 1"),
    "cut": ("cable of one of 3 hosts cut to the next new step", "s", "<= 10"),
    "cut_redone": ("  steps redone", "", "<= 1"),
    "hang": ("SIGSTOP of a worker to the next new step", "s", "<= 10"),
    "hang_redone": ("  steps redone", "", "<= 1"),
    "join": ("a host joins: training stands still for", "s", ""),
    "join_redone": ("  steps lost", "", "0"),
    "stall": ("a checkpoint holds the training up for", "ms", "<= 10 %"),
}


@dataclass
class Found:
    """What was measured: values by measure and peer (None: not within the bound), and traces for the picture."""

    bound: float
    values: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    traces: dict[str, dict[str, list[tuple[float, int]]]] = field(default_factory=dict)

    def add(self, measure: str, peer: str, value: float | None) -> None:
        self.values.setdefault(measure, {}).setdefault(peer, []).append(value)
        shown = f"not within {self.bound:g} s" if value is None else f"{value:g} {MEASURES[measure][1]}"
        print(f"  {NAMES[peer]}: {MEASURES[measure][0].strip()}: {shown}", file=sys.stderr, flush=True)

    def gave_up(self, measure: str, peer: str) -> bool:
        """Whether it took too long before: there is no use in waiting again."""
        return None in self.values.get(measure, {}).get(peer, [])


# ---- faults ----


def kill_worker(run: Run, _place: Place) -> None:
    os.kill(_last_worker(run)["pid"], signal.SIGKILL)


def stop_worker(run: Run, _place: Place) -> None:
    os.kill(_last_worker(run)["pid"], signal.SIGSTOP)


def cut_cable(run: Run, place: Place) -> None:
    """Of a host other than the head's, where the driver is."""
    assert place.lab is not None
    nodes = {worker["node"] for worker in run.workers()}
    next(host for host in reversed(place.lab.hosts) if host.address in nodes).cut()


def add_host(_run: Run, place: Place) -> None:
    assert place.lab is not None
    place.lab.add()


def _last_worker(run: Run) -> dict[str, Any]:
    return max(run.workers(), key=lambda worker: worker.get("rank", 0))


# ---- parts ----


def disturb(found: Found, measure: str, run: Run, place: Place, fault: Callable[[Run, Place], None]) -> None:
    """Does something to a run and measures how it comes through."""
    run.train_for(STEADY_SECONDS)
    at = time.time()
    fault(run, place)
    result: faults.Recovery | None = run.wait_for(lambda: faults.recovery(run.lines(), at), found.bound)
    seconds = result and (result.pause_seconds if measure == "join" else result.new_seconds)
    found.add(measure, run.peer, seconds)
    if result:
        found.add(f"{measure}_redone", run.peer, result.redone)
    trace = [(line.time - at, line.step) for line in sorted(run.lines(), key=lambda line: line.time)]
    found.traces.setdefault(measure, {}).setdefault(run.peer, trace)


def measure_one_machine(found: Found, peer: str, directory: Path, pad: float, parts: set[str]) -> None:
    with one_machine(ray_settings(peer)) as place, start_run(peer, place, directory, pad, (2, 2)) as run:
        run.train_for(0.0)
        found.add("start", peer, round(min(line.time for line in run.lines()) - run.launched, 3))
        if "kill" in parts:
            disturb(found, "kill", run, place, kill_worker)


LAB_FAULTS: dict[str, tuple[int, Callable[[Run, Place], None]]] = {
    "lab_kill": (3, kill_worker),
    "cut": (3, cut_cable),
    "hang": (3, stop_worker),
    "join": (2, add_host),
}


def measure_lab(found: Found, peer: str, directory: Path, pad: float, parts: set[str]) -> None:
    for measure, (hosts, fault) in LAB_FAULTS.items():
        if measure not in parts or found.gave_up(measure, peer):
            continue
        place_of = several_hosts(ray_settings(peer), hosts)
        with (
            place_of as place,
            start_run(peer, place, directory.with_name(f"{directory.name}-{measure}"), pad, (2, 3)) as run,
        ):
            disturb(found, measure, run, place, fault)


def measure_stall(found: Found, directory: Path, saves: int) -> None:
    """Milliseconds of one checkpoint, without padding: dltrain's ledger, and what save_checkpoint blocks for."""
    bare = _bare_saves(directory.with_name(f"{directory.name}-bare"), saves)
    found.add("stall", "deepspeed", round(1000 * statistics.median(bare), 2))
    with one_machine({}) as place, start_run("dltrain", place, directory, 0.0, (2, 2)) as run:
        wanted = saves * task.CHECKPOINT_EVERY
        run.wait_for(lambda: max((line.step for line in run.lines()), default=0) > wanted)
        commits = sum(event["event"] == "checkpoint" for event in faults.journal(run.run, "events"))
        ledger = json.loads((run.run / "ledger.json").read_text())
    found.add("stall", "dltrain", round(1000 * ledger["seconds"]["checkpoint_stall"] / commits, 2))


def _bare_saves(directory: Path, saves: int) -> list[float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE.with_name("recovery_peer.py")), "--bare-rank", str(directory), str(saves)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    out = [rank.communicate(timeout=600)[0] for rank in ranks]
    seconds: list[float] = json.loads(out[0].splitlines()[-1])
    return seconds


def measure(options: argparse.Namespace) -> tuple[Found, dict[str, Any]]:
    parts, peers = set(options.parts.split(",")), options.peers.split(",")
    if "lab" in parts:
        parts |= set(LAB_FAULTS)
    found = Found(options.bound)
    bare = task.measure_step()
    pad = max(0.0, task.STEP_SECONDS - bare)
    print(f"a bare step takes {1000 * bare:.1f} ms here: padded by {1000 * pad:.1f} ms", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="recovery-") as temporary:
        root = Path(temporary)
        task.write_data(root / "data")
        for number in range(options.rounds):
            for peer in peers if number < options.peer_rounds else {"dltrain"} & set(peers):
                directory = root / f"{peer}-{number}"
                if parts & {"start", "kill"}:
                    measure_one_machine(found, peer, directory, pad, parts)
                measure_lab(found, peer, directory, pad, parts)
            if "stall" in parts:
                measure_stall(found, root / f"stall-{number}", saves=20)
    return found, {"bare_step_ms": round(1000 * bare, 2), "padding_ms": round(1000 * pad, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="start,kill,lab,stall")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-rounds", type=int, default=1, help="of the peers, which take minutes to come back")
    parser.add_argument("--bound", type=float, default=100.0, help="seconds after which nobody waits for a recovery")
    parser.add_argument("--results", help="directory for recovery.json and the timeline recovery.png")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    found, step = measure(options)
    facts = {
        **versions(),
        "rounds": options.rounds,
        "peer_rounds": options.peer_rounds,
        **step,
    }
    result = {"measures": summarize(found.values), "bound_seconds": options.bound, **facts}
    show(found.values, MEASURES, NAMES, options.bound, facts)
    if options.results:
        directory = Path(options.results)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "recovery.json").write_text(json.dumps(result, indent=2) + "\n")
        draw(found.traces, MEASURES, NAMES, directory / "recovery.png")
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
