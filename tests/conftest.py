"""Fixtures of all tests."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Machines are shared: how long an example takes says nothing.
settings.register_profile("dltrain", deadline=None)
settings.load_profile("dltrain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the S3 server or for several hosts is left to `make test-all`."""
    for item in items:
        names = getattr(item, "fixturenames", ())
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
