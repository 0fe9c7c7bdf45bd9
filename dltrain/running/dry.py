"""The dry run: what `dltrain plan` prints, worked out without Ray.

print_plan(dry_run(spec))
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from dltrain.data.order import Order, lane_times
from dltrain.data.plan import Plan, Source, check_plan
from dltrain.running.rundir import RunDir, make_plan
from dltrain.spec import JobSpec
from dltrain.training.config import deepspeed_config
from dltrain.training.initial import shape_networks
from dltrain.training.optimizers import parameter_groups
from dltrain.training.plan import BatchPlan, Schedule
from dltrain.training.task import check_networks, load_task, networks_of

__all__ = ["dry_run", "memory_estimate", "print_plan"]

_MIB = 1024 * 1024
# fp32 master, and what the optimizer keeps per parameter.
_MASTER_BYTES = 4
_MOMENT_BYTES = {"adamw": 8, "adam": 8, "sgd": 4, "lion": 4, "task": 8}
_AVERAGE_BYTES = 4


def dry_run(spec: JobSpec, cwd: str | None = None) -> dict[str, Any]:
    """Everything that is known before a run.

    Raises:
        UserError: whatever would stop the run before its first step.
    """
    task = load_task(spec.task, spec.args, cwd or os.getcwd())
    plan, changes, _ = make_plan(spec, RunDir.of(spec), lambda text: print(text, file=sys.stderr))
    columns = spec.data.columns or task.columns or tuple(plan.schema.names)
    check_plan(plan, columns, spec.task)
    schedule = Schedule.of(spec, plan.num_rows)
    num_ranks = spec.workers.max
    batch = BatchPlan.of(spec.batch.global_, spec.batch.micro, num_ranks)
    modules = networks_of(task.build())
    check_networks(task, modules, spec.optim, plan.eval is not None)
    shape_networks(modules, spec)
    trained = 0
    for name, module in modules.items():
        groups = parameter_groups(module, spec.optim.of(name))
        trained += sum(p.numel() for group in groups for p in group["params"])
    parameters = sum(p.numel() for module in modules.values() for p in module.parameters())
    return {
        "spec": spec.to_dict(),
        "changes": changes,
        "batch": {
            "sum": str(batch),
            "global": batch.global_batch,
            "micro": batch.micro_batch,
            "grad_accum_steps": batch.grad_accum_steps,
            "workers": num_ranks,
        },
        "steps": {
            "total": schedule.total_steps,
            "per_epoch": schedule.steps_per_epoch,
            "eval_every": schedule.eval_every,
            "checkpoint_every": schedule.checkpoint_every,
            "dropped_rows": schedule.dropped,
        },
        "data": _data(plan, spec, columns, num_ranks),
        "memory": memory_estimate(spec, parameters, num_ranks, trained),
        "deepspeed": deepspeed_config(
            spec.optim, spec.engine, batch.micro_batch, batch.grad_accum_steps, batch.num_ranks
        ),
    }


def _data(plan: Plan, spec: JobSpec, columns: tuple[str, ...], num_ranks: int) -> dict[str, Any]:
    return {
        "rows": plan.num_rows,
        "row_groups": plan.num_units,
        "files": sum(len(s.catalog.files) for s in plan.sources),
        "bytes": round(sum(_passes(plan, s) * s.catalog.num_bytes for s in plan.sources)),
        "eval_rows": plan.eval.num_rows if plan.eval else 0,
        "columns": list(columns),
        "lanes": plan.num_lanes,
        "window": max(s.window_units for s in plan.sources),
        "plan_id": plan.plan_id,
        "sources": [
            {
                "name": s.name,
                "url": s.catalog.url,
                "rows": s.catalog.num_rows,
                "row_groups": s.catalog.num_units,
                "weight": s.weight,
                "passes": round(_passes(plan, s), 4),
            }
            for s in plan.sources
        ],
        "workers": [_share(plan, spec.batch.global_, rank, num_ranks) for rank in range(num_ranks)],
    }


def _passes(plan: Plan, source: Source) -> float:
    """How often an epoch goes through a dataset: once, where it is the only one."""
    return plan.num_rows * source.weight / sum(s.weight for s in plan.sources) / source.catalog.num_rows


def _share(plan: Plan, global_batch: int, rank: int, num_ranks: int) -> dict[str, int]:
    """What one rank reads in the first epoch: its lanes are the same in every step, or in every few."""
    steps = plan.num_lanes // math.gcd(plan.num_lanes, global_batch)
    times = (lane_times(plan.num_lanes, step * global_batch, global_batch, rank, num_ranks) for step in range(steps))
    lanes = sorted({lane for step in times for lane, _, _ in step})
    groups = num_bytes = 0.0
    for source, order in zip(plan.sources, plan.mixture.orders, strict=True):
        units, passes = _units(order, lanes), _passes(plan, source)
        groups += passes * len(units)
        num_bytes += passes * int(source.catalog.units["bytes"].to_numpy()[units].sum())
    return {
        "rank": rank,
        "rows": _rows(plan.num_rows, global_batch, rank, num_ranks),
        "row_groups": round(groups),
        "bytes": round(num_bytes),
    }


def _units(order: Order, lanes: list[int]) -> Any:
    """Those that lanes read in the first epoch: (units,)."""
    found = [order.lane(0, lane).spans[:, 0] for lane in lanes]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))


def _rows(num_rows: int, global_batch: int, rank: int, num_ranks: int) -> int:
    """Of whole batches and the last short one, a rank's slices."""

    def part(size: int) -> int:
        return (rank + 1) * size // num_ranks - rank * size // num_ranks

    return num_rows // global_batch * part(global_batch) + part(num_rows % global_batch)


def memory_estimate(spec: JobSpec, parameters: int, num_ranks: int, trained: int | None = None) -> dict[str, Any]:
    """Bytes of one worker by what they hold, activations left out.

    Args:
        trained: parameters that are not frozen; default: all.

    Source of the sharding: Rajbhandari et al., ZeRO, SC 2020, section 5.
    """
    zero, low = spec.engine.zero, 4 if spec.engine.precision == "fp32" else 2
    stepped = parameters if trained is None else trained
    shard = {stage: num_ranks if zero >= stage else 1 for stage in (1, 2, 3)}
    # In fp32 the weights are their own master, except where ZeRO keeps a flat copy.
    master = 0 if (low == 4 and zero == 0) else _MASTER_BYTES
    moments = _MOMENT_BYTES[spec.optim.name] + (_AVERAGE_BYTES if spec.train.ema else 0)
    parts = {
        "weights": parameters * low // shard[3],
        "gradients": stepped * low // shard[2],
        "optimizer": stepped * (master + moments) // shard[1],
    }
    found = {"parameters": parameters, "trained": stepped, **parts, "total": sum(parts.values())}
    return {**found, "offloaded": spec.engine.offload, "activations": "not estimated"}


def print_plan(found: Mapping[str, Any]) -> None:
    """As tables."""
    import yaml
    from rich.console import Console
    from rich.table import Table

    console = Console()
    data, batch, steps, memory = found["data"], found["batch"], found["steps"], found["memory"]
    console.rule("spec", align="left")
    console.print(yaml.safe_dump(found["spec"], sort_keys=False), highlight=False, markup=False)
    for change in found["changes"]:
        console.print(f"changed since the last start: {change}", markup=False)
    console.rule("batch and steps", align="left")
    console.print(f"global batch: {batch['sum']}", highlight=False)
    console.print(
        f"{steps['total']:,} steps, {steps['per_epoch']:,} an epoch; evaluation every {steps['eval_every']:,}, "
        f"checkpoint every {steps['checkpoint_every']:,}",
        highlight=False,
    )
    console.rule("data of one epoch", align="left")
    console.print(
        f"{data['rows']:,} rows, {data['row_groups']:,} row groups, {data['bytes'] / _MIB:,.2f} MiB in "
        f"{data['files']:,} files; columns {', '.join(data['columns'])}; {data['lanes']} lanes, "
        f"windows of {data['window']}",
        highlight=False,
        markup=False,
    )
    if len(data["sources"]) > 1:
        table = Table("dataset", "weight", "rows", "row groups", "passes an epoch")
        for source in data["sources"]:
            numbers = (f"{source['rows']:,}", f"{source['row_groups']:,}", f"{source['passes']:.2f}")
            table.add_row(source["name"], str(source["weight"]), *numbers)
        console.print(table)
    table = Table("worker", "rows", "row groups", "MiB")
    for worker in data["workers"]:
        cells = (f"{worker['rows']:,}", f"{worker['row_groups']:,}", f"{worker['bytes'] / _MIB:,.2f}")
        table.add_row(str(worker["rank"]), *cells)
    console.print(table)
    console.rule("memory of one worker", align="left")
    table = Table("", "MiB")
    for name in ("weights", "gradients", "optimizer", "total"):
        table.add_row(name, f"{memory[name] / _MIB:,.1f}")
    console.print(table)
    frozen = memory["parameters"] - memory["trained"]
    parameters = f"{memory['parameters']:,} parameters" + (f", of which {frozen:,} are frozen" if frozen else "")
    console.print(f"{parameters}; activations are not estimated", highlight=False)
    console.rule("DeepSpeed", align="left")
    console.print_json(json.dumps(found["deepspeed"]))
