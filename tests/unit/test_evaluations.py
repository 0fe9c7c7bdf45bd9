"""What a run knows of its evaluations: the best one, and when there has been no better one for too long."""

from __future__ import annotations

from typing import Any

from dltrain.observing.reports import EvalReport
from dltrain.running.evaluations import Evaluations
from dltrain.spec import TrainSpec


def of(**fields: Any) -> Evaluations:
    return Evaluations(TrainSpec(**{"steps": 100, "early_stop": 2, **fields}))


def report(step: int, loss: float, is_best: bool) -> EvalReport:
    return EvalReport(0, step, {"loss": loss}, is_best, 0.1)


def best(step: int, value: float) -> dict[str, Any]:
    return {"metric": "loss", "value": value, "step": step}


def manifest(step: int, evaluations: Evaluations, **fields: Any) -> dict[str, Any]:
    train = TrainSpec(**{"steps": 100, "early_stop": 2, **fields})
    return {"step": step, "spec": {"train": train.model_dump(mode="json")}, **evaluations.to_dict()}


def after(*losses: float) -> Evaluations:
    """Evaluated every 10 steps."""
    found = of()
    for i, loss in enumerate(losses):
        found.add(report(10 * (i + 1), loss, loss == min(losses[: i + 1])))
    return found


def test_the_best_and_how_long_there_was_no_better_one() -> None:
    assert after().best is None
    assert after().waited == 0
    found = after(0.5, 0.4, 0.6, 0.7)
    assert found.best == best(20, 0.4)
    assert found.waited == 2
    assert found.metrics == {"loss": 0.7}
    assert found.step == 40


def test_steps_that_are_made_again_are_evaluated_again() -> None:
    found = after(0.5, 0.6, 0.4, 0.7)
    found.restart(25)
    assert found.best == best(10, 0.5)
    assert found.waited == 1
    found.add(report(20, 0.6, False))
    assert found.waited == 1


def test_a_better_one_counts_for_patience_though_its_checkpoint_was_lost() -> None:
    found = after(0.5, 0.6, 0.4)
    found.best = best(10, 0.5)
    assert found.step == -1
    assert found.waited == 0
    found.restart(32)
    found.add(report(40, 0.45, True))
    assert found.best == best(40, 0.45)


def test_a_checkpoint_knows_them() -> None:
    before, found = after(0.5, 0.6), of()
    found.restore(manifest(25, before), {"state": "failed", "step": 25})
    assert (found.best, found.waited, found.metrics) == (best(10, 0.5), 1, {"loss": 0.6})
    assert not found.ended_early


def test_a_run_that_ended_early_has_ended_unless_it_is_more_patient_now() -> None:
    ended, over = after(0.5, 0.6, 0.7), {"state": "finished", "step": 30}
    for patience, has in ((2, True), (1, True), (3, False), (None, False)):
        found = of(early_stop=patience)
        found.restore(manifest(30, ended), over)
        assert found.ended_early is has
    found = of()
    found.restore(manifest(30, ended), {"state": "failed", "step": 30})
    assert not found.ended_early


def test_a_run_that_has_made_all_its_steps_has_not_ended_early() -> None:
    found = of(steps=200)
    found.restore(manifest(30, after(0.7, 0.6, 0.5)), {"state": "finished", "step": 30})
    assert not found.ended_early


def test_the_best_by_another_metric_is_not_compared_with() -> None:
    for other in ({"metric": "accuracy", "mode": "max"}, {"mode": "max"}):
        found = of(best=other)
        found.restore(manifest(30, after(0.5, 0.6, 0.7)), {"state": "finished", "step": 30})
        assert found.best is None
        assert found.waited == 0
        assert not found.ended_early
