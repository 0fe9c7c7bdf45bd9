"""One rank's part of a run's state: copied into slots in memory, and loaded from them or from storage.

snapshots = Snapshots([Network("", engine, module)], rank, num_ranks, attempt)
index = snapshots.take(step, position, [applied])    # one large copy per tensor of the optimizer
snapshots.layout                                     # what is where in a slot, for the manifest
applied = load([Network("", engine, module)], FragmentReader(store, checkpoint), applied, rank, num_ranks)

Of several networks the names of parameters and buffers begin with the network's, and the updates that each of them has
had are saved beside them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dltrain.checkpoint import fragments
from dltrain.checkpoint.fragments import Network
from dltrain.checkpoint.numbers import is_another, numbers, set_numbers
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

    def __init__(self, networks: Sequence[Network], rank: int, num_ranks: int, attempt: int) -> None:
        self._networks, self._attempt = networks, attempt
        self._rank, self._num_ranks = rank, num_ranks
        # Collectives under ZeRO-3, so here, where every rank is; rank 0 keeps them.
        frozen = {n.prefix + name: t for n in networks for name, t in fragments.frozen(n.module).items()}
        self._frozen = {f"frozen:{name}": t.cpu() for name, t in frozen.items()} if rank == 0 else {}
        # key in the file -> where it is
        self._buffers = {
            f"buffer:{n.prefix}{name}": (n.module, name) for n in networks for name in fragments.buffers(n.module)
        }
        self._counted = {f"applied:{n.prefix}": torch.zeros((), dtype=torch.int64) for n in networks if n.prefix}
        self._names = [*(f"frozen:{name}" for name in frozen), *self._buffers, *self._counted]
        self.generation = 0
        self._sources: list[fragments.Source] = []
        self._owners: list[list[torch.Tensor]] = []
        self._tensors: tuple[int, ...] = ()
        # Of now; and the names of those that the slots have room for.
        self._numbers: dict[str, torch.Tensor] = {}
        self._known: tuple[str, ...] = ()
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
        self._numbers = self._read_numbers()
        if self._writer and self._tensor_ids() == self._tensors and tuple(self._numbers) == self._known:
            return
        self._known = tuple(self._numbers)
        found = [
            _prefixed(n.prefix, fragments.sources(n.engine, self._rank, self._num_ranks, n.averages))
            for n in self._networks
        ]
        self._owners = [fragments.owners(of_one) for of_one in found]
        self._sources = sources = [source for of_one in found for source in of_one]
        self._tensors = self._tensor_ids()
        if self._writer:
            self._writer.close()
        keys = _keys(sources)
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for key, source in zip(keys, sources, strict=True):
            tensors[key] = torch.float32, (source.hi - source.lo,)
        for name, value in self._whole_tensors().items():
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
        self.layout = Layout(size, parts, sorted([*self._names, *self._known]), self._ties())
        self.generation += 1

    def _tensor_ids(self) -> tuple[int, ...]:
        each = zip(self._networks, self._owners, strict=True)
        return tuple(i for network, owners in each for i in fragments.tensor_ids(network.engine, owners))

    def _ties(self) -> dict[str, str]:
        found = ((n.prefix, fragments.ties(n.module)) for n in self._networks)
        return {prefix + alias: prefix + name for prefix, ties in found for alias, name in ties.items()}

    def take(self, step: int, position: int, applied: Sequence[int]) -> int | None:
        """Copies the state into a slot and returns its index; None when all slots are needed as they are.

        Args:
            applied: updates that each network has had.
        """
        self.prepare()
        assert self._writer is not None
        index = self._writer.free()
        if index is not None:
            for counted, number in zip(self._counted.values(), applied, strict=False):
                counted.fill_(number)
            seal = Seal(self._attempt, step, position, applied[0])
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
            for name, value in self._changing().items():
                views[name].copy_(value)

    def _map(self, index: int) -> dict[str, torch.Tensor]:
        assert self._writer is not None
        memory = self._writer.memory(index)
        views = {}
        for p in self._places:
            count = torch.Size(p.shape).numel()
            flat = torch.frombuffer(memory, dtype=p.dtype, count=count, offset=self._start + p.begin) if count else None
            views[p.key] = flat.reshape(p.shape) if flat is not None else torch.zeros(p.shape, dtype=p.dtype)
        return views

    def _changing(self) -> dict[str, torch.Tensor]:
        buffers = {key: module.get_buffer(name) for key, (module, name) in self._buffers.items()}
        return buffers | self._counted | self._numbers

    def _read_numbers(self) -> dict[str, torch.Tensor]:
        return {
            f"number:{n.prefix}{name}": torch.tensor(value, dtype=torch.float64)
            for n in self._networks
            for name, value in numbers(n.engine).items()
        }

    def _whole_tensors(self) -> dict[str, torch.Tensor]:
        return self._frozen | self._changing()


def _prefixed(prefix: str, sources: list[fragments.Source]) -> list[fragments.Source]:
    if not prefix:
        return sources
    return [replace(s, pieces=tuple(p._replace(name=prefix + p.name) for p in s.pieces)) for s in sources]


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
    networks: Sequence[Network],
    reader: FragmentReader,
    applied: int,
    rank: int = 0,
    num_ranks: int = 1,
    say: Callable[[str], object] | None = None,
) -> list[int]:
    """Loads the slices this rank needs now, at any number of ranks and any ZeRO stage.

    Args:
        applied: updates that the optimizer had made, where there is one network.
        say: told of optimizers that begin without the state that was saved, because they are others now.

    Returns:
        Updates that each network has had.

    Raises:
        CheckpointError: the networks are not those that were saved.
    """
    _check_names(networks, reader)
    counted, saved, frozen = reader.whole("applied:"), reader.buffers(rank, num_ranks), reader.whole("frozen:")
    kept = {name: float(value) for name, value in reader.whole("number:").items()}
    updates = [int(counted[n.prefix]) if n.prefix in counted else applied for n in networks]
    for network in networks:
        mine = {n.removeprefix(network.prefix): v for n, v in kept.items() if n.startswith(network.prefix)}
        new = is_another(network.engine, mine)
        if new:
            of = f" of {network.prefix[:-1]}" if network.prefix else ""
            if say:
                say(f"the optimizer{of} is another one than was saved: it begins without its state")
        read, kinds = partial(_read, reader, network.prefix), partial(_kinds, reader, network.prefix, new)
        fragments.restore(network.engine, read, kinds, network.averages)
        set_numbers(network.engine, mine, afresh=new)
        with torch.no_grad():
            for name, buffer in fragments.buffers(network.module).items():
                if network.prefix + name in saved:
                    buffer.copy_(saved[network.prefix + name])
        fixed = {n.removeprefix(network.prefix): t for n, t in frozen.items() if n.startswith(network.prefix)}
        fragments.restore_frozen(network.module, fixed)
    return updates


def _read(reader: FragmentReader, prefix: str, name: str, kind: str, offset: int, length: int) -> torch.Tensor:
    return reader.read(prefix + name, kind, offset, length)


def _kinds(reader: FragmentReader, prefix: str, new: bool, name: str) -> tuple[str, ...]:
    found = reader.kinds(prefix + name)
    return tuple(kind for kind in found if kind == fragments.AVERAGE) if new else found


def _check_names(networks: Sequence[Network], reader: FragmentReader) -> None:
    names = {n.prefix + name for n in networks for name, p in n.module.named_parameters() if p.requires_grad}
    differ = sorted(names ^ set(reader.names))
    if differ:
        raise CheckpointError(
            f"the network has {len(names)} trainable parameters and the checkpoint {len(reader.names)}; "
            f"they differ in {', '.join(differ[:3])}{', ...' if len(differ) > 3 else ''}"
        )
