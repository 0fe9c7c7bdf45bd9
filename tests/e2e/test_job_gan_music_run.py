"""jobs.gan_music from its data to files that can be played."""

from __future__ import annotations

from pathlib import Path

import harness
import mido

from jobs.gan_music import make_data


def test_it_begins_to_make_music(tmp_path: Path, ray_address: str) -> None:
    make_data(str(tmp_path), 512, 128)
    spec = str(harness.ROOT / "jobs" / "gan_music.yaml")
    where = [f"data.train={tmp_path / 'train'}", f"data.eval={tmp_path / 'test'}", f"runs={tmp_path / 'runs'}"]
    small = ["args={width: 48, penalty: 1.0}", "train.steps=160", "train.eval_every=160", "train.ema=0.9"]
    rates = ["optim.schedule=constant", "optim.lr=2e-3", "optim.networks.discriminator.lr=4e-3", "metrics.port=0"]
    env = {"PYTHONPATH": str(harness.ROOT), "DLTRAIN_RUNS": str(tmp_path / "runs")}
    done = harness.dltrain("run", spec, *where, *small, *rates, "--json", "--address", ray_address, env=env)
    assert done.code == 0, done.err
    # An untrained one is where notes at random are: at 1.
    assert done.json["eval"]["in_key"] < 0.7
    made = harness.dltrain("predict", "gan-music", "--count", "2", "--out", str(tmp_path / "made"), "--json", env=env)
    assert made.code == 0, made.err
    assert sorted(Path(file).suffix for file in made.json["files"]) == 2 * [".mid"] + 2 * [".png"] + 2 * [".wav"]
    assert mido.MidiFile(next((tmp_path / "made").glob("*.mid"))).length == 8.0
