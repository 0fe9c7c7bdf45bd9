"""The files of a run directory that grow or are rewritten while it runs.

    journal = Journal(store, "steps")       # steps.jsonl
    journal.add({"step": 1, "loss": 2.3}); journal.flush()
    for line in read_journal(store, "steps"): ...

A local directory gets one file that is appended to. Objects can't be appended: elsewhere the lines are kept
and uploaded as numbered parts, steps/00000001-5f0c2a81.jsonl, at every flush; the second half is the writer's own,
since one that was replaced may not know it yet.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dltrain.store import Store

__all__ = ["Journal", "ends_a_line", "is_local", "journal_pieces", "read_journal", "read_json", "write_json"]

_PIECE_BYTES = 4 * 1024 * 1024
_READERS, _READ_AHEAD = 8, 64


def is_local(store: Store) -> bool:
    """Whether the store is a directory of this machine."""
    protocol = store.fs.protocol
    return "file" in (protocol if isinstance(protocol, tuple | list) else (protocol,))


class Journal:
    """Appends JSON lines; lines may be added while another thread flushes."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._lines: list[str] = []
        self._lock, self._flushing = threading.Lock(), threading.Lock()
        self._file: io.FileIO | None = None
        if is_local(store):
            path = Path(store.path(f"{name}.jsonl"))
            path.parent.mkdir(parents=True, exist_ok=True)
            # Without buffers, which would keep a part of what a full disk refused.
            self._file = path.open("ab", buffering=0)
            self._torn = not ends_a_line(path)
        else:
            self._part, self._mark = len(store.list(name)), uuid.uuid4().hex[:8]

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line; it is durable after the next flush."""
        with self._lock:
            self._lines.append(json.dumps(line))

    def flush(self) -> None:
        """Writes what was added.

        Raises:
            OSError, StoreError: it could not be written; the lines are kept for the next time.
        """
        with self._flushing:
            with self._lock:
                lines, self._lines = self._lines, []
            if not lines:
                return
            try:
                self._write("\n".join(lines) + "\n")
            except BaseException:
                with self._lock:
                    self._lines = lines + self._lines
                raise

    def _write(self, text: str) -> None:
        if self._file:
            self._append(self._file, text)
        else:
            self._store.write(f"{self._name}/{self._part + 1:08d}-{self._mark}.jsonl", text.encode())
            self._part += 1

    def _append(self, file: io.FileIO, text: str) -> None:
        """Writes all of it or nothing; after a line that a crash cut short it begins on a new one."""
        data = rest = memoryview((("\n" if self._torn else "") + text).encode())
        end, was_torn, self._torn = os.fstat(file.fileno()).st_size, self._torn, True
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            # What a full disk took of it goes again: everybody's tools are to be able to read the file. Not if it has
            # grown otherwise: a driver that was replaced may not know it yet.
            if os.fstat(file.fileno()).st_size == end + len(data) - len(rest):
                os.ftruncate(file.fileno(), end)
                self._torn = was_torn
            raise
        self._torn = False

    def close(self) -> None:
        """Flushes to disk and closes."""
        self.flush()
        if self._file:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def ends_a_line(path: Path) -> bool:
    """Whether a file's last line is whole; an empty one has none that is not."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) in (b"", b"\n")


def read_journal(store: Store, name: str, took: Callable[[], None] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a journal, read piece by piece; those that were cut short, by a crash or a full disk, are left out.

    Args:
        took: told of each piece; `journal_pieces` says how many there are.
    """
    rest = b""
    for piece in _pieces(store, name):
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()
        if took:
            took()
        for line in lines:
            # One that was cut short; what was written after it begins on a line of its own.
            with contextlib.suppress(ValueError):
                yield json.loads(line)
    with contextlib.suppress(ValueError):
        yield json.loads(rest)


def journal_pieces(store: Store, name: str) -> int:
    """In how many pieces a journal is read."""
    whole = f"{name}.jsonl"
    return -(-store.size(whole) // _PIECE_BYTES) if store.exists(whole) else len(store.list(name))


def _pieces(store: Store, name: str) -> Iterator[bytes]:
    """Of a file, pieces of one size; of objects, each of them, several at once: every one is a journey."""
    whole, start = f"{name}.jsonl", 0
    if store.exists(whole):
        while piece := store.read(whole, start, start + _PIECE_BYTES):
            start += len(piece)
            yield piece
        return
    parts = store.list(name)
    with ThreadPoolExecutor(_READERS) as pool:
        for i in range(0, len(parts), _READ_AHEAD):
            yield from pool.map(store.read, parts[i : i + _READ_AHEAD])


def write_json(store: Store, name: str, value: Mapping[str, Any]) -> None:
    """Rewrites a small file, whole or not at all."""
    store.write(name, (json.dumps(value, indent=2) + "\n").encode())


def read_json(store: Store, name: str) -> dict[str, Any] | None:
    """A small file, or None when there is none."""
    try:
        value: dict[str, Any] = json.loads(store.read(name))
    except (FileNotFoundError, ValueError):
        return None
    return value
