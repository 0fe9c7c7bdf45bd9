"""The doctor's rounds: visits all nodes of a Ray cluster. A program of its own, which may crash or be ended.

echo '{"address": "10.0.0.1:6379", "seconds": 60, "spec": null}' | python -m dltrain.doctor.rounds

Each line of its output is a JSON object: {"stage": what it is at}, {"finding": {...}}, {"node": {...}} or, the last
one, {"done": true}.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO, TypeVar

from dltrain.doctor.bare import bare_versions
from dltrain.doctor.facts import MachineFacts, source_digest
from dltrain.doctor.finding import Finding, at, fail, ok, skip
from dltrain.doctor.gpu import judge_gpus, judge_torch
from dltrain.doctor.job import NodeRoom, judge_data
from dltrain.doctor.machine import judge_machine
from dltrain.doctor.nodes import (
    Offset,
    judge_clocks,
    judge_loopback,
    judge_reach,
    judge_same,
    judge_shared,
    judge_source,
)
from dltrain.doctor.ranks import judge_reduce
from dltrain.doctor.storage import judge_store, left_file
from dltrain.doctor.visitor import Visitor
from dltrain.errors import StoreError, UserError
from dltrain.running.agent import SlotInfo
from dltrain.running.cluster import connect
from dltrain.running.group import rank_environment
from dltrain.running.rundir import RunDir
from dltrain.spec import JobSpec

T = TypeVar("T")
_PINGS = 5
_REACH_SECONDS = 5.0
HERE = "this machine"
_WHY_RAY = "a run places its workers through Ray"


@dataclass(frozen=True)
class Node:
    """One that is alive."""

    place: str
    node_id: str
    resources: Mapping[str, float]

    @property
    def gpus(self) -> int:
        """That Ray may give away there."""
        return int(self.resources.get("GPU", 0))


def main() -> None:
    """Reads the request, makes the rounds, and ends, whatever threads of Ray's are still at."""
    # Whatever Ray prints is not part of the answer.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    spec = JobSpec.model_validate(request["spec"]) if request.get("spec") else None
    Rounds(request["address"], spec, float(request["seconds"]), out).run()
    print(json.dumps({"done": True}), file=out, flush=True)
    os._exit(0)


class Rounds:
    """The rounds of one cluster.

    Args:
        address: of the cluster; "local": a private Ray.
        spec: of a run that it is to have.
        seconds: that one answer may take.
    """

    def __init__(self, address: str, spec: JobSpec | None, seconds: float, out: TextIO) -> None:
        self._address, self._spec, self._seconds, self._out = address, spec, seconds, out
        self._visitors: dict[str, Any] = {}
        self._where: dict[str, SlotInfo] = {}
        self._healthy: set[str] = set()

    # ---- the story ----

    def run(self) -> None:
        """Says all that can be said."""
        self._stage(f"Ray at {self._address}")
        if problem := unreachable(self._address):
            self._tell([problem])
            return
        begin = time.monotonic()
        try:
            with connect(self._address):
                self._connected(time.monotonic() - begin)
        except UserError as error:
            self._tell([fail("Ray", str(error), _WHY_RAY, "see above; `ray status` on the head says how it is")])
        except RuntimeError as error:
            # Such as other versions of Ray or Python.
            self._tell(
                [fail("Ray", _first_line(error), _WHY_RAY, "use the Python and Ray of the cluster here as well")]
            )

    def _connected(self, seconds: float) -> None:
        import ray

        nodes = _alive(ray.nodes())  # type: ignore[no-untyped-call]
        if self._address == "local":
            self._private(nodes, seconds)
            return
        self._tell([ok("Ray", f"{len(nodes)} nodes at {self._address}, connected in {seconds:.1f} s")])
        self._versions(nodes)
        self._place([node for node in nodes if node.place in self._healthy])
        self._machines(nodes)
        self._clocks()
        reached = self._reach()
        if self._spec:
            self._of_spec(self._spec)
        if reached:
            self._reduce([node for node in nodes if node.place in self._healthy & set(self._visitors)])

    def _private(self, nodes: Sequence[Node], seconds: float) -> None:
        begin = time.monotonic()
        self._stage("the first worker of a private Ray")
        self._place(nodes)
        for node in nodes:
            self._room(node, -1)
        if self._visitors:
            worker = time.monotonic() - begin
            self._tell([ok("Ray", f"a private one is up in {seconds:.1f} s, its first worker in {worker:.1f} s")])

    # ---- rounds ----

    def _versions(self, nodes: Sequence[Node]) -> None:
        """By a function that needs nothing of ours there."""
        self._stage("versions on the nodes")
        function = bare_versions()
        asked = {node.place: _on(node, function).remote() for node in nodes}
        found: dict[str, dict[str, str | None]] = self._ask("versions", asked)
        mine: dict[str, str | None] = bare_versions()()
        self._tell(judge_same({HERE: mine, **found}))
        self._healthy = {place for place, versions in found.items() if versions["dltrain"]}

    def _place(self, nodes: Sequence[Node]) -> None:
        self._stage("a visitor on each node")
        visitors = {node.place: _on(node, Visitor).remote() for node in nodes}
        self._where = self._ask("Ray", {place: v.hello.remote() for place, v in visitors.items()})
        self._visitors = {place: visitors[place] for place in self._where}

    def _machines(self, nodes: Sequence[Node]) -> None:
        self._stage("the nodes' machines")
        found: dict[str, MachineFacts] = self._ask("machine", self._all("facts"))
        self._tell(judge_source({HERE: source_digest(), **{place: facts.code for place, facts in found.items()}}))
        for place, facts in found.items():
            self._tell(at(place, judge_machine(facts)))
        for node in nodes:
            if node.place in found:
                self._room(node, found[node.place].available_bytes)
        self._stage("torch on the nodes")
        said = self._ask("torch and DeepSpeed", self._all("torch", self._seconds), 1.5 * self._seconds)
        for place, (torch, cards) in said.items():
            self._tell(at(place, [*judge_torch(torch), *judge_gpus(cards, torch)]))
        self._healthy = {place for place, (torch, _) in said.items() if not torch.error}

    def _clocks(self) -> None:
        import ray

        self._stage("clocks")
        offsets: dict[str, Offset] = {}
        for place, visitor in self._visitors.items():
            pings = [ping for _ in range(_PINGS) if (ping := self._ping(visitor))]
            if pings:
                offsets[place] = min(pings, key=lambda ping: ping.error)
        head = str(ray.get_runtime_context().gcs_address).rpartition(":")[0]
        base = offsets.get(head, Offset(0.0, 0.0))
        self._tell(judge_clocks({place: offset - base for place, offset in offsets.items() if place != head}))

    def _ping(self, visitor: Any) -> Offset | None:
        import ray

        before = time.time()
        try:
            there = ray.get(visitor.clock.remote(), timeout=self._seconds)
        except ray.exceptions.RayError:
            return None
        after = time.time()
        return Offset(there - (before + after) / 2, (after - before) / 2)

    def _reach(self) -> bool:
        self._stage("connections between the nodes")
        addresses = {place: info.address for place, info in self._where.items()}
        self._tell(judge_loopback(list(addresses.values())))
        ports: dict[str, int] = self._ask("node to node", self._all("listen"))
        targets = [(addresses[place], port) for place, port in ports.items()]
        # One after the other, each with its own limit.
        limit = self._seconds + _REACH_SECONDS * len(targets)
        found = self._ask("node to node", self._all("connect", targets), limit)
        tries = {
            (source, target): reason
            for source, reasons in found.items()
            for target, reason in zip(ports, reasons, strict=True)
            if source != target
        }
        self._tell(judge_reach(tries))
        return not any(tries.values()) and len(found) == len(self._visitors)

    def _of_spec(self, spec: JobSpec) -> None:
        self._stage("the data, from every node")
        for place, looks in self._ask("data", self._all("data", spec)).items():
            self._tell(at(place, map(judge_data, looks)))
        self._stage("the run directory, from every node")
        for place, facts in self._ask("run directory", self._all("store", spec)).items():
            self._tell(at(place, judge_store(facts)))
        store = RunDir.of(spec).store
        try:
            with left_file(store) as name:
                self._tell(judge_shared(store.url, self._ask("shared", self._all("sees", store.url, name))))
        except (OSError, StoreError) as error:
            self._tell([skip("shared run directory", str(error))])

    def _reduce(self, nodes: Sequence[Node]) -> None:
        """Over all GPUs of all nodes, or a rank on each node; two where there is one node."""
        import ray

        if not nodes:
            return
        backend = "nccl" if any(node.gpus for node in nodes) else "gloo"
        infos = list(self._slots(nodes, backend))
        self._stage(f"an all-reduce of {len(infos)} ranks ({backend})")
        first = self._visitors[nodes[0].place]
        try:
            port = ray.get(first.free_port.remote(), timeout=self._seconds)
        except ray.exceptions.RayError:
            return
        mine: dict[str, list[Mapping[str, str]]] = {}
        for rank, info in enumerate(infos):
            mine.setdefault(info.address, []).append(rank_environment(infos, rank, port))
        asked = {
            place: self._visitors[place].reduce.remote(mine[info.address], backend, self._seconds)
            for place, info in self._where.items()
            if info.address in mine
        }
        found = self._ask("all-reduce", asked, 3 * self._seconds)
        if len(found) == len(asked):
            results = [result for part in found.values() for result in part]
            self._tell([judge_reduce(results, backend, len(asked))])

    def _slots(self, nodes: Sequence[Node], backend: str) -> Iterable[SlotInfo]:
        for node in nodes:
            info = self._where[node.place]
            if backend == "nccl":
                yield from (SlotInfo(*_but_gpus(info), (str(i),), info.pid) for i in range(node.gpus))
            else:
                yield from [info] * (2 if len(nodes) == 1 else 1)

    # ---- asking and telling ----

    def _all(self, method: str, *arguments: Any) -> dict[str, Any]:
        return {place: getattr(v, method).remote(*arguments) for place, v in self._visitors.items()}

    def _ask(self, name: str, asked: Mapping[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        """The answers by place; a place that gives none is a finding."""
        import ray

        limit = seconds or self._seconds
        refs = list(asked.values())
        done = set(ray.wait(refs, num_returns=len(refs), timeout=limit)[0]) if refs else set()
        answers: dict[str, Any] = {}
        for place, ref in asked.items():
            if ref not in done:
                todo = "see whether the node is overloaded or cut off (`ray status`); --timeout allows more"
                self._tell(at(place, [fail(name, f"no answer within {limit:g} s", _WHY_RAY, todo)]))
                # Once is enough: what follows does without it.
                self._visitors.pop(place, None)
                continue
            try:
                answers[place] = ray.get(ref)
            except ray.exceptions.RayError as error:
                todo = "see Ray's logs on that node, and that it runs the same image"
                self._tell(at(place, [fail(name, _last_line(error), _WHY_RAY, todo)]))
        return answers

    def _room(self, node: Node, available_bytes: int) -> None:
        self._print("node", asdict(NodeRoom(node.place, dict(node.resources), available_bytes)))

    def _stage(self, text: str) -> None:
        self._print("stage", text)

    def _tell(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self._print("finding", finding.to_dict())

    def _print(self, kind: str, value: Any) -> None:
        print(json.dumps({kind: value}), file=self._out, flush=True)


def unreachable(address: str, seconds: float = _REACH_SECONDS) -> Finding | None:
    """Why nobody can be at an address, by a plain connection: Ray itself would try for a minute."""
    if address.startswith("ray://"):
        todo = "give the head's own address, host:6379, from a machine that reaches the nodes; or `dltrain submit`"
        return fail("Ray", f"{address} is for Ray's client", "a driver takes part in the cluster itself", todo)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return None
    listens = "`ray start --head` prints it"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except socket.gaierror:
        return fail("Ray", f"{address}: there is no host {host!r}", _WHY_RAY, f"correct the address: {listens}")
    except TimeoutError:
        found = f"{address} gives no answer within {seconds:g} s"
        return fail("Ray", found, _WHY_RAY, "check that the head is up, and that a firewall lets this port through")
    except OSError as error:
        found = f"{address}: {error.strerror or error}"
        return fail("Ray", found, _WHY_RAY, f"start Ray there, or correct the address: {listens}")
    return None


def _alive(nodes: Iterable[Mapping[str, Any]]) -> list[Node]:
    alive = [node for node in nodes if node["Alive"]]
    places = [node["NodeManagerAddress"] for node in alive]
    # Several raylets of one machine, as tests start them.
    names = [p if places.count(p) == 1 else f"{p} ({n['NodeID'][:6]})" for p, n in zip(places, alive, strict=True)]
    return [Node(name, n["NodeID"], n["Resources"]) for name, n in zip(names, alive, strict=True)]


def _on(node: Node, what: Callable[..., Any]) -> Any:
    """A task or actor that runs there, whatever else does."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    return ray.remote(what).options(num_cpus=0, scheduling_strategy=strategy)


def _but_gpus(info: SlotInfo) -> tuple[str, str, str]:
    return info.node_id, info.address, info.interface


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _last_line(error: BaseException) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


if __name__ == "__main__":
    main()
