"""The live view: what it works out, and that it fits a terminal of 80 columns."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from prometheus_client import generate_latest
from rich.console import Console

from dltrain import cli
from dltrain.observing.catalogue import Metrics
from dltrain.observing.hub import Hub
from dltrain.observing.live import Live, metrics_address, parse_ranks, tail_journal
from dltrain.observing.reports import PHASES, StepReport
from dltrain.observing.top import _LETTERS, RankTimes, facts, frame
from dltrain.observing.view import Progress
from dltrain.store import open_store

NOW = 1_000_000.0
WORKERS = [{"rank": rank, "pid": 1, "node": f"10.77.0.{rank + 2}", "state": "running"} for rank in range(3)]
STATE: dict[str, Any] = {
    "run": "image-cnn",
    "state": "running",
    "step": 1000,
    "total_steps": 4000,
    "world_size": 3,
    "restarts": 2,
    "samples_per_second": 1.0,
    "checkpoint_step": 900,
    "checkpoint_time": NOW - 35,
    "heartbeat": NOW - 1,
    "workers": WORKERS,
}
LEDGER = {
    "seconds": {"compute": 820.0, "data_wait": 90.0, "starting": 60.0, "recovering": 30.0},
    "goodput": 0.82,
    "counters": {"restarts_signal": 1, "restarts_hang": 1},
}
# A step takes half a second by the wall clock.
STEPS = [
    {"step": 990 + i, "time": NOW - 5 + i / 2, "loss": 2.0 - i / 10, "samples": 64, "phases": {"forward": 0.1}}
    for i in range(11)
]


def times(forward: float, steps: float = 10.0) -> RankTimes:
    """Of a rank whose step has these seconds of forward, and a tenth of a second of everything else."""
    return RankTimes(steps, {name: steps * (forward if name == "forward" else 0.1) for name in PHASES})


THREE = {0: times(0.2), 1: times(0.2), 2: times(0.4)}


def drawn(picture: Any, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(picture)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.splitlines()


def test_speed_time_left_and_checkpoint() -> None:
    found = facts(STATE, LEDGER, THREE, STEPS, NOW)
    assert found["eta_seconds"] == pytest.approx(3000 * 0.5)
    assert found["samples_per_second"] == pytest.approx(128)
    assert (found["loss"], found["loss_recent"]) == (pytest.approx(1.0), pytest.approx(1.5))
    assert found["checkpoint_age_seconds"] == 35
    assert found["restarts_by_cause"] == {"signal": 1, "hang": 1}
    assert found["time"][0] == {"what": "training", "seconds": 820.0, "percent": 82}
    assert (found["world_size"], found["nodes"]) == (3, 3)
    assert json.loads(json.dumps(found)) == found


def test_no_time_left_is_told_of_a_run_that_stands_still() -> None:
    for state in ("recovering", "finished", "lost"):
        assert facts({**STATE, "state": state}, LEDGER, {}, STEPS, NOW)["eta_seconds"] is None
    assert facts(STATE, LEDGER, {}, STEPS[:1], NOW)["samples_per_second"] == 1.0


def test_stragglers_by_own_work() -> None:
    ranks = facts(STATE, LEDGER, THREE, STEPS, NOW)["ranks"]
    # data wait 0.1 and forward 0.2 or 0.4: the others wait for the slow one in the backward pass.
    assert [rank["own_over_median"] for rank in ranks] == [1.0, 1.0, pytest.approx(0.5 / 0.3, abs=1e-3)]
    assert [rank["straggler"] for rank in ranks] == [False, False, True]
    assert ranks[0]["step_seconds"] == pytest.approx(0.7)
    assert ranks[2]["node"] == "10.77.0.4"
    # A long backward pass alone makes none.
    waiting = RankTimes(10, {**times(0.2).phases, "backward": 50.0})
    assert not any(r["straggler"] for r in facts(STATE, LEDGER, {0: times(0.2), 1: waiting}, STEPS, NOW)["ranks"])
    # Of two the slower one is found as well.
    pair = facts(STATE, LEDGER, {0: times(0.2), 1: times(0.4)}, STEPS, NOW)["ranks"]
    assert [rank["straggler"] for rank in pair] == [False, True]


def test_a_rank_without_a_step_yet() -> None:
    ranks = facts(STATE, LEDGER, {0: times(0.2), 1: RankTimes(0, dict.fromkeys(PHASES, 0.0))}, STEPS, NOW)["ranks"]
    assert [rank["rank"] for rank in ranks] == [0]
    idle = {0: RankTimes(5, dict.fromkeys(PHASES, 0.0))}
    assert facts(STATE, LEDGER, idle, STEPS, NOW)["ranks"][0]["straggler"] is False
    drawn(frame(STATE, LEDGER, idle, 80, now=NOW))


def test_without_metrics_rank_0_from_the_journal() -> None:
    found = facts(STATE, LEDGER, {}, STEPS, NOW)
    assert (found["ranks_from"], len(found["ranks"])) == ("steps", 1)
    assert found["ranks"][0]["phases"]["forward"] == pytest.approx(0.1)
    text = "\n".join(drawn(frame(STATE, LEDGER, {}, 80, steps=STEPS, now=NOW)))
    assert "can't be reached from here" in text
    text = "\n".join(drawn(frame({**STATE, "state": "finished"}, LEDGER, {}, 80, steps=STEPS, now=NOW)))
    assert "the run is over: rank 0 alone" in text


def test_80_columns() -> None:
    lines = drawn(frame(STATE, LEDGER, THREE, 80, steps=STEPS, now=NOW))
    assert max(map(len, lines)) <= 80
    # A sentence may be broken into lines.
    text = " ".join(" ".join(lines).split())
    for part in (
        "image-cnn running",
        "3 workers on 3 nodes",
        "step 1,000/4,000",
        "25 %",
        "25 min 0 s left",
        "loss 1.0000 (recent mean 1.5000)",
        "128 samples/s",
        "82 % training, 9 % waiting for data, 6 % starting, 3 % recovering",
        "2 restarts: a worker was killed (1 x), a worker hung (1 x)",
        "last checkpoint: step 900, 35 s ago",
        "1.67 x",
        "rank 2",
    ):
        assert part in text, part


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_bars_are_as_long_as_the_step_and_never_too_long(width: int) -> None:
    lines = drawn(frame(STATE, LEDGER, THREE, width, steps=STEPS, now=NOW), width)
    assert max(map(len, lines)) <= width
    bars = [re.search(r"d+h+f+b+o+\.+", line) for line in lines]
    lengths = [len(bar[0]) for bar in bars if bar]
    # The slowest takes all the room, the others 0.7 of 0.9 of it.
    assert lengths[2] == width - 46
    assert lengths[0] == lengths[1] == pytest.approx(lengths[2] * 0.7 / 0.9, abs=1)
    # A letter for each phase, in the order of a step.
    assert tuple(_LETTERS) == PHASES


def test_a_thousand_ranks_show_the_slowest() -> None:
    many = {rank: times(0.2 + 0.3 * (rank in (7, 500))) for rank in range(1024)}
    lines = drawn(frame({**STATE, "world_size": 1024, "workers": []}, LEDGER, many, 80, steps=STEPS, now=NOW))
    assert len(lines) < 24
    text = "\n".join(lines)
    assert "over the median: rank 7, 500" in text
    assert "1016 ranks with less work of their own are not shown" in text


@pytest.mark.parametrize("state", ["planning", "lost", "failed", "waiting"])
def test_a_run_of_which_little_is_known(state: str) -> None:
    bare = {"run": "a-name-that-is-as-long-as-a-name-of-a-run-may-be-which-is-63-char", "state": state}
    lines = drawn(frame({**bare, "error": "RunFailedError: [no] room"}, None, {}, 80, now=NOW))
    assert max(map(len, lines)) <= 80
    assert state in lines[0]
    assert "[no] room" in "\n".join(lines)


# ---- where it comes from ----


def report(rank: int, step: int) -> StepReport:
    phases = {"forward": 0.25, "backward": 0.5}
    return StepReport(rank, step, 8, 8, 8, 1.5, 2.5, 0.1, True, True, {}, 0.75, phases)


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub("tiny", "127.0.0.1", 0, move=False, labels={"zero_stage": "1", "precision": "fp32"})
    made.on_attempt(2)
    yield made
    made.close()


def test_ranks_are_read_from_the_page_that_prometheus_gets(hub: Hub) -> None:
    for rank in (0, 1):
        hub.on_step(report(rank, 1))
    hub.on_step(report(1, 2))
    text = generate_latest(hub.metrics.registry).decode()
    found = parse_ranks(text, "tiny")
    assert found[1] == RankTimes(2, {**dict.fromkeys(PHASES, 0.0), "forward": 0.5, "backward": 1.0})
    assert found[0].steps == 1
    # Somebody else's run on a port that was ours.
    assert parse_ranks(text, "other") == {}
    assert parse_ranks(generate_latest(Metrics("tiny").registry).decode(), "tiny") == {}


def test_what_was_added_since_the_last_look() -> None:
    before, now = times(0.2, 10), times(0.2, 30)
    assert now.since(before).steps == 20
    assert now.since(before).phases["forward"] == pytest.approx(20 * 0.2)
    # A new attempt's counters go on; those of a new driver may not.
    assert now.since(None) == now
    assert before.since(now) == before


@pytest.mark.parametrize(
    ("url", "driver", "here", "address"),
    [
        ("http://127.0.0.1:9464/metrics", "box:12", "box", "http://127.0.0.1:9464/metrics"),
        ("http://127.0.0.1:9464/metrics", "box:12", "laptop", ""),
        ("http://0.0.0.0:9464/metrics", "box:12", "box", "http://127.0.0.1:9464/metrics"),
        ("http://0.0.0.0:9464/metrics", "box:12", "laptop", "http://box:9464/metrics"),
        ("http://10.0.0.5:9464/metrics", "box:12", "laptop", "http://10.0.0.5:9464/metrics"),
        ("", "box:12", "box", ""),
    ],
)
def test_where_the_metrics_are(url: str, driver: str, here: str, address: str) -> None:
    assert metrics_address({"metrics_url": url, "driver": driver}, here) == address


@pytest.mark.parametrize("url", ["{}", "memory://{}"])
def test_the_newest_lines_of_a_journal(tmp_path: Path, url: str) -> None:
    from dltrain.observing.journal import Journal

    store = open_store(url.format(tmp_path))
    assert tail_journal(store, "steps", 5) == []
    journal = Journal(store, "steps")
    for step in range(2000):
        journal.add({"step": step, "padding": "x" * 60})
        if step % 100 == 0:
            journal.flush()
    journal.close()
    assert [line["step"] for line in tail_journal(store, "steps", 5)] == [1995, 1996, 1997, 1998, 1999]
    # More than a piece of the file, and than a part in a store, holds.
    assert [line["step"] for line in tail_journal(store, "steps", 500)] == list(range(1500, 2000))


def test_a_line_on_its_way_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert tail_journal(open_store(tmp_path), "steps", 2) == [{"step": 1}, {"step": 2}]


def test_a_look_at_a_run(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    store = open_store(tmp_path)
    state = {**STATE, "run": "tiny", "metrics_url": hub.url, "driver": f"{socket.gethostname()}:{os.getpid()}"}
    live = Live(store, lambda: state)
    hub.on_step(report(0, 1))
    assert [rank["rank"] for rank in live.facts()["ranks"]] == [0]
    hub.on_step(report(1, 1))
    monkeypatch.setattr("dltrain.observing.live._WINDOW_SECONDS", 0.0)
    assert [rank["rank"] for rank in live.facts()["ranks"]] == [0, 1]
    hub.close()
    monkeypatch.setattr(hub, "close", lambda: None)
    assert live.facts()["ranks"] == []


def test_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DLTRAIN_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "80")
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    harness.write_spec(tmp_path, harness.make_spec(tmp_path)).rename(run / "spec.yaml")
    (run / "state.json").write_text(json.dumps({**STATE, "run": "tiny", "state": "finished"}))
    (run / "ledger.json").write_text(json.dumps(LEDGER))
    (run / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in STEPS))
    for options in (["--once"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main(["top", "tiny", *options])
        assert not caught.value.code
        out = capsys.readouterr().out
        assert "tiny  finished" in out
        assert max(map(len, out.splitlines())) <= 80
    with pytest.raises(SystemExit):
        cli.main(["top", "tiny", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["step"], found["loss"]) == ("tiny", 1000, pytest.approx(1.0))


def test_a_key_that_is_pressed_before_the_picture_is_there(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    run.mkdir()
    harness.write_spec(tmp_path, harness.make_spec(tmp_path)).rename(run / "spec.yaml")
    (run / "state.json").write_text(json.dumps({**STATE, "run": "tiny"}))
    ours, theirs = pty.openpty()
    # A terminal that somebody has typed into already.
    os.write(ours, b"q")
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen([harness.DLTRAIN, "top", str(run)], env=env, **ends) as process:
        os.close(theirs)
        shown = b""
        deadline = time.monotonic() + harness.SECONDS
        # At its end the terminal is gone.
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                if select.select([ours], [], [], 1.0)[0]:
                    shown += os.read(ours, 65536)
        os.close(ours)
        if time.monotonic() >= deadline:
            process.kill()
    assert process.returncode == 0
    assert b"tiny" in shown


# ---- progress in a log ----


@pytest.mark.parametrize("loss", [0.1234, float("inf"), 123456.5])
def test_a_line_of_progress_is_read_back(loss: float) -> None:
    progress = Progress(12345, 1_000_000, loss, 1_234_567.0, 0.03, 16)
    assert Progress.parse(progress.line + "\n") == progress
    assert Progress.parse(Progress(1, 2, 0.5, 9.0, 0.0, 1).line) == Progress(1, 2, 0.5, 9.0, 0.0, 1)


@pytest.mark.parametrize("line", ["", "step 3", "epoch 3: step 12/20  loss 0.1", "step 1/2  loss x  3 samples/s"])
def test_other_lines_are_no_progress(line: str) -> None:
    assert Progress.parse(line) is None


def test_a_log_has_one_line_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from dltrain.observing.view import TerminalView

    out = io.StringIO()
    progress = Progress(1_000_000, 1_000_000, 1234.5678, 1_234_567.0, 0.03, 1024)
    TerminalView(Console(file=out, width=60)).on_step(progress)
    assert Progress.parse(out.getvalue()) == progress
