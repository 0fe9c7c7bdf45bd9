"""Digits of which 5 % have a wrong label, and the network that finds them: five-fold, in one run, with cleanlab.

python -m jobs.label_check make-data .data/label_check
dltrain run jobs/label_check.yaml
dltrain predict label-check .data/label_check/train --to checked      # each row's label, and how likely it is
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Keys, Sum
from jobs.common.data import main, write_splits
from jobs.common.digits import digit_splits
from jobs.common.figures import Goal
from jobs.image_cnn import ImageCnn

GOALS = (Goal("flipped labels found", "found", 0.90), Goal("of those named, flipped", "precision", 0.90))
FOLDS = 5
FLIPPED = 0.05
ROWS = 1797
CLASSES = 10
Array = npt.NDArray[Any]


class Folds(nn.Module):
    """A network for each fold of the rows, in whose training that fold has no part."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # (rows, folds, classes)
        return torch.stack([network(images) for network in self.networks], 1).float()


class LabelCheck(ImageCnn):
    """Says how likely each label is, by a network that was not shown it."""

    columns = ("image", "label", "row", "fold", "flipped")
    target_columns = ("flipped",)

    def __init__(self, width: int = 16, blocks: int = 1, rows: int = ROWS) -> None:
        super().__init__(width, blocks)
        self.rows = rows

    def build(self) -> nn.Module:
        return Folds([super(LabelCheck, self).build() for _ in range(FOLDS)])

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        batch = super().collate(rows, keys)
        more = {name: torch.from_numpy(rows[name].to_numpy().astype(np.int64)) for name in ("row", "fold")}
        flipped = torch.from_numpy(rows["flipped"].to_numpy(zero_copy_only=False).astype(np.int64))
        return Batch(batch.count, **batch.tensors, **more, flipped=flipped)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        logits = model(self._shift(batch))
        each = F.cross_entropy(logits.transpose(1, 2), batch.label[:, None].expand(-1, FOLDS), reduction="none")
        others = torch.arange(FOLDS, device=batch.fold.device) != batch.fold[:, None]
        return (each * others).sum() / ((FOLDS - 1) * batch.count)

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        logits = self._unseen(model, batch)
        right = (logits.argmax(1) == batch.label).sum().item()
        loss = F.cross_entropy(logits, batch.label, reduction="sum").item()
        told = torch.cat([logits.softmax(1), torch.stack([batch.label, batch.flipped], 1)], 1).cpu().numpy()
        # Every row in its place, and a one beside it: confident learning looks at all of them together.
        table = np.zeros((self.rows, CLASSES + 3))
        table[batch.row.cpu().numpy()] = np.pad(told, ((0, 0), (0, 1)), constant_values=1)
        sums = {"table": table, "accuracy": right, "loss": loss}
        return {name: Sum(total, batch.count) for name, total in sums.items()}

    def metrics(self, means: Mapping[str, Any]) -> dict[str, float]:
        table = means["table"][means["table"][:, -1] > 0]
        table = table / table[:, -1:]
        labels, flipped = table[:, CLASSES].round().astype(int), table[:, CLASSES + 1] > 0.5
        named = suspects(labels, table[:, :CLASSES])
        return {"accuracy": means["accuracy"], "loss": means["loss"], **judged(named, flipped)}

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        likely = self._unseen(model, batch).softmax(1).cpu().numpy()
        least = np.argsort(likely[np.arange(len(likely)), batch.label.cpu().numpy()])[:32]
        from jobs.common.pictures import draw_sheet

        labels, guesses = batch.label.cpu().numpy()[least].tolist(), likely.argmax(1)[least].tolist()
        sheet = draw_sheet(batch.image[:, 0].cpu().numpy()[least], guesses, labels)
        return [Artifact.image(sheet, f"the least likely labels of {len(likely)}: what each is seen as, and called")]

    def predict(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        chances = self._unseen(model, batch).softmax(1)
        given = chances.gather(1, batch.label[:, None])[:, 0]
        found = zip(batch.label.tolist(), given.tolist(), chances.argmax(1).tolist(), strict=True)
        return [{"label": label, "likely": round(chance, 4), "seen_as": seen} for label, chance, seen in found]

    def _unseen(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (rows, classes) of the network that each row was kept from."""
        logits: torch.Tensor = model(batch.image)
        return logits[torch.arange(len(logits), device=logits.device), batch.fold]


def suspects(labels: Array, probabilities: Array) -> npt.NDArray[np.bool_]:
    """The least likely labels, so many as confident learning says are wrong (Northcutt et al., arXiv 1911.00068)."""
    from cleanlab.filter import find_label_issues

    found: npt.NDArray[np.bool_] = find_label_issues(labels, probabilities, filter_by="low_self_confidence", n_jobs=1)
    return found


def judged(named: Array, flipped: Array) -> dict[str, float]:
    """How many of the flipped were named, and how many of the named were flipped."""
    right = float((named & flipped).sum())
    return {"found": right / max(1, int(flipped.sum())), "precision": right / max(1, int(named.sum()))}


def baselines(data_url: str) -> dict[str, float]:
    """Naming every label that a logistic regression of the other folds disagrees with."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    table = pq.read_table(f"{data_url}/train")
    images = np.stack([np.frombuffer(image, np.uint8) for image in table["image"].to_pylist()]) / 16.0
    labels, folds = table["label"].to_numpy(), PredefinedSplit(table["fold"].to_numpy())
    guesses = cross_val_predict(LogisticRegression(max_iter=1000), images, labels, cv=folds)
    return judged(guesses != labels, table["flipped"].to_numpy(zero_copy_only=False))


def make_data(url: str) -> dict[str, int]:
    """Writes all digits under url/train, 5 % of them with another label, five folds of them at random."""
    from jobs.common.flips import flip

    return write_splits(url, {"train": flip(pa.concat_tables(digit_splits().values()), FLIPPED, FOLDS)})


if __name__ == "__main__":
    main(make_data)
