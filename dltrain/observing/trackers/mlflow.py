"""MLflow: a run under an experiment, of a tracking server or a database.

trackers: {mlflow: {uri: "http://mlflow:5000", experiment: digits}}

User, password and token come from MLflow's own environment variables (MLFLOW_TRACKING_USERNAME and the like).
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dltrain.artifact import Artifact
from dltrain.observing.trackers.base import TrackedRun, flat
from dltrain.spec import MlflowSpec

__all__ = ["Mlflow"]

# MLflow's limits of one request.
_MOST_METRICS, _MOST_PARAMETERS, _MOST_CHARACTERS = 1000, 100, 500
_LOCAL = "sqlite:///mlflow.db"
_TAG = "dltrain.id"
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Mlflow:
    """One run of MLflow for all starts of ours, found again by a tag; metrics go out in batches."""

    name = "MLflow"

    def __init__(self, spec: MlflowSpec) -> None:
        self._spec = spec
        self._waiting: list[Any] = []

    def start(self, run: TrackedRun) -> int:
        # What it says of its database is not the run's business.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # Nobody has agreed to it.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunStatus

        self._metric = Metric
        uri = self._spec.uri or os.environ.get("MLFLOW_TRACKING_URI") or _LOCAL
        self._client = client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(self._spec.experiment)
        experiment = found.experiment_id if found else client.create_experiment(self._spec.experiment)
        before = client.search_runs([experiment], f"tags.`{_TAG}` = '{run.id}'", max_results=1)
        if before:
            self._id = before[0].info.run_id
            client.update_run(self._id, status=RunStatus.to_string(RunStatus.RUNNING))
            return self._last_step(before[0])
        tags = {_TAG: run.id, "dltrain.dir": run.store.url}
        self._id = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        settings = [Param(name, value[:_MOST_CHARACTERS]) for name, value in flat(run.spec)]
        for i in range(0, len(settings), _MOST_PARAMETERS):
            client.log_batch(self._id, params=settings[i : i + _MOST_PARAMETERS])
        return -1

    def _last_step(self, run: Any) -> int:
        """The last step that it has of any metric."""
        names = list(run.data.metrics)
        histories = (self._client.get_metric_history(self._id, name) for name in names)
        return max((metric.step for history in histories for metric in history), default=-1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._waiting += [self._metric(name, value, now, step) for name, value in values.items()]
        if len(self._waiting) >= _MOST_METRICS:
            self.flush()

    def artifact(self, step: int, name: str, artifact: Artifact) -> None:
        with tempfile.TemporaryDirectory(prefix="dltrain-mlflow-") as directory:
            path = Path(directory, f"{name.replace('/', '-')}{artifact.suffix}")
            path.write_bytes(artifact.data)
            self._client.log_artifact(self._id, str(path), f"samples/step-{step:08d}")

    def flush(self) -> None:
        while self._waiting:
            self._client.log_batch(self._id, metrics=self._waiting[:_MOST_METRICS])
            del self._waiting[:_MOST_METRICS]

    def close(self, status: str) -> None:
        self._client.set_terminated(self._id, _STATUS.get(status, "FAILED"))
