"""What measuring costs: a training step with and without it, and a scrape of a run of 1,024 ranks.

    python tests/bench/metrics.py [--steps 600] [--ranks 1024] [--json] [--out tests/bench/results/metrics.json]

A step of about 20 ms is made by turns without measuring, with the rank's meter, with the driver's hub, and with both,
in seconds of the processor. The machine may be shared, which makes single steps slower and none faster: what is
compared is a tenth from the fastest. That difference is small beside the noise, whose size is printed; so the calls are
also timed where they are made, between parts of steps, with the caches as those leave them. Scrapes come from another
process, with the headers that Prometheus sends. Goals: under 1 % of a step, under half a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]

from machine import versions  # noqa: E402

from dltrain.observing.hub import Hub  # noqa: E402
from dltrain.observing.ledger import Ledger  # noqa: E402
from dltrain.observing.reports import PHASES, StepReport  # noqa: E402
from dltrain.spec import EngineSpec  # noqa: E402
from dltrain.training.meter import Meter, Phases  # noqa: E402

WIDTH, HIDDEN, CLASSES, BATCH = 256, 640, 10, 64
STEP_SECONDS = 0.020
# Ranks whose reports the driver takes in for each step: those of a laptop, where it shares the cores.
RANKS = 2
WARMUP = 10
CPU = torch.device("cpu")
KINDS = ("nothing", "meter", "hub", "both")
# What Prometheus 2.42 asks for.
ACCEPT = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5"
CLIENT = """
import json, sys, time, urllib.request
found = []
for _ in range(int(sys.argv[2])):
    request = urllib.request.Request(sys.argv[1], headers={"Accept": sys.argv[3], "Accept-Encoding": "gzip"})
    begin = time.perf_counter()
    size = len(urllib.request.urlopen(request, timeout=60).read())
    found.append(time.perf_counter() - begin)
print(json.dumps([found, size]))
"""


class Work:
    """A small network that is trained, and what a rank and the driver measure of it.

    Args:
        seconds: of a step; the batch is repeated until it takes about so long.
    """

    def __init__(self, seconds: float) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, CLASSES)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.x, self.y = torch.randn(BATCH, WIDTH), torch.randint(0, CLASSES, (BATCH,))
        self.meter = Meter([self.model], EngineSpec(), rank=0, num_ranks=RANKS, device=CPU)
        self.hub = Hub("bench", "127.0.0.1", 0, move=False, labels={"zero_stage": "1", "precision": "fp32"})
        self.hub.on_attempt(RANKS)
        self.ledger, self.reports = Ledger(0.0), [make_report(rank) for rank in range(RANKS)]
        self.micros = 1
        self.micros = max(1, round(seconds / min(self.step("nothing") for _ in range(WARMUP))))

    def step(self, kind: str) -> float:
        """Makes one step; returns its seconds of the processor. `in_place` adds up those of the calls that measure."""
        begin = time.thread_time()
        meter = kind in ("meter", "both")
        self.in_place = dict.fromkeys(("meter", "hub"), 0.0)
        if meter:
            self._timed("meter", self._start_clock)
            self._timed("meter", self._clock.lap, "data_wait")
        for index in range(self.micros):
            if meter:
                self._timed("meter", self._clock.lap, "h2d")
            with self._timed("meter", self.meter.forward, BATCH, index == 0) if meter else contextlib.nullcontext():
                loss = F.cross_entropy(self.model(self.x), self.y)
            if meter:
                self._timed("meter", self._clock.lap, "forward")
            (loss / self.micros).backward()
            if meter:
                self._timed("meter", self._clock.lap, "backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if meter:
            self._timed("meter", self._end_clock)
        if kind in ("hub", "both"):
            self._timed("hub", self.report)
        return time.thread_time() - begin

    def _timed(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        # The thread's own clock is a system call, which takes as long as what is measured.
        begin = time.perf_counter()
        value = call(*arguments)
        self.in_place[what] += time.perf_counter() - begin
        return value

    def _start_clock(self) -> None:
        self._clock = Phases(time.perf_counter(), CPU)

    def _end_clock(self) -> None:
        self._clock.lap("optimizer")
        self._clock.end()
        self.meter.step(BATCH * self.micros, self.micros)

    def report(self) -> None:
        """What the driver does with the reports of a step."""
        for report in self.reports:
            self.hub.on_step(report)
        self.hub.on_loss(1.0, {})
        for name in ("steps", "samples", "tokens", "flops", "gradient_bytes"):
            self.hub.count(name, 1)
        self.ledger.step(self.ledger.wall + STEP_SECONDS, STEP_SECONDS, 0.001, redone=False)
        self.hub.on_ledger(self.ledger)


def make_report(rank: int) -> StepReport:
    phases = {phase: 0.001 * (i + 1) + rank * 1e-7 for i, phase in enumerate(PHASES)}
    sums = {(0, 0): (BATCH, 1, 1)}
    return StepReport(rank, 1, BATCH, BATCH, BATCH, 1.0, 2.0, 1e-3, True, True, sums, STEP_SECONDS, phases, ready=2)


def measure_steps(steps: int) -> dict[str, Any]:
    """Seconds that measuring adds to a step."""
    work = Work(STEP_SECONDS)
    try:
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        in_place: dict[str, list[float]] = {"meter": [], "hub": []}
        for i in range(steps):
            for kind in _turned(i):
                found[kind].append(work.step(kind))
                if kind == "both":
                    for what, seconds in work.in_place.items():
                        in_place[what].append(seconds)
    finally:
        work.hub.close()
    base = _undisturbed(found["nothing"])
    added = {kind: _undisturbed(found[kind]) - base for kind in KINDS[1:]}
    # How far tenths of the rounds are from each other.
    parts = [{kind: _undisturbed(found[kind][i::10]) for kind in KINDS} for i in range(10)]
    error = {kind: statistics.stdev(p[kind] - p["nothing"] for p in parts) / len(parts) ** 0.5 for kind in KINDS[1:]}
    calls = {what: statistics.median(seconds) for what, seconds in in_place.items()}
    calls["both"] = calls["meter"] + calls["hub"]
    return {
        "step_milliseconds": round(base * 1e3, 2),
        "added_microseconds": {kind: round(seconds * 1e6, 1) for kind, seconds in added.items()},
        "standard_error_microseconds": {kind: round(seconds * 1e6, 1) for kind, seconds in error.items()},
        "calls_microseconds": {kind: round(seconds * 1e6, 1) for kind, seconds in calls.items()},
        "calls_share_of_20_ms": {kind: round(seconds / STEP_SECONDS, 5) for kind, seconds in calls.items()},
        "steps": steps,
    }


def _undisturbed(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 10]


def _turned(i: int) -> tuple[str, ...]:
    """Whatever comes first in a round has the caches that the round before has left."""
    i %= len(KINDS)
    return KINDS[i:] + KINDS[:i]


def measure_scrape(ranks: int, times: int = 15) -> dict[str, Any]:
    """Seconds of a scrape of so many ranks."""
    hub = Hub("bench", "127.0.0.1", 0, move=False, labels={"zero_stage": "1", "precision": "fp32"})
    try:
        hub.on_attempt(ranks)
        reports = [make_report(rank) for rank in range(ranks)]
        taking = [_seconds_of(hub, reports) for _ in range(times)]
        command = [sys.executable, "-c", CLIENT, hub.url, str(times), ACCEPT]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        series = sum(len(family.samples) for family in hub.metrics.registry.collect())
    finally:
        hub.close()
    seconds, size = json.loads(done.stdout)
    return {
        "ranks": ranks,
        "series": series,
        "reports_of_a_step_milliseconds": round(statistics.median(taking) * 1e3, 2),
        "scrape_seconds": round(statistics.median(seconds), 3),
        "scrape_seconds_most": round(max(seconds), 3),
        "compressed_bytes": size,
    }


def _seconds_of(hub: Hub, reports: list[StepReport]) -> float:
    begin = time.thread_time()
    for report in reports:
        hub.on_step(report)
    return time.thread_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {
        **versions("torch", "prometheus-client", "dltrain"),
        "measuring": measure_steps(options.steps),
        "scraping": measure_scrape(options.ranks),
    }
    if options.json:
        print(json.dumps(found))
    else:
        show(found)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), **found}, indent=2) + "\n")


def show(found: dict[str, Any]) -> None:
    steps, scrape = found["measuring"], found["scraping"]
    print(f"{found['cpu']}, {found['cores']} cores; torch {found['torch']}, client {found['prometheus-client']}")
    print(f"a step of {steps['step_milliseconds']} ms, {steps['steps']} rounds; goal: under 1 %")
    for kind in KINDS[1:]:
        more, error = steps["added_microseconds"][kind], steps["standard_error_microseconds"][kind]
        calls, share = steps["calls_microseconds"][kind], steps["calls_share_of_20_ms"][kind]
        print(f"  {kind:6} the calls take {calls:.0f} us, {share:.2%} of 20 ms; ", end="")
        print(f"the whole step takes {more:.0f} us more (+- {error:.0f})")
    print(
        f"{scrape['ranks']:,} ranks, {scrape['series']:,} series: a scrape takes {scrape['scrape_seconds']} s, ", end=""
    )
    print(f"{scrape['scrape_seconds_most']} s at most; goal: under 0.5 s. ", end="")
    print(f"The reports of a step take the driver {scrape['reports_of_a_step_milliseconds']} ms")


if __name__ == "__main__":
    main()
