"""The readers that tests/bench/data.py compares, each to be run in a process of its own.

    python tests/bench/data_readers.py dltrain s3://bucket/images 805830656     # one JSON object: MB/s, seconds, ...
    python tests/bench/data_readers.py pace s3://bucket/images 0                # seconds that each step waited

Each yields shuffled batches of 256 rows as torch tensors; the limit yields row groups in order.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader, IterableDataset

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

BATCH, PASSES = 256, 5
GROUPS = 4
# Bytes of a row: a uint8 image of 64 x 64 x 3 with its label; 2,048 int32 tokens.
ROW_BYTES = {"images": 64 * 64 * 3 + 8, "tokens": 2048 * 4}
# The pace test: what a step takes, and epochs before and after the shuffle's pool is full.
STEP_SECONDS, FILL_EPOCHS, PACE_EPOCHS = 0.05, 4, 24


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
    for path in files * PASSES:
        with filesystem.open_input_file(path) as source:
            reader = pq.ParquetFile(source, pre_buffer=True)
            for group in range(reader.num_row_groups):
                yield reader.read_row_group(group)


def dltrain(url: str) -> Iterator[Any]:
    from dltrain.data import open_stream

    # A pass more than is measured: the last one is as busy with the next as those before it.
    with open_stream(url, global_batch=BATCH, epochs=PASSES + 1) as stream:
        yield from stream


def ray(url: str) -> Iterator[Any]:
    import ray as ray_

    from dltrain.data.columns import tensors

    ray_.init(log_to_driver=False, include_dashboard=False, num_cpus=os.cpu_count())
    ray_.data.DataContext.get_current().enable_progress_bars = False
    START[0] = time.perf_counter()
    filesystem, root = _filesystem(url)
    dataset = ray_.data.read_parquet(root, filesystem=filesystem, shuffle="files")
    for _ in range(PASSES):
        batches = dataset.iter_batches(
            batch_size=BATCH, batch_format="pyarrow", local_shuffle_buffer_size=4 * BATCH, prefetch_batches=4
        )
        for batch in batches:
            yield tensors(batch.combine_chunks().to_batches()[0])
    ray_.shutdown()


def dataloader(url: str) -> Iterator[Any]:
    loader = DataLoader(_Groups(url), batch_size=None, num_workers=1, prefetch_factor=4, persistent_workers=True)
    for _ in range(PASSES):
        yield from loader


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


# A reader may move the clock, for what is no part of reading (a cluster that comes up).
START = [0.0]


def measure(reader: str, url: str, num_bytes: int) -> dict[str, float]:
    """All passes, in this process and its children."""
    _import_all()
    read: Callable[[str], Iterator[Any]] = globals()[reader]
    num_rows = num_bytes // ROW_BYTES[Path(url).name]
    cpu, START[0] = _cpu_seconds(), time.perf_counter()
    first, rows, ends = 0.0, 0, []
    batches = read(url)
    for batch in batches:
        now = time.perf_counter()
        first = first or now - START[0]
        rows += batch.num_rows if isinstance(batch, pa.Table) else len(next(iter(batch.values())))
        del batch
        if rows >= num_rows * (len(ends) + 1):
            ends.append(now)
            if len(ends) == PASSES:
                break
    # Processes that end are counted with their parent.
    list(batches) if reader in ("ray", "dataloader") else batches.close()  # type: ignore[attr-defined]
    return {
        "mb_per_second": num_bytes * (PASSES - 1) / 1e6 / (ends[-1] - ends[0]),
        "first_pass_mb_per_second": num_bytes / 1e6 / (ends[0] - START[0]),
        "first_batch_seconds": first,
        "peak_mb": _peak_mb(),
        "cpu_seconds_per_gb": (_cpu_seconds() - cpu) / num_bytes / PASSES * 1e9,
    }


def _import_all() -> None:
    """What readers need is imported before the clock starts; pyarrow imports pandas by itself where it is there."""
    import botocore.session  # noqa: F401
    import pandas  # noqa: F401
    import s3fs  # noqa: F401
    import torch

    from dltrain.data import open_stream  # noqa: F401

    torch.set_num_threads(1)
    # Imports leave Python a full collection to do, a tenth of a second in whoever comes next.
    gc.collect()


def pace(url: str) -> list[float]:
    """Seconds that each step waited for its batch."""
    _import_all()
    from dltrain.data import open_stream

    waits = []
    with open_stream(url, global_batch=BATCH, epochs=FILL_EPOCHS + PACE_EPOCHS) as stream:
        for _ in range(len(stream)):
            begin = time.perf_counter()
            next(stream)
            waits.append(time.perf_counter() - begin)
            time.sleep(STEP_SECONDS)
    return waits


def _peak_mb() -> float:
    """Of this process; getrusage counts what its parent held when it was started, too."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def _cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    name, where, size = sys.argv[1:]
    print(json.dumps(pace(where) if name == "pace" else measure(name, where, int(size))), flush=True)
    os._exit(0)
