"""What happens to a run, and what is to be done about it: the words of `lifecycle`.

Plain values; an event's fields go into events.jsonl as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from dltrain.errors import DltrainError
from dltrain.observing.reports import Report

__all__ = [
    "Action",
    "AgentLost",
    "Commit",
    "Committed",
    "Discard",
    "Drained",
    "End",
    "Event",
    "Exited",
    "Hung",
    "KillWorkers",
    "Place",
    "Placed",
    "Release",
    "Say",
    "StartAttempt",
    "StopRequested",
    "Tell",
    "Tick",
]

# ---- events ----


@dataclass(frozen=True)
class Placed:
    """So many slots have an agent; `final` when no more are coming soon."""

    slots: int
    final: bool = False


@dataclass(frozen=True)
class Exited:
    """A worker process ended: exit code, negative for a signal, and the last lines it wrote."""

    rank: int
    code: int
    tail: str = ""
    reason: str = ""
    """Why its agent ended it, if it did."""


@dataclass(frozen=True)
class AgentLost:
    """An agent stopped answering."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Hung:
    """A rank has not moved for longer than it may; `stacks` are those of all ranks."""

    rank: int
    seconds: float
    phase: str
    stacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drained:
    """The machine of this rank is to be left: finish the step, save, go on without it."""

    rank: int


@dataclass(frozen=True)
class Committed:
    """A checkpoint was committed, or could not be (`reason`)."""

    step: int
    reason: str = ""


@dataclass(frozen=True)
class StopRequested:
    """The user asked the run to stop."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Placed | Exited | AgentLost | Hung | Drained | Committed | StopRequested | Tick | Report


# ---- actions ----


@dataclass(frozen=True)
class Place:
    """Ask for slots until there are `slots`."""

    slots: int


@dataclass(frozen=True)
class StartAttempt:
    """Form a group of `num_ranks` workers from the last checkpoint."""

    num_ranks: int
    attempt: int


@dataclass(frozen=True)
class KillWorkers:
    """End every worker process of this attempt at once."""


@dataclass(frozen=True)
class Tell:
    """Ask the ranks to end at a step they agree on: `stop` and `drain` with a checkpoint, `pause` with a snapshot."""

    wish: str


@dataclass(frozen=True)
class Release:
    """Give up the slots of these ranks, and take none on their machines for a while."""

    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Commit:
    """All ranks' files of a checkpoint are there: write its manifest."""

    step: int


@dataclass(frozen=True)
class Discard:
    """A checkpoint can't be completed: remove what there is of it."""

    step: int
    reason: str


@dataclass(frozen=True)
class Say:
    """Tell the user."""

    text: str


@dataclass(frozen=True)
class End:
    """The run is over: finished, stopped or failed (then with the error)."""

    status: str
    error: DltrainError | None = None


Action = Place | StartAttempt | KillWorkers | Tell | Release | Commit | Discard | Say | End
