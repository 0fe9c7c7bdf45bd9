"""A task of several networks: one checkpoint for all, at any number of workers and stage; recovery; mistakes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import dltrain, make_spec, start, steps, wait_for_step, write_data, write_spec
from safetensors.torch import load_file

TASK: dict[str, Any] = {"task": "tasks:Pair", "optim": {"lr": 0.01, "networks": {"judge": {"lr": 0.003}}}}


def losses(run: Path) -> list[dict[str, float]]:
    found = steps(run)
    return [found[s]["losses"] for s in sorted(found)]


def weights(run: Path, to: Path) -> dict[str, torch.Tensor]:
    done = dltrain("checkpoint", "export", str(run), "--to", str(to), "--step", "newest")
    assert done.code == 0, done.err
    return load_file(to / "model.safetensors")


@pytest.mark.long
def test_resumed_at_other_sizes_and_stages(run_in: Any, tmp_path: Path) -> None:
    data = {"train": str(tmp_path / "train"), "eval": str(tmp_path / "test")}
    whole = run_in(name="whole", **TASK, data=data, train={"steps": 28}, workers=1, engine={"zero": 0})
    assert whole.code == 0, whole.err
    assert set(whole.json["eval"]) == {"loss"}
    for end, workers, zero in ((10, 2, 1), (19, 1, 3), (28, 3, 2)):
        done = run_in(name="parts", **TASK, data=data, train={"steps": end}, workers=workers, engine={"zero": zero})
        assert done.code == 0, done.err
    runs = tmp_path / "runs"
    a, b = losses(runs / "whole"), losses(runs / "parts")
    assert [set(line) for line in b] == [{"judge", "maker"}] * 28
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    mine, theirs = weights(runs / "parts", tmp_path / "a"), weights(runs / "whole", tmp_path / "b")
    assert {name.split(".")[0] for name in mine} == {"judge", "maker"}
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6)


def test_a_gradient_penalty(run_in: Any, tmp_path: Path) -> None:
    more: dict[str, Any] = {**TASK, "task": "tasks:Penalised", "train": {"steps": 8}}
    for name, workers, zero in (("one", 1, 0), ("two", 2, 2)):
        done = run_in(name=name, **more, workers=workers, engine={"zero": zero})
        assert done.code == 0, done.err
    for one, other in zip(losses(tmp_path / "runs" / "one"), losses(tmp_path / "runs" / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    plain = run_in(name="plain", **{**more, "task": "tasks:Pair"}, workers=1)
    assert plain.code == 0, plain.err
    assert losses(tmp_path / "runs" / "plain")[0]["judge"] < losses(tmp_path / "runs" / "one")[0]["judge"]


@pytest.mark.long
def test_killed_and_the_same_bit_for_bit(tmp_path: Path, ray_address: str) -> None:
    write_data(tmp_path / "train")
    spec = make_spec(tmp_path, **TASK, args={"seconds": 0.05, "dropout": 0.2}, train={"steps": 50}, workers=2)
    run = tmp_path / "runs" / "tiny"
    process = start("run", str(write_spec(tmp_path, spec)), "--json", "--address", ray_address)
    live = wait_for_step(run, 12, process)
    os.kill(live["workers"][1]["pid"], signal.SIGKILL)
    done = harness.finish(process)
    assert done.code == 0, done.err
    assert done.json["restarts"] == 1
    quiet = {**spec, "name": "whole", "args": {"dropout": 0.2}}
    assert dltrain("run", str(write_spec(tmp_path, quiet)), "--json", "--address", ray_address).code == 0
    a, b = weights(run, tmp_path / "a"), weights(tmp_path / "runs" / "whole", tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert losses(run) == losses(tmp_path / "runs" / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "tasks:PairWithoutStep"}, "define `step`"),
        ({"optim": {"lr": 0.01, "networks": {"painter": {"lr": 1}}}}, "optim.networks: found 'painter'"),
        ({"optim": {"lr": 0.01, "networks": {"judge": {"lr": -1}}}}, "networks.judge.lr: found -1"),
        ({"task": "tasks:Tiny", "optim": {"lr": 0.01, "networks": {"judge": {}}}}, "one network without a name"),
    ],
)
def test_mistakes(run_in: Any, changes: dict[str, Any], message: str) -> None:
    done = run_in(**{**TASK, "train": {"steps": 4}, **changes})
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err
