"""The numbers that an optimizer keeps besides its tensors: how many updates it has counted, the scale of an fp16 loss.

    saved = numbers(engine)            # {"class:AdamW": 1.0, "tensor:step": 12.0, "scale:cur_scale": 65536.0}
    set_numbers(engine, saved, afresh=is_another(engine, saved))

All ranks and all parameters have the same, at any world size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dltrain.checkpoint.fragments import inner_optimizer, is_number

__all__ = ["is_another", "numbers", "set_numbers"]

# Optimizers that keep the same.
_ALIKE = {"Adam": "AdamW"}
# Of a group of parameters, what follows from the spec.
_OURS = ("lr", "lr_scale", "weight_decay", "initial_lr")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def numbers(engine: Any) -> dict[str, float]:
    """By name: `tensor:`, `int:` and `float:` say what the optimizer has them as, `scale:` those of the loss scale.

    `group.I.` goes before what it keeps of group I and has changed since it was made; `class:` names the optimizer.
    """
    inner = inner_optimizer(engine)
    found = {f"class:{type(inner).__name__}": 1.0}
    for index, group in enumerate(inner.param_groups):
        for name, value in group.items():
            if name in _OURS or not _is_single(value) or value == inner.defaults.get(name, value):
                continue
            found[f"group.{index}.{_kind(value)}:{name}"] = float(value)
    # Of the first alone, this being done for every snapshot: each look at a GPU's waits for it.
    for owner, state in inner.state.items():
        found |= {
            f"{_kind(value)}:{name}": float(value) for name, value in state.items() if is_number(name, value, owner)
        }
        if state:
            break
    scaler = _scaler(engine)
    return found | {f"scale:{name}": float(getattr(scaler, name)) for name in _SCALE if hasattr(scaler, name)}


def is_another(engine: Any, saved: Mapping[str, float]) -> bool:
    """Whether they are another optimizer's, whose state this one can't go on from."""
    before = {_alike(key.removeprefix("class:")) for key in saved if key.startswith("class:")}
    return bool(before) and _alike(type(inner_optimizer(engine)).__name__) not in before


def set_numbers(engine: Any, saved: Mapping[str, float], *, afresh: bool = False) -> None:
    """Puts them back, of every tensor that has state.

    Args:
        afresh: the optimizer begins without the state that was saved; the scale of the loss is not its own.
    """
    inner, scaler = inner_optimizer(engine), _scaler(engine)
    on_device = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    for key, value in saved.items():
        kind, _, name = key.partition(":")
        if kind == "scale":
            if hasattr(scaler, name):
                setattr(scaler, name, type(getattr(scaler, name))(value))
        elif afresh or kind == "class":
            continue
        elif kind.startswith("group."):
            _, index, kind = kind.split(".")
            if int(index) < len(inner.param_groups):
                inner.param_groups[int(index)][name] = _as_it_was(kind, value, torch.device("cpu"))
        else:
            for owner, state in inner.state.items():
                if state:
                    state[name] = _as_it_was(kind, value, owner.device if on_device else torch.device("cpu"))


def _alike(name: str) -> str:
    return _ALIKE.get(name, name)


def _is_single(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def _as_it_was(kind: str, value: float, device: torch.device) -> Any:
    if kind == "tensor":
        return torch.tensor(value, dtype=torch.float32, device=device)
    return int(value) if kind == "int" else value


def _scaler(engine: Any) -> Any:
    """Where DeepSpeed keeps the scale of the loss; None where there is none that changes: a fixed one is the spec's."""
    optimizer = engine.optimizer
    found = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    changes = getattr(found, "dynamic", False) or getattr(found, "dynamic_loss_scale", False)
    return found if changes and engine.fp16_enabled() else None
