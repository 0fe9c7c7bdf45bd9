"""dltrain: distributed deep-learning training on Ray and DeepSpeed.

    from dltrain import Artifact, BadRowsError, Batch, Callback, Input, Keys, Sum, Task, every

    dltrain.run("digits.yaml", workers=2)              # in a notebook or a program
    dltrain.load("digits").predict([Path("seven.png")])

The names are imported when first used: the driver and the agents must not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dltrain.api import run
    from dltrain.artifact import Artifact
    from dltrain.data.batch import Batch, Keys, Sum
    from dltrain.data.raw import Input
    from dltrain.errors import BadRowsError
    from dltrain.training.callbacks import Callback, every
    from dltrain.training.task import Task
    from dltrain.using.model import Model, load

__all__ = [
    "Artifact",
    "BadRowsError",
    "Batch",
    "Callback",
    "Input",
    "Keys",
    "Model",
    "Sum",
    "Task",
    "every",
    "load",
    "run",
]
__version__ = "0.1.0"

_HOMES = {
    "Artifact": "artifact",
    "BadRowsError": "errors",
    "Batch": "data.batch",
    "Callback": "training.callbacks",
    "Input": "data.raw",
    "Keys": "data.batch",
    "Model": "using.model",
    "Sum": "data.batch",
    "Task": "training.task",
    "every": "training.callbacks",
    "load": "using.model",
    "run": "api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"dltrain.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dltrain' has no attribute {name!r}")
