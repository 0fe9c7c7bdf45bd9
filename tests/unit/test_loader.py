"""The loader by itself: open_stream, its state, and columns as tensors."""

from __future__ import annotations

import datetime
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data import open_stream
from dltrain.data.columns import tensors
from dltrain.errors import DataError, UserError

ROWS = 103


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "data").mkdir()
    table = pa.table({"id": np.arange(ROWS), "x": np.arange(ROWS, dtype=np.float32) / 2})
    for part in range(3):
        piece = table.slice(part * 40, 40)
        pq.write_table(piece, tmp_path / "data" / f"part-{part}.parquet", row_group_size=9)
    return str(tmp_path / "data")


def ids(batches: list[dict[str, Any]]) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def test_every_row_once_an_epoch_for_any_number_of_ranks(data: str) -> None:
    with open_stream(data, global_batch=16, epochs=2) as stream:
        assert len(stream) == 13
        whole = ids(list(stream))
    assert sorted(i for batch in whole for i in batch) == sorted(list(range(ROWS)) * 2)
    for num_ranks in (2, 3, 20):
        parts = []
        for rank in range(num_ranks):
            with open_stream(data, ["id"], global_batch=16, epochs=2, rank=rank, num_ranks=num_ranks) as stream:
                parts.append(ids(list(stream)))
        assert {len(p) for p in parts} == {13}
        assert [[i for p in parts for i in p[t]] for t in range(13)] == whole


def test_a_state_goes_on_with_other_ranks_and_batches(data: str) -> None:
    with open_stream(data, global_batch=16, epochs=2) as stream:
        whole = [i for batch in ids(list(stream)) for i in batch]
    with open_stream(data, global_batch=16, epochs=2) as stream:
        first = [i for _ in range(5) for i in next(stream)["id"].tolist()]
        state = json.loads(json.dumps(stream.state_dict()))
    rest = []
    with open_stream(data, global_batch=8, epochs=2) as stream:
        stream.load_state_dict(state)
        assert stream.state_dict() == state
        rest = [i for batch in stream for i in batch["id"].tolist()]
    assert sorted(first + rest) == sorted(whole)
    assert first == whole[: len(first)]


def test_drop_leaves_the_last_short_batch_out(data: str) -> None:
    with open_stream(data, global_batch=16, end="drop") as stream:
        assert [len(b["id"]) for b in stream] == [16] * 6


def test_without_end(data: str) -> None:
    with open_stream(data, global_batch=50, epochs=None) as stream:
        assert sum(len(next(stream)["id"]) for _ in range(9)) == 450
        with pytest.raises(TypeError, match="no end"):
            len(stream)


def test_a_collate_of_your_own(data: str) -> None:
    def doubled(rows: pa.RecordBatch, keys: Any) -> dict[str, Any]:
        return {"y": torch.tensor(rows["x"].to_numpy() * 2), "row": torch.tensor(keys.ids)}

    with open_stream(data, global_batch=16, collate=doubled) as stream:
        batch = next(stream)
    assert batch["y"].tolist() == batch["row"].tolist()


def test_mistakes(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ranks are 0 to"):
        open_stream(data, global_batch=4, rank=2, num_ranks=2)
    with pytest.raises(DataError, match="no column 'nope'"):
        open_stream(data, ["nope"], global_batch=4)
    stream = open_stream(data, global_batch=4)
    state = stream.state_dict()
    (tmp_path / "data" / "part-2.parquet").unlink()
    with pytest.raises(UserError, match="added, removed or rewritten"):
        open_stream(data, global_batch=4).load_state_dict(state)
    with pytest.raises(UserError, match="version 9"):
        stream.load_state_dict({**state, "version": 9})


# ---- columns ----


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-5, 5), max_size=4), min_size=1, max_size=9), st.data())
def test_lists_are_values_and_offsets(rows: list[list[int]], draw: Any) -> None:
    lo = draw.draw(st.integers(0, len(rows) - 1))
    batch = pa.record_batch({"t": pa.array(rows, pa.list_(pa.int16()))}).slice(lo)
    found = tensors(batch)
    offsets = found["t_offsets"].tolist()
    assert [found["t"][a:b].tolist() for a, b in pairwise(offsets)] == rows[lo:]


@settings(deadline=None)
@given(st.lists(st.lists(st.lists(st.integers(-5, 5), max_size=3), max_size=3), min_size=1, max_size=6), st.data())
def test_lists_of_lists_have_offsets_per_level(rows: list[list[list[int]]], draw: Any) -> None:
    lo = draw.draw(st.integers(0, len(rows) - 1))
    kind = pa.list_(pa.large_list(pa.float32()))
    found = tensors(pa.record_batch({"t": pa.array(rows, kind)}).slice(lo))
    inner = [found["t"][a:b].tolist() for a, b in pairwise(found["t_offsets_1"].tolist())]
    assert [inner[a:b] for a, b in pairwise(found["t_offsets"].tolist())] == rows[lo:]


def test_lists_within_fixed_lists_and_the_other_way_round() -> None:
    pairs = pa.array([[[1], [2, 3]], [[], [4]]], pa.list_(pa.list_(pa.int8()), 2))
    boxes = pa.array([[[1, 2]], [], [[3, 4], [5, 6]]], pa.list_(pa.list_(pa.int8(), 2)))
    found = tensors(pa.record_batch({"pairs": pairs}).slice(1))
    assert (found["pairs"].tolist(), found["pairs_offsets"].tolist()) == ([4], [0, 0, 1])
    found = tensors(pa.record_batch({"boxes": boxes}).slice(1))
    assert (found["boxes"].tolist(), found["boxes_offsets"].tolist()) == ([[3, 4], [5, 6]], [0, 0, 2])


def test_each_kind_of_column() -> None:
    batch = pa.record_batch(
        {
            "flag": [True, False, True],
            "fixed": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int32(), 2)),
            "raw": pa.array([b"ab", b"cd", b"ef"], pa.binary(2)),
            "name": ["a", "b", "c"],
            "day": [datetime.date(1970, 1, d) for d in (1, 2, 3)],
            "word": pa.array(["x", "y", "x"]).dictionary_encode(),
            "words": [["a"], ["b", "c"], []],
            "grid": pa.array([[[1, 2], [3, 4]]] * 3, pa.list_(pa.list_(pa.int16(), 2), 2)),
            "flags": pa.array([[True, False]] * 3, pa.list_(pa.bool_(), 2)),
            "code": pa.array([7, 8, 7]).dictionary_encode(),
        }
    ).slice(1)
    found = tensors(batch)
    assert found["flag"].tolist() == [False, True]
    assert found["fixed"].tolist() == [[3, 4], [5, 6]]
    assert found["raw"].tolist() == [[99, 100], [101, 102]]
    assert found["name"] == ["b", "c"]
    assert found["day"].tolist() == [1, 2]
    assert found["word"] == ["y", "x"]
    assert found["words"] == [["b", "c"], []]
    assert found["grid"].tolist() == [[[1, 2], [3, 4]]] * 2
    assert found["flags"].tolist() == [[True, False]] * 2
    assert found["code"].tolist() == [8, 7]
    found["fixed"][0, 0] = 9
    assert batch["fixed"].to_pylist() == [[3, 4], [5, 6]]


def test_what_no_tensor_can_hold() -> None:
    with pytest.raises(DataError, match="'n' has missing values"):
        tensors(pa.record_batch({"n": [1, None]}))
    with pytest.raises(DataError, match="'n' has missing values"):
        tensors(pa.record_batch({"n": pa.array([[1, None]], pa.list_(pa.int8(), 2))}))
    with pytest.raises(DataError, match=r"'s' is struct"):
        tensors(pa.record_batch({"s": [{"a": 1}]}))


@pytest.mark.parametrize("half", [{"cache_dir": "x"}, {"cache_bytes": 10}, {"cache_dir": "x", "cache_bytes": 0}])
def test_a_cache_needs_a_directory_and_a_limit(data: str, half: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"cache_dir.*cache_bytes"):
        open_stream(data, global_batch=16, **half)


def test_sequences_of_any_length_are_the_same_for_any_number_of_ranks(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(0, 9, 60)
    tokens = pa.array([[row * 10 + i for i in range(n)] for row, n in enumerate(lengths)], pa.list_(pa.int32()))
    pq.write_table(pa.table({"tokens": tokens}), tmp_path / "part.parquet", row_group_size=7)
    wholes = []
    for num_ranks in (1, 2, 3, 25):
        parts = []
        for rank in range(num_ranks):
            with open_stream(str(tmp_path), global_batch=16, rank=rank, num_ranks=num_ranks) as stream:
                parts.append([sequences(batch) for batch in stream])
        wholes.append([[s for part in parts for s in part[t]] for t in range(4)])
    assert all(whole == wholes[0] for whole in wholes)
    assert sorted(s for step in wholes[0] for s in step) == sorted(tokens.to_pylist())


def sequences(batch: dict[str, Any]) -> list[list[int]]:
    return [batch["tokens"][a:b].tolist() for a, b in pairwise(batch["tokens_offsets"].tolist())]
