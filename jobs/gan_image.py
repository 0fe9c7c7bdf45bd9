"""Handwritten digits out of noise: a DCGAN that a classifier judges.

python -m jobs.gan_image make-data .data/gan_image        # and trains the classifier: judge.safetensors
dltrain run jobs/gan_image.yaml
dltrain predict gan-image --count 64 --out made           # a sheet of digits, PNG
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Keys, Sum, Task
from jobs.common import judge
from jobs.common.data import main, write_splits
from jobs.common.digits import LEVELS, SIDE, digit_splits
from jobs.common.figures import Goal
from jobs.common.frechet import frechet, moments
from jobs.common.layers import PixelNorm
from jobs.common.slopes import r1
from jobs.image_cnn import ImageCnn

GOALS = (
    Goal("classes present", "classes", 10),
    Goal("Frechet distance, of noise's", "distance", 0.25, at_least=False),
)
NOISE = 64
# Digits that are made for each scan in an evaluation, so that what is measured is the network and not the draw.
EACH = 2
# A class is present if so many of what is made belong to it, by a judge who is so sure.
PRESENT, SURE = 0.02, 0.9


def generator(width: int) -> nn.Module:
    """(rows, NOISE) -> (rows, 1, SIDE, SIDE) in [0, 1] (Radford et al., 2016)."""
    layers: list[nn.Module] = [nn.Linear(NOISE, 16 * width), nn.Unflatten(1, (4 * width, 2, 2)), PixelNorm(), nn.ReLU()]
    for factor in (4, 2):
        deeper = nn.ConvTranspose2d(factor * width, factor // 2 * width, 4, stride=2, padding=1)
        layers += [deeper, PixelNorm(), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1), nn.Sigmoid())


def discriminator(width: int) -> nn.Module:
    """(rows, 1, SIDE, SIDE) in [0, 1] -> (rows, 1)."""
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.LeakyReLU(0.2)]
    for factor in (1, 2):
        layers += [nn.Conv2d(factor * width, 2 * factor * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 1))


class GanImage(Task):
    """Two networks that train each other; R1 penalty (Mescheder et al., 2018)."""

    columns = ("image", "held")

    def __init__(self, judge: str, width: int = 32, penalty: float = 1.0) -> None:
        self.url, self.width, self.penalty = judge, width, penalty

    @cached_property
    def judge(self) -> nn.Sequential:
        return judge.load(self.url, ImageCnn())

    def build(self) -> dict[str, nn.Module]:
        return {"discriminator": discriminator(self.width), "generator": generator(self.width)}

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        pixels = np.stack([np.frombuffer(p.as_buffer(), np.uint8) for p in rows["image"]])
        real = torch.from_numpy(pixels.reshape(-1, 1, SIDE, SIDE).astype(np.float32) / np.float32(LEVELS))
        # Drawn by row, so that any number of workers makes the same.
        rngs = [keys.rng(row) for row in range(len(pixels))]
        noise = torch.from_numpy(np.stack([rng.normal(size=(EACH, NOISE)) for rng in rngs])).float()
        chance = torch.from_numpy(np.stack([rng.random((1, SIDE, SIDE)) for rng in rngs])).float()
        held = torch.from_numpy(rows["held"].to_numpy(zero_copy_only=False))
        return Batch(len(pixels), real=real, held=held, noise=noise, chance=chance)

    def step(self, networks: Any, batch: Batch) -> dict[str, torch.Tensor]:
        d, g = networks["discriminator"], networks["generator"]
        if networks.turn == "generator":
            return {"generator": F.softplus(-d(g(batch.noise[:, 0]))).mean()}
        with torch.no_grad():
            made = g(batch.noise[:, 0])
        loss = (F.softplus(-d(batch.real)) + F.softplus(d(made))).mean()
        return {"discriminator": loss + self.penalty / 2 * r1(d, batch.real, len(made))}

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        made, chances = judge.judged(self.judge, model["generator"](batch.noise.flatten(0, 1)))
        kinds = {"noise": batch.chance, "learned": batch.real[~batch.held], "held": batch.real[batch.held]}
        found = moments("made", made)
        for kind, pictures in kinds.items():
            found |= moments(kind, judge.judged(self.judge, pictures)[0])
        sure = F.one_hot(chances.argmax(1), 10) * (chances > SURE)
        return {**found, "shares": Sum(sure.sum(0).double().cpu().numpy(), len(made))}

    def metrics(self, means: Mapping[str, Any]) -> dict[str, float]:
        shares = means["shares"]
        kinds = {"frechet": "made", "frechet_of_noise": "noise", "frechet_of_real": "learned"}
        found = {name: frechet(means, kind, "held") for name, kind in kinds.items()}
        present = {"classes": float((shares >= PRESENT).sum()), "rarest": float(shares.min())}
        return {"distance": found["frechet"] / found["frechet_of_noise"], **found, **present}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        made = model["generator"](batch.noise.flatten(0, 1)[:64])
        return [_sheet(made, "made"), _sheet(batch.real[:64], "scans that were not learned from")]

    def generate(self, model: Any, count: int) -> list[Artifact]:
        return [_sheet(model["generator"](torch.randn(count, NOISE)), f"{count} digits")]


def _sheet(pictures: torch.Tensor, caption: str) -> Artifact:
    from jobs.common.pictures import tiles

    return Artifact.image(tiles(pictures[:, 0].float().cpu().numpy(), zoom=5), caption)


def make_data(url: str, epochs: int = 16) -> dict[str, int]:
    """Writes scans under url/train and url/eval, and a classifier of the former; returns rows by split.

    Args:
        epochs: of the classifier.
    """
    splits = digit_splits()
    judge.save(url, judge.train(ImageCnn(), splits["train"], epochs))
    # The evaluation has both kinds: what is learned from and what is not are some distance apart, too.
    held, learned = (
        splits[name].append_column("held", pa.array([name == "test"] * len(splits[name]))) for name in ("test", "train")
    )
    return write_splits(url, {"train": learned, "eval": pa.concat_tables([held, learned])}, rows_per_group=32)


if __name__ == "__main__":
    main(make_data)
