"""What is done to a task's networks between `build` and DeepSpeed: weights to begin with, freezing, recomputation.

modules = networks_of(task.build())
shape_networks(modules, spec)                       # freezing and recomputation
for line in take_weights(modules, spec): ...        # at a run's very beginning
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from torch.utils.checkpoint import checkpoint

from dltrain.checkpoint.commit import find
from dltrain.checkpoint.export import state_dict
from dltrain.errors import DltrainError, UserError
from dltrain.spec import InitSpec, JobSpec
from dltrain.store import Store, open_store
from dltrain.training.optimizers import freeze

__all__ = ["recompute", "shape_networks", "take_weights"]

_SHOWN = 4


def shape_networks(modules: Mapping[str, nn.Module], spec: JobSpec) -> None:
    """Freezes what `train.freeze` names, and has activations recomputed as `engine.activation_checkpointing` says.

    Raises:
        UserError: a pattern matches nothing.
    """
    joined = modules[""] if "" in modules else nn.Module()
    if "" not in modules:
        # A ModuleDict has no room for networks that are called as its methods: keys, type, half.
        joined._modules.update(modules)
    freeze(joined, spec.train.freeze)
    for name, module in modules.items():
        if not any(p.requires_grad for p in module.parameters()):
            raise UserError(f"train.freeze: nothing of the network {name!r} is left to train")
    recompute(joined, spec.engine.activation_checkpointing)


# ---- recomputation ----


def recompute(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Has modules forget their activations and compute them again in the backward pass; returns their names.

    Raises:
        UserError: a pattern matches neither a module's name nor its class.
    """
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = {n: m for n, m in module.named_modules() if n and _is_called(n, m, pattern)}
        if not hits:
            classes = sorted({type(m).__name__ for name, m in module.named_modules() if name})
            raise UserError(
                f"engine.activation_checkpointing: {pattern!r} matches no module within the network; classes there: "
                f"{', '.join(classes)}"
            )
        found |= hits
    # What is within another one is computed again with it.
    found = {n: m for n, m in found.items() if not any(n.startswith(f"{outer}.") for outer in found)}
    for part in found.values():
        # The name and the parameters stay as they are, which a wrapper around the module would change.
        part.forward = partial(_checkpointed, part.forward)
    return sorted(found)


def _is_called(name: str, module: nn.Module, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or type(module).__name__ == pattern


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


# ---- weights to begin with ----


def take_weights(modules: Mapping[str, nn.Module], init: InitSpec, runs: str) -> Iterator[str]:
    """Copies weights into the networks, and says what was taken and what was not.

    Args:
        runs: where runs are, for one that is given by its name.

    Raises:
        UserError: there are none, or with `strict` not all of them or not of the right shape.
    """
    saved = _read(init, runs)
    wanted = {f"{n}.{key}" if n else key: t for n, m in modules.items() for key, t in m.state_dict().items()}
    fits = {n for n, t in wanted.items() if n in saved and saved[n].shape == t.shape}
    other = [
        f"{n} is {_shape(saved[n])} there and {_shape(wanted[n])} here" for n in wanted if n in saved and n not in fits
    ]
    with torch.no_grad():
        for name in fits:
            wanted[name].copy_(saved[name])
    # A tie has several names, one of which is enough.
    filled = {wanted[name].data_ptr() for name in fits}
    missing = [n for n, t in wanted.items() if n not in saved and not (t.numel() and t.data_ptr() in filled)]
    unused = [n for n in saved if n not in wanted]
    gaps = [
        f"{what} {_some(names)}" for what, names in (("not there:", missing), ("of another shape:", other)) if names
    ]
    if (gaps and init.strict) or not fits:
        known = f"; it has {_some(list(saved))}" if missing else ""
        raise UserError(
            f"train.init_from: {init.url} does not fit the network; {'; '.join(gaps)}{known}. "
            "Set train.init_from: {url: ..., strict: false} to take what fits"
        )
    extra = [f"not used: {_some(unused)}"] if unused else []
    yield "; ".join([f"weights of {len(fits)} tensors taken from {init.url}", *gaps, *extra])


def _read(init: InitSpec, runs: str) -> dict[str, torch.Tensor]:
    url = init.url if "/" in init.url or init.url.endswith(".safetensors") else f"{runs.rstrip('/')}/{init.url}"
    try:
        if url.endswith(".safetensors"):
            parent, _, name = url.rpartition("/")
            return load(open_store(parent or ".").read(name))
        store = open_store(url)
        files = [name for name in store.list("") if name.endswith(".safetensors") and "/" not in name]
        if files:
            return {key: tensor for name in files for key, tensor in load(store.read(name)).items()}
        return _of_run(store, init.step)
    except FileNotFoundError:
        raise UserError(f"train.init_from: no file {url}") from None
    except SafetensorError as error:
        raise UserError(f"train.init_from: {url} is not a safetensors file: {error}") from None


def _of_run(store: Store, step: str) -> dict[str, torch.Tensor]:
    checkpoints = open_store(f"{store.url}/checkpoints")
    try:
        return state_dict(checkpoints, find(checkpoints, step))
    except DltrainError as error:
        raise UserError(f"train.init_from: {store.url} has no safetensors file and no checkpoint: {error}") from None


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
