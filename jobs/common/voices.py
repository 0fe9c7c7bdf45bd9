"""A network that makes music of several voices out of noise; `listener` has the one that judges it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from jobs.common.harmony import SPAN, STEPS, VOICES

__all__ = ["NOISE", "Generator", "Near"]

# Of a piece's noise, what all steps share, and each step's own.
SHARED, OWN = 64, 16
NOISE = SHARED + STEPS * OWN


class Near(nn.Module):
    """A linear layer over a few neighbouring steps: a convolution that is quick on a CPU."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.linear, self.steps = nn.Linear(steps * width, width), steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: (rows, steps, width)
        before = self.steps // 2
        padded = F.pad(x, (0, 0, before, self.steps - 1 - before))
        return self.linear(torch.cat([padded[:, i : i + x.shape[1]] for i in range(self.steps)], -1))


class Generator(nn.Module):
    """Noise as pitches: one of each voice's in each step, which the voices above it know."""

    def __init__(self, width: int, layers: int = 3) -> None:
        super().__init__()
        mapping = [nn.Linear(SHARED, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2)]
        self.first = nn.Sequential(*mapping, nn.Linear(256, STEPS * width))
        self.own = nn.Linear(OWN, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), Near(width, 3)) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.below = nn.ModuleList(nn.Linear(voice * SPAN, width) for voice in range(1, VOICES))
        self.voices = nn.ModuleList(nn.Linear(width, width) for _ in range(VOICES))
        self.heads = nn.ModuleList(nn.Linear(width, SPAN) for _ in range(VOICES))

    def forward(self, noise: torch.Tensor, dice: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, NOISE) -> (rows, STEPS, VOICES, SPAN): ones and zeros, with the gradient of their probabilities.

        Args:
            dice: of the result's shape, from a Gumbel distribution: pitches are drawn by their probabilities (Jang et
                al., 2017). Without it they are the likeliest ones.
        """
        shared, own = noise.split((SHARED, STEPS * OWN), 1)
        x = self.first(shared).unflatten(1, (STEPS, -1)) + self.own(own.unflatten(1, (STEPS, OWN)))
        for layer in self.layers:
            x = x + F.leaky_relu(layer(x), 0.2)
        x = self.norm(x)
        notes: list[torch.Tensor] = []
        for i, (voice, head) in enumerate(zip(self.voices, self.heads, strict=True)):
            y = x + self.below[i - 1](torch.cat(notes, -1)) if notes else x
            logits = head(y + F.leaky_relu(voice(y), 0.2)).float() + (0.0 if dice is None else dice[:, :, i])
            chances = logits.softmax(-1)
            notes.append(F.one_hot(logits.argmax(-1), SPAN) + chances - chances.detach())
        return torch.stack(notes, 2)
