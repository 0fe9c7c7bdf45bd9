"""One rank's part of a run's state: copied into slots in memory, and loaded from them or from storage.

snapshots = Snapshots(engine, module, rank, num_ranks, attempt)
index = snapshots.take(step, position, applied)      # one large copy per tensor of the optimizer
snapshots.layout                                     # what is where in a slot, for the manifest
load(engine, module, FragmentReader(store, checkpoint), applied, rank, num_ranks)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dltrain.checkpoint import fragments
from dltrain.checkpoint.reader import FragmentReader
from dltrain.checkpoint.slots import Seal, SlotWriter
from dltrain.errors import CheckpointError

__all__ = ["Layout", "Snapshots", "load"]

# Two newest, one that is uploaded, one that is copied to another node, one to write into.
_SLOTS = 5
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Layout:
    """What is where in a rank's snapshots.

    Attributes:
        num_bytes: of a snapshot as a safetensors file.
        parts: [name, kind, shape, key, offset, length, start]: elements [start, start + length) of tensor `key` are
            [offset, offset + length) of the parameter, flattened.
        whole: keys of the tensors that are there in their own shape (buffers, frozen parameters).
        ties: names that share a parameter.
    """

    num_bytes: int
    parts: list[list[Any]]
    whole: list[str]
    ties: dict[str, str]


@dataclass(frozen=True)
class _Place:
    """A tensor in the file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class Snapshots:
    """Takes snapshots of one rank.

    Attributes:
        layout: what is where; another one after `take` returned when `generation` has changed.
    """

    def __init__(self, engine: Any, module: torch.nn.Module, rank: int, num_ranks: int, attempt: int) -> None:
        self._engine, self._module, self._attempt = engine, module, attempt
        self._rank, self._num_ranks = rank, num_ranks
        # Collectives under ZeRO-3, so here, where every rank is; rank 0 keeps them.
        frozen = fragments.frozen(module)
        self._frozen = {f"frozen:{name}": t.cpu() for name, t in frozen.items()} if rank == 0 else {}
        self._whole = sorted(f"frozen:{name}" for name in frozen)
        self._buffers = list(fragments.buffers(module))
        self.generation = 0
        self._sources: list[fragments.Source] = []
        self._owners: list[torch.Tensor] = []
        self._tensors: tuple[int, ...] = ()
        self._writer: SlotWriter | None = None

    @property
    def fds(self) -> list[int]:
        """Of the slots."""
        return self._writer.fds if self._writer else []

    @property
    def bytes(self) -> int:
        """Of one snapshot."""
        return self.layout.num_bytes

    def prepare(self) -> None:
        """Makes the slots, or makes them anew when the optimizer has other tensors than before."""
        if self._writer and fragments.tensor_ids(self._engine, self._owners) == self._tensors:
            return
        self._sources = sources = fragments.sources(self._engine, self._rank, self._num_ranks)
        self._owners = fragments.owners(sources)
        self._tensors = fragments.tensor_ids(self._engine, self._owners)
        if self._writer:
            self._writer.close()
        keys = _keys(sources)
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for key, source in zip(keys, sources, strict=True):
            tensors[key] = torch.float32, (source.hi - source.lo,)
        for name, value in self._constant_and_buffers().items():
            tensors[name] = (value.dtype, tuple(value.shape))
        head, places = _lay_out(tensors)
        self._places = places
        size = len(head) + max((p.end for p in places), default=0)
        self._start = len(head)
        self._writer = SlotWriter(head, size, _SLOTS)
        self._views: dict[int, dict[str, torch.Tensor]] = {}
        self._keys = keys
        parts = [
            [p.name, s.kind, list(p.shape), key, p.offset, p.length, p.start]
            for key, s in zip(keys, sources, strict=True)
            for p in s.pieces
        ]
        whole = sorted([*self._whole, *(f"buffer:{name}" for name in self._buffers)])
        self.layout = Layout(size, parts, whole, fragments.ties(self._module))
        self.generation += 1

    def take(self, step: int, position: int, applied: int) -> int | None:
        """Copies the state into a slot and returns its index; None when all slots are needed as they are."""
        self.prepare()
        assert self._writer is not None
        index = self._writer.free()
        if index is not None:
            seal = Seal(self._attempt, step, position, applied)
            self._writer.write(index, seal, lambda: self._copy(index))
        return index

    def pin(self, index: int) -> None:
        """Keeps a slot as it is."""
        assert self._writer is not None
        self._writer.pin(index)

    def unpin(self, index: int) -> None:
        """It may be written again."""
        if self._writer:
            self._writer.unpin(index)

    def _copy(self, index: int) -> None:
        views = self._views.get(index)
        if views is None:
            views = self._views[index] = self._map(index)
            for name, value in self._frozen.items():
                views[name].copy_(value)
        with torch.no_grad():
            for key, source in zip(self._keys, self._sources, strict=True):
                views[key].copy_(source.values)
            for name in self._buffers:
                views[f"buffer:{name}"].copy_(self._module.get_buffer(name))

    def _map(self, index: int) -> dict[str, torch.Tensor]:
        assert self._writer is not None
        memory = self._writer.memory(index)
        views = {}
        for p in self._places:
            count = torch.Size(p.shape).numel()
            flat = torch.frombuffer(memory, dtype=p.dtype, count=count, offset=self._start + p.begin) if count else None
            views[p.key] = flat.reshape(p.shape) if flat is not None else torch.zeros(p.shape, dtype=p.dtype)
        return views

    def _constant_and_buffers(self) -> dict[str, torch.Tensor]:
        return self._frozen | {f"buffer:{name}": self._module.get_buffer(name) for name in self._buffers}


def _keys(sources: Sequence[fragments.Source]) -> list[str]:
    numbers: dict[str, int] = {}
    keys = []
    for source in sources:
        number = numbers[source.kind] = numbers.get(source.kind, -1) + 1
        keys.append(f"{source.kind}:{number:05d}")
    return keys


def _lay_out(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, list[_Place]]:
    """A safetensors file's beginning, and where its tensors lie after it.

    Source: the format's description; wide types first, so that every tensor is aligned to its type.
    """
    places, at, header = [], 0, {}
    for key, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        end = at + torch.Size(shape).numel() * dtype.itemsize
        places.append(_Place(key, dtype, shape, at, end))
        header[key] = {"dtype": _name(key, dtype), "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _name(key: str, dtype: torch.dtype) -> str:
    if dtype not in _DTYPES:
        raise CheckpointError(f"{key} is {dtype}, which a safetensors file can't hold; use another type for it")
    return _DTYPES[dtype]


# ---- back ----


def load(
    engine: Any, module: torch.nn.Module, reader: FragmentReader, applied: int, rank: int = 0, num_ranks: int = 1
) -> None:
    """Loads the slices this rank needs now, at any number of ranks and any ZeRO stage.

    Args:
        applied: updates that the optimizer had made.

    Raises:
        CheckpointError: the network is not the one that was saved.
    """
    _check_names(module, reader)
    fragments.restore(engine, reader.read, reader.has, applied)
    saved = reader.buffers(rank, num_ranks)
    with torch.no_grad():
        for name, buffer in fragments.buffers(module).items():
            if name in saved:
                buffer.copy_(saved[name])
    fragments.restore_frozen(module, reader.whole("frozen:"))


def _check_names(module: torch.nn.Module, reader: FragmentReader) -> None:
    names = {n for n, p in module.named_parameters() if p.requires_grad}
    differ = sorted(names ^ set(reader.names))
    if differ:
        raise CheckpointError(
            f"the network has {len(names)} trainable parameters and the checkpoint {len(reader.names)}; "
            f"they differ in {', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''}"
        )
