"""Fixtures of all tests."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Machines are shared: how long an example takes says nothing.
settings.register_profile("dltrain", deadline=None)
settings.load_profile("dltrain")


# A shell's background jobs ignore Ctrl-C, and so would what the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `dltrain drain` asks all workers of a machine: those of another checkout's tests are none of ours.
os.environ["DLTRAIN_HOST"] = secrets.token_hex(4)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the S3 server or for several hosts is left to `make test-all`.

    There two processes share the tests (`--dist loadgroup`): one has all that need the server, so that there is one.
    """
    for item in items:
        names = getattr(item, "fixturenames", ())
        group = "s3" if "s3" in names else "lab" if "several_hosts" in names else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
        if "s3" in names:
            item.add_marker(pytest.mark.servers)
        if "several_hosts" in names:
            item.add_marker(pytest.mark.lab)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """A Ray of this session with 4 CPU slots; it ends with the session, however that ends."""
    # Ray wants a token; the commands that the tests start inherit this one.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Agents begin at the priority of everything else, as on a private Ray.
    os.environ.setdefault("RAY_worker_niceness", "0")
    head = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ray_head.py")), "4"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert head.stdout is not None
    address = head.stdout.readline().strip()
    assert address, "Ray did not start"
    yield address
    head.communicate(timeout=60)
