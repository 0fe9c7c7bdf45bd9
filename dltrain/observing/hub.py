"""The hub: what the ranks report goes into one registry, served for Prometheus by a thread of its own.

hub = Hub("image-cnn", host="127.0.0.1", port=9464, move=True, labels={"zero_stage": "1", "precision": "bf16"})
hub.on_step(report); hub.url
hub.close()
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dltrain import __version__
from dltrain.errors import UserError
from dltrain.observing.catalogue import CACHE_OUTCOMES, REQUEST_OUTCOMES, RESTART_REASONS, RETRY_REASONS, Metrics
from dltrain.observing.ledger import STATES, Ledger
from dltrain.observing.reports import PHASES, EvalReport, StepReport

__all__ = ["COUNTED", "Hub"]

_TRIES = 100
# Labels have to be bounded: what a callback calls its figures is not known before.
MOST_LOGGED = 32
# What the record counts, by its name in ledger.json, and the series that it is exported as.
COUNTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "steps": ("steps_total", ()),
    "samples": ("samples_total", ()),
    "tokens": ("tokens_total", ()),
    "nonfinite": ("nonfinite_steps_total", ()),
    "skipped": ("skipped_steps_total", ()),
    "flops": ("model_flops_total", ()),
    "gradient_bytes": ("gradient_bytes_total", ()),
    "alloc_retries": ("alloc_retries_total", ()),
    "checkpoint_failures": ("checkpoint_failures_total", ()),
    "checkpoint_stall_seconds": ("checkpoint_seconds_total", ("yes",)),
    "checkpoint_write_seconds": ("checkpoint_seconds_total", ("no",)),
    **{f"restarts_{reason}": ("restarts_total", (reason,)) for reason in RESTART_REASONS},
    "data_bytes": ("s3_read_bytes_total", ()),
    "data_seconds": ("s3_read_seconds_total", ()),
    "data_hedges": ("data_hedges_total", ()),
    **{f"data_requests_{outcome}": ("s3_requests_total", ("get", outcome)) for outcome in REQUEST_OUTCOMES},
    **{f"data_retries_{reason}": ("data_retries_total", (reason,)) for reason in RETRY_REASONS},
    **{f"data_cache_{outcome}": ("data_cache_requests_total", (outcome,)) for outcome in CACHE_OUTCOMES},
}


@dataclass(frozen=True)
class _Rank:
    """A rank's series: finding them by their labels takes longer than counting."""

    phases: Mapping[str, Any]
    steps: Any
    ready: Any
    memory: Any

    @classmethod
    def of(cls, metrics: Metrics, rank: str) -> _Rank:
        phases = {phase: metrics["step_phase_seconds_total"].labels(rank, phase) for phase in PHASES}
        names = ("rank_steps_total", "prefetch_queue_depth", "device_memory_peak_bytes")
        return cls(phases, *(metrics[name].labels(rank) for name in names))


class Hub:
    """Serves one run's metrics.

    Args:
        move: take the next free port when the wanted one is busy (a laptop); else that is an error (a cluster,
            where a scraper expects it).
    """

    def __init__(self, run: str, host: str, port: int, move: bool, labels: Mapping[str, str]) -> None:
        self.metrics = Metrics(run)
        self.metrics["run_info"].labels(version=__version__, **labels).set(1)
        for unknown in ("loss", "grad_norm"):
            # Before the first step there is none, and 0 would be drawn as one.
            self.metrics[unknown].set(math.nan)
        self._counted = {name: self._series(metric, labels) for name, (metric, labels) in COUNTED.items()}
        self._states = {state: self._series("time_seconds_total", (state,)) for state in STATES}
        self._ranks: dict[int, _Rank] = {}
        self._booked: dict[str, float] = {}
        self._logged: set[str] = set()
        self._committed = 0.0
        self._server, self._thread = self._serve(host, port, move)
        self.port = int(self._server.server_port)
        self.moved = port not in (0, self.port)
        self.url = f"http://{host}:{self.port}/metrics"

    def _serve(self, host: str, port: int, move: bool) -> tuple[Any, Any]:
        from prometheus_client import start_http_server

        last: OSError | None = None
        for candidate in range(port, port + _TRIES) if move and port else [port]:
            try:
                return start_http_server(candidate, addr=host, registry=self.metrics.registry)
            except OSError as error:
                last = error
        raise UserError(f"metrics.port: {host}:{port} can't be used: {last}; set another, or 0 for any free one")

    def _series(self, metric: str, labels: tuple[str, ...]) -> Any:
        return self.metrics[metric].labels(*labels) if labels else self.metrics[metric]

    def count(self, name: str, number: float) -> None:
        """Adds to a counter, by its name in COUNTED; a name that is not there is not exported."""
        if name in self._counted:
            self._counted[name].inc(number)

    def on_step(self, report: StepReport) -> None:
        """One rank's step; run-wide numbers are taken from rank 0's."""
        metrics, rank = self.metrics, self._ranks.get(report.rank)
        if rank is None:
            rank = self._ranks[report.rank] = _Rank.of(metrics, str(report.rank))
        for phase, seconds in report.phases.items():
            rank.phases[phase].inc(seconds)
        rank.steps.inc()
        rank.ready.set(report.ready)
        rank.memory.set(report.memory_bytes)
        if report.rank == 0:
            metrics["step_seconds"].observe(report.seconds)
            metrics["last_step_timestamp_seconds"].set(time.time())
            metrics["grad_norm"].set(report.grad_norm)
            metrics["learning_rate"].set(report.learning_rate)

    def on_loss(self, loss: float, by_network: Mapping[str, float]) -> None:
        """The mean loss of a step over its global batch, and that of each network where there are several."""
        self.metrics["loss"].set(loss)
        for name, value in by_network.items():
            self.metrics["network_loss"].labels(name).set(value)

    def on_eval(self, report: EvalReport) -> None:
        """The metrics of an evaluation."""
        for name, value in report.metrics.items():
            self.metrics["eval"].labels(name).set(value)

    def on_logged(self, values: Mapping[str, float]) -> None:
        """What a task's callbacks logged; only so many names of it become series."""
        for name, value in values.items():
            if name in self._logged or len(self._logged) < MOST_LOGGED:
                self._logged.add(name)
                self.metrics["logged"].labels(name).set(value)

    def on_commit(self, num_bytes: int) -> None:
        """A checkpoint was committed."""
        now = time.time()
        if self._committed:
            self.metrics["checkpoint_interval_seconds"].set(now - self._committed)
        self._committed = now
        self.metrics["checkpoint_last_success_timestamp_seconds"].set(now)
        self.metrics["checkpoint_bytes"].set(num_bytes)

    def on_attempt(self, num_ranks: int) -> None:
        """A new group of ranks."""
        # Those of ranks that are gone are taken out of the registry.
        self._ranks.clear()
        self.metrics.start_ranks(num_ranks)

    def on_device(self, name: str, peak_flops: float) -> None:
        """What a rank computes on, and its peak in FLOPs/s: 0 where that is not known, then there is no series."""
        if peak_flops:
            self.metrics["device_peak_flops"].labels(name).set(peak_flops)

    def on_snapshots(self, every: int) -> None:
        """Snapshots in memory are so many steps apart now."""
        self.metrics["snapshot_every_steps"].set(every)

    def on_ledger(self, ledger: Ledger) -> None:
        """Brings the time counters up to the ledger."""
        for state, seconds in ledger.seconds.items():
            if seconds != self._booked.get(state, 0.0):
                self._states[state].inc(seconds - self._booked.get(state, 0.0))
                self._booked[state] = seconds

    def restore(self, counters: Mapping[str, float], checkpoint_time: float) -> None:
        """Goes on from what an earlier start of the run had reached.

        Args:
            checkpoint_time: when it made its last checkpoint, in Unix seconds; 0 for never.
        """
        for name, number in counters.items():
            self.count(name, number)
        self._committed = checkpoint_time
        self.metrics["checkpoint_last_success_timestamp_seconds"].set(checkpoint_time)

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
