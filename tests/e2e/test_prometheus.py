"""Prometheus for real: its tools on our files, and its server on a run one of whose workers is killed.

The run's data is on the S3 server, the scrape configuration and the rules are those that are committed (with intervals
of a second), and every query of every dashboard is asked as Grafana would.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import recorded
import s3fs
import yaml
from harness import ROOT, events, finish, make_spec, start, wait_for_step, write_data, write_spec
from ports import free_ports
from prometheus_server import INSTALL, Prometheus, Series, missing_programs, promtool, running_prometheus

from dltrain.observing.hub import Hub
from dltrain.observing.ledger import STATES

pytestmark = pytest.mark.servers

MONITORING = ROOT / "cluster" / "monitoring"
BOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
# Every series whose value may only grow.
COUNTERS = '{__name__=~"dltrain_.+_(total|sum|count|bucket)"}'
STEPS, BATCH = 120, 16
SECONDS = 0.1
# A scrape, a beat of the driver and a step: how far a scraped sum may be behind.
BEHIND = 3.0


@pytest.fixture(scope="module", autouse=True)
def programs() -> None:
    """Skips where Prometheus is not installed."""
    missing = missing_programs()
    if missing:
        reason = f"no Prometheus: {', '.join(missing)} not installed; {INSTALL}"
        if os.environ.get("DLTRAIN_REQUIRE_SERVERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


# ---- its tools ----


def test_the_configuration_is_valid() -> None:
    promtool("check", "config", str(MONITORING / "prometheus.yml"))


def test_the_rules_are_valid_and_do_what_they_say() -> None:
    said = promtool("check", "rules", str(MONITORING / "rules.yml"))
    count = sum(len(group["rules"]) for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"])
    assert f"{count} rules found" in said
    promtool("test", "rules", str(MONITORING / "rules_test.yml"))


def test_a_rule_that_is_wrong_is_found(tmp_path: Path) -> None:
    text = (MONITORING / "rules.yml").read_text()
    assert "run:dltrain_data_wait:ratio5m > 0.1" in text
    (tmp_path / "rules.yml").write_text(text.replace("ratio5m > 0.1", "ratio5m > 0.5"))
    cases = tmp_path / "rules_test.yml"
    cases.write_text((MONITORING / "rules_test.yml").read_text())
    with pytest.raises(AssertionError, match="DltrainDataBound"):
        promtool("test", "rules", str(cases))


def test_metrics_are_as_prometheus_wants_them() -> None:
    hub = Hub("r", "127.0.0.1", 0, move=False, labels={"zero_stage": "1", "precision": "fp32"})
    try:
        hub.on_attempt(2)
        hub.on_device("NVIDIA H100 80GB HBM3", 989e12)
        text = urllib.request.urlopen(hub.url, timeout=30).read().decode()
    finally:
        hub.close()
    assert promtool("check", "metrics", stdin=text).strip() == ""


# ---- its server, on a run ----


@dataclass(frozen=True)
class Watched:
    """A run that is over, and the server that watched it.

    Attributes:
        began: Unix time of the first scrape; ended: of the last one.
        launched: when the run's clock began, as the run itself has it.
    """

    server: Prometheus
    run: Path
    summary: dict[str, Any]
    began: float
    ended: float
    launched: float

    def at_end(self, expr: str) -> float:
        """The one value of an expression when the run was last scraped."""
        (found,) = self.server.ask(expr, at=self.ended)
        return found.value


@pytest.fixture(scope="module")
def ray_env(s3: Any) -> Iterator[dict[str, str]]:
    """A Ray whose workers know the S3 server, and the environment of what uses it."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "ray_head.py"), "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **s3.env, **token},
    )
    assert head.stdout is not None
    address = head.stdout.readline().strip()
    assert address, "Ray did not start"
    yield {**s3.env, **token, "RAY_ADDRESS": address}
    head.communicate(timeout=60)


@pytest.fixture(scope="module")
def watched(s3: Any, ray_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """120 steps of two workers, one of them killed on the way; the other one has less to do."""
    home = tmp_path_factory.mktemp("watched")
    bucket = f"watched-{os.getpid()}"
    s3.make_bucket(bucket)
    fs = s3fs.S3FileSystem(key=s3.access_key, secret=s3.secret_key, endpoint_url=s3.endpoint)
    for name, rows, seed in (("train", 200, 0), ("test", 90, 1)):
        fs.put(str(write_data(home / name, rows=rows, seed=seed)), f"{bucket}/{name}", recursive=True)
    (port,) = free_ports(1)
    spec = make_spec(
        home,
        task="tasks:Uneven",
        args={"seconds": SECONDS},
        data={
            "train": f"s3://{bucket}/train",
            "eval": f"s3://{bucket}/test",
            "cache": {"dir": str(home / "cache"), "gb": 1},
        },
        batch={"global": BATCH},
        train={"steps": STEPS, "eval_every": 50},
        checkpoint={"every": 20},
        metrics={"port": port},
    )
    with running_prometheus(scraping(port, ray_targets(ray_env)), home / "prometheus") as server:
        process = start("run", str(write_spec(home, spec)), "--json", env=ray_env)
        run = home / "runs" / "tiny"
        live = wait_for_step(run, 45, process)
        os.kill(live["workers"][1]["pid"], signal.SIGKILL)
        done = finish(process)
        assert done.code == 0, done.err
        (scraped,) = server.ask("dltrain_steps_total[30m]")
        (end,) = [event for event in events(run) if event["event"] == "end"]
        launched = end["time"] - done.json["seconds"]
        yield Watched(server, run, done.json, scraped.points[0][0], scraped.points[-1][0], launched)


def scraping(port: int, ray: list[str]) -> dict[str, Any]:
    """The committed configuration, on these ports and every second."""
    config: dict[str, Any] = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    jobs["dltrain"]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    del jobs["ray"]["file_sd_configs"]
    jobs["ray"]["static_configs"] = [{"targets": ray}]
    config["scrape_configs"] = [jobs["dltrain"], jobs["ray"]]
    return config


def ray_targets(env: dict[str, str]) -> list[str]:
    """Where the nodes of a Ray serve their metrics, for which no token is wanted."""
    code = (
        "import json, ray\n"
        "ray.init(logging_level='ERROR', log_to_driver=False)\n"
        "print(json.dumps([f\"{n['NodeManagerAddress']}:{n['MetricsExportPort']}\" for n in ray.nodes()]))\n"
    )
    command = [sys.executable, "-c", code]
    env = {**os.environ, **env}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    targets: list[str] = json.loads(done.stdout.strip().splitlines()[-1])
    return targets


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def test_no_sample_is_lost_and_none_is_counted_twice_but_those_made_again(watched: Watched) -> None:
    lines = lines_of(watched.run)
    redone = len(lines) - len({line["step"] for line in lines})
    assert watched.at_end("sum(dltrain_steps_total)") == STEPS + redone
    assert watched.at_end("sum(dltrain_samples_total)") == (STEPS + redone) * BATCH == watched.summary["samples"]
    assert watched.at_end('sum(dltrain_rank_steps_total{rank="0"})') >= STEPS


def test_counters_never_go_down(watched: Watched) -> None:
    found = watched.server.ask(f"{COUNTERS}[30m]", at=watched.ended)
    assert len(found) > 50
    for series in found:
        values = [value for _, value in series.points]
        assert values == sorted(values), series.labels


def test_the_kill_is_one_restart_and_costs_goodput(watched: Watched) -> None:
    assert watched.summary["restarts"] == 1
    restarts = watched.server.ask("dltrain_restarts_total > 0", at=watched.ended)
    assert [(series.labels["reason"], series.value) for series in restarts] == [("signal", 1)]
    goodput = watched.at_end("run:dltrain_goodput:ratio")
    assert 0 < goodput < 1
    # The same as the run says itself: what the recording rule saw is a second older.
    assert goodput == pytest.approx(watched.summary["goodput"], abs=0.1)
    assert watched.at_end('sum(dltrain_time_seconds_total{state="recovering"})') > 0


def test_the_states_sum_to_the_wall_clock(watched: Watched) -> None:
    (found,) = watched.server.ask("sum(dltrain_time_seconds_total)", start=watched.began, end=watched.ended)
    gaps = [(at - watched.launched) - value for at, value in found.points]
    # A state is booked when it is over, so that the sum may be behind and never ahead.
    assert min(gaps) > -BEHIND
    assert gaps[-1] < BEHIND
    assert {s.labels["state"] for s in watched.server.ask("dltrain_time_seconds_total", at=watched.ended)} == set(
        STATES
    )


def test_the_slow_rank_is_seen_by_its_own_work(watched: Watched) -> None:
    found = {
        series.labels["rank"]: series.value
        for series in watched.server.ask("run_rank:dltrain_own_step_seconds:mean5m", at=watched.ended)
    }
    assert found["1"] > found["0"] + SECONDS * 0.8
    # Its steps are as long as the others': the quick one waits in backward.
    waits = {
        series.labels["rank"]: series.value
        for series in watched.server.ask(
            'dltrain_step_phase_seconds_total{phase="backward"} / on (rank) dltrain_rank_steps_total', at=watched.ended
        )
    }
    assert waits["0"] > waits["1"] + SECONDS * 0.8
    ratio = watched.at_end('run_rank:dltrain_straggler:ratio5m{rank="1"}')
    assert ratio == pytest.approx(2 * found["1"] / (found["0"] + found["1"]), rel=0.05)


# ---- what the dashboards ask ----


@dataclass(frozen=True)
class Query:
    """One of a panel's."""

    expr: str
    legend: str
    instant: bool

    @property
    def is_recorded(self) -> bool:
        """Whether this machine can't make what it asks for."""
        return bool(recorded.NAMES & set(re.findall(r"[A-Za-z_:][\w:]*", self.expr)))


def queries(path: Path) -> Iterator[tuple[str, Query]]:
    board = json.loads(path.read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], Query(target["expr"], target["legendFormat"], bool(target.get("instant")))
    for mark in board["annotations"]["list"]:
        yield mark["name"], Query(mark["expr"], mark["titleFormat"], instant=False)


def filled(expr: str, run: str) -> str:
    """With the variables as Grafana puts them in for a dashboard of a few minutes."""
    values = {"$__rate_interval": "15s", "$__range": "5m", "$run": run, "$rank": ".*", "$pod": ".*", "$cluster": ".*"}
    for name, value in values.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


def check(query: Query, title: str, server: Prometheus, run: str, begin: float, end: float) -> None:
    expr = filled(query.expr, run)
    found = server.ask(expr, at=end) if query.instant else server.ask(expr, start=begin, end=end)
    assert any(math.isfinite(value) for series in found for _, value in series.points), f"{title}: nothing for {expr}"
    for label in re.findall(r"\{\{(\w+)\}\}", query.legend):
        assert any(label in series.labels for series in found), f"{title}: no label {label} in {found[0].labels}"


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_panels_show_the_run(watched: Watched, path: Path) -> None:
    asked = 0
    for title, query in queries(path):
        if not query.is_recorded:
            check(query, title, watched.server, "tiny", watched.began, watched.ended)
            asked += 1
    assert asked >= 3


def test_a_board_is_a_picture(watched: Watched, tmp_path: Path) -> None:
    """DLTRAIN_PICTURES=docs keeps it there, for the README."""
    pytest.importorskip("matplotlib", reason="matplotlib is in dltrain[bench]")
    from board_picture import draw

    target = Path(os.environ.get("DLTRAIN_PICTURES", tmp_path)) / "overview.png"
    board = MONITORING / "dashboards" / "dltrain-overview.json"
    found = draw(board, watched.server, lambda expr: filled(expr, "tiny"), watched.began, watched.ended, target)
    # On a CPU there is no MFU.
    assert [title for title, count in found.items() if not count] == ["MFU"]
    assert target.stat().st_size > 20_000


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, float, float]]:
    """A server that has what was recorded, and what the rules make of it."""
    home = tmp_path_factory.mktemp("recorded")
    begin, seconds = float(int(time.time()) - 3 * 3600), 900
    text = home / "recorded.om"
    text.write_text(recorded.openmetrics(begin, seconds))
    data, rules = str(home / "data"), str(MONITORING / "rules.yml")
    promtool("tsdb", "create-blocks-from", "openmetrics", str(text), data)
    config: dict[str, Any] = {"global": {"scrape_interval": "15s"}}
    with running_prometheus(config, home) as server:
        window = [f"--start={int(begin)}", f"--end={int(begin) + seconds}", "--eval-interval=15s"]
        promtool("tsdb", "create-blocks-from", "rules", *window, f"--url={server.url}", f"--output-dir={data}", rules)
    with running_prometheus(config, home) as server:
        yield server, begin, begin + seconds


@pytest.mark.parametrize("path", [p for p in BOARDS if any(q.is_recorded for _, q in queries(p))], ids=lambda p: p.stem)
def test_panels_show_what_was_recorded(history: tuple[Prometheus, float, float], path: Path) -> None:
    server, begin, end = history
    for title, query in queries(path):
        if query.is_recorded:
            check(query, title, server, recorded.RUN, begin, end)


def test_mfu_is_the_share_of_the_peak(history: tuple[Prometheus, float, float]) -> None:
    server, _, end = history
    (found,) = server.ask("run:dltrain_mfu:ratio5m", at=end)
    assert found.value == pytest.approx(0.4, rel=1e-3)


def variables(path: Path) -> Iterator[tuple[str, str]]:
    """(selector, label) of each variable that asks for a label's values."""
    for variable in json.loads(path.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            text = variable["query"] if isinstance(variable["query"], str) else variable["query"]["query"]
            selector, _, label = text.removeprefix("label_values(").removesuffix(")").rpartition(", ")
            yield selector, label


def has(found: list[Series], label: str) -> bool:
    return any(series.labels.get(label) for series in found)


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_variables_have_values(watched: Watched, history: tuple[Prometheus, float, float], path: Path) -> None:
    server, _, end = history
    for selector, label in variables(path):
        if label in ("run", "rank"):
            found = watched.server.ask(filled(selector, ".*"), at=watched.ended)
        else:
            found = server.ask(selector, at=end)
        assert has(found, label), (selector, label)
