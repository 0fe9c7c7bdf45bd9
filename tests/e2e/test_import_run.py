"""What a plain DeepSpeed program trained goes on as a run of dltrain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import dltrain, make_spec, steps, write_data, write_spec

sys.path.insert(0, str(harness.ROOT / "tests" / "dist"))

from launch import run_ranks

STEPS, LR = 400, 0.01


def plain_deepspeed(data: str, directory: str, zero: int) -> float:
    """A training loop that knows nothing of dltrain but the network; returns its last loss."""
    import deepspeed
    import pyarrow.parquet as pq
    import torch.distributed as dist
    import torch.nn.functional as F
    from tasks import WIDTH, Tiny

    torch.manual_seed(3)
    module = Tiny().build()
    config = {
        "train_batch_size": 16,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    table = pq.read_table(data)
    x = torch.tensor(table["x"].to_pylist()).reshape(-1, WIDTH)
    y = torch.tensor(table["y"].to_pylist())[:, None]
    mine = slice(dist.get_rank() * 8, dist.get_rank() * 8 + 8)
    loss = torch.zeros(())
    for step in range(STEPS):
        rows = torch.arange(step * 16, step * 16 + 16)[mine] % len(x)
        loss = F.mse_loss(engine(x[rows]), y[rows])
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(directory)
    return loss.item()


@pytest.mark.long
@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.soak), 2])
def test_a_deepspeed_program_goes_on(tmp_path: Path, ray_address: str, zero: int) -> None:
    data = write_data(tmp_path / "train")
    folder = str(tmp_path / "out")
    run_ranks(plain_deepspeed, 2, str(data), folder, zero)
    changes: dict[str, Any] = {"optim": {"lr": LR}, "train": {"steps": STEPS + 20}, "workers": 1, "engine": {"zero": 1}}
    spec = str(write_spec(tmp_path, make_spec(tmp_path, **changes)))
    taken = dltrain("checkpoint", "import", folder, "--run", spec, "--json")
    assert taken.code == 0, taken.err
    assert (taken.json["step"], taken.json["moments"]) == (STEPS, ["exp_avg", "exp_avg_sq"])
    table = dltrain("checkpoint", "list", str(tmp_path / "runs" / "tiny"), "--json").json["checkpoints"]
    assert [row["step"] for row in table] == [STEPS]
    done = dltrain("run", spec, "--json", "--address", ray_address)
    assert done.code == 0, done.err
    assert (done.json["steps"], done.json["samples"]) == (STEPS + 20, 20 * 16)
    mine = steps(tmp_path / "runs" / "tiny")
    assert min(mine) == STEPS + 1
    fresh = dltrain("run", spec, "name=fresh", "train.steps=20", "--json", "--address", ray_address)
    assert fresh.code == 0, fresh.err
    before = steps(tmp_path / "runs" / "fresh")
    # It begins where the other ended: well below an untrained network's losses.
    first = sum(mine[STEPS + i]["loss"] for i in range(1, 6))
    assert first < 0.3 * sum(before[i]["loss"] for i in range(1, 6))
    assert dltrain("audit", str(tmp_path / "runs" / "tiny")).code == 0
    again = dltrain("checkpoint", "import", folder, "--run", spec)
    assert again.code == 2
    assert "has checkpoints of its own" in again.err


def test_mistakes_of_the_command(tmp_path: Path) -> None:
    spec = str(write_spec(tmp_path, make_spec(tmp_path)))
    for arguments, told in (
        (["nowhere", "--run", spec], "nowhere is no directory on this machine"),
        (["nowhere"], "give --run SPEC to go on training, or --to DIR"),
        (["a", "b", "--run", spec], "write NAME=FOLDER for each"),
        (["nowhere", "--to", str(tmp_path / "x"), "--spec", "nowhere.yaml"], "can't be read"),
    ):
        done = dltrain("checkpoint", "import", *arguments)
        assert done.code == 2, (done.out, done.err)
        assert told in done.err
        assert "Traceback" not in done.err
