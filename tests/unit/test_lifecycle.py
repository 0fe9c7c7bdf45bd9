"""The state machine: what each event makes the driver do."""

from __future__ import annotations

import itertools
from typing import Any

from dltrain.errors import CapacityError, RunFailedError, TaskError, UserError
from dltrain.observing.reports import Done, Raised, Ready, Saved, SaveFailed, SaveWanted, StepReport
from dltrain.running.events import (
    AgentLost,
    Commit,
    Committed,
    Discard,
    Drained,
    End,
    Exited,
    Hung,
    KillWorkers,
    Place,
    Placed,
    Release,
    Say,
    StartAttempt,
    StopRequested,
    Tell,
    Tick,
)
from dltrain.running.lifecycle import PEER_GRACE_SECONDS, Lifecycle


def step(number: int, rank: int = 0) -> StepReport:
    return StepReport(rank, number, number * 8, 8, 8, 1.0, 1.0, 0.1, True, True, {(0, 0): (8, 1, 1)}, 0.02, {})


def raised(rank: int, kind: str, at: int = 5, message: str = "ValueError: no") -> Raised:
    return Raised(rank, at, kind, message, "trace", (1, 2))


def running(workers: int = 2, restarts: int = 10, minimum: int | None = None) -> Lifecycle:
    life = Lifecycle(minimum or workers, workers, restarts)
    life.begin()
    life.handle(Placed(workers), 0.0)
    for rank in range(workers):
        life.handle(Ready(rank, 100 + rank, 10, {}), 1.0)
    assert life.state == "running"
    return life


def again(life: Lifecycle, now: float) -> None:
    """The slots are still there: a new attempt comes up, after a pause if those before made no step."""
    slots = Placed(life.max_workers)
    assert StartAttempt in kinds(life.handle(slots, now) or life.handle(slots, now + 30))
    for rank in range(life.num_ranks):
        life.handle(Ready(rank, 200 + rank, 10, {}), now)


def kinds(actions: list[Any]) -> list[type]:
    return [type(action) for action in actions]


def end(actions: list[Any]) -> End:
    return next(action for action in actions if isinstance(action, End))


def test_from_nothing_to_finished() -> None:
    life = Lifecycle(2, 2, 10)
    assert life.begin() == [Place(2)]
    assert life.handle(Placed(1), 0.0) == []
    assert life.handle(Placed(2), 0.1) == [StartAttempt(2, 1)]
    for rank in (0, 1):
        life.handle(Ready(rank, 1, 1, {}), 1.0)
    life.handle(step(1), 2.0)
    assert life.handle(Saved(0, 1, 8, {}, 0.1), 2.0) == []
    assert life.handle(Saved(1, 1, 8, {}, 0.1), 2.0) == [Commit(1)]
    life.handle(Committed(1), 2.0)
    assert life.handle(Done(0, 1), 3.0) == []
    assert life.handle(Done(1, 1), 3.0) == [End("finished")]
    assert life.handle(Exited(0, 0), 4.0) == []


def test_starts_with_what_there_is_when_no_more_comes() -> None:
    life = Lifecycle(2, 4, 10)
    life.begin()
    assert life.handle(Placed(3), 0.0) == []
    assert life.handle(Placed(3, final=True), 5.0) == [StartAttempt(3, 1)]


def test_too_few_slots_wait_and_then_end() -> None:
    life = Lifecycle(4, 4, 10)
    life.begin()
    actions = life.handle(Placed(2, final=True), 5.0)
    assert kinds(actions) == [Say]
    assert "waiting for 4 workers" in actions[0].text
    assert life.state == "waiting"
    assert life.handle(Placed(2, final=True), 6.0) == []
    error = end(life.wait_over("the cluster has 2 CPUs")).error
    assert isinstance(error, CapacityError)
    assert "2 CPUs" in str(error)


def test_a_worker_that_its_agent_ended_was_not_killed_from_outside() -> None:
    life = running()
    (said,) = [one.text for one in life.handle(Exited(1, -9, reason="the driver was silent"), 5.0) if type(one) is Say]
    assert "the worker of rank 1 was ended: the driver was silent" in said
    assert "SIGKILL" not in said


def test_waiting_ends_when_slots_come() -> None:
    life = Lifecycle(4, 4, 10)
    life.begin()
    life.handle(Placed(2, final=True), 5.0)
    assert life.handle(Placed(4), 9.0) == [StartAttempt(4, 1)]


def test_a_killed_worker_ends_its_attempt_at_once() -> None:
    life = running()
    actions = life.handle(Exited(1, -9), 5.0)
    assert kinds(actions) == [KillWorkers, Say, Place]
    assert "SIGKILL" in actions[1].text
    assert (life.state, life.restart_reasons) == ("recovering", ["signal"])
    # What the others say after that changes nothing.
    assert life.handle(raised(0, "peer"), 5.1) == []
    assert life.handle(Exited(0, -9), 5.1) == []
    assert life.handle(Placed(2), 6.0) == [StartAttempt(2, 2)]


def test_a_peer_that_complains_waits_for_the_cause() -> None:
    life = running()
    life.handle(step(4), 1.0)
    assert life.handle(raised(0, "peer", message="connection closed"), 5.0) == []
    assert life.handle(Tick(), 5.0 + PEER_GRACE_SECONDS / 2) == []
    actions = life.handle(raised(1, "task", message="KeyError: 'x'"), 6.0)
    assert "KeyError" in actions[1].text


def test_a_peer_that_complains_alone_is_taken_at_its_word() -> None:
    life = running()
    life.handle(raised(0, "peer", message="connection closed"), 5.0)
    actions = life.handle(Tick(), 5.0 + PEER_GRACE_SECONDS)
    assert kinds(actions) == [KillWorkers, Say, Place]


def test_an_exception_before_the_first_step_ends_the_run() -> None:
    life = running()
    error = end(life.handle(raised(1, "task", at=1), 2.0)).error
    assert isinstance(error, TaskError)
    assert (error.rank, error.step) == (1, 1)
    assert "rows of this rank's batch: 1, 2" in error.trace


def test_the_same_exception_three_times_ends_the_run() -> None:
    life = running()
    life.handle(step(4), 1.0)
    for attempt in range(2):
        assert kinds(life.handle(raised(0, "task"), 10.0 * attempt + 2)) == [KillWorkers, Say, Place]
        again(life, 10.0 * attempt + 5)
    assert isinstance(end(life.handle(raised(0, "task"), 30.0)).error, TaskError)


def test_other_exceptions_are_counted_apart() -> None:
    life = running()
    life.handle(step(4), 1.0)
    for attempt in range(5):
        actions = life.handle(raised(0, "task", at=attempt), 10.0 * attempt)
        assert End not in kinds(actions)
        again(life, 10.0 * attempt + 5)


def test_the_users_mistake_ends_the_run_with_exit_code_2() -> None:
    error = end(running().handle(raised(0, "user", message="no column 'x'"), 2.0)).error
    assert isinstance(error, UserError)
    assert (str(error), error.exit_code) == ("no column 'x'", 2)


def test_restarts_within_an_hour_are_limited_and_older_ones_forgotten() -> None:
    life = running(restarts=2)
    for now in (10.0, 20.0):
        assert End not in kinds(life.handle(Exited(0, -9), now))
        again(life, now + 1)
    assert End not in kinds(life.handle(Exited(0, -9), 3700.0))
    again(life, 3701.0)
    assert End not in kinds(life.handle(Exited(0, -9), 3702.0))
    again(life, 3703.0)
    error = end(life.handle(Exited(0, -9), 3704.0)).error
    assert isinstance(error, RunFailedError)
    assert "2 restarts within an hour" in str(error)


def test_a_lost_agent_needs_another_slot() -> None:
    life = running()
    actions = life.handle(AgentLost(1, "node died"), 5.0)
    assert kinds(actions) == [KillWorkers, Say, Place]
    assert life.slots == 1
    assert life.handle(Placed(1), 5.5) == []
    assert life.handle(Placed(2), 6.0) == [StartAttempt(2, 2)]


def test_a_failed_save_is_discarded_and_training_goes_on() -> None:
    life = running()
    life.handle(Saved(0, 10, 80, {}, 0.1), 5.0)
    actions = life.handle(SaveFailed(1, 10, "No space left", 0.1), 5.0)
    assert kinds(actions) == [Discard]
    assert life.state == "running"


def test_a_last_checkpoint_that_is_lost_is_not_a_finished_run() -> None:
    life = running()
    for rank in (0, 1):
        life.handle(SaveFailed(rank, 10, "No space left", 0.1), 5.0)
    life.handle(Committed(10, "No space left"), 5.0)
    life.handle(Done(0, 10), 6.0)
    found = end(life.handle(Done(1, 10), 6.0))
    assert found.status == "failed"
    assert "No space left" in str(found.error)


def test_who_was_replaced_ends_even_while_recovering_or_waiting() -> None:
    life = running()
    life.handle(Exited(1, -9, ""), 5.0)
    assert life.state == "recovering"
    found = end(life.handle(raised(0, "final", message="another start of this run has taken it over"), 6.0))
    assert (found.status, str(found.error)) == ("failed", "another start of this run has taken it over")


def test_the_log_does_not_keep_what_is_where_in_files() -> None:
    life = running()
    life.handle(Saved(0, 10, 80, {"parts": [1] * 1000}, 0.1, {"whole": ["b"]}), 5.0)
    assert life.log[-1] == (5.0, Saved(0, 10, 80, {}, 0.1, {}))


def test_stop_finishes_the_step_and_saves() -> None:
    life = running()
    assert Tell in kinds(life.handle(StopRequested(), 5.0))
    assert life.handle(StopRequested(), 5.1) == []
    for rank in (0, 1):
        life.handle(Saved(rank, 7, 56, {}, 0.1), 5.2)
    life.handle(Committed(7), 5.2)
    life.handle(Done(0, 7, "stop"), 5.3)
    assert life.handle(Done(1, 7, "stop"), 5.3) == [End("stopped")]


def test_stop_before_the_workers_are_up() -> None:
    life = Lifecycle(2, 2, 10)
    life.begin()
    assert life.handle(StopRequested(), 0.1) == [End("stopped")]
    life = Lifecycle(2, 2, 10)
    life.begin()
    life.handle(Placed(2), 0.1)
    assert kinds(life.handle(StopRequested(), 0.2)) == [Say]
    life.handle(Ready(0, 1, 1, {}), 1.0)
    assert life.handle(Ready(1, 1, 1, {}), 1.0) == [Tell("stop")]


def test_a_worker_that_dies_while_stopping_does_not_start_another() -> None:
    life = running()
    life.handle(StopRequested(), 5.0)
    assert end(life.handle(Exited(0, -9), 5.1)).status == "stopped"


def test_the_end_waits_for_the_last_checkpoint_that_is_being_written() -> None:
    life = running()
    for rank in (0, 1):
        life.handle(SaveWanted(rank, 9, 72, 0, 9, 0.001), 5.0)
    life.handle(Done(0, 9), 5.1)
    assert life.handle(Done(1, 9), 5.1) == []
    # Its process may be gone by then.
    assert life.handle(Exited(0, 0), 5.2) == []
    life.handle(Saved(0, 9, 72, {}, 0.5), 5.6)
    assert life.handle(Saved(1, 9, 72, {}, 0.5), 5.7) == [Commit(9)]
    assert life.handle(Committed(9), 5.8) == [End("finished")]


def test_a_hang_is_a_restart_with_the_stack_of_who_is_stuck() -> None:
    life = running()
    actions = life.handle(Hung(1, 12.0, "step", ("stack of 0", "stack of 1")), 20.0)
    assert kinds(actions) == [KillWorkers, Say, Place]
    assert "stack of 1" in actions[1].text
    assert life.restart_reasons == ["hang"]


def test_growing_pauses_at_a_step_and_goes_on_larger() -> None:
    life = Lifecycle(1, 3, 10)
    life.begin()
    life.handle(Placed(2, final=True), 5.0)
    for rank in (0, 1):
        life.handle(Ready(rank, 1, 1, {}), 6.0)
    assert kinds(life.handle(Placed(3), 9.0)) == [Say, Tell]
    assert life.state == "resizing"
    assert life.handle(Placed(3), 9.1) == []
    life.handle(Done(0, 40, "pause"), 9.5)
    assert life.handle(Done(1, 40, "pause"), 9.5) == [KillWorkers(), StartAttempt(3, 2)]
    # Growing is no restart: the budget is for what goes wrong.
    assert (life.step, life.restarts) == (40, 0)


def drained(minimum: int) -> tuple[Lifecycle, list[Any]]:
    life = Lifecycle(minimum, 3, 10)
    life.begin()
    life.handle(Placed(3), 0.0)
    for rank in range(3):
        life.handle(Ready(rank, 1, 1, {}), 1.0)
    assert kinds(life.handle(Drained(1), 5.0)) == [Say, Tell]
    assert life.handle(Drained(1), 5.1) == []
    for rank in range(3):
        life.handle(SaveWanted(rank, 8, 64, 0, 8, 0.0), 5.2)
        life.handle(Done(rank, 8, "drain"), 5.2)
    for rank in range(3):
        life.handle(Saved(rank, 8, 64, {}, 0.1), 5.3)
    return life, life.handle(Committed(8), 5.4)


def test_a_machine_is_left_after_the_step_is_saved() -> None:
    life, actions = drained(minimum=2)
    assert actions == [KillWorkers(), Release((1,)), Place(3), StartAttempt(2, 2)]
    assert life.restarts == 0


def test_leaving_a_machine_below_the_minimum_waits() -> None:
    life, actions = drained(minimum=3)
    assert kinds(actions) == [KillWorkers, Release, Place, Say]
    assert life.state == "waiting"
    assert life.handle(Placed(3), 9.0) == [StartAttempt(3, 2)]


def test_a_stop_is_not_lost_where_there_is_too_little_room() -> None:
    life = running(minimum=2, workers=3)
    life.handle(Exited(0, -9), 5.0)
    assert kinds(life.handle(StopRequested(), 5.1)) == [Say]
    assert end(life.handle(Placed(1, final=True), 6.0)).status == "stopped"


def test_a_stop_while_draining_stops() -> None:
    life = running()
    life.handle(Drained(0), 5.0)
    assert Tell("stop") in life.handle(StopRequested(), 5.1)


def test_attempts_that_make_no_step_are_restarted_ever_more_slowly() -> None:
    life = running(restarts=100)
    life.handle(step(1), 1.5)
    now, pauses = 2.0, []
    for _ in range(8):
        life.handle(Exited(0, 1), now)
        begin = now
        while not life.handle(Placed(2), now):
            now += 0.5
        pauses.append(now - begin)
        for rank in (0, 1):
            life.handle(Ready(rank, 1, 1, {}), now)
    assert pauses == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    life.handle(step(2), now)
    life.handle(Exited(0, 1), now)
    assert life.handle(Placed(2), now) == [StartAttempt(2, 10)]


def test_a_log_of_events_replays_the_run() -> None:
    events: list[tuple[float, Any]] = [
        (0.0, Placed(2)),
        (1.0, Ready(0, 1, 1, {})),
        (1.0, Ready(1, 2, 1, {})),
        (2.0, Exited(1, -9)),
        (3.0, Placed(2)),
        (4.0, Ready(0, 1, 1, {})),
        (4.0, Ready(1, 2, 1, {})),
        (5.0, raised(0, "user")),
    ]

    def play(log: list[tuple[float, Any]]) -> tuple[list[Any], Lifecycle]:
        life = Lifecycle(2, 2, 10)
        actions = [life.begin(), *(life.handle(event, now) for now, event in log)]
        return list(itertools.chain(*actions)), life

    first, life = play(events)
    second, _ = play(life.log)
    assert str(first) == str(second)
