"""Ends the driver of a run before its machine goes: the head's preStop hook.

    python -m dltrain.deploying.stop_driver /etc/dltrain/spec.yaml 91

The driver is told as by Kubernetes itself, with SIGTERM: it saves a checkpoint and ends with 143, which is a failed job
that a retry goes on from. (`dltrain stop` would end it as done.) Waits that many seconds for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

import psutil

__all__ = ["stop_drivers"]

_POLL_SECONDS = 0.1


def stop_drivers(spec: str, wait_seconds: float) -> tuple[int, int]:
    """Ends the drivers of this machine that run that spec's file; how many there were, and how many are still there."""
    drivers = [process for process in psutil.process_iter() if _is_driver(process, spec)]
    for process in drivers:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + wait_seconds
    while (left := sum(map(_is_alive, drivers))) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return len(drivers), left


def _is_alive(process: psutil.Process) -> bool:
    try:
        # Whoever started it may not have looked yet.
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_driver(process: psutil.Process, spec: str) -> bool:
    try:
        words = process.cmdline() if process.uids().real == os.getuid() else []
    except psutil.Error:
        return False
    # A shell that started it has all of this in one word.
    return [os.path.basename(word) for word in words[1:3]] == ["dltrain", "run"] and words[3:4] == [spec]


def main() -> int:
    """The command."""
    found, left = stop_drivers(sys.argv[1], float(sys.argv[2]))
    print(f"{found - left} of {found} drivers have ended")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
