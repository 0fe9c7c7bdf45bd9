"""What is done to a run to see it recover, and how its journals show that it did.

agent_of(pid); pids_under(root)
recovery(lines, at)                # lines: Line(step, attempt, time), in any order
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Line", "Recovery", "StepTail", "agent_of", "driver_of", "journal", "recovery", "step_lines"]


def agent_of(worker: int) -> int:
    """The agent of a worker, by the name of the nursery that it comes from.

    Raises:
        ProcessLookupError: the worker, or its nursery, is no more.
    """
    try:
        parent = psutil.Process(worker).parent()
        kind, _, agent = parent.name().partition(" ") if parent else ("", "", "")
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(str(error)) from None
    if kind != "nursery":
        raise ProcessLookupError(f"the worker {worker} comes from {parent}")
    return int(agent)


def driver_of(state: dict[str, Any]) -> int:
    """The driver's process, from state.json."""
    return int(state["driver"].rpartition(":")[2])


def journal(run: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a journal; a last one that is being written is left out."""
    try:
        lines = (run / f"{name}.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@dataclass(frozen=True)
class Line:
    """A step that a group of workers made: the end of it, as seconds since 1970."""

    step: int
    attempt: float
    time: float


def step_lines(run: Path) -> list[Line]:
    """steps.jsonl, lines of steps trained twice included."""
    return [Line(line["step"], line["attempt"], line["time"]) for line in journal(run, "steps")]


class StepTail:
    """The same for a long run: each call reads only what was added since the last."""

    def __init__(self, run: Path) -> None:
        self._path, self._offset = run / "steps.jsonl", 0
        self._lines: list[Line] = []

    def lines(self) -> list[Line]:
        """All lines so far."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as source:
            source.seek(self._offset)
            added, _, _ = source.read().rpartition(b"\n")
            self._offset += len(added) + bool(added)
            for text in added.splitlines():
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    self._lines.append(Line(line["step"], line["attempt"], line["time"]))
        return self._lines


@dataclass(frozen=True)
class Recovery:
    """How a run came through something that happened at a moment.

    pause_seconds: between the last step of the group before and the first of the next; new_seconds: from the moment
    to the end of the first step that nobody had made before; redone: steps that were made again.
    """

    pause_seconds: float
    new_seconds: float
    redone: int


def recovery(lines: Iterable[Line], at: float) -> Recovery | None:
    """None while no later group has made a step that is new."""
    ordered = sorted(lines, key=lambda line: line.time)
    before = [line.attempt for line in ordered if line.time <= at]
    if not before:
        return None
    old = [line for line in ordered if line.attempt <= before[-1]]
    later = [line for line in ordered if line.attempt > before[-1]]
    highest = max(line.step for line in old)
    new = next((line for line in later if line.step > highest), None)
    if new is None:
        return None
    redone = max(0, highest - later[0].step + 1)
    return Recovery(round(later[0].time - old[-1].time, 3), round(new.time - at, 3), redone)
