"""The jobs as examples: short, with a spec each, and their figures are compared as they should be."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dltrain.spec import load_spec
from jobs.common.data import write_splits
from jobs.common.figures import Figure, Goal, reached

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__")
MOST_LINES = {"jobs": 150, "jobs/common": 100}


@pytest.mark.parametrize("folder", MOST_LINES)
def test_they_are_short(folder: str) -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / folder).glob("*.py")}
    assert {name: count for name, count in lines.items() if count > MOST_LINES[folder]} == {}


@pytest.mark.parametrize("job", JOBS)
def test_each_has_a_spec_that_names_it_a_data_maker_and_a_goal(job: str) -> None:
    spec = load_spec(str(ROOT / "jobs" / f"{job}.yaml"))
    assert spec.task.startswith(f"jobs.{job}:")
    module = importlib.import_module(f"jobs.{job}")
    assert callable(module.make_data)
    assert hasattr(module, "GOALS") or callable(module.figures)
    assert hasattr(module, spec.task.split(":")[1])


def test_splits_are_written_whole_in_small_groups(tmp_path: Path) -> None:
    table = pa.table({"x": list(range(130))})
    assert write_splits(str(tmp_path), {"train": table, "test": table.slice(0, 3)}, rows_per_group=16) == {
        "train": 130,
        "test": 3,
    }
    files = sorted((tmp_path / "train").glob("*.parquet"))
    assert len(files) == 3
    assert pa.concat_tables([pq.read_table(file) for file in files]) == table
    assert pq.read_metadata(files[0]).row_group(0).num_rows == 16


def test_a_figure_that_is_not_a_number_is_missed() -> None:
    assert Figure("accuracy", 0.98, target=0.98).met
    assert not Figure("accuracy", math.nan, target=0.98).met
    assert Figure("error", 0.1, target=0.1, at_least=False).met
    assert not Figure("error", math.nan, target=0.1, at_least=False).met


def test_goals_are_looked_up_in_the_evaluation() -> None:
    goals = (
        Goal("test accuracy", "accuracy", 0.9),
        Goal("bits", "bpc", 2.0, at_least=False),
        Goal("none", "other", 1.0),
    )
    found = reached(goals, {"eval": {"accuracy": 0.95, "bpc": 2.5}}, {"bpc": 2.2})
    assert [figure.met for figure in found] == [True, False, False]
    assert [figure.baseline for figure in found] == [None, 2.2, None]
