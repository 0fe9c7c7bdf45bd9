"""jobs.finance_rnn from its data to a forecast for prices out of a file."""

from __future__ import annotations

from pathlib import Path

import harness
import numpy as np

from jobs.finance_rnn import make_data


def test_tomorrow(tmp_path: Path, ray_address: str) -> None:
    make_data(str(tmp_path))
    spec = str(harness.ROOT / "jobs" / "finance_rnn.yaml")
    where = [f"data.train={tmp_path / 'train'}", f"data.eval={tmp_path / 'test'}", f"runs={tmp_path / 'runs'}"]
    more = ["train.epochs=4", "metrics.port=0", "--json", "--address", ray_address]
    env = {"PYTHONPATH": str(harness.ROOT), "DLTRAIN_RUNS": str(tmp_path / "runs")}
    done = harness.dltrain("run", spec, *where, *more, env=env)
    assert done.code == 0, done.err
    # Untrained, a mean of squared returns, it is at 0.63.
    assert done.json["eval"]["qlike"] < 0.58
    assert done.json["eval"]["garch_qlike"] < 0.62
    moves = np.random.default_rng(0).normal(size=260) * 0.01
    for name, factor in (("calm", 0.5), ("wild", 3.0)):
        prices = 100 * np.exp(np.cumsum(moves * factor))
        (tmp_path / f"{name}.txt").write_text("\n".join(map(str, prices)))
    files = [str(tmp_path / f"{name}.txt") for name in ("calm", "wild")]
    found = harness.dltrain("predict", "finance-rnn", *files, "--json", env=env)
    assert found.code == 0, found.err
    calm, wild = (one["prediction"]["volatility"] for one in found.json["results"])
    # Percent a day: half of one, and three.
    assert 0.25 < calm < 1.0
    assert 1.5 < wild < 6.0
