"""A progress bar on stderr for passes over data: bytes, speed and the time left; lines where there is no terminal.

with ProgressBar("rewriting") as bar: bar.update(done_bytes, total_bytes)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from dltrain.wording import human_bytes, human_seconds

__all__ = ["ProgressBar", "human_bytes", "human_seconds"]

_EVERY_SECONDS = 10.0


class ProgressBar:
    """Shows how far something is.

    Args:
        unit: what is counted; bytes are shown in KiB, MiB and so on.
        patience: seconds after which there is anything to see.
        stream, clock: for tests.
    """

    def __init__(
        self,
        title: str,
        unit: str = "bytes",
        patience: float = 0.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title, self._unit, self._clock = title, unit, clock
        self._stream = stream or sys.stderr
        self._begun = clock()
        self._next = self._begun + (patience or _EVERY_SECONDS)
        self._rich = self._stream.isatty()
        self._bar: Any = None
        self._task: Any = None

    def update(self, done: int, total: int) -> None:
        """`done` of `total`."""
        now = self._clock()
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, text=self._text(done, total, now))
        elif now >= self._next or (self._rich and self._next - self._begun == _EVERY_SECONDS):
            self._show(done, total, now)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def _show(self, done: int, total: int, now: float) -> None:
        if self._rich:
            self._start()
            self.update(done, total)
            return
        print(f"{self._title}: {self._text(done, total, now)}", file=self._stream, flush=True)
        self._next = now + _EVERY_SECONDS

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
        self._task = self._bar.add_task(self._title, total=None, text="")
        self._bar.start()

    def _text(self, done: int, total: int, now: float) -> str:
        """For example "1.5 GiB of 4.0 GiB, 38 %, 210.0 MiB/s, 12 s left"."""
        seconds = max(now - self._begun, 1e-6)
        share = f"{100 * done // max(total, 1)} %"
        left = human_seconds((total - done) * seconds / done) if done else "unknown"
        return f"{self._amount(done)} of {self._amount(total)}, {share}, {self._amount(done / seconds)}/s, {left} left"

    def _amount(self, value: float) -> str:
        return human_bytes(value) if self._unit == "bytes" else f"{value:,.0f} {self._unit}"
