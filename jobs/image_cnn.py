"""Handwritten digits, a residual CNN.

python -m jobs.image_cnn make-data .data/digits      # or any URL: s3://bucket/digits
dltrain run jobs/image_cnn.yaml
dltrain predict image-cnn scans/*.png --out drawn    # any pictures of digits, dark on light or light on dark
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Input, Keys, Sum, Task
from dltrain.data import decode
from jobs.common.data import main, write_splits
from jobs.common.digits import LEVELS, SIDE, digit_splits
from jobs.common.figures import Goal

GOALS = (Goal("test accuracy", "accuracy", 0.98),)


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: (rows, width, side, side)
        y = self.conv1(F.relu(self.norm1(x)))
        return x + self.conv2(F.relu(self.norm2(y)))


class ImageCnn(Task):
    """Classifies 8 x 8 grey images into ten digits."""

    columns = ("image", "label")
    target_columns = ("label",)

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        self.width, self.blocks = width, blocks

    def build(self) -> nn.Module:
        stem = nn.Conv2d(1, self.width, 3, padding=1, bias=False)
        half = nn.Conv2d(self.width, 2 * self.width, 2, stride=2, bias=False)
        first = [Residual(self.width) for _ in range(self.blocks)]
        second = [Residual(2 * self.width) for _ in range(self.blocks)]
        head = [nn.BatchNorm2d(2 * self.width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(stem, *first, half, *second, *head, nn.Linear(2 * self.width, 10))

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        pixels = np.stack([np.frombuffer(p.as_buffer(), np.uint8) for p in rows["image"]])
        images = pixels.reshape(-1, 1, SIDE, SIDE).astype(np.float32) / LEVELS
        labels = rows["label"].to_numpy().astype(np.int64)
        return Batch(len(labels), image=torch.from_numpy(images), label=torch.from_numpy(labels), keys=keys)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(self._shift(batch)).float(), batch.label)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        logits = model(batch.image).float()
        right = (logits.argmax(1) == batch.label).sum().item()
        loss = F.cross_entropy(logits, batch.label, reduction="sum").item()
        return {"accuracy": Sum(right, batch.count), "loss": Sum(loss, batch.count)}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        guesses = model(batch.image).float().argmax(1).cpu()
        wrong = int((guesses != batch.label.cpu()).sum())
        from jobs.common.pictures import draw_sheet

        sheet = draw_sheet(batch.image[:, 0].cpu().numpy(), guesses.tolist(), batch.label.tolist())
        return [
            Artifact.image(sheet, f"{len(guesses)} test digits and what they were taken for; {wrong} wrong, in red")
        ]

    def read(self, source: Input) -> dict[str, bytes]:
        grey = decode.images(pa.array([source.data], pa.binary()), (SIDE, SIDE), "L")[0, :, :, 0].float()
        # In the data ink is high and paper 0: most of a picture's rim is paper.
        rim = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).median()
        ink = (grey - rim).abs()
        levels = ink * (LEVELS / ink.max().clamp(min=1.0))
        return {"image": levels.round().to(torch.uint8).numpy().tobytes()}

    def predict(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        chances, labels = model(batch.image).float().softmax(1).max(1)
        found = zip(labels.tolist(), chances.tolist(), strict=True)
        return [{"label": label, "probability": round(chance, 4)} for label, chance in found]

    def draw(self, batch: Batch, results: Sequence[dict[str, Any]]) -> list[Artifact]:
        from jobs.common.pictures import labelled

        return [labelled(pixels, **one) for pixels, one in zip(batch.image[:, 0].cpu().numpy(), results, strict=True)]

    def _shift(self, batch: Batch) -> torch.Tensor:
        """Moves each image by up to a pixel, as its own generator says."""
        moves = [batch.keys.rng(row).integers(0, 3, size=2) for row in range(len(batch.image))]
        padded = F.pad(batch.image, (1, 1, 1, 1))
        return torch.stack([p[:, y : y + SIDE, x : x + SIDE] for p, (y, x) in zip(padded, moves, strict=True)])


def make_data(url: str) -> dict[str, int]:
    """Writes the digits under url/train and url/test; returns rows by split."""
    return write_splits(url, digit_splits(), rows_per_group=32)


if __name__ == "__main__":
    main(make_data)
