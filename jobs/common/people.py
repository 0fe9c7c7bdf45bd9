"""Twenty people and five emotions, in poses and by light that differ between training and test.

Who somebody is: the shape of the head, skin, hair and how it is worn, eyes, brows, nose, mouth, beard, glasses. The
clothes and the wall behind are anybody's. Emotions are made by brows, eyelids and mouth, more or less strongly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from jobs.common.faces import FACE, draw_faces
from jobs.common.progress import watched

__all__ = ["EMOTIONS", "LIGHTS", "MIMICS", "PEOPLE", "POSES", "face_splits", "look_of"]

PEOPLE = 20
EMOTIONS = ("happy", "sad", "angry", "surprised", "neutral")
# By emotion: corners of the mouth up, the mouth open, brows up, their inner ends up, eyelids apart.
MIMICS = np.array(
    [
        [0.16, 0.06, 0.02, 0.0, 0.9],
        [-0.15, 0.0, 0.0, 0.12, 0.8],
        [-0.05, 0.02, -0.08, -0.14, 0.9],
        [0.0, 0.18, 0.12, 0.0, 1.5],
        [0.0, 0.0, 0.0, 0.0, 1.0],
    ]
)
STRENGTHS, JITTER = (0.7, 1.2), np.array([0.01, 0.005, 0.01, 0.01, 0.05])
# In degrees from the middle to either side: yaw; azimuth of the light; and how strong that is. Apart, with gaps.
POSES = {"train": (0.0, 28.0), "test": (30.0, 36.0)}
LIGHTS = {"train": (0.0, 55.0), "test": (60.0, 80.0)}
POWERS = {"train": (0.2, 0.5), "test": (0.5, 0.6)}
PITCH, ELEVATION = (-12.0, 12.0), (0.0, 40.0)
SKINS = np.array([[0.98, 0.85, 0.75], [0.9, 0.72, 0.58], [0.76, 0.56, 0.42], [0.55, 0.38, 0.27], [0.4, 0.27, 0.2]])
HAIRS = np.array([[0.1, 0.08, 0.07], [0.35, 0.2, 0.1], [0.85, 0.7, 0.35], [0.65, 0.25, 0.1], [0.7, 0.7, 0.7]])
IRISES = np.array([[0.25, 0.15, 0.08], [0.2, 0.4, 0.7], [0.25, 0.5, 0.3]])
# Bald, short, a fringe, long: where hair begins on the forehead, and how far down it hangs at the sides.
STYLES = ((-1.5, 0.0), (-0.62, -0.1), (-0.38, 0.1), (-0.55, 0.9))


def look_of(who: int) -> dict[str, Any]:
    """What a person looks like, always; lengths are in halves of the head's width and height."""
    rng = np.random.default_rng(1000 + who)
    line, hangs = STYLES[(who * 3 + who // 4) % 4]
    return {
        # The head's own are in halves of the picture's.
        "wide": rng.uniform(0.66, 0.86),
        "high": rng.uniform(0.82, 0.98),
        "skin": SKINS[who % 5] + rng.uniform(-0.03, 0.03, 3),
        "hair": HAIRS[(who // 5 + who) % 5],
        "line": line,
        "hangs": hangs,
        "iris": IRISES[rng.integers(3)],
        "apart": rng.uniform(0.3, 0.42),
        "eye": rng.uniform(0.12, 0.16),
        "brow": rng.uniform(0.03, 0.06),
        "nose": rng.uniform(0.07, 0.14),
        "mouth": rng.uniform(0.26, 0.4),
        "lip": np.array([0.75, 0.35, 0.35]) * rng.uniform(0.7, 1.1),
        "beard": float(rng.random() < 0.3),
        "glasses": float(rng.random() < 0.3),
    }


def face_splits(train: int, test: int, noise: float = 0.02) -> dict[str, pa.Table]:
    """So many faces of each, everybody with every emotion equally often, in columns:

    `image` (bytes), `person`, `emotion`, and in degrees `yaw`, `pitch`, `azimuth`, `elevation`; `power` of the light.
    """
    looks, splits = [look_of(who) for who in range(PEOPLE)], {}
    for seed, (name, count) in enumerate({"train": train, "test": test}.items()):
        rng = np.random.default_rng(seed)
        # In an order that says nothing, since row groups are of rows that follow each other.
        kinds = rng.permutation(count) % (PEOPLE * len(EMOTIONS))
        who, emotions = kinds % PEOPLE, kinds // PEOPLE
        mimics = MIMICS[-1] + rng.uniform(*STRENGTHS, (count, 1)) * (MIMICS[emotions] - MIMICS[-1])
        mimics += rng.normal(0, JITTER, mimics.shape)
        sides = rng.choice([-1, 1], (2, count))
        yaw, azimuth = (side * rng.uniform(*of[name], count) for side, of in zip(sides, (POSES, LIGHTS), strict=True))
        pitch, elevation = (rng.uniform(*limits, count) for limits in (PITCH, ELEVATION))
        power = rng.uniform(*POWERS[name], count)
        pose, light = np.radians([yaw, pitch]).T, np.stack([*np.radians([azimuth, elevation]), power], 1)
        ground, clothes = rng.uniform(0.1, 0.9, (2, count, 3)).astype(np.float32)
        levels = []
        for rows in watched(np.array_split(np.arange(count), -(-count // 128)), "drawing faces"):
            chosen = (one[rows] for one in (mimics, pose, light, ground, clothes))
            faces = draw_faces([looks[i] for i in who[rows]], *chosen) + rng.normal(
                0, noise, (len(rows), FACE, FACE, 3)
            )
            levels += [one.tobytes() for one in np.round(255 * faces.clip(0, 1)).astype(np.uint8)]
        columns = {"yaw": yaw, "pitch": pitch, "azimuth": azimuth, "elevation": elevation, "power": power}
        images = pa.array(levels, pa.binary(FACE * FACE * 3))
        names = {"person": pa.array(who, pa.uint8()), "emotion": pa.array(emotions, pa.uint8())}
        numbers = {key: pa.array(value, pa.float32()) for key, value in columns.items()}
        splits[name] = pa.table({"image": images, **names, **numbers})
    return splits
