"""A network as a graph that runs without this code: TorchScript, torch.export's, or ONNX, compared with the network.

graph = Graph(model.module, (torch.zeros(2, 1, 8, 8),), {})
data = graph.onnx(); graph.difference     # of its outputs from the network's

What the forward takes, the task's `example` says; else the first call of the network in `evaluate` is looked at, on a
few rows of the evaluation's data. Dimensions that the example does not fix are free where the exporter can do it.
"""

from __future__ import annotations

import importlib
import inspect
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from dltrain.data.dataset import read_dataset
from dltrain.data.packing import Pack
from dltrain.data.reader import UnitReader
from dltrain.data.windows import one_batch
from dltrain.errors import MissingExtraError, RunFailedError, UserError
from dltrain.spec import JobSpec
from dltrain.store import Store
from dltrain.using.model import Model, load, own_code

__all__ = ["Graph", "example_of", "export_graph"]

# Different from 1 and from the sizes that networks are made of, so that what depends on it can be told.
_ROWS = 5
_RTOL, _ATOL = 1e-3, 1e-4
Call = tuple[tuple[Any, ...], dict[str, Any]]


def export_graph(
    name: str, step: str, format: str, folder: Store, file: str, network: str, code: str | None
) -> dict[str, Any]:
    """Writes one network of a trained model; see `exporting.export`.

    Raises:
        UserError: it can't be written so; RunFailedError: it computes something else then.
    """
    model = load(name, step, device="cpu", code=code)
    if network not in model.modules:
        names = ", ".join(model.modules) or "one without a name"
        raise UserError(f"--network is {network!r}; {model.trained.task} has {names}")
    args, kwargs = example_of(model, network)
    graph = Graph(model.modules[network], args, kwargs)
    made: dict[str, Callable[[], bytes]] = {
        "torchscript": graph.torchscript,
        "pt2": graph.pt2,
        "onnx": lambda: graph.onnx({"dltrain.run": model.trained.run, "dltrain.step": str(model.step)}),
    }
    data = made[format]()
    folder.write(file, data)
    return {
        "run": model.trained.run,
        "step": model.step,
        "format": format,
        "file": f"{folder.url.rstrip('/')}/{file}",
        "bytes": len(data),
        "inputs": graph.inputs,
        "difference": graph.difference,
        "compared_with": graph.runner,
        "notes": graph.notes,
    }


# ---- what the forward takes ----


def example_of(model: Model, network: str = "") -> Call:
    """Arguments and keyword arguments of a network's forward.

    Raises:
        UserError: neither the task nor the data say them.
    """
    with own_code("example"):
        given = model.task.example()
    if given is not None:
        return tuple(given), {}
    seen: list[Call] = []

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = model.modules[network].register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad(), own_code("evaluate"):
            model.task.evaluate(model.module, _some_batch(model))
    finally:
        handle.remove()
    if not seen:
        raise UserError(
            f"task: `evaluate` of {model.trained.task} does not call the network {network!r}, so its inputs can't be "
            "told; define `example`, which returns the tensors that its forward takes"
        )
    return seen[0]


def _some_batch(model: Model) -> Any:
    if model.trained.spec is None:
        raise UserError(
            f"{model.trained.url} knows no data, so the network's inputs can't be told; define `example` in the task, "
            "or export from the run"
        )
    data = JobSpec.model_validate(model.trained.spec).data
    url = data.eval or data.sources[0].url
    pack = Pack(data.pack.column, data.pack.length) if data.pack else None
    columns = list(model.columns.needed)
    try:
        catalog = read_dataset(url, None if pack else columns, "data", pack=pack)
        reader = UnitReader(catalog, columns)
        table = reader.read(0).slice(0, _ROWS)
        reader.close()
    except UserError as error:
        raise UserError(f"the network's inputs are looked up in its data, and: {error}. Or define `example`") from None
    return model.collate(one_batch(table), np.arange(table.num_rows, dtype=np.int64))


# ---- the graph ----


class Graph:
    """One network and an example of what it takes.

    Attributes:
        inputs: their types and shapes, of those written last; a size that is free is a word.
        difference: the largest of the outputs' from the network's; runner: what computed them.
        notes: what the exporter warned of.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._module, self._args, self._kwargs = module, args, dict(kwargs)
        odd = [type(leaf).__name__ for leaf in self._leaves(args, kwargs) if not isinstance(leaf, torch.Tensor)]
        if odd:
            raise UserError(
                f"the network's forward takes {odd[0]}; a graph takes tensors alone: make `example` return them"
            )
        self.inputs: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.difference, self.runner = 0.0, "torch"

    def torchscript(self) -> bytes:
        """For `torch.jit.load` and torch's C++ runtime."""
        sink = io.BytesIO()
        with self._exporting("TorchScript"):
            bound = inspect.signature(self._module.forward).bind(*self._args, **self._kwargs)
            given = {"example_kwarg_inputs": dict(bound.arguments)} if self._kwargs else {"example_inputs": self._args}
            # Its own check compares with a tolerance of its own.
            traced: Any = torch.jit.trace(self._module, strict=False, check_trace=False, **given)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, sink)
        self._describe(self._shapes())
        self._compare(traced)
        return sink.getvalue()

    def pt2(self) -> bytes:
        """For `torch.export.load`."""
        program = self._program()
        self._compare(program.module())
        sink = io.BytesIO()
        torch.export.save(program, sink)
        return sink.getvalue()

    def onnx(self, facts: Mapping[str, str] | None = None) -> bytes:
        """For anything that reads ONNX.

        Args:
            facts: written into its metadata.

        Raises:
            MissingExtraError: a package for it is not installed.
        """
        for package in ("onnx", "onnxscript"):
            try:
                importlib.import_module(package)
            except ImportError:
                raise MissingExtraError(package, "onnx") from None
        program = self._program()
        with self._exporting("ONNX"):
            made: Any = torch.onnx.export(program, (), dynamo=True, verbose=False)
        made.model.metadata_props.update(facts or {})
        with tempfile.TemporaryDirectory(prefix="dltrain-onnx-") as directory:
            path = os.path.join(directory, "model.onnx")
            made.save(path)
            self._compare(_onnx_runner(path, self))
            with open(path, "rb") as file:
                return file.read()

    # ---- how ----

    def _program(self) -> Any:
        """What torch.export makes of it, with as many free sizes as it can."""
        free = pytree.tree_map(
            lambda t: dict.fromkeys(range(t.dim()), torch.export.Dim.AUTO), (self._args, self._kwargs)
        )
        bound = inspect.signature(self._module.forward).bind(*self._args, **self._kwargs)
        names = list(bound.arguments)
        shapes = dict(zip(names, [*free[0], *free[1].values()], strict=False))
        with self._exporting("torch.export"):
            program = torch.export.export(self._module, self._args, self._kwargs, dynamic_shapes=shapes)
        found = [
            n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in _user_inputs(program)
        ]
        self._describe([tuple(t.shape) for t in found])
        return program

    @contextmanager
    def _exporting(self, what: str) -> Iterator[None]:
        try:
            with warnings.catch_warnings(record=True) as caught, torch.no_grad(), _quiet():
                warnings.simplefilter("always")
                yield
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{what} can't make a graph of this network: {first}. safetensors always can; in a task's forward, "
                "branches and loops that depend on values are what exporters stumble over"
            ) from error
        # What is deprecated is torch's affair; that a trace does not follow a branch is the user's.
        self.notes += [str(w.message).splitlines()[0] for w in caught if w.category.__name__ == "TracerWarning"]

    def _leaves(self, args: Any, kwargs: Any) -> list[Any]:
        found: list[Any] = pytree.tree_leaves((args, dict(kwargs)))
        return found

    def _shapes(self) -> list[tuple[Any, ...]]:
        """Of a trace: the first dimension is taken for rows."""
        return [("rows", *t.shape[1:]) if t.dim() else () for t in self._leaves(self._args, self._kwargs)]

    def _describe(self, shapes: Sequence[Sequence[Any]]) -> None:
        leaves = self._leaves(self._args, self._kwargs)
        self.inputs = [
            {"dtype": str(t.dtype)[6:], "shape": [int(s) if str(s).isdigit() else str(s) for s in shape]}
            for t, shape in zip(leaves, shapes, strict=True)
        ]

    def _compare(self, runner: Callable[..., Any]) -> None:
        """With the network, on the example and on fewer rows of it.

        Raises:
            RunFailedError: they differ.
        """
        for args, kwargs in self._cases():
            with torch.no_grad():
                wanted = pytree.tree_leaves(self._module(*args, **kwargs))
                try:
                    found = pytree.tree_leaves(runner(*args, **kwargs))
                except Exception as error:
                    first = str(error).strip().splitlines()[0]
                    raise RunFailedError(f"the graph does not run on {_sizes(args, kwargs)}: {first}") from error
            for a, b in zip(wanted, found, strict=True):
                b = torch.as_tensor(b)
                self.difference = max(
                    self.difference, float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
                )
                if a.shape != b.shape or not torch.allclose(a.double(), b.double(), _RTOL, _ATOL, equal_nan=True):
                    raise RunFailedError(
                        f"the graph's outputs differ from the network's, by up to {self.difference:g}, on "
                        f"{_sizes(args, kwargs)}; nothing was written"
                    )

    def _cases(self) -> Iterator[Call]:
        yield self._args, self._kwargs
        free = all(not isinstance(one["shape"][0], int) for one in self.inputs if one["shape"])
        if free:
            yield pytree.tree_map(lambda t: t[:2] if t.dim() else t, (self._args, self._kwargs))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch logs and prints of its own workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _user_inputs(program: Any) -> set[str]:
    return set(program.graph_signature.user_inputs)


def _sizes(args: Any, kwargs: Any) -> str:
    return ", ".join("x".join(map(str, t.shape)) for t in pytree.tree_leaves((args, kwargs)))


def _onnx_runner(path: str, graph: Graph) -> Callable[..., Any]:
    """onnxruntime where it is installed, else the reference that comes with onnx."""
    try:
        import onnxruntime

        session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        graph.runner = "onnxruntime"
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(path)
        names = list(session.input_names)
        graph.runner = "onnx.reference"

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        given = dict(zip(names, (t.numpy() for t in leaves), strict=True))
        return [torch.from_numpy(np.asarray(one)) for one in session.run(None, given)]

    return run
