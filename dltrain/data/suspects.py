"""Labels that a trained network contradicts, from a dataset that `dltrain predict --to` wrote.

Confident learning on the most probable class: a row labelled i is suspicious when j is predicted for it with at least
the probability that rows labelled j have for j on average (Northcutt, Jiang and Chuang, 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from dltrain.errors import UserError

__all__ = ["Predictions", "find_predictions"]

_CHANCE = "probability"


def find_predictions(schema: pa.Schema, label: str, asked: str | None) -> str | None:
    """The column of predictions: a struct with the label's name and `probability`.

    Raises:
        UserError: the one that was asked for is none.
    """
    if asked is not None and asked not in schema.names:
        raise UserError(f"--prediction is {asked!r}; there are {', '.join(schema.names)}")
    for name in [asked] if asked else schema.names:
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and {label, _CHANCE} <= {kind.field(i).name for i in range(kind.num_fields)}:
            return name
    if asked:
        raise UserError(
            f"the predictions, {asked}, are {schema.field(asked).type}; to compare labels with them they must have "
            f"{label or 'the label (--label)'} and {_CHANCE}, as the task's `predict` returns them"
        )
    return None


class Predictions:
    """What was predicted for each row, beside its label."""

    def __init__(self, label: str, column: str) -> None:
        self._label, self._column = label, column
        self._labels: list[Any] = []
        self._guesses: list[Any] = []
        self._chances: list[float] = []

    def add(self, table: pa.Table) -> None:
        """Takes some rows in; those without a prediction are no suspects."""
        self._labels += table[self._label].to_pylist()
        for one in table[self._column].to_pylist():
            self._guesses.append(one and one[self._label])
            self._chances.append(float(one[_CHANCE]) if one and one[_CHANCE] is not None else 0.0)

    def suspects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Rows, and what speaks against their labels; the most certain first."""
        chances = np.array(self._chances)
        agreed: dict[Any, list[float]] = {}
        for label, guess, chance in zip(self._labels, self._guesses, self._chances, strict=True):
            if guess is not None and label == guess:
                agreed.setdefault(label, []).append(chance)
        usual = {label: float(np.mean(some)) for label, some in agreed.items()}
        for row in np.argsort(-chances, kind="stable").tolist():
            label, guess = self._labels[row], self._guesses[row]
            if guess is None or label is None or guess == label or chances[row] < usual.get(guess, np.inf):
                continue
            yield row, {"label": label, "predicted": guess, _CHANCE: round(float(chances[row]), 4)}
