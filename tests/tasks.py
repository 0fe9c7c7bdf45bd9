"""Small tasks for tests: a regression without dropout or BatchNorm, and what goes wrong in them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, BadRowsError, Batch, Callback, Keys, Sum, Task, every
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


class Greedy(Tiny):
    """Takes memory, once, in the first process that finds the file `bait`."""

    def __init__(self, bait: str, megabytes: int, seconds: float = 0.0) -> None:
        super().__init__(seconds)
        self.bait, self.megabytes = bait, megabytes

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.bait)
            self.taken = [os.urandom(10**6) for _ in range(self.megabytes)]
        return super().loss(model, batch)


class Pair(Tiny):
    """Two networks with turns: a maker turns rows around, a judge tells its rows from the data's."""

    def build(self) -> dict[str, nn.Module]:  # type: ignore[override]
        maker = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        judge = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Dropout(self.dropout), nn.Linear(16, 1))
        return {"judge": judge, "maker": maker}

    def step(self, networks: Any, batch: Batch) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds)
        judge, maker = networks["judge"], networks["maker"]
        if networks.turn == "judge":
            with torch.no_grad():
                made = maker(batch.x.flip(-1)).float()
            return {"judge": (F.softplus(-judge(batch.x).float()) + F.softplus(judge(made).float())).mean()}
        return {"maker": F.softplus(-judge(maker(batch.x.flip(-1))).float()).mean()}

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        taken = model["judge"](model["maker"](batch.x.flip(-1))).float()
        return {"loss": Sum(float(F.softplus(-taken).sum()), batch.count)}


class Penalised(Pair):
    """The judge's loss holds its gradient by the data (R1)."""

    def step(self, networks: Any, batch: Batch) -> dict[str, torch.Tensor]:
        losses = super().step(networks, batch)
        if networks.turn == "judge":
            real = batch.x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(networks["judge"](real).float().sum(), real, create_graph=True)
            losses["judge"] = losses["judge"] + slope.square().sum(1).mean()
        return losses


class PairWithoutStep(Pair):
    """Lacks what several networks need."""

    step = Task.step  # type: ignore[assignment]


class Uneven(Tiny):
    """Rank 1 takes twice as long for its forward pass, and evaluations take a while; a callback logs the step."""

    callbacks = (every(1, lambda moment: moment.log(seen=moment.step)),)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        time.sleep(self.seconds * (os.environ["RANK"] == "1"))
        return super().loss(model, batch)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        time.sleep(5 * self.seconds)
        return super().evaluate(model, batch)


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


class Shows(Tiny):
    """Logs, shows samples, and goes wrong in them in every way that it is told to.

    Args:
        raises: "samples" or "callback".
    """

    def __init__(self, raises: str = "", seconds: float = 0.0) -> None:
        super().__init__(seconds)
        self.raises = raises
        self.callbacks = (
            every(5, self.look),
            Callback(self.tell, when="eval"),
            Callback(self.tell, when="checkpoint"),
            Callback(self.tell, when="end"),
        )

    def look(self, moment: Any) -> None:
        if self.raises == "callback" and moment.step == 15:
            raise ArithmeticError("what a callback raises")
        moment.log(twice=2 * moment.loss, rank=moment.rank)

    def tell(self, moment: Any) -> None:
        print(f"rank {moment.rank} of {moment.num_ranks}: {moment.when} at step {moment.step}", flush=True)

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        if self.raises == "samples":
            raise LookupError("nothing to look at")
        found = model(batch.x).float()
        rows = [{"y": f"{y:.3f}", "found": f"{f:.3f}"} for y, f in zip(batch.y[:5, 0], found[:5, 0], strict=True)]
        picture = Artifact.image(batch.x.cpu().numpy(), "the rows")
        return [picture, Artifact.table(rows, "what was found"), Artifact.text(f"{len(batch.ids)} rows")]


class Crashes(Tiny):
    """Reads where nothing is, in native code."""

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        if self.bad_row in batch.ids:
            print("about to read where nothing is", flush=True)
            ctypes.string_at(0)
        return super().loss(model, batch)


class DiesOnce(Tiny):
    """Its process ends in a step, if the file `bait` is there, which goes with it."""

    def __init__(self, bait: str, step: int) -> None:
        super().__init__()
        self.bait, self.left = bait, step

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.bait)
                os._exit(7)
        return super().loss(model, batch)
