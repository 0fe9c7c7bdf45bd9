"""The house's rules that can be read off the source: import directions, pure modules, docstrings, sizes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dltrain"
# An arrow may only point to a higher number.
LEVELS = {
    "cli": 0,
    "cli_data": 0.5,
    "cli_deploy": 0.5,
    "cli_doctor": 0.5,
    "cli_jobs": 0.5,
    "cli_report": 0.5,
    "cli_use": 0.5,
    "api": 0.6,
    "integrations": 0.6,
    "doctor": 0.7,
    "using": 0.7,
    "running": 1,
    "deploying": 1,
    "training": 2,
    "data": 3,
    "checkpoint": 3,
    "observing": 3,
    "artifact": 4,
    "store": 4,
    "spec": 4,
    "conditions": 5,
    "wording": 5,
    "errors": 5,
}
PURE = (
    "data/order.py",
    "data/identity.py",
    "data/mixture.py",
    "running/lifecycle.py",
    "conditions.py",
    "deploying/manifests.py",
    "deploying/options.py",
    "deploying/pods.py",
    "deploying/rules.py",
    "deploying/rules_kuberay.py",
    "deploying/rules_pods.py",
    "deploying/rules_run.py",
    "doctor/bare.py",
    "doctor/finding.py",
    "doctor/gpu.py",
    "doctor/job.py",
    "doctor/machine.py",
    "doctor/nodes.py",
    "observing/charts.py",
    "observing/curves.py",
    "observing/faults.py",
    "observing/ledger.py",
    "observing/page.py",
    "observing/top.py",
    "observing/web_compare.py",
    "observing/web_report.py",
    "observing/when.py",
    "observing/words.py",
    "deploying/submission.py",
    "spec/base.py",
    "spec/data.py",
    "spec/job.py",
    "spec/paths.py",
    "spec/running.py",
    "spec/training.py",
    "spec/watching.py",
)
IMPURE_IMPORTS = {"torch", "ray", "deepspeed", "fsspec", "s3fs", "time", "random", "socket", "subprocess", "threading"}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Every module imported anywhere in a file, by its full name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return
    for name in imports(path):
        if name.startswith("dltrain."):
            there = name.split(".")[1]
            allowed = there == here or LEVELS[here] < LEVELS[there]
            assert allowed, f"{path.relative_to(ROOT)} imports {name}: {here} may not know of {there}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_have_no_io(name: str) -> None:
    found = {module.split(".")[0] for module in imports(PACKAGE / name)}
    assert not found & IMPURE_IMPORTS


@pytest.mark.parametrize(
    "name",
    [
        "running/agent.py",
        "running/driver.py",
        "running/worker.py",
        "deploying/jobs.py",
        "cli.py",
        "cli_data.py",
        "cli_deploy.py",
        "cli_doctor.py",
        "cli_jobs.py",
        "cli_report.py",
        "doctor/examination.py",
        "doctor/visitor.py",
    ],
)
def test_starting_does_not_pay_for_torch(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {module for module in top if module.split(".")[0] in ("torch", "deepspeed", "ray")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_documented_and_short(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
    assert len(text.splitlines()) <= 450, f"{path} is too long to be read in one go"


def test_a_broken_direction_is_seen(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from dltrain.running.driver import Driver\nimport torch\n")
    assert imports(bad) == ["dltrain.running.driver", "torch"]
    assert not LEVELS["data"] < LEVELS["running"]


def test_no_two_tests_share_a_name() -> None:
    """Without packages pytest can't collect them together, which `make test` does."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
