"""scikit-learn's digits: 1,797 scans of real handwriting, 8 x 8 pixels of 17 grey levels.

The data carries no writer, so the split is contiguous: people who wrote the last scans are not in the first.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

__all__ = ["LEVELS", "SIDE", "TRAIN_ROWS", "digit_splits"]

SIDE = 8
# Grey levels go from 0 to this one, which is ink.
LEVELS = 16.0
TRAIN_ROWS = 1438


def digit_splits() -> dict[str, pa.Table]:
    """`train` and `test`, with columns `image` (64 bytes) and `label`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype(np.uint8).reshape(len(digits.target), -1)
    table = pa.table(
        {
            "image": pa.array([row.tobytes() for row in images], pa.binary(SIDE * SIDE)),
            "label": pa.array(digits.target, pa.uint8()),
        }
    )
    return {"train": table.slice(0, TRAIN_ROWS), "test": table.slice(TRAIN_ROWS)}
