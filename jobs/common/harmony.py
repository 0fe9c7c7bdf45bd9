"""Chorales by rule, for four voices: progressions of a major key's triads, led by the smallest movements.

Pieces are (steps, voices) of MIDI pitches, from the bass up.
"""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import numpy.typing as npt

__all__ = ["LOWEST", "SPAN", "STEPS", "TRIADS", "VOICES", "chorale", "chord_statistics"]

I64 = npt.NDArray[np.int64]
STEPS, VOICES = 16, 4
# Each voice has as many pitches, from its lowest.
LOWEST, SPAN = np.array([40, 48, 55, 60]), 24
SCALE = np.array([0, 2, 4, 5, 7, 9, 11])
# Pitch classes of the triad on each degree, above the tonic.
TRIADS = np.array([[SCALE[(degree + third) % 7] for third in (0, 2, 4)] for degree in range(7)])
# Where a degree goes to, and how often; the last chord but one is the fifth's, and the last the tonic's.
FOLLOWS: tuple[dict[int, float], ...] = (
    {3: 0.3, 4: 0.25, 5: 0.2, 1: 0.15, 2: 0.1},
    {4: 0.7, 6: 0.15, 3: 0.15},
    {5: 0.6, 3: 0.4},
    {4: 0.4, 0: 0.3, 1: 0.3},
    {0: 0.65, 5: 0.25, 2: 0.1},
    {3: 0.4, 1: 0.35, 4: 0.25},
    {0: 1.0},
)


def chorale(rng: np.random.Generator) -> I64:
    """(STEPS, VOICES), in one of twelve keys."""
    degrees, tonic = [0], int(rng.integers(12))
    while len(degrees) < STEPS - 2:
        after = FOLLOWS[degrees[-1]]
        degrees.append(int(rng.choice(list(after), p=list(after.values()))))
    piece: list[I64] = []
    for degree in [*degrees, 4, 0]:
        choices = _voicings(tonic, degree)
        before = piece[-1] if piece else LOWEST + SPAN // 2
        moved = np.abs(choices - before).sum(1) + rng.uniform(0, 4, len(choices))
        piece.append(choices[moved.argmin()])
    return np.stack(piece)


@cache
def _voicings(tonic: int, degree: int) -> I64:
    """(choices, VOICES): the root is below, no voice crosses another, and all three pitch classes sound."""
    triad = (TRIADS[degree] + tonic) % 12
    ranges = [low + np.arange(SPAN) for low in LOWEST]
    pitches = [ranges[0][ranges[0] % 12 == triad[0]], *(one[np.isin(one % 12, triad)] for one in ranges[1:])]
    found = np.array(list(itertools.product(*pitches)))
    whole = [len(set(one % 12)) == 3 and bool((np.diff(one) > 0).all()) for one in found]
    return found[whole]


def chord_statistics(pieces: I64) -> dict[str, npt.NDArray[np.float64]]:
    """What is in pieces (pieces, STEPS, VOICES), each by the major key that fits it best.

    Returns:
        `in_key` (1,): the share of notes that belong to the key; `chords` (8,): the share of steps with each degree's
        triad, and of all others; `changes` (64,): of pairs of neighbours. Means over the pieces.
    """
    classes = pieces % 12
    counts = np.stack([(classes == one).sum((1, 2)) for one in range(12)], 1)
    within = np.stack([counts[:, (SCALE + tonic) % 12].sum(1) for tonic in range(12)], 1)
    # Of keys that fit equally well, the one whose tonic ends in the bass.
    ends = classes[:, -1, :1] == np.arange(12)
    tonics = (within + 0.5 * ends).argmax(1)
    notes = np.zeros((*pieces.shape[:2], 12), bool)
    np.put_along_axis(notes, (classes - tonics[:, None, None]) % 12, True, 2)
    triads = np.zeros((7, 12), bool)
    np.put_along_axis(triads, TRIADS, True, 1)
    same = (notes[:, :, None] == triads).all(-1)
    chords = np.where(same.any(-1), same.argmax(-1), 7)
    pairs = 8 * chords[:, :-1] + chords[:, 1:]
    return {
        "in_key": np.array([(np.take_along_axis(within, tonics[:, None], 1)[:, 0] / counts.sum(1)).mean()]),
        "chords": np.bincount(chords.ravel(), minlength=8) / chords.size,
        "changes": np.bincount(pairs.ravel(), minlength=64) / pairs.size,
    }
