"""A store that goes away while a checkpoint is being written: training goes on, and nothing that was saved is lost."""

from __future__ import annotations

import json
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import dltrain, make_spec, start, wait_for, write_data, write_spec
from wire import Wire

from dltrain.observing.journal import read_journal, read_json
from dltrain.store import Store, open_store

AWAY_SECONDS = 30.0


class Trial:
    """A run whose directory is in S3, at the other end of a wire; its data are on the disk."""

    def __init__(self, s3: Any, wire: Wire, tmp_path: Path, every: int) -> None:
        write_data(tmp_path / "train")
        self.url = s3.make_bucket(f"away-{uuid.uuid4().hex[:8]}") + "/runs"
        settings = {"args": {"seconds": 0.05}, "train": {"steps": 100_000}, "checkpoint": {"every": every}}
        spec = make_spec(tmp_path, runs=self.url, **settings)
        self.env = {"RAY_ADDRESS": "", **s3.env, "AWS_ENDPOINT_URL_S3": wire.endpoint}
        self.process = start("run", str(write_spec(tmp_path, spec)), "--json", env=self.env)

    @property
    def store(self) -> Store:
        """The run's directory, by the direct way."""
        return open_store(f"{self.url}/tiny")

    def saved(self) -> list[int]:
        """The steps of which there is a checkpoint."""
        names = [name.split("/") for name in self.store.list("checkpoints")]
        return sorted({int(parts[1][5:]) for parts in names if parts[-1] == "manifest.json"})

    def wait_for_checkpoint(self, after: int) -> int:
        """The first one after a step."""
        found: list[int] = wait_for(lambda: [step for step in self.saved() if step > after], self.process)
        return found[0]

    def stop(self) -> harness.Done:
        self.process.send_signal(signal.SIGTERM)
        return harness.finish(self.process)


@pytest.fixture
def make_trial(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    trials: list[Trial] = []
    with Wire(s3.endpoint) as wire:

        def make(every: int) -> tuple[Trial, Wire]:
            trials.append(Trial(s3, wire, tmp_path, every))
            return trials[0], wire

        yield make
        for trial in trials:
            if trial.process.poll() is None:
                trial.process.kill()
                trial.process.communicate()


@pytest.mark.parametrize("how", ["cut", "hold"])
def test_a_store_that_is_away_for_half_a_minute_during_a_save(make_trial: Any, how: str) -> None:
    trial, wire = make_trial(every=20)
    before = trial.wait_for_checkpoint(after=0)
    getattr(wire, how)()
    gone = time.time()
    time.sleep(AWAY_SECONDS)
    assert trial.process.poll() is None
    wire.mend()
    back = time.time()
    trial.wait_for_checkpoint(after=before + 100)
    done = trial.stop()
    assert done.code == 143, done.err
    assert done.json["restarts"] == 0
    lines = list(read_journal(trial.store, "steps"))
    assert sorted(line["step"] for line in lines) == list(range(1, done.json["steps"] + 1))
    # Steps were made all the while.
    meanwhile = [line for line in lines if gone < line["time"] < back]
    assert len(meanwhile) > AWAY_SECONDS
    ledger = read_json(trial.store, "ledger.json")
    assert ledger is not None
    assert ledger["counters"]["checkpoint_failures"] >= 1
    assert done.json["steps"] in trial.saved()
    for verb in (("audit",), ("checkpoint", "verify")):
        checked = dltrain(*verb, f"{trial.url}/tiny", env=trial.env)
        assert checked.code == 0, checked.out + checked.err


def test_stopping_while_every_save_is_refused_still_saves_the_last_step(make_trial: Any) -> None:
    """Each step would be saved, and the one before is still on its way: the last one is not left out."""
    trial, wire = make_trial(every=1)
    trial.wait_for_checkpoint(after=0)
    wire.hold()
    time.sleep(3)
    trial.process.send_signal(signal.SIGTERM)
    time.sleep(2)
    wire.mend()
    done = harness.finish(trial.process)
    assert done.code == 143, done.err
    assert trial.saved()[-1] == done.json["steps"]
    assert json.loads(done.out)["status"] == "stopped"
