"""Has the doctor's rounds made in a process of its own, and takes down what is found.

visit = visit_cluster("10.0.0.1:6379", spec, seconds=60, stage=print)
visit.findings, visit.nodes

A head that does not answer can hold Ray up for minutes, and Ray may end a process that it fails in: neither is to
happen to the doctor.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from dltrain.doctor.finding import Finding, fail
from dltrain.doctor.job import NodeRoom
from dltrain.spec import JobSpec

__all__ = ["Visit", "visit_cluster"]

# Several answers of each stage may take their whole time.
_STAGE_FACTOR = 4.0
_TAIL_LINES = 20
_END_SECONDS = 10.0


@dataclass
class Visit:
    """What was found, and the nodes that there are."""

    findings: list[Finding] = field(default_factory=list)
    nodes: list[NodeRoom] = field(default_factory=list)


def visit_cluster(
    address: str,
    spec: JobSpec | None,
    seconds: float,
    stage: Callable[[str], None],
    program: str = "dltrain.doctor.rounds",
) -> Visit:
    """Visits a cluster, or with "local" starts a private Ray.

    Args:
        seconds: that one answer of a node may take.
        stage: told what is being done.
        program: the module that makes the rounds, another one in tests.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        json.dump({"address": address, "seconds": seconds, "spec": spec.to_dict() if spec else None}, process.stdin)
        process.stdin.close()
    try:
        return _Listener(process, address, _STAGE_FACTOR * seconds, stage).listen()
    finally:
        _end(process)


class _Listener:
    def __init__(
        self, process: subprocess.Popen[str], address: str, patience: float, stage: Callable[[str], None]
    ) -> None:
        self._process, self._address, self._patience, self._stage = process, address, patience, stage
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._tail: list[str] = []
        self._at = "the start"
        for source, take in ((process.stdout, self._lines.put), (process.stderr, self._keep)):
            threading.Thread(target=self._read, args=(source, take), daemon=True).start()

    def listen(self) -> Visit:
        """Until it is done, ends, or has nothing to say for too long."""
        visit = Visit()
        while True:
            try:
                line = self._lines.get(timeout=self._patience)
            except queue.Empty:
                found = f"{self._address}: no sign of life for {self._patience:g} s, at {self._at}"
                todo = "check that the head is up and not overloaded, or allow more with --timeout"
                visit.findings.append(fail("Ray", found, "a run would wait as long", todo))
                return visit
            if line is None:
                visit.findings.append(self._died())
                return visit
            if self._take(json.loads(line), visit):
                return visit

    def _take(self, message: dict[str, Any], visit: Visit) -> bool:
        """Takes a message in; whether it was the last."""
        if "finding" in message:
            visit.findings.append(Finding(**message["finding"]))
        elif "node" in message:
            visit.nodes.append(NodeRoom(**message["node"]))
        elif "stage" in message:
            self._at = message["stage"]
            self._stage(self._at)
        return "done" in message

    def _died(self) -> Finding:
        code = self._process.wait()
        said = [line for line in self._tail if line.strip()]
        found = f"{self._address}: Ray ended the process that asked, at {self._at} (exit code {code})"
        last = f": {said[-1].strip()[:300]}" if said else ""
        return fail("Ray", found + last, "a run would end so too", "see what Ray says above, and its logs on the head")

    def _keep(self, line: str | None) -> None:
        if line is not None:
            self._tail = [*self._tail, line][-_TAIL_LINES:]

    def _read(self, source: IO[str], take: Callable[[str | None], None]) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in source:
                take(line)
        take(None)


def _end(process: subprocess.Popen[str]) -> None:
    """Its whole group: a private Ray's processes end with the one that started them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
