"""How far long work has come, on stderr: for row in watched(range(9000), "drawing"): ..."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["watched"]

T = TypeVar("T")


def watched(things: Sequence[T], what: str) -> Iterable[T]:
    """The same things, with a progress bar on stderr while they are gone through."""
    from rich.console import Console
    from rich.progress import track

    return track(things, what, console=Console(file=sys.stderr), transient=True)
