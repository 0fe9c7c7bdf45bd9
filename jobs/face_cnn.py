"""Who somebody is and how they feel: a convolutional network with two heads, on faces that are drawn.

python -m jobs.face_cnn make-data .data/face_cnn
dltrain run jobs/face_cnn.yaml
dltrain predict face-cnn face.png --out drawn         # any pictures of the people of the data

Heads of the test are turned further, and lit more from the side and more strongly, than any in the training data.
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
from jobs.common.augment import contrast, varied
from jobs.common.data import main, write_splits
from jobs.common.faces import FACE
from jobs.common.figures import Goal
from jobs.common.layers import GroupResidual
from jobs.common.people import EMOTIONS, PEOPLE, face_splits

GOALS = (
    Goal("people recognised, unseen poses and light", "identity", 0.95),
    Goal("emotions recognised, unseen poses and light", "emotion", 0.95),
)
GROUPS = 8


class TwoHeads(nn.Module):
    """What is seen, by three stages of half the side each, and two linear readings of it."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(4, width, 4, 2, padding=1)]
        for stage in range(3):
            if stage:
                layers.append(nn.Conv2d(width, 2 * width, 2, 2))
                width *= 2
            layers += [GroupResidual(width) for _ in range(blocks)]
        # What is where matters, such as corners of a mouth: a place has its own weights.
        last = [nn.GroupNorm(GROUPS, width), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()]
        self.seen = nn.Sequential(*layers, *last)
        self.identity, self.emotion = nn.Linear(9 * width, PEOPLE), nn.Linear(9 * width, len(EMOTIONS))

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, 3, FACE, FACE) -> logits (rows, people) and (rows, emotions)."""
        seen = self.seen(torch.cat([image - 0.5, contrast(image)], 1))
        return self.identity(seen).float(), self.emotion(seen).float()


class FaceCnn(Task):
    """Twenty people, five emotions."""

    columns = ("image", "person", "emotion")
    target_columns = ("person", "emotion")

    def __init__(self, width: int = 24, blocks: int = 1) -> None:
        self.width, self.blocks = width, blocks

    def build(self) -> nn.Module:
        return TwoHeads(self.width, self.blocks)

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        pixels = np.stack([np.frombuffer(one.as_buffer(), np.uint8) for one in rows["image"]])
        image = torch.from_numpy(pixels).view(-1, FACE, FACE, 3).permute(0, 3, 1, 2).float() / 255
        person, emotion = (torch.from_numpy(rows[name].to_numpy().astype(np.int64)) for name in self.target_columns)
        return Batch(len(image), image=image.contiguous(), person=person, emotion=emotion, keys=keys)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return self._loss(model(varied(batch.image, batch.keys)), batch, label_smoothing=0.05)

    def _loss(self, said: tuple[torch.Tensor, ...], batch: Batch, **more: Any) -> torch.Tensor:
        return F.cross_entropy(said[0], batch.person, **more) + F.cross_entropy(said[1], batch.emotion, **more)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        identity, emotion = said = model(batch.image)
        who, feels = identity.argmax(1) == batch.person, emotion.argmax(1) == batch.emotion
        found = {"identity": who.sum(), "emotion": feels.sum(), "both": (who & feels).sum()}
        found["loss"] = self._loss(said, batch, reduction="sum")
        return {name: Sum(total.item(), batch.count) for name, total in found.items()}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        from jobs.common.pictures import named, tiles

        sheet, wrong = [], 0
        is_it = zip(batch.person.tolist(), batch.emotion.tolist(), strict=True)
        for pixels, one, (who, feels) in zip(_pixels(batch), self.predict(model, batch), is_it, strict=True):
            good = (one["person"], one["emotion"]) == (who, EMOTIONS[feels])
            said = f"{one['person']} {one['emotion']}"
            sheet.append(named(pixels, said if good else f"{said}: {who} {EMOTIONS[feels]}", good))
            wrong += not good
        picture = tiles(np.stack(sheet[:40]) / np.float32(255), 8, 1, 4)
        return [Artifact.image(picture, f"{len(sheet)} faces of the test: who it is and how they feel; {wrong} wrong")]

    def read(self, source: Input) -> dict[str, bytes]:
        return {"image": decode.images(pa.array([source.data], pa.binary()), (FACE, FACE)).numpy().tobytes()}

    def predict(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        """By person and emotion, and the probability of each."""
        people, feelings = (logits.softmax(1).max(1) for logits in model(batch.image))
        return [
            {"person": who, "of_person": round(sure, 4), "emotion": EMOTIONS[feels], "of_emotion": round(chance, 4)}
            for sure, who, chance, feels in zip(*(part.tolist() for part in (*people, *feelings)), strict=True)
        ]

    def draw(self, batch: Batch, results: Sequence[dict[str, Any]]) -> list[Artifact]:
        from jobs.common.pictures import named

        drawn = []
        for pixels, one in zip(_pixels(batch), results, strict=True):
            said = f"person {one['person']} {one['of_person']:.0%}, {one['emotion']} {one['of_emotion']:.0%}"
            drawn.append(Artifact.image(named(pixels, said, True, zoom=6), said))
        return drawn


def _pixels(batch: Batch) -> Any:
    """(rows, FACE, FACE, 3), bytes."""
    return (255 * batch.image).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def make_data(url: str, train: int = 8000, test: int = 2000) -> dict[str, int]:
    """Writes faces under url/train and url/test; returns rows by split."""
    return write_splits(url, face_splits(train, test), rows_per_group=32)


if __name__ == "__main__":
    main(make_data)
