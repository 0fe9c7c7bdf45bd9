"""How many operations a forward pass takes, whatever the loss holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dltrain.training.flops import counting_flops

MODEL = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(4 * 36, 1))


def test_as_many_as_torch_counts() -> None:
    x = torch.randn(5, 1, 8, 8)
    with FlopCounterMode(display=False) as whole:
        MODEL(x)
    with counting_flops() as counter:
        MODEL(x)
    assert counter.get_total_flops() == whole.get_total_flops() == 2 * 5 * (4 * 36 * 9 + 4 * 36)


def test_a_gradient_by_the_input_may_be_part_of_the_loss() -> None:
    """R1, as GANs have it; with torch's own tracker of modules it raises."""

    def loss() -> torch.Tensor:
        x = torch.randn(5, 1, 8, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(MODEL(x).sum(), x, create_graph=True)
        return slope.square().mean()

    with counting_flops() as counter:
        found = loss()
    found.backward()
    assert counter.get_total_flops() > 2 * 5 * (4 * 36 * 9 + 4 * 36)
    with pytest.raises(RuntimeError, match="leaf node"), FlopCounterMode(display=False):
        loss()
