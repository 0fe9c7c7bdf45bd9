"""Phrases spoken by many voices at many speeds, with noise: Ogg Vorbis, text and voice."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa

from jobs.common.phrases import phrase
from jobs.common.progress import watched
from jobs.common.speech import RATE, Speaker, noisy, voice_families

__all__ = ["spoken_splits", "voices"]

ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-us-nyc")
WORDS_A_MINUTE, PITCHES = (140, 220), (30, 70)
# From barely above the noise to a quiet room.
DECIBELS = (10.0, 30.0)


def voices() -> dict[str, list[str]]:
    """Variants of `train` and of `test`: every fifth family."""
    families = voice_families()
    held_out = {family for i, family in enumerate(families) if i % 5 == 2}
    return {
        "train": [voice for family in families if family not in held_out for voice in family],
        "test": [voice for family in families if family in held_out for voice in family],
    }


def spoken_splits(train: int, test: int) -> dict[str, pa.Table]:
    """So many rows of each, with columns `audio`, `text` and `voice`; the voices take turns."""
    speaker, splits = Speaker(), {}
    for seed, (name, count) in enumerate({"train": train, "test": test}.items()):
        rng, speakers = np.random.default_rng(seed), voices()[name]
        turns = watched(range(count), f"speaking for the {name} data")
        rows = [_row(speaker, speakers[i % len(speakers)], rng) for i in turns]
        splits[name] = pa.Table.from_pylist(rows)
    return splits


def _row(speaker: Speaker, variant: str, rng: np.random.Generator) -> dict[str, object]:
    import soundfile

    text, accent = phrase(rng), ACCENTS[rng.integers(len(ACCENTS))]
    speed, pitch = int(rng.integers(*WORDS_A_MINUTE)), int(rng.integers(*PITCHES))
    samples = speaker.say(text, f"{accent}+{variant}", speed, pitch)
    sink = io.BytesIO()
    soundfile.write(sink, noisy(samples, rng.uniform(*DECIBELS), rng), RATE, format="OGG", subtype="VORBIS")
    return {"audio": sink.getvalue(), "text": text, "voice": variant}
