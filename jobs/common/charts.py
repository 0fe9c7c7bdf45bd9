"""Small charts as pixels: dots of two kinds, lines over time, and spectrograms."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

__all__ = ["dots", "lines", "spectrogram"]

U8 = npt.NDArray[np.uint8]
F64 = npt.NDArray[np.float64]
INK = ("#4477aa", "#cc3311", "#228833", "#aaaaaa")
WIDE, HIGH, LEFT, ROOM = 720, 260, 44, 24


def _frame(title: str, low: float, high: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A white canvas with three levels of the vertical axis."""
    canvas = Image.new("RGB", (WIDE, HIGH), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((LEFT, 5), title, "black")
    for level in (low, (low + high) / 2, high):
        y = _height(np.array([level]), low, high)[0]
        pen.line((LEFT, y, WIDE - 8, y), "#dddddd")
        pen.text((4, y - 6), f"{level:.3g}", "black")
    return canvas, pen


def _height(values: F64, low: float, high: float) -> F64:
    """Pixels from the top."""
    share = (values - low) / max(high - low, 1e-12)
    return HIGH - ROOM / 2 - share * (HIGH - 1.5 * ROOM)


def _across(count: int) -> F64:
    return np.linspace(LEFT + 6, WIDE - 14, count)


def dots(values: npt.ArrayLike, marked: npt.NDArray[np.bool_], title: str) -> U8:
    """Values in [0, 1] from left to right, marked ones in red; (height, width, 3), bytes."""
    canvas, pen = _frame(title, 0.0, 1.0)
    heights = _height(np.asarray(values, np.float64), 0.0, 1.0)
    for x, y, mark in zip(_across(len(heights)), heights, marked, strict=True):
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), INK[1] if mark else INK[0])
    return np.asarray(canvas)


def lines(series: Mapping[str, npt.ArrayLike], title: str) -> U8:
    """Curves over the same times, each in its color with its name; (height, width, 3), bytes.

    Args:
        series: by name, all of one length; the first is drawn below the others, in grey.
    """
    values = {name: np.asarray(one, np.float64) for name, one in series.items()}
    low, high = min(v.min() for v in values.values()), max(v.max() for v in values.values())
    canvas, pen = _frame(title, float(low), float(high))
    place = WIDE - 14
    for (name, one), ink in zip(values.items(), (INK[3], *INK), strict=False):
        points = list(zip(_across(len(one)).tolist(), _height(one, low, high).tolist(), strict=True))
        pen.line(points, ink, width=1 if ink == INK[3] else 2)
        place -= int(pen.textlength(name)) + 12
        pen.text((place, 5), name, ink)
    return np.asarray(canvas)


def spectrogram(values: npt.ArrayLike, title: str) -> U8:
    """(frames, bands) of any numbers, time to the right and high tones above, louder is darker, below its title."""
    # (bands, frames), the highest first
    sound = np.asarray(values, np.float64).T[::-1]
    grey = 255 - 255 * (sound - sound.min()) / max(float(np.ptp(sound)), 1e-12)
    picture = Image.fromarray(grey.astype(np.uint8)).resize((2 * sound.shape[1], 3 * sound.shape[0]))
    canvas = Image.new("RGB", (max(picture.width, 240), picture.height + ROOM), "white")
    canvas.paste(picture, (0, ROOM))
    ImageDraw.Draw(canvas).text((4, 5), title, "black")
    return np.asarray(canvas)
