"""The numbers of an optimizer: saved by name, put back as what they were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dltrain.checkpoint.fragments import sources
from dltrain.checkpoint.numbers import is_another, numbers, set_numbers
from dltrain.errors import CheckpointError


class Counts(torch.optim.SGD):
    """Keeps count in its group, as schedule-free ones do."""

    def __init__(self, parameters: Any, **more: Any) -> None:
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            group.update(k=0, weight_sum=0.0)
        self.defaults.update(k=0, weight_sum=0.0)

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += 0.5


def engine_of(kind: Any, **options: Any) -> Any:
    module = nn.Linear(3, 2)
    optimizer = kind(module.parameters(), **options)
    return SimpleNamespace(
        module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0, fp16_enabled=lambda: False
    )


def stepped(engine: Any, times: int) -> Any:
    for _ in range(times):
        engine.module(torch.ones(1, 3)).sum().backward()
        engine.optimizer.step()
    return engine


def test_a_count_of_steps_goes_on_as_a_tensor() -> None:
    saved = numbers(stepped(engine_of(torch.optim.AdamW), 3))
    assert saved == {"class:AdamW": 1.0, "tensor:step": 3.0}
    other = stepped(engine_of(torch.optim.AdamW), 1)
    set_numbers(other, saved)
    assert [float(state["step"]) for state in other.optimizer.state.values()] == [3.0, 3.0]


def test_what_is_counted_in_a_group_goes_on() -> None:
    saved = numbers(stepped(engine_of(Counts), 4))
    assert saved == {"class:Counts": 1.0, "group.0.int:k": 4.0, "group.0.float:weight_sum": 2.0}
    other = engine_of(Counts)
    assert numbers(other) == {"class:Counts": 1.0}
    set_numbers(other, saved)
    group = other.optimizer.param_groups[0]
    assert (group["k"], type(group["k"]), group["weight_sum"]) == (4, int, 2.0)


def test_another_optimizer_is_told_apart() -> None:
    saved = numbers(stepped(engine_of(torch.optim.AdamW), 2))
    assert not is_another(engine_of(torch.optim.Adam), saved)
    assert is_another(engine_of(torch.optim.NAdam), saved)
    assert not is_another(engine_of(torch.optim.NAdam), {})
    other = stepped(engine_of(torch.optim.NAdam), 1)
    set_numbers(other, saved, afresh=True)
    assert [float(state["step"]) for state in other.optimizer.state.values()] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "shape", "said"), [("ema", (2, 3), "a name that checkpoints use"), ("row", (2,), "keeps 2 numbers")]
)
def test_state_that_can_not_be_saved_is_refused(name: str, shape: tuple[int, ...], said: str) -> None:
    engine = engine_of(torch.optim.SGD, lr=0.1)
    engine.optimizer.state[engine.module.weight][name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=said):
        sources(engine, 0, 1)
