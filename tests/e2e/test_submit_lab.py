"""A Ray job over three hosts whose run directory and data are in S3 alone, submitted from one of them.

The S3 server is on host 0, where the others reach it; nothing outside the lab does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import make_spec, write_data, write_spec
from rgw import INSTALL, Gateway, missing_programs, running_gateway

from cluster.lab import Host, Lab, what_is_missing

pytestmark = [pytest.mark.lab, pytest.mark.servers]

_CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def on(lab: Lab, host: Host) -> Iterator[None]:
    """This thread, and what it starts, uses the host's network."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(fd: int) -> None:
        if libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")

    with (
        open("/proc/thread-self/ns/net") as here,
        open(f"/run/netns/{lab.network.namespace(host.index)}") as there,
    ):
        enter(there.fileno())
        try:
            yield
        finally:
            enter(here.fileno())


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Lab, Gateway]]:
    """3 hosts with one slot each, whose environment has the credentials of the S3 server."""
    programs = missing_programs()
    missing = what_is_missing() or (f"{', '.join(programs)} not installed; {INSTALL}" if programs else "")
    if missing and os.environ.get("DLTRAIN_REQUIRE_SERVERS") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(f"no lab with an S3 server: {missing}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with Lab(hosts=3, ray=False, dashboard=True, env={"PATH": path}) as lab, contextlib.ExitStack() as stack:
        with on(lab, lab.hosts[0]):
            s3 = stack.enter_context(running_gateway(lab.hosts[0].address))
        lab.env.update(s3.env)
        lab.start_ray(lab.hosts[:1])
        lab.start_ray(lab.hosts[1:])
        yield lab, s3


def test_submitted_over_three_hosts_with_all_in_s3(cluster: tuple[Lab, Gateway], tmp_path: Path) -> None:
    lab, s3 = cluster
    local = write_data(tmp_path / "train")
    with on(lab, lab.hosts[0]):
        bucket, client = s3.make_bucket("lab"), s3.client()
        for file in local.iterdir():
            client.upload_file(str(file), "lab", f"train/{file.name}")
        client.close()
    shutil.rmtree(local)
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(harness.ROOT / "tests" / "tasks.py", work)
    changes = {"data": {"train": f"{bucket}/train"}, "runs": f"{bucket}/runs", "workers": 3}
    write_spec(work, make_spec(tmp_path, **changes))

    def do(*arguments: str, host: int = 1) -> harness.Done:
        return harness.finish(harness.start(*arguments, popen=lab.hosts[host].popen, cwd=work))

    first = do("submit", "job.yaml", "train.steps=10", "--json", "--address", lab.dashboard)
    assert first.code == 0, first.err
    summary: dict[str, Any] = first.json["summary"]
    assert (summary["status"], summary["steps"], summary["dir"]) == ("finished", 10, f"{bucket}/runs/tiny")
    # The same run goes on, from what is in S3.
    again = do("submit", "job.yaml", "train.steps=20", "workers=2", "--json", "--address", lab.dashboard, host=2)
    assert again.code == 0, again.err
    assert "resuming from the checkpoint of step 10" in again.err
    assert (again.json["summary"]["steps"], again.json["summary"]["samples"]) == (20, 10 * 16)
    status = do("status", "tiny", "--json", "--address", lab.dashboard)
    assert (status.json["state"], status.json["step"], status.json["job"]) == ("finished", 20, again.json["job"])
    assert do("audit", f"{bucket}/runs/tiny").code == 0
    assert do("checkpoint", "verify", f"{bucket}/runs/tiny").code == 0
    # Each host has one slot: first all three, then two of them.
    with on(lab, lab.hosts[0]):
        lines = read_lines(s3, "lab", "runs/tiny/events/")
    assert [line["num_ranks"] for line in lines if line["event"] == "start"] == [3, 2]
    # Nothing of the run is on a disk but in Ray's own files, which go with the lab.
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["job.yaml", "tasks.py"]


def read_lines(s3: Gateway, bucket: str, prefix: str) -> list[dict[str, Any]]:
    """A journal's, from the network that this thread is on."""
    client = s3.client()
    keys = sorted(found["Key"] for found in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"])
    parts = [client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys]
    client.close()
    return [json.loads(line) for part in parts for line in part.splitlines()]
