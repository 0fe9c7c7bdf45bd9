"""A Ray head with its dashboard and token authentication, for tests that submit jobs; all its ports are random.

    with running_head(cpus=3) as head:
        subprocess.run(["dltrain", "jobs", "--address", head.url], env={**os.environ, **head.env})

Its processes are known by a mark in their environment and end with the `with`; so do those of jobs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from leftovers import Leftovers
from ports import free_ports

__all__ = ["Head", "running_head"]

_START_SECONDS = 180.0
_END_SECONDS = 30.0
_OBJECT_STORE_BYTES = 80 * 1024 * 1024


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        url: of its dashboard.
        env: what a client needs.
        directory: Ray's files.
    """

    url: str
    env: dict[str, str]
    directory: Path
    leftovers: Leftovers

    def processes(self) -> list[psutil.Process]:
        """All that run on it, jobs included."""
        return self.leftovers.processes()


@contextlib.contextmanager
def running_head(cpus: int, env: Mapping[str, str] | None = None) -> Iterator[Head]:
    """Starts one.

    Args:
        env: added to its environment, which its jobs inherit; a RAY_AUTH_TOKEN in it is the token.
    """
    # Short: Ray puts sockets under it, and their paths may have 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="dlj-", dir="/tmp"))
    leftovers = Leftovers()
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": (env or {}).get("RAY_AUTH_TOKEN", secrets.token_hex(32))}
    gcs, *ports = free_ports(8)
    try:
        _start(directory, gcs, ports, cpus, {**leftovers.env, **(env or {}), **auth})
        yield Head(f"http://127.0.0.1:{ports[0]}", {**auth, "RAY_ADDRESS": ""}, directory, leftovers)
    finally:
        _end(leftovers)
        shutil.rmtree(directory, ignore_errors=True)


def _start(directory: Path, gcs: int, ports: list[int], cpus: int, env: Mapping[str, str]) -> None:
    dashboard, agent, agent_grpc, runtime_env, metrics, own_metrics, monitor_metrics = ports
    command = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs}",
        "--include-dashboard=true",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--runtime-env-agent-port={runtime_env}",
        f"--metrics-export-port={metrics}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--num-cpus={cpus}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--temp-dir={directory}",
        "--disable-usage-stats",
    ]
    environment = {
        **os.environ,
        # Where a job finds dltrain.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DASHBOARD_METRIC_PORT": str(own_metrics),
        "AUTOSCALER_METRIC_PORT": str(monitor_metrics),
        **env,
    }
    environment.pop("RAY_ADDRESS", None)
    # Not a pipe: Ray's processes, which stay, would keep it open.
    with (directory / "start.out").open("w+") as out:
        done = subprocess.run(command, env=environment, stdout=out, stderr=out, timeout=_START_SECONDS, check=False)
        out.seek(0)
        assert done.returncode == 0, out.read()


def _end(leftovers: Leftovers) -> None:
    """Kills what is marked until nothing is left: what is started meanwhile is found the next time."""
    while processes := leftovers.processes():
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=_END_SECONDS)
