"""The transformer block: attention with rotary positions and shared keys and values, by torch's fused kernel.

block = Block(width=128, heads=4, groups=2)             # of a decoder or an encoder; cross=True looks at another text
x = block(x, mask)                                      # mask: (rows, 1, length, length), True where it may look
mask = causal(segments)                                 # of packed rows: within a text, backwards
x = block(x, cache=cache)                               # cache: {}, keeps what was read; x holds what comes next

Rotary positions: Su and others, arXiv:2104.09864. Grouped queries: Ainslie and others, arXiv:2305.13245.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Attention", "Block", "causal", "rotate"]


def rotate(x: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Turns pairs of numbers by angles that grow with the position: products then tell how far apart two are.

    Args:
        x: (rows, heads, length, size); first: position of the first.
    """
    half = x.shape[-1] // 2
    speeds = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(first, first + x.shape[-2], device=x.device)[:, None] * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def causal(segments: torch.Tensor) -> torch.Tensor:
    """(rows, 1, length, length): who may look where, in rows of several texts numbered by `segments`."""
    same = segments[:, :, None] == segments[:, None, :]
    return same.tril()[:, None]


class Attention(nn.Module):
    """Queries of `heads`, keys and values of `groups`, each of which several heads share."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * groups * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, mask: Any = None, memory: Any = None, cache: Any = None) -> torch.Tensor:
        first = cache[self][0].shape[2] if cache is not None and memory is None and self in cache else 0
        query = self._split(self.query(x), self.heads)
        query = query if memory is not None else rotate(query, first)
        key, value = self._keys(x if memory is None else memory, memory is None, first, cache)
        # Without a mask several that come at once look back; one looks at all.
        back = mask is None and memory is None and x.shape[1] > 1
        mixed = F.scaled_dot_product_attention(query, key, value, mask, is_causal=back, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _keys(self, x: torch.Tensor, own: bool, first: int, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not own and cache is not None and self in cache:
            found: tuple[torch.Tensor, torch.Tensor] = cache[self]
            return found
        key, value = (self._split(part, self.groups) for part in self.key_value(x).chunk(2, -1))
        if own:
            key = rotate(key, first)
        if cache is not None:
            if self in cache:
                key, value = (torch.cat(pair, 2) for pair in zip(cache[self], (key, value), strict=True))
            cache[self] = (key, value)
        return key, value

    def _split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.unflatten(-1, (heads, self.size)).transpose(1, 2)


class Block(nn.Module):
    """Attention, with `cross` a second one at `memory`, then a gated network; each beside an identity."""

    def __init__(self, width: int, heads: int, groups: int, cross: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.attend, self.norm = Attention(width, heads, groups), nn.RMSNorm(width)
        self.look, self.look_norm = (Attention(width, heads, groups), nn.RMSNorm(width)) if cross else (None, None)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down, self.mix_norm = nn.Linear(2 * width, width, bias=False), nn.RMSNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, x: torch.Tensor, mask: Any = None, memory: Any = None, memory_mask: Any = None, cache: Any = None
    ) -> torch.Tensor:
        x = x + self.drop(self.attend(self.norm(x), mask, cache=cache))
        if self.look is not None and self.look_norm is not None:
            x = x + self.drop(self.look(self.look_norm(x), memory_mask, memory, cache))
        y = self.mix_norm(x)
        return x + self.drop(self.down(F.silu(self.gate(y)) * self.up(y)))
