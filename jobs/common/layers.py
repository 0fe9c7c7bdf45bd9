"""Layers of several networks; what a row becomes in them does not depend on the others of its batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["GroupResidual", "PixelNorm"]


class GroupResidual(nn.Module):
    """Two convolutions beside an identity, each after a normalization over groups of channels."""

    def __init__(self, width: int, groups: int = 8) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: (rows, width, side, side)
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class PixelNorm(nn.Module):
    """Normalises each pixel's channels (Karras et al., 2018)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()
