"""Fixtures of the tests of faults: several hosts on this machine.

Without root or iproute2 the tests that need them are skipped; DLTRAIN_REQUIRE_SERVERS=1 makes that a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cluster.lab import Lab, what_is_missing


@pytest.fixture(scope="session")
def several_hosts() -> None:
    """Skips where there can be no lab."""
    missing = what_is_missing()
    if missing and os.environ.get("DLTRAIN_REQUIRE_SERVERS") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(f"no lab: {missing}")


@pytest.fixture(scope="module")
def lab(several_hosts: None) -> Iterator[Lab]:
    """3 hosts with one CPU slot each, for the tests of a module that leave the hosts whole."""
    with Lab(hosts=3, cpus=1) as lab:
        yield lab


@pytest.fixture
def fresh_lab(several_hosts: None) -> Iterator[Lab]:
    """3 hosts with one CPU slot each, for one test."""
    with Lab(hosts=3, cpus=1) as lab:
        yield lab
