"""The commands that tell of runs after the fact, or as they stand: one page of one run, one of several.

dltrain report image-cnn --open
dltrain compare image-cnn image-cnn-wide
"""

from __future__ import annotations

import json as json_module
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dltrain.observing.history import History

__all__ = ["add_to"]

_SLOW_SECONDS = 2.0

Run = Annotated[str, typer.Argument(help="A run's name (under ./runs or $DLTRAIN_RUNS) or its URL.", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]
Open = Annotated[bool, typer.Option("--open", help="Show it in the browser.")]


def add_to(app: typer.Typer) -> None:
    """Gives a command line these commands."""
    for command in (report, compare):
        app.command()(command)


def report(
    run: Run,
    to: Annotated[str, typer.Option(help="Path or URL of the file.", show_default="RUN/report.html")] = "",
    open: Open = False,
    json: Json = False,
) -> None:
    """Write one HTML file about a run: curves, samples, time, faults and their cost.

    The file holds all that it shows: it can be sent and kept, and opens without
    a network. A run may be live, stopped or failed. Of a run in object storage
    the file is written here, as RUN-report.html, unless --to says where.

        dltrain report image-cnn --open
    """
    from dltrain.observing.web_report import report_facts, report_page

    history = _read(run)
    target = to or _beside(history)
    size = _write(target, report_page(history, time.time()))
    if json:
        _print_json({**report_facts(history), "report": target, "bytes": size})
    else:
        typer.echo(f"wrote {target} ({size:,} bytes): open it in a browser, or send it")
    if open:
        _open(target)


def compare(
    runs: Annotated[list[str], typer.Argument(help="Two runs or more, by name or URL.", metavar="RUN RUN...")],
    to: Annotated[str, typer.Option(help="Path or URL of the file.")] = "compare.html",
    open: Open = False,
    json: Json = False,
) -> None:
    """Compare runs: what differs in their specs, what came of each, their curves.

    Differences and figures are printed; they and the curves, on top of each
    other, go into one HTML file.

        dltrain compare digits digits-wide --open
    """
    from dltrain.errors import UserError
    from dltrain.observing.web_compare import compare_facts, compare_page, print_comparison

    if len(runs) < 2:
        raise UserError("compare needs two runs or more: dltrain compare RUN RUN...")
    histories = [_read(run) for run in runs]
    found = compare_facts(histories)
    size = _write(to, compare_page(histories, time.time()))
    if json:
        _print_json({**found, "report": to, "bytes": size})
    else:
        print_comparison(found)
        typer.echo(f"wrote {to} ({size:,} bytes), with their curves")
    if open:
        _open(to)


# ---- inside ----


def _read(run: str) -> History:
    from dltrain.data.progress import ProgressBar
    from dltrain.observing.history import read_history
    from dltrain.running.rundir import find_run

    found = find_run(run)
    with ProgressBar(f"reading {run}", "pieces", patience=_SLOW_SECONDS) as bar:
        return read_history(found.store, found.state(), bar.update)


def _beside(history: History) -> str:
    """In the run's directory where that is on a disk: in object storage nobody could open it."""
    return f"{history.name}-report.html" if "://" in history.url else os.path.join(history.url, "report.html")


def _write(target: str, page: str) -> int:
    from dltrain.errors import UserError
    from dltrain.store import open_store

    folder, _, name = target.rpartition("/")
    if not name:
        raise UserError(f"--to: {target!r} is a directory; name a file in it")
    data = page.encode()
    try:
        open_store(folder or ("/" if target.startswith("/") else ".")).write(name, data)
    except OSError as error:
        raise UserError(f"{target} can't be written: {error}") from None
    return len(data)


def _open(target: str) -> None:
    import webbrowser

    from dltrain.errors import UserError

    if "://" in target:
        raise UserError(f"--open: {target} is not on this machine; leave --to out, or name a path")
    webbrowser.open(Path(target).resolve().as_uri())


def _print_json(value: Any) -> None:
    print(json_module.dumps(value))
