"""Streams: the right rows, in the right batches, for any number of ranks; and threads that end."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dltrain.data.batch import Batch, Keys, Sum
from dltrain.data.identity import BatchSum, sum_ids
from dltrain.data.mixture import Mixture
from dltrain.data.order import Order
from dltrain.data.prefetch import Prefetcher
from dltrain.data.stream import EvalStream, StepBatch, TrainStream, micro_batches
from dltrain.errors import BadRowsError, DataChangedError, DataError, UserError
from dltrain.training.task import Task

ROWS = [7, 16, 3, 16, 16, 9, 1, 16]
STARTS = np.concatenate([[0], np.cumsum(ROWS)])
NUM_ROWS = sum(ROWS)
ORDER = Order(ROWS, num_lanes=4, window_units=2, seed=3)
WHOLE = Mixture([ORDER], [1])


def read_unit(unit: int) -> pa.Table:
    """Row id as the only column."""
    return pa.table({"id": np.arange(STARTS[unit], STARTS[unit + 1])})


class Units:
    """Units by a function, fetched only when they are read."""

    def __init__(self, read: Callable[[int], pa.Table]) -> None:
        self.read = read

    def start(self, unit: int, needed: float) -> None:
        pass

    def forget(self, unit: int) -> None:
        pass


def collate(rows: pa.RecordBatch, keys: Keys) -> Batch:
    assert rows["id"].to_numpy().tolist() == keys.ids.tolist()
    return Batch(rows.num_rows, id=torch.tensor(rows["id"].to_numpy().copy()))


def stream(
    rank: int, num_ranks: int, micro: int = 5, position: int = 0, size: int = 20, epochs: int = 3
) -> TrainStream:
    return TrainStream(
        WHOLE,
        [Units(read_unit)],
        collate,
        position=position,
        end=epochs * NUM_ROWS,
        global_batch=size,
        rank=rank,
        num_ranks=num_ranks,
        micro_batch=micro,
    )


def total(*steps: StepBatch) -> BatchSum:
    return sum((s for step in steps for s in step.sums.values()), BatchSum())


def take(source: TrainStream) -> list[StepBatch]:
    try:
        return list(source)
    finally:
        source.close()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 20, 30])
def test_ranks_together_have_every_row_of_every_batch(num_ranks: int) -> None:
    ranks = [take(stream(rank, num_ranks)) for rank in range(num_ranks)]
    whole = take(stream(0, 1))
    assert {len(steps) for steps in ranks} == {len(whole)}
    for t, expected in enumerate(whole):
        parts = [steps[t] for steps in ranks]
        assert np.concatenate([p.ids for p in parts]).tolist() == expected.ids.tolist()
        assert len({len(p.micros) for p in parts}) == 1
        trained = [id for p in parts for m in p.micros if m.count for id in m.id.tolist()]
        assert sorted(trained) == sorted(expected.ids.tolist())
        assert total(*parts) == total(expected)
        assert all(m.count <= 5 for p in parts for m in p.micros)
    for epoch in range(3):
        ids = np.concatenate([s.ids[s.epochs == epoch] for s in whole])
        assert sorted(ids.tolist()) == list(range(NUM_ROWS))


def test_a_rank_without_rows_gets_stand_ins() -> None:
    steps = take(stream(0, 40))
    empty = [s for s in steps if not len(s.ids)]
    assert empty
    assert all([m.count for m in s.micros] == [0] and len(m.id) == 1 for s in empty for m in [s.micros[0]])


def test_resuming_anywhere_gives_the_rest() -> None:
    whole = take(stream(0, 1))
    for done in (1, 4, len(whole) - 1):
        rest = take(stream(0, 1, position=whole[done - 1].position))
        assert [total(s).batch_id for s in rest] == [total(s).batch_id for s in whole[done:]]


def test_the_last_batch_is_what_is_left() -> None:
    assert [s.size for s in take(stream(0, 1))][-2:] == [20, 3 * NUM_ROWS % 20]


def test_batch_ids_tell_sets_apart() -> None:
    ids, epochs = np.arange(10), np.zeros(10, np.int64)
    base = sum_ids(0, epochs, ids)
    assert sum_ids(0, epochs, ids[::-1].copy()) == base
    assert len(base.batch_id) == 32
    others = [sum_ids(1, epochs, ids), sum_ids(0, epochs + 1, ids), sum_ids(0, epochs, ids + 1)]
    assert len({base.batch_id, *(o.batch_id for o in others)}) == 4


@pytest.mark.parametrize(
    ("size", "ranks", "micro", "expected"), [(16, 2, 8, 1), (16, 2, 7, 2), (17, 2, 8, 2), (1, 4, 8, 1), (100, 3, 10, 4)]
)
def test_micro_batches(size: int, ranks: int, micro: int, expected: int) -> None:
    assert micro_batches(size, ranks, micro) == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_evaluation_covers_every_row_once(num_ranks: int) -> None:
    seen: list[int] = []
    lengths = set()
    for rank in range(num_ranks):
        source = EvalStream(np.array(ROWS), Units(read_unit), collate, chunk_rows=10, rank=rank, num_ranks=num_ranks)
        items = list(source)
        source.close()
        lengths.add(len(items))
        seen += [id for chunk, batch in items if chunk >= 0 for id in batch.id.tolist()]
    assert sorted(seen) == list(range(NUM_ROWS))
    assert len(lengths) == 1


def test_the_users_generators_depend_on_the_row_alone() -> None:
    keys = Keys(5, np.array([0, 0, 1]), np.array([10, 11, 10]))
    turned = Keys(5, np.array([1, 0, 0]), np.array([10, 11, 10]))
    draws = [keys.rng(row).integers(0, 2**62) for row in range(3)]
    assert draws == [turned.rng(row).integers(0, 2**62) for row in (2, 1, 0)]
    assert len(set(draws)) == 3


def test_a_fault_in_collate_comes_out_of_next_at_once() -> None:
    def bad(rows: pa.RecordBatch, keys: Keys) -> Batch:
        raise KeyError("label")

    source = TrainStream(
        WHOLE, [Units(read_unit)], bad, position=0, end=NUM_ROWS, global_batch=8, rank=0, num_ranks=1, micro_batch=8
    )
    for _ in range(2):
        with pytest.raises(KeyError, match="label"):
            next(source)
    source.close()


def test_closing_early_ends_the_threads() -> None:
    before = threading.active_count()
    source = stream(0, 1)
    next(source)
    source.close()
    source.close()
    assert threading.active_count() <= before


def test_prefetching_is_bounded() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    with Prefetcher(items, depth=2) as source:
        assert next(source) == 0
        assert len(made) <= 5
    assert len(made) < 100


def test_a_batch_says_what_it_has() -> None:
    batch: Any = Batch(2, x=torch.zeros(2), name="b")
    assert batch.to(torch.device("cpu")).name == "b"
    assert batch["x"].shape == (2,)
    with pytest.raises(AttributeError, match="no 'y'; it has x, name"):
        _ = batch.y


def test_sums_add_up_exactly_in_any_order() -> None:
    from dltrain.training.evaluation import reduce_sums

    rng = np.random.default_rng(0)
    items = [(i, {"loss": Sum(float(v), 3)}) for i, v in enumerate(rng.standard_normal(1000) * 1e6)]
    shuffled = [items[i] for i in rng.permutation(len(items))]
    assert reduce_sums(items) == reduce_sums(shuffled)
    assert reduce_sums([]) == {}


def test_arrays_add_up_and_the_task_makes_numbers_of_them() -> None:
    from dltrain.training.evaluation import check_metrics, reduce_sums

    class Counts(Task):
        def metrics(self, means: Any) -> Any:
            return {"largest": means["counts"].max(), "loss": means["loss"]}

    rng = np.random.default_rng(0)
    totals = rng.standard_normal((50, 3)) * 1e6
    items = [(i, {"counts": Sum(total, 2), "loss": Sum(1.0, 2)}) for i, total in enumerate(totals)]
    shuffled = [items[i] for i in rng.permutation(len(items))]
    means = reduce_sums(shuffled)
    np.testing.assert_array_equal(means["counts"], reduce_sums(items)["counts"])
    np.testing.assert_allclose(means["counts"], totals.mean(0) / 2)
    assert check_metrics(Counts(), means) == {"largest": means["counts"].max(), "loss": 0.5}
    assert check_metrics(Counts(), {}) == {}
    with pytest.raises(
        UserError, match="'counts' of the evaluation is an array of 3 numbers; define `metrics` in Task"
    ):
        check_metrics(Task(), means)
    assert np.isnan(reduce_sums([(0, {"counts": Sum(np.zeros(3), 0)})])["counts"]).all()


# ---- rows that can't be used ----


def replaced_ids(num_ranks: int, read: Any, make: Any = collate) -> tuple[list[list[int]], set[tuple[int, int]]]:
    """Ids as read in the batches of all ranks, in canonical order, and (epoch, row) of those replaced."""
    batches: dict[int, list[int]] = {}
    listed = set()
    for rank in range(num_ranks):
        source = TrainStream(
            WHOLE,
            [Units(read)],
            make,
            position=0,
            end=2 * NUM_ROWS,
            global_batch=21,
            rank=rank,
            num_ranks=num_ranks,
            micro_batch=100,
            replace=True,
        )
        for step in take(source):
            batches.setdefault(step.position, []).extend(i for m in step.micros if m.count for i in m.id.tolist())
            listed |= {(r.epoch, r.id) for r in step.replaced}
    return list(batches.values()), listed


def loose(rows: pa.RecordBatch, keys: Keys) -> Batch:
    return Batch(rows.num_rows, id=torch.tensor(rows["id"].to_numpy().copy()))


@pytest.mark.parametrize("broken", [{2}, {1, 3, 4}, {0, 1, 2, 3, 4, 5, 6}])
def test_units_that_cannot_be_read_are_replaced_alike_for_any_number_of_ranks(broken: set[int]) -> None:
    def read(unit: int) -> pa.Table:
        if unit in broken:
            raise DataError(f"unit {unit} is damaged")
        return read_unit(unit)

    lost = {i for unit in broken for i in range(STARTS[unit], STARTS[unit + 1])}
    batches, listed = replaced_ids(1, read, loose)
    assert listed == {(epoch, i) for epoch in range(2) for i in lost}
    assert not lost & {i for batch in batches for i in batch}
    assert sum(len(batch) for batch in batches) == 2 * NUM_ROWS
    for num_ranks in (2, 3, 5):
        assert replaced_ids(num_ranks, read, loose) == (batches, listed)


def test_a_file_that_changed_is_never_replaced() -> None:
    def read(unit: int) -> pa.Table:
        if unit == 2:
            raise DataChangedError("part-0 has changed")
        return read_unit(unit)

    with pytest.raises(DataChangedError, match=r"^part-0 has changed$"):
        replaced_ids(1, read, loose)


def test_rows_that_collate_refuses_are_replaced_alike_for_any_number_of_ranks() -> None:
    bad = {3, 10, 11, 40, NUM_ROWS - 1}

    def one_at_a_time(rows: pa.RecordBatch, keys: Keys) -> Batch:
        found = [i for i, value in enumerate(rows["id"].to_pylist()) if value in bad]
        if found:
            raise BadRowsError(found[:1], "not an image")
        return loose(rows, keys)

    batches, listed = replaced_ids(1, read_unit, one_at_a_time)
    assert listed == {(epoch, i) for epoch in range(2) for i in bad}
    assert not bad & {i for batch in batches for i in batch}
    for num_ranks in (2, 3):
        assert replaced_ids(num_ranks, read_unit, one_at_a_time) == (batches, listed)


def test_without_a_budget_a_bad_row_is_an_error_that_says_what_to_set() -> None:
    def refuse(rows: pa.RecordBatch, keys: Keys) -> Batch:
        raise BadRowsError([1], "not an image")

    source = TrainStream(
        WHOLE, [Units(read_unit)], refuse, position=0, end=9, global_batch=9, rank=0, num_ranks=1, micro_batch=9
    )
    with pytest.raises(DataError, match=r"not an image; .*data\.bad_rows"):
        next(source)
    source.close()


# ---- several sources ----


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_sources_are_mixed_with_ids_of_their_own(num_ranks: int) -> None:
    other = [12, 5]

    def read_other(unit: int) -> pa.Table:
        start = NUM_ROWS + sum(other[:unit])
        return pa.table({"id": np.arange(start, start + other[unit])})

    mixture = Mixture([ORDER, Order(other, 4, 1, 9)], [3, 1])
    sums: dict[tuple[int, int], BatchSum] = {}
    seen: Counter[int] = Counter()
    for rank in range(num_ranks):
        source = TrainStream(
            mixture,
            [Units(read_unit), Units(read_other)],
            collate,
            position=0,
            end=160,
            global_batch=16,
            rank=rank,
            num_ranks=num_ranks,
            micro_batch=3,
        )
        for step in take(source):
            seen.update(i for m in step.micros if m.count for i in m.id.tolist())
            for where, part in step.sums.items():
                sums[where] = sums.get(where, BatchSum()) + part
    assert sum(seen.values()) == sum(s.count for s in sums.values()) == 160
    assert sum(n for i, n in seen.items() if i < NUM_ROWS) == pytest.approx(120, abs=4)
    first = np.arange(NUM_ROWS)
    assert sums[0, 0] == sum_ids(ORDER.seed, np.zeros(NUM_ROWS, np.int64), first)
    assert sums[1, 1] == sum_ids(9, np.ones(17, np.int64), np.arange(17))
