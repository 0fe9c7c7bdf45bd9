"""Fixtures of the end-to-end tests: a real S3 server, one per test session.

Without Ceph's programs the tests that need the server are skipped; DLTRAIN_REQUIRE_SERVERS=1 makes that a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from rgw import INSTALL, Gateway, missing_programs, running_gateway


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
