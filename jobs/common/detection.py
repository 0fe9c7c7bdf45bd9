"""How well boxes fit: average precision of a detector, from histograms that add up over batches and workers.

    def evaluate(self, model, batch):
        return {"found": Sum(found, batch.count), "there": Sum(there, batch.count)}      # of `tally`

    def metrics(self, means):
        return {"map50": mean_precision(means["found"], means["there"])}

A box is a hit if it covers a thing of its kind that no box of a higher score has taken, by an IoU of 0.5 or more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Boxes", "hits", "mean_precision", "overlaps", "tally"]

F64 = npt.NDArray[np.float64]
BINS = 2048
# Where precision is looked up, as COCO does it.
RECALLS = np.linspace(0, 1, 101)


class Boxes(NamedTuple):
    """Things of one picture.

    Attributes:
        boxes: (things, 4), left, top, right, bottom.
        kinds: (things,).
        scores: (things,) in [0, 1], falling; empty of what is really there.
    """

    boxes: F64
    kinds: npt.NDArray[np.int64]
    scores: F64 = np.zeros(0)


def overlaps(a: F64, b: F64) -> F64:
    """Boxes (n, 4) and (m, 4) -> (n, m): what two share, of what both cover (IoU)."""
    low, high = (pick(a[:, None, i : i + 2], b[None, :, i : i + 2]) for pick, i in ((np.maximum, 0), (np.minimum, 2)))
    shared = (high - low).clip(0).prod(-1)
    area = [(c[:, 2:] - c[:, :2]).prod(-1) for c in (a, b)]
    return np.asarray(shared / np.maximum(area[0][:, None] + area[1] - shared, 1e-9))


def hits(found: Boxes, there: Boxes, least: float = 0.5) -> npt.NDArray[np.bool_]:
    """(found,): each box of `found` in turn takes the thing of its kind that it covers best, if that is free."""
    covered = np.where(found.kinds[:, None] == there.kinds, overlaps(found.boxes, there.boxes), 0.0)
    hit = np.zeros(len(covered), bool)
    for i, row in enumerate(covered):
        best = int(row.argmax()) if row.size else 0
        if row.size and row[best] >= least:
            hit[i], covered[:, best] = True, 0.0
    return hit


def tally(pairs: list[tuple[Boxes, Boxes]], kinds: int) -> tuple[F64, F64]:
    """What was found and what is there, of several pictures.

    Returns:
        (kinds, 2, BINS), boxes by kind, hit (1) or not (0), and score; (kinds,), things that are there.
    """
    counts, things = np.zeros((kinds, 2, BINS)), np.zeros(kinds)
    for found, there in pairs:
        bins = np.minimum(found.scores * BINS, BINS - 1).astype(np.int64)
        np.add.at(counts, (found.kinds, hits(found, there).astype(np.int64), bins), 1.0)
        np.add.at(things, there.kinds, 1.0)
    return counts, things


def average_precision(counts: F64, things: float) -> float:
    """Of one kind: the mean over recalls of the best precision at that recall or a higher one.

    Lin et al., Microsoft COCO, 2014; https://cocodataset.org/#detection-eval

    Args:
        counts: (2, BINS), in the unit of `things`.
    """
    wrong, right = counts[:, ::-1].cumsum(1)
    precision = right / np.maximum(wrong + right, 1e-12)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # Counts are quotients by then: a recall of 1 may be a hair less.
    places = np.searchsorted(right / things + 1e-9, RECALLS)
    return float(np.append(envelope, 0.0)[places].mean())


def mean_precision(counts: F64, things: F64) -> float:
    """Over the kinds that are there; nan where nothing is."""
    kinds = np.flatnonzero(things)
    return float(np.mean([average_precision(counts[k], things[k]) for k in kinds])) if len(kinds) else float("nan")
