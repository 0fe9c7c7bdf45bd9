"""Where the store of a rendezvous listens, and what is told when it can't."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch

from dltrain.errors import UserError
from dltrain.running import rendezvous
from dltrain.running.rendezvous import listen, meet, wait_until_served
from dltrain.running.worker import _kind


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def test_it_listens_at_the_address_and_nowhere_else() -> None:
    port = free_port("127.0.0.2")
    with listen("127.0.0.2", port) as bound:
        assert bound.getsockname() == ("127.0.0.2", port)
        bound.listen()
        socket.create_connection(("127.0.0.2", port), timeout=10).close()
        with socket.socket() as elsewhere:
            assert elsewhere.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.skipif(not socket.has_ipv6, reason="Python without IPv6")
def test_an_ipv6_address() -> None:
    try:
        bound = listen("::1", 0)
    except UserError as error:
        pytest.skip(str(error))
    with bound:
        assert bound.getsockname()[0] == "::1"


@pytest.mark.parametrize("address", ["203.0.113.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_the_users_mistake(address: str) -> None:
    with pytest.raises(UserError, match=f"by {address}.*--node-ip-address"):
        listen(address, 0)


def test_a_port_that_was_taken_meanwhile_is_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"127.0.0.1:{port}") as error:
            listen("127.0.0.1", port)
    # As the loss of a peer: another attempt, with another port.
    assert _kind(error.value) == "peer"


def test_ranks_that_come_before_rank_0_wait_for_it() -> None:
    port, come = free_port(), threading.Event()

    def wait() -> None:
        wait_until_served("127.0.0.1", port, 60.0)
        come.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not come.wait(0.1)
    with socket.create_server(("127.0.0.1", port)):
        waiting.join(60.0)
    assert come.is_set()


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_ranks_do_not_wait_for_ever_and_leave_the_message_to_torch(address: str) -> None:
    begin = time.monotonic()
    wait_until_served(address, free_port(), 0.2)
    assert time.monotonic() - begin < 60.0


def test_what_was_waited_is_taken_from_torchs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def store(*_: Any, timeout: timedelta, **__: Any) -> Any:
        raise TimeoutError(timeout.total_seconds())

    monkeypatch.setattr(torch.distributed, "TCPStore", store)
    monkeypatch.setattr(rendezvous, "wait_until_served", lambda *_: time.sleep(0.3))
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(TimeoutError) as error:
        meet("gloo", environment, torch.device("cpu"), timedelta(seconds=5))
    assert 1.0 <= error.value.args[0] <= 4.7
