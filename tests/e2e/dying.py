"""Tasks of jobs whose last rank is killed once, after a step.

Dying = dying("gan_image")      # args: {marker: a file that says that it has happened, step: after which}
"""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path
from typing import Any

from dltrain import Callback, Task
from dltrain.training.callbacks import Moment


def dying(name: str) -> type[Task]:
    """The task of jobs.NAME, which takes the job's own args as well."""
    module = importlib.import_module(f"jobs.{name}")
    (job,) = (
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Task) and one.__module__ == module.__name__
    )

    class Dying(job):  # type: ignore[misc, valid-type]
        def __init__(self, marker: str, step: int, **args: Any) -> None:
            super().__init__(**args)

            def die(moment: Moment) -> None:
                if moment.rank == moment.num_ranks - 1 and moment.step == step and not Path(marker).exists():
                    Path(marker).touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            self.callbacks = (*self.callbacks, Callback(die))

    return Dying
