"""The catalogue of metrics: every series that dltrain exports, once, with its labels and what it means.

    metrics = Metrics("image-cnn")          # a prometheus_client registry of its own
    metrics["steps_total"].inc()
    metrics["restarts_total"].labels("hang").inc()

    python -m dltrain.observing.catalogue > docs/metrics.md

What is not in TABLE can't be exported. All label combinations exist from the start at zero, otherwise `increase()`
misses the first event.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

# Before prometheus_client is imported: a `_created` series beside each counter is 38 % of the lines.
os.environ.setdefault("PROMETHEUS_DISABLE_CREATED_SERIES", "True")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import Metric as Family

from dltrain.observing.ledger import STATES
from dltrain.observing.reports import PHASES

__all__ = [
    "CACHE_OUTCOMES",
    "PREFIX",
    "REQUEST_OUTCOMES",
    "RESTART_REASONS",
    "RETRY_REASONS",
    "TABLE",
    "Metric",
    "Metrics",
    "page",
]

PREFIX = "dltrain_"
RESTART_REASONS = ("exit", "signal", "exception", "agent", "hang")
RETRY_REASONS = ("server", "timeout", "connection", "truncated", "expired")
REQUEST_OUTCOMES = ("ok", "refused", *RETRY_REASONS)
CACHE_OUTCOMES = ("hit", "miss", "damaged", "error")
_STEP_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

Kind = Literal["counter", "gauge", "histogram"]
Labels = Mapping[str, tuple[str, ...] | None]


@dataclass(frozen=True)
class Metric:
    """One line of the catalogue.

    Attributes:
        name: without the prefix; counters end in _total.
        unit: of its value; empty for pure numbers.
        labels: label -> all its values; None where they are known when the run is (ranks, the task's own metrics).
        group: run, rank or data.
    """

    name: str
    kind: Kind
    unit: str
    text: str
    labels: Labels = field(default_factory=lambda: MappingProxyType({}))
    group: Literal["run", "rank", "data"] = "run"

    @property
    def full_name(self) -> str:
        """As Prometheus knows it."""
        return PREFIX + self.name


_RANK: Labels = {"rank": None}

TABLE = (
    # progress
    Metric("steps_total", "counter", "steps", "Optimizer steps made, steps redone included"),
    Metric("samples_total", "counter", "rows", "Rows trained on"),
    Metric("tokens_total", "counter", "units", "Units that losses are means over: tokens where a task counts them"),
    Metric("step_seconds", "histogram", "seconds", "Time of an optimizer step"),
    Metric("last_step_timestamp_seconds", "gauge", "seconds", "When the last step was made, as Unix time"),
    Metric(
        "time_seconds_total", "counter", "seconds", "Time of the run by what it was spent on", {"state": tuple(STATES)}
    ),
    # learning
    Metric("loss", "gauge", "", "Mean loss of the last global batch"),
    Metric("network_loss", "gauge", "", "The same of each network, where a task has several", {"network": None}),
    Metric("grad_norm", "gauge", "", "Global norm of the gradient, before clipping"),
    Metric("learning_rate", "gauge", "", "Learning rate of the last step"),
    Metric("eval", "gauge", "", "The task's metrics on the evaluation data", {"metric": None}),
    Metric("logged", "gauge", "", "What the task's callbacks logged last, the first 32 names", {"name": None}),
    Metric("nonfinite_steps_total", "counter", "steps", "Steps left out: loss or gradients were not finite"),
    Metric("skipped_steps_total", "counter", "steps", "Steps that did not change the weights, for any reason"),
    # speed
    Metric("model_flops_total", "counter", "FLOPs", "Work of the model, forward and backward, recomputation left out"),
    Metric("device_peak_flops", "gauge", "FLOPs/s", "Peak of one rank's device", {"device": None}),
    Metric("gradient_bytes_total", "counter", "bytes", "Bytes of gradients that each rank hands over to be aggregated"),
    # health
    Metric("world_size", "gauge", "ranks", "Ranks training now"),
    Metric("restarts_total", "counter", "", "Attempts that had to be started again", {"reason": RESTART_REASONS}),
    Metric("snapshot_every_steps", "gauge", "steps", "Steps between snapshots in memory, 0 before the first"),
    Metric("checkpoint_last_success_timestamp_seconds", "gauge", "seconds", "When the last one was made, as Unix time"),
    Metric("checkpoint_interval_seconds", "gauge", "seconds", "Time between the last two, 0 before the second"),
    Metric("checkpoint_bytes", "gauge", "bytes", "Size of the last checkpoint"),
    Metric(
        "checkpoint_seconds_total",
        "counter",
        "seconds",
        "Time that saving took: training stood still (yes), or went on meanwhile (no)",
        {"blocking": ("yes", "no")},
    ),
    Metric("checkpoint_failures_total", "counter", "", "Checkpoints that could not be written"),
    Metric(
        "run_info",
        "gauge",
        "",
        "1; what the run is",
        {"version": None, "zero_stage": None, "precision": None},
    ),
    # ranks
    Metric(
        "step_phase_seconds_total",
        "counter",
        "seconds",
        "Time of steps by phase; backward includes the aggregation of gradients that overlaps with it",
        {"rank": None, "phase": tuple(PHASES)},
        "rank",
    ),
    Metric("rank_steps_total", "counter", "steps", "Steps that the rank has reported", _RANK, "rank"),
    Metric("prefetch_queue_depth", "gauge", "steps", "Steps whose batches are there and wait", _RANK, "rank"),
    Metric("device_memory_peak_bytes", "gauge", "bytes", "Most memory so far: GPU's, or the process's", _RANK, "rank"),
    # data, summed over ranks
    Metric("s3_read_bytes_total", "counter", "bytes", "Bytes read from the data's storage", group="data"),
    Metric("s3_read_seconds_total", "counter", "seconds", "Time of the requests for them, added up", group="data"),
    Metric(
        "s3_requests_total",
        "counter",
        "",
        "Requests to the data's storage, by outcome",
        {"op": ("get",), "outcome": REQUEST_OUTCOMES},
        "data",
    ),
    Metric("data_retries_total", "counter", "", "Requests made again, by why", {"reason": RETRY_REASONS}, "data"),
    Metric("data_hedges_total", "counter", "", "Slow parts asked for a second time", group="data"),
    Metric(
        "data_cache_requests_total",
        "counter",
        "",
        "Row groups looked up in the node's cache",
        {"outcome": CACHE_OUTCOMES},
        "data",
    ),
    Metric("alloc_retries_total", "counter", "", "GPU memory that had to be freed first, over all ranks", group="data"),
)


class _RunRegistry(CollectorRegistry):
    """Every sample says of which run it is: several runs are watched side by side."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = {"run": run}

    def collect(self) -> Iterator[Family]:
        for family in super().collect():
            family.samples = [sample._replace(labels={**self._run, **sample.labels}) for sample in family.samples]
            yield family


class Metrics:
    """One run's metrics in a registry of their own; `metrics[name]` is one of prometheus_client's, by name of TABLE.

    Args:
        run: its name, a label of every series.
    """

    def __init__(self, run: str) -> None:
        self.registry = _RunRegistry(run)
        self._made = {metric.name: _make(metric, self.registry) for metric in TABLE}
        self._ranks = 0
        for metric in TABLE:
            values = list(metric.labels.values())
            if metric.labels and None not in values:
                for combination in itertools.product(*(v for v in values if v is not None)):
                    self[metric.name].labels(*combination)

    def __getitem__(self, name: str) -> Any:
        """Raises KeyError for what is not in the catalogue."""
        return self._made[name]

    def start_ranks(self, num_ranks: int) -> None:
        """Makes the series of each rank exist, and forgets what ranks that are gone measured last."""
        for metric in (m for m in TABLE if m.group == "rank"):
            others = [v for name, v in metric.labels.items() if name != "rank" and v is not None]
            for rank in range(num_ranks):
                for combination in itertools.product(*others):
                    self[metric.name].labels(str(rank), *combination)
            if metric.kind == "gauge":
                # Counters stay: what a rank has done does not become undone.
                for rank in range(num_ranks, self._ranks):
                    self[metric.name].remove(str(rank))
        self._ranks = num_ranks
        self["world_size"].set(num_ranks)


def _make(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    labels = tuple(metric.labels)
    if metric.kind == "counter":
        return Counter(metric.full_name, metric.text, labels, registry=registry)
    if metric.kind == "gauge":
        return Gauge(metric.full_name, metric.text, labels, registry=registry)
    return Histogram(metric.full_name, metric.text, labels, registry=registry, buckets=_STEP_BUCKETS)


def page() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Every series that a run exports, at `metrics.port` of its driver. This page is made from",
        "`dltrain/observing/catalogue.py` by `python -m dltrain.observing.catalogue > docs/metrics.md`. Beside the",
        "labels that are listed every series has `run`, the run's name.",
        "",
        "| name | type | unit | labels | meaning |",
        "|---|---|---|---|---|",
    ]
    for m in TABLE:
        labels = ", ".join(f"`{n}`" + (f" ({' '.join(v)})" if v else "") for n, v in m.labels.items())
        lines.append(f"| `{m.full_name}` | {m.kind} | {m.unit} | {labels} | {m.text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
