"""A short soak: each kind of fault once, and at the end everything as if there had been none."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from harness import ROOT


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_fault_once_and_the_run_comes_out_the_same(several_hosts: None) -> None:
    # Root, which the lab needs too, for a disk that can be filled.
    command = [sys.executable, "tests/bench/soak.py", "--number", "6", "--every", "6", "--seed", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert [check for check in checks if not check["ok"]] == [], done.stderr
    assert done.returncode == 0
