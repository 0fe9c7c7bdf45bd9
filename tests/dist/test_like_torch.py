"""The whole loop of all ranks against 40 lines of plain torch: the same model, data order and seed, the same curve.

At 1, 2 and 3 ranks and ZeRO 0 to 3, with micro-batches that are ragged and a last batch that is short; of rows, and of
tokens, of which every micro-batch counts another number.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import make_spec, write_data, write_documents
from launch import run_ranks
from tasks import Tiny, TinyLm

from dltrain.data import open_stream
from dltrain.observing.reports import EvalReport, StepReport
from dltrain.running.rundir import RunDir, make_plan
from dltrain.spec import JobSpec, parse_spec
from dltrain.training.loop import Loop
from dltrain.training.plan import RankJob, Schedule

GLOBAL, MICRO, SEED, LENGTH = 24, 3, 7, 16


# ---- the 40 lines ----


def plain_rows(url: str, test: str) -> tuple[list[float], float]:
    torch.manual_seed(SEED)
    model = Tiny().build()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    losses = []
    for batch in open_stream(url, ["x", "y"], global_batch=GLOBAL, seed=SEED, epochs=2):
        loss = F.mse_loss(model(batch["x"]), batch["y"][:, None])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    total = count = 0.0
    with torch.no_grad():
        for batch in open_stream(test, ["x", "y"], global_batch=50):
            total += F.mse_loss(model(batch["x"]), batch["y"][:, None], reduction="sum").item()
            count += len(batch["y"])
    return losses, total / count


def plain_tokens(url: str) -> list[float]:
    torch.manual_seed(SEED)
    model = TinyLm().build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses = []
    for batch in open_stream(url, global_batch=GLOBAL, seed=SEED, epochs=2, pack=("tokens", LENGTH)):
        tokens, segments = batch["tokens"].long(), batch["segment_ids"]
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits[same], tokens[:, 1:][same])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- dltrain ----


def planned(spec: dict[str, Any]) -> tuple[dict[str, Any], bytes, str, int]:
    """A run directory for the spec; what its ranks are given."""
    parsed = parse_spec(spec)
    run = RunDir.of(parsed)
    plan, _, _ = make_plan(parsed, run, print)
    run.save_plan(plan)
    return spec, plan.to_bytes(), plan.plan_id, plan.num_rows


def run_loop(spec: JobSpec, plan: bytes, plan_id: str, num_rows: int) -> tuple[list[float], list[float]]:
    """This rank's parts of the losses, and the evaluations."""
    from dltrain.training.task import load_task

    rank, num_ranks, run = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), RunDir.of(spec)
    schedule = Schedule.of(spec, num_rows)
    job = RankJob(spec, 1, rank, num_ranks, 0, 0, schedule, run.url, plan, plan_id, run.checkpoints.url)
    task = load_task(spec.task, spec.args, str(harness.ROOT / "tests"))
    loop = Loop(
        job, task, torch.device("cpu"), wish=lambda: "", alive=lambda phase: None, ask=lambda *where: b""
    )
    reports = []
    for report in loop.run():
        reports.append(report)
        if type(report).__name__ == "SaveWanted":
            loop.unpin(report.slot)
    losses = [r.loss for r in reports if isinstance(r, StepReport)]
    return losses, [r.metrics["loss"] for r in reports if isinstance(r, EvalReport)]


def every_stage(cases: list[tuple[dict[str, Any], bytes, str, int]]) -> list[tuple[list[float], list[float]]]:
    found = []
    for spec, plan, plan_id, num_rows in cases:
        for zero in range(4):
            parsed = parse_spec({**spec, "engine": {"zero": zero}})
            found.append(run_loop(parsed, plan, plan_id, num_rows))
    return found


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_curve_is_that_of_plain_torch(tmp_path: Path, num_ranks: int) -> None:
    train, test, text = tmp_path / "train", tmp_path / "test", tmp_path / "text"
    write_data(train, rows=203)
    write_data(test, rows=90, seed=1)
    write_documents(text)
    common = {"batch": {"global": GLOBAL, "micro": MICRO}, "train": {"epochs": 2, "seed": SEED, "eval_every": 1000}}
    rows = make_spec(
        tmp_path,
        name="rows",
        data={"train": str(train), "eval": str(test), "seed": SEED},
        optim={"lr": 0.01, "weight_decay": 0.1, "clip": 0.5},
        **common,
    )
    tokens = make_spec(
        tmp_path,
        name="tokens",
        task="tasks:TinyLm",
        data={"train": str(text), "seed": SEED, "pack": {"column": "tokens", "length": LENGTH}},
        optim={"name": "sgd", "lr": 0.5, "momentum": 0.9},
        **common,
    )
    (of_rows, evaluated), of_tokens = plain_rows(str(train), str(test)), plain_tokens(str(text))
    # 406 rows in batches of 24: the last one has 22.
    assert len(of_rows) == 17
    assert len(of_tokens) > 4
    by_rank = run_ranks(every_stage, num_ranks, [planned(rows), planned(tokens)])
    for zero in range(4):
        losses = [sum(parts) for parts in zip(*(found[zero][0] for found in by_rank), strict=True)]
        assert losses == pytest.approx(of_rows, rel=1e-5), f"rows, ZeRO {zero}"
        assert by_rank[0][zero][1] == pytest.approx([evaluated], rel=1e-5), f"rows, ZeRO {zero}"
        losses = [sum(parts) for parts in zip(*(found[4 + zero][0] for found in by_rank), strict=True)]
        assert losses == pytest.approx(of_tokens, rel=1e-5), f"tokens, ZeRO {zero}"
