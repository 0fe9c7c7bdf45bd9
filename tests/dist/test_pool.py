"""Processes that make batches: the same results, errors with their traceback, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dltrain.data.batch import Batch, Keys
from dltrain.data.mixture import Mixture
from dltrain.data.order import Order
from dltrain.data.pool import CollatePool
from dltrain.data.stream import StepBatch, TrainStream
from dltrain.errors import BadRowsError, RunFailedError

ROWS = [50, 30, 20]
STARTS = np.concatenate([[0], np.cumsum(ROWS)])


def noisy(rows: pa.RecordBatch, keys: Keys, bad: int = -1) -> Batch:
    values = rows["id"].to_pylist()
    if bad in values:
        raise BadRowsError([values.index(bad)], "bad")
    noise = [keys.rng(row).random() for row in range(rows.num_rows)]
    return Batch(rows.num_rows, id=torch.tensor(values), noise=torch.tensor(noise), pid=os.getpid())


def make(bad: int = -1) -> Callable[[pa.RecordBatch, Keys], Batch]:
    return partial(noisy, bad=bad)


def raising(rows: pa.RecordBatch, keys: Keys) -> Batch:
    raise KeyError("label")


def dying(rows: pa.RecordBatch, keys: Keys) -> Batch:
    os._exit(3)


def make_raising() -> Any:
    return raising


def make_dying() -> Any:
    return dying


class Units:
    def start(self, unit: int, needed: float) -> None:
        pass

    def forget(self, unit: int) -> None:
        pass

    def read(self, unit: int) -> pa.Table:
        return pa.table({"id": np.arange(STARTS[unit], STARTS[unit + 1])})


def steps(collate: Any, parallel: int) -> Iterator[StepBatch]:
    source = TrainStream(
        Mixture([Order(ROWS, 2, 1, 0)], [1]),
        [Units()],
        collate,
        position=0,
        end=200,
        global_batch=16,
        rank=0,
        num_ranks=1,
        micro_batch=5,
        replace=True,
        parallel=parallel,
    )
    try:
        yield from source
    finally:
        source.close()


def flat(found: Iterator[StepBatch]) -> list[Any]:
    return [
        (s.position, [(m.count, m.id.tolist(), m.noise.tolist()) for m in s.micros], s.replaced, s.sums) for s in found
    ]


@pytest.mark.parametrize("size", [1, 3])
def test_the_same_batches_for_any_number_of_processes(size: int) -> None:
    expected = flat(steps(make(bad=7), 0))
    pool = CollatePool(partial(make, bad=7), size)
    try:
        assert flat(steps(pool, size)) == expected
    finally:
        pool.close()


def test_what_collate_raises_keeps_its_traceback() -> None:
    pool = CollatePool(make_raising, 1)
    try:
        with pytest.raises(KeyError, match="label") as caught:
            list(steps(pool, 1))
        assert "in raising" in "".join(caught.value.__notes__)
    finally:
        pool.close()


def test_a_process_that_dies_ends_the_wait_with_a_reason() -> None:
    pool = CollatePool(make_dying, 1)
    try:
        with pytest.raises(RunFailedError, match=r"exit status 3.*collate_workers"):
            list(steps(pool, 1))
    finally:
        pool.close()


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys\n"
        "from dltrain.data.pool import CollatePool\n"
        "pool = CollatePool(print, 2)\n"
        "print(*[p._process.pid for p in pool._processes], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join(sys.path)
    out = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    pids = [int(pid) for pid in out.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "left behind"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
