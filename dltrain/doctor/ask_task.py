"""A child of the doctor: imports a user's task, builds its networks, and says what they are.

echo '{"spec": {"name": ...}, "cwd": "."}' | python -m dltrain.doctor.ask_task
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from dltrain.doctor.probe import ANSWER
from dltrain.errors import UserError
from dltrain.spec import JobSpec


def main() -> None:
    """Reads the question, prints the answer as JSON on a line of its own."""
    question = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = _look(question)
        except UserError as error:
            found = {"error": str(error)}
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            found = {"error": f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"}
    print(ANSWER + json.dumps(found), flush=True)


def _look(question: Mapping[str, Any]) -> dict[str, Any]:
    from dltrain.training.task import check_networks, load_task, networks_of

    spec = JobSpec.model_validate(question["spec"])
    task = load_task(spec.task, spec.args, question["cwd"])
    import torch
    from torch import nn

    from dltrain.training.initial import shape_networks

    torch.manual_seed(spec.train.seed)
    modules = networks_of(task.build())
    check_networks(task, modules, spec.optim, spec.data.eval is not None)
    shape_networks(modules, spec)
    # The class that all kinds of it derive from has no public name.
    norms = nn.modules.batchnorm._BatchNorm
    return {
        "columns": list(task.columns) if task.columns is not None else None,
        "parameters": sum(p.numel() for module in modules.values() for p in module.parameters()),
        "networks": [name for name in modules if name],
        "batch_norm": any(isinstance(m, norms) for module in modules.values() for m in module.modules()),
    }


if __name__ == "__main__":
    main()
