"""Digits of which one in twenty has a label: a small CNN that has seen scans without labels before.

python -m jobs.few_labels make-data .data/few_labels
dltrain run jobs/few_labels_pretrain.yaml && dltrain run jobs/few_labels.yaml
dltrain run jobs/few_labels.yaml name=scratch train.init_from=null train.freeze=[]      # the same without the first
dltrain predict few-labels scans/*.png --out drawn
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dltrain import Batch
from jobs.common.alike import groups, warped
from jobs.common.data import main, write_splits
from jobs.common.digits import LEVELS, digit_splits
from jobs.common.figures import Bench, Figure
from jobs.common.layers import GroupResidual
from jobs.image_cnn import ImageCnn

DIGITS, SHARE, DRAWS = 10, 0.05, 3
# Of channels; a row is normalized by itself, so that a batch may be small.
GROUPS = 4


class FewLabels(ImageCnn):
    """Tells groups of scans apart that look alike, then digits; reads and draws as jobs.image_cnn does.

    Args:
        width: of the first half of the network.
        classes: groups to tell apart; 10 for digits.
        warp: whether scans are warped while it learns; otherwise they are moved by up to a pixel.
    """

    def __init__(self, width: int = 16, classes: int = DIGITS, warp: bool = False) -> None:
        super().__init__(width)
        self.classes, self.warp = classes, warp

    def build(self) -> nn.Module:
        width = self.width
        first = [nn.Conv2d(1, width, 3, padding=1, bias=False), GroupResidual(width, GROUPS)]
        second = [nn.Conv2d(width, 2 * width, 2, stride=2, bias=False), GroupResidual(2 * width, GROUPS)]
        third = [nn.GroupNorm(GROUPS, 2 * width), nn.ReLU(), nn.Conv2d(2 * width, 4 * width, 2, stride=2), nn.ReLU()]
        body = nn.Sequential(*first, *second, *third, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        # The last layer is named by what it says, so that it is not taken over where something else is said.
        return nn.Sequential(body, nn.Linear(4 * width, self.classes))

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        images = warped(batch.image, batch.keys) if self.warp else self._shift(batch)
        return F.cross_entropy(model(images).float(), batch.label, label_smoothing=0.1)


def chosen(labels: npt.NDArray[np.uint8], seed: int, share: float = SHARE) -> npt.NDArray[np.int64]:
    """Rows that have a label, in their order: of each digit as many as of any other, or one more or less."""
    order = np.random.default_rng(seed).permutation(len(labels))
    # By how many of the same digit come before it.
    turn = np.zeros(len(labels), np.int64)
    for digit in range(DIGITS):
        rows = order[labels[order] == digit]
        turn[rows] = np.arange(len(rows))
    return np.sort(order[np.argsort(turn[order], kind="stable")][: round(share * len(labels))])


def make_data(url: str, clusters: int = 40) -> dict[str, int]:
    """Writes all scans for training, each with its group for a label, under url/scans; under url/labels-0, -1, ...
    those of a draw whose labels are known; the test's under url/test.

    Args:
        clusters: groups of scans that look alike, of which nobody has told.
    """
    splits = digit_splits()
    train = splits["train"]
    pixels = np.stack([np.frombuffer(one, np.uint8) for one in train["image"].to_pylist()]) / np.float32(LEVELS)
    named = {"image": train["image"], "label": pa.array(groups(pixels, clusters), pa.uint8())}
    written = write_splits(url, {"scans": pa.table(named), "test": splits["test"]}, rows_per_group=32)
    labels = train["label"].to_numpy()
    draws = {f"labels-{seed}": train.take(pa.array(chosen(labels, seed))) for seed in range(DRAWS)}
    return {**written, **write_splits(url, draws, rows_per_group=6)}


def figures(bench: Bench) -> list[Figure]:
    """The mean of several draws of labels, with and without the scans that have none."""
    bench.run(spec="few_labels_pretrain")
    data = [f"data.train={bench.data}/labels-{draw}" for draw in range(DRAWS)]
    alone = ("train.init_from=null", "train.freeze=[]")
    first = [bench.run(where, *alone, name=f"scratch-{i}") for i, where in enumerate(data)]
    then = [bench.run(where, name=f"few-labels-{i}") for i, where in enumerate(data)]
    scratch, found = _accuracy(first), _accuracy(then)
    return [Figure("accuracy with 5 % of the labels", found, target=scratch + 0.1, baseline=scratch)]


def _accuracy(runs: list[Mapping[str, Any]]) -> float:
    return mean(run["eval"]["accuracy"] for run in runs)


if __name__ == "__main__":
    main(make_data)
