"""Faces as they are drawn: a head is an ellipsoid, painted, turned and lit, 48 x 48 pixels in colour.

draw_faces([look_of(3)], mimics, pose, light, ground, clothes)      # (1, FACE, FACE, 3); see jobs.common.people
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FACE", "draw_faces"]

F32 = npt.NDArray[np.float32]
FACE = 48


def draw_faces(
    looks: Sequence[Mapping[str, Any]], mimics: Any, pose: Any, light: Any, ground: Any, clothes: Any
) -> F32:
    """Faces (rows, FACE, FACE, 3) in [0, 1].

    Args:
        looks: (rows,), as of `look_of`; mimics: (rows, 5), as in MIMICS.
        pose: (rows, 2), yaw to the right and pitch downwards in radians.
        light: (rows, 3), where it comes from (azimuth to the right, elevation, in radians) and how strong it is, of 1.
        ground, clothes: (rows, 3), colours.
    """
    look = {name: np.array([one[name] for one in looks], np.float32)[:, None, None] for name in looks[0]}
    yaw, pitch = np.asarray(pose, np.float32).T[:, :, None, None]
    across = np.linspace(-1, 1, FACE, dtype=np.float32)
    x, y = across / look["wide"], (across[:, None] + 0.02) / look["high"]
    canvas = np.broadcast_to(ground[:, None, None], (len(looks), FACE, FACE, 3)).astype(np.float32)
    radius = np.hypot(x, y)
    # Of what is seen on the ellipsoid: where it is on the head itself, to the right, down and to the front.
    z = np.sqrt(np.maximum(0, 1 - radius**2))
    v, depth = y * np.cos(pitch) - z * np.sin(pitch), y * np.sin(pitch) + z * np.cos(pitch)
    u, front = x * np.cos(yaw) - depth * np.sin(yaw), x * np.sin(yaw) + depth * np.cos(yaw)
    for color, amount in [
        (clothes[:, None, None], within(np.hypot(x / 1.5, (y - 1.7) / 0.75) - 1)),
        *behind(look, x, y),
        (look["skin"], within(radius - 1)),
        *((color, amount * within(radius - 1)) for color, amount in features(look, u, v, front, mimics)),
    ]:
        canvas += amount[..., None].clip(0, 1) * (color - canvas)
    # Lambert's law on the ellipsoid; what is behind it is lit evenly.
    azimuth, elevation, strength = np.asarray(light, np.float32).T[:, :, None, None]
    facing = np.cos(elevation) * (x * np.sin(azimuth) + z * np.cos(azimuth)) - y * np.sin(elevation)
    bright = 1 - strength * (1 - facing.clip(0, 1)) * within(radius - 1)
    return np.asarray((canvas * bright[..., None]).clip(0, 1), np.float32)


def within(distance: Any, blur: float = 0.05) -> Any:
    """1 where a distance is below 0, and 0 where it is above, with a soft edge."""
    return (0.5 - distance / (2 * blur)).clip(0, 1)


def behind(look: Mapping[str, Any], x: Any, y: Any) -> Iterator[tuple[Any, Any]]:
    """Colours and where they are: neck and hair, behind the head."""
    has_hair = look["line"] > -1
    yield look["skin"] * 0.75, within(np.maximum(abs(x) - 0.5, abs(y - 0.7) - 0.45))
    outline = np.minimum(np.hypot(x, y) - 1.13, np.maximum(abs(x) - 1.12, -y))
    yield look["hair"] * 0.8, within(np.maximum(outline, y - look["hangs"])) * has_hair


def features(look: Mapping[str, Any], u: Any, v: Any, front: Any, mimics: Any) -> Iterator[tuple[Any, Any]]:
    """Colours and where they are: on the head, each over those before."""
    smile, gape, raised, worried, lids = np.asarray(mimics, np.float32).T[:, :, None, None]
    seen, side, dark = within(-front), abs(u), np.array([0.15, 0.07, 0.08], np.float32)
    yield look["hair"], seen * look["beard"] * within(np.minimum(np.maximum(0.3 - v, 0.5 - side), 0.68 - v))
    part = side / look["mouth"]
    bow, arch = abs(v - 0.52 + smile * (part**2 - 0.5)), np.sqrt(np.maximum(0, 1 - part**2))
    yield look["lip"], seen * within(bow - (0.045 + gape) * (0.3 + 0.7 * arch), 0.03) * within(part - 1)
    yield dark, seen * within(bow - gape * arch, 0.03) * within(part - 0.95) * (gape > 0.01)
    yield look["skin"] * 0.8, seen * within(np.hypot(u / look["nose"], (v - 0.2) / 0.06) - 1, 0.3)
    away, level = side - look["apart"], v + 0.12
    ball = within(np.hypot(away / look["eye"], level / (look["eye"] * 0.6 * lids)) - 1, 0.15)
    yield np.ones(3, np.float32), seen * ball
    yield look["iris"], seen * ball * within(np.hypot(away, level) / look["eye"] - 0.55, 0.15)
    arc = v + 0.34 + raised - worried * away / look["eye"] * 0.8
    yield look["hair"] * 0.6, seen * within(abs(arc) - look["brow"], 0.03) * within(abs(away) - 0.17)
    rims = np.minimum(abs(np.hypot(away, level) - 0.23), abs(level) + (away > -0.23))
    yield dark, seen * look["glasses"] * within(rims - 0.025, 0.03)
    top = np.maximum(within(v - look["line"]), within(np.maximum(front + 0.1, v - look["hangs"])))
    yield look["hair"], top * (look["line"] > -1)
