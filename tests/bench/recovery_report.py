"""How tests/bench/recovery.py shows what it found: medians, a table, and a timeline of each fault."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Values = Mapping[str, Mapping[str, Sequence[float | None]]]
Names = Mapping[str, str]
# measure -> (text, unit, goal)
Measures = Mapping[str, tuple[str, str, str]]
COLORS = {"dltrain": "#1f6feb", "ray": "#8c959f", "ray-tuned": "#bf8700"}
# Seconds before a fault that the picture shows.
BEFORE_SECONDS = 3.0


def median(values: Sequence[float | None]) -> float | None:
    """Of the rounds; None when half or more were not within the bound."""
    found = sorted(float("inf") if value is None else value for value in values)
    middle = statistics.median(found)
    return None if middle == float("inf") else round(middle, 3)


def summarize(values: Values) -> dict[str, dict[str, Any]]:
    """For the JSON: the median and each value, by measure and peer."""
    return {
        measure: {peer: {"median": median(each), "each": list(each)} for peer, each in peers.items()}
        for measure, peers in values.items()
    }


def show(values: Values, measures: Measures, names: Names, bound: float, facts: Mapping[str, Any]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    peers = [peer for peer in names if any(peer in found for found in values.values())]
    table = Table("", *(names[peer] for peer in peers), "goal")
    for measure, (text, unit, goal) in measures.items():
        if measure in values:
            cells = [_cell(values[measure].get(peer), unit, bound) for peer in peers]
            table.add_row(text, *cells, goal)
    console.print(table)


def _cell(each: Sequence[float | None] | None, unit: str, bound: float) -> str:
    if not each:
        return ""
    middle = median(each)
    return f"not within {bound:g} s" if middle is None else f"{middle:.3g} {unit}".rstrip()


def draw(
    traces: Mapping[str, Mapping[str, Sequence[tuple[float, int]]]], measures: Measures, names: Names, path: Path
) -> None:
    """Steps over seconds around each fault, one panel each; every line begins at its step when the fault came."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [measure for measure in measures if measure in traces]
    if not shown:
        return
    figure, axes = plt.subplots(len(shown), 1, figsize=(9, 2.2 * len(shown)), squeeze=False)
    for axis, measure in zip(axes[:, 0], shown, strict=True):
        for peer, trace in traces[measure].items():
            _draw_trace(axis, trace, names[peer], COLORS[peer])
        axis.axvline(0, color="#cf222e", linewidth=1)
        axis.set_title(measures[measure][0], fontsize=9, loc="left")
        axis.set_ylabel("steps", fontsize=8)
        axis.set_xlim(left=-BEFORE_SECONDS)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False)
    axes[-1, 0].set_xlabel("seconds after the fault", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _draw_trace(axis: Any, trace: Sequence[tuple[float, int]], name: str, color: str) -> None:
    zero = max((step for seconds, step in trace if seconds <= 0), default=0)
    near = [(seconds, step - zero) for seconds, step in trace if seconds >= -BEFORE_SECONDS]
    axis.plot([seconds for seconds, _ in near], [step for _, step in near], ".", markersize=2, color=color, label=name)
