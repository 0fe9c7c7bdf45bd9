"""A transformer that reads one text and writes another: encoder, decoder, and copying from what was read.

model = Seq2Seq(size=800, width=128, layers=2, heads=4, groups=2)
chances = model(source, target)                    # log-probabilities (rows, length, size) of what follows target
texts = write(model, source, begin, end, most=32)  # the likeliest piece each time

Padding is 0. Each piece comes from the vocabulary or from a place of the source, as a gate says: See and others,
"Get to the point", arXiv:1704.04368.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from jobs.common.attention import Block
from jobs.common.repeats import banned

__all__ = ["PAD", "Seq2Seq", "token_losses", "write"]

PAD = 0


class Seq2Seq(nn.Module):
    """Both texts in one vocabulary, whose vectors the output shares."""

    def __init__(
        self, size: int, width: int = 128, layers: int = 2, heads: int = 4, groups: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(size, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.encoder = nn.ModuleList(Block(width, heads, groups, dropout=dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(Block(width, heads, groups, cross=True, dropout=dropout) for _ in range(layers))
        self.read, self.said = nn.RMSNorm(width), nn.RMSNorm(width)
        self.point, self.gate = nn.Linear(width, width, bias=False), nn.Linear(width, 1)

    def forward(self, source: torch.Tensor, target: torch.Tensor, cache: Any = None) -> torch.Tensor:
        # there: (rows, 1, 1, length of the source)
        there = (source != PAD)[:, None, None]
        memory = cache["memory"] if cache and "memory" in cache else self._encoded(source, there)
        if cache is not None:
            cache["memory"] = memory
        x = self._vectors(target)
        for block in self.decoder:
            x = block(x, None, memory, there, cache)
        x = self.said(x)
        return self._mixed(x, memory, source, there[:, 0])

    def _vectors(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.embed(tokens) * math.sqrt(self.embed.embedding_dim)
        return found

    def _encoded(self, source: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        x = self._vectors(source)
        for block in self.encoder:
            x = block(x, there)
        found: torch.Tensor = self.read(x)
        return found

    def _mixed(self, x: torch.Tensor, memory: torch.Tensor, source: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """Logarithms of both ways' chances together, in fp32."""
        written = F.linear(x, self.embed.weight).float().log_softmax(-1)
        # (rows, target, source): where in the source the next piece is.
        places = (self.point(x) @ memory.mT / math.sqrt(x.shape[-1])).float().masked_fill(~there, float("-inf"))
        pieces = source[:, None].expand_as(places)
        copied = torch.zeros_like(written).scatter_add(-1, pieces, places.softmax(-1))
        gate = self.gate(x).float()
        return torch.logaddexp(written + F.logsigmoid(gate), (copied + 1e-9).log() + F.logsigmoid(-gate))


def token_losses(chances: torch.Tensor, target: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Of (rows, length, size) log-probabilities the sum of losses at all pieces of `target` that are no padding."""
    there = target != PAD
    right = chances.gather(-1, target[..., None])[..., 0]
    return -(((1 - smoothing) * right + smoothing * chances.mean(-1)) * there).sum()


def write(model: Any, source: torch.Tensor, begin: torch.Tensor, end: int, most: int, run: int = 0) -> list[list[int]]:
    """Of each source a text, the likeliest piece after each, to its end or `most` pieces.

    Args:
        source: (rows, length); begin: (rows,), what each text begins with.
        run: so many pieces in a row come but once in a text; 0: they may come again.
    """
    cache, token = dict[Any, Any](), begin[:, None]
    rows: list[list[int]] = [[] for _ in range(len(source))]
    while rows and len(rows[0]) < most and not all(end in said for said in rows):
        chances = model(source, token, cache=cache)[:, -1]
        if run:
            for row, said in zip(chances, rows, strict=True):
                row[sorted(banned(said, run))] = float("-inf")
        token = chances.argmax(-1, keepdim=True)
        for said, piece in zip(rows, token[:, 0].tolist(), strict=True):
            said.append(piece)
    return [said[: said.index(end)] if end in said else said for said in rows]
