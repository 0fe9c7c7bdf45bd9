"""What the driver keeps an eye on while an attempt runs: silent agents, hangs, machines to leave, and who holds what.

watch = Watch(heart, spec.faults)
watch.begin(group); watch.step(report); watch.silent(); watch.hung(); watch.leaving()
"""

from __future__ import annotations

from collections import deque

from dltrain.observing.reports import StepReport
from dltrain.running.events import Hung
from dltrain.running.group import Group
from dltrain.running.heartbeat import Heartbeat
from dltrain.running.messages import Pulse
from dltrain.running.recovery import buddies
from dltrain.spec import FaultsSpec

__all__ = ["Watch", "blamed", "hang_limit", "is_hang"]

# With the stacks and the new start it is 10 s until training goes on.
_LEAST_SECONDS, _TIMES_STEP = 8.0, 10.0
# A graph that is compiled anew in the midst of a run, for a batch of another shape.
_COMPILE_SECONDS = 300.0
# A process that the kernel holds still can't be slow.
_STOPPED_SECONDS = 5.0
# Outside of steps a rank gives signs of life between files, chunks and retries, at longer intervals.
_LIMITS = {"starting": 600.0, "data": 600.0, "eval": 60.0, "save": 60.0, "task": 600.0}
_STEPS_JUDGED = 200
# What a rank that waits for the others is doing.
_WAITING = ("all_reduce", "allreduce", "all_gather", "allgather", "reduce_scatter", "barrier", "broadcast")


def hang_limit(phase: str, slow_step_seconds: float, hang_seconds: float | None) -> float:
    """How long a rank may be without a sign of life."""
    if phase in ("step", "stopped"):
        least = _STOPPED_SECONDS if phase == "stopped" else _LEAST_SECONDS
        return hang_seconds or max(least, _TIMES_STEP * slow_step_seconds)
    return _LIMITS[phase]


def is_hang(pulses: list[Pulse], slow_step_seconds: float, hang_seconds: float | None) -> bool:
    """Whether nobody moves: a rank that is stuck makes all others wait.

    One that may take long (it waits for data) excuses those that wait for it, unless its process is stopped.
    """
    overdue = [p.still_seconds > hang_limit(p.phase, slow_step_seconds, hang_seconds) for p in pulses]
    stopped = any(late and p.phase == "stopped" for late, p in zip(overdue, pulses, strict=True))
    return bool(overdue) and (all(overdue) or stopped)


def blamed(stacks: list[str] | tuple[str, ...]) -> int:
    """The rank that the others wait for: one that is stopped, else one that is in no collective."""
    for rank, stack in enumerate(stacks):
        if "is stopped" in stack:
            return rank
    for rank, stack in enumerate(stacks):
        if not any(word in stack for word in _WAITING):
            return rank
    return 0


class Watch:
    """Of one run; `begin` for each attempt.

    Args:
        compiles: steps go through torch.compile, and any of them may take minutes.
    """

    def __init__(self, heart: Heartbeat, faults: FaultsSpec, *, compiles: bool = False) -> None:
        self._heart, self._faults = heart, faults
        self._hang_seconds = faults.hang_seconds or (_COMPILE_SECONDS if compiles else None)
        self._group: Group | None = None
        self._seconds: deque[float] = deque(maxlen=_STEPS_JUDGED)

    def begin(self, group: Group) -> None:
        """A new attempt."""
        self._group = group
        self._made: set[int] = set()
        self._forget_after = float("inf")
        self._silent: set[int] = set()

    def step(self, report: StepReport) -> None:
        """A step was made; once the attempt has snapshots of its own, those of earlier ones are let go."""
        if report.rank == 0:
            self._seconds.append(report.seconds)
        if report.step > self._forget_after and self._group:
            self._forget_after = float("inf")
            for slot in self._group.slots:
                slot.agent.forget.remote(self._group.attempt)
        if self._forget_after == float("inf") and self._group and len(self._made) == len(self._group.slots):
            self._made.add(-1)
            self._forget_after = report.step + 2 * max(1, report.snapshot_every) + 1

    def slots_made(self, rank: int) -> None:
        """A rank has memory for snapshots: its buddy is to hold it too."""
        assert self._group is not None
        near, far = buddies(self._group.nodes, rank)
        self._made.add(rank)
        slots = self._group.slots
        if far is not None:
            slots[rank].agent.copy_to.remote(slots[far].agent)
        if near is not None:
            # The one's answer is the other's argument: nobody waits here.
            slots[near].agent.hold.remote(slots[rank].agent.my_slots.remote())

    def silent(self) -> list[tuple[int, str]]:
        """Ranks whose agents have not answered for too long, and what is known of them; each once."""
        found = []
        for rank, slot in enumerate(self._group.slots if self._group else ()):
            seconds = self._heart.silent_seconds(slot)
            if rank not in self._silent and seconds > self._faults.silent_seconds:
                self._silent.add(rank)
                dead = self._heart.why_dead(slot)
                found.append((rank, dead or f"no answer for {seconds:.1f} s; its machine may be cut off"))
        return found

    def hung(self) -> Hung | None:
        """A hang, with the stacks of all ranks."""
        pulses = self._pulses()
        if not pulses or not is_hang(pulses, self._slow_step, self._hang_seconds):
            return None
        assert self._group is not None
        stacks = self._group.stacks()
        rank = blamed(stacks)
        return Hung(rank, round(pulses[rank].still_seconds, 1), pulses[rank].phase, stacks)

    def leaving(self) -> list[int]:
        """Ranks whose machines are to be left."""
        return [rank for rank, pulse in enumerate(self._pulses()) if pulse.leaving]

    def _pulses(self) -> list[Pulse]:
        """Of this attempt's ranks, once all have answered in it."""
        if self._group is None:
            return []
        found = [self._heart.pulse(slot) for slot in self._group.slots]
        return [p for p in found if p] if all(p and p.attempt == self._group.attempt for p in found) else []

    @property
    def _slow_step(self) -> float:
        """The 99th percentile of the newest steps."""
        ordered = sorted(self._seconds)
        return ordered[int(0.99 * (len(ordered) - 1))] if ordered else 0.0
