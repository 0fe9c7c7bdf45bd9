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
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dltrain.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from torch import nn

    from dltrain.artifact import Artifact
    from dltrain.data.batch import Batch, Keys, Sum
    from dltrain.data.raw import Input
    from dltrain.spec import OptimSpec
    from dltrain.training.callbacks import Callback
    from dltrain.training.networks import Networks

__all__ = ["Task", "check_networks", "check_task", "load_collate", "load_task", "networks_of"]


class Task:
    """Base class of a user's task; `args` of the spec are given to its constructor."""

    columns: ClassVar[tuple[str, ...] | None] = None
    """Columns that `collate` needs; None reads all of them. `data.columns` overrides it."""
    target_columns: ClassVar[tuple[str, ...]] = ()
    """Those of them that `predict` does without: where they are missing, `collate` gets blanks (0, "", empty)."""
    jointly: ClassVar[bool] = False
    """Of several networks: all losses of a step are of the same weights, and updates follow them; see `step`."""

    callbacks: Sequence[Callback] = ()
    """Functions to be called while it trains: `every(100, function)`; see docs/trackers.md."""

    def build(self) -> nn.Module | dict[str, nn.Module]:
        """The network, on the CPU, weights initialised (the seed is set before); several as a dict, see `step`."""
        raise NotImplementedError(f"{type(self).__name__}.build must return the network")

    def collate(self, rows: pa.RecordBatch, keys: Keys) -> Batch:
        """Arrow rows in, tensors out. Runs in a background thread; randomness comes from `keys.rng(row)`."""
        raise NotImplementedError(f"{type(self).__name__}.collate must turn rows into a Batch")

    def loss(self, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """A scalar: the mean over `batch.count` units."""
        raise NotImplementedError(f"{type(self).__name__}.loss must return a scalar tensor")

    def step(self, networks: Networks, batch: Batch) -> dict[str, torch.Tensor]:
        """Of several networks: the loss of the one whose turn it is, `{networks.turn: loss}`, a mean as in `loss`.

        Each has its turn in every step, in the order of `build`: a backward pass and an update of its own, while the
        others' weights are constants. `networks[name]` is called like the network itself. With `jointly` no network is
        changed before all have had their turns: one loss of several networks, returned in each turn, trains them as
        one network would be.
        """
        raise NotImplementedError(f"{type(self).__name__}.step must return the loss of networks.turn")

    def optimizer(self, network: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """With `optim.name: task`: the optimizer of a network (of a single one the name is "").

        Args:
            groups: parameters that are trained, as torch's optimizers take them, with their `weight_decay`.
        """
        raise NotImplementedError(f"{type(self).__name__}.optimizer must return a torch.optim.Optimizer")

    def evaluate(self, model: Callable[..., Any], batch: Batch) -> dict[str, Sum]:
        """Sums and counts by metric; the framework adds them up over all batches and ranks."""
        from dltrain.data.batch import Sum

        return {"loss": Sum(float(self.loss(model, batch)) * batch.count, batch.count)}

    def metrics(self, means: Mapping[str, Any]) -> Mapping[str, float]:
        """Metrics out of those of all batches and ranks together, where one is not a mean: called once an evaluation.

        Args:
            means: the quotient of each of `evaluate`'s sums; an array where its total is one.
        """
        return means

    def samples(self, model: Callable[..., Any], batch: Batch) -> list[Artifact]:
        """What a person should look at: pictures, sound, text of what the network makes of a batch.

        Called after an evaluation that is the best so far, or the run's last one, without gradients, on every rank with
        the same batch: the first of the evaluation data. Rank 0's are kept, in RUN/samples. What it raises is a note in
        the log and does not end the run, if all ranks raise it alike: don't let it depend on the rank.
        """
        raise NotImplementedError(f"{type(self).__name__}.samples must return a list of Artifact")

    # ---- once it is trained: docs/predict.md ----

    def read(self, source: Input) -> Mapping[str, Any]:
        """One thing to predict for, a file's bytes or a line, as a row of what `collate` needs, by column.

        By default it is the first of `columns`, and a line with a JSON object is the row itself.
        """
        if source.text is not None and source.text.lstrip().startswith("{"):
            return _json_row(source.text)
        if not self.columns:
            raise UserError(f"task: define `read` in {type(self).__name__}: it says what columns an input becomes")
        return {self.columns[0]: source.data if source.text is None else source.text}

    def predict(self, model: Callable[..., Any], batch: Batch) -> Sequence[Any] | Iterator[str]:
        """A result for each row: a plain value, a dict of them, an Artifact, or a dict that holds some.

        As a generator it gets one row at a time and yields pieces of text, which are shown as they come.

        Args:
            model: the network in evaluation mode, without gradients; of several a dict by name.
        """
        raise NotImplementedError(f"{type(self).__name__}.predict must return a result for each row")

    def draw(self, batch: Batch, results: Sequence[Any]) -> Sequence[Artifact]:
        """What `predict` found, for people: an Artifact for each row. Only asked for where it is looked at."""
        raise NotImplementedError(f"{type(self).__name__}.draw must return an Artifact for each row")

    def generate(self, model: Callable[..., Any], count: int) -> Sequence[Any]:
        """Results made of nothing but torch's random numbers, whose seed is set before: `predict RUN --count 16`."""
        raise NotImplementedError(f"{type(self).__name__}.generate must return what it made")

    def example(self) -> tuple[Any, ...] | None:
        """What the network's forward takes, for `checkpoint export`; None: what it gets in `evaluate` is looked at."""
        return None


def networks_of(built: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """What `build` returned, by name; a single network is called "".

    Raises:
        UserError: it is neither a network nor a dict of networks.
    """
    from torch import nn

    if isinstance(built, nn.Module):
        return {"": built}
    found = dict(built) if isinstance(built, Mapping) else {}
    if not found or not all(isinstance(m, nn.Module) and str(n).isidentifier() for n, m in found.items()):
        raise UserError(
            f"task: build returned {type(built).__name__}; it must return a torch.nn.Module, or a dict of them by name "
            "(letters, digits and underscores)"
        )
    return found


def check_networks(task: Task, names: Collection[str], optim: OptimSpec, evaluates: bool) -> None:
    """Raises UserError where what the task defines does not go with the networks that it builds.

    Args:
        names: of its networks; evaluates: there are data to evaluate on.
    """
    several, kind = "" not in names, type(task)
    if several and kind.step is Task.step:
        raise UserError(f"task: {kind.__name__}.build returns several networks; define `step`, which says their losses")
    if several and evaluates and kind.evaluate is Task.evaluate:
        raise UserError(f"task: {kind.__name__} has several networks; define `evaluate`, or leave data.eval out")
    if kind.optimizer is Task.optimizer and any(optim.of(name).name == "task" for name in names):
        raise UserError(f"optim.name: found task; define `optimizer` in {kind.__name__}, or name one of dltrain's")
    unknown = sorted(set(optim.networks) - set(names))
    if unknown:
        known = ", ".join(names) if several else "one network without a name"
        raise UserError(f"optim.networks: found {unknown[0]!r}; the task has {known}")


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


def _json_row(line: str) -> Mapping[str, Any]:
    try:
        row: Mapping[str, Any] = json.loads(line)
    except ValueError as error:
        raise UserError(f"a line that begins with {{ is taken for a row as JSON, and this is none: {error}") from None
    return row


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
    # By what is in it as well: a file that was edited since, as in a notebook, is another module.
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:8]
    name = f"dltrain_task_{path.stem}_{digest}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _defines(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom | ast.Import):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
