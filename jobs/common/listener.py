"""A network that tells music of several voices from what was made: each piece, and several of them together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from jobs.common.harmony import LOWEST, SPAN, STEPS, VOICES
from jobs.common.voices import Near

__all__ = ["Discriminator"]

# Pieces that are judged together: neighbours on a worker, so that which ones depends on how many workers there are.
GROUP = 8


class Discriminator(nn.Module):
    """Judges chords, pairs of chords and more, twice: by pitches, and by pitch classes above each of twelve tonics.

    Nobody can tell of a single piece that a chord is too rare in it: what the pieces of a group have on average is
    judged as well (Lin et al., 2018).
    """

    def __init__(self, width: int, narrow: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(VOICES * SPAN + 12, width)
        self.pair, self.three, self.whole = Near(width, 2), Near(width, 3), nn.Linear(STEPS * width, width)
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(3))
        self.by_tonic = nn.ModuleList([nn.Linear(24, narrow), Near(narrow, 2), Near(narrow, 3)])
        self.by_tonic_heads = nn.ModuleList(nn.Linear(narrow, 1) for _ in range(3))
        judging = [nn.Linear(3 * narrow, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2)]
        self.of_groups = nn.Sequential(*judging, nn.Linear(64, 1))
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
        by_tonic, heard = self.hear(classes)
        return torch.stack(said).sum(0) + by_tonic + self._of_groups(heard)

    def hear(self, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is said of each piece, (rows,), and what was heard in it, (rows, 3 * narrow).

        Weights are one for all tonics: what is learned of a key is known of every other. The best tonics count.
        """
        x = classes.unflatten(2, (12, 24)).transpose(1, 2).flatten(0, 1)
        said, heard = torch.zeros(len(x), device=x.device), []
        for layer, head in zip(self.by_tonic, self.by_tonic_heads, strict=True):
            x = F.leaky_relu(layer(x), 0.2)
            said = said + head(x).mean((1, 2))
            heard.append(x.mean(1))
        said = said.unflatten(0, (-1, 12))
        by_tonic = torch.cat(heard, 1).unflatten(0, (-1, 12))
        return said.logsumexp(1), (said.softmax(1).unsqueeze(2) * by_tonic).sum(1)

    def _of_groups(self, heard: torch.Tensor) -> torch.Tensor:
        groups = heard.tensor_split(max(1, len(heard) // GROUP))
        # Not a mean: of no rows at all it would be no number.
        return torch.cat([self.of_groups(g.sum(0) / max(1, len(g))).expand(len(g)) for g in groups])
