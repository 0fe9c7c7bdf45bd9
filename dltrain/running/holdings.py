"""What an agent holds of its rank and of others: snapshots, and the newest reports, in memory that outlives a worker.

holdings = Holdings()
holdings.open(slots, mine=True)         # a worker's slots, or those another agent of this node holds
holdings.keep(holding, data, reports)   # a copy of one that lies on another node
holdings.all()
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from dltrain.checkpoint.slots import HeldSlots, copy_of
from dltrain.observing.reports import StepReport
from dltrain.running import blackbox
from dltrain.running.messages import Holding, Slots

__all__ = ["Holdings"]

_COPIES = 2


@dataclass
class _Entry:
    """Slots that are held open."""

    slots: Slots
    held: HeldSlots
    box_fd: int
    mine: bool

    def close(self) -> None:
        self.held.close()
        if self.box_fd >= 0:
            os.close(self.box_fd)


@dataclass
class _Copy:
    """A snapshot of another node, in an anonymous file of our own, so that it is read like the others."""

    holding: Holding
    fd: int
    reports: list[bytes]


class Holdings:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []
        self._copies: list[_Copy] = []

    def open(self, slots: Slots, mine: bool) -> Slots | None:
        """Opens another process's slots; None when it is gone."""
        try:
            held = HeldSlots.open(slots.pid, slots.fds, slots.num_bytes)
        except OSError:
            return None
        box_fd = -1
        with contextlib.suppress(OSError):
            box_fd = os.open(f"/proc/{slots.pid}/fd/{slots.box_fd}", os.O_RDWR | os.O_CLOEXEC)
        ours = replace(slots, pid=os.getpid(), fds=held.fds, box_fd=box_fd)
        with self._lock:
            # The same rank's slots made anew take the place of those before.
            self._drop(lambda e: (e.slots.attempt, e.slots.rank, e.mine) == (slots.attempt, slots.rank, mine))
            self._entries.append(_Entry(ours, held, box_fd, mine))
        return ours

    def keep(self, holding: Holding, data: bytes, reports: list[bytes]) -> None:
        """Keeps a copy; of a rank the newest two."""
        fd = copy_of(data)
        kept = replace(holding, pid=os.getpid(), fd=fd)
        with self._lock:
            same = [c for c in self._copies if c.holding.rank == holding.rank]
            for old in same[: max(0, len(same) - _COPIES + 1)]:
                os.close(old.fd)
                self._copies.remove(old)
            self._copies.append(_Copy(kept, fd, reports))

    def mine(self) -> Slots | None:
        """The newest slots of this agent's own rank."""
        with self._lock:
            return next((e.slots for e in reversed(self._entries) if e.mine), None)

    def slot_bytes(self, index: int) -> bytes:
        """What is in a slot of this agent's own rank."""
        with self._lock:
            entry = next(e for e in reversed(self._entries) if e.mine)
        return entry.held.read(index)

    def all(self) -> list[Holding]:
        """Every snapshot that is whole, own and others'."""
        with self._lock:
            found = [c.holding for c in self._copies]
            for e in self._entries:
                for index, seal in e.held.seals().items():
                    s = e.slots
                    where = (s.attempt, s.rank, seal.step, seal.position, seal.applied, s.pid, s.fds[index])
                    found.append(Holding(*where, s.num_bytes, s.parts, s.whole, s.ties))
            return found

    def reports(self, rank: int) -> list[StepReport]:
        """The newest reports of a rank, from its black box."""
        return [pickle.loads(record) for record in self.records(rank)]

    def records(self, rank: int) -> list[bytes]:
        """The same, as they are sent."""
        with self._lock:
            raw = [r for c in self._copies if c.holding.rank == rank for r in c.reports]
            for e in self._entries:
                if e.slots.rank == rank and e.box_fd >= 0:
                    raw += blackbox.reports(e.box_fd)
        return raw

    def read(self, attempt: int, rank: int, step: int, start: int, end: int) -> bytes | None:
        """Bytes of a snapshot; None when it is not here any more."""
        found = self._find(attempt, rank, step)
        return HeldSlots([found.fd], found.num_bytes).read(0, start, end) if found else None

    def copy(self, attempt: int, rank: int, step: int) -> tuple[Holding, bytes] | None:
        """A whole snapshot."""
        found = self._find(attempt, rank, step)
        return (found, HeldSlots([found.fd], found.num_bytes).read(0)) if found else None

    def _find(self, attempt: int, rank: int, step: int) -> Holding | None:
        wanted = (attempt, rank, step)
        return next((h for h in self.all() if (h.attempt, h.rank, h.step) == wanted), None)

    def forget(self, attempt: int) -> None:
        """Lets go of what earlier attempts left."""
        with self._lock:
            self._drop(lambda e: e.slots.attempt < attempt)
            for c in [c for c in self._copies if c.holding.attempt < attempt]:
                os.close(c.fd)
                self._copies.remove(c)

    def _drop(self, which: Callable[[_Entry], bool]) -> None:
        for e in [e for e in self._entries if which(e)]:
            e.close()
            self._entries.remove(e)
