"""espeak-ng speaks: its shared library and voices are in the wheel `espeakng-loader`, and are called with ctypes.

speaker = Speaker()
samples = speaker.say("turn on the light", voice="en-us+f1", speed=175, pitch=50)    # (samples,) in [-1, 1], 16 kHz

The library is one for a process and no threads share it. Said again in another process the samples are the same, but
for voices that whisper.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["RATE", "Speaker", "noisy", "voice_families"]

F32 = npt.NDArray[np.float32]
RATE = 16_000
# Of espeak-ng's speak_lib.h.
SYNCHRONOUS, SPEED, PITCH, UTF8 = 2, 1, 3, 1
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def voice_families() -> list[tuple[str, ...]]:
    """Variants of a voice that have one name but for a number, such as klatt and klatt2, sorted."""
    import espeakng_loader

    names = sorted(path.name for path in Path(espeakng_loader.get_data_path(), "voices", "!v").iterdir())
    groups = itertools.groupby(sorted(names, key=_family), key=_family)
    return [tuple(group) for _, group in groups]


def _family(name: str) -> str:
    return name.lower().rstrip("0123456789") if len(name) > 2 else name


class Speaker:
    """The library, ready to speak."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        path = espeakng_loader.get_data_path().encode()
        self._rate = int(self._library.espeak_Initialize(SYNCHRONOUS, 0, path, 0))
        if self._rate <= 0:
            raise RuntimeError(f"espeak-ng found no voices in {path.decode()}")
        self._pieces: list[npt.NDArray[np.int16]] = []
        # Kept, since the library calls it as long as it lives.
        self._callback = CALLBACK(self._take)
        self._library.espeak_SetSynthCallback(self._callback)

    def _take(self, samples: object, count: int, _: object) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())  # type: ignore[call-overload]
        return 0

    def say(self, text: str, voice: str, speed: int = 175, pitch: int = 50) -> F32:
        """Samples of a text, without the silence around it.

        Args:
            speed: words a minute; pitch: 0 to 99.
        """
        import soxr

        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self._library.espeak_SetParameter(SPEED, speed, 0)
        self._library.espeak_SetParameter(PITCH, pitch, 0)
        self._pieces.clear()
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, 0, 0, UTF8, None, None)
        samples = np.concatenate(self._pieces).astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(samples) > 0.01)
        return np.asarray(soxr.resample(samples[loud[0] : loud[-1] + 1], self._rate, RATE), np.float32)


def noisy(samples: F32, decibels: float, rng: np.random.Generator) -> F32:
    """With hiss or rumble, so many decibels below the voice, a tenth to a third of a second of it before and after."""
    before, after = rng.integers(RATE // 10, RATE // 3, 2)
    speech = np.pad(samples * (0.1 / np.sqrt(np.mean(samples**2))), (before, after))
    noise = rng.standard_normal(len(speech))
    if rng.random() < 0.5:
        # Low frequencies are louder: a falling spectrum.
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 1.0), len(speech))
    noise *= 0.1 / np.sqrt(np.mean(noise**2)) * 10 ** (-decibels / 20)
    return np.asarray((speech + noise) * rng.uniform(0.3, 1.5), np.float32).clip(-1, 1)
