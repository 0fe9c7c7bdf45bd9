"""A live run, looked at from outside: its state, ledger, newest steps and, where they can be reached, its metrics.

    live = Live(run.store, run.state)
    live.facts()                          # plain values
    watch(live, Console())                # `dltrain top`: until the run is over, or q

Nothing is asked of the run itself: a look costs it one scrape of its metrics.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console, RenderableType

from dltrain.observing.journal import is_local, read_json
from dltrain.observing.reports import OVER
from dltrain.observing.top import RankTimes, facts, frame
from dltrain.store import Store

__all__ = ["Live", "metrics_address", "parse_ranks", "tail_journal", "watch"]

_EVERY_SECONDS = 1.0
_LINES = 50
_TAIL_BYTES = 64 * 1024
_SCRAPE_SECONDS = 2.0
# Phases are shown of the steps since then at the earliest, so that a bar does not jump with every step.
_WINDOW_SECONDS = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_ANY = ("0.0.0.0", "::")


class Live:
    """Looks at one run.

    Args:
        store: its directory.
        state: reads state.json, and says "lost" of a run that is silent.
    """

    def __init__(self, store: Store, state: Callable[[], Mapping[str, Any] | None]) -> None:
        self._store, self._state = store, state
        self._base: dict[int, RankTimes] = {}
        self._shown: dict[int, RankTimes] = {}
        self._since = float("-inf")

    def facts(self) -> dict[str, Any]:
        """What there is to know now."""
        state, ledger, metrics, steps = self._look()
        return facts(state, ledger, metrics, steps, time.time())

    def frame(self, width: int) -> tuple[str, RenderableType]:
        """The run's state and a picture of it."""
        state, ledger, metrics, steps = self._look()
        return state["state"], frame(state, ledger, metrics, width, steps=steps, now=time.time())

    def _look(self) -> tuple[Mapping[str, Any], dict[str, Any] | None, dict[int, RankTimes], list[dict[str, Any]]]:
        state = self._state() or {"run": self._store.url.rpartition("/")[2], "state": "planning"}
        ledger, steps = read_json(self._store, "ledger.json"), tail_journal(self._store, "steps", _LINES)
        return state, ledger, self._recent(self._scrape(state)), steps

    def _scrape(self, state: Mapping[str, Any]) -> dict[int, RankTimes]:
        address = metrics_address(state, socket.gethostname())
        if not address or state["state"] in (*OVER, "lost"):
            return {}
        try:
            with urllib.request.urlopen(address, timeout=_SCRAPE_SECONDS) as reply:
                text = reply.read().decode()
        except (OSError, ValueError):
            return {}
        return parse_ranks(text, state["run"])

    def _recent(self, now: dict[int, RankTimes]) -> dict[int, RankTimes]:
        """The times of the last seconds, where there was a look before."""
        if time.monotonic() - self._since >= _WINDOW_SECONDS or set(now) != set(self._shown):
            self._shown = {rank: times.since(self._base.get(rank)) for rank, times in now.items()}
            self._base, self._since = now, time.monotonic()
        return self._shown


def metrics_address(state: Mapping[str, Any], here: str) -> str:
    """Where a run's metrics can be asked for from the host called `here`; empty where they can't.

    A loopback address is the driver's own: on another host somebody else may listen there.
    """
    url, driver = str(state.get("metrics_url", "")), str(state.get("driver", "")).rpartition(":")[0]
    host = urlsplit(url).hostname or ""
    if not url or (host in _LOOPBACK and driver != here):
        return ""
    return url.replace(host, "127.0.0.1" if driver == here else driver, 1) if host in _ANY else url


def parse_ranks(text: str, run: str) -> dict[int, RankTimes]:
    """Rank -> steps and seconds by phase, from the text of a metrics page; what is not of this run is left out."""
    from prometheus_client.parser import text_string_to_metric_families

    steps: dict[int, float] = {}
    phases: dict[int, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name.startswith("dltrain_") else ():
            labels = sample.labels
            if labels.get("run") != run or "rank" not in labels:
                continue
            if sample.name == "dltrain_rank_steps_total":
                steps[int(labels["rank"])] = sample.value
            elif sample.name == "dltrain_step_phase_seconds_total":
                phases.setdefault(int(labels["rank"]), {})[labels["phase"]] = sample.value
    return {rank: RankTimes(steps.get(rank, 0.0), times) for rank, times in phases.items()}


def tail_journal(store: Store, name: str, count: int) -> list[dict[str, Any]]:
    """The newest `count` lines of a journal, oldest first, without reading all of it."""
    lines: list[dict[str, Any]] = []
    for chunk in _newest_first(store, name):
        lines = [*_parsed(chunk), *lines]
        if len(lines) >= count:
            break
    return lines[-count:]


def _newest_first(store: Store, name: str) -> Iterator[Iterable[str]]:
    if is_local(store):
        with contextlib.suppress(FileNotFoundError), Path(store.path(f"{name}.jsonl")).open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            # The first line of a piece may have lost its beginning.
            yield file.read().decode(errors="replace").splitlines()[1 if start else 0 :]
        return
    for part in sorted(store.list(name), reverse=True):
        yield store.read(part).decode().splitlines()


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        # The last one may be on its way.
        with contextlib.suppress(ValueError):
            yield json.loads(line)


# ---- the terminal ----


def watch(live: Live, console: Console) -> None:
    """Shows a run until it is over, or somebody presses q or Ctrl-C; without a terminal one frame.

    Its last frame stays on the terminal.
    """
    from rich.live import Live as Screen

    state, picture = live.frame(console.width)
    if console.is_terminal:
        with (
            contextlib.suppress(KeyboardInterrupt),
            _keys() as key,
            Screen(picture, console=console, screen=True, auto_refresh=False) as screen,
        ):
            screen.update(picture, refresh=True)
            while state not in OVER and key(_EVERY_SECONDS) != "q":
                state, picture = live.frame(console.width)
                screen.update(picture, refresh=True)
    console.print(picture)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Gives a function that waits for a key, so many seconds at most; empty when none was pressed."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    # A key that was pressed a little early counts as well.
    tty.setcbreak(fd, termios.TCSANOW)
    try:
        yield lambda seconds: os.read(fd, 1).decode(errors="replace") if select.select([fd], [], [], seconds)[0] else ""
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _sleep(seconds: float) -> str:
    time.sleep(seconds)
    return ""
