"""What jobs.health_mlp measures, learns from whom, and says of patients."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from dltrain import Batch, Keys
from jobs.common.binary import calibration_error, histogram, roc_auc
from jobs.health_mlp import FEATURES, HealthMlp, make_data

PATIENTS = 40


def batch(own: float = 0.0) -> Batch:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.lognormal(size=(PATIENTS, len(FEATURES))).astype(np.float32))
    labels = torch.from_numpy((rng.random(PATIENTS) < 0.4).astype(np.float32))
    return Batch(PATIENTS, x=x, malignant=labels, own=torch.full((PATIENTS,), own))


def test_the_area_under_the_curve_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(500) < 0.3
    logits = rng.normal(size=500) * 3 + labels
    halves = [histogram(torch.from_numpy(logits[i::2]), torch.from_numpy(labels[i::2])) for i in (0, 1)]
    assert roc_auc((halves[0] + halves[1]) / 500) == pytest.approx(roc_auc_score(labels, logits), abs=1e-3)
    # All in one bin say nothing, and so does one label alone.
    assert roc_auc(histogram(torch.full((4,), 99.0), torch.tensor([0, 1, 0, 1]))) == 0.5
    assert np.isnan(roc_auc(histogram(torch.zeros(4), torch.ones(4))))


def test_probabilities_that_are_what_happens_have_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=20_000) * 2)
    labels = torch.from_numpy(rng.random(20_000)) < logits.sigmoid()
    assert calibration_error(histogram(logits, labels)) < 0.01
    # Three times as sure as it should be.
    assert calibration_error(histogram(3 * logits, labels)) > 0.1
    # All are given 0.5, and one in four is: a quarter off.
    quarter = torch.arange(400) % 4 == 0
    assert calibration_error(histogram(torch.zeros(400), quarter)) == pytest.approx(0.25, abs=0.002)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_patient_teaches_the_network_or_calibrates_it(own: float) -> None:
    task = HealthMlp(width=8)
    torch.manual_seed(0)
    model = task.build()
    task.loss(model, batch(own)).backward()
    moved = {name: bool(p.grad.abs().sum() > 0) for name, p in model.named_parameters() if p.grad is not None}
    assert len(moved) == len(list(model.parameters()))
    assert {moved["stretch"], moved["shift"]} == {own == 1.0}
    assert {moved[name] for name in moved if name.startswith("layers")} == {own == 0.0}


def test_folds_hold_each_patient_once(tmp_path: Path) -> None:
    rows = make_data(str(tmp_path))
    assert list(rows) == [f"fold-{i}" for i in range(5)]
    assert sum(rows.values()) == 569
    folds = [pq.read_table(tmp_path / name) for name in rows]
    assert {fold["malignant"].to_pandas().sum() for fold in folds} <= {42, 43}
    patients = {tuple(row.values()) for fold in folds for row in fold.select(FEATURES).to_pylist()}
    assert len(patients) == 569
    assert sum(fold["calibrates"].to_pandas().sum() for fold in folds) == 143
    # The measures have the names that are told: a worst radius is never below the mean one.
    assert all((np.array(fold["worst_radius"]) >= np.array(fold["mean_radius"])).all() for fold in folds)


def test_rows_are_predicted_and_shown(tmp_path: Path) -> None:
    make_data(str(tmp_path))
    table = pq.read_table(tmp_path / "fold-0").slice(0, 5).combine_chunks()
    task = HealthMlp(width=8)
    model = task.build().eval()
    keys = Keys(0, np.zeros(5, np.int64), np.arange(5))
    found = task.collate(table.to_batches()[0], keys)
    assert found.x.shape == (5, 30)
    with torch.no_grad():
        said = task.predict(model, found)
        sums = task.evaluate(model, found)
        (shown,) = task.samples(model, found)
    assert [one["malignant"] for one in said] == [one["probability"] > 0.5 for one in said]
    metrics = task.metrics({name: s.total / s.count for name, s in sums.items()})
    assert set(metrics) == {"loss", "accuracy", "auc", "calibration_error", "uncalibrated_error"}
    # Before it has learned it stretches nothing.
    assert metrics["calibration_error"] == metrics["uncalibrated_error"]
    assert Image.open(io.BytesIO(shown.data)).size == (720, 260)
