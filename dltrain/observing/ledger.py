"""The ledger: every second of a run belongs to exactly one state, and they sum to the wall clock.

    ledger = Ledger(now=0.0)
    ledger.enter("starting", now=2.5)
    ledger.step(now=9.0, seconds=0.02, data_wait=0.001, redone=False)
    ledger.goodput

Pure: the time is passed in. A cursor runs along the wall clock; booking moves it, nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["STATES", "Ledger"]

STATES = (
    "planning",
    "placing",
    "starting",
    "data_wait",
    "compute",
    "checkpoint_stall",
    "eval",
    "redone",
    "detecting",
    "recovering",
    "resizing",
    "waiting_for_capacity",
    "other",
)


class Ledger:
    """Seconds by state.

    Args:
        now: when the run, or this start of it, began (any clock, seconds).
        before: seconds by state of earlier starts of the same run.
    """

    def __init__(self, now: float, before: Mapping[str, float] | None = None) -> None:
        self.seconds = {state: float((before or {}).get(state, 0.0)) for state in STATES}
        self._cursor = now
        self.state = "planning"

    def enter(self, state: str, now: float) -> None:
        """Books the time since the cursor on the state that ends, and enters `state`."""
        self._book(self.state, now - self._cursor)
        self.state = state

    def part(self, state: str, seconds: float, now: float) -> None:
        """Books `seconds` of the present on `state`, never past `now`."""
        self._book(state, min(seconds, now - self._cursor))

    def step(self, now: float, seconds: float, data_wait: float, redone: bool) -> None:
        """Books one optimizer step: data_wait is the largest of all ranks, compute the rest."""
        if redone:
            self.part("redone", seconds, now)
            return
        self.part("data_wait", min(data_wait, seconds), now)
        self.part("compute", max(0.0, seconds - data_wait), now)

    def _book(self, state: str, seconds: float) -> None:
        seconds = max(0.0, seconds)
        self.seconds[state] += seconds
        self._cursor += seconds

    @property
    def wall(self) -> float:
        """Seconds booked so far."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """compute / (wall - waiting_for_capacity); 0 before the first second."""
        running = self.wall - self.seconds["waiting_for_capacity"]
        return self.seconds["compute"] / running if running > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For ledger.json."""
        wall = self.wall
        return {
            "seconds": {state: round(seconds, 6) for state, seconds in self.seconds.items()},
            "wall_seconds": round(wall, 6),
            "goodput": round(self.goodput, 6),
            "goodput_of_wall": round(self.seconds["compute"] / wall if wall else 0.0, 6),
        }
