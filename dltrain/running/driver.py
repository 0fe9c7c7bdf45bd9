"""The driver: carries out what the state machine decides. One per run.

    summary = Driver(spec, view=make_view(json=False), address=None).run()

It plans, places agents, starts attempts, polls for reports, commits checkpoints and keeps the record.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dltrain.checkpoint.slots import SlotPlace
from dltrain.errors import StoreError
from dltrain.observing.reports import EvalReport, Note, Raised, Saved, SaveWanted, SlotsMade, StepReport
from dltrain.observing.view import View
from dltrain.running import events
from dltrain.running.agent import LogLine
from dltrain.running.cluster import Slot, Slots, connect
from dltrain.running.group import Group
from dltrain.running.heartbeat import Heartbeat
from dltrain.running.keeper import REPLACED, Claims, Keeper, patiently
from dltrain.running.lifecycle import Lifecycle
from dltrain.running.record import Record
from dltrain.running.recovery import Point, newest_point
from dltrain.running.rundir import RunDir, make_plan
from dltrain.running.setup import announce, live_state, make_hub, signals
from dltrain.running.trail import Trail
from dltrain.running.watch import Watch
from dltrain.spec import JobSpec
from dltrain.training.plan import RankJob, Schedule
from dltrain.training.task import check_task

__all__ = ["Driver"]

_TURN_SECONDS = 0.25
# After the first slots are there, how long others may take before the run starts without them.
_PLACE_GRACE_SECONDS = 5.0
_STOP_CHECK_SECONDS = 1.0
# When room for more workers appears, how long others may take to appear as well.
_GROW_GRACE_SECONDS = 1.0


class Driver:
    """One start of one run.

    Args:
        address: of a Ray cluster; default: RAY_ADDRESS, else a private local one.
        cwd: the user's directory, from which the task is imported.
        launched: `time.monotonic()` when the user's command began.
    """

    def __init__(
        self,
        spec: JobSpec,
        view: View,
        address: str | None = None,
        cwd: str | None = None,
        launched: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec, self._view, self._address, self._clock = spec, view, address, clock
        self._cwd = cwd or os.getcwd()
        self._launched = launched if launched is not None else clock()
        self._run = RunDir.of(spec)
        workers = spec.workers
        self._life = Lifecycle(workers.min, workers.max, spec.faults.restarts_per_hour)
        self._ended: events.End | None = None
        self._signal: int | None = None
        self._signal_told = False
        self._resume: dict[str, Any] | None = None
        self._group: Group | None = None
        keep, is_replaced = spec.checkpoint.keep, self._run.is_replaced
        self._keeper = Keeper(self._run.checkpoints, keep, is_replaced, lambda text: view.say(text, "warn"))
        self._claims = Claims(self._run.claim_attempt)
        self._point: Point | None = None
        self._ranks_of: dict[int, int] = {}
        self._place_since = self._grow_since = self._stop_checked = 0.0

    # ---- the story ----

    def run(self) -> dict[str, Any]:
        """Trains to the end; returns the summary.

        Raises:
            UserError: the input is wrong, or there is no room on the cluster.
            RunFailedError: the run ended badly; its directory keeps the last good checkpoint.
        """
        check_task(self._spec.task, self._cwd)
        with contextlib.ExitStack() as stack:
            if self._on_cluster:
                # The agents come up while the plan is made. A Ray of our own is started after it, so that a
                # mistake is told before that.
                self._connect(stack)
            self._make_plan()
            hub = make_hub(self._spec, self._view, self._on_cluster)
            stack.callback(hub.close)
            self._record = Record(self._spec, self._plan, self._run, hub, self._view, self._launched)
            self._restore_record()
            stack.callback(self._record.close)
            stack.callback(self._view.close)
            stack.callback(self._keeper.close)
            if self._keeper.newest and self._position >= self._schedule.end:
                return self._already_done()
            self._record.ledger.enter("placing", self._clock())
            if not self._on_cluster:
                self._connect(stack)
            self._do(self._life.begin())
            while self._ended is None:
                self._turn()
            return self._finish(self._ended)

    @property
    def _on_cluster(self) -> bool:
        return bool(self._address or os.environ.get("RAY_ADDRESS"))

    def _connect(self, stack: contextlib.ExitStack) -> None:
        where = f"connecting to Ray at {self._address or os.environ.get('RAY_ADDRESS')}"
        self._view.say(where if self._on_cluster else "starting Ray on this machine, for this run alone")
        self._cluster = stack.enter_context(connect(self._address))
        # After Ray, which puts handlers of its own in place.
        stack.enter_context(signals(self._on_signal))
        self._slots = Slots(self._cluster, self._spec.workers)
        stack.callback(self._slots.close)
        self._heart = Heartbeat(lambda: list(self._slots.slots), self._spec.faults.lease_seconds)
        stack.callback(self._heart.close)
        self._watch = Watch(self._heart, self._spec.faults)
        self._slots.want(self._spec.workers.max)

    def _make_plan(self) -> None:
        self._plan, changes, is_new = make_plan(self._spec, self._run, self._view.say)
        self._keeper.find()
        self._resume = self._choose()
        self._life.step = self._step
        self._schedule = Schedule.of(self._spec, self._plan.num_rows, self._step, self._position)
        announce(self._view, self._spec, self._run.url, self._plan, self._schedule, self._step, changes)
        self._run.save_spec(self._spec)
        if is_new:
            self._run.save_plan(self._plan)
        self._run.take_stop()

    def _turn(self) -> None:
        """One round of the loop: slots, reports, requests, heartbeat."""
        if self._life.state in ("placing", "waiting", "recovering"):
            self._place()
        else:
            self._pump()
            self._look_after()
        for event, num_bytes in self._keeper.take():
            self._on_committed(event, num_bytes)
        self._check_stop()
        self._handle(events.Tick())
        self._record.beat(self._clock(), self._state)

    def _handle(self, event: events.Event) -> None:
        if not isinstance(event, events.Tick | StepReport):
            self._record.event(event)
        self._do(self._life.handle(event, self._clock()))

    def _do(self, actions: list[events.Action]) -> None:
        for action in actions:
            match action:
                case events.Place():
                    self._slots.want(action.slots)
                    self._place_since = self._clock()
                case events.StartAttempt():
                    self._start(action.num_ranks)
                case events.KillWorkers():
                    self._kill()
                case events.Tell():
                    self._group.tell(action.wish) if self._group else None
                case events.Release():
                    self._release(action.ranks)
                case events.Commit():
                    self._keeper.commit(action.step, self._attempt_number, *self._record.for_commit(action.step))
                case events.Discard():
                    self._keeper.discard(action.step, self._attempt_number, action.reason)
                case events.Say():
                    self._view.say(action.text, "warn" if self._life.state in ("recovering", "waiting") else "info")
                case events.End():
                    self._ended = action

    # ---- before ----

    def _choose(self) -> dict[str, Any] | None:
        """The manifest of what the next attempt goes on from: a snapshot in memory, or the last checkpoint."""
        newest = self._keeper.newest
        if self._point and (newest is None or self._point.step >= newest.step):
            return self._point.manifest()
        return {**newest.manifest, "path": newest.path} if newest else None

    @property
    def _step(self) -> int:
        return int(self._resume["step"]) if self._resume else 0

    @property
    def _attempt_number(self) -> int:
        return self._group.attempt if self._group else 0

    @property
    def _position(self) -> int:
        return int(self._resume["position"]) if self._resume else 0

    def _restore_record(self) -> None:
        if self._keeper.newest:
            manifest = self._keeper.newest.manifest
            self._record.best = manifest.get("best")
            self._record.metrics = dict(manifest.get("metrics") or {})
            self._life.committed_step = self._step

    def _already_done(self) -> dict[str, Any]:
        self._view.say(
            f"this run has finished at step {self._step}; raise train.epochs to go on, or change `name`", "good"
        )
        return self._record.summary("finished", self._step, self._clock())

    def _on_signal(self, number: int) -> None:
        """The first Ctrl-C or SIGTERM stops the run cleanly, a second one at once."""
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number

    # ---- placing and starting ----

    def _place(self) -> None:
        self._slots.want(self._life.max_workers)
        self._drop_silent()
        known = len(self._slots.slots)
        hurry = self._life.may_start(self._clock()) and known >= self._life.min_workers
        slots = len(self._slots.ready(0.0 if hurry else _TURN_SECONDS))
        waited = self._clock() - self._place_since
        # What is there goes on at once; others may join it later.
        hurry = slots >= self._life.max_workers or self._life.state == "recovering"
        final = waited > (0.0 if hurry else _PLACE_GRACE_SECONDS)
        if slots != known or final:
            event = events.Placed(slots, final)
            self._handle(event) if slots != known else self._do(self._life.handle(event, self._clock()))
        if self._life.state == "waiting" and self._record.ledger.state != "waiting_for_capacity":
            self._record.ledger.enter("waiting_for_capacity", self._clock())
        patience = 0.0 if self._cluster.private else self._spec.workers.wait_seconds
        if self._life.state == "waiting" and waited > patience:
            self._do(self._life.wait_over(str(self._cluster)))

    def _start(self, num_ranks: int) -> None:
        """A fresh group, under an attempt number nobody else has."""
        import ray

        self._record.ledger.enter("starting", self._clock())
        # Once: a commit that comes meanwhile must not have ranks go on from different steps.
        self._resume = self._choose()
        self._schedule = Schedule.of(self._spec, self._plan.num_rows, self._step, self._position)
        self._group = Group(self._slots.slots[:num_ranks], self._claims.next())
        self._ranks_of[self._group.attempt] = num_ranks
        saved = self._resume
        from_memory = bool(saved and saved["path"] == "memory")
        trail = self._record.trail.at(self._step) if from_memory else Trail.of(saved.get("audit") if saved else None)
        self._record.start_attempt(self._group.attempt, num_ranks, self._step, trail)
        where = f" from the snapshot of step {self._step} in memory" if from_memory else ""
        workers = f"{num_ranks} worker{'s' if num_ranks > 1 else ''}"
        self._view.say(f"starting {workers} on {self._slots.device}{where}")
        self._record.note(
            "start", attempt=self._group.attempt, num_ranks=num_ranks, step=self._step, from_memory=from_memory
        )
        self._watch.begin(self._group)
        try:
            self._group.start(self._job, self._is_silent)
        except ray.exceptions.RayError as error:
            self._drop_silent()
            self._handle(events.AgentLost(0, str(error).splitlines()[0]))

    def _job(self, rank: int, environment: Mapping[str, str]) -> tuple[RankJob, Mapping[str, Any]]:
        assert self._group is not None
        best, resume, record = self._record.best, self._resume, self._record
        memory: Mapping[str, SlotPlace] | None = None
        others: Mapping[str, Any] = {}
        if resume and resume["path"] == "memory" and self._point:
            node = self._group.slots[rank].info.node_id
            memory, others = self._point.places(node, lambda slot: str(slot.info.node_id))
            others = {name: (slot.agent, *which) for name, (slot, *which) in others.items()}
        return RankJob(
            spec=self._spec,
            attempt=self._group.attempt,
            rank=rank,
            num_ranks=len(self._group.slots),
            step=self._step,
            position=self._position,
            schedule=self._schedule,
            run=self._run.url,
            plan=self._plan.small_bytes,
            plan_id=self._plan.plan_id,
            checkpoints=self._run.checkpoints.url,
            resume=resume,
            memory=memory,
            evaluated=record.evaluated_step == self._step,
            anchors=len(set(self._group.nodes)) > 1,
            unfinished=memory is not None and self._life.committed_step < self._step,
            best=float(best["value"]) if best else None,
            cwd=self._cwd,
            device=self._slots.device,
            environment=environment,
        ), others

    # ---- running ----

    def _pump(self) -> None:
        """Takes in what the agents have."""
        group = self._group
        if group is None:
            time.sleep(_TURN_SECONDS)
            return
        for event in group.poll():
            if group is not self._group:
                break  # It ended with the event before.
            if isinstance(event, events.AgentLost):
                self._slots.lose(group.slots[event.rank])
            self._take(event)

    def _look_after(self) -> None:
        """Agents that are silent, ranks that hang, machines to be left, room for more workers."""
        group = self._group
        if group is None:
            return
        silent = self._watch.silent()
        for rank, _ in silent:
            # All of them before the first is told: none of them is to be waited for.
            group.lose(rank)
            self._slots.lose(group.slots[rank])
        for rank, reason in silent:
            self._handle(events.AgentLost(rank, reason))
        if group is self._group and (hung := self._watch.hung()):
            self._handle(hung)
        if group is self._group and self._life.state == "running":
            for rank in self._watch.leaving():
                self._handle(events.Drained(rank))
        if group is self._group and self._life.state == "running" and self._life.num_ranks < self._life.max_workers:
            self._grow()

    def _is_silent(self, slot: Slot) -> bool:
        return self._heart.silent_seconds(slot) > self._spec.faults.silent_seconds

    def _drop_silent(self) -> None:
        for slot in [slot for slot in self._slots.slots if self._is_silent(slot)]:
            self._slots.lose(slot)

    def _grow(self) -> None:
        self._slots.want(self._life.max_workers)
        # One whose worker is still importing would have the others wait for it.
        pulses = [self._heart.pulse(slot) for slot in self._slots.ready(0.0)]
        slots, now = sum(bool(pulse and pulse.prepared) for pulse in pulses), self._clock()
        if slots <= self._life.num_ranks:
            self._grow_since = now
        elif now - self._grow_since > _GROW_GRACE_SECONDS or slots >= self._life.max_workers:
            self._handle(events.Placed(slots))

    def _take(self, event: events.Event | LogLine) -> None:
        now = self._clock()
        match event:
            case LogLine():
                self._record.log(event)
                return
            case StepReport():
                if self._record.ledger.state == "starting":
                    self._record.ledger.enter("other", now - event.seconds)
                self._record.step(event, now, self._schedule.total_steps)
                self._watch.step(event)
                if refused := self._record.refused(event):
                    self._handle(refused)
            case EvalReport():
                self._record.evaluated(event, now)
            case SaveWanted():
                self._record.saving(event, now)
            case Saved():
                self._keeper.saved(event)
            case SlotsMade():
                self._watch.slots_made(event.rank)
            case Note():
                self._view.say(event.text)
        self._handle(event)

    def _on_committed(self, event: events.Committed, num_bytes: int) -> None:
        if event.reason == REPLACED:
            self._handle(Raised(0, event.step, "final", f"{REPLACED}; this one has saved nothing since", ""))
            return
        if event.reason:
            self._record.save_failed(event.step, event.reason)
        else:
            self._record.committed(event.step, num_bytes)
        self._handle(event)

    def _release(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._slots.leave(self._leaving[rank])
        # What these held goes with them; the step has just been saved.
        self._point = None

    def _kill(self) -> None:
        now, recovering = self._clock(), self._life.state == "recovering"
        if recovering:
            self._record.ledger.part("detecting", float("inf"), now)
            self._record.restarted(self._life.restart_reasons[-1])
        over = self._life.state in ("failed", "stopped")
        self._record.ledger.enter("recovering" if recovering else "other" if over else "resizing", now)
        group, self._group = self._group, None
        if group is None:
            return
        self._leaving = list(group.slots)
        reports, holdings = group.kill(self._slots.slots)
        for report in sorted(reports, key=lambda r: r.step):
            self._record.step(report, now, self._schedule.total_steps)
        self._keeper.forget()
        self._point = newest_point(holdings, self._ranks_of)
        if over:
            return
        if self._point is None and recovering:
            # What was committed a moment ago may be damaged, if a dying disk was the reason.
            patiently(self._keeper.find)

    def _check_stop(self) -> None:
        now = self._clock()
        if self._signal is not None and not self._signal_told:
            self._signal_told = True
            self._handle(events.StopRequested())
        elif now - self._stop_checked >= _STOP_CHECK_SECONDS * (1 if self._run.is_local else 10):
            self._stop_checked = now
            with contextlib.suppress(StoreError):
                if self._run.take_stop():
                    self._handle(events.StopRequested())

    # ---- after ----

    @property
    def _state(self) -> dict[str, Any]:
        return live_state(self._life, self._group, self._record, self._schedule.total_steps)

    def _finish(self, end: events.End) -> dict[str, Any]:
        now = self._clock()
        self._record.ledger.enter("other", now)
        error = f"{end.error}" if end.error else ""
        if end.status == "finished":
            self._record.dropped(self._schedule.end, self._schedule.dropped)
        self._record.note("end", status=end.status, error=error)
        summary = self._record.summary(end.status, self._life.step, now)
        state = {**self._state, "workers": [], "error": error, "summary": summary}
        self._record.beat(now, state, force=True)
        if end.error:
            raise end.error
        return {**summary, "signal": self._signal} if self._signal else summary
