"""What jobs.finance_rnn forecasts, from which days, and what it is compared with."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dltrain import Batch, Input
from dltrain.errors import UserError
from jobs.common.returns import garch_forecasts, index_splits
from jobs.finance_rnn import DAYS, HALF_LIVES, SPAN, FinanceRnn, qlike

ROWS = 3


def batch() -> Batch:
    rng = np.random.default_rng(0)
    returns = torch.from_numpy(rng.normal(size=(ROWS, DAYS)).astype(np.float32))
    first = torch.tensor([DAYS - SPAN, DAYS - SPAN, DAYS - 10])
    return Batch(2 * SPAN + 10, returns=returns, first=first, garch=torch.ones(ROWS, DAYS), index=["a", "a", "b"])


def test_no_day_is_known_before_it_is_forecast() -> None:
    torch.manual_seed(0)
    model = FinanceRnn().build()
    torch.nn.init.normal_(model.head.weight)
    returns = batch().returns
    other = returns.clone()
    other[:, 100:] *= 3
    with torch.no_grad():
        before, after = model(returns), model(other)
    # What is said in the evening of day 99 is the first that may not differ from the other.
    assert torch.allclose(before[:, :100], after[:, :100], atol=1e-6)
    assert (before[:, 100] != after[:, 100]).all()


def test_it_starts_as_a_weighted_mean_of_squares() -> None:
    model, returns = FinanceRnn().build(), batch().returns
    counts = 0.5 ** (np.arange(DAYS)[::-1] / HALF_LIVES[1])
    wanted = np.log((returns.numpy() ** 2 * counts).sum(1) / counts.sum())
    with torch.no_grad():
        np.testing.assert_allclose(model(returns)[:, -1].numpy(), wanted, atol=1e-4)


def test_only_days_that_count_are_in_the_loss() -> None:
    task, rows = FinanceRnn(), batch()
    # The variance is said to be 1: the loss of a day is its return squared.
    wanted = sum(float((rows.returns[i, f:] ** 2).sum()) for i, f in enumerate(rows.first.tolist()))
    assert float(qlike(torch.zeros(ROWS, DAYS - 1), rows.returns, rows.first)) == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():
        found = task.evaluate(task.build(), rows)
    assert found["garch_qlike"].total / found["garch_qlike"].count == pytest.approx(wanted / rows.count, rel=1e-5)
    # The right variance has the least of it.
    returns = torch.full((1, 3), 2.0)
    losses = [float(qlike(torch.full((1, 2), h).log(), returns, torch.tensor([1]))) for h in (2.0, 4.0, 8.0)]
    assert losses[1] == min(losses)


def test_each_day_of_the_test_is_forecast_once() -> None:
    splits = index_splits(DAYS, SPAN)
    test = splits["test"].to_pylist()
    assert {
        name: sum(DAYS - row["first"] for row in test if row["index"] == name) for name in ("S&P 500", "Nasdaq")
    } == {
        "S&P 500": 1510,
        "Nasdaq": 1510,
    }
    days = [value for row in test if row["index"] == "Nasdaq" for value in row["returns"][row["first"] :]]
    train = {value for row in splits["train"].to_pylist() for value in row["returns"]}
    # Some returns of two days are alike to the last digit.
    assert len(train & set(days)) < 5


def test_garch_sees_the_past_alone() -> None:
    rng = np.random.default_rng(0)
    returns = rng.normal(size=1200) * (1 + (np.arange(1200) // 200 % 2))
    other = returns.copy()
    other[1100:] *= 5
    found, changed = garch_forecasts(returns, 1000), garch_forecasts(other, 1000)
    np.testing.assert_allclose(found[:1101], changed[:1101])
    assert changed[1110] > 2 * found[1110]
    # Restless and calm times are told apart.
    assert found[350:400].mean() > 1.5 * found[150:200].mean()


def test_prices_are_read_and_what_is_none_is_refused() -> None:
    task = FinanceRnn()
    prices = 100 * np.exp(np.cumsum(np.full(DAYS + 5, 0.01)))
    row = task.read(Input("closes.txt", data="\n".join(f"{p:.6f}" for p in prices).encode()))
    np.testing.assert_allclose(row["returns"], np.ones(DAYS), atol=1e-3)
    with pytest.raises(UserError, match=f"{DAYS + 1} closing prices above 0 are needed, oldest first; there are 3"):
        task.read(Input("line 1", text="1 2 3"))
    with pytest.raises(UserError, match="prices are numbers"):
        task.read(Input("line 1", text="hello"))


def test_it_predicts_and_shows() -> None:
    task, rows = FinanceRnn(), batch()
    model = task.build()
    with torch.no_grad():
        said = task.predict(model, rows)
        (shown,) = task.samples(model, rows)
    assert len(said) == ROWS
    assert all(one["yearly"] == pytest.approx(one["volatility"] * 252**0.5, rel=1e-2) for one in said)
    # Returns of deviation 1.
    assert all(0.5 < one["volatility"] < 2 for one in said)
    assert "a, 128 days" in shown.caption
    assert Image.open(io.BytesIO(shown.data)).size == (720, 260)
