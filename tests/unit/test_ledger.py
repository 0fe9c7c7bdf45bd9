"""Seconds in the ledger sum to the wall clock, whatever happens."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dltrain.observing.ledger import STATES, Ledger

moves = st.lists(
    st.tuples(
        st.sampled_from(["enter", "part", "step"]),
        st.sampled_from(STATES),
        st.floats(0, 5),
        st.floats(0, 10),
        st.floats(0, 10),
        st.booleans(),
    )
)


@given(moves)
def test_the_seconds_sum_to_the_wall_clock(log: list[tuple[str, str, float, float, float, bool]]) -> None:
    ledger, now = Ledger(100.0), 100.0
    for kind, state, passes, seconds, wait, redone in log:
        now += passes
        if kind == "enter":
            ledger.enter(state, now)
        elif kind == "part":
            ledger.part(state, seconds, now)
        else:
            ledger.step(now, seconds, wait, redone)
        assert ledger.wall <= now - 100.0 + 1e-6
    ledger.enter("other", now)
    assert math.isclose(ledger.wall, now - 100.0, abs_tol=1e-6)
    assert all(value >= 0 for value in ledger.seconds.values())


def test_a_run_by_hand() -> None:
    ledger = Ledger(0.0)
    ledger.enter("placing", 1.0)
    ledger.enter("starting", 3.0)
    ledger.enter("other", 7.0)
    ledger.step(8.0, seconds=1.0, data_wait=0.25, redone=False)
    ledger.step(10.0, seconds=2.0, data_wait=0.0, redone=True)
    ledger.part("eval", 1.0, 11.0)
    ledger.enter("waiting_for_capacity", 11.0)
    ledger.enter("other", 19.0)
    seconds = {state: value for state, value in ledger.seconds.items() if value}
    assert seconds == {
        "planning": 1.0,
        "placing": 2.0,
        "starting": 4.0,
        "data_wait": 0.25,
        "compute": 0.75,
        "redone": 2.0,
        "eval": 1.0,
        "waiting_for_capacity": 8.0,
    }
    assert ledger.goodput == pytest.approx(0.75 / 11.0)
    assert ledger.to_dict()["goodput_of_wall"] == pytest.approx(0.75 / 19.0, abs=1e-6)


def test_a_second_start_goes_on_from_the_first() -> None:
    first = Ledger(0.0)
    first.enter("other", 4.0)
    second = Ledger(50.0, first.seconds)
    second.enter("other", 51.0)
    assert second.seconds["planning"] == 5.0


def test_nothing_yet() -> None:
    assert Ledger(0.0).goodput == 0.0
