"""One rank's part of a run's state, as tensors ready to be written.

snapshot = take(engine, module, rank, num_ranks)
file = write_rank(store, step, attempt, rank, snapshot.tensors, snapshot.parts)
load(engine, module, FragmentReader(store, checkpoint), step)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dltrain.checkpoint import fragments
from dltrain.checkpoint.reader import FragmentReader
from dltrain.errors import CheckpointError

__all__ = ["Snapshot", "load", "take"]


@dataclass(frozen=True)
class Snapshot:
    """Copies in host memory.

    Attributes:
        tensors: key -> tensor; fragments are flat fp32.
        parts: [name, kind, shape, key, offset, length] of each fragment.
        meta: for the manifest: keys of the tensors saved whole, and ties.
    """

    tensors: Mapping[str, torch.Tensor]
    parts: list[list[Any]]
    meta: dict[str, Any]


def take(engine: Any, module: torch.nn.Module, rank: int, num_ranks: int) -> Snapshot:
    """Copies what this rank owns; buffers are averaged over ranks first, rank 0 keeps them."""
    fragments.average_buffers(module)
    tensors: dict[str, torch.Tensor] = {}
    parts: list[list[Any]] = []
    for f in fragments.collect(engine, rank, num_ranks):
        key = f"{f.kind}:{f.name}"
        tensors[key] = f.values
        parts.append([f.name, f.kind, list(f.shape), key, f.offset, len(f.values)])
    # Every rank asks: under ZeRO-3 gathering a frozen parameter is a collective.
    whole = {f"frozen:{k}": v for k, v in fragments.frozen(module).items()}
    whole |= {f"buffer:{k}": v for k, v in fragments.buffers(module).items()}
    if rank == 0:
        tensors |= {k: v.detach().cpu().contiguous().clone() for k, v in whole.items()}
    return Snapshot(tensors, parts, {"whole": sorted(whole), "ties": fragments.ties(module)})


def load(engine: Any, module: torch.nn.Module, reader: FragmentReader, optimizer_step: int) -> None:
    """Loads the slices this rank needs now, at any number of ranks and any ZeRO stage.

    Raises:
        CheckpointError: the network is not the one that was saved.
    """
    _check_names(module, reader)
    fragments.restore(engine, reader.read, reader.has, optimizer_step)
    saved = reader.whole("buffer:")
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
