"""A TorchTrainer for tests: what it is to do comes on stdin as JSON, what it reported is printed so."""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train_loop_per_worker(config: dict[str, Any]) -> None:
    from pathlib import Path

    from ray import train

    from dltrain.integrations.train import run_in_train_fn

    done = run_in_train_fn(config["spec"], config["changes"], cwd=config["cwd"])
    rank = train.get_context().get_world_rank()
    Path(config["cwd"], f"done-{rank}.json").write_text(json.dumps(done))


def main() -> None:
    asked = json.load(sys.stdin)
    ray.init(address=asked["address"], logging_level="ERROR", runtime_env={"env_vars": asked["env"]})
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"spec": asked["spec"], "changes": asked.get("changes"), "cwd": asked["cwd"]},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=asked["workers"]),
        run_config=RunConfig(
            storage_path=asked["results"], failure_config=FailureConfig(max_failures=asked.get("max_failures", 0))
        ),
    )
    print("RESULT " + json.dumps(trainer.fit().metrics, default=str), flush=True)


if __name__ == "__main__":
    main()
