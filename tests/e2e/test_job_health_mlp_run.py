"""jobs.health_mlp from its data to what it says of a table of patients."""

from __future__ import annotations

from pathlib import Path

import harness
import numpy as np
import pyarrow.csv as csv
import pyarrow.parquet as pq

from jobs.health_mlp import make_data


def test_patients_of_another_fold(tmp_path: Path, ray_address: str) -> None:
    data = tmp_path / "data"
    make_data(str(data))
    where = [f"data.train={data}/fold-[!0]/*.parquet", f"data.eval={data}/fold-0", f"runs={tmp_path / 'runs'}"]
    spec = str(harness.ROOT / "jobs" / "health_mlp.yaml")
    more = ["train.epochs=10", "train.eval_every=30", "metrics.port=0", "--json", "--address", ray_address]
    env = {"PYTHONPATH": str(harness.ROOT), "DLTRAIN_RUNS": str(tmp_path / "runs")}
    done = harness.dltrain("run", spec, *where, *more, env=env)
    assert done.code == 0, done.err
    assert done.json["eval"]["auc"] > 0.95
    assert done.json["eval"]["accuracy"] > 0.85
    table = pq.read_table(data / "fold-0")
    csv.write_csv(table.drop_columns(["malignant", "calibrates"]), tmp_path / "patients.csv")
    found = harness.dltrain("predict", "health-mlp", str(tmp_path / "patients.csv"), "--json", env=env)
    assert found.code == 0, found.err
    said = np.array([one["prediction"]["malignant"] for one in found.json["results"]])
    assert (said == np.array(table["malignant"])).mean() > 0.85
    assert found.json["bad"] == 0
