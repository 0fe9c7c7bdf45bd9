"""From nothing to a trained network in use: `new`, `run`, `predict` here and on Ray, `export`; and in a program."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from harness import Done, finish, start
from PIL import Image
from use_tasks import numbers, trained

ROOT = harness.ROOT


def dltrain(cwd: Path, *arguments: str, env: dict[str, str] | None = None, text: str | None = None) -> Done:
    process = start(*arguments, env=env, cwd=cwd, popen=_piped)
    if text is not None:
        out, err = process.communicate(text, timeout=harness.SECONDS)
        return Done(process.returncode, out, err)
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    return finish(process)


def _piped(*arguments: Any, **options: Any) -> Any:
    return subprocess.Popen(*arguments, stdin=subprocess.PIPE, **options)


def python(cwd: Path, *arguments: str, env: dict[str, str] | None = None) -> Done:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=harness.SECONDS
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def disc(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Path:
    """What `dltrain new disc` wrote, and the run that it trained, by the commands that it names."""
    home = tmp_path_factory.mktemp("disc")
    made = dltrain(home, "new", "disc", "--json")
    assert made.code == 0, made.err
    data, test, run, _ = made.json["next"]
    assert data.startswith("python ")
    assert python(home, *data.split()[1:]).code == 0
    tested = python(home, *test.split()[1:], "-q", "-p", "no:cacheprovider")
    assert tested.code == 0, tested.out
    assert "1 passed" in tested.out
    done = dltrain(home, *run.split()[1:], "metrics.port=0", "--json", "--address", ray_address)
    assert done.code == 0, done.err
    assert done.json["eval"]["accuracy"] > 0.95
    return home


def test_new_predicts_what_it_learned(disc: Path) -> None:
    lines = [{"x": x, "y": y} for x, y in ((0.0, 0.0), (0.75, 0.0), (0.0, -1.3), (1.4, 1.4))]
    done = dltrain(disc, "predict", "disc", "-", "--json", text="\n".join(map(json.dumps, lines)))
    assert done.code == 0, done.err
    assert [one["prediction"]["inside"] for one in done.json["results"]] == [True, True, False, False]
    shown = dltrain(disc, "predict", "disc", "--text", json.dumps(lines[1]))
    assert shown.out.startswith("inside True, probability 0.")


def test_an_exported_folder_predicts_alike_elsewhere(disc: Path, tmp_path: Path) -> None:
    line = json.dumps({"x": 0.7, "y": 0.1})
    wanted = dltrain(disc, "predict", "disc", "--text", line, "--json").json
    exported = dltrain(disc, "checkpoint", "export", "disc", "--to", str(tmp_path / "taken"), "--json")
    assert exported.code == 0, exported.err
    assert sorted(os.listdir(tmp_path / "taken")) == ["config.json", "disc.py", "model.safetensors"]
    found = dltrain(tmp_path, "predict", "taken", "--text", line, "--json").json
    assert found["results"] == wanted["results"]
    graph = dltrain(disc, "checkpoint", "export", "disc", "--format", "onnx", "--to", str(tmp_path), "--json")
    assert graph.code == 0, graph.err
    assert graph.json["compared_with"] == "onnxruntime"
    assert (tmp_path / "model.onnx").stat().st_size == graph.json["bytes"]


PROGRAM = """
import threading
import dltrain
from pathlib import Path

def train(steps, **more):
    changes = {"train.epochs": None, "train.steps": steps, "checkpoint.every": 10, **more}
    summary = dltrain.run("disc.yaml", quiet=True, name="in_a_program", **changes)
    print(summary["status"], summary["steps"], summary["samples"], flush=True)
    return summary

# As in a notebook, where cells may run in a thread; and a second time in the same process.
thread = threading.Thread(target=train, args=(10,))
thread.start()
thread.join()
summary = train(20, workers=1)
model = dltrain.load(summary["dir"], "newest")
print(model.step, model.predict({"x": 0.7, "y": 0.1})["inside"] in (True, False))
"""


@pytest.mark.long
def test_in_a_program(disc: Path) -> None:
    done = python(disc, "-c", PROGRAM, env={"RAY_ADDRESS": ""})
    assert done.code == 0, done.err
    assert done.out.splitlines() == ["finished 10 640", "finished 20 640", "20 True"]


CONNECTED = """
import ray
ray.init(address={address!r}, log_to_driver=False)
import dltrain
changes = {{"train.epochs": None, "train.steps": 5, "checkpoint.every": 5}}
print(dltrain.run("disc.yaml", quiet=True, name="connected", **changes)["steps"])
# The connection is the program's: it stays.
print(ray.is_initialized(), ray.get(ray.remote(lambda: 7).remote()))
"""


@pytest.mark.long
def test_in_a_program_that_is_connected_to_ray(disc: Path, ray_address: str) -> None:
    done = python(disc, "-c", CONNECTED.format(address=ray_address))
    assert done.code == 0, done.err
    assert done.out.splitlines() == ["5", "True 7"]


def test_somebody_types(tmp_path: Path) -> None:
    """On a terminal each line is answered before the next one is asked for; Ctrl-D ends it."""
    run = trained(tmp_path, "use_tasks:Tells")
    ours, theirs = pty.openpty()
    command = [harness.DLTRAIN, "predict", run, "-"]
    process = subprocess.Popen(
        command, cwd=ROOT / "tests", stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.close(theirs)
    assert process.stdout is not None
    try:
        for line in (numbers(0), numbers(1)):
            os.write(ours, f"{line}\n".encode())
            assert process.stdout.readline().startswith("about ")
            assert process.poll() is None
        os.write(ours, b"\x04")
        out, err = process.communicate(timeout=harness.SECONDS)
    finally:
        process.kill()
        os.close(ours)
    assert (process.returncode, out) == (0, ""), err
    assert err.count("> ") == 3


# ---- the handwriting ----


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, ray_address: str) -> Path:
    """A home with the data of jobs.image_cnn and a run of it."""
    home = tmp_path_factory.mktemp("digits")
    made = python(ROOT, "-m", "jobs.image_cnn", "make-data", str(home / ".data" / "digits"))
    assert made.code == 0, made.err
    spec = str(ROOT / "jobs" / "image_cnn.yaml")
    changes = ["args={width: 16, blocks: 1}", "train.epochs=8", "metrics.port=0"]
    done = dltrain(home, "run", spec, *changes, "--json", "--address", ray_address, env={"PYTHONPATH": python_path()})
    assert done.code == 0, done.err
    assert done.json["eval"]["accuracy"] > 0.93
    return home


def python_path() -> str:
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)


def test_pictures_are_recognised_and_drawn(digits: Path, tmp_path: Path) -> None:
    """Scans as a person would have them: larger, dark ink on light paper, as PNG and JPEG."""
    table = pq.read_table(digits / ".data" / "digits" / "test").slice(0, 40)
    for i, raw in enumerate(table["image"].to_pylist()):
        ink = np.frombuffer(raw, np.uint8).reshape(8, 8).astype(float) / 16
        pixels = (235 - 200 * np.kron(ink, np.ones((12, 12)))).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    (tmp_path / "zz-notes.txt").write_text("not a picture")
    env = {"PYTHONPATH": python_path()}
    done = dltrain(digits, "predict", "image-cnn", str(tmp_path), "--out", "drawn", "--json", env=env)
    # One of the files is none, and that is told; the others are predicted.
    assert done.code == 2
    assert "zz-notes.txt: it is no image that Pillow knows" in done.err
    results = done.json["results"][:40]
    right = sum(r["prediction"]["label"] == label for r, label in zip(results, table["label"].to_pylist(), strict=True))
    assert right >= 36
    assert len(done.json["files"]) == 40
    with Image.open(digits / "drawn" / "00.png") as picture:
        assert picture.size == (128, 144)


def test_labels_that_the_run_contradicts_are_told(digits: Path, tmp_path: Path) -> None:
    table = pq.read_table(digits / ".data" / "digits" / "test")
    labels = table["label"].to_pylist()
    wrong = list(range(0, len(labels), 20))
    for row in wrong:
        labels[row] = (labels[row] + 3) % 10
    planted = table.set_column(1, "label", pa.array(labels, table["label"].type))
    (tmp_path / "planted").mkdir()
    pq.write_table(planted, tmp_path / "planted" / "a.parquet")
    env = {"PYTHONPATH": python_path()}
    done = dltrain(digits, "data", "check", str(tmp_path / "planted"), "--run", "image-cnn", "--json", env=env)
    assert done.code == 0, done.err
    assert done.json["url"] == str(tmp_path / "planted")
    suspects = done.json["suspects"]
    assert {one["file"] for one in suspects} == {str(tmp_path / "planted" / "a.parquet")}
    found = {one["row"] for one in suspects}
    assert len(found & set(wrong)) >= 0.7 * len(wrong)
    assert len(found - set(wrong)) <= 0.3 * len(wrong)


@pytest.mark.long
def test_a_dataset_by_any_number_of_workers_is_the_same_bytes(digits: Path, ray_address: str) -> None:
    env = {"PYTHONPATH": python_path()}
    source, found = str(digits / ".data" / "digits" / "train"), {}
    for workers in (1, 3):
        to = f"labels-{workers}"
        more = ["--keep", "label", "--workers", str(workers), "--address", ray_address, "--json"]
        done = dltrain(digits, "predict", "image-cnn", source, "--to", to, *more, env=env)
        assert done.code == 0, done.err
        assert (done.json["rows"], done.json["files"], done.json["workers"]) == (1438, 4, workers)
        found[workers] = {n: (digits / to / n).read_bytes() for n in os.listdir(digits / to) if n.startswith("part")}
    assert found[1] == found[3]
    table = pq.read_table(digits / "labels-3")
    labels = [one["label"] for one in table["prediction"].to_pylist()]
    assert np.mean(np.array(labels) == table["label"].to_numpy()) > 0.95
    # By this process alone: torch uses more threads, and may add up in another order.
    done = dltrain(digits, "predict", "image-cnn", source, "--to", "labels", "--keep", "label", "--json", env=env)
    assert done.code == 0, done.err
    assert [one["label"] for one in pq.read_table(digits / "labels")["prediction"].to_pylist()] == labels


# ---- when something happens to it ----


def lots(tmp_path: Path) -> tuple[str, str]:
    """A run whose predictions take a while, and data in 12 files."""
    run = trained(tmp_path, "use_tasks:Slow", args={"seconds": 0.2})
    harness.write_data(tmp_path / "scans", rows=12 * 32, files=12, group=32)
    return run, str(tmp_path / "scans")


def test_a_killed_worker_is_replaced(tmp_path: Path, ray_address: str) -> None:
    run, source = lots(tmp_path)
    here = ROOT / "tests"
    whole = dltrain(here, "predict", run, source, "--to", str(tmp_path / "whole"), "--batch", "16", "--json")
    assert whole.code == 0, whole.err
    to = tmp_path / "to"
    more = ["--batch", "16", "--workers", "2", "--address", ray_address, "--arg", f"pids={tmp_path}", "--json"]
    process = start("predict", run, source, "--to", str(to), *more, cwd=here)
    # The command itself predicts for the first rows, to know what kind the predictions are.
    workers = harness.wait_for(lambda: _workers(tmp_path, process) if _parts(to) else None, process)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    done = finish(process)
    assert done.code == 0, done.err
    assert len(_workers(tmp_path, process)) == 3
    assert _parts(to) == _parts(tmp_path / "whole")
    harness.wait_for(lambda: not harness.alive(_pids(tmp_path)))


@pytest.mark.long
def test_ctrl_c_and_the_same_command_again(tmp_path: Path, ray_address: str) -> None:
    run, source = lots(tmp_path)
    to = tmp_path / "to"
    command = ["predict", run, source, "--to", str(to), "--batch", "16", "--workers", "2", "--address", ray_address]
    command += ["--arg", f"pids={tmp_path}"]
    process = start(*command, cwd=ROOT / "tests")
    harness.wait_for(lambda: len(_parts(to)) >= 2, process)
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    harness.wait_for(lambda: not harness.alive(_pids(tmp_path)))
    before = len(_parts(to))
    assert before < 12
    refused = dltrain(ROOT / "tests", "data", "inspect", str(to))
    assert refused.code == 2
    assert "is not complete" in refused.err
    again = dltrain(ROOT / "tests", *command, "--json")
    assert again.code == 0, again.err
    assert again.json["files_before"] == before
    assert dltrain(ROOT / "tests", "data", "inspect", str(to), "--json").json["rows"] == 384


def test_a_mistake_on_a_worker_is_told_as_one_here(tmp_path: Path, ray_address: str) -> None:
    run = trained(tmp_path, "use_tasks:LateMistake")
    harness.write_data(tmp_path / "scans", rows=90, files=3)
    command = ["predict", run, str(tmp_path / "scans"), "--to", str(tmp_path / "to"), "--workers", "2"]
    done = dltrain(ROOT / "tests", *command, "--address", ray_address)
    assert done.code == 1
    assert "predict of the task raised ZeroDivisionError" in done.err
    assert done.err.count("Traceback") == 0
    assert "use_tasks.py" in done.err


def _parts(directory: Path) -> dict[str, bytes]:
    if not directory.exists():
        return {}
    return {n: (directory / n).read_bytes() for n in sorted(os.listdir(directory)) if n.startswith("part")}


def _workers(directory: Path, process: Any) -> list[int]:
    found = [pid for pid in _pids(directory) if pid != process.pid]
    return found if len(found) > 1 else []


def _pids(directory: Path) -> list[int]:
    return [int(name.removeprefix("pid-")) for name in os.listdir(directory) if name.startswith("pid-")]


# ---- object storage ----


def test_all_of_it_in_s3(s3: Any, tmp_path: Path, ray_address: str) -> None:
    s3.make_bucket("use")
    fs = s3fs.S3FileSystem(key=s3.access_key, secret=s3.secret_key, endpoint_url=s3.endpoint)
    run = trained(tmp_path)
    fs.put(run, "use/runs/tiny", recursive=True)
    fs.put(str(harness.write_data(tmp_path / "scans", rows=100)), "use/scans", recursive=True)
    fs.pipe_file("use/lines/a.txt", numbers(1).encode())
    env, here = {**s3.env, "DLTRAIN_RUNS": "s3://use/runs"}, ROOT / "tests"
    command = ["predict", "tiny", "s3://use/scans", "--to", "s3://use/to", "--keep", "y", "--json"]
    done = dltrain(here, *command, env=env)
    assert done.code == 0, done.err
    again = dltrain(here, *command, env=env)
    assert (again.json["files_before"], again.json["rows"]) == (2, 100)
    local = dltrain(
        here, "predict", run, str(tmp_path / "scans"), "--to", str(tmp_path / "to"), "--keep", "y", "--json"
    )
    assert local.code == 0, local.err
    assert {n.rpartition("/")[2]: fs.cat(n) for n in fs.find("use/to") if n.endswith("parquet")} == _parts(
        tmp_path / "to"
    )
    one = dltrain(here, "predict", "tiny", "s3://use/lines/*.txt", "--out", "s3://use/drawn", "--json", env=env)
    assert one.code == 0, one.err
    assert one.json["files"] == ["s3://use/drawn/a.png"]
    assert fs.exists("use/drawn/a.png")
    exported = dltrain(here, "checkpoint", "export", "tiny", "--to", "s3://use/taken", "--json", env=env)
    assert exported.code == 0, exported.err
    taken = dltrain(here, "predict", "s3://use/taken", "s3://use/lines/a.txt", "--json", env=env)
    assert taken.json["results"][0]["prediction"] == one.json["results"][0]["prediction"]
