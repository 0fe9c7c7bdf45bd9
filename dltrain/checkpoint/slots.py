"""Slots: a rank's state after a step, in memory that outlives the rank and dies with those who hold it.

writer = SlotWriter(head, num_bytes, count=5)          # the worker; head: what a safetensors file begins with
index = writer.free(); writer.write(index, Seal(...), copy)
held = HeldSlots.open(pid, writer.fds, num_bytes)      # its agent, and the agent's buddy
held.seals(); held.read(index, start, end)

A slot is an anonymous file (memfd) with no name on any disk: one page that says what is in it, then the bytes of a
safetensors file, ready to be uploaded or read by slices. The seal is broken before a slot is written and set after,
so that whoever looks sees a whole snapshot or none, whenever the writer died.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["HeldSlots", "Seal", "SlotPlace", "SlotStore", "SlotWriter", "copy_of"]

_PAGE = 4096
_SEAL = struct.Struct("<8sqqqq")
_MAGIC = b"dltrain1"
_BROKEN = -1
# Recent ones that a reader may want: ranks can die a step apart.
_RECENT = 2


@dataclass(frozen=True, slots=True)
class Seal:
    """What is in a slot: the state after `step`, having consumed `position` samples, with so many updates applied."""

    attempt: int
    step: int
    position: int
    applied: int


class SlotWriter:
    """The slots of one rank, made and written by its worker.

    Args:
        head: the beginning of the safetensors file, up to its tensors; num_bytes: its whole size.
        count: slots; their memory is taken when they are first written.

    Attributes:
        fds: for others of the same user, as /proc/PID/fd/N.
    """

    def __init__(self, head: bytes, num_bytes: int, count: int) -> None:
        self._head, self.num_bytes = head, num_bytes
        self.fds = [os.memfd_create("dltrain-snapshot") for _ in range(count)]
        self._maps: list[mmap.mmap | None] = [None] * count
        # slot -> step
        self._recent: dict[int, int] = {}
        self._pinned: set[int] = set()
        for fd in self.fds:
            os.ftruncate(fd, _PAGE + num_bytes)

    def free(self) -> int | None:
        """A slot that neither holds one of the newest snapshots nor is pinned; None when there is none."""
        taken = {*self._recent, *self._pinned}
        return next((i for i in range(len(self.fds)) if i not in taken), None)

    def memory(self, index: int) -> memoryview:
        """The slot's safetensors bytes, writable."""
        held = self._maps[index]
        if held is None:
            held = self._maps[index] = mmap.mmap(self.fds[index], 0)
            held[_PAGE : _PAGE + len(self._head)] = self._head
        return memoryview(held)[_PAGE:]

    def write(self, index: int, seal: Seal, copy: Callable[[], None]) -> None:
        """Breaks the slot's seal, has `copy` fill its memory, and seals it."""
        self.memory(index)
        held = self._maps[index]
        assert held is not None
        _SEAL.pack_into(held, 0, _MAGIC, 0, _BROKEN, 0, 0)
        copy()
        _SEAL.pack_into(held, 0, _MAGIC, seal.attempt, seal.step, seal.position, seal.applied)
        # A step that is taken a second time takes the place of its first.
        others = [(i, step) for i, step in self._recent.items() if step != seal.step and i != index]
        self._recent = dict([*others, (index, seal.step)][-_RECENT:])

    def close(self) -> None:
        """Lets go of them."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def pin(self, index: int) -> None:
        """Keeps a slot as it is until it is unpinned."""
        self._pinned.add(index)

    def unpin(self, index: int) -> None:
        """It may be written again."""
        self._pinned.discard(index)


class HeldSlots:
    """Another process's slots, held open: they stay when their writer is gone.

    Args:
        fds: ours; closed by `close`.
    """

    def __init__(self, fds: Sequence[int], num_bytes: int) -> None:
        self.fds, self.num_bytes = list(fds), num_bytes

    @classmethod
    def open(cls, pid: int, fds: Sequence[int], num_bytes: int) -> HeldSlots:
        """Opens the slots of a process of this user on this machine.

        Raises:
            OSError: it is gone.
        """
        opened: list[int] = []
        try:
            for fd in fds:
                opened.append(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        return cls(opened, num_bytes)

    def seal(self, index: int) -> Seal | None:
        """What is in a slot; None while it is being written, or never was."""
        raw = os.pread(self.fds[index], _SEAL.size, 0)
        if len(raw) < _SEAL.size:
            return None
        magic, attempt, step, position, applied = _SEAL.unpack(raw)
        return Seal(attempt, step, position, applied) if magic == _MAGIC and step != _BROKEN else None

    def seals(self) -> dict[int, Seal]:
        """Index of each slot that is whole -> what is in it."""
        found = {i: self.seal(i) for i in range(len(self.fds))}
        return {i: seal for i, seal in found.items() if seal}

    def read(self, index: int, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of the slot's safetensors file."""
        stop = self.num_bytes if end is None else min(end, self.num_bytes)
        parts, at = [], start
        # A single call gives 2 GiB at most.
        while at < stop:
            part = os.pread(self.fds[index], stop - at, _PAGE + at)
            if not part:
                break
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Lets go of them; their memory is freed with the last one that holds them."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def copy_of(data: bytes) -> int:
    """A slot of our own with this safetensors file in it; returns its file descriptor."""
    fd = os.memfd_create("dltrain-copy")
    os.ftruncate(fd, _PAGE + len(data))
    view, at = memoryview(data), _PAGE
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
    return fd


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """Where a rank's snapshot can be read: a file descriptor of a process of this machine, or elsewhere (pid 0)."""

    pid: int
    fd: int
    num_bytes: int


class SlotStore:
    """Reads snapshots as a `Store` reads files, by the name of the rank's file.

    Args:
        places: name -> where it is.
        ask: gives bytes [start, end) of a file that is on another machine.
    """

    def __init__(self, places: Mapping[str, SlotPlace], ask: Callable[[str, int, int], bytes]) -> None:
        self._ask, self._sizes = ask, {name: p.num_bytes for name, p in places.items()}
        self._held = {n: HeldSlots.open(p.pid, [p.fd], p.num_bytes) for n, p in places.items() if p.pid}

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file."""
        file = name.rpartition("/")[2]
        begin, stop = start or 0, self._sizes[file] if end is None else end
        return self._held[file].read(0, begin, stop) if file in self._held else self._ask(file, begin, stop)

    def close(self) -> None:
        """Lets go of them."""
        for held in self._held.values():
            held.close()
