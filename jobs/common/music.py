"""Pieces of several voices as files to play and as a picture: MIDI, sound, a piano roll.

Pieces are (steps, voices) of MIDI pitches; a voice that keeps its pitch holds the note.
"""

from __future__ import annotations

import io
import itertools

import numpy as np
import numpy.typing as npt

from dltrain import Artifact

__all__ = ["midi", "piano_roll", "sound"]

I64 = npt.NDArray[np.int64]
RATE = 22_050
SECONDS = 0.5
TICKS = 480
COLORS = np.array([[31, 95, 168], [44, 140, 90], [214, 140, 40], [190, 50, 60]], np.uint8)


def notes(voice: I64) -> list[tuple[int, int]]:
    """Pitch and length in steps of each note, one after another."""
    return [(int(pitch), len(list(group))) for pitch, group in itertools.groupby(voice.tolist())]


def midi(piece: I64, caption: str = "") -> Artifact:
    """A MIDI file with a track for each voice."""
    import mido

    file = mido.MidiFile(ticks_per_beat=TICKS)
    for channel, voice in enumerate(piece.T):
        track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=int(SECONDS * 1e6))])
        for pitch, steps in notes(voice):
            track.append(mido.Message("note_on", channel=channel, note=pitch, velocity=72))
            track.append(mido.Message("note_off", channel=channel, note=pitch, time=steps * TICKS))
        file.tracks.append(track)
    sink = io.BytesIO()
    file.save(file=sink)
    return Artifact("audio/midi", sink.getvalue(), caption)


def sound(piece: I64, caption: str = "") -> Artifact:
    """A WAV: each note has four overtones that fade, the higher ones sooner."""
    length = int(RATE * SECONDS)
    out = np.zeros(length * len(piece))
    for voice in piece.T:
        begin = 0
        for pitch, steps in notes(voice):
            time = np.arange(steps * length) / RATE
            tone = 440 * 2 ** ((pitch - 69) / 12)
            parts = [np.sin(2 * np.pi * k * tone * time) * np.exp(-k * time) / k for k in range(1, 6)]
            # No click where it begins or ends.
            edge = np.minimum(time, time[::-1]).clip(max=0.02) / 0.02
            out[begin : begin + len(time)] += sum(parts) * edge
            begin += len(time)
    return Artifact.audio(0.8 * out / np.abs(out).max(), RATE, caption)


def piano_roll(piece: I64, caption: str = "", zoom: int = 6) -> Artifact:
    """Time to the right, pitch up, a colour for each voice."""
    low, high = int(piece.min()) - 2, int(piece.max()) + 3
    roll = np.full((high - low, len(piece), 3), 255, np.uint8)
    # The black keys.
    roll[[i for i in range(high - low) if (low + i) % 12 in (1, 3, 6, 8, 10)]] = 236
    for voice, color in zip(piece.T, COLORS, strict=False):
        roll[voice - low, np.arange(len(piece))] = color
    return Artifact.image(roll[::-1].repeat(zoom, 0).repeat(3 * zoom, 1), caption)
