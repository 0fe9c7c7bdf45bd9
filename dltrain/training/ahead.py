"""The batches just ahead, and what all ranks must know of them before they are trained.

ahead = Ahead(stream, num_ranks, device)
following = ahead.take(steps_left, wish)   # None on every rank: end here, ahead.agreed says why
following.batch, following.global_count

The exact mean over a global batch needs its count, and a stop must happen at the same step everywhere. A
collective in each step would cost a short step a twentieth of its time, so ranks exchange both for as many steps as
fit into a quarter of a second, and hold so many batches.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dltrain.data.stream import StepBatch, TrainStream

__all__ = ["WISHES", "Ahead", "Following", "anchor_steps", "num_ahead", "snapshot_steps"]

# Reasons to end before the last step; the first that any rank has is what all do.
WISHES = ("stop", "drain", "pause")

MOST = 16
_SECONDS = 0.25
_BYTES = 64 * 1024 * 1024
# Making batches in the training thread: how large a share of the time is worth a thread.
_JUDGED, _SHARE = 5, 0.05
# What snapshots in memory may cost of the time.
_SNAPSHOT_SHARE, _SNAPSHOTS_JUDGED = 0.02, 5
# Copies to other machines: this often, and at this rate at most.
_ANCHOR_SECONDS, _ANCHOR_RATE = 1.0, 50e6
# Against the time a copy takes: a rank that is not done with one leaves the next one out, and then the ranks' copies
# may have no step in common.
_ANCHOR_SLACK = 1.5
# The sum of so high a power is nearly that of the largest alone.
_POWER = 4


@dataclass(frozen=True)
class Following:
    """One rank's part of the next step, and units (rows or tokens) of the whole step."""

    batch: StepBatch
    global_count: float


def num_ahead(step_seconds: float, batch_bytes: float) -> int:
    """Steps to exchange at once, from what one took and what its batch weighs on a rank."""
    if step_seconds <= 0:
        return 1
    return max(1, min(MOST, int(_SECONDS / step_seconds), int(_BYTES / max(batch_bytes, 1.0))))


def snapshot_steps(snapshot_seconds: float, step_seconds: float) -> int:
    """Steps between snapshots in memory, so that they take at most a fiftieth of the time."""
    if snapshot_seconds <= 0 or step_seconds <= 0:
        return 1
    return max(1, math.ceil(snapshot_seconds / (_SNAPSHOT_SHARE * step_seconds)))


def anchor_steps(num_bytes: float, step_seconds: float, copy_seconds: float = 0.0) -> int:
    """Steps between copies of a snapshot to another machine, which take the slowest rank so long."""
    seconds = max(_ANCHOR_SECONDS, num_bytes / _ANCHOR_RATE, _ANCHOR_SLACK * copy_seconds)
    return max(1, math.ceil(seconds / step_seconds)) if step_seconds > 0 else 1


class Ahead:
    """Takes batches from a stream a few at a time, and agrees on them with the other ranks.

    Every rank calls `take` for every step. What making a batch raises is raised by the `take` of its step.

    Attributes:
        agreed: why `take` gave None.
        snapshot_every, anchor_every: steps between snapshots, and copies of them elsewhere; the same on every rank.
        snapshot_bytes: of this rank's snapshots.
        others_seconds: of the last `take`, those spent on agreeing, which is mostly waiting for other ranks.
    """

    def __init__(self, stream: TrainStream, num_ranks: int, device: torch.device) -> None:
        self._stream, self._num_ranks, self._device = stream, num_ranks, device
        self._held: deque[tuple[StepBatch | Exception, float]] = deque()
        self._size = 1
        # since the last exchange
        self._steps, self._seconds = 0, 0.0
        self._shares: deque[float] = deque(maxlen=_JUDGED)
        self._snapshots: deque[float] = deque(maxlen=_SNAPSHOTS_JUDGED)
        self.agreed = ""
        self.snapshot_every = self.anchor_every = 1
        self.snapshot_bytes = 0
        self._anchor_seconds = self.others_seconds = 0.0

    def take(self, steps_left: int, wish: str) -> Following | None:
        """The next step, or None when any rank has a wish.

        Args:
            steps_left: including this one; the same on every rank.
            wish: one of `WISHES`, or an empty text; noticed at an exchange.
        """
        self.others_seconds = 0.0
        if self.look(steps_left, wish):
            return None
        batch, count = self._held.popleft()
        if isinstance(batch, Exception):
            self._held.appendleft((batch, count))
            raise batch
        return Following(batch, count)

    def look(self, steps_left: int, wish: str) -> str:
        """Why `take` would give None now, if it would; the arguments are those of `take`."""
        if not self._held and not self.agreed:
            self._fill(min(self._size, steps_left), wish)
        return self.agreed

    def trained(self, seconds: float) -> None:
        """How long the step took, what it waited for included."""
        self._steps += 1
        self._seconds += seconds

    def anchor_took(self, seconds: float) -> None:
        """How long this rank's newest copy to another machine took."""
        self._anchor_seconds = seconds

    def snapshot_took(self, seconds: float) -> None:
        """How long a snapshot in memory held this rank up."""
        self._snapshots.append(seconds)

    # ---- the exchange ----

    def _fill(self, steps: int, wish: str) -> None:
        begin = time.perf_counter()
        batches = list(self._make(steps))
        self._judge(time.perf_counter() - begin)
        counts = [_count(b) for b in batches] + [0.0] * (MOST - steps)
        weight = sum(_bytes(b) for b in batches) / steps
        mean_seconds = self._seconds / self._steps if self._steps else 0.0
        # Whole microseconds and bytes add up exactly: all ranks draw the same conclusion.
        snapshot = statistics.median(self._snapshots) if self._snapshots else 0.0
        wishes = [float(wish == name) for name in WISHES]
        anchor = round(10 * self._anchor_seconds) ** _POWER
        numbers = [float(round(n)) for n in (mean_seconds * 1e6, weight, snapshot * 1e6, self.snapshot_bytes, anchor)]
        begin = time.perf_counter()
        sums = self._add_up([*wishes, *numbers, *counts])
        self.others_seconds = time.perf_counter() - begin
        found, totals = [value / self._num_ranks for value in sums[:8]], sums[8:]
        self.agreed = next((name for name, flag in zip(WISHES, found, strict=False) if flag), "")
        step_seconds, batch_bytes, snapshot = found[3] / 1e6, found[4], found[5] / 1e6
        self._size = num_ahead(step_seconds, batch_bytes)
        self.snapshot_every = snapshot_steps(snapshot, step_seconds)
        self.anchor_every = anchor_steps(found[6], step_seconds, (sums[7] ** (1 / _POWER)) / 10)
        self._steps, self._seconds = 0, 0.0
        self._held.extend(zip(batches, totals, strict=False))

    def _make(self, steps: int) -> Iterator[StepBatch | Exception]:
        for _ in range(steps):
            try:
                yield next(self._stream)
            except Exception as error:
                yield error

    def _add_up(self, values: list[float]) -> list[float]:
        if self._num_ranks == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64).to(self._device)
        dist.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found

    def _judge(self, seconds: float) -> None:
        """Has the stream use a thread when making batches takes a share of the time that is worth hiding.

        A thread with little to do costs more than its work: it and the training thread pass the interpreter's
        lock to and fro, at 2 ms a step on a machine with no core to spare. What is slow to read is read by
        threads in any case.
        """
        if self._seconds:
            self._shares.append(seconds / self._seconds)
        if len(self._shares) >= 3 and statistics.median(self._shares) > _SHARE:
            self._stream.prefetch()


def _count(batch: StepBatch | Exception) -> float:
    return 0.0 if isinstance(batch, Exception) else float(sum(micro.count for micro in batch.micros))


def _bytes(batch: StepBatch | Exception) -> float:
    if isinstance(batch, Exception):
        return 0.0
    tensors = (v for micro in batch.micros for v in micro.tensors.values() if isinstance(v, torch.Tensor))
    return float(sum(t.numel() * t.element_size() for t in tensors))
