"""The loop of one rank: a generator of reports that the worker sends on.

    for report in Loop(job, task, device, wish=lambda: "", alive=lambda phase: None, ask=no_other_machine).run():
        send(report)

All ranks take the same number of steps and enter the same collectives: whatever decides (a stop request, a
best evaluation) is agreed first.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dltrain.checkpoint.commit import Checkpoint, list_checkpoints
from dltrain.checkpoint.reader import FragmentReader
from dltrain.checkpoint.slots import SlotStore
from dltrain.checkpoint.snapshot import load
from dltrain.data.batch import Batch
from dltrain.data.order import key
from dltrain.data.pool import CollatePool
from dltrain.data.stream import StepBatch, TrainStream
from dltrain.errors import RunFailedError
from dltrain.observing.reports import Done, EvalReport, Note, Ready, Report, SaveFailed, SaveWanted, StepReport
from dltrain.store import open_store
from dltrain.training.ahead import Ahead
from dltrain.training.engine import Engine, StepResult
from dltrain.training.evaluation import Evaluation, better
from dltrain.training.initial import shape_networks, take_weights
from dltrain.training.inputs import Inputs
from dltrain.training.meter import Meter, Phases, peak_flops
from dltrain.training.networks import Networks
from dltrain.training.onlookers import Onlookers
from dltrain.training.plan import BatchPlan, RankJob
from dltrain.training.saving import Saving
from dltrain.training.task import Task, check_networks, load_collate, networks_of

__all__ = ["Loop"]

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
        self._best, self._best_step, self._waited = job.best, job.best_step, job.waited
        # training state
        self.step, self.position = job.step, job.position
        self.current: StepBatch | None = None
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
            while self.position < self._job.schedule.end and not self._is_stale:
                report = self._train_step()
                if report is None:
                    break
                yield report
                yield from self._remember()
                yield from self._between_steps()
            why = self._ahead.agreed
            yield from self._onlookers.last_step(self.step)
            if self._is_stale:
                yield from self._say_stale()
            if not why:
                yield from self._evaluate()
            if why == "pause":
                yield from self._remember(always=True)
            else:
                yield from self._save(must=True)
            if not why:
                yield from self._onlookers.after("end", self.step)
            yield from self._say()
            yield Done(self._job.rank, self.step, why)
        finally:
            # The readers first: who waits for one is told, and need not be waited for.
            self._inputs.close()
            self._stream.close()
            if self._pool:
                self._pool.close()

    def _between_steps(self) -> Iterator[Report]:
        yield from self._say()
        yield from self._onlookers.after("step", self.step)
        if self._due(self._job.schedule.eval_every):
            yield from self._evaluate()
        if self._due(self._job.schedule.checkpoint_every):
            # One that is the last of this attempt is made in any case.
            ends = not self._steps_left or self._is_stale
            yield from self._save(must=ends or self._ahead.look(self._steps_left, self._wish()) != "")

    def _say(self) -> Iterator[Report]:
        while self._notes:
            yield Note(self._job.rank, self._notes.popleft())

    @property
    def _is_stale(self) -> bool:
        patience = self._spec.train.early_stop
        return self._best is not None and patience is not None and self._waited >= patience

    def _say_stale(self) -> Iterator[Report]:
        if self._job.rank == 0:
            best, patience = self._spec.train.best, self._spec.train.early_stop
            yield Note(
                0,
                f"early stop at step {self.step}: no better {best.metric} in {patience} evaluations; "
                f"{self._best:.6g} at step {self._best_step} is the best",
            )

    @property
    def _steps_left(self) -> int:
        return -(-(self._job.schedule.end - self.position) // self._spec.batch.global_)

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
        built = self._task.build()
        modules = networks_of(built)
        check_networks(self._task, modules, self._spec.optim, self._inputs.plan.eval is not None)
        shape_networks(modules, self._spec)
        self._take_weights(modules)
        num_parameters = sum(p.numel() for module in modules.values() for p in module.parameters())
        self._networks = Networks(
            built,
            self._spec.optim,
            self._spec.engine,
            micro_batch=batch.micro_batch,
            grad_accum_steps=batch.grad_accum_steps,
            total_steps=job.schedule.total_steps,
            device=self._device,
            train=self._spec.train,
            task=self._task,
        )
        seconds["engine"] = -begin + (begin := time.perf_counter())
        self._resume()
        self._saving = Saving(self._networks, job, self._ahead, self._alive)
        self._evaluation = Evaluation(
            self._task,
            self._networks,
            self._spec,
            rank=job.rank,
            num_ranks=job.num_ranks,
            device=self._device,
            alive=self._alive,
        )
        self._onlookers = Onlookers(self._task, self._networks, job, self._device, self._alive, self._notes.append)
        seconds["load"] = time.perf_counter() - begin
        self._meter = Meter(self._networks.modules, self._spec.engine, job.rank, job.num_ranks, self._device)
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        return Ready(job.rank, os.getpid(), num_parameters, seconds, name, peak_flops(name))

    def _make_collate(self) -> Callable[[], Any]:
        return partial(load_collate, self._spec.task, self._spec.args, self._job.cwd)

    def _take_weights(self, modules: Mapping[str, Any]) -> None:
        init = self._spec.train.init_from
        if init is None or self._job.resume:
            return
        for line in take_weights(modules, init, self._spec.runs):
            self._say_on_rank_0(line)

    def _say_on_rank_0(self, text: str) -> None:
        if self._job.rank == 0:
            self._notes.append(text)

    def _resume(self) -> None:
        job = self._job
        self._networks.set_step(self.step)
        if not job.resume:
            return
        memory = SlotStore(job.memory, self._ask) if job.memory else None
        self._load(FragmentReader(memory or self._store, Checkpoint(job.resume["path"], job.resume)), job.resume)
        if memory:
            memory.close()

    def _load(self, reader: FragmentReader, manifest: Mapping[str, Any]) -> None:
        networks, job = self._networks, self._job
        applied = int(manifest["optimizer_step"])
        updates = load(networks.parts, reader, applied, job.rank, job.num_ranks, self._say_on_rank_0)
        networks.applied = dict(zip(networks, updates, strict=True))

    # ---- one step ----

    def _train_step(self) -> StepReport | None:
        """One step, or None when the ranks have agreed to stop."""
        self._onlookers.before_step(self.step + 1)
        clock = Phases(self._mark, self._device)
        # What came after the last step: its report, its snapshot.
        clock.lap("other")
        self._alive("data")
        following = self._ahead.take(self._steps_left, self._wish())
        if following is None:
            return None
        batch = self.current = following.batch
        # A rank's own wait: one that reads slowly is not to look like all of them.
        clock.lap("data_wait", self._ahead.others_seconds)
        self._networks.begin_step(following.global_count)
        result = self._networks.together(self._turns(batch, clock))
        clock.end()
        self.step += 1
        self.position = batch.position
        self._onlookers.made(self.step, result)
        self._alive("step")
        self._mark = clock.now
        self._ahead.trained(clock.now - clock.begin)
        if not result.finite:
            self._not_finite()
        return self._report(batch, following.global_count, result, clock)

    def _turns(self, batch: StepBatch, clock: Phases) -> dict[str, StepResult]:
        """Each network's part of a step; jointly, no weight changes before the last has had its turn."""
        found, jointly = {}, self._networks.jointly
        for turn, name in enumerate(self._networks):
            with self._networks.taking(name) as engine:
                for i, micro in enumerate(batch.micros):
                    seeds = () if jointly or not turn else (turn,)
                    self._micro_step(engine, (i, *seeds), micro, clock, last=i == len(batch.micros) - 1)
                if not jointly:
                    found[name] = engine.step()
            clock.lap("optimizer")
        if jointly:
            found = {name: engine.step() for name, engine in self._networks.items()}
            clock.lap("optimizer")
        return found

    def _micro_step(self, engine: Engine, where: tuple[int, ...], micro: Batch, clock: Phases, *, last: bool) -> None:
        # Keyed, not continued: dropout of a step is the same whether or not the run was resumed before it.
        self._alive("step")
        _seed(self._device, key(self._spec.train.seed, self.step, self._job.rank, *where) >> 1)
        moved = micro.to(self._device)
        clock.lap("h2d")
        with self._meter.forward(micro.count, first=where[0] == 0):
            loss = self._networks.loss(self._task, moved)
        clock.lap("forward")
        engine.backward(loss, micro.count, last=last)
        clock.lap("backward")

    def _report(self, batch: StepBatch, count: float, result: StepResult, clock: Phases) -> StepReport:
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
            losses=result.losses,
            **self._meter.step(count, len(batch.micros)),
        )

    def _not_finite(self) -> None:
        """A step in which a network kept its weights, on every rank."""
        policy = self._spec.faults.nonfinite
        if policy == "stop":
            raise RunFailedError(
                f"step {self.step}: loss or gradients are not finite; such an update is not made. "
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
        self._load(FragmentReader(self._store, checkpoint), checkpoint.manifest)

    # ---- between steps ----

    def _evaluate(self) -> Iterator[Report]:
        catalog, reader = self._inputs.plan.eval, self._inputs.eval_reader
        if catalog is None or reader is None or self._evaluated_step == self.step:
            return
        begin = time.perf_counter()
        metrics = self._evaluation.metrics(catalog, reader)
        self._evaluated_step = self.step
        value = better(metrics, self._spec.train.best, self._best)
        is_best = value is not None
        self._waited = 0 if is_best else self._waited + 1
        if value is not None:
            self._best, self._best_step = value, self.step
        self._mark = time.perf_counter()
        yield EvalReport(self._job.rank, self.step, metrics, is_best, self._mark - begin, self._inputs.newly_counted())
        first = partial(self._evaluation.first_batch, catalog, reader)
        yield from self._onlookers.evaluated(self.step, metrics, is_best, not self._steps_left or self._is_stale, first)
        self._mark = time.perf_counter()
        if is_best:
            yield from self._save(must=True)

    def _remember(self, always: bool = False) -> Iterator[Report]:
        averaged = self._due(self._job.schedule.eval_every) or self._due(self._job.schedule.checkpoint_every)
        yield from self._saving.remember(self.step, self.position, averaged=averaged, always=always)

    def _save(self, must: bool = False) -> Iterator[Report]:
        for report in self._saving.save(self.step, self.position, must):
            self._mark = time.perf_counter()
            yield report
            # Whether there was room for it may differ between ranks, what follows it may not.
            if isinstance(report, SaveWanted | SaveFailed):
                yield from self._onlookers.after("checkpoint", self.step)

    def unpin(self, slot: int) -> None:
        """The agent has written a slot to the store."""
        self._saving.unpin(slot)

    def anchored(self, seconds: float) -> None:
        """A copy has come to another machine, after so long."""
        self._ahead.anchor_took(seconds)


def _seed(device: torch.device, seed: int) -> None:
    # torch.manual_seed visits every kind of device: 1.7 ms.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
