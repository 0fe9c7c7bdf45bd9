"""Artifacts are files that others can open."""

from __future__ import annotations

import base64
import io
import wave

import numpy as np
import pytest
from PIL import Image

from dltrain.artifact import Artifact


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_an_image_is_what_was_given(shape: tuple[int, ...]) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    made = Artifact.image(pixels, "a ramp")
    assert (made.suffix, made.caption) == (".png", "a ramp")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(made.data))), pixels)


def test_floats_are_grey_levels() -> None:
    made = Artifact.image(np.array([[0.0, 0.5, 1.0, 7.0]]))
    assert np.asarray(Image.open(io.BytesIO(made.data))).tolist() == [[0, 128, 255, 255]]


def test_an_animation_has_its_frames() -> None:
    frames = np.stack([np.full((5, 5), value, np.uint8) for value in (0, 120, 250)])
    picture = Image.open(io.BytesIO(Artifact.animation(frames, fps=10).data))
    assert (picture.n_frames, picture.info["duration"], picture.info["loop"]) == (3, 100, 0)


@pytest.mark.parametrize(("samples", "channels"), [(np.linspace(-1, 1, 50), 1), (np.zeros((50, 2)), 2)])
def test_audio_can_be_played(samples: np.ndarray, channels: int) -> None:
    made = Artifact.audio(samples, rate=8000)
    assert made.suffix == ".wav"
    with wave.open(io.BytesIO(made.data)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (channels, 8000, 50)
        first = np.frombuffer(file.readframes(1), "<i2")[0]
    assert first == round(float(samples.reshape(50, -1)[0, 0]) * 32767)


def test_a_table_shows_what_it_is_given_and_runs_none_of_it() -> None:
    made = Artifact.table([{"word": "<b>", "right": True}])
    assert made.suffix in (".html", ".htm")
    assert b"<td>&lt;b&gt;</td><td>True</td>" in made.data
    assert Artifact.table([]).data == b"<table><tr></tr></table>"


def test_a_notebook_shows_it() -> None:
    """By the protocol of IPython's display."""
    picture = Artifact.image(np.zeros((2, 2)), "a <ramp>")
    shown = picture._repr_mimebundle_()
    assert shown["text/plain"] == "a <ramp>"
    encoded = base64.b64encode(picture.data).decode()
    assert shown["text/html"] == f'<img src="data:image/png;base64,{encoded}"><div>a &lt;ramp&gt;</div>'
    assert (
        Artifact.audio(np.zeros(4), 8000)
        ._repr_mimebundle_()["text/html"]
        .startswith('<audio controls src="data:audio/wav')
    )
    assert Artifact.text("hello")._repr_mimebundle_() == {"text/plain": "hello"}
    assert "<table>" in Artifact.table([{"a": 1}])._repr_mimebundle_()["text/html"]
    assert Artifact("audio/midi", b"MThd", "a tune")._repr_mimebundle_() == {"text/plain": "a tune"}
    assert Artifact("application/zip", b"PK")._repr_mimebundle_() == {"text/plain": "application/zip, 2 bytes"}
