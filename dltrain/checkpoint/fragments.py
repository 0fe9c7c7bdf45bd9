"""Fragments: a rank's part of the optimizer state as slices of flattened tensors, free of any world size.

    for f in collect(engine, rank, num_ranks): f.name, f.kind, f.shape, f.offset, f.values
    restore(engine, reader.read, reader.kinds)

Joined over ranks, every element of every trainable parameter and of its moments appears exactly once,
padding never. Where they live differs by ZeRO stage; `_layout` knows, nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from dltrain.errors import CheckpointError

__all__ = [
    "AVERAGE",
    "PARAM",
    "Averages",
    "Fragment",
    "Network",
    "Piece",
    "Source",
    "average_buffers",
    "buffers",
    "collect",
    "frozen",
    "inner_optimizer",
    "is_number",
    "masters",
    "mean_of_buffers",
    "owners",
    "refresh",
    "restore",
    "restore_frozen",
    "sources",
    "tensor_ids",
    "ties",
]

Read = Callable[[str, str, int, int], torch.Tensor]
# Of the tensors that an optimizer steps, by id: the running averages of their values.
Averages = Mapping[int, torch.Tensor]
_NONE: Averages = MappingProxyType({})
# Kinds of tensors that no optimizer keeps.
PARAM, AVERAGE = "param", "ema"


class Network(NamedTuple):
    """One of a task's networks; names in a checkpoint begin with `prefix`."""

    prefix: str
    engine: Any
    module: nn.Module
    averages: Averages = _NONE


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + len(values)) of the flattened tensor `name` of global shape `shape`.

    `kind` is "param" (the fp32 master weight), "ema" (its running average) or the optimizer's name of a moment.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    values: torch.Tensor


@dataclass(frozen=True)
class _Slice:
    """Where this rank keeps elements [offset, offset + length) of a parameter.

    `owner` is the tensor that the optimizer steps; the elements are [start, start + length) of it, flattened.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    owner: torch.Tensor
    start: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This slice of `owner` or of a moment of the same size."""
        return tensor.detach().reshape(-1).narrow(0, self.start, self.length)


# ---- out ----


class Piece(NamedTuple):
    """Elements [offset, offset + length) of the flattened tensor `name`: [start, start + length) of a source."""

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    start: int


@dataclass(frozen=True)
class Source:
    """What this rank saves of one tensor of the optimizer: its elements [lo, hi), flattened.

    Whole tensors, since a few large copies take less time than many small ones; `pieces` says whose they are.
    """

    kind: str
    tensor: torch.Tensor
    lo: int
    hi: int
    pieces: tuple[Piece, ...]

    @property
    def values(self) -> torch.Tensor:
        """The elements themselves, not a copy."""
        return self.tensor.detach().reshape(-1)[self.lo : self.hi]


def sources(engine: Any, rank: int, num_ranks: int, averages: Averages = _NONE) -> list[Source]:
    """Everything this rank owns; padding may lie between the pieces.

    Raises:
        CheckpointError: the optimizer keeps something that is not a number per weight.
    """
    by_owner: dict[int, list[_Slice]] = {}
    for piece in _layout(engine):
        by_owner.setdefault(id(piece.owner), []).append(piece)
    state = inner_optimizer(engine).state
    make = _of_shard if _sharded(engine) else _of_share
    found: list[Source] = []
    for slices in by_owner.values():
        found += [
            s for kind, t in _tensors(slices[0].owner, state, averages) if (s := make(kind, t, slices, rank, num_ranks))
        ]
    return found


def _of_shard(kind: str, tensor: torch.Tensor, slices: list[_Slice], _rank: int, _num_ranks: int) -> Source:
    pieces = tuple(Piece(s.name, s.shape, s.offset, s.length, s.start) for s in slices)
    return Source(kind, tensor, 0, tensor.numel(), pieces)


def _of_share(kind: str, tensor: torch.Tensor, slices: list[_Slice], rank: int, num_ranks: int) -> Source | None:
    """ZeRO 0: every rank has everything; each writes an even share of each tensor."""
    (whole,) = slices
    lo, hi = rank * whole.length // num_ranks, (rank + 1) * whole.length // num_ranks
    return Source(kind, tensor, lo, hi, (Piece(whole.name, whole.shape, lo, hi - lo, 0),)) if lo < hi else None


def tensor_ids(engine: Any, owners: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Which tensors the optimizer has for them now: other ones need other sources."""
    state = inner_optimizer(engine).state
    return tuple(id(tensor) for owner in owners for _, tensor in _tensors(owner, state, _NONE))


def masters(engine: Any) -> list[torch.Tensor]:
    """The tensors that the optimizer steps on this rank."""
    return list({id(piece.owner): piece.owner for piece in _layout(engine)}.values())


def owners(found: Sequence[Source]) -> list[torch.Tensor]:
    """The tensors that the optimizer steps, of which the others are moments."""
    return [source.tensor for source in found if source.kind == PARAM]


def collect(engine: Any, rank: int, num_ranks: int, averages: Averages = _NONE) -> list[Fragment]:
    """Copies of what this rank owns, in host memory."""
    found: list[Fragment] = []
    for source in sources(engine, rank, num_ranks, averages):
        values = source.values.to("cpu", torch.float32, copy=True)
        for p in source.pieces:
            found.append(Fragment(p.name, source.kind, p.shape, p.offset, values[p.start : p.start + p.length]))
    return found


def _tensors(owner: torch.Tensor, state: Any, averages: Averages) -> Iterator[tuple[str, torch.Tensor]]:
    yield PARAM, owner
    for kind, value in state.get(owner, {}).items():
        if not isinstance(value, torch.Tensor) or is_number(kind, value, owner):
            continue
        if kind in (PARAM, AVERAGE):
            raise CheckpointError(f"the optimizer keeps state called {kind!r}, a name that checkpoints use: rename it")
        if value.numel() != owner.numel():
            raise CheckpointError(
                f"the optimizer keeps {value.numel()} numbers ({kind!r}) for {owner.numel()} weights; a checkpoint "
                "holds a number per weight or one for all: use another optimizer"
            )
        yield kind, value
    if id(owner) in averages:
        yield AVERAGE, averages[id(owner)]


def is_number(name: str, value: Any, owner: torch.Tensor) -> bool:
    """Whether what an optimizer keeps is one number for a whole tensor, such as its count of steps."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and (owner.numel() != 1 or name == "step")
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- in ----


def restore(engine: Any, read: Read, kinds: Callable[[str], Collection[str]], averages: Averages = _NONE) -> None:
    """Loads what this rank needs now, makes the optimizer's state, and refreshes the weights on all ranks.

    Args:
        read: gives elements [offset, offset + length) of the flattened tensor (name, kind).
        kinds: what there is of a parameter besides its values.

    Raises:
        CheckpointError: the checkpoint lacks something this network has.
    """
    inner = inner_optimizer(engine)
    with torch.no_grad():
        for piece in list(_layout(engine)):
            piece.of(piece.owner).copy_(read(piece.name, PARAM, piece.offset, piece.length))
            found = kinds(piece.name)
            for kind in found:
                if kind in (PARAM, AVERAGE):
                    continue
                moment = _moment(inner, piece.owner, kind)
                piece.of(moment).copy_(read(piece.name, kind, piece.offset, piece.length))
            if id(piece.owner) in averages:
                # Of a run that had none so far it begins here.
                kind = AVERAGE if AVERAGE in found else PARAM
                piece.of(averages[id(piece.owner)]).copy_(read(piece.name, kind, piece.offset, piece.length))
        refresh(engine)


def _moment(inner: Any, owner: torch.Tensor, kind: str) -> torch.Tensor:
    """The moment's tensor, made if the optimizer has not stepped yet."""
    state = inner.state[owner]
    if kind not in state:
        state[kind] = torch.zeros_like(owner, memory_format=torch.preserve_format)
    moment: torch.Tensor = state[kind]
    return moment


def refresh(engine: Any) -> None:
    """Copies the fp32 masters into the weights that forward uses."""
    optimizer = engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 3:
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage:
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                weight.data.copy_(master.data)


# ---- where things are, by stage ----


def inner_optimizer(engine: Any) -> Any:
    """The torch optimizer under DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _sharded(engine: Any) -> bool:
    return int(engine.zero_optimization_stage()) > 0


def _names(engine: Any) -> dict[int, str]:
    return {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}


def _layout(engine: Any) -> Iterator[_Slice]:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return _layout_zero3(engine)
    return _layout_zero12(engine) if stage else _layout_zero0(engine)


def _layout_zero0(engine: Any) -> Iterator[_Slice]:
    optimizer, names = engine.optimizer, _names(engine)
    wrapped = hasattr(optimizer, "fp32_groups")
    masters = optimizer.fp32_groups if wrapped else [g["params"] for g in optimizer.param_groups]
    weights = optimizer.fp16_groups if wrapped else masters
    for master_group, weight_group in zip(masters, weights, strict=True):
        for master, weight in zip(master_group, weight_group, strict=True):
            yield _Slice(names[id(weight)], tuple(weight.shape), 0, master.numel(), master, 0)


def _layout_zero12(engine: Any) -> Iterator[_Slice]:
    optimizer, names = engine.optimizer, _names(engine)
    for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            # A parameter without a mapping lives on other ranks.
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield _Slice(names[id(parameter)], tuple(parameter.shape), lp.start, lp.numel, flat, hp.start)


def _layout_zero3(engine: Any) -> Iterator[_Slice]:
    optimizer, names = engine.optimizer, _names(engine)
    for index, group in enumerate(optimizer.fp16_groups):
        flat = optimizer.fp32_partitioned_groups_flat[index]
        start = 0
        for parameter in group:
            part = parameter.partition_numel()
            offset = part * dist.get_rank(parameter.ds_process_group)
            # The last ranks' parts may be padding, in part or as a whole.
            length = max(0, min(part, parameter.ds_numel - offset))
            if length:
                yield _Slice(names[id(parameter)], tuple(parameter.ds_shape), offset, length, flat, start)
            start += part


# ---- what is not stepped ----


def buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Persistent buffers by name."""
    kept = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def average_buffers(module: nn.Module) -> None:
    """Averages floating buffers (BatchNorm statistics) over ranks in place; of integers the largest is taken."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    # One collective per type, however many BatchNorms there are.
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for buffer in buffers(module).values():
        real = torch.view_as_real(buffer) if buffer.is_complex() else buffer
        wide = torch.float64 if real.is_floating_point() else real.dtype
        by_type.setdefault(wide, []).append(real)
    with torch.no_grad():
        for dtype, tensors in by_type.items():
            flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
            if dtype == torch.float64:
                dist.all_reduce(flat)
                flat /= dist.get_world_size()
            else:
                dist.all_reduce(flat, op=dist.ReduceOp.MAX)
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


def mean_of_buffers(ranks: Sequence[torch.Tensor]) -> torch.Tensor:
    """What `average_buffers` would have made of the ranks' values of one buffer."""
    stacked = torch.stack(list(ranks))
    if stacked.is_floating_point() or stacked.is_complex():
        return stacked.to(torch.complex128 if stacked.is_complex() else torch.float64).mean(0).to(stacked.dtype)
    return stacked.amax(0)


def frozen(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that are not trained, whole; under ZeRO-3 every rank must ask."""
    return {n: _gathered(p) for n, p in module.named_parameters() if not p.requires_grad}


def _gathered(parameter: nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def restore_frozen(module: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Puts frozen parameters back.

    Raises:
        CheckpointError: one of them was not saved.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            continue
        if name not in saved:
            raise CheckpointError(f"the checkpoint has no frozen parameter {name!r}; it was trained there")
        _fill(parameter, saved[name])


def _fill(parameter: nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        if not hasattr(parameter, "ds_id"):
            parameter.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)


def ties(module: nn.Module) -> dict[str, str]:
    """Names that share one parameter: alias -> the name it is saved under."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            found[name] = first[id(parameter)]
        else:
            first[id(parameter)] = name
    return found
