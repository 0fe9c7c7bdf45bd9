"""A trained network ready for use, with the task that it was trained by.

    model = load("image-cnn")                          # a run's name or URL, or an exported folder; step="best"
    model.predict([Path("seven.png"), {"image": b"..."}])
    model.generate(16, seed=3)                          # of a task that makes things out of nothing
    model.module, model.task, model.step, model.metrics

A batch goes the way it went in training: `read` makes rows of inputs, `collate` a batch of rows, `predict` a result for
each.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from dltrain.data.batch import Batch, Keys
from dltrain.data.order import key
from dltrain.data.raw import Input
from dltrain.errors import BadRowsError, DltrainError, TaskError, UserError
from dltrain.running.worker import trace_of
from dltrain.training.task import Task, check_task, load_task, networks_of
from dltrain.using.finding import Trained, find_trained
from dltrain.using.items import Item, held, is_many
from dltrain.using.rows import Columns

__all__ = ["Found", "Model", "defines", "load", "own_code"]

_ROWS = 64
I64 = np.ndarray[Any, np.dtype[np.int64]]


class Found(NamedTuple):
    """What came of one input: a result, or the reason why there is none; and what `draw` made of it."""

    value: Any = None
    error: str = ""
    drawn: Any = None


def load(
    run: str,
    step: str | int = "best",
    *,
    device: str | torch.device | None = None,
    args: Mapping[str, Any] | None = None,
    code: str | None = None,
) -> Model:
    """Loads a trained network.

    Args:
        run: a run's name (under ./runs or $DLTRAIN_RUNS) or URL, or that of a folder that was exported.
        step: `best`, `newest` or a number.
        device: where it computes; default: a GPU where there is one.
        args: replace those that the task was trained with; the network must stay the same.
        code: the directory that the task is imported from; default: this one.

    Raises:
        UserError: no such run or checkpoint, or the task can't be found or builds another network.
    """
    trained = find_trained(run, str(step))
    task = _load_task(trained, args or {}, code)
    with own_code("build"):
        modules = networks_of(task.build())
    _fill(modules, trained.weights(), trained)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Model(trained, task, modules, where)


class Model:
    """What `load` returns.

    Attributes:
        task: an instance of the task's class; module: the network, of several a dict by name.
        trained: where it came from; columns: what its rows are made of.
        step, metrics: of the checkpoint.
    """

    def __init__(self, trained: Trained, task: Task, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        self.trained, self.task, self.device = trained, task, device
        self.step, self.metrics = trained.step, dict(trained.metrics)
        self.modules = {name: module.to(device).eval() for name, module in modules.items()}
        self.module: Any = self.modules.get("", self.modules)
        needed = trained.columns or task.columns or tuple(trained.schema.names)
        self.columns = Columns(needed, task.target_columns, trained.schema, trained.task)

    def __repr__(self) -> str:
        return f"<Model {self.trained.run} of step {self.step}, {self.trained.task}, on {self.device}>"

    @property
    def streams(self) -> bool:
        """Whether `predict` yields text piece by piece."""
        return inspect.isgeneratorfunction(self.task.predict)

    # ---- use ----

    def predict(self, inputs: Any, *, batch: int = _ROWS, seed: int = 0) -> Any:
        """A result for each input; of a single one its result.

        Args:
            inputs: paths, text, bytes, dicts, or a table (`dltrain.using.items.held`).
            batch: rows of a forward pass.
            seed: of torch's random numbers; the same for the same inputs and batch.

        Raises:
            UserError: an input can't be used, or the task has no `predict`.
            TaskError: the task raised.
        """
        values = [found.value for found in self._all(inputs, batch, seed)]
        return values if is_many(inputs) else values[0]

    def draw(self, inputs: Any, *, batch: int = _ROWS, seed: int = 0) -> Any:
        """What it found for each input, for people: an Artifact each; raises as `predict`."""
        if not defines(self.task, "draw"):
            raise UserError(f"task: {self.trained.task} has no `draw`, which makes pictures or sound of results")
        drawn = [found.drawn for found in self._all(inputs, batch, seed, drawn=True)]
        return drawn if is_many(inputs) else drawn[0]

    def stream(self, source: Any, *, seed: int = 0) -> Iterator[str]:
        """The result for one input in pieces, of a `predict` that yields them; else as one piece."""
        (item,) = held(source)
        yield from self.pieces(item, seed)

    def generate(self, count: int = 1, *, seed: int = 0) -> list[Any]:
        """What the task makes out of nothing, with this seed."""
        if not defines(self.task, "generate"):
            raise UserError(f"task: {self.trained.task} makes nothing without an input: it has no `generate`")
        with self._own("generate", seed):
            return list(self.task.generate(self.module, count))

    def _all(self, inputs: Any, batch: int, seed: int, drawn: bool = False) -> Iterator[Found]:
        items = held(inputs)
        size = 1 if self.streams else batch
        for first in range(0, len(items), size):
            some = items[first : first + size]
            for item, found in zip(some, self.of_items(some, seed, first, drawn), strict=True):
                if found.error:
                    raise UserError(f"{item.name}: {found.error}")
                yield found

    # ---- one batch ----

    def of_items(self, items: Sequence[Item], seed: int = 0, first: int = 0, drawn: bool = False) -> list[Found]:
        """What came of each of a batch's items; the first of them is number `first` of all."""
        self.check_predicts()
        read = [self._read(item) for item in items]
        good = [i for i, row in enumerate(read) if isinstance(row, Mapping)]
        found = {i: Found(error=str(row)) for i, row in enumerate(read) if i not in good}
        if good:
            rows = self.columns.rows([read[i] for i in good], [items[i].name for i in good])  # type: ignore[misc]
            ids = np.array(good, np.int64) + first
            found |= dict(zip(good, self.of_rows(rows, ids, seed, drawn), strict=True))
        return [found[i] for i in range(len(items))]

    def of_rows(self, rows: pa.RecordBatch, ids: I64, seed: int = 0, drawn: bool = False) -> list[Found]:
        """What came of each row; rows that `collate` refuses are left out and told.

        Args:
            ids: (rows,), numbers that `collate` may know them by; the first one also keys the random numbers.
        """
        self.check_predicts()
        bad: dict[int, str] = {}
        while len(bad) < rows.num_rows:
            good = [i for i in range(rows.num_rows) if i not in bad]
            try:
                batch = self.collate(rows.take(pa.array(good)) if bad else rows, ids[good])
            except BadRowsError as error:
                bad |= {good[i]: reason for i, reason in zip(error.rows, error.reasons, strict=True)}
                continue
            values = iter(self._of_batch(batch, len(good), int(ids[good[0]]), seed, drawn))
            return [Found(error=bad[i]) if i in bad else next(values) for i in range(rows.num_rows)]
        return [Found(error=bad[i]) for i in range(rows.num_rows)]

    def pieces(self, item: Item, seed: int = 0, number: int = 0) -> Iterator[str]:
        """The text of one item's result as it is made."""
        self.check_predicts()
        row = self._read(item)
        if isinstance(row, Exception):
            raise UserError(f"{item.name}: {row}")
        rows = self.columns.rows([row], [item.name])
        try:
            batch = self.collate(rows, np.array([number], np.int64))
        except BadRowsError as error:
            raise UserError(f"{item.name}: {'; '.join(error.reasons)}") from None
        # Not forked: whoever takes the pieces has the generators meanwhile.
        torch.manual_seed(key(seed, number) >> 1)
        found = _guarded(self.task.predict(self.module, batch), "predict")
        if self.streams:
            yield from found
        else:
            yield from map(str, found)

    def collate(self, rows: pa.RecordBatch, ids: I64) -> Batch:
        """The task's batch of these rows, on this device."""
        with own_code("collate"):
            batch = self.task.collate(rows, Keys(0, np.zeros_like(ids), ids))
        if not isinstance(batch, Batch):
            raise UserError(f"task: collate returned {type(batch).__name__}; it must return a Batch")
        return batch.to(self.device)

    def check_predicts(self) -> None:
        """Raises UserError where the task has no `predict`."""
        if not defines(self.task, "predict"):
            hint = "; it has `generate`: give --count instead of inputs" if defines(self.task, "generate") else ""
            raise UserError(f"task: {self.trained.task} has no `predict`, which says what is done with a batch{hint}")

    def _read(self, item: Item) -> Mapping[str, Any] | Exception:
        if not isinstance(item, Input):
            return item.values
        try:
            with own_code("read"):
                row = self.task.read(item)
        except BadRowsError as error:
            return UserError("; ".join(error.reasons))
        except UserError as error:
            return error
        if not isinstance(row, Mapping):
            raise UserError(f"task: read returned {type(row).__name__}; it must return a row: a dict by column")
        return row

    def _of_batch(self, batch: Batch, count: int, number: int, seed: int, drawn: bool) -> list[Found]:
        with self._own("predict", key(seed, number) >> 1):
            made = self.task.predict(self.module, batch)
            values = ["".join(made)] if self.streams else _listed(made, count, "predict")
        pictures = [None] * count
        if drawn and defines(self.task, "draw"):
            with self._own("draw", key(seed, number) >> 1):
                pictures = _listed(self.task.draw(batch, values), count, "draw")
        return [Found(value, drawn=picture) for value, picture in zip(values, pictures, strict=True)]

    @contextmanager
    def _own(self, what: str, seed: int) -> Iterator[None]:
        """The task's code: without gradients, with random numbers of its own."""
        devices = [self.device] if self.device.type == "cuda" else []
        with own_code(what), torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield


def _guarded(made: Any, what: str) -> Iterator[Any]:
    """What an iterator gives, its code run without gradients."""
    found = iter(made)
    while True:
        with own_code(what), torch.no_grad():
            try:
                piece = next(found)
            except StopIteration:
                return
        yield piece


def _listed(made: Any, count: int, what: str) -> list[Any]:
    values = made.tolist() if hasattr(made, "tolist") else made
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise UserError(f"task: {what} returned {type(made).__name__}; it must return a list, a result for each row")
    if len(values) != count:
        raise UserError(f"task: {what} returned {len(values)} results for {count} rows; it must return one for each")
    return list(values)


def defines(task: Task, name: str) -> bool:
    """Whether a task has a method of its own of what `Task` only declares."""
    return getattr(type(task), name) is not getattr(Task, name)


@contextmanager
def own_code(what: str) -> Iterator[None]:
    """Turns what the user's code raises into a TaskError with the user's part of the traceback."""
    try:
        yield
    except DltrainError:
        raise
    except Exception as error:
        text = f"{what} of the task raised {type(error).__name__}: {error}"
        raise TaskError(text, -1, -1, trace_of(error)) from error


# ---- loading ----


def _load_task(trained: Trained, args: Mapping[str, Any], code: str | None) -> Task:
    if not trained.task:
        raise UserError(f"{trained.url} says no task; it was imported without one: import it again with --spec")
    with trained.code_at(code) as places:
        for place in places:
            try:
                check_task(trained.task, place)
            except UserError as error:
                refused = error
                continue
            with own_code("loading"):
                return load_task(trained.task, {**trained.args, **args}, place)
    raise UserError(
        f"{refused}. Where the task is elsewhere, name its directory with --code (`code=` of load)"
    ) from None


def _fill(modules: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor], trained: Trained) -> None:
    """Loads the weights; of several networks their names begin with the network's."""
    faults = []
    for network, module in modules.items():
        prefix = f"{network}." if network else ""
        mine = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        try:
            module.load_state_dict(mine)
        except RuntimeError as error:
            faults += [line.strip() for line in str(error).splitlines()[1:]]
    known = tuple(f"{network}." if network else "" for network in modules)
    faults += [f"no network for {name}" for name in state if not name.startswith(known)]
    if faults:
        raise UserError(
            f"{trained.task} builds another network than the one that was trained: {'; '.join(faults[:3])}. "
            "See that the code and `args` are those of the run"
        )
