"""The training that tests/bench/recovery.py has all of them do: one model, one dataset, one length of a step.

Used by dltrain as a task (`recovery_task.py:Recovery`) and by the peers as functions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Batch, Keys, Task

WIDTH, HIDDEN, CLASSES, BATCH, ROWS = 256, 1024, 10, 128, 8192
STEP_SECONDS = 0.020
CHECKPOINT_EVERY = 20
# Longer than any run here.
STEPS = 10**6


def build() -> nn.Module:
    """An MLP of 1.3 million parameters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, CLASSES)
    )


def make_arrays() -> tuple[np.ndarray, np.ndarray]:
    """x: (8192, 256) fp32, and a label of each."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((ROWS, WIDTH), np.float32), rng.integers(0, CLASSES, ROWS)


def write_data(directory: Path) -> None:
    """The arrays as Parquet."""
    x, y = make_arrays()
    vectors = pa.Array.from_buffers(pa.binary(WIDTH * 4), len(x), [None, pa.py_buffer(x)])
    directory.mkdir(parents=True)
    pq.write_table(pa.table({"x": vectors, "y": pa.array(y)}), directory / "part-0.parquet", row_group_size=512)


def measure_step() -> float:
    """Seconds of one rank's bare step on half of the batch, on one thread of this machine."""
    torch.set_num_threads(1)
    model, (x, y) = build(), make_arrays()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows, labels = torch.from_numpy(x[: BATCH // 2]), torch.from_numpy(y[: BATCH // 2])

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(rows), labels).backward()
        optimizer.step()

    seconds = [_timed(step) for _ in range(30)]
    return statistics.median(seconds[10:])


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class Recovery(Task):
    """Args: pad_seconds: slept in every step, so that it takes 20 ms on this machine."""

    columns = ("x", "y")

    def __init__(self, pad_seconds: float = 0.0) -> None:
        self.pad_seconds = pad_seconds

    def build(self) -> nn.Module:
        return build()

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        x, y = rows["x"], rows["y"].to_numpy()
        values = np.frombuffer(x.buffers()[1], np.float32).reshape(-1, WIDTH)[x.offset : x.offset + len(x)]
        return Batch(rows.num_rows, x=torch.from_numpy(values.copy()), y=torch.from_numpy(y.copy()))

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        time.sleep(self.pad_seconds)
        return F.cross_entropy(model(batch.x), batch.y)
