"""A trained network in a program's hand, and by `dltrain predict`: what comes of inputs, and each mistake's message."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import harness
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from use_tasks import numbers, run_spec, trained

import dltrain
from dltrain import Artifact, Input, cli
from dltrain.errors import TaskError, UserError
from dltrain.running.rundir import RunDir
from dltrain.using.results import Folder, column, line, plain


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(harness.ROOT / "tests")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert "Traceback" not in out
    return int(caught.value.code or 0), out, err


def expected(run: str, *lines: str) -> list[float]:
    """By hand: the network's weights out of the checkpoint."""
    from tasks import Tiny

    from dltrain.checkpoint.commit import find
    from dltrain.checkpoint.export import state_dict
    from dltrain.store import open_store

    store = open_store(run).child("checkpoints")
    with contextlib.redirect_stdout(io.StringIO()):
        module = Tiny().build().eval()
    module.load_state_dict(state_dict(store, find(store)))
    x = torch.tensor([[float(word) for word in line.split()] for line in lines])
    return [round(v, 5) for v in module(x)[:, 0].tolist()]


# ---- in a program ----


def test_text_files_rows_and_tables_are_all_inputs(tmp_path: Path) -> None:
    run = trained(tmp_path)
    model = dltrain.load(run)
    assert (model.step, model.metrics) == (7, {"loss": 0.5})
    text = [numbers(0), numbers(1), numbers(2)]
    (tmp_path / "a.txt").write_text(text[1])
    row = {"x": [float(word) for word in text[2].split()]}
    found = model.predict([text[0], tmp_path / "a.txt", row, text[0].encode(), Input("b", text=text[1])])
    assert [one["value"] for one in found] == expected(run, text[0], text[1], text[2], text[0], text[1])
    assert model.predict(text[0]) == found[0]
    table = pa.table({"x": [row["x"], row["x"]]})
    assert model.predict(table) == [found[2]] * 2
    # A batch of one row or of all: the same.
    assert model.predict(text * 5, batch=1) == model.predict(text * 5, batch=4)
    assert list(model.stream(text[0])) == [str(found[0])]


def test_random_numbers_follow_the_seed_and_leave_the_programs_own_alone(tmp_path: Path) -> None:
    model = dltrain.load(trained(tmp_path, "use_tasks:Rolls"))
    torch.manual_seed(5)
    wanted = torch.rand(1).item()
    torch.manual_seed(5)
    first = model.predict([numbers()] * 6, batch=4)
    assert torch.rand(1).item() == wanted
    assert model.predict([numbers()] * 6, batch=4) == first
    assert model.predict([numbers()] * 6, batch=4, seed=1) != first
    assert len(set(first)) == 6


def test_a_generator_streams_without_gradients(tmp_path: Path) -> None:
    run = trained(tmp_path, "use_tasks:Tells")
    model = dltrain.load(run)
    pieces = list(model.stream(numbers()))
    assert pieces == ["about ", f"{expected(run, numbers())[0]:.3f}"]
    assert model.predict([numbers(), numbers()]) == ["".join(pieces)] * 2


def test_drawing_and_making(tmp_path: Path) -> None:
    model = dltrain.load(trained(tmp_path))
    picture = model.draw(numbers())
    assert isinstance(picture, Artifact)
    assert Image.open(io.BytesIO(picture.data)).size == (8, 1)
    with pytest.raises(UserError, match="has no `generate`"):
        model.generate(3)
    maker = dltrain.load(trained(tmp_path, "use_tasks:Makes", name="maker"))
    assert set(maker.module) == {"judge", "maker"}
    made = maker.generate(3, seed=1)
    assert [one["mean"] for one in made] == [one["mean"] for one in maker.generate(3, seed=1)]
    assert made[0]["mean"] != maker.generate(3, seed=2)[0]["mean"]
    with pytest.raises(UserError, match=r"has no `predict`.*it has `generate`"):
        maker.predict(numbers())
    with pytest.raises(UserError, match="has no `draw`"):
        maker.draw(numbers())


def test_which_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path)
    run = trained(tmp_path, step=12)
    assert [dltrain.load(run, step).step for step in ("best", "newest", 7, "12")] == [7, 12, 7, 12]
    with pytest.raises(UserError, match=r"no checkpoint '8'.*there are: 7, 12"):
        dltrain.load(run, 8)


def test_an_average_of_the_weights_is_what_predicts(tmp_path: Path) -> None:
    model = dltrain.load(trained(tmp_path, averaged=True))
    assert model.module.state_dict()["0.weight"].flatten().tolist() == pytest.approx([0.01] * 256)


def test_packed_rows_are_made_by_read(tmp_path: Path) -> None:
    """A task whose training data are packed gets from `read` what packing would have made."""
    harness.write_documents(tmp_path / "train")
    run = trained(
        tmp_path, "use_tasks:Counts", data={"train": str(tmp_path / "train"), "pack": {"column": "tokens", "length": 8}}
    )
    assert dltrain.load(run).predict(["1 2 3", "4"]) == [3, 1]


def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path)
    monkeypatch.setenv("DLTRAIN_RUNS", str(tmp_path / "runs"))
    assert dltrain.load("tiny").trained.run == "tiny"
    with pytest.raises(UserError, match=r"no run 'tini'.*there are: tiny"):
        dltrain.load("tini")


def test_a_run_without_a_checkpoint_says_where_it_is(tmp_path: Path) -> None:
    spec = run_spec(tmp_path)
    run = RunDir.of(spec)
    run.save_spec(spec)
    with pytest.raises(UserError, match="has no checkpoint yet: it is planning, at step 0"):
        dltrain.load(run.url)
    run.store.write("state.json", json.dumps({"state": "running", "step": 3, "heartbeat": 9e9}).encode())
    with pytest.raises(UserError, match="it is running, at step 3"):
        dltrain.load(run.url)


def test_another_network_than_the_one_that_was_trained(tmp_path: Path) -> None:
    run = trained(tmp_path)
    with pytest.raises(UserError, match="unexpected keyword argument 'depth'"):
        dltrain.load(run, args={"depth": 3})
    spec = RunDir.of(run_spec(tmp_path))
    text = spec.store.read("spec.yaml").decode()
    spec.store.write("spec.yaml", text.replace("use_tasks:Sums", "use_tasks:Makes").encode())
    with pytest.raises(UserError, match=r"builds another network.*Missing key"):
        dltrain.load(run)


def test_a_task_whose_file_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(harness.ROOT / "tests" / "use_tasks.py", home / "mine.py")
    monkeypatch.chdir(home)
    run = trained(tmp_path)
    store = RunDir.of(run_spec(tmp_path)).store
    store.write("spec.yaml", store.read("spec.yaml").replace(b"use_tasks:Sums", b"mine.py:Sums"))
    assert dltrain.load(run).predict(numbers())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no file .*mine\.py.*--code"):
        dltrain.load(run)
    assert dltrain.load(run, code=str(home)).predict(numbers())
    # Edited since: another module.
    (home / "mine.py").write_text((home / "mine.py").read_text().replace('"positive"', '"above"'))
    assert set(dltrain.load(run, code=str(home)).predict(numbers())) == {"value", "above"}
    (home / "mine.py").write_text("import nothing_of_that_name\nclass Sums: ...\n")
    with pytest.raises(TaskError, match="ModuleNotFoundError: No module named 'nothing_of_that_name'") as caught:
        dltrain.load(run, code=str(home))
    assert "mine.py" in caught.value.trace


@pytest.mark.parametrize(
    ("task", "inputs", "told"),
    [
        ("use_tasks:Short", [numbers()] * 3, "predict returned 2 results for 3 rows"),
        ("use_tasks:Sums", ["one two"], "input 0: no numbers"),
        ("use_tasks:Sums", ["1 2 3"], r"input 0: column 'x' is fixed_size_list.* and this is \[1.0, 2.0, 3.0\]"),
        ("use_tasks:Sums", [{"z": 1}], "row 0 has 'z'"),
        ("use_tasks:Sums", [7], "input 0 is int; give pathlib.Path"),
        ("use_tasks:Sums", [Path("nowhere.txt")], "nowhere.txt can't be read: No such file"),
        ("tasks:Tiny", [{"x": [0.0] * 8, "y": 0.0}], "has no `predict`"),
    ],
)
def test_mistakes(tmp_path: Path, task: str, inputs: list[Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        dltrain.load(trained(tmp_path, task)).predict(inputs)


def test_a_row_that_collate_refuses_is_named(tmp_path: Path) -> None:
    model = dltrain.load(trained(tmp_path, args={"refused_y": 5.0}))
    rows = [{"x": [0.0] * 8, "y": float(y)} for y in (1, 9, 2, 8)]
    with pytest.raises(UserError, match="row 1: y is out of range"):
        model.predict(rows)


def test_an_exception_of_the_task_has_its_trace(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="predict of the task raised KeyError: 'the column that nobody has'") as caught:
        dltrain.load(trained(tmp_path, "use_tasks:Raises")).predict(numbers())
    assert "raise KeyError" in caught.value.trace
    assert "dltrain/using" not in caught.value.trace


# ---- the command ----


def test_files_and_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, out = trained(tmp_path), tmp_path / "out"
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(numbers(i))
    code, text, err = call(capsys, "predict", run, str(tmp_path / "*.txt"), "--out", str(out))
    assert code == 0, err
    lines = text.splitlines()
    values = expected(run, *(numbers(i) for i in range(3)))
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [f"value {v:.4g}" for v in values]
    assert sorted(os.listdir(out)) == ["0.png", "1.png", "2.png"]
    assert lines[0].endswith(f"-> {out}/0.png")
    code, text, err = call(capsys, "predict", run, f"--text={numbers(1)}", f"--text={numbers(0)}", "--json")
    assert code == 0, err
    found = json.loads(text)
    assert (found["run"], found["step"], found["bad"], found["files"]) == ("tiny", 7, 0, [])
    assert [one["prediction"]["value"] for one in found["results"]] == [values[1], values[0]]


def test_lines_of_stdin(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{numbers(0)}\n\n{numbers(1)}\nnot a number\n"))
    code, text, err = call(capsys, "predict", run, "-", "--batch", "2")
    # As many lines as there were good ones, and nothing else.
    assert [line.split(",")[0] for line in text.splitlines()] == [
        f"value {v:.4g}" for v in expected(run, numbers(0), numbers(1))
    ]
    assert code == 2
    assert "line 4: no numbers" in err


def test_a_stream_is_written_as_it_comes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = trained(tmp_path, "use_tasks:Tells")
    code, text, _ = call(capsys, "predict", run, f"--text={numbers(0)}", f"--text={numbers(1)}")
    assert code == 0
    assert text.splitlines() == [f"about {v:.3f}" for v in expected(run, numbers(0), numbers(1))]
    code, text, _ = call(capsys, "predict", run, f"--text={numbers(0)}", "--json")
    value = expected(run, numbers(0))[0]
    assert json.loads(text)["results"] == [{"input": "text 0", "prediction": f"about {value:.3f}"}]


def test_rows_of_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = trained(tmp_path)
    table = harness.make_table(5, seed=3)
    pq.write_table(table, tmp_path / "a.parquet")
    rows = [json.dumps({"x": x}) for x in table["x"].to_pylist()]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found = []
    for name in ("a.parquet", "a.jsonl"):
        code, text, err = call(capsys, "predict", run, str(tmp_path / name), "--json")
        assert code == 0, err
        found.append([one["prediction"] for one in json.loads(text)["results"]])
    code, text, err = call(capsys, "predict", run, *(f"--text={row}" for row in rows), "--json")
    found.append([one["prediction"] for one in json.loads(text)["results"]])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 5
    (tmp_path / "b.csv").write_text("x,y\n1,2\n")
    code, _, err = call(capsys, "predict", run, str(tmp_path / "b.csv"))
    assert code == 2
    assert "b.csv row 0: column 'x' is fixed_size_list" in err


def test_making_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = trained(tmp_path, "use_tasks:Makes")
    code, text, err = call(capsys, "predict", run, "--count", "2", "--seed", "4")
    assert code == 0
    assert text.splitlines()[0].startswith("made-0000: mean ")
    assert "2 file(s) were made and not kept; name a directory with --out" in err
    code, text, _ = call(capsys, "predict", run, "--count=2", "--seed=4", f"--out={tmp_path / 'made'}", "--json")
    found = json.loads(text)
    assert found["files"] == [str(tmp_path / "made" / f"made-000{i}-row.png") for i in range(2)]
    assert found["results"][1]["prediction"]["row"] == {"file": found["files"][1]}
    with Image.open(found["files"][0]) as picture:
        assert picture.size == (8, 1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "nothing to predict for"),
        (["nowhere.txt"], "no file nowhere.txt; text is given with --text"),
        (["nowhere/*.txt"], "no file matches nowhere/"),
        (["--text", "1", "--count", "2"], "leave it out"),
        (["--text", "1", "--workers", "2"], "--workers is for a whole dataset"),
        (["--text", "1", "--to", "x"], "--to writes the predictions of one Parquet INPUT"),
        (["--text", "1", "--arg", "depth"], "--arg depth: write KEY=VALUE"),
        (["--text", "1", "--arg", "depth=3"], "unexpected keyword argument 'depth'"),
        (["--text", "1", "--step", "5"], "no checkpoint '5'"),
    ],
)
def test_mistakes_of_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], told: str
) -> None:
    code, out, err = call(capsys, "predict", trained(tmp_path), *arguments)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_an_exception_of_the_task_is_shown_with_its_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = call(capsys, "predict", trained(tmp_path, "use_tasks:Raises"), f"--text={numbers()}")
    assert code == 1
    assert 'raise KeyError("the column that nobody has")' in err
    assert "dltrain: predict of the task raised KeyError" in err
    assert "rank" not in err


# ---- results ----


def test_results_as_json_and_as_a_line(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    picture, words = Artifact.image([[0.0, 1.0]], "a ramp"), Artifact.text("hello")
    value = {"label": 3, "share": torch.tensor([0.25, 0.5]), "shown": [picture, picture], "said": words, "none": None}
    found = plain(value, folder.keep("scans/a b.png"))
    files = [f"{tmp_path}/a-b-shown-{i}.png" for i in range(2)]
    assert found == {
        "label": 3,
        "share": [0.25, 0.5],
        "shown": [{"file": file, "caption": "a ramp"} for file in files],
        "said": "hello",
        "none": None,
    }
    assert line({"label": 3, "share": [0.25, 0.333333], "ok": True}) == "label 3, share [0.25, 0.3333], ok True"
    # Another input of the same name: a file of its own.
    assert plain(picture, folder.keep("other/a b.png"))["file"] == f"{tmp_path}/a-b.png"
    assert plain(picture, folder.keep("third/a b.png"))["file"] == f"{tmp_path}/a-b-2.png"
    nowhere = Folder(None)
    assert plain(picture, nowhere.keep("x"))["bytes"] == len(picture.data)
    assert nowhere.left == 1
    with pytest.raises(UserError, match="a result holds bytes"):
        plain({"raw": b"abc"}, folder.keep("x"))


def test_results_as_a_column() -> None:
    found = column([{"label": 1, "picture": Artifact.text("a", "b")}, None])
    assert found.to_pylist() == [
        {"label": 1, "picture": {"media_type": "text/plain", "data": b"a", "caption": "b"}},
        None,
    ]
    assert column([torch.tensor(1.5), 2.0]).to_pylist() == [1.5, 2.0]
    with pytest.raises(UserError, match="of another kind, and all of them have to be of one"):
        column([1, "one"])
    with pytest.raises(UserError, match="the first ones were int64"):
        column(["one"], pa.int64())
    with pytest.raises(UserError, match="returned 'new', which the first ones had not"):
        column([{"a": 1, "new": 2}], pa.struct([("a", pa.int64())]))
