"""Clips of faces whose expression comes or goes: eight frames of 24 x 24 grey levels, as jobs.common.clips has them.

Each expression is shown both ways, on a head that turns a little: what is in a frame does not tell whether it comes or
goes, its place in the clip does. Nobody of the test's is in the training data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from jobs.common.clips import FRAMES, SIZE
from jobs.common.faces import FACE, draw_faces
from jobs.common.people import EMOTIONS, MIMICS, look_of
from jobs.common.progress import watched

__all__ = ["CHANGES", "face_clips", "mimics_of"]

F32 = npt.NDArray[np.float32]

CHANGES = ("starts smiling", "stops smiling", "starts to marvel", "stops marvelling", "gets angry", "calms down")
# By change: what is shown in the end, or at first.
SHOWN = tuple(EMOTIONS.index(name) for name in ("happy", "happy", "surprised", "surprised", "angry", "angry"))
# How much of the expression is shown where it is least and where it is most; of a head's turn, in degrees.
LEAST, MOST, YAW, TURN, PITCH = (0.0, 0.2), (0.9, 1.3), 20.0, 8.0, 8.0
PEOPLE = {"train": range(100, 160), "test": range(160, 190)}


def mimics_of(changes: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """(clips,) of CHANGES -> (clips, FRAMES, 5), as in MIMICS."""
    count, still = len(changes), MIMICS[EMOTIONS.index("neutral")]
    low, high = (rng.uniform(*of, (count, 1)) for of in (LEAST, MOST))
    # An expression takes some of the clip, sooner or later.
    begin, lasts = rng.uniform(0.0, 0.3, (count, 1)), rng.uniform(0.4, 0.7, (count, 1))
    comes = ((np.linspace(0, 1, FRAMES) - begin) / lasts).clip(0, 1)
    part = np.where(changes[:, None] % 2, 1 - comes, comes)
    shown = MIMICS[np.array(SHOWN)[changes]][:, None]
    return np.asarray(still + (low + (high - low) * part)[..., None] * (shown - still))


def face_clips(
    name: str, changes: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[F32, npt.NDArray[np.int64]]:
    """Clips of a split, one of each of (clips,) of CHANGES.

    Returns:
        (clips, FRAMES, SIZE, SIZE) grey levels in [0, 1], and (clips,) who is seen.
    """
    count = len(changes)
    people, mimics = rng.choice(PEOPLE[name], count), mimics_of(changes, rng)
    middle = rng.uniform([-YAW, -PITCH], [YAW, PITCH], (count, 2))
    turns = np.linspace(-0.5, 0.5, FRAMES)[None, :, None] * rng.uniform(-TURN, TURN, (count, 1, 2))
    poses = np.radians(middle[:, None] + turns)
    light = np.stack([rng.uniform(-1, 1, count), rng.uniform(0, 0.7, count), rng.uniform(0.2, 0.5, count)], 1)
    ground, clothes = rng.uniform(0.1, 0.9, (2, count, 3)).astype(np.float32)
    made, fine = np.empty((count, FRAMES, SIZE, SIZE), np.float32), FACE // SIZE
    for rows in watched(np.array_split(np.arange(count), -(-count // 16)), "drawing faces"):
        looks = [look_of(who) for who in people[rows] for _ in range(FRAMES)]
        lit, behind, worn = (np.repeat(of[rows], FRAMES, 0) for of in (light, ground, clothes))
        drawn = draw_faces(looks, mimics[rows].reshape(-1, 5), poses[rows].reshape(-1, 2), lit, behind, worn)
        made[rows] = drawn.mean(-1).reshape(len(rows), FRAMES, SIZE, fine, SIZE, fine).mean((3, 5))
    return made, people
