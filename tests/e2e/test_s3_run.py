"""A whole run against a real S3 server: data, checkpoints, journals and a resume; and what bad access gets."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import s3fs
from harness import dltrain, make_spec, write_data, write_spec


@pytest.fixture
def bucket(s3: Any, tmp_path: Path) -> str:
    """A bucket that holds the training data under train/."""
    name = f"run-{tmp_path.name[-20:].lower().replace('_', '-').strip('-')}"
    s3.make_bucket(name)
    fs = s3fs.S3FileSystem(key=s3.access_key, secret=s3.secret_key, endpoint_url=s3.endpoint)
    fs.put(str(write_data(tmp_path / "train")), f"{name}/train", recursive=True)
    return name


def spec_on(bucket: str, tmp_path: Path, **changes: Any) -> str:
    data = {"train": f"s3://{bucket}/train", "eval": f"s3://{bucket}/train/part-0.parquet"}
    spec = make_spec(tmp_path, data=data, runs=f"s3://{bucket}/runs", **changes)
    return str(write_spec(tmp_path, spec))


def test_a_run_that_lives_in_s3(s3: Any, bucket: str, tmp_path: Path) -> None:
    env = {**s3.env, "RAY_ADDRESS": "", "DLTRAIN_RUNS": f"s3://{bucket}/runs"}
    first = dltrain("run", spec_on(bucket, tmp_path, train={"steps": 12}), "--json", env=env)
    assert first.code == 0, first.err
    assert (first.json["status"], first.json["steps"]) == ("finished", 12)
    assert set(first.json["eval"]) == {"loss", "mae"}
    assert [r["state"] for r in dltrain("list", "--json", env=env).json["runs"]] == ["finished"]
    again = dltrain("run", spec_on(bucket, tmp_path, train={"steps": 20}, workers=1), "--json", env=env)
    assert again.code == 0, again.err
    assert (again.json["steps"], again.json["samples"]) == (20, 8 * 16)
    table = dltrain("checkpoint", "list", "tiny", "--json", env=env).json["checkpoints"]
    assert table[-1]["step"] == 20
    assert dltrain("checkpoint", "verify", "tiny", env=env).code == 0
    target = f"s3://{bucket}/export/model.safetensors"
    exported = dltrain("checkpoint", "export", "tiny", "--to", target, "--json", env=env)
    assert exported.code == 0, exported.err
    fs = s3fs.S3FileSystem(key=s3.access_key, secret=s3.secret_key, endpoint_url=s3.endpoint)
    assert fs.size(target) == exported.json["bytes"]
    # Objects can't be appended: the journal is numbered parts, and every step is in it once.
    lines = [line for part in sorted(fs.find(f"{bucket}/runs/tiny/steps")) for line in fs.cat(part).splitlines()]
    assert len(lines) == 20


def test_what_a_run_in_s3_shows_of_itself(s3: Any, bucket: str, tmp_path: Path) -> None:
    """Logs, samples, traces and event files go where the run is; the report is written here."""
    env = {**s3.env, "RAY_ADDRESS": "", "DLTRAIN_RUNS": f"s3://{bucket}/runs"}
    changes = {"task": "tasks:Shows", "trackers": ["tensorboard"], "profile": {"steps": "3..4"}, "workers": 1}
    done = dltrain("run", spec_on(bucket, tmp_path, train={"steps": 10}, **changes), "--json", env=env)
    assert done.code == 0, done.err
    lines = dltrain("logs", "tiny", "--json", env=env).json["lines"]
    assert {"rank": 0, "attempt": 1, "stream": "stdout", "text": "hello from the task"} in [
        {name: value for name, value in line.items() if name != "time"} for line in lines
    ]
    fs = s3fs.S3FileSystem(key=s3.access_key, secret=s3.secret_key, endpoint_url=s3.endpoint)
    found = fs.find(f"{bucket}/runs/tiny")
    for part in ("/profile/step-00000003-rank-0.json.gz", "/samples/step-00000010/index.json", "/logged/", "/logs/"):
        assert any(part in name for name in found), part
    assert sum("/tensorboard/events.out.tfevents" in name for name in found) == 1
    target = tmp_path / "page.html"
    facts = dltrain("report", "tiny", "--to", str(target), "--json", env=env).json
    assert (facts["step"], facts["shown"][0]["items"], facts["profiles"]) == (10, 3, done.json["profiles"])
    assert "what was found" in target.read_text()


def refusal(env: dict[str, str], spec: str) -> str:
    done = dltrain("run", spec, env=env)
    assert done.code == 2, (done.out, done.err)
    assert "Traceback" not in done.err
    return done.err


def test_wrong_credentials(s3: Any, bucket: str, tmp_path: Path) -> None:
    env = {**s3.env, "AWS_SECRET_ACCESS_KEY": "wrong"}
    assert "AWS_SECRET_ACCESS_KEY" in refusal(env, spec_on(bucket, tmp_path))


def test_a_bucket_that_is_not_there(s3: Any, tmp_path: Path) -> None:
    assert "bucket" in refusal(s3.env, spec_on("no-such-bucket", tmp_path))


def test_an_endpoint_that_nobody_answers(s3: Any, bucket: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    env = {**s3.env, "AWS_ENDPOINT_URL": closed, "AWS_ENDPOINT_URL_S3": closed}
    err = refusal(env, spec_on(bucket, tmp_path))
    assert closed in err
    assert "AWS_ENDPOINT_URL" in err


def test_no_data_under_the_url(s3: Any, bucket: str, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, data={"train": f"s3://{bucket}/nothing"}, runs=f"s3://{bucket}/runs")
    assert "found no Parquet" in refusal(s3.env, str(write_spec(tmp_path, spec)))
