"""The loop of one rank: a generator of reports that the worker sends on.

    for report in Loop(job, task, device, stop=event.is_set).run():
        send(report)

All ranks take the same number of steps and enter the same collectives: whatever decides (a stop request, a
best evaluation) is agreed first.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dltrain.checkpoint.commit import Checkpoint, write_rank
from dltrain.checkpoint.reader import FragmentReader
from dltrain.checkpoint.snapshot import load, take
from dltrain.data.batch import Batch, Sum
from dltrain.data.catalog import Catalog
from dltrain.data.order import key
from dltrain.data.pool import CollatePool
from dltrain.data.reader import UnitReader
from dltrain.data.stream import EvalStream, StepBatch, TrainStream
from dltrain.errors import DltrainError, RunFailedError, UserError
from dltrain.observing.reports import Done, EvalReport, Note, Ready, Report, Saved, SaveFailed, StepReport
from dltrain.store import open_store
from dltrain.training.ahead import Ahead
from dltrain.training.engine import Engine, StepResult
from dltrain.training.inputs import Inputs
from dltrain.training.plan import BatchPlan, RankJob
from dltrain.training.task import Task, load_collate

__all__ = ["Loop", "reduce_sums"]

_EVAL_ROWS = 256


class Loop:
    """One rank of one attempt.

    Args:
        job: what to do.
        device: where the network lives.
        stop: asked before each step; a request by any rank ends the run within a quarter of a second or the step that
            is under way, with a checkpoint.
    """

    def __init__(self, job: RankJob, task: Task, device: torch.device, stop: Callable[[], bool]) -> None:
        self._job, self._task, self._device, self._stop = job, task, device, stop
        self._spec = job.spec
        self._store = open_store(job.checkpoints)
        self._best = job.best
        # training state
        self.step, self.position = job.step, job.position
        self.current: StepBatch | None = None
        self._saved_step, self._evaluated_step = (job.step if job.resume else -1), -1
        self._notes: deque[str] = deque()
        # seconds spent since the last report on something that is not a step
        self._mark = time.perf_counter()

    # ---- the story ----

    def run(self) -> Iterator[Report]:
        """Builds, loads, trains to the end or to a stop request, evaluating and saving on the way."""
        yield self._prepare()
        stopped = False
        self._mark = time.perf_counter()
        try:
            while self.position < self._job.schedule.end:
                report = self._train_step()
                if report is None:
                    stopped = True
                    break
                yield report
                yield from self._between_steps()
            if not stopped:
                yield from self._evaluate()
            yield from self._save()
            yield Done(self._job.rank, self.step, stopped)
        finally:
            # The readers first: who waits for one is told, and need not be waited for.
            self._inputs.close()
            self._stream.close()
            if self._pool:
                self._pool.close()

    def _between_steps(self) -> Iterator[Report]:
        while self._notes:
            yield Note(self._job.rank, self._notes.popleft())
        schedule = self._job.schedule
        if self.step % schedule.eval_every == 0:
            yield from self._evaluate()
        if self.step % schedule.checkpoint_every == 0:
            yield from self._save()

    # ---- starting ----

    def _prepare(self) -> Ready:
        job, seconds, begin = self._job, {}, time.perf_counter()
        self._inputs = Inputs(job, self._task.columns, self._notes.append)
        self._inputs.check_same(self._device)
        batch = BatchPlan.of(self._spec.batch.global_, self._spec.batch.micro, job.num_ranks)
        processes = self._spec.data.collate_workers
        self._pool = CollatePool(self._make_collate(), processes) if processes else None
        self._stream = TrainStream(
            self._inputs.plan.mixture,
            self._inputs.readers,
            self._pool or self._task.collate,
            position=self.position,
            end=job.schedule.end,
            global_batch=batch.global_batch,
            rank=job.rank,
            num_ranks=job.num_ranks,
            micro_batch=batch.micro_batch,
            replace=self._spec.data.bad_rows > 0,
            parallel=processes,
        )
        self._ahead = Ahead(self._stream, job.num_ranks, self._device)
        seconds["data"] = -begin + (begin := time.perf_counter())
        # The same weights on every rank, before DeepSpeed broadcasts rank 0's.
        torch.manual_seed(self._spec.train.seed)
        module = self._task.build()
        num_parameters = sum(p.numel() for p in module.parameters())
        self._engine = Engine(
            module,
            self._spec.optim,
            self._spec.engine,
            micro_batch=batch.micro_batch,
            grad_accum_steps=batch.grad_accum_steps,
            total_steps=job.schedule.total_steps,
            device=self._device,
        )
        seconds["engine"] = -begin + (begin := time.perf_counter())
        self._resume()
        seconds["load"] = time.perf_counter() - begin
        return Ready(job.rank, _pid(), num_parameters, seconds)

    def _make_collate(self) -> Callable[[], Any]:
        return partial(load_collate, self._spec.task, self._spec.args, self._job.cwd)

    def _resume(self) -> None:
        self._engine.step_count = self.step
        if self._job.resume:
            checkpoint = Checkpoint(self._job.resume["path"], self._job.resume)
            reader = FragmentReader(self._store, checkpoint)
            load(self._engine.engine, self._engine.module, reader, int(self._job.resume["optimizer_step"]))
            self._applied_steps = int(self._job.resume["optimizer_step"])
        else:
            self._applied_steps = 0

    # ---- one step ----

    def _train_step(self) -> StepReport | None:
        """One step, or None when the ranks have agreed to stop."""
        clock = _Phases(self._mark)
        left = -(-(self._job.schedule.end - self.position) // self._spec.batch.global_)
        following = self._ahead.take(left, self._stop())
        if following is None:
            return None
        batch = self.current = following.batch
        clock.lap("data_wait")
        self._engine.train()
        self._engine.begin_step(following.global_count)
        for i, micro in enumerate(batch.micros):
            self._micro_step(i, micro, i == len(batch.micros) - 1, clock)
        result = self._engine.step()
        clock.lap("optimizer")
        self.step += 1
        self.position = batch.position
        self._applied_steps += int(result.applied)
        self._mark = clock.now
        self._ahead.trained(clock.now - clock.begin)
        self._check_finite(result)
        return self._report(batch, following.global_count, result, clock)

    def _micro_step(self, index: int, micro: Batch, last: bool, clock: _Phases) -> None:
        # Keyed, not continued: dropout of a step is the same whether or not the run was resumed before it.
        _seed(self._device, key(self._spec.train.seed, self.step, self._job.rank, index) >> 1)
        moved = micro.to(self._device)
        clock.lap("h2d")
        loss = self._task.loss(self._engine, moved)
        clock.lap("forward")
        self._engine.backward(loss, micro.count, last=last)
        clock.lap("backward")

    def _report(self, batch: StepBatch, count: float, result: StepResult, clock: _Phases) -> StepReport:
        return StepReport(
            rank=self._job.rank,
            step=self.step,
            position=self.position,
            size=batch.size,
            count=count,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            applied=result.applied,
            finite=result.finite,
            replaced=tuple((r.source, r.epoch, r.id, r.reason) for r in batch.replaced),
            sums={where: (s.count, s.first, s.second) for where, s in batch.sums.items()},
            seconds=clock.now - clock.begin,
            phases=clock.seconds,
            ready=self._stream.ready,
            data=self._inputs.newly_counted(),
        )

    def _check_finite(self, result: StepResult) -> None:
        if not result.finite and self._spec.faults.nonfinite == "stop":
            raise RunFailedError(
                f"step {self.step}: loss or gradients are not finite; no weights were changed. "
                "Lower optim.lr, set optim.clip, or set faults.nonfinite: skip to leave such steps out"
            )

    # ---- between steps ----

    def _evaluate(self) -> Iterator[Report]:
        catalog, reader = self._inputs.plan.eval, self._inputs.eval_reader
        if catalog is None or reader is None or self._evaluated_step == self.step:
            return
        begin = time.perf_counter()
        metrics = self._metrics(catalog, reader)
        self._evaluated_step = self.step
        is_best = self._is_best(metrics)
        self._mark = time.perf_counter()
        yield EvalReport(self._job.rank, self.step, metrics, is_best, self._mark - begin, self._inputs.newly_counted())
        if is_best:
            yield from self._save()

    def _metrics(self, catalog: Catalog, reader: UnitReader) -> dict[str, float]:
        from dltrain.checkpoint.fragments import average_buffers

        job = self._job
        average_buffers(self._engine.module)
        self._engine.eval()
        # A forward pass over no more rows than a training step may have; the same for any number of workers.
        rows = min(_EVAL_ROWS, self._spec.batch.micro or self._spec.batch.global_)
        chunks = EvalStream(
            catalog.unit_rows,
            reader,
            self._task.collate,
            chunk_rows=rows,
            rank=job.rank,
            num_ranks=job.num_ranks,
        )
        sums: list[tuple[int, dict[str, Sum]]] = []
        try:
            with torch.no_grad():
                for chunk, batch in chunks:
                    found = self._task.evaluate(self._engine, batch.to(self._device))
                    if chunk >= 0:
                        sums.append((chunk, found))
        finally:
            chunks.close()
        everyone: list[Any] = [sums]
        if job.num_ranks > 1:
            everyone = [None] * job.num_ranks
            dist.all_gather_object(everyone, sums)
        return reduce_sums([item for rank in everyone for item in rank])

    def _is_best(self, metrics: dict[str, float]) -> bool:
        best = self._spec.train.best
        if best.metric not in metrics:
            raise UserError(
                f"train.best.metric: evaluate returned no {best.metric!r}; it returns {', '.join(sorted(metrics))}"
            )
        value = metrics[best.metric]
        if not math.isfinite(value):
            return False
        better = self._best is None or (value < self._best if best.mode == "min" else value > self._best)
        if better:
            self._best = value
        return better

    def _save(self) -> Iterator[Report]:
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        job, begin = self._job, time.perf_counter()
        snapshot = take(self._engine.engine, self._engine.module, job.rank, job.num_ranks)
        try:
            file = write_rank(self._store, self.step, job.attempt, job.rank, snapshot.tensors, snapshot.parts)
        except (OSError, DltrainError) as error:
            self._mark = time.perf_counter()
            yield SaveFailed(job.rank, self.step, f"{type(error).__name__}: {error}", self._mark - begin)
            return
        meta = {**snapshot.meta, "optimizer_step": self._applied_steps} if job.rank == 0 else {}
        self._mark = time.perf_counter()
        yield Saved(job.rank, self.step, self.position, file, self._mark - begin, meta)


class _Phases:
    """Seconds by phase since `begin`."""

    def __init__(self, begin: float) -> None:
        self.begin = self.now = begin
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Books the time since the last lap."""
        before, self.now = self.now, time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now - before


def reduce_sums(items: list[tuple[int, dict[str, Sum]]]) -> dict[str, float]:
    """Metrics from the sums of all chunks of all ranks.

    Added up in the order of chunks with an exact sum, so that the figure does not depend on who had which.
    """
    ordered = [sums for _, sums in sorted(items, key=lambda item: item[0])]
    names = ordered[0] if ordered else {}
    totals = {n: (math.fsum(s[n].total for s in ordered), math.fsum(s[n].count for s in ordered)) for n in names}
    return {name: total / count if count else math.nan for name, (total, count) in totals.items()}


def _seed(device: torch.device, seed: int) -> None:
    # torch.manual_seed visits every kind of device: 1.7 ms.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _pid() -> int:
    import os

    return os.getpid()
