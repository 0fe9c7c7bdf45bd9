"""The hub: what the ranks report goes into one registry, served for Prometheus by a thread of its own.

hub = Hub(host="127.0.0.1", port=9464, move=True)
hub.on_step(report); hub.url
hub.close()
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dltrain import __version__
from dltrain.errors import UserError
from dltrain.observing.catalogue import Metrics
from dltrain.observing.ledger import Ledger
from dltrain.observing.reports import EvalReport, StepReport

__all__ = ["Hub"]

_TRIES = 100


class Hub:
    """Serves one run's metrics.

    Args:
        move: take the next free port when the wanted one is busy (a laptop); else that is an error (a cluster,
            where a scraper expects it).
    """

    def __init__(self, host: str, port: int, move: bool, labels: Mapping[str, str]) -> None:
        self.metrics = Metrics()
        self.metrics.info.labels(version=__version__, **labels).set(1)
        self._booked: dict[str, float] = {}
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

    def on_step(self, report: StepReport) -> None:
        """One rank's step; run-wide numbers are taken from rank 0's."""
        rank = str(report.rank)
        for phase, seconds in report.phases.items():
            self.metrics.phase.labels(rank, phase).inc(seconds)
        self.metrics.rank_steps.labels(rank).inc()
        self.metrics.queue.labels(rank).set(report.ready)
        if report.rank == 0:
            self._on_run_step(report)

    def _on_run_step(self, report: StepReport) -> None:
        metrics = self.metrics
        metrics.steps.inc()
        metrics.samples.inc(report.size)
        metrics.step_seconds.observe(report.seconds)
        metrics.last_step.set(time.time())
        metrics.grad_norm.set(report.grad_norm)
        metrics.learning_rate.set(report.learning_rate)
        if not report.finite:
            metrics.nonfinite.inc()
        if not report.applied:
            metrics.skipped.inc()

    def on_data(self, counted: Mapping[str, float]) -> None:
        """What a rank's readers counted since it last told."""
        for name, number in counted.items():
            if name in self.metrics.data:
                self.metrics.data[name].inc(number)

    def on_loss(self, loss: float) -> None:
        """The mean loss of a step over its global batch."""
        self.metrics.loss.set(loss)

    def on_eval(self, report: EvalReport) -> None:
        """The metrics of an evaluation."""
        for name, value in report.metrics.items():
            self.metrics.eval.labels(name).set(value)

    def on_commit(self, num_bytes: int) -> None:
        """A checkpoint was committed."""
        self.metrics.checkpoint_time.set(time.time())
        self.metrics.checkpoint_bytes.set(num_bytes)

    def on_ledger(self, ledger: Ledger) -> None:
        """Brings the time counters up to the ledger."""
        for state, seconds in ledger.seconds.items():
            self.metrics.time.labels(state).inc(seconds - self._booked.get(state, 0.0))
            self._booked[state] = seconds

    def restore(self, counters: Mapping[str, float]) -> None:
        """Starts the counters from what an earlier start of the run had reached."""
        for name in ("steps", "samples", "nonfinite", "skipped", "checkpoint_failures"):
            getattr(self.metrics, name).inc(counters.get(name, 0.0))
        for name, counter in self.metrics.data.items():
            counter.inc(counters.get(f"data_{name}", 0.0))

    def close(self) -> None:
        """Stops serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
