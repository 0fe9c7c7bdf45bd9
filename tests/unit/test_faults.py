"""How the figures of a recovery follow from a journal; tests of faults and the bench rest on them."""

from __future__ import annotations

import json
from pathlib import Path

from faults import Line, Recovery, StepTail, recovery


def made(attempt: int, first: int, last: int, begin: float) -> list[Line]:
    """Steps of 0.1 s; the first ends at `begin`."""
    return [Line(step, attempt, begin + 0.1 * (step - first)) for step in range(first, last + 1)]


def test_steps_made_again_are_counted_and_waited_out() -> None:
    # Killed at 2.0, just after step 20; from step 15 on again at 5.0: step 21 is the seventh of the new group.
    lines = [*made(1, 1, 20, 0.1), *made(2, 15, 30, 5.0)]
    assert recovery(lines, 2.05) == Recovery(pause_seconds=3.0, new_seconds=3.55, redone=6)


def test_what_was_made_after_the_moment_by_the_old_group_counts_as_made() -> None:
    # A worker that hangs lets the others finish a step: 21 is no longer new.
    lines = [*made(1, 1, 21, 0.1), *made(2, 22, 30, 5.0)]
    assert recovery(lines, 1.95) == Recovery(pause_seconds=2.9, new_seconds=3.05, redone=0)


def test_nobody_has_recovered_before_a_new_step() -> None:
    assert recovery(made(1, 1, 20, 0.1), 2.05) is None
    assert recovery([*made(1, 1, 20, 0.1), *made(2, 15, 20, 5.0)], 2.05) is None
    assert recovery([], 2.05) is None


def test_earlier_groups_are_past() -> None:
    lines = [*made(1, 1, 10, 0.1), *made(2, 8, 20, 3.0), *made(3, 20, 25, 9.0)]
    assert recovery(lines, 5.0) == Recovery(pause_seconds=4.8, new_seconds=4.1, redone=1)


def test_a_tail_reads_what_was_added(tmp_path: Path) -> None:
    tail = StepTail(tmp_path)
    assert tail.lines() == []
    path = tmp_path / "steps.jsonl"
    line = json.dumps({"step": 1, "attempt": 1, "time": 2.0})
    path.write_text(line + "\n" + line[:10])
    assert tail.lines() == [Line(1, 1, 2.0)]
    # The line that was being written is whole now.
    path.write_text(line + "\n" + line + "\n")
    assert tail.lines() == [Line(1, 1, 2.0)] * 2
    assert tail.lines() == [Line(1, 1, 2.0)] * 2
