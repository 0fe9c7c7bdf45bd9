"""The catalogue of metrics: every series dltrain exports, once, with its labels and what it means.

    metrics = Metrics()                 # a prometheus_client registry of its own
    metrics.steps.inc()

All label combinations exist from the start at zero, otherwise `increase()` misses the first event.
"""

from __future__ import annotations

import os

# Before prometheus_client is imported: a `_created` series beside each counter is 38 % of the lines.
os.environ.setdefault("PROMETHEUS_DISABLE_CREATED_SERIES", "True")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from dltrain.observing.ledger import STATES

__all__ = ["CACHE_OUTCOMES", "REQUEST_OUTCOMES", "RESTART_REASONS", "RETRY_REASONS", "Metrics"]

RESTART_REASONS = ("exit", "signal", "exception", "agent", "hang")
PHASES = ("data_wait", "h2d", "forward", "backward", "optimizer", "other")
RETRY_REASONS = ("server", "timeout", "connection", "truncated", "expired")
REQUEST_OUTCOMES = ("ok", "refused", *RETRY_REASONS)
CACHE_OUTCOMES = ("hit", "miss", "damaged", "error")
_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """One run's metrics in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dltrain_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"dltrain_{name}", text, labels, registry=registry)

        # run: progress
        self.steps = counter("steps_total", "Optimizer steps committed, steps redone included")
        self.samples = counter("samples_total", "Rows trained on")
        self.step_seconds = Histogram(
            "dltrain_step_seconds", "Seconds of an optimizer step", buckets=_STEP_BUCKETS, registry=registry
        )
        self.last_step = gauge("last_step_timestamp_seconds", "When the last step was committed")
        self.time = counter("time_seconds_total", "Seconds of the run by what they were spent on", "state")
        # run: learning
        self.loss = gauge("loss", "Mean loss of the last global batch")
        self.grad_norm = gauge("grad_norm", "Global gradient norm before clipping")
        self.learning_rate = gauge("learning_rate", "Learning rate of the last step")
        self.eval = gauge("eval", "The task's metrics on the evaluation data", "metric")
        self.nonfinite = counter("nonfinite_steps_total", "Steps left out because loss or gradients were not finite")
        self.skipped = counter("skipped_steps_total", "Steps that did not change the weights, for any reason")
        # run: shape and health
        self.world_size = gauge("world_size", "Ranks training now")
        self.restarts = counter("restarts_total", "Attempts that were started again", "reason")
        self.snapshot_every = gauge("snapshot_every_steps", "Steps between snapshots in memory, 0 before the first")
        self.checkpoint_time = gauge("checkpoint_last_success_timestamp_seconds", "When the last one was committed")
        self.checkpoint_bytes = gauge("checkpoint_bytes", "Size of the last checkpoint")
        self.checkpoint_seconds = counter("checkpoint_seconds_total", "Seconds that saving held training up")
        self.checkpoint_failures = counter("checkpoint_failures_total", "Checkpoints that could not be written")
        self.info = gauge("run_info", "1; what the run is", "run", "version", "zero_stage", "precision")
        # data: summed over ranks
        requests = counter("s3_requests_total", "Requests to the storage of the data, by outcome", "op", "outcome")
        retries = counter("data_retries_total", "Requests made again, by why", "reason")
        cache = counter("data_cache_requests_total", "Units looked up in the node's cache, by outcome", "outcome")
        # what the readers count, by its name there
        self.data: dict[str, Counter] = {
            "bytes": counter("s3_read_bytes_total", "Bytes read from the storage of the data"),
            "seconds": counter("s3_read_seconds_total", "Seconds of the requests that read them, added up"),
            "hedges": counter("data_hedges_total", "Slow parts asked for a second time"),
            **{f"requests_{outcome}": requests.labels("get", outcome) for outcome in REQUEST_OUTCOMES},
            **{f"retries_{reason}": retries.labels(reason) for reason in RETRY_REASONS},
            **{f"cache_{outcome}": cache.labels(outcome) for outcome in CACHE_OUTCOMES},
        }
        # rank
        self.phase = counter("step_phase_seconds_total", "Seconds of steps by phase", "rank", "phase")
        self.rank_steps = counter("rank_steps_total", "Steps reported by the rank", "rank")
        self.queue = gauge("prefetch_queue_depth", "Steps prepared and waiting", "rank")
        for state in STATES:
            self.time.labels(state)
        for reason in RESTART_REASONS:
            self.restarts.labels(reason)

    def start_ranks(self, num_ranks: int) -> None:
        """Makes the series of each rank exist, and forgets those of ranks that are gone."""
        for rank in range(num_ranks):
            self.rank_steps.labels(str(rank))
            self.queue.labels(str(rank))
            for phase in PHASES:
                self.phase.labels(str(rank), phase)
        self.world_size.set(num_ranks)
