"""Two networks for clips of an action: one makes them out of noise, the other tells them from real ones."""

from __future__ import annotations

import torch
from torch import nn

from jobs.common.clips import ACTIONS, FRAMES, SIZE
from jobs.common.layers import PixelNorm

__all__ = ["NOISE", "ClipDiscriminator", "ClipGenerator"]

NOISE, MOTION = 64, 16
# Of so many frames one is looked at by itself.
EACH = 3


class ClipGenerator(nn.Module):
    """What is seen comes from the noise and stays; how it moves comes from the action, too (Tulyakov et al., 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.action = nn.Embedding(len(ACTIONS), NOISE)
        moves = [nn.Linear(2 * NOISE, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2)]
        self.moves = nn.Sequential(*moves, nn.Linear(128, FRAMES * MOTION))
        self.first = nn.Linear(NOISE + MOTION, 8 * width * (SIZE // 8) ** 2)
        layers: list[nn.Module] = [nn.Unflatten(1, (8 * width, SIZE // 8, SIZE // 8)), PixelNorm(), nn.ReLU()]
        # Larger first, then a convolution: a transposed one leaves specks (Odena et al., 2016).
        for factor in (8, 4):
            deeper = nn.Conv2d(factor * width, factor // 2 * width, 3, padding=1)
            layers += [nn.Upsample(scale_factor=2), deeper, PixelNorm(), nn.ReLU()]
        last = [nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, 1, 3, padding=1), nn.Sigmoid()]
        self.frames = nn.Sequential(*layers, *last)

    def forward(self, noise: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """(rows, NOISE) and (rows,) of ACTIONS -> (rows, FRAMES, SIZE, SIZE) in [0, 1]."""
        path = self.moves(torch.cat([noise, self.action(action)], 1)).unflatten(1, (FRAMES, MOTION))
        seen = torch.cat([noise[:, None].expand(-1, FRAMES, -1), path], 2)
        return self.frames(self.first(seen.flatten(0, 1))).unflatten(0, (-1, FRAMES)).squeeze(2)


class ClipDiscriminator(nn.Module):
    """Sees all frames at once, as channels, and some by themselves (Tulyakov et al., 2018).

    The action has part in it by a projection (Miyato and Koyama, 2018).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = _seen(FRAMES, 2 * width, 128)
        self.shape = nn.Sequential(_seen(1, width, 64), nn.Linear(64, 1))
        self.real, self.action = nn.Linear(128, 1), nn.Embedding(len(ACTIONS), 128)
        nn.init.normal_(self.action.weight, std=128**-0.5)

    def forward(self, clips: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """(rows, FRAMES, SIZE, SIZE) in [0, 1] and (rows,) of ACTIONS -> (rows,)."""
        x, some = self.features(clips), clips[:, ::EACH]
        shapes = self.shape(some.reshape(-1, 1, SIZE, SIZE)).view(some.shape[:2]).mean(1)
        return self.real(x)[:, 0] + (x * self.action(action)).sum(1) + shapes


def _seen(channels: int, width: int, features: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for deeper in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(channels, deeper, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = deeper
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (SIZE // 8) ** 2, features), nn.LeakyReLU(0.2))
