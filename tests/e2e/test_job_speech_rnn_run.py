"""jobs.speech_rnn from its data to transcripts of files."""

from __future__ import annotations

from pathlib import Path

import harness
import pyarrow.parquet as pq

from jobs.speech_rnn import make_data


def test_it_begins_to_hear(tmp_path: Path, ray_address: str) -> None:
    make_data(str(tmp_path), 160, 32)
    spec = str(harness.ROOT / "jobs" / "speech_rnn.yaml")
    where = [f"data.train={tmp_path / 'train'}", f"data.eval={tmp_path / 'test'}", f"runs={tmp_path / 'runs'}"]
    small = ["args={width: 64, layers: 1, dropout: 0.0}", "batch.global=16", "train.epochs=20", "optim.lr=1e-2"]
    env = {"PYTHONPATH": str(harness.ROOT), "DLTRAIN_RUNS": str(tmp_path / "runs")}
    done = harness.dltrain(
        "run", spec, *where, *small, "optim.warmup=10", "metrics.port=0", "--json", "--address", ray_address, env=env
    )
    assert done.code == 0, done.err
    # One that has learned to say nothing is at 2.9 and at 1.
    assert done.json["eval"]["loss"] < 2.7
    assert done.json["eval"]["cer"] < 0.9
    (tmp_path / "said.ogg").write_bytes(pq.read_table(tmp_path / "test")["audio"][0].as_py())
    (tmp_path / "none.wav").write_text("not a sound")
    files = [str(tmp_path / name) for name in ("said.ogg", "none.wav")]
    found = harness.dltrain("predict", "speech-rnn", *files, "--out", str(tmp_path / "drawn"), "--json", env=env)
    assert found.code == 2
    assert found.json["bad"] == 1
    assert isinstance(found.json["results"][0]["prediction"], str)
    assert len(found.json["files"]) == 1
