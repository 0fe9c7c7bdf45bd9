"""When ranks count as hung, and which of them is to blame."""

from __future__ import annotations

import pytest

from dltrain.running.messages import Pulse
from dltrain.running.watch import blamed, hang_limit, is_hang


def pulse(still: float, phase: str = "step") -> Pulse:
    return Pulse(1, still, phase, leaving=False, prepared=True)


@pytest.mark.parametrize(
    ("phase", "slow_step", "setting", "seconds"),
    [
        ("step", 0.0, None, 8),
        ("step", 0.5, None, 8),
        ("step", 3.0, None, 30),
        ("step", 3.0, 4.0, 4),
        # Stopped by the kernel: that is not slowness.
        ("stopped", 0.02, None, 5),
        ("stopped", 3.0, None, 30),
        # Nobody knows how long these may take.
        ("starting", 0.02, 4.0, 600),
        ("data", 0.02, None, 600),
    ],
)
def test_how_long_a_rank_may_be_still(phase: str, slow_step: float, setting: float | None, seconds: float) -> None:
    assert hang_limit(phase, slow_step, setting) == seconds


def test_all_ranks_must_be_still_unless_one_is_stopped() -> None:
    assert not is_hang([], 0.02, None)
    assert not is_hang([pulse(9), pulse(1)], 0.02, None)
    assert is_hang([pulse(9), pulse(8.5)], 0.02, None)
    # One waits for data, the others for it.
    assert not is_hang([pulse(9), pulse(9, "data")], 0.02, None)
    assert is_hang([pulse(5.5), pulse(5.5, "stopped")], 0.02, None)


def test_the_one_that_the_others_wait_for_is_to_blame() -> None:
    waiting, working = "all_reduce (torch/distributed)", "forward (model.py)"
    assert blamed([waiting, working, waiting]) == 1
    assert blamed([working, f"{waiting}, its process is stopped"]) == 1
    assert blamed([waiting, waiting]) == 0
