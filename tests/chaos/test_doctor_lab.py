"""The doctor on a cluster of three hosts: well, and with a host that is cut off or does not know the others."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import Done, finish, make_spec, start, wait_for, write_data, write_spec

from cluster.lab import Lab


def doctor(lab: Lab, *arguments: str) -> Done:
    """Looks from host 0, where drivers run."""
    return finish(start("doctor", *arguments, "--address", lab.address, "--json", popen=lab.hosts[0].popen))


def found(done: Done, name: str) -> list[dict[str, Any]]:
    return [f for f in done.json["findings"] if f["name"] == name]


def bad(done: Done) -> set[str]:
    return {f["name"] for f in done.json["findings"] if f["status"] == "fail"}


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    write_data(tmp_path / "train")
    # The hosts of a lab have one machine's files.
    return write_spec(tmp_path, make_spec(tmp_path, workers={"min": 2, "max": 3}))


def test_three_hosts_that_are_well(lab: Lab, spec: Path) -> None:
    done = doctor(lab, str(spec))
    assert done.code == 0, done.out + done.err
    addresses = {host.address for host in lab.hosts}
    assert {f["where"] for f in found(done, "open files") if f["where"]} == addresses
    assert found(done, "node to node")[0]["found"].startswith("6 connections")
    assert found(done, "all-reduce (gloo)")[0]["found"].startswith("3 ranks on 3 nodes")
    assert found(done, "clocks")[0]["found"].startswith("2 nodes")
    assert found(done, "shared run directory")[0]["status"] == "ok"
    assert "room for 3 workers" in found(done, "workers")[0]["found"]
    assert {f["where"] for f in found(done, "data.train")} == {"", *addresses}


def test_a_busy_cluster_can_be_looked_at(lab: Lab, tmp_path: Path, spec: Path) -> None:
    busy = make_spec(tmp_path, name="busy", workers=3, train={"steps": 5000}, args={"seconds": 0.05})
    path = tmp_path / "busy.yaml"
    path.write_text(str(busy))
    run = start("run", str(path), "--json", "--address", lab.address, popen=lab.hosts[0].popen)
    try:
        harness.wait_for_step(tmp_path / "runs" / "busy", 3, run)
        done = doctor(lab)
        assert bad(done) == set(), done.out
        before = harness.state(tmp_path / "runs" / "busy")["step"]
        wait_for(lambda: harness.state(tmp_path / "runs" / "busy")["step"] > before)
    finally:
        run.terminate()
        run.communicate(timeout=60)


def test_a_host_that_is_cut_off(fresh_lab: Lab) -> None:
    fresh_lab.hosts[2].cut()
    begin = time.monotonic()
    done = doctor(fresh_lab, "--timeout", "30")
    assert time.monotonic() - begin < 280
    # Ray takes a while to see that it is gone; until then it does not answer.
    assert done.code == 1
    where = {f["where"] for f in done.json["findings"] if f["status"] == "fail"}
    assert where == {fresh_lab.hosts[2].address}
    # The others are looked at all the same.
    looked_at = {f["where"] for f in found(done, "open files") if f["where"]}
    assert looked_at == {host.address for host in fresh_lab.hosts[:2]}


@pytest.mark.soak
def test_hosts_that_do_not_let_each_other_in(fresh_lab: Lab) -> None:
    """A firewall between two workers, which Ray, that talks to them by way of the head, does not notice."""
    one, two = fresh_lab.hosts[1], fresh_lab.hosts[2]
    one.run(["ip", "route", "add", "blackhole", f"{two.address}/32"], check=True)
    done = doctor(fresh_lab, "--timeout", "30")
    assert done.code == 1
    reached = found(done, "node to node")
    told = " ".join(f["found"] for f in reached if f["status"] == "fail")
    assert one.address in told or two.address in told, done.out
    assert "Ray" not in bad(done), done.out
    assert os.path.isdir(fresh_lab.directory)
