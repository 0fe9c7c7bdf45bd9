"""How a worker is, told from outside: whether it moves, what it is doing, and whether its machine is to be left.

sign = SignOfLife(); sign.open(pid, box_fd); sign.still()      # (seconds, "step")
stack_of(pid)                                                  # its Python stack, even when it is stopped
Doorbell(on_drain)                                             # what `dltrain drain` rings
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dltrain.running import blackbox

__all__ = ["Doorbell", "SignOfLife", "doorbells", "ring", "stack_of"]

_STACK_SECONDS = 10.0
_STATES = {"R": "running", "S": "sleeping", "D": "waiting for a disk", "T": "stopped (SIGSTOP)", "Z": "dead"}
# An abstract socket: it has no file, and it goes with the process.
_BELL = "dltrain-agent-"


class SignOfLife:
    """How long a worker has not moved, from its black box."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._fd, self._pid = -1, 0
        self._count, self._since = -1, clock()

    def begin(self) -> None:
        """From now on it should move."""
        self._since = self._clock()

    def open(self, pid: int, fd: int) -> None:
        """The box is there."""
        with contextlib.suppress(OSError):
            self._fd, self._pid = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), pid

    def still(self) -> tuple[float, str]:
        """Seconds since it was last seen to have moved, and the phase it is in."""
        now = self._clock()
        try:
            sign = blackbox.look(self._fd)
        except OSError:
            # Not there yet, or not any more.
            return now - self._since, "starting"
        if sign.count != self._count:
            self._count, self._since = sign.count, now
        return now - self._since, "stopped" if _letter(self._pid) == "T" else sign.phase

    def close(self) -> None:
        """Lets go of the box."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def stack_of(pid: int) -> str:
    """The process's state and the Python stacks of its threads; says why where they can't be read."""
    letter = _letter(pid)
    if not letter:
        return f"process {pid} is gone"
    state = f"process {pid} is {_STATES.get(letter, letter)}"
    spy = Path(sys.executable).parent / "py-spy"
    # Without stopping it: one that is stopped already would not answer.
    command = [str(spy), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_STACK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{state}; its stack can't be read: {error}"
    return f"{state}\n{done.stdout.strip() or done.stderr.strip()}"


def _letter(pid: int) -> str:
    """The kernel's letter for a process's state; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


class Doorbell:
    """Calls `on_drain` when this node's agents are asked to move away; who rang waits until this process is gone."""

    def __init__(self, on_drain: Callable[[], None]) -> None:
        self._on_drain = on_drain
        self._callers: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0{_bell()}{os.getpid()}")
        self._listener.listen()
        threading.Thread(target=self._answer, name="dltrain-doorbell", daemon=True).start()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                if _uid_of(caller) not in (0, os.getuid()):
                    caller.close()
                    continue
                self._callers.append(caller)
                self._on_drain()

    def close(self) -> None:
        """Tells those who wait that it is done."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for caller in self._callers:
            caller.close()


def _bell() -> str:
    """How doorbells' names begin; DLTRAIN_HOST tells hosts apart that are pretended to be on one machine."""
    host = os.environ.get("DLTRAIN_HOST", "")
    return f"{_BELL}{host}-" if host else _BELL


def _uid_of(caller: socket.socket) -> int:
    _, uid, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def doorbells() -> list[str]:
    """The doorbells of this host's agents."""
    lines, bell = Path("/proc/net/unix").read_text().splitlines()[1:], _bell()
    # The flag says that somebody listens there; connections have the same name.
    found = {line.split()[-1][1:] for line in lines if f"@{bell}" in line and line.split()[3] == "00010000"}
    # Of hosts that are pretended to be on this machine the names go on differently.
    return sorted(name for name in found if name.removeprefix(bell).isdigit())


def ring(bell: str, wait_seconds: float | None) -> bool:
    """Asks an agent to move away, and waits until it has; False when it has not in that time."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.settimeout(wait_seconds)
        try:
            caller.connect(f"\0{bell}")
            return wait_seconds == 0 or not caller.recv(1)
        except TimeoutError:
            return False
        except OSError:
            return True
