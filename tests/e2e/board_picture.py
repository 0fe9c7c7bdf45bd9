"""A dashboard as a picture, where no Grafana can be had: its own panels and queries, asked of a live Prometheus.

    draw(Path("cluster/monitoring/dashboards/dltrain-overview.json"), ask, fill, begin, end, Path("overview.png"))

It shows what data a board brings together, not how Grafana would draw each panel.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prometheus_server import Prometheus, Series

__all__ = ["draw"]

BACK, PANEL, TEXT, DIM = "#111217", "#181b1f", "#d8d9da", "#8e8e99"
COLOURS = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#b877d9", "#5794f2", "#96d98d", "#ffee52", "#fade2a")
# Inches of a column and a row of Grafana's grid.
COLUMN, ROW = 0.62, 0.36
UNITS: dict[str, Callable[[float], str]] = {
    "percentunit": lambda v: f"{100 * v:.3g} %",
    "s": lambda v: f"{v:.3g} s",
    "bytes": lambda v: f"{v / 2**20:.3g} MiB",
    "Bps": lambda v: f"{v / 1e6:.3g} MB/s",
    "rowsps": lambda v: f"{v:.3g} rows/s",
    "cps": lambda v: f"{v:.3g} /s",
}


def draw(
    board: Path, server: Prometheus, fill: Callable[[str], str], begin: float, end: float, target: Path
) -> dict[str, int]:
    """Draws a board over [begin, end] into a PNG; returns the number of series that each panel has.

    Args:
        fill: puts values in place of the variables of a query.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    content = json.loads(board.read_text())
    places = [panel["gridPos"] for panel in content["panels"]]
    height = max(place["y"] + place["h"] for place in places)
    figure = pyplot.figure(figsize=(24 * COLUMN, height * ROW + 0.5), facecolor=BACK)
    figure.text(0.008, 1 - 0.3 / (height * ROW + 0.5), content["title"], color=TEXT, fontsize=15, weight="bold")
    found: dict[str, int] = {}
    for panel in content["panels"]:
        place, all_of_it = panel["gridPos"], height + 0.5 / ROW
        bottom = 1 - (place["y"] + place["h"] + 0.5 / ROW) / all_of_it
        box = (place["x"] / 24 + 0.004, bottom + 0.004, place["w"] / 24 - 0.008, place["h"] / all_of_it - 0.008)
        if panel["type"] == "row":
            figure.text(box[0], bottom + 0.006, panel["title"], color=DIM, fontsize=11)
            continue
        series = [
            (named(target_["legendFormat"], s), s)
            for target_ in panel["targets"]
            for s in ask(server, fill(target_["expr"]), bool(target_.get("instant")), begin, end)
        ]
        found[panel["title"]] = len(series)
        draw_panel(figure, box, panel, series, begin)
    figure.savefig(target, dpi=80, facecolor=BACK)
    pyplot.close(figure)
    return found


def ask(server: Prometheus, expr: str, instant: bool, begin: float, end: float) -> list[Series]:
    return server.ask(expr, at=end) if instant else server.ask(expr, start=begin, end=end)


def named(legend: str, series: Series) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda m: series.labels.get(m.group(1), ""), legend)


def draw_panel(figure: Any, box: Sequence[float], panel: Any, series: list[tuple[str, Series]], begin: float) -> None:
    unit = UNITS.get(panel.get("fieldConfig", {}).get("defaults", {}).get("unit", ""), lambda v: f"{v:.4g}")
    axes = figure.add_axes(box, facecolor=PANEL)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.02, 0.97, panel["title"], transform=axes.transAxes, color=TEXT, fontsize=9, va="top", weight="bold")
    for spine in axes.spines.values():
        spine.set_color("#2c3235")
    if not series:
        axes.text(0.5, 0.4, "no data", color=DIM, fontsize=9, ha="center", transform=axes.transAxes)
    elif panel["type"] == "timeseries":
        inside = (box[0] + 0.045 * 24 / 24, box[1] + box[3] * 0.3, box[2] - 0.055, box[3] * 0.52)
        draw_lines(figure.add_axes(inside, facecolor=PANEL), series, unit, begin)
        draw_legend(axes, [name for name, _ in series], box[2])
    elif panel["type"] in ("stat", "table"):
        draw_values(axes, series, unit, large=panel["type"] == "stat")
    else:
        inside = (box[0] + 0.075, box[1] + 0.01, box[2] - 0.14, box[3] * 0.84)
        draw_bars(figure.add_axes(inside, facecolor=PANEL), series, unit)


def draw_lines(axes: Any, series: list[tuple[str, Series]], unit: Callable[[float], str], begin: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for index, (_, one) in enumerate(series):
        points = [(at - begin, value) for at, value in one.points if math.isfinite(value)]
        axes.plot(*zip(*points, strict=True), color=COLOURS[index % len(COLOURS)], linewidth=1.3) if points else None
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} s"))
    axes.tick_params(colors=DIM, labelsize=7, length=0)
    axes.grid(color="#2c3235", linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_legend(axes: Any, names: Sequence[str], width: float) -> None:
    at, line = 0.02, 0.13
    for index, name in enumerate(names):
        # Of 7 points a letter is about a 220th of the picture's width.
        length = (len(name) + 3) / (220 * width)
        if at + length > 1.0:
            at, line = 0.02, line - 0.09
        if line > 0:
            colour = COLOURS[index % len(COLOURS)]
            axes.text(at, line, name, transform=axes.transAxes, color=colour, fontsize=7)
        at += length


def draw_bars(axes: Any, series: list[tuple[str, Series]], unit: Callable[[float], str]) -> None:
    shown = series[:14]
    names, values = [name for name, _ in shown], [one.value for _, one in shown]
    axes.barh(range(len(shown)), values, color=COLOURS[0], height=0.7)
    axes.set_yticks(range(len(shown)), names)
    axes.invert_yaxis()
    axes.set_xticks([])
    for index, value in enumerate(values):
        axes.text(value, index, f" {unit(value)}", color=TEXT, fontsize=7, va="center")
    axes.tick_params(colors=DIM, labelsize=7, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_values(axes: Any, series: list[tuple[str, Series]], unit: Callable[[float], str], *, large: bool) -> None:
    if large and len(series) == 1:
        text = unit(series[0][1].value)
        axes.text(0.5, 0.42, text, color=COLOURS[0], fontsize=17, ha="center", va="center", transform=axes.transAxes)
        return
    lines = [f"{name}  {unit(one.value)}" for name, one in series[:6]]
    axes.text(0.03, 0.72, "\n".join(lines), color=TEXT, fontsize=8, va="top", transform=axes.transAxes)
