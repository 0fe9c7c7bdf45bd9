"""Waits on a spot machine of AWS for the notice that it will be taken, and moves its work away in time.

    python -m cluster.spot             # beside Ray on every spot worker: cluster/ray-up/aws.yaml starts it

The notice comes two minutes ahead. Ray's own reaction would be to lose the machine; `dltrain drain` has its workers
finish their step, save, and go on elsewhere. One per host: a second one ends at once.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

__all__ = ["Metadata", "main", "seconds_to_drain", "watch"]

_ADDRESS = "http://169.254.169.254"
_NOTICE = "/latest/meta-data/spot/instance-action"
_TOKEN_SECONDS = 21600
_TIMEOUT_SECONDS = 2.0
# AWS recommends to ask every 5 s.
_PERIOD_SECONDS = 5.0
# Of the time that is left, what the machine needs for itself.
_MARGIN_SECONDS = 10.0
_LEAST_SECONDS = 5.0
_LOCK = "\0dltrain-spot"


class Metadata:
    """What a machine of AWS is told about itself, over a link of its own; sessions have a token.

    Args:
        address: of the service, for tests.
    """

    def __init__(self, address: str = _ADDRESS) -> None:
        self._address, self._token = address, ""

    def notice(self) -> datetime | None:
        """When this machine will be taken; None while nobody says so, or the service does not answer."""
        try:
            return self._ask()
        except urllib.error.HTTPError as error:
            if error.code == 401:
                self._token = ""
            return None
        except (OSError, ValueError, KeyError):
            return None

    def _ask(self) -> datetime | None:
        if not self._token:
            self._token = self._get("/latest/api/token", "PUT", "X-aws-ec2-metadata-token-ttl-seconds", _TOKEN_SECONDS)
        text = self._get(_NOTICE, "GET", "X-aws-ec2-metadata-token", self._token)
        return datetime.fromisoformat(json.loads(text)["time"])

    def _get(self, path: str, method: str, header: str, value: object) -> str:
        request = urllib.request.Request(self._address + path, headers={header: str(value)}, method=method)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            return str(answer.read().decode())


def seconds_to_drain(taken: datetime, now: datetime) -> float:
    """How long the work may take to move away."""
    return max(_LEAST_SECONDS, (taken - now).total_seconds() - _MARGIN_SECONDS)


def watch(
    notice: Callable[[], datetime | None],
    drain: Callable[[float], None],
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Waits for the notice, drains once, and returns."""
    while (taken := notice()) is None:
        sleep(_PERIOD_SECONDS)
    drain(seconds_to_drain(taken, now()))


def _drain(seconds: float) -> None:
    print(f"this machine will be taken: its work has {seconds:.0f} s to move away", flush=True)
    command = [str(Path(sys.executable).parent / "dltrain"), "drain", "--wait", f"{seconds:.0f}"]
    subprocess.run(command, check=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 after the drain, or when another one watches already."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default=_ADDRESS, help="the machine's metadata service (default: %(default)s)")
    options = parser.parse_args(arguments)
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            # An abstract socket: it goes with the process.
            lock.bind(_LOCK)
        except OSError:
            print("another one watches this machine already")
            return 0
        watch(Metadata(options.address).notice, _drain)
    return 0


if __name__ == "__main__":
    sys.exit(main())
