"""Trackers: services and files that are told of a run beside its own directory, each behind one small protocol."""

from dltrain.observing.trackers.base import TrackedRun, Tracker
from dltrain.observing.trackers.tracking import Tracking

__all__ = ["TrackedRun", "Tracker", "Tracking"]
