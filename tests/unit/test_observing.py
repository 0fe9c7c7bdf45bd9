"""The hub, the journals, and where the compiled op lies."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from dltrain.data.asking import REASONS
from dltrain.errors import UserError
from dltrain.observing.catalogue import CACHE_OUTCOMES, REQUEST_OUTCOMES, RETRY_REASONS
from dltrain.observing.hub import Hub
from dltrain.observing.journal import Journal, read_journal, read_json, write_json
from dltrain.observing.ledger import STATES, Ledger
from dltrain.observing.reports import EvalReport, StepReport
from dltrain.store import open_store
from dltrain.training import cpu_op

LABELS = {"run": "r", "zero_stage": "1", "precision": "fp32"}


def step(rank: int, number: int = 1, finite: bool = True) -> StepReport:
    phases = {"forward": 0.25, "backward": 0.5}
    return StepReport(
        rank, number, 8 * number, 8, 8, 1.5, 2.5, 0.1, finite, finite, {(0, 0): (4, 1, 1)}, 0.75, phases, ready=2
    )


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub("127.0.0.1", 0, move=False, labels=LABELS)
    yield made
    made.close()


def scrape(hub: Hub) -> dict[str, float]:
    text = urllib.request.urlopen(hub.url, timeout=30).read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_every_series_exists_before_anything_happens(hub: Hub) -> None:
    hub.metrics.start_ranks(2)
    found = scrape(hub)
    for state in STATES:
        assert found[f'dltrain_time_seconds_total{{state="{state}"}}'] == 0
    for name in ('restarts_total{reason="signal"}', "steps_total", 'rank_steps_total{rank="1"}'):
        assert found[f"dltrain_{name}"] == 0
    assert found["dltrain_world_size"] == 2
    assert not [name for name in found if "_created" in name]


def test_what_readers_count_is_summed_and_goes_on_after_a_restart(hub: Hub) -> None:
    before = scrape(hub)
    for outcome in REQUEST_OUTCOMES:
        assert before[f'dltrain_s3_requests_total{{op="get",outcome="{outcome}"}}'] == 0
    for reason in RETRY_REASONS:
        assert before[f'dltrain_data_retries_total{{reason="{reason}"}}'] == 0
    for outcome in CACHE_OUTCOMES:
        assert before[f'dltrain_data_cache_requests_total{{outcome="{outcome}"}}'] == 0
    hub.restore({"data_bytes": 100, "data_retries_server": 2, "data_renewed": 1})
    hub.on_data({"bytes": 11, "seconds": 0.5, "hedges": 1, "hedges_won": 1})
    hub.on_data({"bytes": 1, "requests_ok": 3, "cache_hit": 2})
    found = scrape(hub)
    assert found["dltrain_s3_read_bytes_total"] == 112
    assert found["dltrain_s3_read_seconds_total"] == 0.5
    assert found["dltrain_data_hedges_total"] == 1
    assert found['dltrain_data_retries_total{reason="server"}'] == 2
    assert found['dltrain_s3_requests_total{op="get",outcome="ok"}'] == 3
    assert found['dltrain_data_cache_requests_total{outcome="hit"}'] == 2


def test_every_reason_that_the_fetcher_knows_has_a_series() -> None:
    assert RETRY_REASONS == REASONS


def test_steps_are_counted_once_and_phases_by_rank(hub: Hub) -> None:
    for rank in (0, 1):
        hub.on_step(step(rank))
    hub.on_step(step(0, 2, finite=False))
    hub.on_eval(EvalReport(0, 2, {"accuracy": 0.5}, True, 0.1))
    found = scrape(hub)
    assert (found["dltrain_steps_total"], found["dltrain_samples_total"]) == (2, 16)
    assert found['dltrain_step_phase_seconds_total{phase="backward",rank="0"}'] == 1.0
    assert found['dltrain_step_phase_seconds_total{phase="backward",rank="1"}'] == 0.5
    assert (found["dltrain_nonfinite_steps_total"], found["dltrain_skipped_steps_total"]) == (1, 1)
    assert found["dltrain_step_seconds_sum"] == 1.5
    assert found['dltrain_eval{metric="accuracy"}'] == 0.5


def test_the_time_counters_follow_the_ledger(hub: Hub) -> None:
    ledger = Ledger(0.0)
    for now in (2.0, 5.0):
        ledger.enter("starting", now)
        hub.on_ledger(ledger)
    found = scrape(hub)
    assert found['dltrain_time_seconds_total{state="planning"}'] == 2.0
    assert found['dltrain_time_seconds_total{state="starting"}'] == 3.0


def test_a_busy_port(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"metrics\.port"):
        Hub("127.0.0.1", hub.port, move=False, labels=LABELS)
    other = Hub("127.0.0.1", hub.port, move=True, labels=LABELS)
    assert other.moved
    assert other.port > hub.port
    other.close()


@pytest.mark.parametrize("url", ["{}", "memory://{}"])
def test_a_journal_grows_over_several_starts(tmp_path: Path, url: str) -> None:
    store = open_store(url.format(tmp_path))
    for start in range(2):
        journal = Journal(store, "steps")
        for i in range(3):
            journal.add({"start": start, "i": i})
            journal.flush()
        journal.add({"start": start, "i": 3})
        journal.close()
    assert [(line["start"], line["i"]) for line in read_journal(store, "steps")] == [
        (s, i) for s in range(2) for i in range(4)
    ]


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2')
    assert list(read_journal(open_store(tmp_path), "steps")) == [{"step": 1}]


def test_small_files(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert read_json(store, "state.json") is None
    write_json(store, "state.json", {"a": 1})
    assert read_json(store, "state.json") == {"a": 1}


def test_the_op_lies_beside_its_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cpu_op.place().is_relative_to(sys.prefix)
    assert version("torch") in cpu_op.place().name
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert cpu_op.place().parent == tmp_path / "dltrain-ops"
    assert not cpu_op.is_built()
