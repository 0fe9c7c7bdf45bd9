"""Callbacks and samples on two ranks: the loss is the global batch's, and no rank waits for one that has raised."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import torch
import torch.distributed as dist
from launch import run_ranks

from dltrain import Artifact, Batch, Callback, Task
from dltrain.observing.reports import Logged, Shown
from dltrain.spec import parse_spec
from dltrain.training.engine import StepResult
from dltrain.training.onlookers import Onlookers


class Raises(Task):
    """Its samples raise on one rank; its callback logs the loss."""

    def __init__(self, bad_rank: int) -> None:
        self.bad_rank = bad_rank
        self.callbacks = (Callback(lambda moment: moment.log(loss=moment.loss, judge=moment.losses["judge"])),)

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        if dist.get_rank() == self.bad_rank:
            raise KeyError("label")
        return [Artifact.text(f"{float(torch.rand(1)):.6f}")]


def looking(run: str, spec: dict[str, Any], bad_rank: int) -> tuple[Onlookers, list[str]]:
    notes: list[str] = []
    job = SimpleNamespace(spec=parse_spec(spec), rank=dist.get_rank(), num_ranks=dist.get_world_size(), run=run)
    networks = SimpleNamespace(model=None, averaged=contextlib.nullcontext)
    made = Onlookers(Raises(bad_rank), networks, job, torch.device("cpu"), lambda _: None, notes.append)  # type: ignore[arg-type]
    return made, notes


def on_rank(run: str, spec: dict[str, Any]) -> Any:
    found = []
    for bad_rank in (0, 1, -1):
        made, notes = looking(run, spec, bad_rank)
        first = lambda: Batch(1)  # noqa: E731
        if bad_rank == -1:
            made.made(5, StepResult(True, True, 1.0, 0.1, 1.0 + dist.get_rank(), {"judge": 0.5}))
        else:
            made.made(5, StepResult(True, True, 1.0, 0.1, 0.0, {"judge": 0.5}))
        found.append(([r for r in made.evaluated(5, {}, True, False, first) if isinstance(r, Shown)], notes))
        found.append(list(made.after("step", 5)))
    made, notes = looking(run, spec, -1)

    def gone() -> Batch:
        if dist.get_rank() == 1:
            raise OSError("gone")
        return Batch(1)

    found.append((list(made.evaluated(6, {}, True, False, gone)), notes))
    return found


def test_two_ranks(tmp_path: Path) -> None:
    zero, one = run_ranks(on_rank, 2, str(tmp_path), harness.make_spec(tmp_path))
    note = "step 5: no samples are shown (KeyError: 'label'); the run goes on"
    for i in (0, 2):
        assert zero[i] == ([], [note])
        assert one[i] == ([], [])
    (shown,) = zero[4][0]
    assert len(shown.artifacts) == 1
    assert one[4] == ([], [])
    # The sum of the ranks' parts, logged once.
    assert zero[5] == [Logged(0, 5, {"loss": 3.0, "judge": 1.0})]
    assert one[5] == []
    # A batch that one rank could not read.
    assert zero[6] == ([], ["step 6: no samples are shown (OSError: gone); the run goes on"])
    assert one[6] == ([], [])
