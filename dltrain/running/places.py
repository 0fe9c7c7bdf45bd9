"""Where slots are asked for: placement groups of our own, or the bundles of one that somebody else made for this run.

    places = OwnGroups({"CPU": 1})
    place = places.take()                 # None: there are no more
    Agent.options(scheduling_strategy=place.strategy()); place.release()

A group of our own has one bundle: one of many is all or nothing, and says nothing about what is missing. Where trials
compete for a cluster that is what is wanted: Ray Tune makes the group, and starts a trial when it has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["GivenBundles", "OwnGroups", "Place", "Places"]


@dataclass(frozen=True)
class Place:
    """A bundle that is reserved, or will be."""

    group: Any
    index: int
    release: Callable[[], None]

    def strategy(self) -> Any:
        """For an actor that is to be there; it is queued until the bundle is reserved."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.index)


class Places(Protocol):
    """Gives places."""

    def take(self) -> Place | None:
        """One that nobody has; None when there are no more."""


class OwnGroups:
    """A new group for each.

    Args:
        bundle: what one slot needs.
    """

    def __init__(self, bundle: Mapping[str, float]) -> None:
        self._bundle = dict(bundle)

    def take(self) -> Place | None:
        """Asks for one; it may take its time."""
        from ray.util import remove_placement_group
        from ray.util.placement_group import placement_group

        group = placement_group([self._bundle])
        return Place(group, 0, lambda: remove_placement_group(group))


class GivenBundles:
    """The bundles of a group that holds as many slots as the run may have; it stays when they are given back.

    Args:
        group: Ray's placement group, of nothing but slots.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._free = list(range(group.bundle_count))

    def take(self) -> Place | None:
        """The first that is free."""
        if not self._free:
            return None
        index = self._free.pop(0)
        return Place(self._group, index, lambda: self._free.append(index))
