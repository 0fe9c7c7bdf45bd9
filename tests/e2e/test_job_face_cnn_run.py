"""jobs.face_cnn from its data to who is in a picture."""

from __future__ import annotations

from pathlib import Path

import harness
import numpy as np
import pyarrow.parquet as pq

from dltrain import Artifact
from jobs.common.faces import FACE
from jobs.common.people import EMOTIONS, PEOPLE
from jobs.face_cnn import make_data


def test_it_learns_faces(tmp_path: Path, ray_address: str) -> None:
    make_data(str(tmp_path), 800, 100)
    spec = str(harness.ROOT / "jobs" / "face_cnn.yaml")
    where = [f"data.train={tmp_path / 'train'}", f"data.eval={tmp_path / 'test'}", f"runs={tmp_path / 'runs'}"]
    small = ["args={width: 8, blocks: 1}", "train.epochs=4", "train.eval_every=100", "optim.lr=6e-3", "metrics.port=0"]
    env = {"PYTHONPATH": str(harness.ROOT), "DLTRAIN_RUNS": str(tmp_path / "runs")}
    done = harness.dltrain("run", spec, *where, *small, "--json", "--address", ray_address, env=env)
    assert done.code == 0, done.err
    # By chance: one of twenty, and a loss of ln 20 + ln 5 = 4.6. Emotions take longer.
    assert done.json["eval"]["identity"] > 0.2
    assert done.json["eval"]["loss"] < 4.3
    pixels = np.frombuffer(pq.read_table(tmp_path / "test")["image"][0].as_py(), np.uint8).reshape(FACE, FACE, 3)
    (tmp_path / "face.png").write_bytes(Artifact.image(pixels).data)
    (tmp_path / "none.png").write_text("nothing")
    files = [str(tmp_path / name) for name in ("face.png", "none.png")]
    found = harness.dltrain("predict", "face-cnn", *files, "--out", str(tmp_path / "drawn"), "--json", env=env)
    assert (found.code, found.json["bad"]) == (2, 1)
    prediction = found.json["results"][0]["prediction"]
    assert prediction["emotion"] in EMOTIONS
    assert prediction["person"] in range(PEOPLE)
    assert [Path(file).suffix for file in found.json["files"]] == [".png"]
