"""Which rows the committed steps of a run were trained on, as sums per epoch: what `dltrain audit` checks.

trail = Trail.of(checkpoint.manifest.get("audit"))
trail.add(report.sums for report in reports)
manifest["audit"] = trail.to_dict()

It follows the weights: a restart from a checkpoint begins with the trail that was saved with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dltrain.data.identity import BatchSum

__all__ = ["Trail"]

Sums = Mapping[int, tuple[int, int, int]]


class Trail:
    """Sums of the rows trained so far, by epoch."""

    def __init__(self, epochs: Mapping[int, BatchSum] | None = None) -> None:
        self.epochs = dict(epochs or {})

    def add(self, parts: Iterable[Sums]) -> None:
        """Adds what the ranks trained in one step."""
        for sums in parts:
            for epoch, numbers in sums.items():
                self.epochs[epoch] = self.epochs.get(epoch, BatchSum()) + BatchSum(*numbers)

    def to_dict(self) -> dict[str, Any]:
        """For a manifest; the hashes as hex, since they are wider than JSON's numbers are in other languages."""
        return {str(e): [s.count, f"{s.first:016x}", f"{s.second:016x}"] for e, s in sorted(self.epochs.items())}

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None) -> Trail:
        """The inverse of `to_dict`; empty where nothing was saved."""
        return cls({int(e): BatchSum(n, int(a, 16), int(b, 16)) for e, (n, a, b) in (saved or {}).items()})
