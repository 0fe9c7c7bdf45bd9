"""Tasks that are used once they are trained, and a run directory with their weights, made without Ray."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from tasks import WIDTH, Pair, Tiny, TinyLm

from dltrain import Artifact, Batch, Input
from dltrain.checkpoint.fragments import buffers
from dltrain.checkpoint.whole import write_whole
from dltrain.errors import UserError
from dltrain.running.rundir import RunDir, make_plan
from dltrain.spec import JobSpec, parse_spec
from dltrain.training.task import load_task, networks_of


class Sums(Tiny):
    """Says what the network makes of eight numbers."""

    target_columns = ("y",)

    def read(self, source: Input) -> Mapping[str, Any]:
        text = source.text if source.text is not None else (source.data or b"").decode()
        if text.startswith("{"):
            return super().read(source)
        try:
            return {"x": [float(word) for word in text.split()]}
        except ValueError as error:
            raise UserError(f"no numbers: {error}") from None

    def predict(self, model: Any, batch: Batch) -> Sequence[Any]:
        return [{"value": round(v, 5), "positive": v > 0} for v in model(batch.x)[:, 0].tolist()]

    def draw(self, batch: Batch, results: Sequence[Any]) -> list[Artifact]:
        return [Artifact.image(x[None].numpy(), f"{r['value']}") for x, r in zip(batch.x, results, strict=True)]


class Tells(Sums):
    """Its answer comes word by word."""

    def predict(self, model: Any, batch: Batch) -> Iterator[str]:
        assert len(batch.x) == 1
        assert not torch.is_grad_enabled()
        yield "about "
        assert not torch.is_grad_enabled()
        yield f"{model(batch.x).item():.3f}"


class Counts(TinyLm):
    """Says how many tokens there are, of rows as packing makes them."""

    def read(self, source: Input) -> Mapping[str, Any]:
        tokens = [int(word) for word in (source.text or "").split()]
        pad = [0] * (8 - len(tokens))
        return {"tokens": tokens + pad, "segment_ids": [1] * len(tokens) + pad, "num_tokens": len(tokens)}

    def predict(self, model: Any, batch: Batch) -> Sequence[Any]:
        assert model(batch.tokens).shape == (len(batch.tokens), 8, 50)
        return (batch.same.sum(1) + 1).tolist()


class Short(Sums):
    """Forgets a row."""

    def predict(self, model: Any, batch: Batch) -> Sequence[Any]:
        return super().predict(model, batch)[1:]


class Raises(Sums):
    """Has a mistake in it."""

    def predict(self, model: Any, batch: Batch) -> Sequence[Any]:
        raise KeyError("the column that nobody has")


class Rolls(Sums):
    """Draws lots."""

    def predict(self, model: Any, batch: Batch) -> Sequence[Any]:
        return torch.rand(len(batch.x)).tolist()


class Wavers(Sums):
    """Returns a whole number for some rows and text for others."""

    def predict(self, model: Any, batch: Batch) -> Sequence[Any]:
        return [1 if i < 100 else "one" for i in batch.ids.tolist()]


class Slow(Sums):
    """Takes a while for each batch.

    Args:
        pids: a directory in which its process leaves its number.
    """

    def __init__(self, seconds: float, pids: str = "") -> None:
        super().__init__(seconds)
        self.pids = pids

    def predict(self, model: Any, batch: Batch) -> Sequence[Any]:
        if self.pids:
            Path(self.pids, f"pid-{os.getpid()}").touch()
        time.sleep(self.seconds)
        return super().predict(model, batch)


class LateMistake(Sums):
    """Has a mistake that the first rows do not show."""

    def predict(self, model: Any, batch: Batch) -> Sequence[Any]:
        return [1 / (i - 70) for i in batch.ids.tolist()]


class Makes(Pair):
    """Two networks, one of which makes rows of noise."""

    def generate(self, model: Any, count: int) -> list[Any]:
        made = model["maker"](torch.randn(count, WIDTH))
        return [{"mean": round(row.mean().item(), 5), "row": Artifact.image(row[None].numpy())} for row in made]


def run_spec(tmp: Path, task: str = "use_tasks:Sums", **changes: Any) -> JobSpec:
    """A spec over data under `tmp`, which is made where it is missing."""
    if not (tmp / "train").exists():
        harness.write_data(tmp / "train")
    return parse_spec(harness.make_spec(tmp, task=task, **changes))


def trained(tmp: Path, task: str = "use_tasks:Sums", step: int = 7, averaged: bool = False, **changes: Any) -> str:
    """A run directory as training leaves it, with a checkpoint of `step` of a network as it was built; its path.

    Args:
        averaged: it has an average of its weights, all of them 0.01.
    """
    spec = run_spec(tmp, task, **changes)
    run = RunDir.of(spec)
    if run.load_plan() is None:
        plan, _, _ = make_plan(spec, run, print)
        run.save_spec(spec)
        run.save_plan(plan)
    torch.manual_seed(step)
    with contextlib.redirect_stdout(io.StringIO()):
        modules = networks_of(load_task(spec.task, spec.args, str(harness.ROOT / "tests")).build())
    fragments, whole = {}, {}
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        fragments |= {(prefix + n, "param"): p for n, p in module.named_parameters()}
        if averaged:
            fragments |= {(prefix + n, "ema"): torch.full_like(p, 0.01) for n, p in module.named_parameters()}
        whole |= {f"buffer:{prefix}{n}": b for n, b in buffers(module).items()}
    meta = {"position": step * 16, "optimizer_step": step, "ties": {}, "metrics": {"loss": 0.5}}
    write_whole(run.checkpoints, step, fragments, whole, {**meta, "best": {"metric": "loss", "step": 7}})
    return run.url


def numbers(seed: int = 0) -> str:
    """A line that `Sums` reads."""
    return " ".join(f"{v:.4f}" for v in torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)).tolist())
