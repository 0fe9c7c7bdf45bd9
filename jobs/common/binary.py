"""How well a yes-or-no network tells the two apart, and whether its probabilities can be believed: from histograms.

They add up over batches and workers, as a mean of areas under curves would not:

    def evaluate(self, model, batch):
        return {"counts": Sum(histogram(logits, batch.label), batch.count)}

    def metrics(self, means):
        return {"auc": roc_auc(means["counts"]), "calibration error": calibration_error(means["counts"])}
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["calibration_error", "histogram", "roc_auc"]

F64 = npt.NDArray[np.float64]
# Logits beyond this are probabilities within 1e-7 of 0 or 1.
FAR = 16.0
BINS = 4096
CENTERS = (np.arange(BINS) + 0.5) * (2 * FAR / BINS) - FAR


def histogram(logits: Any, labels: Any) -> F64:
    """Rows by label and logit.

    Args:
        logits, labels: tensors (rows,); a label is 0 or 1.

    Returns:
        (2, BINS), of each label's logits.
    """
    values = np.clip(logits.detach().double().cpu().numpy(), -FAR, FAR - 1e-9)
    bins = ((values + FAR) * (BINS / (2 * FAR))).astype(np.int64)
    counts = np.zeros((2, BINS))
    np.add.at(counts, (labels.cpu().numpy().astype(np.int64), bins), 1.0)
    return counts


def roc_auc(counts: F64) -> float:
    """The chance that a row of label 1 has the higher logit of two; in the same bin half of it counts.

    Args:
        counts: (2, BINS), in any unit; nan where one of the labels is not there.
    """
    no, yes = counts
    pairs = no.sum() * yes.sum()
    below = np.cumsum(no) - no
    return float((yes * (below + no / 2)).sum() / pairs) if pairs else float("nan")


def calibration_error(counts: F64, groups: int = 10) -> float:
    """Mean distance between what is predicted and how often it is so, by groups of like probabilities.

    Guo et al., On Calibration of Modern Neural Networks, 2017, section 2: the expected calibration error.

    Args:
        counts: (2, BINS), in any unit.
    """
    chances = 1 / (1 + np.exp(-CENTERS))
    which = np.minimum((chances * groups).astype(np.int64), groups - 1)
    predicted = np.bincount(which, counts.sum(0) * chances, groups)
    happened = np.bincount(which, counts[1], groups)
    return float(np.abs(predicted - happened).sum() / counts.sum())
