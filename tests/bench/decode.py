"""Decoding by one thread and by all: photographs cut into JPEGs of several sizes, and sound.

python tests/bench/decode.py --json decode.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
from PIL import Image
from sklearn.datasets import load_sample_images

from dltrain.data import decode

SECONDS, ROUNDS = 0.5, 5


def tiles(pixels: int, count: int) -> pa.Array:
    """Squares of two photographs, at random places, scaled up where the photograph is too small."""
    random = np.random.default_rng(0)
    encoded = []
    for i in range(count):
        photo = Image.fromarray(load_sample_images().images[i % 2])
        side = min(pixels, 400)
        left, top = random.integers(0, photo.width - side), random.integers(0, photo.height - side)
        out = io.BytesIO()
        tile = photo.crop((left, top, left + side, top + side)).resize((pixels, pixels))
        tile.save(out, "JPEG", quality=90)
        encoded.append(out.getvalue())
    return pa.array(encoded)


def speech(form: str, count: int) -> pa.Array:
    """Five seconds each of noise with the slope of speech, at 16 kHz."""
    random = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        out = io.BytesIO()
        sound = np.cumsum(random.normal(0, 1, 80_000))
        soundfile.write(out, (0.5 * np.sin(sound / 50)).astype(np.float32), 16_000, format=form)
        encoded.append(out.getvalue())
    return pa.array(encoded)


def rate(function: Callable[[], Any], rows: int, threads: int) -> float:
    """Rows a second, the best of several rounds."""
    os.environ[decode.THREADS] = str(threads)
    best = 0.0
    for _ in range(ROUNDS):
        begin, done = time.perf_counter(), 0
        while time.perf_counter() - begin < SECONDS:
            function()
            done += rows
        best = max(best, done / (time.perf_counter() - begin))
    return best


def measure() -> list[dict[str, Any]]:
    cores = len(os.sched_getaffinity(0))
    cases: list[tuple[str, pa.Array, Callable[[Any], Any]]] = [
        ("JPEG 256 px", tiles(256, 256), decode.images),
        ("JPEG 256 px to 224", tiles(256, 256), partial(decode.images, size=(224, 224))),
        ("JPEG 1024 px to 224", tiles(1024, 64), partial(decode.images, size=(224, 224))),
        ("FLAC 5 s", speech("FLAC", 64), partial(decode.audio, rate=16_000)),
        ("WAV 5 s to 8 kHz", speech("WAV", 64), partial(decode.audio, rate=8_000)),
    ]
    found = []
    for name, column, decoder in cases:
        one, all_ = (rate(partial(decoder, column), len(column), threads) for threads in (1, cores))
        found.append({"what": name, "one": one, "all": all_, "threads": cores, "times": all_ / one})
        print(f"{name:22} 1 thread {one:7,.0f}/s   {cores} threads {all_:7,.0f}/s   x {all_ / one:.2f}", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="where to write the figures")
    path = parser.parse_args().json
    figures = measure()
    if path:
        with open(path, "w") as out:
            json.dump(figures, out, indent=1)
