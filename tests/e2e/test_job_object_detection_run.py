"""jobs.object_detection from its data to the boxes of a picture."""

from __future__ import annotations

from pathlib import Path

import harness
import numpy as np
import pyarrow.parquet as pq

from dltrain import Artifact
from jobs.common.scenes import KINDS, SCENE
from jobs.object_detection import make_data


def test_it_learns_what_is_where(tmp_path: Path, ray_address: str) -> None:
    make_data(str(tmp_path), 320, 64)
    spec = str(harness.ROOT / "jobs" / "object_detection.yaml")
    where = [f"data.train={tmp_path / 'train'}", f"data.eval={tmp_path / 'test'}", f"runs={tmp_path / 'runs'}"]
    small = ["args={width: 16, blocks: 1}", "train.epochs=5", "train.eval_every=50", "optim.lr=6e-3", "metrics.port=0"]
    env = {"PYTHONPATH": str(harness.ROOT), "DLTRAIN_RUNS": str(tmp_path / "runs")}
    done = harness.dltrain("run", spec, *where, *small, "--json", "--address", ray_address, env=env)
    assert done.code == 0, done.err
    # Untrained: below 0.001.
    assert done.json["eval"]["map50"] > 0.1
    pixels = np.frombuffer(pq.read_table(tmp_path / "test")["image"][0].as_py(), np.uint8).reshape(SCENE, SCENE)
    (tmp_path / "scene.png").write_bytes(Artifact.image(pixels).data)
    (tmp_path / "none.png").write_text("nothing")
    files = [str(tmp_path / name) for name in ("scene.png", "none.png")]
    found = harness.dltrain("predict", "object-detection", *files, "--out", str(tmp_path / "drawn"), "--json", env=env)
    assert (found.code, found.json["bad"]) == (2, 1)
    things = found.json["results"][0]["prediction"]
    assert all(thing["is"] in KINDS and len(thing["box"]) == 4 for thing in things)
    assert [Path(file).suffix for file in found.json["files"]] == [".png"]
