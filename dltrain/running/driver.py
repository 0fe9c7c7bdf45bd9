"""The driver: carries out what the state machine decides. One per run.

    summary = Driver(spec, view=make_view(json=False), address=None).run()

It plans, places agents, starts attempts, polls for reports, commits checkpoints and keeps the record.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dltrain.checkpoint.slots import SlotPlace
from dltrain.observing.reports import Aside, EvalReport, Note, Raised, Saved, SaveWanted, SlotsMade, StepReport
from dltrain.observing.view import View
from dltrain.running import events
from dltrain.running.cluster import Slot, Slots, connect
from dltrain.running.group import Group
from dltrain.running.heartbeat import Heartbeat
from dltrain.running.keeper import REPLACED, Claims, Keeper, patiently
from dltrain.running.lifecycle import Lifecycle
from dltrain.running.places import Places
from dltrain.running.record import Record
from dltrain.running.recovery import Point, newest_point
from dltrain.running.requests import Requests
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
# When room for more workers appears, how long others may take to appear as well.
_GROW_GRACE_SECONDS = 1.0


class Driver:
    """One start of one run.

    Args:
        address: of a Ray cluster; default: RAY_ADDRESS, else a private local one.
        cwd: the user's directory, from which the task is imported.
        launched: `time.monotonic()` when the user's command began.
        places: where its workers go; default: wherever the cluster has room.
    """

    def __init__(
        self,
        spec: JobSpec,
        view: View,
        address: str | None = None,
        cwd: str | None = None,
        launched: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        places: Places | None = None,
    ) -> None:
        self._spec, self._view, self._address, self._clock = spec, view, address, clock
        self._cwd, self._places = cwd or os.getcwd(), places
        self._launched = launched if launched is not None else clock()
        self._run = RunDir.of(spec)
        self._life = Lifecycle(spec.workers.min, spec.workers.max, spec.faults.restarts_per_hour)
        self._ended: events.End | None = None
        self._signal: int | None = None
        self._resume: dict[str, Any] | None = None
        self._group: Group | None = None
        keep, is_replaced = spec.num_kept, self._run.is_replaced
        self._keeper = Keeper(self._run.checkpoints, keep, is_replaced, lambda text: view.say(text, "warn"))
        self._claims = Claims(self._run.claim_attempt)
        self._point: Point | None = None
        self._ranks_of: dict[int, int] = {}
        self._stop_told, self._place_since, self._grow_since = False, 0.0, 0.0

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
            if self._keeper.newest:
                self._record.restore(self._keeper.newest.manifest)
                self._life.committed_step = self._step
            stack.callback(self._record.close)
            stack.callback(self._view.close)
            stack.callback(self._keeper.close)
            self._requests = Requests(self._run)
            stack.callback(self._requests.close)
            if self._is_done:
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
        stack.enter_context(signals(self.stop))
        self._slots = Slots(self._cluster, self._spec.workers, self._places)
        stack.callback(self._slots.close)
        self._heart = Heartbeat(lambda: list(self._slots.slots), self._spec.faults.lease_seconds)
        stack.callback(self._heart.close)
        self._watch = Watch(self._heart, self._spec.faults, compiles=bool(self._spec.train.compile))
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

    @property
    def _is_done(self) -> bool:
        over = self._record.evaluations.ended_early or self._position >= self._schedule.end
        return self._keeper.newest is not None and over

    def _already_done(self) -> dict[str, Any]:
        more = "train.epochs" if self._position >= self._schedule.end else "train.early_stop"
        self._view.say(f"this run has finished at step {self._step}; raise {more} to go on, or change `name`", "good")
        return self._record.summary("finished", self._step, self._clock())

    def stop(self, number: int = signal.SIGTERM) -> None:
        """The first Ctrl-C or SIGTERM stops the run cleanly, a second Ctrl-C at once; Kubernetes may repeat SIGTERM."""
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or number

    # ---- placing and starting ----

    def _place(self) -> None:
        self._slots.want(self._life.max_workers)
        self._slots.drop(self._is_silent)
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
        self._record.evaluations.best = self._keeper.best(self._record.evaluations.best)
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
            self._slots.drop(self._is_silent)
            self._handle(events.AgentLost(0, str(error).splitlines()[0]))

    def _job(self, rank: int, environment: Mapping[str, str]) -> tuple[RankJob, Mapping[str, Any]]:
        assert self._group is not None
        resume, evaluations, best = self._resume, self._record.evaluations, self._record.evaluations.best
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
            evaluated=evaluations.step == self._step,
            anchors=len(set(self._group.nodes)) > 1,
            unfinished=memory is not None and self._life.committed_step < self._step,
            best=float(best["value"]) if best else None,
            best_step=int(best["step"]) if best else 0,
            waited=evaluations.waited,
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
            self._grow(group)

    def _is_silent(self, slot: Slot) -> bool:
        return self._heart.silent_seconds(slot) > self._spec.faults.silent_seconds

    def _grow(self, group: Group) -> None:
        self._slots.want(self._life.max_workers)
        self._slots.drop(lambda slot: slot not in group.slots and self._is_silent(slot))
        # One whose worker is still importing would have the others wait for it.
        pulses = [self._heart.pulse(slot) for slot in self._slots.ready(0.0)]
        slots, now = sum(bool(pulse and pulse.prepared) for pulse in pulses), self._clock()
        if slots <= self._life.num_ranks:
            self._grow_since = now
        elif now - self._grow_since > _GROW_GRACE_SECONDS or slots >= self._life.max_workers:
            self._handle(events.Placed(slots))

    def _take(self, event: events.Event) -> None:
        now = self._clock()
        match event:
            case Aside():
                self._record.aside(event, now)
                return
            case StepReport():
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
            self._on_replaced()
            return
        if event.reason:
            self._record.save_failed(event.step, event.reason)
            self._record.evaluations.best = self._keeper.best(self._record.evaluations.best, self._record.saving_steps)
        else:
            self._record.committed(event.step, num_bytes)
        self._handle(event)

    def _on_replaced(self) -> None:
        if self._record.abandon():
            self._handle(Raised(0, self._life.step, "final", f"{REPLACED}; this one has saved nothing since", ""))

    def _release(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._slots.leave(self._leaving[rank])
        # What these held goes with them; the step has just been saved.
        self._point = None

    def _kill(self) -> None:
        now, recovering = self._clock(), self._life.state == "recovering"
        over = self._life.state in ("failed", "stopped")
        self._record.end_attempt(now, self._life.restart_reasons[-1] if recovering else "", over)
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
        for slot in self._slots.slots:
            # What nobody will go on from would pile up where attempts die young.
            slot.agent.forget.remote(group.attempt + 1, self._point.attempt if self._point else 0)
        if self._point is None and recovering:
            # What was committed a moment ago may be damaged, if a dying disk was the reason.
            patiently(self._keeper.find)

    def _check_stop(self) -> None:
        if (self._signal is not None or self._requests.stop) and not self._stop_told:
            self._stop_told = True
            self._handle(events.StopRequested())
        if self._requests.replaced:
            self._on_replaced()

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
        self._record.beat(now, {**self._state, "workers": [], "error": error, "summary": summary}, force=True)
        if end.error:
            raise end.error
        return {**summary, "signal": self._signal} if self._signal else summary
