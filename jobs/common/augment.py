"""Colour pictures changed at random, each by its own generator, so that a network does not learn what does not matter.

varied(batch.image, batch.keys)      # the same for the same seed, epoch and row, on any rank
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dltrain import Keys

__all__ = ["varied"]


def varied(
    images: torch.Tensor, keys: Keys, *, shift: float = 0.15, squeeze: float = 0.15, lean: float = 0.1, shade: float = 0.6
) -> torch.Tensor:
    """Moved, squeezed, turned over or not, and darkened towards one side.

    Args:
        images: (rows, colours, height, width) in [0, 1].
        shift: at most, of half the width and height. squeeze: by at most this factor less one, each way by itself.
        lean: at most, in radians. shade: what light the dark side lacks, at most.
    """
    # (rows, 9), in [-1, 1].
    drawn = torch.from_numpy(np.stack([keys.rng(i).uniform(-1, 1, 9) for i in range(len(images))])).float()
    x, y, wide, high, angle, flip, side, rise, dark = drawn.to(images.device).unbind(1)
    scale_x, scale_y = (1 + squeeze * wide) * flip.sign(), 1 + squeeze * high
    cos, sin = (lean * angle).cos(), (lean * angle).sin()
    rows = [torch.stack([scale_x * cos, -sin, shift * x], 1), torch.stack([sin, scale_y * cos, shift * y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    # From -1 at one side to 1 at the other, in any direction.
    size = images.shape[-1]
    ramp = torch.linspace(-1, 1, size, device=images.device)
    turn = torch.pi * side
    along = (turn.cos()[:, None, None] * ramp + turn.sin()[:, None, None] * ramp[:, None]).clamp(-1, 1)
    light = 1 - shade * (dark.abs()[:, None, None]) * (along + 1) / 2
    return moved * light[:, None] * (1 + 0.2 * rise)[:, None, None, None]
