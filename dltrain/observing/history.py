"""A run as its directory tells it: read once, wherever it lies and whatever became of it.

    history = read_history(run.store, run.state())
    history.steps.curve("loss"), history.story.faults, history.samples

A live run is read as it stands; one that failed or never made a step has less in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from dltrain.observing.curves import Columns
from dltrain.observing.faults import Story
from dltrain.observing.journal import journal_pieces, read_journal, read_json
from dltrain.observing.reports import PHASES
from dltrain.observing.samples import SampleSet, read_samples
from dltrain.store import Store

__all__ = ["History", "read_history"]

_FIELDS = ("loss", "learning_rate", "grad_norm", "seconds", "data_wait_seconds", "samples", "position")

Progress = Callable[[int, int], None]


@dataclass
class History:
    """All that a report shows.

    Attributes:
        spec: as it was last started; state: state.json, `lost` when it should beat and does not.
        steps: columns of steps.jsonl, phases as "phase.forward", networks' losses as "loss.judge".
        logged: what callbacks logged.
        left_out: steps that changed no weights.
    """

    name: str
    url: str
    spec: dict[str, Any]
    state: dict[str, Any]
    ledger: dict[str, Any]
    steps: Columns = field(default_factory=Columns)
    logged: Columns = field(default_factory=Columns)
    story: Story = field(default_factory=Story)
    samples: list[SampleSet] = field(default_factory=list)
    first_time: float = 0.0
    last_time: float = 0.0
    left_out: int = 0

    @property
    def step(self) -> int:
        """The last one that was made."""
        return max(self.steps.last_step, int(self.state.get("step", 0)))

    @property
    def status(self) -> str:
        """Its state, in one word."""
        return str(self.state.get("state", "planning"))

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The best evaluation, as {metric, value, step}."""
        return self.state.get("best")

    @property
    def metrics(self) -> dict[str, float]:
        """Of the last evaluation."""
        return dict(self.state.get("metrics") or {})

    @property
    def num_samples(self) -> int:
        """Rows trained on, of steps that count."""
        values = self.steps.raw("samples")
        return int(values.sum()) if len(values) else 0

    @property
    def rate(self) -> float:
        """Samples per second of the time spent in steps."""
        seconds = self.steps.raw("seconds")
        return self.num_samples / float(seconds.sum()) if len(seconds) and seconds.sum() > 0 else 0.0


def read_history(store: Store, state: Mapping[str, Any] | None, progress: Progress | None = None) -> History:
    """Reads a run's directory.

    Args:
        state: of `RunDir.state`.
        progress: told how many pieces of the journals are read, and how many there are.

    Raises:
        StoreError: it can't be reached.
    """
    spec = yaml.safe_load(store.read("spec.yaml"))
    history = History(str(spec["name"]), store.url, spec, dict(state or {}), read_json(store, "ledger.json") or {})
    total = sum(journal_pieces(store, name) for name in ("events", "steps", "logged"))
    done = _Counter(progress, total)
    for event in read_journal(store, "events", done.add):
        history.story.add(event)
        history.first_time = history.first_time or event["time"]
        history.last_time = event["time"]
    for line in read_journal(store, "steps", done.add):
        _add_step(history, line)
    for line in read_journal(store, "logged", done.add):
        history.logged.add(int(line["step"]), line["values"])
    history.story.settle()
    history.samples = read_samples(store, history.step, history.best)
    return history


def _add_step(history: History, line: Mapping[str, Any]) -> None:
    step, time = int(line["step"]), float(line["time"])
    values = {name: float(line[name]) for name in _FIELDS if name in line}
    for phase in PHASES:
        values[f"phase.{phase}"] = float(line.get("phases", {}).get(phase, 0.0))
    for name, loss in line.get("losses", {}).items():
        values[f"loss.{name}"] = float(loss)
    seconds = values.get("seconds", 0.0)
    values["rate"] = values["samples"] / seconds if seconds > 0 else math.nan
    history.steps.add(step, values)
    history.left_out += int(not line.get("applied", True))
    history.story.saw_step(int(line.get("attempt", 0)), step, time)
    history.first_time = min(history.first_time or time, time)
    history.last_time = max(history.last_time, time)


class _Counter:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(self._done, max(self._total, self._done))
