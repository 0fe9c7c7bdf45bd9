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
        """Keeps a copy; of a rank the newest two, and two of the attempt before until there are as many of this one."""
        fd = copy_of(data)
        kept = replace(holding, pid=os.getpid(), fd=fd)
        with self._lock:
            self._copies.append(_Copy(kept, fd, reports))
            of_rank = [c for c in self._copies if c.holding.rank == holding.rank]
            same = [c for c in of_rank if c.holding.attempt == holding.attempt]
            whole = len(same) >= _COPIES
            for old in of_rank:
                if old in same[:-_COPIES] or (whole and old.holding.attempt < holding.attempt):
                    os.close(old.fd)
                    self._copies.remove(old)

    def mine(self) -> Slots | None:
        """The newest slots of this agent's own rank."""
        with self._lock:
            return next((e.slots for e in reversed(self._entries) if e.mine), None)

    def slot_bytes(self, attempt: int, step: int, index: int) -> tuple[Slots, bytes] | None:
        """A snapshot in a slot of this agent's own rank, with its layout; None when it is not there any more."""
        with self._lock:
            entry = next((e for e in reversed(self._entries) if e.mine and e.slots.attempt == attempt), None)
            seal = entry.held.seal(index) if entry else None
            if entry is None or seal is None or (seal.attempt, seal.step) != (attempt, step):
                return None
            slots, held = entry.slots, HeldSlots([os.dup(entry.held.fds[index])], entry.slots.num_bytes)
        return slots, _read(held)

    def all(self) -> list[Holding]:
        """Every snapshot that is whole, own and others'."""
        with self._lock:
            return self._all()

    def _all(self) -> list[Holding]:
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
        found = self._open(attempt, rank, step)
        return _read(found[1], start, end) if found else None

    def copy(self, attempt: int, rank: int, step: int) -> tuple[Holding, bytes] | None:
        """A whole snapshot."""
        found = self._open(attempt, rank, step)
        return (found[0], _read(found[1])) if found else None

    def _open(self, attempt: int, rank: int, step: int) -> tuple[Holding, HeldSlots] | None:
        wanted = (attempt, rank, step)
        with self._lock:
            found = next((h for h in self._all() if (h.attempt, h.rank, h.step) == wanted), None)
            # Held once more: it is read without the lock, and must not be closed meanwhile.
            return (found, HeldSlots([os.dup(found.fd)], found.num_bytes)) if found else None

    def forget(self, attempt: int, but: int = 0) -> None:
        """Lets go of what earlier attempts left, `but` one of them."""
        with self._lock:
            self._drop(lambda e: e.slots.attempt < attempt and e.slots.attempt != but)
            for c in [c for c in self._copies if c.holding.attempt < attempt and c.holding.attempt != but]:
                os.close(c.fd)
                self._copies.remove(c)

    def _drop(self, which: Callable[[_Entry], bool]) -> None:
        for e in [e for e in self._entries if which(e)]:
            e.close()
            self._entries.remove(e)


def _read(held: HeldSlots, start: int = 0, end: int | None = None) -> bytes:
    try:
        return held.read(0, start, end)
    finally:
        held.close()
