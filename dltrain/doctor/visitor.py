"""The visitor: a Ray actor on each node, which looks around there for the doctor.

visitor = ray.remote(Visitor).options(num_cpus=0, scheduling_strategy=...).remote()
visitor.facts.remote(); visitor.listen.remote(); visitor.connect.remote([("10.0.0.2", 41231)])

It takes no CPU, so that a cluster that is busy can be looked at.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence

from dltrain.doctor.data import look_at_data
from dltrain.doctor.facts import MachineFacts, machine_facts
from dltrain.doctor.gpu import Card, TorchFacts
from dltrain.doctor.job import DataFacts
from dltrain.doctor.probe import cards, torch_facts
from dltrain.doctor.ranks import RankResult, run_ranks
from dltrain.doctor.storage import StoreFacts, try_store
from dltrain.running.agent import SlotInfo
from dltrain.running.rendezvous import interface_of, listen
from dltrain.running.rundir import RunDir
from dltrain.spec import JobSpec
from dltrain.store import open_store

__all__ = ["Visitor"]

_CONNECT_SECONDS = 5.0


class Visitor:
    """On one node."""

    def hello(self) -> SlotInfo:
        """Where it is; nothing of it takes time."""
        import ray

        address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        node = ray.get_runtime_context().get_node_id()
        return SlotInfo(node, address, interface_of(address), (), os.getpid())

    def facts(self) -> MachineFacts:
        """The machine, as Ray's processes find it."""
        return machine_facts(inside_ray=True)

    def torch(self, seconds: float) -> tuple[TorchFacts, list[Card]]:
        """What torch and the GPUs say."""
        return torch_facts(seconds), cards()

    def clock(self) -> float:
        """Now, here."""
        return time.time()

    # ---- in reach? ----

    def listen(self) -> int:
        """A random port of the node's own address, answered until this process ends."""
        server = listen(self.hello().address, 0)
        server.listen()
        threading.Thread(target=_answer, args=(server,), name="dltrain-doctor", daemon=True).start()
        return int(server.getsockname()[1])

    def connect(self, others: Sequence[tuple[str, int]]) -> list[str]:
        """For each of the others "", or why it can't be connected to."""
        return [_connect(address, port) for address, port in others]

    # ---- of a spec ----

    def data(self, spec: JobSpec) -> list[DataFacts]:
        """The data of a spec, as they can be read from here."""
        return look_at_data(spec)

    def store(self, spec: JobSpec) -> StoreFacts:
        """The run's directory, tried from here."""
        return try_store(RunDir.of(spec).store)

    def sees(self, url: str, name: str) -> bool:
        """Whether a file that another machine wrote is there."""
        return open_store(url).exists(name)

    # ---- all-reduce ----

    def free_port(self) -> int:
        """A port nobody listens on now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def reduce(self, environments: Sequence[Mapping[str, str]], backend: str, seconds: float) -> list[RankResult]:
        """Runs the ranks of this node."""
        return run_ranks(environments, backend, seconds)


def _answer(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()


def _connect(address: str, port: int) -> str:
    try:
        socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
    except TimeoutError:
        return f"port {port} gives no answer within {_CONNECT_SECONDS:g} s"
    except OSError as error:
        return f"port {port}: {error.strerror or error}"
    return ""
