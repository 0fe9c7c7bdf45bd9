"""A real Prometheus for tests, on a random port of loopback, and its promtool.

    with running_prometheus(config, home) as server:
        server.ask("sum(dltrain_steps_total)")                 # a list of Series, each with one point
        server.ask("dltrain_loss", start=t0, end=t1)           # each with many
    promtool("check", "rules", "rules.yml")

It ends with the process that started it, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ports import free_ports
from rgw import LAUNCHER

__all__ = ["INSTALL", "Prometheus", "Series", "missing_programs", "promtool", "running_prometheus"]

INSTALL = "apt-get install -y --no-install-recommends prometheus"
_PROGRAMS = ("prometheus", "promtool")
_SECONDS = 60
_ATTEMPTS = 3


def missing_programs() -> list[str]:
    """Those that are not installed."""
    return [program for program in _PROGRAMS if not shutil.which(program)]


def promtool(*arguments: str, stdin: str | None = None) -> str:
    """Runs promtool; returns what it said.

    Raises:
        AssertionError: it found something wrong.
    """
    done = subprocess.run(
        ["promtool", *arguments], input=stdin, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    assert done.returncode == 0, f"promtool {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Series:
    """Labels, name included where there is one, and (time, value) in order."""

    labels: Mapping[str, str]
    points: list[tuple[float, float]]

    @property
    def value(self) -> float:
        """The last one."""
        return self.points[-1][1]


class Prometheus:
    """A running server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(
        self, expr: str, at: float | None = None, start: float | None = None, end: float | None = None
    ) -> list[Series]:
        """An instant query, or a range query in steps of a second where `start` and `end` are given.

        Raises:
            AssertionError: the server refused the query.
        """
        if start is not None:
            found = self.get("query_range", query=expr, start=start, end=end, step=1)
        else:
            found = self.get("query", query=expr, **({} if at is None else {"time": at}))
        if found["resultType"] == "scalar":
            return [Series({}, [_point(found["result"])])]
        return [
            Series(each["metric"], [_point(p) for p in each.get("values") or [each["value"]]])
            for each in found["result"]
        ]

    def get(self, verb: str, **parameters: Any) -> Any:
        """`/api/v1/VERB` of the server."""
        url = f"{self.url}/api/v1/{verb}"
        query = urllib.parse.urlencode(parameters).encode()
        try:
            with urllib.request.urlopen(url, data=query if query else None, timeout=_SECONDS) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None


def _point(found: Any) -> tuple[float, float]:
    return float(found[0]), float(found[1])


@contextlib.contextmanager
def running_prometheus(config: Mapping[str, Any], home: Path) -> Iterator[Prometheus]:
    """Starts the server on files under `home`; what it has stored stays there.

    Raises:
        RuntimeError: it did not come up; the message has the end of its log.
    """
    home.mkdir(exist_ok=True)
    (home / "prometheus.yml").write_text(yaml.safe_dump(dict(config)))
    for attempt in range(1, _ATTEMPTS + 1):
        (port,) = free_ports(1)
        process = _spawn(home, port)
        server = Prometheus(f"http://127.0.0.1:{port}")
        try:
            # Another process may have taken the port meanwhile: then the server ends at once.
            if _is_up(server, process):
                yield server
                return
            if attempt == _ATTEMPTS:
                raise RuntimeError(f"Prometheus did not start:\n{(home / 'log').read_text()[-2000:]}")
        finally:
            process.terminate()
            process.wait(_SECONDS)


def _spawn(home: Path, port: int) -> subprocess.Popen[bytes]:
    command = [
        "prometheus",
        f"--config.file={home / 'prometheus.yml'}",
        f"--storage.tsdb.path={home / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (home / "log").open("ab") as log:
        launcher = [sys.executable, "-S", "-E", "-c", LAUNCHER, str(os.getpid())]
        return subprocess.Popen([*launcher, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _is_up(server: Prometheus, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/-/ready", timeout=5):
            return True
        time.sleep(0.05)
    return False
