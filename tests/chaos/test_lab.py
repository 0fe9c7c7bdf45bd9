"""The lab itself: hosts that reach each other or don't, that come and go, and leave nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from harness import ROOT, alive, wait_for
from leftovers import Leftovers

from cluster.lab import Lab, main, take_down_abandoned
from cluster.network import all_networks

pytestmark = pytest.mark.usefixtures("several_hosts")

RECEIVE = """
import socket, time
server = socket.create_server(("", 7000))
print("ready", flush=True)
connection, _ = server.accept()
begin = time.monotonic()
while connection.recv(65536): pass
print(time.monotonic() - begin, flush=True)
"""


def test_hosts_reach_each_other_until_a_cable_is_cut() -> None:
    with Lab(hosts=3, ray=False) as lab:
        first, second, third = lab.hosts
        assert first.reaches(second)
        assert third.reaches(first)
        second.cut()
        assert not first.reaches(second)
        assert not second.reaches(third)
        # A host without a cable still talks to itself, and the others to each other.
        assert second.reaches(second)
        assert first.reaches(third)
        second.join()
        wait_for(lambda: first.reaches(second))
        fourth = lab.add()
        assert fourth.reaches(first)
        assert fourth.address not in {host.address for host in (first, second, third)}
        name = lab.name
    assert name not in all_networks()
    assert not lab.directory.exists()
    lab.down()


def seconds_to_send(lab: Lab, megabytes: int) -> float:
    """How long host 0 takes to send to host 1."""
    receiver = lab.hosts[1].popen([sys.executable, "-I", "-S", "-c", RECEIVE], stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "ready\n"
    send = (
        f"import socket; socket.create_connection(('{lab.hosts[1].address}', 7000)).sendall(bytes({megabytes}*10**6))"
    )
    lab.hosts[0].run([sys.executable, "-I", "-S", "-c", send], check=True)
    return float(receiver.communicate(timeout=60)[0])


def test_a_slow_cable_is_as_slow_as_it_was_told() -> None:
    with Lab(hosts=2, ray=False) as lab:
        lab.hosts[1].slow(mbit=20)
        # 2 MB at 20 Mbit/s: 0.8 s, less the first burst, plus the frames' headers.
        assert 0.6 <= seconds_to_send(lab, 2) <= 5
        lab.hosts[1].slow(mbit=0)
        assert seconds_to_send(lab, 2) < 0.6


def test_two_labs_do_not_meet() -> None:
    with Lab(hosts=1, ray=False) as one, Lab(hosts=2, ray=False) as two:
        # The same addresses, in other worlds.
        assert one.hosts[0].address == two.hosts[0].address
        assert two.hosts[0].reaches(two.hosts[1])
        assert not one.hosts[0].reaches(two.hosts[1])


def test_processes_end_with_the_lab_and_with_their_host() -> None:
    with Lab(hosts=2, ray=False) as lab:
        one, two = (host.popen(["sleep", "1000"]) for host in lab.hosts)
        wait_for(lambda: lab.hosts[1].pids() == [two.pid])
        lab.hosts[1].kill()
        assert two.wait() == -signal.SIGKILL
        assert lab.hosts[1].pids() == []
        assert one.poll() is None
    assert one.wait() == -signal.SIGKILL


def test_a_lab_whose_owner_was_killed_is_taken_down() -> None:
    code = (
        "from cluster.lab import Lab\n"
        "import time\n"
        "with Lab(hosts=1, ray=False) as lab:\n"
        "    lab.hosts[0].popen(['sleep', '1000'])\n"
        "    print(lab.name, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    name = owner.stdout.readline().strip()
    assert name in all_networks()
    # Its owner lives: it stays.
    take_down_abandoned()
    assert name in all_networks()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    # Two programs that start a lab may both find it.
    with ThreadPoolExecutor(4) as pool:
        for taken in [pool.submit(take_down_abandoned) for _ in range(4)]:
            taken.result()
    assert name not in all_networks()


def test_ray_over_hosts_by_command(capfd: pytest.CaptureFixture[str]) -> None:
    leftovers = Leftovers()
    assert main(["up", "--hosts", "2", "--cpus", "1", "--json"]) == 0
    made = json.loads(capfd.readouterr().out)
    lab = ["--lab", made["lab"]]
    try:
        assert count_cpus(made["address"], lab, capfd) == 2
        assert main(["add", *lab, "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["host"] == 2
        assert count_cpus(made["address"], lab, capfd) == 3
        pids = [pid for host in Lab.attach(made["lab"]).hosts for pid in host.pids()]
        assert len(pids) > 6
        assert main(["kill", *lab, "1"]) == 0
        assert main(["cut", *lab, "7"]) == 2
        assert "no host 7" in capfd.readouterr().err
    finally:
        assert main(["down", *lab]) == 0
    assert main(["down", *lab]) == 0
    wait_for(lambda: not alive(pids))
    assert made["lab"] not in all_networks()
    assert leftovers.found() == []


def test_what_is_done_by_command_is_listed(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--hosts", "2", "--no-ray", "--json"]) == 0
    name = json.loads(capfd.readouterr().out)["lab"]

    def hosts() -> list[dict[str, Any]]:
        capfd.readouterr()
        assert main(["list", "--json"]) == 0
        found: list[dict[str, Any]] = json.loads(capfd.readouterr().out)["labs"]
        return next(lab["hosts"] for lab in found if lab["lab"] == name)

    try:
        assert [host["cable"] for host in hosts()] == ["whole", "whole"]
        for verb in (["cut", "1"], ["slow", "0", "--mbit", "20"]):
            assert main([*verb, "--lab", name]) == 0
        assert [(host["cable"], host["mbit"]) for host in hosts()] == [("whole", 20.0), ("cut", None)]
        for verb in (["mend", "1"], ["slow", "0", "--mbit", "0"]):
            assert main([*verb, "--lab", name]) == 0
        assert [(host["cable"], host["mbit"]) for host in hosts()] == [("whole", None)] * 2
        # What a command prints is part of the answer, and its exit code that of ours.
        code = "import sys; print('here'); sys.exit(3)"
        assert main(["exec", "--lab", name, "--json", "1", "--", sys.executable, "-c", code]) == 3
        answer = json.loads(capfd.readouterr().out.splitlines()[-1])
        assert (answer["host"], answer["code"], answer["out"]) == (1, 3, "here\n")
    finally:
        assert main(["down", "--lab", name, "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == {"labs": [name]}


def count_cpus(address: str, lab: list[str], capfd: pytest.CaptureFixture[str]) -> int:
    code = f"import ray; ray.init('{address}', logging_level='ERROR'); print(int(ray.cluster_resources()['CPU']))"
    capfd.readouterr()
    begin = time.monotonic()
    assert main(["exec", *lab, "0", "--", sys.executable, "-c", code]) == 0
    assert time.monotonic() - begin < 60
    return int(capfd.readouterr().out.split()[-1])
