"""The runs that tests/bench/recovery.py disturbs: dltrain's and Ray Train's, on one machine or in a lab, alike.

with one_machine({}) as place, start_run("dltrain", place, directory, pad, (2, 2)) as run:
    run.wait_for_steps(8.0); run.workers(); run.lines()
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[2])]

import faults  # noqa: E402
import recovery_peer  # noqa: E402
import recovery_task as task  # noqa: E402

from cluster.lab import Lab  # noqa: E402

PEERS = ("dltrain", "ray", "ray-tuned")
# Hang guard of what nobody measures.
_PATIENCE_SECONDS = 180.0


@dataclass
class Place:
    """A Ray that runs, and how a command is started beside its head."""

    address: str
    popen: Callable[..., subprocess.Popen[Any]]
    lab: Lab | None = None


def ray_settings(peer: str) -> dict[str, str]:
    """What a peer's Ray is told by its environment."""
    return recovery_peer.TUNED_ENV if peer == "ray-tuned" else {}


@contextlib.contextmanager
def one_machine(settings: Mapping[str, str], cpus: int = 2) -> Iterator[Place]:
    """A Ray of its own on this machine."""
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **settings}
    head = subprocess.Popen(
        [sys.executable, str(HERE.parents[1] / "ray_head.py"), str(cpus)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert head.stdout is not None

    def popen(command: list[str], **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(command, env={**environment, **options.pop("env", {})}, **options)

    try:
        yield Place(head.stdout.readline().strip(), popen)
    finally:
        head.communicate(timeout=_PATIENCE_SECONDS)


@contextlib.contextmanager
def several_hosts(settings: Mapping[str, str], hosts: int) -> Iterator[Place]:
    """A lab of hosts with one CPU slot each."""
    # Each finds the address of its peers by itself in dltrain; the others must be told.
    with Lab(hosts, cpus=1, env={**settings, "GLOO_SOCKET_IFNAME": "eth0"}) as lab:
        yield Place(lab.address, lab.hosts[0].popen, lab)


@dataclass
class Run:
    """A training that has been launched."""

    peer: str
    directory: Path
    launched: float
    process: subprocess.Popen[Any]
    run: Path = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.directory / "runs" / "recovery"

    def lines(self) -> list[faults.Line]:
        """The steps made so far."""
        if self.peer == "dltrain":
            return faults.step_lines(self.run)
        ends: dict[tuple[float, int], float] = {}
        for line in self._peer_lines():
            key = (line["group"], line["step"])
            ends[key] = max(ends.get(key, 0.0), line["time"])
        return [faults.Line(step, group, end) for (group, step), end in ends.items()]

    def workers(self) -> list[dict[str, Any]]:
        """Rank, pid and node of every worker that is there now."""
        if self.peer == "dltrain":
            return list(json.loads((self.run / "state.json").read_text())["workers"])
        lines = self._peer_lines()
        newest = max((line["group"] for line in lines), default=None)
        return list({line["pid"]: line for line in lines if line["group"] == newest}.values())

    def _peer_lines(self) -> list[dict[str, Any]]:
        return [{**line, "rank": rank} for rank in range(3) for line in faults.journal(self.directory, f"rank-{rank}")]

    def wait_for(self, condition: Callable[[], Any], seconds: float = _PATIENCE_SECONDS) -> Any:
        """Polls until there is something true, or None when the time is up."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            if self.process.poll() is not None:
                raise SystemExit(f"{self.peer} ended by itself:\n{(self.directory / 'log').read_text()[-3000:]}")
            time.sleep(0.2)
        return None

    def train_for(self, seconds: float) -> None:
        """Waits until it has trained that long since its first step."""
        if not self.wait_for(self.lines):
            raise SystemExit(f"{self.peer} made no step:\n{(self.directory / 'log').read_text()[-3000:]}")
        first = min(line.time for line in self.lines())
        self.wait_for(lambda: time.time() - first >= seconds and self.workers())


@contextlib.contextmanager
def start_run(peer: str, place: Place, directory: Path, pad_seconds: float, workers: tuple[int, int]) -> Iterator[Run]:
    """Launches the training; it is killed at the end."""
    directory.mkdir()
    if peer == "dltrain":
        command = [
            str(Path(sys.executable).parent / "dltrain"),
            "run",
            str(_write_spec(directory, pad_seconds, workers)),
        ]
        command += ["--json", "--address", place.address]
    else:
        config = {
            "address": place.address,
            "workers": workers,
            "directory": str(directory),
            "pad_seconds": pad_seconds,
            "every": task.CHECKPOINT_EVERY,
            "tuned": peer == "ray-tuned",
        }
        command = [sys.executable, str(HERE.with_name("recovery_peer.py")), json.dumps(config)]
    with (directory / "log").open("w") as log:
        launched = time.time()
        process = place.popen(command, stdout=log, stderr=log, cwd=directory)
    try:
        yield Run(peer, directory, launched, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _write_spec(directory: Path, pad_seconds: float, workers: tuple[int, int]) -> Path:
    low, high = workers
    spec = {
        "name": "recovery",
        "task": f"{HERE.with_name('recovery_task.py')}:Recovery",
        "args": {"pad_seconds": pad_seconds},
        "data": {"train": str(directory.parent / "data")},
        "batch": {"global": task.BATCH},
        "train": {"steps": task.STEPS},
        "optim": {"lr": 1e-3},
        "engine": {"zero": 1},
        "workers": {"min": low, "max": high},
        "checkpoint": {"every": task.CHECKPOINT_EVERY},
        "metrics": {"port": 0},
        "runs": str(directory / "runs"),
    }
    path = directory / "job.yaml"
    path.write_text(json.dumps(spec))
    return path
