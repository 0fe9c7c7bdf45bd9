"""Taking batches a few at a time: how many, in which order, and what ends it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from dltrain.data.batch import Batch
from dltrain.data.stream import StepBatch
from dltrain.training.ahead import MOST, WISHES, Ahead, anchor_steps, num_ahead, snapshot_steps
from dltrain.training.meter import Phases


class Stream:
    """Batches 1, 2, ... of so many units; the one that is bad raises."""

    def __init__(self, bad: int = 0) -> None:
        self.made, self.bad, self.prefetched = 0, bad, False

    def __next__(self) -> StepBatch:
        if self.made + 1 == self.bad:
            raise KeyError("label")
        self.made += 1
        micros = [Batch(self.made, x=torch.zeros(4)), Batch(0, x=torch.zeros(4))]
        return StepBatch(self.made, 1, micros, np.zeros(1, np.int64), np.zeros(1, np.int64), {})

    def prefetch(self) -> None:
        self.prefetched = True


def ahead(stream: Any) -> Ahead:
    return Ahead(stream, 1, torch.device("cpu"))


def train(source: Ahead, steps: int, seconds: float, of: int) -> list[float]:
    counts = []
    for step in range(steps):
        following = source.take(of - step, wish="")
        assert following is not None
        counts.append(following.global_count)
        source.trained(seconds)
    return counts


def test_how_many_steps_are_exchanged_at_once() -> None:
    assert num_ahead(0.0, 100.0) == 1
    assert num_ahead(1e-4, 100.0) == MOST
    assert num_ahead(0.02, 100.0) == 12
    assert num_ahead(0.02, 20 * 2**20) == 3
    assert num_ahead(0.02, 2**30) == 1
    assert num_ahead(5.0, 100.0) == 1


def test_every_batch_comes_once_in_order_and_no_more_than_there_are() -> None:
    stream = Stream()
    source = ahead(stream)
    assert train(source, 30, 0.02, of=30) == list(range(1, 31))
    assert stream.made == 30


def test_few_are_held_at_first_and_when_steps_are_slow() -> None:
    stream = Stream()
    source = ahead(stream)
    train(source, 2, 0.02, of=100)
    assert stream.made == 2
    train(source, 1, 0.02, of=98)
    assert stream.made == 14
    slow = Stream()
    train(ahead(slow), 5, 1.0, of=100)
    assert slow.made == 5


def test_a_stop_is_noticed_at_the_next_exchange() -> None:
    source = ahead(Stream())
    train(source, 3, 0.02, of=100)
    taken = [source.take(97, wish="stop") is not None for _ in range(12)]
    assert taken == [True] * 11 + [False]


def test_who_looks_ahead_knows_that_this_step_is_the_last() -> None:
    source = ahead(Stream())
    train(source, 3, 0.02, of=100)
    # There are batches that were agreed on: nothing ends before they are trained.
    assert source.look(97, wish="stop") == ""
    train(source, 11, 0.02, of=97)
    assert source.look(86, wish="stop") == source.agreed == "stop"
    assert source.look(86, wish="") == "stop"
    assert source.take(86, wish="") is None


def test_looking_ahead_takes_nothing() -> None:
    source = ahead(Stream())
    assert source.look(10, wish="") == ""
    assert train(source, 10, 0.02, of=10) == list(range(1, 11))


def test_copies_to_other_machines_are_as_far_apart_as_the_slowest_needs() -> None:
    assert anchor_steps(0.0, 0.1) == 10
    assert anchor_steps(100e6, 0.1) == 20
    assert anchor_steps(0.0, 0.1, copy_seconds=4.0) == 60
    source = ahead(Stream())
    source.anchor_took(4.0)
    train(source, 30, 0.1, of=100)
    assert source.anchor_every == 60


def test_every_wish_is_agreed_on() -> None:
    for wish in WISHES:
        source = ahead(Stream())
        assert source.take(10, wish=wish) is None
        assert source.agreed == wish


def test_snapshots_take_at_most_a_fiftieth_of_the_time() -> None:
    assert snapshot_steps(0.0, 0.0) == 1
    assert snapshot_steps(0.0003, 0.02) == 1
    assert snapshot_steps(0.0005, 0.02) == 2
    assert snapshot_steps(2.0, 1.0) == 100
    source = ahead(Stream())
    for _ in range(5):
        source.snapshot_took(0.004)
    train(source, 30, 0.02, of=100)
    assert source.snapshot_every == 10


def test_what_a_batch_raises_comes_in_its_turn() -> None:
    source = ahead(Stream(bad=5))
    assert train(source, 4, 0.02, of=100) == [1, 2, 3, 4]
    for _ in range(2):
        with pytest.raises(KeyError, match="label"):
            source.take(96, wish="")


def test_a_thread_makes_batches_when_that_takes_a_share_of_the_steps() -> None:
    idle, busy = Stream(), Stream()
    train(ahead(idle), 60, 0.1, of=100)
    assert not idle.prefetched
    # Steps that took no longer than making their batches.
    train(ahead(busy), 60, 1e-6, of=100)
    assert busy.prefetched


def test_waiting_for_other_ranks_is_told_from_waiting_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Stream):
        def __next__(self) -> StepBatch:
            time.sleep(0.02)
            return super().__next__()

    def all_reduce(tensor: torch.Tensor) -> None:
        time.sleep(0.1)
        tensor.mul_(2)

    monkeypatch.setattr("dltrain.training.ahead.dist.all_reduce", all_reduce)
    cpu = torch.device("cpu")
    source, clock = Ahead(Slow(), 2, cpu), Phases(time.perf_counter(), cpu)
    for steps_left in (10, 9, 8):
        assert source.take(steps_left, wish="") is not None
        assert source.others_seconds >= 0.1
        source.trained(1e-4)
    clock.lap("data_wait", source.others_seconds)
    assert clock.seconds["other"] == source.others_seconds
    assert clock.seconds["data_wait"] >= 0.02
    # Held since the exchange before: nobody is waited for.
    assert source.take(7, wish="") is not None
    assert source.others_seconds == 0.0
