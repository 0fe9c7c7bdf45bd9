"""Fixtures of the end-to-end tests: runs on the session's Ray, and a real S3 server, one per test session.

Without Ceph's programs the tests that need the server are skipped; DLTRAIN_REQUIRE_SERVERS=1 makes that a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import pytest
from rgw import INSTALL, Gateway, missing_programs, running_gateway


@pytest.fixture
def run_in(tmp_path: Path, ray_address: str) -> Any:
    """Runs a spec on the session's Ray."""

    def go(*overrides: str, **changes: Any) -> harness.Done:
        path = harness.write_spec(tmp_path, harness.make_spec(tmp_path, **changes))
        return harness.dltrain("run", str(path), *overrides, "--json", "--address", ray_address)

    harness.write_data(tmp_path / "train")
    harness.write_data(tmp_path / "test", rows=90, seed=1)
    return go


@pytest.fixture(scope="session")
def s3() -> Iterator[Gateway]:
    """A running server; `env` has the variables that make clients use it, `make_bucket` makes one."""
    missing = missing_programs()
    if missing:
        reason = f"no S3 server: {', '.join(missing)} not installed; {INSTALL}"
        if os.environ.get("DLTRAIN_REQUIRE_SERVERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with running_gateway() as gateway:
        yield gateway
