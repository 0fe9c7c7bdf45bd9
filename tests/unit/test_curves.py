"""Curves: what holds of steps that were made twice, spikes that survive thinning, means."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dltrain.observing.curves import Columns, Curve, means


def curve(values: list[float]) -> Curve:
    return Curve("loss", np.arange(1.0, len(values) + 1), np.array(values, float))


def test_steps_made_again_take_back_what_came_after_them() -> None:
    columns = Columns()
    for step in range(1, 11):
        columns.add(step, {"loss": 1.0})
    # From the snapshot of step 7; then the run ends at 9.
    for step in (8, 9):
        columns.add(step, {"loss": 2.0, "extra": 5.0})
    assert columns.steps.tolist() == list(range(1, 10))
    assert columns.raw("loss").tolist() == [1.0] * 7 + [2.0] * 2
    assert columns.curve("extra").x.tolist() == [8, 9]
    assert math.isnan(columns.raw("extra")[0])
    assert (len(columns), columns.last_step, columns.names) == (9, 9, ["loss", "extra"])


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    columns = Columns()
    for step, loss in enumerate([1.0, math.nan, math.inf, 2.0], 1):
        columns.add(step, {"loss": loss, "rows": 10.0 * step})
    assert columns.curve("loss").y.tolist() == [1.0, 2.0]
    assert columns.curve("loss", over="rows").x.tolist() == [10.0, 40.0]
    assert columns.not_finite("loss") == 2
    assert len(columns.curve("nothing")) == 0
    assert len(Columns().curve("loss")) == 0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000), st.integers(4, 400))
def test_thinning_keeps_ends_and_extremes(values: list[float], points: int) -> None:
    whole = curve(values)
    thin = whole.thin(points)
    assert len(thin) <= max(points + 2, 2)
    assert (thin.x[0], thin.x[-1]) == (whole.x[0], whole.x[-1])
    assert (thin.y.min(), thin.y.max()) == (whole.y.min(), whole.y.max())
    assert (np.diff(thin.x) > 0).all()


def test_a_running_mean_follows_and_begins_where_the_curve_does() -> None:
    noisy = curve([5.0 + (-1) ** i for i in range(600)])
    smooth = noisy.smooth()
    assert smooth.y[0] == noisy.y[0]
    assert abs(smooth.last - 5.0) < 0.2
    short = curve([1.0, 2.0])
    assert short.smooth() is short


def test_means_of_stretches_add_up() -> None:
    columns = Columns()
    for step in range(1, 1001):
        columns.add(step, {"a": float(step), "b": 1.0})
    x, values = means(columns, ["a", "b", "missing"], 10)
    assert x.tolist() == [100.0 * i for i in range(1, 11)]
    assert values[0].mean() == 500.5
    assert values[1].tolist() == [1.0] * 10
    assert values[2].tolist() == [0.0] * 10
    assert means(Columns(), ["a"], 10)[1].shape == (1, 0)
