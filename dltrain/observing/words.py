"""A run told in plain words: where its time went, why it was started again, how old its last checkpoint is.

time_sentence(ledger["seconds"])        # "of 12 min 3 s: 82 % training, 9 % waiting for data, 9 % starting"
told(state, ledger, now)                # all its sentences

Pure: figures in, words out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dltrain.wording import human_seconds

__all__ = ["TimeShare", "age_of_checkpoint", "restarts_by_cause", "time_sentence", "time_shares", "told"]

# The ledger's states; several may be one thing to who reads it.
WORDS = {
    "planning": "starting",
    "placing": "starting",
    "starting": "starting",
    "data_wait": "waiting for data",
    "compute": "training",
    "checkpoint_stall": "saving checkpoints",
    "eval": "evaluating",
    "redone": "making steps again",
    "detecting": "noticing faults",
    "recovering": "recovering",
    "resizing": "changing the number of workers",
    "waiting_for_capacity": "waiting for machines",
    "other": "other things",
}
CAUSES = {
    "exit": "a worker ended by itself",
    "signal": "a worker was killed",
    "exception": "an exception was raised",
    "agent": "a worker's agent or its machine was lost",
    "hang": "a worker hung",
}


@dataclass(frozen=True)
class TimeShare:
    """What time was spent on; `percent` of all shares of a run add up to 100."""

    what: str
    seconds: float
    percent: int


def time_shares(seconds: Mapping[str, float]) -> list[TimeShare]:
    """What a ledger's seconds were spent on, the largest first; what took none is left out."""
    sums: dict[str, float] = {}
    for state, number in seconds.items():
        # A ledger of another version may know more states.
        what = WORDS.get(state, WORDS["other"])
        sums[what] = sums.get(what, 0.0) + number
    found = sorted(((n, what) for what, n in sums.items() if n > 0), reverse=True)
    percents = _percents([n for n, _ in found])
    return [TimeShare(what, n, percent) for (n, what), percent in zip(found, percents, strict=True)]


def _percents(numbers: list[float]) -> list[int]:
    """Whole percents that add up to 100: what rounding down leaves over goes to the largest fractions."""
    total = sum(numbers)
    exact = [100 * number / total for number in numbers]
    percents = [int(value) for value in exact]
    by_fraction = sorted(range(len(exact)), key=lambda i: percents[i] - exact[i])
    for i in by_fraction[: 100 - sum(percents)] if numbers else ():
        percents[i] += 1
    return percents


def time_sentence(seconds: Mapping[str, float]) -> str:
    """Where the time went; empty before the first second. Shares under one percent are left out."""
    shares = time_shares(seconds)
    parts = ", ".join(f"{share.percent} % {share.what}" for share in shares if share.percent)
    return f"of {human_seconds(sum(share.seconds for share in shares))}: {parts}" if shares else ""


def restarts_by_cause(counters: Mapping[str, float]) -> dict[str, int]:
    """How often each cause started a run again, from a ledger's counters; the most frequent first."""
    found = {reason: int(counters.get(f"restarts_{reason}", 0)) for reason in CAUSES}
    return {reason: n for reason, n in sorted(found.items(), key=lambda item: -item[1]) if n}


def restart_sentence(counters: Mapping[str, float]) -> str:
    """How often and why."""
    causes = restarts_by_cause(counters)
    total = sum(causes.values())
    if not total:
        return "no restarts"
    parts = ", ".join(f"{CAUSES[reason]} ({n} x)" for reason, n in causes.items())
    return f"{total} restart{'s' if total > 1 else ''}: {parts}"


def age_of_checkpoint(state: Mapping[str, Any], now: float) -> float | None:
    """Seconds since the last checkpoint; None before the first one."""
    made = float(state.get("checkpoint_time") or 0.0)
    return max(0.0, now - made) if made else None


def checkpoint_sentence(state: Mapping[str, Any], now: float) -> str:
    """The last checkpoint's step and age."""
    step, age = int(state.get("checkpoint_step", -1)), age_of_checkpoint(state, now)
    if step < 0:
        return "no checkpoint yet"
    return f"last checkpoint: step {step:,}" + (f", {human_seconds(age)} ago" if age is not None else "")


def told(state: Mapping[str, Any], ledger: Mapping[str, Any] | None, now: float) -> list[str]:
    """What a run's state and ledger say, a sentence each.

    Args:
        now: Unix seconds.
    """
    if not ledger:
        return []
    sentences = (
        time_sentence(ledger["seconds"]),
        restart_sentence(ledger.get("counters", {})),
        checkpoint_sentence(state, now),
    )
    return [sentence for sentence in sentences if sentence]
