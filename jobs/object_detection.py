"""What is where in a scene: an anchor-free detector, each thing a peak of a heat map with the four edges around it.

python -m jobs.object_detection make-data .data/object_detection
dltrain run jobs/object_detection.yaml
dltrain predict object-detection scene.png --out drawn   # any pictures; boxes are in pixels of 64 x 64

The handwriting of the test is not in the training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Input, Keys, Sum, Task
from dltrain.data import decode
from dltrain.data.columns import tensors
from jobs.common.data import main, write_splits
from jobs.common.detection import Boxes, hits, mean_precision, tally
from jobs.common.figures import Goal
from jobs.common.pyramid import Pyramid, peaks, targets
from jobs.common.scenes import KINDS, SCENE, scene_splits

GOALS = (Goal("mAP@0.5, unseen handwriting", "map50", 0.85),)
# Boxes of a scene at most, and the score from which one is shown.
MOST, SHOWN = 24, 0.35


class ObjectDetection(Task):
    """Digits and shapes: centres (Zhou et al., Objects as Points, 2019) and edges (Tian et al., FCOS, 2019)."""

    columns = ("image", "boxes", "kinds")
    target_columns = ("boxes", "kinds")

    def __init__(self, width: int = 24, blocks: int = 2) -> None:
        self.width, self.blocks = width, blocks

    def build(self) -> nn.Module:
        return Pyramid(self.width, self.blocks, len(KINDS))

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        # Lists of all rows end to end: boxes (things, 4), kinds (things,), and where each row's begin.
        found = tensors(rows.select(self.columns))
        image = found["image"].view(-1, 1, SCENE, SCENE).float() / 255
        kinds, offsets = found["kinds"].long(), found["kinds_offsets"]
        scenes = torch.repeat_interleave(torch.arange(len(image)), offsets.diff())
        things = {"scenes": scenes, "kinds": kinds, "boxes": found["boxes"].view(-1, 4)}
        heat, cells, edges = targets(**things, count=len(image), num_kinds=len(KINDS), side=SCENE)
        return Batch(max(1, len(kinds)), image=image, heat=heat, cells=cells, edges=edges, **things)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return self._loss(*model(batch.image), batch) / batch.count

    def _loss(self, heat: torch.Tensor, edges: torch.Tensor, batch: Batch) -> torch.Tensor:
        """A sum over things: the focal loss of the map with less of it near centres, and L1 of edges at centres."""
        chance, wanted = heat.sigmoid(), batch.heat
        # As logarithms, so that no chance is taken for 0 or 1.
        there = (1 - chance) ** 2 * F.logsigmoid(heat) * (wanted == 1)
        elsewhere = (1 - wanted) ** 4 * chance**2 * F.logsigmoid(-heat)
        y, x = batch.cells.unbind(1)
        far = (edges[batch.scenes, :, y, x] - batch.edges).abs().mean(1)
        return far.sum() - there.sum() - elsewhere.sum()

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        heat, edges = model(batch.image)
        found, there = tally(list(zip(self._found(heat, edges), self._there(batch), strict=True)), len(KINDS))
        loss = self._loss(heat, edges, batch).item()
        return {name: Sum(total, batch.count) for name, total in (("loss", loss), ("found", found), ("there", there))}

    def metrics(self, means: Mapping[str, Any]) -> dict[str, float]:
        return {"loss": means["loss"], "map50": mean_precision(means["found"], means["there"])}

    def _found(self, heat: torch.Tensor, edges: torch.Tensor) -> list[Boxes]:
        found = [one.cpu().numpy() for one in peaks(heat, edges, MOST, SCENE)]
        return [Boxes(*one) for one in zip(*found, strict=True)]

    def _there(self, batch: Batch) -> list[Boxes]:
        scenes, boxes, kinds = (batch[name].cpu().numpy() for name in ("scenes", "boxes", "kinds"))
        return [Boxes(boxes[scenes == i].astype(float), kinds[scenes == i]) for i in range(len(batch.image))]

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        from jobs.common.pictures import boxed, tiles

        sheet, right, shown = [], 0, 0
        for pixels, found, there in zip(
            _grey(batch), self._found(*model(batch.image)), self._there(batch), strict=True
        ):
            kept = Boxes(*(part[found.scores >= SHOWN] for part in found))
            good = hits(kept, there)
            sheet.append(boxed(pixels, kept.boxes.tolist(), [KINDS[k] for k in kept.kinds], good.tolist()))
            right, shown = right + int(good.sum()), shown + len(good)
        said = f"{shown} boxes of {len(batch.kinds)} things in {len(sheet)} scenes of the test; {shown - right} in red"
        return [Artifact.image(tiles(np.stack(sheet[:32]) / np.float32(255), 4, 1, 4), f"{said} are wrong")]

    def read(self, source: Input) -> dict[str, Any]:
        grey = decode.images(pa.array([source.data], pa.binary()), (SCENE, SCENE), "L")[0, :, :, 0]
        # In the data things are bright and the ground is dark: most of a picture's rim is ground.
        rim = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).median()
        return {"image": (255 - grey if rim > 127 else grey).numpy().tobytes()}

    def predict(self, model: Any, batch: Batch) -> list[list[dict[str, Any]]]:
        """Of each scene the things that were found, the surest first."""
        return [
            [
                {"is": KINDS[kind], "score": round(score, 4), "box": [round(edge, 1) for edge in box]}
                for box, kind, score in zip(*(part.tolist() for part in found), strict=True)
                if score >= SHOWN
            ]
            for found in self._found(*model(batch.image))
        ]

    def draw(self, batch: Batch, results: Sequence[list[dict[str, Any]]]) -> list[Artifact]:
        from jobs.common.pictures import boxed

        drawn = []
        for pixels, things in zip(_grey(batch), results, strict=True):
            names = [f"{thing['is']} {thing['score']:.0%}" for thing in things]
            picture = boxed(pixels, [thing["box"] for thing in things], names, [True] * len(things), zoom=8)
            drawn.append(Artifact.image(picture, ", ".join(names) or "nothing found"))
        return drawn


def _grey(batch: Batch) -> Any:
    """(scenes, side, side), bytes."""
    return (255 * batch.image[:, 0]).round().to(torch.uint8).cpu().numpy()


def make_data(url: str, train: int = 3200, test: int = 500) -> dict[str, int]:
    """Writes scenes under url/train and url/test; returns rows by split."""
    return write_splits(url, scene_splits(train, test), rows_per_group=32)


if __name__ == "__main__":
    main(make_data)
