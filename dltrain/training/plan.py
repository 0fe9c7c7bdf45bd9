"""What one run and one rank have to do, in numbers: the batch arithmetic, the steps, and the order to a rank.

    batch = BatchPlan.of(global_batch=256, micro=None, num_ranks=2)
    str(batch)                                  # "256 rows = 2 workers x 1 micro-batch x 128"
    schedule = Schedule.of(spec, num_rows=1438)

Pure: no torch, no Ray, no clock, so that the driver and the agents may import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dltrain.checkpoint.slots import SlotPlace
from dltrain.data.order import num_steps
from dltrain.spec import JobSpec

__all__ = ["BatchPlan", "RankJob", "Schedule"]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How a global batch is shared: each rank makes `grad_accum_steps` micro-batches of at most `micro_batch`."""

    global_batch: int
    num_ranks: int
    micro_batch: int
    grad_accum_steps: int

    @classmethod
    def of(cls, global_batch: int, micro: int | None, num_ranks: int) -> BatchPlan:
        """Derives the micro-batch: the rank's share, cut evenly into pieces of at most `micro` rows."""
        share = -(-global_batch // num_ranks)
        accum = -(-share // min(micro or share, share))
        return cls(global_batch, num_ranks, -(-share // accum), accum)

    def __str__(self) -> str:
        workers = "1 worker" if self.num_ranks == 1 else f"{self.num_ranks} workers"
        micros = "1 micro-batch" if self.grad_accum_steps == 1 else f"{self.grad_accum_steps} micro-batches"
        product = self.num_ranks * self.grad_accum_steps * self.micro_batch
        short = "" if product == self.global_batch else f", {product - self.global_batch} short in the last ones"
        return f"{self.global_batch} rows = {workers} x {micros} x {self.micro_batch} rows{short}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a run ends, evaluates and saves.

    Attributes:
        end: position (samples consumed) at which it ends.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: rounded up.
        dropped: rows at the end that `data.end: drop` leaves out.
    """

    end: int
    total_steps: int
    steps_per_epoch: int
    eval_every: int
    checkpoint_every: int
    dropped: int = 0

    @classmethod
    def of(cls, spec: JobSpec, num_rows: int, step: int = 0, position: int = 0) -> Schedule:
        """The schedule of a run that has done `step` steps and consumed `position` samples."""
        size = spec.batch.global_
        per_epoch = -(-num_rows // size)
        dropped = 0
        if spec.train.steps is not None:
            left = max(0, spec.train.steps - step)
            end = position + left * size
        else:
            assert spec.train.epochs is not None
            left = num_steps(num_rows, spec.train.epochs, size, position, spec.data.end)
            end = spec.train.epochs * num_rows
            if spec.data.end == "drop":
                dropped = max(0, end - position - left * size)
                end = position + left * size
        total = step + left
        every = spec.checkpoint.every or max(1, min(per_epoch, -(-total // 10)))
        return cls(end, total, per_epoch, spec.train.eval_every or per_epoch, every, dropped)


@dataclass(frozen=True)
class RankJob:
    """The order to one rank of one attempt.

    Attributes:
        run: URL of the run directory.
        plan: what is read in which order (`Plan.to_bytes`); None: it lies in the run directory, being large.
        plan_id: of the plan that the driver has.
        checkpoints: URL of the run's checkpoints.
        resume: manifest of the checkpoint to start from, with its path under `checkpoints`.
        memory: name of a rank's file -> where to read it, when that checkpoint is one in memory.
        evaluated: the evaluation of `step` has been made; unfinished: what follows a step may still have to be.
        anchors: there are several machines, each to hold another's snapshots.
        remembers: snapshots stay in memory after steps; False where nobody would take them over.
        best: value of the best metric so far; best_step: when it was found; waited: evaluations since a better one.
        cwd: the user's working directory, first on the import path.
    """

    spec: JobSpec
    attempt: int
    rank: int
    num_ranks: int
    step: int
    position: int
    schedule: Schedule
    run: str
    plan: bytes | None
    plan_id: str
    checkpoints: str
    resume: Mapping[str, Any] | None = None
    memory: Mapping[str, SlotPlace] | None = None
    evaluated: bool = False
    unfinished: bool = False
    anchors: bool = False
    remembers: bool = True
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    cwd: str = "."
    device: str = "cpu"
    environment: Mapping[str, str] = field(default_factory=dict)
