"""A Ray cluster of several hosts on one machine, whose hosts can be cut off, slowed down, killed and added.

    python -m cluster.lab up --hosts 3 --cpus 1        # prints the lab's name and Ray's address
    python -m cluster.lab exec 0 -- dltrain run job.yaml --address 10.77.0.2:6379
    python -m cluster.lab cut 2; python -m cluster.lab join 2
    python -m cluster.lab slow 1 --mbit 100 --latency-ms 50
    python -m cluster.lab kill 1; python -m cluster.lab add
    python -m cluster.lab down

    with Lab(hosts=3, cpus=1) as lab:
        lab.hosts[0].run(["dltrain", "run", "job.yaml", "--address", lab.address])
        lab.hosts[2].cut()

Host 0 has Ray's head; drivers run there. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.network import LabError, Network, address_of, all_networks, what_is_missing

__all__ = ["Host", "Lab", "LabError", "what_is_missing"]

_PORT = 6379
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
        env: added to the environment of Ray and of every command, for example Ray's own settings.
    """

    def __init__(self, hosts: int = 3, cpus: int = 1, ray: bool = True, env: Mapping[str, str] | None = None) -> None:
        self._num_hosts, self._cpus, self._ray = hosts, cpus, ray
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
            LabError: the machine lacks something, or Ray did not start.
        """
        missing = what_is_missing()
        if missing:
            raise LabError(missing)
        take_down_abandoned()
        self.directory.mkdir(mode=0o700)
        self._save(owner)
        try:
            self.network.up()
            for index in range(self._num_hosts):
                self.hosts.append(Host(self, index, self.network.plug(index)))
            if self._ray:
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
        if self._ray:
            self.start_ray([host])
        return host

    def down(self) -> None:
        """Takes everything away; may be called again."""
        _take_down(self.name)
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
        role = (
            ["--head", f"--port={_PORT}", "--include-dashboard=false"]
            if host.index == 0
            else ["--address", self.address]
        )
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
        state = {"cpus": self._cpus, "ray": self._ray, "env": self.env, "owner": owner, "owner_started": started}
        path = self.directory / "lab.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(state))

    @classmethod
    def attach(cls, name: str | None = None) -> Lab:
        """A lab that is up; without a name the only one that has no owner.

        Raises:
            LabError: there is none, or more than one.
        """
        names = [name] if name else _unowned()
        if len(names) != 1 or not _state(names[0]):
            found = ", ".join(all_networks()) or "none"
            raise LabError(f"which lab? Up on this machine: {found}. Choose with --lab, or start one with `up`")
        state = _state(names[0])
        lab = cls(0, state["cpus"], state["ray"], state["env"])
        lab.name, lab.network = names[0], Network(names[0])
        lab.hosts = [Host(lab, index, address_of(index)) for index in lab.network.hosts()]
        return lab


def take_down_abandoned() -> None:
    """Takes down the labs whose owner died."""
    for name in all_networks():
        state = _state(name)
        owner = state.get("owner")
        if owner and _start_time(owner) != state["owner_started"]:
            _take_down(name)


def _take_down(name: str) -> None:
    Network(name).down()
    shutil.rmtree(_directory(name), ignore_errors=True)


def _unowned() -> list[str]:
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


# ---- the command ----


def _show(lab: Lab, as_json: bool) -> None:
    hosts = [{"host": host.index, "address": host.address} for host in lab.hosts]
    if as_json:
        print(json.dumps({"lab": lab.name, "address": lab.address, "hosts": hosts, "env": lab.env}))
        return
    print(f"{lab.name}: {len(hosts)} hosts, Ray at {lab.address}")
    print(f"  on a host: python -m cluster.lab exec 0 -- dltrain run SPEC --address {lab.address}")
    print("  away with it: python -m cluster.lab down")


def _up(options: argparse.Namespace) -> int:
    lab = Lab(options.hosts, options.cpus)
    lab.up()
    _show(lab, options.json)
    return 0


def _exec(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    return _host(options).run(command, check=False).returncode


def _add(options: argparse.Namespace) -> int:
    host = Lab.attach(options.lab).add()
    print(json.dumps({"host": host.index, "address": host.address}))
    return 0


def _down(options: argparse.Namespace) -> int:
    names = all_networks() if options.all else [options.lab] if options.lab else _unowned()
    for name in names:
        _take_down(name)
    return 0


def _host(options: argparse.Namespace) -> Host:
    lab = Lab.attach(options.lab)
    for host in lab.hosts:
        if host.index == options.host:
            return host
    raise LabError(f"no host {options.host}: {lab.name} has 0 to {len(lab.hosts) - 1}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)

    def verb(name: str, what: str, act: Callable[[argparse.Namespace], Any], host: bool = False) -> Any:
        added = verbs.add_parser(name, help=what)
        added.set_defaults(act=act)
        added.add_argument("--lab", help="its name, when several are up")
        if host:
            added.add_argument("host", type=int, help="its number")
        return added

    up = verb("up", "start a lab", _up)
    up.add_argument("--hosts", type=int, default=3)
    up.add_argument("--cpus", type=int, default=1, help="of each host, as Ray counts them")
    up.add_argument("--json", action="store_true", help="one JSON object on stdout, with the token")
    run = verb("exec", "run a command on a host", _exec, host=True)
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    verb("cut", "pull a host's cable", lambda o: _host(o).cut(), host=True)
    verb("join", "put the cable back", lambda o: _host(o).join(), host=True)
    slow = verb("slow", "limit a host's cable", lambda o: _host(o).slow(o.mbit, o.latency_ms), host=True)
    slow.add_argument("--mbit", type=float, required=True, help="rate, both ways; 0 takes the limit away")
    slow.add_argument("--latency-ms", type=float, default=50.0, help="longest wait of a packet for its turn")
    verb("kill", "end all processes of a host", lambda o: _host(o).kill(), host=True)
    verb("start", "start Ray on a killed host again", lambda o: _host(o).start(), host=True)
    verb("add", "one more host joins", _add)
    verb("down", "take it all away", _down).add_argument("--all", action="store_true", help="every lab there is")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 when the lab can't do it."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.act(options) or 0)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
