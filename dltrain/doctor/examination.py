"""An examination: which checks there are, and what their findings say together.

report = Examination(spec, address="", cwd=".", seconds=60).run(NoProgress())
report.findings, report.good
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dltrain.doctor.checkup import Check, Progress, run_checks
from dltrain.doctor.cluster import visit_cluster
from dltrain.doctor.data import look_at_data
from dltrain.doctor.facts import machine_facts
from dltrain.doctor.finding import Finding, at, counts, fail, ok, warn
from dltrain.doctor.gpu import Card, judge_card, judge_gpus, judge_torch
from dltrain.doctor.job import (
    DataFacts,
    NodeRoom,
    TaskFacts,
    judge_batch,
    judge_capacity,
    judge_data,
    judge_task,
    slots_of,
    worker_bytes,
    workers_gpus,
)
from dltrain.doctor.machine import judge_machine, judge_room
from dltrain.doctor.probe import cards, task_facts, torch_facts
from dltrain.doctor.ranks import judge_reduce, local_environments, run_ranks
from dltrain.doctor.storage import judge_store, try_store
from dltrain.errors import RunChangedError
from dltrain.running.rundir import RunDir
from dltrain.spec import JobSpec, MetricsSpec
from dltrain.spec.paths import at_home

__all__ = ["Examination", "Report", "judge_port", "port_problem"]

# Ray's rounds have limits of their own, by stage.
_RAY_FACTOR = 30.0
_STORE_TODO = "check the endpoint (AWS_ENDPOINT_URL), the network, and whether a firewall drops the packets"


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        left: a check did not end and still runs in its thread.
    """

    findings: list[Finding]
    left: bool
    seconds: float

    @property
    def good(self) -> bool:
        """Nothing failed."""
        return counts(self.findings)["fail"] == 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = [finding.to_dict() for finding in self.findings]
        return {"ok": self.good, "counts": counts(self.findings), "findings": found, "seconds": round(self.seconds, 2)}


class Examination:
    """Of this machine, a cluster where there is one, and a spec where one is given.

    Args:
        address: of a Ray cluster; empty: a private Ray is tried.
        cwd: the user's directory.
        seconds: that one check may take.
    """

    def __init__(self, spec: JobSpec | None, address: str, cwd: str, seconds: float) -> None:
        self._spec, self._address, self._cwd, self._seconds = spec, address, cwd, seconds
        self._stage = ""
        self._cards: list[Card] = []
        self._data: list[DataFacts] = []
        self._task: TaskFacts | None = None
        self._nodes: list[NodeRoom] = []

    def run(self, progress: Progress) -> Report:
        """Looks at everything."""
        begin = time.monotonic()
        findings, left = run_checks(list(self._checks()), _Staged(progress, lambda: self._stage))
        if self._spec:
            findings += self._together(self._spec)
        return Report(findings, left, time.monotonic() - begin)

    def _checks(self) -> Iterator[Check]:
        seconds = self._seconds
        yield Check("machine", lambda: judge_machine(machine_facts(inside_ray=False)), seconds)
        yield Check("torch and DeepSpeed", self._torch, 2 * seconds, heavy=True)
        yield Check("metrics port", self._port, seconds)
        yield Check("Ray", self._ray, _RAY_FACTOR * seconds)
        if not self._address:
            yield Check("all-reduce", self._reduce, 3 * seconds, heavy=True)
        if self._spec:
            yield from self._checks_of(self._spec)

    def _checks_of(self, spec: JobSpec) -> Iterator[Check]:
        seconds = self._seconds
        yield Check("task", lambda: self._ask_task(spec), 2 * seconds, heavy=True)
        yield Check("data", lambda: self._look_at_data(spec), seconds, todo=_STORE_TODO)
        yield Check("run directory", lambda: _store(spec), seconds, todo=_STORE_TODO)

    # ---- checks ----

    def _torch(self) -> list[Finding]:
        said, self._cards = torch_facts(self._seconds), cards()
        return [*judge_torch(said), *judge_gpus(self._cards, said)]

    def _port(self) -> list[Finding]:
        metrics = self._spec.metrics if self._spec else MetricsSpec()
        return [judge_port(metrics, port_problem(metrics.host, metrics.port), bool(self._address))]

    def _ray(self) -> list[Finding]:
        spec = at_home(self._spec, self._cwd) if self._spec else None
        visit = visit_cluster(self._address or "local", spec, self._seconds, self._set_stage)
        self._nodes = visit.nodes
        return visit.findings

    def _set_stage(self, text: str) -> None:
        self._stage = text

    def _reduce(self) -> list[Finding]:
        here = _visible(len(cards()))
        backend, num_ranks = ("nccl", here) if here else ("gloo", 2)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        return [judge_reduce(run_ranks(local_environments(num_ranks, port), backend, self._seconds), backend, 1)]

    def _ask_task(self, spec: JobSpec) -> list[Finding]:
        self._task = task_facts(spec, self._cwd, self._seconds)
        return []

    def _look_at_data(self, spec: JobSpec) -> list[Finding]:
        self._data = look_at_data(spec)
        return [judge_data(facts) for facts in self._data]

    # ---- what several of them say ----

    def _together(self, spec: JobSpec) -> Iterator[Finding]:
        rows = sum(facts.rows_about for facts in self._data if facts.field != "data.eval")
        yield from judge_batch(spec, bool(self._task and self._task.batch_norm), rows)
        yield from judge_capacity(spec, self._nodes, may_grow=bool(self._address))
        if self._task:
            yield from judge_task(spec, self._task, self._data)
            if not self._task.error:
                yield from self._rooms(spec, self._task.parameters)

    def _rooms(self, spec: JobSpec, parameters: int) -> Iterator[Finding]:
        gpus = workers_gpus(spec, self._nodes)
        on_device, in_memory = worker_bytes(spec, parameters, on_gpu=bool(gpus))
        for node in self._nodes:
            workers = min(slots_of(node, spec.workers, gpus), spec.workers.max)
            available = node.available_bytes if node.available_bytes >= 0 else machine_facts(False).available_bytes
            if workers:
                yield from at(node.address, [judge_room(available, workers, in_memory)])
        if gpus and self._cards:
            yield judge_card(self._cards, on_device)


class _Staged:
    """Adds what Ray's rounds are at to what is shown."""

    def __init__(self, progress: Progress, stage: Any) -> None:
        self._progress, self._stage = progress, stage

    def update(self, done: int, total: int, at: Any) -> None:
        stage = self._stage()
        self._progress.update(done, total, [f"Ray: {stage}" if a == "Ray" and stage else a for a in at])


def _store(spec: JobSpec) -> list[Finding]:
    run = RunDir.of(spec)
    found = judge_store(try_store(run.store))
    if any(finding.status == "fail" for finding in found):
        return found
    try:
        changes = run.check_same(spec)
    except RunChangedError as error:
        todo = "set another `name`, or delete that directory"
        return [*found, fail("same run", str(error), "`dltrain run` refuses to mix the two", todo)]
    return [*found, ok("same run", "; ".join(changes))] if changes else found


def _visible(num_cards: int) -> int:
    """How many of the cards a process here would see."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return num_cards if chosen is None else min(num_cards, len([c for c in chosen.split(",") if c.strip()]))


def port_problem(host: str, port: int) -> str:
    """Why nothing can listen there now; empty when it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            return error.strerror or str(error)
    return ""


def judge_port(metrics: MetricsSpec, problem: str, on_cluster: bool) -> Finding:
    """Whether the metrics can be served."""
    name, place = "metrics port", f"{metrics.host}:{metrics.port}"
    if not problem:
        return ok(name, f"{place} is free")
    todo = "set metrics.port to another one, or to 0 for any; see who has it with `ss -ltnp`"
    if on_cluster:
        return fail(
            name, f"{place}: {problem}", "a run on a cluster ends there, since a scraper expects the port", todo
        )
    return warn(name, f"{place}: {problem}", "a run here takes the next free one, which nobody scrapes", todo)
