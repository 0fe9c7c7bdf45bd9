"""Runs checks side by side, each with a time limit, so that none can hold the others up.

    findings, left = run_checks([Check("object storage", look, seconds=30), ...], progress)

A check that does not end in time is left behind in its thread, and told as a finding.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dltrain.doctor.finding import Finding, fail
from dltrain.errors import DltrainError

__all__ = ["Check", "NoProgress", "Progress", "run_checks"]

_TURN_SECONDS = 0.1


@dataclass(frozen=True)
class Check:
    """Something to look at.

    Attributes:
        look: finds out, and says what it found.
        seconds: that it may take, from when it begins.
        heavy: it starts processes that import torch: of these only as many as there are CPUs run at once.
        todo: what to do when it does not end.
    """

    name: str
    look: Callable[[], Iterable[Finding]]
    seconds: float
    heavy: bool = False
    todo: str = "try again, and allow more with --timeout"


class Progress(Protocol):
    """Told which checks are under way."""

    def update(self, done: int, total: int, at: Sequence[str]) -> None:
        """So many are done; these are under way."""


class NoProgress:
    """Shows nothing."""

    def update(self, done: int, total: int, at: Sequence[str]) -> None:
        pass


class _Running:
    """A check in its thread."""

    def __init__(self, check: Check, gate: threading.Semaphore, done: queue.SimpleQueue[_Running]) -> None:
        self.check, self._gate, self._done = check, gate, done
        self._holds = threading.Lock()
        self.begun: float | None = None
        self.found: list[Finding] = []
        threading.Thread(target=self._run, name=f"dltrain-doctor-{check.name}", daemon=True).start()

    @property
    def overdue(self) -> bool:
        """It has taken longer than it may."""
        return self.begun is not None and time.monotonic() - self.begun > self.check.seconds

    def give_way(self) -> None:
        """Lets the next heavy one begin, once."""
        if self.check.heavy and self._holds.acquire(blocking=False):
            self._gate.release()

    def _run(self) -> None:
        if self.check.heavy:
            self._gate.acquire()
        self.begun = time.monotonic()
        try:
            found = list(self.check.look())
        except DltrainError as error:
            found = [fail(self.check.name, str(error), "a run would end with the same message", "see there")]
        except Exception as error:
            text = f"the check itself failed: {type(error).__name__}: {error}"
            found = [fail(self.check.name, text, "so it is not known how this is", "please report it, with this line")]
        self.give_way()
        self.found = found
        self._done.put(self)


def run_checks(checks: Sequence[Check], progress: Progress) -> tuple[list[Finding], bool]:
    """The findings in the order of the checks, and whether one was left behind unfinished."""
    gate, done = threading.Semaphore(max(1, os.cpu_count() or 1)), queue.SimpleQueue[_Running]()
    running = [_Running(check, gate, done) for check in checks]
    waiting = list(running)
    found: dict[str, list[Finding]] = {}
    left = False
    while waiting:
        at = [each.check.name for each in waiting if each.begun is not None]
        progress.update(len(checks) - len(waiting), len(checks), at)
        if finished := _next(done):
            found.setdefault(finished.check.name, finished.found)
        for late in [each for each in waiting if each.overdue and each.check.name not in found]:
            left = True
            late.give_way()
            found[late.check.name] = [_overdue(late.check)]
        waiting = [each for each in waiting if each.check.name not in found]
    progress.update(len(checks), len(checks), [])
    return [finding for check in checks for finding in found[check.name]], left


def _next(done: queue.SimpleQueue[_Running]) -> _Running | None:
    try:
        return done.get(timeout=_TURN_SECONDS)
    except queue.Empty:
        return None


def _overdue(check: Check) -> Finding:
    found = f"no answer within {check.seconds:g} s"
    return fail(check.name, found, "a run would wait for it as well", check.todo)
