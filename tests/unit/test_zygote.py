"""The zygote: who shares it, who gets another, and what becomes of the others when one of them dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import pytest

from dltrain.running.zygote import plant

# Ready after `seconds`; a nursery says who it is, who made it and what it was given, and stays until it is left.
PROGRAM = """
import os, socket, sys, time
from dltrain.running import zygote

zygote._NOBODY_SECONDS = {nobody}

control = zygote.main(socket.socket(fileno=int(sys.argv[1])), lambda: time.sleep({seconds}))
if control:
    given = [os.environ.get(name) for name in ("RAY_OWN", "RAY_TWO")]
    control.send(" ".join(map(str, [os.getpid(), os.getppid(), os.getpgid(0), *given])).encode())
    while control.recv(100):
        pass
"""


class Machine:
    """Starts zygotes of the program."""

    def __init__(self, seconds: float = 0.0, nobody: float = 30.0) -> None:
        self.begun: list[subprocess.Popen[bytes]] = []
        self.program, self.ends = PROGRAM.format(seconds=seconds, nobody=nobody), []  # type: ignore[var-annotated]

    def spawn(self, arguments: Sequence[str], fds: Sequence[int], environment: dict[str, str]) -> Any:
        command = [sys.executable, "-c", self.program, arguments[-1]]
        self.begun.append(subprocess.Popen(command, pass_fds=fds, env=environment))

    def agent(self, family: str = "one", **variables: str) -> tuple[socket.socket, socket.socket]:
        """Our end of a nursery's control socket, and the link."""
        ours, theirs = socket.socketpair()
        ours.settimeout(60)
        with theirs:
            link = plant(theirs, {**os.environ, "DLTRAIN_TEST": str(id(self)), **variables}, family, self.spawn)
        self.ends += [ours, link]
        return ours, link

    def close(self) -> None:
        for end in self.ends:
            end.close()
        for process in self.begun:
            process.wait(60)


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()


def said(ours: socket.socket) -> tuple[int, int, int, str, str]:
    pid, parent, group, own, two = ours.recv(200).decode().split()
    return int(pid), int(parent), int(group), own, two


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pid: int) -> bool:
    """Whether a process ends within a minute; who inherited it may never ask for its exit code."""
    deadline = time.monotonic() + 60
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not lives(pid)


def test_agents_of_a_family_share_one_and_keep_variables_of_their_own(machine: Machine) -> None:
    (one, _), (other, _) = machine.agent(RAY_OWN="a"), machine.agent(RAY_OWN="b", RAY_TWO="2")
    first, second = said(one), said(other)
    assert len(machine.begun) == 1
    assert first[1] == second[1] == machine.begun[0].pid
    assert first[0] != second[0]
    # Each in a group of its own.
    assert (first[2], second[2]) == (first[0], second[0])
    assert (first[3:], second[3:]) == (("a", "None"), ("b", "2"))
    assert psutil.Process(first[0]).name() == f"nursery {os.getpid()}"


@pytest.mark.parametrize("changes", [{"family": "another"}, {"OMP_NUM_THREADS": "7"}])
def test_others_get_another(machine: Machine, changes: dict[str, str]) -> None:
    assert said(machine.agent()[0])[1] != said(machine.agent(**changes)[0])[1]
    assert len(machine.begun) == 2


def test_it_ends_with_the_last_link_and_a_nursery_with_its_agent(machine: Machine) -> None:
    (one, first), (other, second) = machine.agent(), machine.agent()
    pids = [said(one)[0], said(other)[0]]
    one.close()
    assert gone(pids[0])
    first.close()
    time.sleep(0.2)
    assert machine.begun[0].poll() is None
    second.close()
    assert machine.begun[0].wait(60) == 0
    # Whose agent still lives.
    assert lives(pids[1])
    other.close()
    assert gone(pids[1])


def test_nurseries_outlive_it_and_the_next_begins_another(machine: Machine) -> None:
    one, _ = machine.agent()
    pid = said(one)[0]
    machine.begun[0].kill()
    machine.begun[0].wait()
    assert lives(pid)
    assert said(machine.agent()[0])[1] == machine.begun[1].pid


def test_killed_before_it_is_ready_it_leaves_nobody_waiting() -> None:
    machine = Machine(seconds=60)
    ours, _ = machine.agent()
    machine.begun[0].kill()
    assert ours.recv(100) == b""
    machine.close()


def test_left_before_it_is_ready_it_ends() -> None:
    machine = Machine(seconds=0.5)
    for end in machine.agent():
        end.close()
    assert machine.begun[0].wait(60) == 0


def test_it_ends_when_its_first_agent_never_comes() -> None:
    machine = Machine(nobody=0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0dltrain-test-{os.getpid()}-{id(machine)}")
        listener.listen(1)
        machine.spawn([str(listener.fileno())], [listener.fileno()], dict(os.environ))
    assert machine.begun[0].wait(60) == 0


def test_ctrl_c_is_not_its_business(machine: Machine) -> None:
    ours, _ = machine.agent()
    said(ours)
    machine.begun[0].send_signal(signal.SIGINT)
    assert said(machine.agent()[0])[1] == machine.begun[0].pid
