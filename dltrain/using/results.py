"""What a task predicted, for whoever wants it: JSON, a line of text, a column of Parquet, files in a folder.

plain(result, keep)          # JSON's values; keep(name, artifact) says what stands for an Artifact
line(plain(result, keep))    # "label 7, probability 0.99"
column(results)              # pa.Array; dicts are structs, an Artifact is one of media_type, data, caption
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from dltrain.artifact import Artifact
from dltrain.errors import UserError
from dltrain.store import Store, open_store

__all__ = ["Folder", "column", "line", "plain"]

Keep = Callable[[str, Artifact], Any]
_ARTIFACT = ("media_type", "data", "caption")


def plain(value: Any, keep: Keep, name: str = "") -> Any:
    """A result as JSON has it.

    Args:
        keep: gives what stands for an Artifact, of which it is told under what name it was found.

    Raises:
        UserError: it holds something that JSON has no word for.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    match value:
        case Artifact():
            return keep(name, value)
        case Mapping():
            return {str(key): plain(item, keep, _joined(name, str(key))) for key, item in value.items()}
        case None | bool() | int() | float() | str():
            return value
        case Sequence() if not isinstance(value, bytes | bytearray):
            return [
                plain(item, keep, _joined(name, str(i)) if len(value) > 1 else name) for i, item in enumerate(value)
            ]
    raise UserError(
        f"task: a result holds {type(value).__name__}; results are numbers, text, None, lists and dicts of them, and "
        "Artifacts (Artifact.image, .audio, ...)"
    )


def _joined(name: str, key: str) -> str:
    return "-".join(part for part in (name, key) if part)


def line(value: Any) -> str:
    """A plain result for a terminal."""
    match value:
        case Mapping():
            return ", ".join(f"{key} {line(item)}" for key, item in value.items())
        case list():
            return f"[{', '.join(line(item) for item in value)}]"
        case float():
            return f"{value:.4g}"
    return str(value)


class Folder:
    """Where Artifacts are written to, each under a name of its own.

    Args:
        url: a directory; None keeps nothing but what can be shown as text.

    Attributes:
        files: those that were written; left: how many were not, for want of a folder.
    """

    def __init__(self, url: str | None) -> None:
        self._store: Store | None = open_store(url) if url else None
        self._taken: set[str] = set()
        self.files: list[str] = []
        self.left = 0

    @property
    def is_kept(self) -> bool:
        """Whether there is a folder."""
        return self._store is not None

    def keep(self, of: str) -> Keep:
        """For the Artifacts of one input's result: what stands for them in JSON."""
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.splitext(os.path.basename(of))[0]) or "result"

        def kept(name: str, artifact: Artifact) -> Any:
            said = {"caption": artifact.caption} if artifact.caption else {}
            if artifact.media_type == "text/plain":
                return artifact.data.decode()
            if self._store is None:
                self.left += 1
                return {"media_type": artifact.media_type, "bytes": len(artifact.data), **said}
            return {"file": self._write(_joined(stem, name), artifact), **said}

        return kept

    def _write(self, stem: str, artifact: Artifact) -> str:
        assert self._store is not None
        name, number = f"{stem}{artifact.suffix}", 1
        while name in self._taken:
            number += 1
            name = f"{stem}-{number}{artifact.suffix}"
        self._taken.add(name)
        self._store.write(name, artifact.data)
        self.files.append(f"{self._store.url}/{name}")
        return self.files[-1]


def column(results: Sequence[Any], kind: pa.DataType | None = None) -> pa.Array:
    """Results as a column; None is a missing value.

    Args:
        kind: what it must be; default: what these are.

    Raises:
        UserError: they are of different kinds, or of another than `kind`.
    """
    values = [None if value is None else plain(value, _as_struct) for value in results]
    if kind is not None and pa.types.is_struct(kind):
        # Arrow would leave them out without a word.
        new = {name for value in values if isinstance(value, Mapping) for name in value} - {f.name for f in kind}
        if new:
            raise UserError(f"task: predict returned {', '.join(map(repr, sorted(new)))}, which the first ones had not")
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        wanted = f"the first ones were {kind}" if kind else "all of them have to be of one"
        raise UserError(f"task: predict returned results of another kind, and {wanted}: {error}") from None


def _as_struct(_name: str, artifact: Artifact) -> dict[str, Any]:
    return {name: getattr(artifact, name) for name in _ARTIFACT}
