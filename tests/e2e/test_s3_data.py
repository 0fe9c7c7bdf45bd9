"""Data tools on a real S3 server: inspect, rewrite (wholly or not at all, also when killed), and decoding."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rgw import Gateway

from dltrain.data import decode, open_stream
from dltrain.data.catalog import read_catalog
from dltrain.data.files import UNFINISHED
from dltrain.data.inspect import inspect_data
from dltrain.data.rewrite import rewrite
from dltrain.errors import DataError
from dltrain.store import open_store

NAMES = (f"data-{number}" for number in itertools.count())
ROWS = 9000


@pytest.fixture(autouse=True)
def _environment(s3: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in s3.env.items():
        monkeypatch.setenv(variable, value)


@pytest.fixture
def bucket(s3: Gateway) -> str:
    return s3.make_bucket(next(NAMES))


def numbers() -> pa.Table:
    x = np.random.default_rng(0).integers(0, 256, (ROWS, 4096), np.uint8)
    values = pa.FixedSizeBinaryArray.from_buffers(pa.binary(4096), ROWS, [None, pa.py_buffer(x.tobytes())])
    return pa.table({"id": np.arange(ROWS), "x": values})


@pytest.fixture
def raw(bucket: str) -> str:
    """36 MB in two files, the first of them one row group."""
    table = numbers()
    store = open_store(f"{bucket}/raw")
    for name, part, group in (("a", table.slice(0, 7000), 7000), ("b", table.slice(7000), 100)):
        out = io.BytesIO()
        pq.write_table(part, out, row_group_size=group)
        store.write(f"{name}.parquet", out.getvalue())
    return store.url


def read(url: str) -> pa.Table:
    store = open_store(url)
    parts = [name for name in store.list() if name.endswith(".parquet")]
    return pa.concat_tables([pq.read_table(io.BytesIO(store.read(name))) for name in parts])


def uploads(s3: Gateway, bucket: str) -> int:
    client = s3.client()
    found = client.list_multipart_uploads(Bucket=bucket.removeprefix("s3://")).get("Uploads", [])
    client.close()
    return len(found)


@pytest.mark.parametrize("whole_bytes", [128 << 20, 0], ids=["whole row groups", "stretches"])
def test_rewrite_within_s3(
    s3: Gateway, bucket: str, raw: str, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr("dltrain.data.source._WHOLE_BYTES", whole_bytes)
    done = rewrite(raw, f"{bucket}/new", row_group_mb=1, file_mb=16)
    assert (done["rows"], done["files"]) == (ROWS, {"before": 2, "after": 3})
    assert done["row_groups"]["after"] == pytest.approx(36, abs=3)
    assert read(f"{bucket}/new").equals(numbers())
    assert open_store(f"{bucket}/new").list() == [f"part-{i:05d}.parquet" for i in range(3)]
    assert uploads(s3, bucket) == 0
    with pytest.raises(DataError, match=r"holds 3 file\(s\), part-00000.parquet among them"):
        rewrite(raw, f"{bucket}/new")


def test_from_s3_to_a_disk_and_back(bucket: str, raw: str, tmp_path: Path) -> None:
    rewrite(raw, str(tmp_path / "new"), row_group_mb=2)
    rewrite(str(tmp_path / "new"), f"{bucket}/back", columns=["id"])
    assert read(f"{bucket}/back")["id"].to_pylist() == list(range(ROWS))


def stalled(arguments: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    """A rewrite that stops for good when half of the source has been read."""
    script = (
        "import sys, time, dltrain.data.rewrite as r\n"
        "from dltrain import cli\n"
        "def stall(done, total):\n"
        "    if done > total / 2:\n"
        "        print('half', flush=True); time.sleep(600)\n"
        "real = r.rewrite\n"
        "r.rewrite = lambda *a, **k: real(*a, **{**k, 'progress': stall})\n"
        "cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "data", "rewrite", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **env})


@contextlib.contextmanager
def at_half(arguments: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with stalled(arguments, env) as process:
        assert process.stdout
        try:
            assert process.stdout.readline() == "half\n"
            yield process
        finally:
            process.kill()


def test_nothing_is_seen_before_the_end_and_a_killed_one_is_cleared_up(s3: Gateway, bucket: str, raw: str) -> None:
    target = f"{bucket}/new"
    with at_half([raw, target, "--row-group-mb", "1", "--file-mb", "6"], s3.env):
        assert open_store(target).list() == [UNFINISHED]
        assert uploads(s3, bucket) >= 2
        with pytest.raises(DataError, match="is not complete"):
            read_catalog(target)
    assert open_store(target).list() == [UNFINISHED]
    assert uploads(s3, bucket) >= 2
    rewrite(raw, target, row_group_mb=1)
    assert read(target).equals(numbers())
    assert UNFINISHED not in open_store(target).list()
    assert uploads(s3, bucket) == 0


def test_one_that_is_stopped_takes_back_what_it_sent(s3: Gateway, bucket: str, raw: str) -> None:
    with at_half([raw, f"{bucket}/new", "--row-group-mb", "1", "--file-mb", "6"], s3.env) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert open_store(f"{bucket}/new").list() == []
    assert uploads(s3, bucket) == 0


def test_a_commit_that_was_interrupted(bucket: str, raw: str) -> None:
    store = open_store(f"{bucket}/new")
    store.write(UNFINISHED, b"of a process that is gone")
    store.write("part-00009.parquet", b"the last of many")
    rewrite(raw, store.url)
    assert store.list() == ["part-00000.parquet"]
    assert read(store.url).equals(numbers())


def test_the_later_of_two_wins(s3: Gateway, bucket: str, raw: str) -> None:
    taken_over: list[str] = []

    def other_starts(done: int, total: int) -> None:
        if not taken_over:
            taken_over.append(rewrite(raw, f"{bucket}/new", row_group_mb=4)["target"])

    with pytest.raises(DataError, match="another process is writing there"):
        rewrite(raw, f"{bucket}/new", row_group_mb=1, progress=other_starts)
    assert taken_over
    assert read(f"{bucket}/new").equals(numbers())
    assert uploads(s3, bucket) == 0


def test_inspect(s3: Gateway, raw: str, bucket: str) -> None:
    done = harness.dltrain("data", "inspect", raw, "--json", env=s3.env)
    assert done.code == 0, done.err
    found = done.json
    assert (found["rows"], found["row_groups"]["count"]) == (ROWS, 21)
    assert inspect_data(raw) == found
    refused = harness.dltrain("data", "inspect", "s3://no-such-bucket/x", env=s3.env)
    assert refused.code == 2
    assert "s3://no-such-bucket/x: the bucket does not exist" in refused.err
    assert len(refused.err.strip().splitlines()) == 1


def test_a_stream_of_pictures(bucket: str) -> None:
    def png(value: int) -> bytes:
        out = io.BytesIO()
        Image.fromarray(np.full((9, 7, 3), value, np.uint8)).save(out, "PNG")
        return out.getvalue()

    out = io.BytesIO()
    pq.write_table(pa.table({"id": range(60), "image": [png(i) for i in range(60)]}), out, row_group_size=11)
    open_store(f"{bucket}/pictures").write("a.parquet", out.getvalue())
    decoders: dict[str, Callable[[Any], Any]] = {"image": partial(decode.images, size=(4, 5))}
    seen = []
    with open_stream(f"{bucket}/pictures", global_batch=16, decode=decoders) as stream:
        for batch in stream:
            assert (batch["image"] == batch["id"].view(-1, 1, 1, 1)).all()
            assert batch["image"].shape[1:] == (4, 5, 3)
            seen += batch["id"].tolist()
    assert sorted(seen) == list(range(60))
