"""Rows for `collate` when there is nothing to train: types, blanks, and what is told of rows that don't fit."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dltrain.data.columns import tensors
from dltrain.data.lists import DTYPE
from dltrain.errors import UserError
from dltrain.using.rows import Columns, blank

SCHEMA = pa.schema([("image", pa.binary(4)), ("label", pa.uint8()), ("words", pa.list_(pa.string()))])
COLUMNS = Columns(("image", "label"), ("label",), SCHEMA, "jobs:Task")


def test_targets_are_blank_where_they_are_missing() -> None:
    rows = COLUMNS.rows([{"image": b"abcd"}, {"image": b"efgh", "label": 3}], ["a", "b"])
    assert rows.schema.names == ["image", "label"]
    assert rows.schema.types == [pa.binary(4), pa.uint8()]
    assert rows["label"].to_pylist() == [0, 3]
    # As in training.
    assert tensors(rows)["image"].tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]


def test_what_is_beside_the_columns_comes_after_them() -> None:
    rows = COLUMNS.rows([{"size": 7, "image": b"abcd"}], ["a"])
    assert rows.to_pylist() == [{"image": b"abcd", "label": 0, "size": 7}]
    with pytest.raises(UserError, match="b has no 'size', which other rows have"):
        COLUMNS.rows([{"size": 7, "image": b"abcd"}, {"image": b"abcd"}], ["a", "b"])


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"label": 1}], "needs the column 'image', and x.png has 'label'"),
        ([{}], "x.png has nothing"),
        ([{"image": b"abcde"}], r"x.png: column 'image' is fixed_size_binary\[4\].* and this is 5 bytes"),
        ([{"image": b"abcd"}, {"image": 5}], "y.png: column 'image'.* and this is 5 "),
        ([{"image": b"abcd", "label": 300}], "x.png: column 'label' is uint8"),
        ([{"image": b"abcd", "label": "a" * 99}], r"this is 'a+\.\.\. "),
    ],
)
def test_a_row_that_does_not_fit_is_named(rows: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(UserError, match=told):
        COLUMNS.rows(rows, ["x.png", "y.png"][: len(rows)])


def test_types_that_nobody_knows_are_guessed() -> None:
    columns = Columns(("a", "b"), ("b",), pa.schema([]), "jobs:Task")
    rows = columns.rows([{"a": [1.5, 2.5]}], ["x"])
    # A blank of no known type can't be made up.
    assert rows.schema.names == ["a"]
    assert rows["a"].to_pylist() == [[1.5, 2.5]]


def test_tensors_and_packed_lists() -> None:
    field = pa.field("x", pa.binary(8), metadata={DTYPE: b"float32"})
    columns = Columns(("x",), (), pa.schema([field]), "jobs:Task")
    rows = columns.rows([{"x": [1.5, -2.0]}, {"x": torch.tensor([3.0, 4.0])}, {"x": np.ones(2)}], ["a", "b", "c"])
    assert tensors(rows)["x"].tolist() == [[1.5, -2.0], [3.0, 4.0], [1.0, 1.0]]


def test_a_table_is_made_what_training_had() -> None:
    table = pa.table({"other": [1, 2], "image": pa.array([b"abcd", b"efgh"], pa.binary())})
    filled = COLUMNS.filled(table)
    assert filled.schema.equals(pa.schema([("image", pa.binary(4)), ("label", pa.uint8())]))
    assert filled["label"].to_pylist() == [0, 0]
    # A target of another type is no use, and none is needed.
    text = table.append_column("label", pa.array(["a", "b"]))
    assert COLUMNS.filled(text)["label"].to_pylist() == [0, 0]
    assert COLUMNS.filled(table.append_column("label", pa.array([5, 6])))["label"].to_pylist() == [5, 6]


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (pa.table({"label": [1]}), "needs the column 'image', and the data has 'label'"),
        (pa.table({"image": [1.5]}), "column 'image' is double here and fixed_size_binary"),
        (pa.table({"image": [b"abcde"]}), "can't be made that"),
    ],
)
def test_a_table_that_does_not_fit(table: pa.Table, told: str) -> None:
    with pytest.raises(UserError, match=told):
        COLUMNS.filled(table)


KINDS = st.recursive(
    st.sampled_from(
        [
            *(pa.int8(), pa.uint64(), pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.large_string()),
            *(pa.binary(), pa.binary(3), pa.date32(), pa.timestamp("us"), pa.decimal128(5, 2)),
            pa.dictionary(pa.int32(), pa.string()),
        ]
    ),
    lambda inner: st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        st.tuples(inner, st.integers(1, 3)).map(lambda pair: pa.list_(*pair)),
        inner.map(lambda kind: pa.struct([("a", kind)])),
    ),
    max_leaves=3,
)


@given(KINDS)
def test_there_is_a_blank_of_every_kind(kind: pa.DataType) -> None:
    value = blank(kind)
    assert value.is_valid
    assert value.type == kind
    assert len(pa.array([value.as_py()], kind)) == 1


def test_blanks_are_what_one_expects() -> None:
    kinds = [
        pa.int32(),
        pa.string(),
        pa.binary(2),
        pa.list_(pa.int8()),
        pa.list_(pa.int8(), 2),
        pa.bool_(),
        pa.date32(),
    ]
    found = [blank(kind).as_py() for kind in kinds]
    assert found == [0, "", b"\0\0", [], [0, 0], False, datetime.date(1970, 1, 1)]
