"""Daily returns of two stock indices, 1999 to 2018, in rows of some months, with GARCH(1,1)'s forecasts beside them.

They come with `arch`, which fits the GARCH as well: by maximum likelihood on the days of training alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["daily_returns", "garch_forecasts", "index_splits"]

F64 = npt.NDArray[np.float64]
SPLIT = np.datetime64("2013-01-01")


def index_splits(days: int, span: int) -> dict[str, pa.Table]:
    """`train` and `test`, the years from 2013; columns `returns` and `garch` (days,), `first` and `index`.

    Args:
        days: of a row; those before the `first` are only what has been seen before.
        span: days of a row that are to be forecast; of the test each day is in one row, so the last has fewer.
    """
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for name, dates, returns in daily_returns():
        known = int((dates < SPLIT).sum())
        garch = garch_forecasts(returns, known)
        for split, end, first in _rows(known, len(returns), days, span):
            part = slice(end - days, end)
            splits[split].append({"returns": returns[part], "garch": garch[part], "first": first, "index": name})
    numbers = pa.list_(pa.float32(), days)
    schema = pa.schema({"returns": numbers, "garch": numbers, "first": pa.int32(), "index": pa.string()})
    return {name: pa.Table.from_pylist(rows, schema) for name, rows in splits.items()}


def _rows(known: int, count: int, days: int, span: int) -> Iterator[tuple[str, int, int]]:
    """Split, the day after a row's last, and its first day that counts."""
    for end in range(days, known + 1, span // 4):
        yield "train", end, days - span
    for start in range(known, count, span):
        end = min(start + span, count)
        yield "test", end, days - (end - start)


def daily_returns() -> Iterator[tuple[str, Any, F64]]:
    """Name, dates (days,) and percent a day (days,) of each index."""
    from arch.data import nasdaq, sp500

    for name, source in (("S&P 500", sp500), ("Nasdaq", nasdaq)):
        prices = source.load()["Adj Close"]
        yield name, prices.index.to_numpy()[1:], 100 * np.diff(np.log(prices.to_numpy()))


def garch_forecasts(returns: F64, known: int) -> F64:
    """The variance (days,) of each day, from the days before it; parameters are fitted to the first `known` days."""
    from arch import arch_model

    model = arch_model(returns, mean="Zero", vol="GARCH", p=1, q=1)
    fitted = model.fit(last_obs=known, disp="off")
    # The recursion starts from a variance of the first weeks, none of them in the test.
    return np.asarray(model.fix(fitted.params).conditional_volatility) ** 2
