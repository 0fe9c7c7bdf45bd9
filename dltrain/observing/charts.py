"""Charts as inline SVG: lines over steps, and a stack of areas. Readable without JavaScript, in light and dark.

    line_chart("Training loss", [Line("loss", curve.smooth(), "c1", faint=curve)])
    stack_chart("A step by phase", x, values, [("forward", "c3"), ...], unit="ms")

Pure: curves in, markup out. Colours are classes (c1, c2, ...) that the page's style sheet gives a colour in each theme.
Every text that comes from outside is escaped here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from dltrain.observing.curves import Curve

__all__ = ["Line", "figure", "line_chart", "short", "stack_chart"]

# A picture's own units; the page scales it.
_WIDTH, _HEIGHT = 400, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 22
_LOG_FROM = 100.0
_TICKS = 4

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """A curve with its label and the class of its colour; `faint` is drawn behind it, `dots` on it."""

    label: str
    curve: Curve
    color: str
    faint: Curve | None = None
    dots: bool = False


@dataclass(frozen=True)
class _Scale:
    """Values to places in a picture, evenly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: Numbers) -> Numbers:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        values = np.log10(np.maximum(value, self.low)) if self.log else value
        return self.start + (values - low) / ((high - low) or 1.0) * (self.end - self.start)

    def at(self, value: float) -> float:
        """Of one value."""
        return float(self(np.array([value]))[0])


def short(value: float, digits: int = 3) -> str:
    """A number in few characters: 12.5k, 0.034, 3e-5."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.{digits + 1}g}{unit}"
    if size >= 1000:
        return f"{value:,.{max(0, digits - 4)}f}"
    return (
        f"{value:.{digits}g}" if size >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    )


def line_chart(title: str, lines: Sequence[Line], x_label: str = "step", note: str = "", even: bool = False) -> str:
    """A figure of curves that share axes; empty where none has two points.

    Positive values that span two powers of ten get a logarithmic axis, unless it is to be `even`.
    """
    shown = [line for line in lines if len(line.curve)]
    if not any(len(line.curve) > 1 for line in shown):
        return ""
    ys = np.concatenate([line.curve.y for line in shown])
    xs = np.concatenate([line.curve.x for line in shown])
    log = bool(not even and ys.min() > 0 and ys.max() / ys.min() >= _LOG_FROM)
    x = _Scale(float(xs.min()), float(xs.max()), _LEFT, _WIDTH - _RIGHT)
    ticks = _log_ticks(ys.min(), ys.max()) if log else _ticks(ys.min(), ys.max())
    y = _Scale(min(ticks[0], ys.min()), max(ticks[-1], ys.max()), _HEIGHT - _BOTTOM, _TOP, log)
    parts = [*_axes(x, y, ticks), *(part for line in shown for part in _draw(line, x, y))]
    data = [{"label": line.label, "color": line.color, **_points(line.curve)} for line in shown]
    legend = [(line.label, line.color, short(line.curve.last)) for line in shown]
    notes = "; ".join(filter(None, ["logarithmic" if log else "", note]))
    return figure(title, notes, _svg(title, parts, x, y, data, x_label), legend if len(shown) > 1 else [])


def stack_chart(title: str, x: Numbers, values: Numbers, parts: Sequence[tuple[str, str]], note: str = "") -> str:
    """Areas on top of each other.

    Args:
        x: (points,); values: (parts, points), none of them negative; parts: label and colour of each.
    """
    if len(x) < 2:
        return ""
    tops = values.cumsum(axis=0)
    ticks = _ticks(0.0, float(tops[-1].max()))
    xs = _Scale(float(x[0]), float(x[-1]), _LEFT, _WIDTH - _RIGHT)
    ys = _Scale(0.0, max(ticks[-1], float(tops[-1].max())), _HEIGHT - _BOTTOM, _TOP)
    drawn = [*_axes(xs, ys, ticks)]
    below = np.zeros(len(x))
    for (_, color), top in zip(parts, tops, strict=True):
        path = f"{_path(xs(x), ys(top))}L{_path(xs(x)[::-1], ys(below)[::-1])[1:]}Z"
        drawn.append(f'<path class="area {color}" d="{path}"/>')
        below = top
    data = [
        {"label": label, "color": color, **_points(Curve(label, x, row))}
        for (label, color), row in zip(parts, values, strict=True)
    ]
    legend = [(label, color, "") for label, color in parts]
    return figure(title, note, _svg(title, drawn, xs, ys, data, "step", stacked=True), legend)


def figure(title: str, note: str, svg: str, legend: Sequence[tuple[str, str, str]] = ()) -> str:
    """A picture with a heading and its legend: label, colour and last value of each."""
    entries = "".join(
        f'<span class="key"><i class="{color}"></i>{escape(label)}{f" <b>{escape(value)}</b>" if value else ""}</span>'
        for label, color, value in legend
    )
    small = f" <small>{escape(note)}</small>" if note else ""
    below = f'<div class="legend">{entries}</div>' if entries else ""
    return f"<figure><figcaption>{escape(title)}{small}</figcaption>{svg}{below}</figure>"


# ---- inside ----


def _svg(
    title: str, parts: Sequence[str], x: _Scale, y: _Scale, data: object, x_label: str, stacked: bool = False
) -> str:
    """The picture; what its script needs to tell values under the pointer is in `data-chart`."""
    chart = {
        "x": [x.low, x.high, x.start, x.end],
        "y": [y.low, y.high, y.start, y.end, int(y.log)],
        "width": _WIDTH,
        "xLabel": x_label,
        "stacked": stacked,
        "lines": data,
    }
    label = f'<text class="tick" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{escape(x_label)}</text>'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title, quote=True)}" '
        f'data-chart="{escape(json.dumps(chart, separators=(",", ":")), quote=True)}">{"".join(parts)}{label}</svg>'
    )


def _axes(x: _Scale, y: _Scale, ticks: Sequence[float]) -> Iterator[str]:
    for tick, label in zip(ticks, _labels(ticks), strict=True):
        at = f"{y.at(tick):.1f}"
        yield f'<path class="grid" d="M{_LEFT} {at}H{_WIDTH - _RIGHT}"/>'
        yield f'<text class="tick" x="{_LEFT - 6}" y="{at}" dy=".32em" text-anchor="end">{label}</text>'
    for tick in _ticks(x.low, x.high, inside=True):
        # The last place belongs to the axis' name.
        if x.at(tick) < _WIDTH - 60:
            yield f'<text class="tick" x="{x.at(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{short(tick)}</text>'


def _draw(line: Line, x: _Scale, y: _Scale) -> Iterator[str]:
    if line.faint is not None and len(line.faint) > 1:
        low, high = sorted((y.start, y.end))
        # What lies outside of the axes is cut off, not drawn over the text beside them.
        faint = np.clip(y(line.faint.y), low, high)
        yield f'<path class="faint {line.color}" d="{_path(x(line.faint.x), faint)}"/>'
    xs, ys = x(line.curve.x), y(line.curve.y)
    yield f'<path class="line {line.color}" d="{_path(xs, ys)}"/>'
    if line.dots or len(line.curve) == 1:
        yield "".join(
            f'<circle class="dot {line.color}" cx="{cx:.1f}" cy="{cy:.1f}" r="2.2"/>'
            for cx, cy in zip(xs, ys, strict=True)
        )


def _path(xs: Numbers, ys: Numbers) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


def _points(curve: Curve) -> dict[str, list[float]]:
    return {"x": [float(f"{v:.9g}") for v in curve.x], "y": [float(f"{v:.4g}") for v in curve.y]}


def _labels(ticks: Sequence[float]) -> list[str]:
    """With as many digits as it takes to tell them apart."""
    found = [[short(tick, digits) for tick in ticks] for digits in range(3, 8)]
    return next((labels for labels in found if len(set(labels)) == len(ticks)), found[-1])


def _ticks(low: float, high: float, inside: bool = False) -> list[float]:
    """Round numbers from at most `low` to at least `high`; `inside`: those between them."""
    # What differs by rounding alone is level.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first, last = (
        (math.ceil(low / step), math.floor(high / step))
        if inside
        else (
            math.floor(low / step),
            math.ceil(high / step),
        )
    )
    return [n * step for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around them, some left out where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, -(-(last - first) // 6))
    return [10.0**n for n in range(first, last + stride, stride)]
