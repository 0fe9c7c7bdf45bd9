"""jobs.few_labels from scans without labels to digits, in seconds."""

from __future__ import annotations

from pathlib import Path

import harness
import numpy as np
import pyarrow.parquet as pq

from dltrain import Artifact
from jobs.common.digits import LEVELS, SIDE
from jobs.few_labels import make_data


def test_it_learns_without_labels_and_then_with_few(tmp_path: Path, ray_address: str) -> None:
    make_data(str(tmp_path))
    env = {"PYTHONPATH": str(harness.ROOT), "DLTRAIN_RUNS": str(tmp_path / "runs")}
    small = ["batch.global=64", "optim.lr=1e-2", "optim.warmup=10", f"runs={tmp_path / 'runs'}", "metrics.port=0"]
    first = [f"data.train={tmp_path / 'scans'}", "train.epochs=8", "args={width: 16, classes: 40, warp: true}"]
    then = [f"data.train={tmp_path / 'labels-0'}", f"data.eval={tmp_path / 'test'}", "train.steps=60"]
    for name, more in (("few_labels_pretrain", first), ("few_labels", then)):
        spec = str(harness.ROOT / "jobs" / f"{name}.yaml")
        done = harness.dltrain("run", spec, *more, *small, "--json", "--address", ray_address, env=env)
        assert done.code == 0, done.err
    # By chance one of ten; a frozen body that has seen nothing gets to 0.43.
    assert done.json["eval"]["accuracy"] > 0.55
    image = pq.read_table(tmp_path / "test")["image"][0].as_py()
    grey = np.frombuffer(image, np.uint8).reshape(SIDE, SIDE) / np.float32(LEVELS)
    (tmp_path / "scan.png").write_bytes(Artifact.image(grey).data)
    said = harness.dltrain("predict", "few-labels", str(tmp_path / "scan.png"), "--json", env=env)
    assert said.code == 0, said.err
    assert said.json["results"][0]["prediction"]["label"] in range(10)
