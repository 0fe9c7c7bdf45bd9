"""Packing: every token once, in order, with its document; whatever the lengths."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dltrain.data.packing import NUM_TOKENS, SEGMENT_IDS, num_chunks, pack, packed_schema
from dltrain.errors import DataError

DOCUMENTS = st.lists(st.none() | st.lists(st.integers(0, 1000), max_size=9), max_size=12)


@given(DOCUMENTS, st.integers(1, 7), st.integers(0, 3), st.booleans())
def test_every_token_once_with_its_document(
    documents: list[list[int] | None], length: int, more: int, large: bool
) -> None:
    kind = pa.large_list(pa.int32()) if large else pa.list_(pa.int32())
    table = pa.table({"t": pa.array(documents, kind), "other": pa.nulls(len(documents))})
    tokens = [token for document in documents for token in document or []]
    owners = [i for i, document in enumerate(documents) for _ in document or []]
    rows = -(-len(tokens) // length) + more
    packed = pack(table, "t", length, rows)
    assert packed.schema == packed_schema(table.schema, "t", length)
    assert packed.num_rows == rows
    assert packed[NUM_TOKENS].to_pylist() == [min(max(len(tokens) - i * length, 0), length) for i in range(rows)]
    assert np.concatenate([np.zeros(0), *packed["t"].to_pylist()])[: len(tokens)].tolist() == tokens
    for i, segments in enumerate(packed[SEGMENT_IDS].to_pylist()):
        mine = owners[i * length : (i + 1) * length]
        assert segments[len(mine) :] == [0] * (length - len(mine))
        assert segments[: len(mine)] == [1 + sorted(set(mine)).index(owner) for owner in mine]


def test_slices_and_chunks_of_a_larger_table() -> None:
    table = pa.concat_tables([pa.table({"t": [[1, 2], [3]]}), pa.table({"t": [[4, 5, 6], [], [7]]})]).slice(1, 4)
    packed = pack(table, "t", 4, 2)
    assert packed["t"].to_pylist() == [[3, 4, 5, 6], [7, 0, 0, 0]]
    assert packed[SEGMENT_IDS].to_pylist() == [[1, 2, 2, 2], [1, 0, 0, 0]]


def test_rows_are_known_from_the_footer() -> None:
    assert num_chunks(np.array([0, 1, 8, 9]), 8).tolist() == [0, 1, 1, 2]


def test_what_cannot_be_packed() -> None:
    schema = pa.schema([("t", pa.list_(pa.string())), ("n", pa.int64())])
    with pytest.raises(DataError, match=r"'t' is list.*needs lists of numbers"):
        packed_schema(schema, "t", 8)
    with pytest.raises(DataError, match=r"no column 'x'; there are t, n"):
        packed_schema(schema, "x", 8)
    with pytest.raises(DataError, match="3 tokens where the footer said at most 2"):
        pack(pa.table({"t": [[1, 2, 3]]}), "t", 2, 1)
    with pytest.raises(DataError, match="nulls"):
        pack(pa.table({"t": [[1, None]]}), "t", 2, 1)
