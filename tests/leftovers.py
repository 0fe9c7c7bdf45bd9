"""Whether a program that ran left anything on the machine: processes, shared memory, memfds, ports, locks.

    leftovers = Leftovers()
    subprocess.run(command, env={**os.environ, **leftovers.env})
    assert leftovers.found() == []

Its processes are known by a variable in their environment, which whatever they start inherits. The machine may be
shared: what others do is not counted.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["Leftovers"]

_VARIABLE = "DLTRAIN_TEST_MARK"
_SHM = Path("/dev/shm")
_MOMENT_SECONDS = 2.0
# Of Python's multiprocessing. dltrain makes none (tests/unit/test_nursery_imports.py), but Ray's dashboards do, and one
# of another checkout that is killed leaves some, of which nobody can tell whose they were.
_OTHERS = "sem.mp-"


class Leftovers:
    """Marks what is started with `env`, and finds what is left of it.

    Args:
        lock_directories: where a file called lock, or ending in .lock, may not stay.
    """

    def __init__(self, *lock_directories: Path) -> None:
        self._mark = secrets.token_hex(8)
        self._lock_directories = lock_directories
        self._shm = set(_SHM.iterdir())
        self._locks = set(self._all_locks())

    @property
    def env(self) -> dict[str, str]:
        """To be in the environment of what is watched."""
        return {_VARIABLE: self._mark}

    def processes(self) -> list[psutil.Process]:
        """The marked processes that live."""
        needle = f"{_VARIABLE}={self._mark}".encode()
        return [psutil.Process(pid) for pid in _pids() if needle in _environment(pid)]

    def memfds(self) -> list[str]:
        """The memfds that marked processes hold."""
        found = []
        for process in self.processes():
            for link in _links(process.pid):
                if link.startswith("/memfd:"):
                    found.append(f"{link} of {process.pid}")
        return found

    def ports(self) -> set[int]:
        """The TCP ports on which marked processes listen."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                found |= {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        return found

    def found(self) -> list[str]:
        """What is left, a line each."""
        processes = [f"process {p.pid}: {' '.join(_command(p))[:100]}" for p in self.processes()]
        new = (path for path in set(_SHM.iterdir()) - self._shm if not path.name.startswith(_OTHERS))
        shm = [f"shared memory {path}" for path in new if _stays(path)]
        locks = [f"lock {path}" for path in set(self._all_locks()) - self._locks]
        return [*processes, *shm, *locks]

    def _all_locks(self) -> Iterator[Path]:
        for directory in self._lock_directories:
            yield from (path for path in directory.rglob("*lock") if path.name in ("lock", f"{path.stem}.lock"))


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has ended, or is not ours
        return b""


def _links(pid: int) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _stays(path: Path) -> bool:
    """Whether nobody has it open, nor removes it: what a semaphore is made with has a name for a moment."""
    end = time.monotonic() + _MOMENT_SECONDS
    while time.monotonic() < end:
        if not path.exists() or _is_open(path):
            return False
        time.sleep(0.1)
    return True


def _is_open(path: Path) -> bool:
    """Whether a process has it open or mapped: then it is somebody's, and not left behind."""
    name = str(path)
    return any(name in _links(pid) or name in _maps(pid) for pid in _pids())


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""
