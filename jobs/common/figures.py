"""What a job must reach, and how that is found: `make bench-jobs` does it for all of them.

GOALS = (Goal("test accuracy", "accuracy", 0.98),)               # of the run of jobs/NAME.yaml

def figures(bench):                                              # where one run does not tell it
    runs = [bench.run(f"args.fold={fold}", name=f"fold-{fold}") for fold in range(5)]
    return [Figure("mean ROC-AUC", mean(run["eval"]["auc"] for run in runs), target=0.99)]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Bench", "Figure", "Goal", "reached"]


@dataclass(frozen=True)
class Figure:
    """A measured value beside what it must be, and what a simpler way reaches on the same data."""

    figure: str
    value: float
    target: float
    baseline: float | None = None
    at_least: bool = True
    """Whether more is better."""

    @property
    def met(self) -> bool:
        """False for a value that is not a number, too."""
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(frozen=True)
class Goal:
    """A metric of a job's evaluation, and what it must be."""

    figure: str
    metric: str
    target: float
    at_least: bool = True


class Bench(Protocol):
    """What `figures` gets: runs of its own job."""

    data: str
    """Where the job's data is."""

    def run(self, *overrides: str, name: str = "", spec: str = "") -> Mapping[str, Any]:
        """Runs jobs/NAME.yaml, or another spec of that directory, to its end; returns the run's summary.

        Args:
            name: of the run, where there are several; otherwise the spec's.
        """
        ...

    def command(self, *arguments: str) -> Mapping[str, Any]:
        """`dltrain ARGUMENTS --json`: what it printed."""
        ...


def reached(goals: tuple[Goal, ...], summary: Mapping[str, Any], baselines: Mapping[str, float]) -> list[Figure]:
    """The figures of one run, by the evaluation it ended with.

    Args:
        baselines: by metric.
    """
    found = summary.get("eval") or {}
    return [
        Figure(g.figure, found.get(g.metric, float("nan")), g.target, baselines.get(g.metric), g.at_least)
        for g in goals
    ]
