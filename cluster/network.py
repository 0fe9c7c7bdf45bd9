"""Several hosts on one Linux machine: network namespaces with an address each, joined by a switch.

    network = Network("lab1a2b3c")
    network.up(); network.plug(0); network.plug(1)
    network.run(0, ["ip", "address"])
    network.cut(1); network.join(1); network.slow(1, mbit=100, latency_ms=50)
    network.down()

The switch is a bridge in a namespace of its own: the machine's own network is not touched, so any number of labs
can have the same addresses at once. Files, process ids and shared memory are common to all hosts. Needs root and
iproute2.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cable", "LabError", "LabUsageError", "Network", "address_of", "all_networks", "what_is_missing"]

_NAME = re.compile(r"^(lab[0-9a-f]{6})-\w+$")
_SUBNET = "10.77.0"
_MOST_HOSTS = 253
_KILL_SECONDS = 10.0
# Where iproute2 looks for files of a namespace's own.
_NAMES = Path("/etc/netns")


class LabError(RuntimeError):
    """The lab can't do what was asked."""

    exit_code = 1


class LabUsageError(LabError):
    """What was asked for can't be: the message says what can."""

    exit_code = 2


@dataclass(frozen=True)
class Cable:
    """How a host is connected: whether at all, and the rate that it is limited to, if it is."""

    is_up: bool
    mbit: float | None


def what_is_missing() -> str:
    """Why there can be no lab on this machine; empty when there can."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, and this is {sys.platform}"
    if os.geteuid() != 0:
        return 'network namespaces need root. Try: sudo env "PATH=$PATH" python -m cluster.lab up'
    programs = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if programs:
        return f"{' and '.join(programs)} not found. Try: apt-get install iproute2"
    probe = f"probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces: {made.stderr.strip()}. In a container they need --privileged"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


def address_of(index: int) -> str:
    """A host's address."""
    return f"{_SUBNET}.{index + 2}"


def all_networks() -> list[str]:
    """Names of the networks that are up on this machine."""
    found = map(_NAME.match, _namespaces())
    return sorted({match[1] for match in found if match})


class Network:
    """A switch and the hosts plugged into it.

    Args:
        name: "lab" and six hexadecimal digits; unique on the machine.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._switch = f"{name}-switch"

    def up(self) -> None:
        """Makes the switch."""
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._switch, "address", "add", f"{_SUBNET}.1/24", "dev", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge", "up")

    def plug(self, index: int) -> str:
        """Makes host `index` (0 to 252) and plugs it in; returns its address."""
        space, port, address = self.namespace(index), f"port{index}", address_of(index)
        _ip("netns", "add", space)
        _write_names(space)
        _ip("link", "add", port, "netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "link", "set", "eth0", "up")
        # Ray and gloo learn their address from the route to the world outside.
        _ip("-n", space, "route", "add", "default", "via", f"{_SUBNET}.1")
        return address

    def namespace(self, index: int) -> str:
        """The name of a host's namespace."""
        return f"{self.name}-{index}"

    def hosts(self) -> list[int]:
        """The hosts that are plugged in."""
        found = (space.rpartition("-") for space in _namespaces())
        return sorted(int(index) for name, _, index in found if name == self.name and index.isdigit())

    def command(self, index: int, command: Sequence[str]) -> list[str]:
        """The command line that runs `command` on a host; the process id is that of `command`."""
        return ["ip", "netns", "exec", self.namespace(index), *command]

    def cut(self, index: int) -> None:
        """Pulls the cable out at the switch: the host keeps its address and talks to itself, as a real one does."""
        _ip("-n", self._switch, "link", "set", f"port{index}", "down")

    def join(self, index: int) -> None:
        """Puts the cable back."""
        _ip("-n", self._switch, "link", "set", f"port{index}", "up")

    def slow(self, index: int, mbit: float, latency_ms: float) -> None:
        """Limits both directions of a cable; packets wait up to `latency_ms` for their turn. 0 Mbit: no limit."""
        for space, device in ((self.namespace(index), "eth0"), (self._switch, f"port{index}")):
            if not mbit:
                _run("tc", "-n", space, "qdisc", "del", "dev", device, "root", check=False)
                continue
            limit = ["rate", f"{mbit:g}mbit", "burst", "32kbit", "latency", f"{latency_ms:g}ms"]
            _run("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", *limit)

    def cable(self, index: int) -> Cable:
        """How a host is connected now."""
        link = _ip("-n", self._switch, "-j", "link", "show", f"port{index}")
        limits = _run("tc", "-n", self.namespace(index), "-j", "qdisc", "show", "dev", "eth0")
        return _cable(link, limits)

    def pids(self, index: int) -> list[int]:
        """The processes that run on a host."""
        return _pids(self.namespace(index))

    def kill(self, index: int) -> None:
        """Ends every process of a host at once."""
        _kill_all(self.namespace(index))

    def down(self) -> None:
        """Ends every process of every host and takes the network away; nothing happens when there is none."""
        mine = [space for space in _namespaces() if space.startswith(f"{self.name}-")]
        for space in mine:
            _kill_all(space)
        for space in mine:
            # Its interfaces go with it. Another program may be taking the same abandoned network away.
            with contextlib.suppress(LabError):
                _ip("netns", "del", space)
            if space in _namespaces():
                raise LabError(f"the namespace {space} can't be taken away")
            shutil.rmtree(_NAMES / space, ignore_errors=True)


def _write_names(space: str) -> None:
    """What `ip netns exec` puts in the place of /etc/hosts and /etc/resolv.conf.

    torch asks for the name of every host that connects. Where no name server can be reached that takes 10 to 20 s; here
    every address has a name, and whatever else is asked for is refused at once by the switch.
    """
    files = _NAMES / space
    files.mkdir(parents=True, exist_ok=True)
    hosts = ["127.0.0.1 localhost", f"{_SUBNET}.1 switch", *(f"{address_of(i)} host{i}" for i in range(_MOST_HOSTS))]
    (files / "hosts").write_text("\n".join(hosts) + "\n")
    (files / "resolv.conf").write_text(f"nameserver {_SUBNET}.1\n")


def _cable(link: str, limits: str) -> Cable:
    """From what `ip -j link` and `tc -j qdisc` say; tc counts bytes a second."""
    rates = [limit["options"]["rate"] for limit in json.loads(limits) if limit["kind"] == "tbf"]
    return Cable("UP" in json.loads(link)[0]["flags"], rates[0] * 8 / 1e6 if rates else None)


def _pids(space: str) -> list[int]:
    # A process may end while the list is made: that is not an error.
    return [int(pid) for pid in _run("ip", "netns", "pids", space, check=False).split()]


def _kill_all(space: str) -> None:
    deadline = time.monotonic() + _KILL_SECONDS
    semaphores: set[str] = set()
    while pids := _pids(space):
        # Ray's dashboard has some, with names that a killed process can't take back.
        semaphores |= {name for pid in pids for name in _semaphores(pid)}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise LabError(f"processes {pids} in namespace {space} do not end")
        time.sleep(0.02)
    for name in semaphores:
        Path(name).unlink(missing_ok=True)


def _semaphores(pid: int) -> set[str]:
    """Files of the semaphores that a process has open."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[-1] for line in lines if "/dev/shm/sem." in line and not line.endswith("(deleted)")}


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str, check: bool = True) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LabUsageError(f"{command[0]} not found. Try: apt-get install iproute2") from None
    if check and done.returncode:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
