"""dltrain in a train function of Ray Train: python train_digits.py"""

import os

from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from dltrain.integrations.train import run_in_train_fn


def train_loop_per_worker(config):
    # Whatever of your own is to happen on each worker, before and after.
    run_in_train_fn("digits.yaml", {"optim.lr": config["lr"]}, cwd=config["cwd"])


if __name__ == "__main__":
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"lr": 1e-2, "cwd": os.getcwd()},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
    )
    print(f"accuracy {trainer.fit().metrics['accuracy']:.4f}")
