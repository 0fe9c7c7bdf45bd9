"""The steps of cluster/Dockerfile outside of a container: what pip is told works on just the files that are copied.

A fresh environment sees this one's packages, so that nothing is downloaded and nothing compiled anew.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from harness import ROOT
from image_rules import Image

from dltrain.training import cpu_op

TEXT = (ROOT / "cluster" / "Dockerfile").read_text()
IMAGE = Image.read(TEXT, set(), {}, set())


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the packages of this one, but not dltrain."""
    home = tmp_path_factory.mktemp("image") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(sysconfig.get_path("purelib"))
    return home


def copied(stage: str, to: Path) -> Path:
    """A directory with what a stage has in its working directory: its own COPYs and those it is made from."""
    for step in IMAGE.steps(stage, "COPY"):
        origin, sources = step.copied
        target = to / step.value.split()[-1]
        for source in sources if not origin else ():
            path = ROOT / source
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    return to


def run_pip(venv: Path, command: str, cwd: Path, *more: str) -> str:
    """A pip command of the Dockerfile, in the fresh environment and without an index."""
    words = shlex.split(command)
    assert words[:2] == ["pip", "install"]
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python")]
    options = ["--no-index", "--disable-pip-version-check", "--no-build-isolation", *more]
    done = subprocess.run([*pip, "install", *options, *words[2:]], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip_of(stage: str) -> str:
    """The one pip command of a stage."""
    (command,) = [c for step in IMAGE.stages[stage].steps for c in step.commands if c.startswith("pip ")]
    return command


def test_a_stub_of_the_project_names_the_packages(venv: Path, tmp_path: Path) -> None:
    tree = copied("packages-cpu", tmp_path)
    assert sorted(path.name for path in (tree / "dltrain").iterdir()) == ["__init__.py"]
    (tree / "README.md").touch()
    said = run_pip(venv, pip_of("packages-cpu"), tree, "--dry-run")
    # Everything else is there, in the versions of constraints.txt.
    assert said.count("Would install") == 1
    assert "Would install dltrain-" in said
    assert len(said.split("Would install")[1].split()) == 1, said


@pytest.mark.long
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_last_step_installs_all_of_it(target: str, venv: Path, tmp_path: Path) -> None:
    tree = copied(target, tmp_path / "tree")
    run_pip(venv, pip_of(target), tree)
    # From anywhere, as a user of the image would.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(venv / "bin" / command[0]), *command[1:]],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import cluster.spot, dltrain.cli, jobs.image_cnn; print(*{m.__file__ for m in (cluster.spot, dltrain.cli)})"
    assert all(path.startswith(str(venv)) for path in run("python", "-c", code).split())
    (_, *arguments) = shlex.split(IMAGE.steps(target, "CMD")[-1].value.strip("[]").replace(",", " "))
    assert "Train deep-learning models" in run("dltrain", *arguments)
    # The op is taken from beside the packages, where the image has it.
    ops = venv / "dltrain-ops"
    ops.mkdir(exist_ok=True)
    cpu_op.build()
    shutil.copy(cpu_op.place(), ops)
    assert "compiled already" in run("python", "-m", "dltrain.training.cpu_op")
