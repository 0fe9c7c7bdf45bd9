"""The workers' logs: JSON lines on a disk and in object storage, turned over, read, followed."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import harness
import pytest

from dltrain import cli
from dltrain.errors import StoreError, UserError
from dltrain.observing.logs import RankLine, RankLogs, follow_logs, read_logs
from dltrain.observing.reports import LogLine
from dltrain.running.rundir import RunDir
from dltrain.spec import parse_spec
from dltrain.store import Store, open_store


def line(rank: int, text: str, error: bool = False) -> LogLine:
    return LogLine(rank, text, error, attempt=2, time=1000.5)


@pytest.fixture(params=["disk", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path if request.param == "disk" else f"memory://logs-{uuid.uuid4().hex}")


def texts(store: Store, rank: int | None = None) -> list[str]:
    return [f"{found.rank} {found.text}" for found in read_logs(store, rank)]


def test_what_is_written_is_read(store: Store) -> None:
    logs = RankLogs(store)
    logs.add(line(0, "hello"))
    logs.add(line(11, 'quoted "ä"\u2028', error=True))
    logs.flush()
    logs.add(line(0, "world"))
    logs.close()
    assert texts(store, 0) == ["0 hello", "0 world"]
    assert read_logs(store, 11) == [RankLine(11, 'quoted "ä"\u2028', 1000.5, 2, "stderr")]
    with pytest.raises(UserError, match=r"rank 3 has printed nothing; ranks with a log: \[0, 11\]"):
        read_logs(store, 3)


def test_another_start_of_the_run_goes_on(store: Store) -> None:
    for text in ("one", "two"):
        logs = RankLogs(store)
        logs.add(line(0, text))
        logs.close()
    assert texts(store) == ["0 one", "0 two"]


def test_a_line_that_a_crash_cut_short_takes_no_other_with_it(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00000.jsonl").write_text(_whole("one") + "\n" + _whole("two")[:20])
    logs = RankLogs(open_store(tmp_path))
    logs.add(line(0, "three"))
    logs.close()
    assert [found.text for found in read_logs(open_store(tmp_path))] == ["one", "three"]


def test_a_files_size_is_bounded(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    logs = RankLogs(store, file_bytes=1000)
    for i in range(200):
        logs.add(line(0, f"line {i}"))
    logs.close()
    files = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert files == ["rank-00000.1.jsonl", "rank-00000.jsonl"]
    assert all(path.stat().st_size < 1200 for path in (tmp_path / "logs").iterdir())
    # The newest are there, in order, without a hole.
    numbers = [int(text.split()[-1]) for text in texts(store)]
    assert numbers == list(range(numbers[0], 200))
    assert len(numbers) >= 10


def test_parts_are_bounded_too() -> None:
    store = open_store(f"memory://logs-{uuid.uuid4().hex}")
    logs = RankLogs(store, store_bytes=1000)
    for i in range(50):
        logs.add(line(i % 3, f"line {i}"))
        logs.flush()
    assert sum(store.size(name) for name in store.list("logs")) <= 1000
    assert texts(store)[-1] == "1 line 49"
    # A new driver counts what it finds.
    again = RankLogs(store, store_bytes=1000)
    again.add(line(0, "later"))
    again.flush()
    assert sum(store.size(name) for name in store.list("logs")) <= 1000
    assert texts(store)[-1] == "0 later"


def test_lines_wait_for_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"memory://logs-{uuid.uuid4().hex}")
    logs, write = RankLogs(store), Store.write
    logs.add(line(0, "one"))

    def away(*_: Any) -> None:
        raise StoreError("gone fishing")

    monkeypatch.setattr(Store, "write", away)
    with pytest.raises(StoreError):
        logs.flush()
    monkeypatch.setattr(Store, "write", write)
    logs.add(line(0, "two"))
    logs.flush()
    assert texts(store) == ["0 one", "0 two"]


def test_following_ends_with_the_run(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    logs = RankLogs(store, file_bytes=300)
    logs.add(line(0, "one"))
    logs.flush()
    heard: list[str] = []
    turns = iter((False, False, True))

    def write_on(_: float) -> None:
        heard.append("-")
        if heard.count("-") == 1:
            # Enough to turn the file over once.
            for text in ("two", "three", "four"):
                logs.add(line(0, text))
            logs.add(line(1, "late"))
            logs.flush()
        else:
            with (tmp_path / "logs" / "rank-00001.jsonl").open("a") as file:
                file.write(_whole("no end"))

    def hear(found: RankLine) -> None:
        heard.append(f"{found.rank} {found.text}")

    follow_logs(store, None, lambda: next(turns), hear, write_on)
    logs.close()
    assert (tmp_path / "logs" / "rank-00000.1.jsonl").exists()
    assert heard == ["0 one", "-", "0 two", "0 three", "0 four", "1 late", "-", "1 no end"]


def _whole(text: str) -> str:
    return json.dumps({"time": 1.0, "rank": 1, "attempt": 1, "stream": "stdout", "text": text})


def test_following_parts() -> None:
    store = open_store(f"memory://logs-{uuid.uuid4().hex}")
    logs = RankLogs(store)
    heard: list[str] = []
    turns = iter((False, True))

    def write_on(_: float) -> None:
        logs.add(line(1, "new"))
        logs.flush()

    logs.add(line(0, "old"))
    logs.flush()
    follow_logs(store, None, lambda: next(turns), lambda found: heard.append(found.text), write_on)
    assert heard == ["old", "new"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DLTRAIN_RUNS", str(tmp_path / "runs"))
    spec = parse_spec(harness.make_spec(tmp_path))
    run = RunDir.of(spec)
    run.save_spec(spec)
    logs = RankLogs(run.store)
    for found in (line(0, "hello"), line(1, "world")):
        logs.add(found)
    logs.close()

    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            cli.main(["logs", "tiny", *arguments])
        return capsys.readouterr().out

    assert call() == "0 | hello\n1 | world\n"
    assert call("--rank", "1") == "world\n"
    last = json.loads(call("--json"))["lines"][-1]
    assert last == {"rank": 1, "text": "world", "time": 1000.5, "attempt": 2, "stream": "stdout"}
    # The run is over: following is reading.
    run.store.write("state.json", json.dumps({"run": "tiny", "state": "finished", "heartbeat": 1}).encode())
    assert call("-f", "--rank", "0") == "hello\n"
