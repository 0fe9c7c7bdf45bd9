"""What happened to a run, from its events: attempts, faults and what they cost, checkpoints, evaluations.

    story = Story()
    for event in read_journal(store, "events"): story.add(event)
    for line in read_journal(store, "steps"): story.saw_step(line["attempt"], line["step"], line["time"])
    story.faults

Pure: lines of events.jsonl in, plain values out.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dltrain.observing.words import CAUSES

__all__ = ["Attempt", "Eval", "Fault", "Mark", "Story"]

_MOST_CHARACTERS = 6000
_DRIVER = "the driver was lost"


@dataclass
class Attempt:
    """One formation of the group: from its start to its end, in Unix seconds; `step` is what it went on from."""

    number: int
    start: float
    num_ranks: int
    step: int
    from_memory: bool
    end: float = 0.0
    first_time: float | None = None
    last_step: int = 0


@dataclass
class Fault:
    """What ended an attempt.

    Attributes:
        cause: a key of CAUSES, "peer" (another rank went away, nobody saw why) or "driver".
        text: a line; detail: stack, trace or the end of the worker's log.
        recovery_seconds: until the next step was made; None where none was.
        redone: steps made again because of it.
    """

    time: float
    attempt: int
    step: int
    cause: str
    text: str
    detail: str = ""
    recovery_seconds: float | None = None
    redone: int = 0

    @property
    def what(self) -> str:
        """The cause in words."""
        return _DRIVER if self.cause == "driver" else CAUSES.get(self.cause, CAUSES["exception"])


@dataclass(frozen=True)
class Mark:
    """Something else of note: what (checkpoint, lost checkpoint, drain, resize, stop, end), when, at which step."""

    what: str
    time: float
    step: int
    text: str


@dataclass(frozen=True)
class Eval:
    """An evaluation."""

    step: int
    time: float
    metrics: Mapping[str, float]
    is_best: bool


@dataclass
class Story:
    """Takes events in the order of the journal."""

    attempts: list[Attempt] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    evals: list[Eval] = field(default_factory=list)
    profiles: list[Mapping[str, Any]] = field(default_factory=list)
    launches: list[float] = field(default_factory=list)
    ready: Mapping[str, Any] = field(default_factory=dict)
    _by_number: dict[int, Attempt] = field(default_factory=dict, init=False)
    _pending: Fault | None = field(default=None, init=False)
    _launch: float | None = field(default=None, init=False)
    _quiet: set[int] = field(default_factory=set, init=False)
    _ended: bool = field(default=True, init=False)
    _step: int = field(default=0, init=False)

    def add(self, event: Mapping[str, Any]) -> None:
        """One line of events.jsonl."""
        self._step = max(self._step, int(event.get("step") or 0))
        match event["event"]:
            case "launch":
                self._launched(event)
            case "start":
                self._started(event)
            case "Ready" if event["rank"] == 0:
                self.ready = event
            case "EvalReport" if event["rank"] == 0:
                self._evaluated(event)
            case "Done":
                self._quiet.add(event["rank"])
            case "Exited" | "Raised" | "AgentLost" | "Hung":
                self._went_wrong(event)
            case "checkpoint":
                self._mark(event, "checkpoint", f"checkpoint of step {event['step']:,}")
            case "checkpoint_failed":
                self._mark(event, "lost checkpoint", str(event["reason"]))
            case "Drained":
                self._mark(event, "drain", f"the machine of rank {event['rank']} is to be left")
            case "StopRequested":
                self._mark(event, "stop", "a stop was asked for")
            case "profile":
                self.profiles.append(event)
            case "end":
                self._over(event)

    def saw_step(self, attempt: int, step: int, time: float) -> None:
        """A step that was made; to be told when all events have been added, in the journal's order."""
        found = self._by_number.get(attempt)
        if found is None:
            return
        if found.first_time is None:
            found.first_time = time
        found.last_step, found.end = step, max(found.end, time)

    def settle(self) -> None:
        """When all is told: what each fault has cost."""
        highest = 0
        for fault in (f for f in self.faults if f.cause == "driver" and f.attempt in self._by_number):
            # Nobody was there to write down when; its last sign is what is known.
            fault.time = self._by_number[fault.attempt].end
        for before, after in zip(self.attempts, self.attempts[1:], strict=False):
            highest = max(highest, before.last_step)
            for fault in (f for f in self.faults if f.attempt == before.number):
                fault.step = max(fault.step, before.last_step)
                fault.redone = max(0, min(highest, after.last_step) - after.step)
                if after.first_time is not None:
                    fault.recovery_seconds = max(0.0, after.first_time - fault.time)

    # ---- inside ----

    def _launched(self, event: Mapping[str, Any]) -> None:
        self._launch = event["time"]
        if not self._ended and self.attempts:
            last = self.attempts[-1]
            self.faults.append(Fault(event["time"], last.number, self._step, "driver", _DRIVER))
            self._pending = None
        self._ended = True

    def _started(self, event: Mapping[str, Any]) -> None:
        before = self.attempts[-1] if self.attempts else None
        if self._launch is not None:
            # One that found nothing to do, or was ended before this, was no part of the run.
            self.launches.append(self._launch)
            self._launch = None
        if self._pending:
            self.faults.append(self._pending)
        elif before and before.num_ranks != event["num_ranks"]:
            text = f"{before.num_ranks} -> {event['num_ranks']} workers"
            self._mark(event, "resize", text)
        if before:
            before.end = max(before.end, self._pending.time if self._pending else 0.0)
        self._pending, self._ended = None, False
        self._quiet.clear()
        number, now, memory = event["attempt"], event["time"], bool(event.get("from_memory"))
        attempt = Attempt(number, now, event["num_ranks"], event["step"], memory, now)
        self._by_number[number] = attempt
        self.attempts.append(attempt)

    def _evaluated(self, event: Mapping[str, Any]) -> None:
        while self.evals and self.evals[-1].step >= event["step"]:
            self.evals.pop()
        self.evals.append(Eval(event["step"], event["time"], event["metrics"], bool(event["is_best"])))

    def _went_wrong(self, event: Mapping[str, Any]) -> None:
        rank, kind = event["rank"], event["event"]
        if kind == "Exited" and rank in self._quiet:
            return
        peer = kind == "Raised" and event["kind"] == "peer"
        # A rank that raised ends as well; one whose peer went away is not the cause, if another is known.
        self._quiet.add(rank)
        if self._pending is None or (self._pending.cause == "peer" and not peer):
            number = self.attempts[-1].number if self.attempts else 0
            cause, text, detail = _told(event)
            cause = "peer" if peer else cause
            self._pending = Fault(event["time"], number, self._step, cause, text, detail[-_MOST_CHARACTERS:])

    def _over(self, event: Mapping[str, Any]) -> None:
        if self._pending and event["status"] != "finished":
            self.faults.append(self._pending)
        if self.attempts:
            self.attempts[-1].end = event["time"]
        self._pending, self._ended = None, True
        self._mark(event, "end", str(event["status"]))

    def _mark(self, event: Mapping[str, Any], what: str, text: str) -> None:
        self.marks.append(Mark(what, event["time"], int(event.get("step") or self._step), text))


def _told(event: Mapping[str, Any]) -> tuple[str, str, str]:
    """Cause, a line of text, and what there is to read beyond it."""
    who = f"rank {event['rank']}"
    match event["event"]:
        case "Exited" if event["code"] < 0:
            return "signal", f"{who} was ended by {_signal_name(-event['code'])}", event.get("tail", "")
        case "Exited":
            return "exit", f"{who} exited with code {event['code']}", event.get("tail", "")
        case "Raised":
            first = (str(event["message"]).splitlines() or [""])[0]
            return "exception", f"{who}: {first}", event.get("trace", "")
        case "AgentLost":
            return "agent", f"the agent of {who} is gone: {event['reason']}", ""
        case _:
            stacks = event.get("stacks") or ()
            stack = stacks[event["rank"]] if event["rank"] < len(stacks) else ""
            return "hang", f"{who} had not moved for {event['seconds']:.0f} s ({event['phase']})", stack


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
