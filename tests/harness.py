"""What the tests that start real runs share: data, specs, the command line, and the journals they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
DLTRAIN = str(Path(sys.executable).parent / "dltrain")
# Hang guards, not limits: machines are shared.
SECONDS = 300.0
WIDTH = 8


def make_table(rows: int, seed: int = 0) -> pa.Table:
    """x: (rows, 8) fp32, and y, a noisy function of it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, WIDTH)).astype(np.float32)
    y = np.sin(x.sum(1)) + 0.1 * rng.standard_normal(rows).astype(np.float32)
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), WIDTH), "y": pa.array(y)})


def write_data(directory: Path, rows: int = 200, files: int = 2, group: int = 16, seed: int = 0) -> Path:
    """Writes a small dataset of several files and row groups."""
    directory.mkdir(parents=True, exist_ok=True)
    table = make_table(rows, seed)
    size = -(-rows // files)
    for i in range(files):
        pq.write_table(table.slice(i * size, size), directory / f"part-{i}.parquet", row_group_size=group)
    return directory


def write_documents(directory: Path, documents: int = 60, files: int = 2, group: int = 9, seed: int = 0) -> int:
    """Token sequences of 0 to 40 tokens that count upwards mod 50, some of them missing; returns their tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lengths, firsts = rng.integers(0, 40, documents), rng.integers(0, 50, documents)
    rows = [((f + np.arange(n)) % 50).tolist() if n % 7 else None for n, f in zip(lengths, firsts, strict=True)]
    table = pa.table(
        {"tokens": pa.array(rows, pa.list_(pa.int32())), "lang": [("de", "fr")[i % 2] for i in range(documents)]}
    )
    size = -(-documents // files)
    for i in range(files):
        pq.write_table(table.slice(i * size, size), directory / f"part-{i}.parquet", row_group_size=group)
    return sum(len(row or []) for row in rows)


def make_spec(tmp: Path, **changes: Any) -> dict[str, Any]:
    """A spec for `tasks:Tiny` over data under `tmp`."""
    return {
        "name": "tiny",
        "task": "tasks:Tiny",
        "data": {"train": str(tmp / "train")},
        "batch": {"global": 16},
        "train": {"steps": 20},
        "optim": {"lr": 1e-2},
        "workers": 2,
        "checkpoint": {"every": 5},
        "metrics": {"port": 0},
        "runs": str(tmp / "runs"),
        **changes,
    }


def write_spec(tmp: Path, spec: dict[str, Any]) -> Path:
    path = tmp / "job.yaml"
    path.write_text(json.dumps(spec))
    return path


@dataclass
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        lines = self.out.strip().splitlines()
        assert len(lines) == 1, f"--json printed {len(lines)} lines:\n{self.out}\n{self.err}"
        value: dict[str, Any] = json.loads(lines[0])
        return value


def start(
    *arguments: str,
    env: dict[str, str] | None = None,
    popen: Callable[..., Any] = subprocess.Popen,
    cwd: Path = ROOT / "tests",
) -> subprocess.Popen[str]:
    """Starts `dltrain ...` from the tests' directory, where `tasks` is; `popen` may start it on another host."""
    process: subprocess.Popen[str] = popen(
        [DLTRAIN, *arguments],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process


def finish(process: subprocess.Popen[str]) -> Done:
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {SECONDS} s:\n{out}\n{err}") from None
    return Done(process.returncode, out, err)


def dltrain(*arguments: str, env: dict[str, str] | None = None) -> Done:
    """Runs `dltrain ...` to its end."""
    return finish(start(*arguments, env=env))


def steps(run: Path) -> dict[int, dict[str, Any]]:
    """steps.jsonl; of a step trained twice the last line counts."""
    lines = map(json.loads, (run / "steps.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines}


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def state(run: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads((run / "state.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    """Waits until `condition` gives something true, and returns it."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        if process is not None and process.poll() is not None:
            raise AssertionError(f"the run ended early: {process.communicate()}")
        time.sleep(0.05)
    raise AssertionError("waited too long")


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> dict[str, Any]:
    """Waits until state.json shows a step; returns the state."""
    found: dict[str, Any] = wait_for(
        lambda: state(run) if state(run).get("step", 0) >= step and state(run).get("workers") else None, process
    )
    return found


def alive(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]
