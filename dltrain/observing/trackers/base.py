"""What a tracker is asked.

class Printer:
    name = "printer"
    def start(self, run: TrackedRun) -> int: return -1
    def log(self, step: int, values: Mapping[str, float]) -> None: print(step, values)
    def artifact(self, step: int, name: str, artifact: Artifact) -> None: ...
    def flush(self) -> None: ...
    def close(self, status: str) -> None: ...
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dltrain.artifact import Artifact
from dltrain.errors import MissingExtraError
from dltrain.store import Store
from dltrain.wording import without_passwords

__all__ = ["TrackedRun", "Tracker", "flat", "need"]


@dataclass(frozen=True)
class TrackedRun:
    """The run, as a tracker is told of it.

    Attributes:
        id: the same for all starts of a run, another one for a run that was begun afresh under its name.
        begin: the step that this start goes on from: what was told of later ones is void.
        told: steps up to this one have been told before, as far as is known; -1 for none.
        store: its directory.
    """

    name: str
    id: str
    begin: int
    told: int
    spec: Mapping[str, Any]
    store: Store


class Tracker(Protocol):
    """Five verbs. It has a thread to itself: it may be slow, and whatever it raises only ends the tracking."""

    name: str

    def start(self, run: TrackedRun) -> int:
        """Begins, or goes on with what it has of this run; returns the last step it is not to be told again, or -1."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step, which never goes back; more of the same step may follow."""

    def artifact(self, step: int, name: str, artifact: Artifact) -> None:
        """Something that was shown at a step."""

    def flush(self) -> None:
        """Nothing more is waiting: what is held back should go out."""

    def close(self, status: str) -> None:
        """This start of the run is over: finished, stopped or failed."""


def flat(spec: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A spec's settings by dotted names, as text without passwords; what is not set is left out."""
    for name, value in spec.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", without_passwords(str(value))


def need(package: str, extra: str) -> None:
    """Raises MissingExtraError where an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra)
