"""jobs.gan_image from its data to a sheet of digits."""

from __future__ import annotations

import io
from pathlib import Path

import harness
from PIL import Image

from jobs.common.judge import FILE
from jobs.gan_image import make_data


def test_it_begins_to_write_digits(tmp_path: Path, ray_address: str) -> None:
    # The classifier need not be a good one: what is measured is told apart by its features.
    make_data(str(tmp_path), epochs=1)
    spec = str(harness.ROOT / "jobs" / "gan_image.yaml")
    where = [f"data.train={tmp_path / 'train'}", f"data.eval={tmp_path / 'eval'}", f"runs={tmp_path / 'runs'}"]
    small = [
        f"args={{judge: {tmp_path / FILE}, width: 16}}",
        "train.steps=160",
        "train.eval_every=160",
        "train.ema=0.9",
    ]
    rates = ["optim.schedule=constant", "optim.lr=2e-3", "metrics.port=0"]
    env = {"PYTHONPATH": str(harness.ROOT), "DLTRAIN_RUNS": str(tmp_path / "runs")}
    done = harness.dltrain("run", spec, *where, *small, *rates, "--json", "--address", ray_address, env=env)
    assert done.code == 0, done.err
    # An untrained one is farther away than noise: at more than 1.
    assert done.json["eval"]["distance"] < 0.5
    assert done.json["eval"]["frechet_of_real"] < done.json["eval"]["frechet_of_noise"] / 4
    made = harness.dltrain("predict", "gan-image", "--count", "20", "--out", str(tmp_path / "made"), "--json", env=env)
    assert made.code == 0, made.err
    (sheet,) = made.json["files"]
    assert Image.open(io.BytesIO(Path(sheet).read_bytes())).size == (16 * 42 + 2, 2 * 42 + 2)
