"""The driver: carries out what the state machine decides. One per run.

    summary = Driver(spec, view=make_view(json=False), address=None).run()

It plans, places agents, starts attempts, polls for reports, commits checkpoints and keeps the record.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dltrain import __version__
from dltrain.checkpoint.commit import Checkpoint, commit, discard, newest_good, prune
from dltrain.errors import StoreError
from dltrain.observing.hub import Hub
from dltrain.observing.reports import EvalReport, Note, Raised, Saved, SaveFailed, StepReport
from dltrain.observing.view import View
from dltrain.running.agent import LogLine
from dltrain.running.cluster import Slots, connect
from dltrain.running.group import Group
from dltrain.running.lifecycle import (
    Action,
    AgentLost,
    Commit,
    Committed,
    Discard,
    End,
    Event,
    KillWorkers,
    Lifecycle,
    Place,
    Placed,
    Say,
    StartAttempt,
    StopRequested,
    TellStop,
    Tick,
)
from dltrain.running.record import Record
from dltrain.running.rundir import RunDir, make_plan
from dltrain.spec import JobSpec
from dltrain.training.plan import BatchPlan, RankJob, Schedule
from dltrain.training.task import check_task

__all__ = ["Driver"]

_TURN_SECONDS = 0.25
# After the first slots are there, how long others may take before the run starts without them.
_PLACE_GRACE_SECONDS = 5.0
_STOP_CHECK_SECONDS = 1.0


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
        self._ended: End | None = None
        self._signal: int | None = None
        self._group: Group | None = None
        self._saved: dict[int, dict[int, Saved]] = {}
        self._place_since: float | None = None
        self._stop_checked = 0.0

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
            hub = self._make_hub()
            stack.callback(hub.close)
            self._record = Record(self._spec, self._plan, self._run, hub, self._view, self._launched)
            self._restore_record()
            stack.callback(self._record.close)
            stack.callback(self._view.close)
            if self._resume and self._position >= self._schedule.end:
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
        stack.enter_context(self._signals())
        self._slots = Slots(self._cluster, self._spec.workers)
        stack.callback(self._slots.close)
        self._slots.want(self._spec.workers.max)

    def _make_plan(self) -> None:
        self._plan, changes, is_new = make_plan(self._spec, self._run, self._view.say)
        self._resume = newest_good(self._run.checkpoints, lambda text: self._view.say(text, "warn"))
        self._life.step = self._step
        self._schedule = Schedule.of(self._spec, self._plan.num_rows, self._step, self._position)
        self._announce(changes)
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
        self._check_stop()
        self._handle(Tick())
        self._record.beat(self._clock(), self._state())

    def _handle(self, event: Event) -> None:
        if not isinstance(event, Tick | StepReport):
            self._record.event(event)
        self._do(self._life.handle(event, self._clock()))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Place():
                    self._slots.want(action.slots)
                    self._place_since = self._clock()
                case StartAttempt():
                    self._start(action.num_ranks)
                case KillWorkers():
                    self._kill()
                case TellStop():
                    if self._group:
                        self._group.tell("stop")
                case Commit():
                    self._commit(action.step)
                case Discard():
                    self._drop(action.step, action.reason)
                case Say():
                    self._view.say(action.text, "warn" if self._life.state in ("recovering", "waiting") else "info")
                case End():
                    self._ended = action

    # ---- before ----

    @property
    def _step(self) -> int:
        return self._resume.step if self._resume else 0

    @property
    def _attempt_number(self) -> int:
        return self._group.attempt if self._group else 0

    @property
    def _position(self) -> int:
        return int(self._resume.manifest["position"]) if self._resume else 0

    def _announce(self, changes: list[str]) -> None:
        spec, plan = self._spec, self._plan
        self._view.say(
            f"{spec.name}: {plan.num_rows:,} rows in {plan.num_units:,} row groups, "
            f"{self._schedule.total_steps} steps, into {self._run.url}"
        )
        self._view.say(f"global batch: {BatchPlan.of(spec.batch.global_, spec.batch.micro, spec.workers.max)}")
        if self._schedule.dropped:
            self._view.say(f"data.end: drop leaves out the last {self._schedule.dropped} rows", "warn")
        if self._resume:
            self._view.say(f"resuming from the checkpoint of step {self._step}", "good")
        for change in changes:
            self._view.say(f"changed since the last start: {change}")

    def _make_hub(self) -> Hub:
        metrics, engine = self._spec.metrics, self._spec.engine
        labels = {"run": self._spec.name, "zero_stage": str(engine.zero), "precision": engine.precision}
        # On a cluster a scraper expects the port; on a laptop another run may have it.
        hub = Hub(metrics.host, metrics.port, move=not self._on_cluster, labels=labels)
        if hub.moved:
            self._view.say(f"metrics port {metrics.port} is busy; using {hub.port}")
        return hub

    def _restore_record(self) -> None:
        if self._resume:
            self._record.best = self._resume.manifest.get("best")
            self._record.metrics = dict(self._resume.manifest.get("metrics") or {})
            self._life.committed_step = self._step

    def _already_done(self) -> dict[str, Any]:
        self._view.say(
            f"this run has finished at step {self._step}; raise train.epochs to go on, or change `name`", "good"
        )
        return self._record.summary("finished", self._step, self._clock())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM stops the run cleanly, a second one at once."""

        def on_signal(number: int, _frame: Any) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number

        before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- placing and starting ----

    def _place(self) -> None:
        known = len(self._slots.slots)
        slots = len(self._slots.ready(_TURN_SECONDS))
        waited = self._clock() - (self._place_since or 0.0)
        full = slots >= self._life.max_workers
        final = waited > (0.0 if full else _PLACE_GRACE_SECONDS)
        if slots != known or final:
            before = self._life.state
            self._handle_placed(Placed(slots, final), changed=slots != known)
            if self._life.state == "waiting" and before != "waiting":
                self._record.ledger.enter("waiting_for_capacity", self._clock())
        patience = 0.0 if self._cluster.private else self._spec.workers.wait_seconds
        if self._life.state == "waiting" and waited > patience:
            self._do(self._life.wait_over(str(self._cluster)))

    def _handle_placed(self, event: Placed, changed: bool) -> None:
        if changed:
            self._handle(event)
        else:  # nothing new to log
            self._do(self._life.handle(event, self._clock()))

    def _start(self, num_ranks: int) -> None:
        """A fresh group, under an attempt number nobody else has."""
        import ray

        self._record.ledger.enter("starting", self._clock())
        self._saved.clear()
        self._group = Group(self._slots.slots[:num_ranks], self._run.claim_attempt())
        saved = self._resume.manifest.get("audit") if self._resume else None
        self._record.start_attempt(self._group.attempt, num_ranks, saved)
        self._view.say(f"starting {num_ranks} worker{'s' if num_ranks > 1 else ''} on {self._slots.device}")
        try:
            self._group.start(self._job)
        except ray.exceptions.RayError as error:
            self._slots.drop_dead()
            self._handle(AgentLost(0, str(error).splitlines()[0]))

    def _job(self, rank: int, environment: Mapping[str, str]) -> RankJob:
        assert self._group is not None
        best = self._record.best
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
            resume={**self._resume.manifest, "path": self._resume.path} if self._resume else None,
            best=float(best["value"]) if best else None,
            cwd=self._cwd,
            device=self._slots.device,
            environment=environment,
        )

    # ---- running ----

    def _pump(self) -> None:
        """Takes in what the agents have."""
        group = self._group
        if group is None:
            time.sleep(_TURN_SECONDS)
            return
        for event in group.poll():
            if isinstance(event, AgentLost):
                self._slots.lose(group.slots[event.rank])
            self._take(event)

    def _take(self, event: Event | LogLine) -> None:
        now = self._clock()
        match event:
            case LogLine():
                self._record.log(event)
                return
            case StepReport():
                if self._record.ledger.state == "starting":
                    self._record.ledger.enter("other", now - event.seconds)
                self._record.step(event, now, self._schedule.total_steps)
                self._check_replaced(event)
            case EvalReport():
                self._record.evaluated(event, now)
            case Saved():
                self._record.saved(event, now)
                self._saved.setdefault(event.step, {})[event.rank] = event
            case SaveFailed():
                self._record.saved(event, now)
            case Note():
                self._view.say(event.text)
        self._handle(event)

    def _check_replaced(self, report: StepReport) -> None:
        allowed, found = self._spec.data.bad_rows, self._record.num_replaced
        if report.replaced and found > allowed:
            text = f"{found} rows can't be read, data.bad_rows allows {allowed}; the last: {report.replaced[-1][3]}"
            self._handle(Raised(report.rank, report.step, "final", f"{text}. They are listed in quarantine.jsonl", ""))

    def _commit(self, step: int) -> None:
        files = self._saved.pop(step)
        first = files[0]
        meta = {
            "position": first.position,
            "num_ranks": len(files),
            "zero": self._spec.engine.zero,
            "precision": self._spec.engine.precision,
            "global_batch": self._spec.batch.global_,
            "plan_id": self._plan.plan_id,
            "metrics": self._record.metrics,
            "best": self._record.best,
            "audit": self._record.trail.to_dict(),
            "ledger": self._record.ledger.to_dict(),
            "spec": self._spec.to_dict(),
            "dltrain": __version__,
            **first.meta,
        }
        store = self._run.checkpoints
        try:
            path = commit(store, step, self._attempt_number, [files[r].file for r in sorted(files)], meta)
        except (OSError, StoreError) as error:
            self._drop(step, str(error))
            return
        size = sum(int(f.file["bytes"]) for f in files.values())
        self._record.committed(step, size)
        self._handle(Committed(step))
        manifest = {"format": 1, "step": step, **meta, "files": [files[r].file for r in sorted(files)]}
        self._resume = Checkpoint(path, manifest)
        best = self._record.best
        with contextlib.suppress(OSError, StoreError):
            prune(store, self._spec.checkpoint.keep, best["step"] if best else None)

    def _drop(self, step: int, reason: str) -> None:
        self._record.save_failed(step, reason)
        with contextlib.suppress(OSError, StoreError):
            discard(self._run.checkpoints, step, self._attempt_number)
        self._handle(Committed(step, reason))

    def _kill(self) -> None:
        now = self._clock()
        self._record.ledger.part("detecting", float("inf"), now)
        self._record.ledger.enter("recovering", now)
        if self._life.state == "recovering":
            self._record.restarted(self._life.restart_reasons[-1])
        if self._group:
            for report in self._group.kill(self._slots.slots):
                self._record.step(report, now, self._schedule.total_steps)
            self._group = None
        if self._life.state == "recovering":
            # What was committed a moment ago may be damaged, if a dying disk was the reason.
            self._resume = newest_good(self._run.checkpoints, lambda text: self._view.say(text, "warn"))
            self._schedule = Schedule.of(self._spec, self._plan.num_rows, self._step, self._position)

    def _check_stop(self) -> None:
        now = self._clock()
        if self._signal is not None:
            self._handle(StopRequested())
        elif now - self._stop_checked >= _STOP_CHECK_SECONDS * (1 if self._run.is_local else 10):
            self._stop_checked = now
            with contextlib.suppress(StoreError):
                if self._run.take_stop():
                    self._handle(StopRequested())

    # ---- after ----

    def _state(self) -> dict[str, Any]:
        group = self._group
        workers = [
            {"rank": r, "pid": pid, "node": slot.info.address, "state": self._life.state}
            for r, (slot, pid) in enumerate(zip(group.slots, group.pids, strict=False) if group else ())
        ]
        return {
            "run": self._spec.name,
            "state": self._life.state,
            "step": self._life.step,
            "total_steps": self._schedule.total_steps,
            "world_size": self._life.num_ranks,
            "workers": workers,
            "restarts": self._record.total_restarts,
            "samples_per_second": round(self._record.rate, 1),
            "goodput": round(self._record.ledger.goodput, 4),
            "checkpoint_step": self._life.committed_step,
        }

    def _finish(self, end: End) -> dict[str, Any]:
        now = self._clock()
        self._record.ledger.enter("other", now)
        error = f"{end.error}" if end.error else ""
        if end.status == "finished":
            self._record.dropped(self._schedule.end, self._schedule.dropped)
        self._record.note("end", status=end.status, error=error)
        summary = self._record.summary(end.status, self._life.step, now)
        state = {**self._state(), "workers": [], "error": error, "summary": summary}
        self._record.beat(now, state, force=True)
        if end.error:
            raise end.error
        return {**summary, "signal": self._signal} if self._signal else summary
