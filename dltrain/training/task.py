"""The task: what a user writes. About 20 lines; the framework does the rest.

class ImageCnn(Task):
    columns = ("image", "label")
    def build(self) -> nn.Module: ...
    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch: ...
    def loss(self, model, batch) -> Tensor: ...
    def evaluate(self, model, batch) -> dict[str, Sum]: ...
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dltrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from torch import nn

    from dltrain.data.batch import Batch, Keys, Sum

__all__ = ["Task", "check_task", "load_collate", "load_task"]


class Task:
    """Base class of a user's task; `args` of the spec are given to its constructor."""

    columns: ClassVar[tuple[str, ...] | None] = None
    """Columns that `collate` needs; None reads all of them. `data.columns` overrides it."""

    def build(self) -> nn.Module:
        """The network, on the CPU, weights initialised (the seed is set before)."""
        raise NotImplementedError(f"{type(self).__name__}.build must return the network")

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        """Arrow rows in, tensors out. Runs in a background thread; randomness comes from `keys.rng(row)`."""
        raise NotImplementedError(f"{type(self).__name__}.collate must turn rows into a Batch")

    def loss(self, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """A scalar: the mean over `batch.count` units."""
        raise NotImplementedError(f"{type(self).__name__}.loss must return a scalar tensor")

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> dict[str, Sum]:
        """Sums and counts by metric; the framework adds them up over all batches and ranks."""
        from dltrain.data.batch import Sum

        return {"loss": Sum(float(self.loss(model, batch)) * batch.count, batch.count)}


def check_task(name: str, cwd: str) -> None:
    """Finds the class in its source without importing it (that would import torch).

    Raises:
        UserError: no such module, file or class.
    """
    module, _, cls = name.rpartition(":")
    path = _source(module, cwd)
    try:
        names = {n for node in ast.parse(path.read_text()).body for n in _defines(node)}
    except SyntaxError as error:
        raise UserError(f"task: {path}, line {error.lineno}: {error.msg}") from None
    if cls not in names and "*" not in names:
        classes = sorted(n for n in names if n[:1].isupper())
        raise UserError(f"task: {path} has no class {cls!r}; it has {', '.join(classes) or 'none'}")


def load_task(name: str, args: Mapping[str, Any], cwd: str) -> Task:
    """Imports the class and constructs it with `args`.

    Raises:
        UserError: it can't be found, is not a Task, or does not take these arguments.
    """
    module_name, _, cls = name.rpartition(":")
    check_task(name, cwd)
    module = _import_file(_source(module_name, cwd)) if module_name.endswith(".py") else _import(module_name, cwd)
    found = getattr(module, cls)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"task: {name} is not a dltrain.Task; derive your class from it")
    _check_args(found, args)
    return found(**args)


def load_collate(name: str, args: Mapping[str, Any], cwd: str) -> Any:
    """The `collate` of a task of its own, for a process that does nothing else."""
    return load_task(name, args, cwd).collate


def _check_args(cls: type[Task], args: Mapping[str, Any]) -> None:
    import inspect

    try:
        inspect.signature(cls).bind(**args)
    except TypeError as error:
        raise UserError(f"args: {error}; {cls.__name__}{inspect.signature(cls)}") from None


def _source(module: str, cwd: str) -> Path:
    if module.endswith(".py"):
        path = Path(cwd, module)
        if not path.is_file():
            raise UserError(f"task: no file {path}; `task` is package.module:Class or path.py:Class")
        return path
    with_cwd(cwd)
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None or not found.origin:
        raise UserError(f"task: no module {module!r} in {cwd} or the installed packages; run from its parent directory")
    return Path(found.origin)


def with_cwd(cwd: str) -> None:
    """Puts the user's directory first on the import path, where a script's own would be."""
    if cwd not in sys.path:
        sys.path.insert(0, cwd)


def _import(module: str, cwd: str) -> Any:
    with_cwd(cwd)
    return importlib.import_module(module)


def _import_file(path: Path) -> Any:
    name = f"dltrain_task_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
