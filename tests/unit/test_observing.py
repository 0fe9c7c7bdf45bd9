"""The hub, the journals, and where the compiled op lies."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import harness
import pytest

from dltrain.data.asking import REASONS
from dltrain.errors import UserError
from dltrain.observing.catalogue import CACHE_OUTCOMES, REQUEST_OUTCOMES, RETRY_REASONS, TABLE, Metrics, page
from dltrain.observing.hub import COUNTED, Hub
from dltrain.observing.journal import Journal, read_journal, read_json, write_json
from dltrain.observing.ledger import STATES, Ledger
from dltrain.observing.reports import EvalReport, StepReport
from dltrain.store import open_store
from dltrain.training import cpu_op
from dltrain.training.meter import peak_flops

LABELS = {"zero_stage": "1", "precision": "fp32"}


def step(rank: int, number: int = 1, finite: bool = True) -> StepReport:
    phases = {"forward": 0.25, "backward": 0.5}
    return StepReport(
        rank, number, 8 * number, 8, 8, 1.5, 2.5, 0.1, finite, finite, {(0, 0): (4, 1, 1)}, 0.75, phases, ready=2
    )


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub("r", "127.0.0.1", 0, move=False, labels=LABELS)
    yield made
    made.close()


def scrape(hub: Hub) -> dict[str, float]:
    text = urllib.request.urlopen(hub.url, timeout=30).read().decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    # All are of this run.
    assert all('run="r"' in name for name, _ in lines)
    return {re.sub(r',run="r"|run="r",|{run="r"}', "", name): float(value) for name, value in lines}


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
    hub.restore({"data_bytes": 100, "data_retries_server": 2, "data_renewed": 1}, checkpoint_time=1e9)
    assert scrape(hub)["dltrain_checkpoint_last_success_timestamp_seconds"] == 1e9
    for name, number in {
        "bytes": 12,
        "seconds": 0.5,
        "hedges": 1,
        "hedges_won": 1,
        "requests_ok": 3,
        "cache_hit": 2,
    }.items():
        hub.count(f"data_{name}", number)
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
    assert found['dltrain_step_phase_seconds_total{phase="backward",rank="0"}'] == 1.0
    assert found['dltrain_step_phase_seconds_total{phase="backward",rank="1"}'] == 0.5
    assert found["dltrain_step_seconds_sum"] == 1.5
    assert found['dltrain_eval{metric="accuracy"}'] == 0.5


def test_the_page_is_what_the_catalogue_says() -> None:
    assert (harness.ROOT / "docs" / "metrics.md").read_text() == page()


def test_names_are_as_prometheus_wants_them() -> None:
    names = [metric.name for metric in TABLE]
    assert len(set(names)) == len(names)
    for metric in TABLE:
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.unit != "seconds" or "_seconds" in metric.name
        assert metric.unit != "bytes" or "_bytes" in metric.name
        # Never a step, an address or a message: series without end.
        assert not {"step", "node", "address", "ip", "pid", "error", "message"} & set(metric.labels)


def test_what_is_not_in_the_catalogue_cannot_be_exported() -> None:
    with pytest.raises(KeyError):
        Metrics("r")["samples_per_fortnight"]
    assert {name for name, _ in COUNTED.values()} <= {metric.name for metric in TABLE if metric.kind == "counter"}
    for name, labels in COUNTED.values():
        (metric,) = (m for m in TABLE if m.name == name)
        assert all(label in (values or ()) for label, values in zip(labels, metric.labels.values(), strict=True))


def test_a_thousand_ranks_are_less_than_twelve_thousand_series(hub: Hub) -> None:
    hub.on_attempt(1024)
    assert len(scrape(hub)) < 12_000
    # Ranks that are gone: what they did stays, what they held last does not.
    hub.on_attempt(2)
    found = scrape(hub)
    assert 'dltrain_rank_steps_total{rank="1023"}' in found
    assert 'dltrain_prefetch_queue_depth{rank="1023"}' not in found
    assert found["dltrain_world_size"] == 2


def test_a_rank_that_comes_back_is_measured_again(hub: Hub) -> None:
    hub.on_attempt(2)
    hub.on_step(step(1))
    hub.on_attempt(1)
    assert 'dltrain_prefetch_queue_depth{rank="1"}' not in scrape(hub)
    hub.on_attempt(2)
    assert scrape(hub)['dltrain_prefetch_queue_depth{rank="1"}'] == 0
    hub.on_step(step(1, 2))
    found = scrape(hub)
    assert found['dltrain_prefetch_queue_depth{rank="1"}'] == 2
    assert found['dltrain_rank_steps_total{rank="1"}'] == 2


def test_the_peak_of_a_device_that_nobody_knows_is_no_series(hub: Hub) -> None:
    hub.on_device("cpu", peak_flops("cpu"))
    assert not [name for name in scrape(hub) if name.startswith("dltrain_device_peak_flops")]
    hub.on_device("NVIDIA H100 80GB HBM3", peak_flops("NVIDIA H100 80GB HBM3"))
    assert scrape(hub)['dltrain_device_peak_flops{device="NVIDIA H100 80GB HBM3"}'] == 989e12


def test_the_time_counters_follow_the_ledger(hub: Hub) -> None:
    ledger = Ledger(0.0)
    for now in (2.0, 5.0):
        ledger.enter("starting", now)
        hub.on_ledger(ledger)
    found = scrape(hub)
    assert found['dltrain_time_seconds_total{state="planning"}'] == 2.0
    assert found['dltrain_time_seconds_total{state="starting"}'] == 3.0


def test_the_time_between_checkpoints(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for now, interval in ((1000.0, 0), (1600.0, 600), (1700.0, 100)):
        monkeypatch.setattr("dltrain.observing.hub.time.time", lambda now=now: now)
        hub.on_commit(10)
        found = scrape(hub)
        assert found["dltrain_checkpoint_last_success_timestamp_seconds"] == now
        assert found["dltrain_checkpoint_interval_seconds"] == interval


def test_a_busy_port(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"metrics\.port"):
        Hub("r", "127.0.0.1", hub.port, move=False, labels=LABELS)
    other = Hub("r", "127.0.0.1", hub.port, move=True, labels=LABELS)
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


class FullDisk:
    """A file that takes a few more bytes, and then none until there is room."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def write(self, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(28, "No space left on device")
        written = self._file.write(data[: min(self.room, 7)])
        self.room -= min(self.room, 7)
        return int(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", range(0, 60, 3))
def test_no_line_is_lost_on_a_disk_that_was_full(tmp_path: Path, room: int) -> None:
    store = open_store(str(tmp_path))
    journal, lines = Journal(store, "steps"), [{"step": i, "loss": 0.5} for i in range(4)]
    disk = FullDisk(journal._file, room)
    journal._file = disk  # type: ignore[assignment]
    for line in lines[:2]:
        journal.add(line)
    with contextlib.suppress(OSError):
        journal.flush()
    journal.add(lines[2])
    with contextlib.suppress(OSError):
        journal.flush()
    disk.room = 10_000
    journal.flush()
    journal.close()
    # Whoever reads it, a half line and one written twice are nowhere.
    assert list(map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines())) == lines[:3]


def test_what_another_driver_wrote_meanwhile_is_not_taken_away(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    late, new = Journal(store, "steps"), Journal(store, "steps")
    disk = FullDisk(late._file, 5)

    def write(data: memoryview) -> int:
        if disk.room:
            new.add({"step": 7})
            new.flush()
        return disk.write(data)

    late._file = SimpleNamespace(write=write, fileno=disk.fileno)  # type: ignore[assignment]
    late.add({"step": 3})
    with pytest.raises(OSError, match="No space"):
        late.flush()
    disk.close()
    new.close()
    assert list(read_journal(store, "steps")) == [{"step": 7}]


def test_a_line_that_a_crash_cut_short_spoils_none_of_the_next_start(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    journal = Journal(store, "steps")
    journal.add({"step": 2})
    journal.add({"step": 3})
    journal.close()
    assert [line["step"] for line in read_journal(store, "steps")] == [1, 2, 3]
