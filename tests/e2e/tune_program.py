"""A search with Ray Tune for tests: what it is to do comes on stdin as JSON, what became of its trials is printed so.

echo '{"address": "...", "spec": {...}, "grid": {"optim.lr": [0.1, 0.01]}}' | python tune_program.py
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from dltrain.integrations.tune import trainable


class Killer(tune.Callback):
    """Kills the process of a trial, once, after its first report."""

    def __init__(self) -> None:
        self.killed = 0

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if not self.killed:
            self.killed = result["pid"]
            os.kill(self.killed, signal.SIGKILL)


def main() -> None:
    asked = json.load(sys.stdin)
    ray.init(address=asked["address"], logging_level="ERROR", runtime_env={"env_vars": asked.get("env", {})})
    halving = None
    if "grace" in asked:
        halving = ASHAScheduler(time_attr="step", grace_period=asked["grace"], max_t=1000, reduction_factor=2)
    tuner = tune.Tuner(
        trainable(asked["spec"], metric="loss", cwd=asked["cwd"]),
        param_space={name: tune.grid_search(values) for name, values in asked["grid"].items()},
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", scheduler=halving, max_concurrent_trials=asked.get("at_once")
        ),
        run_config=tune.RunConfig(
            storage_path=asked["results"],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=asked.get("max_failures", 0)),
            callbacks=[Killer()] if asked.get("kill") else [],
        ),
    )
    found = tuner.fit()
    keys = ("loss", "mae", "step", "train_loss", "run", "status", "done", "training_iteration")
    lines = [
        {
            "config": r.config,
            "metrics": {key: (r.metrics or {}).get(key) for key in keys},
            "reports": 0 if r.metrics_dataframe is None else len(r.metrics_dataframe),
            "error": str(r.error or ""),
        }
        for r in found
    ]
    print("RESULT " + json.dumps(lines), flush=True)


if __name__ == "__main__":
    main()
