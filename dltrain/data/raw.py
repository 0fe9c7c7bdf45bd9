"""One thing that a trained network is used on, before it is a row: what a task's `read` gets.

Input("digit.png", data=b"...")        # a file
Input("line 3", text="how are you?")   # a line of stdin, or of `--text`
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Input"]


@dataclass(frozen=True)
class Input:
    """A file's bytes, or a line of text.

    Attributes:
        name: as it was given: a path, a URL, or which line it is.
        data: of a file, else None.
        text: of a line, without its end, else None.
    """

    name: str
    data: bytes | None = None
    text: str | None = None
