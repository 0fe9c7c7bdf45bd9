"""The keeper: makes checkpoints exist, in a thread of its own, so that a slow store holds nobody up.

keeper = Keeper(store, keep=3, is_replaced=run.is_replaced, say=view.say)
keeper.saved(event); keeper.commit(step, attempt, meta); keeper.take()     # Committed events
keeper.newest                                                            # the last good checkpoint
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from dltrain.checkpoint.commit import FORMAT, Checkpoint, commit, discard, newest_good, prune
from dltrain.errors import StoreError
from dltrain.observing.reports import Saved
from dltrain.running.events import Committed
from dltrain.store import Store

__all__ = ["REPLACED", "Claims", "Keeper", "patiently"]

T = TypeVar("T")
_PAUSES = (1.0, 2.0, 4.0, 8.0, *[15.0] * 12)
REPLACED = "another start of this run has taken it over"


class Claims:
    """Attempt numbers, the next one claimed ahead, so that recovery need not wait for the store."""

    def __init__(self, claim: Callable[[], int]) -> None:
        self._claim = claim
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dltrain-claim")
        self._ahead: Future[int] | None = None

    def next(self) -> int:
        """A number that nobody else has.

        Raises:
            StoreError: the store can't be reached.
        """
        ahead, self._ahead = self._ahead, None
        try:
            number = ahead.result() if ahead else patiently(self._claim)
        except (OSError, StoreError):
            # The store was away when it was claimed ahead.
            number = patiently(self._claim)
        self._ahead = self._thread.submit(self._claim)
        return number


def patiently(ask: Callable[[], T]) -> T:
    """Asks the store again for some minutes while it can't be reached; what is asked must bear to be repeated."""
    for pause in _PAUSES:
        try:
            return ask()
        except (OSError, StoreError):
            time.sleep(pause)
    return ask()


class Keeper:
    """A run's checkpoints, as its driver sees them.

    Args:
        store: the run's checkpoints.
        keep: how many of the newest stay.
        is_replaced: whether another process has taken the run over; then nothing is committed any more.
        say: told of a checkpoint that can't be read.

    Attributes:
        newest: the newest good one, None before the first.
    """

    def __init__(self, store: Store, keep: int, is_replaced: Callable[[], bool], say: Callable[[str], None]) -> None:
        self._store, self._keep, self._is_replaced, self._say = store, keep, is_replaced, say
        self._saved: dict[int, dict[int, Saved]] = {}
        self._results: queue.SimpleQueue[tuple[Committed, int]] = queue.SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dltrain-commit")
        # Being committed; and the best evaluation of which the checkpoint is there.
        self._pending: set[int] = set()
        self._best: Mapping[str, Any] | None = None
        self.newest: Checkpoint | None = None

    def find(self) -> Checkpoint | None:
        """Looks for the newest checkpoint that reads back whole, one that is being committed included."""
        # In that thread: what was listed before a commit would be put in the place of what it has made.
        self.newest = self._thread.submit(newest_good, self._store, self._say).result()
        self._best = self.newest.manifest.get("best") if self.newest else None
        return self.newest

    def best(self, wanted: dict[str, Any] | None, written: Collection[int] = ()) -> dict[str, Any] | None:
        """The best evaluation if its checkpoint is there, or comes; else the one before it.

        Args:
            written: steps whose files are on their way to the store.
        """
        if wanted is None:
            # None yet, or none by the metric that counts now.
            self._best = None
            return None
        if wanted["step"] in {*self._pending, *written} or wanted == self._best:
            return wanted
        return dict(self._best) if self._best else None

    def saved(self, event: Saved) -> None:
        """A rank's file is in the store."""
        self._saved.setdefault(event.step, {})[event.rank] = event

    def commit(self, step: int, attempt: int, meta: Mapping[str, Any], first_of_all: Callable[[], None]) -> None:
        """All ranks' files are there: writes the manifest, and deletes what is not kept.

        Args:
            first_of_all: writes what must be there when the checkpoint is: its steps are never made again.
        """
        files = self._saved.pop(step)
        first = files[0]
        whole = {"position": first.position, "num_ranks": len(files), **meta, **first.meta}
        described = [files[rank].file for rank in sorted(files)]
        self._pending.add(step)
        self._thread.submit(self._commit, step, attempt, described, whole, first_of_all)

    def discard(self, step: int, attempt: int, reason: str) -> None:
        """A file is missing: removes those that are there."""
        self._saved.pop(step, None)
        self._thread.submit(self._discard, step, attempt, reason)

    def forget(self) -> None:
        """The attempt is over: what it has not completed is not waited for."""
        self._saved.clear()

    def take(self) -> list[tuple[Committed, int]]:
        """What became of them since the last call, with the checkpoint's size in bytes."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._results.get_nowait())
        return found

    def close(self) -> None:
        """Waits for what is under way."""
        self._thread.shutdown(wait=True)

    # ---- in the thread ----

    def _commit(
        self,
        step: int,
        attempt: int,
        files: list[Mapping[str, Any]],
        meta: dict[str, Any],
        first_of_all: Callable[[], None],
    ) -> None:
        try:
            if self._is_replaced():
                self._results.put((Committed(step, REPLACED), 0))
                return
            first_of_all()
            if (meta.get("best") or {}).get("step") not in (None, step):
                # Its own checkpoint may have failed meanwhile.
                meta["best"] = self._best
            path = commit(self._store, step, attempt, files, meta)
        except Exception as error:  # whatever it is, the lifecycle waits for an answer
            # Before the answer, which has somebody ask for the best.
            self._pending.discard(step)
            self._discard(step, attempt, f"{type(error).__name__}: {error}")
            return
        self._best = best = meta.get("best")
        self._pending.discard(step)
        manifest = {"format": FORMAT, "step": step, "attempt": attempt, **meta, "files": files}
        self.newest = Checkpoint(path, manifest)
        self._results.put((Committed(step), self.newest.num_bytes))
        with contextlib.suppress(OSError, StoreError):
            prune(self._store, self._keep, best["step"] if best else None)

    def _discard(self, step: int, attempt: int, reason: str) -> None:
        with contextlib.suppress(OSError, StoreError):
            discard(self._store, step, attempt)
        self._results.put((Committed(step, reason), 0))
