"""The agent: a Ray actor per rank slot that starts, watches and kills the worker process under it.

    agent = ray.remote(Agent).options(...).remote(device="cpu", num_threads=1)
    ray.get(agent.hello.remote()); agent.start.remote(job); agent.poll.remote(0.3)

Its workers come from a nursery, where all that is slow is done already. It holds the snapshots of its rank and those of
a buddy agent's, and writes checkpoints to the store. When it has not heard from the driver for as long as its lease, it
ends its worker: a machine that is cut off is quiet before it is replaced.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import IO, Any

from dltrain.checkpoint.commit import write_rank
from dltrain.errors import CheckpointError
from dltrain.observing.reports import (
    Anchor,
    Done,
    LogLine,
    Saved,
    SaveFailed,
    SaveWanted,
    SlotsMade,
    StepReport,
)
from dltrain.running import diagnose
from dltrain.running.events import Event, Exited
from dltrain.running.holdings import Holdings
from dltrain.running.messages import Anchored, Bye, Bytes, Command, Hello, Holding, Leavings, Pulse, Slots, Unpin, Want
from dltrain.running.nursery import make_nursery
from dltrain.running.rendezvous import interface_of
from dltrain.store import open_store
from dltrain.training.plan import RankJob

__all__ = ["Agent", "SlotInfo"]

_TAIL_LINES, _TAIL_CHARACTERS = 20, 500
_DRAIN_SECONDS = 0.1
_LEASE_CHECK_SECONDS = 0.1
# An agent whose driver is gone for good ends itself.
_ORPHAN_SECONDS = 120.0
_COPY_SECONDS = 60.0


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
        import ray

        self._events: collections.deque[Event] = collections.deque()
        self._wake = threading.Condition()
        self._urgent = False
        self._attempt = self._ended = 0
        self._lives = threading.Lock()
        self._heard, self._lease = time.monotonic(), float("inf")
        self._leaving = False
        driver = ray.get_runtime_context()
        self._nursery = make_nursery(device, num_threads, f"{driver.gcs_address} {driver.get_job_id()}")
        self._holdings = Holdings()
        self._others: Mapping[str, Any] = {}
        self._uploads = ThreadPoolExecutor(1, thread_name_prefix="dltrain-upload")
        self._uploading = 0
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="dltrain-copy")
        self._buddy: Any = None
        self._anchoring = False
        self._worker: _Worker | None = None
        # Born as soon as the imports are done, while the driver still plans.
        self._births = ThreadPoolExecutor(1, thread_name_prefix="dltrain-birth")
        self._standby: Future[_Worker] | None = self._births.submit(self._spawn)
        self._doorbell = diagnose.Doorbell(self._on_drain)
        threading.Thread(target=self._watch_lease, name="dltrain-lease", daemon=True).start()

    def hello(self) -> SlotInfo:
        """Where this slot is."""
        import ray

        context = ray.get_runtime_context()
        address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        gpus = tuple(str(g) for g in context.get_accelerator_ids().get("GPU", []))
        return SlotInfo(context.get_node_id(), address, interface_of(address), gpus, os.getpid())

    def free_port(self) -> int:
        """A port nobody listens on now, for a rendezvous on this node."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    # ---- the worker ----

    def start(self, job: RankJob, others: Mapping[str, Any] | None = None) -> int:
        """Gives a worker its job; returns its process id.

        Args:
            others: name of a rank's file in memory -> the agent of another node that holds it, and its rank and step.
        """
        standby, self._standby = self._standby, None
        worker = standby.result() if standby else self._spawn()
        if not worker.child.alive():
            worker = self._spawn()
        with self._lives:
            return self._begin(worker, job, others or {})

    def _begin(self, worker: _Worker, job: RankJob, others: Mapping[str, Any]) -> int:
        if job.attempt <= self._ended:
            worker.kill()
            raise RuntimeError(f"attempt {job.attempt} has been ended")
        if self._worker:
            self._worker.kill()
        self._others, self._buddy = others, None
        self._worker, self._attempt, self._job = worker, job.attempt, job
        self._heard = time.monotonic()
        worker.begin(job.rank, job.attempt)
        with contextlib.suppress(OSError):  # it died: its exit is the news
            worker.connection.send(job)
        return int(worker.child.pid)

    def poll(self, seconds: float) -> tuple[int, list[Event]]:
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
        """Passes a wish ("stop", "pause", "drain") to the worker."""
        if self._worker:
            self._worker.send(Command(command))

    def kill(self, attempt: int) -> Leavings:
        """Ends the worker at once, and this attempt for good; returns what it left."""
        with self._lives:
            self._ended = max(self._ended, attempt)
            if self._worker:
                # Still ours meanwhile: what it said before its end is taken in.
                self._worker.kill()
                self._worker = None
        with self._wake:
            # Who polls has nothing to wait for.
            self._urgent = True
            self._wake.notify_all()
            left = [event for event in self._events if isinstance(event, StepReport)]
            self._events.clear()
        return Leavings(left, self._holdings.all())

    def close(self) -> None:
        """Ends every process under this agent."""
        self._doorbell.close()
        # Those that come from it end with it.
        self._nursery.close()
        if self._worker:
            self._worker.kill()

    # ---- the driver's heartbeat ----

    def beat(self, lease_seconds: float) -> Pulse:
        """The driver is alive: the lease begins anew."""
        self._heard, self._lease = time.monotonic(), lease_seconds
        # One that is done waits for nothing but its upload.
        worker, standby = self._worker, self._standby
        still, phase = worker.still() if worker and not worker.is_done else (0.0, "starting")
        prepared = standby is None or standby.done()
        return Pulse(self._attempt, still, phase, self._leaving, prepared)

    def _watch_lease(self) -> None:
        while True:
            time.sleep(_LEASE_CHECK_SECONDS)
            silent = time.monotonic() - self._heard
            worker = self._worker
            if silent > self._lease and worker and worker.child.alive():
                worker.end(
                    f"its agent had not heard of the driver for {silent:.1f} s, more than faults.lease_seconds "
                    f"({self._lease:g}): the network between them, or a machine with more to do than it can"
                )
            if silent > _ORPHAN_SECONDS and self._lease < float("inf"):
                self.close()
                os._exit(0)

    def stacks(self) -> str:
        """What the worker is doing, told from outside."""
        return diagnose.stack_of(self._worker.child.pid) if self._worker else "there is no worker"

    # ---- snapshots ----

    def hold(self, slots: Slots | None) -> bool:
        """Holds another agent's slots open as well, so that they outlive it; False when they are gone already."""
        return slots is not None and self._holdings.open(slots, mine=False) is not None

    def my_slots(self) -> Slots | None:
        """This rank's, as others can open them."""
        return self._holdings.mine()

    def forget(self, attempt: int, but: int = 0) -> None:
        """Snapshots of attempts before this one are not needed any more, but for one of them."""
        self._holdings.forget(attempt, but)

    def reports_of(self, rank: int) -> list[StepReport]:
        """The newest reports of a rank whose agent is gone."""
        return self._holdings.reports(rank)

    def read(self, attempt: int, rank: int, step: int, start: int, end: int) -> bytes | None:
        """Bytes of a snapshot held here, for a worker on another node."""
        return self._holdings.read(attempt, rank, step, start, end)

    def copy_to(self, buddy: Any) -> None:
        """From now on snapshots are copied to this agent, on another node."""
        self._buddy = buddy

    def keep(self, holding: Holding, data: bytes, reports: list[bytes]) -> bool:
        """Keeps a copy of a snapshot that lies on another node."""
        self._holdings.keep(holding, data, reports)
        return True

    # ---- inside ----

    def _on_drain(self) -> None:
        """`dltrain drain` on this node; the driver hears of it with its heartbeat."""
        self._leaving = True

    def _spawn(self) -> _Worker:
        return _Worker(self._nursery.take, self._push)

    def _push(self, worker: _Worker, report: Any) -> None:
        if worker.killed or (worker is not self._worker and not isinstance(report, LogLine)):
            return
        match report:
            case LogLine(rank=-1):
                return
            case Hello():
                worker.watch(report.box_fd)
            case SlotsMade():
                self._holdings.open(Slots.made(report, self._attempt, worker.child.pid, worker.box_fd), mine=True)
                self._push_event(report)
            case SaveWanted():
                self._push_event(report)
                self._save(worker, report)
            case Anchor():
                self._anchor(worker, report)
            case Done():
                # What is said before it has been taken in.
                worker.is_done = True
                worker.send(Bye())
                self._push_event(report)
            case Want():
                threading.Thread(target=self._fetch, args=(worker, report), daemon=True).start()
            case _:
                self._push_event(report)

    def _push_event(self, event: Event) -> None:
        with self._wake:
            self._events.append(event)
            if not isinstance(event, StepReport | LogLine) or self._first(event):
                self._urgent = True
                self._wake.notify_all()

    def _first(self, event: StepReport | LogLine) -> bool:
        """Whether it is the attempt's first step, which is waited for."""
        return isinstance(event, StepReport) and event.step <= self._job.step + 1

    def _fetch(self, worker: _Worker, want: Want) -> None:
        import ray

        agent, attempt, rank, step = self._others[want.name]
        data = None
        with contextlib.suppress(ray.exceptions.RayError):
            data = ray.get(agent.read.remote(attempt, rank, step, want.start, want.end), timeout=_COPY_SECONDS)
        worker.send(Bytes(data))

    def _anchor(self, worker: _Worker, anchor: Anchor) -> None:
        if self._buddy is None or self._anchoring:
            worker.send(Unpin(anchor.slot))
            return
        self._anchoring = True
        self._copies.submit(self._copy_out, worker, anchor, self._attempt, self._buddy)

    def _copy_out(self, worker: _Worker, anchor: Anchor, attempt: int, buddy: Any) -> None:
        """The snapshot to the buddy's memory and to our own: after a loss all ranks need one of the same step."""
        import ray

        try:
            found = self._holdings.copy(attempt, anchor.rank, anchor.step)
            worker.send(Unpin(anchor.slot))
            if found:
                reports = self._holdings.records(anchor.rank)
                self._holdings.keep(*found, reports)
                begin = time.monotonic()
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(buddy.keep.remote(*found, reports), timeout=_COPY_SECONDS)
                worker.send(Anchored(time.monotonic() - begin))
        finally:
            self._anchoring = False

    # ---- checkpoints ----

    def _save(self, worker: _Worker, wanted: SaveWanted) -> None:
        if self._uploading and not wanted.must:
            # Its slot is free at once; another one is pinned.
            worker.send(Unpin(wanted.slot))
            reason = "the one before is still being written; save less often (checkpoint.every)"
            self._push_event(SaveFailed(wanted.rank, wanted.step, reason, 0.0))
            return
        self._uploading += 1
        self._uploads.submit(self._upload, worker, wanted, self._job)

    def _upload(self, worker: _Worker, wanted: SaveWanted, job: RankJob) -> None:
        begin = time.monotonic()
        event: Saved | SaveFailed
        try:
            file, meta = self._write(wanted, job)
            event = Saved(wanted.rank, wanted.step, wanted.position, file, time.monotonic() - begin, meta)
        except Exception as error:  # whatever it is, the driver waits for an answer
            reason = f"{type(error).__name__}: {error}"
            event = SaveFailed(wanted.rank, wanted.step, reason, time.monotonic() - begin)
        self._uploading -= 1
        worker.send(Unpin(wanted.slot))
        if job.attempt == self._attempt:
            self._push_event(event)

    def _write(self, wanted: SaveWanted, job: RankJob) -> tuple[dict[str, Any], dict[str, Any]]:
        found = self._holdings.slot_bytes(job.attempt, wanted.step, wanted.slot)
        if found is None:
            raise CheckpointError("the memory of the snapshot has been used for another one")
        slots, data = found
        file = write_rank(open_store(job.checkpoints), wanted.step, job.attempt, job.rank, data)
        meta = {"optimizer_step": wanted.applied, "whole": slots.whole, "ties": dict(slots.ties)}
        return {**file, "parts": slots.parts}, meta if job.rank == 0 else {}


class _Worker:
    """A worker process, the pipe to it, and the threads that listen to it."""

    def __init__(self, take: Callable[[Connection, int, int], Any], push: Callable[[_Worker, Any], None]) -> None:
        self.rank, self.attempt, self.killed, self.is_done = -1, 0, False, False
        self._push = push
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._reason = ""
        self._sign = diagnose.SignOfLife()
        self._sending = threading.Lock()
        self.box_fd = -1
        self.connection, theirs = Pipe()
        out, err = os.pipe(), os.pipe()
        self.child = take(theirs, out[1], err[1])
        theirs.close()
        os.close(out[1])
        os.close(err[1])
        lines = [(open(out[0], errors="replace"), False), (open(err[0], errors="replace"), True)]  # noqa: SIM115
        self._listeners = [
            threading.Thread(target=self._read_reports, daemon=True),
            *(threading.Thread(target=self._read_lines, args=line, daemon=True) for line in lines),
        ]
        for thread in [*self._listeners, threading.Thread(target=self._watch, daemon=True)]:
            thread.start()

    def send(self, message: Any) -> None:
        """Says something to the worker, if it is still there."""
        with self._sending, contextlib.suppress(OSError):
            self.connection.send(message)

    def watch(self, box_fd: int) -> None:
        """Its black box is there: it is the sign of life."""
        self.box_fd = box_fd
        self._sign.open(self.child.pid, box_fd)

    def begin(self, rank: int, attempt: int) -> None:
        """It is given a job."""
        self.rank, self.attempt = rank, attempt
        self._sign.begin()

    def still(self) -> tuple[float, str]:
        """Seconds since it gave a sign of life, and what it was at."""
        return self._sign.still()

    def end(self, reason: str = "") -> None:
        """Has it killed; its exit is told like any other, with the reason."""
        self._reason = self._reason or reason
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # The group: a worker's own children go with it.
            os.killpg(self.child.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Ends it at once; what it said before is heard, what it says of its end is not."""
        self.end()
        self.child.wait()
        # What it said before its end is still in the pipe.
        self._listeners[0].join(timeout=1)
        self.killed = True
        self._sign.close()
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
        with contextlib.suppress(ValueError, OSError), source:
            for line in source:
                text = line.rstrip()
                self._tail.append(text[:_TAIL_CHARACTERS])
                self._push(self, LogLine(self.rank, text, error, self.attempt, time.time()))

    def _watch(self) -> None:
        code = self.child.wait()
        # Its children hold its pipes open.
        self.end()
        # What it said before its end comes first.
        for thread in self._listeners:
            thread.join(timeout=2)
        self._push(self, Exited(self.rank, code, "\n".join(self._tail), self._reason))
