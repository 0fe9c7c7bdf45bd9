"""Which rows the committed steps of a run were trained on, as sums per epoch: what `dltrain audit` checks.

trail = Trail.of(checkpoint.manifest.get("audit"))
trail.add(step, reports)
manifest["audit"] = trail.at(step).to_dict()

It follows the weights: a restart from a checkpoint begins with the trail that was saved with it, one from a snapshot
in memory with the trail as it was at that step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from dltrain.data.identity import BatchSum
from dltrain.observing.reports import StepReport

__all__ = ["Trail"]

Where = tuple[int, int]
# Steps that may be gone back over.
_HISTORY = 8192


class Trail:
    """Sums of the rows trained so far, and how many had another row in their place, by (source, epoch)."""

    def __init__(
        self, sums: Mapping[Where, BatchSum] | None = None, replaced: Mapping[Where, int] | None = None
    ) -> None:
        self.sums, self.replaced = dict(sums or {}), Counter(replaced or {})
        self._history: deque[tuple[int, list[tuple[Where, BatchSum]], list[Where]]] = deque(maxlen=_HISTORY)

    def add(self, step: int, reports: Iterable[StepReport]) -> None:
        """Adds what the ranks trained in one step."""
        sums, replaced = [], []
        for report in reports:
            sums += [(where, BatchSum(*numbers)) for where, numbers in report.sums.items()]
            replaced += [(source, epoch) for source, epoch, _, _ in report.replaced]
        for where, part in sums:
            self.sums[where] = self.sums.get(where, BatchSum()) + part
        self.replaced.update(replaced)
        self._history.append((step, sums, replaced))

    def at(self, step: int) -> Trail:
        """As it was after an earlier step, of the newest few thousand."""
        before = Trail(self.sums, self.replaced)
        for later, sums, replaced in reversed(self._history):
            if later <= step:
                break
            for where, part in sums:
                before.sums[where] -= part
            before.replaced.subtract(replaced)
        before.sums = {where: s for where, s in before.sums.items() if s.count}
        return before

    def to_dict(self) -> dict[str, Any]:
        """For a manifest; the hashes as hex, since they are wider than JSON's numbers are in other languages."""
        return {
            f"{source}:{epoch}": [s.count, f"{s.first:016x}", f"{s.second:016x}", self.replaced[source, epoch]]
            for (source, epoch), s in sorted(self.sums.items())
        }

    @classmethod
    def of(cls, saved: Mapping[str, Any] | None) -> Trail:
        """The inverse of `to_dict`; empty where nothing was saved."""
        lines = {_where(name): line for name, line in (saved or {}).items()}
        sums = {where: BatchSum(n, int(a, 16), int(b, 16)) for where, (n, a, b, _) in lines.items()}
        return cls(sums, {where: line[3] for where, line in lines.items()})


def _where(name: str) -> Where:
    source, epoch = name.split(":")
    return int(source), int(epoch)
