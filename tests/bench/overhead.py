"""What dltrain costs: the same model on the same data, by a bare DeepSpeed loop and by dltrain, in one run.

    python tests/bench/overhead.py [--steps 300] [--rounds 5] [--json] [--out FILE]

Prints hardware and versions, steps per second of both, their ratio, and the seconds from launching
`dltrain run` to its first optimizer step with Ray already up. The two take turns, and the ratio is the median of
those of the rounds: the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

WIDTH, HIDDEN, CLASSES, RANKS, BATCH = 256, 640, 10, 2, 128
# The first steps make the optimizer's state and fill caches.
WARMUP = 20
HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from machine import versions  # noqa: E402
from torch import nn  # noqa: E402

from dltrain import Batch, Keys, Task  # noqa: E402
from dltrain.running.nursery import MEMORY  # noqa: E402
from dltrain.training import cpu_op  # noqa: E402


def build() -> nn.Module:
    """An MLP whose step takes about 20 ms on one core."""
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, CLASSES)
    )


def make_arrays(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, WIDTH), np.float32), rng.integers(0, CLASSES, rows)


class Overhead(Task):
    """The same model and loss as the bare loop's."""

    columns = ("x", "y")

    def build(self) -> nn.Module:
        return build()

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        x, y = rows["x"], rows["y"].to_numpy()
        values = np.frombuffer(x.buffers()[1], np.float32).reshape(-1, WIDTH)[x.offset : x.offset + len(x)]
        return Batch(rows.num_rows, x=torch.from_numpy(values.copy()), y=torch.from_numpy(y.copy()))

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch.x), batch.y)


# ---- bare ----


def bare_rank(steps: int) -> None:
    """One rank of the bare loop; rank 0 prints its steps per second."""
    import deepspeed

    cpu_op.load()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    model = build()
    config = {
        "train_micro_batch_size_per_gpu": BATCH // RANKS,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    x, y = (torch.from_numpy(a) for a in make_arrays(8192))
    order = torch.randperm(len(x))
    per_rank = BATCH // RANKS
    begin = 0.0
    for step in range(steps):
        if step == WARMUP:
            begin = time.perf_counter()
        at = (step * BATCH + rank * per_rank) % (len(x) - per_rank)
        index = order[at : at + per_rank]
        loss = F.cross_entropy(engine(x[index]), y[index])
        engine.backward(loss)
        engine.step()
    if rank == 0:
        print(f"rate {(steps - WARMUP) / (time.perf_counter() - begin)}", flush=True)
    os._exit(0)


def run_bare(steps: int, settings: Mapping[str, str] | None = None) -> float:
    """Steps per second of the bare loop; `settings` are added to its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ,
        **(settings or {}),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE), "--bare-rank", "--steps", str(steps)],
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for r in range(RANKS)
    ]
    out = [r.communicate(timeout=600)[0] for r in ranks]
    return float(next(line.split()[1] for line in out[0].splitlines() if line.startswith("rate")))


# ---- dltrain ----


def run_dltrain(steps: int, directory: Path, address: str) -> tuple[float, float]:
    """Steps per second after the warm-up, and seconds from launch to the first step."""
    runs = tempfile.mkdtemp(dir=directory)
    spec = directory / "overhead.yaml"
    spec.write_text(
        json.dumps(
            {
                "name": "overhead",
                "task": f"{HERE}:Overhead",
                "data": {"train": str(directory / "data")},
                "batch": {"global": BATCH},
                "train": {"steps": steps},
                "optim": {"lr": 1e-3, "clip": 1.0},
                "engine": {"zero": 1},
                "workers": RANKS,
                "checkpoint": {"every": 10**6},
                "metrics": {"port": 0},
                "runs": runs,
            }
        )
    )
    launched = time.time()
    command = [str(Path(sys.executable).parent / "dltrain"), "run", str(spec), "--json", "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"dltrain failed:\n{done.stdout}{done.stderr}")
    lines = [json.loads(line) for line in Path(runs, "overhead", "steps.jsonl").read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines[WARMUP:])
    return (steps - WARMUP) / seconds, lines[0]["time"] - launched


def write_data(directory: Path) -> None:
    x, y = make_arrays(8192)
    vectors = pa.Array.from_buffers(pa.binary(WIDTH * 4), len(x), [None, pa.py_buffer(x)])
    table = pa.table({"x": vectors, "y": pa.array(y)})
    (directory / "data").mkdir()
    pq.write_table(table, directory / "data" / "part-0.parquet", row_group_size=512)


def measure(steps: int, rounds: int) -> dict[str, Any]:
    import ray

    context = ray.init(address="local", include_dashboard=False, log_to_driver=False, num_cpus=RANKS)
    bare, same, ours, first = [], [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_data(directory)
        for _ in range(rounds):
            bare.append(run_bare(steps))
            same.append(run_bare(steps, MEMORY))
            rate, seconds = run_dltrain(steps, directory, context.address_info["gcs_address"])
            ours.append(rate)
            first.append(seconds)
    ray.shutdown()
    return {
        "ratio": round(statistics.median(o / b for o, b in zip(ours, bare, strict=True)), 4),
        "ratio_with_our_malloc_settings": round(statistics.median(o / b for o, b in zip(ours, same, strict=True)), 4),
        "first_step_seconds": round(statistics.median(first), 2),
        "bare_steps_per_second": [round(v, 2) for v in bare],
        "bare_with_our_malloc_settings": [round(v, 2) for v in same],
        "dltrain_steps_per_second": [round(v, 2) for v in ours],
        "first_step_seconds_each": [round(v, 2) for v in first],
        "step_milliseconds": round(1000 / statistics.median(bare), 1),
        "steps": steps,
        **versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    parser.add_argument("--bare-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare_rank:
        bare_rank(options.steps)
    found = measure(options.steps, options.rounds)
    print(f"{found['cpu']}, {found['cores']} cores; torch {found['torch']}, deepspeed {found['deepspeed']}")
    print(f"bare DeepSpeed: {found['bare_steps_per_second']} steps/s ({found['step_milliseconds']} ms a step)")
    print(
        f"  the same, with the malloc settings of dltrain's workers: {found['bare_with_our_malloc_settings']} steps/s"
    )
    print(f"dltrain:        {found['dltrain_steps_per_second']} steps/s, ratio {found['ratio']}, ", end="")
    print(f"{found['ratio_with_our_malloc_settings']} to the loop with the same malloc settings")
    print(f"launch to first step, Ray up: {found['first_step_seconds_each']} s")
    if options.out:
        options.out.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), **found}, indent=2) + "\n")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
