"""jobs.label_check: which labels are flipped, who is judged by whom, and what confident learning makes of it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from dltrain import Keys
from jobs.common.digits import digit_splits
from jobs.common.flips import flip
from jobs.label_check import FOLDS, LabelCheck, judged, suspects


def keys(rows: int) -> Keys:
    return Keys(0, np.zeros(rows, np.int64), np.arange(rows))


def digits() -> pa.Table:
    return pa.concat_tables(digit_splits().values())


def test_five_percent_are_flipped_to_something_else() -> None:
    table, truth = flip(digits(), 0.05, FOLDS), digits()["label"].to_numpy()
    flipped = table["flipped"].to_numpy(zero_copy_only=False)
    assert flipped.sum() == 90
    assert ((table["label"].to_numpy() != truth) == flipped).all()
    assert table["label"].to_numpy().max() == 9
    assert table["row"].to_pylist() == list(range(len(truth)))
    counts = np.bincount(table["fold"].to_numpy())
    assert len(counts) == FOLDS
    assert counts.max() - counts.min() <= 1
    assert flip(digits(), 0.05, FOLDS) == table
    assert flip(digits(), 0.05, FOLDS, seed=1) != table


@pytest.fixture
def batch_and_model() -> tuple[LabelCheck, torch.nn.Module, object]:
    torch.manual_seed(0)
    task = LabelCheck(width=4, blocks=1, rows=40)
    rows = flip(digits(), 0.05, FOLDS).slice(0, 40).combine_chunks().to_batches()[0]
    return task, task.build(), task.collate(rows, keys(40))


def test_a_fold_has_no_part_in_its_own_network(batch_and_model: tuple[LabelCheck, torch.nn.Module, object]) -> None:
    task, model, batch = batch_and_model
    # Without BatchNorm's statistics of a batch, which are of pictures alone.
    model.eval()
    mine = batch.fold == 2  # type: ignore[attr-defined]
    before = task.loss(model, batch)  # type: ignore[arg-type]
    gradient = torch.autograd.grad(before, list(model.networks[2].parameters()), retain_graph=True)
    batch.tensors["label"] = torch.where(mine, (batch.label + 1) % 10, batch.label)  # type: ignore[attr-defined]
    after = task.loss(model, batch)  # type: ignore[arg-type]
    assert after != before
    again = torch.autograd.grad(after, list(model.networks[2].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradient, again, strict=True))


def test_a_row_is_judged_by_the_network_of_its_fold(
    batch_and_model: tuple[LabelCheck, torch.nn.Module, object],
) -> None:
    task, model, batch = batch_and_model
    model.eval()
    with torch.no_grad():
        unseen = task._unseen(model, batch)  # type: ignore[arg-type]
        for row in (0, 7, 23):
            network = model.networks[int(batch.fold[row])]  # type: ignore[attr-defined]
            torch.testing.assert_close(unseen[row], network(batch.image[row : row + 1])[0])  # type: ignore[attr-defined]


def test_what_is_named_is_what_a_good_network_does_not_believe() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 10, 500)
    flipped = np.zeros(500, bool)
    flipped[:25] = True
    labels = np.where(flipped, (truth + 3) % 10, truth)
    sure = 0.9 * np.eye(10)[truth] + 0.01
    named = suspects(labels, sure / sure.sum(1, keepdims=True))
    assert judged(named, flipped) == {"found": 1.0, "precision": 1.0}
    assert judged(np.arange(500) < 50, flipped) == {"found": 1.0, "precision": 0.5}
    assert judged(np.arange(500) < 5, flipped) == {"found": 0.2, "precision": 1.0}
    assert judged(np.zeros(500, bool), flipped) == {"found": 0.0, "precision": 0.0}


def test_figures_are_those_of_all_rows_whatever_the_batches(
    batch_and_model: tuple[LabelCheck, torch.nn.Module, object],
) -> None:
    task, model, _ = batch_and_model
    model.eval()
    rows = flip(digits(), 0.3, FOLDS).slice(0, 40).combine_chunks().to_batches()[0]

    def measured(*parts: slice) -> dict[str, float]:
        with torch.no_grad():
            some = [task.evaluate(model, task.collate(rows.slice(p.start, p.stop - p.start), keys(40))) for p in parts]
        means = {n: sum(s[n].total for s in some) / sum(s[n].count for s in some) for n in some[0]}
        return dict(task.metrics(means))

    whole, cut = measured(slice(0, 40)), measured(slice(20, 40), slice(0, 13), slice(13, 20))
    assert set(whole) == {"accuracy", "loss", "found", "precision"}
    assert cut == pytest.approx(whole)
