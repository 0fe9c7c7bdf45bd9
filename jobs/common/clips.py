"""Clips of handwritten digits that move: eight actions, eight frames of 24 x 24 grey levels each.

What an action does not change differs from clip to clip and drifts a little, so that no single frame tells the action.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.nn.functional as F

__all__ = ["ACTIONS", "FRAMES", "SIZE", "bytes_of", "clip_splits", "clips", "frames_of", "moves"]

F32 = npt.NDArray[np.float32]
ACTIONS = ("left", "right", "up", "down", "grows", "shrinks", "turns left", "turns right")
FRAMES, SIZE = 8, 24
# Of the canvas's half width: how far it goes, and how far it may be from the middle half way.
STEPS, OFFSET = (0.35, 0.6), 0.2
# Half the width of a digit against half that of the canvas, halfway; its growth; its turn in radians.
SCALES, GROWTHS, TURNS = (0.4, 0.55), (1.4, 1.8), (0.6, 1.2)
DRIFT = 0.1


def moves(actions: npt.NDArray[np.int64], rng: np.random.Generator) -> F32:
    """(clips,) of ACTIONS -> (clips, FRAMES, 4): x and y to the right and down, scale, angle to the left."""
    count = len(actions)
    time = np.linspace(-0.5, 0.5, FRAMES)[None, :]

    def path(plus: int, minus: int, size: tuple[float, float], drift: float) -> F32:
        sign = (actions == plus).astype(float) - (actions == minus)
        pace = sign * rng.uniform(*size, count) + (sign == 0) * rng.uniform(-drift, drift, count)
        return np.asarray(pace[:, None] * time, np.float32)

    middle = rng.uniform(-OFFSET, OFFSET, (2, count, 1))
    x = middle[0] + path(1, 0, (2 * STEPS[0], 2 * STEPS[1]), DRIFT)
    y = middle[1] + path(3, 2, (2 * STEPS[0], 2 * STEPS[1]), DRIFT)
    growth = path(4, 5, (float(np.log(GROWTHS[0])), float(np.log(GROWTHS[1]))), DRIFT)
    scale = rng.uniform(*SCALES, (count, 1)) * np.exp(growth)
    angle = rng.uniform(-0.3, 0.3, (count, 1)) + path(6, 7, TURNS, DRIFT)
    return np.stack([x, y, scale, angle], -1).astype(np.float32)


def clips(digits: F32, paths: F32) -> F32:
    """Digits (clips, side, side) in [0, 1] along paths (clips, FRAMES, 4) -> (clips, FRAMES, SIZE, SIZE)."""
    count, frames = paths.shape[:2]
    x, y, scale, angle = torch.from_numpy(paths).reshape(-1, 4).unbind(1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    # From a place on the canvas to the place on the digit that is seen there.
    seen = torch.stack(
        [torch.stack([cos, -sin, -cos * x + sin * y], 1), torch.stack([sin, cos, -sin * x - cos * y], 1)], 1
    )
    grid = F.affine_grid(seen, [count * frames, 1, SIZE, SIZE], align_corners=False)
    still = torch.from_numpy(digits)[:, None].repeat_interleave(frames, 0)
    return np.asarray(F.grid_sample(still, grid, align_corners=False).reshape(count, frames, SIZE, SIZE).numpy())


def clip_splits(train: int, test: int, noise: float = 0.05) -> dict[str, pa.Table]:
    """So many clips of each, with columns `clip` (bytes), `action` and `digit`; the test shows digits of its own."""
    from jobs.common.digits import LEVELS, SIDE, digit_splits

    splits = {}
    for seed, (name, count) in enumerate({"train": train, "test": test}.items()):
        rng, scans = np.random.default_rng(seed), digit_splits()[name]
        chosen = rng.integers(len(scans), size=count)
        pixels = frames_of(scans["image"].take(pa.array(chosen)).to_pylist(), (SIDE, SIDE)) / np.float32(LEVELS)
        actions = np.arange(count) % len(ACTIONS)
        made = clips(pixels, moves(actions, rng)) + rng.normal(0, noise, (count, FRAMES, SIZE, SIZE))
        digit = scans["label"].take(pa.array(chosen))
        splits[name] = pa.table({"clip": bytes_of(made), "action": pa.array(actions, pa.uint8()), "digit": digit})
    return splits


def bytes_of(made: F32) -> pa.Array:
    """Clips (rows, FRAMES, SIZE, SIZE) in [0, 1] as bytes of grey levels, which `frames_of` reads."""
    levels = np.round(255 * made.clip(0, 1)).astype(np.uint8)
    return pa.array([one.tobytes() for one in levels], pa.binary(FRAMES * SIZE * SIZE))


def frames_of(rows: Sequence[bytes], shape: tuple[int, ...]) -> F32:
    """Bytes of each row as grey levels, (rows, *shape)."""
    return np.stack([np.frombuffer(row, np.uint8) for row in rows]).reshape(-1, *shape).astype(np.float32)
