"""Tables for the terminal: a run's end, its state, all runs, its checkpoints, the jobs of a cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from dltrain.observing.reports import OVER
from dltrain.wording import human_seconds

__all__ = ["print_checkpoints", "print_jobs", "print_runs", "print_status", "print_summary"]


def print_summary(summary: Mapping[str, Any], spec: str) -> None:
    """The end of `dltrain run`: figures, where things are, and what to do next."""
    console = Console()
    table = Table(title=f"{summary['run']}: {summary['status']}", show_header=False, title_justify="left")
    for name, value in summary["eval"].items():
        table.add_row(name, _figure(name, value), style="bold")
    best = summary.get("best")
    if best:
        table.add_row(f"best {best['metric']}", f"{_figure(best['metric'], best['value'])} at step {best['step']}")
    table.add_row("samples/s", f"{summary['samples_per_second']:,.0f}")
    table.add_row("goodput", f"{summary['goodput']:.0%} of {summary['seconds']:.1f} s spent in steps that count")
    table.add_row("steps", f"{summary['steps']:,} ({summary['samples']:,} samples this time)")
    table.add_row("restarts", str(summary["restarts"]))
    table.add_row("run directory", summary["dir"])
    table.add_row("checkpoints", f"{summary['dir']}/checkpoints")
    for file in summary.get("profiles", ()):
        table.add_row("profile", f"{summary['dir']}/{file}")
    console.print(table)
    # A name is enough where names are looked up.
    known = f"{os.environ.get('DLTRAIN_RUNS', './runs')}/{summary['run']}"
    name = summary["run"] if summary["dir"] in (known, os.path.abspath(known)) else summary["dir"]
    for command, what in {
        f"dltrain report {name} --open": "curves, samples, faults and where the time went, as one page",
        f"dltrain predict {name} INPUT": "use the best weights; `dltrain checkpoint export` takes them away",
        f"dltrain run {spec} train.epochs=32": "train on from here",
        f"dltrain status {name}": "its state, at any time, from another terminal",
    }.items():
        console.print(f"  [bold]{command}[/]  {what}", highlight=False, soft_wrap=True)


def _figure(name: str, value: float) -> str:
    return f"{value:.2%}" if "accuracy" in name else f"{value:.4g}"


def print_status(state: Mapping[str, Any], sentences: Sequence[str] = ()) -> None:
    """One run's state, and what else is told of it."""
    table = Table(show_header=False)
    for name in (
        "job",
        "job_status",
        "run",
        "state",
        "step",
        "total_steps",
        "world_size",
        "restarts",
        "samples_per_second",
        "goodput",
    ):
        if name in state:
            table.add_row(name.replace("_", " "), str(state[name]))
    # Nobody listens there any more.
    listening = () if state.get("state") in OVER else ("metrics_url",)
    for name in ("checkpoint_step", *listening, "silent_seconds", "error", "exit_code"):
        if state.get(name) not in (None, ""):
            table.add_row(name.replace("_", " "), str(state[name]))
    for worker in state.get("workers", ()):
        table.add_row(f"rank {worker['rank']}", f"pid {worker['pid']} on {worker['node']}, {worker['state']}")
    console = Console()
    console.print(table)
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def print_runs(states: Sequence[Mapping[str, Any]], where: str) -> None:
    """All runs, a line each."""
    if not states:
        Console().print(f"no runs under {where}; start one with: dltrain run SPEC")
        return
    # On a narrow terminal the figures give way, not the name that every command asks for.
    name, state_name = Column("run", no_wrap=True, overflow="fold"), Column("state", no_wrap=True)
    table = Table(name, state_name, "step", "workers", "samples/s", "goodput")
    for state in states:
        total = state.get("total_steps", "?")
        cells = (f"{state.get('step', 0)}/{total}", state.get("world_size", 0), state.get("samples_per_second", 0))
        table.add_row(str(state["run"]), str(state["state"]), *map(str, cells), f"{state.get('goodput', 0):.0%}")
    Console().print(table)


def print_checkpoints(rows: Sequence[Mapping[str, Any]]) -> None:
    """A run's checkpoints."""
    if not rows:
        Console().print("no checkpoints yet")
        return
    table = Table("step", "workers", "zero", "size", "metrics", "")
    for row in rows:
        metrics = "  ".join(f"{k} {v:.4f}" for k, v in row["metrics"].items())
        cells = (str(row["step"]), str(row["num_ranks"]), str(row["zero"]), f"{row['bytes']:,} B", metrics)
        table.add_row(*cells, "best" if row["best"] else "")
    Console().print(table)


def print_jobs(jobs: Sequence[Mapping[str, Any]], where: str) -> None:
    """The jobs of a cluster, a line each."""
    if not jobs:
        Console().print(f"no runs were submitted to {where}; submit one with: dltrain submit SPEC --address {where}")
        return
    table = Table("job", "run", "state", "submitted", "took", "run directory")
    for job in jobs:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(job["submitted"]))
        table.add_row(job["job"], job["run"], job["job_status"], since, human_seconds(job["seconds"]), job["dir"])
    Console().print(table)
