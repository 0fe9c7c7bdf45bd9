"""A decoder-only transformer: scores of each next piece of a text.

model = Decoder(size=1536, width=96, layers=2, heads=4, groups=2)
scores = model(tokens, segments)          # (rows, length, size); packed rows, segments number their texts
scores = model(tokens, cache=cache)       # cache: {}, keeps what was read; tokens are those that come next
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from jobs.common.attention import Block, causal

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """Scores of each next piece; pieces come in and go out by the same vectors."""

    def __init__(self, size: int, width: int = 96, layers: int = 2, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(size, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(Block(width, heads, groups) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: torch.Tensor, segments: Any = None, cache: Any = None) -> torch.Tensor:
        # tokens, segments: (rows, length); scores: (rows, length, size)
        mask = None if segments is None else causal(segments)
        x = self.embed(tokens) * math.sqrt(self.embed.embedding_dim)
        for block in self.blocks:
            x = block(x, mask, cache=cache)
        return F.linear(self.norm(x), self.embed.weight)
