"""DeepSpeed's JSON, as it follows from a spec.

    deepspeed_config(spec.optim, spec.engine, micro_batch=64, grad_accum_steps=2, num_ranks=2)

Pure: no torch, so that `dltrain plan` can print them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dltrain.spec import EngineSpec, OptimSpec

__all__ = ["deepspeed_config"]

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
    if engine.offload != "none":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if engine.offload == "all":
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    if engine.precision == "fp16":
        # 0 is DeepSpeed's word for a scale that it finds.
        config["fp16"] = {"enabled": True, "loss_scale": engine.loss_scale or 0}
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
