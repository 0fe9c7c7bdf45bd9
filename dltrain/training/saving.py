"""When a rank's state is copied, and what is told of it: snapshots in memory, and those that become checkpoints.

saving = Saving(networks, job, ahead, alive)
yield from saving.remember(step, position, exact=True)      # a snapshot in memory, when one is due
yield from saving.save(step, position, must=True)           # one that the agent writes to the store
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from dltrain.checkpoint.snapshot import Snapshots
from dltrain.observing.reports import Anchor, Report, SaveFailed, SaveWanted, SlotsMade
from dltrain.training.ahead import Ahead
from dltrain.training.networks import Networks
from dltrain.training.plan import RankJob

__all__ = ["Saving"]

_SLOT_SECONDS = 0.01


class Saving:
    """One rank's; all ranks call it at the same steps.

    Args:
        ahead: knows how often a snapshot is taken and copied elsewhere.
        alive: told "save", again and again.
    """

    def __init__(self, networks: Networks, job: RankJob, ahead: Ahead, alive: Callable[[str], None]) -> None:
        self._networks, self._job, self._ahead, self._alive = networks, job, ahead, alive
        self._snapshots = Snapshots(networks.parts, job.rank, job.num_ranks, job.attempt)
        self._generation = 0
        self._saved_step = job.step if job.resume and not job.memory else -1

    def remember(self, step: int, position: int, *, averaged: bool, always: bool = False) -> Iterator[Report]:
        """A snapshot in memory, when one is due.

        Args:
            averaged: what follows this step averages buffers: a snapshot is of what it leaves, whenever it was taken.
            always: it is due.
        """
        anchor = self._job.anchors and step > 0 and step % self._ahead.anchor_every == 0
        due = self._job.remembers and step > 0 and step % self._ahead.snapshot_every == 0
        if not (always or anchor or due):
            return
        if averaged:
            self._networks.average_buffers()
        begin = time.perf_counter()
        slot = self._snapshots.take(step, position, self._networks.updates)
        self._ahead.snapshot_took(time.perf_counter() - begin)
        yield from self._announce()
        if anchor and slot is not None:
            self._snapshots.pin(slot)
            yield Anchor(self._job.rank, step, slot)

    def save(self, step: int, position: int, must: bool = False) -> Iterator[Report]:
        """A snapshot that the agent writes to the store while training goes on.

        One that comes before the last is written is left out, unless it `must` be made.
        """
        if self._saved_step == step:
            return
        self._saved_step = step
        rank, begin = self._job.rank, time.perf_counter()
        self._alive("save")
        self._networks.average_buffers()
        slot = self._snapshots.take(step, position, self._networks.updates)
        while slot is None and must:
            self._alive("save")
            time.sleep(_SLOT_SECONDS)
            slot = self._snapshots.take(step, position, self._networks.updates)
        yield from self._announce()
        seconds = time.perf_counter() - begin
        if slot is None:
            yield SaveFailed(rank, step, "all memory for snapshots is in use", seconds)
            return
        self._snapshots.pin(slot)
        yield SaveWanted(rank, step, position, slot, self._networks.updates[0], seconds, must)

    def unpin(self, slot: int) -> None:
        """The agent has written a slot to the store."""
        self._snapshots.unpin(slot)

    def _announce(self) -> Iterator[Report]:
        """Tells where snapshots are, at first and when the slots were made anew."""
        if self._generation == self._snapshots.generation:
            return
        self._generation, layout = self._snapshots.generation, self._snapshots.layout
        self._ahead.snapshot_bytes = layout.num_bytes
        fds = tuple(self._snapshots.fds)
        yield SlotsMade(self._job.rank, fds, layout.num_bytes, layout.parts, layout.whole, layout.ties)
