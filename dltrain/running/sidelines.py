"""What a run keeps and shows beside its record: logs, what callbacks logged, samples, traces, and the trackers.

    sidelines = Sidelines(spec, run, hub, view, record.note)
    sidelines.tracking.begin(step=0); sidelines.step(line); sidelines.evaluated(report); sidelines.aside(report)
    for write in sidelines.writers(): write()
    sidelines.close("finished")

Nothing of it bears on the course of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dltrain.errors import StoreError
from dltrain.observing.hub import Hub
from dltrain.observing.journal import Journal
from dltrain.observing.logs import RankLogs
from dltrain.observing.reports import Aside, EvalReport, Logged, LogLine, Profiled, Shown
from dltrain.observing.samples import write_samples
from dltrain.observing.trackers import Tracking
from dltrain.observing.view import View
from dltrain.running.rundir import RunDir
from dltrain.spec import JobSpec

__all__ = ["Sidelines"]

# Of one step that waits to be written; what is shown meanwhile takes the place of the oldest.
_WAITING_SETS = 4


class Sidelines:
    """Fed by the record; what `writers` gives may be called by another thread.

    Args:
        note: writes a line of events.jsonl.

    Raises:
        MissingExtraError: a tracker that the spec wants is not installed.
    """

    def __init__(self, spec: JobSpec, run: RunDir, hub: Hub, view: View, note: Callable[..., None]) -> None:
        self._run, self._hub, self._view, self._note = run, hub, view, note
        self.profiles: list[str] = []
        self.tracking = Tracking.of(spec, run.store)
        self._logs, self._logged = RankLogs(run.store), Journal(run.store, "logged")
        self._shown: deque[Shown] = deque(maxlen=_WAITING_SETS)
        self._best_step = -1

    def step(self, line: Mapping[str, Any]) -> None:
        """A committed step, as in steps.jsonl."""
        seconds = line["seconds"]
        self.tracking.commit(
            line["step"],
            {
                "train/loss": line["loss"],
                **{f"train/loss/{name}": loss for name, loss in line.get("losses", {}).items()},
                "train/learning_rate": line["learning_rate"],
                "train/grad_norm": line["grad_norm"],
                "speed/samples_per_second": line["samples"] / seconds if seconds else 0.0,
                "speed/step_seconds": seconds,
                "speed/data_wait_seconds": line["data_wait_seconds"],
            },
        )

    def evaluated(self, report: EvalReport) -> None:
        """Rank 0's figures."""
        self._best_step = report.step if report.is_best else self._best_step
        self.tracking.log(report.step, {f"eval/{name}": value for name, value in report.metrics.items()})

    def best(self, best: Mapping[str, Any] | None) -> None:
        """The best evaluation, of an earlier start or one whose checkpoint is there."""
        self._best_step = int(best["step"]) if best else -1

    def aside(self, report: Aside, attempt: int) -> None:
        """What a rank says of its own accord.

        Raises:
            OSError: a log could not be written.
        """
        match report:
            case LogLine():
                if report.rank == 0 and not report.error:
                    self._view.log(report.text)
                self._logs.add(report)
            case Profiled(rank, first, last, file):
                self.profiles.append(file)
                self._note("profile", **dataclasses.asdict(report))
                self._view.say(f"steps {first} to {last} of rank {rank} are profiled: {self._run.url}/{file}", "good")
            case Logged():
                self._logged.add({"step": report.step, "attempt": attempt, "values": dict(report.values)})
                self._hub.on_logged(report.values)
                self.tracking.log(report.step, report.values)
            case Shown():
                self._shown.append(report)
                for number, artifact in enumerate(report.artifacts):
                    self.tracking.artifact(report.step, f"samples/{number:02d}", artifact)

    def warn(self) -> None:
        """Says what has gone wrong with trackers."""
        for warning in self.tracking.warnings():
            self._view.say(warning, "warn")

    def writers(self) -> Iterator[Callable[[], None]]:
        """What puts it where others can see it; each may raise OSError or StoreError."""
        yield self._logs.flush
        yield self._logged.flush
        yield self._write_shown

    def close(self, status: str) -> None:
        """Writes what is left, and lets the trackers go."""
        for write in (self._write_shown, self._logs.close, self._logged.close):
            with contextlib.suppress(OSError, StoreError):
                write()
        self.tracking.close(status)
        self.warn()

    def _write_shown(self) -> None:
        while self._shown:
            found = self._shown[0]
            best = found.step if found.is_best else self._best_step
            write_samples(self._run.store, found.step, found.artifacts, found.left_out, found.metrics, best)
            # Meanwhile it may have given way to newer ones.
            with contextlib.suppress(ValueError):
                self._shown.remove(found)
