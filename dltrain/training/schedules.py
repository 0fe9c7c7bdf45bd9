"""The learning rate of each step.

    learning_rate(spec.optim, step=10, total_steps=300)

Pure: no torch, so that `dltrain plan` can print it at once.
"""

from __future__ import annotations

import math

from dltrain.spec import OptimSpec

__all__ = ["learning_rate"]


def learning_rate(optim: OptimSpec, step: int, total_steps: int) -> float:
    """The rate of update number `step`, counted from 0.

    It rises linearly over `warmup` steps and reaches `lr` at the last of them; then it follows the schedule, of which
    those that fall to `final * lr` reach it with the run's last step.
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    return optim.lr * _share(optim, step, total_steps)


def _share(optim: OptimSpec, step: int, total_steps: int) -> float:
    last = total_steps - 1
    match optim.schedule:
        case "cosine":
            return _between(optim.final, 0.5 * (1 + math.cos(math.pi * _progress(step, optim.warmup, last))))
        case "linear":
            return _between(optim.final, 1 - _progress(step, optim.warmup, last))
        case "wsd":
            # The last flat step is the one before the decay; a warm-up that is longer than that is not cut short.
            flat = max(optim.warmup, total_steps - max(1, round(optim.decay * total_steps)))
            return _between(optim.final, 1 - _progress(step, flat - 1, last)) if step >= flat else 1.0
        case "inverse_sqrt":
            # Source: Vaswani et al. 2017, section 5.3, scaled so that it is 1 where the warm-up ends.
            return math.sqrt(max(1, optim.warmup) / max(step + 1, 1))
    return 1.0


def _progress(step: int, first: int, last: int) -> float:
    """0 at `first`, 1 at `last` and after it."""
    return min(1.0, (step - first) / max(1, last - first))


def _between(final: float, share: float) -> float:
    return final + (1 - final) * share
