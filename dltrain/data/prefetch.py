"""Runs an iterator in a background thread, a bounded number of items ahead.

    with Prefetcher(lambda: make_batches(), depth=3) as batches:
        for batch in batches: ...

What the thread raises is raised by `next()` at once; closing stops the thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["Prefetcher"]

T = TypeVar("T")
_POLL_SECONDS = 0.1


class _End:
    pass


class Prefetcher(Generic[T]):
    """An iterator fed by a daemon thread.

    Args:
        make: called in the thread; gives the iterator.
        depth: items held ready at most.
    """

    def __init__(self, make: Callable[[], Iterator[T]], depth: int) -> None:
        self._make = make
        self._queue: queue.Queue[T | _End | BaseException] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dltrain-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._make():
                if not self._put(item):
                    return
            self._put(_End())
        except BaseException as error:  # the consumer raises it, whatever it is
            self._put(error)

    def _put(self, item: T | _End | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    @property
    def ready(self) -> int:
        """Items waiting now."""
        return self._queue.qsize()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._queue.get()
        if isinstance(item, _End | BaseException):
            # Left in place, so that asking again gives the same answer instead of waiting for ever.
            self._queue.put(item)
            if isinstance(item, BaseException):
                raise item
            raise StopIteration
        return item

    def close(self) -> None:
        """Stops the thread; safe to call twice."""
        self._stopped.set()
        self._thread.join(timeout=10)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
