"""The timeline of a run as markup: attempts as bars, faults and checkpoints as marks, pauses cut short.

    timeline(history.story, first=history.first_time, last=history.last_time)

Pure. Places are percents, so that it is as readable on a phone as on a wall.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from dltrain.observing.faults import Attempt, Story
from dltrain.wording import human_seconds

__all__ = ["Stretches", "timeline"]

# What a pause takes of the width, whatever it lasted, and when a stop is a pause.
_GAP_PERCENT = 3.0
_GAP_SECONDS = 60.0
_MOST_MARKS = 300
_LABEL_FROM_PERCENT = 9.0
_ROUND_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400, 172800, 604800)
_MARK_COLORS = {"checkpoint": "c5", "lost checkpoint": "c4", "drain": "c3", "resize": "c11", "stop": "c8"}


class Stretches:
    """Times in which the run was up, laid side by side on a line from 0 to 100.

    Args:
        spans: (start, end) in Unix seconds, in ascending order.
    """

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        self.spans: list[tuple[float, float]] = []
        for start, end in spans:
            if self.spans and start - self.spans[-1][1] < _GAP_SECONDS:
                self.spans[-1] = (self.spans[-1][0], max(end, self.spans[-1][1]))
            else:
                self.spans.append((start, end))
        gaps = len(self.spans) - 1
        self._gap = _GAP_PERCENT if gaps * _GAP_PERCENT <= 50 else 50 / max(1, gaps)
        self.seconds = sum(end - start for start, end in self.spans)
        self._scale = (100 - max(0, gaps) * self._gap) / (self.seconds or 1.0)

    def __call__(self, time: float) -> float:
        """Where a time lies."""
        at = 0.0
        for start, end in self.spans:
            if time <= end:
                return at + max(0.0, time - start) * self._scale
            at += (end - start) * self._scale + self._gap
        return 100.0

    def gaps(self) -> Iterator[tuple[float, float, float]]:
        """Where each pause lies, its width, and how long it was."""
        for (_, end), (start, _) in zip(self.spans, self.spans[1:], strict=False):
            yield self(end), self._gap, start - end

    def elapsed(self, time: float) -> float:
        """Seconds that the run was up before."""
        return sum(max(0.0, min(time, end) - start) for start, end in self.spans)


def stretches(story: Story, first: float, last: float) -> Stretches:
    """When a run was up: from each launch to its end."""
    ends = [mark.time for mark in story.marks if mark.what == "end"]
    starts = sorted({first, *story.launches, *(a.start for a in story.attempts)})
    spans: list[tuple[float, float]] = []
    for start, following in zip(starts, [*starts[1:], float("inf")], strict=True):
        alive = [a.end for a in story.attempts if start <= a.start < following]
        stopped = [end for end in ends if start <= end < following]
        end = max([start, *alive, *stopped])
        spans.append((start, end if following < float("inf") else max(end, last)))
    # Between two attempts of one launch the run was being recovered: that is no pause.
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if merged and start not in story.launches and not any(merged[-1][0] <= e <= start for e in ends):
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return Stretches(merged)


def timeline(story: Story, first: float, last: float) -> str:
    """The picture; empty where nothing was started."""
    if not story.attempts:
        return ""
    at = stretches(story, first, last)
    parts = [*_launches(story, at), *(part for attempt in story.attempts for part in _attempt(attempt, at))]
    for place, width, seconds in at.gaps():
        where = f"left:{place:.2f}%;width:{width:.2f}%"
        parts.append(f'<div class="gap" style="{where}" title="paused for {human_seconds(seconds)}"></div>')
    parts += _marks(story, at)
    for fault in story.faults:
        parts.append(
            f'<div class="fault" style="left:{at(fault.time):.2f}%" '
            f'title="{escape(f"{fault.what}: {fault.text}", quote=True)}"></div>'
        )
    return f'<div class="when">{"".join(parts)}<div class="axis"></div>{"".join(_labels(at))}</div>'


def _launches(story: Story, at: Stretches) -> Iterator[str]:
    """From a launch to its first attempt: planning and getting machines."""
    for launch in story.launches:
        first = next((a.start for a in story.attempts if a.start >= launch), launch)
        left, right = at(launch), at(first)
        if right > left:
            yield f'<div class="up" style="left:{left:.2f}%;width:{right - left:.2f}%" title="getting workers"></div>'


def _attempt(attempt: Attempt, at: Stretches) -> Iterator[str]:
    """Getting up, then training."""
    began = attempt.first_time if attempt.first_time is not None else attempt.end
    left, middle, right = at(attempt.start), at(min(began, attempt.end)), at(attempt.end)
    workers = f"{attempt.num_ranks} worker{'s' if attempt.num_ranks != 1 else ''}"
    source = "a snapshot in memory" if attempt.from_memory else "a checkpoint" if attempt.step else "the beginning"
    title = escape(f"attempt {attempt.number}: {workers}, from step {attempt.step:,} ({source})", quote=True)
    if middle > left:
        yield f'<div class="up" style="left:{left:.2f}%;width:{middle - left:.2f}%" title="{title}: starting"></div>'
    if right > middle:
        # What does not fit is told by the title alone.
        label = workers if right - middle >= _LABEL_FROM_PERCENT else ""
        yield f'<div class="run" style="left:{middle:.2f}%;width:{right - middle:.2f}%" title="{title}">{label}</div>'


def _marks(story: Story, at: Stretches) -> Iterator[str]:
    shown = [mark for mark in story.marks if mark.what in _MARK_COLORS]
    # Checkpoints are many: of a long run every so-manieth.
    often = [mark for mark in shown if mark.what == "checkpoint"]
    stride = max(1, -(-len(often) // _MOST_MARKS))
    for mark in (*(m for m in shown if m.what != "checkpoint"), *often[::stride]):
        yield (
            f'<div class="tickmark {_MARK_COLORS[mark.what]}" style="left:{at(mark.time):.2f}%" '
            f'title="{escape(mark.text, quote=True)}"></div>'
        )


def _labels(at: Stretches) -> Iterator[str]:
    """Time elapsed, at the ends and three places between."""
    start, end = at.spans[0][0], at.spans[-1][1]
    yield '<div class="label first" style="left:0">0 s</div>'
    if len(at.spans) == 1:
        every = next((s for s in _ROUND_SECONDS if (end - start) / s <= 4), _ROUND_SECONDS[-1] * 10)
        # The last place belongs to the end.
        for seconds in range(every, int(0.88 * (end - start)), every):
            yield f'<div class="label" style="left:{at(start + seconds):.2f}%">{human_seconds(seconds)}</div>'
    yield f'<div class="label last" style="left:100%">{human_seconds(at.seconds)}</div>'


def legend(story: Story) -> str:
    """What the marks mean, of those that there are."""
    kinds = [*dict.fromkeys(m.what for m in story.marks if m.what in _MARK_COLORS)]
    keys = [("c2", "training"), ("c9", "starting"), *(("c4", "fault") for _ in story.faults[:1])]
    keys += [(_MARK_COLORS[kind], kind) for kind in kinds]
    return (
        f'<div class="legend">{"".join(f"""<span class="key"><i class="{c}"></i>{t}</span>""" for c, t in keys)}</div>'
    )
