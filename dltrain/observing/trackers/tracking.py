"""The trackers of one run, fed by its driver; none of them can slow the training or end it.

    tracking = Tracking.of(spec, run.store)
    tracking.begin(step=0)
    tracking.commit(10, {"train/loss": 0.5})
    tracking.log(10, {"eval/loss": 0.4}); tracking.artifact(10, "sample 0", artifact)
    for warning in tracking.warnings(): print(warning)
    tracking.close("finished")

Each tracker has a thread and a bounded queue. One that raises is said once and left out from then on; of one that can't
keep up lines are left out, and said. Only steps that all ranks have made are told, in their order; a step that is
trained twice is told once.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dltrain.artifact import Artifact
from dltrain.errors import StoreError
from dltrain.observing.journal import read_json
from dltrain.observing.trackers.base import TrackedRun, Tracker, need
from dltrain.spec import JobSpec, TrackersSpec
from dltrain.store import Store

__all__ = ["Tracking", "make_trackers"]

_WAITING = 20_000
# How long a run's end waits for a tracker.
_CLOSE_SECONDS = 30.0
_FLUSH_SECONDS = 1.0
_NOTE_SECONDS = 5.0
_NOTE = "trackers.json"

Say = Callable[[str], None]


def make_trackers(spec: TrackersSpec) -> list[Tracker]:
    """Those that a spec wants.

    Raises:
        MissingExtraError: the package of one is not installed.
    """
    made: list[Tracker] = []
    if spec.tensorboard:
        need("tensorboard", "tensorboard")
        from dltrain.observing.trackers.tensorboard import Tensorboard

        made.append(Tensorboard(spec.tensorboard))
    if spec.mlflow:
        need("mlflow", "mlflow")
        from dltrain.observing.trackers.mlflow import Mlflow

        made.append(Mlflow(spec.mlflow))
    if spec.wandb:
        need("wandb", "wandb")
        from dltrain.observing.trackers.wandb import Wandb

        made.append(Wandb(spec.wandb))
    return made


class Tracking:
    """All of a run's; without any every verb does nothing.

    Args:
        store: the run's directory, where a note says which steps have been told.
    """

    def __init__(self, trackers: Sequence[Tracker], spec: JobSpec, store: Store) -> None:
        self._trackers, self._spec, self._store = trackers, spec, store
        self._feeds: list[_Feed] = []
        self._warnings: deque[str] = deque(maxlen=100)
        # name of a figure -> the last step it was told of
        self._told: dict[str, int] = {}
        self._highest = self._committed = -1
        # What was said of steps that not all ranks have made yet.
        self._pending: list[tuple[Any, ...]] = []
        self._noted, self._note_at = -1, 0.0
        self._noting: threading.Thread | None = None

    @classmethod
    def of(cls, spec: JobSpec, store: Store) -> Tracking:
        """Raises MissingExtraError where a wanted tracker is not installed."""
        return cls(make_trackers(spec.trackers), spec, store)

    def begin(self, step: int) -> None:
        """The run goes on after `step`; wakes the trackers, where they are not awake."""
        self._committed = step
        self._pending.clear()
        if self._trackers and not self._feeds:
            note = _read_note(self._store)
            self._id = note["id"]
            spec = self._spec
            run = TrackedRun(spec.name, self._id, step, int(note["step"]), spec.to_dict(), self._store)
            self._feeds = [_Feed(tracker, run, self._warnings.append) for tracker in self._trackers]
            self._note(force=True)

    def commit(self, step: int, values: Mapping[str, float]) -> None:
        """All ranks have made this step; its figures."""
        self._committed = step
        self._tell(("log", step, values))
        # One rank may be ahead of the others.
        ready = [item for item in self._pending if item[1] <= step]
        self._pending = [item for item in self._pending if item[1] > step]
        for item in ready:
            self._tell(item)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Other figures of a step, which is told when it has been made by all ranks."""
        self._later(("log", step, values))

    def artifact(self, step: int, name: str, artifact: Artifact) -> None:
        """Something that was shown at a step."""
        self._later(("artifact", step, name, artifact))

    def _later(self, item: tuple[Any, ...]) -> None:
        if item[1] <= self._committed:
            self._tell(item)
        elif self._feeds:
            self._pending.append(item)

    def _tell(self, item: tuple[Any, ...]) -> None:
        """What is new of it: a step that is made again is not told again."""
        match item:
            case ("log", step, values):
                new = {name: value for name, value in values.items() if self._is_new(step, name)}
                if new:
                    self._put(("log", step, new))
            case ("artifact", step, name, _):
                if self._is_new(step, name):
                    self._put(item)

    def _is_new(self, step: int, name: str) -> bool:
        if not self._feeds or step < self._highest or step <= self._told.get(name, -1):
            return False
        self._told[name] = self._highest = step
        return True

    def warnings(self) -> Iterator[str]:
        """What has gone wrong since this was asked."""
        while self._warnings:
            yield self._warnings.popleft()

    def close(self, status: str) -> None:
        """Tells them how it ended, and waits a while for them to take it in."""
        for feed in self._feeds:
            feed.put(("close", status))
        deadline = time.monotonic() + _CLOSE_SECONDS
        for feed in self._feeds:
            feed.join(max(0.0, deadline - time.monotonic()))
        if self._feeds:
            self._note(force=True)

    # ---- inside ----

    def _put(self, item: tuple[Any, ...]) -> None:
        for feed in self._feeds:
            feed.put(item)
        self._note()

    def _note(self, force: bool = False) -> None:
        """Which steps all of them have, for the next start of the run."""
        step = min((feed.step for feed in self._feeds if not feed.failed), default=-1)
        now = time.monotonic()
        if not force and (step == self._noted or now - self._note_at < _NOTE_SECONDS):
            return
        if self._noting and self._noting.is_alive():
            if not force:
                return
            self._noting.join(_CLOSE_SECONDS)
        self._noted, self._note_at = step, now
        # Apart: a slow store must not hold up the driver.
        self._noting = threading.Thread(target=self._write_note, args=(step,), daemon=True)
        self._noting.start()
        if force:
            self._noting.join(_CLOSE_SECONDS)

    def _write_note(self, step: int) -> None:
        data = (json.dumps({"id": self._id, "step": step}) + "\n").encode()
        try:
            self._store.write(_NOTE, data)
        except (OSError, StoreError) as error:
            self._warnings.append(f"trackers: {_NOTE} can't be written: {error}")


def _read_note(store: Store) -> dict[str, Any]:
    try:
        found = read_json(store, _NOTE)
    except (OSError, StoreError):
        found = None
    return found if found and "id" in found else {"id": uuid.uuid4().hex[:12], "step": -1}


class _Feed:
    """One tracker's thread and queue."""

    def __init__(self, tracker: Tracker, run: TrackedRun, warn: Say) -> None:
        self._tracker, self._run, self._warn = tracker, run, warn
        self._queue: queue.Queue[tuple[Any, ...]] = queue.Queue(_WAITING)
        self._left_out = 0
        self.step, self.failed = run.told, False
        self._thread = threading.Thread(target=self._work, name=f"dltrain-{tracker.name}", daemon=True)
        self._thread.start()

    def put(self, item: tuple[Any, ...]) -> None:
        """Never waits."""
        if self.failed:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            if item[0] == "close":
                # It matters more than the oldest line.
                self._queue.get_nowait()
                self._queue.put_nowait(item)
            if not self._left_out:
                self._warn(
                    f"{self._tracker.name} can't keep up; figures are left out there, not in the run's directory"
                )
            self._left_out += 1

    def join(self, seconds: float) -> None:
        """Waits for its end, so long at most."""
        self._thread.join(seconds)
        if self._thread.is_alive() and not self.failed:
            self._warn(
                f"{self._tracker.name} has not answered for a while and was left alone; its last figures are missing"
            )

    def _work(self) -> None:
        try:
            last = max(self._tracker.start(self._run), -1)
            while self._do(last):
                pass
        except BaseException as error:  # whatever it is, it is not the run's
            self.failed = True
            text = (str(error).splitlines() or [""])[0][:300]
            self._warn(f"{self._tracker.name}: {type(error).__name__}: {text}; the run goes on without it")

    def _do(self, last: int) -> bool:
        """The next item; False after the last one."""
        try:
            item = self._queue.get(timeout=_FLUSH_SECONDS)
        except queue.Empty:
            self._tracker.flush()
            return True
        match item:
            case ("log", step, values):
                # What it has from an earlier start is not told again.
                if step > last:
                    self._tracker.log(step, values)
                    self.step = max(self.step, step)
            case ("artifact", step, name, artifact):
                if step > last:
                    self._tracker.artifact(step, name, artifact)
            case ("close", status):
                self._tracker.flush()
                self._tracker.close(status)
                return False
        return True
