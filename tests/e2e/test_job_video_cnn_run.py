"""jobs.video_cnn from its data to the action of an animation."""

from __future__ import annotations

from pathlib import Path

import harness
import numpy as np
import pyarrow.parquet as pq

from dltrain import Artifact
from jobs.common.clips import ACTIONS, FRAMES, SIZE, frames_of
from jobs.common.mimicry import CHANGES
from jobs.video_cnn import make_data


def test_it_learns_what_happens(tmp_path: Path, ray_address: str) -> None:
    make_data(str(tmp_path), 1120, 140)
    spec = str(harness.ROOT / "jobs" / "video_cnn.yaml")
    where = [f"data.train={tmp_path / 'train'}", f"data.eval={tmp_path / 'test'}", f"runs={tmp_path / 'runs'}"]
    small = ["args={width: 8, stages: 2}", "train.epochs=5", "optim.lr=1e-2", "metrics.port=0"]
    env = {"PYTHONPATH": str(harness.ROOT), "DLTRAIN_RUNS": str(tmp_path / "runs")}
    done = harness.dltrain("run", spec, *where, *small, "--json", "--address", ray_address, env=env)
    assert done.code == 0, done.err
    # By chance: one of 14.
    assert done.json["eval"]["accuracy"] > 0.5
    table = pq.read_table(tmp_path / "test")
    frames = frames_of([table["clip"][0].as_py()], (FRAMES, SIZE, SIZE))[0].astype(np.uint8)
    (tmp_path / "clip.gif").write_bytes(Artifact.animation(frames).data)
    (tmp_path / "none.gif").write_text("nothing")
    files = [str(tmp_path / name) for name in ("clip.gif", "none.gif")]
    found = harness.dltrain("predict", "video-cnn", *files, "--out", str(tmp_path / "drawn"), "--json", env=env)
    assert (found.code, found.json["bad"]) == (2, 1)
    assert found.json["results"][0]["prediction"]["action"] in (*ACTIONS, *CHANGES)
    assert [Path(file).suffix for file in found.json["files"]] == [".gif"]
