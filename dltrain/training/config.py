"""The numbers an engine is set up with: DeepSpeed's JSON and the learning rate of each step.

    deepspeed_config(spec.optim, spec.engine, micro_batch=64, grad_accum_steps=2, num_ranks=2)
    learning_rate(spec.optim, step=10, total_steps=300)

Pure: no torch, so that `dltrain plan` can print them at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dltrain.spec import EngineSpec, OptimSpec

__all__ = ["deepspeed_config", "learning_rate"]

_NEVER = 2**31 - 1


def deepspeed_config(
    optim: OptimSpec, engine: EngineSpec, micro_batch: int, grad_accum_steps: int, num_ranks: int
) -> dict[str, Any]:
    """DeepSpeed's configuration; `engine.deepspeed` is merged in last."""
    config: dict[str, Any] = {
        "train_batch_size": micro_batch * grad_accum_steps * num_ranks,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": optim.clip or 0.0,
        "zero_optimization": {"stage": engine.zero},
        # torch's own optimizers, on the CPU too.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
    }
    if engine.zero == 0 and engine.precision == "fp32":
        # Nothing of DeepSpeed's sees these gradients; they are clipped where they are checked.
        config["gradient_clipping"] = 0.0
    if engine.precision == "bf16":
        # Without the check an infinite gradient would be applied in silence.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return _merge(config, engine.deepspeed)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        inside = merged.get(name)
        merged[name] = _merge(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return merged


def learning_rate(optim: OptimSpec, step: int, total_steps: int) -> float:
    """The rate of update number `step`, counted from 0.

    It rises linearly over `warmup` steps and reaches `lr` at the last of them; then it stays, or follows half a
    cosine that ends at `final * lr` with the run's last step.
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    length = max(1, total_steps - 1 - optim.warmup)
    progress = min(1.0, (step - optim.warmup) / length)
    return optim.lr * (optim.final + (1 - optim.final) * 0.5 * (1 + math.cos(math.pi * progress)))
