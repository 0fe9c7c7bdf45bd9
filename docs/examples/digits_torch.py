"""Handwritten digits in plain PyTorch: python digits_torch.py 64 200"""

import sys

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCH, STEPS = (int(text) for text in sys.argv[1:3])


def build():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def tensors(rows):
    pixels = np.stack([np.frombuffer(image, np.uint8) for image in rows["image"].to_pylist()])
    x = torch.from_numpy(pixels.astype(np.float32) / 16)
    y = torch.from_numpy(rows["label"].to_numpy().astype(np.int64))
    return x, y


def loss_of(model, x, y):
    return F.cross_entropy(model(x), y)


torch.manual_seed(0)
model = build()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
train = DataLoader(TensorDataset(*tensors(pq.read_table(".data/digits/train"))), BATCH, shuffle=True)
step = 0
while step < STEPS:
    for x, y in train:
        loss = loss_of(model, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        print(f"step {step} loss {loss.item():.6f}")
        if step == STEPS:
            break
x, y = tensors(pq.read_table(".data/digits/test"))
with torch.no_grad():
    print(f"accuracy {(model(x).argmax(1) == y).float().mean().item():.4f}")
torch.save(model.state_dict(), "digits.pt")
