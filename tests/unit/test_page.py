"""Pages: whole in one file, escaped, bounded; whatever state a run is in."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest

from dltrain import cli
from dltrain.artifact import Artifact
from dltrain.observing.charts import Line, line_chart, short, stack_chart
from dltrain.observing.curves import Curve
from dltrain.observing.history import History, read_history
from dltrain.observing.page import document, only_table, table
from dltrain.observing.samples import bounded, read_samples, write_samples
from dltrain.observing.web_compare import compare_facts, compare_page
from dltrain.observing.web_report import report_facts, report_page
from dltrain.running.rundir import RunDir
from dltrain.spec import parse_spec
from dltrain.store import open_store

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
NOW = 1_795_528_400.0


class Tags(HTMLParser):
    """Tags with their attributes, and whether all that were opened are closed in order."""

    VOID = ("meta", "img", "br", "path", "circle")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag


def check(html: str) -> Tags:
    """A page that is whole: closed tags, its own script alone, nothing from the network."""
    found = Tags(html)
    assert found.open == []
    assert [tag for tag, _ in found.tags].count("script") == 1
    for _, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert not re.match(r"(https?:)?//", attributes.get(name) or "")
    assert "@import" not in html
    assert "url(" not in html
    return found


def write_run(directory: Path, steps: int = 40, **state: Any) -> History:
    """A run directory as a driver leaves it."""
    spec = parse_spec(harness.make_spec(directory, **state.pop("spec", {})))
    run = RunDir.of(spec)
    run.save_spec(spec)
    lines = [
        {
            "step": i,
            "time": NOW - 100 + i,
            "attempt": 1,
            "loss": 3.0 / i,
            "samples": 16,
            "position": 16 * i,
            "grad_norm": 1.0,
            "learning_rate": 0.01,
            "seconds": 0.5,
            "data_wait_seconds": 0.1,
            "phases": {"forward": 0.3, "backward": 0.2},
            "applied": i != 7,
            "finite": True,
        }
        for i in range(1, steps + 1)
    ]
    events = [
        {"event": "launch", "time": NOW - 105},
        {"event": "start", "time": NOW - 104, "attempt": 1, "num_ranks": 2, "step": 0, "from_memory": False},
        *(
            {
                "event": "EvalReport",
                "rank": 0,
                "time": NOW - 99 + i,
                "step": i,
                "metrics": {"mae": 1 / i},
                "is_best": True,
            }
            for i in range(10, steps + 1, 10)
        ),
    ]
    run.store.write("steps.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    run.store.write("events.jsonl", "".join(json.dumps(line) + "\n" for line in events).encode())
    ledger = {"seconds": {"compute": 20.0, "starting": 5.0}, "wall_seconds": 25.0, "goodput": 0.8}
    run.store.write("ledger.json", json.dumps(ledger).encode())
    whole = {"run": spec.name, "state": "finished", "step": steps, "total_steps": steps, "heartbeat": NOW, **state}
    run.store.write("state.json", json.dumps(whole).encode())
    return read_history(run.store, run.state())


# ---- charts ----


def test_a_chart_is_well_formed_and_holds_its_figures() -> None:
    x = np.arange(1.0, 11)
    svg = line_chart(EVIL, [Line(EVIL, Curve("a", x, x**2), "c1"), Line("b", Curve("b", x, x), "c2")], note=EVIL)
    found = Tags(svg)
    assert found.open == []
    assert "script" not in [tag for tag, _ in found.tags]
    data = json.loads(dict(found.tags)["svg"]["data-chart"] or "")
    assert data["lines"][0]["y"] == (x**2).tolist()
    assert data["lines"][0]["label"] == EVIL
    paths = [attributes for tag, attributes in found.tags if tag == "path" and attributes["class"] == "line c1"]
    assert len(re.findall(r"[ML]", paths[0]["d"] or "")) == 10


def test_axes_are_logarithmic_where_that_shows_more() -> None:
    x = np.arange(1.0, 5)
    steep, flat = Curve("a", x, 10.0**x), Curve("a", x, x)
    assert "logarithmic" in line_chart("a", [Line("a", steep, "c1")])
    assert "logarithmic" not in line_chart("a", [Line("a", steep, "c1")], even=True)
    assert "logarithmic" not in line_chart("a", [Line("a", flat, "c1")])
    assert "logarithmic" not in line_chart("a", [Line("a", Curve("a", x, 10.0**x - 10), "c1")])


def test_there_is_no_chart_of_nothing() -> None:
    empty, one = Curve("a", np.zeros(0), np.zeros(0)), Curve("a", np.ones(1), np.ones(1))
    assert (
        line_chart("a", [])
        == line_chart("a", [Line("a", empty, "c1")])
        == line_chart("a", [Line("a", one, "c1")])
        == ""
    )
    assert stack_chart("a", np.ones(1), np.ones((1, 1)), [("a", "c1")]) == ""
    level = Curve("a", np.arange(3.0), np.zeros(3))
    assert "NaN" not in line_chart("a", [Line("a", level, "c1")])
    assert "nan" not in line_chart("a", [Line("a", level, "c1")])


def test_ticks_are_told_apart() -> None:
    x = np.arange(3.0)
    near = Curve("a", x, 0.002 + x * 1e-6)
    labels = re.findall(r'text-anchor="end">([^<]+)', line_chart("a", [Line("a", near, "c1")]))[:-1]
    assert len(set(labels)) == len(labels) >= 3
    # The noise of rounding is no curve.
    level = Curve("a", x, 213.0 + x * 1e-13)
    labels = re.findall(r'text-anchor="end">([^<]+)', line_chart("a", [Line("a", level, "c1")]))[:-1]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (1234, "1,234"), (12345, "12.35k"), (2.5e6, "2.5M"), (0.0001, "1e-4"), (-3e-5, "-3e-5")],
)
def test_numbers_in_few_characters(value: float, text: str) -> None:
    assert short(value) == text


# ---- pages ----


def test_a_page_lets_only_its_own_script_run() -> None:
    page = document(EVIL, "<p>hello</p>")
    check(page)
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


def test_cells_are_escaped() -> None:
    assert "<script>" not in table((EVIL,), [(EVIL,)])


def test_of_a_tasks_table_only_the_table_is_kept() -> None:
    made = Artifact.table([{"word": EVIL, "times": 3}]).data.decode()
    assert "&lt;script&gt;" in only_table(made)
    foreign = '<table onclick="x()"><tr><td>a<td>b<script>alert(1)</script></tr><iframe src="//x"></iframe>c &amp; d'
    shown = only_table(foreign)
    assert "iframe" not in shown
    assert "alert" not in shown
    assert "onclick" not in shown
    assert "c &amp; d" in shown
    assert Tags(shown).open == []


def test_a_finished_run(tmp_path: Path) -> None:
    history = write_run(tmp_path, best={"metric": "mae", "value": 0.025, "step": 40}, metrics={"mae": 0.025})
    page = report_page(history, NOW)
    check(page)
    for text in ("Training loss", "Evaluation: mae", "Learning rate", "A step by phase", "Where the time went", "80%"):
        assert text in page
    assert "1 steps changed no weights" in page
    facts = report_facts(history)
    assert (facts["samples"], facts["samples_per_second"], facts["faults"]) == (640, 32.0, [])
    assert facts["time"][0] == {"what": "training", "seconds": 20.0, "percent": 80}


def test_what_a_user_named_cannot_break_out(tmp_path: Path) -> None:
    history = write_run(tmp_path, error=EVIL, metrics={EVIL: 1.0}, best={"metric": EVIL, "value": 1.0, "step": 40})
    history.spec["args"] = {EVIL: EVIL}
    history.story.evals[0] = type(history.story.evals[0])(10, NOW, {EVIL: 1.0}, True)
    history.story.evals[1] = type(history.story.evals[0])(20, NOW, {EVIL: 2.0}, True)
    write_samples(
        open_store(history.url), 40, [Artifact.text(EVIL, EVIL), Artifact("image/png", b"x", EVIL)], [EVIL], {}, 40
    )
    history.samples = read_samples(open_store(history.url), 40, history.best)
    check(report_page(history, NOW))
    check(compare_page([history, history], NOW))


@pytest.mark.parametrize("state", ["planning", "running", "failed", "lost", "stopped"])
def test_every_state_has_a_sensible_page(tmp_path: Path, state: str) -> None:
    history = write_run(tmp_path)
    history.state |= {"state": state, "silent_seconds": 95, "error": "no room left" if state == "failed" else ""}
    page = report_page(history, NOW)
    check(page)
    assert ("no room left" in page) == (state == "failed")
    assert ("no sign of life for 1 min 35 s" in page) == (state == "lost")


def test_a_run_without_a_step(tmp_path: Path) -> None:
    spec = parse_spec(harness.make_spec(tmp_path))
    run = RunDir.of(spec)
    run.save_spec(spec)
    history = read_history(run.store, run.state())
    page = report_page(history, NOW)
    check(page)
    assert "No step has been made yet" in page
    assert report_facts(history)["loss"] is None
    check(compare_page([history, write_run(tmp_path / "b")], NOW))


def test_a_long_run_makes_a_short_page(tmp_path: Path) -> None:
    short_page, long_page = (report_page(write_run(tmp_path / str(n), n), NOW) for n in (500, 20_000))
    check(long_page)
    assert len(long_page) < 1.5 * len(short_page)


def test_passwords_in_urls_are_not_shown(tmp_path: Path) -> None:
    history = write_run(tmp_path, spec={"data": {"train": "https://me:secret@host/x"}})
    page = report_page(history, NOW)
    assert "secret" not in page
    assert "https://***@host/x" in page


# ---- comparing ----


def test_what_differs_and_what_came_of_it(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", spec={"name": "one"}, metrics={"mae": 0.5})
    two = write_run(tmp_path / "b", 30, spec={"name": "two", "optim": {"lr": 0.5}}, metrics={"mae": 0.25})
    found = compare_facts([one, two])
    assert found["runs"] == ["one", "two"]
    assert found["differences"]["optim.lr"] == [0.01, 0.5]
    assert set(found["differences"]) == {"optim.lr", "data.train"}
    assert [f["step"] for f in found["figures"]] == [40, 30]
    page = compare_page([one, two], NOW)
    check(page)
    assert "one vs two" in page
    # Of another batch size, steps are no measure.
    three = write_run(tmp_path / "c", spec={"name": "three", "batch": {"global": 32}})
    assert "curves are over rows" in compare_page([one, three], NOW)
    assert "curves are over rows" not in page


def test_runs_of_one_name_are_told_apart_by_their_place(tmp_path: Path) -> None:
    found = compare_facts([write_run(tmp_path / "a"), write_run(tmp_path / "b")])
    assert len(set(found["runs"])) == 2


# ---- the commands ----


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    monkeypatch.setenv("DLTRAIN_RUNS", str(tmp_path / "runs"))
    code, out, _ = call(capsys, "report", "tiny", "--json")
    found = json.loads(out)
    assert (code, found["step"], found["report"]) == (0, 40, str(tmp_path / "runs" / "tiny" / "report.html"))
    assert found["bytes"] == Path(found["report"]).stat().st_size
    target = tmp_path / "there" / "both.html"
    code, out, _ = call(capsys, "compare", "tiny", str(tmp_path / "runs" / "tiny"), "--to", str(target))
    assert code == 0
    assert "their specs are the same" in out
    check(target.read_text())
    code, _, err = call(capsys, "compare", "tiny")
    assert (code, "two runs or more" in err) == (2, True)
    code, _, err = call(capsys, "report", "nobody")
    assert (code, "no run 'nobody'" in err) == (2, True)


def test_a_run_in_object_storage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    store = open_store("memory://far/tiny")
    for name in ("spec.yaml", "state.json", "ledger.json"):
        store.write(name, (tmp_path / "runs" / "tiny" / name).read_bytes())
    for name in ("steps", "events"):
        lines = (tmp_path / "runs" / "tiny" / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        for i in range(0, len(lines), 7):
            store.write(f"{name}/{i // 7 + 1:08d}-abc.jsonl", b"".join(lines[i : i + 7]))
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "report", "memory://far/tiny", "--json")
    found = json.loads(out)
    assert (code, found["step"], found["samples"], found["report"]) == (0, 40, 640, "tiny-report.html")
    check((tmp_path / "tiny-report.html").read_text())
    code, out, _ = call(capsys, "report", "memory://far/tiny", "--to", "memory://far/page.html", "--json")
    assert (code, open_store("memory://far").exists("page.html")) == (0, True)


# ---- samples ----


def test_samples_are_bounded_in_number_and_bytes() -> None:
    small = [Artifact.text("x", str(i)) for i in range(30)]
    kept, left_out = bounded(small)
    assert (len(kept), left_out) == (24, ["6 more: at most 24 are kept"])
    large = Artifact("image/png", bytes(3 * 2**20), "poster")
    assert bounded([large, small[0]]) == ([small[0]], ["poster: 3.0 MiB, at most 2.0 MiB each"])
    half = [Artifact("image/png", bytes(2**20 + 2**19), str(i)) for i in range(4)]
    kept, left_out = bounded(half)
    assert (len(kept), len(left_out)) == (2, 2)
    assert "at most 4.0 MiB together" in left_out[0]
    for wrong in (small[0], None, [small[0], "x"]):
        with pytest.raises(Exception, match="return a list of Artifact"):
            bounded(wrong)


def test_the_best_and_the_newest_samples_stay(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for step in range(10, 210, 10):
        write_samples(store, step, [Artifact.text(str(step), "what it says")], [], {"mae": 1.0}, best_step=20)
    assert len(store.dirs("samples")) == 9
    best = {"metric": "mae", "value": 1.0, "step": 20}
    found = read_samples(store, 200, best)
    assert [(s.step, s.is_best) for s in found] == [(200, False), (20, True)]
    assert found[1].items[0].data == b"20"
    # What was shown at steps that are gone is not shown.
    assert [s.step for s in read_samples(store, 195, None)] == [190]
    # Evaluated again, with less to show.
    write_samples(store, 200, [], ["poster: too large"], {}, 20)
    (again,) = read_samples(store, 200, None)
    assert (list(again.items), list(again.left_out)) == ([], ["poster: too large"])


def test_each_kind_of_sample_is_shown(tmp_path: Path) -> None:
    history = write_run(tmp_path)
    rng = np.random.default_rng(0)
    shown = [
        Artifact.image(rng.random((8, 8)), "small"),
        Artifact.image(rng.random((10, 900)), "wide"),
        Artifact.animation(rng.random((3, 8, 8)), caption="moving"),
        Artifact.audio(rng.random(100), 8000, "loud"),
        Artifact.text("a < b", "text"),
        Artifact.table([{"word": "a"}], "words"),
        Artifact("audio/midi", b"MThd", "notes"),
        Artifact("video/mp4", b"....", "film"),
    ]
    write_samples(open_store(history.url), 40, shown, ["poster: too large"], {"mae": 0.5}, 40)
    history.samples = read_samples(open_store(history.url), 40, None)
    page = report_page(history, NOW)
    tags = check(page).tags
    assert [tag for tag, _ in tags].count("img") == 3
    assert [tag for tag, _ in tags].count("audio") == 1
    assert ("audio/midi" in page, "a &lt; b" in page, "left out: poster" in page) == (True, True, True)
    source = next(attributes["src"] for tag, attributes in tags if tag == "img")
    assert base64.b64decode((source or "").partition(",")[2]) == shown[0].data
