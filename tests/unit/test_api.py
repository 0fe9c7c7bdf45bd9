"""`dltrain.run` where no Ray is needed: what a spec may be given as, and what can't be trained from a notebook."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import harness
import pytest
import tasks

import dltrain
from dltrain import api
from dltrain.errors import SpecError, UserError
from dltrain.running import setup
from dltrain.spec import JobSpec, parse_spec


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(harness.ROOT / "tests")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the driver is given, which trains nothing."""
    seen: list[Any] = []

    class Told:
        def __init__(self, spec: JobSpec, view: Any, address: str | None) -> None:
            seen.append((spec, type(view).__name__, address))

        def run(self) -> dict[str, Any]:
            return {"run": "tiny", "steps": 20, **({"signal": self.signal} if self.signal else {})}

        signal = 0

    monkeypatch.setattr(api, "Driver", Told)
    seen.append(Told)
    return seen


def test_a_file_a_mapping_and_a_spec_are_the_same(asked: list[Any], tmp_path: Path) -> None:
    raw = harness.make_spec(tmp_path)
    changes: dict[str, Any] = {"workers": 3, "optim.lr": 1e-30, "train": {"epochs": 2}}
    for given in (harness.write_spec(tmp_path, raw), str(tmp_path / "job.yaml"), raw, parse_spec(raw)):
        assert dltrain.run(given, quiet=True, address="auto", **changes)["steps"] == 20
        spec, view, address = asked.pop()
        assert (view, address) == ("NoView", "auto")
        assert (spec.workers.max, spec.optim.lr, spec.train.epochs, spec.train.steps) == (3, 1e-30, 2, None)
        assert spec.task == "tasks:Tiny"


def test_the_class_itself(asked: list[Any], tmp_path: Path) -> None:
    dltrain.run({**harness.make_spec(tmp_path), "task": tasks.Tiny})
    assert asked.pop()[0].task == "tasks:Tiny"
    dltrain.run(harness.make_spec(tmp_path), task=tasks.Pair)
    assert asked.pop()[0].task == "tasks:Pair"


def test_classes_that_workers_cannot_import(asked: list[Any], tmp_path: Path) -> None:
    class Local(tasks.Tiny):
        pass

    with pytest.raises(UserError, match="defined within something else"):
        dltrain.run({**harness.make_spec(tmp_path), "task": Local})
    cell = type("Cell", (tasks.Tiny,), {"__module__": "__main__", "__qualname__": "Cell"})
    for task in (cell, "__main__:Cell"):
        with pytest.raises(
            UserError, match=r"Cell is defined in the notebook.*%%writefile task\.py.*task='task\.py:Cell'"
        ):
            dltrain.run({**harness.make_spec(tmp_path), "task": task})
    assert len(asked) == 1


def test_faults_are_told_as_by_the_command(asked: list[Any], tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        dltrain.run({**harness.make_spec(tmp_path), "wrokers": 2}, **{"optim.lr": -1})
    assert len(caught.value.faults) == 2
    with pytest.raises(SpecError, match="can't be read"):
        dltrain.run("nowhere.yaml")
    with pytest.raises(UserError, match="args: found <object"):
        dltrain.run(harness.make_spec(tmp_path), args=object())


def test_an_interrupted_run_interrupts_the_program(asked: list[Any], tmp_path: Path) -> None:
    asked[0].signal = signal.SIGINT
    with pytest.raises(KeyboardInterrupt, match="stopped at step 20 and saved"):
        dltrain.run(harness.make_spec(tmp_path))
    asked[0].signal = signal.SIGTERM
    with pytest.raises(SystemExit) as caught:
        dltrain.run(harness.make_spec(tmp_path))
    assert caught.value.code == 143


def test_signals_are_left_alone_in_a_thread() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def within() -> None:
        with setup.signals(lambda number: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=within)
    thread.start()
    thread.join()
    assert seen == [before]
    with setup.signals(lambda number: None):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_all_that_is_exported_is_there() -> None:
    assert sorted(dltrain.__all__) == dltrain.__all__
    for name in dltrain.__all__:
        assert getattr(dltrain, name) is not None
    assert set(dltrain.__all__) == set(dltrain._HOMES)
