"""The keeper: which checkpoints exist, which evaluation is the best of those that do, and who may write."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import pytest

from dltrain.checkpoint.commit import find, list_checkpoints, write_rank
from dltrain.observing.reports import Saved
from dltrain.running.keeper import REPLACED, Keeper
from dltrain.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "checkpoints")


def keeper_of(store: Store, is_replaced: Callable[[], bool] = lambda: False) -> Keeper:
    keeper = Keeper(store, 3, is_replaced, print)
    keeper.find()
    return keeper


def best(step: int) -> dict[str, Any]:
    return {"metric": "accuracy", "value": step / 100, "step": step}


def save(keeper: Keeper, store: Store, step: int, found: int | None, problem: Exception | None = None) -> str:
    """Saves a step, of which the manifest names the best one; returns why it failed."""

    def first() -> None:
        if problem:
            raise problem

    file = write_rank(store, step, 1, 0, b"x" * step)
    keeper.saved(Saved(0, step, step * 8, {**file, "parts": []}, 0.1, {"optimizer_step": step}))
    keeper.commit(step, 1, {"best": best(found) if found else None}, first)
    ((event, _),) = harness.wait_for(keeper.take)
    return str(event.reason)


def test_the_best_is_one_whose_checkpoint_is_there(store: Store) -> None:
    keeper = keeper_of(store)
    assert keeper.best(None) is None
    assert save(keeper, store, 10, found=10) == ""
    assert keeper.best(best(10)) == best(10)
    # The disk is full in the moment in which a better one is saved.
    assert save(keeper, store, 20, found=20, problem=OSError("No space left")) == "OSError: No space left"
    assert keeper.best(best(20)) == best(10)
    # Its files are still on their way.
    assert keeper.best(best(20), written=[20]) == best(20)
    assert save(keeper, store, 30, found=20) == ""
    assert [c.manifest["best"] for c in list_checkpoints(store)] == [best(10), best(10)]
    assert find(store, "best").step == 10
    keeper.close()
    # Another start goes on from what is there.
    assert keeper_of(store).best(best(20)) == best(10)


def test_none_is_the_best_where_the_first_was_lost(store: Store) -> None:
    keeper = keeper_of(store)
    save(keeper, store, 10, found=10, problem=OSError("No space left"))
    assert keeper.best(best(10)) is None
    assert save(keeper, store, 20, found=10) == ""
    assert find(store).manifest["best"] is None
    keeper.close()


def test_what_is_being_committed_is_found(store: Store) -> None:
    keeper, answer = keeper_of(store), threading.Event()
    file = write_rank(store, 10, 1, 0, b"x")
    keeper.saved(Saved(0, 10, 80, {**file, "parts": []}, 0.1, {"optimizer_step": 10}))

    def slowly() -> None:
        answer.wait(10.0)

    keeper.commit(10, 1, {"best": None}, slowly)
    threading.Timer(0.2, answer.set).start()
    found = keeper.find()
    assert found is not None
    assert found.step == 10
    assert keeper.newest is found
    keeper.close()


def test_who_was_replaced_commits_nothing_and_writes_no_line(store: Store) -> None:
    keeper = keeper_of(store, lambda: True)
    assert save(keeper, store, 10, found=10, problem=AssertionError("it wrote")) == REPLACED
    assert list_checkpoints(store) == []
    keeper.close()
