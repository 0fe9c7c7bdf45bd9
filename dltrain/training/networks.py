"""The networks of a task under DeepSpeed, one engine each, and whose turn it is.

    networks = Networks(task.build(), spec.optim, spec.engine, micro_batch=64, ...)
    for name in networks:
        with networks.taking(name) as engine:      # the others' weights are constants meanwhile
            engine.backward(task.step(networks, micro)[name], micro.count, last=True)
            results[name] = engine.step()
    networks.together(results)

A task of one network has one engine, called "". With several, a step gives each of them a turn, in the order in which
`build` names them: the later ones see what the earlier ones have become.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dltrain.checkpoint.fragments import Network, average_buffers
from dltrain.errors import UserError
from dltrain.spec import EngineSpec, OptimSpec, TrainSpec
from dltrain.training.engine import Engine, StepResult
from dltrain.training.task import Task, networks_of

__all__ = ["Networks"]


class Networks(Mapping[str, Engine]):
    """Engines by name.

    Args:
        built: what `Task.build` returned.
        train: `ema` and `compile` of it.
        task: makes the optimizers where `optim.name` is `task`, and says whether its networks are stepped jointly.

    Attributes:
        turn: the one that is being trained.
        applied: updates that each has had.
    """

    def __init__(
        self,
        built: nn.Module | Mapping[str, nn.Module],
        optim: OptimSpec,
        spec: EngineSpec,
        *,
        micro_batch: int,
        grad_accum_steps: int,
        total_steps: int,
        device: torch.device,
        train: TrainSpec | None = None,
        task: Task | None = None,
    ) -> None:
        modules = networks_of(built)
        self.jointly = task is not None and task.jointly and "" not in modules
        self._engines = {
            name: Engine(
                module,
                optim.of(name),
                spec,
                micro_batch=micro_batch,
                grad_accum_steps=grad_accum_steps,
                total_steps=total_steps,
                device=device,
                train=train,
                own_optimizer=partial(task.optimizer, name) if task and optim.of(name).name == "task" else None,
            )
            for name, module in modules.items()
        }
        self._trained = {
            name: [p for p in engine.module.parameters() if p.requires_grad] for name, engine in self._engines.items()
        }
        self.turn = next(iter(self._engines))
        self.applied = dict.fromkeys(self._engines, 0)

    def __getitem__(self, name: str) -> Engine:
        return self._engines[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)

    @property
    def several(self) -> bool:
        """Whether they have names."""
        return "" not in self._engines

    @property
    def model(self) -> Any:
        """What `Task.evaluate` gets: the engine, or all of them by name."""
        return self if self.several else self._engines[""]

    @property
    def updates(self) -> list[int]:
        """`applied` in the order of the networks."""
        return list(self.applied.values())

    @property
    def modules(self) -> list[nn.Module]:
        """The networks themselves."""
        return [engine.module for engine in self._engines.values()]

    @property
    def parts(self) -> list[Network]:
        """For checkpoints: of several, names of parameters begin with the network's."""
        return [
            Network(f"{name}." if name else "", e.engine, e.module, e.average.tensors if e.average else {})
            for name, e in self._engines.items()
        ]

    # ---- a step ----

    def set_step(self, step: int) -> None:
        """Steps done so far: the learning rate follows."""
        for engine in self._engines.values():
            engine.step_count = step

    def begin_step(self, global_count: float) -> None:
        """Says how many units the global batch has."""
        for engine in self._engines.values():
            engine.train()
            engine.begin_step(global_count)

    @contextmanager
    def taking(self, name: str) -> Iterator[Engine]:
        """Gives a network its turn. Gradients flow through the others' weights, not into them."""
        self.turn = name
        for other, engine in self._engines.items():
            engine.has_turn = other == name
        others = [p for other, trained in self._trained.items() if other != name for p in trained]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield self._engines[name]
        finally:
            for parameter in others:
                parameter.requires_grad_(True)
            for engine in self._engines.values():
                engine.has_turn = True

    def loss(self, task: Task, batch: Any) -> torch.Tensor:
        """The loss of the network whose turn it is.

        Raises:
            UserError: the task's `step` has none for it.
        """
        if not self.several:
            return task.loss(self._engines[""], batch)
        losses = task.step(self, batch)
        if self.turn not in losses:
            raise UserError(
                f"task: step returned {', '.join(map(repr, losses)) or 'nothing'} in the turn of {self.turn!r}; "
                "it must return that network's loss under its name"
            )
        return losses[self.turn]

    def together(self, results: Mapping[str, StepResult]) -> StepResult:
        """All turns' results as one: the loss is their sum, the norm that of all gradients, the rate the first's."""
        for name, result in results.items():
            self.applied[name] += int(result.applied)
        found = list(results.values())
        return StepResult(
            all(r.applied for r in found),
            all(r.finite for r in found),
            math.sqrt(sum(r.grad_norm**2 for r in found)) if len(found) > 1 else found[0].grad_norm,
            found[0].learning_rate,
            sum(r.loss for r in found),
            {name: result.loss for name, result in results.items()} if self.several else {},
        )

    # ---- between steps ----

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Those that keep a running average of their weights have it in place of them."""
        with ExitStack() as stack:
            for engine in self._engines.values():
                stack.enter_context(engine.averaged())
            yield

    def average_buffers(self) -> None:
        """See `fragments.average_buffers`."""
        for module in self.modules:
            average_buffers(module)

    def eval(self) -> None:
        """Dropout and BatchNorm as in evaluation."""
        for engine in self._engines.values():
            engine.eval()
