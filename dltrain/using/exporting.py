"""A trained network as files that others can use: weights and what they are of, or a graph without Python.

export("image-cnn", "taken", format="safetensors")    # taken/model.safetensors and taken/config.json, for `load`
export("image-cnn", "model.onnx", format="onnx")       # also "torchscript", "pt2": dltrain.using.graphs
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dltrain import __version__
from dltrain.errors import UserError
from dltrain.store import Store, open_store
from dltrain.using.finding import CONFIG, FORMAT, WEIGHTS, find_trained, schema_text

if TYPE_CHECKING:
    import torch

__all__ = ["FORMATS", "export", "write_folder"]

# format -> the file's name where only a folder is given.
FORMATS = {"safetensors": WEIGHTS, "torchscript": "model.pt", "pt2": "model.pt2", "onnx": "model.onnx"}


def export(
    name: str,
    target: str,
    step: str = "best",
    format: str = "safetensors",
    network: str = "",
    code: str | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint's network.

    Args:
        name: of the run, or its URL.
        target: a file with the format's suffix, else a folder; a path or URL.
        network: of several, the one whose graph is written.
        code: where the task is imported from.

    Returns:
        what was written, ready for JSON.

    Raises:
        UserError: no such run or checkpoint, or the network can't be written so.
    """
    if format not in FORMATS:
        raise UserError(f"--format is {format!r}; it can be {', '.join(FORMATS)}")
    folder, file = _place(target, format, network)
    if format != "safetensors":
        from dltrain.using.graphs import export_graph

        return export_graph(name, step, format, folder, file, network, code)
    trained = find_trained(name, step)
    done = write_folder(
        folder.url,
        trained.weights(),
        file=file,
        run=trained.run,
        task=trained.task,
        args=trained.args,
        columns=trained.columns,
        schema=trained.schema,
        step=trained.step,
        metrics=trained.metrics,
        code=code,
    )
    return {"run": trained.run, "step": trained.step, "format": format, **done}


def _place(target: str, format: str, network: str) -> tuple[Store, str]:
    """The folder, and the file in it."""
    stem, suffix = os.path.splitext(FORMATS[format])
    if target.endswith(suffix):
        parent, _, file = target.rpartition("/")
        return open_store(parent or ("/" if target.startswith("/") else ".")), file
    return open_store(target), f"{stem}-{network}{suffix}" if network else stem + suffix


def write_folder(
    target: str,
    state: Mapping[str, torch.Tensor],
    *,
    file: str = WEIGHTS,
    run: str,
    task: str,
    args: Mapping[str, Any],
    columns: Sequence[str] | None = None,
    schema: pa.Schema | None = None,
    step: int,
    metrics: Mapping[str, float] | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """Writes weights, config.json, and the task's file where the task is one, so that `load` needs nothing else.

    Args:
        code: directory in which the task's file is; default: this one.

    Raises:
        UserError: there is a config.json of something else.
    """
    from safetensors.torch import save

    folder = open_store(target)
    _check_ours(folder)
    data = save({k: v.contiguous() for k, v in state.items()}, metadata={"format": "pt", "step": str(step)})
    folder.write(file, data)
    copied = _copy_task(folder, task, code or os.getcwd())
    config = {
        "dltrain_format": FORMAT,
        "dltrain": __version__,
        "run": run,
        "task": task,
        "args": dict(args),
        "step": step,
        "metrics": dict(metrics or {}),
        "weights": file,
        "sha256": hashlib.sha256(data).hexdigest(),
        "columns": list(columns) if columns else None,
        "column_types": {f.name: str(f.type) for f in schema} if schema else {},
        "schema": schema_text(schema or pa.schema([])),
        "tensors": {name: {"dtype": str(t.dtype)[6:], "shape": list(t.shape)} for name, t in state.items()},
    }
    # Last: with it the folder can be loaded.
    folder.write(CONFIG, json.dumps(config, indent=1).encode())
    where = folder.url.rstrip("/")
    return {
        "file": f"{where}/{file}",
        "bytes": len(data),
        "config": f"{where}/{CONFIG}",
        "task_file": f"{where}/{copied}" if copied else None,
    }


def _check_ours(folder: Store) -> None:
    """What is not ours is not written over."""
    try:
        found = json.loads(folder.read(CONFIG))
    except FileNotFoundError:
        return
    except ValueError:
        found = None
    if not isinstance(found, dict) or "dltrain_format" not in found:
        raise UserError(f"{folder.url} has a {CONFIG} of something else; name another place with --to")


def _copy_task(folder: Store, task: str, code: str) -> str:
    """The name of the task's file, where it is one by itself and was found; a module is imported by its name."""
    module = task.rpartition(":")[0]
    path = os.path.join(code, module)
    if not module.endswith(".py") or not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        folder.write(os.path.basename(module), file.read())
    return os.path.basename(module)
