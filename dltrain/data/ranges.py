"""Ranges of a file: joined where they lie close, cut into parts, and read as if the whole file was there.

parts = cut(coalesce([(4, 900), (950, 40_000_000)]), 8 * 1024 * 1024)
pq.ParquetFile(pa.PythonFile(SparseFile(fetched)), metadata=footer)
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dltrain.data.catalog import DataFile

__all__ = ["Fetched", "Parts", "Range", "SparseFile", "coalesce", "cut"]

Range = tuple[int, int]
# Where a part begins -> its bytes.
Parts = dict[int, bytes | memoryview]
_HOLE_BYTES = 1024 * 1024


def coalesce(ranges: Sequence[Range], hole: int = _HOLE_BYTES) -> list[Range]:
    """Joins ranges that overlap, or that lie less than `hole` bytes apart."""
    joined: list[Range] = []
    for start, end in sorted(r for r in ranges if r[1] > r[0]):
        if joined and start - joined[-1][1] <= hole:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def cut(ranges: Sequence[Range], size: int) -> list[Range]:
    """Parts of `size` to twice as much, all of a range about alike; a range that is smaller stays whole."""
    parts = []
    for start, end in ranges:
        count = max(1, (end - start) // size)
        edges = [start + (end - start) * i // count for i in range(count + 1)]
        parts += list(itertools.pairwise(edges))
    return parts


@dataclass
class Fetched:
    """What is here of one file."""

    file: DataFile
    parts: Parts


class SparseFile(io.RawIOBase):
    """A file of which only some ranges are there; reading elsewhere is an error of ours."""

    def __init__(self, fetched: Fetched) -> None:
        self._size = fetched.file.size
        self._starts = sorted(fetched.parts)
        self._parts = [memoryview(fetched.parts[start]) for start in self._starts]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        """Bytes of the whole file."""
        return self._size

    def read(self, size: int = -1) -> Any:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        pieces, at = [], self._at
        for start, part in zip(self._starts, self._parts, strict=True):
            if start <= at < start + len(part) and at < end:
                pieces.append(part[at - start : end - start])
                at += len(pieces[-1])
        if at < end:
            raise ValueError(f"bytes {at}-{end} were not fetched")
        self._at = at
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
