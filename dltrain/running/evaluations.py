"""What is known of a run's evaluations: the newest figures, the best one, and how long there was no better one.

evaluations = Evaluations(spec.train)
evaluations.restore(manifest, state); evaluations.add(report); evaluations.restart(step)
evaluations.best, evaluations.waited, evaluations.to_dict()

Pure: what the driver is told goes in, what it hands to ranks and manifests comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dltrain.observing.reports import EvalReport
from dltrain.spec import TrainSpec

__all__ = ["Evaluations"]


class Evaluations:
    """Of one start of a run.

    Attributes:
        metrics: of the newest one.
        step: after which it was made; -1 where the next attempt is to make it again.
        ended_early: the run was over before its last step, and is as little patient as then.
    """

    def __init__(self, train: TrainSpec) -> None:
        self._train = train
        self.metrics: dict[str, float] = {}
        self.step = -1
        self.ended_early = False
        self._bests: list[dict[str, Any]] = []
        # What a checkpoint knew, and of this start: step, and whether it was a better one.
        self._waited_before = 0
        self._made: list[tuple[int, bool]] = []

    def restore(self, manifest: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """What a checkpoint knows of them.

        Args:
            state: what the start before has left in state.json.
        """
        self.metrics = dict(manifest.get("metrics") or {})
        # By another metric, or the other way round, it can't be compared with those to come.
        if manifest["spec"]["train"].get("best") != self._train.best.model_dump():
            return
        self.best = manifest.get("best")
        self._waited_before = int(manifest.get("waited", 0))
        finished = state.get("state") == "finished" and state.get("step") == manifest["step"]
        patience = self._train.early_stop
        self.ended_early = finished and patience is not None and self.waited >= patience

    def add(self, report: EvalReport) -> None:
        """One more; of a step that is evaluated again the last counts."""
        self.metrics, self.step = dict(report.metrics), report.step
        self._made = [*self._until(report.step - 1), (report.step, report.is_best)]
        if report.is_best:
            metric = self._train.best.metric
            self._bests.append({"metric": metric, "value": report.metrics[metric], "step": report.step})

    def restart(self, step: int) -> None:
        """Steps after this one are made again."""
        self._made = self._until(step)
        while self._bests and self._bests[-1]["step"] > step:
            self._bests.pop()

    @property
    def best(self) -> dict[str, Any] | None:
        """The best so far of which there is, or will be, a checkpoint."""
        return self._bests[-1] if self._bests else None

    @best.setter
    def best(self, value: dict[str, Any] | None) -> None:
        if value != self.best:
            # One whose checkpoint was lost is to be found again.
            self.step = -1
            self._bests = [value] if value else []

    @property
    def waited(self) -> int:
        """How many there were since the last better one, even where the checkpoint of that was lost."""
        waited = self._waited_before
        for _, is_better in self._made:
            waited = 0 if is_better else waited + 1
        return waited

    def to_dict(self) -> dict[str, Any]:
        """For the manifest of a checkpoint."""
        return {"metrics": self.metrics, "best": self.best, "waited": self.waited}

    def _until(self, step: int) -> list[tuple[int, bool]]:
        return [made for made in self._made if made[0] <= step]
