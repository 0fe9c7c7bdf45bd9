"""A detector without anchors: a small feature pyramid, what it is to say, and how boxes are read from it.

heat, edges = Pyramid(width=24, blocks=2, num_kinds=13)(image)      # a cell for each 4 x 4 pixels
boxes, kinds, scores = peaks(heat, edges, most=24, side=64)

Normalization is over groups of channels, so that what a row becomes does not depend on the others of its batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from jobs.common.layers import GroupResidual

__all__ = ["STRIDE", "Pyramid", "peaks", "targets"]

STRIDE, GROUPS = 4, 8
# What a cell's chance of being a centre is to begin with (Lin et al., Focal Loss, 2017).
PRIOR = 0.01


class Pyramid(nn.Module):
    """Cells of 2, 4 and 8 pixels, and what the coarse ones saw given back to those of 4."""

    def __init__(self, width: int, blocks: int, num_kinds: int) -> None:
        super().__init__()
        fine, wide = 2 * width, 4 * width
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, padding=1), GroupResidual(width), nn.Conv2d(width, fine, 2, 2)
        )
        self.middle = nn.Sequential(*(GroupResidual(fine) for _ in range(blocks)))
        coarse = [GroupResidual(wide) for _ in range(blocks)]
        self.coarse = nn.Sequential(nn.Conv2d(fine, wide, 2, 2), *coarse, nn.ConvTranspose2d(wide, fine, 2, 2))
        self.join = nn.Sequential(GroupResidual(fine), nn.GroupNorm(GROUPS, fine), nn.ReLU())
        self.head = nn.Conv2d(fine, num_kinds + 4, 1)
        nn.init.constant_(self.head.bias[:num_kinds], -math.log(1 / PRIOR - 1))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, 1, side, side) -> logits (rows, kinds, cells, cells), edges (rows, 4, cells, cells).

        Edges are left, top, right, bottom, in cells away from a cell's centre.
        """
        seen = self.middle(self.stem(image))
        said = self.head(self.join(seen + self.coarse(seen))).float()
        return said[:, :-4], said[:, -4:]


def targets(
    scenes: torch.Tensor, kinds: torch.Tensor, boxes: torch.Tensor, *, count: int, num_kinds: int, side: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `Pyramid` is to say.

    Args:
        scenes, kinds: (things,); boxes: (things, 4) left, top, right, bottom in pixels; count: of scenes.

    Returns:
        heat (count, num_kinds, cells, cells), 1 at centres and less around them; cells (things, 2), y and x of the
        centres; edges (things, 4), in cells away from there.
    """
    cells = side // STRIDE
    low, high = boxes[:, :2] / STRIDE, boxes[:, 2:] / STRIDE
    # x and y, as in boxes.
    at = ((low + high) / 2).long().clamp(0, cells - 1)
    # A sixth of a thing is a standard deviation: none of the heat is outside of it.
    far = (torch.arange(cells)[None, :, None] - at[:, None]) / ((high - low) / 6)[:, None]
    near = (-(far**2) / 2).exp()
    heat = torch.zeros(count * num_kinds, cells, cells)
    for where, x, y in zip((scenes * num_kinds + kinds).tolist(), near[..., 0], near[..., 1], strict=True):
        heat[where] = torch.maximum(heat[where], y[:, None] * x)
    middle = at + 0.5
    edges = torch.cat([middle - low, high - middle], 1)
    return heat.view(count, num_kinds, cells, cells), at.flip(1), edges


def peaks(heat: torch.Tensor, edges: torch.Tensor, most: int, side: int) -> tuple[torch.Tensor, ...]:
    """Boxes (rows, most, 4) in pixels, kinds and scores (rows, most): the highest cells that top those around them."""
    chance, cells = heat.sigmoid(), heat.shape[-1]
    top = chance * (F.max_pool2d(chance, 3, 1, 1) == chance)
    scores, places = top.flatten(1).topk(most)
    kinds, cell = places // cells**2, places % cells**2
    y, x = cell // cells, cell % cells
    # (rows, most, 4)
    away = edges.flatten(2).gather(2, cell[:, None].expand(-1, 4, -1)).transpose(1, 2) * STRIDE
    middle = (torch.stack([x, y], -1) + 0.5) * STRIDE
    boxes = torch.cat([middle - away[..., :2], middle + away[..., 2:]], -1).clamp(0, side)
    return boxes, kinds, scores
