"""jobs.label_check from its data to the labels that it doubts, in seconds."""

from __future__ import annotations

from pathlib import Path

from harness import ROOT, dltrain

from jobs.label_check import make_data


def test_it_finds_labels_that_were_flipped(tmp_path: Path, ray_address: str) -> None:
    assert make_data(str(tmp_path / "data")) == {"train": 1797}
    data = [f"data.train={tmp_path}/data/train", f"data.eval={tmp_path}/data/train", f"runs={tmp_path}/runs"]
    less = ["args.width=8", "train.epochs=3", "train.eval_every=84", "metrics.port=0", "--address", ray_address]
    done = dltrain("run", str(ROOT / "jobs" / "label_check.yaml"), *data, *less, "--json")
    assert done.code == 0, done.err
    # Named at random, one in twenty would be flipped.
    assert done.json["eval"]["found"] > 0.5
    assert done.json["eval"]["precision"] > 0.25
    told = dltrain("predict", str(tmp_path / "runs" / "label-check"), str(tmp_path / "data" / "train"), "--json")
    assert told.code == 0, told.err
    first = told.json["results"][0]["prediction"]
    assert set(first) == {"label", "likely", "seen_as"}
    assert 0 <= first["likely"] <= 1
