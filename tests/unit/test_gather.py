"""The one copy between decoding and a batch: what is picked, whose memory it is, and what is loaded ahead."""

from __future__ import annotations

import threading
from collections import deque
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.batch import Batch, Keys
from dltrain.data.columns import tensors
from dltrain.data.gather import gather, window_columns
from dltrain.data.mixture import Mixture
from dltrain.data.order import Order
from dltrain.data.stream import TrainStream
from dltrain.errors import BadRowsError

WIDE = 3000


def every_kind(rows: int, seed: int) -> pa.Table:
    """A column of each way to be copied."""
    rng = np.random.default_rng(seed)
    wide = rng.integers(0, 256, (rows, WIDE), np.uint8)
    texts = ["x" * int(n) for n in rng.integers(0, 5, rows)]
    return pa.table(
        {
            "id": np.arange(rows),
            "wide": pa.array([w.tobytes() for w in wide], pa.binary(WIDE)),
            "grid": pa.FixedSizeListArray.from_arrays(
                pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(rows * 600)), 300), 2
            ),
            "when": pa.array(np.arange(rows), pa.timestamp("us")),
            "flag": rng.integers(0, 2, rows).astype(bool),
            "some": pa.array([None if i % 3 == 0 else i for i in range(rows)]),
            "text": texts,
            "long": [text * 2000 for text in texts],
            "list": [[i] * (i % 4) for i in range(rows)],
            "kind": pa.array([f"k{i % 3}" for i in range(rows)]).dictionary_encode(),
        }
    )


@settings(deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(0, 20), max_size=3), st.integers(0, 100), st.data())
def test_what_is_gathered_is_what_take_gives(rows: int, cuts: list[int], seed: int, draw: Any) -> None:
    table = every_kind(rows, seed)
    edges = sorted({0, rows, *(c % rows for c in cuts)})
    chunked = pa.concat_tables([table.slice(a, b - a) for a, b in pairwise(edges)])
    perm = np.random.default_rng(seed).permutation(rows)
    columns = window_columns(chunked, perm)
    picks = [range(*sorted(draw.draw(st.tuples(*[st.integers(0, rows)] * 2))), draw.draw(st.integers(1, 3)))]
    picks += [range(draw.draw(st.integers(0, rows - 1)), rows)]
    found = gather(table.schema, [(columns, items) for items in picks])
    expected = table.take(perm[np.concatenate([np.array(items, np.int64) for items in picks])])
    found.validate(full=True)
    assert found.schema == table.schema
    assert found.to_pylist() == expected.to_pylist()


def test_large_values_stay_where_they_were_decoded() -> None:
    table = every_kind(8, 0)
    columns = dict(zip(table.column_names, window_columns(table, np.arange(8)[::-1]), strict=True))

    def address(array: Any) -> int:
        return int(array.buffers()[1].address)

    def is_shared(name: str) -> bool:
        return address(columns[name].chunks[0]) == address(table[name].chunk(0))

    assert [name for name in ("wide", "long", "id", "text") if is_shared(name)] == ["wide", "long"]


def test_a_batchs_memory_is_taken_over_once_and_nobody_elses_ever() -> None:
    table = every_kind(8, 0).select(["id", "wide", "grid", "when"])
    columns = window_columns(table, np.arange(8))
    rows, alone = gather(table.schema, [(columns, range(8))]), gather(table.schema, [(columns, range(3, 4))])
    first, second = tensors(rows), tensors(rows)
    assert first["wide"].data_ptr() == rows["wide"].buffers()[1].address
    assert first["grid"].shape == (8, 2, 300)
    assert first["when"].tolist() == list(range(8))
    for name in table.column_names:
        assert torch.equal(first[name], second[name])
        assert first[name].data_ptr() != second[name].data_ptr()
        first[name].zero_()
    for value in tensors(alone).values():
        value.zero_()
    # Nor is it the window's, even of a single item.
    assert gather(table.schema, [(columns, range(8))]).equals(table.to_batches()[0])
    assert second["id"].tolist() == table["id"].to_pylist() == list(range(8))
    assert tensors(table.to_batches()[0])["id"].data_ptr() != table["id"].chunk(0).buffers()[1].address


def test_tensors_outlive_the_rows_and_slices_know_their_place() -> None:
    table = every_kind(8, 0).select(["id", "wide"])
    columns = window_columns(table, np.arange(8))
    half = tensors(gather(table.schema, [(columns, range(8))]).slice(3, 4))
    others = [tensors(gather(table.schema, [(columns, range(8))])) for _ in range(20)]
    assert half["id"].tolist() == [3, 4, 5, 6]
    assert half["wide"][0].numpy().tobytes() == table["wide"][3].as_py()
    assert len({other["wide"].data_ptr() for other in others}) == 20


# ---- streams ----


class Units:
    """Units of 4 rows, and which of them were fetched and read."""

    def __init__(self, num_units: int) -> None:
        self.num_units = num_units
        self.started: set[int] = set()
        self.reads: deque[int] = deque()
        self.lock = threading.Lock()

    def start(self, unit: int, needed: float) -> None:
        self.started.add(unit)

    def read(self, unit: int) -> pa.Table:
        self.reads.append(unit)
        return pa.table({"id": np.arange(4 * unit, 4 * unit + 4)})


def stream(units: Units, collate: Any, **options: Any) -> TrainStream:
    order = Order([4] * units.num_units, num_lanes=8, window_units=2)
    settings = {"position": 0, "end": order.num_rows, "global_batch": 8, "rank": 0, "num_ranks": 1, "micro_batch": 8}
    return TrainStream(Mixture([order], [1]), [units], collate, **{**settings, **options})


def ids(rows: pa.RecordBatch, keys: Keys) -> Batch:
    return Batch(rows.num_rows, id=torch.tensor(rows["id"].to_pylist()))


def loaded(waited: float) -> tuple[int, int]:
    """Units fetched and decoded by the 4th batch, where each is taken so many seconds after it was made."""
    now = [0.0]
    units = Units(64)
    source = stream(units, ids, clock=lambda: now[0])
    for _ in range(3):
        next(source)
        now[0] += waited
    next(source)
    source.close()
    return len(units.started), len(units.reads)


def test_windows_are_loaded_further_ahead_where_batches_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of next windows one, which is enough.
    monkeypatch.setattr("dltrain.data.windows._FETCHED_BYTES", 1)
    fetched, decoded = loaded(waited=0.0)
    # The first windows of 8 lanes are a unit each, the next ones up to two.
    assert 9 <= fetched <= 10
    assert 8 <= decoded <= 10
    assert loaded(waited=1.0)[0] >= fetched + 3


def test_rows_are_gathered_afresh_when_some_are_replaced() -> None:
    calls = []

    def once(rows: pa.RecordBatch, keys: Keys) -> Batch:
        batch = tensors(rows)
        seen = batch["id"].tolist()
        batch["id"] += 1000
        calls.append(seen)
        if seen[2] == calls[0][2]:
            raise BadRowsError([2], "not an image")
        return Batch(rows.num_rows, id=torch.tensor(seen))

    source = stream(Units(64), once, replace=True)
    step = next(source)
    source.close()
    assert max(calls[-1]) < 1000
    assert [a == b for a, b in zip(calls[0], calls[-1], strict=True)] == [i != 2 for i in range(8)]
    assert [(r.id, r.reason) for r in step.replaced] == [(calls[0][2], "not an image")]


@pytest.mark.parametrize("micro", [1, 3, 5, 8])
def test_micro_batches_are_strided_over_the_ranks_rows(micro: int) -> None:
    source = stream(Units(64), ids, micro_batch=micro)
    step = next(source)
    source.close()
    count = len(step.micros)
    assert [m.id.tolist() for m in step.micros] == [step.ids[i::count].tolist() for i in range(count)]
