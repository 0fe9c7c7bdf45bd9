"""dltrain: distributed deep-learning training on Ray and DeepSpeed.

    from dltrain import BadRowsError, Batch, Keys, Sum, Task

The names are imported when first used: the driver and the agents must not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dltrain.data.batch import Batch, Keys, Sum
    from dltrain.errors import BadRowsError
    from dltrain.training.task import Task

__all__ = ["BadRowsError", "Batch", "Keys", "Sum", "Task"]
__version__ = "0.1.0"

_HOMES = {
    "BadRowsError": "errors",
    "Batch": "data.batch",
    "Keys": "data.batch",
    "Sum": "data.batch",
    "Task": "training.task",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"dltrain.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dltrain' has no attribute {name!r}")
