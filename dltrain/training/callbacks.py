"""Callbacks: plain functions that a task wants called while it trains.

class Digits(Task):
    callbacks = (every(100, watch_weights), Callback(announce, when="eval"))

def watch_weights(moment: Moment) -> None:
    moment.log(weight_norm=sum(float(p.norm()) for p in moment.model.parameters()))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dltrain.errors import UserError

__all__ = ["Callback", "Moment", "When", "check_callbacks", "every"]

When = Literal["step", "eval", "checkpoint", "end"]


@dataclass(frozen=True)
class Moment:
    """What a callback is told.

    Attributes:
        when: step, eval, checkpoint or end.
        step: optimizer steps made; rank of num_ranks.
        loss: mean over the global batch of this step, nan where it is not one that was just made; losses: of each
            network, where there are several.
        metrics: of the last evaluation of this start.
        learning_rate: of this step.
        model: the network, or all of them by name. Under ZeRO 3 a parameter is a shard: call the network, on all ranks.
    """

    when: When
    step: int
    rank: int
    num_ranks: int
    loss: float
    losses: Mapping[str, float]
    metrics: Mapping[str, float]
    learning_rate: float
    model: Any
    logged: dict[str, float] = field(default_factory=dict)

    def log(self, **values: Any) -> None:
        """Figures for the report, the trackers and (the first 32 names) Prometheus; rank 0's are kept.

        Raises:
            UserError: one is not a number.
        """
        for name, value in values.items():
            try:
                self.logged[name] = float(value)
            except (TypeError, ValueError):
                kind = type(value).__name__
                raise UserError(f"callback: log({name}=...) got {kind}; what is logged must be a number") from None


@dataclass(frozen=True)
class Callback:
    """A function, and when it is called: on all ranks, in the order in which the task lists them.

    Args:
        function: takes a Moment. What it raises ends the run, like any exception of the task.
        every: only at steps that this divides.
        when: after a step, an evaluation, a checkpoint (its state is copied, not yet stored), or at the run's end.

    Raises:
        UserError: it can't be called, or never would be.
    """

    function: Callable[[Moment], object]
    every: int = 1
    when: When = "step"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise UserError(f"callback: found {type(self.function).__name__}; the first argument is a function")
        if not isinstance(self.every, int) or self.every < 1:
            raise UserError(f"callback: every is {self.every!r}; it must be a number of steps, 1 or more")
        if self.when not in get_args(When):
            raise UserError(f"callback: when is {self.when!r}; allowed: {', '.join(get_args(When))}")

    def is_due(self, when: str, step: int) -> bool:
        """Whether it is to be called now."""
        return when == self.when and (when == "end" or step % self.every == 0)


def every(steps: int, function: Callable[[Moment], object], when: When = "step") -> Callback:
    """`function` at every so-manieth step."""
    return Callback(function, steps, when)


def check_callbacks(found: Any) -> Sequence[Callback]:
    """A task's callbacks.

    Raises:
        UserError: they are something else.
    """
    if not isinstance(found, list | tuple) or not all(isinstance(item, Callback) for item in found):
        raise UserError(
            f"task: callbacks is {found!r}; it must be a list or tuple of every(STEPS, FUNCTION) or Callback(FUNCTION)"
        )
    return tuple(found)
