"""Encoded images and sound: what is decoded, in which order, and what damaged rows get."""

from __future__ import annotations

import io
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from dltrain.data import decode, open_stream
from dltrain.data.batch import Batch
from dltrain.data.mixture import Mixture
from dltrain.data.order import Order
from dltrain.data.stream import TrainStream
from dltrain.errors import BadRowsError, DataError, MissingExtraError, UserError

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(array: np.ndarray[Any, Any], form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, form, **options)
    return out.getvalue()


def picture(seed: int, height: int = 12, width: int = 9, channels: int = 3) -> np.ndarray[Any, Any]:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(height: int, width: int) -> np.ndarray[Any, Any]:
    """What a JPEG keeps: slopes of brightness, another one in each channel."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y // height, 255 * x // width, 255 * (y + x) // (height + width)], axis=2).astype(np.uint8)


def wave(seed: int, samples: int, rate: int = 8000, channels: int = 1, form: str = "WAV") -> bytes:
    out = io.BytesIO()
    time = np.arange(samples)[:, None] / rate
    sound = 0.5 * np.sin(2 * np.pi * (200 + 30 * seed + 50 * np.arange(channels)) * time)
    soundfile.write(out, sound, rate, format=form, subtype="PCM_16")
    return out.getvalue()


@pytest.fixture(params=["1", "3"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(decode.THREADS, request.param)
    return str(request.param)


# ---- images ----


def test_every_row_in_order_and_exact(threads: str) -> None:
    pictures = [picture(i) for i in range(50)]
    found = decode.images(pa.array([encoded(p) for p in pictures]))
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy(), np.stack(pictures))
    found[0] = 0  # a batch's own memory


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), HF_IMAGE, pa.dictionary(pa.int32(), pa.binary())]
)
def test_the_ways_bytes_are_kept(kind: pa.DataType) -> None:
    pictures = [picture(i) for i in range(5)]
    values: list[Any] = [encoded(p) for p in pictures]
    if kind == HF_IMAGE:
        values = [{"bytes": value, "path": f"{i}.png"} for i, value in enumerate(values)]
    found = decode.images(pa.array(values, kind).slice(1, 3))
    assert np.array_equal(np.asarray(found), np.stack(pictures[1:4]))
    found = decode.images(pa.chunked_array([pa.array(values[:2], kind), pa.array(values[2:], kind)]))
    assert len(found) == 5


def test_sizes_that_differ_are_a_list() -> None:
    pictures = [picture(0, 4, 5), picture(1, 6, 3)]
    found = decode.images(pa.array([encoded(p) for p in pictures]))
    assert isinstance(found, list)
    assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, pictures, strict=True))


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("RGBA", 4)])
def test_modes(mode: str, channels: int) -> None:
    kinds = [picture(0), picture(1, channels=1), picture(2, channels=4)]
    found = decode.images(pa.array([encoded(p) for p in kinds]), size=(8, 7), mode=mode)
    assert isinstance(found, torch.Tensor)
    assert found.shape == (3, 8, 7, channels)


def test_a_palette_with_transparency() -> None:
    image = Image.fromarray(picture(0)).quantize(8)
    out = io.BytesIO()
    image.save(out, "PNG", transparency=bytes(range(8)))
    found = decode.images(pa.array([out.getvalue()]))
    assert np.array_equal(np.asarray(found)[0], np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (100, 90), (400, 640)])
def test_a_jpeg_is_the_same_picture_at_any_size(size: tuple[int, int]) -> None:
    whole = smooth(400, 640)
    found = decode.images(pa.array([encoded(whole, "JPEG", quality=95)]), size=size)
    expected = np.asarray(Image.fromarray(whole).resize((size[1], size[0]), Image.Resampling.BILINEAR), int)
    assert np.abs(np.asarray(found)[0].astype(int) - expected).max() <= 6


@pytest.mark.parametrize("size", [None, (30, 20)])
def test_a_camera_held_sideways(size: tuple[int, int] | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    found = decode.images(pa.array([encoded(smooth(200, 300), "JPEG", quality=95, exif=exif)]), size=size)
    upright = Image.fromarray(smooth(200, 300)).rotate(-90, expand=True)
    expected = np.asarray(upright.resize(size[::-1]) if size else upright, int)
    assert np.abs(np.asarray(found)[0].astype(int) - expected).max() <= 8


def test_bad_rows_are_named_all_at_once(threads: str) -> None:
    good = encoded(picture(0))
    rows = [good, b"not an image", good, good[: len(good) // 2], None, b"", good]
    with pytest.raises(BadRowsError) as caught:
        decode.images(pa.array(rows, pa.binary()))
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.rows == (1, 3, 4, 5)
    assert "no image that Pillow knows: 12 bytes that begin with b'not an i'" in error.reasons[0]
    assert error.reasons[2] == "the image is missing"
    assert "row 4: the image is missing" in str(error)


def test_a_path_without_bytes_is_a_missing_image() -> None:
    column = pa.array([{"bytes": None, "path": "cat.jpg"}, None], HF_IMAGE)
    with pytest.raises(BadRowsError, match="row 0, 1: the image is missing"):
        decode.images(column)


def test_more_than_eight_bits_are_refused() -> None:
    with pytest.raises(BadRowsError, match="8 bits"):
        decode.images(pa.array([encoded(np.zeros((4, 4), np.uint16))]))


def test_what_is_no_column_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="column of string can't be decoded"):
        decode.images(pa.array(["x"]))
    with pytest.raises(UserError, match="mode 'CMYK'; images can be decoded as L, RGB, RGBA"):
        decode.images(pa.array([b""]), mode="CMYK")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match=r"dltrain\[images\]"):
        decode.images(pa.array([b""]))


# ---- sound ----


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_sound_end_to_end_with_offsets(threads: str, form: str) -> None:
    lengths = [100, 7, 4000, 1]
    values, offsets = decode.audio(pa.array([wave(i, n, form=form) for i, n in enumerate(lengths)]), rate=8000)
    assert offsets.tolist() == [0, 100, 107, 4107, 4108]
    assert values.dtype == torch.float32
    expected = 0.5 * np.sin(2 * np.pi * 260 * np.arange(4000) / 8000)
    assert np.abs(values[107:4107].numpy() - expected).max() < 1e-4


def test_another_rate_is_the_same_tone() -> None:
    values, offsets = decode.audio(pa.array([wave(0, 16000, rate=16000), wave(0, 8000, rate=8000)]), rate=8000)
    assert offsets.tolist() == [0, 8000, 16000]
    # The ends of a filter aside.
    assert np.abs(values[200:7800].numpy() - values[8200:15800].numpy()).max() < 1e-3


def test_channels() -> None:
    stereo = pa.array([wave(0, 50, channels=2)])
    values, _ = decode.audio(stereo, rate=8000, channels=2)
    assert values.shape == (50, 2)
    mixed, _ = decode.audio(stereo, rate=8000)
    assert torch.allclose(mixed, values.mean(dim=1))
    with pytest.raises(BadRowsError, match=r"1 channel\(s\) where 2 are asked for"):
        decode.audio(pa.array([wave(0, 50)]), rate=8000, channels=2)


def test_bad_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BadRowsError, match=r"row 0: .*11 bytes that begin with b'not a wa'; row 2: .*missing"
    ) as caught:
        decode.audio(pa.array([b"not a wave.", wave(0, 9), None]), rate=8000)
    assert caught.value.rows == (0, 2)
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(MissingExtraError, match=r"dltrain\[audio\]"):
        decode.audio(pa.array([b""]), rate=8000)


# ---- through the loader ----


@pytest.fixture
def media(tmp_path: Path) -> str:
    """40 rows whose picture, sound and id belong together."""
    forms = ("PNG", "JPEG")
    table = pa.table(
        {
            "id": range(40),
            "image": pa.array(
                [{"bytes": encoded(np.full((16, 16, 3), 5 * i, np.uint8), forms[i % 2]), "path": ""} for i in range(40)]
            ),
            "sound": [wave(i, 10 + i, form=("WAV", "FLAC")[i % 2]) for i in range(40)],
        }
    )
    pq.write_table(table, tmp_path / "media.parquet", row_group_size=7)
    return str(tmp_path)


def test_a_stream_of_pictures_and_sounds(media: str) -> None:
    decoders = {"image": partial(decode.images, size=(8, 8)), "sound": partial(decode.audio, rate=8000)}
    seen = []
    with open_stream(media, global_batch=9, decode=decoders) as stream:
        for batch in stream:
            ids = batch["id"]
            assert torch.all((batch["image"] - 5 * ids.view(-1, 1, 1, 1)).abs() <= 1)
            assert torch.diff(batch["sound_offsets"]).tolist() == (10 + ids).tolist()
            seen += ids.tolist()
    assert sorted(seen) == list(range(40))


def test_a_collate_of_your_own_gets_the_other_columns(media: str) -> None:
    def names(rows: pa.RecordBatch, keys: Any) -> dict[str, Any]:
        return {"names": rows.schema.names, "rows": keys.ids.tolist()}

    with open_stream(media, global_batch=9, collate=names, decode={"image": decode.images}) as stream:
        batch = next(stream)
    assert batch["names"] == ["id", "sound"]
    assert torch.equal(batch["image"][:, 0, 0, 0] // 5, torch.tensor(batch["rows"]))
    with (
        open_stream(media, ["id"], global_batch=9, decode={"image": decode.images}) as stream,
        pytest.raises(DataError, match="no column 'image' is read"),
    ):
        next(stream)


class Table:
    """A source of units that are in memory."""

    def __init__(self, table: pa.Table, rows: int) -> None:
        self._table, self._rows = table, rows

    def start(self, unit: int, needed: float) -> None:
        pass

    def read(self, unit: int) -> pa.Table:
        return self._table.slice(unit * self._rows, self._rows)


def test_damaged_pictures_are_replaced_and_each_is_listed_with_its_reason() -> None:
    pictures: list[Any] = [encoded(np.full((4, 4, 3), i, np.uint8)) for i in range(40)]
    pictures[3], pictures[17], pictures[18] = None, b"no picture", pictures[18][:-30]
    source = TrainStream(
        Mixture([Order([8] * 5, 2, 2, 1)], [1]),
        [Table(pa.table({"image": pictures}), 8)],
        lambda rows, _: Batch(rows.num_rows, image=decode.images(rows["image"])),
        position=0,
        end=40,
        global_batch=20,
        rank=0,
        num_ranks=1,
        micro_batch=10,
        replace=True,
    )
    steps = list(source)
    source.close()
    reasons = {replaced.id: replaced.reason for step in steps for replaced in step.replaced}
    assert sorted(reasons) == [3, 17, 18]
    assert reasons[3] == "the image is missing"
    assert "begin with b'no pictu'" in reasons[17]
    shown = sorted(int(i) for step in steps for micro in step.micros for i in micro["image"][:, 0, 0, 0])
    assert len(shown) == 40
    assert set(range(40)) - set(shown) == {3, 17, 18}
