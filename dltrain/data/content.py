"""What the values of a column are, told from its type and a few of its rows.

what_it_holds(pa.binary(), rows)         # "jpeg images"
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from dltrain.data.lists import is_number_list

__all__ = ["ENCODED", "what_it_holds"]

# (offset, bytes there) -> what begins so
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\xff\xd8\xff", "jpeg images"),
    (0, b"\x89PNG\r\n\x1a\n", "png images"),
    (0, b"GIF8", "gif images"),
    (8, b"WEBP", "webp images"),
    (4, b"ftypavif", "avif images"),
    (0, b"II*\x00", "tiff images"),
    (0, b"MM\x00*", "tiff images"),
    (0, b"BM", "bmp images"),
    (8, b"WAVE", "wav audio"),
    (0, b"fLaC", "flac audio"),
    (0, b"OggS", "ogg audio"),
    (0, b"ID3", "mp3 audio"),
    (0, b"\xff\xfb", "mp3 audio"),
    (4, b"ftyp", "mp4 video"),
    (0, b"\x93NUMPY", "numpy arrays"),
    (0, b"\x1f\x8b", "gzip files"),
    (0, b"PK\x03\x04", "zip files"),
    (0, b"\x80\x04", "Python pickles"),
    (0, b"\x80\x05", "Python pickles"),
)
# Compressed by themselves: a codec of the file's can't make them smaller.
ENCODED = frozenset(
    name for *_, name in _MAGIC if name not in ("bmp images", "wav audio", "numpy arrays", "Python pickles")
)
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


def what_it_holds(kind: pa.DataType, sample: Any = None) -> str:
    """In a few words: "jpeg images", "text", "768 float", "2048 int32 a row", "raw bytes".

    Args:
        sample: some rows, as an Arrow array; None where the type alone has to do.
    """
    if pa.types.is_dictionary(kind):
        return what_it_holds(kind.value_type, None if sample is None else sample.dictionary_decode())
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        at = kind.get_field_index("bytes")
        return what_it_holds(kind.field(at).type, None if sample is None else sample.flatten()[at])
    if any(test(kind) for test in _BINARY):
        return _of_bytes(sample)
    if any(test(kind) for test in _TEXT):
        return "text"
    if pa.types.is_fixed_size_binary(kind):
        return f"{kind.byte_width:,} raw bytes"
    if pa.types.is_fixed_size_list(kind):
        return f"{kind.list_size:,} x {kind.value_type}"
    if is_number_list(kind):
        return f"lists of {kind.value_type}"
    return "numbers" if pa.types.is_integer(kind) or pa.types.is_floating(kind) else str(kind)


def _of_bytes(sample: Any) -> str:
    values = [value.as_buffer() for value in sample or () if value.is_valid]
    kinds = Counter(_magic(bytes(memoryview(value)[:16])) for value in values)
    if not kinds:
        return "bytes"
    name, count = kinds.most_common(1)[0]
    if not name:
        return "raw bytes"
    return name if count == len(values) else f"{name} and others"


def _magic(beginning: bytes) -> str:
    return next((name for at, mark, name in _MAGIC if beginning[at : at + len(mark)] == mark), "")
