"""The Frechet distance between what is real and what is made, by sums that add up over batches and workers.

    def evaluate(self, model, batch):
        return moments("made", features(made)) | moments("real", features(batch.real))

    def metrics(self, means):
        return {"frechet": frechet(means, "made", "real")}

Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017; there with features of another network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dltrain import Sum

__all__ = ["frechet", "moments"]

F64 = npt.NDArray[np.float64]


def moments(kind: str, features: F64) -> dict[str, Sum]:
    """First and second moments of features (rows, width), named after what they are of."""
    count = len(features)
    return {f"{kind} mean": Sum(features.sum(0), count), f"{kind} square": Sum(features.T @ features, count)}


def frechet(means: Mapping[str, Any], one: str, other: str) -> float:
    """Squared distance of the normal distributions that have two kinds' moments."""
    (mean1, cov1), (mean2, cov2) = (_normal(means, kind) for kind in (one, other))
    # The eigenvalues of a product of covariances, by way of a symmetric matrix.
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(0))
    shared = np.sqrt(np.linalg.eigvalsh(root.T @ cov2 @ root).clip(0)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * shared)


def _normal(means: Mapping[str, Any], kind: str) -> tuple[F64, F64]:
    mean = means[f"{kind} mean"]
    return mean, means[f"{kind} square"] - np.outer(mean, mean)
