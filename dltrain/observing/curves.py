"""Curves of a run: numbers by step, as they hold in the end, thinned for a picture.

    columns = Columns()
    columns.add(1, {"loss": 2.3}); columns.add(2, {"loss": 2.1})
    curve = columns.curve("loss")
    curve.smooth().thin(400)

Pure. A million steps are a few arrays, not a million dicts.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

__all__ = ["POINTS", "Columns", "Curve", "means"]

# Most points of a curve in a picture: more than its pixels would not be seen.
POINTS = 400
_SMOOTH_SHARE = 60

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Values over steps (or rows); both (points,), in ascending x, values finite."""

    name: str
    x: Numbers
    y: Numbers

    def __len__(self) -> int:
        return len(self.x)

    @property
    def last(self) -> float:
        """Its last value; nan of an empty one."""
        return float(self.y[-1]) if len(self.y) else math.nan

    def thin(self, points: int = POINTS) -> Curve:
        """So many points and the ends, the least and the greatest of each stretch, so that no spike is lost."""
        if len(self) <= points:
            return self
        edges = np.linspace(0, len(self), points // 2 + 1).astype(np.int64)
        kept: list[int] = []
        for start, end in pairwise(edges):
            part = self.y[start:end]
            kept += sorted({int(start + part.argmin()), int(start + part.argmax())})
        # The ends say where it began and what came of it.
        index = np.unique([0, *kept, len(self) - 1])
        return Curve(self.name, self.x[index], self.y[index])

    def smooth(self, share: int = _SMOOTH_SHARE) -> Curve:
        """A running mean that looks back over 1/share of the curve; as it is where that is less than two points."""
        window = len(self) / share
        if window < 2:
            return self
        keep, mean, weight, means = 1 - 1 / window, 0.0, 0.0, np.empty(len(self))
        for i, value in enumerate(self.y):
            # Without the weight the first values would be drawn to zero.
            mean, weight = keep * mean + value, keep * weight + 1
            means[i] = mean / weight
        return Curve(self.name, self.x, means)


class Columns:
    """Numbers by step. A step that comes again takes back all from it on: the weights they led to are gone."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._columns: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def names(self) -> list[str]:
        """Those that any step has."""
        return list(self._columns)

    @property
    def last_step(self) -> int:
        """0 before the first."""
        return self._steps[-1] if self._steps else 0

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """A line of steps.jsonl; what it lacks of others' names is missing at this step."""
        if self._steps and step <= self._steps[-1]:
            self._cut(bisect_left(self._steps, step))
        for name in values:
            if name not in self._columns:
                self._columns[name] = array("d", [math.nan]) * len(self._steps)
        self._steps.append(step)
        for name, column in self._columns.items():
            column.append(values.get(name, math.nan))

    def _cut(self, length: int) -> None:
        del self._steps[length:]
        for column in self._columns.values():
            del column[length:]

    def raw(self, name: str) -> Numbers:
        """(steps,), nan where it is missing; empty for a name that no step has."""
        return np.array(self._columns.get(name, array("d")), np.float64)

    @property
    def steps(self) -> Numbers:
        """(steps,)."""
        return np.array(self._steps, np.float64)

    def curve(self, name: str, over: str = "") -> Curve:
        """The finite values of a column.

        Args:
            over: another column for x instead of the steps.
        """
        y = self.raw(name)
        x = self.raw(over) if over else self.steps
        good = np.isfinite(y) & np.isfinite(x) if len(y) else np.zeros(0, bool)
        return Curve(name, x[good], y[good]) if len(y) else Curve(name, np.zeros(0), np.zeros(0))

    def not_finite(self, name: str) -> int:
        """How many of its values are infinite or not numbers; those that are missing count as well."""
        return int((~np.isfinite(self.raw(name))).sum())


def means(columns: Columns, names: list[str], points: int) -> tuple[Numbers, Numbers]:
    """Means over at most `points` stretches of steps: their last steps (points,), values (names, points)."""
    length = len(columns)
    if not length:
        return np.zeros(0), np.zeros((len(names), 0))
    starts = np.unique(np.linspace(0, length, min(points, length) + 1).astype(np.int64)[:-1])
    ends = np.append(starts[1:], length)
    values = np.stack(
        [np.nan_to_num(columns.raw(name)) if name in columns.names else np.zeros(length) for name in names]
    )
    return columns.steps[ends - 1], np.add.reduceat(values, starts, axis=1) / (ends - starts)
