"""What workers, agents and the driver say to each other besides reports; plain values, picklable, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dltrain.observing.reports import SlotsMade, StepReport

__all__ = ["Anchored", "Bye", "Bytes", "Command", "Hello", "Holding", "Leavings", "Pulse", "Slots", "Unpin", "Want"]


# ---- to the worker ----


@dataclass(frozen=True)
class Command:
    """End at a step that all ranks agree on: `stop` and `drain` with a checkpoint, `pause` with a snapshot."""

    text: str


@dataclass(frozen=True)
class Unpin:
    """A slot's snapshot has been uploaded: it may be written again."""

    slot: int


@dataclass(frozen=True)
class Anchored:
    """A snapshot has been copied to another machine; what that took."""

    seconds: float


@dataclass(frozen=True)
class Bye:
    """Everything that the worker said has been heard, and its memory is held: it may end."""


@dataclass(frozen=True)
class Bytes:
    """What the worker wanted; None when nobody has it any more."""

    data: bytes | None


# ---- to the agent ----


@dataclass(frozen=True)
class Hello:
    """The worker is up; its black box is this file descriptor of it."""

    rank: int
    box_fd: int


@dataclass(frozen=True)
class Want:
    """Bytes [start, end) of a rank's snapshot that lies on another machine."""

    name: str
    start: int
    end: int


# ---- between agents, by way of the driver ----


@dataclass(frozen=True)
class Holding:
    """A snapshot that an agent holds.

    Attributes:
        pid, fd: where processes of the same node can open it.
        num_bytes, parts, whole, ties: its layout.
    """

    attempt: int
    rank: int
    step: int
    position: int
    applied: int
    pid: int
    fd: int
    num_bytes: int
    parts: list[list[Any]]
    whole: list[str]
    ties: Mapping[str, str]


@dataclass(frozen=True)
class Slots:
    """A rank's slots and black box as an agent holds them open, for its buddy to open as well."""

    attempt: int
    rank: int
    pid: int
    fds: list[int]
    box_fd: int
    num_bytes: int
    parts: list[list[Any]]
    whole: list[str]
    ties: Mapping[str, str]

    @classmethod
    def made(cls, report: SlotsMade, attempt: int, pid: int, box_fd: int) -> Slots:
        """As a worker says it, with what only its agent knows."""
        layout = report.num_bytes, report.parts, report.whole, report.ties
        return cls(attempt, report.rank, pid, list(report.fds), box_fd, *layout)


# ---- to the driver ----


@dataclass(frozen=True)
class Pulse:
    """An agent's answer to the driver's heartbeat: how its worker is.

    Attributes:
        still_seconds: since the worker's last sign of life; phase: what it was at.
        leaving: this machine is to be left; prepared: a worker could start at once.
    """

    attempt: int
    still_seconds: float
    phase: str
    leaving: bool
    prepared: bool


@dataclass(frozen=True)
class Leavings:
    """What is left of an attempt: reports that were not asked for yet, and snapshots."""

    reports: list[StepReport]
    holdings: list[Holding]
