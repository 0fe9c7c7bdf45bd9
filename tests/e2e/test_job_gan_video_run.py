"""jobs.gan_video from its data to animations."""

from __future__ import annotations

from pathlib import Path

import harness

from jobs.common.clips import ACTIONS
from jobs.common.judge import FILE
from jobs.gan_video import make_data


def test_it_begins_to_make_clips(tmp_path: Path, ray_address: str) -> None:
    # The classifier need not be a good one: what is measured is told apart by its features.
    make_data(str(tmp_path), 320, 80, epochs=1)
    spec = str(harness.ROOT / "jobs" / "gan_video.yaml")
    where = [f"data.train={tmp_path / 'train'}", f"data.eval={tmp_path / 'test'}", f"runs={tmp_path / 'runs'}"]
    small = [f"args={{judge: {tmp_path / FILE}, width: 4}}", "train.steps=160", "train.eval_every=160", "train.ema=0.9"]
    rates = ["optim.schedule=constant", "optim.lr=2e-3", "metrics.port=0"]
    env = {"PYTHONPATH": str(harness.ROOT), "DLTRAIN_RUNS": str(tmp_path / "runs")}
    done = harness.dltrain("run", spec, *where, *small, *rates, "--json", "--address", ray_address, env=env)
    assert done.code == 0, done.err
    # An untrained one is farther away than noise: at more than 1.
    assert done.json["eval"]["distance"] < 0.5
    made = harness.dltrain("predict", "gan-video", "--count", "9", "--out", str(tmp_path / "made"), "--json", env=env)
    assert made.code == 0, made.err
    assert [one["prediction"]["action"] for one in made.json["results"]] == [*ACTIONS, ACTIONS[0]]
    assert [Path(file).suffix for file in made.json["files"]] == 9 * [".gif"]
