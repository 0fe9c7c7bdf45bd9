"""The loop of one rank: a generator of reports that the worker sends on.

    for report in Loop(job, task, device, wish=lambda: "", alive=lambda phase: None, ask=no_other_machine).run():
        send(report)

All ranks take the same number of steps and enter the same collectives: whatever decides (a stop request, a
best evaluation) is agreed first.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dltrain.checkpoint.commit import Checkpoint, list_checkpoints
from dltrain.checkpoint.fragments import average_buffers
from dltrain.checkpoint.reader import FragmentReader
from dltrain.checkpoint.slots import SlotStore
from dltrain.checkpoint.snapshot import Snapshots, load
from dltrain.data.batch import Batch, Sum
from dltrain.data.catalog import Catalog
from dltrain.data.order import key
from dltrain.data.pool import CollatePool
from dltrain.data.reader import UnitReader
from dltrain.data.stream import EvalStream, StepBatch, TrainStream
from dltrain.errors import RunFailedError, UserError
from dltrain.observing.reports import (
    Anchor,
    Done,
    EvalReport,
    Note,
    Ready,
    Report,
    SaveFailed,
    SaveWanted,
    SlotsMade,
    StepReport,
)
from dltrain.store import open_store
from dltrain.training.ahead import Ahead
from dltrain.training.engine import Engine, StepResult
from dltrain.training.inputs import Inputs
from dltrain.training.plan import BatchPlan, RankJob
from dltrain.training.task import Task, load_collate

__all__ = ["Loop", "reduce_sums"]

_EVAL_ROWS = 256
_SLOT_SECONDS = 0.01
# Going back to the same checkpoint more often than this does not help.
_ROLLBACKS = 3


class Loop:
    """One rank of one attempt.

    Args:
        job: what to do.
        device: where the network lives.
        wish: asked before each step; "stop", "drain" or "pause" of any rank ends all of them within a quarter of a
            second or the step that is under way, the first two with a checkpoint, the last with a snapshot in memory.
        alive: told the phase, again and again.
        ask: gives bytes of a snapshot on another machine.
    """

    def __init__(
        self,
        job: RankJob,
        task: Task,
        device: torch.device,
        wish: Callable[[], str],
        alive: Callable[[str], None],
        ask: Callable[[str, int, int], bytes],
    ) -> None:
        self._job, self._task, self._device = job, task, device
        self._wish, self._alive, self._ask = wish, alive, ask
        self._spec = job.spec
        self._store = open_store(job.checkpoints)
        self._best = job.best
        # training state
        self.step, self.position = job.step, job.position
        self.current: StepBatch | None = None
        self._saved_step = job.step if job.resume and not job.memory else -1
        self._evaluated_step = job.step if job.evaluated else -1
        self._rollbacks: Counter[int] = Counter()
        self._notes: deque[str] = deque()
        # seconds spent since the last report on something that is not a step
        self._mark = time.perf_counter()

    # ---- the story ----

    def run(self) -> Iterator[Report]:
        """Builds, loads, trains to the end or to a stop request, evaluating and saving on the way."""
        yield self._prepare()
        self._mark = time.perf_counter()
        try:
            if self._job.unfinished:
                # The attempt before ended between a step and what follows it.
                yield from self._between_steps()
            while self.position < self._job.schedule.end:
                report = self._train_step()
                if report is None:
                    break
                yield report
                yield from self._remember()
                yield from self._between_steps()
            why = self._ahead.agreed
            if not why:
                yield from self._evaluate()
            if why == "pause":
                yield from self._remember(always=True)
            else:
                yield from self._save(must=True)
            yield Done(self._job.rank, self.step, why)
        finally:
            # The readers first: who waits for one is told, and need not be waited for.
            self._inputs.close()
            self._stream.close()
            if self._pool:
                self._pool.close()

    def _between_steps(self) -> Iterator[Report]:
        while self._notes:
            yield Note(self._job.rank, self._notes.popleft())
        if self._due(self._job.schedule.eval_every):
            yield from self._evaluate()
        if self._due(self._job.schedule.checkpoint_every):
            yield from self._save(must=self.position >= self._job.schedule.end)

    def _due(self, every: int) -> bool:
        return self.step > 0 and self.step % every == 0

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
        engine = self._engine
        self._snapshots = Snapshots(engine.engine, engine.module, job.rank, job.num_ranks, job.attempt)
        self._generation = 0
        seconds["load"] = time.perf_counter() - begin
        return Ready(job.rank, _pid(), num_parameters, seconds)

    def _make_collate(self) -> Callable[[], Any]:
        return partial(load_collate, self._spec.task, self._spec.args, self._job.cwd)

    def _resume(self) -> None:
        self._engine.step_count = self.step
        job, self._applied_steps = self._job, 0
        if not job.resume:
            return
        self._applied_steps = int(job.resume["optimizer_step"])
        memory = SlotStore(job.memory, self._ask) if job.memory else None
        reader = FragmentReader(memory or self._store, Checkpoint(job.resume["path"], job.resume))
        load(self._engine.engine, self._engine.module, reader, self._applied_steps, job.rank, job.num_ranks)
        if memory:
            memory.close()

    # ---- one step ----

    def _train_step(self) -> StepReport | None:
        """One step, or None when the ranks have agreed to stop."""
        clock = _Phases(self._mark)
        # What came after the last step: its report, its snapshot.
        clock.lap("other")
        left = -(-(self._job.schedule.end - self.position) // self._spec.batch.global_)
        self._alive("data")
        following = self._ahead.take(left, self._wish())
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
        self._alive("step")
        self._applied_steps += int(result.applied)
        self._mark = clock.now
        self._ahead.trained(clock.now - clock.begin)
        if not result.finite:
            self._not_finite()
        return self._report(batch, following.global_count, result, clock)

    def _micro_step(self, index: int, micro: Batch, last: bool, clock: _Phases) -> None:
        # Keyed, not continued: dropout of a step is the same whether or not the run was resumed before it.
        self._alive("step")
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
            time=time.time(),
            snapshot_every=self._ahead.snapshot_every,
            attempt=self._job.attempt,
            data=self._inputs.newly_counted(),
        )

    def _not_finite(self) -> None:
        """A step that changed no weights, on any rank."""
        policy = self._spec.faults.nonfinite
        if policy == "stop":
            raise RunFailedError(
                f"step {self.step}: loss or gradients are not finite; no weights were changed. "
                "Lower optim.lr, set optim.clip, or set faults.nonfinite: skip to leave such steps out"
            )
        if policy == "rollback":
            self._roll_back()

    def _roll_back(self) -> None:
        """Puts back the weights of the last checkpoint; the data goes on from here, past what led to this."""
        found: list[Checkpoint | None] = [None]
        if self._job.rank == 0:
            found = [next(iter(reversed(list_checkpoints(self._store))), None)]
        if self._job.num_ranks > 1:
            dist.broadcast_object_list(found, src=0)
        checkpoint = found[0]
        if checkpoint is None:
            return
        self._rollbacks[checkpoint.step] += 1
        if self._rollbacks[checkpoint.step] > _ROLLBACKS:
            raise RunFailedError(
                f"step {self.step}: loss or gradients are not finite, {_ROLLBACKS} times since the checkpoint of step "
                f"{checkpoint.step} was put back. Lower optim.lr or set optim.clip"
            )
        job, engine = self._job, self._engine
        self._applied_steps = int(checkpoint.manifest["optimizer_step"])
        reader = FragmentReader(self._store, checkpoint)
        load(engine.engine, engine.module, reader, self._applied_steps, job.rank, job.num_ranks)

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
            yield from self._save(must=True)

    def _metrics(self, catalog: Catalog, reader: UnitReader) -> dict[str, float]:
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
                    self._alive("eval")
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

    def _remember(self, always: bool = False) -> Iterator[Report]:
        """A snapshot in memory, when one is due."""
        anchor = self._job.anchors and self._due(self._ahead.anchor_every)
        if not (always or anchor or self._due(self._ahead.snapshot_every)):
            return
        schedule = self._job.schedule
        if self._due(schedule.eval_every) or self._due(schedule.checkpoint_every):
            # They average buffers: a snapshot of this step is of what they leave, whenever it was taken.
            average_buffers(self._engine.module)
        begin = time.perf_counter()
        slot = self._snapshots.take(self.step, self.position, self._applied_steps)
        self._ahead.snapshot_took(time.perf_counter() - begin)
        yield from self._announce()
        if anchor and slot is not None:
            self._snapshots.pin(slot)
            yield Anchor(self._job.rank, self.step, slot)

    def _save(self, must: bool = False) -> Iterator[Report]:
        """A snapshot that the agent writes to the store while training goes on.

        One that comes before the last is written is left out, unless it `must` be made.
        """
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        rank, begin = self._job.rank, time.perf_counter()
        self._alive("save")
        average_buffers(self._engine.module)
        slot = self._snapshots.take(self.step, self.position, self._applied_steps)
        while slot is None and must:
            self._alive("save")
            time.sleep(_SLOT_SECONDS)
            slot = self._snapshots.take(self.step, self.position, self._applied_steps)
        yield from self._announce()
        seconds = time.perf_counter() - begin
        self._mark = time.perf_counter()
        if slot is None:
            yield SaveFailed(rank, self.step, "all memory for snapshots is in use", seconds)
            return
        self._snapshots.pin(slot)
        yield SaveWanted(rank, self.step, self.position, slot, self._applied_steps, seconds, must)

    def _announce(self) -> Iterator[Report]:
        """Tells where snapshots are, at first and when the slots were made anew."""
        if self._generation == self._snapshots.generation:
            return
        self._generation, layout = self._snapshots.generation, self._snapshots.layout
        self._ahead.snapshot_bytes = layout.num_bytes
        fds = tuple(self._snapshots.fds)
        yield SlotsMade(self._job.rank, fds, layout.num_bytes, layout.parts, layout.whole, layout.ties)

    def unpin(self, slot: int) -> None:
        """The agent has written a slot to the store."""
        self._snapshots.unpin(slot)


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
