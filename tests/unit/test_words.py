"""`dltrain status` in words: where the time went, why a run was started again, how old its checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import harness
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dltrain import cli
from dltrain.observing.catalogue import RESTART_REASONS
from dltrain.observing.ledger import STATES
from dltrain.observing.words import CAUSES, WORDS, restarts_by_cause, time_sentence, time_shares, told
from dltrain.spec import parse_spec

LEDGER = {
    "seconds": {"compute": 820.0, "data_wait": 90.0, "planning": 10.0, "placing": 20.0, "starting": 30.0, "eval": 30.0},
    "counters": {"restarts_signal": 2, "restarts_hang": 1, "steps": 7},
}
STATE = {"run": "tiny", "state": "running", "step": 12, "checkpoint_step": 1200, "checkpoint_time": 965.0}


def test_every_state_and_cause_has_words() -> None:
    assert set(WORDS) == set(STATES)
    assert set(CAUSES) == set(RESTART_REASONS)


def test_where_the_time_went() -> None:
    expected = "of 16 min 40 s: 82 % training, 9 % waiting for data, 6 % starting, 3 % evaluating"
    assert time_sentence(LEDGER["seconds"]) == expected


def test_a_share_under_one_percent_is_not_told() -> None:
    assert time_sentence({"compute": 1000.0, "other": 1.0}) == "of 16 min 41 s: 100 % training"


def test_nothing_has_happened_yet() -> None:
    assert time_sentence(dict.fromkeys(STATES, 0.0)) == ""
    assert time_shares({}) == []
    assert told(STATE, None, 0.0) == []


def test_a_ledger_of_another_version() -> None:
    assert time_sentence({"compute": 1.0, "dreaming": 1.0}) == "of 2 s: 50 % training, 50 % other things"


@given(st.dictionaries(st.sampled_from(STATES), st.floats(0, 1e9), min_size=1))
def test_percents_add_up_and_are_near(seconds: dict[str, float]) -> None:
    shares, total = time_shares(seconds), sum(seconds.values())
    if total > 0:
        assert sum(share.percent for share in shares) == 100
        assert sum(share.seconds for share in shares) == pytest.approx(total)
        assert all(abs(share.percent - 100 * share.seconds / total) < 1 for share in shares)
        assert [share.seconds for share in shares] == sorted((s.seconds for s in shares), reverse=True)


def test_restarts_and_the_checkpoint() -> None:
    assert restarts_by_cause(LEDGER["counters"]) == {"signal": 2, "hang": 1}
    sentences = told(STATE, LEDGER, now=1000.0)
    assert sentences[1:] == [
        "3 restarts: a worker was killed (2 x), a worker hung (1 x)",
        "last checkpoint: step 1,200, 35 s ago",
    ]
    fresh = told({**STATE, "checkpoint_step": -1, "checkpoint_time": 0.0}, {"seconds": LEDGER["seconds"]}, 1000.0)
    assert fresh[1:] == ["no restarts", "no checkpoint yet"]
    # Of a run that an older version began, the time is not known.
    assert told({**STATE, "checkpoint_time": 0.0}, LEDGER, 1000.0)[2] == "last checkpoint: step 1,200"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run directory, as a driver leaves it."""
    from dltrain.observing.journal import write_json
    from dltrain.running.rundir import RunDir

    monkeypatch.setenv("DLTRAIN_RUNS", str(tmp_path / "runs"))
    spec = parse_spec(harness.make_spec(tmp_path))
    run = RunDir.of(spec)
    run.save_spec(spec)
    write_json(run.store, "state.json", {**STATE, "state": "finished", "heartbeat": 1.0})
    write_json(run.store, "ledger.json", LEDGER)
    return run


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_status_tells_it(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "status", "tiny")
    assert code == 0
    for part in ("82 % training", "3 restarts", "last checkpoint: step 1,200"):
        assert part in out
    found = json.loads(call(capsys, "status", "tiny", "--json")[1])
    assert (found["state"], found["restarts_by_cause"]) == ("finished", {"signal": 2, "hang": 1})
    assert found["time"][0] == {"what": "training", "seconds": 820.0, "percent": 82}
    assert found["checkpoint_age_seconds"] > 0


def test_status_before_the_first_beat(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("state.json", "ledger.json"):
        run.store.delete(name)
    found = json.loads(call(capsys, "status", "tiny", "--json")[1])
    assert (found["state"], found["time"], found["told"]) == ("planning", [], [])
