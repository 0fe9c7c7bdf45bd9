"""How fast batches arrive: dltrain, Ray Data and a torch DataLoader over the same Parquet, against the store's limit.

    python tests/bench/data.py [--rounds 3] [--megabytes 806] [--where local,s3] [--kinds images,tokens]
                               [--json] [--results tests/bench/results]

Readers. Each runs in a process of its own, turn and turn about, with the malloc settings of dltrain's workers, and
yields shuffled batches of 256 rows as torch tensors; the limit reads row groups in order with pyarrow and makes no
batches. Each goes through the data five times. "First pass" is the first one, from opening the dataset: with it come
connections, a shuffle's pool and fresh memory. MB/s is of the four after it, of decoded bytes; CPU is of the reader's
processes over all five. Ratios are taken within rounds, and their median is shown.

Pace. A step of 50 ms takes each batch. Stall: the store gives 1.2 times what that needs; the share of time that was
spent waiting, once the shuffle's pool is full (at 1.2 times that takes epochs). Boundary: the slowest hundredth of the
steps around the ends of epochs, and of the others.

S3 is Ceph's gateway on loopback, all in memory, on the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1]), str(HERE.parents[1] / "e2e"), str(HERE.parent)]

from data_readers import BATCH, FILL_EPOCHS, GROUPS, PACE_EPOCHS, ROW_BYTES, STEP_SECONDS  # noqa: E402
from machine import versions  # noqa: E402

from dltrain.running.nursery import MEMORY  # noqa: E402

FILES = 16
READERS = ("limit", "dltrain", "ray", "dataloader")
# The pace test's store, against what its steps need; its data; steps that count as near an epoch's end.
BANDWIDTH, PACE_MEGABYTES, NEAR = 1.2, 202, 4


# ---- the data ----


def write_data(root: str, fs: Any, kind: str, megabytes: int) -> int:
    """Writes the dataset; returns its decoded bytes."""
    rows = megabytes * 10**6 // ROW_BYTES[kind] // (FILES * GROUPS) * (FILES * GROUPS)
    rng = np.random.default_rng(0)
    for part in range(FILES):
        table = _table(kind, rows // FILES, rng)
        with fs.open(f"{root}/part-{part:03d}.parquet", "wb") as out:
            pq.write_table(table, out, row_group_size=len(table) // GROUPS, compression="none", use_dictionary=False)
    return rows * ROW_BYTES[kind]


def _table(kind: str, rows: int, rng: np.random.Generator) -> pa.Table:
    if kind == "tokens":
        tokens = rng.integers(0, 50_000, rows * 2048, dtype=np.int32)
        raw = pa.Array.from_buffers(pa.binary(8192), rows, [None, pa.py_buffer(tokens)])
        return pa.table({"tokens": raw})
    pixels = rng.integers(0, 256, rows * 12288, dtype=np.uint8)
    image = pa.Array.from_buffers(pa.binary(12288), rows, [None, pa.py_buffer(pixels)])
    return pa.table({"image": image, "label": rng.integers(0, 10, rows)})


# ---- the comparison ----


@contextlib.contextmanager
def _stores(where: list[str]) -> Iterator[dict[str, tuple[str, Any, dict[str, str]]]]:
    """Of each place: root, filesystem, environment."""
    import fsspec

    with contextlib.ExitStack() as stack:
        stores = {}
        if "local" in where:
            stores["local"] = (stack.enter_context(tempfile.TemporaryDirectory()), fsspec.filesystem("file"), {})
        if "s3" in where:
            from rgw import running_gateway

            gateway = stack.enter_context(running_gateway())
            root = gateway.make_bucket("bench")
            os.environ.update(gateway.env)
            from dltrain.store import filesystem

            stores["s3"] = (root, filesystem(root)[0], gateway.env)
        yield stores


def compare(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What is measured of the readers, and of the pace."""
    lines, paces = [], []
    with _stores(options.where.split(",")) as stores:
        for where, (root, fs, env) in stores.items():
            for kind in filter(None, options.kinds.split(",")):
                url, num_bytes = _written(root, fs, kind, options.megabytes, kind)
                lines += _rounds(where, kind, url, num_bytes, env, options)
            if options.pace:
                paces.append(_paced(where, _written(root, fs, "images", PACE_MEGABYTES, "pace")[0], env))
    return lines, paces


def _written(root: str, fs: Any, kind: str, megabytes: int, name: str) -> tuple[str, int]:
    url = f"{root}/{name}"
    if not url.startswith("s3://"):
        fs.makedirs(url, exist_ok=True)
    return url, write_data(url.removeprefix("s3://"), fs, kind, megabytes)


def _child(*arguments: str, env: dict[str, str]) -> Any:
    """What a reader says, in a process of its own."""
    command = [sys.executable, str(HERE.with_name("data_readers.py")), *arguments]
    done = subprocess.run(command, env={**MEMORY, **os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _rounds(
    where: str, kind: str, url: str, num_bytes: int, env: dict[str, str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for reader in options.readers.split(","):
            print(f"  {where} {kind}, round {number + 1}/{options.rounds}: {reader}", file=sys.stderr, flush=True)
            found.setdefault(reader, []).append(_child(reader, url, str(num_bytes), env=env))
    return [
        {
            "where": where,
            "data": kind,
            "reader": reader,
            **{name: round(statistics.median(r[name] for r in rounds), 3) for name in rounds[0]},
            "of_limit": _ratio(rounds, found.get("limit")),
            "of_limit_first_pass": _ratio(rounds, found.get("limit"), "first_pass_mb_per_second"),
            "of_ray": _ratio(rounds, found.get("ray")),
        }
        for reader, rounds in found.items()
    ]


def _ratio(
    rounds: list[dict[str, float]], others: list[dict[str, float]] | None, name: str = "mb_per_second"
) -> float | None:
    pairs = zip(rounds, others or [], strict=False)
    ratios = [a[name] / b[name] for a, b in pairs]
    return round(statistics.median(ratios), 3) if ratios else None


def _paced(where: str, url: str, env: dict[str, str]) -> dict[str, Any]:
    """The stall and boundary tests of a place; only S3 is slowed."""
    from throttle import throttled

    print(f"  {where}: steps of {STEP_SECONDS * 1e3:.0f} ms", file=sys.stderr, flush=True)
    needed = BATCH * ROW_BYTES["images"] / STEP_SECONDS
    with contextlib.ExitStack() as stack:
        if env:
            endpoint = stack.enter_context(throttled(env["AWS_ENDPOINT_URL_S3"], BANDWIDTH * needed))
            env = {**env, "AWS_ENDPOINT_URL_S3": endpoint}
        waits = np.array(_child("pace", url, "0", env=env))
    epoch = len(waits) // (FILL_EPOCHS + PACE_EPOCHS)
    steady = waits[FILL_EPOCHS * epoch :]
    # distance: (steps,), to the nearest end of an epoch
    distance = np.arange(len(steady)) % epoch
    near = np.minimum(distance, epoch - distance) < NEAR
    step = steady + STEP_SECONDS
    return {
        "where": where,
        "bandwidth_of_needed": BANDWIDTH if env else None,
        "wait_share": round(float(steady.sum() / step.sum()), 4),
        "wait_share_filling": round(float(waits[1 : FILL_EPOCHS * epoch].mean() / STEP_SECONDS), 4),
        "p99_ms_boundary": round(float(np.quantile(step[near], 0.99)) * 1e3, 1),
        "p99_ms_steady": round(float(np.quantile(step[~near], 0.99)) * 1e3, 1),
    }


def show(lines: list[dict[str, Any]], paces: list[dict[str, Any]], hardware: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    console.print(", ".join(f"{name} {value}" for name, value in hardware.items()), highlight=False)
    heads = {
        "MB/s": ("mb_per_second", ",.0f"),
        "of limit": ("of_limit", ".2f"),
        "of Ray": ("of_ray", ".2f"),
        "first pass MB/s": ("first_pass_mb_per_second", ",.0f"),
        "of limit's": ("of_limit_first_pass", ".2f"),
        "first batch s": ("first_batch_seconds", ".2f"),
        "peak MB": ("peak_mb", ",.0f"),
        "CPU s/GB": ("cpu_seconds_per_gb", ".2f"),
    }
    table = Table("store", "data", "reader", *heads)
    for line in lines:
        cells = ("-" if line[name] is None else format(line[name], form) for name, form in heads.values())
        table.add_row(line["where"], line["data"], line["reader"], *cells)
    console.print(table)
    table = Table("store", f"wait of {STEP_SECONDS * 1e3:.0f} ms steps", "while filling", "p99 at boundaries", "else")
    for line in paces:
        name = line["where"] + (f" at {line['bandwidth_of_needed']} x" if line["bandwidth_of_needed"] else "")
        shares = (f"{line[share]:.2%}" for share in ("wait_share", "wait_share_filling"))
        table.add_row(name, *shares, *(f"{line[p]:.1f} ms" for p in ("p99_ms_boundary", "p99_ms_steady")))
    console.print(table)


def draw(lines: list[dict[str, Any]], paces: list[dict[str, Any]], path: str | Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(line["where"], line["data"]) for line in lines})
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(3.6 * (len(panels) + 1), 3.6), squeeze=False)
    for axis, (where, kind) in zip(axes[0], panels, strict=False):
        shown = [line for line in lines if (line["where"], line["data"]) == (where, kind)]
        names = [line["reader"] for line in shown]
        colors = ["#bbbbbb" if n == "limit" else "#1f6feb" if n == "dltrain" else "#8c959f" for n in names]
        bars = axis.bar(names, [line["mb_per_second"] for line in shown], color=colors)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set(title=f"{kind}, {where}", ylabel="MB/s")
    last = axes[0][-1]
    for offset, name, color in ((-0.2, "p99_ms_steady", "#bbbbbb"), (0.2, "p99_ms_boundary", "#1f6feb")):
        places = np.arange(len(paces)) + offset
        bars = last.bar(places, [p[name] for p in paces], 0.4, color=color, label=name.split("_")[-1])
        last.bar_label(bars, fmt="%.1f", fontsize=8)
    last.set_xticks(range(len(paces)), [f"{p['where']}\nwait {p['wait_share']:.2%}" for p in paces])
    last.set(title=f"steps of {STEP_SECONDS * 1e3:.0f} ms", ylabel="p99, ms", ylim=(0, 1.5 * STEP_SECONDS * 1e3))
    last.legend(fontsize=8, loc="upper right")
    for axis in axes[0]:
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=806, help="of each dataset, decoded")
    parser.add_argument("--where", default="local,s3")
    parser.add_argument("--kinds", default="images,tokens")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--no-pace", dest="pace", action="store_false", help="readers alone")
    parser.add_argument("--results", type=Path, help="directory for data.json and data.png")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    (lines, paces), hardware = compare(options), versions("dltrain", "pyarrow", "s3fs", "ray", "torch")
    show(lines, paces, hardware)
    result = json.dumps({**hardware, "rounds": options.rounds, "readers": lines, "pace": paces}, indent=1)
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "data.json").write_text(result + "\n")
        draw(lines, paces, options.results / "data.png")
    if options.json:
        print(result)


if __name__ == "__main__":
    main()
