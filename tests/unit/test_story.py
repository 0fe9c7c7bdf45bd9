"""What happened to a run, read off its events: faults, what they cost, pauses."""

from __future__ import annotations

from typing import Any

from dltrain.observing.faults import Story
from dltrain.observing.when import Stretches, stretches, timeline


def start(number: int, time: float, step: int, ranks: int = 2) -> dict[str, Any]:
    return {"event": "start", "time": time, "attempt": number, "num_ranks": ranks, "step": step, "from_memory": True}


def event(name: str, time: float, rank: int = 0, **fields: Any) -> dict[str, Any]:
    return {"event": name, "time": time, "rank": rank, **fields}


def story(events: list[dict[str, Any]], steps: list[tuple[int, int, float]]) -> Story:
    """steps: (attempt, step, time)."""
    made = Story()
    for each in events:
        made.add(each)
    for step in steps:
        made.saw_step(*step)
    made.settle()
    return made


KILLED = [
    event("launch", 0.0),
    start(1, 5.0, 0),
    event("Ready", 6.0, device="cpu", num_parameters=7),
    event("checkpoint", 8.0, step=10),
    # The peer notices first; the one that died is the cause.
    event("Raised", 10.0, rank=1, step=13, kind="peer", message="connection closed", trace=""),
    event("Exited", 10.1, rank=0, code=-9, tail="last words"),
    event("Exited", 10.2, rank=1, code=1, tail=""),
    start(2, 10.5, 12),
    {"event": "end", "time": 20.0, "status": "finished"},
]
STEPS = [(1, step, 6.0 + 0.3 * step) for step in range(1, 14)] + [(2, step, 11.0 + step - 13) for step in range(13, 20)]


def test_a_worker_that_was_killed() -> None:
    found = story(KILLED, STEPS)
    (fault,) = found.faults
    assert (fault.cause, fault.what, fault.text) == ("signal", "a worker was killed", "rank 0 was ended by SIGKILL")
    assert fault.detail == "last words"
    assert (fault.step, fault.redone) == (13, 1)
    assert round(fault.recovery_seconds or 0, 3) == 0.9
    first, second = found.attempts
    assert (first.last_step, first.end, second.end) == (13, 10.1, 20.0)
    assert found.ready["num_parameters"] == 7
    assert [mark.what for mark in found.marks] == ["checkpoint", "end"]


def test_causes_in_words() -> None:
    raised = event("Raised", 2.0, rank=1, step=3, kind="task", message="KeyError: 'x'\nmore", trace="File ...")
    hung = event("Hung", 2.0, rank=0, seconds=8.2, phase="step", stacks=("in all_reduce",))
    cases = {
        "exit": event("Exited", 2.0, rank=1, code=7, tail="going down"),
        "exception": raised,
        "agent": event("AgentLost", 2.0, rank=1, reason="no answer for 4.0 s"),
        "hang": hung,
    }
    texts = {}
    for cause, what in cases.items():
        (fault,) = story([start(1, 1.0, 0), what, start(2, 3.0, 0)], []).faults
        assert (fault.cause, fault.recovery_seconds) == (cause, None)
        texts[cause] = fault.text
    assert texts == {
        "exit": "rank 1 exited with code 7",
        "exception": "rank 1: KeyError: 'x'",
        "agent": "the agent of rank 1 is gone: no answer for 4.0 s",
        "hang": "rank 0 had not moved for 8 s (step)",
    }
    (peer,) = story([start(1, 1.0, 0), {**raised, "kind": "peer"}, start(2, 3.0, 0)], []).faults
    assert (peer.cause, peer.what) == ("peer", "an exception was raised")


def test_ends_that_are_no_faults() -> None:
    done = [event("Done", 2.0, rank=0), event("Exited", 2.1, rank=0, code=0)]
    assert story([start(1, 1.0, 0), *done, {"event": "end", "time": 3.0, "status": "finished"}], []).faults == []
    grown = story([start(1, 1.0, 0), start(2, 3.0, 10, ranks=4)], [])
    assert (grown.faults, grown.marks[0].text) == ([], "2 -> 4 workers")


def test_a_fault_that_ended_the_run() -> None:
    events = [start(1, 1.0, 0), event("Exited", 2.0, code=7), {"event": "end", "time": 3.0, "status": "failed"}]
    (fault,) = story(events, [(1, 1, 1.5)]).faults
    assert (fault.step, fault.recovery_seconds) == (0, None)


def test_a_driver_that_was_lost() -> None:
    events = [event("launch", 0.0), start(1, 1.0, 0), event("launch", 100.0), start(2, 101.0, 5)]
    (fault,) = story(events, [(1, 8, 9.0), (2, 6, 102.0)]).faults
    assert (fault.what, fault.time, fault.recovery_seconds, fault.redone) == ("the driver was lost", 9.0, 93.0, 1)


def test_a_launch_that_found_nothing_to_do_is_no_fault() -> None:
    found = story([*KILLED, event("launch", 100.0), event("launch", 200.0)], STEPS)
    assert (len(found.faults), found.launches) == (1, [0.0])


def test_evaluations_of_steps_made_again_count_once() -> None:
    evals = [
        event("EvalReport", t, step=s, metrics={"a": m}, is_best=True)
        for t, s, m in ((1, 10, 0.1), (2, 20, 0.2), (3, 20, 0.3))
    ]
    assert [(e.step, e.metrics["a"]) for e in story(evals, []).evals] == [(10, 0.1), (20, 0.3)]


def test_a_pause_takes_little_room() -> None:
    at = Stretches([(0.0, 100.0), (10_000.0, 10_100.0)])
    assert at(0.0) == 0
    assert round(at(10_100.0), 6) == 100
    assert at(10_000.0) - at(100.0) == 3
    assert [round(gap[2]) for gap in at.gaps()] == [9900]
    assert at.elapsed(10_050.0) == 150
    # A stop of seconds is no pause.
    assert len(Stretches([(0.0, 10.0), (12.0, 20.0)]).spans) == 1


def test_recovering_is_not_a_pause_but_a_stop_is() -> None:
    again = [event("launch", 500.0), start(3, 501.0, 19), {"event": "end", "time": 510.0, "status": "finished"}]
    found = story([*KILLED, *again], [*STEPS, (3, 20, 505.0)])
    up = stretches(found, first=0.0, last=510.0)
    assert up.spans == [(0.0, 20.0), (500.0, 510.0)]


def test_the_picture_escapes_and_names_what_it_shows() -> None:
    found = story(KILLED, STEPS)
    found.faults[0].text = '<b>"evil"</b>'
    picture = timeline(found, 0.0, 20.0)
    assert "<b>" not in picture
    assert "attempt 2: 2 workers, from step 12 (a snapshot in memory)" in picture
    assert picture.count('class="fault"') == 1
    assert timeline(Story(), 0.0, 0.0) == ""
