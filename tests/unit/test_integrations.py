"""What trials and train functions are made of, without Ray: settings, reports, and checkpoints written by ranks."""

from __future__ import annotations

import json
import pickle
import queue
import threading
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest

from dltrain.checkpoint.commit import list_checkpoints, rank_file, verify
from dltrain.errors import MissingExtraError, SpecError, UserError
from dltrain.integrations.changes import changed, read_spec
from dltrain.integrations.train import _joined
from dltrain.integrations.tune import NestedRun, _check_own, _End, _named, trainable
from dltrain.integrations.uploads import Uploads
from dltrain.observing.reports import SaveFailed, SaveWanted
from dltrain.observing.view import Progress
from dltrain.running.keeper import Keeper
from dltrain.running.rundir import RunDir
from dltrain.spec import JobSpec, parse_spec
from dltrain.training.plan import RankJob, Schedule


def spec_in(tmp: Path, **changes: Any) -> JobSpec:
    return parse_spec(harness.make_spec(tmp, **changes))


# ---- settings ----


def test_settings_by_field_and_nested(tmp_path: Path) -> None:
    config = {
        "optim.lr": 3e-5,
        "args": {"seconds": 1e-7, "dropout": np.float32(0.5)},
        "batch.global": np.int64(32),
        "workers": 1,
        "train.freeze": ["a.*"],
    }
    found = changed(spec_in(tmp_path), config)
    # YAML 1.1 would take 1e-07 for a text.
    assert (found.optim.lr, found.args) == (3e-5, {"seconds": 1e-7, "dropout": 0.5})
    assert (found.batch.global_, found.workers.max, found.train.freeze) == (32, 1, ("a.*",))
    assert found.data == spec_in(tmp_path).data


def test_settings_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'lr'") as caught:
        changed(spec_in(tmp_path), {"optim.lrr": 1.0, "workers.max": 0})
    assert len(caught.value.faults) >= 2
    # It travels between processes.
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(UserError, match=r"args\.f: found <function"):
        changed(spec_in(tmp_path), {"args.f": harness.alive})


def test_errors_travel() -> None:
    error = MissingExtraError("pandas", "tune")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_specs_by_file_are_of_their_directory(tmp_path: Path) -> None:
    harness.write_spec(tmp_path, harness.make_spec(tmp_path, data={"train": "here"}, runs="runs"))
    found = read_spec("job.yaml", str(tmp_path))
    assert (found.data.train, found.runs) == (f"{tmp_path}/here", f"{tmp_path}/runs")


# ---- a trial ----


def test_a_trial_needs_something_to_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.eval: is missing"):
        trainable(harness.make_spec(tmp_path))


def test_a_trial_has_a_name_of_its_own_and_its_own_checkpoint(tmp_path: Path) -> None:
    assert _named(spec_in(tmp_path), "ab12_00003").name == "tiny-ab12_00003"
    (tmp_path / "dltrain-run.json").write_text('{"run": "tiny-1"}')
    _check_own(str(tmp_path), "tiny-1")
    with pytest.raises(UserError, match="population-based training"):
        _check_own(str(tmp_path), "tiny-2")


def test_what_tune_reserves(tmp_path: Path) -> None:
    data = {"train": "t", "eval": "e"}
    kind = trainable(harness.make_spec(tmp_path, data=data, workers={"min": 1, "max": 3, "cpus": 2, "gpus": 0}))
    group = kind.default_resource_request({"optim.lr": 0.1})
    # None for the driver.
    assert group.head_bundle_is_empty
    assert group.bundles == [{"CPU": 2.0}] * 3
    assert kind.default_resource_request({"workers.max": 1}).bundles == [{"CPU": 2.0}]


class Nested(NestedRun):
    """A run whose driver is told what to do."""

    def __init__(self) -> None:
        self.name, self._url, self._last = "tiny", "runs/tiny", {}
        self._progress: Progress | None = None
        self._news: queue.SimpleQueue[Any] = queue.SimpleQueue()


def test_reports_of_a_run() -> None:
    run = Nested()
    run.on_step(Progress(9, 20, 0.5, 100.0, 0.0, 2))
    run.on_eval(10, {"loss": 0.4}, True)
    expected = {"loss": 0.4, "step": 10, "is_best": True, "run": "runs/tiny"}
    assert run.next_report() == {**expected, "train_loss": 0.5, "samples_per_second": 100.0}
    run.on_eval(20, {"loss": 0.3}, False)
    run._news.put(_End({"status": "finished", "steps": 20, "eval": {"loss": 0.3}}))
    last = run.next_report()
    assert (last["loss"], last["done"], last["status"]) == (0.3, True, "finished")


def test_reports_of_a_run_that_ends_otherwise() -> None:
    run = Nested()
    # Ended by train.early_stop: its last report again, as the last.
    run.on_eval(5, {"loss": 0.4}, True)
    run._news.put(_End({"status": "finished", "steps": 5, "eval": {"loss": 0.4}}))
    assert "done" not in run.next_report()
    assert run.next_report()["done"]
    # It was over when the trial was started again.
    run = Nested()
    run._news.put(_End({"status": "finished", "steps": 20, "eval": {"loss": 0.1}}))
    assert run.next_report() == {"loss": 0.1, "step": 20, "run": "runs/tiny", "status": "finished", "done": True}
    run._news.put(_End(error=UserError("data.train: nothing there")))
    with pytest.raises(UserError, match="nothing there"):
        run.next_report()


# ---- checkpoints that ranks write ----


class HeldBytes:
    """The snapshots of a rank."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def slot_bytes(self, attempt: int, step: int, slot: int) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(parts=[["w", "param", [2], "param:0", 0, 2, 0]], whole=[], ties={}), self.data


def uploads_of(tmp: Path, num_ranks: int, told: list[str]) -> list[Uploads]:
    spec = spec_in(tmp)
    run = RunDir.of(spec)
    attempt = run.claim_attempt()
    keeper = Keeper(run.checkpoints, 2, run.is_replaced, told.append)
    found = []
    for rank in range(num_ranks):
        job = RankJob(spec, attempt, rank, num_ranks, 0, 0, Schedule.of(spec, 100), run.url, None, "", "")
        uploads = Uploads(job, run, keeper if rank == 0 else None, told.append)
        uploads._holdings = HeldBytes(b"%d" % rank * 8)  # type: ignore[assignment]
        found.append(uploads)
    return found


def wanted(rank: int, step: int) -> SaveWanted:
    return SaveWanted(rank, step, step * 16, 3, step, 0.0)


def test_a_checkpoint_is_whole_when_all_ranks_have_written(tmp_path: Path) -> None:
    told: list[str] = []
    zero, one = uploads_of(tmp_path, 2, told)
    store = RunDir.of(spec_in(tmp_path)).checkpoints
    unpinned: list[int] = []
    zero.save(wanted(0, 5), {"zero": 1, "best": None}, unpinned.append)
    harness.wait_for(lambda: unpinned)
    # Rank 1 has not written yet.
    assert list_checkpoints(store) == []
    one.save(wanted(1, 5), {}, unpinned.append)
    one.close()
    zero.close()
    assert unpinned == [3, 3]
    (found,) = list_checkpoints(store)
    manifest = found.manifest
    assert (manifest["step"], manifest["num_ranks"], manifest["position"], manifest["optimizer_step"]) == (5, 2, 80, 5)
    assert [file["name"] for file in manifest["files"]] == [rank_file(0), rank_file(1)]
    assert verify(store, found) == []
    assert not [name for name in store.list() if "note" in name]
    assert told == []


def test_a_rank_that_has_no_part_spoils_that_checkpoint_only(tmp_path: Path) -> None:
    told: list[str] = []
    zero, one = uploads_of(tmp_path, 2, told)
    zero.save(wanted(0, 5), {}, lambda _: None)
    one.failed(SaveFailed(1, 5, "all memory for snapshots is in use", 0.0), {})
    for rank, uploads in enumerate((zero, one)):
        uploads.save(wanted(rank, 10), {"zero": 1, "best": None}, lambda _: None)
    one.close()
    zero.close()
    assert told == ["step 5: the checkpoint could not be saved (rank 1: all memory for snapshots is in use)"]
    assert [c.step for c in list_checkpoints(RunDir.of(spec_in(tmp_path)).checkpoints)] == [10]


def test_a_run_that_was_taken_over_commits_nothing(tmp_path: Path) -> None:
    told: list[str] = []
    (uploads,) = uploads_of(tmp_path, 1, told)
    other = RunDir.of(spec_in(tmp_path))
    other.claim_attempt()
    uploads.save(wanted(0, 5), {"best": None}, lambda _: None)
    uploads.close()
    assert list_checkpoints(other.checkpoints) == []
    assert "another start of this run has taken it over" in told[0]


def test_each_rank_has_a_part_of_the_rows_trained() -> None:
    parts = [
        {"0:0": [3, f"{5:016x}", f"{7:016x}", 1]},
        {"0:0": [2, f"{1:016x}", f"{1:016x}", 0], "0:1": [1, f"{9:016x}", f"{9:016x}", 2]},
    ]
    whole = _joined(parts)  # type: ignore[arg-type]
    assert whole.to_dict() == {
        "0:0": [5, f"{6:016x}", f"{8:016x}", 1],
        "0:1": [1, f"{9:016x}", f"{9:016x}", 2],
    }
    assert whole.replaced.total() == 3
    assert json.dumps(whole.to_dict())
    assert threading.active_count() < 100
