"""Faults in front of a real S3 server: the same batches, in bounded time, and every fault counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from fault_proxy import BUSY, CUT, RESET, SLOW, STUCK, FaultProxy

from dltrain.data import open_stream
from dltrain.errors import DataChangedError, StoreError

ROWS, FILES, GROUP, WIDTH = 4096, 8, 64, 1024


def remote(s3: Any) -> Any:
    return s3fs.S3FileSystem(key=s3.access_key, secret=s3.secret_key, endpoint_url=s3.endpoint)


@pytest.fixture(scope="module")
def data(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 row groups of 64 KiB in 8 files."""
    s3.make_bucket("faults")
    rng = np.random.default_rng(0)
    directory = tmp_path_factory.mktemp("data")
    for i in range(FILES):
        ids = np.arange(i * ROWS // FILES, (i + 1) * ROWS // FILES)
        raw = pa.array(rng.integers(0, 256, len(ids) * WIDTH, dtype=np.uint8))
        table = pa.table({"id": ids, "raw": pa.FixedSizeListArray.from_arrays(raw, WIDTH)})
        pq.write_table(table, directory / f"part-{i}.parquet", row_group_size=GROUP, compression="none")
    remote(s3).put(str(directory), "faults/train", recursive=True)
    return "s3://faults/train"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, s3: Any) -> Callable[[str], None]:
    """Makes an endpoint the one that is used."""

    def go(endpoint: str) -> None:
        for name, value in {**s3.env, "AWS_ENDPOINT_URL_S3": endpoint}.items():
            monkeypatch.setenv(name, value)

    return go


@pytest.fixture
def proxy(s3: Any, use: Callable[[str], None]) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint) as made:
        use(made.endpoint)
        yield made


def read(url: str, **options: Any) -> tuple[list[Any], dict[str, float]]:
    """Every batch as (row ids, bytes), and what was counted."""
    with open_stream(url, global_batch=64, **options) as stream:
        found = [(batch["id"].tolist(), batch["raw"].numpy().tobytes()) for batch in stream]
        return found, stream.stats


@pytest.fixture
def expected(data: str, s3: Any, use: Callable[[str], None]) -> list[Any]:
    use(s3.endpoint)
    found, counted = read(data)
    assert sorted(i for ids, _ in found for i in ids) == list(range(ROWS))
    assert counted["requests_ok"] == FILES * GROUP // FILES
    assert not any("retries" in name for name in counted)
    return found


@pytest.mark.parametrize(
    ("fault", "hit", "counter"),
    [
        (BUSY, lambda n: n in range(5, 25) or n % 20 == 0, "retries_server"),
        (CUT, lambda n: n % 5 == 0, "retries_truncated"),
        (RESET, lambda n: n % 7 == 0, "retries_connection"),
        (SLOW, lambda n: n == 40, "hedges_won"),
        (STUCK, lambda n: n == 9, "hedges_won"),
        (STUCK, lambda n: n in range(9, 14), "retries_timeout"),
    ],
    ids=["503-bursts", "truncated", "reset", "ten-times-latency", "stuck", "several-stuck"],
)
def test_the_same_batches(
    expected: list[Any],
    data: str,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    hit: Callable[[int], bool],
    counter: str,
) -> None:
    monkeypatch.setattr("dltrain.data.backends._READ_SECONDS", 3)
    proxy.usual_seconds, proxy.slow_seconds = (0.1, 1.0) if fault == SLOW else (0.0, 0.0)
    proxy.plan = lambda n: fault if hit(n) else None
    found, counted = read(data)
    assert found == expected
    assert proxy.done[fault] > 0
    assert counted[counter] > 0
    assert counted.get("hedges", 0) <= 1 + 0.05 * counted["requests_ok"]


def test_credentials_that_expire_are_renewed(
    s3: Any, expected: list[Any], data: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"

    def write(access_key: str, secret_key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n")

    def expire_at_ten(number: int) -> None:
        if number == 10:
            proxy.expired.add(s3.access_key)
            write(*newer)

    newer = s3.new_keys()
    write(s3.access_key, s3.secret_key)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    proxy.plan = expire_at_ten
    found, counted = read(data)
    assert found == expected
    assert counted["retries_expired"] > 0
    assert 1 <= counted["renewed"] <= 2


@pytest.mark.parametrize("change", ["written again", "removed"])
def test_a_file_that_changes_is_named(
    s3: Any, data: str, use: Callable[[str], None], tmp_path: Path, change: str
) -> None:
    use(s3.endpoint)
    fs = remote(s3)
    copy = f"faults/{change.split()[0]}"
    fs.copy("faults/train", copy, recursive=True)
    with open_stream(f"s3://{copy}", global_batch=64) as stream:
        if change == "removed":
            fs.rm(f"{copy}/part-3.parquet")
        else:
            fs.copy("faults/train/part-4.parquet", f"{copy}/part-3.parquet")
        with pytest.raises(DataChangedError, match=rf"{copy}/part-3\.parquet has changed"):
            list(stream)


def test_a_store_that_stays_down(data: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dltrain.data.asking._GIVE_UP_SECONDS", 1.0)
    proxy.plan = lambda n: RESET if n > 5 else None
    with pytest.raises(StoreError, match=r"attempts failed in \d+ s.*the network is down.*goes on from") as caught:
        read(data)
    assert "faults/train/part-" in str(caught.value)


def test_the_second_epoch_of_another_process_comes_from_the_cache(
    expected: list[Any], data: str, proxy: FaultProxy, tmp_path: Path
) -> None:
    options = {"cache_dir": tmp_path / "cache", "cache_bytes": 10**9}
    proxy.plan = lambda n: BUSY if n % 10 == 0 else None
    first, counted = read(data, **options)
    assert (first, counted["cache_miss"]) == (expected, FILES * GROUP // FILES)
    proxy.plan = lambda n: BUSY
    second, counted = read(data, **options)
    assert (second, counted["cache_hit"]) == (expected, FILES * GROUP // FILES)
    assert "requests_ok" not in counted


def test_a_run_with_faults_in_front_of_its_data(s3: Any, proxy: FaultProxy, tmp_path: Path) -> None:
    s3.make_bucket("fault-run")
    remote(s3).put(str(harness.write_data(tmp_path / "train", rows=1600)), "fault-run/train", recursive=True)
    proxy.plan = lambda n: BUSY if n in range(3, 9) else CUT if n % 11 == 0 else RESET if n % 13 == 0 else None

    def run(name: str, endpoint: str, **data: Any) -> Path:
        changes = {"name": name, "data": {"train": "s3://fault-run/train", **data}, "train": {"steps": 100}}
        spec = str(harness.write_spec(tmp_path, harness.make_spec(tmp_path, **changes)))
        env = {**s3.env, "AWS_ENDPOINT_URL_S3": endpoint, "RAY_ADDRESS": ""}
        done = harness.dltrain("run", spec, "--json", env=env)
        assert done.code == 0, done.err
        assert (done.json["steps"], done.json["restarts"]) == (100, 0)
        return tmp_path / "runs" / name

    plain = run("plain", s3.endpoint, cache={"dir": "/proc/no-cache", "gb": 1})
    faulty = run("faulty", proxy.endpoint, cache={"dir": str(tmp_path / "cache"), "gb": 1})
    batches = [{step: line["batch_id"] for step, line in harness.steps(each).items()} for each in (plain, faulty)]
    assert batches[0] == batches[1]
    counters = json.loads((faulty / "ledger.json").read_text())["counters"]
    for fault, name in ((BUSY, "server"), (CUT, "truncated"), (RESET, "connection")):
        # Every one is counted. A second try beside a slow one that fails is not tried again.
        assert counters[f"data_requests_{name}"] == proxy.done[fault]
        assert 0 < counters[f"data_retries_{name}"] <= proxy.done[fault]
    assert counters["data_cache_miss"] > 0
    before = json.loads((plain / "ledger.json").read_text())["counters"]
    assert before["data_requests_ok"] > 0
    assert "data_retries_server" not in before
    # A cache that can't be used is said once, for both workers, and counted.
    assert before["data_cache_error"] >= 2
    said = [line["text"] for line in harness.events(plain) if line["event"] == "Note"]
    assert len([text for text in said if "/proc/no-cache" in text]) == 1
