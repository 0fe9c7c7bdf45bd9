"""Which rows the committed steps of a run were trained on, as sums per epoch: what `dltrain audit` checks.

trail = Trail.of(checkpoint.manifest.get("audit"))
trail.add(reports)
manifest["audit"] = trail.to_dict()

It follows the weights: a restart from a checkpoint begins with the trail that was saved with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dltrain.data.identity import BatchSum
from dltrain.observing.reports import StepReport

__all__ = ["Trail"]


class Trail:
    """Sums of the rows trained so far, and how many had another row in their place, by epoch."""

    def __init__(self, epochs: Mapping[int, BatchSum] | None = None, replaced: Mapping[int, int] | None = None) -> None:
        self.epochs, self.replaced = dict(epochs or {}), Counter(replaced or {})

    def add(self, reports: Iterable[StepReport]) -> None:
        """Adds what the ranks trained in one step."""
        for report in reports:
            for epoch, numbers in report.sums.items():
                self.epochs[epoch] = self.epochs.get(epoch, BatchSum()) + BatchSum(*numbers)
            self.replaced.update(epoch for epoch, _, _ in report.replaced)

    def to_dict(self) -> dict[str, Any]:
        """For a manifest; the hashes as hex, since they are wider than JSON's numbers are in other languages."""
        return {
            str(epoch): [s.count, f"{s.first:016x}", f"{s.second:016x}", self.replaced[epoch]]
            for epoch, s in sorted(self.epochs.items())
        }

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None) -> Trail:
        """The inverse of `to_dict`; empty where nothing was saved."""
        lines = {int(epoch): line for epoch, line in (saved or {}).items()}
        sums = {epoch: BatchSum(n, int(a, 16), int(b, 16)) for epoch, (n, a, b, _) in lines.items()}
        return cls(sums, {epoch: line[3] for epoch, line in lines.items()})
