"""What `dltrain new` writes: files that a linter accepts, whose task learns; and what it refuses."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dltrain import cli
from dltrain.errors import UserError
from dltrain.spec import load_spec
from dltrain.training.task import check_task
from dltrain.using.starter import write_starter

RUFF = str(Path(sys.executable).parent / "ruff")


def test_ruff_accepts_it_as_it_is(tmp_path: Path) -> None:
    write_starter("two_rings", str(tmp_path))
    for command in (["check"], ["format", "--check"], ["format", "--check", "--line-length", "120"]):
        done = subprocess.run([RUFF, *command, "--isolated", "."], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_yaml_names_the_task(tmp_path: Path) -> None:
    write_starter("two_rings", str(tmp_path))
    spec = load_spec(tmp_path / "two_rings.yaml")
    assert (spec.name, spec.task) == ("two_rings", "two_rings.py:TwoRings")
    check_task(spec.task, str(tmp_path))
    assert yaml.safe_load((tmp_path / "two_rings.yaml").read_text())["data"]["train"] == ".data/two_rings/train"
    task = next(n for n in ast.parse((tmp_path / "two_rings.py").read_text()).body if isinstance(n, ast.ClassDef))
    assert 20 <= task.end_lineno - task.lineno <= 45  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("my-net", "can't be the name of a Python module"),
        ("class", "can't be the name of a Python module"),
        ("torch", "there is a Python module 'torch'"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        write_starter(name, str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ring.yaml").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        cli.main(["new", "ring"])
    assert caught.value.code == 2
    assert "ring.yaml is there already, and nothing is written over" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ring.yaml"]
    with pytest.raises(SystemExit):
        cli.main(["new", "circle"])
    out = capsys.readouterr().out
    assert "wrote circle.py, circle.yaml, test_circle.py" in out
    assert "dltrain run circle.yaml" in out
