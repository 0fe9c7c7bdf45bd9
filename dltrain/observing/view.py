"""What a run shows while it runs: a live bar on a terminal, plain lines elsewhere, nothing with --json.

view = make_view(json=False)
view.on_step(Progress(step=10, total_steps=100, loss=0.5, samples_per_second=9000, wait_share=0.02, workers=2))
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

__all__ = ["NoView", "Progress", "TerminalView", "View", "make_view"]

_LINE_SECONDS = 5.0
_REFRESH_SECONDS = 0.25
_LINE = re.compile(
    r"step (\d+)/(\d+)  loss (-?[\d.]+|-?inf|nan)  ([\d,]+) samples/s  data wait (\d+)%  (\d+) workers?", re.ASCII
)
_MARKS = {"info": "[bold cyan]·[/]", "good": "[bold green]✓[/]", "warn": "[bold yellow]![/]", "bad": "[bold red]✗[/]"}


@dataclass(frozen=True)
class Progress:
    """Where a run is. `wait_share`: of step time, waiting for data."""

    step: int
    total_steps: int
    loss: float
    samples_per_second: float
    wait_share: float
    workers: int

    @property
    def line(self) -> str:
        """As it stands in a log."""
        return f"step {self.step}/{self.total_steps}  {self}"

    @classmethod
    def parse(cls, line: str) -> Progress | None:
        """The inverse of `line`; None for any other line."""
        found = _LINE.fullmatch(line.strip())
        if not found:
            return None
        step, total, loss, rate, wait, workers = found.groups()
        return cls(int(step), int(total), float(loss), float(rate.replace(",", "")), int(wait) / 100, int(workers))

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}  {self.samples_per_second:,.0f} samples/s  "
            f"data wait {self.wait_share:.0%}  {self.workers} worker{'s' if self.workers != 1 else ''}"
        )


class View(Protocol):
    """What the driver tells a view."""

    def say(self, text: str, kind: str = "info") -> None:
        """A sentence; kind is info, good, warn or bad."""

    def log(self, text: str) -> None:
        """A line that rank 0 printed."""

    def on_step(self, progress: Progress) -> None:
        """A step was committed."""

    def on_eval(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """An evaluation."""

    def close(self) -> None:
        """The run is over."""


class NoView:
    """Shows nothing; warnings go to stderr, where --json leaves them."""

    def say(self, text: str, kind: str = "info") -> None:
        if kind in ("warn", "bad"):
            print(text, file=sys.stderr)

    def log(self, text: str) -> None:
        print(text, file=sys.stderr)

    def on_step(self, progress: Progress) -> None:
        pass

    def on_eval(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        pass

    def close(self) -> None:
        pass


class TerminalView:
    """A progress bar below the messages; without a terminal a line every five seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Bar | None = None
        self._task: Any = None
        self._shown = 0.0

    def say(self, text: str, kind: str = "info") -> None:
        from rich.markup import escape

        self._console.print(f"{_MARKS[kind]} {escape(text)}", highlight=False, soft_wrap=True)

    def log(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_step(self, progress: Progress) -> None:
        now = time.monotonic()
        last = progress.step >= progress.total_steps
        if self._console.is_terminal:
            if now - self._shown >= _REFRESH_SECONDS or last:
                self._shown = now
                self._draw(progress)
        elif now - self._shown >= _LINE_SECONDS or last:
            self._shown = now
            # A line stays one line: it may be read by who follows a job's log.
            self._console.print(progress.line, highlight=False, soft_wrap=True)

    def _draw(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = Bar(
                TextColumn("[bold]training"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
                auto_refresh=False,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=progress.total_steps)
        self._bar.update(
            self._task, completed=progress.step, total=progress.total_steps, description=str(progress), refresh=True
        )

    def on_eval(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {step}: {figures}{'  (best so far)' if is_best else ''}")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def make_view(json: bool) -> View:
    """The view for this terminal."""
    return NoView() if json else TerminalView(Console())
