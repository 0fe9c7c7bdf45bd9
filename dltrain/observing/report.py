"""Tables for the terminal: a run's end, its state, all runs, its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["print_checkpoints", "print_runs", "print_status", "print_summary"]


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
    console.print(table)
    name = summary["run"]
    for command, what in {
        f"dltrain checkpoint export {name}": "take the best weights away as model.safetensors",
        f"dltrain run {spec} train.epochs=32": "train on from here",
        f"dltrain status {name}": "its state, at any time, from another terminal",
    }.items():
        console.print(f"  [bold]{command}[/]  {what}", highlight=False, soft_wrap=True)


def _figure(name: str, value: float) -> str:
    return f"{value:.2%}" if "accuracy" in name else f"{value:.4g}"


def print_status(state: Mapping[str, Any]) -> None:
    """One run's state."""
    table = Table(show_header=False)
    for name in ("run", "state", "step", "total_steps", "world_size", "restarts", "samples_per_second", "goodput"):
        if name in state:
            table.add_row(name.replace("_", " "), str(state[name]))
    for name in ("checkpoint_step", "metrics_url", "silent_seconds", "error"):
        if state.get(name) not in (None, ""):
            table.add_row(name.replace("_", " "), str(state[name]))
    for worker in state.get("workers", ()):
        table.add_row(f"rank {worker['rank']}", f"pid {worker['pid']} on {worker['node']}, {worker['state']}")
    Console().print(table)


def print_runs(states: Sequence[Mapping[str, Any]], where: str) -> None:
    """All runs, a line each."""
    if not states:
        Console().print(f"no runs under {where}; start one with: dltrain run SPEC")
        return
    table = Table("run", "state", "step", "workers", "samples/s", "goodput")
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
