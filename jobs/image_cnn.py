"""Handwritten digits, a residual CNN.

python -m jobs.image_cnn make-data .data/digits      # or any URL: s3://bucket/digits
dltrain run jobs/image_cnn.yaml
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Batch, Keys, Sum, Task

SIDE = 8
# Digits come as 0-16 grey levels.
LEVELS = 16.0
TRAIN_ROWS = 1438
ROWS_PER_GROUP = 32
FILES = {"train": 4, "test": 1}


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

    def predict(self, model: Any, inputs: torch.Tensor) -> list[int]:
        return [int(digit) for digit in model(inputs).argmax(1)]

    def _shift(self, batch: Batch) -> torch.Tensor:
        """Moves each image by up to a pixel, as its own generator says."""
        moves = [batch.keys.rng(row).integers(0, 3, size=2) for row in range(len(batch.image))]
        padded = F.pad(batch.image, (1, 1, 1, 1))
        return torch.stack([p[:, y : y + SIDE, x : x + SIDE] for p, (y, x) in zip(padded, moves, strict=True)])


def make_data(url: str) -> dict[str, int]:
    """Writes scikit-learn's digits as Parquet under url/train and url/test; returns rows by split.

    The data carries no writer, so the split is contiguous: people who wrote the last scans are not in the first.
    """
    from sklearn.datasets import load_digits

    from dltrain.store import open_store

    digits = load_digits()
    images = digits.images.astype(np.uint8).reshape(len(digits.target), -1)
    table = pa.table(
        {
            "image": pa.array([row.tobytes() for row in images], pa.binary(SIDE * SIDE)),
            "label": pa.array(digits.target, pa.uint8()),
        }
    )
    splits = {"train": table.slice(0, TRAIN_ROWS), "test": table.slice(TRAIN_ROWS)}
    store = open_store(url)
    for split, rows in splits.items():
        size = -(-len(rows) // FILES[split])
        for i in range(FILES[split]):
            sink = io.BytesIO()
            pq.write_table(rows.slice(i * size, size), sink, row_group_size=ROWS_PER_GROUP)
            store.write(f"{split}/part-{i:05d}.parquet", sink.getvalue())
    return {split: len(rows) for split, rows in splits.items()}


if __name__ == "__main__":
    import sys

    match sys.argv[1:]:
        case ["make-data", target]:
            print(f"wrote {make_data(target)} rows to {target}")
        case _:
            sys.exit("usage: python -m jobs.image_cnn make-data URL")
