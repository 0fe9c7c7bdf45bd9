"""What jobs.image_cnn makes of pictures that are not from its data, and how it shows what it found."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dltrain import Batch, Input
from dltrain.errors import BadRowsError
from jobs.common.digits import LEVELS, SIDE
from jobs.common.pictures import draw_sheet
from jobs.image_cnn import ImageCnn


def picture(ink: np.ndarray, side: int, dark: bool, mode: str = "L") -> bytes:  # type: ignore[type-arg]
    """Levels (8, 8) of ink as a file of side x side pixels."""
    grey = (ink / LEVELS * 200).astype(np.uint8)
    image = (
        Image.fromarray(240 - grey if dark else 30 + grey).resize((side, side), Image.Resampling.NEAREST).convert(mode)
    )
    sink = io.BytesIO()
    image.save(sink, "PNG" if mode == "RGBA" else "JPEG", quality=95)
    return sink.getvalue()


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize(("side", "mode"), [(64, "L"), (80, "RGB"), (96, "RGBA")])
def test_pictures_become_what_the_data_hold(dark: bool, side: int, mode: str) -> None:
    ink = np.zeros((SIDE, SIDE))
    ink[1:7, 3:5] = LEVELS
    ink[6, 2:6] = LEVELS / 2
    row = ImageCnn().read(Input("one.png", data=picture(ink, side, dark, mode)))
    found = np.frombuffer(row["image"], np.uint8).reshape(SIDE, SIDE)
    # Made smaller, a picture is a little blurred.
    assert np.abs(found - ink).max() <= 3
    assert np.abs(found - ink).mean() < 1


def test_what_is_no_picture() -> None:
    with pytest.raises(BadRowsError, match="no image that Pillow knows"):
        ImageCnn().read(Input("one.png", data=b"not a picture"))
    with pytest.raises(BadRowsError, match="the image is missing"):
        ImageCnn().read(Input("line 1", text="hello"))


def test_a_picture_is_drawn_with_its_label() -> None:
    task = ImageCnn()
    batch = Batch(1, image=torch.ones(1, 1, SIDE, SIDE))
    (drawn,) = task.draw(batch, [{"label": 7, "probability": 0.987}])
    assert drawn.caption == "7  99%"
    pixels = np.asarray(Image.open(io.BytesIO(drawn.data)))
    assert pixels.shape == (144, 128)
    assert (pixels[:128] == 255).all()
    # The label is written below.
    assert 0 < (pixels[128:] > 0).sum() < 300


def red(pixels: np.ndarray) -> np.ndarray:
    """Which pixels are."""
    found: np.ndarray = (pixels[..., 0] > 200) & (pixels[..., 1:] < 100).all(-1)
    return found


def test_wrong_ones_are_marked_where_they_are() -> None:
    images = np.random.default_rng(0).random((20, 8, 8)).astype(np.float32)
    labels = [i % 10 for i in range(20)]
    good = draw_sheet(images, labels, labels)
    assert good.dtype == np.uint8
    assert not red(good).any()
    guesses = [*labels[:17], 0, *labels[18:]]
    marked = red(draw_sheet(images, guesses, labels))
    rows, columns = np.nonzero(marked)
    # The second row's second place of two rows of sixteen.
    assert rows.min() >= marked.shape[0] // 2
    assert marked.shape[1] / 16 <= columns.min() <= columns.max() < 2 * marked.shape[1] / 16


def test_the_task_shows_its_batch() -> None:
    task = ImageCnn(width=4, blocks=1)
    model = task.build().eval()
    batch = Batch(6, image=torch.rand(6, 1, 8, 8), label=torch.arange(6))
    with torch.no_grad():
        wrong = int((model(batch.image).argmax(1) != batch.label).sum())
        (shown,) = task.samples(model, batch)
    assert shown.caption == f"6 test digits and what they were taken for; {wrong} wrong, in red"
    picture = np.asarray(Image.open(io.BytesIO(shown.data)))
    assert red(picture).any() == (wrong > 0)
