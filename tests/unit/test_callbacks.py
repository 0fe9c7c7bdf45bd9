"""Callbacks, samples and the profiler on one rank, without a run around them."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import pytest
import torch

from dltrain import Artifact, Batch, Callback, Task, every
from dltrain.errors import SpecError, UserError
from dltrain.observing.reports import Logged, Profiled, Shown
from dltrain.spec import ProfileSpec, parse_spec
from dltrain.store import open_store
from dltrain.training.callbacks import Moment, check_callbacks
from dltrain.training.engine import StepResult
from dltrain.training.onlookers import Onlookers
from dltrain.training.profiler import Profiler

CPU = torch.device("cpu")


def onlookers(tmp_path: Path, task: Task, notes: list[str] | None = None, **changes: Any) -> Onlookers:
    spec = parse_spec(harness.make_spec(tmp_path, **changes))
    job = SimpleNamespace(spec=spec, rank=0, num_ranks=1, run=str(tmp_path / "run"))
    networks = SimpleNamespace(model=torch.nn.Linear(2, 1), averaged=contextlib.nullcontext)
    note = notes.append if notes is not None else lambda text: None
    return Onlookers(task, networks, job, CPU, lambda phase: None, note)  # type: ignore[arg-type]


class Watched(Task):
    def __init__(self, *callbacks: Callback) -> None:
        self.callbacks = callbacks


# ---- callbacks ----


def test_they_are_called_when_they_are_due_in_their_order(tmp_path: Path) -> None:
    called: list[tuple[str, str, int]] = []

    def make(name: str) -> Any:
        return lambda moment: called.append((name, moment.when, moment.step))

    looking = onlookers(
        tmp_path,
        Watched(
            every(10, make("a")),
            Callback(make("b"), every=20),
            Callback(make("c"), 15, "eval"),
            Callback(make("d"), when="end"),
        ),
    )
    for step in range(1, 31):
        list(looking.after("step", step))
        if step % 10 == 0:
            list(looking.after("eval", step))
    list(looking.after("end", 30))
    steps = [("a", "step", 10), ("a", "step", 20), ("b", "step", 20), ("a", "step", 30), ("c", "eval", 30)]
    assert called == [*steps, ("d", "end", 30)]


def test_what_they_are_told_and_what_they_log(tmp_path: Path) -> None:
    told: list[Moment] = []

    def look(moment: Moment) -> None:
        told.append(moment)
        moment.log(norm=torch.tensor(2.5), step_twice=2 * moment.step)

    looking = onlookers(tmp_path, Watched(every(1, look)))
    looking.made(3, StepResult(True, True, 1.5, 0.1, 0.75, {"judge": 0.5, "maker": 0.25}))
    (logged,) = looking.after("step", 3)
    assert logged == Logged(0, 3, {"norm": 2.5, "step_twice": 6.0})
    (moment,) = told
    assert (moment.step, moment.rank, moment.num_ranks, moment.loss, moment.learning_rate) == (3, 0, 1, 0.75, 0.1)
    assert moment.losses == {"judge": 0.5, "maker": 0.25}
    # After a new start the step before it is not this process's.
    list(looking.after("step", 2))
    assert math.isnan(told[-1].loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: every(0, print), "every is 0"),
        (lambda: Callback(print, when="never"), "when is 'never'; allowed: step, eval, checkpoint, end"),  # type: ignore[arg-type]
        (lambda: Callback("print"), "found str"),  # type: ignore[arg-type]
        (lambda: check_callbacks([print]), "must be a list or tuple of every"),
        (lambda: check_callbacks(print), "must be a list or tuple of every"),
    ],
)
def test_mistakes_are_told(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_only_numbers_are_logged(tmp_path: Path) -> None:
    looking = onlookers(tmp_path, Watched(every(1, lambda moment: moment.log(name="x"))))
    with pytest.raises(UserError, match=r"log\(name=\.\.\.\) got str"):
        list(looking.after("step", 1))


def test_what_a_callback_raises_is_raised(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        list(onlookers(tmp_path, Watched(every(1, lambda moment: 1 / 0))).after("step", 1))


# ---- samples ----


class Shows(Task):
    def __init__(self, problem: Exception | None = None) -> None:
        self.problem, self.times = problem, 0

    def samples(self, model: Any, batch: Batch) -> list[Artifact]:
        self.times += 1
        if self.problem:
            raise self.problem
        assert not torch.is_grad_enabled()
        return [Artifact.text(f"{float(torch.rand(1)):.6f} {batch.x}", "noise")]


def show(looking: Onlookers, step: int = 5, best: bool = True, last: bool = False) -> list[Any]:
    return list(looking.evaluated(step, {"mae": 0.5}, best, last, lambda: Batch(1, x=1)))


def test_the_best_and_the_last_are_shown(tmp_path: Path) -> None:
    task = Shows()
    looking = onlookers(tmp_path, task)
    assert show(looking, best=False) == []
    (first,), (again,) = show(looking), show(looking, best=False, last=True)
    assert isinstance(first, Shown)
    assert (first.step, first.is_best, again.is_best, first.metrics) == (5, True, False, {"mae": 0.5})
    # The same random numbers, whatever was drawn before.
    assert first.artifacts == again.artifacts
    (other,) = show(looking, step=6)
    assert other.artifacts != first.artifacts
    assert task.times == 3


@pytest.mark.parametrize("problem", [KeyError("label"), UserError("pictures need Pillow")])
def test_what_samples_raises_is_a_note(tmp_path: Path, problem: Exception) -> None:
    notes: list[str] = []
    looking = onlookers(tmp_path, Shows(problem), notes)
    assert show(looking) == show(looking, step=6) == []
    assert notes == [f"step 5: no samples are shown ({type(problem).__name__}: {problem}); the run goes on"]


def test_a_batch_that_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    notes: list[str] = []
    looking, task = onlookers(tmp_path, Shows(), notes), Shows()

    def gone() -> Batch:
        raise OSError("gone")

    assert list(looking.evaluated(5, {}, True, False, gone)) == []
    assert (task.times, len(notes)) == (0, 1)


def test_a_task_without_samples_costs_nothing(tmp_path: Path) -> None:
    def never() -> Batch:
        raise AssertionError("nobody asked")

    assert list(onlookers(tmp_path, Watched()).evaluated(5, {}, True, True, never)) == []


# ---- the profiler ----


def work(profiler: Profiler, steps: range) -> list[Profiled]:
    found: list[Profiled] = []
    for step in steps:
        profiler.before(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        found += profiler.after(step)
    return found


def test_a_trace_of_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    profiler = Profiler(ProfileSpec(steps="3..5", memory=True), 1 - 1, open_store(tmp_path))
    assert work(profiler, range(1, 3)) == []
    assert not (tmp_path / "profile").exists()
    (done,) = work(profiler, range(3, 9))
    assert (done.step, done.last, done.file) == (3, 5, "profile/step-00000003-rank-0.json.gz")
    path = tmp_path / done.file
    assert path.stat().st_size == done.num_bytes
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert len([name for name in names if name.startswith("aten::mm")]) == 3
    assert {"step 3", "step 4", "step 5"} <= set(names)
    assert any("[memory]" in name for name in names)
    # Nothing else lies there.
    assert [p.name for p in (tmp_path / "profile").iterdir()] == [path.name]


def test_a_run_that_ends_in_between_leaves_what_there_is(tmp_path: Path) -> None:
    profiler = Profiler(ProfileSpec(steps="3..50"), 0, open_store(tmp_path))
    assert work(profiler, range(1, 5)) == []
    (done,) = profiler.end(4)
    assert (done.step, done.last) == (3, 4)
    # Of a step that was not made there is nothing.
    idle = Profiler(ProfileSpec(steps="3"), 0, open_store(tmp_path / "idle"))
    idle.before(3)
    assert list(idle.end(2)) == []
    assert not (tmp_path / "idle").exists()


def test_ranks_that_are_not_meant_are_left_alone(tmp_path: Path) -> None:
    for profiler in (
        Profiler(None, 0, open_store(tmp_path)),
        Profiler(ProfileSpec(steps="1..9"), 1, open_store(tmp_path)),
    ):
        assert work(profiler, range(1, 12)) == []


def test_a_process_that_dies_in_between_leaves_no_half_file(tmp_path: Path) -> None:
    code = f"""
import os, torch
from dltrain.spec import ProfileSpec
from dltrain.store import open_store
from dltrain.training.profiler import Profiler
profiler = Profiler(ProfileSpec(steps="1..5"), 0, open_store({str(tmp_path)!r}))
profiler.before(1); torch.ones(8) + 1; list(profiler.after(1)); os._exit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7
    assert list(tmp_path.iterdir()) == []


def test_the_spec(tmp_path: Path) -> None:
    assert (ProfileSpec(steps="10..15").first, ProfileSpec(steps="10..15").last) == (10, 15)
    one = ProfileSpec.model_validate({"steps": 7})
    assert (one.first, one.last, one.ranks) == (7, 7, (0,))
    for wrong in ("15..10", "0..3", "a", "3..", "1...2"):
        with pytest.raises(SpecError, match=r"profile\.steps: found"):
            parse_spec(harness.make_spec(tmp_path, profile={"steps": wrong}))
    with pytest.raises(SpecError, match=r"profile\.ranks: found 2; the last rank is 1"):
        parse_spec(harness.make_spec(tmp_path, profile={"steps": 3, "ranks": [0, 2]}))
