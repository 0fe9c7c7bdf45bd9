"""The evaluation: the task's sums over all evaluation data, the same figures for any number of workers.

evaluation = Evaluation(task, networks, spec, rank=0, num_ranks=2, device=device, alive=lambda phase: None)
evaluation.metrics(inputs.plan.eval, inputs.eval_reader)    # {"accuracy": 0.98, "loss": 0.07}, on every rank
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from dltrain.data.batch import Batch, Sum
from dltrain.data.catalog import Catalog
from dltrain.data.reader import UnitReader
from dltrain.data.stream import EvalStream
from dltrain.errors import UserError
from dltrain.spec import BestSpec, JobSpec
from dltrain.training.networks import Networks
from dltrain.training.task import Task

__all__ = ["Evaluation", "better", "check_metrics", "reduce_sums"]

_EVAL_ROWS = 256

I64 = npt.NDArray[np.int64]


class Evaluation:
    """Of one rank; all ranks call it at the same steps.

    Args:
        alive: told "eval", again and again.
    """

    def __init__(
        self,
        task: Task,
        networks: Networks,
        spec: JobSpec,
        *,
        rank: int,
        num_ranks: int,
        device: torch.device,
        alive: Callable[[str], None],
    ) -> None:
        self._task, self._networks, self._spec = task, networks, spec
        self._rank, self._num_ranks, self._device, self._alive = rank, num_ranks, device, alive

    def metrics(self, catalog: Catalog, reader: UnitReader) -> dict[str, float]:
        """Reads all of `catalog` through `reader` and adds up what the task makes of it, over all ranks."""
        self._networks.average_buffers()
        self._networks.eval()
        chunks = self._stream(catalog.unit_rows, reader, self._rank, self._num_ranks)
        sums: list[tuple[int, dict[str, Sum]]] = []
        try:
            with torch.no_grad(), self._networks.averaged():
                for chunk, batch in chunks:
                    self._alive("eval")
                    found = self._task.evaluate(self._networks.model, batch.to(self._device))
                    if chunk >= 0:
                        sums.append((chunk, found))
        finally:
            chunks.close()
        everyone: list[Any] = [sums]
        if self._num_ranks > 1:
            everyone = [None] * self._num_ranks
            dist.all_gather_object(everyone, sums)
        return check_metrics(self._task, reduce_sums([item for rank in everyone for item in rank]))

    def first_batch(self, catalog: Catalog, reader: UnitReader) -> Batch:
        """The first batch of the evaluation data, the same on every rank that asks."""
        # No more row groups than it takes.
        last = int(np.searchsorted(np.cumsum(catalog.unit_rows), self._rows)) + 1
        chunks = self._stream(catalog.unit_rows[:last], reader, 0, 1)
        try:
            return next(chunks)[1]
        finally:
            chunks.close()

    @property
    def _rows(self) -> int:
        """Of a forward pass: no more than a training step may have; the same for any number of workers."""
        return min(_EVAL_ROWS, self._spec.batch.micro or self._spec.batch.global_)

    def _stream(self, unit_rows: I64, reader: UnitReader, rank: int, num_ranks: int) -> EvalStream:
        return EvalStream(unit_rows, reader, self._task.collate, chunk_rows=self._rows, rank=rank, num_ranks=num_ranks)


def better(metrics: Mapping[str, float], spec: BestSpec, best: float | None) -> float | None:
    """The metric that `train.best` names, where it is better than `best`; else None.

    Raises:
        UserError: `evaluate` returned no such metric.
    """
    if spec.metric not in metrics:
        raise UserError(
            f"train.best.metric: evaluate returned no {spec.metric!r}; it returns {', '.join(sorted(metrics))}"
        )
    value = metrics[spec.metric]
    if not math.isfinite(value):
        return None
    is_better = best is None or (value < best if spec.mode == "min" else value > best)
    return value if is_better else None


def check_metrics(task: Task, means: Mapping[str, Any]) -> dict[str, float]:
    """What the task makes of the means, as plain numbers; without any there was nothing to evaluate.

    Raises:
        UserError: an array is left among them.
    """
    found = task.metrics(means) if means else {}
    arrays = [name for name, value in found.items() if np.ndim(value)]
    if arrays:
        raise UserError(
            f"task: {arrays[0]!r} of the evaluation is an array of {np.size(found[arrays[0]])} numbers; define "
            f"`metrics` in {type(task).__name__}, which makes one of them"
        )
    return {name: float(value) for name, value in found.items()}


def reduce_sums(items: list[tuple[int, dict[str, Sum]]]) -> dict[str, Any]:
    """Means from the sums of all chunks of all ranks, arrays where the totals are.

    Added up in the order of chunks with an exact sum, so that the figure does not depend on who had which.
    """
    ordered = [sums for _, sums in sorted(items, key=lambda item: item[0])]
    return {name: _mean([sums[name] for sums in ordered]) for name in (ordered[0] if ordered else {})}


def _mean(sums: list[Sum]) -> Any:
    count = math.fsum(s.count for s in sums)
    if any(np.ndim(s.total) for s in sums):
        total = np.sum([np.asarray(s.total, np.float64) for s in sums], axis=0)
        return total / count if count else np.full_like(total, math.nan)
    return math.fsum(s.total for s in sums) / count if count else math.nan
