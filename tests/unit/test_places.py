"""Bundles of a placement group that somebody else made: given one at a time, and given back."""

from __future__ import annotations

from types import SimpleNamespace

from dltrain.running.places import GivenBundles


def test_bundles_are_given_once_and_again_when_they_are_free() -> None:
    group = SimpleNamespace(bundle_count=2)
    places = GivenBundles(group)
    first, second = places.take(), places.take()
    assert first is not None
    assert second is not None
    assert (first.group, first.index, second.index) == (group, 0, 1)
    assert places.take() is None
    first.release()
    again = places.take()
    assert again is not None
    assert again.index == 0
