"""How much two stock indices will move tomorrow, by what they did before: a GRU against GARCH(1,1).

python -m jobs.finance_rnn make-data .data/finance_rnn
dltrain run jobs/finance_rnn.yaml
dltrain predict finance-rnn closes.txt                     # closing prices, one a line, oldest first

A row holds 192 days of one index; of each day after the `first` the network has said the variance the evening before.
Held out are the years from 2013. Daily returns of S&P 500 and Nasdaq come with `arch`, which also fits the baseline.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from dltrain import Artifact, Batch, Input, Keys, Sum, Task
from dltrain.data.columns import tensors
from dltrain.errors import UserError
from jobs.common.data import main, write_splits
from jobs.common.figures import Bench, Figure
from jobs.common.returns import index_splits

# Days of a row, and how many of them are at most forecast: the others are what it has seen before.
DAYS, SPAN = 192, 64
HALF_LIVES = (3.0, 10.0, 40.0)
TRADING_DAYS = 252


class Volatility(nn.Module):
    """A GRU that corrects the log of an exponentially weighted mean of squared returns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(6, width, batch_first=True)
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("weights", _decaying(DAYS), persistent=False)

    def forward(self, returns: torch.Tensor) -> torch.Tensor:
        """(rows, DAYS) percent -> (rows, DAYS) log variance of the day after each."""
        # (half-lives, rows, days)
        fast, middle, slow = (returns.square() @ self.weights).clamp(min=1e-4).log()
        moves = (returns / (middle / 2).exp()).clamp(-5, 5)
        # Falls shake markets more than rises do.
        seen = torch.stack([moves, moves.abs(), moves.clamp(max=0), fast - middle, middle, slow - middle], -1)
        return middle + self.head(self.gru(seen)[0])[..., 0]


def _decaying(days: int) -> torch.Tensor:
    """(half-lives, days, days): what a day's squared return counts for in the mean of another; columns sum to 1."""
    age = torch.arange(days)[None, :] - torch.arange(days)[:, None]
    counts = [torch.where(age >= 0, 0.5 ** (age.clamp(min=0) / half), 0.0) for half in HALF_LIVES]
    return torch.stack([one / one.sum(0) for one in counts])


def qlike(log_variance: torch.Tensor, returns: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The loss of all forecasts that count, added up: log h + r^2 / h, least where h is the variance of r.

    Patton, Volatility forecast comparison using imperfect volatility proxies, 2011; there a term of r alone is added.

    Args:
        log_variance: (rows, days - 1), of the days after the first; first: (rows,), the first day that counts.
    """
    loss = log_variance + returns[:, 1:].square() / log_variance.exp()
    days = torch.arange(1, returns.shape[1], device=returns.device)
    return (loss * (days >= first[:, None])).sum()


class FinanceRnn(Task):
    """The variance of tomorrow's return."""

    columns = ("returns", "first", "garch", "index")
    target_columns = ("first", "garch", "index")

    def __init__(self, width: int = 8) -> None:
        self.width = width

    def build(self) -> nn.Module:
        return Volatility(self.width)

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        found = tensors(rows)
        return Batch(int((DAYS - found["first"]).sum()), **found)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return qlike(model(batch.returns)[:, :-1].float(), batch.returns, batch.first) / batch.count

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        ours = qlike(model(batch.returns)[:, :-1].float(), batch.returns, batch.first)
        theirs = qlike(batch.garch[:, 1:].log(), batch.returns, batch.first)
        return {"qlike": Sum(ours.item(), batch.count), "garch_qlike": Sum(theirs.item(), batch.count)}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        from jobs.common.charts import lines

        whole = (batch.first == DAYS - SPAN).tolist()
        same = [row for row, name in enumerate(batch.index) if name == batch.index[0] and whole[row]]
        shown = {"|return|": batch.returns.abs(), "GARCH(1,1)": batch.garch.sqrt(), "GRU": _deviations(model, batch)}
        series = {name: value[same, DAYS - SPAN :].flatten().cpu().numpy() for name, value in shown.items()}
        title = f"{batch.index[0]}, {len(same) * SPAN} days of the test: percent a day"
        return [Artifact.image(lines(series, title), f"{title}; forecasts were made the evening before")]

    def read(self, source: Input) -> dict[str, Any]:
        text = source.data.decode(errors="replace") if source.text is None else source.text
        try:
            prices = np.array(text.replace(",", " ").split(), np.float64)
        except ValueError:
            raise UserError("prices are numbers, one a line or with spaces between them, oldest first") from None
        if len(prices) <= DAYS or not (prices > 0).all():
            raise UserError(f"{DAYS + 1} closing prices above 0 are needed, oldest first; there are {len(prices)}")
        return {"returns": (100 * np.diff(np.log(prices)))[-DAYS:].astype(np.float32)}

    def predict(self, model: Any, batch: Batch) -> list[dict[str, float]]:
        days = (model(batch.returns)[:, -1].float() / 2).exp().tolist()
        return [{"volatility": round(one, 3), "yearly": round(one * TRADING_DAYS**0.5, 2)} for one in days]


def _deviations(model: Any, batch: Batch) -> torch.Tensor:
    """(rows, days) of what each day was expected to be; of the first one nothing is known."""
    said = (model(batch.returns).float() / 2).exp()
    return torch.cat([said[:, :1], said[:, :-1]], 1)


def make_data(url: str) -> dict[str, int]:
    """Writes rows of both indices under url/train and url/test; returns rows by split."""
    return write_splits(url, index_splits(DAYS, SPAN), rows_per_group=8)


def figures(bench: Bench) -> list[Figure]:
    """Both forecasts are evaluated in the same run, on the same days."""
    found = bench.run()["eval"]
    garch = found["garch_qlike"]
    return [Figure("QLIKE of the next day", found["qlike"], target=garch, baseline=garch, at_least=False)]


if __name__ == "__main__":
    main(make_data)
