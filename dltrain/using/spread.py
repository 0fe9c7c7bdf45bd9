"""A whole dataset's predictions, by this process or by workers on Ray that have the network each.

predict_all(job, workers=None)                       # here
predict_all(job, workers=4, address="auto")          # four actors, a CPU or GPU each
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dltrain.errors import DataError, DltrainError, RunFailedError
from dltrain.running.cluster import Cluster, connect
from dltrain.using.bulk import Bulk, BulkJob, BulkWorker, Done, Part, too_many
from dltrain.using.model import load

__all__ = ["predict_all"]

# A worker that dies is started again so often, and its part made again.
_RESTARTS = 3
_PATIENCE_SECONDS = 30.0
Progress = Callable[[int, int], None]


def predict_all(
    job: BulkJob,
    *,
    workers: int | None = None,
    address: str | None = None,
    progress: Progress = lambda _done, _total: None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Writes the predictions for `job.source`; what an earlier start has written is left as it is.

    Args:
        workers: on Ray; None: this process alone, and no Ray.
        address: of a Ray cluster; default: as for a run.
        progress: called with rows done and all rows.
        say: told what a user may want to know.

    Returns:
        what was done, ready for JSON.

    Raises:
        UserError: nothing to read, columns missing, too many rows that can't be used, a target that holds something
            else.
        TaskError: the task raised.
    """
    begin = time.monotonic()
    if workers is not None:
        job = replace(job, threads=job.threads or 1)
    model = load(job.run, job.step, device="cpu" if workers else job.device, args=job.args, code=job.code)
    bulk = Bulk(job, model)
    bad = [pair for done in bulk.done for pair in done.bad]
    rows, total = sum(done.part.rows for done in bulk.done), bulk.catalog.num_rows
    _check_bad(bad, job)
    if bulk.missing:
        if bulk.done:
            say(f"going on: {len(bulk.done)} of {len(bulk.parts)} files are there")
        schema = bulk.schema()
        each = (
            _here(bulk, BulkWorker(bulk.job, schema, bulk.catalog, model))
            if workers is None
            else _on_ray(bulk, schema, workers, address, say)
        )
        progress(rows, total)
        for done in each:
            bad += done.bad
            _check_bad(bad, job)
            rows += done.part.rows
            progress(rows, total)
    bulk.finish()
    seconds = time.monotonic() - begin
    made = sum(part.rows for part in bulk.missing)
    return {
        "run": model.trained.run,
        "step": model.step,
        "source": job.source,
        "target": job.target,
        "rows": total,
        "files": len(bulk.parts),
        "files_before": len(bulk.done),
        "bad_rows": [{"row": row, "reason": reason} for row, reason in sorted(bad)],
        "workers": max(1, min(workers or 1, len(bulk.missing))),
        "seconds": round(seconds, 3),
        "rows_per_second": round(made / seconds, 1),
    }


def _check_bad(bad: list[tuple[int, str]], job: BulkJob) -> None:
    if len(bad) > job.bad_rows:
        raise DataError(too_many(sorted(bad), job))


def _here(bulk: Bulk, worker: BulkWorker) -> Iterator[Done]:
    for part in bulk.missing:
        yield worker.write(part)


# ---- on Ray ----


def _on_ray(
    bulk: Bulk, schema: pa.Schema, workers: int, address: str | None, say: Callable[[str], None]
) -> Iterator[Done]:
    bulk.share()
    with connect(address) as cluster:
        actors = _start(cluster, bulk.job, schema, min(workers, len(bulk.missing)), say)
        try:
            yield from _share(actors, bulk.missing, say)
        finally:
            import ray

            for actor in actors:
                ray.kill(actor)


def _start(cluster: Cluster, job: BulkJob, schema: pa.Schema, count: int, say: Callable[[str], None]) -> list[Any]:
    """Actors that load the network; those that the cluster has no room for now come when it has."""
    import ray

    threads = job.threads or 1
    gpus = int(cluster.gpus >= 1 and job.device != "cpu")
    room = int(cluster.gpus if gpus else cluster.cpus // threads)
    if count > room:
        say(f"{count} workers are asked for, and {cluster}: room for {max(room, 1)}")
    actor: Any = ray.remote(BulkWorker)
    made = actor.options(num_cpus=threads, num_gpus=gpus, max_restarts=_RESTARTS, max_task_retries=_RESTARTS)
    return [made.remote(job, schema) for _ in range(count)]


def _share(actors: list[Any], parts: list[Part], say: Callable[[str], None]) -> Iterator[Done]:
    """Gives each actor a part, and the next one when it is done; only those that answer get any."""
    import ray

    todo = iter(parts)
    left = len(parts)
    waiting = {actor.hello.remote(os.getcwd()): actor for actor in actors}
    patience: float | None = _PATIENCE_SECONDS
    while left:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=patience)
        if not ready:
            say("waiting for the first worker: the cluster has no room for it yet, or is still starting it")
            patience = None
            continue
        patience = None
        actor = waiting.pop(ready[0])
        done = _get(ready[0])
        if done is not None:
            left -= 1
            yield done
        part = next(todo, None)
        if part is not None:
            waiting[actor.write.remote(part)] = actor


def _get(ref: Any) -> Any:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DltrainError):
            raise error.cause from None
        raise RunFailedError(f"a worker failed: {error}") from None
    except ray.exceptions.RayError as error:
        raise RunFailedError(f"a worker died {_RESTARTS + 1} times: {str(error).splitlines()[0]}") from None
