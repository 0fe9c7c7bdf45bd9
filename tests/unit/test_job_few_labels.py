"""What jobs.few_labels is told and what it is not, how scans are grouped and warped, and what its figure compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dltrain import Keys
from jobs.common.alike import groups, warped
from jobs.common.digits import LEVELS, SIDE, TRAIN_ROWS, digit_splits
from jobs.few_labels import DRAWS, FewLabels, chosen, figures, make_data


def keys(rows: int, first: int = 0) -> Keys:
    return Keys(0, np.zeros(rows, np.int64), np.arange(first, first + rows))


@pytest.fixture(scope="module")
def scans() -> np.ndarray:
    """(300, 64), the first of the training data."""
    images = digit_splits()["train"]["image"].to_pylist()[:300]
    return np.stack([np.frombuffer(one, np.uint8) for one in images]) / np.float32(LEVELS)


def test_of_each_digit_as_many() -> None:
    labels = digit_splits()["train"]["label"].to_numpy()
    found = [chosen(labels, seed) for seed in range(DRAWS)]
    for rows in found:
        assert len(set(rows.tolist())) == 72
        assert set(np.bincount(labels[rows]).tolist()) == {7, 8}
    assert (found[0] == chosen(labels, 0)).all()
    assert len(set(found[0].tolist()) & set(found[1].tolist())) < 20


def test_the_data_tell_no_more_labels(tmp_path: Path) -> None:
    made = make_data(str(tmp_path))
    assert made == {"scans": TRAIN_ROWS, "test": 359, **{f"labels-{i}": 72 for i in range(DRAWS)}}
    digits, table = digit_splits()["train"], pq.read_table(tmp_path / "scans")
    assert table.column_names == ["image", "label"]
    assert table["image"].to_pylist() == digits["image"].to_pylist()
    named, labels = table["label"].to_numpy(), digits["label"].to_numpy()
    assert set(named.tolist()) == set(range(40))
    # Groups are found without labels, and yet most hold one digit.
    most = sum(np.bincount(labels[named == group]).max() for group in range(40))
    assert most > 0.95 * TRAIN_ROWS
    known = pq.read_table(tmp_path / "labels-1")
    pairs = dict(zip(digits["image"].to_pylist(), labels.tolist(), strict=True))
    assert all(pairs[row["image"]] == row["label"] for row in known.to_pylist())
    assert not set(known["image"].to_pylist()) & set(pq.read_table(tmp_path / "test")["image"].to_pylist())


def test_groups_are_the_same_each_time_and_know_no_brightness(scans: np.ndarray) -> None:
    first = groups(scans, 12)
    assert (first == groups(scans, 12)).all()
    again = groups(0.5 * scans, 12)
    # The same groups, whatever their numbers.
    assert len(set(zip(first.tolist(), again.tolist(), strict=True))) == 12


def test_warps_are_those_of_the_row(scans: np.ndarray) -> None:
    images = torch.from_numpy(scans[:6]).reshape(6, 1, SIDE, SIDE)
    whole = warped(images, keys(6))
    assert whole.shape == images.shape
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    torch.testing.assert_close(warped(images[4:], keys(2, first=4)), whole[4:])
    assert not torch.allclose(warped(images, keys(6, first=50)), whole, atol=0.05)


def test_warps_bend_but_do_not_replace(scans: np.ndarray) -> None:
    images = torch.from_numpy(scans[:100])
    bent = warped(images.reshape(-1, 1, SIDE, SIDE), keys(100)).reshape(100, -1)
    near = torch.nn.functional.cosine_similarity(bent, images)
    # As far from the scan as other scans of the same digit, and nearer than those of others.
    assert 0.6 < float(near.mean()) < 0.95


def test_rows_do_not_depend_on_those_beside_them() -> None:
    task = FewLabels(width=8)
    torch.manual_seed(0)
    model = task.build()
    images = torch.rand(6, 1, SIDE, SIDE)
    with torch.no_grad():
        both = model(images)
        assert both.shape == (6, 10)
        torch.testing.assert_close(model(images[:2]), both[:2])


def test_all_but_the_last_layer_is_taken_over() -> None:
    before, after = FewLabels(width=8, classes=40).build().state_dict(), FewLabels(width=8).build().state_dict()
    assert set(before) == set(after)
    other = [name for name in before if before[name].shape != after[name].shape]
    assert other == ["1.weight", "1.bias"]


@pytest.mark.parametrize("warp", [False, True])
def test_a_step_has_gradients_everywhere(warp: bool) -> None:
    task = FewLabels(width=8, warp=warp)
    torch.manual_seed(0)
    model = task.build()
    rows = pa.RecordBatch.from_pydict(
        {"image": pa.array([bytes(range(64))] * 4, pa.binary(64)), "label": pa.array([0, 1, 2, 3], pa.uint8())}
    )
    batch = task.collate(rows, keys(4))
    task.loss(model, batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_figure_compares_runs_that_differ_in_where_they_begin() -> None:
    asked: list[tuple[str, ...]] = []

    class Bench:
        data = "there"

        def run(self, *overrides: str, name: str = "", spec: str = "") -> dict[str, Any]:
            asked.append((*overrides, spec))
            return {"eval": {"accuracy": 0.8 if "train.init_from=null" in overrides else 0.95}}

        def command(self, *arguments: str) -> dict[str, Any]:
            raise AssertionError(arguments)

    (figure,) = figures(Bench())
    assert (figure.baseline, figure.value, figure.target) == pytest.approx((0.8, 0.95, 0.9))
    assert figure.met
    assert asked[0] == ("few_labels_pretrain",)
    alone = ("train.init_from=null", "train.freeze=[]")
    assert [one[1:3] for one in asked[1 : DRAWS + 1]] == [alone] * DRAWS
    assert [(one[0], *one[3:]) for one in asked[1 : DRAWS + 1]] == asked[DRAWS + 1 :]
