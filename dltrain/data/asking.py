"""Asking a store for a piece of a file: again, after growing random pauses, while that may help; and counted.

    asker = Asker(backend)
    data = asker.patiently(piece)
    asker.stats        # {"requests_ok": 1, "bytes": 8388608, "seconds": 0.04}

A fault is one of REASONS, or no fault of the kind that passes: a file that changed, or access denied.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dltrain.data.backends import Backend
from dltrain.data.catalog import DataFile
from dltrain.errors import StoreError

__all__ = ["REASONS", "Asker", "Piece", "fault"]

REASONS = ("server", "timeout", "connection", "truncated", "expired")
_FIRST_WAIT, _LONGEST_WAIT, _GIVE_UP_SECONDS = 0.1, 10.0, 60.0
_RENEW_SECONDS = 1.0
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
_BUSY = ("SlowDown", "ServiceUnavailable", "InternalError", "Throttling", "ThrottlingException", "TooManyRequests")
_BUSY_STATUS = (429, 500, 502, 503, 504)
_NOT_REACHED = ("Connect", "Disconnected", "ClosedError", "ProtocolError", "ResponseStreaming", "Payload", "HTTPClient")
_ADVICE = {
    "server": "the storage is overloaded or down",
    "timeout": "the storage or the network is too slow, or down",
    "connection": "the storage or the network is down",
    "truncated": "the storage, or a proxy in front of it, breaks replies off",
    "expired": "the credentials have expired and no newer ones were found: renew them",
}


@dataclass(eq=False)
class Piece:
    """Bytes [start, end) of a file; begun: when the request that is under way was sent, else infinite."""

    file: DataFile
    start: int
    end: int
    begun: float = field(default=math.inf, kw_only=True)

    @property
    def wanted(self) -> bool:
        """Whether asking for it again makes sense."""
        return True


class _ShortError(Exception):
    """Fewer bytes came than were asked for."""


class Asker:
    """Asks a backend, from several threads at once.

    Args:
        clock, sleep: for tests.
    """

    def __init__(
        self,
        backend: Backend,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._backend, self._clock, self._sleep = backend, clock, sleep
        self._lock = threading.Lock()
        self._counted: defaultdict[str, float] = defaultdict(float)
        self._renewed = -math.inf

    @property
    def stats(self) -> dict[str, float]:
        """What was counted so far."""
        with self._lock:
            return dict(self._counted)

    def count(self, name: str, number: float = 1) -> None:
        """Adds to what is counted."""
        with self._lock:
            self._counted[name] += number

    def once(self, piece: Piece, fresh: bool = False) -> bytes:
        """One request; `fresh`: over a new connection, beside one that is under way.

        Raises:
            DataError: the file changed; whatever else the backend raises.
        """
        begin = self._clock()
        if not fresh:
            piece.begun = begin
        try:
            data = self._backend.read(piece.file, piece.start, piece.end, fresh)
            if len(data) != piece.end - piece.start:
                raise _ShortError(f"{len(data):,} of {piece.end - piece.start:,} bytes came")
        except Exception as error:
            self.count(f"requests_{fault(error) or 'refused'}")
            raise
        finally:
            if not fresh:
                piece.begun = math.inf
        with self._lock:
            self._counted["requests_ok"] += 1
            self._counted["bytes"] += len(data)
            self._counted["seconds"] += self._clock() - begin
        return data

    def patiently(self, piece: Piece) -> bytes:
        """The bytes, asked for again while the piece is wanted and a minute has not passed.

        Raises:
            StoreError: it went on for longer; otherwise as `once`.
        """
        begin, wait, reason = self._clock(), _FIRST_WAIT, ""
        for attempt in itertools.count(1):
            try:
                if reason == "expired":
                    self._renew()
                return self.once(piece)
            except Exception as error:
                reason, seconds = fault(error), self._clock() - begin
                if not reason or not piece.wanted:
                    raise
                if seconds > _GIVE_UP_SECONDS:
                    raise _given_up(piece.file.path, reason, error, attempt, seconds) from error
            self.count(f"retries_{reason}")
            self._sleep(random.uniform(0, wait))
            wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError("the loop has no end")

    def _renew(self) -> None:
        """New credentials, once for all the threads that find the old ones expired."""
        with self._lock:
            if self._clock() - self._renewed < _RENEW_SECONDS:
                return
            self._renewed = self._clock()
            self._counted["renewed"] += 1
        self._backend.renew()


def fault(error: BaseException) -> str:
    """Why a request failed, one of REASONS, if asking again may help; else an empty text."""
    return next(filter(None, map(_reason, _chain(error))), "")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was made from: some libraries wrap what the server said."""
    while error is not None:
        yield error
        error = error.__cause__


def _reason(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return _answer(response)
    name = type(error).__name__
    if isinstance(error, _ShortError) or "IncompleteRead" in f"{name} {error}":
        return "truncated"
    if isinstance(error, TimeoutError) or "Timeout" in name:
        return "timeout"
    return "connection" if isinstance(error, ConnectionError) or any(word in name for word in _NOT_REACHED) else ""


def _answer(response: dict[str, dict[str, object]]) -> str:
    """The reason in what an S3 server said."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _EXPIRED:
        return "expired"
    if code == "RequestTimeout":
        return "timeout"
    return "server" if code in _BUSY or status in _BUSY_STATUS or code in map(str, _BUSY_STATUS) else ""


def _given_up(path: str, reason: str, error: Exception, attempts: int, seconds: float) -> StoreError:
    return StoreError(
        f"{path} could not be read: {attempts} attempts failed in {seconds:.0f} s, the last with "
        f"{type(error).__name__}: {error}; {_ADVICE[reason]}. `dltrain run` again goes on from the last checkpoint"
    )
