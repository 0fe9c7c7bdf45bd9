"""Colour pictures without what does not matter: changed at random, each by its own generator, and without their light.

varied(batch.image, batch.keys)      # in training: the same for the same seed, epoch and row, on any rank
contrast(batch.image)                # always
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dltrain import Keys

__all__ = ["contrast", "varied"]


def varied(
    images: torch.Tensor,
    keys: Keys,
    *,
    shift: float = 0.15,
    squeeze: float = 0.15,
    lean: float = 0.1,
    shade: float = 0.6,
) -> torch.Tensor:
    """Moved, squeezed, leaning, as in a mirror or not, and darker towards one side.

    Args:
        images: (rows, colours, side, side) in [0, 1].
        shift: at most, of half the side. squeeze: at most, each way by itself. lean: at most, in radians.
        shade: how much of the light the dark side lacks at most.
    """
    # (rows, 8) in [-1, 1].
    drawn = np.stack([keys.rng(row).uniform(-1, 1, 8) for row in range(len(images))]).astype(np.float32)
    x, y, wide, high, angle, mirror, side, dark = torch.from_numpy(drawn).to(images.device).unbind(1)
    wide, high = (1 + squeeze * wide) * torch.where(mirror < 0, -1, 1), 1 + squeeze * high
    cos, sin = (lean * angle).cos(), (lean * angle).sin()
    # From a place on the new picture to the one that is seen there.
    seen = torch.stack(
        [torch.stack([wide * cos, -high * sin, shift * x], 1), torch.stack([wide * sin, high * cos, shift * y], 1)], 1
    )
    moved = F.grid_sample(
        images, F.affine_grid(seen, list(images.shape), align_corners=False), padding_mode="border", align_corners=False
    )
    # From 0 on one side to 1 on the other, whichever that is.
    across = torch.linspace(-1, 1, images.shape[-1], device=images.device)
    cos, sin = (torch.pi * side).cos()[:, None, None], (torch.pi * side).sin()[:, None, None]
    far = ((cos * across + sin * across[:, None]).clamp(-1, 1) + 1) / 2
    return moved * (1 - shade * dark.abs()[:, None, None] * far)[:, None]


def contrast(image: torch.Tensor, around: int = 9) -> torch.Tensor:
    """(rows, colours, side, side) -> (rows, 1, side, side): grey less the mean around it, in standard deviations.

    What light does to a place is much the same for those around it (Jarrett et al., 2009).
    """
    grey = F.pad(image.mean(1, keepdim=True), (around // 2,) * 4, mode="replicate")
    mean, square = (F.avg_pool2d(one, around, 1) for one in (grey, grey**2))
    middle = grey[..., around // 2 : -(around // 2), around // 2 : -(around // 2)]
    return (middle - mean) / ((square - mean**2).clamp(min=0).sqrt() + 0.02)
