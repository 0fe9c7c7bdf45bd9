"""Which breast tumour is malignant, with a probability that can be believed: a multi-layer perceptron.

python -m jobs.health_mlp make-data .data/health_mlp      # 569 patients in five folds
dltrain run jobs/health_mlp.yaml                          # learns from four of them, is judged by the first
dltrain predict health-mlp patients.csv                   # any table with the columns of the data

The network learns from three patients in four. The others say how far its logits are to be stretched and moved so
that probabilities are what happens (Platt, 1999), in the same run: no gradient of theirs reaches the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Artifact, Batch, Keys, Sum, Task
from jobs.common.binary import calibration_error, histogram, roc_auc
from jobs.common.data import main, write_splits
from jobs.common.figures import Bench, Figure

SIZES = ("radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity", "concave_points")
NAMES = (*SIZES, "symmetry", "fractal_dimension")
FEATURES = tuple(f"{kind}_{name}" for kind in ("mean", "error", "worst") for name in NAMES)
FOLDS = 5


class Calibrated(nn.Module):
    """A perceptron, and what makes its logits believable."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        # Measures in the units of their column come in; slow, so that the last batches don't decide its statistics.
        layers: list[nn.Module] = [nn.BatchNorm1d(len(FEATURES), affine=False, momentum=0.03)]
        for inputs in (len(FEATURES), width):
            layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))
        self.stretch, self.shift = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, features) -> (rows,) logits as learned, and as they are to be used."""
        raw = self.layers(x)[:, 0].float()
        return raw, raw.detach() * self.stretch.exp() + self.shift


class HealthMlp(Task):
    """The probability that a tumour is malignant, by 30 measures of its cells."""

    columns = (*FEATURES, "malignant", "calibrates")
    target_columns = ("malignant", "calibrates")

    def __init__(self, width: int = 32, dropout: float = 0.2) -> None:
        self.width, self.dropout = width, dropout

    def build(self) -> nn.Module:
        return Calibrated(self.width, self.dropout)

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        x = np.stack([rows[name].to_numpy(zero_copy_only=False).astype(np.float32) for name in FEATURES], 1)
        labels, own = (np.array(rows[name].to_pylist(), np.float32) for name in self.target_columns)
        return Batch(len(x), x=torch.from_numpy(x), malignant=torch.from_numpy(labels), own=torch.from_numpy(own))

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        learned, used = (
            F.binary_cross_entropy_with_logits(z, batch.malignant, reduction="none") for z in model(batch.x)
        )
        return torch.where(batch.own > 0, used, learned).mean()

    def evaluate(self, model: Any, batch: Batch) -> dict[str, Sum]:
        raw, used = model(batch.x)
        right = ((used > 0) == (batch.malignant > 0)).sum().item()
        loss = F.binary_cross_entropy_with_logits(used, batch.malignant, reduction="sum").item()
        return {
            "loss": Sum(loss, batch.count),
            "accuracy": Sum(right, batch.count),
            "raw": Sum(histogram(raw, batch.malignant), batch.count),
            "used": Sum(histogram(used, batch.malignant), batch.count),
        }

    def metrics(self, means: Mapping[str, Any]) -> dict[str, float]:
        return {
            "loss": means["loss"],
            "accuracy": means["accuracy"],
            "auc": roc_auc(means["used"]),
            "calibration_error": calibration_error(means["used"]),
            "uncalibrated_error": calibration_error(means["raw"]),
        }

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        from jobs.common.charts import dots

        chances = model(batch.x)[1].sigmoid().cpu().numpy()
        order = np.argsort(chances)
        labels = batch.malignant.cpu().numpy()[order] > 0
        picture = dots(chances[order], labels, "patients of the held-out fold, by the probability that they were given")
        return [Artifact.image(picture, f"{len(order)} unseen patients: tumours that were malignant are red")]

    def predict(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        chances = model(batch.x)[1].sigmoid().tolist()
        return [{"malignant": chance > 0.5, "probability": round(chance, 4)} for chance in chances]


def make_data(url: str) -> dict[str, int]:
    """Writes the patients under url/fold-0 to url/fold-4, each with as many malignant ones; returns rows by fold."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.model_selection import StratifiedKFold

    found = load_breast_cancer()
    # There 0 is malignant.
    labels = (found.target == 0).astype(np.uint8)
    own = np.random.default_rng(0).permutation(len(labels)) % 4 == 0
    table = pa.table({**dict(zip(FEATURES, found.data.T, strict=True)), "malignant": labels, "calibrates": own})
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(found.data, labels)
    return write_splits(url, {f"fold-{i}": table.take(rows) for i, (_, rows) in enumerate(folds)}, rows_per_group=16)


def figures(bench: Bench) -> list[Figure]:
    """Each fold is held out once."""
    runs = [
        bench.run(
            f"data.train={bench.data}/fold-[!{k}]/*.parquet", f"data.eval={bench.data}/fold-{k}", name=f"fold-{k}"
        )
        for k in range(FOLDS)
    ]
    auc = fmean(run["eval"]["auc"] for run in runs)
    return [Figure("ROC-AUC, mean of 5 folds", auc, target=0.99, baseline=logistic_regression())]


def logistic_regression() -> float:
    """ROC-AUC of scikit-learn's on the same folds, mean of all."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found = load_breast_cancer()
    model = make_pipeline(StandardScaler(), LogisticRegression())
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return float(cross_val_score(model, found.data, found.target == 0, cv=folds, scoring="roc_auc").mean())


if __name__ == "__main__":
    main(make_data)
