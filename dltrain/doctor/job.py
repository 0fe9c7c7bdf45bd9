"""Judges a spec against what there is: its batch, its task, its data, and the room for its workers.

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dltrain.doctor.finding import Finding, fail, ok, skip, warn
from dltrain.running.dry import memory_estimate
from dltrain.spec import JobSpec, WorkersSpec
from dltrain.training.plan import BatchPlan
from dltrain.wording import human_bytes

__all__ = [
    "DataFacts",
    "NodeRoom",
    "TaskFacts",
    "judge_batch",
    "judge_capacity",
    "judge_data",
    "judge_task",
    "slots_of",
    "worker_bytes",
    "workers_gpus",
]

# Of AdamW: fp32 weights and two moments; five slots at most (checkpoint.snapshot).
_STATE_BYTES, _SNAPSHOTS = 12, 5


@dataclass(frozen=True)
class TaskFacts:
    """A user's task.

    Attributes:
        error: it can't be used, and why.
        columns: that its `collate` needs, None for all.
        parameters: of all its networks; networks: their names; batch_norm: there are such layers.
    """

    error: str = ""
    columns: Sequence[str] | None = None
    parameters: int = 0
    networks: Sequence[str] = ()
    batch_norm: bool = False


@dataclass(frozen=True)
class DataFacts:
    """A dataset, by its listing and its first footer.

    Attributes:
        error: it can't be read, and why.
        rows, row_groups: of the first file; rows_about: of all, if the others are like it.
    """

    field: str
    url: str
    error: str = ""
    files: int = 0
    num_bytes: int = 0
    rows: int = 0
    rows_about: int = 0
    row_groups: int = 0
    columns: Sequence[str] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class NodeRoom:
    """What Ray knows a node by, what it may give away there, and the memory that is available; -1: not known."""

    address: str
    resources: Mapping[str, float] = field(default_factory=dict)
    available_bytes: int = -1


def judge_data(facts: DataFacts) -> Finding:
    """Whether a dataset can be read from here."""
    if facts.error:
        why = f"every worker reads {facts.field}"
        todo = "correct the URL, the credentials or the endpoint; `dltrain data inspect URL` shows what is there"
        return fail(facts.field, facts.error.removeprefix(f"{facts.field}: "), why, todo)
    some = f"first one {facts.rows:,} rows in {facts.row_groups} row groups"
    return ok(facts.field, f"{facts.files} files, {human_bytes(facts.num_bytes)}, {some} ({facts.seconds:.2f} s)")


def judge_task(spec: JobSpec, task: TaskFacts, data: Sequence[DataFacts]) -> list[Finding]:
    """Whether the task can be built, and the data have the columns that it needs."""
    if task.error:
        todo = "run from the directory above the task's module; install what it imports on every machine"
        return [fail("task", task.error, "no worker can begin", todo)]
    networks = f" in {', '.join(task.networks)}" if task.networks else ""
    found = [ok("task", f"{spec.task}: {task.parameters:,} parameters{networks}")]
    wanted = spec.data.columns or task.columns or ()
    for facts in data:
        missing = [name for name in wanted if name not in facts.columns] if not facts.error else []
        # Packing makes columns of its own.
        if missing and not spec.data.pack:
            there = ", ".join(facts.columns)
            todo = "name columns that are there in Task.columns or data.columns"
            found.append(
                fail(f"columns of {facts.field}", f"no {missing[0]!r}; there are {there}", "collate asks for it", todo)
            )
    return found


def judge_batch(spec: JobSpec, batch_norm: bool, rows: int) -> list[Finding]:
    """Whether the batch arithmetic is plausible.

    Args:
        rows: of the training data, as far as they are known; 0: not known.
    """
    size, workers = spec.batch.global_, spec.workers.max
    plan = BatchPlan.of(size, spec.batch.micro, workers)
    name = "batch"
    if size < workers:
        todo = f"raise batch.global to {workers} or more, or lower workers.max"
        return [warn(name, f"{size} rows for up to {workers} workers", "some of them would have nothing to do", todo)]
    if rows and size > rows:
        todo = "lower batch.global"
        return [warn(name, f"{size} rows, and the data have about {rows:,}", "a step would be an epoch", todo)]
    if batch_norm and plan.micro_batch < 2:
        todo = "raise batch.global or batch.micro"
        return [warn(name, f"{plan}", "BatchNorm of one row has no variance", todo)]
    short = size % (plan.num_ranks * plan.grad_accum_steps)
    if short and plan.micro_batch < 8:
        todo = f"a multiple of {plan.num_ranks * plan.grad_accum_steps} shares out evenly"
        return [warn(name, f"{plan}", "workers with a row more keep the others waiting", todo)]
    return [ok(name, str(plan))]


def slots_of(node: NodeRoom, workers: WorkersSpec, gpus: int) -> int:
    """How many workers have room on a node."""
    wanted = {"CPU": workers.cpus, **workers.resources, **({"GPU": gpus} if gpus else {})}
    return min((math.floor(node.resources.get(k, 0.0) / v + 1e-9) for k, v in wanted.items() if v), default=0)


def workers_gpus(spec: JobSpec, nodes: Sequence[NodeRoom]) -> int:
    """GPUs of one worker there."""
    total = sum(node.resources.get("GPU", 0.0) for node in nodes)
    return spec.workers.gpus if spec.workers.gpus != "auto" else int(total >= 1)


def worker_bytes(spec: JobSpec, parameters: int, on_gpu: bool) -> tuple[int, int]:
    """What one worker holds on its GPU, and in the machine's memory, without activations and data."""
    workers = spec.workers.max
    model = int(memory_estimate(spec, parameters, workers)["total"])
    snapshots = _SNAPSHOTS * _STATE_BYTES * parameters // workers
    return (model, snapshots) if on_gpu else (0, model + snapshots)


def judge_capacity(spec: JobSpec, nodes: Sequence[NodeRoom], may_grow: bool) -> list[Finding]:
    """Whether the workers that the spec asks for have room.

    Args:
        may_grow: nodes can be added, by people or an autoscaler.
    """
    workers, gpus = spec.workers, workers_gpus(spec, nodes)
    if not nodes:
        return [skip("workers", "no nodes are known")]
    slots = sum(slots_of(node, workers, gpus) for node in nodes)
    each = ", ".join(f"{v:g} {k}" for k, v in {"CPU": workers.cpus, "GPU": gpus, **workers.resources}.items() if v)
    found = f"room for {slots} workers of {each}; workers is {workers.min} to {workers.max}"
    if slots < workers.min:
        why = "a run waits for workers.min and then ends"
        todo = "lower workers.min or workers.cpus, start Ray with more, or add nodes"
        if may_grow:
            return [warn("workers", found, f"{why}, after workers.wait_seconds: {workers.wait_seconds:g}", todo)]
        return [fail("workers", found, why, todo)]
    return [ok("workers", found if slots >= workers.max else f"{found}: it would run with {slots}")]
