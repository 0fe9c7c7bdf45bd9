"""What a start of a run says and puts in place before its first attempt, and what it tells of itself after."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dltrain.data.plan import Plan
from dltrain.observing.hub import Hub
from dltrain.observing.view import View
from dltrain.running.group import Group
from dltrain.running.lifecycle import Lifecycle
from dltrain.running.record import Record
from dltrain.spec import JobSpec
from dltrain.training.plan import BatchPlan, Schedule

__all__ = ["announce", "live_state", "make_hub", "signals"]


def announce(
    view: View, spec: JobSpec, url: str, plan: Plan, schedule: Schedule, step: int, changes: Sequence[str]
) -> None:
    """Tells the user what is about to be trained, and from where."""
    rows = f"{plan.num_rows:,} rows in {plan.num_units:,} row groups"
    view.say(f"{spec.name}: {rows}, {schedule.total_steps} steps, into {url}")
    view.say(f"global batch: {BatchPlan.of(spec.batch.global_, spec.batch.micro, spec.workers.max)}")
    if schedule.dropped:
        view.say(f"data.end: drop leaves out the last {schedule.dropped} rows", "warn")
    if step:
        view.say(f"resuming from the checkpoint of step {step}", "good")
    for change in changes:
        view.say(f"changed since the last start: {change}")


def make_hub(spec: JobSpec, view: View, on_cluster: bool) -> Hub:
    """Serves the run's metrics.

    On a cluster a scraper expects the port; on a laptop another run may have it.
    """
    metrics, engine = spec.metrics, spec.engine
    labels = {"zero_stage": str(engine.zero), "precision": engine.precision}
    hub = Hub(spec.name, metrics.host, metrics.port, move=not on_cluster, labels=labels)
    if hub.moved:
        view.say(f"metrics port {metrics.port} is busy; using {hub.port}")
    return hub


@contextlib.contextmanager
def signals(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Has Ctrl-C and SIGTERM handled for a while; in a thread, where Python allows no handlers, leaves them alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: Any) -> None:
        on_signal(number)

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def live_state(life: Lifecycle, group: Group | None, record: Record, total_steps: int) -> dict[str, Any]:
    """What state.json says of a run that is under way."""
    ranks = zip(group.slots, group.pids, strict=False) if group else ()
    workers = [
        {"rank": rank, "pid": pid, "node": slot.info.address, "state": life.state}
        for rank, (slot, pid) in enumerate(ranks)
    ]
    return {
        "run": record.name,
        "state": life.state,
        "step": life.step,
        "total_steps": total_steps,
        "world_size": life.num_ranks,
        "workers": workers,
        "restarts": record.total_restarts,
        "samples_per_second": round(record.rate, 1),
        "goodput": round(record.ledger.goodput, 4),
        "checkpoint_step": life.committed_step,
        "checkpoint_time": record.checkpoint_time,
        "snapshot_every": record.snapshot_every,
    }
