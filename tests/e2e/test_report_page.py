"""The report in a real browser: in light and dark, on a phone, without its script, without a network."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
from chrome import INSTALL, Browser, missing
from PIL import Image

from dltrain.artifact import Artifact
from dltrain.observing.history import read_history
from dltrain.observing.samples import write_samples
from dltrain.observing.web_compare import compare_page
from dltrain.observing.web_report import report_page
from dltrain.running.rundir import RunDir
from dltrain.spec import parse_spec

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    why = missing()
    if why and os.environ.get("DLTRAIN_REQUIRE_SERVERS") == "1":
        pytest.fail(f"{why}; {INSTALL}")
    if why:
        pytest.skip(f"{why}; {INSTALL}")
    with Browser() as found:
        yield found


def step(i: int, attempt: int, now: float) -> dict[str, Any]:
    phases = {"data_wait": 0.002, "forward": 0.02, "backward": 0.04, "optimizer": 0.01, "other": 0.003}
    return {
        "step": i,
        "time": now + 0.1 * i,
        "attempt": attempt,
        "loss": 3.0 / i + 0.01 * (i % 7),
        "losses": {"judge": 1.0 / i, "maker": 2.0 / i},
        "samples": 16,
        "position": 16 * i,
        "grad_norm": 1.0 + (i % 5),
        "learning_rate": 0.01,
        "seconds": 0.075,
        "data_wait_seconds": 0.002,
        "phases": phases,
        "applied": True,
        "finite": True,
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of a run with a fault, long names and samples of each kind, and a comparison."""
    directory, now = tmp_path_factory.mktemp("run"), 1_795_528_000.0
    long = "a_name_that_goes_on_and_on_without_a_single_place_to_break_it_at_all"
    spec = parse_spec(harness.make_spec(directory, name=long[:60], args={"secret": "</script><script>boom()"}))
    run = RunDir.of(spec)
    run.save_spec(spec)
    lines = [step(i, 1, now) for i in range(1, 301)] + [step(i, 2, now + 60) for i in range(298, 601)]
    events: list[dict[str, Any]] = [
        {"event": "launch", "time": now - 8},
        {"event": "start", "time": now - 6, "attempt": 1, "num_ranks": 4, "step": 0, "from_memory": False},
        {"event": "Exited", "time": now + 31, "rank": 1, "code": -11, "tail": f"Fatal Python error: {long * 4}"},
        {"event": "start", "time": now + 32, "attempt": 2, "num_ranks": 2, "step": 297, "from_memory": True},
    ]
    for i in range(50, 601, 50):
        metrics = {"accuracy": 1 - 1 / i, long: 1.0 / i}
        events.append(
            {"event": "EvalReport", "time": now + i / 10, "rank": 0, "step": i, "metrics": metrics, "is_best": True}
        )
        events.append({"event": "checkpoint", "time": now + i / 10, "step": i})
    events.append({"event": "end", "time": now + 125, "status": "failed"})
    run.store.write("steps.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    run.store.write("events.jsonl", "".join(json.dumps(line) + "\n" for line in events).encode())
    ledger = {"seconds": {"compute": 90.0, "starting": 8.0, "redone": 3.0, "recovering": 9.0}, "wall_seconds": 110.0}
    run.store.write("ledger.json", json.dumps({**ledger, "goodput": 0.82}).encode())
    best = {"metric": "accuracy", "value": 0.99, "step": 600}
    error = f"RuntimeError: {long * 3}\nsecond line"
    state = {"run": spec.name, "state": "failed", "step": 600, "total_steps": 900, "heartbeat": now, "best": best}
    run.store.write("state.json", json.dumps({**state, "metrics": metrics, "error": error, "world_size": 2}).encode())
    rng = np.random.default_rng(0)
    shown = [
        Artifact.image(rng.random((60, 900, 3)), "a wide picture"),
        Artifact.image(rng.random((16, 16)), "a small one"),
        Artifact.animation(rng.random((4, 16, 16)), caption="one that moves"),
        Artifact.audio(np.sin(np.arange(4000)), 8000, "a tone"),
        Artifact.text(long * 5, "a long word"),
        Artifact.table([{"word": long, "times": i, "again": long} for i in range(5)], "a table"),
    ]
    write_samples(run.store, 600, shown, ["a film: 9 MiB"], metrics, 600)
    history = read_history(run.store, run.state())
    found = {"report": directory / "report.html", "compare": directory / "compare.html"}
    found["report"].write_text(report_page(history, now + 300))
    found["compare"].write_text(compare_page([history, history], now + 300))
    return found


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_any_screen_and_asks_for_nothing(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    page = browser.open(pages[name], width)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.querySelectorAll('svg[data-chart]').length") >= 6
    # Pictures are there, whole.
    assert page.run("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    foreign = [url for url in page.requests if not url.startswith(("data:", "file:"))]
    assert (foreign, page.problems) == ([], [])
    # Charts are wide enough to be read: the letters of their axes too.
    assert page.run("Math.min(...[...document.querySelectorAll('svg[data-chart]')].map((s) => s.clientWidth))") >= 280


def test_what_is_under_the_pointer_is_told(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.open(pages["report"])
    place = "document.querySelector('svg').getBoundingClientRect()"
    box = {side: page.run(f"{place}.{side}") for side in ("x", "y", "width")}
    for share in (0.3, 0.99):
        page.ask("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + share * box["width"] - 5, y=box["y"] + 60)
        tip = page.run("document.querySelector('.tip').innerText")
        words = tip.split()
        assert words[0] == "step"
        assert 0 < int(words[1].replace(",", "")) <= 600
        assert float(words[2]) > 0
        assert page.run("document.querySelector('.tip').getBoundingClientRect().right <= innerWidth")
    page.ask("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
    assert page.run("document.querySelector('.tip')") is None
    assert page.problems == []


def test_without_its_script_it_shows_as_much(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.open(pages["report"], script=False)
    page.ask("Emulation.setScriptExecutionDisabled", value=False)
    counts = [page.run(f"document.querySelectorAll({what!r}).length") for what in (".fault", "img", "path.line")]
    assert counts[:2] == [1, 3]
    assert counts[2] >= 8


def test_light_and_dark(browser: Browser, pages: dict[str, Path]) -> None:
    brightness = {}
    for dark in (False, True):
        picture = Image.open(io.BytesIO(browser.open(pages["report"], dark=dark).picture())).convert("L")
        assert picture.height > 2000
        pixels = np.asarray(picture)
        # Something is drawn on it.
        assert len(np.unique(pixels)) > 50
        brightness[dark] = float(np.median(pixels))
    assert brightness[False] > 200
    assert brightness[True] < 60


def test_the_fault_is_where_it_happened(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.open(pages["report"])
    place = "document.querySelector('.when').getBoundingClientRect()"
    left, right = (page.run(f"{place}.{side}") for side in ("left", "right"))
    at = page.run("document.querySelector('.fault').getBoundingClientRect().x")
    # 39 s after the launch, of 133 s.
    assert abs((at - left) / (right - left) - 39 / 133) < 0.02
    text = page.run("document.body.innerText")
    for words in ("a worker was killed", "rank 1 was ended by SIGSEGV", "left out: a film: 9 MiB", "4 workers"):
        assert words in text
