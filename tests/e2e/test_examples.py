"""The examples of the documents, as they stand there: they run, and do what the pages say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
from harness import finish, start, steps
from leftovers import Leftovers

from jobs.common.digits import TRAIN_ROWS
from jobs.image_cnn import make_data

EXAMPLES = harness.ROOT / "docs" / "examples"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples and their data, in a directory of their own."""
    home = tmp_path_factory.mktemp("digits")
    shutil.copytree(EXAMPLES, home, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    make_data(str(home / ".data" / "digits"))
    return home


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    """Marks what a test starts; nothing of it may stay."""
    made = Leftovers()
    yield made
    harness.wait_for(lambda: not made.processes())


def python(home: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    """Runs a script of the examples to its end; returns what it printed."""
    # Ray's results go to the home directory.
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(harness.ROOT), **(env or {})}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=harness.SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("workers", [1, 2])
def test_the_script_and_the_task_make_the_same_losses(digits: Path, ray_address: str, workers: int) -> None:
    out = python(digits, "digits_torch.py", str(TRAIN_ROWS), "6")
    expected = [float(loss) for loss in re.findall(r"step \d+ loss ([\d.]+)", out)]
    assert len(expected) == 6
    assert expected[-1] < expected[0]
    changes = [f"name=all-{workers}", f"workers={workers}", f"batch.global={TRAIN_ROWS}", "train.steps=6"]
    run = start("run", "digits.yaml", *changes, "metrics.port=0", "--address", ray_address, "--json", cwd=digits)
    done = finish(run)
    assert done.code == 0, done.err
    found = [line["loss"] for _, line in sorted(steps(digits / "runs" / f"all-{workers}").items())]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.soak
def test_the_search(digits: Path, leftovers: Leftovers) -> None:
    out = python(digits, "tune_digits.py", env=leftovers.env)
    best = re.search(r"best: lr ([\d.e-]+), accuracy ([\d.]+), in (\S+)", out)
    assert best is not None, out
    # A rate of 1e-5 learns nothing in so few steps.
    assert float(best[1]) in (1e-2, 3e-3)
    assert float(best[2]) > 0.8
    assert Path(best[3], "checkpoints").is_dir()
    assert len(list((digits / "runs").glob("digits-*"))) == 3


@pytest.mark.long
def test_the_train_function(digits: Path, leftovers: Leftovers) -> None:
    out = python(digits, "train_digits.py", env=leftovers.env)
    accuracy = re.search(r"^accuracy ([\d.]+)", out, re.MULTILINE)
    assert accuracy is not None, out
    assert float(accuracy[1]) > 0.8
    table = harness.dltrain("checkpoint", "list", str(digits / "runs" / "digits"), "--json").json["checkpoints"]
    assert table[-1]["step"] == 200
    assert table[-1]["num_ranks"] == 2


def test_the_guides_task_and_spec(tmp_path: Path, ray_address: str) -> None:
    guide = (harness.ROOT / "docs" / "task-guide.md").read_text()
    blocks = {
        language: re.findall(rf"^```{language}\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
        for language in ("python", "yaml")
    }
    (tmp_path / "guide.py").write_text("\n".join(blocks["python"]))
    (tmp_path / "regression.yaml").write_text(blocks["yaml"][0])
    harness.write_data(tmp_path / "data" / "train")
    harness.write_data(tmp_path / "data" / "test", rows=90, seed=1)
    arguments = ["regression.yaml", "metrics.port=0", "--address", ray_address, "--json"]
    done = finish(start("run", *arguments, cwd=tmp_path))
    assert done.code == 0, done.err
    assert set(done.json["eval"]) == {"loss", "mae"}
    assert len(steps(tmp_path / "runs" / "regression")) == 20
