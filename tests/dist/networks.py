"""Small networks and batches that the tests of several ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dltrain.spec import EngineSpec, OptimSpec, TrainSpec
from dltrain.training.engine import Engine, StepResult

__all__ = ["Tied", "dense", "engine_for", "rows", "weights", "whole"]

FEATURES, CLASSES = 6, 4


def dense(seed: int) -> nn.Module:
    """173 parameters: no number of ranks divides it."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 13), nn.Tanh(), nn.LayerNorm(13), nn.Linear(13, CLASSES))


class Tied(nn.Module):
    """One weight under two names, and a layer that is not trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inside = nn.Linear(FEATURES, 7)
        self.frozen = nn.Linear(7, 7)
        self.again = nn.Linear(FEATURES, 7)
        self.out = nn.Linear(7, CLASSES)
        self.again.weight = self.inside.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.frozen(torch.tanh(self.inside(x))) + self.again(x.flip(-1)))


def engine_for(
    module: nn.Module,
    optim: dict[str, Any],
    zero: int,
    precision: str = "fp32",
    total_steps: int = 20,
    train: dict[str, Any] | None = None,
    own_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    **engine: Any,
) -> Engine:
    return Engine(
        module,
        OptimSpec(**optim),
        EngineSpec(zero=zero, precision=precision, **engine),
        micro_batch=4,
        grad_accum_steps=1,
        total_steps=total_steps,
        device=torch.device("cpu"),
        train=TrainSpec(steps=total_steps, **(train or {})),
        own_optimizer=own_optimizer,
    )


def rows(step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (count, FEATURES) and targets (count, CLASSES) of a step's global batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(count, FEATURES, generator=generator)
    return x, torch.randn(count, CLASSES, generator=generator)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole weights as forward uses them, at any ZeRO stage."""
    import deepspeed

    sharded = [p for p in engine.module.parameters() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def whole(result: StepResult) -> StepResult:
    """A step's result with the loss of all ranks."""
    loss = torch.tensor(result.loss, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(loss)
    return result._replace(loss=loss.item())
