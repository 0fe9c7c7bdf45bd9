"""Small tasks for tests: a regression without dropout or BatchNorm, and what goes wrong in them."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import BadRowsError, Batch, Keys, Sum, Task
from dltrain.data.columns import tensors

WIDTH = 8


class Tiny(Task):
    """Regression of y on x.

    Args:
        seconds: slept in each loss, so that there is time to interfere.
        bad_row: the row id that raises in loss; nan_row: the one that makes the loss nan.
        refused_y: collate refuses rows with a larger y.
    """

    columns = ("x", "y")

    def __init__(
        self, seconds: float = 0.0, bad_row: int = -1, nan_row: int = -1, dropout: float = 0.0, refused_y: float = 1e9
    ) -> None:
        self.seconds, self.bad_row, self.nan_row, self.dropout = seconds, bad_row, nan_row, dropout
        self.refused_y = refused_y

    def build(self) -> nn.Module:
        print("hello from the task")
        return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(32, 1))

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        x = np.array(rows["x"].flatten().to_numpy().reshape(-1, WIDTH), np.float32)
        y = np.array(rows["y"].to_numpy(), np.float32)
        refused = np.flatnonzero(y > self.refused_y).tolist()
        if refused:
            raise BadRowsError(refused, "y is out of range")
        return Batch(len(y), x=torch.from_numpy(x), y=torch.from_numpy(y)[:, None], ids=keys.ids)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        time.sleep(self.seconds)
        if self.bad_row in batch.ids:
            raise KeyError("the column that nobody has")
        loss = F.mse_loss(model(batch.x).float(), batch.y)
        return loss * float("nan") if self.nan_row in batch.ids else loss

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        error = model(batch.x).float() - batch.y
        return {
            "loss": Sum(float((error**2).sum()), batch.count),
            "mae": Sum(float(error.abs().sum()), batch.count),
        }


class NeedsMore(Tiny):
    """Asks for a column that the data lacks."""

    columns = ("x", "y", "z")


class Dies(Tiny):
    """Its process ends without a word."""

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        if self.bad_row in batch.ids:
            print("going down", flush=True)
            os._exit(7)
        return super().loss(model, batch)


class NotATask:
    """Forgot to derive from Task."""


class TinyLm(Task):
    """Predicts each token from the one before it, within its document; a batch counts predictions."""

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        found = tensors(rows)
        tokens, segments = found["tokens"].long(), found["segment_ids"]
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        return Batch(int(same.sum()), tokens=tokens, same=same)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        logits = model(batch.tokens[:, :-1]).float()
        each = F.cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none")
        return (each * batch.same).sum() / max(batch.count, 1)
