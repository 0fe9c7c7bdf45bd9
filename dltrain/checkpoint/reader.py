"""Reads slices of flattened tensors out of a checkpoint's files, whatever number of ranks wrote them.

reader = FragmentReader(store, checkpoint)
reader.read("conv.weight", "exp_avg", offset, length)      # 1-D fp32
reader.tensor("conv.weight", "param")                      # whole, in shape
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from safetensors.torch import load

from dltrain.checkpoint.commit import Checkpoint, require_format
from dltrain.checkpoint.fragments import mean_of_buffers
from dltrain.errors import CheckpointError

__all__ = ["FragmentReader", "Readable"]

# Below this a file is read whole, once: a store answers one large request sooner than many small ones.
_WHOLE_BYTES = 64 * 1024 * 1024


class Readable(Protocol):
    """All that is asked of a store here."""

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file, or its bytes [start, end)."""


class _File:
    """A safetensors file of which the wanted elements are read."""

    def __init__(self, store: Readable, path: str, num_bytes: int) -> None:
        self._store, self._path = store, path
        self._whole = load(store.read(path)) if num_bytes <= _WHOLE_BYTES else None
        self._header = None if self._whole is not None else self._read_header()

    def _read_header(self) -> dict[str, Any]:
        size = int.from_bytes(self._store.read(self._path, 0, 8), "little")
        header: dict[str, Any] = json.loads(self._store.read(self._path, 8, 8 + size))
        header["__start__"] = 8 + size
        return header

    def tensor(self, key: str, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """Elements [lo, hi) of a fp32 tensor of one dimension."""
        if self._whole is not None:
            return self._whole[key][lo:hi]
        assert self._header is not None
        entry = self._header[key]
        begin, end = (self._header["__start__"] + o for o in entry["data_offsets"])
        stop = end if hi is None else begin + 4 * hi
        raw = bytearray(self._store.read(self._path, begin + 4 * lo, stop))
        return torch.frombuffer(raw, dtype=torch.float32)

    def whole(self, key: str) -> torch.Tensor:
        """A tensor of any type and shape."""
        if self._whole is not None:
            return self._whole[key]
        assert self._header is not None
        entry = self._header[key]
        begin, end = entry["data_offsets"]
        head = json.dumps({key: {**entry, "data_offsets": [0, end - begin]}}).encode()
        start = self._header["__start__"]
        # A file of this tensor alone, so that the library knows its type.
        data = self._store.read(self._path, start + begin, start + end)
        return load(len(head).to_bytes(8, "little") + head + data)[key]


class FragmentReader:
    """Random access to a checkpoint's tensors."""

    def __init__(self, store: Readable, checkpoint: Checkpoint) -> None:
        require_format(checkpoint.manifest)
        self._store, self._checkpoint = store, checkpoint
        self._files: dict[str, _File] = {}
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        # parts: (name, kind) -> [(offset, length, file, key, start)], by offset
        self._parts: dict[tuple[str, str], list[tuple[int, int, str, str, int]]] = {}
        for file in checkpoint.manifest["files"]:
            for name, kind, shape, key, offset, length, start in file["parts"]:
                self.shapes[name, kind] = tuple(shape)
                self._parts.setdefault((name, kind), []).append((offset, length, file["name"], key, start))
        self._kinds: dict[str, list[str]] = {}
        for name, kind in self._parts:
            self._kinds.setdefault(name, []).append(kind)
        for parts in self._parts.values():
            parts.sort()

    def kinds(self, name: str) -> tuple[str, ...]:
        """What the checkpoint holds of a parameter: its values, their average, the optimizer's moments."""
        return tuple(self._kinds.get(name, ()))

    def read(self, name: str, kind: str, offset: int, length: int) -> torch.Tensor:
        """Elements [offset, offset + length) of the flattened tensor, fp32.

        Raises:
            CheckpointError: the checkpoint does not hold them all.
        """
        pieces = list(self._pieces(name, kind, offset, offset + length))
        if sum(len(p) for p in pieces) != length:
            raise CheckpointError(
                f"{self._checkpoint.path} lacks elements of {name} ({kind}): {length} wanted from {offset}; "
                "the network differs from the one that was saved"
            )
        return pieces[0] if len(pieces) == 1 else torch.cat([*pieces, torch.zeros(0)])

    def _pieces(self, name: str, kind: str, begin: int, end: int) -> Iterator[torch.Tensor]:
        for offset, length, file, key, start in self._parts.get((name, kind), ()):
            lo, hi = max(begin, offset), min(end, offset + length)
            if lo < hi:
                yield self._file(file).tensor(key, start + lo - offset, start + hi - offset)

    def tensor(self, name: str, kind: str = "param") -> torch.Tensor:
        """A whole tensor in its shape."""
        shape = self.shapes[name, kind]
        return self.read(name, kind, 0, torch.Size(shape).numel()).reshape(shape).clone()

    def whole(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors saved whole by rank 0 under `prefix` (buffers, frozen parameters), by name."""
        keys = [k for k in self._checkpoint.manifest.get("whole", ()) if k.startswith(prefix)]
        first = self._checkpoint.manifest["files"][0]["name"]
        return {k.removeprefix(prefix): self._file(first).whole(k).clone() for k in keys}

    def buffers(self, rank: int, num_ranks: int) -> dict[str, torch.Tensor]:
        """Buffers by name: the rank's own where as many ranks saved them, else what they are on average."""
        files = [f["name"] for f in self._checkpoint.manifest["files"]]
        keys = [k for k in self._checkpoint.manifest.get("whole", ()) if k.startswith("buffer:")]
        mine = [files[rank]] if len(files) == num_ranks else files
        return {
            k.removeprefix("buffer:"): mean_of_buffers([self._file(f).whole(k).clone() for f in mine]) for k in keys
        }

    @property
    def names(self) -> list[str]:
        """Trainable parameters."""
        return [name for name, kind in self._parts if kind == "param"]

    def _file(self, name: str) -> _File:
        if name not in self._files:
            size = next(f["bytes"] for f in self._checkpoint.manifest["files"] if f["name"] == name)
            self._files[name] = _File(self._store, f"{self._checkpoint.path}/{name}", size)
        return self._files[name]
