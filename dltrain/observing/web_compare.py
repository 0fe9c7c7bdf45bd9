"""Several runs beside each other: what differs between their specs, what came of each, curves on top of each other.

    html = compare_page([read_history(...), read_history(...)], now)
    print_comparison(compare_facts(histories))

Pure but for `print_comparison`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from dltrain import __version__
from dltrain.observing.charts import Line, line_chart, short
from dltrain.observing.curves import Curve
from dltrain.observing.history import History
from dltrain.observing.page import Markup, card, document, section, table
from dltrain.observing.web_report import figure_text, report_facts
from dltrain.wording import human_seconds

__all__ = ["compare_facts", "compare_page", "print_comparison"]

_COLORS = tuple(f"c{i}" for i in (1, 3, 2, 5, 4, 6, 7, 8, 10, 11, 12, 9))
# Names of a run, not settings of it.
_NOT_SETTINGS = ("name", "runs")
_MISSING = "-"
_SPEED = {
    "grad_norm": "Gradient norm",
    "rate": "Samples per second",
    "data_wait_seconds": "Waiting for data, seconds of a step",
}


def compare_facts(histories: Sequence[History]) -> dict[str, Any]:
    """What differs, and the figures: {"runs", "differences": {field: [value of each]}, "figures": [facts of each]}."""
    return {
        "runs": _labels(histories),
        "differences": _differences([h.spec for h in histories]),
        "figures": [report_facts(history) for history in histories],
    }


def compare_page(histories: Sequence[History], now: float) -> str:
    """The page, whole; `now` in Unix seconds."""
    labels = _labels(histories)
    found = compare_facts(histories)
    title = " vs ".join(labels) if len(labels) <= 3 else f"{len(labels)} runs"
    over = _x_axis(histories)
    note = "Steps of these runs are of different sizes: curves are over rows.\n" if over else ""
    keys = "".join(
        f'<span class="key"><i class="{_color(i)}"></i>{escape(label)}</span>' for i, label in enumerate(labels)
    )
    body = [
        f'<header><h1>{escape(title)}</h1><div class="soft">as of {_time(now)}</div></header>',
        section("Figures", card(_figures(labels, found["figures"]))),
        section("What differs between their specs", card(_difference_table(labels, found["differences"]))),
        section(
            "Curves", f'<div class="legend" style="margin-bottom:10px">{keys}</div>', *_curves(histories, labels, over)
        ),
        f"<footer>dltrain {__version__}{f' &middot; {escape(note)}' if note else ''}</footer>",
    ]
    return document(title, "\n".join(body))


def _labels(histories: Sequence[History]) -> list[str]:
    """Names, with the directory where two are called the same."""
    names = [history.name for history in histories]
    return [h.url if names.count(h.name) > 1 else h.name for h in histories]


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _time(now: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(now).astimezone().strftime("%Y-%m-%d %H:%M %Z")


# ---- what differs ----


def _differences(specs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    flat = [dict(_flatten(spec)) for spec in specs]
    names = dict.fromkeys(name for each in flat for name in each)
    found = {name: [each.get(name) for each in flat] for name in names if name not in _NOT_SETTINGS}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields by their dotted names."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def _difference_table(labels: Sequence[str], differences: Mapping[str, Sequence[Any]]) -> str:
    if not differences:
        return '<p class="soft">nothing: they were last started with the same settings</p>'
    rows = [(name, *(_plain(value) for value in values)) for name, values in differences.items()]
    return table(("", *labels), rows)


def _plain(value: Any) -> str:
    return _MISSING if value is None else str(value)


# ---- what came of them ----


def _figure_rows(figures: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str], int]]:
    """Name, text for each run, and which of them is the best one; -1 where that is nobody's business."""
    yield "state", [str(f["state"]) for f in figures], -1
    yield "steps", [f"{f['step']:,}" for f in figures], -1
    yield "samples", [f"{f['samples']:,}" for f in figures], -1
    for name in dict.fromkeys(f["best"]["metric"] for f in figures if f["best"]):
        best = [f["best"] if f["best"] and f["best"]["metric"] == name else None for f in figures]
        texts = [f"{figure_text(name, b['value'])} at step {b['step']:,}" if b else _MISSING for b in best]
        yield f"best {name}", texts, -1
    for name in dict.fromkeys(name for f in figures for name in f["eval"]):
        yield name, [figure_text(name, f["eval"][name]) if name in f["eval"] else _MISSING for f in figures], -1
    yield "training loss", [_MISSING if f["loss"] is None else short(f["loss"]) for f in figures], -1
    rates = [float(f["samples_per_second"]) for f in figures]
    yield "samples/s", [short(rate) for rate in rates], _highest(rates)
    goodputs = [float(f["goodput"]) for f in figures]
    yield "goodput", [f"{goodput:.0%}" for goodput in goodputs], _highest(goodputs)
    yield "time", [human_seconds(float(f["seconds"])) for f in figures], -1
    yield "faults", [str(len(f["faults"])) for f in figures], -1
    yield "steps made again", [f"{sum(fault['redone'] for fault in f['faults']):,}" for f in figures], -1


def _highest(values: Sequence[float]) -> int:
    """Which is the highest, where they differ."""
    return int(np.argmax(values)) if max(values) > min(values) else -1


def _figures(labels: Sequence[str], figures: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (name, *(Markup(f"<b>{escape(text)}</b>") if i == best else text for i, text in enumerate(texts)))
        for name, texts, best in _figure_rows(figures)
    ]
    return table(("", *labels), rows)


# ---- curves ----


def _x_axis(histories: Sequence[History]) -> str:
    """Steps, unless they are of different sizes: then rows."""
    sizes = {h.spec.get("batch", {}).get("global") for h in histories}
    return "position" if len(sizes) > 1 else ""


def _curves(histories: Sequence[History], labels: Sequence[str], over: str) -> Iterator[str]:
    x_label = "rows" if over else "step"
    charts = [line_chart("Training loss", _overlaid(histories, labels, "loss", over), x_label, "running mean")]
    for name in dict.fromkeys(n for h in histories for e in h.story.evals for n in e.metrics):
        charts.append(line_chart(f"Evaluation: {name}", list(_eval_lines(histories, labels, name, over)), x_label))
    rates = [Line(labels[i], h.steps.curve("learning_rate", over).thin(), _color(i)) for i, h in enumerate(histories)]
    charts.append(line_chart("Learning rate", rates, x_label, even=True))
    for column, title in _SPEED.items():
        charts.append(line_chart(title, _overlaid(histories, labels, column, over), x_label))
    for name in dict.fromkeys(name for h in histories for name in h.logged.names):
        lines = [Line(labels[i], h.logged.curve(name).thin(), _color(i)) for i, h in enumerate(histories)]
        charts.append(line_chart(name, lines, "step", "logged by a callback"))
    yield f'<div class="grid">{"".join(charts)}</div>'


def _overlaid(histories: Sequence[History], labels: Sequence[str], column: str, over: str) -> list[Line]:
    return [
        Line(labels[i], history.steps.curve(column, over).smooth().thin(), _color(i))
        for i, history in enumerate(histories)
    ]


def _eval_lines(histories: Sequence[History], labels: Sequence[str], name: str, over: str) -> Iterator[Line]:
    for i, history in enumerate(histories):
        found = [e for e in history.story.evals if name in e.metrics and np.isfinite(e.metrics[name])]
        x = np.array([e.step for e in found], float)
        if over and len(history.steps):
            x = np.interp(x, history.steps.steps, history.steps.raw(over))
        curve = Curve(name, x, np.array([e.metrics[name] for e in found], float))
        yield Line(labels[i], curve.thin(), _color(i), dots=len(curve) <= 60)


# ---- on the terminal ----


def print_comparison(found: Mapping[str, Any]) -> None:
    """Two tables: what differs, and the figures."""
    from rich.console import Console
    from rich.markup import escape as plain
    from rich.table import Table

    console = Console(highlight=False)
    names = [plain(name) for name in found["runs"]]
    differing = Table("differs", *names, title="specs", title_justify="left")
    for field, values in found["differences"].items():
        differing.add_row(plain(field), *(plain(_plain(value)) for value in values))
    console.print(differing if found["differences"] else "their specs are the same")
    figures = Table("", *names, title="figures", title_justify="left")
    for name, texts, best in _figure_rows(found["figures"]):
        figures.add_row(name, *(f"[bold]{plain(t)}[/]" if i == best else plain(t) for i, t in enumerate(texts)))
    console.print(figures)
