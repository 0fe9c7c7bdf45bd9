"""Something for a person to look at or listen to: what a task shows of its work, and what it predicts.

    Artifact.image(pixels, caption="7 (99 %)")      # (height, width) or (height, width, 3)
    Artifact.audio(samples, rate=16_000)            # (samples,) or (samples, channels), in [-1, 1]
    Artifact.animation(frames, fps=8)               # (frames, height, width) or (frames, height, width, 3)
    Artifact.text("the transcript")

Files of common kinds, so that the report, a tracker and a folder can hold them alike.
"""

from __future__ import annotations

import base64
import io
import mimetypes
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from dltrain.errors import UserError

__all__ = ["Artifact"]


@dataclass(frozen=True)
class Artifact:
    """A file in memory.

    Attributes:
        media_type: such as "image/png" or "audio/wav".
        caption: a line that says what it is.
    """

    media_type: str
    data: bytes
    caption: str = ""

    @property
    def suffix(self) -> str:
        """Of a file that holds it, with its dot."""
        return {"audio/wav": ".wav", "audio/midi": ".mid"}.get(self.media_type) or (
            mimetypes.guess_extension(self.media_type) or ".bin"
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """How a notebook shows it."""
        kind = self.media_type.partition("/")[0]
        if kind == "text":
            return {self.media_type: self.data.decode(), "text/plain": self.data.decode()}
        label = self.caption or f"{self.media_type}, {len(self.data):,} bytes"
        # What no browser plays it is told of.
        if kind not in ("image", "audio") or self.media_type == "audio/midi":
            return {"text/plain": label}
        source = f"data:{self.media_type};base64,{base64.b64encode(self.data).decode()}"
        shown = f'<img src="{source}">' if kind == "image" else f'<audio controls src="{source}"></audio>'
        return {"text/html": f"{shown}<div>{escape(label)}</div>", "text/plain": label}

    @classmethod
    def text(cls, text: str, caption: str = "") -> Artifact:
        """Plain text."""
        return cls("text/plain", text.encode(), caption)

    @classmethod
    def table(cls, rows: Sequence[Mapping[str, Any]], caption: str = "") -> Artifact:
        """Rows with the same names, as an HTML table."""
        names = list(rows[0]) if rows else []
        cells = [[escape(str(row[name])) for name in names] for row in rows]
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
        return cls("text/html", f"<table><tr>{head}</tr>{body}</table>".encode(), caption)

    @classmethod
    def image(cls, pixels: Any, caption: str = "") -> Artifact:
        """A PNG of anything that numpy takes.

        Args:
            pixels: (height, width) or (height, width, 3), bytes, or floats in [0, 1].
        """
        sink = io.BytesIO()
        _picture(pixels).save(sink, "PNG")
        return cls("image/png", sink.getvalue(), caption)

    @classmethod
    def animation(cls, frames: Any, fps: float = 8.0, caption: str = "") -> Artifact:
        """A GIF that repeats.

        Args:
            frames: (frames, height, width) or (frames, height, width, 3), as in `image`.
        """
        pictures, sink = [_picture(frame) for frame in frames], io.BytesIO()
        pictures[0].save(
            sink, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, disposal=2
        )
        return cls("image/gif", sink.getvalue(), caption)

    @classmethod
    def audio(cls, samples: Any, rate: int, caption: str = "") -> Artifact:
        """A WAV of 16 bits.

        Args:
            samples: (samples,) or (samples, channels), floats in [-1, 1]; what is louder is clipped.
            rate: samples per second.
        """
        values = np.asarray(samples, np.float64)
        values = values[:, None] if values.ndim == 1 else values
        pcm = np.round(values.clip(-1.0, 1.0) * 32767).astype("<i2")
        sink = io.BytesIO()
        with wave.open(sink, "wb") as file:
            file.setnchannels(values.shape[1])
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(pcm.tobytes())
        return cls("audio/wav", sink.getvalue(), caption)


def _picture(pixels: Any) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UserError("pictures need Pillow: pip install 'dltrain[images]'") from None
    values = np.asarray(pixels)
    if values.dtype != np.uint8:
        values = np.round(values.astype(np.float64).clip(0.0, 1.0) * 255).astype(np.uint8)
    return Image.fromarray(values)
