"""Labels made wrong on purpose, and rows shared out to folds."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

__all__ = ["flip"]


def flip(table: pa.Table, share: float, folds: int, classes: int = 10, seed: int = 0) -> pa.Table:
    """The table with a share of its labels, drawn at random, changed to another at random.

    Args:
        table: with a column `label`.

    Returns:
        With the columns `row`, which counts them, `fold`, of as many rows as the others, and `flipped`.
    """
    rng, rows = np.random.default_rng(seed), len(table)
    flipped = np.zeros(rows, bool)
    flipped[rng.choice(rows, round(share * rows), replace=False)] = True
    labels = table["label"].to_numpy()
    other = (labels + rng.integers(1, classes, rows)) % classes
    changed = pa.array(np.where(flipped, other, labels), table.schema.field("label").type)
    table = table.set_column(table.schema.get_field_index("label"), "label", changed)
    for name, values in (
        ("row", np.arange(rows, dtype=np.int32)),
        ("fold", (rng.permutation(rows) % folds).astype(np.uint8)),
        ("flipped", flipped),
    ):
        table = table.append_column(name, pa.array(values))
    return table
