"""Trackers: what is read back of what the real packages wrote; one that fails or is slow costs the run nothing."""

from __future__ import annotations

import json
import struct
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest

from dltrain.artifact import Artifact
from dltrain.errors import MissingExtraError, SpecError
from dltrain.observing.trackers import TrackedRun, Tracking, base
from dltrain.observing.trackers.tracking import make_trackers
from dltrain.spec import JobSpec, TrackersSpec, parse_spec
from dltrain.store import Store, open_store

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8)
SHOWN = {
    "picture": Artifact.image(PIXELS, "a picture"),
    "sound": Artifact.audio(np.zeros(80), 8000, "silence"),
    "words": Artifact.text("hello", "words"),
    "rows": Artifact.table([{"a": 1}]),
}


def spec(tmp_path: Path, **trackers: Any) -> JobSpec:
    return parse_spec(harness.make_spec(tmp_path, trackers=trackers))


def told(tracking: Tracking, steps: range) -> None:
    for step in steps:
        tracking.commit(step, {"train/loss": 1.0 / step, "train/learning_rate": 0.5})


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines are shared: how long a tracker takes says nothing."""
    monkeypatch.setattr("dltrain.observing.trackers.tracking._CLOSE_SECONDS", 300.0)


def a_run(spec: JobSpec, store: Store, begin: int, steps: range, status: str = "finished") -> None:
    """One start of a run, from after `begin` on."""
    tracking = Tracking.of(spec, store)
    tracking.begin(begin)
    told(tracking, steps)
    tracking.log(steps[-1], {"eval/mae": 0.25})
    for name, artifact in SHOWN.items():
        tracking.artifact(steps[-1], f"samples/{name}", artifact)
    tracking.close(status)
    assert list(tracking.warnings()) == []


# ---- what all of them have in common ----


class Listener:
    """Keeps what it is told."""

    name = "Listener"

    def __init__(self, last: int = -1, wait: float = 0.0, fails_at: int = 0) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self._last, self._wait, self._fails_at = last, wait, fails_at

    def start(self, run: TrackedRun) -> int:
        self.run = run
        return self._last

    def log(self, step: int, values: Mapping[str, float]) -> None:
        time.sleep(self._wait)
        if step == self._fails_at:
            raise OSError("no space left on device")
        self.heard.append((step, *values))

    def artifact(self, step: int, name: str, artifact: Artifact) -> None:
        self.heard.append((step, name, artifact.caption))

    def flush(self) -> None:
        pass

    def close(self, status: str) -> None:
        self.heard.append((status,))


def listen(tmp_path: Path, *listeners: Listener) -> Tracking:
    tracking = Tracking(listeners, spec(tmp_path), open_store(tmp_path))
    tracking.begin(0)
    return tracking


def test_a_step_made_again_is_told_once(tmp_path: Path) -> None:
    listener = Listener()
    tracking = listen(tmp_path, listener)
    for step in (1, 2, 3, 2, 3, 4):
        tracking.commit(step, {"loss": 1.0})
        tracking.log(step, {"eval": 1.0})
    tracking.artifact(3, "late", SHOWN["words"])
    tracking.artifact(4, "picture", SHOWN["picture"])
    tracking.artifact(4, "picture", SHOWN["picture"])
    tracking.close("finished")
    steps = [(step, name) for step in (1, 2, 3, 4) for name in ("loss", "eval")]
    assert listener.heard == [*steps, (4, "picture", "a picture"), ("finished",)]


def test_one_rank_may_be_ahead_of_the_others(tmp_path: Path) -> None:
    """What rank 0 says of a step comes before the others have made it, and is told after."""
    listener = Listener()
    tracking = listen(tmp_path, listener)
    tracking.commit(1, {"loss": 1.0})
    tracking.log(3, {"eval": 1.0})
    tracking.artifact(3, "picture", SHOWN["picture"])
    tracking.commit(2, {"loss": 1.0})
    tracking.commit(3, {"loss": 1.0})
    # An attempt that ends before all have made the step.
    tracking.log(5, {"eval": 2.0})
    tracking.begin(3)
    tracking.commit(4, {"loss": 1.0})
    tracking.commit(5, {"loss": 1.0})
    tracking.close("finished")
    after = [(4, "loss"), (5, "loss"), ("finished",)]
    assert listener.heard == [(1, "loss"), (2, "loss"), (3, "loss"), (3, "eval"), (3, "picture", "a picture"), *after]


def test_the_next_start_is_the_same_run_and_knows_what_was_told(tmp_path: Path) -> None:
    first, second = Listener(), Listener(last=3)
    for listener, steps in ((first, range(1, 4)), (second, range(2, 6))):
        tracking = listen(tmp_path, listener)
        told(tracking, steps)
        tracking.close("stopped")
    assert first.run.id == second.run.id
    assert (first.run.told, second.run.told) == (-1, 3)
    assert [item[0] for item in second.heard] == [4, 5, "stopped"]
    afresh = Listener()
    Path(tmp_path, "trackers.json").unlink()
    listen(tmp_path, afresh).close("stopped")
    assert afresh.run.id != first.run.id


def test_one_that_fails_is_left_out_and_said_once(tmp_path: Path) -> None:
    bad, good = Listener(fails_at=2), Listener()
    tracking = listen(tmp_path, bad, good)
    told(tracking, range(1, 100))
    tracking.close("finished")
    assert len(good.heard) == 100
    assert bad.heard == [(1, "train/loss", "train/learning_rate")]
    (warning,) = tracking.warnings()
    assert warning == "Listener: OSError: no space left on device; the run goes on without it"


def test_one_that_is_slow_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dltrain.observing.trackers.tracking._WAITING", 10)
    monkeypatch.setattr("dltrain.observing.trackers.tracking._CLOSE_SECONDS", 0.5)
    slow, good = Listener(wait=0.2), Listener()
    tracking = listen(tmp_path, slow, good)
    begin = time.monotonic()
    told(tracking, range(1, 9))
    time.sleep(0.1)
    told(tracking, range(9, 2000))
    assert time.monotonic() - begin < 2.0
    tracking.close("finished")
    assert time.monotonic() - begin < 4.0
    warnings = list(tracking.warnings())
    assert any("can't keep up" in text for text in warnings)
    assert "Listener has not answered for a while and was left alone; its last figures are missing" in warnings


def test_without_trackers_nothing_is_begun(tmp_path: Path) -> None:
    before = threading.active_count()
    tracking = Tracking.of(spec(tmp_path), open_store(tmp_path))
    tracking.begin(0)
    told(tracking, range(1, 10))
    assert threading.active_count() == before
    tracking.close("finished")
    assert not Path(tmp_path, "trackers.json").exists()


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "mlflow", "wandb"):
        with pytest.raises(MissingExtraError, match=rf"pip install 'dltrain\[{name}\]'"):
            make_trackers(TrackersSpec.model_validate([name]))


def test_the_spec(tmp_path: Path) -> None:
    plain = parse_spec(harness.make_spec(tmp_path, trackers=["tensorboard", "wandb"]))
    assert (plain.trackers.tensorboard is not None, plain.trackers.mlflow) == (True, None)
    again = parse_spec(json.loads(json.dumps(plain.to_dict())))
    assert again == plain
    assert set(plain.to_dict()["trackers"]) == {"tensorboard", "wandb"}
    assert parse_spec(harness.make_spec(tmp_path)).to_dict()["trackers"] == {}
    with pytest.raises(SpecError) as caught:
        parse_spec(harness.make_spec(tmp_path, trackers={"mlflow": {"uri": "http://me:hush@host"}, "comet": {}}))
    assert "MLFLOW_TRACKING_PASSWORD" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert "allowed: tensorboard, mlflow, wandb" in str(caught.value)


# ---- TensorBoard ----


def accumulated(directory: Path) -> Any:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "audio": 0, "tensors": 0})
    found.Reload()
    return found


@pytest.mark.parametrize("place", ["disk", "objects"])
def test_tensorboard(tmp_path: Path, place: str) -> None:
    pytest.importorskip("tensorboard", reason="needs dltrain[tensorboard]")
    store = open_store(tmp_path if place == "disk" else f"memory://tb-{uuid.uuid4().hex}")
    wanted = spec(tmp_path, tensorboard={})
    a_run(wanted, store, 0, range(1, 101))
    # A second start goes on from the checkpoint of step 90.
    time.sleep(1.1)
    a_run(wanted, store, 90, range(91, 121))
    directory = tmp_path / "tensorboard"
    if place == "objects":
        directory.mkdir()
        for name in store.list("tensorboard"):
            (directory / Path(name).name).write_bytes(store.read(name))
    assert len(list(directory.iterdir())) == 2
    found = accumulated(directory)
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 121))
    assert found.Scalars("train/loss")[49].value == pytest.approx(0.02)
    assert [event.step for event in found.Scalars("eval/mae")] == [120]
    (image,) = found.Images("samples/picture")
    assert image.encoded_image_string == SHOWN["picture"].data
    (sound,) = found.Audio("samples/sound")
    assert sound.encoded_audio_string == SHOWN["sound"].data
    assert b"hello" in found.Tensors("samples/words")[0].tensor_proto.string_val[0]
    assert b"optim.lr: 0.01" in found.Tensors("spec")[0].tensor_proto.string_val[0]


def test_tensorboard_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs dltrain[tensorboard]")
    a_run(spec(tmp_path, tensorboard={"dir": str(tmp_path / "boards")}), open_store(tmp_path / "run"), 0, range(1, 4))
    assert [event.step for event in accumulated(tmp_path / "boards" / "tiny").Scalars("train/loss")] == [1, 2, 3]


# ---- MLflow ----


# SQLAlchemy says of MLflow that it uses what will go.
@pytest.mark.filterwarnings("ignore")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs dltrain[mlflow]")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    wanted, store = spec(tmp_path, mlflow={"uri": uri, "experiment": "digits"}), open_store(tmp_path / "run")
    a_run(wanted, store, 0, range(1, 1201), "stopped")
    a_run(wanted, store, 1190, range(1191, 1211))
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("digits").experiment_id
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert run.data.params["optim.lr"] == "0.01"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == list(range(1, 1211))
    names = [file.path for file in client.list_artifacts(run.info.run_id, "samples/step-00001210")]
    assert sorted(Path(name).name for name in names) == [
        "samples-picture.png",
        "samples-rows.html",
        "samples-sound.wav",
        "samples-words.txt",
    ]


def test_an_mlflow_server_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs dltrain[mlflow]")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracking = Tracking.of(spec(tmp_path, mlflow={"uri": "http://127.0.0.1:9"}), open_store(tmp_path))
    tracking.begin(0)
    told(tracking, range(1, 10))
    tracking.close("finished")
    (warning,) = tracking.warnings()
    assert warning.startswith("MLflow: MlflowException: ")
    assert warning.endswith("the run goes on without it")


# ---- Weights & Biases ----


def records(data: bytes) -> Iterator[bytes]:
    """Of W&B's file: LevelDB's log format, blocks of 32 KiB with pieces of records; the package has no reader."""
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at < len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        # A record in one piece, or the last piece of one.
        if kind in (1, 4):
            yield whole
            whole = b""


def written(directory: Path) -> list[list[tuple[int, dict[str, Any]]]]:
    """Step and figures of each row, of each start."""
    from wandb.proto import wandb_internal_pb2

    starts = []
    for file in sorted(directory.glob("wandb/offline-run-*/run-*.wandb")):
        rows = []
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = record.history.item
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                rows.append((record.history.step.num, values))
        starts.append(rows)
    return starts


@pytest.mark.filterwarnings("default")
def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs dltrain[wandb]")
    wanted, store = spec(tmp_path, wandb={"project": "digits"}), open_store(tmp_path)
    a_run(wanted, store, 0, range(1, 21), "stopped")
    time.sleep(1.1)
    a_run(wanted, store, 15, range(16, 31))
    first, second = written(tmp_path)
    assert [step for step, _ in first] == list(range(1, 21))
    # What was told before is not told again.
    assert [step for step, _ in second] == list(range(21, 31))
    assert first[3][1]["train/loss"] == 0.25
    assert second[-1][1]["eval/mae"] == 0.25
    assert second[-1][1]["samples/picture/_type"] == "image-file"
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples/*.png"))
    assert SHOWN["picture"].data in [path.read_bytes() for path in pictures]
    # One run of W&B, not two.
    assert len({path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}) == 1
