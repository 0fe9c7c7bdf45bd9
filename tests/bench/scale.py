"""Planning at scale: 10^10 rows in 100,000 row groups, what a worker's slice costs, and a plan for 10,000 ranks.

    python tests/bench/scale.py [--units 100000] [--files 100000] [--json] [--out tests/bench/results/scale.json]

Each part runs in a process of its own, which measures its memory by the pages it came to hold. Planning begins with
the row groups as they are after the footers were read, and ends with a plan that went through bytes and back, as it
does between the driver and a rank, and the first step's rows.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]

from machine import versions  # noqa: E402

from dltrain.data.catalog import Catalog  # noqa: E402
from dltrain.data.files import DataFile  # noqa: E402
from dltrain.data.identity import BatchSum, hash_ids, running_sums  # noqa: E402
from dltrain.data.order import lane_times, read_amplification  # noqa: E402
from dltrain.data.plan import Plan, make_plan  # noqa: E402

ROWS = 10**10
# Ranks, and rows of a global batch: from a node to more than there are lanes.
SLICES = [(8, 4096), (64, 4096), (1000, 8192), (10_000, 20_000)]
STEP_SECONDS = 0.020


def make_catalog(num_units: int, num_files: int) -> Catalog:
    """Row groups of uneven size in files with the names that writers give them."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(ROWS - 1, num_units - 1, replace=False)) + 1
    rows = np.diff(np.concatenate([[0], cuts, [ROWS]]))
    units = np.arange(num_units)
    columns = {"file": units * num_files // num_units, "row_group": units % -(-num_units // num_files)}
    files = (
        DataFile(f"bucket/data/date=2024-01-{i % 28 + 1:02d}/part-{i:06d}-{i:032x}.parquet", 10**8 + i, f"{i:032x}")
        for i in range(num_files)
    )
    schema = pa.schema([("tokens", pa.list_(pa.int32())), ("id", pa.int64())])
    table = pa.table({**columns, "rows": rows, "bytes": rows * 64})
    return Catalog("s3://bucket/data", tuple(files), schema, table)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    value = call()
    return time.perf_counter() - begin, value


# ---- the parts ----


def planning(num_units: int, num_files: int) -> dict[str, Any]:
    """Seconds and memory of making a plan, storing it, and beginning to use it."""
    catalog = make_catalog(num_units, num_files)
    before, cpu = resident_mb(), time.process_time()
    seconds: dict[str, float] = {}
    seconds["make"], plan = timed(lambda: make_plan({"train": (catalog, 1)}, None, 4096, seed=1))
    seconds["id"], plan_id = timed(lambda: plan.plan_id)
    seconds["to_bytes"], raw = timed(plan.to_bytes)
    seconds["from_bytes"], again = timed(lambda: Plan.from_bytes(raw))
    seconds["order"], mixture = timed(lambda: again.mixture)
    seconds["first_step"], parts = timed(lambda: mixture.segments(0, 4096, 3, 64))
    assert again.plan_id == plan_id
    assert sum(p.segment.hi - p.segment.lo for p in parts) == 64
    return {
        "rows": plan.num_rows,
        "row_groups": plan.num_units,
        "files": num_files,
        "lanes": plan.num_lanes,
        "seconds": round(sum(seconds.values()), 4),
        "cpu_seconds": round(time.process_time() - cpu, 4),
        "seconds_by_part": {name: round(value, 4) for name, value in seconds.items()},
        "stored_mb": round(len(raw) / 1e6, 2),
        "memory_mb": round(resident_mb() - before, 1),
    }


def slice_ms(plan: Plan, size: int, num_ranks: int) -> list[float]:
    """Of each of the first thousand steps."""
    segments, rank = plan.mixture.segments, num_ranks // 3
    return [1e3 * timed(lambda at=at: segments(at * size, size, rank, num_ranks))[0] for at in range(1000)]


def slices(num_units: int, num_files: int) -> dict[str, Any]:
    """Milliseconds of what a rank works out for each step: which rows are its."""
    catalog = make_catalog(num_units, num_files)
    found = []
    for num_ranks, size in SLICES:
        plan = make_plan({"train": (catalog, 1)}, None, size, seed=1)
        milliseconds = slice_ms(plan, size, num_ranks)
        ordered = sorted(milliseconds[1:])
        found.append(
            {
                "ranks": num_ranks,
                "batch": size,
                "lanes": plan.num_lanes,
                "first_ms": round(milliseconds[0], 3),
                "median_ms": round(statistics.median(ordered), 4),
                "p99_ms": round(ordered[int(0.99 * len(ordered))], 4),
            }
        )
    return {"slices": found}


def ranks(num_units: int, num_files: int) -> dict[str, Any]:
    """Balance and read amplification of plans for many ranks."""
    catalog = make_catalog(num_units, num_files)
    found = []
    for num_ranks, size in [*SLICES, (500, 8192), (700, 8192)]:
        plan = make_plan({"train": (catalog, 1)}, None, size, seed=1)
        order = plan.mixture.orders[0]
        shares = np.zeros((2, num_ranks), np.int64)
        lanes: list[list[int]] = []
        for rank in range(num_ranks):
            for step in (0, 12345):
                times = list(lane_times(plan.num_lanes, step * size, size, rank, num_ranks))
                shares[int(step > 0), rank] = sum(stop - start for _, start, stop in times)
            lanes.append([lane for lane, _, _ in times])
        units = [order.lane(0, lane).spans[:, 0] for lane in range(plan.num_lanes)]
        reads = sum(len(np.unique(np.concatenate([units[lane] for lane in mine]))) for mine in lanes if mine)
        formula = read_amplification(num_units, plan.num_lanes, num_ranks)
        assert (shares.sum(1) == size).all()
        found.append(
            {
                "ranks": num_ranks,
                "batch": size,
                "lanes": plan.num_lanes,
                "largest_less_smallest_slice": int((shares.max(1) - shares.min(1)).max()),
                "read_amplification": round(reads / num_units, 4),
                "formula": round(formula, 4),
                "within_formula": reads / num_units <= formula + 1e-9,
            }
        )
    return {"ranks": found}


def audit(num_units: int, num_files: int) -> dict[str, Any]:
    """What it costs a rank to account for its rows: sums of a window when it is loaded, a difference in each step."""
    plan = make_plan({"train": (make_catalog(num_units, num_files), 1)}, None, 4096, seed=1)
    ids = np.arange(10**6, dtype=np.int64)
    window_seconds = min(timed(lambda: running_sums(hash_ids(1, 0, ids)))[0] for _ in range(5))
    running = running_sums(hash_ids(1, 0, ids))
    parts = plan.mixture.segments(0, 4096, 3, 8)
    step_seconds = []
    for _ in range(1000):
        begin = time.perf_counter()
        total = BatchSum.between((running, part.segment.lo, part.segment.hi) for part in parts)
        step_seconds.append(time.perf_counter() - begin)
    assert total.count == 512
    of_step = statistics.median(step_seconds) + 512 * window_seconds / len(ids)
    return {
        "audit": {
            "rows_of_rank": 512,
            "pieces": len(parts),
            "hashed_rows_per_second": round(len(ids) / window_seconds),
            "step_microseconds": round(1e6 * of_step, 1),
            "of_a_20_ms_step": round(of_step / STEP_SECONDS, 5),
        }
    }


PARTS = {"planning": planning, "slices": slices, "ranks": ranks, "audit": audit}


# ---- all of them ----


def run_part(name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, str(HERE), "--part", name, "--units", str(options.units), "--files", str(options.files)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(title: str, rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    shown = Table(*(name.replace("_", " ") for name in rows[0]), title=title, title_justify="left")
    for row in rows:
        shown.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    return shown


def show(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=120)
    console.print(", ".join(f"{name} {value}" for name, value in found["machine"].items()), highlight=False)
    plan = dict(found["planning"])
    by_part = plan.pop("seconds_by_part")
    console.print(table("planning", [plan]))
    console.print("  ".join(f"{name} {value}" for name, value in by_part.items()), highlight=False)
    console.print(table("a worker's slice", found["slices"]))
    console.print(table("balance and reads", found["ranks"]))
    console.print(table("the audit", [found["audit"]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100_000, help="row groups")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--out", help="file that gets the JSON")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.units, options.files)))
        return
    planned = {"planning": run_part("planning", options)}
    found = {"machine": versions("dltrain", "numpy", "pyarrow"), **planned, **run_part("slices", options)}
    found |= {**run_part("ranks", options), **run_part("audit", options)}
    show(found)
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
