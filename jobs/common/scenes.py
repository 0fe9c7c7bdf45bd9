"""Scenes of 64 x 64 grey levels: handwritten digits and shapes at any place, with a box around each.

They differ in size, lean and brightness, on a ground that is brighter on one side, with noise. Boxes are tight.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageDraw

from jobs.common.digits import LEVELS, SIDE, digit_splits
from jobs.common.progress import watched

__all__ = ["DIGITS", "KINDS", "SCENE", "scene_splits", "stamp"]

F32 = npt.NDArray[np.float32]
DIGITS, SCENE = 10, 64
KINDS = (*map(str, range(DIGITS)), "circle", "square", "triangle")
# By kind of shape, corners on a circle; the circle itself has none.
CORNERS = (0, 4, 3)
# Things of a scene; pixels across; the largest lean of a digit in degrees.
COUNTS, SIZES, LEAN = (2, 6), (14, 26), 12.0
# What is fainter than this is not in a box; how much of a box others may cover.
SEEN, COVERED = 0.25, 0.15
FINER = 4


def stamp(kind: int, scan: F32 | None, size: int, angle: float) -> F32:
    """One thing, cut out: (height, width) in [0, 1]. A digit's scan is (8, 8) in [0, 1]; angles are in degrees."""
    if scan is not None:
        large = Image.fromarray(np.round(255 * scan).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        picture = large.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    else:
        side, corners = FINER * size, CORNERS[kind - DIGITS]
        fine = Image.new("L", (side, side))
        pen, middle = ImageDraw.Draw(fine), side / 2
        if corners:
            pen.regular_polygon((middle, middle, middle - 1), corners, angle, fill=255)
        else:
            pen.ellipse((0, 0, side - 1, side - 1), fill=255)
        picture = fine.resize((size, size), Image.Resampling.BOX)
    ink = np.asarray(picture, np.float32) / 255
    rows, columns = (np.flatnonzero((ink > SEEN).any(axis)) for axis in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def place(height: int, width: int, others: list[list[int]], rng: np.random.Generator) -> list[int] | None:
    """Left, top, right, bottom where hardly anything is yet; None where nothing was found in 30 tries."""
    for _ in range(30):
        left, top = int(rng.integers(0, SCENE - width + 1)), int(rng.integers(0, SCENE - height + 1))
        box = [left, top, left + width, top + height]
        if all(covered(box, other) <= COVERED for other in others):
            return box
    return None


def covered(a: list[int], b: list[int]) -> float:
    """What two boxes share, of the smaller one."""
    wide, high = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return wide * high / min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))


def scene(digits: F32, labels: npt.NDArray[np.uint8], rng: np.random.Generator, noise: float) -> dict[str, object]:
    """One row: `image`, and of each thing its box, its kind, and which of the digits (scans, 8, 8) it is, or -1."""
    across = np.linspace(-1, 1, SCENE)
    slope = rng.uniform(-0.1, 0.1, 2)
    canvas = rng.uniform(0.1, 0.3) + slope[0] * across[None, :] + slope[1] * across[:, None]
    boxes, kinds, scans = list[list[int]](), list[int](), list[int]()
    for _ in range(rng.integers(COUNTS[0], COUNTS[1] + 1)):
        kind, size = int(rng.integers(len(KINDS))), int(rng.integers(SIZES[0], SIZES[1] + 1))
        which = int(rng.choice(np.flatnonzero(labels == kind))) if kind < DIGITS else -1
        angle = rng.uniform(-LEAN, LEAN) if which >= 0 else rng.uniform(0, 360)
        ink = stamp(kind, digits[which] if which >= 0 else None, size, float(angle))
        box = place(*ink.shape, boxes, rng)
        if box is None:
            continue
        part = canvas[box[1] : box[3], box[0] : box[2]]
        part += ink * (rng.uniform(0.55, 1.0) - part)
        boxes, kinds, scans = [*boxes, box], [*kinds, kind], [*scans, which]
    levels = np.round(255 * (canvas + rng.normal(0, noise, canvas.shape)).clip(0, 1)).astype(np.uint8)
    return {"image": levels.tobytes(), "boxes": boxes, "kinds": kinds, "scans": scans}


def scene_splits(train: int, test: int, noise: float = 0.04) -> dict[str, pa.Table]:
    """So many scenes of each; the test shows digits of its own. Boxes are left, top, right, bottom in pixels.

    Columns are `image` (bytes), and lists: `boxes`, `kinds` (of KINDS) and `scans` (of the split's; -1 for shapes).
    """
    lists = {"boxes": pa.list_(pa.float32(), 4), "kinds": pa.uint8(), "scans": pa.int16()}
    schema = pa.schema({"image": pa.binary(SCENE * SCENE), **{name: pa.list_(kind) for name, kind in lists.items()}})
    splits, scans = {}, digit_splits()
    for seed, (name, count) in enumerate({"train": train, "test": test}.items()):
        pixels = np.stack([np.frombuffer(one, np.uint8) for one in scans[name]["image"].to_pylist()])
        digits = pixels.reshape(-1, SIDE, SIDE).astype(np.float32) / np.float32(LEVELS)
        rng, labels = np.random.default_rng(seed), scans[name]["label"].to_numpy()
        rows = [scene(digits, labels, rng, noise) for _ in watched(range(count), "drawing scenes")]
        splits[name] = pa.Table.from_pylist(rows, schema)
    return splits
