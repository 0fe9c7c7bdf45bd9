"""A trained network taken away: weights that load anywhere, and graphs that compute what the network does."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from use_tasks import numbers, run_spec, trained

import dltrain
from dltrain import cli
from dltrain.errors import MissingExtraError, RunFailedError, UserError
from dltrain.running.rundir import RunDir
from dltrain.using import graphs
from dltrain.using.exporting import export
from dltrain.using.graphs import Graph

# Reading TorchScript is deprecated as well as writing it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(harness.ROOT / "tests")


def outputs(run: str, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return dltrain.load(run).module(x)  # type: ignore[no-any-return]


def by_onnx(session: onnxruntime.InferenceSession, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


# ---- weights ----


def test_a_folder_is_all_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(harness.ROOT / "tests" / "use_tasks.py", home / "mine.py")
    run = trained(tmp_path)
    store = RunDir.of(run_spec(tmp_path)).store
    store.write("spec.yaml", store.read("spec.yaml").replace(b"use_tasks:Sums", b"mine.py:Sums"))
    monkeypatch.chdir(home)
    wanted = dltrain.load(run).predict([numbers(0), numbers(1)])
    done = export(run, str(tmp_path / "taken"))
    assert done["file"] == str(tmp_path / "taken" / "model.safetensors")
    assert done["task_file"] == str(tmp_path / "taken" / "mine.py")
    config = json.loads((tmp_path / "taken" / "config.json").read_text())
    assert (config["run"], config["task"], config["step"], config["metrics"]) == (
        "tiny",
        "mine.py:Sums",
        7,
        {"loss": 0.5},
    )
    assert config["tensors"]["0.weight"] == {"dtype": "float32", "shape": [32, 8]}
    assert config["column_types"] == {"x": "fixed_size_list<element: float>[8]", "y": "float"}
    assert config["sha256"] == hashlib.sha256((tmp_path / "taken" / "model.safetensors").read_bytes()).hexdigest()
    # Neither the run nor the task's directory are there any more.
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(home)
    shutil.rmtree(run)
    model = dltrain.load(str(tmp_path / "taken"))
    assert model.predict([numbers(0), numbers(1)]) == wanted
    assert (model.step, model.trained.run) == (7, "tiny")
    # By a relative name too, which is no run's.
    assert dltrain.load("taken").predict([numbers(0), numbers(1)]) == wanted
    with pytest.raises(UserError, match="holds step 7 alone, and --step 5 was asked for"):
        dltrain.load("taken", 5)
    weights = tmp_path / "taken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"is not what its config\.json was written with"):
        dltrain.load("taken")


def test_a_file_and_what_is_not_written_over(tmp_path: Path) -> None:
    run = trained(tmp_path)
    done = export(run, str(tmp_path / "out" / "weights.safetensors"))
    loaded = load_file(tmp_path / "out" / "weights.safetensors")
    assert done["bytes"] == (tmp_path / "out" / "weights.safetensors").stat().st_size
    assert set(loaded) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert dltrain.load(str(tmp_path / "out")).predict(numbers())
    export(run, str(tmp_path / "out" / "weights.safetensors"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "somebody else\'s"}')
    with pytest.raises(UserError, match=r"has a config.json of something else"):
        export(run, str(tmp_path / "other"))
    assert not (tmp_path / "other" / "model.safetensors").exists()
    with pytest.raises(UserError, match="dltrain_format is nothing"):
        dltrain.load(str(tmp_path / "other"))
    with pytest.raises(UserError, match="--format is 'pickle'; it can be safetensors,"):
        export(run, str(tmp_path / "x"), format="pickle")


def test_several_networks(tmp_path: Path) -> None:
    run = trained(tmp_path, "use_tasks:Makes")
    export(run, str(tmp_path / "out"))
    model = dltrain.load(str(tmp_path / "out"))
    assert model.generate(2)[0]["mean"] == dltrain.load(run).generate(2)[0]["mean"]
    with pytest.raises(UserError, match="--network is ''; use_tasks:Makes has judge, maker"):
        export(run, str(tmp_path / "out"), format="torchscript")
    done = export(run, str(tmp_path / "out"), format="torchscript", network="maker")
    assert done["file"].endswith("/model-maker.pt")
    x = torch.randn(3, 8)
    assert torch.equal(torch.jit.load(done["file"])(x), dltrain.load(run).module["maker"](x))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path)
    monkeypatch.setenv("DLTRAIN_RUNS", str(tmp_path / "runs"))
    monkeypatch.syspath_prepend(str(harness.ROOT / "tests"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["checkpoint", "export", *arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    capsys.readouterr()
    code, out, err = call("tiny")
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote step 7 to {tmp_path}/tiny-exported/model.safetensors (")
    code, out, err = call(run, "--format", "torchscript", "--to", "net.pt", "--json")
    assert code == 0, err
    assert json.loads(out)["file"] == f"{tmp_path}/net.pt"
    code, out, err = call("tiny", "--format", "torchscript")
    assert "it takes float32 ['rows', 8]; outputs by torch differ by 0 at most" in out


# ---- graphs ----


def test_graphs_compute_what_the_network_does(tmp_path: Path) -> None:
    run = trained(tmp_path)
    # More and fewer rows than the example had.
    inputs = [torch.randn(rows, 8) for rows in (1, 5, 11)]
    for format in ("torchscript", "pt2", "onnx"):
        done = export(run, str(tmp_path / "out"), format=format)
        assert done["difference"] < 1e-6
        runs: Any
        match format:
            case "torchscript":
                runs = torch.jit.load(done["file"])
            case "pt2":
                runs = torch.export.load(done["file"]).module()
            case "onnx":
                session = onnxruntime.InferenceSession(done["file"])
                runs = partial(by_onnx, session)
                facts = {p.key: p.value for p in onnx.load(done["file"]).metadata_props}
                assert (facts["dltrain.run"], facts["dltrain.step"]) == ("tiny", "7")
                assert done["compared_with"] == "onnxruntime"
        for x in inputs:
            torch.testing.assert_close(runs(x), outputs(run, x), rtol=1e-5, atol=1e-6)
        rows, width = done["inputs"][0]["shape"]
        assert isinstance(rows, str)
        assert width == 8


class TwoInputs(nn.Module):
    """Takes a second tensor by name, and returns two."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scaled": x * scale, "sum": x.sum(1)}


def test_several_inputs_and_outputs() -> None:
    graph = Graph(TwoInputs(), (torch.randn(5, 3),), {"scale": torch.tensor(2.0)})
    traced = torch.jit.load(io.BytesIO(graph.torchscript()))
    x = torch.randn(7, 3)
    found = traced(x, torch.tensor(3.0))
    assert torch.equal(found["scaled"], x * 3.0)
    assert graph.inputs == [{"dtype": "float32", "shape": ["rows", 3]}, {"dtype": "float32", "shape": []}]


class Branches(nn.Module):
    """Looks at a value to decide what to do, which no trace can follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3 if len(x) > 3 else x + 1


class Peeks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x + 1


def test_a_trace_that_computes_something_else_is_refused() -> None:
    with pytest.raises(
        RunFailedError, match=r"outputs differ from the network's, by up to .* on 2x3; nothing was written"
    ):
        Graph(Branches(), (torch.ones(5, 3),), {}).torchscript()


def test_what_can_not_be_a_graph() -> None:
    with pytest.raises(UserError, match=r"torch\.export can't make a graph of this network"):
        Graph(Peeks(), (torch.ones(5, 3),), {}).pt2()
    with pytest.raises(UserError, match="the network's forward takes int; a graph takes tensors alone"):
        Graph(Peeks(), (torch.ones(5, 3), 7), {})
    graph = Graph(Peeks(), (torch.ones(5, 3),), {})
    graph.torchscript()
    assert any("Converting a tensor to a Python boolean" in note for note in graph.notes)


def test_where_the_inputs_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path)
    model = dltrain.load(run)
    (x,), _ = graphs.example_of(model)
    assert x.shape == (5, 8)
    monkeypatch.setattr(type(model.task), "example", lambda _self: (torch.zeros(3, 8),))
    assert graphs.example_of(model)[0][0].shape == (3, 8)
    monkeypatch.undo()
    monkeypatch.chdir(harness.ROOT / "tests")
    monkeypatch.setattr(type(model.task), "evaluate", lambda _self, _model, _batch: {})
    with pytest.raises(UserError, match="does not call the network '', so its inputs can't be told; define `example`"):
        graphs.example_of(model)
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match=r"found no Parquet at .*\. Or define `example`"):
        graphs.example_of(model)
    export(run, str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"knows no data.*define `example` in the task, or export from the run"):
        export(str(tmp_path / "out"), str(tmp_path / "out"), format="onnx")


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"onnxscript is not installed.*'dltrain\[onnx\]'"):
        Graph(nn.Linear(2, 2), (torch.zeros(2, 2),), {}).onnx()


def test_without_onnxruntime_the_reference_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    graph = Graph(nn.Linear(2, 2).eval(), (torch.randn(4, 2),), {})
    data = graph.onnx()
    assert graph.runner == "onnx.reference"
    assert onnx.load_from_string(data).graph.node
    assert np.isfinite(graph.difference)
