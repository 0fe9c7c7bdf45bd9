"""Parquet footers: read from the files once, kept together with the plan, and taken from there by whoever needs them.

    raw = read_tail(fs, file)                              # the footer's bytes, one ranged read
    footers = Footers(store_reader(store, "footers-0.bin"), size)
    footers(file)                                          # FileMetaData, without a look at the file

The kept ones are compressed, laid end to end in the order of files, and read in blocks: a worker asks for few of
them at a time, and neighbours come along.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dltrain.data.files import DataFile
from dltrain.errors import DataError, StoreError

__all__ = ["Footers", "compress", "parse_footer", "read_footer", "read_tail"]

_TAIL_BYTES = 64 * 1024
_BLOCK_BYTES = 1024 * 1024
_BLOCKS = 64
# Raw size of a compressed footer, before its bytes.
_SIZE_BYTES = 4


def read_footer(fs: Any, file: DataFile) -> pq.FileMetaData:
    """A file's Parquet footer, from the file itself."""
    return parse_footer(read_tail(fs, file), file)


def read_tail(fs: Any, file: DataFile) -> bytes:
    """The bytes of a footer, with one ranged read (two if it is over 64 KiB)."""
    tail: bytes = fs.cat_file(file.path, start=max(0, file.size - _TAIL_BYTES), end=file.size)
    if tail[-4:] != b"PAR1":
        raise _not_parquet(file, f"it ends in {tail[-4:]!r} instead of b'PAR1'")
    need = int.from_bytes(tail[-8:-4], "little") + 8
    if need > len(tail):
        tail = fs.cat_file(file.path, start=max(0, file.size - need), end=file.size)
    return tail[-need:]


def parse_footer(raw: bytes, file: DataFile) -> pq.FileMetaData:
    """What the bytes say.

    Raises:
        DataError: they are no footer.
    """
    try:
        return pq.read_metadata(pa.BufferReader(raw))
    except (pa.ArrowInvalid, OSError) as error:
        raise _not_parquet(file, str(error)) from None


def _not_parquet(file: DataFile, why: str) -> DataError:
    return DataError(f"{file.path} ({file.size:,} bytes) is not a Parquet file: {why}")


def compress(raw: bytes) -> bytes:
    """A footer as it is kept."""
    packed: bytes = pa.compress(raw, "zstd", asbytes=True)
    return len(raw).to_bytes(_SIZE_BYTES, "little") + packed


def _decompress(kept: bytes) -> bytes:
    size = int.from_bytes(kept[:_SIZE_BYTES], "little")
    raw: bytes = pa.decompress(kept[_SIZE_BYTES:], size, "zstd", asbytes=True)
    return raw


class Footers:
    """The footers kept with a plan; a block of them is asked for when one in it is first needed.

    Args:
        read: gives bytes [start, end) of them.
        size: of all.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self._size = read, size
        self._block = lru_cache(maxsize=_BLOCKS)(self._read_block)

    @classmethod
    def held(cls, kept: bytes) -> Footers:
        """Those that are in memory."""
        return cls(lambda start, end: kept[start:end], len(kept))

    def __call__(self, file: DataFile) -> pq.FileMetaData:
        """A file's footer.

        Raises:
            StoreError: it can't be read, or is not what was kept.
        """
        end = file.footer_at + file.footer_bytes
        blocks = range(file.footer_at // _BLOCK_BYTES, -(-end // _BLOCK_BYTES))
        kept = b"".join(self._block(block) for block in blocks)
        start = file.footer_at - blocks.start * _BLOCK_BYTES
        try:
            return parse_footer(_decompress(kept[start : start + file.footer_bytes]), file)
        except (pa.ArrowException, OSError, DataError) as error:
            raise StoreError(f"the footer of {file.path} kept with the plan is damaged: {error}") from None

    def _read_block(self, block: int) -> bytes:
        return self._read(block * _BLOCK_BYTES, min((block + 1) * _BLOCK_BYTES, self._size))
