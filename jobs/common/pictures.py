"""Pictures with what a network says of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from dltrain import Artifact

__all__ = ["boxed", "draw_sheet", "labelled", "named", "tiles"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
ZOOM = 16


def labelled(pixels: F32, label: object, probability: float) -> Artifact:
    """A picture enlarged, (height, width) in [0, 1], with its label below."""
    said = f"{label}  {probability:.0%}"
    large = np.kron(pixels, np.ones((ZOOM, ZOOM)))
    picture = Image.fromarray((255 * large).astype(np.uint8))
    canvas = Image.new("L", (picture.width, picture.height + 16))
    canvas.paste(picture)
    ImageDraw.Draw(canvas).text((4, picture.height + 2), said, fill=255)
    return Artifact.image(np.asarray(canvas), said)


def draw_sheet(images: F32, guesses: list[int], labels: list[int], columns: int = 16) -> U8:
    """Digits in rows, each above what it was taken for; the wrong ones in a red frame, with what they are.

    Args:
        images: (rows, side, side) in [0, 1].

    Returns:
        (height, width, 3), bytes.
    """
    margin, text = 3, 13
    size = images.shape[-1] * max(1, 40 // images.shape[-1])
    wide, high = size + 2 * margin, size + 2 * margin + text
    sheet = Image.new("RGB", (columns * wide, -(-len(images) // columns) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, guess, label) in enumerate(zip(images, guesses, labels, strict=True)):
        x, y = i % columns * wide, i // columns * high
        ink = Image.fromarray(255 - np.round(image * 255).astype(np.uint8)).resize((size, size))
        sheet.paste(ink, (x + margin, y + margin))
        color = "black" if guess == label else "red"
        pen.text((x + margin + 1, y + size + margin), f"{guess}" if guess == label else f"{guess} is {label}", color)
        if guess != label:
            pen.rectangle((x, y, x + wide - 1, y + high - 1), outline="red", width=2)
    return np.asarray(sheet)


def tiles(images: F32, columns: int = 16, zoom: int = 4, gap: int = 2) -> U8:
    """Pictures in rows, enlarged, on white.

    Args:
        images: (rows, height, width) or (rows, height, width, 3) in [0, 1].

    Returns:
        (height, width) or (height, width, 3), bytes.
    """
    large = images.repeat(zoom, 1).repeat(zoom, 2)
    rows, (height, width) = -(-len(images) // columns), (side + gap for side in large.shape[1:3])
    sheet = np.ones((rows * height + gap, min(columns, len(images)) * width + gap, *large.shape[3:]))
    for i, picture in enumerate(large):
        y, x = gap + i // columns * height, gap + i % columns * width
        sheet[y : y + height - gap, x : x + width - gap] = picture
    return np.round(sheet.clip(0, 1) * 255).astype(np.uint8)


def boxed(
    pixels: U8, boxes: Sequence[Sequence[float]], names: Sequence[str], good: Sequence[bool], zoom: int = 4
) -> U8:
    """A grey picture enlarged, with boxes around what is in it; those that are not good in red.

    Args:
        boxes: left, top, right, bottom, in its pixels.
    """
    picture = Image.fromarray(pixels).resize((pixels.shape[1] * zoom, pixels.shape[0] * zoom)).convert("RGB")
    pen = ImageDraw.Draw(picture)
    for box, name, is_good in zip(boxes, names, good, strict=True):
        color = "lime" if is_good else "red"
        left, top, right, bottom = (zoom * edge for edge in box)
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=color, width=1)
        pen.text((left + 2, max(0, top - 11)), name, color)
    return np.asarray(picture)


def named(pixels: U8, text: str, good: bool, zoom: int = 3) -> U8:
    """A colour picture enlarged, on white with a line of text below; red where it is not good."""
    picture = Image.fromarray(pixels).resize((pixels.shape[1] * zoom, pixels.shape[0] * zoom), Image.Resampling.NEAREST)
    canvas = Image.new("RGB", (picture.width, picture.height + 13), "white")
    canvas.paste(picture)
    ImageDraw.Draw(canvas).text((2, picture.height), text, "black" if good else "red")
    return np.asarray(canvas)
