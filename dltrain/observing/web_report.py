"""The report of one run: a page with its curves, what it shows of its work, where its time went and what broke.

    html = report_page(read_history(run.store, run.state()), now=time.time())
    report_facts(history)                 # the same as plain values, for --json

Pure: a history in, a page out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from html import escape
from typing import Any

import numpy as np
import yaml

from dltrain import __version__
from dltrain.observing.charts import Line, line_chart, short, stack_chart
from dltrain.observing.curves import Curve, means
from dltrain.observing.faults import Fault
from dltrain.observing.history import History
from dltrain.observing.page import Markup, card, data_url, details, document, only_table, section, table, tile
from dltrain.observing.reports import OVER, PHASES
from dltrain.observing.samples import SampleSet, ShownItem
from dltrain.observing.when import legend, stretches, timeline
from dltrain.observing.words import time_shares
from dltrain.wording import human_bytes, human_seconds, without_passwords

__all__ = ["figure_text", "report_facts", "report_page"]

_STATE_COLORS = {"finished": "c2", "running": "c1", "failed": "c4", "lost": "c4", "stopped": "c8"}
_SHARE_COLORS = {
    "training": "c2",
    "waiting for data": "c3",
    "starting": "c8",
    "saving checkpoints": "c5",
    "evaluating": "c6",
    "making steps again": "c4",
    "noticing faults": "c7",
    "recovering": "c10",
    "changing the number of workers": "c11",
    "waiting for machines": "c12",
}
_PHASES = {
    "data_wait": ("waiting for data", "c3"),
    "h2d": ("to the device", "c5"),
    "forward": ("forward", "c2"),
    "backward": ("backward", "c6"),
    "optimizer": ("optimizer", "c1"),
    "other": ("between steps", "c9"),
}
_COLORS = ("c1", "c3", "c2", "c5", "c4", "c6")
_MOST_FAULTS = 50
_STACK_POINTS = 120
_MOST_LOGGED = 32
# What a page holds of samples; the directory has all.
_MOST_SAMPLE_BYTES = 8 * 1024 * 1024
# Wide enough to be looked at by itself.
_WIDE_PIXELS, _SMALL_PIXELS = 700, 128


def report_page(history: History, now: float) -> str:
    """The page, whole.

    Args:
        now: Unix seconds, said on the page.
    """
    body = [
        _header(history, now),
        _error(history),
        _tiles(history),
        section("Learning", _grid(_learning(history))) or card("No step has been made yet.", kind="soft"),
        section("Samples", _samples(history)),
        section("Where the time went", _time(history), _grid(_speed(history))),
        section("What happened", _happened(history)),
        section("Profiles", _profiles(history)),
        section("Spec", card(details("as the run was last started", _spec_text(history)))),
        f"<footer>dltrain {__version__} &middot; {escape(history.url)}</footer>",
    ]
    return document(f"{history.name}: {history.status}", "\n".join(filter(None, body)))


def report_facts(history: History) -> dict[str, Any]:
    """What the page says, as plain values."""
    return {
        "run": history.name,
        "dir": history.url,
        "state": history.status,
        "step": history.step,
        "total_steps": int(history.state.get("total_steps", 0)),
        "samples": history.num_samples,
        "samples_per_second": round(history.rate, 1),
        "goodput": history.ledger.get("goodput", 0.0),
        "seconds": history.ledger.get("wall_seconds", 0.0),
        "loss": _final_loss(history),
        "eval": history.metrics,
        "best": history.best,
        "time": [
            {"what": s.what, "seconds": round(s.seconds, 3), "percent": s.percent}
            for s in time_shares(history.ledger.get("seconds", {}))
        ],
        "faults": [
            {
                "time": fault.time,
                "step": fault.step,
                "cause": fault.cause,
                "text": fault.text,
                "recovery_seconds": fault.recovery_seconds,
                "redone": fault.redone,
            }
            for fault in history.story.faults
        ],
        "shown": [{"step": s.step, "best": s.is_best, "items": len(s.items)} for s in history.samples],
        "profiles": [profile["file"] for profile in history.story.profiles],
        "error": str(history.state.get("error", "")),
    }


def figure_text(name: str, value: float) -> str:
    """A metric as a person reads it."""
    return f"{value:.2%}" if "accuracy" in name and 0 <= value <= 1 else short(value)


# ---- the head ----


def _header(history: History, now: float) -> str:
    color = _STATE_COLORS.get(history.status, "c3")
    ranks = int(history.state.get("world_size", 0))
    device = str(history.story.ready.get("device", ""))
    parameters = history.story.ready.get("num_parameters")
    words = [
        str(history.spec.get("task", "")),
        f"{short(parameters)} parameters" if parameters else "",
        f"{ranks} worker{'s' if ranks != 1 else ''}{f' on {device}' if device else ''}" if ranks else "",
        f"began {_clock_time(history.first_time)}" if history.first_time else "",
        f"{'written' if history.status in OVER else 'as it was at'} {_clock_time(now)}",
    ]
    return (
        f'<header><h1>{escape(history.name)}</h1><span class="chip {color}">{escape(history.status)}</span>'
        f'<div class="soft">{escape(" · ".join(filter(None, words)))}</div></header>'
    )


def _error(history: History) -> str:
    error = str(history.state.get("error") or "")
    if history.status == "lost":
        silent = human_seconds(float(history.state.get("silent_seconds", 0)))
        error = error or f"The driver has given no sign of life for {silent}. The same command resumes the run."
    return (
        card(f"<pre>{escape(error)}</pre>", "It ended with an error" if history.status == "failed" else "", "error")
        if error
        else ""
    )


def _tiles(history: History) -> str:
    total, ledger = int(history.state.get("total_steps", 0)), history.ledger
    tiles = []
    if best := history.best:
        step = f"at step {int(best['step']):,}"
        tiles.append(tile(f"best {best['metric']}", figure_text(best["metric"], float(best["value"])), step))
    for name, value in [(n, v) for n, v in history.metrics.items() if n != (best or {}).get("metric")][:3]:
        tiles.append(tile(name, figure_text(name, value), "last evaluation"))
    if len(history.steps):
        tiles.append(tile("training loss", short(_final_loss(history) or 0.0), "mean of the last steps"))
    tiles.append(tile("steps", f"{history.step:,}", f"of {total:,}" if total else ""))
    if history.rate:
        tiles.append(tile("samples/s", short(history.rate), "of the time in steps"))
    if "goodput" in ledger:
        spent = f"of {human_seconds(float(ledger['wall_seconds']))} in steps that count"
        tiles.append(tile("goodput", f"{float(ledger['goodput']):.0%}", spent))
    faults = len(history.story.faults)
    tiles.append(
        tile(
            "faults", str(faults), f"{sum(f.redone for f in history.story.faults):,} steps made again" if faults else ""
        )
    )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _final_loss(history: History) -> float | None:
    curve = history.steps.curve("loss").smooth()
    return curve.last if len(curve) else None


# ---- learning ----


def _grid(charts: Iterator[str]) -> str:
    found = "".join(charts)
    return f'<div class="grid">{found}</div>' if found else ""


def _learning(history: History) -> Iterator[str]:
    steps = history.steps
    bad = steps.not_finite("loss")
    yield line_chart(
        "Training loss", [_line("loss", steps.curve("loss"), "c1")], note=f"{bad:,} not finite" if bad else ""
    )
    parts = [name for name in steps.names if name.startswith("loss.")]
    yield line_chart(
        "Loss by network",
        [_line(name.removeprefix("loss."), steps.curve(name), _color(i)) for i, name in enumerate(parts)],
    )
    for name in dict.fromkeys(name for found in history.story.evals for name in found.metrics):
        yield _eval_chart(history, name)
    for name in history.logged.names[:_MOST_LOGGED]:
        yield line_chart(name, [_line(name, history.logged.curve(name), "c5")], note="logged by a callback")
    left = history.left_out
    yield line_chart(
        "Gradient norm",
        [_line("gradient norm", steps.curve("grad_norm"), "c6")],
        note=f"{left:,} steps changed no weights" if left else "",
    )
    yield line_chart("Learning rate", [Line("learning rate", steps.curve("learning_rate").thin(), "c8")], even=True)


def _eval_chart(history: History, name: str) -> str:
    found = [e for e in history.story.evals if name in e.metrics and np.isfinite(e.metrics[name])]
    curve = Curve(name, np.array([e.step for e in found], float), np.array([e.metrics[name] for e in found], float))
    if len(curve) == 1:
        return ""
    best = history.best
    note = (
        f"best {figure_text(name, float(best['value']))} at step {int(best['step']):,}"
        if best and best["metric"] == name
        else ""
    )
    return line_chart(f"Evaluation: {name}", [Line(name, curve.thin(), "c2", dots=len(curve) <= 60)], note=note)


def _line(label: str, curve: Curve, color: str) -> Line:
    """A noisy curve with its running mean."""
    mean = curve.smooth()
    return Line(label, mean.thin(), color, faint=curve.thin() if mean is not curve else None)


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


# ---- samples ----


def _samples(history: History) -> str:
    """The newest and the best ones, beside each other."""
    sets = [_sample_set(found, _MOST_SAMPLE_BYTES // len(history.samples)) for found in history.samples]
    found = "".join(filter(None, sets))
    return f'<div class="{"two" if len(sets) > 1 else "one"}">{found}</div>' if found else ""


def _sample_set(found: SampleSet, room: int) -> str:
    figures = ", ".join(f"{name} {figure_text(name, value)}" for name, value in found.metrics.items())
    best = " (the best)" if found.is_best else ""
    shown, left_out = [], list(found.left_out)
    for item in found.items:
        room -= len(item.data)
        if room < 0:
            left_out.append(f"{item.caption or item.file}: {human_bytes(len(item.data))}; it is in {item.file}")
        else:
            shown.append(_item(item))
    notes = "".join(f'<p class="soft">left out: {escape(text)}</p>' for text in left_out)
    head = f'<p class="soft">{escape(figures)}</p>' if figures else ""
    body = f'{head}<div class="shown">{"".join(shown)}</div>{notes}' if shown or notes else ""
    return card(body, f"Step {found.step:,}{best}") if body else ""


def _item(item: ShownItem) -> str:
    caption = f"<figcaption>{escape(item.caption)}</figcaption>" if item.caption else ""
    kind, _, sub = item.media_type.partition("/")
    url, wide = data_url(item.media_type, item.data), ""
    name = escape(item.file.rpartition("/")[2], quote=True)
    if kind == "image":
        width = _pixel_width(item.data)
        wide = "wide" if width > _WIDE_PIXELS else ""
        small = ' class="small"' if 0 < width <= _SMALL_PIXELS else ""
        body = f'<img{small} src="{url}" alt="{escape(item.caption or name, quote=True)}">'
    elif kind == "audio" and sub != "midi":
        body = f'<audio controls preload="none" src="{url}"></audio>'
    elif kind == "video":
        body = f'<video controls src="{url}"></video>'
    elif item.media_type == "text/html":
        body, wide = only_table(item.data.decode(errors="replace")), "wide"
    elif kind == "text":
        body = f"<pre>{escape(item.data.decode(errors='replace'))}</pre>"
    else:
        body = f'<a download="{name}" href="{url}">{name}</a> <small>{human_bytes(len(item.data))}</small>'
    return f'<figure class="{wide}">{caption}{body}</figure>'


def _pixel_width(data: bytes) -> int:
    """Of a PNG or GIF; 0 for others."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return int.from_bytes(data[16:20], "big")
    return int.from_bytes(data[6:8], "little") if data[:4] == b"GIF8" else 0


# ---- time ----


def _time(history: History) -> str:
    cards = [_shares(history.ledger), _phases(history)]
    found = "".join(filter(None, cards))
    return f'<div class="two" style="margin-bottom:12px">{found}</div>' if found else ""


def _shares(ledger: Mapping[str, Any]) -> str:
    """Goodput by cause: of the whole run."""
    shares = time_shares(ledger.get("seconds", {}))
    if not shares:
        return ""
    total = sum(share.seconds for share in shares)
    colors = {share.what: _SHARE_COLORS.get(share.what, "c9") for share in shares}
    bar = _bar([(s.seconds / total, colors[s.what], f"{s.what}: {human_seconds(s.seconds)}") for s in shares])
    rows = [
        (
            _swatch(colors[s.what], s.what),
            human_seconds(s.seconds) if s.seconds >= 1 else f"{s.seconds:.2f} s",
            f"{s.percent} %",
        )
        for s in shares
    ]
    return card(bar + table(("", "time", "share"), rows, numbers=(1, 2)), f"The run: {human_seconds(total)}")


def _phases(history: History) -> str:
    """A step by phase, on rank 0, over all steps that count."""
    steps = history.steps
    if not len(steps):
        return ""
    mean = {phase: float(steps.raw(f"phase.{phase}").mean()) for phase in PHASES}
    total = sum(mean.values()) or 1.0
    found = [(phase, seconds) for phase, seconds in mean.items() if seconds / total >= 0.0005]
    bar = _bar([(s / total, _PHASES[p][1], f"{_PHASES[p][0]}: {_milliseconds(s)}") for p, s in found])
    rows = [(_swatch(_PHASES[p][1], _PHASES[p][0]), _milliseconds(s), f"{s / total:.1%}") for p, s in found]
    return card(bar + table(("", "mean", "share"), rows, numbers=(1, 2)), f"A step on rank 0: {_milliseconds(total)}")


def _speed(history: History) -> Iterator[str]:
    steps = history.steps
    names = [f"phase.{phase}" for phase in PHASES]
    x, values = means(steps, names, _STACK_POINTS)
    yield stack_chart("A step by phase", x, values * 1000, [_PHASES[p] for p in PHASES], note="ms, rank 0")
    yield line_chart("Samples per second", [_line("samples/s", steps.curve("rate"), "c2")])
    waits = steps.curve("data_wait_seconds")
    yield line_chart("Waiting for data", [_line("seconds", waits, "c3")], note="seconds of a step, the slowest rank's")


def _bar(parts: list[tuple[float, str, str]]) -> str:
    inner = "".join(
        f'<i class="{c}" style="flex:{share:.5f}" title="{escape(t, quote=True)}"></i>' for share, c, t in parts
    )
    return f'<div class="bar">{inner}</div>'


def _swatch(color: str, text: str) -> Markup:
    return Markup(f'<i class="sw {color}"></i>{escape(text)}')


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 10 else human_seconds(seconds)


# ---- what happened ----


def _happened(history: History) -> str:
    story = history.story
    picture = timeline(story, history.first_time, history.last_time)
    if not picture:
        return ""
    count = sum(mark.what == "checkpoint" for mark in story.marks)
    words = [
        _count(len(story.attempts), "attempt"),
        _count(len(story.faults), "fault"),
        _count(count, "checkpoint"),
        _count(len(story.evals), "evaluation"),
    ]
    return card(f'<div class="soft">{", ".join(words)}</div>{picture}{legend(story)}') + _fault_table(history)


def _fault_table(history: History) -> str:
    faults = history.story.faults
    if not faults:
        return ""
    up = stretches(history.story, history.first_time, history.last_time)
    rows = [
        (
            human_seconds(up.elapsed(fault.time)),
            f"{fault.step:,}",
            Markup(f"{escape(fault.what)}<br><small>{escape(fault.text)}</small>{_more(fault)}"),
            "" if fault.recovery_seconds is None else f"{fault.recovery_seconds:.1f} s",
            f"{fault.redone:,}",
        )
        for fault in faults[-_MOST_FAULTS:]
    ]
    earlier = len(faults) - len(rows)
    note = f'<p class="soft">and {earlier:,} before these</p>' if earlier else ""
    head = ("after", "step", "what", "next step", "made again")
    return card(table(head, rows, numbers=(0, 1, 3, 4), wrap=2) + note, "Faults")


def _more(fault: Fault) -> str:
    return details("what it left", fault.detail) if fault.detail else ""


def _profiles(history: History) -> str:
    found = history.story.profiles
    if not found:
        return ""
    rows = [
        (
            Markup(f'<a href="{escape(p["file"], quote=True)}">{escape(p["file"])}</a>'),
            p["rank"],
            f"{p['step']:,} - {p['last']:,}",
            human_bytes(p["num_bytes"]),
        )
        for p in found
    ]
    note = '<p class="soft">Traces in Chrome\'s format: open them in chrome://tracing, or in the Perfetto viewer.</p>'
    return card(table(("file", "rank", "steps", "size"), rows, numbers=(1, 2, 3), wrap=0) + note)


# ---- small things ----


def _spec_text(history: History) -> str:
    return without_passwords(str(yaml.safe_dump(history.spec, sort_keys=False)))


def _clock_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"
