"""A Ray cluster of several hosts on one machine, whose hosts can be cut off, slowed down, killed and added.

    python -m cluster.lab up --hosts 3      # then exec, list, cut, mend, slow, kill, start, add, down: see --help

    with Lab(hosts=3, cpus=1) as lab:
        lab.hosts[0].run(["dltrain", "run", "job.yaml", "--address", lab.address])
        lab.hosts[2].cut()

Host 0 has Ray's head; drivers run there. Needs root and iproute2.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.network import LabError, LabUsageError, Network, address_of, all_networks, what_is_missing

__all__ = [
    "Host",
    "Lab",
    "LabError",
    "LabUsageError",
    "main",
    "take_down",
    "take_down_abandoned",
    "unowned",
    "what_is_missing",
]

_PORT = 6379
_DASHBOARD_PORT = 8265
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
_START_SECONDS = 120.0


class Host:
    """One host of a lab."""

    def __init__(self, lab: Lab, index: int, address: str) -> None:
        self._lab, self.index, self.address = lab, index, address

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Starts a command here, as `subprocess.Popen` does; `env` is added to the lab's."""
        environment = {**os.environ, **self._lab.env, **(options.pop("env", None) or {})}
        return subprocess.Popen(self._lab.network.command(self.index, command), env=environment, **options)

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Runs a command here to its end, as `subprocess.run` does."""
        environment = {**os.environ, **self._lab.env, **(options.pop("env", None) or {})}
        return subprocess.run(self._lab.network.command(self.index, command), env=environment, **options)

    def cut(self) -> None:
        """Pulls its network cable."""
        self._lab.network.cut(self.index)

    def join(self) -> None:
        """Puts its network cable back."""
        self._lab.network.join(self.index)

    def slow(self, mbit: float, latency_ms: float = 50.0) -> None:
        """Limits its cable's rate in both directions; 0 takes the limit away."""
        self._lab.network.slow(self.index, mbit, latency_ms)

    def kill(self) -> None:
        """Ends every process on it at once, Ray's and others: the host as others see it is gone."""
        self._lab.network.kill(self.index)

    def start(self) -> None:
        """Starts Ray on it again after `kill`."""
        self._lab.start_ray([self])

    def pids(self) -> list[int]:
        """The processes on it."""
        return self._lab.network.pids(self.index)

    def reaches(self, other: Host, seconds: float = 1.0) -> bool:
        """Whether a packet gets to another host and an answer comes back."""
        # A port where nobody listens is answered with a refusal by the other host itself.
        code = (
            "import socket, sys\n"
            "probe = socket.socket()\n"
            f"probe.settimeout({seconds})\n"
            f"sys.exit(probe.connect_ex(('{other.address}', 9)) != {errno.ECONNREFUSED})"
        )
        return self.run([sys.executable, "-I", "-S", "-c", code], check=False).returncode == 0


class Lab:
    """Hosts, and a Ray over all of them.

    Args:
        hosts: how many to begin with.
        cpus: that each tells Ray it has.
        ray: False for the network alone.
        dashboard: whether the head serves Ray's job API, at port 8265 of host 0.
        env: added to the environment of Ray and of every command, for example Ray's own settings.
    """

    def __init__(
        self,
        hosts: int = 3,
        cpus: int = 1,
        ray: bool = True,
        env: Mapping[str, str] | None = None,
        dashboard: bool = False,
    ) -> None:
        self._num_hosts, self._cpus, self.has_ray, self._dashboard = hosts, cpus, ray, dashboard
        self.owner: int | None = None
        self.name = f"lab{secrets.token_hex(3)}"
        self.network = Network(self.name)
        self.hosts: list[Host] = []
        token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
        # Ray wants a token, the same everywhere.
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, **(env or {})}

    @property
    def directory(self) -> Path:
        """Ray's files. A short path: Ray puts sockets in it, and their paths may have 107 characters."""
        return _directory(self.name)

    @property
    def address(self) -> str:
        """Ray's address, for `--address`."""
        return f"{self.hosts[0].address}:{_PORT}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted, from any of the hosts."""
        return f"http://{self.hosts[0].address}:{_DASHBOARD_PORT}"

    def __enter__(self) -> Lab:
        self.up(owner=os.getpid())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self, owner: int | None = None) -> None:
        """Makes the hosts and starts Ray; the lab is taken down with its owner, or by `down` when there is none.

        Raises:
            LabUsageError: the machine lacks something.
            LabError: Ray did not start.
        """
        missing = what_is_missing()
        if missing:
            raise LabUsageError(f"there can be no lab here: {missing}")
        take_down_abandoned()
        self.directory.mkdir(mode=0o700)
        self._save(owner)
        try:
            self.network.up()
            for index in range(self._num_hosts):
                self.hosts.append(Host(self, index, self.network.plug(index)))
            if self.has_ray:
                self.start_ray(self.hosts[:1])
                self.start_ray(self.hosts[1:])
        except BaseException:
            self.down()
            raise

    def add(self) -> Host:
        """One more host joins."""
        index = len(self.hosts)
        host = Host(self, index, self.network.plug(index))
        self.hosts.append(host)
        if self.has_ray:
            self.start_ray([host])
        return host

    def down(self) -> None:
        """Takes everything away; may be called again."""
        take_down(self.name)
        self.hosts.clear()

    def start_ray(self, hosts: Sequence[Host]) -> None:
        """Starts Ray on these hosts, all at once.

        Raises:
            LabError: it did not start; with what it said.
        """
        starting = [
            host.popen(self._ray_command(host), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for host in hosts
        ]
        for host, process in zip(hosts, starting, strict=True):
            out, _ = process.communicate(timeout=_START_SECONDS)
            if process.returncode:
                raise LabError(f"Ray did not start on host {host.index}:\n{out}")

    def _ray_command(self, host: Host) -> list[str]:
        dashboard = (
            ["--dashboard-host=0.0.0.0", f"--dashboard-port={_DASHBOARD_PORT}"]
            if self._dashboard
            else ["--include-dashboard=false"]
        )
        role = ["--head", f"--port={_PORT}", *dashboard] if host.index == 0 else ["--address", self.address]
        return [
            str(Path(sys.executable).parent / "ray"),
            "start",
            *role,
            f"--node-ip-address={host.address}",
            f"--num-cpus={self._cpus}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            f"--temp-dir={self.directory / str(host.index)}",
            "--disable-usage-stats",
        ]

    def _save(self, owner: int | None) -> None:
        started = _start_time(owner) if owner else None
        made = {"cpus": self._cpus, "ray": self.has_ray, "env": self.env, "dashboard": self._dashboard}
        state = {**made, "owner": owner, "owner_started": started}
        path = self.directory / "lab.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(state))

    @classmethod
    def attach(cls, name: str | None = None) -> Lab:
        """A lab that is up; without a name the only one that has no owner.

        Raises:
            LabUsageError: there is none, or more than one.
        """
        names = [name] if name else unowned()
        if len(names) != 1 or not _state(names[0]):
            found = ", ".join(all_networks()) or "none"
            raise LabUsageError(f"which lab? Up on this machine: {found}. Choose with --lab, or start one with `up`")
        state = _state(names[0])
        lab = cls(0, state["cpus"], state["ray"], state["env"], state.get("dashboard", False))
        lab.name, lab.network, lab.owner = names[0], Network(names[0]), state.get("owner")
        lab.hosts = [Host(lab, index, address_of(index)) for index in lab.network.hosts()]
        return lab


def take_down_abandoned() -> None:
    """Takes down the labs whose owner died."""
    for name in all_networks():
        state = _state(name)
        owner = state.get("owner")
        if owner and _start_time(owner) != state["owner_started"]:
            take_down(name)


def take_down(name: str) -> None:
    """Takes a lab away, whoever started it; nothing happens when there is none of that name."""
    Network(name).down()
    shutil.rmtree(_directory(name), ignore_errors=True)


def unowned() -> list[str]:
    """The labs that were started by command: those of a program end with it."""
    return [name for name in all_networks() if _state(name).get("owner") is None]


def _directory(name: str) -> Path:
    return Path(tempfile.gettempdir()) / name


def _state(name: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((_directory(name) / "lab.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return state


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with its id this tells it from a later one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text.rpartition(")")[2].split()[19])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    from cluster import lab_command

    return lab_command.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
