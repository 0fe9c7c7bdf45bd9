"""The peers of tests/bench/recovery.py: the same training by Ray Train with DeepSpeed, and a bare loop's checkpoints.

    python tests/bench/recovery_peer.py '{"address": "...", "workers": [2, 2], "directory": "...", ...}'

What its documentation shows for DeepSpeed: `train_func` with the engine in it, checkpoints by `save_checkpoint`
and `ray.train.report`, `FailureConfig(max_failures=-1)`. Every rank appends its steps to a file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]

# What a knowledgeable user would set to lose less time, found in the sources of Ray 2.60: how often the controller
# asks its workers (default 2 s), how long one may not answer (600 s), how long a dead group may take to say goodbye
# (30 s), and how soon Ray takes a silent node for dead.
TUNED_ENV = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "10",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
# Seconds after which a collective operation fails (default 1800; the rendezvous of a start has to fit in too), and
# between looks for more workers (60).
TUNED_COLLECTIVE_SECONDS = 30
TUNED_RESIZE_SECONDS = 5.0


def make_engine() -> Any:
    """The model under ZeRO-1."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from recovery_task import BATCH, build

    from dltrain.training import cpu_op

    cpu_op.load()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    model = build()
    micro = max(1, BATCH // dist.get_world_size())
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def train_step(engine: Any, step: int, pad_seconds: float) -> None:
    """One optimizer step; `step` counts from 1."""
    import torch.distributed as dist
    import torch.nn.functional as F
    from recovery_task import BATCH

    rank, micro = dist.get_rank(), engine.train_micro_batch_size_per_gpu()
    x, y = _data()
    at = ((step - 1) * BATCH + rank * micro) % (len(x) - micro)
    time.sleep(pad_seconds)
    engine.backward(F.cross_entropy(engine(x[at : at + micro]), y[at : at + micro]))
    engine.step()


_DATA: list[Any] = []


def _data() -> Any:
    import torch
    from recovery_task import make_arrays

    if not _DATA:
        _DATA.append([torch.from_numpy(a) for a in make_arrays()])
    return _DATA[0]


def train_func(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    import ray.train
    import torch.distributed as dist

    engine = make_engine()
    step = _load(engine)
    group = [time.time()]
    dist.broadcast_object_list(group)
    context = ray.train.get_context()
    node = ray.util.get_node_ip_address()
    with open(Path(config["directory"]) / f"rank-{context.get_world_rank()}.jsonl", "a", buffering=1) as out:
        while True:
            step += 1
            train_step(engine, step, config["pad_seconds"])
            line = {"step": step, "time": time.time(), "group": group[0], "pid": os.getpid(), "node": node}
            out.write(json.dumps({**line, "world_size": context.get_world_size()}) + "\n")
            if step % config["every"] == 0:
                _save(engine, step)


def _load(engine: Any) -> int:
    import ray.train
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    checkpoint = ray.train.get_checkpoint()
    if not checkpoint:
        return 0
    with checkpoint.as_directory() as directory:
        try:
            _, state = engine.load_checkpoint(directory)
        except ZeRORuntimeException:
            # Made by another number of workers: all that can be had are the weights.
            _, state = engine.load_checkpoint(directory, load_module_only=True)
    return int(state["step"])


def _save(engine: Any, step: int) -> None:
    import ray.train

    with tempfile.TemporaryDirectory() as directory:
        engine.save_checkpoint(directory, client_state={"step": step})
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def run_ray_train(config: dict[str, Any]) -> None:
    """The user's script, from `ray.init` to `fit`."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    paths = os.pathsep.join([str(HERE.parent), str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])
    ray.init(address=config["address"], log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    low, high = config["workers"]
    tuned: dict[str, Any] = {"elastic_resize_monitor_interval_s": TUNED_RESIZE_SECONDS} if config["tuned"] else {}
    timeout = {"timeout_s": TUNED_COLLECTIVE_SECONDS} if config["tuned"] else {}
    trainer = TorchTrainer(
        train_func,
        train_loop_config={key: config[key] for key in ("directory", "pad_seconds", "every")},
        torch_config=TorchConfig(backend="gloo", **timeout),
        scaling_config=ScalingConfig(num_workers=low if low == high else (low, high), **tuned),
        run_config=RunConfig(
            name="recovery",
            storage_path=f"{config['directory']}/storage",
            failure_config=FailureConfig(max_failures=-1),
        ),
    )
    trainer.fit()


# ---- checkpoints of a bare loop ----


def bare_rank(directory: str, saves: int) -> None:
    """One rank that saves every few steps; rank 0 prints the seconds of each save, the longest of the ranks."""
    import torch
    import torch.distributed as dist
    from recovery_task import CHECKPOINT_EVERY

    engine, seconds = make_engine(), []
    for step in range(1, saves * CHECKPOINT_EVERY + 1):
        train_step(engine, step, 0.0)
        if step % CHECKPOINT_EVERY == 0:
            begin = time.perf_counter()
            engine.save_checkpoint(directory, tag=f"step-{step}")
            longest = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            seconds.append(float(longest))
    if dist.get_rank() == 0:
        print(json.dumps(seconds), flush=True)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "--bare-rank":
        bare_rank(sys.argv[2], int(sys.argv[3]))
    # By its name, so that the workers import it instead of being sent what is in it.
    import recovery_peer

    recovery_peer.run_ray_train(json.loads(sys.argv[1]))
