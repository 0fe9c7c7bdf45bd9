"""Handwritten digits with dltrain: dltrain run digits.yaml"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Batch, Sum, Task


class Digits(Task):
    columns = ("image", "label")

    def build(self):
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def collate(self, rows, keys):
        pixels = np.stack([np.frombuffer(image, np.uint8) for image in rows["image"].to_pylist()])
        x = torch.from_numpy(pixels.astype(np.float32) / 16)
        y = torch.from_numpy(rows["label"].to_numpy().astype(np.int64))
        return Batch(len(y), x=x, y=y)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch.x).float(), batch.y)

    def evaluate(self, model, batch):
        logits = model(batch.x).float()
        right = (logits.argmax(1) == batch.y).sum().item()
        loss = F.cross_entropy(logits, batch.y, reduction="sum").item()
        return {"accuracy": Sum(right, batch.count), "loss": Sum(loss, batch.count)}
