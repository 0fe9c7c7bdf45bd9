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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dltrain import __version__
from dltrain.data.identity import BatchSum
from dltrain.data.plan import Plan
from dltrain.errors import StoreError
from dltrain.observing.hub import Hub
from dltrain.observing.journal import Journal, read_json, write_json
from dltrain.observing.ledger import Ledger
from dltrain.observing.reports import EvalReport, Raised, SaveWanted, StepReport
from dltrain.observing.view import Progress, View
from dltrain.running.agent import LogLine
from dltrain.running.events import Event
from dltrain.running.rundir import RunDir
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
        _book_gap(seconds, read_json(run.store, "state.json"), time.time() - (time.monotonic() - launched))
        self.ledger = Ledger(launched, seconds)
        self.counters: dict[str, float] = dict(before.get("counters", {}))
        self.total_restarts = int(before.get("restarts", 0))
        hub.restore(self.counters)
        self._steps, self._events = Journal(run.store, "steps"), Journal(run.store, "events")
        self._replaced = Journal(run.store, "quarantine")
        self._launched, self._last_beat = launched, 0.0
        self._partial: dict[int, dict[int, StepReport]] = {}
        self.trail = Trail()
        self._highest = self._latest = int(before.get("highest_step", 0))
        self._logs: dict[int, Any] = {}
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="dltrain-record")
        self._written: Future[None] = Future()
        self._written.set_result(None)
        # this start
        self.samples, self.step_seconds, self.steps_made = 0, 0.0, 0
        self.first_step_seconds: float | None = None
        self.metrics: dict[str, float] = {}
        self._bests: list[dict[str, Any]] = []
        self.evaluated_step = -1
        self.committed_step = -1
        self.snapshot_every = 0
        # step -> what belongs into the manifest of its checkpoint
        self._saving: dict[int, dict[str, Any]] = {}
        self.problem = ""

    # ---- from the ranks ----

    def start_attempt(self, attempt: int, num_ranks: int, step: int, trail: Trail) -> None:
        """A new group that goes on after `step`, and from this trail; reports of the old one are not waited for."""
        self.trail = trail
        self._attempt, self._num_ranks, self.committed_step = attempt, num_ranks, step
        while self._bests and self._bests[-1]["step"] > step:
            self._bests.pop()
        # A step that any rank has made is made again by the new group.
        self._highest = max(self._highest, self._latest)
        self._partial.clear()
        self._hub.metrics.start_ranks(num_ranks)

    def step(self, report: StepReport, now: float, total_steps: int) -> None:
        """One rank's step; the line is written when every rank has reported it.

        A report may come twice: from its agent, and from who holds the rank's black box.
        """
        reports = self._partial.setdefault(report.step, {})
        if report.attempt != self._attempt or report.step <= self.committed_step or report.rank in reports:
            return
        self._hub.on_step(report)
        self._count_data(report.data)
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
        self._count(first)
        loss = sum(r.loss for r in reports)
        self._hub.on_loss(loss)
        self._steps.add(
            {
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
            }
        )
        if sums.count != first.size:
            self.problem = f"step {first.step} trained {sums.count} rows instead of {first.size}"
        self._snapshots(first)
        progress = Progress(first.step, total_steps, loss, self.rate, self._wait_share(), self._num_ranks)
        self._view.on_step(progress)

    def _snapshots(self, report: StepReport) -> None:
        if report.snapshot_every != self.snapshot_every:
            self.snapshot_every = report.snapshot_every
            self._hub.metrics.snapshot_every.set(report.snapshot_every)
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

    def _count_data(self, counted: Mapping[str, float]) -> None:
        self._hub.on_data(counted)
        for name, number in counted.items():
            self.counters[f"data_{name}"] = self.counters.get(f"data_{name}", 0) + number

    def for_commit(self, step: int) -> tuple[dict[str, Any], Callable[[], None]]:
        """A checkpoint's manifest, and what is to be written before it."""
        return self.manifest(step), self.write_journals

    def write_journals(self) -> None:
        """Puts every line so far where a death of this process leaves it.

        Raises:
            OSError, StoreError: it could not be written; the lines are kept for the next time.
        """
        for journal in (self._steps, self._events, self._replaced):
            journal.flush()

    def refused(self, report: StepReport) -> Raised | None:
        """The end of a run that trains more rows in the place of others than it may."""
        allowed, found = self._spec.data.bad_rows, self.num_replaced
        if not report.replaced or found <= allowed:
            return None
        text = f"{found} rows can't be read, data.bad_rows allows {allowed}; the last: {report.replaced[-1][3]}"
        return Raised(report.rank, report.step, "final", f"{text}. They are listed in quarantine.jsonl", "")

    def _count(self, report: StepReport) -> None:
        added = {
            "steps": 1,
            "samples": report.size,
            "nonfinite": int(not report.finite),
            "skipped": int(not report.applied),
        }
        for name, value in added.items():
            self.counters[name] = self.counters.get(name, 0) + value

    def evaluated(self, report: EvalReport, now: float) -> None:
        """An evaluation; every rank has the same figures, rank 0's are taken."""
        self._count_data(report.data)
        if report.rank == 0:
            self.metrics, self.evaluated_step = dict(report.metrics), report.step
            self.ledger.part("eval", report.seconds, now)
            self._hub.on_eval(report)
            if report.is_best:
                metric = self._spec.train.best.metric
                self._bests.append({"metric": metric, "value": report.metrics[metric], "step": report.step})
            self._view.on_eval(report.step, report.metrics, report.is_best)

    @property
    def best(self) -> dict[str, Any] | None:
        """The best evaluation so far."""
        return self._bests[-1] if self._bests else None

    @best.setter
    def best(self, value: dict[str, Any] | None) -> None:
        self._bests = [value] if value else []

    def saving(self, report: SaveWanted, now: float) -> None:
        """A checkpoint has been copied; what is known of the run at this step goes into its manifest."""
        if report.rank == 0:
            self.ledger.part("checkpoint_stall", report.seconds, now)
            self._hub.metrics.checkpoint_seconds.inc(report.seconds)
            self._saving[report.step] = {"metrics": self.metrics, "best": self.best, "ledger": self.ledger.to_dict()}

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
        self.counters["checkpoint_failures"] = self.counters.get("checkpoint_failures", 0) + 1
        self._hub.metrics.checkpoint_failures.inc()
        self.note("checkpoint_failed", step=step, reason=reason)
        self._view.say(f"step {step}: the checkpoint could not be saved ({reason}); training goes on", "warn")

    def committed(self, step: int, num_bytes: int) -> None:
        """A checkpoint exists."""
        self._hub.on_commit(num_bytes)
        self.note("checkpoint", step=step, bytes=num_bytes)

    def restarted(self, reason: str) -> None:
        """The attempt ended and another follows."""
        self.total_restarts += 1
        self._hub.metrics.restarts.labels(reason).inc()

    # ---- what it writes ----

    def event(self, event: Event) -> None:
        """A lifecycle event."""
        fields = {k: v for k, v in dataclasses.asdict(event).items() if k not in ("file", "meta", "parts", "whole")}
        self.note(type(event).__name__, **fields)

    def note(self, name: str, **fields: Any) -> None:
        """A line of events.jsonl."""
        seconds = {k: round(v, 3) for k, v in self.ledger.seconds.items() if v}
        self._events.add({"time": round(time.time(), 3), "event": name, **fields, "ledger": seconds})

    def log(self, line: LogLine) -> None:
        """What a worker printed: rank 0's goes to the terminal, all of it to logs/."""
        if line.rank == 0 and not line.error:
            self._view.log(line.text)
        if self._run.is_local:
            self._quietly(lambda: self._keep(line))

    def _keep(self, line: LogLine) -> None:
        if line.rank not in self._logs:
            path = self._run.store.path("logs")
            os.makedirs(path, exist_ok=True)
            self._logs[line.rank] = open(f"{path}/rank-{line.rank:05d}.log", "a")  # noqa: SIM115 - closed in close()
        self._logs[line.rank].write(line.text + "\n")

    def beat(self, now: float, state: Mapping[str, Any], force: bool = False) -> None:
        """state.json and ledger.json, about once a second (10 s on object stores)."""
        self._hub.on_ledger(self.ledger)
        every = _BEAT_SECONDS if self._run.is_local else _REMOTE_BEAT_SECONDS
        if not force and now - self._last_beat < every:
            return
        self._last_beat = now
        alive = {"heartbeat": time.time(), "driver": f"{socket.gethostname()}:{os.getpid()}"}
        metrics = {"metrics_url": self._hub.url, "metrics": self.metrics, "best": self.best}
        whole = {**state, **metrics, **alive}
        if force:
            self._writing.shutdown(wait=True)
            self._write(whole, self._ledger())
        elif self._written.done():
            # A slow store must not hold up who looks after the workers.
            self._written = self._writing.submit(self._write, whole, self._ledger())

    def _write(self, state: Mapping[str, Any], ledger: Mapping[str, Any]) -> None:
        """A full disk or a lost store is said once and tried again later."""
        self._quietly(lambda: write_json(self._run.store, "state.json", state))
        for handle in list(self._logs.values()):
            self._quietly(handle.flush)
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
            "eval": self.metrics,
            "best": self.best,
        }

    def close(self) -> None:
        """Writes what is left."""
        self._writing.shutdown(wait=True)
        for journal in (self._steps, self._events, self._replaced):
            with contextlib.suppress(OSError, StoreError):
                journal.close()
        for handle in self._logs.values():
            with contextlib.suppress(OSError):
                handle.close()


def _book_gap(seconds: dict[str, float], state: Mapping[str, Any] | None, launched: float) -> None:
    """The time from a driver's death to the next launch is recovery; after a clean end the clock stood still."""
    if state and state["state"] not in ("finished", "stopped", "failed"):
        gap = max(0.0, launched - float(state["heartbeat"]))
        seconds["recovering"] = seconds.get("recovering", 0.0) + gap
