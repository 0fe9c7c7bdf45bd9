"""What must hold after a soak: tests/bench/soak.py prints each with what was found."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faults
import harness
import psutil
from leftovers import Leftovers

if TYPE_CHECKING:
    from soak import Fault, Soak

Check = tuple[str, bool, str]
# A process has what it needs by then.
_SETTLED_SECONDS = 20.0
_PAGE_MB = 2**20
# Of the later half's median over the earlier half's.
_GROWTH_LIMIT = 1.10


class Memory:
    """Resident memory of driver and agents over time; a fault starts them anew, so what counts is each one's growth."""

    def __init__(self) -> None:
        # role -> (pid, seconds of age, MB)
        self._samples: dict[str, list[tuple[int, float, float]]] = defaultdict(list)

    def sample(self, state: dict[str, Any]) -> None:
        """Adds one of each process that state.json names."""
        if not state.get("workers"):
            return
        try:
            agents = {faults.agent_of(worker["pid"]) for worker in state["workers"]}
            for role, pids in (("driver", {faults.driver_of(state)}), ("agents", agents)):
                self._samples[role] += [_resident(pid) for pid in pids]
        except (psutil.Error, ProcessLookupError, AssertionError):  # one of them is just being replaced
            return

    def slope(self, role: str) -> float:
        """MB per hour within the life of a process, once it has settled."""
        over = under = 0.0
        for points in self._lives(role).values():
            age = statistics.fmean(a for a, _ in points)
            size = statistics.fmean(mb for _, mb in points)
            over += sum((a - age) * (mb - size) for a, mb in points)
            under += sum((a - age) ** 2 for a, _ in points)
        return 3600 * over / under if under else 0.0

    def growth(self, role: str) -> float:
        """The median of the later half of the samples over that of the earlier half."""
        sizes = [mb for _, age, mb in self._samples[role] if age > _SETTLED_SECONDS]
        half = len(sizes) // 2
        return statistics.median(sizes[half:]) / statistics.median(sizes[:half]) if half else 1.0

    def _lives(self, role: str) -> dict[int, list[tuple[float, float]]]:
        lives: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for pid, age, mb in self._samples[role]:
            if age > _SETTLED_SECONDS:
                lives[pid].append((age, mb))
        return lives

    def to_dict(self) -> dict[str, Any]:
        return {
            role: {
                "median_mb": round(statistics.median(mb for _, _, mb in samples), 1),
                "mb_per_hour_of_life": round(self.slope(role), 2),
                "later_over_earlier": round(self.growth(role), 4),
            }
            for role, samples in self._samples.items()
        }

    def check(self) -> Check:
        found = self.to_dict()
        flat = all(line["later_over_earlier"] <= _GROWTH_LIMIT for line in found.values())
        text = "; ".join(
            f"{role} {line['median_mb']:g} MB, later half x{line['later_over_earlier']:g}, "
            f"{line['mb_per_hour_of_life']:+g} MB an hour of life"
            for role, line in found.items()
        )
        return "memory is flat", flat, text


def _resident(pid: int) -> tuple[int, float, float]:
    process = psutil.Process(pid)
    return pid, time.time() - process.create_time(), process.memory_info().rss / _PAGE_MB


def check_all(soak: Soak, done: Sequence[Fault], memory: Memory, leftovers: Leftovers, ports: set[int]) -> list[Check]:
    """Stops the run, makes the undisturbed one, and compares."""
    checks: list[Check] = []
    lost = [fault.kind for fault in done if fault.seconds is None]
    checks.append(("every fault was recovered from", not lost, f"{len(done)} faults; not: {', '.join(lost) or 'none'}"))
    if lost:
        return checks
    code = soak.stop()
    ended = time.time()
    last = int(harness.state(soak.run)["step"])
    checks.append(("it stops with 0", code == 0, f"exit code {code} at step {last}"))
    checks += [_no_processes(leftovers, ports), _ledger(soak, ended), memory.check()]
    checks += _verbs(soak)
    whole = _undisturbed(soak, last)
    checks += [_batches(soak.run, whole, last), _weights(soak, whole)]
    return checks


def _no_processes(leftovers: Leftovers, ports: set[int]) -> Check:
    """Ray is still up: only what is dltrain's must be gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        mine = [p.pid for p in leftovers.processes() if _is_ours(p)]
        found = [*(f"process {pid}" for pid in mine), *leftovers.memfds()]
        found += [f"port {port}" for port in leftovers.ports() - ports if not _is_rays(leftovers, port)]
        if not found:
            break
        time.sleep(0.5)
    return "no process, memfd or port after the end", not found, "; ".join(found) or "none"


def _is_ours(process: psutil.Process) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return "dltrain" in line or "ray::Agent" in line


def _is_rays(leftovers: Leftovers, port: int) -> bool:
    """Ray's idle worker processes come and go, each with a port."""
    for process in leftovers.processes():
        try:
            listening = any(c.laddr.port == port for c in process.net_connections("tcp") if c.status == "LISTEN")
            if listening and (process.cmdline() or [""])[0].startswith("ray::"):
                return True
        except psutil.Error:
            continue
    return False


def _ledger(soak: Soak, ended: float) -> Check:
    """Its seconds sum to the wall clock: from the first start to the end, without the clean pauses."""
    ledger = json.loads((soak.run / "ledger.json").read_text())
    total, wall = sum(ledger["seconds"].values()), ended - soak.began - soak.paused_seconds
    # Outside of it: each start's interpreter, before the command can look at the clock, and its end after the last
    # line is written. Inside, a second: state.json tells a new start when the driver was killed.
    begin = time.monotonic()
    harness.dltrain("list")
    allowed = soak.num_starts * (2.0 + time.monotonic() - begin)
    near, same = abs(total - wall) <= allowed, abs(total - ledger["wall_seconds"]) < 1e-3
    text = f"{total:.1f} s booked, {wall:.1f} s passed, {allowed:.1f} s of starting and ending"
    return "the ledger sums to the wall clock", near and same, text


def _verbs(soak: Soak) -> list[Check]:
    audit = harness.dltrain("audit", str(soak.run))
    verify = harness.dltrain("checkpoint", "verify", str(soak.run))
    return [
        ("dltrain audit", audit.code == 0, audit.out.strip().splitlines()[-1] if audit.out else audit.err),
        ("dltrain checkpoint verify", verify.code == 0, verify.out.strip().splitlines()[-1]),
    ]


def _undisturbed(soak: Soak, steps: int) -> Path:
    """The same steps by a run that nothing happens to."""
    spec = {**soak.spec, "name": "whole", "args": {}, "train": {"steps": steps}, "runs": str(soak.root / "runs")}
    spec["checkpoint"] = {"every": steps}
    code = soak.launch(spec).wait()
    assert code == 0, f"the undisturbed run ended with {code}"
    return soak.root / "runs" / "whole"


def _batches(run: Path, whole: Path, steps: int) -> Check:
    """Of every line, also of the steps that were made twice."""
    right = {line["step"]: line["batch_id"] for line in faults.journal(whole, "steps")}
    mine = faults.journal(run, "steps")
    wrong = sorted({line["step"] for line in mine if right.get(line["step"]) != line["batch_id"]})
    missing = sorted(set(range(1, steps + 1)) - {line["step"] for line in mine})
    text = f"{len(mine)} lines of {steps} steps; wrong: {wrong[:5] or 'none'}; missing: {missing[:5] or 'none'}"
    return "every batch is the undisturbed run's", not wrong and not missing, text


def _weights(soak: Soak, whole: Path) -> Check:
    import torch
    from safetensors.torch import load_file

    files = []
    for name, run in (("soak", soak.run), ("whole", whole)):
        files.append(soak.root / f"{name}.safetensors")
        done = harness.dltrain("checkpoint", "export", str(run), "--to", str(files[-1]), "--step", "newest")
        assert done.code == 0, done.err
    mine, theirs = map(load_file, files)
    differ = [name for name in theirs if not torch.equal(mine[name], theirs[name])]
    text = f"{len(theirs)} tensors; different: {', '.join(differ) or 'none'}"
    return "weights are the undisturbed run's, bit for bit", not differ and mine.keys() == theirs.keys(), text
