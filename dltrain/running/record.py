"""The record of a run: journals, ledger, metrics and state.json, fed by the driver.

record = Record(spec, plan, run, hub, view, now)
record.step(report); record.event(event); record.beat(lifecycle_state)
record.summary("finished")
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dltrain import __version__
from dltrain.data.identity import BatchSum
from dltrain.data.plan import Plan
from dltrain.errors import StoreError
from dltrain.observing.hub import Hub
from dltrain.observing.journal import Journal, read_json, write_json
from dltrain.observing.ledger import Ledger
from dltrain.observing.reports import OVER, Aside, EvalReport, Raised, Ready, Saved, SaveWanted, Shown, StepReport
from dltrain.observing.view import Progress, View
from dltrain.running.evaluations import Evaluations
from dltrain.running.events import Event
from dltrain.running.rundir import RunDir
from dltrain.running.sidelines import Sidelines
from dltrain.running.trail import Trail
from dltrain.spec import JobSpec

__all__ = ["Record"]

_BEAT_SECONDS = 1.0
_REMOTE_BEAT_SECONDS = 10.0


class Record:
    """Everything that a run writes down about itself.

    Args:
        now: monotonic seconds at which this start began.
        launched: monotonic seconds at which the user's command began.
    """

    def __init__(self, spec: JobSpec, plan: Plan, run: RunDir, hub: Hub, view: View, launched: float) -> None:
        self._spec, self._plan, self._run, self._hub, self._view = spec, plan, run, hub, view
        self.name = spec.name
        before = read_json(run.store, "ledger.json") or {}
        seconds = dict(before.get("seconds", {}))
        # What has passed since this launch is the ledger's to book.
        last = read_json(run.store, "state.json")
        self._last: Mapping[str, Any] = last or {}
        _book_gap(seconds, last, time.time() - (time.monotonic() - launched))
        self.ledger = Ledger(launched, seconds)
        self.counters: dict[str, float] = dict(before.get("counters", {}))
        self.total_restarts = int(before.get("restarts", 0))
        self._steps, self._events = Journal(run.store, "steps"), Journal(run.store, "events")
        self._replaced = Journal(run.store, "quarantine")
        self._sidelines = Sidelines(spec, run, hub, view, self.note)
        self._launched, self._last_beat = launched, 0.0
        self._partial: dict[int, dict[int, StepReport]] = {}
        self.trail = Trail()
        self._highest = self._latest = int(before.get("highest_step", 0))
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="dltrain-record")
        self._written: Future[None] = Future()
        self._written.set_result(None)
        # this start
        self.samples, self.step_seconds, self.steps_made = 0, 0.0, 0
        self.first_step_seconds: float | None = None
        self.evaluations = Evaluations(spec.train)
        self.committed_step = -1
        # When the last checkpoint was made, in Unix seconds; 0 before the first.
        self.checkpoint_time = float(self._last.get("checkpoint_time", 0.0))
        hub.restore(self.counters, self.checkpoint_time)
        self.snapshot_every = 0
        # step -> what belongs into the manifest of its checkpoint
        self._saving: dict[int, dict[str, Any]] = {}
        self.problem, self._status = "", "failed"
        self._abandoned = False
        self.note("launch", version=__version__)

    # ---- from the ranks ----

    def start_attempt(self, attempt: int, num_ranks: int, step: int, trail: Trail) -> None:
        """A new group that goes on after `step`, and from this trail; reports of the old one are not waited for."""
        self.trail = trail
        self._attempt, self._num_ranks, self.committed_step = attempt, num_ranks, step
        self.evaluations.restart(step)
        # A step that any rank has made is made again by the new group.
        self._highest = max(self._highest, self._latest)
        self._partial.clear()
        self._saving.clear()
        self._hub.on_attempt(num_ranks)
        self._sidelines.tracking.begin(step)

    def step(self, report: StepReport, now: float, total_steps: int) -> None:
        """One rank's step; the line is written when every rank has reported it.

        A report may come twice: from its agent, and from who holds the rank's black box.
        """
        if self.ledger.state == "starting":
            self.ledger.enter("other", now - report.seconds)
        reports = self._partial.setdefault(report.step, {})
        if report.attempt != self._attempt or report.step <= self.committed_step or report.rank in reports:
            return
        self._hub.on_step(report)
        self._count_rank(report)
        self._latest = max(self._latest, report.step)
        if self.first_step_seconds is None:
            self.first_step_seconds = now - self._launched
        reports[report.rank] = report
        if len(reports) == self._num_ranks:
            self._commit_step([reports[r] for r in range(self._num_ranks)], now, total_steps)
            del self._partial[report.step]

    def _commit_step(self, reports: Sequence[StepReport], now: float, total_steps: int) -> None:
        first = reports[0]
        sums = sum((BatchSum(*numbers) for r in reports for numbers in r.sums.values()), BatchSum())
        self.trail.add(first.step, reports)
        self.committed_step = first.step
        self._quarantine(reports)
        data_wait = max(r.phases.get("data_wait", 0.0) for r in reports)
        redone = first.step <= self._highest
        self._highest = max(self._highest, first.step)
        self.ledger.step(now, first.seconds, data_wait, redone)
        self.samples += first.size
        self.steps_made += 1
        self.step_seconds += first.seconds
        self._count_step(first)
        loss = sum(r.loss for r in reports)
        losses = {name: sum(r.losses[name] for r in reports) for name in first.losses}
        self._hub.on_loss(loss, losses)
        line = {
            "step": first.step,
            "time": round(max(r.time for r in reports), 3),
            "attempt": self._attempt,
            "loss": loss,
            "samples": first.size,
            "position": first.position,
            "batch_id": sums.batch_id,
            "grad_norm": first.grad_norm,
            "learning_rate": first.learning_rate,
            "seconds": round(first.seconds, 6),
            "data_wait_seconds": round(data_wait, 6),
            "phases": {phase: round(seconds, 6) for phase, seconds in first.phases.items()},
            "applied": first.applied,
            "finite": first.finite,
            **({"losses": losses} if losses else {}),
        }
        self._steps.add(line)
        self._sidelines.step(line)
        if sums.count != first.size:
            self.problem = f"step {first.step} trained {sums.count} rows instead of {first.size}"
        self._snapshots(first)
        progress = Progress(first.step, total_steps, loss, self.rate, self._wait_share(), self._num_ranks)
        self._view.on_step(progress)

    def _snapshots(self, report: StepReport) -> None:
        if report.snapshot_every != self.snapshot_every:
            self.snapshot_every = report.snapshot_every
            self._hub.on_snapshots(report.snapshot_every)
            self.note("snapshots", step=report.step, every=report.snapshot_every)

    def _quarantine(self, reports: Sequence[StepReport]) -> None:
        for report in reports:
            for source, epoch, row, reason in report.replaced:
                # The ids of a step's rows go on from one dataset to the next.
                within = row - sum(s.catalog.num_rows for s in self._plan.sources[:source])
                where = {"source": self._plan.names[source], "epoch": epoch, "row": within}
                self._replaced.add({"step": report.step, **where, "reason": reason})

    def dropped(self, consumed: int, size: int) -> None:
        """Which rows `data.end: drop` left out, `size` of them from a position on."""
        for source, epoch, ids in self._plan.rows(consumed, size):
            self.note("dropped", source=self._plan.names[source], epoch=epoch, rows=ids.tolist())

    @property
    def num_replaced(self) -> int:
        """Rows, in the steps that the weights rest on, that another row was trained in the place of."""
        return sum(self.trail.replaced.values())

    def _count(self, counted: Mapping[str, float]) -> None:
        """Adds to the counters, which go on in the next start of the run."""
        for name, number in counted.items():
            if number:
                self.counters[name] = self.counters.get(name, 0) + number
                self._hub.count(name, number)

    def _count_data(self, counted: Mapping[str, float]) -> None:
        self._count({f"data_{name}": number for name, number in counted.items()})

    def _count_rank(self, report: StepReport) -> None:
        self._count_data(report.data)
        self._count({"alloc_retries": report.alloc_retries})

    def for_commit(self, step: int) -> tuple[dict[str, Any], Callable[[], None]]:
        """A checkpoint's manifest, and what is to be written before it."""
        return self.manifest(step), self.write_journals

    def write_journals(self) -> None:
        """Puts every line so far where a death of this process leaves it.

        Raises:
            OSError, StoreError: it could not be written; the lines are kept for the next time.
        """
        for journal in (self._steps, self._events, self._replaced) if not self._abandoned else ():
            journal.flush()

    def refused(self, report: StepReport) -> Raised | None:
        """The end of a run that trains more rows in the place of others than it may."""
        allowed, found = self._spec.data.bad_rows, self.num_replaced
        if not report.replaced or found <= allowed:
            return None
        text = f"{found} rows can't be read, data.bad_rows allows {allowed}; the last: {report.replaced[-1][3]}"
        return Raised(report.rank, report.step, "final", f"{text}. They are listed in quarantine.jsonl", "")

    def _count_step(self, report: StepReport) -> None:
        self._count(
            {
                "steps": 1,
                "samples": report.size,
                "tokens": report.count,
                "nonfinite": int(not report.finite),
                "skipped": int(not report.applied),
                "flops": report.flops,
                "gradient_bytes": report.gradient_bytes,
            }
        )

    def evaluated(self, report: EvalReport, now: float) -> None:
        """An evaluation; every rank has the same figures, rank 0's are taken."""
        self._count_data(report.data)
        if report.rank == 0:
            self.evaluations.add(report)
            self.ledger.part("eval", report.seconds, now)
            self._hub.on_eval(report)
            self._sidelines.evaluated(report)
            self._view.on_eval(report.step, report.metrics, report.is_best)

    def restore(self, manifest: Mapping[str, Any]) -> None:
        """What a checkpoint knows of evaluations."""
        self.evaluations.restore(manifest, self._last)

    def saving(self, report: SaveWanted, now: float) -> None:
        """A checkpoint has been copied; what is known of the run at this step goes into its manifest."""
        if report.rank == 0:
            self.ledger.part("checkpoint_stall", report.seconds, now)
            self._count({"checkpoint_stall_seconds": report.seconds})
            self._saving[report.step] = {**self.evaluations.to_dict(), "ledger": self.ledger.to_dict()}

    @property
    def saving_steps(self) -> Collection[int]:
        """Steps whose checkpoints are being written by the agents."""
        return self._saving.keys()

    def manifest(self, step: int) -> dict[str, Any]:
        """Of a checkpoint that is being committed."""
        spec = self._spec
        return {
            "zero": spec.engine.zero,
            "precision": spec.engine.precision,
            "global_batch": spec.batch.global_,
            "plan_id": self._plan.plan_id,
            "spec": spec.to_dict(),
            "dltrain": __version__,
            **self._saving.pop(step, {}),
            "audit": self.trail.at(step).to_dict(),
        }

    def save_failed(self, step: int, reason: str) -> None:
        """A checkpoint was lost; training goes on."""
        self._saving.pop(step, None)
        self._count({"checkpoint_failures": 1})
        self.note("checkpoint_failed", step=step, reason=reason)
        self._view.say(f"step {step}: the checkpoint could not be saved ({reason}); training goes on", "warn")

    def committed(self, step: int, num_bytes: int) -> None:
        """A checkpoint exists."""
        self.checkpoint_time = round(time.time(), 3)
        self._hub.on_commit(num_bytes)
        self.note("checkpoint", step=step, bytes=num_bytes)

    def end_attempt(self, now: float, fault: str, over: bool) -> None:
        """Its workers are to be ended.

        Args:
            fault: why it must start again; empty where nothing went wrong.
            over: no other attempt follows.
        """
        if fault:
            self.ledger.part("detecting", float("inf"), now)
            self.total_restarts += 1
            self._count({f"restarts_{fault}": 1})
        self.ledger.enter("recovering" if fault else "other" if over else "resizing", now)

    # ---- what it writes ----

    def event(self, event: Event) -> None:
        """A lifecycle event."""
        if isinstance(event, Ready) and event.rank == 0:
            self._hub.on_device(event.device, event.peak_flops)
        if isinstance(event, Saved) and event.rank == 0:
            self._count({"checkpoint_write_seconds": event.seconds})
        fields = {k: v for k, v in dataclasses.asdict(event).items() if k not in ("file", "meta", "parts", "whole")}
        self.note(type(event).__name__, **fields)

    def note(self, name: str, **fields: Any) -> None:
        """A line of events.jsonl."""
        seconds = {k: round(v, 3) for k, v in self.ledger.seconds.items() if v}
        self._events.add({"time": round(time.time(), 3), "event": name, **fields, "ledger": seconds})

    def aside(self, report: Aside, now: float) -> None:
        """What has no bearing on the run."""
        if isinstance(report, Shown):
            self.ledger.part("eval", report.seconds, now)
        self._quietly(lambda: self._sidelines.aside(report, self._attempt))

    def beat(self, now: float, state: Mapping[str, Any], force: bool = False) -> None:
        """state.json and ledger.json, about once a second (10 s on object stores)."""
        self._hub.on_ledger(self.ledger)
        every = _BEAT_SECONDS if self._run.is_local else _REMOTE_BEAT_SECONDS
        if not force and now - self._last_beat < every:
            return
        self._last_beat = now
        self._sidelines.warn()
        alive = {"heartbeat": time.time(), "driver": f"{socket.gethostname()}:{os.getpid()}"}
        found = self.evaluations
        # One whose checkpoint was lost is the best no more.
        self._sidelines.best(found.best)
        metrics = {"metrics_url": self._hub.url, "metrics": found.metrics, "best": found.best}
        whole = {**state, **metrics, **alive}
        if force:
            self._writing.shutdown(wait=True)
            self._write(whole, self._ledger())
        elif self._written.done():
            # A slow store must not hold up who looks after the workers.
            self._written = self._writing.submit(self._write, whole, self._ledger())

    def abandon(self) -> bool:
        """The run is another process's now: nothing is written any more. Returns whether that is news."""
        before, self._abandoned = self._abandoned, True
        return not before

    def _write(self, state: Mapping[str, Any], ledger: Mapping[str, Any]) -> None:
        """A full disk or a lost store is said once and tried again later."""
        if self._abandoned:
            return
        self._quietly(lambda: write_json(self._run.store, "state.json", state))
        for write in self._sidelines.writers():
            self._quietly(write)
        for journal in (self._steps, self._events, self._replaced):
            self._quietly(journal.flush)
        self._quietly(lambda: write_json(self._run.store, "ledger.json", ledger))

    def _ledger(self) -> dict[str, Any]:
        return {
            **self.ledger.to_dict(),
            "counters": dict(self.counters),
            "restarts": self.total_restarts,
            "highest_step": self._highest,
        }

    def _quietly(self, write: Any) -> None:
        try:
            write()
        except (OSError, StoreError) as error:
            text = f"the run directory can't be written now: {error}"
            if self.problem != text:
                self.problem = text
                self._view.say(text, "warn")

    # ---- figures ----

    @property
    def rate(self) -> float:
        """Samples per second of the time spent in steps."""
        return self.samples / self.step_seconds if self.step_seconds else 0.0

    def _wait_share(self) -> float:
        seconds = self.ledger.seconds
        busy = seconds["compute"] + seconds["data_wait"]
        return seconds["data_wait"] / busy if busy else 0.0

    def summary(self, status: str, step: int, now: float) -> dict[str, Any]:
        """What `dltrain run --json` prints."""
        self._status = status
        return {
            "run": self._spec.name,
            "dir": self._run.url,
            "status": status,
            "steps": step,
            "samples": self.samples,
            "seconds": round(now - self._launched, 3),
            "samples_per_second": round(self.rate, 1),
            "first_step_seconds": None if self.first_step_seconds is None else round(self.first_step_seconds, 3),
            "restarts": self.total_restarts,
            "goodput": round(self.ledger.goodput, 4),
            "eval": self.evaluations.metrics,
            "best": self.evaluations.best,
            **({"profiles": profiles} if (profiles := self._sidelines.profiles) else {}),
        }

    def close(self) -> None:
        """Writes what is left."""
        self._writing.shutdown(wait=True)
        for journal in (self._steps, self._events, self._replaced) if not self._abandoned else ():
            with contextlib.suppress(OSError, StoreError):
                journal.close()
        if not self._abandoned:
            self._sidelines.close(self._status)


def _book_gap(seconds: dict[str, float], state: Mapping[str, Any] | None, launched: float) -> None:
    """The time from a driver's death to the next launch is recovery; after a clean end the clock stood still."""
    if state and state["state"] not in OVER:
        gap = max(0.0, launched - float(state["heartbeat"]))
        seconds["recovering"] = seconds.get("recovering", 0.0) + gap
