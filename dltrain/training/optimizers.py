"""The optimizer of a network: its parameters in groups, and the class that the spec names.

groups = parameter_groups(module, spec.optim)        # [{"params": [...], "weight_decay": 0.1, "lr_scale": 1.0}, ...]
make_optimizer(groups, spec.optim, fused=False)
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from dltrain.errors import UserError
from dltrain.spec import OptimSpec

__all__ = ["freeze", "make_optimizer", "matching", "parameter_groups"]

_BETAS = {"lion": (0.9, 0.99)}


def parameter_groups(module: nn.Module, optim: OptimSpec) -> list[dict[str, Any]]:
    """What is trained, in groups of the same rate and decay; biases and norms (one dimension) don't decay.

    Raises:
        UserError: a pattern of `optim.groups` matches no parameter that is trained.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    unused = {pattern for group in optim.groups for pattern in group.match}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decay = 1.0, optim.weight_decay if _ndim(parameter) > 1 else 0.0
        for group in optim.groups:
            hits = {pattern for pattern in group.match if fnmatchcase(name, pattern)}
            unused -= hits
            if hits:
                scale, decay = group.lr_scale, decay if group.weight_decay is None else group.weight_decay
                break
        found.setdefault((scale, decay), []).append(parameter)
    _all_used(unused, module, "optim.groups")
    # Decayed ones first. Every group costs collectives of its own: there are no empty ones.
    order = sorted(found, key=lambda key: (key[0] != 1.0, key[0], -key[1]))
    return [{"params": found[key], "lr_scale": key[0], "weight_decay": key[1]} for key in order]


def freeze(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Leaves parameters whose names match a pattern as they are; returns their names.

    Raises:
        UserError: a pattern matches none, or nothing is left to train.
    """
    frozen, unused = [], set(patterns)
    for name, parameter in module.named_parameters():
        hits = matching(name, patterns)
        unused -= hits
        if hits:
            parameter.requires_grad_(False)
            frozen.append(name)
    _all_used(unused, module, "train.freeze")
    if patterns and not any(p.requires_grad for p in module.parameters()):
        raise UserError(f"train.freeze: found {', '.join(patterns)}, which leaves nothing to train")
    return frozen


def matching(name: str, patterns: Sequence[str]) -> set[str]:
    """The patterns that a name matches."""
    return {pattern for pattern in patterns if fnmatchcase(name, pattern)}


def make_optimizer(groups: list[dict[str, Any]], optim: OptimSpec, *, fused: bool) -> torch.optim.Optimizer:
    """torch's optimizer of that name; rates are set before each step."""
    betas = optim.betas or _BETAS.get(optim.name, (0.9, 0.999))
    match optim.name:
        case "sgd":
            return torch.optim.SGD(
                groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov, fused=fused or None
            )
        case "lion":
            from lion_pytorch import Lion

            lion: torch.optim.Optimizer = Lion(groups, lr=optim.lr, betas=betas)
            return lion
        case "adam":
            return torch.optim.Adam(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=fused or None)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=fused or None)


def _ndim(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _all_used(unused: set[str], module: nn.Module, where: str) -> None:
    if unused:
        names = [name for name, _ in module.named_parameters()]
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise UserError(f"{where}: {sorted(unused)[0]!r} matches no parameter; they are called {shown}")
