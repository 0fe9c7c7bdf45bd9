"""The life of a run as a state machine: `handle(event, now) -> actions`, no I/O, no clock of its own.

    life = Lifecycle(min_workers=2, max_workers=4, restarts_per_hour=10)
    for action in life.handle(Placed(slots=4), now): carry_out(action)

      planning -> placing -> starting -> running -> finished
                     |           \\          |  \\-> stopping -> stopped
                  waiting         \\         `--> draining | resizing -> starting ...
                                   `-> recovering -> starting ...
      any -> failed

Every event is logged, so that a run can be replayed in a test.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dltrain.errors import CapacityError, DltrainError, RunFailedError, TaskError, UserError
from dltrain.observing.reports import (
    OVER,
    Anchor,
    Done,
    EvalReport,
    Note,
    Raised,
    Ready,
    Report,
    Saved,
    SaveFailed,
    SaveWanted,
    SlotsMade,
    StepReport,
)
from dltrain.running.events import (
    Action,
    AgentLost,
    Commit,
    Committed,
    Discard,
    Drained,
    End,
    Event,
    Exited,
    Hung,
    KillWorkers,
    Place,
    Placed,
    Release,
    Say,
    StartAttempt,
    StopRequested,
    Tell,
    Tick,
)

__all__ = ["PEER_GRACE_SECONDS", "Lifecycle"]

# A rank that lost its peer reports sooner than the peer's end is seen: wait this long for the cause.
PEER_GRACE_SECONDS = 3.0
SAME_EXCEPTION_LIMIT = 3
_HOUR_SECONDS = 3600.0
_LONGEST_BACKOFF_SECONDS = 30.0
# Of a dead worker's log, when another takes its place; where none does, all that is known.
_SAID_LINES = 3


@dataclass
class _Failure:
    """What ended an attempt."""

    reason: str
    message: str
    raised: Raised | None = None
    tail: str = ""


@dataclass
class Lifecycle:
    """Decides; the driver carries out.

    Args:
        min_workers, max_workers: bounds of the group.
        restarts_per_hour: more than this end the run.
        step: optimizer steps done when this start of the run began.
    """

    min_workers: int
    max_workers: int
    restarts_per_hour: int
    step: int = 0
    state: str = "planning"
    attempt: int = 0
    num_ranks: int = 0
    slots: int = 0
    committed_step: int = -1
    restarts: int = 0
    restart_reasons: list[str] = field(default_factory=list)
    log: list[tuple[float, Event]] = field(default_factory=list)
    _restart_times: list[float] = field(default_factory=list, init=False)
    _ready: set[int] = field(default_factory=set, init=False)
    _done: dict[int, Done] = field(default_factory=dict, init=False)
    _saves: dict[int, dict[int, Report]] = field(default_factory=dict, init=False)
    _raised: dict[int, Raised] = field(default_factory=dict, init=False)
    _peer_deadline: float | None = field(default=None, init=False)
    _exceptions: dict[tuple[str, int], int] = field(default_factory=dict, init=False)
    _stop_wanted: bool = field(default=False, init=False)
    _save_problem: str = field(default="", init=False)
    _steps_made: int = field(default=0, init=False)
    _steps_at_restart: int = field(default=-1, init=False)
    _fruitless: int = field(default=0, init=False)
    _not_before: float = field(default=0.0, init=False)
    _leaving: set[int] = field(default_factory=set, init=False)
    _asked: set[int] = field(default_factory=set, init=False)

    def handle(self, event: Event, now: float) -> list[Action]:
        """The only way in: changes the state and says what to do."""
        if self.state in OVER:
            return []
        if not isinstance(event, Tick | StepReport | SlotsMade) and not self._is_old_news(event):
            # What is where in a file is of no use here, and would pile up.
            brief = replace(event, file={}, meta={}) if isinstance(event, Saved) else event
            self.log.append((now, brief))
        match event:
            case Placed():
                return self._placed(event, now)
            case Ready():
                return self._on_ready(event)
            case StepReport():
                self._on_step(event)
            case Saved() | SaveFailed():
                return self._saved(event)
            case SaveWanted():
                self._asked.add(event.step)
            case Committed():
                return self._committed(event)
            case Done():
                return self._on_done(event)
            case Raised():
                return self._on_raised(event, now)
            case Exited():
                return self._exited(event, now)
            case AgentLost():
                self.slots = max(0, self.slots - 1)
                return self._fail(_Failure("agent", f"the agent of rank {event.rank} is gone: {event.reason}"), now)
            case Hung():
                return self._fail(_Failure("hang", _describe_hang(event)), now)
            case Drained():
                return self._drained(event)
            case StopRequested():
                return self._stop()
            case Tick():
                return self._tick(now)
            case EvalReport() | Note() | SlotsMade() | Anchor():
                pass
        return []

    def _is_old_news(self, event: Event) -> bool:
        """Slots are told again and again while they are waited for."""
        return bool(self.log) and isinstance(event, Placed) and self.log[-1][1] == event

    # ---- forming a group ----

    def begin(self) -> list[Action]:
        """The plan is made: ask for slots."""
        self.state = "placing"
        return [Place(self.max_workers)]

    def _placed(self, event: Placed, now: float) -> list[Action]:
        self.slots = event.slots
        if self.state == "running" and self.num_ranks < min(self.slots, self.max_workers):
            self.state = "resizing"
            return [Say(f"room for {min(self.slots, self.max_workers)} workers: growing"), Tell("pause")]
        if self.state not in ("placing", "waiting", "recovering") or now < self._not_before:
            return []
        if self.slots >= self.max_workers or (event.final and self.slots >= self.min_workers):
            return self._start()
        if event.final and self._stop_wanted:
            return self._end("stopped")
        if event.final and self.state != "waiting":
            self.state = "waiting"
            return [Say(f"waiting for {self.min_workers} workers; the cluster has room for {self.slots}")]
        return []

    def may_start(self, now: float) -> bool:
        """Whether an attempt that ended may be followed by the next one yet."""
        return self.state == "recovering" and now >= self._not_before

    def wait_over(self, capacity: str) -> list[Action]:
        """The slots did not come in time."""
        return self._end(
            "failed",
            CapacityError(
                f"workers: {self.min_workers} are needed and there is room for {self.slots} ({capacity}). "
                "Lower workers.min, ask for less per worker (workers.cpus, workers.gpus), or add nodes"
            ),
        )

    def _start(self) -> list[Action]:
        self.attempt += 1
        self.num_ranks = min(self.slots, self.max_workers)
        self.state = "starting"
        for seen in (self._ready, self._done, self._saves, self._raised, self._asked, self._leaving):
            seen.clear()
        self._peer_deadline = None
        return [StartAttempt(self.num_ranks, self.attempt)]

    def _on_ready(self, event: Ready) -> list[Action]:
        self._ready.add(event.rank)
        if len(self._ready) == self.num_ranks:
            if self._stop_wanted or self._leaving:
                return self._ask("stop" if self._stop_wanted else "drain")
            self.state = "running"
        return []

    def _ask(self, wish: str) -> list[Action]:
        self.state = "stopping" if wish == "stop" else "draining"
        return [Tell(wish)]

    # ---- running ----

    def _on_step(self, event: StepReport) -> None:
        if event.rank == 0:
            self.step = event.step
            self._steps_made += 1

    def _saved(self, event: Saved | SaveFailed) -> list[Action]:
        if self.state in ("recovering", "placing", "waiting"):
            return []
        saves = self._saves.setdefault(event.step, {})
        saves[event.rank] = event
        if len(saves) < self.num_ranks:
            return []
        failed = [e for e in saves.values() if isinstance(e, SaveFailed)]
        del self._saves[event.step]
        if failed:
            self._save_problem = f"rank {failed[0].rank}: {failed[0].reason}"
            return [Discard(event.step, self._save_problem)]
        return [Commit(event.step)]

    def _committed(self, event: Committed) -> list[Action]:
        if event.reason:
            self._save_problem = event.reason
        else:
            self.committed_step = event.step
        self._asked.discard(event.step)
        return self._all_done()

    def _on_done(self, event: Done) -> list[Action]:
        self._done[event.rank] = event
        return self._all_done()

    def _all_done(self) -> list[Action]:
        """What follows when every rank has ended and what it saved is in the store, or lost."""
        if not self.num_ranks or len(self._done) < self.num_ranks or self._asked:
            return []
        done = self._done[0]
        self.step = done.step
        if done.why == "pause":
            return [KillWorkers(), *self._start()]
        saved = self.committed_step >= done.step
        if done.why == "drain":
            return self._leave()
        if not saved:
            return self._end("failed", self._unsaved(done.step))
        return self._end("stopped" if done.why == "stop" else "finished")

    def _leave(self) -> list[Action]:
        """The step is done and saved: go on without the machines that are to be left."""
        leaving = tuple(sorted(self._leaving))
        self.slots -= len(leaving)
        actions: list[Action] = [KillWorkers(), Release(leaving), Place(self.max_workers)]
        if self.slots >= self.min_workers:
            return [*actions, *self._start()]
        if self._stop_wanted:
            return [*actions, *self._end("stopped")]
        self.state = "waiting"
        self._done.clear()
        return [*actions, Say(f"waiting for {self.min_workers} workers; there is room for {self.slots}")]

    def _drained(self, event: Drained) -> list[Action]:
        if not 0 <= event.rank < self.num_ranks or self.state not in ("starting", "running", "draining", "resizing"):
            return []
        self._leaving.add(event.rank)
        if self.state == "running":
            return [Say(f"leaving the machine of rank {event.rank} after this step"), *self._ask("drain")]
        return []

    def _unsaved(self, step: int) -> RunFailedError:
        last = f"step {self.committed_step}" if self.committed_step >= 0 else "none"
        return RunFailedError(
            f"trained to step {step}, but its checkpoint could not be saved ({self._save_problem}). "
            f"The last good checkpoint is {last}; make room and run the same command again to go on from it"
        )

    def _stop(self) -> list[Action]:
        if self._stop_wanted:
            return []
        self._stop_wanted = True
        if self.state in ("running", "draining", "resizing"):
            return [Say("stopping after this step"), *self._ask("stop")]
        if self.state in ("planning", "placing", "waiting"):
            return self._end("stopped")
        return [Say("stopping as soon as the workers are up")]

    # ---- what goes wrong ----

    def _on_raised(self, event: Raised, now: float) -> list[Action]:
        self._raised[event.rank] = event
        if event.kind == "peer":
            self._peer_deadline = self._peer_deadline or now + PEER_GRACE_SECONDS
            return []
        return self._fail(_Failure("exception", event.message, event), now)

    def _exited(self, event: Exited, now: float) -> list[Action]:
        over = self.state in ("recovering", "placing", "waiting")
        if event.rank in self._done or event.rank in self._raised or over:
            return []
        return self._fail(_Failure("signal" if event.code < 0 else "exit", _describe(event), tail=event.tail), now)

    def _tick(self, now: float) -> list[Action]:
        if self._peer_deadline is not None and now >= self._peer_deadline:
            first = min(self._raised.values(), key=lambda r: r.rank)
            return self._fail(_Failure("exception", first.message, first), now)
        return []

    def _fail(self, failure: _Failure, now: float) -> list[Action]:
        over = failure.raised is not None and failure.raised.kind == "final"
        if self.state in ("recovering", "placing", "waiting") and not over:
            return []
        error = self._final(failure, now)
        if error:
            return [KillWorkers(), *self._end("failed", error)]
        if self._stop_wanted:
            return [KillWorkers(), Say(f"{failure.message} while stopping"), *self._end("stopped")]
        self.state = "recovering"
        self._back_off(now)
        self.restarts += 1
        self._restart_times.append(now)
        self.restart_reasons.append(failure.reason)
        self._peer_deadline = None
        text = f"step {self.step}: {failure.message}; starting again{_printed(failure.tail, _SAID_LINES)}"
        return [KillWorkers(), Say(text), Place(self.max_workers)]

    def _back_off(self, now: float) -> None:
        """A restart at once, unless the attempt before made no step either: then after a pause that grows."""
        self._fruitless = self._fruitless + 1 if self._steps_made == self._steps_at_restart else 0
        self._steps_at_restart = self._steps_made
        pause = min(_LONGEST_BACKOFF_SECONDS, 2.0 ** (self._fruitless - 1)) if self._fruitless else 0.0
        self._not_before = now + pause

    def _final(self, failure: _Failure, now: float) -> DltrainError | None:
        """The error to end with, when starting again would not help."""
        raised = failure.raised
        if raised and raised.kind == "user":
            return UserError(raised.message)
        if raised and raised.kind == "final":
            return RunFailedError(raised.message)
        if raised and raised.kind == "task":
            signature = (raised.message, raised.step)
            self._exceptions[signature] = self._exceptions.get(signature, 0) + 1
            if not self._steps_made or self._exceptions[signature] >= SAME_EXCEPTION_LIMIT:
                return _task_error(raised)
        recent = [t for t in self._restart_times if now - t < _HOUR_SECONDS]
        if len(recent) >= self.restarts_per_hour:
            return _budget_error(failure, len(recent), raised)
        return None

    def _end(self, status: str, error: DltrainError | None = None) -> list[Action]:
        self.state = status
        return [End(status, error)]


def _describe(event: Exited) -> str:
    if event.reason:
        return f"the worker of rank {event.rank} was ended: {event.reason}"
    if event.code < 0:
        try:
            name = signal.Signals(-event.code).name
        except ValueError:
            name = f"signal {-event.code}"
        # The kernel's out-of-memory killer leaves no other trace.
        hint = " (killed from outside, or out of memory)" if name == "SIGKILL" else ""
        return f"the worker of rank {event.rank} was ended by {name}{hint}"
    return f"the worker of rank {event.rank} exited with code {event.code}"


def _describe_hang(event: Hung) -> str:
    stack = f":\n{event.stacks[event.rank]}" if event.rank < len(event.stacks) else ""
    return f"rank {event.rank} has not moved for {event.seconds:.0f} s ({event.phase}){stack}"


def _task_error(raised: Raised) -> TaskError:
    return TaskError(raised.message, raised.rank, raised.step, raised.trace + _batch_line(raised.ids))


def _batch_line(ids: Sequence[int]) -> str:
    if not ids:
        return ""
    shown = ", ".join(map(str, ids[:8]))
    return f"\nrows of this rank's batch: {shown}{f', ... ({len(ids)} in all)' if len(ids) > 8 else ''}"


def _budget_error(failure: _Failure, restarts: int, raised: Raised | None) -> DltrainError:
    if raised and raised.kind == "task":
        return _task_error(raised)
    trace = f"\n{raised.trace}" if raised else ""
    return RunFailedError(
        f"{failure.message}; {restarts} restarts within an hour, faults.restarts_per_hour allows no more"
        f"{trace}{_printed(failure.tail)}"
    )


def _printed(tail: str, lines: int = 0) -> str:
    """The end of a dead worker's log, all of it or so many lines."""
    return "".join(f"\n  | {line}" for line in tail.splitlines()[-lines:])
