"""The agent: a Ray actor per slot that starts, watches and kills the worker process under it.

    agent = ray.remote(Agent).options(...).remote(device="cpu", num_threads=1)
    ray.get(agent.hello.remote()); agent.start.remote(job); agent.poll.remote(0.3)

A worker is started at once and kept waiting with its slow imports done, so that `start` costs no import.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

from dltrain.observing.reports import StepReport
from dltrain.running.lifecycle import Event, Exited
from dltrain.training.plan import RankJob

__all__ = ["MEMORY", "Agent", "LogLine", "SlotInfo"]

_TAIL_LINES = 30
_DRAIN_SECONDS = 0.1
# Memory that was freed is used again instead of being given back: a page's first touch costs more than a copy of
# what is in it, and a step frees as much as it takes.
MEMORY = {
    # Arrow's own pool, in ms: a window of rows is freed seconds before the next one needs as much.
    "MIMALLOC_PURGE_DELAY": "60000",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 1024 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(1024 * 1024 * 1024),
}


@dataclass(frozen=True)
class LogLine:
    """A line that a worker printed."""

    rank: int
    text: str
    error: bool


@dataclass(frozen=True)
class SlotInfo:
    """Where a slot is: node, address, and the GPUs Ray gave it."""

    node_id: str
    address: str
    interface: str
    gpus: tuple[str, ...]
    pid: int


class Agent:
    """Keeps one worker process.

    Args:
        device: cpu or cuda.
        num_threads: of a worker's CPU arithmetic.
    """

    def __init__(self, device: str, num_threads: int) -> None:
        self._device, self._num_threads = device, num_threads
        self._events: collections.deque[Event | LogLine] = collections.deque()
        self._wake = threading.Condition()
        self._urgent = False
        self._attempt = 0
        self._spawner = _Spawner()
        self._worker: _Worker | None = None
        self._standby: _Worker | None = self._spawn()

    def hello(self) -> SlotInfo:
        """Where this slot is."""
        import ray

        context = ray.get_runtime_context()
        address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        gpus = tuple(str(g) for g in context.get_accelerator_ids().get("GPU", []))
        return SlotInfo(context.get_node_id(), address, _interface_of(address), gpus, os.getpid())

    def free_port(self) -> int:
        """A port nobody listens on now, for a rendezvous on this node."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def start(self, job: RankJob) -> int:
        """Gives the waiting worker its job; returns its process id."""
        worker = self._standby
        self._standby = None
        if worker is None or worker.process.poll() is not None:
            worker = self._spawn()
        self._worker, self._attempt = worker, job.attempt
        worker.rank = job.rank
        with contextlib.suppress(OSError):  # it died: its exit is the news
            worker.connection.send(job)
        return worker.process.pid

    def poll(self, seconds: float) -> tuple[int, list[Event | LogLine]]:
        """The attempt, and what happened in it; waits up to `seconds`, unless something other than a step happened."""
        deadline = time.monotonic() + seconds
        with self._wake:
            while not self._urgent and (left := deadline - time.monotonic()) > 0:
                self._wake.wait(left)
            events = list(self._events)
            self._events.clear()
            self._urgent = False
            return self._attempt, events

    def tell(self, command: str) -> None:
        """Passes a command ("stop") to the worker."""
        if self._worker:
            with contextlib.suppress(OSError):
                self._worker.connection.send(command)

    def kill(self) -> list[StepReport]:
        """Ends the worker at once and starts the next one; returns the steps that were not asked for yet."""
        if self._worker:
            self._worker.kill()
            self._worker = None
        with self._wake:
            left = [event for event in self._events if isinstance(event, StepReport)]
            self._events.clear()
        if self._standby is None or self._standby.process.poll() is not None:
            self._standby = self._spawn()
        return left

    def close(self) -> None:
        """Ends every process under this agent."""
        for worker in (self._worker, self._standby):
            if worker:
                worker.kill()

    def _spawn(self) -> _Worker:
        return self._spawner.call(lambda: _Worker(self._device, self._num_threads, self._push))

    def _push(self, worker: _Worker, event: Event | LogLine) -> None:
        if worker.killed or (worker is not self._worker and not isinstance(event, LogLine)):
            return
        if isinstance(event, LogLine) and event.rank < 0:
            return
        with self._wake:
            self._events.append(event)
            if not isinstance(event, StepReport | LogLine) or (isinstance(event, StepReport) and event.step <= 1):
                self._urgent = True
                self._wake.notify_all()


class _Spawner:
    """A thread that lives as long as the agent and starts the processes.

    PR_SET_PDEATHSIG fires when the spawning thread ends, and the threads that carry an actor's calls may.
    """

    def __init__(self) -> None:
        self._calls: queue.Queue[tuple[Callable[[], _Worker], queue.Queue[Any]]] = queue.Queue()
        threading.Thread(target=self._run, name="dltrain-spawner", daemon=True).start()

    def call(self, make: Callable[[], _Worker]) -> _Worker:
        answer: queue.Queue[Any] = queue.Queue()
        self._calls.put((make, answer))
        result = answer.get()
        if isinstance(result, BaseException):
            raise result
        assert isinstance(result, _Worker)
        return result

    def _run(self) -> None:
        while True:
            make, answer = self._calls.get()
            try:
                answer.put(make())
            except BaseException as error:
                answer.put(error)


class _Worker:
    """A worker process, the pipe to it, and the threads that listen to it."""

    def __init__(self, device: str, num_threads: int, push: Callable[[_Worker, Event | LogLine], None]) -> None:
        self.rank, self.killed = -1, False
        self._push = push
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self.connection, theirs = Pipe()
        self.process = self._popen(theirs, device, num_threads)
        theirs.close()
        self._listeners = [
            threading.Thread(target=self._read_reports, daemon=True),
            threading.Thread(target=self._read_lines, args=(self.process.stdout, False), daemon=True),
            threading.Thread(target=self._read_lines, args=(self.process.stderr, True), daemon=True),
        ]
        for thread in [*self._listeners, threading.Thread(target=self._watch, daemon=True)]:
            thread.start()

    def _popen(self, theirs: Connection, device: str, num_threads: int) -> subprocess.Popen[str]:
        environment = {
            **MEMORY,
            **os.environ,
            "DS_ACCELERATOR": "cuda" if device == "cuda" else "cpu",
            "OMP_NUM_THREADS": str(num_threads),
            "PYTHONUNBUFFERED": "1",
        }
        # Ray hides the node's other GPUs from its actors; LOCAL_RANK must count over all of them.
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        return subprocess.Popen(
            [sys.executable, "-m", "dltrain.running.worker", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            # Ctrl-C is the driver's to handle: it asks for a clean stop. A group, not a session: the kernel
            # shares the processor out by sessions first, and two workers would be set against each other.
            process_group=0,
        )

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            # The group: a worker's own children go with it.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        # What it said before its end is still in the pipe.
        self._listeners[0].join(timeout=1)
        self.killed = True
        self.connection.close()

    def _read_reports(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                report = self.connection.recv()
                self._push(self, report)
                # Reports of steps can lie in the pipe: to be woken by each would take time from the training.
                if isinstance(report, StepReport) and not self.connection.poll():
                    time.sleep(_DRAIN_SECONDS)

    def _read_lines(self, source: IO[str], error: bool) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in source:
                self._tail.append(line.rstrip())
                self._push(self, LogLine(self.rank, line.rstrip(), error))

    def _watch(self) -> None:
        code = self.process.wait()
        # What it said before its end comes first.
        for thread in self._listeners:
            thread.join(timeout=2)
        self._push(self, Exited(self.rank, code, "\n".join(self._tail)))


def _interface_of(address: str) -> str:
    """The network interface that has this address, for gloo and NCCL; without it gloo may bind to 127.0.0.1."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return str(name)
    return "lo"
