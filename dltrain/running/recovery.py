"""Where an attempt goes on from: the newest step that every rank's snapshot is held of, or the last checkpoint.

point = newest_point(holdings, ranks_of)        # holdings: (holder, Holding) of all agents that answer
point.manifest()                                # reads like a checkpoint's
point.places(node, node_of)                     # where a rank on that node reads each file

Pure. Ranks die a step apart, and those on a lost machine only have copies elsewhere, of some steps: so what counts is
the newest step that is whole over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dltrain.checkpoint.commit import FORMAT, rank_file
from dltrain.checkpoint.slots import SlotPlace
from dltrain.running.messages import Holding

__all__ = ["Point", "buddies", "newest_point"]

Holder = Any


@dataclass(frozen=True)
class Point:
    """A state in memory: of each rank, who holds its snapshot, and the snapshot."""

    attempt: int
    step: int
    ranks: tuple[tuple[Holder, Holding], ...]

    def manifest(self) -> dict[str, Any]:
        """As of a checkpoint, without what only the driver knows."""
        first = self.ranks[0][1]
        return {
            "format": FORMAT,
            "step": self.step,
            "attempt": self.attempt,
            "position": first.position,
            "optimizer_step": first.applied,
            "num_ranks": len(self.ranks),
            "whole": first.whole,
            "ties": dict(first.ties),
            "path": "memory",
            "files": [
                {"name": rank_file(rank), "bytes": h.num_bytes, "parts": h.parts}
                for rank, (_, h) in enumerate(self.ranks)
            ],
        }

    def places(
        self, node: str, node_of: Callable[[Holder], str]
    ) -> tuple[dict[str, SlotPlace], dict[str, tuple[Holder, int, int, int]]]:
        """For a rank on `node`: where it reads each file itself, and whom to ask for those of other nodes."""
        here: dict[str, SlotPlace] = {}
        there: dict[str, tuple[Holder, int, int, int]] = {}
        for rank, (holder, h) in enumerate(self.ranks):
            local = node_of(holder) == node
            here[rank_file(rank)] = SlotPlace(h.pid if local else 0, h.fd if local else -1, h.num_bytes)
            if not local:
                there[rank_file(rank)] = holder, h.attempt, h.rank, h.step
        return here, there


def newest_point(holdings: Sequence[tuple[Holder, Holding]], ranks_of: Mapping[int, int]) -> Point | None:
    """The newest whole state of the newest attempt that left one.

    Args:
        ranks_of: attempt -> how many ranks it had.
    """
    found: dict[tuple[int, int], dict[int, tuple[Holder, Holding]]] = {}
    for holder, h in holdings:
        found.setdefault((h.attempt, h.step), {}).setdefault(h.rank, (holder, h))
    for (attempt, step), by_rank in sorted(found.items(), key=lambda item: item[0], reverse=True):
        num_ranks = ranks_of.get(attempt, 0)
        if num_ranks and len(by_rank) == num_ranks:
            return Point(attempt, step, tuple(by_rank[rank] for rank in range(num_ranks)))
    return None


def buddies(nodes: Sequence[str], rank: int) -> tuple[int | None, int | None]:
    """Who else holds this rank's snapshots: a rank on the same node, and one on another; None where there is none."""
    others = [(rank + i) % len(nodes) for i in range(1, len(nodes))]
    near = next((r for r in others if nodes[r] == nodes[rank]), None)
    far = next((r for r in others if nodes[r] != nodes[rank]), None)
    return near, far
