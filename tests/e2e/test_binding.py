"""Who may connect to a run: its processes listen on loopback or on their node's own address, never on all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import harness
import psutil
import pytest
from faults import agent_of
from harness import make_spec, start, wait_for_step, write_data, write_spec

# What Ray itself opens in a driver and in an actor's process, dltrain not being there.
BARE = """
import json, os, psutil, ray
def listening():
    return [c.laddr[0] for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
actor = ray.remote(num_cpus=1)(type("Bare", (), {"listening": lambda self: listening()})).remote()
print(json.dumps([listening(), ray.get(actor.listening.remote())]))
ray.shutdown()
"""
EVERYWHERE = ("0.0.0.0", "::")


def listening(pid: int) -> list[tuple[str, int]]:
    """Address and port of every socket on which a process takes connections."""
    found = psutil.Process(pid).net_connections()
    return [(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN]


def open_to_all(addresses: list[str]) -> int:
    return sum(address in EVERYWHERE for address in addresses)


def test_a_run_listens_on_nothing_but_its_nodes_own_address(tmp_path: Path) -> None:
    environment = {"RAY_ADDRESS": ""}
    bare = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    ray_in_driver, ray_in_actor = (open_to_all(found) for found in json.loads(bare.stdout.splitlines()[-1]))
    write_data(tmp_path / "train")
    spec = make_spec(tmp_path, args={"seconds": 0.1}, train={"steps": 2000})
    process = start("run", str(write_spec(tmp_path, spec)), "--json", env=environment)
    run = tmp_path / "runs" / "tiny"
    try:
        state = wait_for_step(run, 2, process)
        workers = state["workers"]
        found = {worker["pid"]: listening(worker["pid"]) for worker in workers}
        # Rank 0 has the store of the rendezvous, and each rank a socket of gloo.
        assert len(found[workers[0]["pid"]]) >= 2
        assert all(found.values())
        for worker in workers:
            own = {"127.0.0.1", "::1", worker["node"]}
            others = [f"{address}:{port}" for address, port in found[worker["pid"]] if address not in own]
            assert not others, f"rank {worker['rank']} at {worker['node']} listens at {others}"
            agent = [address for address, _ in listening(agent_of(worker["pid"]))]
            assert open_to_all(agent) <= ray_in_actor, agent
        driver = listening(process.pid)
        metrics = urlsplit(state["metrics_url"])
        assert ("127.0.0.1", metrics.port) in driver
        assert open_to_all([address for address, _ in driver]) <= ray_in_driver, driver
    finally:
        assert harness.dltrain("stop", str(run), "--json").code == 0
        assert harness.finish(process).code == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_metrics_are_served_where_the_spec_says(host: str) -> None:
    from dltrain.observing.hub import Hub

    hub = Hub("run", host=host, port=0, move=False, labels={"zero_stage": "1", "precision": "fp32"})
    try:
        assert (host, hub.port) in listening(os.getpid())
        assert [address for address, port in listening(os.getpid()) if port == hub.port] == [host]
    finally:
        hub.close()
