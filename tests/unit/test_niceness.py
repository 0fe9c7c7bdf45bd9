"""At what priority workers run: Ray's own default is taken back, what a user has chosen is kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

READ = (
    "import os; from dltrain.running.worker import _be_as_nice_as_others as f; f(); "
    "print(os.getpriority(os.PRIO_PROCESS, 0))"
)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may take niceness back")
@pytest.mark.parametrize(("given", "then"), [(0, 0), (15, 0), (19, 19), (7, 7)])
def test_only_rays_default_is_taken_back(given: int, then: int) -> None:
    if os.getpriority(os.PRIO_PROCESS, 0) != 0:
        pytest.skip("these tests run at another niceness themselves")
    done = subprocess.run(
        ["nice", "-n", str(given), sys.executable, "-c", READ], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) == then
