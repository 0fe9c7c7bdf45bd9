"""The library's door for programs and notebooks: what the commands `run` and `predict` do, as two functions.

import dltrain

summary = dltrain.run("digits.yaml", workers=2)     # a file, a mapping or a JobSpec
model = dltrain.load(summary["dir"])                 # dltrain.using.model
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dltrain.errors import UserError
from dltrain.observing.view import NoView, make_view
from dltrain.running.driver import Driver
from dltrain.spec import JobSpec, load_spec

__all__ = ["run"]


def run(
    spec: str | Path | Mapping[str, Any] | JobSpec, *, address: str | None = None, quiet: bool = False, **changes: Any
) -> dict[str, Any]:
    """Trains, and returns when the run has ended; the same call again resumes it.

    Args:
        spec: a YAML file, or what would be in it; `task` may be the class itself, if it is in a file.
        address: of a Ray cluster; default: RAY_ADDRESS, else a private one on this machine.
        quiet: shows nothing but warnings.
        changes: settings that replace the spec's: workers=2, or **{"optim.lr": 3e-4}.

    Returns:
        what `dltrain run --json` prints: run, dir, status, steps, eval and so on.

    Raises:
        UserError: the spec or the data are wrong, or there is no room on the cluster.
        RunFailedError: the run ended badly; its directory keeps the last good checkpoint.
        KeyboardInterrupt: it was interrupted, and has saved a checkpoint to go on from.
    """
    given = spec.to_dict() if isinstance(spec, JobSpec) else spec
    if isinstance(given, Mapping):
        given = {**given, "task": _task_name(given.get("task"))}
    if "task" in changes:
        changes["task"] = _task_name(changes["task"])
    loaded = load_spec(given, [f"{name}={_text(name, value)}" for name, value in changes.items()])
    _task_name(loaded.task)
    summary = Driver(loaded, NoView() if quiet else make_view(json=False), address).run()
    number = summary.pop("signal", None)
    if number == signal.SIGINT:
        raise KeyboardInterrupt(
            f"{loaded.name} was stopped at step {summary['steps']} and saved; run it again to go on"
        )
    if number:
        raise SystemExit(128 + number)
    return summary


def _text(name: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}: found {value!r}; a setting is what YAML can hold") from None


def _task_name(task: Any) -> Any:
    """A task's class as a spec names it; other values as they are.

    Raises:
        UserError: it can't be imported by other processes.
    """
    if isinstance(task, type):
        if "." in task.__qualname__:
            raise UserError(
                f"task: {task.__qualname__} is defined within something else; workers import it from a file"
            )
        task = f"{task.__module__}:{task.__qualname__}"
    if isinstance(task, str) and task.startswith("__main__:"):
        name = task.partition(":")[2]
        raise UserError(
            f"task: {name} is defined in the notebook or script that runs this, which workers can't import. Put it "
            f"into a file of its own (in a notebook: a cell that begins with %%writefile task.py) and give "
            f"task='task.py:{name}'"
        )
    return task
