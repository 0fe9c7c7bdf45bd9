"""What the doctor shows: which checks are under way, and the findings as a table with what to do below it.

with LiveProgress() as progress: report = examination.run(progress)
print_report(report)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dltrain.doctor.examination import Report
from dltrain.doctor.finding import Finding, counts, merged

__all__ = ["LiveProgress", "print_report"]

_MARKS = {
    "ok": "[bold green]✓[/]",
    "skip": "[dim]·[/]",
    "warn": "[bold yellow]![/]",
    "fail": "[bold red]✗[/]",
}
_LINE_SECONDS = 10.0


class LiveProgress:
    """A line on stderr that names what is waited for; without a terminal a line every ten seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream or sys.stderr)
        self._status: Any = None
        self._next = time.monotonic() + _LINE_SECONDS

    def __enter__(self) -> LiveProgress:
        if self._console.is_terminal:
            self._status = self._console.status("looking around")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def update(self, done: int, total: int, at: Sequence[str]) -> None:
        """So many are done; these are under way."""
        text = f"{done} of {total} checks done" + (f"; waiting for {', '.join(at)}" if at else "")
        if self._status:
            self._status.update(escape(text))
        elif time.monotonic() >= self._next and at:
            self._next = time.monotonic() + _LINE_SECONDS
            print(text, file=self._console.file, flush=True)


def print_report(report: Report, console: Console | None = None) -> None:
    """The table, and below it what to do, worst first."""
    console = console or Console()
    findings = merged(report.findings)
    several = any(finding.where for finding in findings)
    table = Table("", "check", *(["where"] if several else []), "found", box=None, pad_edge=False)
    for finding in findings:
        where = [escape(finding.where)] if several else []
        table.add_row(_MARKS[finding.status], escape(finding.name), *where, escape(finding.found))
    console.print(table, highlight=False)
    for status, title in (("fail", "must be changed"), ("warn", "should be changed")):
        _print_todo(console, title, [f for f in findings if f.status == status])
    told = counts(report.findings)
    verdict = "nothing is in the way of a run" if report.good else "a run would fail"
    numbers = f"{told['fail']} failed, {told['warn']} warnings, {told['ok']} good, {told['skip']} skipped"
    console.print(f"\n{verdict}: {numbers}, in {report.seconds:.0f} s", highlight=False)


def _print_todo(console: Console, title: str, findings: Sequence[Finding]) -> None:
    if not findings:
        return
    console.print(f"\n[bold]{title}[/]")
    for finding in findings:
        where = f" on {escape(finding.where)}" if finding.where else ""
        console.print(f"{_MARKS[finding.status]} [bold]{escape(finding.name)}[/]{where}: {escape(finding.found)}")
        console.print(f"  why:   {escape(finding.why)}", highlight=False)
        console.print(f"  to do: {escape(finding.todo)}", highlight=False)
