"""Encoded images and sound as arrays, decoded by threads: for a `collate`, or for `open_stream`.

    def collate(self, rows, keys):
        return Batch(rows.num_rows, x=decode.images(rows["image"], size=(224, 224)), ...)

    open_stream(url, global_batch=256, decode={"image": partial(decode.images, size=(224, 224))})

Columns are bytes, or structs of `bytes` and `path`. What can't be decoded raises BadRowsError that names every
such row of the batch, for `data.bad_rows` to put others in their place. Pillow, soundfile and soxr work outside
Python's lock, so threads run side by side: as many as this process has cores, or $DLTRAIN_DECODE_THREADS.
"""

from __future__ import annotations

import importlib
import io
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from dltrain.data.batch import Keys
from dltrain.data.columns import OFFSETS
from dltrain.errors import BadRowsError, DataError, MissingExtraError, UserError

__all__ = ["THREADS", "Decoder", "Sound", "audio", "decoding", "images"]

T = TypeVar("T")
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
THREADS = "DLTRAIN_DECODE_THREADS"
_CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}
# A JPEG is decoded at a half, quarter or eighth where that is still this many times the size asked for: sharper
# than at the size itself.
_MARGIN = 2
# Orientations of a camera that swap width and height, and the tag that says so.
_SIDEWAYS, _ORIENTATION = (5, 6, 7, 8), 0x0112
# A thread gets several shares of a batch, since rows differ in size.
_SHARES = 4


class Sound(NamedTuple):
    """Samples of all rows end to end, float32 (samples,) or (samples, channels), and offsets (rows + 1,) int64."""

    values: torch.Tensor
    offsets: torch.Tensor


Decoder = Callable[[Any], Any]


def images(column: Any, size: tuple[int, int] | None = None, mode: str = "RGB") -> torch.Tensor | list[torch.Tensor]:
    """Decodes a column of JPEG, PNG, WebP or whatever else Pillow reads, turned the way the camera was held.

    Args:
        size: (height, width) that every image is stretched to; None leaves them as they are.
        mode: "RGB", "RGBA" or "L" (grey).

    Returns:
        uint8 (rows, height, width, channels); a list of (height, width, channels) where size is None and they differ.

    Raises:
        BadRowsError: naming every row that is missing or can't be decoded, with the reason.
        MissingExtraError: Pillow is not installed.
    """
    try:
        import PIL.Image
    except ImportError:
        raise MissingExtraError("Pillow", "images") from None
    if mode not in _CHANNELS:
        raise UserError(f"mode {mode!r}; images can be decoded as {', '.join(_CHANNELS)}")
    PIL.Image.init()
    rows = _encoded(column)
    if size is None:
        return _stacked(_each(lambda i: _image(rows[i], None, mode), len(rows)))
    out = np.empty((len(rows), *size, _CHANNELS[mode]), np.uint8)

    def put(i: int) -> None:
        out[i] = _image(rows[i], size, mode)

    _each(put, len(rows))
    return torch.from_numpy(out)


def audio(column: Any, rate: int, channels: int = 1) -> Sound:
    """Decodes a column of WAV, FLAC, Ogg or MP3.

    Args:
        rate: samples a second that every row is resampled to.
        channels: 1 mixes them down; with more, rows of another number are bad.

    Raises:
        BadRowsError: naming every row that is missing or can't be decoded, with the reason.
        MissingExtraError: soundfile or soxr is not installed.
    """
    for package in ("soundfile", "soxr"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise MissingExtraError(package, "audio") from None
    rows = _encoded(column)
    sounds = _each(lambda i: _sound(rows[i], rate, channels), len(rows))
    offsets = np.cumsum([0, *map(len, sounds)], dtype=np.int64)
    empty = np.zeros((0,) if channels == 1 else (0, channels), np.float32)
    return Sound(torch.from_numpy(np.concatenate([empty, *sounds])), torch.from_numpy(offsets))


def decoding(
    collate: Callable[[pa.RecordBatch, Keys], Mapping[str, Any]], decoders: Mapping[str, Decoder]
) -> Callable[[pa.RecordBatch, Keys], Mapping[str, Any]]:
    """A `collate` that leaves some columns to decoders: `name`, and `name_offsets` for sound."""

    def collated(rows: pa.RecordBatch, keys: Keys) -> Mapping[str, Any]:
        missing = [name for name in decoders if name not in rows.schema.names]
        if missing:
            raise DataError(f"decode: no column {', '.join(map(repr, missing))} is read; there are {rows.schema.names}")
        batch = dict(collate(rows.drop_columns(list(decoders)), keys))
        for name, decoder in decoders.items():
            found = decoder(rows.column(name))
            batch |= {name: found.values, name + OFFSETS: found.offsets} if isinstance(found, Sound) else {name: found}
        return batch

    return collated


# ---- rows ----


def _encoded(column: Any) -> list[Any]:
    """Each row's bytes without a copy, or None."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        # flatten: the struct's own missing rows are missing in the field too.
        column = column.flatten()[column.type.get_field_index("bytes")]
    kind = column.type
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    if not any(test(kind) for test in tests):
        raise DataError(f"a column of {kind} can't be decoded; it must hold encoded bytes, or a struct with `bytes`")
    return [value.as_buffer() for value in column]


def _each(function: Callable[[int], T], count: int) -> list[T]:
    """`function` of every row, by threads.

    Raises:
        BadRowsError: naming all rows for which it failed.
    """
    threads = _threads()
    size = max(1, -(-count // (_SHARES * threads)))
    shares = [range(start, min(start + size, count)) for start in range(0, count, size)]
    spread = _pool(threads).map if threads > 1 and len(shares) > 1 else map
    done = spread(lambda share: [_tried(function, i) for i in share], shares)
    found = [pair for share in done for pair in share]
    bad = {i: reason for i, (_, reason) in enumerate(found) if reason}
    if bad:
        raise BadRowsError(list(bad), list(bad.values()))
    return [value for value, _ in found]


def _tried(function: Callable[[int], T], row: int) -> tuple[T, str]:
    try:
        return function(row), ""
    except MemoryError:
        raise
    # Decoders raise whatever damaged bytes lead them to.
    except Exception as error:
        return None, f"{error or type(error).__name__}"  # type: ignore[return-value]


def _threads() -> int:
    """Of this process: its share of the cores, where it is one of several ranks on a node."""
    asked = os.environ.get(THREADS)
    if asked:
        return max(1, int(asked))
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


_pools: dict[int, ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _pool(count: int) -> ThreadPoolExecutor:
    """Shared by all that decode in this process; its threads are started when there is work."""
    with _pools_lock:
        if count not in _pools:
            _pools[count] = ThreadPoolExecutor(count, thread_name_prefix="dltrain-decode")
        return _pools[count]


# ---- one row ----


def _image(data: Any, size: tuple[int, int] | None, mode: str) -> U8:
    """(height, width, channels)."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if data is None:
        raise ValueError("the image is missing")
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError(f"it is no image that Pillow knows: {_beginning(data)}") from None
    with opened as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels are of mode {image.mode}, more than the 8 bits that are decoded here")
        wide: tuple[int, int] | None = None
        box = None
        if size:
            wide = size if image.getexif().get(_ORIENTATION) in _SIDEWAYS else (size[1], size[0])
            drafted = image.draft(None, (_MARGIN * wide[0], _MARGIN * wide[1]))
            # A draft may be a fraction of a pixel larger than the image is.
            box = drafted[1] if drafted else None
        # A palette's transparency is lost on the way to RGB unless it goes by way of RGBA.
        plain = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
        shaped = plain.convert(mode)
        if wide and shaped.size != wide:
            shaped = shaped.resize(wide, Image.Resampling.BILINEAR, box=box)
        upright = ImageOps.exif_transpose(_with_exif(shaped, image))
        pixels = np.asarray(upright)
    return pixels.reshape(*pixels.shape[:2], -1)


def _with_exif(shaped: Any, image: Any) -> Any:
    """What was converted, with the original's orientation."""
    turned = image.getexif().get(_ORIENTATION)
    if turned:
        shaped.getexif()[_ORIENTATION] = turned
    return shaped


def _stacked(arrays: Sequence[U8]) -> torch.Tensor | list[torch.Tensor]:
    if len({a.shape for a in arrays}) == 1:
        return torch.from_numpy(np.stack(arrays))
    return [torch.from_numpy(np.array(a)) for a in arrays]


def _sound(data: Any, rate: int, channels: int) -> F32:
    """(samples,), or (samples, channels)."""
    import soundfile
    import soxr

    if data is None:
        raise ValueError("the sound is missing")
    try:
        # found: (samples, channels)
        found, its_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{error.error_string.rstrip('.')}: {_beginning(data)}") from None
    if channels == 1:
        found = found.mean(axis=1, dtype=np.float32)
    elif found.shape[1] != channels:
        raise ValueError(f"it has {found.shape[1]} channel(s) where {channels} are asked for")
    return np.asarray(found if its_rate == rate else soxr.resample(found, its_rate, rate), np.float32)


def _beginning(data: Any) -> str:
    raw = bytes(memoryview(data)[:8])
    return f"{len(data):,} bytes that begin with {raw!r}"
