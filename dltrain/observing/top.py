"""What `dltrain top` shows: a live run in a terminal of 80 columns.

    frame(state, ledger, ranks, 80, steps=lines, now=time.time())      # a rich renderable
    facts(state, ledger, ranks, steps, now)                            # the same as plain values, for --json

Pure: what it is given is read by observing.live. Bars are letters, so that a terminal without colours, or one that
knows ASCII alone, shows as much.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dltrain.observing.reports import OVER, PHASES
from dltrain.observing.words import age_of_checkpoint, restarts_by_cause, time_shares, told
from dltrain.wording import human_seconds

__all__ = ["OWN_WORK", "STRAGGLER_RATIO", "RankTimes", "facts", "frame"]

# A collective makes every rank wait for the slowest: only what a rank does before it tells them apart.
OWN_WORK = ("data_wait", "forward")
STRAGGLER_RATIO = 1.3
_MOST_RANKS = 8
_STYLES = {"running": "bold green", "finished": "bold green", "failed": "bold red", "lost": "bold red"}
_LETTERS = {
    "data_wait": ("d", "yellow", "data wait"),
    "h2d": ("h", "magenta", "to device"),
    "forward": ("f", "green", "forward"),
    "backward": ("b", "cyan", "backward"),
    "optimizer": ("o", "blue", "optimizer"),
    "other": (".", "white", "other"),
}


@dataclass(frozen=True)
class RankTimes:
    """What a rank has counted, over its life or since it was looked at before: steps, and seconds by phase."""

    steps: float
    phases: Mapping[str, float]

    def since(self, before: RankTimes | None) -> RankTimes:
        """What was added since; all of it when nothing was, or when it began anew."""
        if before is None or self.steps <= before.steps:
            return self
        return RankTimes(
            self.steps - before.steps, {name: n - before.phases.get(name, 0.0) for name, n in self.phases.items()}
        )


# ---- as plain values ----


def facts(
    state: Mapping[str, Any],
    ledger: Mapping[str, Any] | None,
    metrics: Mapping[int, RankTimes],
    steps: Sequence[Mapping[str, Any]],
    now: float,
) -> dict[str, Any]:
    """All that `frame` shows.

    Args:
        state: state.json; ledger: ledger.json, None before it is there.
        metrics: rank -> its times; empty where the run's metrics can't be reached: then rank 0's are those of `steps`.
        steps: the newest lines of steps.jsonl, oldest first.
        now: Unix seconds.
    """
    step, total = int(state.get("step", 0)), int(state.get("total_steps", 0))
    pace, rate = _pace(steps)
    ledger = ledger or {}
    return {
        "run": state["run"],
        "state": state["state"],
        "step": step,
        "total_steps": total,
        "eta_seconds": round((total - step) * pace, 1) if pace and state["state"] == "running" else None,
        "loss": steps[-1]["loss"] if steps else None,
        "loss_recent": statistics.fmean(float(line["loss"]) for line in steps) if steps else None,
        "samples_per_second": round(rate or float(state.get("samples_per_second", 0.0)), 1),
        "world_size": int(state.get("world_size", 0)),
        "nodes": len({worker["node"] for worker in state.get("workers", ())}),
        "goodput": ledger.get("goodput", state.get("goodput", 0.0)),
        "checkpoint_step": int(state.get("checkpoint_step", -1)),
        "checkpoint_age_seconds": age_of_checkpoint(state, now),
        "restarts": int(state.get("restarts", 0)),
        "restarts_by_cause": restarts_by_cause(ledger.get("counters", {})),
        "time": [
            {"what": s.what, "seconds": s.seconds, "percent": s.percent} for s in time_shares(ledger.get("seconds", {}))
        ],
        "ranks_from": "metrics" if metrics else "steps",
        "ranks": _ranks(metrics or _rank_of_lines(steps), state.get("workers", ())),
        "heartbeat_age_seconds": round(max(0.0, now - float(state["heartbeat"])), 1) if "heartbeat" in state else None,
        "told": told(state, ledger, now),
        "error": state.get("error", ""),
    }


def _pace(steps: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Seconds of a step by the wall clock, what comes between steps included, and samples per second; 0: unknown."""
    seconds = float(steps[-1]["time"]) - float(steps[0]["time"]) if len(steps) > 1 else 0.0
    if seconds <= 0:
        return 0.0, 0.0
    return seconds / (len(steps) - 1), sum(line["samples"] for line in steps[1:]) / seconds


def _rank_of_lines(steps: Sequence[Mapping[str, Any]]) -> dict[int, RankTimes]:
    """Rank 0's times, which are in every line."""
    if not steps:
        return {}
    return {0: RankTimes(len(steps), {name: sum(line["phases"].get(name, 0.0) for line in steps) for name in PHASES})}


def _ranks(metrics: Mapping[int, RankTimes], workers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of a step by phase on each rank, and its own work over the median's."""
    nodes = {worker["rank"]: worker["node"] for worker in workers}
    known = {rank: times for rank, times in sorted(metrics.items()) if times.steps > 0}
    phases = {rank: {name: t.phases.get(name, 0.0) / t.steps for name in PHASES} for rank, t in known.items()}
    own = {rank: sum(each[name] for name in OWN_WORK) for rank, each in phases.items()}
    # Of two the faster one is the measure: the mean of both would hide the slower.
    median = statistics.median_low(own.values()) if own else 0.0
    return [
        {
            "rank": rank,
            "node": nodes.get(rank, ""),
            "step_seconds": round(sum(each.values()), 6),
            "phases": {name: round(seconds, 6) for name, seconds in each.items()},
            "own_over_median": round(own[rank] / median, 3) if median > 0 else 1.0,
            "straggler": median > 0 and own[rank] > STRAGGLER_RATIO * median,
        }
        for rank, each in phases.items()
    ]


# ---- as a picture ----


def frame(
    state: Mapping[str, Any],
    ledger: Mapping[str, Any] | None,
    metrics: Mapping[int, RankTimes],
    width: int,
    *,
    steps: Sequence[Mapping[str, Any]] = (),
    now: float,
) -> RenderableType:
    """One picture of a run, `width` columns wide; the arguments are those of `facts`."""
    found = facts(state, ledger, metrics, steps, now)
    rows: list[RenderableType] = [_head(found, width), _progress(found, width), _figures(found)]
    if found["error"]:
        rows.append(Text(str(found["error"]), style="red"))
    rows += [Text(sentence) for sentence in found["told"]]
    if found["ranks"]:
        rows += [Text(), *_rank_rows(found, width)]
    return Group(*rows)


def _head(found: Mapping[str, Any], width: int) -> Table:
    state, size, nodes = found["state"], found["world_size"], found["nodes"]
    workers = f"{_count(size, 'worker')} on {_count(nodes, 'node')}" if size and nodes else ""
    age = found["heartbeat_age_seconds"]
    right = f"silent for {human_seconds(age)}" if state == "lost" and age is not None else workers
    left = width - len(right)
    name = Text(f"{found['run']}", style="bold")
    name.truncate(left - len(state) - 4, overflow="ellipsis")
    line = Table.grid(expand=False)
    line.add_column(width=left, no_wrap=True)
    line.add_column(width=len(right), justify="right", no_wrap=True)
    line.add_row(Text.assemble(name, "  ", (state, _STYLES.get(state, "bold yellow"))), right)
    return line


def _progress(found: Mapping[str, Any], width: int) -> Table:
    step, total, eta = found["step"], found["total_steps"], found["eta_seconds"]
    share = f"{100 * step // total} %" if total else ""
    left = f"{human_seconds(eta)} left" if eta is not None else ""
    words = f"step {step:,}/{total:,}" if total else f"step {step:,}"
    line = Table.grid(padding=(0, 2, 0, 0))
    bar = max(10, width - len(words) - len(share) - len(left) - 8)
    line.add_row(words, ProgressBar(total=max(1, total), completed=step, width=bar), share, left)
    return line


def _figures(found: Mapping[str, Any]) -> Text:
    parts = []
    if found["loss"] is not None:
        parts.append(f"loss {found['loss']:.4f} (recent mean {found['loss_recent']:.4f})")
    parts.append(f"{found['samples_per_second']:,.0f} samples/s")
    parts.append(f"goodput {found['goodput']:.0%}")
    return Text("  ".join(parts))


def _rank_rows(found: Mapping[str, Any], width: int) -> list[RenderableType]:
    ranks = found["ranks"]
    shown = sorted(sorted(ranks, key=lambda r: -r["own_over_median"])[:_MOST_RANKS], key=lambda r: int(r["rank"]))
    slowest = max(rank["step_seconds"] for rank in ranks) or 1.0
    table = Table.grid(padding=(0, 2, 0, 0))
    for justify, column_width in (("right", 5), ("left", 15), ("left", width - 46), ("right", 9), ("left", 9)):
        table.add_column(justify=justify, width=column_width, no_wrap=True)  # type: ignore[arg-type]
    table.add_row("rank", "node", "a step, by phase", "ms", "own work", style="bold")
    for rank in shown:
        own = Text(f"{rank['own_over_median']:.2f} x", style="bold red" if rank["straggler"] else "")
        bar = _bar(rank["phases"], slowest, width - 46)
        table.add_row(str(rank["rank"]), rank["node"], bar, f"{1000 * rank['step_seconds']:,.1f}", own)
    return [table, *_legend(found, len(ranks) - len(shown))]


def _bar(phases: Mapping[str, float], longest: float, width: int) -> Text:
    """A letter for each part of the longest step that a phase takes."""
    bar, at, drawn = Text(), 0.0, 0
    for name, (letter, style, _) in _LETTERS.items():
        at += phases[name]
        count = max(0, round(width * at / longest) - drawn)
        bar.append(letter * count, style)
        drawn += count
    return bar


def _legend(found: Mapping[str, Any], hidden: int) -> list[Text]:
    legend = Text()
    for letter, style, words in _LETTERS.values():
        legend.append(letter, style)
        legend.append(f" {words}  ")
    lines = [legend]
    slow = [str(rank["rank"]) for rank in found["ranks"] if rank["straggler"]]
    if slow:
        what = f"stragglers by own work (data wait and forward) over the median: rank {', '.join(slow[:_MOST_RANKS])}"
        lines.append(
            Text(what + (f" and {len(slow) - _MOST_RANKS} more" if len(slow) > _MOST_RANKS else ""), "bold red")
        )
    if hidden:
        lines.append(Text(f"{hidden} ranks with less work of their own are not shown"))
    if found["ranks_from"] == "steps" and found["world_size"] > 1:
        why = "the run is over" if found["state"] in OVER else "the run's metrics can't be reached from here"
        lines.append(Text(f"{why}: rank 0 alone, from steps.jsonl"))
    return lines


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"
