"""How fast batches arrive: dltrain, Ray Data and a torch DataLoader over the same Parquet, against the store's limit.

    python tests/bench/data.py [--rounds 3] [--megabytes 400] [--where local,s3] [--kinds images,tokens]
                               [--json] [--png bench-data.png]

Every reader runs in a process of its own, turn and turn about, with the malloc settings of dltrain's workers, and
yields shuffled batches of 256 rows as torch tensors; the limit reads row groups in order with pyarrow and makes no
batches. S3 is Ceph's gateway on loopback, all in memory. MB/s counts decoded bytes; CPU is of the reader's
processes, first batch from opening the dataset.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader, IterableDataset

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1] / "e2e")]

from dltrain.running.agent import MEMORY  # noqa: E402

BATCH = 256
FILES, GROUPS = 16, 4
# Bytes of a row: a uint8 image of 64 x 64 x 3 with its label; 2,048 int32 tokens.
ROW_BYTES = {"images": 64 * 64 * 3 + 8, "tokens": 2048 * 4}
READERS = ("limit", "dltrain", "ray", "dataloader")


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


# ---- the readers: each yields batches, or row groups ----


def _filesystem(url: str) -> tuple[Any, str]:
    """pyarrow's own client, the fastest that the others can be given."""
    from pyarrow import fs

    if not url.startswith("s3://"):
        return fs.LocalFileSystem(), url
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"].removeprefix("http://")
    return fs.S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1"), url.removeprefix("s3://")


def _files(url: str) -> tuple[Any, list[str]]:
    from pyarrow import fs

    filesystem, root = _filesystem(url)
    return filesystem, sorted(f.path for f in filesystem.get_file_info(fs.FileSelector(root)))


def limit(url: str) -> Iterator[Any]:
    filesystem, files = _files(url)
    for path in files:
        with filesystem.open_input_file(path) as source:
            reader = pq.ParquetFile(source, pre_buffer=True)
            for group in range(reader.num_row_groups):
                yield reader.read_row_group(group)


def dltrain(url: str) -> Iterator[Any]:
    from dltrain.data import open_stream

    with open_stream(url, global_batch=BATCH) as stream:
        yield from stream


def ray(url: str) -> Iterator[Any]:
    import ray as ray_

    from dltrain.data.columns import tensors

    ray_.init(log_to_driver=False, include_dashboard=False, num_cpus=os.cpu_count())
    ray_.data.DataContext.get_current().enable_progress_bars = False
    START[0] = time.perf_counter()
    filesystem, root = _filesystem(url)
    dataset = ray_.data.read_parquet(root, filesystem=filesystem, shuffle="files")
    batches = dataset.iter_batches(
        batch_size=BATCH, batch_format="pyarrow", local_shuffle_buffer_size=4 * BATCH, prefetch_batches=4
    )
    for batch in batches:
        yield tensors(batch.combine_chunks().to_batches()[0])
    STOP[0] = time.perf_counter()
    ray_.shutdown()


def dataloader(url: str) -> Iterator[Any]:
    yield from DataLoader(_Groups(url), batch_size=None, num_workers=1, prefetch_factor=4)


class _Groups(IterableDataset):  # type: ignore[type-arg]
    """Row groups in random order, the rows of each shuffled: what people write for a DataLoader."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __iter__(self) -> Iterator[Any]:
        from dltrain.data.columns import tensors

        filesystem, files = _files(self.url)
        rng = np.random.default_rng(0)
        for index in rng.permutation(len(files) * GROUPS).tolist():
            with filesystem.open_input_file(files[index // GROUPS]) as source:
                table = pq.ParquetFile(source, pre_buffer=True).read_row_group(index % GROUPS)
            rows = table.combine_chunks().to_batches()[0].take(pa.array(rng.permutation(len(table))))
            for at in range(0, len(table), BATCH):
                yield tensors(rows.slice(at, BATCH))


# A reader may move the clock, for what is no part of reading (a cluster that comes up and goes down).
START, STOP = [0.0], [0.0]


def measure(reader: str, url: str, num_bytes: int) -> dict[str, float]:
    """One pass, in this process and its children."""
    # What every reader needs is imported before the clock starts.
    import torch

    from dltrain.data import open_stream  # noqa: F401

    torch.set_num_threads(1)
    read: Callable[[str], Iterator[Any]] = globals()[reader]
    cpu, START[0] = _cpu_seconds(), time.perf_counter()
    first = 0.0
    for batch in read(url):
        first = first or time.perf_counter() - START[0]
        del batch
    seconds = (STOP[0] or time.perf_counter()) - START[0]
    return {
        "mb_per_second": num_bytes / 1e6 / seconds,
        "first_batch_seconds": first,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "cpu_seconds_per_gb": (_cpu_seconds() - cpu) / num_bytes * 1e9,
    }


def _cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


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


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    lines = []
    with _stores(options.where.split(",")) as stores:
        for where, (root, fs, env) in stores.items():
            for kind in options.kinds.split(","):
                url = f"{root}/{kind}"
                fs.makedirs(url, exist_ok=True) if where == "local" else None
                num_bytes = write_data(url.removeprefix("s3://"), fs, kind, options.megabytes)
                lines += _rounds(where, kind, url, num_bytes, env, options)
    return lines


def _rounds(
    where: str, kind: str, url: str, num_bytes: int, env: dict[str, str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for reader in options.readers.split(","):
            print(f"  {where} {kind}, round {number + 1}/{options.rounds}: {reader}", file=sys.stderr, flush=True)
            command = [sys.executable, str(HERE), "--one", reader, url, str(num_bytes)]
            done = subprocess.run(command, env={**MEMORY, **os.environ, **env}, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{reader} failed:\n{done.stderr}")
            found.setdefault(reader, []).append(json.loads(done.stdout.splitlines()[-1]))
    best = statistics.median(r["mb_per_second"] for r in found[READERS[0]]) if READERS[0] in found else float("nan")
    return [
        {
            "where": where,
            "data": kind,
            "reader": reader,
            **{name: round(statistics.median(r[name] for r in rounds), 3) for name in rounds[0]},
            "of_limit": round(statistics.median(r["mb_per_second"] for r in rounds) / best, 3),
        }
        for reader, rounds in found.items()
    ]


def versions() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    packages = {name: version(name) for name in ("dltrain", "pyarrow", "s3fs", "ray", "torch")}
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **packages}


def show(lines: list[dict[str, Any]], hardware: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120)
    console.print(", ".join(f"{name} {value}" for name, value in hardware.items()), highlight=False)
    table = Table("store", "data", "reader", "MB/s", "of limit", "first batch s", "peak MB", "CPU s/GB")
    for line in lines:
        numbers = (line["mb_per_second"], line["of_limit"], line["first_batch_seconds"])
        table.add_row(
            line["where"],
            line["data"],
            line["reader"],
            f"{numbers[0]:,.0f}",
            f"{numbers[1]:.0%}",
            f"{numbers[2]:.2f}",
            f"{line['peak_mb']:,.0f}",
            f"{line['cpu_seconds_per_gb']:.2f}",
        )
    console.print(table)


def draw(lines: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(line["where"], line["data"]) for line in lines})
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), squeeze=False)
    for axis, (where, kind) in zip(axes[0], panels, strict=True):
        shown = [line for line in lines if (line["where"], line["data"]) == (where, kind)]
        names = [line["reader"] for line in shown]
        colors = ["#bbbbbb" if n == "limit" else "#1f6feb" if n == "dltrain" else "#8c959f" for n in names]
        bars = axis.bar(names, [line["mb_per_second"] for line in shown], color=colors)
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_title(f"{kind}, {where}", fontsize=10)
        axis.set_ylabel("MB/s")
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=400, help="of each dataset, decoded")
    parser.add_argument("--where", default="local,s3")
    parser.add_argument("--kinds", default="images,tokens")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--png", help="where to draw the comparison")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        reader, url, num_bytes = options.one
        print(json.dumps(measure(reader, url, int(num_bytes))), flush=True)
        os._exit(0)
    lines, hardware = compare(options), versions()
    show(lines, hardware)
    if options.png:
        draw(lines, options.png)
    if options.json:
        print(json.dumps({"readers": lines, **hardware}))


if __name__ == "__main__":
    main()
