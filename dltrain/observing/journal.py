"""The files of a run directory that grow or are rewritten while it runs.

    journal = Journal(store, "steps")       # steps.jsonl
    journal.add({"step": 1, "loss": 2.3}); journal.flush()
    for line in read_journal(store, "steps"): ...

A local directory gets one file that is appended to. Objects can't be appended: elsewhere the lines are kept
and uploaded as numbered parts, steps/00000001.jsonl, at every flush.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from dltrain.store import Store

__all__ = ["Journal", "is_local", "read_journal", "read_json", "write_json"]


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
        self._file: IO[str] | None = None
        if is_local(store):
            path = Path(store.path(f"{name}.jsonl"))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a")
        else:
            self._part = len(store.list(name))

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
            self._file.write(text)
            self._file.flush()
        else:
            self._store.write(f"{self._name}/{self._part + 1:08d}.jsonl", text.encode())
            self._part += 1

    def close(self) -> None:
        """Flushes to disk and closes."""
        self.flush()
        if self._file:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def read_journal(store: Store, name: str) -> Iterator[dict[str, Any]]:
    """The lines of a journal; a last one that was cut short by a crash is left out."""
    names = [f"{name}.jsonl"] if store.exists(f"{name}.jsonl") else store.list(name)
    for part in names:
        for line in store.read(part).decode().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


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
