"""cluster/Dockerfile against the rules of tests/image_rules.py, and each rule against a Dockerfile that breaks it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from docker.utils import exclude_paths
from image_rules import RULES, Image, findings

from dltrain import __version__

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "cluster" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])
PACKAGES = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def context() -> set[str]:
    """What a builder is given: the tree without what .dockerignore names."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    # It adds the two files that say what to build.
    return set(exclude_paths(str(ROOT), patterns)) - {".dockerignore", "Dockerfile"}


def image(text: str = TEXT) -> Image:
    return Image.read(text, context(), PACKAGES, EXTRAS)


def test_the_image_keeps_to_the_rules() -> None:
    assert findings(image()) == []


BROKEN = [
    ("targets", "FROM packages-cuda AS cuda", "FROM packages-cuda AS gpu", "no target cuda"),
    ("bases", "python:3.11.14-slim-bookworm", "python:latest", "python:latest"),
    ("bases", "python:3.11.14-slim-bookworm", "python:3.11", "whole version"),
    ("bases", "python:3.11.14-slim-bookworm", "python:3.11.14@sha256:abc", "whole version"),
    ("bases", "FROM torch-cpu AS", "FROM torch AS", "is made from torch"),
    ("user", "USER 1000:1000", "USER dltrain", "runs as dltrain"),
    ("user", "USER 1000:1000", "USER 0", "runs as 0"),
    ("user", "USER 1000:1000\n", "", "runs as root"),
    ("sources", "COPY jobs ./jobs", "COPY jobz ./jobs", "COPY jobz"),
    ("sources", "COPY jobs ./jobs", "COPY tests ./tests", "COPY tests"),
    ("sources", "COPY jobs ./jobs", "ADD https://example.com/jobs.tar ./", "ADD https"),
    ("sources", "--from=op-cpu", "--from=op-gpu", "op-gpu"),
    ("pip", "install -c constraints.txt torch", "install torch", "without constraints.txt"),
    ("pip", "install -c constraints.txt torch", "install -c constraints.txt torchvision", "torchvision: not in"),
    ("pip", "jobs,images,", "jobs,video,", "no extra video"),
    ("apt", "--no-install-recommends g++", "g++", "without --no-install-recommends"),
    ("apt", "    && rm -rf /var/lib/apt/lists/*\n", "    && true\n", "without rm -rf"),
    ("apt", "RUN apt-get update \\\n    && apt-get install", "RUN apt-get install", "without apt-get update"),
    ("secrets", "ENV HOME=/home/dltrain", "ENV AWS_SECRET_ACCESS_KEY=x HOME=/home/dltrain", "AWS_SECRET_ACCESS_KEY"),
    ("secrets", "ARG TORCH_CPU_INDEX", "ARG INDEX_PASSWORD\nARG TORCH_CPU_INDEX", "INDEX_PASSWORD"),
    ("start", 'CMD ["dltrain", "--help"]', "CMD dltrain --help", "JSON list"),
    ("start", 'CMD ["dltrain", "--help"]', 'ENTRYPOINT ["dltrain"]', "entry point"),
    ("surroundings", "rsync wget", "rsync", "KubeRay's probes"),
    ("surroundings", "HOME=/home/dltrain", "HOUSE=/home/dltrain", "no HOME"),
    ("surroundings", "/etc/profile.d/", "/etc/profiles/", "login shells"),
    ("surroundings", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "without a token"),
    ("op", "RUN python -m dltrain.training.cpu_op\n", "", "not compiled"),
    ("op", "openssh-client rsync", "openssh-client g++ rsync", "compiler along"),
    ("order", "COPY dltrain/__init__.py ./dltrain/\n", "COPY dltrain ./dltrain\n", "installs everything anew"),
    ("twins", "FROM packages-cuda AS cuda", "FROM packages-cuda AS cuda\nRUN touch x", "differ in more"),
    ("twins", "FROM torch-cuda AS packages-cuda", "FROM torch-cuda AS packages-cuda\nRUN touch x", "cuda differ"),
]


@pytest.mark.parametrize(("rule", "old", "new", "told"), BROKEN, ids=lambda value: str(value)[:25])
def test_a_broken_rule_is_seen(rule: str, old: str, new: str, told: str) -> None:
    assert old in TEXT
    found = findings(image(TEXT.replace(old, new)))
    assert any(line.startswith(f"{rule}: ") and told in line for line in found), found


def test_every_rule_has_a_case_that_breaks_it() -> None:
    assert {rule for rule, *_ in BROKEN} == set(RULES)


def test_a_builder_is_given_the_code_and_nothing_else(tmp_path: Path) -> None:
    found = context()
    assert {"pyproject.toml", "constraints.txt", "dltrain/cli.py", "cluster/ray-up/aws.yaml"} <= found
    tops = {name.split("/")[0] for name in found}
    assert tops <= {"LICENSE", "README.md", "cluster", "constraints.txt", "dltrain", "jobs", "pyproject.toml"}
    assert not [name for name in found if name.endswith(".pyc")]
    # Nor what lies about in somebody's checkout.
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    for name in (".env", "id_rsa", "runs/a/state.json", ".git/config", "dltrain/cli.py", "dltrain/__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    given = exclude_paths(str(tmp_path), patterns)
    files = {name for name in given if (tmp_path / name).is_file()}
    assert files == {"dltrain/cli.py"}


def test_the_python_is_one_that_the_project_supports() -> None:
    (base,) = {stage.base for stage in image().stages.values() if ":" in stage.base}
    major, minor, _ = (int(part) for part in re.findall(r"\d+", base)[:3])
    needed = tuple(int(part) for part in re.findall(r"\d+", PROJECT["requires-python"]))
    assert (major, minor) >= needed


def test_the_version_in_its_name_is_the_projects() -> None:
    names = re.findall(r"registry\.example\.com/dltrain:([\d.]+)", TEXT)
    assert set(names) == {__version__}
