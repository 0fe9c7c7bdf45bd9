"""What looks on while a rank trains: the task's callbacks, the samples it shows, and the profiler.

    onlookers = Onlookers(task, networks, job, device, alive, note)
    yield from onlookers.after("step", step)
    yield from onlookers.evaluated(step, metrics, is_best=True, is_last=False, first=read_first_batch)

All ranks call it at the same places, and those that a collective needs have agreed to enter it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from dltrain.artifact import Artifact
from dltrain.data.batch import Batch
from dltrain.data.order import key
from dltrain.observing.reports import Aside, Logged, Shown
from dltrain.observing.samples import bounded
from dltrain.store import open_store
from dltrain.training.callbacks import Moment, When, check_callbacks
from dltrain.training.engine import StepResult
from dltrain.training.networks import Networks
from dltrain.training.plan import RankJob
from dltrain.training.profiler import Profiler
from dltrain.training.task import Task

__all__ = ["Onlookers"]

# Tells the random numbers of samples apart from those of a step.
_SHOW = 1 << 20

T = TypeVar("T")


class Onlookers:
    """Of one rank.

    Args:
        alive: told "task" while the task's own code runs.
        note: gets a sentence for the user.
    """

    def __init__(
        self,
        task: Task,
        networks: Networks,
        job: RankJob,
        device: torch.device,
        alive: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:
        self._task, self._networks, self._job, self._device = task, networks, job, device
        self._alive, self._note = alive, note
        self._callbacks = check_callbacks(task.callbacks)
        self._shows = type(task).samples is not Task.samples
        self._profiler = Profiler(job.spec.profile, job.rank, open_store(job.run))
        self._result: StepResult | None = None
        self._result_step = -1
        self._metrics: dict[str, float] = {}
        self._told: set[str] = set()

    def before_step(self, step: int) -> None:
        """`step` is about to be made."""
        self._profiler.before(step)

    def made(self, step: int, result: StepResult) -> None:
        """It has been made."""
        self._result, self._result_step = result, step

    def after(self, when: When, step: int) -> Iterator[Aside]:
        """Calls the callbacks that are due, and writes a trace that is complete."""
        if when == "step":
            yield from self._profiler.after(step)
        due = [callback for callback in self._callbacks if callback.is_due(when, step)]
        if not due:
            return
        self._alive("task")
        moment = self._moment(when, step)
        for callback in due:
            callback.function(moment)
        self._alive("step")
        if self._job.rank == 0 and moment.logged:
            yield Logged(0, step, moment.logged)

    def last_step(self, step: int) -> Iterator[Aside]:
        """No other step follows in this attempt."""
        yield from self._profiler.end(step)

    def _moment(self, when: When, step: int) -> Moment:
        result = self._result if self._result_step == step else None
        names = list(result.losses) if result else []
        # Of each rank it is a part of the mean.
        parts = torch.tensor([result.loss, *result.losses.values()] if result else [torch.nan], dtype=torch.float64)
        if result and self._job.num_ranks > 1:
            parts = parts.to(self._device)
            dist.all_reduce(parts)
        loss, *losses = parts.tolist()
        return Moment(
            when,
            step,
            self._job.rank,
            self._job.num_ranks,
            loss,
            dict(zip(names, losses, strict=True)),
            dict(self._metrics),
            result.learning_rate if result else torch.nan,
            self._networks.model,
        )

    # ---- samples ----

    def evaluated(
        self, step: int, metrics: Mapping[str, float], is_best: bool, is_last: bool, first: Callable[[], Batch]
    ) -> Iterator[Aside]:
        """After an evaluation: what the task shows, where it is the best or the last one, and its callbacks.

        Args:
            first: reads the first batch of the evaluation data, the same on every rank.
        """
        self._metrics = dict(metrics)
        if self._shows and (is_best or is_last):
            yield from self._show(step, is_best, first)
        yield from self.after("eval", step)

    def _show(self, step: int, is_best: bool, first: Callable[[], Batch]) -> Iterator[Aside]:
        begin = time.perf_counter()
        self._alive("task")
        # Apart: a rank without a batch would leave the others alone in the network's collectives.
        batch = self._together(step, lambda: first().to(self._device))
        shown = None if batch is None else self._together(step, lambda: self._samples(step, batch))
        if shown is not None and self._job.rank == 0:
            kept, left_out = shown
            seconds = time.perf_counter() - begin
            yield Shown(0, step, self._metrics, is_best, tuple(kept), tuple(left_out), seconds)

    def _samples(self, step: int, batch: Batch) -> tuple[list[Artifact], list[str]]:
        # The same on every rank, and when the step is made again.
        torch.manual_seed(key(self._job.spec.train.seed, step, _SHOW) >> 1)
        with torch.no_grad(), self._networks.averaged():
            return bounded(self._task.samples(self._networks.model, batch))

    def _together(self, step: int, what: Callable[[], T]) -> T | None:
        """What it returns, unless it raised on any rank: then None on all of them, and the user is told once."""
        result, problem = None, ""
        try:
            result = what()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        found = [problem]
        if self._job.num_ranks > 1:
            found = [""] * self._job.num_ranks
            dist.all_gather_object(found, problem)
        first = next(filter(None, found), "")
        if first and first not in self._told:
            self._told.add(first)
            if self._job.rank == 0:
                self._note(f"step {step}: no samples are shown ({first}); the run goes on")
        return None if first else result
