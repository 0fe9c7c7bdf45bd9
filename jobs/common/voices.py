"""Two networks for music of several voices: one makes notes out of noise, the other tells them from real ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from jobs.common.harmony import LOWEST, SPAN, STEPS, VOICES

__all__ = ["NOISE", "Discriminator", "Generator"]

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


class Discriminator(nn.Module):
    """Judges chords, pairs of chords and more, twice: by pitches, and by pitch classes above each of twelve tonics."""

    def __init__(self, width: int, narrow: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(VOICES * SPAN + 12, width)
        self.pair, self.three, self.whole = Near(width, 2), Near(width, 3), nn.Linear(STEPS * width, width)
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(3))
        self.by_tonic = nn.ModuleList([nn.Linear(24, narrow), Near(narrow, 2), Near(narrow, 3)])
        self.by_tonic_heads = nn.ModuleList(nn.Linear(narrow, 1) for _ in range(3))
        above = (torch.from_numpy(LOWEST)[:, None] + torch.arange(SPAN)).view(-1, 1) - torch.arange(12)
        classes = F.one_hot(above % 12, 12).float()
        bass = classes * (torch.arange(len(classes)) < SPAN)[:, None, None]
        # (pitches, 12 tonics x 24): how many voices have each class above a tonic, and which of them the bass has.
        self.register_buffer("tonics", torch.cat([classes, bass], 2).flatten(1))

    def forward(self, notes: torch.Tensor) -> torch.Tensor:
        """(rows, STEPS, VOICES, SPAN) -> (rows,)."""
        classes = notes.flatten(2) @ self.tonics
        chord = F.leaky_relu(self.first(torch.cat([notes.flatten(2), classes[..., :12]], 2)), 0.2)
        pair = F.leaky_relu(self.pair(chord), 0.2)
        whole = F.leaky_relu(self.whole(F.leaky_relu(self.three(pair), 0.2).flatten(1)), 0.2)
        said = [head(x).mean((1, 2)) for head, x in zip(self.heads, (chord, pair, whole[:, None]), strict=True)]
        return torch.stack(said).sum(0) + self._by_tonic(classes)

    def _by_tonic(self, classes: torch.Tensor) -> torch.Tensor:
        """Weights are one for all tonics: what is learned of a key is known of every other. The best tonics count."""
        x = classes.unflatten(2, (12, 24)).transpose(1, 2).flatten(0, 1)
        said = torch.zeros(len(x), device=x.device)
        for layer, head in zip(self.by_tonic, self.by_tonic_heads, strict=True):
            x = F.leaky_relu(layer(x), 0.2)
            said = said + head(x).mean((1, 2))
        return said.unflatten(0, (-1, 12)).logsumexp(1)
