"""Where a trained network is: a run and one of its checkpoints, or a folder that `checkpoint export` wrote.

trained = find_trained("image-cnn", "best")        # a name, a run's URL, or an exported folder's
trained.task, trained.step, trained.metrics
trained.weights()                                   # name -> fp32 tensor
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dltrain.checkpoint.commit import Checkpoint, find, list_checkpoints
from dltrain.errors import UserError
from dltrain.observing.journal import is_local
from dltrain.running.rundir import RunDir, find_run
from dltrain.store import Store, open_store

if TYPE_CHECKING:
    import torch

__all__ = ["CONFIG", "FORMAT", "WEIGHTS", "Trained", "find_trained", "read_schema", "schema_text", "weights_of"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Of config.json; a later one may mean something else.
FORMAT = 1


@dataclass(frozen=True)
class Trained:
    """A trained network, and what it takes to build and feed it.

    Attributes:
        run: its name; url: of the run's directory, or of the exported folder.
        task, args: as in a spec; columns: of the spec, where it names some.
        schema: of the training data.
        step: optimizer steps; metrics: of its evaluation, by name.
        identity: names these very weights.
        code: of an exported folder, the store that the task's file is in as well.
        weights: reads them.
        spec: of the run, as plain values; None of a folder.
    """

    run: str
    url: str
    task: str
    args: Mapping[str, Any]
    columns: tuple[str, ...] | None
    schema: pa.Schema
    step: int
    metrics: Mapping[str, float]
    identity: str
    weights: Callable[[], dict[str, torch.Tensor]]
    code: Store | None = None
    spec: Mapping[str, Any] | None = None

    @contextmanager
    def code_at(self, code: str | None) -> Iterator[list[str]]:
        """Directories to look for the task in, for a while: those of an exported folder may be fetched first."""
        here = [os.path.abspath(code) if code else os.getcwd()]
        module = self.task.rpartition(":")[0]
        if code or self.code is None or not (module.endswith(".py") and self.code.exists(os.path.basename(module))):
            yield here
        elif is_local(self.code):
            yield [self.code.root, *here]
        else:
            with tempfile.TemporaryDirectory(prefix="dltrain-task-") as directory:
                name = os.path.basename(module)
                with open(os.path.join(directory, name), "xb") as out:
                    out.write(self.code.read(name))
                yield [directory, *here]


def find_trained(name: str, which: str = "best") -> Trained:
    """A run's checkpoint by the run's name or URL, or an exported folder.

    Args:
        which: `best`, `newest` or a step.

    Raises:
        UserError: there is no such run, folder or checkpoint.
    """
    folder = open_store(name)
    if folder.exists(CONFIG):
        return _exported(folder, which)
    return _of_run(find_run(name), name, which)


def weights_of(store: Store, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint is used with: the one place that chooses among those it holds."""
    from dltrain.checkpoint.export import state_dict

    return state_dict(store, checkpoint)


# ---- a run ----


def _of_run(run: RunDir, name: str, which: str) -> Trained:
    checkpoint, spec = _checkpoint(run, name, which), run.load_spec()
    plan = run.load_plan()
    return Trained(
        run=spec.name,
        url=run.url,
        task=spec.task,
        args=spec.args,
        columns=spec.data.columns,
        schema=plan.schema if plan else pa.schema([]),
        step=checkpoint.step,
        metrics=checkpoint.manifest.get("metrics") or {},
        identity=f"{run.url}/checkpoints/{checkpoint.path}",
        weights=lambda: weights_of(run.checkpoints, checkpoint),
        spec=spec.to_dict(),
    )


def _checkpoint(run: RunDir, name: str, which: str) -> Checkpoint:
    if not list_checkpoints(run.checkpoints):
        state = run.state() or {"state": "planning"}
        raise UserError(
            f"{name} has no checkpoint yet: it is {state['state']}, at step {state.get('step', 0)}. Wait for its first "
            "one (`dltrain checkpoint list` shows them; checkpoint.every sets how often), or let it run to its end"
        )
    return find(run.checkpoints, which)


# ---- an exported folder ----


def _exported(folder: Store, which: str) -> Trained:
    try:
        config = json.loads(folder.read(CONFIG))
    except ValueError as error:
        raise UserError(f"{folder.url}/{CONFIG} is not JSON: {error}") from None
    if config.get("dltrain_format") != FORMAT:
        found = config.get("dltrain_format", "nothing")
        raise UserError(
            f"{folder.url}/{CONFIG} is not of a folder that this dltrain exported: dltrain_format is {found}, "
            f"{FORMAT} is read here"
        )
    if which not in ("best", "newest", str(config["step"])):
        raise UserError(f"{folder.url} holds step {config['step']} alone, and --step {which} was asked for")
    return Trained(
        run=config["run"],
        url=folder.url,
        task=_task(config, folder),
        args=config["args"],
        columns=tuple(config["columns"]) if config["columns"] else None,
        schema=read_schema(config["schema"]),
        step=config["step"],
        metrics=config["metrics"],
        identity=f"{folder.url}@{config['sha256'][:16]}",
        weights=lambda: _load(folder, config),
        code=folder,
    )


def _task(config: Mapping[str, Any], folder: Store) -> str:
    """Its file lies in the folder under its own name, wherever it was."""
    module, _, cls = str(config["task"]).rpartition(":")
    if module.endswith(".py") and folder.exists(os.path.basename(module)):
        return f"{os.path.basename(module)}:{cls}"
    return str(config["task"])


def _load(folder: Store, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    try:
        data = folder.read(config["weights"])
    except FileNotFoundError:
        raise UserError(f"{folder.url} has no {config['weights']}, which its {CONFIG} names") from None
    if hashlib.sha256(data).hexdigest() != config["sha256"]:
        raise UserError(f"{folder.url}/{config['weights']} is not what its {CONFIG} was written with; export it again")
    return dict(load(data))


def schema_text(schema: pa.Schema) -> str:
    """A schema for a JSON file."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def read_schema(text: str) -> pa.Schema:
    """The inverse of `schema_text`."""
    return pa.ipc.read_schema(pa.BufferReader(base64.b64decode(text)))
