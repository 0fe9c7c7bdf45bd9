"""The black box: a worker's newest reports and its last sign of life, in memory that others hold open.

box = BlackBox()                            # the worker
box.alive("step"); box.add(pickled_report)
sign = look(fd); sign.count, sign.phase     # its agent: has it moved since I last looked?
reports(fd)                                 # the agent's buddy, when agent and worker are gone

An anonymous file (memfd): a page for the sign of life, then two halves filled with reports in turn.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

__all__ = ["PHASES", "BlackBox", "Sign", "look", "reports"]

# What a worker may be busy with, and how long it may be without a sign of life differs.
PHASES = ("starting", "data", "step", "eval", "save", "task")
_PAGE = 4096
_BYTES = 1 << 20
_SIGN = struct.Struct("<qq")
_HALF = struct.Struct("<qq")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Sign:
    """A count that moves as long as the worker does, and the phase it is in."""

    count: int
    phase: str


class BlackBox:
    """Written by one worker. Attributes: fd: for others of the same user, as /proc/PID/fd/N."""

    def __init__(self, num_bytes: int = _BYTES) -> None:
        self.fd = os.memfd_create("dltrain-reports")
        os.ftruncate(self.fd, _PAGE + num_bytes)
        self._map = mmap.mmap(self.fd, _PAGE + num_bytes)
        self._half = num_bytes // 2
        self._count = 0
        self._turn, self._used = 1, _HALF.size
        self._mark()

    def alive(self, phase: str) -> None:
        """A sign of life."""
        self._count += 1
        _SIGN.pack_into(self._map, 0, self._count, PHASES.index(phase))

    def add(self, record: bytes) -> None:
        """Adds a record; the oldest are forgotten, and one that is larger than a half is left out."""
        size = _LENGTH.size + len(record)
        if size > self._half - _HALF.size:
            return
        if self._used + size > self._half:
            self._turn, self._used = self._turn + 1, _HALF.size
            self._mark()
        at = _PAGE + (self._turn % 2) * self._half + self._used
        self._map[at : at + size] = _LENGTH.pack(len(record)) + record
        self._used += size
        self._mark()

    def _mark(self) -> None:
        """Only what is marked as used is there."""
        _HALF.pack_into(self._map, _PAGE + (self._turn % 2) * self._half, self._turn, self._used)


def look(fd: int) -> Sign:
    """The last sign of life."""
    count, phase = _SIGN.unpack(os.pread(fd, _SIGN.size, 0))
    return Sign(count, PHASES[phase])


def reports(fd: int) -> list[bytes]:
    """The records, oldest first."""
    raw = os.pread(fd, os.fstat(fd).st_size - _PAGE, _PAGE)
    halves = sorted((_HALF.unpack_from(raw, at)[0], at) for at in (0, len(raw) // 2))
    return [record for turn, at in halves if turn for record in _records(raw, at)]


def _records(raw: bytes, begin: int) -> list[bytes]:
    used = _HALF.unpack_from(raw, begin)[1]
    found, at = [], begin + _HALF.size
    while at < begin + used:
        (size,) = _LENGTH.unpack_from(raw, at)
        found.append(raw[at + _LENGTH.size : at + _LENGTH.size + size])
        at += _LENGTH.size + size
    return found
