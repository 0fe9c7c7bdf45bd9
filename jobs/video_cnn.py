"""What happens in a clip: a convolutional network over space and then over time, in residual blocks.

python -m jobs.video_cnn make-data .data/video_cnn
dltrain run jobs/video_cnn.yaml
dltrain predict video-cnn waving.gif --out drawn         # any animated pictures

The handwriting and the people of the test are not in the training data.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Input, Keys, Sum, Task
from dltrain.errors import UserError
from jobs.common.clips import ACTIONS, FRAMES, SIZE, bytes_of, clip_splits, frames_of
from jobs.common.data import main, write_splits
from jobs.common.figures import Goal
from jobs.common.mimicry import CHANGES, face_clips

GOALS = (Goal("actions recognised", "accuracy", 0.95),)
FPS, ZOOM, SHOWN = 6, 4, 10


class Residual(nn.Module):
    """Beside an identity: a convolution over space, then one over time (Tran et al., 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm3d(width), nn.BatchNorm3d(width)
        self.space = nn.Conv3d(width, width, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.time = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # x: (rows, width, frames, side, side)
        return x + self.time(F.relu(self.norm2(self.space(F.relu(self.norm1(x))))))


class VideoCnn(Task):
    """What digits do, and with `faces` what faces do as well."""

    columns = ("clip", "action")
    target_columns = ("action",)

    def __init__(self, width: int = 16, stages: int = 3, faces: bool = True) -> None:
        self.width, self.stages = width, stages
        self.actions = (*ACTIONS, *CHANGES) if faces else ACTIONS

    def build(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Conv3d(1, self.width, (3, 4, 4), (1, 2, 2), padding=1, bias=False)]
        width = self.width
        for stage in range(self.stages):
            if stage:
                layers.append(nn.Conv3d(width, 2 * width, (1, 2, 2), (1, 2, 2), bias=False))
                width *= 2
            layers.append(Residual(width))
        # The mean over places and the order of frames: what remains of each is laid side by side.
        head = [nn.BatchNorm3d(width), nn.ReLU(), nn.AdaptiveAvgPool3d((FRAMES // 2, 1, 1)), nn.Flatten()]
        return nn.Sequential(*layers, *head, nn.Linear(FRAMES // 2 * width, len(self.actions)))

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        frames = frames_of(rows["clip"].to_pylist(), (1, FRAMES, SIZE, SIZE)) / np.float32(255)
        actions = torch.from_numpy(rows["action"].to_numpy().astype(np.int64))
        return Batch(len(actions), clip=torch.from_numpy(frames), action=actions)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(model(batch.clip).float(), batch.action, label_smoothing=0.05)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        logits = model(batch.clip).float()
        right = (logits.argmax(1) == batch.action).sum().item()
        loss = F.cross_entropy(logits, batch.action, reduction="sum").item()
        return {"accuracy": Sum(right, batch.count), "loss": Sum(loss, batch.count)}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        results = self.predict(model, batch)
        rows = [
            {"is": self.actions[action], "taken for": one["action"], "probability": one["probability"]}
            for action, one in zip(batch.action.tolist(), results, strict=True)
        ]
        from jobs.common.pictures import tiles

        first = batch.clip[:SHOWN, 0].cpu()
        strips = tiles(first.flatten(0, 1).numpy(), FRAMES, ZOOM // 2)
        said = ", ".join(one["action"] for one in results[: len(first)])
        return [
            *self.draw(batch, results)[: len(first)],
            Artifact.image(strips, f"a clip in each row: {said}"),
            Artifact.table(rows[:16], "clips of the test"),
        ]

    def read(self, source: Input) -> dict[str, bytes]:
        from PIL import Image, ImageSequence, UnidentifiedImageError

        try:
            shown = ImageSequence.all_frames(Image.open(io.BytesIO(source.data)))
        except UnidentifiedImageError:
            raise UserError("not a picture that Pillow reads; GIF, WebP and APNG hold several frames") from None
        if len(shown) < 2:
            raise UserError("a picture of one frame, and an action takes several: give an animation")
        chosen = np.linspace(0, len(shown) - 1, FRAMES).round().astype(int)
        grey = [np.asarray(shown[i].convert("L").resize((SIZE, SIZE))) for i in chosen]
        return {"clip": np.stack(grey).tobytes()}

    def predict(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        chances, actions = model(batch.clip).float().softmax(1).max(1)
        found = zip(actions.tolist(), chances.tolist(), strict=True)
        return [{"action": self.actions[action], "probability": round(chance, 4)} for action, chance in found]

    def draw(self, batch: Batch, results: Sequence[dict[str, Any]]) -> list[Artifact]:
        frames = (255 * batch.clip[:, 0]).round().to(torch.uint8).cpu().numpy()
        said = [f"{one['action']}  {one['probability']:.0%}" for one in results]
        return [
            Artifact.animation(one.repeat(ZOOM, 1).repeat(ZOOM, 2), FPS, text)
            for one, text in zip(frames, said, strict=True)
        ]


def make_data(url: str, train: int = 4200, test: int = 840, noise: float = 0.05) -> dict[str, int]:
    """Writes clips under url/train and url/test, of each action equally many; returns rows by split."""
    moving = len(ACTIONS) / (len(ACTIONS) + len(CHANGES))
    splits = clip_splits(*(round(moving * count) for count in (train, test)), noise)
    for seed, (name, count) in enumerate({"train": train, "test": test}.items()):
        rng = np.random.default_rng(100 + seed)
        changes = np.arange(count - len(splits[name])) % len(CHANGES)
        faces, people = face_clips(name, changes, rng)
        faces += rng.normal(0, noise, faces.shape)
        numbers = {"action": pa.array(len(ACTIONS) + changes, pa.uint8()), "person": pa.array(people, pa.uint8())}
        both = [splits[name], pa.table({"clip": bytes_of(faces), **numbers})]
        splits[name] = pa.concat_tables(both, promote_options="default").take(pa.array(rng.permutation(count)))
    return write_splits(url, splits, rows_per_group=32)


if __name__ == "__main__":
    main(make_data)
