"""Learning rates, on both sides of each edge."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dltrain.spec import OptimSpec
from dltrain.training.schedules import learning_rate

SCHEDULES = ("constant", "cosine", "linear", "wsd", "inverse_sqrt")


def rates(total_steps: int, steps: int | None = None, **fields: Any) -> list[float]:
    optim = OptimSpec(lr=2.0, **fields)
    return [learning_rate(optim, step, total_steps) / 2.0 for step in range(steps or total_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    found = rates(20, schedule=schedule, warmup=4)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4] <= 1.0
    assert found[4:] == sorted(found[4:], reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 5, 40])
@pytest.mark.parametrize("total_steps", [1, 2, 5, 6, 7])
def test_short_runs_and_long_warm_ups_have_a_rate(schedule: str, warmup: int, total_steps: int) -> None:
    # A resumed run may be asked for more steps than were planned.
    found = rates(total_steps, total_steps + 3, schedule=schedule, warmup=warmup, final=0.1)
    assert all(0 < rate <= 1 for rate in found)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.3])
def test_those_that_fall_reach_the_end_with_the_last_step_and_stay(schedule: str, final: float) -> None:
    found = rates(30, 33, schedule=schedule, warmup=3, final=final)
    assert found[28] > found[29]
    assert found[29:] == pytest.approx([final] * 4)


def test_linear_falls_by_the_same_each_step() -> None:
    found = rates(11, schedule="linear")
    assert found == pytest.approx([1 - step / 10 for step in range(11)])


def test_cosine_is_half_way_in_the_middle() -> None:
    found = rates(9, schedule="cosine", final=0.1)
    assert found[0] == pytest.approx(1.0)
    assert found[4] == pytest.approx(0.55)


def test_wsd_is_flat_and_then_falls_in_its_last_share() -> None:
    found = rates(20, schedule="wsd", decay=0.25, warmup=2)
    # 15 steps up to the decay, 5 in it.
    assert found[2:15] == [1.0] * 13
    assert found[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])


def test_wsd_falls_after_a_warm_up_that_reaches_into_its_share() -> None:
    found = rates(10, schedule="wsd", decay=1.0, warmup=4)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4:] == pytest.approx([1 - i / 6 for i in range(1, 7)])


def test_inverse_sqrt_is_a_quarter_after_sixteen_warm_ups() -> None:
    found = rates(100, schedule="inverse_sqrt", warmup=5)
    assert found[4] == pytest.approx(1.0)
    assert found[5] == pytest.approx(math.sqrt(5 / 6))
    assert found[79] == pytest.approx(0.25)
    assert rates(4, schedule="inverse_sqrt")[:4] == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])
