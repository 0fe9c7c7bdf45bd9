"""Two networks for music of several voices: one makes notes out of noise, the other tells them from real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from jobs.common.harmony import LOWEST, SPAN, STEPS, VOICES

__all__ = ["NOISE", "Discriminator", "Generator"]

NOISE = 64


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
    """Noise as pitches: one of each voice's in each step."""

    def __init__(self, width: int, layers: int = 3) -> None:
        super().__init__()
        mapping = [nn.Linear(NOISE, 256), nn.LeakyReLU(0.2), nn.Linear(256, 256), nn.LeakyReLU(0.2)]
        self.first = nn.Sequential(*mapping, nn.Linear(256, STEPS * width))
        self.layers = nn.ModuleList(Near(width, 3) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))
        self.head = nn.Linear(width, VOICES * SPAN)

    def forward(self, noise: torch.Tensor, dice: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, NOISE) -> (rows, STEPS, VOICES, SPAN): ones and zeros, with the gradient of their probabilities.

        Args:
            dice: of the result's shape, from a Gumbel distribution: pitches are drawn by their probabilities (Jang et
                al., 2017). Without it they are the likeliest ones.
        """
        x = self.first(noise).unflatten(1, (STEPS, -1))
        for layer, norm in zip(self.layers, self.norms, strict=False):
            x = x + F.leaky_relu(layer(norm(x)), 0.2)
        logits = self.head(self.norms[-1](x)).unflatten(2, (VOICES, SPAN)).float()
        logits = logits if dice is None else logits + dice
        chances = logits.softmax(-1)
        return F.one_hot(logits.argmax(-1), SPAN) + chances - chances.detach()


class Discriminator(nn.Module):
    """Judges chords, pairs of chords and the whole, by pitches and by how many voices have each pitch class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(VOICES * SPAN + 12, width)
        self.pair, self.three, self.whole = Near(width, 2), Near(width, 3), nn.Linear(STEPS * width, width)
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(3))
        pitches = torch.from_numpy(LOWEST)[:, None] + torch.arange(SPAN)
        self.register_buffer("classes", F.one_hot(pitches.flatten() % 12, 12).float())

    def forward(self, notes: torch.Tensor) -> torch.Tensor:
        """(rows, STEPS, VOICES, SPAN) -> (rows,)."""
        flat = notes.flatten(2)
        chord = F.leaky_relu(self.first(torch.cat([flat, flat @ self.classes], 2)), 0.2)
        pair = F.leaky_relu(self.pair(chord), 0.2)
        whole = F.leaky_relu(self.whole(F.leaky_relu(self.three(pair), 0.2).flatten(1)), 0.2)
        said = [head(x) for head, x in zip(self.heads, (chord, pair, whole[:, None]), strict=True)]
        return torch.stack([one.mean((1, 2)) for one in said]).sum(0)
