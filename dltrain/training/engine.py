"""One network wrapped by DeepSpeed, with the exact global mean and steps that all ranks agree on.

engine = Engine(module, spec.optim, spec.engine, micro_batch=64, grad_accum_steps=2, total_steps=300, device=cpu)
engine.begin_step(global_count)
for i, micro in enumerate(micros):
    engine.backward(task.loss(engine, micro), micro.count, last=i == len(micros) - 1)
result = engine.step()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from dltrain.errors import UserError
from dltrain.spec import EngineSpec, OptimSpec, TrainSpec
from dltrain.training.averages import WeightAverage
from dltrain.training.config import deepspeed_config
from dltrain.training.optimizers import make_optimizer, parameter_groups
from dltrain.training.schedules import learning_rate

__all__ = ["Engine", "StepResult"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """What a step did.

    Attributes:
        applied: the weights were changed.
        finite: loss and gradients were finite, on every rank.
        grad_norm: global, before clipping.
        loss: this rank's part of the mean over the global batch: that is the sum over ranks.
        losses: the same by network, where there are several.
    """

    applied: bool
    finite: bool
    grad_norm: float
    learning_rate: float
    loss: float
    losses: Mapping[str, float] = MappingProxyType({})


class Engine:
    """A module under DeepSpeed; called like the module itself.

    The gradient that is applied is the sum over ranks and micro-batches of loss * count, over the count of
    the global batch: exact for ragged micro-batches, for ranks with fewer rows, and for stand-ins of count 0.

    Args:
        train: `ema` and `compile` of it.
        own_optimizer: makes the task's own from groups of parameters, in place of the spec's.

    Attributes:
        module: the network; engine: DeepSpeed's wrapper; step_count: optimizer steps tried so far.
        average: of its weights, None without `train.ema`.
        has_turn: it is being trained, and not another network that it takes part in.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimSpec,
        spec: EngineSpec,
        *,
        micro_batch: int,
        grad_accum_steps: int,
        total_steps: int,
        device: torch.device,
        train: TrainSpec | None = None,
        own_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    ) -> None:
        import deepspeed

        self._optim, self._total_steps, self._device = optim, total_steps, device
        self._num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._zero, self._precision, self._dtype = spec.zero, spec.precision, _DTYPES.get(spec.precision)
        # Nothing wraps the optimizer then, and nothing checks or clips.
        self._plain = spec.zero == 0 and spec.precision == "fp32"
        _check_precision(spec.precision)
        config = deepspeed_config(optim, spec, micro_batch, grad_accum_steps, self._num_ranks)
        module.to(device)
        groups = parameter_groups(module, optim)
        fused = device.type == "cuda" or spec.offload != "none" if optim.fused is None else optim.fused
        optimizer = own_optimizer(groups) if own_optimizer else make_optimizer(groups, optim, fused=fused)
        self.engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        _forget_first_step(self.engine.optimizer)
        if train and train.compile:
            self._compile(train.compile)
        self.average = WeightAverage(self.engine, train.ema) if train and train.ema else None
        self.module = module
        self.step_count, self.has_turn = 0, True
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._count = 1.0

    def _compile(self, mode: bool | str) -> None:
        if self._device.type == "cpu":
            import torch._inductor.config as inductor

            # Compiling processes of its own, killed with their worker, would leave semaphores in shared memory.
            inductor.compile_threads = 1
        self.engine.compile(compile_kwargs={"mode": None if mode is True else mode})

    # ---- forward and backward ----

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward; floating inputs are cast to the engine's precision."""
        if self._dtype:
            args, kwargs = _cast(args, self._dtype), _cast(kwargs, self._dtype)
        # DeepSpeed takes any backward pass through what its engine returned for one that ends a micro-batch: not so for
        # another network's, nor for one that a gradient penalty makes. ZeRO-3 needs its engine to see which weights a
        # layer borrows from another.
        through = self._zero == 3 and self.has_turn
        return self.engine(*args, **kwargs) if through else self.module(*args, **kwargs)

    def begin_step(self, global_count: float) -> None:
        """Says how many units the global batch has."""
        self._loss.zero_()
        self._count = max(global_count, 1.0)

    def backward(self, loss: torch.Tensor, count: float, *, last: bool) -> None:
        """Adds a micro-batch's gradient.

        Args:
            loss: mean over the micro-batch's `count` units.
            last: it is the step's last one; every rank says so at the same call.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        if not count:
            with self._no_gradient():
                self.engine.backward(loss.float(), scale_wrt_gas=False)
            return
        share = loss.float() * (count / self._count)
        self._loss += share.detach()
        # DeepSpeed averages over ranks; the sum is wanted. A loss that is not finite may have gradients that are:
        # times nan they are not, on any rank once they are reduced, and the step is left out everywhere.
        scale = torch.where(share.detach().isfinite(), float(self._num_ranks), math.nan)
        self.engine.backward(share * scale, scale_wrt_gas=False)

    @contextmanager
    def _no_gradient(self) -> Iterator[None]:
        """Gradients made in here are zero: 0 * loss would let a stand-in's nan through."""
        trained = (p for p in self.module.parameters() if p.requires_grad)
        hooks = [p.register_hook(torch.zeros_like) for p in trained]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # ---- the update ----

    def step(self) -> StepResult:
        """Updates the weights, unless loss or gradients are not finite anywhere: then no rank does."""
        rate = learning_rate(self._optim, self.step_count, self._total_steps)
        self.step_count += 1
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        norm = self._plain_step() if self._plain else self._wrapped_step()
        if self._applied and self.average:
            self.average.update(self.step_count)
        finite = math.isfinite(norm) or self._only_overflowed()
        return StepResult(self._applied, finite, norm, rate, float(self._loss))

    def _only_overflowed(self) -> bool:
        """fp16: the loss was finite on every rank, its gradients times the scale were not; the scale is less now."""
        if self._precision != "fp16":
            return False
        # All ranks come here: they have skipped the same step.
        good = self._loss.isfinite().float()
        if self._num_ranks > 1:
            dist.all_reduce(good, op=dist.ReduceOp.MIN)
        return bool(good)

    def _plain_step(self) -> float:
        """ZeRO 0 in fp32. Every rank holds the same reduced gradients, so all come to the same answer."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._optim.clip:
            nn.utils.clip_grads_with_norm_(parameters, self._optim.clip, total)
        norm = float(total)
        self._applied = math.isfinite(norm)
        if self._applied:
            self.engine.step()
        else:
            self.engine.optimizer.zero_grad()
            self.engine.micro_steps += 1
        return norm

    def _wrapped_step(self) -> float:
        """DeepSpeed's own optimizers leave a step out, on all ranks, when the global norm is not finite."""
        self.engine.step()
        self._applied = bool(self.engine.was_step_applied())
        norm = self.engine.get_global_grad_norm()
        return float(norm) if self._applied and norm is not None else math.nan

    # ---- modes ----

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has the running average of its weights, where it keeps one; all ranks go in and out together."""
        with self.average.in_place() if self.average else nullcontext():
            yield

    def train(self) -> None:
        """Dropout and BatchNorm as in training."""
        if not self.module.training:
            self.engine.train()

    def eval(self) -> None:
        """Dropout and BatchNorm as in evaluation."""
        self.engine.eval()


def _check_precision(precision: str) -> None:
    from deepspeed.accelerator import get_accelerator

    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        name = get_accelerator().device_name()
        raise UserError(f"engine.precision: found fp16, which {name} can't compute with here; set bf16 or fp32")


def _forget_first_step(optimizer: Any) -> None:
    """ZeRO 0 in bf16: DeepSpeed made a step of zero gradients, so decay was applied and AdamW's count is one ahead."""
    if not hasattr(optimizer, "fp32_groups"):
        return
    optimizer.optimizer.state.clear()
    with torch.no_grad():
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.copy_(weight)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if hasattr(value, "_fields"):
        return type(value)(*(_cast(v, dtype) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, Mapping):
        return {k: _cast(v, dtype) for k, v in value.items()}
    return value
