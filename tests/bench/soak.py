"""Minutes of faults: a run that is killed, stopped, frozen and starved at random, and must come out as if nothing was.

    python tests/bench/soak.py [--minutes 30] [--every 20] [--number N] [--seed 0] [--faults worker,agent,...] [--json]
                                [--results DIR]

2 workers on a Ray of its own; every 20 s one of: SIGKILL of a worker, of an agent, of the driver (which is started
again), SIGSTOP of a worker, `dltrain stop` and a new start, a full disk for some seconds. Then the same steps once
more, undisturbed: batches and weights must be the same bit for bit, the audit must pass, the ledger must sum to the
wall clock, memory must be flat, and nothing may be left behind. Exit code 1 when something of that does not hold.
The full disk needs root (a file system of its own).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[2])]

import faults  # noqa: E402
import harness  # noqa: E402
from leftovers import Leftovers  # noqa: E402
from machine import versions  # noqa: E402
from recovery_runs import Place, one_machine  # noqa: E402
from soak_checks import Memory, check_all  # noqa: E402

STEP_SECONDS = 0.05
CHECKPOINT_EVERY = 50
DISK_MEGABYTES = 128
FULL_SECONDS = 3.0
# A fault that the run has not come through by then has ended the soak.
PATIENCE_SECONDS = 180.0
# More steps than are made between two faults.
RECENT_LINES = 20_000


@dataclass
class Fault:
    """What was done, when (seconds since 1970), and how long until a step that is new; None: it never came."""

    kind: str
    at: float
    seconds: float | None = None
    redone: int = 0


class Soak:
    """A run, and what is done to it."""

    def __init__(self, place: Place, root: Path, disk: Path, rng: random.Random) -> None:
        self.place, self.root, self.disk, self.rng = place, root, disk, rng
        self.run = disk / "runs" / "soak"
        self.spec = harness.make_spec(
            root,
            name="soak",
            args={"seconds": STEP_SECONDS},
            train={"steps": 10**7},
            checkpoint={"every": CHECKPOINT_EVERY},
            faults={"restarts_per_hour": 10**6},
            runs=str(disk / "runs"),
        )
        self.process: subprocess.Popen[Any] | None = None
        self.log = (root / "log").open("w")
        self.tail = faults.StepTail(self.run)
        self.paused_seconds, self.num_starts = 0.0, 0
        self.began = time.time()

    def start(self) -> None:
        self.process = self.launch(self.spec)
        self.num_starts += 1

    def launch(self, spec: dict[str, Any]) -> subprocess.Popen[Any]:
        path = self.root / f"{spec['name']}.yaml"
        path.write_text(json.dumps(spec))
        command = [harness.DLTRAIN, "run", str(path), "--json", "--address", self.place.address]
        return self.place.popen(command, cwd=harness.ROOT / "tests", stdout=self.log, stderr=self.log)

    def stop(self) -> int:
        """Stops the run as a user does; returns its exit code."""
        command = [harness.DLTRAIN, "stop", str(self.run), "--json"]
        subprocess.run(command, check=True, stdout=self.log, stderr=self.log, timeout=PATIENCE_SECONDS)
        assert self.process is not None
        return self.process.wait(timeout=PATIENCE_SECONDS)

    def workers(self) -> list[int]:
        """The workers' processes, once the run says it is running and all of them live."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            state = harness.state(self.run)
            pids = [worker["pid"] for worker in state.get("workers", [])]
            if state.get("state") == "running" and pids and len(harness.alive(pids)) == len(pids):
                return pids
            time.sleep(0.1)
        raise SystemExit(f"the run does not get up:\n{(self.root / 'log').read_text()[-3000:]}")

    def end(self) -> None:
        """Ends the driver, if it is still there."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()

    # ---- faults ----

    def kill_worker(self) -> None:
        os.kill(self.rng.choice(self.workers()), signal.SIGKILL)

    def kill_agent(self) -> None:
        os.kill(faults.agent_of(self.rng.choice(self.workers())), signal.SIGKILL)

    def stop_worker(self) -> None:
        os.kill(self.rng.choice(self.workers()), signal.SIGSTOP)

    def kill_driver(self) -> None:
        self.workers()
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.start()

    def stop_and_start(self) -> None:
        self.workers()
        if self.stop() != 0:
            raise SystemExit("a stopped run did not end with 0")
        stopped = time.time()
        self.start()
        self.paused_seconds += time.time() - stopped

    def fill_disk(self) -> None:
        filler = self.disk / "filler"
        with filler.open("wb", buffering=0) as out, contextlib.suppress(OSError):
            while True:
                out.write(bytes(65536))
        time.sleep(FULL_SECONDS)
        filler.unlink()

    def disturb(self, kind: str) -> Fault:
        """Does it, and waits until the run has made a step that it had not made before."""
        at = time.time()
        FAULTS[kind](self)
        done = time.time()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            lines = self.tail.lines()
            if kind == "disk" and lines[-1].time > done:
                # Nobody is started again.
                return Fault(kind, at, round(lines[-1].time - at, 3))
            found = faults.recovery(lines[-RECENT_LINES:], at)
            if found:
                return Fault(kind, at, found.new_seconds, found.redone)
            time.sleep(0.2)
        return Fault(kind, at)


FAULTS: dict[str, Callable[[Soak], None]] = {
    "worker": Soak.kill_worker,
    "agent": Soak.kill_agent,
    "driver": Soak.kill_driver,
    "hang": Soak.stop_worker,
    "stop": Soak.stop_and_start,
    "disk": Soak.fill_disk,
}


@contextlib.contextmanager
def small_disk(where: Path) -> Iterator[Path]:
    """A file system of its own, that can be filled."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(where)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise SystemExit(
            f"a small file system can't be mounted ({mounted.stderr.strip()}); leave `disk` out of --faults"
        )
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def soak(run: Soak, memory: Memory, options: argparse.Namespace) -> list[Fault]:
    """Disturbs the run until the time is up or it does not recover."""
    kinds, done = options.faults.split(","), []
    end = run.began + 60 * options.minutes
    run.start()
    run.workers()
    while time.time() + options.every < end and len(done) < options.number:
        due = time.time() + options.every
        while time.time() < due:
            memory.sample(harness.state(run.run))
            time.sleep(1.0)
        # Each kind once before any comes again, so that a short soak has all of them.
        if not len(done) % len(kinds):
            order = run.rng.sample(kinds, len(kinds))
        fault = run.disturb(order[len(done) % len(kinds)])
        done.append(fault)
        shown = "NOT RECOVERED" if fault.seconds is None else f"{fault.seconds:6.2f} s, {fault.redone} steps redone"
        print(f"{time.time() - run.began:6.0f} s  {fault.kind:<7} {shown}", file=sys.stderr, flush=True)
        if fault.seconds is None:
            break
    return done


def run_soak(options: argparse.Namespace) -> dict[str, Any]:
    lock_directories = [Path(sys.prefix, "torch_extensions")]
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        disk = stack.enter_context(small_disk(root / "disk")) if "disk" in options.faults.split(",") else root
        leftovers, memory = Leftovers(*lock_directories, disk / "runs"), Memory()
        harness.write_data(root / "train", rows=2000, files=4, group=50)
        with one_machine(leftovers.env) as place:
            ports = leftovers.ports()
            run = Soak(place, root, disk, random.Random(options.seed))
            try:
                done = soak(run, memory, options)
                checks = check_all(run, done, memory, leftovers, ports)
            finally:
                run.end()
        checks.append(("nothing is left behind", not leftovers.found(), "; ".join(leftovers.found()) or "nothing"))
    return {
        "seed": options.seed,
        "minutes": round((time.time() - run.began) / 60, 1),
        "faults": [vars(fault) for fault in done],
        "checks": [{"check": name, "ok": ok, "found": text} for name, ok, text in checks],
        "memory": memory.to_dict(),
        **versions(),
    }


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=130)
    table = Table("fault", "times", "median s to a new step", "longest s", "most steps redone")
    for kind in FAULTS:
        mine = [fault for fault in result["faults"] if fault["kind"] == kind]
        seconds = [fault["seconds"] for fault in mine if fault["seconds"] is not None]
        if seconds:
            redone = max(fault["redone"] for fault in mine)
            table.add_row(kind, f"{len(mine)}", f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}", f"{redone}")
    console.print(table)
    table = Table("check", "", "found")
    for check in result["checks"]:
        table.add_row(check["check"], "[green]holds" if check["ok"] else "[red]BROKEN", check["found"])
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--number", type=int, default=10**6, help="end after so many faults")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between the end of one fault and the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--results", type=Path, help="directory for soak.json")
    options = parser.parse_args()
    result = run_soak(options)
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    sys.exit(0 if all(check["ok"] for check in result["checks"]) else 1)


if __name__ == "__main__":
    main()
