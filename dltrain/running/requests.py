"""What others ask of a running driver, looked for in a thread: a store that does not answer holds nobody up.

requests = Requests(run)
requests.stop                       # somebody asked for a stop
requests.replaced                   # another process has taken the run over
"""

from __future__ import annotations

import contextlib
import threading

from dltrain.errors import StoreError
from dltrain.running.rundir import RunDir

__all__ = ["Requests"]

_EVERY_SECONDS, _REMOTE_EVERY_SECONDS = 1.0, 10.0
_CLOSE_SECONDS = 1.0


class Requests:
    """Looks until closed.

    Attributes:
        stop, replaced: stay true.
    """

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._every = _EVERY_SECONDS if run.is_local else _REMOTE_EVERY_SECONDS
        self.stop = self.replaced = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="dltrain-requests", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, unless it waits for a store."""
        self._closed.set()
        self._thread.join(timeout=_CLOSE_SECONDS)

    def _look(self) -> None:
        while not self._closed.wait(self._every):
            with contextlib.suppress(OSError, StoreError):
                self.replaced = self.replaced or self._run.is_replaced()
            with contextlib.suppress(OSError, StoreError):
                # The request is for whoever has the run.
                self.stop = self.stop or (not self.replaced and self._run.take_stop())
