"""Takes over what DeepSpeed trained without dltrain: weights into a folder, or a run that goes on from there.

    to_folder({"": "out"}, "taken", spec)          # model.safetensors and config.json, for `load`
    to_run({"": "out"}, load_spec("job.yaml"))      # weights and moments as the first checkpoint of that run

Of a task of several networks each was an engine of its own: {"generator": "out/g", "discriminator": "out/d"}.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dltrain import __version__
from dltrain.checkpoint.commit import list_checkpoints
from dltrain.checkpoint.fragments import PARAM, buffers, ties
from dltrain.checkpoint.whole import write_whole
from dltrain.errors import UserError
from dltrain.running.rundir import RunDir
from dltrain.spec import JobSpec
from dltrain.training.initial import shape_networks
from dltrain.training.task import load_task, networks_of
from dltrain.using.exporting import write_folder
from dltrain.using.model import own_code
from dltrain.using.zero import DeepSpeedFolder, read_deepspeed

__all__ = ["to_folder", "to_run"]

# What the optimizer of a spec goes on from; a task's own one from whatever there is.
_ADAM = {"exp_avg", "exp_avg_sq"}
_MOMENTS = {"adamw": _ADAM, "adam": _ADAM, "lion": {"exp_avg"}, "sgd": {"momentum_buffer"}}


def to_folder(
    sources: Mapping[str, str], target: str, spec: JobSpec | None = None, trust: bool = False
) -> dict[str, Any]:
    """Writes the weights as an exported folder.

    Args:
        sources: name of a network -> DeepSpeed's folder; one network is called "".
        spec: says task and args, so that `load` can use the folder; names and shapes are compared with its network.
        trust: see `read_deepspeed`.

    Raises:
        UserError: a folder can't be read, or holds other networks.
    """
    modules = _modules(spec) if spec else None
    found = _read(sources, modules, trust)
    state = {_prefix(name) + key: t for name, one in found.items() for key, t in one.weights.items()}
    done = write_folder(
        target,
        state,
        run=spec.name if spec else "",
        task=spec.task if spec else "",
        args=spec.args if spec else {},
        columns=spec.data.columns if spec else None,
        step=max(one.step for one in found.values()),
    )
    return {**_told(sources, found), **done}


def to_run(sources: Mapping[str, str], spec: JobSpec, trust: bool = False) -> dict[str, Any]:
    """Writes weights and moments as the first checkpoint of the run that `spec` describes; `dltrain run` goes on there.

    It is of DeepSpeed's step; the data begin at their beginning.

    Raises:
        UserError: a folder can't be read, holds other networks, or the run has checkpoints of its own.
    """
    run = RunDir.of(spec)
    steps = [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)]
    if steps:
        raise UserError(
            f"{run.url} has checkpoints of its own, the newest of step {steps[-1]}; import into a new run: set another "
            "`name`"
        )
    run.check_same(spec)
    modules = _modules(spec)
    shape_networks(modules, spec)
    found = _read(sources, modules, trust)
    step = max(one.step for one in found.values())
    parts = _Parts()
    for name, module in modules.items():
        parts.add(name, module, found[name], spec.optim.of(name).name)
    meta = {
        "position": 0,
        "optimizer_step": next(iter(found.values())).updates,
        "ties": parts.ties,
        "zero": max(one.zero for one in found.values()),
        "precision": spec.engine.precision,
        "global_batch": spec.batch.global_,
        "spec": spec.to_dict(),
        "dltrain": __version__,
        "metrics": {},
        "best": None,
        "audit": {},
        "imported": dict(sources),
    }
    checkpoint = write_whole(run.checkpoints, step, parts.fragments, parts.whole, meta)
    run.save_spec(spec)
    moments = sorted({kind for _, kind in parts.fragments} - {PARAM})
    return {**_told(sources, found), "run": run.url, "checkpoint": checkpoint.path, "moments": moments}


@dataclass
class _Parts:
    """What a checkpoint is made of, of all networks."""

    fragments: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, module: nn.Module, found: DeepSpeedFolder, optimizer: str) -> None:
        """Takes one network's, without the optimizer's state where another optimizer is to go on."""
        prefix = _prefix(name)
        trained = [n for n, p in module.named_parameters() if p.requires_grad]
        frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
        kinds = ", ".join(sorted(found.moments)) or "nothing"
        if set(found.moments) != _MOMENTS.get(optimizer, set(found.moments)):
            found.moments = {}
            found.reason = found.reason or f"it keeps {kinds}, not what {optimizer} goes on from"
        self.fragments |= {(prefix + n, PARAM): found.weights[n] for n in trained}
        for kind, tensors in found.moments.items():
            self.fragments |= {(prefix + n, kind): t for n, t in tensors.items() if n in trained}
        if found.moments:
            self.whole[f"number:{prefix}tensor:step"] = torch.tensor(float(found.updates))
        self.whole |= {f"buffer:{prefix}{n}": found.weights[n] for n in buffers(module)}
        self.whole |= {f"frozen:{prefix}{n}": found.weights[n] for n in frozen}
        self.whole |= {f"applied:{prefix}": torch.tensor(found.updates)} if prefix else {}
        self.ties |= {prefix + alias: prefix + n for alias, n in ties(module).items()}


def _told(sources: Mapping[str, str], found: Mapping[str, DeepSpeedFolder]) -> dict[str, Any]:
    return {
        "step": max(one.step for one in found.values()),
        "sources": [
            {"network": name, "path": sources[name], "zero": one.zero, "num_ranks": one.num_ranks, "note": one.reason}
            for name, one in found.items()
        ],
    }


def _prefix(network: str) -> str:
    return f"{network}." if network else ""


def _modules(spec: JobSpec) -> dict[str, nn.Module]:
    task = load_task(spec.task, spec.args, os.getcwd())
    with own_code("build"):
        return networks_of(task.build())


def _read(
    sources: Mapping[str, str], modules: Mapping[str, nn.Module] | None, trust: bool
) -> dict[str, DeepSpeedFolder]:
    if modules is not None and set(sources) != set(modules):
        names = ", ".join(f"{name}=FOLDER" for name in modules if name) or "one folder, without a name"
        raise UserError(f"this task has {len(modules)} network(s); give {names}")
    found = {}
    for name, path in sources.items():
        module = modules[name] if modules else None
        trained = {n: tuple(p.shape) for n, p in module.named_parameters() if p.requires_grad} if module else None
        found[name] = read_deepspeed(path, trained, trust)
        if module is not None:
            _check(path, found[name], module)
    return found


def _check(path: str, found: DeepSpeedFolder, module: nn.Module) -> None:
    """Raises UserError where the network is not the one that was saved."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    # One that is tied has one value, under whichever name it was saved; safetensors refuses memory that two share.
    for alias, name in ties(module).items():
        value = found.weights.get(name, found.weights.get(alias))
        if value is not None:
            found.weights[name], found.weights[alias] = value, value.clone()
    has = {name: tuple(tensor.shape) for name, tensor in found.weights.items()}
    faults = [f"no {name}" for name in wanted if name not in has]
    faults += [f"{name}, which the network lacks" for name in has if name not in wanted]
    faults += [f"{n} is {has[n]} instead of {s}" for n, s in wanted.items() if n in has and has[n] != s]
    if faults:
        raise UserError(
            f"{path} holds another network than the task builds: {'; '.join(faults[:3])}"
            f"{f' and {len(faults) - 3} more' if len(faults) > 3 else ''}; see that `task` and `args` are the same"
        )
