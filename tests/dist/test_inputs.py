"""What ranks read: the same plan on all of them, or an error on all of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from launch import run_ranks

from dltrain.data.plan import Plan
from dltrain.errors import RunFailedError
from dltrain.running.rundir import RunDir, make_plan
from dltrain.spec import parse_spec
from dltrain.training.inputs import Inputs
from dltrain.training.plan import RankJob, Schedule


def begun(tmp_path: Path) -> tuple[dict[str, Any], Plan]:
    """A run directory with a plan in it."""
    harness.write_data(tmp_path / "train")
    spec = harness.make_spec(tmp_path, data={"train": str(tmp_path / "train"), "eval": str(tmp_path / "train")})
    parsed = parse_spec(spec)
    run = RunDir.of(parsed)
    plan, _, is_new = make_plan(parsed, run, print)
    assert is_new
    run.save_plan(plan)
    return spec, plan


def inputs(spec: dict[str, Any], rank: int, num_ranks: int, plan: bytes | None, plan_id: str) -> Inputs:
    parsed = parse_spec(spec)
    run, schedule = RunDir.of(parsed), Schedule.of(parsed, 200)
    job = RankJob(parsed, 1, rank, num_ranks, 0, 0, schedule, run.url, plan, plan_id, run.checkpoints.url)
    return Inputs(job, ("x", "y"), print)


def compare(spec: dict[str, Any], plans: list[bytes | None], plan_id: str) -> str:
    rank = int(os.environ["RANK"])
    mine = inputs(spec, rank, len(plans), plans[rank], plan_id)
    try:
        mine.check_same(torch.device("cpu"))
    except RunFailedError as error:
        return str(error)
    finally:
        mine.close()
    return "same"


def test_ranks_with_the_same_plan_and_with_another(tmp_path: Path) -> None:
    spec, plan = begun(tmp_path)
    # Rank 0 reads it from the run directory, as all do where it is large.
    assert run_ranks(compare, 2, spec, [None, plan.to_bytes()], plan.plan_id) == ["same", "same"]
    other = Plan(plan.sources, plan.eval, plan.num_lanes, seed=9)
    said = run_ranks(compare, 3, spec, [None, other.to_bytes(), None], plan.plan_id)
    assert len(set(said)) == 1
    assert f"planned as {plan.plan_id}, but rank 1 has {other.plan_id}: ranks would train different rows" in said[0]


def test_one_rank_compares_with_the_driver(tmp_path: Path) -> None:
    spec, plan = begun(tmp_path)
    mine = inputs(spec, 0, 1, None, plan.plan_id)
    mine.check_same(torch.device("cpu"))
    assert mine.eval_reader is not None
    assert mine.readers[0].read(0).column_names == ["x", "y"]
    mine.close()
    with pytest.raises(RunFailedError, match="rank 0 has"):
        inputs(spec, 0, 1, None, "0123456789abcdef").check_same(torch.device("cpu"))
