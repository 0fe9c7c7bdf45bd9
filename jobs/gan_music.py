"""Chorales for four voices, out of noise: a GAN whose notes are chosen, not blended.

python -m jobs.gan_music make-data .data/gan_music
dltrain run jobs/gan_music.yaml
dltrain predict gan-music --count 4 --out made           # MIDI and WAV

What is made is measured by the notes of its key, its chords and how they change, against pieces that no network has
seen and against notes at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Keys, Sum, Task
from jobs.common.data import main, write_splits
from jobs.common.figures import Goal
from jobs.common.harmony import LOWEST, SPAN, STEPS, VOICES, chorale, chord_statistics
from jobs.common.listener import Discriminator
from jobs.common.slopes import r1
from jobs.common.voices import NOISE, Generator

# Distances from the real pieces' statistics, as parts of what notes at random have.
GOALS = tuple(
    Goal(f"{name}: distance, of noise's", name, 0.25, at_least=False) for name in ("in_key", "chords", "changes")
)
# One row in so many of a batch is penalised, as much stronger: the mean is the same.
PENALISED = 4


class GanMusic(Task):
    """Two networks that train each other; R1 penalty (Mescheder et al., 2018)."""

    columns = ("piece",)

    def __init__(self, width: int = 128, penalty: float = 1.0) -> None:
        self.width, self.penalty = width, penalty

    def build(self) -> dict[str, nn.Module]:
        return {"discriminator": Discriminator(self.width), "generator": Generator(self.width)}

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        pieces = np.stack(rows["piece"].to_pylist()).reshape(-1, STEPS, VOICES)
        rngs = [keys.rng(row) for row in range(len(pieces))]
        noise = torch.from_numpy(np.stack([rng.normal(size=NOISE) for rng in rngs])).float()
        chance = np.stack([rng.integers(SPAN, size=(STEPS, VOICES)) for rng in rngs]) + LOWEST
        chosen = torch.from_numpy((keys.ids + keys.epochs) % PENALISED == 0)
        # Drawn by row, so that any number of workers makes the same.
        dice = torch.from_numpy(np.stack([rng.gumbel(size=(STEPS, VOICES, SPAN)) for rng in rngs])).float()
        real = F.one_hot(torch.from_numpy(pieces - LOWEST), SPAN).float()
        return Batch(len(pieces), real=real, noise=noise, dice=dice, pieces=pieces, chance=chance, chosen=chosen)

    def step(self, networks: Any, batch: Batch) -> dict[str, torch.Tensor]:
        d, g = networks["discriminator"], networks["generator"]
        if networks.turn == "generator":
            return {"generator": F.softplus(-d(g(batch.noise, batch.dice))).mean()}
        with torch.no_grad():
            made = g(batch.noise, batch.dice)
        loss = (F.softplus(-d(batch.real)) + F.softplus(d(made))).mean()
        slopes = r1(d, batch.real[batch.chosen], len(made), PENALISED)
        return {"discriminator": loss + self.penalty / 2 * slopes}

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        halves = batch.pieces[::2], batch.pieces[1::2]
        kinds = {"made": _made(model, batch.noise), "chance": batch.chance, "real": batch.pieces}
        kinds |= {"even": halves[0], "odd": halves[1]} if len(halves[1]) else {}
        return {
            f"{kind} {name}": Sum(len(pieces) * shares, len(pieces))
            for kind, pieces in kinds.items()
            for name, shares in chord_statistics(pieces).items()
        }

    def metrics(self, means: Mapping[str, Any]) -> dict[str, float]:
        def distance(kind: str, name: str, other: str = "real") -> float:
            return float(np.abs(means[f"{kind} {name}"] - means[f"{other} {name}"]).sum() / 2)

        names = [name.removeprefix("made ") for name in means if name.startswith("made ")]
        found = {name: distance("made", name) / distance("chance", name) for name in names}
        floor = {f"{name}_of_real": distance("even", name, "odd") / distance("chance", name) for name in names}
        return {"distance": sum(found.values()), **found, **floor}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        from jobs.common.music import piano_roll, sound

        made = _made(model, batch.noise[:4])
        return [
            *(piano_roll(piece, f"made, {i + 1}") for i, piece in enumerate(made)),
            piano_roll(batch.pieces[0], "by rule"),
            *(sound(piece, f"made, {i + 1}") for i, piece in enumerate(made[:2])),
            sound(batch.pieces[0], "by rule"),
        ]

    def generate(self, model: Any, count: int) -> list[dict[str, Artifact]]:
        from jobs.common.music import midi, piano_roll, sound

        return [
            {"midi": midi(piece), "sound": sound(piece), "roll": piano_roll(piece)}
            for piece in _made(model, torch.randn(count, NOISE))
        ]


def _made(model: Any, noise: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(model["generator"](noise).argmax(-1).cpu().numpy() + LOWEST)


def make_data(url: str, train: int = 4000, test: int = 800) -> dict[str, int]:
    """Writes pieces under url/train and url/test; returns rows by split."""
    splits = {}
    for seed, (name, count) in enumerate({"train": train, "test": test}.items()):
        rng = np.random.default_rng(seed)
        pieces = np.stack([chorale(rng) for _ in range(count)]).astype(np.uint8)
        splits[name] = pa.table(
            {"piece": pa.array(list(pieces.reshape(count, -1)), pa.list_(pa.uint8(), STEPS * VOICES))}
        )
    return write_splits(url, splits)


if __name__ == "__main__":
    main(make_data)
