"""`dltrain data check`: what is planted in a dataset is found, and nothing else is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dltrain.cli import app
from dltrain.conditions import check_condition
from dltrain.data.fingerprint import row_hashes
from dltrain.data.quality import check_data
from dltrain.errors import UserError


def write(directory: Path, table: pa.Table, files: int = 2, group: int = 7) -> str:
    directory.mkdir(parents=True)
    size = -(-len(table) // files)
    for i in range(files):
        pq.write_table(table.slice(i * size, size), directory / f"part-{i}.parquet", row_group_size=group)
    return str(directory)


def rows(count: int, **changes: dict[int, Any]) -> pa.Table:
    """Rows that differ, of 2 classes; changes: by column, then by row."""
    columns: dict[str, list[Any]] = {
        "id": list(range(count)),
        "x": [[float(i), float(i * i)] for i in range(count)],
        "text": [f"row {i}" for i in range(count)],
        "label": [i % 2 for i in range(count)],
    }
    for name, some in changes.items():
        for row, value in some.items():
            columns[name][row] = value
    types = {"id": pa.int64(), "x": pa.list_(pa.float32()), "text": pa.string(), "label": pa.int8()}
    return pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})


def problems(found: dict[str, Any], kind: str) -> list[str]:
    return [one["problem"] for one in found["findings"] if one["kind"] == kind]


def test_a_dataset_that_is_well(tmp_path: Path) -> None:
    found = check_data(write(tmp_path / "d", rows(60)))
    assert found["findings"] == []
    assert found["inputs"] == ["x", "text"]
    assert found["label"] == {"column": "label", "classes": {"0": 30, "1": 30}}
    assert found["duplicates"]["rows"] == found["conflicts"]["rows"] == 0
    by_name = {column["name"]: column for column in found["columns"]}
    assert (by_name["x"]["min"], by_name["x"]["max"]) == (0.0, 59.0**2)
    assert by_name["text"]["distinct"] == 60


def test_rows_that_are_there_twice_are_found_where_they_are(tmp_path: Path) -> None:
    # Row 40 is row 3 but for its id; row 41 is row 4 with another label.
    table = rows(60, x={40: [3.0, 9.0], 41: [4.0, 16.0]}, text={40: "row 3", 41: "row 4"}, label={40: 1, 41: 1})
    found = check_data(write(tmp_path / "d", table))
    assert (found["duplicates"]["rows"], found["duplicates"]["of"]) == (1, 1)
    first, second = found["duplicates"]["examples"][0]
    assert (Path(first["file"]).name, first["row"]) == ("part-0.parquet", 3)
    assert (Path(second["file"]).name, second["row"]) == ("part-1.parquet", 10)
    assert (found["conflicts"]["rows"], found["conflicts"]["of"]) == (2, 1)
    assert [place["row"] for place in found["conflicts"]["examples"][0]] == [4, 11]
    assert len(problems(found, "fault")) == 1
    assert "different labels" in problems(found, "fault")[0]
    assert "are there before" in problems(found, "warning")[0]
    assert check_data(str(tmp_path / "d"), ignore=["label"], label="")["duplicates"]["rows"] == 2
    assert check_data(str(tmp_path / "d"), ignore=["text"], label="")["inputs"] == ["x", "label"]


def test_rows_of_the_test_data_are_found(tmp_path: Path) -> None:
    train = write(tmp_path / "train", rows(60))
    test = write(tmp_path / "test", rows(9, x={i: [-1.0 - i, 0.0] for i in range(8)}))
    found = check_data(train, against=[test])
    leak = found["leakage"][0]
    assert (leak["url"], leak["rows"], leak["of"]) == (test, 1, 9)
    assert leak["examples"][0]["there"]["row"] == 3
    assert leak["examples"][0]["here"] == {"file": str(tmp_path / "train" / "part-0.parquet"), "row": 8}
    assert problems(found, "fault")[0].startswith("1 of 9 (11.11%) rows of")


def test_types_may_differ_as_long_as_values_can_be_compared(tmp_path: Path) -> None:
    train = write(tmp_path / "train", rows(60))
    wide = rows(9).set_column(1, "x", rows(9)["x"].cast(pa.large_list(pa.float64())))
    assert check_data(train, against=[write(tmp_path / "wide", wide)])["leakage"][0]["rows"] == 9
    other = rows(9).set_column(1, "x", pa.array(["a"] * 9))
    with pytest.raises(UserError, match=r"--against: the columns of .*other are not those"):
        check_data(train, against=[write(tmp_path / "other", other)])


def test_what_to_do_about_nulls_can_be_done(tmp_path: Path) -> None:
    found = check_data(write(tmp_path / "d", rows(20, text={1: None})))
    (fix,) = [one["fix"] for one in found["findings"]]
    condition = yaml.safe_load(fix.removeprefix("leave them out: data.filter "))[0]
    assert check_condition(condition) is None


def test_missing_empty_and_infinite_values_and_constants(tmp_path: Path) -> None:
    table = rows(20, text={1: None, 2: ""}, x={5: [math.nan, 1.0], 6: [math.inf, -math.inf]})
    table = table.append_column("site", pa.array(["a"] * 20))
    found = check_data(write(tmp_path / "d", table))
    by_name = {column["name"]: column for column in found["columns"]}
    assert (by_name["text"]["nulls"], by_name["text"]["empty"]) == (1, 1)
    assert by_name["x"]["not_finite"] == 3
    assert [name for name, column in by_name.items() if column["constant"]] == ["site"]
    assert problems(found, "fault") == ["x: 3 values are nan or infinite"]
    assert len(problems(found, "warning")) == 3


def test_rare_classes(tmp_path: Path) -> None:
    found = check_data(write(tmp_path / "d", rows(200, label=dict.fromkeys(range(197), 0))))
    assert found["label"]["classes"] == {"0": 198, "1": 2}
    assert len(problems(found, "warning")) == 2


def test_labels_that_predictions_contradict(tmp_path: Path) -> None:
    said = [{"label": i % 2, "probability": 0.9} for i in range(60)]
    said[10] = {"label": 1, "probability": 0.97}
    # Less certain than usual: no suspect.
    said[12] = {"label": 1, "probability": 0.6}
    table = rows(60).append_column("prediction", pa.array(said))
    found = check_data(write(tmp_path / "d", table))
    assert found["inputs"] == ["x", "text"]
    assert [(one["row"], one["label"], one["predicted"]) for one in found["suspects"]] == [(10, 0, 1)]


def test_the_labels_may_be_directories(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write(tmp_path / "d" / f"label={name}", rows(20).select(["x"]), files=1)
    found = check_data(str(tmp_path / "d"))
    assert found["label"]["classes"] == {"cat": 20, "dog": 20}
    assert (found["conflicts"]["rows"], found["conflicts"]["of"]) == (40, 20)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": "kind"}, "--label is 'kind'"),
        ({"ignore": ["kind"]}, "--ignore names kind"),
        ({"ignore": ["x", "text"]}, "no column is left"),
        ({"prediction": "kind"}, "--prediction is 'kind'"),
        ({"prediction": "x"}, "they must have label and probability"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    url = write(tmp_path / "d", rows(20))
    with pytest.raises(UserError, match=words):
        check_data(url, **changes)


def test_the_command(tmp_path: Path) -> None:
    url, runner = write(tmp_path / "d", rows(60, x={5: [math.nan, 1.0]})), CliRunner()
    shown = runner.invoke(app, ["data", "check", url])
    assert shown.exit_code == 0
    assert "x: 1 values are nan or infinite" in shown.output
    assert runner.invoke(app, ["data", "check", url, "--strict"]).exit_code == 1
    printed = runner.invoke(app, ["data", "check", url, "--json"])
    assert json.loads(printed.stdout)["rows"] == 60


VALUES = st.one_of(
    st.lists(st.none() | st.integers(-3, 3), min_size=1).map(lambda v: pa.array(v, pa.int16())),
    st.lists(st.none() | st.text("ab", max_size=2), min_size=1).map(lambda v: pa.array(v, pa.string())),
    st.lists(st.none() | st.binary(max_size=2), min_size=1).map(lambda v: pa.array(v, pa.large_binary())),
    st.lists(st.none() | st.booleans(), min_size=1).map(lambda v: pa.array(v, pa.bool_())),
    st.lists(st.none() | st.lists(st.none() | st.integers(0, 2), max_size=2), min_size=1).map(
        lambda v: pa.array(v, pa.list_(pa.int32()))
    ),
    st.lists(st.none() | st.lists(st.none() | st.integers(0, 1), min_size=2, max_size=2), min_size=1).map(
        lambda v: pa.array(v, pa.list_(pa.int8(), 2))
    ),
    st.lists(st.none() | st.fixed_dictionaries({"a": st.integers(0, 1)}), min_size=1).map(
        lambda v: pa.array(v, pa.struct({"a": pa.int8()}))
    ),
    st.lists(st.none() | st.text("ab", max_size=1), min_size=1).map(
        lambda v: pa.array(v, pa.string()).dictionary_encode()
    ),
)


@given(VALUES, st.data())
def test_hashes_are_alike_exactly_where_values_are(array: pa.Array, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, len(array) - 1))
    table = pa.table({"v": array})
    hashes, values = row_hashes(table, ["v"]), array.to_pylist()
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            assert (hashes[i] == hashes[j]) == (repr(a) == repr(b))
    # Wherever they lie.
    assert np.array_equal(row_hashes(table.slice(begin), ["v"]), hashes[begin:])
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    alone = pa.table({"v": pa.array(values[begin : begin + 1], kind)})
    assert row_hashes(alone, ["v"])[0] == hashes[begin]
