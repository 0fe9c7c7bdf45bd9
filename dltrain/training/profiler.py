"""The profiler: a trace of some steps of some ranks, as Chrome and Perfetto read them.

    profile: {steps: 10..15, ranks: [0]}        # RUN/profile/step-00000010-rank-0.json.gz

    profiler = Profiler(spec, rank=0, store=open_store(job.run))
    profiler.before(10); ...; yield from profiler.after(10)
    yield from profiler.end(12)                 # no other step follows: what there is of it is written

Only around those steps is torch's profiler at work. A trace is written whole or not at all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dltrain.observing.reports import Profiled
from dltrain.spec import ProfileSpec
from dltrain.store import Store

__all__ = ["Profiler"]


class Profiler:
    """Of one rank; without a spec, or of a rank that is not meant, every verb does nothing.

    Args:
        store: the run's directory.
    """

    def __init__(self, spec: ProfileSpec | None, rank: int, store: Store) -> None:
        self._spec = spec if spec and rank in spec.ranks else None
        self._rank, self._store = rank, store
        self._profile: Any = None
        self._mark: Any = None
        self._first = 0

    def before(self, step: int) -> None:
        """A step is about to be made."""
        if self._spec is None or not self._spec.first <= step <= self._spec.last:
            return
        from torch.profiler import record_function

        if self._profile is None:
            self._profile, self._first = self._start(self._spec.memory), step
        self._mark = record_function(f"step {step}")
        self._mark.__enter__()

    def _start(self, memory: bool) -> Any:
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        made = profile(activities=activities, profile_memory=memory)
        made.start()
        return made

    def after(self, step: int) -> Iterator[Profiled]:
        """A step has been made."""
        if self._profile is None or self._spec is None:
            return
        self._unmark()
        if step >= self._spec.last:
            yield from self.end(step)

    def end(self, step: int) -> Iterator[Profiled]:
        """`step` was the last one of this attempt."""
        if self._profile is None:
            return
        self._unmark()
        profile, self._profile = self._profile, None
        profile.stop()
        if step >= self._first:
            yield self._write(profile, step)

    def _unmark(self) -> None:
        mark, self._mark = self._mark, None
        if mark:
            mark.__exit__(None, None, None)

    def _write(self, profile: Any, last: int) -> Profiled:
        name = f"profile/step-{self._first:08d}-rank-{self._rank}.json.gz"
        with tempfile.TemporaryDirectory(prefix="dltrain-profile-") as directory:
            path = Path(directory, "trace.json.gz")
            profile.export_chrome_trace(str(path))
            data = path.read_bytes()
        self._store.write(name, data)
        return Profiled(self._rank, self._first, last, name, len(data))
